"""Scalar ALU: SOP1, SOP2, SOPK, SOPC formats (CDNA3 ISA, "Scalar ALU Operations").

Each operation is a function on Python ints returning ``(result, scc)``; SCC is
None when the instruction leaves it alone.  When an operand differs between the
waves of a batch the function runs once per wave.
"""

import numpy as np

from .operands import parse_operand, scalar_reader, scalar_writer
from .state import M32, M64, LaneMask, collapse, per_wave


def s32(x):
    """Unsigned 32-bit pattern as a signed int."""
    return x - 0x100000000 if x & 0x80000000 else x


def s64(x):
    """Unsigned 64-bit pattern as a signed int."""
    return x - (1 << 64) if x >> 63 else x


def s16(x):
    """Low 16 bits as a signed int."""
    return (x & 0xFFFF) - 0x10000 if x & 0x8000 else x & 0xFFFF


def _nz(r):
    return r, int(r != 0)


def _ovf(r):
    return r & M32, int(not -0x80000000 <= r <= 0x7FFFFFFF)


def _bfe(value, spec, bits, signed):
    off, width = spec & (63 if bits == 64 else 31), spec >> 16 & 0x7F
    r = value >> off & ((1 << width) - 1)
    if signed and width and off + width <= bits and r >> (width - 1) & 1:
        r |= ((1 << bits) - 1) & ~((1 << width) - 1)
    elif signed and width and off + width > bits and value >> (bits - 1):
        r = ((value | ~((1 << bits) - 1)) >> off) & ((1 << bits) - 1)
    return _nz(r & ((1 << bits) - 1))


def _first(x, bits, want):
    if not want:
        x = ~x & ((1 << bits) - 1)
    return ((x & -x).bit_length() - 1) & M32 if x else M32


def _flbit(x, bits):
    return bits - x.bit_length() if x else M32


def _flbit_signed(x, bits):
    sign = x >> (bits - 1)
    y = x ^ ((1 << bits) - 1) if sign else x
    return bits - y.bit_length() if y else M32


def _rev(x, bits):
    return int(format(x, f"0{bits}b")[::-1], 2)


def _quad(x):
    return sum(1 << q for q in range(16) if x >> (4 * q) & 15)


