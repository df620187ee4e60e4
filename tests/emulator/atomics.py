"""Read-modify-write operations shared by LDS, global, buffer and flat atomics.

Lanes that hit the same address are applied in ascending lane (and wave) order,
one conflict-free round at a time, so results and returned values are exact and
deterministic.  (Hardware promises no order; kernels must not depend on it.)
"""

import numpy as np

U32, U64, F32, F64, I32, I64 = np.uint32, np.uint64, np.float32, np.float64, np.int32, np.int64


def _inc(old, data):
    return np.where(old >= data, old.dtype.type(0), old + old.dtype.type(1))


def _dec(old, data):
    return np.where((old == 0) | (old > data), data, old - old.dtype.type(1))


def _pk_f16(old, data):
    a = np.ascontiguousarray(old).view(np.float16)
    b = np.ascontiguousarray(data).view(np.float16)
    return (a + b).view(U32)


def _pk_bf16(old, data):
    from .formats import bf16_encode

    lo = (old << U32(16)).view(F32) + (data << U32(16)).view(F32)
    hi = (old & U32(0xFFFF0000)).view(F32) + (data & U32(0xFFFF0000)).view(F32)
    return bf16_encode(lo) | bf16_encode(hi) << U32(16)


# name -> (function(old, data), type); compare-and-swap is handled by the caller
OPS = {
    "swap": (lambda o, d: d, "u"),
    "add": (lambda o, d: o + d, "u"),
    "sub": (lambda o, d: o - d, "u"),
    "rsub": (lambda o, d: d - o, "u"),
    "smin": (np.minimum, "i"),
    "umin": (np.minimum, "u"),
    "smax": (np.maximum, "i"),
    "umax": (np.maximum, "u"),
    "and": (lambda o, d: o & d, "u"),
    "or": (lambda o, d: o | d, "u"),
    "xor": (lambda o, d: o ^ d, "u"),
    "inc": (_inc, "u"),
    "dec": (_dec, "u"),
    "fadd": (lambda o, d: o + d, "f"),
    "fmin": (np.fmin, "f"),
    "fmax": (np.fmax, "f"),
    "pk_add_f16": (_pk_f16, "u"),
    "pk_add_bf16": (_pk_bf16, "u"),
}
_VIEW = {("u", 4): U32, ("i", 4): I32, ("f", 4): F32, ("u", 8): U64, ("i", 8): I64, ("f", 8): F64}


def ranks(idx):
    """For each element, how many earlier elements have the same index; None when all differ."""
    order = np.argsort(idx, kind="stable")
    s = idx[order]
    same = s[1:] == s[:-1]
    if not same.any():
        return None
    start = np.concatenate([[0], np.flatnonzero(~same) + 1])
    run = np.repeat(start, np.diff(np.concatenate([start, [len(s)]])))
    out = np.empty(len(idx), np.int64)
    out[order] = np.arange(len(idx)) - run
    return out


def apply(mem, idx, name, data, compare=None):
    """Apply the atomic ``name`` to ``mem[idx]`` (uint32 or uint64 view); returns old values."""
    size = mem.dtype.itemsize
    if compare is None:
        f, kind = OPS[name]
        view = _VIEW[kind, size]
    old = np.empty(len(idx), mem.dtype)
    rank = ranks(idx)
    rounds = (
        [slice(None)]
        if rank is None
        else [np.flatnonzero(rank == k) for k in range(int(rank.max()) + 1)]
    )
    with np.errstate(all="ignore"):
        for sel in rounds:
            i = idx[sel]
            o = mem[i]
            old[sel] = o
            if compare is not None:
                mem[i] = np.where(o == compare[sel], data[sel], o)
            else:
                mem[i] = np.asarray(f(o.view(view), data[sel].view(view))).view(mem.dtype)
    return old
