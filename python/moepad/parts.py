"""The words in which a layout of expert tensors is written: parts, their axes, a whole layout.

Knows shapes of stored tensors; knows no family's names, no ranks and no pads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

__all__ = ["Layout", "Part", "Sizes", "join"]

_WORD_BYTES = 4  # of "words": int32 with eight 4-bit values each
_BLOCK_BYTES = 16  # of "blocks": a last axis of its own for the 32 values of a scale


class Part(NamedTuple):
    """One stored tensor of a layout and where its elements belong.

    The axes are letters: E experts, H hidden, I intermediate, C gate then up (2I), X gate and up in
    turn (2I), G gate and up (2), 1 an axis of one; i is I where ranks do not share it. A part
    without E exists once per expert.

    Attributes
    ----------
    name : str
        Below the experts' prefix; {e} stands for the expert's number.
    into : str
        "w13", "w2", these with "_scale" or "_bias"; "x_scale", "h_scale": fixed scales of the
        inputs of w13 and of w2; or "extra": not computed with.
    axes : str
    halves : tuple of int
        The halves of w13 in it: 0 gate (or the only one), 1 up.
    hidden_unit, inter_unit : int
        Logical elements that one stored element along H, and along I, C or X, stands for.
    form : str
        "words" or "blocks" where the bytes of the last axis are stored so; "tall words" where the
        words are, rows and columns changed about; else "".
    dtypes : tuple of str
        Element types it may have; of a settled part one; () for the plan's.
    others : tuple of str
        Axes it may have instead, decided by the shape found.
    factor : int
        What is loaded is the stored value times this.
    states : str
        What an extra tensor must say: the axes whose logical sizes it holds, "zeros" where all zero
        points are 8, "order" where all columns are in their groups' order; "" for anything.
    """

    name: str
    into: str
    axes: str
    halves: tuple[int, ...] = (0,)
    hidden_unit: int = 1
    inter_unit: int = 1
    form: str = ""
    dtypes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    factor: int = 1
    states: str = ""

    @property
    def has_experts(self) -> bool:
        return "E" in self.axes

    @property
    def has_columns(self) -> bool:
        """Ranks share it by columns; the others have it whole or not at all."""
        return not set("ICX").isdisjoint(self.axes)

    @property
    def is_bias(self) -> bool:
        return self.into.endswith("_bias")

    @property
    def is_scale(self) -> bool:
        return self.into.endswith("_scale")

    @property
    def is_optional(self) -> bool:
        """Beside the weights: kept as it is, and may be missing."""
        return self.into in ("x_scale", "h_scale", "extra")

    @property
    def variants(self) -> tuple[Part, ...]:
        """Itself with each order of axes it may have."""
        return tuple(self._replace(axes=axes, others=()) for axes in (self.axes, *self.others))

    @property
    def is_transposed(self) -> bool:
        """Rows and columns of an expert's matrix lie the other way round than in w13 or w2."""
        axes = [letter for letter in self.axes if letter not in "E1"]
        return len(axes) == 2 and (axes[0] == "H") != self.into.startswith("w2")


@dataclass(frozen=True)
class Layout:
    """How one family stores an MoE layer's experts.

    Attributes
    ----------
    name : str
        What `layout=` accepts.
    is_gated : bool
    parts : tuple of Part
    have_bias : bool or None
        Recognised only with (without) biases; None: either way. Told by hand, both are accepted.
    is_explicit : bool
        Never recognised by names and shapes, only taken where `layout=` says so.
    model_types : tuple of str
        Values of `model_type` in config.json that decide for this layout.
    block_names : tuple of str
        What the experts' prefix must end in, where the parts' names alone could be those of a
        dense layer.
    """

    name: str
    is_gated: bool
    parts: tuple[Part, ...]
    have_bias: bool | None = None
    is_explicit: bool = False
    model_types: tuple[str, ...] = ()
    block_names: tuple[str, ...] = ()

    @cached_property
    def _by_name(self) -> dict[str, Part]:
        return {part.name: part for part in self.parts}

    def match(self, name: str) -> tuple[Part, int | None] | None:
        """The part that a name below the prefix belongs to, and the expert's number."""
        pattern, expert = template(name)
        part = self._by_name.get(pattern) or self._by_name.get(name)
        return part and (part, None if part.name == name else expert)

    def used_parts(self, have_bias: bool) -> tuple[Part, ...]:
        """The parts that a layer with or without biases has."""
        return tuple(p for p in self.parts if have_bias or not p.is_bias)

    @property
    def scheme(self) -> frozenset[str]:
        """Names of weights and scales: layouts that share them are told apart by their shapes."""
        return frozenset(p.name for p in self.parts if not p.is_bias and not p.is_optional)


_EXPERT = re.compile(r"(0|[1-9]\d*)\.")


def template(name: str) -> tuple[str, int | None]:
    """A name below the prefix as a part has it, and the expert's number in it."""
    if found := _EXPERT.match(name):
        return f"{{e}}.{name[found.end() :]}", int(found[1])
    return name, None


def join(root: str, name: str) -> str:
    """The full name of what lies below a prefix."""
    return f"{root}.{name}" if root else name


class Sizes(NamedTuple):
    """What a layer's tensors measure when they are whole, and how its weights are stored."""

    n_hidden: int
    n_inter: int
    n_expert: int
    is_gated: bool
    have_bias: bool
    quant: str = "none"
    block: tuple[int, int] = (1, 1)

    def shape(
        self, part: Part, n_column: int | None = None, n_expert: int | None = None
    ) -> tuple[int, ...]:
        """The shape of a part, or of a piece of it of so many columns (stored) and experts."""
        inter = -(-self.n_inter // part.inter_unit) if n_column is None else n_column
        size = {
            "E": self.n_expert if n_expert is None else n_expert,
            "H": -(-self.n_hidden // part.hidden_unit),
            "I": inter,
            "C": 2 * inter,
            "X": 2 * inter,
            "i": -(-self.n_inter // part.inter_unit),
            "G": 2,
            "1": 1,
        }
        shape = tuple(size[letter] for letter in part.axes)
        if part.form == "words":
            return (*shape[:-1], -(-shape[-1] // _WORD_BYTES))
        if part.form == "tall words":
            return (*shape[:-2], -(-shape[-1] // _WORD_BYTES), shape[-2])
        if part.form == "blocks":
            return (*shape[:-1], -(-shape[-1] // _BLOCK_BYTES), _BLOCK_BYTES)
        return shape
