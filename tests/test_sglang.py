"""The SGLang adapter under the real SGLang: layers and loader in this process, engines beside it.

Runs in the environment that `tests/serving/make_environment sglang` makes. There the plugin is
found as SGLang finds it, by the entry point of the installed wheel.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import signal
import subprocess
import sys
import threading
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
from serving import sglang_environment, tiny_moe
from serving.sglang_engine import ANSWERS

if find_spec("sglang") is None:
    missing("sglang", "it is not installed; tests/serving/make_environment does")

Array = NDArray[Any]

# SGLang's and its dependencies' own warnings are not ours to fail on.
pytestmark = pytest.mark.filterwarnings("ignore")

N_EXPERT, N_TOPK, N_HIDDEN, N_INTER, N_TOKEN = 8, 2, 64, 192, 11


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A started runtime with the plugin loaded, and the names of SGLang that the tests use."""
    patch = pytest.MonkeyPatch()
    for name, value in sglang_environment.VARIABLES.items():
        patch.setenv(name, value)
    patch.delenv("MOEPAD_SGLANG", raising=False)
    patch.syspath_prepend(str(sglang_environment.STUBS))
    folder = tmp_path_factory.mktemp("model")
    tiny_moe.write(folder, N_INTER, "float32")
    sglang_environment.start_runtime(folder)
    importlib.import_module("sglang.srt.plugins").load_plugins()
    names = {
        "FusedMoE": "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE",
        "StandardTopKOutput": "sglang.srt.layers.moe.topk.StandardTopKOutput",
        "HookRegistry": "sglang.srt.plugins.hook_registry.HookRegistry",
        "flags": "sglang.srt.runtime_context.get_flags",
        "adapter": "moepad.adapters.sglang",
    }
    found = {key: pkgutil.resolve_name(name) for key, name in names.items()}
    yield SimpleNamespace(model=folder, **found)
    patch.undo()


class Weights:
    """A layer's logical tensors, as a checkpoint stores them for each expert."""

    def __init__(self, rng: np.random.Generator, n_inter: int = N_INTER, gated: bool = True):
        def values(*shape: int) -> Array:
            return rng.standard_normal(shape, np.float32) * np.float32(0.1)

        self.shards = {"w1": values(N_EXPERT, n_inter, N_HIDDEN)}
        if gated:
            self.shards["w3"] = values(N_EXPERT, n_inter, N_HIDDEN)
        self.shards["w2"] = values(N_EXPERT, N_HIDDEN, n_inter)

    @property
    def w13(self) -> Array:
        return np.concatenate([self.shards[key] for key in ("w1", "w3") if key in self.shards], 1)

    def load_into(self, layer: Any) -> None:
        """As a model's load_weights does: every expert's tensors through the parameter's loader."""
        import torch

        for shard_id, tensors in self.shards.items():
            param = layer.w2_weight if shard_id == "w2" else layer.w13_weight
            for expert, tensor in enumerate(tensors):
                name = f"experts.{expert}.{shard_id}.weight"
                param.weight_loader(param, torch.from_numpy(tensor), name, shard_id, expert)
        layer.quant_method.process_weights_after_loading(layer)


class Call:
    """Tokens and their routing."""

    def __init__(self, rng: np.random.Generator, n_token: int = N_TOKEN):
        self.x = rng.standard_normal((n_token, N_HIDDEN), np.float32)
        ids = np.tile(np.arange(N_EXPERT, dtype=np.int32), (n_token, 1))
        self.ids = rng.permuted(ids, axis=1)[:, :N_TOPK]
        self.weights = rng.random((n_token, N_TOPK), np.float32)

    def of(self, sglang: SimpleNamespace, layer: Any) -> Array:
        """What the layer makes of it, through dispatch, method and combine."""
        import torch

        arrays = (self.weights, self.ids, np.zeros((len(self.x), N_EXPERT), np.float32))
        topk = sglang.StandardTopKOutput(*map(torch.from_numpy, arrays))
        with torch.no_grad():
            out: Array = layer(torch.from_numpy(self.x.copy()), topk).numpy()
        return out

    def check(self, out: Array, weights: Weights, **options: Any) -> None:
        arrays = (self.x, weights.w13, weights.shards["w2"], self.weights, self.ids)
        check_close(
            out, reference.fused_moe(*arrays, **options), reference.naive(*arrays, **options)
        )


def make_layer(sglang: SimpleNamespace, n_inter: int = N_INTER, **options: Any) -> Any:
    """A layer whose parameters hold NaN wherever nothing is loaded into them."""
    import torch

    layer = sglang.FusedMoE(
        num_experts=N_EXPERT,
        hidden_size=N_HIDDEN,
        intermediate_size=n_inter,
        layer_id=0,
        top_k=N_TOPK,
        params_dtype=torch.float32,
        prefix="model.layers.0.mlp.experts",
        **options,
    )
    with torch.no_grad():
        for param in layer.parameters():
            param.fill_(0xFF if param.dtype == torch.uint8 else float("nan"))
    return layer


