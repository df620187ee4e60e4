/* Level 5: what any of the kernel files for AVX-512 needs of its vectors: turns, sums across, and
 * conversions to and from 16 bits. */
#ifndef MPAD_CPU_VECTOR512_H
#define MPAD_CPU_VECTOR512_H

#define VECTOR_BYTES 64
#include "cpu_vector.h"

#include <immintrin.h>

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

/* n bytes at p as lanes, then zeros; at most LANES of them. */
INLINE vu bytes_some(const void *p, int64_t n)
{
    const __mmask16 inside = n >= LANES ? 0xFFFF : (__mmask16)((1u << n) - 1);
    return (vu)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(inside, p));
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

#endif
