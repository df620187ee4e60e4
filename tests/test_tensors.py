"""Every kind of tensor and every layout of one, against the same call on plain NumPy arrays.

At the end, calls with anything at all in any place: they succeed or raise what is documented.
"""

from __future__ import annotations

import contextlib
import gc
import math
import mmap
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import moepad
import numpy as np
import pytest
from conftest import require
from dlpack import CUDA_HOST, METAL, READ_ONLY, ROCM_HOST, Producer, exchanging
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepad import _core
from moepad.testing import check_bits, poison
from numpy.typing import NDArray

M, H, N, E, K = 5, 24, 8, 4, 2  # tokens, width, intermediate size, experts, slots
TENSORS = (
    "hidden_states", "w13", "w2", "topk_weights", "topk_ids", "w13_bias", "w2_bias", "expert_map",
)  # fmt: skip
DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}


def arguments(dtype: str = "f32") -> dict[str, Any]:
    """A call with every tensor there is; global ids 0 to 5, of which 0 and 3 are elsewhere."""
    rng = np.random.default_rng(7)

    def values(*shape: int) -> Any:
        return (rng.standard_normal(shape) / 2).astype(DTYPES[dtype])

    return {
        "hidden_states": values(M, H),
        "w13": values(E, 2 * N, H),
        "w2": values(E, H, N),
        "topk_weights": rng.random((M, K), np.float32),
        "topk_ids": rng.integers(0, 6, (M, K)),
        "w13_bias": values(E, 2 * N),
        "w2_bias": values(E, H),
        "expert_map": np.array([-1, 2, 0, -1, 3, 1], np.int32),
    }


EXPECTED = {dtype: moepad.fused_moe(**arguments(dtype)) for dtype in DTYPES}


def to_torch(array: NDArray[Any]) -> Any:
    torch = require("torch")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Any) -> Any:
    """The values of whatever `fused_moe` returned."""
    if isinstance(tensor, np.ndarray):
        return tensor
    if hasattr(tensor, "array"):
        return tensor.array
    torch = require("torch")
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def without_exchange(array: NDArray[Any]) -> Any:
    """A torch tensor of a type that has `__dlpack__` alone, as all had before torch 2.10."""
    torch = require("torch")
    tensor = type("NoExchange", (torch.Tensor,), {"__dlpack_c_exchange_api__": None})
    return to_torch(array).as_subclass(tensor)


