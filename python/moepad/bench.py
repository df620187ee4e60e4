"""What the benchmark measures: floors, moepad, and the peers that are installed.

Each contender runs in a process of its own, since one of them rewrites the weights it is given, and
they take turns in short windows, since machines change their speed from minute to minute. Bandwidth
and arithmetic peak are measured around every window, so that each time is held against what the
machine could do at that moment. Weights rotate, so that caches do not flatter. Prints nothing:
`moepad.cli.bench` does.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from moepad import _core, peers, reference
from moepad.peers import Attach, Bind, Call, Tokens
from moepad.testing import Work, quantise, window

__all__ = ["SHAPES", "Cell", "Contender", "Shape", "call_overhead", "machine_speed", "run"]

Array = NDArray[Any]

DTYPES = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
}
ROTATE_BYTES = 600 << 20  # of weights, taken in turn: many times any cache
MEMORY_BOUND_TOKENS = 64  # up to here weights are taken in turn
PROBE_BYTES = 256 << 20  # read to measure the bandwidth
PROBE_SECONDS = 0.02
N_WINDOW = 5
N_CHECK = 2  # tokens of each result held against the specification
OURS = "moepad"  # a contender's kind
# Kinds of quantised weights that can be measured, and what `moepad.fused_moe` takes with each.
QUANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp8_tensor": {},
    "fp8_channel": {},
    "fp8_block": {"block": (128, 128)},
    "mxfp8": {},
    "mxfp4": {},
    "int8_channel": {},
    "int4_group": {"block": (1, 32)},
}
# Relative L2 error no correct implementation reaches: several roundings of each type.
LIMIT = {"f32": 1e-4, "bf16": 3e-2, "f16": 5e-3}


@dataclass(frozen=True)
class Shape:
    """A layer per rank: sizes as in `moepad.plan`."""

    name: str
    n_hidden: int
    n_inter: int
    n_expert: int
    n_topk: int

    @property
    def n_weight(self) -> int:
        return 3 * self.n_expert * self.n_inter * self.n_hidden


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b", 2048, 768, 32, 8),
        Shape("q235-tp8", 4096, 192, 32, 8),
        Shape("mixtral", 4096, 1792, 8, 2),
    )
}


@dataclass(frozen=True)
class Contender:
    """One implementation under test.

    Attributes
    ----------
    name : str
        Column title.
    kind : str
        `OURS` or a key of `moepad.peers.PEERS`.
    isa : str, optional
        moepad's instruction set; default the best.
    n_inter, n_inter_pad : int, optional
        Logical and physical intermediate size, where they are not the shape's.
    """

    name: str
    kind: str
    isa: str | None = None
    n_inter: int | None = None
    n_inter_pad: int | None = None


class _Window(NamedTuple):
    """One window: seconds of the median call, and the machine's speed around it."""

    seconds: float
    floor: float
    bandwidth: float
    peak: float


@dataclass
class Cell:
    """One contender on one shape with one number of tokens.

    Attributes
    ----------
    seconds : list of float
        Median of each window.
    floors : list of float
        The floor at the speed of each window.
    fault : str
        Why there is no, or no valid, time; else empty.
    error : float
        Relative L2 distance of the first tokens from the specification.
    """

    contender: str
    is_ours: bool
    shape: str
    dtype: str
    quant: str
    n_token: int
    seconds: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    fault: str = ""
    error: float = math.nan

    def add(self, window: _Window) -> None:
        self.seconds.append(window.seconds)
        self.floors.append(window.floor)
        self.bandwidths.append(window.bandwidth)
        self.peaks.append(window.peak)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def floor(self) -> float:
        return statistics.median(self.floors) if self.floors else math.nan

    @property
    def fraction(self) -> float:
        """Median over windows of floor / time: 1 is the most any implementation can reach."""
        pairs = zip(self.floors, self.seconds, strict=True)
        return statistics.median(f / s for f, s in pairs) if self.seconds else math.nan

    def as_dict(self) -> dict[str, Any]:
        derived = {"median": self.median, "floor": self.floor, "fraction": self.fraction}
        return {**asdict(self), **derived}


def _moepad(contender: Contender) -> Attach:
    _core.set_cpu_isa(contender.isa)

    def attach(w13: Array, w2: Array, **options: Any) -> Bind:
        def bind(tokens: Tokens) -> Call:
            out = np.empty_like(tokens.hidden)
            args = (tokens.hidden, w13, w2, tokens.weights, tokens.ids)
            return lambda: _core.fused_moe(*args, n_inter=contender.n_inter, out=out, **options)

        return bind

    return attach


