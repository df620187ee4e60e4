"""The specification: what the fused MoE computes, in NumPy, for reading and for comparing with.

`dequantise` says what number each stored weight of each kind of quantisation is.
`fused_moe` computes in float64 on the stored values, so its result is the right one for every
purpose here. `naive` runs the same body as a plain framework loop would in the activations' own
precision, rounding after every step: how far it lies from `fused_moe` sets the tolerance of
`moepad.testing.check_close`. Needs NumPy only, and must never be changed to make a test pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ACTIVATIONS",
    "FLOAT_FORMATS",
    "UNGATED",
    "dequantise",
    "fused_moe",
    "naive",
    "split_gate_up",
]

Array = NDArray[Any]

_erf_each: Callable[[Array], Array] = np.vectorize(math.erf, otypes=[np.float64])


def _erf(x: Array) -> Array:
    return _erf_each(x).astype(x.dtype)


def _sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-x))
    return result


# name: act(x, alpha). A gated layer multiplies act(gate) by up, "swigluoai" by up + 1.
ACTIVATIONS: dict[str, Callable[[Array, float], Array]] = {
    "silu": lambda x, alpha: x * _sigmoid(x),
    "gelu": lambda x, alpha: x * (1 + _erf(x * math.sqrt(0.5))) / 2,
    "gelu_tanh": lambda x, alpha: (
        x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) / 2
    ),
    "swigluoai": lambda x, alpha: x * _sigmoid(alpha * x),
    "relu2": lambda x, alpha: np.maximum(x, 0) ** 2,
}
UNGATED = ("silu", "gelu", "relu2")  # what a w13 without gate rows may use


class _Arithmetic(NamedTuple):
    """How `_layer` computes: element type, matrix product, and rounding after each step."""

    dtype: Any
    product: Callable[[Array, Array], Array]  # [m, k], [n, k] -> [m, n]
    rounded: Callable[[Array], Array]


_EXACT = _Arithmetic(np.float64, lambda x, w: x @ w.T, lambda x: x)


def _sum_in_order(x: Array, w: Array) -> Array:
    """x @ w.T as one float32 sum over k per element, in order, as a loop over k computes it."""
    total = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for x_k, w_k in zip(np.ascontiguousarray(x.T), np.ascontiguousarray(w.T), strict=True):
        total += x_k[:, None] * w_k
    return total


def _sum_in_parts(x: Array, w: Array, n_part: int) -> Array:
    """The same sums as `n_part` sums over as many ranges of k, added one after the other."""
    total = np.zeros((x.shape[0], w.shape[0]), np.float32)
    borders = np.linspace(0, x.shape[1], n_part + 1).astype(int)
    for start, stop in itertools.pairwise(borders):
        total += x[:, start:stop] @ w[:, start:stop].T
    return total


def _framework(dtype: np.dtype[Any], n_part: int) -> _Arithmetic:
    """A framework's loop: float32 sums, each step's result rounded to `dtype`."""

    def product(x: Array, w: Array) -> Array:
        if n_part:
            return _sum_in_parts(x, w, n_part)
        # In 16 bits the rounding of each product hides the order of its sum: take the fast one.
        return _sum_in_order(x, w) if dtype == np.float32 else x @ w.T

    def rounded(x: Array) -> Array:
        return x.astype(dtype).astype(np.float32)

    return _Arithmetic(np.float32, product, rounded)


def split_gate_up(
    rows: Array, n_inter: int, gate_up: Literal["concat", "interleaved"] = "concat"
) -> tuple[Array, Array]:
    """The gate rows and the up rows of a gated w13 or w13 bias, as views without pads.

    Parameters
    ----------
    rows : array, [E, 2*Ip, ...]
        "concat": gate in [0, I), up in [Ip, Ip + I). "interleaved": gate 0, up 0, gate 1, ...
    n_inter : int
        I, the logical intermediate size.
    gate_up : "concat" or "interleaved"

    Returns
    -------
    (array, array), each [E, I, ...]
    """
    if gate_up == "interleaved":
        return rows[:, 0 : 2 * n_inter : 2], rows[:, 1 : 2 * n_inter : 2]
    n_inter_pad = rows.shape[1] // 2
    return rows[:, :n_inter], rows[:, n_inter_pad : n_inter_pad + n_inter]


class FloatFormat(NamedTuple):
    """A floating-point format of few bits: sign, exponent, mantissa, from the highest bit down.

    Attributes
    ----------
    n_bit, n_mantissa, bias : int
    infinity : int or None
        Code of plus infinity; None where the format has none.
    nan : range
        Codes without sign that are NaN, or, with `is_nan_signed` False, the codes that are.
    is_nan_signed : bool
    """

    n_bit: int
    n_mantissa: int
    bias: int
    infinity: int | None
    nan: range
    is_nan_signed: bool = True

    def values(self) -> NDArray[np.float64]:
        """The number each code stands for, by code."""
        code = np.arange(1 << self.n_bit)
        magnitude = code & ((1 << (self.n_bit - 1)) - 1)
        exponent, mantissa = magnitude >> self.n_mantissa, magnitude % (1 << self.n_mantissa)
        fraction = mantissa / (1 << self.n_mantissa) + (exponent > 0)
        value: NDArray[np.float64] = np.ldexp(fraction, np.maximum(exponent, 1) - self.bias)
        if self.infinity is not None:
            value[magnitude == self.infinity] = np.inf
        value = np.where(code == magnitude, value, -value)
        value[np.isin(magnitude if self.is_nan_signed else code, self.nan)] = np.nan
        return value


# By NumPy's name of the dtype; "float4_e2m1fn" is stored two to a byte.
FLOAT_FORMATS = {
    "float8_e4m3fn": FloatFormat(8, 3, 7, None, range(0x7F, 0x80)),
    "float8_e4m3fnuz": FloatFormat(8, 3, 8, None, range(0x80, 0x81), is_nan_signed=False),
    "float8_e5m2": FloatFormat(8, 2, 15, 0x7C, range(0x7D, 0x80)),
    "float4_e2m1fn": FloatFormat(4, 1, 1, None, range(0)),
}
_FP8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")


class _Input(NamedTuple):
    """What x and h are rounded to before a product, and which of a row's columns share a scale."""

    code: FloatFormat | None  # None: int8
    group: int  # columns; 0: the whole row
    phase: int = 0  # how far inside its group column 0 lies
    is_mx: bool = False  # scales are powers of two, e8m0

    def rounded(self, x: Array, scale: Array | None) -> NDArray[np.float64]:
        """`x` as code times scale. All but that last product is float32 arithmetic."""
        x = x.astype(np.float32)
        if scale is not None:
            return self._coded(x, np.asarray(scale, np.float32).reshape(()))
        group = (self.phase + np.arange(x.shape[1])) // (self.group or max(x.shape[1], 1))
        result = np.zeros(x.shape)
        for g in np.unique(group):
            columns = x[:, group == g]
            scale = self._scale(np.abs(columns).max(axis=1, keepdims=True))
            result[:, group == g] = self._coded(columns, scale)
        return result

    def _scale(self, amax: Array) -> Array:
        """The scale of columns whose largest magnitude is `amax`.

        It is `amax` over the format's largest value, or 1 where that is 0. Of OCP MX it is the
        power of two of `amax`, rounded to the format's mantissa, half up, over that of the largest
        value, within e8m0; `amax` of 2**128, which rounding may give, counts as what is below.
        """
        if not self.is_mx:
            scale = amax / np.float32(self._largest())
            return np.where(scale == 0, 1, scale)
        assert self.code is not None
        fraction, exponent = np.frexp(amax)
        exponent = np.minimum(exponent + (fraction >= 1 - 2.0 ** -(self.code.n_mantissa + 2)), 128)
        exponent = np.maximum(exponent - np.frexp(self._largest())[1], -127)
        return np.where(np.isfinite(amax), np.ldexp(np.float32(1), exponent), np.nan)

    def _largest(self) -> float:
        if self.code is None:
            return 127
        value = self.code.values()
        return float(value[np.isfinite(value)].max())

    def _coded(self, x: Array, scale: Array) -> NDArray[np.float64]:
        ratio = np.clip(x / scale.astype(np.float32), -self._largest(), self._largest())
        unit = np.ones(ratio.shape)
        if self.code is not None:
            exponent = np.frexp(ratio)[1] - 1
            unit = np.ldexp(1.0, np.maximum(exponent, 1 - self.code.bias) - self.code.n_mantissa)
        coded: NDArray[np.float64] = np.rint(ratio / unit) * unit * scale.astype(np.float64)
        return coded


