"""AITER's `fused_moe`, argument for argument, over moepad's: a drop-in where AITER has no kernel.

Every argument is honoured or refused by name. Weights may be shuffled as AITER wants them; they are
put back into row-major order once, and kept so. `install` serves this module as `aiter`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import sys
from enum import Enum, IntEnum
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch

import moepad.torch  # registers the operator
from moepad._core import UnsupportedError
from moepad.relayout import (
    PANEL,
    PIECE,
    from_gate_up,
    from_panels,
    from_swizzle,
    from_swizzle_gate_up,
    to_gate_up,
    to_panels,
    to_swizzle,
    to_swizzle_gate_up,
)

__all__ = [
    "ActivationType",
    "GateMode",
    "QuantType",
    "e8m0_shuffle",
    "e8m0_unshuffle",
    "fused_moe",
    "install",
    "shuffle_scale_a16w4",
    "shuffle_weight",
    "shuffle_weight_a16w4",
    "unshuffle_scale_a16w4",
    "unshuffle_weight",
]

Tensor = torch.Tensor

_fused_moe = moepad.torch.fused_moe


class ActivationType(IntEnum):
    """AITER's numbers."""

    No = -1
    Silu = 0
    Gelu = 1
    Swiglu = 2
    Situv2 = 3


class QuantType(IntEnum):
    """AITER's numbers."""

    No = 0
    per_Tensor = 1
    per_Token = 2
    per_1x32 = 3
    per_1x128 = 4
    per_128x128 = 5
    per_256x128 = 6
    per_1024x128 = 7


class GateMode(str, Enum):
    """AITER's names."""

    SEPARATED = "separated"
    MOCK_GATE_ONLY = "mock_gate_only"
    GATE_ONLY = "gate_only"
    INTERLEAVE = "interleave"


_E = TypeVar("_E", bound=IntEnum)
_ACTIVATIONS = {
    ActivationType.Silu: "silu",
    ActivationType.Gelu: "gelu",
    ActivationType.Swiglu: "swigluoai",
}
_SWIGLU_LIMIT = 7.0  # AITER's, where the caller names none
_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)
_MXFP4 = (torch.uint8, torch.float4_e2m1fn_x2)
_INT4 = (torch.uint8, torch.int8)


