"""Which models there are: a table of known mixture-of-experts layers, and config.json files.

Data and its lookup only: sizes of tensors come from `moepad.plan`, tensors from
`moepad.load_experts`. Reads no weights and imports no framework.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moepad._core import CheckpointError


@dataclass(frozen=True, slots=True)
class Model:
    """The mixture-of-experts layers of one model.

    Attributes
    ----------
    name : str
        Its usual name; of a checkpoint, the name of its folder.
    n_hidden : int
        Width of the experts' input and output: the latent width where the model projects to one.
    n_inter, n_expert, n_topk : int
        Intermediate size, routed experts, experts per token.
    activation : str
        As `moepad.fused_moe` names it; another name where it has none for it.
    gated, bias : bool
        w13 has a gate half; both products have a bias.
    swiglu_alpha, swiglu_limit : float or None
        Parameters of the activation, where it has them, the same for all layers.
    formats : tuple of str
        Weight formats it is published in; of a checkpoint, the one it is in.
    quant : str or None
        What `moepad.plan` calls the format of a checkpoint; None where it has no such kind. Models
        of the table, which come in several formats, have "none".
    block : tuple of int
        Rows and columns that share a scale, if the format has blocks or groups.
    dtype : str
        Type of activations and unquantised weights.
    n_layer : int or None
        Layers of the checkpoint.
    moe_layers : tuple of int or None
        Those with experts, counted from 0.
    aliases : tuple of str
        Other names `find` knows it by.
    """

    name: str
    n_hidden: int
    n_inter: int
    n_expert: int
    n_topk: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = None
    formats: tuple[str, ...] = ()
    quant: str | None = "none"
    block: tuple[int, int] = (128, 128)
    dtype: str = "bf16"
    n_layer: int | None = None
    moe_layers: tuple[int, ...] | None = None
    aliases: tuple[str, ...] = ()


_RELU2: dict[str, Any] = {"activation": "relu2", "gated": False}
_CLAMPED: dict[str, Any] = {
    "activation": "swigluoai",
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}

# Name, hidden width, intermediate size, experts, experts per token. From published configurations,
# tuned kernel tables and the defaults of transformers; a model with an unknown size is not listed.
MODELS = (
    Model(
        "Qwen3-30B-A3B", 2048, 768, 128, 8,
        formats=("BF16", "FP8 block", "GPTQ-Int4"), aliases=("Qwen3-Coder-30B-A3B",),
    ),
    Model("Qwen3-235B-A22B", 4096, 1536, 128, 8, formats=("BF16", "FP8 block", "MXFP4")),
    Model(
        "Qwen3-Coder-480B-A35B", 6144, 2560, 160, 8,
        formats=("BF16", "FP8 block"), aliases=("Qwen3-Coder-480B",),
    ),
    Model(
        "Qwen3-Next-80B-A3B", 2048, 512, 512, 10, formats=("FP8",), aliases=("Qwen3-Next-80B",)
    ),
    Model(
        "Qwen3.5-35B-A3B", 2048, 512, 256, 8, formats=("FP8 block",), aliases=("Qwen3.6-35B-A3B",)
    ),
    Model("Qwen3.5-397B-A17B", 4096, 1024, 512, 10, formats=("FP8 block", "MXFP4")),
    Model("Qwen2-57B-A14B", 3584, 2560, 64, 8),
    Model("Qwen1.5-MoE-A2.7B", 2048, 1408, 60, 4, formats=("BF16",), aliases=("Qwen1.5-MoE",)),
    Model(
        "GLM-4.5", 5120, 1536, 160, 8,
        formats=("FP8 per-token", "MXFP4"), aliases=("GLM-4.6", "GLM-4.7"),
    ),
    Model("GLM-4.5-Air", 4096, 1408, 128, 8, formats=("FP8",)),
    Model("GLM-4.7-Flash", 2048, 1536, 64, 4, formats=("BF16",)),
    Model("GLM-5", 6144, 2048, 256, 8, formats=("FP8 block", "MXFP4", "MXFP8", "PTPC")),
    Model(
        "DeepSeek-V3", 7168, 2048, 256, 8,
        formats=("FP8 block", "MXFP4", "PTPC"),
        aliases=("DeepSeek-R1", "DeepSeek-V3.1", "DeepSeek-V3.2"),
    ),
    Model("DeepSeek-V4-Flash", 4096, 2048, 256, 6, swiglu_limit=10.0, formats=("FP4", "FP8")),
    Model("DeepSeek-V4-Pro", 7168, 3072, 384, 6, swiglu_limit=10.0, formats=("FP4",)),
    Model(
        "Kimi-K2", 7168, 2048, 384, 8,
        formats=("INT4 g32", "MXFP4", "A8W4"), aliases=("Kimi-K2.5",),
    ),
    Model("Kimi-K3", 3584, 3072, 896, 16, activation="situ", formats=("MXFP4",)),
    Model(
        "MiniMax-M2", 3072, 1536, 256, 8,
        formats=("FP8 block", "MXFP4"), aliases=("MiniMax-M2.5", "MiniMax-M2.7"),
    ),
    Model("MiniMax-M3", 6144, 3072, 128, 4, formats=("MXFP4", "MXFP8"), **_CLAMPED),
    Model("Mixtral-8x7B", 4096, 14336, 8, 2, formats=("BF16", "FP8")),
    Model("Mixtral-8x22B", 6144, 16384, 8, 2, formats=("BF16", "FP8")),
    Model(
        "gpt-oss-120b", 2880, 2880, 128, 4,
        bias=True, formats=("MXFP4", "W4A8"), aliases=("gpt-oss",), **_CLAMPED,
    ),
    Model("gpt-oss-20b", 2880, 2880, 32, 4, bias=True, formats=("MXFP4", "W4A8"), **_CLAMPED),
    Model(
        "Gemma4-26B-A4B", 2816, 704, 128, 8,
        activation="gelu_tanh", formats=("BF16", "FP8", "MXFP4"), aliases=("gemma-4-26B-A4B",),
    ),
    Model(
        "Llama4-Maverick", 5120, 8192, 128, 1,
        aliases=("Llama-4-Maverick", "Llama-4-Maverick-17B-128E"),
    ),
    Model(
        "Llama4-Scout", 5120, 8192, 16, 1, aliases=("Llama-4-Scout", "Llama-4-Scout-17B-16E")
    ),
    Model(
        "Nemotron-3-Nano-30B", 2688, 1856, 128, 6,
        formats=("NVFP4", "INT8 W8A16"),
        aliases=("Nemotron-3-Nano-30B-A3B", "NVIDIA-Nemotron-3-Nano-30B-A3B"),
        **_RELU2,
    ),
    Model(
        "Nemotron-3-Super-120B", 1024, 2688, 512, 22,
        formats=("FP8", "NVFP4"),
        aliases=("Nemotron-3-Super-120B-A12B", "NVIDIA-Nemotron-3-Super-120B-A12B"),
        **_RELU2,
    ),
    Model("Nemotron-3-Ultra-550B", 2048, 5120, 512, 22, formats=("MXFP8",), **_RELU2),
    Model("Step-3.5-Flash", 4096, 1280, 288, 8, formats=("FP8 block",)),
    Model("ERNIE-4.5-21B-A3B", 2560, 1536, 64, 6),
    Model("Hunyuan-A13B", 4096, 3072, 64, 8, formats=("BF16",)),
    Model("OLMoE-1B-7B", 2048, 1024, 64, 8),
    Model(
        "Granite-3-1B-A400M", 1024, 512, 32, 8,
        aliases=("Granite-3.0-1B-A400M", "Granite-3.1-1B-A400M"),
    ),
    Model("LongCat-Flash", 6144, 2048, 512, 12),
    Model("Laguna-XS-2.1", 2048, 512, 256, 8, formats=("FP8 block", "INT4 g128")),
    Model("Inkling", 6144, 3072, 256, 6),
    Model("Inkling-small", 4096, 2048, 256, 6),
)  # fmt: skip

# Endings of repository names that change neither size nor layout of the experts; so do dates.
_ENDINGS = {
    "instruct", "thinking", "base", "chat", "it", "pt", "hf", "v0.1",
    "bf16", "fp8", "mxfp4", "mxfp8", "nvfp4", "int4", "int8",
}  # fmt: skip


def find(name: str) -> Model:
    """The model of the built-in table with this name.

    Upper and lower case, the owner of a repository name ("Qwen/...") and endings such as
    "-Instruct", "-2507" or "-FP8" make no difference.

    Raises
    ------
    TypeError
        `name` is not a str.
    ValueError
        No such model; the message lists names that come close.
    """
    if not isinstance(name, str):
        raise TypeError(f"model: expected a name (str), got {name!r} ({type(name).__name__})")
    known = {_key(known_as): m for m in MODELS for known_as in (m.name, *m.aliases)}
    parts = _key(name).split("-")
    while "-".join(parts) not in known and _is_ending(parts[-1]) and len(parts) > 1:
        parts.pop()
    if model := known.get("-".join(parts)):
        return model
    close = difflib.get_close_matches("-".join(parts), known, n=3, cutoff=0.5)
    names = list(dict.fromkeys(known[match].name for match in close))
    listed = ", ".join(names or [m.name for m in MODELS])
    raise ValueError(
        f"model: {name!r} is not in the built-in table ({'nearest' if names else 'known'}: "
        f"{listed}); "
        "for any other model give its config.json or its sizes"
    )


def _key(name: str) -> str:
    last = name.strip().rstrip("/").rsplit("/", 1)[-1]
    return last.casefold().replace("_", "-").replace(" ", "-")


def _is_ending(part: str) -> bool:
    return part in _ENDINGS or (len(part) == 4 and part.isdecimal())


# What the families call the same number, the most telling key first.
_HIDDEN = ("moe_latent_size", "hidden_size", "d_model", "n_embd")
_INTER = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_EXPERT = (
    "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
    "num_routed_experts",
)  # fmt: skip
_TOPK = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k",
    "moe_k", "top_k_experts",
)  # fmt: skip
_LAYER = ("num_hidden_layers", "num_layers", "n_layers")
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")

_ACTIVATIONS = {
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu_squared": "relu2",
}
_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_MOE_LAYER_TYPES = frozenset({"sparse", "moe", "hash_moe"})

_SIZE_MAX = 2**40  # elements; what no model has
_LAYER_MAX = 10_000


def read_config(path: str | os.PathLike[str]) -> Model:
    """The mixture-of-experts layers that a checkpoint's config.json describes.

    Parameters
    ----------
    path : path
        A config.json in the Hugging Face format, or the folder it lies in.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    CheckpointError
        It is not JSON, or does not describe experts.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        model = parse_config(json.loads(file.read_text(encoding="utf-8")))
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected JSON, got something else ({error})") from None
    return replace(model, name=file.resolve().parent.name or model.name)


