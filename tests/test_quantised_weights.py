"""Quantised checkpoints through `load_experts`, `update` and `save`, in every form real files have.

What is expected comes from the definitions of `Plan`, by code unrelated to the loader's.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import moepad
import numpy as np
import pytest
from checkpoints import (
    FORMATS,
    MIXTRAL,
    PREFIX,
    Format,
    Quantised,
    Tensors,
    make_checkpoint,
    make_quantised,
    one_by_one,
    read_file,
    write_folder,
    write_fused,
)
from conftest import in_child, require
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from memory import growth
from moepad import CheckpointError, UnsupportedError, reference
from moepad.checkpoint import NUMPY_DTYPES, open_source
from moepad.testing import check_bits
from moepad.verify import poison_pads, sum_error
from numpy.typing import NDArray
from safetensors.numpy import save_file
from test_weights import Lazy, Ranks, addresses, bits_of, check_same

DATA = Path(__file__).parent / "data"

Array = NDArray[Any]

BLOCKS = {"fp8_block": (32, 48), "int4_group": (1, 32)}


def sizes_of(form: Format, **sizes: int) -> dict[str, Any]:
    """What `make` and `plan_of` take."""
    block = BLOCKS.get(form.quant, (128, 128))
    return {
        "n_hidden": 72, "n_inter": 160, "n_expert": 3, "block": block, "quant": form.quant,
        "gated": form.gated, "bias": form.bias, **sizes,
    }  # fmt: skip


def make(form: Format, sizes: dict[str, Any], seed: int = 0) -> tuple[Quantised, Tensors]:
    """A layer and the checkpoint that holds it."""
    layer = make_quantised(**sizes, scale_dtype=form.scale_dtype, seed=seed)
    tensors = {f"{PREFIX}.{name}": values for name, values in form.write(layer).items()}
    return layer, {name: np.array(values) for name, values in tensors.items()}


def expected_tensors(layer: Quantised, plan: moepad.Plan) -> Tensors:
    """The canonical tensors by definition; pads of weights zero, of scales one."""
    experts = slice(plan.expert_start, plan.expert_stop)
    halves = [kind for kind in ("gate", "up") if kind in layer.weights]
    n_pack = plan.n_pack

    def fitted(values: Array, axis: int, start: int, stop: int, size: int, pad: int) -> Array:
        """Elements [start, stop) along an axis, at the front of `size`."""
        values = values[experts]
        shape = list(values.shape)
        shape[axis] = size
        result = np.full(shape, pad, values.dtype)
        n = min(stop, values.shape[axis]) - start
        at = [slice(None)] * values.ndim
        source = list(at)
        at[axis], source[axis] = slice(n), slice(start, start + n)
        result[tuple(at)] = values[tuple(source)]
        return result

    w13 = [
        fitted(layer.weights[kind].view(np.uint8), 1, plan.start, plan.stop, plan.n_inter_pad, 0)
        for kind in halves
    ]
    w2 = fitted(
        layer.weights["down"].view(np.uint8), 2, plan.start // n_pack, -(-plan.stop // n_pack),
        plan.w2_shape[2], 0,
    )  # fmt: skip
    storage = NUMPY_DTYPES[plan.storage_dtype]
    tensors = {"w13": np.concatenate(w13, axis=1).view(storage), "w2": w2.view(storage)}

    one = 127 if plan.scale_dtype == "f8_e8m0" else 1
    rows, columns = {"fp8_block": plan.block}.get(plan.quant, (1, plan.block[1]))
    if plan.quant == "fp8_tensor":
        each = np.stack([layer.scales[kind][experts] for kind in halves], axis=1)
        tensors["w13_scale"] = each if plan.gated else each[:, 0]
    else:
        assert plan.w13_scale_shape
        first = (plan.start - plan.scale_phase) // rows
        stop = -(-plan.stop // rows) if plan.n_inter else first
        n_row = plan.w13_scale_shape[1] // len(halves)
        each13 = [fitted(layer.scales[kind], 1, first, stop, n_row, one) for kind in halves]
        tensors["w13_scale"] = np.concatenate(each13, axis=1)
    if plan.quant.endswith(("tensor", "channel")):
        tensors["w2_scale"] = layer.scales["down"][experts]
    else:
        assert plan.w2_scale_shape
        first = (plan.start - plan.scale_phase) // columns
        stop = -(-plan.stop // columns) if plan.n_inter else first
        size = plan.w2_scale_shape[2]
        tensors["w2_scale"] = fitted(layer.scales["down"], 2, first, stop, size, one)
    scale = NUMPY_DTYPES[plan.scale_dtype]
    for name in ("w13_scale", "w2_scale"):
        values = tensors[name]
        tensors[name] = values.view(scale) if values.itemsize == 1 else values.astype(scale)
    if layer.biases:
        bias = [
            fitted(layer.biases[kind], 1, plan.start, plan.stop, plan.n_inter_pad, 0)
            for kind in halves
        ]
        tensors["w13_bias"] = np.concatenate(bias, axis=1)
        tensors["w2_bias"] = layer.biases["down"][experts]
        if plan.tp_rank:
            tensors["w2_bias"] = np.zeros_like(tensors["w2_bias"])
    return tensors


def check_experts(experts: moepad.Experts, layer: Quantised) -> None:
    expected = expected_tensors(layer, experts.plan)
    assert set(experts._tensors) == set(expected)
    for name, tensor in experts._tensors.items():
        assert tensor.shape == getattr(experts.plan, f"{name}_shape"), name
        check_bits(np.atleast_2d(tensor), np.atleast_2d(expected[name]))


def plans_of(sizes: dict[str, Any], ranks: Ranks, **rest: Any) -> list[moepad.Plan]:
    return ranks.plans(**sizes, **rest)


# --- Formats and ranks ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    """Every form gives the canonical tensors on every rank, and its own tensors back."""
    form = FORMATS[name]
    sizes = sizes_of(form)
    layer, tensors = make(form, sizes)
    for ranks in (
        Ranks(1, 1, "true", 1), Ranks(3, 1, "true", 4), Ranks(2, 2, "true", 128),
        Ranks(8, 1, "padded", 32), Ranks(3, 1, "block", 1),
    ):  # fmt: skip
        for plan in plans_of(sizes, ranks):
            experts = moepad.load_experts(tensors, PREFIX, plan)
            check_experts(experts, layer)
            if len(plans_of(sizes, ranks)) == 1:
                check_same(experts.state_dict(), tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_odd_sizes(name: str) -> None:
    """Sizes that end inside a byte, a word, a group and a block."""
    form = FORMATS[name]
    n_inter = 96 if name.startswith("fused fp8 block") else 77
    sizes = sizes_of(form, n_hidden=37, n_inter=n_inter)
    layer, tensors = make(form, sizes)
    for ranks in (Ranks(1, 1, "true", 1), Ranks(2, 1, "true", 3), Ranks(3, 3, "padded", 32)):
        for plan in plans_of(sizes, ranks):
            experts = moepad.load_experts(tensors, PREFIX, plan)
            check_experts(experts, layer)
    whole = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))
    check_same(whole.state_dict(), tensors)


ranks = st.builds(
    Ranks,
    tp_size=st.integers(1, 6),
    ep_size=st.integers(1, 3),
    split=st.sampled_from(["true", "padded", "block"]),
    align=st.sampled_from([1, 2, 32, 96]),
)


def legal(sizes: dict[str, Any], shares: Ranks) -> list[moepad.Plan]:
    try:
        return plans_of(sizes, shares)
    except UnsupportedError:
        assume(False)
    raise AssertionError


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(FORMATS)),
    n_hidden=st.integers(1, 70),
    n_inter=st.integers(1, 200),
    n_expert=st.integers(1, 4),
    block=st.sampled_from([(32, 32), (64, 32), (48, 80), (128, 128)]),
    saved=ranks,
    loaded=ranks,
)
def test_save_and_load_at_other_sizes(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    n_hidden: int,
    n_inter: int,
    n_expert: int,
    block: tuple[int, int],
    saved: Ranks,
    loaded: Ranks,
) -> None:
    """The files of all ranks are the checkpoint, each element once, whatever shares wrote them."""
    form = FORMATS[name]
    if form.quant == "fp8_block" and name.startswith("fused"):
        n_inter = max(block[0], n_inter - n_inter % block[0])
    if name.startswith("fused ungated"):
        assume(n_hidden != n_inter)  # a square does not tell which axis comes first
    sizes = sizes_of(form, n_hidden=n_hidden, n_inter=n_inter, n_expert=n_expert)
    if form.quant == "fp8_block":
        sizes["block"] = block
    saving, loading = legal(sizes, saved), legal(sizes, loaded)
    layer, tensors = make(form, sizes)
    folder = tmp_path_factory.mktemp("saved")
    n_element = 0
    for plan in saving:
        experts = moepad.load_experts(tensors, PREFIX, plan)
        poison_pads(experts)
        n_element += sum(part.size for part in read_file(experts.save(folder)).values())
    assert n_element == sum(tensor.size for tensor in tensors.values())
    for plan in loading:
        check_experts(moepad.load_experts(folder, PREFIX, plan), layer)
    whole = moepad.load_experts(folder, PREFIX, moepad.plan(**sizes))
    check_same(whole.state_dict(), tensors)


@pytest.mark.parametrize("name", ["scale", "weight_scale_inv"])
def test_block_scales_that_are_powers_of_two(name: str) -> None:
    """e8m0 for blocks of float8, as "scale_fmt": "ue8m0" has them; every byte but NaN."""
    sizes = {**sizes_of(FORMATS["hf fp8 block"], n_hidden=512, n_inter=512), "block": (32, 32)}
    layer = make_quantised(**sizes)
    for kind, scale in layer.scales.items():
        powers = np.resize(np.arange(255, dtype=np.uint8), scale.shape)
        layer.scales[kind] = np.ldexp(np.float32(1), powers.astype(np.int32) - 127)

    def as_e8m0(scale: Array) -> Array:
        return (np.log2(scale) + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)

    stored = one_by_one(layer, MIXTRAL, name, as_e8m0)
    tensors = {f"{PREFIX}.{key}": values for key, values in stored.items()}
    for plan in plans_of(sizes, Ranks(3, 1, "true", 1)):
        check_experts(moepad.load_experts(tensors, PREFIX, plan), layer)
    check_same(moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes)).state_dict(), tensors)


def test_layout_by_hand() -> None:
    """Rows of gate and up in turn, which no name or shape tells."""
    sizes = sizes_of(FORMATS["fused mxfp4"])
    layer = make_quantised(**sizes)
    tensors = {
        f"{PREFIX}.{name}": values
        for name, values in write_fused(layer, "_scale_inv", order="in turn").items()
    }
    plan = moepad.plan(**sizes, tp_size=3, tp_rank=1)
    experts = moepad.load_experts(tensors, PREFIX, plan, layout="fused_interleaved")
    check_experts(experts, layer)
    with pytest.raises(ValueError, match=r"layout: expected one of gate_up_down, .* got 'qwen'"):
        moepad.load_experts(tensors, PREFIX, plan, layout="qwen")


@pytest.mark.parametrize("kind", ["torch", "strided", "lazy mapping"])
@pytest.mark.parametrize("name", FORMATS)
def test_sources(name: str, kind: str) -> None:
    """In memory: tensors of torch, arrays that are not contiguous, values made on access."""
    form = FORMATS[name]
    sizes = sizes_of(form)
    layer, tensors = make(form, sizes)
    sources: dict[str, Callable[[], Any]] = {
        "torch": lambda: {key: as_torch(values) for key, values in tensors.items()},
        "strided": lambda: {key: strided(values) for key, values in tensors.items()},
        "lazy mapping": lambda: Lazy(tensors),
    }
    source = sources[kind]()
    for plan in plans_of(sizes, Ranks(3, 1, "true", 128)):
        experts = moepad.load_experts(source, PREFIX, plan)
        check_experts(experts, layer)
        experts.update(source)
        check_experts(experts, layer)


def as_torch(values: Array) -> Any:
    torch = require("torch")
    name = values.dtype.name
    bits = values if values.dtype.kind in "iuf" else values.view(f"i{values.itemsize}")
    tensor = torch.from_numpy(np.array(bits))
    return tensor if values.dtype.kind in "iuf" else tensor.view(getattr(torch, name))


def strided(values: Array) -> Array:
    for axis in range(values.ndim):
        values = np.repeat(values, 2, axis)
    return values[(slice(None, None, 2),) * values.ndim]


# --- Against the tools that write such files -----------------------------------------------------


TOOL_KINDS = {
    "int4_group": {"dtype": "bf16", "block": (1, 32)},
    "int8_channel": {},
    "fp8_channel": {},
    "fp8_tensor": {},
    "fp8_block": {"block": (16, 16)},
    "mxfp4": {},
    "mxfp8": {},
}


@pytest.mark.parametrize("quant", TOOL_KINDS)
def test_compressed_tensors(quant: str) -> None:
    """What compressed-tensors packs is, loaded and dequantised, what it itself makes of it."""
    path = DATA / "compressed_tensors.safetensors"  # by make_compressed_tensors.py
    plan = moepad.plan(64, 32, 1, quant=quant, **TOOL_KINDS[quant])
    experts = moepad.load_experts(path, f"{quant}.experts", plan)
    w13, w2 = reference.dequantise(
        experts.w13, experts.w2, experts.w13_scale, experts.w2_scale, quant=quant, block=plan.block
    )
    tool = {name: a for name, a in read_file(path).items() if name.startswith(f"{quant}.dec")}
    for name, values in (("gate", w13[0, :32]), ("up", w13[0, 32:]), ("down", w2[0])):
        its = tool[f"{quant}.decompressed.{name}_proj"]
        check_bits(values.astype(ml_dtypes.bfloat16), its)
    stored = {n: a for n, a in read_file(path).items() if n.startswith(f"{quant}.experts")}
    check_same(experts.state_dict(), stored)


# --- Conversion to fnuz --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.quant.startswith("fp8")])
def test_fnuz(name: str) -> None:
    """The same bytes but 0x80, scales doubled: every weight is the same number."""
    form = FORMATS[name]
    sizes = sizes_of(form)
    tensors = make(form, sizes)[1]
    fn = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))
    plan = moepad.plan(**sizes, dtype="f8_e4m3fnuz")
    fnuz = moepad.load_experts(tensors, PREFIX, plan)
    assert fnuz.w13.dtype == ml_dtypes.float8_e4m3fnuz
    assert (fn.w13.view(np.uint8) == 0x80).any() and not (fnuz.w13.view(np.uint8) == 0x80).any()
    both = [
        reference.dequantise(
            e.w13, e.w2, e.w13_scale, e.w2_scale, quant=form.quant, block=sizes["block"]
        )
        for e in (fn, fnuz)
    ]
    for values, converted in zip(*both, strict=True):
        np.testing.assert_array_equal(values, converted)
    back = fnuz.state_dict()
    for key, values in back.items():
        expected = tensors[key].copy()
        if expected.dtype == ml_dtypes.float8_e4m3fn:
            expected.view(np.uint8)[expected.view(np.uint8) == 0x80] = 0
        check_bits(np.atleast_1d(values), np.atleast_1d(expected))
    fnuz.update(tensors)
    check_same(fnuz.state_dict(), back)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
@pytest.mark.parametrize("kind", ["dict", "folder"])
def test_fnuz_refuses_nan(tmp_path: Path, kind: str, byte: int) -> None:
    form = FORMATS["ct fp8 channel"]
    sizes = sizes_of(form)
    tensors = make(form, sizes)[1]
    name = f"{PREFIX}.2.down_proj.weight"
    plan = moepad.plan(**sizes, dtype="f8_e4m3fnuz")
    experts = moepad.load_experts(tensors, PREFIX, plan)
    before = bits_of(experts)
    bad = {**tensors, name: tensors[name].copy()}
    bad[name].view(np.uint8)[5, 7] = byte
    source: Any = write_folder(tmp_path / "c", bad) if kind == "folder" else bad
    for act in (lambda: moepad.load_experts(source, PREFIX, plan), lambda: experts.update(source)):
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)} in .*: holds NaN"):
            act()
    assert bits_of(experts) == before
    moepad.load_experts(bad, PREFIX, moepad.plan(**sizes))  # as it is stored, it is no fault


def test_fnuz_and_e5m2_as_stored() -> None:
    for dtype in ("f8_e4m3fnuz", "f8_e5m2"):
        form = FORMATS["hf fp8 block"]
        sizes = sizes_of(form)
        layer = make_quantised(**sizes, dtype=dtype)
        tensors = {f"{PREFIX}.{key}": values for key, values in form.write(layer).items()}
        experts = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes, dtype=dtype))
        check_experts(experts, layer)
        check_same(experts.state_dict(), tensors)
        with pytest.raises(CheckpointError, match=f"expected dtype f8_e4m3fn, got {dtype}"):
            moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))


def test_fnuz_scale_without_a_double() -> None:
    form = FORMATS["hf fp8 block"]
    tensors = make(form, sizes_of(form))[1]
    name = f"{PREFIX}.0.up_proj.weight_scale_inv"
    tensors[name] = spoilt(tensors[name], 3e38)
    moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes_of(form)))
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} .*NaN or infinite"):
        moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes_of(form), dtype="f8_e4m3fnuz"))


def test_fnuz_of_two_types() -> None:
    form = FORMATS["ct fp8 channel"]
    sizes = sizes_of(form)
    tensors = make(form, sizes)[1]
    for name in [name for name in tensors if name.endswith("up_proj.weight")]:
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fnuz)
    with pytest.raises(CheckpointError, match="weights of one type, got f8_e4m3fn and f8_e4m3fnuz"):
        moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes, dtype="f8_e4m3fnuz"))


# --- Updating ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dict", "folder"])
@pytest.mark.parametrize("name", FORMATS)
def test_update(tmp_path: Path, name: str, kind: str) -> None:
    """All values in place, whatever pads hold, and given back."""
    form = FORMATS[name]
    sizes = sizes_of(form)
    plan = moepad.plan(**sizes, tp_size=3, tp_rank=1, align=128)
    experts = moepad.load_experts(make(form, sizes)[1], PREFIX, plan)
    before, pad = addresses(experts), experts.w2[:, :, -1:].tobytes()
    layer, tensors = make(form, sizes, seed=9)
    experts.update(write_folder(tmp_path / "c", tensors) if kind == "folder" else tensors)
    check_experts(experts, layer)
    assert addresses(experts) == before and experts.w2[:, :, -1:].tobytes() == pad
    again = moepad.load_experts(tensors, PREFIX, plan)
    check_same(experts.state_dict(), again.state_dict())


@pytest.mark.parametrize("name", ["hf fp8 block", "ct int4", "ct fp8 tensor", "gpt-oss"])
def test_update_when_any_read_fails(name: str) -> None:
    form = FORMATS[name]
    sizes = sizes_of(form, n_expert=1)
    plan = moepad.plan(**sizes, tp_size=2, tp_rank=1)
    old, new = make(form, sizes)[1], make(form, sizes, seed=9)[1]
    complete = Lazy(new)
    moepad.load_experts(old, PREFIX, plan).update(complete)
    experts = moepad.load_experts(old, PREFIX, plan)
    before, extras = bits_of(experts), dict(experts.extras)
    for n in range(len(complete.asked)):
        with pytest.raises(CheckpointError, match="OSError: the network"):
            experts.update(Lazy(new, fail_at=n))
        assert bits_of(experts) == before and experts.extras == extras, f"read {n} failed"


def test_update_in_another_form() -> None:
    """Between forms of a kind; what comes back later is still every bit that was loaded."""
    sizes = sizes_of(FORMATS["ct fp8 channel"])
    experts = moepad.load_experts(
        make(FORMATS["ct fp8 channel"], sizes)[1], PREFIX, moepad.plan(**sizes)
    )
    layer, tensors = make(FORMATS["fused fp8 channel transposed"], sizes, seed=3)
    experts.update(tensors)  # f32 scales after bf16 ones
    check_experts(experts, layer)
    state = experts.state_dict()
    assert state[f"{PREFIX}.0.up_proj.weight_scale"].dtype == np.float32
    check_experts(moepad.load_experts(state, PREFIX, experts.plan), layer)


def test_update_of_a_joint_scale_by_two() -> None:
    """A fused scale for gate and up gives way to one each."""
    sizes = sizes_of(FORMATS["fused fp8 tensor"])
    layer = make_quantised(**sizes)
    layer.scales["gate"][:] = layer.scales["up"]
    tensors = {
        f"{PREFIX}.gate_up_proj": np.concatenate([layer.weights["gate"], layer.weights["up"]], 1),
        f"{PREFIX}.gate_up_proj_scale": layer.scales["up"],
        f"{PREFIX}.down_proj": layer.weights["down"],
        f"{PREFIX}.down_proj_scale": layer.scales["down"],
    }
    experts = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))
    check_experts(experts, layer)
    check_same(experts.state_dict(), tensors)
    layer, tensors = make(FORMATS["quark fp8"], sizes, seed=4)
    experts.update(tensors)
    state = experts.state_dict()
    assert state[f"{PREFIX}.gate_up_proj_scale"].shape == (3, 2)
    check_experts(moepad.load_experts(state, PREFIX, experts.plan), layer)


# --- Faults --------------------------------------------------------------------------------------


STEM = f"{PREFIX}.1.up_proj"
SCALE, WEIGHT = f"{STEM}.weight_scale", f"{STEM}.weight"


def spoilt(values: Array, bad: float) -> Array:
    values = values.copy()
    values[3] = bad
    return values


FAULTS: dict[str, tuple[str, Callable[[Tensors], object], list[str]]] = {
    "hole": ("ct fp8 channel", lambda t: t.pop(SCALE), [SCALE, "missing", "1 of 18", "(160, 1)"]),
    "no scales": (
        "ct fp8 channel",
        lambda t: [t.pop(name) for name in list(t) if "scale" in name],
        ["quant='fp8_channel'", "make the plan with"],
    ),
    "scale of another expert": (
        "ct fp8 channel",
        lambda t: t.update({SCALE.replace("experts.1.", "experts.3."): t.pop(SCALE)}),
        [".3.up_proj.weight_scale", "got expert 3"],
    ),
    "shape": (
        "ct fp8 channel",
        lambda t: t.update({SCALE: t[SCALE][:-1]}),
        [SCALE, "expected shape (160, 1)", "got (159, 1)", "quant='fp8_channel'"],
    ),
    "two shapes": (
        "ct fp8 channel",
        lambda t: t.update({SCALE: t[SCALE][:, 0]}),
        [SCALE, "expected shape (160, 1)", "got (160,)"],
    ),
    "per tensor": (
        "ct fp8 channel",
        lambda t: t.update({SCALE: t[SCALE][0]}),
        [SCALE, "expected shape (160, 1)", "got (1,)"],
    ),
    "dtype": (
        "ct fp8 channel",
        lambda t: t.update({SCALE: t[SCALE].astype(np.float64)}),
        [SCALE, "expected dtype bf16", "got float64"],
    ),
    "weight dtype": (
        "ct fp8 channel",
        lambda t: t.update({WEIGHT: t[WEIGHT].view(np.uint8)}),
        [WEIGHT, "expected dtype f8_e4m3fn", "got u8"],
    ),
    "NaN": (
        "ct fp8 channel",
        lambda t: t.update({SCALE: spoilt(t[SCALE], np.nan)}),
        [SCALE, "1 of 160 scales are NaN"],
    ),
    "infinity": (
        "hf fp8 block",
        lambda t: t.update({f"{SCALE}_inv": spoilt(t[f"{SCALE}_inv"], np.inf)}),
        [f"{SCALE}_inv", "scales are NaN or infinite"],
    ),
    "e8m0 NaN": (
        "quark mxfp4",
        lambda t: t.update({SCALE: spoilt(t[SCALE], 255)}),
        [SCALE, "3 of 480 scales are NaN"],
    ),
    "both kinds of scale": (
        "hf fp8 block",
        lambda t: t.update({SCALE: t[f"{SCALE}_inv"]}),
        ["stored twice", SCALE, f"{PREFIX}.0.gate_proj.weight_scale_inv"],
    ),
    "zero point": (
        "ct int4",
        lambda t: t.update({f"{WEIGHT}_zero_point": np.zeros((1, 1), np.int32)}),
        [f"{WEIGHT}_zero_point", "symmetrically"],
    ),
    "act-order": (
        "ct int4",
        lambda t: t.update({f"{WEIGHT}_g_idx": np.zeros(72, np.int32)}),
        [f"{WEIGHT}_g_idx", "act-order"],
    ),
    "NVFP4": (
        "quark mxfp4",
        lambda t: t.update({f"{SCALE}_2": np.ones((), np.float32)}),
        [f"{SCALE}_2", "NVFP4"],
    ),
    "shape stated": (
        "ct int4",
        lambda t: t.update({f"{WEIGHT}_shape": np.array([159, 72])}),
        [f"{WEIGHT}_shape", "expected [160, 72], got [159, 72]"],
    ),
    "zero points": (
        "gptq",
        lambda t: t.update({f"{STEM}.qzeros": t[f"{STEM}.qzeros"] + 1}),
        [f"{STEM}.qzeros", "asymmetric"],
    ),
    "columns in another order": (
        "gptq",
        lambda t: t.update({f"{STEM}.g_idx": t[f"{STEM}.g_idx"][::-1].copy()}),
        [f"{STEM}.g_idx", "32 to a group", "act-order"],
    ),
    "scales in another type": (
        "ct int4",
        lambda t: t.update({SCALE: t[SCALE].astype(np.float32)}),
        [SCALE, "expected dtype bf16, got f32"],
    ),
    "unknown beside": (
        "quark fp8",
        lambda t: t.update({f"{PREFIX}.1.up_proj.weight_noise": np.ones((), np.float32)}),
        ["weight_noise", "not a tensor of layout", "nothing is known"],
    ),
    "unknown beside in a block": (
        "step fp8 block",
        lambda t: t.update({f"{PREFIX}.up_proj.weight_scale_2": np.ones((), np.float32)}),
        ["up_proj.weight_scale_2", "NVFP4"],
    ),
}


@pytest.mark.parametrize("kind", ["dict", "folder"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str, kind: str) -> None:
    """Each is refused by the name of tensor and file, and an update changes nothing."""
    name, change, words = FAULTS[fault]
    form = FORMATS[name]
    sizes = sizes_of(form)
    plan = moepad.plan(**sizes)
    tensors = make(form, sizes)[1]
    experts = moepad.load_experts(make(form, sizes, seed=2)[1], PREFIX, plan)
    before = bits_of(experts)
    change(tensors)
    source: Any = tensors
    if kind == "folder":
        if any(values.dtype == np.float64 for values in tensors.values()):
            words = [*words[:2], "got f64"]
        source = write_folder(tmp_path / "c", tensors)
        words = [*words, str(tmp_path / "c")]
    for act in (lambda: moepad.load_experts(source, PREFIX, plan), lambda: experts.update(source)):
        with pytest.raises(CheckpointError) as caught:
            act()
        for word in words:
            assert word in str(caught.value), caught.value
    assert bits_of(experts) == before


def test_a_scale_of_another_rank_is_missed(tmp_path: Path) -> None:
    """A scale that two ranks hold is in one's file: the other's alone is not enough."""
    form = FORMATS["hf fp8 block"]
    sizes = {**sizes_of(form), "block": (64, 64)}
    tensors = make(form, sizes)[1]
    plans = plans_of(sizes, Ranks(5, 1, "true", 1))
    paths = [moepad.load_experts(tensors, PREFIX, plan).save(tmp_path) for plan in plans]
    assert plans[1].scale_phase == 32
    with pytest.raises(CheckpointError) as caught:
        moepad.load_experts(paths[1], PREFIX, plans[1])
    for word in ("weight_scale_inv", "columns, counted by 64, [0, 1)", "files of the other ranks"):
        assert word in str(caught.value), caught.value


def test_stored_twice_in_files(tmp_path: Path) -> None:
    form = FORMATS["quark mxfp4"]
    tensors = make(form, sizes_of(form))[1]
    folder = write_folder(tmp_path / "c", tensors, index=False)
    save_file({SCALE: tensors[SCALE]}, folder / "more.safetensors")
    with pytest.raises(CheckpointError, match=rf"{re.escape(SCALE)}: stored twice.*more.safet"):
        moepad.load_experts(folder, PREFIX, moepad.plan(**sizes_of(form)))


@pytest.mark.parametrize(
    ("name", "quant", "words"),
    [
        ("hf fp8 block", "none", ["weight_scale_inv", "quantised in another way", "'fp8_block'"]),
        ("gpt-oss", "none", ["gate_up_proj_blocks", "make the plan with quant='mxfp4'"]),
        ("ct int4", "none", ["weight_packed", "'int4_group'"]),
        ("ct int4", "fp8_block", ["weight_packed", "'int4_group'"]),
        ("ct fp8 channel", "fp8_tensor", ["weight_scale", "expected shape ()", "(160, 1)"]),
        ("ct fp8 channel", "fp8_block", ["weight_scale", "expected shape (5, 2)", "(160, 1)"]),
        ("quark mxfp4", "mxfp8", ["expected shape (160, 72)", "got (160, 36)"]),
        (
            "hf fp8 block",
            "fp8_channel",
            ["0.gate_proj.weight", "quant='fp8_tensor' or 'fp8_block'"],
        ),
    ],
)
def test_wrong_quant(name: str, quant: str, words: list[str]) -> None:
    """The plan says another kind than the checkpoint is of."""
    form = FORMATS[name]
    sizes = sizes_of(form)
    tensors = make(form, sizes)[1]
    plan = moepad.plan(**{**sizes, "quant": quant, "block": BLOCKS.get(quant, (128, 128))})
    with pytest.raises(CheckpointError) as caught:
        moepad.load_experts(tensors, PREFIX, plan)
    for word in words:
        assert word in str(caught.value), caught.value


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["ct int4", "gpt-oss", "quark fp8", "hf fp8 block"]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_fuzz_files(
    tmp_path_factory: pytest.TempPathFactory, name: str, edits: list[tuple[int, int]]
) -> None:
    """Whatever bytes a file holds, it is loaded or refused with CheckpointError."""
    form = FORMATS[name]
    sizes = sizes_of(form, n_hidden=8, n_inter=32, n_expert=1)
    folder = write_folder(tmp_path_factory.mktemp("fuzz") / "c", make(form, sizes)[1], 1)
    path = folder / "model-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    for at, value in edits:
        content[at % len(content)] = value
    path.write_bytes(content)
    for dtype in ("bf16", "f8_e4m3fnuz") if form.quant.startswith("fp8") else ("bf16",):
        try:
            experts = moepad.load_experts(folder, PREFIX, moepad.plan(**sizes, dtype=dtype))
        except CheckpointError:
            continue
        assert experts.w2.shape == experts.plan.w2_shape


def test_awq_is_refused() -> None:
    """The same names as GPTQ's, in another order: shapes tell."""
    sizes = sizes_of(FORMATS["gptq"])
    tensors = make(FORMATS["gptq"], sizes)[1]
    name = f"{PREFIX}.0.gate_proj.qweight"
    tensors[name] = np.zeros((72, 20), np.int32)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} .*: AWQ's order"):
        moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))
    tensors[name] = np.zeros((72, 16), np.int32)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} .*expected shape \(9, 160\)"):
        moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))


