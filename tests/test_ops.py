"""fused_moe over the whole table, on every instruction set, against the specification."""

from __future__ import annotations

from typing import Any

import moepad
import numpy as np
import pytest
from cases import CASES, DTYPES, FEW, Call, Case, build, params, solve
from conftest import require
from moepad.testing import Guarded, check_bits, check_close, poison

ALL_DTYPES = pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])


@ALL_DTYPES
@pytest.mark.parametrize("case", params(CASES))
def test_equals_reference(case: Case, dtype: str, isa: str) -> None:
    call = build(case, dtype)
    before = {name: tensor.tobytes() for name, tensor in call.tensors().items()}
    guard = Guarded(call.hidden_states.shape, DTYPES[dtype])
    assert call.run(moepad.fused_moe, out=guard.array) is guard.array
    guard.check()
    check_close(guard.array, *solve(case, dtype))
    assert before == {name: tensor.tobytes() for name, tensor in call.tensors().items()}


@ALL_DTYPES
@pytest.mark.parametrize("case", params(FEW))
def test_makes_its_own_output(case: Case, dtype: str, isa: str) -> None:
    call = build(case, dtype)
    out = call.run(moepad.fused_moe)
    assert isinstance(out, np.ndarray)
    assert out.dtype == DTYPES[dtype] and out.shape == call.hidden_states.shape
    assert not np.shares_memory(out, call.hidden_states)
    check_bits(out, call.run(moepad.fused_moe, out=np.empty_like(out)))


@ALL_DTYPES
@pytest.mark.parametrize("case", params([case for case in FEW if not case.is_strided]))
def test_in_place(case: Case, dtype: str, isa: str) -> None:
    """SGLang's inplace: the output takes the input's place, and its bits are the same."""
    call = build(case, dtype)
    expected = call.run(moepad.fused_moe)
    assert call.run(moepad.fused_moe, out=call.hidden_states) is call.hidden_states
    check_bits(call.hidden_states, expected)


@ALL_DTYPES
@pytest.mark.parametrize("case", params(FEW))
def test_output_rows_may_be_apart(case: Case, dtype: str, isa: str) -> None:
    call = build(case, dtype)
    n_token, n_hidden = call.hidden_states.shape
    guard = Guarded((n_token + 1, n_hidden + 3), DTYPES[dtype])
    view = guard.array[:n_token, 1 : n_hidden + 1]
    call.run(moepad.fused_moe, out=view)
    guard.check(view)
    check_bits(np.ascontiguousarray(view), call.run(moepad.fused_moe))


def test_gate_is_clamped_above_only() -> None:
    """gate <= limit and |up| <= limit: a strongly negative gate stays what it is."""
    x = np.array([[1.0]], np.float32)
    w13 = np.array([[[-3.0], [-5.0]]], np.float32)
    w2, weights, ids = np.ones((1, 1, 1), np.float32), x, np.zeros((1, 1), np.int32)
    out = moepad.fused_moe(x, w13, w2, weights, ids, swiglu_limit=2.0)
    assert out[0, 0] == pytest.approx(-3 / (1 + np.exp(3.0)) * -2, rel=1e-6)


@pytest.mark.parametrize("wrong", [-2, 4, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", ["i32", "i64"])
def test_an_id_out_of_range_is_an_error(wrong: int, dtype: str) -> None:
    call = build(Case("ids", "", n_token=33, topk_ids=dtype), "f32")
    call.topk_ids[20, 1] = wrong
    out = Guarded(call.hidden_states.shape, np.float32)
    with pytest.raises(ValueError, match="topk_ids") as info:
        call.run(moepad.fused_moe, out=out.array)
    assert str(wrong) in str(info.value)
    out.check(out.array[:0])


@pytest.mark.parametrize("wrong", [4, -7])
def test_a_map_out_of_range_is_an_error(wrong: int) -> None:
    call = build(Case("map", "", n_token=33, n_expert_global=8), "f32")
    call.options["expert_map"][call.topk_ids[7, 0]] = wrong
    out = Guarded(call.hidden_states.shape, np.float32)
    with pytest.raises(ValueError, match="expert_map"):
        call.run(moepad.fused_moe, out=out.array)
    out.check(out.array[:0])


def test_output_over_another_input_is_an_error() -> None:
    call = build(Case("overlap", "", n_token=4, n_hidden=8, n_inter=8), "f32")
    for tensor in (call.w13, call.w2):
        with pytest.raises(ValueError, match="out"):
            call.run(moepad.fused_moe, out=tensor.reshape(-1)[:32].reshape(4, 8))


@ALL_DTYPES
def test_torch_tensors_give_the_same_bits(dtype: str) -> None:
    torch = require("torch")
    call = build(FEW[0], dtype)
    expected = call.run(moepad.fused_moe)
    args = [_to_torch(torch, tensor) for tensor in call.args]
    out = moepad.fused_moe(*args, **call.options)
    assert isinstance(out, torch.Tensor) and out.dtype == args[0].dtype
    check_bits(_to_numpy(torch, out), expected)
    given = torch.empty_like(out)
    assert moepad.fused_moe(*args, **call.options, out=given) is given
    check_bits(_to_numpy(torch, given), expected)


def _to_torch(torch: Any, array: Any) -> Any:
    if array.dtype == DTYPES["bf16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(torch: Any, tensor: Any) -> Any:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES["bf16"])
    return tensor.numpy()


def _split_slots(call: Call) -> Call:
    """Two calls' worth of slots in one: the same slots, the order of the slots reversed."""
    weights, ids = call.topk_weights[:, ::-1].copy(), call.topk_ids[:, ::-1].copy()
    return Call(call.hidden_states, call.w13, call.w2, weights, ids, call.options)


def test_slot_order_only_rounds(isa: str) -> None:
    case = Case("slots", "", n_token=33, n_topk=4)
    call = build(case, "f32")
    check_close(_split_slots(call).run(moepad.fused_moe), *solve(case, "f32"))


@ALL_DTYPES
def test_unused_experts_are_not_read(dtype: str, isa: str) -> None:
    """Weights of experts no token is sent to are poison here."""
    case = Case("unused", "", n_token=17, n_expert=9, routing="even", bias="both")
    call = build(case, dtype)
    for name in ("w13", "w2", "w13_bias", "w2_bias"):
        poison(call.tensors()[name][:1])
    check_close(call.run(moepad.fused_moe), *solve(case, dtype))
