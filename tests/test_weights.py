"""Loading, updating and saving expert weights: every layout, source and kind of fault.

All elements of a checkpoint are different, so that one in the wrong place shows; comparison is by
bits.
"""

from __future__ import annotations

import json
import resource
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import moepad
import numpy as np
import pytest
from checkpoints import (
    PREFIX,
    UNGATED,
    WRITERS,
    Layer,
    Tensors,
    make_checkpoint,
    make_layer,
    swapped,
    write_folder,
)
from conftest import in_child, require
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepad import CheckpointError, _core, reference
from moepad.checkpoint import open_source
from moepad.layouts import LAYOUTS, expert_prefixes
from moepad.testing import check_bits
from moepad.verify import poison_pads, sum_error
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Array = NDArray[Any]

SMALL = {"n_hidden": 6, "n_inter": 10, "n_expert": 4}


def expected_tensors(layer: Layer, plan: moepad.Plan) -> Tensors:
    """The canonical tensors by definition: real columns to the front of each half, zero pads."""
    columns, experts = slice(plan.start, plan.stop), slice(plan.expert_start, plan.expert_stop)

    def half(values: Array) -> Array:
        widths = [(0, 0)] * values.ndim
        widths[1] = (0, plan.n_inter_pad - plan.n_inter)
        bits = values.view(f"u{values.itemsize}")[experts, columns]
        return np.pad(bits, widths).view(values.dtype)

    def halves(gate: Array | None, up: Array) -> Array:
        return half(up) if gate is None else np.concatenate([half(gate), half(up)], axis=1)

    tensors = {
        "w13": halves(layer.gate, layer.up),
        "w2": swapped(half(swapped(layer.down))),
    }
    if layer.up_bias is not None and layer.down_bias is not None:
        tensors["w13_bias"] = halves(layer.gate_bias, layer.up_bias)
        tensors["w2_bias"] = layer.down_bias[experts]
        if plan.tp_rank:
            tensors["w2_bias"] = np.zeros_like(tensors["w2_bias"])
    return tensors


def check_experts(experts: moepad.Experts, layer: Layer) -> None:
    assert all(address % 4096 == 0 for address in addresses(experts).values())
    expected = expected_tensors(layer, experts.plan)
    for name in ("w13", "w2", "w13_bias", "w2_bias"):
        if name not in expected:
            assert getattr(experts, name) is None
        else:
            check_bits(getattr(experts, name), expected[name])


def check_same(actual: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert sorted(actual) == sorted(expected)
    for name in expected:
        check_bits(np.atleast_2d(actual[name]), np.atleast_2d(expected[name]))


def bits_of(experts: moepad.Experts) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in experts._tensors.items()}


def addresses(experts: moepad.Experts) -> dict[str, int]:
    return {name: tensor.ctypes.data for name, tensor in experts._tensors.items()}


# --- Layouts and ranks ---------------------------------------------------------------------------


def test_every_layout_has_a_writer() -> None:
    assert sorted(WRITERS) == sorted(layout.name for layout in LAYOUTS)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", WRITERS)
def test_layouts(name: str, bias: bool, dtype: str) -> None:
    """Every layout gives the same tensors on every rank, and its own tensors back."""
    sizes = {**SMALL, "bias": bias, "dtype": dtype}
    gated = name not in UNGATED
    layer, tensors = make_layer(gated=gated, **sizes), make_checkpoint(name, **sizes)
    for tp_size, ep_size, align in ((1, 1, 1), (3, 1, 4), (4, 3, 8), (12, 2, 1)):
        for rank in range(tp_size * ep_size):
            plan = moepad.plan(
                **sizes, gated=gated, tp_size=tp_size, tp_rank=rank % tp_size,
                ep_size=ep_size, ep_rank=rank // tp_size, align=align,
            )  # fmt: skip
            experts = moepad.load_experts(tensors, PREFIX, plan, layout=name)
            check_experts(experts, layer)
            if tp_size * ep_size == 1:
                check_same(experts.state_dict(), tensors)


# Names and shapes do not show whether halves are interleaved. What is taken without layout= is what
# the known families store: transposed with biases is gpt-oss, everything else is concatenated.
RECOGNISED = {
    ("fused", True): None,
    ("fused_transposed", True): "gpt_oss",
    ("gpt_oss", False): "fused_transposed",
    ("fused_interleaved", False): "fused",
    ("fused_interleaved", True): None,
}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", WRITERS)
def test_recognition(name: str, bias: bool) -> None:
    tensors = make_checkpoint(name, **SMALL, bias=bias)
    plan = moepad.plan(**SMALL, gated=name not in UNGATED, bias=bias)
    expected = RECOGNISED.get((name, bias), name)
    if expected is None:
        with pytest.raises(CheckpointError, match="pass layout="):
            moepad.load_experts(tensors, PREFIX, plan)
    else:
        assert moepad.load_experts(tensors, PREFIX, plan).layout == expected