def test_nvfp4_is_refused_by_name() -> None:
    name = f"{PREFIX}.0.gate_proj.weight_global_scale"
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} .*: NVFP4 is not supported"):
        moepad.load_experts({name: np.ones(1, np.float32)}, PREFIX, moepad.plan(64, 64, 1))


def test_unquantised_checkpoint() -> None:
    sizes = {"n_hidden": 6, "n_inter": 10, "n_expert": 4}
    tensors = make_checkpoint("gate_up_down", **sizes)
    with pytest.raises(CheckpointError, match="make the plan with quant='none'"):
        moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes, quant="fp8_channel"))


def test_joint_blocks_are_refused() -> None:
    """A fused fp8 block grid that does not end with gate has blocks of gate and up."""
    sizes = {"n_hidden": 64, "n_inter": 48, "n_expert": 2, "block": (32, 32)}
    tensors = {
        f"{PREFIX}.gate_up_proj": np.zeros((2, 96, 64), ml_dtypes.float8_e4m3fn),
        f"{PREFIX}.gate_up_proj_scale_inv": np.ones((2, 3, 2), np.float32),
        f"{PREFIX}.down_proj": np.zeros((2, 64, 48), ml_dtypes.float8_e4m3fn),
        f"{PREFIX}.down_proj_scale_inv": np.ones((2, 2, 2), np.float32),
    }
    for n_row in (3, 4):
        tensors[f"{PREFIX}.gate_up_proj_scale_inv"] = np.ones((2, n_row, 2), np.float32)
        with pytest.raises(CheckpointError, match="share blocks of 32 rows"):
            moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes, quant="fp8_block"))


