"""What it takes to test and to time a fused MoE: poison, guarded memory, comparison, floor, timing.

Used by this project's tests and its benchmark, and meant for tests of code that calls moepad.
Needs NumPy and ml_dtypes only; knows no framework.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from moepad.reference import FLOAT_FORMATS

__all__ = [
    "POISON",
    "Guarded",
    "Work",
    "check_bits",
    "check_close",
    "interleave",
    "one_rounding",
    "poison",
    "quantise",
    "row_error",
]

Array = NDArray[Any]
ByteArray = NDArray[np.uint8]

_finfo: Any = ml_dtypes.finfo

_NAN_BYTES = {
    "float32": b"\x01\x00\xc0\xff",
    "float64": b"\x01\x00\x00\x00\x00\x00\xf8\xff",
    "float16": b"\x01\xfe",
    "bfloat16": b"\xc1\xff",
    "float8_e4m3fnuz": b"\x80",
    # Ids: an index far out of every range, not -1, which would quietly skip the slot.
    "int32": b"\xf1\xff\xff\x7f",
    "int64": b"\xf1\xff\xff\xff\xff\xff\xff\x7f",
}


def _nan(dtype: np.dtype[Any]) -> bytes:
    """Bytes of one element no result may depend on; 0xFF is NaN for the types not listed."""
    return _NAN_BYTES.get(dtype.name, b"\xff" * dtype.itemsize)


def _infinity(dtype: np.dtype[Any]) -> bytes:
    try:
        return np.array(-np.inf, dtype).tobytes()
    except (OverflowError, ValueError, TypeError):
        return _nan(dtype)


def _largest(dtype: np.dtype[Any]) -> bytes:
    if dtype.kind in "iu":
        return _nan(dtype)
    return np.array(_finfo(dtype).max, dtype).tobytes()


# Name to the bytes of one element of a type. Whatever a pad holds must make no difference, so a
# test runs with each: a kernel that multiplies pads by zero passes "largest" and fails "nan".
POISON: dict[str, Callable[[np.dtype[Any]], bytes]] = {
    "nan": _nan,
    "infinity": _infinity,
    "largest": _largest,
    "zero": lambda dtype: bytes(dtype.itemsize),
}


def poison(array: Array, pattern: str = "nan") -> Array:
    """Overwrites every element of `array`, strided or not, with a pattern of `POISON`."""
    raw = np.frombuffer(POISON[pattern](array.dtype), f"u{array.dtype.itemsize}")
    array.view(raw.dtype)[...] = raw[0]
    return array


_ZONE = 4096  # bytes of poison on each side, more than any vector load or prefetch spans
_PAGE = mmap.PAGESIZE


class Guarded:
    """An array in memory of its own, poisoned all over and all around.

    Parameters
    ----------
    shape : tuple of int
    dtype : numpy dtype
    reach : int, optional
        Elements from the first that may be touched; default all. Only with `edge`.
    edge : "after" or "before", optional
        Puts a page that faults on any access right after element `reach` - 1, or right before the
        first element. With "after", the elements from `reach` on lie in that page themselves.
    pattern : str
        What fills the array and its surroundings: a key of `POISON`.
    offset : int
        Elements by which the array's start misses a 64-byte boundary. Only without `edge`.

    Attributes
    ----------
    array : array, of `shape` and `dtype`
        C-contiguous; valid as long as it is referenced.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        *,
        reach: int | None = None,
        edge: Literal["after", "before"] | None = None,
        pattern: str = "nan",
        offset: int = 0,
    ) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.shape = shape
        size = int(np.prod(shape, dtype=np.int64))
        self._nbytes = size * self.dtype.itemsize
        reach_bytes = self._nbytes if reach is None else reach * self.dtype.itemsize
        if edge is None:
            self._start = _ZONE + offset * self.dtype.itemsize
            length = self._start + self._nbytes + _ZONE
            block = np.frombuffer(mmap.mmap(-1, _round_up(length, _PAGE)), np.uint8)
        elif edge == "before":
            block = np.frombuffer(mmap.mmap(-1, _PAGE + _round_up(self._nbytes, _PAGE)), np.uint8)
            self._start = _PAGE
        else:
            usable = _round_up(max(reach_bytes, 1), _PAGE)
            beyond = _round_up(self._nbytes - reach_bytes + 1, _PAGE)
            block = np.frombuffer(mmap.mmap(-1, usable + beyond), np.uint8)
            self._start = usable - reach_bytes
        self._block: ByteArray = block
        self._pattern = POISON[pattern](self.dtype)
        self._visible = slice(0, block.size)
        block[:] = self._poison(block.size)
        if edge == "before":
            self._visible = slice(_PAGE, block.size)
            _forbid(block[:_PAGE])
        elif edge == "after":
            self._visible = slice(0, usable)
            _forbid(block[usable:])
        body = block[self._start : self._start + self._nbytes]
        self.array: Array = body.view(self.dtype).reshape(shape)

    def _poison(self, n_bytes: int) -> ByteArray:
        element = np.frombuffer(self._pattern, f"u{self.dtype.itemsize}")
        return np.full(n_bytes // element.itemsize, element[0]).view(np.uint8)

    def check(self, written: Array | None = None) -> None:
        """Raises AssertionError if a byte outside `written` has changed since the poisoning.

        Parameters
        ----------
        written : array, optional
            The view of `.array` that may have been written; default all of it.
        """
        expected = self._poison(self._block.size)
        view = self.array if written is None else written
        here = view.__array_interface__["data"][0] - self._block.__array_interface__["data"][0]
        if view.size:
            twin = np.ndarray(view.shape, view.dtype, expected.data, here, view.strides)
            twin.view(f"u{view.dtype.itemsize}")[...] = view.view(f"u{view.dtype.itemsize}")
        wrong = np.flatnonzero(expected[self._visible] != self._block[self._visible])
        if wrong.size:
            first = int(wrong[0]) + (self._visible.start or 0) - self._start
            raise AssertionError(
                f"{wrong.size} bytes written outside the array: first at byte {first} of an array "
                f"of {self._nbytes} bytes, shape {self.shape} {self.dtype}"
            )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _forbid(pages: ByteArray) -> None:
    """Makes any access to whole pages fault."""
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(pages.__array_interface__["data"][0])
    if libc.mprotect(address, ctypes.c_size_t(pages.size), 0):
        raise OSError(ctypes.get_errno(), "mprotect")


_FP8 = {"f8_e4m3fn": "float8_e4m3fn", "f8_e4m3fnuz": "float8_e4m3fnuz", "f8_e5m2": "float8_e5m2"}
_SCALES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}


