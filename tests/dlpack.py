"""DLPack producers made by hand, for tests: capsules and exchange APIs with any field set at will.

Each producer hands out the memory of a NumPy array and counts what is asked of it, so that a test
can tell which way a consumer went and whether it gave everything back exactly once.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

CPU, CUDA, CUDA_HOST, METAL, ROCM, ROCM_HOST = 1, 2, 3, 8, 10, 11
READ_ONLY = 1


class Tensor(Structure):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("n_dim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class Legacy(Structure):
    _fields_: ClassVar = [("tensor", Tensor), ("context", c_void_p), ("deleter", c_void_p)]


class Versioned(Structure):
    _fields_: ClassVar = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("context", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", Tensor),
    ]


Deleter = CFUNCTYPE(None, c_void_p)
Allocate = CFUNCTYPE(c_int, POINTER(Tensor), POINTER(c_void_p), c_void_p, c_void_p)
FromObject = CFUNCTYPE(c_int, c_void_p, POINTER(c_void_p))
ToObject = CFUNCTYPE(c_int, c_void_p, POINTER(c_void_p))
Borrow = CFUNCTYPE(c_int, c_void_p, POINTER(Tensor))
SetError = CFUNCTYPE(None, c_void_p, c_char_p, c_char_p)


class Api(Structure):
    _fields_: ClassVar = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("previous", c_void_p),
        ("allocate", c_void_p),
        ("from_object", c_void_p),
        ("to_object", c_void_p),
        ("borrow", c_void_p),
        ("current_stream", c_void_p),
    ]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [c_void_p, c_char_p, c_void_p]

CODES = {"f": 2, "i": 0, "u": 1}


def fill(tensor: Tensor, array: NDArray[Any], keep: list[Any], **fields: Any) -> None:
    """Describe `array`; what the description points to is added to `keep`."""
    n = max(array.ndim, 1)
    shape = (c_int64 * n)(*array.shape)
    strides = (c_int64 * n)(*(step // array.itemsize for step in array.strides))
    keep += [array, shape, strides]
    tensor.data = array.ctypes.data
    tensor.device_type, tensor.device_id = CPU, 0
    tensor.n_dim = array.ndim
    tensor.code, tensor.bits, tensor.lanes = CODES[array.dtype.kind], 8 * array.itemsize, 1
    tensor.shape, tensor.strides, tensor.byte_offset = shape, strides, 0
    for name, value in fields.items():
        setattr(tensor, name, value)


class Producer:
    """Has `__dlpack__` only. `fields` overwrite those of the tensor, `header` those around it."""

    def __init__(self, array: NDArray[Any], *, is_legacy: bool = False, **fields: Any) -> None:
        self.array, self.is_legacy, self.fields = array, is_legacy, fields
        self.header: dict[str, int] = {}
        self.keep: list[Any] = []
        self.n_export = self.n_delete = 0
        self.asked: list[dict[str, Any]] = []
        self._deleter = Deleter(self._delete)

    def _delete(self, address: int) -> None:
        self.n_delete += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self.fields.get("device_type", CPU), self.fields.get("device_id", 0))

    def __dlpack__(self, **options: Any) -> Any:
        self.asked.append(options)
        if self.is_legacy and options:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        managed: Legacy | Versioned = Legacy() if self.is_legacy else Versioned(major=1, minor=1)
        managed.deleter = ctypes.cast(self._deleter, c_void_p)
        fill(managed.tensor, self.array, self.keep, **self.fields)
        for name, value in self.header.items():
            setattr(managed, name, value)
        self.keep.append(managed)
        self.n_export += 1
        name = b"dltensor" if self.is_legacy else b"dltensor_versioned"
        return _new_capsule(ctypes.addressof(managed), name, None)


def exchanging(*, can_borrow: bool = True, major: int = 1) -> type[Any]:
    """A new type of producer with a C exchange API; with another `major`, of 1 in its chain."""

    class Exchanging:
        calls: ClassVar[list[str]] = []
        n_delete: ClassVar[int] = 0

        def __init__(self, array: NDArray[Any], **fields: Any) -> None:
            self.array, self.fields = array, fields
            self.keep: list[Any] = []

        def __dlpack__(self, **options: Any) -> Any:
            raise AssertionError("has a faster way")

    def of(address: int) -> Any:
        return ctypes.cast(address, ctypes.py_object).value

    def delete(address: int) -> None:
        Exchanging.n_delete += 1

    def managed_of(array: NDArray[Any], keep: list[Any], **fields: Any) -> int:
        managed = Versioned(major=1, minor=1, flags=fields.pop("flags", 0))
        managed.deleter = ctypes.cast(kept[0], c_void_p)
        fill(managed.tensor, array, keep, **fields)
        keep.append(managed)
        return ctypes.addressof(managed)

    def from_object(address: int, out: Any) -> int:
        Exchanging.calls.append("from_object")
        out[0] = managed_of(of(address).array, of(address).keep, **of(address).fields)
        return 0

    def borrow(address: int, out: Any) -> int:
        Exchanging.calls.append("borrow")
        fields = {k: v for k, v in of(address).fields.items() if k != "flags"}
        fill(out[0], of(address).array, of(address).keep, **fields)
        return 0

    def allocate(prototype: Any, out: Any, context: int, error: int) -> int:
        Exchanging.calls.append("allocate")
        wanted = prototype[0]
        shape = tuple(wanted.shape[i] for i in range(wanted.n_dim))
        kind = {2: "f", 0: "i"}.get(wanted.code)
        if kind is None:
            SetError(error)(context, b"BufferError", b"no such type here")
            return -1
        made.append(np.empty(shape, f"{kind}{wanted.bits // 8}"))
        out[0] = managed_of(made[-1], kept)
        return 0

    def to_object(address: int, out: Any) -> int:
        Exchanging.calls.append("to_object")
        result = Exchanging(made.pop())
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(result))
        out[0] = id(result)
        return 0

    made: list[NDArray[Any]] = []
    kept: list[Any] = [
        Deleter(delete), Allocate(allocate), FromObject(from_object), ToObject(to_object),
        Borrow(borrow),
    ]  # fmt: skip
    functions = [ctypes.cast(function, c_void_p) for function in kept]
    api = Api(1, 1, None, *functions[1:4], functions[4] if can_borrow else None, None)
    kept.append(api)
    if major != 1:
        api = Api(major, 0, ctypes.addressof(api))
        kept.append(api)
    # The API has to outlive the process's last use of the type, which consumers may keep.
    Exchanging.kept = kept  # type: ignore[attr-defined]
    Exchanging.__dlpack_c_exchange_api__ = _new_capsule(  # type: ignore[attr-defined]
        ctypes.addressof(api), b"dlpack_exchange_api", None
    )
    return Exchanging