def parse_config(config: object) -> Model:
    """What `read_config` does with the parsed file; the name is its model_type.

    Raises
    ------
    CheckpointError
        `config` does not describe experts.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"expected a JSON object, got {_short(config)}")
    text = _text_config(config)
    kind = str(text.get("model_type") or config.get("model_type") or "unknown")
    activation = _activation(text)
    is_clamped = kind == "gpt_oss" or "swiglu_alpha" in text or activation == "swigluoai"
    dtype = _dtype(text, config)
    quantisation = text.get("quantization_config") or config.get("quantization_config")
    if isinstance(quantisation, Mapping) and (kind_of := text.get("expert_dtype")):
        quantisation = {"expert_dtype": kind_of, **quantisation}
    quant, block, label = _quantisation(quantisation)
    n_layer = _layer_count(text)
    return Model(
        name=kind,
        n_hidden=_size(text, _HIDDEN),
        n_inter=_size(text, _INTER),
        n_expert=_size(text, _EXPERT),
        n_topk=_size(text, _TOPK),
        activation="swigluoai" if is_clamped else activation,
        gated=kind != "nemotron_h" and activation != "relu2",
        bias=kind == "gpt_oss",
        swiglu_alpha=_number(text, "swiglu_alpha", 1.702) if is_clamped else None,
        swiglu_limit=_number(text, "swiglu_limit", 7.0 if is_clamped else None),
        formats=(label or dtype.upper(),),
        quant=quant,
        block=block,
        dtype=dtype,
        n_layer=n_layer,
        moe_layers=None if n_layer is None else _moe_layers(text, n_layer),
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the experts: the whole, or a nested language model."""
    if any(config.get(key) is not None for key in _EXPERT):
        return config
    for key in _NESTED:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            found = _text_config(nested)
            if found is not nested or any(found.get(key) is not None for key in _EXPERT):
                return found
    return config


