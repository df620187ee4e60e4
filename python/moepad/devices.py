"""Memory that experts lie in, the host's or a GPU's: made, viewed and filled, by one interface.

What is in a GPU's memory is a `DeviceArray`, which DLPack consumers take: `torch.from_dlpack`,
`cupy.from_dlpack`, `moepad.fused_moe`. No framework is needed to make one.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moepad import _core
from moepad.checkpoint import NUMPY_DTYPES

__all__ = ["DeviceArray", "Memory", "memory_of", "on_host"]

Array = NDArray[Any]
Put = Callable[[Any, Array], None]

_PAGE = 4096  # bytes; tensors start on a page, so that none shares one with other data
_CUDA, _ROCM = 2, 10  # device types of DLPack
_NAMES = {np.dtype(dtype): name for name, dtype in NUMPY_DTYPES.items()}
_DLPACK_1 = (1, 0)


class Memory(Protocol):
    """Where arrays can be: `str()` names it as frameworks do."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any: ...

    def settle(self) -> None:
        """Waits for what is queued and may still read what is here."""

    def writing(self) -> AbstractContextManager[Put]:
        """Gives a function that copies the second array, of the host, to the first, which is here.

        The first has it when the context ends; the second may change as soon as that returns.
        """


def memory_of(device: Any) -> Memory:
    """The memory that `device` names.

    Parameters
    ----------
    device : str or torch.device
        "cpu"; "cuda" or "cuda:1"; "hip" or "rocm", with an index or not. Under a PyTorch for AMD,
        which calls those devices so, "cuda" is AMD's.

    Raises
    ------
    ValueError
        It names none.
    """
    found = re.fullmatch(r"(cpu|cuda|hip|rocm)(?::(\d+))?", str(device))
    if not found or (found[1] == "cpu" and found[2] not in (None, "0")):
        raise ValueError(
            f"device: expected 'cpu', 'cuda', 'hip' or 'rocm', with an index or not, got {device!r}"
        )
    if found[1] == "cpu":
        return _Host()
    torch = sys.modules.get("torch")
    is_amd = found[1] != "cuda" or (torch is not None and torch.version.hip is not None)
    return _Gpu(_ROCM if is_amd else _CUDA, int(found[2] or 0))


def on_host(array: Array | DeviceArray) -> Array:
    """The array itself, or a copy of what is on a GPU."""
    return array.numpy() if isinstance(array, DeviceArray) else array


class _Host:
    def __str__(self) -> str:
        return "cpu"

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        n_byte = math.prod(shape) * np.dtype(dtype).itemsize
        block = np.zeros(n_byte + _PAGE, np.uint8)
        return np.ndarray(shape, dtype, block.data, -block.ctypes.data % _PAGE)

    def settle(self) -> None: ...

    @contextmanager
    def writing(self) -> Iterator[Put]:
        yield _core.copy


class _Gpu:
    def __init__(self, device_type: int, index: int) -> None:
        self.pair = (device_type, index)  # as DLPack has it

    def __str__(self) -> str:
        device_type, index = self.pair
        return f"{'hip' if device_type == _ROCM else 'cuda'}:{index}"

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        n_byte = math.prod(shape) * np.dtype(dtype).itemsize
        memory = _core.gpu_memory(*self.pair, n_byte)
        # Never read: NumPy reckons with its shape and strides.
        shadow = np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, _steps(shape, dtype))
        return DeviceArray(self, memory, 0, shadow)

    def settle(self) -> None:
        _core.gpu_settle(*self.pair)

    @contextmanager
    def writing(self) -> Iterator[Put]:
        staging = _core.gpu_staging(*self.pair)
        try:
            yield functools.partial(_core.gpu_put, staging)
        finally:  # also where something failed: nothing may arrive later
            _core.gpu_wait(staging)


class DeviceArray:
    """An array in a GPU's memory, which is freed with the last view of it, here or at a consumer's.

    Attributes
    ----------
    shape, dtype, strides, ndim, nbytes
        As NumPy's arrays have them.
    device : str
        "cuda:0" or "hip:0".
    """

    __slots__ = ("_memory", "_offset", "_place", "_shadow")

    def __init__(self, place: _Gpu, memory: object, offset: int, shadow: Array) -> None:
        self._place, self._memory = place, memory
        self._offset, self._shadow = offset, shadow

    def __repr__(self) -> str:
        return f"<DeviceArray {self.shape} {_NAMES[self.dtype]} on {self.device}>"

    shape = property(lambda self: self._shadow.shape)
    dtype = property(lambda self: self._shadow.dtype)
    strides = property(lambda self: self._shadow.strides)
    ndim = property(lambda self: self._shadow.ndim)
    nbytes = property(lambda self: self._shadow.nbytes)
    device = property(lambda self: str(self._place))

    def __getitem__(self, index: Any) -> DeviceArray:
        """A view: integers and slices, as NumPy takes them."""
        indices = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(i, (int, np.integer, slice)) for i in indices):
            raise TypeError(f"index: expected integers and slices, got {index!r}")
        # The ellipsis makes a view of a single element too, where NumPy would read it.
        shadow = self._shadow[(*indices, ...)]
        offset = self._offset + shadow.ctypes.data - self._shadow.ctypes.data
        return DeviceArray(self._place, self._memory, offset, shadow)

    def numpy(self) -> Array:
        """A copy on the host."""
        array = np.empty(self.shape, self.dtype)
        _core.copy(array, self)
        return array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._place.pair

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule of this memory, whose values are there already, whatever the stream."""
        if copy or (dl_device is not None and dl_device != self._place.pair):
            raise BufferError(f"a copy, or one elsewhere than on {self.device}, is not made")
        return _core.gpu_export(
            self._memory,
            self._offset,
            _NAMES[self.dtype],
            self.dtype.itemsize,
            self.shape,
            self.strides,
            max_version is not None and max_version >= _DLPACK_1,
        )


def _steps(shape: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
    """Strides in bytes, in C order."""
    itemsize = np.dtype(dtype).itemsize
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))
