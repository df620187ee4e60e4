"""Makes data/compressed_tensors.safetensors: one expert in every form that tool writes.

Needs torch and compressed-tensors (0.18.0 made the committed file):
python tests/make_compressed_tensors.py tests/data/compressed_tensors.safetensors
"""

from __future__ import annotations

import sys
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

N_HIDDEN, N_INTER = 64, 32
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4_group": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    ),
    "int8_channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
    ),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, **MX}),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, **MX}),
}


def ranges(weight: torch.Tensor, strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest value of each group that shares a scale."""
    if strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    groups = weight.unflatten(1, (-1, 32))
    if strategy == "block":
        groups = weight.unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).transpose(1, 2).flatten(2)
    return groups.amin(-1), groups.amax(-1)


def main(path: str) -> None:
    torch.manual_seed(0)
    tensors = {}
    for kind, (form, arguments) in KINDS.items():
        scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(**arguments), format=form
        )
        compressor: Any = BaseCompressor.get_value_from_registry(form)
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (N_HIDDEN, N_INTER) if name == "down_proj" else (N_INTER, N_HIDDEN)
            weight = torch.randn(shape, dtype=torch.bfloat16) * 0.1
            args: Any = scheme.weights
            scale, zero = calculate_qparams(*ranges(weight, args.strategy), args)
            state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
            state = compressor.compress(state, scheme)
            state.pop("weight_zero_point", None)
            back = compressor.decompress(dict(state), scheme)["weight"]
            tensors |= {f"{kind}.experts.0.{name}.{k}": v.contiguous() for k, v in state.items()}
            tensors[f"{kind}.decompressed.{name}"] = back.to(torch.bfloat16)
    made_by = f"compressed-tensors {compressed_tensors.__version__}"
    save_file(tensors, path, metadata={"format": "pt", "made_by": made_by})


if __name__ == "__main__":
    main(sys.argv[1])
