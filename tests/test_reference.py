"""The specification against a second one written number by number, and against frameworks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import (
    ACTIVATIONS,
    CASES,
    CORNERS,
    DTYPES,
    FEW,
    MATRIX_HIDDEN,
    MATRIX_INTER,
    Call,
    Case,
    build,
    pad,
    params,
)
from conftest import require
from moepad import reference
from moepad.testing import check_close


def _act(name: str, x: float, alpha: float) -> float:
    if name == "silu":
        return x / (1 + math.exp(-x))
    if name == "gelu":
        return x / 2 * math.erfc(-x / math.sqrt(2))
    if name == "gelu_tanh":
        return x / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "swigluoai":
        return x / (1 + math.exp(-alpha * x))
    assert name == "relu2"
    return x * x if x > 0 else 0.0


def _by_numbers(call: Call) -> Any:
    """One Python float at a time: no matrix product, no masks, no view of the reference's."""
    x, w13, w2, weights, ids = (tensor.astype(np.float64).tolist() for tensor in call.args)
    o = call.options
    n_row, n_inter_pad = call.w13.shape[1], call.w2.shape[2]
    n_inter = o.get("n_inter", n_inter_pad)
    n_hidden = o.get("n_hidden", call.hidden_states.shape[1])
    is_gated = n_row == 2 * n_inter_pad
    n_token = int(np.asarray(o.get("n_token", len(x))).reshape(()))
    out = np.zeros(call.hidden_states.shape)

    def row_sum(m: int, e: int, row: int, weight: float) -> float:
        total = sum(w13[e][row][c] * x[m][c] for c in range(n_hidden))
        if o.get("apply_router_weight_on_input"):
            total *= weight
        return total + (float(o["w13_bias"][e, row]) if "w13_bias" in o else 0.0)

    def column(m: int, e: int, j: int, weight: float) -> float:
        name, alpha = o["activation"], o.get("swiglu_alpha", 1.702)
        if not is_gated:
            return _act(name, row_sum(m, e, j, weight), alpha)
        interleaved = o.get("gate_up") == "interleaved"
        gate = row_sum(m, e, 2 * j if interleaved else j, weight)
        up = row_sum(m, e, 2 * j + 1 if interleaved else n_inter_pad + j, weight)
        limit = o.get("swiglu_limit")
        if limit is not None:
            gate, up = min(gate, limit), max(-limit, min(up, limit))
        return _act(name, gate, alpha) * (up + 1 if name == "swigluoai" else up)

    for m in range(n_token):
        for weight, expert in zip(weights[m], ids[m], strict=True):
            e = int(expert)
            if e >= 0 and "expert_map" in o:
                e = int(o["expert_map"][e])
            if e < 0:
                continue
            h = [column(m, e, j, weight) for j in range(n_inter)]
            scale = 1.0 if o.get("apply_router_weight_on_input") else weight
            for c in range(n_hidden):
                y = sum(w2[e][c][j] * h[j] for j in range(n_inter))
                y += float(o["w2_bias"][e, c]) if "w2_bias" in o else 0.0
                out[m, c] += o.get("routed_scaling_factor", 1.0) * scale * y
    return out


_BY_NUMBERS = [
    replace(case, n_hidden=min(case.n_hidden, 7), n_inter=min(case.n_inter, 6), n_topk=3)
    for case in [*ACTIVATIONS, *CORNERS]
    if case.n_token <= 33 and case.n_expert <= 12 and case.values not in ("nan", "inf", "large")
]