# --- Splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_inter", "tp_size", "align", "expected"),
    [
        (1536, 8, 128, [256] * 6 + [0, 0]),
        (2560, 8, 128, [384] * 6 + [256, 0]),
        (1408, 8, 128, [256] * 5 + [128, 0, 0]),
        (1280, 8, 128, [256] * 5 + [0, 0, 0]),
        (1856, 8, 128, [256] * 7 + [64]),
        (1024, 8, 256, [256] * 4 + [0] * 4),
    ],
)
@pytest.mark.parametrize("name", ["hf fp8 block", "quark mxfp4", "ct fp8 channel"])
def test_padded_split_as_sglang(
    name: str, n_inter: int, tp_size: int, align: int, expected: list[int]
) -> None:
    """SGLang's rows per rank (SGLang #21097), its ranks without any, and their scales."""
    form = FORMATS[name]
    sizes = {**sizes_of(form, n_hidden=32, n_inter=n_inter, n_expert=1), "block": (128, 128)}
    layer, tensors = make(form, sizes)
    source = open_source(tensors)
    for plan, n_column in zip(
        plans_of(sizes, Ranks(tp_size, 1, "padded", align)), expected, strict=True
    ):
        experts = moepad.load_experts(source, PREFIX, plan)
        assert experts.plan.n_inter == n_column
        check_experts(experts, layer)