class ThroughTorch:
    """A producer of bfloat16 that has no other way to hand it out."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return to_torch(self.array).__dlpack__(**options)


EXCHANGE, EXCHANGE_OWNING, EXCHANGE_NEWER = (
    exchanging(),
    exchanging(can_borrow=False),
    exchanging(major=2),
)
PRODUCERS: dict[str, Callable[[NDArray[Any]], Any]] = {
    "numpy": lambda array: array,
    "subclass of ndarray": lambda array: array.view(type("Sub", (np.ndarray,), {})),
    "torch": to_torch,
    "torch parameter": lambda array: require("torch").nn.Parameter(
        to_torch(array), requires_grad=False
    ),
    "torch without exchange API": without_exchange,
    "capsule": Producer,
    "legacy capsule": lambda array: Producer(array, is_legacy=True),
    "exchange API": EXCHANGE,
    "exchange API, owning": EXCHANGE_OWNING,
    "exchange API, newer": EXCHANGE_NEWER,
}
HAS_BF16 = ("numpy", "torch")  # kinds whose names begin so hand out bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PRODUCERS)
def test_producer(kind: str, dtype: str) -> None:
    make = PRODUCERS[kind]
    if dtype == "bf16" and not kind.startswith(("numpy", "subclass", "torch")):
        make = ThroughTorch
    tensors = {name: make(array) for name, array in arguments(dtype).items()}
    out = make(np.zeros((M, H), DTYPES[dtype]))
    assert moepad.fused_moe(**tensors, out=out) is out
    check_bits(to_numpy(out), EXPECTED[dtype])
    check_bits(to_numpy(moepad.fused_moe(**tensors)), EXPECTED[dtype])


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("kind", PRODUCERS)
def test_kinds_may_be_mixed(kind: str, name: str) -> None:
    tensors = arguments()
    tensors[name] = PRODUCERS[kind](tensors[name])
    check_bits(to_numpy(moepad.fused_moe(**tensors)), EXPECTED["f32"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_of_the_kind_of_hidden_states(dtype: str) -> None:
    tensors = arguments(dtype)

    def result(hidden: Any) -> Any:
        return moepad.fused_moe(**{**tensors, "hidden_states": hidden})

    hidden = tensors["hidden_states"]
    assert type(result(hidden)) is np.ndarray and result(hidden).dtype == DTYPES[dtype]
    if dtype != "bf16":
        assert type(result(Producer(hidden))) is np.ndarray
        assert type(result(EXCHANGE(hidden))) is EXCHANGE
    torch = require("torch")
    made = result(to_torch(hidden))
    assert type(made) is torch.Tensor and made.dtype == to_torch(hidden).dtype
    assert not made.requires_grad and made.is_contiguous()


def test_bfloat16_capsules_give_numpy_arrays() -> None:
    require("torch")
    tensors = arguments("bf16")
    made = moepad.fused_moe(**{**tensors, "hidden_states": ThroughTorch(tensors["hidden_states"])})
    assert type(made) is np.ndarray and made.dtype == ml_dtypes.bfloat16
    check_bits(made, EXPECTED["bf16"])


def test_result_of_an_exchange_api_comes_from_its_allocator() -> None:
    kind = exchanging()
    moepad.fused_moe(**{**arguments(), "hidden_states": kind(arguments()["hidden_states"])})
    # The input is borrowed; the result is written, and only the owning form says it may be.
    assert kind.calls == ["borrow", "allocate", "to_object", "from_object"]


# Capsules.


def test_capsule_is_given_back_once() -> None:
    for is_legacy in (False, True):
        producers = {
            name: Producer(array, is_legacy=is_legacy) for name, array in arguments().items()
        }
        moepad.fused_moe(**producers)
        gc.collect()
        for name, producer in producers.items():
            assert (producer.n_export, producer.n_delete) == (1, 1), name


@pytest.mark.parametrize("name", TENSORS)
def test_capsules_are_given_back_after_an_error(name: str) -> None:
    producers: dict[str, Any] = {name: Producer(array) for name, array in arguments().items()}
    producers[name] = Producer(np.zeros((1, 1, 1, 1, 1), np.float32))
    with pytest.raises((TypeError, ValueError)):
        moepad.fused_moe(**producers)
    for other in producers.values():
        assert other.n_export == other.n_delete


def test_owning_exchange_is_given_back() -> None:
    kind = exchanging(can_borrow=False)
    for _ in range(3):
        moepad.fused_moe(**{name: kind(array) for name, array in arguments().items()},
                         out=kind(np.zeros((M, H), np.float32)))  # fmt: skip
    assert kind.calls == ["from_object"] * 27 and kind.n_delete == 27


def test_version_is_asked_for() -> None:
    producer = Producer(arguments()["w2"])
    moepad.fused_moe(**{**arguments(), "w2": producer})
    assert producer.asked == [{"max_version": (1, 1)}]


def test_old_producers_are_asked_again() -> None:
    producer = Producer(arguments()["w2"], is_legacy=True)
    check_bits(moepad.fused_moe(**{**arguments(), "w2": producer}), EXPECTED["f32"])
    assert producer.asked == [{"max_version": (1, 1)}, {}]


def with_w2(producer: Any) -> Any:
    return moepad.fused_moe(**{**arguments(), "w2": producer})


def test_byte_offset() -> None:
    w2 = arguments()["w2"]
    larger = np.concatenate([np.full(3, np.nan, np.float32), w2.ravel()])
    producer = Producer(w2, data=larger.ctypes.data, byte_offset=12)
    check_bits(with_w2(producer), EXPECTED["f32"])


@pytest.mark.parametrize("is_legacy", [False, True])
def test_strides_may_be_missing(is_legacy: bool) -> None:
    producer = Producer(arguments()["w2"], is_legacy=is_legacy, strides=None)
    check_bits(with_w2(producer), EXPECTED["f32"])


@pytest.mark.parametrize("device", [CUDA_HOST, ROCM_HOST])
def test_pinned_memory_is_host_memory(device: int) -> None:
    check_bits(with_w2(Producer(arguments()["w2"], device_type=device)), EXPECTED["f32"])
    check_bits(with_w2(EXCHANGE(arguments()["w2"], device_type=device)), EXPECTED["f32"])


def test_other_devices() -> None:
    for producer in (
        Producer(arguments()["w2"], device_type=METAL),
        EXCHANGE(arguments()["w2"], device_type=METAL),
        EXCHANGE_OWNING(arguments()["w2"], device_type=METAL),
    ):
        with pytest.raises(moepad.UnsupportedError, match="w2: no engine for DLPack device type 8"):
            with_w2(producer)


def test_another_version_is_refused_and_given_back() -> None:
    producer = Producer(arguments()["w2"])
    producer.header["major"] = 2
    with pytest.raises(TypeError, match=r"w2: expected DLPack version 1.x, got 2.1"):
        with_w2(producer)
    assert producer.n_delete == 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"code": 4, "bits": 16}, "got bf16"),
        ({"code": 10, "bits": 8}, "got f8_e4m3fn"),
        ({"code": 6, "bits": 8}, "got bool8"),
        ({"lanes": 2}, r"got DLPack type \(2, 32, 2\)"),
        (
            {"code": 17, "bits": 4},
            r"expected elements of whole bytes, got DLPack type \(17, 4, 1\)",
        ),
        ({"code": 99, "bits": 8}, r"got DLPack type \(99, 8, 1\)"),
    ],
)
def test_types_of_dlpack(fields: dict[str, int], text: str) -> None:
    for producer in (Producer, EXCHANGE):
        with pytest.raises(TypeError, match=f"w2: .*{text}"):
            with_w2(producer(arguments()["w2"], **fields))


def test_read_only_flag() -> None:
    out = np.zeros((M, H), np.float32)
    capsule = Producer(out)
    capsule.header["flags"] = READ_ONLY
    for producer in (
        capsule,
        EXCHANGE(out, flags=READ_ONLY),
        EXCHANGE_OWNING(out, flags=READ_ONLY),
    ):
        with pytest.raises(ValueError, match="out: expected writable memory"):
            moepad.fused_moe(**arguments(), out=producer)
        moepad.fused_moe(**{**arguments(), "hidden_states": producer})  # to read it is fine


@pytest.mark.parametrize("result", [None, 3, "dltensor"])
def test_dlpack_that_returns_something_else(result: object) -> None:
    class Odd:
        def __dlpack__(self, **options: Any) -> Any:
            return result

    with pytest.raises(TypeError, match="w2: expected __dlpack__ to return a new DLPack capsule"):
        with_w2(Odd())


def test_a_capsule_is_used_once() -> None:
    class Reused:
        capsule = arguments()["w2"].__dlpack__()

        def __dlpack__(self, **options: Any) -> Any:
            return self.capsule

    producer = Reused()
    with_w2(producer)
    with pytest.raises(TypeError, match="w2: expected __dlpack__ to return a new DLPack capsule"):
        with_w2(producer)


@pytest.mark.parametrize("result", [None, 1, (1,), ("cpu", 0)])
def test_device_that_is_no_pair(result: object) -> None:
    producer = Producer(arguments()["w2"])
    producer.__class__ = type("Odd", (Producer,), {"__dlpack_device__": lambda self: result})
    with pytest.raises(TypeError, match="w2: its producer cannot export it"):
        with_w2(producer)


# torch.


def test_requires_grad() -> None:
    torch = require("torch")
    tensors = {name: to_torch(array) for name, array in arguments().items()}
    for make in (to_torch, without_exchange):
        w2 = make(arguments()["w2"]).requires_grad_()
        text = r"w2: requires grad, but moepad is forward only; use torch\.no_grad\(\)"
        with pytest.raises(TypeError, match=text):
            moepad.fused_moe(**{**tensors, "w2": w2})
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                made = moepad.fused_moe(**{**tensors, "w2": w2})
            check_bits(to_numpy(made), EXPECTED["f32"])
            assert not made.requires_grad


def test_inference_tensors() -> None:
    torch = require("torch")
    with torch.inference_mode():
        tensors = {name: to_torch(array).clone() for name, array in arguments().items()}
    check_bits(to_numpy(moepad.fused_moe(**tensors)), EXPECTED["f32"])


def test_torch_without_values() -> None:
    torch = require("torch")
    from torch._subclasses import fake_tensor as fake

    w2 = to_torch(arguments()["w2"])
    with fake.FakeTensorMode() as mode:
        imitation = mode.from_tensor(w2)
    for other in (w2.to("meta"), w2.to_sparse(), imitation):
        with pytest.raises((TypeError, ValueError), match="w2: ") as caught:
            with_w2(other)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="hidden_states: "):
        moepad.fused_moe(**{**arguments(), "hidden_states": torch.empty(M, H, device="meta")})


def test_torch_views_with_a_sign() -> None:
    """x.conj().imag is negative in torch's mind, and positive in memory."""
    torch = require("torch")
    wide = torch.randn(6, 4, dtype=torch.complex64)
    dst = torch.empty(6, 4)
    with pytest.raises(TypeError, match=r"src: is a lazily negated or conjugated view; pass src\."):
        _core.copy(dst, wide.conj().imag)
    with pytest.raises(TypeError, match="src: is a lazily negated or conjugated view"):
        _core.copy(torch.empty_like(wide), wide.conj())
    _core.copy(dst, wide.imag)
    assert torch.equal(dst, wide.imag)


