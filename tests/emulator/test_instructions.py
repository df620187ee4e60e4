"""Instructions, alone and in small groups, through builtins and assembly, against NumPy."""

import numpy as np
import pytest

import emulator
from emulator import Device, formats
from emulator.codeobject import parse_text
from emulator.lds import swizzle_lanes
from emulator.support import ARCHS, compile_text, from_bf16, to_bf16
from emulator.valu import dpp_source

HEAD = '#include "hipmin.h"\n'
rng = np.random.default_rng(11)


def run(arch, body, arrays, block=64, grid=1, params=None, **kw):
    """Compile kernel k(u32* o, const u32* a, const u32* b) with ``body`` and run it."""
    params = params or "u32* o, const u32* a, const u32* b"
    d = Device(arch, **kw)
    m = d.load(compile_text(HEAD + f"KERNEL(256) k({params}) {{ u32 t = TID; {body} }}", arch))
    for x in arrays:
        if isinstance(x, np.ndarray):
            d.register(x)
    return m.kernels["k"].launch(grid, block, list(arrays))


def u32(n=128):
    return rng.integers(0, 1 << 32, n, dtype=np.uint32)


def asm(arch, texts, a, b, mode="=&v"):
    """What each two-source instruction gives over 128 lanes; with "+v" from b[t] ^ 0x5555 on."""
    init = "u32 r = b[t] ^ 0x5555;" if mode == "+v" else "u32 r;"
    source = HEAD
    for i, text in enumerate(texts):
        source += f"""KERNEL(256) k{i}(u32 *o, const u32 *a, const u32 *b)
{{
    u32 t = TID, x = a[t], y = b[t];
    {init}
    asm volatile("s_nop 4\\n {text}\\n s_waitcnt lgkmcnt(0)\\n s_nop 4"
                 : "{mode}"(r) : "v"(x), "v"(y));
    o[t] = r;
}}
"""
    device = Device(arch)
    module = device.load(compile_text(source, arch))
    results = np.zeros((len(texts), 128), np.uint32)
    for array in (results, a, b):
        device.register(array)
    for i, result in enumerate(results):
        module.kernels[f"k{i}"].launch(1, 128, [result, a, b])
    return results


