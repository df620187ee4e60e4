"""What MOEPAD_TRACE's file and the log say about layers that run and layers that do not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from moepad import cpu_isa
from moepad.adapters import trace


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """The trace file of a process that has written nothing yet."""
    monkeypatch.setattr(trace, "_ran", set())
    monkeypatch.setattr(trace, "_refused", set())
    monkeypatch.setenv("MOEPAD_TRACE", str(tmp_path / "trace"))
    caplog.set_level(logging.INFO, "moepad")
    return tmp_path / "trace"


def test_first_run_only(path: Path) -> None:
    for layer in ("layers.0", "layers.1"):
        trace.ran("frame", layer, n_inter=192, n_inter_pad=256, tp=(1, 2))
    trace.ran("other", "layers.0", n_inter=96, n_inter_pad=96, quant="fp8_block", device="cuda:3")
    assert path.read_text().splitlines() == [
        f"pid={os.getpid()} framework=frame layer=layers.0 tp=1/2 n_inter=192 n_inter_pad=256 "
        f"quant=none engine=cpu-{cpu_isa()}",
        f"pid={os.getpid()} framework=other layer=layers.0 tp=0/1 n_inter=96 n_inter_pad=96 "
        "quant=fp8_block engine=cuda:3",
    ]


def test_refusals(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line in the file for each layer, in the log for each reason."""
    for layer in ("layers.0", "layers.1", "layers.1"):
        trace.refused("frame", layer, "LoRA")
    trace.refused("frame", "layers.2", "EPLB")
    lines = [line.partition(" ")[2] for line in path.read_text().splitlines()]
    assert lines == [
        "framework=frame layer=layers.0 refused: LoRA",
        "framework=frame layer=layers.1 refused: LoRA",
        "framework=frame layer=layers.2 refused: EPLB",
    ]
    assert [record.args[2] for record in caplog.records if record.args] == ["LoRA", "EPLB"]


def test_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEPAD_TRACE")
    trace.ran("frame", "layers.0", n_inter=1, n_inter_pad=1)
    trace.refused("frame", "layers.0", "LoRA")
    assert not path.exists()


def test_many_processes(path: Path) -> None:
    """Each appends whole lines to one file."""
    call = "trace.ran('frame', 'x' * 3000, n_inter=1, n_inter_pad=1)"
    code = f"from moepad.adapters import trace; {call}"
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and all("x" * 3000 in line for line in lines)
    assert len({line.split()[0] for line in lines}) == 4
