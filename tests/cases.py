"""The one table of fused MoE calls: each row with its origin (a model, a reported bug, a corner).

Every test takes its calls from here; to test a new shape, add a row. `build` makes the tensors of a
row, `pad` lays them out physically larger with poison in the pads, and `solve` gives the right
result and the naive ones that set the tolerance. Sizes of models are per rank; experts and tokens
are few, and H is cut where a row's name says so, so that the reference stays quick.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
from moepad import reference
from moepad.testing import Guarded, poison, quantise
from numpy.typing import NDArray

Array = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
}

# Per-rank intermediate sizes that real models reach, 26 of them; most miss 64, 128 or 256.
MATRIX_INTER = (
    32, 44, 48, 64, 88, 96, 112, 128, 160, 176, 192, 224, 232, 320, 336, 352, 360, 384, 448, 640,
    704, 720, 896, 1440, 1856, 2880,
)  # fmt: skip
MATRIX_HIDDEN = (2816, 2880, 2688, 4096)
ALIGNS = (64, 128, 256)


@dataclass(frozen=True)
class Case:
    """One call. Sizes are those of the true tensors; `pad` makes them physically larger."""

    name: str
    origin: str
    n_token: int = 5
    n_hidden: int = 64
    n_inter: int = 48
    n_expert: int = 4
    n_topk: int = 2
    activation: str = "silu"
    is_gated: bool = True
    gate_up: Literal["concat", "interleaved"] = "concat"
    bias: Literal["", "w13", "w2", "both", "both in f32"] = ""
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = None
    weight_on_input: bool = False
    routed_scaling: float = 1.0
    # "distinct": no expert twice per token where k allows; "repeated": one expert in all slots of
    # a token; "one": all tokens to one expert; "even": expert 0 gets nothing.
    routing: Literal["distinct", "repeated", "one", "even"] = "distinct"
    n_skip: float = 0.0  # share of slots with id -1
    n_expert_global: int = 0  # not 0: ids go through an expert_map of that many entries
    n_valid: int | None = None  # passed as n_token; later rows are poisoned
    n_valid_type: str = "int"  # or "i32", "i64": an array of one element
    topk_weights: str = "f32"
    topk_ids: str = "i32"
    # "normal": results of order 1; "large": activations saturate; "tiny": results among float16's
    # subnormals; "light": w2 among them, results not; "nan", "inf": token 1 holds one; "signed":
    # routed weights of both signs and zero.
    values: Literal["normal", "large", "tiny", "light", "nan", "inf", "signed", "zero"] = "normal"
    is_strided: bool = False  # every tensor a view into a wider poisoned one
    quant: str = "none"
    weight: str = "f8_e4m3fn"  # of the fp8 kinds
    scale: str = "f32"  # of int4_group
    block: tuple[int, int] | None = None
    phase: int = 0
    dtypes: tuple[str, ...] = ("f32", "bf16", "f16")

    @property
    def n_row(self) -> int:
        """Rows of w13."""
        return (2 if self.is_gated else 1) * self.n_inter

    @property
    def n_pack(self) -> int:
        """Elements of one stored element along a row."""
        return 2 if self.quant in ("mxfp4", "int4_group") else 1

    @property
    def n_multiply(self) -> int:
        return self.n_token * self.n_topk * (self.n_row + self.n_inter) * self.n_hidden

    @property
    def size(self) -> Literal["small", "medium", "large"]:
        """small: for an emulated device; large: more than a moment on two cores."""
        n_weight = self.n_expert * (self.n_row + self.n_inter) * self.n_hidden
        if self.n_multiply <= 2_000_000 and n_weight <= 500_000:
            return "small"
        return "large" if self.n_multiply > 200_000_000 else "medium"


@dataclass
class Call:
    """The arguments of one call, and what keeps their memory alive."""

    hidden_states: Array
    w13: Array
    w2: Array
    topk_weights: Array
    topk_ids: Array
    options: dict[str, Any] = field(default_factory=dict)
    guards: list[Guarded] = field(default_factory=list)

    @property
    def args(self) -> tuple[Array, Array, Array, Array, Array]:
        return (self.hidden_states, self.w13, self.w2, self.topk_weights, self.topk_ids)

    def run(self, function: Callable[..., Any], **more: Any) -> Any:
        return function(*self.args, **{**self.options, **more})

    def tensors(self) -> dict[str, Array]:
        """Every array among the arguments, by argument name."""
        names = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")
        named = dict(zip(names, self.args, strict=True))
        return named | {k: v for k, v in self.options.items() if isinstance(v, np.ndarray)}


_POOL_SIZE = 1_048_583  # prime, so that rows of any tensor cut from the repeated pool all differ


@functools.lru_cache(maxsize=1)
def _pool() -> NDArray[np.float32]:
    once = np.random.default_rng(0).standard_normal(_POOL_SIZE, np.float32)
    return np.concatenate([once, once])


def _normal(case: Case, tensor: str, shape: tuple[int, ...], scale: float) -> NDArray[np.float32]:
    start = zlib.crc32(f"{tensor} {case.name}".encode()) % _POOL_SIZE
    n_element = math.prod(shape)
    period = _pool()[start : start + min(n_element, _POOL_SIZE)]
    flat = period if n_element <= _POOL_SIZE else np.resize(period, n_element)
    return flat.reshape(shape) * np.float32(scale)


def _routing(case: Case, rng: np.random.Generator) -> Array:
    """Global expert ids, [n_token, n_topk]; -1 where a slot is skipped."""
    n_expert = case.n_expert_global or case.n_expert
    shape = (case.n_token, case.n_topk)
    if case.routing == "one":
        ids = np.full(shape, n_expert - 1)
    elif case.routing == "repeated":
        ids = np.repeat(rng.integers(0, n_expert, (case.n_token, 1)), case.n_topk, axis=1)
    elif case.routing == "even":
        ids = rng.integers(1, n_expert, shape)
    elif case.n_topk <= n_expert:
        ids = np.argsort(rng.random((case.n_token, n_expert)), axis=1)[:, : case.n_topk]
    else:
        ids = rng.integers(0, n_expert, shape)
    return np.where(rng.random(shape) < case.n_skip, -1, ids)


def build(case: Case, dtype: str) -> Call:
    """The tensors of a case, without pads; rows, weights and ids no call may read are poisoned."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    value_type = DTYPES[dtype]
    n_token, n_hidden, n_inter, n_expert = case.n_token, case.n_hidden, case.n_inter, case.n_expert

    x_scale = {"large": 60.0, "tiny": 1e-3, "light": 8.0, "zero": 0.0}.get(case.values, 1.0)
    w2_scale = 1e-4 if case.values in ("tiny", "light") else 1.0
    hidden = _normal(case, "x", (n_token, n_hidden), x_scale).astype(value_type)
    w13 = _normal(case, "w13", (n_expert, case.n_row, n_hidden), max(n_hidden, 1) ** -0.5)
    w2 = _normal(case, "w2", (n_expert, n_hidden, n_inter), w2_scale * max(n_inter, 1) ** -0.5)
    if case.values in ("nan", "inf"):
        hidden[1, n_hidden // 2] = np.nan if case.values == "nan" else np.inf

    ids = _routing(case, rng)
    weights = rng.random((n_token, case.n_topk), np.float32) + np.float32(0.05)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.float32(1e-6))
    if case.values == "signed":
        weights *= rng.choice(np.array([-1, 0, 1], np.float32), weights.shape)
    weights = weights.astype(DTYPES[case.topk_weights])
    weights[ids < 0] = np.nan

    options: dict[str, Any] = {"activation": case.activation}
    bias_type = np.dtype(np.float32) if case.bias == "both in f32" else value_type
    if case.bias in ("w13", "both", "both in f32"):
        options["w13_bias"] = _normal(case, "b13", (n_expert, case.n_row), 0.5).astype(bias_type)
    if case.bias in ("w2", "both", "both in f32"):
        options["w2_bias"] = _normal(case, "b2", (n_expert, n_hidden), 0.5).astype(bias_type)
    if case.n_expert_global:
        local = np.full(case.n_expert_global, -1, DTYPES[case.topk_ids])
        here = rng.permutation(case.n_expert_global)[:n_expert]
        local[here] = rng.permutation(n_expert)
        options["expert_map"] = local
        weights[(ids >= 0) & (local[ids] < 0)] = np.nan
    if case.gate_up != "concat":
        options["gate_up"] = case.gate_up
    if case.swiglu_alpha is not None:
        options["swiglu_alpha"] = case.swiglu_alpha
    if case.swiglu_limit is not None:
        options["swiglu_limit"] = case.swiglu_limit
    if case.weight_on_input:
        options["apply_router_weight_on_input"] = True
    if case.routed_scaling != 1:
        options["routed_scaling_factor"] = case.routed_scaling

    ids = ids.astype(DTYPES[case.topk_ids])
    if case.n_valid is not None:
        for tensor in (hidden, weights, ids):
            poison(tensor[case.n_valid :])
        is_int = case.n_valid_type == "int"
        options["n_token"] = (
            case.n_valid if is_int else np.array([case.n_valid], DTYPES[case.n_valid_type])
        )
    if case.quant == "none":
        stored = w13.astype(value_type), w2.astype(value_type)
    else:
        *stored, scales = _quantised(case, w13, w2)
        options |= scales
    call = Call(hidden, *stored, weights, ids, options)
    return _strided(call) if case.is_strided else call


