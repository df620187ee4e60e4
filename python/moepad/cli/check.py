"""`python -m moepad check`: a checkpoint's experts, loaded and run on every rank, against float64.

Chooses layers and ranks and shows what `moepad.verify` finds; computes nothing itself.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moepad._core import CheckpointError, UnsupportedError
from moepad.checkpoint import open_source
from moepad.cli.table import progress, table
from moepad.encodings import QUANTS
from moepad.layouts import expert_prefixes
from moepad.models import Model, read_config
from moepad.padding import Plan, plan
from moepad.verify import LayerResult, WholeLayers, check_layer, layer_number

NAME = "check"
HELP = "load and run a checkpoint's experts on every rank and compare with float64"

_N_TOKEN = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="checkpoint folder with config.json")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks")
    parser.add_argument(
        "--split", default="true", metavar="RULE", help="true, padded or block (default: true)"
    )
    parser.add_argument(
        "--align", type=int, default=1, metavar="A", help="round each rank's size up to it"
    )
    parser.add_argument(
        "--layers", type=_layers, metavar="LIST", help="such as 0,3-5 (default: all with experts)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="M",
        help="random tokens (default: 16, or enough for all experts)",
    )
    parser.add_argument("--dtype", metavar="TYPE", help="bf16, f16 or f32 (default: config.json's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    model = read_config(args.path)
    if args.dtype:
        model = replace(model, dtype=args.dtype)
    plans = make_plans(model, tp_size=args.tp, ep_size=args.ep, split=args.split, align=args.align)
    results = check(args.path, model, plans, layers=args.layers, n_token=args.tokens)
    if args.json:
        print(json.dumps(report(model, plans, results), indent=2))
    else:
        print(describe(model, plans))
        print()
        print(result_table(plans, results))
        print()
        print(verdict(plans, results))
    return 0 if all(result.is_ok for result in results) else 1


def _layers(text: str) -> list[int]:
    """Numbers of a list such as 0,3-5."""
    numbers: list[int] = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"expected a list such as 0,3-5, got {text!r}")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def make_plans(model: Model, **ranks: Any) -> list[Plan]:
    """One plan per rank for the layers of a model.

    Raises
    ------
    UnsupportedError
        The model is quantised in a way that is not supported, or `split` would cut inside a scale.
    """
    if model.quant is None:
        raise UnsupportedError(
            f"quant: {model.name} is stored as {', '.join(model.formats)}, which no quant of "
            f"moepad.plan is; those are none, {', '.join(QUANTS)}"
        )
    request: dict[str, Any] = {
        "n_hidden": model.n_hidden,
        "n_inter": model.n_inter,
        "n_expert": model.n_expert,
        "gated": model.gated,
        "bias": model.bias,
        "dtype": model.dtype,
        "quant": model.quant,
        "block": model.block,
    }
    first = plan(**request, **ranks)
    return [
        plan(**request, **ranks, tp_rank=tp_rank, ep_rank=ep_rank)
        for ep_rank in range(first.ep_size)
        for tp_rank in range(first.tp_size)
    ]


def check(
    path: Path,
    model: Model,
    plans: list[Plan],
    *,
    layers: Sequence[int] | None = None,
    n_token: int | None = None,
) -> list[LayerResult]:
    """Check the layers asked for, with a bar on a terminal.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be loaded as config.json describes it.
    ValueError
        A layer asked for has no experts, or there are no tokens.
    """
    if n_token is not None and n_token < 1:
        raise ValueError(f"tokens: expected at least 1, got {n_token}")
    source = open_source(path)
    prefixes = _choose(expert_prefixes(source), layers)
    whole = WholeLayers(path, model)
    if n_token is None:
        n_token = max(_N_TOKEN, -(-model.n_expert // model.n_topk))
    n_rank = len(prefixes) * len(plans)
    bar = progress(range(n_rank + 1), "checking", total=n_rank, unit="rank")
    next(bar)  # shows it
    results = [
        check_layer(source, whole, prefix, plans, n_token, lambda: next(bar)) for prefix in prefixes
    ]
    bar.close()
    return results


def _choose(prefixes: list[str], layers: Sequence[int] | None) -> list[str]:
    if not prefixes:
        raise CheckpointError(
            "path: no layer of the checkpoint has routed experts in a layout that is known"
        )
    if layers is None:
        return prefixes
    there = {layer_number(prefix): prefix for prefix in prefixes}
    for layer in layers:
        if layer not in there:
            raise ValueError(
                f"layers: {layer} has no experts; those with experts are "
                f"{', '.join(str(number) for number in there)}"
            )
    return [there[layer] for layer in dict.fromkeys(layers)]


# --- What is shown -------------------------------------------------------------------------------


def describe(model: Model, plans: Sequence[Plan]) -> str:
    """What is checked, in two lines."""
    first = plans[0]
    kind = ", ".join(
        [
            model.activation + ("" if model.gated else ", not gated"),
            *(["biases"] if model.bias else []),
            model.dtype,
            *(model.formats if model.quant != "none" else []),
        ]
    )
    ranks = f"tp {first.tp_size}" + (f" x ep {first.ep_size}" if first.ep_size > 1 else "")
    columns = _span([p.n_inter for p in plans])
    if any(p.n_inter_pad > p.n_inter for p in plans):
        columns += f", padded to {_span([p.n_inter_pad for p in plans])} with NaN"
    return (
        f"{model.name}: hidden {model.n_hidden}, {model.n_expert} experts of {model.n_inter}, "
        f"top {model.n_topk}, {kind}\n"
        f"{ranks}, split {first.split}: columns per rank and expert {columns}"
    )


def _span(numbers: Sequence[int]) -> str:
    """One number, or the smallest and the largest."""
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least} to {most}"


def result_table(plans: Sequence[Plan], results: Sequence[LayerResult]) -> str:
    header = (
        "layer", "n_inter", "padded", "MiB/rank", "pad %", "error", "allowed", "load s", "run ms",
        "result",
    )  # fmt: skip
    nbytes = max(p.nbytes for p in plans)
    pad = max(100 * p.pad_nbytes / p.nbytes if p.nbytes else 0.0 for p in plans)
    rows = [
        (
            _layer_name(result),
            _span([p.n_inter for p in plans]),
            _span([p.n_inter_pad for p in plans]),
            f"{nbytes / 2**20:.1f}",
            f"{pad:.0f}",
            f"{result.error:.1e}",
            f"{result.allowed:.1e}",
            f"{result.load_seconds:.2f}",
            f"{1000 * result.run_seconds:.1f}",
            "ok" if result.is_ok else "WRONG",
        )
        for result in results
    ]
    return table(rows, header, align="r" * (len(header) - 1) + "l")


def _layer_name(result: LayerResult) -> str:
    number = layer_number(result.prefix)
    return result.prefix if number is None else str(number)


def verdict(plans: Sequence[Plan], results: Sequence[LayerResult]) -> str:
    wrong = [result for result in results if not result.is_ok]
    n_rank, n_layer = len(plans), len(results)
    if not wrong:
        return (
            f"ok: the sum over {n_rank} rank{'s' * (n_rank > 1)} is the float64 result, within "
            f"rounding, in {n_layer} of {n_layer} layers"
        )
    first = wrong[0]
    return (
        f"WRONG in {len(wrong)} of {n_layer} layers; {first.prefix}: token {first.token}, column "
        f"{first.column} of the sum over ranks is off by {first.error:.3e}, rounding explains "
        f"{first.allowed:.3e}"
    )


def report(model: Model, plans: Sequence[Plan], results: Sequence[LayerResult]) -> dict[str, Any]:
    """What --json prints."""
    return {
        "model": asdict(model),
        "ranks": [asdict(p) for p in plans],
        "layers": [
            {
                "layer": layer_number(result.prefix),
                **asdict(result),
                "error": result.error if math.isfinite(result.error) else None,
                "ok": result.is_ok,
            }
            for result in results
        ],
        "ok": all(result.is_ok for result in results),
    }
