/* Level 9: the kernels of bf16 for AVX512-BF16, whose instruction multiplies pairs of bf16 and adds
 * both products to a float32, and for AVX512-VBMI, which finds quantised weights' values in tables.
 * It takes subnormal inputs as zero and flushes subnormal results. */
#define STREAM_ROWS(is_long, is_plain) (10 << ((is_long) + (is_plain)))
#define PANEL_ROWS 8
#include "cpu_vector512.h"

INLINE vf pairs_multiply_add(vu a, vu b, vf sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

#define ELEMENT bf16
#define ELEMENT_BYTES 2
#define STEP (2 * LANES)
#define TILE_ROWS(n_row) 6
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

#include "cpu_pairs.h"

const mpad_cpu_pair_kernels mpad_cpu_avx512bf16 = {
    .bf16 =
        {
            .x_bytes = 2,
            .take_row = take_row_bf16,
            .multiply = multiply_bf16,
            .activate = activate_bf16,
            .give_row = give_row_bf16,
            .spin = pairs_spin,
        },
    .stored =
        {
            .x_bytes = 2,
            .take_row = pairs_take_row,
            .activate = pairs_activate,
            .give_row = give_row_bf16,
            .spin = pairs_spin,
        },
    .multiply_stored =
        {
#define X(NAME, name, bits, planes) [MPAD_CPU_##NAME] = pairs_multiply_##name,
            MPAD_CPU_FORMAT_LIST(X)
#undef X
        },
};
