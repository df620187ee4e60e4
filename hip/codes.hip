// Level 4: rows of x and h rounded for a product, to codes times scales (params.h: mpad_input).

#include "route.h"
#include "stored.h"
#include "tile.h"

// v times the reciprocal is a step away from v / scale at most; its remainder says which way. Both
// are of sizes in which neither it nor the reciprocal leaves the normal numbers.
DEV float quotient(float v, float scale, float reciprocal)
{
    float q = v * reciprocal;
    return fused_mul_add(fused_mul_add(-q, scale, v), reciprocal, q);
}

// The nearest value of the call's format of codes, the even code of two, the largest beyond it.
// Adding and subtracting a number whose last bit weighs as much as the format's last bit at v
// rounds to it.
DEV float code_nearest(const mpad_gpu_args &a, float v)
{
    v = float_clamp(v, a.code_largest);
    int exponent = (int)(float_bits(v) >> 23 & 255u) - 127;
    exponent = a.weight_values == MPAD_GPU_VALUES_INTEGER ? a.code_mantissa
               : exponent < a.code_least_exponent         ? a.code_least_exponent
                                                          : exponent;
    float unit =
        bits_float((u32)(exponent - a.code_mantissa + 23 + 127) << 23 | 0x400000u); // 1.5 * 2^...
    return (v + unit) - unit;
}

// Scale of columns whose largest magnitude has the bits `largest`: over that of the format; of OCP
// MX the quotient of their powers of two, after rounding to the format's mantissa, as e8m0 has it.
// 2^128 then counts as less. NaN and infinity give NaN.
DEV float code_scale(const mpad_gpu_args &a, u32 largest)
{
    if (!a.is_code_mx) {
        float scale = bits_float(largest) / a.code_largest;
        return scale == 0.f ? 1.f : scale;
    }
    int exponent = (int)((largest + (0x400000u >> a.code_mantissa)) >> 23);
    exponent = exponent < 254 ? exponent : 254;
    exponent -= (int)(float_bits(a.code_largest) >> 23) - 127;
    return e8m0_value(largest >= 0x7f800000u ? 255u : exponent > 0 ? (u32)exponent : 0u);
}

// 8 codes from column `at` of a row on. A NaN's byte does not count: its row's scale is NaN.
template <class T> DEV void codes_store(const mpad_gpu_args &a, char *row, int at, float (&v)[8])
{
#if MPAD_HAVE_BYTES
    if (a.is_code_byte) {
        bool is_integer = a.weight_values == MPAD_GPU_VALUES_INTEGER;
        u64 bytes = is_integer ? int8_bytes(v) : e4m3_bytes(v);
        *(u64 *)(row + at) = bytes;
        return;
    }
#endif
    UNROLL for (int i = 0; i < 8; i++) v[i] = code_nearest(a, v[i]);
    *(u4 *)(row + at * 2) = pack8<T>(v);
}

// 8 columns of a row of T or of float32.
template <class T> DEV void codes_load(float (&v)[8], const T *from, bool vector)
{
    u4 chunk;
    if (vector)
        chunk = *(const u4 *)from;
    else {
        UNROLL for (int i = 0; i < 4; i++) chunk[i] =
            (u32)from[2 * i].bits | (u32)from[2 * i + 1].bits << 16;
    }
    UNROLL for (int i = 0; i < 4; i++)
    {
        v[2 * i] = T::to_float((u16)chunk[i]);
        v[2 * i + 1] = T::to_float((u16)(chunk[i] >> 16));
    }
}
DEV void codes_load(float (&v)[8], const float *from, bool)
{
    UNROLL for (int h = 0; h < 2; h++)
    {
        f4 half = *(const f4 *)(from + 4 * h);
        UNROLL for (int i = 0; i < 4; i++) v[4 * h + i] = half[i];
    }
}

DEV u32 largest_bits(u32 largest, const float (&v)[8])
{
    UNROLL for (int i = 0; i < 8; i++)
    {
        u32 size = float_bits(v[i]) & 0x7fffffffu;
        largest = size > largest ? size : largest;
    }
    return largest;
}

