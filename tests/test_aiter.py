"""moepad.aiter: AITER's arguments, layouts and enums, each honoured or refused by name."""

from __future__ import annotations

import enum
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import moepad
import numpy as np
import pytest
from conftest import require
from moepad import reference
from moepad.testing import check_close, quantise
from numpy.typing import NDArray

torch = require("torch")
from moepad import aiter, relayout  # noqa: E402
from moepad.aiter import ActivationType, QuantType, fused_moe  # noqa: E402

# inductor uses what torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

Array = NDArray[Any]
M, H, INTER, E, K = 7, 256, 128, 4, 2
TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}


def to_torch(array: Array) -> Any:
    dtype = TORCH_DTYPES.get(array.dtype.name)
    if dtype is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"u{array.dtype.itemsize}")).view(dtype)


def as_array(tensor: Any) -> Array:
    for name, dtype in TORCH_DTYPES.items():
        if tensor.dtype == dtype:
            integer = {1: torch.uint8, 2: torch.uint16}[dtype.itemsize]
            return tensor.view(integer).numpy().view(getattr(ml_dtypes, name))
    return tensor.numpy()


class Layer:
    """One layer's tensors in float32 and what the specification makes of them."""

    def __init__(self, rng: np.random.Generator, gated: bool = True) -> None:
        rows = (2 if gated else 1) * INTER
        self.x = rng.standard_normal((M, H)).astype(ml_dtypes.bfloat16)
        self.w1 = rng.standard_normal((E, rows, H), np.float32) / 8
        self.w2 = rng.standard_normal((E, H, INTER), np.float32) / 8
        self.weights = rng.random((M, K), np.float32)
        self.ids = np.stack([rng.permutation(E)[:K] for _ in range(M)]).astype(np.int32)
        self.bias1 = rng.standard_normal((E, rows), np.float32)
        self.bias2 = rng.standard_normal((E, H), np.float32)

    def tensors(self) -> tuple[Any, ...]:
        w1, w2 = (w.astype(ml_dtypes.bfloat16) for w in (self.w1, self.w2))
        return tuple(map(to_torch, (self.x, w1, w2, self.weights, self.ids)))

    def check(self, out: Any, weights: tuple[Array, Array] | None = None, **options: Any) -> None:
        """Compares with the specification of the same call in moepad's own words."""
        w1, w2 = weights or (w.astype(ml_dtypes.bfloat16) for w in (self.w1, self.w2))
        call = (self.x, w1, w2, options.pop("weights_of", self.weights), self.ids)
        right, naive = reference.fused_moe(*call, **options), reference.naive(*call, **options)
        check_close(as_array(out), right, naive)


@pytest.fixture
def layer(rng: np.random.Generator) -> Layer:
    return Layer(rng)


# --- Arguments -----------------------------------------------------------------------------------

ORDER = (
    *("hidden_states", "w1", "w2", "topk_weight", "topk_ids", "expert_mask", "activation"),
    *("quant_type", "doweight_stage1", "w1_scale", "w2_scale", "a1_scale", "a2_scale"),
    *("block_size_M", "num_local_tokens", "moe_sorting_dispatch_policy", "dtype", "hidden_pad"),
    *("intermediate_pad", "bias1", "bias2", "splitk", "swiglu_limit", "beta", "linear_beta"),
    "gate_mode",
)


def test_signature() -> None:
    """AITER's order; what SGLang looks for by name; what it would pass if it were there."""
    signature = inspect.signature(fused_moe)
    assert tuple(signature.parameters)[: len(ORDER)] == ORDER
    defaults = {name: value.default for name, value in signature.parameters.items()}
    assert defaults["activation"] == 0 and defaults["quant_type"] == 0
    assert defaults["gate_mode"] == "separated" and defaults["shared_expert_id"] == -1
    assert not {"no_combine", "output"} & set(defaults)


def test_as_vllm_calls_it(layer: Layer) -> None:
    """Thirteen arguments by position, the others by name."""
    tensors = layer.tensors()
    call = (*tensors, None, ActivationType.Silu, QuantType.No, False, None, None, None, None)
    assert len(call) == 13
    out = fused_moe(
        *call,
        num_local_tokens=None,
        dtype=torch.bfloat16,
        hidden_pad=0,
        intermediate_pad=0,
        bias1=None,
        bias2=None,
        moe_sorting_dispatch_policy=0,
        swiglu_limit=0.0,
        gate_mode="separated",
        beta=None,
        linear_beta=None,
    )
    assert out.dtype == torch.bfloat16
    layer.check(out)


