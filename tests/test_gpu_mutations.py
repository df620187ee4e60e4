"""Mistakes on purpose in the project's own kernels: the tests of emulated GPUs find each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fakehip
import moepad
import numpy as np
import pytest
import test_gpu_quant as quantised
from cases import Call, Case, build, solution
from emulator import EmulatorError
from emulator.support import compile_text
from fakehip import bridge
from moepad import compiler
from moepad.testing import check_close
from test_gpu import Masks, emulating, padded, run

ARCH, DTYPE = "gfx942", "bf16"
DEVICE = fakehip.ARCHS.index(ARCH)
LOADED: list[Any] = []  # what a device has loaded stays in its memory
FAULTS = (EmulatorError, AssertionError, moepad.DeviceError)
# Few rows per expert, many, and most; odd sizes, so that tails and masks are at work.
CASES = {
    "decode": Case("mutated", "", n_token=48, n_hidden=136, n_inter=44),
    "middle": Case("mutated", "", n_token=65, n_hidden=136, n_inter=72),
    "prefill": Case("mutated", "", n_token=140, n_topk=1, n_expert=2, n_hidden=72, n_inter=40),
}
# And codes times weights as bytes, of scales that begin in the middle of a stage; of even numbers
# of stages, so that the last one leaves LDS reads on their way where the sums go next.
BYTES, BYTES_SIZE = quantised.Kind("fp8_block", {"dtype": "f8_e4m3fnuz"}, phase=64), (6, 2, 400, 96)
REGIMES = [*CASES, "bytes"]

# What is wrong, the kernels it is put into, the regime that meets it, the text before and after.
MISTAKES = [
    ("no mask where k ends", "gate_up_stream", "decode",
     r"load16_stream\(r\.b, at, left > 0\)", "load16_stream(r.b, at, true)"),
    ("no mask where the columns end", "gate_up_stream", "decode",
     r"any && column < a\.n_inter \?", "any ?"),
    ("two rows of the weights' lane map swapped", "gate_up_stream", "decode",
     r"(MPAD_MAP == 1 .*?weight_row\(int, int lane\)\s*\{\s*return) lane & 15;",
     r"\1 (lane & 15) ^ ((lane & 14) == 2);"),
    ("two chunks of the tokens' lane map swapped", "gate_up_stream", "decode",
     r"(MPAD_MAP == 1 .*?token_chunk\(int, int lane\)\s*\{\s*return) lane >> 4;",
     r"\1 lane >> 4 ^ (lane >> 5);"),
    ("the swizzle forgotten on one side", "gate_up_tile64", "middle",
     r"\(row \* 8 \+ \(chunk \^ \(row & 7\)\)\)", "(row * 8 + chunk)"),
    ("two rows of the tile's lane map swapped", "gate_up_bytes_tile16", "bytes",
     r"(MPAD_MAP == 1 .*?token_row\(int, int lane\)\s*\{\s*return) lane & 15;",
     r"\1 (lane & 15) ^ ((lane & 14) == 2);"),
    ("two pieces of a row swapped on one side", "gate_up_bytes_tile16", "bytes",
     r"weights\)\.part\[i\]", "weights).part[i ^ 1]"),
    ("no mask before the first column", "down_bytes_tile16", "bytes",
     r"if \(this->chunk \* 16 < skip\)", "if (false)"),
    ("scales overwritten while they are read", "down_bytes_tile16", "bytes",
     r"RING = 4", "RING = 2"),
    ("a slot left out of the sum", "combine", "prefill",
     r"q0 \+ q < a\.n_topk \?", "q0 + q + 1 < a.n_topk ?"),
]  # fmt: skip


def call_of(regime: str) -> Call:
    if regime in CASES:
        return build(CASES[regime], DTYPE)
    return call_from(quantised.build(BYTES, DTYPE, BYTES_SIZE) | {"quant_activations": "fp8"})


def call_from(arguments: dict[str, Any]) -> Call:
    names = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")
    more = {name: value for name, value in arguments.items() if name not in names}
    return Call(*(arguments[name] for name in names), more)


def padded_of(regime: str) -> tuple[Call, Masks]:
    call = call_of(regime)
    if regime in CASES:
        return padded(call, 8)
    wide, masks = quantised.pad({**call.options, **call.tensors()}, BYTES, BYTES_SIZE[3] + 32)
    return call_from(wide), masks


@pytest.fixture(scope="module", autouse=True)
def device(emulated: None) -> Iterator[None]:
    """The kernels of a part, which the first call loads; what reads LDS as it was fails too."""
    with emulating(uninitialised=True):
        for regime in REGIMES:
            run(call_of(regime), DEVICE)
        yield


def launches(call: Call) -> list[bridge.Report]:
    """What a call runs, of quantised ones the kernels of bytes; its result goes unchecked."""
    there = {name: fakehip.to_device(t, DEVICE) for name, t in call.tensors().items()}
    out = fakehip.DeviceArray(call.hidden_states.shape, call.hidden_states.dtype, DEVICE)
    bridge.log.clear()
    moepad.fused_moe(**{**call.options, **there}, out=out)
    of_call = "bytes" if "quant" in call.options else ""
    return [report for report in bridge.log.launches if of_call in report.kernel.name]


@pytest.mark.parametrize("regime", REGIMES)
def test_every_barrier_is_needed(regime: str) -> None:
    call = call_of(regime)
    for report in launches(call):
        kernel = report.kernel
        barriers = [inst for inst in kernel.instructions() if inst.addr in report.stats.barriers]
        assert len(barriers) == len(report.stats.barriers)
        for barrier in barriers:
            with kernel.without(barrier), pytest.raises(FAULTS):
                run(call, DEVICE)


@pytest.mark.parametrize("regime", REGIMES)
def test_waits_are_needed(regime: str) -> None:
    """Where something was in flight; a later wait may cover an earlier one, not most of them."""
    call = call_of(regime)
    for report in launches(call):
        kernel = report.kernel
        waits = [inst for inst in kernel.instructions() if inst.addr in report.stats.busy_waits]
        waits = waits[:: len(waits) // 8 or 1]
        found = 0
        for wait in waits:
            with kernel.without(wait):
                try:
                    run(call, DEVICE)
                except FAULTS:
                    found += 1
        assert found > len(waits) / 2, f"{kernel.name}: {found} of {len(waits)}"


@contextmanager
def replaced(old: Any, new: Any) -> Iterator[None]:
    old.module.kernels[old.name] = new
    try:
        yield
    finally:
        old.module.kernels[old.name] = old


def compiled(kernel: Any, text: str) -> Any:
    """The kernel alone from other source text, loaded where it is loaded."""
    rows = rf"^MPAD_[A-Z_]+\((?!{kernel.name},)mpad_.*\)\n"
    image = compile_text(re.sub(rows, "", text, flags=re.M), ARCH, *compiler.OPTIONS)
    LOADED.append(kernel.module.device.load(image))
    return LOADED[-1].kernels[kernel.name]


RIGHT = [("", "gate_up_stream", "decode", "", ""), ("", "gate_up_bytes_tile16", "bytes", "", "")]


@pytest.mark.parametrize("mistake", [*RIGHT, *MISTAKES], ids=lambda m: m[0] or f"none, {m[2]}")
def test_mistakes_in_the_source(mistake: tuple[str, ...]) -> None:
    name, family, regime, before, after = mistake
    text = compiler.source(DTYPE + "_w8x8" if regime == "bytes" else DTYPE)
    mutated, n_change = re.subn(before, after, text, count=1, flags=re.S)
    assert n_change == 1
    (kernel,) = [
        report.kernel
        for report in launches(call_of(regime))
        if report.kernel.name == f"mpad_{family}_{DTYPE}"
    ]
    with replaced(kernel, compiled(kernel, mutated)):
        if name:
            with pytest.raises(FAULTS):
                check(regime)
        else:
            check(regime)


def check(regime: str) -> None:
    expected, naive = solution(call_of(regime))
    wide, where = padded_of(regime)
    out = run(wide, DEVICE, where)
    check_close(np.ascontiguousarray(out[:, : expected.shape[1]]), expected, naive)
