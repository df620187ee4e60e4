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
    args_prefetch(a);
    launch_wait();
    launch_release();
    int n_run = (a.n_column_tile_down + a.run_down.n_tile - 1) / a.run_down.n_tile;
    int j = (int)block_id() / n_run, first = ((int)block_id() - j * n_run) * a.run_down.n_tile;
    if (j >= *a.n_job)
        return;
    int end = first + a.run_down.n_tile;
    end = end < a.n_column_tile_down ? end : a.n_column_tile_down;
    mpad_gpu_job job = a.job[j];
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
    decoded_select<T, W, false>(a, a.w2_scale,
                                [&](auto form) { t.template begin<decltype(form)>(first, end); });
    NO_UNROLL for (int tile = first; tile < end; tile++)
    {
        decoded_select<T, W, false>(a, a.w2_scale,
                                    [&](auto form) { t.template next<decltype(form)>(); });
        if (a.w2_bias) {
            float bias[2];
            UNROLL for (int h = 0; h < 2; h++)
            {
                int column = weights.column(tile, t.WAVES, h);
                bias[h] = column < a.n_hidden ? w2_bias(a, job.expert, column) : 0.f;
            }
            UNROLL for (int e = 0; e < N / 2; e++) t.sums[e] += bias[e / 2 % 2];
        }
        if (!a.is_weight_on_input) {
            UNROLL for (int e = 0; e < N / 2; e++)
            {
                int r = t.token_of(e);
                t.sums[e] *= r < job.rows ? a.pair_weight[job.first + r] : 0.f;
            }
        }
        // Lane q of four stores 8 columns of half q % 2, of the rows of tokens i + q / 2.
        int q = (int)(lane_id() & 3);
        int column = weights.column(tile, t.WAVES, q & 1) - (int)(lane_id() >> 2);
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
        MPAD_KERNEL(8 * WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                              \
        {                                                                                          \
            down_decoded<TYPE, WEIGHTS, ROWS, GROUPS, STAGES>(a);                                  \
        }
#else
#    define MPAD_DOWN_DECODED(NAME, TYPE, WEIGHTS, ROWS, GROUPS, STAGES, BLOCKS)
#endif
