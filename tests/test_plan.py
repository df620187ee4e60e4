"""Plans: exact integers, the rules that cut, what is refused, and the command that shows them.

The expected values come from three places that share no code with csrc/plan.c: published tables
(per-rank sizes of models, rows filled by SGLang's loader), marks set element by element in arrays
of the planned shapes, and Python's unbounded integers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moepad import Plan, UnsupportedError, plan
from moepad.cli import main

ITEMSIZE = {
    "f32": 4, "bf16": 2, "f16": 2, "f8_e4m3fn": 1, "f8_e4m3fnuz": 1, "f8_e5m2": 1, "f8_e8m0": 1,
    "u8": 1, "i8": 1,
}  # fmt: skip
FP8 = ("fp8_tensor", "fp8_channel", "fp8_block")
KINDS = ("none", *FP8, "mxfp8", "mxfp4", "int8_channel", "int4_group")
# A kind and a block it takes: what a matrix over formats runs through.
FORMATS = [
    ("none", (128, 128)),
    ("fp8_tensor", (128, 128)),
    ("fp8_channel", (128, 128)),
    ("fp8_block", (128, 128)),
    ("fp8_block", (1, 32)),
    ("fp8_block", (64, 128)),
    ("mxfp8", (128, 128)),
    ("mxfp4", (128, 128)),
    ("int8_channel", (128, 128)),
    ("int4_group", (1, 32)),
    ("int4_group", (1, 128)),
]


def id_of(item: object) -> str:
    return "-".join(map(str, item)) if isinstance(item, tuple) else str(item)


def ranks(n_inter: int, tp_size: int, **options: Any) -> list[Plan]:
    request = {"n_hidden": 64, "n_expert": 2, "tp_size": tp_size, **options}
    return [plan(n_inter=n_inter, tp_rank=rank, **request) for rank in range(tp_size)]


def group_of(p: Plan) -> tuple[int, int]:
    """Rows and columns that the definition of each format lets share a scale."""
    return {
        "fp8_block": p.block,
        "int4_group": p.block,
        "mxfp8": (1, 32),
        "mxfp4": (1, 32),
    }.get(p.quant, (1, 1))


# ---- published values ----


@pytest.mark.parametrize(
    ("n_inter", "tp_size", "align", "quant", "filled"),
    [
        (1536, 8, 128, "fp8_block", [256] * 6 + [0] * 2),
        (2560, 8, 128, "fp8_block", [384] * 6 + [256, 0]),
        (1408, 8, 128, "fp8_block", [256] * 5 + [128, 0, 0]),
        (1280, 8, 128, "fp8_block", [256] * 5 + [0] * 3),
        (1024, 8, 256, "mxfp4", [256] * 4 + [0] * 4),
        (1792, 8, 128, "fp8_block", [256] * 7 + [0]),
        (1856, 8, 128, "fp8_block", [256] * 7 + [64]),
        (704, 8, 128, "fp8_block", [128] * 5 + [64, 0, 0]),
        # SGLang's engine on a CPU, block fp8, I = 192.
        (192, 1, 128, "fp8_block", [192]),
        (192, 2, 128, "fp8_block", [128, 64]),
        (192, 4, 128, "fp8_block", [128, 64, 0, 0]),
    ],
)
def test_rows_that_sglang_fills(
    n_inter: int, tp_size: int, align: int, quant: str, filled: list[int]
) -> None:
    plans = ranks(n_inter, tp_size, split="padded", align=align, quant=quant)
    assert [p.n_inter for p in plans] == filled
    assert all(p.scale_phase == 0 for p in plans), "its stride keeps ranks on block borders"


# I to its per-rank size over 1, 2, 4, 8, 16 ranks, and the alignments each of them misses.
PER_RANK = {
    768: "768, 384 (256), 192 (128,256), 96 (all), 48 (all)",
    1536: "1536, 768, 384 (256), 192 (128,256), 96 (all)",
    2560: "2560, 1280, 640 (256), 320 (128,256), 160 (all)",
    512: "512, 256, 128 (256), 64 (128,256), 32 (all)",
    1024: "1024, 512, 256, 128 (256), 64 (128,256)",
    1408: "1408 (256), 704 (128,256), 352 (all), 176 (all), 88 (all)",
    2048: "2048, 1024, 512, 256, 128 (256)",
    3072: "3072, 1536, 768, 384 (256), 192 (128,256)",
    14336: "14336, 7168, 3584, 1792, 896 (256)",
    16384: "16384, 8192, 4096, 2048, 1024",
    2880: "2880 (128,256), 1440 (all), 720 (all), 360 (all), 180 (all)",
    704: "704 (128,256), 352 (all), 176 (all), 88 (all), 44 (all)",
    8192: "8192, 4096, 2048, 1024, 512",
    1856: "1856 (128,256), 928 (all), 464 (all), 232 (all), 116 (all)",
    2688: "2688 (256), 1344 (128,256), 672 (all), 336 (all), 168 (all)",
    5120: "5120, 2560, 1280, 640 (256), 320 (128,256)",
    1280: "1280, 640 (256), 320 (128,256), 160 (all), 80 (all)",
    3584: "3584, 1792, 896 (256), 448 (128,256), 224 (all)",
    1792: "1792, 896 (256), 448 (128,256), 224 (all), 112 (all)",
}


@pytest.mark.parametrize("n_inter", PER_RANK)
def test_per_rank_sizes_of_models(n_inter: int) -> None:
    for tp_size, cell in zip((1, 2, 4, 8, 16), PER_RANK[n_inter].split(", "), strict=True):
        size, _, missed = cell.replace("(all)", "(64,128,256)").partition(" ")
        expected = {int(align) for align in missed.strip("()").split(",") if align}
        plans = {align: ranks(n_inter, tp_size, align=align) for align in (1, 64, 128, 256)}
        assert {p.n_inter for p in plans[1]} == {int(size)}
        got = {align for align, row in plans.items() if row[0].n_inter_pad != row[0].n_inter}
        assert got == expected, f"{n_inter} over {tp_size} ranks"


def test_sizes_that_miss_at_eight_ranks() -> None:
    def missing(align: int) -> set[int]:
        return {i for i in PER_RANK if (p := ranks(i, 8, align=align)[0]).n_inter_pad != p.n_inter}

    of_128 = {704, 768, 1280, 1408, 1536, 1792, 1856, 2560, 2688, 2880, 3584, 512}
    assert missing(128) == of_128
    assert missing(64) == {704, 768, 1280, 1408, 1792, 1856, 2688, 2880}


def test_every_rank_of_the_case_that_started_it() -> None:
    """Qwen3-235B at eight ranks: 192 columns each, from inside a scale block on every odd rank."""
    plans = ranks(1536, 8, quant="fp8_block", n_hidden=4096, n_expert=128)
    assert [(p.start, p.stop) for p in plans] == [(192 * r, 192 * (r + 1)) for r in range(8)]
    assert [p.scale_phase for p in plans] == [0, 64] * 4
    assert [p.w13_scale_start for p in plans] == [0, 1, 3, 4, 6, 7, 9, 10]
    assert {p.w13_scale_shape for p in plans} == {(128, 4, 32)}
    assert {p.w2_scale_shape for p in plans} == {(128, 32, 2)}
    assert {(p.w13_shape, p.w2_shape) for p in plans} == {((128, 384, 4096), (128, 4096, 192))}
    assert {p.pad_nbytes for p in plans} == {0}
    assert {p.nbytes for p in plans} == {128 * (3 * 192 * 4096 + 4 * (4 * 32 + 32 * 2))}


def test_gpt_oss_at_eight_ranks() -> None:
    """90 groups of 32 over 8 ranks: two ranks hold twelve groups, six hold eleven."""
    plans = ranks(2880, 8, quant="mxfp4", n_hidden=2880, n_expert=128, bias=True)
    assert [p.n_inter for p in plans] == [384, 384] + [352] * 6
    assert plans[2].w13_shape == (128, 704, 1440)
    assert plans[2].w2_shape == (128, 2880, 176)
    assert plans[2].w13_scale_shape == (128, 704, 90)
    assert plans[2].w2_scale_shape == (128, 2880, 11)
    assert plans[2].w2_scale_start == 24
    assert (plans[2].w13_bias_shape, plans[2].w2_bias_shape) == ((128, 704), (128, 2880))
    assert (plans[2].storage_dtype, plans[2].scale_dtype, plans[2].bias_dtype) == (
        "u8",
        "f8_e8m0",
        "bf16",
    )


def test_whole_blocks() -> None:
    """12 blocks over 8 ranks: as even as they go."""
    plans = ranks(1536, 8, quant="fp8_block", split="block")
    assert [p.n_inter for p in plans] == [256] * 4 + [128] * 4
    assert [p.scale_phase for p in plans] == [0] * 8


def test_blocks_of_unequal_sides() -> None:
    """Both scale grids begin at a border of both sides; the blocks in front of a rank's are pad."""
    p = plan(64, 512, 1, quant="fp8_block", block=(32, 128), tp_size=8, tp_rank=3)
    assert (p.start, p.stop, p.scale_phase) == (192, 256, 64)
    assert (p.w13_scale_start, p.w13_scale_shape) == (4, (1, 2 * 4, 1))
    assert (p.w2_scale_start, p.w2_scale_shape) == (1, (1, 2, 1))
    assert p.pad_nbytes == 2 * 2 * 4, "two blocks of f32 in each half"
    p = plan(64, 512, 1, quant="fp8_block", block=(128, 32), tp_size=8, tp_rank=3)
    assert (p.scale_phase, p.w13_scale_shape, p.w2_scale_shape) == (64, (1, 2, 2), (1, 1, 4))
    assert p.pad_nbytes == 2 * 4