def _quantised(case: Case, w13: Array, w2: Array) -> tuple[Array, Array, dict[str, Any]]:
    """Stored w13 and w2, and the options that say how; rows interleaved again where they were."""
    form: dict[str, Any] = {"dtype": case.weight, "scale_dtype": case.scale}
    options: dict[str, Any] = {"quant": case.quant}
    if case.block:
        form["block"] = options["block"] = case.block
    if case.phase:
        options["scale_phase"] = case.phase
    n_half = 2 if case.is_gated else 1
    order = np.arange(case.n_row)
    if case.gate_up == "interleaved":
        order = order.reshape(-1, n_half).T.reshape(-1)
    stored13, scale13 = quantise(
        w13[:, order], case.quant, n_half=n_half, row_phase=case.phase, **form
    )
    stored2, scale2 = quantise(w2, case.quant, column_phase=case.phase, **form)
    back = np.argsort(order)
    if case.quant not in ("fp8_tensor", "fp8_block"):
        scale13 = np.take(scale13, back, axis=1)
    options |= {"w13_scale": scale13, "w2_scale": scale2}
    return np.take(stored13, back, axis=1), stored2, options


def _strided(call: Call) -> Call:
    """The same call with every tensor of two dimensions or more a view into a wider one."""

    def widen(array: Array) -> Array:
        if array.ndim < 2:
            return array
        shape = [n + 1 for n in array.shape[:-1]] + [array.shape[-1] + 5]
        wide = poison(np.empty(shape, array.dtype))
        view = wide[tuple(slice(0, n) for n in array.shape)]
        view[...] = array
        return view

    options = {k: widen(v) if isinstance(v, np.ndarray) else v for k, v in call.options.items()}
    return Call(*(widen(tensor) for tensor in call.args), options)


