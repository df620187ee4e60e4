// Level 3: the sorted order of the pairs (token * n_topk + slot) and the jobs of the stream
// kernels, in LDS. Positions are by expert, then by pair: the order in which a token's slots are
// summed.
#pragma once
#include "memory.h"

constexpr int NO_EXPERT = 0x7fffffff;

DEV int token_count(const mpad_gpu_args &a)
{
    if (!a.n_token_d)
        return a.n_token;
    i64 n = load_integer(a.n_token_d, 0, a.n_token_type);
    return n < 0 ? 0 : n < a.n_token ? (int)n : a.n_token;
}

// Column tiles [tile, end) of one job.
struct TileRun {
    mpad_gpu_job job;
    int tile, end;
};
// Begins a block of a kernel whose blocks take runs of a job's `n_tile` column tiles; false: there
// are fewer jobs than the grid has room for.
DEV bool run_begin(const mpad_gpu_args &a, const mpad_gpu_tile_run &of, int n_tile, TileRun &run)
{
    args_prefetch(a);
    launch_wait();
    launch_release();
    int n_run = (n_tile + of.n_tile - 1) / of.n_tile, j = (int)block_id() / n_run;
    if (j >= *a.n_job)
        return false;
    run.job = a.job[j];
    run.tile = ((int)block_id() - j * n_run) * of.n_tile;
    run.end = run.tile + of.n_tile;
    run.end = run.end < n_tile ? run.end : n_tile;
    return true;
}

// p / n_topk, by the reciprocal rounded up: exact for p * n_topk < 2^32.
DEV int pair_token(const mpad_gpu_args &a, int p)
{
    return a.n_topk == 1 ? p : (int)((u64)(u32)p * a.topk_reciprocal >> 32);
}

// Expert held here that the pair is routed to, or NO_EXPERT; n_token as token_count gives it.
DEV int pair_expert(const mpad_gpu_args &a, int pair, int n_token)
{
    int token = pair_token(a, pair), slot = pair - token * a.n_topk;
    if (token >= n_token)
        return NO_EXPERT;
    i64 e = load_integer(a.topk_ids, token * a.ld_topk_ids + slot, a.topk_ids_type);
    if (e < 0 || e >= a.n_expert_global)
        return NO_EXPERT;
    if (a.expert_map)
        e = load_integer(a.expert_map, e, a.expert_map_type);
    return e < 0 || e >= a.n_expert ? NO_EXPERT : (int)e;
}

// The weight's own bytes are read whether or not the slot is skipped, the value used only where it
// is not.
DEV float pair_routed_weight(const mpad_gpu_args &a, int pair)
{
    int token = pair_token(a, pair), slot = pair - token * a.n_topk;
    return load_float(a.topk_weights, token * a.ld_topk_weights + slot, a.topk_weights_type);
}

// The sorted order in LDS: arrays of one word per pair, the last two of one word per expert.
struct Sorted {
    Lds expert; // by pair
    Lds weight; // float, by position
    Lds perm;   // pair, by position
    Lds slot;   // [n_token][n_topk]: positions of a token's slots, ascending, then -1
    Lds job;    // packed, by job
    Lds bucket; // scratch: by position, the expert's pairs in any order
    Lds count;  // scratch: pairs by expert
    Lds start;  // first position, by expert
    int n_job;
};

DEV Sorted sorted_make(Lds base, int n_pair, int n_expert)
{
    int n = n_pair * 4;
    return {base,
            base + n,
            base + 2 * n,
            base + 3 * n,
            base + 4 * n,
            base + 5 * n,
            base + 6 * n,
            base + 6 * n + n_expert * 4,
            0};
}

// One job, the same in the whole wave.
struct Job {
    int expert, first, rows;
};

// A job in a word: expert 10 bits, first position 11, rows 9.
DEV constexpr int job_pack(int expert, int first, int rows)
{
    return expert << 20 | first << 9 | rows;
}
DEV constexpr Job job_unpack(int g)
{
    return {g >> 20, g >> 9 & 0x7ff, g & 0x1ff};
}
constexpr int JOB_ROWS_MAX = 256; // of csrc/variants.def
static_assert(job_unpack(job_pack(1023, MPAD_ROUTE_ONE_MAX - 1, JOB_ROWS_MAX)).expert == 1023 &&
                  job_unpack(job_pack(1023, MPAD_ROUTE_ONE_MAX - 1, JOB_ROWS_MAX)).first ==
                      MPAD_ROUTE_ONE_MAX - 1 &&
                  job_unpack(job_pack(0, 0, JOB_ROWS_MAX)).rows == JOB_ROWS_MAX,
              "a job fits its word");

