"""Operand text -> Operand, and typed accessors bound at decode time.

Type codes used throughout the instruction tables:

=====  ==========================================================
``u``  uint32 lanes                  ``i``  int32 lanes
``f``  float32 lanes                 ``h``  float16 in bits 15:0
``H``  uint16 (as uint32) bits 15:0  ``I``  int16 (as int32) bits 15:0
``Q``  uint64 register pair          ``q``  int64 register pair
``d``  float64 register pair         ``b``  lane mask (SGPR pair/VCC)
=====  ==========================================================
"""

import re
import struct

import numpy as np

from .state import M32, M64, U32, U64, LaneMask

SPECIAL = {
    "vcc": 106,
    "vcc_lo": 106,
    "vcc_hi": 107,
    "exec": 126,
    "exec_lo": 126,
    "exec_hi": 127,
    "m0": 124,
    "flat_scratch": 102,
    "flat_scratch_lo": 102,
    "flat_scratch_hi": 103,
    "xnack_mask": 104,
    "xnack_mask_lo": 104,
    "xnack_mask_hi": 105,
}
SHARED_APERTURE, PRIVATE_APERTURE = 0x00010000, 0x00020000
_APERTURE = {
    "src_shared_base": SHARED_APERTURE << 32,
    "src_shared_limit": (SHARED_APERTURE << 32) | M32,
    "src_private_base": PRIVATE_APERTURE << 32,
    "src_private_limit": (PRIVATE_APERTURE << 32) | M32,
}
_REG = re.compile(r"^([sva])(\d+)$|^([sva])\[(\d+):(\d+)\]$|^(ttmp)\[?(\d+)(?::(\d+))?\]?$")


class Operand:
    """kind: 'v', 'a', 's' (scalar register), 'c' (constant), 'off', 'x' (special read-only)."""

    __slots__ = ("abs", "const", "count", "index", "is_float", "kind", "neg", "sext", "text")

    def __init__(self, kind, index=0, count=1, const=0, is_float=False, text=""):
        self.kind, self.index, self.count, self.const, self.is_float = (
            kind,
            index,
            count,
            const,
            is_float,
        )
        self.neg = self.abs = self.sext = False
        self.text = text

    def bits(self, width):
        """The constant's bit pattern for an operand of 16, 32 or 64 bits."""
        if self.is_float:
            fmt = {16: "<e", 32: "<f", 64: "<d"}[width]
            return int.from_bytes(struct.pack(fmt, self.const), "little")
        return self.const & ((1 << width) - 1)


def parse_operand(text):
    """Parse one operand as LLVM prints it."""
    t, neg, absolute, sext = text.strip(), False, False, False
    while True:
        if t.startswith("-") and not re.match(r"^-[\d.]", t):
            neg, t = not neg, t[1:]
        elif t.startswith("neg(") and t.endswith(")"):
            neg, t = not neg, t[4:-1]
        elif t.startswith("abs(") and t.endswith(")"):
            absolute, t = True, t[4:-1]
        elif t.startswith("sext(") and t.endswith(")"):
            sext, t = True, t[5:-1]
        elif t.startswith(("lit(", "lit64(")) and t.endswith(")"):
            t = t[t.index("(") + 1 : -1]
        elif t.startswith("|") and t.endswith("|"):
            absolute, t = True, t[1:-1]
        else:
            break
    op = _plain(t)
    op.neg, op.abs, op.sext, op.text = neg, absolute, sext, text
    return op


