"""The Python half of the stand-in libamdhip64: its modules are the emulator's, its launches too.

The library imports this module in the host process when the first code object is loaded and calls
the functions of `_Bridge`. Tests read and set what is below.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import traceback
from dataclasses import dataclass, field
from typing import Any

import emulator
import numpy as np
from emulator.codeobject import CodeObject, unbundle
from emulator.memory import Region

N_ARGUMENT_MAX = 64
SUCCESS, INVALID_IMAGE, NO_BINARY, NOT_FOUND, LAUNCH_FAILURE = 0, 200, 209, 500, 719

# Options of every launch (emulator.machine.Options). Strict by default.
options: dict[str, Any] = {"strict_waits": True, "batch_waves": 256}


@dataclass
class Report:
    """One launch that has run; kernels of one name may be in several modules."""

    kernel: emulator.Kernel
    grid: tuple[int, ...]
    block: tuple[int, ...]
    lds: int
    stats: emulator.Stats


@dataclass
class Log:
    """What happened since `clear`: launches that ran, and why others failed."""

    launches: list[Report] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def clear(self) -> None:
        self.launches.clear()
        self.errors.clear()


log = Log()


class _Function(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_uint32) for name in ("lds", "scratch", "n_kernarg", "n_thread_max")],
        ("n_vgpr", ctypes.c_uint32),
        ("n_argument", ctypes.c_uint32),
        ("arguments", ctypes.c_uint32 * 2 * N_ARGUMENT_MAX),
    ]


class _Range(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_uint64),
        ("data", ctypes.c_void_p),
        ("written", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("module", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("lds", ctypes.c_uint32),
        ("n_kernarg", ctypes.c_uint32),
        ("kernarg", ctypes.c_void_p),
        ("ranges", ctypes.POINTER(_Range)),
        ("n_range", ctypes.c_uint64),
    ]


class _Bridge(ctypes.Structure):
    _fields_ = [
        (
            "load",
            ctypes.CFUNCTYPE(
                ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64)
            ),
        ),
        ("unload", ctypes.CFUNCTYPE(None, ctypes.c_uint64)),
        (
            "function",
            ctypes.CFUNCTYPE(
                ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p, ctypes.POINTER(_Function)
            ),
        ),
        ("launch", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))),
    ]


modules: dict[int, emulator.Module] = {}  # what the host has loaded; tests may mutate kernels


def _image(address: int) -> bytes:
    """The bytes of a code object or bundle at `address`, whose length only its headers tell."""
    if ctypes.string_at(address, 4) == b"\x7fELF":
        header = ctypes.string_at(address, 64)
        start, n_section = struct.unpack_from("<Q", header, 40)[0], header[60:62]
        return ctypes.string_at(address, start + 64 * int.from_bytes(n_section, "little"))
    if ctypes.string_at(address, 24) == b"__CLANG_OFFLOAD_BUNDLE__":
        n, at, end = int.from_bytes(ctypes.string_at(address + 24, 8), "little"), address + 32, 0
        for _ in range(n):
            offset, size, n_name = struct.unpack("<QQQ", ctypes.string_at(at, 24))
            at, end = at + 24 + n_name, max(end, offset + size)
        return ctypes.string_at(address, end)
    return b""


def _load(address: int, arch: bytes, module: Any) -> int:
    image = unbundle(_image(address), arch.decode())
    if image is None:
        return NO_BINARY
    try:
        code = CodeObject(image)
    except (emulator.CodeObjectError, struct.error, IndexError):
        return INVALID_IMAGE
    if code.machine != arch.decode() or code.needs_xnack:
        return NO_BINARY
    key = max(modules, default=0) + 1
    modules[key] = emulator.Device(arch.decode()).load(image)
    module[0] = key
    return SUCCESS


def _unload(module: int) -> None:
    modules.pop(module)


def _function(module: int, name: bytes, function: Any) -> int:
    kernel = modules[module].kernels.get(name.decode())
    if kernel is None:
        return NOT_FOUND
    info, out = kernel.info, function[0]
    explicit = [a for a in info.args if not a[".value_kind"].startswith("hidden_")]
    out.lds, out.scratch, out.n_kernarg = info.lds_size, info.scratch_size, info.kernarg_size
    out.n_thread_max, out.n_vgpr = info.max_workgroup_size, info.metadata.get(".vgpr_count", 0)
    out.n_argument = len(explicit)
    for slot, argument in zip(out.arguments, explicit, strict=False):
        slot[:] = argument[".offset"], argument[".size"]
    return SUCCESS


def _bytes_at(address: int, size: int) -> Any:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


def _launch(launch: Any) -> int:
    call = launch[0]
    module = modules[call.module]
    kernel = module.kernels[call.name.decode()]
    regions = []
    for i in range(call.n_range):
        r = call.ranges[i]
        written = _bytes_at(r.written, r.size).view(bool) if r.written else None
        label = f"allocation of {r.size} bytes at {r.at:#x}"
        regions.append(Region(r.at, _bytes_at(r.data, r.size), True, label, written))
    grid, block = tuple(call.grid), tuple(call.block)
    kernarg = ctypes.string_at(call.kernarg, call.n_kernarg)
    with module.device.memory.also(regions):
        stats = kernel.launch(grid, block, kernarg, call.lds, **options)
    log.launches.append(Report(kernel, grid, block, call.lds, stats))
    return SUCCESS


def _guarded(function: Any, failed: int) -> Any:
    """A function that C, which holds its lock, may call; exceptions are kept and printed."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except emulator.EmulatorError as error:
            log.errors.append(error)
            print(f"fakehip: {type(error).__name__}: {error}", file=sys.stderr)
        except BaseException as error:
            log.errors.append(error)
            traceback.print_exc()
        return failed

    return call


_bridge = _Bridge()


def connect(library: str) -> None:
    """Gives the library at that path the functions above."""
    functions = {"load": _load, "unload": _unload, "function": _function, "launch": _launch}
    for (name, kind), function in zip(_Bridge._fields_, functions.values(), strict=True):
        setattr(_bridge, name, kind(_guarded(function, LAUNCH_FAILURE)))
    ctypes.CDLL(library).fakehip_connect(ctypes.byref(_bridge))