def test_ambiguous_square() -> None:
    """H = I without a gate: both orders have the same shapes, so neither is guessed."""
    sizes = {"n_hidden": 8, "n_inter": 8, "n_expert": 3}
    plan = moepad.plan(**sizes, gated=False)
    for name in ("fused_ungated", "fused_ungated_transposed"):
        tensors = make_checkpoint(name, **sizes)
        with pytest.raises(CheckpointError) as caught:
            moepad.load_experts(tensors, PREFIX, plan)
        for word in ("(3, 8, 8)", "'fused_ungated'", "'fused_ungated_transposed'", "layout="):
            assert word in str(caught.value)
        experts = moepad.load_experts(tensors, PREFIX, plan, layout=name)
        check_experts(experts, make_layer(**sizes, gated=False))


@pytest.mark.parametrize("name", ["fused", "fused_transposed"])
def test_square_gate_up(name: str) -> None:
    """H = 2I: gate_up_proj is square either way, down_proj is not and decides."""
    sizes = {"n_hidden": 8, "n_inter": 4, "n_expert": 3}
    experts = moepad.load_experts(make_checkpoint(name, **sizes), PREFIX, moepad.plan(**sizes))
    check_experts(experts, make_layer(**sizes))


@pytest.mark.parametrize(
    ("model_type", "name", "bias"),
    [("gpt_oss", "gpt_oss", False), ("llama4", "fused_transposed", True)],
)
def test_config_decides(tmp_path: Path, model_type: str, name: str, bias: bool) -> None:
    """What names and shapes would take for another layout, config.json sets right."""
    save_file(make_checkpoint(name, **SMALL, bias=bias), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    experts = moepad.load_experts(tmp_path, PREFIX, moepad.plan(**SMALL, bias=bias))
    check_experts(experts, make_layer(**SMALL, bias=bias))


@pytest.mark.parametrize(
    "prefix", [PREFIX, PREFIX + ".", "model.layers.1.mlp", "model.layers.1.mlp."]
)
def test_prefixes(prefix: str) -> None:
    layer = make_layer(**SMALL)
    around = {
        f"model.layers.1.mlp.{name}.weight": np.zeros((2, 2), np.float32)
        for name in ("gate", "shared_experts.gate_proj", "shared_experts.0.gate_proj")
    }
    other_layer = make_checkpoint("gate_up_down", "model.layers.11.mlp.experts", **SMALL, seed=999)
    tensors = {**around, **other_layer, **make_checkpoint("gate_up_down", **SMALL)}
    check_experts(moepad.load_experts(tensors, prefix, moepad.plan(**SMALL)), layer)


def test_empty_prefix() -> None:
    """The state_dict of an experts module by itself."""
    tensors = WRITERS["fused"](make_layer(**SMALL))
    experts = moepad.load_experts(tensors, "", moepad.plan(**SMALL))
    check_experts(experts, make_layer(**SMALL))
    check_same(experts.state_dict(), tensors)


def test_shared_experts_never_match() -> None:
    tensors = make_checkpoint("gate_up_down", "model.layers.1.mlp.shared_experts", **SMALL)
    assert expert_prefixes(open_source(tensors)) == []
    with pytest.raises(CheckpointError, match="no expert weights under"):
        moepad.load_experts(tensors, "model.layers.1.mlp", moepad.plan(**SMALL))


def test_expert_prefixes() -> None:
    layers = (10, 9, 2)
    tensors: Tensors = {"model.layers.3.mlp.gate_proj.weight": np.zeros((2, 2), np.float32)}
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        tensors |= make_checkpoint("gate_up_down", prefix, **SMALL)
    expected = [f"model.layers.{layer}.mlp.experts" for layer in sorted(layers)]
    assert expert_prefixes(open_source(tensors)) == expected


# --- Sources -------------------------------------------------------------------------------------


class Lazy(Mapping[str, Any]):
    """Makes its values on access, counts accesses, and can be told to fail."""

    def __init__(self, tensors: Tensors, fail_at: int | None = None) -> None:
        self.tensors, self.fail_at = tensors, fail_at
        self.second: Tensors = {}  # other values from the second time on
        self.asked: list[str] = []
        self.made: list[weakref.ref[Array]] = []
        self.n_alive = 0  # at most, when another one was asked for

    def __getitem__(self, name: str) -> Array:
        if len(self.asked) == self.fail_at:
            raise OSError("the network is down")
        values = self.second.get(name) if name in self.asked else None
        values = (self.tensors[name] if values is None else values).copy()
        self.n_alive = max(self.n_alive, sum(made() is not None for made in self.made))
        self.asked.append(name)
        self.made.append(weakref.ref(values))
        return values

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Views(Lazy):
    """Gives its values without a copy."""

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name]


