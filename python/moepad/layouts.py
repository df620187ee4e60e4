"""The names and axes of the model families' expert tensors, and where a layer's experts are.

`LAYOUTS` is the only place that knows how a family names and orders them. Looks at names, and at
shapes where those of the names leave a doubt; knows nothing of ranks or pads.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from moepad._core import CheckpointError
from moepad.checkpoint import Source
from moepad.encodings import QUANTS, REFUSED, encoded
from moepad.parts import Layout, Part, Sizes, join, template

__all__ = ["LAYOUTS", "expert_prefixes", "find_experts", "layouts_of"]


def _per_expert(name: str, gate: str | None, up: str, down: str) -> Layout:
    return _per_matrix(name, gate, up, down, "{e}.", "")


def _per_matrix(
    name: str, gate: str | None, up: str, down: str, before: str, experts: str, **rest: Any
) -> Layout:
    """Gate and up in tensors of their own, of one expert or (`experts` = "E") of all."""
    rows = [(up, 0)] if gate is None else [(gate, 0), (up, 1)]
    return Layout(
        name,
        gate is not None,
        (
            *(
                Part(f"{before}{stem}.weight", "w13", f"{experts}IH", (half,))
                for stem, half in rows
            ),
            Part(f"{before}{down}.weight", "w2", f"{experts}HI"),
            *(
                Part(f"{before}{stem}.bias", "w13_bias", f"{experts}I", (half,))
                for stem, half in rows
            ),
            Part(f"{before}{down}.bias", "w2_bias", f"{experts}H"),
        ),
        **rest,
    )


def _fused(
    name: str, up: str, up_axes: str, down: str, down_axes: str, form: str = "", **rest: Any
) -> Layout:
    letter = next(c for c in up_axes if c in "ICX")
    halves = (0,) if letter == "I" else (0, 1)
    bias = re.sub(r"\.weight$", ".bias", up), re.sub(r"\.weight$", ".bias", down)
    if bias[0] == up:
        bias = f"{up}_bias", f"{down}_bias"
    return Layout(
        name,
        letter != "I",
        (
            Part(up, "w13", up_axes, halves, form=form),
            Part(down, "w2", down_axes, form=form),
            Part(bias[0], "w13_bias", f"E{letter}", halves),
            Part(bias[1], "w2_bias", "EH"),
        ),
        **rest,
    )


LAYOUTS = (
    # Qwen-MoE, DeepSeek, GLM, OLMoE, Ernie 4.5, Hunyuan, dots1, Jamba.
    _per_expert("gate_up_down", "gate_proj", "up_proj", "down_proj"),
    # Mixtral, Phi-MoE, MiniMax-M2, LFM2.
    _per_expert("w1_w3_w2", "w1", "w3", "w2"),
    # Nemotron-H.
    _per_expert("up_down", None, "up_proj", "down_proj"),
    # Modules of transformers 5 in memory.
    _fused("fused", "gate_up_proj", "ECH", "down_proj", "EHI", have_bias=False),
    # Every family known to store [E, H, 2I] without biases concatenates gate and up, and the one
    # that interleaves them has biases; another one needs `layout=`.
    _fused(
        "fused_transposed", "gate_up_proj", "EHC", "down_proj", "EIH", have_bias=False,
        model_types=("llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"),
    ),
    _fused(
        "gpt_oss", "gate_up_proj", "EHX", "down_proj", "EIH", have_bias=True,
        model_types=("gpt_oss",),
    ),
    _fused("fused_interleaved", "gate_up_proj", "EXH", "down_proj", "EHI", is_explicit=True),
    _fused("fused_ungated", "up_proj", "EIH", "down_proj", "EHI"),
    _fused("fused_ungated_transposed", "up_proj", "EHI", "down_proj", "EIH"),
    # Granite-MoE; its prefix is the block itself, "model.layers.0.block_sparse_moe".
    _fused("granite", "input_linear.weight", "ECH", "output_linear.weight", "EHI"),
    # Step-3.5; its prefix is the block itself, "model.layers.3.moe".
    _per_matrix(
        "stacked", "gate_proj", "up_proj", "down_proj", "", "E", block_names=("moe", "experts")
    ),
)  # fmt: skip

# Families whose experts have another order of axes when quantised.
_QUANTISED_LAYOUTS = (
    _fused(
        "gpt_oss", "gate_up_proj", "EXH", "down_proj", "EHI", "blocks", have_bias=True,
        model_types=("gpt_oss",),
    ),
)  # fmt: skip


@functools.lru_cache
def layouts_of(quant: str, block: tuple[int, int]) -> tuple[Layout, ...]:
    """All layouts that weights of one kind of quantisation may have.

    Parameters
    ----------
    quant : str
    block : (int, int)
        As `Plan.quant`, `Plan.block`.
    """
    rows = LAYOUTS if quant == "none" else (*LAYOUTS, *_QUANTISED_LAYOUTS)
    return tuple(made for row in rows for made in encoded(row, quant, block))


_ALL = tuple(layout for quant in ("none", *QUANTS) for layout in layouts_of(quant, (1, 1)))
_ALL_NAMES = frozenset(part.name for layout in _ALL for part in layout.parts)


def _any_weight(block_names: tuple[str, ...]) -> str:
    """A pattern of the names of weights, with all before them, that lie in such blocks."""
    layouts = [layout for layout in _ALL if layout.block_names == block_names]
    names = {p.name for layout in layouts for p in layout.parts if p.into in ("w13", "w2")}
    weights = "|".join(sorted(re.escape(name).replace(r"\{e\}", r"\d+") for name in names))
    root = rf"(?:.+\.)?(?:{'|'.join(block_names)})" if block_names else ".+"
    return rf"({root})\.(?:{weights})"


# Any weight of any layout, below any prefix that may have it.
_WEIGHT = re.compile("|".join(map(_any_weight, sorted({lay.block_names for lay in _ALL}))))


def expert_prefixes(source: Source) -> list[str]:
    """The prefixes under which a source holds routed experts, layer 10 after layer 9."""
    found = (_WEIGHT.fullmatch(name) for name in source.names())
    roots = {next(filter(None, match.groups())) for match in found if match}
    return sorted((root for root in roots if "shared" not in root), key=_natural)


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", text)]


def find_experts(
    source: Source, prefix: str, sizes: Sizes, layout: str | None = None
) -> tuple[str, Layout]:
    """Where the experts of one layer are, and how they are stored.

    The layout is decided by, in this order: `layout`; what `Experts.save` wrote down; the
    `model_type` of config.json; the names; the shapes where several layouts share their names.
    Where that leaves more than one, nothing is guessed.

    Parameters
    ----------
    source : Source
    prefix : str
        Of the experts ("model.layers.0.mlp.experts") or of the block that has them as `experts`
        ("model.layers.0.mlp"); a trailing dot is accepted, "" is for a module's own state_dict.
    sizes : Sizes
    layout : str, optional
        Name of a row of `LAYOUTS`.

    Returns
    -------
    (str, Layout)
        The prefix that the parts' names follow, without a dot.

    Raises
    ------
    CheckpointError
        No experts there, two naming schemes at once, a layout that cannot be told, tensors that
        do not belong, or experts beyond the expected number.
    ValueError
        `layout` is not the name of a layout, or one of the other kind (gated or not).
    """
    root, below = _find_root(source, prefix.rstrip("."))
    if layout is None:
        chosen = _recognise(source, root, below, sizes)
    else:
        chosen = _named_layout(source, root, below, layout, sizes)
        if chosen.is_gated != sizes.is_gated:
            raise ValueError(
                f"layout: {layout!r} is for experts with gated={chosen.is_gated}, the plan has "
                f"gated={sizes.is_gated}"
            )
    _check_halves(root, chosen, sizes)
    _check_names(source, root, below, chosen, sizes)
    return root, chosen


def _named_layout(source: Source, root: str, below: list[str], name: str, sizes: Sizes) -> Layout:
    named = [layout for layout in layouts_of(sizes.quant, sizes.block) if layout.name == name]
    if not named:
        known = dict.fromkeys(layout.name for layout in layouts_of(sizes.quant, sizes.block))
        raise ValueError(f"layout: expected one of {', '.join(known)}, got {name!r}")
    return (_by_names(source, root, below, named) or named)[0]


def _find_root(source: Source, prefix: str) -> tuple[str, list[str]]:
    """The prefix or its `experts`, whichever has weights, and the names below it."""
    places = {}
    for root in (prefix, join(prefix, "experts")):
        start = join(root, "")
        below = [n.removeprefix(start) for n in source.names() if n.startswith(start)]
        known = {p.name for lay in _ALL if _may_lie(lay, root) for p in lay.parts}
        if any(template(name)[0] in known for name in below):
            places[root] = below
    if len(places) > 1:
        raise CheckpointError(
            f"prefix: experts lie under both {' and '.join(places)} in {source.label}; name one of "
            "them whole"
        )
    if not places:
        _check_refused(source, join(prefix, ""))
        roots = expert_prefixes(source)
        there = ", ".join(roots[:4]) + (f" and {len(roots) - 4} more" if len(roots) > 4 else "")
        raise CheckpointError(
            f"prefix: no expert weights under {prefix!r} in {source.label}; experts in a known "
            f"layout lie under: {there or 'no prefix at all'}"
        )
    return places.popitem()


def _check_refused(source: Source, start: str) -> None:
    """Fails with the reason where weights lie that no kind of quantisation here has."""
    for name in source.names():
        for ending, why in REFUSED.items():
            if name.startswith(start) and name.endswith(ending):
                raise CheckpointError(f"{name} in {source.label}: {why}")


def _may_lie(layout: Layout, root: str) -> bool:
    return not layout.block_names or root.rpartition(".")[2] in layout.block_names


def _by_names(
    source: Source, root: str, below: list[str], layouts: Iterable[Layout]
) -> list[Layout]:
    """The layouts with a tensor among the names; of a quantised one, a weight and a scale."""
    there = {template(name)[0] for name in below}

    def has(layout: Layout, kind: str) -> bool:
        names = {p.name for p in layout.parts if p.into in (f"w13{kind}", f"w2{kind}")}
        return not names or not names.isdisjoint(there)

    return [lay for lay in layouts if _may_lie(lay, root) and has(lay, "") and has(lay, "_scale")]


def _recognise(source: Source, root: str, below: list[str], sizes: Sizes) -> Layout:
    layouts = [lay for lay in layouts_of(sizes.quant, sizes.block) if _may_lie(lay, root)]
    matching = _by_names(source, root, below, (x for x in layouts if x.is_gated == sizes.is_gated))
    if not matching:
        raise CheckpointError(_unmatched(source, root, below, sizes))
    schemes = {layout.scheme: layout for layout in matching}
    if len(schemes) > 1:
        names = [_first_of(below, scheme, schemes) for scheme in schemes]
        raise CheckpointError(
            f"{root}: stored twice in {source.label}, in different layouts: "
            f"{' and '.join(join(root, name) for name in names)}; remove one, or keep it out of "
            "the source"
        )
    _check_halves(root, matching[0], sizes)
    if hint := _hint(source, root, below, matching):
        return hint
    have_bias = any(found[0].is_bias for n in below if (found := matching[0].match(n)))
    candidates = [
        layout
        for layout in matching
        if not layout.is_explicit and layout.have_bias in (None, have_bias)
    ]
    if len(matching) > 1:
        candidates = [layout for layout in candidates if _fits(source, root, below, layout, sizes)]
    if len(candidates) == 1:
        return candidates[0]
    raise CheckpointError(_undecided(source, root, below, candidates or matching, sizes))


def _check_halves(root: str, layout: Layout, sizes: Sizes) -> None:
    """Fails where gate and up lie in one tensor and a block of scales is of both."""
    for part in layout.parts:
        if part.is_scale and "C" in part.axes and sizes.n_inter % part.inter_unit:
            raise CheckpointError(
                f"{join(root, part.name)}: gate and up of n_inter={sizes.n_inter} in one tensor "
                f"share blocks of {part.inter_unit} rows; store each expert's matrices by "
                "themselves"
            )


def _first_of(below: list[str], scheme: frozenset[str], schemes: Iterable[frozenset[str]]) -> str:
    """A name of the scheme that not all the others have."""
    own = {part for part in scheme if not all(part in other for other in schemes)}
    return next(name for name in below if template(name)[0] in own)


def _unmatched(source: Source, root: str, below: list[str], sizes: Sizes) -> str:
    """Why no layout has these names, and what to do."""
    there = {template(name)[0] for name in below}
    whole = [lay for lay in _ALL if _may_lie(lay, root) and lay.scheme <= there]
    others = [lay for lay in whole if not any(lay.scheme < other.scheme for other in whole)]
    kinds = [q for q in ("none", *QUANTS) if any(lay in layouts_of(q, (1, 1)) for lay in others)]
    gated = {lay.is_gated for lay in others}
    if gated and sizes.is_gated not in gated:
        way_out = f"make the plan with gated={not sizes.is_gated}"
    elif kinds and sizes.quant not in kinds:
        way_out = f"make the plan with quant={' or '.join(map(repr, kinds))}"
    else:
        way_out = "complete the checkpoint, or make the plan with its gated and quant"
    first = next(name for name in below if template(name)[0] in _ALL_NAMES)
    return (
        f"{root}: holds no experts with gated={sizes.is_gated}, quant={sizes.quant!r} in "
        f"{source.label}, but {join(root, first)}; {way_out}"
    )


def _hint(source: Source, root: str, below: list[str], matching: list[Layout]) -> Layout | None:
    """The layout that the files themselves or config.json name."""
    said = source.layouts(join(root, name) for name in below)
    for layout in matching:
        if layout.name in said or (not said and source.model_type in layout.model_types):
            return layout
    return None


def _fits(source: Source, root: str, below: list[str], layout: Layout, sizes: Sizes) -> bool:
    return all(
        stored.shape in (sizes.shape(part) for part in found[0].variants)
        for name in below
        if (found := layout.match(name)) and not found[0].is_optional
        for stored in source.find(join(root, name))
    )


def _undecided(
    source: Source, root: str, below: list[str], candidates: list[Layout], sizes: Sizes
) -> str:
    stored = [s for n in below if candidates[0].match(n) for s in source.find(join(root, n))]
    got = ", ".join(f"{s.name} {s.shape}" for s in stored)
    accepted = "; ".join(
        f"layout={layout.name!r} has "
        + " and ".join(
            f"{p.name} {sizes.shape(p)}" for p in layout.used_parts(False) if not p.is_optional
        )
        for layout in candidates
    )
    return (
        f"{root or 'prefix'}: names and shapes in {source.label} do not tell one layout: got "
        f"{got}; {accepted}; pass layout="
    )


def _check_names(source: Source, root: str, below: list[str], layout: Layout, sizes: Sizes) -> None:
    """Below a module of experts every tensor must have its place: one left over is data lost."""
    parts = layout.used_parts(sizes.have_bias)
    is_module = root.rpartition(".")[2] in ("experts", "")
    for name in below:
        part, expert = layout.match(name) or (None, None)
        if part in parts and (expert is None or expert < sizes.n_expert):
            continue
        if part is None and not is_module and not _is_beside(name, layout):
            continue
        places = ", ".join(stored.place for stored in source.find(join(root, name)))
        raise CheckpointError(f"{join(root, name)} in {places}: " + _stray(name, layout, sizes))


def _is_beside(name: str, layout: Layout) -> bool:
    """A tensor of the same matrix as one of the layout's weights."""
    stems = {part.name.removesuffix(".weight") for part in layout.parts}
    return template(name)[0].rpartition(".")[0] in stems


