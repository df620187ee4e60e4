/* Level 6: the kernels of all three element types by float32 arithmetic: every weight is made a
 * float32, exactly, on its way from memory into a multiply-add. A kernel file includes this once,
 * after it has defined vf_multiply_add, vf_reduce4, vf_transpose, vf_turn, vf_even, vf_odd,
 * f16_load, f16_store and bf16_store for its vectors. */

/* f32: x as it is. */
#define ELEMENT f32
#define ELEMENT_BYTES 4
#define STEP LANES
#define TILE_ROWS(n_row) FLOAT_TILE_ROWS(n_row)
#define X vf
#define X_BYTES 4
#define x_load vf_load
#define x_spread(p) vf_all(*(const float *)(p))
#define TAKE(p, x) vf_store((x), vf_load(p))
#define ROUND(h, x) vf_store((x), (h)[0])
#define GIVE vf_store
#define PHASES(F) F(0)
#define WEIGHT(p, phase) vf_load(p)
#define MULTIPLY_ADD vf_multiply_add
#define TURN vf_turn
#define TURNED vf_store
#include "cpu_element.h"

/* f16: x as f32. */
#define ELEMENT f16
#define ELEMENT_BYTES 2
#define STEP LANES
#define TILE_ROWS(n_row) HALF_TILE_ROWS
#define X vf
#define X_BYTES 4
#define x_load vf_load
#define x_spread(p) vf_all(*(const float *)(p))
#define TAKE(p, x) vf_store((x), f16_load(p))
#define ROUND(h, x)                                                                                \
    do {                                                                                           \
        uint16_t rounded_[LANES];                                                                  \
        f16_store(rounded_, (h)[0]);                                                               \
        vf_store((x), f16_load(rounded_));                                                         \
    } while (0)
#define GIVE f16_store
#define PHASES(F) F(0)
#define WEIGHT(p, phase) f16_load(p)
#define MULTIPLY_ADD vf_multiply_add
#define TURN(v, w, at)                                                                             \
    do {                                                                                           \
        for (int row_ = 0; row_ < LANES; row_++)                                                   \
            (v)[row_] = f16_load((w)[row_] + (at));                                                \
        vf_transpose(v);                                                                           \
    } while (0)
#define TURNED vf_store
#include "cpu_element.h"

/* bf16: a vector of pairs gives its even elements by a shift and its odd ones by a mask, so x lies
 * as f32 in the order [LANES even][LANES odd]. */
#define ELEMENT bf16
#define ELEMENT_BYTES 2
#define STEP (2 * LANES)
#define TILE_ROWS(n_row) HALF_TILE_ROWS
#define X vf
#define X_BYTES 4
#define x_load vf_load
#define x_spread(p) vf_all(*(const float *)(p))
#define TAKE(p, x)                                                                                 \
    do {                                                                                           \
        vu pairs_ = vu_load(p);                                                                    \
        vf_store((x), bf16_even(pairs_));                                                          \
        vf_store((x) + VECTOR_BYTES, bf16_odd(pairs_));                                            \
    } while (0)
#define ROUND(h, x)                                                                                \
    do {                                                                                           \
        vf low_ = (vf)bf16_round((h)[0]), high_ = (vf)bf16_round((h)[1]);                          \
        vf_store((x), vf_even(low_, high_));                                                       \
        vf_store((x) + VECTOR_BYTES, vf_odd(low_, high_));                                         \
    } while (0)
#define GIVE bf16_store
#define PHASES(F) F(0) F(1)
#define WEIGHT(p, phase) ((phase) ? bf16_odd(vu_load(p)) : bf16_even(vu_load(p)))
#define MULTIPLY_ADD vf_multiply_add
#define TURN vf_turn
#define TURNED(p, v)                                                                               \
    do {                                                                                           \
        vf_store((p), bf16_even((vu)(v)));                                                         \
        vf_store((p) + LANES * 2 * VECTOR_BYTES, bf16_odd((vu)(v)));                               \
    } while (0)
#include "cpu_element.h"

/* Twelve independent chains hide the latency of the multiply-add. */
static double float_spin(int64_t n_iteration)
{
    enum { N_CHAIN = 12 };
    vf a = vf_all(0.999f), b = vf_all(0.001f), sum[N_CHAIN];
    for (int c = 0; c < N_CHAIN; c++)
        sum[c] = vf_all((float)c);
    for (int64_t i = 0; i < n_iteration; i++)
        for (int c = 0; c < N_CHAIN; c++)
            sum[c] = vf_multiply_add(sum[c], a, b);
    for (int c = 1; c < N_CHAIN; c++)
        sum[0] += sum[c];
    float lanes[LANES];
    vf_store(lanes, sum[0]);
    return lanes[0] < 0 ? 0 : (double)n_iteration * (2 * N_CHAIN * LANES);
}

static uint64_t vector_read(const void *data, int64_t n_bytes)
{
    enum { N_STREAM = 4 };
    vu all[N_STREAM] = {{0}};
    for (int64_t i = 0; i < n_bytes; i += N_STREAM * VECTOR_BYTES)
        for (int s = 0; s < N_STREAM; s++)
            all[s] ^= vu_load((const char *)data + i + s * VECTOR_BYTES);
    vu mixed = all[0] ^ all[1] ^ all[2] ^ all[3];
    uint64_t folded = 0;
    for (int i = 0; i < LANES; i++)
        folded += mixed[i];
    return folded;
}

#define KERNELS(element, x_bytes_, spin_)                                                          \
    {                                                                                              \
        .x_bytes = (x_bytes_),                                                                     \
        .take_row = take_row_##element,                                                            \
        .multiply = multiply_##element,                                                            \
        .activate = activate_##element,                                                            \
        .give_row = give_row_##element,                                                            \
        .spin = (spin_),                                                                           \
    }