def test_plugin_is_found_and_hooks(sglang: SimpleNamespace) -> None:
    for target, hook in sglang.adapter.HOOKS.items():
        function = pkgutil.resolve_name(target)
        assert hook in inspect.getclosurevars(function).nonlocals.values(), target


def test_layer(sglang: SimpleNamespace, trace: Path, rng: np.random.Generator) -> None:
    layer, weights, call = make_layer(sglang), Weights(rng), Call(rng)
    weights.load_into(layer)
    call.check(call.of(sglang, layer), weights)
    assert trace.read_text() == (
        f"pid={os.getpid()} framework=sglang layer=model.layers.0.mlp.experts tp=0/1 n_inter=192 "
        f"n_inter_pad=192 quant=none engine=cpu-{moepad.cpu_isa()}\n"
    )


@pytest.mark.parametrize(
    ("options", "meaning"),
    [
        ({"activation": "gelu"}, {"activation": "gelu_tanh"}),
        ({"activation": "relu2", "is_gated": False}, {"activation": "relu2"}),
        ({"swiglu_limit": 0.5}, {"swiglu_limit": 0.5}),
        ({"apply_router_weight_on_input": True}, {"apply_router_weight_on_input": True}),
        (
            {"gemm1_alpha": 1.5, "gemm1_clamp_limit": 2.0},
            {
                "activation": "swigluoai",
                "swiglu_alpha": 1.5,
                "swiglu_limit": 2.0,
                "gate_up": "interleaved",
            },
        ),
        (
            {"gemm1_alpha": 1.5, "gemm1_clamp_limit": 2.0, "gate_up_interleaved": False},
            {"activation": "swigluoai", "swiglu_alpha": 1.5, "swiglu_limit": 2.0},
        ),
    ],
)
def test_options(
    sglang: SimpleNamespace,
    trace: Path,
    rng: np.random.Generator,
    options: dict[str, Any],
    meaning: dict[str, Any],
) -> None:
    layer, call = make_layer(sglang, **options), Call(rng)
    weights = Weights(rng, gated=options.get("is_gated", True))
    weights.load_into(layer)
    call.check(call.of(sglang, layer), weights, **meaning)
    assert "n_inter=192" in trace.read_text()


def test_fused_tensors_with_biases(sglang: SimpleNamespace, rng: np.random.Generator) -> None:
    """As gpt-oss loads them: all experts at once, gate and up rows in turns."""
    import torch

    meaning = {"activation": "swigluoai", "swiglu_alpha": 1.5, "swiglu_limit": 2.0}
    clamp = {"gemm1_alpha": 1.5, "gemm1_clamp_limit": 2.0}
    layer = make_layer(sglang, 256, use_weight_loader_fused=True, with_bias=True, **clamp)
    weights, call = Weights(rng), Call(rng)
    biases = {
        "w13_bias": rng.standard_normal((N_EXPERT, 2 * N_INTER), np.float32),
        "w2_bias": rng.standard_normal((N_EXPERT, N_HIDDEN), np.float32),
    }
    for shard_id, tensor in (("w13", weights.w13), ("w2", weights.shards["w2"])):
        for name, value in (("weight", tensor), ("weight_bias", biases[f"{shard_id}_bias"])):
            param = getattr(layer, f"{shard_id}_{name}")
            param.weight_loader(param, torch.from_numpy(value), f"{shard_id}_{name}", shard_id)
    layer.quant_method.process_weights_after_loading(layer)
    out = call.of(sglang, layer)
    call.check(out, weights, gate_up="interleaved", **biases, **meaning)


