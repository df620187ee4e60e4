"""Stand-ins for libamdhip64 and libhiprtc whose kernels run in the emulator.

    fakehip.start()                       # once a process: devices 0, 1, 2 are those of ARCHS
    x = fakehip.to_device(array, 1)       # memory of the second, with DLPack
    ...                                   # the code under test finds the libraries
    fakehip.check()                       # raises what the emulator found, if anything

The libraries show their devices to everything in the process that asks HIP. The host cannot touch
device memory, which is poisoned when fresh and knows which of its bytes have a value.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
SOURCES = {
    "amdhip64": ("runtime.c", "memory.c", "stream.c", "module.c", "fault.c"),
    "hiprtc": ("hiprtc.c", "fault.c"),
}
FLAGS = ("-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
LIVE = ("allocations", "modules", "streams", "events", "graphs")

ARCHS = ("gfx90a", "gfx942", "gfx950")

_folder: Path | None = None


def build(folder: Path, compiler: str = "cc") -> None:
    """Compiles both libraries into `folder`, with the version in their names as ROCm 7 has it."""
    for name, sources in SOURCES.items():
        library = f"lib{name}.so.7"
        command = [compiler, *FLAGS, "-fvisibility=hidden", "-pthread", f"-Wl,-soname,{library}"]
        command += [f'-DFAKEHIP_PYTHON_PATH="{HERE.parent}"', "-o", str(folder / library)]
        subprocess.run([*command, *(str(HERE / source) for source in sources)], check=True)


def environment(folder: Path, archs: Sequence[str] = ARCHS, n_unit: int = 4) -> dict[str, str]:
    """The variables that make a process find the libraries in `folder` and those devices."""
    return {
        "MOEPAD_HIP_LIBRARY": str(folder / "libamdhip64.so.7"),
        "FAKEHIP_ARCH": ",".join(archs) or "none",
        "FAKEHIP_UNITS": str(n_unit),
    }


def start() -> Path:
    """Builds the libraries and makes this process and its children find them; again: nothing."""
    global _folder
    if _folder is None:
        folder = Path(tempfile.mkdtemp(prefix="fakehip"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        build(folder)
        os.environ.update(environment(folder))
        _folder = folder
    return _folder


def library(name: str = "amdhip64") -> ctypes.CDLL:
    """The library, the same copy that the code under test gets."""
    assert _folder is not None, "fakehip.start comes first"
    return ctypes.CDLL(str(_folder / f"lib{name}.so.7"))


class HipError(RuntimeError):
    """A HIP function returned `code`."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function} returned {code}")
        self.code = code


def call(function: str, *arguments: Any) -> None:
    """Calls a HIP function; arguments are ctypes values or plain integers for C's int."""
    code = getattr(library(), function)(*arguments)
    if code:
        raise HipError(function, code)


# ------------------------------------------------------------------------------- faults and leaks
@contextmanager
def failing(plan: str) -> Iterator[None]:
    """Faults on purpose meanwhile: a list of FUNCTION:N[=ERROR], FUNCTION "*" for any (fault.c).

    Calls are counted from the start of the context, by each library for itself.
    """
    set_plan(plan)
    try:
        yield
    finally:
        set_plan("")


def set_plan(plan: str) -> None:
    for name in SOURCES:
        library(name).fakehip_fail(plan.encode())


def count_calls(function: str = "*", name: str = "amdhip64") -> int:
    """How often a function, or "*" any, was called since the last plan was set."""
    return int(library(name).fakehip_calls(function.encode()))


@contextmanager
def lazily() -> Iterator[None]:
    """Work meanwhile runs only when something waits for it."""
    library().fakehip_set_lazy(1)
    try:
        yield
    finally:
        library().fakehip_set_lazy(0)
        call("hipDeviceSynchronize")


def live() -> dict[str, int]:
    """What the host has not given back, by kind; unreachable arrays give theirs back first."""
    gc.collect()
    counts = (ctypes.c_int * len(LIVE))()
    library().fakehip_count_live(counts)
    return dict(zip(LIVE, counts, strict=True))


def check() -> None:
    """Raises the first error the emulator found since the last check, and forgets all."""
    from fakehip.bridge import log

    errors = list(log.errors)
    log.clear()
    if errors:
        raise errors[0]


# ------------------------------------------------------------------------------------ device memory
_RELAXED = 2  # hipStreamCaptureModeRelaxed


