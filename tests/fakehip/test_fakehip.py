"""The stand-in libraries: what HIP promises, and what they add to catch a host that errs."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import emulator
import numpy as np
import pytest
from conftest import in_child, missing

import fakehip
from fakehip import client
from fakehip.client import INT, POINTER, SIZE, Module, code_of, launch

SOURCE = """
#define KERNEL(n) extern "C" __attribute__((global, amdgpu_flat_work_group_size(1, n))) void
#define TID __builtin_amdgcn_workitem_id_x()
#define BID __builtin_amdgcn_workgroup_id_x()
KERNEL(128) fill(float *p, float v, int n)
{
    int i = BID * 128 + TID;
    if (i < n)
        p[i] = v;
}
KERNEL(64) add_one(int *p)
{
    p[TID] += 1;
}
KERNEL(64) peek(const int *p, int *q, int at)
{
    q[TID] = p[at];
}
extern __attribute__((shared)) int lds[];
KERNEL(1024) turn(int *p)
{
    lds[TID] = p[TID];
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
    p[TID] = lds[TID ^ 65];
}
KERNEL(64) spin(volatile int *p)
{
    while (!*p) {
    }
}
"""
INVALID, NO_MEMORY, CONFIGURATION, NO_DEVICE, BAD_DEVICE = 1, 2, 9, 100, 101
IMAGE, NO_BINARY, HANDLE, NOT_FOUND, NOT_READY, LAUNCH = 200, 209, 400, 500, 600, 719
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_IMPLICIT, CAPTURED_EVENT = 900, 901, 906, 907


@pytest.fixture(scope="module", autouse=True)
def libraries() -> Path:
    if absent := fakehip.tools():
        missing("emulator", f"{', '.join(absent)} not on PATH")
    return fakehip.start()


@pytest.fixture(scope="module")
def code(libraries: Path) -> dict[str, bytes]:
    return {arch: client.compile_source(SOURCE, arch) for arch in fakehip.ARCHS}


@pytest.fixture(params=range(len(fakehip.ARCHS)), ids=fakehip.ARCHS)
def device(request: pytest.FixtureRequest) -> Iterator[int]:
    with fakehip.on_device(request.param):
        yield request.param


@pytest.fixture
def module(code: dict[str, bytes]) -> Iterator[Module]:
    """The kernels on device 0."""
    loaded = Module(code[fakehip.ARCHS[0]])
    yield loaded
    loaded.unload()


def failure(function: POINTER, *arguments: object, grid: int = 1, block: int = 64, lds: int = 0):
    """The code that a launch fails with, and what the emulator says."""
    with pytest.raises(fakehip.HipError) as caught:
        launch(function, grid, block, *arguments, lds=lds)
    try:
        fakehip.check()
    except emulator.EmulatorError as error:
        return caught.value.code, error
    return caught.value.code, None


def test_launch_on_every_device(device: int, code: dict[str, bytes]) -> None:
    loaded = Module(code[fakehip.ARCHS[device]])
    p = fakehip.DeviceArray((200,), np.float32, device)
    assert np.isnan(p.numpy()).all()
    launch(loaded["fill"], 2, 128, p, 2.5, 200)
    assert (p.numpy() == 2.5).all()
    loaded.unload()
    fakehip.check()


def test_argument_buffer(module: Module) -> None:
    p = fakehip.DeviceArray((100,), np.float32)
    packed, size = struct.pack("<Qfi", p.address, 7.0, 100), SIZE(16)
    extra = (POINTER * 5)(1, ctypes.cast(packed, POINTER), 2, ctypes.addressof(size), 3)
    call = ("hipModuleLaunchKernel", module["fill"], 1, 1, 1, 128, 1, 1, 0, None, None, extra)
    assert code_of(*call) == 0
    assert (p.numpy() == 7).all()
    size.value = 12
    assert code_of(*call) == INVALID


def test_launch_limits(module: Module) -> None:
    p = fakehip.DeviceArray((1024,), np.int32)
    assert failure(module["fill"], p, 1.0, 1, block=256)[0] == LAUNCH  # over its launch bound
    assert failure(module["turn"], p, block=2048)[0] == CONFIGURATION
    assert failure(module["turn"], p, grid=0)[0] == CONFIGURATION
    assert failure(module["turn"], p, lds=1 << 20)[0] == INVALID
    assert code_of("hipModuleLaunchKernel", None, *[1] * 6, 0, None, None, None) == HANDLE
    p.set(np.arange(1024, dtype=np.int32))
    launch(module["turn"], 1, 1024, p, lds=4096)
    assert (p.numpy() == np.arange(1024) ^ 65).all()


def test_accesses_are_checked(module: Module) -> None:
    p, q = fakehip.to_device(np.zeros(10, np.int32)), fakehip.DeviceArray((64,), np.int32)
    launch(module["peek"], 1, 64, p, q, 9)
    for at in (10, -1):
        result, error = failure(module["peek"], p, q, at)
        assert result == LAUNCH and isinstance(error, emulator.AccessError)
    _, error = failure(module["turn"], q, lds=128)
    assert isinstance(error, emulator.LdsAccessError)
    launch(module["peek"], 1, 64, p, q, 0)  # a failure leaves no trace
    fakehip.check()


def test_bytes_without_value(module: Module) -> None:
    p, q = fakehip.DeviceArray((4,), np.int32), fakehip.DeviceArray((64,), np.int32)
    assert isinstance(failure(module["peek"], p, q, 0)[1], emulator.UninitialisedError)
    p.set(np.zeros(4, np.int32), where=np.array([True, False, True, True]))
    launch(module["peek"], 1, 64, p, q, 0)
    assert isinstance(failure(module["peek"], p, q, 1)[1], emulator.UninitialisedError)
    fresh = fakehip.DeviceArray((4,), np.int32)  # a copy of nothing is nothing
    n = SIZE(16)
    fakehip.call("hipMemcpyDtoD", POINTER(p.address), POINTER(fresh.address), n)
    assert isinstance(failure(module["peek"], p, q, 0)[1], emulator.UninitialisedError)
    fakehip.call("hipMemset", POINTER(p.address), 0, n)
    launch(module["peek"], 1, 64, p, q, 3)


def test_memory_of_another_device(code: dict[str, bytes]) -> None:
    p = fakehip.to_device(np.zeros(64, np.int32), 1)
    loaded = Module(code[fakehip.ARCHS[0]])
    assert isinstance(failure(loaded["add_one"], p)[1], emulator.AccessError)
    with fakehip.on_device(1):
        assert code_of("hipModuleLaunchKernel", loaded["add_one"], *[1] * 6, 0, *[None] * 3) == 400
    loaded.unload()


def test_endless_loop(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from fakehip import bridge

    monkeypatch.setitem(bridge.options, "max_instructions", 10000)
    p = fakehip.to_device(np.zeros(1, np.int32))
    assert isinstance(failure(module["spin"], p, block=1)[1], emulator.DeadlockError)


def test_copies(module: Module) -> None:
    host, p = np.arange(16, dtype=np.int32), fakehip.DeviceArray((16,), np.int32)
    at, to, n = POINTER(host.ctypes.data), POINTER(p.address), SIZE(64)
    assert code_of("hipMemcpy", to, at, n, 1) == 0
    assert (p.numpy() == host).all()
    assert code_of("hipMemcpy", to, at, n, 2) == INVALID  # the other way round
    assert code_of("hipMemcpy", to, at, SIZE(68), 1) == INVALID  # past the end
    assert code_of("hipMemcpy", to, at, n, 9) == 21
    assert code_of("hipMemcpy", to, at, n, 4) == 0
    rows = SIZE(8)
    two = fakehip.to_device(np.zeros((4, 4), np.int32))
    to = POINTER(two.address + 4)
    assert code_of("hipMemcpy2D", to, SIZE(16), at, rows, rows, SIZE(4), 1) == 0
    assert (two.numpy()[:, 1:3] == host[:8].reshape(4, 2)).all()


def test_host_cannot_touch_device_memory() -> None:
    p = fakehip.to_device(np.zeros(16, np.int32))
    with pytest.raises(pytest.fail.Exception, match="SIGSEGV"):
        in_child(lambda: setattr(ctypes.c_int.from_address(p.address), "value", 1))


def test_pointers() -> None:
    p = fakehip.DeviceArray((16,), np.int32, 1)
    host = POINTER()
    fakehip.call("hipHostMalloc", ctypes.byref(host), SIZE(64), 0)
    attributes = (INT * 8)()
    for pointer, kind, device in ((POINTER(p.address + 4), 2, 1), (host, 1, 0)):
        fakehip.call("hipPointerGetAttributes", attributes, pointer)
        assert tuple(attributes[:2]) == (kind, device)
    fakehip.call("hipPointerGetAttributes", attributes, ctypes.create_string_buffer(4))
    assert attributes[0] == 0
    assert code_of("hipFree", host) == INVALID
    fakehip.call("hipHostFree", host)
    assert code_of("hipHostFree", host) == INVALID


def test_images(code: dict[str, bytes]) -> None:
    here, other = fakehip.ARCHS[0], fakehip.ARCHS[1]
    handle = POINTER()
    at = ctypes.byref(handle)
    assert code_of("hipModuleLoadData", at, code[other]) == NO_BINARY
    assert code_of("hipModuleLoadData", at, b"x" * 100) == IMAGE
    names = [b"host-x86_64-unknown-linux-gnu-", *(f"hip--{a}".encode() for a in (other, here))]
    for count, result in ((2, NO_BINARY), (3, 0)):
        head, body = b"__CLANG_OFFLOAD_BUNDLE__" + struct.pack("<Q", count), b""
        for name, blob in zip(names[:count], [b"", code[other], code[here]], strict=False):
            head += struct.pack("<QQQ", 4096 + len(body), len(blob), len(name)) + name
            body += blob
        assert code_of("hipModuleLoadData", at, head.ljust(4096, b"\0") + body) == result
    module = Module.__new__(Module)
    module.handle = handle
    assert code_of("hipModuleGetFunction", at, module.handle, b"nothing") == NOT_FOUND
    fill = module["fill"]
    value = INT()
    fakehip.call("hipFuncGetAttribute", ctypes.byref(value), 0, fill)
    assert value.value == 128
    fakehip.call(
        "hipModuleOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(value), fill, 128, SIZE()
    )
    assert value.value == 16
    module.unload()
    assert code_of("hipModuleUnload", module.handle) == HANDLE
    p = fakehip.DeviceArray((128,), np.float32)
    assert failure(fill, p, 1.0, 1)[0] == HANDLE


def test_capture_and_replay(module: Module) -> None:
    p, stream = fakehip.to_device(np.zeros(64, np.int32)), client.new_stream()
    graph, executable, status = POINTER(), POINTER(), INT()
    add = module["add_one"]
    fakehip.call("hipStreamBeginCapture", stream, 0)
    fakehip.call("hipStreamIsCapturing", stream, ctypes.byref(status))
    assert status.value == 1
    for _ in range(2):
        launch(add, 1, 64, p, stream=stream)
    fakehip.call("hipStreamEndCapture", stream, ctypes.byref(graph))
    assert not p.numpy().any()
    fakehip.call("hipGraphInstantiate", ctypes.byref(executable), graph, None, None, SIZE())
    fakehip.call("hipGraphDestroy", graph)
    for _ in range(3):
        fakehip.call("hipGraphLaunch", executable, stream)
    fakehip.call("hipStreamSynchronize", stream)
    assert (p.numpy() == 6).all()
    fakehip.call("hipGraphExecDestroy", executable)
    fakehip.call("hipStreamDestroy", stream)


@pytest.mark.parametrize("what", ["hipMalloc", "hipMemcpy", "hipStreamSynchronize", "launch"])
def test_capture_forbids(module: Module, what: str) -> None:
    p, stream = fakehip.to_device(np.zeros(64, np.int32)), client.new_stream(0)
    word, got = POINTER(), ctypes.create_string_buffer(4)
    add = module["add_one"]
    arguments = (POINTER * 1)(ctypes.addressof(POINTER(p.address)))
    calls = {
        "hipMalloc": (ctypes.byref(word), SIZE(16)),
        "hipMemcpy": (POINTER(p.address), got, SIZE(4), 1),
        "hipStreamSynchronize": (stream,),
        "launch": (add, 1, 1, 1, 64, 1, 1, 0, None, arguments, None),
    }
    fakehip.call("hipStreamBeginCapture", stream, 0)
    name = "hipModuleLaunchKernel" if what == "launch" else what
    expected = CAPTURE_IMPLICIT if what in ("launch",) else CAPTURE_UNSUPPORTED
    assert code_of(name, *calls[what]) == expected
    assert code_of("hipStreamEndCapture", stream, ctypes.byref(word)) == CAPTURE_INVALIDATED
    fakehip.call("hipStreamDestroy", stream)


def test_relaxed_thread_may_allocate_in_a_capture() -> None:
    stream, word, mode = client.new_stream(), POINTER(), INT(2)
    fakehip.call("hipStreamBeginCapture", stream, 0)
    fakehip.call("hipThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    fakehip.call("hipMalloc", ctypes.byref(word), SIZE(16))
    fakehip.call("hipThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    assert mode.value == 2
    fakehip.call("hipStreamEndCapture", stream, ctypes.byref(mode_graph := POINTER()))
    fakehip.call("hipGraphDestroy", mode_graph)
    fakehip.call("hipFree", word)
    fakehip.call("hipStreamDestroy", stream)


def test_array_may_die_in_a_capture() -> None:
    dying, stream, graph = fakehip.to_device(np.zeros(4)), client.new_stream(), POINTER()
    fakehip.call("hipStreamBeginCapture", stream, 0)
    del dying
    fakehip.call("hipStreamEndCapture", stream, ctypes.byref(graph))
    fakehip.call("hipGraphDestroy", graph)
    fakehip.call("hipStreamDestroy", stream)


def test_two_streams_in_one_capture(module: Module) -> None:
    p, one, two = fakehip.to_device(np.zeros(64, np.int32)), *(client.new_stream() for _ in "12")
    fork, graph = POINTER(), POINTER()
    add = module["add_one"]
    fakehip.call("hipEventCreate", ctypes.byref(fork))
    fakehip.call("hipStreamBeginCapture", one, 0)
    fakehip.call("hipEventRecord", fork, one)
    assert code_of("hipEventSynchronize", fork) == CAPTURED_EVENT
    fakehip.call("hipStreamWaitEvent", two, fork, 0)
    launch(add, 1, 64, p, stream=two)
    fakehip.call("hipStreamEndCapture", one, ctypes.byref(graph))
    fakehip.call("hipEventSynchronize", fork)  # of a capture that is over
    fakehip.call("hipStreamWaitEvent", two, fork, 0)
    launch(add, 1, 64, fakehip.to_device(np.zeros(64, np.int32)), stream=two)
    n = SIZE()
    fakehip.call("hipGraphGetNodes", graph, None, ctypes.byref(n))
    assert n.value == 1 and not p.numpy().any()
    fakehip.call("hipGraphDestroy", graph)
    fakehip.call("hipEventDestroy", fork)
    for stream in (one, two):
        fakehip.call("hipStreamDestroy", stream)


def test_lazy_streams_and_events(module: Module) -> None:
    p, stream, milliseconds = fakehip.to_device(np.zeros(64, np.int32)), client.new_stream(), 0
    first, last, milliseconds = POINTER(), POINTER(), ctypes.c_float()
    add = module["add_one"]
    for event in (first, last):
        fakehip.call("hipEventCreate", ctypes.byref(event))
    with fakehip.lazily():
        fakehip.call("hipEventRecord", first, stream)
        launch(add, 1, 64, p, stream=stream)
        fakehip.call("hipEventRecord", last, stream)
        assert not p.numpy().any()
        elapsed = ("hipEventElapsedTime", ctypes.byref(milliseconds), first, last)
        assert code_of("hipEventQuery", last) == code_of("hipStreamQuery", stream) == NOT_READY
        assert code_of(*elapsed) == NOT_READY
        fakehip.call("hipEventSynchronize", last)
        assert (p.numpy() == 1).all()
        fakehip.call(*elapsed)
        assert milliseconds.value > 0
        blocking = client.new_stream(0)
        launch(add, 1, 64, p, stream=blocking)
        assert (p.numpy() == 2).all()  # the null stream waits for a blocking one
        bad = fakehip.DeviceArray((64,), np.int32)
        launch(add, 1, 64, bad, stream=stream)  # of bytes without a value: fails when it runs
        assert code_of("hipStreamSynchronize", stream) == LAUNCH
        fakehip.call("hipEventRecord", last, stream)
        fakehip.call("hipStreamDestroy", stream)
        fakehip.call("hipStreamWaitEvent", blocking, last, 0)
        with pytest.raises(emulator.UninitialisedError):
            fakehip.check()
    for event in (first, last):
        fakehip.call("hipEventDestroy", event)
    fakehip.call("hipStreamDestroy", blocking)


def test_faults_and_leaks(module: Module) -> None:
    before, word = fakehip.live(), POINTER()
    malloc = ("hipMalloc", ctypes.byref(word), SIZE(16))
    with fakehip.failing("hipMalloc:2,hipModuleLoadData:0=209"):
        assert [code_of(*malloc), code_of(*malloc)] == [0, NO_MEMORY]
        assert code_of("hipModuleLoadData", ctypes.byref(word), b"") == NO_BINARY
        assert fakehip.count_calls("hipMalloc") == 2 and fakehip.count_calls() == 3
    assert fakehip.live()["allocations"] == before["allocations"] + 1
    fakehip.call("hipFree", word)
    assert fakehip.live() == before
    with fakehip.failing("*:2"):
        assert code_of(*malloc) == 0
        assert code_of("hipFree", word) == 999
    fakehip.call("hipFree", word)
    with fakehip.failing("hiprtcCompileProgram:1"), pytest.raises(RuntimeError):
        client.compile_source(SOURCE, "gfx942")
    assert code_of("hipPeekAtLastError") == 999
    assert code_of("hipGetLastError") == 999 and code_of("hipGetLastError") == 0


def test_compile_error_has_a_log() -> None:
    with pytest.raises(RuntimeError, match="error:"):
        client.compile_source("this is not C++", "gfx942")


def test_threads(code: dict[str, bytes]) -> None:
    """Launches from threads that hold Python's lock (PyDLL) and from some that do not."""
    loaded = Module(code[fakehip.ARCHS[0]])
    add, arrays = loaded["add_one"], [fakehip.to_device(np.zeros(64, np.int32)) for _ in range(4)]
    holding = ctypes.PyDLL(str(fakehip.start() / "libamdhip64.so.7"))

    def work(i: int) -> None:
        address = POINTER(arrays[i].address)
        pointers = (POINTER * 1)(ctypes.addressof(address))
        library = holding if i % 2 else fakehip.library()
        for _ in range(10):
            library.hipModuleLaunchKernel(add, 1, 1, 1, 64, 1, 1, 0, None, pointers, None)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((array.numpy() == 10).all() for array in arrays)
    loaded.unload()


