"""The pages on frameworks do what they say: their examples and commands are run as they stand."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import require
from csources import ROOT
from safetensors.numpy import save_file

PREFIX = "model.layers.0.mlp.experts"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def write_model(folder: Path) -> None:
    """The folder docs/transformers.md loads."""
    transformers = require("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)


def write_layer(folder: Path) -> None:
    """The folder docs/distributed.md loads: eight experts, 64 wide, 1536 inside."""
    rng = np.random.default_rng(0)
    shapes = {"gate": (1536, 64), "up": (1536, 64), "down": (64, 1536)}
    tensors = {
        f"{PREFIX}.{expert}.{name}_proj.weight": rng.standard_normal(shape, np.float32) / 30
        for expert in range(8)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("page", ["torch.md", "transformers.md", "aiter.md"])
def test_examples_print_what_they_say(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = require("torch")
    if page == "transformers.md":
        write_model(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        monkeypatch.delitem(sys.modules, name)
    torch.manual_seed(0)
    text = "".join(blocks(page, "pycon"))
    example = doctest.DocTestParser().get_doctest(text, {}, page, page, 0)
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.append, clear_globs=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        del sys.modules[name]
    assert result.attempted >= 8 and result.failed == 0, "".join(report)


def test_ranks_agree_with_one(tmp_path: Path) -> None:
    require("torch")
    write_layer(tmp_path / "checkpoint")
    (program,) = blocks("distributed.md", "python")
    (tmp_path / "layer.py").write_text(program)
    (command,) = blocks("distributed.md", "sh")
    assert command.startswith("python ")
    done = subprocess.run(
        command.replace("python", sys.executable, 1),
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "4 ranks agree with one" in done.stdout


def test_the_table_of_splits() -> None:
    """docs/distributed.md says what `plan` does."""
    import moepad

    def shares(n_inter: int, n_rank: int, **options: object) -> list[int]:
        plans = [
            moepad.plan(4096, n_inter, 8, tp_size=n_rank, tp_rank=rank, **options)
            for rank in range(n_rank)
        ]
        return [plan.n_inter for plan in plans]

    for split in ("true", "padded"):
        assert shares(1536, 8, split=split) == [192] * 8
    assert shares(1536, 8, split="padded", align=128) == [256] * 6 + [0] * 2
    assert shares(1536, 8, split="block", quant="fp8_block") == [256] * 4 + [128] * 4
    for split in ("true", "block"):
        assert shares(50, 4, split=split) == [13, 13, 12, 12]
    assert shares(50, 4, split="padded") == [13, 13, 13, 11]