def test_illegal_splits() -> None:
    """The plan refuses to cut a scale, before there is anything to load."""
    for quant, align, words in (
        ("mxfp4", 1, "inside a scale group of 32"),
        ("fp8_block", 1, "inside a scale block of 128"),
        ("int4_group", 32, "inside a scale group of 128"),
    ):
        block = (1, 128) if quant == "int4_group" else (128, 128)
        with pytest.raises(UnsupportedError, match=words):
            moepad.plan(
                64, 1544, 2, quant=quant, block=block, tp_size=8, split="padded", align=align
            )


# --- Running -------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A published model in small: its true intermediate size, fewer experts, less hidden."""

    form: str
    n_inter: int
    n_hidden: int = 128
    activation: str = "silu"
    tp_size: int = 8


MODELS = {
    "Qwen3-235B FP8 block": Case("hf fp8 block", 1536),
    "GLM-4.7 FP8 per channel": Case("ct fp8 channel", 1536),
    "Qwen3.5-397B MXFP4": Case("quark mxfp4", 1024),
    "gpt-oss-120b MXFP4": Case("gpt-oss", 2880, 96, "swigluoai"),
    "DeepSeek-V3 FP8 block": Case("hf fp8 block", 2048),
    "MiniMax-M2 FP8 block": Case("hf fp8 block w1", 1536),
    "Step-3.5 FP8 block": Case("step fp8 block", 1280),
    "Nemotron-3-Nano FP8": Case("modelopt fp8", 1856, 128, "relu2"),
    "Nemotron-3-Ultra MXFP8": Case("mxfp8 inv", 5120, 64, "relu2"),
    "Kimi-K2 INT4": Case("ct int4", 2048),
    "DeepSeek-V4-Pro FP4": Case("v4 fp4", 3072, 64),
}
SPLITS = [("true", 1), ("true", 128), ("padded", 128), ("block", 1)]


