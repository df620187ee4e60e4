"""The vLLM adapter under the real vLLM: its MoE layer, loader and modular kernel, on the CPU.

Runs in the environment that `tests/serving/make_environment vllm` makes. There the plugin is found
as vLLM finds it, by the entry point of the installed wheel. vLLM's engine needs a CPU build, which
PyPI does not have.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moepad
import numpy as np
import pytest
from conftest import missing
from moepad import reference
from moepad.testing import check_bits, check_close, quantise
from numpy.typing import NDArray
from serving import free_port

if find_spec("vllm") is None:
    missing("vllm", "it is not installed; tests/serving/make_environment does")

Array = NDArray[Any]

# vLLM's and its dependencies' own warnings are not ours to fail on.
pytestmark = pytest.mark.filterwarnings("ignore")

N_EXPERT, N_TOPK, N_HIDDEN, N_INTER, N_TOKEN = 8, 2, 64, 192, 11
LAYERS = "vllm.model_executor.layers"


@pytest.fixture(scope="module")
def vllm() -> Iterator[SimpleNamespace]:
    """One rank of one with the plugins loaded, and the names of vLLM that the tests use."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_TARGET_DEVICE", "cpu")
    patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    patch.setenv("TORCHDYNAMO_DISABLE", "1")
    patch.delenv("MOEPAD_VLLM", raising=False)
    importlib.import_module("vllm.plugins").load_general_plugins()
    names = {
        "Factory": f"{LAYERS}.fused_moe.layer.FusedMoEFactory",
        "Config": "vllm.config.VllmConfig",
        "with_config": "vllm.config.set_current_vllm_config",
        "with_forward": "vllm.forward_context.set_forward_context",
        "init_environment": "vllm.distributed.init_distributed_environment",
        "init_parallel": "vllm.distributed.initialize_model_parallel",
        "adapter": "moepad.adapters.vllm",
    }
    found = SimpleNamespace(**{key: pkgutil.resolve_name(name) for key, name in names.items()})
    found.config = found.Config()
    found.config.model_config = None
    with found.with_config(found.config):
        found.init_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"tcp://127.0.0.1:{free_port()}",
            backend="gloo",
        )
        found.init_parallel(1, 1)
        yield found
    patch.undo()


class Layer:
    """vLLM's MoE layer, its parameters full of NaN wherever nothing is loaded into them."""

    count = 0

    def __init__(
        self, vllm: SimpleNamespace, n_inter: int = N_INTER, dtype: str = "float32", **options: Any
    ) -> None:
        import torch

        Layer.count += 1  # vLLM takes a name once
        self.name = f"model.layers.{Layer.count}.mlp.experts"
        self.vllm = vllm
        self.moe = vllm.Factory(
            num_experts=N_EXPERT,
            top_k=N_TOPK,
            hidden_size=N_HIDDEN,
            intermediate_size=n_inter,
            params_dtype=getattr(torch, dtype),
            renormalize=True,
            prefix=self.name,
            **options,
        )
        modules = [m for m in self.moe.modules() if type(m).__name__ == "RoutedExperts"]
        (self.experts,) = modules
        for param in self.experts.parameters():
            param.data.fill_(float("nan"))

    def load(self, w1: Array, w3: Array, w2: Array) -> None:
        """Each expert's tensors through vLLM's own loader, as a model's load_weights does."""
        import torch

        for shard_id, tensors in (("w1", w1), ("w3", w3), ("w2", w2)):
            param = self.experts.w2_weight if shard_id == "w2" else self.experts.w13_weight
            for expert, tensor in enumerate(tensors):
                name = f"experts.{expert}.{shard_id}.weight"
                self.experts.weight_loader(param, torch.from_numpy(tensor), name, shard_id, expert)
        self.experts.quant_method.process_weights_after_loading(self.experts)

    def __call__(self, x: Array, logits: Array) -> Array:
        import torch

        context = self.vllm.with_forward(None, self.vllm.config, num_tokens=len(x))
        with context, torch.no_grad():
            dtype = self.experts.moe_config.in_dtype
            out: Array = self.moe(torch.from_numpy(x).to(dtype), torch.from_numpy(logits)).float()
        return out.numpy()


