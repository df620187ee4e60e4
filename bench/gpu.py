"""One NVIDIA or AMD GPU, through PyTorch: is moepad right there, and how fast.

    python bench/gpu.py                     # all parts
    python bench/gpu.py time --shapes A,D --tokens 1,32,2048 --kernels
    compute-sanitizer --tool memcheck python bench/gpu.py quant cases --seconds 60

Parts: `repeats` compares the bits of many calls, eager and from graphs; `runs` checks rows of large
layers; `quant` runs every kind of quantisation and `cases` every case of tests/cases.py, padded and
poisoned, against the specification; `time` measures layers of real models beside a plain copy, the
floor at the true size, and PyTorch's grouped products. Each time is the median of replays of a
graph that goes through several copies of the weights, so that caches do not flatter.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import moepad
import numpy as np
import torch
from moepad import reference
from moepad.testing import Work, check_close, quantise

PARTS = ["repeats", "runs", "quant", "cases", "time"]
TESTS = Path(__file__).resolve().parents[1] / "tests"
DEVICE = "cuda"
ROTATE_BYTES, MAX_COPIES = 2 << 30, 16  # of a layer's weights, taken in turn
N_REPEAT = 100  # of a call whose bits must not change
N_REPLAY = 7


class Shape(NamedTuple):
    """A layer of one rank; `n_inter_pad` is what AITER would pad it to."""

    model: str
    n_hidden: int
    n_inter: int
    n_inter_pad: int
    n_expert: int
    n_topk: int = 8


SHAPES = {
    "A": Shape("Qwen3-235B TP8", 4096, 192, 256, 128),
    "B": Shape("GLM-4.7 TP8", 5120, 192, 256, 160),
    "C": Shape("Qwen3-Coder-480B TP8", 6144, 320, 384, 160),
    "D": Shape("Qwen3-30B-A3B TP1", 2048, 768, 768, 128),
    "E": Shape("Gemma4-26B", 2816, 704, 768, 128),
}
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
QUANTS = ("fp8_tensor", "fp8_block", "mxfp4")


def to_device(array: Any) -> Any:
    """A NumPy array of any of the types in use as a tensor on the GPU; the rest as it is."""
    if not isinstance(array, np.ndarray):
        return array
    names = {
        "bfloat16": torch.bfloat16,
        "float8_e4m3fn": torch.float8_e4m3fn,
        "float8_e4m3fnuz": torch.float8_e4m3fnuz,
        "float8_e5m2": torch.float8_e5m2,
    }
    dtype = names.get(array.dtype.name)
    plain = array if dtype is None else array.view(f"i{array.itemsize}")
    strides = [n // plain.itemsize for n in plain.strides]
    reach = sum((n - 1) * s for n, s in zip(plain.shape, strides, strict=True)) + 1
    # What lies between the rows goes along.
    flat = np.lib.stride_tricks.as_strided(plain, (reach if plain.size else 0,), (plain.itemsize,))
    there = torch.from_numpy(flat.copy()).to(DEVICE)
    there = there if dtype is None else there.view(dtype)
    return torch.as_strided(there, plain.shape, strides)


def to_host(tensor: torch.Tensor, dtype: np.dtype[Any]) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(dtype)
    return tensor.cpu().numpy()


def stored_to_host(tensor: torch.Tensor) -> np.ndarray:
    """Stored weights and scales; what NumPy has no type for, as ml_dtypes has it."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).cpu().numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.cpu().numpy()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


