"""Types of the C module; its docstrings say what the functions do."""

from typing import Any, Literal, Protocol, SupportsFloat, SupportsIndex, TypeVar

from typing_extensions import Buffer

class UnsupportedError(NotImplementedError): ...
class DeviceError(RuntimeError): ...
class CheckpointError(ValueError): ...

class _Tensor(Protocol):
    """A NumPy array, a torch tensor, or whatever else has DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

_T = TypeVar("_T", bound=_Tensor)

def get_moe_padding_size(is_aiter_moe: object) -> int: ...
def get_moe_weight_sizes(
    inter_dim: SupportsIndex, is_concat: object, is_packed: object, is_aiter_moe: object
) -> tuple[int, int, bool]: ...
def plan(
    n_hidden: SupportsIndex,
    n_inter: SupportsIndex,
    n_expert: SupportsIndex,
    gated: bool,
    quant: str,
    dtype: str,
    block_n: SupportsIndex,
    block_k: SupportsIndex,
    tp_size: SupportsIndex,
    tp_rank: SupportsIndex,
    ep_size: SupportsIndex,
    ep_rank: SupportsIndex,
    split: str,
    align: SupportsIndex,
    bias: bool,
) -> dict[str, Any]: ...
def fused_moe(
    hidden_states: _T,
    w13: _Tensor,
    w2: _Tensor,
    topk_weights: _Tensor,
    topk_ids: _Tensor,
    *,
    n_inter: SupportsIndex | None = None,
    n_hidden: SupportsIndex | None = None,
    activation: Literal["silu", "gelu", "gelu_tanh", "swigluoai", "relu2"] | str = "silu",
    gate_up: Literal["concat", "interleaved"] | str = "concat",
    quant: str = "none",
    w13_scale: _Tensor | None = None,
    w2_scale: _Tensor | None = None,
    block: tuple[SupportsIndex, SupportsIndex] = (128, 128),
    scale_phase: SupportsIndex = 0,
    quant_activations: Literal["none", "fp8", "int8", "mxfp8", "mxfp4"] | str = "none",
    x_scale: _Tensor | None = None,
    h_scale: _Tensor | None = None,
    w13_bias: _Tensor | None = None,
    w2_bias: _Tensor | None = None,
    swiglu_alpha: SupportsFloat | SupportsIndex = 1.702,
    swiglu_limit: SupportsFloat | SupportsIndex | None = None,
    expert_map: _Tensor | None = None,
    n_token: SupportsIndex | _Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    routed_scaling_factor: SupportsFloat | SupportsIndex = 1.0,
    layout: str = "plain",
    out: _T | None = None,
    workspace: _Tensor | Buffer | None = None,
    stream: None = None,
) -> _T: ...
def workspace_nbytes(
    hidden_states: _Tensor,
    w13: _Tensor,
    w2: _Tensor,
    topk_weights: _Tensor,
    topk_ids: _Tensor,
    *,
    n_inter: SupportsIndex | None = None,
    n_hidden: SupportsIndex | None = None,
    activation: Literal["silu", "gelu", "gelu_tanh", "swigluoai", "relu2"] | str = "silu",
    gate_up: Literal["concat", "interleaved"] | str = "concat",
    quant: str = "none",
    w13_scale: _Tensor | None = None,
    w2_scale: _Tensor | None = None,
    block: tuple[SupportsIndex, SupportsIndex] = (128, 128),
    scale_phase: SupportsIndex = 0,
    quant_activations: Literal["none", "fp8", "int8", "mxfp8", "mxfp4"] | str = "none",
    x_scale: _Tensor | None = None,
    h_scale: _Tensor | None = None,
    w13_bias: _Tensor | None = None,
    w2_bias: _Tensor | None = None,
    swiglu_alpha: SupportsFloat | SupportsIndex = 1.702,
    swiglu_limit: SupportsFloat | SupportsIndex | None = None,
    expert_map: _Tensor | None = None,
    n_token: SupportsIndex | _Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    routed_scaling_factor: SupportsFloat | SupportsIndex = 1.0,
    layout: str = "plain",
    out: _Tensor | None = None,
    workspace: _Tensor | Buffer | None = None,
    stream: None = None,
) -> int: ...
def time_fused_moe(repeat: SupportsIndex, /, *args: Any, **kwargs: Any) -> list[float]: ...
def copy(dst: _Tensor, src: _Tensor) -> None: ...
def set_num_threads(n: SupportsIndex) -> None: ...
def get_num_threads() -> int: ...
def set_cpu_isa(name: str | None) -> None: ...
def cpu_isa() -> str: ...
def cpu_isas() -> tuple[str, ...]: ...
def read_bandwidth(array: _Tensor) -> float: ...
def peak_flops(
    dtype: Literal["f32", "bf16", "f16"] | str, seconds: SupportsFloat | SupportsIndex
) -> float: ...
def gpu_report() -> list[dict[str, Any]]: ...
def gpu_memory(device_type: int, index: int, n_bytes: int, /) -> object: ...
def gpu_export(
    memory: object,
    offset: int,
    dtype: str,
    itemsize: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    is_versioned: bool,
    /,
) -> object: ...
def gpu_settle(device_type: int, index: int, /) -> None: ...
def gpu_staging(device_type: int, index: int, /) -> object: ...
def gpu_put(staging: object, dst: _Tensor, src: _Tensor, /) -> None: ...
def gpu_wait(staging: object, /) -> None: ...
