"""The lane maps of hip/mma.h against the published register layouts of the matrix instructions.

The maps are compiled for the host; a slab is then carried out on integers the way the instruction
is documented to, from fragments placed by the maps, and must equal the plain product.
"""

import itertools
import json
import pathlib
import subprocess

import numpy as np
import pytest
from conftest import require_tool

HEADER = pathlib.Path(__file__).resolve().parents[1] / "hip" / "mma.h"

PROGRAM = """
#include <cstdio>
#define MPAD_MAP_HOST 1
#include "{header}"
int main()
{{
    const int wave = {wave};
    printf("{{\\"tokens\\": %d, \\"acc\\": %d, \\"maps\\": [", TOKENS, ACC);
    const char *sep = "";
    for (int lane = 0; lane < wave; lane++) {{
        printf("%s{{\\"w\\": [", sep);
        for (int i = 0; i < WEIGHT_CHUNKS; i++)
            printf("%s[%d, %d]", i ? "," : "", weight_row(i, lane), weight_chunk(i, lane));
        printf("], \\"x\\": [");
        for (int i = 0; i < TOKEN_CHUNKS; i++)
            printf("%s[%d, %d]", i ? "," : "", token_row(i, lane), token_chunk(i, lane));
        printf("], \\"d\\": [");
        for (int i = 0; i < ACC; i++)
            printf("%s[%d, %d]", i ? "," : "", acc_token(i, lane), acc_row(i, lane));
        printf("]}}");
        sep = ",";
    }}
    puts("]}}");
}}
"""

FAMILIES = {"NVIDIA": 32, "CDNA": 64, "GFX12": 32, "GFX11": 32}


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Function from a family to its maps, compiled once."""
    compiler = require_tool("c++", "g++", "c++", "clang++-22")
    folder = tmp_path_factory.mktemp("maps")
    found = {}

    def get(family):
        if family not in found:
            source = folder / f"{family}.cc"
            source.write_text(PROGRAM.format(header=HEADER, wave=FAMILIES[family]))
            binary = folder / family
            subprocess.run(
                [compiler, "-std=c++17", f"-DMPAD_MAP_{family}", "-o", binary, source], check=True
            )
            found[family] = json.loads(subprocess.check_output(binary))
        return found[family]

    return get


def fragments(lanes, key, matrix):
    """Per lane, its chunks' elements one after the other."""
    return [
        np.concatenate([matrix[row, 8 * chunk : 8 * chunk + 8] for row, chunk in lane[key]])
        for lane in lanes
    ]


def mma_m16n8k16(a, b):
    """PTX ISA, mma.m16n8k16: a[lane] 8 elements (a0..a3 pairs), b[lane] 4; c[lane] 4."""
    left, right = np.zeros((16, 16), int), np.zeros((16, 8), int)
    for lane, e in itertools.product(range(32), range(2)):
        g, q = lane >> 2, lane & 3
        for pair in range(4):
            left[g + 8 * (pair & 1), 2 * q + 8 * (pair >> 1) + e] = a[lane][2 * pair + e]
        for pair in range(2):
            right[2 * q + 8 * pair + e, g] = b[lane][2 * pair + e]
    product = left @ right
    return [
        [product[(lane >> 2) + 8 * (i >> 1), 2 * (lane & 3) + (i & 1)] for i in range(4)]
        for lane in range(32)
    ]


def slab_nvidia(w, x):
    """slab() of hip/mma.h: two k steps; tokens 8 to 15 have no product."""
    acc = np.zeros((32, 8), int)
    for half in range(2):
        # Words of the rows' chunks: two k of row g, of row g + 8, two more k of each.
        words = [4 * half, 8 + 4 * half, 4 * half + 2, 8 + 4 * half + 2]
        a = [np.concatenate([f[at : at + 2] for at in words]) for f in w]
        b = [f[4 * half : 4 * half + 4] for f in x]
        acc[:, :4] += np.array(mma_m16n8k16(a, b))
    return acc


def matrix_product(w, x, k_of, k, result_of, acc_count):
    """A B for A[lane & 15, k] = w[lane][i], B[k, lane & 15] = x[lane][i], k = k_of(lane, i)."""
    a, b = np.zeros((16, k), int), np.zeros((k, 16), int)
    for lane, fragment in enumerate(w):
        for i, value in enumerate(fragment):
            a[lane & 15, k_of(lane, i)] = value
            b[k_of(lane, i), lane & 15] = x[lane][i]
    product = a @ b
    return np.array(
        [[product[result_of(lane, i)] for i in range(acc_count)] for lane in range(len(w))]
    )