class DeviceArray:
    """An array in device memory that DLPack consumers take for ROCm's; freed with its last view.

    `strides`, in bytes, are positive; without them it is C-contiguous. Its memory ends with its
    last element, and no kernel may read the bytes between elements.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        device: int = 0,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.shape, self.dtype, self.device = shape, np.dtype(dtype), device
        self.strides = strides or _contiguous(shape, self.dtype.itemsize)
        last = sum((n - 1) * step for n, step in zip(shape, self.strides, strict=True))
        self.nbytes = 0 if 0 in shape else last + self.dtype.itemsize
        self._address = ctypes.c_void_p()
        with on_device(device):
            call("hipMalloc", ctypes.byref(self._address), ctypes.c_size_t(self.nbytes))

    @property
    def address(self) -> int:
        """The device address; 0 when there are no bytes."""
        return self._address.value or 0

    def set(self, array: NDArray[Any], where: NDArray[np.bool_] | None = None) -> DeviceArray:
        """Copies `array` in; elements outside the mask `where` are there but may not be read."""
        assert array.shape == self.shape and array.dtype == self.dtype
        image = np.full(self.nbytes, 0xFF, np.uint8)
        np.ndarray(self.shape, self.dtype, image.data, 0, self.strides)[...] = array
        n = ctypes.c_size_t(self.nbytes)
        call("hipMemcpyHtoD", self._address, ctypes.c_void_p(image.ctypes.data), n)
        if where is not None or self.strides != _contiguous(self.shape, self.dtype.itemsize):
            self._forbid(np.broadcast_to(True if where is None else where, self.shape))
        return self

    def _forbid(self, where: NDArray[np.bool_]) -> None:
        forbidden = np.ones(self.nbytes, bool)
        shape, strides = (*self.shape, self.dtype.itemsize), (*self.strides, 1)
        np.ndarray(shape, bool, forbidden.data, 0, strides)[...] = ~where[..., None]
        edges = np.flatnonzero(np.diff(np.r_[False, forbidden, False]))
        for start, stop in edges.reshape(-1, 2).tolist():
            at = ctypes.c_void_p(self.address + start)
            call("fakehip_forget", at, ctypes.c_size_t(stop - start))

    def numpy(self) -> NDArray[Any]:
        """A copy on the host, of all work done before."""
        image = np.empty(self.nbytes, np.uint8)
        n = ctypes.c_size_t(self.nbytes)
        with on_device(self.device):
            call("hipMemcpyDtoH", ctypes.c_void_p(image.ctypes.data), self._address, n)
        return np.ndarray(self.shape, self.dtype, image.data, 0, self.strides)

    def __del__(self) -> None:
        # Collected whenever: relaxed, as allocators free, so that no capture under way is spoilt.
        if self.address and _folder is not None:
            mode = ctypes.c_int(_RELAXED)
            with on_device(self.device):
                library().hipThreadExchangeStreamCaptureMode(ctypes.byref(mode))
                library().hipFree(self._address)
                library().hipThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_ROCM, self.device)

    def __dlpack__(self, **options: Any) -> Any:
        return _capsule(self)


def to_device(
    array: NDArray[Any], device: int = 0, *, where: NDArray[np.bool_] | None = None
) -> DeviceArray:
    """`array`, its strides included, on a device; kernels may read what is in the mask `where`."""
    return DeviceArray(array.shape, array.dtype, device, array.strides).set(array, where)


def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes."""
    return tuple(itemsize * int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))


@contextmanager
def on_device(device: int) -> Iterator[None]:
    """The device as the thread's current one meanwhile."""
    before = ctypes.c_int()
    call("hipGetDevice", ctypes.byref(before))
    call("hipSetDevice", device)
    try:
        yield
    finally:
        call("hipSetDevice", before)


# ------------------------------------------------------------------------------------------ DLPack
_ROCM = 10
_CODES = {"i": 0, "u": 1, "f": 2}
_NAMES = {"bfloat16": 4, "float8_e4m3fn": 10, "float8_e4m3fnuz": 11, "float8_e5m2": 12}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    ]


_exported: dict[int, tuple[DeviceArray, _Tensor, Any]] = {}  # by address of the managed tensor


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(address: int) -> None:
    _exported.pop(address)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _drop(capsule: int) -> None:
    """The capsule's destructor: nobody took the tensor out of it, unless it was renamed."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    valid = ctypes.pythonapi.PyCapsule_IsValid
    pointer.restype = ctypes.c_void_p
    pointer.argtypes = valid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    if valid(capsule, b"dltensor"):
        _delete(pointer(capsule, b"dltensor"))


def _capsule(array: DeviceArray) -> Any:
    """A DLManagedTensor that keeps the array alive until its consumer deletes it."""
    n = len(array.shape)
    strides = [step // array.dtype.itemsize for step in array.strides]
    numbers = (ctypes.c_int64 * (2 * n))(*array.shape, *strides)
    pointer = ctypes.POINTER(ctypes.c_int64)
    tensor = _Tensor(
        array.address,
        _ROCM,
        array.device,
        n,
        _NAMES.get(array.dtype.name, _CODES.get(array.dtype.kind, 255)),
        array.dtype.itemsize * 8,
        1,
        ctypes.cast(numbers, pointer),
        ctypes.cast(ctypes.addressof(numbers) + 8 * n, pointer),
        0,
        None,
        _delete,
    )
    _exported[ctypes.addressof(tensor)] = (array, tensor, numbers)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
    )
    return new(ctypes.addressof(tensor), b"dltensor", ctypes.cast(_drop, ctypes.c_void_p))


def tools() -> list[str]:
    """The programs the emulator and the libraries need that are not on PATH."""
    needed = {
        "cc": ("cc",),
        "clang": ("clang-22", "clang"),
        "llvm-objdump": ("llvm-objdump-22", "llvm-objdump"),
        "ld.lld": ("ld.lld-22", "ld.lld"),
    }
    return [name for name, names in needed.items() if not any(map(shutil.which, names))]
