"""The GPU planner in C, without a GPU or Python: tests/c/test_gpu_plan.c has the checks."""

from __future__ import annotations

import subprocess
from pathlib import Path

from conftest import require_tool
from csources import build

SOURCES = ["csrc/status.c", "csrc/gpu_plan.c", "tests/c/test_gpu_plan.c"]


def test_plan(tmp_path: Path) -> None:
    compiler = require_tool("cc", "cc", "gcc", "clang")
    target = tmp_path / "test_gpu_plan"
    flags = ["-O1", "-g", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    build(compiler, flags, SOURCES, target, tmp_path)
    done = subprocess.run([str(target)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
