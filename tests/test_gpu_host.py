"""The host path to a GPU, against the stand-in HIP library: what it calls, in which order, what it
says when a call fails, and that it leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakehip
import ml_dtypes
import moepad
import numpy as np
import pytest
from conftest import missing

DEVICE = 1  # of fakehip.ARCHS: gfx942
M, H, N, IP, E, K = 3, 64, 40, 48, 4, 2  # N: the logical intermediate size
TESTS = Path(__file__).parent
BF16 = ml_dtypes.bfloat16


def arguments() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(BF16)

    w13, w2 = normal(E, 2 * IP, H), normal(E, H, IP)
    w13[:, N:IP] = w13[:, IP + N :] = w2[:, :, N:] = np.nan
    ids = np.stack([rng.permutation(E)[:K] for _ in range(M)]).astype(np.int32)
    return {
        "hidden_states": normal(M, H),
        "w13": w13,
        "w2": w2,
        "topk_weights": rng.random((M, K), dtype=np.float32),
        "topk_ids": ids,
    }


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    a, b = got.astype(np.float32), expected.astype(np.float32)
    return bool(np.abs(a - b).max() <= 2**-7 * np.abs(b).max())


@pytest.fixture(autouse=True)
def emulator_is_content(emulated: None) -> Iterator[None]:
    yield
    fakehip.check()


@pytest.fixture
def on_device() -> dict[str, Any]:
    return {name: fakehip.to_device(array, DEVICE) for name, array in arguments().items()}


@pytest.fixture
def out() -> fakehip.DeviceArray:
    return fakehip.DeviceArray((M, H), BF16, DEVICE)


@pytest.fixture
def workspace(on_device: dict[str, Any]) -> fakehip.DeviceArray:
    n_bytes = moepad.workspace_nbytes(**on_device, n_inter=N)
    return fakehip.DeviceArray((n_bytes,), np.uint8, DEVICE)


EXPECTED = moepad.fused_moe(**arguments(), n_inter=N)


def test_result(on_device: dict[str, Any], out: fakehip.DeviceArray) -> None:
    assert moepad.fused_moe(**on_device, n_inter=N, out=out) is out
    assert close(out.numpy(), EXPECTED)


def test_calls_are_launches_alone(
    on_device: dict[str, Any], out: fakehip.DeviceArray, workspace: fakehip.DeviceArray
) -> None:
    """With out and workspace given: no allocation, no waiting; the current device is restored."""
    moepad.fused_moe(**on_device, n_inter=N, out=out, workspace=workspace)
    fakehip.set_plan("")
    moepad.fused_moe(**on_device, n_inter=N, out=out, workspace=workspace)
    n_launch = fakehip.count_calls("hipModuleLaunchKernel")
    assert n_launch == 2
    assert fakehip.count_calls("hipSetDevice") == 2 and fakehip.count_calls("hipGetDevice") == 1
    assert fakehip.count_calls() == n_launch + 3
    current = ctypes.c_int(-1)
    fakehip.call("hipGetDevice", ctypes.byref(current))
    assert current.value == 0
    with fakehip.on_device(DEVICE):
        fakehip.set_plan("")
        moepad.fused_moe(**on_device, n_inter=N, out=out, workspace=workspace)
        assert fakehip.count_calls("hipSetDevice") == 0


def stream() -> int:
    handle = ctypes.c_void_p()
    with fakehip.on_device(DEVICE):
        fakehip.call("hipStreamCreate", ctypes.byref(handle))
    assert handle.value
    return handle.value


class Stream:
    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle


def test_capture(
    on_device: dict[str, Any], out: fakehip.DeviceArray, workspace: fakehip.DeviceArray
) -> None:
    """Captured in the mode that forbids most, replayed on other values."""
    moepad.fused_moe(**on_device, n_inter=N, out=out, workspace=workspace)
    eager = out.numpy()
    handle, graph, replay = stream(), ctypes.c_void_p(), ctypes.c_void_p()
    fakehip.call("hipStreamBeginCapture", ctypes.c_void_p(handle), 0)
    moepad.fused_moe(**on_device, n_inter=N, out=out, workspace=workspace, stream=handle)
    fakehip.call("hipStreamEndCapture", ctypes.c_void_p(handle), ctypes.byref(graph))
    fakehip.call("hipGraphInstantiate", ctypes.byref(replay), graph, None, None, ctypes.c_size_t(0))
    for sign in (-1, 1):
        x = (sign * arguments()["hidden_states"].astype(np.float32)).astype(BF16)
        on_device["hidden_states"].set(x)
        fakehip.call("hipGraphLaunch", replay, ctypes.c_void_p(handle))
        fakehip.call("hipStreamSynchronize", ctypes.c_void_p(handle))
        got = out.numpy()
        assert (got.tobytes() == eager.tobytes()) == (sign == 1)
    fakehip.call("hipGraphExecDestroy", replay)
    fakehip.call("hipGraphDestroy", graph)
    fakehip.call("hipStreamDestroy", ctypes.c_void_p(handle))


@pytest.mark.usefixtures("young")
def test_every_call_may_fail(
    on_device: dict[str, Any], out: fakehip.DeviceArray, workspace: fakehip.DeviceArray
) -> None:
    """A ready device: each runtime call of a fused_moe fails once; the next call is right."""
    moepad.fused_moe(**on_device, n_inter=N, out=out, workspace=workspace)
    fakehip.set_plan("")
    moepad.fused_moe(**on_device, n_inter=N, out=out, workspace=workspace)
    n_call = fakehip.count_calls()
    live = fakehip.live()
    for n in range(1, n_call + 1):
        with (
            fakehip.failing(f"*:{n}"),
            pytest.raises(moepad.DeviceError) as caught,
        ):
            moepad.fused_moe(**on_device, n_inter=N, out=out, workspace=workspace)
        pattern = r"hip\w+: error \d+ \(hipError\w+\) on HIP device 1 \(gfx942:[^)]*\)"
        assert re.fullmatch(pattern, str(caught.value)), str(caught.value)
        fakehip.call("hipSetDevice", 0)
        assert fakehip.library().hipGetLastError() == 0
        assert fakehip.live() == live
        moepad.fused_moe(**on_device, n_inter=N, out=out, workspace=workspace)
        assert close(out.numpy(), EXPECTED)


def test_workspace_of_our_own(on_device: dict[str, Any], out: fakehip.DeviceArray) -> None:
    """One buffer per stream, kept for the next call; out of memory is an error that passes."""
    handle = stream()
    with (
        fakehip.failing("hipMalloc:1"),
        pytest.raises(moepad.DeviceError, match=r"hipMalloc: error 2 \(hipErrorOutOfMemory\)"),
    ):
        moepad.fused_moe(**on_device, n_inter=N, out=out, stream=handle)
    fakehip.set_plan("")
    for _ in range(3):
        moepad.fused_moe(**on_device, n_inter=N, out=out, stream=Stream(handle))
    assert fakehip.count_calls("hipMalloc") == 1
    assert close(out.numpy(), EXPECTED)


def test_n_token_on_the_device(on_device: dict[str, Any], out: fakehip.DeviceArray) -> None:
    for dtype in (np.int32, np.int64):
        n_token = fakehip.to_device(np.array([2], dtype), DEVICE)
        moepad.fused_moe(**on_device, n_inter=N, out=out, n_token=n_token)
        got = out.numpy()
        assert close(got[:2], EXPECTED[:2])
        assert not got[2:].astype(np.float32).any()


def test_copy() -> None:
    rng = np.random.default_rng(1)
    array = rng.integers(0, 255, (3, 4, 10), dtype=np.uint8)
    there = fakehip.to_device(np.zeros_like(array), DEVICE)
    moepad._core.copy(there, array)
    assert (there.numpy() == array).all()
    back = np.zeros((3, 5, 12), np.uint8)
    moepad._core.copy(back[:, 1:, 1:11], there)
    assert (back[:, 1:, 1:11] == array).all()
    assert not back[:, 0].any() and not back[:, :, 0].any() and not back[:, :, 11].any()
    with pytest.raises(ValueError, match="last dimension without gaps"):
        moepad._core.copy(there, np.zeros((3, 4, 20), np.uint8)[:, :, ::2])


@pytest.mark.parametrize(
    ("change", "exception", "pattern"),
    [
        (
            {"w13": arguments()["w13"]},
            ValueError,
            r"w13: expected memory of AMD device 1, where hidden_states is, got the CPU; move it",
        ),
        ({"stream": "0"}, TypeError, r"stream: expected an integer handle or .*"),
        ({"stream": True}, TypeError, r"stream: expected an integer handle or .*"),
        ({"stream": 1 << 64}, ValueError, r"stream: expected a handle, an integer of 64 bits"),
        (
            {"n_hidden": 60},
            moepad.UnsupportedError,
            r"n_hidden: on a GPU .*, got 60;.*",
        ),
    ],
)
def test_wrong_arguments(
    change: dict[str, Any],
    exception: type[Exception],
    pattern: str,
    on_device: dict[str, Any],
    out: fakehip.DeviceArray,
) -> None:
    with pytest.raises(exception) as caught:
        moepad.fused_moe(**{**on_device, "n_inter": N, "out": out, **change})
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


def test_workspace_too_small_or_crooked(
    on_device: dict[str, Any], out: fakehip.DeviceArray, workspace: fakehip.DeviceArray
) -> None:
    small = fakehip.DeviceArray((workspace.nbytes - 1,), np.uint8, DEVICE)
    with pytest.raises(ValueError, match=rf"workspace: expected at least {workspace.nbytes} bytes"):
        moepad.fused_moe(**on_device, n_inter=N, out=out, workspace=small)
    with pytest.raises(ValueError, match=r"workspace: expected memory of AMD device 1"):
        moepad.fused_moe(**on_device, n_inter=N, out=out, workspace=bytearray(1 << 16))


def test_out_has_to_be_given_where_nothing_makes_one(on_device: dict[str, Any]) -> None:
    with pytest.raises(MemoryError, match=r"DeviceArray has no way to make one; pass out"):
        moepad.fused_moe(**on_device, n_inter=N)


# ------------------------------------------------------------------------ in processes of their own


def child(code: str, **environment: str) -> str:
    """What a fresh process prints; it finds the tests' modules and `arguments` of this file."""
    setting = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    setting = {name: value for name, value in setting.items() if value}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=setting,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_first_use_may_fail_anywhere() -> None:
    """From the search for the library to the first result, each call fails once."""
    text = child(
        """
        import re, moepad, fakehip
        from test_gpu_host import *
        fakehip.start()
        there = {name: fakehip.to_device(array, DEVICE) for name, array in arguments().items()}
        out = fakehip.DeviceArray((M, H), BF16, DEVICE)
        live, n = fakehip.live(), 0
        while True:
            n += 1
            try:
                with fakehip.failing(f"*:{n}"):
                    moepad.fused_moe(**there, n_inter=N, out=out)
                break
            except moepad.DeviceError as error:
                assert re.match(r"hip[^ ]+: error \\d+ \\(hipError\\w+\\)", str(error)), error
            fakehip.call("hipSetDevice", 0)
            assert fakehip.live()["allocations"] == live["allocations"], n
        # The ready device's module and its buffer, nothing of the failures.
        live["modules"] += 1
        live["allocations"] += 1
        assert fakehip.live() == live
        assert close(out.numpy(), EXPECTED)
        print(n)
        """
    )
    assert int(text) > 10


