"""Quantised weights through fused_moe: every format on every instruction set, against the
specification, with poison in the pads of weights and scales; and the ways others went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import moepad
import numpy as np
import pytest
from cases import (
    DTYPES,
    FORMATS,
    MATRIX_INTER,
    QUANTISED,
    Call,
    Case,
    build,
    pad,
    params,
    solution,
    solve,
)
from conftest import require
from moepad import _core, reference
from moepad.testing import Guarded, check_bits, check_close, poison
from numpy.typing import NDArray

Array = NDArray[Any]

EACH_FORMAT = pytest.mark.parametrize(
    "form", FORMATS, ids=lambda form: "-".join(str(part) for part in form.values())
)
EACH_CASE = pytest.mark.parametrize("case", params(QUANTISED))
PACKED = [form for form in FORMATS if form["quant"] in ("mxfp4", "int4_group")]


@pytest.fixture
def isas() -> Iterator[Callable[[], Iterator[str]]]:
    """Every instruction set in turn, in one test, which then needs one reference."""

    def each() -> Iterator[str]:
        for name in _core.cpu_isas():
            _core.set_cpu_isa(name)
            yield name

    yield each
    _core.set_cpu_isa(None)


Isas = Callable[[], Iterator[str]]


@EACH_CASE
def test_equals_reference(case: Case, isas: Isas) -> None:
    for dtype in case.dtypes:
        call = build(case, dtype)
        before = {name: tensor.tobytes() for name, tensor in call.tensors().items()}
        for _ in isas():
            guard = Guarded(call.hidden_states.shape, DTYPES[dtype])
            call.run(moepad.fused_moe, out=guard.array)
            guard.check()
            check_close(guard.array, *solve(case, dtype))
        assert before == {name: tensor.tobytes() for name, tensor in call.tensors().items()}


# A strided case's tensors are views into poison already.
@pytest.mark.parametrize("case", params([case for case in QUANTISED if not case.is_strided]))
def test_pads_do_not_matter(case: Case, isas: Isas) -> None:
    """What is beyond the true sizes, scales included, holds NaN or faults when it is read."""
    call = build(case, case.dtypes[0])
    to = -(-(case.n_inter + 1) // 128) * 128
    wide = case.n_hidden + 34
    padded = [
        pad(call, to, edge="after"),
        pad(call, to, n_hidden_pad=wide, pattern="infinity", edge="before"),
    ]
    for _ in isas():
        expected = call.run(moepad.fused_moe)
        for other in padded:
            out = other.run(moepad.fused_moe)
            assert not out[:, case.n_hidden :].any()
            check_bits(np.ascontiguousarray(out[:, : case.n_hidden]), expected)


@pytest.mark.parametrize("n_inter", [1, 31, 33, 63, 95])
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("form", PACKED, ids=lambda form: form["quant"] + str(form.get("block")))
def test_half_a_byte_is_pad(form: dict[str, Any], is_gated: bool, n_inter: int, isas: Isas) -> None:
    case = Case("odd", "", n_inter=96, n_hidden=64, is_gated=is_gated, n_token=7, **form)
    call = build(case, "f32")
    padded = pad(call, 128, n_inter=n_inter)
    call.options["n_inter"] = n_inter
    right = solution(call)
    for _ in isas():
        expected = call.run(moepad.fused_moe)
        check_close(expected, *right)
        check_bits(padded.run(moepad.fused_moe), expected)


def test_an_odd_width_has_half_a_byte_too(isas: Isas) -> None:
    case = Case("odd-h", "", n_inter=48, n_hidden=65, n_token=5, quant="mxfp4")
    call = build(case, "f32")
    assert call.w13.shape[2] == 33
    for _ in isas():
        expected = call.run(moepad.fused_moe)
        check_close(expected, *solve(case, "f32"))
        spoiled = Call(*call.args, call.options)
        spoiled.w13 = call.w13.copy()
        spoiled.w13[:, :, -1] ^= 0x50
        check_bits(spoiled.run(moepad.fused_moe), expected)


@EACH_FORMAT
@pytest.mark.parametrize("n_token", [1, 3, 64])
def test_threads_do_not_matter(
    form: dict[str, Any], n_token: int, n_thread: Callable[[int], None], isas: Isas
) -> None:
    case = Case("threads", "", n_token=n_token, n_hidden=544, n_inter=288, n_expert=6, **form)
    call = build(case, "bf16")
    for _ in isas():
        results = []
        for n in (1, 2, 7):
            n_thread(n)
            results.append(call.run(moepad.fused_moe))
        check_bits(results[1], results[0])
        check_bits(results[2], results[0])


@EACH_FORMAT
def test_activations_of_each_type(form: dict[str, Any], isas: Isas) -> None:
    for dtype in ("f32", "bf16", "f16"):
        for n_token in (2, 40):
            case = Case(f"types-{n_token}", "", n_token=n_token, n_hidden=80, n_inter=64, **form)
            call = build(case, dtype)
            for _ in isas():
                check_close(call.run(moepad.fused_moe), *solve(case, dtype))


# ---- every code ----

DTYPES_OF_WEIGHTS = {
    "f8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "f8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "f8_e5m2": ml_dtypes.float8_e5m2,
}


def code_call(form: dict[str, Any], n_token: int, first: int) -> Call:
    """Tokens `first` on of a layer whose output is w2 itself.

    Row c of w2 holds codes 4c to 4c + 3, so that a NaN or an infinity, which spreads over its row,
    hides no other code. One-hot tokens through an identity pick a column each. All scales are
    powers of two, so that the result is exact.
    """
    n, quant = 64, form["quant"]
    eye = np.eye(n, dtype=np.uint8)[None]
    codes = (4 * np.arange(n)[:, None] + np.arange(n) % 4).astype(np.uint8)[None]
    power = (2.0 ** (np.arange(n) % 7 - 3)).astype(np.float32)[None]
    scales = {"w13_scale": np.ones((1, n), np.float32), "w2_scale": power}
    if quant.startswith("fp8"):
        dtype = DTYPES_OF_WEIGHTS[form.get("weight", "f8_e4m3fn")]
        w13, w2 = eye.astype(dtype), codes.view(dtype)
        if quant == "fp8_tensor":
            scales = {"w13_scale": np.ones(1, np.float32), "w2_scale": np.full(1, 0.25, np.float32)}
        elif quant == "fp8_block":
            rows, columns = (-(-n // size) for size in form.get("block", (128, 128)))
            scales["w13_scale"] = np.ones((1, rows, columns), np.float32)
            scales["w2_scale"] = power[:, : rows * columns].reshape(1, rows, columns)
    elif quant == "int8_channel":
        w13, w2 = eye.view(np.int8), codes.view(np.int8)
    else:
        each = np.repeat(power[:, :, None], 2, axis=2)
        each[:, :, 1] *= 4
        scales = {"w13_scale": np.ones_like(each), "w2_scale": each}
        if quant.startswith("mx"):
            scales = {name: (np.log2(s) + 127).astype(np.uint8) for name, s in scales.items()}
        w13, w2 = eye.astype(ml_dtypes.float8_e4m3fn), codes.view(ml_dtypes.float8_e4m3fn)
        if quant != "mxfp8":
            unit, zero = (2, 0) if quant == "mxfp4" else (1, 8)
            nibble = unit * eye + zero
            w13 = nibble[:, :, ::2] | nibble[:, :, 1::2] << 4
            w2 = np.ascontiguousarray(codes[:, :, : n // 2])
    options: dict[str, Any] = {"quant": quant, "activation": "relu2", **scales}
    if quant in ("fp8_block", "int4_group"):
        options["block"] = (1, 32) if quant == "int4_group" else form.get("block", (128, 128))
    x = np.eye(n, dtype=np.float32)[np.arange(first, first + n_token) % n]
    routing = np.ones((n_token, 1), np.float32), np.zeros((n_token, 1), np.int32)
    return Call(x, w13, w2, *routing, options)


@pytest.mark.parametrize("n_token", [1, 3, 64])
@EACH_FORMAT
def test_every_code(form: dict[str, Any], n_token: int, isas: Isas) -> None:
    for first in range(0, 4, n_token):
        call = code_call(form, n_token, first)
        with np.errstate(all="ignore"):
            expected = call.run(reference.fused_moe).astype(np.float32)
        for _ in isas():
            np.testing.assert_array_equal(call.run(moepad.fused_moe), expected)


def scale_call(n_token: int) -> Call:
    """256 rows of w2, one per e8m0 scale, of which the product is that scale."""
    w13 = np.full((1, 32, 32), 1, ml_dtypes.float8_e4m3fn)
    w13[0, 1:] = 0
    w2 = np.full((1, 256, 32), 1, ml_dtypes.float8_e4m3fn)
    x = np.zeros((n_token, 256), np.float32)
    x[:, 0] = 1
    one = np.full((1, 32, 8), 127, np.uint8)
    w13 = np.concatenate([w13, np.zeros((1, 32, 224), w13.dtype)], axis=2)
    scale = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
    options = {"quant": "mxfp8", "activation": "relu2", "w13_scale": one, "w2_scale": scale}
    weights, ids = np.ones((n_token, 1), np.float32), np.zeros((n_token, 1), np.int32)
    return Call(x, w13, w2, weights, ids, options)


EVERY_SCALE = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)


@pytest.mark.parametrize("n_token", [1, 40])
def test_every_e8m0(n_token: int, isas: Isas) -> None:
    call = scale_call(n_token)
    for _ in isas():
        out = call.run(moepad.fused_moe)
        np.testing.assert_array_equal(out, np.tile(EVERY_SCALE.astype(np.float32), (n_token, 1)))
        typed = {name: call.options[name].view(EVERY_SCALE.dtype)
                 for name in ("w13_scale", "w2_scale")}  # fmt: skip
        check_bits(call.run(moepad.fused_moe, **typed), out)


@pytest.mark.parametrize("n_token", [1, 64])
def test_flushing_of_the_caller_does_not_matter(n_token: int, isas: Isas) -> None:
    """torch.set_flush_denormal sets DAZ and FTZ, which would lose subnormal codes and scales."""
    torch = require("torch")
    calls = [scale_call(n_token)]
    for weight in ("f8_e4m3fn", "f8_e4m3fnuz", "f8_e5m2"):
        calls.append(code_call({"quant": "fp8_channel", "weight": weight}, n_token, 0))
    for _ in isas():
        expected = [call.run(moepad.fused_moe) for call in calls]
        assert torch.set_flush_denormal(True)
        try:
            results = [call.run(moepad.fused_moe) for call in calls]
        finally:
            torch.set_flush_denormal(False)
        for result, right in zip(results, expected, strict=True):
            check_bits(result, right)


# ---- scales ----


def test_a_trailing_one_is_accepted() -> None:
    for quant in ("fp8_channel", "int8_channel", "fp8_tensor"):
        call = build(Case("trailing", "", quant=quant), "f32")
        expected = call.run(moepad.fused_moe)
        scale = call.options["w2_scale"]
        more = {"w2_scale": scale[..., None]}
        if quant != "fp8_tensor":
            more["w13_scale"] = call.options["w13_scale"][..., None]
        check_bits(call.run(moepad.fused_moe, **more), expected)


@pytest.mark.parametrize("gate_up", ["concat", "interleaved"])
def test_one_tensor_scale_serves_both_halves(gate_up: Any) -> None:
    call = build(Case("tensor", "", quant="fp8_tensor", gate_up=gate_up), "f32")
    both = call.options["w13_scale"]
    assert both.shape == (4, 2) and (both[:, 0] != both[:, 1]).all()
    alike = np.repeat(both[:, :1], 2, axis=1)
    expected = call.run(moepad.fused_moe, w13_scale=alike)
    for one in (both[:, 0].copy(), both[:, :1].copy()):
        check_bits(call.run(moepad.fused_moe, w13_scale=one), expected)
    assert (call.run(moepad.fused_moe) != expected).any()


def test_torch_tensors_give_the_same_bits() -> None:
    torch = require("torch")
    kinds = {
        "fp8_channel": torch.float8_e4m3fn, "mxfp8": torch.float8_e4m3fn,
        "mxfp4": torch.uint8, "int8_channel": torch.int8,
    }  # fmt: skip
    for quant, dtype in kinds.items():
        call = build(Case("torch", "", quant=quant), "f32")
        expected = call.run(moepad.fused_moe)
        args = [torch.from_numpy(a.view(np.uint8)).view(dtype) if a.dtype.itemsize == 1 else
                torch.from_numpy(a) for a in call.args]  # fmt: skip
        options = dict(call.options)
        for name in ("w13_scale", "w2_scale"):
            options[name] = torch.from_numpy(options[name])
        check_bits(moepad.fused_moe(*args, **options).numpy(), expected)
        if quant.startswith("mx"):
            for name in ("w13_scale", "w2_scale"):
                options[name] = options[name].view(torch.float8_e8m0fnu)
            check_bits(moepad.fused_moe(*args, **options).numpy(), expected)


@pytest.mark.parametrize("tp_size", [2, 4, 8, 16])
@pytest.mark.parametrize("block", [(128, 128), (64, 128), (128, 32)])
def test_ranks_add_up_to_the_whole(block: tuple[int, int], tp_size: int) -> None:
    """vLLM #48173: 1536 columns over 8 ranks are 192 each, one and a half blocks."""
    n_inter, n_hidden, n_expert = 768, 160, 3
    case = Case("tp", "", n_token=9, n_hidden=n_hidden, n_inter=n_inter, n_expert=n_expert,
                quant="fp8_block", block=block)  # fmt: skip
    whole = build(case, "f32")
    total = np.zeros(whole.hidden_states.shape, np.float64)
    phases = set()
    for rank in range(tp_size):
        plan = moepad.plan(n_hidden, n_inter, n_expert, quant="fp8_block", block=block,
                           tp_size=tp_size, tp_rank=rank)  # fmt: skip
        phases.add(plan.scale_phase)
        half = [slice(start + plan.start, start + plan.stop) for start in (0, n_inter)]
        w13 = np.concatenate([whole.w13[:, part] for part in half], axis=1)
        n_block = whole.options["w13_scale"].shape[1] // 2
        first, n = plan.w13_scale_start, plan.w13_scale_shape[1] // 2
        scale13 = np.concatenate(
            [whole.options["w13_scale"][:, start + first :][:, :n] for start in (0, n_block)],
            axis=1,
        )
        first, n = plan.w2_scale_start, plan.w2_scale_shape[2]
        scale2 = np.ascontiguousarray(whole.options["w2_scale"][:, :, first : first + n])
        w2 = np.ascontiguousarray(whole.w2[:, :, plan.start : plan.stop])
        part = Call(whole.hidden_states, w13, w2, whole.topk_weights, whole.topk_ids,
                    {"quant": "fp8_block", "block": block, "w13_scale": scale13,
                     "w2_scale": scale2, "scale_phase": plan.scale_phase})  # fmt: skip
        total += part.run(moepad.fused_moe)
    assert len(phases) > 1 or n_inter // tp_size % max(block) == 0
    check_close(total.astype(np.float32), *solve(case, "f32"))


