// Level 2: matrix instructions and their lane maps. The one primitive is the slab:
//
//     acc[token][row] += sum over 32 k of tokens[token][k] * weights[row][k]
//
// for 16 weight rows and TOKENS tokens, both operands row-major with 64 bytes (4 chunks of 16) of
// k. A fragment is a few 16-byte chunks per lane, straight from memory: chunk(i, lane) of row(i,
// lane). The instruction's own k order is never restored, since both operands permute k alike. The
// maps are plain constexpr functions; tests/test_mma_maps.py compiles them for the host and checks
// them against the published layouts.
#pragma once

#if defined(MPAD_MAP_NVIDIA) || defined(__CUDACC__)
#    define MPAD_MAP 0
#elif defined(MPAD_MAP_CDNA) || defined(__GFX9__)
#    define MPAD_MAP 1
#elif defined(MPAD_MAP_GFX12) || defined(__GFX12__)
#    define MPAD_MAP 2
#elif defined(MPAD_MAP_GFX11) || defined(__GFX11__)
#    define MPAD_MAP 3
#endif

#if defined(MPAD_MAP_HOST)
#    define MAP constexpr inline
#elif defined(__CUDACC__)
#    define MAP __device__ __forceinline__ constexpr
#else
#    define MAP __attribute__((device)) constexpr inline
#endif

// TOKENS: smallest number of tokens a slab takes. WEIGHT_CHUNKS, TOKEN_CHUNKS: 16-byte chunks per
// lane of the two fragments (the latter for TOKENS tokens). ACC: accumulators per lane. LDS_PITCH:
// what is added to a multiple of 128 bytes as the row pitch of tokens in LDS, so that a wave's
// fragment read meets each bank equally often.
#if MPAD_MAP == 0 // mma.m16n8k16: weights are A, 8 tokens are B, or two times 8
constexpr int TOKENS = 8, WEIGHT_CHUNKS = 2, TOKEN_CHUNKS = 1, ACC = 8, LDS_PITCH = 64;
MAP int weight_row(int i, int lane)
{
    return 8 * i + (lane >> 2);
}
MAP int weight_chunk(int, int lane)
{
    return lane & 3;
}
MAP int token_row(int i, int lane)
{
    return 8 * i + (lane >> 2);
}
MAP int token_chunk(int, int lane)
{
    return lane & 3;
}
MAP int acc_row(int a, int lane)
{
    return (lane >> 2) + 8 * (a >> 1 & 1);
}
MAP int acc_token(int a, int lane)
{
    return 8 * (a >> 2) + 2 * (lane & 3) + (a & 1);
}
MAP bool acc_used(int a) // by a slab: its tokens are below TOKENS
{
    return a < 4;
}
#elif MPAD_MAP == 1 // mfma 16x16x16, 16x16x32: weights are A, tokens are B
constexpr int TOKENS = 16, WEIGHT_CHUNKS = 1, TOKEN_CHUNKS = 1, ACC = 4, LDS_PITCH = 16;
MAP int weight_row(int, int lane)
{
    return lane & 15;
}
MAP int weight_chunk(int, int lane)
{
    return lane >> 4;
}
MAP int token_row(int, int lane)
{
    return lane & 15;
}
MAP int token_chunk(int, int lane)
{
    return lane >> 4;
}
MAP int acc_row(int a, int lane)
{
    return 4 * (lane >> 4) + a;
}
MAP int acc_token(int, int lane)
{
    return lane & 15;
}
MAP bool acc_used(int)
{
    return true;
}
#elif MPAD_MAP == 2 // gfx12 wmma 16x16x16: weights are A, tokens are B
constexpr int TOKENS = 16, WEIGHT_CHUNKS = 2, TOKEN_CHUNKS = 2, ACC = 8, LDS_PITCH = 16;
MAP int weight_row(int, int lane)
{
    return lane & 15;
}
MAP int weight_chunk(int i, int lane)
{
    return 2 * i + (lane >> 4);
}
MAP int token_row(int, int lane)
{
    return lane & 15;
}
MAP int token_chunk(int i, int lane)
{
    return 2 * i + (lane >> 4);
}
MAP int acc_row(int a, int lane)
{
    return 8 * (lane >> 4) + a;
}
MAP int acc_token(int, int lane)
{
    return lane & 15;
}
MAP bool acc_used(int)
{
    return true;
}
#else               // gfx11 wmma 16x16x16: both halves of the wave hold the same operands
constexpr int TOKENS = 16, WEIGHT_CHUNKS = 4, TOKEN_CHUNKS = 4, ACC = 8, LDS_PITCH = 16;
MAP int weight_row(int, int lane)
{
    return lane & 15;
}
MAP int weight_chunk(int i, int)
{
    return i;
}
MAP int token_row(int, int lane)
{
    return lane & 15;
}
MAP int token_chunk(int i, int)
{
    return i;
}
MAP int acc_row(int a, int lane)
{
    return 2 * a + (lane >> 4);
}
MAP int acc_token(int, int lane)
{
    return lane & 15;
}
MAP bool acc_used(int)
{
    return true;
}
#endif

