"""SGLang's plugin: its MoE layers run by moepad, on its own parameters, loaded by its own loader.

SGLang finds `register` through the entry point group ``sglang.srt.plugins`` and calls it in every
process. It hooks three steps of the unquantised, fp8 and compressed-tensors fp8 methods:

* ``create_weights`` decides whether moepad takes the layer. If so, parameters are SGLang's own
  (with whatever pad), or, where SGLang would refuse the size, those of `moepad.plan`.
* ``process_weights_after_loading`` is left out for such a layer: nothing is shuffled, requantised
  or padded, so that SGLang's loader can write the same parameters again at any time.
* ``apply`` is `moepad.fused_moe`.

A layer that moepad does not take is SGLang's own from the first step to the last, and
`moepad.adapters.trace` says why. On ROCm the function that SGLang's AITER runner calls is hooked as
well, which reaches the methods not named above (Quark, MXFP4); as their weights are shuffled,
moepad keeps a row-major copy, so that this is for MOEPAD_SGLANG=on alone.

MOEPAD_SGLANG is ``off``, ``on`` (every layer moepad can run) or ``auto``, the default: on CPUs
every layer, on GPUs those whose intermediate size is no multiple of 128, where SGLang pads, falls
back or refuses; and none where ``--moe-runner-backend`` names another runner.
``--moe-runner-backend moepad`` is ``auto`` for SGLang and ``on`` for moepad.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.moe.utils import (
    MoeRunnerBackend,
    get_moe_a2a_backend,
    get_moe_runner_backend,
    register_moe_runner_backend_name,
)
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_flags, get_lora
from sglang.srt.server_args import add_moe_runner_backend_choices
from sglang.srt.utils import get_bool_env_var, set_weight_attrs

import moepad
from moepad import aiter
from moepad.adapters import trace

__all__ = ["HOOKS", "register"]

NAME = "sglang"
NAME_OF_BACKEND = "moepad"
AITER = "aiter.fused_moe.fused_moe"
MODES = ("auto", "on", "off")
_ALIGNED = 128  # what SGLang's GPU runners want the intermediate size to be a multiple of

_log = logging.getLogger("moepad")

Function = Callable[..., Any]


class _Refusal(Exception):
    """Why SGLang keeps a layer."""


@dataclass
class _Run:
    """What a layer's calls need besides its parameters."""

    name: str
    options: dict[str, Any]  # keywords of `fused_moe` that no call changes
    tensors: dict[str, str]  # keyword of `fused_moe`: attribute of the layer
    n_inter: int | None = None  # columns the loader gave this rank; None before it ran

    @property
    def quant(self) -> str:
        return str(self.options["quant"])

    def arguments(self, layer: Any) -> tuple[Any, Any, dict[str, Any]]:
        """w13, w2 and every keyword that does not depend on the tokens."""
        w13, w2 = layer.w13_weight, layer.w2_weight
        tensors = {key: getattr(layer, name) for key, name in self.tensors.items()}
        if self.quant == "fp8_tensor" and not layer.moe_runner_config.is_gated:
            tensors["w13_scale"] = tensors["w13_scale"].flatten()  # [E, 1] there, [E] here
        n_inter = w2.shape[2] if self.n_inter is None else self.n_inter
        return w13, w2, {"n_inter": n_inter, **tensors, **self.options}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, layer: Any, x: Any, topk_weights: Any, topk_ids: Any) -> Any:
        w13, w2, keywords = self.arguments(layer)
        dispatcher = layer.dispatcher
        if dispatcher.use_aiter_moe_runner and dispatcher.local_expert_mapping is not None:
            keywords["expert_map"] = dispatcher.local_expert_mapping  # ids are global then
        if x.is_cuda:  # from torch's allocator, so that a graph may be captured
            nbytes = moepad.workspace_nbytes(x, w13, w2, topk_weights, topk_ids, **keywords)
            keywords["workspace"] = torch.empty(nbytes, dtype=torch.uint8, device=x.device)
            keywords["out"] = torch.empty_like(x)
        out = moepad.fused_moe(x, w13, w2, topk_weights, topk_ids, **keywords)
        trace.ran(
            NAME,
            self.name,
            tp=(layer.moe_tp_rank, layer.moe_tp_size),
            n_inter=keywords["n_inter"],
            n_inter_pad=w2.shape[2],
            quant=self.quant,
            device=str(x.device),
        )
        return out


# ---- which layers


