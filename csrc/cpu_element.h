/* Level 5: the kernels of one element type for one instruction set; cpu_types.h includes this once
 * per type, after these macros, all undefined again at the end:
 *
 *   ELEMENT          f32, bf16 or f16: the suffix of the functions, and what rounds
 *   ELEMENT_BYTES    of one weight
 *   STEP             elements of k that are converted together
 *   TILE_ROWS(n_row) most rows of x in a tile of cpu_stream.h, of so many
 *   X                type of a vector of x; X_BYTES of one element
 *   x_load(p)        a vector of x at p; x_spread(p): the 4 bytes at p in every lane
 *   TAKE(p, x)       STEP elements at p to the vectors of x at x
 *   ROUND(h, x)      STEP floats in vectors h to the element type, as vectors of x at x
 *   GIVE(p, h)       one float vector rounded to the element type at p
 *   PHASES(F)        F(phase) for each vector of x in a step
 *   WEIGHT(p, phase) the weights that go with that vector, of the step at p
 *   MULTIPLY_ADD(w, x, sum)
 *   TURN(v, w, at)   STEP weights at each of w[0..LANES) + at as LANES vectors of 4-byte lanes, a
 *                    lane per row of w
 *   TURNED(p, v)     such a vector to its place or places in a panel
 */

#define PASTE2(a, b) a##_##b
#define PASTE(a, b) PASTE2(a, b)
#define NAME(function) PASTE(function, ELEMENT)

enum {
    NAME(STEP_BYTES) = STEP * ELEMENT_BYTES,
    NAME(STEPS_PER_LINE) = 64 / (STEP * ELEMENT_BYTES) > 0 ? 64 / (STEP * ELEMENT_BYTES) : 1,
};

#include "cpu_panel.h"
#include "cpu_stream.h"

/* Turning w into panels costs more than streams do up to so many rows: more of them where a
 * stream's sums are long, or need no conversions. */
static void NAME(multiply)(const mpad_cpu_product *p)
{
    const int is_long = p->x->n_k >= 512, is_plain = X_BYTES == ELEMENT_BYTES;
    if (p->n_row <= STREAM_ROWS(is_long, is_plain))
        NAME(stream_multiply)(p);
    else
        NAME(panel_multiply)(p);
}

/* Where element k of a row lies; k is a multiple of MPAD_CPU_K_STEP. */
INLINE char *NAME(row_at)(const mpad_cpu_rows *rows, int64_t row, int64_t k)
{
    return rows->data + k / rows->k_block * rows->ld_block + row * rows->ld_row +
           k % rows->k_block * X_BYTES;
}

static void NAME(take_row)(const mpad_cpu_rows *rows, int64_t row, const void *source)
{
    const int64_t n_whole = rows->n_k / STEP * STEP;
    for (int64_t k = 0; k < rows->n_k; k += MPAD_CPU_K_STEP) {
        char *x = NAME(row_at)(rows, row, k);
        for (int64_t s = 0; s < MPAD_CPU_K_STEP; s += STEP) {
            const char *from = (const char *)source + (k + s) * ELEMENT_BYTES;
            char padded[STEP * ELEMENT_BYTES] = {0};
            if (k + s >= n_whole) {
                if (k + s < rows->n_k)
                    memcpy(padded, from, (size_t)((rows->n_k - n_whole) * ELEMENT_BYTES));
                from = padded;
            }
            TAKE(from, x + s * X_BYTES);
        }
    }
}

static void NAME(activate)(const mpad_cpu_activation *a)
{
    for (int64_t n = 0; n < a->n_column; n += MPAD_CPU_K_STEP) {
        char *x = NAME(row_at)(a->h, a->row, a->first + n);
        for (int64_t s = 0; s < MPAD_CPU_K_STEP; s += STEP) {
            vf h[STEP / LANES];
            for (int i = 0; i < STEP / LANES; i++) {
                int64_t at = n + s + i * LANES;
                h[i] = (vf){0};
                if (at < a->n_column) {
                    vi is_inside = vi_count() < (int32_t)(a->n_column - at);
                    h[i] = vf_select(is_inside, activation(a, at), h[i]);
                }
            }
            ROUND(h, x + s * X_BYTES);
        }
    }
}

static void NAME(give_row)(void *target, const float *sum, int64_t n, float scale)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        GIVE((char *)target + i * ELEMENT_BYTES, vf_load(sum + i) * scale);
    if (i < n) {
        float rest[LANES] = {0};
        char rounded[LANES * ELEMENT_BYTES];
        memcpy(rest, sum + i, (size_t)(n - i) * sizeof(float));
        GIVE(rounded, vf_load(rest) * scale);
        memcpy((char *)target + i * ELEMENT_BYTES, rounded, (size_t)((n - i) * ELEMENT_BYTES));
    }
}

#undef PASTE2
#undef PASTE
#undef NAME
#undef ELEMENT
#undef ELEMENT_BYTES
#undef STEP
#undef TILE_ROWS
#undef X
#undef X_BYTES
#undef x_load
#undef x_spread
#undef TAKE
#undef ROUND
#undef GIVE
#undef PHASES
#undef WEIGHT
#undef MULTIPLY_ADD
#undef TURN
#undef TURNED