def quantise(
    weights: NDArray[np.float32],
    quant: str,
    *,
    n_half: int = 1,
    dtype: str = "f8_e4m3fn",
    scale_dtype: str = "f32",
    block: tuple[int, int] = (128, 128),
    row_phase: int = 0,
    column_phase: int = 0,
) -> tuple[Array, Array]:
    """Weights as a kind of quantisation stores them, the largest of each group at full scale.

    Parameters
    ----------
    weights : array, [E, rows, K]
    quant : str
        A kind of `moepad.plan`, "none" excepted.
    n_half : int
        2: the rows are gate rows and as many up rows, which share no scale.
    dtype : "f8_e4m3fn", "f8_e4m3fnuz" or "f8_e5m2"
        Of the weights of the fp8 kinds.
    scale_dtype : "f32", "bf16" or "f16"
        Of the scales of "int4_group".
    block : (int, int)
        Of "fp8_block", and of "int4_group" as (1, group).
    row_phase, column_phase : int
        Rows of a half, and columns, by which the first lies inside its block ("fp8_block").

    Returns
    -------
    (array, array)
        Stored weights and scales in the canonical form of `moepad.fused_moe`; e8m0 as uint8.
    """
    n_expert, n_row, n_k = weights.shape
    halves = weights.reshape(n_expert, n_half, n_row // n_half, n_k)
    n_each = n_row // n_half
    row, column = np.arange(n_each), np.arange(n_k)
    shape: list[int] | None = None
    if quant == "fp8_tensor":
        row, column, shape = 0 * row, 0 * column, [1, 1]
    elif quant in ("fp8_channel", "int8_channel"):
        column, shape = 0 * column, [n_each, 1]
    elif quant == "fp8_block":
        row, column = (row_phase + row) // block[0], (column_phase + column) // block[1]
    else:
        column = column // (block[1] if quant == "int4_group" else 32)

    # Equal indices follow each other, so that each group is a range.
    (rows, first_row), (columns, first_column) = (
        np.unique(index, return_index=True) for index in (row, column)
    )
    largest_each = np.maximum.reduceat(np.abs(halves), first_row, axis=2)
    largest_each = np.maximum.reduceat(largest_each, first_column, axis=3)
    shape = shape or [int(index.max(initial=-1)) + 1 for index in (row, column)]
    grid = np.zeros((n_expert, n_half, *shape))
    grid[:, :, rows[:, None], columns] = largest_each
    is_mx = quant in ("mxfp8", "mxfp4")
    largest = _largest_stored(quant, dtype)
    grid = np.where(grid > 0, grid / largest, 1)
    scale = np.exp2(np.ceil(np.log2(grid))) if is_mx else grid.astype(_SCALES[scale_dtype])
    ratio = halves / scale.astype(np.float64)[:, :, row[:, None], column]
    stored = _store(np.clip(ratio, -largest, largest).reshape(weights.shape), quant, dtype)

    if is_mx:
        scale = (np.log2(scale) + 127).astype(np.uint8)
    if quant == "fp8_tensor":
        return stored, scale.reshape(n_expert, n_half) if n_half > 1 else scale.reshape(n_expert)
    scale = scale.reshape(n_expert, n_half * scale.shape[2], scale.shape[3])
    if quant in ("fp8_channel", "int8_channel"):
        scale = scale.reshape(scale.shape[:2])
    return stored, scale


def _largest_stored(quant: str, dtype: str) -> float:
    if quant == "int8_channel":
        return 127
    if quant == "int4_group":
        return 7
    name = "float4_e2m1fn" if quant == "mxfp4" else _FP8[dtype]
    values = FLOAT_FORMATS[name].values()
    return float(values[np.isfinite(values)].max())


def _store(values: NDArray[np.float64], quant: str, dtype: str) -> Array:
    """The nearest stored values, ties to even."""
    if quant.startswith(("fp8", "mxfp8")):
        return values.astype(getattr(ml_dtypes, _FP8[dtype]))
    if quant == "int8_channel":
        return np.rint(values).astype(np.int8)
    if values.shape[2] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:2], 1))], axis=2)
    if quant == "mxfp4":
        nibble = values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    else:
        nibble = (np.rint(values) + 8).astype(np.uint8)
    packed: Array = nibble[:, :, ::2] | nibble[:, :, 1::2] << 4
    return packed


