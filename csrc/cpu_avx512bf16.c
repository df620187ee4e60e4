/* Level 9: the kernels of bf16 for AVX512-BF16, whose instruction multiplies pairs of bf16 and adds
 * both products to a float32. It takes subnormal inputs as zero and flushes subnormal results. */
#define VECTOR_BYTES 64
#define STREAM_ROWS 10
#define PANEL_ROWS 8
#include "cpu_vector.h"

#include <immintrin.h>

INLINE vf pairs_multiply_add(vu a, vu b, vf sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
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

INLINE void bf16_store(void *p, vf v)
{
    __m512i high = (__m512i)(bf16_round(v) >> 16);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(high));
}

#define ELEMENT bf16
#define ELEMENT_BYTES 2
#define STEP (2 * LANES)
#define TILE_ROWS 6
#define X vu
#define X_BYTES 2
#define x_load vu_load
#define x_spread(p) ((vu){0} + *(const uint32_t *)(p))
#define TAKE(p, x) memcpy((x), (p), VECTOR_BYTES)
#define ROUND(h, x)                                                                                \
    do {                                                                                           \
        bf16_store((x), (h)[0]);                                                                   \
        bf16_store((x) + VECTOR_BYTES / 2, (h)[1]);                                                \
    } while (0)
#define GIVE bf16_store
#define PHASES(F) F(0)
#define WEIGHT(p, phase) vu_load(p)
#define MULTIPLY_ADD pairs_multiply_add
#define TURN vf_turn
#define TURNED vf_store
#include "cpu_element.h"

static double pairs_spin(int64_t n_iteration)
{
    enum { N_CHAIN = 12, FLOPS = 4 * LANES };
    vu a = (vu)vf_all(0.5f), b = (vu)vf_all(0.25f);
    vf sum[N_CHAIN];
    for (int c = 0; c < N_CHAIN; c++)
        sum[c] = vf_all((float)c);
    for (int64_t i = 0; i < n_iteration; i++)
        for (int c = 0; c < N_CHAIN; c++)
            sum[c] = pairs_multiply_add(a, b, sum[c]);
    for (int c = 1; c < N_CHAIN; c++)
        sum[0] += sum[c];
    return sum[0][0] < 0 ? 0 : (double)n_iteration * (N_CHAIN * FLOPS);
}

const mpad_cpu_kernels mpad_cpu_avx512bf16 = {
    .x_bytes = 2,
    .take_row = take_row_bf16,
    .multiply = multiply_bf16,
    .activate = activate_bf16,
    .give_row = give_row_bf16,
    .spin = pairs_spin,
};
