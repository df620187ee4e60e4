"""Wrong arguments: exactly one is wrong in each row, and the message names it and the way out.

A row gives the arguments that differ from a right call, the exception's type and a pattern its
whole text must match. `out` must be as it was after every one of them.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import moepad
import numpy as np
import pytest
from moepad import _core

M, H, N, E, K = 5, 24, 8, 4, 2  # tokens, width, intermediate size, experts, slots
SENTINEL = -77.0


def f32(*shape: int) -> Any:
    return np.full(shape, 0.5, np.float32)


def right() -> dict[str, Any]:
    """A call that works, made anew: w13 [4, 16, 24], w2 [4, 24, 8]."""
    return {
        "hidden_states": f32(M, H),
        "w13": f32(E, 2 * N, H),
        "w2": f32(E, H, N),
        "topk_weights": f32(M, K),
        "topk_ids": np.zeros((M, K), np.int32),
    }


FP8 = ml_dtypes.float8_e4m3fn


def quantised(quant: str, **change: Any) -> dict[str, Any]:
    """What makes the right call one with quantised weights, and then one that differs."""
    dtype = {"mxfp4": np.uint8, "int4_group": np.uint8, "int8_channel": np.int8}.get(quant, FP8)
    n_pack = 2 if dtype is np.uint8 else 1
    e8m0 = np.full((E, 2 * N, 1), 127, np.uint8), np.full((E, H, 1), 127, np.uint8)
    w13_scale, w2_scale = {
        "fp8_tensor": (f32(E), f32(E)),
        "fp8_block": (f32(E, 2, 1), f32(E, 1, 1)),
        "mxfp8": e8m0,
        "mxfp4": e8m0,
        "int4_group": (f32(E, 2 * N, 1), f32(E, H, 1)),
    }.get(quant, (f32(E, 2 * N), f32(E, H)))
    call: dict[str, Any] = {
        "quant": quant,
        "w13": np.zeros((E, 2 * N, H // n_pack), dtype),
        "w2": np.zeros((E, H, N // n_pack), dtype),
        "w13_scale": w13_scale,
        "w2_scale": w2_scale,
    }
    if quant == "int4_group":
        call["block"] = (1, 64)
    return {**call, **change}


def swapped(array: Any) -> Any:
    return array.astype(array.dtype.newbyteorder(">"))


def misaligned(array: Any) -> Any:
    raw = np.zeros(array.nbytes + 1, np.uint8)[1:]
    return raw.view(array.dtype).reshape(array.shape)


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def aligned_bytes(n: int, shift: int = 0) -> Any:
    raw = np.zeros(n + 128, np.uint8)
    start = -raw.ctypes.data % 64 + shift
    return raw[start : start + n]


def ids(value: int) -> Any:
    array = np.zeros((M, K), np.int64)
    array[3, 1] = value
    return array


class Device:
    """A producer of tensors that are elsewhere."""

    def __init__(self, kind: int) -> None:
        self.kind = kind

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self.kind, 1)

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("must not be asked for memory that nothing here can read")


class Refusing:
    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("it is mine")


# Arguments, exception, pattern of the whole message.
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # Kinds.
    "hidden list": (
        {"hidden_states": [[0.5] * H] * M},
        TypeError,
        r"hidden_states: expected a NumPy array, a torch tensor or an object with __dlpack__, "
        r"got list; convert it with np\.asarray",
    ),
    "hidden None": ({"hidden_states": None}, TypeError, r"hidden_states: .*, got NoneType; .*"),
    "w13 int": ({"w13": 3}, TypeError, r"w13: .*, got int; .*"),
    "w2 bytes": ({"w2": b"abc"}, TypeError, r"w2: .*, got bytes; .*"),
    "weights array type": (
        {"topk_weights": np.ndarray},
        TypeError,
        r"topk_weights: .*, got type;.*",
    ),
    "ids float scalar": ({"topk_ids": 0.5}, TypeError, r"topk_ids: .*, got float; .*"),
    "ids scalar": ({"topk_ids": np.int32(1)}, TypeError, r"topk_ids: .*, got int32; .*"),
    "w13_bias str": ({"w13_bias": "none"}, TypeError, r"w13_bias: .*, got str; .*"),
    "expert_map list": ({"expert_map": [0, 1]}, TypeError, r"expert_map: .*, got list; .*"),
    "out str": ({"out": "x"}, TypeError, r"out: .*, got str; .*"),
    "objects": (
        {"w2": np.full((E, H, N), None)},
        TypeError,
        r"w2: expected numbers, got an array of Python objects",
    ),
    "refused": (
        {"w2": Refusing()},
        TypeError,
        r"w2: its producer cannot export it through DLPack: BufferError: it is mine",
    ),
    # dtypes.
    "hidden f64": (
        {"hidden_states": np.zeros((M, H))},
        TypeError,
        r"hidden_states: expected dtype f32, bf16 or f16, got float64; convert it .*",
    ),
    "hidden i32": (
        {"hidden_states": np.zeros((M, H), np.int32)},
        TypeError,
        r"hidden_states: expected dtype f32, bf16 or f16, got i32; .*",
    ),
    "w13 f16": (
        {"w13": f32(E, 2 * N, H).astype(np.float16)},
        TypeError,
        r"w13: expected dtype f32, that of hidden_states, got f16; convert one of them",
    ),
    "w13 bf16": (
        {"w13": f32(E, 2 * N, H).astype(ml_dtypes.bfloat16)},
        TypeError,
        r"w13: expected dtype f32, that of hidden_states, got bf16; convert one of them",
    ),
    "w2 fp8": (
        {"w2": f32(E, H, N).astype(ml_dtypes.float8_e4m3fn)},
        TypeError,
        r"w2: expected dtype f32, that of hidden_states, got f8_e4m3fn; .*",
    ),
    "w2 e4m3": (
        {"w2": f32(E, H, N).astype(ml_dtypes.float8_e4m3)},
        TypeError,
        r"w2: expected dtype f32, that of hidden_states, got float8_e4m3; .*",
    ),
    "weights f64": (
        {"topk_weights": np.zeros((M, K))},
        TypeError,
        r"topk_weights: expected dtype f32, bf16 or f16, got float64; .*",
    ),
    "ids i16": (
        {"topk_ids": np.zeros((M, K), np.int16)},
        TypeError,
        r"topk_ids: expected dtype i32 or i64, got int16; .*",
    ),
    "ids u32": (
        {"topk_ids": np.zeros((M, K), np.uint32)},
        TypeError,
        r"topk_ids: expected dtype i32 or i64, got uint32; .*",
    ),
    "ids f32": ({"topk_ids": f32(M, K)}, TypeError, r"topk_ids: expected .*, got f32; .*"),
    "w13_bias i32": (
        {"w13_bias": np.zeros((E, 2 * N), np.int32)},
        TypeError,
        r"w13_bias: expected dtype f32, bf16 or f16, got i32; .*",
    ),
    "w2_bias f64": ({"w2_bias": np.zeros((E, H))}, TypeError, r"w2_bias: .*, got float64; .*"),
    "expert_map f32": ({"expert_map": f32(9)}, TypeError, r"expert_map: .*, got f32; .*"),
    "n_token array f32": ({"n_token": f32(1)}, TypeError, r"n_token: .*i32 or i64, got f32; .*"),
    "out f16": (
        {"out": np.zeros((M, H), np.float16)},
        TypeError,
        r"out: expected dtype f32, that of hidden_states, got f16; .*",
    ),
    # Numbers of dimensions.
    "hidden 1d": (
        {"hidden_states": f32(H)},
        ValueError,
        r"hidden_states: expected 2 dimensions \(M, H\), got shape \(24,\)",
    ),
    "w13 2d": (
        {"w13": f32(2 * N, H)},
        ValueError,
        r"w13: expected 3 dimensions \(E, rows, H\), got shape \(16, 24\)",
    ),
    "w2 5d": (
        {"w2": f32(E, H, N, 1, 1)},
        ValueError,
        r"w2: expected 3 dimensions \(E, H, n_inter_pad\), got shape \(4, 24, 8, 1, \.\.\.\)",
    ),
    "weights 0d": (
        {"topk_weights": f32()},
        ValueError,
        r"topk_weights: .* \(M, k\), got shape \(\)",
    ),
    "ids 3d": (
        {"topk_ids": np.zeros((M, K, 1), np.int32)},
        ValueError,
        r"topk_ids: expected 2 dimensions \(M, k\), got shape \(5, 2, 1\)",
    ),
    "w13_bias 3d": ({"w13_bias": f32(E, 2 * N, 1)}, ValueError, r"w13_bias: .*\(4, 16, 1\)"),
    "w2_bias 1d": ({"w2_bias": f32(H)}, ValueError, r"w2_bias: .*\(E, H\), got shape \(24,\)"),
    "expert_map 2d": (
        {"expert_map": np.zeros((1, 9), np.int32)},
        ValueError,
        r"expert_map: expected 1 dimension \(E_global,\), got shape \(1, 9\)",
    ),
    "out 3d": ({"out": f32(1, M, H)}, ValueError, r"out: .* \(M, H\), got shape \(1, 5, 24\)"),
    # Shapes.
    "w13 rows short": (
        {"w13": f32(E, 2 * 6, H)},
        ValueError,
        r"w13: expected shape \(4, 16, 24\) for n_inter_pad=8, got \(4, 12, 24\); pass "
        r"w2\[:, :, :6\] with n_inter=6, or load with moepad\.load_experts",
    ),
    "w13 rows long": (
        {"w13": f32(E, 2 * 9, H)},
        ValueError,
        r"w13: expected shape \(4, 16, 24\) for n_inter_pad=8, got \(4, 18, 24\); w13 and w2 must "
        r"be padded alike: load with moepad\.load_experts",
    ),
    "w13 rows odd": (
        {"w13": f32(E, 13, H)},
        ValueError,
        r"w13: .*got \(4, 13, 24\); w13 and w2 .*",
    ),
    "w13 rows ungated": (
        {"w13": f32(E, 6, H), "activation": "relu2"},
        ValueError,
        r"w13: expected shape \(4, 8, 24\) for n_inter_pad=8, got \(4, 6, 24\); pass w2\[.*:6\] .*",
    ),
    "w13 narrow": (
        {"w13": f32(E, 2 * N, H - 1)},
        ValueError,
        r"w13: expected shape \(4, 16, at least 24\) for the width of hidden_states, got "
        r"\(4, 16, 23\); pass n_hidden if the width is padded",
    ),
    "w2 experts": (
        {"w2": f32(E + 1, H, N)},
        ValueError,
        r"w2: expected shape \(4, at least 24, 8\) for the experts of w13 and the width of "
        r"hidden_states, got \(5, 24, 8\)",
    ),
    "w2 narrow": (
        {"w2": f32(E, H - 2, N)},
        ValueError,
        r"w2: expected shape \(4, at least 24, 8\) .*, got \(4, 22, 8\); pass n_hidden .*",
    ),
    "ids rows": (
        {"topk_ids": np.zeros((M + 1, K), np.int32)},
        ValueError,
        r"topk_ids: expected shape \(5, 2\), one row per row of hidden_states, got \(6, 2\)",
    ),
    "weights slots": (
        {"topk_weights": f32(M, K + 1)},
        ValueError,
        r"topk_weights: expected shape \(5, 2\), that of topk_ids, got \(5, 3\)",
    ),
    "weights rows": ({"topk_weights": f32(M - 1, K)}, ValueError, r"topk_weights: .*got \(4, 2\)"),
    "w13_bias rows": (
        {"w13_bias": f32(E, N)},
        ValueError,
        r"w13_bias: expected shape \(4, 16\), experts and rows of w13, got \(4, 8\); pad it .*",
    ),
    "w13_bias experts": ({"w13_bias": f32(1, 2 * N)}, ValueError, r"w13_bias: .*got \(1, 16\); .*"),
    "w2_bias narrow": (
        {"w2_bias": f32(E, H - 1)},
        ValueError,
        r"w2_bias: expected shape \(4, at least 24\) for the experts of w2 and the width of "
        r"hidden_states, got \(4, 23\)",
    ),
    "out shape": (
        {"out": f32(M, H + 1)},
        ValueError,
        r"out: expected shape \(5, 24\), that of hidden_states, got \(5, 25\)",
    ),
    "n_token shape": (
        {"n_token": np.zeros(2, np.int32)},
        ValueError,
        r"n_token: expected an integer or one element, got shape \(2,\)",
    ),
    # Layout in memory.
    "w13 stepped": (
        {"w13": f32(E, 2 * N, 2 * H)[:, :, ::2]},
        ValueError,
        r"w13: expected a contiguous last dimension, got a stride of 8 bytes for elements of 4; "
        r"pass it through \.contiguous\(\) \(torch\) or np\.ascontiguousarray",
    ),
    "w2 transposed": (
        {"w2": f32(E, N, H).transpose(0, 2, 1)},
        ValueError,
        r"w2: expected a contiguous last dimension, got a stride of 96 bytes .*",
    ),
    "hidden reversed": (
        {"hidden_states": f32(M, H)[:, ::-1]},
        ValueError,
        r"hidden_states: .* -4 .*",
    ),
    "ids broadcast": (
        {"topk_ids": np.broadcast_to(np.zeros((M, 1), np.int32), (M, K))},
        ValueError,
        r"topk_ids: expected a contiguous last dimension, got a stride of 0 bytes .*",
    ),
    "expert_map stepped": (
        {"expert_map": np.zeros(8, np.int32)[::2]},
        ValueError,
        r"expert_map: expected a contiguous last dimension, got a stride of 8 bytes .*",
    ),
    "swapped bytes": (
        {"w13": swapped(f32(E, 2 * N, H))},
        ValueError,
        r"w13: expected this machine's byte order, got f32 with swapped bytes; pass .*",
    ),
    "misaligned": (
        {"w2": misaligned(f32(E, H, N))},
        ValueError,
        r"w2: expected elements aligned to their 4 bytes, got address 0x[0-9a-f]+; pass a copy",
    ),
    # out.
    "out read-only": (
        {"out": read_only(f32(M, H))},
        ValueError,
        r"out: expected writable memory, got a read-only array; pass a copy",
    ),
    "out broadcast": (
        {"out": np.lib.stride_tricks.as_strided(f32(H), (M, H), (0, 4))},
        ValueError,
        r"out: expected rows apart from each other, got a row stride of 0 bytes for rows of 96; .*",
    ),
    "out rows overlap": (
        {"out": np.lib.stride_tricks.as_strided(f32(M * H), (M, H), (92, 4))},
        ValueError,
        r"out: expected rows apart from each other, got a row stride of 92 bytes .*",
    ),
    # Numbers.
    "n_inter large": (
        {"n_inter": 9},
        ValueError,
        r"n_inter: expected at most n_inter_pad=8, the last dimension of w2, got 9",
    ),
    "n_inter negative": ({"n_inter": -1}, ValueError, r"n_inter: .* at least 0, got -1"),
    "n_inter huge": ({"n_inter": 2**63}, ValueError, r"n_inter: expected .* below 2\*\*63, .*"),
    "n_inter very negative": ({"n_inter": -(2**70)}, ValueError, r"n_inter: .*less than -2\*\*63"),
    "n_inter float": ({"n_inter": 8.0}, TypeError, r"n_inter: expected an integer, got float"),
    "n_inter bool": ({"n_inter": True}, TypeError, r"n_inter: expected an integer, got bool"),
    "n_inter array": ({"n_inter": f32(3)}, TypeError, r"n_inter: .* integer, got ndarray"),
    "n_hidden large": (
        {"n_hidden": 25},
        ValueError,
        r"n_hidden: expected at most 24 for hidden_states of shape \(5, 24\), got 25; .*",
    ),
    "n_hidden str": ({"n_hidden": "24"}, TypeError, r"n_hidden: expected an integer, got str"),
    "n_token large": (
        {"n_token": 6},
        ValueError,
        r"n_token: expected 0 to 5, the rows of hidden_states, got 6",
    ),
    "n_token negative": ({"n_token": -1}, ValueError, r"n_token: .* at least 0, got -1"),
    "n_token negative array": (
        {"n_token": np.array([-1])},
        ValueError,
        r"n_token: expected 0 to 5, the rows of hidden_states, got -1",
    ),
    "n_token float": ({"n_token": 5.0}, TypeError, r"n_token: expected an integer, got float"),
    "alpha str": ({"swiglu_alpha": "1.7"}, TypeError, r"swiglu_alpha: .* a number, got str"),
    "alpha None": ({"swiglu_alpha": None}, TypeError, r"swiglu_alpha: .* number, got NoneType"),
    "alpha nan": ({"swiglu_alpha": np.nan}, ValueError, r"swiglu_alpha: .*finite .*, got nan"),
    "limit negative": (
        {"swiglu_limit": -7.0},
        ValueError,
        r"swiglu_limit: expected None or a number of at least 0, got -7",
    ),
    "limit nan": ({"swiglu_limit": np.nan}, ValueError, r"swiglu_limit: .*, got nan"),
    "scaling large": (
        {"routed_scaling_factor": 1e300},
        ValueError,
        r"routed_scaling_factor: expected a finite number within float32, got 1e\+300",
    ),
    "scaling complex": (
        {"routed_scaling_factor": 1j},
        TypeError,
        r"routed_scaling_factor: expected a number, got complex",
    ),
    "flag int": (
        {"apply_router_weight_on_input": 1},
        TypeError,
        r"apply_router_weight_on_input: expected True or False, got int",
    ),
    "block list": (
        {"block": [128, 128]},
        TypeError,
        r"block: expected a tuple of two integers \(rows, columns\), got list",
    ),
    "block zero": ({"block": (0, 1)}, ValueError, r"block\[0\]: .* at least 1, got 0"),
    # Names.
    "activation unknown": (
        {"activation": "swish"},
        ValueError,
        r'activation: expected "silu", "gelu", "gelu_tanh", "swigluoai" or "relu2", got "swish"',
    ),
    "activation int": ({"activation": 0}, TypeError, r"activation: expected a name .*, got int"),
    "activation surrogate": ({"activation": "\ud800"}, ValueError, r"activation: .*, got \"\?\""),
    "activation needs a gate": (
        {"w13": f32(E, N, H), "activation": "swigluoai"},
        ValueError,
        r'activation: "swigluoai" multiplies gate by up and needs a w13 of 2\*n_inter_pad rows, '
        r"got 8 rows for n_inter_pad=8; .*",
    ),
    "activation has no gate": (
        {"activation": "relu2"},
        ValueError,
        r'activation: "relu2" has no gate and needs a w13 of n_inter_pad rows, got 16 rows for '
        r"n_inter_pad=8; .*",
    ),
    "gate_up": (
        {"gate_up": "up_gate"},
        ValueError,
        r'gate_up: expected "concat" or "interleaved", got "up_gate"',
    ),
    "quant unknown": ({"quant": "fp8"}, ValueError, r'quant: expected "none", .*, got "fp8"'),
    "quant None": ({"quant": None}, TypeError, r"quant: expected a name \(str\), got NoneType"),
    "layout None": ({"layout": None}, TypeError, r"layout: expected a name \(str\), got NoneType"),
    # What only other calls have.
    "scale": (
        {"w2_scale": f32(E)},
        ValueError,
        r'w2_scale: expected None for quant="none"; name the quant that it belongs to',
    ),
    "phase": ({"scale_phase": 64}, ValueError, r'scale_phase: expected 0 for quant="none", got 64'),
    "stream": (
        {"stream": 0},
        ValueError,
        r"stream: expected None for tensors on the CPU, which has no streams",
    ),
    # Quantised weights.
    "quant of f32": (
        {"quant": "fp8_channel", "w13_scale": f32(E, 2 * N), "w2_scale": f32(E, H)},
        TypeError,
        r'w13: expected dtype f8_e4m3fn, f8_e4m3fnuz or f8_e5m2 for quant="fp8_channel", got f32; '
        r"pass the stored values and their scales",
    ),
    "fp8 as bytes": (
        quantised("fp8_channel", w13=np.zeros((E, 2 * N, H), np.uint8)),
        TypeError,
        r'w13: expected dtype f8_e4m3fn, f8_e4m3fnuz or f8_e5m2 for quant="fp8_channel", got u8; '
        r"pass \.view\(ml_dtypes\.float8_e4m3fn\) or \.view\(torch\.float8_e4m3fn\) if the bytes "
        r"are such",
    ),
    "fp8 without a quant": (
        {"w13": np.zeros((E, 2 * N, H), FP8)},
        TypeError,
        r"w13: expected dtype f32, that of hidden_states, got f8_e4m3fn; name the quant of "
        r"quantised weights",
    ),
    "int8 without a quant": (
        {"w2": np.zeros((E, H, N), np.int8)},
        TypeError,
        r"w2: .*, got i8; .*",
    ),
    "fp8 of two formats": (
        quantised("fp8_channel", w2=np.zeros((E, H, N), ml_dtypes.float8_e5m2)),
        TypeError,
        r"w2: expected dtype f8_e4m3fn, that of w13, got f8_e5m2; both are stored alike",
    ),
    "mxfp8 in e5m2": (
        quantised("mxfp8", w13=np.zeros((E, 2 * N, H), ml_dtypes.float8_e5m2)),
        TypeError,
        r'w13: expected dtype f8_e4m3fn for quant="mxfp8", got f8_e5m2; pass a \.view as that '
        r"dtype if the bytes are such",
    ),
    "mxfp4 as int8": (
        quantised("mxfp4", w2=np.zeros((E, H, N // 2), np.int8)),
        TypeError,
        r'w2: expected dtype u8 for quant="mxfp4", got i8; pass a \.view as that dtype .*',
    ),
    "int8 as uint8": (
        quantised("int8_channel", w13=np.zeros((E, 2 * N, H), np.uint8)),
        TypeError,
        r'w13: expected dtype i8 for quant="int8_channel", got u8; .*',
    ),
    "int4 as int32": (
        quantised("int4_group", w13=np.zeros((E, 2 * N, H // 8), np.int32)),
        TypeError,
        r'w13: expected dtype u8 for quant="int4_group", got i32; pass the stored values and their '
        r"scales",
    ),
    "scale missing": (
        quantised("fp8_channel", w2_scale=None),
        ValueError,
        r'w2_scale: missing; quant="fp8_channel" needs the scales of w13 and w2',
    ),
    "scale in f16": (
        quantised("fp8_channel", w13_scale=f32(E, 2 * N).astype(np.float16)),
        TypeError,
        r'w13_scale: expected dtype f32 for quant="fp8_channel", got f16; convert it with '
        r"\.astype or \.to",
    ),
    "mx scale in f32": (
        quantised("mxfp4", w2_scale=f32(E, H, 1)),
        TypeError,
        r"w2_scale: expected dtype f8_e8m0 or u8 \(exponents, 2\*\*\(byte - 127\)\) for "
        r'quant="mxfp4", got f32',
    ),
    "int4 scale in bytes": (
        quantised("int4_group", w2_scale=np.ones((E, H, 1), np.uint8)),
        TypeError,
        r"w2_scale: expected dtype f32, bf16 or f16, got u8; .*",
    ),
    "tensor scale of one half more": (
        quantised("fp8_tensor", w13_scale=f32(E, 3)),
        ValueError,
        r'w13_scale: expected shape \(4, 1 to 2\) for quant="fp8_tensor", got \(4, 3\); scales are '
        r"padded like their weights: moepad\.plan gives the shapes",
    ),
    "tensor scale of a gate without one": (
        {
            **quantised("fp8_tensor", w13_scale=f32(E, 2)),
            "activation": "relu2",
            "w13": np.zeros((E, N, H), FP8),
        },
        ValueError,
        r"w13_scale: expected shape \(4, 1\) .*, got \(4, 2\); .*",
    ),
    "tensor scale of fewer experts": (
        quantised("fp8_tensor", w2_scale=f32(E - 1)),
        ValueError,
        r"w2_scale: expected shape \(4,\) .*, got \(3,\); .*",
    ),
    "scale of unpadded rows": (
        quantised("fp8_channel", w13_scale=f32(E, 2 * N - 2), n_inter=N - 1),
        ValueError,
        r"w13_scale: expected shape \(4, 16\) .*, got \(4, 14\); .*",
    ),
    "scale of too few columns' rows": (
        quantised("int8_channel", w2_scale=f32(E, H - 1)),
        ValueError,
        r"w2_scale: expected shape \(4, 24\) .*, got \(4, 23\); .*",
    ),
    "scale of one dimension": (
        quantised("int8_channel", w2_scale=f32(E * H)),
        ValueError,
        r"w2_scale: expected shape \(4, 24\) .*, got \(96,\); .*",
    ),
    "block scale too small": (
        quantised("fp8_block", w13_scale=f32(E, 2, 1), scale_phase=96, block=(96, 128)),
        ValueError,
        r'w13_scale: expected shape \(4, at least 4, 1\) for quant="fp8_block", block=\(96, 128\), '
        r"n_inter=8, scale_phase=96, got \(4, 2, 1\); .*",
    ),
    "block scale of odd rows": (
        quantised("fp8_block", w13_scale=f32(E, 3, 1)),
        ValueError,
        r"w13_scale: expected shape \(4, at least 2, 1\) .*, got \(4, 3, 1\); .*",
    ),
    "block scale of smaller blocks": (
        quantised("fp8_block", w2_scale=f32(E, 2, 1)),
        ValueError,
        r"w2_scale: expected shape \(4, 1, at least 1\) .*, got \(4, 2, 1\); .*",
    ),
    "group scale of other groups": (
        quantised("mxfp4", w2_scale=np.ones((E, H, 2), np.uint8)),
        ValueError,
        r'w2_scale: expected shape \(4, 24, 1\) for quant="mxfp4", groups of 32, n_inter=8, got '
        r"\(4, 24, 2\); .*",
    ),
    "block not in 32": (
        quantised("fp8_block", block=(128, 48)),
        ValueError,
        r'block: expected multiples of 32 for quant="fp8_block", got \(128, 48\); .*',
    ),
    "block of int4 left out": (
        {k: v for k, v in quantised("int4_group").items() if k != "block"},
        ValueError,
        r'block: expected \(1, group\) with group 32, 64 or 128 for quant="int4_group", got '
        r"\(128, 128\); pass the checkpoint's group size, e\.g\. block=\(1, 128\)",
    ),
    "block of int4 of 16": (
        quantised("int4_group", block=(1, 16)),
        ValueError,
        r"block: expected \(1, group\) .*, got \(1, 16\); .*",
    ),
    "block of mxfp4 of 16": (
        quantised("mxfp4", block=(1, 16)),
        ValueError,
        r'block: expected \(1, 32\) for quant="mxfp4", got \(1, 16\); leave it out',
    ),
    "phase of a channel": (
        quantised("fp8_channel", scale_phase=64),
        ValueError,
        r'scale_phase: expected 0 for quant="fp8_channel", got 64',
    ),
    "phase not in 32": (
        quantised("fp8_block", scale_phase=48),
        ValueError,
        r"scale_phase: expected a multiple of 32 inside the first block of \(128, 128\), got 48; "
        r"moepad\.plan gives it as Plan\.scale_phase",
    ),
    "phase beyond the block": (
        quantised("fp8_block", scale_phase=128),
        ValueError,
        r"scale_phase: .*, got 128; .*",
    ),
    "block of interleaved rows": (
        quantised("fp8_block", gate_up="interleaved"),
        ValueError,
        r'gate_up: expected "concat" for quant="fp8_block", whose blocks span rows, got '
        r'"interleaved"; deinterleave the rows of w13',
    ),
    "quantised activations of plain weights": (
        {"quant_activations": "fp8"},
        moepad.UnsupportedError,
        r'quant_activations: no kernel for "fp8" with quant="none"; considered: "fp8" with '
        r'fp8_tensor, fp8_channel or fp8_block, "int8" with int8_channel, "mxfp8" with mxfp8 or '
        r'mxfp4, "mxfp4" with mxfp4; .*',
    ),
    "fp8 activations of int8": (
        quantised("int8_channel", quant_activations="fp8"),
        moepad.UnsupportedError,
        r'quant_activations: no kernel for "fp8" with quant="int8_channel"; .*',
    ),
    "mxfp8 activations of fp8": (
        quantised("fp8_channel", quant_activations="mxfp8"),
        moepad.UnsupportedError,
        r'quant_activations: no kernel for "mxfp8" with quant="fp8_channel"; .*',
    ),
    "mxfp4 activations of mxfp8": (
        quantised("mxfp8", quant_activations="mxfp4"),
        moepad.UnsupportedError,
        r'quant_activations: no kernel for "mxfp4" with quant="mxfp8"; .*',
    ),
    "fp8 activations of mxfp8": (
        quantised("mxfp8", quant_activations="fp8"),
        moepad.UnsupportedError,
        r'quant_activations: no kernel for "fp8" with quant="mxfp8"; .*',
    ),
    "fixed scale of mxfp8 activations": (
        quantised("mxfp4", quant_activations="mxfp8", x_scale=f32(1)),
        ValueError,
        r'x_scale: expected None for quant_activations="mxfp8", whose scales are of each 32 '
        r"columns; leave it out",
    ),
    "fixed scale of mxfp4 activations": (
        quantised("mxfp4", quant_activations="mxfp4", h_scale=f32(1)),
        ValueError,
        r'h_scale: expected None for quant_activations="mxfp4", whose scales are of each 32 '
        r"columns; leave it out",
    ),
    "scale of activations that have none": (
        quantised("fp8_channel", x_scale=f32(1)),
        ValueError,
        r'x_scale: expected None for quant_activations="none"; name what it scales',
    ),
    "scale of activations of another type": (
        quantised("fp8_channel", quant_activations="fp8", h_scale=np.ones(1, np.int32)),
        TypeError,
        r"h_scale: expected dtype f32, got i32; .*",
    ),
    "scale of activations per expert": (
        quantised("fp8_channel", quant_activations="fp8", h_scale=f32(E)),
        ValueError,
        r"h_scale: expected shape \(1,\), one scale for all rows, got \(4,\); pass the largest, "
        r"or None for a scale per row",
    ),
    "packed rows too short": (
        quantised("mxfp4", w13=np.zeros((E, 2 * N, H // 2 - 1), np.uint8)),
        ValueError,
        r"w13: expected shape \(4, 16, at least 12\) for the width of hidden_states, got .*",
    ),
    "n_inter of packed columns": (
        quantised("mxfp4", n_inter=N + 1),
        ValueError,
        r"n_inter: expected at most n_inter_pad=8, the last dimension of w2 in elements, got 9",
    ),
    "packed w2 too wide": (
        quantised("mxfp4", w2=np.zeros((E, H, N), np.uint8), activation="gelu_tanh"),
        ValueError,
        r'activation: "gelu_tanh" multiplies gate by up and needs a w13 of 2\*n_inter_pad rows, '
        r"got 16 rows for n_inter_pad=16; .*",
    ),
    "packed w2 too wide by half": (
        quantised("mxfp4", w2=np.zeros((E, H, N - 2), np.uint8)),
        ValueError,
        r"w13: expected shape \(4, 24, 12\) for n_inter_pad=12, got \(4, 16, 12\); pass "
        r"w2\[:, :, :4\] with n_inter=8, or load with moepad\.load_experts",
    ),
    "scale strided": (
        quantised("fp8_channel", w13_scale=f32(E, 4 * N)[:, ::2]),
        ValueError,
        r"w13_scale: expected a contiguous last dimension, got a stride of 8 bytes .*",
    ),
    # No kernel.
    "layout": (
        {"layout": "shuffled"},
        moepad.UnsupportedError,
        r"layout: no kernel for .*; considered: the CPU engine and the GPU engine .*; pass w13 .*",
    ),
    "metal": (
        {"w13": Device(8)},
        moepad.UnsupportedError,
        r"w13: no engine for DLPack device type 8, device 1; considered: the CPU engine \(needs "
        r"host memory\), the GPU engine \(types 2 and 10, CUDA and ROCm\); move the tensors to the "
        r"CPU",
    ),
    "oneapi": (
        {"hidden_states": Device(14)},
        moepad.UnsupportedError,
        r"hidden_states: .* type 14.*",
    ),
    # Expert ids, known only when they are read.
    "id large": ({"topk_ids": ids(4)}, ValueError, r"topk_ids.* 4.*"),
    "id negative": ({"topk_ids": ids(-2)}, ValueError, r"topk_ids.* -2.*"),
    "id huge": ({"topk_ids": ids(2**40)}, ValueError, r"topk_ids.* 1099511627776.*"),
    "id beyond map": (
        {"topk_ids": ids(3), "expert_map": np.zeros(3, np.int32)},
        ValueError,
        r"topk_ids.* 3.*",
    ),
    "map large": (
        {"expert_map": np.array([9, 0, 0, 0])},
        ValueError,
        r"expert_map.* 9.*",
    ),
    # The workspace.
    "workspace list": ({"workspace": [0]}, TypeError, r"workspace: expected a tensor .*, got list"),
    "workspace small": (
        {"workspace": aligned_bytes(63)},
        ValueError,
        r"workspace: expected at least \d+ bytes, got 63; moepad\.workspace_nbytes says .*",
    ),
    "workspace misaligned": (
        {"workspace": aligned_bytes(1 << 20, 8)},
        ValueError,
        r"workspace: expected an address aligned to 64 bytes, got 0x[0-9a-f]+; slice a larger one",
    ),
    "workspace gaps": (
        {"workspace": aligned_bytes(1 << 20)[::2]},
        ValueError,
        r"workspace: expected contiguous memory, got shape \(524288,\) with gaps",
    ),
    "workspace read-only": (
        {"workspace": bytes(1 << 20)},
        ValueError,
        r"workspace: expected writable memory, got a read-only array; pass a copy",
    ),
}


QUANTS = ["fp8_tensor", "fp8_channel", "fp8_block", "mxfp8", "mxfp4", "int8_channel", "int4_group"]


@pytest.mark.parametrize("quant", QUANTS)
def test_what_the_quantised_rows_change_is_right(quant: str) -> None:
    moepad.fused_moe(**{**right(), **quantised(quant)})


@pytest.mark.parametrize("name", WRONG)
def test_fused_moe(name: str) -> None:
    change, exception, pattern = WRONG[name]
    out = np.full((M, H), SENTINEL, np.float32)
    with pytest.raises(exception) as caught:
        moepad.fused_moe(**{**right(), "out": out, **change})
    assert type(caught.value) is exception
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)
    assert (out == SENTINEL).all()


LATE = ("id ", "map ", "out ", "workspace ")  # not looked at for the size of the workspace


@pytest.mark.parametrize("name", WRONG)
def test_workspace_nbytes(name: str) -> None:
    change, exception, pattern = WRONG[name]
    arguments = {**right(), **change}
    if name.startswith(LATE):
        assert moepad.workspace_nbytes(**arguments) >= 0
        return
    with pytest.raises(exception) as caught:
        moepad.workspace_nbytes(**arguments)
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


def shared(build: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A call whose tensors are cut by `build` out of one buffer."""
    return {**right(), **build(aligned_bytes(1 << 20).view(np.float32))}