def _wqm(x, bits):
    return sum(15 << (4 * q) for q in range(bits // 4) if x >> (4 * q) & 15)


def _replicate(x):
    return sum(3 << (2 * i) for i in range(32) if x >> i & 1)


# name -> (function, input widths, output width).  "c" as the last input means SCC.
SOP2 = {
    "s_add_u32": (lambda a, b: ((a + b) & M32, (a + b) >> 32), (32, 32), 32),
    "s_sub_u32": (lambda a, b: ((a - b) & M32, int(b > a)), (32, 32), 32),
    "s_add_i32": (lambda a, b: _ovf(s32(a) + s32(b)), (32, 32), 32),
    "s_sub_i32": (lambda a, b: _ovf(s32(a) - s32(b)), (32, 32), 32),
    "s_addc_u32": (lambda a, b, c: ((a + b + c) & M32, (a + b + c) >> 32), (32, 32, "c"), 32),
    "s_subb_u32": (lambda a, b, c: ((a - b - c) & M32, int(b + c > a)), (32, 32, "c"), 32),
    "s_min_i32": (lambda a, b: (a, 1) if s32(a) < s32(b) else (b, 0), (32, 32), 32),
    "s_min_u32": (lambda a, b: (a, 1) if a < b else (b, 0), (32, 32), 32),
    "s_max_i32": (lambda a, b: (a, 1) if s32(a) > s32(b) else (b, 0), (32, 32), 32),
    "s_max_u32": (lambda a, b: (a, 1) if a > b else (b, 0), (32, 32), 32),
    "s_cselect_b32": (lambda a, b, c: (a if c else b, None), (32, 32, "c"), 32),
    "s_cselect_b64": (lambda a, b, c: (a if c else b, None), (64, 64, "c"), 64),
    "s_mul_i32": (lambda a, b: (a * b & M32, None), (32, 32), 32),
    "s_mul_hi_u32": (lambda a, b: (a * b >> 32, None), (32, 32), 32),
    "s_mul_hi_i32": (lambda a, b: (s32(a) * s32(b) >> 32 & M32, None), (32, 32), 32),
    "s_lshl_b32": (lambda a, b: _nz(a << (b & 31) & M32), (32, 32), 32),
    "s_lshr_b32": (lambda a, b: _nz(a >> (b & 31)), (32, 32), 32),
    "s_ashr_i32": (lambda a, b: _nz(s32(a) >> (b & 31) & M32), (32, 32), 32),
    "s_lshl_b64": (lambda a, b: _nz(a << (b & 63) & M64), (64, 32), 64),
    "s_lshr_b64": (lambda a, b: _nz(a >> (b & 63)), (64, 32), 64),
    "s_ashr_i64": (lambda a, b: _nz(s64(a) >> (b & 63) & M64), (64, 32), 64),
    "s_bfm_b32": (lambda a, b: (((1 << (a & 31)) - 1) << (b & 31) & M32, None), (32, 32), 32),
    "s_bfm_b64": (lambda a, b: (((1 << (a & 63)) - 1) << (b & 63) & M64, None), (32, 32), 64),
    "s_bfe_u32": (lambda a, b: _bfe(a, b, 32, False), (32, 32), 32),
    "s_bfe_i32": (lambda a, b: _bfe(a, b, 32, True), (32, 32), 32),
    "s_bfe_u64": (lambda a, b: _bfe(a, b, 64, False), (64, 32), 64),
    "s_bfe_i64": (lambda a, b: _bfe(a, b, 64, True), (64, 32), 64),
    "s_absdiff_i32": (lambda a, b: _nz(abs(s32(a) - s32(b)) & M32), (32, 32), 32),
    "s_pack_ll_b32_b16": (lambda a, b: (a & 0xFFFF | (b & 0xFFFF) << 16, None), (32, 32), 32),
    "s_pack_lh_b32_b16": (lambda a, b: (a & 0xFFFF | b & 0xFFFF0000, None), (32, 32), 32),
    "s_pack_hh_b32_b16": (lambda a, b: (a >> 16 | b & 0xFFFF0000, None), (32, 32), 32),
}
for _k in range(1, 5):
    SOP2[f"s_lshl{_k}_add_u32"] = (
        lambda a, b, k=_k: (((a << k) + b) & M32, int(((a << k) + b) >> 32 != 0)),
        (32, 32),
        32,
    )
_BITWISE = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
for _name, _f in _BITWISE.items():
    SOP2[f"s_{_name}_b32"] = (lambda a, b, f=_f: _nz(f(a, b) & M32), (32, 32), 32)

SOP1 = {
    "s_mov_b32": (lambda a: (a, None), (32,), 32),
    "s_mov_b64": (lambda a: (a, None), (64,), 64),
    "s_not_b32": (lambda a: _nz(~a & M32), (32,), 32),
    "s_brev_b32": (lambda a: (_rev(a, 32), None), (32,), 32),
    "s_brev_b64": (lambda a: (_rev(a, 64), None), (64,), 64),
    "s_bcnt0_i32_b32": (lambda a: _nz(32 - a.bit_count()), (32,), 32),
    "s_bcnt1_i32_b32": (lambda a: _nz(a.bit_count()), (32,), 32),
    "s_bcnt0_i32_b64": (lambda a: _nz(64 - a.bit_count()), (64,), 32),
    "s_bcnt1_i32_b64": (lambda a: _nz(a.bit_count()), (64,), 32),
    "s_ff0_i32_b32": (lambda a: (_first(a, 32, 0), None), (32,), 32),
    "s_ff1_i32_b32": (lambda a: (_first(a, 32, 1), None), (32,), 32),
    "s_ff0_i32_b64": (lambda a: (_first(a, 64, 0), None), (64,), 32),
    "s_ff1_i32_b64": (lambda a: (_first(a, 64, 1), None), (64,), 32),
    "s_flbit_i32_b32": (lambda a: (_flbit(a, 32), None), (32,), 32),
    "s_flbit_i32_b64": (lambda a: (_flbit(a, 64), None), (64,), 32),
    "s_flbit_i32": (lambda a: (_flbit_signed(a, 32), None), (32,), 32),
    "s_flbit_i32_i64": (lambda a: (_flbit_signed(a, 64), None), (64,), 32),
    "s_sext_i32_i8": (lambda a: (((a & 255) ^ 128) - 128 & M32, None), (32,), 32),
    "s_sext_i32_i16": (lambda a: (s16(a) & M32, None), (32,), 32),
    "s_bitset0_b32": (lambda a, d: (d & ~(1 << (a & 31)), None), (32, "d"), 32),
    "s_bitset1_b32": (lambda a, d: (d | 1 << (a & 31), None), (32, "d"), 32),
    "s_bitset0_b64": (lambda a, d: (d & ~(1 << (a & 63)), None), (32, "d"), 64),
    "s_bitset1_b64": (lambda a, d: (d | 1 << (a & 63), None), (32, "d"), 64),
    "s_abs_i32": (lambda a: _nz(abs(s32(a)) & M32), (32,), 32),
    "s_wqm_b32": (lambda a: _nz(_wqm(a, 32)), (32,), 32),
    "s_wqm_b64": (lambda a: _nz(_wqm(a, 64)), (64,), 64),
    "s_quadmask_b64": (lambda a: _nz(_quad(a)), (64,), 64),
    "s_quadmask_b32": (lambda a: _nz(_quad(a) & 0xFF), (32,), 32),
    "s_bitreplicate_b64_b32": (lambda a: (_replicate(a), None), (32,), 64),
    "s_cmov_b32": (lambda a, d, c: (a if c else d, None), (32, "d", "c"), 32),
    "s_cmov_b64": (lambda a, d, c: (a if c else d, None), (64, "d", "c"), 64),
}
_REL = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}
SOPC, CMPK = {}, {}
for _name, _f in _REL.items():
    SOPC[f"s_cmp_{_name}_u32"] = (lambda a, b, f=_f: (None, int(f(a, b))), (32, 32), 0)
    SOPC[f"s_cmp_{_name}_i32"] = (lambda a, b, f=_f: (None, int(f(s32(a), s32(b)))), (32, 32), 0)
    CMPK[f"s_cmpk_{_name}_i32"] = lambda a, k, f=_f: (None, int(f(s32(a), s16(k))))
    CMPK[f"s_cmpk_{_name}_u32"] = lambda a, k, f=_f: (None, int(f(a, k & 0xFFFF)))
SOPC["s_cmp_eq_u64"] = (lambda a, b: (None, int(a == b)), (64, 64), 0)
SOPC["s_cmp_lg_u64"] = (lambda a, b: (None, int(a != b)), (64, 64), 0)
for _w, _m in ((32, 31), (64, 63)):
    SOPC[f"s_bitcmp0_b{_w}"] = (lambda a, b, m=_m: (None, 1 - (a >> (b & m) & 1)), (_w, 32), 0)
    SOPC[f"s_bitcmp1_b{_w}"] = (lambda a, b, m=_m: (None, a >> (b & m) & 1), (_w, 32), 0)


def run_scalar(st, f, ins):
    """Apply ``f`` to ints, or per wave when any input is an array; returns (result, scc)."""
    for x in ins:
        if type(x) is not int:
            break
    else:
        return f(*ins)
    cols = [per_wave(x, st.W) for x in ins]
    out = [f(*row) for row in zip(*cols, strict=True)]
    r = None if out[0][0] is None else collapse([o[0] for o in out])
    c = None if out[0][1] is None else collapse([int(o[1]) for o in out])
    if isinstance(c, np.ndarray):
        c = c.astype(np.int64)
    return r, c


def _scc(st):
    return st.scc


def _generic(spec, ops):
    f, ins, out = spec
    operands = [parse_operand(o) for o in ops]
    sources = operands[1:] if out else operands
    readers, k = [], 0
    for w in ins:
        if w == "c":
            readers.append(_scc)
        elif w == "d":
            readers.append(scalar_reader(operands[0], out))
        else:
            readers.append(scalar_reader(sources[k], w))
            k += 1
    write = scalar_writer(operands[0], out) if out else None
    if len(readers) == 2:
        ra, rb = readers

        def op2(st):
            a, b = ra(st), rb(st)
            r, c = f(a, b) if type(a) is int and type(b) is int else run_scalar(st, f, (a, b))
            if write:
                write(st, r)
            if c is not None:
                st.scc = c

        return op2

    def op(st):
        r, c = run_scalar(st, f, [g(st) for g in readers])
        if write:
            write(st, r)
        if c is not None:
            st.scc = c

    return op


# ------------------------------------------------------------------- 64-bit lane-mask logic
_BOOL = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}


