"""Times transformers' experts implementations against moepad on the CPU: a layer, and a model.

    python bench/transformers_experts.py [--help]

All implementations run in one process, in turns, on the same module and tokens; medians. Weights of
the layer are larger than any cache, and each call of the layer takes the next of several routings.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import moepad.adapters.transformers
import torch
import transformers
from moepad.testing import interleave

IMPLEMENTATIONS = ("moepad", "grouped_mm", "batched_mm", "eager")
BATCHED_MAX_TOKENS = 16  # batched_mm copies the weights of every slot


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048, help="width (default: Qwen3-30B-A3B)")
    parser.add_argument("--inter", type=int, default=768, help="intermediate size")
    parser.add_argument("--experts", type=int, default=128, help="experts of the timed layer")
    parser.add_argument("--topk", type=int, default=8, help="experts per token")
    parser.add_argument("--tokens", default="1,16,128", help="tokens of a call of the layer")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--model-experts", type=int, default=32, help="experts of each of them")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--seconds", type=float, default=5, help="for each implementation of a row")
    return parser.parse_args()


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


def usable(n_token: int) -> list[str]:
    """The implementations that take so many tokens in reasonable time and memory."""
    few = n_token <= BATCHED_MAX_TOKENS
    return [name for name in IMPLEMENTATIONS if few or name != "batched_mm"]


def report(title: str, rows: dict[str, float], unit: str, is_rate: bool = False) -> None:
    """One line each: the number, and how many times as fast moepad is."""
    print(f"\n{title}")
    for name, value in rows.items():
        ratio = rows["moepad"] / value if is_rate else value / rows["moepad"]
        print(f"  {name:<12}{value:>12.2f} {unit}{ratio:>8.2f}x")


def time_layer(options: argparse.Namespace, dtype: torch.dtype) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = make_config(options, options.experts)
    with torch.device("meta"):
        experts: Any = Qwen3MoeExperts(config)
    experts = experts.to(dtype).to_empty(device="cpu").requires_grad_(False)
    for weight in experts.parameters():
        weight.uniform_(-0.05, 0.05)

    def contender(implementation: str, n_token: int) -> Callable[[], Any]:
        x = torch.randn(n_token, options.hidden).to(dtype)
        weights = torch.rand(n_token, options.topk).to(dtype)
        routings = itertools.cycle(
            torch.rand(n_token, options.experts).topk(options.topk).indices for _ in range(16)
        )

        def call() -> Any:
            config._experts_implementation = implementation
            return experts(x, next(routings), weights)

        return call

    for n_token in map(int, options.tokens.split(",")):
        contenders = {name: contender(name, n_token) for name in usable(n_token)}
        seconds = interleave(contenders, options.seconds)
        rows = {name: 1e3 * value for name, value in seconds.items()}
        report(f"layer, {n_token} tokens", rows, "ms")


def time_model(options: argparse.Namespace, dtype: torch.dtype) -> None:
    """A prompt, and one step of generation after it: the whole model, cache included."""
    config = make_config(options, options.model_experts)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    prompt = torch.randint(3, config.vocab_size, (1, options.prompt))
    cache = model(prompt, use_cache=True).past_key_values
    tokens = itertools.cycle(torch.randint(3, config.vocab_size, (64, 1, 1)))

    def first(implementation: str) -> Any:
        model.set_experts_implementation(implementation)
        return model(prompt, use_cache=True)

    def step(implementation: str) -> Any:
        model.set_experts_implementation(implementation)
        result = model(next(tokens), past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return result

    names = [
        n for n in IMPLEMENTATIONS if n != "batched_mm" or options.prompt <= BATCHED_MAX_TOKENS
    ]
    calls = {name: functools.partial(first, name) for name in names}
    seconds = interleave(calls, options.seconds)
    title = f"{options.layers} layers, prompt of {options.prompt}"
    report(title, {name: 1e3 * value for name, value in seconds.items()}, "ms")
    calls = {name: functools.partial(step, name) for name in IMPLEMENTATIONS}
    seconds = interleave(calls, options.seconds)
    title = f"{options.layers} layers, generation at batch 1"
    rates = {name: 1 / value for name, value in seconds.items()}
    report(title, rates, "tokens/s", is_rate=True)


@torch.inference_mode()
def main() -> None:
    options = arguments()
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; moepad {moepad.__version__}, {moepad.cpu_isa()}, "
        f"{moepad.get_num_threads()} threads; {options.dtype}, {options.hidden} wide, "
        f"{options.inter} inside, top {options.topk} of {options.experts} experts "
        f"({options.model_experts} in the model); x: how many times as fast moepad is"
    )
    time_layer(options, dtype)
    time_model(options, dtype)


if __name__ == "__main__":
    main()
