"""Strict wait checking: which registers have loads in flight, and what retires them.

CDNA3 ISA, "Manually Inserted Wait States / S_WAITCNT".  VM_CNT covers vector
memory (loads, stores and atomics, in order), LGKM_CNT covers LDS (in order
among themselves) and scalar loads (any order); FLAT counts in both and in no
order.  A counter value n proves an entry complete only when, were it still
outstanding, more than n entries would have to be outstanding with it.
"""

import numpy as np

from .errors import WaitHazardError
from .operands import parse_operand

SGPR = 100000  # key offset of scalar registers in register sets


class Pending:
    """One memory instruction in flight."""

    __slots__ = ("cls", "dma", "inst", "marks", "ordered", "queues", "regs")

    def __init__(self, regs, queues, ordered, inst, cls, marks=None, dma=None):
        self.regs, self.queues, self.ordered, self.inst, self.cls = (
            regs,
            set(queues),
            ordered,
            inst,
            cls,
        )
        self.marks, self.dma = marks, dma

    def take(self, slots):
        """The same entry for a subset of waves (given by slot)."""
        marks, dma = self.marks, self.dma
        if marks is not None:
            off, size, kind, who = marks
            keep = np.isin(who, slots)
            marks = (off[keep], size, kind, who[keep])
        if dma is not None:
            off, rows, size, who = dma
            keep = np.isin(who, slots)
            dma = (off[keep], rows[:, keep], size, who[keep])
        return Pending(self.regs, self.queues, self.ordered, self.inst, self.cls, marks, dma)

    def same(self, other):
        """Would the entry be identical for another group of waves?"""
        return self.inst is other.inst and self.queues == other.queues

    def merge(self, other):
        """The entry for the union of both groups of waves."""
        marks, dma = self.marks, self.dma
        if marks is not None and other.marks is not None:
            a, b = marks, other.marks
            marks = (np.concatenate([a[0], b[0]]), a[1], a[2], np.concatenate([a[3], b[3]]))
        if dma is not None and other.dma is not None:
            a, b = dma, other.dma
            dma = (
                np.concatenate([a[0], b[0]]),
                np.concatenate([a[1], b[1]], axis=1),
                a[2],
                np.concatenate([a[3], b[3]]),
            )
        return Pending(self.regs, self.queues, self.ordered, self.inst, self.cls, marks, dma)


def memory_class(name):
    """'lds', 'smem', 'vm', 'flat' or None, by mnemonic."""
    if name.startswith("ds_"):
        return "lds"
    if name.startswith(("s_load_", "s_buffer_load_", "s_memtime", "s_memrealtime")):
        return "smem"
    if name.startswith(("global_", "buffer_load", "buffer_store", "buffer_atomic", "scratch_")):
        return "vm"
    if name.startswith("flat_"):
        return "flat"
    return None


def registers(op, ctx):
    """Register keys an operand covers."""
    if op.kind in "va":
        row = ctx.row(op)
        return range(row, row + op.count)
    if op.kind == "s" and op.index < 126:
        return range(SGPR + op.index, SGPR + op.index + op.count)
    return ()


def destinations(inst, ctx):
    """Registers a memory instruction loads into."""
    n = inst.name
    if not inst.ops or "store" in n or "write" in n or inst.mods.get("lds") or "load_lds" in n:
        return []
    if "atomic" in n and not (inst.mods.get("sc0") or inst.mods.get("glc")):
        return []
    if n.startswith("ds_") and not ("read" in n or "rtn" in n or "permute" in n or "swizzle" in n):
        return []
    return list(registers(parse_operand(inst.ops[0]), ctx))