def _plain(t):
    if t in SPECIAL:
        return Operand(
            "s", SPECIAL[t], 2 if t in ("vcc", "exec", "flat_scratch", "xnack_mask") else 1
        )
    if t == "off":
        return Operand("off")
    if t in _APERTURE:
        return Operand("c", const=_APERTURE[t], count=2)
    if t in ("scc", "src_scc", "vccz", "src_vccz", "execz", "src_execz"):
        return Operand("x", {"scc": 0, "vccz": 1, "execz": 2}[t.replace("src_", "")])
    m = _REG.match(t)
    if m:
        if m.group(1):
            return Operand(m.group(1), int(m.group(2)))
        if m.group(3):
            lo, hi = int(m.group(4)), int(m.group(5))
            return Operand(m.group(3), lo, hi - lo + 1)
        lo, hi = int(m.group(7)), int(m.group(8) or m.group(7))
        return Operand("s", 108 + lo, hi - lo + 1)
    try:
        return Operand("c", const=int(t, 0))
    except ValueError:
        pass
    try:
        v = float(t)
    except ValueError:
        raise NotImplementedError(f"operand {t!r}") from None
    if t.lstrip("-").startswith("0.15915"):
        v = 0.15915494309189532
    return Operand("c", const=v, is_float=True)


# --------------------------------------------------------------------------- scalar access
def scalar_reader(op, width=32):
    """closure(st) -> int or per-wave array, for SALU and SMEM operands."""
    if op.kind == "c":
        value = (
            op.const & M64
            if op.count == 2 and width == 64
            else op.const >> 32
            if op.count == 2
            else op.bits(width)
        )
        return lambda st: value
    if op.kind == "x":
        return _special_reader(op.index)
    if op.kind != "s":
        raise NotImplementedError(f"scalar operand {op.text}")
    i = op.index
    if width == 64:
        return lambda st: st.rd64(i)
    if i >= 126:
        return lambda st: st.rd32(i)

    def read(st):
        x = st.s[i]
        return x if type(x) is int else st.rd32(i)

    return read


def _special_reader(which):
    def read(st):
        if which == 0:
            x = st.scc
        else:
            x = st.rdmask(106 if which == 1 else 126).any_per_wave()
            x = np.logical_not(x)
            x = bool(x) if x.ndim == 0 else x
        return x.astype(U64) if isinstance(x, np.ndarray) else int(x)

    return read


def scalar_writer(op, width=32):
    """closure(st, value) storing an int or per-wave array."""
    if op.kind != "s":
        raise NotImplementedError(f"scalar destination {op.text}")
    i = op.index
    if width == 64:
        return lambda st, x: st.wr64(i, x)
    if i >= 126:
        return lambda st, x: st.wr32(i, x)

    def write(st, x):
        if type(st.s[i]) is LaneMask:
            st.unpair(i)
        st.s[i] = x

    return write


# --------------------------------------------------------------------------- vector access
_WIDTH = {"u": 32, "i": 32, "f": 32, "h": 16, "H": 16, "I": 16, "Q": 64, "q": 64, "d": 64, "y": 16}


def _const(op, kind):
    bits = (
        op.bits(_WIDTH[kind])
        if not (kind == "d" and not op.is_float and "0x" in op.text)
        else (op.const & M32) << 32
    )
    if kind in "QqdH" and op.count == 2:
        bits = op.const & M64
    return _scalar_to(bits, kind)


def _scalar_to(bits, kind):
    """A bit pattern as a NumPy scalar of the operand type."""
    if kind == "u":
        return U32(bits)
    if kind == "i":
        return np.int32(bits - (1 << 32) if bits & 0x80000000 else bits)
    if kind == "f":
        return U32(bits).view(np.float32)
    if kind == "h":
        return np.uint16(bits & 0xFFFF).view(np.float16)
    if kind == "H":
        return U32(bits & 0xFFFF)
    if kind == "y":
        return U32((bits & 0xFFFF) << 16).view(np.float32)
    if kind == "I":
        return np.int32((bits & 0xFFFF) - (0x10000 if bits & 0x8000 else 0))
    if kind == "Q":
        return U64(bits)
    if kind == "q":
        return U64(bits).view(np.int64)
    return U64(bits).view(np.float64)


def from_u32(x, kind, high=False):
    """uint32 lanes reinterpreted as ``kind`` (16-bit kinds take one half)."""
    if kind == "u":
        return x
    if kind == "i":
        return x.view(np.int32)
    if kind == "f":
        return x.view(np.float32)
    half = x >> U32(16) if high else x & U32(0xFFFF)
    if kind == "H":
        return half
    if kind == "I":
        return half.astype(np.uint16).view(np.int16).astype(np.int32)
    if kind == "y":
        return (half << U32(16)).view(np.float32)
    return half.astype(np.uint16).view(np.float16)


