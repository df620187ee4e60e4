/* Level 9: the kernels for AVX-512 (F, BW, VL, DQ). */
#define VECTOR_BYTES 64
#define FLOAT_TILE_ROWS 6
#define HALF_TILE_ROWS 6
#define STREAM_ROWS 10
#define PANEL_ROWS 8
#include "cpu_vector.h"

#include <immintrin.h>

/* In one of its three forms: a compiler free to choose moves accumulators between registers. */
INLINE vf vf_multiply_add(vf a, vf b, vf sum)
{
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

/* In four rounds of pairs: lanes, pairs of lanes, quarters, halves. */
INLINE void vf_transpose(vf *v)
{
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0xEE);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            a[8 * j + i] = _mm512_shuffle_f32x4(b[8 * j + i], b[8 * j + i + 4], 0x88);
            a[8 * j + i + 4] = _mm512_shuffle_f32x4(b[8 * j + i], b[8 * j + i + 4], 0xDD);
        }
    for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xDD);
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
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
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

INLINE vf f16_load(const void *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

INLINE void f16_store(void *p, vf v)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

INLINE void bf16_store(void *p, vf v)
{
    __m512i high = (__m512i)(bf16_round(v) >> 16);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(high));
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