def wrap(op, inst, ctx):
    """Add pending-register checks (and queueing, for memory instructions) around ``op``."""
    cls = memory_class(inst.name)
    dst = destinations(inst, ctx) if cls else []
    touched, first, sources, results = set(), set(), set(), set()
    for k, text in enumerate(inst.ops):
        try:
            keys = registers(parse_operand(text), ctx)
        except NotImplementedError:
            continue
        (first if k == 0 and dst else touched).update(keys)
        is_result = k == 0 and (dst or cls is None)
        (results if is_result else sources).update(keys)
        if is_result and inst.name.startswith(("v_fmac", "v_mac_", "v_dot2c", "v_dot4c")):
            sources.update(keys)

    def check(st):
        pend = st.pending
        for r in touched:
            if r in pend:
                _hazard(pend[r], r)
        for r in first:
            if r in pend and (pend[r].cls != cls or cls == "smem"):
                _hazard(pend[r], r)

    def consume(st):
        for r in sources & st.carried.keys():
            entry = st.carried.pop(r, None)
            if entry is not None:
                _mark_carried(st, entry)
        for r in results & st.carried.keys():
            del st.carried[r]

    if cls is None:

        def strict(st):
            if st.pending:
                check(st)
            if st.carried:
                consume(st)
            op(st)

        return strict
    queues = {"lds": ("lgkm",), "smem": ("lgkm",), "vm": ("vm",), "flat": ("vm", "lgkm")}[cls]
    kind = None
    if cls == "lds":
        kind = "r" if "read" in inst.name else "w" if "write" in inst.name else "a"

    def strict_mem(st):
        if st.pending:
            check(st)
        if st.carried:
            consume(st)
        st.last_lds = st.dma = None
        op(st)
        marks = None
        if kind and st.last_lds is not None and st.lds.race:
            off, size = st.last_lds
            lanes = st.lane_slot if st.m is True else st.lane_slot[st.m]
            marks = (off, size, kind, np.tile(lanes, len(off) // max(len(lanes), 1)))
        e = Pending(dst, queues, cls in ("lds", "vm"), inst, cls, marks, st.dma)
        st.dma = None
        for r in dst:
            st.pending[r] = e
        if "vm" in queues:
            st.pend_vm.append(e)
        if "lgkm" in queues:
            st.pend_lgkm.append(e)

    return strict_mem


def _hazard(entry, reg):
    name = f"s{reg - SGPR}" if reg >= SGPR else f"v/a row {reg}"
    raise WaitHazardError(
        f"{name} is used while '{entry.inst.text}' (at {entry.inst.addr:#x}) is still in "
        "flight: missing s_waitcnt"
    )


def waitcnt(inst):
    """Closure for S_WAITCNT: retire what the counters prove complete."""
    imm = inst.words[0] & 0xFFFF
    vm, lgkm = imm & 15 | imm >> 14 << 4, imm >> 8 & 15

    def wait(st):
        if st.pend_vm:
            _retire(st, "pend_vm", "vm", vm, inst)
        if st.pend_lgkm:
            _retire(st, "pend_lgkm", "lgkm", lgkm, inst)

    return wait


def _retire(st, attr, queue, n, inst):
    entries = getattr(st, attr)
    later, keep, done = 0, [], []
    for e in reversed(entries):
        if e.ordered:
            later += 1
        (done if (n == 0 or (e.ordered and later > n)) else keep).append(e)
    keep.reverse()
    setattr(st, attr, keep)
    for e in reversed(done):
        e.queues.discard(queue)
        if e.queues:
            continue
        delivered = [r for r in e.regs if st.pending.get(r) is e]
        for r in delivered:
            del st.pending[r]
        is_lds_write = e.marks is not None and e.marks[2] != "r"
        if delivered or is_lds_write or e.dma is not None:
            st.machine.stats.busy_waits.add(inst.addr)
        if e.dma is not None:
            off, rows, size, slots = e.dma
            st.lds.release(off, size)
            st.lds.store(off, rows, size)
            if st.lds.race:
                st.lds.mark(off, size, slots, "w")


def _mark_carried(st, entry):
    """A result of a read that was in flight at the barrier is used: the read is of this epoch."""
    for r in entry.regs:
        st.carried.pop(r, None)
    off, size, kind, slots = entry.marks
    st.lds.mark(off, size, slots, kind)


def remark(st):
    """After a barrier: LDS accesses not yet waited for belong to the new epoch too.

    Reads do so only once a result is used: clang leaves reads that are never used in flight.
    """
    st.carried = {}
    for e in st.pend_lgkm:
        if e.marks is not None and e.marks[2] == "r":
            st.carried.update((r, e) for r in e.regs)
        elif e.marks is not None:
            off, size, kind, slots = e.marks
            st.lds.mark(off, size, slots, kind, check=False)
    for e in st.pend_vm:
        if e.dma is not None and st.lds.race:
            off, _, size, slots = e.dma
            st.lds.mark(off, size, slots, "w", check=False)