def make_weights(rng: np.random.Generator, n_inter: int = N_INTER) -> tuple[Array, Array, Array]:
    def values(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32) * np.float32(0.1)

    wide = (N_EXPERT, n_inter, N_HIDDEN)
    return values(*wide), values(*wide), values(N_EXPERT, N_HIDDEN, n_inter)


def make_call(rng: np.random.Generator) -> tuple[Array, Array]:
    x = rng.standard_normal((N_TOKEN, N_HIDDEN), np.float32)
    return x, rng.standard_normal((N_TOKEN, N_EXPERT), np.float32)


def check(
    out: Array, call: tuple[Array, Array], weights: tuple[Array, ...], **options: Any
) -> None:
    """Against the specification, with the routing that the layer was asked for."""
    x, logits = call
    w1, w3, w2 = weights
    ids = np.argsort(-logits, axis=1)[:, :N_TOPK].astype(np.int32)
    shares = np.exp(np.take_along_axis(logits, ids, 1))
    arrays = (x, np.concatenate([w1, w3], 1), w2, shares / shares.sum(1, keepdims=True), ids)
    check_close(out, reference.fused_moe(*arrays, **options), reference.naive(*arrays, **options))


@pytest.mark.parametrize("n_inter", [192, 96, 100])
def test_layer(vllm: SimpleNamespace, trace: Path, rng: np.random.Generator, n_inter: int) -> None:
    layer, weights, call = Layer(vllm, n_inter), make_weights(rng, n_inter), make_call(rng)
    assert type(layer.experts.quant_method) is vllm.adapter.MoepadMethod
    layer.load(*weights)
    assert layer.experts.w2_weight.shape == (N_EXPERT, N_HIDDEN, n_inter), "no rounding up"
    check(layer(*call), call, weights)
    assert trace.read_text() == (
        f"pid={os.getpid()} framework=vllm layer={layer.name} tp=0/1 n_inter={n_inter} "
        f"n_inter_pad={n_inter} quant=none engine=cpu-{moepad.cpu_isa()}\n"
    )


def test_bf16(vllm: SimpleNamespace, rng: np.random.Generator) -> None:
    layer, weights, call = Layer(vllm, dtype="bfloat16"), make_weights(rng), make_call(rng)
    layer.load(*weights)
    out = layer(*call)
    exact = Layer(vllm)
    exact.load(*weights)
    assert np.abs(out - exact(*call)).max() <= 0.02 * np.abs(out).max()


@pytest.mark.parametrize(
    ("options", "meaning"),
    [
        ({"activation": "gelu"}, {"activation": "gelu"}),
        ({"activation": "gelu_tanh"}, {"activation": "gelu_tanh"}),
        ({"swiglu_limit": 0.5}, {"swiglu_limit": 0.5}),
        (
            {"activation": "swigluoai"},
            {"activation": "swigluoai", "swiglu_limit": 7.0, "gate_up": "interleaved"},
        ),
        (
            {
                "activation": "swigluoai_uninterleave",
                "swiglu_limit": 2.0,
                "swiglu_alpha": 1.5,
                "swiglu_beta": 1.0,
            },
            {"activation": "swigluoai", "swiglu_limit": 2.0, "swiglu_alpha": 1.5},
        ),
    ],
)
def test_activations(
    vllm: SimpleNamespace,
    trace: Path,
    rng: np.random.Generator,
    options: dict[str, Any],
    meaning: dict[str, Any],
) -> None:
    layer, weights, call = Layer(vllm, **options), make_weights(rng), make_call(rng)
    layer.load(*weights)
    check(layer(*call), call, weights, **meaning)
    assert "n_inter=192" in trace.read_text()


