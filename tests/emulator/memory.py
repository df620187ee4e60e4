"""Global memory: registered ranges of addresses, each with its bytes.

Usually a device pointer is the address of a registered NumPy array (or of the loaded code object,
kernel arguments, scratch); a Region may also give its bytes another address. Every lane address is
checked; one byte outside raises AccessError.
"""

import contextlib

import numpy as np

from .errors import AccessError, UninitialisedError

ALL_WRITTEN = np.uint32(0x01010101)  # four bool flags
_VIEW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Region:
    """An accessible range: its device address, its bytes, and which of them have a value.

    ``written`` (bool, one a byte) makes reads of bytes without a value an error; None: all have.
    """

    __slots__ = ("base", "bytes", "end", "label", "views", "writable", "written", "written_words")

    def __init__(self, base, data, writable=True, label="", written=None):
        self.base, self.bytes, self.end = base, data, base + data.size
        self.writable, self.label, self.written = writable, label, written
        self.views = {1: data}
        for size, kind in _VIEW.items():
            if size > 1 and base % size == 0:
                self.views[size] = data[: data.size // size * size].view(kind)
        words = data.size // 4 * 4
        self.written_words = None if written is None else written[:words].view(np.uint32)


class GlobalMemory:
    """The set of registered regions, with lane gather/scatter."""

    def __init__(self):
        self.regions = []
        self._last = None

    # ---------------------------------------------------------------- registration
    def register(self, array, writable=None, label=None, initialised=True):
        """Make ``array``'s bytes accessible; returns its device address."""
        if not array.flags.c_contiguous:
            raise ValueError("only C-contiguous arrays can be registered")
        base, size = array.ctypes.data, array.nbytes
        if writable is None:
            writable = array.flags.writeable
        if size == 0:
            return base
        data = array.reshape(-1).view(np.uint8)  # holds the array: its address is not given away
        written = None if initialised else np.zeros(size, bool)
        for r in self.regions:
            if r.base < base + size and base < r.end:
                if r.base == base and r.end == base + size:
                    self.regions.remove(r)
                    break
                raise ValueError(f"range overlaps registered {r.label}")
        self.regions.append(Region(base, data, writable, label or f"array@{base:#x}", written))
        self.regions.sort(key=lambda r: r.base)
        self._last = None
        return base

    def unregister(self, array):
        """Forget ``array`` (it must not be accessed afterwards)."""
        base = array.ctypes.data
        self.regions = [r for r in self.regions if r.base != base]
        self._last = None

    @contextlib.contextmanager
    def also(self, regions):
        """More regions for as long as the context lasts."""
        self.regions = sorted([*self.regions, *regions], key=lambda r: r.base)
        self._last = None
        try:
            yield
        finally:
            extra = {id(r) for r in regions}
            self.regions = [r for r in self.regions if id(r) not in extra]
            self._last = None

    # ---------------------------------------------------------------- lookup
    def find(self, lo, hi):
        """The region containing bytes [lo, hi), or None."""
        r = self._last
        if r is not None and r.base <= lo and hi <= r.end:
            return r
        for r in self.regions:
            if r.base <= lo and hi <= r.end:
                self._last = r
                return r
        return None

    def _fail(self, addr, size, lanes, what):
        a = np.asarray(addr).tolist()
        for k, x in enumerate(a):
            r = self.find(x, x + size)
            if r is None or (what == "write" and not r.writable):
                lane = int(lanes[k]) if lanes is not None else None
                where = (
                    f"lane {lane & 63} (wave slot {lane >> 6})" if lane is not None else "scalar"
                )
                err = AccessError(
                    f"{what} of {size} bytes at {x:#x}, {where}: {self.describe(x, size, what)}"
                )
                err.lane = lane
                err.address = x
                raise err
        raise AssertionError("no failing lane")

    def describe(self, x, size, what):
        """Say in words how address ``x`` relates to the registered ranges."""
        r = self.find(x, x + size)
        if r is not None:
            return f"{r.label} is read-only"
        below = [r for r in self.regions if r.base <= x]
        if below and x < below[-1].end + (1 << 20):
            r = below[-1]
            return (
                f"{x + size - r.end} bytes past the end of {r.label} "
                f"({r.end - r.base} bytes, offset {x - r.base})"
            )
        above = [r for r in self.regions if r.base > x]
        if above and above[0].base - x < (1 << 20):
            return f"{above[0].base - x} bytes before the start of {above[0].label}"
        return "no registered range near"

    # ---------------------------------------------------------------- vector access
    def _split(self, addr, size, lanes, what):
        """Yield (region, selector) covering all lane addresses; raises when one fits nowhere."""
        lo, hi = int(addr.min()), int(addr.max()) + size
        r = self.find(lo, hi)
        if r is not None and (what == "read" or r.writable):
            yield r, None
            return
        bases = np.array([r.base for r in self.regions], np.uint64)
        ends = np.array([r.end for r in self.regions], np.uint64)
        if not len(bases):
            self._fail(addr, size, lanes, what)
        k = np.searchsorted(bases, addr, side="right") - 1
        bad = (
            (k < 0)
            | (addr + np.uint64(size) > ends[np.maximum(k, 0)])
            | (addr + np.uint64(size) < addr)
        )
        if bad.any():
            self._fail(addr, size, lanes, what)
        for i in np.unique(k):
            r = self.regions[i]
            if what == "write" and not r.writable:
                self._fail(addr, size, lanes, what)
            yield r, k == i

    def gather(self, addr, words, lanes=None):
        """Read ``words`` dwords per lane: uint64 addresses -> uint32[words, n]."""
        out = np.empty((words, addr.size), np.uint32)
        for r, sel in self._split(addr, 4 * words, lanes, "read"):
            a = addr if sel is None else addr[sel]
            off = (a - np.uint64(r.base)).view(np.int64)
            if r.written is not None:
                self._check_written(r, off, 4 * words, lanes, sel)
            dst = out if sel is None else np.empty((words, a.size), np.uint32)
            if 4 in r.views and not (off & 3).any():
                idx = off >> 2
                v = r.views[4]
                for w in range(words):
                    np.take(v, idx + w if w else idx, out=dst[w], mode="clip")
            else:
                b = r.bytes[off[:, None] + np.arange(4 * words)]
                dst[...] = np.ascontiguousarray(b).view(np.uint32).T
            if sel is not None:
                out[:, sel] = dst
        return out

    def scatter(self, addr, data, lanes=None):
        """Write uint32[words, n] ``data`` to the lane addresses."""
        words = data.shape[0]
        for r, sel in self._split(addr, 4 * words, lanes, "write"):
            a, d = (addr, data) if sel is None else (addr[sel], data[:, sel])
            off = (a - np.uint64(r.base)).view(np.int64)
            if 4 in r.views and not (off & 3).any():
                idx = off >> 2
                v = r.views[4]
                for w in range(words):
                    v[idx + w if w else idx] = d[w]
                if r.written is not None:
                    for w in range(words):
                        r.written_words[idx + w if w else idx] = ALL_WRITTEN
            else:
                at = off[:, None] + np.arange(4 * words)
                r.bytes[at] = np.ascontiguousarray(d.T).view(np.uint8)
                if r.written is not None:
                    r.written[at] = True

    def gather_small(self, addr, size, lanes=None):
        """Read 1 or 2 bytes per lane, zero-extended to uint32[n]."""
        out = np.empty(addr.size, np.uint32)
        for r, sel in self._split(addr, size, lanes, "read"):
            a = addr if sel is None else addr[sel]
            off = (a - np.uint64(r.base)).view(np.int64)
            if r.written is not None:
                self._check_written(r, off, size, lanes, sel)
            if size == 1:
                v = r.bytes[off].astype(np.uint32)
            else:
                v = r.bytes[off].astype(np.uint32) | (
                    r.bytes[off + 1].astype(np.uint32) << np.uint32(8)
                )
            if sel is None:
                out[:] = v
            else:
                out[sel] = v
        return out

    def scatter_small(self, addr, size, data, lanes=None):
        """Write the low 1 or 2 bytes of each lane's ``data``."""
        for r, sel in self._split(addr, size, lanes, "write"):
            a, d = (addr, data) if sel is None else (addr[sel], data[sel])
            off = (a - np.uint64(r.base)).view(np.int64)
            for i in range(size):
                r.bytes[off + i] = (d >> np.uint32(8 * i)).astype(np.uint8)
                if r.written is not None:
                    r.written[off + i] = True

    def _check_written(self, r, off, size, lanes, sel):
        if size % 4 == 0 and not (off & 3).any():
            words = r.written_words
            ok = words[off >> 2] == ALL_WRITTEN
            for k in range(1, size // 4):
                ok &= words[(off >> 2) + k] == ALL_WRITTEN
        else:
            ok = r.written[off[:, None] + np.arange(size)].all(axis=1)
        if ok.all():
            return
        k = int(np.argmin(ok))
        text = f"read of unwritten bytes of {r.label}, offset {int(off[k])}"
        if lanes is None:
            raise UninitialisedError(text)
        lane = int(lanes[k] if sel is None else lanes[sel][k])
        err = UninitialisedError(f"{text}, lane {lane & 63} (wave slot {lane >> 6})")
        err.lane = lane
        raise err

    # ---------------------------------------------------------------- scalar access
    def read_bytes(self, addr, size):
        """Read ``size`` bytes at one address (scalar loads)."""
        r = self.find(addr, addr + size)
        if r is None:
            self._fail([addr], size, None, "read")
        o = addr - r.base
        if r.written is not None and not r.written[o : o + size].all():
            raise UninitialisedError(f"scalar read of unwritten bytes of {r.label}, offset {o}")
        return r.bytes[o : o + size].tobytes()

    def write_bytes(self, addr, data):
        """Write bytes at one address (scalar atomics, host side helpers)."""
        r = self.find(addr, addr + len(data))
        if r is None or not r.writable:
            self._fail([addr], len(data), None, "write")
        o = addr - r.base
        r.bytes[o : o + len(data)] = np.frombuffer(data, np.uint8)
        if r.written is not None:
            r.written[o : o + len(data)] = True
