// Level 3: quantised weights. Their stored values become T exactly; their scales are float32
// factors of sums, one per row and run of columns.
#pragma once
#include "memory.h"
#include "mma.h"

// Two stored floats, in the high bytes of the halves of v, to T. Their fields move to T's by a
// shift; the difference of the exponents' biases is a product, which also makes subnormals normal.
template <class T> DEV u32 float_pair(const mpad_gpu_stored_float &f, u32 v)
{
    return T::pair_mul((v & 0x80008000u) | (v & 0x7f007f00u) >> f.shift, f.factor);
}
// The two unsigned integers in the low bits of the halves of v, less what is in those of `minus`.
template <class T> DEV u32 integer_pair(u32 v, u32 minus)
{
    return T::pair_sub(v | T::COUNT_FROM, minus | T::COUNT_FROM);
}

// Bit 7 of each byte of w that is a NaN or an infinity.
DEV u32 float_special(const mpad_gpu_stored_float &f, u32 w)
{
    return (((w ^ f.special_xor) & 0x7f7f7f7fu) + f.special_add) & (w | f.special_keep) &
           0x80808080u;
}

// What a kernel's inner loop knows of its weights when it is compiled: their values, how their
// scales go, and how a lane loads them. Where the target has a loop per form, nothing is left to
// run time for the usual ones: branches would keep the compiler from having the work of several
// slabs overlap.
enum {
    SCALE_NONE,         // weights are as T
    SCALE_ROW,          // one a row
    SCALE_FOLD,         // e8m0, one for 32 columns: a factor of the weights
    SCALE_FETCH,        // from here on by column: the same for the slabs that are loaded together
    SCALE_COLUMN_E8M0,  // one for 32 columns
    SCALE_COLUMN_FLOAT, // of float32, bf16 or f16
    SCALE_COLUMN        // of any type, or one a row
};
constexpr int AT_RUN_TIME = -1;
// WIDE: a lane loads 16 bytes of a row at a time, so that memory is asked for 64 bytes in a row,
// and gives a part of them to each of several slabs; tokens take the same order. Else it loads what
// it gives to one slab.
template <int VALUES, int SCALE, bool WIDE> struct Form {
    static constexpr int scale = SCALE;
    static constexpr bool is_wide = WIDE, is_folded = SCALE == SCALE_FOLD;
    static DEV bool has(const mpad_gpu_args &a, int values)
    {
        return VALUES == AT_RUN_TIME ? a.weight_values == values : VALUES == values;
    }
    static DEV bool by_row(const mpad_gpu_scale &s)
    {
        return SCALE == AT_RUN_TIME ? s.ld_column == 0 : SCALE == SCALE_ROW;
    }
    static DEV bool by_column(const mpad_gpu_scale &s)
    {
        return SCALE == AT_RUN_TIME ? s.ld_column != 0 : SCALE >= SCALE_FETCH;
    }
};
typedef Form<AT_RUN_TIME, AT_RUN_TIME, false> AnyForm;

