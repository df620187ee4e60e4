"""Matrix core instructions: V_MFMA_* (CDNA3 ISA, "Matrix Arithmetic Instructions").

D = A x B + C for one M x N tile per block.  Lane and register placement for
lane ``l`` (``G = 64 / M`` lane groups, ``g = l // M``):

* A holds row ``l % M``, B holds column ``l % N``; each lane has ``e`` consecutive
  k values starting at ``g * e`` (single block), or all of K of block ``g``.
* D/C register ``4 q + i`` of lane ``l`` is element (row ``4 G q + 4 g + i``,
  column ``l % N``); multi-block forms put block b's registers one after another.
* F8F6F4: an 8-bit operand holds two 16-element chunks, chunk c at
  ``k = 16 G c + 16 g``; 6- and 4-bit operands hold 32 consecutive k values.
  Scale (E8M0) of k block ``b`` (32 values) comes from lane group ``b``.

EXEC is ignored, as the ISA says.  Numerics: products and sums are formed in
float64 and rounded once to float32; hardware rounds at intermediate points that
AMD does not document, so the last bits may differ from a real device.
"""

import re

import numpy as np

from . import formats
from .operands import parse_operand, vector_reader
from .valu import bit_list, unpack_bits

U32, F32, F64 = np.uint32, np.float32, np.float64
_NAME = re.compile(
    r"^v_mfma_(?:(scale)_)?(f32|i32|f64)_(\d+)x(\d+)x(\d+)_?(?:\d+b_)?"
    r"(f32|f64|xf32|f16|bf16_1k|bf16|i8|f8f6f4|(?:fp8|bf8)_(?:fp8|bf8))(?:_e64)?$"
)
_BITS = {"f32": 32, "xf32": 32, "f64": 64, "f16": 16, "bf16": 16, "bf16_1k": 16, "i8": 8}


def _decode(words, kind, arch, epl):
    """uint32[k, N] operand registers -> [elements per lane, N] values."""
    if kind in ("f32", "xf32"):
        return words.view(F32)
    if kind == "f64":
        return (words[0].astype(np.uint64) | words[1].astype(np.uint64) << np.uint64(32)).view(F64)[
            None
        ]
    if kind in ("bf16", "bf16_1k"):
        out = np.empty((2 * len(words), words.shape[1]), U32)
        np.left_shift(words, U32(16), out=out[0::2])
        np.bitwise_and(words, U32(0xFFFF0000), out=out[1::2])
        return out.view(F32)
    if kind == "f16":
        h = np.ascontiguousarray(words).view(np.float16).reshape(len(words), -1, 2)
        return h.transpose(0, 2, 1).reshape(2 * len(words), -1)
    if kind == "i8":
        b = np.ascontiguousarray(words).view(np.int8).reshape(len(words), -1, 4)
        return b.transpose(0, 2, 1).reshape(4 * len(words), -1)
    fp8, bf8 = formats.fp8_for(arch)
    fmt = {"fp8": fp8, "bf8": bf8, "fp6": formats.FP6, "bf6": formats.BF6, "fp4": formats.FP4}[kind]
    if fmt.bits == 8:
        b = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1, 4)
        return fmt.decode(b.transpose(0, 2, 1).reshape(4 * len(words), -1))
    return fmt.decode(unpack_bits(words, fmt.bits, epl))


def _source(op, ctx, words):
    """closure(st) -> uint32[words, N] of an A, B or C operand (constants broadcast)."""
    if op.kind in "va":
        row = ctx.row(op)
        return lambda st: st.regs[row : row + words]
    get = vector_reader(op, "u", ctx)
    return lambda st: np.broadcast_to(np.asarray(get(st)), (words, st.N))


def _flush16(x):
    return np.where(np.abs(x) < 2.0**-126, 0, x)