def pair_u64(st, row):
    """A VGPR pair as uint64 lanes."""
    return st.v[row].astype(U64) | (st.v[row + 1].astype(U64) << U64(32))


def vector_reader(op, kind, ctx, high=False):
    """closure(st) -> lanes (or a NumPy scalar) of type ``kind`` with neg/abs applied."""
    if kind == "b":
        if op.kind == "c":
            ints = op.bits(64)
            return lambda st: LaneMask(st.W, None, ints).bools()
        i = op.index
        return lambda st: st.rdmask(i).bools()
    get = _raw_reader(op, kind, ctx, high)
    if op.abs or op.neg:
        if kind not in "fhdy":
            raise NotImplementedError("neg/abs on an integer operand")
        absolute, negate = op.abs, op.neg

        def modified(st):
            x = get(st)
            if absolute:
                x = np.abs(x)
            return np.negative(x) if negate else x

        return modified
    return get


def _raw_reader(op, kind, ctx, high):
    if op.kind in "va":
        row = ctx.row(op)
        if kind == "u":
            return lambda st: st.v[row]
        if kind == "f":
            return lambda st: st.f[row]
        if kind == "i":
            return lambda st: st.i[row]
        if kind in "Qqd":
            view = {"Q": U64, "q": np.int64, "d": np.float64}[kind]
            return lambda st: pair_u64(st, row).view(view)
        return lambda st: from_u32(st.v[row], kind, high)
    if op.kind == "c":
        value = _const(op, kind)
        if high and kind in "hHIy" and not op.is_float and op.const > 0xFFFF:
            value = _scalar_to(op.const >> 16, kind)
        return lambda st: value
    width = 64 if kind in "Qqd" else 32
    read = scalar_reader(op, width)

    def get(st):
        x = read(st)
        if isinstance(x, np.ndarray):
            if width == 64:
                lanes = np.repeat(x, 64)
                return lanes.view({"Q": U64, "q": np.int64, "d": np.float64}[kind])
            return from_u32(np.repeat(x.astype(U32), 64), kind, high)
        return _scalar_to(x >> 16 if high else x, kind)

    return get


def vector_writer(op, kind, ctx, high=False, preserve=False):
    """closure(st, lanes) storing under EXEC."""
    if kind == "b":
        i = op.index

        def put_mask(st, x):
            if np.ndim(x) == 0:
                x = np.full(st.N, bool(x))
            st.wrmask(i, LaneMask(st.W, x & st.m if st.m is not True else x))

        return put_mask
    row = ctx.row(op)
    if kind == "u":
        return lambda st, x: np.copyto(st.v[row], x, where=st.m)
    if kind == "f":
        return lambda st, x: np.copyto(st.f[row], x, where=st.m, casting="same_kind")
    if kind == "i":
        return lambda st, x: np.copyto(st.i[row], x, where=st.m, casting="same_kind")
    if kind in "Qqd":

        def put_pair(st, x):
            if np.ndim(x) == 0:
                x = np.full(st.N, x)
            w = np.ascontiguousarray(x).view(U32).reshape(-1, 2)
            np.copyto(st.v[row], w[:, 0], where=st.m)
            np.copyto(st.v[row + 1], w[:, 1], where=st.m)

        return put_pair

    def put_half(st, x):
        x = np.asarray(x)
        if kind == "h":
            b = x.astype(np.float16).view(np.uint16).astype(U32)
        elif kind == "y":
            from .formats import bf16_encode

            b = bf16_encode(x)
        else:
            b = x.astype(np.int64).astype(U32) & U32(0xFFFF)
        if high:
            b = (st.v[row] & U32(0xFFFF)) | (b << U32(16))
        elif preserve:
            b = (st.v[row] & U32(0xFFFF0000)) | b
        np.copyto(st.v[row], b, where=st.m)

    return put_half
