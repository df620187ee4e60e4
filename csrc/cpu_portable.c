/* Level 9: the kernels in C alone, for processors none of the other files is for: 16-byte vectors,
 * which the compiler makes of whatever the target has. */
#define VECTOR_BYTES 16
#define FLOAT_TILE_ROWS(n_row) 2
#define HALF_TILE_ROWS 2
#define STREAM_ROWS(is_long, is_plain) (4 << ((is_long) + (is_plain)))
#define PANEL_ROWS 6
#include "cpu_scalar.h"
#include "cpu_vector.h"

INLINE vf vf_multiply_add(vf a, vf b, vf sum)
{
    return sum + a * b;
}

INLINE void vf_transpose(vf *v)
{
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            float swapped = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = swapped;
        }
}

INLINE void vf_turn(vf *v, const char *const *rows, int64_t at)
{
    for (int i = 0; i < LANES; i++)
        v[i] = vf_load(rows[i] + at);
    vf_transpose(v);
}

INLINE v4 vf_reduce4(vf a, vf b, vf c, vf d)
{
    v4 sum0 = {a[0], b[0], c[0], d[0]}, sum1 = {a[1], b[1], c[1], d[1]};
    v4 sum2 = {a[2], b[2], c[2], d[2]}, sum3 = {a[3], b[3], c[3], d[3]};
    return (sum0 + sum2) + (sum1 + sum3);
}

INLINE vf vf_even(vf low, vf high)
{
    return (vf){low[0], low[2], high[0], high[2]};
}

INLINE vf vf_odd(vf low, vf high)
{
    return (vf){low[1], low[3], high[1], high[3]};
}

/* To nearest, ties to even. */
static uint16_t f16_round(float value)
{
    const uint32_t infinity = 0x7F800000, too_large = 0x477FF000, smallest_normal = 0x38800000;
    const float subnormal_shift = 0.5f; /* its last bit is the smallest subnormal f16 */
    uint32_t bits, sign;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits > infinity)
        return (uint16_t)(sign | 0x7E00 | (bits >> 13 & 0x3FF));
    if (bits >= too_large)
        return (uint16_t)(sign | 0x7C00);
    if (bits < smallest_normal) {
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += subnormal_shift;
        memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3F000000));
    }
    return (uint16_t)(sign | (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13);
}

INLINE vf f16_load(const void *p)
{
    uint16_t half[LANES];
    memcpy(half, p, sizeof half);
    return (vf){f16_value(half[0]), f16_value(half[1]), f16_value(half[2]), f16_value(half[3])};
}

INLINE void f16_store(void *p, vf v)
{
    uint16_t half[LANES];
    for (int i = 0; i < LANES; i++)
        half[i] = f16_round(v[i]);
    memcpy(p, half, sizeof half);
}

INLINE void bf16_store(void *p, vf v)
{
    *(vh_any *)p = __builtin_convertvector(bf16_round(v) >> 16, vh);
}

typedef uint8_t vb_16 __attribute__((vector_size(16)));
typedef uint64_t vl_16 __attribute__((vector_size(16)));

INLINE bool bytes_any_up_to(vu bytes, uint8_t limit)
{
    vl_16 found = (vl_16)((vb_16)bytes <= limit);
    return (found[0] | found[1]) != 0;
}

/* Of the lowest four bits of each lane. Twice the value of codes 0 and 1 is that of 2 and 3, less
 * one. */
INLINE vf e2m1_value(vu code)
{
    vf shifted = (vf)(((code & 7) << 22) + (126u << 23));
    vf magnitude = vf_select((vi)(code & 6) == 0, 2 * shifted - 1, shifted);
    return (vf)((vu)magnitude | (code << 28 & 0x80000000));
}

INLINE vf i4_value(vu code)
{
    return __builtin_convertvector((vi)(code << 28 ^ 0x80000000) >> 28, vf);
}

#include "cpu_types.h"

#include "cpu_formats.h"

const mpad_cpu_isa_kernels mpad_cpu_portable = {
    .f32 = KERNELS(f32, 4, float_spin),
    .bf16 = KERNELS(bf16, 4, float_spin),
    .f16 = KERNELS(f16, 4, float_spin),
    STORED_KERNELS,
    .read = vector_read,
};