def test_groups_beyond_what_is_held_at_a_time(isas: Isas) -> None:
    """Rows of more than 512 groups of scales."""
    for quant in ("mxfp4", "fp8_block"):
        case = Case(f"long-{quant}", "", n_token=2, n_hidden=16_512, n_inter=8, n_expert=1,
                    n_topk=1, quant=quant)  # fmt: skip
        call = build(case, "bf16")
        for _ in isas():
            check_close(call.run(moepad.fused_moe), *solve(case, "bf16"))


# ---- how others went wrong ----

SMALL = Case("reports", "", n_token=5, n_hidden=96, n_inter=96, quant="mxfp4")


def test_sglang_33090_scales_padded_and_weights_not() -> None:
    """Weights of 128 columns with scales of 256 are refused, in either direction."""
    small, large = (build(replace(SMALL, n_inter=n), "f32") for n in (128, 256))
    for a, b in ((small, large), (large, small)):
        for name in ("w13_scale", "w2_scale"):
            with pytest.raises(ValueError, match=name):
                a.run(moepad.fused_moe, **{name: b.options[name]})


def test_sglang_36097_no_gate_has_no_second_half() -> None:
    call = build(replace(SMALL, quant="mxfp8", activation="relu2", is_gated=False), "f32")
    assert call.w13.shape[1] == 96
    with pytest.raises(ValueError, match="w13"):
        call.w13 = np.concatenate([call.w13, call.w13[:, :1]], axis=1)
        call.run(moepad.fused_moe)