def test_as_sglang_calls_it(layer: Layer) -> None:
    names = ("hidden_states", "w1", "w2", "topk_weight", "topk_ids")
    out = fused_moe(
        **dict(zip(names, layer.tensors(), strict=True)),
        quant_type=QuantType.No,
        activation=ActivationType.Gelu,
        w1_scale=None,
        w2_scale=None,
        a1_scale=None,
        a2_scale=None,
        bias1=to_torch(layer.bias1),
        bias2=to_torch(layer.bias2),
        expert_mask=None,
        doweight_stage1=False,
        hidden_pad=0,
        intermediate_pad=0,
        moe_sorting_dispatch_policy=0,
    )
    layer.check(out, activation="gelu", w13_bias=layer.bias1, w2_bias=layer.bias2)


class Foreign(enum.Enum):
    """What another package's enum of the same numbers looks like."""

    Swiglu = 2


@pytest.mark.parametrize("value", [2, np.int64(2), ActivationType.Swiglu, Foreign.Swiglu])
def test_enums_by_name_and_value(layer: Layer, value: Any) -> None:
    out = fused_moe(*layer.tensors(), activation=value)
    layer.check(out, activation="swigluoai", swiglu_limit=7.0)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("activation", 9, ValueError),
        ("activation", "Silu", ValueError),
        ("activation", enum.Enum("A", {"gelu_tanh": 3}).gelu_tanh, ValueError),
        ("activation", ActivationType.Situv2, moepad.UnsupportedError),
        ("activation", ActivationType.No, moepad.UnsupportedError),
        ("quant_type", 8, ValueError),
    ],
)
def test_unknown_enums(layer: Layer, name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}: .*(Silu|per_Token)"):
        fused_moe(*layer.tensors(), **{name: value})


REFUSED = {
    "a1_scale": torch.ones(1),
    "a2_scale": torch.ones(1),
    "beta": 1.0,
    "linear_beta": 1.0,
    "shared_w1": torch.ones(1),
    "shared_w2": torch.ones(1),
    "shared_w1_scale": torch.ones(1),
    "shared_w2_scale": torch.ones(1),
    "shared_expert_id": 0,
    "stage2_scatter": object(),
    "dtype": torch.float16,
    "gate_mode": "gate_only",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(layer: Layer, name: str) -> None:
    with pytest.raises(moepad.UnsupportedError, match=rf"^{name}: "):
        fused_moe(*layer.tensors(), **{name: REFUSED[name]})


@pytest.mark.parametrize("options", [{"block_size_M": 64}, {"splitk": 2}, {"dtype": None}])
def test_what_only_divides_the_work_changes_nothing(layer: Layer, options: dict[str, Any]) -> None:
    tensors = layer.tensors()
    assert torch.equal(fused_moe(*tensors, **options), fused_moe(*tensors))


@pytest.mark.parametrize(
    ("activation", "given", "limit"),
    [
        ("Silu", None, None),
        ("Silu", 0, None),
        ("Silu", 1.5, 1.5),
        ("Swiglu", 0.0, 7.0),
        ("Swiglu", 1.5, 1.5),
    ],
)
def test_limits(layer: Layer, activation: str, given: float | None, limit: float | None) -> None:
    out = fused_moe(*layer.tensors(), activation=ActivationType[activation], swiglu_limit=given)
    name = {"Silu": "silu", "Swiglu": "swigluoai"}[activation]
    layer.check(out, activation=name, swiglu_limit=limit)


def test_weight_in_stage_1(layer: Layer) -> None:
    out = fused_moe(*layer.tensors(), doweight_stage1=True, bias2=to_torch(layer.bias2))
    layer.check(out, apply_router_weight_on_input=True, w2_bias=layer.bias2)
    with pytest.raises(moepad.UnsupportedError, match=r"^bias1: .*doweight_stage1"):
        fused_moe(*layer.tensors(), doweight_stage1=True, bias1=to_torch(layer.bias1))


def test_not_gated(rng: np.random.Generator) -> None:
    layer = Layer(rng, gated=False)
    layer.check(fused_moe(*layer.tensors()))


def test_pads_are_counts_of_elements(layer: Layer) -> None:
    """Tensors include their pads, which hold NaN here; pads of D come out zero."""
    x, w1, w2, weights, ids = layer.tensors()
    inter_pad, hidden_pad = 64, 32
    inter, hidden = INTER - inter_pad, H - hidden_pad
    x[:, hidden:] = w1[:, :, hidden:] = w2[:, hidden:] = torch.nan
    w1.view(E, 2, INTER, H)[:, :, inter:] = torch.nan
    w2[:, :, inter:] = torch.nan
    pads = {"hidden_pad": hidden_pad, "intermediate_pad": inter_pad}
    out = fused_moe(x, w1, w2, weights, ids, **pads)
    assert out.shape == (M, H) and not out[:, hidden:].any()
    layer.check(out, n_inter=inter, n_hidden=hidden)
    for name in pads:
        with pytest.raises(ValueError, match=rf"^{name}: expected 0 to"):
            fused_moe(x, w1, w2, weights, ids, **{name: H + 1})


def test_expert_mask(layer: Layer) -> None:
    """Experts 1, 3, 4 and 6 of seven are held here; the last entry is AITER's fake expert."""
    x, w1, w2, weights, _ = layer.tensors()
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0], dtype=torch.int32)
    held = np.array([-1, 0, -1, 1, 2, -1, 3, -1])
    ids = torch.arange(M * K, dtype=torch.int32).view(M, K) % 8
    out = fused_moe(x, w1, w2, weights, ids, expert_mask=mask)
    layer.ids = held[ids.numpy()].astype(np.int32)
    layer.check(out)
    with pytest.raises(ValueError, match=r"^expert_mask: expected 0 and 1"):
        fused_moe(x, w1, w2, weights, ids, expert_mask=to_torch(held))
    with pytest.raises(ValueError, match=r"^expert_mask: expected 1 dimension"):
        fused_moe(x, w1, w2, weights, ids, expert_mask=mask[None])
    with pytest.raises(ValueError, match=r"expert_map"):
        fused_moe(x, w1[:2], w2[:2], weights, ids, expert_mask=mask)