def _mask_reader(op):
    if op.kind == "c":
        value = op.bits(64)
        return lambda st: LaneMask(st.W, None, value)
    i = op.index
    return lambda st: st.rdmask(i)


def _combine(st, name, a, b):
    """Bitwise combination of two LaneMasks, on whichever representation both have."""
    x, y = a._ints, b._ints
    if x is not None and y is not None:
        if type(x) is int and type(y) is int:
            return LaneMask(st.W, None, _BITWISE[name](x, y) & M64)
        xs, ys = per_wave(x, st.W), per_wave(y, st.W)
        return LaneMask(
            st.W, None, collapse([_BITWISE[name](p, q) & M64 for p, q in zip(xs, ys, strict=True)])
        )
    return LaneMask(st.W, _BOOL[name](a.bools(), b.bools()))


def _any(mask):
    x = mask.any_per_wave()
    return x.astype(np.int64) if isinstance(x, np.ndarray) else int(x)


def _mask_binary(name, ops):
    d, a, b = (parse_operand(o) for o in ops)
    ra, rb, i = _mask_reader(a), _mask_reader(b), d.index

    def op(st):
        r = _combine(st, name, ra(st), rb(st))
        st.wrmask(i, r)
        st.scc = _any(r)

    return op


def _saveexec(name, ops, swapped):
    """D = EXEC; EXEC = S0 op EXEC ("andn1"/"orn1" negate S0); SCC = (EXEC != 0)."""
    d, a = (parse_operand(o) for o in ops)
    ra, i = _mask_reader(a), d.index

    def op(st):
        old, src = st.exec, ra(st)
        r = _combine(st, name, old, src) if swapped else _combine(st, name, src, old)
        st.wrmask(i, old)
        st.set_exec(r)
        st.scc = _any(r)

    return op


