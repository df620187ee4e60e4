"""Quantised weights on emulated AMD GPUs: every kind, in every regime, with pads that no kernel may
read; every stored value exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fakehip
import ml_dtypes
import moepad
import numpy as np
import pytest
from fakehip import bridge
from moepad import reference
from moepad.testing import check_bits, check_close, quantise

Array = np.ndarray
TYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}


@dataclass(frozen=True)
class Kind:
    """A kind of quantisation as a test has it; `options` are `quantise`'s.

    `input` is what activations are rounded to where a test has that; None: as the quant says.
    """

    quant: str
    options: dict[str, Any] = field(default_factory=dict)
    phase: int = 0
    input: str | None = None

    @property
    def name(self) -> str:
        more = [str(value).replace(" ", "") for value in self.options.values()]
        return "-".join([self.quant, *more, *([self.input] if self.input else [])])

    @property
    def call_options(self) -> dict[str, Any]:
        block = {"block": self.options["block"]} if "block" in self.options else {}
        phase = {"scale_phase": self.phase} if self.phase else {}
        return {"quant": self.quant, **block, **phase}

    @property
    def n_pack(self) -> int:
        return 2 if self.quant in ("mxfp4", "int4_group") else 1


KINDS = [
    Kind("fp8_tensor", {"dtype": "f8_e4m3fn"}),
    Kind("fp8_channel", {"dtype": "f8_e4m3fnuz"}),
    Kind("fp8_channel", {"dtype": "f8_e5m2"}),
    Kind("fp8_block", {"dtype": "f8_e4m3fn"}, phase=96),
    Kind("fp8_block", {"dtype": "f8_e5m2", "block": (32, 64)}),
    Kind("mxfp8"),
    Kind("mxfp4"),
    Kind("int8_channel"),
    Kind("int4_group", {"block": (1, 32), "scale_dtype": "f32"}),
    Kind("int4_group", {"block": (1, 64), "scale_dtype": "bf16"}),
    Kind("int4_group", {"block": (1, 128), "scale_dtype": "f16"}),
]
# (tokens, experts, H, I): both regimes; rows that start on the bytes of a load, and not.
SIZES = [(5, 3, 136, 72), (5, 3, 136, 70), (72, 16, 136, 40), (72, 2, 136, 70), (72, 2, 200, 104)]


@pytest.fixture(scope="module", params=fakehip.ARCHS)
def device(request: pytest.FixtureRequest, emulated: None) -> int:
    return fakehip.ARCHS.index(request.param)


def is_refused(kind: Kind, dtype: str, device: int) -> bool:
    is_flushed = fakehip.ARCHS[device] == "gfx90a" and dtype == "f16"
    return is_flushed and kind.options.get("dtype") == "f8_e5m2"


def build(kind: Kind, dtype: str, size: tuple[int, ...], is_gated: bool = True) -> dict[str, Any]:
    """The arguments of a call on tensors without pads."""
    n_token, n_expert, n_hidden, n_inter = size
    rng = np.random.default_rng(n_token + n_inter)
    n_half = 2 if is_gated else 1
    w13 = rng.standard_normal((n_expert, n_half * n_inter, n_hidden), np.float32) * n_hidden**-0.5
    w2 = rng.standard_normal((n_expert, n_hidden, n_inter), np.float32) * n_inter**-0.5
    options = kind.options
    stored13, scale13 = quantise(w13, kind.quant, n_half=n_half, row_phase=kind.phase, **options)
    stored2, scale2 = quantise(w2, kind.quant, column_phase=kind.phase, **options)
    ids = np.stack([rng.permutation(n_expert)[:2] for _ in range(n_token)]).astype(np.int32)
    ids[1, 1] = -1
    return {
        "hidden_states": rng.standard_normal((n_token, n_hidden), np.float32).astype(TYPES[dtype]),
        "w13": stored13,
        "w2": stored2,
        "topk_weights": rng.random((n_token, 2), np.float32),
        "topk_ids": ids,
        "w13_scale": scale13,
        "w2_scale": scale2,
        "n_inter": n_inter,
        "activation": "silu",
        **kind.call_options,
    }


def pad(
    call: dict[str, Any], kind: Kind, n_inter_pad: int
) -> tuple[dict[str, Any], dict[str, Array]]:
    """The call on larger tensors, 0xff between, and masks of the elements that count."""
    n_inter, wide, masks = call["n_inter"], dict(call), {}
    n_half = call["w13"].shape[1] // n_inter

    def spread(name: str, axis: int, n_part: int, size: int) -> None:
        """Each of n_part parts along an axis padded to `size`."""
        array = call[name]
        parts = array.shape[axis] // n_part
        shape = [*array.shape]
        shape[axis] = n_part * size
        out = np.full((*shape, array.itemsize), 0xFF, np.uint8).view(array.dtype)[..., 0]
        mask = np.zeros(shape, bool)
        for part in range(n_part):
            old: list[Any] = [slice(None)] * array.ndim
            new = list(old)
            old[axis] = slice(part * parts, (part + 1) * parts)
            new[axis] = slice(part * size, part * size + parts)
            out[tuple(new)], mask[tuple(new)] = array[tuple(old)], True
        wide[name], masks[name] = out, mask

    spread("w13", 1, n_half, n_inter_pad)
    spread("w2", 2, 1, n_inter_pad // kind.n_pack)
    rows = {"fp8_tensor": None, "fp8_block": n_inter_pad // 32 + 3}.get(kind.quant, n_inter_pad)
    if rows:
        spread("w13_scale", 1, n_half, rows)
    if call["w2_scale"].ndim == 3:
        group = kind.options.get("block", (128, 128) if kind.quant == "fp8_block" else (1, 32))[1]
        more = 3 if kind.quant == "fp8_block" else 0
        spread("w2_scale", 2, 1, -(-n_inter_pad // group) + more)
    return wide, masks


def run(
    call: dict[str, Any],
    device: int,
    masks: dict[str, Array] | None = None,
    kernels: list[str] | None = None,
) -> Array:
    """The result on a device; `kernels` gets the names of those that ran."""
    there = {
        name: fakehip.to_device(value, device, where=(masks or {}).get(name))
        if isinstance(value, np.ndarray)
        else value
        for name, value in call.items()
    }
    x = call["hidden_states"]
    out = fakehip.DeviceArray(x.shape, x.dtype, device)
    try:
        moepad.fused_moe(**there, out=out)
        if kernels is not None:
            kernels += [report.kernel.name for report in bridge.log.launches]
    finally:
        fakehip.check()
    return out.numpy()


def turns(
    kind: Kind, kinds: list[Kind], device: int
) -> Iterator[tuple[int, tuple[int, ...], dict[str, Any]]]:
    """(turn, size, call): sizes and types take turns over kinds and devices."""
    turn = kinds.index(kind) + device
    for size in SIZES[turn % 2 :: 2]:
        turn += 1
        dtype = ("bf16", "f16")[turn % 2]
        if is_refused(kind, dtype, device):
            dtype = "bf16"
        yield turn, size, build(kind, dtype, size, is_gated=size != SIZES[0])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_equals_reference(kind: Kind, device: int) -> None:
    """Right on true tensors; on padded ones of the same bits, and nothing in a pad is read."""
    for _, size, call in turns(kind, KINDS, device):
        result = run(call, device)
        check_close(result, reference.fused_moe(**call), reference.naive(**call)[None])
        wide, masks = pad(call, kind, -(-size[3] // 64) * 64 + 64)
        check_bits(run(wide, device, masks), result)


EXACT = [kind for kind in KINDS if kind.quant in ("fp8_channel", "mxfp8", "mxfp4", "int8_channel")]
EXACT += [KINDS[0], KINDS[-1]]


@pytest.mark.parametrize(("dtype", "n_token"), [("bf16", 32), ("f16", 32), ("bf16", 160)])
@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_every_stored_value_is_exact(kind: Kind, dtype: str, n_token: int, device: int) -> None:
    """Column n of out is code n, picked by one of 32 h that are 1; NaN and infinity as they are."""
    n_inter, n_hidden = 32, 256
    call = build(kind, dtype, (n_token, 2, n_hidden, n_inter), is_gated=False)
    if is_refused(kind, dtype, device):
        with pytest.raises(moepad.UnsupportedError, match="f8_e5m2 weights on gfx90a bf16"):
            run(call, device)
        return
    column = np.arange(n_token) % n_inter
    eye = np.stack([np.eye(n_inter, n_hidden, dtype=np.float32)] * 2)
    call["w13"], call["w13_scale"] = quantise(eye, kind.quant, **kind.options)
    call["hidden_states"] = np.eye(n_hidden)[column].astype(TYPES[dtype])
    call["topk_ids"] = np.zeros((n_token, 1), np.int32)
    call["topk_weights"] = np.ones((n_token, 1), np.float32)
    call["activation"] = "relu2"

    zero = 0x88 if kind.quant == "int4_group" else 0
    code = np.full((2, n_hidden, n_inter // kind.n_pack), zero, np.uint8)
    n = np.arange(n_hidden)
    if kind.n_pack == 1:
        code[0, n, n % n_inter] = n
    else:
        shift = n % n_inter % 2 * 4
        at = code[0, n, n % n_inter // 2] & ~(15 << shift)
        code[0, n, n % n_inter // 2] = at | n // n_inter % 16 * (1 << shift)
        code[0, n, n % n_inter // 2] ^= (n % 2 << 3 << shift).astype(np.uint8)
    call["w2"] = code.view(call["w2"].dtype)
    scale = call["w2_scale"]
    call["w2_scale"] = np.full_like(scale, 126 if scale.dtype == np.uint8 else 0.5)
    with np.errstate(invalid="ignore"):
        expected = reference.fused_moe(**call)
    rounded = expected.astype(TYPES[dtype]).astype(np.float32)
    np.testing.assert_array_equal(run(call, device).astype(np.float32), rounded)


@pytest.mark.parametrize(
    ("kind", "change", "pattern"),
    [
        (KINDS[3], {"block": (96, 128)}, r"block: on a GPU rows of a power of two, got 96 .*"),
        (KINDS[3], {"block": (128, 96)}, r"block: on a GPU columns of a power of two from 32.*"),
    ],
)
def test_refused(kind: Kind, change: dict[str, Any], pattern: str, device: int) -> None:
    call = build(Kind("fp8_block", {"block": change["block"]}), "bf16", (5, 3, 136, 72))
    with pytest.raises(moepad.UnsupportedError, match=pattern):
        run(call, device)


CODED = [kind for kind in KINDS if kind.quant.startswith("fp8") or kind.quant == "int8_channel"]


MX = [
    Kind("mxfp8", input="mxfp8"),
    Kind("mxfp4", input="mxfp8"),
    Kind("mxfp4", input="mxfp4"),
]


def coded(kind: Kind) -> str:
    return kind.input or ("int8" if kind.quant == "int8_channel" else "fp8")


@pytest.mark.parametrize("kind", CODED + MX, ids=lambda kind: kind.name)
def test_quantised_activations(kind: Kind, device: int) -> None:
    """Within tolerance of the specification, far nearer to it than to the result without, and
    nothing in a pad is read.

    Fixed scales take turns with those of the values.
    """
    for turn, _, call in turns(kind, CODED + MX, device):
        check_coded(kind, call, device, is_fixed=turn % 3 == 0 and not kind.input)


def check_coded(kind: Kind, call: dict[str, Any], device: int, is_fixed: bool) -> list[str]:
    """The kernels that ran, those of the padded tensors after those of the others."""
    call["hidden_states"][2] = 0
    exact = reference.fused_moe(**call)
    call["quant_activations"] = coded(kind)
    if is_fixed:
        call["x_scale"] = np.array([0.011], np.float32)
        call["h_scale"] = np.array([0.002], np.float32)
    kernels: list[str] = []
    result = run(call, device, kernels=kernels)
    expected = reference.fused_moe(**call)
    check_close(result, expected, reference.naive(**call)[None])
    assert np.abs(result - expected).mean() < 0.3 * np.abs(result - exact).mean()
    wide, masks = pad(call, kind, -(-call["n_inter"] // 64) * 64 + 64)
    check_bits(run(wide, device, masks, kernels), result)
    return kernels


# Rows of whole 16 bytes; of several stages of the tiles of bytes, few and many tokens to an expert.
BYTE_SIZES = [(6, 2, 400, 48), (72, 2, 144, 272)]
BYTE_KINDS = [kind for kind in CODED if kind.options.get("block", (0, 128))[1] == 128] + [
    Kind("fp8_block", {"dtype": "f8_e4m3fnuz"}, phase=32),
    Kind("fp8_block", {"dtype": "f8_e5m2", "block": (32, 256)}, phase=160),
]


def is_native(kind: Kind, device: int) -> bool:
    """Whether the device's matrix unit takes weights, and codes, as the bytes they are."""
    formats = {"gfx90a": (), "gfx942": ("f8_e4m3fnuz",), "gfx950": ("f8_e4m3fn", "f8_e5m2")}
    dtype = kind.options.get("dtype")
    return dtype is None or dtype in formats[fakehip.ARCHS[device]]


