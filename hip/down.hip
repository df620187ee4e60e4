// Level 4: the second product with the sum over slots, for few rows per expert: out = sum of weight
// * (W2 h + b). No partial result leaves the block.

#include "epilogue.h"
#include "mma.h"
#include "route.h"
#include "stored.h"

// Grid: ceil(n_hidden / 16) blocks; block: MPAD_STREAM_WAVES waves. A block owns 16 columns of out
// for all tokens; wave w takes jobs w, w + waves, ... and leaves each weighted slot result in LDS
// by position, so that the sum over a token's slots has the order of the positions whatever the
// jobs' split. A wave keeps one group of up to DEPTH slabs of W2 and of inter on the way, across
// job borders. LDS: the sorted order, results [n_pair][16] float.
template <class T, class W, bool VECTOR, int WANTED, class FORM>
DEV void down_stream(const mpad_gpu_args &a, FORM)
{
    // Slabs whose fragments of weights and tokens leave a lane the registers for the rest.
    constexpr int FITS = flight_depth<W, FORM>(WANTED);
    constexpr int MOST = 176 / (4 * (WEIGHT_CHUNKS + TOKEN_CHUNKS));
    constexpr int DEPTH = FITS < MOST ? FITS : MOST;
    typedef Flight<T, W, VECTOR, FORM, DEPTH> Weights;
    constexpr int GROUP = Weights::GROUP;
    constexpr int WAVES = MPAD_STREAM_WAVES, THREADS = WAVES * WAVE, COLUMNS = MPAD_STREAM_COLUMNS;
    args_prefetch(a);
    launch_release();
    int t = (int)thread_id(), lane = (int)lane_id(), wave = wave_id();
    int column0 = (int)block_id() * COLUMNS;
    Lds lds = lds_base();
    int n_inline = a.is_sorted ? 0 : a.n_pair;
    Sorted sorted = sorted_make(lds, n_inline, a.n_expert);
    Lds results = lds + mpad_lds_sort(n_inline, a.n_expert);

    // The routing was complete before the kernel that writes inter let this one start.
    if (!a.is_sorted)
        sort_inline<THREADS>(a, sorted);
    int n_job = sorted_count(a, sorted);

    int n_slab = (a.n_inter + 31) / 32, n_group = (n_slab + DEPTH - 1) / DEPTH;
    int n_each = n_group ? (n_slab + n_group - 1) / n_group : 0;
    n_each = (n_each + GROUP - 1) / GROUP * GROUP;
    constexpr bool SCALED = W::BITS < 16;
    constexpr int ITEM = SCALED ? 1 : 2; // bytes of a stored element
    Weights w;
    Run inter_run[TOKEN_CHUNKS];
    u32 row_scale = 0; // of column column0 + lane % 16 of out, where it is the same for all of W2
    Buffer inter = buffer_make(a.inter, (u32)(a.n_pair * a.ld_inter) * 2);
    auto aim = [&](const Job &job, int slab, int slab_end) {
        Buffer weights =
            buffer_make((const char *)a.w2 + job.expert * a.w2_ld_expert * ITEM, (u32)a.w2_bytes);
        int end = slab_end * 32 < a.n_inter ? slab_end * 32 : a.n_inter, left = end - slab * 32;
        UNROLL for (int i = 0; i < WEIGHT_CHUNKS; i++)
        {
            int n = column0 + weight_row(i, lane);
            w.run[i] =
                run_make(weights, (u32)(n * a.w2_ld_row) * ITEM + slab * 4 * W::BITS + w.lane_at(i),
                         n < a.n_hidden ? left - w.lane_k(i) : 0);
        }
        if constexpr (SCALED) {
            w.k = slab * 32;
            w.end = end;
            UNROLL for (int i = 0; i < w.SCALE_ROWS; i++)
            {
                int n = column0 + w.lane_scale_row(i);
                n = n < a.n_hidden ? n : a.n_hidden - 1; // no other row's are read
                w.scale_at[i] = scale_row(a.w2_scale, job.expert, 0, n);
            }
            if (FORM::by_row(a.w2_scale))
                row_scale = scale_load(a.w2_scale, w.scale_at[0], 0, true);
        }
        // Lanes beyond the job's rows read its last row: their sums are never stored.
        UNROLL for (int i = 0; i < TOKEN_CHUNKS; i++)
        {
            int r = token_row(i, lane), first = w.token_chunk_of(i, 0) * 8;
            int m = job.first + (r < job.rows ? r : job.rows - 1);
            inter_run[i] =
                run_make(inter, (u32)(m * (int)a.ld_inter + slab * 32 + first) * 2, left - first);
        }
    };
    TokenFrag x[DEPTH];
    auto fetch_inter = [&](int at) { // those of the group at w[at]
        UNROLL for (int p = 0; p < GROUP; p++) UNROLL for (int i = 0; i < TOKEN_CHUNKS; i++)
        {
            int chunk = at * 4 + w.token_chunk_of(i, p) - w.token_chunk_of(i, 0);
            x[at + p].c[i] = run_chunk<true, false>(inter_run[i], chunk);
        }
    };

    int j = wave, group = 0;
    bool any = j < n_job && n_slab > 0;
    Job job = {0, 0, 1};
    if (j < n_job)
        job = sorted_job(a, sorted, j);
    if (any) {
        aim(job, 0, n_each);
        UNROLL for (int i = 0; i < DEPTH; i += GROUP) w.fetch(a.w2_scale, i, i);
    }
    launch_wait();
    if (any) {
        UNROLL for (int i = 0; i < DEPTH; i += GROUP) fetch_inter(i);
    }
    Acc acc = acc_zero();
    NO_UNROLL while (j < n_job)
    {
        bool last = group + 1 >= n_group;
        int next_j = last ? j + WAVES : j, next_group = last ? 0 : group + 1;
        Job next = job;
        if (last && next_j < n_job)
            next = sorted_job(a, sorted, next_j);
        if (n_slab > 0) {
            int slab = next_group * n_each, slab_end = slab + n_each;
            u32 this_scale = row_scale;
            aim(next, slab, next_j >= n_job ? slab : slab_end);
            Acc sum = acc_zero();
            UNROLL for (int i = 0; i < DEPTH; i += GROUP)
            {
                w.multiply(a, a.w2_scale, acc, SCALED && !FORM::is_folded ? sum : acc, i,
                           [&](int p) { return x[i + p]; });
                w.fetch(a.w2_scale, i, i);
                fetch_inter(i);
            }
            if (FORM::by_row(a.w2_scale))
                acc_scale(acc, sum, scale_value(a.w2_scale, this_scale));
        }
        if (last) {
            UNROLL for (int i = 0; i < ACC; i++)
            {
                int m = acc_token(i, lane), n = acc_row(i, lane);
                if (m < job.rows && column0 + n < a.n_hidden) {
                    float weight =
                        a.is_weight_on_input ? 1.f : sorted_weight(a, sorted, job.first + m);
                    lds_write<float>(results + ((job.first + m) * COLUMNS + n) * 4,
                                     (acc.v[i] + w2_bias(a, job.expert, column0 + n)) * weight);
                }
            }
            acc = acc_zero();
        }
        j = next_j;
        group = next_group;
        job = next;
    }
    block_barrier(); // results of all waves are there

    for (int i = t; i < a.n_token_pad * COLUMNS; i += THREADS) {
        int token = i / COLUMNS, n = i - token * COLUMNS, column = column0 + n;
        bool is_real = token < a.n_token && column < a.n_hidden;
        float sum = 0.f;
        for (int q = 0; is_real && q < a.n_topk; q++) {
            int at = sorted_slot(a, sorted, token * a.n_topk + q);
            if (at < 0)
                break;
            sum += lds_read<float>(results + (at * COLUMNS + n) * 4);
        }
        if (column < a.n_hidden)
            ((u16 *)a.out)[token * a.ld_out + column] = T::from_float(sum * a.routed_scaling);
    }
    // The pad columns, by the last block.
    if (block_id() + 1 == block_count() && a.n_hidden_pad > a.n_hidden) {
        int n = a.n_hidden_pad - a.n_hidden;
        for (i64 i = t; i < (i64)a.n_token_pad * n; i += THREADS)
            ((u16 *)a.out)[i / n * a.ld_out + a.n_hidden + i % n] = 0;
    }
}

#define MPAD_DOWN_STREAM(NAME, TYPE, WEIGHTS, VECTOR, DEPTH, BLOCKS)                               \
    MPAD_KERNEL(MPAD_STREAM_WAVES *WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                   \
    {                                                                                              \
        form_select<TYPE, WEIGHTS, VECTOR>(a, a.w2_scale, a.is_w2_wide, [&](auto form) {           \
            down_stream<TYPE, WEIGHTS, VECTOR, DEPTH>(a, form);                                    \
        });                                                                                        \
    }
