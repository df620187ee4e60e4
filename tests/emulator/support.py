"""Shared helpers: compile test kernels (cached per session) and bf16 conversions."""

import functools
import os
import pathlib
import subprocess
import tempfile

import numpy as np
from conftest import missing

from emulator import Device
from emulator.codeobject import find_tool
from emulator.errors import CodeObjectError

HERE = pathlib.Path(__file__).resolve().parent
ARCHS = ("gfx90a", "gfx942", "gfx950")


def clang():
    """A clang that knows AMDGPU, or `missing`."""
    try:
        return find_tool("clang")
    except CodeObjectError as error:
        missing("clang", str(error))


@functools.cache
def compile_hip(source, arch, *flags):
    """Code object bytes of a HIP file."""
    with tempfile.TemporaryDirectory() as tmp:
        out = os.path.join(tmp, "out.co")
        subprocess.run(
            [
                clang(),
                "-x",
                "hip",
                "--offload-device-only",
                "--offload-arch=" + arch,
                "-nogpuinc",
                "-nogpulib",
                "-O3",
                "--no-gpu-bundle-output",
                "-Wno-everything",
                "-I",
                str(HERE / "kernels"),
                *flags,
                "-o",
                out,
                str(source),
            ],
            check=True,
        )
        return pathlib.Path(out).read_bytes()


@functools.cache
def compile_text(text, arch, *flags):
    """Code object bytes of HIP source text."""
    with tempfile.NamedTemporaryFile("w", suffix=".hip") as f:
        f.write(text)
        f.flush()
        return compile_hip(f.name, arch, *flags)


def kernel_file(name):
    """Path of a kernel source in tests/kernels."""
    return str(HERE / "kernels" / name)


def make(arch, source, *arrays, flags=(), **options):
    """(device, module) with the arrays registered."""
    d = Device(arch, **options)
    m = d.load(compile_hip(kernel_file(source), arch, *flags))
    for a in arrays:
        d.register(a)
    return d, m


def to_bf16(x):
    u = np.asarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(u):
    return (u.astype(np.uint32) << 16).view(np.float32)