// Calls f with the form of the call's weights, of which `scale` has the scales. VECTOR: rows start
// on the bytes of a chunk; wide: on 16, and end with some.
template <class T, class W, bool VECTOR, class F>
DEV void form_select(const mpad_gpu_args &a, const mpad_gpu_scale &scale, bool wide, F f)
{
    constexpr int INTEGER = MPAD_GPU_VALUES_INTEGER, E4M3 = MPAD_GPU_VALUES_E4M3FN,
                  E2M1 = MPAD_GPU_VALUES_E2M1, COLUMNS = 512 / W::BITS;
    bool is_integer = a.weight_values == INTEGER, by_row = scale.ld_column == 0;
    bool is_e8m0 = scale.type == MPAD_GPU_E8M0;
    bool is_one = 1 << scale.column_log2 >= COLUMNS && scale.column_phase % COLUMNS == 0;
    if constexpr (W::BITS == 16)
        return f(Form<MPAD_GPU_VALUES_OTHER, SCALE_NONE, false>());
    else if constexpr (!LOOP_PER_FORM || !VECTOR)
        return f(AnyForm());
    else if constexpr (W::BITS == 8) {
        if (wide && is_integer)
            return f(Form<INTEGER, SCALE_ROW, true>());
        if (wide && a.weight_values == E4M3) {
            if (by_row)
                return f(Form<E4M3, SCALE_ROW, true>());
            if constexpr (T::HOLDS_E8M0) {
                if (is_e8m0)
                    return f(Form<E4M3, SCALE_FOLD, true>());
            }
            if (!is_e8m0 && is_one)
                return f(Form<E4M3, SCALE_FETCH, true>());
        }
        return f(Form<AT_RUN_TIME, SCALE_COLUMN, false>());
    } else {
        if (is_integer && wide && is_one)
            return f(Form<INTEGER, SCALE_FETCH, true>());
        if (is_integer)
            return f(Form<INTEGER, SCALE_COLUMN_FLOAT, false>());
        if constexpr (T::HOLDS_E8M0) {
            if (wide)
                return f(Form<E2M1, SCALE_FOLD, true>());
        }
        return f(Form<E2M1, SCALE_COLUMN_E8M0, false>());
    }
}

// Two stored values of a chunk, in the high bytes of the halves of a word, and of which the low
// bytes do not count.
DEV u32 chunk_pair(const Stored<Bytes> &s, int i)
{
    return i & 1 ? bytes_of<2, 2, 3, 3>(s.x[i / 2], 0) : bytes_of<0, 0, 1, 1>(s.x[i / 2], 0);
}

template <class T, int VALUES> DEV u4 chunk_decode(const mpad_gpu_args &, const Stored<Plain> &s)
{
    return __builtin_bit_cast(u4, s);
}

// Of the float8 that the target converts, every value.
#ifdef MPAD_CONVERTED
template <class T> DEV u4 converted_decode(const Stored<Bytes> &s)
{
    u4 c;
    UNROLL for (int i = 0; i < 2; i++)
    {
        c[2 * i] = T::template from_float8<0>(s.x[i]);
        c[2 * i + 1] = T::template from_float8<1>(s.x[i]);
    }
    return c;
}
#endif
// Other floats that are NaN or infinite become finite: see chunk_special.
template <class T, int VALUES> DEV u4 chunk_decode(const mpad_gpu_args &a, const Stored<Bytes> &s)
{
    u4 c;
    UNROLL for (int i = 0; i < 4; i++)
    {
        u32 v = chunk_pair(s, i);
        c[i] = VALUES == MPAD_GPU_VALUES_INTEGER ? integer_pair<T>(v & 0x007f007fu, v & 0x00800080u)
                                                 : float_pair<T>(a.stored_float, v);
    }
    return c;
}

template <class T> DEV u4 e2m1_decode(u32 w)
{
    u4 c;
#if MPAD_CONVERTS_E2M1
    c[0] = T::template from_e2m1<0>(w);
    c[1] = T::template from_e2m1<1>(w);
    c[2] = T::template from_e2m1<2>(w);
    c[3] = T::template from_e2m1<3>(w);
#else
    u32 four[2];
    nibbles_split(w, four);
    UNROLL for (int i = 0; i < 2; i++)
    {
        u32 low = nibbles_look_up(four[i], T::E2M1_LOW[0], T::E2M1_LOW[1]);
        u32 high = nibbles_look_up(four[i], T::E2M1_HIGH[0], T::E2M1_HIGH[1]);
        high |= nibbles_high(four[i]);
        c[2 * i] = bytes_of<0, 4, 1, 5>(low, high);
        c[2 * i + 1] = bytes_of<2, 6, 3, 7>(low, high);
    }
#endif
    return c;
}
template <class T> DEV u4 int4_decode(u32 w)
{
    u32 even = w & 0x0f0f0f0fu, odd = w >> 4 & 0x0f0f0f0fu;
    u32 v[4] = {bytes_of<0, 0, 4, 4>(even, odd), bytes_of<1, 1, 5, 5>(even, odd),
                bytes_of<2, 2, 6, 6>(even, odd), bytes_of<3, 3, 7, 7>(even, odd)};
    u4 c;
    UNROLL for (int i = 0; i < 4; i++) c[i] = integer_pair<T>(v[i] & 0x000f000fu, 0x00080008u);
    return c;
}
template <class T, int VALUES> DEV u4 chunk_decode(const mpad_gpu_args &, const Stored<Nibbles> &s)
{
    if constexpr (VALUES == MPAD_GPU_VALUES_INTEGER)
        return int4_decode<T>(s.x[0]);
    else
        return e2m1_decode<T>(s.x[0]);
}