def test_pad_of_vllm_is_not_read(
    vllm: SimpleNamespace, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where vLLM itself rounds a layer up, the true size still counts."""
    weights, call = make_weights(rng), make_call(rng)
    plain = Layer(vllm)
    plain.load(*weights)
    monkeypatch.setattr(
        vllm.adapter.MoepadMethod,
        "maybe_roundup_sizes",
        lambda self, n_hidden, *rest: (n_hidden, 256),
    )
    padded = Layer(vllm)
    padded.load(*weights)
    halves = padded.experts.w13_weight.data.unflatten(1, (2, 256))
    halves[:, :, N_INTER:] = padded.experts.w2_weight.data[:, :, N_INTER:] = float("nan")
    check_bits(padded(*call), plain(*call))


def test_update_through_vllms_loader(vllm: SimpleNamespace, rng: np.random.Generator) -> None:
    layer, call = Layer(vllm), make_call(rng)
    old, new = make_weights(rng), make_weights(rng)
    layer.load(*old)
    check(layer(*call), call, old)
    addresses = [param.data_ptr() for param in layer.experts.parameters()]
    layer.load(*new)
    check(layer(*call), call, new)
    assert [param.data_ptr() for param in layer.experts.parameters()] == addresses


def fp8_config(scheme: str = "dynamic", **options: Any) -> Any:
    config = pkgutil.resolve_name(f"{LAYERS}.quantization.get_quantization_config")("fp8")
    return config(is_checkpoint_fp8_serialized=True, activation_scheme=scheme, **options)


def load_fp8(layer: Layer, stored: list[tuple[Array, Array]], scale_name: str) -> None:
    """Values and scales of w1, w3 and w2, each by vLLM's loader."""
    import torch

    for shard_id, (values, scales) in zip(("w1", "w3", "w2"), stored, strict=True):
        bytes_of_values = torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
        tensors = {"weight": bytes_of_values, scale_name: torch.from_numpy(scales)}
        for name, of_experts in tensors.items():
            param = getattr(layer.experts, f"{'w2' if shard_id == 'w2' else 'w13'}_{name}")
            for expert, tensor in enumerate(of_experts):
                full = f"experts.{expert}.{shard_id}.{name}"
                layer.experts.weight_loader(param, tensor, full, shard_id, expert)
    layer.experts.quant_method.process_weights_after_loading(layer.experts)


# Columns, block, ranks, columns of the first rank. vLLM cuts the blocks smaller where a rank's
# columns are no multiple of theirs.
@pytest.mark.parametrize(
    ("n_inter", "block", "n_rank", "n_first"),
    [(256, 128, 1, 256), (192, 64, 1, 192), (320, 64, 2, 160)],
)
def test_block_fp8(
    vllm: SimpleNamespace,
    trace: Path,
    rng: np.random.Generator,
    n_inter: int,
    block: int,
    n_rank: int,
    n_first: int,
) -> None:

    fp8 = fp8_config(weight_block_size=[block, block])
    layer, call = Layer(vllm, n_inter, quant_config=fp8, tp_size=n_rank), make_call(rng)
    assert type(layer.experts.quant_method) is vllm.adapter.MoepadFp8Method
    sides = {"quant": "fp8_block", "block": (block, block)}
    stored = [quantise(weights, **sides) for weights in make_weights(rng, n_inter)]
    load_fp8(layer, stored, "weight_scale_inv")
    (w1, s1), (w3, s3), (w2, s2) = stored
    scales = {"w13_scale": np.concatenate([s1, s3], 1), "w2_scale": s2}
    # The first rank's columns are those of a layer whose other columns of w2 are zero.
    w2[:, :, n_first:] = 0
    check(layer(*call), call, (w1, w3, w2), **scales, **sides)
    assert f"n_inter={n_first} n_inter_pad={n_first} quant=fp8_block" in trace.read_text()


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
@pytest.mark.parametrize("n_inter", [192, 96])
def test_fp8_with_a_scale_for_each_tensor(
    vllm: SimpleNamespace, trace: Path, rng: np.random.Generator, n_inter: int, scheme: str
) -> None:
    """Of w1 and w3 each its own, which vLLM's kernels cannot take: exact, and loaded again."""
    layer, call = Layer(vllm, n_inter, quant_config=fp8_config(scheme)), make_call(rng)
    for _ in range(2):
        weights = make_weights(rng, n_inter)
        weights[1][...] *= 3
        stored = [quantise(each, "fp8_tensor") for each in weights]
        load_fp8(layer, stored, "weight_scale")
        (w1, s1), (w3, s3), (w2, s2) = stored
        scales = {"w13_scale": np.stack([s1, s3], 1), "w2_scale": s2, "quant": "fp8_tensor"}
        check(layer(*call), call, (w1, w3, w2), **scales)
    assert f"n_inter={n_inter} n_inter_pad={n_inter} quant=fp8_tensor" in trace.read_text()


def test_expert_map(vllm: SimpleNamespace, rng: np.random.Generator) -> None:
    """With expert parallelism ids are global, and those held elsewhere are -1 in the map."""
    import torch

    layer, (w1, w3, w2), call = Layer(vllm), make_weights(rng), make_call(rng)
    layer.load(w1, w3, w2)
    experts = layer.experts.quant_method.moe_kernel.fused_experts
    x = torch.from_numpy(call[0])
    ids = torch.from_numpy(rng.integers(0, 2 * N_EXPERT, (N_TOKEN, N_TOPK)))
    shares = torch.from_numpy(rng.random((N_TOKEN, N_TOPK), np.float32))
    mapping = torch.full((2 * N_EXPERT,), -1, dtype=torch.int32)
    mapping[1::2] = torch.arange(N_EXPERT, dtype=torch.int32)
    shapes = experts.workspace_shapes(
        N_TOKEN,
        2 * N_INTER,
        N_HIDDEN,
        N_TOPK,
        2 * N_EXPERT,
        N_EXPERT,
        None,
        layer.experts.activation,
    )
    workspaces = [torch.full(shape, float("nan")) for shape in shapes]
    experts.apply(
        output=workspaces[2],
        hidden_states=x,
        w1=layer.experts.w13_weight,
        w2=layer.experts.w2_weight,
        topk_weights=shares,
        topk_ids=ids,
        activation=layer.experts.activation,
        global_num_experts=2 * N_EXPERT,
        expert_map=mapping,
        a1q_scale=None,
        a2_scale=None,
        workspace13=workspaces[0],
        workspace2=workspaces[1],
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    arrays = (call[0], np.concatenate([w1, w3], 1), w2, shares.numpy(), ids.numpy())
    options = {"expert_map": mapping.numpy()}
    right, naive = reference.fused_moe(*arrays, **options), reference.naive(*arrays, **options)
    check_close(workspaces[2].numpy(), right, naive)


def refused(trace: Path, layer: Layer) -> str:
    (line,) = trace.read_text().splitlines()
    start, _, reason = line.partition(" refused: ")
    assert start == f"pid={os.getpid()} framework=vllm layer={layer.name}"
    assert layer.experts.quant_method.experts_cls is not layer.vllm.adapter.MoepadExperts
    return reason


def test_refused_beta(vllm: SimpleNamespace) -> None:
    options = {"swiglu_limit": 2.0, "swiglu_alpha": 1.5, "swiglu_beta": 1.0}
    layer = Layer(vllm, activation="swigluoai_uninterleave", **options)
    moe = layer.experts.moe_config
    assert vllm.adapter._refusal(moe) is None
    moe.swiglu_beta = 0.5
    assert vllm.adapter._refusal(moe) == "swiglu_beta=0.5"


def test_refused_by_vllms_rules(
    vllm: SimpleNamespace, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own list of what an experts class supports decides, and names it."""
    monkeypatch.setattr(vllm.adapter.MoepadExperts, "_supports_activation", lambda kind: False)
    assert "activation" in refused(trace, Layer(vllm))


def test_no_kernel_for_the_device(
    vllm: SimpleNamespace, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(*args: object, **options: object) -> None:
        raise moepad.UnsupportedError("hidden_states: no kernel")

    monkeypatch.setattr(moepad, "fused_moe", no_kernel)
    assert refused(trace, Layer(vllm)) == "hidden_states: no kernel"


def test_biases(vllm: SimpleNamespace, rng: np.random.Generator) -> None:
    import torch

    layer, weights, call = Layer(vllm, has_bias=True), make_weights(rng), make_call(rng)
    biases = {
        "w13_bias": rng.standard_normal((N_EXPERT, 2 * N_INTER), np.float32),
        "w2_bias": rng.standard_normal((N_EXPERT, N_HIDDEN), np.float32),
    }
    for name, bias in biases.items():
        getattr(layer.experts, name).data.copy_(torch.from_numpy(bias))
    layer.load(*weights)
    check(layer(*call), call, weights, **biases)


def test_modes(vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = Layer(vllm).experts.moe_config
    other = SimpleNamespace(**{**vars(moe), "moe_backend": "triton", "is_act_and_mul": True})
    assert vllm.adapter._refusal(other) == "--moe-backend triton was asked for"
    monkeypatch.setenv("MOEPAD_VLLM", "on")
    assert vllm.adapter._refusal(other) is None
    monkeypatch.setenv("MOEPAD_VLLM", "maybe")
    with pytest.raises(ValueError, match=r"MOEPAD_VLLM: .*auto, on, off.* 'maybe'"):
        vllm.adapter.register()


def test_register_again_and_beside_another(
    vllm: SimpleNamespace, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = vllm.adapter.op_registry_oot
    vllm.adapter.register()
    assert registry["UnquantizedFusedMoEMethod"] is vllm.adapter.MoepadMethod
    monkeypatch.setitem(registry, "UnquantizedFusedMoEMethod", int)
    vllm.adapter.register()
    assert trace.read_text().endswith("layer=every layer refused: int is registered\n")
    monkeypatch.delitem(registry, "UnquantizedFusedMoEMethod")
    monkeypatch.setenv("MOEPAD_VLLM", "off")
    vllm.adapter.register()
    assert "UnquantizedFusedMoEMethod" not in registry


def test_command_of_the_page(vllm: SimpleNamespace) -> None:
    """vLLM's own parser takes its options."""
    arguments = pkgutil.resolve_name("vllm.engine.arg_utils.EngineArgs")
    parser = pkgutil.resolve_name("vllm.utils.argparse_utils.FlexibleArgumentParser")()
    page = (Path(__file__).parents[1] / "docs" / "vllm.md").read_text()
    (command,) = re.findall(r"^vllm serve (.*)", page, flags=re.MULTILINE)
    model, *options = shlex.split(command)
    parsed = arguments.add_cli_args(parser).parse_args(["--model", model, *options])
    assert parsed.model == "Qwen/Qwen3-30B-A3B" and parsed.tensor_parallel_size == 8


# Parameters of what the adapter overrides, calls or relies on. A difference means reading
# upstream's change first, then the adapter, then this table.
EXPERTS = f"{LAYERS}.fused_moe.modular_kernel.FusedMoEExpertsModular"
METHOD = f"{LAYERS}.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod"
SIGNATURES = {
    f"{EXPERTS}.__init__": "self moe_config quant_config max_num_tokens num_dispatchers",
    f"{EXPERTS}.apply": (
        "self output hidden_states w1 w2 topk_weights topk_ids activation global_num_experts "
        "expert_map a1q_scale a2_scale workspace13 workspace2 expert_tokens_meta "
        "apply_router_weight_on_input"
    ),
    f"{EXPERTS}.workspace_shapes": (
        "self M N K topk global_num_experts local_num_experts expert_tokens_meta activation"
    ),
    f"{EXPERTS}.finalize_weight_and_reduce_impl": "self",
    f"{EXPERTS}.process_weights_after_loading": "self layer",
    f"{EXPERTS}.adjust_N_for_activation": "N activation",
    f"{EXPERTS}.is_supported_config": (
        "cls moe_config weight_key activation_key activation_format"
    ),
    f"{METHOD}.__init__": "self moe",
    f"{METHOD}.create_weights": (
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype "
        "extra_weight_attrs"
    ),
    f"{METHOD}.maybe_roundup_sizes": (
        "self hidden_size intermediate_size_per_partition act_dtype moe_parallel_config"
    ),
    f"{METHOD}.register_oot": "_decorated_op_cls name",
    f"{LAYERS}.quantization.fp8.Fp8MoEMethod.__init__": "self quant_config layer",
    f"{LAYERS}.quantization.fp8.Fp8Config.get_quant_method": "self layer prefix",
    f"{LAYERS}.quantization.register_quantization_config": "quantization",
    f"{LAYERS}.fused_moe.routed_experts.RoutedExperts.weight_loader": (
        "self param loaded_weight weight_name shard_id expert_id return_success"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(vllm: SimpleNamespace, name: str) -> None:
    assert " ".join(inspect.signature(pkgutil.resolve_name(name)).parameters) == SIGNATURES[name]


def test_nothing_abstract_is_left(vllm: SimpleNamespace) -> None:
    assert not inspect.isabstract(vllm.adapter.MoepadExperts)
