"""Weights that are stored in another order than row-major: the orders, and plain copies of them.

The engines read rows of w13 and w2 along k, contiguous, and scales row by row. `Layout.plain`
gives such tensors of what is stored in any order of `LAYOUTS`; each copy is computed once and kept
as long as its original is in memory and unchanged. Needs torch; knows nothing of what runs the
result.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

__all__ = [
    "LAYOUTS",
    "Layout",
    "forget",
    "from_gate_up",
    "from_panels",
    "from_swizzle",
    "from_swizzle_gate_up",
    "plain",
    "to_gate_up",
    "to_panels",
    "to_swizzle",
    "to_swizzle_gate_up",
]

Tensor = torch.Tensor

PIECE = 16  # bytes of k that stay together in AITER's layouts
PANEL = 16  # rows
GROUP = 32  # elements of k that share an e8m0 scale


# --- Weights -------------------------------------------------------------------------------------


def _pieces(weight: Tensor, n_row: int, n_byte: int) -> tuple[Tensor, int]:
    """The bytes of `weight`, [..., N, K], and how many pieces a row has, if it cuts into such."""
    raw = weight.contiguous().view(torch.uint8)
    n, n_bytes = raw.shape[-2:]
    if n % n_row or n_bytes % n_byte:
        raise ValueError(
            f"weight: expected rows in multiples of {n_row} and {n_byte} bytes of k each, got "
            f"{n} rows of {n_bytes} bytes (shape {tuple(weight.shape)}, {weight.dtype}); pad it "
            "first, per half"
        )
    return raw, n_bytes // n_byte


def to_panels(weight: Tensor, n_row: int = PANEL, n_byte: int = PIECE) -> Tensor:
    """Row-major to panels of rows, each cut along k into pieces that lie row after row.

    Parameters
    ----------
    weight : tensor, [..., N, K]
        K counts stored elements: two 4-bit values are one.
    n_row : int
        Rows of a panel.
    n_byte : int
        Bytes of a piece.

    Returns
    -------
    tensor, of the shape and dtype of `weight`
        Byte b of row n is at (n div n_row, b div n_byte, n mod n_row, b mod n_byte).
    """
    raw, n_piece = _pieces(weight, n_row, n_byte)
    cut = raw.reshape(*raw.shape[:-2], -1, n_row, n_piece, n_byte).transpose(-3, -2)
    return cut.reshape(raw.shape).view(weight.dtype)


def from_panels(weight: Tensor, n_row: int = PANEL, n_byte: int = PIECE) -> Tensor:
    """The inverse of `to_panels`."""
    raw, n_piece = _pieces(weight, n_row, n_byte)
    cut = raw.reshape(*raw.shape[:-2], -1, n_piece, n_row, n_byte).transpose(-3, -2)
    return cut.reshape(raw.shape).view(weight.dtype)


def _check_halves(weight: Tensor) -> None:
    if weight.shape[-2] % (2 * PANEL):
        raise ValueError(
            f"weight: expected rows in multiples of {2 * PANEL}, panels of gate and up in turns, "
            f"got shape {tuple(weight.shape)}; pad it first, per half"
        )


def to_gate_up(weight: Tensor) -> Tensor:
    """Row-major halves, [..., 2*Ip, K], to panels of gate and of up in turns."""
    _check_halves(weight)
    panels = to_panels(weight)
    halves = panels.reshape(*panels.shape[:-2], 2, -1, PANEL, panels.shape[-1])
    return halves.transpose(-4, -3).reshape(panels.shape)


def from_gate_up(weight: Tensor) -> Tensor:
    """The inverse of `to_gate_up`."""
    _check_halves(weight)
    rows = from_panels(weight)
    turns = rows.reshape(*rows.shape[:-2], -1, 2, PANEL, rows.shape[-1])
    return turns.transpose(-4, -3).reshape(rows.shape)


def _transposed(weight: Tensor) -> Tensor:
    return weight.transpose(-2, -1).contiguous()


def _same(tensor: Tensor, *sizes: int) -> Tensor:
    return tensor


def _pack(values: Tensor) -> Tensor:
    """4-bit numbers, one to a byte, [..., K], as moepad's int4_group has them."""
    offset = (values ^ 8) & 15  # two's complement to value + 8
    return offset[..., ::2] | offset[..., 1::2] << 4


def _nibbles(weight: Tensor) -> tuple[Tensor, Tensor]:
    raw = weight.contiguous().view(torch.uint8)
    return raw & 15, raw >> 4


def _from_int4(weight: Tensor) -> Tensor:
    """AITER's int4 for 16-bit activations: of 8 values, byte i holds values i and i + 4."""
    low, high = (each.reshape(*each.shape[:-1], -1, 4) for each in _nibbles(weight))
    return _pack(from_panels(torch.cat([low, high], -1).flatten(-2)))


