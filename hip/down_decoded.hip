// Level 5: the second product of quantised weights that are decoded in registers: route[position] =
// weight * (W2 inter + b), rounded. The sum over a token's slots is combine.hip's.

#include "epilogue.h"
#include "route.h"
#include "tile_decoded.h"

#if MPAD_HAVE_WGMMA

// Grid: jobs at most times runs of column tiles of 128.
template <class T, class W, int N, int GROUPS, int STAGES>
DEV void down_decoded(const mpad_gpu_args &a)
{
    TileRun run;
    if (!run_begin(a, a.run_down, a.n_column_tile_down, run))
        return;
    mpad_gpu_job job = run.job;
    DecodedRows weights = {(const char *)a.w2 + job.expert * a.w2_ld_expert,
                           a.w2_scale,
                           job.expert,
                           a.n_hidden,
                           (u32)a.w2_ld_row,
                           0,
                           false};
    DecodedTile<T, W, N, GROUPS, STAGES> t(a, weights,
                                           (const u16 *)a.inter + job.first * a.ld_inter, a.n_inter,
                                           a.run_down.is_token_shared);
    UNROLL for (int i = 0; i < t.LOADS; i++)
    {
        int r = t.load_row(i);
        t.token_row(i, r < job.rows, (u32)r * (u32)a.ld_inter * 2);
    }
    decoded_select<T, W, false>(
        a, a.w2_scale, [&](auto form) { t.template begin<decltype(form)>(run.tile, run.end); });
    NO_UNROLL for (int tile = run.tile; tile < run.end; tile++)
    {
        decoded_select<T, W, false>(a, a.w2_scale,
                                    [&](auto form) { t.template next<decltype(form)>(); });
        if (a.w2_bias)
            t.add_by_column(tile, [&](int column, int) { return w2_bias(a, job.expert, column); });
        if (!a.is_weight_on_input)
            t.weigh(a, job);
        // Lane q of four stores 8 columns of half q % 2, of the rows of tokens i + q / 2.
        int q = (int)(lane_id() & 3);
        int column = weights.column(tile, q & 1) - (int)(lane_id() >> 2);
        UNROLL for (int i = 0; i < N / 8; i += 2)
        {
            u32 w[4];
            UNROLL for (int p = 0; p < 4; p++)
            {
                int e = 4 * (i + p / 2) + 2 * (p % 2);
                w[p] = wave_turn(pack_pair<T>(t.sums[e], t.sums[e + 1]));
            }
            u4 v = quad_turn(w[0], w[1], w[2], w[3]);
            int r = 8 * (i + q / 2) + (int)(lane_id() >> 2);
            if (r < job.rows && column < a.n_hidden)
                *(u4 *)((u16 *)a.route + (job.first + r) * a.ld_route + column) = v;
        }
    }
}

#    define MPAD_DOWN_DECODED(NAME, TYPE, WEIGHTS, ROWS, GROUPS, STAGES, BLOCKS)                   \
        MPAD_KERNEL(DECODED_THREADS, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                       \
        {                                                                                          \
            down_decoded<TYPE, WEIGHTS, ROWS, GROUPS, STAGES>(a);                                  \
        }
#else
#    define MPAD_DOWN_DECODED(NAME, TYPE, WEIGHTS, ROWS, GROUPS, STAGES, BLOCKS)
#endif