# --- the worker process ------------------------------------------------------------------------


class _Task(NamedTuple):
    contender: Contender
    shape: Shape
    dtype: str
    quant: str
    n_thread: int
    rotate_bytes: int


class _Layer(NamedTuple):
    w13: Array
    w2: Array
    options: dict[str, Any]  # what else `moepad.fused_moe` takes: scales and the like

    @property
    def n_bytes(self) -> int:
        tensors = (self.w13, self.w2, *self.options.values())
        return sum(int(tensor.nbytes) for tensor in tensors if _is_array(tensor))

    def copy(self) -> _Layer:
        options = {k: _copy(v) if _is_array(v) else v for k, v in self.options.items()}
        return _Layer(_copy(self.w13), _copy(self.w2), options)


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray)


def _layers(task: _Task) -> list[_Layer]:
    """Copies of one layer's weights, enough of them to rotate over."""
    first = _layer(task)
    if task.quant != "none":
        first = _quantised(first, task.quant).copy()
    n_copy = math.ceil(task.rotate_bytes / first.n_bytes)
    return [first, *(first.copy() for _ in range(n_copy - 1))]


def _quantised(layer: _Layer, quant: str) -> _Layer:
    options = QUANTS[quant]
    w13, w13_scale = quantise(layer.w13.astype(np.float32), quant, n_half=2, **options)
    w2, w2_scale = quantise(layer.w2.astype(np.float32), quant, **options)
    scales = {"w13_scale": w13_scale, "w2_scale": w2_scale}
    return _Layer(w13, w2, {"quant": quant, **options, **scales})


def _layer(task: _Task) -> _Layer:
    shape, dtype = task.shape, DTYPES[task.dtype]
    n_inter = task.contender.n_inter or shape.n_inter
    n_inter_pad = task.contender.n_inter_pad or n_inter
    w13 = _zeros((shape.n_expert, 2 * n_inter_pad, shape.n_hidden), dtype)
    w2 = _zeros((shape.n_expert, shape.n_hidden, n_inter_pad), dtype)
    rng = np.random.default_rng(0)
    # A period that is prime, so that no two rows are equal.
    period = rng.standard_normal(1_048_583, np.float32)
    for half in reference.split_gate_up(w13, n_inter):
        half[...] = _fill(period, half.shape, shape.n_hidden**-0.5)
        period = period[::-1]
    w2[:, :, :n_inter] = _fill(period, w2[:, :, :n_inter].shape, n_inter**-0.5)
    return _Layer(w13, w2, {})


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Aligned as frameworks' and the loader's tensors are, which NumPy's own are not."""
    alignment = 64
    block = np.zeros(math.prod(shape) * dtype.itemsize + alignment, np.uint8)
    return np.ndarray(shape, dtype, block.data, -block.ctypes.data % alignment)


def _copy(array: Array) -> Array:
    copy = _zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


def _fill(period: NDArray[np.float32], shape: tuple[int, ...], scale: float) -> Array:
    return np.resize(period * np.float32(scale), shape)


def _tokens(shape: Shape, dtype: str, n_token: int, seed: int) -> Tokens:
    rng = np.random.default_rng((n_token, seed))
    hidden = rng.standard_normal((n_token, shape.n_hidden), np.float32).astype(DTYPES[dtype])
    weights = rng.random((n_token, shape.n_topk), np.float32) + np.float32(0.1)
    weights /= weights.sum(axis=1, keepdims=True)
    ids = np.argsort(rng.random((n_token, shape.n_expert)), axis=1)[:, : shape.n_topk]
    return Tokens(hidden, weights, np.ascontiguousarray(ids.astype(np.int32)))


