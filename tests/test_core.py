"""The C core without Python, built by several compilers and watched by their sanitizers.

tests/c/test_core.c holds the checks; this file builds it with the flags of setup.py and runs it:
plain, under AddressSanitizer with UndefinedBehaviorSanitizer, under ThreadSanitizer, and the
portable part for aarch64 in an emulator.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import missing, require_tool
from csources import ISA_FLAGS, PYTHON_SOURCES, SOURCES, build

CORE = [source for source in SOURCES if source not in PYTHON_SOURCES]
HAS_X86 = platform.machine() in ("x86_64", "AMD64")
LIMIT_S = 600  # ThreadSanitizer makes barriers slow where cores are few


def run_core(
    compiler: str,
    flags: Sequence[str],
    folder: Path,
    *,
    with_isa: bool,
    emulator: Sequence[str] = (),
    options: Sequence[str] = (),
) -> None:
    sources = [*(ISA_FLAGS if with_isa else ()), *CORE, "tests/c/test_core.c"]
    target = folder / "test_core"
    build(compiler, flags, sources, target, folder)
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "abort_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        # The fork test makes threads in the child on purpose.
        "TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0",
    }
    done = subprocess.run(
        [*emulator, str(target), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "all checks passed" in done.stdout


def require_sanitizer(compiler: str, flag: str, folder: Path) -> None:
    """`missing` unless the compiler links a program with this sanitizer and the program runs."""
    source, target = folder / "probe.c", folder / "probe"
    source.write_text("int main(void) { return 0; }\n")
    for command in ([compiler, flag, str(source), "-o", str(target)], [str(target)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            missing("sanitizers", f"{' '.join(command)} fails: {done.stderr.strip()[-200:]}")


def test_plain(tmp_path: Path) -> None:
    compiler = require_tool("cc", "cc", "gcc", "clang")
    run_core(compiler, ["-O2"], tmp_path, with_isa=HAS_X86)


@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_sanitized(kind: str, tmp_path: Path) -> None:
    compiler = require_tool("clang", "clang-22", "clang")
    flag = f"-fsanitize={kind}"
    require_sanitizer(compiler, flag, tmp_path)
    flags = ["-O1", "-gline-tables-only", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    if kind != "thread":  # checks as calls: the same ones, compiled in half the time
        flags.append("-fsanitize-address-outline-instrumentation")
    flags.append(flag)
    run_core(compiler, flags, tmp_path, with_isa=HAS_X86)


def test_aarch64(tmp_path: Path) -> None:
    """Without the fork tests: QEMU before 8.1 can hang in them (its issue 285), on any guest."""
    compiler = require_tool("aarch64", "aarch64-linux-gnu-gcc")
    emulator = require_tool("qemu", "qemu-aarch64-static", "qemu-aarch64")
    run_core(
        compiler,
        ["-O2", "-static"],
        tmp_path,
        with_isa=False,
        emulator=[emulator],
        options=["--no-fork"],
    )
