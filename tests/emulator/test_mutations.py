"""Mistakes on purpose in a kernel like those of the project: each is found."""

import struct

import numpy as np
import pytest

from emulator import AccessError, Device, EmulatorError, LdsRaceError, UninitialisedError
from emulator.memory import Region
from emulator.support import ARCHS, compile_hip, from_bf16, kernel_file, to_bf16

MUTATIONS = {
    1: ("no mask where k ends", UninitialisedError),
    2: ("no mask where the columns end", AccessError),
    3: ("two lanes of the map swapped", AssertionError),
    4: ("two chunks of the map swapped", AssertionError),
    5: ("the swizzle forgotten on one side", (AssertionError, UninitialisedError)),
}
N, K, LD = 75, 136, 144


def region(array, label, where=True):
    """The array as memory in which only elements of the mask `where` have a value."""
    written = np.repeat(np.broadcast_to(where, array.shape).ravel(), array.itemsize)
    return Region(array.ctypes.data, array.reshape(-1).view(np.uint8), True, label, written)


class Run:
    """The kernel's operands; w ends at an odd row, k before its pad, two rows are skipped."""

    def __init__(self):
        rng = np.random.default_rng(3)
        real = np.arange(LD) < K
        self.x = np.where(real, to_bf16(rng.uniform(-1, 1, (20, LD))), 0x7FC0).astype(np.uint16)
        self.w = np.where(real, to_bf16(rng.uniform(-1, 1, (N, LD))), 0x7FC0).astype(np.uint16)
        self.rows = rng.permutation(20)[:16].astype(np.int32)
        self.rows[[3, 11]] = -1
        x = np.where((self.rows >= 0)[:, None], from_bf16(self.x[self.rows, :K]), 0)
        self.want = x.astype(float) @ from_bf16(self.w[:, :K]).astype(float).T
        squares = np.pad(self.want**2, ((0, 0), (0, 128 - N)))
        self.want_norms = squares.reshape(16, 8, 16).sum(2)

    def __call__(self, kernel, **options):
        out, norms = np.full((16, N), np.nan, np.float32), np.full((16, 8), np.nan, np.float32)
        arrays = {"x": self.x, "w": self.w, "rows": self.rows, "out": out, "norms": norms}
        valid = {"x": np.arange(LD) < K, "w": np.arange(LD) < K, "out": False, "norms": False}
        regions = [region(a, name, valid.get(name, True)) for name, a in arrays.items()]
        addresses = [a.ctypes.data for a in arrays.values()]
        args = struct.pack("<5Q4i", *addresses, N, K, LD, len(self.x))
        with kernel.module.device.memory.also(regions):
            stats = kernel.launch(2, 256, args, uninitialised=True, strict_waits=True, **options)
        assert np.allclose(out, self.want, atol=1e-4)
        assert np.allclose(norms, self.want_norms, rtol=1e-4, atol=1e-4)
        return stats


@pytest.fixture(scope="module")
def run():
    return Run()


def load(arch, *flags):
    code = compile_hip(kernel_file("moe.hip"), arch, "-std=c++17", *flags)
    return Device(arch).load(code).kernels["moe"]


@pytest.mark.parametrize("arch", ARCHS)
def test_right_kernel(arch, run):
    kernel = load(arch)
    for options in ({}, {"schedule": "serial", "seed": 1}, {"batch_waves": 4, "seed": 2}):
        run(kernel, **options)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: MUTATIONS[m][0])
def test_mistakes_in_the_source(arch, mutation, run):
    kernel, expected = load(arch, f"-DMUTATION={mutation}"), MUTATIONS[mutation][1]
    with pytest.raises(expected):
        run(kernel)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_barrier_is_needed(arch, run):
    kernel = load(arch)
    barriers = [inst for inst in kernel.instructions() if inst.name == "s_barrier"]
    assert barriers
    for inst in barriers:
        with kernel.without(inst), pytest.raises((LdsRaceError, UninitialisedError)):
            run(kernel)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_wait_is_needed(arch, run):
    """Every one, that is, before which something was in flight: clang also waits on each branch."""
    kernel = load(arch)
    busy = run(kernel).busy_waits
    waits = [inst for inst in kernel.instructions() if inst.addr in busy]
    assert len(waits) > 5
    for inst in waits:
        with kernel.without(inst), pytest.raises((EmulatorError, AssertionError)):
            run(kernel)
