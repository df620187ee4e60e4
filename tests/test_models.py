"""The built-in models and the reading of config.json.

What a configuration means is checked against transformers, where installed: it builds each model
without memory, and the expert tensors it made are what the reader must have said.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import require
from hypothesis import given
from hypothesis import strategies as st
from moepad import CheckpointError, plan
from moepad.cli import main
from moepad.models import MODELS, Model, find, parse_config, read_config

# Name, width, intermediate size, experts, experts per token, as published for each model.
PUBLISHED = """
    Qwen3-30B-A3B         2048   768 128  8 | Qwen3-235B-A22B       4096  1536 128  8
    Qwen3-Coder-480B      6144  2560 160  8 | Qwen3-Next-80B        2048   512 512 10
    Qwen3.5-35B-A3B       2048   512 256  8 | Qwen3.6-35B-A3B       2048   512 256  8
    Qwen3.5-397B-A17B     4096  1024 512 10 | GLM-4.5               5120  1536 160  8
    GLM-4.6               5120  1536 160  8 | GLM-4.7               5120  1536 160  8
    GLM-4.5-Air           4096  1408 128  8 | GLM-4.7-Flash         2048  1536  64  4
    GLM-5                 6144  2048 256  8 | DeepSeek-V3           7168  2048 256  8
    DeepSeek-R1           7168  2048 256  8 | DeepSeek-V4-Flash     4096  2048 256  6
    DeepSeek-V4-Pro       7168  3072 384  6 | Kimi-K2               7168  2048 384  8
    Kimi-K2.5             7168  2048 384  8 | Kimi-K3               3584  3072 896 16
    MiniMax-M2            3072  1536 256  8 | MiniMax-M2.5          3072  1536 256  8
    MiniMax-M2.7          3072  1536 256  8 | MiniMax-M3            6144  3072 128  4
    Mixtral-8x7B          4096 14336   8  2 | Mixtral-8x22B         6144 16384   8  2
    gpt-oss-120b          2880  2880 128  4 | Gemma4-26B-A4B        2816   704 128  8
    Llama4-Maverick       5120  8192 128  1 | Nemotron-3-Nano-30B   2688  1856 128  6
    Nemotron-3-Super-120B 1024  2688 512 22 | Nemotron-3-Ultra-550B 2048  5120 512 22
    Step-3.5-Flash        4096  1280 288  8 | ERNIE-4.5-21B-A3B     2560  1536  64  6
    Hunyuan-A13B          4096  3072  64  8 | OLMoE-1B-7B           2048  1024  64  8
    Granite-3-1B-A400M    1024   512  32  8 | Qwen2-57B-A14B        3584  2560  64  8
    LongCat-Flash         6144  2048 512 12 | Laguna-XS-2.1         2048   512 256  8
    Inkling               6144  3072 256  6 | Inkling-small         4096  2048 256  6
