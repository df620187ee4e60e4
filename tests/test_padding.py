"""Whatever the pads hold, and wherever memory ends, the output's bits are those without pads.

Poison is NaN, infinity, the largest finite number, zero; the page tests put the pad of the last
row into memory that faults. The named tests at the end are failures that were reported elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import moepad
import numpy as np
import pytest
from cases import (
    ALIGNS,
    DTYPES,
    FEW,
    MATRIX_INTER,
    Call,
    Case,
    build,
    pad,
    params,
    solution,
    solve,
)
from conftest import in_child
from moepad import reference
from moepad.testing import POISON, Guarded, check_bits, check_close, poison

ALL_DTYPES = pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
MATRIX = pytest.mark.parametrize("n_inter", MATRIX_INTER)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _layouts(n_inter: int) -> Iterator[Case]:
    """The ways w13 can be laid out, biases included."""
    base = Case(f"pad-i{n_inter}", "", n_hidden=72, n_inter=n_inter, n_expert=3, bias="both")
    yield base
    yield replace(base, gate_up="interleaved", swiglu_limit=1.0)
    yield replace(base, activation="relu2", is_gated=False)


def _run(call: Call, **more: Any) -> Any:
    """The output, from memory that is guarded on both sides, cut to the logical width."""
    guard = Guarded(call.hidden_states.shape, call.hidden_states.dtype)
    call.run(moepad.fused_moe, out=guard.array, **more)
    guard.check()
    n_hidden = call.options.get("n_hidden", guard.array.shape[1])
    assert not guard.array[:, n_hidden:].view("u1").any(), "columns past n_hidden are not +0"
    return np.ascontiguousarray(guard.array[:, :n_hidden])


@MATRIX
@ALL_DTYPES
def test_padded_is_compact_bit_for_bit(n_inter: int, dtype: str, isa: str) -> None:
    for case in _layouts(n_inter):
        call = build(case, dtype)
        compact = _run(call)
        for align in ALIGNS:
            check_bits(_run(pad(call, _up(n_inter, align))), compact)
        check_bits(_run(pad(call, n_inter + 1, n_hidden_pad=case.n_hidden + 1)), compact)
        for pattern in POISON:
            padded = pad(call, _up(n_inter, 256), n_hidden_pad=128, pattern=pattern)
            check_bits(_run(padded), compact)


@MATRIX
def test_no_byte_past_the_last_true_one_is_read(n_inter: int, isa: str) -> None:
    """Each tensor's last true element ends at a page that faults, the last row's pad in it."""

    def body() -> None:
        for case in _layouts(n_inter):
            for dtype in DTYPES if n_inter < 100 else ("f32", "bf16"):
                if dtype.startswith("i"):
                    continue
                call = build(case, dtype)
                compact = _run(call)
                for n_inter_pad in (n_inter, _up(n_inter, 128)):
                    for n_hidden_pad in (case.n_hidden, case.n_hidden + 8):
                        padded = pad(call, n_inter_pad, n_hidden_pad=n_hidden_pad, edge="after")
                        check_bits(_run(padded), compact)

    in_child(body)


@pytest.mark.parametrize("n_inter", [1, 7, 44, 96])
def test_no_byte_before_the_first_is_read(n_inter: int, isa: str) -> None:
    def body() -> None:
        for case in _layouts(n_inter):
            for dtype in ("f32", "bf16", "f16"):
                call = build(case, dtype)
                check_bits(_run(pad(call, n_inter + 3, edge="before")), _run(call))

    in_child(body)


@ALL_DTYPES
@pytest.mark.parametrize("n_hidden", [1, 2, 7, 8, 9, 31, 33, 65])
@pytest.mark.parametrize("n_inter", [1, 2, 7, 9, 15, 17, 33])
def test_odd_sizes_end_where_they_end(n_inter: int, n_hidden: int, dtype: str, isa: str) -> None:
    """Every tail of every vector length, at a page that faults, with one token and with many."""

    def body() -> None:
        for n_token in (1, 5, 19):
            case = Case("odd", "", n_token=n_token, n_hidden=n_hidden, n_inter=n_inter)
            call = build(case, dtype)
            check_bits(_run(pad(call, n_inter, edge="after")), _run(call))

    in_child(body)


def test_the_output_may_end_at_a_page(isa: str) -> None:
    def body() -> None:
        for n_hidden in (1, 7, 33, 72):
            for dtype in ("f32", "bf16", "f16"):
                call = build(Case("out", "", n_hidden=n_hidden), dtype)
                out = Guarded(call.hidden_states.shape, DTYPES[dtype], edge="after")
                call.run(moepad.fused_moe, out=out.array)
                check_bits(out.array, _run(call))

    in_child(body)


@ALL_DTYPES
@pytest.mark.parametrize("pattern", POISON)
@pytest.mark.parametrize("case", params(FEW))
def test_workspace_content_does_not_matter(case: Case, dtype: str, pattern: str, isa: str) -> None:
    """A poisoned workspace of just the size asked for, never written past its end."""

    def body() -> None:
        call = build(case, dtype)
        expected = _run(call)
        n_bytes = call.run(moepad.workspace_nbytes)
        workspace = Guarded((n_bytes,), np.uint8)
        poison(workspace.array[: n_bytes - n_bytes % 4].view(np.float32), pattern)
        check_bits(_run(call, workspace=workspace.array), expected)
        workspace.check()
        check_bits(_run(call, workspace=workspace.array), expected)

    in_child(body)


@ALL_DTYPES
@pytest.mark.parametrize("case", params(FEW))
def test_workspace_ends_where_it_is_said_to(case: Case, dtype: str, isa: str) -> None:
    """The page after it faults, with as many threads as may ever share it."""

    def body() -> None:
        call = build(case, dtype)
        expected = _run(call)
        moepad.set_num_threads(64)
        workspace = Guarded((call.run(moepad.workspace_nbytes),), np.uint8, edge="after")
        check_bits(_run(call, workspace=workspace.array), expected)

    in_child(body)


def test_workspace_too_small_is_an_error() -> None:
    call = build(FEW[0], "bf16")
    n_bytes = call.run(moepad.workspace_nbytes)
    if not n_bytes:
        return
    out = Guarded(call.hidden_states.shape, DTYPES["bf16"])
    with pytest.raises(ValueError, match="workspace"):
        call.run(moepad.fused_moe, workspace=np.empty(n_bytes - 1, np.uint8), out=out.array)
    out.check(out.array[:0])


@ALL_DTYPES
@pytest.mark.parametrize("case", params([case for case in FEW if not case.is_strided]))
def test_inputs_are_left_alone(case: Case, dtype: str, isa: str) -> None:
    """Pads and surroundings included, byte for byte."""
    padded = pad(build(case, dtype), _up(case.n_inter, 128), n_hidden_pad=case.n_hidden + 24)
    before = {name: tensor.tobytes() for name, tensor in padded.tensors().items()}
    _run(padded)
    for guard in padded.guards:
        guard.check()
    assert before == {name: tensor.tobytes() for name, tensor in padded.tensors().items()}


@ALL_DTYPES
@pytest.mark.parametrize("n_token", [7, 33, 130])
def test_permuting_tokens_permutes_the_output(n_token: int, dtype: str, isa: str) -> None:
    case = Case("permute", "", n_token=n_token, n_hidden=72, n_inter=88, n_topk=3, bias="both")
    call = build(case, dtype)
    order = np.random.default_rng(3).permutation(n_token)
    moved = Call(
        call.hidden_states[order],
        call.w13,
        call.w2,
        call.topk_weights[order],
        call.topk_ids[order],
        call.options,
    )
    check_bits(_run(moved), _run(call)[order])


@ALL_DTYPES
@pytest.mark.parametrize("n_valid", [0, 1, 22, 33])
def test_rows_past_n_token_change_nothing(n_valid: int, dtype: str, isa: str) -> None:
    whole = build(Case("tokens", "", n_token=33, n_topk=3), dtype)
    cut = build(Case("tokens", "", n_token=33, n_topk=3, n_valid=n_valid), dtype)
    first = Call(
        whole.hidden_states[:n_valid],
        whole.w13,
        whole.w2,
        whole.topk_weights[:n_valid],
        whole.topk_ids[:n_valid],
        whole.options,
    )
    out = _run(cut)
    check_bits(out[:n_valid], _run(first))
    assert not out[n_valid:].view("u1").any()


# What a layer's checkpoint holds, cut over ranks as moepad.plan says: model, H, I, gated, options.
_LAYERS = [
    ("qwen3-235b", 64, 1536, True, {}),
    ("qwen3-30b", 64, 768, True, {}),
    ("glm-4.5-air", 64, 1408, True, {}),
    ("step-3.5-flash", 64, 1280, True, {}),
    ("gpt-oss", 64, 2880, True, {"activation": "swigluoai", "bias": "both", "swiglu_limit": 7.0}),
    ("gemma4", 64, 704, True, {"activation": "gelu_tanh"}),
    ("nemotron-3-nano", 64, 1856, False, {"activation": "relu2"}),
    ("nemotron-3-super", 64, 2688, False, {"activation": "relu2"}),
]


def _rank(call: Call, plan: moepad.Plan, is_gated: bool) -> Call:
    """This rank's slice of a whole layer, in tensors of the plan's shapes, pads poisoned."""
    columns = slice(plan.start, plan.stop)
    n_inter = call.w2.shape[2]

    def rows(array: Any) -> Any:
        if not is_gated:
            return array[:, columns]
        return np.concatenate([array[:, columns], array[:, n_inter:][:, columns]], axis=1)

    options = dict(call.options)
    if "w13_bias" in options:
        options["w13_bias"] = rows(options["w13_bias"])
    if plan.tp_rank != 0:
        options.pop("w2_bias", None)
    compact = Call(
        call.hidden_states,
        rows(call.w13),
        np.ascontiguousarray(call.w2[:, :, columns]),
        call.topk_weights,
        call.topk_ids,
        options,
    )
    padded = pad(compact, plan.n_inter_pad)
    padded.options["n_inter"] = plan.n_inter
    assert padded.w13.shape == plan.w13_shape and padded.w2.shape == plan.w2_shape
    return padded


def _ranks(name: str, tp_size: int, split: str) -> tuple[Case, Call, list[Call]]:
    _, n_hidden, n_inter, is_gated, options = next(row for row in _LAYERS if row[0] == name)
    case = Case(f"layer-{name}", "", n_token=3, n_hidden=n_hidden, n_inter=n_inter,
                is_gated=is_gated, **options)  # fmt: skip
    call = build(case, "f32")
    plans = [
        moepad.plan(n_hidden, n_inter, case.n_expert, gated=is_gated, dtype="f32", tp_size=tp_size,
                    tp_rank=rank, split=split, align=128, bias=bool(case.bias))
        for rank in range(tp_size)
    ]  # fmt: skip
    return case, call, [_rank(call, plan, is_gated) for plan in plans]


@pytest.mark.parametrize("split", ["true", "padded"])
@pytest.mark.parametrize("tp_size", [2, 8, 16])
@pytest.mark.parametrize("name", [row[0] for row in _LAYERS])
def test_ranks_sum_to_the_whole(name: str, tp_size: int, split: str) -> None:
    """Exactly in the specification, within the tolerance in the engine; empty ranks give zeros."""
    case, _, ranks = _ranks(name, tp_size, split)
    expected, naive = solve(case, "f32")
    exact = sum(rank.run(reference.fused_moe) for rank in ranks)
    np.testing.assert_allclose(exact, expected, rtol=1e-11, atol=1e-12)
    outputs = [_run(rank) for rank in ranks]
    check_close(np.sum(outputs, axis=0, dtype=np.float64).astype(np.float32), expected, naive)
    for rank, out in zip(ranks, outputs, strict=True):
        has_bias = "w2_bias" in rank.options
        assert out.any() == bool(rank.options["n_inter"] or has_bias)


def test_vllm_39046_tp8_of_1536_is_tp1() -> None:
    """192 columns per rank: where others cap tensor parallelism at 4."""
    case, _, ranks = _ranks("qwen3-235b", 8, "true")
    assert [rank.options["n_inter"] for rank in ranks] == [192] * 8
    total = np.sum([_run(rank) for rank in ranks], axis=0, dtype=np.float64)
    check_close(total.astype(np.float32), *solve(case, "f32"))


def test_sglang_padded_stride_leaves_whole_ranks_empty() -> None:
    """1536 over 8 by SGLang's rule: six ranks of 256, two of nothing but pad, which give zeros."""
    _, _, ranks = _ranks("qwen3-235b", 8, "padded")
    assert [rank.options["n_inter"] for rank in ranks] == [256] * 6 + [0, 0]
    for rank in ranks[6:]:
        assert not _run(rank).view("u1").any()


