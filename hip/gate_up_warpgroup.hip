// Level 5: the first product with activation by warpgroup instructions, for many rows per expert:
// inter[position] = act(W13 x), rounded where h is not to become codes.

#include "epilogue.h"
#include "route.h"
#include "tile_warpgroup_stored.h"

#if MPAD_HAVE_WGMMA

// Grid: jobs at most times runs of column tiles; block: a warpgroup for each 64 rows of a job. A
// tile is 64 gate rows and the same 64 up rows of W13, or 128 rows where the layer is not gated: a
// lane has the sums of gate and up of the same columns.
template <class T, class TILE> DEV void gate_up_run(const mpad_gpu_args &a, const TileRun &run)
{
    mpad_gpu_job job = run.job;
    constexpr bool IS_PLAIN = TILE::IS_PLAIN;
    constexpr u32 ITEM = TILE::WEIGHT_ITEM;
    i64 ld = IS_PLAIN ? a.ld_hidden : a.x.ld;
    TILE sums;
    sums.init(IS_PLAIN ? a.hidden : a.x.code, a.n_hidden * (int)TILE::TOKEN_ITEM, 0,
              a.run_gate_up.is_token_shared);
    UNROLL for (int i = 0; i < sums.A_LOADS; i++)
    {
        int r = sums.a_index(i);
        int token = r < job.rows ? pair_token(a, a.perm[job.first + r]) : 0;
        sums.a_row(i, r < job.rows, (u32)token * (u32)ld * TILE::TOKEN_ITEM);
    }
    TileRows weights = {(const char *)a.w13 + job.expert * a.w13_ld_expert * ITEM,
                        (u32)a.w13_ld_row * ITEM,
                        (u32)(a.is_gated ? a.w13_up_offset : TILE_HALF * a.w13_ld_row) * ITEM,
                        a.n_inter, a.is_gated ? TILE_HALF : TILE_B};
    TileScales scales = {
        a.w13_scale, a.x, job.expert * a.w13_scale.ld_expert, a.is_gated, {-1, -1}};
    UNROLL for (int i = 0; i < 2; i++)
    {
        int r = sums.lane_row(i);
        if (r < job.rows && !IS_PLAIN)
            scales.token_at[i] = pair_token(a, a.perm[job.first + r]) * a.x.n_group;
    }
    sums.run(a, weights, scales, run.tile, run.end, job.rows, [&](int t) {
        int column0 = t * weights.width;
        float weight[2] = {1.f, 1.f};
        UNROLL for (int i = 0; i < 2; i++)
        {
            int r = sums.lane_row(i);
            if (a.is_weight_on_input && r < job.rows)
                weight[i] = a.pair_weight[job.first + r];
        }
        UNROLL for (int e = 0; e < 64; e++) sums.sum(e) *= weight[e / 2 % 2];
        if (a.w13_bias) {
            UNROLL for (int e = 0; e < 64; e++)
            {
                int half = a.is_gated && e >= 32;
                int column = column0 + sums.sum_column(e) - half * TILE_HALF;
                sums.sum(e) += column < a.n_inter ? w13_bias(a, job.expert, column, half) : 0.f;
            }
        }
        activation_select(a, [&](auto act) {
            if (a.is_gated) {
                UNROLL for (int e = 0; e < 32; e++) sums.sum(e) =
                    activate<act.value, true>(a, sums.sum(e), sums.sum(e + 32));
            } else {
                UNROLL for (int e = 0; e < 64; e++) sums.sum(e) =
                    activate<act.value, false>(a, sums.sum(e), 0.f);
            }
        });
        UNROLL for (int i = 0; i < 2; i++)
        {
            int r = sums.lane_row(i);
            char *to =
                (char *)a.inter + ((job.first + r) * a.ld_inter + column0) * (IS_PLAIN ? 2 : 4);
            int n_column = r < job.rows ? (int)a.ld_inter - column0 : 0;
            auto value = [&](int j, int p) { return sums.sum(4 * j + 2 * i + p); };
            auto put = [&](int column, u4 v) {
                if (column < n_column)
                    *(u4 *)(to + column * 2) = v;
            };
            if constexpr (IS_PLAIN) {
                quad_store<T, TILE_HALF>(value, put);
                if (!a.is_gated)
                    quad_store<T, TILE_HALF>([&](int j, int p) { return value(8 + j, p); },
                                             [&](int column, u4 v) { put(TILE_HALF + column, v); });
            } else {
                UNROLL for (int j = 0; j < 16; j++)
                {
                    int column = 8 * j + 2 * (int)(lane_id() & 3);
                    if (column < n_column && (j < 8 || !a.is_gated))
                        *(f2 *)(to + column * 4) = {value(j, 0), value(j, 1)};
                }
            }
        }
    });
}

#    define MPAD_GATE_UP_WARPGROUP(NAME, TYPE, WEIGHTS, BM, STAGES, BLOCKS)                        \
        MPAD_KERNEL((BM) / 64 * 4 * WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                  \
        {                                                                                          \
            TileRun run;                                                                           \
            if (run_begin(a, a.run_gate_up, a.n_column_tile_gate_up, run))                         \
                gate_up_run<TYPE, typename WarpgroupTileOf<TYPE, WEIGHTS, BM, STAGES>::Tile>(a,    \
                                                                                             run); \
        }
#    define MPAD_GATE_UP_BYTES(NAME, TYPE, BM, STAGES, BLOCKS)                                     \
        MPAD_KERNEL((BM) / 64 * 4 * WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                  \
        {                                                                                          \
            TileRun run;                                                                           \
            if (run_begin(a, a.run_gate_up, a.n_column_tile_gate_up, run))                         \
                bytes_select(a, [&](auto kind) {                                                   \
                    gate_up_run<TYPE, WarpgroupTile<decltype(kind), BM, STAGES>>(a, run);          \
                });                                                                                \
        }
#else
#    define MPAD_GATE_UP_WARPGROUP(NAME, TYPE, WEIGHTS, BM, STAGES, BLOCKS)
#    define MPAD_GATE_UP_BYTES(NAME, TYPE, BM, STAGES, BLOCKS)
#endif
