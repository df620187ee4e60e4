"""The command line's frame: help, dispatch, exit status, messages, tables, `env`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from moepad import CheckpointError, DeviceError, UnsupportedError, _core
from moepad.cli import EXAMPLES, build_parser, main
from moepad.cli import env as env_command
from moepad.cli.table import progress, table


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moepad", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], int]], None]:
    """Puts a function in the place of the `env` command's run."""
    monkeypatch.delenv("MOEPAD_DEBUG", raising=False)
    return lambda run: monkeypatch.setattr(env_command, "run", run)


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_help_lists_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, example in EXAMPLES.items():
        assert f" {name} {example}".rstrip() in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_command_has_help_json_and_a_valid_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text and "example:" in text
    args = build_parser([name]).parse_args([name, *EXAMPLES[name].split()])
    assert args.command == name and callable(args.run)


@pytest.mark.parametrize("arguments", [[], ["dance"], ["env", "--no-such-option"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("tp_rank: got 9"), 2, "tp_rank: got 9"),
        (TypeError("w13: got a str"), 2, "w13: got a str"),
        (UnsupportedError("quant='mxfp4'"), 2, "quant='mxfp4'"),
        (FileNotFoundError(2, "No such file", "a/b"), 2, "a/b: no such file or folder"),
        (CheckpointError("expert 3 is missing"), 1, "expert 3 is missing"),
        (DeviceError("no device"), 1, "DeviceError: no device (MOEPAD_DEBUG=1 shows where)"),
        (MemoryError(), 1, "MemoryError: no details (MOEPAD_DEBUG=1 shows where)"),
        (KeyError("x"), 1, "KeyError: 'x' (MOEPAD_DEBUG=1 shows where)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_exceptions_become_one_line(
    error: Exception,
    status: int,
    text: str,
    command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(raising(error))
    assert main(["env"]) == status
    captured = capsys.readouterr()
    assert captured.err == f"moepad env: {text}\n" and captured.out == ""


def test_debug_lets_exceptions_through(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(raising(ValueError("seen whole")))
    monkeypatch.setenv("MOEPAD_DEBUG", "1")
    with pytest.raises(ValueError, match="seen whole"):
        main(["env"])


def test_interrupt_is_quiet(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(KeyboardInterrupt()))
    assert main(["env"]) == 130
    assert capsys.readouterr().err == ""


def test_status_of_the_command_is_returned(command: Callable[..., None]) -> None:
    command(lambda args: 1)
    assert main(["env"]) == 1


def test_broken_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "moepad", "env"], stdout=writer, stderr=subprocess.PIPE
        )
    finally:
        os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


def test_module_runs_and_names_itself() -> None:
    done = run_module("--help")
    assert done.returncode == 0 and "usage: python -m moepad" in done.stdout
    assert done.stderr == ""


def test_a_command_imports_only_its_own() -> None:
    code = (
        "import sys; sys.argv = ['moepad', 'env', '--json']; from moepad.cli import main; main(); "
        "assert not {'moepad.cli.check', 'moepad.bench', 'torch', 'tqdm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_env_json() -> None:
    done = run_module("env", "--json", MOEPAD_CPU_ISA="portable", MOEPAD_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["isa"] == "portable" and facts["isa_reason"] == "MOEPAD_CPU_ISA=portable"
    assert facts["isa_available"] == list(_core.cpu_isas())
    assert facts["threads"] == 3 and facts["threads_reason"] == "MOEPAD_NUM_THREADS=3"
    assert facts["numpy"] == np.__version__
    assert facts["variables"]["MOEPAD_NUM_THREADS"] == "3"
    assert 1 <= facts["physical_cores"] <= facts["cpus_in_affinity"]


def test_env_table_has_every_fact() -> None:
    """In processes of their own, since a runtime that `env` opens stays open."""
    lines = run_module("env").stdout.splitlines()[2:]
    first_column = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert first_column == list(json.loads(run_module("env", "--json").stdout))


def test_env_counts_hyper_threads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,4", 4: "0,4", 1: "1,5"}
    monkeypatch.setattr(env_command, "_affinity", lambda: set(siblings))
    monkeypatch.setattr(env_command, "_siblings", siblings.__getitem__)
    assert env_command.physical_cores() == 2


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (None, "best of those"),
        ("portable", "MOEPAD_CPU_ISA=portable"),
        ("quantum", "MOEPAD_CPU_ISA=quantum is not one of them"),
    ],
)
def test_env_says_why_this_instruction_set(asked: str | None, reason: str) -> None:
    without = {k: v for k, v in os.environ.items() if k != "MOEPAD_CPU_ISA"}
    done = subprocess.run(
        [sys.executable, "-m", "moepad", "env", "--json"],
        capture_output=True,
        text=True,
        env=without | ({"MOEPAD_CPU_ISA": asked} if asked else {}),
        check=True,
    )
    facts = json.loads(done.stdout)
    assert reason in facts["isa_reason"]
    assert facts["isa"] == (asked if asked == "portable" else facts["isa_available"][0])


@pytest.mark.parametrize(
    ("ours", "openmp", "reason"),
    [
        ("3", "5", "MOEPAD_NUM_THREADS=3"),
        ("0", "5", "OMP_NUM_THREADS=5"),
        ("many", "4,2", "OMP_NUM_THREADS=4,2"),
        ("", "", "physical cores in this process's affinity mask"),
    ],
)
def test_env_says_why_so_many_threads(ours: str, openmp: str, reason: str) -> None:
    done = run_module("env", "--json", MOEPAD_NUM_THREADS=ours, OMP_NUM_THREADS=openmp)
    facts = json.loads(done.stdout)
    assert facts["threads_reason"] == reason
    digits = reason.partition("=")[2][:1]
    assert facts["threads"] == (int(digits) if digits else facts["physical_cores"])


def test_table_aligns_and_formats() -> None:
    text = table(
        [("rank 0", 192, 0.123456, True), ("rank 10", None, 2.0, False)],
        ("rank", "columns", "error", "ok"),
    )
    assert text == (
        "rank     columns   error  ok\n"
        "-------  -------  ------  ---\n"
        "rank 0       192  0.1235  yes\n"
        "rank 10        -       2  no"
    )


def test_table_takes_alignment_and_no_rows() -> None:
    assert table([("a", "b")], ("left", "right"), "lr") == "left  right\n----  -----\na         b"
    assert table([], ("a", "b")) == "a  b\n-  -"


@pytest.mark.parametrize(
    ("rows", "align", "text"),
    [
        ([("a",)], "", r"rows\[0\]: expected 2 cells, got 1"),
        ([], "lx", "align"),
        ([], "l", "align"),
    ],
)
def test_table_refuses_what_does_not_fit(rows: list[Any], align: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        table(rows, ("a", "b"), align)


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "copying", unit="expert")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""
