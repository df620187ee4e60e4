"""The layers of docs/architecture.md, enforced: include and import order, fences, file headers.

The tables of that page are the data of these tests: a new file is listed there or fails here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require_tool
from csources import ISA_FLAGS, ROOT, SOURCES

CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "moepad"
C_FILES = sorted(path for path in CSRC.iterdir() if path.suffix in (".c", ".h"))
TABLES = {"variants.def"}  # lists that files include
PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
ALL_PYTHON = sorted(
    path
    for folder in ("python", "tests", "bench")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)


def levels(title: str) -> dict[str, int]:
    """File to level, from the table of docs/architecture.md whose second column is `title`."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split(f"| {title} |", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", table, flags=re.MULTILINE)
    return {name: int(level) for level, names in rows for name in re.findall(r"`([^`]+)`", names)}


KERNEL_LEVEL = levels("kernel files in `csrc/`")
C_LEVEL = levels("files in `csrc/`") | KERNEL_LEVEL
PYTHON_LEVEL = levels("files in `python/moepad/`")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(path: Path) -> str:
    """A C file's text without comments and strings."""
    return re.sub(
        r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', '""', path.read_text(), flags=re.DOTALL
    )


def test_tables_list_every_file() -> None:
    assert set(C_LEVEL) == {path.name for path in C_FILES} | TABLES
    python_files = {str(path.relative_to(PACKAGE)) for path in PYTHON_FILES}
    assert set(PYTHON_LEVEL) == python_files | {"_core.pyi"}


def test_setup_lists_every_source() -> None:
    listed = {*SOURCES, *ISA_FLAGS}
    assert listed == {relative(path) for path in C_FILES if path.suffix == ".c"}


@pytest.mark.parametrize("path", C_FILES, ids=relative)
def test_include_order(path: Path) -> None:
    included = re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), flags=re.MULTILINE)
    for name in included:
        assert name in C_LEVEL, f"{path.name} includes {name}, which no level has"
        assert name not in KERNEL_LEVEL or path.name in KERNEL_LEVEL, (
            f"{path.name} includes {name}, which is for kernel files"
        )
        is_own = name == path.with_suffix(".h").name
        assert is_own or C_LEVEL[name] < C_LEVEL[path.name], (
            f"{path.name} (level {C_LEVEL[path.name]}) includes {name} (level {C_LEVEL[name]})"
        )


@pytest.mark.parametrize("path", C_FILES, ids=relative)
def test_c_header(path: Path) -> None:
    """A C file opens by saying its level, the one of the table."""
    match = re.match(r"/\* Level (\d+)\b", path.read_text())
    assert match, f"{path.name} does not open with '/* Level N'"
    assert int(match[1]) == C_LEVEL[path.name]


