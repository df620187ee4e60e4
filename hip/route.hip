// Level 4: the pairs (token, slot) sorted by expert, stable, and the list of jobs, for all regimes
// but decode (which sorts inside its kernels). Integer counts only: the result does not depend on
// the order of waves or blocks.

#include "route.h"

// Pairs of this block, and of its wave: contiguous ranges.
struct RouteRange {
    int begin, end;
};
DEV RouteRange route_range(const mpad_gpu_args &a, int n_wave)
{
    int b = (int)block_id(), n = (int)block_count();
    int begin = (int)((i64)a.n_pair * b / n), end = (int)((i64)a.n_pair * (b + 1) / n);
    int w = wave_id(), size = end - begin;
    return {begin + (int)((i64)size * w / n_wave), begin + (int)((i64)size * (w + 1) / n_wave)};
}

// Counts the wave's pairs by expert in its own row of LDS; ends with a barrier.
DEV void route_histogram(const mpad_gpu_args &a, Lds table, RouteRange range, int n_wave,
                         int n_token)
{
    int t = (int)thread_id(), n_thread = (int)block_threads();
    for (int i = t; i < n_wave * a.n_expert; i += n_thread)
        lds_write<int>(table + i * 4, 0);
    block_barrier(); // zeros before counts
    Lds row = table + wave_id() * a.n_expert * 4;
    for (int p = range.begin + (int)lane_id(); p < range.end; p += WAVE) {
        int e = pair_expert(a, p, n_token);
        if (e != NO_EXPERT)
            lds_add(row + e * 4, 1);
    }
    block_barrier(); // counts are complete
}

// Grid: n_sort_block; block: waves. count[block][expert] = pairs of the block's range.
DEV void route_count(const mpad_gpu_args &a)
{
    args_prefetch(a);
    launch_wait();
    launch_release();
    int n_wave = (int)block_threads() / WAVE;
    Lds table = lds_base();
    route_histogram(a, table, route_range(a, n_wave), n_wave, token_count(a));
    for (int e = (int)thread_id(); e < a.n_expert; e += (int)block_threads()) {
        int n = 0;
        UNROLL_8 for (int w = 0; w < n_wave; w++) n +=
            lds_read<int>(table + (w * a.n_expert + e) * 4);
        a.count[(int)block_id() * a.n_expert + e] = n;
    }
}