def as_torch(tensors: Tensors) -> dict[str, Any]:
    torch = require("torch")
    return {
        name: torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        for name, values in tensors.items()
    }


def as_parameters(tensors: Tensors) -> dict[str, Any]:
    torch = require("torch")
    return {name: torch.nn.Parameter(value) for name, value in as_torch(tensors).items()}


SOURCES: dict[str, Callable[[Path, Tensors], Any]] = {
    "indexed folder": lambda folder, tensors: write_folder(folder, tensors),
    "folder": lambda folder, tensors: write_folder(folder, tensors, index=False),
    "path as str": lambda folder, tensors: str(write_folder(folder, tensors)),
    "file": lambda folder, tensors: next(write_folder(folder, tensors, 1).glob("*.safetensors")),
    "opened": lambda folder, tensors: open_source(write_folder(folder, tensors)),
    "dict": lambda folder, tensors: dict(tensors),
    "lazy mapping": lambda folder, tensors: Lazy(tensors),
    "torch": lambda folder, tensors: as_torch(tensors),
    "torch parameters": lambda folder, tensors: as_parameters(tensors),
    "strided": lambda folder, tensors: {
        name: np.repeat(np.repeat(values, 2, -1), 3, -2)[..., ::3, ::2]
        for name, values in tensors.items()
    },
}


@pytest.mark.parametrize("name", ["gate_up_down", "gpt_oss"])
@pytest.mark.parametrize("kind", SOURCES)
def test_sources(tmp_path: Path, kind: str, name: str) -> None:
    """Each kind of source, for loading and for updating."""
    sizes = {**SMALL, "bias": name == "gpt_oss"}
    plan = moepad.plan(**sizes, tp_size=3, tp_rank=1, align=4)
    tensors = make_checkpoint(name, **sizes)
    experts = moepad.load_experts(SOURCES[kind](tmp_path / "a", tensors), PREFIX, plan)
    check_experts(experts, make_layer(**sizes))
    before = addresses(experts)
    experts.update(SOURCES[kind](tmp_path / "b", make_checkpoint(name, **sizes, seed=7)))
    check_experts(experts, make_layer(**sizes, seed=7))
    assert addresses(experts) == before


def test_mapping_values_are_let_go() -> None:
    """What a mapping makes on access is held one tensor at a time."""
    source = Lazy(make_checkpoint("gate_up_down", **SMALL))
    experts = moepad.load_experts(source, PREFIX, moepad.plan(**SMALL))
    experts.update(source)
    assert len(source.asked) == 4 * 12 and source.n_alive <= 1


def test_only_own_experts_are_read() -> None:
    source = Lazy(make_checkpoint("gate_up_down", **SMALL))
    plan = moepad.plan(**SMALL, ep_size=4, ep_rank=2)
    moepad.load_experts(source, PREFIX, plan)
    assert {name.removeprefix(PREFIX).split(".")[1] for name in source.asked} == {"2"}


def test_partial_download(tmp_path: Path) -> None:
    """Files that hold none of the tensors asked for may be missing from an indexed folder."""
    folder = write_folder(tmp_path / "c", make_checkpoint("gate_up_down", **SMALL), 12)
    for path in folder.glob("*.safetensors"):
        if not names_in(path)[0].startswith(f"{PREFIX}.0."):
            path.unlink()
    plan = moepad.plan(**SMALL, ep_size=4, ep_rank=0)
    check_experts(moepad.load_experts(folder, PREFIX, plan), make_layer(**SMALL))
    with pytest.raises(CheckpointError, match=r"model-0000\d-of-00012.* does not exist"):
        moepad.load_experts(folder, PREFIX, moepad.plan(**SMALL, ep_size=4, ep_rank=1))


# --- Saving --------------------------------------------------------------------------------------


class Ranks(NamedTuple):
    """How a layer is shared out."""

    tp_size: int
    ep_size: int
    split: str
    align: int

    def plans(self, **sizes: Any) -> list[moepad.Plan]:
        return [
            moepad.plan(**sizes, **self._asdict(), tp_rank=tp_rank, ep_rank=ep_rank)
            for ep_rank in range(self.ep_size)
            for tp_rank in range(self.tp_size)
        ]


ranks = st.builds(
    Ranks,
    tp_size=st.integers(1, 6),
    ep_size=st.integers(1, 4),
    split=st.sampled_from(["true", "padded", "block"]),
    align=st.integers(1, 5),
)
layer_sizes = st.fixed_dictionaries(
    {
        "n_hidden": st.integers(1, 7),
        "n_inter": st.integers(1, 12),
        "n_expert": st.integers(1, 5),
        "bias": st.booleans(),
        "dtype": st.sampled_from(["bf16", "f16", "f32"]),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(WRITERS)), sizes=layer_sizes, saved=ranks, loaded=ranks)
