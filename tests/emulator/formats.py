"""Small number formats: bf16, fp8/bf8 (OCP and FNUZ), fp6/bf6, fp4, and helpers.

Decoding uses tables built from the format definition (sign, exponent, mantissa,
bias); encoding rounds to nearest even by bisecting the table of positive values.
FNUZ ("finite, no negative zero": gfx940..942) has no infinities, a single NaN at
0x80 and a bias one larger than OCP (gfx950, and everything newer).
"""

import numpy as np

U32, F32, U16 = np.uint32, np.float32, np.uint16
M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


class SmallFloat:
    """A float format of at most 8 bits with decode table and RNE encoder."""

    def __init__(self, name, ebits, mbits, bias, special):
        self.name, self.bits = name, 1 + ebits + mbits
        self.special = special  # "ieee" (inf+nan), "fn" (nan at all ones), "fnuz", "finite"
        half = 1 << (ebits + mbits)
        values = []
        for code in range(half):
            e, m = code >> mbits, code & ((1 << mbits) - 1)
            v = (
                m * 2.0 ** (1 - bias - mbits)
                if e == 0
                else (1 + m / (1 << mbits)) * 2.0 ** (e - bias)
            )
            if special == "ieee" and e == (1 << ebits) - 1:
                v = np.inf if m == 0 else np.nan
            if special == "fn" and code == half - 1:
                v = np.nan
            values.append(v)
        pos = np.array(values, np.float64)
        full = np.concatenate([pos, -pos])
        if special == "fnuz":
            full[half] = np.nan
        self.table = full.astype(F32)
        self.half = half
        self.finite = pos[np.isfinite(pos)]
        self.max = self.finite[-1]
        self.mid = (self.finite[1:] + self.finite[:-1]) / 2
        # the first value that rounds past max: half an ulp above it
        self.limit = self.max + (self.max - self.finite[-2]) / 2

    def decode(self, codes):
        """float32 values of unsigned integer ``codes``."""
        return self.table[codes]

    def encode(self, x, saturate=False):
        """Codes (uint32) nearest to float ``x``; overflow gives inf/NaN unless ``saturate``."""
        x = np.asarray(x, np.float64)
        a = np.abs(x)
        idx = np.searchsorted(self.mid, a, side="left")
        safe = np.minimum(idx, len(self.mid) - 1)
        idx = np.where((idx & 1 == 1) & (self.mid[safe] == a) & (idx < len(self.mid)), idx + 1, idx)
        sign = np.signbit(x)
        nan = np.isnan(x)
        over = (a > self.limit) | ((a == self.limit) & (len(self.finite) - 1 & 1 == 1))
        code = idx.astype(np.int64)
        if not saturate and self.special != "finite":
            top = {"ieee": len(self.finite), "fn": self.half - 1, "fnuz": self.half}[self.special]
            code = np.where(over, top, code)
        code = code + np.where(sign, self.half, 0)
        if self.special == "fnuz":
            code = np.where((idx == 0) & ~nan, 0, code)
            code = np.where(nan | (over & (not saturate)), self.half, code)
            if saturate:
                code = np.where(
                    np.isinf(x), len(self.finite) - 1 + np.where(sign, self.half, 0), code
                )
        elif self.special == "finite":
            code = np.where(nan, self.half - 1, code)
        else:
            code = np.where(nan, self.half * 2 - 1, code)
        return (code & (2 * self.half - 1)).astype(U32)


FP8_OCP = SmallFloat("e4m3fn", 4, 3, 7, "fn")
BF8_OCP = SmallFloat("e5m2", 5, 2, 15, "ieee")
FP8_FNUZ = SmallFloat("e4m3fnuz", 4, 3, 8, "fnuz")
BF8_FNUZ = SmallFloat("e5m2fnuz", 5, 2, 16, "fnuz")
FP6 = SmallFloat("e2m3", 2, 3, 1, "finite")
BF6 = SmallFloat("e3m2", 3, 2, 3, "finite")
FP4 = SmallFloat("e2m1", 2, 1, 1, "finite")


def fp8_for(arch):
    """(fp8, bf8) formats of ``arch``: FNUZ on gfx940-942, OCP on gfx950 and later."""
    return (FP8_FNUZ, BF8_FNUZ) if arch in ("gfx940", "gfx941", "gfx942") else (FP8_OCP, BF8_OCP)


def bf16_encode(x):
    """float32 array -> bf16 bits in uint32, round to nearest even, NaNs stay (quiet) NaNs."""
    u = np.asarray(x, F32).view(U32)
    r = (u + (U32(0x7FFF) + ((u >> U32(16)) & U32(1)))) >> U32(16)
    nan = (u & U32(0x7FFFFFFF)) > U32(0x7F800000)
    if np.any(nan):
        r = np.where(nan, (u >> U32(16)) | U32(0x40), r)
    return r


def bf16_decode(codes):
    """bf16 bits (any unsigned integer array) -> float32."""
    return (np.asarray(codes).astype(U32) << U32(16)).view(F32)


def f16_bits(x):
    """float array -> IEEE half bits in uint32 (RNE)."""
    return np.asarray(x).astype(np.float16).view(U16).astype(U32)


def e8m0(codes):
    """E8M0 scale bytes -> float64 powers of two (0xFF is NaN)."""
    c = np.asarray(codes).astype(np.int64)
    return np.where(c == 255, np.nan, np.ldexp(1.0, (c - 127).astype(np.int32)))


def fma_odd(a, b, c):
    """a*b + c for float32 inputs as float64 rounded to odd: safe to round again after scaling."""
    p = np.multiply(a, b, dtype=np.float64)
    c64 = np.asarray(c, np.float64)
    s = p + c64
    t = s - p
    err = (p - (s - t)) + (c64 - t)
    toward = np.where(np.signbit(err) == np.signbit(s), s, np.nextafter(s, 0.0))
    odd = (np.ascontiguousarray(toward).view(np.uint64) | np.uint64(1)).view(np.float64)
    return np.where((err != 0) & np.isfinite(s), odd, s)


def fma32(a, b, c):
    """Correctly rounded float32 fused multiply-add.

    The product is exact in float64; the sum is rounded there once, which only
    changes the float32 result when the float64 sum lands on a float32 midpoint
    (or is subnormal in float32); those lanes are redone with round-to-odd.
    """
    p = np.multiply(a, b, dtype=np.float64)
    c64 = np.asarray(c, np.float64)
    s = p + c64
    bits = s.view(np.uint64) if s.ndim else np.asarray(s).view(np.uint64)
    risky = ((bits & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)) | (
        np.abs(s) < 1.1754943508222875e-38
    )
    if risky.any():
        t = s - p
        err = (p - (s - t)) + (c64 - t)
        fix = risky & (err != 0) & np.isfinite(s)
        if np.any(fix):
            toward = np.where(np.signbit(err) == np.signbit(s), s, np.nextafter(s, 0.0))
            odd = (np.ascontiguousarray(toward).view(np.uint64) | np.uint64(1)).view(np.float64)
            s = np.where(fix, odd, s)
    return s.astype(F32)
