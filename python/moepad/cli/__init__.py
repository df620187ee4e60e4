"""The command line: `python -m moepad COMMAND`, also installed as `moepad`.

Each command is one module of this package with NAME, HELP, add_arguments(parser) and
run(args) -> exit status. This file parses, dispatches and turns exceptions into one line on stderr
and an exit status: 0 all well, 1 a failure or a mismatch, 2 wrong usage or arguments.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from moepad import CheckpointError, UnsupportedError

# Command to the arguments of its example, in the order of --help.
EXAMPLES = {
    "env": "",
    "plan": "--model Qwen3-235B-A22B --tp 8 --quant fp8_block",
    "demo": "",
    "check": "path/to/checkpoint --tp 8 --layers 0",
    "bench": "--shape qwen3-30b --dtype bf16 --m 1,16",
    "compile": "--arch gfx942,gfx950,sm_90a --out images",
}

STATUS_FAILURE, STATUS_USAGE, STATUS_INTERRUPT, STATUS_BROKEN_PIPE = 1, 2, 130, 141


class Command(Protocol):
    """What a command's module offers."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Command and options; the process's own without it.

    Returns
    -------
    int
        Exit status: 0, 1 (failure or mismatch), 2 (wrong usage or arguments), 130 after Ctrl-C,
        141 where the reader of standard output went away.

    Raises
    ------
    SystemExit
        From argparse: --help, or a usage error.
    Exception
        Whatever a command raised, if the environment has MOEPAD_DEBUG set.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A command's own imports are paid for by that command alone.
    names = [arguments[0]] if arguments and arguments[0] in EXAMPLES else list(EXAMPLES)
    args = build_parser(names).parse_args(arguments)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return STATUS_INTERRUPT
    except BrokenPipeError:
        # The interpreter flushes standard output once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STATUS_BROKEN_PIPE
    except Exception as error:
        if os.environ.get("MOEPAD_DEBUG"):
            raise
        text, status = _explain(error)
        print(f"moepad {args.command}: {text}", file=sys.stderr)
        return status


def build_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """Parser of the given commands, each of them imported."""
    program = "python -m moepad" if Path(sys.argv[0]).name == "__main__.py" else "moepad"
    parser = argparse.ArgumentParser(
        prog=program,
        description="Padded mixture-of-experts weights and a fused MoE at the cost of its true "
        "size.",
        epilog="examples:\n"
        + "".join(f"  {program} {name} {EXAMPLES[name]}".rstrip() + "\n" for name in names)
        + "\nexit status: 0 all well, 1 failure or mismatch, 2 wrong usage or arguments\n"
        "MOEPAD_DEBUG=1 shows the traceback of an error",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in names:
        command = cast(Command, importlib.import_module(f"moepad.cli.{name}"))
        subparser = commands.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.HELP,
            epilog=f"example:\n  {program} {name} {EXAMPLES[name]}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _explain(error: Exception) -> tuple[str, int]:
    """Message and exit status of an exception."""
    if isinstance(error, CheckpointError):
        return str(error), STATUS_FAILURE
    if isinstance(error, (UnsupportedError, ValueError, TypeError)):
        return str(error), STATUS_USAGE
    if isinstance(error, FileNotFoundError):
        return f"{error.filename}: no such file or folder", STATUS_USAGE
    text = str(error) or "no details"
    return f"{type(error).__name__}: {text} (MOEPAD_DEBUG=1 shows where)", STATUS_FAILURE