def one_rounding(values: NDArray[np.float64], dtype: DTypeLike) -> NDArray[np.float64]:
    """The largest error of rounding each value to `dtype` once, subnormals included."""
    info = _finfo(dtype)
    return np.abs(values) * (float(info.eps) / 2) + float(info.smallest_subnormal) / 2


def check_bits(actual: Array, expected: Array) -> None:
    """Raises AssertionError unless both hold the same bits, those of NaN and -0 included."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"got {actual.dtype} {actual.shape}, expected {expected.dtype} {expected.shape}"
        )
    unsigned = f"u{actual.dtype.itemsize}"
    differ = np.argwhere(actual.view(unsigned) != expected.view(unsigned))
    if len(differ):
        at = tuple(int(i) for i in differ[0])
        raise AssertionError(
            f"{len(differ)} of {actual.size} elements differ in their bits: first at {at}, got "
            f"{actual[at]!r}, expected {expected[at]!r}; rows {np.unique(differ[:, 0])[:8]}"
        )


def check_close(actual: Array, expected: NDArray[np.float64], naive: Array) -> None:
    """Raises AssertionError unless `actual` is as good as a computation in its type must be.

    Three steps: NaN and infinities are where they belong; each element's error is at most twice
    the largest error of the naive run in the same row, plus one rounding; the relative L2 error of
    the whole is at most twice the naive run's, plus one rounding. The second step is what finds a
    single wrong row, which no distance over the whole can. A row in which the naive run was lucky
    is allowed what is, relative to its size, the error of the row at `_LUCK` among all rows.

    Parameters
    ----------
    actual : array, [M, H]
        The result under test, in its own type.
    expected : array, [M, H], float64
        From `moepad.reference.fused_moe`.
    naive : array, [M, H] or [n_run, M, H], of the type of `actual`
        From `moepad.reference.naive`; of several runs the one that is farthest off counts.
    """
    runs = naive if naive.ndim == 3 else naive[None]
    if actual.shape != expected.shape or actual.shape != runs.shape[1:]:
        raise AssertionError(f"got shape {actual.shape}, expected {expected.shape}")
    if actual.dtype != naive.dtype:
        raise AssertionError(f"got {actual.dtype}, expected {naive.dtype}")
    got = actual.astype(np.float64)
    with np.errstate(over="ignore"):
        stored = expected.astype(actual.dtype).astype(np.float64)
    for name, belongs in (
        ("NaN", np.isnan),
        ("infinity", np.isposinf),
        ("-infinity", np.isneginf),
    ):
        wrong = belongs(got) != belongs(stored)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{name} misplaced in {wrong.sum()} elements of {_rows(wrong)}: first at {at}, "
                f"got {got[at]!r}, expected {stored[at]!r}"
            )
    finite = np.isfinite(stored)
    right = np.where(finite, expected, 0)
    error = np.abs(np.where(finite, got, 0) - right)
    naive_error = np.max([_finite_error(run, right, finite) for run in runs], axis=0)
    rounding = one_rounding(right, actual.dtype)
    allowed = 2 * row_error(naive_error, right)[:, None] + rounding
    excess = np.where(error > allowed, error / allowed, 0)
    if excess.any():
        row, column = (int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))
        at = (row, column)
        raise AssertionError(
            f"{np.count_nonzero(excess)} of {excess.size} elements of {_rows(excess > 0)} are too "
            f"far off: worst at {at}, got {got[at]!r}, expected {right[at]!r}, error "
            f"{error[at]:.3e}, allowed {allowed[at]:.3e} ({excess[at]:.2f} times)"
        )
    size = float(np.linalg.norm(right))
    distance, limit = float(np.linalg.norm(error)), 2 * float(np.linalg.norm(naive_error))
    limit += float(np.linalg.norm(rounding))
    if distance > limit:
        raise AssertionError(
            f"relative L2 error {distance / size:.3e} over the whole, allowed {limit / size:.3e}"
        )


def _finite_error(
    naive: Array, right: NDArray[np.float64], finite: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """|naive - right|; 0 where either is not finite, so that it allows nothing there."""
    value = naive.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(finite & np.isfinite(value), np.abs(value - right), 0)


_LUCK = 0.9  # of the rows, sorted by the naive run's relative error


def row_error(naive_error: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the naive run of a row is off by, or should have been where it was lucky.

    Parameters
    ----------
    naive_error, right : array, [M, H]
        Errors of a naive run, and the right result.

    Returns
    -------
    array, [M]
        The largest error of the row; at least what, relative to its size, nine in ten rows have.
    """
    largest: NDArray[np.float64] = naive_error.max(axis=1, initial=0)
    size = np.sqrt(np.square(right).sum(axis=1))
    if not size.any():
        return largest
    usual = float(np.quantile(largest[size > 0] / size[size > 0], _LUCK))
    result: NDArray[np.float64] = np.maximum(largest, usual * size)
    return result