class _Worker:
    """Inside the process: weights, and for each number of tokens the calls to take turns over."""

    def __init__(self, task: _Task) -> None:
        self.task = task
        self.layers = _layers(task)
        self.binds = self._attach()
        self.calls: Iterator[Call] = iter(())
        self.works: list[Work] = []
        # Bytes of its own: a peer may have rewritten its weights, and reading them warms a cache.
        self.probe = np.ones(min(PROBE_BYTES, task.rotate_bytes), np.uint8)

    def _attach(self) -> list[Bind]:
        contender, n_thread = self.task.contender, self.task.n_thread
        _core.set_num_threads(n_thread)
        is_ours = contender.kind == OURS
        attach = _moepad(contender) if is_ours else peers.attach(contender.kind, n_thread)
        return [attach(layer.w13, layer.w2, **layer.options) for layer in self.layers]

    def start(self, n_token: int) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Warms up; the first result's first tokens, and from moepad what they should be."""
        shape = self.task.shape
        binds = self.binds if n_token <= MEMORY_BOUND_TOKENS else self.binds[:1]
        # Few tokens meet a part of the experts: different ones each time round the layers.
        binds = binds * math.ceil(shape.n_expert / min(shape.n_expert, n_token * shape.n_topk))
        batches = [_tokens(shape, self.task.dtype, n_token, seed) for seed in range(len(binds))]
        expected = None
        if self.task.contender.kind == OURS:
            few = [tensor[:N_CHECK] for tensor in batches[0]]
            n_inter = self.task.contender.n_inter
            w13, w2, options = self.layers[0]
            expected = reference.fused_moe(few[0], w13, w2, *few[1:], n_inter=n_inter, **options)
        calls = [bind(batch) for bind, batch in zip(binds, batches, strict=True)]
        results = [peers.as_float(call()[:N_CHECK]) for call in calls]
        self.calls = itertools.cycle(calls)
        self.works = [_work(self.task, self.layers[0], batch) for batch in batches]
        return results[0], expected

    def measure(self, seconds: float) -> _Window:
        """One window, between two looks at the machine's speed."""
        before = self._speed()
        times = window(lambda: next(self.calls)(), seconds)
        bandwidth, peak = (
            statistics.fmean(pair) for pair in zip(before, self._speed(), strict=True)
        )
        floor = statistics.fmean(work.seconds(bandwidth, peak) for work in self.works)
        return _Window(statistics.median(times), floor, bandwidth, peak)

    def _speed(self) -> tuple[float, float]:
        return _core.read_bandwidth(self.probe), _core.peak_flops(self.task.dtype, PROBE_SECONDS)


def _bits(task: _Task) -> int:
    if task.quant == "none":
        return 8 * int(DTYPES[task.dtype].itemsize)
    return 4 if task.quant in ("mxfp4", "int4_group") else 8


def _work(task: _Task, layer: _Layer, tokens: Tokens) -> Work:
    """At the true size, whatever the contender's tensors are padded to; with the scales."""
    shape, itemsize = task.shape, DTYPES[task.dtype].itemsize
    work = Work.of(
        tokens.ids,
        n_hidden=shape.n_hidden,
        n_inter=shape.n_inter,
        weight_bits=_bits(task),
        value_bytes=itemsize,
    )
    n_scale_byte = layer.n_bytes - layer.w13.nbytes - layer.w2.nbytes
    n_active = len(np.unique(tokens.ids))
    return replace(work, n_bytes=work.n_bytes + n_active * n_scale_byte // shape.n_expert)


def _serve(connection: Connection, task: _Task) -> None:
    """The worker's main loop: (method, argument) in, result or exception text out."""
    os.dup2(2, 1)  # what a library prints must not mix with the table
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(task.n_thread)
    worker: _Worker | None = None
    while True:
        method, argument = connection.recv()
        if method == "stop":
            return
        try:
            if worker is None:
                worker = _Worker(task)
            connection.send(("", getattr(worker, method)(argument)))
        except Exception as error:
            connection.send((f"{type(error).__name__}: {error}".splitlines()[0], None))


class _Process:
    """The worker as its parent sees it; a fault is a RuntimeError with its reason."""

    def __init__(self, task: _Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, task), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, argument: object) -> Any:
        try:
            self.connection.send((method, argument))
            fault, result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise RuntimeError(f"its process ended with {self.process.exitcode}") from None
        if fault:
            raise RuntimeError(fault)
        return result

    def close(self) -> None:
        with suppress(OSError):
            self.connection.send(("stop", None))
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


# --- the whole run -----------------------------------------------------------------------------


