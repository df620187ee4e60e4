"""Where a GPU vendor's runtime and compiler libraries may be. Opens none of them.

The C module opens runtimes at the first call that needs one; it looks first at what the process has
mapped already, then at `candidates`, in order. Imports no framework: PyTorch's folder is found
without importing it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path

# Environment variables that name a library, ours first; no other is tried then.
OVERRIDES = {
    "amd": ("MOEPAD_HIP_LIBRARY", "TRITON_LIBHIP_PATH"),
    "nvidia": ("MOEPAD_CUDA_LIBRARY", "TRITON_LIBCUDA_PATH"),
}
ROCM_VARIABLES = ("ROCM_PATH", "ROCM_HOME", "HIP_PATH")
ROCM_DEFAULT = "/opt/rocm"
CUDA_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
CUDA_DEFAULT = "/usr/local/cuda"

HIP_SONAMES = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so")
HIPRTC_SONAMES = ("libhiprtc.so.7", "libhiprtc.so.6", "libhiprtc.so.5", "libhiprtc.so")
NVRTC_SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so")

Candidate = tuple[str, str, bool]


def candidates(vendor: str) -> list[Candidate]:
    """Where the vendor's runtime library may be, best first.

    Parameters
    ----------
    vendor : str
        "amd" or "nvidia".

    Returns
    -------
    list of (str, str, bool)
        Who says so, a path or a name for the loader, and whether the user named it: then it is the
        only one.
    """
    for variable in OVERRIDES[vendor]:
        if path := os.environ.get(variable):
            return [(variable, path, True)]
    if vendor == "nvidia":
        # The plain name is a development file, which may be a stub.
        return [("the loader's path", "libcuda.so.1", False)]
    return [
        *[("rocm_sdk", path, False) for path in _rocm_sdk("amdhip64")],
        *_named("PyTorch's folder", torch_folder(), ("libamdhip64.so",)),
        *[("the loader's path", name, False) for name in HIP_SONAMES],
        *[(origin, str(root / "lib" / "libamdhip64.so"), False) for origin, root in rocm_roots()],
    ]


def compiler_libraries(vendor: str) -> list[str]:
    """Where the vendor's run-time compiler may be: beside the runtime the process has, first."""
    names = HIPRTC_SONAMES if vendor == "amd" else NVRTC_SONAMES
    folders = mapped_folders("libamdhip64.so" if vendor == "amd" else "libnvrtc.so")
    if vendor == "amd":
        found = _rocm_sdk("hiprtc")
        folders += [root / "lib" for _, root in rocm_roots()]
    else:
        found = []
        folders += [
            Path(entry) / "nvidia" / part
            for entry in sys.path
            for part in ("cu13/lib", "cuda_nvrtc/lib")
        ]
        folders += [root / "lib64" for root in cuda_roots()]
    if folder := torch_folder():
        folders.append(folder)
    files = [folder / name for folder in folders for name in names]
    return [*found, *[str(file) for file in files if file.exists()], *names]


def rocm_roots() -> list[tuple[str, Path]]:
    """ROCm's folders and who names them."""
    roots = [(name, Path(os.environ[name])) for name in ROCM_VARIABLES if os.environ.get(name)]
    return [*roots, (ROCM_DEFAULT, Path(ROCM_DEFAULT))]


def cuda_roots() -> list[Path]:
    """The CUDA toolkit's folders."""
    named = [os.environ[name] for name in CUDA_VARIABLES if os.environ.get(name)]
    return [Path(root) for root in (*named, CUDA_DEFAULT)]


def torch_folder() -> Path | None:
    """PyTorch's folder of libraries, if PyTorch is installed."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "lib"


def mapped_folders(name: str) -> list[Path]:
    """Folders of the libraries of this process whose file names begin with `name`."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape")
    except OSError:
        return []
    found = re.findall(rf"(/.*)/{re.escape(name)}[^/\n]*$", maps, flags=re.MULTILINE)
    return [Path(folder) for folder in dict.fromkeys(found)]


def _rocm_sdk(library: str) -> list[str]:
    """Paths from ROCm's own Python package, which has versioned file names only."""
    try:
        rocm_sdk = importlib.import_module("rocm_sdk")
    except ImportError:
        return []
    try:
        return [str(path) for path in rocm_sdk.find_libraries(library)]
    except Exception:  # the package raises types of its own where a part is not installed
        return []


def _named(origin: str, folder: Path | None, names: tuple[str, ...]) -> list[Candidate]:
    if folder is None:
        return []
    return [(origin, str(folder / name), False) for name in names if (folder / name).exists()]
