"""Vector ALU: VOP1, VOP2, VOP3, VOPC, VOP3P formats with DPP and SDWA.

Semantics follow the CDNA3 ISA document, "Vector ALU Operations" and the
instruction tables "VOP1/VOP2/VOP3/VOPC/VOP3P Instructions".  An operation is a
NumPy function over lanes plus type codes (see :mod:`operands`); EXEC is applied
when the result is stored.

Transcendentals (rcp, rsq, sqrt, exp, log, sin, cos) are correctly rounded here
where hardware promises about 1 ulp; results may differ in the last bit.
"""

import re

import numpy as np

from . import formats
from .formats import fma32
from .operands import (
    from_u32,
    parse_operand,
    scalar_reader,
    scalar_writer,
    vector_reader,
    vector_writer,
)
from .state import M32, U32, U64, LaneMask

F32, F64, I32, I64 = np.float32, np.float64, np.int32, np.int64
_TINY = F32(1.17549435e-38)


def _u(x):
    return np.asarray(x).astype(U32)


def _bits(x):
    return np.asarray(x, F32).view(U32)


def _flush(x):
    """Flush float32 subnormals to signed zero."""
    return np.where(np.abs(x) < _TINY, np.copysign(F32(0), x), x)


def _shift(f, bits):
    mask = U32(bits - 1)
    return lambda a, b: f(b, a & mask)


def _rev(f):
    return lambda a, b: f(b, a)


def _wide(a):
    return np.asarray(a).astype(U64)


def _swide(a):
    return np.asarray(a).astype(I64)


def _snan(x):
    """Signalling NaNs (quiet bit clear)."""
    return np.isnan(x) & (_bits(x) & U32(0x400000) == 0)


def _quiet(r, a, b):
    """IEEE_MODE (set in HSA kernels): min/max of a signalling NaN is that NaN, quieted."""
    for x in (b, a):
        s = _snan(x)
        if np.any(s):
            r = np.where(s, (_bits(x) | U32(0x400000)).view(F32), r)
    return r


def _extreme(choose, of_equal):
    """min or max; ``of_equal`` makes the sign of equal zeros from the bits of both."""

    def extreme(a, b):
        r = choose(a, b)
        if np.isnan(np.add(a, b)).any():
            r = _quiet(r, a, b)
        eq = np.equal(a, b)
        if np.any(eq):
            r = np.where(eq, of_equal(_bits(a), _bits(b)).view(F32), r)
        return r

    return extreme


_fmin, _fmax = _extreme(np.fmin, np.bitwise_or), _extreme(np.fmax, np.bitwise_and)


def _to_int(x, lo, hi):
    x = np.asarray(x, F64)
    x = np.where(np.isnan(x), 0.0, x)
    return np.clip(np.trunc(x), lo, hi).astype(I64)


def _cvt_u32(x):
    return _to_int(x, 0, 4294967295.0).astype(U32)


def _cvt_i32(x):
    return _to_int(x, -2147483648.0, 2147483647.0).astype(I32)


def _perm(a, b, sel):
    data = _wide(b) | _wide(a) << U64(32)
    if np.ndim(sel) == 0:
        out = U32(0)
        for k in range(4):
            s = int(sel) >> (8 * k) & 255
            if s < 8:
                byte = (data >> U64(8 * s) & U64(255)).astype(U32)
            elif s < 12:
                byte = (data >> U64(16 * (s - 8) + 15) & U64(1)).astype(U32) * U32(255)
            else:
                byte = U32(0 if s == 12 else 255)
            out = out | byte << U32(8 * k)
        return out
    out = np.zeros(np.shape(sel), U32)
    for k in range(4):
        s = sel >> U32(8 * k) & U32(255)
        pick = (data >> _wide((s & U32(7)) * U32(8)) & U64(255)).astype(U32)
        sign = (data >> _wide((s & U32(3)) * U32(16) + U32(15)) & U64(1)).astype(U32) * U32(255)
        byte = np.where(s < 8, pick, np.where(s < 12, sign, np.where(s == 12, U32(0), U32(255))))
        out |= byte << U32(8 * k)
    return out


def _bfe_u(a, off, width):
    w = width & U32(31)
    return (a >> (off & U32(31))) & ((U32(1) << w) - U32(1))


def _bfe_i(a, off, width):
    off, w = off & U32(31), width & U32(31)
    x = (
        (np.asarray(a).view(I32) >> off.astype(I32)).astype(I64)
        if np.ndim(a)
        else I64(I32(a) >> I32(off))
    )
    up = (U32(64) - w).astype(I64)
    return np.where(
        w == 0, I64(0), (_swide(x) << np.where(w == 0, I64(0), up)) >> np.where(w == 0, I64(0), up)
    ).astype(I32)


def _ffbh(x):
    """31 - position of the highest set bit, or -1: exact through float64."""
    e = np.frexp(np.asarray(x).astype(F64))[1]
    return np.where(np.asarray(x) == 0, I64(M32), 32 - e.astype(I64)).astype(U32)


def _ffbl(x):
    x = np.asarray(x)
    low = x & (~x + U32(1))
    e = np.frexp(low.astype(F64))[1].astype(I64) - 1
    return np.where(x == 0, I64(M32), e).astype(U32)


def _ffbh_i(x):
    x = np.asarray(x)
    y = np.where(x >> U32(31), ~x, x)
    return _ffbh(y)


def _bfrev(x):
    x = np.asarray(x)
    for s, m in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        x = (x >> U32(s)) & U32(m) | (x & U32(m)) << U32(s)
    return x >> U32(16) | x << U32(16)


def _bcnt(x):
    return np.bitwise_count(np.asarray(x)).astype(U32)


def _rcp(x):
    return _flush(F32(1) / _flush(x))


def _exp2(x):
    return _flush(np.exp2(np.asarray(x, F64)).astype(F32))


def _log2(x):
    return np.log2(np.asarray(_flush(x), F64)).astype(F32)


def _rsq(x):
    return (1.0 / np.sqrt(np.asarray(_flush(x), F64))).astype(F32)


def _sin(x):
    return np.sin(np.asarray(x, F64) * (2 * np.pi)).astype(F32)


def _cos(x):
    return np.cos(np.asarray(x, F64) * (2 * np.pi)).astype(F32)


def _frexp_exp(x):
    _m, e = np.frexp(x)
    return np.where(np.isfinite(x), e, 0).astype(I32)


def _frexp_mant(x):
    return np.where(np.isfinite(x), np.frexp(x)[0], x)


def _fract(x):
    r = x - np.floor(x)
    return np.minimum(r, np.nextafter(x.dtype.type(1), x.dtype.type(0)))


def _ldexp(x, e):
    return np.ldexp(np.asarray(x, F64), np.clip(e, -400, 400)).astype(F32)


def _ubyte(k):
    return lambda x: (np.asarray(x) >> U32(8 * k) & U32(255)).astype(F32)


def _fma64(a, b, c):
    """float64 fma by error-free transforms on scaled mantissas (nearly always rounded once)."""
    a, b, c = np.broadcast_arrays(*(np.asarray(x, F64) for x in (a, b, c)))
    with np.errstate(all="ignore"):
        (ma, ea), (mb, eb) = np.frexp(a), np.frexp(b)
        e = ea + eb
        p, s = ma * mb, 134217729.0
        ah, bh = ma * s - (ma * s - ma), mb * s - (mb * s - mb)
        low = ((ah * bh - p) + ah * (mb - bh) + (ma - ah) * bh) + (ma - ah) * (mb - bh)
        cs = np.ldexp(c, -e)
        t = p + cs
        z = t - p
        r = np.ldexp(t + (((p - (t - z)) + (cs - z)) + low), e)
        r = np.where(np.isinf(cs) & np.isfinite(c), c, r)
        plain = ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)) | (p == 0)
        return np.where(plain, a * b + c, r)


def _fma16(a, b, c):
    return (np.asarray(a, F64) * np.asarray(b, F64) + np.asarray(c, F64)).astype(np.float16)


def _mad_round(a, b, c):
    """v_mad/v_mac f32: product and sum rounded separately, subnormals flushed."""
    return _flush(_flush(_flush(a) * _flush(b)) + _flush(c))


def _sat(f, lo, hi, kind):
    return lambda *a: np.clip(f(*[_swide(x) for x in a]), lo, hi).astype(kind)


def _div_scale(kind, bits, bias, mant, shift, lim, tiny_exp):
    def f(s0, s1, s2):
        """V_DIV_SCALE: returns (scaled operand, needs post-scale mask)."""
        s0, s1, s2 = np.broadcast_arrays(*(np.asarray(x, kind) for x in (s0, s1, s2)))
        word = {32: U32, 64: U64}[bits]

        def expo(x):
            return (
                np.ascontiguousarray(x).view(word) >> word(mant)
                & word((1 << (bits - 1 - mant)) - 1)
            ).astype(I64)

        tiny = np.finfo(kind).tiny
        den1 = (np.abs(s1) < tiny) & (s1 != 0)
        wide = np.longdouble
        with np.errstate(all="ignore"):
            rden = np.abs(wide(1) / s1.astype(wide)) < tiny
            q = np.abs(s2.astype(wide) / s1.astype(wide))
            qden = (q < tiny) & (s2 != 0)
        up, down = np.ldexp(s0, shift), np.ldexp(s0, -shift)
        r, vcc = s0.copy(), np.zeros(s0.shape, bool)
        is1, is2 = s0.view(word) == s1.view(word), s0.view(word) == s2.view(word)
        zero = (s1 == 0) | (s2 == 0)
        big = ~zero & (expo(s2) - expo(s1) >= lim)
        c2 = ~zero & ~big & den1
        rest = ~zero & ~big & ~c2
        c3 = rest & rden & qden
        c4 = rest & ~c3 & rden
        c5 = rest & ~c3 & ~c4 & qden
        c6 = rest & ~c3 & ~c4 & ~c5 & (expo(s2) <= tiny_exp)
        r = np.where(zero, kind(np.nan), r)
        r = np.where(big & is1, up, r)
        r = np.where(
            c3 & is1, down, r
        )  # huge denominator, subnormal quotient: shrink the denominator
        r = np.where(c2, up, r)
        r = np.where(c4, down, r)
        r = np.where(c5 & is2, up, r)
        r = np.where(c6, up, r)
        vcc = big | c3 | c5
        return r.astype(kind), vcc

    return f