def test_torch_is_not_imported() -> None:
    """Without torch in the process, nothing is known of it; a class of its name changes nothing."""
    producer = Producer(arguments()["w2"])
    producer.__class__ = type("Tensor", (Producer,), {"__module__": "torch", "requires_grad": True})
    check_bits(with_w2(producer), EXPECTED["f32"])


# Layouts.


def inside(array: NDArray[Any], wider: tuple[int, ...]) -> Any:
    """The same values in a corner of a larger array, whose other elements are poison."""
    large = poison(
        np.empty([n + extra for n, extra in zip(array.shape, wider, strict=True)], array.dtype)
    )
    view = large[tuple(slice(1, 1 + n) if n_extra else slice(0, n)
                       for n, n_extra in zip(array.shape, wider, strict=True))]  # fmt: skip
    view[...] = array
    return view


def reversed_rows(array: NDArray[Any]) -> Any:
    return array[::-1].copy()[::-1]


LAYOUTS: dict[str, Callable[[NDArray[Any]], Any]] = {
    "columns in a wider array": lambda a: inside(a, (0,) * (a.ndim - 1) + (5,)),
    "rows in a longer array": lambda a: inside(a, (3,) + (0,) * (a.ndim - 1)),
    "a block in a larger array": lambda a: inside(a, (2,) * a.ndim),
    "reversed": lambda a: reversed_rows(a) if a.ndim > 1 else a,
    "every second row": lambda a: np.repeat(a, 2, axis=0)[::2] if a.ndim > 1 else a,
    "Fortran order of the first two": lambda a: (
        np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1) if a.ndim > 2 else a
    ),
    "offset by one element": lambda a: np.append(a.ravel()[:1], a.ravel())[1:].reshape(a.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, name: str, dtype: str) -> None:
    tensors = arguments(dtype)
    tensors[name] = LAYOUTS[layout](tensors[name])
    check_bits(moepad.fused_moe(**tensors), EXPECTED[dtype])