@functools.lru_cache(maxsize=1)
def model_layer(name: str) -> tuple[dict[str, Any], Tensors]:
    case = MODELS[name]
    form = FORMATS[case.form]
    sizes = sizes_of(form, n_hidden=case.n_hidden, n_inter=case.n_inter, n_expert=2)
    sizes["block"] = (1, 32) if form.quant == "int4_group" else (128, 128)
    return sizes, make(form, sizes)[1]


def held_by(experts: moepad.Experts, *routing: Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the specification for what a rank holds."""
    plan = experts.plan
    return (experts.w13, experts.w2, *routing), {
        "quant": plan.quant,
        "block": plan.block,
        "scale_phase": plan.scale_phase,
        "n_inter": plan.n_inter,
        "w13_scale": experts.w13_scale,
        "w2_scale": experts.w2_scale,
        "w13_bias": experts.w13_bias,
        "w2_bias": experts.w2_bias,
    }


@pytest.mark.parametrize(("split", "align"), SPLITS)
@pytest.mark.parametrize("name", MODELS)
def test_tp8_is_tp1(name: str, split: str, align: int, rng: np.random.Generator) -> None:
    """The sum over eight ranks is the whole layer, under every rule that cuts columns."""
    case = MODELS[name]
    sizes, tensors = model_layer(name)
    options: dict[str, Any] = {"activation": case.activation}
    if case.activation == "swigluoai":
        options |= {"swiglu_limit": 7.0}
    x = rng.standard_normal((3, case.n_hidden)).astype(ml_dtypes.bfloat16)
    ids = np.array([[0, 1], [1, 0], [0, -1]], np.int32)
    routed = rng.random((3, 2), np.float32)
    source = open_source(tensors)
    parts, naive = [], []
    for plan in plans_of(sizes, Ranks(case.tp_size, 1, split, align)):
        experts = moepad.load_experts(source, PREFIX, plan)
        poison_pads(experts)
        parts.append(experts(x, routed, ids, **options))
        arrays, held = held_by(experts, routed, ids)
        naive.append(reference.naive(x, *arrays, **held, **options))
    whole = moepad.load_experts(source, PREFIX, moepad.plan(**sizes))
    arrays, held = held_by(whole, routed, ids)
    right = reference.fused_moe(x, *arrays, **held, **options)
    error, allowed = sum_error(parts, naive, right)
    assert (error <= allowed).all()
    assert np.abs(error).max() < 0.05 * np.abs(right).max() and np.abs(right).max() > 1e-3


# --- Scales of activations -----------------------------------------------------------------------


STATIC = ["ct fp8 tensor", "quark fp8", "modelopt fp8"]
NAMES_OF = {"x_scale": ("gate_proj", "up_proj", "w1", "w3"), "h_scale": ("down_proj", "w2")}


def make_static(name: str, seed: int = 0, **sizes: int) -> tuple[dict[str, Any], Tensors]:
    """Sizes and a checkpoint in which no two scales of activations are the same."""
    form = FORMATS[name]
    tensors = make(form, sizes_of(form, **sizes), seed)[1]
    rng = np.random.default_rng(seed)
    for key in [key for key in tensors if key.endswith("input_scale")]:
        tensors[key] = rng.uniform(0.01, 0.03, tensors[key].shape).astype(np.float32)
    return sizes_of(form, **sizes), tensors


def stored_scales(tensors: Tensors, into: str, experts: range) -> list[Array]:
    names = [f"{PREFIX}.{e}.{name}.input_scale" for e in experts for name in NAMES_OF[into]]
    return [tensors[name] for name in names if name in tensors]


def check_scales(experts: moepad.Experts, tensors: Tensors, factor: int = 1) -> None:
    plan = experts.plan
    for into in NAMES_OF:
        scale = getattr(experts, into)
        held = stored_scales(tensors, into, range(plan.expert_start, plan.expert_stop))
        if not held:
            assert scale is None
            continue
        assert scale.shape == (1,) and scale.dtype == np.float32
        assert scale == factor * max(float(value.item()) for value in held)


def routed_to(sizes: dict[str, Any]) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((5, sizes["n_hidden"])).astype(ml_dtypes.bfloat16)
    ids = np.stack([rng.permutation(sizes["n_expert"])[:2] for _ in x]).astype(np.int32)
    return x, rng.random((5, 2), np.float32), ids


@pytest.mark.parametrize("dtype", ["bf16", "f8_e4m3fnuz"])
@pytest.mark.parametrize("name", STATIC)
def test_input_scales(tmp_path: Path, name: str, dtype: str) -> None:
    """The largest of each rank's experts, from a checkpoint and from what its ranks saved."""
    sizes, tensors = make_static(name, n_expert=5)
    factor = 2 if dtype == "f8_e4m3fnuz" else 1
    shares = Ranks(3, 2, "padded", 64)  # the third has no columns
    for plan in plans_of(sizes, shares, dtype=dtype):
        experts = moepad.load_experts(tensors, PREFIX, plan)
        check_scales(experts, tensors, factor)
        for key, values in experts.extras.items():
            check_bits(np.atleast_1d(values), np.atleast_1d(tensors[f"{PREFIX}.{key}"]))
        experts.save(tmp_path)
    for plan in plans_of(sizes, Ranks(2, 3, "true", 1), dtype=dtype):
        check_scales(moepad.load_experts(tmp_path, PREFIX, plan), tensors, factor)


def test_input_scales_of_all_experts_in_one_tensor() -> None:
    """A rank takes those of its own; there is none for down in this form."""
    form = FORMATS["fused fp8 tensor"]
    tensors = make(form, sizes_of(form))[1]
    tensors[f"{PREFIX}.gate_up_proj_activation_scale"] = np.float32([1, 3, 2])
    for ep_size, expected in ((1, [3]), (2, [3, 2]), (4, [1, 3, 2, None])):
        for plan, scale in zip(
            plans_of(sizes_of(form), Ranks(1, ep_size, "true", 1)), expected, strict=True
        ):
            experts = moepad.load_experts(tensors, PREFIX, plan)
            assert experts.h_scale is None
            assert (experts.x_scale is None) if scale is None else (experts.x_scale == scale)


def test_an_expert_without_input_scale() -> None:
    """No scale for that input then, but for a rank whose experts all have one."""
    sizes, tensors = make_static("quark fp8")
    del tensors[f"{PREFIX}.0.down_proj.input_scale"]
    experts = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))
    assert experts.x_scale is not None and experts.h_scale is None
    check_same(experts.state_dict(), tensors)
    last = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes, ep_size=2, ep_rank=1))
    check_scales(last, tensors)
    del tensors[f"{PREFIX}.2.up_proj.input_scale"]  # gate's, of the same input, is there
    check_scales(moepad.load_experts(tensors, PREFIX, last.plan), tensors)