DPP = [
    "quad_perm:[1,0,3,2]",
    "row_shr:1",
    "row_shl:3",
    "row_ror:5",
    "row_mirror",
    "row_half_mirror",
    "row_bcast:15",
    "row_bcast:31",
    "wave_shr:1",
    "wave_rol:1",
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("masked", [False, True])
def test_dpp(arch, masked):
    a, b = u32(), u32()
    extra = "row_mask:0xa bank_mask:0x7 bound_ctrl:0" if masked else "row_mask:0xf bank_mask:0xf"
    got = asm(arch, [f"v_mov_b32_dpp %0, %1 {ctrl} {extra}" for ctrl in DPP], a, b, "+v")
    lane = np.arange(64)
    chosen = (0xA >> (lane >> 4) & 0x7 >> (lane >> 2 & 3) & 1).astype(bool)
    for ctrl, result in zip(DPP, got.reshape(-1, 2, 64), strict=True):
        src, ok = dpp_source(parse_text("v_mov_b32_dpp v0, v1 " + ctrl)[2])
        for x, old, wave in zip(a.reshape(2, 64), (b ^ 0x5555).reshape(2, 64), result, strict=True):
            want = np.where(ok, x[src], 0 if masked else old)
            assert (wave == np.where(chosen | (not masked), want, old)).all(), ctrl


def test_dpp_sources_by_definition():
    src = {c: dpp_source(parse_text("v v0, v1 " + c)[2]) for c in DPP}
    lanes, ok = src["row_bcast:15"]
    assert lanes[16:].tolist() == [15] * 16 + [31] * 16 + [47] * 16 and not ok[:16].any()
    lanes, ok = src["row_bcast:31"]
    assert lanes[32:].tolist() == [31] * 32 and not ok[:32].any()
    lanes, ok = src["row_shr:1"]
    assert lanes[1:16].tolist() == list(range(15)) and not ok[0]
    assert src["row_mirror"][0][:16].tolist() == list(range(15, -1, -1))


@pytest.mark.parametrize("arch", ARCHS)
def test_lane_permutes(arch):
    a, b = u32(), u32()
    lane, wave = np.arange(128) & 63, np.arange(128) & 64
    cases = {
        "ds_bpermute_b32 %0, %1, %2": b[wave + (a >> 2 & 63)],
        "ds_swizzle_b32 %0, %1 offset:swizzle(SWAP,8)": a[wave + (lane ^ 8)],
        "ds_swizzle_b32 %0, %1 offset:swizzle(REVERSE,16)": a[wave + (lane ^ 15)],
        "ds_swizzle_b32 %0, %1 offset:swizzle(BROADCAST,8,3)": a[wave + (lane & 56 | 3)],
        "ds_swizzle_b32 %0, %1 offset:swizzle(QUAD_PERM,3,1,0,2)": a[
            wave + (lane & ~3) + np.array([3, 1, 0, 2])[lane & 3]
        ],
    }
    for text, got in zip(cases, asm(arch, cases, a, b), strict=True):
        assert (got == cases[text]).all(), text
    perm = np.concatenate([rng.permutation(64), rng.permutation(64)]).astype(np.uint32)
    want = np.zeros(128, np.uint32)
    want[wave + perm] = b
    assert (asm(arch, ["ds_permute_b32 %0, %1, %2"], perm * 4, b) == want).all()
    assert (swizzle_lanes(0x041F) == (np.arange(64) ^ 1)).all()
    o = np.zeros(128, np.uint32)
    body = """u32 low = __builtin_amdgcn_mbcnt_lo(b[t], 7);
    o[t] = __builtin_amdgcn_readlane(a[t], 17) ^
           __builtin_amdgcn_readfirstlane(b[t]) + __builtin_amdgcn_mbcnt_hi(a[t], low);"""
    run(arch, body, [o, a, b], 128)
    for w in (0, 64):
        count = [
            7
            + (int(b[w + i]) & ((1 << min(i, 32)) - 1)).bit_count()
            + (int(a[w + i]) & ((1 << max(i - 32, 0)) - 1)).bit_count()
            for i in range(64)
        ]
        assert (o[w : w + 64] == (a[w + 17] ^ (b[w] + np.array(count, np.uint32)))).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_integer_and_packed(arch):
    a, b = u32(), u32()
    A, B = a.astype(np.uint64), b.astype(np.uint64)
    m24 = np.uint64(0xFFFFFF)
    lo, hi = lambda x: (x & 0xFFFF).astype(np.int64), lambda x: (x >> 16).astype(np.int64)

    def pack(low, high):
        return ((low & 0xFFFF) | (high & 0xFFFF) << 16).astype(np.uint32)

    cases = {
        "v_mul_hi_u32 %0, %1, %2": (A * B >> np.uint64(32)).astype(np.uint32),
        "v_mul_u32_u24 %0, %1, %2": ((A & m24) * (B & m24)).astype(np.uint32),
        "v_bfe_u32 %0, %1, 5, 9": a >> 5 & 511,
        "v_bfe_i32 %0, %1, 5, 9": ((a >> 5 & 511 ^ 256) - 256).astype(np.uint32),
        "v_alignbit_b32 %0, %1, %2, 7": ((A << np.uint64(32) | B) >> np.uint64(7)).astype(
            np.uint32
        ),
        "v_add_u32_e64 %0, %1, %2 clamp": np.minimum(A + B, 0xFFFFFFFF).astype(np.uint32),
        "v_sub_u32_e64 %0, %1, %2 clamp": np.where(a > b, a - b, 0),
        "v_pk_add_u16 %0, %1, %2": pack(lo(a) + lo(b), hi(a) + hi(b)),
        "v_pk_sub_u16 %0, %1, %2 clamp": pack(
            np.maximum(lo(a) - lo(b), 0), np.maximum(hi(a) - hi(b), 0)
        ),
        "v_pk_mul_lo_u16 %0, %1, %2 op_sel:[1,0] op_sel_hi:[0,1]": pack(
            hi(a) * lo(b), lo(a) * hi(b)
        ),
        "v_add_u32_sdwa %0, %1, %2 dst_sel:DWORD dst_unused:UNUSED_PAD "
        "src0_sel:BYTE_2 src1_sel:WORD_1": (a >> 16 & 255) + (b >> 16),
        "v_add_u16 %0, %1, %2": a + b & 0xFFFF,
        "v_cvt_f32_ubyte2 %0, %1": (a >> 16 & 255).astype(np.float32).view(np.uint32),
        "v_sad_u8 %0, %1, %2, 5": sum(
            np.abs((a >> 8 * k & 255).astype(np.int64) - (b >> 8 * k & 255)) for k in range(4)
        ).astype(np.uint32)
        + 5,
        "v_dot4_i32_i8 %0, %1, %2, 0": sum(
            (a >> 8 * k).astype(np.int8).astype(np.int64) * (b >> 8 * k).astype(np.int8)
            for k in range(4)
        ).astype(np.uint32),
    }

    # v_perm: selectors 0-3 take bytes of source 1, 4-7 of source 0, 8-11 signs, 12 zero, 13 on ones
    def byte(x, k):
        return x >> 8 * k & 255

    sign = np.where(a >> 31, 255, 0)
    cases["s_mov_b32 s20, 0x0d0b0601\\n v_perm_b32 %0, %1, %2, s20"] = (
        byte(b, 1) | byte(a, 2) << 8 | sign << 16 | 0xFF << 24
    ).astype(np.uint32)
    for text, got in zip(cases, asm(arch, cases, a, b), strict=True):
        assert (got == cases[text]).all(), text


def test_three_source_logic():
    a, b, o = u32(), u32(), np.zeros((128, 3), np.uint32)
    text = f"""{HEAD}KERNEL(128) k(u32 *o, const u32 *a, const u32 *b)
{{
    u32 t = TID, x = a[t], y = b[t];
    o[3 * t] = (x | y) ^ t;
    o[3 * t + 1] = x & ~y | t;
    o[3 * t + 2] = x & y & ~t;
}}"""
    module = Device("gfx950").load(compile_text(text, "gfx950"))
    for x in (o, a, b):
        module.device.register(x)
    assert "v_bitop3_b32" in module.kernels["k"].mnemonics()
    module.kernels["k"].launch(1, 128, [o, a, b])
    t = np.arange(128, dtype=np.uint32)
    assert (o == np.stack([(a | b) ^ t, a & ~b | t, a & b & ~t], 1)).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_float_ops(arch):
    n = 128
    x = (rng.normal(size=n) * 10.0 ** rng.integers(-3, 4, n)).astype(np.float32)
    y = (rng.normal(size=n) * 10.0 ** rng.integers(-3, 4, n)).astype(np.float32)
    X, Y = x.astype(float), y.astype(float)
    exact = {
        "v_fma_f32 %0, %1, %2, %1": X * Y + X,
        "v_fma_f32 %0, -%1, |%2|, 1.0 clamp": np.clip(1 - X * np.abs(Y), 0, 1),
        "v_med3_f32 %0, %1, %2, 1.0": np.median([X, Y, np.ones(n)], axis=0),
        "v_mul_f32_e64 %0, %1, %2 mul:4": 4 * (x * y),
        "v_ldexp_f32 %0, %1, 5": x * 32,
    }
    others = ["v_rcp_f32 %0, %1", "v_cvt_i32_f32 %0, %1", "v_cvt_pkrtz_f16_f32 %0, %1, %2"]
    got = asm(arch, [*exact, *others], x.view(np.uint32), y.view(np.uint32))
    for text, result in zip(exact, got, strict=False):
        assert (result.view(np.float32) == exact[text].astype(np.float32)).all(), text
    rcp, integer, half = got[len(exact) :]
    assert np.allclose(rcp.view(np.float32), 1 / X, rtol=2e-7)
    assert (integer.view(np.int32) == np.trunc(X)).all()
    h, both = half.view(np.float16).reshape(-1, 2).astype(float), np.stack([X, Y], 1)
    assert (np.abs(h) <= np.abs(both)).all() and np.allclose(h, both, rtol=1e-3, atol=1e-7)
    small = x % 30
    (power,) = asm(arch, ["v_exp_f32 %0, %1"], small.view(np.uint32), y.view(np.uint32))
    assert np.allclose(power.view(np.float32), np.exp2(small.astype(float)), rtol=2e-7)
    o = np.zeros(n, np.float32)
    params = "float* o, const float* a, const float* b"
    run(arch, "o[t] = a[t] / b[t];", [o, x, y], 128, params=params)
    assert (o == x / y).all()


def test_division_special_cases():
    special = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 1e-38, 3e38, 1, -7, 1e-20, 1e30],
        np.float32,
    )
    x, y = (g.ravel() for g in np.meshgrid(special, special))
    x, y = np.resize(x, 256), np.resize(y, 256)
    o = np.zeros(256, np.float32)
    run(
        "gfx942",
        "o[t] = a[t] / b[t];",
        [o, x, y],
        256,
        params="float* o, const float* a, const float* b",
    )
    with np.errstate(all="ignore"):
        ref = x / y
    assert ((o.view(np.uint32) == ref.view(np.uint32)) | np.isnan(o) & np.isnan(ref)).all()


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("kind", ["fp8", "bf8"])
def test_fp8(arch, kind):
    fmt = formats.fp8_for(arch)[kind == "bf8"]
    a = u32()
    want = fmt.decode(a >> 8 & 255)
    got = np.zeros(128, np.float32)
    run(
        arch,
        f"o[t] = __builtin_amdgcn_cvt_f32_{kind}(a[t], 1);",
        [got, a, a],
        128,
        params="float* o, const u32* a, const u32* b",
    )
    assert ((got == want) | np.isnan(got) & np.isnan(want)).all()
    two = np.zeros((128, 2), np.float32)
    run(
        arch,
        "typedef float f2 __attribute__((ext_vector_type(2)));"
        f"*(f2*)&o[2 * t] = __builtin_amdgcn_cvt_pk_f32_{kind}(a[t], 1);",
        [two, a, a],
        128,
        params="float* o, const u32* a, const u32* b",
    )
    w2 = np.stack([fmt.decode(a >> 16 & 255), fmt.decode(a >> 24)], 1)
    assert ((two == w2) | np.isnan(two) & np.isnan(w2)).all()
    x = (rng.normal(size=128) * 3).astype(np.float32)
    o = np.zeros(128, np.uint32)
    run(
        arch,
        f"o[t] = __builtin_amdgcn_cvt_pk_{kind}_f32(a[t], -a[t], 0x12345678, 1);",
        [o, x, a],
        128,
        params="u32* o, const float* a, const u32* b",
    )
    assert (o & 0xFFFF == 0x5678).all()
    d = fmt.decode(o >> 16 & 255)
    best = fmt.finite[np.abs(fmt.finite[None] - np.abs(x)[:, None]).argmin(1)]
    assert np.allclose(np.abs(d), best) and (np.sign(d) == np.where(d == 0, 0, np.sign(x))).all()


