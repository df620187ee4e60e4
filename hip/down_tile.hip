// Level 5: the second product for many rows per expert: route[position] = weight * (W2 inter + b),
// rounded. The sum over a token's slots is combine.hip's.

#include "epilogue.h"
#include "route.h"
#include "tile_bytes.h"
#include "tile_stored.h"

// Grid: jobs at most times column tiles of 128; block: WM x WN waves. LDS: the tile's stages.
template <class T, class TILE> DEV void down_tile(const mpad_gpu_args &a)
{
    args_prefetch(a);
    launch_wait();
    launch_release();
    int n_tile = a.n_column_tile_down, j = (int)block_id() / n_tile;
    if (j >= *a.n_job)
        return;
    mpad_gpu_job job = a.job[j];
    int expert = wave_uniform(job.expert), first = wave_uniform(job.first);
    int rows = wave_uniform(job.rows), column0 = ((int)block_id() - j * n_tile) * TILE_B;

    TILE tile;
    constexpr bool CODED = TILE::IS_CODED;
    constexpr int ITEM = TILE::B_ITEM;
    tile.clear(a.n_inter);
    i64 ld = CODED ? a.h.ld : a.ld_inter;
    tile.a = buffer_make((const typename TILE::Input *)(CODED ? a.h.code : a.inter) + first * ld,
                         (u32)(rows * ld) * TILE::A_ITEM);
    UNROLL for (int i = 0; i < tile.A_LOADS; i++)
    {
        int r = tile.a_index(i);
        tile.a_row(i, r < rows, (u32)(r * (int)ld) * TILE::A_ITEM);
    }
    if constexpr (CODED) {
        UNROLL for (int i = 0; i < tile.INPUT_LOADS; i++)
        {
            int r = tile.input_row_of(i);
            tile.input_at[i] = r < rows ? (first + r) * a.h.n_group : -1;
        }
    }
    tile.b = buffer_make((const char *)a.w2 + expert * a.w2_ld_expert * ITEM, (u32)a.w2_bytes);
    int n = a.n_hidden - column0;
    tile.b_rows((u32)(column0 * a.w2_ld_row), a.w2_ld_row, TILE_HALF * a.w2_ld_row, n,
                n - TILE_HALF);
    if constexpr (TILE::IS_SCALED)
        tile.scales(a.w2_scale, expert, 0, column0, n, 0, column0 + TILE_HALF, n - TILE_HALF);
    tile.run(a, a.w2_scale, a.h);

    u16 *route = (u16 *)a.route + first * a.ld_route;
    tile.finish([&](int m, int n, float (&x)[8], float (&y)[8]) {
        if (m >= rows)
            return;
        float weight = a.is_weight_on_input ? 1.f : a.pair_weight[first + m];
        int c = column0 + n, d = c + TILE_HALF;
        if (a.w2_bias) {
            UNROLL for (int i = 0; i < 8; i++)
            {
                x[i] += c < a.n_hidden ? w2_bias(a, expert, c + i) : 0.f;
                y[i] += d < a.n_hidden ? w2_bias(a, expert, d + i) : 0.f;
            }
        }
        UNROLL for (int i = 0; i < 8; i++)
        {
            x[i] *= weight;
            y[i] *= weight;
        }
        u16 *to = route + m * a.ld_route;
        if (c < a.n_hidden)
            *(u4 *)(to + c) = pack8<T>(x);
        if (d < a.n_hidden)
            *(u4 *)(to + d) = pack8<T>(y);
    });
}

#if MPAD_HAVE_TILE
#    define MPAD_DOWN_TILE(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, STAGES, BLOCKS)                \
        MPAD_KERNEL((WM) * (WN) * WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                    \
        {                                                                                          \
            down_tile<TYPE, StoredTile<TYPE, WEIGHTS, VECTOR, BM, WM, WN, STAGES, false>>(a);      \
        }
#    define MPAD_DOWN_CODED(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, BLOCKS)                       \
        MPAD_KERNEL((WM) * (WN) * WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                    \
        {                                                                                          \
            down_tile<TYPE, StoredTile<TYPE, WEIGHTS, VECTOR, BM, WM, WN, 2, true>>(a);            \
        }
#else
#    define MPAD_DOWN_TILE(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, STAGES, BLOCKS)
#    define MPAD_DOWN_CODED(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, BLOCKS)
#endif
#if MPAD_HAVE_BYTES_TILE
#    define MPAD_DOWN_BYTES_TILE(NAME, TYPE, BM, WM, WN, BLOCKS)                                   \
        MPAD_KERNEL((WM) * (WN) * WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                    \
        {                                                                                          \
            down_tile<TYPE, ByteTile<TYPE, BM, WM, WN>>(a);                                        \
        }
#else
#    define MPAD_DOWN_BYTES_TILE(NAME, TYPE, BM, WM, WN, BLOCKS)
#endif