# ------------------------------------------------------------------------------------------- check
def cases() -> Iterator[tuple[str, Any, Any, Any]]:
    """(name, call as it is, call padded, solution) for every row of the table and 16-bit type."""
    sys.path.insert(0, str(TESTS))
    try:
        import pytest  # noqa: F401
    except ImportError:  # cases.py marks its rows for pytest, and no more
        mark = types.SimpleNamespace(small=None, large=None)
        sys.modules["pytest"] = types.ModuleType("pytest")
        sys.modules["pytest"].mark = mark  # type: ignore[attr-defined]
        sys.modules["pytest"].param = lambda *values, **_: values  # type: ignore[attr-defined]
    import cases as table

    for case in sorted(table.CASES, key=lambda case: case.n_multiply):
        for dtype in ("bf16", "f16"):
            if dtype in case.dtypes and case.n_hidden % 8 == 0 and case.n_multiply <= 300_000_000:
                call = table.build(case, dtype)
                pad = None if case.is_strided else table.pad(call, -(-case.n_inter // 64) * 64 + 64)
                yield f"{case.name} {dtype}", call, pad, lambda c=case, d=dtype: table.solve(c, d)


def run_call(call: Any) -> torch.Tensor:
    args = [to_device(array) for array in call.args]
    options = {name: to_device(value) for name, value in call.options.items()}
    return moepad.fused_moe(*args, **options, out=torch.empty_like(args[0]), stream=stream())


def check_cases(seconds: float) -> list[str]:
    """The names of the cases that failed, each with why; no more are begun after `seconds`."""
    faults, n, start = [], 0, time.monotonic()
    for name, call, padded, solve in cases():
        if time.monotonic() - start > seconds:
            print("out of time: later cases were not run")
            break
        n += 1
        try:
            out = run_call(call)
            check_close(to_host(out, call.hidden_states.dtype), *solve())
            if padded is not None:
                other = run_call(padded)[:, : call.hidden_states.shape[1]]
                assert torch.equal(bits(out), bits(other)), "padded and compact differ"
        except (AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
            faults.append(f"{name}: {type(error).__name__} {str(error).splitlines()[:1]}")
            if "CUDA" in str(error) or "HIP" in str(error):
                break  # the device is lost
    print(f"{n - len(faults)} of {n} cases right")
    return faults


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("fp8_tensor", {}),
    ("fp8_channel", {"dtype": "f8_e5m2"}),
    ("fp8_channel", {"dtype": "f8_e4m3fnuz"}),
    ("fp8_block", {"block": (128, 128)}),
    ("mxfp8", {}),
    ("mxfp4", {}),
    ("int8_channel", {}),
    ("int4_group", {"block": (1, 64), "scale_dtype": "bf16"}),
    ("int4_group", {"block": (1, 128), "scale_dtype": "bf16"}),
]


# With activations quantised too: the scales of a block begin at a phase.
CODED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("fp8_tensor", {}, {"quant_activations": "fp8"}),
    ("fp8_channel", {"dtype": "f8_e5m2"}, {"quant_activations": "fp8"}),
    ("fp8_channel", {"dtype": "f8_e4m3fnuz"}, {"quant_activations": "fp8"}),
    ("fp8_block", {"block": (128, 128)}, {"quant_activations": "fp8"}),
    ("fp8_block", {"block": (128, 128)}, {"quant_activations": "fp8", "scale_phase": 64}),
    ("fp8_block", {"block": (64, 256)}, {"quant_activations": "fp8", "scale_phase": 128}),
    ("fp8_block", {"block": (32, 64)}, {"quant_activations": "fp8", "scale_phase": 32}),
    ("int8_channel", {}, {"quant_activations": "int8"}),
    ("mxfp8", {}, {"quant_activations": "mxfp8"}),
    ("mxfp4", {}, {"quant_activations": "mxfp8"}),
    ("mxfp4", {}, {"quant_activations": "mxfp4"}),
]
CODED_SIZES = [(1, 4, 256, 96), (40, 16, 264, 88), (700, 8, 512, 192), (1500, 4, 272, 336)]
SIZES = [*CODED_SIZES, (80, 16, 512, 96), (200, 16, 512, 192), (300, 4, 264, 70)]


def check_quant() -> list[str]:
    """Every kind of quantisation in every regime."""
    faults, n = [], 0
    rng = np.random.default_rng(0)
    table = [(*kind, {}, SIZES) for kind in KINDS] + [(*kind, CODED_SIZES) for kind in CODED]
    for quant, more, options, sizes in table:
        phase = options.get("scale_phase", 0)
        # Of codes in bf16 alone: another order of the sums of h takes some to the next code, which
        # is more than what rounding to float16 allows in a few of many rows.
        is_coded = "quant_activations" in options
        dtypes = (ml_dtypes.bfloat16,) if is_coded else (ml_dtypes.bfloat16, np.float16)
        for (n_token, n_expert, n_hidden, n_inter), dtype in itertools.product(sizes, dtypes):
            n += 1
            shape = (n_expert, 2 * n_inter, n_hidden)
            w13 = rng.standard_normal(shape, np.float32) / n_hidden**0.5
            w2 = rng.standard_normal((n_expert, n_hidden, n_inter), np.float32) / n_inter**0.5
            stored13, scale13 = quantise(w13, quant, n_half=2, row_phase=phase, **more)
            stored2, scale2 = quantise(w2, quant, column_phase=phase, **more)
            hidden = rng.standard_normal((n_token, n_hidden), np.float32)
            call = {
                "hidden_states": hidden.astype(dtype),
                "w13": stored13, "w2": stored2, "w13_scale": scale13, "w2_scale": scale2,
                "topk_weights": rng.random((n_token, 2), np.float32),
                "topk_ids": rng.integers(0, n_expert, (n_token, 2)).astype(np.int32),
                "quant": quant, "n_inter": n_inter,
            }  # fmt: skip
            call |= options | ({"block": more["block"]} if "block" in more else {})
            there = {name: to_device(value) for name, value in call.items()}
            name = f"{quant} {more} {options} {n_token} tokens {np.dtype(dtype)}"
            try:
                out = moepad.fused_moe(
                    **there, out=torch.empty_like(there["hidden_states"]), stream=stream()
                )
                right, naive = reference.fused_moe(**call), reference.naive(**call)
                check_close(to_host(out, call["hidden_states"].dtype), right, naive[None])
            except (AssertionError, RuntimeError, ValueError, TypeError) as error:
                faults.append(f"{name}: {type(error).__name__} {str(error).splitlines()[:1]}")
    print(f"{n - len(faults)} of {n} quantised calls right")
    return faults


def check_repeats() -> list[str]:
    """Every regime: the same bits again and again, eager and from a graph."""
    faults = []
    for n_token in (1, 16, 40, 128, 600, 2500):
        layer = Layer(SHAPES["A"]._replace(n_expert=32, n_hidden=1024), 1)
        call = layer.call(n_token)
        call(0)
        first = layer.out.clone()
        graph = capture(functools.partial(call, 0))
        for i in range(N_REPEAT):
            layer.out.fill_(torch.nan)
            graph.replay() if i % 2 else call(0)
            if not torch.equal(bits(first), bits(layer.out)):
                faults.append(f"{n_token} tokens: run {i} has other bits")
                break
    return faults


def check_runs() -> list[str]:
    """Layers so large that a block takes several column tiles: the same bits as a call of so few
    tokens that it takes one, or, without codes, what PyTorch's float64 has.
    """
    faults = []
    plain = ("none", "fp8_channel", "fp8_block", "mxfp8", "mxfp4", "int8_channel")
    for quant in (*plain, "fp8_channel+fp8", "fp8_block+fp8", "int8_channel+int8"):
        layer = Layer(SHAPES["A"], 1, quant)
        for n_token in (128, 600, 1500, 8192):
            layer.call(n_token)(0)
            whole = layer.out.clone()
            for first in (0, n_token // 2, n_token - 8):
                part = slice(first, first + 8)
                if layer.coded:
                    is_right = torch.equal(bits(whole[part]), bits(layer.few(part)))
                else:
                    exact = layer.exact(part)
                    error = (whole[part].double() - exact).abs()
                    is_right = bool((error < 0.02 * (exact.abs() + exact.std())).all())
                if not is_right:
                    faults.append(f"{quant}: tokens from {first} of {n_token}")
        del layer
    return faults


# -------------------------------------------------------------------------------------------- time
def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def microseconds(run: Callable[[int], object], n: int) -> float:
    """Median time of one of the n calls in a graph."""
    graph = capture(lambda: [run(i) for i in range(n)])
    times = []
    for _ in range(N_REPLAY):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 500 / n)
    return statistics.median(times)


class Layer:
    """Copies of one layer's weights, and calls that take them in turn."""

    def __init__(self, shape: Shape, n_copy: int = 0, quant: str = "none", n_inter_pad: int = 0):
        self.shape = shape
        self.quant, _, self.coded = quant.partition("+")
        self.n_inter_pad = n_inter_pad or shape.n_inter
        n_weight = 3 * shape.n_expert * self.n_inter_pad * shape.n_hidden * self.bits // 8
        n_copy = n_copy or min(max(2, ROTATE_BYTES // n_weight), MAX_COPIES)
        self.copies = [self.make() for _ in range(n_copy)]
        self.out = torch.empty(0)
        self.ids: list[torch.Tensor] = []

    @property
    def bits(self) -> int:
        return {"none": 16, "mxfp4": 4, "int4_group": 4}.get(self.quant, 8)

    def make(self) -> dict[str, Any]:
        s, pad = self.shape, self.n_inter_pad
        generator = torch.Generator(DEVICE).manual_seed(1)
        if self.quant == "none":

            def normal(*size: int, scale: float) -> torch.Tensor:
                x = torch.randn(*size, device=DEVICE, generator=generator, dtype=torch.float32)
                return (x * scale).to(torch.bfloat16)

            w13 = torch.full((s.n_expert, 2, pad, s.n_hidden), torch.nan, device=DEVICE,
                             dtype=torch.bfloat16)  # fmt: skip
            w2 = torch.full((s.n_expert, s.n_hidden, pad), torch.nan, device=DEVICE,
                            dtype=torch.bfloat16)  # fmt: skip
            for e in range(s.n_expert):
                w13[e, :, : s.n_inter] = normal(2, s.n_inter, s.n_hidden, scale=s.n_hidden**-0.5)
                w2[e, :, : s.n_inter] = normal(s.n_hidden, s.n_inter, scale=s.n_inter**-0.5)
            return {"w13": w13.view(s.n_expert, 2 * pad, s.n_hidden), "w2": w2}
        plan = moepad.plan(s.n_hidden, s.n_inter, s.n_expert, quant=self.quant)

        def stored(shape: tuple[int, ...]) -> torch.Tensor:
            codes = torch.randint(
                0, 256, shape, device=DEVICE, generator=generator, dtype=torch.int32
            )
            if self.bits == 8:  # no NaN, no large exponents
                codes = codes % 64 + codes // 64 % 2 * 128
            codes = codes.to(torch.uint8)
            if self.quant == "int8_channel":
                return codes.view(torch.int8)
            return codes if self.bits == 4 else codes.view(torch.float8_e4m3fn)

        def scale(shape: tuple[int, ...]) -> torch.Tensor:
            if self.quant.startswith("mx"):
                return torch.full(shape, 121, device=DEVICE, dtype=torch.uint8)
            return torch.rand(shape, device=DEVICE, generator=generator) * 0.02

        return {
            "w13": stored(plan.w13_shape), "w2": stored(plan.w2_shape), "quant": self.quant,
            "w13_scale": scale(plan.w13_scale_shape), "w2_scale": scale(plan.w2_scale_shape),
        }  # fmt: skip

    def call(self, n_token: int) -> Callable[[int], object]:
        s = self.shape
        generator = torch.Generator(DEVICE).manual_seed(n_token)
        hidden = torch.randn(n_token, s.n_hidden, device=DEVICE, generator=generator).bfloat16()
        weights = torch.rand(n_token, s.n_topk, device=DEVICE, generator=generator)
        order = torch.rand(
            len(self.copies), n_token, s.n_expert, device=DEVICE, generator=generator
        )
        self.ids = list(order.topk(s.n_topk, 2).indices.int())
        self.hidden, self.weights, self.out = hidden, weights, torch.empty_like(hidden)
        options: dict[str, Any] = {"n_inter": s.n_inter}
        options |= {"quant_activations": self.coded} if self.coded else {}
        named = {"topk_weights": weights, "topk_ids": self.ids[0], **options}
        size = moepad.workspace_nbytes(hidden, **named,
                                       **self.copies[0])  # fmt: skip
        workspace = torch.empty(size, device=DEVICE, dtype=torch.uint8)

        def run(i: int) -> object:
            return moepad.fused_moe(
                hidden, topk_weights=weights, topk_ids=self.ids[i], out=self.out,
                workspace=workspace, stream=stream(), **options, **self.copies[i],
            )  # fmt: skip

        return run

    def few(self, part: slice) -> torch.Tensor:
        """A call on some tokens of the latest call's."""
        options = {"quant_activations": self.coded} if self.coded else {}
        hidden = self.hidden[part]
        out: torch.Tensor = moepad.fused_moe(
            hidden, topk_weights=self.weights[part], topk_ids=self.ids[0][part],
            n_inter=self.shape.n_inter, out=torch.empty_like(hidden), stream=stream(), **options,
            **self.copies[0],
        )  # fmt: skip
        return out

    def expert(self, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An expert's w13 and w2 in float64, in elements."""
        copy, n = self.copies[0], self.shape.n_inter
        if self.quant == "none":
            return copy["w13"][e].double(), copy["w2"][e, :, :n].double()
        named = ("w13", "w2", "w13_scale", "w2_scale")
        arrays = [stored_to_host(copy[name][e : e + 1]) for name in named]
        both = reference.dequantise(*arrays, quant=self.quant, n_inter=n)
        w13, w2 = (torch.from_numpy(weights[0]).to(DEVICE) for weights in both)
        return w13, w2[:, :n]

    def exact(self, part: slice) -> torch.Tensor:
        """The same in float64."""
        n, rows = self.shape.n_inter, []
        for x, weights, ids in zip(
            self.hidden[part].double(), self.weights[part], self.ids[0][part], strict=True
        ):
            total = torch.zeros_like(x)
            for weight, e in zip(weights.double(), ids.tolist(), strict=True):
                w13, w2 = self.expert(e)
                both = w13 @ x
                h = torch.nn.functional.silu(both[:n]) * both[len(both) // 2 :][:n]
                total += weight * (w2 @ h)
            rows.append(total)
        return torch.stack(rows)

    def grouped(self) -> Callable[[int], object]:
        """The same by PyTorch's grouped products."""
        s, (hidden, weights) = self.shape, (self.hidden, self.weights)
        experts = torch.arange(s.n_expert, device=DEVICE)

        def run(i: int) -> object:
            flat = self.ids[i].flatten()
            order = flat.argsort(stable=True)
            offsets = (flat[:, None] == experts).sum(0).cumsum(0).int()
            w13, w2 = self.copies[i]["w13"], self.copies[i]["w2"]
            rows = hidden[order // s.n_topk]
            both = torch._grouped_mm(rows, w13.transpose(1, 2), offs=offsets)
            inter = torch.nn.functional.silu(both[:, : s.n_inter]) * both[:, s.n_inter :]
            slots = torch._grouped_mm(inter, w2.transpose(1, 2), offs=offsets)
            slots = slots * weights.flatten()[order, None]
            result = torch.empty_like(slots)
            result[order] = slots.to(result.dtype)
            return result.view(-1, s.n_topk, s.n_hidden).sum(1)

        return run

    def floor(self, bandwidth: float, peak: float) -> float:
        s = self.shape
        works = [
            Work.of(ids.cpu().numpy(), n_hidden=s.n_hidden, n_inter=s.n_inter,
                    weight_bits=self.bits, value_bytes=2)
            for ids in self.ids
        ]  # fmt: skip
        peak *= 2 if self.coded else 1
        return 1e6 * statistics.fmean(work.seconds(bandwidth, peak) for work in works)


def machine() -> dict[str, float]:
    """What the device does at best: bytes/s read and written, FLOP/s in bf16.

    The copy is a kernel's, changing each sign: a memcpy node of a graph is far slower on an H200.
    """
    source = torch.ones(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    copy = 8 * source.numel() / microseconds(lambda _: torch.neg(source, out=target), 2) * 1e6
    a, b = (torch.randn(8192, 8192, device=DEVICE).bfloat16() for _ in range(2))
    peak = 2 * 8192**3 / microseconds(lambda _: a @ b, 4) * 1e6
    return {"copy": copy, "peak": peak}


def kernels(run: Callable[[int], object], n: int) -> dict[str, float]:
    """Microseconds of each kernel of a call; waits for the kernel before are inside."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(n):
            run(i)
        torch.cuda.synchronize()
    return {
        event.key.removeprefix("mpad_"): round(event.device_time_total / n, 1)
        for event in profile.key_averages()
        if event.key.startswith("mpad_")
    }


def time_shapes(options: argparse.Namespace) -> list[dict[str, Any]]:
    speed = machine()
    print(f"copy {speed['copy'] / 1e12:.2f} TB/s, bf16 {speed['peak'] / 1e12:.0f} TFLOP/s")
    rows = []

    def measure(key: str, layer: Layer, label: str, n_token: int, **more: Any) -> torch.Tensor:
        call = layer.call(n_token)
        n = len(layer.copies)
        row = {"shape": key, "what": label, "n_token": n_token, "us": microseconds(call, n)}
        call(0)
        result = layer.out.clone()
        row["floor"] = layer.floor(speed["copy"], speed["peak"])
        if options.kernels:
            row["kernels"] = kernels(call, n)
        if label == "bf16" and options.peer:
            row["grouped_mm"] = microseconds(layer.grouped(), n)
        rows.append(row | more)
        print(
            " ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()),
            flush=True,
        )
        return result

    for key in options.shapes:
        shape = SHAPES[key]
        layer = Layer(shape)
        results = {m: measure(key, layer, "bf16", m) for m in options.tokens}
        del layer
        if options.padded and shape.n_inter_pad != shape.n_inter:
            layer = Layer(shape, n_inter_pad=shape.n_inter_pad)
            for m in options.tokens:
                padded = measure(key, layer, "padded", m)
                same = torch.equal(bits(padded), bits(results[m]))
                print(f"  NaN up to {shape.n_inter_pad}: bits {'equal' if same else 'DIFFER'}")
            del layer
        for quant in options.quant:
            layer = Layer(shape, quant=quant)
            for m in options.tokens:
                measure(key, layer, quant, m)
            del layer
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--shapes", type=lambda s: s.split(","), default=list(SHAPES))
    parser.add_argument("--tokens", type=lambda s: [int(m) for m in s.split(",")], default=TOKENS)
    parser.add_argument("--quant", type=lambda s: [q for q in s.split(",") if q], default=[],
                        help="kinds of weights, and after a + of activations")  # fmt: skip
    parser.add_argument("--kernels", action="store_true", help="time of each kernel too")
    parser.add_argument("--peer", action="store_true", help="PyTorch's grouped products too")
    parser.add_argument("--padded", action="store_true", help="physically padded with NaN too")
    parser.add_argument("--seconds", type=float, default=600, help="for the table's cases at most")
    parser.add_argument("--json", type=Path, help="write the times there")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, moepad {moepad.__version__}")
    checks = {
        "repeats": check_repeats,
        "runs": check_runs,
        "quant": check_quant,
        "cases": functools.partial(check_cases, options.seconds),
    }
    faults = [fault for part, run in checks.items() if part in options.parts for fault in run()]
    print("\n".join(faults) or "no faults")
    if "time" in options.parts:
        rows = time_shapes(options)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