#if !defined(MPAD_MAP_HOST)
#    include "types.h"

struct WeightFrag {
    u4 c[WEIGHT_CHUNKS];
};
struct TokenFrag {
    u4 c[TOKEN_CHUNKS];
};
struct Acc {
    float v[ACC];
};

DEV Acc acc_zero()
{
    Acc a;
    UNROLL for (int i = 0; i < ACC; i++) a.v[i] = 0.f;
    return a;
}

#    if MPAD_MAP == 0

template <class T> DEV void mma_16816(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
template <> DEV void mma_16816<Bf16>(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},"
        "{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <> DEV void mma_16816<F16>(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},"
        "{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <class T> DEV void slab(Acc &a, const TokenFrag &x, const WeightFrag &w)
{
    UNROLL for (int h = 0; h < 2; h++)
        mma_16816<T>(a.v, w.c[0][2 * h], w.c[1][2 * h], w.c[0][2 * h + 1], w.c[1][2 * h + 1],
                     x.c[0][2 * h], x.c[0][2 * h + 1]);
}

// Fragments of a tile in LDS: rows of 128 bytes, 16-byte chunk c of row r at chunk c ^ (r & 7). A
// step is the k of one fragment.
constexpr int TILE_STEPS = 4; // in 128 bytes: 16 k each
struct TileFrag {
    u32 r[4];
};
DEV TileFrag tile_read(Lds at)
{
    TileFrag f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                 : "r"(at)
                 : "memory");
    return f;
}
DEV TileFrag tile_weights(Lds tile, int row0, int step, int lane)
{
    int r = row0 + (lane & 15), c = 2 * step + (lane >> 4);
    return tile_read(tile + (r * 8 + (c ^ (r & 7))) * 16);
}
DEV TileFrag tile_tokens(Lds tile, int row0, int step, int lane)
{
    int r = row0 + (lane & 7) + (lane >> 4 << 3), c = 2 * step + (lane >> 3 & 1);
    return tile_read(tile + (r * 8 + (c ^ (r & 7))) * 16);
}
template <class T> DEV void tile_step(Acc &a, const TileFrag &x, const TileFrag &w)
{
    UNROLL for (int n = 0; n < 2; n++)
        mma_16816<T>(a.v + 4 * n, w.r[0], w.r[1], w.r[2], w.r[3], x.r[2 * n], x.r[2 * n + 1]);
}