def test_vllm_42595_every_column_once() -> None:
    """The offset of a rank was taken from the padded size, so that the last ranks held nothing."""
    for split in ("true", "padded"):
        _, call, ranks = _ranks("qwen3-235b", 8, split)
        n = [rank.options["n_inter"] for rank in ranks]
        gate = np.concatenate([r.w13[:, :k] for r, k in zip(ranks, n, strict=True)], axis=1)
        up = [r.w13[:, r.w2.shape[2] :][:, :k] for r, k in zip(ranks, n, strict=True)]
        check_bits(np.concatenate([gate, *up], axis=1), call.w13)
        w2 = np.concatenate([r.w2[:, :, :k] for r, k in zip(ranks, n, strict=True)], axis=2)
        check_bits(w2, call.w2)


def test_vllm_55251_pad_from_empty(isa: str) -> None:
    """Padded tensors were allocated with torch.empty: now and then the pool held NaN."""
    call = build(Case("gemma4", "", n_inter=704, activation="gelu_tanh"), "bf16")
    check_bits(_run(pad(call, 768, pattern="nan")), _run(pad(call, 768, pattern="zero")))


def test_vllm_55251_up_begins_at_the_padded_row() -> None:
    """Gate at [0, 704), up at [768, 1472), by indices written out."""
    call = build(Case("gemma4", "", n_inter=704, activation="gelu_tanh"), "bf16")
    w13 = poison(np.empty((4, 1536, 64), DTYPES["bf16"]))
    w13[:, 0:704], w13[:, 768:1472] = call.w13[:, :704], call.w13[:, 704:]
    w2 = poison(np.empty((4, 64, 768), DTYPES["bf16"]))
    w2[:, :, :704] = call.w2
    padded = Call(call.hidden_states, w13, w2, *call.args[3:], {**call.options, "n_inter": 704})
    check_bits(_run(padded), _run(call))