def _rows(wrong: NDArray[np.bool_]) -> str:
    rows = np.flatnonzero(wrong.any(axis=1))
    listed = ", ".join(str(row) for row in rows[:8])
    return f"{len(rows)} of {len(wrong)} rows ({listed}{', ...' if len(rows) > 8 else ''})"


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: bytes of each tensor's true part, and operations.

    Attributes
    ----------
    n_bytes : int
        Weights and biases of the experts hit, once each, tokens in, results out.
    n_flop : int
        2 per multiply-add of both products, over the slots not skipped.
    """

    n_bytes: int
    n_flop: int

    @classmethod
    def of(
        cls,
        topk_ids: Array,
        *,
        n_hidden: int,
        n_inter: int,
        weight_bits: int,
        value_bytes: int,
        is_gated: bool = True,
        have_bias: bool = False,
    ) -> Work:
        """Counts for local ids `topk_ids`, [M, k], where a negative id is a skipped slot."""
        n_row = (2 if is_gated else 1) * n_inter
        n_active = len(np.unique(topk_ids[topk_ids >= 0]))
        n_slot = int(np.count_nonzero(topk_ids >= 0))
        matrices = (n_row + n_inter) * n_hidden
        n_bytes = n_active * (matrices * weight_bits // 8)
        n_bytes += n_active * (n_row + n_hidden) * value_bytes if have_bias else 0
        n_bytes += 2 * len(topk_ids) * n_hidden * value_bytes
        return cls(n_bytes, 2 * n_slot * matrices)

    def seconds(self, bandwidth: float, peak: float) -> float:
        """The floor: no machine reading `bandwidth` bytes/s at `peak` FLOP/s is faster."""
        return max(self.n_bytes / bandwidth, self.n_flop / peak)


def interleave(
    contenders: Mapping[str, Callable[[], object]], seconds: float, n_window: int = 5
) -> dict[str, float]:
    """Median seconds per call of each contender, measured in turns.

    Each gets `n_window` windows of `seconds` / `n_window`, one contender after the other, so that a
    machine that slows down for a while slows all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(n_window):
        for name, call in contenders.items():
            times[name] += window(call, seconds / n_window)
    return {name: statistics.median(values) for name, values in times.items()}


def window(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call made until `seconds` have passed; one at least."""
    times: list[float] = []
    now = start = time.perf_counter()
    while now - start < seconds or not times:
        call()
        before, now = now, time.perf_counter()
        times.append(now - before)
    return times
