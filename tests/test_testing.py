"""The tools of proof must themselves be able to fail."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import in_child, missing, require
from moepad import testing
from moepad.testing import POISON, Guarded, Work, check_bits, check_close, poison

FLOATS = [
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e8m0fnu,
]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
def test_poison_is_nan(dtype: Any) -> None:
    array = poison(np.zeros((3, 4), dtype)[:, 1::2])
    assert np.isnan(array.astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_poison_is_no_id(dtype: Any) -> None:
    assert (poison(np.zeros(5, dtype)) > 10**9).all()


def test_poison_keeps_to_the_view() -> None:
    array = np.zeros((4, 4), np.float32)
    poison(array[1:3, ::2], "largest")
    assert np.count_nonzero(array) == 4
    assert (poison(np.zeros(3, np.uint8)) == 0xFF).all()


@pytest.mark.parametrize("pattern", POISON)
@pytest.mark.parametrize("edge", [None, "after", "before"])
def test_guarded_starts_poisoned(pattern: str, edge: Any) -> None:
    guard = Guarded((3, 5), ml_dtypes.bfloat16, edge=edge, pattern=pattern)
    raw = guard.array.view(np.uint16)
    assert (raw == raw[0, 0]).all()
    assert raw[0, 0].tobytes() == POISON[pattern](guard.dtype)
    guard.array[...] = 1
    guard.check()


@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize("at", [-1, -1024, 15, 1038])
def test_guarded_finds_a_write_outside(at: int, offset: int) -> None:
    guard = Guarded((3, 5), np.float32, offset=offset)
    assert guard.array.ctypes.data % 64 == offset * 4
    ctypes.c_float.from_address(guard.array.ctypes.data + 4 * at).value = 0
    with pytest.raises(AssertionError, match="bytes written outside"):
        guard.check()


def test_guarded_finds_a_write_between_rows() -> None:
    guard = Guarded((3, 5), np.float32)
    guard.array[:, :4] = 1
    guard.check(guard.array[:, :4])
    guard.array[1, 4] = 1
    with pytest.raises(AssertionError, match="first at byte 36 "):
        guard.check(guard.array[:, :4])


def _read(guard: Guarded, at: int) -> None:
    address = guard.array.ctypes.data + 4 * at
    in_child(lambda: ctypes.c_float.from_address(address).value)


@pytest.mark.parametrize("reach", [1, 11, 1024, 1025, 4000])
def test_edge_after_faults_on_the_first_pad_element(reach: int) -> None:
    guard = Guarded((4, 1000), np.float32, reach=reach, edge="after")
    _read(guard, reach - 1)
    with pytest.raises(pytest.fail.Exception, match="SIGSEGV"):
        _read(guard, reach)


def test_edge_after_with_nothing_to_reach() -> None:
    guard = Guarded((2, 3), np.float32, reach=0, edge="after")
    with pytest.raises(pytest.fail.Exception, match="SIGSEGV"):
        _read(guard, 0)
    assert Guarded((0, 3), np.float32, edge="after").array.size == 0


def test_edge_before_faults() -> None:
    guard = Guarded((5,), np.float32, edge="before")
    address = guard.array.ctypes.data
    in_child(lambda: ctypes.string_at(address, 1))
    with pytest.raises(pytest.fail.Exception, match="SIGSEGV"):
        in_child(lambda: ctypes.string_at(address - 1, 1))


def test_in_child_reports() -> None:
    in_child(lambda: None)
    with pytest.raises(pytest.fail.Exception, match="this text"):
        in_child(lambda: (_ for _ in ()).throw(ValueError("this text")))
    with pytest.raises(pytest.fail.Exception, match="SIGALRM"):
        in_child(lambda: time.sleep(60), seconds=1)
    with pytest.raises(pytest.fail.Exception, match="SIGKILL"):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))


N_ROW = 16_384


def _layer(dtype: Any = ml_dtypes.bfloat16, n_row: int = N_ROW) -> tuple[Any, Any, Any]:
    """(rounded, expected, naive): a naive run that is wrong by about three roundings."""
    rng = np.random.default_rng(1)
    expected = rng.standard_normal((n_row, 32))
    unit = float(testing._finfo(dtype).eps)
    naive = expected * (1 + unit * rng.standard_normal(expected.shape))
    return expected.astype(dtype), expected, naive.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_close_accepts_what_is_right(dtype: Any) -> None:
    rounded, expected, naive = _layer(dtype)
    check_close(rounded, expected, naive)
    check_close(naive, expected, naive)


def _lost(a: Any) -> None:
    a[9000] = 0


def _swapped(a: Any) -> None:
    a[[9000, 9001]] = a[[9001, 9000]]


def _doubled(a: Any) -> None:
    a[9000] *= 2


def _slightly_scaled(a: Any) -> None:
    a[9000] = (a[9000].astype(np.float64) * 1.06).astype(a.dtype)


def _one_element(a: Any) -> None:
    a[9000, 31] = -a[9000, 31]


def _unwritten(a: Any) -> None:
    poison(a[9000:9001])


def _infinite(a: Any) -> None:
    a[9000, 5] = np.inf


_FAULTS = [_lost, _swapped, _doubled, _slightly_scaled, _one_element, _unwritten, _infinite]


@pytest.mark.parametrize("fault", _FAULTS, ids=lambda fault: fault.__name__)
def test_close_finds_one_wrong_row_of_16384(fault: Any) -> None:
    rounded, expected, naive = _layer()
    fault(rounded)
    with pytest.raises(AssertionError, match=r"9000") as info:
        check_close(rounded, expected, naive)
    assert f"of {N_ROW} rows" in str(info.value)


def test_a_global_distance_alone_would_not() -> None:
    rounded, expected, _ = _layer()
    right = np.linalg.norm(rounded.astype(np.float64) - expected)
    _slightly_scaled(rounded)
    assert np.linalg.norm(rounded.astype(np.float64) - expected) < 1.1 * right


def test_close_finds_a_systematic_error() -> None:
    """Each element within its tolerance, all of them off by much: the global step's business."""
    rounded, expected, naive = _layer(n_row=64)
    largest = np.abs(naive.astype(np.float64) - expected).max(axis=1)[:, None]
    off = (expected + 1.5 * largest).astype(rounded.dtype)
    with pytest.raises(AssertionError, match="relative L2"):
        check_close(off, expected, naive)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_close_wants_non_finite_values_in_place(value: float) -> None:
    rounded, expected, naive = _layer(np.float32, 8)
    expected[3, 4] = rounded[3, 4] = naive[3, 4] = value
    check_close(rounded, expected, naive)
    rounded[3, 4] = 1.0
    with pytest.raises(AssertionError, match=r"misplaced in 1 elements of 1 of 8 rows \(3\)"):
        check_close(rounded, expected, naive)
    rounded[3, 4] = -np.inf if value == np.inf else np.inf
    with pytest.raises(AssertionError, match="misplaced"):
        check_close(rounded, expected, naive)


