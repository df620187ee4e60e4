"""`load_experts` on GPUs, against the stand-in HIP library: what is there is what a CPU gets."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fakehip
import ml_dtypes
import moepad
import numpy as np
import pytest
from checkpoints import FORMATS, PREFIX, make_checkpoint, read_file, write_folder
from moepad import _core
from moepad.devices import DeviceArray, memory_of, on_host
from test_quantised_weights import make, make_static, sizes_of
from test_weights import Lazy

DEVICE = "hip:1"  # of fakehip.ARCHS: gfx942
NAMES = ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias", "x_scale", "h_scale")
SIZES: dict[str, Any] = {"n_hidden": 64, "n_inter": 96, "n_expert": 4}


@pytest.fixture(autouse=True)
def emulator_is_content(emulated: None) -> Iterator[None]:
    yield
    fakehip.check()


def tensors_of(experts: moepad.Experts) -> dict[str, Any]:
    named = {name: getattr(experts, name) for name in NAMES}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def bits_of(experts: moepad.Experts) -> dict[str, bytes]:
    """Pads included."""
    return {name: on_host(tensor).tobytes() for name, tensor in tensors_of(experts).items()}


def loaded(source: Any, device: str = DEVICE, **more: Any) -> moepad.Experts:
    plan = moepad.plan(**SIZES, **more)
    return moepad.load_experts(source, PREFIX, plan, device=device)


@pytest.mark.parametrize("name", ["gate_up_down", "fused", "gpt_oss"])
@pytest.mark.parametrize("more", [{}, {"tp_size": 2, "tp_rank": 1, "ep_size": 2}])
def test_as_on_a_cpu(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    """Every bit, pads too, from files and from memory; and what comes back."""
    more = {**more, "align": 64, "bias": name == "gpt_oss"}
    tensors = make_checkpoint(name, **SIZES, bias=more["bias"])
    for source in (tensors, write_folder(tmp_path / "c", tensors)):
        there, here = loaded(source, **more), loaded(source, "cpu", **more)
        assert there.device == DEVICE and isinstance(there.w13, DeviceArray)
        assert bits_of(there) == bits_of(here)
        got, expected = there.state_dict(), here.state_dict()
        assert got.keys() == expected.keys()
        assert all(got[key].tobytes() == expected[key].tobytes() for key in expected)
    saved = read_file(there.save(tmp_path / "s.safetensors"))
    assert all(saved[key].tobytes() == expected[key].tobytes() for key in expected)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_as_on_a_cpu(name: str) -> None:
    sizes = sizes_of(FORMATS[name])
    _, tensors = make(FORMATS[name], sizes)
    plan = moepad.plan(**sizes)
    there = moepad.load_experts(tensors, PREFIX, plan, device=DEVICE)
    assert bits_of(there) == bits_of(moepad.load_experts(tensors, PREFIX, plan))


def drawn(seed: int) -> dict[str, Any]:
    """A checkpoint of ordinary weights."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(tensor.shape) * 0.1).astype(tensor.dtype)
        for name, tensor in make_checkpoint("gate_up_down", **SIZES).items()
    }


def routed() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, SIZES["n_hidden"])).astype(ml_dtypes.bfloat16)
    return x, rng.random((3, 2), np.float32), np.array([[0, 2], [3, 1], [2, 3]], np.int32)


def are_close(out: fakehip.DeviceArray, expected: Any) -> bool:
    """Up to the roundings of bf16 in another order."""
    got, wanted = out.numpy().astype(np.float32), expected.astype(np.float32)
    return bool(np.abs(got - wanted).max() <= 2**-7 * np.abs(wanted).max())