// Grid: as many threads as tasks times lanes of one; block: MPAD_CODES_THREADS. A task is a row
// times a run of columns that share a scale, of `to.n_lane` threads, a power of two; of more than a
// wave, the largest magnitudes meet in LDS. The bits of magnitudes are compared, so that a NaN is
// the largest. LDS: one word per wave.
template <class T, class FROM>
DEV void codes_make(const mpad_gpu_args &a, const mpad_gpu_codes &to, const FROM *from, i64 ld,
                    int n_row, int n_k, bool vector)
{
    constexpr int KEPT = 2; // chunks of a thread that are loaded once
    int lane = (int)thread_id() & (to.n_lane - 1);
    int task = (int)((block_id() * MPAD_CODES_THREADS + thread_id()) >> to.lane_log2);
    int row = to.n_group == 1 ? task : task / to.n_group, group = task - row * to.n_group;
    int k = (group << to.group_log2) - to.phase, end = k + (1 << to.group_log2);
    k = k < 0 ? 0 : k;
    end = row >= n_row ? k : end < n_k ? end : n_k;
    from += row * ld;

    float kept[KEPT][8];
    u32 largest = 0;
    UNROLL for (int i = 0; i < KEPT; i++)
    {
        int at = k + (lane + i * to.n_lane) * 8;
        if (at < end) {
            codes_load(kept[i], from + at, vector);
            largest = largest_bits(largest, kept[i]);
        }
    }
    for (int at = k + (lane + KEPT * to.n_lane) * 8; at < end; at += to.n_lane * 8) {
        float v[8];
        codes_load(v, from + at, vector);
        largest = largest_bits(largest, v);
    }
    for (int d = 1; d < to.n_lane && d < WAVE; d *= 2) {
        u32 other = lane_xor(largest, d);
        largest = other > largest ? other : largest;
    }
    if (to.n_lane > WAVE) {
        if (lane_id() == 0)
            lds_write<u32>(lds_base() + wave_id() * 4, largest);
        block_barrier(); // all waves' are there
        int n = to.n_lane / WAVE, first = wave_id() & -n;
        for (int i = 0; i < n; i++) {
            u32 other = lds_read<u32>(lds_base() + (first + i) * 4);
            largest = other > largest ? other : largest;
        }
    }
    if (row >= n_row)
        return;

    float scale = code_scale(a, largest);
    if (to.fixed)
        scale = largest > 0x7f800000u ? bits_float(largest) : *to.fixed;
    if (lane == 0)
        to.scale[row * to.n_group + group] = scale;
    // By a power of two to where quotient() works.
    float size = scale < 0.f ? -scale : scale;
    float factor = size < 0x1p-64f ? 0x1p64f : size > 0x1p64f ? 0x1p-64f : 1.f;
    scale *= factor;
    float reciprocal = 1.f / scale;
    char *code = (char *)to.code + row * to.ld * (a.is_code_byte ? 1 : 2);
    auto put = [&](int at, float (&v)[8]) {
        UNROLL for (int i = 0; i < 8; i++) v[i] = quotient(v[i] * factor, scale, reciprocal);
        codes_store<T>(a, code, at, v);
    };
    UNROLL for (int i = 0; i < KEPT; i++)
    {
        int at = k + (lane + i * to.n_lane) * 8;
        if (at < end)
            put(at, kept[i]);
    }
    for (int at = k + (lane + KEPT * to.n_lane) * 8; at < end; at += to.n_lane * 8) {
        float v[8];
        codes_load(v, from + at, vector);
        put(at, v);
    }
}

template <class T> DEV void codes_x(const mpad_gpu_args &a)
{
    args_prefetch(a);
    launch_wait();
    launch_release();
    codes_make<T>(a, a.x, (const T *)a.hidden, a.ld_hidden, token_count(a), a.n_hidden,
                  a.is_hidden_vector);
}

// The rows of h are as many as the jobs have.
template <class T> DEV void codes_h(const mpad_gpu_args &a)
{
    args_prefetch(a);
    launch_wait();
    launch_release();
    int n_job = *a.n_job, n_row = n_job ? a.job[n_job - 1].first + a.job[n_job - 1].rows : 0;
    codes_make<T>(a, a.h, (const float *)a.inter, a.ld_inter, n_row, a.n_inter, true);
}

#if MPAD_HAVE_TILE
#    define MPAD_CODES(NAME, TYPE, STAGE, CODE)                                                    \
        MPAD_KERNEL(MPAD_CODES_THREADS, 2) NAME(MPAD_ARGS mpad_gpu_args a)                         \
        {                                                                                          \
            STAGE<TYPE>(a);                                                                        \
        }
#else
#    define MPAD_CODES(NAME, TYPE, STAGE, CODE)
#endif
