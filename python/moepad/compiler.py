"""Device images: a part of the kernels of hip/ compiled for an architecture, found, cached or made.

A part serves one element type and one way to store weights, so that a first use waits for what it
needs alone. An image is looked for in the folder MOEPAD_IMAGES names, in the package (made at
install), in the cache; else a compiler makes it: hipRTC or NVRTC, then clang, hipcc or nvcc. An
image's name has the hash of the sources and options, so that one that does not fit is never taken,
and one of the compiler, so that two compilers' images lie side by side.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moepad import runtimes
from moepad._core import UnsupportedError

AMD_ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
NVIDIA_ARCHS = ("sm_80", "sm_90", "sm_90a")
ARCHS = AMD_ARCHS + NVIDIA_ARCHS
# Element type, bits of a quantised weight and of quantised activations; MPAD_PART_* in
# csrc/gpu_args.h.
PARTS = (
    *("bf16", "f16", "bf16_w8", "f16_w8", "bf16_w4", "f16_w4"),
    *("bf16_w8_prefill", "f16_w8_prefill", "bf16_w4_prefill", "f16_w4_prefill"),
    *("bf16_w8x8", "f16_w8x8", "bf16_w4x8", "f16_w4x8"),
)

MAIN = "hip/moepad.hip"
PACKAGE = Path(__file__).resolve().parent
OPTIONS = ("-std=c++17", "-O3")
CLANG_OPTIONS = (
    "-x", "hip", "--offload-device-only", "-nogpuinc", "-nogpulib", "--no-gpu-bundle-output",
)  # fmt: skip
# Functions that are neither the host's nor the device's, such as those of a constant expression.
NVRTC_OPTIONS = (OPTIONS[0], "-default-device")
CLANGS = ("clang-22", "clang-21", "clang-20", "clang-19", "clang")


class CompileError(UnsupportedError):
    """Every compiler found refused, or none was found; the message has what each said."""


@dataclass(frozen=True)
class Compiler:
    """A compiler that was found, and something that differs between its versions."""

    name: str
    path: str
    version: str
    build: Callable[[str, str], bytes]  # of a source text, for an architecture


def vendor_of(arch: str) -> str:
    """Return "amd" or "nvidia", by the way the vendors name architectures."""
    return "amd" if arch.startswith("gfx") else "nvidia"


def image(arch: str, part: str) -> bytes:
    """One part of the kernels for one architecture, from the first place that has it.

    Parameters
    ----------
    arch : str
        "gfx942", "sm_90a".
    part : str
        One of `PARTS`.

    Returns
    -------
    bytes
        A code object (AMD) or a cubin (NVIDIA).

    Raises
    ------
    UnsupportedError
        No kernels for this architecture, or no image and no compiler that makes one; says where was
        looked.
    """
    if arch not in ARCHS:
        raise UnsupportedError(
            f"no kernels for GPUs of architecture {arch}; there are kernels for {', '.join(ARCHS)}"
        )
    if found := find_image(arch, part):
        return found.read_bytes()
    try:
        made_by, made = make_image(arch, part, announce=sys.stderr.isatty())
    except CompileError as error:
        raise UnsupportedError(
            f"no device image for {arch} ({part}): none in "
            f"{', '.join(map(str, image_folders()))}; {error}; make one elsewhere with 'python -m "
            f"moepad compile --arch {arch} --part {part} --out DIR' and set MOEPAD_IMAGES=DIR"
        ) from error
    with contextlib.suppress(OSError):  # a cache that cannot be written to costs time only
        _write(cache_folder() / image_name(arch, part, made_by), made)
    return made


def keep_image(arch: str, part: str, folder: Path) -> tuple[Path, Compiler]:
    """Compile a part of the kernels for `arch` into `folder`, which is made if missing.

    Raises
    ------
    UnsupportedError
        No compiler made it; says what each said.
    OSError
        The folder cannot be written to.
    """
    made_by, made = make_image(arch, part)
    path = folder / image_name(arch, part, made_by)
    _write(path, made)
    return path, made_by


def make_image(arch: str, part: str, announce: bool = False) -> tuple[Compiler, bytes]:
    """Compile a part of the kernels for `arch`; with `announce`, say so on stderr."""
    refusals = []
    text = source(part)
    for compiler in find_compilers(vendor_of(arch)):
        start = time.monotonic()
        if announce:
            print(f"moepad: compiling {part} kernels for {arch} with {compiler.name} ...",
                  end=" ", file=sys.stderr, flush=True)  # fmt: skip
        try:
            made = compiler.build(text, arch)
        except CompileError as error:
            refusals.append(f"{compiler.name} ({compiler.path}): {error}")
            if announce:
                print("refused", file=sys.stderr)
            continue
        if announce:
            print(f"{time.monotonic() - start:.1f} s", file=sys.stderr)
        return compiler, made
    raise CompileError("; ".join(refusals) or f"no compiler found for {arch}")


# Where images are.


def cache_folder() -> Path:
    """Where images made at first use are kept: MOEPAD_CACHE, else the user's cache folder."""
    if named := os.environ.get("MOEPAD_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moepad"


def image_folders() -> list[Path]:
    """Folders that may hold images, in the order they are looked at."""
    named = os.environ.get("MOEPAD_IMAGES")
    return [*([Path(named)] if named else []), PACKAGE / "images", cache_folder()]


def image_name(arch: str, part: str, compiler: Compiler) -> str:
    """File name of the image of the present sources and options by that compiler."""
    return f"{_name_start(arch, part)}{_digest(compiler.name, compiler.version)}.co"


def find_image(arch: str, part: str) -> Path | None:
    """The latest image of the present sources in the first folder that has one."""
    start = _name_start(arch, part)
    for folder in image_folders():
        found = [path for path in folder.glob(f"{start}*.co") if path.is_file()]
        if found:
            return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
    return None


def _name_start(arch: str, part: str) -> str:
    return f"moepad-{arch}-{part}-{_digest(*OPTIONS, *CLANG_OPTIONS, source(part))}-"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, whatever other processes write there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# Sources.


def source_folder() -> Path:
    """The folder that has hip/ and csrc/: in the package once installed, else the checkout."""
    for folder in (PACKAGE / "kernels", PACKAGE.parents[1]):
        if (folder / MAIN).is_file():
            return folder
    raise CompileError(f"the kernels' sources are missing from {PACKAGE / 'kernels'}")


def source(part: str) -> str:
    """A part's kernels as one text: includes inlined, so that every compiler takes it as it is."""
    return f"#define MPAD_PART MPAD_PART_{part.upper()}\n{_whole_source()}"


@functools.cache
def _whole_source() -> str:
    return "\n".join(_inline(source_folder(), MAIN, set()))


def _inline(folder: Path, name: str, once: set[str]) -> list[str]:
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((folder / name).read_text().splitlines(), start=1):
        if re.match(r"\s*#\s*pragma\s+once\b", line):
            once.add(name)
            lines.append("")
        elif match := re.match(r'\s*#\s*include\s+"([^"]+)"', line):
            included = os.path.normpath(os.path.join(os.path.dirname(name), match[1]))
            if included not in once:
                lines += _inline(folder, included, once)
            lines.append(f'#line {number + 1} "{name}"')
        else:
            lines.append(line)
    return lines


# Compilers that are programs.


def find_compilers(vendor: str) -> Iterator[Compiler]:
    """Compilers for the vendor's devices, best first, each looked for only when asked for."""
    if vendor == "amd":
        roots = [root for _, root in runtimes.rocm_roots()]
        yield from _libraries("amd", "hiprtc")
        yield from _programs(
            "clang", [*_on_path(*CLANGS), *[root / "llvm/bin/clang" for root in roots]], _run_clang
        )
        yield from _programs(
            "hipcc", [*_on_path("hipcc"), *[root / "bin/hipcc" for root in roots]], _run_hipcc
        )
    else:
        yield from _libraries("nvidia", "nvrtc")
        yield from _programs(
            "nvcc",
            [*_on_path("nvcc"), *[root / "bin/nvcc" for root in runtimes.cuda_roots()]],
            _run_nvcc,
        )


def _on_path(*names: str) -> list[Path]:
    return [Path(path) for name in names if (path := shutil.which(name))]


def _programs(
    name: str, paths: Sequence[Path], build: Callable[[Path, str, str], bytes]
) -> Iterator[Compiler]:
    seen = set()
    for path in paths:
        real = path.resolve()
        if not os.access(real, os.X_OK) or real in seen:
            continue
        seen.add(real)
        facts = real.stat()
        version = f"{real} {facts.st_size} {facts.st_mtime_ns}"
        yield Compiler(name, str(path), version, partial(build, path))


def _run_clang(path: Path, text: str, arch: str) -> bytes:
    return _run([path, *CLANG_OPTIONS, *OPTIONS, f"--offload-arch={arch}"], text, "moepad.hip")


def _run_hipcc(path: Path, text: str, arch: str) -> bytes:
    options = ["--genco", "--no-gpu-bundle-output", f"--offload-arch={arch}"]
    return _run([path, *options, *OPTIONS], text, "moepad.hip")


def _run_nvcc(path: Path, text: str, arch: str) -> bytes:
    code = f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}"
    return _run([path, "-x", "cu", "-cubin", code, *OPTIONS], text, "moepad.cu")