def test_formats_roundtrip():
    for fmt in (
        formats.FP8_OCP,
        formats.BF8_OCP,
        formats.FP8_FNUZ,
        formats.BF8_FNUZ,
        formats.FP6,
        formats.BF6,
        formats.FP4,
    ):
        codes = np.arange(2 * fmt.half)
        v = fmt.decode(codes)
        ok = np.isfinite(v)
        assert (fmt.decode(fmt.encode(v[ok])) == v[ok]).all()
    assert (
        formats.FP8_OCP.max == 448
        and formats.FP8_FNUZ.max == 240
        and formats.BF8_OCP.max == 57344
        and formats.FP4.max == 6
    )
    assert formats.FP4.decode(formats.FP4.encode([2.5, 5.0, 0.25, 0.75, -100])).tolist() == [
        2,
        4,
        0,
        1,
        -6,
    ]


def test_gfx950_scaled_conversions():
    a = u32()
    s = (2.0 ** rng.integers(-4, 5, 128)).astype(np.float32)
    o = np.zeros((128, 2), np.uint32)
    run(
        "gfx950",
        """auto four = __builtin_amdgcn_cvt_scalef32_pk_bf16_fp4(a[t], b[t], 2);
        auto eight = __builtin_amdgcn_cvt_scalef32_pk_bf16_fp8(a[t], b[t], 1);
        o[2 * t] = __builtin_bit_cast(u32, four);
        o[2 * t + 1] = __builtin_bit_cast(u32, eight);""",
        [o, a, s],
        128,
        params="u32* o, const u32* a, const float* b",
    )
    v = from_bf16(o.view(np.uint16)).reshape(128, 4)
    assert (v[:, 0] == formats.FP4.decode(a >> 16 & 15) * s).all() and (
        v[:, 1] == formats.FP4.decode(a >> 20 & 15) * s
    ).all()
    w = formats.FP8_OCP.decode(a >> 16 & 255) * s
    assert ((v[:, 2] == w) | np.isnan(w)).all()
    x, y = rng.normal(size=(2, 128)).astype(np.float32)
    p = np.zeros(128, np.uint32)
    run(
        "gfx950",
        """u32 r;
        asm volatile("v_cvt_pk_bf16_f32 %0, %1, %2" : "=v"(r) : "v"(a[t]), "v"(b[t]));
        o[t] = r;""",
        [p, x, y],
        128,
        params="u32* o, const float* a, const float* b",
    )
    assert (p == (to_bf16(x).astype(np.uint32) | to_bf16(y).astype(np.uint32) << 16)).all()


