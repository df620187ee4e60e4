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
    // Where a fragment takes 4 chunks a lane, 6 slabs fill the registers.
    constexpr int DEPTH = WEIGHT_CHUNKS < 4 || WANTED < 6 ? WANTED : 6;
    constexpr int FETCH = fetch_slabs<W, VECTOR>();
    static_assert(DEPTH % FETCH == 0, "whole fetches");
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
    constexpr bool SCALED = W::BITS < 16;
    constexpr int ITEM = SCALED ? 1 : 2; // bytes of a stored element
    Run weight_run[WEIGHT_CHUNKS], inter_run[TOKEN_CHUNKS];
    i64 scale_at = 0;  // of column column0 + lane % 16 of out
    u32 row_scale = 0; // where it is the same for all columns of W2
    int slab_first = 0, k_end = 0;
    bool have_scale = column0 + (lane & 15) < a.n_hidden;
    Buffer inter = buffer_make(a.inter, (u32)(a.n_pair * a.ld_inter) * 2);
    auto aim = [&](const Job &job, int slab, int slab_end) {
        Buffer weights =
            buffer_make((const char *)a.w2 + job.expert * a.w2_ld_expert * ITEM, (u32)a.w2_bytes);
        int end = slab_end * 32 < a.n_inter ? slab_end * 32 : a.n_inter;
        UNROLL for (int i = 0; i < WEIGHT_CHUNKS; i++)
        {
            int n = column0 + weight_row(i, lane), c = slab * 4 + weight_chunk(i, lane);
            weight_run[i] = run_make(weights, (u32)(n * a.w2_ld_row) * ITEM + c * W::BITS,
                                     n < a.n_hidden ? end - c * 8 : 0);
        }
        if constexpr (SCALED) {
            scale_at = scale_row(a.w2_scale, job.expert, 0, column0 + (lane & 15));
            slab_first = slab;
            k_end = end;
            if (!FORM::by_column(a.w2_scale))
                row_scale = scale_load(a.w2_scale, scale_at, 0, have_scale && slab * 32 < end);
        }
        // Lanes beyond the job's rows read its last row: their sums are never stored.
        UNROLL for (int i = 0; i < TOKEN_CHUNKS; i++)
        {
            int r = token_row(i, lane), c = slab * 4 + token_chunk(i, lane);
            int m = job.first + (r < job.rows ? r : job.rows - 1);
            inter_run[i] = run_make(inter, (u32)(m * (int)a.ld_inter) * 2 + c * 16, end - c * 8);
        }
    };
    struct Slab {
        Stored<W> w[WEIGHT_CHUNKS];
        u32 scale;
    };
    auto fetch_weights = [&](Slab &f, int s) {
        UNROLL for (int i = 0; i < WEIGHT_CHUNKS; i++) f.w[i] =
            run_stored<W, VECTOR>(weight_run[i], s);
        if (SCALED && FORM::by_column(a.w2_scale)) {
            int k = (slab_first + s) * 32;
            f.scale = scale_load_as<FORM>(a.w2_scale, scale_at, k, have_scale && k < k_end);
        }
    };
    auto fetch_inter = [&](TokenFrag &x, int s) {
        UNROLL for (int i = 0; i < TOKEN_CHUNKS; i++) x.c[i] =
            run_chunk<true, false>(inter_run[i], s);
    };

    Slab w[DEPTH];
    TokenFrag x[DEPTH];
    int j = wave, group = 0;
    bool any = j < n_job && n_slab > 0;
    Job job = {0, 0, 1};
    if (j < n_job)
        job = sorted_job(a, sorted, j);
    if (any) {
        aim(job, 0, n_each);
        UNROLL for (int i = 0; i < DEPTH; i++) fetch_weights(w[i], i);
    }
    launch_wait();
    if (any) {
        UNROLL for (int i = 0; i < DEPTH; i++) fetch_inter(x[i], i);
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
            Acc group_acc = acc_zero();
            UNROLL for (int i = 0; i < DEPTH; i += FETCH)
            {
                Stored<W> stored[FETCH * WEIGHT_CHUNKS];
                u4 chunk[FETCH * WEIGHT_CHUNKS];
                UNROLL for (int p = 0; p < FETCH * WEIGHT_CHUNKS; p++) stored[p] =
                    w[i + p / WEIGHT_CHUNKS].w[p % WEIGHT_CHUNKS];
                chunks_decode<T, FORM>(a, chunk, stored);
                UNROLL for (int p = 0; p < FETCH; p++)
                {
                    WeightFrag weights;
                    UNROLL for (int q = 0; q < WEIGHT_CHUNKS; q++) weights.c[q] =
                        chunk[p * WEIGHT_CHUNKS + q];
                    if (SCALED && FORM::by_column(a.w2_scale)) {
                        Acc part = acc_zero();
                        ::slab<T>(part, x[i + p], weights);
                        acc_scale(acc, part, scale_value_as<FORM>(a.w2_scale, w[i + p].scale));
                    } else
                        ::slab<T>(SCALED ? group_acc : acc, x[i + p], weights);
                }
                UNROLL for (int p = 0; p < FETCH; p++)
                {
                    fetch_weights(w[i + p], i + p);
                    fetch_inter(x[i + p], i + p);
                }
            }
            if (SCALED && !FORM::by_column(a.w2_scale))
                acc_scale(acc, group_acc, scale_value(a.w2_scale, this_scale));
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
        form_select<WEIGHTS>(a, a.w2_scale, [&](auto form) {                                       \
            down_stream<TYPE, WEIGHTS, VECTOR, DEPTH>(a, form);                                    \
        });                                                                                        \
    }