def _div_fixup(s0, s1, s2):
    """V_DIV_FIXUP: s0 quotient, s1 denominator, s2 numerator; repairs special cases."""
    s0, s1, s2 = np.broadcast_arrays(s0, s1, s2)
    sign = np.signbit(s1) ^ np.signbit(s2)
    kind = s0.dtype.type
    inf, zero, nan = kind(np.inf), kind(0), kind(np.nan)
    r = np.where(sign, -np.abs(s0), np.abs(s0))
    # the iteration overflowed to inf - inf: the quotient of finite operands is infinite
    r = np.where(np.isnan(s0), np.where(sign, -inf, inf), r)
    spread = {2: -25, 4: -150, 8: -1075}[s0.dtype.itemsize]
    e1, e2 = (
        np.frexp(np.where(s1 == 0, kind(1), s1))[1],
        np.frexp(np.where(s2 == 0, kind(1), s2))[1],
    )
    r = np.where(e2 - e1 < spread, np.where(sign, -zero, zero), r)
    r = np.where(np.isinf(s2), inf * np.where(sign, kind(-1), kind(1)), r)
    r = np.where((s1 == 0), np.where(sign, -inf, inf), r)
    r = np.where(np.isinf(s1) | (s2 == 0), np.where(sign, -zero, zero), r)
    r = np.where(np.isinf(s2) & ~np.isinf(s1), np.where(sign, -inf, inf), r)
    r = np.where((s1 == 0) & (s2 == 0) | np.isinf(s1) & np.isinf(s2), nan, r)
    r = np.where(np.isnan(s1) | np.isnan(s2), nan, r)
    return r.astype(kind)


def _alignbit(a, b, c):
    return ((_wide(b) | _wide(a) << U64(32)) >> _wide(c & U32(31))).astype(U32)


def _alignbyte(a, b, c):
    return ((_wide(b) | _wide(a) << U64(32)) >> _wide((c & U32(3)) * U32(8))).astype(U32)


def _med3(a, b, c):
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def _med3f(a, b, c):
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    r = _fmax(_fmin(a, b), _fmin(_fmax(a, b), c))
    return np.where(nan, _fmin(_fmin(a, b), c), r)


def _sext24(x):
    return (
        (np.asarray(x).view(I32) << I32(8)).astype(I32) >> I32(8)
        if np.ndim(x)
        else I32((int(x) << 8 & M32) - ((int(x) << 8 & 0x80000000) << 1)) >> I32(8)
    )


def _m24(x):
    return x & U32(0xFFFFFF)


def _bytes(x):
    return [(np.asarray(x) >> U32(8 * k) & U32(255)).astype(I64) for k in range(4)]


def _sbytes(x):
    return [((b ^ 128) - 128) for b in _bytes(x)]


def _nibbles(x, signed):
    out = [(np.asarray(x) >> U32(4 * k) & U32(15)).astype(I64) for k in range(8)]
    return [((n ^ 8) - 8) for n in out] if signed else out


def _dot4(split_a, split_b):
    return lambda a, b, c: (
        sum(x * y for x, y in zip(split_a(a), split_b(b), strict=True)) + _swide(c)
    ).astype(U32)


def _half2(x, kind):
    return from_u32(np.asarray(x), kind), from_u32(np.asarray(x), kind, True)


def _dot2_f16(a, b, c):
    (al, ah), (bl, bh) = _half2(a, "h"), _half2(b, "h")
    return (
        al.astype(F64) * bl.astype(F64) + ah.astype(F64) * bh.astype(F64) + np.asarray(c, F64)
    ).astype(F32)


def _dot2_bf16(a, b, c):
    (al, ah), (bl, bh) = _half2(a, "y"), _half2(b, "y")
    return (
        al.astype(F64) * bl.astype(F64) + ah.astype(F64) * bh.astype(F64) + np.asarray(c, F64)
    ).astype(F32)


def _dot2_i16(kind):
    def f(a, b, c):
        (al, ah), (bl, bh) = _half2(a, kind), _half2(b, kind)
        return (_swide(al) * _swide(bl) + _swide(ah) * _swide(bh) + _swide(c)).astype(U32)

    return f


def _f16_rtz(x):
    """float32 -> half bits, rounding toward zero (v_cvt_pkrtz_f16_f32)."""
    x = np.asarray(x, F32)
    h = x.astype(np.float16)
    over = np.abs(h.astype(F32)) > np.abs(x)
    b = h.view(np.uint16).astype(U32)
    return np.where(over & ~np.isnan(x), b - U32(1), b)


def _cvt_pk_u8(a, sel, old):
    v = np.clip(np.where(np.isnan(a), 0, np.rint(np.asarray(a, F64))), 0, 255).astype(U32)
    sh = (sel & U32(3)) * U32(8)
    return old & ~(U32(255) << sh) | v << sh


def _norm(scale, lo):
    def f(x):
        x = np.asarray(x, F64)
        return (
            np.rint(np.clip(np.where(np.isnan(x), 0, x), lo, 1.0) * scale).astype(I64) & 0xFFFF
        ).astype(U32)

    return f


def _pack(lo, hi):
    return lambda a, b: lo(a) | hi(b) << U32(16)


def _class(x, mask, kind):
    x = np.asarray(x)
    tiny = np.finfo(kind).tiny
    neg, nan, inf = np.signbit(x), np.isnan(x), np.isinf(x)
    zero = x == 0
    sub = (np.abs(x) < tiny) & ~zero & ~nan
    norm = ~(nan | inf | zero | sub)
    word = {2: np.uint16, 4: U32, 8: U64}[x.dtype.itemsize]
    quiet = (np.ascontiguousarray(x).view(word) >> word(np.finfo(kind).nmant - 1) & word(1)).astype(
        bool
    )
    tests = [
        nan & ~quiet,
        nan & quiet,
        inf & neg,
        norm & neg,
        sub & neg,
        zero & neg,
        zero & ~neg,
        sub & ~neg,
        norm & ~neg,
        inf & ~neg,
    ]
    out = np.zeros(np.broadcast(x, mask).shape, bool)
    for k, t in enumerate(tests):
        out |= t & (mask >> U32(k) & U32(1)).astype(bool)
    return out


def _bitop3(a, b, c, table):
    out = np.zeros(np.broadcast(a, b, c).shape, U32)
    for k in range(8):
        if table >> k & 1:
            out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


def _sad(pieces):
    return lambda a, b, c: (
        sum(np.abs(x - y) for x, y in zip(pieces(a), pieces(b), strict=True)) + _swide(c)
    ).astype(U32)