#        if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// The warpgroup form (sm_90a): 64 tokens times 128 weight rows times 16 k, both operands tiles in
// LDS as above. The 4 waves of a warpgroup hold 16 tokens each; accumulator e of a lane is token
// (lane / 4) + 8 * (e / 2 % 2), row 8 * (e / 4) + 2 * (lane % 4) + e % 2.
#            define MPAD_HAVE_WGMMA 1
// Descriptor of a tile whose first row starts on 1024 bytes: 128-byte swizzle, 8 rows every 1024
// bytes.
DEV u64 wgmma_tile(Lds at)
{
    return (u64)((at & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}
DEV void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEV void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
DEV void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// What this thread wrote to LDS is seen by wgmma after the next barrier.
DEV void wgmma_publish()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The sums of a wave as operands, floats ("f") or integers ("r").
#            define MPAD_ACC8(AS, A)                                                               \
                "+" AS(A.v[0]), "+" AS(A.v[1]), "+" AS(A.v[2]), "+" AS(A.v[3]), "+" AS(A.v[4]),    \
                    "+" AS(A.v[5]), "+" AS(A.v[6]), "+" AS(A.v[7])
#            define MPAD_WGMMA(SHAPE, MODIFIERS, AS)                                               \
                asm volatile("{.reg .pred p;\n"                                                    \
                             "setp.ne.u32 p,%66,0;\n"                                              \
                             "wgmma.mma_async.sync.aligned.m64n128" SHAPE " {"                     \
                             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"              \
                             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"    \
                             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"    \
                             "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"   \
                             "%64,%65,p" MODIFIERS ";}"                                            \
                             : MPAD_ACC8(AS, c[0][0]), MPAD_ACC8(AS, c[0][1]),                     \
                               MPAD_ACC8(AS, c[1][0]), MPAD_ACC8(AS, c[1][1]),                     \
                               MPAD_ACC8(AS, c[2][0]), MPAD_ACC8(AS, c[2][1]),                     \
                               MPAD_ACC8(AS, c[3][0]), MPAD_ACC8(AS, c[3][1])                      \
                             : "l"(x), "l"(w), "r"((u32)is_added))
#            define MPAD_ARRIVE(AS)                                                                \
                UNROLL for (int i = 0; i < 4; i++)                                                 \
                    UNROLL for (int j = 0; j < 2;                                                  \
                                j++) asm volatile("" : MPAD_ACC8(AS, c[i][j])::"memory")
// Sums that were on their way may be read from here on.
DEV void wgmma_arrive(Acc (&c)[4][2])
{
    MPAD_ARRIVE("f");
}
// Kinds of products: the types of tokens, weights and sums, and the bits of the former.
// wgmma_stage(): one stage of 128 bytes of k, 64 tokens at `x` and 128 weight rows at `w`,
// committed; the sums are added to, or set.
template <class KIND, class SUMS> DEV void wgmma_stage(SUMS (&c)[4][2], Lds x, Lds w, bool is_added)
{
    u64 tokens = wgmma_tile(x), weights = wgmma_tile(w);
    wgmma_fence();
    UNROLL for (int step = 0; step < TILE_STEPS; step++)
        KIND::multiply(c, tokens + 2 * step, weights + 2 * step, step > 0 || is_added);
    wgmma_commit();
}
#            define MPAD_WGMMA_KIND(NAME, WIDTH, SUMS, AS, SHAPE, MODIFIERS)                       \
                struct NAME {                                                                      \
                    static constexpr int BITS = WIDTH;                                             \
                    typedef SUMS Sums;                                                             \
                    static DEV void multiply(SUMS (&c)[4][2], u64 x, u64 w, bool is_added)         \
                    {                                                                              \
                        MPAD_WGMMA(SHAPE, MODIFIERS, AS);                                          \
                    }                                                                              \
                };
struct IntAcc {
    int v[ACC];
};
DEV void wgmma_arrive(IntAcc (&c)[4][2])
{
    MPAD_ARRIVE("r");
}
MPAD_WGMMA_KIND(Bf16Bf16, 16, Acc, "f", "k16.f32.bf16.bf16", ",1,1,0,0")
MPAD_WGMMA_KIND(F16F16, 16, Acc, "f", "k16.f32.f16.f16", ",1,1,0,0")
MPAD_WGMMA_KIND(E4m3E4m3, 8, Acc, "f", "k32.f32.e4m3.e4m3", ",1,1")
MPAD_WGMMA_KIND(E4m3E5m2, 8, Acc, "f", "k32.f32.e4m3.e5m2", ",1,1")
MPAD_WGMMA_KIND(Int8Int8, 8, IntAcc, "r", "k32.s32.s8.s8", "")
template <class T> struct WgmmaPlain;
template <> struct WgmmaPlain<Bf16> : Bf16Bf16 {
};
template <> struct WgmmaPlain<F16> : F16F16 {
};

// The 8 x 8 numbers of T that a wave has as words, turned: of lane l, word row l / 4 and columns 2
// * (l % 4) on.
DEV u32 wave_turn(u32 w)
{
    u32 v;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(v) : "r"(w));
    return v;
}
// Four words of each of four neighbouring lanes, turned: lane q has word q of each of them.
DEV u4 quad_turn(u32 w0, u32 w1, u32 w2, u32 w3)
{
    int q = (int)(lane_id() & 3);
    // Pairs of lanes swap the words of odd and even numbers, then pairs of those.
    u32 s0 = lane_xor(q & 1 ? w0 : w1, 1), s1 = lane_xor(q & 1 ? w2 : w3, 1);
    u32 e0 = q & 1 ? s0 : w0, e1 = q & 1 ? w1 : s0, e2 = q & 1 ? s1 : w2, e3 = q & 1 ? w3 : s1;
    u32 t0 = lane_xor(q & 2 ? e0 : e2, 2), t1 = lane_xor(q & 2 ? e1 : e3, 2);
    u4 v;
    v[0] = q & 2 ? t0 : e0;
    v[1] = q & 2 ? t1 : e1;
    v[2] = q & 2 ? e2 : t0;
    v[3] = q & 2 ? e3 : t1;
    return v;
}

#            define MPAD_HAVE_BYTES 1
DEV u64 e4m3_bytes(const float (&v)[8]) // rounded to nearest even, the largest at most
{
    u64 bytes = 0;
    UNROLL for (int i = 0; i < 4; i++)
    {
        u16 pair;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0,%1,%2;"
            : "=h"(pair)
            : "f"(v[2 * i + 1]), "f"(v[2 * i]));
        bytes |= (u64)pair << 16 * i;
    }
    return bytes;
}
DEV u64 int8_bytes(const float (&v)[8]) // the same, between -127 and 127
{
    u64 bytes = 0;
    UNROLL for (int i = 0; i < 8; i++)
    {
        int n = __float2int_rn(v[i]);
        n = n > 127 ? 127 : n < -127 ? -127 : n;
        bytes |= (u64)(n & 255) << 8 * i;
    }
    return bytes;
}
#        endif

