/* Level 9: the kernels for AVX2 with FMA and F16C. */
#define VECTOR_BYTES 32
#define FLOAT_TILE_ROWS(n_row) ((n_row) > 4 ? 3 : 4)
#define HALF_TILE_ROWS 6
#define STREAM_ROWS(is_long, is_plain) ((is_long) ? 24 : 6 << (is_plain))
#define PANEL_ROWS 6
#include "cpu_vector.h"

#include <immintrin.h>

INLINE vf vf_multiply_add(vf a, vf b, vf sum)
{
    return _mm256_fmadd_ps(a, b, sum);
}

/* The same of registers, in one form of three, for tiles that take them all: a compiler free to
 * choose loads an operand for each use and moves accumulators. */
INLINE vf vf_multiply_add_tight(vf a, vf b, vf sum)
{
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
}
#define MULTIPLY_ADD_TIGHT vf_multiply_add_tight

INLINE void vf_transpose(vf *v)
{
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xEE);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

/* Transposes LANES floats at rows[] + at: halves of two rows meet as they are loaded, which leaves
 * two transpositions of four lanes, within halves. */
INLINE void vf_turn(vf *v, const char *const *rows, int64_t at)
{
    for (int half = 0; half < 2; half++) {
        __m256 a[4], b[4];
        for (int i = 0; i < 4; i++) {
            const float *low = (const float *)(rows[i] + at) + 4 * half;
            const float *high = (const float *)(rows[i + 4] + at) + 4 * half;
            a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)),
                                        _mm_loadu_ps(high), 1);
        }
        for (int i = 0; i < 4; i += 2) {
            b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
            b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
        }
        for (int i = 0; i < 2; i++) {
            v[4 * half + 2 * i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
            v[4 * half + 2 * i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
        }
    }
}

INLINE v4 vf_reduce4(vf a, vf b, vf c, vf d)
{
    __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

/* Of the 16 floats in low and high. */
INLINE vf vf_even(vf low, vf high)
{
    __m256d halves = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(halves, 0xD8));
}

INLINE vf vf_odd(vf low, vf high)
{
    __m256d halves = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xDD));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(halves, 0xD8));
}

INLINE vf f16_load(const void *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

INLINE void f16_store(void *p, vf v)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

INLINE void bf16_store(void *p, vf v)
{
    __m256i high = (__m256i)(bf16_round(v) >> 16);
    __m128i half =
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128((__m128i *)p, half);
}

INLINE bool bytes_any_up_to(vu bytes, uint8_t limit)
{
    __m256i lower = _mm256_min_epu8((__m256i)bytes, _mm256_set1_epi8((char)limit));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(lower, (__m256i)bytes)) != 0;
}

/* Of the lowest four bits of each lane. */
INLINE vf e2m1_value(vu code)
{
    const __m256 magnitudes = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
    __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, (__m256i)code);
    return (vf)((vu)magnitude | (code << 28 & 0x80000000));
}

INLINE vf i4_value(vu code)
{
    return __builtin_convertvector((vi)(code << 28 ^ 0x80000000) >> 28, vf);
}

#include "cpu_types.h"

#include "cpu_formats.h"

const mpad_cpu_isa_kernels mpad_cpu_avx2 = {
    .f32 = KERNELS(f32, 4, float_spin),
    .bf16 = KERNELS(bf16, 4, float_spin),
    .f16 = KERNELS(f16, 4, float_spin),
    STORED_KERNELS,
    .read = vector_read,
};
