"""The host's side of a call on one NVIDIA or AMD GPU, through PyTorch: first use, then every use.

    python bench/host.py

`first use` is the first call of a process with an empty cache of device images, `second process`
the same call of a new process: milliseconds, with the runtime's own start before them left out.
`a call` is the time until `fused_moe` returns, its kernels queued, beside what one of PyTorch's
smallest operations takes on the same way: medians of microseconds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import moepad
import torch

DTYPES = ("bfloat16", "float16")
N_HIDDEN, N_INTER, N_EXPERT, N_TOPK = 64, 32, 8, 2
DECODE_TOKENS, PREFILL_TOKENS = 1, 512
N_CALL = 2000


def layer(n_token: int, dtype: str) -> dict[str, Any]:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device="cuda", dtype=getattr(torch, dtype))

    return {
        "hidden": ones(n_token, N_HIDDEN),
        "w13": ones(N_EXPERT, 2 * N_INTER, N_HIDDEN),
        "w2": ones(N_EXPERT, N_HIDDEN, N_INTER),
        "topk_weights": torch.ones(n_token, N_TOPK, device="cuda"),
        "topk_ids": torch.zeros(n_token, N_TOPK, device="cuda", dtype=torch.int32),
    }


def first_call(dtype: str) -> None:
    """Prints the milliseconds of this process's first call."""
    tensors = list(layer(DECODE_TOKENS, dtype).values())
    torch.cuda.synchronize()
    start = time.perf_counter()
    moepad.fused_moe(*tensors)
    torch.cuda.synchronize()
    print(1e3 * (time.perf_counter() - start))


def in_new_process(dtype: str, cache: str) -> float:
    command = [sys.executable, __file__, dtype]
    environment = {**os.environ, "MOEPAD_CACHE": cache}
    return float(subprocess.check_output(command, env=environment, text=True))


def microseconds(run: Callable[[], object]) -> float:
    times = []
    for i in range(N_CALL):
        if i % 100 == 0:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


def every_call(n_token: int) -> None:
    tensors = layer(n_token, "bfloat16")
    arrays = list(tensors.values())
    size = moepad.workspace_nbytes(
        tensors["hidden"], **{k: v for k, v in tensors.items() if k != "hidden"}
    )
    options = {
        "out": torch.empty_like(tensors["hidden"]),
        "workspace": torch.empty(size, device="cuda", dtype=torch.uint8),
        "stream": torch.cuda.current_stream().cuda_stream,
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        moepad.fused_moe(*arrays, **options)
        torch.cuda.synchronize()
    n_launch = sum(event.count for event in profile.key_averages() if event.device_time > 0)
    small = torch.ones(1, device="cuda")
    launch = microseconds(lambda: small.zero_())
    print(
        f"{n_token} tokens: a call {microseconds(lambda: moepad.fused_moe(*arrays, **options)):.2f}"
        f" µs, own workspace {microseconds(lambda: moepad.fused_moe(*arrays)):.2f} µs,"
        f" {n_launch} kernels; one zero_ of torch {launch:.2f} µs"
    )


def main() -> int:
    if len(sys.argv) == 2:
        first_call(sys.argv[1])
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, moepad {moepad.__version__}")
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as cache:
            first = in_new_process(dtype, cache)
            again = [in_new_process(dtype, cache) for _ in range(3)]
        print(
            f"{dtype}: first use {first:.0f} ms, second process {statistics.median(again):.1f} ms"
        )
    every_call(DECODE_TOKENS)
    every_call(PREFILL_TOKENS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