def test_no_kernel_for_the_layer(
    sglang: SimpleNamespace,
    trace: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_kernel(*args: object, **options: object) -> None:
        raise moepad.UnsupportedError("hidden_states: no kernel")

    with monkeypatch.context() as patch:
        patch.setattr(moepad, "fused_moe", no_kernel)
        layer, weights, call = make_layer(sglang), Weights(rng), Call(rng)
    weights.load_into(layer)
    call.check(call.of(sglang, layer), weights)
    assert refused(trace) == "hidden_states: no kernel"


def test_slots_to_skip_and_no_tokens(sglang: SimpleNamespace, rng: np.random.Generator) -> None:
    layer, weights, call = make_layer(sglang), Weights(rng), Call(rng)
    weights.load_into(layer)
    call.ids[::2, 1] = -1
    call.check(call.of(sglang, layer), weights)
    assert Call(rng, n_token=0).of(sglang, layer).shape == (0, N_HIDDEN)


@pytest.mark.parametrize("n_pad", [192, 256, 512])
def test_pads_are_not_read(sglang: SimpleNamespace, rng: np.random.Generator, n_pad: int) -> None:
    """The size comes from the checkpoint; what the tensors have room for changes no bit."""
    import torch

    layer, padded, call = make_layer(sglang), make_layer(sglang, n_pad), Call(rng)
    weights = Weights(rng)
    weights.load_into(layer)
    weights.load_into(padded)
    with torch.no_grad():
        padded.w13_weight.unflatten(1, (2, n_pad))[:, :, N_INTER:] = float("nan")
        padded.w2_weight[:, :, N_INTER:] = float("nan")
    check_bits(call.of(sglang, padded), call.of(sglang, layer))


@pytest.mark.parametrize("n_stride", [64, 128])
def test_ranks_of_padded_stride(
    sglang: SimpleNamespace, trace: Path, rng: np.random.Generator, n_stride: int
) -> None:
    """SGLang packs columns to the front ranks: full, partly filled and empty ones add up."""
    weights, call, total = Weights(rng, n_inter=160), Call(rng), np.zeros((N_TOKEN, N_HIDDEN))
    columns = []
    for rank in range(4):
        layer = make_layer(sglang, n_stride)
        layer.moe_tp_size, layer.moe_tp_rank = 4, rank
        weights.load_into(layer)
        columns.append(layer.moepad.n_inter)
        total += call.of(sglang, layer)
    assert columns == {64: [64, 64, 32, 0], 128: [128, 32, 0, 0]}[n_stride]
    arrays = (call.x, weights.w13, weights.shards["w2"], call.weights, call.ids)
    right, naive = reference.fused_moe(*arrays), reference.naive(*arrays)
    check_close(total.astype(np.float32), right, naive)


def test_update_through_sglangs_loader(sglang: SimpleNamespace, rng: np.random.Generator) -> None:
    """New values in the same memory, which the next call computes with, processed again or not."""
    layer, old, new, call = make_layer(sglang), Weights(rng), Weights(rng), Call(rng)
    old.load_into(layer)
    call.check(call.of(sglang, layer), old)
    addresses = [param.data_ptr() for param in layer.parameters()]
    new.load_into(layer)
    call.check(call.of(sglang, layer), new)
    assert [param.data_ptr() for param in layer.parameters()] == addresses


def test_nothing_loaded_yet(sglang: SimpleNamespace, rng: np.random.Generator) -> None:
    """A dummy load writes parameters past the loader; the whole tensors count until it runs."""
    import torch

    layer, weights, call = make_layer(sglang, 256), Weights(rng, 256), Call(rng)
    with torch.no_grad():
        layer.w13_weight.copy_(torch.from_numpy(weights.w13))
        layer.w2_weight.copy_(torch.from_numpy(weights.shards["w2"]))
    layer.quant_method.process_weights_after_loading(layer)
    call.check(call.of(sglang, layer), weights)
    narrow = Weights(rng)
    narrow.load_into(layer)
    call.check(call.of(sglang, layer), narrow)


def refused(trace: Path) -> str:
    (line,) = trace.read_text().splitlines()
    start, _, reason = line.partition(" refused: ")
    assert start == f"pid={os.getpid()} framework=sglang layer=model.layers.0.mlp.experts"
    return reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"no_combine": True}, "no_combine"),
        ({"activation": "situ"}, "activation situ, gated"),
        ({"gemm1_clamp_limit": 7.0}, "gemm1_alpha=None with gemm1_clamp_limit=7.0"),
    ],
)
def test_refusals(
    sglang: SimpleNamespace, trace: Path, options: dict[str, Any], reason: str
) -> None:
    layer = make_layer(sglang, **options)
    assert refused(trace) == reason
    assert not hasattr(layer, "moepad")


def ask_for(sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, runner: str) -> None:
    """--moe-runner-backend RUNNER."""
    backend = pkgutil.resolve_name("sglang.srt.layers.moe.utils.MoeRunnerBackend")(runner)
    monkeypatch.setattr(sglang.flags().moe, "runner_backend", backend)