def test_experts_that_do_not_divide() -> None:
    plans = [plan(64, 32, 10, ep_size=4, ep_rank=rank) for rank in range(4)]
    assert [(p.expert_start, p.expert_stop) for p in plans] == [(0, 3), (3, 6), (6, 8), (8, 10)]
    assert [p.n_expert for p in plans] == [3, 3, 2, 2] == [p.w13_shape[0] for p in plans]


def test_more_ranks_than_experts_or_columns() -> None:
    last = plan(64, 2, 2, tp_size=4, tp_rank=3, ep_size=3, ep_rank=2, bias=True)
    assert (last.start, last.stop, last.n_inter, last.n_inter_pad) == (2, 2, 0, 0)
    assert (last.expert_start, last.expert_stop) == (2, 2)
    assert (last.w13_shape, last.w2_shape, last.nbytes) == ((0, 0, 64), (0, 64, 0), 0)


# ---- shapes of every kind ----

SHAPES = {
    "none": ("bf16", None, None),
    "fp8_tensor": ("f8_e4m3fn", (4, 2), (4,)),
    "fp8_channel": ("f8_e4m3fn", (4, 256), (4, 70)),
    "fp8_block": ("f8_e4m3fn", (4, 4, 2), (4, 3, 1)),
    "mxfp8": ("f8_e4m3fn", (4, 256, 3), (4, 70, 4)),
    "mxfp4": ("u8", (4, 256, 3), (4, 70, 4)),
    "int8_channel": ("i8", (4, 256), (4, 70)),
    "int4_group": ("u8", (4, 256, 1), (4, 70, 1)),
}
UNGATED_SCALES = {
    "none": None,
    "fp8_tensor": (4,),
    "fp8_channel": (4, 128),
    "fp8_block": (4, 2, 2),
    "mxfp8": (4, 128, 3),
    "mxfp4": (4, 128, 3),
    "int8_channel": (4, 128),
    "int4_group": (4, 128, 1),
}


