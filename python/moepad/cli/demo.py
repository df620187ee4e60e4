"""`python -m moepad demo`: a small checkpoint, checked on eight ranks, and padded against compact.

Writes what it needs to a temporary folder and downloads nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from moepad._core import fused_moe
from moepad.cli import check
from moepad.cli.table import progress, table
from moepad.models import Model, read_config
from moepad.padding import Plan, plan
from moepad.testing import interleave, quantise
from moepad.verify import LayerResult

NAME = "demo"
HELP = "check a small generated checkpoint on eight ranks, and time padded against compact"

Array = NDArray[Any]

N_TP, ALIGN = 8, 256


class _Format(NamedTuple):
    config: dict[str, Any]
    block: tuple[int, int] = (128, 128)
    weight: str = ""
    scale: str = "_scale"


def _compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**weights, "symmetric": True}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


# Qwen3-MoE in small. Its experts are as wide as Qwen3-235B's: 192 columns on each of eight ranks.
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "moe_intermediate_size": 1536,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
# How real files say and store each kind: config.json's quantization_config; the block of
# `moepad.plan`; what the names of weights and scales end in; the scales' type.
FORMATS: dict[str, _Format] = {
    "fp8_block": _Format(
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        scale="_scale_inv",
    ),
    "fp8_tensor": _Format({"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8_channel": _Format(_compressed(num_bits=8, type="float", strategy="channel")),
    "mxfp8": _Format({"quant_method": "mxfp8"}, block=(1, 32)),
    "mxfp4": _Format(
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}}
    ),
    "int8_channel": _Format(_compressed(num_bits=8, type="int", strategy="channel")),
    "int4_group": _Format(
        _compressed(num_bits=4, type="int", strategy="group", group_size=64),
        block=(1, 64),
        weight="_packed",
    ),
}
# The timed rank has the sizes of one of Qwen3-235B's at tp 8, and as many experts as fit a demo.
TIMED = {"n_hidden": 4096, "n_inter": 192, "n_expert": 16, "n_topk": 8}
TIMED_TOKENS = (1, 16, 256)
TIMED_SECONDS = 2.0  # per row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quant",
        choices=["none", *FORMATS],
        default="none",
        help="how the experts are stored (default: none, bf16); others are checked, not timed",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moepad-") as name:
        folder = Path(name, "demo-qwen3-moe")
        folder.mkdir()
        write_checkpoint(folder, args.quant)
        model = read_config(folder)
        plans = check.make_plans(model, tp_size=N_TP, align=ALIGN)
        results = check.check(folder, model, plans)
    timed = TIMED_TOKENS if args.quant == "none" else ()
    timings = [_time_tokens(m) for m in progress(timed, "timing", unit="row")]
    seconds = time.perf_counter() - start
    is_ok = all(result.is_ok for result in results)
    if args.json:
        facts = {"check": check.report(model, plans, results), "timings": timings}
        print(json.dumps({**facts, "seconds": seconds}, indent=2))
    else:
        _show(model, plans, results, timings)
    return 0 if is_ok else 1


def write_checkpoint(folder: Path, quant: str = "none") -> None:
    """A Qwen3-MoE checkpoint as transformers would save it, of random weights.

    Experts quantised by the largest value of each group, in the form most checkpoints of the kind
    have.
    """
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    c: Mapping[str, Any] = CONFIG
    n_hidden, n_head = c["hidden_size"], c["head_dim"]
    n_query, n_key = c["num_attention_heads"] * n_head, c["num_key_value_heads"] * n_head

    def matrix(*shape: int) -> Array:
        values = rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
        return values.astype(ml_dtypes.bfloat16)

    def ones(*shape: int) -> Array:
        return np.ones(shape, ml_dtypes.bfloat16)

    weight_map = {}

    def write(file_name: str, tensors: dict[str, Array]) -> None:
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file_name))

    n_file = c["num_hidden_layers"] + 1
    for i in progress(range(c["num_hidden_layers"]), "writing a checkpoint", unit="layer"):
        layer = f"model.layers.{i}"
        tensors = {
            f"{layer}.input_layernorm.weight": ones(n_hidden),
            f"{layer}.post_attention_layernorm.weight": ones(n_hidden),
            f"{layer}.self_attn.q_proj.weight": matrix(n_query, n_hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(n_key, n_hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(n_key, n_hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(n_hidden, n_query),
            f"{layer}.self_attn.q_norm.weight": ones(n_head),
            f"{layer}.self_attn.k_norm.weight": ones(n_head),
            f"{layer}.mlp.gate.weight": matrix(c["num_experts"], n_hidden),
        }
        for e in range(c["num_experts"]):
            expert, n_inter = f"{layer}.mlp.experts.{e}", c["moe_intermediate_size"]
            for name in ("gate_proj", "up_proj", "down_proj"):
                shape = (n_hidden, n_inter) if name == "down_proj" else (n_inter, n_hidden)
                weight = {f"{expert}.{name}.weight": matrix(*shape)}
                tensors |= weight if quant == "none" else _quantised(quant, **weight)
        write(f"model-{i + 1:05}-of-{n_file:05}.safetensors", tensors)
    ends = {
        "model.embed_tokens.weight": matrix(c["vocab_size"], n_hidden),
        "model.norm.weight": ones(n_hidden),
        "lm_head.weight": matrix(c["vocab_size"], n_hidden),
    }
    write(f"model-{n_file:05}-of-{n_file:05}.safetensors", ends)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = dict(c) if quant == "none" else {**c, "quantization_config": FORMATS[quant].config}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _quantised(quant: str, **matrices: Array) -> dict[str, Array]:
    """The tensors that files have for each matrix."""
    form = FORMATS[quant]
    tensors = {}
    for name, matrix in matrices.items():
        stored, scale = quantise(
            matrix[None].astype(np.float32), quant, block=form.block, scale_dtype="bf16"
        )
        if quant == "int4_group":
            stored = stored.view(np.int32)
            tensors[f"{name}_shape"] = np.array(matrix.shape, np.int64)
        if quant.endswith("channel"):
            scale = scale[..., None]
        tensors[f"{name}{form.weight}"] = stored[0]
        tensors[f"{name}{form.scale}"] = np.asarray(scale[0])
    return tensors


def _time_tokens(n_token: int) -> dict[str, float]:
    """Seconds of one call on one rank, with the same true weights in three forms."""
    padded, compact = _timed_weights()
    n_inter, n_expert = TIMED["n_inter"], TIMED["n_expert"]
    rng = np.random.default_rng(n_token)
    x = rng.standard_normal((n_token, TIMED["n_hidden"])).astype(ml_dtypes.bfloat16)
    ids = np.argsort(rng.random((n_token, n_expert)))[:, : TIMED["n_topk"]].astype(np.int32)
    weights = np.full(ids.shape, 1 / TIMED["n_topk"], np.float32)
    out = np.empty_like(x)
    calls = {
        "zeros_computed": lambda: fused_moe(x, *padded, weights, ids, out=out),
        "pad_skipped": lambda: fused_moe(x, *padded, weights, ids, n_inter=n_inter, out=out),
        "compact": lambda: fused_moe(x, *compact, weights, ids, out=out),
    }
    return {"n_token": n_token, **interleave(calls, TIMED_SECONDS / len(calls))}


@functools.cache
def _timed_weights() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(w13, w2) padded with zeros, and without pads."""
    n_inter = TIMED["n_inter"]
    p = plan(TIMED["n_hidden"], n_inter, TIMED["n_expert"], align=ALIGN)
    rng = np.random.default_rng(0)
    w13, w2 = (np.zeros(shape, ml_dtypes.bfloat16) for shape in (p.w13_shape, p.w2_shape))
    for e in range(p.n_expert):
        for start in (0, p.n_inter_pad):
            w13[e, start : start + n_inter] = rng.standard_normal((n_inter, p.n_hidden), np.float32)
        w2[e, :, :n_inter] = rng.standard_normal((p.n_hidden, n_inter), np.float32)
    halves = w13.reshape(p.n_expert, 2, p.n_inter_pad, p.n_hidden)[:, :, :n_inter]
    compact = halves.reshape(p.n_expert, 2 * n_inter, p.n_hidden)
    return (w13, w2), (compact, np.ascontiguousarray(w2[:, :, :n_inter]))


