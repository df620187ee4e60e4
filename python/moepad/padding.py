"""How large every tensor is: SGLang's two size helpers, and the plan of one rank's tensors.

The arithmetic is in csrc/plan.c and nowhere else; this file carries its result.

`get_moe_padding_size` and `get_moe_weight_sizes` return what SGLang's functions of those names
return, value for value, their traps included: with `is_aiter_moe` an ungated w13 (`is_concat`
false) keeps its unpadded rows beside a padded w2, or gets doubled rows when packed; an odd packed
size is floored, so that the last column is lost; and the environment variable SGLANG_MOE_PADDING
changes the first function but never the second. `plan` has none of these: it is the function to
ask for sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import SupportsIndex

from moepad import _core
from moepad._core import get_moe_padding_size, get_moe_weight_sizes

__all__ = ["Plan", "get_moe_padding_size", "get_moe_weight_sizes", "plan"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes, ranges and shapes of the expert tensors one rank holds; made by `plan`.

    Immutable and hashable; equal requests give equal plans. `print(plan)` shows it as a table.
    Ranges are half open. An empty rank has ``start == stop`` and zero-sized weights.

    Attributes
    ----------
    n_hidden : int
        Model width.
    n_inter, n_inter_pad : int
        Columns of the intermediate size held here, and what the tensors have room for.
    n_inter_global : int
        Intermediate size of the checkpoint.
    start, stop : int
        This rank's columns in the checkpoint.
    n_expert, n_expert_global : int
        Experts held here, and in the checkpoint.
    expert_start, expert_stop : int
        This rank's experts in the checkpoint.
    gated : bool
        w13 has a gate half and an up half: gate rows ``[0, n_inter)``, up rows
        ``[n_inter_pad, n_inter_pad + n_inter)``. Not gated: one half.
    bias : bool
        There are biases.
    quant : str
        How weights are stored.
    block : tuple of int
        Rows and columns that share a scale: as asked for ``fp8_block`` and ``int4_group``,
        ``(1, 32)`` for the mx kinds, ``(1, 1)`` for kinds without blocks.
    split : str
        The rule that cut the columns.
    align : int
        What `n_inter_pad` is a multiple of.
    tp_size, tp_rank, ep_size, ep_rank : int
        The ranks. A w2 bias belongs to one rank of a tensor-parallel group only (``tp_rank`` 0).
    w13_shape, w2_shape : tuple of int
        In stored elements: two logical ones per byte for the 4-bit kinds.
    w13_scale_shape, w2_scale_shape : tuple of int or None
        None for ``quant="none"``.
    w13_bias_shape, w2_bias_shape : tuple of int or None
        None without biases.
    storage_dtype, scale_dtype, bias_dtype : str
        Element types of weights, scales and biases.
    n_pack : int
        Logical elements in one stored element of a weight row: 2 for the 4-bit kinds, else 1.
    scale_phase : int
        ``fp8_block``: this rank's scales begin at checkpoint column ``start - scale_phase``, so
        that its column ``j`` has scale row ``(scale_phase + j) // block[0]`` in w13 and scale
        column ``(scale_phase + j) // block[1]`` in w2. 0 for every other kind.
    w13_scale_start, w2_scale_start : int
        Where this rank's scales begin in the checkpoint's: row of each half of w13's, column of
        w2's. Their number is in the shapes.
    nbytes, pad_nbytes : int
        Bytes of all tensors as allocated, and how many of them hold nothing of the checkpoint.
    """

    n_hidden: int
    n_inter: int
    n_inter_pad: int
    n_inter_global: int
    start: int
    stop: int
    n_expert: int
    n_expert_global: int
    expert_start: int
    expert_stop: int
    gated: bool
    bias: bool
    quant: str
    block: tuple[int, int]
    split: str
    align: int
    tp_size: int
    tp_rank: int
    ep_size: int
    ep_rank: int
    w13_shape: Shape
    w2_shape: Shape
    w13_scale_shape: Shape | None
    w2_scale_shape: Shape | None
    w13_bias_shape: Shape | None
    w2_bias_shape: Shape | None
    storage_dtype: str
    scale_dtype: str
    bias_dtype: str
    n_pack: int
    scale_phase: int
    w13_scale_start: int
    w2_scale_start: int
    nbytes: int
    pad_nbytes: int

    def __str__(self) -> str:
        blocks = "" if self.block == (1, 1) else f" {_product(self.block)}"
        experts = f"[{self.expert_start}, {self.expert_stop}) of {self.n_expert_global}"
        columns = f"[{self.start}, {self.stop}) of {self.n_inter_global}"
        padded = f"padded to {self.n_inter_pad} (align {self.align})"
        phase = f", scale phase {self.scale_phase}" if self.scale_phase else ""
        facts = [
            ("columns", f"{columns}: rank {self.tp_rank} of {self.tp_size}, split {self.split}"),
            ("n_inter", f"{self.n_inter}, {padded}{phase}"),
            ("experts", f"{experts}: rank {self.ep_rank} of {self.ep_size}"),
            ("quant", f"{self.quant}{blocks}, {'gated' if self.gated else 'not gated'}"),
        ]
        tensors = [
            ("w13", self.w13_shape, self.storage_dtype),
            ("w2", self.w2_shape, self.storage_dtype),
            ("w13_scale", self.w13_scale_shape, self.scale_dtype),
            ("w2_scale", self.w2_scale_shape, self.scale_dtype),
            ("w13_bias", self.w13_bias_shape, self.bias_dtype),
            ("w2_bias", self.w2_bias_shape, self.bias_dtype),
        ]
        facts += [(name, f"{_product(shape)} {dtype}") for name, shape, dtype in tensors if shape]
        facts += [("bytes", f"{self.nbytes:,}, of which pad {self.pad_nbytes:,}")]
        return "\n".join(f"{name:<10}{text}" for name, text in facts)


