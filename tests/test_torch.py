"""moepad.torch: the operators checked, compiled and exported by torch, and what they refuse."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import moepad
import numpy as np
import pytest
from cases import FEW, Call, Case, build, params
from conftest import missing, require
from moepad.testing import quantise
from numpy.typing import NDArray

torch = require("torch")
import moepad.torch  # noqa: E402
from moepad import relayout  # noqa: E402

# inductor uses what torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

fused_moe = torch.ops.moepad.fused_moe
fused_moe_out = torch.ops.moepad.fused_moe_out


def to_torch(array: NDArray[Any]) -> Any:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def arguments(case: Case, dtype: str = "f32") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A case's call as positional tensors and options of the operator."""
    call: Call = build(case, dtype)
    options = {
        name: to_torch(value) if isinstance(value, np.ndarray) else value
        for name, value in call.options.items()
    }
    if isinstance(options.get("n_token"), int):
        options["n_token"] = torch.tensor([options["n_token"]])
    return tuple(map(to_torch, call.args)), options


SMALL = Case("torch", "operators", bias="both", activation="swigluoai", gate_up="interleaved")
CONTIGUOUS = [case for case in FEW if not case.is_strided]


def bits_equal(a: Any, b: Any) -> bool:
    """Of two contiguous tensors, NaN included."""
    return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8)))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", params(FEW))
def test_same_bits_as_the_function(case: Case, dtype: str) -> None:
    tensors, options = arguments(case, dtype)
    expected = moepad.fused_moe(*tensors, **options)
    got = fused_moe(*tensors, **options)
    assert type(got) is torch.Tensor and got.dtype == tensors[0].dtype
    out = torch.full_like(tensors[0], torch.nan, memory_format=torch.contiguous_format)
    assert fused_moe_out(*tensors, **options, out=out) is None
    assert bits_equal(got.contiguous(), expected.contiguous())
    assert bits_equal(out, expected.contiguous())


def test_schema_has_every_argument() -> None:
    """Names and defaults of moepad.fused_moe; only what torch manages itself is left out."""
    signature = inspect.signature(moepad.fused_moe)
    ours = {name: value.default for name, value in signature.parameters.items()}
    schema = fused_moe_out.default._schema
    theirs = {argument.name: argument for argument in schema.arguments}
    assert set(theirs) == set(ours)
    for name, argument in theirs.items():
        if argument.has_default_value():
            default = argument.default_value
            assert (tuple(default) if isinstance(default, list) else default) == ours[name], name
        else:
            assert name == "out" or ours[name] is inspect.Parameter.empty
    named = {argument.name for argument in fused_moe.default._schema.arguments}
    assert named == set(ours) - {"out", "workspace", "stream"}


def test_opcheck() -> None:
    tensors, options = arguments(SMALL)
    with torch.no_grad():
        torch.library.opcheck(fused_moe.default, tensors, options)
        workspace = torch.empty(moepad.workspace_nbytes(*tensors, **options), dtype=torch.uint8)
        more = {"out": torch.empty_like(tensors[0]), "workspace": workspace}
        torch.library.opcheck(fused_moe_out.default, tensors, {**options, **more})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend: str) -> None:
    tensors, options = arguments(SMALL, "bf16")

    def layer(x: Any, *rest: Any) -> tuple[Any, Any]:
        written = torch.empty_like(x)
        y = fused_moe(x + 1, *rest, **options)
        fused_moe_out(y, *rest, **options, out=written)
        return y * 2, written - y

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n_token in (5, 3):
            x, w13, w2, weights, ids = tensors
            call = (x[:n_token], w13, w2, weights[:n_token], ids[:n_token])
            for got, expected in zip(compiled(*call), layer(*call), strict=True):
                assert bits_equal(got, expected)


def test_in_place_under_a_compiler() -> None:
    tensors, options = arguments(SMALL)
    expected = fused_moe(*tensors, **options)

    def layer(x: Any, *rest: Any) -> None:
        fused_moe_out(x, *rest, **options, out=x)

    x = tensors[0].clone()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x, *tensors[1:])
    assert bits_equal(x, expected)


def test_exports() -> None:
    class Layer(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, w13: Any, w2: Any) -> None:
            super().__init__()
            self.w13 = torch.nn.Parameter(w13, requires_grad=False)
            self.w2 = torch.nn.Parameter(w2, requires_grad=False)

        def forward(self, x: Any, weights: Any, ids: Any) -> Any:
            return fused_moe(x, self.w13, self.w2, weights, ids, n_inter=40)

    (x, w13, w2, weights, ids), _ = arguments(Case("export", "operators"))
    rows = {0: torch.export.Dim("rows")}
    layer = Layer(w13, w2)
    program = torch.export.export(layer, (x, weights, ids), dynamic_shapes=(rows, rows, rows))
    call = (x[:3], weights[:3], ids[:3])
    assert bits_equal(program.module()(*call), layer(*call))


