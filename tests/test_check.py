"""The commands check and demo: right checkpoints pass, planted faults of every kind do not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moepad
import numpy as np
import pytest
from checkpoints import FORMATS, UNGATED, WRITERS, make_layer, make_quantised, write_folder
from moepad import verify
from moepad.cli import check, demo, main
from moepad.cli.check import _layers
from moepad.verify import layer_number

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 24,
    "moe_intermediate_size": 20,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 12,
    "dtype": "bfloat16",
}
SIZES = {"n_hidden": 24, "n_inter": 20, "n_expert": 6, "is_normal": True}
NAMES = {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}

# What families without a test of their own in test_transformers.py have: layout, where the experts
# lie, and what is different in config.json.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("gate_up_down", "model.layers.{}.mlp.experts", {}),
    "llama4_text": (
        "fused_transposed",
        "language_model.model.layers.{}.feed_forward.experts",
        {"num_local_experts": 6, "intermediate_size": 20},
    ),
    "granitemoe": ("granite", "model.layers.{}.block_sparse_moe", {"num_local_experts": 6}),
    "nemotron_h": (
        "up_down",
        "backbone.layers.{}.mixer.experts",
        {"n_routed_experts": 6, "mlp_hidden_act": "relu2"},
    ),
    "gemma4": ("fused", "model.layers.{}.experts", {"hidden_activation": "gelu_pytorch_tanh"}),
    "minimax_m2": ("w1_w3_w2", "model.layers.{}.block_sparse_moe.experts", {"swiglu_limit": 0.5}),
    "gpt_oss": ("gpt_oss", "model.layers.{}.mlp.experts", {}),
}


def write_model(
    folder: Path, family: str = "qwen3_moe", layers: tuple[int, ...] = (0, 10), **config: Any
) -> Path:
    layout, prefix, differences = FAMILIES[family]
    tensors = {}
    for seed in layers:
        layer = make_layer(
            **SIZES, seed=seed, gated=layout not in UNGATED, bias=family == "gpt_oss"
        )
        for name, values in WRITERS[layout](layer).items():
            tensors[f"{prefix.format(seed)}.{name}"] = np.ascontiguousarray(values)
    write_folder(folder, tensors)
    text = json.dumps({**CONFIG, "model_type": family, **differences, **config})
    (folder / "config.json").write_text(text)
    return folder


def compressed(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {**weights, "symmetric": True}}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command: exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


# --- Right checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(), ("--tp", 3, "--ep", 2, "--align", 8)], ids=["one", "six"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, run: Run, family: str, ranks: tuple[object, ...]) -> None:
    status, out, error = run("check", write_model(tmp_path / "m", family), *ranks, "--json")
    assert status == 0, out + error
    report = json.loads(out)
    assert report["ok"] and [layer["layer"] for layer in report["layers"]] == [0, 10]
    for layer in report["layers"]:
        assert layer["ok"] and 0 < layer["error"] <= layer["allowed"]
        assert layer["n_token"] == 16 and layer["run_seconds"] > 0 and layer["load_seconds"] > 0
    assert len(report["ranks"]) == (6 if ranks else 1)


def test_table(tmp_path: Path, run: Run) -> None:
    folder = write_model(tmp_path / "m")
    status, out, error = run("check", folder, "--tp", 3, "--align", 16)
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "m: hidden 24, 6 experts of 20, top 2, silu, bf16"
    assert lines[1] == "tp 3, split true: columns per rank and expert 6 to 7, padded to 16 with NaN"
    assert lines[3].split()[:3] == ["layer", "n_inter", "padded"]
    assert [line.split()[0] for line in lines[5:7]] == ["0", "10"]
    assert all(line.endswith("ok") for line in lines[5:7])
    assert lines[-1].startswith("ok: the sum over 3 ranks is the float64 result")
    assert lines[-1].endswith("in 2 of 2 layers")


def test_layers_and_tokens(tmp_path: Path, run: Run) -> None:
    folder = write_model(tmp_path / "m", layers=(0, 1, 2, 5))
    _, out, _ = run("check", folder, "--layers", "5,1-2", "--tokens", 3, "--json")
    layers = json.loads(out)["layers"]
    assert [layer["layer"] for layer in layers] == [5, 1, 2]
    assert {layer["n_token"] for layer in layers} == {3}


def test_every_expert_gets_tokens(tmp_path: Path, run: Run) -> None:
    """More experts than 16 tokens have slots: more tokens."""
    folder = tmp_path / "m"
    layer = make_layer(n_hidden=8, n_inter=4, n_expert=40, is_normal=True)
    tensors = WRITERS["gate_up_down"](layer)
    write_folder(folder, {f"model.layers.0.mlp.experts.{n}": t for n, t in tensors.items()})
    config = {"hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 40}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config, "num_experts_per_tok": 2}))
    _, out, _ = run("check", folder, "--json")
    assert json.loads(out)["layers"][0]["n_token"] == 20
    rng = np.random.default_rng(0)
    assert len(np.unique(verify._routing(rng, 20, 2, 40))) == 40


def test_dtype(tmp_path: Path, run: Run) -> None:
    folder = write_model(tmp_path / "m", dtype="float32")
    status, _, error = run("check", folder)
    assert status == 1 and "expected dtype f32, got bf16" in error
    assert run("check", folder, "--dtype", "bf16")[0] == 0


@pytest.mark.parametrize(
    ("text", "layers"), [("0", [0]), ("0,3-5", [0, 3, 4, 5]), ("7-7,2", [7, 2])]
)
def test_layer_lists(text: str, layers: list[int]) -> None:
    assert _layers(text) == layers


@pytest.mark.parametrize(
    ("prefix", "number"),
    [
        ("model.layers.12.mlp.experts", 12),
        ("layers.3", 3),
        ("model.mtp.0.layers.4.experts", 4),
        ("experts", None),
        ("h2.experts", None),
    ],
)
def test_layer_number(prefix: str, number: int | None) -> None:
    assert layer_number(prefix) == number


# --- Faults --------------------------------------------------------------------------------------


def swap_gate_and_up(experts: moepad.Experts) -> None:
    half = experts.plan.n_inter_pad
    experts.w13[:, :half], experts.w13[:, half:] = (
        experts.w13[:, half:].copy(),
        experts.w13[:, :half].copy(),
    )


def shift_one_column(experts: moepad.Experts) -> None:
    experts.w2[:, :, 1 : experts.plan.n_inter] = experts.w2[:, :, : experts.plan.n_inter - 1]


def lose_one_row_of_one_expert(experts: moepad.Experts) -> None:
    if experts.plan.tp_rank == 2:
        experts.w13[4, 5] = 0


def swap_two_experts(experts: moepad.Experts) -> None:
    experts.w13[[0, 1]] = experts.w13[[1, 0]]


def repeat_w2_bias(experts: moepad.Experts) -> None:
    assert experts.w2_bias is not None
    experts.w2_bias[:] = 0.25


def lose_w13_bias(experts: moepad.Experts) -> None:
    assert experts.w13_bias is not None
    experts.w13_bias[:] = 0


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("qwen3_moe", swap_gate_and_up),
        ("qwen3_moe", shift_one_column),
        ("qwen3_moe", lose_one_row_of_one_expert),
        ("qwen3_moe", swap_two_experts),
        ("gpt_oss", repeat_w2_bias),
        ("gpt_oss", lose_w13_bias),
    ],
)
def test_a_loader_fault_is_noticed(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, family: str, fault: Any
) -> None:
    def load(*arguments: Any, **options: Any) -> moepad.Experts:
        experts = moepad.load_experts(*arguments, **options)
        fault(experts)
        return experts

    monkeypatch.setattr(verify, "load_experts", load)
    folder = write_model(tmp_path / "m", family)
    status, out, _ = run("check", folder, "--tp", 3, "--align", 8)
    assert status == 1
    assert out.count("WRONG") == 3
    found = re.search(r"token (\d+), column (\d+) .* off by (\S+), rounding explains (\S+)$", out)
    assert found and float(found[3]) > float(found[4])
    status, out, _ = run("check", folder, "--tp", 3, "--align", 8, "--json")
    assert status == 1 and not json.loads(out)["ok"]


def test_reading_a_pad_is_noticed(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that multiplies pads, be it with zeros, gives NaN."""

    def call(self: moepad.Experts, x: Any, weights: Any, ids: Any, **options: Any) -> Any:
        return moepad.fused_moe(x, self.w13, self.w2, weights, ids, **options)

    monkeypatch.setattr(moepad.Experts, "__call__", call)
    folder = write_model(tmp_path / "m")
    status, out, _ = run("check", folder, "--tp", 3, "--align", 8, "--json")
    report = json.loads(out)
    assert status == 1 and {layer["error"] for layer in report["layers"]} == {None}
    assert run("check", folder, "--tp", 5)[0] == 0  # four columns each and no pad


