"""Deliberately broken kernels are caught; their repaired twins pass."""

import numpy as np
import pytest

import emulator
from emulator.support import ARCHS, compile_text, make

STRICT = dict(strict_waits=True)


def arrays():
    return np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "mode", [dict(), dict(schedule="serial"), dict(schedule="serial", seed=7)], ids=str
)
@pytest.mark.parametrize("name", ["no_barrier", "reuse_without_barrier"])
def test_missing_barrier(arch, name, mode):
    x, y = arrays()
    _, m = make(arch, "broken.hip", x, y, **mode)
    with pytest.raises(emulator.LdsRaceError, match="LDS race"):
        m.kernels[name].launch(1, 256, [x, y])
    _, m = make(arch, "broken.hip", x, y, flags=("-DFIXED=1",), **mode)
    m.kernels[name].launch(1, 256, [x, y])
    want = x[::-1] if name == "no_barrier" else 2 * np.roll(x, -64) + 1
    assert (y == want).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_out_of_bounds(arch):
    _x, y = arrays()
    n = 100
    small = np.arange(n, dtype=np.uint32)
    _, m = make(arch, "broken.hip", small, y)
    with pytest.raises(
        emulator.AccessError, match=r"(?s)4 bytes past the end.*read_past_end.*lane 36"
    ) as e:
        m.kernels["read_past_end"].launch(1, 256, [small, y, n])
    assert "global_load" in str(e.value)
    with pytest.raises(emulator.AccessError, match=r"(?s)write of 4 bytes.*past the end"):
        m.kernels["write_past_end"].launch(1, 256, [small, n])
    frozen = np.arange(64, dtype=np.uint32)
    frozen.flags.writeable = False
    m.device.register(frozen, label="weights")
    with pytest.raises(emulator.AccessError, match="weights is read-only"):
        m.kernels["write_const"].launch(1, 64, [frozen])
    with pytest.raises(
        emulator.LdsAccessError, match=r"offset 1024 of 1024, lane 60 \(wave slot 3\)"
    ):
        m.kernels["lds_past_end"].launch(1, 256, [y, 4])
    _, m = make(arch, "broken.hip", small, y, flags=("-DFIXED=1",))
    m.kernels["read_past_end"].launch(1, 256, [small, y, n])
    m.kernels["write_past_end"].launch(1, 256, [small, n])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["no_vm_wait", "no_lds_wait", "no_smem_wait"])
def test_missing_wait(arch, name):
    x, y = arrays()
    _, m = make(arch, "broken.hip", x, y, **STRICT)
    with pytest.raises(emulator.WaitHazardError, match="missing s_waitcnt"):
        m.kernels[name].launch(1, 64, [x, y])
    _, m = make(arch, "broken.hip", x, y, flags=("-DFIXED=1",), **STRICT)
    m.kernels[name].launch(1, 64, [x, y])
    want = {"no_vm_wait": x[:64] + 1, "no_lds_wait": x[:64] + 1, "no_smem_wait": np.zeros(64)}[name]
    assert (y[:64] == want).all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("schedule", ["lockstep", "serial"])
def test_missing_wait_before_barrier(arch, schedule):
    x, y = arrays()
    _, m = make(arch, "broken.hip", x, y, schedule=schedule, **STRICT)
    with pytest.raises(emulator.LdsRaceError):
        m.kernels["no_wait_before_barrier"].launch(1, 128, [x, y])
    _, m = make(arch, "broken.hip", x, y, flags=("-DFIXED=1",), schedule=schedule, **STRICT)
    m.kernels["no_wait_before_barrier"].launch(1, 128, [x, y])
    assert (y[:128] == x[:128][::-1]).all()


def test_endless_loop():
    y = np.zeros(2, np.uint32)
    _, m = make("gfx942", "broken.hip", y, max_instructions=20000)
    with pytest.raises(emulator.DeadlockError):
        m.kernels["endless"].launch(1, 64, [y])


def test_uninitialised_global_and_launch_errors():
    x, y = arrays()
    d, m = make("gfx942", "broken.hip", y)
    fresh = np.zeros(256, np.uint32)
    d.register(fresh, initialised=False, label="fresh")
    with pytest.raises(emulator.UninitialisedError, match="fresh"):
        m.kernels["read_past_end"].launch(1, 64, [fresh, y, 64])
    with pytest.raises(emulator.LaunchError):
        m.kernels["write_const"].launch(1, 128, [x])
    with pytest.raises(emulator.LaunchError):
        m.kernels["write_const"].launch(1, 64, [x, x])


def test_unregistered_pointer():
    x = np.zeros(64, np.uint32)
    _, m = make("gfx942", "broken.hip")
    with pytest.raises(emulator.AccessError):
        m.kernels["write_const"].launch(1, 64, [x])


@pytest.mark.parametrize("arch", ARCHS)
def test_uninitialised_lds(arch):
    y = np.zeros(64, np.uint32)
    _, m = make(arch, "broken.hip", y, uninitialised=True)
    with pytest.raises(emulator.UninitialisedError, match="LDS read"):
        m.kernels["lds_unwritten"].launch(1, 64, [y])
    _, m = make(arch, "broken.hip", y, flags=("-DFIXED=1",), uninitialised=True)
    m.kernels["lds_unwritten"].launch(1, 64, [y])
    assert (y == np.arange(64)).all()


@pytest.mark.parametrize("schedule", ["lockstep", "serial"])
def test_misaligned_accesses_do_not_race(schedule):
    """8-byte LDS writes at 8 t + 4: waves share aligned 8-byte granules but no byte."""
    text = """#include "hipmin.h"
KERNEL(256) k(u32x2 *y)
{
    SHARED u32 s[520];
    u32 a = 8 * TID + 4;
    u32x2 v = {TID, ~TID}, r;
    asm volatile("ds_write_b64 %1, %2\\n s_waitcnt lgkmcnt(0)\\n s_barrier\\n"
                 "ds_read_b64 %0, %3\\n s_waitcnt lgkmcnt(0)"
                 : "=&v"(r) : "v"(a), "v"(v), "v"(8 * (255 - TID) + 4), "v"(&s[0]));
    y[TID] = r;
}
KERNEL(256) race(u32 *y)
{
    SHARED u32 s[520];
    asm volatile("ds_write_b64 %0, %1\\n s_waitcnt lgkmcnt(0)"
                 :: "v"(4 * TID + 4), "v"((u64)TID), "v"(&s[0]));
    y[TID] = 1;
}
"""
    y = np.zeros((256, 2), np.uint32)
    d = emulator.Device("gfx942", schedule=schedule, strict_waits=True)
    m = d.load(compile_text(text, "gfx942"))
    d.register(y)
    m.kernels["k"].launch(1, 256, [y])
    assert (y[:, 0] == np.arange(256)[::-1]).all()
    with pytest.raises(emulator.LdsRaceError):
        m.kernels["race"].launch(1, 256, [y])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("schedule", ["lockstep", "serial"])
def test_read_in_flight_at_a_barrier(arch, schedule):
    """Its LDS may be overwritten behind the barrier, which matters if the result is used."""
    x, y = arrays()
    options = {**STRICT, "schedule": schedule}
    _, m = make(arch, "broken.hip", x, y, **options)
    with pytest.raises(emulator.LdsRaceError):
        m.kernels["read_in_flight_at_barrier"].launch(1, 128, [x, y])
    for flag in ("-DFIXED=1", "-DUSED=0"):
        _, m = make(arch, "broken.hip", x, y, flags=(flag,), **options)
        m.kernels["read_in_flight_at_barrier"].launch(1, 128, [x, y])
