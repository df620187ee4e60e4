"""README.md and docs/ say what is so: their examples run, their files exist, their tables agree."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from csources import ROOT
from moepad.cli import EXAMPLES, build_parser, env
from moepad.encodings import ENCODINGS, REFUSED
from safetensors.numpy import save_file

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    """Fenced code blocks of README.md in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder README's example loads: eight experts, 64 wide, 1536 inside, in float32."""
    rng = np.random.default_rng(0)
    tensors = {}
    for expert in range(8):
        prefix = f"model.layers.0.mlp.experts.{expert}"
        for name, shape in (("gate", (1536, 64)), ("up", (1536, 64)), ("down", (64, 1536))):
            tensors[f"{prefix}.{name}_proj.weight"] = rng.standard_normal(shape, np.float32)
    (tmp_path / "checkpoint").mkdir()
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("checkpoint")
def test_readme_example_prints_what_it_says() -> None:
    (text,) = blocks("pycon")
    example = doctest.DocTestParser().get_doctest(text, {}, "README.md", "README.md", 0)
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert result.attempted >= 8 and result.failed == 0, "".join(report)


def test_checkpoints_page_names_every_encoding() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    for row in ENCODINGS:
        names = [f"weight{row.weight}", f"weight{row.scale}"]
        if row.form == "blocks":
            names = [f"gate_up_proj{row.weight}", f"gate_up_proj{row.scale}"]
        for name in names:
            assert f"`{name.replace('weight.', '')}`" in page, name
        assert all(f"`{quant}`" in page for quant in row.quants)
    assert all(f"`{name}`" in page for name in REFUSED if name != "input_global_scale")


def test_readme_commands_are_real() -> None:
    install, commands = blocks("sh")
    ci = (ROOT / ".ci" / "run").read_text()
    for line in install.splitlines():
        assert line in ci, f".ci/run does not run: {line}"
    named = set()
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)
        assert words[:3] == ["python", "-m", "moepad"]
        named.add(build_parser(words[3:4]).parse_args(words[3:]).command)
    assert named | {"demo"} == set(EXAMPLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    folders = [ROOT, ROOT / "csrc", ROOT / "python" / "moepad"]
    named = re.findall(
        r"`((?:[\w.-]+/)+|(?:[\w.-]+/)*[\w-]+\.(?:py|pyi|c|h|md|toml)|(?:[\w.-]+/)+[\w.-]+|LICENSE)`",
        page.read_text(),
    )
    for name in named:
        assert any((folder / name).exists() for folder in folders), f"{page.name}: no {name}"


def test_environment_table_is_complete() -> None:
    """Every variable the sources read is in the table, and no other."""
    listed = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", section("Environment")))
    sources = [
        ROOT / "setup.py",
        ROOT / "tests" / "conftest.py",
        *(ROOT / "tests").glob("test_*.py"),
    ]
    for folder in (ROOT / "csrc", ROOT / "python"):
        sources += [path for path in folder.rglob("*") if path.suffix in (".c", ".py")]
    sources = [path for path in sources if path.name not in ("env.py", Path(__file__).name)]
    text = "".join(path.read_text() for path in sources)
    read = set(re.findall(r"\"(MOEPAD_[A-Z_]+|OMP_NUM_THREADS|SGLANG_MOE_PADDING)\"", text))
    assert listed == read
    assert set(env.VARIABLES) <= listed


def test_support_table_names_every_kind() -> None:
    header = (ROOT / "csrc" / "params.h").read_text()
    table = section("What is supported")
    for kind in ("QUANT", "ACT"):
        body = header.split(f"#define MPAD_{kind}_LIST(X)", 1)[1].split("typedef", 1)[0]
        for name in re.findall(r'X\(\w+, "(\w+)"', body):
            assert f"`{name}`" in table, f"{name} is not in the table"