def test_damaged_checkpoints(tmp_path: Path, run: Run) -> None:
    folder = write_model(tmp_path / "m")
    path = folder / "model-00002-of-00003.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    status, _, error = run("check", folder)
    assert status == 1 and str(path) in error and "truncated" in error
    assert len(error.splitlines()) == 1
    path.unlink()
    status, _, error = run("check", folder)
    assert status == 1 and str(path) in error and "does not exist" in error


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"moe_intermediate_size": 21}, ["expected shape (21, 24)", "got (20, 24)"]),
        ({"num_experts": 5}, ["got expert 5"]),
        ({"num_experts": 7}, ["6.gate_proj.weight: missing"]),
        ({"hidden_size": 25}, ["expected shape (20, 25)"]),
        ({"model_type": "nemotron_h"}, ["gated=True"]),
    ],
)
def test_config_and_tensors_disagree(
    tmp_path: Path, run: Run, config: dict[str, Any], words: list[str]
) -> None:
    status, _, error = run("check", write_model(tmp_path / "m", **config))
    assert status == 1
    for word in words:
        assert word in error


def test_usage_errors(tmp_path: Path, run: Run) -> None:
    folder = write_model(tmp_path / "m")
    for arguments, word in (
        (["--layers", "4"], "layers: 4 has no experts; those with experts are 0, 10"),
        (["--layers", "x"], "expected a list such as 0,3-5"),
        (["--tp", 0], "tp_size"),
        (["--split", "odd"], "split"),
        (["--tokens", 0], "tokens: expected at least 1, got 0"),
        (["--dtype", "f8_e4m3fn"], "dtype"),
        (["--dtype", "int3"], "dtype"),
    ):
        status, out, error = run("check", folder, *arguments)
        assert (status, out) == (2, ""), arguments
        assert word in error
    assert run("check", tmp_path / "nowhere")[0] == 2
    assert run("check")[0] == 2