#    else

typedef float f8 __attribute__((ext_vector_type(8)));
typedef u32 u2 __attribute__((ext_vector_type(2)));
typedef u32 u8v __attribute__((ext_vector_type(8)));
typedef short s4 __attribute__((ext_vector_type(4)));
typedef short s8 __attribute__((ext_vector_type(8)));
typedef short s16 __attribute__((ext_vector_type(16)));
typedef __bf16 b8 __attribute__((ext_vector_type(8)));
typedef _Float16 h4 __attribute__((ext_vector_type(4)));
typedef _Float16 h8 __attribute__((ext_vector_type(8)));
typedef _Float16 h16 __attribute__((ext_vector_type(16)));

template <class T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<Bf16> = true;

template <class T> DEV void slab_fast(Acc &acc, const TokenFrag &x, const WeightFrag &w)
{
#        if defined(__gfx950__)
    f4 c = __builtin_bit_cast(f4, acc);
    if constexpr (IS_BF16<T>)
        c = __builtin_amdgcn_mfma_f32_16x16x32_bf16(__builtin_bit_cast(b8, w.c[0]),
                                                    __builtin_bit_cast(b8, x.c[0]), c, 0, 0, 0);
    else
        c = __builtin_amdgcn_mfma_f32_16x16x32_f16(__builtin_bit_cast(h8, w.c[0]),
                                                   __builtin_bit_cast(h8, x.c[0]), c, 0, 0, 0);
#        elif MPAD_MAP == 1
    f4 c = __builtin_bit_cast(f4, acc);
    UNROLL for (int h = 0; h < 2; h++)
    {
        u2 wv = {w.c[0][2 * h], w.c[0][2 * h + 1]}, xv = {x.c[0][2 * h], x.c[0][2 * h + 1]};
        if constexpr (IS_BF16<T>)
            c = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(__builtin_bit_cast(s4, wv),
                                                          __builtin_bit_cast(s4, xv), c, 0, 0, 0);
        else
            c = __builtin_amdgcn_mfma_f32_16x16x16f16(__builtin_bit_cast(h4, wv),
                                                      __builtin_bit_cast(h4, xv), c, 0, 0, 0);
    }
#        elif MPAD_MAP == 2
    f8 c = __builtin_bit_cast(f8, acc);
    UNROLL for (int h = 0; h < 2; h++)
    {
        if constexpr (IS_BF16<T>)
            c = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(
                __builtin_bit_cast(s8, w.c[h]), __builtin_bit_cast(s8, x.c[h]), c);
        else
            c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(__builtin_bit_cast(h8, w.c[h]),
                                                                 __builtin_bit_cast(h8, x.c[h]), c);
    }
#        else
    f8 c = __builtin_bit_cast(f8, acc);
    UNROLL for (int h = 0; h < 2; h++)
    {
        u8v wv = __builtin_shufflevector(w.c[2 * h], w.c[2 * h + 1], 0, 1, 2, 3, 4, 5, 6, 7);
        u8v xv = __builtin_shufflevector(x.c[2 * h], x.c[2 * h + 1], 0, 1, 2, 3, 4, 5, 6, 7);
        if constexpr (IS_BF16<T>)
            c = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(__builtin_bit_cast(s16, wv),
                                                            __builtin_bit_cast(s16, xv), c);
        else
            c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(__builtin_bit_cast(h16, wv),
                                                           __builtin_bit_cast(h16, xv), c);
    }
#        endif
    acc = __builtin_bit_cast(Acc, c);
}

