"""Checks experts of a checkpoint: every rank loaded and run, their sum against float64.

The right result comes from the whole layer, read here by code of its own, so that a fault of the
loader shows as well as one of the engine.
"""

from __future__ import annotations

import json
import math
import re
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepad import reference
from moepad._core import CheckpointError
from moepad.checkpoint import NUMPY_DTYPES, Source
from moepad.models import Model
from moepad.padding import Plan
from moepad.testing import one_rounding, poison, row_error
from moepad.weights import Experts, load_experts

__all__ = [
    "LayerResult",
    "WholeLayers",
    "check_layer",
    "layer_number",
    "options_of",
    "poison_pads",
    "sum_error",
]

Array = NDArray[Any]

_N_RUN = 3  # of which the fastest counts


@dataclass(frozen=True)
class LayerResult:
    """How one layer came out.

    Attributes
    ----------
    prefix : str
    n_token : int
    error, allowed : float
        At the element where their ratio is largest: distance of the ranks' sum from the float64
        result, and what rounding explains: twice the largest error of the token in a naive run
        over the same ranks, plus one rounding per rank. NaN where one should not be: infinity.
    token, column : int
        That element.
    load_seconds, run_seconds : float
        All ranks' loading; the slowest rank's call, the fastest of three.
    """

    prefix: str
    n_token: int
    error: float
    allowed: float
    token: int
    column: int
    load_seconds: float
    run_seconds: float

    @property
    def is_ok(self) -> bool:
        return self.error <= self.allowed


def layer_number(prefix: str) -> int | None:
    """The last number in a prefix."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", f".{prefix}")
    return int(numbers[-1]) if numbers else None


def options_of(model: Model) -> dict[str, Any]:
    """What `moepad.fused_moe` must be told of a model beyond its sizes."""
    options = {
        "activation": model.activation,
        "swiglu_alpha": model.swiglu_alpha,
        "swiglu_limit": model.swiglu_limit,
    }
    return {name: value for name, value in options.items() if value is not None}


def check_layer(
    source: Source,
    layers: WholeLayers,
    prefix: str,
    plans: list[Plan],
    n_token: int,
    on_rank: Callable[[], object] = lambda: None,
) -> LayerResult:
    """Load and run one layer on every rank and compare the sum.

    The pads of every rank hold NaN while it runs: a single read of one spoils the result.

    Parameters
    ----------
    source : Source
        What the ranks load from.
    layers : WholeLayers
        The same checkpoint, for the right result.
    prefix : str
    plans : list of Plan
        One per rank.
    n_token : int
        Random tokens to run. Their slots go round all experts before any comes twice.
    on_rank : callable
        Called after each rank.
    """
    model = layers.model
    rng = np.random.default_rng(zlib.crc32(prefix.encode()))
    x = rng.standard_normal((n_token, model.n_hidden)).astype(NUMPY_DTYPES[model.dtype])
    ids = _routing(rng, n_token, model.n_topk, model.n_expert)
    weights = rng.dirichlet(np.ones(model.n_topk), n_token).astype(np.float32)
    options = options_of(model)

    parts = []
    load_seconds = run_seconds = 0.0
    for plan in plans:
        out, loading, running = _run_rank(source, prefix, plan, (x, weights, ids), options)
        load_seconds, run_seconds = load_seconds + loading, max(run_seconds, running)
        parts.append(out)
        on_rank()

    whole = layers.read(prefix)
    call = {"topk_weights": weights, "topk_ids": ids, **options}
    naive_parts = [reference.naive(x, **layers.cut(whole, plan), **call) for plan in plans]
    error, allowed = sum_error(parts, naive_parts, reference.fused_moe(x, **whole, **call))
    token, column = np.unravel_index(int(np.argmax(error / allowed)), error.shape)
    return LayerResult(
        prefix,
        n_token,
        float(error[token, column]),
        float(allowed[token, column]),
        int(token),
        int(column),
        load_seconds,
        run_seconds,
    )


def sum_error(
    parts: Sequence[Array], naive_parts: Sequence[Array], expected: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Error of a sum over ranks, element by element, and what rounding explains.

    Parameters
    ----------
    parts : sequence of array, [M, H]
        Each rank's result, in its own type; the sum is taken in float64.
    naive_parts : sequence of array, [M, H]
        What `moepad.reference.naive` gives for each rank.
    expected : array, [M, H], float64
        The whole layer's result.

    Returns
    -------
    error, allowed : array, [M, H]
        The error is infinite where a result is not finite. Allowed is twice the largest error of
        the naive sum in the same row, where it was not lucky (as `moepad.testing.check_close` has
        it), plus one rounding per rank.
    """
    total, naive, rounding = (np.zeros(expected.shape) for _ in range(3))
    for part, naive_part in zip(parts, naive_parts, strict=True):
        value = part.astype(np.float64)
        total += value
        naive += naive_part.astype(np.float64)
        rounding += one_rounding(value, part.dtype)
    error = np.where(np.isfinite(total), np.abs(total - expected), np.inf)
    allowed = 2 * row_error(np.abs(naive - expected), expected)[:, None] + rounding
    return error, allowed