// Grid: n_sort_block; block: waves. Writes perm, slot, pair_weight; block 0 also job, n_job.
// route_count ran before.
DEV void route_sort(const mpad_gpu_args &a)
{
    args_prefetch(a);
    launch_wait();
    launch_release();
    int t = (int)thread_id(), lane = (int)lane_id(), n_thread = (int)block_threads();
    int n_wave = n_thread / WAVE, n_token = token_count(a);
    Lds table = lds_base();
    Lds start = table + n_wave * a.n_expert * 4, job_start = start + a.n_expert * 4;
    RouteRange range = route_range(a, n_wave);
    route_histogram(a, table, range, n_wave, n_token);

    // start: all pairs of the expert; job_start, for now: those of earlier blocks. The blocks'
    // counts are shared out over the threads.
    for (int e = t; e < a.n_expert; e += n_thread) {
        lds_write<int>(start + e * 4, 0);
        lds_write<int>(job_start + e * 4, 0);
    }
    block_barrier(); // zeros before sums
    int n_part = n_thread > a.n_expert ? n_thread / a.n_expert : 1;
    for (int i = t; i < n_part * a.n_expert; i += n_thread) {
        int part = i / a.n_expert, e = i - part * a.n_expert, before = 0, total = 0;
        int from = a.n_sort_block * part / n_part, to = a.n_sort_block * (part + 1) / n_part;
        UNROLL_8 for (int b = from; b < to; b++)
        {
            int n = a.count[b * a.n_expert + e];
            before += b < (int)block_id() ? n : 0;
            total += n;
        }
        lds_add(start + e * 4, total);
        lds_add(job_start + e * 4, before);
    }
    block_barrier(); // sums are complete
    // table[wave][expert]: pairs of the expert in earlier blocks and waves.
    for (int e = t; e < a.n_expert; e += n_thread) {
        int before = lds_read<int>(job_start + e * 4);
        UNROLL_8 for (int w = 0; w < n_wave; w++)
        {
            Lds at = table + (w * a.n_expert + e) * 4;
            int n = lds_read<int>(at);
            lds_write<int>(at, before);
            before += n;
        }
    }
    block_barrier(); // totals are complete
    if (wave_id() == 0) {
        int n_pair = 0, n_job = 0;
        for (int e0 = 0; e0 < a.n_expert; e0 += WAVE) {
            int e = e0 + lane;
            int total = e < a.n_expert ? lds_read<int>(start + e * 4) : 0;
            int jobs = (total + a.n_row_job - 1) / a.n_row_job, pairs = total, mine = jobs;
            for (int d = 1; d < WAVE; d *= 2) {
                int up_pairs = lane_up(pairs, d), up_jobs = lane_up(jobs, d);
                pairs += lane >= d ? up_pairs : 0;
                jobs += lane >= d ? up_jobs : 0;
            }
            if (e < a.n_expert) {
                lds_write<int>(start + e * 4, n_pair + pairs - total);
                lds_write<int>(job_start + e * 4, n_job + jobs - mine);
            }
            n_pair += lane_at(pairs, WAVE - 1);
            n_job += lane_at(jobs, WAVE - 1);
        }
        if (block_id() == 0 && lane == 0)
            *a.n_job = n_job;
        if (lane == 0)
            lds_write<int>(job_start + a.n_expert * 4, n_pair);
    }
    block_barrier(); // first positions are complete

    Lds row = table + wave_id() * a.n_expert * 4;
    for (int p0 = range.begin; p0 < range.end; p0 += WAVE) {
        int p = p0 + lane, e = p < range.end ? pair_expert(a, p, n_token) : NO_EXPERT;
        // Lanes with the same expert, by its bits; 11 hold any expert and NO_EXPERT.
        LaneMask same = ~(LaneMask)0;
        UNROLL for (int bit = 0; bit < 11; bit++)
        {
            LaneMask ones = lane_ballot(e >> bit & 1);
            same &= e >> bit & 1 ? ones : ~ones;
        }
        int place = -1, rank = mask_rank(same);
        if (e != NO_EXPERT)
            place = lds_read<int>(start + e * 4) + lds_read<int>(row + e * 4) + rank;
        wave_barrier(); // the wave's counts are read before they grow
        if (e != NO_EXPERT && rank == 0)
            lds_write<int>(row + e * 4, lds_read<int>(row + e * 4) + mask_count(same));
        wave_barrier(); // and have grown before the next round reads them
        if (p < range.end) {
            int first = pair_token(a, p) * a.n_topk, order = 0;
            for (int q = first; q < first + a.n_topk; q++) {
                int k = pair_expert(a, q, n_token);
                order += k < e || (k == e && q < p);
            }
            a.slot[first + order] = place;
            if (place >= 0) {
                a.perm[place] = p;
                a.pair_weight[place] = pair_routed_weight(a, p);
            }
        }
    }
    if (block_id() == 0) {
        int n_pair = lds_read<int>(job_start + a.n_expert * 4);
        for (int e = wave_id(); e < a.n_expert; e += n_wave) {
            int first = lds_read<int>(start + e * 4);
            int end = e + 1 < a.n_expert ? lds_read<int>(start + (e + 1) * 4) : n_pair;
            mpad_gpu_job *job = a.job + lds_read<int>(job_start + e * 4);
            for (int i = lane; first + i * a.n_row_job < end; i += WAVE) {
                int at = first + i * a.n_row_job, left = end - at;
                job[i] = {e, at, left < a.n_row_job ? left : a.n_row_job, 0};
            }
        }
    }
}

// Grid: 1; block: MPAD_ROUTE_THREADS. The same for up to MPAD_ROUTE_ONE_MAX pairs.
DEV void route_one(const mpad_gpu_args &a)
{
    constexpr int THREADS = MPAD_ROUTE_THREADS, EACH = MPAD_ROUTE_ONE_MAX / THREADS;
    args_prefetch(a);
    launch_wait();
    launch_release();
    int t = (int)thread_id();
    Sorted s = sorted_make(lds_base(), a.n_pair, a.n_expert);
    sort_pairs<THREADS, EACH>(a, s);
    int last = (a.n_expert - 1) * 4; // the pairs end with the last expert's; the rest is skipped
    int n_sorted =
        a.n_expert > 0 ? lds_read<int>(s.start + last) + lds_read<int>(s.count + last) : 0;
    for (int p = t; p < a.n_pair; p += THREADS) {
        a.slot[p] = lds_read<int>(s.slot + p * 4);
        if (p < n_sorted) {
            a.perm[p] = lds_read<int>(s.perm + p * 4);
            a.pair_weight[p] = lds_read<float>(s.weight + p * 4);
        }
    }
    for (int j = t; j < s.n_job; j += THREADS) {
        Job job = job_unpack(lds_read<int>(s.job + j * 4));
        a.job[j] = {job.expert, job.first, job.rows, 0};
    }
    if (t == 0)
        *a.n_job = s.n_job;
}

#define MPAD_ROUTE(NAME, STAGE, CODE)                                                              \
    MPAD_KERNEL(MPAD_ROUTE_THREADS, 1) NAME(MPAD_ARGS mpad_gpu_args a)                             \
    {                                                                                              \
        STAGE(a);                                                                                  \
    }
