"""Matrix instructions against NumPy: register layouts, exact on small integers."""

import numpy as np
import pytest

from emulator import Device, formats
from emulator.support import compile_text

HEAD = '#include "hipmin.h"\n'


def run(arch, text, arrays, name="k", block=64, **kw):
    d = Device(arch, **kw)
    m = d.load(compile_text(HEAD + text, arch))
    for a in arrays:
        d.register(a)
    m.kernels[name].launch(1, block, list(arrays))


def plain(operand, element, n, builtin, name="k"):
    """Source of a kernel that runs one instruction on what each lane finds."""
    acc = f"{element} __attribute__((ext_vector_type({n})))" if n > 1 else element
    return f"""typedef {acc} T_{name};
KERNEL(64) {name}(const {operand} *a, const {operand} *b, const T_{name} *c, T_{name} *o)
{{
    o[TID] = __builtin_amdgcn_{builtin}(a[TID], b[TID], c[TID], 0, 0, 0);
}}
"""


# (builtin, architectures, M, K, elements per lane, vector type, element dtype)
DENSE = [
    ("mfma_f32_16x16x16bf16_1k", ("gfx90a", "gfx942", "gfx950"), 16, 16, 4, "s16x4", "bf16"),
    ("mfma_f32_32x32x8bf16_1k", ("gfx90a", "gfx942", "gfx950"), 32, 8, 4, "s16x4", "bf16"),
    ("mfma_f32_16x16x16f16", ("gfx90a", "gfx942", "gfx950"), 16, 16, 4, "h16x4", "f16"),
    ("mfma_f32_32x32x8f16", ("gfx90a", "gfx942", "gfx950"), 32, 8, 4, "h16x4", "f16"),
    ("mfma_f32_16x16x32_bf16", ("gfx950",), 16, 32, 8, "bf16x8", "bf16"),
    ("mfma_f32_32x32x16_bf16", ("gfx950",), 32, 16, 8, "bf16x8", "bf16"),
    ("mfma_f32_16x16x32_f16", ("gfx950",), 16, 32, 8, "h16x8", "f16"),
    ("mfma_f32_32x32x16_f16", ("gfx950",), 32, 16, 8, "h16x8", "f16"),
    ("mfma_f32_16x16x32_fp8_fp8", ("gfx942", "gfx950"), 16, 32, 8, "long", "fp8"),
    ("mfma_f32_16x16x32_bf8_bf8", ("gfx942", "gfx950"), 16, 32, 8, "long", "bf8"),
    ("mfma_f32_32x32x16_fp8_fp8", ("gfx942", "gfx950"), 32, 16, 8, "long", "fp8"),
    ("mfma_i32_16x16x16i8", ("gfx90a",), 16, 16, 4, "int", "i8"),
    ("mfma_i32_16x16x64_i8", ("gfx950",), 16, 64, 16, "i32x4", "i8"),
    ("mfma_i32_16x16x32_i8", ("gfx942", "gfx950"), 16, 32, 8, "long", "i8"),
    ("mfma_i32_32x32x16_i8", ("gfx942", "gfx950"), 32, 16, 8, "long", "i8"),
    ("mfma_f32_16x16x4f32", ("gfx90a", "gfx942", "gfx950"), 16, 4, 1, "float", "f32"),
    ("mfma_f32_32x32x2f32", ("gfx90a", "gfx942", "gfx950"), 32, 2, 1, "float", "f32"),
]


