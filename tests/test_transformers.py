"""Checkpoints that transformers itself wrote, and its own MoE blocks as the judge of the result."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import moepad
import numpy as np
import pytest
from checkpoints import FORMATS, Quantised, make_quantised
from conftest import require
from moepad import reference
from moepad.checkpoint import open_source
from moepad.cli import demo, main
from moepad.layouts import expert_prefixes
from moepad.models import read_config
from moepad.testing import check_bits, check_close
from moepad.verify import options_of, sum_error
from numpy.typing import NDArray
from safetensors.numpy import save_file

torch = require("torch")
transformers = require("transformers")

Array = NDArray[Any]

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GROUPS = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}

# Family: class of its model, keyword of the experts' width, everything else that is not COMMON.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "moe_intermediate_size",
        {"num_experts": 8, "num_experts_per_tok": 3, "head_dim": 16},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "intermediate_size",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        "intermediate_size",
        {"num_experts": 8, "num_experts_per_tok": 4},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "moe_intermediate_size",
        {"n_routed_experts": 8, "num_experts_per_tok": 2, **MLA, **GROUPS},
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "moe_intermediate_size",
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, **GROUPS},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "intermediate_size",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    ),
}
WIDTHS = (48, 50)  # one that eight ranks divide, one that they do not


def make_model(family: str, n_inter: int, dtype: str) -> Any:
    class_name, width, rest = FAMILIES[family]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**{**COMMON, **rest, width: n_inter})
    torch.manual_seed(n_inter)
    model = model_class(config).to(getattr(torch, dtype)).eval()
    for name, tensor in model.named_parameters():
        if "bias" in name:  # transformers starts them at zero, where a lost one would not show
            torch.nn.init.normal_(tensor, std=0.5)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes the checkpoint of a family, width and type once."""

    @functools.cache
    def write(family: str, n_inter: int, dtype: str = "bfloat16") -> Path:
        folder: Path = tmp_path_factory.mktemp(f"{family}-{n_inter}-{dtype}")
        make_model(family, n_inter, dtype).save_pretrained(folder, max_shard_size="200KB")
        return folder

    return write