def _mask_not(ops):
    d, a = (parse_operand(o) for o in ops)
    ra, i = _mask_reader(a), d.index

    def op(st):
        r = _combine(st, "xor", ra(st), LaneMask(st.W, None, M64))
        st.wrmask(i, r)
        st.scc = _any(r)

    return op


def _mask_move(ops):
    d, a = (parse_operand(o) for o in ops)
    if a.kind == "s":
        src, dst = a.index, d.index

        def move(st):
            x = st.exec if src == 126 else st.s[src]
            if type(x) is LaneMask and (src == 126 or st.s[src + 1] is x):
                st.wrmask(dst, x)
            else:
                st.wr64(dst, st.rd64(src))

        return move
    return _generic(SOP1["s_mov_b64"], ops)


def _setreg(ctx, ops, imm):
    spec = ops[0][6:-1].split(",")
    name = spec[0].strip()
    off, width = (int(spec[1]), int(spec[2])) if len(spec) == 3 else (0, 32)
    read = scalar_reader(parse_operand(ops[1]))

    def op(st):
        if name not in ("HW_REG_MODE", "1"):
            return
        x = read(st)
        if not isinstance(x, int):
            raise NotImplementedError("s_setreg of a value that differs between waves")
        mask = ((1 << width) - 1) << off
        st.mode = st.mode & ~mask | x << off & mask

    return op


def _getreg(ops):
    spec = ops[1][6:-1].split(",")
    name = spec[0].strip()
    off, width = (int(spec[1]), int(spec[2])) if len(spec) == 3 else (0, 32)
    write = scalar_writer(parse_operand(ops[0]))

    def op(st):
        value = st.mode if name == "HW_REG_MODE" else 0
        write(st, value >> off & ((1 << width) - 1))

    return op


