"""moepad as an experts implementation of transformers: every family of experts modules, by name.

Tiny models with random weights, in float32 against transformers' own eager implementation: logits,
greedy tokens, a checkpoint written and read back. What moepad cannot compute must be refused.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import moepad
import numpy as np
import pytest
from conftest import require
from moepad import reference
from moepad.testing import check_close
from numpy.typing import NDArray

torch = require("torch")
transformers = require("transformers")
from moepad import relayout  # noqa: E402
from moepad.adapters import trace  # noqa: E402
from moepad.adapters import transformers as adapter  # noqa: E402

# inductor uses what torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
N_INTER = 48
INSIDE = {"intermediate_size": N_INTER}
BESIDE = {"intermediate_size": 96, "moe_intermediate_size": N_INTER}
EIGHT = {"num_experts": 8}
LOCAL = {"num_local_experts": 8}
GROUPS = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
DENSE_FIRST = {"first_k_dense_replace": 1}
HEAD = {"head_dim": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**BESIDE, **EIGHT, "shared_expert_intermediate_size": 80},
    "qwen3_moe": {**BESIDE, **EIGHT, **HEAD},
    "qwen3_next": {
        **BESIDE,
        **EIGHT,
        **HEAD,
        "shared_expert_intermediate_size": 80,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4},
    "deepseek_v2": {**BESIDE, **GROUPS, **MLA, **DENSE_FIRST, "topk_method": "greedy"},
    "deepseek_v3": {**BESIDE, **GROUPS, **MLA, **DENSE_FIRST},
    "gpt_oss": {**INSIDE, **LOCAL, **HEAD},
    "olmoe": {**INSIDE, **EIGHT},
    "glm4_moe": {**BESIDE, **GROUPS, **HEAD, **DENSE_FIRST},
    "glm4_moe_lite": {**BESIDE, **GROUPS, **MLA},
    "minimax_m2": {**INSIDE, **LOCAL, **HEAD},
    "nemotron_h": {
        **BESIDE,
        **GROUPS,
        **HEAD,
        "moe_shared_expert_intermediate_size": 80,
        "layers_block_type": ["moe", "attention", "moe"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
    },
    "granitemoe": {**INSIDE, **LOCAL},
    "phimoe": {**INSIDE, **LOCAL},
    "ernie4_5_moe": {
        **BESIDE,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": {**INSIDE, **EIGHT, **HEAD, "moe_topk": 2, "num_shared_expert": 1},
    "dots1": {**BESIDE, **GROUPS, **HEAD, **DENSE_FIRST},
    "lfm2_moe": {
        **BESIDE,
        **EIGHT,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "jamba": {
        **INSIDE,
        **EIGHT,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "granitemoeshared": {**INSIDE, **LOCAL, "shared_intermediate_size": 80},
    "flex_olmo": {**INSIDE, **EIGHT},
}
TOKENS = torch.arange(3, 25).view(2, 11)


@functools.cache
def build(family: str) -> Any:
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name or name.endswith("gate.weight"):
                parameter.normal_(0, 0.3)
    return model


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the class of every experts module that moepad runs from here on."""
    seen: list[str] = []
    recipe = adapter._recipe

    def counted(module: Any) -> Any:
        seen.append(type(module).__name__)
        return recipe(module)

    monkeypatch.setattr(adapter, "_recipe", counted)
    return seen


def generate(model: Any) -> Any:
    mask = torch.ones_like(TOKENS)
    return model.generate(TOKENS, attention_mask=mask, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    model.set_experts_implementation("eager")
    right, right_tokens = model(TOKENS).logits, generate(model)
    seen = count_calls(monkeypatch)
    model.set_experts_implementation("moepad")
    logits = model(TOKENS).logits
    assert len(seen) == sum(hasattr(module, "is_transposed") for module in model.modules()) > 0
    assert (logits - right).abs().max() <= 3e-6 * right.abs().max()
    assert torch.equal(generate(model), right_tokens)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moepad", dtype=torch.float32
    )
    seen.clear()
    assert torch.equal(again.eval()(TOKENS).logits, logits)
    assert seen


# --- Experts modules on their own ----------------------------------------------------------------


