"""A Qwen3-MoE of three megabytes, written by transformers: plain, and with fp8 experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BLOCK = 128


def write(folder: Path, n_inter: int, dtype: str, n_hidden: int = 64, seed: int = 0) -> None:
    """Random weights whose routing is far from ties, as a Hugging Face checkpoint."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=n_hidden,
        moe_intermediate_size=n_inter,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".mlp.gate." in name:
                tensor.normal_(0, 1)
            elif ".experts." in name:
                tensor.normal_(0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def write_fp8(folder: Path, exact: Path, n_inter: int) -> None:
    """Experts in block-scaled fp8 in `folder`; what they stand for, in float32, in `exact`."""
    from safetensors.torch import load_file, save_file

    source = exact.with_name(exact.name + "-source")
    write(source, n_inter, "bfloat16", n_hidden=128)
    config = json.loads((source / "config.json").read_text())
    stored, meant, others = {}, {}, []
    for name, weight in load_file(source / "model.safetensors").items():
        if ".experts." in name:
            stored[name], stored[f"{name}_scale_inv"], meant[name] = _quantise(weight.float())
        else:
            stored[name], meant[name] = weight, weight.float()
            others.append(name.removesuffix(".weight"))
    fp8 = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": others,
    }
    for target, tensors, changes in (
        (folder, stored, {"quantization_config": fp8}),
        (exact, meant, {"dtype": "float32"}),
    ):
        target.mkdir()
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(config | changes))


def _quantise(weight: Any) -> tuple[Any, Any, Any]:
    """Stored values, a scale for each block of 128 x 128, and what they stand for."""
    import torch

    rows, columns = weight.shape
    blocks = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = blocks.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    stored = (weight / spread).to(torch.float8_e4m3fn)
    return stored, scale, stored.float() * spread
