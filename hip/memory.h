// Level 2: global and LDS moves. A Buffer is the memory of one tensor or of one expert's part of
// it; no load reaches beyond its size. Offsets are in bytes, below 2 GiB; a load that is not `ok`
// gives zeros and touches nothing.
#pragma once
#include "types.h"

#if MPAD_NVIDIA

// Slabs of quantised weights whose loads stand side by side, where a lane loads 8 of them: whole
// sectors, 32 bytes of a row.
constexpr int STORED_FETCH = 2;
constexpr bool LOOP_PER_FORM = true; // of quantised weights: see form_select

struct Buffer {
    const char *base;
};
DEV Buffer buffer_make(const void *base, u32)
{
    return {(const char *)base};
}
// 16 bytes that are read once and that no kernel in flight writes (weights).
DEV u4 load16_stream(const Buffer &b, u32 at, bool ok)
{
    u4 v;
    asm volatile("{.reg .pred p;\n"
                 "setp.ne.u32 p,%5,0;\n"
                 "mov.b32 %0,0; mov.b32 %1,0; mov.b32 %2,0; mov.b32 %3,0;\n"
                 "@p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];}"
                 : "=&r"(v[0]), "=&r"(v[1]), "=&r"(v[2]), "=&r"(v[3])
                 : "l"(b.base + at), "r"((u32)ok));
    return v;
}
// 8 and 4 bytes of the same kind; the line's other bytes are read next.
DEV Stored<Bytes> load8_stream(const Buffer &b, u32 at, bool ok)
{
    Stored<Bytes> v;
    asm volatile("{.reg .pred p;\n"
                 "setp.ne.u32 p,%3,0;\n"
                 "mov.b32 %0,0; mov.b32 %1,0;\n"
                 "@p ld.global.nc.v2.u32 {%0,%1},[%2];}"
                 : "=&r"(v.x[0]), "=&r"(v.x[1])
                 : "l"(b.base + at), "r"((u32)ok));
    return v;
}
DEV Stored<Nibbles> load4_stream(const Buffer &b, u32 at, bool ok)
{
    Stored<Nibbles> v;
    asm volatile("{.reg .pred p;\n"
                 "setp.ne.u32 p,%2,0;\n"
                 "mov.b32 %0,0;\n"
                 "@p ld.global.nc.u32 %0,[%1];}"
                 : "=&r"(v.x[0])
                 : "l"(b.base + at), "r"((u32)ok));
    return v;
}
// 16 bytes that an earlier kernel wrote.
DEV u4 load16(const Buffer &b, u32 at, bool ok)
{
    u4 v;
    asm volatile("{.reg .pred p;\n"
                 "setp.ne.u32 p,%5,0;\n"
                 "mov.b32 %0,0; mov.b32 %1,0; mov.b32 %2,0; mov.b32 %3,0;\n"
                 "@p ld.global.v4.u32 {%0,%1,%2,%3},[%4];}"
                 : "=&r"(v[0]), "=&r"(v[1]), "=&r"(v[2]), "=&r"(v[3])
                 : "l"(b.base + at), "r"((u32)ok)
                 : "memory");
    return v;
}
DEV u32 load2(const Buffer &b, u32 at, bool ok)
{
    return ok ? *(const u16 *)(b.base + at) : 0u;
}
DEV u32 load1(const Buffer &b, u32 at, bool ok)
{
    return ok ? *(const u8 *)(b.base + at) : 0u;
}
template <class V> DEV V lds_read(Lds p)
{
    return *(const V *)__cvta_shared_to_generic(p);
}
template <class V> DEV void lds_write(Lds p, V v)
{
    *(V *)__cvta_shared_to_generic(p) = v;
}
// 16 bytes from global memory to LDS; there after stage_wait and a block_barrier. What is not `ok`
// becomes zeros, wherever `from` is.
DEV void stage16(Lds to, const char *from, bool ok)
{
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(ok ? 16 : 0)
                 : "memory");
}
DEV void stage16(Lds to, const Buffer &b, u32 at, bool ok)
{
    stage16(to, b.base + (ok ? at : 0), ok);
}
// The same in four parts, which go to different places.
DEV void stage_words(const Lds (&to)[4], const char *from, bool ok)
{
    asm volatile("cp.async.ca.shared.global [%0],[%4],4,%5;\n"
                 "cp.async.ca.shared.global [%1],[%4+4],4,%5;\n"
                 "cp.async.ca.shared.global [%2],[%4+8],4,%5;\n"
                 "cp.async.ca.shared.global [%3],[%4+12],4,%5;" ::"r"(to[0]),
                 "r"(to[1]), "r"(to[2]), "r"(to[3]), "l"(from), "r"(ok ? 4 : 0)
                 : "memory");
}
DEV void stage_wait()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}
// Groups of stage16: a commit closes one; the wait leaves the N youngest on the way.
DEV void stage_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> DEV void stage_wait_all_but()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Adds and returns what was there. Integers only: the sum does not depend on the order.
DEV int lds_add(Lds p, int n)
{
    int old;
    asm volatile("atom.shared.add.u32 %0,[%1],%2;" : "=r"(old) : "r"(p), "r"(n) : "memory");
    return old;
}

#else // AMD

constexpr int STORED_FETCH = 1;       // registers are scarcer than cached lines
constexpr bool LOOP_PER_FORM = false; // and scalar branches cheap