def test_save_and_load_at_other_sizes(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    sizes: dict[str, Any],
    saved: Ranks,
    loaded: Ranks,
) -> None:
    """The files of all ranks are the checkpoint, whatever shares wrote and whatever reads them."""
    folder = tmp_path_factory.mktemp("saved")
    gated = name not in UNGATED
    layer, tensors = make_layer(gated=gated, **sizes), make_checkpoint(name, **sizes)
    n_element = 0
    for plan in saved.plans(gated=gated, **sizes):
        experts = moepad.load_experts(tensors, PREFIX, plan, layout=name)
        n_element += sum(part.size for part in load_file(experts.save(folder)).values())
    assert n_element == sum(tensor.size for tensor in tensors.values())
    for plan in loaded.plans(gated=gated, **sizes):
        check_experts(moepad.load_experts(folder, PREFIX, plan), layer)
    whole = moepad.load_experts(folder, PREFIX, moepad.plan(**sizes, gated=gated))
    check_same(whole.state_dict(), tensors)


def test_save_whole_is_the_checkpoint(tmp_path: Path) -> None:
    tensors = make_checkpoint("gate_up_down", **SMALL)
    experts = moepad.load_experts(tensors, PREFIX, moepad.plan(**SMALL))
    path = experts.save(tmp_path / "whole.safetensors")
    assert path == tmp_path / "whole.safetensors"
    check_same(load_file(path), tensors)


def test_pads_are_not_saved() -> None:
    tensors = make_checkpoint("gpt_oss", **SMALL, bias=True)
    plan = moepad.plan(**SMALL, bias=True, align=16)
    experts = moepad.load_experts(tensors, PREFIX, plan)
    poison_pads(experts)
    check_same(experts.state_dict(), tensors)


def test_save_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = moepad.load_experts(
        make_checkpoint("gate_up_down", **SMALL), PREFIX, moepad.plan(**SMALL)
    )
    path = experts.save(tmp_path)
    before = path.read_bytes()

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        experts.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def saved_ranks(folder: Path, n_tp: int, n_ep: int = 1) -> list[Path]:
    folder.mkdir(exist_ok=True)
    tensors = make_checkpoint("gate_up_down", **SMALL)
    return [
        moepad.load_experts(tensors, PREFIX, plan).save(folder)
        for plan in Ranks(n_tp, n_ep, "true", 1).plans(**SMALL)
    ]


def test_own_file_is_enough(tmp_path: Path) -> None:
    """A rank that loads what it saved needs no other rank's file."""
    paths = saved_ranks(tmp_path, 2, 2)
    for path, plan in zip(paths, Ranks(2, 2, "true", 4).plans(**SMALL), strict=True):
        check_experts(moepad.load_experts(path, PREFIX, plan), make_layer(**SMALL))


# --- Faults --------------------------------------------------------------------------------------


def rejected(source: Any, *words: str) -> None:
    """Loading is refused with all of `words`, and so is an update, which changes nothing."""
    plan = moepad.plan(**SMALL)
    experts = moepad.load_experts(make_checkpoint("gate_up_down", **SMALL, seed=50), PREFIX, plan)
    before = bits_of(experts)
    for act in (
        lambda: moepad.load_experts(source, PREFIX, plan),
        lambda: experts.update(source),
    ):
        with pytest.raises(CheckpointError) as caught:
            act()
        for word in words:
            assert word in str(caught.value), caught.value
    assert bits_of(experts) == before


UP = f"{PREFIX}.2.up_proj.weight"