def _size(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    for key in keys:
        value = config.get(key)
        # Some families write one number per layer; only if all agree is there one answer.
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is not None:
            return _integer(key, value, 1, _SIZE_MAX)
    raise CheckpointError(
        f"expected one of {', '.join(keys)}, found none; is this a mixture-of-experts model?"
    )


def _integer(key: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise CheckpointError(f"{key}: expected an integer, {least} to {most}, got {_short(value)}")
    return value


def _integers(key: str, value: object) -> list[int]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list):
        raise CheckpointError(f"{key}: expected a list of layers, got {_short(value)}")
    numbers = [
        int(item) if isinstance(item, str) and item.strip().isdecimal() else item for item in items
    ]
    return [_integer(key, number, 0, _LAYER_MAX) for number in numbers]


def _number(config: Mapping[str, Any], key: str, default: float | None) -> float | None:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{key}: expected a number, got {_short(value)}")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _activation(config: Mapping[str, Any]) -> str:
    for key in ("mlp_hidden_act", "hidden_activation", "hidden_act"):
        value = config.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise CheckpointError(f"{key}: expected a name, got {_short(value)}")
            return _ACTIVATIONS.get(value, value)
    return "silu"


def _dtype(*configs: Mapping[str, Any]) -> str:
    for config in configs:
        for key in ("dtype", "torch_dtype"):
            value = config.get(key)
            if isinstance(value, str) and value in _DTYPES:
                return _DTYPES[value]
    return "bf16"


def _layer_count(config: Mapping[str, Any]) -> int | None:
    for key in ("layers_block_type", "hybrid_override_pattern"):
        value = config.get(key)
        if isinstance(value, (list, str)) and 0 < len(value) <= _LAYER_MAX:
            return len(value)
    for key in _LAYER:
        if config.get(key) is not None:
            return _integer(key, config[key], 0, _LAYER_MAX)
    return None


def _moe_layers(config: Mapping[str, Any], n_layer: int) -> tuple[int, ...]:
    """Layers with experts, by whichever of the families' rules the configuration states."""

    def integer(key: str, default: int, least: int = 0) -> int:
        value = config.get(key)
        return default if value is None else _integer(key, value, least, _LAYER_MAX)

    for key in ("mlp_layer_types", "layers_block_type"):
        kinds = config.get(key)
        if isinstance(kinds, list) and any(str(kind) in _MOE_LAYER_TYPES for kind in kinds):
            return tuple(i for i, kind in enumerate(kinds) if str(kind) in _MOE_LAYER_TYPES)
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and "E" in pattern:
        return tuple(i for i, letter in enumerate(pattern) if letter == "E")
    for key in ("moe_layers", "moe_layers_enum"):
        if config.get(key) is not None:
            return tuple(sorted(set(_integers(key, config[key]))))
    if config.get("interleave_moe_layer_step") is not None:
        step = integer("interleave_moe_layer_step", 1, 1)
        return tuple(range(step - 1, n_layer, step))
    if config.get("expert_layer_period") is not None:
        period = integer("expert_layer_period", 1, 1)
        offset = integer("expert_layer_offset", 0)
        return tuple(i for i in range(n_layer) if i % period == offset)

    # The other rules are conditions that all hold; a configuration states some of them.
    first = integer("first_k_dense_replace", integer("num_dense_layers", 0))
    first = integer("moe_layer_start_index", first)
    last = config.get("moe_layer_end_index")
    last = n_layer - 1 if last in (None, -1) else integer("moe_layer_end_index", 0)
    step = integer("decoder_sparse_step", integer("moe_layer_interval", 1, 1), 1)
    dense = _integers("mlp_only_layers", config.get("mlp_only_layers") or [])
    every = config.get("moe_layer_freq")
    if isinstance(every, list):
        sparse = [bool(flag) for flag in every] + [True] * n_layer
    else:
        period = integer("moe_layer_freq", 1, 1)
        sparse = [i % period == 0 for i in range(n_layer)]
    return tuple(
        i
        for i in range(n_layer)
        if first <= i <= last and (i + 1) % step == 0 and i not in dense and sparse[i]
    )


def _quantisation(config: object) -> tuple[str | None, tuple[int, int], str]:
    """Our name of a quantization_config's format, its block, and a label to show."""
    block = (128, 128)
    if config is None:
        return "none", block, ""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"quantization_config: expected an object, got {_short(config)}")
    method = str(config.get("quant_method") or "unknown")
    if method == "fp8":
        if config.get("expert_dtype") == "fp4":
            return "mxfp4", (1, 32), "FP4"
        if (sides := config.get("weight_block_size")) is not None:
            return "fp8_block", _block("weight_block_size", sides), "FP8 block"
        return "fp8_tensor", block, "FP8"
    if method in ("mxfp4", "mxfp8"):
        return method, (1, 32), method.upper()
    if method in ("gptq", "awq"):
        is_symmetric = config.get("sym") if method == "gptq" else not config.get("zero_point", True)
        group = config.get("group_size")
        if config.get("bits") == 4 and is_symmetric and group in (32, 64, 128):
            return "int4_group", (1, int(group)), f"{method.upper()} int4 g{group}"
    if method == "compressed-tensors":
        groups = config.get("config_groups")
        weights = _experts_part(groups, "weights") if isinstance(groups, Mapping) else None
        if weights is not None:
            return _compressed(weights)
    if method == "quark":
        return _quark(config)
    if method.startswith("modelopt"):
        return _modelopt(config)
    return None, block, method