def test_close_gives_a_naive_overflow_no_credit() -> None:
    rounded, expected, naive = _layer(np.float16, 8)
    naive[2] = np.inf
    check_close(rounded, expected, naive)
    rounded[2, 2] *= np.float16(1.1)
    with pytest.raises(AssertionError, match=r"worst at \(2, 2\)"):
        check_close(rounded, expected, naive)


def test_close_allows_no_more_where_the_naive_run_was_lucky() -> None:
    """Exact in one row by chance: that row may be off as most rows are, and not more."""
    rounded, expected, naive = _layer(n_row=64)
    naive[7] = rounded[7]
    unit = 2.0**-7
    rounded[7] = (expected[7] * (1 + unit)).astype(rounded.dtype)
    check_close(rounded, expected, naive)
    rounded[7] = (expected[7] * (1 + 8 * unit)).astype(rounded.dtype)
    with pytest.raises(AssertionError, match=r"1 of 64 rows \(7\)"):
        check_close(rounded, expected, naive)


def test_close_takes_the_worst_of_several_runs() -> None:
    rounded, expected, naive = _layer(n_row=4)
    check_close(naive, expected, np.stack([rounded, naive]))
    with pytest.raises(AssertionError, match="too far off"):
        check_close(naive, expected, np.stack([rounded, rounded]))


