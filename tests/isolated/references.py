"""Fresh process: after a call, right or wrong, every argument has as many references as before."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import moepad
import numpy as np
from moepad import _core

M, H, N, E, K = 2, 8, 4, 2, 2  # tokens, width, intermediate size, experts, slots


class Capsule:
    """Hands out NumPy's capsules."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


class Number:
    """An integer that is an object of its own, unlike the small ones Python keeps."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def arguments() -> dict[str, Any]:
    return {
        "hidden_states": np.ones((M, H), np.float32),
        "w13": np.ones((E, 2 * N, H), np.float32),
        "w2": np.ones((E, H, N), np.float32),
        "topk_weights": np.ones((M, K), np.float32),
        "topk_ids": np.zeros((M, K), np.int32),
        "w13_bias": np.ones((E, 2 * N), np.float32),
        "w2_bias": np.ones((E, H), np.float32),
        "expert_map": np.zeros(3, np.int32),
        "n_token": np.array([2]),
        "n_inter": Number(3),
        "n_hidden": Number(7),
        "activation": "".join(["ge", "lu"]),
        "gate_up": "".join(["con", "cat"]),
        "block": tuple([Number(1), Number(128)]),
        "swiglu_alpha": float("1.5"),
        "swiglu_limit": float("7.5"),
        "routed_scaling_factor": float("2.5"),
        "out": np.empty((M, H), np.float32),
    }


def wrongs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls that fail at every place in turn: each argument wrong in kind and in value."""
    for name in arguments():
        yield f"{name} of a wrong kind", {name: object()}
    for name in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids", "w13_bias", "w2_bias",
                 "expert_map", "n_token", "out"):  # fmt: skip
        yield f"{name} of a wrong shape", {name: np.ones((1, 1, 1, 1, 1), np.float32)}
        yield f"{name} of a wrong shape as a capsule", {name: Capsule(np.ones((9, 9), np.int8))}
    yield "a wrong id", {"topk_ids": np.full((M, K), 5, np.int32)}
    yield "a wrong name", {"activation": "".join(["re", "lu"])}
    yield "a wrong workspace", {"workspace": bytearray(8)}
    yield "an unknown argument", {"no_such": object()}
    yield "a wrong quant", {"quant": "".join(["mx", "fp4"])}


def rights() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "plain", {}
    yield "no out", {"out": None}
    yield "in place", {"out": (same := arguments()["hidden_states"]), "hidden_states": same}
    tensors = {k: v for k, v in arguments().items() if isinstance(v, np.ndarray)}
    yield "capsules", {name: Capsule(array) for name, array in tensors.items()}
    if "torch" in sys.argv[1:]:
        import torch

        yield "torch", {name: torch.from_numpy(array) for name, array in tensors.items()}


def check(function: Callable[..., Any], title: str, change: dict[str, Any], is_right: bool) -> int:
    call = {**arguments(), **change}
    held = [*call.values(), *(type(value) for value in call.values())]
    held += [value.dtype for value in call.values() if isinstance(value, np.ndarray)]

    def run() -> None:
        try:
            function(**call)
        except (TypeError, ValueError, moepad.UnsupportedError):
            assert not is_right, title
        else:
            assert is_right, title

    run()  # what is kept once, is kept from here on
    gc.collect()
    before = [sys.getrefcount(value) for value in held]
    for _ in range(10):
        run()
    gc.collect()
    after = [sys.getrefcount(value) for value in held]
    names = [*call, *(f"type of {name}" for name in call), *(f"dtype {i}" for i in range(99))]
    moved = [
        f"{title}: {name}: {a} references, then {b}"
        for name, a, b in zip(names, before, after, strict=False)
        if abs(b - a) >= 10
    ]
    print("\n".join(moved), end="\n" if moved else "")
    return len(moved)


def main() -> int:
    n_moved = 0
    for title, change in rights():
        n_moved += check(moepad.fused_moe, title, change, True)
        n_moved += check(moepad.workspace_nbytes, f"{title}, workspace_nbytes", change, True)
    for title, change in wrongs():
        n_moved += check(moepad.fused_moe, title, change, False)
    dst, src = np.zeros((3, 4), np.float32), np.ones((3, 4), np.float32)
    counts = sys.getrefcount(dst), sys.getrefcount(src)
    for _ in range(10):
        _core.copy(dst, src)
    n_moved += counts != (sys.getrefcount(dst), sys.getrefcount(src))
    return 1 if n_moved else 0


if __name__ == "__main__":
    sys.exit(main())
