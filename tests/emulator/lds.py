"""Local data share: storage, bounds, race detection, and the DS instructions.

CDNA3 ISA, "Data Share Operations".  All workgroups that run together share one
byte array, each with its own slice.  The race detector keeps, per granule (the
smallest access in the kernel, 1 to 16 bytes), the last writer, readers
and atomic users of the current barrier epoch.
"""

import re

import numpy as np

from . import atomics
from .errors import LdsAccessError, LdsRaceError, UninitialisedError, WaitHazardError
from .operands import parse_operand
from .state import U32, U64


def access_size(inst):
    """Bytes per lane of the smallest LDS access of an instruction, or None when it has none."""
    n = inst.name
    if n.startswith("ds_"):
        if "permute" in n or "swizzle" in n:
            return None
        m = re.search(
            r"_(?:[uibf]|pk_add_rtn_b?f|pk_add_b?f)(8|16|32|64|96|128)(?:_d16|_d16_hi)?$", n
        )
        bits = int(m.group(1)) if m else 8
        return 4 if "pk_add" in n or bits == 96 else 8 if "_tr_" in n else bits // 8
    if n.startswith("flat_"):
        return 1 if re.search(r"byte|short", n) else 4
    if "load_lds" in n or inst.mods.get("lds"):
        return 16 if "dwordx4" in n else 4
    return None


def granule_of(insts):
    """Race-tracking granule of a kernel: its smallest LDS access (1 to 16 bytes)."""
    return min((s for s in map(access_size, insts) if s), default=4)