def _inputs(
    quant_activations: str, quant: str, weights: Array, block: tuple[int, int], phase: int
) -> tuple[_Input, _Input] | None:
    """How x and h are rounded; None: not at all."""
    if quant_activations == "none":
        return None
    kinds = {
        "fp8": ("fp8_tensor", "fp8_channel", "fp8_block"),
        "int8": ("int8_channel",),
        "mxfp8": ("mxfp8", "mxfp4"),
        "mxfp4": ("mxfp4",),
    }
    if quant not in kinds[quant_activations]:
        raise ValueError(f"quant_activations: {quant_activations} with {quant}")
    if quant_activations.startswith("mx"):
        mx = "float8_e4m3fn" if quant_activations == "mxfp8" else "float4_e2m1fn"
        both = _Input(FLOAT_FORMATS[mx], 32, is_mx=True)
        return both, both
    is_fnuz = weights.dtype.name == "float8_e4m3fnuz"
    name = "float8_e4m3fnuz" if is_fnuz else "float8_e4m3fn"
    code = FLOAT_FORMATS[name] if quant_activations == "fp8" else None
    if quant != "fp8_block":
        return _Input(code, 0), _Input(code, 0)
    return _Input(code, block[1]), _Input(code, block[1], phase)


class _Kind(NamedTuple):
    """How a kind of quantisation stores weights, and which of them share a scale."""

    storage: tuple[str, ...]  # names of the dtypes w13 and w2 may have
    code: Literal["float8", "int8", "e2m1", "int4"]
    scale: Literal["tensor", "row", "block", "group"]
    group: int = 0  # columns that share a scale; 0: as the call's `block` says


