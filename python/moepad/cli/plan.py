"""`python -m moepad plan`: sizes of the expert tensors on every rank, and what padding costs.

Shows what `moepad.plan` says; sums and percentages over ranks are the only numbers made here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from moepad._core import UnsupportedError
from moepad.cli.table import table
from moepad.models import Model, find, read_config
from moepad.padding import Plan, plan

NAME = "plan"
HELP = "show the size of every expert tensor on every rank, and what padding costs"

# What AMD's fused kernels ask for: 64 and 128 by kernel, 256 for packed 4-bit weights.
ALIGNMENTS = (64, 128, 256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group(
        "the layer",
        "one of --model, --config, or three sizes, which then mean gated and without bias",
    )
    source.add_argument("--model", metavar="NAME", help="a model of the built-in table")
    source.add_argument("--config", metavar="PATH", help="a checkpoint's config.json or its folder")
    source.add_argument("--hidden", type=int, metavar="H", help="model width")
    source.add_argument("--inter", type=int, metavar="I", help="intermediate size")
    source.add_argument("--experts", type=int, metavar="E", help="number of experts")
    flag = argparse.BooleanOptionalAction
    source.add_argument("--gated", action=flag, help="w13 has gate and up rows")
    source.add_argument("--bias", action=flag, help="both products have a bias")
    cut = parser.add_argument_group("how it is stored and shared")
    cut.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    cut.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks")
    cut.add_argument(
        "--quant",
        metavar="KIND",
        help="none, fp8_tensor, fp8_channel, fp8_block, mxfp8, mxfp4, int8_channel or int4_group "
        "(default: the checkpoint's, else none)",
    )
    cut.add_argument(
        "--block", type=int, nargs=2, metavar=("N", "K"), help="rows and columns of a scale block"
    )
    cut.add_argument("--dtype", help="bf16, f16, f32, or the fp8 type of an fp8 kind")
    cut.add_argument(
        "--split",
        default="true",
        metavar="RULE",
        help="true (even shares, the default), padded (SGLang's) or block (whole scale blocks)",
    )
    cut.add_argument(
        "--align", type=int, default=1, metavar="A", help="round each rank's size up to it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    model = _model(args)
    request = _request(args, model)
    ranks = _plans(request)
    costs = _costs(request, ranks)
    if args.json:
        facts = {"model": asdict(model), "ranks": [asdict(r) for r in ranks], "padding": costs}
        print(json.dumps(facts, indent=2))
        return 0
    print(_title(model, ranks[0]))
    print()
    print(_rank_table(ranks))
    print()
    print("Padding, all ranks of one layer:")
    print(_cost_table(costs))
    print()
    print(
        "split padded is SGLang's rule: every rank strides by, and allocates, the padded size, so\n"
        "that the last ranks can be left without a column."
    )
    return 0


def _model(args: argparse.Namespace) -> Model:
    sizes = (args.hidden, args.inter, args.experts)
    n_source = (args.model is not None) + (args.config is not None) + (sizes != (None,) * 3)
    if n_source != 1 or (args.model is args.config is None and None in sizes):
        raise ValueError(
            "expected exactly one of --model NAME, --config PATH, "
            "or all of --hidden H --inter I --experts E"
        )
    if args.model is not None:
        return find(args.model)
    if args.config is not None:
        return read_config(args.config)
    return Model("", *sizes, n_topk=1)


def _request(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """The keywords of `moepad.plan`, ranks aside."""
    quant = args.quant or model.quant
    if quant is None:
        raise ValueError(
            f"quant: {model.name} is stored as {', '.join(model.formats)}, "
            "which moepad has no kind for; pass --quant to plan for another"
        )
    return {
        "n_hidden": model.n_hidden,
        "n_inter": model.n_inter,
        "n_expert": model.n_expert,
        "gated": model.gated if args.gated is None else args.gated,
        "bias": model.bias if args.bias is None else args.bias,
        "quant": quant,
        "dtype": args.dtype or model.dtype,
        "block": tuple(args.block) if args.block else model.block,
        "tp_size": args.tp,
        "ep_size": args.ep,
        "split": args.split,
        "align": args.align,
    }


def _plans(request: dict[str, Any]) -> list[Plan]:
    """The plans of all ranks; of bad sizes, what the first rank says."""
    first = plan(**request)
    return [
        plan(**request, tp_rank=tp_rank, ep_rank=ep_rank)
        for ep_rank in range(first.ep_size)
        for tp_rank in range(first.tp_size)
    ]


def _costs(request: dict[str, Any], ranks: list[Plan]) -> list[dict[str, Any]]:
    """One row per rule and alignment: bytes of all ranks beside those of the unpadded plan."""
    rules = dict.fromkeys((request["split"], "padded"))
    true_nbytes = _total(_plans({**request, "split": "true", "align": 1}))
    rows = []
    for split in rules:
        for align in sorted({*ALIGNMENTS, request["align"]}):
            row: dict[str, Any] = {"split": split, "align": align}
            try:
                plans = _plans({**request, "split": split, "align": align})
            except UnsupportedError as error:
                rows.append({**row, "refused": str(error)})
                continue
            # SGLang allocates on every rank what the first one needs.
            held = [plans[i - p.tp_rank] if split == "padded" else p for i, p in enumerate(plans)]
            nbytes = _total(held)
            row["n_inter_pad"] = max(p.n_inter_pad for p in plans)
            row["empty_ranks"] = sum(p.n_inter == 0 for p in plans[: plans[0].tp_size])
            row["nbytes"] = nbytes
            row["extra_nbytes"] = nbytes - true_nbytes
            row["extra_percent"] = _percent(nbytes - true_nbytes, true_nbytes)
            rows.append(row)
    return rows


def _total(plans: Iterable[Plan]) -> int:
    return sum(p.nbytes for p in plans)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def _title(model: Model, first: Plan) -> str:
    sizes = f"H={first.n_hidden} I={first.n_inter_global} E={first.n_expert_global}"
    facts = [
        " ".join(filter(None, (model.name, sizes))),
        "gated" if first.gated else "not gated",
        f"quant {first.quant}",
        f"weights {first.storage_dtype}",
        f"split {first.split}",
        f"align {first.align}",
    ]
    if model.moe_layers is not None:
        facts.append(f"{len(model.moe_layers)} of {model.n_layer} layers have experts")
    return ", ".join(facts)


def _rank_table(ranks: list[Plan]) -> str:
    columns: dict[str, list[object]] = {
        "ep": [p.ep_rank for p in ranks],
        "experts": [f"{p.expert_start}:{p.expert_stop}" for p in ranks],
        "tp": [p.tp_rank for p in ranks],
        "columns": [f"{p.start}:{p.stop}" for p in ranks],
        "n_inter": [p.n_inter for p in ranks],
        "padded": [p.n_inter_pad for p in ranks],
        "w13": [_shape(p.w13_shape) for p in ranks],
        "w2": [_shape(p.w2_shape) for p in ranks],
        "w13 scale": [_shape(p.w13_scale_shape) for p in ranks],
        "w2 scale": [_shape(p.w2_scale_shape) for p in ranks],
        "phase": [p.scale_phase for p in ranks],
        "w13 bias": [_shape(p.w13_bias_shape) for p in ranks],
        "MiB": [_mib(p.nbytes) for p in ranks],
        "pad MiB": [_mib(p.pad_nbytes) for p in ranks],
        "pad %": [f"{_percent(p.pad_nbytes, p.nbytes):.1f}" for p in ranks],
    }
    if ranks[0].ep_size == 1:
        del columns["ep"], columns["experts"]
    if ranks[0].w13_scale_shape is None:
        del columns["w13 scale"], columns["w2 scale"]
    if not any(p.scale_phase for p in ranks):
        del columns["phase"]
    if ranks[0].w13_bias_shape is None:
        del columns["w13 bias"]
    right = {"ep", "tp", "n_inter", "padded", "phase", "MiB", "pad MiB", "pad %"}
    align = "".join("r" if name in right else "l" for name in columns)
    return table(list(zip(*columns.values(), strict=True)), list(columns), align)


def _cost_table(costs: list[dict[str, Any]]) -> str:
    header = ("split", "align", "padded", "empty ranks", "MiB", "more MiB", "more %", "")
    rows = [
        (row["split"], row["align"], None, None, None, None, None, f"refused: {row['refused']}")
        if "refused" in row
        else (
            row["split"],
            row["align"],
            row["n_inter_pad"],
            row["empty_ranks"],
            _mib(row["nbytes"]),
            _mib(row["extra_nbytes"]),
            f"{row['extra_percent']:.1f}",
            "",
        )
        for row in costs
    ]
    return table(rows, header, "lrrrrrrl")


def _shape(shape: tuple[int, ...] | None) -> str | None:
    return None if shape is None else "x".join(map(str, shape))


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f}"
