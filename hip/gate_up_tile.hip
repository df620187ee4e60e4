// Level 5: the first product with activation, for many rows per expert: inter[position] = act(W13
// x), rounded where h is not to become codes.

#include "epilogue.h"
#include "route.h"
#include "tile_bytes.h"
#include "tile_stored.h"

DEV void put_floats(float *to, const float (&h)[8])
{
    *(f4 *)to = {h[0], h[1], h[2], h[3]};
    *(f4 *)(to + 4) = {h[4], h[5], h[6], h[7]};
}

// Grid: jobs at most times column tiles; block: WM x WN waves. A block multiplies a job's tokens
// with 64 gate rows and the same 64 up rows of W13, or with 128 rows where the layer is not gated.
// A lane holds gate and up of the same column. LDS: the tile's stages.
template <class T, class TILE> DEV void gate_up_tile(const mpad_gpu_args &a)
{
    args_prefetch(a);
    launch_wait();
    launch_release();
    int n_tile = a.n_column_tile_gate_up, j = (int)block_id() / n_tile;
    if (j >= *a.n_job)
        return;
    mpad_gpu_job job = a.job[j];
    int expert = wave_uniform(job.expert), first = wave_uniform(job.first);
    int rows = wave_uniform(job.rows);
    int column0 = ((int)block_id() - j * n_tile) * (a.is_gated ? TILE_HALF : TILE_B);

    TILE tile;
    constexpr bool CODED = TILE::IS_CODED;
    constexpr int ITEM = TILE::B_ITEM, BM = TILE::A_ROWS;
    tile.clear(a.n_hidden);
    i64 ld = CODED ? a.x.ld : a.ld_hidden;
    tile.a = buffer_make(CODED ? a.x.code : a.hidden,
                         (u32)(((a.n_token - 1) * ld + a.n_hidden) * TILE::A_ITEM));
    UNROLL for (int i = 0; i < tile.A_LOADS; i++)
    {
        int r = tile.a_index(i);
        bool ok = r < rows && r < BM;
        int token = ok ? pair_token(a, a.perm[first + r]) : 0;
        tile.a_row(i, ok, (u32)token * (u32)ld * TILE::A_ITEM);
    }
    if constexpr (CODED) {
        UNROLL for (int i = 0; i < tile.INPUT_LOADS; i++)
        {
            int r = tile.input_row_of(i);
            tile.input_at[i] =
                r < rows && r < BM ? pair_token(a, a.perm[first + r]) * a.x.n_group : -1;
        }
    }
    tile.b = buffer_make((const char *)a.w13 + expert * a.w13_ld_expert * ITEM, (u32)a.w13_bytes);
    int n = a.n_inter - column0;
    tile.b_rows((u32)(column0 * a.w13_ld_row), a.w13_ld_row,
                a.is_gated ? a.w13_up_offset : TILE_HALF * a.w13_ld_row, n,
                a.is_gated ? n : n - TILE_HALF);
    if constexpr (TILE::IS_SCALED)
        tile.scales(a.w13_scale, expert, 0, column0, n, a.is_gated,
                    a.is_gated ? column0 : column0 + TILE_HALF, a.is_gated ? n : n - TILE_HALF);
    tile.run(a, a.w13_scale, a.x);

    u16 *inter = (u16 *)a.inter + first * a.ld_inter * (CODED ? 2 : 1);
    tile.finish([&](int m, int n, float (&x)[8], float (&y)[8]) {
        if (m >= rows)
            return;
        int c = column0 + n, d = a.is_gated ? c : c + TILE_HALF;
        if (a.is_weight_on_input) {
            float weight = a.pair_weight[first + m];
            UNROLL for (int i = 0; i < 8; i++)
            {
                x[i] *= weight;
                y[i] *= weight;
            }
        }
        if (a.w13_bias) {
            UNROLL for (int i = 0; i < 8; i++)
            {
                x[i] += c + i < a.n_inter ? w13_bias(a, expert, c + i, 0) : 0.f;
                y[i] += d + i < a.n_inter ? w13_bias(a, expert, d + i, a.is_gated) : 0.f;
            }
        }
        activation_select(a, [&](auto act) {
            if (a.is_gated) {
                UNROLL for (int i = 0; i < 8; i++) x[i] = activate<act.value, true>(a, x[i], y[i]);
            } else {
                UNROLL for (int i = 0; i < 8; i++)
                {
                    x[i] = activate<act.value, false>(a, x[i], 0.f);
                    y[i] = activate<act.value, false>(a, y[i], 0.f);
                }
            }
        });
        if constexpr (CODED) {
            float *to = (float *)inter + m * a.ld_inter;
            if (c < a.ld_inter)
                put_floats(to + c, x);
            if (!a.is_gated && d < a.ld_inter)
                put_floats(to + d, y);
        } else {
            u16 *to = inter + m * a.ld_inter;
            if (c < a.ld_inter)
                *(u4 *)(to + c) = pack8<T>(x);
            if (!a.is_gated && d < a.ld_inter)
                *(u4 *)(to + d) = pack8<T>(y);
        }
    });
}

#if MPAD_HAVE_TILE
#    define MPAD_GATE_UP_TILE(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, STAGES, BLOCKS)             \
        MPAD_KERNEL((WM) * (WN) * WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                    \
        {                                                                                          \
            gate_up_tile<TYPE, StoredTile<TYPE, WEIGHTS, VECTOR, BM, WM, WN, STAGES, false>>(a);   \
        }
#    define MPAD_GATE_UP_CODED(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, BLOCKS)                    \
        MPAD_KERNEL((WM) * (WN) * WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                    \
        {                                                                                          \
            gate_up_tile<TYPE, StoredTile<TYPE, WEIGHTS, VECTOR, BM, WM, WN, 2, true>>(a);         \
        }
#else
#    define MPAD_GATE_UP_TILE(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, STAGES, BLOCKS)
#    define MPAD_GATE_UP_CODED(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, BLOCKS)
#endif
#if MPAD_HAVE_BYTES_TILE
#    define MPAD_GATE_UP_BYTES_TILE(NAME, TYPE, BM, WM, WN, BLOCKS)                                \
        MPAD_KERNEL((WM) * (WN) * WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                    \
        {                                                                                          \
            gate_up_tile<TYPE, ByteTile<TYPE, BM, WM, WN>>(a);                                     \
        }
#else
#    define MPAD_GATE_UP_BYTES_TILE(NAME, TYPE, BM, WM, WN, BLOCKS)
#endif