// Sorts n_pair <= THREADS * EACH pairs (at most MPAD_ROUTE_ONE_MAX). All threads of the block take
// part; contains barriers, the last of which makes the result visible. Pairs enter their expert's
// bucket in any order and then take the place that counting the smaller pairs in the bucket gives,
// so that the result is the stable order.
template <int THREADS, int EACH> DEV void sort_pairs(const mpad_gpu_args &a, Sorted &s)
{
    int n = a.n_pair, n_token = token_count(a), t = (int)thread_id(), lane = (int)lane_id();
    int key[EACH], entry[EACH];
    float weight[EACH];
    UNROLL for (int i = 0; i < EACH; i++)
    {
        int p = t + i * THREADS;
        key[i] = NO_EXPERT;
        weight[i] = 0.f;
        if (p < n) {
            if (pair_token(a, p) < n_token)
                weight[i] = pair_routed_weight(a, p);
            key[i] = pair_expert(a, p, n_token);
        }
    }
    for (int e = t; e < a.n_expert; e += THREADS)
        lds_write<int>(s.count + e * 4, 0);
    block_barrier(); // zeros before counts
    UNROLL for (int i = 0; i < EACH; i++)
    {
        int p = t + i * THREADS;
        entry[i] = key[i] != NO_EXPERT ? lds_add(s.count + key[i] * 4, 1) : 0;
        if (p < n)
            lds_write<int>(s.expert + p * 4, key[i]);
    }
    block_barrier(); // counts and keys are complete
    if (wave_id() == 0) {
        // Both prefix sums at once: pairs in the low half, jobs in the high half.
        constexpr int RUN = 4;
        int before = 0;
        for (int e0 = 0; e0 < a.n_expert; e0 += WAVE * RUN) {
            int e = e0 + lane * RUN, count[RUN], sum = 0;
            UNROLL for (int i = 0; i < RUN; i++)
            {
                count[i] = e + i < a.n_expert ? lds_read<int>(s.count + (e + i) * 4) : 0;
                sum += count[i] + ((count[i] + a.n_row_job - 1) >> a.row_job_log2 << 16);
            }
            int scan = sum;
            NO_UNROLL for (int d = 1; d < WAVE; d *= 2)
            {
                int up = lane_up(scan, d);
                scan += lane >= d ? up : 0;
            }
            int at = before + scan - sum;
            before += lane_at(scan, WAVE - 1);
            UNROLL for (int i = 0; i < RUN; i++)
            {
                if (e + i >= a.n_expert)
                    continue;
                int first = at & 0xffff, job = at >> 16;
                lds_write<int>(s.start + (e + i) * 4, first);
                NO_UNROLL for (int left = count[i]; left > 0; left -= a.n_row_job, job++)
                {
                    int rows = left < a.n_row_job ? left : a.n_row_job;
                    lds_write<int>(s.job + job * 4, job_pack(e + i, first, rows));
                    first += a.n_row_job;
                }
                at += count[i] + ((count[i] + a.n_row_job - 1) >> a.row_job_log2 << 16);
            }
        }
        if (lane == 0)
            lds_write<int>(s.start + a.n_expert * 4, before >> 16);
    }
    block_barrier(); // first positions and jobs are there
    s.n_job = wave_uniform(lds_read<int>(s.start + a.n_expert * 4));
    UNROLL for (int i = 0; i < EACH; i++)
    {
        if (key[i] != NO_EXPERT)
            lds_write<int>(s.bucket + (lds_read<int>(s.start + key[i] * 4) + entry[i]) * 4,
                           t + i * THREADS);
    }
    block_barrier(); // buckets are filled
    UNROLL for (int i = 0; i < EACH; i++)
    {
        int p = t + i * THREADS;
        if (p >= n)
            continue;
        int place = -1;
        if (key[i] != NO_EXPERT) {
            int first = lds_read<int>(s.start + key[i] * 4), smaller = 0;
            int count = lds_read<int>(s.count + key[i] * 4);
            UNROLL_8 for (int q = first; q < first + count; q++) smaller +=
                lds_read<int>(s.bucket + q * 4) < p;
            place = first + smaller;
            lds_write<float>(s.weight + place * 4, weight[i]);
            lds_write<int>(s.perm + place * 4, p);
        }
        int slot0 = pair_token(a, p) * a.n_topk, rank = 0;
        for (int q = slot0; q < slot0 + a.n_topk; q++) {
            int k = lds_read<int>(s.expert + q * 4);
            rank += k < key[i] || (k == key[i] && q < p);
        }
        lds_write<int>(s.slot + (slot0 + rank) * 4, place);
    }
    block_barrier(); // the order is complete
}