# Format of tests/checkpoints.py, where experts lie, and what config.json says of it.
QUANTISED: dict[str, tuple[str, dict[str, Any]]] = {
    "hf fp8 block": (
        "model.layers.{}.mlp.experts",
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 64]},
    ),
    "hf fp8 block w1": (
        "model.layers.{}.block_sparse_moe.experts",
        {"quant_method": "fp8", "weight_block_size": [32, 64]},
    ),
    "step fp8 block": (
        "model.layers.{}.moe",
        {"quant_method": "fp8", "weight_block_size": [32, 64]},
    ),
    "ct fp8 channel": (
        "model.layers.{}.mlp.experts",
        compressed(num_bits=8, type="float", strategy="channel"),
    ),
    "ct fp8 tensor": (
        "model.layers.{}.mlp.experts",
        compressed(num_bits=8, type="float", strategy="tensor"),
    ),
    "ct int8": (
        "model.layers.{}.mlp.experts",
        compressed(num_bits=8, type="int", strategy="channel"),
    ),
    "ct int4": (
        "model.layers.{}.mlp.experts",
        compressed(num_bits=4, type="int", strategy="group", group_size=32),
    ),
    "gptq": (
        "model.layers.{}.mlp.experts",
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    ),
    "ct mxfp4": (
        "model.layers.{}.mlp.experts",
        compressed(num_bits=4, type="float", strategy="group", group_size=32),
    ),
    "quark mxfp4": (
        "model.layers.{}.mlp.experts",
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}},
    ),
    "v4 fp4": (
        "layers.{}.ffn.experts",
        {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"},
    ),
    "gpt-oss": ("model.layers.{}.mlp.experts", {"quant_method": "mxfp4"}),
    "mxfp8": ("model.layers.{}.mlp.experts", {"quant_method": "mxfp8"}),
    "modelopt fp8": (
        "backbone.layers.{}.mixer.experts",
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "fused fp8 block": (
        "model.layers.{}.mlp.experts",
        {"quant_method": "fp8", "weight_block_size": [32, 64]},
    ),
    "fused fp8 block transposed": (
        "model.layers.{}.mlp.experts",
        {"quant_method": "fp8", "weight_block_size": [32, 64]},
    ),
    "fused fp8 tensor": ("model.layers.{}.mlp.experts", {"quant_method": "fp8"}),
}


def write_quantised(folder: Path, name: str) -> Path:
    form, (prefix, quantisation) = FORMATS[name], QUANTISED[name]
    block = (1, 32) if form.quant == "int4_group" else (32, 64)
    layer = make_quantised(
        form.quant, 72, 160, 4, gated=form.gated, bias=form.bias, block=block,
        scale_dtype=form.scale_dtype,
    )  # fmt: skip
    root = prefix.format(3)
    tensors = {f"{root}.{key}": np.array(value) for key, value in form.write(layer).items()}
    write_folder(folder, tensors)
    kind = {"gpt-oss": "gpt_oss", "modelopt fp8": "nemotron_h"}.get(name, "qwen3_moe")
    sizes = {"hidden_size": 72, "moe_intermediate_size": 160, "num_experts": 4}
    extra = {"mlp_hidden_act": "relu2"} if kind == "nemotron_h" else {}
    text = {**CONFIG, **sizes, **extra, "model_type": kind, "quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(text))
    return folder


@pytest.mark.parametrize("ranks", [(), ("--tp", 3, "--ep", 2, "--align", 64)], ids=["one", "six"])
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised(tmp_path: Path, run: Run, name: str, ranks: tuple[object, ...]) -> None:
    status, out, error = run("check", write_quantised(tmp_path / "m", name), *ranks, "--json")
    assert status == 0, out + error
    report = json.loads(out)
    assert [layer["layer"] for layer in report["layers"]] == [3]
    assert all(0 < layer["error"] <= layer["allowed"] for layer in report["layers"])
    assert {rank["quant"] for rank in report["ranks"]} == {FORMATS[name].quant}


def test_quantised_splits(tmp_path: Path, run: Run) -> None:
    folder = write_quantised(tmp_path / "m", "quark mxfp4")
    for split in ("padded", "block"):
        assert run("check", folder, "--tp", 4, "--split", split, "--align", 64)[0] == 0
    status, out, error = run("check", folder, "--tp", 4, "--split", "padded", "--align", 8)
    assert (status, out) == (2, "") and "inside a scale group" in error
    _, out, _ = run("check", folder)
    assert out.startswith("m: hidden 72, 4 experts of 160, top 2, silu, bf16, Quark MXFP4\n")


def spoil_scale(experts: moepad.Experts) -> None:
    assert experts.w13_scale is not None
    experts.w13_scale[1, 3] = experts.w13_scale[1, 4]


def shift_scales(experts: moepad.Experts) -> None:
    assert experts.w2_scale is not None
    experts.w2_scale[...] = np.roll(experts.w2_scale.view(np.uint8), 1).view(experts.w2_scale.dtype)


@pytest.mark.parametrize("fault", [spoil_scale, shift_scales])
def test_a_fault_of_scales_is_noticed(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    def load(*arguments: Any, **options: Any) -> moepad.Experts:
        experts = moepad.load_experts(*arguments, **options)
        fault(experts)
        return experts

    monkeypatch.setattr(verify, "load_experts", load)
    status, out, _ = run("check", write_quantised(tmp_path / "m", "quark mxfp4"), "--tp", 2)
    assert status == 1 and "WRONG" in out


def test_unknown_quantisation_is_refused(tmp_path: Path, run: Run) -> None:
    quantisation = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    folder = write_model(tmp_path / "m", quantization_config=quantisation)
    status, _, error = run("check", folder)
    assert status == 2 and "ModelOpt NVFP4" in error and "fp8_block" in error


def test_no_experts(tmp_path: Path, run: Run) -> None:
    folder = write_model(tmp_path / "m", layers=())
    dense = {"model.layers.0.mlp.gate_proj.weight": np.zeros((2, 2), np.float32)}
    write_folder(folder, dense, 1)
    status, _, error = run("check", folder)
    assert status == 1 and "no layer" in error


# --- Demo ----------------------------------------------------------------------------------------


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same demo in a second: what it shows is made of the same parts."""
    smaller = {"hidden_size": 64, "num_hidden_layers": 2}
    monkeypatch.setattr(demo, "CONFIG", {**demo.CONFIG, **smaller})
    monkeypatch.setattr(demo, "TIMED", {**demo.TIMED, "n_hidden": 64})
    monkeypatch.setattr(demo, "TIMED_SECONDS", 0.02)
    demo._timed_weights.cache_clear()


@pytest.mark.usefixtures("small_demo")
def test_demo(run: Run) -> None:
    status, out, error = run("demo")
    assert (status, error) == (0, "")
    assert "columns per rank and expert 192, padded to 256 with NaN" in out
    assert "ok: the sum over 8 ranks is the float64 result" in out
    assert re.search(r"^ +256 +[\d.]+ ms +[\d.]+ ms +[\d.]+ ms +-?\d+ %$", out, re.MULTILINE)
    assert max(len(line) for line in out.splitlines()) <= 100


@pytest.mark.parametrize("quant", demo.FORMATS)
@pytest.mark.usefixtures("small_demo")
def test_demo_quantised(run: Run, quant: str) -> None:
    status, out, error = run("demo", "--quant", quant, "--json")
    assert (status, error) == (0, "")
    report = json.loads(out)
    assert report["check"]["ok"] and not report["timings"]
    assert {rank["quant"] for rank in report["check"]["ranks"]} == {quant}
    assert {rank["n_inter"] for rank in report["check"]["ranks"]} == {192}


@pytest.mark.usefixtures("small_demo")
def test_demo_json(run: Run) -> None:
    status, out, _ = run("demo", "--json")
    report = json.loads(out)
    assert status == 0 and report["check"]["ok"]
    assert {rank["n_inter"] for rank in report["check"]["ranks"]} == {192}
    assert [row["n_token"] for row in report["timings"]] == list(demo.TIMED_TOKENS)
    assert all(row[kind] > 0 for row in report["timings"] for kind in row)


@pytest.mark.usefixtures("small_demo")
def test_demo_fails_with_the_check(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "check_layer", wrong(check.check_layer))
    status, out, _ = run("demo")
    assert status == 1 and "WRONG in 2 of 2 layers" in out


def wrong(check_layer: Callable[..., verify.LayerResult]) -> Callable[..., verify.LayerResult]:
    def call(*arguments: Any) -> verify.LayerResult:
        result = check_layer(*arguments)
        return verify.LayerResult(**{**vars(result), "error": 2 * result.allowed})

    return call


@pytest.mark.large
def test_demo_as_a_newcomer_runs_it() -> None:
    """In a process of its own, as it is, within a minute, without any framework."""
    code = (
        "import sys; from moepad.cli import main; status = main(['demo']); "
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 layers" in done.stdout