def _mode() -> str:
    mode = os.environ.get("MOEPAD_SGLANG", "auto")
    if mode not in MODES:
        raise ValueError(f"MOEPAD_SGLANG: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def _start(method: Any, layer: Any, sizes: Mapping[str, Any]) -> _Run:
    """The run of a layer about to be created; `_Refusal` where moepad does not take it."""
    if method is not layer.quant_method and method is not layer.scheme:
        raise _Refusal(f"{type(layer.quant_method).__name__} wraps its method")
    storage = _STORAGE.get(type(method).__name__)
    if storage is None:
        raise _Refusal(f"{type(method).__name__} has steps of its own")
    backend = get_moe_runner_backend()
    device = torch.empty(0).device.type  # where parameters are being made
    on_gpu = device == "cuda"
    if not on_gpu and device != "cpu":
        raise _Refusal(f"parameters on {device}")
    is_on = _mode() == "on"
    # The others load halves in another order, transpose, or keep expert ids global.
    if not (backend.is_auto() or backend.is_aiter() or (is_on and backend.is_triton())):
        raise _Refusal(f"--moe-runner-backend {backend.value} was asked for")
    n_inter = sizes["intermediate_size_per_partition"]
    if on_gpu and not is_on and n_inter % _ALIGNED == 0:
        raise _Refusal(f"{n_inter} needs no pad on a GPU; MOEPAD_SGLANG=on takes it")
    if not get_moe_a2a_backend().is_none():
        raise _Refusal(f"--moe-a2a-backend {get_moe_a2a_backend().value}")
    if get_lora().enable_lora or get_lora().lora_paths:
        raise _Refusal("LoRA")
    quant, block, tensors = storage(method)
    if sizes.get("with_bias"):
        tensors = {**tensors, "w13_bias": "w13_weight_bias", "w2_bias": "w2_weight_bias"}
    options = {"quant": quant, "block": block, **_options(layer.moe_runner_config, on_gpu)}
    return _Run(layer.layer_name or f"layer {layer.layer_id}", options, tensors)


def _options(config: Any, on_gpu: bool) -> dict[str, Any]:
    """Keywords of `fused_moe` that compute what SGLang's own runner does for this config."""
    for name in ("no_combine", "use_tp_all_gather_activation"):
        if getattr(config, name):
            raise _Refusal(name)
    options = _activation(config, on_gpu)
    options["apply_router_weight_on_input"] = config.apply_router_weight_on_input
    if on_gpu and torch.version.hip is None and config.routed_scaling_factor is not None:
        options["routed_scaling_factor"] = config.routed_scaling_factor  # else the model does it
    return options


def _activation(config: Any, on_gpu: bool) -> dict[str, Any]:
    name, limit = config.activation, config.gemm1_clamp_limit
    if not config.is_gated and name in ("silu", "gelu", "relu2"):
        return {"activation": name}
    if config.is_gated and name == "silu":
        if config.gemm1_alpha is not None and limit is not None:
            if config.gemm1_beta not in (None, 1.0):
                raise _Refusal(f"gemm1_beta={config.gemm1_beta}")
            return {
                "activation": "swigluoai",
                "swiglu_alpha": config.gemm1_alpha,
                "swiglu_limit": limit,
                "gate_up": "interleaved" if config.gate_up_interleaved else "concat",
            }
        if config.gemm1_alpha is None and limit is None:
            return {"activation": name, "swiglu_limit": config.swiglu_limit}
        raise _Refusal(f"gemm1_alpha={config.gemm1_alpha} with gemm1_clamp_limit={limit}")
    if config.is_gated and name in ("gelu", "gelu_tanh"):
        # SGLang's "gelu" is the tanh form on CPUs and the erf form on GPUs.
        return {"activation": name if on_gpu else "gelu_tanh"}
    raise _Refusal(f"activation {name}, {'' if config.is_gated else 'not '}gated")


# How a method stores weights: quantisation kind, block, keyword of `fused_moe` to attribute.
_Storage = tuple[str, tuple[int, int], dict[str, str]]


def _unquantised(method: Any) -> _Storage:
    return "none", _ONE, {}


def _fp8(method: Any) -> _Storage:
    if method.is_fp4_expert:
        raise _Refusal("fp4 experts")
    if not method.quant_config.is_checkpoint_fp8_serialized:
        raise _Refusal("weights that SGLang quantises after loading")
    if torch.version.hip is not None and get_bool_env_var("SGLANG_INT4_WEIGHT"):
        raise _Refusal("SGLANG_INT4_WEIGHT")
    if not method.block_quant:
        return "fp8_tensor", _ONE, _scales("weight_scale")
    kind = "mxfp8" if method.use_mxfp8 else "fp8_block"
    return kind, _pair(method.weight_block_size), _scales("weight_scale_inv")


def _compressed_fp8(method: Any) -> _Storage:
    strategy = method.weight_quant.strategy
    strategy = getattr(strategy, "value", strategy)  # pydantic keeps enums as they were given
    block = _pair(method.weight_block_size) if method.block_quant else _ONE
    return f"fp8_{strategy}", block, _scales("weight_scale")


_ONE = (1, 1)


def _pair(block: Sequence[int]) -> tuple[int, int]:
    rows, columns = block
    return rows, columns


def _scales(name: str) -> dict[str, str]:
    return {"w13_scale": f"w13_{name}", "w2_scale": f"w2_{name}"}


_STORAGE: dict[str, Callable[[Any], _Storage]] = {
    "UnquantizedFusedMoEMethod": _unquantised,
    "Fp8MoEMethod": _fp8,
    "CompressedTensorsW8A8Fp8MoE": _compressed_fp8,
}


# ---- parameters


def _create_weights(original: Function, method: Any, layer: Any, **sizes: Any) -> None:
    try:
        run = _start(method, layer, sizes)
        _create_parameters(original, method, layer, run, sizes)
        _probe(run, layer)
    except _Refusal as refusal:
        trace.refused(NAME, layer.layer_name or f"layer {layer.layer_id}", str(refusal))
        original(method, layer=layer, **sizes)
    else:
        layer.moepad = run


def _create_parameters(
    original: Function, method: Any, layer: Any, run: _Run, sizes: Mapping[str, Any]
) -> None:
    """SGLang's own parameters, or the plan's where SGLang refuses a size that cuts a block."""
    rows, columns = run.options["block"]
    n_inter = sizes["intermediate_size_per_partition"]
    whole_blocks = n_inter % rows == 0 and (layer.moe_tp_size == 1 or n_inter % columns == 0)
    if run.quant == "fp8_block" and not whole_blocks and not _pads_blocks(method, rows, columns):
        _create_planned(layer, run, sizes)
    else:
        loader = _counting_loader(layer, run, sizes["weight_loader"])
        original(method, layer=layer, **{**sizes, "weight_loader": loader})


def _pads_blocks(method: Any, rows: int, columns: int) -> bool:
    """SGLang itself pads this method's block-scaled weights: with AITER, to 128."""
    uses_aiter = torch.version.hip is not None and get_bool_env_var("SGLANG_USE_AITER")
    return uses_aiter and rows == columns == _ALIGNED and type(method).__name__ == "Fp8MoEMethod"


def _counting_loader(layer: Any, run: _Run, load: Function) -> Function:
    """`load`, which is SGLang's, and a note of how many columns it gives this rank."""

    def weight_loader(
        param: Any, loaded_weight: Any, weight_name: str, shard_id: str, *args: Any, **kwargs: Any
    ) -> None:
        load(param, loaded_weight, weight_name, shard_id, *args, **kwargs)
        if param is layer.w2_weight:
            n_inter = _columns_of_rank(layer, loaded_weight.shape[-1])
            run.n_inter = max(n_inter, run.n_inter or 0)

    return weight_loader


def _columns_of_rank(layer: Any, n_loaded: int) -> int:
    """How many of a checkpoint tensor's columns SGLang's loader copies on this rank."""
    n_pad: int = layer.w2_weight.shape[2]
    if layer.use_presharded_weights:
        return n_loaded
    rank: int = layer.moe_tp_rank
    n_rank: int = layer.moe_tp_size
    if layer.use_padded_loading:  # rank r begins at r times the padded size
        return min(n_pad, max(0, n_loaded - rank * n_pad))
    return n_loaded // n_rank


def _create_planned(layer: Any, run: _Run, sizes: Mapping[str, Any]) -> None:
    """Block-scaled parameters of any size: equal shares of 32 columns, scales of blocks touched."""
    if sizes.get("with_bias"):
        raise _Refusal("biases with a size that cuts a scale block")
    plan = moepad.plan(
        sizes["hidden_size"],
        sizes["moe_intermediate_size"],
        sizes["num_experts"],
        gated=layer.moe_runner_config.is_gated,
        quant="fp8_block",
        block=run.options["block"],
        tp_size=layer.moe_tp_size,
        tp_rank=layer.moe_tp_rank,
    )
    assert plan.w13_scale_shape is not None and plan.w2_scale_shape is not None
    shapes = {
        "w13_weight": (plan.w13_shape, torch.float8_e4m3fn),
        "w2_weight": (plan.w2_shape, torch.float8_e4m3fn),
        run.tensors["w13_scale"]: (plan.w13_scale_shape, torch.float32),
        run.tensors["w2_scale"]: (plan.w2_scale_shape, torch.float32),
    }
    loader = _planned_loader(layer, plan, sizes["weight_loader"])
    for name, (shape, dtype) in shapes.items():
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        layer.register_parameter(name, parameter)
        set_weight_attrs(parameter, {"weight_loader": loader, "quant_method": "block"})
    layer.w13_input_scale = layer.w2_input_scale = None
    layer.use_presharded_weights = True  # what the loader is handed is this rank's already
    run.n_inter = plan.n_inter
    run.options["scale_phase"] = plan.scale_phase


def _planned_loader(layer: Any, plan: moepad.Plan, load: Function) -> Function:
    """SGLang's `load` for this rank's part of each tensor, as `plan` cuts it."""
    assert plan.w13_scale_shape is not None and plan.w2_scale_shape is not None
    n_half = 2 if plan.gated else 1
    w13_blocks = (plan.w13_scale_start, plan.w13_scale_shape[-2] // n_half)
    w2_blocks = (plan.w2_scale_start, plan.w2_scale_shape[-1])

    def weight_loader(
        param: Any, loaded_weight: Any, weight_name: str, shard_id: str, *args: Any, **kwargs: Any
    ) -> None:
        if shard_id not in ("w1", "w2", "w3"):
            raise ValueError(
                f"shard_id: expected w1, w2 or w3, got {shard_id!r} for {weight_name}: with gate "
                "and up in one tensor the intermediate size must be of whole scale blocks"
            )
        axis = 1 if shard_id == "w2" else 0
        if param is layer.w13_weight or param is layer.w2_weight:
            start, size = plan.start, plan.n_inter
        else:
            start, size = w2_blocks if shard_id == "w2" else w13_blocks
        part = loaded_weight.narrow(axis, start, size)
        load(param, part, weight_name, shard_id, *args, **kwargs)

    return weight_loader


def _probe(run: _Run, layer: Any) -> None:
    """Runs the layer on a token without experts, which reads no weight, so as to fail now or never.

    Device images are found or compiled here, before memory is measured and graphs are captured.
    """
    config = layer.moe_runner_config
    w13, w2, keywords = run.arguments(layer)
    on_device = {"device": w13.device}
    dtype = w13.dtype if run.quant == "none" else config.params_dtype
    x = torch.zeros((1, layer.hidden_size), dtype=dtype, **on_device)
    ids = torch.full((1, config.top_k or 1), -1, dtype=torch.int32, **on_device)
    weights = torch.zeros(ids.shape, dtype=torch.float32, **on_device)
    try:
        moepad.fused_moe(x, w13, w2, weights, ids, **keywords)
    except (moepad.UnsupportedError, moepad.DeviceError, ValueError) as error:
        raise _Refusal(str(error)) from error


# ---- hooks


def _process_weights(original: Function, method: Any, layer: Any) -> None:
    if not _is_ours(layer):
        original(method, layer)


def _apply(original: Function, method: Any, layer: Any, dispatch_output: Any) -> Any:
    if not _is_ours(layer):
        return original(method, layer, dispatch_output)
    topk = dispatch_output.topk_output
    if TopKOutputChecker.format_is_bypassed(topk):
        topk = topk.to_standard()
    out = layer.moepad(layer, dispatch_output.hidden_states, topk.topk_weights, topk.topk_ids)
    return StandardCombineInput(hidden_states=out)


def _is_ours(layer: Any) -> bool:
    return "moepad" in layer.__dict__


def _check_sizes(original: Function, *, model_config: Any, **ranks: int) -> None:
    """SGLang's check of block-scaled sizes, without the rule that blocks stay whole."""
    try:
        original(model_config=model_config, **ranks)
    except ValueError:
        n_inter = model_config.hf_text_config.moe_intermediate_size
        n_rank = ranks["tp_size"] // ranks["moe_ep_size"] // ranks["moe_dp_size"]
        if ranks["tp_size"] % ranks["moe_ep_size"] or n_inter % n_rank:
            raise
        _log.info("%s: %d columns over %d ranks cut scale blocks", NAME, n_inter, n_rank)


def _aiter_unsupported_reason(original: Function, method: Any, layer: Any) -> str | None:
    """Sizes AITER has no kernel for are no reason against it where moepad runs the layer."""
    return None if _is_ours(layer) else original(method, layer)


_AITER_CALL = inspect.signature(aiter.fused_moe)


def _aiter_fused_moe(original: Function, *args: Any, **kwargs: Any) -> Any:
    """AITER's function as its runner calls it: experts of any method, shuffled by SGLang."""
    try:
        return _run_as_aiter(*args, **kwargs)
    except (_Refusal, moepad.UnsupportedError) as refusal:
        trace.refused(NAME, AITER, str(refusal))
        return original(*args, **kwargs)


def _run_as_aiter(*args: Any, **kwargs: Any) -> Any:
    if _mode() != "on":
        raise _Refusal("AITER keeps what is shuffled for it; MOEPAD_SGLANG=on takes it")
    if unknown := kwargs.keys() - _AITER_CALL.parameters.keys():
        raise _Refusal(f"argument {', '.join(sorted(unknown))}")
    arguments = _AITER_CALL.bind(*args, **kwargs).arguments
    w1 = arguments["w1"]
    # The mark of shuffled weights is lost where SGLang wraps them; without one all are.
    if not hasattr(w1, "is_shuffled"):
        is_interleaved = arguments.get("gate_mode") == aiter.GateMode.INTERLEAVE
        arguments["layout"] = "shuffle_gate_up" if is_interleaved else "shuffle_16x16"
    out = aiter.fused_moe(**arguments)
    n_inter_pad = arguments["w2"].shape[2] * arguments["w2"].element_size() // w1.element_size()
    trace.ran(
        NAME,
        AITER,
        n_inter=n_inter_pad - arguments.get("intermediate_pad", 0),
        n_inter_pad=n_inter_pad,
        quant=getattr(arguments.get("quant_type"), "name", "No"),
        device=str(out.device),
    )
    return out


def _initialise_flags(original: Function) -> None:
    """--moe-runner-backend moepad: for SGLang "auto", for the layers of this process "on"."""
    original()
    flags = get_flags().moe
    for name in ("runner_backend", "speculative_runner_backend"):
        if getattr(flags, name).value == NAME_OF_BACKEND:
            setattr(flags, name, MoeRunnerBackend.AUTO)
            os.environ["MOEPAD_SGLANG"] = "on"


_LAYERS = "sglang.srt.layers.quantization"
_COMPRESSED = f"{_LAYERS}.compressed_tensors.schemes.compressed_tensors_w8a8_fp8_moe"
_STEPS: dict[str, Function] = {
    "create_weights": _create_weights,
    "process_weights_after_loading": _process_weights,
}
_METHODS = {
    f"{_LAYERS}.unquant.UnquantizedFusedMoEMethod": _STEPS | {"apply": _apply},
    f"{_LAYERS}.fp8.Fp8MoEMethod": _STEPS | {"apply": _apply},
    f"{_COMPRESSED}.CompressedTensorsW8A8Fp8MoE": _STEPS | {"apply_weights": _apply},
}

# Dotted name of every function of SGLang that is hooked: the hook around it.
HOOKS: dict[str, Function] = {
    f"{method}.{step}": hook for method, steps in _METHODS.items() for step, hook in steps.items()
} | {
    f"{_LAYERS}.unquant.UnquantizedFusedMoEMethod._aiter_ck_moe_unsupported_reason": (
        _aiter_unsupported_reason
    ),
    "sglang.srt.model_executor.model_runner_components.moe_ep_setup"
    ".check_quantized_moe_compatibility": _check_sizes,
    "sglang.srt.layers.moe.utils.initialize_moe_config": _initialise_flags,
}


def register() -> None:
    """The plugin: hooks everything in `HOOKS`, unless MOEPAD_SGLANG is ``off``."""
    if _mode() == "off":
        return
    add_moe_runner_backend_choices([NAME_OF_BACKEND])
    register_moe_runner_backend_name(NAME_OF_BACKEND)
    for target, hook in HOOKS.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    if torch.version.hip is not None and find_spec("aiter") is not None:
        HookRegistry.register(AITER, _aiter_fused_moe, HookType.AROUND)