def test_another_runner_was_asked_for(
    sglang: SimpleNamespace,
    trace: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layer is then SGLang's own from the first step to the last."""
    ask_for(sglang, monkeypatch, "triton")
    layer, weights, call = make_layer(sglang), Weights(rng), Call(rng)
    weights.load_into(layer)
    call.check(call.of(sglang, layer), weights)
    assert refused(trace) == "--moe-runner-backend triton was asked for"


def test_on_overrides_triton(
    sglang: SimpleNamespace,
    trace: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask_for(sglang, monkeypatch, "triton")
    monkeypatch.setenv("MOEPAD_SGLANG", "on")
    layer, weights, call = make_layer(sglang), Weights(rng), Call(rng)
    weights.load_into(layer)
    call.check(call.of(sglang, layer), weights)
    assert "n_inter=192" in trace.read_text()


def test_on_leaves_runners_with_layouts_of_their_own(
    sglang: SimpleNamespace, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that wants up rows before gate rows."""
    ask_for(sglang, monkeypatch, "deep_gemm")
    monkeypatch.setenv("MOEPAD_SGLANG", "on")
    make_layer(sglang)
    assert refused(trace) == "--moe-runner-backend deep_gemm was asked for"


def test_lora(sglang: SimpleNamespace, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = SimpleNamespace(enable_lora=True, lora_paths=None)
    monkeypatch.setattr(sglang.adapter, "get_lora", lambda: lora)
    make_layer(sglang)
    assert refused(trace) == "LoRA"


def test_wrapped_method(sglang: SimpleNamespace, trace: Path) -> None:
    """A method that borrows another one's parameters keeps its own steps."""
    unquantised = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod"
    base = pkgutil.resolve_name(unquantised)

    class Borrower(base):  # type: ignore[misc]
        def create_weights(self, **sizes: Any) -> None:
            base().create_weights(**sizes)

    make_layer(sglang, quant_method=Borrower())
    assert refused(trace) == "Borrower wraps its method"


def test_off(sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang.HookRegistry, "register", pytest.fail)
    monkeypatch.setenv("MOEPAD_SGLANG", "off")
    sglang.adapter.register()
    monkeypatch.setenv("MOEPAD_SGLANG", "maybe")
    with pytest.raises(ValueError, match=r"MOEPAD_SGLANG: .*auto, on, off.* 'maybe'"):
        sglang.adapter.register()


def test_commands_of_the_page(sglang: SimpleNamespace) -> None:
    """SGLang's own parser takes them, and the runner's name that the plugin adds."""
    parse = pkgutil.resolve_name("sglang.srt.server_args.prepare_server_args")
    page = (Path(__file__).parents[1] / "docs" / "sglang.md").read_text()
    commands = re.findall(r"python -m sglang\.launch_server (.*)", page)
    assert len(commands) == 2
    model = str(sglang.model)
    for command in commands:
        words = shlex.split(command.replace("Qwen/Qwen3-30B-A3B", model))
        options = parse([*words, "--device", "cpu"])
        assert options.model_path == model
    assert options.moe_runner_backend == "moepad"


# Parameters of what the adapter hooks, calls or relies on. A difference means reading upstream's
# change first, then the adapter, then this table.
SIGNATURES = {
    "layers.quantization.unquant.UnquantizedFusedMoEMethod.create_weights": (
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype with_bias "
        "**extra_weight_attrs"
    ),
    "layers.quantization.unquant.UnquantizedFusedMoEMethod.process_weights_after_loading": (
        "self layer"
    ),
    "layers.quantization.unquant.UnquantizedFusedMoEMethod.apply": "self layer dispatch_output",
    "layers.quantization.unquant.UnquantizedFusedMoEMethod._aiter_ck_moe_unsupported_reason": (
        "self layer"
    ),
    "layers.quantization.fp8.Fp8MoEMethod.create_weights": (
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype with_bias "
        "**extra_weight_attrs"
    ),
    "layers.quantization.fp8.Fp8MoEMethod.process_weights_after_loading": "self layer",
    "layers.quantization.fp8.Fp8MoEMethod.apply": "self layer dispatch_output",
    "layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8_moe"
    ".CompressedTensorsW8A8Fp8MoE.create_weights": (
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype "
        "**extra_weight_attrs"
    ),
    "layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8_moe"
    ".CompressedTensorsW8A8Fp8MoE.process_weights_after_loading": "self layer",
    "layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8_moe"
    ".CompressedTensorsW8A8Fp8MoE.apply_weights": "self layer dispatch_output",
    "model_executor.model_runner_components.moe_ep_setup.check_quantized_moe_compatibility": (
        "model_config tp_size moe_ep_size moe_dp_size"
    ),
    "layers.moe.utils.initialize_moe_config": "",
    "layers.moe.fused_moe_triton.layer.FusedMoE.weight_loader": (
        "self param loaded_weight weight_name shard_id expert_id"
    ),
    "layers.moe.fused_moe_triton.layer.FusedMoE.weight_loader_fused": (
        "self param loaded_weight weight_name shard_id"
    ),
    "layers.moe.moe_runner.aiter.AiterRunnerCore.run": (
        "self runner_input quant_info running_state hooks"
    ),
    "layers.moe.token_dispatcher.standard.StandardCombineInput": "hidden_states",
    "layers.moe.token_dispatcher.standard.StandardDispatchOutput": (
        "hidden_states hidden_states_scale topk_output hidden_states_pre_quant"
    ),
    "layers.moe.topk.StandardTopKOutput": "topk_weights topk_ids router_logits",
    "layers.moe.utils.get_moe_padding_size": "is_aiter_moe",
    "layers.moe.utils.get_moe_weight_sizes": "inter_dim is_concat is_packed is_aiter_moe",
    "plugins.hook_registry.HookRegistry.register": "target hook hook_type source",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(sglang: SimpleNamespace, name: str) -> None:
    parameters = inspect.signature(pkgutil.resolve_name(f"sglang.srt.{name}")).parameters.values()
    found = [
        f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name
        for parameter in parameters
    ]
    assert " ".join(found) == SIGNATURES[name]


def test_signature_of_every_hook(sglang: SimpleNamespace) -> None:
    assert {name.removeprefix("sglang.srt.") for name in sglang.adapter.HOOKS} <= set(SIGNATURES)


def test_golden_helpers(sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded results that `test_helpers.py` holds ours to are what SGLang returns."""
    monkeypatch.delenv("SGLANG_MOE_PADDING", raising=False)
    recorded = json.loads((Path(__file__).parent / "data" / "sglang_helpers.json").read_text())
    helpers = importlib.import_module("sglang.srt.layers.moe.utils")
    rows = [[*row[:4], *helpers.get_moe_weight_sizes(*row[:4])] for row in recorded["rows"]]
    assert len(rows) == 2472 and rows == recorded["rows"]
    sizes = {
        "aiter": helpers.get_moe_padding_size(True),
        "no_aiter": helpers.get_moe_padding_size(False),
    }
    assert sizes == recorded["padding_size"]


# ---- fp8


class Stored:
    """fp8 experts as a checkpoint stores them: values and scales of each shard."""

    def __init__(self, weights: Weights, quant: str, block: tuple[int, int]):
        self.quant, self.block = quant, block
        self.shards = {
            shard_id: quantise(tensor, quant, block=block)
            for shard_id, tensor in weights.shards.items()
        }

    def load_into(self, layer: Any) -> None:
        import torch

        for shard_id, (values, scales) in self.shards.items():
            half = "w2" if shard_id == "w2" else "w13"
            weight = getattr(layer, f"{half}_weight")
            scale = next(
                getattr(layer, f"{half}_{name}")
                for name in ("weight_scale_inv", "weight_scale")
                if hasattr(layer, f"{half}_{name}")
            )
            stored = torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
            if self.quant == "fp8_channel":
                scales = scales[..., None]
            for expert in range(N_EXPERT):
                name = f"experts.{expert}.{shard_id}.weight"
                weight.weight_loader(weight, stored[expert], name, shard_id, expert)
                value = torch.from_numpy(np.asarray(scales[expert]))
                scale.weight_loader(scale, value, f"{name}_scale", shard_id, expert)
        layer.quant_method.process_weights_after_loading(layer)

    def check(self, out: Array, call: Call) -> None:
        """Against the specification, on the whole checkpoint."""
        (w1, s1), (w3, s3), (w2, s2) = (self.shards[key] for key in ("w1", "w3", "w2"))
        s13 = np.stack([s1, s3], 1) if s1.ndim == 1 else np.concatenate([s1, s3], 1)
        arrays = (call.x, np.concatenate([w1, w3], 1), w2, call.weights, call.ids)
        options: dict[str, Any] = {
            "quant": self.quant,
            "w13_scale": s13,
            "w2_scale": s2,
            "block": self.block,
        }
        right, naive = (f(*arrays, **options) for f in (reference.fused_moe, reference.naive))
        check_close(out, right, naive)


def fp8_config(**options: Any) -> Any:
    config = pkgutil.resolve_name("sglang.srt.layers.quantization.fp8.Fp8Config")
    return config(is_checkpoint_fp8_serialized=True, **options)


class CompressedTensors:
    """A quantisation config that gives every layer SGLang's compressed-tensors fp8 scheme."""

    def __init__(self, strategy: str, **structure: Any):
        from compressed_tensors.quantization import QuantizationArgs

        def arguments(strategy: str, **options: Any) -> Any:
            return QuantizationArgs(num_bits=8, type="float", strategy=strategy, **options)

        self.weights = arguments(strategy, **structure)
        token = "tensor" if strategy == "tensor" else "token"
        self.inputs = arguments(token, dynamic=True)

    def get_name(self) -> str:
        return "compressed_tensors"

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        package = "sglang.srt.layers.quantization.compressed_tensors"
        method = f"{package}.compressed_tensors.CompressedTensorsFusedMoEMethod"
        scheme = f"{package}.schemes.CompressedTensorsW8A8Fp8MoE"
        layer.scheme = pkgutil.resolve_name(scheme)(self.weights, self.inputs)
        return pkgutil.resolve_name(method)(self)


BLOCK, ONE = (128, 128), (1, 1)
FP8 = {
    "fp8_block": ("fp8_block", BLOCK, lambda: fp8_config(weight_block_size=[128, 128])),
    "fp8_tensor": ("fp8_tensor", ONE, fp8_config),
    "mxfp8": ("mxfp8", (1, 32), lambda: fp8_config(use_mxfp8=True)),
    "compressed channel": ("fp8_channel", ONE, lambda: CompressedTensors("channel")),
    "compressed tensor": ("fp8_tensor", ONE, lambda: CompressedTensors("tensor")),
    "compressed block": (
        "fp8_block",
        BLOCK,
        lambda: CompressedTensors("block", block_structure=[128, 128]),
    ),
}


@pytest.mark.parametrize("name", FP8)
def test_fp8(sglang: SimpleNamespace, trace: Path, rng: np.random.Generator, name: str) -> None:
    """256 columns in SGLang's parameters, of which the checkpoint has 192."""
    quant, block, config = FP8[name]
    layer, call = make_layer(sglang, 256, quant_config=config()), Call(rng)
    stored = Stored(Weights(rng), quant, block)
    stored.load_into(layer)
    stored.check(call.of(sglang, layer), call)
    assert f" n_inter=192 n_inter_pad=256 quant={quant} " in trace.read_text()


class Ranks:
    """SGLang's parallel state, but for the size and rank of its tensor-parallel group."""

    def __init__(self, state: Any, size: int, rank: int):
        self.state, self.moe_tp_size, self.moe_tp_rank = state, size, rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)


@pytest.mark.parametrize("name", ["fp8_block", "compressed block"])
@pytest.mark.parametrize(
    ("n_inter", "shares"),
    [(384, [192, 192]), (768, [192] * 4), (704, [192, 192, 160, 160]), (192, [96, 96])],
)
def test_fp8_sizes_that_cut_scale_blocks(
    sglang: SimpleNamespace,
    trace: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    n_inter: int,
    shares: list[int],
) -> None:
    """SGLang refuses them; they are loaded by the plan, in true shares, and updated in place."""
    quant, block, config = FP8[name]
    old, new = (Stored(Weights(rng, n_inter), quant, block) for _ in range(2))
    call, total = Call(rng), np.zeros((2, N_TOKEN, N_HIDDEN))
    layer_module = importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.layer")
    state = layer_module.get_parallel()
    for rank, share in enumerate(shares):
        ranks = Ranks(state, len(shares), rank)
        monkeypatch.setattr(layer_module, "get_parallel", lambda ranks=ranks: ranks)
        layer = make_layer(sglang, n_inter, quant_config=config())
        assert layer.w2_weight.shape == (N_EXPERT, N_HIDDEN, share)
        for i, stored in enumerate((old, new)):
            stored.load_into(layer)
            total[i] += call.of(sglang, layer)
    for stored, out in zip((old, new), total, strict=True):
        stored.check(out.astype(np.float32), call)
    assert " refused: " not in trace.read_text()


def test_fp8_that_sglang_keeps(sglang: SimpleNamespace, trace: Path) -> None:
    """Without a kernel of ours its own refusal of the size comes through."""
    config = fp8_config(weight_block_size=[128, 128])
    with pytest.raises(ValueError, match="is not divisible by"):
        make_layer(sglang, quant_config=config, no_combine=True)
    assert refused(trace) == "no_combine"


@pytest.mark.parametrize(("n_inter", "is_fine"), [(1536, True), (1532, False)])
def test_check_of_sizes(
    sglang: SimpleNamespace, n_inter: int, is_fine: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """192 of 128-blocks on each of eight ranks pass; what does not divide at all still does not."""
    module = "sglang.srt.model_executor.model_runner_components.moe_ep_setup"
    check = pkgutil.resolve_name(f"{module}.check_quantized_moe_compatibility")
    config = SimpleNamespace(
        hf_config=SimpleNamespace(quantization_config={"weight_block_size": [128, 128]}),
        hf_text_config=SimpleNamespace(moe_intermediate_size=n_inter),
    )
    arguments = {"model_config": config, "tp_size": 8, "moe_ep_size": 1, "moe_dp_size": 1}
    caplog.set_level("INFO", "moepad")
    if is_fine:
        check(**arguments)
        assert "1536 columns over 8 ranks cut scale blocks" in caplog.text
    else:
        with pytest.raises(ValueError, match="must be divisible by"):
            check(**arguments)


# ---- AITER's function under SGLang's AITER runner


@pytest.fixture
def aiter_layer(sglang: SimpleNamespace) -> Any:
    """Makes a layer whose method runs SGLang's real AiterRunnerCore, on weights it has shuffled."""
    quantisation = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod"
    runner = "sglang.srt.layers.moe.moe_runner"
    base = pkgutil.resolve_name(quantisation)
    make_runner = pkgutil.resolve_name(f"{runner}.runner.MoeRunner")
    quant_info = pkgutil.resolve_name(f"{runner}.aiter.AiterMoeQuantInfo")
    backends = pkgutil.resolve_name("sglang.srt.layers.moe.utils.MoeRunnerBackend")

    class Method(base):  # type: ignore[misc]
        def create_moe_runner(self, layer: Any, config: Any) -> None:
            self.runner = make_runner(backends.AITER, config)

        def process_weights_after_loading(self, layer: Any) -> None:
            from moepad import aiter

            for param in (layer.w13_weight, layer.w2_weight):
                param.data = aiter.shuffle_weight(param.data)

        def apply(self, layer: Any, dispatch_output: Any) -> Any:
            pad = layer.w2_weight.shape[2] - N_INTER
            scale = getattr(layer, "a1_scale", None)
            weights = (layer.w13_weight, layer.w2_weight)
            info = quant_info(*weights, intermediate_pad=pad, a13_scale=scale)
            return self.runner.run(dispatch_output, info)

    def make(**options: Any) -> Any:
        return make_layer(sglang, 256, quant_method=Method(), **options)

    return make


def serve_aiter(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """`import aiter` finds moepad's names, and `function` as its fused_moe."""
    from moepad import aiter

    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    assert aiter.install()
    for name in set(sys.modules) - before:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    monkeypatch.setattr(sys.modules["aiter.fused_moe"], "fused_moe", function)


def test_drop_in_for_aiter(
    aiter_layer: Any,
    sglang: SimpleNamespace,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moepad import aiter

    seen: dict[str, Any] = {}

    def fused_moe(**arguments: Any) -> Any:
        seen.update(arguments)
        return aiter.fused_moe(**arguments, layout="shuffle_16x16")

    serve_aiter(monkeypatch, fused_moe)
    layer, weights, call = aiter_layer(), Weights(rng), Call(rng)
    weights.load_into(layer)
    call.check(call.of(sglang, layer), weights)
    assert (
        seen["intermediate_pad"] == 64
        and seen.keys() <= inspect.signature(aiter.fused_moe).parameters.keys()
    )


def test_hook_on_aiter(
    aiter_layer: Any,
    sglang: SimpleNamespace,
    trace: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AITER's own function is called for what moepad leaves, by the hook that ROCm has."""
    import torch

    taken: list[Any] = []

    def fused_moe(hidden_states: Any, **arguments: Any) -> Any:
        taken.append(arguments)
        return torch.zeros_like(hidden_states)

    serve_aiter(monkeypatch, fused_moe)
    registry = sglang.HookRegistry
    for name in ("_hooks", "_patched"):
        monkeypatch.setattr(registry, name, copy.copy(getattr(registry, name)))
    monkeypatch.setattr(sglang.adapter, "HOOKS", {})  # they are there already
    monkeypatch.setattr(torch.version, "hip", "7.2")
    sglang.adapter.register()
    monkeypatch.setattr(torch.version, "hip", None)
    registry.apply_hooks()
    weights, call = Weights(rng), Call(rng)
    layer = aiter_layer()
    weights.load_into(layer)
    assert not call.of(sglang, layer).any() and len(taken) == 1
    monkeypatch.setenv("MOEPAD_SGLANG", "on")
    call.check(call.of(sglang, layer), weights)
    layer.a1_scale = torch.ones(1)
    assert not call.of(sglang, layer).any() and len(taken) == 2
    lines = [line.partition(" layer=")[2] for line in trace.read_text().splitlines()]
    aiter = "aiter.fused_moe.fused_moe"
    refusals = [line for line in lines if line.startswith(f"{aiter} refused: ")]
    assert len(refusals) == 2 and "MOEPAD_SGLANG=on" in refusals[0] and "a1_scale" in refusals[1]
    ran = f"{aiter} tp=0/1 n_inter=192 n_inter_pad=256 quant=No engine=cpu-{moepad.cpu_isa()}"
    assert ran in lines


# ---- the complete engine


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Written in a process of its own, as the engine's is."""
    folder = tmp_path_factory.mktemp("checkpoints")
    names = {"192-float32": 192, "96-float32": 96, "192-bfloat16": 192, "96-bfloat16": 96}
    code = ["from pathlib import Path", "from serving import tiny_moe"]
    for name, n_inter in names.items():
        dtype = name.partition("-")[2]
        code.append(f"tiny_moe.write(Path({str(folder / name)!r}), {n_inter}, {dtype!r})")
    other = str(folder / "other-192-float32")
    code.append(f"tiny_moe.write(Path({other!r}), 192, 'float32', seed=1)")
    fp8, exact = folder / "192-fp8", folder / "192-exact"
    code.append(f"tiny_moe.write_fp8(Path({str(fp8)!r}), Path({str(exact)!r}), 192)")
    run_child(["-c", "\n".join(code)])
    return {path.name: path for path in folder.iterdir()}


def run_child(arguments: list[str], **variables: str) -> str:
    """Standard output of a Python process with SGLang's environment."""
    environment = sglang_environment.of_child(**variables)
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr[-8000:]}"
    return done.stdout


class Server:
    """`sglang_engine.py` in a process of its own; it answers one job after the other."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        script = Path(__file__).parent / "serving" / "sglang_engine.py"
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(script)],
                env=sglang_environment.of_child(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """What the server prints for a job; it is ended where that takes minutes."""
        assert self.process.stdin and self.process.stdout
        limit = threading.Timer(300, self.end)
        limit.start()
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            lines = []
            for line in self.process.stdout:
                if line.startswith(ANSWERS):
                    return json.loads(line.removeprefix(ANSWERS))
                lines.append(line)
        finally:
            limit.cancel()
        raise AssertionError(f"{job}\n{''.join(lines)}\n{self.errors.read_text()[-8000:]}")

    def end(self) -> None:
        """With what the engine has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server") / "stderr")
    yield made
    made.end()
    assert made.process.stdin and made.process.stdout
    made.process.stdin.close()
    made.process.stdout.close()


@dataclasses.dataclass
class Served:
    """A checkpoint in the complete engine and in transformers, by the process that serves."""

    server: Server
    checkpoints: dict[str, Path]
    trace: Path

    def __call__(
        self,
        name: str,
        tp: int,
        dtype: str,
        reference: str = "",
        update: str = "",
        **options: str,
    ) -> tuple[float, list[str]]:
        """Largest difference of a logprob, tokens being equal, and the trace's lines by rank."""
        job = {
            "checkpoint": str(self.checkpoints[name]),
            "reference": str(self.checkpoints[reference or name]),
            "dtype": dtype,
            "tp": tp,
            "update": str(self.checkpoints[update]) if update else None,
            "options": options,
            "environment": {"MOEPAD_TRACE": str(self.trace)},
        }
        answers = self.server.answer(job)
        worst = 0.0
        for got, wanted in zip(answers["sglang"], answers["transformers"], strict=True):
            assert got["tokens"] == wanted["tokens"]
            pairs = zip(got["logprobs"], wanted["logprobs"], strict=True)
            worst = max(worst, *(abs(a - b) for a, b in pairs))
        lines = self.trace.read_text().splitlines()
        assert len({line.split()[0] for line in lines}) == len(lines) == tp, "a line from each rank"
        return worst, sorted(line.partition(" tp=")[2] for line in lines)


@pytest.fixture
def serve(server: Server, checkpoints: dict[str, Path], trace: Path) -> Served:
    return Served(server, checkpoints, trace)


ISA = f"engine=cpu-{moepad.cpu_isa()}"


# SGLang rounds a model's size up to a multiple of 32 for each rank on CPUs: of 96 columns the
# second of two ranks gets what is left in room for 64.
COLUMNS = {
    (192, 1): ["n_inter=192 n_inter_pad=192"],
    (192, 2): ["n_inter=96 n_inter_pad=96"] * 2,
    (96, 1): ["n_inter=96 n_inter_pad=96"],
    (96, 2): ["n_inter=64 n_inter_pad=64", "n_inter=32 n_inter_pad=64"],
}


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize(("n_inter", "tp"), COLUMNS)
def test_engine(serve: Served, n_inter: int, tp: int, dtype: str, allowed: float) -> None:
    worst, lines = serve(f"{n_inter}-{dtype}", tp, dtype)
    assert worst <= allowed
    expected = COLUMNS[n_inter, tp]
    assert lines == [f"{r}/{tp} {sizes} quant=none {ISA}" for r, sizes in enumerate(expected)]


def test_engine_takes_new_weights(serve: Served) -> None:
    """Served, replaced from another checkpoint while running, served again."""
    worst, lines = serve("192-float32", 1, "float32", update="other-192-float32")
    assert worst <= 1e-3 and lines == [f"0/1 n_inter=192 n_inter_pad=192 quant=none {ISA}"]


def test_engine_with_the_runner_named_moepad(serve: Served) -> None:
    worst, lines = serve("96-bfloat16", 1, "bfloat16", moe_runner_backend="moepad")
    assert worst <= 0.1 and lines == [f"0/1 n_inter=96 n_inter_pad=96 quant=none {ISA}"]


@pytest.mark.parametrize(
    ("tp", "columns"),
    [
        (1, ["n_inter=192 n_inter_pad=256"]),
        (2, ["n_inter=128 n_inter_pad=128", "n_inter=64 n_inter_pad=128"]),
        (4, [f"n_inter={n} n_inter_pad=128" for n in (128, 64, 0, 0)]),
    ],
)
def test_engine_fp8(serve: Served, tp: int, columns: list[str]) -> None:
    """Blocks of 128: SGLang's padded stride leaves ranks partly filled and empty."""
    worst, lines = serve("192-fp8", tp, "float16", reference="192-exact")
    assert worst <= 5e-3
    assert lines == [f"{r}/{tp} {sizes} quant=fp8_block {ISA}" for r, sizes in enumerate(columns)]
