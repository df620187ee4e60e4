"""Architectural state of a batch of waves executing in lockstep.

A *batch* holds W waves (W = 1 in serial mode) that share one program counter.
A VGPR is one uint32 row of W*64 lanes; an SGPR is a Python int while all waves
of the batch agree on it, and a uint32[W] array otherwise.  EXEC, VCC and other
lane masks are :class:`LaneMask` objects that convert lazily between one bool
per lane and one 64-bit integer per wave.
"""

import numpy as np

U32, U64, F32 = np.uint32, np.uint64, np.float32
M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
VCC, M0, EXEC = 106, 124, 126
FULL = M64


def collapse(values):
    """A list of per-wave ints as one int when equal, else a uint64 array."""
    first = values[0]
    for v in values:
        if v != first:
            return np.array(values, U64)
    return first


def per_wave(x, n):
    """``x`` (int or array) as a list of n Python ints."""
    return x.tolist() if isinstance(x, np.ndarray) else [x] * n


class LaneMask:
    """A 64-bit mask per wave, kept as lane bools and/or integers."""

    __slots__ = ("_bools", "_ints", "waves")

    def __init__(self, waves, bools=None, ints=None):
        self.waves, self._bools, self._ints = waves, bools, ints

    def bools(self):
        """bool[W*64], lane order."""
        if self._bools is None:
            x = self._ints
            arr = np.full(self.waves, x, U64) if isinstance(x, int) else x
            self._bools = np.unpackbits(
                np.ascontiguousarray(arr).view(np.uint8), bitorder="little"
            ).view(bool)
        return self._bools

    def ints(self):
        """int when uniform over the waves, else uint64[W]."""
        if self._ints is None:
            x = np.packbits(self._bools, bitorder="little").view(U64)
            first = int(x[0])
            self._ints = first if self.waves == 1 or (x == x[0]).all() else x
        return self._ints

    def any_per_wave(self):
        """bool[W]: does the wave have any bit set (a Python bool when uniform)."""
        if self._ints is not None:
            x = self._ints
            return bool(x) if isinstance(x, int) else x != 0
        a = self._bools.reshape(self.waves, 64).any(axis=1)
        first = bool(a[0])
        return first if self.waves == 1 or (a == a[0]).all() else a

    def take(self, waves, lanes):
        """The mask of a subset of waves."""
        b = None if self._bools is None else self._bools[lanes]
        i = self._ints
        if isinstance(i, np.ndarray):
            i = i[waves]
        return LaneMask(len(waves), b, i)