@pytest.mark.parametrize("kind", ["indexed folder", "folder", "dict", "lazy mapping"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(UP), [UP, "missing", "(1 of 12", "(10, 6)"]),
        (
            lambda t: [t.pop(name) for name in list(t) if ".3." in name],
            [f"{PREFIX}.3.gate_proj.weight", "missing", "(3 of 12", "n_expert"],
        ),
        (
            lambda t: t.update({UP.replace(".2.", ".4."): t[UP]}),
            [".4.up_proj.weight", "expected experts 0 to 3", "got expert 4", "n_expert"],
        ),
        (
            lambda t: t.update({UP: t[UP].T.copy()}),
            [UP, "expected shape (10, 6)", "got (6, 10)"],
        ),
        (
            lambda t: t.update({UP: t[UP][:9].copy()}),
            [UP, "expected shape (10, 6)", "got (9, 6)"],
        ),
        (
            lambda t: t.update({UP: t[UP].view(np.float16)}),
            [UP, "expected dtype bf16", "got f16"],
        ),
        (
            lambda t: t.update({UP: t[UP].astype(np.int16)}),
            [UP, "expected dtype bf16", "got i"],
        ),
        (
            lambda t: t.update({f"{PREFIX}.2.w3.weight": t[UP]}),
            ["stored twice", f"{PREFIX}.2.w3.weight", "gate_proj"],
        ),
        (
            lambda t: t.update(make_checkpoint("fused", **SMALL)),
            ["stored twice", f"{PREFIX}.gate_up_proj"],
        ),
        (
            lambda t: t.update({f"{PREFIX}.1.up_proj.bias": t[UP][:, 0].copy()}),
            [f"{PREFIX}.1.up_proj.bias", "expected no biases", "bias=True"],
        ),
        (
            lambda t: t.update({f"{PREFIX}.1.up_proj.weight_scale_inv": np.ones((1, 1))}),
            [f"{PREFIX}.1.up_proj.weight_scale_inv", "not a tensor of layout", "quantised"],
        ),
        (lambda t: t.clear() or t.update(x=np.ones(1)), ["no expert weights under"]),
    ],
    ids=[
        "hole", "missing expert", "extra expert", "transposed", "short", "f16", "i16",
        "two schemes", "fused too", "bias", "scale", "nothing",
    ],
)  # fmt: skip
def test_wrong_tensors(
    tmp_path: Path, kind: str, change: Callable[[Tensors], object], words: list[str]
) -> None:
    tensors = make_checkpoint("gate_up_down", **SMALL)
    change(tensors)
    source = SOURCES[kind](tmp_path / "c", tensors)
    is_folder = "folder" in kind
    place = str(tmp_path / "c") if is_folder else "the mapping"
    rejected(source, *words, place)


@pytest.mark.parametrize(
    ("name", "plan", "words"),
    [
        ("gate_up_down", {"gated": False}, ["gate_proj", "gated=True"]),
        ("up_down", {}, ["gate_proj.weight: missing", "gated"]),
        ("fused_ungated", {}, ["experts.up_proj", "gated=False"]),
        ("gate_up_down", {"bias": True}, ["0.gate_proj.bias", "missing", "bias"]),
        ("fused", {"n_expert": 5}, ["gate_up_proj (4, 20, 6)", "(5, 20, 6)", "layout="]),
        ("granite", {"n_expert": 5}, ["input_linear.weight", "(5, 20, 6)", "got (4, 20, 6)"]),
        ("granite", {"n_inter": 5}, ["input_linear.weight", "(4, 10, 6)", "got (4, 20, 6)"]),
        ("gpt_oss", {"n_hidden": 5}, ["gate_up_proj", "(4, 6, 20)", "(4, 5, 20)"]),
        ("w1_w3_w2", {"dtype": "f32"}, ["0.w1.weight", "expected dtype f32", "got bf16"]),
    ],
)
def test_wrong_plan(name: str, plan: dict[str, Any], words: list[str]) -> None:
    tensors = make_checkpoint(name, **SMALL, bias=name == "gpt_oss")
    request = {**SMALL, "bias": name == "gpt_oss", **plan}
    with pytest.raises(CheckpointError) as caught:
        moepad.load_experts(tensors, PREFIX, moepad.plan(**request))
    for word in words:
        assert word in str(caught.value), caught.value


def test_stored_twice_in_files(tmp_path: Path) -> None:
    tensors = make_checkpoint("gate_up_down", **SMALL)
    for index in (False, True):
        folder = write_folder(tmp_path / str(index), tensors, index=index)
        there = next(p for p in folder.glob("*.safetensors") if UP not in load_file(p))
        save_file({**load_file(there), UP: tensors[UP]}, there)
        rejected(
            folder, UP, "stored twice", *(p.name for p in folder.glob("*") if UP in names_in(p))
        )


def names_in(path: Path) -> list[str]:
    return list(load_file(path)) if path.suffix == ".safetensors" else []


def test_saved_ranks_wrong(tmp_path: Path) -> None:
    paths = saved_ranks(tmp_path, 2)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(paths[1].read_bytes())
    rejected(tmp_path, "stored twice", "[5, 10)", "copy.safetensors", paths[1].name)
    copy.unlink()
    paths[1].unlink()
    rejected(tmp_path, "expected columns [0, 10)", "[0, 5)", paths[0].name, "other ranks")
    whole = make_checkpoint("gate_up_down", **SMALL)
    save_file(whole, tmp_path / "whole.safetensors")
    rejected(tmp_path, "stored twice", "whole.safetensors", paths[0].name)


@pytest.mark.parametrize(
    "entry", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "layout": 3}', '{"version": 2}']
)
def test_saved_metadata_wrong(tmp_path: Path, entry: str) -> None:
    tensors = make_checkpoint("gate_up_down", **SMALL)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"moepad": entry})
    rejected(tmp_path, str(tmp_path / "x.safetensors"), "metadata entry 'moepad'")


