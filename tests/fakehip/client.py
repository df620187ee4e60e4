"""A few lines of ctypes over HIP's module interface, for the tests of the stand-ins themselves."""

from __future__ import annotations

import ctypes
from typing import Any

import fakehip

INT, SIZE, POINTER = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p


def compile_source(source: str, arch: str, *options: str) -> bytes:
    """A code object from hipRTC; RuntimeError with the log if it has none."""
    rtc = fakehip.library("hiprtc")
    program, n = POINTER(), SIZE()
    made = rtc.hiprtcCreateProgram(
        ctypes.byref(program), source.encode(), b"test.hip", 0, None, None
    )
    if made:
        raise RuntimeError(f"hiprtcCreateProgram returned {made}")
    texts = [f"--offload-arch={arch}".encode(), *(text.encode() for text in options)]
    failed = rtc.hiprtcCompileProgram(program, len(texts), (ctypes.c_char_p * len(texts))(*texts))
    size, get = (
        (rtc.hiprtcGetProgramLogSize, rtc.hiprtcGetProgramLog)
        if failed
        else (rtc.hiprtcGetCodeSize, rtc.hiprtcGetCode)
    )
    size(program, ctypes.byref(n))
    out = ctypes.create_string_buffer(n.value)
    get(program, out)
    rtc.hiprtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(out.value.decode())
    return out.raw


class Module:
    """A loaded code object; `functions[name]` are handles."""

    def __init__(self, code: bytes) -> None:
        self.handle = POINTER()
        fakehip.call("hipModuleLoadData", ctypes.byref(self.handle), code)

    def __getitem__(self, name: str) -> POINTER:
        function = POINTER()
        fakehip.call("hipModuleGetFunction", ctypes.byref(function), self.handle, name.encode())
        return function

    def unload(self) -> None:
        fakehip.call("hipModuleUnload", self.handle)


def launch(
    function: POINTER, grid: int, block: int, *arguments: Any, lds: int = 0, stream: Any = None
) -> None:
    """Arguments: DeviceArray (its address), int (int32), float (float32), or a ctypes value."""
    values = [_value(argument) for argument in arguments]
    pointers = (POINTER * max(len(values), 1))(*map(ctypes.addressof, values))
    fakehip.call(
        "hipModuleLaunchKernel", function, grid, 1, 1, block, 1, 1, lds, stream, pointers, None
    )


def _value(argument: Any) -> Any:
    if isinstance(argument, fakehip.DeviceArray):
        return POINTER(argument.address)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return INT(argument) if isinstance(argument, int) else argument


def new_stream(flags: int = 1) -> POINTER:
    stream = POINTER()
    fakehip.call("hipStreamCreateWithFlags", ctypes.byref(stream), flags)
    return stream


def code_of(function: str, *arguments: Any) -> int:
    """What a HIP function returns."""
    return int(getattr(fakehip.library(), function)(*arguments))