def test_close_wants_exact_zeros() -> None:
    zeros = np.zeros((4, 8))
    check_close(zeros.astype(np.float32), zeros, zeros.astype(np.float32))
    off = zeros.astype(np.float32)
    off[1, 1] = 1e-30
    with pytest.raises(AssertionError, match=r"worst at \(1, 1\)"):
        check_close(off, zeros, zeros.astype(np.float32))


def test_close_wants_shape_and_type() -> None:
    rounded, expected, naive = _layer(np.float32, 8)
    with pytest.raises(AssertionError, match="shape"):
        check_close(rounded[:7], expected, naive)
    with pytest.raises(AssertionError, match="float64"):
        check_close(expected, expected, naive)


def test_one_rounding_is_the_largest() -> None:
    rng = np.random.default_rng(2)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = rng.standard_normal(10_000) * 10.0 ** rng.integers(-7, 4, 10_000)
        error = np.abs(values.astype(dtype).astype(np.float64) - values)
        allowed = testing.one_rounding(values, dtype)
        assert (error <= allowed).all()
        assert (error / allowed).max() > 0.9


def test_bits() -> None:
    array = np.array([[0.0, np.nan, 1.0]], np.float32)
    check_bits(array, array.copy())
    for column, value in ((0, -0.0), (2, np.nextafter(np.float32(1), np.float32(2)))):
        other = array.copy()
        other[0, column] = value
        with pytest.raises(AssertionError, match=rf"first at \(0, {column}\)"):
            check_bits(array, other)
    other = array.copy()
    other.view(np.uint32)[0, 1] ^= 1
    with pytest.raises(AssertionError, match="1 of 3"):
        check_bits(array, other)
    with pytest.raises(AssertionError, match="float16"):
        check_bits(array, array.astype(np.float16))


def test_work_counts_the_true_size() -> None:
    ids = np.array([[0, 2], [2, -1], [-1, -1]])
    work = Work.of(ids, n_hidden=10, n_inter=6, weight_bits=16, value_bytes=2)
    assert work.n_bytes == 2 * (3 * 6 * 10) * 2 + 2 * 3 * 10 * 2
    assert work.n_flop == 2 * 3 * (3 * 6 * 10)
    assert work.seconds(1e9, 1e9) == pytest.approx(work.n_flop / 1e9)
    assert work.seconds(1e3, 1e9) == pytest.approx(work.n_bytes / 1e3)
    plain = Work.of(ids, n_hidden=10, n_inter=6, weight_bits=4, value_bytes=2, is_gated=False,
                    have_bias=True)  # fmt: skip
    assert plain.n_bytes == 2 * (2 * 6 * 10 // 2) + 2 * (6 + 10) * 2 + 2 * 3 * 10 * 2
    assert plain.n_flop == 2 * 3 * (2 * 6 * 10)


def test_interleave_tells_fast_from_slow() -> None:
    times = testing.interleave(
        {"fast": lambda: time.sleep(0.001), "slow": lambda: time.sleep(0.004)}, 0.02, 2
    )
    assert list(times) == ["fast", "slow"]
    assert 0.001 <= times["fast"] < times["slow"]


def test_missing_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conftest.REQUIRED", frozenset())
    with pytest.raises(pytest.skip.Exception, match="no_such_part: it cannot be imported"):
        require("no_such_part")
    monkeypatch.setattr("conftest.REQUIRED", frozenset({"no_such_part"}))
    with pytest.raises(pytest.fail.Exception, match="named by MOEPAD_TEST_REQUIRE"):
        require("no_such_part")
    with pytest.raises(pytest.skip.Exception):
        missing("other", "it is away")


def test_a_required_part_fails_the_run(tmp_path: Path) -> None:
    """The variable as a user sets it, in a pytest of its own."""
    (tmp_path / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (tmp_path / "test_part.py").write_text(
        textwrap.dedent("""
        from conftest import require
        def test_part():
            require("no_such_part")
        """)
    )

    def outcome(required: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
            env={**os.environ, "MOEPAD_TEST_REQUIRE": required},
            capture_output=True,
            text=True,
        ).stdout

    assert "1 skipped" in outcome("")
    assert "1 failed" in outcome("other,no_such_part")