def test_two_devices_and_threads() -> None:
    child(
        """
        import moepad, fakehip, threading
        from test_gpu_host import *
        fakehip.start()
        os.environ["FAKEHIP_ARCH"] = "gfx942,gfx942"
        jobs, faults = [], []
        for device in (0, 1):
            there = {n: fakehip.to_device(a, device) for n, a in arguments().items()}
            jobs += [(there, fakehip.DeviceArray((M, H), BF16, device)) for _ in range(2)]
        def work(there, out):
            try:
                for _ in range(3):
                    moepad.fused_moe(**there, n_inter=N, out=out, n_token=M)
            except BaseException as error:
                faults.append(error)
        # Two threads each share a device's default stream, and with it our workspace.
        threads = [threading.Thread(target=work, args=job) for job in jobs]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not faults, faults
        for _, out in jobs:
            assert close(out.numpy(), EXPECTED)
        """
    )


def test_import_opens_nothing() -> None:
    maps = child("import moepad; print(open('/proc/self/maps').read())")
    assert not re.search(r"libamdhip64|libhiprtc|libcuda\.|libnvrtc", maps)


NO_RUNTIME = """
    import moepad, numpy as np
    from dlpack import ROCM, Producer
    there = {"w13": (2, 8, 8), "w2": (2, 8, 4), "topk_weights": (1, 1)}
    there = {n: Producer(np.zeros(s, "f4"), device_type=ROCM) for n, s in there.items()}
    x = Producer(np.zeros((1, 8), "f4"), device_type=ROCM)
    ids = Producer(np.zeros((1, 1), "i4"), device_type=ROCM)
    for _ in range(2):
        try:
            moepad.fused_moe(x, topk_ids=ids, **there, out=x)
        except moepad.DeviceError as error:
            print(error)
    here = {n: p.array for n, p in there.items()}
    assert not moepad.fused_moe(x.array, topk_ids=ids.array, **here).any()
"""