class Batch:
    """W waves of one or more workgroups that share a program counter."""

    def __init__(self, machine, rows, wave_ids):
        self.machine = machine
        self.W = len(wave_ids)
        self.N = self.W * 64
        self.wave_ids = np.asarray(wave_ids, np.int64)  # slot numbers within the running chunk
        self.regs = None
        self.s = [0] * 128
        self.scc = 0
        self.exec = LaneMask(self.W, None, M64)
        self.m = True  # ufunc "where": True or bool[N]
        self.pc = 0
        self.mode = 0
        self.steps = 0
        self.lds = None
        self.turn = 0  # scheduling quantum count
        self.last_lds = None  # (offsets, size) of the latest LDS access
        self.dma = None  # payload of a direct-to-LDS load (strict mode)
        self.strict = False
        self.pend_vm, self.pend_lgkm = [], []
        self.pending = {}
        self.carried = {}  # register: an LDS read in flight at the last barrier (waits.remark)
        if rows:
            self.attach(np.empty((rows, self.N), U32))
        self._lane_wave = None

    def bind(self, lds, strict):
        """Connect the batch to the chunk's LDS and cache per-lane constants."""
        self.lds, self.strict = lds, strict
        self.lane_slot = np.repeat(self.wave_ids, 64)
        self.lds_base = lds.wave_group[self.lane_slot] * lds.stride
        self.all_lanes = np.arange(self.N)

    def deliver_lds(self, addr, rows, size, lanes):
        """Direct-to-LDS data: stored at once, or when its vmcnt wait retires in strict mode."""
        if not self.strict:
            self.lds.write(self, addr, rows, size, lanes)
            return
        off = self.lds.locate(self, addr, size, lanes, "write")
        slots = self.lane_slot if lanes is None else self.lane_slot[lanes]
        if self.lds.race:
            self.lds.mark(off, size, slots, "w")
        self.lds.check_pending(off, size, "write")
        self.lds.claim(off, size, "load")
        self.dma = (off, rows, size, slots)

    # ---------------------------------------------------------------- registers
    def attach(self, regs):
        """Use ``regs`` (uint32[rows, N]) as the vector register file."""
        self.regs = regs
        self.v = list(regs)
        f = regs.view(F32)
        self.f = list(f)
        self.i = list(regs.view(np.int32))

    def set_exec(self, mask):
        """Install a LaneMask as EXEC and refresh the ufunc ``where`` argument."""
        self.exec = mask
        if mask._ints is not None and isinstance(mask._ints, int) and mask._ints == M64:
            self.m = True
            return
        b = mask.bools()
        self.m = True if b.all() else b

    def exec_bools(self):
        """EXEC as bool[N] even when full."""
        return self.exec.bools()

    def lanes(self):
        """Indices of active lanes, or None when every lane is active."""
        return None if self.m is True else np.flatnonzero(self.m)

    @property
    def lane_wave(self):
        """int64[N]: which wave (index within the batch) a lane belongs to."""
        if self._lane_wave is None:
            self._lane_wave = np.repeat(np.arange(self.W), 64)
        return self._lane_wave

    # ---------------------------------------------------------------- scalar registers
    def rd32(self, i):
        """SGPR ``i``: int or uint32/uint64[W]."""
        x = self.s[i]
        if type(x) is LaneMask:
            self.unpair(i)
            x = self.s[i]
        if i >= 126:
            v = self.exec.ints()
            return (
                (v >> 32 if i == 127 else v & M32)
                if isinstance(v, int)
                else ((v >> U64(32)) if i == 127 else v & U64(M32))
            )
        return x

    def unpair(self, i):
        """Turn the LaneMask held by a register pair into two 32-bit halves."""
        x, lo = self.s[i], i & ~1
        v = x.ints()
        halves = (v & M32, v >> 32) if isinstance(v, int) else (v & U64(M32), v >> U64(32))
        for k, val in zip((lo, lo + 1), halves, strict=True):
            if self.s[k] is x:
                self.s[k] = val

    def wr32(self, i, x):
        """Write SGPR ``i`` (also VCC, M0, EXEC halves); the other half of a pair survives."""
        if i >= 126:
            v = self.exec.ints()
            if isinstance(v, int) and isinstance(x, int):
                new = (v & M32) | (x << 32) if i == 127 else (v & (M32 << 32)) | x
                self.set_exec(LaneMask(self.W, None, new))
            else:
                vs, xs = per_wave(v, self.W), per_wave(x, self.W)
                new = [
                    (a & M32) | (b << 32) if i == 127 else (a & (M32 << 32)) | b
                    for a, b in zip(vs, xs, strict=True)
                ]
                self.set_exec(LaneMask(self.W, None, collapse(new)))
            return
        if type(self.s[i]) is LaneMask:
            self.unpair(i)
        self.s[i] = x

    def rd64(self, i):
        """SGPR pair as int or uint64[W]."""
        if i == EXEC:
            return self.exec.ints()
        lo, hi = self.s[i], self.s[i + 1]
        if type(lo) is LaneMask and lo is hi:
            return lo.ints()
        lo, hi = self.rd32(i), self.rd32(i + 1)
        if type(lo) is int and type(hi) is int:
            return lo | hi << 32
        lo = lo.astype(U64) if isinstance(lo, np.ndarray) else U64(lo)
        hi = hi.astype(U64) if isinstance(hi, np.ndarray) else U64(hi)
        return lo | hi << U64(32)

    def wr64(self, i, x):
        """Write an SGPR pair from an int or uint64[W]."""
        if i == EXEC:
            self.set_exec(LaneMask(self.W, None, x))
            return
        for k in (i, i + 1):
            if type(self.s[k]) is LaneMask:
                self.unpair(k)
        if isinstance(x, int):
            self.s[i], self.s[i + 1] = x & M32, x >> 32
        else:
            self.s[i], self.s[i + 1] = x & U64(M32), x >> U64(32)

    def rdmask(self, i):
        """SGPR pair as a LaneMask."""
        if i == EXEC:
            return self.exec
        lo = self.s[i]
        if type(lo) is LaneMask and self.s[i + 1] is lo:
            return lo
        m = LaneMask(self.W, None, self.rd64(i))
        return m

    def wrmask(self, i, mask):
        """Write a LaneMask to an SGPR pair."""
        if i == EXEC:
            self.set_exec(mask)
            return
        for k in (i, i + 1):
            if type(self.s[k]) is LaneMask:
                self.unpair(k)
        self.s[i] = self.s[i + 1] = mask

    def lanewise(self, x, kind=U32):
        """A scalar register value as something a ufunc broadcasts over lanes."""
        if isinstance(x, np.ndarray):
            return np.repeat(x.astype(kind), 64)
        return kind(x)

    # ---------------------------------------------------------------- split and merge
    def take(self, waves):
        """A new batch with only the given wave indices."""
        waves = np.asarray(waves)
        lanes = (waves[:, None] * 64 + np.arange(64)).ravel()
        b = Batch(self.machine, 0, self.wave_ids[waves])
        b.attach(np.ascontiguousarray(self.regs[:, lanes]))
        for k, x in enumerate(self.s):
            if isinstance(x, np.ndarray):
                y = x[waves]
                b.s[k] = int(y[0]) if (y == y[0]).all() else y
            elif type(x) is LaneMask:
                if k % 2 and self.s[k - 1] is x:
                    b.s[k] = b.s[k - 1]
                else:
                    b.s[k] = x.take(waves, lanes)
            else:
                b.s[k] = x
        b.scc = self.scc if not isinstance(self.scc, np.ndarray) else self.scc[waves]
        if isinstance(b.scc, np.ndarray) and (b.scc == b.scc[0]).all():
            b.scc = int(b.scc[0])
        b.set_exec(self.exec.take(waves, lanes))
        b.bind(self.lds, self.strict)
        b.pc, b.mode, b.steps, b.turn = self.pc, self.mode, self.steps, self.turn
        b.pend_vm = [e.take(b.wave_ids) for e in self.pend_vm]
        b.pend_lgkm = [e.take(b.wave_ids) for e in self.pend_lgkm]
        b.rebuild_pending()
        b.carried = {r: e.take(b.wave_ids) for r, e in self.carried.items()}
        return b

    def rebuild_pending(self):
        """Recompute the register -> pending-load map from the two queues."""
        self.pending = {}
        for e in self.pend_vm + self.pend_lgkm:
            for r in e.regs:
                self.pending[r] = e

    def mergeable(self, other):
        """Can ``other`` (same pc) be appended to this batch?"""
        if self.mode != other.mode:
            return False
        for a, b in ((self.pend_vm, other.pend_vm), (self.pend_lgkm, other.pend_lgkm)):
            if len(a) != len(b) or any(not x.same(y) for x, y in zip(a, b, strict=True)):
                return False
        mine, others = self.carried, other.carried
        return mine.keys() == others.keys() and all(mine[r].same(others[r]) for r in mine)

    def merge(self, other):
        """A batch with the waves of both (this one's first)."""
        n = Batch(self.machine, 0, np.concatenate([self.wave_ids, other.wave_ids]))
        n.attach(np.concatenate([self.regs, other.regs], axis=1))
        for k in range(128):
            a, b = self.s[k], other.s[k]
            if type(a) is LaneMask or type(b) is LaneMask:
                a, b = self.rd32(k), other.rd32(k)
            if type(a) is int and type(b) is int and a == b:
                n.s[k] = a
            else:
                n.s[k] = np.concatenate(
                    [
                        np.asarray(a, U64) * np.ones(self.W, U64),
                        np.asarray(b, U64) * np.ones(other.W, U64),
                    ]
                )
        if isinstance(self.scc, int) and isinstance(other.scc, int) and self.scc == other.scc:
            n.scc = self.scc
        else:
            n.scc = np.concatenate(
                [
                    np.asarray(self.scc) * np.ones(self.W, np.int64),
                    np.asarray(other.scc) * np.ones(other.W, np.int64),
                ]
            )
        n.set_exec(LaneMask(n.W, np.concatenate([self.exec.bools(), other.exec.bools()])))
        n.bind(self.lds, self.strict)
        n.pc, n.mode = self.pc, self.mode
        n.steps, n.turn = max(self.steps, other.steps), max(self.turn, other.turn)
        n.pend_vm = [x.merge(y) for x, y in zip(self.pend_vm, other.pend_vm, strict=True)]
        n.pend_lgkm = [x.merge(y) for x, y in zip(self.pend_lgkm, other.pend_lgkm, strict=True)]
        n.rebuild_pending()
        n.carried = {r: e.merge(other.carried[r]) for r, e in self.carried.items()}
        return n
