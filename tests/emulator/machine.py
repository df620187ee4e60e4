"""Devices, modules, kernels: decoding to closures, scheduling waves, launching.

A kernel is decoded once into basic blocks of closures.  A launch runs chunks of
workgroups; in ``lockstep`` scheduling the waves of a chunk that share a program
counter execute together as one :class:`~emulator.state.Batch` (they split at
branches they disagree on and merge again when their counters meet); in
``serial`` scheduling every wave runs alone from barrier to barrier.
"""

import contextlib
import random
import struct
import time
from types import MappingProxyType

import numpy as np

from . import codeobject, mfma, salu, valu, vmem, waits
from . import lds as lds_module
from .errors import AccessError, DeadlockError, ExecutionError, LaunchError
from .memory import GlobalMemory
from .operands import parse_operand, scalar_reader, scalar_writer
from .state import M32, M64, U32, Batch, LaneMask, collapse

ARCHS = ("gfx90a", "gfx940", "gfx941", "gfx942", "gfx950", "gfx908")
LDS_LIMIT = {"gfx950": 160 * 1024}
POISON = 0x7FC5A5A5  # a quiet NaN: initial content of VGPRs
_HIDDEN_DIMS = ("x", "y", "z")


class Block:
    """A straight run of instructions ending in a branch, barrier, end, or a join point."""

    __slots__ = ("count", "end", "insts", "ops")

    def __init__(self, ops, insts, end):
        self.ops, self.insts, self.end = ops, insts, end
        self.count = len(insts)