def _run(command: Sequence[Path | str], text: str, name: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="moepad-") as folder:
        (Path(folder) / name).write_text(text)
        out = Path(folder) / "image"
        try:
            done = subprocess.run(
                [*command, "-o", out, name], cwd=folder, capture_output=True, text=True
            )
        except OSError as error:
            raise CompileError(str(error)) from error
        if done.returncode != 0 or not out.is_file():
            raise CompileError(_errors_of(done.stderr or f"exit status {done.returncode}"))
        return out.read_bytes()


def _errors_of(log: str) -> str:
    """The first lines of a compiler's output that say what is wrong."""
    lines = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines()
    return " | ".join(lines[:4]) or "no message"


# Compilers that are libraries: one C interface under two prefixes.


def _libraries(vendor: str, prefix: str) -> Iterator[Compiler]:
    for path in runtimes.compiler_libraries(vendor):
        try:
            library = ctypes.CDLL(path)
            major, minor = ctypes.c_int(), ctypes.c_int()
            _call(library, prefix, "Version", ctypes.byref(major), ctypes.byref(minor))
        except (OSError, AttributeError, CompileError):
            continue
        version = f"{major.value}.{minor.value}"
        yield Compiler(prefix, path, version, partial(_call_compiler, library, prefix))
        return