def test_rows_that_do_not_count(layer: Layer) -> None:
    tensors = layer.tensors()
    tensors[0][5:] = torch.nan
    out = fused_moe(*tensors, num_local_tokens=torch.tensor([5], dtype=torch.int32))
    assert not out[5:].any()
    layer.check(out, n_token=5)


def test_no_tokens_and_skipped_slots(layer: Layer) -> None:
    x, w1, w2, weights, ids = layer.tensors()
    assert fused_moe(x[:0], w1, w2, weights[:0], ids[:0]).shape == (0, H)
    ids[:, 1] = -1
    layer.ids[:, 1] = -1
    layer.check(fused_moe(x, w1, w2, weights, ids.long()))


# --- Layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_row", [16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
def test_shuffle_weight_puts_each_element_where_aiter_reads_it(dtype: Any, n_row: int) -> None:
    n, k = 64, 96
    p = 16 // dtype.itemsize
    integer = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    weight = torch.randint(0, 2**15, (3, n, k)).to(integer)
    shuffled = aiter.shuffle_weight(weight.view(dtype), (n_row, 16))
    assert shuffled.is_shuffled and shuffled.dtype == dtype
    e, r, c = np.ogrid[:3, :n, :k]
    to = e * n * k + r // n_row * n_row * k + c // p * n_row * p + r % n_row * p + c % p
    assert np.array_equal(shuffled.view(integer).flatten().numpy()[to], weight.numpy())
    back = aiter.unshuffle_weight(shuffled, (n_row, 16))
    assert torch.equal(back.view(integer), weight)