"""
ROWS = [line.split() for line in re.split(r"[|\n]", PUBLISHED) if line.strip()]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_published_sizes(row: list[str]) -> None:
    model = find(row[0])
    got = (model.n_hidden, model.n_inter, model.n_expert, model.n_topk)
    assert got == tuple(map(int, row[1:]))


def test_ungated_models() -> None:
    ungated = {model.name for model in MODELS if not model.gated}
    assert ungated == {
        "Nemotron-3-Nano-30B",
        "Nemotron-3-Super-120B",
        "Nemotron-3-Ultra-550B",
    }
    assert {model.activation for model in MODELS if not model.gated} == {"relu2"}


def test_models_with_bias_or_clamp() -> None:
    assert {model.name for model in MODELS if model.bias} == {"gpt-oss-120b", "gpt-oss-20b"}
    clamped = {model.name: model.swiglu_limit for model in MODELS if model.swiglu_limit}
    assert clamped == {
        "gpt-oss-120b": 7.0,
        "gpt-oss-20b": 7.0,
        "MiniMax-M3": 7.0,
        "DeepSeek-V4-Flash": 10.0,
        "DeepSeek-V4-Pro": 10.0,
    }


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_row(model: Model) -> None:
    """Every row can be planned, and every name of it leads to it."""
    for name in (model.name, *model.aliases):
        for spelling in (name, name.upper(), name.lower(), f"owner/{name}-Instruct-FP8"):
            assert find(spelling) is model
    for tp_rank in range(8):
        sizes = (model.n_hidden, model.n_inter, model.n_expert)
        assert plan(*sizes, gated=model.gated, tp_size=8, tp_rank=tp_rank).n_inter > 0
    assert 1 <= model.n_topk <= model.n_expert
    assert model.n_hidden % 32 == 0 and model.n_inter % 32 == 0


def test_names_are_unique() -> None:
    names = [name.casefold() for model in MODELS for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "Qwen3-235B-A22B"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("GPT_OSS 120B", "gpt-oss-120b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B"),
        ("deepseek-ai/DeepSeek-R1-0528", "DeepSeek-V3"),
        ("zai-org/GLM-4.5-Air-FP8", "GLM-4.5-Air"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "Llama4-Scout"),
        ("baidu/ERNIE-4.5-21B-A3B-PT", "ERNIE-4.5-21B-A3B"),
    ],
)
def test_repository_names(name: str, expected: str) -> None:
    assert find(name).name == expected


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Qwen3-235B-A23B", "nearest: Qwen3-235B-A22B"),
        ("mixtral", "nearest: Mixtral-8x7B"),
        ("glm45", "nearest: GLM-4.5"),
        ("GLM-4.5-Airy", "GLM-4.5-Air"),
        ("completely else", "known: Qwen3-30B-A3B, Qwen3-235B-A22B"),
        ("", "known: "),
        ("instruct", "known: "),
    ],
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="is not in the built-in table") as caught:
        find(name)
    assert hint in str(caught.value)
    assert "config.json" in str(caught.value)


def test_name_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="model: expected a name"):
        find(3)  # type: ignore[arg-type]


# ---- config.json ----

BASE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "num_hidden_layers": 6,
    "torch_dtype": "bfloat16",
}


def parsed(**changes: Any) -> Model:
    config = {**BASE, **changes}
    return parse_config({key: value for key, value in config.items() if value is not None})


def test_base() -> None:
    assert parsed() == Model(
        "qwen3_moe", 64, 48, 8, 2, formats=("BF16",), n_layer=6, moe_layers=(0, 1, 2, 3, 4, 5)
    )


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"moe_intermediate_size": None}, "n_inter", 256),
        ({"moe_intermediate_size": [48, 48]}, "n_inter", 48),
        ({"expert_ffn_hidden_size": 40, "moe_intermediate_size": None}, "n_inter", 40),
        ({"num_experts": None, "n_routed_experts": 16, "n_shared_experts": 1}, "n_expert", 16),
        ({"num_experts": None, "num_local_experts": 16}, "n_expert", 16),
        ({"num_experts": None, "moe_num_experts": 16}, "n_expert", 16),
        ({"num_experts_per_tok": None, "moe_topk": [3, 3]}, "n_topk", 3),
        ({"num_experts_per_tok": None, "num_experts_per_token": 3}, "n_topk", 3),
        ({"num_experts_per_tok": None, "moe_k": 3}, "n_topk", 3),
        ({"num_experts_per_tok": None, "top_k_experts": 3}, "n_topk", 3),
        ({"moe_latent_size": 32}, "n_hidden", 32),
        ({"hidden_act": "gelu_pytorch_tanh"}, "activation", "gelu_tanh"),
        ({"hidden_act": None, "hidden_activation": "gelu"}, "activation", "gelu"),
        ({"hidden_act": None}, "activation", "silu"),
        ({"mlp_hidden_act": "relu2"}, "activation", "relu2"),
        ({"mlp_hidden_act": "relu2"}, "gated", False),
        ({"model_type": "gpt_oss"}, "activation", "swigluoai"),
        ({"model_type": "gpt_oss"}, "bias", True),
        ({"model_type": "gpt_oss"}, "swiglu_limit", 7.0),
        ({"swiglu_alpha": 1.5, "swiglu_limit": 6}, "swiglu_alpha", 1.5),
        ({"swiglu_alpha": 1.5, "swiglu_limit": 6}, "swiglu_limit", 6.0),
        ({"swiglu_limit": 10.0}, "activation", "silu"),
        ({"swiglu_limit": 10.0}, "swiglu_limit", 10.0),
        ({"torch_dtype": None, "dtype": "float16"}, "dtype", "f16"),
        ({"torch_dtype": None}, "dtype", "bf16"),
        ({"num_hidden_layers": None}, "moe_layers", None),
        ({"first_k_dense_replace": 2}, "moe_layers", (2, 3, 4, 5)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, "moe_layers", (2, 4)),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, "moe_layers", (1, 2, 4, 5)),
        ({"num_dense_layers": 3}, "moe_layers", (3, 4, 5)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, "moe_layers", (1, 5)),
        ({"mlp_layer_types": ["dense"] + ["sparse"] * 5}, "moe_layers", (1, 2, 3, 4, 5)),
        ({"mlp_layer_types": ["hash_moe", "moe"] + ["dense"] * 4}, "moe_layers", (0, 1)),
        ({"layers_block_type": ["moe", "mlp", "linear_attention", "moe"]}, "moe_layers", (0, 3)),
        ({"hybrid_override_pattern": "ME*-ME"}, "moe_layers", (1, 5)),
        ({"hybrid_override_pattern": "ME*-"}, "n_layer", 4),
        ({"moe_layers": [1, 4]}, "moe_layers", (1, 4)),
        ({"moe_layers_enum": "3,4, 5"}, "moe_layers", (3, 4, 5)),
        ({"interleave_moe_layer_step": 2}, "moe_layers", (1, 3, 5)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, "moe_layers", (1, 3, 5)),
        (
            {"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 1},
            "moe_layers",
            (1, 2, 3, 4),
        ),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": -1}, "moe_layers", (1, 2, 3, 4, 5)),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_key(changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(parsed(**changes), field) == value


COMPRESSED = {"quant_method": "compressed-tensors"}


def compressed(**weights: Any) -> dict[str, Any]:
    return {**COMPRESSED, "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("config", "quant", "block"),
    [
        (None, "none", (128, 128)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block", (128, 128)),
        ({"quant_method": "fp8", "weight_block_size": [64, 32]}, "fp8_block", (64, 32)),
        ({"quant_method": "fp8"}, "fp8_tensor", None),
        ({"quant_method": "mxfp4"}, "mxfp4", (1, 32)),
        ({"quant_method": "mxfp8"}, "mxfp8", (1, 32)),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True},
            "int4_group",
            (1, 128),
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}, None, None),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True}, None, None),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, None, None),
        (compressed(type="float", num_bits=8, strategy="tensor"), "fp8_tensor", None),
        (compressed(type="float", num_bits=8, strategy="channel"), "fp8_channel", None),
        (
            compressed(type="float", num_bits=8, strategy="block", block_structure=[128, 128]),
            "fp8_block",
            (128, 128),
        ),
        (
            compressed(type="float", num_bits=8, strategy="block", block_structure="64x128"),
            "fp8_block",
            (64, 128),
        ),
        (compressed(type="int", num_bits=8, strategy="channel"), "int8_channel", None),
        (
            compressed(type="int", num_bits=4, strategy="group", group_size=32, symmetric=True),
            "int4_group",
            (1, 32),
        ),
        (compressed(type="int", num_bits=4, strategy="group", group_size=16), None, None),
        ({**COMPRESSED, "config_groups": {}}, None, None),
        (
            {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}},
            "mxfp4",
            (1, 32),
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, None, None),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8_tensor", None),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "MXFP8"}}, "mxfp8", (1, 32)),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "mxfp4", (1, 32)),
        (compressed(type="float", num_bits=4, strategy="group", group_size=32), "mxfp4", (1, 32)),
        (compressed(type="float", num_bits=8, strategy="group", group_size=32), "mxfp8", (1, 32)),
        (compressed(type="float", num_bits=4, strategy="tensor_group", group_size=16), None, None),
        (
            {
                **COMPRESSED,
                "config_groups": {
                    "a": {"targets": ["re:.*attn.*"], "weights": {"num_bits": 3}},
                    "b": {
                        "targets": ["re:.*experts.*"],
                        "weights": {"type": "int", "num_bits": 8, "strategy": "channel"},
                    },
                },
            },
            "int8_channel",
            None,
        ),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
            },
            "fp8_tensor",
            None,
        ),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
                "layer_quant_config": {
                    "*self_attn*": {},
                    "*experts*": {"weight": {"dtype": "fp4"}},
                },
            },
            "mxfp4",
            (1, 32),
        ),
        ({"quant_method": "quark", "global_quant_config": None}, None, None),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_quantisation(
    config: dict[str, Any] | None, quant: str | None, block: tuple[int, int] | None
) -> None:
    model = parsed(quantization_config=config)
    assert model.quant == quant
    assert block is None or model.block == block
    assert model.formats and model.formats[0]
    if quant is not None:
        plan(64, 48, 8, quant=quant, block=model.block)


def test_nested_configuration() -> None:
    top = {
        "model_type": "outer",
        "vision_config": {"hidden_size": 1, "num_experts": 99},
        "quantization_config": {"quant_method": "mxfp4"},
        "text_config": {**BASE, "hidden_size": 96},
    }
    model = parse_config(top)
    assert (model.n_hidden, model.n_expert, model.quant) == (96, 8, "mxfp4")
    deeper = parse_config({"thinker_config": {"text_config": BASE}})
    assert deeper.n_inter == 48


REFUSED = [
    ([], "expected a JSON object, got \\[\\]"),
    ({}, "expected one of moe_latent_size, hidden_size, .* found none"),
    ({**BASE, "num_experts": None}, "expected one of num_experts, .* is this a mixture"),
    ({**BASE, "num_experts": 0}, "num_experts: expected an integer, 1 to"),
    ({**BASE, "num_experts": True}, "num_experts: expected an integer, 1 to"),
    ({**BASE, "hidden_size": 64.5}, "hidden_size: expected an integer, 1 to .*, got 64.5"),
    ({**BASE, "hidden_size": "x" * 99}, "hidden_size: expected an integer, 1 to .*x\\.\\.\\."),
    ({**BASE, "moe_intermediate_size": [48, 64]}, "moe_intermediate_size: expected an integer"),
    ({**BASE, "hidden_act": 3}, "hidden_act: expected a name, got 3"),
    ({**BASE, "swiglu_limit": "7"}, "swiglu_limit: expected a number, got '7'"),
    ({**BASE, "num_hidden_layers": 10**12}, "num_hidden_layers: expected an integer, 0 to 10000"),
    ({**BASE, "decoder_sparse_step": 0}, "decoder_sparse_step: expected an integer, 1 to"),
    ({**BASE, "mlp_only_layers": 3}, "mlp_only_layers: expected a list of layers, got 3"),
    ({**BASE, "moe_layers": ["x"]}, "moe_layers: expected an integer, 0 to"),
    ({**BASE, "quantization_config": 8}, "quantization_config: expected an object, got 8"),
    (
        {**BASE, "quantization_config": {"quant_method": "fp8", "weight_block_size": 128}},
        "weight_block_size: expected two integers, got 128",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_refused(config: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config(config)


TEXT = st.text("0E,ab", max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda part: st.lists(part, max_size=4) | st.dictionaries(TEXT, part, max_size=4),
    max_leaves=8,
)
KEYS = (
    *BASE,
    *("text_config", "quantization_config", "swiglu_limit", "dtype"),
    *("first_k_dense_replace", "mlp_only_layers", "moe_layer_freq", "mlp_layer_types"),
    *("layers_block_type", "hybrid_override_pattern", "moe_layers", "interleave_moe_layer_step"),
    *("expert_layer_period", "expert_layer_offset", "moe_layer_end_index"),
)
METHODS = ("fp8", "mxfp4", "gptq", "awq", "compressed-tensors", "quark", "modelopt")
METHOD_KEYS = ("weight_block_size", "bits", "group_size", "sym", "zero_point", "config_groups")
QUANT_CONFIG = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(METHODS)},
    optional={key: JSON for key in (*METHOD_KEYS, "global_quant_config")},
)


@given(st.dictionaries(st.sampled_from(KEYS), JSON | QUANT_CONFIG, max_size=5))
def test_any_json_is_a_model_or_a_checkpoint_error(changes: dict[str, Any]) -> None:
    try:
        model = parse_config({**BASE, **changes})
    except CheckpointError as error:
        assert str(error)
        return
    assert min(model.n_hidden, model.n_inter, model.n_expert, model.n_topk) >= 1
    assert model.quant in {None, "none", "fp8_tensor", "fp8_channel", "fp8_block"} | {
        "mxfp8", "mxfp4", "int8_channel", "int4_group",
    }  # fmt: skip
    assert dataclasses.asdict(model)


def test_read_folder_and_file(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-moe"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE))
    assert read_config(folder) == read_config(folder / "config.json")
    assert read_config(str(folder)).name == "tiny-moe"


def test_read_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path)
    file = tmp_path / "config.json"
    for content in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"{}", b"null", b"NaN"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            read_config(file)


def test_command_takes_format_and_layers_from_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantised = {**BASE, "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps({**quantised, "first_k_dense_replace": 2}))
    assert main(["plan", "--config", str(tmp_path), "--tp", "2"]) == 0
    text = capsys.readouterr().out
    assert "quant mxfp4" in text and "4 of 6 layers have experts" in text
    assert main(["plan", "--config", str(tmp_path), "--quant", "none", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ranks"][0]["w13_shape"] == [8, 96, 64]
    assert facts["model"]["moe_layers"] == [2, 3, 4, 5]


def test_command_refuses_a_format_without_a_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**BASE, "quantization_config": {"quant_method": "modelopt"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "--config", str(tmp_path)]) == 2
    assert "is stored as modelopt" in capsys.readouterr().err
    assert main(["plan", "--config", str(tmp_path), "--quant", "none"]) == 0


# ---- transformers as the judge ----

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {"num_hidden_layers": 6, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"num_hidden_layers": 6, "mlp_only_layers": [0, 3]}),
    ("qwen3_next", {"num_hidden_layers": 4}),
    ("mixtral", {"num_hidden_layers": 2}),
    ("deepseek_v2", {"num_hidden_layers": 4, "first_k_dense_replace": 1, "num_experts_per_tok": 6}),
    ("deepseek_v3", {"num_hidden_layers": 5, "first_k_dense_replace": 3}),
    ("gpt_oss", {"num_hidden_layers": 2}),
    ("olmoe", {"num_hidden_layers": 2}),
    ("glm4_moe", {"num_hidden_layers": 4, "first_k_dense_replace": 2}),
    ("glm4_moe_lite", {"num_hidden_layers": 3}),
    ("minimax_m2", {"num_hidden_layers": 2}),
    ("nemotron_h", {"layers_block_type": ["moe", "linear_attention", "mlp", "moe"]}),
    ("nemotron_h", {"layers_block_type": ["mlp", "moe"], "moe_latent_size": 512}),
    ("granitemoe", {"num_hidden_layers": 2}),
    ("phimoe", {"num_hidden_layers": 2}),
    (
        "ernie4_5_moe",
        {"num_hidden_layers": 7, "moe_layer_start_index": 2, "moe_layer_end_index": 5}
        | {"moe_layer_interval": 2},
    ),
    ("hunyuan_v1_moe", {"num_hidden_layers": 2, "num_experts": 4, "moe_topk": 2, "head_dim": 64}),
    (
        "dots1",
        {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 16}
        | {"n_shared_experts": 1, "num_experts_per_tok": 4},
    ),
    (
        "lfm2_moe",
        {"num_hidden_layers": 4, "num_dense_layers": 2}
        | {"layer_types": ["conv", "full_attention"] * 2},
    ),
    ("jamba", {"num_hidden_layers": 6, "expert_layer_period": 3, "expert_layer_offset": 1}),
    ("llama4_text", {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}),
    ("minimax_m3_vl_text", {"num_hidden_layers": 3}),
    ("deepseek_v4", {"num_hidden_layers": 2}),
    ("laguna", {"num_hidden_layers": 2}),
]


@pytest.mark.large
@pytest.mark.parametrize(("kind", "changes"), FAMILIES, ids=[kind for kind, _ in FAMILIES])
@pytest.mark.filterwarnings("ignore")
def test_agrees_with_transformers(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    transformers, torch = require("transformers"), require("torch")
    config = transformers.AutoConfig.for_model(kind, **changes)
    config.save_pretrained(tmp_path)
    read = read_config(tmp_path)
    with torch.device("meta"):
        built = transformers.AutoModel.from_config(config)

    found: dict[int, set[tuple[int, ...]]] = {}
    for name, module in built.named_modules():
        match = re.search(r"layers\.(\d+)\..*experts$", name)
        if match and "shared" not in name and hasattr(module, "down_proj"):
            shape = tuple(module.down_proj.shape)
            found.setdefault(int(match[1]), set()).add(shape)
            rows = module.gate_up_proj if hasattr(module, "gate_up_proj") else module.up_proj
            assert read.gated == (sorted(rows.shape) != sorted(shape))
            assert read.bias == any("bias" in key for key, _ in module.named_parameters())
    assert found, "the model has no experts module"
    assert read.moe_layers == tuple(sorted(found))
    (shape,) = set().union(*found.values())
    is_transposed = kind in ("gpt_oss", "llama4_text")
    assert shape == (
        (read.n_expert, read.n_inter, read.n_hidden)
        if is_transposed
        else (read.n_expert, read.n_hidden, read.n_inter)
    )
