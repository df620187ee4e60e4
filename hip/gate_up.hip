// Level 4: the first product with activation, for few rows per expert: inter[position] = act(W13
// x). Bound by the weights' bytes, which go from memory straight to registers.

#include "epilogue.h"
#include "mma.h"
#include "route.h"
#include "stored.h"

// Grid: any number of blocks; block: MPAD_STREAM_WAVES waves. A tile is a job times 16 rows of W13:
// 8 gate and the same 8 up rows, or 16 rows where the layer is not gated. A block takes a run of
// tiles; its waves split n_hidden and their sums meet in LDS in wave order. A wave keeps DEPTH
// slabs of weights on the way, across tile borders, each with the scales of its rows where those
// differ by column. LDS: the sorted order, sums [2][waves][tokens][16] float, rows of tokens.
template <class T, class W, bool VECTOR, int WANTED, class FORM>
DEV void gate_up_stream(const mpad_gpu_args &a, FORM)
{
    constexpr int DEPTH = flight_depth<W, FORM>(WANTED);
    typedef Flight<T, W, VECTOR, FORM, DEPTH> Weights;
    constexpr int GROUP = Weights::GROUP;
    constexpr int WAVES = MPAD_STREAM_WAVES, THREADS = WAVES * WAVE, COLUMNS = MPAD_STREAM_COLUMNS;
    constexpr int SUMS = WAVES * TOKENS * COLUMNS;
    args_prefetch(a);
    launch_wait();
    launch_release();
    int t = (int)thread_id(), lane = (int)lane_id(), wave = wave_id();
    int n_inline = a.is_sorted ? 0 : a.n_pair;
    Lds lds = lds_base();
    Sorted sorted = sorted_make(lds, n_inline, a.n_expert);
    Lds sums = lds + mpad_lds_sort(n_inline, a.n_expert), tokens = sums + 2 * SUMS * 4;
    int pitch = mpad_lds_token_pitch(a.n_hidden, W::BITS, LDS_PITCH);

    if (!a.is_sorted)
        sort_inline<THREADS>(a, sorted);
    int n_tile = a.n_column_tile_gate_up, n_work = sorted_count(a, sorted) * n_tile;
    int share = (int)((u32)n_work / block_count()), rest = n_work - share * (int)block_count();
    int b = (int)block_id(), work = b * share + (b < rest ? b : rest);
    int work_end = work + share + (b < rest);
    if (work >= work_end)
        return;

    int n_slab = (a.n_hidden + 31) / 32, n_group = (n_slab + GROUP - 1) / GROUP;
    int slab0 = n_group * wave / WAVES * GROUP, slab1 = n_group * (wave + 1) / WAVES * GROUP;
    int element_end = slab1 * 32 < a.n_hidden ? slab1 * 32 : a.n_hidden;

    constexpr bool SCALED = W::BITS < 16;
    constexpr int ITEM = SCALED ? 1 : 2; // bytes of a stored element
    Weights w;
    u32 row_scale = 0; // of row lane % 16, where it is the same for all columns
    auto aim = [&](const Job &job, int tile, bool any) {
        Buffer weights = buffer_make((const char *)a.w13 + job.expert * a.w13_ld_expert * ITEM,
                                     (u32)a.w13_bytes);
        auto half_of = [&](int r) { return a.is_gated ? r >> 3 : 0; };
        auto column_of = [&](int r) { return a.is_gated ? tile * 8 + (r & 7) : tile * 16 + r; };
        UNROLL for (int i = 0; i < WEIGHT_CHUNKS; i++)
        {
            int r = weight_row(i, lane), column = column_of(r);
            u32 row = (u32)(column * a.w13_ld_row + half_of(r) * a.w13_up_offset);
            w.run[i] =
                run_make(weights, row * ITEM + slab0 * 4 * W::BITS + w.lane_at(i),
                         any && column < a.n_inter ? element_end - slab0 * 32 - w.lane_k(i) : 0);
        }
        if constexpr (SCALED) {
            w.k = slab0 * 32;
            w.end = element_end;
            UNROLL for (int i = 0; i < w.SCALE_ROWS; i++)
            {
                int r = w.lane_scale_row(i), column = column_of(r);
                column = column < a.n_inter ? column : a.n_inter - 1; // no other row's are read
                w.scale_at[i] = scale_row(a.w13_scale, job.expert, half_of(r), column);
            }
            if (FORM::by_row(a.w13_scale))
                row_scale = scale_load(a.w13_scale, w.scale_at[0], 0, true);
        }
    };

    int j = work / n_tile, tile = work - j * n_tile, staged = -1;
    Job job = sorted_job(a, sorted, j), next = job;
    aim(job, tile, true);
    UNROLL for (int i = 0; i < DEPTH; i += GROUP) w.fetch(a.w13_scale, i, i);

    NO_UNROLL for (; work < work_end; work++)
    {
        if (staged != j) {
            staged = j; // the rows that are replaced were read before the tile's last barrier
            for (int r = 0; r < job.rows; r++) {
                int token = pair_token(a, wave_uniform(sorted_pair(a, sorted, job.first + r)));
                Buffer hidden =
                    buffer_make((const u16 *)a.hidden + token * a.ld_hidden, (u32)a.n_hidden * 2);
                for (int c = t; c < n_group * GROUP * 4; c += THREADS) {
                    Lds to = tokens + r * pitch + w.token_place(c) * 16;
                    int left = a.n_hidden - c * 8;
                    if constexpr (VECTOR)
                        stage16(to, hidden, (u32)c * 16, left > 0);
                    else
                        lds_write<u4>(
                            to, run_chunk<false, false>(run_make(hidden, (u32)c * 16, left), 0));
                }
            }
            stage_wait();
            block_barrier(); // the rows are there
        }
        bool more = work + 1 < work_end;
        int next_tile = tile + 1, next_j = j;
        if (next_tile == n_tile) {
            next_tile = 0;
            next_j = j + 1;
            if (more)
                next = sorted_job(a, sorted, next_j);
        }

        // Lanes beyond the job's rows read its last row: their sums are never stored.
        Lds row[TOKEN_CHUNKS];
        UNROLL for (int i = 0; i < TOKEN_CHUNKS; i++)
        {
            int r = token_row(i, lane);
            row[i] = tokens + (r < job.rows ? r : job.rows - 1) * pitch + token_chunk(i, lane) * 16;
        }
        Acc acc = acc_zero();
        u32 this_scale = row_scale;
        // The group at w[i], which is that of slab s.
        auto multiply = [&](int i, int s) {
            w.multiply(a, a.w13_scale, acc, acc, i, [&](int p) {
                TokenFrag x;
                UNROLL for (int q = 0; q < TOKEN_CHUNKS; q++) x.c[q] =
                    lds_read<u4>(row[q] + (s + p) * 64);
                return x;
            });
        };
        int s = slab0;
        NO_UNROLL for (; s + DEPTH < slab1; s += DEPTH)
        {
            w.advance(DEPTH);
            UNROLL for (int i = 0; i < DEPTH; i += GROUP)
            {
                multiply(i, s + i);
                w.fetch(a.w13_scale, i, i);
            }
        }
        aim(next, next_tile, more);
        UNROLL for (int i = 0; i < DEPTH; i += GROUP)
        {
            if (s + i < slab1)
                multiply(i, s + i);
            w.fetch(a.w13_scale, i, i);
        }
        if (FORM::by_row(a.w13_scale)) {
            Acc part = acc;
            acc = acc_zero();
            acc_scale(acc, part, scale_value(a.w13_scale, this_scale));
        }

        Lds mine = sums + ((work & 1) * SUMS + wave * TOKENS * COLUMNS) * 4;
        UNROLL for (int i = 0; i < ACC; i++)
        {
            int m = acc_token(i, lane);
            if (m < TOKENS)
                lds_write<float>(mine + (m * COLUMNS + acc_row(i, lane)) * 4, acc.v[i]);
        }
        block_barrier(); // all waves' sums are there; the buffer's next use is two tiles on
        int n_column = a.is_gated ? 8 : 16;
        if (t < n_column * job.rows) {
            int m = t / n_column, n = t - m * n_column, column = tile * n_column + n;
            float gate = 0.f, up = 0.f;
            Lds at = sums + ((work & 1) * SUMS + m * COLUMNS + n) * 4;
            UNROLL for (int z = 0; z < WAVES; z++)
            {
                gate += lds_read<float>(at + z * TOKENS * COLUMNS * 4);
                if (a.is_gated)
                    up += lds_read<float>(at + (z * TOKENS * COLUMNS + 8) * 4);
            }
            float h = 0.f;
            if (column < a.n_inter) {
                if (a.is_weight_on_input) {
                    float weight = sorted_weight(a, sorted, job.first + m);
                    gate *= weight;
                    up *= weight;
                }
                gate += w13_bias(a, job.expert, column, 0);
                if (a.is_gated)
                    up += w13_bias(a, job.expert, column, 1);
                activation_select(a, [&](auto act) {
                    h = a.is_gated ? activate<act.value, true>(a, gate, up)
                                   : activate<act.value, false>(a, gate, up);
                });
            }
            if (column < a.ld_inter)
                ((u16 *)a.inter)[(job.first + m) * a.ld_inter + column] = T::from_float(h);
        }
        tile = next_tile;
        j = next_j;
        job = next;
    }
}

#define MPAD_GATE_UP_STREAM(NAME, TYPE, WEIGHTS, VECTOR, DEPTH, BLOCKS)                            \
    MPAD_KERNEL(MPAD_STREAM_WAVES *WAVE, BLOCKS) NAME(MPAD_ARGS mpad_gpu_args a)                   \
    {                                                                                              \
        form_select<TYPE, WEIGHTS, VECTOR>(a, a.w13_scale, a.is_w13_wide, [&](auto form) {         \
            gate_up_stream<TYPE, WEIGHTS, VECTOR, DEPTH>(a, form);                                 \
        });                                                                                        \
    }