# torch has no negative strides.
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "reversed"])
def test_layout_of_torch_tensors(layout: str) -> None:
    tensors = {name: to_torch(LAYOUTS[layout](array)) for name, array in arguments().items()}
    check_bits(to_numpy(moepad.fused_moe(**tensors)), EXPECTED["f32"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_out(layout: str) -> None:
    out = LAYOUTS[layout](np.full((M, H), np.nan, np.float32))
    before = None if out.base is None else out.base.copy()
    assert moepad.fused_moe(**arguments(), out=out) is out
    check_bits(out, EXPECTED["f32"])
    if before is not None and before.size > out.size:
        n_changed = np.count_nonzero(out.base.view(np.uint32) != before.view(np.uint32))
        assert n_changed <= out.size


def test_broadcast_inputs() -> None:
    """A stride of zero: one token for all rows, one expert's weights for all experts."""
    tensors = arguments()
    for name in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids", "w13_bias", "w2_bias"):
        tensors[name] = np.broadcast_to(tensors[name][:1], tensors[name].shape)
    copies = {name: array.copy() for name, array in tensors.items()}
    check_bits(moepad.fused_moe(**tensors), moepad.fused_moe(**copies))


def test_strides_of_single_elements_do_not_matter() -> None:
    tensors = {
        "hidden_states": np.ones((1, 1), np.float32),
        "w13": np.ones((1, 2, 1), np.float32),
        "w2": np.ones((1, 1, 1), np.float32),
        "topk_weights": np.ones((1, 1), np.float32),
        "topk_ids": np.zeros((1, 1), np.int32),
    }
    expected = moepad.fused_moe(**tensors)
    odd = {
        name: np.lib.stride_tricks.as_strided(
            array, strides=[12345 * array.itemsize if n == 1 else step
                            for n, step in zip(array.shape, array.strides, strict=True)]
        )
        for name, array in tensors.items()
    }  # fmt: skip
    check_bits(moepad.fused_moe(**odd), expected)
    check_bits(moepad.fused_moe(**odd, out=odd["hidden_states"]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype: str) -> None:
    tensors = arguments(dtype)
    hidden = tensors["hidden_states"]
    assert moepad.fused_moe(**tensors, out=hidden) is hidden
    check_bits(hidden, EXPECTED[dtype])
    tensors = {name: to_torch(array) for name, array in arguments(dtype).items()}
    hidden = tensors["hidden_states"]
    assert moepad.fused_moe(**tensors, out=hidden) is hidden
    check_bits(to_numpy(hidden), EXPECTED[dtype])


def test_in_place_through_another_object() -> None:
    tensors = arguments()
    hidden = tensors["hidden_states"]
    out = hidden[:]
    assert moepad.fused_moe(**tensors, out=out) is out
    check_bits(hidden, EXPECTED["f32"])


# Small arguments.


def n_tokens(n: int) -> dict[str, Any]:
    return {
        "int": n,
        "numpy integer": np.int16(n),
        "i32": np.array([n], np.int32),
        "i64": np.array([n], np.int64),
        "no dimensions": np.array(n),
        "three dimensions": np.array([[[n]]]),
        "capsule": Producer(np.array([n], np.int32)),
    }


@pytest.mark.parametrize("kind", n_tokens(3))
def test_n_token(kind: str) -> None:
    tensors = arguments()
    made = moepad.fused_moe(**tensors, n_token=n_tokens(3)[kind])
    check_bits(made[:3], EXPECTED["f32"][:3])
    assert (made[3:] == 0).all()


def test_n_token_of_torch() -> None:
    torch = require("torch")
    for value in (torch.tensor(3), torch.tensor([3], dtype=torch.int32)):
        made = moepad.fused_moe(**arguments(), n_token=value)
        check_bits(made[:3], EXPECTED["f32"][:3])


def workspaces(n: int) -> dict[str, Any]:
    raw = np.empty(n + 128, np.uint8)
    aligned = raw[-raw.ctypes.data % 64 :][:n]
    return {
        "array": aligned,
        "as float": aligned[: n // 4 * 4].view(np.float32),
        "mmap": mmap.mmap(-1, n),
        "memoryview": memoryview(mmap.mmap(-1, n)),
        "capsule": Producer(aligned),
    }


@pytest.mark.parametrize("kind", workspaces(64))
def test_workspace(kind: str) -> None:
    tensors = arguments()
    n = -(-moepad.workspace_nbytes(**tensors) // 4) * 4
    check_bits(moepad.fused_moe(**tensors, workspace=workspaces(n)[kind]), EXPECTED["f32"])


def test_workspace_of_torch() -> None:
    torch = require("torch")
    tensors = arguments()
    workspace = torch.empty(moepad.workspace_nbytes(**tensors), dtype=torch.uint8)
    assert workspace.data_ptr() % 64 == 0
    check_bits(moepad.fused_moe(**tensors, workspace=workspace), EXPECTED["f32"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype: str) -> None:
    tensors = arguments(dtype)
    for name in ("hidden_states", "topk_weights", "topk_ids"):
        tensors[name] = tensors[name][:0]
    made = moepad.fused_moe(**tensors)
    assert made.shape == (0, H) and made.dtype == DTYPES[dtype]
    out = np.empty((0, H), DTYPES[dtype])
    assert moepad.fused_moe(**tensors, out=out) is out
    assert moepad.workspace_nbytes(**tensors) >= 0


def test_no_slots_and_no_experts() -> None:
    tensors = arguments()
    none = {name: tensors[name][:, :0] for name in ("topk_weights", "topk_ids")}
    assert (moepad.fused_moe(**{**tensors, **none}) == 0).all()
    empty = {name: tensors[name][:0] for name in ("w13", "w2", "w13_bias", "w2_bias")}
    ids = {"topk_ids": np.full((M, K), -1), "expert_map": None}
    assert (moepad.fused_moe(**{**tensors, **empty, **ids}) == 0).all()


def test_names_and_numbers_of_other_kinds() -> None:
    tensors = arguments()
    expected = moepad.fused_moe(**tensors, n_inter=7, routed_scaling_factor=2.0, activation="gelu")
    made = moepad.fused_moe(
        **tensors,
        n_inter=np.uint8(7),
        routed_scaling_factor=np.float32(2),
        activation=np.str_("ge" + "lu"),
        apply_router_weight_on_input=np.False_,
        swiglu_limit=float("inf"),
        block=(np.int64(1), 128),
    )
    check_bits(made, expected)


def test_positions_and_keywords_mean_the_same() -> None:
    tensors = arguments()
    first = [tensors.pop(name) for name in TENSORS[:5]]
    check_bits(moepad.fused_moe(*first, **tensors), EXPECTED["f32"])
    named = dict(zip(reversed(TENSORS[:5]), reversed(first), strict=True))
    check_bits(moepad.fused_moe(**tensors, **named), EXPECTED["f32"])
    # A keyword made at run time is another object of the same text.
    odd = {"".join(list(name)): value for name, value in {**named, **tensors}.items()}
    check_bits(moepad.fused_moe(**odd), EXPECTED["f32"])


def test_time_fused_moe() -> None:
    out = np.zeros((M, H), np.float32)
    times = _core.time_fused_moe(3, **arguments(), out=out)
    assert len(times) == 3 and all(0 < seconds < 10 for seconds in times)
    check_bits(out, EXPECTED["f32"])
    assert _core.time_fused_moe(0, **arguments()) == []


# Anything at all.

FUZZ = settings(
    max_examples=int(os.environ.get("MOEPAD_FUZZ_EXAMPLES", "300")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# One number makes one call: a failure is repeated by its number, and examples are cheap.
SEEDS = st.integers(0, 2**64 - 1).map(random.Random)
DOCUMENTED = (TypeError, ValueError, moepad.UnsupportedError, MemoryError)
SHAPES = {
    "hidden_states": (M, H), "w13": (E, 2 * N, H), "w2": (E, H, N), "topk_weights": (M, K),
    "topk_ids": (M, K), "w13_bias": (E, 2 * N), "w2_bias": (E, H), "expert_map": (6,),
    "out": (M, H), "n_token": (1,), "workspace": (1 << 13,),
}  # fmt: skip
# By kind: dtype of the weights, elements of a stored one, shapes and dtype of the scales.
QUANTISED: dict[str, tuple[Any, int, tuple[int, ...], tuple[int, ...], Any]] = {
    "fp8_tensor": (ml_dtypes.float8_e4m3fn, 1, (E, 2), (E,), np.float32),
    "fp8_channel": (ml_dtypes.float8_e5m2, 1, (E, 2 * N), (E, H), np.float32),
    "fp8_block": (ml_dtypes.float8_e4m3fnuz, 1, (E, 2, 1), (E, 1, 1), np.float32),
    "mxfp8": (ml_dtypes.float8_e4m3fn, 1, (E, 2 * N, 1), (E, H, 1), np.uint8),
    "mxfp4": (np.uint8, 2, (E, 2 * N, 1), (E, H, 1), ml_dtypes.float8_e8m0fnu),
    "int8_channel": (np.int8, 1, (E, 2 * N), (E, H), np.float32),
    "int4_group": (np.uint8, 2, (E, 2 * N, 1), (E, H, 1), np.float16),
}
NUMBERS = [0.0, 0.5, 1.0, 2.0, 7.0, -1.0, 1e-40, 1e300, float("inf"), float("nan"), 3, 2**2000]
OPTIONS: dict[str, list[Any]] = {
    "n_inter": [0, 1, 7, 8, 9],
    "n_hidden": [0, 1, 23, 24, 25],
    "n_token": [0, 1, 2, 3, 4, 5, 6],
    "activation": ["silu", "gelu", "gelu_tanh", "swigluoai", "relu2", "relu"],
    "gate_up": ["concat", "interleaved", "interleaved", "concatenated"],
    "quant": ["none", "none", "none", *QUANTISED],
    "block": [(1, 128), (128, 128), (32, 64), (1, 32), (9, 7), (0, 1), (1,), (2**70, 1)],
    "w13_scale": [None, None, None, np.ones(E, np.float32)],
    "w2_scale": [None, None, None, np.ones(E, np.float32)],
    "scale_phase": [0, 0, 0, 32, 96, 1, -1, 2**62],
    "quant_activations": ["none", "none", "fp8", "int8", "mxfp8", "mxfp4", "fp4"],
    "x_scale": [None, None, np.ones(1, np.float32), np.ones(2, np.float32)],
    "h_scale": [None, None, np.ones(1, np.float32), np.ones((), np.float32)],
    "swiglu_alpha": NUMBERS,
    "swiglu_limit": NUMBERS,
    "apply_router_weight_on_input": [True, False],
    "routed_scaling_factor": NUMBERS,
    "layout": ["plain", "plain", "plain", "shuffled"],
    "stream": [None, None, None, 0],
}
FUZZ_DTYPES = [np.dtype(dtype) for dtype in (
    np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int64, np.float64, np.uint8, np.int8,
    ml_dtypes.float8_e4m3fn, np.bool_, np.complex64, ">f4", "S3", np.object_, "M8[s]", "i4,i1",
)]  # fmt: skip
OBJECTS: list[Any] = [
    None, True, 0, -1, 2**70, 1.5, float("nan"), 1j, "", "silu", "\ud800", b"x", bytearray(8), [],
    [1], (), {}, object(), int, np.ndarray, np.float32, np.int64(2), np.float32(1), range(3),
    memoryview(b"abc"), slice(None), ..., Exception("x"), lambda: None, np,
]  # fmt: skip


def any_array(rng: random.Random, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """An array near `shape`: often of the right type, size and layout, sometimes of none."""
    sizes = list(shape)
    if rng.random() < 0.12:
        dim = rng.randrange(len(sizes))
        sizes[dim] = rng.choice([0, 1, 2, sizes[dim] + 1, max(sizes[dim] - 1, 0)])
    elif rng.random() < 0.06:
        sizes = [rng.randrange(5) for _ in range(rng.randrange(7))]
    if rng.random() < 0.15:
        dtype = rng.choice(FUZZ_DTYPES)
    if dtype.hasobject:
        base = np.full([2 * n + 1 for n in sizes], None)
    else:
        n_bytes = math.prod(2 * n + 1 for n in sizes) * dtype.itemsize
        raw = np.full(n_bytes + 8, rng.choice([0, 0, 1, 0x3C, 0xFF]), np.uint8)
        start = rng.choice([0, 0, 0, 0, 1])
        base = raw[start : start + n_bytes].view(dtype).reshape([2 * n + 1 for n in sizes])
    return any_layout(rng, base, sizes)


def any_layout(rng: random.Random, base: NDArray[Any], sizes: list[int]) -> Any:
    """A view of `sizes` into a base of twice that and one."""
    parts: list[Callable[[int], slice]] = [
        lambda n: slice(0, n),
        lambda n: slice(0, n),
        lambda n: slice(0, n),
        lambda n: slice(0, 2 * n, 2),
        lambda n: slice(n, 0, -1),
    ]
    view = base[(*(rng.choice(parts)(n) for n in sizes), ...)]
    kind = rng.randrange(8)
    if kind == 0 and view.ndim:
        view = np.broadcast_to(view[:1], view.shape)
    elif kind == 1:
        view = np.ascontiguousarray(view.T).T
    elif kind > 2:
        view = np.ascontiguousarray(view).reshape(view.shape)
    if rng.random() < 0.1:
        view.flags.writeable = False
    return any_producer(rng, view)


def any_producer(rng: random.Random, array: NDArray[Any]) -> Any:
    """The array, or another kind of tensor of the same memory where one can hold it."""
    kind = rng.randrange(8)
    is_plain = array.dtype.isbuiltin == 1 and array.dtype.kind in "fiu" and array.flags.writeable
    if kind > 3 or not is_plain:
        return array
    if kind == 0:
        return Producer(array, is_legacy=rng.random() < 0.5)
    if kind == 1:
        return rng.choice([EXCHANGE, EXCHANGE_OWNING, EXCHANGE_NEWER])(array)
    torch = sys.modules.get("torch")
    if torch is None or min(array.strides, default=0) < 0:
        return array
    tensor = torch.from_numpy(array)
    return tensor.requires_grad_(tensor.is_floating_point() and rng.random() < 0.2)


def any_call(rng: random.Random) -> dict[str, Any]:
    """The arguments of a right call, of which a few are replaced, added or left out."""
    call: dict[str, Any] = arguments(rng.choice(["f32", "f16", "bf16"]))
    dtype = call["w13"].dtype
    dtypes = {"n_token": np.dtype("i4"), "workspace": np.dtype("u1")}
    shapes = SHAPES
    if rng.random() < 0.5:
        quant = rng.choice(list(QUANTISED))
        weight, n_pack, scale13, scale2, scale = QUANTISED[quant]
        shapes = SHAPES | {"w13": (E, 2 * N, H // n_pack), "w2": (E, H, N // n_pack),
                           "w13_scale": scale13, "w2_scale": scale2}  # fmt: skip
        call |= {"quant": quant, "w13": np.zeros(shapes["w13"], weight),
                 "w2": np.zeros(shapes["w2"], weight), "w13_scale": np.ones(scale13, scale),
                 "w2_scale": np.ones(scale2, scale)}  # fmt: skip
        if quant == "int4_group":
            call["block"] = (1, 64)
    dtypes |= {name: array.dtype for name, array in call.items() if hasattr(array, "dtype")}
    for name in rng.sample(list(shapes), rng.choice([0, 1, 1, 2, 3])):
        call[name] = any_array(rng, shapes[name], dtypes.get(name, dtype))
        if rng.random() < 0.1:
            call[name] = rng.choice(OBJECTS)
    for name in rng.sample(list(OPTIONS), rng.choice([0, 1, 1, 2, 3])):
        call[name] = rng.choice(OPTIONS[name] if rng.random() < 0.9 else OBJECTS)
    if rng.random() < 0.03:
        call.pop(rng.choice(TENSORS), None)
    if rng.random() < 0.01:
        call["no_such_argument"] = None
    return call


@pytest.fixture(scope="module", autouse=True)
def torch_if_there() -> None:
    """Imported before the examples are made, where it is installed."""
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401


@contextlib.contextmanager
def documented() -> Iterator[None]:
    """Lets pass what the docstrings name, with a message, and nothing else."""
    try:
        yield
    except DOCUMENTED as error:
        assert type(error) in DOCUMENTED and str(error), repr(error)


@FUZZ
@given(rng=SEEDS)
def test_anything(rng: random.Random) -> None:
    call = any_call(rng)
    positional = [call.pop(name) for name in TENSORS[: rng.randrange(7)] if name in call]
    with documented():
        assert moepad.workspace_nbytes(*positional, **call) >= 0
    with documented():
        assert moepad.fused_moe(*positional, **call) is not None


def test_anything_is_often_right() -> None:
    """Most wrong calls end at their first check, so a good part has to be right."""
    n_right = 0
    for seed in range(400):
        with documented():
            moepad.fused_moe(**any_call(random.Random(seed)))
            n_right += 1
    assert 70 < n_right < 330


@FUZZ
@given(rng=SEEDS)
def test_copy_of_anything(rng: random.Random) -> None:
    shape = (rng.choice([1, 70, 130]), *(rng.choice([1, 2, 5]) for _ in range(rng.randrange(4))))
    shape = tuple(rng.sample(shape, len(shape)))
    dtype = rng.choice(FUZZ_DTYPES)
    with documented():
        _core.copy(any_array(rng, shape, dtype), any_array(rng, shape, dtype))


@FUZZ
@given(rng=SEEDS)
def test_small_functions_with_anything(rng: random.Random) -> None:
    functions = [
        (_core.get_moe_padding_size, 1), (_core.get_moe_weight_sizes, 4), (_core.plan, 15),
        (_core.set_cpu_isa, 1), (_core.read_bandwidth, 1), (_core.copy, 2),
    ]  # fmt: skip
    function, n = rng.choice(functions)
    values = [rng.choice([*OBJECTS, 1, 64, 128, "none", "bf16", "true"]) for _ in range(n + 1)]
    try:
        with documented():
            function(*values[: n if rng.random() < 0.9 else n + 1])
    finally:
        _core.set_cpu_isa(None)