# name -> (function, source types, destination type).  "=" reads the destination register.
TABLE = {
    "v_mov_b32": (lambda a: a, "u", "u"),
    "v_mov_b64": (lambda a: a, "Q", "Q"),
    "v_not_b32": (np.invert, "u", "u"),
    "v_bfrev_b32": (_bfrev, "u", "u"),
    "v_ffbh_u32": (_ffbh, "u", "u"),
    "v_ffbl_b32": (_ffbl, "u", "u"),
    "v_ffbh_i32": (_ffbh_i, "u", "u"),
    "v_add_u32": (np.add, "uu", "u"),
    "v_sub_u32": (np.subtract, "uu", "u"),
    "v_subrev_u32": (_rev(np.subtract), "uu", "u"),
    "v_add_i32": (np.add, "uu", "u"),
    "v_sub_i32": (np.subtract, "uu", "u"),
    "v_and_b32": (np.bitwise_and, "uu", "u"),
    "v_or_b32": (np.bitwise_or, "uu", "u"),
    "v_xor_b32": (np.bitwise_xor, "uu", "u"),
    "v_xnor_b32": (lambda a, b: ~(a ^ b), "uu", "u"),
    "v_lshlrev_b32": (_shift(np.left_shift, 32), "uu", "u"),
    "v_lshrrev_b32": (_shift(np.right_shift, 32), "uu", "u"),
    "v_ashrrev_i32": (lambda a, b: b >> (a & U32(31)).astype(I32), "ui", "i"),
    "v_lshlrev_b64": (lambda a, b: b << _wide(a & U32(63)), "uQ", "Q"),
    "v_lshrrev_b64": (lambda a, b: b >> _wide(a & U32(63)), "uQ", "Q"),
    "v_ashrrev_i64": (lambda a, b: b >> _swide(a & U32(63)), "uq", "q"),
    "v_min_u32": (np.minimum, "uu", "u"),
    "v_max_u32": (np.maximum, "uu", "u"),
    "v_min_i32": (np.minimum, "ii", "i"),
    "v_max_i32": (np.maximum, "ii", "i"),
    "v_mul_lo_u32": (np.multiply, "uu", "u"),
    "v_mul_lo_i32": (np.multiply, "uu", "u"),
    "v_mul_hi_u32": (lambda a, b: (_wide(a) * _wide(b) >> U64(32)).astype(U32), "uu", "u"),
    "v_mul_hi_i32": (lambda a, b: (_swide(a) * _swide(b) >> 32).astype(I32), "ii", "i"),
    "v_mul_u32_u24": (lambda a, b: _m24(a) * _m24(b), "uu", "u"),
    "v_mul_hi_u32_u24": (
        lambda a, b: (_wide(_m24(a)) * _wide(_m24(b)) >> U64(32)).astype(U32),
        "uu",
        "u",
    ),
    "v_mul_i32_i24": (
        lambda a, b: (_swide(_sext24(a)) * _swide(_sext24(b))).astype(I32),
        "uu",
        "i",
    ),
    "v_mul_hi_i32_i24": (
        lambda a, b: (_swide(_sext24(a)) * _swide(_sext24(b)) >> 32).astype(I32),
        "uu",
        "i",
    ),
    "v_mad_u32_u24": (lambda a, b, c: _m24(a) * _m24(b) + c, "uuu", "u"),
    "v_mad_i32_i24": (
        lambda a, b, c: (_swide(_sext24(a)) * _swide(_sext24(b)) + _swide(c)).astype(I32),
        "uui",
        "i",
    ),
    "v_add3_u32": (lambda a, b, c: a + b + c, "uuu", "u"),
    "v_lshl_add_u32": (lambda a, b, c: (a << (b & U32(31))) + c, "uuu", "u"),
    "v_add_lshl_u32": (lambda a, b, c: (a + b) << (c & U32(31)), "uuu", "u"),
    "v_lshl_or_b32": (lambda a, b, c: a << (b & U32(31)) | c, "uuu", "u"),
    "v_and_or_b32": (lambda a, b, c: a & b | c, "uuu", "u"),
    "v_or3_b32": (lambda a, b, c: a | b | c, "uuu", "u"),
    "v_xad_u32": (lambda a, b, c: (a ^ b) + c, "uuu", "u"),
    "v_lshl_add_u64": (lambda a, b, c: (a << _wide(b & U32(7))) + c, "QuQ", "Q"),
    "v_bfe_u32": (_bfe_u, "uuu", "u"),
    "v_bfe_i32": (_bfe_i, "uuu", "i"),
    "v_bfi_b32": (lambda a, b, c: a & b | ~a & c, "uuu", "u"),
    "v_bfm_b32": (lambda a, b: ((U32(1) << (a & U32(31))) - U32(1)) << (b & U32(31)), "uu", "u"),
    "v_alignbit_b32": (_alignbit, "uuu", "u"),
    "v_alignbyte_b32": (_alignbyte, "uuu", "u"),
    "v_perm_b32": (_perm, "uuu", "u"),
    "v_bcnt_u32_b32": (lambda a, b: _bcnt(a) + b, "uu", "u"),
    "v_min3_u32": (lambda a, b, c: np.minimum(np.minimum(a, b), c), "uuu", "u"),
    "v_max3_u32": (lambda a, b, c: np.maximum(np.maximum(a, b), c), "uuu", "u"),
    "v_min3_i32": (lambda a, b, c: np.minimum(np.minimum(a, b), c), "iii", "i"),
    "v_max3_i32": (lambda a, b, c: np.maximum(np.maximum(a, b), c), "iii", "i"),
    "v_med3_u32": (_med3, "uuu", "u"),
    "v_med3_i32": (_med3, "iii", "i"),
    "v_med3_f32": (_med3f, "fff", "f"),
    "v_min3_f32": (lambda a, b, c: _fmin(_fmin(a, b), c), "fff", "f"),
    "v_max3_f32": (lambda a, b, c: _fmax(_fmax(a, b), c), "fff", "f"),
    "v_minimum3_f32": (lambda a, b, c: np.minimum(np.minimum(a, b), c), "fff", "f"),
    "v_maximum3_f32": (lambda a, b, c: np.maximum(np.maximum(a, b), c), "fff", "f"),
    "v_sad_u32": (_sad(lambda x: [_swide(x)]), "uuu", "u"),
    "v_sad_u8": (_sad(_bytes), "uuu", "u"),
    "v_sad_u16": (_sad(lambda x: [_swide(x & U32(0xFFFF)), _swide(x >> U32(16))]), "uuu", "u"),
    # float32
    "v_add_f32": (np.add, "ff", "f"),
    "v_sub_f32": (np.subtract, "ff", "f"),
    "v_subrev_f32": (_rev(np.subtract), "ff", "f"),
    "v_mul_f32": (np.multiply, "ff", "f"),
    "v_mul_legacy_f32": (lambda a, b: np.where((a == 0) | (b == 0), F32(0), a * b), "ff", "f"),
    "v_min_f32": (_fmin, "ff", "f"),
    "v_max_f32": (_fmax, "ff", "f"),
    "v_fma_f32": (fma32, "fff", "f"),
    "v_fmac_f32": (fma32, "ff=", "f"),
    "v_fmaak_f32": (fma32, "fff", "f"),
    "v_fmamk_f32": (lambda a, k, b: fma32(a, k, b), "fff", "f"),
    "v_mad_f32": (_mad_round, "fff", "f"),
    "v_mac_f32": (_mad_round, "ff=", "f"),
    "v_madak_f32": (_mad_round, "fff", "f"),
    "v_madmk_f32": (_mad_round, "fff", "f"),
    "v_trunc_f32": (np.trunc, "f", "f"),
    "v_ceil_f32": (np.ceil, "f", "f"),
    "v_floor_f32": (np.floor, "f", "f"),
    "v_rndne_f32": (np.rint, "f", "f"),
    "v_fract_f32": (_fract, "f", "f"),
    "v_exp_f32": (_exp2, "f", "f"),
    "v_log_f32": (_log2, "f", "f"),
    "v_rcp_f32": (_rcp, "f", "f"),
    "v_rcp_iflag_f32": (_rcp, "f", "f"),
    "v_rsq_f32": (_rsq, "f", "f"),
    "v_sqrt_f32": (lambda a: np.sqrt(_flush(a)), "f", "f"),
    "v_exp_legacy_f32": (_exp2, "f", "f"),
    "v_log_legacy_f32": (_log2, "f", "f"),
    "v_sin_f32": (_sin, "f", "f"),
    "v_cos_f32": (_cos, "f", "f"),
    "v_frexp_exp_i32_f32": (_frexp_exp, "f", "i"),
    "v_frexp_mant_f32": (_frexp_mant, "f", "f"),
    "v_ldexp_f32": (_ldexp, "fi", "f"),
    "v_div_fixup_f32": (_div_fixup, "fff", "f"),
    # conversions
    "v_cvt_f32_u32": (lambda a: np.asarray(a).astype(F32), "u", "f"),
    "v_cvt_f32_i32": (lambda a: np.asarray(a).astype(F32), "i", "f"),
    "v_cvt_u32_f32": (_cvt_u32, "f", "u"),
    "v_cvt_i32_f32": (_cvt_i32, "f", "i"),
    "v_cvt_rpi_i32_f32": (lambda a: _cvt_i32(np.floor(np.asarray(a, F64) + 0.5)), "f", "i"),
    "v_cvt_flr_i32_f32": (lambda a: _cvt_i32(np.floor(a)), "f", "i"),
    "v_cvt_f32_f16": (lambda a: np.asarray(a).astype(F32) * F32(1), "h", "f"),
    "v_cvt_f16_f32": (lambda a: a * F32(1), "f", "h"),
    "v_cvt_f64_f32": (lambda a: np.asarray(a).astype(F64), "f", "d"),
    "v_cvt_f32_f64": (lambda a: np.asarray(a).astype(F32), "d", "f"),
    "v_cvt_f64_i32": (lambda a: np.asarray(a).astype(F64), "i", "d"),
    "v_cvt_f64_u32": (lambda a: np.asarray(a).astype(F64), "u", "d"),
    "v_cvt_i32_f64": (_cvt_i32, "d", "i"),
    "v_cvt_u32_f64": (_cvt_u32, "d", "u"),
    "v_cvt_f16_u16": (lambda a: np.asarray(a).astype(np.float16), "H", "h"),
    "v_cvt_f16_i16": (lambda a: np.asarray(a).astype(np.float16), "I", "h"),
    "v_cvt_u16_f16": (lambda a: _to_int(a, 0, 65535), "h", "H"),
    "v_cvt_i16_f16": (lambda a: _to_int(a, -32768, 32767), "h", "H"),
    "v_cvt_pkrtz_f16_f32": (_pack(_f16_rtz, _f16_rtz), "ff", "u"),
    "v_cvt_pk_u16_u32": (
        lambda a, b: np.minimum(a, U32(0xFFFF)) | np.minimum(b, U32(0xFFFF)) << U32(16),
        "uu",
        "u",
    ),
    "v_cvt_pk_i16_i32": (
        lambda a, b: (
            (_u(np.clip(a, -32768, 32767)) & U32(0xFFFF)) | _u(np.clip(b, -32768, 32767)) << U32(16)
        ),
        "ii",
        "u",
    ),
    "v_cvt_pk_u8_f32": (_cvt_pk_u8, "fuu", "u"),
    "v_cvt_pknorm_i16_f32": (_pack(_norm(32767, -1.0), _norm(32767, -1.0)), "ff", "u"),
    "v_cvt_pknorm_u16_f32": (_pack(_norm(65535, 0.0), _norm(65535, 0.0)), "ff", "u"),
    "v_cvt_pk_bf16_f32": (_pack(formats.bf16_encode, formats.bf16_encode), "ff", "u"),
    "v_cvt_pk_f16_f32": (_pack(formats.f16_bits, formats.f16_bits), "ff", "u"),
    "v_cvt_f32_bf16": (lambda a: a, "y", "f"),
    # float64
    "v_add_f64": (np.add, "dd", "d"),
    "v_mul_f64": (np.multiply, "dd", "d"),
    "v_min_f64": (np.fmin, "dd", "d"),
    "v_max_f64": (np.fmax, "dd", "d"),
    "v_fma_f64": (_fma64, "ddd", "d"),
    "v_fmac_f64": (_fma64, "dd=", "d"),
    "v_trunc_f64": (np.trunc, "d", "d"),
    "v_ceil_f64": (np.ceil, "d", "d"),
    "v_floor_f64": (np.floor, "d", "d"),
    "v_rndne_f64": (np.rint, "d", "d"),
    "v_fract_f64": (_fract, "d", "d"),
    "v_rcp_f64": (lambda a: 1.0 / a, "d", "d"),
    "v_rsq_f64": (lambda a: 1.0 / np.sqrt(a), "d", "d"),
    "v_sqrt_f64": (np.sqrt, "d", "d"),
    "v_ldexp_f64": (lambda a, e: np.ldexp(a, np.clip(e, -3000, 3000)), "di", "d"),
    "v_frexp_mant_f64": (_frexp_mant, "d", "d"),
    "v_frexp_exp_i32_f64": (_frexp_exp, "d", "i"),
    "v_div_fixup_f64": (_div_fixup, "ddd", "d"),
    # float16 and 16-bit integers
    "v_add_f16": (np.add, "hh", "h"),
    "v_sub_f16": (np.subtract, "hh", "h"),
    "v_subrev_f16": (_rev(np.subtract), "hh", "h"),
    "v_mul_f16": (np.multiply, "hh", "h"),
    "v_min_f16": (np.fmin, "hh", "h"),
    "v_max_f16": (np.fmax, "hh", "h"),
    "v_fma_f16": (_fma16, "hhh", "h"),
    "v_mad_f16": (lambda a, b, c: a * b + c, "hhh", "h"),
    "v_mac_f16": (lambda a, b, c: a * b + c, "hh=", "h"),
    "v_fmac_f16": (_fma16, "hh=", "h"),
    "v_madak_f16": (lambda a, b, c: a * b + c, "hhh", "h"),
    "v_madmk_f16": (lambda a, b, c: a * b + c, "hhh", "h"),
    "v_rcp_f16": (lambda a: (F32(1) / np.asarray(a, F32)).astype(np.float16), "h", "h"),
    "v_sqrt_f16": (np.sqrt, "h", "h"),
    "v_rsq_f16": (lambda a: (1 / np.sqrt(np.asarray(a, F64))).astype(np.float16), "h", "h"),
    "v_exp_f16": (lambda a: np.exp2(np.asarray(a, F64)).astype(np.float16), "h", "h"),
    "v_log_f16": (lambda a: np.log2(np.asarray(a, F64)).astype(np.float16), "h", "h"),
    "v_trunc_f16": (np.trunc, "h", "h"),
    "v_ceil_f16": (np.ceil, "h", "h"),
    "v_floor_f16": (np.floor, "h", "h"),
    "v_rndne_f16": (np.rint, "h", "h"),
    "v_ldexp_f16": (lambda a, e: np.ldexp(np.asarray(a, F64), e).astype(np.float16), "hI", "h"),
    "v_div_fixup_f16": (_div_fixup, "hhh", "h"),
    "v_frexp_mant_f16": (_frexp_mant, "h", "h"),
    "v_frexp_exp_i16_f16": (_frexp_exp, "h", "H"),
    "v_med3_f16": (
        lambda a, b, c: _med3f(np.asarray(a, F32), np.asarray(b, F32), np.asarray(c, F32)),
        "hhh",
        "h",
    ),
    "v_min3_f16": (lambda a, b, c: np.fmin(np.fmin(a, b), c), "hhh", "h"),
    "v_max3_f16": (lambda a, b, c: np.fmax(np.fmax(a, b), c), "hhh", "h"),
    "v_add_u16": (np.add, "HH", "H"),
    "v_sub_u16": (np.subtract, "HH", "H"),
    "v_subrev_u16": (_rev(np.subtract), "HH", "H"),
    "v_mul_lo_u16": (np.multiply, "HH", "H"),
    "v_mad_u16": (lambda a, b, c: a * b + c, "HHH", "H"),
    "v_mad_legacy_u16": (lambda a, b, c: a * b + c, "HHH", "H"),
    "v_mad_u32_u16": (lambda a, b, c: a * b + c, "HHu", "u"),
    "v_mad_i32_i16": (lambda a, b, c: a * b + c, "IIi", "i"),
    "v_mad_i16": (lambda a, b, c: a * b + c, "III", "H"),
    "v_lshlrev_b16": (lambda a, b: b << (a & U32(15)), "HH", "H"),
    "v_lshrrev_b16": (lambda a, b: b >> (a & U32(15)), "HH", "H"),
    "v_ashrrev_i16": (lambda a, b: b >> (a & U32(15)).astype(I32), "HI", "H"),
    "v_min_u16": (np.minimum, "HH", "H"),
    "v_max_u16": (np.maximum, "HH", "H"),
    "v_min_i16": (np.minimum, "II", "H"),
    "v_max_i16": (np.maximum, "II", "H"),
    "v_min3_u16": (lambda a, b, c: np.minimum(np.minimum(a, b), c), "HHH", "H"),
    "v_max3_u16": (lambda a, b, c: np.maximum(np.maximum(a, b), c), "HHH", "H"),
    "v_add_i16": (np.add, "II", "H"),
    "v_sub_i16": (np.subtract, "II", "H"),
    "v_pack_b32_f16": (lambda a, b: a | b << U32(16), "HH", "u"),
    # dot products
    "v_dot2_f32_f16": (_dot2_f16, "uuf", "f"),
    "v_dot2_f32_bf16": (_dot2_bf16, "uuf", "f"),
    "v_dot2c_f32_f16": (_dot2_f16, "uu=", "f"),
    "v_dot2c_f32_bf16": (_dot2_bf16, "uu=", "f"),
    "v_dot2_i32_i16": (_dot2_i16("I"), "uui", "u"),
    "v_dot2_u32_u16": (_dot2_i16("H"), "uuu", "u"),
    "v_dot4_i32_i8": (_dot4(_sbytes, _sbytes), "uui", "u"),
    "v_dot4_u32_u8": (_dot4(_bytes, _bytes), "uuu", "u"),
    "v_dot4c_i32_i8": (_dot4(_sbytes, _sbytes), "uu=", "u"),
    "v_dot8_i32_i4": (_dot4(lambda x: _nibbles(x, True), lambda x: _nibbles(x, True)), "uui", "u"),
    "v_dot8_u32_u4": (
        _dot4(lambda x: _nibbles(x, False), lambda x: _nibbles(x, False)),
        "uuu",
        "u",
    ),
}
for _k in range(4):
    TABLE[f"v_cvt_f32_ubyte{_k}"] = (_ubyte(_k), "u", "f")