def _call(library: ctypes.CDLL, prefix: str, name: str, *arguments: object) -> None:
    code = getattr(library, prefix + name)(*arguments)
    if code != 0:
        describe = getattr(library, f"{prefix}GetErrorString")
        describe.restype = ctypes.c_char_p
        text = (describe(code) or b"?").decode(errors="replace")
        raise CompileError(f"{prefix}{name}: error {code} ({text})")


def _call_compiler(library: ctypes.CDLL, prefix: str, text: str, arch: str) -> bytes:
    call = partial(_call, library, prefix)
    is_amd = prefix == "hiprtc"
    options = [f"--offload-arch={arch}", *OPTIONS] if is_amd else [f"-arch={arch}", *NVRTC_OPTIONS]
    program = ctypes.c_void_p()
    call("CreateProgram", ctypes.byref(program), text.encode(), b"moepad.hip", 0, None, None)
    try:
        flags = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        try:
            call("CompileProgram", program, len(options), flags)
        except CompileError as error:
            log = _fetch(call, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise CompileError(f"{error}: {_errors_of(log)}") from None
        return _fetch(call, program, "Code" if is_amd else "CUBIN")
    finally:
        call("DestroyProgram", ctypes.byref(program))


def _fetch(call: Callable[..., None], program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    call(f"Get{what}Size", program, ctypes.byref(size))
    data = ctypes.create_string_buffer(max(size.value, 1))
    call(f"Get{what}", program, data)
    return data.raw[: size.value]
