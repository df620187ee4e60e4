"""`_core.copy` against NumPy's own assignment: every element right, no byte between touched."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
from conftest import require
from hypothesis import given, settings
from hypothesis import strategies as st
from moepad import _core
from moepad.testing import Guarded
from numpy.typing import NDArray

SIZES = (1, 2, 4, 8)
SetThreads = Callable[[int], None]


def numbered(shape: tuple[int, ...], itemsize: int) -> NDArray[Any]:
    """Elements that differ in every byte that they have room for."""
    values = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (values >> np.uint64(64 - 8 * itemsize)).astype(f"u{itemsize}").reshape(shape)


def check(dst: NDArray[Any], src: NDArray[Any]) -> None:
    """Copies, with `dst` a view of `dst.base`, all of whose other bytes have to stay."""
    base = dst if dst.base is None else dst.base
    base.view(np.uint8).reshape(-1)[:] = 0xA5
    expected = base.copy()
    view = np.lib.stride_tricks.as_strided(
        expected.reshape(-1)[start_of(dst, base) :], dst.shape, dst.strides
    )
    view[...] = src
    _core.copy(dst, src)
    np.testing.assert_array_equal(base, expected)


def start_of(view: NDArray[Any], base: NDArray[Any]) -> int:
    return (view.ctypes.data - base.ctypes.data) // base.itemsize


# Each makes a view of `shape`, into a base of its own.
LAYOUTS: dict[str, Callable[[tuple[int, ...], int], NDArray[Any]]] = {
    "plain": lambda shape, size: numbered(shape, size),
    "wider": lambda shape, size: numbered((*shape[:-1], shape[-1] + 3), size)[..., : shape[-1]],
    "stepped": lambda shape, size: numbered((*shape[:-1], shape[-1] * 2), size)[..., 1::2],
    "by three": lambda shape, size: numbered((*shape[:-1], shape[-1] * 3), size)[..., ::3],
    "reversed": lambda shape, size: numbered(shape, size)[..., ::-1],
    "upside down": lambda shape, size: numbered(shape, size)[::-1],
    "transposed": lambda shape, size: numbered(shape[::-1], size).T,
    "transposed, stepped": lambda shape, size: (
        numbered((*shape[:0:-1], shape[0] * 2), size).T[::2]
        if len(shape) > 1
        else numbered(shape, size)
    ),
    "transposed, wider": lambda shape, size: numbered((*shape[:0:-1], shape[0] + 5), size).T[2:-3],
    "last two exchanged": lambda shape, size: (
        np.swapaxes(numbered((*shape[:-2], shape[-1], shape[-2]), size), -1, -2)
        if len(shape) > 1
        else numbered(shape, size)
    ),
}
SHAPES = [(1,), (7,), (1, 1), (3, 5), (64, 64), (65, 33), (130, 257), (2, 3, 70), (5, 1, 9, 4)]


@pytest.mark.parametrize("itemsize", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(shape: tuple[int, ...], itemsize: int) -> None:
    for into, out_of in itertools.product(LAYOUTS, LAYOUTS):
        dst, src = LAYOUTS[into](shape, itemsize), LAYOUTS[out_of](shape, itemsize)
        assert dst.shape == src.shape == shape
        check(dst, src)


# More than a thread's worth each, in the forms that a checkpoint's loader asks for.
LARGE: dict[str, tuple[tuple[int, ...], str, str]] = {
    "rows": ((1500, 1024), "plain", "plain"),
    "one row": ((3_000_001,), "plain", "plain"),
    "rows into wider ones": ((1500, 1000), "wider", "plain"),
    "few wide rows": ((3, 700_001), "wider", "wider"),
    "transposed": ((1100, 1030), "plain", "transposed"),
    "every second, transposed": ((700, 1500), "plain", "transposed, stepped"),
    "experts transposed": ((5, 600, 500), "plain", "last two exchanged"),
    "many tiny planes": ((400_000, 2, 3), "plain", "last two exchanged"),
    "stepped": ((1100, 1030), "plain", "stepped"),
    "into every second": ((1100, 1030), "stepped", "plain"),
}


@pytest.mark.parametrize("itemsize", SIZES)
@pytest.mark.parametrize("name", LARGE)
def test_threads(name: str, itemsize: int, n_thread: SetThreads) -> None:
    shape, into, out_of = LARGE[name]
    dst, src = LAYOUTS[into](shape, itemsize), LAYOUTS[out_of](shape, itemsize)
    for n in (1, 2, 7):
        n_thread(n)
        check(dst, src)


@st.composite
def views(draw: Any, shape: tuple[int, ...], itemsize: int) -> NDArray[Any]:
    """A view of `shape` in which no element is twice: any order of axes, any steps, any offset."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in shape]
    extra = [draw(st.integers(0, 2)) for _ in shape]
    sizes = [abs(step) * n + more for n, step, more in zip(shape, steps, extra, strict=True)]
    base = numbered(tuple(sizes[axis] for axis in order), itemsize)
    view = base.transpose(np.argsort(order))
    parts = [
        slice(more, more + step * n, step)
        if step > 0
        else slice(-1 - more, -1 - more + step * n, step)
        for n, step, more in zip(shape, steps, extra, strict=True)
    ]
    view = view[tuple(parts)]
    assert view.shape == shape
    return view


