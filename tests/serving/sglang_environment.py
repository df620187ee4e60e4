"""The environment variables under which SGLang runs on a CPU, and a runtime of one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from serving import free_port

STUBS = Path(__file__).parent / "stubs"

VARIABLES = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "|".join(["0", "1"] * 4),  # one entry for each rank
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


def of_child(**more: str) -> dict[str, str]:
    """os.environ for a child process that runs SGLang."""
    path = os.pathsep.join(filter(None, [str(STUBS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **VARIABLES, "PYTHONPATH": path, **more}


def start_runtime(checkpoint: Path) -> None:
    """What an SGLang process does before it builds a model, for one rank of one."""
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    port = free_port()
    options: dict[str, Any] = {
        "model_path": str(checkpoint),
        "device": "cpu",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "disable_radix_cache": True,
        "max_total_tokens": 1024,
        "dist_init_addr": f"127.0.0.1:{port}",
    }
    args = ServerArgs(**options)
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    initialize_moe_config()
    bootstrap.init_parallel_runtime(server_args=args, device="cpu", dist_port=port)
