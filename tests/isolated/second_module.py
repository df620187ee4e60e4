"""Fresh process: the module imported twice has two states, and neither minds the other's end."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import weakref
from types import ModuleType
from typing import Any

import moepad
import numpy as np


def load() -> ModuleType:
    """A new module object; the one in use is put aside."""
    kept = sys.modules.pop("moepad._core")
    module = importlib.import_module("moepad._core")
    sys.modules["moepad._core"] = kept
    moepad._core = kept  # importing sets the package's attribute
    return module


def use(module: Any) -> None:
    x, w13, w2 = np.ones((2, 8), np.float32), np.ones((2, 8, 8), np.float32), np.ones((2, 8, 4))
    ids, weights = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
    assert module.fused_moe(x, w13, w2.astype(np.float32), weights, ids).shape == (2, 8)
    with contextlib.suppress(TypeError):
        module.fused_moe(x, w13, w2, weights, ids)
    try:
        module.fused_moe(x, w13, w2.astype(np.float32), weights, ids, layout="shuffled")
    except module.UnsupportedError:
        return
    raise AssertionError("not the module's own exception")


def main() -> int:
    first = sys.modules["moepad._core"]
    use(first)
    for _ in range(20):
        second = load()
        assert second is not first
        assert second.UnsupportedError is not first.UnsupportedError
        use(second)
        parts = (second, second.UnsupportedError, second.DeviceError, second.CheckpointError)
        references = [weakref.ref(part) for part in parts]
        del second, parts
        gc.collect()
        assert not any(reference() for reference in references), "nobody has it, yet it is there"
        use(first)
    return 0


if __name__ == "__main__":
    sys.exit(main())
