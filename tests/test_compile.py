"""Every kernel of csrc/variants.def compiles with -Werror for every target, within its budget.

AMD: registers, scratch, spills and waves per SIMD as clang reports them, and no loop over lanes
around a buffer load ("waterfall"). NVIDIA: registers and spills as ptxas reports them.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from compile_budget import AMD, MFMA_USE, NVIDIA, SGPR_SPILLS
from conftest import require_tool
from moepad import compiler

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ROOT / "hip" / "moepad.hip"


def variants() -> list[tuple[str, str]]:
    """Symbols of variants.def, as (family, symbol)."""
    text = (ROOT / "csrc" / "variants.def").read_text()
    return re.findall(r"^MPAD_(\w+)\((\w+),", text, re.M)


def budget_of(table, symbol):
    """The first entry whose pattern matches the symbol: a missing one is a failure."""
    for pattern, budget in table.items():
        if re.fullmatch(pattern, symbol):
            return budget
    raise AssertionError(f"{symbol}: no budget in tests/compile_budget.py")


def compile_parts(command: Callable[[pathlib.Path], Sequence[str]], folder: pathlib.Path):
    """What the compiler says and writes, of all parts, a part per processor at a time."""

    def one(part: str) -> tuple[str, str]:
        out = folder / part
        run = subprocess.run(
            [*command(out), f"-DMPAD_PART=MPAD_PART_{part.upper()}", str(SOURCE)],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout + run.stderr, out.read_text(errors="replace")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said, written = zip(*pool.map(one, compiler.PARTS), strict=True)
    return "\n".join(said), list(written)


@pytest.fixture(scope="module")
def amd(tmp_path_factory):
    """Function from an architecture to (remarks per symbol, assembly texts), compiled once."""
    clang = require_tool("clang", *compiler.CLANGS)
    done = {}

    def get(arch):
        if arch not in done:
            options = [
                *compiler.CLANG_OPTIONS, *compiler.OPTIONS, f"--offload-arch={arch}", "-S",
                "-Wall", "-Wextra", "-Werror", "-Rpass-analysis=kernel-resource-usage", "-o",
            ]  # fmt: skip
            said, texts = compile_parts(
                lambda out: [clang, *options, str(out)], tmp_path_factory.mktemp(arch)
            )
            done[arch] = remarks_of(said), texts
        return done[arch]

    return get


def remarks_of(text):
    """Numbers per symbol, as clang reports them."""
    remarks, name = {}, None
    for line in text.splitlines():
        if m := re.search(r"remark:.* (?:Function )?Name: (\w+)", line):
            name = m[1]
            remarks[name] = {}
        elif m := re.search(r"remark:\s+(?:\S+:\s+)?([A-Za-z][\w /\[\]]*): (\d+)", line):
            remarks[name][m[1].strip()] = int(m[2])
    return remarks


def image_symbols(arch):
    """The symbols an image for the target holds; see hip/tile.h and hip/mma.h."""
    for family, symbol in variants():
        if family.endswith(("_WARPGROUP", "_DECODED", "_BYTES")) and arch != "sm_90a":
            continue
        if family.endswith("_BYTES_TILE") and arch.startswith("sm_"):
            continue
        if family.endswith(("_TILE", "_CODED", "CODES")) and arch.startswith("gfx1"):
            continue
        yield symbol


@pytest.mark.parametrize("arch", AMD)
def test_amd_budget(amd, arch):
    remarks, _ = amd(arch)
    symbols = set(image_symbols(arch))
    assert set(remarks) == symbols
    over = []
    for symbol in sorted(symbols):
        r = remarks[symbol]
        registers, waves = budget_of(AMD[arch], symbol)
        scratch = next(v for k, v in r.items() if k.startswith("ScratchSize"))
        occupancy = next(v for k, v in r.items() if k.startswith("Occupancy"))
        if r["VGPRs"] + r.get("AGPRs", 0) > registers or occupancy < waves:
            over.append(f"{symbol}: {r['VGPRs']} VGPRs, {occupancy} waves; {registers}, {waves}")
        if scratch or r["VGPRs Spill"]:
            over.append(f"{symbol}: scratch {scratch}, VGPR spills {r['VGPRs Spill']}")
        if r["SGPRs Spill"] > budget_of(SGPR_SPILLS, symbol):
            over.append(f"{symbol}: {r['SGPRs Spill']} SGPR spills")
    assert not over, "\n".join(over)


def waterfalls(text):
    """Loops over the lanes that hold one buffer resource each.

    Few instructions between a label and the branch back to it, in which the resource is read from
    the first lane and compared with every lane's.
    """
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.LBB\w+):", line))}
    for i, line in enumerate(lines):
        m = re.match(r"\s+s_cbranch_execnz (\.LBB\w+)", line)
        if m and 0 < i - labels.get(m[1], i) < 60:
            body = "\n".join(lines[labels[m[1]] : i])
            if all(re.search(p, body) for p in ("v_readfirstlane", "v_cmp_eq_u", "buffer_load")):
                yield body


@pytest.mark.parametrize("arch", AMD)
def test_no_waterfall(amd, arch):
    assert not [loop for text in amd(arch)[1] for loop in waterfalls(text)]


def test_waterfall_is_seen(tmp_path):
    """The check finds the loop that clang makes of a resource that differs between lanes."""
    source = tmp_path / "loop.hip"
    source.write_text(
        """
        extern "C" __attribute__((global)) void k(int **p, int *out)
        {
            int t = __builtin_amdgcn_workitem_id_x();
            auto r = __builtin_amdgcn_make_buffer_rsrc(p[t], 0, 64, 0x27000);
            out[t] = __builtin_amdgcn_raw_buffer_load_b32(r, 0, 0, 0);
        }
        """
    )
    out = tmp_path / "loop.s"
    subprocess.run(
        [
            require_tool("clang", *compiler.CLANGS), *compiler.CLANG_OPTIONS, *compiler.OPTIONS,
            "--offload-arch=gfx942", "-S", "-o", str(out), str(source),
        ],
        check=True,
    )  # fmt: skip
    assert list(waterfalls(out.read_text()))


def main_loop(text: str, symbol: str) -> list[str]:
    """The instructions of the kernel's loop that has most matrix instructions."""
    body = text[text.index(f"\n{symbol}:") :]
    lines = body[: body.index("s_endpgm")].splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.LBB\w+):", line))}
    loops = [
        lines[labels[m[1]] : i]
        for i, line in enumerate(lines)
        if (m := re.match(r"\s+s_c?branch\w* (\.LBB\w+)", line)) and labels.get(m[1], i) < i
    ]
    most = max(loops, key=lambda loop: sum("v_mfma" in line for line in loop))
    code = [line.partition(";")[0].rstrip() for line in most]
    return [line for line in code if re.match(r"\s+[a-z]", line) and "branch" not in line]