@settings(deadline=None, database=None)
@given(data=st.data())
def test_any_views(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 8, 67]), min_size=1, max_size=4)))
    itemsize = data.draw(st.sampled_from(SIZES))
    if math.prod(shape) <= 200_000:
        check(data.draw(views(shape, itemsize)), data.draw(views(shape, itemsize)))


@pytest.mark.parametrize("edge", ["before", "after"])
@pytest.mark.parametrize("itemsize", SIZES)
def test_memory_ends_where_the_views_end(itemsize: int, edge: Literal["before", "after"]) -> None:
    """Both sides begin or end at a page that may not be touched."""
    for shape in ((67, 130), (64, 512 // itemsize), (1, 9)):
        values = numbered(shape, itemsize)
        src = Guarded(shape, values.dtype, edge=edge).array
        dst = Guarded(shape[::-1], values.dtype, edge=edge).array
        src[...] = values
        _core.copy(dst, src.T)
        np.testing.assert_array_equal(dst, values.T)
        src[...] = 0
        _core.copy(src, dst.T)
        np.testing.assert_array_equal(src, values)


def test_broadcast_source() -> None:
    src = np.broadcast_to(numbered((1, 70), 2), (300, 70))
    check(np.zeros((300, 70), np.uint16), src)
    check(np.zeros((70, 300), np.uint16), src.T)


def test_empty_and_scalar() -> None:
    for shape in ((0,), (3, 0), (0, 3)):
        _core.copy(np.zeros(shape, np.float32), np.ones(shape, np.float32))
    dst = np.zeros((), np.float32)
    _core.copy(dst, np.array(3, np.float32))
    assert dst == 3


def test_misaligned() -> None:
    """A checkpoint's tensors begin where its header happens to end."""
    src = np.frombuffer(bytes(3) + numbered((40, 50), 4).tobytes(), np.uint32, offset=3)
    src = src.reshape(40, 50)
    assert not src.flags.aligned
    dst = np.zeros((50, 40), np.uint32)
    _core.copy(dst, src.T)
    np.testing.assert_array_equal(dst, src.T)


def test_bits_of_any_type() -> None:
    """Types are not looked at: NaN patterns and types NumPy has no name for arrive as they are."""
    bits = numbered((33, 40), 2)
    dst = np.zeros((40, 33), ml_dtypes.bfloat16)
    _core.copy(dst, bits.view(np.float16).T)
    np.testing.assert_array_equal(dst.view(np.uint16), bits.T)


def test_torch() -> None:
    torch = require("torch")
    src = torch.arange(48, dtype=torch.float32).reshape(2, 4, 6)
    dst = np.zeros((6, 4, 2), np.float32)
    _core.copy(dst, src.permute(2, 1, 0))
    np.testing.assert_array_equal(dst, src.numpy().T)
    half = torch.zeros(4, 6, dtype=torch.bfloat16)
    _core.copy(half.t(), src[0].t().to(torch.bfloat16))
    assert torch.equal(half.float(), src[0])
    eight = torch.zeros(3, 5, dtype=torch.float8_e4m3fn)
    _core.copy(eight, torch.ones(5, 3).to(torch.float8_e4m3fn).t())
    assert torch.equal(eight.float(), torch.ones(3, 5))