def test_runs_where_it_lies() -> None:
    """Half of the experts, so that the map of ids is on the device too."""
    more: dict[str, Any] = {"ep_size": 2, "ep_rank": 1, "align": 64}
    tensors = drawn(0)
    there, here = loaded(tensors, **more), loaded(tensors, "cpu", **more)
    out = fakehip.to_device(np.zeros_like(routed()[0]), 1)
    there(*(fakehip.to_device(array, 1) for array in routed()), out=out)
    assert are_close(out, here(*routed()))


@contextmanager
def side_stream(is_blocking: bool = False) -> Iterator[ctypes.c_void_p]:
    handle = ctypes.c_void_p()
    with fakehip.on_device(1):
        fakehip.call("hipStreamCreateWithFlags", ctypes.byref(handle), 0 if is_blocking else 1)
    yield handle
    fakehip.call("hipStreamDestroy", handle)


def test_an_update_lets_queued_calls_finish() -> None:
    """On streams that wait for no other, with the weights of when they were queued."""
    there, here = loaded(drawn(0)), loaded(drawn(0), "cpu")
    arrays = [fakehip.to_device(array, 1) for array in routed()]
    out = fakehip.to_device(np.zeros_like(routed()[0]), 1)
    there(*arrays, out=out)  # its kernels are loaded now
    out.set(np.zeros_like(routed()[0]))
    with side_stream() as stream:
        with fakehip.lazily():
            there(*arrays, out=out, stream=stream.value)
            there.update(drawn(9))
            fakehip.call("hipStreamSynchronize", stream)
        assert are_close(out, here(*routed()))
        there(*arrays, out=out, stream=stream.value)
        assert are_close(out, loaded(drawn(9), "cpu")(*routed()))


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["global", "thread", "relaxed"])
@pytest.mark.parametrize("is_blocking", [False, True])
def test_a_load_spoils_no_capture(mode: int, is_blocking: bool) -> None:
    """Of whoever captures, in whatever mode; what is in the graph is what was captured."""
    there, here = loaded(drawn(0)), loaded(drawn(0), "cpu")
    arrays = [fakehip.to_device(array, 1) for array in routed()]
    out = fakehip.to_device(np.zeros_like(routed()[0]), 1)
    there(*arrays, out=out, workspace=(space := workspace(there, arrays)))
    out.set(np.zeros_like(routed()[0]))
    graph, replay = ctypes.c_void_p(), ctypes.c_void_p()
    with side_stream(is_blocking) as stream:
        fakehip.call("hipStreamBeginCapture", stream, mode)
        there(*arrays, out=out, workspace=space, stream=stream.value)
        other = loaded(drawn(9))
        fakehip.call("hipStreamEndCapture", stream, ctypes.byref(graph))
        assert bits_of(other) == bits_of(loaded(drawn(9), "cpu"))
        none = ctypes.c_size_t(0)
        fakehip.call("hipGraphInstantiate", ctypes.byref(replay), graph, None, None, none)
        fakehip.call("hipGraphLaunch", replay, stream)
        fakehip.call("hipStreamSynchronize", stream)
        assert are_close(out, here(*routed()))
        fakehip.call("hipGraphExecDestroy", replay)
        fakehip.call("hipGraphDestroy", graph)


def workspace(experts: moepad.Experts, arrays: list[Any]) -> fakehip.DeviceArray:
    names = ("hidden_states", "topk_weights", "topk_ids")
    n_bytes = moepad.workspace_nbytes(
        **dict(zip(names, arrays, strict=True)), w13=experts.w13, w2=experts.w2
    )
    return fakehip.DeviceArray((n_bytes,), np.uint8, 1)


@pytest.mark.parametrize("kind", [dict, Lazy])
def test_update_in_place(kind: Any) -> None:
    experts = loaded(make_checkpoint("gate_up_down", **SIZES), align=64)
    before = {name: (id(t), id(t._memory)) for name, t in tensors_of(experts).items()}
    new = make_checkpoint("gate_up_down", **SIZES, seed=9)
    experts.update(kind(new))
    after = {name: (id(t), id(t._memory)) for name, t in tensors_of(experts).items()}
    assert after == before
    assert bits_of(experts) == bits_of(loaded(new, "cpu", align=64))


