"""Whole kernels compiled by clang, against NumPy, in several schedules."""

import numpy as np
import pytest

from emulator.support import ARCHS, from_bf16, make, to_bf16

MODES = [
    {},
    {"strict_waits": True, "batch_waves": 256, "seed": 5},
    {"schedule": "serial", "seed": 2, "strict_waits": True},
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gemm(arch, mode):
    rng = np.random.default_rng(0)
    M, N, K = 128, 256, 128
    a, b = to_bf16(rng.uniform(-1, 1, (M, K))), to_bf16(rng.uniform(-1, 1, (N, K)))
    c = np.zeros((M, N), np.float32)
    _, m = make(arch, "gemm.hip", a, b, c, **mode)
    m.kernels["gemm"].launch((N // 128, M // 64), 256, [a, b, c, M, N, K])
    ref = from_bf16(a).astype(float) @ from_bf16(b).astype(float).T
    assert np.abs(c - ref).max() < 1e-5


def test_gemm_order_independent():
    rng = np.random.default_rng(0)
    a, b = to_bf16(rng.uniform(-1, 1, (64, 64))), to_bf16(rng.uniform(-1, 1, (128, 64)))
    out = []
    for mode in MODES:
        c = np.zeros((64, 128), np.float32)
        _, m = make("gfx942", "gemm.hip", a, b, c, **mode)
        m.kernels["gemm"].launch((1, 1), 256, [a, b, c, 64, 128, 64])
        out.append(c)
    assert all((c.view(np.uint32) == out[0].view(np.uint32)).all() for c in out)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_basics(arch, mode):
    rng = np.random.default_rng(1)
    n = 1000
    x, y = rng.normal(size=n).astype(np.float32), rng.normal(size=n).astype(np.float32)
    y0 = y.copy()
    d, m = make(arch, "basics.hip", x, y, **mode)
    m.kernels["saxpy"].launch(4, 256, [y, x, 2.5, n])
    assert np.allclose(y, 2.5 * x + y0, atol=1e-6)

    rows, cols = 3, 700
    p, q = rng.normal(size=(rows, cols)).astype(np.float32) * 3, np.zeros((rows, cols), np.float32)
    d.register(p), d.register(q)
    m.kernels["softmax"].launch(rows, 256, [p, q, cols])
    e = np.exp(p - p.max(axis=1, keepdims=True))
    assert np.allclose(q, e / e.sum(axis=1, keepdims=True), rtol=2e-5)

    data, bins = rng.integers(0, 256, 5000).astype(np.uint8), np.zeros(256, np.uint32)
    d.register(data), d.register(bins)
    m.kernels["histogram"].launch(2, 256, [data, bins, data.size])
    assert (bins == np.bincount(data, minlength=256)).all()

    v = rng.integers(-5, 5, 900).astype(np.int32)
    out, count = np.zeros(900, np.int32), np.zeros(1, np.uint32)
    for a in (v, out, count):
        d.register(a)
    m.kernels["append"].launch(4, 256, [v, out, count, v.size])
    assert count[0] == (v > 0).sum() and sorted(out[: count[0]]) == sorted(v[v > 0])

    u, w = rng.integers(0, 1 << 32, 512, dtype=np.uint32), np.zeros(512, np.uint32)
    d.register(u), d.register(w)
    m.kernels["scan"].launch(2, 256, [u, w])
    assert (w.reshape(2, 256) == np.cumsum(u.reshape(2, 256), axis=1, dtype=np.uint32)).all()


def collatz(v):
    c = 0
    while v != 1 and c < 500:
        v = (3 * v + 1 if v & 1 else v >> 1) & 0xFFFFFFFF
        c += 1
    return {0: c * 10, 1: c + 7, 2: c, 3: c ^ 0x55}[c & 3]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_control_flow(arch, mode):
    rng = np.random.default_rng(2)
    x, y = rng.integers(1, 100000, 500).astype(np.uint32), np.zeros(500, np.uint32)
    d, m = make(arch, "basics.hip", x, y, **mode)
    m.kernels["divergent"].launch(8, 64, [x, y, 450])
    assert y[:450].tolist() == [collatz(int(v)) for v in x[:450]] and not y[450:].any()

    z = np.zeros(512, np.uint32)
    src = rng.integers(0, 1 << 32, 512, dtype=np.uint32)
    d.register(z), d.register(src)
    m.kernels["calls"].launch(2, 256, [src, z])

    def helper(a, b):
        r = 0
        while b:
            r += a ^ b
            a = (a * 5 + 1) & 0xFFFFFFFF
            b >>= 1
        return r

    assert z.tolist() == [
        (helper(int(v), t) + helper(t, int(v) & 255)) & 0xFFFFFFFF for t, v in enumerate(src)
    ]


@pytest.mark.parametrize("arch", ARCHS)
def test_integers(arch):
    rng = np.random.default_rng(3)
    n = 300
    a, b = (
        rng.integers(0, 1 << 64, n, dtype=np.uint64),
        rng.integers(0, 1 << 64, n, dtype=np.uint64) >> rng.integers(0, 60, n).astype(np.uint64),
    )
    o = np.zeros((n, 8), np.uint64)
    _, m = make(arch, "basics.hip", a, b, o)
    m.kernels["integers"].launch(2, 256, [a, b, o, n])
    mask = (1 << 64) - 1
    for i in range(n):
        x, y = int(a[i]), int(b[i]) | 1
        sx, sy = x - (x >> 63 << 64), y - (y >> 63 << 64)
        quotient = abs(sx) // abs(sy) * (1 if (sx < 0) == (sy < 0) else -1)
        clz, low = 64 - (x | 1).bit_length(), x | 1 << 63
        ctz = (low & -low).bit_length() - 1
        want = [
            x * y & mask,
            x // y,
            x % y,
            quotient & mask,
            x.bit_count(),
            clz << 8 | ctz,
            x << (y & 63) & mask,
            sx >> (y & 63) & mask,
        ]
        assert [int(v) for v in o[i]] == want


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mode", [dict(), dict(schedule="serial", strict_waits=True)], ids=str)
def test_scratch_globals_dynamic_lds_grid(arch, mode):
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 1 << 32, 40, dtype=np.uint32), np.zeros(128, np.uint32)
    d, m = make(arch, "basics.hip", x, y, **mode)
    m.kernels["private_array"].launch(2, 64, [x, y, 25])
    M = 0xFFFFFFFF
    for t in range(64):
        a = [int(v) * (t + 1) & M for v in x]
        s = t
        for i in range(25):
            s = (s * 1664525 + 1013904223) & M
            a[s % 40] ^= (a[(s >> 8) % 40] + i) & M
        h = 0
        for v in a:
            h = (h * 31 + v) & M
        assert y[t] == h == y[64 + t]

    z = np.zeros(64, np.uint32)
    d.register(z)
    m.kernels["globals"].launch(1, 64, [z])
    table = [1, 2, 4, 8, 16, 32, 64, 128, 3, 9, 27, 81, 243, 729, 2187, 6561]
    assert z.tolist() == table * 4
    import ctypes

    assert ctypes.c_uint32.from_address(m.address_of("counter")).value == 8

    w = np.zeros(1000, np.uint32)
    d.register(w)
    m.kernels["dynamic_lds"].launch(1, 256, [w, 1000], lds_dynamic=4000)
    assert (w == np.arange(1000, dtype=np.uint32)[::-1] ** 2).all()

    g = np.full((3 * 2 * 2, 24), 0xFFFFFFFF, np.uint32)
    d.register(g)
    m.kernels["grid3"].launch((3, 2, 2), (4, 3, 2), [g])
    for i in range(12):
        gx, gy, gz = i % 3, i // 3 % 2, i // 6
        assert g[i].tolist() == [(k % 4) << 24 | gz << 16 | gy << 8 | gx for k in range(24)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "mode", [dict(), dict(schedule="serial", seed=3, strict_waits=True)], ids=str
)
def test_byte_races_and_generic_pointers(arch, mode):
    x, y = np.arange(256, dtype=np.uint8), np.zeros(256, np.uint8)
    d, m = make(arch, "basics.hip", x, y, **mode)
    m.kernels["bytes_share_dwords"].launch(1, 256, [x, y])
    assert (y == x.reshape(4, 64).T.ravel()).all()
    for use_lds in (0, 1):
        out, g = np.zeros(256, np.uint32), np.zeros(256, np.uint32)
        d.register(out), d.register(g)
        m.kernels["generic_pointer"].launch(1, 256, [out, g, use_lds])
        assert (out == 3 * np.arange(256)[::-1]).all() and bool(g.any()) != bool(use_lds)
    out, g = np.zeros(64, np.uint32), np.arange(100, 108, dtype=np.uint32)
    d.register(out), d.register(g)
    m.kernels["generic_private"].launch(1, 64, [out, g, 5])
    assert (out == 5 * np.arange(64)).all()
    m.kernels["generic_private"].launch(1, 64, [out, g, 6])
    assert (out == 106).all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mode", [dict(), dict(schedule="serial", strict_waits=True)], ids=str)
def test_gpr_indexing(arch, mode):
    x, y, k = (
        np.arange(50, 66, dtype=np.uint32),
        np.zeros(256, np.uint32),
        np.array([3, 9, 9, 14], np.int32),
    )
    _, m = make(arch, "basics.hip", x, y, k, **mode)
    assert "s_set_gpr_idx_on" in m.kernels["indexed_registers"].mnemonics()
    m.kernels["indexed_registers"].launch(1, 256, [x, y, k])
    for t in range(256):
        a = [int(v) + t for v in x]
        j = int(k[t >> 6])
        a[j ^ 3] = 7
        assert y[t] == a[j] * 100 + a[j + 5 & 15] + a[j ^ 3]