TWO_BUFFERS = """
    auto r = __builtin_amdgcn_make_buffer_rsrc((void *)a, 0, 50 * 4, 0x00027000);
    auto w = __builtin_amdgcn_make_buffer_rsrc(q, 0, 50 * 4, 0x00027000);
"""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("strict", [False, True])
def test_buffer_range_check(arch, strict):
    a, o = u32(100), np.full((128, 2), 0xFFFFFFFF, np.uint32)
    out = np.full(100, 7, np.uint32)
    run(
        arch,
        TWO_BUFFERS
        + """*(u32x2*)&o[2 * t] = __builtin_amdgcn_raw_buffer_load_b64(r, t * 4, 0, 0);
      __builtin_amdgcn_raw_buffer_store_b32(t, w, t * 4, 0, 0);""",
        [o, a, out],
        128,
        params="u32* o, const u32* a, u32* q",
        strict_waits=strict,
    )
    t = np.arange(128)
    want0 = np.where(t < 50, a[np.minimum(t, 99)], 0)  # each dword is checked by itself
    assert (o[:, 0] == want0).all() and (
        o[:, 1] == np.where(t + 2 <= 50, a[np.minimum(t + 1, 99)], 0)
    ).all()
    assert (out[:50] == t[:50]).all() and (out[50:] == 7).all()
    run(
        arch,
        TWO_BUFFERS
        + """o[t] = __builtin_amdgcn_raw_buffer_load_b16(r, t * 4, 40, 0);
        u32x4 v = {t, t, t, t};
        if (t == 11)
            __builtin_amdgcn_raw_buffer_store_b128(v, w, 37 * 4, 40, 0);""",
        [o, a, out],
        128,
        params="u32* o, const u32* a, u32* q",
        strict_waits=strict,
    )
    assert (o.ravel()[:128] == np.where(t < 40, a[np.minimum(t + 10, 99)] & 0xFFFF, 0)).all()
    assert (out[47:50] == 11).all() and (out[50:] == 7).all()