# --- What is shown -------------------------------------------------------------------------------


def _timing_table(timings: list[dict[str, float]]) -> str:
    true, padded = TIMED["n_inter"], ALIGN
    header = (
        "tokens", f"all {padded} computed", f"{true} of {padded}", f"{true} stored", "time saved",
    )  # fmt: skip
    rows = [
        (
            str(t["n_token"]),
            *(f"{1000 * t[kind]:.2f} ms" for kind in ("zeros_computed", "pad_skipped", "compact")),
            f"{100 * (1 - t['pad_skipped'] / t['zeros_computed']):.0f} %",
        )
        for t in timings
    ]
    return table(rows, header, align="r" * len(header))


_MEANING = """Kernels that need multiples of {padded} compute the zeros (first time). moepad, told
n_inter={true}, reads and computes the true columns only (second); it takes tensors
without any pad as well (third). The pad is {memory:.0f} % of the memory either way."""


def _show(model: Model, plans: list[Plan], results: list[LayerResult], timings: Any) -> None:
    true = TIMED["n_inter"]
    print("1. A generated Qwen3-MoE checkpoint, loaded and run on eight ranks")
    print()
    print(check.describe(model, plans))
    print()
    print(check.result_table(plans, results))
    print()
    print(check.verdict(plans, results))
    if not timings:
        return
    print()
    print(f"2. {true} columns padded to {ALIGN} with zeros: what the pad costs")
    print()
    print(
        f"One rank of eight as of Qwen3-235B: hidden {TIMED['n_hidden']}, {TIMED['n_expert']} of "
        f"its experts, top {TIMED['n_topk']}, bf16"
    )
    print()
    print(_timing_table(timings))
    print()
    print(_MEANING.format(true=true, padded=ALIGN, memory=100 * (1 - true / ALIGN)))