def test_dlpack() -> None:
    """The capsule is a DLManagedTensor of device type kDLROCM and goes away with its consumer."""
    array = fakehip.to_device(np.zeros((2, 3), np.float32), 2)
    assert array.__dlpack_device__() == (10, 2)
    capsule = array.__dlpack__()
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = POINTER, (ctypes.py_object, ctypes.c_char_p)
    tensor = fakehip._Tensor.from_address(get(capsule, b"dltensor"))
    assert (tensor.data, tensor.device_type, tensor.device_id) == (array.address, 10, 2)
    assert (tensor.code, tensor.bits, tensor.ndim) == (2, 32, 2)
    assert (tensor.shape[:2], tensor.strides[:2]) == ([2, 3], [3, 1])
    before = fakehip.live()["allocations"]
    del array, capsule
    assert fakehip.live()["allocations"] == before - 1


def test_without_a_device(libraries: Path) -> None:
    code = (
        "import ctypes, os\n"
        "hip = ctypes.CDLL(os.environ['MOEPAD_HIP_LIBRARY'])\n"
        "n = ctypes.c_int(5)\n"
        "print(hip.hipGetDeviceCount(ctypes.byref(n)), n.value, hip.hipInit(0))\n"
    )
    environment = os.environ | fakehip.environment(libraries, ())
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(NO_DEVICE), "0", str(NO_DEVICE)]
    assert code_of("hipSetDevice", len(fakehip.ARCHS)) == BAD_DEVICE
