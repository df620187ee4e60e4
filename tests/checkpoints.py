"""Checkpoints of every layout, written from gate, up and down by code unrelated to the loader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[Any]
Tensors = dict[str, Array]

PREFIX = "model.layers.1.mlp.experts"
DTYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}


class Layer(NamedTuple):
    """A layer's logical tensors; gate and its bias are None where it is not gated."""

    gate: Array | None  # [E, I, H]
    up: Array  # [E, I, H]
    down: Array  # [E, H, I]
    gate_bias: Array | None  # [E, I]
    up_bias: Array | None
    down_bias: Array | None  # [E, H]


def make_layer(
    n_hidden: int,
    n_inter: int,
    n_expert: int,
    *,
    gated: bool = True,
    bias: bool = False,
    dtype: str = "bf16",
    seed: int = 0,
    is_normal: bool = False,
) -> Layer:
    """A layer to load, or one to run with `is_normal`.

    To load, elements are consecutive bit patterns from `seed` on: all different (as far as the type
    has so many), NaN and infinities among them. To run, they are normal, results of order 1.
    """
    scalar = np.dtype(DTYPES[dtype])
    rng = np.random.default_rng(seed)
    end = seed

    def values(*shape: int) -> Array:
        nonlocal end
        if is_normal:
            return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(scalar)
        start, end = end, end + int(np.prod(shape))
        return np.arange(start, end).astype(f"u{scalar.itemsize}").view(scalar).reshape(shape)

    matrix, row = (n_expert, n_inter, n_hidden), (n_expert, n_inter)
    return Layer(
        values(*matrix) if gated else None,
        values(*matrix),
        values(n_expert, n_hidden, n_inter),
        values(*row) if gated and bias else None,
        values(*row) if bias else None,
        values(n_expert, n_hidden) if bias else None,
    )


# --- Checkpoints ---------------------------------------------------------------------------------


def per_expert(layer: Layer, gate: str, up: str, down: str) -> Tensors:
    tensors = {}
    for name, weight, bias in (
        (gate, layer.gate, layer.gate_bias),
        (up, layer.up, layer.up_bias),
        (down, layer.down, layer.down_bias),
    ):
        for kind, values in (("weight", weight), ("bias", bias)):
            if values is not None:
                tensors |= {f"{e}.{name}.{kind}": row for e, row in enumerate(values)}
    return tensors


def both_halves(layer: Layer, kind: str) -> Array:
    """Rows of gate and up, [E, 2I, ...]: one after the other or in turn."""
    pairs = [(layer.gate, layer.up), (layer.gate_bias, layer.up_bias)]
    gate, up = pairs[kind.endswith("bias")]
    assert gate is not None and up is not None
    if kind.startswith("concat"):
        return np.concatenate([gate, up], axis=1)
    return np.stack([gate, up], axis=2).reshape(len(up), -1, *up.shape[2:])


def swapped(values: Array) -> Array:
    return np.ascontiguousarray(values.transpose(0, 2, 1))


def fused(layer: Layer, order: str, is_transposed: bool) -> Tensors:
    turn = swapped if is_transposed else np.ascontiguousarray
    tensors = {
        "gate_up_proj": turn(both_halves(layer, order)),
        "down_proj": turn(layer.down),
    }
    if layer.down_bias is not None:
        tensors["gate_up_proj_bias"] = both_halves(layer, f"{order} bias")
        tensors["down_proj_bias"] = layer.down_bias
    return tensors


def fused_ungated(layer: Layer, is_transposed: bool) -> Tensors:
    turn = swapped if is_transposed else np.ascontiguousarray
    tensors = {"up_proj": turn(layer.up), "down_proj": turn(layer.down)}
    if layer.up_bias is not None and layer.down_bias is not None:
        tensors |= {"up_proj_bias": layer.up_bias, "down_proj_bias": layer.down_bias}
    return tensors


