"""Padded mixture-of-experts weights, and a fused MoE that costs what its true size costs.

Sizes: `plan`, and SGLang's `get_moe_padding_size` and `get_moe_weight_sizes`. Weights:
`load_experts`. Compute: `fused_moe`, on NumPy arrays, torch CPU tensors and anything with DLPack;
`workspace_nbytes`, `set_num_threads`, `set_cpu_isa` go with it. `python -m moepad` is the command
line.
"""

from moepad._core import (
    CheckpointError,
    DeviceError,
    UnsupportedError,
    cpu_isa,
    cpu_isas,
    fused_moe,
    get_num_threads,
    set_cpu_isa,
    set_num_threads,
    workspace_nbytes,
)
from moepad.padding import Plan, get_moe_padding_size, get_moe_weight_sizes, plan
from moepad.weights import Experts, load_experts

__all__ = [
    "CheckpointError",
    "DeviceError",
    "Experts",
    "Plan",
    "UnsupportedError",
    "__version__",
    "cpu_isa",
    "cpu_isas",
    "fused_moe",
    "get_moe_padding_size",
    "get_moe_weight_sizes",
    "get_num_threads",
    "load_experts",
    "plan",
    "set_cpu_isa",
    "set_num_threads",
    "workspace_nbytes",
]

__version__ = "0.1.0"