OVERLAPS: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "w13": (
        lambda b: {"w13": b[: E * 2 * N * H].reshape(E, 2 * N, H), "out": b[: M * H].reshape(M, H)},
        r"out: shares memory with w13; pass another array",
    ),
    "topk_weights": (
        lambda b: {"topk_weights": b[: M * K].reshape(M, K), "out": b[9 : 9 + M * H].reshape(M, H)},
        r"out: shares memory with topk_weights; .*",
    ),
    "hidden, shifted": (
        lambda b: {
            "hidden_states": b[: M * H].reshape(M, H),
            "out": b[H : H + M * H].reshape(M, H),
        },
        r"out: shares memory with hidden_states, without being the same rows; pass another array",
    ),
    "hidden, other stride": (
        lambda b: {
            "hidden_states": b[: M * H].reshape(M, H),
            "out": b[: 2 * M * H].reshape(M, 2 * H)[:, :H],
        },
        r"out: shares memory with hidden_states, without being the same rows; .*",
    ),
    "workspace and out": (
        lambda b: {"out": b[: M * H].reshape(M, H), "workspace": b},
        r"workspace: shares memory with out; pass another array",
    ),
    "workspace and w2": (
        lambda b: {"w2": b[-E * H * N :].reshape(E, H, N), "workspace": b},
        r"workspace: shares memory with w2; .*",
    ),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_overlap(name: str) -> None:
    build, pattern = OVERLAPS[name]
    with pytest.raises(ValueError) as caught:
        moepad.fused_moe(**shared(build))
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


