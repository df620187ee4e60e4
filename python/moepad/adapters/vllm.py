"""vLLM's plugin: its unquantised and fp8 MoE layers run by moepad.

vLLM finds `register` through the entry point group ``vllm.general_plugins`` and calls it in every
process. It puts `MoepadMethod` in the place of vLLM's unquantised method, and by way of
`MoepadFp8Config`, vLLM's fp8 config otherwise, `MoepadFp8Method` in that of its fp8 method. For
each layer they either stay what they are or take `MoepadExperts` as their kernel;
`moepad.adapters.trace` says why not. Weights are then neither rounded up, shuffled nor copied, so
that vLLM's loader can write them again at any time.

MOEPAD_VLLM is ``off``, ``on`` (every layer moepad can run) or ``auto``, the default: on CPUs every
layer, on GPUs those whose intermediate size is no multiple of 128; and none where
``--moe-backend`` names another kernel.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from vllm.model_executor.layers.quantization.utils.w8a8_utils import normalize_e4m3fn_to_e4m3fnuz
from vllm.model_executor.utils import is_weights_pre_processed
from vllm.platforms import current_platform

import moepad
from moepad.adapters import trace

__all__ = ["MoepadExperts", "MoepadFp8Config", "MoepadFp8Method", "MoepadMethod", "register"]

NAME = "vllm"
MODES = ("auto", "on", "off")
_ALIGNED = 128  # what vLLM's GPU kernels want the intermediate size to be a multiple of

Shape = tuple[int, ...]

# Activations as keywords of `fused_moe`; the clamped ones have numbers of the layer besides.
_ACTIVATIONS: dict[Any, dict[str, Any]] = {
    MoEActivation.SILU: {"activation": "silu"},
    MoEActivation.GELU: {"activation": "gelu"},
    MoEActivation.GELU_TANH: {"activation": "gelu_tanh"},
    MoEActivation.SWIGLUOAI: {
        "activation": "swigluoai",
        "swiglu_limit": 7.0,
        "gate_up": "interleaved",
    },
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: {"activation": "swigluoai"},
    MoEActivation.SILU_NO_MUL: {"activation": "silu"},
    MoEActivation.GELU_NO_MUL: {"activation": "gelu"},
    MoEActivation.RELU2_NO_MUL: {"activation": "relu2"},
}


class MoepadExperts(mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """The experts step of vLLM's modular kernel: tokens and routing in, their weighted sums out."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        self._nbytes = functools.cache(self._workspace_nbytes)
        self._layer_name = f"{moe_config.num_experts} experts"

    def process_weights_after_loading(self, layer: Any) -> None:
        self._layer_name = layer.layer_name

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True  # `_refusal` asks the engine

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation in _ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_all2all_kernels

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True  # a token's sums have one order, whatever else is in the batch

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[Shape, Shape, Shape]:
        """None of the first, whose memory vLLM lets the output share; `fused_moe`'s; the output."""
        dtype = self.moe_config.in_dtype
        nbytes = self._nbytes(M, N, K, topk, local_num_experts, activation)
        return (0,), (-(-nbytes // dtype.itemsize),), (M, K)

    def _workspace_nbytes(
        self, n_token: int, n_row: int, n_hidden: int, n_topk: int, n_expert: int, activation: Any
    ) -> int:
        """Of `fused_moe` for these sizes, which needs tensors of them but none of their memory."""
        device = torch.device(self.moe_config.device)
        if device.type == "cpu":
            return 0  # the engine keeps its own

        def of(shape: Shape, dtype: Any) -> Any:
            return torch.empty(shape[-1], dtype=dtype, device=device).expand(shape)

        dtype, n_pad = self.moe_config.in_dtype, self.adjust_N_for_activation(n_row, activation)
        return moepad.workspace_nbytes(
            of((n_token, n_hidden), dtype),
            of((n_expert, n_row, n_hidden), self.weight_quant_dtype or dtype),
            of((n_expert, n_hidden, n_pad), self.weight_quant_dtype or dtype),
            of((n_token, n_topk), torch.float32),
            of((n_token, n_topk), torch.int32),
            **self._options(activation),
        )

    def _options(self, activation: Any) -> dict[str, Any]:
        """Keywords of `fused_moe` that are the layer's, not a call's."""
        options = dict(_ACTIVATIONS[activation])
        if activation is MoEActivation.SILU:
            options["swiglu_limit"] = self.activation_config.clamp_limit
        if activation is MoEActivation.SWIGLUOAI_UNINTERLEAVE:
            options["swiglu_alpha"] = self.activation_config.alpha
            options["swiglu_limit"] = self.activation_config.clamp_limit
        options["quant"] = self._quant
        if self.block_shape is not None:
            options["block"] = tuple(self.block_shape)
        if self._quant != "none":
            options["w13_scale"], options["w2_scale"] = self.w1_scale, self.w2_scale
        return options

    @property
    def _quant(self) -> str:
        """The kind of `fused_moe`."""
        if self.w1_scale is None:
            return "none"
        return "fp8_tensor" if self.block_shape is None else "fp8_block"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apply(
        self,
        output: Any,
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_weights: Any,
        topk_ids: Any,
        activation: Any,
        global_num_experts: int,
        expert_map: Any,
        a1q_scale: Any,
        a2_scale: Any,
        workspace13: Any,
        workspace2: Any,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        n_inter = self.moe_config.intermediate_size_per_partition_unpadded
        moepad.fused_moe(
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            n_inter=n_inter,
            w13_bias=self.w1_bias,
            w2_bias=self.w2_bias,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            out=output,
            workspace=workspace2.view(torch.uint8) if workspace2.numel() else None,
            **self._options(activation),
        )
        parallel = self.moe_config.moe_parallel_config
        trace.ran(
            NAME,
            self._layer_name,
            tp=(parallel.tp_rank, parallel.tp_size),
            n_inter=n_inter,
            n_inter_pad=w2.shape[2],
            quant=self._quant,
            device=str(hidden_states.device),
        )


class MoepadMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """vLLM's method, with moepad's kernel for the layers moepad takes."""

    def __init__(self, moe: Any) -> None:
        refusal = _refusal(moe)
        if refusal is None:
            # Without vLLM's own search for a kernel, which fails where there is none.
            super(UnquantizedFusedMoEMethod, self).__init__(moe)
            self.experts_cls = MoepadExperts
            # Whose weights are row-major, of the true size, and left as they were loaded.
            self.unquantized_backend = UnquantizedMoeBackend.TRITON
            self.supports_pre_processed_weights = True
        else:
            super().__init__(moe)
        self._refusal = refusal

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        if self._refusal is not None:
            trace.refused(NAME, layer.layer_name, self._refusal)
        super().create_weights(layer, *args, **kwargs)


class MoepadFp8Method(Fp8MoEMethod):  # type: ignore[misc]
    """vLLM's fp8 method, with moepad's kernel for the layers moepad takes."""

    def __init__(self, quant_config: Any, layer: Any) -> None:
        super().__init__(quant_config, layer)
        refusal = _refusal(self.moe)
        if refusal is None:
            self.experts_cls = MoepadExperts
            # Whose weights and scales are row-major, and left as they were loaded.
            self.fp8_backend = Fp8MoeBackend.TRITON
        else:
            trace.refused(NAME, layer.layer_name, refusal)

    def process_weights_after_loading(self, layer: Any) -> None:
        """vLLM's own, but where a tensor has one scale: as they are, without activations' scales.

        vLLM rounds w1 and w3 again, to one scale for both, which its kernels need.
        """
        is_ours = self.experts_cls is MoepadExperts
        if not is_ours or self.block_quant or is_weights_pre_processed():
            super().process_weights_after_loading(layer)
            return
        w13, w13_scale = layer.w13_weight, layer.w13_weight_scale
        w2, w2_scale = layer.w2_weight, layer.w2_weight_scale
        layer.w13_input_scale = layer.w2_input_scale = None
        if current_platform.is_fp8_fnuz():
            w13, w13_scale, _ = normalize_e4m3fn_to_e4m3fnuz(w13, w13_scale)
            w2, w2_scale, _ = normalize_e4m3fn_to_e4m3fnuz(w2, w2_scale)
        if not self.moe.is_act_and_mul:
            w13_scale = w13_scale.flatten()
        self._setup_kernel(layer, w13, w2, w13_scale, w2_scale, None, None)


class MoepadFp8Config(Fp8Config):  # type: ignore[misc]
    """vLLM's fp8 config, with `MoepadFp8Method` for MoE layers."""

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        method = super().get_quant_method(layer, prefix)
        return MoepadFp8Method(self, layer) if type(method) is Fp8MoEMethod else method


def _mode() -> str:
    mode = os.environ.get("MOEPAD_VLLM", "auto")
    if mode not in MODES:
        raise ValueError(f"MOEPAD_VLLM: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def _refusal(moe: Any) -> str | None:
    """Why vLLM keeps the layer, if it does."""
    n_inter = moe.intermediate_size_per_partition
    device = torch.device(moe.device)
    if _mode() == "auto":
        if moe.moe_backend != "auto":
            return f"--moe-backend {moe.moe_backend} was asked for"
        if device.type != "cpu" and n_inter % _ALIGNED == 0:
            return f"{n_inter} needs no pad on a GPU; MOEPAD_VLLM=on takes it"
    if moe.tp_shard_with_padding:
        return "ranks that hold unequal shares of the columns"
    # vLLM's own list of what an experts class has to support, each named.
    standard = mk.FusedMoEActivationFormat.Standard
    is_supported, reason = MoepadExperts.is_supported_config(
        MoepadExperts, moe, None, None, standard
    )
    if not is_supported:
        return str(reason)
    if moe.activation is MoEActivation.SWIGLUOAI_UNINTERLEAVE and moe.swiglu_beta != 1.0:
        return f"swiglu_beta={moe.swiglu_beta}"
    return _engine_refusal(moe, device)


def _engine_refusal(moe: Any, device: torch.device) -> str | None:
    """The engine's own reason, from a call on one token without experts.

    Device images are found or compiled here, before memory is measured and graphs are captured.
    """
    n_half = 2 if moe.activation.is_gated else 1
    n_inter = moe.intermediate_size_per_partition

    def of(*shape: int, dtype: Any = moe.in_dtype) -> Any:
        return torch.zeros(shape, dtype=dtype, device=device)

    tensors = (
        of(1, moe.hidden_dim),
        of(1, n_half * n_inter, moe.hidden_dim),
        of(1, moe.hidden_dim, n_inter),
        of(1, moe.experts_per_token, dtype=torch.float32),
        of(1, moe.experts_per_token, dtype=torch.int32) - 1,
    )
    try:
        moepad.fused_moe(*tensors, **_ACTIVATIONS[moe.activation])
    except (moepad.UnsupportedError, moepad.DeviceError) as error:
        return str(error)
    return None


def register() -> None:
    """The plugin: registers methods and config, unless MOEPAD_VLLM is ``off``."""
    name = UnquantizedFusedMoEMethod.__name__
    if _mode() == "off" or op_registry_oot.get(name) is MoepadMethod:
        return
    if name in op_registry_oot:
        trace.refused(NAME, "every layer", f"{op_registry_oot[name].__name__} is registered")
        return
    UnquantizedFusedMoEMethod.register_oot(MoepadMethod)
    register_quantization_config("fp8")(MoepadFp8Config)