// The same for n_pair <= WAVE, by the first wave alone; contains one barrier.
DEV void sort_wave(const mpad_gpu_args &a, Sorted &s)
{
    int n = a.n_pair, lane = (int)lane_id();
    if (wave_id() == 0) {
        int n_token = token_count(a), key = NO_EXPERT, token = pair_token(a, lane);
        float weight = 0.f;
        if (lane < n) {
            if (token < n_token)
                weight = pair_routed_weight(a, lane);
            key = pair_expert(a, lane, n_token);
        }
        bool ok = key != NO_EXPERT;
        int before = 0, equal = 0, all = 0, rank = 0;
        NO_UNROLL for (int q = 0; q < n; q++)
        {
            int k = lane_at(key, q);
            bool is_less = k < key || (k == key && q < lane);
            before += is_less;
            equal += k == key && q < lane;
            all += k == key;
            rank += is_less && pair_token(a, q) == token;
        }
        bool opens = ok && (equal & (a.n_row_job - 1)) == 0;
        int at = opens ? before : NO_EXPERT, job = 0;
        NO_UNROLL for (int q = 0; q < n; q++) job += lane_at(at, q) < at;
        if (opens) {
            int left = all - equal;
            lds_write<int>(s.job + job * 4,
                           job_pack(key, before, left < a.n_row_job ? left : a.n_row_job));
        }
        if (ok) {
            lds_write<float>(s.weight + before * 4, weight);
            lds_write<int>(s.perm + before * 4, lane);
        }
        if (lane < n)
            lds_write<int>(s.slot + (token * a.n_topk + rank) * 4, ok ? before : -1);
        int n_job = mask_count(lane_ballot(opens));
        if (lane == 0)
            lds_write<int>(s.start + a.n_expert * 4, n_job);
    }
    block_barrier(); // the order is complete
    s.n_job = wave_uniform(lds_read<int>(s.start + a.n_expert * 4));
}

// Without pairs there are no jobs, and no room in LDS.
template <int THREADS> DEV void sort_inline(const mpad_gpu_args &a, Sorted &s)
{
    if (a.n_pair == 0)
        return;
    if (a.n_pair <= WAVE)
        sort_wave(a, s);
    else
        sort_pairs<THREADS, MPAD_SORT_INLINE_MAX / THREADS>(a, s);
}

DEV Job sorted_job(const mpad_gpu_args &a, const Sorted &s, int j)
{
    if (a.is_sorted) {
        mpad_gpu_job g = a.job[j];
        return {wave_uniform(g.expert), wave_uniform(g.first), wave_uniform(g.rows)};
    }
    return job_unpack(wave_uniform(lds_read<int>(s.job + j * 4)));
}

DEV int sorted_count(const mpad_gpu_args &a, const Sorted &s)
{
    return a.is_sorted ? wave_uniform(*a.n_job) : s.n_job;
}
DEV int sorted_pair(const mpad_gpu_args &a, const Sorted &s, int position)
{
    return a.is_sorted ? a.perm[position] : lds_read<int>(s.perm + position * 4);
}
DEV float sorted_weight(const mpad_gpu_args &a, const Sorted &s, int position)
{
    return a.is_sorted ? a.pair_weight[position] : lds_read<float>(s.weight + position * 4);
}
DEV int sorted_slot(const mpad_gpu_args &a, const Sorted &s, int i)
{
    return a.is_sorted ? a.slot[i] : lds_read<int>(s.slot + i * 4);
}