@pytest.mark.parametrize("quant", KINDS)
def test_shapes(quant: str) -> None:
    """H = 70, I = 45 padded to 128, four experts; blocks of 32 x 64, groups of 128."""
    block = (1, 128) if quant == "int4_group" else (32, 64)
    p = plan(70, 45, 4, quant=quant, block=block, align=128)
    storage, w13_scale, w2_scale = SHAPES[quant]
    is_packed = quant in ("mxfp4", "int4_group")
    assert p.storage_dtype == storage
    assert p.w13_shape == (4, 256, 35 if is_packed else 70)
    assert p.w2_shape == (4, 70, 64 if is_packed else 128)
    assert (p.w13_scale_shape, p.w2_scale_shape) == (w13_scale, w2_scale)
    assert (p.w13_bias_shape, p.w2_bias_shape) == (None, None)
    assert p.n_pack == (2 if is_packed else 1)
    ungated = plan(70, 45, 4, gated=False, quant=quant, block=block, align=128)
    assert ungated.w13_shape == (4, 128, 35 if is_packed else 70)
    assert (ungated.w13_scale_shape, ungated.w2_scale_shape) == (UNGATED_SCALES[quant], w2_scale)
    assert ungated.w2_shape == p.w2_shape


@pytest.mark.parametrize("quant", ["mxfp4", "int4_group"])
@pytest.mark.parametrize(("align", "n_inter_pad"), [(1, 34), (2, 34), (3, 36), (5, 40), (64, 64)])
def test_half_bytes_are_rounded_up(quant: str, align: int, n_inter_pad: int) -> None:
    p = plan(64, 33, 1, quant=quant, block=(1, 32), align=align)
    assert (p.n_inter, p.n_inter_pad) == (33, n_inter_pad)
    assert p.w2_shape == (1, 64, n_inter_pad // 2)


DTYPES = [
    ("none", "f32", "f32", "f32", "f32"),
    ("none", "f16", "f16", "f32", "f16"),
    ("fp8_channel", "bf16", "f8_e4m3fn", "f32", "bf16"),
    ("fp8_tensor", "f16", "f8_e4m3fn", "f32", "f16"),
    ("fp8_block", "f8_e4m3fn", "f8_e4m3fn", "f32", "bf16"),
    ("fp8_channel", "f8_e4m3fnuz", "f8_e4m3fnuz", "f32", "bf16"),
    ("fp8_tensor", "f8_e5m2", "f8_e5m2", "f32", "bf16"),
    ("mxfp8", "f16", "f8_e4m3fn", "f8_e8m0", "f16"),
    ("mxfp8", "f8_e4m3fn", "f8_e4m3fn", "f8_e8m0", "bf16"),
    ("mxfp4", "bf16", "u8", "f8_e8m0", "bf16"),
    ("int8_channel", "f32", "i8", "f32", "f32"),
    ("int4_group", "f32", "u8", "f32", "f32"),
    ("int4_group", "bf16", "u8", "bf16", "bf16"),
    ("int4_group", "f16", "u8", "f16", "f16"),
]


@pytest.mark.parametrize(("quant", "dtype", "storage", "scale", "bias"), DTYPES, ids=id_of)
def test_dtypes(quant: str, dtype: str, storage: str, scale: str, bias: str) -> None:
    block = (1, 64) if quant == "int4_group" else (128, 128)
    p = plan(64, 64, 2, quant=quant, dtype=dtype, block=block, bias=True)
    assert (p.storage_dtype, p.scale_dtype, p.bias_dtype) == (storage, scale, bias)


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [
        ("none", "f8_e4m3fn"),
        ("none", "u8"),
        ("mxfp8", "f8_e5m2"),
        ("mxfp8", "f8_e8m0"),
        ("mxfp4", "f8_e4m3fn"),
        ("int8_channel", "i8"),
        ("int4_group", "f8_e5m2"),
        ("fp8_block", "f8_e8m0"),
        ("fp8_tensor", "i64"),
    ],
)
def test_dtype_that_does_not_fit(quant: str, dtype: str) -> None:
    message = rf'^dtype: expected .*"bf16".* for quant="{quant}", got "{dtype}"'
    with pytest.raises(ValueError, match=message):
        plan(64, 64, 2, quant=quant, dtype=dtype, block=(1, 32))