class Context:
    """What instruction builders need to know about the kernel being decoded."""

    def __init__(self, arch, memory, vrows, scratch_bytes):
        self.arch, self.memory, self.vrows = arch, memory, vrows
        self.scratch_bytes = scratch_bytes
        self.scratch = None

    def row(self, op):
        """Register-file row of a VGPR or AGPR operand."""
        if op.kind == "v":
            return op.index
        if op.kind == "a":
            return self.vrows + op.index
        raise NotImplementedError(f"vector register expected, found {op.text!r}")

    # private segment: dword-interleaved over the 64 lanes, as the swizzled buffer sees it
    def _scratch_words(self, st, off, size, lanes):
        bad = (off < 0) | (off + size > self.scratch_bytes)
        if bad.any():
            k = int(np.argmax(bad))
            raise AccessError(
                f"scratch access of {size} bytes at {int(off[k])} of {self.scratch_bytes} per lane"
            )
        if (size >= 4 and (off & 3).any()) or (size == 2 and (off & 1).any()):
            raise AccessError("misaligned scratch access")
        ids = np.arange(st.N) if lanes is None else lanes
        slot = st.lane_slot[ids]
        return slot * (self.scratch_bytes // 4 * 64) + (off >> 2) * 64 + (ids & 63)

    def scratch_read(self, st, off, size, lanes):
        """Per-lane private memory read: uint32[words, n]."""
        w = self._scratch_words(st, off, size, lanes)
        if size < 4:
            x = self.scratch[w] >> ((off & 3) * 8).astype(U32)
            return (x & U32((1 << 8 * size) - 1))[None]
        return np.array([self.scratch[w + 64 * k] for k in range(size // 4)])

    def scratch_write(self, st, off, size, data, lanes):
        """Per-lane private memory write."""
        w = self._scratch_words(st, off, size, lanes)
        if size < 4:
            sh = ((off & 3) * 8).astype(U32)
            field = U32((1 << 8 * size) - 1) << sh
            self.scratch[w] = (self.scratch[w] & ~field) | (data[0] << sh) & field
            return
        for k in range(size // 4):
            self.scratch[w + 64 * k] = data[k]


class Program:
    """Lazily decoded basic blocks of a kernel."""

    BRANCHES = (
        "s_branch",
        "s_cbranch",
        "s_endpgm",
        "s_barrier",
        "s_setpc_b64",
        "s_swappc_b64",
        "s_call_b64",
        "s_trap",
    )

    def __init__(self, module, strict):
        self.module, self.strict = module, strict
        self.blocks = {}
        self.ctx = None

    def block(self, pc):
        """The block starting at address ``pc``."""
        b = self.blocks.get(pc)
        if b is None:
            b = self.blocks[pc] = self._decode(pc)
        return b

    def _decode(self, pc):
        listing = self.module.listing
        inst = listing.find(pc)
        if inst is None:
            raise ExecutionError(f"jump to {pc:#x}, which is no instruction")
        ops, body, indexing = [], [], 0
        while not inst.name.startswith(self.BRANCHES):
            body.append(inst)
            ops.append(self.closure(inst, indexing if inst.name.startswith("v_") else 0))
            if inst.name == "s_set_gpr_idx_on":
                indexing = salu.index_mode(inst)
            elif inst.name == "s_set_gpr_idx_off":
                indexing = 0
            follows = inst.addr + inst.size
            inst = listing.find(follows)
            if inst is None:
                raise ExecutionError("execution ran past the end of the code")
            if follows in listing.leaders:
                return Block(ops, body, ("jump", follows))
        return Block(ops, [*body, inst], self._terminator(inst))

    def closure(self, inst, indexing=0):
        """The executable form of a non-branch instruction (``indexing``: GPR indexing mode)."""
        name, ctx = inst.name, self.ctx
        op = None
        try:
            if name == "s_waitcnt":
                return waits.waitcnt(inst) if self.strict else (lambda st: None)
            if name == "s_getpc_b64":
                d, value = parse_operand(inst.ops[0]).index, self.module.bias + inst.addr + 4
                return lambda st: st.wr64(d, value)
            if indexing:
                op = valu.indexed_move(inst, ctx, indexing)
            elif name.startswith("s_"):
                op = vmem.build_smem(inst, ctx) or salu.build(inst, ctx)
            elif name.startswith("v_mfma"):
                op = mfma.build(inst, ctx)
            elif name.startswith("v_"):
                op = valu.build(inst, ctx)
            elif name.startswith("ds_"):
                op = lds_module.build(inst, ctx)
            else:
                op = vmem.build(inst, ctx)
        except NotImplementedError as e:
            return _unsupported(inst, str(e))
        except (ValueError, IndexError, KeyError, AssertionError) as e:
            return _unsupported(inst, f"{type(e).__name__}: {e}")
        if op is None:
            return _unsupported(inst, "unknown instruction")
        return waits.wrap(op, inst, ctx) if self.strict else op

    def _terminator(self, inst):
        n = inst.name
        nxt = inst.addr + inst.size
        if n.startswith("s_endpgm"):
            return ("end",)
        if n == "s_barrier":
            return ("barrier", nxt)
        if n == "s_branch":
            return ("jump", inst.target)
        if n == "s_trap":
            return ("trap", inst.ops[0] if inst.ops else "0")
        if n == "s_setpc_b64":
            return ("setpc", scalar_reader(parse_operand(inst.ops[0]), 64))
        if n == "s_swappc_b64":
            d, s = (parse_operand(o) for o in inst.ops)
            return ("swappc", scalar_reader(s, 64), scalar_writer(d, 64), self.module.bias + nxt)
        if n == "s_call_b64":
            return (
                "call",
                scalar_writer(parse_operand(inst.ops[0]), 64),
                self.module.bias + nxt,
                inst.target,
            )
        cond = {
            "scc0": lambda st: _not(st.scc),
            "scc1": lambda st: st.scc,
            "vccz": lambda st: _not(st.rdmask(106).any_per_wave()),
            "vccnz": lambda st: st.rdmask(106).any_per_wave(),
            "execz": lambda st: _not(st.exec.any_per_wave()),
            "execnz": lambda st: st.exec.any_per_wave(),
        }
        key = n[len("s_cbranch_") :]
        if key not in cond:
            raise NotImplementedError(inst.text)
        return ("cond", cond[key], inst.target, nxt)


def _not(x):
    return x == 0 if isinstance(x, np.ndarray) else not x


def _unsupported(inst, why):
    def fail(st):
        raise NotImplementedError(f"{inst.text}   ({why})")

    return fail


class Stats:
    """Counters of one launch."""

    def __init__(self):
        self.wave_instructions = 0
        self.batch_instructions = 0
        self.seconds = 0.0
        self.splits = self.merges = 0
        self.busy_waits = set()  # addresses of waits that delivered something (strict_waits)
        self.barriers = set()  # addresses of those reached

    def __repr__(self):
        rate = self.wave_instructions / self.seconds if self.seconds else 0
        return (
            f"<{self.wave_instructions} wave-instructions in {self.seconds:.3f} s "
            f"({rate:,.0f}/s), {self.batch_instructions} executed, {self.splits} splits, "
            f"{self.merges} merges>"
        )


class Options:
    """Checks and scheduling; given to Device and overridable per launch.

    lds_race: detect LDS races between waves.  strict_waits: detect missing
    s_waitcnt.  uninitialised: report LDS reads of bytes nothing wrote.
    schedule: "lockstep" or "serial".  seed: shuffles workgroup and wave order
    (None keeps ascending order).  batch_waves: waves executed together.
    max_instructions: per-wave budget.  poison: initial VGPR bits.
    """

    DEFAULTS = MappingProxyType(
        {
            "lds_race": True,
            "strict_waits": False,
            "uninitialised": False,
            "schedule": "lockstep",
            "seed": None,
            "batch_waves": 64,
            "max_instructions": 200_000_000,
            "poison": POISON,
        }
    )

    def __init__(self, base=None, **kw):
        values = dict(base.__dict__ if base else self.DEFAULTS)
        unknown = set(kw) - set(self.DEFAULTS)
        if unknown:
            raise TypeError(f"unknown options {sorted(unknown)}")
        values.update(kw)
        self.__dict__.update(values)


class Device:
    """An emulated GPU: global memory plus default options."""

    def __init__(self, arch="gfx942", **options):
        if arch not in ARCHS:
            raise LaunchError(f"architecture {arch} not supported")
        self.arch = arch
        self.memory = GlobalMemory()
        self.options = Options(None, **options)

    def register(self, array, **kw):
        """Make a NumPy array accessible to kernels; returns its device address."""
        return self.memory.register(array, **kw)

    def unregister(self, array):
        """Remove an array registered before."""
        self.memory.unregister(array)

    def load(self, blob):
        """Load a code object."""
        return Module(self, blob)


class Module:
    """A loaded code object: image in memory, disassembly, kernels by name."""

    def __init__(self, device, blob):
        self.device = device
        self.code = codeobject.CodeObject(blob)
        if self.code.machine and self.code.machine != device.arch:
            raise LaunchError(f"code object is for {self.code.machine}, device is {device.arch}")
        size = self.code.image_size
        self._store = np.zeros(size + 8192, np.uint8)
        self.bias = (self._store.ctypes.data + 4095) & ~4095
        skip = self.bias - self._store.ctypes.data
        self.image = self._store[skip : skip + size]
        for va, data, _, _ in self.code.segments:
            self.image[va : va + len(data)] = np.frombuffer(data, np.uint8)
        for offset, info, addend in self.code.relocations:
            if info & 0xFFFFFFFF == 13:  # R_AMDGPU_RELATIVE64
                self.image[offset : offset + 8] = np.frombuffer(
                    struct.pack("<Q", self.bias + addend), np.uint8
                )
        for va, _, msize, flags in self.code.segments:
            if msize:
                device.memory.register(
                    self.image[va : va + msize],
                    writable=bool(flags & 2),
                    label=f"code object segment {va:#x}",
                )
        self.listing = codeobject.Listing(self.code)
        self.kernels = {name: Kernel(self, info) for name, info in self.code.kernels.items()}

    def address_of(self, symbol):
        """Device address of a global symbol."""
        return self.bias + self.code.symbols[symbol][0]


class Kernel:
    """A kernel that can be launched."""

    def __init__(self, module, info):
        self.module, self.info, self.name = module, info, info.name
        self._programs = {}
        self._rows = None

    def instructions(self):
        """The kernel's own instructions, without those of functions it calls."""
        return self.module.listing.function(self.info.entry)

    @contextlib.contextmanager
    def without(self, inst):
        """The kernel meanwhile with s_nop for that instruction of its own: a mutation."""
        name, ops, text = inst.name, inst.ops, inst.text
        programs, self._programs = self._programs, {}
        inst.name, inst.ops, inst.text = "s_nop", ["0"], f"s_nop 0 for {text}"
        try:
            yield
        finally:
            inst.name, inst.ops, inst.text = name, ops, text
            self._programs = programs

    def mnemonics(self):
        """Set of mnemonics the kernel uses."""
        return {i.name for i in self.instructions()}

    def _program(self, strict):
        if strict not in self._programs:
            p = Program(self.module, strict)
            if self._rows is None:
                insts = self.instructions()
                if any(i.name.startswith(("s_swappc", "s_setpc", "s_call")) for i in insts):
                    insts = self.module.listing.all()
                top = {"v": 3, "a": 0}
                for i in insts:
                    for text in i.ops:
                        try:
                            o = parse_operand(text)
                        except NotImplementedError:
                            continue
                        if o.kind in ("v", "a"):
                            top[o.kind] = max(top[o.kind], o.index + o.count)
                self._rows = top["v"], top["a"]
            scratch = (self.info.scratch_size + 3) // 4 * 4
            if self.info.metadata.get(".uses_dynamic_stack"):
                scratch += 16384
            p.ctx = Context(
                self.module.device.arch, self.module.device.memory, self._rows[0], scratch
            )
            self._programs[strict] = p
        return self._programs[strict]

    # ---------------------------------------------------------------- arguments
    def pack_args(self, args, grid, block, lds_dynamic):
        """The kernarg segment as bytes: explicit arguments, then hidden ones."""
        size = max(self.info.kernarg_size, 1)
        buf = bytearray(size)
        explicit = [a for a in self.info.args if not a.get(".value_kind", "").startswith("hidden_")]
        if isinstance(args, (bytes, bytearray, memoryview)):
            raw = bytes(args)
            if len(raw) > size:
                raise LaunchError(f"{len(raw)} argument bytes, kernel takes {size}")
            buf[: len(raw)] = raw
        else:
            args = list(args)
            if len(args) != len(explicit):
                raise LaunchError(
                    f"{len(args)} arguments, kernel {self.name} takes {len(explicit)}"
                )
            for value, spec in zip(args, explicit, strict=True):
                off, n = spec[".offset"], spec[".size"]
                buf[off : off + n] = _pack(value, n)
        threads = [g * b for g, b in zip(grid, block, strict=True)]
        for a in self.info.args:
            kind = a.get(".value_kind", "")
            if not kind.startswith("hidden_"):
                continue
            off, n = a[".offset"], a[".size"]
            value = 0
            for k, d in enumerate(_HIDDEN_DIMS):
                if kind == f"hidden_block_count_{d}":
                    value = grid[k]
                elif kind == f"hidden_group_size_{d}":
                    value = block[k]
            if kind == "hidden_grid_dims":
                value = 3 if threads[2] > 1 else 2 if threads[1] > 1 else 1
            elif kind == "hidden_dynamic_lds_size":
                value = lds_dynamic
            elif kind == "hidden_shared_base":
                value = 0x00010000
            elif kind == "hidden_private_base":
                value = 0x00020000
            buf[off : off + n] = int(value).to_bytes(n, "little")
        return bytes(buf)

    # ---------------------------------------------------------------- launch
    def launch(self, grid, block, args, lds_dynamic=0, **options):
        """Run the kernel over ``grid`` workgroups of ``block`` work-items; returns Stats."""
        dev = self.module.device
        opt = Options(dev.options, **options)
        grid, block = _triple(grid), _triple(block)
        n = block[0] * block[1] * block[2]
        if not 0 < n <= self.info.max_workgroup_size:
            raise LaunchError(
                f"workgroup of {n} work-items, "
                f"kernel {self.name} allows {self.info.max_workgroup_size}"
            )
        if self.info.required_size and list(block) != list(self.info.required_size):
            raise LaunchError(f"kernel requires workgroup size {self.info.required_size}")
        if self.info.descriptor.wave32:
            raise LaunchError("wave32 kernels are not supported")
        lds_size = self.info.lds_size + lds_dynamic
        limit = LDS_LIMIT.get(dev.arch, 65536)
        if lds_size > limit:
            raise LaunchError(f"{lds_size} bytes of LDS, {dev.arch} has {limit}")
        raw = np.frombuffer(self.pack_args(args, grid, block, lds_dynamic), np.uint8).copy()
        run = Launch(self, opt, grid, block, lds_size, raw)
        start = time.perf_counter()
        with np.errstate(all="ignore"):
            run.run()
        run.stats.seconds = time.perf_counter() - start
        return run.stats


def _triple(x):
    if isinstance(x, int):
        return (x, 1, 1)
    return tuple(int(v) for v in x) + (1,) * (3 - len(x))


def _pack(value, n):
    if isinstance(value, np.ndarray):
        return struct.pack("<Q", value.ctypes.data)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).ljust(n, b"\0")
    if isinstance(value, np.generic):
        return value.tobytes().ljust(n, b"\0")
    if isinstance(value, float):
        return struct.pack("<f" if n == 4 else "<d", value)
    return (int(value) & ((1 << 8 * n) - 1)).to_bytes(n, "little")


class Launch:
    """One kernel launch: creates the waves of each chunk and schedules them."""

    QUANTUM = 4000  # blocks a batch may run before others get a turn

    def __init__(self, kernel, opt, grid, block, lds_size, kernarg):
        self.kernel, self.opt, self.grid, self.block, self.kernarg = (
            kernel,
            opt,
            grid,
            block,
            kernarg,
        )
        self.lds_size, self._packet = lds_size, None
        self.device = kernel.module.device
        self.program = kernel._program(opt.strict_waits)
        self.stats = Stats()
        self.rng = random.Random(opt.seed) if opt.seed is not None else None
        items = block[0] * block[1] * block[2]
        self.waves_per_group = (items + 63) // 64
        self.granule = lds_module.granule_of(kernel.instructions())

    def run(self):
        """All chunks, in order or shuffled."""
        mem = self.device.memory
        gx, gy, gz = self.grid
        groups = [(x, y, z) for z in range(gz) for y in range(gy) for x in range(gx)]
        if self.rng:
            self.rng.shuffle(groups)
        per = (
            max(1, self.opt.batch_waves // self.waves_per_group)
            if self.opt.schedule == "lockstep"
            else 1
        )
        mem.register(self.kernarg, writable=False, label=f"kernel arguments of {self.kernel.name}")
        try:
            for k in range(0, len(groups), per):
                self.run_chunk(groups[k : k + per])
        finally:
            mem.unregister(self.kernarg)
            if self._packet is not None:
                mem.unregister(self._packet)
            self._drop_scratch()

    # ---------------------------------------------------------------- initial state
    def run_chunk(self, groups):
        """Create and run the waves of a few workgroups."""
        wpg, opt = self.waves_per_group, self.opt
        self.groups = groups
        nw = wpg * len(groups)
        self.wave_group = np.repeat(np.arange(len(groups)), wpg)
        self.lds = lds_module.Lds(
            self.lds_size,
            len(groups),
            self.wave_group,
            opt.lds_race and wpg > 1,
            self.granule,
            0xFF,
            opt.uninitialised,
        )
        self._make_scratch(nw)
        batch = self._initial_batch(nw)
        ready = [batch] if opt.schedule == "lockstep" else [batch.take([k]) for k in range(nw)]
        self.live = np.full(len(groups), wpg)
        self.parked = []
        self.schedule(ready)

    def _make_scratch(self, nw):
        ctx = self.program.ctx
        need = nw * ctx.scratch_bytes // 4 * 64
        if need and (ctx.scratch is None or ctx.scratch.size < need):
            self._drop_scratch()
            ctx.scratch = np.full(need, 0xFFFFFFFF, U32)
            self.device.memory.register(ctx.scratch, label="scratch")
        elif need:
            ctx.scratch[:] = 0xFFFFFFFF

    def _drop_scratch(self):
        ctx = self.program.ctx
        if ctx.scratch is not None:
            self.device.memory.unregister(ctx.scratch)
            ctx.scratch = None

    def _initial_batch(self, nw):
        info, ctx, arch = self.kernel.info, self.program.ctx, self.device.arch
        d = info.descriptor
        b = Batch(self, 0, range(nw))
        regs = np.full((ctx.vrows + self.kernel._rows[1], b.N), self.opt.poison, U32)
        b.attach(regs)
        b.bind(self.lds, self.opt.strict_waits)
        bx, by, bz = self.block
        items = bx * by * bz
        lane = np.arange(self.waves_per_group * 64)
        ids = [lane % bx, lane // bx % by, lane // (bx * by)]
        dims = d.workitem_id_dims + 1
        if arch == "gfx908":
            for k in range(dims):
                regs[k] = np.tile(ids[k], len(self.groups))
        else:
            packed = sum(ids[k] << (10 * k) for k in range(dims))
            regs[0] = np.tile(packed, len(self.groups)).astype(U32)
        active = np.tile(lane < items, len(self.groups))
        b.set_exec(LaneMask(nw, active) if not active.all() else LaneMask(nw, None, M64))
        b.pc, b.mode = info.entry, d.float_mode
        s = [0xDEAD0000 + k for k in range(128)]
        k = 0

        def put(value, n):
            nonlocal k
            for j in range(n):
                s[k + j] = value >> (32 * j) & M32
            k += n

        base = ctx.scratch.ctypes.data if ctx.scratch is not None else 0
        if d.private_segment_buffer:
            put(base | 1 << 63 | 0xFFFFFFFF << 64 | (0x00E00000 | 1 << 23 | 1 << 19) << 96, 4)
        if d.dispatch_ptr:
            put(self._dispatch_packet(), 2)
        if d.queue_ptr:
            put(0, 2)
        if d.kernarg_segment_ptr:
            put(self.kernarg.ctypes.data, 2)
        if d.dispatch_id:
            put(0, 2)
        if d.flat_scratch_init:
            put(base, 2)
        if d.private_segment_size:
            put(ctx.scratch_bytes, 1)
        if d.preload_length:
            raw = self.kernarg.tobytes()[4 * d.preload_offset :].ljust(4 * d.preload_length, b"\0")
            put(int.from_bytes(raw[: 4 * d.preload_length], "little"), d.preload_length)
        k = d.user_sgpr_count
        for axis, on in enumerate((d.wgid_x, d.wgid_y, d.wgid_z)):
            if on:
                s[k] = collapse([g[axis] for g in self.groups for _ in range(self.waves_per_group)])
                k += 1
        if d.wg_info:
            s[k] = 0
            k += 1
        if d.enable_private_segment and arch in ("gfx90a", "gfx908"):
            s[k] = collapse([w * ctx.scratch_bytes * 64 for w in range(nw)])
        for r in (106, 107, 102, 103, 104, 105):
            s[r] = 0
        b.s = s
        return b

    def _dispatch_packet(self):
        """An hsa_kernel_dispatch_packet_t for kernels that read the dispatch pointer."""
        g, b = self.grid, self.block
        raw = struct.pack(
            "<HHHHHHIIIIIQQQQ",
            2,
            3,
            *b,
            0,
            *[x * y for x, y in zip(g, b, strict=True)],
            self.program.ctx.scratch_bytes,
            self.lds_size,
            0,
            self.kernarg.ctypes.data,
            0,
            0,
        )
        if self._packet is None:
            self._packet = np.frombuffer(raw, np.uint8).copy()
            self.device.memory.register(self._packet, writable=False, label="dispatch packet")
        return self._packet.ctypes.data

    # ---------------------------------------------------------------- scheduling
    def schedule(self, ready):
        """Run batches until every wave has ended."""
        lockstep = self.opt.schedule == "lockstep"
        if self.rng and not lockstep:
            self.rng.shuffle(ready)
        while ready or self.parked:
            if not ready:
                ready = self.release()
                if not ready:
                    raise DeadlockError(
                        "every remaining wave waits at a barrier that cannot complete"
                    )
                if self.rng and not lockstep:
                    self.rng.shuffle(ready)
            if lockstep:
                k = min(range(len(ready)), key=lambda i: (ready[i].turn, ready[i].pc))
            else:
                k = min(range(len(ready)), key=lambda i: ready[i].turn)
            st = ready.pop(k)
            out = self.run_batch(st, ready, lockstep)
            if out is None and self.parked and any(r.turn for r in ready):
                ready += self.release()
            if out:
                ready += out
                if any(b.turn for b in out) and self.parked:
                    ready += self.release()

    def run_batch(self, st, others, lockstep):
        """Run until end, barrier, divergence or a scheduling point; returns batches to continue."""
        block_of, stats = self.program.block, self.stats
        horizon = min((o.pc for o in others), default=None) if lockstep else None
        quantum = self.QUANTUM
        k = 0
        block = None
        try:
            while True:
                block = block_of(st.pc)
                k = 0
                for op in block.ops:
                    op(st)
                    k += 1
                stats.wave_instructions += block.count * st.W
                stats.batch_instructions += block.count
                st.steps += block.count
                end = block.end
                kind = end[0]
                if kind == "cond":
                    c = end[1](st)
                    if not isinstance(c, np.ndarray):
                        st.pc = end[2] if c else end[3]
                    else:
                        c = c.astype(bool)
                        yes, no = np.flatnonzero(c), np.flatnonzero(~c)
                        if len(no) and len(yes):
                            stats.splits += 1
                            a, b = st.take(yes), st.take(no)
                            a.pc, b.pc = end[2], end[3]
                            return [a, b]
                        st.pc = end[2] if len(yes) else end[3]
                elif kind == "jump":
                    st.pc = end[1]
                elif kind == "barrier":
                    st.pc = end[1]
                    stats.barriers.add(st.pc - 4)  # the instruction before, of 4 bytes
                    if others or self.parked or not self._all_here(st):
                        self.parked.append(st)
                        return None
                    self._pass_barrier([st])
                elif kind == "end":
                    np.subtract.at(self.live, self.wave_group[st.wave_ids], 1)
                    return None
                elif kind == "trap":
                    raise ExecutionError(f"s_trap {end[1]} (abort or __builtin_trap)")
                else:
                    parts = self._indirect(st, end)
                    if len(parts) > 1:
                        return parts
                if st.steps > self.opt.max_instructions:
                    raise DeadlockError(
                        f"more than {self.opt.max_instructions} instructions in a wave"
                    )
                quantum -= 1
                if quantum <= 0:
                    quantum = self.QUANTUM
                    if others or self.parked:
                        st.turn += 1
                        return [st]
                if horizon is not None and st.pc >= horizon:
                    for i, o in enumerate(others):
                        if o.pc == st.pc and st.mergeable(o):
                            others.pop(i)
                            stats.merges += 1
                            first, second = (st, o) if st.wave_ids[0] < o.wave_ids[0] else (o, st)
                            st = first.merge(second)
                            st.turn = 0
                            break
                    horizon = min((o.pc for o in others), default=None)
                    if horizon is not None and st.pc > horizon:
                        return [st]
        except ExecutionError as e:
            self._explain(e, st, block, k)
            raise
        except NotImplementedError as e:
            raise NotImplementedError(f"{self.kernel.name}: {e}") from None

    def _indirect(self, st, end):
        bias = self.kernel.module.bias
        if end[0] == "call":
            end[1](st, end[2])
            st.pc = end[3]
            return [st]
        target = end[1](st)
        if end[0] == "swappc":
            end[2](st, end[3])
        if isinstance(target, int):
            st.pc = target - bias
            return [st]
        parts = []
        for t in np.unique(target):
            b = st.take(np.flatnonzero(target == t))
            b.pc = int(t) - bias
            parts.append(b)
        self.stats.splits += 1
        return parts

    # ---------------------------------------------------------------- barriers
    def _all_here(self, st):
        counts = np.bincount(self.wave_group[st.wave_ids], minlength=len(self.live))
        present = counts > 0
        return bool((counts[present] == self.live[present]).all())

    def _pass_barrier(self, batches):
        groups = np.unique(np.concatenate([self.wave_group[b.wave_ids] for b in batches]))
        self.lds.epoch[groups] += 1
        if self.opt.strict_waits and self.lds.race:
            for b in batches:
                waits.remark(b)

    def release(self):
        """Batches of workgroups whose live waves have all arrived at the barrier."""
        if not self.parked:
            return []
        waiting = np.zeros(len(self.live), np.int64)
        for b in self.parked:
            np.add.at(waiting, self.wave_group[b.wave_ids], 1)
        done = (waiting == self.live) & (waiting > 0)
        if not done.any():
            return []
        go, stay = [], []
        for b in self.parked:
            ok = done[self.wave_group[b.wave_ids]]
            if ok.all():
                go.append(b)
            elif not ok.any():
                stay.append(b)
            else:
                go.append(b.take(np.flatnonzero(ok)))
                stay.append(b.take(np.flatnonzero(~ok)))
        self.parked = stay
        self._pass_barrier(go)
        if self.opt.schedule != "lockstep":
            go.sort(key=lambda b: int(b.wave_ids[0]))
            return go
        merged = []
        for b in go:
            b.turn = 0
            for i, m in enumerate(merged):
                if m.pc == b.pc and m.mergeable(b):
                    merged[i] = m.merge(b)
                    self.stats.merges += 1
                    break
            else:
                merged.append(b)
        return merged

    # ---------------------------------------------------------------- diagnostics
    def _explain(self, err, st, block, k):
        if err.context:
            return
        where = ""
        if block is not None:
            inst = block.insts[min(k, len(block.insts) - 1)]
            where = f"'{inst.text}' at {inst.addr:#x}"
        lane = getattr(err, "lane", None)
        waves = st.wave_ids if lane is None else st.wave_ids[lane >> 6 : (lane >> 6) + 1]
        slot = int(waves[0])
        group = self.groups[int(self.wave_group[slot])]
        err.context = (
            f"kernel {self.kernel.name}, instruction {where}, workgroup {group}, "
            f"wave {slot % self.waves_per_group}"
            + (f", lane {lane & 63}" if lane is not None else "")
        )