# integer saturation when "clamp" is given
CLAMPED = {
    "v_add_u32": _sat(np.add, 0, M32, U32),
    "v_sub_u32": _sat(np.subtract, 0, M32, U32),
    "v_subrev_u32": _sat(_rev(np.subtract), 0, M32, U32),
    "v_add_u16": _sat(np.add, 0, 0xFFFF, U32),
    "v_sub_u16": _sat(np.subtract, 0, 0xFFFF, U32),
    "v_subrev_u16": _sat(_rev(np.subtract), 0, 0xFFFF, U32),
    "v_add_i16": _sat(np.add, -32768, 32767, I32),
    "v_sub_i16": _sat(np.subtract, -32768, 32767, I32),
    "v_mad_u16": _sat(lambda a, b, c: a * b + c, 0, 0xFFFF, U32),
    "v_mad_i16": _sat(lambda a, b, c: a * b + c, -32768, 32767, I32),
    "v_mad_u32_u24": lambda a, b, c: np.clip(
        _swide(_m24(a)) * _swide(_m24(b)) + _swide(c), 0, M32
    ).astype(U32),
}
CLAMPED_SIGNED = {
    "v_add_i32": _sat(np.add, -0x80000000, 0x7FFFFFFF, I32),
    "v_sub_i32": _sat(np.subtract, -0x80000000, 0x7FFFFFFF, I32),
}
# 16-bit operations that keep the destination's high half on GFX9; the others clear it
PRESERVE_HIGH = {"v_mac_f16", "v_fmac_f16", "v_madak_f16", "v_madmk_f16"}

_SUFFIX = re.compile(r"^(.*?)_(e32|e64|sdwa|dpp|e64_dpp)$")


def split_suffix(name):
    """('v_add_u32', 'e32') from 'v_add_u32_e32'."""
    m = _SUFFIX.match(name)
    return (m.group(1), m.group(2)) if m else (name, "")


def bit_list(mods, key, n, default=0):
    """A modifier such as op_sel:[0,1] as a list of n ints."""
    if key not in mods:
        return [default] * n
    v = [int(x) for x in mods[key].strip("[]").split(",")]
    return (v + [default] * n)[:n]


