"""Fresh process: copies and calls go on in children forked after, before and between them."""

from __future__ import annotations

import os
import signal
import sys
import warnings

import moepad
import numpy as np
from moepad import _core

SRC = np.arange(1_500_000, dtype=np.float32).reshape(1000, 1500)


def work() -> None:
    dst = np.zeros((1500, 1000), np.float32)
    _core.copy(dst, SRC.T)
    assert np.array_equal(dst, SRC.T)
    x, w13, w2 = (np.ones(shape, np.float32) for shape in ((4, 64), (2, 64, 64), (2, 64, 32)))
    out = moepad.fused_moe(x, w13, w2, np.ones((4, 2), np.float32), np.array([[0, 1]] * 4))
    assert np.isfinite(out).all() and (out == out[0, 0]).all()


def child() -> int:
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of forking with threads
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> int:
    _core.set_num_threads(3)
    codes = [child()]
    for _ in range(5):
        work()
        codes.append(child())
    work()
    print(f"children ended with {codes}")
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