def test_meta_tensors_have_the_shape() -> None:
    tensors, _ = arguments(Case("meta", "operators"))
    out = fused_moe(*(tensor.to("meta") for tensor in tensors))
    assert out.device.type == "meta" and out.shape == tensors[0].shape


@pytest.mark.parametrize("position", range(5))
def test_mixed_devices(position: int) -> None:
    """One tensor elsewhere than the others, whichever: an error that names one and both places."""
    tensors, _ = arguments(Case("meta", "operators"))
    mixed = list(tensors)
    mixed[position] = mixed[position].to("meta")
    with pytest.raises(ValueError, match=r"\w+: expected memory of (cpu|meta).*got (cpu|meta)"):
        fused_moe(*mixed)


@pytest.mark.parametrize("name", ["hidden_states", "w2", "topk_weights", "w2_bias"])
def test_requires_grad(name: str) -> None:
    names = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")
    tensors, options = arguments(SMALL)
    call = {**dict(zip(names, tensors, strict=True)), **options}
    call[name] = call[name].clone().requires_grad_()
    text = rf"{name}: requires grad, but moepad is forward only; use torch\.no_grad\(\)"
    with pytest.raises(TypeError, match=text):
        fused_moe(**call)
    with torch.no_grad():
        assert not fused_moe(**call).requires_grad
    compiled = torch.compile(lambda **named: fused_moe(**named), backend="aot_eager")
    with pytest.raises(RuntimeError, match=text):
        compiled(**call)
    with torch.no_grad():
        assert bits_equal(compiled(**call), fused_moe(**call))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"w13": torch.bfloat16}, TypeError, "w13: expected dtype f32"),
        ({"topk_ids": torch.int16}, TypeError, "topk_ids: expected dtype i32 or i64"),
        ({"w2": torch.complex64}, TypeError, "w2: expected dtype f32"),
    ],
)
def test_wrong_types(change: dict[str, Any], error: type[Exception], text: str) -> None:
    names = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")
    call = dict(zip(names, arguments(Case("types", "operators"))[0], strict=True))
    for name, dtype in change.items():
        call[name] = call[name].to(dtype)
    with pytest.raises(error, match=text):
        fused_moe(**call)


@pytest.mark.parametrize(
    "options",
    [
        {"w13_scale": torch.ones(4)},
        {"activation": "tanh"},
        {"layout": "diagonal"},
        {"block": [0, 128]},
        {"n_inter": 49},
        {"swiglu_limit": -1.0},
    ],
)
def test_wrong_options(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=rf"^{name}"):
        fused_moe(*arguments(Case("options", "operators"))[0], **options)


# Quantised weights.

STORED = {
    "fp8_tensor": (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2),
    "fp8_channel": (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2),
    "fp8_block": (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2),
    "mxfp8": (torch.float8_e4m3fn,),
    "mxfp4": (torch.uint8,),
    "int8_channel": (torch.int8,),
    "int4_group": (torch.uint8,),
    "none": (torch.bfloat16,),
}
ALL_STORED = sorted({dtype for dtypes in STORED.values() for dtype in dtypes}, key=str)