def _stray(name: str, layout: Layout, sizes: Sizes) -> str:
    """Why a tensor that lies among the experts must not, and what to do."""
    part, expert = layout.match(name) or (None, None)
    if part in layout.used_parts(sizes.have_bias):
        return (
            f"expected experts 0 to {sizes.n_expert - 1}, got expert {expert}; make the plan with "
            "the checkpoint's n_expert"
        )
    if part is not None:
        return "expected no biases, got one; make the plan with bias=True"
    names = ", ".join(p.name for p in layout.used_parts(sizes.have_bias) if not p.is_optional)
    return f"not a tensor of layout {layout.name!r}, which has {names}; {_way_out(name, layout)}"


def _way_out(name: str, layout: Layout) -> str:
    for ending, why in REFUSED.items():
        if name.endswith(ending):
            return why
    owners = [other for other in _ALL if other.match(name)]
    if any(owner.name == layout.name for owner in owners):
        kinds = [
            quant
            for quant in ("none", *QUANTS)
            if any(o.name == layout.name and o in owners for o in layouts_of(quant, (1, 1)))
        ]
        return (
            "it belongs to weights quantised in another way: make the plan with quant="
            f"{' or '.join(map(repr, kinds))}"
        )
    if not owners:
        return "nothing is known of such a tensor; take it out if the experts do not need it"
    if all(owner.is_gated != layout.is_gated for owner in owners):
        return f"make the plan with gated={not layout.is_gated}"
    return f"it is one of layout {owners[0].name!r}"
