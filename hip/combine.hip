// Level 4: out[token] = scaling * sum of the token's rows of route, in float32, in the order of the
// positions.

#include "memory.h"

// Grid: n_token_pad times ceil(n_hidden_pad / (8 * threads)) blocks, columns inner; block:
// MPAD_COMBINE_THREADS. A thread owns 8 columns of one token.
template <class T> DEV void combine(const mpad_gpu_args &a)
{
    constexpr int WIDTH = 8 * MPAD_COMBINE_THREADS;
    args_prefetch(a);
    launch_wait();
    launch_release();
    int n_tile = (a.n_hidden_pad + WIDTH - 1) / WIDTH;
    int token = (int)block_id() / n_tile, tile = (int)block_id() - token * n_tile;
    int column = tile * WIDTH + (int)thread_id() * 8;
    if (column >= a.n_hidden_pad)
        return;
    float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    if (token < a.n_token && column < a.n_hidden) {
        const int *slot = a.slot + token * a.n_topk;
        const u16 *route = (const u16 *)a.route + column;
        constexpr int AHEAD = 8;
        for (int q0 = 0; q0 < a.n_topk; q0 += AHEAD) {
            u4 v[AHEAD];
            UNROLL for (int q = 0; q < AHEAD; q++)
            {
                int at = q0 + q < a.n_topk ? slot[q0 + q] : -1;
                v[q] = at >= 0 ? *(const u4 *)(route + at * a.ld_route) : u4_zero();
            }
            UNROLL for (int q = 0; q < AHEAD; q++) UNROLL for (int i = 0; i < 4; i++)
            {
                sum[2 * i] += T::to_float((u16)v[q][i]);
                sum[2 * i + 1] += T::to_float((u16)(v[q][i] >> 16));
            }
        }
    }
    u16 *out = (u16 *)a.out + token * a.ld_out + column;
    float scaling = a.routed_scaling;
    if (column + 8 <= a.n_hidden_pad && ((u64)out & 15) == 0) {
        u4 v;
        UNROLL for (int i = 0; i < 4; i++) v[i] =
            pack_pair<T>(sum[2 * i] * scaling, sum[2 * i + 1] * scaling);
        *(u4 *)out = v;
    } else {
        UNROLL for (int i = 0; i < 8; i++)
        {
            if (column + i < a.n_hidden_pad)
                out[i] = T::from_float(sum[i] * scaling);
        }
    }
}

#define MPAD_COMBINE(NAME, TYPE)                                                                   \
    MPAD_KERNEL(MPAD_COMBINE_THREADS, 1) NAME(MPAD_ARGS mpad_gpu_args a)                           \
    {                                                                                              \
        combine<TYPE>(a);                                                                          \
    }