def fused_moe(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    expert_mask: Tensor | None = None,
    activation: Any = ActivationType.Silu,
    quant_type: Any = QuantType.No,
    doweight_stage1: bool = False,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    block_size_M: int | None = None,
    num_local_tokens: Tensor | None = None,
    moe_sorting_dispatch_policy: int = 0,
    dtype: torch.dtype | None = None,
    hidden_pad: int = 0,
    intermediate_pad: int = 0,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    splitk: int = 0,
    swiglu_limit: float | None = None,
    beta: float | None = None,
    linear_beta: float | None = None,
    gate_mode: Any = "separated",
    shared_w1: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_w1_scale: Tensor | None = None,
    shared_w2_scale: Tensor | None = None,
    shared_expert_id: int = -1,
    stage2_scatter: Any = None,
    *,
    layout: str | None = None,
) -> Tensor:
    """The layer as `aiter.fused_moe.fused_moe` computes it, at the cost of its true size.

    Activations are quantised where a static scale of them is given, and only there, so a result is
    closer to the exact one than AITER's where that quantises them by itself. M = 0 and ids of -1
    are allowed.

    Parameters
    ----------
    hidden_states : tensor, [M, D]
        bfloat16, float16 or float32.
    w1 : tensor, [E, 2*I, D] or [E, I, D]
        Gate rows, then up rows; packed types have fewer columns.
    w2 : tensor, [E, D, I]
    topk_weight, topk_ids : tensor, [M, k]
    expert_mask : tensor, [G] or [G + 1], optional
        1 for the experts held here, in order, 0 for others: slots of those add nothing.
    activation, quant_type : enum or int
        AITER's own enums or those of this module: by name if it has one, else by value.
    doweight_stage1 : bool
        Multiply the routed weight in before the activation. Not with `bias1`.
    w1_scale, w2_scale : tensor, optional
        As AITER takes them, e8m0 scales swizzled.
    a1_scale, a2_scale : tensor of one float32, optional
        Static scales of `hidden_states` and of the intermediate, with fp8 and int8 weights of
        per_Tensor and per_Token; the one left out is made of each row. Not on a GPU.
    beta, linear_beta, shared_*, stage2_scatter
        Refused unless they have their defaults.
    block_size_M, moe_sorting_dispatch_policy, splitk
        How AITER divides its work; there is nothing they could change here.
    num_local_tokens : tensor of one int, optional
        Rows that count; later rows of the result are zero.
    dtype : torch.dtype, optional
        That of `hidden_states`.
    hidden_pad, intermediate_pad : int
        How many of D and of I are pad, in elements. Pads are never read, whatever they hold.
    bias1, bias2 : tensor, [E, 2*I] and [E, D], optional
    swiglu_limit : float, optional
        None and 0: 7.0 for Swiglu, no limit otherwise.
    gate_mode : str
        "separated", or "interleave" for weights shuffled with gate and up in turns.
    layout : str, optional
        Not AITER's: how the weights and e8m0 scales are stored, a name of
        `moepad.relayout.LAYOUTS`, or "plain" for both row-major. Default: weights are shuffled if
        the attribute `is_shuffled` of one of them says so, e8m0 scales and int4 weights always.
        The attribute is lost where a tensor is wrapped, moved or cloned, which nothing shows:
        pass `layout` then.

    Returns
    -------
    tensor, [M, D]
        Pads of D are zero.

    Raises
    ------
    UnsupportedError
        An argument asks for what no kernel here does; it is named.
    TypeError, ValueError
        As for `moepad.fused_moe`.
    """
    refused = {
        "beta": beta,
        "linear_beta": linear_beta,
        "shared_w1": shared_w1,
        "shared_w2": shared_w2,
        "shared_w1_scale": shared_w1_scale,
        "shared_w2_scale": shared_w2_scale,
        "shared_expert_id": None if shared_expert_id == -1 else shared_expert_id,
        "stage2_scatter": stage2_scatter,
    }
    for name, value in refused.items():
        if value is not None:
            raise UnsupportedError(f"{name}: {_WHY[name]}, got {_shown(value)}")
    if dtype is not None and dtype != hidden_states.dtype:
        raise UnsupportedError(
            f"dtype: no kernel whose result has another type than hidden_states, "
            f"{hidden_states.dtype}, got {dtype}; convert hidden_states or the result"
        )
    if doweight_stage1 and bias1 is not None:
        raise UnsupportedError(
            "bias1: no kernel that weights the biased sums; with doweight_stage1 moepad weights "
            "them before the bias; pass bias1=None or doweight_stage1=False"
        )
    act = _activation(activation)
    weights = _weights(_enum(quant_type, QuantType, "quant_type"), w1, w2, w1_scale, w2_scale)
    n_inter_pad = weights.w2.shape[2] * weights.n_pack
    n_hidden_pad = hidden_states.shape[-1]
    if w2.shape[1] != n_hidden_pad:
        raise ValueError(
            f"w2: expected shape (E, {n_hidden_pad}, I) for the width of hidden_states, got "
            f"{tuple(w2.shape)}"
        )
    limit = swiglu_limit or (_SWIGLU_LIMIT if act == "swigluoai" else None)
    out: Tensor = _fused_moe(
        hidden_states,
        weights.w1,
        weights.w2,
        topk_weight,
        topk_ids,
        n_inter=_without_pad("intermediate_pad", intermediate_pad, n_inter_pad),
        n_hidden=_without_pad("hidden_pad", hidden_pad, n_hidden_pad),
        activation=act,
        quant=weights.quant,
        w13_scale=weights.w1_scale,
        w2_scale=weights.w2_scale,
        block=weights.block,
        **_inputs(weights.quant, a1_scale, a2_scale),
        w13_bias=bias1,
        w2_bias=bias2,
        swiglu_limit=limit,
        expert_map=None if expert_mask is None else _expert_map(expert_mask),
        n_token=num_local_tokens,
        apply_router_weight_on_input=bool(doweight_stage1),
        layout=_layout(layout, gate_mode, weights, w1, w2),
    )
    return out


