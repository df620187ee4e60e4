"""Other implementations of the fused MoE layer, each as a function from weights to timed calls.

Everything framework-specific of the benchmark is here. A peer is looked for by name and imported
by its worker process only; each computes a gated SiLU layer on its framework's tensors, which share
the memory of the arrays it is given.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["PEERS", "Attach", "Bind", "Call", "Tokens", "as_float", "installed"]

Array = NDArray[Any]


class Tokens(NamedTuple):
    hidden: Array  # [M, H]
    weights: Array  # [M, k] f32
    ids: Array  # [M, k] i32


Call = Callable[[], Any]  # runs once, returns [M, H]
Bind = Callable[[Tokens], Call]
Attach = Callable[..., Bind]  # w13 [E, 2*I, H], w2 [E, H, I]


def _tensors(torch: Any, *arrays: Array) -> list[Any]:
    return [
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype.name == "bfloat16"
        else torch.from_numpy(array)
        for array in arrays
    ]


def _torch_loop(torch: Any) -> Attach:
    """A loop over the experts hit, as eager model code has it."""
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu

    def attach(w13_array: Array, w2_array: Array) -> Bind:
        w13, w2 = _tensors(torch, w13_array, w2_array)

        def bind(tokens: Tokens) -> Call:
            x, weights, ids = _tensors(torch, *tokens)

            def call() -> Any:
                out = torch.zeros_like(x)
                for e in torch.unique(ids).tolist():
                    token, slot = torch.where(ids == e)
                    gate, up = linear(x[token], w13[e]).chunk(2, dim=-1)
                    y = linear(silu(gate) * up, w2[e]) * weights[token, slot, None]
                    out.index_add_(0, token, y.to(out.dtype))
                return out

            return call

        return bind

    return attach


def _torch_grouped(torch: Any) -> Attach:
    """Slots sorted by expert, and torch's grouped product."""
    silu = torch.nn.functional.silu

    def attach(w13_array: Array, w2_array: Array) -> Bind:
        w13, w2 = (w.transpose(1, 2) for w in _tensors(torch, w13_array, w2_array))

        def bind(tokens: Tokens) -> Call:
            x, weights, ids = _tensors(torch, *tokens)
            n_topk = ids.shape[1]

            def call() -> Any:
                expert, order = torch.sort(ids.flatten())
                ends = torch.bincount(expert, minlength=len(w13)).cumsum(0).to(torch.int32)
                rows = x[order // n_topk]
                gate, up = torch._grouped_mm(rows, w13, offs=ends).chunk(2, dim=-1)
                y = torch._grouped_mm(silu(gate) * up, w2, offs=ends)
                y = y * weights.flatten()[order, None]
                slots = torch.empty_like(y).index_copy_(0, order, y)
                return slots.view(len(x), n_topk, -1).sum(1).to(x.dtype)

            return call

        return bind

    return attach


def _transformers(torch: Any) -> Attach:
    """transformers' experts module with its grouped_mm implementation."""
    package = "transformers.models.qwen3_moe"
    configs: Any = importlib.import_module(f"{package}.configuration_qwen3_moe")
    modeling: Any = importlib.import_module(f"{package}.modeling_qwen3_moe")

    def attach(w13_array: Array, w2_array: Array) -> Bind:
        w13, w2 = _tensors(torch, w13_array, w2_array)
        config = configs.Qwen3MoeConfig(
            hidden_size=w2.shape[1], moe_intermediate_size=w2.shape[2], num_experts=len(w2)
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            experts = modeling.Qwen3MoeExperts(config)
        experts.gate_up_proj = torch.nn.Parameter(w13, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(w2, requires_grad=False)

        def bind(tokens: Tokens) -> Call:
            x, weights, ids = _tensors(torch, *tokens)
            ids = ids.long()
            return lambda: experts(x, ids, weights)

        return bind

    return attach


def _zentorch(torch: Any) -> Attach:
    """AMD's plug-in. Rewrites the weights in place on its first call."""
    importlib.import_module("zentorch")
    fused_moe = torch.ops.zentorch.zentorch_fused_moe

    def attach(w13_array: Array, w2_array: Array) -> Bind:
        w13, w2 = _tensors(torch, w13_array, w2_array)

        def bind(tokens: Tokens) -> Call:
            x, weights, ids = _tensors(torch, *tokens)
            out = torch.empty_like(x)

            def call() -> Any:
                fused_moe(out, x, w13, w2, None, None, weights, ids, False, "silu")
                return out

            return call

        return bind

    return attach


# Name: what must be installed, and what makes it out of the module torch.
PEERS: dict[str, tuple[tuple[str, ...], Callable[[Any], Attach]]] = {
    "torch-loop": (("torch",), _torch_loop),
    "torch-grouped": (("torch",), _torch_grouped),
    "transformers": (("torch", "transformers"), _transformers),
    "zentorch": (("torch", "zentorch"), _zentorch),
}


def installed() -> list[str]:
    """The names in `PEERS` whose packages are there; imports none of them."""
    return [
        name
        for name, (packages, _) in PEERS.items()
        if all(importlib.util.find_spec(package) for package in packages)
    ]


def attach(name: str, n_thread: int) -> Attach:
    """Imports a peer and sets its number of threads."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(n_thread)
    torch.set_grad_enabled(False)
    return PEERS[name][1](torch)


def as_float(result: Any) -> NDArray[np.float64]:
    """A result of any peer as an array."""
    array: Array = result if isinstance(result, np.ndarray) else result.float().numpy()
    return array.astype(np.float64)