def run_check(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    status = main(["check", *map(str, arguments), "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (status == 0) == report["ok"]
    return report


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("n_inter", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_check(
    checkpoint: Any, capsys: pytest.CaptureFixture[str], family: str, n_inter: int, tp: int
) -> None:
    folder = checkpoint(family, n_inter)
    report = run_check(capsys, folder, "--tp", tp, "--align", 16)
    assert report["ok"], report["layers"]
    expected = list(read_config(folder).moe_layers or ())
    assert [layer["layer"] for layer in report["layers"]] == expected
    assert sum(rank["n_inter"] for rank in report["ranks"]) == n_inter
    assert all(rank["n_inter_pad"] % 16 == 0 for rank in report["ranks"])


@pytest.mark.parametrize("split", ["true", "padded", "block"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_check_other_ranks(
    checkpoint: Any, capsys: pytest.CaptureFixture[str], family: str, split: str
) -> None:
    """Expert parallelism on top, and the rules that leave ranks without columns."""
    arguments = ("--tp", 4, "--ep", 3, "--split", split, "--align", 32)
    report = run_check(capsys, checkpoint(family, 50), *arguments)
    assert report["ok"], report["layers"]
    assert len(report["ranks"]) == 12


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_check_other_types(checkpoint: Any, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    assert run_check(capsys, checkpoint("olmoe", 50, dtype), "--tp", 4)["ok"]


class Seen(dict[str, Array]):
    """What one MoE block's experts were given and what they gave, as float32 arrays."""


def run_model(model: Any, n_token: int = 23) -> list[Seen]:
    """One forward pass; what each experts module saw, in the order of the layers."""
    seen = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        x, ids, weights = inputs
        seen.append(Seen(x=x.numpy(), ids=ids.numpy(), weights=weights.numpy(), out=output.numpy()))

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_hook(hook)
    tokens = torch.randint(0, COMMON["vocab_size"], (1, n_token))
    with torch.no_grad():
        model(input_ids=tokens)
    return seen


@pytest.mark.parametrize("n_inter", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_block(checkpoint: Any, family: str, n_inter: int) -> None:
    """On its own checkpoint and its own routing, in float32, whole and summed over ranks."""
    folder = checkpoint(family, n_inter, "float32")
    model = make_model(family, n_inter, "float32")
    model.set_experts_implementation("eager")  # the default one takes no width of 50
    config = read_config(folder)
    source = open_source(folder)
    prefixes = expert_prefixes(source)
    seen = run_model(model)
    assert len(seen) == len(prefixes) > 0
    options = options_of(config)
    for prefix, block in zip(prefixes, seen, strict=True):
        sizes = {
            "n_hidden": config.n_hidden,
            "n_inter": n_inter,
            "n_expert": config.n_expert,
            "bias": config.bias,
            "dtype": "f32",
        }
        call = (block["x"], block["weights"], block["ids"])
        whole = moepad.load_experts(source, prefix, moepad.plan(**sizes))
        arrays = (block["x"], whole.w13, whole.w2, block["weights"], block["ids"])
        biases = {"w13_bias": whole.w13_bias, "w2_bias": whole.w2_bias}
        right = reference.fused_moe(*arrays, **biases, **options)
        naive = reference.naive(*arrays, **biases, **options)
        check_close(block["out"], right, naive)
        check_close(whole(*call, **options), right, naive)
        parts, naive_parts = [], []
        for rank in range(3):
            plan = moepad.plan(**sizes, tp_size=3, tp_rank=rank, align=8)
            part = moepad.load_experts(source, prefix, plan)
            parts.append(part(*call, **options))
            biases = {"w13_bias": part.w13_bias, "w2_bias": part.w2_bias}
            arrays = (block["x"], part.w13, part.w2, block["weights"], block["ids"])
            naive_parts.append(reference.naive(*arrays, n_inter=plan.n_inter, **biases, **options))
        error, allowed = sum_error(parts, naive_parts, right)
        assert (error <= allowed).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_in_memory(checkpoint: Any, family: str) -> None:
    """A model's own state_dict, fused and of torch tensors, gives the bits its files give."""
    folder = checkpoint(family, 50)
    state = make_model(family, 50, "bfloat16").state_dict()
    config = read_config(folder)
    plan = moepad.plan(
        config.n_hidden, config.n_inter, config.n_expert, bias=config.bias, tp_size=3, tp_rank=1
    )
    in_files = expert_prefixes(open_source(folder))
    in_memory = expert_prefixes(open_source(state))
    assert len(in_files) == len(in_memory) > 0
    for from_file, from_memory in zip(in_files, in_memory, strict=True):
        stored = moepad.load_experts(folder, from_file, plan)
        live = moepad.load_experts(state, from_memory, plan)
        for name, tensor in stored._tensors.items():
            check_bits(tensor, live._tensors[name])
        stored.w13[...] = stored.w2[...] = ml_dtypes.bfloat16(0)
        stored.update(state, from_memory)
        for name, tensor in stored._tensors.items():
            check_bits(tensor, live._tensors[name])


def test_demo_checkpoint_is_a_true_one(tmp_path: Path) -> None:
    """transformers loads what the demo writes, with no tensor missing and none left over."""
    demo.write_checkpoint(tmp_path)
    model, info = transformers.Qwen3MoeForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert next(model.parameters()).dtype == torch.bfloat16


# --- Quantised -----------------------------------------------------------------------------------


def write_quantised(folder: Path, family: str, n_inter: int, layer: Quantised) -> None:
    """The family's checkpoint with both layers' experts replaced by `layer`'s tensors."""
    write, method = {
        "gpt_oss": (FORMATS["gpt-oss"].write, {"quant_method": "mxfp4"}),
        "qwen3_moe": (
            FORMATS["hf fp8 block"].write,
            {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
        ),
    }[family]
    model = make_model(family, n_inter, "bfloat16")
    model.save_pretrained(folder)
    tensors = open_source(folder)
    state = {
        name: tensors.find(name)[0].fetch().copy()
        for name in tensors.names()
        if ".experts." not in name
    }
    for i in range(COMMON["num_hidden_layers"]):
        for name, values in write(layer).items():
            state[f"model.layers.{i}.mlp.experts.{name}"] = values.copy()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    plain = [name.removesuffix(".weight") for name in state if ".experts." not in name]
    config["quantization_config"] = {**method, "modules_to_not_convert": plain}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("family", "quant", "block"),
    [("gpt_oss", "mxfp4", (1, 32)), ("qwen3_moe", "fp8_block", (32, 32))],
)
def test_quantised_is_what_transformers_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, quant: str, block: Any
) -> None:
    """transformers dequantises when it loads: its weights are ours, rounded to bfloat16."""
    if quant == "fp8_block":
        require("accelerate")
    n_hidden, n_inter = COMMON["hidden_size"], 96
    layer = make_quantised(quant, n_hidden, n_inter, 8, bias=family == "gpt_oss", block=block)
    write_quantised(tmp_path, family, n_inter, layer)
    config = {"gpt_oss": "Mxfp4Config", "qwen3_moe": "FineGrainedFP8Config"}[family]
    options: dict[str, Any] = {"dequantize": True}
    if quant == "fp8_block":
        options["weight_block_size"] = block
    its = getattr(transformers, FAMILIES[family][0]).from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=getattr(transformers, config)(**options),
    )
    module = its.model.layers[1].mlp.experts
    w13, w2 = (
        module.get_parameter(name).detach().float().numpy()
        for name in ("gate_up_proj", "down_proj")
    )
    if family == "gpt_oss":
        w13, w2 = w13.swapaxes(1, 2), w2.swapaxes(1, 2)
        w13 = np.concatenate([w13[:, ::2], w13[:, 1::2]], axis=1)
    plan = moepad.plan(n_hidden, n_inter, 8, quant=quant, block=block, bias=family == "gpt_oss")
    experts = moepad.load_experts(tmp_path, "model.layers.1.mlp.experts", plan)
    right = reference.dequantise(
        experts.w13, experts.w2, experts.w13_scale, experts.w2_scale, quant=quant, block=block
    )
    for values, loaded in zip(right, (w13, w2), strict=True):
        check_bits(values.astype(ml_dtypes.bfloat16), loaded.astype(ml_dtypes.bfloat16))
    assert run_check(capsys, tmp_path, "--tp", 3, "--align", 64)["ok"]


@pytest.mark.parametrize(("expert_dtype", "quant"), [("fp8", "fp8_block"), ("fp4", "mxfp4")])
def test_fp8_module_in_memory(expert_dtype: str, quant: str) -> None:
    """The state_dict of transformers' own module of quantised experts is a source."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    config = transformers.Qwen3MoeConfig(
        **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96
    )
    scale_fmt = "ue8m0" if quant == "mxfp4" else "float"
    module = FP8Experts(config, block_size=(32, 32), expert_dtype=expert_dtype, scale_fmt=scale_fmt)
    for tensor in module.state_dict().values():
        byte = tensor.view(torch.uint8)
        byte.copy_(torch.randint(0, 120, byte.shape, dtype=torch.uint8))
    plan = moepad.plan(64, 96, 4, quant=quant, block=(32, 32), tp_size=3, tp_rank=1)
    experts = moepad.load_experts(module.state_dict(), "", plan)
    assert experts.layout == "fused" and plan.start == 32
    up = module.state_dict()["gate_up_proj"].view(torch.uint8).numpy()[:, 96 + 32 : 96 + 64]
    check_bits(experts.w13[:, 32:].view(np.uint8), up)
