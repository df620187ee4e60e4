"""moepad as an experts implementation of transformers, registered by importing this.

`model.set_experts_implementation("moepad")`, or `from_pretrained(...,
experts_implementation="moepad")`. What an experts module computes is found out by trying its own
gate function on numbers, so that a class of any name is run if its mathematics is known, and
refused if it is not.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moepad.torch  # registers the operator
from moepad._core import UnsupportedError
from moepad.adapters.trace import ran

__all__ = ["experts_forward", "prepare"]

Tensor = torch.Tensor
# activation, alpha, limit
Recipe = tuple[str, float, float | None]

_fused_moe = moepad.torch.fused_moe


def experts_forward(
    self: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls in place of an experts module's own forward.

    Parameters
    ----------
    self : module
        Of a class that `use_experts_implementation` decorates.
    hidden_states : tensor, [T, H]
    top_k_index : tensor, [T, K], int64
        In expert-parallel modules, ids from the number of experts on mean other ranks' experts.
    top_k_weights : tensor, [T, K]

    Returns
    -------
    tensor, [T, H], of the dtype of `hidden_states`

    Raises
    ------
    UnsupportedError
        The module computes what moepad has no kernel for; the message says what.
    TypeError
        Gradients are asked for.
    """
    module: Any = self
    is_traced = torch.compiler.is_compiling()
    activation, alpha, limit = _recipe_at(id(module)) if is_traced else _recipe(module)
    w13 = module.gate_up_proj if module.has_gate else module.up_proj
    w2 = module.down_proj
    w13_bias = w2_bias = None
    if module.has_bias:
        w13_bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        w2_bias = module.down_proj_bias
    _check_grad(hidden_states, top_k_weights, w13, w2, w13_bias, w2_bias)
    layout = "plain"
    if module.is_transposed:
        if w13.mT.is_contiguous() and w2.mT.is_contiguous():  # after `prepare`
            w13, w2 = w13.mT, w2.mT
        else:
            layout = "transposed"
    x = hidden_states
    if x.dtype != w13.dtype and torch.is_autocast_enabled(x.device.type):
        x = x.to(w13.dtype)
    if getattr(module, "_is_expert_parallel", True):  # before 5.23 every module may be
        top_k_index = torch.where(top_k_index < module.num_experts, top_k_index, -1)
    out: Tensor = _fused_moe(
        x.contiguous(),
        w13,
        w2,
        top_k_weights.contiguous(),
        top_k_index.contiguous(),
        activation=activation,
        gate_up="interleaved" if module.has_gate and not module.is_concatenated else "concat",
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        swiglu_alpha=alpha,
        swiglu_limit=limit,
        layout=layout,
    )
    return out.to(hidden_states.dtype)


def prepare(model: torch.nn.Module) -> int:
    """Store transposed expert weights (gpt-oss, Aria) so that they need no copy.

    Such weights are kept as [E, H, R], where moepad reads along H. Without this, each gets a
    second copy in the order moepad reads, made at its first use. This moves the elements of the
    parameters themselves instead: shapes and values stay, strides and addresses change. Call it
    before anything holds the addresses (graphs, optimizers, other processes).

    Parameters
    ----------
    model : module

    Returns
    -------
    int
        How many parameters were moved.
    """
    n_moved = 0
    for module in model.modules():
        if not getattr(module, "is_transposed", False):
            continue
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            weight = getattr(module, name, None)
            if weight is not None and not weight.mT.is_contiguous():
                weight.data = weight.data.mT.contiguous().mT
                n_moved += 1
    return n_moved


def _check_grad(*tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            raise TypeError(
                "experts_implementation: 'moepad' is forward only, but an input or parameter "
                "requires grad under grad mode; use torch.no_grad() or torch.inference_mode(), "
                "model.requires_grad_(False), or model.set_experts_implementation('grouped_mm') "
                "to train"
            )


# --- What a module computes ----------------------------------------------------------------------

_recipes: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, Recipe]] = (
    weakref.WeakKeyDictionary()
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _recipe_at(address: int) -> Recipe:
    """Of the module with this id: compilers before torch 2.13 take no module as a constant."""
    return _recipe(ctypes.cast(address, ctypes.py_object).value)


def _recipe(module: Any) -> Recipe:
    facts = (getattr(module, "act_fn", None), _alphas(module), _limits(module))
    known = _recipes.get(module)
    if known is None or known[0] != facts:
        known = _recipes[module] = (facts, _recognise(module))
        down = module.down_proj
        n_inter = down.shape[1 if module.is_transposed else 2]
        name = type(module).__name__
        ran("transformers", name, n_inter=n_inter, n_inter_pad=n_inter, device=down.device.type)
    return known[1]


def _numbers(module: Any, *names: str) -> list[float]:
    values = (getattr(module, name, None) for name in names)
    return [float(value) for value in values if value is not None]


def _alphas(module: Any) -> list[float]:
    return _numbers(module, "alpha", "swiglu_alpha")


def _limits(module: Any) -> list[float]:
    return _numbers(module, "limit", "swiglu_limit")


def _recognise(module: Any) -> Recipe:
    name = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):  # since 5.23
        raise UnsupportedError(
            f"{name}: no kernel for a norm after each expert (has_post_expert_norm); use "
            "model.set_experts_implementation('grouped_mm')"
        )
    candidates = list(_candidates(module))
    reach = 2 * max([6.0, *(limit for _, _, limit in candidates if limit is not None)])
    gate = torch.sinh(torch.linspace(-5, 5, 81, device="cpu")) * (reach / math.sinh(5))
    gate, up = (grid.flatten() for grid in torch.meshgrid(gate, gate[::8], indexing="ij"))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        if not module.has_gate:
            got = module.act_fn(gate)
        elif module.is_concatenated:
            got = module._apply_gate(torch.cat([gate, up])[None])[0]
        else:
            got = module._apply_gate(torch.stack([gate, up], -1).flatten()[None])[0]
    for candidate in candidates:
        expected = _activate(candidate, gate, up if module.has_gate else None)
        if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-5, atol=1e-5):
            return candidate
    tried = ", ".join(
        activation if limit is None else f"{activation} with limit {limit:g}"
        for activation, _, limit in candidates
    )
    what = "_apply_gate" if module.has_gate else "act_fn"
    raise UnsupportedError(
        f"{name}: no kernel for what its {what} computes ({getattr(module, 'act_fn', 'its own')}); "
        f"considered: {tried}; use model.set_experts_implementation('grouped_mm')"
    )


def _candidates(module: Any) -> Iterator[Recipe]:
    if not module.has_gate:
        yield from ((activation, 1.702, None) for activation in ("silu", "gelu", "relu2"))
        return
    for limit in (None, *sorted({limit for limit in _limits(module) if math.isfinite(limit)})):
        yield from ((activation, 1.702, limit) for activation in ("silu", "gelu", "gelu_tanh"))
        yield from (("swigluoai", alpha, limit) for alpha in sorted(set(_alphas(module))))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: torch.relu(x).square(),
}


def _activate(recipe: Recipe, gate: Tensor, up: Tensor | None) -> Tensor:
    """What `moepad.fused_moe` computes between its two products."""
    activation, alpha, limit = recipe
    if up is None:
        return _ACTIVATIONS[activation](gate)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swigluoai":
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    return _ACTIVATIONS[activation](gate) * up


ALL_EXPERTS_FUNCTIONS.register("moepad", experts_forward)