struct Buffer {
    __amdgpu_buffer_rsrc_t r;
};
// NOTE: the resource must be in scalar registers for the compiler too, or it loops over the lanes
// around every load ("waterfall").
DEV Buffer buffer_make(const void *base, u32 n_bytes)
{
#    if defined(__GFX9__)
    constexpr int FORMAT = 0x00027000; // 32-bit data, raw
#    elif defined(__GFX11__)
    constexpr int FORMAT = 0x31014000;
#    else
    constexpr int FORMAT = 0x31014000;
#    endif
    Buffer b;
    b.r = __builtin_amdgcn_make_buffer_rsrc((void *)wave_uniform64((u64)base), 0,
                                            wave_uniform((int)n_bytes), FORMAT);
    return b;
}
constexpr u32 OUTSIDE = 0x80000000u; // beyond every buffer, with any soffset below 2 GiB added
constexpr int STREAM = 2;            // cache policy: read once
DEV u4 load16_stream(const Buffer &b, u32 at, bool ok)
{
    return __builtin_amdgcn_raw_buffer_load_b128(b.r, (int)(ok ? at : OUTSIDE), 0, STREAM);
}
// 8 and 4 bytes of the same kind; the line's other bytes are read next, so that it is kept.
DEV Stored<Bytes> load8_stream(const Buffer &b, u32 at, bool ok)
{
    return __builtin_bit_cast(
        Stored<Bytes>, __builtin_amdgcn_raw_buffer_load_b64(b.r, (int)(ok ? at : OUTSIDE), 0, 0));
}
DEV Stored<Nibbles> load4_stream(const Buffer &b, u32 at, bool ok)
{
    return {__builtin_amdgcn_raw_buffer_load_b32(b.r, (int)(ok ? at : OUTSIDE), 0, 0)};
}
DEV u4 load16(const Buffer &b, u32 at, bool ok)
{
    return __builtin_amdgcn_raw_buffer_load_b128(b.r, (int)(ok ? at : OUTSIDE), 0, 0);
}
DEV u32 load2(const Buffer &b, u32 at, bool ok)
{
    return __builtin_amdgcn_raw_buffer_load_b16(b.r, (int)(ok ? at : OUTSIDE), 0, 0);
}
DEV u32 load1(const Buffer &b, u32 at, bool ok)
{
    return __builtin_amdgcn_raw_buffer_load_b8(b.r, (int)(ok ? at : OUTSIDE), 0, 0);
}
template <class V> DEV V lds_read(Lds p)
{
    return *(const __attribute__((address_space(3))) V *)p;
}
template <class V> DEV void lds_write(Lds p, V v)
{
    *(__attribute__((address_space(3))) V *)p = v;
}
DEV void stage16(Lds to, const Buffer &b, u32 at, bool ok)
{
    lds_write<u4>(to, load16(b, at, ok));
}
DEV void stage_wait()
{
}
DEV int lds_add(Lds p, int n)
{
    return (int)__hip_atomic_fetch_add((__attribute__((address_space(3))) u32 *)p, (u32)n,
                                       __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}

#endif

// A lane's walk along one row, of slabs or of chunks; elements from `left` on, counted from the
// lane's first, are not read and give zeros.
struct Run {
    Buffer b;
    u32 at;
    int left;
};

DEV Run run_make(const Buffer &b, u32 at, int left)
{
#if MPAD_NVIDIA
    return {{b.base + at}, 0, left}; // one 64-bit address, so that s becomes the load's immediate
#else
    return {b, at, left};
#endif
}
template <class W> DEV void run_advance(Run &r, int n) // by n slabs
{
#if MPAD_NVIDIA
    r.b.base += n * 4 * W::BITS;
#else
    r.at += (u32)n * 4 * W::BITS;
#endif
    r.left -= n * 32;
}
// VECTOR: rows start on the bytes of a chunk and `left` is a multiple of 8: one load; else one load
// an element. ONCE: read once and by no kernel in flight written.
template <bool VECTOR, bool ONCE> DEV u4 run_chunk(const Run &r, int n)
{
    int left = r.left - n * 8;
    u32 at = r.at + (u32)n * 16;
    if constexpr (VECTOR) {
        return ONCE ? load16_stream(r.b, at, left > 0) : load16(r.b, at, left > 0);
    } else {
        u4 c;
        UNROLL for (int i = 0; i < 4; i++)
        {
            u32 lo = load2(r.b, at + 4 * i, left > 2 * i);
            u32 hi = load2(r.b, at + 4 * i + 2, left > 2 * i + 1);
            c[i] = lo | hi << 16;
        }
        return c;
    }
}
// The chunk of weights of slab s. Where a row ends in the middle of a byte, its other half is a
// finite number that meets a zero.
template <class W, bool VECTOR> DEV Stored<W> run_stored(const Run &r, int s)
{
    int left = r.left - s * 32;
    u32 at = r.at + (u32)(s * 4 * W::BITS);
    Stored<W> v;
    if constexpr (W::BITS == 16)
        v = __builtin_bit_cast(Stored<W>, run_chunk<VECTOR, true>(r, 4 * s));
    else if constexpr (!VECTOR) {
        UNROLL for (int i = 0; i < W::BITS / 4; i++)
        {
            v.x[i] = 0;
            UNROLL for (int j = 0; j < 4; j++) v.x[i] |=
                load1(r.b, at + 4 * i + j, left > (4 * i + j) * 8 / W::BITS) << 8 * j;
        }
    } else if constexpr (W::BITS == 8)
        v = load8_stream(r.b, at, left > 0);
    else
        v = load4_stream(r.b, at, left > 0);
    return v;
}

// One element of a tensor whose type is known at run time only.
DEV float load_float(const void *p, i64 i, int type)
{
    if (type == MPAD_GPU_F32)
        return ((const float *)p)[i];
    u16 v = ((const u16 *)p)[i];
    return type == MPAD_GPU_BF16 ? Bf16::to_float(v) : F16::to_float(v);
}
DEV i64 load_integer(const void *p, i64 i, int type)
{
    return type == MPAD_GPU_I32 ? (i64)((const int *)p)[i] : ((const i64 *)p)[i];
}
