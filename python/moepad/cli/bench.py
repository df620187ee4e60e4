"""`python -m moepad bench`: moepad and its installed peers against the floor, as a table.

Parses, prints and saves; what is measured, and how, is in moepad.bench.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from moepad import _core, bench, peers
from moepad.bench import Cell, Contender, Shape
from moepad.cli.env import cpu_name
from moepad.cli.table import progress, table

NAME = "bench"
HELP = "measure moepad and its installed peers against the floor of this machine"

DEFAULTS: dict[str, Any] = {
    "shape": "qwen3-30b,q235-tp8",
    "dtype": "bf16",
    "quant": "none",
    "m": "1,16,256",
    "seconds": 0.5,
}
FULL: dict[str, Any] = {
    "shape": ",".join(bench.SHAPES),
    "dtype": "bf16,f32",
    "m": "1,4,16,64,256,1024",
    "seconds": 5.0,
}
PAD_TO, PAD_TOKENS = 256, (1, 64)  # what padding costs is shown for the first shape it changes
PACKAGES = ("moepad", "numpy", "torch", "transformers", "zentorch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lists = {
        "shape": f"of {', '.join(bench.SHAPES)}, or NAME:H:I:E:k",
        "dtype": "of bf16, f32, f16",
        "quant": f"weights, of {', '.join(bench.QUANTS)}; no peers but with none",
        "m": "numbers of tokens",
    }
    for name, text in lists.items():
        parser.add_argument(f"--{name}", metavar="A,B", help=f"{text} (default: {DEFAULTS[name]})")
    parser.add_argument("--isa", metavar="A,B", help="moepad's instruction sets (default: best)")
    parser.add_argument(
        "--peers",
        default="auto",
        metavar="A,B",
        help=f"auto: those installed; none; or of {', '.join(peers.PEERS)} (default: auto)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="for every contender")
    parser.add_argument(
        "--seconds", type=float, help=f"for each time in a table (default: {DEFAULTS['seconds']})"
    )
    parser.add_argument(
        "--rotate",
        type=int,
        default=bench.ROTATE_BYTES >> 20,
        metavar="MIB",
        help="weights taken in turn by each contender (default: %(default)s)",
    )
    parser.add_argument("--full", action="store_true", help="the whole table, in half an hour")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="also write it to a file there")
    parser.add_argument("--commit", help="named in the output (default: what git says)")


def run(args: argparse.Namespace) -> int:
    given = {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}
    settings = {**(FULL if args.full else DEFAULTS), **given}
    shapes = [_shape(text) for text in settings["shape"].split(",")]
    dtypes = [_known("--dtype", text, bench.DTYPES) for text in settings["dtype"].split(",")]
    n_tokens = [_positive("--m", text) for text in settings["m"].split(",")]
    n_thread = args.threads if args.threads is not None else _core.get_num_threads()
    quants = [_known("--quant", text, bench.QUANTS) for text in settings["quant"].split(",")]
    contenders = _contenders(args.isa, args.peers)
    ours = [contender for contender in contenders if contender.kind == bench.OURS]
    runs = [
        (contenders if quant == "none" else ours, shape, dtype, n_tokens, quant)
        for dtype in dtypes
        for quant in quants
        for shape in shapes
    ]
    n_main = len(runs)
    padded = [shape for shape in shapes if shape.n_inter % PAD_TO and "none" in quants][:1]
    for shape in padded:
        n_inter_pad = -(-shape.n_inter // PAD_TO) * PAD_TO
        three = bench.padding_contenders(shape.n_inter, n_inter_pad)
        runs.append((three, shape, dtypes[0], list(PAD_TOKENS), "none"))

    facts = _facts(args.commit, n_thread, settings["seconds"])
    speed = bench.machine_speed(n_thread, dtypes)
    n_window = bench.N_WINDOW * sum(len(which) * len(ms) for which, _, _, ms, _ in runs)
    windows = progress(range(n_window), "measuring", unit="window")
    options: dict[str, Any] = {
        "seconds": settings["seconds"],
        "n_thread": n_thread,
        "rotate_bytes": args.rotate << 20,
        "tick": lambda: next(windows, None),
    }
    cells = [
        bench.run(who, shape, dtype, ms, quant=quant, **options)
        for who, shape, dtype, ms, quant in runs
    ]
    next(windows, None)  # takes the bar away
    overhead = bench.call_overhead()

    main = [cell for part in cells[:n_main] for cell in part]
    padding = [cell for part in cells[n_main:] for cell in part]
    if args.json:
        report = {**facts, "speed": speed, "overhead": overhead}
        report |= {"cells": [c.as_dict() for c in main], "padding": [c.as_dict() for c in padding]}
        text = json.dumps(report, indent=2)
    else:
        parts = [_facts_text(facts), _speed_text(speed), *_main_texts(main)]
        parts += [_padding_text(padded[0], padding)] if padded else []
        text = "\n\n".join([*parts, _overhead_text(overhead)])
    print(text)
    if args.save:
        print(f"written to {_save(args.save, facts, text)}", file=sys.stderr)
    return int(any(cell.fault for cell in main + padding if cell.is_ours))


def _shape(text: str) -> Shape:
    if text in bench.SHAPES:
        return bench.SHAPES[text]
    name, *sizes = text.split(":")
    if len(sizes) != 4:
        raise ValueError(
            f"--shape: expected {', '.join(bench.SHAPES)} or NAME:H:I:E:k, got {text!r}"
        )
    return Shape(name, *(_positive("--shape", size) for size in sizes))


def _known(option: str, text: str, choices: Any) -> str:
    if text not in choices:
        raise ValueError(f"{option}: expected one of {', '.join(choices)}, got {text!r}")
    return text


def _positive(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{option}: expected a positive integer, got {text!r}")
    return int(text)


def _contenders(isas: str | None, which: str) -> list[Contender]:
    if isas is None:
        ours = [Contender("moepad", bench.OURS)]
    else:
        names = [_known("--isa", isa, _core.cpu_isas()) for isa in isas.split(",")]
        ours = [Contender(f"moepad {isa}", bench.OURS, isa=isa) for isa in names]
    if which == "none":
        return ours
    if which == "auto":
        return ours + [Contender(name, name) for name in peers.installed()]
    return ours + [Contender(_known("--peers", n, peers.PEERS), n) for n in which.split(",")]


def _facts(commit: str | None, n_thread: int, seconds: float) -> dict[str, object]:
    """What must be known of a run to repeat it."""
    return {
        "command": shlex.join(["python", "-m", "moepad", *sys.argv[1:]]),
        "commit": commit or _git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "platform": platform.platform(),
        "threads": n_thread,
        "isa": _core.cpu_isa(),
        "seconds": seconds,
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
    }


def _git_commit() -> str:
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        )
        return result.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _facts_text(facts: dict[str, object]) -> str:
    return "\n".join(f"{name:<13}{value}" for name, value in facts.items())


def _speed_text(speed: dict[str, float]) -> str:
    """The first row: what the machine does when it only reads, copies or multiplies."""
    rows = [
        (name.replace("_", " "), f"{value / 1e9:.1f}", "GFLOP/s" if "peak" in name else "GB/s")
        for name, value in speed.items()
    ]
    return table(rows, ("machine", "speed", "unit"), "lrl")


def _main_texts(cells: Sequence[Cell]) -> list[str]:
    """A table per element type and kind of weights."""
    texts = []
    for (dtype, quant), group in groupby(cells, lambda cell: (cell.dtype, cell.quant)):
        part = list(group)
        names = list(dict.fromkeys(cell.contender for cell in part))
        rows = [_main_row(list(row)) for _, row in groupby(part, lambda c: (c.shape, c.n_token))]
        columns = [f"{name} us (floor/us)" for name in names]
        kind = dtype if quant == "none" else f"{dtype}, {quant}"
        header = [f"{kind} layer", "M", "floor us", *columns, "best peer/ours"]
        body = table(rows, header, "l" + "r" * (len(header) - 1))
        texts.append("\n".join([body, *_fault_lines(part)]))
    return texts


def _main_row(row: Sequence[Cell]) -> list[object]:
    ours = row[0]
    best = min((cell.median for cell in row if not cell.is_ours and not cell.fault), default=None)
    ratio = None if best is None or ours.fault else f"{best / ours.median:.2f}"
    return [ours.shape, ours.n_token, _microseconds(ours.floor), *map(_time, row), ratio]


def _time(cell: Cell) -> str | None:
    if cell.fault:
        return None
    return f"{_microseconds(cell.median)} ({cell.fraction:.2f})"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds == seconds else "-"


def _fault_lines(cells: Sequence[Cell]) -> list[str]:
    return [
        f"{cell.contender}, {cell.shape}, M={cell.n_token}: {cell.fault}"
        for cell in cells
        if cell.fault
    ]


def _padding_text(shape: Shape, cells: Sequence[Cell]) -> str:
    """The true size in compact and in padded tensors, and the padded size computed in full."""
    names = list(dict.fromkeys(cell.contender for cell in cells))
    rows: list[list[object]] = []
    for n_token, group in groupby(cells, lambda cell: cell.n_token):
        row = list(group)
        ratios = [f"{cell.median / row[0].median:.2f}" for cell in row[1:]]
        rows.append([n_token, _microseconds(row[0].floor), *map(_time, row), *ratios])
    header = [f"{shape.name}, I={shape.n_inter}: M", "floor us", *(f"{name} us" for name in names)]
    header += [f"{name} / {names[0]}" for name in names[1:]]
    body = table(rows, header, "r" * len(header))
    return "\n".join([body, *_fault_lines(cells)])


def _overhead_text(overhead: dict[str, float]) -> str:
    rows = [(name, f"{seconds * 1e9:.0f}") for name, seconds in overhead.items()]
    return table(rows, ("one call", "ns"), "lr")


def _save(folder: Path, facts: dict[str, object], text: str) -> Path:
    """Writes a file that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    words = f"{str(facts['date'])[:10]} {facts['cpu']} {str(facts['commit'])[:12]}"
    stem = re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-").lower()
    suffix = ".json" if text.startswith("{") else ".txt"
    for n in range(1, 1000):
        path = folder / f"{stem}{f'-{n}' if n > 1 else ''}{suffix}"
        try:
            with path.open("x") as file:
                file.write(text + "\n")
            return path
        except FileExistsError:
            continue
    raise FileExistsError(f"{folder}: a thousand results of this day and commit")