def test_vllm_46201_the_count_is_exact(isa: str) -> None:
    """A pad count that was doubled, or rounded, cut live columns: one off must be seen."""
    case = Case("oss", "", n_inter=1440)
    padded = pad(build(case, "bf16"), 1536)
    check_close(_run(padded), *solve(case, "bf16"))
    assert np.isnan(_run(padded, n_inter=1441).astype(np.float32)).all()
    with pytest.raises(AssertionError):
        check_close(_run(padded, n_inter=1440 - 152), *solve(case, "bf16"))
    with pytest.raises(ValueError, match="n_inter"):
        _run(padded, n_inter=1537)


def test_sglang_33090_sizes_that_disagree_are_an_error() -> None:
    """One tensor kept its raw size beside a padded one; the output stayed fluent, and wrong."""
    call = build(Case("raw", "", n_inter=128), "bf16")
    padded = pad(call, 256)
    for w13, w2 in ((call.w13, padded.w2), (padded.w13, call.w2)):
        mixed = Call(call.hidden_states, w13, w2, *call.args[3:], padded.options)
        if w13 is call.w13:  # 256 rows beside 256 columns: a layer without a gate, if it were one
            mixed.options = {**mixed.options, "activation": "swigluoai"}
        with pytest.raises(ValueError, match="w13"):
            _run(mixed)


