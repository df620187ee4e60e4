// Level 5: the first product with activation, of quantised weights that are decoded in registers:
// inter[position] = act(W13 x), rounded.

#include "epilogue.h"
#include "route.h"
#include "tile_decoded.h"

#if MPAD_HAVE_WGMMA

// Grid: jobs at most times runs of column tiles. A tile is 64 columns of gate and up, or 128 where
// the layer is not gated: a lane has gate and up of a column.
template <class T, class W, int N, int GROUPS, int STAGES>
DEV void gate_up_decoded(const mpad_gpu_args &a)
{
    TileRun run;
    if (!run_begin(a, a.run_gate_up, a.n_column_tile_gate_up, run))
        return;
    mpad_gpu_job job = run.job;
    DecodedRows weights = {(const char *)a.w13 + job.expert * a.w13_ld_expert,
                           a.w13_scale,
                           job.expert,
                           a.n_inter,
                           (u32)a.w13_ld_row,
                           (u32)a.w13_up_offset,
                           a.is_gated != 0};
    DecodedTile<T, W, N, GROUPS, STAGES> t(a, weights, a.hidden, a.n_hidden,
                                           a.run_gate_up.is_token_shared);
    UNROLL for (int i = 0; i < t.LOADS; i++)
    {
        int r = t.load_row(i);
        int token = r < job.rows ? pair_token(a, a.perm[job.first + r]) : 0;
        t.token_row(i, r < job.rows, (u32)token * (u32)a.ld_hidden * 2);
    }
    decoded_select<T, W, false>(
        a, a.w13_scale, [&](auto form) { t.template begin<decltype(form)>(run.tile, run.end); });
    NO_UNROLL for (int tile = run.tile; tile < run.end; tile++)
    {
        decoded_select<T, W, false>(a, a.w13_scale,
                                    [&](auto form) { t.template next<decltype(form)>(); });
        if (a.is_weight_on_input)
            t.weigh(a, job);
        if (a.w13_bias)
            t.add_by_column(tile, [&](int column, int half) {
                return w13_bias(a, job.expert, column, a.is_gated && half);
            });
        activation_select(a, [&](auto act) {
            UNROLL for (int e = 0; e < N / 2; e++)
            {
                if (!a.is_gated)
                    t.sums[e] = activate<act.value, false>(a, t.sums[e], 0.f);
                else if (e / 2 % 2 == 0)
                    t.sums[e] = activate<act.value, true>(a, t.sums[e], t.sums[e + 2]);
            }
        });
        UNROLL for (int h = 0; h < 2; h++)
        {
            int column = weights.column(tile, h) - (int)(lane_id() >> 2) + 2 * (int)(lane_id() & 3);
            UNROLL for (int i = 0; i < N / 8; i++)
            {
                u32 pair =
                    wave_turn(pack_pair<T>(t.sums[4 * i + 2 * h], t.sums[4 * i + 2 * h + 1]));
                int r = 8 * i + (int)(lane_id() >> 2);
                if (r < job.rows && column < a.ld_inter && (h == 0 || !a.is_gated))
                    *(u32 *)((u16 *)a.inter + (job.first + r) * a.ld_inter + column) = pair;
            }
        }
    }
}

#    define MPAD_GATE_UP_DECODED(NAME, TYPE, WEIGHTS, ROWS, GROUPS, STAGES, BLOCKS)                \
        MPAD_KERNEL(DECODED_THREADS, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                       \
        {                                                                                          \
            gate_up_decoded<TYPE, WEIGHTS, ROWS, GROUPS, STAGES>(a);                               \
        }
#else
#    define MPAD_GATE_UP_DECODED(NAME, TYPE, WEIGHTS, ROWS, GROUPS, STAGES, BLOCKS)
#endif
