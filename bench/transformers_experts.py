"""Times transformers' experts implementations against moepad: a layer, and a model's `generate`.

    python bench/transformers_experts.py [--help]
    python bench/transformers_experts.py --device cuda --ways called,compiled,graph

All implementations run in one process, in turns, on the same parameters and tokens; medians. The
layer's weights are larger than any cache; its calls take several routings, one after the other.
Ways: `called` as it is; `compiled` by torch.compile; `graph` replayed from a CUDA or HIP graph, for
`generate` the one that torch.compile makes of a step (mode `reduce-overhead`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import moepad.adapters.transformers
import torch
import transformers
from moepad.testing import interleave

IMPLEMENTATIONS = ("moepad", "grouped_mm", "batched_mm", "eager")
BATCHED_MAX_TOKENS = 16  # batched_mm copies the weights of every slot
N_ROUTING = 16
COMPILE_MODES = {"compiled": "default", "graph": "reduce-overhead"}

Call = Callable[[], Any]


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda; PyTorch's AMD GPUs are cuda")
    parser.add_argument("--ways", default="called", help="of called,compiled,graph")
    parser.add_argument("--hidden", type=int, default=2048, help="width (default: Qwen3-30B-A3B)")
    parser.add_argument("--inter", type=int, default=768, help="intermediate size")
    parser.add_argument("--experts", type=int, default=128, help="experts of the timed layer")
    parser.add_argument("--topk", type=int, default=8, help="experts per token")
    parser.add_argument("--tokens", type=numbers, default=[1, 16, 128], help="of a layer's call")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--model-experts", type=int, default=32, help="experts of each of them")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens that `generate` adds")
    parser.add_argument("--batches", type=numbers, default=[1], help="sequences of a `generate`")
    parser.add_argument("--seconds", type=float, default=5, help="for each implementation of a row")
    options = parser.parse_args()
    options.ways = options.ways.split(",")
    return options


def make_config(options: argparse.Namespace, n_expert: int) -> Any:
    return transformers.Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=options.inter,
        moe_intermediate_size=options.inter,
        num_experts=n_expert,
        num_experts_per_tok=options.topk,
        max_position_embeddings=4096,
    )


def sharing(module: Any) -> Any:
    """A copy of the module on the same parameters."""
    return copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})


def usable(n_token: int, way: str) -> list[str]:
    """The implementations that take so many tokens in reasonable time and memory, that way."""
    unusable = set() if n_token <= BATCHED_MAX_TOKENS else {"batched_mm"}
    if way == "graph":
        unusable.add("eager")  # reads ids on the host
    return [name for name in IMPLEMENTATIONS if name not in unusable]


def compare(
    title: str,
    make: Callable[[str], Call],
    names: list[str],
    seconds: float,
    number: Callable[[float], float],
    unit: str,
) -> None:
    """One line each: the number of a call's seconds, and how many times as fast moepad is."""
    print(f"\n{title}", flush=True)
    calls, faults = {}, {}
    for name in names:
        try:
            calls[name] = make(name)
            calls[name]()
        except Exception as fault:  # this implementation does not go this way
            lines = str(fault).strip().splitlines() or [""]
            faults[name] = f"{type(fault).__name__}: {lines[0][:80]}"
            calls.pop(name, None)
    times = interleave(calls, seconds)
    for name in names:
        if name in faults:
            print(f"  {name:<12}{faults[name]}")
            continue
        ratio = f"{times[name] / times['moepad']:>8.2f}x" if "moepad" in times else ""
        print(f"  {name:<12}{number(times[name]):>12.3f} {unit}{ratio}", flush=True)


def captured(call: Call) -> Call:
    """Its replay from a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_layer(options: argparse.Namespace, dtype: torch.dtype) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    with torch.device("meta"):
        experts: Any = Qwen3MoeExperts(make_config(options, options.experts))
    experts = experts.to(dtype).to_empty(device=options.device).requires_grad_(False)
    for weight in experts.parameters():
        weight.uniform_(-0.05, 0.05)
    is_gpu = options.device != "cpu"
    n_call = N_ROUTING if is_gpu else 1  # between two looks at the clock

    def contender(way: str, n_token: int, implementation: str) -> Call:
        module = sharing(experts)
        module.config._experts_implementation = implementation
        x = torch.randn(n_token, options.hidden, device=options.device).to(dtype)
        weights = torch.rand(n_token, options.topk, device=options.device).to(dtype)
        order = torch.rand(N_ROUTING, n_token, options.experts, device=options.device)
        routings = itertools.cycle(order.topk(options.topk).indices.unbind())
        run = torch.compile(module, fullgraph=True) if way == "compiled" else module

        def call() -> None:
            for _ in range(n_call):
                run(x, next(routings), weights)

        queued = captured(call) if way == "graph" else call

        def finished() -> None:
            queued()
            if is_gpu:
                torch.cuda.synchronize()

        return finished

    for way, n_token in itertools.product(options.ways, options.tokens):
        torch.compiler.reset()
        compare(
            f"layer, {n_token} tokens, {way}",
            functools.partial(contender, way, n_token),
            usable(n_token, way),
            options.seconds,
            lambda seconds: 1e3 * seconds / n_call,
            "ms",
        )


def time_model(options: argparse.Namespace, dtype: torch.dtype) -> None:
    """`generate` as users call it, prompt and sampling included."""
    config = make_config(options, options.model_experts)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model = model.to(options.device)

    def contender(way: str, n_sequence: int, implementation: str) -> Call:
        mine = sharing(model)
        mine.set_experts_implementation(implementation)
        prompt = torch.randint(3, config.vocab_size, (n_sequence, options.prompt))
        more: dict[str, Any] = {}
        if way != "called":
            mode = transformers.CompileConfig(mode=COMPILE_MODES[way])
            more = {"cache_implementation": "static", "compile_config": mode}
        return functools.partial(
            mine.generate,
            prompt.to(options.device),
            attention_mask=torch.ones_like(prompt, device=options.device),
            min_new_tokens=options.new,
            max_new_tokens=options.new,
            do_sample=False,
            pad_token_id=0,
            **more,
        )

    for way, n_sequence in itertools.product(options.ways, options.batches):
        torch.compiler.reset()
        n_token = n_sequence * options.new
        compare(
            f"{options.layers} layers, prompt of {options.prompt}, generate {options.new} x "
            f"{n_sequence}, {way}",
            functools.partial(contender, way, n_sequence),
            usable(n_sequence * options.prompt, way),
            options.seconds,
            lambda seconds, n_token=n_token: n_token / seconds,
            "tokens/s",
        )


@torch.no_grad()
def main() -> None:
    options = arguments()
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    machine = f"{torch.get_num_threads()} threads; {moepad.cpu_isa()}"
    if options.device != "cpu":
        machine = torch.cuda.get_device_name()
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, moepad "
        f"{moepad.__version__}, {machine}; {options.dtype}, {options.hidden} wide, "
        f"{options.inter} inside, top {options.topk} of {options.experts} experts "
        f"({options.model_experts} in the model); x: how many times as fast moepad is"
    )
    time_layer(options, dtype)
    time_model(options, dtype)


if __name__ == "__main__":
    main()