_NO_SHARED = "no kernel for shared experts; run them apart from the routed ones"
_WHY = {
    "beta": "no kernel for Situv2, which alone has it; pass None",
    "linear_beta": "no kernel for Situv2, which alone has it; pass None",
    "shared_w1": _NO_SHARED,
    "shared_w2": _NO_SHARED,
    "shared_w1_scale": _NO_SHARED,
    "shared_w2_scale": _NO_SHARED,
    "shared_expert_id": _NO_SHARED,
    "stage2_scatter": "no kernel moves results between devices; pass None",
}


def _shown(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _enum(value: Any, kind: type[_E], argument: str) -> _E:
    """A member of any enum with AITER's names or numbers, or a number."""
    name = getattr(value, "name", None)
    if isinstance(name, str):
        if name in kind.__members__:
            return kind[name]
    else:
        try:
            return kind(int(value))
        except (TypeError, ValueError):
            pass
    known = ", ".join(f"{member.name} ({member.value})" for member in kind)
    raise ValueError(f"{argument}: expected one of {known}, got {value!r}")


def _activation(value: Any) -> str:
    activation = _enum(value, ActivationType, "activation")
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation: no kernel for {activation.name}; considered: "
            + ", ".join(member.name for member in _ACTIVATIONS)
        )
    return _ACTIVATIONS[activation]


def _inputs(quant: str, a1_scale: Tensor | None, a2_scale: Tensor | None) -> dict[str, Any]:
    """The options that static scales of activations stand for."""
    given = {"a1_scale": a1_scale, "a2_scale": a2_scale}
    is_known = quant in ("fp8_tensor", "fp8_channel", "int8_channel")
    for name, scale in given.items():
        if scale is not None and not (is_known and scale.numel() == 1):
            raise UnsupportedError(
                f"{name}: no kernel for scales of activations but one for all rows, with fp8 or "
                f"int8 weights of per_Tensor or per_Token, got {_shown(scale)}; pass None to use "
                "activations as they are"
            )
    if a1_scale is None and a2_scale is None:
        return {}
    return {
        "quant_activations": "int8" if quant == "int8_channel" else "fp8",
        "x_scale": None if a1_scale is None else a1_scale.reshape(1),
        "h_scale": None if a2_scale is None else a2_scale.reshape(1),
    }


def _without_pad(argument: str, pad: int, size: int) -> int:
    if not 0 <= pad <= size:
        raise ValueError(f"{argument}: expected 0 to {size}, elements of the tensors, got {pad}")
    return size - pad


def _expert_map(mask: Tensor) -> Tensor:
    """AITER's mask of the experts held here as their local ids, -1 for others."""
    if mask.dim() != 1:
        raise ValueError(f"expert_mask: expected 1 dimension (G,), got shape {tuple(mask.shape)}")
    if (
        mask.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not ((mask == 0) | (mask == 1)).all()
    ):
        raise ValueError(
            "expert_mask: expected 0 and 1, got other values; it is no map of ids: pass "
            "(expert_map >= 0).to(torch.int32), or call moepad.fused_moe(expert_map=...)"
        )
    held = mask != 0
    return torch.where(held, torch.cumsum(held, 0) - 1, -1).to(torch.int32)


# --- Weights -------------------------------------------------------------------------------------


class _Weights(NamedTuple):
    """Weights and scales as moepad has them, but for the order of their elements."""

    quant: str
    w1: Tensor
    w2: Tensor
    w1_scale: Tensor | None
    w2_scale: Tensor | None
    n_pack: int = 1
    block: tuple[int, int] = (128, 128)