@pytest.mark.parametrize("dtype", ["bf16", "f8_e4m3fnuz"])
@pytest.mark.parametrize("name", STATIC)
def test_call_with_input_scales(name: str, dtype: str) -> None:
    """As `fused_moe` with them by hand; from the values where the call says so."""
    sizes, tensors = make_static(name)
    experts = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes, dtype=dtype))
    activation = "silu" if sizes["gated"] else "relu2"
    x, *routing = routed_to(sizes)

    def by_hand(**more: Any) -> Array:
        arrays, held = held_by(experts, *routing)
        result: Array = moepad.fused_moe(x, *arrays, **held, **more, activation=activation)
        return result

    def call(**more: Any) -> Array:
        result: Array = experts(x, *routing, **more, activation=activation)
        return result

    static = {"x_scale": experts.x_scale, "h_scale": experts.h_scale}
    dynamic = by_hand(quant_activations="fp8")
    check_bits(call(quant_activations="fp8"), by_hand(quant_activations="fp8", **static))
    assert (call(quant_activations="fp8") != dynamic).any()
    for into in static:  # the call speaks for both
        check_bits(call(quant_activations="fp8", **{into: None}), dynamic)
    own = np.float32([0.5])
    expected = by_hand(quant_activations="fp8", h_scale=own)
    check_bits(call(quant_activations="fp8", h_scale=own), expected)
    for more in ({}, {"quant_activations": "none"}):
        check_bits(call(**more), by_hand())


