"""What setup.py compiles and how, read from its text: shared by the layer tests and the C build."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Those that need Python's headers.
PYTHON_SOURCES = ("csrc/module.c", "csrc/memory.c", "csrc/tensor.c", "csrc/device.c")


def setup_constant(name: str) -> Any:
    """Value of a top-level literal of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py: no top-level literal {name}")


SOURCES: list[str] = setup_constant("SOURCES")
CFLAGS: list[str] = setup_constant("CFLAGS")
ISA_FLAGS: dict[str, list[str]] = setup_constant("ISA_FLAGS")


def build(
    compiler: str, flags: Sequence[str], sources: Sequence[str], target: Path, folder: Path
) -> None:
    """Compile `sources` (paths from the root), each with its own ISA flags, and link `target`."""

    def compiled(source: str) -> str:
        result = str(folder / (Path(source).name + ".o"))
        isa = ISA_FLAGS.get(source, [])
        common = [*CFLAGS, "-Werror", "-D_GNU_SOURCE", "-Icsrc"]
        _run([compiler, *common, *flags, *isa, "-c", source, "-o", result])
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    _run([compiler, *flags, *objects, "-o", str(target), "-pthread", "-lm"])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
