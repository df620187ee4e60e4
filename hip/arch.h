// Level 0: the target. Kernel attributes, thread and block ids, wave width, lane exchange,
// barriers, dependent launches, the few scalar builtins. One block per family; kernels ask for
// features by the names defined here and never for a vendor. Must not load or store memory.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if defined(__CUDACC__)
#    define MPAD_NVIDIA 1
#    define DEV __device__ __forceinline__
#    define MPAD_KERNEL(THREADS, BLOCKS)                                                           \
        extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#    define MPAD_ARGS const __grid_constant__
#    define UNROLL _Pragma("unroll")
#    define UNROLL_8 _Pragma("unroll 8")
#    define NO_UNROLL _Pragma("unroll 1")
constexpr int WAVE = 32;
constexpr u32 LANES_ALL = 0xffffffffu;
typedef u32 LaneMask;
typedef u32 Lds; // byte address in LDS

extern __shared__ __align__(1024) char mpad_lds[];
DEV Lds lds_base()
{
    return (u32)__cvta_generic_to_shared(mpad_lds);
}
DEV u32 thread_id()
{
    return threadIdx.x;
}
DEV u32 block_id()
{
    return blockIdx.x;
}
DEV u32 block_count()
{
    return gridDim.x;
}
DEV void block_barrier()
{
    __syncthreads();
}
// Orders LDS accesses of the lanes of one wave.
DEV void wave_barrier()
{
    __syncwarp();
}
DEV u32 block_threads()
{
    return blockDim.x;
}
DEV LaneMask lane_ballot(bool p)
{
    return __ballot_sync(LANES_ALL, p);
}
DEV int mask_count(LaneMask m)
{
    return __popc(m);
}
template <class T> DEV T lane_xor(T x, int d)
{
    return __shfl_xor_sync(LANES_ALL, x, d);
}
DEV int lane_up(int x, int d)
{
    return __shfl_up_sync(LANES_ALL, x, d);
}
DEV int lane_at(int x, int lane)
{
    return __shfl_sync(LANES_ALL, x, lane);
}
// The value of another lane, each lane's own choice.
template <class T> DEV T lane_from(T x, int lane)
{
    return __shfl_sync(LANES_ALL, x, lane);
}
// Kernel arguments sit in memory behind a small cache that starts empty, and a miss stalls the
// wave. Each wave touches another 64-byte line first, so that the misses overlap.
template <class Args> DEV void args_prefetch(const Args &a)
{
    u32 line = threadIdx.x / WAVE;
    if (line < (sizeof(Args) + 63) / 64) {
        u32 word = ((const u32 *)&a)[line * 16];
        asm volatile("" ::"r"(word));
    }
}
// The value of the wave's first lane, known to be the same in all.
DEV int wave_uniform(int x)
{
    return x;
}
DEV u64 wave_uniform64(u64 x)
{
    return x;
}
DEV float fast_exp2(float x)
{
    float r;
    asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
    return r;
}
DEV float fast_rcp(float x)
{
    float r;
    asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
    return r;
}
DEV float fused_mul_add(float a, float b, float c)
{
    return __fmaf_rn(a, b, c);
}
DEV float half_to_float(u16 v)
{
    float f;
    asm("cvt.f32.f16 %0,%1;" : "=f"(f) : "h"(v));
    return f;
}
DEV u16 float_to_half(float f)
{
    u16 v;
    asm("cvt.rn.f16.f32 %0,%1;" : "=h"(v) : "f"(f));
    return v;
}
DEV u16 float_to_bfloat(float f)
{
    u16 v;
    asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(v) : "f"(f));
    return v;
}
// The bytes of b above those of a, numbered from 0: four of them.
template <int I, int J, int K, int L> DEV u32 bytes_of(u32 a, u32 b)
{
    return __byte_perm(a, b, I | J << 4 | K << 8 | L << 12);
}
// The eight nibbles of a word, in two words as the next two functions take four of them.
DEV void nibbles_split(u32 w, u32 (&four)[2])
{
    four[0] = w;
    four[1] = w >> 16;
}
// Of a table of eight bytes the one that each nibble's low three bits number; their high bits, as
// those of bytes.
DEV u32 nibbles_look_up(u32 four, u32 table_lo, u32 table_hi)
{
    return __byte_perm(table_lo, table_hi, four & 0x7777u);
}
DEV u32 nibbles_high(u32 four)
{
    u32 v; // a number with its high bit set takes a byte's sign for all of its bits
    asm("prmt.b32 %0,%1,%1,%2;" : "=r"(v) : "r"(0x7f7f7f7fu), "r"(four));
    return ~(v << 1) & 0x80808080u;
}
// The float8 that the target converts, where it converts one: pair HALF of the
// bytes of v.
#    if __CUDA_ARCH__ >= 890
#        define MPAD_CONVERTED MPAD_GPU_VALUES_E4M3FN
template <int HALF> DEV u32 float8_pair_to_half(u32 v)
{
    u32 h;
    asm("cvt.rn.f16x2.e4m3x2 %0,%1;" : "=r"(h) : "h"((u16)(v >> 16 * HALF)));
    return h;
}
template <int HALF> DEV u32 float8_pair_to_bfloat(u32 v)
{
    u32 b;
    asm("{.reg .b16 l,h; .reg .f32 x,y;\n"
        "mov.b32 {l,h},%1;\n"
        "cvt.f32.f16 x,l; cvt.f32.f16 y,h;\n"
        "cvt.rn.bf16x2.f32 %0,y,x;}"
        : "=r"(b)
        : "r"(float8_pair_to_half<HALF>(v)));
    return b;
}
#    endif
// Two 16-bit numbers in a word: products that need no rounding, differences likewise.
DEV u32 bfloat_pair_mul(u32 a, u32 b)
{
    u32 v;
    asm("fma.rn.bf16x2 %0,%1,%2,%3;" : "=r"(v) : "r"(a), "r"(b), "r"(0x80008000u));
    return v;
}
DEV u32 bfloat_pair_sub(u32 a, u32 b)
{
    u32 v;
    asm("fma.rn.bf16x2 %0,%1,%2,%3;" : "=r"(v) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return v;
}
DEV u32 half_pair_mul(u32 a, u32 b)
{
    u32 v;
    asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}
DEV u32 half_pair_sub(u32 a, u32 b)
{
    u32 v;
    asm("sub.rn.f16x2 %0,%1,%2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}
// Dependent launch: `wait` returns when the kernels before this one have finished and their stores
// are visible; `release` lets the next kernel start its part before its own wait. No-ops before
// sm_90.
#    if __CUDA_ARCH__ >= 900
DEV void launch_wait()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
DEV void launch_release()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
#    else
DEV void launch_wait()
{
}
DEV void launch_release()
{
}
#    endif

#else // AMD
#    define MPAD_AMD 1
#    define DEV __attribute__((device, always_inline)) inline
#    define MPAD_ARGS const
#    define UNROLL _Pragma("unroll")
#    define UNROLL_8 _Pragma("unroll 8")
#    define NO_UNROLL _Pragma("clang loop unroll(disable)")
#    if defined(__GFX9__)
constexpr int WAVE = 64;
typedef u64 LaneMask;
#    else
constexpr int WAVE = 32;
typedef u32 LaneMask;
#    endif
// Waves per SIMD unit asked of the register allocator: 4 units share a block's waves on wave64, and
// a work-group processor's 4 on wave32.
#    define MPAD_KERNEL(THREADS, BLOCKS)                                                           \
        extern "C" __attribute__((global, amdgpu_flat_work_group_size(THREADS, THREADS),           \
                                  amdgpu_waves_per_eu((THREADS) * (BLOCKS) / (WAVE * 4)))) void
typedef __attribute__((address_space(3))) char *Lds;

extern __attribute__((shared)) __attribute__((aligned(1024))) char mpad_lds[];
DEV Lds lds_base()
{
    return (Lds)mpad_lds;
}
DEV u32 thread_id()
{
    return __builtin_amdgcn_workitem_id_x();
}
DEV u32 block_id()
{
    return __builtin_amdgcn_workgroup_id_x();
}
DEV u32 block_count()
{
    return __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x();
}
// The wave's LDS accesses are done. The fence alone lets loads whose values no path needs run past
// the barrier, and another wave's stores overtake them.
DEV void lds_wait()
{
#    if defined(__GFX9__)
    __builtin_amdgcn_s_waitcnt(0xc07f); // lgkmcnt(0), the other counters at their maximum
#    elif defined(__GFX11__)
    __builtin_amdgcn_s_waitcnt(0xfc07);
#    else
    asm volatile("s_wait_dscnt 0x0" ::: "memory");
#    endif
}
DEV void block_barrier()
{
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    lds_wait();
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
// Nothing is moved across by the compiler's scheduler.
DEV void schedule_barrier()
{
    __builtin_amdgcn_sched_barrier(0);
}
template <class Args> DEV void args_prefetch(const Args &)
{
}
DEV void wave_barrier()
{
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}
DEV u32 block_threads()
{
    return __builtin_amdgcn_workgroup_size_x();
}
#    if defined(__GFX9__)
DEV LaneMask lane_ballot(bool p)
{
    return __builtin_amdgcn_ballot_w64(p);
}
DEV int mask_count(LaneMask m)
{
    return __builtin_popcountll(m);
}
#    else
DEV LaneMask lane_ballot(bool p)
{
    return __builtin_amdgcn_ballot_w32(p);
}
DEV int mask_count(LaneMask m)
{
    return __builtin_popcount(m);
}
#    endif
template <class T> DEV T lane_xor(T x, int d)
{
    int lane = (int)(thread_id() % WAVE);
    return __builtin_bit_cast(
        T, __builtin_amdgcn_ds_bpermute((lane ^ d) * 4, __builtin_bit_cast(int, x)));
}
DEV int lane_up(int x, int d)
{
    int lane = (int)(thread_id() % WAVE);
    return __builtin_amdgcn_ds_bpermute((lane < d ? lane : lane - d) * 4, x);
}
DEV int lane_at(int x, int lane)
{
    return __builtin_amdgcn_readlane(x, lane);
}
template <class T> DEV T lane_from(T x, int lane)
{
    return __builtin_bit_cast(T,
                              __builtin_amdgcn_ds_bpermute(lane * 4, __builtin_bit_cast(int, x)));
}
DEV int wave_uniform(int x)
{
    return __builtin_amdgcn_readfirstlane(x);
}
DEV u64 wave_uniform64(u64 x)
{
    u32 lo = (u32)__builtin_amdgcn_readfirstlane((int)(u32)x);
    u32 hi = (u32)__builtin_amdgcn_readfirstlane((int)(u32)(x >> 32));
    return (u64)hi << 32 | lo;
}
DEV float fast_exp2(float x)
{
    return __builtin_amdgcn_exp2f(x);
}
DEV float fast_rcp(float x)
{
    return __builtin_amdgcn_rcpf(x);
}
DEV float fused_mul_add(float a, float b, float c)
{
    return __builtin_fmaf(a, b, c);
}
DEV float half_to_float(u16 v)
{
    return (float)__builtin_bit_cast(_Float16, v);
}
DEV u16 float_to_half(float f)
{
    return __builtin_bit_cast(u16, (_Float16)f);
}
DEV u16 float_to_bfloat(float f)
{
    u32 x = __builtin_bit_cast(u32, f);
    if ((x & 0x7fffffffu) > 0x7f800000u)
        return (u16)(x >> 16 | 0x40u);
    return (u16)((x + 0x7fffu + (x >> 16 & 1u)) >> 16);
}
template <int I, int J, int K, int L> DEV u32 bytes_of(u32 a, u32 b)
{
    return __builtin_amdgcn_perm(b, a, (u32)(I | J << 8 | K << 16 | L << 24));
}
DEV void nibbles_split(u32 w, u32 (&four)[2]) // to bytes
{
    u32 even = w & 0x0f0f0f0fu, odd = w >> 4 & 0x0f0f0f0fu;
    four[0] = bytes_of<0, 4, 1, 5>(even, odd);
    four[1] = bytes_of<2, 6, 3, 7>(even, odd);
}
DEV u32 nibbles_look_up(u32 four, u32 table_lo, u32 table_hi)
{
    return __builtin_amdgcn_perm(table_hi, table_lo, four & 0x07070707u);
}
DEV u32 nibbles_high(u32 four)
{
    return four << 4 & 0x80808080u;
}
DEV u32 bfloat_pair_of(float lo, float hi)
{
    return __builtin_bit_cast(u32, lo) >> 16 | (__builtin_bit_cast(u32, hi) & 0xffff0000u);
}
DEV float bfloat_pair_lo(u32 a)
{
    return __builtin_bit_cast(float, a << 16);
}
DEV float bfloat_pair_hi(u32 a)
{
    return __builtin_bit_cast(float, a & 0xffff0000u);
}
DEV u32 bfloat_pair_mul(u32 a, u32 b)
{
    return bfloat_pair_of(bfloat_pair_lo(a) * bfloat_pair_lo(b),
                          bfloat_pair_hi(a) * bfloat_pair_hi(b));
}
DEV u32 bfloat_pair_sub(u32 a, u32 b)
{
    return bfloat_pair_of(bfloat_pair_lo(a) - bfloat_pair_lo(b),
                          bfloat_pair_hi(a) - bfloat_pair_hi(b));
}
typedef _Float16 half_pair __attribute__((ext_vector_type(2)));
DEV u32 half_pair_mul(u32 a, u32 b)
{
    return __builtin_bit_cast(u32,
                              __builtin_bit_cast(half_pair, a) * __builtin_bit_cast(half_pair, b));
}
DEV u32 half_pair_sub(u32 a, u32 b)
{
    return __builtin_bit_cast(u32,
                              __builtin_bit_cast(half_pair, a) - __builtin_bit_cast(half_pair, b));
}
#    if defined(__gfx950__)
#        define MPAD_CONVERTED MPAD_GPU_VALUES_E4M3FN
template <int HALF> DEV u32 float8_pair_to_half(u32 v)
{
    return __builtin_bit_cast(u32, __builtin_amdgcn_cvt_scalef32_pk_f16_fp8(v, 1.f, HALF));
}
template <int HALF> DEV u32 float8_pair_to_bfloat(u32 v)
{
    return __builtin_bit_cast(u32, __builtin_amdgcn_cvt_scalef32_pk_bf16_fp8(v, 1.f, HALF));
}
#        define MPAD_CONVERTS_E2M1 1
template <int BYTE> DEV u32 e2m1_pair_to_half(u32 v)
{
    return __builtin_bit_cast(u32, __builtin_amdgcn_cvt_scalef32_pk_f16_fp4(v, 1.f, BYTE));
}
template <int BYTE> DEV u32 e2m1_pair_to_bfloat(u32 v)
{
    return __builtin_bit_cast(u32, __builtin_amdgcn_cvt_scalef32_pk_bf16_fp4(v, 1.f, BYTE));
}
#    elif defined(__gfx942__)
#        define MPAD_CONVERTED MPAD_GPU_VALUES_E4M3FNUZ
template <int HALF> DEV u32 float8_pair_to_half(u32 v)
{
    auto pair = __builtin_amdgcn_cvt_pk_f32_fp8((int)v, HALF);
    return __builtin_bit_cast(u32, __builtin_amdgcn_cvt_pkrtz(pair[0], pair[1]));
}
template <int HALF> DEV u32 float8_pair_to_bfloat(u32 v)
{
    auto pair = __builtin_amdgcn_cvt_pk_f32_fp8((int)v, HALF);
    return bfloat_pair_of(pair[0], pair[1]);
}
#    endif
DEV void launch_wait()
{
}
DEV void launch_release()
{
}
#endif

DEV u32 lane_id()
{
    return thread_id() % WAVE;
}
// Index of the thread's wave in its block, in a scalar register where there are any.
DEV int wave_id()
{
    return wave_uniform((int)(thread_id() / WAVE));
}
// Lanes of `m` before this one.
DEV int mask_rank(LaneMask m)
{
    return mask_count(m & (((LaneMask)1 << lane_id()) - 1));
}