# Calls that a load makes before it has all; what frees is not made to fail: then nothing can be.
CALLS = [
    *("hipGetDevice", "hipSetDevice", "hipMalloc", "hipMemsetAsync", "hipStreamSynchronize"),
    *(
        "hipThreadExchangeStreamCaptureMode",
        "hipHostMalloc",
        "hipStreamCreateWithFlags",
        "hipMemcpyAsync",
        "hipMemcpy2DAsync",
    ),
]


@pytest.mark.usefixtures("young")
@pytest.mark.parametrize("function", CALLS)
def test_a_fault_in_a_call_of_a_load(function: str) -> None:
    """Names call and code, leaves nothing allocated, and the next load works."""
    tensors = make_checkpoint("gate_up_down", **SIZES)
    plan: dict[str, Any] = {"tp_size": 2, "align": 64}  # rows of one tensor are apart
    right = bits_of(loaded(tensors, "cpu", **plan))
    live = fakehip.live()
    with fakehip.failing(""):
        loaded(tensors, **plan)
        n_call = fakehip.count_calls(function)
    assert n_call > 0
    n_fault = 0
    for n in range(1, n_call + 1, 1 + n_call // 16):
        with fakehip.failing(f"{function}:{n}"):
            try:
                loaded(tensors, **plan)
            except moepad.DeviceError as error:
                n_fault += 1
                assert re.search(rf"{function}: error \d+ \(hip.* on HIP device 1", str(error)), n
        assert fakehip.live() == live, n
    assert n_fault > 0 and bits_of(loaded(tensors, **plan)) == right


@pytest.mark.parametrize("function", ["hipMemcpyAsync", "hipMemcpy2DAsync", "hipHostMalloc"])
def test_a_fault_in_an_update_is_undone(function: str) -> None:
    old, new = (make_checkpoint("gate_up_down", **SIZES, seed=seed) for seed in (0, 9))
    experts = loaded(old, align=64)
    before, n_fault = bits_of(experts), 0
    for n in range(1, 8):
        try:
            with fakehip.failing(f"{function}:{n}"):
                experts.update(new)
        except moepad.DeviceError as error:
            n_fault += 1
            assert function in str(error)
            assert bits_of(experts) == before, n
        else:
            experts.update(old)
    assert n_fault >= 2


def test_input_scales() -> None:
    """Where the weights are, in place; whatever call fails, all is what it was."""
    sizes, old = make_static("quark fp8")
    new = make_static("quark fp8", seed=9)[1]
    plan = moepad.plan(**sizes)
    there = moepad.load_experts(old, PREFIX, plan, device=DEVICE)
    here = moepad.load_experts(old, PREFIX, plan)
    scales = there.x_scale, there.h_scale
    assert all(isinstance(scale, DeviceArray) and scale.device == DEVICE for scale in scales)
    x = np.random.default_rng(0).standard_normal((3, sizes["n_hidden"])).astype(ml_dtypes.bfloat16)
    arrays = [x, np.ones((3, 1), np.float32), np.array([[0], [2], [1]], np.int32)]
    out = fakehip.to_device(np.zeros_like(x), 1)

    def check_call() -> None:
        there(*(fakehip.to_device(a, 1) for a in arrays), out=out, quant_activations="fp8")
        assert are_close(out, here(*arrays, quant_activations="fp8"))

    check_call()
    before = bits_of(there)
    assert before == bits_of(here)
    there.update(new)
    with fakehip.failing(""):
        there.update(old)
        n_call = fakehip.count_calls("hipMemcpyAsync")
    for n in (1, n_call - 1, n_call):  # the scales come last
        with (
            fakehip.failing(f"hipMemcpyAsync:{n}"),
            pytest.raises(moepad.DeviceError, match="hipMemcpyAsync"),
        ):
            there.update(new)
        assert bits_of(there) == before, n
    there.update(new)
    here.update(new)
    assert (there.x_scale, there.h_scale) == scales and bits_of(there) == bits_of(here)
    check_call()


def test_a_wrong_source_allocates_nothing() -> None:
    tensors = make_checkpoint("gate_up_down", **SIZES)
    del tensors[sorted(tensors)[0]]
    live = fakehip.live()
    with pytest.raises(moepad.CheckpointError, match="missing"):
        loaded(tensors)
    assert fakehip.live() == live


def test_memory_goes_with_its_last_view() -> None:
    live = fakehip.live()
    view = loaded(make_checkpoint("gate_up_down", **SIZES)).w13[1, 2:5]
    assert fakehip.live()["allocations"] == live["allocations"] + 1
    assert view.shape == (3, SIZES["n_hidden"]) and view.ndim == 2
    assert view.nbytes == 2 * 3 * SIZES["n_hidden"]
    capsule = view.__dlpack__()
    del view
    assert fakehip.live()["allocations"] == live["allocations"] + 1
    del capsule
    assert fakehip.live() == live


def test_rows_longer_than_a_buffer_holds_at_once() -> None:
    """More than the 32 MiB of a pinned buffer, transposed, in several goes."""
    memory = memory_of(DEVICE)
    values = np.arange(9_000_000, dtype=np.int32).reshape(3000, 3000)
    array = memory.zeros((3000, 3000), np.int32)
    with memory.writing() as put:
        put(array, values.T)
    assert np.array_equal(array.numpy(), values.T)
    assert np.array_equal(array[7, 5:9].numpy(), values.T[7, 5:9])


def test_several_threads_at_once() -> None:
    tensors = make_checkpoint("gate_up_down", **SIZES)
    right, results = bits_of(loaded(tensors, "cpu")), []
    devices = ["hip:0", "hip:1", "hip:2", "hip:1"]

    def load(device: str) -> None:
        results.append(bits_of(loaded(tensors, device)))

    threads = [threading.Thread(target=load, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [right] * len(devices)


@pytest.mark.parametrize("index", [[0], np.array([True]), None, "a", 1.0])
def test_views_are_of_integers_and_slices(index: Any) -> None:
    with pytest.raises(TypeError, match="index: expected integers and slices"):
        memory_of(DEVICE).zeros((1,), np.uint8)[index]


def test_no_copy_is_exported() -> None:
    array = memory_of(DEVICE).zeros((2,), np.float32)
    assert array.__dlpack_device__() == (10, 1) and str(array.dtype) == "float32"
    assert repr(array) == "<DeviceArray (2,) f32 on hip:1>"
    for options in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="is not made"):
            array.__dlpack__(**options)
    with pytest.raises(ValueError, match="expected a view within 8 bytes"):
        _core.gpu_export(array._memory, 4, "f32", 4, (2,), (4,), True)
    with pytest.raises(ValueError, match="dtype: unknown name f33"):
        _core.gpu_export(array._memory, 0, "f33", 4, (2,), (4,), True)
    with pytest.raises(ValueError, match="device_type: expected 2 or 10, got 1"):
        _core.gpu_memory(1, 0, 4)


def test_no_such_device() -> None:
    tensors = make_checkpoint("gate_up_down", **SIZES)
    with pytest.raises(moepad.DeviceError, match=r"hip.* on HIP device 7"):
        loaded(tensors, "hip:7")


def test_no_runtime() -> None:
    """What was looked at is said."""
    code = (
        "import moepad; plan = moepad.plan(64, 32, 1)\n"
        "moepad.devices.memory_of('cuda').zeros((1,), 'u1')"
    )
    environment = {**os.environ, "MOEPAD_CUDA_LIBRARY": "/nowhere/libcuda.so.1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "DeviceError" in done.stderr and "/nowhere/libcuda.so.1" in done.stderr