@pytest.mark.parametrize(("name", "kind"), [("quark mxfp4", "mxfp4"), ("mxfp8", "mxfp8")])
def test_mx_activations_take_no_input_scales(name: str, kind: str) -> None:
    """Scales of their own kind, whatever the checkpoint has beside its weights."""
    form = FORMATS[name]
    sizes = sizes_of(form)
    experts = moepad.load_experts(make(form, sizes)[1], PREFIX, moepad.plan(**sizes))
    experts.x_scale = experts.h_scale = np.float32([0.5])
    x, *routing = routed_to(sizes)
    arrays, held = held_by(experts, *routing)
    expected = moepad.fused_moe(x, *arrays, **held, quant_activations=kind)
    check_bits(experts(x, *routing, quant_activations=kind), expected)
    assert (expected != experts(x, *routing)).any()
    with pytest.raises(ValueError, match=r"x_scale: expected None for quant_activations="):
        experts(x, *routing, quant_activations=kind, x_scale=experts.x_scale)


def test_fnuz_input_scales_give_the_same_range() -> None:
    """A code of e4m3fnuz is half of e4m3fn's of the same bits: what is not clipped, is the same."""
    sizes, tensors = make_static("quark fp8")
    for key in [key for key in tensors if key.endswith("input_scale")]:
        tensors[key] = np.float32(2.0 if "down" in key else 2**-5)
    x, *routing = routed_to(sizes)
    results = []
    for dtype in ("bf16", "f8_e4m3fnuz"):
        experts = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes, dtype=dtype))
        arrays, held = held_by(experts, *routing)
        static = {"x_scale": experts.x_scale, "h_scale": experts.h_scale}
        results.append(reference.fused_moe(x, *arrays, **held, **static, quant_activations="fp8"))
    np.testing.assert_allclose(*results, rtol=1e-6, atol=1e-6 * np.abs(results[0]).max())