APART: dict[str, Callable[[Any], dict[str, Any]]] = {
    "columns of one buffer": lambda b: {
        "hidden_states": b[: M * 64].reshape(M, 64)[:, :H],
        "out": b[: M * 64].reshape(M, 64)[:, H : 2 * H],
        "topk_weights": b[: M * 64].reshape(M, 64)[:, 2 * H : 2 * H + K],
    },
    "neighbours": lambda b: {
        "hidden_states": b[: M * H].reshape(M, H),
        "out": b[M * H : 2 * M * H].reshape(M, H),
    },
    "the same rows": lambda b: {
        "hidden_states": b[: M * 64].reshape(M, 64)[:, :H],
        "out": b[: M * 64].reshape(M, 64)[:, :H],
    },
}


@pytest.mark.parametrize("name", APART)
def test_no_overlap(name: str) -> None:
    """What lies close together without sharing a byte is accepted, and the result is right."""
    arguments = shared(APART[name])
    for key in ("hidden_states", "topk_weights"):
        arguments[key][...] = 0.5
    expected = moepad.fused_moe(**right())
    assert moepad.fused_moe(**arguments) is arguments["out"]
    np.testing.assert_array_equal(arguments["out"], expected)


CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "too many": (
        lambda: moepad.fused_moe(*right().values(), 8),  # type: ignore[misc]
        TypeError,
        r"fused_moe: expected at most 5 positional arguments, got 6; pass the others by name",
    ),
    "missing": (
        lambda: moepad.fused_moe(f32(M, H), w2=f32(E, H, N)),  # type: ignore[call-arg]
        TypeError,
        r"fused_moe: missing argument 'w13'",
    ),
    "unknown": (
        lambda: moepad.fused_moe(**right(), n_intre=8),  # type: ignore[call-arg]
        TypeError,
        r"fused_moe: has no argument 'n_intre'; help\(moepad\.fused_moe\) lists them",
    ),
    "twice": (
        lambda: moepad.fused_moe(f32(M, H), **right()),  # type: ignore[misc]
        TypeError,
        r"hidden_states: given twice, by position and by name",
    ),
    "time without repeat": (
        lambda: _core.time_fused_moe(),  # type: ignore[call-arg]
        TypeError,
        r"time_fused_moe: missing argument 'repeat', the first by position",
    ),
    "time negative": (
        lambda: _core.time_fused_moe(-1, **right()),
        ValueError,
        r"repeat: expected an integer of at least 0, got -1",
    ),
    "time bad id": (
        lambda: _core.time_fused_moe(2, **{**right(), "topk_ids": ids(7)}),
        ValueError,
        r"topk_ids.* 7.*",
    ),
    "sizes float": (
        lambda: moepad.get_moe_weight_sizes(192.0, True, False, True),  # type: ignore[arg-type]
        TypeError,
        r"inter_dim: expected an integer, got float",
    ),
    "sizes str": (
        lambda: moepad.get_moe_weight_sizes("192", True, False, True),  # type: ignore[arg-type]
        TypeError,
        r"inter_dim: expected an integer, got str",
    ),
    "sizes negative": (
        lambda: moepad.get_moe_weight_sizes(-192, True, False, True),
        ValueError,
        r"inter_dim: expected an integer of at least 0, got a negative one",
    ),
    "sizes very negative": (
        lambda: moepad.get_moe_weight_sizes(-(2**80), True, False, True),
        ValueError,
        r"inter_dim: expected an integer of at least 0, got a negative one",
    ),
    "sizes missing": (
        lambda: moepad.get_moe_weight_sizes(192, True, False),  # type: ignore[call-arg]
        TypeError,
        r"get_moe_weight_sizes: missing argument 'is_aiter_moe'",
    ),
    "padding missing": (
        lambda: moepad.get_moe_padding_size(),  # type: ignore[call-arg]
        TypeError,
        r"get_moe_padding_size: missing argument 'is_aiter_moe'",
    ),
    "copy shape": (
        lambda: _core.copy(f32(2, 3), f32(3, 2)),
        ValueError,
        r"src: expected shape \(2, 3\), that of dst, got \(3, 2\)",
    ),
    "copy size": (
        lambda: _core.copy(f32(2, 3), np.zeros((2, 3))),
        TypeError,
        r"src: expected elements of 4 bytes like dst's f32, got float64 of 8",
    ),
    "copy complex": (
        lambda: _core.copy(np.zeros(2, np.complex128), np.zeros(2, np.complex128)),
        TypeError,
        r"dst: expected elements of 1, 2, 4 or 8 bytes, got complex128 of 16",
    ),
    "copy objects": (
        lambda: _core.copy(np.zeros(2), np.array([None, None])),
        TypeError,
        r"src: expected numbers, got an array of Python objects",
    ),
    "copy 5d": (
        lambda: _core.copy(f32(1, 1, 1, 1, 1), f32(1, 1, 1, 1, 1)),
        ValueError,
        r"dst: expected at most 4 dimensions, got shape \(1, 1, 1, 1, \.\.\.\)",
    ),
    "copy read-only": (
        lambda: _core.copy(read_only(f32(2)), f32(2)),
        ValueError,
        r"dst: expected writable memory, got a read-only array; pass a copy",
    ),
    "copy broadcast": (
        lambda: _core.copy(np.lib.stride_tricks.as_strided(f32(1), (3,), (0,)), f32(3)),
        ValueError,
        r"dst: expected each element in a place of its own, got a broadcast view",
    ),
    "copy overlap": (
        lambda: (lambda b: _core.copy(b[1:], b[:-1]))(f32(9)),
        ValueError,
        r"src: shares memory with dst; pass a copy",
    ),
    "threads negative": (
        lambda: moepad.set_num_threads(-1),
        ValueError,
        r"n: expected an integer of at least 0, got -1",
    ),
    "threads many": (
        lambda: moepad.set_num_threads(100_000),
        ValueError,
        r"n: expected at most \d+ threads, got 100000",
    ),
    "threads float": (
        lambda: moepad.set_num_threads(2.0),  # type: ignore[arg-type]
        TypeError,
        r"n: expected an integer, got float",
    ),
    "isa unknown": (lambda: moepad.set_cpu_isa("sse9"), ValueError, r"name: .*'sse9'.*portable"),
    "isa int": (
        lambda: moepad.set_cpu_isa(2),  # type: ignore[arg-type]
        TypeError,
        r"name: expected None or a name \(str\), got int",
    ),
    "bandwidth empty": (
        lambda: _core.read_bandwidth(f32(0)),
        ValueError,
        r"array: expected a contiguous array of at most 4 dimensions that is not empty",
    ),
    "bandwidth strided": (
        lambda: _core.read_bandwidth(f32(8)[::2]),
        ValueError,
        r"array: expected a contiguous array .*",
    ),
    "flops dtype": (
        lambda: _core.peak_flops("i8", 0.01),
        ValueError,
        r'dtype: expected "f32", "bf16" or "f16", got "i8"',
    ),
    "flops seconds": (
        lambda: _core.peak_flops("f32", 0),
        ValueError,
        r"seconds: expected more than 0, at most 60, got 0",
    ),
    "plan dtype": (
        lambda: moepad.plan(64, 64, 4, dtype="bfloat16"),
        ValueError,
        r'dtype: expected "f32", "bf16", .* or "i64", got "bfloat16"',
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str) -> None:
    call, exception, pattern = CALLS[name]
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    assert re.fullmatch(pattern, str(caught.value), flags=re.DOTALL), str(caught.value)


