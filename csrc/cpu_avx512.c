/* Level 9: the kernels for AVX-512 (F, BW, VL, DQ). */
#define FLOAT_TILE_ROWS(n_row) 6
#define HALF_TILE_ROWS 6
#define STREAM_ROWS(is_long, is_plain) (10 << ((is_long) + (is_plain)))
#define PANEL_ROWS 8
#include "cpu_vector512.h"

/* In one of its three forms: a compiler free to choose moves accumulators between registers. */
INLINE vf vf_multiply_add(vf a, vf b, vf sum)
{
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

/* Of the 32 floats in low and high. */
INLINE vf vf_even(vf low, vf high)
{
    return _mm512_permutex2var_ps(low, (__m512i)(vi_count() * 2), high);
}

INLINE vf vf_odd(vf low, vf high)
{
    return _mm512_permutex2var_ps(low, (__m512i)(vi_count() * 2 + 1), high);
}

INLINE bool bytes_any_up_to(vu bytes, uint8_t limit)
{
    return _mm512_cmple_epu8_mask((__m512i)bytes, _mm512_set1_epi8((char)limit)) != 0;
}

/* Of the lowest four bits of each lane. */
INLINE vf e2m1_value(vu code)
{
    const __m512 values =
        _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    return _mm512_permutexvar_ps((__m512i)code, values);
}

INLINE vf i4_value(vu code)
{
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps((__m512i)code, values);
}

#include "cpu_types.h"

#include "cpu_formats.h"

const mpad_cpu_isa_kernels mpad_cpu_avx512 = {
    .f32 = KERNELS(f32, 4, float_spin),
    .bf16 = KERNELS(bf16, 4, float_spin),
    .f16 = KERNELS(f16, 4, float_spin),
    STORED_KERNELS,
    .read = vector_read,
};
