"""How quantised weights are stored: what the tensors of a weight are called, and their types.

`ENCODINGS` is the only place that knows; `encoded` makes from a family's layout the layouts it has
when quantised. What stands beside weights in real files and is not used is named here, with why.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from moepad.parts import Layout, Part

__all__ = ["ENCODINGS", "QUANTS", "REFUSED", "Encoding", "encoded"]

_FP8 = ("fp8_tensor", "fp8_channel", "fp8_block")
QUANTS = (*_FP8, "mxfp8", "mxfp4", "int8_channel", "int4_group")

_FLOATS = ("f32", "bf16", "f16")
_E8M0 = ("u8", "f8_e8m0")
_N_PACK = {"mxfp4": 2, "int4_group": 2}
_GROUPED = ("mxfp8", "mxfp4", "int4_group")


@dataclass(frozen=True)
class Encoding:
    """How one tool stores a quantised weight.

    Attributes
    ----------
    quants : tuple of str
        Kinds of `moepad.plan` that it stores so.
    scale : str
        Follows the weight's name in its scale's; one that begins with a dot takes the place of
        ".weight".
    weight : str
        Follows the unquantised weight's name, or takes the place of its ".weight".
    dtypes : tuple of str
        Types of the weight; () for the plan's.
    form : str
        As of `Part`.
    """

    quants: tuple[str, ...]
    scale: str
    weight: str = ""
    dtypes: tuple[str, ...] = ()
    form: str = ""


ENCODINGS = (
    # Hugging Face's fp8 (DeepSeek, Qwen, MiniMax, Step), SGLang's mxfp8, transformers' own modules.
    Encoding(("fp8_block", "fp8_tensor", "mxfp8"), "_scale_inv"),
    Encoding(("mxfp4",), "_scale_inv", dtypes=("i8", "u8")),
    # compressed-tensors, Quark, ModelOpt.
    Encoding((*_FP8, "mxfp8", "int8_channel"), "_scale"),
    Encoding(("mxfp4",), "_scale", dtypes=("u8",)),  # Quark
    Encoding(("mxfp4",), "_scale", "_packed", ("u8",)),  # compressed-tensors
    Encoding(("int4_group",), "_scale", "_packed", ("i32",), "words"),  # compressed-tensors
    Encoding(("int4_group",), ".scales", ".qweight", ("i32",), "tall words"),  # GPTQ, symmetric
    # DeepSeek-V4.
    Encoding(("mxfp4",), ".scale", dtypes=("i8", "u8")),
    Encoding(("fp8_block",), ".scale"),
    # gpt-oss.
    Encoding(("mxfp4",), "_scales", "_blocks", ("u8",), "blocks"),
)

# Beside a weight: the scale of static activations, by the tensor they go into.
_INPUT_SCALES = ("input_scale", "activation_scale")
_INTO = {"w13": "x_scale", "w2": "h_scale"}

# Beside a weight: kept as they are and given back, but no part of the result here, where the plan
# says the same (a shape, zero points of symmetric weights, columns in order).
_SHAPE = "weight_shape"
_WORD = 8  # 4-bit values of an int32

# Beside a weight: would change the result, so that no layer with one is loaded.
REFUSED = {
    "weight_zero_point": "asymmetric weights are not supported; quantise symmetrically",
    "weight_g_idx": "columns in another order (act-order) are not supported; quantise without it",
    "weight_scale_2": "NVFP4 is not supported; use a checkpoint in mxfp4, fp8 or bf16",
    "weight_global_scale": "NVFP4 is not supported; use a checkpoint in mxfp4, fp8 or bf16",
    "input_global_scale": "NVFP4 is not supported; use a checkpoint in mxfp4, fp8 or bf16",
}


@functools.lru_cache
def encoded(layout: Layout, quant: str, block: tuple[int, int]) -> tuple[Layout, ...]:
    """The layouts of a family's experts quantised as the plan says; of a quantised row, itself.

    Parameters
    ----------
    layout : Layout
        Of unquantised weights, or one that exists quantised only (its weights have a `form`).
    quant : str
    block : (int, int)
        As `Plan.block`.
    """
    if quant == "none":
        return () if _is_blocks(layout) else (layout,)
    rows = [row for row in ENCODINGS if quant in row.quants and _may_be(layout, row, quant)]
    return tuple(_encode(layout, row, quant, block) for row in rows)


def _is_blocks(layout: Layout) -> bool:
    return any(part.form == "blocks" for part in layout.parts)


def _may_be(layout: Layout, row: Encoding, quant: str) -> bool:
    if _is_blocks(layout) != (row.form == "blocks"):
        return False
    weights = [part for part in layout.parts if part.into in ("w13", "w2")]
    if row.form.endswith("words") or row.scale.startswith("."):  # one matrix a tensor
        return all(p.name.endswith(".weight") and not p.has_experts for p in weights)
    if quant in _GROUPED and any(part.is_transposed for part in weights):
        return False
    return not (quant == "fp8_block" and any("X" in part.axes for part in weights))


def _encode(layout: Layout, row: Encoding, quant: str, block: tuple[int, int]) -> Layout:
    parts: list[Part] = []
    for part in layout.parts:
        if part.into not in ("w13", "w2"):
            parts.append(part)
            continue
        name = _named(part, row.weight)
        weight = part._replace(name=name, dtypes=row.dtypes, form=row.form)
        weight = _in_units(weight, 1, _N_PACK.get(quant, 1))
        parts += [weight, _scale(part, row, quant, block), *_extras(part, row, block)]
    return replace(layout, parts=tuple(parts))


def _scale(part: Part, row: Encoding, quant: str, block: tuple[int, int]) -> Part:
    dtypes: tuple[str, ...] = _E8M0 if quant.startswith("mx") else _FLOATS
    if quant == "fp8_block":
        dtypes = (*_FLOATS, "f8_e8m0")
    name = _named(part, row.scale)
    scale = part._replace(name=name, into=f"{part.into}_scale", form="", dtypes=dtypes)
    if quant == "fp8_block" or quant in _GROUPED:
        axes = scale.axes[::-1] if row.form == "tall words" else scale.axes
        return _in_units(scale._replace(axes=axes), *block)
    reduced = "I" if part.into == "w2" else "H"
    if quant.endswith("channel"):
        kept, dropped = part.axes.replace(reduced, "1"), part.axes.replace(reduced, "")
        return scale._replace(axes=kept, others=(dropped,))
    experts = "E" if part.has_experts else ""
    if len(part.halves) == 1:
        return scale._replace(axes=experts, others=(f"{experts}1", f"{experts}11"))
    others = (f"{experts}G", f"{experts}G1", f"{experts}1", f"{experts}11")
    return scale._replace(axes=experts, others=others)


def _in_units(part: Part, row: int, column: int) -> Part:
    """With so many rows and columns of the matrix to one stored element."""
    if part.into.startswith("w2"):
        return part._replace(hidden_unit=row, inter_unit=column)
    return part._replace(inter_unit=row, hidden_unit=column)


def _named(part: Part, ending: str) -> str:
    stem = part.name.removesuffix(".weight") if ending.startswith(".") else part.name
    return stem + ending


def _extras(part: Part, row: Encoding, block: tuple[int, int]) -> Iterable[Part]:
    experts = "E" if part.has_experts else ""
    stem, joint = (
        (part.name.removesuffix(".weight"), ".")
        if part.name.endswith(".weight")
        else (part.name, "_")
    )
    for name in _INPUT_SCALES:
        others = (f"{experts}1", f"{experts}11")
        into = _INTO[part.into]
        yield Part(f"{stem}{joint}{name}", into, experts, dtypes=_FLOATS, others=others)
    if row.form == "words":
        axes = part.axes.removeprefix("E")
        yield Part(f"{stem}.{_SHAPE}", "extra", "G", dtypes=("i64", "i32"), states=axes)
    if row.form == "tall words":
        rows, columns = tuple(part.axes.replace("I", "i"))
        zeros = _in_units(part, _WORD, block[1])
        for name, axes, like, states in (
            ("qzeros", columns + rows, zeros, "zeros"),
            ("g_idx", columns, part, "order"),
        ):
            yield like._replace(
                name=f"{stem}.{name}", into="extra", axes=axes, dtypes=("i32",), states=states
            )
