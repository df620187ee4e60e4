"""Element types: what is stored in a checkpoint as what is held, and back, bit for bit.

Knows one block of elements at a time, and nothing of where it lies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepad._core import CheckpointError
from moepad.checkpoint import Stored
from moepad.parts import Part

__all__ = ["as_held", "as_stored", "bytes_apart"]

Array = NDArray[Any]


def bytes_apart(array: Array, form: str) -> Array:
    """The last axis in bytes, whatever it is stored in.

    A view of a contiguous array, unless its words are tall.
    """
    if form == "words":
        return np.ascontiguousarray(array).view(np.uint8)
    if form == "tall words":
        return np.ascontiguousarray(array.T).view(np.uint8)
    if form == "blocks":
        return array.reshape(*array.shape[:-2], array.shape[-2] * array.shape[-1])
    return array


_E8M0_NAN = 255
_FN_NAN, _FN_MINUS_ZERO = 0x7F, 0x80  # float8 e4m3fn, the former of either sign


def as_held(part: Part, stored: Stored, values: Array, dtype: np.dtype[Any]) -> Array:
    """Stored values in the type they are held in, each exactly itself times the part's factor.

    Parameters
    ----------
    part : Part
    stored : Stored
        The tensor the values are of, for errors.
    values : array
    dtype : numpy dtype
        Of the tensor they go into.

    Raises
    ------
    CheckpointError
        A scale is not finite, one of activations negative, or a weight to be converted is NaN.
    """
    if part.is_scale:
        held = _same_or_wider(values, dtype)
        if part.factor != 1:
            with np.errstate(over="ignore", invalid="ignore"):  # noticed below
                held = held * dtype.type(part.factor)
        is_one_byte = values.dtype.itemsize == 1
        wrong = values.view(np.uint8) == _E8M0_NAN if is_one_byte else ~np.isfinite(held)
        fault = "NaN or infinite; quantise the weights again"
        if part.is_optional:  # of activations; 0 of an expert that calibration never reached
            wrong |= held < 0
            fault = "NaN, infinite or negative; calibrate the activations again"
        if wrong.any():
            raise CheckpointError(
                f"{stored}: {np.count_nonzero(wrong)} of {wrong.size} scales are {fault}"
            )
        return held
    if part.into in ("w13", "w2") and values.dtype != dtype and dtype.name == "float8_e4m3fnuz":
        bits = values.view(np.uint8)
        if ((bits & _FN_NAN) == _FN_NAN).any():
            raise CheckpointError(
                f"{stored}: holds NaN, which conversion to f8_e4m3fnuz does not keep; quantise the "
                "weights again, or make the plan with dtype='f8_e4m3fn'"
            )
        return np.where(bits == _FN_MINUS_ZERO, np.uint8(0), bits).view(dtype)
    return values.view(dtype)


def as_stored(part: Part, values: Array, dtype: np.dtype[Any]) -> Array:
    """The way back of `as_held`."""
    if part.factor != 1:
        values = values / values.dtype.type(part.factor)
    return _same_or_wider(values, dtype) if part.is_scale else values.view(dtype)


def _same_or_wider(values: Array, dtype: np.dtype[Any]) -> Array:
    """The same bytes where types are of one size, else the same values."""
    return values.view(dtype) if values.dtype.itemsize == dtype.itemsize else values.astype(dtype)