// Bits that are set where a chunk has a NaN or an infinity; and the chunk's correction then.
DEV u32 chunk_special(const mpad_gpu_args &a, const Stored<Bytes> &s)
{
    return float_special(a.stored_float, s.x[0]) | float_special(a.stored_float, s.x[1]);
}
DEV void chunk_correct(const mpad_gpu_args &a, u4 &c, const Stored<Bytes> &s)
{
    Stored<Bytes> special = {
        {float_special(a.stored_float, s.x[0]), float_special(a.stored_float, s.x[1])}};
    UNROLL for (int i = 0; i < 4; i++) c[i] |=
        (chunk_pair(special, i) >> 7 & 0x00010001u) * a.stored_float.special;
}

// N chunks that wait for no branch but one.
template <class T, class FORM, class W, int N>
DEV void chunks_decode(const mpad_gpu_args &a, u4 (&c)[N], const Stored<W> (&s)[N])
{
    if (W::BITS < 16 && FORM::has(a, MPAD_GPU_VALUES_INTEGER)) {
        UNROLL for (int i = 0; i < N; i++) c[i] = chunk_decode<T, MPAD_GPU_VALUES_INTEGER>(a, s[i]);
        return;
    }
    if constexpr (W::BITS != 8) {
        UNROLL for (int i = 0; i < N; i++) c[i] = chunk_decode<T, MPAD_GPU_VALUES_E2M1>(a, s[i]);
    } else {
#ifdef MPAD_CONVERTED
        if (FORM::has(a, MPAD_CONVERTED)) {
            UNROLL for (int i = 0; i < N; i++) c[i] = converted_decode<T>(s[i]);
            return;
        }
#endif
        u32 special = 0;
        UNROLL for (int i = 0; i < N; i++)
        {
            c[i] = chunk_decode<T, MPAD_GPU_VALUES_OTHER>(a, s[i]);
            special |= chunk_special(a, s[i]);
        }
        if (special) {
            UNROLL for (int i = 0; i < N; i++) chunk_correct(a, c[i], s[i]);
        }
    }
}

// Where the scale of one row of an expert's weights is, in elements; `row` within its half.
DEV i64 scale_row(const mpad_gpu_scale &s, int expert, int half, int row)
{
    return expert * s.ld_expert + half * s.up_offset +
           (i64)((s.row_phase + row) >> s.row_log2) * s.ld_row;
}
// The same for column k, as stored: the conversion would wait for the load.
DEV u32 scale_load(const mpad_gpu_scale &s, i64 row, int k, bool ok)
{
    i64 i = row + (i64)((s.column_phase + k) >> s.column_log2) * s.ld_column;
    if (!ok)
        return 0;
    if (s.type == MPAD_GPU_F32)
        return ((const u32 *)s.data)[i];
    if (s.type == MPAD_GPU_E8M0)
        return ((const u8 *)s.data)[i];
    return ((const u16 *)s.data)[i];
}
// 2^(byte - 127); of 0 the field of the exponent is 0 too, 255 is NaN: both have one bit more.
DEV float e8m0_value(u32 stored)
{
    return bits_float(stored << 23 | (stored + 1 & 254u ? 0u : 0x00400000u));
}
DEV float scale_value(const mpad_gpu_scale &s, u32 stored)
{
    switch (s.type) {
    case MPAD_GPU_F32:
        return bits_float(stored);
    case MPAD_GPU_BF16:
        return Bf16::to_float((u16)stored);
    case MPAD_GPU_F16:
        return F16::to_float((u16)stored);
    default:
        return e8m0_value(stored);
    }
}