@pytest.mark.parametrize("kind", ["dict", "folder"])
def test_update_of_input_scales(tmp_path: Path, kind: str) -> None:
    """In place while there are any; all or nothing."""
    sizes, tensors = make_static("ct fp8 tensor")
    new = make_static("ct fp8 tensor", seed=9)[1]
    without = {key: values for key, values in new.items() if "input_scale" not in key}
    bad = {**new, f"{PREFIX}.2.w2.input_scale": np.float32([-1])}

    def given(name: str, tensors: Tensors) -> Any:
        return write_folder(tmp_path / name, tensors) if kind == "folder" else tensors

    experts = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))
    x_scale, h_scale = experts.x_scale, experts.h_scale
    with pytest.raises(CheckpointError, match="negative"):
        experts.update(given("bad", bad))
    assert experts.x_scale is x_scale and experts.h_scale is h_scale
    check_scales(experts, tensors)
    experts.update(given("new", new))
    assert experts.x_scale is x_scale and experts.h_scale is h_scale
    check_scales(experts, new)
    experts.update(given("without", without))
    check_scales(experts, without)
    experts.update(given("new", new))
    check_scales(experts, new)


def test_input_scales_of_zero() -> None:
    """One expert's is left out of the largest; where all are 0 there is none."""
    sizes, tensors = make_static("ct fp8 tensor")
    tensors[f"{PREFIX}.1.w2.input_scale"] = np.float32([0])
    check_scales(moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes)), tensors)
    for key in [key for key in tensors if key.endswith("w2.input_scale")]:
        tensors[key] = np.float32([0])
    experts = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))
    assert experts.h_scale is None and experts.x_scale is not None


def test_failed_update_of_input_scales() -> None:
    """Whichever read fails, the last one too, they are what they were."""
    sizes, tensors = make_static("quark fp8", n_expert=1)
    new = make_static("quark fp8", seed=9, n_expert=1)[1]
    experts = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))
    complete = Lazy(new)
    moepad.load_experts(tensors, PREFIX, experts.plan).update(complete)
    for n in range(len(complete.asked)):
        with pytest.raises(CheckpointError, match="OSError: the network"):
            experts.update(Lazy(new, fail_at=n))
        check_scales(experts, tensors)


def test_update_of_input_scales_from_other_names() -> None:
    """Extras of other names are not kept, the scales made of them are."""
    sizes, tensors = make_static("quark fp8")
    experts = moepad.load_experts(tensors, PREFIX, moepad.plan(**sizes))
    other = make_static("ct fp8 tensor", seed=9)[1]
    experts.update(other)
    check_scales(experts, other)
    assert not experts.extras


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 3e38])
def test_wrong_input_scale(tmp_path: Path, value: float) -> None:
    """By name of tensor and file; of another rank's expert it is none of this rank's faults."""
    sizes, tensors = make_static("quark fp8")
    name = f"{PREFIX}.2.up_proj.input_scale"
    tensors[name] = np.array(value, np.float32)
    folder = write_folder(tmp_path / "c", tensors)
    plan = moepad.plan(**sizes, dtype="f8_e4m3fnuz")  # where 3e38 has no double
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} in .*c/model-.*1 of 1 scales"):
        moepad.load_experts(folder, PREFIX, plan)
    moepad.load_experts(folder, PREFIX, moepad.plan(**sizes, ep_size=2, ep_rank=0))
    if value == 3e38:
        check_scales(moepad.load_experts(folder, PREFIX, moepad.plan(**sizes)), tensors)


# --- Memory --------------------------------------------------------------------------------------


def write_sparse(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """A safetensors file of zeros that takes no disk; how many bytes it says it has."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * {"F8_E4M3": 1, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


@pytest.mark.large
def test_memory_of_a_large_checkpoint(tmp_path: Path) -> None:
    """30 GB of DeepSeek-V3 layers in sparse files: one rank's share and one expert, no more."""
    n_hidden, n_inter, n_expert, n_byte, layer = 7168, 2048, 256, 0, 0
    weight_map = {}
    sizes = {"gate_proj": (n_inter, n_hidden), "up_proj": (n_inter, n_hidden)}
    sizes["down_proj"] = (n_hidden, n_inter)
    while n_byte < 30e9:
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for e in range(n_expert):
            for name, shape in sizes.items():
                stem = f"model.layers.{layer}.mlp.experts.{e}.{name}.weight"
                tensors[stem] = ("F8_E4M3", shape)
                tensors[f"{stem}_scale_inv"] = ("F32", (shape[0] // 128, shape[1] // 128))
        file = f"model-{layer:05}.safetensors"
        n_byte += write_sparse(tmp_path / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        layer += 1
    index = {"metadata": {"total_size": n_byte}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 50e6
    plan = moepad.plan(
        n_hidden,
        n_inter,
        n_expert,
        quant="fp8_block",
        tp_size=20,
        tp_rank=11,
        ep_size=16,
        ep_rank=3,
    )
    one_expert = 3 * n_inter * n_hidden

    def check() -> None:
        import tqdm  # noqa: F401

        source = open_source(tmp_path)
        ctypes.CDLL(None).malloc_trim(0)  # pages that earlier tests freed would hide growth
        prefix = f"model.layers.{layer - 1}.mlp.experts"
        experts, grown = growth(lambda: moepad.load_experts(source, prefix, plan))
        assert plan.nbytes < grown < plan.nbytes + one_expert, (grown, plan.nbytes)
        assert experts.plan.n_inter == 96 and experts.plan.scale_phase == 32

    in_child(check)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("ct fp8 channel", "bf16"),
        ("ct fp8 channel", "f8_e4m3fnuz"),
        ("fused fp8 block", "f8_e4m3fnuz"),
        ("ct int4", "bf16"),
        ("gpt-oss", "bf16"),
    ],
)
def test_memory_bound(tmp_path: Path, name: str, dtype: str) -> None:
    """Peak memory is the result and one expert, converted or not."""
    form = FORMATS[name]
    sizes = sizes_of(form, n_hidden=512, n_inter=2048, n_expert=24)
    if form.quant == "fp8_block":
        sizes["block"] = (128, 128)
    folder = write_folder(tmp_path / "c", make(form, sizes)[1], 2)
    plan = moepad.plan(**sizes, dtype=dtype, tp_size=2, align=128)
    one_expert = 3 * 512 * 2048
    slack = 2 << 20  # headers, page tables

    def check() -> None:
        one = moepad.plan(**sizes, dtype=dtype, ep_size=24)
        moepad.load_experts(folder, PREFIX, one).update(folder)  # maps the libraries again
        experts, grown = growth(lambda: moepad.load_experts(folder, PREFIX, plan))
        assert grown < plan.nbytes + one_expert + slack
        _, grown = growth(lambda: experts.update(folder))
        assert grown < one_expert + slack

    in_child(check)