template <class T> DEV void slab(Acc &acc, const TokenFrag &x, const WeightFrag &w)
{
#        if defined(__gfx90a__)
    // The 16-bit matrix instructions of MI200 take subnormals for zeros, the 32-bit ones do not. At
    // a quarter of the rate they still keep up with weights from memory.
    if constexpr (!IS_BF16<T>) {
        h8 wv = __builtin_bit_cast(h8, w.c[0]), xv = __builtin_bit_cast(h8, x.c[0]);
        f4 c = __builtin_bit_cast(f4, acc);
        UNROLL for (int i = 0; i < 8; i++) c =
            __builtin_amdgcn_mfma_f32_16x16x4f32((float)wv[i], (float)xv[i], c, 0, 0, 0);
        acc = __builtin_bit_cast(Acc, c);
        return;
    }
#        endif
    slab_fast<T>(acc, x, w);
}

// Fragments of a tile in LDS: rows of 128 bytes, 16-byte chunk c of row r at chunk c ^ (r & 7). A
// step is the k of one slab.
constexpr int TILE_STEPS = 2; // in 128 bytes
typedef TokenFrag TileFrag;
static_assert(TOKEN_CHUNKS == WEIGHT_CHUNKS, "one fragment type serves both operands");
DEV TileFrag tile_tokens(Lds tile, int row0, int step, int lane)
{
    TileFrag f;
    UNROLL for (int i = 0; i < TOKEN_CHUNKS; i++)
    {
        int r = row0 + token_row(i, lane), c = 4 * step + token_chunk(i, lane);
        f.c[i] =
            *(const __attribute__((address_space(3))) u4 *)(tile + (r * 8 + (c ^ (r & 7))) * 16);
    }
    return f;
}
DEV TileFrag tile_weights(Lds tile, int row0, int step, int lane)
{
    return tile_tokens(tile, row0, step, lane);
}
template <class T> DEV void tile_step(Acc &a, const TileFrag &x, const TileFrag &w)
{
    slab_fast<T>(a, x, __builtin_bit_cast(WeightFrag, w));
}