def pad(
    call: Call,
    n_inter_pad: int,
    *,
    n_inter: int | None = None,
    n_hidden_pad: int | None = None,
    pattern: str = "nan",
    edge: Literal["after", "before"] | None = None,
) -> Call:
    """The same call on tensors whose sizes are physically larger, the rest being poison.

    With `n_inter`, columns of the call from there on are pad as well; of packed weights it may be
    odd. With `edge`, each tensor ends (or starts) at a page that faults: any read past the last
    true element, or before the first, kills the process.
    """
    quant, block = call.options.get("quant", "none"), call.options.get("block", (128, 128))
    n_pack = 2 if quant in ("mxfp4", "int4_group") else 1
    n_hidden = call.hidden_states.shape[1]
    n_source = call.w2.shape[2] * n_pack
    n_inter = n_source if n_inter is None else n_inter
    is_gated = call.w13.shape[1] != n_source
    wide = n_hidden if n_hidden_pad is None else n_hidden_pad
    interleaved = call.options.get("gate_up") == "interleaved"
    guards: list[Guarded] = []

    def place(array: Array, shape: tuple[int, ...], rows: list[tuple[slice, slice]]) -> Array:
        """Copies axis 1 of `array` in ranges (from, to) into a poisoned tensor of `shape`."""
        last = [n - 1 for n in array.shape]
        if array.ndim > 1 and rows and array.shape[1]:
            last[1] = rows[-1][1].stop - 1
        reach = 0 if 0 in array.shape else int(np.ravel_multi_index(last, shape)) + 1
        guard = Guarded(shape, array.dtype, reach=reach, edge=edge, pattern=pattern)
        guards.append(guard)
        for source, target in rows:
            inner = tuple(slice(0, n) for n in array.shape[2:])
            guard.array[: array.shape[0], target][(slice(None), slice(None), *inner)] = array[
                :, source
            ]
        return guard.array

    def flat(array: Array) -> Array:
        return place(array[:, None], (len(array), 1), [(slice(0, 1), slice(0, 1))])[:, 0]

    def whole(array: Array, shape: tuple[int, ...]) -> Array:
        n = array.shape[1]
        return place(array, shape, [(slice(0, n), slice(0, n))])

    def w13_rows(array: Array, tail: tuple[int, ...]) -> Array:
        if not is_gated or interleaved:
            n_half = 2 if is_gated else 1
            array = array[:, : n_half * n_inter]
            return whole(array, (array.shape[0], n_half * n_inter_pad, *tail))
        halves = [
            (slice(0, n_inter), slice(0, n_inter)),
            (slice(n_source, n_source + n_inter), slice(n_inter_pad, n_inter_pad + n_inter)),
        ]
        return place(array, (array.shape[0], 2 * n_inter_pad, *tail), halves)

    def scale13(array: Array) -> Array:
        if array.ndim < 2 or quant == "fp8_tensor":
            return flat(array) if array.ndim < 2 else whole(array, array.shape)
        if quant != "fp8_block":
            return w13_rows(array, array.shape[2:] and (groups(wide),))
        n_block = array.shape[1] // (2 if is_gated else 1)
        phase = call.options.get("scale_phase", 0)
        n_block_pad = -(-(phase + n_inter_pad) // block[0]) + 1
        rows = [
            (slice(half * n_block, (half + 1) * n_block),
             slice(half * n_block_pad, half * n_block_pad + n_block))
            for half in range(2 if is_gated else 1)
        ]  # fmt: skip
        return place(array, (len(array), rows[-1][1].start + n_block_pad, groups(wide)), rows)

    def scale2(array: Array) -> Array:
        if array.ndim < 2:
            return flat(array)
        n_row = -(-wide // block[0]) if quant == "fp8_block" else wide
        if array.ndim == 2:
            return whole(array, (len(array), n_row))
        phase = call.options.get("scale_phase", 0)
        return whole(array, (len(array), n_row, groups(phase + n_inter_pad)))

    def w2_columns(array: Array) -> Array:
        array = array[:, :, : -(-n_inter // n_pack)].copy()
        if n_inter % n_pack:
            array[:, :, -1] |= 0xF0
        return whole(array, (n_expert, wide, n_inter_pad // n_pack))

    def groups(n_column: int) -> int:
        return -(-n_column // (block[1] if quant in ("fp8_block", "int4_group") else 32))

    n_token, n_expert = len(call.hidden_states), len(call.w2)
    options = dict(call.options)
    if n_inter_pad != n_inter:
        options["n_inter"] = n_inter
    if quant != "none":
        options["w13_scale"] = scale13(options["w13_scale"])
        options["w2_scale"] = scale2(options["w2_scale"])
    if wide != n_hidden:
        options["n_hidden"] = n_hidden
    if "w13_bias" in options:
        options["w13_bias"] = w13_rows(options["w13_bias"], ())
    if "w2_bias" in options:
        options["w2_bias"] = whole(options["w2_bias"], (n_expert, wide))
    return Call(
        whole(call.hidden_states, (n_token, wide)),
        w13_rows(call.w13, (-(-wide // n_pack),)),
        w2_columns(call.w2),
        whole(call.topk_weights, call.topk_weights.shape),
        whole(call.topk_ids, call.topk_ids.shape),
        options,
        guards,
    )


@functools.cache
def solve(case: Case, dtype: str) -> tuple[NDArray[np.float64], Array]:
    """The right result of a case in float64, and the naive runs that set the tolerance."""
    return solution(build(case, dtype))


def solution(call: Call) -> tuple[NDArray[np.float64], Array]:
    """As `solve`, for a call that is not in the table."""
    # In float32 a naive run is as good as the engine: only several of them show the spread. In 16
    # bits a single one is far worse than the engine.
    n_run = 8 if call.hidden_states.dtype == np.float32 else 1
    runs = [call.run(reference.naive, n_part=n_part) for n_part in range(n_run)]
    return call.run(reference.fused_moe), np.stack(runs)


def params(cases: list[Case]) -> list[Any]:
    """`cases` as pytest parameters, each with its name as id and its size as mark."""
    marks = {"small": [pytest.mark.small], "medium": [], "large": [pytest.mark.large]}
    return [pytest.param(case, id=case.name, marks=marks[case.size]) for case in cases]


def _model(
    name: str, n_hidden: int, n_topk: int, ranks: dict[int, int], **options: Any
) -> list[Case]:
    """Rows for a model: `ranks` maps the tensor-parallel size to the intermediate size per rank."""
    return [
        Case(
            f"{name}-tp{tp}-i{n_inter}",
            f"{name}, tensor parallel over {tp}",
            n_token=3,
            n_hidden=n_hidden,
            n_inter=n_inter,
            n_expert=4,
            n_topk=min(n_topk, 4),
            **options,
        )
        for tp, n_inter in ranks.items()
    ]


_OSS: dict[str, Any] = {
    "activation": "swigluoai",
    "gate_up": "interleaved",
    "bias": "both",
    "swiglu_limit": 7.0,
}
_RELU2: dict[str, Any] = {"activation": "relu2", "is_gated": False}

MODELS = [
    *_model("qwen3-30b", 2048, 8, {4: 192, 8: 96, 16: 48}),
    *_model("qwen3-30b-h512", 512, 8, {1: 768, 2: 384}),
    *_model("qwen3-235b", 4096, 8, {8: 192, 16: 96}),
    *_model("qwen3-235b-h512", 512, 8, {1: 1536, 2: 768, 4: 384}),
    *_model("qwen3-coder-480b-h1024", 1024, 8, {4: 640, 8: 320, 16: 160}),
    *_model("qwen3-next", 2048, 10, {2: 256, 4: 128, 8: 64, 16: 32}),
    *_model("glm-4.5-air", 4096, 8, {8: 176, 16: 88}, routed_scaling=1.0),
    *_model("glm-4.5-air-h512", 512, 8, {1: 1408, 2: 704, 4: 352}),
    *_model("deepseek-v3-h1024", 1024, 8, {8: 256, 16: 128}, routed_scaling=2.5),
    *_model("deepseek-v4-pro-h1024", 1024, 6, {8: 384}, swiglu_limit=10.0),
    *_model("kimi-k3", 3584, 16, {16: 192}),
    *_model("minimax-m3-h512", 512, 4, {8: 384}, activation="swigluoai", swiglu_limit=7.0),
    *_model("mixtral-8x7b-h256", 256, 2, {8: 1792, 16: 896}),
    *_model("gpt-oss", 2880, 4, {8: 360, 16: 180}, **_OSS),
    *_model("gpt-oss-h192", 192, 4, {1: 2880, 2: 1440, 4: 720}, **_OSS),
    *_model("gemma4", 2816, 8, {8: 88, 16: 44}, activation="gelu_tanh"),
    *_model("gemma4-h704", 704, 8, {1: 704, 2: 352, 4: 176}, activation="gelu_tanh"),
    *_model("nemotron-3-nano", 2688, 6, {8: 232, 16: 116}, **_RELU2),
    *_model("nemotron-3-nano-h256", 256, 6, {1: 1856, 2: 928, 4: 464}, **_RELU2),
    *_model("nemotron-3-super", 1024, 22, {8: 336, 16: 168}, **_RELU2),
    *_model("nemotron-3-super-h256", 256, 22, {1: 2688, 2: 1344, 4: 672}, **_RELU2),
    *_model("step-3.5-flash-h1024", 1024, 8, {4: 320, 8: 160, 16: 80}),
    *_model("ernie-4.5-h512", 512, 8, {4: 896, 8: 448, 16: 224}),
    *_model("k2-horizon-h512", 512, 8, {1: 1792, 8: 224, 16: 112}),
    *_model("llama4-h512", 512, 1, {16: 512}, weight_on_input=True),
    *_model("granite-3", 1024, 8, {8: 64, 16: 32}),
]

# One row per intermediate size of the matrix, and per wide H, gated and not.
MATRIX = [
    Case(
        f"matrix-i{n_inter}{'' if is_gated else '-ungated'}",
        "the matrix of intermediate sizes",
        n_hidden=72,
        n_inter=n_inter,
        n_topk=3,
        is_gated=is_gated,
    )
    for n_inter in MATRIX_INTER
    for is_gated in (True, False)
] + [
    Case(
        f"matrix-h{n_hidden}-i{n_inter}",
        "the matrix of widths",
        n_token=2,
        n_hidden=n_hidden,
        n_inter=n_inter,
        n_expert=2,
    )
    for n_hidden in MATRIX_HIDDEN
    for n_inter in (44, 96)
]

REPORTS = [
    Case(
        "sglang-28244-i96",
        "sglang #28244: bf16 at 96 columns fell back to a kernel of another layout",
        n_token=33,
        n_hidden=256,
        n_inter=96,
        n_expert=8,
        n_topk=4,
    ),
    Case(
        "vllm-55368-i224",
        "vLLM #55368: 224 columns had no kernel",
        n_token=9,
        n_hidden=256,
        n_inter=224,
    ),
    Case(
        "vllm-38833-i704",
        "vLLM #38833: 704 columns had no kernel",
        n_hidden=128,
        n_inter=704,
        activation="gelu_tanh",
    ),
    Case(
        "aiter-5233-i640",
        "aiter #5233: the second product wrong at widths that are not multiples of 256",
        n_token=17,
        n_hidden=128,
        n_inter=640,
    ),
    Case(
        "sglang-36097-ungated",
        "sglang #36097: a layer without a gate was sized and loaded as if it had one",
        n_hidden=128,
        n_inter=160,
        **_RELU2,
    ),
    Case(
        "aiter-3538-i1440",
        "aiter #3538: the last tile of the intermediate was never written, then read",
        n_token=4,
        n_hidden=64,
        n_inter=1440,
        **_OSS,
    ),
    Case(
        "aiter-4032-m1",
        "aiter #4032: NaN from finite input with one token",
        n_token=1,
        n_hidden=128,
        n_inter=96,
        n_topk=4,
    ),
    Case(
        "aiter-4528-m8192",
        "aiter #4528: NaN from finite input with 8192 tokens",
        n_token=8192,
        n_hidden=24,
        n_inter=16,
        n_expert=8,
    ),
    Case(
        "sglang-39804-token-pad",
        "sglang #39804: padded tokens changed real ones",
        n_token=40,
        n_valid=23,
        n_topk=3,
    ),
    Case(
        "aiter-3677-zero-weight",
        "aiter #3677: NaN where a routed weight is zero",
        n_token=31,
        n_topk=4,
        values="signed",
    ),
]

# Kind, dtype of fp8 weights, dtype of int4 scales, block, phase: every format and every way to
# share scales.
FORMATS: list[dict[str, Any]] = [
    {"quant": "fp8_tensor"},
    {"quant": "fp8_channel"},
    {"quant": "fp8_channel", "weight": "f8_e4m3fnuz"},
    {"quant": "fp8_channel", "weight": "f8_e5m2"},
    {"quant": "fp8_block"},
    {"quant": "fp8_block", "weight": "f8_e4m3fnuz", "phase": 64},
    {"quant": "fp8_block", "weight": "f8_e5m2", "block": (32, 64), "phase": 32},
    {"quant": "mxfp8"},
    {"quant": "mxfp4"},
    {"quant": "int8_channel"},
    {"quant": "int4_group", "block": (1, 32), "scale": "bf16"},
    {"quant": "int4_group", "block": (1, 64), "scale": "f16"},
    {"quant": "int4_group", "block": (1, 128)},
]
_LAYERS: list[dict[str, Any]] = [
    {},
    {"activation": "swigluoai", "bias": "both", "swiglu_limit": 7.0},
    {"activation": "relu2", "is_gated": False},
]


def _quantised_matrix() -> list[Case]:
    """Every format at every size of the matrix, with all pairs of the rest in turn."""
    rows = []
    for f, form in enumerate(FORMATS):
        for i, n_inter in enumerate(MATRIX_INTER):
            n_token = (1, 2, 31, 257)[(f + i) % 4]
            rows.append(
                Case(
                    f"{'-'.join(str(part) for part in form.values())}-i{n_inter}",
                    "every format at every intermediate size",
                    n_token=n_token if n_token * n_inter < 100_000 else 31,
                    n_hidden=(96, 72, 200)[(f + i // 3) % 3],
                    n_inter=n_inter,
                    n_expert=3,
                    gate_up="interleaved" if form["quant"] != "fp8_block" and i % 2 else "concat",
                    dtypes=(("f32", "bf16", "f16")[(f + i // 2) % 3],),
                    **form,
                    **_LAYERS[(f + i) % 3],
                )
            )
    return rows


_MXFP4: dict[str, Any] = {"quant": "mxfp4", "dtypes": ("bf16",)}
_INT4: dict[str, Any] = {"quant": "int4_group", "scale": "bf16", "dtypes": ("bf16",)}
QUANTISED = [
    *_quantised_matrix(),
    Case("gpt-oss-tp8-mxfp4", "gpt-oss, tensor parallel over 8", n_hidden=2880, n_inter=360,
         **_OSS, **_MXFP4),
    Case("qwen3-235b-tp8-fp8-block", "vLLM #48173: 192 columns are no whole blocks of 128",
         n_hidden=512, n_inter=192, quant="fp8_block", phase=64, dtypes=("bf16",)),
    Case("sglang-33090-i128", "sglang #33090: scales padded, weights not", n_hidden=512,
         n_inter=128, n_topk=3, **_MXFP4),
    Case("sglang-36097-mxfp8", "sglang #36097: MXFP8 without a gate, sized as if it had one",
         n_hidden=256, n_inter=640, quant="mxfp8", dtypes=("bf16",), **_RELU2),
    *(
        Case(f"aiter-2900-h{n_hidden}", "aiter #2900: scales strided by a rounded width",
             n_hidden=n_hidden, n_inter=96, **_MXFP4)
        for n_hidden in (288, 544, 800)
    ),
    *(
        Case(f"aiter-5233-mxfp4-i{n_inter}", "aiter #5233: wrong at widths that are no multiple of "
             "256", n_hidden=128, n_inter=n_inter, n_token=33, **_MXFP4)
        for n_inter in (128, 256, 384, 512, 640, 768)
    ),
    Case("vllm-ascend-16100", "vllm-ascend #16100: 11 groups of scales", n_hidden=2816, n_inter=352,
         n_token=2, activation="gelu_tanh", **_MXFP4),
    Case("vllm-41330-90-groups", "vLLM #41330: 90 groups of scales, no power of two", n_hidden=2880,
         n_inter=32, n_token=2, **_MXFP4),
    Case("laguna-int4-i64", "Laguna at TP8: a group of 128 for 64 columns", n_hidden=256,
         n_inter=64, block=(1, 128), **_INT4),
    Case("kimi-k2-int4", "Kimi-K2, groups of 32", n_hidden=896, n_inter=128, n_topk=3,
         block=(1, 32), **_INT4),
    Case("nemotron-3-nano-int8", "Nemotron-3-Nano, tensor parallel over 8", n_hidden=672,
         n_inter=232, quant="int8_channel", dtypes=("bf16",), **_RELU2),
    Case("inter-0-fp8-block", "a rank without columns", n_inter=0, quant="fp8_block"),
    Case("inter-0-mxfp4", "a rank without columns", n_inter=0, quant="mxfp4"),
    Case("inter-0-int8-bias", "a rank without columns adds its w2 bias", n_inter=0, bias="both",
         quant="int8_channel"),
    Case("large-fp8", "activations that saturate", values="large", quant="fp8_channel", n_token=9),
    Case("nan-token-mxfp8", "a NaN stays in its token", values="nan", n_token=9, quant="mxfp8"),
    Case("everything-mxfp4", "every option together", n_token=33, n_topk=3, gate_up="interleaved",
         bias="both", swiglu_limit=1.0, n_skip=0.2, n_valid=29, routed_scaling=1.5,
         weight_on_input=True, n_expert_global=9, quant="mxfp4"),
    Case("strided-fp8-block", "every tensor a view into a wider one", is_strided=True, n_token=17,
         n_hidden=160, n_inter=96, quant="fp8_block", phase=96),
    Case("strided-int4", "every tensor a view into a wider one", is_strided=True, n_token=17,
         n_hidden=160, n_inter=96, quant="int4_group", block=(1, 32)),
]  # fmt: skip

_ACTIVATIONS = [
    (name, is_gated)
    for name in reference.ACTIVATIONS
    for is_gated in (True, False)
    if (is_gated and name != "relu2") or (not is_gated and name in reference.UNGATED)
]


def _activations() -> list[Case]:
    """Every activation with every option that touches it, alone and together."""
    rows = []
    for name, is_gated in _ACTIVATIONS:
        base = Case(
            f"{name}{'' if is_gated else '-ungated'}",
            "every activation with every option",
            n_token=9,
            n_hidden=80,
            n_inter=56,
            n_topk=3,
            activation=name,
            is_gated=is_gated,
        )
        options: dict[str, dict[str, Any]] = {
            "plain": {},
            "large": {"values": "large"},
            "bias": {"bias": "both"},
            "bias-f32": {"bias": "both in f32"},
            "on-input": {"weight_on_input": True},
            "on-input-bias": {"weight_on_input": True, "bias": "both"},
            "scaled": {"routed_scaling": 2.5},
        }
        if is_gated:
            options |= {
                "interleaved": {"gate_up": "interleaved"},
                "interleaved-bias": {"gate_up": "interleaved", "bias": "both"},
                "limit": {"swiglu_limit": 0.75},
                "limit-large": {"swiglu_limit": 7.0, "values": "large"},
                "everything": {
                    "gate_up": "interleaved",
                    "bias": "both",
                    "swiglu_limit": 1.5,
                    "weight_on_input": True,
                    "routed_scaling": 0.3,
                    "n_skip": 0.2,
                    "n_expert_global": 9,
                    "n_valid": 7,
                },
            }
        for key, value in options.items():
            rows.append(replace(base, name=f"{base.name}-{key}", **value))
    rows.append(Case("swigluoai-alpha", "another slope", activation="swigluoai", swiglu_alpha=0.5))
    return rows


ACTIVATIONS = _activations()


def _sweep(field_name: str, values: tuple[int, ...], **options: Any) -> list[Case]:
    """One row per value of one size."""
    letter = {"n_token": "m", "n_hidden": "h", "n_inter": "i", "n_topk": "k", "n_expert": "e"}
    rows = []
    for value in values:
        fields: dict[str, Any] = {field_name: value, **options}
        rows.append(Case(f"{letter[field_name]}{value}", f"sweep of {field_name}", **fields))
    return rows


SWEEPS = [
    *_sweep("n_token", (0, 1, 2, 3, 4, 6, 7, 8, 15, 16, 31, 32, 33, 64, 65, 129, 257), n_hidden=96),
    *_sweep("n_token", (1000,), n_hidden=40, n_inter=24, n_expert=16, n_topk=4),
    *_sweep("n_hidden", (8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 513)),
    *_sweep("n_inter", (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255)),
    *_sweep("n_topk", (1, 3, 5, 8, 16, 22, 32), n_expert=40, n_inter=24, n_token=9),
    *_sweep("n_expert", (1, 2, 3, 64, 128, 256, 512, 1024), n_hidden=32, n_inter=16, n_token=33),
]

CORNERS = [
    Case("k32-of-4", "more slots than experts, so ids repeat", n_topk=32, n_token=7),
    Case("e1024-k32", "the largest expert count with the largest k", n_token=65, n_hidden=24,
         n_inter=8, n_expert=1024, n_topk=32),
    Case("one-expert", "all tokens to one expert", routing="one", n_token=65),
    Case("repeated-ids", "one expert in all slots of a token", routing="repeated", n_token=33,
         n_topk=5),
    Case("idle-expert", "experts without tokens", routing="even", n_token=17, n_expert=9),
    Case("some-skipped", "slots with id -1", n_skip=0.4, n_token=33, n_topk=3),
    Case("some-skipped-bias", "a skipped slot has no bias either", n_skip=0.4, n_token=33, n_topk=3,
         bias="both"),
    Case("all-skipped", "all slots with id -1: exact zeros", n_skip=1.0, n_token=9),
    Case("map", "expert parallel: most experts are elsewhere", n_expert_global=12, n_token=33,
         n_topk=4),
    Case("map-i64", "expert_map and ids in int64", n_expert_global=12, n_token=33, n_topk=4,
         topk_ids="i64"),
    Case("map-skipped", "expert parallel and -1 together", n_expert_global=12, n_token=33, n_topk=4,
         n_skip=0.3, bias="both"),
    Case("map-one", "one expert here out of many", n_expert=1, n_expert_global=256, n_token=65,
         n_topk=8),
    Case("valid-0", "no valid token", n_token=6, n_valid=0),
    Case("valid-1", "one valid token", n_token=6, n_valid=1),
    Case("valid-all", "n_token equal to the rows", n_token=6, n_valid=6),
    Case("valid-i32", "n_token as an array", n_token=33, n_valid=17, n_valid_type="i32"),
    Case("valid-i64", "n_token as an array", n_token=33, n_valid=17, n_valid_type="i64"),
    Case("inter-0-bias", "an empty rank adds its w2 bias only", n_inter=0, bias="both"),
    Case("inter-0-ungated", "an empty rank without a gate", n_inter=0, **_RELU2),
    Case("strided", "every tensor a view into a wider one", is_strided=True, n_token=17),
    Case("strided-everything", "strides with every option", is_strided=True, n_token=17,
         gate_up="interleaved", bias="both", swiglu_limit=1.0, n_skip=0.2, n_valid=13,
         routed_scaling=1.5, n_topk=3),
    Case("strided-ungated", "strides without a gate", is_strided=True, bias="both", **_RELU2),
    Case("odd-everything", "no size a multiple of 4, with every option", n_token=21, n_hidden=83,
         n_inter=45, n_expert=5, n_topk=3, gate_up="interleaved", bias="both", swiglu_limit=1.0,
         n_skip=0.2, n_valid=19, routed_scaling=1.5),
    Case("odd-ungated", "no size a multiple of 4, without a gate", n_token=7, n_hidden=83,
         n_inter=45, bias="both", **_RELU2),
    Case("one-small-expert", "rows by far the largest part of the workspace", n_token=300,
         n_hidden=40, n_inter=24, n_expert=1),
    Case("tiny", "results among float16's subnormals", values="tiny", n_token=9),
    Case("light", "w2 among float16's subnormals, results not", values="light", n_token=9),
    Case("zero", "zero in, zero out", values="zero", n_token=9),
    Case("nan-token", "a NaN stays in its token", values="nan", n_token=9),
    Case("nan-token-limit", "a clamp keeps NaN", values="nan", n_token=9, swiglu_limit=1.0),
    Case("nan-token-relu2", "relu2 keeps NaN", values="nan", n_token=9, **_RELU2),
    Case("nan-token-oai", "swigluoai keeps NaN", values="nan", n_token=9, **_OSS),
    Case("inf-token", "an infinity stays in its token", values="inf", n_token=9),
    Case("signed-weights", "routed weights of both signs and zero", values="signed", n_token=33,
         n_topk=4, weight_on_input=True),
    *(
        Case(f"topk-{weights}-{ids}", "types of the routing", topk_weights=weights, topk_ids=ids,
             n_token=17, n_skip=0.1)
        for weights in ("f32", "bf16", "f16")
        for ids in ("i32", "i64")
    ),
]  # fmt: skip

CASES = MODELS + MATRIX + REPORTS + ACTIVATIONS + SWEEPS + CORNERS

# The few that stand for all where a test runs many variants of each.
FEW = [
    case
    for case in CASES
    if case.name
    in (
        "qwen3-30b-tp8-i96",
        "gpt-oss-tp8-i360",
        "nemotron-3-nano-tp8-i232",
        "silu-everything",
        "strided-everything",
        "odd-everything",
        "odd-ungated",
        "one-small-expert",
        "m257",
        "map-skipped",
    )
]

assert len({case.name for case in [*CASES, *QUANTISED]}) == len(CASES) + len(QUANTISED)