def granite(layer: Layer) -> Tensors:
    tensors = {
        "input_linear.weight": both_halves(layer, "concat"),
        "output_linear.weight": layer.down,
    }
    if layer.down_bias is not None:
        tensors["input_linear.bias"] = both_halves(layer, "concat bias")
        tensors["output_linear.bias"] = layer.down_bias
    return tensors


def stacked(layer: Layer) -> Tensors:
    assert layer.gate is not None
    weights = {"gate_proj": layer.gate, "up_proj": layer.up, "down_proj": layer.down}
    tensors = {f"{name}.weight": values for name, values in weights.items()}
    if layer.up_bias is not None and layer.gate_bias is not None and layer.down_bias is not None:
        biases = (layer.gate_bias, layer.up_bias, layer.down_bias)
        tensors |= {f"{name}.bias": values for name, values in zip(weights, biases, strict=True)}
    return tensors


WRITERS: dict[str, Callable[[Layer], Tensors]] = {
    "gate_up_down": lambda layer: per_expert(layer, "gate_proj", "up_proj", "down_proj"),
    "w1_w3_w2": lambda layer: per_expert(layer, "w1", "w3", "w2"),
    "up_down": lambda layer: per_expert(layer, "gate_proj", "up_proj", "down_proj"),
    "fused": lambda layer: fused(layer, "concat", False),
    "fused_transposed": lambda layer: fused(layer, "concat", True),
    "gpt_oss": lambda layer: fused(layer, "in turn", True),
    "fused_interleaved": lambda layer: fused(layer, "in turn", False),
    "fused_ungated": lambda layer: fused_ungated(layer, False),
    "fused_ungated_transposed": lambda layer: fused_ungated(layer, True),
    "granite": granite,
    "stacked": stacked,
}
UNGATED = ("up_down", "fused_ungated", "fused_ungated_transposed")


def make_checkpoint(name: str, prefix: str = PREFIX, **layer: Any) -> Tensors:
    tensors = WRITERS[name](make_layer(gated=name not in UNGATED, **layer))
    return {f"{prefix}.{key}": np.ascontiguousarray(value) for key, value in tensors.items()}


def write_folder(folder: Path, tensors: Tensors, n_file: int = 3, index: bool = True) -> Path:
    """A checkpoint folder as transformers writes it, its tensors dealt out over files."""
    folder.mkdir(exist_ok=True)
    names = [f"model-{i + 1:05}-of-{n_file:05}.safetensors" for i in range(n_file)]
    weight_map = {name: names[i % n_file] for i, name in enumerate(tensors)}
    for file_name in names:
        part = {name: tensors[name] for name, there in weight_map.items() if there == file_name}
        save_file(part, folder / file_name, metadata={"format": "pt"})
    if index:
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


_STORED = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8,
    "I8": np.int8, "I32": np.int32, "I64": np.int64, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip


def read_file(path: Path) -> Tensors:
    """All tensors of a safetensors file; the package itself gives NumPy no float8."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.ndarray(
            entry["shape"], _STORED[entry["dtype"]], content, start + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


# --- Quantised -----------------------------------------------------------------------------------


class Quantised(NamedTuple):
    """A quantised layer's matrices as they are in a checkpoint, by "gate", "up" and "down"."""

    weights: Tensors  # [E, rows, stored columns]
    scales: Tensors  # [E], [E, rows], or [E, rows of scales, columns of scales]
    biases: Tensors  # [E, rows]


FP8: dict[str, Any] = {
    "f8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "f8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "f8_e5m2": ml_dtypes.float8_e5m2,
}