def test_sglang_36097_no_gate_no_second_half(isa: str) -> None:
    """w13 was sized for a gate it does not have; here nothing lies behind its Ip rows."""

    def body() -> None:
        case = Case("nemotron", "", n_inter=160, activation="relu2", is_gated=False)
        padded = pad(build(case, "bf16"), 256, edge="after")
        assert padded.w13.shape == (4, 256, 64)
        check_close(_run(padded), *solve(case, "bf16"))

    in_child(body)


@pytest.mark.parametrize("n_inter", [128, 256, 384, 512, 640, 768])
def test_aiter_5233_second_product_at_every_width(n_inter: int, isa: str) -> None:
    """Wrong by a factor of ten at 384 and 640, right where 256 divides."""
    case = Case(f"widths-i{n_inter}", "", n_token=17, n_hidden=128, n_inter=n_inter)
    check_close(_run(build(case, "bf16")), *solve(case, "bf16"))


def test_aiter_3538_unwritten_intermediate(isa: str) -> None:
    """The first product left the last tile of h unwritten, and the second one read it."""
    call = pad(build(Case("oss", "", n_inter=1440), "bf16"), 1536)
    workspace = Guarded((call.run(moepad.workspace_nbytes),), np.uint8)
    out = _run(call, workspace=workspace.array)
    workspace.check()
    check_close(out, *solve(Case("oss", "", n_inter=1440), "bf16"))