class Lds:
    """LDS of every workgroup in a running chunk."""

    def __init__(
        self, size, groups, wave_group, race=False, granule=4, poison=0xFF, uninitialised=False
    ):
        self.size = size
        self.stride = (size + 15) // 16 * 16
        self.bytes = np.full(max(self.stride * groups, 16), poison, np.uint8)
        self.words = self.bytes.view(U32)
        self.dwords = self.bytes.view(U64)
        self.wave_group = wave_group
        self.epoch = np.zeros(groups, np.int64)
        self.race = race
        self.granule = granule
        self.group_count = groups
        self.written = np.zeros(self.bytes.size, bool) if uninitialised else None
        self.pending_writer = None
        first = np.searchsorted(wave_group, np.arange(groups))
        self.wave_in_group = (np.arange(len(wave_group)) - first[wave_group]).astype(np.int32)
        self.atomics_seen = False
        if race:
            # tags are epoch * 32 + wave in group (31: several waves); older epochs compare lower
            n = self.bytes.size // granule
            self.w_tag, self.r_tag, self.a_tag = (np.full(n, -1, np.int32) for _ in range(3))

    # ---------------------------------------------------------------- addressing
    def locate(self, st, addr, size, lanes, what):
        """Byte offsets (int64) into the chunk array; raises outside the allocation."""
        base = st.lds_base
        a = addr.astype(np.int64)
        if lanes is not None:
            base = base[lanes]
        if a.size and int(a.max()) + size > self.size:
            k = int(np.argmax(a + size > self.size))
            lane = int(lanes[k]) if lanes is not None else k
            err = LdsAccessError(
                f"LDS {what} of {size} bytes at offset {int(a[k])} of {self.size}, "
                f"lane {lane & 63} (wave slot {lane >> 6})"
            )
            err.lane, err.address = lane, int(a[k])
            raise err
        return a + base

    # ---------------------------------------------------------------- races
    def _touch(self, off, size, wave):
        """(granule indices [n, k], epoch base tag [n, 1], own tag [n, 1]) of an access."""
        if self.granule > 4 and (off & (self.granule - 1)).any():
            self._refine()
        g = self.granule
        base = (self.epoch[self.wave_group[wave]].astype(np.int32) << 5)[:, None]
        me = base + self.wave_in_group[wave][:, None]
        first = off // g if g > 1 else off
        n = max(size // g, 1)
        if g > 1 and (off % g + size > n * g).any():
            n += 1
        idx = first[:, None] + np.arange(n) if n > 1 else first[:, None]
        return idx, base, me

    def _refine(self):
        """Go back to dword granules: so far every access covered whole, aligned granules."""
        k, self.granule = self.granule // 4, 4
        self.w_tag, self.r_tag, self.a_tag = (
            np.repeat(t, k) for t in (self.w_tag, self.r_tag, self.a_tag)
        )

    def _conflict(self, bad, idx, tags, me, wave, what):
        k, j = (int(v) for v in np.argwhere(bad)[0])
        group = int(self.wave_group[wave[k]])
        o = int(tags[k, j]) & 31
        who = "several waves" if o == 31 else f"wave {o}"
        raise LdsRaceError(
            f"LDS race at offset {int(idx[k, j]) * self.granule - group * self.stride}: {what} "
            f"by wave {int(me[k, 0]) & 31}, also used by {who} since the last barrier"
        )

    def note(self, st, off, size, lanes, kind):
        """Record an access by the lanes of a batch; raises on a conflict."""
        self.mark(off, size, st.lane_slot if lanes is None else st.lane_slot[lanes], kind)

    def mark(self, off, size, wave, kind, check=True):
        """Record an access: kind "r", "w" or "a" (atomic), ``wave`` the wave slot of each lane."""
        if off.size == 0:
            return
        idx, base, me = self._touch(off, size, wave)
        name = {"r": "read", "w": "write", "a": "atomic"}[kind]
        if kind == "a":
            self.atomics_seen = True
        if check:
            tables = [(self.w_tag, " after a write")]
            if kind != "r":
                tables.append((self.r_tag, " after a read"))
            if kind != "a" and self.atomics_seen:
                tables.append((self.a_tag, " of bytes used atomically"))
            for table, how in tables:
                t = table[idx]
                bad = (t >= base) & (t != me)
                if bad.any():
                    self._conflict(bad, idx, t, me, wave, name + how)
        if kind == "w":
            self.w_tag[idx] = me
            t = self.w_tag[idx]
            if check and (t != me).any():
                self._conflict(t != me, idx, t, me, wave, "write after a write")
            return
        table = self.r_tag if kind == "r" else self.a_tag
        t = table[idx]
        new = np.where((t >= base) & (t != me), base + 31, me)
        table[idx] = new
        mixed = table[idx] != new
        if mixed.any():
            table[idx[mixed]] = np.broadcast_to(base + 31, idx.shape)[mixed]

    # ---------------------------------------------------------------- pending DMA bytes
    def claim(self, off, size, what):
        """Mark bytes as the target of an LDS load in flight (strict mode)."""
        if self.pending_writer is None:
            self.pending_writer = np.zeros(self.bytes.size, bool)
        self.pending_writer[off[:, None] + np.arange(size)] = True

    def release(self, off, size):
        """The in-flight bytes have arrived."""
        self.pending_writer[off[:, None] + np.arange(size)] = False

    def check_pending(self, off, size, what):
        """Raise when an access meets bytes still in flight from a direct-to-LDS load."""
        if self.pending_writer is None or not off.size:
            return
        hit = self.pending_writer[off[:, None] + np.arange(size)]
        if hit.any():
            raise WaitHazardError(
                f"LDS {what} of bytes a direct-to-LDS load has not delivered yet "
                "(missing s_waitcnt vmcnt)"
            )

    # ---------------------------------------------------------------- data movement
    def read(self, st, addr, size, lanes):
        """Per-lane bytes: uint32[words, n] (zero-extended for 1 and 2 byte reads)."""
        off = self.locate(st, addr, size, lanes, "read")
        if self.race:
            self.note(st, off, size, lanes, "r")
        if self.pending_writer is not None:
            self.check_pending(off, size, "read")
        if (
            self.written is not None
            and off.size
            and not self.written[off[:, None] + np.arange(size)].all()
        ):
            raise UninitialisedError(f"LDS read of {size} bytes that nothing has written")
        st.last_lds = (off, size)
        if size < 4:
            v = self.bytes[off].astype(U32)
            return (v if size == 1 else v | self.bytes[off + 1].astype(U32) << U32(8))[None]
        words = size // 4
        out = np.empty((words, off.size), U32)
        if not (off & 3).any():
            idx = off >> 2
            for w in range(words):
                np.take(self.words, idx + w if w else idx, out=out[w], mode="clip")
        else:
            out[...] = np.ascontiguousarray(self.bytes[off[:, None] + np.arange(size)]).view(U32).T
        return out

    def write(self, st, addr, data, size, lanes):
        """Store uint32[words, n] (or the low 1/2 bytes)."""
        off = self.locate(st, addr, size, lanes, "write")
        if self.race:
            self.note(st, off, size, lanes, "w")
        if self.pending_writer is not None:
            self.check_pending(off, size, "write")
        self.store(off, data, size)
        st.last_lds = (off, size)

    def store(self, off, data, size):
        """Raw store at chunk byte offsets."""
        if self.written is not None:
            self.written[off[:, None] + np.arange(size)] = True
        if size < 4:
            for i in range(size):
                self.bytes[off + i] = (data[0] >> U32(8 * i)).astype(np.uint8)
        elif not (off & 3).any():
            idx = off >> 2
            for w in range(size // 4):
                self.words[idx + w if w else idx] = data[w]
        else:
            self.bytes[off[:, None] + np.arange(size)] = np.ascontiguousarray(data.T).view(np.uint8)

    def atomic(self, st, addr, name, data, size, lanes, compare=None):
        """Read-modify-write; returns old values (uint32 or uint64 lanes)."""
        off = self.locate(st, addr, size, lanes, "atomic")
        if self.race:
            self.note(st, off, size, lanes, "a")
        if self.pending_writer is not None:
            self.check_pending(off, size, "atomic")
        if self.written is not None:
            self.written[off[:, None] + np.arange(size)] = True
        st.last_lds = (off, size)
        mem = self.words if size == 4 else self.dwords
        if (off % size).any():
            raise LdsAccessError("misaligned LDS atomic")
        return atomics.apply(mem, off // size, name, data, compare)


# --------------------------------------------------------------------------- instructions
_READ = {"b32": 4, "b64": 8, "b96": 12, "b128": 16, "u8": 1, "i8": 1, "u16": 2, "i16": 2}
_ATOMIC = re.compile(
    r"^ds_(add|sub|rsub|inc|dec|min|max|and|or|xor|wrxchg|cmpst|pk_add)(_rtn)?_(u32|i32|b32|f32|u64|i64|b64|f64|f16|bf16)$"
)
_ATOMIC_NAME = {
    ("min", "i"): "smin",
    ("min", "u"): "umin",
    ("max", "i"): "smax",
    ("max", "u"): "umax",
    ("add", "f"): "fadd",
    ("min", "f"): "fmin",
    ("max", "f"): "fmax",
}


def narrow(x, kind):
    """Sign-extend loaded bytes or halves when the type is signed."""
    if kind == "i8":
        return (x ^ U32(0x80)) - U32(0x80)
    if kind == "i16":
        return (x ^ U32(0x8000)) - U32(0x8000)
    return x


def put_rows(st, row, rows, lanes):
    """Write load results to consecutive VGPRs for the active lanes."""
    for k, x in enumerate(rows):
        if lanes is None:
            st.v[row + k][:] = x
        else:
            st.v[row + k][lanes] = x


def put_half(st, row, x, lanes, high):
    """16-bit load into one half of a VGPR, keeping the other (D16 forms)."""
    old = st.v[row] if lanes is None else st.v[row][lanes]
    new = (old & U32(0xFFFF)) | x << U32(16) if high else (old & U32(0xFFFF0000)) | x & U32(0xFFFF)
    put_rows(st, row, [new], lanes)


def put_loaded(st, row, loaded, size, lanes, kind, half):
    """What a load of ``size`` bytes brought: words, or a narrow ``kind`` for all of a VGPR or,
    where ``half`` is "low" or "high", for one half of it."""
    if size >= 4:
        put_rows(st, row, loaded, lanes)
    elif half:
        put_half(st, row, narrow(loaded[0], kind), lanes, half == "high")
    else:
        put_rows(st, row, [narrow(loaded[0], kind)], lanes)


def _pick(x, lanes):
    return x if lanes is None else x[lanes]


def take_rows(st, row, n, lanes):
    """uint32[n, active] store data."""
    d = st.regs[row : row + n]
    return d if lanes is None else d[:, lanes]


def build(inst, ctx):
    """Closure for a DS instruction, or None."""
    n = inst.name
    if not n.startswith("ds_"):
        return None
    if inst.mods.get("gds"):
        raise NotImplementedError(inst.text)
    ops = [parse_operand(o) for o in inst.ops]
    if n in ("ds_bpermute_b32", "ds_permute_b32"):
        return _permute(inst, ctx, ops, n == "ds_bpermute_b32")
    if n == "ds_swizzle_b32":
        return _swizzle(inst, ctx, ops)
    off = int(inst.mods.get("offset", "0"), 0)
    m = re.match(r"^ds_read_(b32|b64|b96|b128|u8|i8|u16|i16)(_d16)?(_hi)?$", n)
    if m:
        kind, half = m.group(1), m.group(2) and ("high" if m.group(3) else "low")
        size, dst, addr = _READ[kind], ctx.row(ops[0]), ctx.row(ops[1])

        def read(st):
            lanes = st.lanes()
            a = _pick(st.v[addr], lanes)
            r = st.lds.read(st, a.astype(np.int64) + off if off else a, size, lanes)
            put_loaded(st, dst, r, size, lanes, kind, half)

        return read
    m = re.match(r"^ds_write_(b32|b64|b96|b128|b8|b16)(_d16_hi)?$", n)
    if m:
        size, hi = {"b8": 1, "b16": 2}.get(m.group(1)) or _READ[m.group(1)], bool(m.group(2))
        addr, src = ctx.row(ops[0]), ctx.row(ops[1])
        words = max(size // 4, 1)

        def write(st):
            lanes = st.lanes()
            d = take_rows(st, src, words, lanes)
            a = _pick(st.v[addr], lanes)
            st.lds.write(
                st, a.astype(np.int64) + off if off else a, d >> U32(16) if hi else d, size, lanes
            )

        return write
    m = re.match(r"^ds_(read|write)2(st64)?_b(32|64)$", n)
    if m:
        return _two(inst, ctx, ops, m.group(1) == "read", bool(m.group(2)), int(m.group(3)) // 8)
    m = _ATOMIC.match(n)
    if m:
        return _atomic(inst, ctx, ops, m, off)
    m = re.match(r"^ds_read_b64_tr_b(16)$", n)
    if m:
        return _read_transposed(inst, ctx, ops, int(m.group(1)), off)
    return None


def _two(inst, ctx, ops, load, st64, size):
    scale = size * (64 if st64 else 1)
    offs = [int(inst.mods.get(k, "0"), 0) * scale for k in ("offset0", "offset1")]
    words = size // 4
    if load:
        dst, addr = ctx.row(ops[0]), ctx.row(ops[1])

        def read2(st):
            lanes = st.lanes()
            a = _pick(st.v[addr], lanes).astype(np.int64)
            parts, marks = [], []
            for o in offs:
                parts.append(st.lds.read(st, a + o, size, lanes))
                marks.append(st.last_lds[0])
            st.last_lds = (np.concatenate(marks), size)
            for k, r in enumerate(parts):
                put_rows(st, dst + k * words, r, lanes)

        return read2
    addr, src = ctx.row(ops[0]), [ctx.row(ops[1]), ctx.row(ops[2])]

    def write2(st):
        lanes = st.lanes()
        a = _pick(st.v[addr], lanes).astype(np.int64)
        marks = []
        for o, s in zip(offs, src, strict=True):
            st.lds.write(st, a + o, take_rows(st, s, words, lanes), size, lanes)
            marks.append(st.last_lds[0])
        st.last_lds = (np.concatenate(marks), size)

    return write2


def _atomic(inst, ctx, ops, m, off):
    kind, rtn, t = m.group(1), bool(m.group(2)), m.group(3)
    size = 8 if t.endswith("64") else 4
    if kind == "pk_add":
        name = "pk_add_" + t
    else:
        name = _ATOMIC_NAME.get((kind, t[0]), {"wrxchg": "swap"}.get(kind, kind))
    dst = ctx.row(ops[0]) if rtn else None
    addr, d0 = ctx.row(ops[1 if rtn else 0]), ctx.row(ops[2 if rtn else 1])
    d1 = ctx.row(ops[3 if rtn else 2]) if kind == "cmpst" else None

    def value(st, row, lanes):
        w = take_rows(st, row, size // 4, lanes)
        return (
            np.ascontiguousarray(w[0])
            if size == 4
            else w[0].astype(U64) | w[1].astype(U64) << U64(32)
        )

    def atomic(st):
        lanes = st.lanes()
        a = _pick(st.v[addr], lanes).astype(np.int64) + off
        if d1 is None:
            old = st.lds.atomic(st, a, name, value(st, d0, lanes), size, lanes)
        else:
            old = st.lds.atomic(
                st, a, name, value(st, d1, lanes), size, lanes, value(st, d0, lanes)
            )
        if rtn:
            rows = [old] if size == 4 else [old.astype(U32), (old >> U64(32)).astype(U32)]
            put_rows(st, dst, rows, lanes)

    return atomic


def _permute(inst, ctx, ops, backward):
    """DS_BPERMUTE reads src[(addr/4) % 64] of the wave (0 if inactive); DS_PERMUTE writes there."""
    dst, addr, src = (ctx.row(o) for o in ops)
    off = int(inst.mods.get("offset", "0"), 0)

    def op(st):
        lane = ((st.v[addr] + U32(off)) >> U32(2) & U32(63)).astype(np.int64)
        base = st.lane_wave * 64
        x = st.v[src] if st.m is True else np.where(st.m, st.v[src], U32(0))
        if backward:
            r = x[base + lane]
        else:
            r = np.zeros(st.N, U32)
            active = st.lanes()
            if active is None:
                r[base + lane] = x
            else:
                r[(base + lane)[active]] = x[active]
        np.copyto(st.v[dst], r, where=st.m)
        st.last_lds = None

    return op


def swizzle_lanes(offset):
    """Source lane of each of 64 lanes for a DS_SWIZZLE offset."""
    lane = np.arange(64)
    if offset & 0x8000:
        q = np.array([offset >> (2 * k) & 3 for k in range(4)])
        return (lane & ~3) + q[lane & 3]
    a, o, x = offset & 31, offset >> 5 & 31, offset >> 10 & 31
    low = lane & 31
    return (lane & 32) + (((low & a) | o) ^ x)


def _swizzle(inst, ctx, ops):
    dst, src = (ctx.row(o) for o in ops)
    perm = swizzle_lanes(inst.words[0] & 0xFFFF)

    def op(st):
        x = st.v[src] if st.m is True else np.where(st.m, st.v[src], U32(0))
        np.copyto(st.v[dst], x.reshape(st.W, 64)[:, perm].ravel(), where=st.m)
        st.last_lds = None

    return op


def _read_transposed(inst, ctx, ops, bits, off):
    """gfx950 DS_READ_B64_TR_B16: 64-bit reads, then a transpose inside each 16-lane row.

    The row's 16 x (64/bits) elements are taken in lane-major order as a matrix
    with 16 elements per matrix row, and lane c receives column c.
    """
    dst, addr = ctx.row(ops[0]), ctx.row(ops[1])
    per = 64 // bits

    def op(st):
        if st.m is not True:
            raise NotImplementedError(inst.text + " with inactive lanes")
        r = st.lds.read(st, st.v[addr].astype(np.int64) + off, 8, None)
        w = np.ascontiguousarray(r.T)
        e = w.view(np.uint16).reshape(-1, 16, per)
        t = np.ascontiguousarray(e.reshape(-1, per, 16).transpose(0, 2, 1)).reshape(st.N, per)
        out = t.view(U32).reshape(st.N, 2)
        st.v[dst][:] = out[:, 0]
        st.v[dst + 1][:] = out[:, 1]

    return op