def test_saved_metadata_of_other_kinds(tmp_path: Path) -> None:
    """Numbers in place of others: refused by shape or cover, never taken."""
    path = saved_ranks(tmp_path, 1)[0]
    tensors = load_file(path)
    good = {
        "version": 1, "layout": "gate_up_down", "tp_size": 1, "tp_rank": 0, "ep_size": 1,
        "ep_rank": 0, "start": 0, "stop": 10, "expert_start": 0, "expert_stop": 4,
    }  # fmt: skip
    for change in (
        {"start": -1}, {"start": 10, "stop": 0}, {"stop": "10"}, {"stop": None}, {"stop": True},
        {"layout": 3}, {"expert_stop": -1}, {"surplus": 1},
    ):  # fmt: skip
        save_file(tensors, path, metadata={"moepad": json.dumps({**good, **change})})
        rejected(tmp_path, "metadata entry 'moepad' is unreadable", str(path))
    for change in ({"stop": 11}, {"start": 1}, {"start": 1, "stop": 11}):
        save_file(tensors, path, metadata={"moepad": json.dumps({**good, **change})})
        rejected(tmp_path, PREFIX, str(path))
    save_file(tensors, path, metadata={"moepad": json.dumps(good)})
    check_experts(moepad.load_experts(tmp_path, PREFIX, moepad.plan(**SMALL)), make_layer(**SMALL))


def test_no_source(tmp_path: Path) -> None:
    rejected(tmp_path / "nowhere", "nowhere", "does not exist")
    rejected(tmp_path, str(tmp_path), "safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    rejected(tmp_path, "converted")
    with pytest.raises(TypeError, match=r"source: expected a path or a mapping .* got int"):
        moepad.load_experts(3, PREFIX, moepad.plan(**SMALL))  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 4, 8, 60, 700, -1])
@pytest.mark.parametrize("index", [False, True])
def test_truncated(tmp_path: Path, length: int, index: bool) -> None:
    folder = write_folder(tmp_path / "c", make_checkpoint("gate_up_down", **SMALL), index=index)
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    rejected(folder, str(path), "truncated or corrupt")
    rejected(path, str(path), "truncated or corrupt")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "3", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\x00\xff", '{"weight'],
)
def test_corrupt_index(tmp_path: Path, content: str) -> None:
    folder = write_folder(tmp_path / "c", make_checkpoint("gate_up_down", **SMALL))
    path = folder / "model.safetensors.index.json"
    path.write_text(content, encoding="latin-1")
    rejected(folder, str(path), "weight_map")


def test_index_and_files_disagree(tmp_path: Path) -> None:
    tensors = make_checkpoint("gate_up_down", **SMALL)
    folder = write_folder(tmp_path / "c", tensors)
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    others = {name for name in weight_map.values() if name != weight_map[UP]}
    path.write_text(json.dumps({"weight_map": {**weight_map, UP: others.pop()}}))
    rejected(folder, UP, "says it is")
    path.write_text(json.dumps({"weight_map": {**weight_map, UP: "../elsewhere.safetensors"}}))
    rejected(folder, UP, "../elsewhere.safetensors", "does not exist")


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    place=st.sampled_from(["header", "data", "index"]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 40),
)
def test_fuzz_files(
    tmp_path_factory: pytest.TempPathFactory,
    place: str,
    edits: list[tuple[int, int]],
    cut: int,
) -> None:
    """Whatever bytes a folder holds, it is loaded or refused with CheckpointError."""
    folder = tmp_path_factory.mktemp("fuzz") / "c"
    write_folder(folder, make_checkpoint("gate_up_down", n_hidden=2, n_inter=3, n_expert=2), 1)
    path = folder / (
        "model.safetensors.index.json" if place == "index" else "model-00001-of-00001.safetensors"
    )
    content = bytearray(path.read_bytes())
    n_header = 8 + int.from_bytes(content[:8], "little")
    span = n_header if place == "header" else len(content)
    for at, value in edits:
        content[at % span] = value
    path.write_bytes(content[: len(content) - cut % 20 if cut > 20 else len(content)])
    try:
        experts = moepad.load_experts(
            folder, PREFIX, moepad.plan(n_hidden=2, n_inter=3, n_expert=2)
        )
    except CheckpointError:
        return
    assert experts.w13.shape == (2, 6, 2)


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:-1", "cpu:1", "", None, 0])
def test_unknown_devices(device: Any) -> None:
    with pytest.raises(ValueError, match="device: expected 'cpu', 'cuda', 'hip' or 'rocm'"):
        moepad.load_experts({}, PREFIX, moepad.plan(**SMALL), device=device)


def test_wrong_kinds_of_arguments() -> None:
    with pytest.raises(TypeError, match=r"plan: expected a moepad.Plan, got dict"):
        moepad.load_experts({}, PREFIX, SMALL)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"prefix: expected a str, got int"):
        moepad.load_experts({}, 3, moepad.plan(**SMALL))  # type: ignore[arg-type]


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """A bar where it is asked for; by default none, as standard error is no terminal here."""
    tensors, plan = make_checkpoint("gate_up_down", **SMALL), moepad.plan(**SMALL)
    moepad.load_experts(tensors, PREFIX, plan)
    assert capsys.readouterr().err == ""
    moepad.load_experts(tensors, PREFIX, plan, progress=True)
    assert PREFIX in capsys.readouterr().err