def dense_source(arch):
    """One kernel for each instruction of the table that the target has, of its name."""
    return "".join(
        plain(vector, "int" if kind == "i8" else "float", M * M // 64, builtin, builtin)
        for builtin, archs, M, _, _, vector, kind in DENSE
        if arch in archs
    )


def random_codes(kind, shape, rng, arch):
    """(raw storage array, float64 values) of a random matrix."""
    if kind == "bf16":
        raw = (rng.normal(size=shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return raw, formats.bf16_decode(raw).astype(float)
    if kind == "f16":
        raw = rng.normal(size=shape).astype(np.float16)
        return raw, raw.astype(float)
    if kind == "f32":
        raw = rng.normal(size=shape).astype(np.float32)
        return raw, raw.astype(float)
    if kind == "i8":
        raw = rng.integers(-128, 128, shape).astype(np.int8)
        return raw, raw.astype(float)
    fmt = formats.fp8_for(arch)[kind == "bf8"]
    values = rng.normal(size=shape)
    raw = fmt.encode(values, True).astype(np.uint8)
    return raw, fmt.decode(raw).astype(float)


@pytest.mark.parametrize(
    "arch,case",
    [(a, c) for c in DENSE for a in c[1]],
    ids=lambda v: v if isinstance(v, str) else v[0],
)
def test_dense(arch, case):
    name, _, M, K, epl, _, kind = case
    rng = np.random.default_rng(5)
    a, av = random_codes(kind, (M, K), rng, arch)
    b, bv = random_codes(kind, (M, K), rng, arch)
    groups = 64 // M

    # lane l: row l % M, elements (l // M) * epl ...
    def pack(x):
        return np.ascontiguousarray(x.reshape(M, groups, epl).transpose(1, 0, 2)).reshape(64, epl)

    nacc = M * M // 64
    integer = kind == "i8"
    c = rng.integers(-9, 9, (64, nacc)).astype(np.int32 if integer else np.float32)
    out = np.zeros_like(c)
    run(arch, dense_source(arch), [pack(a), pack(b), c, out], name)
    lane, reg = np.meshgrid(np.arange(64), np.arange(nacc), indexing="ij")
    row = 4 * groups * (reg // 4) + 4 * (lane // M) + reg % 4
    col = lane % M
    if arch == "gfx90a" and kind == "f16":  # MI200 flushes subnormal inputs of 16-bit MFMA
        av, bv = (np.where(np.abs(v) < 2.0**-14, 0, v) for v in (av, bv))
    ref = (av @ bv.T)[row, col] + c
    if integer:
        assert (out == ref).all()
    else:
        assert np.allclose(out, ref, rtol=1e-6, atol=1e-6)


FORMATS = [(0, 0), (1, 1), (1, 0), (4, 4), (2, 2), (3, 3), (0, 4), (4, 1)]


def scaled_source():
    """Kernels for each shape and pair of formats: with scales, and the form without."""
    return "".join(
        f"""KERNEL(64) k_{M}_{ka}_{kb}(const i32x8 *a, const i32x8 *b, const int *sa, const int *sb,
                           const {T} *c, {T} *o)
{{
    o[TID] = __builtin_amdgcn_mfma_scale_f32_{M}x{M}x{K}_f8f6f4(
        a[TID], b[TID], c[TID], {ka}, {kb}, 2, sa[TID], 2, sb[TID]);
}}
KERNEL(64) plain_{M}_{ka}_{kb}(const i32x8 *a, const i32x8 *b, const {T} *c, {T} *o)
{{
    o[TID] = __builtin_amdgcn_mfma_scale_f32_{M}x{M}x{K}_f8f6f4(
        a[TID], b[TID], c[TID], {ka}, {kb}, 0, 0, 0, 0);
}}
"""
        for M, K, T in ((16, 128, "f32x4"), (32, 64, "f32x16"))
        for ka, kb in FORMATS
    )


@pytest.mark.parametrize("ka,kb", FORMATS)
@pytest.mark.parametrize("M", [16, 32])
def test_f8f6f4(M, ka, kb):
    rng = np.random.default_rng(6)
    fmts = [formats.FP8_OCP, formats.BF8_OCP, formats.FP6, formats.BF6, formats.FP4]
    K, G = (128, 4) if M == 16 else (64, 2)

    def operand(k):
        fmt = fmts[k]
        codes = fmt.encode(rng.normal(size=(M, K)), True)
        scale = rng.integers(120, 134, (M, K // 32))
        plain = fmt.decode(codes).astype(float)
        value = plain * np.repeat(2.0 ** (scale - 127), 32, axis=1)
        words = np.zeros((64, 8), np.uint32)
        for lane in range(64):
            g, r = lane // M, lane % M
            if fmt.bits == 8:
                ks = np.concatenate([16 * G * c + 16 * g + np.arange(16) for c in range(2)])
            else:
                ks = 32 * g + np.arange(32)
            bits = sum(int(codes[r, x]) << (fmt.bits * i) for i, x in enumerate(ks))
            for w in range(8):
                words[lane, w] = bits >> (32 * w) & 0xFFFFFFFF
        # byte 2 of the scale register is the one selected below
        sreg = np.array(
            [int(scale[i % M, i // M]) << 16 | 0x55000011 for i in range(64)], np.uint32
        )
        return words, sreg, value, plain

    a, sa, av, ap = operand(ka)
    b, sb, bv, bp = operand(kb)
    n = M * M // 64
    c, out = rng.normal(size=(64, n)).astype(np.float32), np.zeros((64, n), np.float32)
    run("gfx950", scaled_source(), [a, b, sa, sb, c, out], f"k_{M}_{ka}_{kb}")
    lane, reg = np.meshgrid(np.arange(64), np.arange(n), indexing="ij")
    at = 4 * G * (reg // 4) + 4 * (lane // M) + reg % 4, lane % M
    assert np.allclose(out, (av @ bv.T)[at] + c, rtol=1e-6, atol=1e-6)
    run("gfx950", scaled_source(), [a, b, c, out], f"plain_{M}_{ka}_{kb}")
    assert np.allclose(out, (ap @ bp.T)[at] + c, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950"])
def test_agpr_accumulators(arch):
    rng = np.random.default_rng(7)
    a = rng.normal(size=(64, 4)).astype(np.float16)
    out = np.zeros((64, 4), np.float32)
    src = """KERNEL(64) k(const h16x4 *a, f32x4 *o)
{
    f32x4 r = {0, 0, 0, 0};
    asm volatile("v_accvgpr_write_b32 a4, 0\\n v_accvgpr_write_b32 a5, 0\\n"
                 "v_accvgpr_write_b32 a6, 0\\n v_accvgpr_write_b32 a7, 1.0\\n s_nop 8\\n"
                 "v_mfma_f32_16x16x16_f16 a[4:7], %2, %2, a[4:7]\\n s_nop 15\\n"
                 "v_accvgpr_read_b32 %0, a4\\n v_accvgpr_read_b32 %1, a7"
                 : "=&v"(r[0]), "=&v"(r[3]) : "v"(a[TID]) : "a4", "a5", "a6", "a7");
    o[TID] = r;
}"""
    src = (
        src.replace("v_mfma_f32_16x16x16_f16", "v_mfma_f32_16x16x16f16")
        if arch == "gfx90a"
        else src
    )
    run(arch, src, [a, out])
    m = a.astype(float).reshape(4, 16, 4).transpose(1, 0, 2).reshape(16, 16)
    d = m @ m.T
    for lane in range(64):
        assert np.isclose(out[lane, 0], d[4 * (lane // 16), lane % 16], rtol=1e-6)
        assert np.isclose(out[lane, 3], d[4 * (lane // 16) + 3, lane % 16] + 1, rtol=1e-6)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950"])
def test_multi_block_and_f64(arch):
    rng = np.random.default_rng(8)
    # 4x4x4, 16 blocks: block b = lane // 4
    a, b = rng.integers(-4, 5, (2, 64, 4)).astype(np.float16)
    c, out = rng.integers(-9, 9, (64, 4)).astype(np.float32), np.zeros((64, 4), np.float32)
    run(
        arch,
        plain("h16x4", "float", 4, "mfma_f32_4x4x4f16"),
        [a, b, c, out],
    )
    A, B = a.astype(float).reshape(16, 4, 4), b.astype(float).reshape(16, 4, 4)
    d = A @ B.transpose(0, 2, 1)  # [block, row, col]
    assert (out.reshape(16, 4, 4) == d.transpose(0, 2, 1) + c.reshape(16, 4, 4)).all()
    # 32x32x4, 2 blocks: block = lane // 32, block 1 in registers 16..31
    c, out = np.zeros((64, 32), np.float32), np.zeros((64, 32), np.float32)
    run(
        arch,
        plain("h16x4", "float", 32, "mfma_f32_32x32x4f16"),
        [a, b, c, out],
    )
    A, B = a.astype(float).reshape(2, 32, 4), b.astype(float).reshape(2, 32, 4)
    d = A @ B.transpose(0, 2, 1)
    lane, reg = np.meshgrid(np.arange(64), np.arange(32), indexing="ij")
    assert (out == d[reg // 16, 8 * (reg % 16 // 4) + 4 * (lane // 32) + reg % 4, lane % 32]).all()
    # f64 16x16x4: D row 4 * i + lane // 16 in register pair i
    x, y = rng.normal(size=(2, 64))
    c, out = rng.normal(size=(64, 4)), np.zeros((64, 4))
    run(
        arch,
        plain("double", "double", 4, "mfma_f64_16x16x4f64"),
        [x, y, c, out],
    )
    d = x.reshape(4, 16).T @ y.reshape(4, 16)
    lane, reg = np.meshgrid(np.arange(64), np.arange(4), indexing="ij")
    assert np.allclose(out, d[4 * reg + lane // 16, lane % 16] + c)
    # f64 4x4x4, 4 blocks: lane = 16 k + 4 block + row
    c, out = rng.normal(size=64), np.zeros(64)
    run(
        arch,
        plain("double", "double", 1, "mfma_f64_4x4x4f64"),
        [x, y, c, out],
    )
    A, B = x.reshape(4, 4, 4).transpose(1, 2, 0), y.reshape(4, 4, 4).transpose(1, 0, 2)
    assert np.allclose(
        out, (A @ B + c.reshape(4, 4, 4).transpose(1, 0, 2)).transpose(1, 0, 2).ravel()
    )