def build(inst, ctx):
    """Closure for a dense MFMA instruction, or None."""
    m = _NAME.match(inst.name)
    if not m:
        return None
    scaled, out, M, N, K, kind = (
        bool(m.group(1)),
        m.group(2),
        *(int(m.group(i)) for i in (3, 4, 5)),
        m.group(6),
    )
    if kind == "f8f6f4":
        return _f8f6f4(inst, ctx, M, N, K, scaled)
    if any(int(inst.mods.get(k, "0")) for k in ("cbsz", "abid", "blgp")):
        raise NotImplementedError(inst.text)
    ka, kb = kind.split("_") if "8_" in kind else (kind, kind)
    ops = [parse_operand(o) for o in inst.ops]
    epl = ops[1].count * 32 // _BITS.get(ka, 8)
    blocks = 64 * epl // (M * K)
    G = 64 // M
    ra, rb = _source(ops[1], ctx, ops[1].count), _source(ops[2], ctx, ops[2].count)
    nd = ops[0].count
    rc = _source(ops[3], ctx, nd)
    dst, arch = ctx.row(ops[0]), ctx.arch
    acc = {"f32": F64, "f64": F64, "i32": np.int64}[out]
    flush = arch == "gfx90a" and kind in ("f16", "bf16", "bf16_1k")
    if out == "f64":
        return _f64(M, N, K, ra, rb, rc, dst, nd, blocks)
    xf32 = kind == "xf32"
    Q = nd // (4 * blocks) if M >= 16 else 1

    def op(st):
        W = st.W
        a = _decode(ra(st), ka, arch, epl).astype(acc)
        b = _decode(rb(st), kb, arch, epl).astype(acc)
        if xf32:
            a, b = (_xf32(x) for x in (a, b))
        if flush and kind != "f16":
            a, b = _flush16(a), _flush16(b)
        elif flush:
            a, b = (np.where(np.abs(x) < 2.0**-14, 0, x) for x in (a, b))
        c = rc(st)
        c = (c.view(F32) if out == "f32" else c.view(np.int32)).astype(acc)
        a = a.reshape(epl, W, G, M)
        b = b.reshape(epl, W, G, N)
        if blocks == 1:
            a = a.transpose(1, 3, 2, 0).reshape(W, 1, M, K)
            b = b.transpose(1, 2, 0, 3).reshape(W, 1, K, N)
        else:
            a, b = a.transpose(1, 2, 3, 0), b.transpose(1, 2, 0, 3)
        # matmul on integers would not use BLAS; float64 is exact for i8 sums
        d = (
            np.matmul(a, b)
            if acc is F64
            else np.matmul(a.astype(F64), b.astype(F64)).astype(np.int64)
        )
        if blocks == 1 or M >= 16:
            c = (
                c.reshape(blocks, Q, 4, W, G, N)
                .transpose(3, 0, 1, 4, 2, 5)
                .reshape(W, blocks, M, N)
            )
            d = (
                (d + c)
                .reshape(W, blocks, Q, G, 4, N)
                .transpose(1, 2, 4, 0, 3, 5)
                .reshape(nd, W * 64)
            )
        else:  # 4x4, 16 blocks: block = lane group
            d = d.transpose(2, 0, 1, 3).reshape(nd, W * 64) + c
        if out == "f32":
            st.regs[dst : dst + nd] = d.astype(F32).view(U32)
            if flush:
                st.regs.view(F32)[dst : dst + nd] = _flush16(st.regs.view(F32)[dst : dst + nd])
        else:
            st.regs[dst : dst + nd] = d.astype(np.int64).astype(U32)

    return op


def _xf32(x):
    """Round float32 to XF32 (10 mantissa bits)."""
    u = np.asarray(x, F32).view(U32)
    return ((u + U32(0xFFF) + (u >> U32(13) & U32(1))) & U32(0xFFFFE000)).view(F32).astype(F64)