NOPS = {
    "s_nop",
    "s_setprio",
    "s_sleep",
    "s_icache_inv",
    "s_dcache_inv",
    "s_dcache_wb",
    "s_dcache_wb_vol",
    "s_dcache_inv_vol",
    "s_incperflevel",
    "s_decperflevel",
    "s_sethalt",
    "s_sendmsg",
    "s_ttracedata",
    "s_inst_prefetch",
    "s_setkill",
    "s_clause",
}


GPR_INDEX = {"SRC0": 1, "SRC1": 2, "SRC2": 4, "DST": 8}


def index_mode(inst):
    """Mode bits of S_SET_GPR_IDX_ON."""
    return sum(
        GPR_INDEX[w.strip()] for w in inst.ops[1][len("gpr_idx(") : -1].split(",") if w.strip()
    )


def _set_gpr_index(inst, on):
    """S_SET_GPR_IDX_ON: M0[7:0] = index, M0[15:12] = mode; S_SET_GPR_IDX_IDX only the index."""
    read, mode = scalar_reader(parse_operand(inst.ops[0])), index_mode(inst) if on else 0

    def op(st):
        def f(x, m0):
            return (m0 & ~0xF0FF | x & 255 | mode << 12 if on else m0 & ~255 | x & 255), None

        st.wr32(124, run_scalar(st, f, (read(st), st.rd32(124)))[0])

    return op


def build(inst, ctx):
    """Closure for a scalar instruction, or None when it is not one of these."""
    n, ops = inst.name, inst.ops
    if n in NOPS:
        return lambda st: None
    if n == "s_set_gpr_idx_off":
        return lambda st: None
    if n in ("s_set_gpr_idx_on", "s_set_gpr_idx_idx"):
        return _set_gpr_index(inst, n.endswith("_on"))
    stem = n[2:-4]
    if n.endswith("_b64") and stem in _BITWISE:
        return _mask_binary(stem, ops)
    if n.endswith("_saveexec_b64"):
        kind = n[2:-13]
        if kind in ("andn1", "orn1"):
            return _saveexec(kind[:-1] + "2", ops, True)
        return _saveexec(kind, ops, False)
    if n in ("s_andn1_wrexec_b64", "s_andn2_wrexec_b64"):
        d, a = (parse_operand(o) for o in ops)
        ra, first = _mask_reader(a), n == "s_andn1_wrexec_b64"

        def wrexec(st):
            r = (
                _combine(st, "andn2", st.exec, ra(st))
                if first
                else _combine(st, "andn2", ra(st), st.exec)
            )
            st.set_exec(r)
            st.wrmask(d.index, r)
            st.scc = _any(r)

        return wrexec
    if n == "s_not_b64":
        return _mask_not(ops)
    if n == "s_mov_b64":
        return _mask_move(ops)
    for table in (SOP2, SOP1, SOPC):
        if n in table:
            return _generic(table[n], ops)
    if n in CMPK:
        read, k, f = scalar_reader(parse_operand(ops[0])), int(ops[1], 0), CMPK[n]

        def cmpk(st):
            st.scc = run_scalar(st, lambda a: f(a, k), (read(st),))[1]

        return cmpk
    if n in ("s_movk_i32", "s_cmovk_i32", "s_addk_i32", "s_mulk_i32"):
        d, k = parse_operand(ops[0]), s16(int(ops[1], 0))
        f = {
            "s_movk_i32": lambda a, c: (k & M32, None),
            "s_cmovk_i32": lambda a, c: (k & M32 if c else a, None),
            "s_addk_i32": lambda a, c: _ovf(s32(a) + k),
            "s_mulk_i32": lambda a, c: (s32(a) * k & M32, None),
        }[n]
        read, write = scalar_reader(d), scalar_writer(d)

        def sopk(st):
            r, c = run_scalar(st, f, (read(st), st.scc))
            write(st, r)
            if c is not None:
                st.scc = c

        if n == "s_movk_i32":
            return lambda st: write(st, k & M32)
        return sopk
    if n in ("s_setreg_b32", "s_setreg_imm32_b32"):
        return _setreg(ctx, ops, n.endswith("imm32_b32"))
    if n == "s_getreg_b32":
        return _getreg(ops)
    return None
