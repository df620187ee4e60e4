"""Ranks as processes: torch.distributed over gloo, 2, 4 and 8 of them, over every split rule.

Each rank loads its part of one checkpoint, runs it, and the sum over ranks is the whole layer. The
processes are forked, so that they start at once; the checkpoint's arrays are made before.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import moepad
import numpy as np
import pytest
from conftest import require
from moepad import reference
from moepad.testing import check_close, quantise
from numpy.typing import NDArray

torch = require("torch")
import torch.distributed as dist  # noqa: E402

Array = NDArray[Any]

WORLDS = (2, 4, 8)
H, E, M, K = 32, 6, 9, 3  # six experts: neither four nor eight ranks divide them
PREFIX = "model.layers.0.mlp.experts"
SECONDS = 60  # a rank that waits longer has lost another


def make_checkpoint(n_inter: int) -> dict[str, Array]:
    rng = np.random.default_rng(n_inter)
    shapes = {"gate": (n_inter, H), "up": (n_inter, H), "down": (H, n_inter)}
    return {
        f"{PREFIX}.{expert}.{name}_proj.weight": rng.standard_normal(shape, np.float32) / 4
        for expert in range(E)
        for name, shape in shapes.items()
    }


class Tokens(NamedTuple):
    x: Array
    weights: Array
    ids: Array


def make_tokens(n_hidden: int) -> Tokens:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(M)])
    x = rng.standard_normal((M, n_hidden), np.float32)
    return Tokens(x, rng.random((M, K), np.float32), ids)


def make_quantised_checkpoint(n_inter: int, n_hidden: int) -> dict[str, Array]:
    """The same in float8 with a scale for each block of 128x128, as DeepSeek publishes it."""
    rng = np.random.default_rng(n_inter)
    shapes = {"gate": (n_inter, n_hidden), "up": (n_inter, n_hidden), "down": (n_hidden, n_inter)}
    result = {}
    for (name, shape), expert in itertools.product(shapes.items(), range(E)):
        weight = rng.standard_normal((1, *shape), np.float32) / 8
        stored, scale = quantise(weight, "fp8_block", block=BLOCK)
        result[f"{PREFIX}.{expert}.{name}_proj.weight"] = stored[0]
        result[f"{PREFIX}.{expert}.{name}_proj.weight_scale_inv"] = scale[0]
    return result


BLOCK = (128, 128)
CHECKPOINTS = {n_inter: make_checkpoint(n_inter) for n_inter in (5, 50, 96)}
QUANTISED = make_quantised_checkpoint(320, 128)
TOKENS, WIDE_TOKENS = make_tokens(H), make_tokens(128)


def options_of(experts: moepad.Experts) -> dict[str, Any]:
    """What the specification must be told to compute what one rank's experts do."""
    plan = experts.plan
    options = {"n_inter": plan.n_inter, "expert_map": experts._expert_map}
    if plan.quant != "none":
        options |= {"quant": plan.quant, "block": plan.block, "scale_phase": plan.scale_phase}
        options |= {"w13_scale": experts.w13_scale, "w2_scale": experts.w2_scale}
    return options


def whole_layer(n_inter: int) -> NDArray[np.float64]:
    plan = moepad.plan(H, n_inter, E, dtype="f32")
    experts = moepad.load_experts(CHECKPOINTS[n_inter], PREFIX, plan, progress=False)
    arrays = (TOKENS.x, experts.w13, experts.w2, TOKENS.weights, TOKENS.ids)
    return reference.fused_moe(*arrays)


def check_sum(experts: moepad.Experts, tokens: Tokens, right: NDArray[np.float64]) -> None:
    """The all-reduced sum is one on all ranks, and as right as rounding lets it be."""
    part = torch.from_numpy(experts(tokens.x, tokens.weights, tokens.ids))
    arrays = (tokens.x, experts.w13, experts.w2, tokens.weights, tokens.ids)
    naive = reference.naive(*arrays, **options_of(experts))
    total, naive_total = part.clone(), torch.from_numpy(naive).clone()
    for tensor in (total, naive_total):
        dist.all_reduce(tensor)
    check_close(total.numpy(), right, naive_total.numpy())
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, total.numpy().tobytes())
    assert len(set(everyones)) == 1


# --- What the ranks do ---------------------------------------------------------------------------


def split_columns(rank: int, world: int) -> None:
    """Every rule, sizes that divide and that do not, aligned and not; ranks without a column."""
    n_empty = 0
    for n_inter, split, align in itertools.product(
        CHECKPOINTS, ("true", "padded", "block"), (1, 16, 64)
    ):
        plan = moepad.plan(
            *(H, n_inter, E), dtype="f32", tp_size=world, tp_rank=rank, split=split, align=align
        )
        experts = moepad.load_experts(CHECKPOINTS[n_inter], PREFIX, plan, progress=False)
        check_sum(experts, TOKENS, whole_layer(n_inter))
        n_empty += plan.n_inter == 0
    counts = torch.tensor([n_empty])
    dist.all_reduce(counts)
    assert counts > 0