def _weights(
    quant: QuantType, w1: Tensor, w2: Tensor, w1_scale: Tensor | None, w2_scale: Tensor | None
) -> _Weights:
    if w1.dim() != 3 or w2.dim() != 3:
        raise ValueError(
            f"w1: expected 3 dimensions, (E, rows, D), and (E, D, I) of w2, got "
            f"{tuple(w1.shape)} and {tuple(w2.shape)}"
        )
    if quant is QuantType.No:
        for name, scale in (("w1_scale", w1_scale), ("w2_scale", w2_scale)):
            if scale is not None:
                raise ValueError(
                    f"{name}: expected None for quant_type No, got {_shown(scale)}; name the "
                    "quant_type that it belongs to"
                )
        return _Weights("none", w1, w2, None, None)
    if w1_scale is None or w2_scale is None:
        missing = "w1_scale" if w1_scale is None else "w2_scale"
        raise ValueError(f"{missing}: quant_type {quant.name} needs a tensor, got None")
    if w1.dtype != w2.dtype:
        raise TypeError(f"w2: expected dtype {w1.dtype}, that of w1, got {w2.dtype}")
    is_fp8 = w1.dtype in _FP8
    if quant is QuantType.per_Tensor and is_fp8:
        shapes: Any = (w1.shape[:1], w2.shape[:1])
        return _Weights("fp8_tensor", w1, w2, *_reshaped(w1_scale, w2_scale, shapes))
    if quant is QuantType.per_Token and (is_fp8 or w1.dtype == torch.int8):
        kind = "fp8_channel" if is_fp8 else "int8_channel"
        shapes = (w1.shape[:2], w2.shape[:2])
        return _Weights(kind, w1, w2, *_reshaped(w1_scale, w2_scale, shapes))
    if quant is QuantType.per_Token and w1.dtype in (torch.uint32, torch.int32):
        w1, w2 = w1.view(torch.uint8), w2.view(torch.uint8)
        rows = _reshaped(w1_scale, w2_scale, (w1.shape[:2], w2.shape[:2]))
        return _Weights("int4_group", w1, w2, *_one_group(rows, w1, w2), 2, (1, 128))
    if quant in (QuantType.per_1x128, QuantType.per_128x128) and is_fp8:
        shapes = _block_shapes(w1, w2, w1_scale)
        return _Weights("fp8_block", w1, w2, *_reshaped(w1_scale, w2_scale, shapes))
    if quant is QuantType.per_1x32:
        is_mx = w1_scale.dtype in _E8M0 and w2_scale.dtype in _E8M0
        if is_mx and is_fp8:
            return _Weights("mxfp8", w1, w2, w1_scale, w2_scale)
        if w1.dtype in (_MXFP4 if is_mx else _INT4):
            kind, block = ("mxfp4", (128, 128)) if is_mx else ("int4_group", (1, 32))
            w1, w2 = w1.view(torch.uint8), w2.view(torch.uint8)
            return _Weights(kind, w1, w2, w1_scale, w2_scale, 2, block)
    raise UnsupportedError(
        f"quant_type: no kernel for {quant.name} with weights of {w1.dtype} and scales of "
        f"{w1_scale.dtype}; considered: per_Tensor (fp8), per_Token (fp8, int8, int4 in uint32), "
        "per_1x128 and per_128x128 (fp8), per_1x32 (mxfp4, mxfp8, int4)"
    )


def _reshaped(w1_scale: Tensor, w2_scale: Tensor, shapes: Any) -> tuple[Tensor, Tensor]:
    """Scales in moepad's shapes; AITER takes them with dimensions of 1, or flattened."""
    for name, scale, shape in zip(
        ("w1_scale", "w2_scale"), (w1_scale, w2_scale), shapes, strict=True
    ):
        if scale.numel() != math.prod(shape):
            raise ValueError(
                f"{name}: expected the elements of shape {tuple(shape)}, got {tuple(scale.shape)}"
            )
    return w1_scale.reshape(shapes[0]), w2_scale.reshape(shapes[1])