# ---- properties ----

SMALL = st.fixed_dictionaries(
    {
        "n_hidden": st.integers(1, 70),
        "n_inter": st.integers(0, 700),
        "n_expert": st.integers(1, 3),
        "gated": st.booleans(),
        "bias": st.booleans(),
        "split": st.sampled_from(("true", "padded", "block")),
        "align": st.sampled_from((1, 2, 3, 32, 48, 64, 96, 128, 256)),
        "tp_size": st.integers(1, 17),
        "ep_size": st.integers(1, 4),
    }
)
FORMAT = st.one_of(
    st.sampled_from(KINDS[:-1]).map(lambda quant: {"quant": quant}),
    st.sampled_from((32, 64, 128)).map(lambda g: {"quant": "int4_group", "block": (1, g)}),
    st.tuples(*2 * [st.sampled_from((1, 16, 32, 48, 64, 128))]).map(
        lambda block: {"quant": "fp8_block", "block": block}
    ),
)
REQUEST = st.builds(lambda request, kind: {**request, **kind}, SMALL, FORMAT)


def all_ranks(request: dict[str, Any]) -> list[Plan] | None:
    """Plans of all tensor-parallel ranks, or None where the rule is refused on all of them."""
    plans: list[Plan] = []
    n_refused = 0
    for tp_rank in range(request["tp_size"]):
        try:
            plans.append(plan(**request, tp_rank=tp_rank))
        except UnsupportedError:
            n_refused += 1
    assert n_refused in (0, request["tp_size"]), "some ranks have a plan and some have none"
    return plans or None


@given(REQUEST)
def test_every_column_belongs_to_one_rank(request: dict[str, Any]) -> None:
    plans = all_ranks(request)
    if plans is None:
        assert request["split"] == "padded"
        return
    position = 0
    for p in plans:
        assert p.start == min(position, request["n_inter"]) == position
        assert p.stop - p.start == p.n_inter >= 0
        position = p.stop
    assert position == request["n_inter"]


@given(REQUEST)
def test_every_expert_belongs_to_one_rank(request: dict[str, Any]) -> None:
    request = {**request, "split": "true"}
    plans = [plan(**request, ep_rank=rank) for rank in range(request["ep_size"])]
    owned = [e for p in plans for e in range(p.expert_start, p.expert_stop)]
    assert owned == list(range(request["n_expert"]))
    sizes = [p.n_expert for p in plans]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    assert sizes == [p.w2_shape[0] for p in plans]


@given(REQUEST)
def test_shares_are_even(request: dict[str, Any]) -> None:
    """Rules "true" and "block": whole units, the first ranks one more, only the last one short."""
    request = {**request, "split": "block" if request["split"] == "block" else "true"}
    plans = all_ranks(request)
    assert plans is not None
    unit = math.lcm(*group_of(plans[0]))
    if request["quant"] == "fp8_block" and request["split"] == "true":
        unit = 32
    n_unit = [math.ceil(p.n_inter / unit) for p in plans]
    assert n_unit == sorted(n_unit, reverse=True) and n_unit[0] - n_unit[-1] <= 1
    assert all(p.start % unit == 0 for p in plans if p.n_inter)


@given(REQUEST)
def test_padded_rule(request: dict[str, Any]) -> None:
    """The stride of SGLang's loader, and refusal exactly where it cuts what cannot be cut."""
    request = {**request, "split": "padded"}
    n_inter, tp_size, align = request["n_inter"], request["tp_size"], request["align"]
    stride = math.ceil(math.ceil(n_inter / tp_size) / align) * align
    borders = [min(rank * stride, n_inter) for rank in range(tp_size + 1)]
    cuts = [border for border in borders if 0 < border < n_inter]
    plans = all_ranks(request)
    block = group_of(plan(**{**request, "split": "true"}))
    legal = all(
        cut % math.lcm(*block) == 0 or (request["quant"] == "fp8_block" and cut % 32 == 0)
        for cut in cuts
    )
    assert (plans is not None) == legal
    if plans is not None:
        assert [(p.start, p.stop) for p in plans] == list(itertools.pairwise(borders))
        # Every rank of SGLang allocates the stride; the first of ours does.
        assert plans[0].n_inter_pad >= stride or not n_inter
        if request["quant"] not in ("mxfp4", "int4_group"):
            assert plans[0].n_inter_pad == stride


@given(REQUEST)
def test_padding_is_the_least_multiple(request: dict[str, Any]) -> None:
    plans = all_ranks(request)
    for p in plans or []:
        unit = math.lcm(request["align"], p.n_pack)
        assert p.n_inter_pad == math.ceil(p.n_inter / unit) * unit


@given(REQUEST, st.integers(1, 5))
def test_larger_align_costs_more(request: dict[str, Any], factor: int) -> None:
    request = {**request, "split": "block" if request["split"] == "block" else "true"}
    small = all_ranks(request)
    large = all_ranks({**request, "align": request["align"] * factor})
    assert small is not None and large is not None
    for a, b in zip(small, large, strict=True):
        assert (a.start, a.stop, a.scale_phase) == (b.start, b.stop, b.scale_phase)
        assert a.n_inter_pad <= b.n_inter_pad
        assert a.nbytes <= b.nbytes and a.pad_nbytes <= b.pad_nbytes
        assert a.nbytes - a.pad_nbytes == b.nbytes - b.pad_nbytes, "what is held does not grow"