def test_wrong_layout_argument() -> None:
    tensors = make_checkpoint("gate_up_down", **SMALL)
    with pytest.raises(ValueError, match=r"layout: expected one of gate_up_down, .* got 'qwen'"):
        moepad.load_experts(tensors, PREFIX, moepad.plan(**SMALL), layout="qwen")
    with pytest.raises(ValueError, match=r"layout: 'up_down' is for experts with gated=False"):
        moepad.load_experts(tensors, PREFIX, moepad.plan(**SMALL), layout="up_down")


@pytest.mark.parametrize(
    "value", [[[1.0]], "text", object(), None], ids=["list", "text", "object", "none"]
)
def test_values_that_are_no_tensors(value: object) -> None:
    tensors = make_checkpoint("gate_up_down", **SMALL)
    rejected({**tensors, UP: value}, UP)


def test_torch_tensors_without_values() -> None:
    torch = require("torch")
    tensors = make_checkpoint("gate_up_down", **SMALL)
    rejected({**tensors, UP: torch.empty(10, 6, dtype=torch.bfloat16, device="meta")}, UP)
    sparse = torch.ones(10, 6, dtype=torch.bfloat16).to_sparse()
    rejected({**tensors, UP: sparse}, UP)


# --- Running -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gate_up_down", "gpt_oss", "up_down"])
@pytest.mark.parametrize("shares", [Ranks(1, 1, "true", 1), Ranks(3, 2, "padded", 8)])
def test_call(name: str, shares: Ranks, rng: np.random.Generator) -> None:
    """Global ids on every rank; the sum over ranks is the layer, each bias in it once."""
    sizes = {"n_hidden": 24, "n_inter": 20, "n_expert": 5, "bias": name == "gpt_oss"}
    gated = name not in UNGATED
    tensors = make_checkpoint(name, **sizes, dtype="f32", is_normal=True)
    x = rng.standard_normal((7, 24)).astype(np.float32)
    ids = rng.integers(-1, 5, (7, 3))
    weights = rng.random((7, 3)).astype(np.float32)
    options = {"activation": "silu" if gated else "relu2", "routed_scaling_factor": 2.5}
    parts, naive = [], []
    for plan in shares.plans(**sizes, gated=gated, dtype="f32"):
        experts = moepad.load_experts(tensors, PREFIX, plan)
        poison_pads(experts)
        parts.append(experts(x, weights, ids, **options))
        held = {"w13_bias": experts.w13_bias, "w2_bias": experts.w2_bias, "n_inter": plan.n_inter}
        if plan.ep_size > 1:
            numbers = np.arange(5) - plan.expert_start
            held["expert_map"] = np.where((numbers >= 0) & (numbers < plan.n_expert), numbers, -1)
        naive.append(reference.naive(x, experts.w13, experts.w2, weights, ids, **held, **options))
    layer = make_layer(**sizes, gated=gated, dtype="f32", is_normal=True)
    whole = expected_tensors(layer, moepad.plan(**sizes, gated=gated, dtype="f32"))
    right = reference.fused_moe(x, topk_weights=weights, topk_ids=ids, **whole, **options)
    error, allowed = sum_error(parts, naive, right)
    assert (error <= allowed).all()
    assert np.abs(right).max() > 0.1


def test_call_passes_options() -> None:
    experts = loaded()
    x, ids = np.ones((2, 6), experts.w13.dtype), np.array([[-1], [-1]])
    out = np.ones_like(x)
    assert experts(x, np.ones((2, 1), np.float32), ids, out=out) is out
    assert not out.any()
    with pytest.raises(TypeError, match="n_inter"):
        experts(x, np.ones((2, 1), np.float32), ids, n_inter=3)
    with pytest.raises(ValueError, match="activation"):
        experts(x, np.ones((2, 1), np.float32), ids, activation="tanh")


# --- Updating ------------------------------------------------------------------------------------


def loaded(**options: Any) -> moepad.Experts:
    plan = moepad.plan(**SMALL, tp_size=2, tp_rank=1, align=4, **options)
    return moepad.load_experts(make_checkpoint("gate_up_down", **SMALL), PREFIX, plan)


def test_update_from_another_layout_and_prefix() -> None:
    experts = loaded()
    before = addresses(experts)
    experts.update(make_checkpoint("fused", "other.experts", **SMALL, seed=9), "other.experts")
    check_experts(experts, make_layer(**SMALL, seed=9))
    assert addresses(experts) == before
    assert set(experts.state_dict()) == set(make_checkpoint("gate_up_down", **SMALL))


