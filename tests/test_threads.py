"""The same bits from any number of threads, from many callers at once, after fork and in spawn."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import moepad
import numpy as np
import pytest
from cases import CASES, FEW, Case, build, params
from conftest import in_child
from moepad import _core
from moepad.testing import check_bits

SetThreads = Callable[[int], None]

# Enough work for every thread of a few, with experts of very different load.
UNEVEN = Case(
    "uneven", "", n_token=130, n_hidden=136, n_inter=88, n_expert=5, n_topk=2, bias="both"
)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", params([*FEW, UNEVEN]))
def test_number_of_threads_changes_no_bit(
    case: Case, dtype: str, isa: str, n_thread: SetThreads
) -> None:
    call = build(case, dtype)
    n_thread(1)
    expected = call.run(moepad.fused_moe)
    for n in (2, 3, 7):
        n_thread(n)
        assert _core.get_num_threads() == n
        check_bits(call.run(moepad.fused_moe), expected)


@pytest.mark.parametrize("case", params([case for case in CASES if case.name.startswith("m")]))
def test_two_threads_equal_one(case: Case, n_thread: SetThreads) -> None:
    """Every size of batch, so that work divides in every way."""
    call = build(case, "bf16")
    n_thread(1)
    expected = call.run(moepad.fused_moe)
    n_thread(2)
    check_bits(call.run(moepad.fused_moe), expected)


def test_repetition_changes_no_bit(isa: str, n_thread: SetThreads) -> None:
    call = build(UNEVEN, "bf16")
    n_thread(4)
    expected = call.run(moepad.fused_moe)
    for _ in range(200):
        check_bits(call.run(moepad.fused_moe), expected)


def test_zero_threads_is_the_default(n_thread: SetThreads) -> None:
    before = _core.get_num_threads()
    n_thread(before + 3)
    assert _core.get_num_threads() == before + 3
    n_thread(0)
    assert _core.get_num_threads() == before


@pytest.mark.parametrize("wrong", [-1, -(2**31)])
def test_a_negative_number_of_threads_is_an_error(wrong: int) -> None:
    with pytest.raises(ValueError):
        _core.set_num_threads(wrong)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_many_callers_at_once(n: int, n_thread: SetThreads) -> None:
    """Eight Python threads with their own calls, over a pool of fewer or as many."""
    n_thread(n)
    calls = [build(case, dtype) for case in (*FEW[:3], UNEVEN) for dtype in ("f32", "bf16")]
    expected = [call.run(moepad.fused_moe) for call in calls]
    start, faults = threading.Barrier(len(calls)), []

    def caller(index: int) -> None:
        try:
            start.wait(timeout=60)
            for _ in range(20):
                check_bits(calls[index].run(moepad.fused_moe), expected[index])
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=caller, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a caller hangs"
    assert not faults


def test_the_interpreter_runs_on_meanwhile(n_thread: SetThreads) -> None:
    """The interpreter's lock is given up: another thread gets on while a long call runs."""
    n_thread(1)
    call = build(Case("long", "", n_token=600, n_hidden=512, n_inter=256, n_topk=4), "f32")
    done, n_step = threading.Event(), [0]

    def caller() -> None:
        call.run(moepad.fused_moe)
        done.set()

    thread = threading.Thread(target=caller)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # nobody takes the lock by force: it must be given up
    try:
        thread.start()
        while not done.is_set():
            n_step[0] += 1
            done.wait(1e-4)
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert n_step[0] > 1


def _bits() -> bytes:
    result: bytes = build(UNEVEN, "bf16").run(moepad.fused_moe).tobytes()
    return result


def test_after_fork(n_thread: SetThreads) -> None:
    """The parent's worker threads do not exist in the child, and neither notices."""
    n_thread(3)
    expected = _bits()

    def child() -> None:
        for _ in range(3):
            assert _bits() == expected
        in_child(lambda: _same(expected))  # a grandchild

    for _ in range(3):
        in_child(child)
        assert _bits() == expected


def _same(expected: bytes) -> None:
    assert _bits() == expected


def test_fork_before_first_use() -> None:
    in_child(lambda: _same(_bits()))


def test_fork_while_another_thread_computes(n_thread: SetThreads) -> None:
    """The pool may be in the middle of anything at that moment."""
    n_thread(2)
    call, expected = build(UNEVEN, "f32"), _bits()
    stop = threading.Event()

    def caller() -> None:
        while not stop.is_set():
            call.run(moepad.fused_moe)

    thread = threading.Thread(target=caller)
    thread.start()
    try:
        for _ in range(10):
            in_child(lambda: _same(expected), seconds=60)
    finally:
        stop.set()
        thread.join()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", sorted(multiprocessing.get_all_start_methods()))
def test_multiprocessing(method: str) -> None:
    expected = _bits()
    context: Any = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        for bits in [pool.apply_async(_bits) for _ in range(4)]:
            assert bits.get(timeout=120) == expected


_REPORT = """
import hashlib, json, os
import numpy as np
import moepad
from moepad import _core
rng = np.random.default_rng(0)
shapes = (65, 64), (4, 96, 64), (4, 64, 48)
x, w13, w2 = (rng.standard_normal(shape, np.float32) for shape in shapes)
ids = rng.integers(0, 4, (65, 2))
out = moepad.fused_moe(x, w13, w2, np.ones((65, 2), np.float32), ids)
print(json.dumps({
    "threads": _core.get_num_threads(),
    "tasks": len(os.listdir("/proc/self/task")),
    "isa": _core.cpu_isa(),
    "hash": hashlib.sha256(out.tobytes()).hexdigest(),
}))
"""


def _report(**environment: str) -> Any:
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MOEPAD_NUM_THREADS", "OMP_NUM_THREADS", "MOEPAD_CPU_ISA")
    }
    # NumPy's own BLAS starts threads as well; they are not what is counted here.
    result = subprocess.run(
        [sys.executable, "-c", _REPORT],
        env={**clean, "OPENBLAS_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("variable", ["MOEPAD_NUM_THREADS", "OMP_NUM_THREADS"])
def test_environment_sets_the_threads(variable: str, n: int) -> None:
    report = _report(**{variable: str(n)})
    assert report["threads"] == n
    assert report["tasks"] == n
    assert report["hash"] == _report()["hash"]


def test_our_variable_comes_before_openmp() -> None:
    assert _report(MOEPAD_NUM_THREADS="3", OMP_NUM_THREADS="2")["threads"] == 3


def test_default_is_within_the_affinity_mask() -> None:
    assert 1 <= _report()["threads"] <= len(os.sched_getaffinity(0))


def test_environment_chooses_the_instruction_set() -> None:
    for isa in _core.cpu_isas():
        assert _report(MOEPAD_CPU_ISA=isa)["isa"] == isa


def test_instruction_sets_are_named_and_checked() -> None:
    assert _core.cpu_isas()[-1] == "portable"
    assert _core.cpu_isa() in _core.cpu_isas()
    with pytest.raises(ValueError, match="no-such-set"):
        _core.set_cpu_isa("no-such-set")
    assert _core.cpu_isa() in _core.cpu_isas()


def test_results_are_the_callers_own() -> None:
    """No buffer of the pool or the engine leaks from one call into the next."""
    call = build(UNEVEN, "f32")
    first = call.run(moepad.fused_moe)
    kept = first.copy()
    call.run(moepad.fused_moe, routed_scaling_factor=2.0)
    check_bits(first, kept)
    assert first.flags.owndata or first.base is not None
    assert np.isfinite(first).all()
