/* Level 8: the products of all formats of quantised weights. A kernel file includes this once,
 * after cpu_types.h, and after it has defined bytes_any_up_to, e2m1_value and i4_value for its
 * vectors. */
#if VECTOR_BYTES == 64
enum { STORED_STREAM_ROWS = 8 };
#    define STORED_ROWS 4
#else
enum { STORED_STREAM_ROWS = 6 };
#    define STORED_ROWS 2
#endif
#include "cpu_stored_stream.h"

/* LANES / 2 times p[0], as often p[1]. */
INLINE vf vf_repeat2(const float *p)
{
    vf v = vf_load(p);
#if VECTOR_BYTES == 64
    return __builtin_shufflevector(v, v, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
#elif VECTOR_BYTES == 32
    return __builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1);
#else
    return __builtin_shufflevector(v, v, 0, 0, 1, 1);
#endif
}

/* LANES / 4 times each of p[0] to p[3]. */
INLINE vf vf_repeat4(const float *p)
{
    vf v = vf_load(p);
#if VECTOR_BYTES == 64
    return __builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
#elif VECTOR_BYTES == 32
    return __builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3);
#else
    return v;
#endif
}

/* An 8-bit float's bits where those of a float32 are: sign, then exponent and mantissa. */
INLINE vu float8_bits(vu z, int j, int shift, uint32_t mask)
{
    return (vu)((vi)(z << (24 - 8 * j)) >> shift) & mask;
}

/* OR-ing high bits into the exponent makes a number that is normal, and right but for a power of
 * two, for every code with an exponent. Codes without one, and those that stand for NaN or
 * infinity, come here: the first n_small are multiples of `smallest`. */
INLINE vf float8_special(vu bits, int shift, uint32_t high, float smallest, uint32_t n_small,
                         uint32_t infinity, uint32_t nan, bool is_negative_zero_nan)
{
    const vu code = (bits & 0x7FFFFFFF) >> shift, sign = bits & 0x80000000;
    vf v = (vf)(bits | high);
    vf small = (vf)((vu)(__builtin_convertvector((vi)code, vf) * smallest) | sign);
    v = vf_select((vi)code < (int32_t)n_small, small, v);
    v = vf_select((vi)code == (int32_t)infinity, (vf)(sign | 0x7F800000), v);
    vi is_nan = (vi)code >= (int32_t)nan;
    if (is_negative_zero_nan)
        is_nan |= (vi)(bits == 0x80000000);
    return (vf)((vu)v | ((vu)is_nan & 0x7FC00000));
}

typedef uint8_t vb __attribute__((vector_size(VECTOR_BYTES)));

/* Whether a byte's lower seven bits, counted from `first` and around, are among `n`. */
INLINE bool bytes_any_from(vu z, uint8_t first, uint8_t n)
{
    vb twice = (vb)z + (vb)z;
    return bytes_any_up_to((vu)(twice - (uint8_t)(2 * first)), (uint8_t)(2 * (n - 1)));
}

#define FOUR_PLANES(F) F(0) F(1) F(2) F(3)
#define EIGHT_PLANES(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)

/* Codes 0 to 7 have no exponent, 0x7F is NaN. */
#define FORMAT e4m3fn
#define PLANES FOUR_PLANES
#define N_PLANE 4
#define UNIT 0x1p8f
#define WEIGHT(z, j) ((vf)(float8_bits((z), (j), 4, 0x87F00000) | 0x38000000))
#define IS_SPECIAL(z) bytes_any_from((z), 0x7F, 9)
#define SPECIAL_WEIGHT(z, j)                                                                       \
    float8_special(float8_bits((z), (j), 4, 0x87F00000), 20, 0x38000000, 0x1p-17f, 8, 0x80, 0x7F,  \
                   false)
#include "cpu_stored.h"

