"""Memory instructions: SMEM, GLOBAL, FLAT, SCRATCH and MUBUF, with their atomics.

CDNA3 ISA, "Scalar Memory Operations", "Vector Memory Operations" (buffer
addressing and range checking) and "Flat Memory Instructions".
"""

import re

import numpy as np

from . import atomics
from .errors import AccessError
from .lds import narrow, put_loaded, put_rows, take_rows
from .operands import PRIVATE_APERTURE, SHARED_APERTURE, pair_u64, parse_operand, scalar_reader
from .state import M32, M64, U32, U64, collapse, per_wave

_SIZE = {
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
    "ubyte": 1,
    "sbyte": 1,
    "ushort": 2,
    "sshort": 2,
    "byte": 1,
    "short": 2,
}
_KIND = {"sbyte": "i8", "sshort": "i16"}
_LOAD = re.compile(
    r"^(global|flat|scratch|buffer)_load_(lds_)?(dwordx2|dwordx3|dwordx4|dword|ubyte|sbyte|ushort|sshort|short)(_d16)?(_hi)?$"
)
_STORE = re.compile(
    r"^(global|flat|scratch|buffer)_store_(dwordx2|dwordx3|dwordx4|dword|byte|short)(_d16_hi)?$"
)
_ATOM = re.compile(
    r"^(global|flat|buffer)_atomic_(cmpswap|swap|add|sub|smin|umin|smax|umax|and|or|xor|inc|dec|"
    r"fmin|fmax|pk_add|min|max)(_f32|_f64|_f16|_bf16)?(_x2)?$"
)


# --------------------------------------------------------------------------- scalar memory
def build_smem(inst, ctx):
    """S_LOAD_DWORD*, S_BUFFER_LOAD_DWORD*, S_MEMTIME; None for anything else."""
    n = inst.name
    if n in ("s_memtime", "s_memrealtime"):
        d = parse_operand(inst.ops[0])
        return lambda st: st.wr64(d.index, st.steps & M64)
    m = re.match(r"^s_(buffer_)?load_dword(x\d+)?$", n)
    if not m:
        return None
    words = int(m.group(2)[1:]) if m.group(2) else 1
    d, base = parse_operand(inst.ops[0]).index, parse_operand(inst.ops[1])
    imm = int(inst.mods.get("offset", "0"), 0)
    third = parse_operand(inst.ops[2])
    extra = scalar_reader(third)
    if third.kind == "c":
        imm, extra = imm + third.const, None
    buffer, mem = bool(m.group(1)), ctx.memory
    rb = [scalar_reader(_sub(base, k)) for k in range(4)] if buffer else [scalar_reader(base, 64)]

    def fetch(*args):
        off = imm + (args[-1] if extra else 0)
        if not buffer:
            a = (args[0] + off) & M64 & ~3
            return tuple(np.frombuffer(mem.read_bytes(a, 4 * words), U32).tolist())
        lo, hi, records = args[0], args[1], args[2]
        a = lo | (hi & 0xFFFF) << 32
        out = []
        stride = hi >> 16 & 0x3FFF
        limit = records * max(stride, 1)
        for k in range(words):
            o = (off & ~3) + 4 * k
            out.append(int.from_bytes(mem.read_bytes(a + o, 4), "little") if o + 4 <= limit else 0)
        return tuple(out)

    def load(st):
        ins = [r(st) for r in rb] + ([extra(st)] if extra else [])
        if all(type(x) is int for x in ins):
            res = fetch(*ins)
            for k in range(words):
                st.wr32(d + k, res[k])
            return
        rows = [fetch(*r) for r in zip(*[per_wave(x, st.W) for x in ins], strict=True)]
        for k in range(words):
            st.wr32(d + k, collapse([r[k] for r in rows]))

    return load


def _sub(op, k):
    o = parse_operand(op.text)
    o.index, o.count = op.index + k, 1
    return o


# --------------------------------------------------------------------------- address helpers
def _lane_u64(st, x, lanes):
    """A 64-bit scalar (int or per wave) as something broadcastable over active lanes."""
    if isinstance(x, int):
        return U64(x)
    r = np.repeat(x, 64)
    return r if lanes is None else r[lanes]


def _pick(x, lanes):
    return x if lanes is None else x[lanes]


def _global_address(inst, ctx, vaddr, saddr):
    """closure(st, lanes) -> uint64 addresses for GLOBAL/FLAT."""
    off = int(inst.mods.get("offset", "0"), 0)
    off64 = U64(off & M64)
    if saddr is not None and saddr.kind == "s":
        rs, row = scalar_reader(saddr, 64), ctx.row(vaddr)

        def address(st, lanes):
            return _pick(st.v[row], lanes).astype(U64) + (_lane_u64(st, rs(st), lanes) + off64)

        return address
    row = ctx.row(vaddr)
    if off == 0:
        return lambda st, lanes: _pick(pair_u64(st, row), lanes)
    return lambda st, lanes: _pick(pair_u64(st, row), lanes) + off64


