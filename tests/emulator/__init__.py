"""An instruction-level emulator of AMD CDNA GPUs (gfx90a, gfx942, gfx950).

device = Device("gfx942")
module = device.load(open("kernel.co", "rb").read())
device.register(x)
module.kernels["k"].launch(grid=(4, 1, 1), block=(256, 1, 1), args=[x, x.size])
"""

from .errors import (
    AccessError,
    CodeObjectError,
    DeadlockError,
    EmulatorError,
    ExecutionError,
    LaunchError,
    LdsAccessError,
    LdsRaceError,
    UninitialisedError,
    WaitHazardError,
)
from .machine import Device, Kernel, Module, Options, Stats

__all__ = [
    "AccessError",
    "CodeObjectError",
    "DeadlockError",
    "Device",
    "EmulatorError",
    "ExecutionError",
    "Kernel",
    "LaunchError",
    "LdsAccessError",
    "LdsRaceError",
    "Module",
    "Options",
    "Stats",
    "UninitialisedError",
    "WaitHazardError",
]
