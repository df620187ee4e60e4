"""The specification of quantised weights: every code of every format, and which scale is whose."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import moepad
import numpy as np
import pytest
from moepad import reference
from moepad.testing import quantise
from numpy.typing import NDArray

Array = NDArray[Any]

BYTES = np.arange(256, dtype=np.uint8)
FP8 = {
    "f8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "f8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "f8_e5m2": ml_dtypes.float8_e5m2,
}
# Every kind with each dtype its weights may have, and a block.
KINDS: list[tuple[str, str, tuple[int, int]]] = [
    *(
        (f"fp8_{scale}", dtype, (32, 64))
        for scale in ("tensor", "channel", "block")
        for dtype in FP8
    ),
    ("fp8_block", "f8_e4m3fn", (64, 32)),
    ("mxfp8", "f8_e4m3fn", (128, 128)),
    ("mxfp4", "f8_e4m3fn", (128, 128)),
    ("int8_channel", "f8_e4m3fn", (128, 128)),
    *(("int4_group", "f8_e4m3fn", (1, group)) for group in (32, 64, 128)),
]


def values_of(stored: Array, quant: str) -> Array:
    """256 stored elements as numbers, through scales of one; one row of w13 each."""
    n_pack = 2 if quant in ("mxfp4", "int4_group") else 1
    one: Any = np.uint8(127) if quant == "mxfp4" else np.float32(1)
    w2 = np.zeros((1, n_pack, 256 // n_pack), stored.dtype)
    w13_scale, w2_scale = np.full((1, 256, 1), one), np.full((1, n_pack, 8), one)
    if quant.endswith("channel"):
        w2_scale = w2_scale[:, :, 0]
    w13, _ = reference.dequantise(
        stored.reshape(1, 256, 1), w2, w13_scale, w2_scale, quant=quant, block=(1, 32)
    )
    return w13.reshape(-1)


@pytest.mark.parametrize("dtype", FP8)
def test_every_float8(dtype: str) -> None:
    stored = BYTES.view(FP8[dtype])
    np.testing.assert_array_equal(values_of(stored, "fp8_channel"), stored.astype(np.float64))


def test_every_pair_of_e2m1() -> None:
    nibbles = np.stack([BYTES & 15, BYTES >> 4], axis=-1).reshape(-1)
    expected = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    np.testing.assert_array_equal(values_of(BYTES, "mxfp4"), expected)


def test_every_pair_of_int4() -> None:
    expected = np.array([(byte >> shift & 15) - 8.0 for byte in range(256) for shift in (0, 4)])
    np.testing.assert_array_equal(values_of(BYTES, "int4_group"), expected)


def test_every_int8() -> None:
    stored = BYTES.view(np.int8)
    np.testing.assert_array_equal(values_of(stored, "int8_channel"), stored.astype(np.float64))


@pytest.mark.parametrize("is_typed", [False, True])
def test_every_e8m0(is_typed: bool) -> None:
    scale = BYTES.view(ml_dtypes.float8_e8m0fnu)
    one = np.ones((1, 256, 32), ml_dtypes.float8_e4m3fn)
    given = (scale if is_typed else BYTES).reshape(1, 256, 1)
    w13, _ = reference.dequantise(one, np.ones((1, 32, 256), one.dtype), given,
                                  np.full((1, 32, 8), 127, np.uint8), quant="mxfp8")  # fmt: skip
    np.testing.assert_array_equal(w13[0, :, 0], scale.astype(np.float64))


class Layer:
    """Random weights, quantised, and the number each is by one Python expression per element."""

    def __init__(
        self, quant: str, dtype: str, block: tuple[int, int], phase: int, *, is_gated: bool
    ) -> None:
        n_expert, n_inter, n_hidden = 2, 108, 70
        rng = np.random.default_rng(1)
        n_half = 2 if is_gated else 1
        w13 = rng.standard_normal((n_expert, n_half * n_inter, n_hidden), np.float32)
        w2 = rng.standard_normal((n_expert, n_hidden, n_inter), np.float32)
        self.real = (w13, w2)
        common: dict[str, Any] = {"dtype": dtype, "block": block, "scale_dtype": "f32"}
        self.w13, self.w13_scale = quantise(w13, quant, n_half=n_half, row_phase=phase, **common)
        self.w2, self.w2_scale = quantise(w2, quant, column_phase=phase, **common)
        self.options: dict[str, Any] = {"quant": quant, "block": block, "scale_phase": phase}
        self.quant, self.block, self.phase = quant, block, phase
        self.n_inter, self.n_half = n_inter, n_half

    def dequantised(self) -> tuple[Array, Array]:
        return reference.dequantise(
            self.w13, self.w2, self.w13_scale, self.w2_scale, **self.options
        )

    def scale_at(self, name: str, e: int, r: int, k: int) -> float:
        scale = (self.w13_scale if name == "w13" else self.w2_scale)[e]
        half, row = (r // self.n_inter, r % self.n_inter) if name == "w13" else (0, r)
        if self.quant == "fp8_tensor":
            return float(scale[half] if scale.ndim else scale)
        if self.quant in ("fp8_channel", "int8_channel"):
            return float(scale[r])
        if self.quant != "fp8_block":
            group = self.block[1] if self.quant == "int4_group" else 32
            value = scale[r, k // group]
            return 2.0 ** (int(value) - 127) if self.quant != "int4_group" else float(value)
        n_block = len(scale) // self.n_half
        if name == "w13":
            return float(scale[half * n_block + (row + self.phase) // self.block[0],
                               k // self.block[1]])  # fmt: skip
        return float(scale[r // self.block[0], (k + self.phase) // self.block[1]])


LAYERS = pytest.mark.parametrize(
    ("quant", "dtype", "block", "phase"),
    [
        (*kind, phase)
        for kind in KINDS
        for phase in ((0, 32, 44) if kind[0] == "fp8_block" else (0,))
    ],
)


@pytest.mark.parametrize("is_gated", [True, False])
@LAYERS
def test_equals_number_by_number(
    quant: str, dtype: str, block: tuple[int, int], phase: int, is_gated: bool
) -> None:
    layer = Layer(quant, dtype, block, phase, is_gated=is_gated)
    n_pack = 2 if quant in ("mxfp4", "int4_group") else 1
    for name, stored, numbers in zip(
        ("w13", "w2"), (layer.w13, layer.w2), layer.dequantised(), strict=True
    ):
        for e, r in itertools.product(range(2), range(0, stored.shape[1], 5)):
            for k in range(stored.shape[2] * n_pack):
                value = stored[e, r, k // n_pack]
                if quant == "mxfp4":
                    code = np.uint8(value >> 4 * (k % 2) & 15)
                    value = code.view(ml_dtypes.float4_e2m1fn)
                elif quant == "int4_group":
                    value = int(value >> 4 * (k % 2) & 15) - 8
                assert numbers[e, r, k] == float(value) * layer.scale_at(name, e, r, k)


@LAYERS
def test_shapes_are_those_of_the_plan(
    quant: str, dtype: str, block: tuple[int, int], phase: int
) -> None:
    layer = Layer(quant, dtype, block, 0, is_gated=True)
    plan = moepad.plan(70, 108, 2, quant=quant, block=block,
                       dtype=dtype if quant.startswith("fp8") else "f32")  # fmt: skip
    assert layer.w13.shape == plan.w13_shape and layer.w2.shape == plan.w2_shape
    assert layer.w13_scale.shape == plan.w13_scale_shape
    assert layer.w2_scale.shape == plan.w2_scale_shape


@LAYERS
def test_quantised_is_near(quant: str, dtype: str, block: tuple[int, int], phase: int) -> None:
    """Half a step of the format at the largest weight of a group, at most."""
    step = {"f8_e4m3fn": 32, "f8_e4m3fnuz": 16, "f8_e5m2": 8192}[dtype]
    full = {"f8_e4m3fn": 448, "f8_e4m3fnuz": 240, "f8_e5m2": 57344}[dtype]
    bound = {"mxfp4": 2 / 2 / 6 * 2, "mxfp8": 2 * 16 / 448, "int8_channel": 0.5 / 127,
             "int4_group": 0.5 / 7}.get(quant, step / 2 / full)  # fmt: skip
    layer = Layer(quant, dtype, block, phase, is_gated=True)
    for real, numbers in zip(layer.real, layer.dequantised(), strict=True):
        assert np.abs(real - numbers).max() <= bound * np.abs(real).max() * 1.001
        assert np.abs(real - numbers).max() > 0


@pytest.mark.parametrize("gate_up", ["concat", "interleaved"])
@LAYERS
def test_pads_are_nan_and_change_nothing(
    quant: str, dtype: str, block: tuple[int, int], phase: int, gate_up: Any
) -> None:
    layer = Layer(quant, dtype, block, phase, is_gated=True)
    if gate_up == "interleaved":
        if quant == "fp8_block":
            with pytest.raises(ValueError, match="gate_up"):
                reference.dequantise(layer.w13, layer.w2, layer.w13_scale, layer.w2_scale,
                                     gate_up=gate_up, **layer.options)  # fmt: skip
            return
        order = np.arange(2 * layer.n_inter).reshape(2, -1).T.reshape(-1)
        layer.w13 = layer.w13[:, order]
        if quant != "fp8_tensor":
            layer.w13_scale = layer.w13_scale[:, order]
    whole = reference.dequantise(
        layer.w13, layer.w2, layer.w13_scale, layer.w2_scale, gate_up=gate_up, **layer.options
    )
    n_inter, n_hidden = 75, 65
    cut = reference.dequantise(
        layer.w13, layer.w2, layer.w13_scale, layer.w2_scale, gate_up=gate_up, n_inter=n_inter,
        n_hidden=n_hidden, **layer.options,
    )  # fmt: skip
    for half, real in zip(
        reference.split_gate_up(cut[0], n_inter, gate_up),
        reference.split_gate_up(whole[0], n_inter, gate_up),
        strict=True,
    ):
        np.testing.assert_array_equal(half[:, :, :n_hidden], real[:, :, :n_hidden])
        assert np.isfinite(half[:, :, :n_hidden]).all() and np.isnan(half[:, :, n_hidden:]).all()
    np.testing.assert_array_equal(cut[1][:, :n_hidden, :n_inter], whole[1][:, :n_hidden, :n_inter])
    for numbers, n_number in ((cut[0], 2 * n_inter * n_hidden), (cut[1], n_inter * n_hidden)):
        assert np.count_nonzero(~np.isnan(numbers)) == 2 * n_number


@pytest.mark.parametrize("kind", ["fused_moe", "naive"])
@LAYERS
def test_a_call_uses_them(
    quant: str, dtype: str, block: tuple[int, int], phase: int, kind: str
) -> None:
    layer = Layer(quant, dtype, block, phase, is_gated=True)
    x = np.random.default_rng(2).standard_normal((3, 70), np.float32)
    routing = np.full((3, 1), 0.5, np.float32), np.array([[0], [1], [0]])
    function = getattr(reference, kind)
    numbers = [values.astype(np.float32) for values in layer.dequantised()]
    expected = function(x, *numbers, *routing)
    scales = {"w13_scale": layer.w13_scale, "w2_scale": layer.w2_scale}
    result = function(x, layer.w13, layer.w2, *routing, **layer.options, **scales)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_a_foreign_dtype_is_an_error() -> None:
    layer = Layer("fp8_channel", "f8_e4m3fn", (128, 128), 0, is_gated=True)
    with pytest.raises(TypeError, match="uint8"):
        reference.dequantise(layer.w13.view(np.uint8), layer.w2, layer.w13_scale, layer.w2_scale,
                             quant="fp8_channel")  # fmt: skip


def test_scales_are_not_forgotten() -> None:
    layer = Layer("fp8_channel", "f8_e4m3fn", (128, 128), 0, is_gated=True)
    x, ids = np.ones((1, 70), np.float32), np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match="w13_scale"):
        reference.fused_moe(x, layer.w13, layer.w2, x[:, :1], ids, quant="fp8_channel")