@pytest.mark.parametrize("arch,size", [("gfx90a", 4), ("gfx942", 4), ("gfx950", 4), ("gfx950", 16)])
def test_direct_to_lds(arch, size):
    body = """SHARED u32 s[1024];
    auto r = __builtin_amdgcn_make_buffer_rsrc((void *)a, 0, 100000, 0x00027000);
    auto to = (__attribute__((address_space(3))) char *)s;
    u32 w = __builtin_amdgcn_readfirstlane(t >> 6);
    __builtin_amdgcn_raw_ptr_buffer_load_lds(
        r, (__attribute__((address_space(3))) void *)(to + w * 64 * SZ), SZ, (127 - t) * SZ,
        0, 0, 0);
    asm volatile("WAIT" ::: "memory");
    __builtin_amdgcn_s_barrier();
    asm volatile("" ::: "memory");
    o[t] = ((volatile u32 *)s)[t];
    o[t + 128] = ((volatile u32 *)s)[t * SZ / 4];""".replace("SZ", str(size))
    a, o = u32(1024), np.zeros(256, np.uint32)
    for kw in (dict(), dict(strict_waits=True), dict(strict_waits=True, schedule="serial", seed=4)):
        run(arch, body.replace("WAIT", "s_waitcnt vmcnt(0)"), [o, a, a], 128, **kw)
        lds = a[: 128 * size // 4].reshape(128, -1)[::-1].ravel()
        assert (o[:128] == lds[:128]).all() and (o[128:] == lds[:: size // 4]).all()
    if size == 4 and arch != "gfx90a":
        text = """SHARED u32 s[128];
        u32 r, z = t * 4;
        asm volatile("s_mov_b32 m0, 0\\n s_nop 4\\n global_load_lds_dword %1, off\\n WAIT "
                     "ds_read_b32 %0, %2\\n s_waitcnt vmcnt(0) lgkmcnt(0)"
                     : "=&v"(r) : "v"(a + t), "v"(z), "v"(&s[0]));
        o[t] = r;"""
        run(arch, text.replace("WAIT", "s_waitcnt vmcnt(0)\\n"), [o, a, a], 64, strict_waits=True)
        assert (o[:64] == a[:64]).all()
        with pytest.raises(emulator.WaitHazardError, match="direct-to-LDS"):
            run(arch, text.replace("WAIT", ""), [o, a, a], 64, strict_waits=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_atomics(arch):
    o = np.zeros(8, np.uint32)
    a = rng.integers(0, 1000, 256).astype(np.uint32)
    old = np.zeros(256, np.uint32)
    run(
        arch,
        """SHARED u32 s[2]; if (t < 2) s[t] = 0; barrier();
      old[t] = __atomic_fetch_add(&o[0], a[t], __ATOMIC_RELAXED);
      __atomic_fetch_max(&o[1], a[t], __ATOMIC_RELAXED);
      __atomic_fetch_xor(&o[2], a[t], __ATOMIC_RELAXED);
      u32 e = t;
      __atomic_compare_exchange_n(&o[3], &e, t + 1, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
      __atomic_fetch_add(&s[t & 1], a[t], __ATOMIC_RELAXED); barrier(); if (t < 2) o[4 + t] = s[t];
      __atomic_fetch_add((u64*)&o[6], 1ull << 31, __ATOMIC_RELAXED);""",
        [o, a, old],
        256,
        params="u32* o, const u32* a, u32* old",
    )
    assert o[0] == a.sum() and o[1] == a.max() and o[2] == np.bitwise_xor.reduce(a) and o[3] == 256
    assert (
        o[4] == a[0::2].sum() and o[5] == a[1::2].sum() and int(o[7]) << 32 | int(o[6]) == 256 << 31
    )
    assert (old == np.concatenate([[0], np.cumsum(a)[:-1]])).all()


def test_unknown_instruction():
    text = f"""{HEAD}KERNEL(64) k(u32 *o)
{{
    asm volatile("v_cvt_sr_fp8_f32 v1, v2, v3" ::: "v1");
    o[TID] = 1;
}}"""
    m = Device("gfx942").load(compile_text(text, "gfx942"))
    o = np.zeros(64, np.uint32)
    m.device.register(o)
    with pytest.raises(NotImplementedError, match="v_cvt_sr_fp8_f32 v1, v2, v3"):
        m.kernels["k"].launch(1, 64, [o])


def test_gfx950_scaled_encoding():
    n = 64
    x = (rng.normal(size=(n, 32)) * 2).astype(np.float32)
    s = (2.0 ** rng.integers(-2, 3, n)).astype(np.float32)
    o = np.zeros((n, 6), np.uint32)
    run(
        "gfx950",
        """float y = a[t * 32], z = a[t * 32 + 1], f = b[t];
        u32 r = 0xffffffff;
        asm volatile("v_cvt_scalef32_pk_fp4_f32 %0, %1, %2, %3 op_sel:[0,0,1,0]"
                     : "+v"(r) : "v"(y), "v"(z), "v"(f));
        o[t * 6] = r;
        r = 0xffffffff;
        asm volatile("v_cvt_scalef32_pk_fp8_f32 %0, %1, %2, %3 op_sel:[0,0,0,1]"
                     : "+v"(r) : "v"(y), "v"(z), "v"(f));
        o[t * 6 + 1] = r;""",
        [o, x, s],
        n,
        params="u32* o, const float* a, const float* b",
    )
    q = x[:, :2] / s[:, None]
    four, eight = formats.FP4.encode(q, True), formats.FP8_OCP.encode(q, True)
    assert (o[:, 0] == (0xFFFF00FF | (four[:, 0] | four[:, 1] << 4) << 8)).all()
    assert (o[:, 1] == (0x0000FFFF | (eight[:, 0] | eight[:, 1] << 8) << 16)).all()