_KINDS = {
    "fp8_tensor": _Kind(_FP8, "float8", "tensor"),
    "fp8_channel": _Kind(_FP8, "float8", "row"),
    "fp8_block": _Kind(_FP8, "float8", "block"),
    "mxfp8": _Kind(("float8_e4m3fn",), "float8", "group", 32),
    "mxfp4": _Kind(("uint8",), "e2m1", "group", 32),
    "int8_channel": _Kind(("int8",), "int8", "row"),
    "int4_group": _Kind(("uint8",), "int4", "group"),
}


def _n_pack(quant: str) -> int:
    """Elements of one stored element along a row."""
    return 2 if quant in _KINDS and _KINDS[quant].code in ("e2m1", "int4") else 1


def _stored_values(weights: Array, quant: str) -> NDArray[np.float64]:
    """The number each stored element is, before its scale; two per byte unpacked, low first."""
    kind = _KINDS[quant]
    if weights.dtype.name not in kind.storage:
        raise TypeError(f"{quant}: weights of dtype {kind.storage}, got {weights.dtype.name}")
    if kind.code == "int8":
        return weights.astype(np.float64)
    code = np.ascontiguousarray(weights).view(np.uint8)
    if kind.code == "float8":
        return FLOAT_FORMATS[weights.dtype.name].values()[code]
    nibble = np.stack([code & 15, code >> 4], axis=-1)
    nibble = nibble.reshape(*code.shape[:-1], 2 * code.shape[-1])
    if kind.code == "e2m1":
        return FLOAT_FORMATS["float4_e2m1fn"].values()[nibble]
    return nibble.astype(np.float64) - 8


def _scale_values(scale: Array) -> NDArray[np.float64]:
    """A scale as a number: bytes (uint8 or float8_e8m0fnu) are 2^(byte - 127), 255 is NaN."""
    if scale.dtype.itemsize > 1:
        return scale.astype(np.float64)
    exponent = np.ascontiguousarray(scale).view(np.uint8).astype(np.int64)
    return np.where(exponent == 255, np.nan, np.ldexp(1.0, exponent - 127))


