"""Loading a layer's experts to a GPU: GB/s beside a copy of pinned memory, and every bit right.

    python bench/load.py [--device cuda:0] [--folder /dev/shm]

The checkpoint is made first, of random bytes, one file of Qwen3-30B's experts; it is read from the
page cache, so that the disk does not count. Needs PyTorch for the plain copy only.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import moepad
import numpy as np
import torch
from moepad.devices import on_host
from safetensors.numpy import save_file

N_HIDDEN, N_INTER, N_EXPERT = 2048, 768, 128
PREFIX = "model.layers.0.mlp.experts"
N_RUN = 5


def write_checkpoint(path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"gate_proj": (N_INTER, N_HIDDEN), "up_proj": (N_INTER, N_HIDDEN)}
    shapes["down_proj"] = (N_HIDDEN, N_INTER)
    tensors = {
        f"{PREFIX}.{e}.{name}.weight": rng.integers(0, 1 << 16, shape, np.uint16).view(
            ml_dtypes.bfloat16
        )
        for e in range(N_EXPERT)
        for name, shape in shapes.items()
    }
    save_file(tensors, path)


def seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(N_RUN):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--folder", help="where the checkpoint is made (default: TMPDIR)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.safetensors"
        write_checkpoint(path)
        plan = moepad.plan(N_HIDDEN, N_INTER, N_EXPERT, align=256)
        load = functools.partial(moepad.load_experts, path, PREFIX, plan, progress=False)
        there, here = load(device=options.device), load()
        for name in ("w13", "w2"):
            got, right = on_host(getattr(there, name)), getattr(here, name)
            assert got.tobytes() == right.tobytes(), name
        pinned = torch.empty(plan.nbytes, dtype=torch.uint8).pin_memory()
        target = torch.empty(plan.nbytes, dtype=torch.uint8, device=options.device)

        def plain() -> None:
            target.copy_(pinned, non_blocking=True)
            torch.cuda.synchronize()

        runs: dict[str, Callable[[], object]] = {
            "load_experts": functools.partial(load, device=options.device),
            "Experts.update": functools.partial(there.update, path, progress=False),
            "load_experts to the host": load,
            "plain copy of pinned memory": plain,
        }
        print(f"{torch.cuda.get_device_name()}, {plan.nbytes / 1e9:.2f} GB, bits equal")
        for name, run in runs.items():
            print(f"  {name:<30}{plan.nbytes / 1e9 / seconds(run):8.2f} GB/s")


if __name__ == "__main__":
    main()