/* Codes 0 to 7 have no exponent, minus 0 is NaN. */
#define FORMAT e4m3fnuz
#define PLANES FOUR_PLANES
#define N_PLANE 4
#define UNIT 0x1p7f
#define WEIGHT(z, j) ((vf)(float8_bits((z), (j), 4, 0x87F00000) | 0x38000000))
#define IS_SPECIAL(z) bytes_any_from((z), 0, 8)
#define SPECIAL_WEIGHT(z, j)                                                                       \
    float8_special(float8_bits((z), (j), 4, 0x87F00000), 20, 0x38000000, 0x1p-17f, 8, 0x80, 0x80,  \
                   true)
#include "cpu_stored.h"

/* Codes 0 to 3 have no exponent, 0x7C is infinity, NaN from there on. */
#define FORMAT e5m2
#define PLANES FOUR_PLANES
#define N_PLANE 4
#define UNIT 0x1p16f
#define WEIGHT(z, j) ((vf)(float8_bits((z), (j), 3, 0x8FE00000) | 0x30000000))
#define IS_SPECIAL(z) bytes_any_from((z), 0x7C, 8)
#define SPECIAL_WEIGHT(z, j)                                                                       \
    float8_special(float8_bits((z), (j), 3, 0x8FE00000), 21, 0x30000000, 0x1p-32f, 4, 0x7C, 0x7D,  \
                   false)
#include "cpu_stored.h"

#define FORMAT i8
#define PLANES FOUR_PLANES
#define N_PLANE 4
#define UNIT 1.0f
#define WEIGHT(z, j) __builtin_convertvector((vi)((z) << (24 - 8 * (j))) >> 24, vf)
#define IS_SPECIAL(z) false
#define SPECIAL_WEIGHT WEIGHT
#include "cpu_stored.h"

#define FORMAT e2m1
#define PLANES EIGHT_PLANES
#define N_PLANE 8
#define UNIT 1.0f
#define WEIGHT(z, j) e2m1_value((z) >> (4 * (j)))
#define IS_SPECIAL(z) false
#define SPECIAL_WEIGHT WEIGHT
#include "cpu_stored.h"

#define FORMAT i4
#define PLANES EIGHT_PLANES
#define N_PLANE 8
#define UNIT 1.0f
#define WEIGHT(z, j) i4_value((z) >> (4 * (j)))
#define IS_SPECIAL(z) false
#define SPECIAL_WEIGHT WEIGHT
#include "cpu_stored.h"

#define PLANES(element, dtype)                                                                     \
    static void planes_take_##element(const mpad_cpu_rows *rows, int64_t row, const void *source)  \
    {                                                                                              \
        planes_take(rows, row, source, dtype);                                                     \
    }                                                                                              \
    static void planes_activate_##element(const mpad_cpu_activation *a)                            \
    {                                                                                              \
        planes_activate(a, dtype);                                                                 \
    }
PLANES(f32, MPAD_DTYPE_F32)
PLANES(bf16, MPAD_DTYPE_BF16)
PLANES(f16, MPAD_DTYPE_F16)
#undef PLANES

#define PLANE_KERNELS(element)                                                                     \
    {                                                                                              \
        .x_bytes = 4,                                                                              \
        .take_row = planes_take_##element,                                                         \
        .activate = planes_activate_##element,                                                     \
        .give_row = give_row_##element,                                                            \
        .spin = float_spin,                                                                        \
    }

#define STORED_KERNELS                                                                             \
    .planes_f32 = PLANE_KERNELS(f32), .planes_bf16 = PLANE_KERNELS(bf16),                          \
    .planes_f16 = PLANE_KERNELS(f16),                                                              \
    .multiply_stored = {                                                                           \
        [MPAD_CPU_E4M3FN] = multiply_e4m3fn, [MPAD_CPU_E4M3FNUZ] = multiply_e4m3fnuz,              \
        [MPAD_CPU_E5M2] = multiply_e5m2,     [MPAD_CPU_I8] = multiply_i8,                          \
        [MPAD_CPU_E2M1] = multiply_e2m1,     [MPAD_CPU_I4] = multiply_i4,                          \
    }
