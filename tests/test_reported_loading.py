"""Loading faults that serving frameworks had, one test each, named after the report."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import moepad
import numpy as np
import pytest
from checkpoints import FORMATS, PREFIX, make_checkpoint
from moepad import reference
from moepad.checkpoint import NUMPY_DTYPES
from moepad.testing import check_bits, poison
from moepad.verify import poison_pads
from numpy.typing import NDArray
from test_quantised_weights import check_experts, held_by, make, plans_of, sizes_of
from test_weights import Ranks, addresses, bits_of, check_same

Array = NDArray[Any]

MX = FORMATS["quark mxfp4"]
BLOCK = FORMATS["hf fp8 block"]
# Intermediate sizes of published models, whole and split.
WIDTHS = (32, 48, 64, 96, 176, 192, 224, 360, 384, 448, 704, 720, 896, 928, 1440, 1856, 2880)
ALONE = Ranks(1, 1, "true", 1)


def loaded(form: Any, n_inter: int, ranks: Ranks = ALONE, **sizes: int) -> list[moepad.Experts]:
    every = sizes_of(form, n_inter=n_inter, **{"n_hidden": 32, "n_expert": 2, **sizes})
    if form.quant == "fp8_block":
        every["block"] = (128, 128)
    tensors = make(form, every)[1]
    return [moepad.load_experts(tensors, PREFIX, plan) for plan in plans_of(every, ranks)]


@pytest.mark.parametrize("align", [1, 128, 256])
@pytest.mark.parametrize("n_inter", WIDTHS)
def test_sglang_33090_scales_padded_like_weights(n_inter: int, align: int) -> None:
    """Weights in raw sizes, scales in padded ones: here either tells the other's size."""
    (experts,) = loaded(MX, n_inter, Ranks(1, 1, "true", align))
    assert experts.w13_scale is not None and experts.w2_scale is not None
    assert experts.w13.shape[1] == experts.w13_scale.shape[1]
    assert experts.w13_scale.shape[2] * 32 == experts.w13.shape[2] * 2
    assert experts.w2_scale.shape[2] == -(-experts.w2.shape[2] * 2 // 32)


def test_sglang_36097_ungated_has_no_second_half() -> None:
    """Nemotron-3: a w13 sized for gate and up, its second half not initialised."""
    (experts,) = loaded(FORMATS["mxfp8 inv"], 1856, Ranks(1, 1, "true", 128))
    assert experts.plan.n_inter_pad == 1920 == experts.w13.shape[1]
    assert not experts.w13[:, 1856:].view(np.uint8).any()


def test_vllm_55251_pads_are_zero_whatever_memory_held() -> None:
    """Gemma4, 704 padded to 768: pads came from memory that was not cleared."""
    dirty = [poison(np.empty(3 * 768 * 64, np.uint8)) for _ in range(64)]
    del dirty
    (experts,) = loaded(FORMATS["ct fp8 channel"], 704, Ranks(1, 1, "true", 256))
    w13 = experts.w13.view(np.uint8).reshape(2, 2, 768, 32)
    assert not w13[:, :, 704:].any() and w13[:, :, :704].any(axis=3).all()
    assert not experts.w2.view(np.uint8)[:, :, 704:].any()


@pytest.mark.parametrize("split", ["true", "padded", "block"])
@pytest.mark.parametrize("tp_size", [4, 8])
@pytest.mark.parametrize("name", ["quark mxfp4", "hf fp8 block", "ct fp8 channel", "ct int4"])
def test_vllm_42595_ranks_together_are_the_checkpoint(name: str, tp_size: int, split: str) -> None:
    """Offsets from the padded size for weights and the true one for scales: rows lost or twice."""
    form = FORMATS[name]
    sizes = {**sizes_of(form, n_inter=1536, n_hidden=32, n_expert=1)}
    if form.quant == "fp8_block":
        sizes["block"] = (128, 128)
    tensors = make(form, sizes)[1]
    found: dict[str, list[Array]] = {}
    for plan in plans_of(sizes, Ranks(tp_size, 1, split, 128)):
        for key, part in moepad.load_experts(tensors, PREFIX, plan).state_dict().items():
            found.setdefault(key, []).append(part)
    for key, whole in tensors.items():
        if "input_scale" not in key and "shape" not in key:
            axis = 1 if "down" in key and whole.ndim == 2 else 0
            parts = [part for part in found[key] if part.ndim == whole.ndim]
            check_bits(np.concatenate(parts, axis), whole)


def test_vllm_40390_addresses_stay() -> None:
    """An update into new tensors, while captured graphs read the old ones."""
    (experts,) = loaded(MX, 192)
    before = addresses(experts)
    experts.update(make(MX, sizes_of(MX, n_inter=192, n_hidden=32, n_expert=2), seed=5)[1])
    assert addresses(experts) == before


def test_sglang_33500_scales_of_pads_are_harmless() -> None:
    """Placeholders of e8m0 zero are 2^-127; those of 255 are NaN."""
    for form in (MX, FORMATS["ct int4"], FORMATS["mxfp8"]):
        (experts,) = loaded(form, 96, Ranks(1, 1, "true", 256))
        assert experts.w13_scale is not None and experts.w2_scale is not None
        for pad in (experts.w13_scale[:, 96:256], experts.w2_scale[:, :, 3:]):
            assert pad.size and (pad.astype(np.float32) == 1).all()


def test_ranks_without_columns_give_zero() -> None:
    """SGLang's split of 1536 over 8 leaves two ranks nothing: zeros, no NaN."""
    x = np.ones((2, 32), ml_dtypes.bfloat16)
    routing = np.ones((2, 2), np.float32), np.array([[0, 1]] * 2)
    for form in (
        BLOCK,
        MX,
        FORMATS["ct fp8 channel"],
        FORMATS["ct int4"],
        FORMATS["ct fp8 tensor"],
    ):
        for experts in loaded(form, 1536, Ranks(8, 1, "padded", 128))[6:]:
            assert experts.plan.n_inter == 0
            poison_pads(experts)
            assert not experts(x, *routing).view(np.uint16).any()


@pytest.mark.parametrize("n_inter", [1536, 1280, 512, 1408, 1792])
def test_vllm_39046_blocks_of_128_at_tp8(n_inter: int) -> None:
    """192 is not divisible by 128: MiniMax-M2, Qwen3-235B, Step-3.5 at TP8 did not load."""
    for split in ("true", "block", "padded"):
        columns = 0
        for experts in loaded(BLOCK, n_inter, Ranks(8, 1, split, 128)):
            plan = experts.plan
            columns += plan.n_inter
            first, last = plan.start // 128, -(-plan.stop // 128)
            assert experts.w2_scale is not None
            assert experts.w2_scale.shape[2] == (last - first if plan.n_inter else 0)
        assert columns == n_inter


def test_sglang_twelve_scale_blocks_over_eight_ranks() -> None:
    """12 // 8 is one block a rank and four lost: here every block has its rank."""
    held: set[int] = set()
    for experts in loaded(BLOCK, 1536, Ranks(8, 1, "true", 1)):
        plan = experts.plan
        held |= set(range(plan.w2_scale_start, -(-plan.stop // 128)))
    assert held == set(range(12))


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_vllm_41330_gpt_oss_at_tp2(tp_size: int) -> None:
    """90 groups of 32 over the ranks, in a format that swizzles by 256."""
    form = FORMATS["gpt-oss"]
    sizes = sizes_of(form, n_inter=2880, n_hidden=64, n_expert=1)
    layer, tensors = make(form, sizes)
    for plan in plans_of(sizes, Ranks(tp_size, 1, "true", 256)):
        check_experts(moepad.load_experts(tensors, PREFIX, plan), layer)


@pytest.mark.parametrize("n_group", [1, 3, 11, 90])
def test_vllm_ascend_16100_odd_group_counts(n_group: int) -> None:
    """Gemma4's w2 scale [128, 2816, 11]."""
    sizes = sizes_of(MX, n_inter=32 * n_group, n_hidden=32 * n_group, n_expert=1)
    layer, tensors = make(MX, sizes)
    for plan in plans_of(sizes, Ranks(2, 1, "true", 1)):
        check_experts(moepad.load_experts(tensors, PREFIX, plan), layer)


@pytest.mark.parametrize("tp_size", [2, 4, 8, 16])
def test_tensorrt_llm_16198_no_aligned_split(tp_size: int) -> None:
    """Nemotron-Nano's 1856 is 64 * 29."""
    form = FORMATS["modelopt fp8"]
    sizes = sizes_of(form, n_inter=1856, n_hidden=32, n_expert=1)
    layer, tensors = make(form, sizes)
    for plan in plans_of(sizes, Ranks(tp_size, 1, "true", 64)):
        check_experts(moepad.load_experts(tensors, PREFIX, plan), layer)


@pytest.mark.parametrize("name", ["quark mxfp4", "hf fp8 block", "gpt-oss", "ct int4"])
def test_sglang_26794_loading_again_is_loading_fresh(name: str) -> None:
    """The second load met tensors in another shape than the first; also after a dummy load."""
    form = FORMATS[name]
    sizes = sizes_of(form, n_inter=192)
    plan = moepad.plan(**sizes, tp_size=3, tp_rank=2, align=128)
    first, second = make(form, sizes)[1], make(form, sizes, seed=1)[1]
    dummy = {key: np.zeros_like(values) for key, values in first.items() if "shape" not in key}
    experts = moepad.load_experts(dummy, PREFIX, plan)
    for tensors in (second, first):
        experts.update(tensors)
        fresh = moepad.load_experts(tensors, PREFIX, plan)
        assert bits_of(experts) == bits_of(fresh)
        check_same(experts.state_dict(), fresh.state_dict())


def test_sglang_fused_w13_pads_each_half() -> None:
    """A fused [gate; up] padded as one block has its pad behind up."""
    for name, bias in (("fused", False), ("gpt_oss", True)):
        sizes = {"n_hidden": 8, "n_inter": 24, "n_expert": 2, "bias": bias}
        plan = moepad.plan(**sizes, align=32)
        experts = moepad.load_experts(make_checkpoint(name, **sizes), PREFIX, plan)
        plain = moepad.load_experts(make_checkpoint(name, **sizes), PREFIX, moepad.plan(**sizes))
        check_bits(experts.w13[:, :24], plain.w13[:, :24])
        check_bits(experts.w13[:, 32:56], plain.w13[:, 24:])


def test_sglang_fp8_tensor_halves_keep_their_scales() -> None:
    """w1 and w3 with different scales, requantised at the wrong row of a padded tensor."""
    form = FORMATS["ct fp8 tensor"]
    sizes = sizes_of(form, n_inter=192, n_hidden=32, n_expert=2)
    tensors = make(form, sizes)[1]
    padded = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes, align=128))
    plain = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))
    x = np.ones((1, 32), ml_dtypes.bfloat16)
    routing = np.ones((1, 1), np.float32), np.array([[1]])
    poison_pads(padded)
    check_bits(padded(x, *routing), plain(x, *routing))
    arrays, held = held_by(padded, *routing)
    assert np.isfinite(reference.fused_moe(x, *arrays, **held)).all()
    assert padded.w13_scale is not None and (padded.w13_scale[:, 0] != padded.w13_scale[:, 1]).all()


def test_vllm_mxfp4_every_backend_one_size() -> None:
    """Sizes are the plan's, for every form that stores a kind."""
    shapes = set()
    for name in ("quark mxfp4", "ct mxfp4", "v4 fp4", "fused mxfp4"):
        (experts,) = loaded(FORMATS[name], 1440, Ranks(1, 1, "true", 256))
        shapes.add(tuple((key, tensor.shape) for key, tensor in experts._tensors.items()))
        assert experts.w13.dtype == NUMPY_DTYPES[experts.plan.storage_dtype]
    assert len(shapes) == 1