def _from_int4_words(weight: Tensor) -> Tensor:
    """AITER's int4 for 8-bit activations: a word holds values 0, 2, 4, 6, 1, 3, 5, 7."""
    low, high = _nibbles(weight)
    stored = torch.stack([low, high], -1).reshape(*weight.shape[:-1], -1, 8)
    values = torch.stack([stored[..., :4], stored[..., 4:]], -1).flatten(-3)
    return _pack(from_panels(values, n_byte=2 * PIECE))


# --- Scales --------------------------------------------------------------------------------------


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def to_swizzle(scale: Tensor) -> Tensor:
    """e8m0 scales, [rows, K/32], to AITER's order; rows padded to 256 and columns to 8, with 1.0.

    Returns
    -------
    tensor, [up(rows, 256), up(K/32, 8)]
        (r, c) is at (r div 32, c div 8, c mod 4, r mod 16, c mod 8 div 4, r mod 32 div 16).
    """
    n_row, n_column = scale.shape
    raw = scale.view(torch.uint8)
    grid = raw.new_full((_up(n_row, 256), _up(n_column, 8)), 0x7F)
    grid[:n_row, :n_column] = raw
    cut = grid.reshape(len(grid) // 32, 2, 16, -1, 2, 4).permute(0, 3, 5, 2, 4, 1)
    return cut.reshape(grid.shape).view(scale.dtype)


def from_swizzle(scale: Tensor, n_expert: int, n_row: int, n_column: int) -> Tensor:
    """The inverse of `to_swizzle` on all experts' rows, as [E, rows, K/32] without the padding."""
    n_column_pad = _up(n_column, 8)
    n_row_pad = scale.numel() // n_column_pad
    if scale.numel() % (32 * n_column_pad) or n_row_pad < n_expert * n_row:
        raise ValueError(
            f"scale: expected {n_expert} * {n_row} rows, up to a multiple of 32, of {n_column_pad} "
            f"columns, got shape {tuple(scale.shape)}; or is it plain? then say so by layout="
        )
    raw = scale.contiguous().view(torch.uint8)
    cut = raw.reshape(n_row_pad // 32, n_column_pad // 8, 4, 16, 2, 2).permute(0, 5, 3, 1, 4, 2)
    rows = cut.reshape(n_row_pad, n_column_pad)[: n_expert * n_row, :n_column]
    return rows.reshape(n_expert, n_row, n_column).contiguous()


def to_swizzle_gate_up(scale: Tensor) -> Tensor:
    """e8m0 scales of w13, [E, 2*Ip, K/32], to AITER's order for `to_gate_up`; columns padded to 8.

    Returns
    -------
    tensor, [E, 2*Ip, up(K/32, 8)]
        Row n of half g is at (n div 16, c div 8, c mod 4, n mod 16, c mod 8 div 4, g).
    """
    _check_halves(scale)
    n_expert, n_row, n_column = scale.shape
    raw = scale.view(torch.uint8)
    grid = raw.new_full((n_expert, n_row, _up(n_column, 8)), 0x7F)
    grid[..., :n_column] = raw
    cut = grid.reshape(n_expert, 2, n_row // 32, 16, -1, 2, 4).permute(0, 2, 4, 6, 3, 5, 1)
    return cut.reshape(grid.shape).view(scale.dtype)


def from_swizzle_gate_up(scale: Tensor, n_expert: int, n_row: int, n_column: int) -> Tensor:
    """The inverse of `to_swizzle_gate_up`, without the padding."""
    n_column_pad = _up(n_column, 8)
    if n_row % 32 or scale.numel() != n_expert * n_row * n_column_pad:
        raise ValueError(
            f"scale: expected {n_expert} * {n_row} * {n_column_pad} elements, gate and up in "
            f"panels of 16 rows, got shape {tuple(scale.shape)}"
        )
    raw = scale.contiguous().view(torch.uint8)
    cut = raw.reshape(n_expert, n_row // 32, -1, 4, 16, 2, 2).permute(0, 6, 1, 4, 2, 5, 3)
    return cut.reshape(n_expert, n_row, n_column_pad)[..., :n_column].contiguous()


def _from_int4_groups(scale: Tensor, n_expert: int, n_row: int, n_column: int) -> Tensor:
    """Scales of groups, [E, G, N] or two groups together, [E, G/2, N, 2], to [E, N, G]."""
    if scale.numel() != n_expert * n_row * n_column or scale.dim() not in (3, 4):
        raise ValueError(
            f"scale: expected shape ({n_expert}, {n_column}, {n_row}) or ({n_expert}, "
            f"{n_column // 2}, {n_row}, 2), got {tuple(scale.shape)}"
        )
    if scale.dim() == 4:
        scale = scale.transpose(2, 3)
    return scale.reshape(n_expert, n_column, n_row).transpose(1, 2).contiguous()


# --- Layouts -------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How w13, w2 and the scales that belong to them are made plain.

    Functions of scales also get the experts, rows and columns there are without padding. They
    matter for e8m0 scales and those of groups: others are stored plain in every layout.
    """

    w13: Callable[[Tensor], Tensor]
    w2: Callable[[Tensor], Tensor]
    w13_scale: Callable[..., Tensor] = from_swizzle
    w2_scale: Callable[..., Tensor] = from_swizzle

    def plain(
        self, quant: str, w13: Tensor, w2: Tensor, w13_scale: Tensor | None, w2_scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Row-major tensors of tensors in this layout."""
        plain13, plain2 = plain(w13, self.w13), plain(w2, self.w2)
        if quant in ("mxfp4", "mxfp8", "int4_group"):
            n_pack = 1 if quant == "mxfp8" else 2
            if w13_scale is not None:
                w13_scale = plain(w13_scale, self.w13_scale, *_groups(plain13, n_pack))
            if w2_scale is not None:
                w2_scale = plain(w2_scale, self.w2_scale, *_groups(plain2, n_pack))
        return plain13, plain2, w13_scale, w2_scale


def _groups(weight: Tensor, n_pack: int) -> tuple[int, int, int]:
    n_expert, n_row, n_column = weight.shape
    return n_expert, n_row, -(-n_column * n_pack // GROUP)


_from_panels_32 = functools.partial(from_panels, n_row=32)

LAYOUTS = {
    # w13 [E, H, R], w2 [E, Ip, H]: what x @ w takes.
    "transposed": Layout(_transposed, _transposed, _same, _same),
    # AITER's shuffle_weight with layout=(16, 16) or (32, 16): gate panels before up panels.
    "shuffle_16x16": Layout(from_panels, from_panels),
    "shuffle_32x16": Layout(_from_panels_32, _from_panels_32),
    # AITER's shuffle_weight with is_guinterleave=True: panels of gate and of up in turns.
    "shuffle_gate_up": Layout(from_gate_up, from_panels, from_swizzle_gate_up, from_swizzle),
    # Row-major weights beside e8m0 scales in AITER's order.
    "shuffle_scales": Layout(_same, _same),
    # AITER's int4, for 16-bit and for 8-bit activations.
    "shuffle_int4": Layout(_from_int4, _from_int4, _from_int4_groups, _from_int4_groups),
    "shuffle_int4_words": Layout(_from_int4_words, _from_int4_words, _same, _same),
}


# --- Copies --------------------------------------------------------------------------------------


class _Copy(NamedTuple):
    version: int
    sample: Tensor | None
    plain: Tensor


# By storage, place in it, shape, strides and type, and what made the copy.
_copies: dict[tuple[Any, ...], _Copy] = {}


def plain(tensor: Tensor, make: Callable[..., Tensor], *sizes: int) -> Tensor:
    """`make(tensor, *sizes)`, kept while the memory of `tensor` lives and is unchanged.

    A change is seen by torch's version counter, which every in-place operation raises, and, for
    what goes past it (`tensor.data.copy_`, writes through NumPy, tensors made in inference mode),
    by comparing some elements of every expert. The latter would make a GPU wait, and is left out
    there.

    Parameters
    ----------
    tensor : tensor
        The first dimension is of experts.
    make : function
        One that is not made anew for each call, such as those of `LAYOUTS`.
    *sizes : int

    Returns
    -------
    tensor
        Not to be written to.
    """
    if make is _same:
        return tensor
    storage = tensor.untyped_storage()
    place = (
        *(storage._cdata, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype),
        *(make, sizes),
    )
    version = -1 if tensor.is_inference() else tensor._version
    found = _copies.get(place)
    if found is None:
        weakref.finalize(storage, _copies.pop, place, None).atexit = False
    elif found.version == version and (
        found.sample is None or torch.equal(found.sample, _sample(tensor))
    ):
        return found.plain
    with torch.no_grad():
        sample = _sample(tensor).clone() if tensor.device.type == "cpu" else None
        made = _Copy(version, sample, make(tensor.detach(), *sizes))
    _copies[place] = made
    return made.plain


def _sample(tensor: Tensor) -> Tensor:
    """Some elements as integers: of matrices eight or more along each diagonal, else a thousand."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    values = tensor.detach().view(integer)
    if values.dim() > 2:
        diagonal = values.diagonal(dim1=1, dim2=2)
        return diagonal[..., :: max(1, diagonal.shape[-1] // 8)]
    return values.flatten()[:: max(1, values.numel() // 1024)]


def forget() -> None:
    """Drop all copies: after writes that nothing tells of."""
    _copies.clear()