def _f64(M, N, K, ra, rb, rc, dst, nd, blocks):
    """V_MFMA_F64_16X16X4 (row 4 i + g in register pair i) and 4X4X4 with 4 blocks."""

    def pairs(w):
        return (w[0::2].astype(np.uint64) | w[1::2].astype(np.uint64) << np.uint64(32)).view(F64)

    def op(st):
        W = st.W
        a, b, c = pairs(ra(st))[0], pairs(rb(st))[0], pairs(rc(st))
        if M == 16:
            A = a.reshape(W, 4, 16).transpose(0, 2, 1)
            B = b.reshape(W, 4, 16)
            C = c.reshape(4, W, 4, 16).transpose(1, 0, 2, 3).reshape(W, 16, 16)
            d = (np.matmul(A, B) + C).reshape(W, 4, 4, 16).transpose(1, 0, 2, 3).reshape(4, -1)
        else:
            # lane = 16 k + 4 block + row
            A = a.reshape(W, 4, 4, 4).transpose(0, 2, 3, 1)
            B = b.reshape(W, 4, 4, 4).transpose(0, 2, 1, 3)
            C = c.reshape(W, 4, 4, 4).transpose(0, 2, 1, 3)
            d = (np.matmul(A, B) + C).transpose(0, 2, 1, 3).reshape(1, -1)
        w = np.ascontiguousarray(d).view(U32).reshape(len(d), -1, 2)
        for i in range(len(d)):
            st.v[dst + 2 * i][:] = w[i, :, 0]
            st.v[dst + 2 * i + 1][:] = w[i, :, 1]

    return op


_F8F6F4 = ["fp8", "bf8", "fp6", "bf6", "fp4"]
_SMALL_BITS = {"fp8": 8, "bf8": 8, "fp6": 6, "bf6": 6, "fp4": 4}


def _f8f6f4(inst, ctx, M, N, K, scaled):
    """V_MFMA[_SCALE]_F32_{16X16X128,32X32X64}_F8F6F4 (gfx950)."""
    ops = [parse_operand(o) for o in inst.ops]
    ka, kb = (_F8F6F4[int(inst.mods.get(k, "0"))] for k in ("cbsz", "blgp"))
    words = [32 * _SMALL_BITS[k] // 32 for k in (ka, kb)]
    ra, rb = _source(ops[1], ctx, words[0]), _source(ops[2], ctx, words[1])
    rc = _source(ops[3], ctx, ops[0].count)
    dst, nd, arch, G = ctx.row(ops[0]), ops[0].count, ctx.arch, 64 // M
    Q = nd // 4
    scales = None
    if scaled:
        lo, hi = bit_list(inst.mods, "op_sel", 2), bit_list(inst.mods, "op_sel_hi", 2, 1)
        scales = [(_source(ops[4 + k], ctx, 1), U32(8 * (lo[k] + 2 * hi[k]))) for k in range(2)]

    def operand(words, kind, W, size):
        """[W, size, K] values with k in natural order."""
        e = _decode(words, kind, arch, 32).astype(F64)
        if _SMALL_BITS[kind] == 8:
            return e.reshape(2, 16, W, G, size).transpose(2, 4, 0, 3, 1).reshape(W, size, K)
        return e.reshape(32, W, G, size).transpose(1, 3, 2, 0).reshape(W, size, K)

    def op(st):
        W = st.W
        a, b = operand(ra(st), ka, W, M), operand(rb(st), kb, W, N)
        if scales:
            for x, (rs, shift), size in ((a, scales[0], M), (b, scales[1], N)):
                s = formats.e8m0(rs(st)[0] >> shift & U32(255)).reshape(W, G, size)
                x *= np.repeat(s.transpose(0, 2, 1), 32, axis=2)
        c = (
            rc(st)
            .view(F32)
            .astype(F64)
            .reshape(Q, 4, W, G, N)
            .transpose(2, 0, 3, 1, 4)
            .reshape(W, M, N)
        )
        d = np.matmul(a, b.transpose(0, 2, 1)) + c
        d = d.reshape(W, Q, G, 4, N).transpose(1, 3, 0, 2, 4).reshape(nd, W * 64)
        st.regs[dst : dst + nd] = d.astype(F32).view(U32)

    return op