#        if MPAD_MAP == 1
#            define MPAD_HAVE_BYTES 1
#            define MPAD_HAVE_BYTES_TILE 1
// Bytes as they are: a fragment is those of both steps, 128 k of a row in LDS; lanes hold what they
// hold of 16-bit elements.
struct ByteFrag {
    TileFrag step[TILE_STEPS];
};
DEV ByteFrag byte_frag(Lds tile, int row0, int lane)
{
    return {{tile_tokens(tile, row0, 0, lane), tile_tokens(tile, row0, 1, lane)}};
}
template <class V> struct ByteFragOf {
    V part[sizeof(ByteFrag) / sizeof(V)];
};
typedef int i4 __attribute__((ext_vector_type(4)));
typedef int i8 __attribute__((ext_vector_type(8)));
// Kinds of products, by the types of tokens and weights; float8 is of the target's formats.
// PRODUCT: c + w x of a PART of the fragments. Sums are the bits of SUM; value(): one as float32.
#            define MPAD_BYTES_KIND(NAME, SUM, PART, PRODUCT)                                      \
                struct NAME {                                                                      \
                    static DEV float value(float sum)                                              \
                    {                                                                              \
                        return (float)__builtin_bit_cast(SUM, sum);                                \
                    }                                                                              \
                    static DEV void multiply(Acc &sums, const ByteFrag &tokens,                    \
                                             const ByteFrag &weights)                              \
                    {                                                                              \
                        typedef SUM Sums __attribute__((ext_vector_type(4)));                      \
                        typedef ByteFragOf<PART> Parts;                                            \
                        Sums c = __builtin_bit_cast(Sums, sums);                                   \
                        UNROLL for (int i = 0; i < (int)(sizeof(ByteFrag) / sizeof(PART)); i++)    \
                        {                                                                          \
                            PART x = __builtin_bit_cast(Parts, tokens).part[i];                    \
                            PART w = __builtin_bit_cast(Parts, weights).part[i];                   \
                            c = PRODUCT;                                                           \
                        }                                                                          \
                        sums = __builtin_bit_cast(Acc, c);                                         \
                    }                                                                              \
                };
#            if defined(__gfx950__) // e4m3fn, e5m2
#                define MPAD_HAVE_E4M3_BYTES 1
#                define MPAD_HAVE_E5M2_BYTES 1
#                define MPAD_FLOAT8(W)                                                             \
                    __builtin_amdgcn_mfma_scale_f32_16x16x128_f8f6f4(w, x, c, W, 0, 0, 0, 0, 0)
constexpr float E4M3_LARGEST = 448.f;
MPAD_BYTES_KIND(Int8Int8, int, i4, __builtin_amdgcn_mfma_i32_16x16x64_i8(w, x, c, 0, 0, 0))
MPAD_BYTES_KIND(E4m3E4m3, float, i8, MPAD_FLOAT8(0))
MPAD_BYTES_KIND(E4m3E5m2, float, i8, MPAD_FLOAT8(1))
#            elif defined(__gfx942__) // e4m3fnuz
#                define MPAD_HAVE_E4M3_BYTES 1
constexpr float E4M3_LARGEST = 240.f;
MPAD_BYTES_KIND(Int8Int8, int, i64, __builtin_amdgcn_mfma_i32_16x16x32_i8(w, x, c, 0, 0, 0))
MPAD_BYTES_KIND(E4m3E4m3, float, i64, __builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8(w, x, c, 0, 0, 0))
#            else
MPAD_BYTES_KIND(Int8Int8, int, int, __builtin_amdgcn_mfma_i32_16x16x16i8(w, x, c, 0, 0, 0))
#            endif

DEV u64 int8_bytes(const float (&v)[8]) // rounded to nearest even, between -127 and 127
{
    u64 bytes = 0;
    UNROLL for (int i = 0; i < 8; i++) bytes |=
        (u64)(float_bits(float_clamp(v[i], 127.f) + 0x1.8p23f) & 255) << 8 * i;
    return bytes;
}
#            if MPAD_HAVE_E4M3_BYTES
DEV u64 e4m3_bytes(const float (&v)[8]) // the same, the format's largest at most
{
    u32 half[2];
    UNROLL for (int h = 0; h < 2; h++)
    {
        float c[4];
        UNROLL for (int i = 0; i < 4; i++) c[i] = float_clamp(v[4 * h + i], E4M3_LARGEST);
        int pair = __builtin_amdgcn_cvt_pk_fp8_f32(c[0], c[1], 0, false);
        half[h] = (u32)__builtin_amdgcn_cvt_pk_fp8_f32(c[2], c[3], pair, true);
    }
    return (u64)half[1] << 32 | half[0];
}
#            else
DEV u64 e4m3_bytes(const float (&)[8])
{
    return 0;
}
#            endif
#        endif

#    endif
#endif