// The same as the form has it.
template <class W, class FORM>
DEV u32 scale_load_as(const mpad_gpu_scale &s, i64 row, int k, bool ok)
{
    i64 i = row + ((s.column_phase + k) >> s.column_log2);
    if constexpr (FORM::scale == SCALE_FOLD || FORM::scale == SCALE_COLUMN_E8M0)
        return ok ? ((const u8 *)s.data)[row + k / 32] : 0;
    else if constexpr (FORM::scale == SCALE_FETCH && W::BITS == 8)
        return ok ? ((const u32 *)s.data)[i] : 0;
    else if constexpr (FORM::scale == SCALE_FETCH || FORM::scale == SCALE_COLUMN_FLOAT)
        return !ok                      ? 0
               : s.type == MPAD_GPU_F32 ? ((const u32 *)s.data)[i]
                                        : ((const u16 *)s.data)[i];
    else
        return scale_load(s, row, k, ok);
}
template <class W, class FORM> DEV float scale_value_as(const mpad_gpu_scale &s, u32 stored)
{
    if constexpr (FORM::scale == SCALE_COLUMN_E8M0)
        return e8m0_value(stored);
    else if constexpr (FORM::scale == SCALE_FETCH && W::BITS == 8)
        return bits_float(stored);
    else if constexpr (FORM::scale == SCALE_FETCH || FORM::scale == SCALE_COLUMN_FLOAT)
        return s.type == MPAD_GPU_F32    ? bits_float(stored)
               : s.type == MPAD_GPU_BF16 ? Bf16::to_float((u16)stored)
                                         : F16::to_float((u16)stored);
    else
        return scale_value(s, stored);
}

// A chunk times the power of two that `stored` is.
template <class T> DEV void chunk_fold(u4 &c, u32 stored)
{
    u32 high = float_bits(e8m0_value(stored)), pair = bytes_of<2, 3, 2, 3>(high, 0);
    UNROLL for (int i = 0; i < 4; i++) c[i] = T::pair_mul(c[i], pair);
}

// The chunks of 16 stored bytes; `scale` is their factor where the form has such.
template <class T, class W, class FORM>
DEV void wide_decode(const mpad_gpu_args &a, u4 (&chunk)[16 / W::BITS], const u4 &raw, u32 scale)
{
    constexpr int N = 16 / W::BITS;
    Stored<W> stored[N];
    UNROLL for (int p = 0; p < 4; p++) stored[p * N / 4].x[p % (4 / N)] = raw[p];
    chunks_decode<T, FORM>(a, chunk, stored);
    if constexpr (FORM::is_folded) {
        UNROLL for (int c = 0; c < N; c++) chunk_fold<T>(chunk[c], scale);
    }
}
// Calls f with the form of weights that are decoded where T is multiplied by wgmma, of those that
// gpu_plan.c's is_decoded_scale lets there, with the same `BY_HALF`.
template <class T, class W, bool BY_HALF, class F>
DEV void decoded_select(const mpad_gpu_args &a, const mpad_gpu_scale &scale, F f)
{
    constexpr int INTEGER = MPAD_GPU_VALUES_INTEGER, E4M3 = MPAD_GPU_VALUES_E4M3FN;
    bool is_integer = a.weight_values == INTEGER;
    if constexpr (W::BITS == 4) {
        if constexpr (!BY_HALF) {
            if (is_integer)
                return f(Form<INTEGER, SCALE_FETCH, true>());
        }
        if constexpr (T::HOLDS_E8M0)
            f(Form<MPAD_GPU_VALUES_E2M1, SCALE_FOLD, true>());
    } else {
        if (is_integer)
            return f(Form<INTEGER, SCALE_ROW, true>());
        if (scale.ld_column == 0)
            return f(Form<E4M3, SCALE_ROW, true>());
        if constexpr (T::HOLDS_E8M0) {
            if (scale.type == MPAD_GPU_E8M0)
                return f(Form<E4M3, SCALE_FOLD, true>());
        }
        f(Form<E4M3, SCALE_FETCH, true>());
    }
}