def make_experts(family: str, name: str, dtype: Any = torch.float32, **facts: Any) -> Any:
    """An experts module of transformers with random weights, of a config made of `facts`."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = SimpleNamespace(
        num_experts=8,
        num_local_experts=8,
        n_routed_experts=8,
        moe_num_experts=8,
        hidden_size=64,
        moe_hidden_size=64,
        moe_intermediate_size=N_INTER,
        intermediate_size=N_INTER,
        hidden_act="silu",
        moe_latent_size=None,
        mlp_hidden_act="relu2",
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        post_norm_eps=1e-6,
        mlp_gate_softcap=5.0,
        mlp_up_softcap=5.0,
        _experts_implementation="moepad",
    )
    for key, value in facts.items():
        setattr(config, key, value)
    torch.manual_seed(1)
    experts = getattr(modeling, name)(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype).requires_grad_(False)


def make_tokens(dtype: Any = torch.float32, n_token: int = 13) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n_token, 64, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(n_token)])
    return x, ids, torch.rand(n_token, 2, generator=generator)


def eager(experts: Any, *tokens: Any) -> Any:
    experts.config._experts_implementation = "eager"
    result = experts(*tokens)
    experts.config._experts_implementation = "moepad"
    return result


OTHERS = [
    ("aria", "AriaExperts", {}),
    ("openai_privacy_filter", "OpenAIPrivacyFilterExperts", {}),
    ("minimax_m3_vl", "MiniMaxM3VLExperts", {"swiglu_alpha": 1.5, "swiglu_limit": 0.5}),
    ("deepseek_v4", "DeepseekV4Experts", {"swiglu_limit": 0.4}),
    ("hy_v4", "HYV4Experts", {"swiglu_limit": 0.6}),
    ("glm5_next", "Glm5NextTextExperts", {}),
    ("beam", "BeamExperts", {}),
    ("nemotron_h", "NemotronHExperts", {"mlp_hidden_act": "silu"}),
    ("nemotron_h", "NemotronHExperts", {"mlp_hidden_act": "gelu"}),
    ("qwen3_moe", "Qwen3MoeExperts", {"hidden_act": "gelu"}),
    ("qwen3_moe", "Qwen3MoeExperts", {"hidden_act": "gelu_pytorch_tanh"}),
    ("qwen3_moe", "Qwen3MoeExperts", {"hidden_act": "gelu_new"}),
    ("gpt_oss", "GptOssExperts", {"swiglu_alpha": 1.0, "swiglu_limit": 1.0}),
]


@pytest.mark.parametrize(("family", "name", "facts"), OTHERS)
def test_other_experts(family: str, name: str, facts: dict[str, Any]) -> None:
    experts, tokens = make_experts(family, name, **facts), make_tokens()
    right = eager(experts, *tokens)
    torch.testing.assert_close(experts(*tokens), right, rtol=1e-5, atol=1e-5)
    assert right.abs().max() > 0.1


REFUSED = [
    ("muse_spark", "MuseSparkExperts", {}, "MuseSparkExperts: no kernel for a norm after"),
    ("inkling2", "Inkling2Experts", {}, "Inkling2Experts: no kernel for what its _apply_gate"),
    ("qwen3_moe", "Qwen3MoeExperts", {"hidden_act": "relu"}, "its _apply_gate computes.*silu"),
    ("qwen3_moe", "Qwen3MoeExperts", {"hidden_act": "quick_gelu"}, "its _apply_gate computes"),
    ("nemotron_h", "NemotronHExperts", {"mlp_hidden_act": "tanh"}, "its act_fn computes.*relu2"),
]


@pytest.mark.parametrize(("family", "name", "facts", "text"), REFUSED)
def test_refused(family: str, name: str, facts: dict[str, Any], text: str) -> None:
    experts = make_experts(family, name, **facts)
    with pytest.raises(moepad.UnsupportedError, match=text) as info:
        experts(*make_tokens())
    assert "set_experts_implementation('grouped_mm')" in str(info.value)


def test_a_gate_of_ones_own_is_refused() -> None:
    """Silu clamped instead of the gate, as Step 3.7 has it: a small difference, and a refusal."""
    experts = make_experts("deepseek_v4", "DeepseekV4Experts")

    def clamp_after(gate_up: Any) -> Any:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)

    experts._apply_gate = clamp_after
    with pytest.raises(moepad.UnsupportedError, match=r"considered: .*silu with limit 7"):
        experts(*make_tokens())


def test_a_changed_limit_is_seen() -> None:
    experts, tokens = make_experts("gpt_oss", "GptOssExperts"), make_tokens()
    experts(*tokens)
    experts.limit = 0.25
    torch.testing.assert_close(experts(*tokens), eager(experts, *tokens), rtol=1e-5, atol=1e-5)


def as_array(tensor: Any) -> NDArray[Any]:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: Any, weights_dtype: Any) -> None:
    """gpt-oss against the specification: as good as its type allows, whatever the router's type."""
    experts = make_experts("gpt_oss", "GptOssExperts", dtype)
    x, ids, weights = make_tokens(dtype)
    weights = weights.to(weights_dtype)
    arrays = [as_array(t) for t in (x, experts.gate_up_proj.mT, experts.down_proj.mT, weights)]
    options = {
        "activation": "swigluoai",
        "gate_up": "interleaved",
        "swiglu_limit": 7.0,
        "w13_bias": as_array(experts.gate_up_proj_bias),
        "w2_bias": as_array(experts.down_proj_bias),
    }
    right = reference.fused_moe(*arrays, ids.numpy(), **options)
    naive = reference.naive(*arrays, ids.numpy(), **options)
    check_close(as_array(experts(x, ids, weights)), right, naive)


def test_expert_parallel_ids() -> None:
    """Ids from the number of experts on are other ranks'; elsewhere they are an error."""
    experts, (x, ids, weights) = make_experts("qwen3_moe", "Qwen3MoeExperts"), make_tokens()
    far = torch.where(ids > 4, 8, ids)
    right = eager(experts, x, far, weights)
    with pytest.raises(ValueError, match="topk_ids"):
        experts(x, far, weights)
    experts._is_expert_parallel = True
    torch.testing.assert_close(experts(x, far, weights), right, rtol=1e-5, atol=1e-5)