def tensors_of(p: Plan) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor that exists."""
    shapes = {
        "w13": (p.w13_shape, p.storage_dtype),
        "w2": (p.w2_shape, p.storage_dtype),
        "w13_scale": (p.w13_scale_shape, p.scale_dtype),
        "w2_scale": (p.w2_scale_shape, p.scale_dtype),
        "w13_bias": (p.w13_bias_shape, p.bias_dtype),
        "w2_bias": (p.w2_bias_shape, p.bias_dtype),
    }
    return {name: (shape, dtype) for name, (shape, dtype) in shapes.items() if shape is not None}


def marks_of(p: Plan) -> dict[str, np.ndarray]:
    """Which elements hold something of the checkpoint, one expert like the other.

    Every logical weight (row, column) marks itself and the scale that the format's definition gives
    it; indexing fails where a shape is too small for a scale that is needed.
    """
    marks = {name: np.zeros(shape, bool) for name, (shape, _) in tensors_of(p).items()}
    if not p.n_expert:
        return marks
    rows, columns = group_of(p)
    has_blocks = p.quant in ("fp8_block", "mxfp8", "mxfp4", "int4_group")
    k_hidden, k_inter = np.arange(p.n_hidden), np.arange(p.n_inter)
    phase = p.scale_phase
    for half in range(2 if p.gated else 1):
        for j in range(p.n_inter):
            row = half * p.n_inter_pad + j
            marks["w13"][:, row, k_hidden // p.n_pack] = True
            if p.bias:
                marks["w13_bias"][:, row] = True
            if p.quant == "fp8_block":
                assert p.w13_scale_shape is not None
                n_block = p.w13_scale_shape[1] // (2 if p.gated else 1)
                block = (phase + j) // rows
                assert block < n_block, "a row without a scale of its half"
                marks["w13_scale"][:, half * n_block + block, k_hidden // columns] = True
            elif has_blocks:
                marks["w13_scale"][:, row, k_hidden // columns] = True
            elif p.quant in ("fp8_channel", "int8_channel"):
                marks["w13_scale"][:, row] = True
    for row in range(p.n_hidden):
        marks["w2"][:, row, k_inter // p.n_pack] = True
        if p.quant == "fp8_block":
            marks["w2_scale"][:, row // rows, (phase + k_inter) // columns] = True
        elif has_blocks:
            marks["w2_scale"][:, row, k_inter // columns] = True
    # One per tensor, per output row, or a bias: there whatever the rank's share of columns.
    for name in ("w13_scale", "w2_scale"):
        if p.quant == "fp8_tensor" or (p.quant.endswith("_channel") and name == "w2_scale"):
            marks[name][:] = True
    if p.bias:
        marks["w2_bias"][:] = True
    return marks


@settings(deadline=None, max_examples=300)
@given(REQUEST, st.data())
def test_bytes_and_scales_cover(request: dict[str, Any], data: st.DataObject) -> None:
    """Bytes are the sum over shapes; pad is every element that no logical weight needs."""
    tp_rank = data.draw(st.integers(0, request["tp_size"] - 1))
    ep_rank = data.draw(st.integers(0, request["ep_size"] - 1))
    try:
        p = plan(**request, tp_rank=tp_rank, ep_rank=ep_rank)
    except UnsupportedError:
        return
    tensors, marks = tensors_of(p), marks_of(p)
    assert p.nbytes == sum(math.prod(s) * ITEMSIZE[d] for s, d in tensors.values())
    pad = sum(int((~marks[name]).sum()) * ITEMSIZE[d] for name, (_, d) in tensors.items())
    assert p.pad_nbytes == pad
    if p.quant == "fp8_block" and p.block[0] == p.block[1] and p.n_inter:
        assert marks["w13_scale"].all() and marks["w2_scale"].all(), "no scale more than touched"


@given(REQUEST)
def test_scales_come_from_the_right_place(request: dict[str, Any]) -> None:
    """The scale that a rank's column finds is the one the whole checkpoint has for it."""
    for p in all_ranks(request) or []:
        rows, columns = group_of(p)
        assert p.scale_phase == 0 or (p.quant == "fp8_block" and p.n_inter)
        for j in range(p.n_inter):
            column = p.start + j
            if p.quant == "fp8_block":
                assert p.w13_scale_start + (p.scale_phase + j) // rows == column // rows
                assert p.w2_scale_start + (p.scale_phase + j) // columns == column // columns
            elif p.quant in ("mxfp8", "mxfp4", "int4_group"):
                assert p.w13_scale_start + j == column
                assert p.w2_scale_start + j // columns == column // columns
            elif p.quant.endswith("_channel"):
                assert (p.w13_scale_start + j, p.w2_scale_start) == (column, 0)
            else:
                assert (p.w13_scale_start, p.w2_scale_start) == (0, 0)