def _routing(rng: np.random.Generator, n_token: int, n_topk: int, n_expert: int) -> Array:
    """Expert ids, [M, k]: permutations of all experts one after the other."""
    n_round = -(-n_token * n_topk // n_expert)
    ids = np.concatenate([rng.permutation(n_expert) for _ in range(n_round)])
    return ids[: n_token * n_topk].reshape(n_token, n_topk).astype(np.int32)


def _run_rank(
    source: Source,
    prefix: str,
    plan: Plan,
    call: tuple[Array, Array, Array],
    options: dict[str, Any],
) -> tuple[Array, float, float]:
    """A rank's result, and the seconds of loading it and of the fastest call."""
    start = time.perf_counter()
    experts = load_experts(source, prefix, plan, progress=False)
    load_seconds = time.perf_counter() - start
    poison_pads(experts)
    run_seconds = math.inf
    for _ in range(_N_RUN):
        start = time.perf_counter()
        out: Array = experts(*call, **options)
        run_seconds = min(run_seconds, time.perf_counter() - start)
    return out, load_seconds, run_seconds


def poison_pads(experts: Experts) -> None:
    """Fill every pad with NaN."""
    plan = experts.plan
    poison(experts.w2[:, :, -(-plan.n_inter // plan.n_pack) :])
    for rows in (experts.w13, experts.w13_bias):
        if rows is not None:
            _poison_outside(rows, plan, 0, plan.n_inter)
    if experts.w13_scale is None or experts.w2_scale is None or plan.quant == "fp8_tensor":
        return
    row, column = plan.block
    first, last = plan.scale_phase, plan.scale_phase + plan.n_inter
    _poison_outside(experts.w13_scale, plan, first // row, -(-last // row))
    if not plan.quant.endswith("channel"):
        poison(experts.w2_scale[:, :, : first // column])
        poison(experts.w2_scale[:, :, -(-last // column) :])


def _poison_outside(rows: Array, plan: Plan, start: int, stop: int) -> None:
    """Fill all but rows [start, stop) of each half with NaN."""
    n_row = rows.shape[1] // (2 if plan.gated else 1)
    for half in (rows[:, :n_row], rows[:, n_row:]):
        poison(half[:, :start])
        poison(half[:, stop:])


class WholeLayers:
    """Unsharded layers of a checkpoint, read without moepad's loader.

    Parameters
    ----------
    path : Path
        A folder of safetensors files, or one file.
    model : Model
    """

    def __init__(self, path: Path, model: Model) -> None:
        self.model = model
        paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        self._place_of: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in paths:
            with open(file, "rb") as opened:
                start = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(start))
            self._place_of |= {name: (file, 8 + start, entry) for name, entry in header.items()}
        self._n_pack = 2 if model.quant in ("mxfp4", "int4_group") else 1

    def read(self, prefix: str) -> dict[str, Any]:
        """Weights and options of `moepad.reference.fused_moe` for one layer."""
        for names in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
            first = [f"{name}.weight" for name in (names[:2] if self.model.gated else names[1:2])]
            down = f"{names[2]}.weight"
            if self._has(f"{prefix}.0.{down}"):
                experts = [f"{prefix}.{e}" for e in range(self.model.n_expert)]
                return self._stacked(experts, first, down)
            if self._has(f"{prefix}.{down}"):
                return self._stacked([prefix], first, down)
        for up, down in (
            ("gate_up_proj", "down_proj"),
            ("up_proj", "down_proj"),
            ("input_linear.weight", "output_linear.weight"),
        ):
            if self._has(f"{prefix}.{up}"):
                return self._read_fused(f"{prefix}.{up}", f"{prefix}.{down}")
        raise CheckpointError(f"{prefix}: names of a kind that the check does not know")

    def _has(self, weight: str) -> bool:
        names = [f"{weight}{ending}" for ending in ("", "_packed", "_blocks")]
        names.append(f"{weight.removesuffix('.weight')}.qweight")
        return any(name in self._place_of for name in names)

    def _stacked(self, places: list[str], first: list[str], down: str) -> dict[str, Any]:
        """All experts, one after the other; of gate and up, the rows of gate first."""

        def all_of(names: list[str], read: Callable[[str], Array]) -> Array:
            rows = [[read(f"{place}.{name}") for name in names] for place in places]
            if len(places) == 1:
                return np.concatenate(rows[0], axis=1)
            return np.stack([np.concatenate(parts) for parts in rows])

        layer: dict[str, Any] = {
            "w13": all_of(first, self._weight),
            "w2": all_of([down], self._weight),
        }
        if self.model.quant != "none":
            layer["w13_scale"] = self._scale_shaped(all_of(first, self._scale), len(layer["w13"]))
            layer["w2_scale"] = self._scale_shaped(all_of([down], self._scale), len(layer["w2"]))
        if self.model.bias:
            for into, names in (("w13_bias", first), ("w2_bias", [down])):
                biases = [name.replace(".weight", ".bias") for name in names]
                layer[into] = all_of(biases, self._get)
        return layer | self._options()

    def _read_fused(self, up: str, down: str) -> dict[str, Any]:
        w13, w2 = self._weight(up), self._weight(down)
        n_expert = len(w2)
        layer: dict[str, Any] = {}
        if self.model.quant != "none":
            layer["w13_scale"] = self._scale_shaped(self._scale(up), n_expert)
            layer["w2_scale"] = self._scale_shaped(self._scale(down), n_expert)
        if w2.shape[1:] != (self.model.n_hidden, -(-self.model.n_inter // self._n_pack)):
            w13, w2 = w13.swapaxes(1, 2), w2.swapaxes(1, 2)
            if self.model.quant == "fp8_block":
                layer |= {name: scale.swapaxes(1, 2) for name, scale in layer.items()}
        layer |= {"w13": w13, "w2": w2}
        if self.model.bias:  # gpt-oss, whose gate and up rows alternate
            layer |= {"w13_bias": self._get(f"{up}_bias"), "w2_bias": self._get(f"{down}_bias")}
            layer["gate_up"] = "interleaved"
        return layer | self._options()

    def _options(self) -> dict[str, Any]:
        if self.model.quant == "none":
            return {}
        return {"quant": self.model.quant, "block": self.model.block}

    def _weight(self, name: str) -> Array:
        """A weight as the specification takes it: two 4-bit values in each byte."""
        if f"{name}_blocks" in self._place_of:
            blocks = self._get(f"{name}_blocks")
            return blocks.reshape(*blocks.shape[:2], -1)
        packed = f"{name}_packed" if f"{name}_packed" in self._place_of else name
        tall = f"{name.removesuffix('.weight')}.qweight"
        weight = self._get(tall).T.copy() if tall in self._place_of else self._get(packed)
        if self._n_pack == 1:
            return weight
        n_column = self.model.n_inter if "down" in name or "w2" in name else self.model.n_hidden
        return weight.view(np.uint8)[..., : -(-n_column // 2)]

    def _scale(self, name: str) -> Array:
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" in self._place_of:
            return self._get(f"{stem}.scales").T
        for scale in (f"{name}_scale_inv", f"{name}_scale", f"{name}_scales", f"{stem}.scale"):
            if scale in self._place_of:
                values = self._get(scale)
                return values.reshape(-1, 1) if self.model.quant == "fp8_tensor" else values
        raise CheckpointError(f"{name}_scale: missing in the checkpoint")

    def _scale_shaped(self, scale: Array, n_expert: int) -> Array:
        """With as many dimensions as the specification has for the kind."""
        if self.model.quant == "fp8_tensor" and scale.size == n_expert:
            return scale.reshape(n_expert)
        if str(self.model.quant).endswith(("tensor", "channel")):
            return scale.reshape(n_expert, -1)
        return scale

    def _get(self, name: str) -> Array:
        if name not in self._place_of:
            raise CheckpointError(f"{name}: missing in the checkpoint")
        file, start, entry = self._place_of[name]
        dtype = NUMPY_DTYPES[{"F8_E4M3": "f8_e4m3fn"}.get(entry["dtype"], entry["dtype"].lower())]
        begin, end = entry["data_offsets"]
        size = np.dtype(dtype).itemsize
        flat = np.fromfile(file, np.uint8, end - begin, offset=start + begin)
        tensor: Array = flat.view(f"u{size}").view(dtype).reshape(entry["shape"])
        return tensor

    def cut(self, whole: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """One rank's part of what `read` gave."""
        experts = slice(plan.expert_start, plan.expert_stop)

        def rows(values: Array, unit: int = 1, start: int = plan.start) -> Array:
            first, stop = start // unit, -(-plan.stop // unit)
            if whole.get("gate_up") == "interleaved":
                return values[experts, 2 * first : 2 * stop]
            n_half = 2 if self.model.gated else 1
            halves = np.split(values[experts], n_half, axis=1)
            return np.concatenate([half[:, first:stop] for half in halves], axis=1)

        def columns(values: Array, unit: int = 1, start: int = plan.start) -> Array:
            return values[experts, :, start // unit : -(-plan.stop // unit)]

        part = {
            name: value for name, value in whole.items() if name in ("gate_up", "quant", "block")
        }
        part |= {
            "w13": rows(whole["w13"]),
            "w2": columns(whole["w2"], self._n_pack),
            "n_inter": plan.n_inter,
        }
        quant, (block_n, block_k) = str(self.model.quant), self.model.block
        if quant == "fp8_tensor":
            part |= {name: whole[name][experts] for name in ("w13_scale", "w2_scale")}
        elif quant.endswith("channel"):
            part |= {"w13_scale": rows(whole["w13_scale"]), "w2_scale": whole["w2_scale"][experts]}
        elif quant == "fp8_block":
            start = plan.start - plan.start % math.lcm(block_n, block_k)
            part["w13_scale"] = rows(whole["w13_scale"], block_n, start)
            part["w2_scale"] = columns(whole["w2_scale"], block_k, start)
            part["scale_phase"] = plan.start - start
        elif quant != "none":
            part["w13_scale"] = rows(whole["w13_scale"])
            part["w2_scale"] = columns(whole["w2_scale"], block_k)
        if self.model.bias:
            part["w13_bias"] = rows(whole["w13_bias"])
            if plan.tp_rank == 0:
                part["w2_bias"] = whole["w2_bias"][experts]
        if plan.ep_size > 1:
            numbers = np.arange(plan.n_expert_global) - plan.expert_start
            is_here = (numbers >= 0) & (numbers < plan.n_expert)
            part["expert_map"] = np.where(is_here, numbers, -1)
        return part