def _experts_part(parts: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """What `key` says in the part that names experts, else in the first that has it."""
    found = [
        (name, part[key])
        for name, part in parts.items()
        if isinstance(part, Mapping) and isinstance(part.get(key), Mapping)
    ]
    for name, value in found:
        if "expert" in f"{name} {parts[name].get('targets')}":
            return value  # type: ignore[no-any-return]
    return found[0][1] if found else None


def _compressed(weights: Mapping[str, Any]) -> tuple[str | None, tuple[int, int], str]:
    """`_quantisation` for the weights of a compressed-tensors group."""
    kind = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    label = f"compressed-tensors {kind[0]}{kind[1]} per {kind[2]}"
    group = weights.get("group_size")
    if kind == ("float", 8, "tensor"):
        return "fp8_tensor", (128, 128), label
    if kind == ("float", 8, "channel"):
        return "fp8_channel", (128, 128), label
    if kind == ("float", 8, "block"):
        return "fp8_block", _block("block_structure", weights.get("block_structure")), label
    if kind == ("float", 8, "group") and group == 32:
        return "mxfp8", (1, 32), label
    if kind == ("float", 4, "group") and group == 32:
        return "mxfp4", (1, 32), label
    if kind == ("int", 8, "channel"):
        return "int8_channel", (128, 128), label
    if kind == ("int", 4, "group") and weights.get("symmetric", True) and group in (32, 64, 128):
        return "int4_group", (1, int(group)), label
    return None, (128, 128), label


def _quark(config: Mapping[str, Any]) -> tuple[str | None, tuple[int, int], str]:
    """`_quantisation` for AMD Quark, which says more of layers by name than of all."""
    by_layer = config.get("layer_quant_config")
    weights = None
    if isinstance(by_layer, Mapping):
        weights = _experts_part({k: v for k, v in by_layer.items() if "expert" in k}, "weight")
    if weights is None:
        weights = _experts_part({"all": config.get("global_quant_config")}, "weight")
    kind = (weights.get("dtype"), weights.get("qscheme")) if weights else (None, None)
    label = f"Quark {kind[0]} {kind[1]}"
    if kind[0] == "fp4":
        return "mxfp4", (1, 32), "Quark MXFP4"
    if kind == ("fp8_e4m3", "per_tensor"):
        return "fp8_tensor", (128, 128), label
    if kind == ("fp8_e4m3", "per_channel"):
        return "fp8_channel", (128, 128), label
    if kind == ("int8", "per_channel"):
        return "int8_channel", (128, 128), label
    return None, (128, 128), label


def _modelopt(config: Mapping[str, Any]) -> tuple[str | None, tuple[int, int], str]:
    """`_quantisation` for NVIDIA ModelOpt."""
    inner = config.get("quantization")
    algorithm = (inner if isinstance(inner, Mapping) else config).get("quant_algo")
    kinds = {
        "FP8": "fp8_tensor",
        "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel",
        "FP8_PB_WO": "fp8_block",
        "MXFP8": "mxfp8",
    }
    if not isinstance(algorithm, str):
        return None, (128, 128), "modelopt"
    quant = kinds.get(algorithm)
    return quant, (1, 32) if quant == "mxfp8" else (128, 128), f"ModelOpt {algorithm}"


def _block(key: str, value: object) -> tuple[int, int]:
    if isinstance(value, str) and all(side.isdecimal() for side in value.split("x")):
        value = [int(side) for side in value.split("x")]
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise CheckpointError(f"{key}: expected two integers, got {_short(value)}")
    rows, columns = (_integer(key, side, 1, _LAYER_MAX) for side in value)
    return rows, columns