def test_gate_and_up_in_turns() -> None:
    half, n_byte = 48, 128
    weight = torch.randint(0, 255, (2, 2 * half, n_byte), dtype=torch.uint8)
    shuffled = aiter.shuffle_weight_a16w4(weight, 16, True)
    e, g, n, b = np.ogrid[:2, :2, :half, :n_byte]
    to = e * 2 * half * n_byte + (n // 16 * 2 + g) * 16 * n_byte
    to = to + b // 16 * 256 + n % 16 * 16 + b % 16
    got = shuffled.flatten().numpy()[to]
    assert np.array_equal(got.reshape(weight.shape), weight.numpy())
    options = {"is_guinterleave": True, "gate_up": True}
    assert torch.equal(aiter.unshuffle_weight(shuffled, **options), weight)
    plain = aiter.shuffle_weight_a16w4(weight, 16, False)
    assert torch.equal(plain, aiter.shuffle_weight(weight))


def test_e8m0_shuffle() -> None:
    n_row, n_column = 300, 12
    scale = torch.randint(0, 255, (n_row, n_column), dtype=torch.uint8)
    shuffled = aiter.e8m0_shuffle(scale)
    assert shuffled.shape == (512, 16)
    r, c = np.ogrid[:n_row, :n_column]
    to = r // 32 * 32 * 16 + c // 8 * 256 + c % 4 * 64 + r % 16 * 4 + c % 8 // 4 * 2 + r % 32 // 16
    assert np.array_equal(shuffled.flatten().numpy()[to], scale.numpy())
    assert torch.equal(aiter.e8m0_unshuffle(shuffled, n_row, n_column), scale)


def test_scales_of_gate_and_up_in_turns() -> None:
    half, n_column = 48, 12
    scale = torch.randint(0, 255, (2 * 2 * half, n_column), dtype=torch.uint8)
    shuffled = aiter.shuffle_scale_a16w4(scale, 2, True)
    e, g, n, c = np.ogrid[:2, :2, :half, :n_column]
    to = e * 2 * half * 16 + n // 16 * 32 * 16 + c // 8 * 256 + c % 4 * 64
    to = to + n % 16 * 4 + c % 8 // 4 * 2 + g
    got = shuffled.flatten().numpy()[to]
    assert np.array_equal(got.reshape(scale.shape), scale.numpy())
    back = aiter.unshuffle_scale_a16w4(shuffled, 2, True, 2 * half, n_column)
    assert torch.equal(back, scale)


def pack_int4(values: Array) -> Array:
    """[..., K] in [-8, 7], already shuffled: of 8 values, byte i holds i and i + 4."""
    nibble = (values & 15).astype(np.uint8).reshape(*values.shape[:-1], -1, 8)
    return (nibble[..., :4] | nibble[..., 4:] << 4).reshape(*values.shape[:-1], -1)


def pack_int4_words(values: Array) -> Array:
    """Already shuffled: nibble j of a word, lowest first, holds value 0, 2, 4, 6, 1, 3, 5, 7."""
    nibble = (values & 15).astype(np.uint32).reshape(*values.shape[:-1], -1, 8)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return np.bitwise_or.reduce([nibble[..., v] << 4 * j for j, v in enumerate(order)])


@pytest.mark.parametrize("attribute_on", ["w1", "w2", "both", "layout"])
def test_shuffled_weights(layer: Layer, attribute_on: str) -> None:
    """By the attribute of either; where both have lost it, by the explicit argument."""
    x, w1, w2, weights, ids = layer.tensors()
    right = fused_moe(x, w1, w2, weights, ids)
    s1, s2 = aiter.shuffle_weight(w1), aiter.shuffle_weight(w2)
    if attribute_on in ("w2", "layout"):
        s1 = torch.nn.Parameter(s1, requires_grad=False)
    if attribute_on in ("w1", "layout"):
        s2 = s2.clone()
    lost = [not hasattr(s, "is_shuffled") for s in (s1, s2)]
    assert lost == [attribute_on in ("w2", "layout"), attribute_on in ("w1", "layout")]
    layout = {"layout": "shuffle_16x16"} if attribute_on == "layout" else {}
    assert torch.equal(fused_moe(x, s1, s2, weights, ids, **layout), right)
    made = len(relayout._copies)
    assert torch.equal(fused_moe(x, s1, s2, weights, ids, **layout), right)
    assert len(relayout._copies) == made
    s1.mul_(2)
    doubled = fused_moe(x, w1 * 2, w2, weights, ids)
    assert torch.equal(fused_moe(x, s1, s2, weights, ids, **layout), doubled)


def test_vllm_42061_a_lost_attribute_is_made_good_by_layout(layer: Layer) -> None:
    """A parameter wrapped again forgets that it is shuffled; `layout` says so instead."""
    x, w1, w2, *routing = layer.tensors()
    shuffled = [aiter.shuffle_weight(w) for w in (w1, w2)]
    wrapped = [torch.nn.Parameter(w.clone(), requires_grad=False) for w in shuffled]
    assert not any(getattr(w, "is_shuffled", False) for w in wrapped)
    layer.check(fused_moe(x, *wrapped, *routing, layout="shuffle_16x16"))


def test_interleaved_weights(layer: Layer) -> None:
    x, w1, w2, weights, ids = layer.tensors()
    right = fused_moe(x, w1, w2, weights, ids)
    s1 = aiter.shuffle_weight(w1, is_guinterleave=True, gate_up=True)
    s2 = aiter.shuffle_weight(w2)
    assert torch.equal(fused_moe(x, s1, s2, weights, ids, gate_mode="interleave"), right)
    gate_mode = aiter.GateMode.INTERLEAVE
    assert torch.equal(fused_moe(x, s1, s2, weights, ids, gate_mode=gate_mode), right)
    with pytest.raises(ValueError, match=r"^gate_mode: .*layout='shuffle_gate_up'"):
        fused_moe(x, s1.clone(), s2.clone(), weights, ids, gate_mode="interleave")


@pytest.mark.parametrize("how", ["shuffled", "plain"])
def test_compiles_whole(layer: Layer, how: str) -> None:
    x, w1, w2, weights, ids = layer.tensors()
    if how == "shuffled":
        w1, w2 = aiter.shuffle_weight(w1), aiter.shuffle_weight(w2)
    mask = torch.ones(E + 1, dtype=torch.int32)
    layout = "shuffle_16x16" if how == "shuffled" else None

    def run(*tensors: Any) -> Any:
        return fused_moe(*tensors, expert_mask=mask, layout=layout)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    call = (x, w1, w2, weights, ids)
    assert torch.equal(compiled(*call), run(*call))


# --- Quantised -----------------------------------------------------------------------------------


def quantised(layer: Layer, quant: str, **how: Any) -> tuple[list[Array], dict[str, Any]]:
    """Canonical w1, w2 and their scales, and the options that moepad's own words need."""
    w1, s1 = quantise(layer.w1, quant, n_half=how.pop("n_half", 2), **how)
    w2, s2 = quantise(layer.w2, quant, **how)
    options = {"quant": quant, "w13_scale": s1, "w2_scale": s2}
    if "block" in how:
        options["block"] = how["block"]
    return [w1, w2, s1, s2], options


FP8 = ["f8_e4m3fn", "f8_e4m3fnuz"]


@pytest.mark.parametrize("is_shuffled", [False, True])
@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize(
    ("quant_type", "quant"),
    [
        (QuantType.per_Tensor, "fp8_tensor"),
        (QuantType.per_Token, "fp8_channel"),
        (QuantType.per_1x128, "fp8_block"),
        (QuantType.per_128x128, "fp8_block"),
    ],
)
def test_fp8(layer: Layer, quant_type: Any, quant: str, dtype: str, is_shuffled: bool) -> None:
    n_half = 1 if quant == "fp8_tensor" else 2
    (w1, w2, s1, s2), options = quantised(layer, quant, dtype=dtype, n_half=n_half)
    t1, t2 = to_torch(w1), to_torch(w2)
    if is_shuffled:
        t1, t2 = aiter.shuffle_weight(t1), aiter.shuffle_weight(t2)
    x, _, _, weights, ids = layer.tensors()
    shapes: dict[str, Callable[[Any], Any]] = {
        "fp8_tensor": lambda s: s[:, None],
        "fp8_channel": lambda s: s[:, :, None],
        "fp8_block": lambda s: s.flatten(1),
    }
    for shape in (lambda s: s, shapes[quant]):
        scales = {"w1_scale": shape(to_torch(s1)), "w2_scale": shape(to_torch(s2))}
        out = fused_moe(x, t1, t2, weights, ids, quant_type=quant_type, **scales)
        layer.check(out, (w1, w2), **options)


@pytest.mark.parametrize("given", [("a1_scale",), ("a2_scale",), ("a1_scale", "a2_scale")])
@pytest.mark.parametrize("quant", ["fp8_tensor", "fp8_channel", "int8_channel"])
def test_static_scales_of_activations(layer: Layer, quant: str, given: tuple[str, ...]) -> None:
    (w1, w2, s1, s2), options = quantised(layer, quant, n_half=1 if quant == "fp8_tensor" else 2)
    x, _, _, weights, ids = layer.tensors()
    kind = QuantType.per_Tensor if quant == "fp8_tensor" else QuantType.per_Token
    scales = {"w1_scale": to_torch(s1), "w2_scale": to_torch(s2)}
    static = {"a1_scale": 0.02, "a2_scale": 0.125}
    scales |= {name: torch.tensor(static[name]) for name in given}
    out = fused_moe(x, to_torch(w1), to_torch(w2), weights, ids, quant_type=kind, **scales)
    names = {"a1_scale": "x_scale", "a2_scale": "h_scale"}
    options |= {names[name]: np.array([static[name]], np.float32) for name in given}
    options["quant_activations"] = "int8" if quant == "int8_channel" else "fp8"
    layer.check(out, (w1, w2), **options)


def test_int8(layer: Layer) -> None:
    (w1, w2, s1, s2), options = quantised(layer, "int8_channel")
    x, _, _, weights, ids = layer.tensors()
    scales = {"w1_scale": to_torch(s1)[..., None], "w2_scale": to_torch(s2)[..., None]}
    t1, t2 = aiter.shuffle_weight(to_torch(w1)), aiter.shuffle_weight(to_torch(w2))
    out = fused_moe(x, t1, t2, weights, ids, quant_type=QuantType.per_Token, **scales)
    layer.check(out, (w1, w2), **options)


@pytest.mark.parametrize("how", ["plain", "weights plain", "shuffled", "interleave"])
@pytest.mark.parametrize("quant", ["mxfp4", "mxfp8"])
def test_mx(layer: Layer, quant: str, how: str) -> None:
    (w1, w2, s1, s2), options = quantised(layer, quant)
    x, _, _, weights, ids = layer.tensors()
    t1, t2, u1, u2 = map(to_torch, (w1, w2, s1, s2))
    call: dict[str, Any] = {"quant_type": QuantType.per_1x32}
    if how == "plain":
        call["layout"] = "plain"
    elif how == "interleave":
        t1, t2 = aiter.shuffle_weight_a16w4(t1, 16, True), aiter.shuffle_weight(t2)
        u1 = aiter.shuffle_scale_a16w4(u1.flatten(0, 1), E, True)
        u2 = aiter.e8m0_shuffle(u2.flatten(0, 1))
        call["gate_mode"] = "interleave"
    else:
        u1, u2 = (aiter.e8m0_shuffle(u.flatten(0, 1)) for u in (u1, u2))
        if how == "shuffled":
            t1, t2 = aiter.shuffle_weight(t1), aiter.shuffle_weight(t2)
    if quant == "mxfp4":
        flags = {t: getattr(t, "is_shuffled", False) for t in (t1, t2)}
        t1, t2 = (t.view(torch.float4_e2m1fn_x2) for t in (t1, t2))
        t1.is_shuffled, t2.is_shuffled = flags.values()
    for kind in (torch.uint8, torch.float8_e8m0fnu):
        call |= {"w1_scale": u1.view(kind), "w2_scale": u2.view(kind)}
        layer.check(fused_moe(x, t1, t2, weights, ids, **call), (w1, w2), **options)


@pytest.mark.parametrize("scale_dtype", ["bf16", "f32"])
def test_int4_for_16_bit_activations(layer: Layer, scale_dtype: str) -> None:
    (w1, w2, s1, s2), options = quantised(
        layer, "int4_group", block=(1, 32), scale_dtype=scale_dtype
    )
    x, _, _, weights, ids = layer.tensors()
    stored = []
    for w in (w1, w2):
        values = np.stack([w & 15, w >> 4], -1).reshape(*w.shape[:2], -1).astype(np.int8) - 8
        shuffled = aiter.shuffle_weight(to_torch(values)).numpy()
        stored.append(to_torch(pack_int4(shuffled)).view(torch.int8))
    scales = [to_torch(np.ascontiguousarray(s.swapaxes(1, 2))) for s in (s1, s2)]
    if scale_dtype == "bf16":  # two groups together
        scales = [s.view(E, -1, 2, s.shape[2]).transpose(2, 3).contiguous() for s in scales]
    call = {"quant_type": QuantType.per_1x32, "w1_scale": scales[0], "w2_scale": scales[1]}
    layer.check(fused_moe(x, *stored, weights, ids, **call), (w1, w2), **options)


def test_int4_for_8_bit_activations(layer: Layer) -> None:
    """Eight values to a 32-bit word, a scale to a row."""
    (w1, w2, _, _), _ = quantised(layer, "int4_group", block=(1, 32))
    x, _, _, weights, ids = layer.tensors()
    rng = np.random.default_rng(0)
    stored, scales = [], []
    for w in (w1, w2):
        values = np.stack([w & 15, w >> 4], -1).reshape(*w.shape[:2], -1).astype(np.int8) - 8
        shuffled = aiter.shuffle_weight(to_torch(values), use_int4=True).numpy()
        stored.append(to_torch(pack_int4_words(shuffled)))
        scales.append(rng.random((E, w.shape[1], 1), np.float32) / 8)
    call = {"w1_scale": to_torch(scales[0]), "w2_scale": to_torch(scales[1])}
    out = fused_moe(x, *stored, weights, ids, quant_type=QuantType.per_Token, **call)
    groups = [s.repeat(w.shape[2] * 2 // 128, 2) for s, w in zip(scales, (w1, w2), strict=True)]
    options = {"quant": "int4_group", "block": (1, 128)}
    layer.check(out, (w1, w2), **options, w13_scale=groups[0], w2_scale=groups[1])


WRONG = [
    ({"quant_type": QuantType.per_Token}, ValueError, "^w1_scale: quant_type per_Token needs"),
    ({"w1_scale": torch.ones(E)}, ValueError, "^w1_scale: expected None for quant_type No"),
    (
        {"quant_type": 2, "w1_scale": torch.ones(E), "w2_scale": torch.ones(E)},
        moepad.UnsupportedError,
        "^quant_type: no kernel for per_Token with weights of torch.bfloat16",
    ),
    (
        {"quant_type": 6, "w1_scale": torch.ones(E), "w2_scale": torch.ones(E)},
        moepad.UnsupportedError,
        "^quant_type: no kernel for per_256x128",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), WRONG)
def test_wrong_combinations(
    layer: Layer, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        fused_moe(*layer.tensors(), **options)


def test_scales_of_a_wrong_shape(layer: Layer) -> None:
    (w1, w2, s1, s2), _ = quantised(layer, "fp8_channel")
    x, _, _, weights, ids = layer.tensors()
    scales = {"w1_scale": to_torch(s1)[:, 1:], "w2_scale": to_torch(s2)}
    with pytest.raises(ValueError, match=r"^w1_scale: expected the elements of shape \(4, 256\)"):
        fused_moe(x, to_torch(w1), to_torch(w2), weights, ids, quant_type=2, **scales)


@pytest.mark.parametrize(("inter", "n_block_row"), [(192, 3), (96, 2), (224, 4)])
def test_blocks_across_gate_and_up(inter: int, n_block_row: int) -> None:
    """Scales of which no shape tells the half: refused, never guessed."""
    w1 = torch.zeros(2, 2 * inter, 128).to(torch.float8_e4m3fn)
    w2 = torch.zeros(2, 128, inter).to(torch.float8_e4m3fn)
    scales = {
        "w1_scale": torch.ones(2, n_block_row, 1),
        "w2_scale": torch.ones(2, 1, -(-inter // 128)),
    }
    x, weights, ids = torch.zeros(1, 128), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(moepad.UnsupportedError, match=r"^w1_scale: .*across gate and up"):
        fused_moe(x, w1, w2, weights, ids, quant_type=QuantType.per_128x128, **scales)


# --- As the module aiter -------------------------------------------------------------------------

USE = """
import sys
import moepad.aiter
assert moepad.aiter.install({replace}) is {expected}
import aiter
from aiter import ActivationType, QuantType
from aiter.fused_moe import fused_moe
import aiter.fused_moe as module
assert (fused_moe is moepad.aiter.fused_moe) is {expected} and module.fused_moe is fused_moe
"""
SERVED = """
from aiter.ops.shuffle import shuffle_weight
from aiter.ops.enum import QuantType as Again
from aiter.utility.fp4_utils import e8m0_shuffle
import importlib.util
assert Again is QuantType and importlib.util.find_spec("aiter.fused_moe")
assert moepad.aiter.install()
"""


def run(code: str, folder: Path) -> None:
    environment = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    subprocess.run([sys.executable, "-c", environment + code], check=True)


def test_served_where_aiter_is_absent(tmp_path: Path) -> None:
    run(USE.format(replace=False, expected=True) + SERVED, tmp_path)


@pytest.mark.parametrize("replace", [False, True])
def test_served_where_aiter_is_present(tmp_path: Path, replace: bool) -> None:
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text("ActivationType = QuantType = other = 1\n")
    (tmp_path / "aiter" / "fused_moe.py").write_text("def fused_moe(): ...\n")
    code = USE.format(replace=replace, expected=replace) + "assert aiter.other == 1\n"
    run(code, tmp_path)