def test_vllm_37010_both_dims_padded_at_once(isa: str) -> None:
    """2688 -> 3072 hidden and 232 -> 256 intermediate: the first fix narrowed only one."""
    case = Case("both", "", n_token=2, n_hidden=2688, n_inter=232, n_expert=2, **_RELU2)
    padded = pad(build(case, "bf16"), 256, n_hidden_pad=3072)
    assert padded.w13.shape == (2, 256, 3072) and padded.w2.shape == (2, 3072, 256)
    check_close(_run(padded), *solve(case, "bf16"))


_RELU2: dict[str, Any] = {"activation": "relu2", "is_gated": False}


def test_sglang_19728_last_columns_count(isa: str) -> None:
    """A padding of 128 was subtracted from widths that had none: the last columns were dropped."""
    call = build(Case("last", "", n_hidden=256, n_inter=192), "f32")
    call.hidden_states[:, :-1] = 0
    call.w2[:, :, :-1] = 0
    expected, naive = solution(call)
    assert (np.abs(expected) > 0).all()
    check_close(_run(call), expected, naive)


def test_sglang_28378_nan_in_padded_tokens(isa: str) -> None:
    """Rows that pad a batch to its captured size hold anything; real rows must not care."""
    call = build(Case("tokens", "", n_token=48, n_topk=3), "bf16")
    expected = _run(call)
    poison(call.hidden_states[40:])
    check_bits(_run(call)[:40], expected[:40])


def test_aiter_3677_a_weight_of_zero_is_no_skip(isa: str) -> None:
    case = Case("zero-weight", "", n_token=9, n_topk=3)
    call = build(case, "bf16")
    call.topk_weights[4] = 0
    out = _run(call)
    assert not out[4].any() and np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize("n_token", [1, 2, 31, 32, 8192])
def test_aiter_4032_finite_in_finite_out(n_token: int, isa: str) -> None:
    case = Case(f"finite-m{n_token}", "", n_token=n_token, n_hidden=24, n_inter=16)
    call = build(case, "bf16")
    workspace = Guarded((call.run(moepad.workspace_nbytes),), np.uint8)
    assert np.isfinite(_run(call, workspace=workspace.array).astype(np.float32)).all()


def test_aiter_4195_empty_rank_gives_exact_zeros(isa: str) -> None:
    """A rank whose columns are all pad: no scale of zero, no NaN."""
    padded = pad(build(Case("empty", "", n_inter=0), "bf16"), 128)
    padded.options["n_inter"] = 0
    assert not _run(padded).view("u1").any()


@pytest.mark.parametrize("n_inter", [96, 192, 224, 384, 704])
def test_sglang_28244_every_reported_width_runs(n_inter: int, isa: str) -> None:
    """ "does not support this GEMM problem": 96, 224, 704; "inter_dim % 256": 192, 384."""
    case = Case(f"reported-i{n_inter}", "", n_token=33, n_inter=n_inter)
    check_close(_run(build(case, "bf16")), *solve(case, "bf16"))


def test_vllm_56568_shared_expert_of_another_width(isa: str) -> None:
    """A shared slot narrower than the routed ones, in one tensor: its missing columns zeroed."""
    call = build(Case("shared", "", n_inter=96, n_token=9), "bf16")
    call.topk_ids[:, 1] = 3
    for half in (call.w13[3, :96], call.w13[3, 96:]):
        half[72:] = 0
    poison(call.w2[3, :, 72:], "largest")
    expected, naive = solution(call)
    assert np.isfinite(expected).all()
    check_close(_run(call), expected, naive)
