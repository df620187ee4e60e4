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

// What a kernel's inner loop knows of its weights when it is compiled: whether they are integers,
// and how their scales go. Where the target has a loop per form, nothing is left to run time:
// branches would keep the compiler from having the work of several slabs overlap.
enum { SCALE_ROW, SCALE_COLUMN_E8M0, SCALE_COLUMN_FLOAT }; // one a row; by column of that type
constexpr int AT_RUN_TIME = -1;
template <int INTEGER, int SCALE> struct Form {
    static constexpr int scale = SCALE;
    static DEV bool is_integer(const mpad_gpu_args &a)
    {
        return INTEGER == AT_RUN_TIME ? a.is_weight_integer != 0 : INTEGER != 0;
    }
    static DEV bool by_column(const mpad_gpu_scale &s)
    {
        return SCALE == AT_RUN_TIME ? s.ld_column != 0 : SCALE != SCALE_ROW;
    }
};

// Calls f with the form of the call's weights, of which `scale` has the scales.
template <class W, class F>
DEV void form_select(const mpad_gpu_args &a, const mpad_gpu_scale &scale, F f)
{
    if constexpr (W::BITS == 16)
        return f(Form<false, SCALE_ROW>());
    else if constexpr (!LOOP_PER_FORM)
        return f(Form<AT_RUN_TIME, AT_RUN_TIME>());
    else if constexpr (W::BITS == 8) {
        if (a.is_weight_integer)
            return f(Form<true, SCALE_ROW>());
        if (scale.ld_column == 0)
            return f(Form<false, SCALE_ROW>());
        if (scale.type == MPAD_GPU_E8M0)
            return f(Form<false, SCALE_COLUMN_E8M0>());
        return f(Form<false, SCALE_COLUMN_FLOAT>());
    } else {
        if (a.is_weight_integer)
            return f(Form<true, SCALE_COLUMN_FLOAT>());
        return f(Form<false, SCALE_COLUMN_E8M0>());
    }
}

// Two stored values of a chunk, in the high bytes of the halves of a word, and of which the low
// bytes do not count.
DEV u32 chunk_pair(const Stored<Bytes> &s, int i)
{
    return i & 1 ? bytes_twice<2, 3>(s.x[i / 2], 0) : bytes_twice<0, 1>(s.x[i / 2], 0);
}

template <class T, bool INTEGER> DEV u4 chunk_decode(const mpad_gpu_args &, const Stored<Plain> &s)
{
    return __builtin_bit_cast(u4, s);
}

// Floats that are NaN or infinite become finite: see chunk_special.
template <class T, bool INTEGER> DEV u4 chunk_decode(const mpad_gpu_args &a, const Stored<Bytes> &s)
{
    u4 c;
    UNROLL for (int i = 0; i < 4; i++)
    {
        u32 v = chunk_pair(s, i);
        c[i] = INTEGER ? integer_pair<T>(v & 0x007f007fu, v & 0x00800080u)
                       : float_pair<T>(a.stored_float, v);
    }
    return c;
}

template <class T, bool INTEGER>
DEV u4 chunk_decode(const mpad_gpu_args &a, const Stored<Nibbles> &s)
{
    u32 even = s.x[0] << 4 & 0xf0f0f0f0u, odd = s.x[0] & 0xf0f0f0f0u;
    u32 v[4] = {bytes_twice<0, 4>(even, odd), bytes_twice<1, 5>(even, odd),
                bytes_twice<2, 6>(even, odd), bytes_twice<3, 7>(even, odd)};
    u4 c;
    UNROLL for (int i = 0; i < 4; i++) c[i] =
        INTEGER ? integer_pair<T>(v[i] >> 4 & 0x000f000fu, 0x00080008u)
                : float_pair<T>(a.stored_float, v[i]);
    return c;
}

// Bits that are set where a chunk has a NaN or an infinity; and the chunk's correction then.
template <class W> DEV u32 chunk_special(const mpad_gpu_args &a, const Stored<W> &s)
{
    if constexpr (W::BITS == 8)
        return float_special(a.stored_float, s.x[0]) | float_special(a.stored_float, s.x[1]);
    return 0;
}
template <class W> DEV void chunk_correct(const mpad_gpu_args &a, u4 &c, const Stored<W> &s)
{
    if constexpr (W::BITS == 8) {
        Stored<Bytes> special = {
            {float_special(a.stored_float, s.x[0]), float_special(a.stored_float, s.x[1])}};
        UNROLL for (int i = 0; i < 4; i++) c[i] |=
            (chunk_pair(special, i) >> 7 & 0x00010001u) * a.stored_float.special;
    }
}

// N chunks that wait for no branch but one.
template <class T, class FORM, class W, int N>
DEV void chunks_decode(const mpad_gpu_args &a, u4 (&c)[N], const Stored<W> (&s)[N])
{
    if (FORM::is_integer(a)) {
        UNROLL for (int i = 0; i < N; i++) c[i] = chunk_decode<T, true>(a, s[i]);
        return;
    }
    u32 special = 0;
    UNROLL for (int i = 0; i < N; i++)
    {
        c[i] = chunk_decode<T, false>(a, s[i]);
        special |= chunk_special(a, s[i]);
    }
    if (special) {
        UNROLL for (int i = 0; i < N; i++) chunk_correct(a, c[i], s[i]);
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
DEV float e8m0_value(u32 stored) // 2^(byte - 127)
{
    return bits_float(stored == 255 ? 0x7fc00000u : stored == 0 ? 0x00400000u : stored << 23);
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
template <class FORM> DEV u32 scale_load_as(const mpad_gpu_scale &s, i64 row, int k, bool ok)
{
    i64 i = row + (i64)((s.column_phase + k) >> s.column_log2) * s.ld_column;
    if constexpr (FORM::scale == SCALE_COLUMN_E8M0)
        return ok ? ((const u8 *)s.data)[i] : 0;
    else if constexpr (FORM::scale == SCALE_COLUMN_FLOAT)
        return !ok                      ? 0
               : s.type == MPAD_GPU_F32 ? ((const u32 *)s.data)[i]
                                        : ((const u16 *)s.data)[i];
    else
        return scale_load(s, row, k, ok);
}
template <class FORM> DEV float scale_value_as(const mpad_gpu_scale &s, u32 stored)
{
    if constexpr (FORM::scale == SCALE_COLUMN_E8M0)
        return e8m0_value(stored);
    else if constexpr (FORM::scale == SCALE_COLUMN_FLOAT)
        return s.type == MPAD_GPU_F32    ? bits_float(stored)
               : s.type == MPAD_GPU_BF16 ? Bf16::to_float((u16)stored)
                                         : F16::to_float((u16)stored);
    else
        return scale_value(s, stored);
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
