"""torch operators `moepad::fused_moe` and `moepad::fused_moe_out`, registered by importing this.

`torch.ops.moepad.fused_moe` takes the arguments of `moepad.fused_moe` and is what a compiler sees:
it has a schema, shapes without values, and no Python inside. Without a compiler it is the same C
function behind torch's dispatcher. Forward only.
"""

from __future__ import annotations

from typing import Any

import torch

from moepad import _core
from moepad.relayout import LAYOUTS, Layout

__all__ = ["fused_moe", "fused_moe_out"]

Tensor = torch.Tensor

_ARGUMENTS = """
    Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, *,
    SymInt? n_inter=None, SymInt? n_hidden=None, str activation="silu", str gate_up="concat",
    str quant="none", Tensor? w13_scale=None, Tensor? w2_scale=None, SymInt[2] block=[128, 128],
    SymInt scale_phase=0, str quant_activations="none", Tensor? x_scale=None,
    Tensor? h_scale=None, Tensor? w13_bias=None, Tensor? w2_bias=None, float swiglu_alpha=1.702,
    float? swiglu_limit=None, Tensor? expert_map=None, Tensor? n_token=None,
    bool apply_router_weight_on_input=False, float routed_scaling_factor=1.0, str layout="plain"
"""
_SCHEMAS = {
    "fused_moe": f"({_ARGUMENTS}) -> Tensor",
    "fused_moe_out": f"({_ARGUMENTS}, Tensor(a!) out, Tensor(b!)? workspace=None, "
    "int? stream=None) -> ()",
}
# Where the C function takes tensors; torch calls AMD's GPUs CUDA as well.
_DEVICES = ("CPU", "CUDA")


def _run(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    block: list[int] | None = None,
    layout: str = "plain",
    **options: Any,
) -> Tensor:
    """The operator on tensors with values; torch leaves out what has its default value."""
    if block is not None:
        options["block"] = tuple(block)
    if layout != "plain":
        w13, w2, options["w13_scale"], options["w2_scale"] = _known(layout).plain(
            options.get("quant", "none"),
            w13,
            w2,
            options.get("w13_scale"),
            options.get("w2_scale"),
        )
    out: Tensor = _core.fused_moe(hidden_states, w13, w2, topk_weights, topk_ids, **options)
    return out


def _run_out(*tensors: Tensor, **options: Any) -> None:
    _run(*tensors, **options)


def _known(layout: str) -> Layout:
    if layout not in LAYOUTS:
        known = ", ".join(f'"{name}"' for name in ("plain", *LAYOUTS))
        raise ValueError(f'layout: expected one of {known}, got "{layout}"')
    return LAYOUTS[layout]


def _check_fake(**tensors: Tensor | None) -> None:
    """What a call without values can be refused for: devices, and gradients it would cut."""
    hidden = tensors["hidden_states"]
    assert hidden is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != hidden.device and name != "n_token":
            raise ValueError(
                f"{name}: expected memory of {hidden.device}, where hidden_states is, got "
                f"{tensor.device}; move it"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name}: requires grad, but moepad is forward only; use torch.no_grad(), or pass "
                f"{name}.detach()"
            )


def _fake(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    **options: Any,
) -> Tensor:
    """The operator on tensors without values."""
    named = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    _check_fake(
        hidden_states=hidden_states,
        w13=w13,
        w2=w2,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        **named,
    )
    return torch.empty_like(hidden_states)


def _fake_out(*tensors: Tensor, **options: Any) -> None:
    _fake(*tensors, **options)


_torch_library: Any = torch.library  # untyped in part
_library = _torch_library.Library("moepad", "DEF")
for _name, _function, _fake_function in (
    ("fused_moe", _run, _fake),
    ("fused_moe_out", _run_out, _fake_out),
):
    _library.define(_name + _SCHEMAS[_name])
    for _device in _DEVICES:
        _library.impl(_name, _function, _device)
    _torch_library.register_fake(f"moepad::{_name}", _fake_function, lib=_library)

fused_moe = torch.ops.moepad.fused_moe
fused_moe_out = torch.ops.moepad.fused_moe_out