def test_vllm_55251_pads_from_uninitialised_memory() -> None:
    call = build(replace(SMALL, quant="fp8_channel", n_inter=88), "f32")
    results = [pad(call, 128, pattern=name).run(moepad.fused_moe)
               for name in ("nan", "zero", "largest")]  # fmt: skip
    check_bits(results[1], results[0])
    check_bits(results[2], results[0])


def test_vllm_46201_a_pad_that_cuts_data_or_exceeds_the_tensor() -> None:
    call = build(SMALL, "f32")
    expected = call.run(moepad.fused_moe)
    check_bits(call.run(moepad.fused_moe, n_inter=96), expected)
    with pytest.raises(ValueError, match="n_inter: expected at most n_inter_pad=96"):
        call.run(moepad.fused_moe, n_inter=97)
    assert (call.run(moepad.fused_moe, n_inter=95) != expected).any()


@EACH_FORMAT
def test_aiter_3538_scratch_memory_that_is_read_before_it_is_written(form: dict[str, Any]) -> None:
    for n_token in (1, 33):
        call = build(replace(SMALL, n_token=n_token, n_inter=64, n_hidden=97, **form), "bf16")
        guard = Guarded((call.run(moepad.workspace_nbytes),), np.uint8)
        start = -guard.array.ctypes.data % 64
        assert start == 0
        out = call.run(moepad.fused_moe, workspace=guard.array)
        guard.check()
        check_bits(out, call.run(moepad.fused_moe))


