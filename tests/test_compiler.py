"""Device images: sources as one text, names that fit or are not taken, a cache of many writers."""

from __future__ import annotations

import json
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import moepad
import pytest
from conftest import require_tool
from moepad import compiler, runtimes
from moepad.cli import main

FAKE_COMPILER = """#!{python}
import sys
out = sys.argv[sys.argv.index("-o") + 1]
text = open(sys.argv[-1]).read()
if {fails}:
    sys.exit("moepad.hip:1: error: this one never works")
arch = [word for word in sys.argv if word.startswith("--offload-arch=")][0]
open(out, "wb").write(b"\\x7fELF image " + arch.encode() + b" of " + str(len(text)).encode())
"""


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is PATH and cache; no other compiler and no image is to be found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MOEPAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MOEPAD_IMAGES", raising=False)
    monkeypatch.setattr(compiler.runtimes, "compiler_libraries", lambda vendor: [])
    monkeypatch.setattr(compiler.runtimes, "rocm_roots", lambda: [])
    monkeypatch.setattr(compiler.runtimes, "cuda_roots", lambda: [])
    return tmp_path


def install(folder: Path, name: str, fails: bool = False) -> Path:
    program = folder / name
    program.write_text(FAKE_COMPILER.format(python=sys.executable, fails=fails))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_source_is_one_text() -> None:
    text = compiler.source("bf16")
    assert '#include "' not in text and "pragma once" not in text
    assert "mpad_gate_up_stream_bf16" in text
    for name in ("hip/arch.h", "csrc/gpu_args.h"):
        assert text.count(f'#line 1 "{name}"') == 1


def test_first_use_then_cache(alone: Path) -> None:
    install(alone, "clang")
    first = compiler.image("gfx942", "bf16")
    assert b"--offload-arch=gfx942" in first
    (alone / "clang").unlink()
    assert compiler.image("gfx942", "bf16") == first
    with pytest.raises(moepad.UnsupportedError, match="no compiler found for gfx950"):
        compiler.image("gfx950", "bf16")


def test_image_of_other_sources_is_not_taken(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(alone, "clang")
    compiler.image("gfx942", "bf16")
    (alone / "clang").unlink()
    other = compiler.source("") + "\n"
    monkeypatch.setattr(compiler, "_whole_source", lambda: other)
    with pytest.raises(moepad.UnsupportedError):
        compiler.image("gfx942", "bf16")


def test_each_refusal_is_told_and_the_next_compiler_tried(alone: Path) -> None:
    install(alone, "clang", fails=True)
    with pytest.raises(moepad.UnsupportedError) as caught:
        compiler.image("gfx942", "bf16")
    for part in ("this one never works", str(alone / "clang"), "python -m moepad compile", "cache"):
        assert part in str(caught.value)
    install(alone, "hipcc")
    assert compiler.image("gfx942", "bf16").startswith(b"\x7fELF")


def test_unknown_architecture(alone: Path) -> None:
    with pytest.raises(moepad.UnsupportedError, match="architecture gfx906; there are kernels for"):
        compiler.image("gfx906", "bf16")


def test_many_writers(alone: Path) -> None:
    install(alone, "clang")
    with ThreadPoolExecutor(4) as pool:
        images = set(pool.map(compiler.image, ["gfx942"] * 8, ["bf16"] * 8))
    assert len(images) == 1
    assert [path.suffix for path in (alone / "cache").iterdir()] == [".co"]


def test_cache_that_cannot_be_written_to(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(alone, "clang")
    (alone / "file").write_text("")
    monkeypatch.setenv("MOEPAD_CACHE", str(alone / "file" / "cache"))
    assert compiler.image("gfx942", "bf16").startswith(b"\x7fELF")


def test_compile_command(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(alone, "clang")
    out = alone / "out"
    chosen = ["--arch", "gfx942,gfx950", "--part", "bf16"]
    assert main(["compile", *chosen, "--out", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [row["arch"] for row in made["images"]] == ["gfx942", "gfx950"]
    os.environ["MOEPAD_IMAGES"] = str(out)
    try:
        (alone / "clang").unlink()
        assert compiler.find_image("gfx950", "bf16") == Path(made["images"][1]["file"])
    finally:
        del os.environ["MOEPAD_IMAGES"]
    for wrong in (["--arch", "gfx000"], ["--arch", "gfx942", "--part", "f64"], ["--arch", ","]):
        with pytest.raises(SystemExit):
            main(["compile", *wrong])


def test_real_clang_says_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    clang = require_tool("clang", *compiler.CLANGS)
    with pytest.raises(compiler.CompileError, match=r"hip/arch\.h:7:1: error"):
        compiler._run_clang(Path(clang), '#line 7 "hip/arch.h"\nnonsense', "gfx942")


def test_candidates_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*runtimes.OVERRIDES["amd"], *runtimes.ROCM_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROCM_PATH", "/somewhere")
    paths = [path for _, path, _ in runtimes.candidates("amd")]
    order = ["libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so"]
    order += ["/somewhere/lib/libamdhip64.so", "/opt/rocm/lib/libamdhip64.so"]
    assert [path for path in paths if path in order] == order
    monkeypatch.setenv("MOEPAD_HIP_LIBRARY", "/mine.so")
    assert runtimes.candidates("amd") == [("MOEPAD_HIP_LIBRARY", "/mine.so", True)]