def plan(
    n_hidden: SupportsIndex,
    n_inter: SupportsIndex,
    n_expert: SupportsIndex,
    *,
    gated: bool = True,
    quant: str = "none",
    dtype: str = "bf16",
    block: tuple[SupportsIndex, SupportsIndex] = (128, 128),
    tp_size: SupportsIndex = 1,
    tp_rank: SupportsIndex = 0,
    ep_size: SupportsIndex = 1,
    ep_rank: SupportsIndex = 0,
    split: str = "true",
    align: SupportsIndex = 1,
    bias: bool = False,
) -> Plan:
    """Every size of the expert tensors that one rank holds.

    Parameters
    ----------
    n_hidden, n_inter, n_expert : int
        Model width, intermediate size and number of experts of the whole checkpoint layer.
    gated : bool
        w13 holds gate and up rows; False: up rows only.
    quant : {"none", "fp8_tensor", "fp8_channel", "fp8_block", "mxfp8", "mxfp4", \
"int8_channel", "int4_group"}
        How weights are stored.
    dtype : str
        Activation type ``"bf16"``, ``"f16"`` or ``"f32"``: also the type of unquantised weights,
        of biases, and of the scales of ``int4_group``. For the fp8 kinds it may name the weights'
        type instead, ``"f8_e4m3fn"`` (what they have otherwise), ``"f8_e4m3fnuz"`` or
        ``"f8_e5m2"``; biases are then bf16.
    block : tuple of two int
        ``fp8_block``: rows and columns of a scale block. ``int4_group``: ``(1, group)``, group 32,
        64 or 128. Not read for other kinds; the mx kinds always have groups of 32.
    tp_size, tp_rank : int
        Tensor-parallel ranks: they share the columns of the intermediate size.
    ep_size, ep_rank : int
        Expert-parallel ranks: they share the experts, the first ones holding one more where the
        number does not divide.
    split : {"true", "padded", "block"}
        How columns are shared. ``"true"``: as even as they go in units of 1 column, 32 columns
        (``fp8_block``) or one scale group (mx kinds, ``int4_group``), the first ranks holding one
        unit more. ``"padded"``: SGLang's rule, rank r holds the columns from ``P * r`` on with
        ``P`` = the even share rounded up to `align`; the last ranks may hold none. ``"block"``:
        as ``"true"`` in units of whole scale blocks; kinds without blocks count one column as one.
    align : int
        `Plan.n_inter_pad` is `Plan.n_inter` rounded up to a multiple of it (and of 2 for the 4-bit
        kinds, whose bytes are whole).
    bias : bool
        Both products have a bias.

    Returns
    -------
    Plan

    Raises
    ------
    TypeError
        An argument is of the wrong kind.
    ValueError
        An argument is out of range, or the tensors would exceed 2**63 bytes.
    UnsupportedError
        `split` would cut inside a scale: under ``"padded"`` the stride ``P`` must be a multiple of
        the scale group (mx kinds, ``int4_group``), or of 32 columns or of both sides of the scale
        block (``fp8_block``), unless the first rank holds everything. Raised on every rank alike.

    Notes
    -----
    With ``fp8_block`` a rank's first column can lie inside a scale block; see `Plan.scale_phase`.
    Both scale tensors begin at the last checkpoint column that is a border of both sides of the
    block; with sides of different length the finer one may so begin with scales that no column
    uses.

    Examples
    --------
    >>> p = plan(4096, 1536, 128, quant="fp8_block", tp_size=8, tp_rank=1)
    >>> p.start, p.stop, p.scale_phase, p.w13_scale_shape
    (192, 384, 64, (128, 4, 32))
    """
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        raise TypeError(f"block: expected a tuple of two integers (rows, columns), got {block!r}")
    ranks = (tp_size, tp_rank, ep_size, ep_rank)
    got = _core.plan(
        n_hidden, n_inter, n_expert, gated, quant, dtype, *block, *ranks, split, align, bias
    )
    # From here on every argument is known to be of its kind; numpy's are made Python's own.
    return Plan(
        n_hidden=index(n_hidden),
        n_inter_global=index(n_inter),
        n_expert=got["w13_shape"][0],
        n_expert_global=index(n_expert),
        gated=bool(gated),
        bias=bool(bias),
        quant=str(quant),
        block=(got.pop("block_n"), got.pop("block_k")),
        split=str(split),
        align=index(align),
        tp_size=index(tp_size),
        tp_rank=index(tp_rank),
        ep_size=index(ep_size),
        ep_rank=index(ep_rank),
        **got,
    )


def _product(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