def test_sglang_33500_pad_scales_hold_anything() -> None:
    call = build(SMALL, "f32")
    padded = pad(call, 256)
    results = []
    for byte in (0, 127, 255):
        for name in ("w13_scale", "w2_scale"):
            scale = padded.options[name]
            kept = scale.copy()
            scale[...] = byte
            where = np.s_[:, :, :3]
            if name == "w13_scale":
                scale[:, :96], scale[:, 256:352] = kept[:, :96], kept[:, 256:352]
            else:
                scale[where] = kept[where]
        results.append(padded.run(moepad.fused_moe))
    check_bits(results[0], call.run(moepad.fused_moe))
    check_bits(results[1], results[0])
    check_bits(results[2], results[0])


@pytest.mark.parametrize("n_token", [1, 2, 31, 32, 1024])
def test_aiter_4032_finite_in_finite_out(n_token: int, isas: Isas) -> None:
    call = build(replace(SMALL, n_token=n_token), "bf16")
    for _ in isas():
        assert np.isfinite(call.run(moepad.fused_moe).astype(np.float32)).all()


@EACH_FORMAT
def test_zero_weights_give_exact_zeros(form: dict[str, Any], isas: Isas) -> None:
    """A rank all of whose columns are zero (aiter #4195: an amax of zero)."""
    case = replace(SMALL, n_inter=64, **form)
    call = build(case, "bf16")
    zero = 0x88 if form["quant"] == "int4_group" else 0
    call.w13.view(np.uint8)[...] = zero
    call.w2.view(np.uint8)[...] = zero
    for _ in isas():
        assert not call.run(moepad.fused_moe).any()


@pytest.mark.parametrize("n_inter", [96, 224, 704])
@EACH_FORMAT
def test_vllm_38833_no_size_is_without_a_kernel(form: dict[str, Any], n_inter: int) -> None:
    case = replace(SMALL, n_inter=n_inter, n_token=2, **form)
    check_close(build(case, "bf16").run(moepad.fused_moe), *solve(case, "bf16"))


@pytest.mark.parametrize("n_inter", [128, 384, 640, 768])
@EACH_FORMAT
def test_aiter_5233_second_product_at_every_width(form: dict[str, Any], n_inter: int) -> None:
    """Wrong by a factor of ten at 384 and 640."""
    case = replace(SMALL, n_inter=n_inter, n_token=9, **form)
    check_close(build(case, "bf16").run(moepad.fused_moe), *solve(case, "bf16"))


@pytest.mark.parametrize("n", [32, 288, 544])
@pytest.mark.parametrize("quant", ["mxfp4", "mxfp8"])
def test_aiter_2900_scales_where_256_does_not_divide(quant: str, n: int, isas: Isas) -> None:
    """Scales strided by one width, weights by another: each block has a scale of its own here."""
    case = replace(SMALL, n_hidden=n, n_inter=n, quant=quant)
    call = build(case, "bf16")
    for _ in isas():
        check_close(call.run(moepad.fused_moe), *solve(case, "bf16"))