@pytest.mark.parametrize("case", params(_BY_NUMBERS))
def test_equals_number_by_number(case: Case) -> None:
    call = build(case, "f32")
    expected = _by_numbers(call)
    is_zero = case.n_skip == 1 or case.n_valid == 0 or case.values == "zero"
    is_zero |= case.n_inter == 0 and not case.bias
    assert expected.any() != is_zero
    np.testing.assert_allclose(call.run(reference.fused_moe), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", params([case for case in _BY_NUMBERS if not case.is_strided]))
def test_pads_do_not_matter(case: Case) -> None:
    call = build(case, "f32")
    padded = pad(call, case.n_inter + 5, n_hidden_pad=case.n_hidden + 2)
    expected = call.run(reference.fused_moe)
    for function in (reference.fused_moe, reference.naive):
        result = padded.run(function)
        assert not result[:, case.n_hidden :].any()
        np.testing.assert_array_equal(result[:, : case.n_hidden], call.run(function))
    np.testing.assert_array_equal(
        padded.run(reference.fused_moe)[:, : case.n_hidden], expected, strict=True
    )


def test_known_numbers() -> None:
    """One token, one expert, numbers that can be checked in the head."""
    x = np.array([[2.0, 1.0]], np.float32)
    w13 = np.array([[[0.0, 3.0], [5.0, 0.0]]], np.float32)  # gate = 3, up = 10
    w2 = np.array([[[1.0], [-2.0]]], np.float32)
    weights, ids = np.array([[0.5]], np.float32), np.array([[0]], np.int32)
    h = 3 / (1 + math.exp(-3)) * 10
    np.testing.assert_allclose(
        reference.fused_moe(x, w13, w2, weights, ids), [[0.5 * h, -h]], rtol=1e-15
    )
    oai = 3 / (1 + math.exp(-1.702 * 3)) * 11
    np.testing.assert_allclose(
        reference.fused_moe(x, w13, w2, weights, ids, activation="swigluoai"),
        [[0.5 * oai, -oai]],
        rtol=1e-15,
    )
    relu2 = reference.fused_moe(
        x, w13[:, :1], w2, weights, ids, activation="relu2", routed_scaling_factor=2.0
    )
    np.testing.assert_allclose(relu2, [[9.0, -18.0]], rtol=1e-15)


def test_saturated_activations_stay_finite() -> None:
    x = np.array([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4])
    for name, act in reference.ACTIVATIONS.items():
        with np.errstate(all="ignore"):
            values = act(x, 1.702)
        assert np.isfinite(values).all(), name
        assert (np.abs(values[:4]) < 1e-30).all(), name


def test_rejects_what_is_not_a_layer() -> None:
    call = build(Case("three", "", n_inter=6), "f32")
    with pytest.raises(ValueError, match="12 rows"):
        reference.fused_moe(call.hidden_states, call.w13, call.w2[:, :, :5], *call.args[3:])
    with pytest.raises(ValueError, match="gelu_tanh"):
        reference.fused_moe(
            call.hidden_states, call.w13[:, :6], *call.args[2:], activation="gelu_tanh"
        )


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", params(FEW))
def test_naive_is_naive(case: Case, dtype: str) -> None:
    """Right to a few roundings, in the type asked for, and worse than one rounding of the truth."""
    call = build(case, dtype)
    expected, result = call.run(reference.fused_moe), call.run(reference.naive)
    assert result.dtype == DTYPES[dtype]
    size = np.linalg.norm(expected)
    unit = float(
        np.finfo(np.float32).eps if dtype == "f32" else 2.0 ** {"bf16": -7, "f16": -10}[dtype]
    )
    error = np.linalg.norm(result.astype(np.float64) - expected) / size
    once = np.linalg.norm(expected.astype(result.dtype).astype(np.float64) - expected) / size
    assert once < error < 20 * unit


def test_naive_runs_are_equally_good_and_differ() -> None:
    call = build(Case("runs", "", n_token=33), "f32")
    expected = call.run(reference.fused_moe)
    runs = [call.run(reference.naive, n_part=n_part) for n_part in range(8)]
    errors = [np.abs(run - expected).mean() for run in runs]
    assert max(errors) < 2 * min(errors)
    assert len({run.tobytes() for run in runs}) == 8


def test_cases_cover_what_they_claim() -> None:
    """Rows may be added; these must not disappear."""

    def seen(field: str) -> set[Any]:
        return {getattr(case, field) for case in CASES}

    assert all(case.origin for case in CASES)
    assert seen("n_inter") >= {0, 1, *MATRIX_INTER}
    assert seen("n_hidden") >= set(MATRIX_HIDDEN)
    assert seen("n_token") >= {0, 1, 2, 31, 32, 257, 8192}
    assert seen("n_topk") >= {1, 8, 16, 22, 32}
    assert seen("n_expert") >= {1, 128, 1024}
    assert seen("activation") == set(reference.ACTIVATIONS)
    assert seen("topk_weights") == {"f32", "bf16", "f16"}
    assert seen("topk_ids") == {"i32", "i64"}
    assert {(case.activation, case.is_gated) for case in CASES} == {
        *((name, True) for name in reference.ACTIVATIONS if name != "relu2"),
        *((name, False) for name in reference.UNGATED),
    }


def _torch_call(case: Case) -> tuple[Any, Call, list[Any]]:
    torch = require("torch")
    call = build(case, "f32")
    return torch, call, [torch.from_numpy(np.array(tensor, np.float64)) for tensor in call.args]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_equals_torch(activation: str) -> None:
    """Against a loop over experts with torch's own linear layers and activations."""
    case = Case("torch", "", n_token=9, n_topk=3, activation=activation)
    torch, call, (x, w13, w2, weights, ids) = _torch_call(case)
    functional = torch.nn.functional
    act = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda value: functional.gelu(value, approximate="tanh"),
    }[activation]
    out = torch.zeros_like(x)
    for e in range(case.n_expert):
        token, slot = torch.where(ids == e)
        gate, up = functional.linear(x[token], w13[e]).chunk(2, dim=-1)
        y = functional.linear(act(gate) * up, w2[e]) * weights[token, slot, None]
        out.index_add_(0, token, y)
    np.testing.assert_allclose(call.run(reference.fused_moe), out.numpy(), rtol=1e-11, atol=1e-12)


def test_equals_gpt_oss() -> None:
    """Interleaved rows, both biases, the clamp and (up + 1), as transformers computes them."""
    require("transformers")
    modeling = require("transformers.models.gpt_oss.modeling_gpt_oss")
    config = require("transformers.models.gpt_oss.configuration_gpt_oss").GptOssConfig(
        hidden_size=64, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
    )
    case = Case("gpt-oss", "", n_token=9, activation="swigluoai", gate_up="interleaved",
                bias="both", swiglu_limit=7.0, values="large")  # fmt: skip
    torch, call, (x, w13, w2, weights, ids) = _torch_call(case)
    experts = modeling.GptOssExperts(config).double()
    with torch.no_grad():
        experts.gate_up_proj.copy_(w13.transpose(1, 2))
        experts.down_proj.copy_(w2.transpose(1, 2))
        experts.gate_up_proj_bias.copy_(torch.from_numpy(call.options["w13_bias"]))
        experts.down_proj_bias.copy_(torch.from_numpy(call.options["w2_bias"]))
        out = experts(x, ids.long(), weights)
    expected = out.reshape(x.shape).numpy()
    np.testing.assert_allclose(call.run(reference.fused_moe), expected, rtol=1e-9, atol=1e-11)


def test_is_close_to_itself_rounded() -> None:
    call = build(FEW[0], "bf16")
    expected, naive = call.run(reference.fused_moe), call.run(reference.naive)
    check_close(expected.astype(naive.dtype), expected, naive)