def test_exceptions() -> None:
    """Each is what its base says it is, lives in `moepad` and survives another process."""
    bases = {
        moepad.UnsupportedError: NotImplementedError,
        moepad.DeviceError: RuntimeError,
        moepad.CheckpointError: ValueError,
    }
    for exception, base in bases.items():
        assert exception.__mro__[1] is base and exception.__module__ == "moepad"
        assert exception.__doc__
        copy = pickle.loads(pickle.dumps(exception("text")))
        assert type(copy) is exception and str(copy) == "text"


@pytest.mark.parametrize("problem", [KeyboardInterrupt, MemoryError, SystemExit])
def test_no_fault_of_the_argument_passes_through(problem: type[BaseException]) -> None:
    class Interrupted:
        def __dlpack__(self, **options: Any) -> Any:
            raise problem("stop")

    with pytest.raises(problem, match="stop"):
        moepad.fused_moe(**{**right(), "w2": Interrupted()})


def test_every_public_function_is_documented() -> None:
    for name in moepad.__all__:
        item = getattr(moepad, name)
        if callable(item) and not isinstance(item, type):
            text = item.__doc__ or ""
            assert len(text.splitlines()[0]) > 20, name
            if item.__name__ not in ("cpu_isas", "get_num_threads"):
                assert "Raises\n" in text, name