def test_update_leaves_pads_alone() -> None:
    experts = loaded()
    poison_pads(experts)
    pad = experts.w2[:, :, experts.plan.n_inter :].tobytes()
    experts.update(make_checkpoint("gate_up_down", **SMALL, seed=9))
    assert experts.w2[:, :, experts.plan.n_inter :].tobytes() == pad


def test_update_when_any_read_fails() -> None:
    """A mapping that fails at its n-th access, for every n: all values stay or all change."""
    new = make_checkpoint("gate_up_down", **SMALL, seed=9)
    complete = Lazy(new)
    loaded().update(complete)
    for n in range(len(complete.asked)):
        experts = loaded()
        before = bits_of(experts)
        with pytest.raises(CheckpointError, match=r"experts\.\d\.[\w.]+: .*OSError: the network"):
            experts.update(Lazy(new, fail_at=n))
        assert bits_of(experts) == before, f"read {n} failed"


def test_update_when_values_change_meanwhile() -> None:
    """A mapping whose second answer is another: of another shape, of another type."""
    new = make_checkpoint("gate_up_down", **SMALL, seed=9)
    for other in (new[UP][:5], new[UP].view(np.float16)):
        experts = loaded()
        before = bits_of(experts)
        source = Lazy(new)
        source.second = {UP: other}
        with pytest.raises(
            CheckpointError, match=rf"{UP}.*: was bf16 \(10, 6\) when it was checked"
        ):
            experts.update(source)
        assert bits_of(experts) == before


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_update_when_a_file_shrinks_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """A file cut after it was checked is noticed before it is read: no signal, nothing changed."""
    new = make_checkpoint("gate_up_down", n_hidden=64, n_inter=64, n_expert=4, seed=9)
    folder = write_folder(tmp_path / "c", new)
    plan = moepad.plan(n_hidden=64, n_inter=64, n_expert=4)
    old = make_checkpoint("gate_up_down", n_hidden=64, n_inter=64, n_expert=4)
    experts = moepad.load_experts(old, PREFIX, plan)
    before = bits_of(experts)
    n_copy = 0

    def copy(dst: Array, src: Array) -> None:
        nonlocal n_copy
        n_copy += 1
        if n_copy == cut:
            for path in folder.glob("*.safetensors"):
                with open(path, "r+b") as file:
                    file.truncate(9000)
            return
        original(dst, src)

    original = _core.copy
    monkeypatch.setattr(_core, "copy", copy)
    with pytest.raises(CheckpointError, match="was cut to 9000 bytes"):
        experts.update(folder)
    assert bits_of(experts) == before


@pytest.mark.parametrize("kind", ["folder", "dict"])
def test_update_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Ctrl-C at any moment: files are undone, what is in memory already is done whole."""
    new = make_checkpoint("gate_up_down", **SMALL, seed=9)
    source = SOURCES[kind](tmp_path / "c", new)
    original = _core.copy
    for n in range(len(new)):
        experts = loaded()
        before, n_copy = bits_of(experts), 0

        def copy(dst: Array, src: Array, n: int = n) -> None:
            nonlocal n_copy
            n_copy += 1
            original(dst, src)
            if n_copy == n + 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(_core, "copy", copy)
        with pytest.raises(KeyboardInterrupt):
            experts.update(source)
        if kind == "dict":
            check_experts(experts, make_layer(**SMALL, seed=9))
        else:
            assert bits_of(experts) == before


def test_update_when_temporary_file_is_full(tmp_path: Path) -> None:
    """The old values cannot all be kept: those already replaced come back."""
    sizes = {"n_hidden": 64, "n_inter": 64, "n_expert": 4}
    folder = write_folder(tmp_path / "c", make_checkpoint("gate_up_down", **sizes, seed=9))
    experts = moepad.load_experts(
        make_checkpoint("gate_up_down", **sizes), PREFIX, moepad.plan(**sizes)
    )
    before = bits_of(experts)

    def update() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        with pytest.raises(OSError, match="File too large"):
            experts.update(folder)
        assert bits_of(experts) == before

    in_child(update)


def test_update_from_own_tensors() -> None:
    whole = moepad.load_experts(
        make_checkpoint("gate_up_down", **SMALL), PREFIX, moepad.plan(**SMALL)
    )
    reversed_views = {
        f"{PREFIX}.{e}.{name}.weight": view
        for e, w13, w2 in zip(range(4), whole.w13[::-1], whole.w2[::-1], strict=True)
        for name, view in (("gate_proj", w13[:10]), ("up_proj", w13[10:]), ("down_proj", w2))
    }
    with pytest.raises(CheckpointError, match="shares memory"):
        whole.update(reversed_views)
    with pytest.raises(CheckpointError, match="shares memory"):
        whole.update(Views(reversed_views))
    check_experts(whole, make_layer(**SMALL))
