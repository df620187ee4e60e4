// Level 5: the second product by warpgroup instructions, for many rows per expert: route[position]
// = weight * (W2 inter + b), rounded. The sum over a token's slots is combine.hip's.

#include "epilogue.h"
#include "route.h"
#include "tile_warpgroup_stored.h"

#if MPAD_HAVE_WGMMA

// Grid: jobs at most times runs of column tiles of 128; block: a warpgroup for each 64 rows of a
// job.
template <class T, class TILE> DEV void down_run(const mpad_gpu_args &a, const TileRun &run)
{
    mpad_gpu_job job = run.job;
    constexpr bool IS_PLAIN = TILE::IS_PLAIN;
    constexpr u32 TOKEN_ITEM = TILE::TOKEN_ITEM, ITEM = TILE::WEIGHT_ITEM;
    i64 ld = IS_PLAIN ? a.ld_inter : a.h.ld;
    TILE sums;
    sums.init((const char *)(IS_PLAIN ? a.inter : a.h.code) + job.first * ld * TOKEN_ITEM,
              a.n_inter * (int)TOKEN_ITEM, IS_PLAIN ? 0 : a.w2_scale.column_phase % 128,
              a.run_down.is_token_shared);
    UNROLL for (int i = 0; i < sums.A_LOADS; i++)
    {
        int r = sums.a_index(i);
        sums.a_row(i, r < job.rows, (u32)r * (u32)ld * TOKEN_ITEM);
    }
    TileRows weights = {(const char *)a.w2 + job.expert * a.w2_ld_expert * ITEM,
                        (u32)a.w2_ld_row * ITEM, (u32)(TILE_HALF * a.w2_ld_row) * ITEM, a.n_hidden,
                        TILE_B};
    TileScales scales = {a.w2_scale, a.h, job.expert * a.w2_scale.ld_expert, 0, {-1, -1}};
    UNROLL for (int i = 0; i < 2; i++)
    {
        int r = sums.lane_row(i);
        if (r < job.rows && !IS_PLAIN)
            scales.token_at[i] = (job.first + r) * a.h.n_group;
    }
    sums.run(a, weights, scales, run.tile, run.end, job.rows, [&](int t) {
        int column0 = t * TILE_B;
        if (a.w2_bias) {
            UNROLL for (int e = 0; e < 64; e++)
            {
                int column = column0 + sums.sum_column(e);
                sums.sum(e) += column < a.n_hidden ? w2_bias(a, job.expert, column) : 0.f;
            }
        }
        UNROLL for (int i = 0; i < 2; i++)
        {
            int r = sums.lane_row(i);
            u16 *to = (u16 *)a.route + (job.first + r) * a.ld_route + column0;
            int n_column = r < job.rows ? a.n_hidden - column0 : 0;
            float weight =
                n_column > 0 && !a.is_weight_on_input ? a.pair_weight[job.first + r] : 1.f;
            quad_store<T, TILE_B>(
                [&](int j, int p) { return sums.sum(4 * j + 2 * i + p) * weight; },
                [&](int column, u4 v) {
                    if (column < n_column)
                        *(u4 *)(to + column) = v;
                });
        }
    });
}

#    define MPAD_DOWN_WARPGROUP(NAME, TYPE, WEIGHTS, BM, STAGES, BLOCKS)                           \
        MPAD_KERNEL((BM) / 64 * 4 * WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                  \
        {                                                                                          \
            TileRun run;                                                                           \
            if (run_begin(a, a.run_down, a.n_column_tile_down, run))                               \
                down_run<TYPE, typename WarpgroupTileOf<TYPE, WEIGHTS, BM, STAGES>::Tile>(a, run); \
        }
#    define MPAD_DOWN_BYTES(NAME, TYPE, BM, STAGES, BLOCKS)                                        \
        MPAD_KERNEL((BM) / 64 * 4 * WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                  \
        {                                                                                          \
            TileRun run;                                                                           \
            if (run_begin(a, a.run_down, a.n_column_tile_down, run))                               \
                bytes_select(a, [&](auto kind) {                                                   \
                    down_run<TYPE, WarpgroupTile<decltype(kind), BM, STAGES>>(a, run);             \
                });                                                                                \
        }
#else
#    define MPAD_DOWN_WARPGROUP(NAME, TYPE, WEIGHTS, BM, STAGES, BLOCKS)
#    define MPAD_DOWN_BYTES(NAME, TYPE, BM, STAGES, BLOCKS)
#endif