def _finish(f, base, mods, dtype):
    """Wrap an operation with omod and clamp."""
    scale = 1.0
    if "mul" in mods:
        scale = float(mods["mul"])
    if "div" in mods:
        scale = 1.0 / float(mods["div"])
    clamp = mods.get("clamp")
    if scale == 1.0 and not clamp:
        return f
    if dtype not in "fhd":
        if base in CLAMPED:
            return CLAMPED[base]
        raise NotImplementedError(f"clamp on {base}")

    def g(*a):
        r = f(*a)
        kind = {"f": F32, "h": np.float16, "d": F64}[dtype]
        r = np.asarray(r, kind)
        if scale != 1.0:
            r = r * kind(scale)
        if clamp:
            r = np.where(np.isnan(r), kind(0), np.clip(r, kind(0), kind(1)))
        return r

    return g


# --------------------------------------------------------------------------- DPP
def dpp_source(mods):
    """(source lane per lane, valid) of a DPP control, for one wave of 64 lanes."""
    lane = np.arange(64)
    row, pos = lane & ~15, lane & 15
    valid = np.ones(64, bool)
    if "quad_perm" in mods:
        q = np.array(bit_list(mods, "quad_perm", 4))
        return (lane & ~3) + q[lane & 3], valid
    for key, f in (
        ("row_shl", lambda n: (pos + n, (pos + n) < 16)),
        ("row_shr", lambda n: (pos - n, (pos - n) >= 0)),
        ("row_ror", lambda n: ((pos - n) & 15, valid)),
        ("row_newbcast", lambda n: (pos * 0 + n, valid)),
        ("row_share", lambda n: (pos * 0 + n, valid)),
    ):
        if key in mods:
            p, ok = f(int(mods[key], 0))
            return np.where(ok, row + (p & 15), 0), ok
    if "row_mirror" in mods:
        return row + 15 - pos, valid
    if "row_half_mirror" in mods:
        return (lane & ~7) + 7 - (lane & 7), valid
    if "row_bcast" in mods:
        if int(mods["row_bcast"]) == 15:
            return np.where(row > 0, row - 1, 0), row > 0
        return np.full(64, 31), lane >= 32
    if "wave_shl" in mods:
        return np.minimum(lane + 1, 63), lane < 63
    if "wave_shr" in mods:
        return np.maximum(lane - 1, 0), lane > 0
    if "wave_rol" in mods:
        return (lane + 1) & 63, valid
    if "wave_ror" in mods:
        return (lane - 1) & 63, valid
    raise NotImplementedError(f"DPP control {mods}")


def _dpp_wrap(inst, ctx, kind, src):
    """Reader of the permuted source 0 and the function giving the write mask."""
    mods = inst.mods
    perm, valid = dpp_source(mods)
    bound_zero = "bound_ctrl" in mods
    rows, banks = int(mods.get("row_mask", "0xf"), 0), int(mods.get("bank_mask", "0xf"), 0)
    lane = np.arange(64)
    keep = ((rows >> (lane >> 4)) & 1).astype(bool) & ((banks >> (lane >> 2 & 3)) & 1).astype(bool)
    base = vector_reader(src, kind, ctx)

    def source_ok(st):
        # EXEC itself, not st.m: the caller has narrowed st.m to the lanes that are written
        return (st.exec.bools().reshape(st.W, 64)[:, perm] & valid).ravel()

    def read(st):
        x = base(st)
        if np.ndim(x) == 0:
            x = np.full(st.N, x)
        y = x.reshape(st.W, 64)[:, perm].ravel()
        return np.where(source_ok(st), y, y.dtype.type(0)) if bound_zero else y

    def mask(st):
        m = np.tile(keep, st.W)
        if not bound_zero:
            m = m & source_ok(st)
        m = m & st.exec.bools()
        return m

    return read, mask


# --------------------------------------------------------------------------- SDWA
_SEL = {
    "BYTE_0": (0, 8),
    "BYTE_1": (8, 8),
    "BYTE_2": (16, 8),
    "BYTE_3": (24, 8),
    "WORD_0": (0, 16),
    "WORD_1": (16, 16),
    "DWORD": (0, 32),
}


def _sdwa_reader(op, kind, ctx, sel):
    shift, width = _SEL[sel]
    sext, neg, absolute = op.sext, op.neg, op.abs
    op.neg = op.abs = False
    raw = vector_reader(op, "u", ctx)

    def read(st):
        x = raw(st)
        if width < 32:
            x = (x >> U32(shift)) & U32((1 << width) - 1)
            if sext:
                top = U32(1 << (width - 1))
                x = (x ^ top) - top
        y = from_u32(np.asarray(x), kind)
        if absolute:
            y = np.abs(y)
        return np.negative(y) if neg else y

    return read


def result_bits(x, kind):
    """A result of type ``kind`` as uint32 bits."""
    x = np.asarray(x)
    if kind == "f":
        return x.astype(F32).view(U32)
    if kind == "h":
        return x.astype(np.float16).view(np.uint16).astype(U32)
    if kind == "i":
        return x.astype(I64).astype(U32)
    if kind == "H":
        return x.astype(I64).astype(U32) & U32(0xFFFF)
    return x.astype(U32)


def _sdwa_writer(dst, kind, ctx, mods):
    shift, width = _SEL[mods.get("dst_sel", "DWORD")]
    unused = mods.get("dst_unused", "UNUSED_PAD")
    row = ctx.row(dst)

    def write(st, x):
        b = result_bits(x, kind)
        if width < 32:
            field = U32(((1 << width) - 1) << shift)
            b = (b << U32(shift)) & field
            if unused == "UNUSED_PRESERVE":
                b = (st.v[row] & ~field) | b
            elif unused == "UNUSED_SEXT":
                fill = U32(0xFFFFFFFF << (shift + width) & M32)
                b = np.where(b >> U32(shift + width - 1) & U32(1), b | fill, b)
        np.copyto(st.v[row], b, where=st.m)

    return write


# --------------------------------------------------------------------------- generic builder
def _readers(inst, ctx, types, srcs, suffix, dst, dtype):
    """Readers for the sources plus an optional DPP write-mask function."""
    mods, readers, mask = inst.mods, [], None
    sel = bit_list(mods, "op_sel", len(types) + 1)
    k = 0
    for t in types:
        if t == "=":
            readers.append(vector_reader(dst, dtype, ctx, bool(sel[-1]) and dtype in "hHI"))
            continue
        op = srcs[k]
        if suffix.endswith("dpp") and k == 0:
            r, mask = _dpp_wrap(inst, ctx, t, op)
        elif suffix == "sdwa" and k < 2:
            r = _sdwa_reader(op, t, ctx, mods.get(f"src{k}_sel", "DWORD"))
        else:
            r = vector_reader(op, t, ctx, bool(sel[k]) and t in "hHIy")
        readers.append(r)
        k += 1
    return readers, mask


def _under_mask(op, mask):
    def masked(st):
        keep = st.m
        st.m = mask(st)
        try:
            op(st)
        finally:
            st.m = keep

    return masked


def _table_op(inst, ctx, base, suffix):
    f, types, dtype = TABLE[base]
    mods = inst.mods
    dst = parse_operand(inst.ops[0])
    srcs = [parse_operand(o) for o in inst.ops[1:]]
    if base in CLAMPED_SIGNED and mods.get("clamp"):
        f, types, dtype = CLAMPED_SIGNED[base], "ii", "i"
        mods = {k: v for k, v in mods.items() if k != "clamp"}
    f = _finish(f, base, mods, dtype)
    readers, mask = _readers(inst, ctx, types, srcs, suffix, dst, dtype)
    if suffix == "sdwa":
        write = _sdwa_writer(dst, dtype, ctx, mods)
    else:
        high = (
            bool(bit_list(mods, "op_sel", len(types) + 1)[-1])
            and dtype in "hHI"
            and "op_sel" in mods
        )
        write = vector_writer(dst, dtype, ctx, high, base in PRESERVE_HIGH)
    if isinstance(f, np.ufunc) and dtype in "uif" and suffix not in ("sdwa",):
        op = _ufunc_op(f, readers, ctx.row(dst), dtype)
    elif len(readers) == 1:
        (r0,) = readers
        if base == "v_mov_b32" and suffix in ("e32", "e64", ""):
            row = ctx.row(dst)

            def op(st):
                np.copyto(st.v[row], r0(st), where=st.m)
        else:

            def op(st):
                write(st, f(r0(st)))
    elif len(readers) == 2:
        r0, r1 = readers

        def op(st):
            write(st, f(r0(st), r1(st)))
    else:
        r0, r1, r2 = readers

        def op(st):
            write(st, f(r0(st), r1(st), r2(st)))

    return _under_mask(op, mask) if mask else op


def _ufunc_op(f, readers, row, dtype):
    """A ufunc straight into the destination row under EXEC."""
    if len(readers) == 1:
        (r0,) = readers
        if dtype == "f":
            return lambda st: f(r0(st), out=st.f[row], where=st.m)
        return lambda st: f(r0(st), out=(st.v if dtype == "u" else st.i)[row], where=st.m)
    r0, r1 = readers
    if dtype == "f":
        return lambda st: f(r0(st), r1(st), out=st.f[row], where=st.m)
    if dtype == "u":
        return lambda st: f(r0(st), r1(st), out=st.v[row], where=st.m)
    return lambda st: f(r0(st), r1(st), out=st.i[row], where=st.m)


