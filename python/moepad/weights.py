"""Expert weights of one layer on one rank: loading, running, updating in place, saving.

Every size comes from the `Plan`, every name and order of axes from `moepad.layouts`; this file
moves elements between the two, by one function for both directions.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moepad._core import CheckpointError, copy, fused_moe
from moepad.checkpoint import NUMPY_DTYPES, Shard, SourceLike, Stored, open_source
from moepad.devices import DeviceArray, Memory, memory_of, on_host
from moepad.elements import as_held, as_stored, bytes_apart
from moepad.layouts import find_experts
from moepad.padding import Plan
from moepad.parts import Layout, Part, Sizes, join

__all__ = ["Experts", "load_experts"]

Array = NDArray[Any]


def load_experts(
    source: SourceLike,
    prefix: str,
    plan: Plan,
    *,
    device: Any = "cpu",
    layout: str | None = None,
    progress: bool | None = None,
) -> Experts:
    """Load what one rank holds of one layer's experts.

    Only this rank's columns and experts are read. Memory never holds more than the result plus one
    expert's tensors (with a mapping that makes its values on access: plus one such value).

    Parameters
    ----------
    source : path, mapping or Source
        A Hugging Face checkpoint folder (safetensors, with or without an index), a folder of files
        that `Experts.save` wrote (of any tensor- and expert-parallel size), one .safetensors file,
        a mapping of names to arrays or tensors, or what `moepad.checkpoint.open_source` returned:
        open a large folder once and pass that for every layer and rank.
    prefix : str
        Of the experts, "model.layers.0.mlp.experts", or of the block that has them as `experts`.
        Shared experts are never taken.
    plan : Plan
        The stored tensors must have its sizes, `quant` and types. Scales may be f32, bf16 or f16
        where the plan has f32, and become f32. Weights in f8_e4m3fn become f8_e4m3fnuz where the
        plan says so: the same bytes, 0 for 0x80, and scales twice as large, so that every weight
        is exactly what it was.
    device : str or torch.device
        Where the tensors go: "cpu", "cuda:1", "hip:0" (see `moepad.devices.memory_of`). On a GPU
        they are `moepad.devices.DeviceArray`, memory of the runtime's own, filled through pinned
        buffers of 64 MiB while the next values are read.
    layout : str, optional
        How the tensors are named and ordered: a name of `moepad.layouts.LAYOUTS`. Needed only
        where config.json, names and shapes leave it open. How quantised weights are stored shows
        in their names.
    progress : bool, optional
        Show a progress bar; default: where stderr is a terminal.

    Returns
    -------
    Experts

    Raises
    ------
    CheckpointError
        A tensor is missing, stored twice, of another shape or dtype, or does not belong; an expert
        is missing or beyond the plan; a file is truncated, corrupt or missing; a scale, or a weight
        to be converted, is NaN; a scale of activations is negative.
    DeviceError
        The device's runtime is missing, or reports a failure; nothing stays allocated.
    UnsupportedError
        There are no kernels for the device.
    ValueError
        `layout` or `device` is unknown.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a moepad.Plan, got {type(plan).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a str, got {type(prefix).__name__}")
    memory = memory_of(device)
    inventory = _take_inventory(source, prefix, plan, layout)
    experts = Experts(plan, inventory.root, inventory.layout, memory)
    experts._fill(inventory, progress)
    experts.extras = inventory.extras
    return experts


class Experts:
    """The experts of one MoE layer that one rank holds; made by `load_experts`.

    Attributes
    ----------
    w13 : array, [E, 2*Ip, H], or [E, Ip, H] where not gated
        Gate rows [0, I), up rows [Ip, Ip + I); the rest is pad: zero after loading, never read.
        The 4-bit kinds have two weights in each byte of a row.
    w2 : array, [E, H, Ip]
    w13_scale, w2_scale : array, or None
        Of the plan's `w13_scale_shape`, `w2_scale_shape`; pads are 1 after loading, never read.
    w13_bias : array, [E, 2*Ip] or [E, Ip], or None
    w2_bias : array, [E, H], or None
        Zero except on tensor-parallel rank 0, so that the sum over ranks has it once.
    x_scale, h_scale : array of float32, [1], or None
        Fixed scales of the inputs of w13 and of w2, where the checkpoint has static ones: the
        largest of all that this rank's experts have (of x, gate's and up's), as SGLang and vLLM
        take it, so ranks with other experts may have another one. None unless each expert has one,
        and if all are 0.
    extras : dict of str to array
        What the checkpoint has beside the weights, as it is there, by its name below the prefix:
        scales of activations, each by itself, shapes.
    plan : Plan
    device : str
        "cpu", "cuda:0", "hip:0".
    prefix, layout : str
        What the tensors' names in `state_dict` begin with, and the `moepad.layouts.Layout` they
        and their axes follow: those first loaded from.
    """

    def __init__(self, plan: Plan, root: str, layout: Layout, memory: Memory) -> None:
        dtype, bias_dtype = NUMPY_DTYPES[plan.storage_dtype], NUMPY_DTYPES[plan.bias_dtype]
        zeros = memory.zeros
        self.plan = plan
        self.device = str(memory)
        self.w13 = zeros(plan.w13_shape, dtype)
        self.w2 = zeros(plan.w2_shape, dtype)
        self.w13_scale = _ones(memory, plan.w13_scale_shape, plan.scale_dtype)
        self.w2_scale = _ones(memory, plan.w2_scale_shape, plan.scale_dtype)
        self.w13_bias = zeros(plan.w13_bias_shape, bias_dtype) if plan.w13_bias_shape else None
        self.w2_bias = zeros(plan.w2_bias_shape, bias_dtype) if plan.w2_bias_shape else None
        self.x_scale: Any = None
        self.h_scale: Any = None
        self.extras: dict[str, Array] = {}
        self.prefix, self.layout = root, layout.name
        self._layout = layout
        self._memory = memory
        self._expert_map: Array | DeviceArray | None = None
        if plan.ep_size > 1:
            ids = np.full(plan.n_expert_global, -1, np.int32)
            ids[plan.expert_start : plan.expert_stop] = np.arange(plan.n_expert)
            self._expert_map = _placed(memory, ids)

    def __repr__(self) -> str:
        p = self.plan
        return (
            f"<Experts {self.prefix!r} ({self.layout}): columns [{p.start}, {p.stop}) of "
            f"{p.n_inter_global} in {p.n_inter_pad}, experts [{p.expert_start}, {p.expert_stop}) "
            f"of {p.n_expert_global}, {p.storage_dtype}, {self.device}>"
        )

    def __call__(self, hidden_states: Any, topk_weights: Any, topk_ids: Any, **options: Any) -> Any:
        """Run `moepad.fused_moe` on this rank's part; the layer is the sum over ranks.

        Parameters
        ----------
        hidden_states : array, [M, H], of the plan's dtype, on this device as are all others
        topk_weights, topk_ids : array, [M, k]
            Ids are those of the whole checkpoint, whatever experts this rank holds.
        **options
            Of `moepad.fused_moe`: `activation`, `swiglu_limit`, `out`, ... With
            `quant_activations` "fp8" or "int8", the scales are the checkpoint's `x_scale` and
            `h_scale` unless the call names either: with `x_scale=None` they come from the values,
            as where it has none.

        Returns
        -------
        array, [M, H]
        """
        plan = self.plan
        if plan.quant != "none":
            options |= {
                "quant": plan.quant,
                "w13_scale": self.w13_scale,
                "w2_scale": self.w2_scale,
                "scale_phase": plan.scale_phase,
            }
            if plan.quant in ("fp8_block", "int4_group"):
                options["block"] = plan.block
            is_named = "x_scale" in options or "h_scale" in options
            if options.get("quant_activations") in ("fp8", "int8") and not is_named:
                options |= {"x_scale": self.x_scale, "h_scale": self.h_scale}
        return fused_moe(
            hidden_states,
            self.w13,
            self.w2,
            topk_weights,
            topk_ids,
            n_inter=plan.n_inter,
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            expert_map=self._expert_map,
            **options,
        )

    def update(
        self,
        source: SourceLike,
        prefix: str | None = None,
        *,
        layout: str | None = None,
        progress: bool | None = None,
    ) -> None:
        """Replace all values in place: addresses stay, and it is all of them or none.

        Everything is checked before the first byte is written, as `load_experts` would. Values
        that are in memory already (arrays and CPU tensors of a dict) are then copied, which cannot
        fail on a CPU. Reading others can still fail, and so can copies to a GPU: there the values
        about to be overwritten go to an unnamed temporary file first (in TMPDIR; as large as this
        rank's tensors, gone afterwards) and come back if anything is raised. `x_scale` and
        `h_scale` become those of the source, in place unless there was or will be none. `extras`
        become those of the source, if its tensors are named as those first loaded were, else there
        are none.
        Waits for all that is queued on the device; not for use while another thread runs the
        experts or captures a graph.

        Parameters
        ----------
        source, layout, progress
            As for `load_experts`.
        prefix : str, optional
            Default: the one loaded from.

        Raises
        ------
        CheckpointError, ValueError
            As for `load_experts`; or the source's arrays are these very tensors.
        DeviceError
            As for `load_experts`; where the device itself is lost, so are the values.
        OSError
            The temporary file could not be written.
        """
        where = self.prefix if prefix is None else prefix
        inventory = _take_inventory(source, where, self.plan, layout)
        pieces = inventory.pieces
        resident = [piece for piece in pieces if piece.stored.is_resident]
        for piece in resident:
            self._check_values(piece)
        self._memory.settle()
        if len(resident) == len(pieces) and self.device == "cpu":
            try:
                self._fill(inventory, progress)
            except BaseException:  # an interrupt, nothing else is left: finish, then pass it on
                self._fill(inventory, progress=False)
                self._adopt(inventory)
                raise
        else:
            with _undone_on_error() as keep:
                self._fill(inventory, progress, keep)
        self._adopt(inventory)

    def state_dict(self) -> dict[str, Array]:
        """This rank's part of the checkpoint's own tensors: names, axes and bits, no pads.

        Returns
        -------
        dict of str to array
            New arrays, of the types loaded from; only what was 0x80 before a conversion to
            f8_e4m3fnuz comes back as 0, and scales come back as f32 after an update in another
            type. Over all ranks, each element of the checkpoint is there once: what several ranks
            hold (a scale of a block that is shared, everything without columns of its own) is
            there for the first of them only.
        """
        plan = self.plan
        sizes = _sizes(plan)
        state = {}
        for part, expert in _parts(self._layout, plan):
            if part.is_optional or not (part.has_columns or plan.tp_rank == 0):
                continue
            given = _given(plan, part, expert)
            is_tall = part.form == "tall words"
            part = part._replace(form="words") if is_tall else part
            shape = sizes.shape(part, given.stop - given.start, plan.n_expert)
            array = np.zeros(shape, NUMPY_DTYPES[part.dtypes[0]])
            for there, here in self._blocks(part, expert, given, array):
                copy(there, as_stored(part, on_host(here), there.dtype))
            state[_name(self.prefix, part, expert)] = array.T.copy() if is_tall else array
        if plan.tp_rank == 0:
            state |= {join(self.prefix, name): array.copy() for name, array in self.extras.items()}
        return state

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `state_dict` to a safetensors file that also says which rank it is of.

        Takes memory for one more copy of the tensors while it runs.

        A folder with the files of all ranks (and of several layers) is a source for `load_experts`
        at any other tensor- and expert-parallel size, and holds the checkpoint's bits. The file of
        a single rank that is all there is, is an ordinary checkpoint file.

        Parameters
        ----------
        path : path
            The file, replaced as a whole if it exists; or an existing folder, in which the file is
            named after prefix and rank.

        Returns
        -------
        Path
            The file written.
        """
        from safetensors.numpy import save_file

        plan = self.plan
        path = Path(path)
        if path.is_dir():
            ranks = f"tp{plan.tp_rank}-of-{plan.tp_size}.ep{plan.ep_rank}-of-{plan.ep_size}"
            path = path / f"{join(self.prefix, ranks)}.safetensors"
        facts = {key: getattr(plan, key) for key in Shard.__annotations__ if key != "layout"}
        shard = Shard(layout=self._layout.name, **facts)
        # Not ".safetensors" until it is whole: another rank may be reading the folder.
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file(self.state_dict(), partial, metadata=shard.metadata())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @property
    def _tensors(self) -> dict[str, Any]:
        names = ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias")
        named = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _fill(
        self,
        inventory: _Inventory,
        progress: bool | None,
        before: Callable[[Any], None] = lambda view: None,
    ) -> None:
        """Copy all values in; `before` is called with each view about to be written."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        own = self.plan.nbytes - self.plan.pad_nbytes
        disable = None if progress is None else not progress  # None: unless on a terminal
        bar_of = tqdm(
            total=own, desc=self.prefix, unit="B", unit_scale=True, leave=False, disable=disable
        )
        with bar_of as bar, self._memory.writing() as put:
            for piece in inventory.pieces:
                stored, array = piece.stored, piece.stored.fetch()
                if (array.shape, array.dtype) != (stored.shape, NUMPY_DTYPES[stored.dtype]):
                    raise CheckpointError(
                        f"{stored}: was {stored.dtype} {stored.shape} when it was checked, now is "
                        f"{array.dtype} {array.shape}; let nothing change the source meanwhile"
                    )
                self._check_apart(stored, array)
                for there, here in self._blocks(piece.part, piece.expert, piece.held, array):
                    values = as_held(piece.part, piece.stored, there, here.dtype)
                    before(here)
                    put(here, values)
                    stored.release()
                    bar.update(here.nbytes)
            scales: dict[str, Any] = dict.fromkeys(inventory.input_scales)
            for name, scale in inventory.input_scales.items():
                if scale is not None:
                    here = getattr(self, name)
                    if here is None:
                        here = self._memory.zeros(scale.shape, scale.dtype)
                    before(here)
                    put(here, scale)
                    scales[name] = here
        self.x_scale, self.h_scale = scales["x_scale"], scales["h_scale"]

    def _check_values(self, piece: _Piece) -> None:
        """Fails where `_fill` would, for what is in memory."""
        array = piece.stored.fetch()
        self._check_apart(piece.stored, array)
        for there, here in self._blocks(piece.part, piece.expert, piece.held, array):
            as_held(piece.part, piece.stored, there, here.dtype)

    def _check_apart(self, stored: Stored, array: Array) -> None:
        if self.device == "cpu" and any(
            np.may_share_memory(array, own) for own in self._tensors.values()
        ):
            raise CheckpointError(
                f"{stored}: shares memory with the experts it would overwrite; pass a copy"
            )

    def _adopt(self, inventory: _Inventory) -> None:
        """Take over, after an update, what is not in the tensors."""
        self._layout = _holding(self._layout, inventory.layout, self.plan)
        is_same = inventory.layout.scheme == self._layout.scheme
        self.extras = inventory.extras if is_same else {}

    def _blocks(
        self, part: Part, expert: int | None, held: _Region, array: Array
    ) -> Iterator[tuple[Array, Any]]:
        """Elements of a stored tensor that holds `held`, and the same elements here, as views.

        Of strided words and blocks the former are copies.
        """
        both = held.overlap(_own(self.plan, part, expert))
        columns = slice(both.start - held.start, both.stop - held.start)
        for e in range(both.expert_start, both.expert_stop):
            matrix = array
            if part.has_experts:
                matrix = array[e - held.expert_start : e - held.expert_start + 1]
            matrix = bytes_apart(matrix, part.form)
            for half in part.halves:
                stored_index: dict[str, int | slice] = {
                    "E": 0,
                    "H": slice(-(-self.plan.n_hidden // part.hidden_unit)),
                    "I": columns,
                    "C": _shifted(columns, half * (held.stop - held.start)),
                    "X": slice(2 * columns.start + half, 2 * columns.stop + half, 2),
                    "G": half,
                    "1": 0,
                }
                index: tuple[Any, ...] = tuple(stored_index[axis] for axis in part.axes)
                if not any(isinstance(i, slice) for i in index):
                    index = (*index, None)
                there = matrix[index]
                here = self._view(part, e - self.plan.expert_start, half, both.start, both.stop)
                yield (there.T if part.is_transposed else there), here

    def _view(self, part: Part, e: int, half: int, start: int, stop: int) -> Any:
        """The elements here of a half's columns [start, stop), in the part's units."""
        tensor = self._tensors[part.into]
        if not part.has_columns:
            if tensor.ndim == 1:
                return tensor[e : e + 1]
            return tensor[e, half : half + 1] if part.into == "w13_scale" else tensor[e]
        first = _first_column(self.plan, part)
        here = slice(start - first, stop - first)
        if part.into.startswith("w2"):
            return tensor[e, :, here]
        n_row = tensor.shape[1] // (2 if self.plan.gated else 1)
        return tensor[e, _shifted(here, half * n_row)]


# --- What is read --------------------------------------------------------------------------------


class _Region(NamedTuple):
    """Columns and experts of a part of a layer, in the checkpoint's own numbers and its units."""

    start: int
    stop: int
    expert_start: int
    expert_stop: int

    def overlap(self, other: _Region) -> _Region:
        start = max(self.start, other.start)
        expert_start = max(self.expert_start, other.expert_start)
        return _Region(
            start,
            max(start, min(self.stop, other.stop)),
            expert_start,
            max(expert_start, min(self.expert_stop, other.expert_stop)),
        )

    @property
    def area(self) -> int:
        return (self.stop - self.start) * (self.expert_stop - self.expert_start)

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop}) of experts [{self.expert_start}, {self.expert_stop})"


class _Piece(NamedTuple):
    """One stored tensor that this rank reads from."""

    part: Part  # settled: one order of axes, one type
    expert: int | None  # of the checkpoint; None: the part has an expert axis
    stored: Stored
    held: _Region


class _Inventory(NamedTuple):
    """What of a source makes one rank's layer."""

    root: str
    layout: Layout  # settled
    pieces: list[_Piece]
    extras: dict[str, Array]
    input_scales: dict[str, Array | None]


def _sizes(plan: Plan) -> Sizes:
    return Sizes(
        plan.n_hidden,
        plan.n_inter_global,
        plan.n_expert_global,
        plan.gated,
        plan.bias,
        plan.quant,
        plan.block,
    )


def _parts(layout: Layout, plan: Plan) -> list[tuple[Part, int | None]]:
    """The tensors that this rank has a share of, expert by expert where they come so."""
    parts = [
        part for part in layout.used_parts(plan.bias) if part.into != "w2_bias" or plan.tp_rank == 0
    ]
    experts = range(plan.expert_start, plan.expert_stop)
    return [(part, None) for part in parts if part.has_experts] + [
        (part, e) for e in experts for part in parts if not part.has_experts
    ]


def _name(root: str, part: Part, expert: int | None) -> str:
    return join(root, part.name.format(e=expert))


def _own(plan: Plan, part: Part, expert: int | None) -> _Region:
    """What this rank has of a part: of scales, those of every block its columns touch."""
    start = _first_column(plan, part)
    stop = -(-plan.stop // part.inter_unit) if plan.n_inter else start
    return _narrowed(_Region(start, stop, plan.expert_start, plan.expert_stop), part, expert)


def _first_column(plan: Plan, part: Part) -> int:
    """The first of the part's columns, in its units, that this rank has."""
    scales = {"w13_scale": plan.w13_scale_start, "w2_scale": plan.w2_scale_start}
    return scales.get(part.into, plan.start // part.inter_unit)


def _given(rank: Plan | Shard, part: Part, expert: int | None) -> _Region:
    """What a rank saves of a part: every scale whose first column it has."""
    start, stop = (-(-column // part.inter_unit) for column in (rank.start, rank.stop))
    return _narrowed(_Region(start, stop, rank.expert_start, rank.expert_stop), part, expert)


def _narrowed(region: _Region, part: Part, expert: int | None) -> _Region:
    """What of a region a part has: one without columns counts as one column."""
    if not part.has_columns:
        region = region._replace(start=0, stop=1)
    if expert is not None:
        region = region._replace(expert_start=expert, expert_stop=expert + 1)
    return region


def _shifted(columns: slice, by: int) -> slice:
    return slice(columns.start + by, columns.stop + by)


def _take_inventory(source: SourceLike, prefix: str, plan: Plan, layout: str | None) -> _Inventory:
    """Prefix, layout and every tensor this rank reads, each checked to be there once and whole."""
    opened = open_source(source)
    root, found = find_experts(opened, prefix, _sizes(plan), layout)
    pieces: list[_Piece] = []
    beside: dict[str, list[_Piece]] = {}
    settled: dict[str, Part] = {}
    missing: list[tuple[str, Part]] = []
    for part, expert in _parts(found, plan):
        name = _name(root, part, expert)
        places = []
        for stored in opened.find(name):
            places.append(_place(stored, settled.get(part.name, part), expert, plan))
            settled[part.name] = places[-1].part
        if not places:
            if not part.is_optional:
                missing.append((name, part))
            continue
        own = _own(plan, part, expert)
        _check_cover(name, places, own)
        needed = [piece for piece in places if piece.held.overlap(own).area]
        if part.is_optional:
            beside[part.name.format(e=expert)] = needed or places[:1]
        else:
            pieces += needed
    if missing:
        name, part = missing[0]
        n_part = sum(not part.is_optional for part, _ in _parts(found, plan))
        raise CheckpointError(
            f"{name}: missing in {opened.label} ({len(missing)} of {n_part} tensors are); expected "
            f"{_sizes(plan).shape(part)} for layout {found.name!r}; complete the checkpoint, or "
            "make the plan with its n_expert, gated and bias"
        )
    found = replace(found, parts=tuple(settled.get(part.name, part) for part in found.parts))
    found = _rebased(found, root, plan)
    parts = {part.name: part for part in found.parts}

    def final(places: list[_Piece]) -> list[_Piece]:
        return [piece._replace(part=parts[piece.part.name]) for piece in places]

    beside = {name: final(places) for name, places in beside.items()}
    extras = {name: _extra(places, plan) for name, places in beside.items()}
    scales = {into: _input_scale(into, beside, extras, plan) for into in ("x_scale", "h_scale")}
    return _Inventory(root, found, final(pieces), extras, scales)


def _is_awq(shape: tuple[int, ...], gptq: tuple[int, ...]) -> bool:
    """Whether a tensor of GPTQ's name packs the other axis, eight values to a word."""
    return len(shape) == 2 and (shape[0], shape[1] * 8) == (gptq[0] * 8, gptq[1])


def _place(stored: Stored, part: Part, expert: int | None, plan: Plan) -> _Piece:
    """What a stored tensor holds, if its shape and dtype are right."""
    sizes = _sizes(plan)
    whole = _Region(0, -(-sizes.n_inter // part.inter_unit), 0, sizes.n_expert)
    held = _narrowed(whole, part, expert)
    if stored.shard:
        held = _given(stored.shard, part, expert)
    size = (held.stop - held.start, held.expert_stop - held.expert_start)
    for variant in part.variants:
        if stored.shape == sizes.shape(variant, *size):
            break
    else:
        if part.form == "tall words" and _is_awq(stored.shape, sizes.shape(part, *size)):
            raise CheckpointError(
                f"{stored}: AWQ's order of 4-bit values, with zero points, is not supported; "
                "quantise symmetrically with GPTQ or compressed-tensors"
            )
        shapes = dict.fromkeys(str(sizes.shape(variant, *size)) for variant in part.variants)
        quant = "" if plan.quant == "none" else f", quant={plan.quant!r}, block={plan.block}"
        raise CheckpointError(
            f"{stored}: expected shape {' or '.join(shapes)} for n_hidden={plan.n_hidden}, "
            f"n_inter={plan.n_inter_global}, n_expert={plan.n_expert_global}{quant}, got "
            f"{stored.shape}; make the plan with the checkpoint's sizes"
            f"{' and quant' if quant else ', or pass the layout= it has'}"
        )
    dtypes = _accepted(part, plan)
    if stored.dtype not in dtypes:
        raise CheckpointError(
            f"{stored}: expected dtype {' or '.join(dtypes)}, got {stored.dtype}; make the plan "
            "with the checkpoint's dtype and quant (no value is rounded)"
        )
    return _Piece(variant._replace(dtypes=(stored.dtype,)), expert, stored, held)


def _accepted(part: Part, plan: Plan) -> tuple[str, ...]:
    """Types whose every value the tensor here holds exactly."""
    if part.is_scale and not part.is_optional and plan.scale_dtype in ("bf16", "f16"):
        return (plan.scale_dtype,)
    if part.dtypes:
        return part.dtypes
    if part.is_bias:
        return (plan.bias_dtype,)
    if plan.storage_dtype == "f8_e4m3fnuz":
        return ("f8_e4m3fnuz", "f8_e4m3fn")
    return (plan.storage_dtype,)


def _rebased(layout: Layout, root: str, plan: Plan) -> Layout:
    """With scales doubled where f8_e4m3fn becomes f8_e4m3fnuz, whose bytes mean half as much.

    Those of activations too, as SGLang's normalize_e4m3fn_to_e4m3fnuz does: their codes are of the
    weights' type, and its largest value is 240 where the other's is 448.
    """
    types = {p.dtypes[0] for p in layout.parts if p.into in ("w13", "w2") and len(p.dtypes) == 1}
    if "f8_e4m3fn" not in types or plan.storage_dtype != "f8_e4m3fnuz":
        return layout
    if len(types) > 1:
        raise CheckpointError(
            f"{root}: expected weights of one type, got {' and '.join(sorted(types))}; "
            "convert the checkpoint to one of them"
        )

    def doubled(part: Part) -> Part:
        return part._replace(factor=2) if part.is_scale else part

    return replace(layout, parts=tuple(map(doubled, layout.parts)))


def _extra(places: list[_Piece], plan: Plan) -> Array:
    """A tensor that is kept as it is: this rank's experts of it, of one or of several files."""
    places.sort(key=lambda piece: piece.held.expert_start)
    arrays = []
    for part, expert, stored, held in places:
        both = held.overlap(_own(plan, part, expert))
        array = stored.fetch()
        if expert is None:
            start = held.expert_start
            array = array[both.expert_start - start : both.expert_stop - start]
        if wrong := _misstated(part, array, plan):
            raise CheckpointError(f"{stored}: {wrong}")
        if part.is_scale:
            as_held(part, stored, array, _SCALE)  # fails where it is none
        arrays.append(np.array(array))
        stored.release()
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


_SCALE = np.dtype(np.float32)  # of activations, as `fused_moe` takes them


def _input_scale(
    into: str, beside: dict[str, list[_Piece]], extras: dict[str, Array], plan: Plan
) -> Array | None:
    """The largest of an input's scales; None unless every expert here has one, and if it is 0."""
    largest, experts = _SCALE.type(0), set[int]()
    for name, places in beside.items():
        part, expert = places[0].part, places[0].expert
        if part.into == into:
            values = extras[name].astype(_SCALE) * _SCALE.type(part.factor)
            largest = values.max(initial=largest)
            everyone = range(plan.expert_start, plan.expert_stop)
            experts.update(everyone if expert is None else [expert])
    has_all = len(experts) == plan.n_expert
    return np.array([largest], _SCALE) if has_all and largest > 0 else None


_ZEROS = 0x77777777  # eight zero points, stored less one


def _misstated(part: Part, array: Array, plan: Plan) -> str:
    """What is wrong in an extra tensor that must say what the plan says."""
    if part.states == "zeros":
        if (array == _ZEROS).all():
            return ""
        return "expected zero points of 8 only; asymmetric weights are not supported"
    if part.states == "order":
        if (array == np.arange(len(array)) // plan.block[1]).all():
            return ""
        return (
            f"expected columns in order, {plan.block[1]} to a group; make the plan with the "
            "checkpoint's group, or quantise without act-order"
        )
    sizes = [plan.n_hidden if axis == "H" else plan.n_inter_global for axis in part.states]
    if sizes and array.tolist() != sizes:
        return f"expected {sizes}, got {array.tolist()}; make the plan with the checkpoint's sizes"
    return ""


def _holding(layout: Layout, source: Layout, plan: Plan) -> Layout:
    """`layout` with types and axes that hold what was just loaded from `source`, bit for bit."""
    parts = []
    for part in layout.parts:
        others = [p for p in source.parts if p.into == part.into and len(p.dtypes) == 1]
        if part.is_optional or part.is_bias or part.form or not others:
            pass
        elif any((other.dtypes, other.factor) != (part.dtypes, part.factor) for other in others):
            dtype = plan.scale_dtype if part.is_scale else plan.storage_dtype
            part = part._replace(dtypes=(dtype,), factor=1)
        if _is_joint(part) and not all(_is_joint(other) for other in others):
            part = part._replace(axes=f"{part.axes.replace('1', '')}G")
        parts.append(part)
    return replace(layout, parts=tuple(parts))


def _is_joint(part: Part) -> bool:
    """One scale serves gate and up."""
    return part.is_scale and part.halves == (0, 1) and set("CXG").isdisjoint(part.axes)


def _check_cover(name: str, places: list[_Piece], own: _Region) -> None:
    """Every element this rank needs lies in exactly one place."""
    unit = places[0].part.inter_unit
    columns = "columns" if unit == 1 else f"columns, counted by {unit},"
    for i, piece in enumerate(places):
        for other in places[:i]:
            if piece.held.overlap(other.held).area:
                raise CheckpointError(
                    f"{name}: stored twice, {columns} {other.held} in {other.stored.place} and "
                    f"{piece.held} in {piece.stored.place}; remove one of the files"
                )
    if sum(piece.held.overlap(own).area for piece in places) != own.area:
        there = ", ".join(f"{piece.held} in {piece.stored.place}" for piece in places)
        raise CheckpointError(
            f"{name}: expected {columns} {own}, got {there}; add the files of the other ranks"
        )


# --- Memory and undoing --------------------------------------------------------------------------


def _placed(memory: Memory, array: Array) -> Any:
    placed = memory.zeros(array.shape, array.dtype)
    copy(placed, array)
    return placed


def _ones(memory: Memory, shape: tuple[int, ...] | None, dtype: str) -> Any:
    """Scales that, should one in a pad ever be applied, change nothing."""
    return None if shape is None else _placed(memory, np.ones(shape, NUMPY_DTYPES[dtype]))


@contextmanager
def _undone_on_error() -> Iterator[Callable[[Any], None]]:
    """Gives a function to call with each view before it is written; on an error all come back."""
    kept: list[tuple[Any, int]] = []
    # Unbuffered: a buffer that cannot be flushed would block the way back.
    with tempfile.TemporaryFile(buffering=0) as file:

        def keep(view: Any) -> None:
            offset = file.tell()
            data = np.ascontiguousarray(on_host(view)).reshape(-1).view(np.uint8).data
            while data:
                data = data[file.write(data) :]
            kept.append((view, offset))

        try:
            yield keep
        except BaseException:
            for view, offset in kept:
                file.seek(offset)
                old = np.fromfile(file, view.dtype, math.prod(view.shape))
                copy(view, old.reshape(view.shape))
            raise