@pytest.mark.parametrize("n_inter", [192, 384])
def test_vllm_19234_block_fp8_where_256_does_not_divide(n_inter: int, isas: Isas) -> None:
    case = replace(SMALL, n_hidden=256, n_inter=n_inter, quant="fp8_block")
    call = build(case, "bf16")
    for _ in isas():
        check_close(call.run(moepad.fused_moe), *solve(case, "bf16"))


def test_sglang_14114_glm_air_at_tp2(isas: Isas) -> None:
    """704 columns per channel: "This GEMM is not supported!"."""
    case = replace(SMALL, n_inter=704, n_token=33, quant="fp8_channel")
    call = build(case, "bf16")
    for _ in isas():
        check_close(call.run(moepad.fused_moe), *solve(case, "bf16"))


@EACH_FORMAT
def test_sglang_28244_a_refusal_leaves_the_weights_as_they_were(form: dict[str, Any]) -> None:
    """At 96 columns the weights were shuffled first, and then no kernel was found for them."""
    call = build(replace(SMALL, **form), "bf16")
    before, expected = call.w13.tobytes(), call.run(moepad.fused_moe)
    with pytest.raises(moepad.UnsupportedError, match="layout"):
        call.run(moepad.fused_moe, layout="shuffle_16x16")
    assert call.w13.tobytes() == before
    check_bits(call.run(moepad.fused_moe), expected)


@EACH_FORMAT
def test_sglang_39804_nan_in_padded_tokens(form: dict[str, Any], isas: Isas) -> None:
    call = build(replace(SMALL, n_token=40, n_inter=64, **form), "bf16")
    for _ in isas():
        expected = call.run(moepad.fused_moe)
        spoiled = Call(call.hidden_states.copy(), *call.args[1:], call.options)
        poison(spoiled.hidden_states[33:])
        check_bits(spoiled.run(moepad.fused_moe)[:33], expected[:33])


@EACH_FORMAT
def test_aiter_3677_a_weight_of_zero_is_no_skip(form: dict[str, Any]) -> None:
    call = build(replace(SMALL, n_inter=64, **form), "bf16")
    call.topk_weights[3] = 0
    out = call.run(moepad.fused_moe)
    assert not out[3].any() and np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize("quant", ["fp8_channel", "mxfp4"])