# --------------------------------------------------------------------------- compares
_FCMP = {
    "f": lambda a, b: np.zeros(np.broadcast(a, b).shape, bool),
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "lg": lambda a, b: (a < b) | (a > b),
    "ge": np.greater_equal,
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "nge": lambda a, b: ~np.greater_equal(a, b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~np.greater(a, b),
    "nle": lambda a, b: ~np.less_equal(a, b),
    "neq": np.not_equal,
    "nlt": lambda a, b: ~np.less(a, b),
    "tru": lambda a, b: np.ones(np.broadcast(a, b).shape, bool),
}
_ICMP = {
    "f": _FCMP["f"],
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ne": np.not_equal,
    "ge": np.greater_equal,
    "t": _FCMP["tru"],
}
_CMP_TYPE = {
    "f32": "f",
    "f64": "d",
    "f16": "h",
    "i32": "i",
    "u32": "u",
    "i64": "q",
    "u64": "Q",
    "i16": "I",
    "u16": "H",
}
_CMP = re.compile(r"^v_cmp(x?)_([a-z]+)_([fiu]\d+)$")


def _compare(inst, ctx, base, suffix):
    m = _CMP.match(base)
    writes_exec, rel, kind = bool(m.group(1)), m.group(2), m.group(3)
    t = _CMP_TYPE[kind]
    if rel == "class":
        types, f = t + "u", lambda a, b: _class(a, b, {"f": F32, "d": F64, "h": np.float16}[t])
    else:
        types, f = t + t, (_FCMP if kind[0] == "f" else _ICMP)[rel]
    dst = parse_operand(inst.ops[0])
    srcs = [parse_operand(o) for o in inst.ops[1:]]
    readers, dpp_mask = _readers(inst, ctx, types, srcs, suffix, dst, "b")
    (r0, r1), i = readers, dst.index

    def op(st):
        x = f(r0(st), r1(st))
        if np.ndim(x) == 0:
            x = np.full(st.N, bool(x))
        m = dpp_mask(st) if dpp_mask else st.m
        mask = LaneMask(st.W, x & m if m is not True else x)
        st.wrmask(i, mask)
        if writes_exec:
            st.set_exec(mask)

    return op


# --------------------------------------------------------------------------- carry and wide ops
def _add_co(a, b, c):
    s = _wide(a) + _wide(b) + _wide(c)
    return s.astype(U32), s > U64(M32)


def _sub_co(a, b, c):
    return a - b - _u(c), _wide(b) + _wide(c) > _wide(a)


_CARRY = {
    "v_add_co_u32": (_add_co, False, False),
    "v_sub_co_u32": (_sub_co, False, False),
    "v_subrev_co_u32": (_sub_co, False, True),
    "v_addc_co_u32": (_add_co, True, False),
    "v_subb_co_u32": (_sub_co, True, False),
    "v_subbrev_co_u32": (_sub_co, True, True),
}


def _carry(inst, ctx, base, suffix):
    f, has_in, rev = _CARRY[base]
    ops = [parse_operand(o) for o in inst.ops]
    readers, mask = _readers(inst, ctx, "uu", ops[2:4], suffix, ops[0], "u")
    ra, rb = reversed(readers) if rev else readers
    rc = vector_reader(ops[4], "b", ctx) if has_in else None
    wd = (
        _sdwa_writer(ops[0], "u", ctx, inst.mods)
        if suffix == "sdwa"
        else vector_writer(ops[0], "u", ctx)
    )
    wc = vector_writer(ops[1], "b", ctx)

    def op(st):
        r, carry = f(ra(st), rb(st), rc(st) if rc else U32(0))
        wd(st, r)
        wc(st, carry)

    return _under_mask(op, mask) if mask else op


def _mad64(inst, ctx, signed):
    ops = [parse_operand(o) for o in inst.ops]
    t = "i" if signed else "u"
    ra, rb = (vector_reader(o, t, ctx) for o in ops[2:4])
    rc = vector_reader(ops[4], "Q", ctx)
    wd, wc = vector_writer(ops[0], "Q", ctx), vector_writer(ops[1], "b", ctx)

    def op(st):
        a, b, c = ra(st), rb(st), rc(st)
        if signed:
            p = _swide(a) * _swide(b)
            cs = c.view(I64)
            r = p + cs
            carry = (np.asarray(p ^ r) & np.asarray(cs ^ r)) < 0
            wd(st, np.asarray(r).view(U64))
        else:
            r = _wide(a) * _wide(b) + c
            carry = r < c
            wd(st, r)
        wc(st, carry)

    return op


def _div_scale_op(inst, ctx, base):
    ops = [parse_operand(o) for o in inst.ops]
    t = "f" if base.endswith("f32") else "d"
    f = (
        _div_scale(F32, 32, 127, 23, 64, 96, 23)
        if t == "f"
        else _div_scale(F64, 64, 1023, 52, 128, 768, 53)
    )
    readers = [vector_reader(o, t, ctx) for o in ops[2:5]]
    wd, wc = vector_writer(ops[0], t, ctx), vector_writer(ops[1], "b", ctx)

    def op(st):
        r, vcc = f(*[g(st) for g in readers])
        wd(st, r)
        wc(st, vcc)

    return op


def _div_fmas_op(inst, ctx, base):
    """V_DIV_FMAS: fma, then undo the scaling where VCC is set.

    The direction follows from the magnitude of the (scaled) quotient S2: only
    the denominator was enlarged when it is large, only the numerator otherwise.
    """
    ops = [parse_operand(o) for o in inst.ops]
    t = "f" if base.endswith("f32") else "d"
    f, step = (fma32, 64) if t == "f" else (_fma64, 128)
    readers = [vector_reader(o, t, ctx) for o in ops[1:4]]
    wd = vector_writer(ops[0], t, ctx)

    def op(st):
        a, b, c = (g(st) for g in readers)
        r = f(a, b, c)
        vcc = st.rdmask(106).bools()
        if vcc.any():
            up = np.abs(c) >= 2.0
            if t == "f":  # scale before the only rounding
                wide = formats.fma_odd(a, b, c)
                scaled = np.ldexp(wide, np.where(up, step, -step)).astype(F32)
            else:
                scaled = np.ldexp(r, np.where(up, step, -step))
            r = np.where(vcc, scaled, r)
        wd(st, r)

    return op


def _cndmask(inst, ctx, base, suffix):
    ops = [parse_operand(o) for o in inst.ops]
    t = "H" if base.endswith("b16") else "f" if any(o.neg or o.abs for o in ops[1:3]) else "u"
    readers, mask = _readers(inst, ctx, t + t, ops[1:3], suffix, ops[0], t)
    ra, rb = readers
    rc = vector_reader(ops[3], "b", ctx)
    wd = (
        _sdwa_writer(ops[0], t, ctx, inst.mods)
        if suffix == "sdwa"
        else vector_writer(ops[0], t, ctx)
    )

    def op(st):
        wd(st, np.where(rc(st), rb(st), ra(st)))

    return _under_mask(op, mask) if mask else op


# --------------------------------------------------------------------------- lane movement
def _first_active(st):
    """Index of the lowest active lane of each wave (0 when none)."""
    return st.exec.bools().reshape(st.W, 64).argmax(axis=1)


def _uniform(x):
    first = int(x[0])
    return first if len(x) == 1 or (x == x[0]).all() else x.astype(U64)


def _readfirstlane(inst, ctx):
    d, s = (parse_operand(o) for o in inst.ops)
    write = scalar_writer(d)
    if s.kind not in "va":
        r = scalar_reader(s)
        return lambda st: write(st, r(st))
    row = ctx.row(s)

    def op(st):
        x = st.v[row].reshape(st.W, 64)
        if st.m is True:
            write(st, _uniform(x[:, 0]))
        else:
            write(st, _uniform(x[np.arange(st.W), _first_active(st)]))

    return op


def _readlane(inst, ctx):
    d, s, lane = (parse_operand(o) for o in inst.ops)
    write, r, row = scalar_writer(d), scalar_reader(lane), ctx.row(s)

    def op(st):
        k = r(st)
        x = st.v[row].reshape(st.W, 64)
        write(
            st,
            _uniform(
                x[:, k & 63] if isinstance(k, int) else x[np.arange(st.W), k.astype(I64) & 63]
            ),
        )

    return op


def _writelane(inst, ctx):
    d, s, lane = (parse_operand(o) for o in inst.ops)
    rs, rl, row = scalar_reader(s), scalar_reader(lane), ctx.row(d)

    def op(st):
        k, x = rl(st), rs(st)
        v = st.v[row].reshape(st.W, 64)
        v[np.arange(st.W), (k & 63) if isinstance(k, int) else k.astype(I64) & 63] = x

    return op


def _mbcnt(inst, ctx, hi):
    d, a, b = (parse_operand(o) for o in inst.ops)
    ra, rb, w = vector_reader(a, "u", ctx), vector_reader(b, "u", ctx), vector_writer(d, "u", ctx)
    lane = np.arange(64)
    if hi:
        below = np.array([(1 << max(i - 32, 0)) - 1 for i in lane], np.uint64).astype(U32)
    else:
        below = np.array([(1 << min(i, 32)) - 1 for i in lane], np.uint64).astype(U32)

    def op(st):
        w(st, _bcnt(ra(st) & np.tile(below, st.W)) + rb(st))

    return op


def _swap(inst, ctx):
    a, b = (ctx.row(parse_operand(o)) for o in inst.ops)

    def op(st):
        t = st.v[a].copy()
        np.copyto(st.v[a], st.v[b], where=st.m)
        np.copyto(st.v[b], t, where=st.m)

    return op


def _permlane_swap(inst, ctx, size):
    """V_PERMLANE{16,32}_SWAP: odd rows of D exchange with even rows of S (EXEC ignored)."""
    a, b = (ctx.row(parse_operand(o)) for o in inst.ops)

    def op(st):
        x, y = (st.v[r].reshape(st.W, 64 // (2 * size), 2, size) for r in (a, b))
        t = x[:, :, 1].copy()
        x[:, :, 1] = y[:, :, 0]
        y[:, :, 0] = t

    return op


# --------------------------------------------------------------------------- packed math
def _pk_f32(inst, ctx, f, n):
    """VOP3P on float32 pairs: op_sel picks words for the low result, op_sel_hi for the high."""
    ops = [parse_operand(o) for o in inst.ops]
    lo, hi = bit_list(inst.mods, "op_sel", n), bit_list(inst.mods, "op_sel_hi", n, 1)
    nlo, nhi = bit_list(inst.mods, "neg_lo", n), bit_list(inst.mods, "neg_hi", n)
    dst = ctx.row(ops[0])
    raw = f is None

    def half(op, second, neg):
        if op.kind in "va":
            row = ctx.row(op) + second
            if raw:
                return lambda st: st.v[row]
            return (lambda st: -st.f[row]) if neg else (lambda st: st.f[row])
        if op.kind == "s":
            one = parse_operand(op.text)
            one.index, one.count, one.neg, one.abs = op.index + second, 1, bool(neg), False
            return vector_reader(one, "u" if raw else "f", ctx)
        op.neg = bool(neg)
        return vector_reader(op, "u" if raw else "f", ctx)

    low = [half(o, s, g) for o, s, g in zip(ops[1:], lo, nlo, strict=True)]
    high = [half(o, s, g) for o, s, g in zip(ops[1:], hi, nhi, strict=True)]
    clamp = inst.mods.get("clamp")

    def put(st, row, x):
        if clamp:
            x = np.where(np.isnan(x), F32(0), np.clip(x, F32(0), F32(1)))
        np.copyto(st.f[row], x, where=st.m)

    if raw:
        # V_PK_MOV_B32: low word from source 0 (op_sel[0]), high word from source 1 (op_sel[1])
        high = [half(ops[2], lo[1], 0)]

        def move(st):
            a, b = np.array(low[0](st)), np.array(high[0](st))
            np.copyto(st.v[dst], a, where=st.m)
            np.copyto(st.v[dst + 1], b, where=st.m)

        return move
    if n == 2:
        (a0, b0), (a1, b1) = low, high

        def op2(st):
            x, y = f(a0(st), b0(st)), f(a1(st), b1(st))
            put(st, dst, x)
            put(st, dst + 1, y)

        return op2

    def op3(st):
        x, y = f(*[g(st) for g in low]), f(*[g(st) for g in high])
        put(st, dst, x)
        put(st, dst + 1, y)

    return op3


_PK16 = {}
for _name in (
    "add_f16",
    "mul_f16",
    "min_f16",
    "max_f16",
    "fma_f16",
    "add_u16",
    "sub_u16",
    "mul_lo_u16",
    "mad_u16",
    "min_u16",
    "max_u16",
    "add_i16",
    "sub_i16",
    "mad_i16",
    "min_i16",
    "max_i16",
    "lshlrev_b16",
    "lshrrev_b16",
    "ashrrev_i16",
):
    _PK16["v_pk_" + _name] = TABLE["v_" + _name]


def _pk16(inst, ctx, base):
    f, types, dtype = _PK16[base]
    n = len(types)
    mods = inst.mods
    f = _finish(f, base.replace("_pk", ""), mods, dtype)
    ops = [parse_operand(o) for o in inst.ops]
    lo, hi = bit_list(mods, "op_sel", n), bit_list(mods, "op_sel_hi", n, 1)
    nlo, nhi = bit_list(mods, "neg_lo", n), bit_list(mods, "neg_hi", n)

    def raw(op, t):
        if op.kind == "c":
            bits = op.bits(16) if op.is_float else op.const & M32
            return lambda st: U32(bits)
        return vector_reader(op, "u", ctx)

    src = [raw(o, t) for o, t in zip(ops[1:], types, strict=True)]
    w = vector_writer(ops[0], "u", ctx)

    def pick(x, t, high, neg):
        y = from_u32(np.asarray(x), t, bool(high))
        return -y if neg else y

    def op(st):
        xs = [r(st) for r in src]
        a = result_bits(
            f(*[pick(x, t, s, g) for x, t, s, g in zip(xs, types, lo, nlo, strict=True)]), dtype
        ) & U32(0xFFFF)
        b = result_bits(
            f(*[pick(x, t, s, g) for x, t, s, g in zip(xs, types, hi, nhi, strict=True)]), dtype
        )
        w(st, a | b << U32(16))

    return op


def _fma_mix(inst, ctx, base):
    """V_FMA_MIX: op_sel_hi[i] says source i is a half, op_sel[i] which one."""
    ops = [parse_operand(o) for o in inst.ops]
    sel, half = bit_list(inst.mods, "op_sel", 3), bit_list(inst.mods, "op_sel_hi", 3)
    readers = [
        vector_reader(o, "h" if h else "f", ctx, bool(s) and bool(h))
        for o, s, h in zip(ops[1:], sel, half, strict=True)
    ]
    if base.endswith("lo_f16"):
        w = vector_writer(ops[0], "h", ctx, False, True)
    elif base.endswith("hi_f16"):
        w = vector_writer(ops[0], "h", ctx, True)
    else:
        w = vector_writer(ops[0], "f", ctx)
    mad = "mad_mix" in base
    fin = _finish(lambda x: x, base, inst.mods, "f")

    def op(st):
        a, b, c = (np.asarray(r(st), F32) for r in readers)
        w(st, fin(_mad_round(a, b, c) if mad else fma32(a, b, c)))

    return op


# --------------------------------------------------------------------------- fp8 / fp4 conversions
def _fp8_fmt(ctx, base):
    fp8, bf8 = formats.fp8_for(ctx.arch)
    return bf8 if "bf8" in base else fp8


def _cvt_from_fp8(inst, ctx, base, suffix):
    """V_CVT_F32_FP8/BF8 (one byte) and V_CVT_PK_F32_* (two bytes of a word)."""
    fmt = _fp8_fmt(ctx, base)
    packed = "_pk_" in base
    ops = [parse_operand(o) for o in inst.ops]
    sel = bit_list(inst.mods, "op_sel", 2)
    if suffix == "sdwa":
        shift = _SEL[inst.mods.get("src0_sel", "DWORD")][0]
    elif packed:
        shift = 16 * sel[0]
    else:
        shift = 8 * (sel[0] * 1 + sel[1] * 2)
        if "byte_sel" in inst.mods:
            shift = 8 * int(inst.mods["byte_sel"])
    r, dst = vector_reader(ops[1], "u", ctx), ctx.row(ops[0])

    def op(st):
        x = np.asarray(r(st)) >> U32(shift)
        lo = fmt.decode(x & U32(255))
        if packed:
            hi = fmt.decode(x >> U32(8) & U32(255))
            np.copyto(st.f[dst + 1], hi, where=st.m)
        np.copyto(st.f[dst], lo, where=st.m)

    return op


def _cvt_to_fp8(inst, ctx, base):
    """V_CVT_PK_FP8_F32 / BF8: two floats into the word op_sel[2] picks, keeping the other."""
    fmt = _fp8_fmt(ctx, base)
    ops = [parse_operand(o) for o in inst.ops]
    ra, rb = vector_reader(ops[1], "f", ctx), vector_reader(ops[2], "f", ctx)
    high = (
        bit_list(inst.mods, "op_sel", 3)[2]
        if "op_sel" in inst.mods and inst.mods["op_sel"].count(",") == 2
        else bit_list(inst.mods, "op_sel", 4)[3]
    )
    dst = ctx.row(ops[0])

    def op(st):
        sat = bool(st.mode >> 23 & 1)
        w = fmt.encode(ra(st), sat) | fmt.encode(rb(st), sat) << U32(8)
        old = st.v[dst]
        np.copyto(
            old,
            (old & U32(0xFFFF)) | w << U32(16) if high else (old & U32(0xFFFF0000)) | w,
            where=st.m,
        )

    return op


def _scalef32_single(inst, ctx, base):
    """V_CVT_SCALEF32_F32_FP8/BF8: one byte (op_sel) times the power-of-two scale."""
    fmt = _fp8_fmt(ctx, base)
    ops = [parse_operand(o) for o in inst.ops]
    sel = bit_list(inst.mods, "op_sel", 2)
    shift = U32(8 * (sel[0] + 2 * sel[1]))
    rx, rs, w = (
        vector_reader(ops[1], "u", ctx),
        vector_reader(ops[2], "u", ctx),
        vector_writer(ops[0], "f", ctx),
    )

    def op(st):
        e = (np.asarray(rs(st)) >> U32(23) & U32(255)).astype(np.int32) - 127
        w(
            st,
            (
                fmt.decode(np.asarray(rx(st)) >> shift & U32(255)).astype(F64) * np.ldexp(1.0, e)
            ).astype(F32),
        )

    return op


_SCALEF = re.compile(
    r"^v_cvt_scalef32_pk(8|16|32)?_(f32|f16|bf16|fp8|bf8|fp4|fp6|bf6)_(f32|f16|bf16|fp8|bf8|fp4|fp6|bf6)$"
)


def unpack_bits(words, bits, count):
    """``count`` fields of ``bits`` bits of uint32[k, N] rows, lowest first: uint32[count, N]."""
    out = []
    for i in range(count):
        b = i * bits
        w, s = divmod(b, 32)
        x = words[w] >> U32(s)
        if s + bits > 32:
            x = x | words[w + 1] << U32(32 - s)
        out.append(x & U32((1 << bits) - 1))
    return np.array(out)


def _pack_bits(codes, bits):
    rows = [np.zeros(codes.shape[1], U32) for _ in range((codes.shape[0] * bits + 31) // 32)]
    for i, c in enumerate(codes):
        w, s = divmod(i * bits, 32)
        rows[w] |= c << U32(s)
        if s + bits > 32:
            rows[w + 1] |= c >> U32(32 - s)
    return rows


def _small(ctx, name):
    fp8, bf8 = formats.fp8_for(ctx.arch)
    return {"fp8": fp8, "bf8": bf8, "fp4": formats.FP4, "fp6": formats.FP6, "bf6": formats.BF6}.get(
        name
    )


def _scalef32(inst, ctx, base):
    """gfx950 V_CVT_SCALEF32_PK*: the scale is the power of two in the exponent of a float32.

    Decoding multiplies by it; encoding divides by it before rounding (saturating).
    """
    m = _SCALEF.match(base)
    count = int(m.group(1) or 2)
    to, frm = m.group(2), m.group(3)
    ops = [parse_operand(o) for o in inst.ops]
    sel = bit_list(inst.mods, "op_sel", 4)
    fsrc, fdst = _small(ctx, frm), _small(ctx, to)
    dst = ctx.row(ops[0])
    rs = vector_reader(ops[-1], "u", ctx)

    def scale_of(st):
        e = (np.asarray(rs(st)) >> U32(23) & U32(255)).astype(np.int32) - 127
        return np.ldexp(1.0, e)

    if fsrc is not None and fdst is None:
        src = ops[1]
        words = (count * fsrc.bits + 31) // 32
        shift = 0
        if count == 2:
            shift = 16 * sel[0] if fsrc.bits == 8 else 8 * (sel[0] + 2 * sel[1])

        def decode(st):
            if count == 2:
                x = np.asarray(vector_reader(src, "u", ctx)(st)) >> U32(shift)
                x = np.broadcast_to(x, st.N)
                codes = unpack_bits([x], fsrc.bits, 2)
            else:
                row = ctx.row(src)
                codes = unpack_bits(st.regs[row : row + words], fsrc.bits, count)
            vals = fsrc.decode(codes).astype(F64) * scale_of(st)
            _store_wide(st, dst, vals, to)

        return decode
    if fdst is not None and fsrc is None:

        def encode(st):
            if count == 2 and frm == "f32":
                vals = [vector_reader(o, "f", ctx)(st) for o in ops[1:3]]
            elif count == 2:
                x = vector_reader(ops[1], "u", ctx)(st)
                vals = list(_half2(x, "h" if frm == "f16" else "y"))
            elif frm == "f32":
                rows = [ctx.row(o) + k for o in ops[1:-1] for k in range(o.count)]
                vals = [st.f[r] for r in rows]
            else:
                rows = [ctx.row(o) + k for o in ops[1:-1] for k in range(o.count)]
                vals = [h for r in rows for h in _half2(st.v[r], "h" if frm == "f16" else "y")]
            s = scale_of(st)
            codes = np.array(
                [np.broadcast_to(fdst.encode(np.asarray(v, F64) / s, True), st.N) for v in vals]
            )
            if count == 2:
                w = codes[0] | codes[1] << U32(fdst.bits)
                width = 2 * fdst.bits
                sh = 16 * sel[3] if width == 16 else 8 * (sel[2] + 2 * sel[3])
                field = U32(((1 << width) - 1) << sh)
                np.copyto(st.v[dst], (st.v[dst] & ~field) | w << U32(sh), where=st.m)
            else:
                for k, row in enumerate(_pack_bits(codes, fdst.bits)):
                    np.copyto(st.v[dst + k], row, where=st.m)

        return encode
    raise NotImplementedError(inst.text)


def _store_wide(st, dst, vals, to):
    """Store decoded values: one float per register, or two halves per register."""
    if to == "f32":
        for k, v in enumerate(vals):
            np.copyto(st.f[dst + k], v.astype(F32), where=st.m)
        return
    enc = formats.f16_bits if to == "f16" else (lambda v: formats.bf16_encode(v.astype(F32)))
    for k in range(0, len(vals), 2):
        np.copyto(st.v[dst + k // 2], enc(vals[k]) | enc(vals[k + 1]) << U32(16), where=st.m)


def _bitop(inst, ctx, kind):
    """V_BITOP3: truth table over three sources; the 16-bit form keeps the other half."""
    ops = [parse_operand(o) for o in inst.ops]
    table, sel = int(inst.mods.get("bitop3", "0"), 0), bit_list(inst.mods, "op_sel", 4)
    ra, rb, rc = (
        vector_reader(o, kind, ctx, bool(h) and kind == "H")
        for o, h in zip(ops[1:4], sel[:3], strict=True)
    )
    w = vector_writer(ops[0], kind, ctx, bool(sel[3]) and kind == "H", True)
    return lambda st: w(st, _bitop3(ra(st), rb(st), rc(st), table))


def indexed_move(inst, ctx, mode):
    """V_MOV_B32 in GPR-indexing mode: M0[7:0] is added to the source (bit 0) or destination (3)."""
    base, suffix = split_suffix(inst.name)
    d, s = (parse_operand(o) for o in inst.ops)
    if (
        base != "v_mov_b32"
        or suffix not in ("e32", "e64", "")
        or mode & ~9
        or (mode & 1 and s.kind != "v")
    ):
        raise NotImplementedError(inst.text + " in GPR indexing mode")
    read, dst = vector_reader(s, "u", ctx), ctx.row(d)
    src = s.index

    def op(st):
        idx = st.rd32(124)
        idx = [idx & 255] * st.W if isinstance(idx, int) else [int(v) & 255 for v in idx]
        m = st.exec.bools()
        for w, k in enumerate(idx):
            part = slice(64 * w, 64 * w + 64)
            if (src + k >= ctx.vrows and mode & 1) or (d.index + k >= ctx.vrows and mode & 8):
                raise NotImplementedError(
                    f"{inst.text}: indexed register beyond the kernel's VGPRs"
                )
            x = st.v[src + k][part] if mode & 1 else read(st)
            x = x if np.ndim(x) == 0 or mode & 1 else x[part]
            np.copyto(st.v[dst + (k if mode & 8 else 0)][part], x, where=m[part])

    return op


def build(inst, ctx):
    """Closure for a vector-ALU instruction, or None when it is not one of these."""
    base, suffix = split_suffix(inst.name)
    if base == "v_nop":
        return lambda st: None
    if base in TABLE:
        return _table_op(inst, ctx, base, suffix)
    if base.startswith("v_cmp"):
        return _compare(inst, ctx, base, suffix) if _CMP.match(base) else None
    if base in _CARRY:
        return _carry(inst, ctx, base, suffix)
    if base in ("v_mad_u64_u32", "v_mad_i64_i32"):
        return _mad64(inst, ctx, base == "v_mad_i64_i32")
    if base.startswith("v_div_scale"):
        return _div_scale_op(inst, ctx, base)
    if base.startswith("v_div_fmas"):
        return _div_fmas_op(inst, ctx, base)
    if base in ("v_cndmask_b32", "v_cndmask_b16"):
        return _cndmask(inst, ctx, base, suffix)
    if base == "v_readfirstlane_b32":
        return _readfirstlane(inst, ctx)
    if base == "v_readlane_b32":
        return _readlane(inst, ctx)
    if base == "v_writelane_b32":
        return _writelane(inst, ctx)
    if base in ("v_mbcnt_lo_u32_b32", "v_mbcnt_hi_u32_b32"):
        return _mbcnt(inst, ctx, "_hi_" in base)
    if base == "v_swap_b32":
        return _swap(inst, ctx)
    if base in ("v_permlane16_swap_b32", "v_permlane32_swap_b32"):
        return _permlane_swap(inst, ctx, 16 if "16" in base else 32)
    if base in ("v_accvgpr_read_b32", "v_accvgpr_write_b32", "v_accvgpr_mov_b32"):
        d, s = (parse_operand(o) for o in inst.ops)
        r, row = vector_reader(s, "u", ctx), ctx.row(d)
        return lambda st: np.copyto(st.v[row], r(st), where=st.m)
    if base in ("v_pk_fma_f32", "v_pk_mul_f32", "v_pk_add_f32"):
        f, n = {
            "v_pk_fma_f32": (fma32, 3),
            "v_pk_mul_f32": (np.multiply, 2),
            "v_pk_add_f32": (np.add, 2),
        }[base]
        return _pk_f32(inst, ctx, f, n)
    if base == "v_pk_mov_b32":
        return _pk_f32(inst, ctx, None, 2)
    if base in _PK16:
        return _pk16(inst, ctx, base)
    if base.startswith(("v_fma_mix", "v_mad_mix")):
        return _fma_mix(inst, ctx, base)
    if re.match(r"^v_cvt_(pk_)?f32_(fp8|bf8)$", base):
        return _cvt_from_fp8(inst, ctx, base, suffix)
    if base in ("v_cvt_pk_fp8_f32", "v_cvt_pk_bf8_f32"):
        return _cvt_to_fp8(inst, ctx, base)
    if base in ("v_cvt_scalef32_f32_fp8", "v_cvt_scalef32_f32_bf8"):
        return _scalef32_single(inst, ctx, base)
    if _SCALEF.match(base):
        return _scalef32(inst, ctx, base)
    if base in ("v_bitop3_b32", "v_bitop3_b16"):
        return _bitop(inst, ctx, "u" if base.endswith("32") else "H")
    return None