def dequantise(
    w13: Array,
    w2: Array,
    w13_scale: Array,
    w2_scale: Array,
    *,
    quant: str,
    n_inter: int | None = None,
    n_hidden: int | None = None,
    gate_up: Literal["concat", "interleaved"] = "concat",
    block: tuple[int, int] = (128, 128),
    scale_phase: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Quantised weights as numbers: stored value times scale, exactly.

    Stored values: float8 of the array's own dtype; int8; or two 4-bit values per byte, even k in
    the low nibble, which are e2m1 ("mxfp4") or value + 8 ("int4_group"). Scales: float32, bfloat16
    or float16 numbers, or e8m0 bytes. With R the rows of w13, I and H the logical sizes, and
    bn, bk = `block`, shapes of the scales are at least:

    * fp8_tensor: [E] or [E, 2] (gate, up) for w13, [E] for w2;
    * fp8_channel, int8_channel: [E, R] and [E, H];
    * fp8_block: [E, 2*nb, up(H/bk)], or [E, nb, ...] if not gated, and [E, up(H/bn), ...].
      Row r of a half of w13 is in row (scale_phase + r) // bn of that half's nb, and column k of
      w2 in column (scale_phase + k) // bk;
    * mxfp8, mxfp4: [E, R, up(H/32)] and [E, H, up(I/32)];
    * int4_group: [E, R, up(H/bk)] and [E, H, up(I/bk)].

    Parameters
    ----------
    w13, w2 : array, [E, R, H_pad] and [E, H_pad, Ip], the last in stored elements
    w13_scale, w2_scale : array
        A last dimension of 1 may follow [E] and [E, R].
    quant : str
    n_inter, n_hidden : int, optional
        I and H in elements; default what the arrays have room for.
    gate_up : "concat" or "interleaved"
        Scales of rows lie as the rows do. fp8_block has "concat" only.
    block : (int, int)
    scale_phase : int

    Returns
    -------
    (array, array), float64, the shapes of w13 and w2 in elements
        Pads are NaN.
    """
    n_inter_pad = w2.shape[2] * _n_pack(quant)
    n_inter = n_inter_pad if n_inter is None else n_inter
    n_hidden = w13.shape[2] * _n_pack(quant) if n_hidden is None else n_hidden
    is_gated = w13.shape[1] == 2 * n_inter_pad
    if _KINDS[quant].scale != "block":
        scale_phase = 0
    elif is_gated and gate_up != "concat":
        raise ValueError(f"gate_up: {quant} has concatenated halves only, got {gate_up!r}")

    def halves(rows: Array) -> tuple[Array, ...]:
        return split_gate_up(rows, n_inter, gate_up) if is_gated else (rows[:, :n_inter],)

    values13, values2 = (_stored_values(weights, quant) for weights in (w13, w2))
    result13, result2 = (np.full(values.shape, np.nan) for values in (values13, values2))
    inter, hidden = np.arange(n_inter), np.arange(n_hidden)
    grids = _scale_grids(w13_scale, quant, 2 if is_gated else 1, halves)
    for target, value, grid in zip(halves(result13), halves(values13), grids, strict=True):
        each = _spread(grid, quant, block, scale_phase + inter, hidden)
        target[:, :, :n_hidden] = value[:, :, :n_hidden] * each
    (grid,) = _scale_grids(w2_scale, quant, 1, lambda rows: (rows,))
    each = _spread(grid, quant, block, hidden, scale_phase + inter)
    result2[:, :n_hidden, :n_inter] = values2[:, :n_hidden, :n_inter] * each
    return result13, result2


def _scale_grids(
    scale: Array, quant: str, n_half: int, halves: Callable[[Array], tuple[Array, ...]]
) -> tuple[Array, ...]:
    """The scales of each half, [E, rows of scales, columns of scales]."""
    value = _scale_values(scale)
    rule = _KINDS[quant].scale
    if rule == "tensor":
        each = np.broadcast_to(value.reshape(len(value), -1), (len(value), n_half))
        return tuple(each[:, half, None, None] for half in range(n_half))
    if rule == "block":
        return tuple(np.split(value, n_half, axis=1))
    return halves(value if value.ndim == 3 else value[:, :, None])


def _spread(
    grid: Array,
    quant: str,
    block: tuple[int, int],
    row: NDArray[np.int64],
    column: NDArray[np.int64],
) -> Array:
    """`grid` with one scale for each index in `row` and `column`, or of a size that broadcasts."""
    rule = _KINDS[quant].scale
    if rule in ("tensor", "row"):
        return grid[:, : len(row)]
    if rule == "group":
        return grid[:, : len(row), column // (_KINDS[quant].group or block[1])]
    return grid[:, row[:, None] // block[0], column // block[1]]


def _local_ids(topk_ids: Array, expert_map: Array | None) -> Array:
    """Expert of each slot among those held here; -1 where the slot is skipped."""
    if expert_map is None:
        return topk_ids
    return np.where(topk_ids < 0, -1, np.asarray(expert_map)[topk_ids])


def _layer(
    number: _Arithmetic,
    hidden_states: Array,
    w13: Array,
    w2: Array,
    topk_weights: Array,
    topk_ids: Array,
    *,
    n_inter: int | None = None,
    n_hidden: int | None = None,
    activation: str = "silu",
    gate_up: Literal["concat", "interleaved"] = "concat",
    quant: str = "none",
    w13_scale: Array | None = None,
    w2_scale: Array | None = None,
    block: tuple[int, int] = (128, 128),
    scale_phase: int = 0,
    quant_activations: str = "none",
    x_scale: Array | None = None,
    h_scale: Array | None = None,
    w13_bias: Array | None = None,
    w2_bias: Array | None = None,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float | None = None,
    expert_map: Array | None = None,
    n_token: int | Array | None = None,
    apply_router_weight_on_input: bool = False,
    routed_scaling_factor: float = 1.0,
) -> Array:
    n_inter_pad = w2.shape[2] * _n_pack(quant)
    n_inter = n_inter_pad if n_inter is None else n_inter
    n_hidden = hidden_states.shape[1] if n_hidden is None else n_hidden
    n_token = hidden_states.shape[0] if n_token is None else int(np.asarray(n_token).reshape(()))
    is_gated = w13.shape[1] == 2 * n_inter_pad
    if not is_gated and (w13.shape[1] != n_inter_pad or activation not in UNGATED):
        raise ValueError(
            f"w13: {w13.shape[1]} rows, {activation}, for a w2 of {n_inter_pad} columns"
        )
    act, rounded, product = ACTIVATIONS[activation], number.rounded, number.product

    def values(array: Array) -> Array:
        return np.asarray(array).astype(number.dtype)

    def weights_of(expert: int) -> tuple[Array, Array]:
        """w13 and w2 of one expert, in elements."""
        if quant == "none":
            return w13[expert], w2[expert]
        if w13_scale is None or w2_scale is None:
            raise ValueError(f"w13_scale, w2_scale: {quant} has both")
        one = slice(expert, expert + 1)
        both = dequantise(
            w13[one],
            w2[one],
            w13_scale[one],
            w2_scale[one],
            quant=quant,
            n_inter=n_inter,
            n_hidden=n_hidden,
            gate_up=gate_up,
            block=block,
            scale_phase=scale_phase,
        )
        return both[0][0], both[1][0]

    def first_product(x: Array, rows: Array, bias: Array | None, scale: Array | None) -> Array:
        result = rounded(product(x, values(rows)))
        if scale is not None:
            result = rounded(result * scale)
        return result if bias is None else rounded(result + values(bias))

    def activated(x: Array, rows: Array, expert: int, scale: Array | None) -> Array:
        if not is_gated:
            bias = None if w13_bias is None else w13_bias[expert, :n_inter]
            return rounded(act(first_product(x, rows[:n_inter, :n_hidden], bias, scale), 0))
        halves = split_gate_up(rows[None, :, :n_hidden], n_inter, gate_up)
        biases: tuple[Any, Any] = (None, None)
        if w13_bias is not None:
            biases = split_gate_up(w13_bias[expert : expert + 1], n_inter, gate_up)
        gate, up = (
            first_product(x, half[0], None if bias is None else bias[0], scale)
            for half, bias in zip(halves, biases, strict=True)
        )
        if swiglu_limit is not None:
            gate = np.minimum(gate, number.dtype(swiglu_limit))
            up = np.clip(up, number.dtype(-swiglu_limit), number.dtype(swiglu_limit))
        if activation == "swigluoai":
            up = rounded(up + 1)
        return rounded(rounded(act(gate, swiglu_alpha)) * up)

    inputs = _inputs(quant_activations, quant, w13, block, scale_phase)
    hidden = values(hidden_states[:n_token, :n_hidden])
    if inputs is not None:
        hidden = values(inputs[0].rounded(hidden, x_scale))
    weights = values(topk_weights[:n_token])
    local = _local_ids(np.asarray(topk_ids[:n_token]).astype(np.int64), expert_map)
    slots = np.zeros((*local.shape, n_hidden), number.dtype)
    for expert in np.unique(local[local >= 0]):
        token, slot = np.nonzero(local == expert)
        weight = weights[token, slot, None]
        on_input = weight if apply_router_weight_on_input else None
        w13_here, w2_here = weights_of(int(expert))
        h = activated(hidden[token], w13_here, expert, on_input)
        if inputs is not None:
            h = values(inputs[1].rounded(h, h_scale))
        result = rounded(product(h, values(w2_here[:n_hidden, :n_inter])))
        if w2_bias is not None:
            result = rounded(result + values(w2_bias[expert, :n_hidden]))
        slots[token, slot] = result if apply_router_weight_on_input else rounded(result * weight)

    out = np.zeros(hidden_states.shape, number.dtype)
    total = np.zeros((n_token, n_hidden), number.dtype)
    for j in range(local.shape[1]):
        total = rounded(total + slots[:, j])
    out[:n_token, :n_hidden] = rounded(total * number.dtype(routed_scaling_factor))
    return out


def fused_moe(
    hidden_states: Array,
    w13: Array,
    w2: Array,
    topk_weights: Array,
    topk_ids: Array,
    **options: Any,
) -> NDArray[np.float64]:
    """The fused MoE in float64: out[m] = s * sum_j weight[m, j] * (W2_e h + b2_e), e = ids[m, j].

    h = act(Wgate_e x + bgate_e) * (Wup_e x + bup_e), or act(W13_e x + b13_e) without a gate.
    The layer is gated when w13 has twice as many rows as w2 has columns. Takes the arguments of
    `moepad.fused_moe`, as NumPy arrays, and gives them the same meaning.

    Parameters
    ----------
    hidden_states : array, [M, H_pad]
    w13 : array, [E, 2*Ip, H_pad] or, not gated, [E, Ip, H_pad]
    w2 : array, [E, H_pad, Ip]
    topk_weights, topk_ids : array, [M, k]
        A slot whose id is -1, or is sent to -1 by `expert_map`, contributes nothing.
    n_inter, n_hidden : int, optional
        Logical sizes I and H; what lies beyond is pad and is not read.
    activation : "silu", "gelu", "gelu_tanh", "swigluoai" or "relu2"
    gate_up : "concat" or "interleaved"
        Where the rows of gate and up lie: see `split_gate_up`.
    quant, w13_scale, w2_scale, block, scale_phase
        Of quantised weights: see `dequantise`.
    quant_activations : "none", "fp8", "int8", "mxfp8" or "mxfp4"
        x and h are rounded before they are multiplied: to float8 e4m3 (fnuz with fnuz weights)
        with fp8_tensor, fp8_channel and fp8_block weights, to int8 with int8_channel. Of fp8_block
        the columns that share a column of scales of w13 or w2 have one scale, of others a row.
        "mxfp8", of mxfp8 and mxfp4 weights, and "mxfp4", of the latter, are e4m3fn and e2m1 codes
        with a power of two to each 32 columns.
    x_scale, h_scale : array of one, optional
        Fixed scales in their place; not of mxfp8 and mxfp4.
    w13_bias, w2_bias : array, [E, rows of w13] and [E, H_pad], optional
    swiglu_alpha, swiglu_limit : float, optional
        Before the activation of a gated layer, gate is clamped to at most the limit, up to
        [-limit, limit]. "swigluoai" is gate * sigmoid(alpha * gate) * (up + 1).
    expert_map : array of int, [E_global], optional
        Global to local expert id, -1 for an expert held elsewhere.
    n_token : int or array of one int, optional
        Rows from there on are not read, and are zero in the result.
    apply_router_weight_on_input : bool
        The routed weight multiplies W13 x, before the bias, instead of the slot's result.
    routed_scaling_factor : float
        s above.

    Returns
    -------
    array, [M, H_pad], float64
        Columns from n_hidden on and rows from n_token on are zero.
    """
    with np.errstate(all="ignore"):
        return _layer(_EXACT, hidden_states, w13, w2, topk_weights, topk_ids, **options)


def naive(
    hidden_states: Array,
    w13: Array,
    w2: Array,
    topk_weights: Array,
    topk_ids: Array,
    *,
    n_part: int = 0,
    **options: Any,
) -> Array:
    """What a plain loop in the activations' precision gives for the same call.

    Sums run in float32; both products, the activation, h, each slot's result and each step of the
    sum over slots are rounded to the type of `hidden_states`.

    Parameters
    ----------
    As for `fused_moe`, and:
    n_part : int
        0: products are summed one by one. Else: in so many parts. In float32, where a naive run is
        no less precise than a good one, several runs show how far apart equally good results lie.

    Returns
    -------
    array, [M, H_pad], of the type of `hidden_states`
    """
    dtype = hidden_states.dtype
    with np.errstate(all="ignore"):
        result = _layer(
            _framework(dtype, n_part), hidden_states, w13, w2, topk_weights, topk_ids, **options
        )
    return result.astype(dtype)