@pytest.mark.parametrize("path", ALL_PYTHON, ids=relative)
def test_python_header(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def module_of(name: str) -> str:
    return ".".join(("moepad", *Path(name).with_suffix("").parts)).removesuffix(".__init__")


FILE_OF_MODULE = {module_of(name): name for name in PYTHON_LEVEL}


def imported(path: Path) -> set[str]:
    """Files of the package that a file of it imports anywhere, as named in the table."""
    package = ("moepad", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {FILE_OF_MODULE.get(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            for alias in node.names:
                found.add(FILE_OF_MODULE.get(f"{module}.{alias.name}", FILE_OF_MODULE.get(module)))
    return {name for name in found if name}


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_import_order(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    for other in imported(path) - {name}:
        assert PYTHON_LEVEL[other] < PYTHON_LEVEL[name], (
            f"{name} (order {PYTHON_LEVEL[name]}) imports {other} (order {PYTHON_LEVEL[other]})"
        )


# What only some files of csrc may say: pattern, those files, why.
FENCES = [
    (
        r"\b_mm\d*_\w+|\b__m(?:128|256|512)|\b(?:immintrin|x86intrin|arm_neon)\b|\b__builtin_ia32\w*",
        (*(Path(name).name for name in ISA_FLAGS), "cpu_vector512.h", "cpu_pairs.h"),
        "vector intrinsics live in the instruction set files",
    ),
    (r"\b__builtin_cpu_\w+|\b__?(?:get_)?cpuid\w*", ("cpu.c",), "cpu.c chooses the set"),
    (r"\bnumpy/|\bNPY_\w+|\bPyArray\w*", ("tensor.c", "module.c"), "tensor.c knows NumPy"),
    (
        r"\bPy[A-Z]\w*|\bPy_\w+",
        ("tensor.h", "tensor.c", "device.h", "device.c", "memory.h", "memory.c", "module.c"),
        "who knows Python",
    ),
    (r"\bPyMethodDef\b|\bPyModuleDef\b|\bPyInit_\w+", ("module.c",), "one method table"),
    (r"\bPyErr_Set\w*|\bPyErr_Format\b", ("tensor.c", "module.c"), "the core does not raise"),
    (r"\b(?:v?f?printf|puts|perror|exit|abort)\s*\(", (), "nothing in the core prints or exits"),
    (r"\bgetenv\s*\(", ("cpu.c", "pool.c", "module.c"), "the environment is read in few places"),
    (r"\bpthread_create\b|\bfork\s*\(", ("pool.c",), "pool.c owns the threads"),
    (r"\bhip(?:rtc)?[A-Z]\w*", ("gpu_hip.c",), "gpu_hip.c has HIP's names"),
    (r"\b(?:cu[A-Z]|cuda[A-Z]|CU[a-z])\w*", ("gpu_cuda.c",), "gpu_cuda.c has CUDA's names"),
    (r"\bdl(?:open|sym|info|error)\b", ("library.c", "gpu_hip.c", "gpu_cuda.c"), "who opens"),
    (r"#\s*pragma\s+omp\b", (), "no OpenMP"),
]


@pytest.mark.parametrize(("pattern", "allowed", "why"), FENCES, ids=[row[2] for row in FENCES])
def test_fence(pattern: str, allowed: tuple[str, ...], why: str) -> None:
    for path in C_FILES:
        if path.name not in allowed:
            found = re.search(pattern, code_of(path) + includes_of(path))
            assert not found, f"{path.name} has {found and found[0]!r}, but {why}"


def includes_of(path: Path) -> str:
    return "\n".join(re.findall(r"^\s*#\s*include\s+(\S+)", path.read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("path", C_FILES, ids=relative)
def test_c_names(path: Path) -> None:
    """A function that is not static has the prefix; a static one has not."""
    definition = re.compile(r"^(\w[\w *]*?)(\w+)\([^;{}]*\)\n\{", re.MULTILINE)
    for qualifiers, name in definition.findall(code_of(path)):
        is_static = bool({"static", "INLINE"} & set(qualifiers.split()))
        assert is_static != name.startswith(("mpad_", "PyInit_")), f"{qualifiers}{name}"


def test_no_catch_all_files() -> None:
    pattern = re.compile(r"(?:^|_)(?:utils?|helpers?|misc|common)\d*$")
    files = [*C_FILES, *PYTHON_FILES]
    assert not [relative(path) for path in files if pattern.search(path.stem)]


def test_extension_exports_its_init_only() -> None:
    from moepad import _core

    tool = require_tool("nm", "nm", "llvm-nm-22")
    done = subprocess.run(
        [tool, "-D", "--defined-only", _core.__file__], capture_output=True, text=True, check=True
    )
    symbols = {line.split()[-1] for line in done.stdout.splitlines()}
    sanitizer = re.compile(r"^_?_?(?:asan|ubsan|odr_asan)|^_(?:init|fini|edata|end)$|^__bss_start$")
    assert {name for name in symbols if not sanitizer.match(name)} == {"PyInit__core"}


def test_import_takes_no_framework() -> None:
    code = (
        "import sys, moepad; print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'transformers', 'jax', 'cupy', 'tqdm', 'safetensors', 'argparse'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