@given(st.integers(1, 2**40), st.integers(0, 2**40), st.integers(1, 2**20), st.integers(1, 2**45))
def test_no_silent_overflow(n_hidden: int, n_inter: int, n_expert: int, align: int) -> None:
    n_inter_pad = -(-n_inter // align) * align
    nbytes = 2 * n_expert * 3 * n_inter_pad * n_hidden
    if nbytes < 2**63:
        p = plan(n_hidden, n_inter, n_expert, align=align)
        assert (p.n_inter_pad, p.nbytes) == (n_inter_pad, nbytes)
        assert p.pad_nbytes == 2 * n_expert * 3 * (n_inter_pad - n_inter) * n_hidden
    else:
        with pytest.raises(ValueError, match=r"2\*\*63 bytes"):
            plan(n_hidden, n_inter, n_expert, align=align)


HUGE = st.sampled_from([2**k + d for k in (30, 31, 32, 61, 62, 63) for d in (-1, 0, 1)])
ANY = st.one_of(st.integers(-3, 300), HUGE, HUGE.map(lambda value: -value))


@given(
    st.fixed_dictionaries(
        {name: ANY for name in ("n_hidden", "n_inter", "n_expert")},
        optional={
            **{name: ANY for name in ("tp_size", "tp_rank", "ep_size", "ep_rank", "align")},
            "block": st.tuples(ANY, ANY),
            "quant": st.sampled_from(KINDS),
            "split": st.sampled_from(("true", "padded", "block")),
            "dtype": st.sampled_from(tuple(ITEMSIZE)),
            "bias": st.booleans(),
            "gated": st.booleans(),
        },
    )
)
def test_hostile_integers(request: dict[str, Any]) -> None:
    try:
        p = plan(**request)
    except (ValueError, UnsupportedError):
        return
    assert 0 <= p.start <= p.stop <= p.n_inter_global == request["n_inter"]
    assert p.n_inter <= p.n_inter_pad
    sizes = [math.prod(shape) * ITEMSIZE[dtype] for shape, dtype in tensors_of(p).values()]
    assert 0 <= p.pad_nbytes <= p.nbytes == sum(sizes) < 2**63


# ---- the matrix of sizes, ranks and formats ----

MATRIX_I = (
    32, 44, 48, 64, 88, 96, 112, 128, 160, 176, 192, 224, 232, 320, 336, 352, 360, 384, 448, 640,
    704, 720, 896, 1440, 1856, 2880,
)  # fmt: skip


@pytest.mark.parametrize("form", FORMATS, ids=id_of)
@pytest.mark.parametrize("split", ["true", "padded", "block"])
def test_matrix(form: tuple[str, tuple[int, int]], split: str) -> None:
    """Sizes per rank that models have, on every rank of 1 to 16."""
    quant, block = form
    n_planned = 0
    for n_each in MATRIX_I:
        for tp_size in (1, 2, 4, 8, 16):
            for gated in (True, False):
                request = {
                    "n_hidden": 2688, "n_inter": n_each * tp_size, "n_expert": 3, "gated": gated,
                    "quant": quant, "block": block, "split": split, "tp_size": tp_size,
                    "align": 128 if split == "padded" else 1,
                }  # fmt: skip
                plans = all_ranks(request)
                assert plans is not None, "128 is a multiple of every block here"
                n_planned += len(plans)
                assert [p.start for p in plans] == [0, *(p.stop for p in plans[:-1])]
                assert plans[-1].stop == n_each * tp_size
                for p in plans:
                    assert p.w13_shape[1] == (2 if gated else 1) * p.n_inter_pad
                    assert p.w2_shape[2] == p.n_inter_pad // p.n_pack
                    assert p.n_inter_pad == -(-p.n_inter // 128) * 128 or split != "padded"
                if split == "true" and quant in ("none", "fp8_tensor", "fp8_channel"):
                    assert {p.n_inter for p in plans} == {n_each}
    assert n_planned == len(MATRIX_I) * 31 * 2


@pytest.mark.parametrize("quant", ["mxfp8", "mxfp4", "int4_group"])
def test_group_counts_follow_padded_weights(quant: str) -> None:
    """Scales are derived from the padded weight, so that the two cannot disagree."""
    for n_inter in (1, 31, 32, 33, 96, 352, 360, 2880):
        for align in (1, 64, 128, 256):
            p = plan(2880, n_inter, 2, quant=quant, block=(1, 32), align=align)
            assert p.w2_scale_shape == (2, 2880, -(-p.n_inter_pad // 32))
            assert p.w13_scale_shape == (2, 2 * p.n_inter_pad, 90)


# ---- what is refused, and how ----

REFUSED = [
    (
        {"n_inter": 2880, "quant": "mxfp4", "tp_size": 8},
        'split: "padded" with align=1 cuts n_inter=2880 every 360 columns, inside a scale group of '
        '32 columns of quant="mxfp4"; pass an align that is a multiple of 32, or split="true" or '
        '"block"',
    ),
    (
        {"n_inter": 1536, "quant": "int4_group", "block": (1, 128), "tp_size": 8, "align": 64},
        'split: "padded" with align=64 cuts n_inter=1536 every 192 columns, inside a scale group '
        'of 128 columns of quant="int4_group"; pass an align that is a multiple of 128, or '
        'split="true" or "block"',
    ),
    (
        {"n_inter": 1408, "quant": "fp8_block", "tp_size": 8},
        'split: "padded" with align=1 cuts n_inter=1408 every 176 columns, inside a scale block of '
        '128 columns of quant="fp8_block", which may be cut at multiples of 32 columns only; pass '
        'an align that is a multiple of 32, or split="true" or "block"',
    ),
]


@pytest.mark.parametrize(("request_", "message"), REFUSED, ids=["mxfp4", "int4", "fp8_block"])
def test_refused_cut(request_: dict[str, Any], message: str) -> None:
    for tp_rank in range(8):
        with pytest.raises(UnsupportedError) as caught:
            plan(n_hidden=64, n_expert=2, split="padded", tp_rank=tp_rank, **request_)
        assert str(caught.value) == message
    multiple = int(message.split("multiple of ", 1)[1].split(",")[0].split()[0])
    if "fp8_block" in message:
        multiple = 32
    plan(n_hidden=64, n_expert=2, split="padded", **{**request_, "align": multiple})


def test_padded_block_cut_on_the_quantum_is_exact() -> None:
    """192 columns a rank is no multiple of 128, but of 32: planned with a phase, not refused."""
    plans = ranks(1536, 8, split="padded", quant="fp8_block")
    assert [p.scale_phase for p in plans] == [0, 64] * 4


def test_padded_without_a_cut_is_legal() -> None:
    assert ranks(45, 1, split="padded", quant="mxfp4")[0].n_inter == 45
    assert [p.n_inter for p in ranks(45, 2, split="padded", align=50, quant="mxfp4")] == [45, 0]


VALUE_ERRORS = [
    ({"n_hidden": 0}, "n_hidden: expected an integer of at least 1, got 0"),
    ({"n_inter": -1}, "n_inter: expected an integer of at least 0, got -1"),
    ({"n_expert": 0}, "n_expert: expected an integer of at least 1, got 0"),
    ({"tp_size": 0}, "tp_size: expected an integer of at least 1, got 0"),
    ({"ep_size": -2}, "ep_size: expected an integer of at least 1, got -2"),
    ({"align": 0}, "align: expected an integer of at least 1, got 0"),
    (
        {"tp_rank": 8, "tp_size": 8},
        "tp_rank: expected 0 to 7 for tp_size=8, got 8; ranks count from 0",
    ),
    ({"ep_rank": -1}, "ep_rank: expected 0 to 0 for ep_size=1, got -1; ranks count from 0"),
    (
        {"quant": "fp8_block", "block": (0, 128)},
        'block: expected two positive integers (rows, columns) for quant="fp8_block", got (0, 128)',
    ),
    (
        {"quant": "int4_group"},
        'block: expected (1, group) with group 32, 64 or 128 for quant="int4_group", got '
        "(128, 128); pass the checkpoint's group size, e.g. block=(1, 128)",
    ),
    ({"n_inter": 2**63}, "n_inter: expected an integer below 2**63, got more"),
]


@pytest.mark.parametrize(("wrong", "message"), VALUE_ERRORS)
def test_value_error(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        plan(**{"n_hidden": 64, "n_inter": 64, "n_expert": 2, **wrong})
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["quant", "dtype", "split"])
def test_unknown_name_lists_the_known(name: str) -> None:
    known = {"quant": "fp8_block", "dtype": "bf16", "split": "padded"}[name]
    with pytest.raises(ValueError, match=rf"^{name}: .*{known}.*nonsense"):
        plan(64, 64, 2, **{name: "nonsense"})


@pytest.mark.parametrize(
    "name",
    ["n_hidden", "n_inter", "n_expert", "tp_size", "tp_rank", "ep_size", "ep_rank", "align"],
)
@pytest.mark.parametrize("value", [1.0, "1", None, True, np.float32(1), np.array([1, 2])], ids=repr)
def test_integers_of_the_wrong_kind(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected an integer, got "):
        plan(**{"n_hidden": 64, "n_inter": 64, "n_expert": 2, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gated", 1),
        ("gated", None),
        ("bias", "yes"),
        ("quant", None),
        ("quant", b"none"),
        ("dtype", np.float32),
        ("split", 1),
        ("block", 128),
        ("block", (128,)),
        ("block", (1, 2, 3)),
        ("block", "no"),
    ],
    ids=repr,
)
def test_other_arguments_of_the_wrong_kind(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected "):
        plan(64, 64, 2, **{name: value})  # type: ignore[arg-type]


def test_sizes_must_be_named_after_the_third() -> None:
    with pytest.raises(TypeError):
        plan(64, 64, 2, False)  # type: ignore[misc]


# ---- the object ----


def test_numpy_arguments_give_plain_integers() -> None:
    given_numpy = plan(
        np.int64(64), np.int32(100), np.uint8(2), gated=np.bool_(True), align=np.int8(8)
    )  # type: ignore[arg-type]
    assert given_numpy == plan(64, 100, 2, align=8)
    for field in dataclasses.fields(given_numpy):
        value = getattr(given_numpy, field.name)
        assert type(value) in (int, bool, str, tuple, type(None)), field.name
    assert json.dumps(dataclasses.asdict(given_numpy))


def test_plan_is_immutable_and_hashable() -> None:
    p = plan(64, 100, 2, quant="fp8_block", tp_size=3, tp_rank=1)
    again = plan(64, 100, 2, quant="fp8_block", tp_size=3, tp_rank=1)
    assert p == again and hash(p) == hash(again) and len({p, again}) == 1
    assert p != plan(64, 100, 2, quant="fp8_block", tp_size=3, tp_rank=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.n_inter = 7  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        p.other = 7  # type: ignore[attr-defined]


def test_block_is_the_one_in_force() -> None:
    assert plan(64, 64, 2).block == (1, 1)
    assert plan(64, 64, 2, quant="mxfp4").block == (1, 32)
    assert plan(64, 64, 2, quant="fp8_block", block=(64, 128)).block == (64, 128)
    assert plan(64, 64, 2, quant="int4_group", block=[1, 64]).block == (1, 64)  # type: ignore[arg-type]


def test_text() -> None:
    p = plan(4096, 1536, 128, quant="fp8_block", tp_size=8, tp_rank=1, align=128, bias=True)
    assert str(p) == (
        "columns   [192, 384) of 1536: rank 1 of 8, split true\n"
        "n_inter   192, padded to 256 (align 128), scale phase 64\n"
        "experts   [0, 128) of 128: rank 0 of 1\n"
        "quant     fp8_block 128 x 128, gated\n"
        "w13       128 x 512 x 4096 f8_e4m3fn\n"
        "w2        128 x 4096 x 256 f8_e4m3fn\n"
        "w13_scale 128 x 4 x 32 f32\n"
        "w2_scale  128 x 32 x 2 f32\n"
        "w13_bias  128 x 512 bf16\n"
        "w2_bias   128 x 4096 bf16\n"
        "bytes     403,931,136, of which pad 100,696,064"
    )
    assert "scale" not in str(plan(64, 64, 2)) and "bias" not in str(plan(64, 64, 2))


# ---- python -m moepad plan ----


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_command_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "qwen3-235b-a22b", "--tp", "8", "--quant", "fp8_block", "--json")
    facts = json.loads(command(capsys, *arguments))
    assert facts["model"]["name"] == "Qwen3-235B-A22B"
    assert [rank["n_inter"] for rank in facts["ranks"]] == [192] * 8
    assert [rank["scale_phase"] for rank in facts["ranks"]] == [0, 64] * 4
    rows = {(row["split"], row["align"]): row for row in facts["padding"]}
    assert rows["true", 1]["extra_nbytes"] == 0 == rows["true", 64]["extra_nbytes"]
    for split, n_empty in (("true", 0), ("padded", 2)):
        row = rows[split, 128]
        assert (row["n_inter_pad"], row["empty_ranks"]) == (256, n_empty)
        # 64 of 256 columns on each of eight ranks, whichever of them the rule leaves unused.
        assert row["extra_nbytes"] == 8 * 128 * 3 * 64 * 4096
        assert row["extra_percent"] == pytest.approx(33.3, abs=0.1)


def test_command_counts_what_sglang_allocates(capsys: pytest.CaptureFixture[str]) -> None:
    """Under the padded rule every rank allocates the stride, the empty ones too."""
    arguments = ("--hidden", "64", "--inter", "1024", "--experts", "2", "--tp", "8", "--json")
    rows = json.loads(command(capsys, *arguments, "--quant", "mxfp4"))["padding"]
    (row,) = (row for row in rows if (row["split"], row["align"]) == ("padded", 256))
    assert row["empty_ranks"] == 4
    assert row["nbytes"] == 8 * plan(64, 256, 2, quant="mxfp4").nbytes
    assert row["extra_percent"] == pytest.approx(100)


def test_command_shows_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "gpt-oss", "--tp", "8", "--quant", "mxfp4", "--align", "1")
    facts = json.loads(command(capsys, *arguments, "--json"))
    refused = [row for row in facts["padding"] if "refused" in row]
    assert [(row["split"], row["align"]) for row in refused] == [("padded", 1)]
    assert "every 360 columns" in refused[0]["refused"]
    assert "every 360 columns" in command(capsys, *arguments)


def test_command_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = command(capsys, "--hidden", "64", "--inter", "100", "--experts", "5", "--tp", "3")
    lines = text.splitlines()
    assert lines[0].startswith("H=64 I=100 E=5, gated, quant none, weights bf16")
    assert lines[4].split() == ["0", "0:34", "34", "34", "5x68x64", "5x64x34", "0.1", "0.0", "0.0"]
    assert lines[6].split()[1:4] == ["67:100", "33", "33"]
    with_experts = command(
        capsys, "--hidden", "64", "--inter", "100", "--experts", "5", "--ep", "2", "--no-gated",
        "--bias", "--split", "padded", "--align", "64",
    )  # fmt: skip
    assert "not gated" in with_experts and "w13 bias" in with_experts
    assert [line.split()[1] for line in with_experts.splitlines()[4:6]] == ["0:3", "3:5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected exactly one of --model NAME, --config PATH"),
        (("--hidden", "64", "--inter", "64"), "expected exactly one of --model NAME"),
        (("--model", "GLM-5", "--hidden", "64"), "expected exactly one of --model NAME"),
        (("--model", "Qwen3-235B-A23B"), "nearest: Qwen3-235B-A22B"),
        (("--model", "GLM-5", "--tp", "0"), "tp_size: expected an integer of at least 1, got 0"),
        (("--model", "GLM-5", "--quant", "fp9"), "quant: "),
        (("--model", "GLM-5", "--quant", "int4_group"), "pass the checkpoint's group size"),
        (("--config", "/nonexistent/config.json"), "/nonexistent/config.json"),
    ],
)
def test_command_errors(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