def test_modules_without_the_facts_of_5_23() -> None:
    """Older transformers say neither; there any module may be one of expert parallelism."""
    experts, (x, ids, weights) = make_experts("qwen3_moe", "Qwen3MoeExperts"), make_tokens()
    far = torch.where(ids > 4, 8, ids)
    right = eager(experts, x, far, weights)
    del experts._is_expert_parallel, experts.has_post_expert_norm
    torch.testing.assert_close(experts(x, far, weights), right, rtol=1e-5, atol=1e-5)


def test_gradients_are_refused() -> None:
    experts, (x, ids, weights) = make_experts("qwen3_moe", "Qwen3MoeExperts"), make_tokens()
    text = "forward only.*requires grad.*set_experts_implementation"
    with pytest.raises(TypeError, match=text):
        experts(x.requires_grad_(), ids, weights)
    x.requires_grad_(False)
    experts.down_proj.requires_grad_()
    with pytest.raises(TypeError, match=text):
        experts(x, ids, weights)
    with torch.no_grad():
        right = experts(x, ids, weights)
    with torch.inference_mode():
        assert torch.equal(experts(x, ids, weights), right)


def test_a_foreign_type_is_refused() -> None:
    experts, (x, ids, weights) = make_experts("qwen3_moe", "Qwen3MoeExperts"), make_tokens()
    with pytest.raises(TypeError, match="w13: expected dtype bf16, that of hidden_states, got f32"):
        experts(x.bfloat16(), ids, weights)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(x.bfloat16(), ids, weights)
    assert out.dtype == torch.bfloat16


def test_leaves_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPAD_TRACE", str(tmp_path / "trace"))
    monkeypatch.setattr(trace, "_ran", set())
    experts, tokens = make_experts("gpt_oss", "GptOssExperts"), make_tokens()
    for _ in range(2):
        experts(*tokens)
    (line,) = (tmp_path / "trace").read_text().splitlines()
    assert "framework=transformers layer=GptOssExperts" in line
    assert f"n_inter={N_INTER} " in line


# --- Transposed weights --------------------------------------------------------------------------


def test_transposed_weights_follow_their_parameters() -> None:
    experts, tokens = make_experts("gpt_oss", "GptOssExperts"), make_tokens()
    experts(*tokens)
    for change in (
        lambda weight: weight.mul_(0.5),
        lambda weight: weight.data.copy_(weight.flip(1).clone()),
    ):
        for weight in (experts.gate_up_proj, experts.down_proj):
            change(weight)
        torch.testing.assert_close(experts(*tokens), eager(experts, *tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prepare_leaves_nothing_to_copy(tmp_path: Path) -> None:
    model = build("gpt_oss")
    model.set_experts_implementation("moepad")
    model.save_pretrained(tmp_path)
    load = functools.partial(
        transformers.AutoModelForCausalLM.from_pretrained,
        experts_implementation="moepad",
        dtype=torch.float32,
    )
    logits = model(TOKENS).logits
    fresh = load(tmp_path).eval()
    relayout.forget()
    assert adapter.prepare(fresh) == 4 and adapter.prepare(fresh) == 0
    assert torch.equal(fresh(TOKENS).logits, logits)
    assert not relayout._copies
    fresh.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again").eval()(TOKENS).logits, logits)
    fresh.set_experts_implementation("eager")
    torch.testing.assert_close(fresh(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


# --- Compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_compiles_whole(family: str) -> None:
    """The whole model without a break; what inductor makes of it, for one block, is below."""
    torch._dynamo.reset()
    model = build(family)
    model.set_experts_implementation("moepad")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(TOKENS, use_cache=False).logits
    got = compiled(TOKENS, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_inductor_compiles_a_block() -> None:
    """Router, experts and the sum over slots, with the experts' inputs made inside the graph."""
    torch._dynamo.reset()
    model = build("qwen3_moe")
    model.set_experts_implementation("moepad")
    block, x = model.model.layers[0].mlp, make_tokens()[0][None]
    compiled = torch.compile(block, backend="inductor", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-4)


def test_compiled_experts_follow_their_parameters() -> None:
    torch._dynamo.reset()
    experts, tokens = make_experts("gpt_oss", "GptOssExperts"), make_tokens()
    compiled = torch.compile(experts, backend="inductor", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(*tokens), experts(*tokens))
        experts.gate_up_proj.mul_(0.5)


def test_a_compiler_is_refused_as_well() -> None:
    torch._dynamo.reset()
    experts = make_experts("muse_spark", "MuseSparkExperts")
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="no kernel for a norm after each expert"):
        compiled(*make_tokens())


def test_half_a_model_is_no_gradient() -> None:
    """A model with everything frozen runs in grad mode too."""
    experts, tokens = make_experts("qwen3_moe", "Qwen3MoeExperts"), make_tokens()
    assert torch.is_grad_enabled()
    assert np.isfinite(as_array(experts(*tokens))).all()