def _one_group(rows: tuple[Tensor, Tensor], w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """A scale a row, as one for each of its groups of 128."""
    n1, n2 = (-(-w.shape[2] * 2 // 128) for w in (w1, w2))
    return rows[0][..., None].repeat(1, 1, n1), rows[1][..., None].repeat(1, 1, n2)


def _block_shapes(w1: Tensor, w2: Tensor, w1_scale: Tensor) -> Any:
    """Shapes of the scales of 128x128 blocks, those of w1 per half."""
    n_expert, n_row, n_hidden = w1.shape
    n_inter = w2.shape[2]
    k_blocks, i_blocks = -(-n_hidden // 128), -(-n_inter // 128)
    n_half = 2 if n_row != n_inter else 1
    across = -(-n_half * n_inter // 128)  # rows of blocks, were the halves one
    is_per_half = w1_scale.numel() == n_expert * n_half * i_blocks * k_blocks
    if n_inter % 128 and n_half == 2 and (across == 2 * i_blocks or not is_per_half):
        raise UnsupportedError(
            f"w1_scale: no kernel for blocks of 128 rows that lie across gate and up, as they "
            f"may with I = {n_inter}; pad I to a multiple of 128 per half, with scales per half, "
            "and say so by intermediate_pad; or call moepad.fused_moe, where they are per half"
        )
    return (
        (n_expert, n_half * i_blocks, k_blocks),
        (n_expert, -(-w2.shape[1] // 128), i_blocks),
    )


def _layout(layout: str | None, gate_mode: Any, weights: _Weights, w1: Tensor, w2: Tensor) -> str:
    mode = getattr(gate_mode, "value", gate_mode)
    if mode not in ("separated", "interleave"):
        raise UnsupportedError(
            f"gate_mode: no kernel for {mode!r}; considered: 'separated', 'interleave'"
        )
    if layout is not None:
        return layout
    if weights.quant == "int4_group":
        return "shuffle_int4" if weights.block == (1, 32) else "shuffle_int4_words"
    is_shuffled = any(getattr(w, "is_shuffled", False) for w in (w1, w2))
    if mode == "interleave":
        if not is_shuffled:
            raise ValueError(
                "gate_mode: 'interleave' is of shuffled weights, and neither w1 nor w2 has the "
                "attribute is_shuffled; if they are and it was lost, pass "
                "layout='shuffle_gate_up'"
            )
        return "shuffle_gate_up"
    if is_shuffled:
        return "shuffle_16x16"
    return "shuffle_scales" if weights.quant in ("mxfp4", "mxfp8") else "plain"


# --- AITER's helpers -----------------------------------------------------------------------------


def _reorder(
    x: Tensor,
    is_back: bool,
    layout: tuple[int, int],
    use_int4: bool,
    is_guinterleave: bool,
    gate_up: bool,
) -> Tensor:
    if layout[1] != PIECE or (gate_up and layout[0] != PANEL):
        raise UnsupportedError(
            f"layout: no such order for {layout}; considered: (rows, 16), and (16, 16) with gate_up"
        )
    raw = x.view(torch.uint8) if x.dtype == torch.float4_e2m1fn_x2 else x
    if is_guinterleave and gate_up:
        made = (from_gate_up if is_back else to_gate_up)(raw)
    else:
        n_byte = 2 * PIECE if use_int4 else PIECE
        made = (from_panels if is_back else to_panels)(raw, layout[0], n_byte)
    return made.view(x.dtype)


def shuffle_weight(
    x: Tensor,
    layout: tuple[int, int] = (16, 16),
    use_int4: bool = False,
    is_guinterleave: bool = False,
    gate_up: bool = False,
) -> Tensor:
    """Weights in the order AITER's kernels read, bit for bit as `aiter.ops.shuffle` makes them.

    Parameters
    ----------
    x : tensor, [..., N, K]
    layout : (int, int)
        Rows of a panel, and 16.
    use_int4 : bool
        `x` has a 4-bit value in each byte.
    is_guinterleave, gate_up : bool
        Both: panels of gate rows and of up rows in turns.

    Returns
    -------
    tensor
        With the attribute `is_shuffled`, which says so to `fused_moe`, and is lost in copies.
    """
    made: Any = _reorder(x, False, layout, use_int4, is_guinterleave, gate_up)
    made.is_shuffled = True
    if is_guinterleave and gate_up:
        made.is_guinterleave = True
    result: Tensor = made
    return result


def unshuffle_weight(
    x: Tensor,
    layout: tuple[int, int] = (16, 16),
    use_int4: bool = False,
    is_guinterleave: bool = False,
    gate_up: bool = False,
) -> Tensor:
    """The inverse of `shuffle_weight` with the same arguments."""
    return _reorder(x, True, layout, use_int4, is_guinterleave, gate_up)


def shuffle_weight_a16w4(src: Tensor, NLane: int, gate_up: bool) -> Tensor:
    """`shuffle_weight(src, (NLane, 16), is_guinterleave=True, gate_up=gate_up)`."""
    return shuffle_weight(src, (NLane, PIECE), is_guinterleave=True, gate_up=gate_up)


def e8m0_shuffle(scale: Tensor) -> Tensor:
    """e8m0 scales, [rows, K/32], in AITER's order, padded to 256 rows and 8 columns with 1.0."""
    return to_swizzle(scale)


def e8m0_unshuffle(scale: Tensor, n_row: int, n_column: int) -> Tensor:
    """The inverse of `e8m0_shuffle`: [n_row, n_column]."""
    return from_swizzle(scale, 1, n_row, n_column)[0].view(scale.dtype)


def shuffle_scale_a16w4(src: Tensor, experts_cnt: int, gate_up: bool) -> Tensor:
    """e8m0 scales, [E * rows, K/32], in the order that goes with `shuffle_weight_a16w4`."""
    if not gate_up:
        return to_swizzle(src)[: len(src)]
    return to_swizzle_gate_up(src.reshape(experts_cnt, -1, src.shape[-1])).flatten(0, 1)


def unshuffle_scale_a16w4(
    src: Tensor, experts_cnt: int, gate_up: bool, n_row: int, n_column: int
) -> Tensor:
    """The inverse of `shuffle_scale_a16w4`: [E * n_row, n_column]."""
    back = from_swizzle_gate_up if gate_up else from_swizzle
    return back(src, experts_cnt, n_row, n_column).flatten(0, 1).view(src.dtype)


# --- As the module aiter -------------------------------------------------------------------------

_SERVED = {
    "": ("ActivationType", "QuantType", "GateMode"),
    "fused_moe": ("fused_moe", "ActivationType", "QuantType", "GateMode"),
    "ops": (),
    "ops.enum": ("ActivationType", "QuantType", "GateMode"),
    "ops.shuffle": ("shuffle_weight", "shuffle_weight_a16w4", "shuffle_scale_a16w4"),
    "utility": (),
    "utility.fp4_utils": ("e8m0_shuffle",),
}


def install(replace: bool = False) -> bool:
    """Let `import aiter` find this module.

    Parameters
    ----------
    replace : bool
        Where AITER itself is installed: put `fused_moe` of this module in the place of its own.
        The rest of AITER stays.

    Returns
    -------
    bool
        Whether `aiter.fused_moe.fused_moe` is now this module's. False: AITER is installed, and
        `replace` was not asked for.
    """
    here = sys.modules[__name__]
    present = sys.modules.get("aiter")
    if getattr(present, "_served_by", None) is here:
        return True
    if present is not None or importlib.util.find_spec("aiter") is not None:
        if replace:
            module: Any = importlib.import_module("aiter.fused_moe")
            module.fused_moe = fused_moe
        return replace
    for path, names in _SERVED.items():
        full = f"aiter.{path}".rstrip(".")
        served: Any = ModuleType(full, "Served by moepad.aiter.")
        is_package = any(other.startswith(path and f"{path}.") and other for other in _SERVED)
        served.__spec__ = importlib.machinery.ModuleSpec(full, None, is_package=is_package)
        if is_package:
            served.__path__ = []
        served._served_by = here
        for name in names:
            setattr(served, name, getattr(here, name))
        sys.modules[full] = served
        parent, _, child = full.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, served)
    return True