def test_no_runtime() -> None:
    lines = child(NO_RUNTIME, MOEPAD_HIP_LIBRARY="/nonexistent.so").splitlines()
    assert len(lines) == 2 and len(set(lines)) == 1
    assert "looked for /nonexistent.so; python -m moepad env says why" in lines[0]


def test_real_runtime_without_a_device() -> None:
    """A real libamdhip64, where one is installed and there is no GPU, says that there is none."""
    environment = {"MOEPAD_HIP_LIBRARY": "", "TRITON_LIBHIP_PATH": ""}
    text = child(NO_RUNTIME, **environment)
    if "not found" in text:
        missing("libamdhip64", "no library of that name opens")
    assert "hipGetDeviceCount: error 100 (hipErrorNoDevice)" in text


def test_no_second_runtime(tmp_path: Path) -> None:
    """With a copy in the process, an override that names another one is refused."""
    other = tmp_path / "libamdhip64.so.7"
    other.write_bytes(Path(os.environ["MOEPAD_HIP_LIBRARY"]).read_bytes())
    text = child(f"import ctypes; ctypes.CDLL({str(other)!r})\n{textwrap.dedent(NO_RUNTIME)}")
    assert str(other) in text and os.environ["MOEPAD_HIP_LIBRARY"] in text
    assert "two in one process" in text


ENV = "from moepad.cli import main; main(['env', '--json'])"


def test_env_says_what_was_looked_at() -> None:
    facts = json.loads(child(ENV, MOEPAD_HIP_LIBRARY="/nonexistent.so"))
    (tried,) = facts["amd_libraries"]
    assert (tried["origin"], tried["path"]) == ("MOEPAD_HIP_LIBRARY", "/nonexistent.so")
    assert "cannot open" in tried["verdict"] and not tried["taken"]
    assert "/nonexistent.so" in facts["amd_error"] and facts["amd_devices"] == []
    facts = json.loads(child(ENV))
    assert facts["amd_error"] is None and facts["amd_libraries"][0]["taken"]
    assert [device["index"] for device in facts["amd_devices"]] == [0, 1, 2]
    assert all("compiled at first use" in device["images"] for device in facts["amd_devices"])


def test_env_reports() -> None:
    report = moepad._core.gpu_report()[0]
    assert [device["arch"].partition(":")[0] for device in report["devices"]] == [*fakehip.ARCHS]
    assert report["error"] is None
    assert [entry["taken"] for entry in report["tried"]].count(True) == 1