def mfma_use(loop: Sequence[str], arch: str, folder: pathlib.Path) -> float:
    """Share of the time in which a wave alone keeps the matrix unit busy, as llvm-mca has it."""
    n_turn, source = 50, folder / "loop.s"
    source.write_text("\n".join(loop) + "\n")
    command = [require_tool("llvm-mca", "llvm-mca-22", "llvm-mca"), "-mtriple=amdgcn"]
    said = subprocess.run(
        [*command, f"-mcpu={arch}", f"-iterations={n_turn}", str(source)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    cycles = int(re.search(r"Total Cycles:\s+(\d+)", said)[1]) / n_turn
    busy = [float(m[1]) for m in re.finditer(r"^\s*\d+\s+\d+\s+([\d.]+)\s.*v_mfma", said, re.M)]
    assert len(busy) == sum("v_mfma" in line for line in loop) > 0
    return sum(busy) / cycles


@pytest.mark.parametrize("arch", MFMA_USE)
def test_main_loops_keep_the_matrix_unit_busy(amd, arch, tmp_path):
    text = "\n".join(amd(arch)[1])
    low = []
    for pattern, least in MFMA_USE[arch].items():
        symbols = [symbol for _, symbol in variants() if re.fullmatch(pattern, symbol)]
        assert symbols, pattern
        for symbol in symbols:
            if (use := mfma_use(main_loop(text, symbol), arch, tmp_path)) < least:
                low.append(f"{symbol}: {use:.3f} of the time, expected {least}")
    assert not low, "\n".join(low)


@pytest.mark.parametrize("arch", NVIDIA)
def test_nvidia_budget(arch, tmp_path):
    nvcc = require_tool("nvcc")
    number = arch.removeprefix("sm_")
    options = [
        nvcc, "-x", "cu", *compiler.OPTIONS, f"-gencode=arch=compute_{number},code={arch}",
        "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v", "-o",
    ]  # fmt: skip
    text, _ = compile_parts(lambda out: [*options, str(out)], tmp_path)
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        r".*?Used (\d+) registers",
        text,
        re.S,
    )
    assert {f[0] for f in found} == set(image_symbols(arch))
    over = [
        f"{symbol}: {used} registers, stack {stack}, spills {spilled}"
        for symbol, stack, spilled, used in found
        if int(used) > budget_of(NVIDIA[arch], symbol) or int(stack) or int(spilled)
    ]
    assert not over, "\n".join(over)
