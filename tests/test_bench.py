"""The benchmark runs, counts right, says what failed, and loses nothing it measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import missing, require
from moepad import bench, cli, peers
from moepad.bench import Cell, Contender, Shape
from moepad.cli import bench as command

TINY = Shape("tiny", 64, 32, 4, 2)
TINY_ARGUMENTS = ["--shape", "tiny:64:32:4:2", "--m", "1,65", "--seconds", "0.01", "--rotate", "1"]


def _run(contenders: list[Contender], n_token: list[int], **options: Any) -> list[Cell]:
    ticks: list[int] = []
    cells = bench.run(
        contenders, TINY, "bf16", n_token, seconds=0.01, n_thread=1, rotate_bytes=1 << 20,
        tick=lambda: ticks.append(1), **options,
    )  # fmt: skip
    assert len(ticks) == len(contenders) * len(n_token) * bench.N_WINDOW
    return cells


def test_measures_and_checks() -> None:
    contenders = [
        Contender("ours", bench.OURS),
        Contender("padded", bench.OURS, n_inter=32, n_inter_pad=48),
        Contender("wider", bench.OURS, n_inter=48),
    ]
    cells = _run(contenders, [1, 65])
    assert [(cell.contender, cell.n_token) for cell in cells] == [
        (contender.name, m) for m in (1, 65) for contender in contenders
    ]
    for cell in cells:
        assert not cell.fault and cell.error < bench.LIMIT["bf16"]
        assert len(cell.seconds) == len(cell.floors) == bench.N_WINDOW
        assert 0 < cell.median < 1 and 0 < cell.floor < 1
        assert cell.fraction == pytest.approx(
            float(np.median(np.array(cell.floors) / np.array(cell.seconds)))
        )
        work = 2 * cell.n_token * 2 * 3 * 32 * 64 / np.array(cell.peaks)
        assert (np.array(cell.floors) >= 0.999 * work).all()


def test_peers_agree_with_the_specification() -> None:
    require("torch")
    require("transformers")
    names = [name for name in peers.installed() if name != "zentorch"]
    cells = _run([Contender(name, name) for name in ("moepad", *names)], [3, 65])
    assert len(cells) == 2 * (1 + len(names)) and len(names) == 3
    assert [cell.fault for cell in cells] == [""] * len(cells)


def test_zentorch_agrees_with_the_specification() -> None:
    if "zentorch" not in peers.installed():
        missing("zentorch", "it is not installed")
    cells = _run([Contender("ours", bench.OURS), Contender("zentorch", "zentorch")], [3, 65, 3])
    assert [cell.fault for cell in cells] == [""] * 6


def test_a_contender_that_fails_is_a_row_with_its_reason() -> None:
    bad = Contender("bad", bench.OURS, isa="no-such-set")
    ours, failed = _run([Contender("ours", bench.OURS), bad], [1])
    assert not ours.fault
    assert failed.fault.startswith("ValueError") and "no-such-set" in failed.fault
    assert math.isnan(failed.median) and math.isnan(failed.fraction)
    assert command._main_row([ours, failed])[-2:] == [None, None]


def test_a_contender_that_dies_is_a_row_with_its_status() -> None:
    task = bench._Task(Contender("ours", bench.OURS), TINY, "bf16", "none", 1, 1 << 20)
    process = bench._Process(task)
    process.process.kill()
    with pytest.raises(RuntimeError, match="ended with -9"):
        process.ask("start", 1)
    process.close()


def test_a_wrong_result_is_a_fault() -> None:
    class Process:
        def __init__(self, result: float) -> None:
            self.result = np.full((1, 2), result)

        def ask(self, method: str, argument: object) -> Any:
            if method == "start":
                return self.result, (np.ones((1, 2)) if self.result[0, 0] == 1 else None)
            return bench._Window(1.0, 0.5, 1e9, 1e9)

    contenders = {Contender("ours", bench.OURS): Process(1.0), Contender("x", "x"): Process(1.05)}
    row = [Cell(c.name, c.kind == bench.OURS, "tiny", "bf16", "none", 1) for c in contenders]
    bench._measure_row(row, contenders, TINY, 0.1, lambda: None)  # type: ignore[arg-type]
    assert not row[0].fault and row[0].fraction == 0.5
    assert row[1].fault == "wrong: relative error 5.0e-02" and not row[1].seconds


def test_tokens_are_the_same_for_every_contender() -> None:
    first, again = (bench._tokens(TINY, "bf16", 9, 1) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert a.tobytes() == b.tobytes()
    assert (first.ids != bench._tokens(TINY, "bf16", 9, 2).ids).any()
    assert all(len(set(row)) == TINY.n_topk for row in first.ids.tolist())


def test_padded_weights_compute_the_same_layer() -> None:
    def layers(**sizes: int) -> Any:
        contender = Contender("ours", bench.OURS, **sizes)
        return bench._layers(bench._Task(contender, TINY, "f32", "none", 1, 1 << 20))

    compact, padded = layers()[0], layers(n_inter=32, n_inter_pad=48)[0]
    assert padded[0].shape == (4, 96, 64) and padded[1].shape == (4, 64, 48)
    np.testing.assert_array_equal(padded[0][:, :32], compact[0][:, :32])
    np.testing.assert_array_equal(padded[0][:, 48:80], compact[0][:, 32:])
    np.testing.assert_array_equal(padded[1][:, :, :32], compact[1])
    assert sum(layer.n_bytes for layer in layers()) >= 1 << 20


def test_speed_and_overhead_are_numbers() -> None:
    speed = bench.machine_speed(1, ["bf16", "f32"])
    assert set(speed) == {"read", "copy", "peak_bf16", "peak_f32"}
    assert all(value > 1e8 for value in speed.values())
    overhead = bench.call_overhead(20)
    assert overhead["fused_moe"] > overhead["fused_moe_overhead"] > 0
    assert 0 < overhead["get_moe_padding_size"] < 1e-4


@pytest.mark.parametrize("as_json", [False, True])
def test_command(as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY_ARGUMENTS, "--peers", "none", "--save", str(tmp_path), "--commit", "abc"]
    assert cli.main(["bench", *arguments, *(["--json"] if as_json else [])]) == 0
    out = capsys.readouterr().out
    (saved,) = tmp_path.iterdir()
    assert saved.read_text() == out and "abc" in saved.name
    if as_json:
        report = json.loads(out)
        assert [cell["n_token"] for cell in report["cells"]] == [1, 65]
        assert [cell["contender"] for cell in report["padding"]] == [
            "compact", "padded to 256", "computed at 256",
        ] * 2  # fmt: skip
        assert report["commit"] == "abc" and report["speed"]["read"] > 0
    else:
        assert "best peer/ours" in out and "get_moe_weight_sizes" in out
        assert out.index("read") < out.index("bf16 layer") < out.index("tiny, I=32")


@pytest.mark.parametrize("quant", [name for name in bench.QUANTS if name != "none"])
def test_quantised_weights(quant: str) -> None:
    """Right against the specification, and the floor counts what is stored, scales too."""
    contender = Contender("ours", bench.OURS)
    settings: dict[str, Any] = {"seconds": 0.01, "n_thread": 1, "rotate_bytes": 1 << 16}
    (cell,) = bench.run([contender], TINY, "bf16", [1], quant=quant, **settings)
    assert not cell.fault and cell.error < bench.LIMIT["bf16"]
    task = bench._Task(contender, TINY, "bf16", quant, 1, 1 << 16)
    layers = bench._layers(task)
    assert sum(layer.n_bytes for layer in layers) >= 1 << 16
    work = bench._work(task, layers[0], bench._tokens(TINY, "bf16", 64, 0))
    assert work.n_bytes == layers[0].n_bytes + 2 * 64 * TINY.n_hidden * 2


def test_command_with_quantised_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *TINY_ARGUMENTS, "--quant", "fp8_channel,mxfp4"]) == 0
    out = capsys.readouterr().out
    assert "bf16, fp8_channel layer" in out and "bf16, mxfp4 layer" in out


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    facts: dict[str, object] = {"date": "2026-01-02 03:04 UTC", "cpu": "A (R) B", "commit": "12"}
    first, second = (command._save(tmp_path, facts, text) for text in ("one", "two"))
    assert first.name == "2026-01-02-a-r-b-12.txt" and first.read_text() == "one\n"
    assert second.name == "2026-01-02-a-r-b-12-2.txt" and second.read_text() == "two\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--shape", "no"], "--shape: expected qwen3-30b"),
        (["--shape", "x:1:2:3"], "--shape: expected"),
        (["--shape", "x:1:2:3:y"], "--shape: expected a positive integer, got 'y'"),
        (["--quant", "fp4"], "--quant: expected one of none, fp8_tensor"),
        (["--dtype", "f8"], "--dtype: expected one of f32, bf16, f16, got 'f8'"),
        (["--m", "0"], "--m: expected a positive integer"),
        (["--isa", "no"], "--isa: expected one of"),
        (["--peers", "nobody"], "--peers: expected one of torch-loop"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_as_users_call_it() -> None:
    """In a process of its own: spawned workers must not run the command again."""
    result = subprocess.run(
        [sys.executable, "-m", "moepad", "bench", *TINY_ARGUMENTS, "--peers", "none", "--json"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["cells"]) == 2
