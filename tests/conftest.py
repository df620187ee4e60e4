"""What every test shares: optional parts, instruction sets, seeds, child processes."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import shutil
import signal
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import hypothesis
import numpy as np
import pytest

REQUIRED = frozenset(filter(None, os.environ.get("MOEPAD_TEST_REQUIRE", "").split(",")))


# The same examples in every run: what fails, fails for everyone. `--hypothesis-profile=default`
# draws new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "small: cheap enough for an emulated device")
    config.addinivalue_line("markers", "large: more than a second on two cores")


def missing(name: str, reason: str) -> NoReturn:
    """Skips for want of the optional part `name`, or fails if MOEPAD_TEST_REQUIRE names it."""
    if name in REQUIRED:
        pytest.fail(f"{name} is named by MOEPAD_TEST_REQUIRE, but {reason}", pytrace=False)
    pytest.skip(f"{name}: {reason}", allow_module_level=True)


def require(name: str) -> Any:
    """The importable optional part `name`, or `missing`."""
    try:
        module: ModuleType = importlib.import_module(name)
    except ImportError as error:
        missing(name, f"it cannot be imported ({error})")
    return module


def require_tool(name: str, *commands: str) -> str:
    """The path of the first of `commands` (default: `name`) on PATH, or `missing`."""
    for command in commands or (name,):
        if path := shutil.which(command):
            return path
    missing(name, f"none of {', '.join(commands or (name,))} is on PATH")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        from moepad import _core

        metafunc.parametrize("isa", _core.cpu_isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set compiled in and usable here."""
    from moepad import _core

    _core.set_cpu_isa(request.param)
    yield request.param
    _core.set_cpu_isa(None)


@pytest.fixture
def n_thread() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for the test, and the default again after it."""
    from moepad import _core

    yield _core.set_num_threads
    _core.set_num_threads(0)


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trace file of a process in which nothing has run yet."""
    from moepad.adapters import trace as module

    monkeypatch.setattr(module, "_ran", set())
    monkeypatch.setattr(module, "_refused", set())
    monkeypatch.setenv("MOEPAD_TRACE", str(tmp_path / "trace"))
    (tmp_path / "trace").touch()
    return tmp_path / "trace"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """The same numbers for the same test, whatever else runs."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """The stand-in HIP runtime, its devices those of `fakehip.ARCHS`; images last over sessions."""
    import fakehip

    if lacking := fakehip.tools():
        missing("emulator", f"it needs {', '.join(lacking)} on PATH")
    before = os.environ.get("MOEPAD_CACHE")
    os.environ["MOEPAD_CACHE"] = before or str(request.config.cache.mkdir("images"))
    fakehip.start()
    yield
    if before is None:
        del os.environ["MOEPAD_CACHE"]


@pytest.fixture
def young() -> Iterator[None]:
    """Garbage is looked for among the test's own objects, not among millions of decoded kernels."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def in_child(function: Callable[[], object], seconds: int = 120) -> None:
    """Runs `function` in a forked child, where a crash or a hang is this test's failure only."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of forking with threads; that our pool survives it is a promise.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            faulthandler.disable()
            signal.alarm(seconds)
            function()
            code = 0
        except BaseException:
            os.write(writer, traceback.format_exc()[-60000:].encode())
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        pytest.fail(f"the child process died of {signal.Signals(-code).name}")
    if code:
        pytest.fail(f"in the child process:\n{text}", pytrace=False)
