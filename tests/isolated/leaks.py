"""Fresh process: memory stays where it is over 20,000 calls of each kind, wrong ones included.

A leak of one small object a call would show as a megabyte or two.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import moepad
import numpy as np
from dlpack import Producer
from moepad import _core

N_CALL, N_WARM, LIMIT_BYTES = 20_000, 2_000, 512 * 1024
M, H, N, E, K = 2, 8, 4, 2, 2  # tokens, width, intermediate size, experts, slots

OPTIONS = {"n_inter": 3, "activation": "silu", "routed_scaling_factor": 2.5}
CALL = {
    "hidden_states": np.ones((M, H), np.float32),
    "w13": np.ones((E, 2 * N, H), np.float32),
    "w2": np.ones((E, H, N), np.float32),
    "topk_weights": np.ones((M, K), np.float32),
    "topk_ids": np.zeros((M, K), np.int32),
}
OUT = np.empty((M, H), np.float32)
LARGE = np.ones((M, 1024 * 1024), np.float32)[:, ::2]


class Large:
    """Each time another int, of a size that Python makes anew."""

    def __index__(self) -> int:
        return int("9" * 15)


class Refusing:
    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("no")


def call(**change: Any) -> Callable[[], object]:
    arguments = {**CALL, **change}
    return lambda: moepad.fused_moe(**arguments)


def wrong(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        try:
            function()
        except (TypeError, ValueError, moepad.UnsupportedError):
            return
        raise AssertionError("was to fail")

    return run


class Capsule:
    """NumPy's own capsules: those of tests/dlpack.py hold on to what they hand out."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


CASES: dict[str, Callable[[], object]] = {
    "new out": call(**OPTIONS),
    "given out": call(out=OUT),
    "in place": call(out=CALL["hidden_states"]),
    "capsules": call(**{name: Capsule(array) for name, array in CALL.items()}, out=Capsule(OUT)),
    "n_token array": call(n_token=np.array([1])),
    "workspace buffer": wrong(call(workspace=bytearray(16))),
    "workspace_nbytes": lambda: moepad.workspace_nbytes(**CALL),
    "time": lambda: _core.time_fused_moe(1, **CALL),
    "wrong kind": wrong(call(w2=[1])),
    "wrong shape": wrong(call(w2=np.ones((E, H, 1), np.float32))),
    "wrong out": wrong(call(out=np.ones((M, 1), np.float32))),
    "wrong id": wrong(call(topk_ids=np.full((M, K), 9))),
    "wrong name": wrong(call(activation="relu")),
    "wrong number": wrong(call(n_inter=2**70)),
    "wrong index": wrong(call(n_inter=Large())),
    "wrong capsule": wrong(call(w2=Capsule(np.ones(3, np.float32)))),
    "wrong producer": wrong(call(w2=Refusing())),
    "unknown": wrong(call(no_such_argument=1)),
    "unsupported": wrong(call(layout="shuffled")),
    "wrong quant": wrong(call(quant="mxfp4")),
    "plan": lambda: moepad.plan(4096, 1536, 128, quant="fp8_block", tp_size=8, tp_rank=3),
    "wrong plan": wrong(lambda: moepad.plan(4096, 1536, 128, tp_rank=3)),
    "padding size": lambda: moepad.get_moe_padding_size(False),
    "weight sizes": lambda: moepad.get_moe_weight_sizes(70_000, True, True, True),
    "weight sizes of an index": lambda: moepad.get_moe_weight_sizes(Large(), True, True, True),
    "large weight sizes": lambda: moepad.get_moe_weight_sizes(2**80, True, True, True),
    "wrong weight sizes": wrong(lambda: moepad.get_moe_weight_sizes(-1, True, True, True)),
    "copy": lambda: _core.copy(OUT, CALL["hidden_states"]),
    "copy, transposed": lambda: _core.copy(OUT.T, CALL["hidden_states"].T),
    "wrong copy": wrong(lambda: _core.copy(OUT, LARGE)),
    "sets": lambda: (_core.set_cpu_isa(None), _core.cpu_isas(), _core.set_num_threads(0)),
    "wrong sets": wrong(lambda: _core.set_cpu_isa("none")),
}


def add_torch() -> None:
    import torch

    class NoExchange(torch.Tensor):
        __dlpack_c_exchange_api__ = None

    tensors = {name: torch.from_numpy(array) for name, array in CALL.items()}
    grad = tensors["w2"].clone().requires_grad_()
    old = {name: tensor.as_subclass(NoExchange) for name, tensor in tensors.items()}

    def without_grad(function: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(function)  # type: ignore[no-any-return]

    CASES["torch"] = call(**tensors)
    CASES["torch, given out"] = call(**tensors, out=torch.empty(M, H))
    CASES["torch without exchange API"] = call(**old)
    CASES["torch under no_grad"] = without_grad(call(**{**tensors, "w2": grad}))
    CASES["old torch under no_grad"] = without_grad(
        call(**{**old, "w2": grad.as_subclass(NoExchange)})
    )
    CASES["torch with grad"] = wrong(call(**{**tensors, "w2": grad}))


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(function: Callable[[], object]) -> int:
    for _ in range(N_WARM):
        function()
    gc.collect()
    before = resident_bytes()
    for _ in range(N_CALL):
        function()
    gc.collect()
    return resident_bytes() - before


def main() -> int:
    if "torch" in sys.argv[1:]:
        CASES.clear()
        add_torch()
    # Once more for what grew: a heap may still take its shape during a first pass.
    grown = {name: growth(function) for name, function in CASES.items()}
    large = [name for name, n_bytes in grown.items() if n_bytes > LIMIT_BYTES]
    still = {name: n_bytes for name in large if (n_bytes := growth(CASES[name])) > LIMIT_BYTES}
    print(f"{len(CASES)} cases; most in one: {max(grown.values())} bytes")
    for name, n_bytes in still.items():
        print(f"{name}: {n_bytes} bytes more after {N_CALL} calls")
    leaking = Producer(np.ones((E, H, N), np.float32))
    caught = growth(call(w2=leaking)) > LIMIT_BYTES if "torch" not in sys.argv[1:] else True
    print(f"a producer that keeps what it hands out is seen: {caught}")
    return 1 if still or not caught else 0


if __name__ == "__main__":
    sys.exit(main())