def split_scale_blocks(rank: int, world: int) -> None:
    """Scales of blocks that ranks share, or do not."""
    options: dict[str, Any] = {"quant": "fp8_block", "dtype": "f32", "block": BLOCK}
    load = functools.partial(moepad.load_experts, QUANTISED, PREFIX, progress=False)
    whole = load(moepad.plan(128, 320, E, **options))
    tokens = WIDE_TOKENS
    arrays = (tokens.x, whole.w13, whole.w2, tokens.weights, tokens.ids)
    right = reference.fused_moe(*arrays, **options_of(whole))
    is_shared = False
    for split, align in (("true", 1), ("true", 64), ("block", 1), ("padded", 128)):
        rules = {"tp_size": world, "tp_rank": rank, "split": split, "align": align}
        experts = load(moepad.plan(128, 320, E, **options, **rules))
        check_sum(experts, tokens, right)
        is_shared |= experts.plan.scale_phase > 0
    phases = torch.tensor([int(is_shared)])
    dist.all_reduce(phases)
    assert phases > 0


def split_experts(rank: int, world: int) -> None:
    """Experts over all ranks, or over some, each group of which splits columns; ids are global."""
    for ep_size in {world, world // 2, 2} - {0, 1}:
        tp_size = world // ep_size
        plan = moepad.plan(
            *(H, 50, E),
            dtype="f32",
            tp_size=tp_size,
            tp_rank=rank % tp_size,
            ep_size=ep_size,
            ep_rank=rank // tp_size,
            align=16,
        )
        experts = moepad.load_experts(CHECKPOINTS[50], PREFIX, plan, progress=False)
        check_sum(experts, TOKENS, whole_layer(50))


def swap_experts(rank: int, world: int) -> None:
    """Load balancing moves experts between ranks: values in place, ids renamed, addresses kept."""
    plan = moepad.plan(
        H, 50, E, dtype="f32", ep_size=min(world, E), ep_rank=min(rank, E - 1), align=16
    )
    experts = moepad.load_experts(CHECKPOINTS[50], PREFIX, plan, progress=False)
    addresses = (experts.w13.ctypes.data, experts.w2.ctypes.data)
    is_idle = rank >= E  # has a copy of the last rank's expert, and no part in the sum
    at = np.arange(E)  # the checkpoint's expert at each place
    for placement in ([3, 0, 5, 1, 4, 2], [2, 3, 4, 5, 0, 1], list(range(E))):
        held: list[Any] = [None] * world
        dist.all_gather_object(held, {} if is_idle else experts.state_dict())
        everything = {name: array for part in held for name, array in part.items()}
        experts.update(renamed(everything, placement), progress=False)
        assert (experts.w13.ctypes.data, experts.w2.ctypes.data) == addresses
        at = at[placement]
        ids = np.argsort(at)[TOKENS.ids]
        check_sum(experts, TOKENS._replace(ids=np.where(is_idle, -1, ids)), whole_layer(50))


def renamed(tensors: dict[str, Array], placement: list[int]) -> dict[str, Array]:
    """Names such that place i holds what place placement[i] held."""
    result = {}
    for name in tensors:
        head, expert, *tail = name.rsplit(".", 3)
        result[name] = tensors[".".join((head, str(placement[int(expert)]), *tail))]
    return result


# --- Processes -----------------------------------------------------------------------------------


def run_rank(
    function: Callable[[int, int], None], rank: int, world: int, store: str, failures: Any
) -> None:
    torch.set_num_threads(1)  # the parent's threads of libgomp are not here
    moepad.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
        function(rank, world)
        dist.destroy_process_group()
    except BaseException:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Runs a function on each of `world` ranks, and fails with the first error of any."""
    context = multiprocessing.get_context("fork")
    started: list[Any] = []

    def run(function: Callable[[int, int], None], world: int) -> None:
        failures = context.Queue()
        store = str(tmp_path / f"store{len(started)}")
        ranks = [
            context.Process(target=run_rank, args=(function, rank, world, store, failures))
            for rank in range(world)
        ]
        started.extend(ranks)
        with warnings.catch_warnings():
            # Python 3.12 warns of forking with threads; that our pool survives it is a promise.
            warnings.simplefilter("ignore", DeprecationWarning)
            for process in ranks:
                process.start()
        for process in ranks:
            process.join(SECONDS)
        codes = [process.exitcode for process in ranks]
        if any(codes):
            pytest.fail(failures.get(timeout=5) if set(codes) != {None} else "no rank ended")
        assert codes == [0] * world

    yield run
    for process in started:
        process.kill()


RUNS = [split_columns, split_scale_blocks, split_experts, swap_experts]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("function", RUNS)
def test_ranks(function: Callable[[int, int], None], world: int, launch: Any) -> None:
    launch(function, world)


def test_a_failing_rank_is_seen(launch: Any) -> None:
    def fail(rank: int, world: int) -> None:
        assert rank != 1, "on purpose"

    with pytest.raises(pytest.fail.Exception, match="on purpose"):
        launch(fail, 2)
