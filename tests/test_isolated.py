"""Scripts of tests/isolated/, each in a process of its own: memory, references, state, fork."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require

FOLDER = Path(__file__).parent / "isolated"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
WITH_TORCH = ["leaks.py", "references.py"]


def run(script: str, *arguments: str) -> None:
    command = [sys.executable, "-W", "error", str(FOLDER / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{script}: status {done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script: str) -> None:
    run(script)


@pytest.mark.parametrize("script", WITH_TORCH)
def test_script_with_torch(script: str) -> None:
    require("torch")
    run(script, "torch")