def quantised_call(quant: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call in bf16 with weights of a kind, as tensors and options of the operator."""
    rng = np.random.default_rng(0)
    x, weights = torch.randn(3, 128).bfloat16(), torch.rand(3, 2)
    ids = torch.tensor([[0, 1], [2, 3], [1, 0]])
    shapes = ((4, 128, 128), (4, 128, 64))
    options: dict[str, Any] = {"quant": quant}
    if quant == "none":
        tensors = [torch.randn(shape).bfloat16() for shape in shapes]
        return (x, *tensors, weights, ids), options
    how = {"block": (1, 32)} if quant == "int4_group" else {"block": (128, 128)}
    stored = [
        quantise(rng.standard_normal(shape, np.float32), quant, n_half=n_half, **how)
        for shape, n_half in zip(shapes, (2, 1), strict=True)
    ]
    tensors = []
    for weight, _ in stored:
        dtype = STORED[quant][0]
        raw = torch.from_numpy(weight.view(np.uint8))
        tensors.append(raw.view(dtype))
    options |= {"block": list(how["block"])}
    options |= {"w13_scale": torch.from_numpy(stored[0][1])}
    options |= {"w2_scale": torch.from_numpy(stored[1][1])}
    return (x, *tensors, weights, ids), options


@pytest.mark.parametrize(
    ("quant", "activations"),
    [*((quant, "none") for quant in STORED), ("mxfp8", "mxfp8"), ("mxfp4", "mxfp4")],
)
def test_quantised(quant: str, activations: str) -> None:
    """The operator, eager and compiled, is the function, whatever weights and activations."""
    tensors, options = quantised_call(quant)
    options["quant_activations"] = activations
    block = {"block": tuple(options["block"])} if "block" in options else {}
    expected = moepad.fused_moe(*tensors, **{**options, **block})
    assert expected.float().abs().max() > 0
    assert bits_equal(fused_moe(*tensors, **options), expected)
    torch.compiler.reset()  # compilations of one lambda have a limit
    compiled = torch.compile(
        lambda *call: fused_moe(*call, **options), backend="aot_eager", fullgraph=True
    )
    assert bits_equal(compiled(*tensors), expected)


@pytest.mark.parametrize("quant", STORED)
def test_weights_of_another_kind(quant: str) -> None:
    """Every stored type with every kind it does not belong to: an error, never a number."""
    (x, w13, w2, weights, ids), options = quantised_call(quant)
    for dtype in ALL_STORED:
        if dtype in STORED[quant]:
            continue
        wrong = [torch.zeros(w.shape).to(dtype) for w in (w13, w2)]
        for call in (wrong, (wrong[0], w2), (w13, wrong[1])):
            with pytest.raises(TypeError, match=r"^w(13|2): expected dtype"):
                fused_moe(x, *call, weights, ids, **options)


@pytest.mark.parametrize("quant", [quant for quant in STORED if quant != "none"])
def test_scales_that_do_not_belong(quant: str) -> None:
    tensors, options = quantised_call(quant)
    for name in ("w13_scale", "w2_scale"):
        scale = options[name]
        for wrong, error in (
            (None, (TypeError, ValueError)),
            (scale[1:], ValueError),
            (scale.to(torch.int32), TypeError),
            (scale.to("meta"), ValueError),
        ):
            with pytest.raises(error, match=rf"^{name}:"):
                fused_moe(*tensors, **{**options, name: wrong})
    if options["w13_scale"].dtype == torch.float32:
        scale = options["w13_scale"].clone().requires_grad_()
        with pytest.raises(TypeError, match="w13_scale: requires grad"):
            fused_moe(*tensors, **{**options, "w13_scale": scale})
    with pytest.raises(ValueError, match=r"^w13_scale: expected None for quant"):
        plain = quantised_call("none")[0]
        fused_moe(*plain, w13_scale=options["w13_scale"], w2_scale=options["w2_scale"])


# Layouts.


STORE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "transposed": (lambda w: w.mT.contiguous(), lambda w: w.mT.contiguous()),
    "shuffle_16x16": (relayout.to_panels, relayout.to_panels),
    "shuffle_32x16": (lambda w: relayout.to_panels(w, 32), lambda w: relayout.to_panels(w, 32)),
    "shuffle_gate_up": (relayout.to_gate_up, relayout.to_panels),
}


def stored(tensors: tuple[Any, ...], layout: str) -> tuple[Any, ...]:
    x, w13, w2, weights, ids = tensors
    store_w13, store_w2 = STORE[layout]
    return (x, store_w13(w13), store_w2(w2), weights, ids)


LAYOUT_CASE = Case("layouts", "AITER, gpt-oss", n_inter=64, bias="both")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", STORE)
def test_layouts(layout: str, dtype: str) -> None:
    tensors, options = arguments(LAYOUT_CASE, dtype)
    expected = fused_moe(*tensors, **options)
    call = stored(tensors, layout)
    assert bits_equal(fused_moe(*call, **options, layout=layout), expected)
    compiled = torch.compile(
        lambda *call: fused_moe(*call, **options, layout=layout), backend="inductor", fullgraph=True
    )
    assert bits_equal(compiled(*call), expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda tensor, value: tensor.copy_(value),
        lambda tensor, value: tensor.data.copy_(value),
        lambda tensor, value: tensor.detach()[1].copy_(value[1]),
        lambda tensor, value: np.copyto(tensor.detach().numpy(), value.numpy()),
        lambda tensor, value: setattr(tensor, "data", value.clone()),
    ],
    ids=["in place", "data", "one expert", "NumPy", "new data"],
)
@pytest.mark.parametrize("make", [torch.nn.Parameter, torch.Tensor.clone], ids=["param", "tensor"])
@torch.no_grad()
def test_a_copy_is_never_stale(
    write: Callable[[Any, Any], None], make: Callable[[Any], Any]
) -> None:
    tensors, _ = arguments(LAYOUT_CASE)
    x, w13, w2, weights, ids = stored(tensors, "transposed")
    w13 = make(w13)
    first = fused_moe(x, w13, w2, weights, ids, layout="transposed")
    write(w13, w13.detach().clone() * 2 + 1)
    second = fused_moe(x, w13, w2, weights, ids, layout="transposed")
    assert not torch.equal(first, second)
    assert bits_equal(second, fused_moe(x, w13.mT.contiguous(), tensors[2], weights, ids))


def test_copies_are_made_once_and_die_with_their_original() -> None:
    relayout.forget()
    made = []

    def make(weight: Any) -> Any:
        made.append(weight.shape)
        return weight.mT.contiguous()

    weight = torch.nn.Parameter(torch.randn(3, 16, 32))
    copy = relayout.plain(weight, make)
    assert relayout.plain(weight.detach(), make) is copy
    assert relayout.plain(weight[1:], make) is not copy
    assert relayout.plain(weight, make) is copy
    assert made == [(3, 16, 32), (2, 16, 32)]
    assert len(relayout._copies) == 2
    del weight
    gc.collect()
    assert not relayout._copies


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        weight = torch.randn(3, 16, 32)
        copy = relayout.plain(weight, _transposed)
        assert relayout.plain(weight, _transposed) is copy
        weight.mul_(2)
        assert torch.equal(relayout.plain(weight, _transposed), weight.mT)


def _transposed(weight: Any) -> Any:
    return weight.mT.contiguous()


@pytest.mark.parametrize("shape", [(2, 24, 32), (2, 32, 12)])
def test_panels_that_do_not_divide(shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    for function in (relayout.to_panels, relayout.from_panels):
        with pytest.raises(ValueError, match=r"weight: expected rows in multiples of 16"):
            function(weight)


# GPUs.


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        missing("gpu", "torch finds no GPU")
    return "cuda"


def test_gpu_takes_the_same_call(gpu: str) -> None:
    tensors, options = arguments(SMALL, "bf16")
    there = tuple(tensor.to(gpu) for tensor in tensors)
    options_there = {k: v.to(gpu) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    right = fused_moe(*tensors, **options).float()
    with torch.no_grad():
        got = fused_moe(*there, **options_there)
        compiled = torch.compile(
            lambda *call: fused_moe(*call, **options_there), backend="aot_eager", fullgraph=True
        )
        assert bits_equal(compiled(*there), got)
    assert got.device.type == gpu
    torch.testing.assert_close(got.cpu().float(), right, rtol=2e-2, atol=2e-2 * float(right.std()))
    for position in range(5):
        mixed = list(there)
        mixed[position] = tensors[position]
        with pytest.raises(ValueError, match="expected memory of"):
            fused_moe(*mixed, **options_there)


def test_gpu_graph(gpu: str) -> None:
    """Captured once with its own memory; replayed on other tokens."""
    tensors, _ = arguments(Case("graph", "serving"), "bf16")
    x, w13, w2, weights, ids = (tensor.to(gpu) for tensor in tensors)
    n_bytes = moepad.workspace_nbytes(x, w13, w2, weights, ids)
    memory = {
        "out": torch.empty_like(x),
        "workspace": torch.empty(n_bytes, dtype=torch.uint8, device=gpu),
    }
    fused_moe_out(x, w13, w2, weights, ids, **memory)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_moe_out(x, w13, w2, weights, ids, **memory)
    x.copy_(x.flip(0))
    ids.copy_(ids.flip(1))
    graph.replay()
    torch.cuda.synchronize()
    assert bits_equal(memory["out"], fused_moe(x, w13, w2, weights, ids))


# What a call costs, and what an import brings.


def cpu_microseconds(call: Callable[[], object], n_call: int = 200) -> float:
    """CPU time of a call, the least of many windows: another process's load does not count."""
    best = float("inf")
    for _ in range(40):
        start = time.thread_time()
        for _ in range(n_call):
            call()
        best = min(best, time.thread_time() - start)
    return best / n_call * 1e6


def test_overhead(n_thread: Callable[[int], None]) -> None:
    """At most twice the C function's cost on top of it, which test_tensors.py holds."""
    n_thread(1)
    tensors, _ = arguments(Case("tiny", "overhead", n_token=1, n_hidden=8, n_inter=4))
    with torch.no_grad():
        function = cpu_microseconds(lambda: moepad.fused_moe(*tensors))
        operator = cpu_microseconds(lambda: fused_moe(*tensors))
    assert operator < 3 * function, f"function {function:.1f}, operator {operator:.1f}"


def test_only_its_import_brings_torch() -> None:
    code = (
        "import sys, moepad; assert 'torch' not in sys.modules; import torch\n"
        "assert not hasattr(torch.ops.moepad, 'fused_moe')\n"
        "import moepad.torch; torch.ops.moepad.fused_moe.default"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