def run(
    contenders: Sequence[Contender],
    shape: Shape,
    dtype: str,
    n_token: Sequence[int],
    *,
    quant: str = "none",
    seconds: float,
    n_thread: int,
    rotate_bytes: int = ROTATE_BYTES,
    tick: Callable[[], object] = lambda: None,
) -> list[Cell]:
    """Times every contender on one shape.

    Parameters
    ----------
    contenders : sequence of Contender
        The first of kind "moepad" also supplies what results are checked against.
    shape : Shape
    dtype : "bf16", "f32" or "f16"
    n_token : sequence of int
    quant : str
        A key of `QUANTS`. No peer takes the others' weights.
    seconds : float
        Per contender and number of tokens, over `N_WINDOW` windows; a window lasts one call at
        least.
    n_thread : int
        For each contender; only one computes at a time.
    rotate_bytes : int
        Weights each contender holds at least, as copies of the layer, and takes in turn for up to
        `MEMORY_BOUND_TOKENS` tokens.
    tick : callable
        Called after each window: `len(contenders) * len(n_token) * N_WINDOW` times.

    Returns
    -------
    list of Cell
        By number of tokens, then in the order of `contenders`. One that fails has a `fault`.
    """
    cells = []
    with ExitStack() as stack:
        processes = {}
        for contender in contenders:
            task = _Task(contender, shape, dtype, quant, n_thread, rotate_bytes)
            processes[contender] = _Process(task)
            stack.callback(processes[contender].close)
        for m in n_token:
            row = [
                Cell(contender.name, contender.kind == OURS, shape.name, dtype, quant, m)
                for contender in contenders
            ]
            _measure_row(row, processes, shape, seconds, tick)
            cells += row
    return cells


def _measure_row(
    row: list[Cell],
    processes: dict[Contender, _Process],
    shape: Shape,
    seconds: float,
    tick: Callable[[], object],
) -> None:
    """All contenders with one number of tokens, in turns."""
    expected: NDArray[np.float64] | None = None
    for cell, (contender, process) in zip(row, processes.items(), strict=True):
        try:
            result, right = process.ask("start", cell.n_token)
            is_same_layer = (contender.n_inter or shape.n_inter) == shape.n_inter
            if expected is None and is_same_layer:
                expected = right
            truth = right if right is not None else expected
            if truth is not None:
                cell.error = float(np.linalg.norm(result - truth) / np.linalg.norm(truth))
                if not cell.error < LIMIT[cell.dtype]:
                    cell.fault = f"wrong: relative error {cell.error:.1e}"
        except RuntimeError as error:
            cell.fault = str(error)
    for _ in range(N_WINDOW):
        for cell, process in zip(row, processes.values(), strict=True):
            if not cell.fault:
                try:
                    cell.add(process.ask("measure", seconds / N_WINDOW))
                except RuntimeError as error:
                    cell.fault = str(error)
            tick()


def machine_speed(n_thread: int, dtypes: Sequence[str]) -> dict[str, float]:
    """Bytes/s of reading and of copying (read plus written), FLOP/s per type."""
    _core.set_num_threads(n_thread)
    source = np.ones(PROBE_BYTES, np.uint8)
    target = np.empty_like(source)
    speed = {"read": max(_core.read_bandwidth(source) for _ in range(3)), "copy": 0.0}
    for _ in range(3):
        start = time.perf_counter()
        _core.copy(target, source)
        seconds = time.perf_counter() - start
        speed["copy"] = max(speed["copy"], 2 * source.nbytes / seconds)
    return speed | {f"peak_{dtype}": _core.peak_flops(dtype, 0.1) for dtype in dtypes}


def call_overhead(n_call: int = 2000) -> dict[str, float]:
    """Seconds that a call costs beyond its work, and that the two size helpers take.

    The fused call is on a layer so small that nearly all of its time is overhead; the engine's own
    part, timed in C on parsed arguments, is taken off. Medians of 5 runs of `n_call` calls.
    """
    one = np.ones((1, 16), np.float32)
    args = (one, np.ones((1, 32, 16), np.float32), np.ones((1, 16, 16), np.float32),
            one[:, :1].copy(), np.zeros((1, 1), np.int32))  # fmt: skip
    out = np.empty_like(one)

    def per_call(function: Callable[[], object]) -> float:
        return statistics.median(timeit.repeat(function, number=n_call, repeat=5)) / n_call

    total = per_call(lambda: _core.fused_moe(*args, out=out))
    empty = per_call(lambda: None)
    engine = statistics.median(_core.time_fused_moe(n_call, *args, out=out))
    return {
        "fused_moe": total - empty,
        "fused_moe_engine": engine,
        "fused_moe_overhead": total - empty - engine,
        "get_moe_padding_size": per_call(lambda: _core.get_moe_padding_size(True)) - empty,
        "get_moe_weight_sizes": per_call(lambda: _core.get_moe_weight_sizes(192, True, False, True))
        - empty,
    }


def padding_contenders(n_inter: int, n_inter_pad: int) -> list[Contender]:
    """True size in compact tensors, in padded ones, and what computing the pad would cost."""
    return [
        Contender("compact", OURS),
        Contender(f"padded to {n_inter_pad}", OURS, n_inter=n_inter, n_inter_pad=n_inter_pad),
        Contender(f"computed at {n_inter_pad}", OURS, n_inter=n_inter_pad),
    ]