def test_sglang_23084_shared_expert_of_another_width(quant: str, isas: Isas) -> None:
    """A shared slot of 64 true columns fused with routed ones of 96: zeros, at their scales."""
    call = build(replace(SMALL, quant=quant), "bf16")
    call.topk_ids[:, 1] = 3
    call.w13[3, 64:96] = call.w13[3, 160:] = 0
    poison(call.w2[3, :, 64 * call.w2.shape[2] // 96 :], "zero")
    right = solution(call)
    for _ in isas():
        check_close(call.run(moepad.fused_moe), *right)


@pytest.mark.parametrize("n_group", [1, 3, 11, 90])
@pytest.mark.parametrize("quant", ["mxfp4", "mxfp8"])
def test_vllm_ascend_16100_odd_counts_of_groups(quant: str, n_group: int) -> None:
    case = replace(SMALL, n_inter=32 * n_group, quant=quant, n_token=2)
    check_close(build(case, "bf16").run(moepad.fused_moe), *solve(case, "bf16"))


@pytest.mark.parametrize("n_inter", MATRIX_INTER)
@EACH_FORMAT
def test_scales_cover_their_weights(form: dict[str, Any], n_inter: int) -> None:
    """The plan's shapes are the ones the call takes, at every size and alignment."""
    quant, block = form["quant"], form.get("block", (128, 128))
    dtype = form.get("weight", "f8_e4m3fn") if quant.startswith("fp8") else "f32"
    for align in (1, 128):
        plan = moepad.plan(64, n_inter, 2, quant=quant, dtype=dtype, block=block, align=align)
        names = {"f8_e4m3fn": "float8_e4m3fn", "f8_e4m3fnuz": "float8_e4m3fnuz",
                 "f8_e5m2": "float8_e5m2", "u8": "uint8", "i8": "int8"}  # fmt: skip
        kind: Any = getattr(ml_dtypes, names[plan.storage_dtype], None) or names[plan.storage_dtype]
        scale: Any = np.uint8 if quant.startswith("mx") else np.float32
        call = Call(
            np.zeros((1, 64), np.float32), np.zeros(plan.w13_shape, kind),
            np.zeros(plan.w2_shape, kind), np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32),
            {"quant": quant, "block": block, "n_inter": n_inter,
             "w13_scale": np.ones(plan.w13_scale_shape, scale),
             "w2_scale": np.ones(plan.w2_scale_shape, scale)},
        )  # fmt: skip
        assert call.run(moepad.workspace_nbytes) > 0


def test_unused_experts_are_not_read(isas: Isas) -> None:
    for form in FORMATS:
        case = Case(f"unused-{form}", "", n_token=9, n_expert=5, n_inter=64, routing="even", **form)
        call = build(case, "f32")
        for name in ("w13_scale", "w2_scale"):
            poison(call.options[name][:1])
        for _ in isas():
            check_close(call.run(moepad.fused_moe), *solve(case, "f32"))


# ---- quantised activations ----

SCALED_INPUTS: list[dict[str, Any]] = [
    {**form, "input": "int8" if form["quant"] == "int8_channel" else "fp8"}
    for form in FORMATS
    if form["quant"] in ("fp8_tensor", "fp8_channel", "fp8_block", "int8_channel")
]
MX_INPUTS: list[dict[str, Any]] = [
    {"quant": "mxfp8", "input": "mxfp8"},
    {"quant": "mxfp4", "input": "mxfp8"},
    {"quant": "mxfp4", "input": "mxfp4"},
]
QUANTISED_INPUTS = SCALED_INPUTS + MX_INPUTS


def each(forms: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "form", forms, ids=lambda form: "-".join(str(part) for part in form.values())
    )


EACH_INPUT, EACH_SCALED_INPUT, EACH_MX_INPUT = map(
    each, (QUANTISED_INPUTS, SCALED_INPUTS, MX_INPUTS)
)


def input_call(form: dict[str, Any], dtype: str = "bf16", **sizes: Any) -> Call:
    of = {key: value for key, value in form.items() if key != "input"}
    sizes = {"n_token": 9, "n_hidden": 288, "n_inter": 352, "n_expert": 3, **sizes}
    call = build(Case("inputs", "", **sizes, **of), dtype)
    call.options["quant_activations"] = form["input"]
    return call


EACH_LAYER = pytest.mark.parametrize(
    "layer",
    [{}, {"activation": "relu2", "is_gated": False}, {"bias": "both"}, {"weight_on_input": True}],
    ids=["silu", "relu2", "bias", "weight_on_input"],
)


@EACH_LAYER
@EACH_INPUT
def test_quantised_activations(form: dict[str, Any], layer: dict[str, Any], isas: Isas) -> None:
    check_input(input_call(form, **layer), isas)


@EACH_LAYER
@EACH_SCALED_INPUT
def test_fixed_scales_of_activations(
    form: dict[str, Any], layer: dict[str, Any], isas: Isas
) -> None:
    call = input_call(form, **layer)
    call.options["x_scale"] = np.array([0.01], np.float32)
    call.options["h_scale"] = np.array([0.003], np.float32)
    check_input(call, isas)


def check_input(call: Call, isas: Isas) -> None:
    """Right, not what it is without, and the same in pads of poison."""
    right = solution(call)
    exact = Call(*call.args, {**call.options, "quant_activations": "none"})
    for name in ("x_scale", "h_scale"):
        exact.options.pop(name, None)
    padded = pad(call, 384, n_hidden_pad=320)
    for _ in isas():
        out = call.run(moepad.fused_moe)
        check_close(out, *right)
        assert (out != exact.run(moepad.fused_moe)).any()
        check_bits(np.ascontiguousarray(padded.run(moepad.fused_moe)[:, :288]), out)


@EACH_INPUT
@pytest.mark.parametrize("n_token", [1, 40])
def test_quantised_float16_activations(form: dict[str, Any], n_token: int, isas: Isas) -> None:
    call = input_call(form, "f16", n_token=n_token)
    right = solution(call)
    for _ in isas():
        check_close(call.run(moepad.fused_moe), *right)


@EACH_SCALED_INPUT
@pytest.mark.parametrize("n_token", [1, 40])
def test_quantised_float32_activations(form: dict[str, Any], n_token: int, isas: Isas) -> None:
    """Through an identity and at fixed powers of two h is exact, and so is the code it becomes."""
    call = input_call(form, "f32", n_token=n_token, n_inter=288, activation="relu2", is_gated=False)
    call.w13[...] = np.eye(288).astype(call.w13.dtype)
    call.options["w13_scale"][...] = 1
    call.options["x_scale"] = np.array([2.0**-6], np.float32)
    call.options["h_scale"] = np.array([2.0**-5], np.float32)
    right = solution(call)
    for _ in isas():
        check_close(call.run(moepad.fused_moe), *right)


def test_every_input_code(isas: Isas) -> None:
    """Every code, every border between two and its neighbours, subnormal and too large values.

    Both products are with an identity, so out is the code of the square of x's code.
    """
    for weight, fixed in (("f8_e4m3fn", 1.0), ("f8_e4m3fnuz", 1.0), ("f8_e4m3fn", 0.375)):
        form = {"quant": "fp8_channel", "weight": weight, "input": "fp8"}
        dtype = DTYPES_OF_WEIGHTS[weight]
        codes = np.sort(np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32))
        codes = np.unique(codes[np.isfinite(codes)])
        middle = (codes[1:] + codes[:-1]) / 2
        near = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
        values = np.concatenate([codes, middle, *near, [500, -500]]).astype(np.float32) * fixed
        n = 256
        x = np.zeros((-(-len(values) // n), n), np.float32)
        x.reshape(-1)[: len(values)] = values
        call = input_call(form, "f32", n_token=len(x), n_hidden=n, n_inter=n, n_expert=1, n_topk=1,
                          activation="relu2", is_gated=False)  # fmt: skip
        call.hidden_states, call.topk_weights[...] = x, 1
        call.w13[...] = call.w2[...] = np.eye(n).astype(dtype)
        for name in ("w13_scale", "w2_scale"):
            call.options[name][...] = 1
        call.options["x_scale"] = call.options["h_scale"] = np.array([fixed], np.float32)
        expected = call.run(reference.fused_moe).astype(np.float32)
        coded = (np.clip(x / np.float32(fixed), codes[0], codes[-1])).astype(dtype)
        h = np.maximum(coded.astype(np.float32) * np.float32(fixed), 0) ** 2
        again = np.clip(h / np.float32(fixed), codes[0], codes[-1]).astype(dtype)
        check_bits(again.astype(np.float32) * np.float32(fixed), expected)
        for _ in isas():
            check_bits(call.run(moepad.fused_moe), expected)


def test_groups_of_inputs_follow_the_scales_of_the_weights(isas: Isas) -> None:
    """Of two ranks, cut inside a block, each quantises its part of the block's columns alone."""
    form = {"quant": "fp8_block", "phase": 64, "input": "fp8"}
    call = input_call(form)
    shifted = Call(*call.args, {**call.options, "scale_phase": 0})
    assert (call.run(reference.fused_moe) != shifted.run(reference.fused_moe)).any()
    right = solution(call)
    for _ in isas():
        check_close(call.run(moepad.fused_moe), *right)


@pytest.mark.parametrize("n_token", [1, 2, 31, 257])
@pytest.mark.parametrize("n_inter", [1, 31, 33, 70, 200])
@EACH_MX_INPUT
def test_mx_activations_at_every_size(
    form: dict[str, Any], n_inter: int, n_token: int, isas: Isas
) -> None:
    """A row's last group is of what columns there are: its scale is not that of a pad."""
    layers: list[dict[str, Any]] = [
        {},
        {"activation": "swigluoai", "bias": "both", "swiglu_limit": 7.0},
        {"activation": "relu2", "is_gated": False},
    ]
    layer = layers[(n_inter + n_token) % 3]
    n_even = n_inter + (form["quant"] == "mxfp4" and n_inter % 2)
    source = input_call(form, n_token=n_token, n_hidden=72, n_inter=n_even, **layer)
    call = pad(source, n_even, n_inter=n_inter)
    padded = pad(source, n_inter // 64 * 64 + 64, n_inter=n_inter, n_hidden_pad=96)
    right = solution(call)
    for _ in isas():
        scratch = Guarded((padded.run(moepad.workspace_nbytes),), np.uint8)
        out = call.run(moepad.fused_moe)
        check_close(out, *right)
        wide = padded.run(moepad.fused_moe, workspace=scratch.array)
        scratch.check()
        check_bits(np.ascontiguousarray(wide[:, :72]), out)


def mx_codes(x: Array, form: dict[str, Any]) -> Array:
    """Rows of x as codes times scales, by the bits of float32 as AITER's quantiser has them."""
    is_fp4 = form["input"] == "mxfp4"
    dtype: Any = ml_dtypes.float4_e2m1fn if is_fp4 else ml_dtypes.float8_e4m3fn
    top, largest, half = (2, 6, 1 << 21) if is_fp4 else (8, 448, 1 << 19)
    groups = x.reshape(len(x), -1, 32)
    amax = np.abs(groups).max(axis=2, keepdims=True)
    exponent = np.minimum(amax.view(np.int32) + half >> 23, 254) - 127
    scale = np.ldexp(np.float32(1), np.maximum(exponent - top, -127))
    codes = np.clip(groups / scale, -largest, largest).astype(dtype).astype(np.float32)
    return (codes * scale).reshape(x.shape)


def mx_identity(form: dict[str, Any], x: Array) -> Call:
    """A call whose products are with identities: out is the code of the square of x's code."""
    n_token, n = x.shape
    call = input_call(form, "f32", n_token=n_token, n_hidden=n, n_inter=n, n_expert=1, n_topk=1,
                      activation="relu2", is_gated=False)  # fmt: skip
    call.hidden_states, call.topk_weights[...], call.topk_ids[...] = x, 1, 0
    if form["quant"] == "mxfp4":
        one = np.where(np.arange(n) % 2, 0x20, 0x02).astype(np.uint8)
        for w in (call.w13, call.w2):
            w[...] = 0
            w[0, np.arange(n), np.arange(n) // 2] = one
    else:
        call.w13[...] = call.w2[...] = np.eye(n).astype(call.w13.dtype)
    for name in ("w13_scale", "w2_scale"):
        call.options[name].view(np.uint8)[...] = 127
    return call


@EACH_MX_INPUT
def test_every_mx_code(form: dict[str, Any], isas: Isas) -> None:
    """Every code, every border between two and its neighbours, at scales with any largest value:
    powers of two, where the scale steps, and whatever clamps.
    """
    dtype: Any = ml_dtypes.float4_e2m1fn if form["input"] == "mxfp4" else ml_dtypes.float8_e4m3fn
    codes = np.arange(16 if form["input"] == "mxfp4" else 256, dtype=np.uint8).view(dtype)
    values = codes.astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middle = (values[1:] + values[:-1]) / 2
    near = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    values = np.concatenate([values, middle, *near]).astype(np.float32)
    largest = values.max()
    first = [largest, np.exp2(np.floor(np.log2(largest))), largest * 1.1]
    first += [np.nextafter(step * first[1], np.float32(0)) for step in (1.75, 1.9375, 2)]
    first += [1.75 * first[1], 1.9375 * first[1]]
    values = np.concatenate([values, np.zeros(-len(values) % 31, np.float32)]).reshape(-1, 31)
    rows = [np.insert(values, 0, np.float32(top), axis=1) for top in first]
    x = np.concatenate(rows) * np.exp2(np.arange(len(rows) * len(values)) % 9 - 4.0)[:, None]
    x = np.concatenate([x, np.zeros((-len(x) % 8, 32))]).astype(np.float32).reshape(-1, 256)
    call = mx_identity(form, x)
    expected = mx_codes(np.maximum(mx_codes(x, form), 0) ** 2, form)
    check_bits(call.run(reference.fused_moe).astype(np.float32), expected)
    for _ in isas():
        check_bits(call.run(moepad.fused_moe), expected)


@EACH_MX_INPUT
def test_mx_scales_at_the_ends(form: dict[str, Any], isas: Isas) -> None:
    """Zeros, subnormal values, those whose scale e8m0 has not, the largest float32."""
    most = np.finfo(np.float32).max
    amax = [0, 1e-45, 2.0**-133, 2.0**-127, 2.0**-126, 2.0**-119, 2.0**-118, 2.0**126, most]
    x = np.zeros((len(amax), 64), np.float32)
    x[:, 3], x[:, 4], x[:, 40] = amax, -np.array(amax) / 3, 1
    call = mx_identity(form, x)
    call.options |= {"activation": "silu"}
    call.options["w2_scale"].view(np.uint8)[...] = 125
    h = mx_codes(x, form)
    with np.errstate(over="ignore"):
        h = h / (1 + np.exp(-h.astype(np.float64)))
    expected = mx_codes(h.astype(np.float32), form) / 4 + np.float32(0)  # sums have no -0
    check_bits(call.run(reference.fused_moe).astype(np.float32), expected)
    for _ in isas():
        check_bits(call.run(moepad.fused_moe), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@EACH_MX_INPUT
def test_mx_activations_that_are_not_finite(form: dict[str, Any], bad: float, isas: Isas) -> None:
    """The token's row is NaN, and no other; the specification says the same."""
    call = input_call(form, n_token=40)
    clean = Call(call.hidden_states.copy(), *call.args[1:], call.options)
    call.hidden_states[7, 287] = bad
    assert np.isnan(call.run(reference.fused_moe)[7]).all()
    others = np.arange(40) != 7
    for _ in isas():
        out = call.run(moepad.fused_moe)
        assert np.isnan(out[7].astype(np.float32)).all()
        check_bits(out[others], clean.run(moepad.fused_moe)[others])


@EACH_MX_INPUT
def test_mx_codes_do_not_depend_on_the_cut(form: dict[str, Any], isas: Isas) -> None:
    """Two ranks' results, cut where a plan cuts, are the sums that one rank has."""
    call = input_call(form, "f32", n_inter=352, is_gated=False, activation="relu2")
    plans = [moepad.plan(288, 352, 3, gated=False, quant=form["quant"], dtype="f32", tp_size=2,
                         tp_rank=rank) for rank in (0, 1)]  # fmt: skip
    pack = 2 if form["quant"] == "mxfp4" else 1
    parts = []
    for plan in plans:
        at, group = slice(plan.start, plan.stop), slice(plan.start // 32, -(-plan.stop // 32))
        scales = {"w13_scale": call.options["w13_scale"][:, at],
                  "w2_scale": call.options["w2_scale"][:, :, group]}  # fmt: skip
        w2 = call.w2[:, :, plan.start // pack : plan.stop // pack]
        parts.append(Call(call.hidden_states, call.w13[:, at], w2, *call.args[3:],
                          {**call.options, **scales}))  # fmt: skip
    assert 0 < plans[0].stop < 352 and plans[1].stop == 352
    whole = call.run(reference.fused_moe)
    both = sum(part.run(reference.fused_moe) for part in parts)
    np.testing.assert_allclose(both, whole, rtol=1e-12, atol=1e-12)
    for part in parts:
        right = solution(part)
        for _ in isas():
            check_close(part.run(moepad.fused_moe), *right)


@EACH_INPUT
def test_quantised_activations_bit_for_bit(
    form: dict[str, Any], n_thread: Callable[[int], None], isas: Isas
) -> None:
    """Over threads, scratch that holds NaN, the caller's flushing, and rows that do not count."""
    torch = require("torch")
    call = input_call(form, n_token=40)
    call.hidden_states[7] = 0
    call.hidden_states[8] = 1e-39
    for _ in isas():
        guard = Guarded((call.run(moepad.workspace_nbytes),), np.uint8)
        expected = call.run(moepad.fused_moe, workspace=guard.array)
        guard.check()
        assert np.isfinite(expected.astype(np.float32)).all() and not expected[7].any()
        for n in (1, 2, 7):
            n_thread(n)
            assert torch.set_flush_denormal(True)
            try:
                check_bits(call.run(moepad.fused_moe), expected)
            finally:
                torch.set_flush_denormal(False)
        spoiled = Call(call.hidden_states.copy(), *call.args[1:], call.options)
        poison(spoiled.hidden_states[33:])
        check_bits(spoiled.run(moepad.fused_moe)[:33], expected[:33])
        assert np.isnan(spoiled.run(moepad.fused_moe)[33:].astype(np.float32)).all()


@EACH_INPUT
def test_aiter_4195_rows_of_zeros_quantise_to_zeros(form: dict[str, Any], isas: Isas) -> None:
    """A rank without columns, or with zeros alone: an amax of 0 gives no NaN."""
    for sizes in ({"n_inter": 0}, {"n_inter": 64}):
        call = input_call(form, **sizes)
        call.w2.view(np.uint8)[...] = 0
        call.w13.view(np.uint8)[...] = 0
        for _ in isas():
            assert not call.run(moepad.fused_moe).any()
