"""`python -m moepad env`: versions, processor, instruction sets, threads, and why each was taken.

Imports no framework: versions come from package metadata.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path

from moepad import _core, compiler, runtimes
from moepad.cli.table import table

NAME = "env"
HELP = "show versions, processor, instruction sets and threads, and why each was chosen"

PACKAGES = ("numpy", "ml_dtypes", "safetensors", "torch", "transformers", "sglang", "vllm")
VARIABLES = (
    "MOEPAD_CPU_ISA",
    "MOEPAD_NUM_THREADS",
    "OMP_NUM_THREADS",
    "SGLANG_MOE_PADDING",
    "MOEPAD_SGLANG",
    "MOEPAD_VLLM",
    "MOEPAD_TRACE",
    "MOEPAD_DEBUG",
)
GPU_VARIABLES = (
    *(name for names in runtimes.OVERRIDES.values() for name in names),
    *runtimes.ROCM_VARIABLES,
    *runtimes.CUDA_VARIABLES,
    "MOEPAD_IMAGES",
    "MOEPAD_CACHE",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
)


TEXT_WIDTH = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        rows = [row for key, value in facts.items() for row in _rows(key, value)]
        print(table(rows, ("what", "value")))
    return 0


def collect() -> dict[str, object]:
    """Everything the command knows, JSON-ready, in the order it is shown."""
    isa = _core.cpu_isa()
    return {
        "moepad": _version("moepad") or "not installed, run from its sources",
        "extension": _core.__file__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "cpu": cpu_name(),
        "cpus_in_affinity": len(_affinity()),
        "physical_cores": physical_cores(),
        "isa_available": list(_core.cpu_isas()),
        "isa": isa,
        "isa_reason": _isa_reason(isa),
        "threads": _core.get_num_threads(),
        "threads_reason": _thread_reason(),
        **gpus(),
        "variables": {
            name: os.environ[name] for name in (*VARIABLES, *GPU_VARIABLES) if name in os.environ
        },
    }


def gpus() -> dict[str, object]:
    """Runtime libraries looked at with what came of each, devices with their image, compilers."""
    facts: dict[str, object] = {}
    for report in _core.gpu_report():
        vendor = report["vendor"]
        facts[f"{vendor}_libraries"] = report["tried"]
        facts[f"{vendor}_error"] = report["error"]
        facts[f"{vendor}_devices"] = [
            {**device, "images": _images_of(device.get("arch", ""))} for device in report["devices"]
        ]
        facts[f"{vendor}_compilers"] = [
            f"{found.name} ({found.path})" for found in compiler.find_compilers(vendor)
        ]
    facts["image_folders"] = [str(folder) for folder in compiler.image_folders()]
    return facts


def _images_of(arch: str) -> str:
    name = arch.partition(":")[0]
    if name not in compiler.ARCHS:
        return "no kernels for this architecture"
    found = [part for part in compiler.PARTS if compiler.find_image(name, part)]
    return f"{', '.join(found) or 'none'} made; others are compiled at first use"


def cpu_name() -> str:
    """The processor's name as the system has it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware", "cpu"):
                return value.strip()
    return platform.processor() or platform.machine()


def physical_cores() -> int:
    """Cores, not hyper-threads, that this process may run on."""
    cores = {_siblings(cpu) for cpu in _affinity()}
    return len(cores)


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """A name shared by the hyper-threads of one core."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def _isa_reason(isa: str) -> str:
    asked = os.environ.get("MOEPAD_CPU_ISA")
    best = "best of those compiled in that this processor has"
    if asked and asked != isa:
        return f"{best}; MOEPAD_CPU_ISA={asked} is not one of them"
    return f"MOEPAD_CPU_ISA={asked}" if asked else best


def _thread_reason() -> str:
    for name in ("MOEPAD_NUM_THREADS", "OMP_NUM_THREADS"):
        number = re.match(r"\s*\+?(\d+)", os.environ.get(name, ""))
        if number and int(number[1]) > 0:
            return f"{name}={os.environ[name]}"
    return "physical cores in this process's affinity mask"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _rows(key: str, value: object) -> list[tuple[str, str]]:
    """A fact as rows of the table: a list of long things takes one each."""
    if not isinstance(value, list) or len(_text(value)) <= TEXT_WIDTH:
        return [(key, _text(value))]
    return [(key if i == 0 else "", _text_of_item(item)) for i, item in enumerate(value)]


def _text_of_item(item: object) -> str:
    if not isinstance(item, dict):
        return str(item)
    if "verdict" in item:
        return f"{item['path']} ({item['origin']}): {item['verdict']}"
    return ", ".join(f"{key}={value}" for key, value in item.items())


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(_text_of_item, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "none set"
    return str(value)