def _scratch_address(inst, ctx, vaddr, saddr):
    """closure(st, lanes) -> byte offsets (int64) into each lane's private segment."""
    off = int(inst.mods.get("offset", "0"), 0)
    rv = ctx.row(vaddr) if vaddr.kind == "v" else None
    rs = scalar_reader(saddr) if saddr is not None and saddr.kind == "s" else None

    def address(st, lanes):
        n = st.N if lanes is None else len(lanes)
        a = np.full(n, off, np.int64)
        if rv is not None:
            a += _pick(st.v[rv].view(np.int32), lanes)
        if rs is not None:
            x = rs(st)
            a += x if isinstance(x, int) else _pick(np.repeat(x.astype(np.int64), 64), lanes)
        return a

    return address


class Buffer:
    """A buffer resource (V#) decoded per wave, and its addressing rule.

    ``address = base + soffset + offset`` with ``offset = voffset(offen) + inst_offset
    (+ stride * index)``; what is out of range reads 0 and is not stored.  Raw
    buffers (stride 0) check ``soffset + offset`` against num_records, separately
    for each dword of a wide access; structured ones check ``index >= num_records``.
    """

    def __init__(self, inst, ctx, vaddr, srsrc, soffset):
        self.words = [scalar_reader(_sub(srsrc, k)) for k in range(4)]
        self.soffset = scalar_reader(soffset)
        self.imm = int(inst.mods.get("offset", "0"), 0)
        self.offen, self.idxen = bool(inst.mods.get("offen")), bool(inst.mods.get("idxen"))
        self.row = ctx.row(vaddr) if vaddr is not None and vaddr.kind == "v" else None

    def resolve(self, st, lanes, size):
        """(uint64 addresses, dwords in range per lane or None for all) over the given lanes."""
        w0, w1, w2, w3 = (_widen(r(st), lanes) for r in self.words)
        so = _widen(self.soffset(st), lanes)
        n = st.N if lanes is None else len(lanes)
        base = w0 | (w1 & 0xFFFF) << 32
        stride = w1 >> 16 & 0x3FFF
        index = np.zeros(n, np.int64)
        offset = np.full(n, self.imm, np.int64)
        row = self.row
        if self.idxen:
            index = _pick(st.v[row], lanes).astype(np.int64)
            row = row + 1
        if self.offen:
            offset = offset + _pick(st.v[row], lanes).astype(np.int64)
        lane = np.tile(np.arange(64), st.W)
        if np.any(w3 >> 23 & 1):  # add_tid_enable
            index = index + _pick(lane, lanes)
            stride = stride | (w3 >> 15 & 0xF) << 14
        swizzle = np.any(w1 >> 31 & 1)
        if swizzle:
            istride, esize = 8 << (w3 >> 21 & 3), 2 << (w3 >> 19 & 3)
            inner = (
                (index // istride * stride + offset // esize * esize) * istride
                + index % istride * esize
                + offset % esize
            )
            ok = None
        else:
            inner = offset + index * stride
            words = max(size // 4, 1)
            room = w2 - (inner + so)
            raw = np.clip(room // 4, 0, words) if size >= 4 else (room >= size).astype(np.int64)
            ok = np.broadcast_to(np.where(stride == 0, raw, np.where(index < w2, words, 0)), n)
            ok = None if (ok == words).all() else ok
        addr = (base + so + inner).astype(np.int64).view(U64)
        return addr, ok


def _widen(x, lanes):
    """Scalar register value as int or int64 lanes."""
    if isinstance(x, int):
        return x
    r = np.repeat(x.astype(np.int64), 64)
    return r if lanes is None else r[lanes]


# --------------------------------------------------------------------------- instruction shapes
def _parse_shape(inst, ctx, space, data_first, has_data=True):
    """(data operand or None, resolver) where resolver(st, lanes, size) -> (addr, ok)."""
    ops = [parse_operand(o) for o in inst.ops]
    if space == "buffer":
        data = ops.pop(0) if has_data else None
        if len(ops) == 3:
            vaddr, srsrc, soff = ops
        else:
            vaddr, (srsrc, soff) = None, ops
        return data, Buffer(inst, ctx, vaddr, srsrc, soff).resolve
    if not has_data:
        data, vaddr, saddr = None, ops[0], ops[1] if len(ops) > 1 else None
    elif data_first:
        data, vaddr, saddr = ops[0], ops[1], ops[2] if len(ops) > 2 else None
    else:
        vaddr, data, saddr = ops[0], ops[1], ops[2] if len(ops) > 2 else None
    make = _scratch_address if space == "scratch" else _global_address
    f = make(inst, ctx, vaddr, saddr)
    return data, lambda st, lanes, size: (f(st, lanes), None)


def _space_gather(ctx, space, st, addr, size, lanes, kind):
    """Loaded rows for addresses of any space (FLAT looks at the apertures)."""
    if space == "scratch":
        return ctx.scratch_read(st, addr, size, lanes)
    if space == "flat":
        return _flat(ctx, st, addr, size, lanes, None)
    mem = ctx.memory
    ids = _ids(st, lanes)
    return (
        mem.gather(addr, size // 4, ids) if size >= 4 else mem.gather_small(addr, size, ids)[None]
    )


def _ids(st, lanes):
    return st.all_lanes if lanes is None else lanes


def _space_scatter(ctx, space, st, addr, size, data, lanes):
    if space == "scratch":
        ctx.scratch_write(st, addr, size, data, lanes)
    elif space == "flat":
        _flat(ctx, st, addr, size, lanes, data)
    elif size >= 4:
        ctx.memory.scatter(addr, data, _ids(st, lanes))
    else:
        ctx.memory.scatter_small(addr, size, data[0], _ids(st, lanes))


def _flat(ctx, st, addr, size, lanes, data):
    """FLAT: split lanes between the LDS aperture, the private aperture and global memory."""
    hi = (addr >> U64(32)).astype(np.int64)
    ids = np.arange(st.N) if lanes is None else lanes
    words = max(size // 4, 1)
    out = np.zeros((words, addr.size), U32)
    for where in ("lds", "scratch", "global"):
        sel = (
            hi == SHARED_APERTURE
            if where == "lds"
            else hi == PRIVATE_APERTURE
            if where == "scratch"
            else (hi != SHARED_APERTURE) & (hi != PRIVATE_APERTURE)
        )
        if not sel.any():
            continue
        a, ln = addr[sel], ids[sel]
        low = (a & U64(M32)).astype(np.int64)
        d = None if data is None else data[:, sel]
        if where == "lds":
            if d is None:
                out[:, sel] = st.lds.read(st, low, size, ln)
            else:
                st.lds.write(st, low, d, size, ln)
        elif where == "scratch":
            if d is None:
                out[:, sel] = ctx.scratch_read(st, low, size, ln)
            else:
                ctx.scratch_write(st, low, size, d, ln)
        elif d is None:
            out[:, sel] = _space_gather(ctx, "global", st, a, size, ln, None)
        else:
            _space_scatter(ctx, "global", st, a, size, d, ln)
    return out


# --------------------------------------------------------------------------- loads and stores
def build(inst, ctx):
    """Closure for a vector memory instruction, or None."""
    n = inst.name
    m = _LOAD.match(n)
    if m:
        return _load(inst, ctx, m)
    m = _STORE.match(n)
    if m:
        return _store(inst, ctx, m)
    m = _ATOM.match(n)
    if m:
        return _atomic(inst, ctx, m)
    if n in ("buffer_wbl2", "buffer_inv", "buffer_wbinvl1", "buffer_wbinvl1_vol", "buffer_invl2"):
        return lambda st: None
    return None


def _load(inst, ctx, m):
    space, what = m.group(1), m.group(3)
    size, kind = _SIZE[what], _KIND.get(what)
    to_lds = bool(m.group(2)) or bool(inst.mods.get("lds"))
    is_half = m.group(4) or what == "short"  # buffer/global_load_short_d16
    half = is_half and ("high" if m.group(5) else "low")
    data, resolve = _parse_shape(inst, ctx, space, True, not to_lds)
    if to_lds:
        return _load_lds(inst, ctx, space, size, kind, resolve)
    dst = ctx.row(data)

    def load(st):
        lanes = st.lanes()
        if lanes is not None and not lanes.size:
            return
        r = _gather(ctx, space, st, resolve, size, lanes, kind)
        put_loaded(st, dst, r, size, lanes, kind, half)

    return load


def _gather(ctx, space, st, resolve, size, lanes, kind):
    """uint32[words, lanes] that a load brings."""
    addr, ok = resolve(st, lanes, size)
    if ok is None:
        return _space_gather(ctx, space, st, addr, size, lanes, kind)
    return _partial_gather(ctx, st, addr, ok, size, lanes)


def _partial_gather(ctx, st, addr, ok, size, lanes):
    """Buffer load where only the first ``ok`` dwords of each lane are in range; the rest is 0."""
    r = np.zeros((max(size // 4, 1), addr.size), U32)
    for k in range(len(r)):
        sel = np.flatnonzero(ok > k)
        if sel.size:
            ids = sel if lanes is None else lanes[sel]
            r[k, sel] = _space_gather(
                ctx, "buffer", st, addr[sel] + U64(4 * k), min(size, 4), ids, None
            )[0]
    return r


def _load_lds(inst, ctx, space, size, kind, resolve):
    """Direct-to-LDS load: lane i writes LDS at M0 + inst_offset + i * size."""
    imm = int(inst.mods.get("offset", "0"), 0)
    wide = 0x3FFFF if ctx.arch == "gfx950" else 0xFFFF
    lds_size = max(size, 4)

    def load(st):
        lanes = st.lanes()
        if lanes is not None and not lanes.size:
            return
        r = _gather(ctx, space, st, resolve, size, lanes, kind)
        if size < 4:
            r = narrow(r[0], kind)[None]
        m0 = st.rd32(124)
        m0 = (
            m0 & wide
            if isinstance(m0, int)
            else _pick(np.repeat(m0.astype(np.int64) & wide, 64), lanes)
        )
        lane = _pick(np.tile(np.arange(64), st.W), lanes)
        st.deliver_lds(lane * lds_size + m0 + imm, r, lds_size, lanes)

    return load


def _store(inst, ctx, m):
    space, what, hi = m.group(1), m.group(2), bool(m.group(3))
    size = _SIZE[what]
    data, resolve = _parse_shape(inst, ctx, space, space == "buffer")
    src, words = ctx.row(data), max(size // 4, 1)

    def store(st):
        lanes = st.lanes()
        if lanes is not None and not lanes.size:
            return
        addr, ok = resolve(st, lanes, size)
        d = take_rows(st, src, words, lanes)
        if hi:
            d = d >> U32(16)
        if ok is None:
            _space_scatter(ctx, space, st, addr, size, d, lanes)
            return
        for k in range(words):
            sel = np.flatnonzero(ok > k)
            if sel.size:
                ids = sel if lanes is None else lanes[sel]
                _space_scatter(
                    ctx, space, st, addr[sel] + U64(4 * k), min(size, 4), d[k : k + 1, sel], ids
                )

    return store


# --------------------------------------------------------------------------- atomics
def _atomic(inst, ctx, m):
    space, kind, ftype, x2 = m.group(1), m.group(2), m.group(3) or "", bool(m.group(4))
    size = 8 if x2 or ftype == "_f64" else 4
    if ftype in ("_f32", "_f64"):
        name = {"add": "fadd", "min": "fmin", "max": "fmax"}[kind]
    elif kind == "pk_add":
        name = "pk_add" + ftype
    else:
        name = kind
    returns = bool(inst.mods.get("sc0") or inst.mods.get("glc"))
    ops = [parse_operand(o) for o in inst.ops]
    if space == "buffer":
        data = ops[0]
        dst = ctx.row(data)
        _, resolve = _parse_shape(inst, ctx, space, True)
    else:
        dst = ctx.row(ops[0]) if returns else None
        rest = ops[1:] if returns else ops
        vaddr, data, saddr = rest[0], rest[1], rest[2] if len(rest) > 2 else None
        f = _global_address(inst, ctx, vaddr, saddr)

        def resolve(st, lanes, size):
            return f(st, lanes), None

    src, words = ctx.row(data), size // 4

    def wide(rows):
        return (
            np.ascontiguousarray(rows[0])
            if size == 4
            else rows[0].astype(U64) | rows[1].astype(U64) << U64(32)
        )

    def atomic(st):
        lanes = st.lanes()
        if lanes is not None and not lanes.size:
            return
        addr, ok = resolve(st, lanes, size)
        if ok is not None:
            sel = np.flatnonzero(ok == words)  # atomics are all or nothing
            if not sel.size:
                return
            addr = addr[sel]
            lanes = sel if lanes is None else lanes[sel]
        d = take_rows(st, src, words * (2 if kind == "cmpswap" else 1), lanes)
        new = wide(d)
        compare = wide(d[words:]) if kind == "cmpswap" else None
        old = np.zeros(addr.size, U32 if size == 4 else U64)
        ids = _ids(st, lanes)
        if space == "flat" and ((addr >> U64(32)) == U64(SHARED_APERTURE)).any():
            low = (addr & U64(M32)).astype(np.int64)
            old = st.lds.atomic(st, low, name, new, size, lanes, compare)
        else:
            for region, sel in ctx.memory._split(addr, size, ids, "write"):
                a = addr if sel is None else addr[sel]
                off = (a - U64(region.base)).view(np.int64)
                if size not in region.views or (off % size).any():
                    raise AccessError("misaligned atomic")
                part = slice(None) if sel is None else sel
                if region.written is not None:
                    region.written[off[:, None] + np.arange(size)] = True
                old[part] = atomics.apply(
                    region.views[size],
                    off // size,
                    name,
                    new[part],
                    None if compare is None else compare[part],
                )
        if returns:
            rows = [old] if size == 4 else [old.astype(U32), (old >> U64(32)).astype(U32)]
            put_rows(st, dst, rows, lanes)

    return atomic