def slab_cdna(w, x, k):
    """AMD matrix instruction calculator: v_mfma_f32_16x16x16 and 16x16x32, 4 or 8 k per lane."""
    each = k // 4

    def one(h):
        part = slice(each * h, each * h + each)
        return matrix_product(
            [f[part] for f in w],
            [f[part] for f in x],
            lambda lane, i: each * (lane >> 4) + i,
            k,
            lambda lane, i: (4 * (lane >> 4) + i, lane & 15),
            4,
        )

    return sum(one(h) for h in range(32 // k))


def slab_gfx12(w, x):
    """RDNA4 ISA, v_wmma_f32_16x16x16 wave32: lane halves hold k 0-7 and 8-15."""
    return sum(
        matrix_product(
            [f[8 * h : 8 * h + 8] for f in w],
            [f[8 * h : 8 * h + 8] for f in x],
            lambda lane, i: 8 * (lane >> 4) + i,
            16,
            lambda lane, i: (8 * (lane >> 4) + i, lane & 15),
            8,
        )
        for h in range(2)
    )


def slab_gfx11(w, x):
    """RDNA3 ISA, v_wmma_f32_16x16x16 wave32: both lane halves hold all 16 k of their row."""
    for lane in range(16):
        assert (w[lane] == w[lane + 16]).all() and (x[lane] == x[lane + 16]).all()
    return sum(
        matrix_product(
            [f[16 * h : 16 * h + 16] for f in w],
            [f[16 * h : 16 * h + 16] for f in x],
            lambda lane, i: i,
            16,
            lambda lane, i: (2 * i + (lane >> 4), lane & 15),
            8,
        )
        for h in range(2)
    )


SLABS = {
    "mma.m16n8k16": ("NVIDIA", slab_nvidia),
    "mfma 16x16x16": ("CDNA", lambda w, x: slab_cdna(w, x, 16)),
    "mfma 16x16x32": ("CDNA", lambda w, x: slab_cdna(w, x, 32)),
    "wmma gfx12": ("GFX12", slab_gfx12),
    "wmma gfx11": ("GFX11", slab_gfx11),
}


@pytest.mark.parametrize("name", SLABS)
def test_slab(maps, name):
    family, slab = SLABS[name]
    m = maps(family)
    rng = np.random.default_rng(0)
    weights = rng.integers(-9, 9, (16, 32))
    tokens = rng.integers(-9, 9, (m["tokens"], 32))
    acc = slab(fragments(m["maps"], "w", weights), fragments(m["maps"], "x", tokens))
    expected = tokens @ weights.T
    seen = set()
    for lane, values in zip(m["maps"], acc, strict=True):
        for (token, row), value in zip(lane["d"], values, strict=True):
            if token < m["tokens"]:
                assert value == expected[token, row]
                seen.add((token, row))
            else:
                assert value == 0
    assert len(seen) == 16 * m["tokens"]


# Bytes per lane of an instruction, and the k of byte i of a lane in group g of four.
BYTE_PRODUCTS = {
    "mfma 16x16x16 i8": (4, lambda g, i: 4 * g + i),
    "mfma 16x16x32 fp8, i8": (8, lambda g, i: 8 * g + i),
    "mfma 16x16x64 i8": (16, lambda g, i: 16 * g + i),
    "mfma 16x16x128 f8f6f4": (32, lambda g, i: 64 * (i // 16) + 16 * g + i % 16),
}


@pytest.mark.parametrize("name", BYTE_PRODUCTS)
def test_bytes(maps, name):
    """A fragment of bytes, both steps' chunks of a row, in parts as the instruction takes them."""
    each, k_of = BYTE_PRODUCTS[name]
    m = maps("CDNA")["maps"]
    rng = np.random.default_rng(1)
    weights, tokens = rng.integers(-9, 9, (2, 16, 128))

    def fragment(lane, key, matrix):
        ((row, chunk),) = lane[key]
        return np.concatenate([matrix[row, 16 * (4 * s + chunk) :][:16] for s in range(2)])

    w = [fragment(lane, "x", weights) for lane in m]
    x = [fragment(lane, "x", tokens) for lane in m]
    acc = sum(
        matrix_product(
            [f[at : at + each] for f in w],
            [f[at : at + each] for f in x],
            lambda lane, i: k_of(lane >> 4, i),
            4 * each,
            lambda lane, i: (4 * (lane >> 4) + i, lane & 15),
            4,
        )
        for at in range(0, 32, each)
    )
    expected = tokens @ weights.T
    for lane, values in zip(m, acc, strict=True):
        for (token, row), value in zip(lane["d"], values, strict=True):
            assert value == expected[token, row]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_once(maps, family):
    """Weights and accumulators are covered evenly: each the same number of times."""
    m = maps(family)
    for key, count in (("w", 16 * 4), ("x", m["tokens"] * 4)):
        all_chunks = [tuple(c) for lane in m["maps"] for c in lane[key]]
        assert len(set(all_chunks)) == count
        assert len(all_chunks) % count == 0
    places = [tuple(d) for lane in m["maps"] for d in lane["d"]]
    assert len(places) == len(set(places))
