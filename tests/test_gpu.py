"""The table's small cases on AMD GPUs of three kinds, without one: the project's host code and its
kernels, compiled by clang, over the stand-in runtime and the emulator.

A kernel fails here that reads a byte nothing wrote (a pad, a row that does not count, a fresh
workspace), touches memory outside a tensor, uses a register or LDS byte before it arrives, or whose
result depends on the order of waves or workgroups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fakehip
import moepad
import numpy as np
import pytest
from cases import CASES, Call, Case, build, pad, solution, solve
from fakehip import bridge
from moepad.testing import check_bits, check_close

Masks = dict[str, np.ndarray]

SMALL = [case for case in CASES if case.size == "small" and case.n_hidden % 8 == 0]
# Kernels of each regime and their tails, for what takes long.
REGIMES = [
    case
    for case in SMALL
    if case.name in ("silu-everything", "strided-everything", "m33", "m65", "map-skipped")
]


TURNS = list(itertools.product(range(len(fakehip.ARCHS)), ("bf16", "f16")))


@pytest.fixture(scope="module", params=fakehip.ARCHS)
def device(request: pytest.FixtureRequest, emulated: None) -> int:
    return fakehip.ARCHS.index(request.param)


@contextmanager
def emulating(**options: Any) -> Iterator[None]:
    """Options of the emulator meanwhile."""
    before = dict(bridge.options)
    bridge.options.update(options)
    try:
        yield
    finally:
        bridge.options.clear()
        bridge.options.update(before)


def run(call: Call, device: int, where: Masks | None = None) -> np.ndarray:
    """The result on a device, where tensors keep their strides and may be read within the masks."""
    masks = where or {}
    there = {
        name: fakehip.to_device(tensor, device, where=masks.get(name))
        for name, tensor in call.tensors().items()
    }
    out = fakehip.DeviceArray(call.hidden_states.shape, call.hidden_states.dtype, device)
    try:
        moepad.fused_moe(**{**call.options, **there}, out=out)
    finally:
        fakehip.check()
    return out.numpy()


def padded(call: Call, align: int) -> tuple[Call, Masks]:
    """The call on larger tensors, and masks of the elements that count."""
    _, n_hidden, n_inter = call.w2.shape
    n_inter_pad = -(-(n_inter + 1) // align) * align
    wide, zero = (
        pad(call, n_inter_pad, n_hidden_pad=n_hidden + 8, pattern=pattern)
        for pattern in ("nan", "zero")
    )
    blank = zero.tensors()
    return wide, {
        name: tensor.view(f"u{tensor.itemsize}") == blank[name].view(f"u{tensor.itemsize}")
        for name, tensor in wide.tensors().items()
    }


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in SMALL])
def test_equals_reference(case: Case, emulated: None) -> None:
    """Right on true tensors, and of the same bits on padded ones in another order of workgroups.

    Devices and types take turns over the cases.
    """
    device, dtype = TURNS[SMALL.index(case) % len(TURNS)]
    call = build(case, dtype)
    result = run(call, device)
    check_close(result, *solve(case, dtype))
    with emulating(seed=1):
        wide, where = padded(call, 64)
        out = run(wide, device, where)
    check_bits(np.ascontiguousarray(out[:, : case.n_hidden]), result)
    assert not out[:, case.n_hidden :].any()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in REGIMES])
def test_order_of_waves_makes_no_difference(case: Case, dtype: str, device: int) -> None:
    """Right on every device, and of the same bits with each wave alone from barrier to barrier."""
    call = build(case, dtype)
    result = run(call, device)
    check_close(result, *solve(case, dtype))
    with emulating(schedule="serial", seed=1):
        check_bits(run(call, device), result)


def flushed(call: Call) -> Call:
    """The call with float16's subnormals among weights and activations taken for zeros."""
    tensors = [call.hidden_states, call.w13, call.w2]
    tensors = [np.where(abs(tensor) < 2.0**-14, np.float16(0), tensor) for tensor in tensors]
    return Call(*tensors, call.topk_weights, call.topk_ids, call.options)


@pytest.mark.parametrize("n_token", [9, 65])
def test_float16_subnormals_count(n_token: int, device: int) -> None:
    """All but in the tiles of MI200, whose 16-bit matrix instructions take them for zeros."""
    call = build(Case("light", "", values="light", n_token=n_token), "f16")
    is_flushed = fakehip.ARCHS[device] == "gfx90a" and n_token * 2 > 128
    check_close(run(call, device), *solution(flushed(call) if is_flushed else call))
    if is_flushed:
        with pytest.raises(AssertionError):
            check_close(run(call, device), *solution(call))