def make_quantised(
    quant: str,
    n_hidden: int,
    n_inter: int,
    n_expert: int,
    *,
    gated: bool = True,
    bias: bool = False,
    block: tuple[int, int] = (128, 128),
    dtype: str = "f8_e4m3fn",
    scale_dtype: str = "f32",
    seed: int = 0,
) -> Quantised:
    """A layer of random finite bytes, of order 1 over a row, with scales that are all different.

    bf16 has no more than 128 of them per octave, e8m0 few at all: there neighbours differ.
    """
    rng = np.random.default_rng(seed)
    group = {"mxfp8": 32, "mxfp4": 32, "int4_group": block[1]}.get(quant)

    def stored(rows: int, columns: int) -> Array:
        shape = (n_expert, rows, columns)
        if quant == "int8_channel":
            return rng.integers(-127, 128, shape, np.int8)
        if quant in ("mxfp4", "int4_group"):
            return rng.integers(0, 256, (*shape[:2], -(-columns // 2)), np.uint8)
        few = (rng.standard_normal(4096) * 8).astype(FP8[dtype])
        values = few[rng.integers(0, len(few), shape, np.uint16)]
        values[:, 0, :1] = FP8[dtype](-0.0) if dtype != "f8_e4m3fnuz" else FP8[dtype](0)
        return values

    def scale(rows: int, columns: int) -> Array:
        shape: tuple[int, ...] = (n_expert,)
        if quant.endswith("channel"):
            shape = (n_expert, rows)
        elif quant == "fp8_block":
            shape = (n_expert, -(-rows // block[0]), -(-columns // block[1]))
        elif group:
            shape = (n_expert, rows, -(-columns // group))
        if quant.startswith("mx"):
            return rng.integers(114, 122, shape, np.uint8)
        size = int(np.prod(shape))
        values = rng.permutation(np.linspace(1, 2, size, endpoint=False)).reshape(shape)
        return (values * 0.02).astype(DTYPES[scale_dtype])

    sizes = {"gate": (n_inter, n_hidden), "up": (n_inter, n_hidden), "down": (n_hidden, n_inter)}
    if not gated:
        del sizes["gate"]
    return Quantised(
        {name: stored(*size) for name, size in sizes.items()},
        {name: scale(*size) for name, size in sizes.items()},
        {
            name: rng.standard_normal((n_expert, size[0])).astype(DTYPES["bf16"])
            for name, size in sizes.items()
            if bias
        },
    )


QWEN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def one_by_one(
    layer: Quantised,
    names: dict[str, str],
    scale_name: str,
    scale_of: Callable[[Array], Array] = lambda scale: scale,
    weight_name: str = "weight",
    weight_of: Callable[[Array], Array] = lambda weight: weight,
    **beside: Callable[[str], Array],
) -> Tensors:
    """Every expert's matrices by themselves; `beside` makes further tensors of a matrix."""
    tensors = {}
    for kind, weights in layer.weights.items():
        for e, weight in enumerate(weights):
            stem = f"{e}.{names[kind]}"
            tensors[f"{stem}.{weight_name}"] = weight_of(weight)
            tensors[f"{stem}.{scale_name}"] = scale_of(layer.scales[kind][e])
            tensors |= {f"{stem}.{name}": make(kind) for name, make in beside.items()}
    for kind, biases in layer.biases.items():
        tensors |= {f"{e}.{names[kind]}.bias": bias for e, bias in enumerate(biases)}
    return tensors


def words(nibbles: Array) -> Array:
    """int32 of eight values each, the first in the lowest bits, zero beyond the row."""
    low_first = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(len(nibbles), -1)
    padded = np.pad(low_first, [(0, 0), (0, -low_first.shape[1] % 8)]).astype(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    word = (padded.reshape(len(nibbles), -1, 8) << shifts).sum(axis=2, dtype=np.uint32)
    return word.view(np.int32)


def joined(parts: Tensors, order: str) -> Array:
    """Rows of gate and up, one after the other or in turn; of up alone without a gate."""
    if "gate" not in parts:
        return parts["up"]
    if order == "concat":
        return np.concatenate([parts["gate"], parts["up"]], axis=1)
    both = np.stack([parts["gate"], parts["up"]], axis=2)
    return both.reshape(len(both), -1, *both.shape[3:])


def in_blocks(packed: Array) -> Array:
    """[E, rows, bytes] with 16 bytes to a block."""
    padded = np.pad(packed, [(0, 0), (0, 0), (0, -packed.shape[2] % 16)])
    return padded.reshape(*packed.shape[:2], -1, 16)


def write_gpt_oss(layer: Quantised) -> Tensors:
    tensors = {
        "gate_up_proj_blocks": in_blocks(joined(layer.weights, "in turn")),
        "gate_up_proj_scales": joined(layer.scales, "in turn"),
        "down_proj_blocks": in_blocks(layer.weights["down"]),
        "down_proj_scales": layer.scales["down"],
    }
    if layer.biases:
        tensors["gate_up_proj_bias"] = joined(layer.biases, "in turn")
        tensors["down_proj_bias"] = layer.biases["down"]
    return tensors


def write_fused(
    layer: Quantised,
    scale: str,
    scale_of: Callable[[Array], Array] = lambda values: values,
    order: str = "concat",
    turn: Callable[[Array], Array] = lambda values: values,
) -> Tensors:
    up = "gate_up_proj" if "gate" in layer.weights else "up_proj"
    return {
        up: turn(joined(layer.weights, order)),
        f"{up}{scale}": scale_of(joined(layer.scales, order)),
        "down_proj": turn(layer.weights["down"]),
        f"down_proj{scale}": scale_of(layer.scales["down"]),
    }


def write_fused_tensor(layer: Quantised) -> Tensors:
    """As transformers' own modules: [E, 2, 1] for gate and up."""
    both = np.stack([layer.scales["gate"], layer.scales["up"]], axis=1)[:, :, None]
    return {
        "gate_up_proj": joined(layer.weights, "concat"),
        "gate_up_proj_scale_inv": both,
        "gate_up_proj_activation_scale": np.arange(1, len(both) + 1, dtype=np.float32),
        "down_proj": layer.weights["down"],
        "down_proj_scale_inv": layer.scales["down"][:, None, None],
    }


def write_stacked(layer: Quantised) -> Tensors:
    tensors = {f"{QWEN[kind]}.weight": values for kind, values in layer.weights.items()}
    return tensors | {
        f"{QWEN[kind]}.weight_scale_inv": values for kind, values in layer.scales.items()
    }


class Format(NamedTuple):
    """A way real files store a quantised layer."""

    quant: str
    write: Callable[[Quantised], Tensors]
    scale_dtype: str = "f32"
    gated: bool = True
    bias: bool = False


def _column(scale: Array) -> Array:
    return scale[..., None]


def write_int4(layer: Quantised) -> Tensors:
    """As compressed-tensors, with the shape before packing beside each matrix."""
    n_inter, n_hidden = (layer.weights[kind].shape[1] for kind in ("up", "down"))

    def shape(kind: str) -> Array:
        return np.array([n_hidden, n_inter] if kind == "down" else [n_inter, n_hidden], np.int64)

    return one_by_one(
        layer, QWEN, "weight_scale", weight_name="weight_packed", weight_of=words,
        weight_shape=shape,
    )  # fmt: skip


def write_gptq(layer: Quantised) -> Tensors:
    """Words of eight values along a column, scales likewise, zero points of 8 stored as 7."""
    tensors = {}
    for kind, weights in layer.weights.items():
        n_row = weights.shape[1]
        n_column = layer.weights["down" if kind != "down" else "up"].shape[1]
        for e, weight in enumerate(weights):
            stem, scale = f"{e}.{QWEN[kind]}", layer.scales[kind][e]
            tensors[f"{stem}.qweight"] = words(weight).T.copy()
            tensors[f"{stem}.scales"] = scale.T.copy()
            zeros = (scale.shape[1], -(-n_row // 8))
            tensors[f"{stem}.qzeros"] = np.full(zeros, 0x77777777, np.int32)
            tensors[f"{stem}.g_idx"] = (np.arange(n_column) // 32).astype(np.int32)
    return tensors


def _input_scale(kind: str) -> Array:
    return np.float32([{"gate": 0.5, "up": 0.25, "down": 0.125}[kind]])


FORMATS: dict[str, Format] = {
    # DeepSeek, Qwen3.
    "hf fp8 block": Format("fp8_block", lambda q: one_by_one(q, QWEN, "weight_scale_inv")),
    # MiniMax-M2; scales in bf16.
    "hf fp8 block w1": Format(
        "fp8_block",
        lambda q: one_by_one(q, MIXTRAL, "weight_scale_inv"),
        scale_dtype="bf16",
    ),
    "hf fp8 tensor": Format("fp8_tensor", lambda q: one_by_one(q, QWEN, "weight_scale_inv")),
    # Step-3.5.
    "step fp8 block": Format("fp8_block", write_stacked),
    "ct fp8 block": Format("fp8_block", lambda q: one_by_one(q, QWEN, "weight_scale")),
    # GLM-4.7.
    "ct fp8 channel": Format(
        "fp8_channel",
        lambda q: one_by_one(q, QWEN, "weight_scale", _column),
        scale_dtype="bf16",
    ),
    "ct fp8 channel flat": Format("fp8_channel", lambda q: one_by_one(q, MIXTRAL, "weight_scale")),
    "ct fp8 tensor": Format(
        "fp8_tensor",
        lambda q: one_by_one(q, MIXTRAL, "weight_scale", _column, input_scale=_input_scale),
    ),
    "quark fp8": Format(
        "fp8_tensor",
        lambda q: one_by_one(
            q, QWEN, "weight_scale", input_scale=lambda kind: _input_scale(kind)[0]
        ),
    ),
    # Nemotron-3.
    "modelopt fp8": Format(
        "fp8_tensor",
        lambda q: one_by_one(q, QWEN, "weight_scale", input_scale=_input_scale),
        gated=False,
    ),
    "ct int8": Format("int8_channel", lambda q: one_by_one(q, QWEN, "weight_scale", _column)),
    # Kimi-K2.
    "ct int4": Format("int4_group", write_int4, scale_dtype="bf16"),
    # Qwen3-30B-A3B-GPTQ-Int4, in groups of 32.
    "gptq": Format("int4_group", write_gptq, scale_dtype="bf16"),
    # Qwen3.5-397B.
    "quark mxfp4": Format("mxfp4", lambda q: one_by_one(q, QWEN, "weight_scale")),
    "ct mxfp4": Format(
        "mxfp4", lambda q: one_by_one(q, QWEN, "weight_scale", weight_name="weight_packed")
    ),
    # DeepSeek-V4.
    "v4 fp4": Format(
        "mxfp4",
        lambda q: one_by_one(
            q, MIXTRAL, "scale",
            scale_of=lambda scale: scale.view(ml_dtypes.float8_e8m0fnu),
            weight_of=lambda weight: weight.view(np.int8),
        ),
    ),
    "gpt-oss": Format("mxfp4", write_gpt_oss, bias=True),
    "mxfp8": Format("mxfp8", lambda q: one_by_one(q, QWEN, "weight_scale")),
    "mxfp8 inv": Format(
        "mxfp8",
        lambda q: one_by_one(
            q, QWEN, "weight_scale_inv", lambda scale: scale.view(ml_dtypes.float8_e8m0fnu)
        ),
        gated=False,
    ),
    "fused fp8 block": Format("fp8_block", lambda q: write_fused(q, "_scale_inv")),
    "fused fp8 block transposed": Format(
        "fp8_block", lambda q: write_fused(q, "_scale_inv", swapped, turn=swapped)
    ),
    "fused fp8 channel transposed": Format(
        "fp8_channel", lambda q: write_fused(q, "_scale", lambda s: s[:, None], turn=swapped)
    ),
    "fused fp8 tensor": Format("fp8_tensor", write_fused_tensor),
    "fused ungated fp8 channel": Format(
        "fp8_channel", lambda q: write_fused(q, "_scale", _column), gated=False
    ),
    "fused ungated mxfp4": Format(
        "mxfp4", lambda q: write_fused(q, "_scale_inv"), gated=False
    ),
    "fused mxfp4": Format("mxfp4", lambda q: write_fused(q, "_scale_inv")),
}  # fmt: skip