// Sum of a slab's products in float32, times the scale of each row, which lane `row` has.
DEV void acc_scale(Acc &sum, const Acc &part, float scale)
{
    int lane = (int)lane_id();
    float of_row = 0.f;
    UNROLL for (int i = 0; i < ACC; i++)
    {
        if (!acc_used(i))
            continue;
        if (i == 0 || acc_row(i, 0) != acc_row(i - 1, 0))
            of_row = lane_from(scale, acc_row(i, lane));
        sum.v[i] = fused_mul_add(part.v[i], of_row, sum.v[i]);
    }
}

// Slabs that fit the registers which hold `wanted` without much beside them: scales of every slab
// take those of two or four, what is known at run time only those of half.
template <class W, class FORM> DEV constexpr int flight_depth(int wanted)
{
    constexpr int SCALE = FORM::scale;
    return SCALE == SCALE_COLUMN                                       ? wanted / 4 * 2
           : SCALE == SCALE_COLUMN_E8M0 || SCALE == SCALE_COLUMN_FLOAT ? wanted - 2
           : SCALE == SCALE_FOLD && W::BITS == 8                       ? wanted - 4
                                                                       : wanted;
}

// Up to N slabs of one walk along weights that are on their way to a wave, with their scales.
// Groups of slabs are loaded and decoded together.
template <class T, class W, bool VECTOR, class FORM, int N> struct Flight {
    static constexpr int GROUP = FORM::is_wide            ? 16 / W::BITS
                                 : VECTOR && W::BITS < 16 ? STORED_FETCH
                                                          : 1;
    static constexpr int SHARE = FORM::scale == SCALE_FETCH ? GROUP : 1; // slabs of one scale
    static constexpr int LANE_BYTES = FORM::is_wide ? 16 : W::BITS;      // of a row in one load
    static constexpr int LANE_K = LANE_BYTES * 8 / W::BITS;
    // Rows whose scales a lane loads: those of its chunks, or row lane % 16 for all that have it.
    static constexpr int SCALE_ROWS = FORM::is_folded ? WEIGHT_CHUNKS : 1;
    static_assert(N % GROUP == 0, "whole groups");
    static_assert(!FORM::is_folded || GROUP >= WEIGHT_CHUNKS, "room for their scales");

    Run run[WEIGHT_CHUNKS];
    i64 scale_at[SCALE_ROWS];
    int k, end; // columns: the first of the walk's first slab; beyond the last
    Stored<W> w[N][WEIGHT_CHUNKS];
    u32 scale[N];

    // Offset of the lane's part of row chunk i, in bytes and elements, and the row whose scale it
    // loads.
    static DEV u32 lane_at(int i)
    {
        return (u32)(weight_chunk(i, (int)lane_id()) * LANE_BYTES);
    }
    static DEV int lane_k(int i)
    {
        return weight_chunk(i, (int)lane_id()) * LANE_K;
    }
    static DEV int lane_scale_row(int i)
    {
        int lane = (int)lane_id();
        return FORM::is_folded ? weight_row(i, lane) : lane & 15;
    }
    // Chunk of tokens that meets the lane's chunk i of slab p of a group, counted from the group's
    // first.
    static DEV int token_chunk_of(int i, int p)
    {
        int c = token_chunk(i, (int)lane_id());
        return FORM::is_wide ? c * GROUP + p : 4 * p + c;
    }
    // Where chunk c of a row of tokens stands for that to be at 4 * slab + token_chunk.
    static DEV int token_place(int c)
    {
        if (!FORM::is_wide)
            return c;
        int in = c % (4 * GROUP);
        return c - in + in % GROUP * 4 + in / GROUP;
    }

    DEV void advance(int n)
    {
        UNROLL for (int i = 0; i < WEIGHT_CHUNKS; i++) run_advance<W>(run[i], n);
        k += n * 32;
    }
    // Loads the group at slab `s` of the walk into that at w[at].
    DEV void fetch(const mpad_gpu_scale &scales, int at, int s)
    {
        UNROLL for (int i = 0; i < WEIGHT_CHUNKS; i++)
        {
            if constexpr (FORM::is_wide) {
                u4 raw = load16_stream(run[i].b, run[i].at + (u32)(s * 4 * W::BITS),
                                       run[i].left - s * 32 > 0);
                constexpr int WORDS = W::BITS / 4; // of a slab
                UNROLL for (int p = 0; p < 4; p++) w[at + p / WORDS][i].x[p % WORDS] = raw[p];
            } else {
                UNROLL for (int p = 0; p < GROUP; p++) w[at + p][i] =
                    run_stored<W, VECTOR>(run[i], s + p);
            }
        }
        if constexpr (FORM::is_folded) {
            UNROLL for (int i = 0; i < WEIGHT_CHUNKS; i++)
            {
                int column = k + s * 32 + lane_k(i);
                scale[at + i] = scale_load_as<W, FORM>(scales, scale_at[i], column, column < end);
            }
        } else if (FORM::by_column(scales)) {
            UNROLL for (int p = 0; p < GROUP; p += SHARE)
            {
                int column = k + (s + p) * 32;
                scale[at + p] = scale_load_as<W, FORM>(scales, scale_at[0], column, column < end);
            }
        }
    }
    // Products of the group at w[at] with tokens(p), those of its slab p: times their scales to
    // `scaled` where these go by column, else to `sum`.
    template <class X>
    DEV void multiply(const mpad_gpu_args &a, const mpad_gpu_scale &scales, Acc &scaled, Acc &sum,
                      int at, X tokens) const
    {
        Stored<W> stored[GROUP * WEIGHT_CHUNKS];
        u4 chunk[GROUP * WEIGHT_CHUNKS];
        UNROLL for (int c = 0; c < GROUP * WEIGHT_CHUNKS; c++) stored[c] =
            w[at + c / WEIGHT_CHUNKS][c % WEIGHT_CHUNKS];
        chunks_decode<T, FORM>(a, chunk, stored);
        if constexpr (FORM::is_folded) {
            UNROLL for (int c = 0; c < GROUP * WEIGHT_CHUNKS; c++)
                chunk_fold<T>(chunk[c], scale[at + c % WEIGHT_CHUNKS]);
        }
        bool by_column = FORM::by_column(scales);
        Acc part = acc_zero();
        UNROLL for (int p = 0; p < GROUP; p++)
        {
            TokenFrag x = tokens(p);
            WeightFrag weights;
            UNROLL for (int i = 0; i < WEIGHT_CHUNKS; i++) weights.c[i] =
                chunk[p * WEIGHT_CHUNKS + i];
            if (!by_column) {
                slab<T>(sum, x, weights);
                continue;
            }
            slab<T>(part, x, weights);
            if ((p + 1) % SHARE == 0) {
                acc_scale(scaled, part, scale_value_as<W, FORM>(scales, scale[at + p + 1 - SHARE]));
                part = acc_zero();
            }
        }
    }
};