@pytest.mark.parametrize("kind", BYTE_KINDS, ids=lambda kind: f"{kind.name}-{kind.phase}")
def test_bytes_where_the_device_multiplies_them(kind: Kind, device: int) -> None:
    """The kernels taken, and that what they give is right as that of all others."""
    turn = BYTE_KINDS.index(kind) + device
    for size in BYTE_SIZES if is_native(kind, device) else BYTE_SIZES[:1]:
        turn += 1
        dtype = "bf16" if turn // 2 % 2 or is_refused(kind, "f16", device) else "f16"
        call = build(kind, dtype, size, is_gated=turn % 2 == 0)
        kernels = check_coded(kind, call, device, is_fixed=turn % 3 == 0)
        family = "_bytes_tile" if is_native(kind, device) else "_coded"
        assert sum(family in name for name in kernels) == 4  # two products, padded and not


@pytest.mark.parametrize("kind", CODED + MX, ids=lambda kind: kind.name)
def test_every_code_of_an_activation(kind: Kind, device: int) -> None:
    """Column n of out is the square of x[n], rounded to codes before and after; where a row has a
    NaN or an infinity all that shares its scale is NaN.
    """
    n = 128
    call = build(kind, "bf16", (3, 2, n, n), is_gated=False)
    eye = np.stack([np.eye(n, dtype=np.float32)] * 2)
    quant, phase, options = kind.quant, kind.phase, kind.options
    call["w13"], call["w13_scale"] = quantise(eye, quant, row_phase=phase, **options)
    call["w2"], call["w2_scale"] = quantise(eye, quant, column_phase=phase, **options)
    rng = np.random.default_rng(7)
    x = np.exp2(rng.uniform(-14, 0, (3, n)))
    x[1, 5] = np.nan if kind.quant == "fp8_tensor" else np.inf
    x[2, :3] = [0.0, 2.0**-30, 1.0]
    call |= {
        "hidden_states": x.astype(TYPES["bf16"]),
        "topk_ids": np.zeros((3, 1), np.int32),
        "topk_weights": np.ones((3, 1), np.float32),
        "activation": "relu2",
        "quant_activations": coded(kind),
    }
    with np.errstate(invalid="ignore"):
        expected = reference.fused_moe(**call)
    result = run(call, device).astype(np.float64)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
    np.testing.assert_allclose(result[[0, 2]], expected[[0, 2]], rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("kind", MX, ids=lambda kind: kind.name)
def test_mx_codes_are_exact(kind: Kind, device: int) -> None:
    """Between identities, of x from the least bfloat16 to the largest: the specification's bits.

    silu is exact where it is half of x, and where it is x or 0; 1.75, 1.875 and 2 are borders.
    """
    n = 64
    rng = np.random.default_rng(3)
    exponent = np.array([-133, -130, -127, -126, -125, -120, -119, -40, -30, 8, 60, 119, 126, 127])
    x = np.ldexp(1 + rng.integers(0, 128, (len(exponent), n)) / 128, exponent[:, None])
    x *= np.exp2(rng.integers(-6, 1, x.shape)) * rng.choice([-1, 1], x.shape)
    x[:, 0] = np.ldexp(np.array([1, 1.75, 1.9375, 1.875])[np.arange(len(x)) % 4], exponent)
    x[8:, 1:][np.abs(x[8:, 1:]) < 128] = 0
    call = build(kind, "bf16", (len(x), 2, n, n), is_gated=False)
    eye = np.stack([np.eye(n, dtype=np.float32)] * 2)
    for name in ("w13", "w2"):
        call[name], call[name + "_scale"] = quantise(eye, kind.quant)
    call |= {
        "hidden_states": x.astype(TYPES["bf16"]),
        "topk_ids": np.zeros((len(x), 1), np.int32),
        "topk_weights": np.ones((len(x), 1), np.float32),
        "quant_activations": coded(kind),
    }
    with np.errstate(over="ignore"):
        expected = reference.fused_moe(**call).astype(np.float32).astype(TYPES["bf16"])
    assert np.isfinite(expected.astype(np.float32)).all() and expected[2:].any(axis=1).all()
    np.testing.assert_array_equal(run(call, device), expected)


@pytest.mark.parametrize("kind", MX, ids=lambda kind: kind.name)
def test_mx_activations_with_biases(kind: Kind, device: int) -> None:
    """swigluoai's up + 1 gives no column beyond the last one a value that a scale would show."""
    call = build(kind, "bf16", SIZES[1])
    rng = np.random.default_rng(4)
    for name in ("w13", "w2"):
        call[name + "_bias"] = rng.standard_normal(call[name].shape[:2], np.float32)
    call |= {"activation": "swigluoai", "swiglu_limit": 7.0, "quant_activations": coded(kind)}
    check_close(run(call, device), reference.fused_moe(**call), reference.naive(**call)[None])


def test_quantised_activations_follow_the_tokens(device: int) -> None:
    """With fewer tokens than rows, the rest is neither read nor made codes of."""
    kind = CODED[3]
    call = build(kind, "bf16", SIZES[2]) | {"quant_activations": "fp8"}
    call["hidden_states"][40:] = np.nan
    call["n_token"] = np.array([40], np.int32)
    expected = reference.fused_moe(**call)
    check_close(run(call, device), expected, reference.naive(**call)[None])


def test_float16_with_e5m2_on_mi200(device: int) -> None:
    """Its matrix instructions would take e5m2's subnormals for zeros."""
    call = build(KINDS[2], "f16", SIZES[0])
    if fakehip.ARCHS[device] == "gfx90a":
        with pytest.raises(
            moepad.UnsupportedError, match=r"f8_e5m2 weights on gfx90a bf16, got f16"
        ):
            run(call, device)
    else:
        check_close(run(call, device), reference.fused_moe(**call), reference.naive(**call)[None])
