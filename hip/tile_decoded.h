// Level 4: tiles of quantised weights by the warpgroup instructions of sm_90a. Weights are the rows
// of the instruction, out of registers: a lane loads 16 bytes of a row at a time, becomes T from
// them and gives them to several instructions. Tokens of T are its columns, out of LDS, their k in
// the order that the lanes' bytes are used. A block multiplies a run of column tiles of one job as
// one stream of stages; a stage's weights are decoded while the stage before is multiplied.
#pragma once
#include "stored.h"
#include "wgmma_rows.h"

#if MPAD_HAVE_WGMMA

constexpr int DECODED_WAVES = 8, DECODED_THREADS = DECODED_WAVES * WAVE; // of a block

// Two rows of weights per lane, `half` 0 and 1: of a gated layer's first product a gate row and the
// up row of the same column, else rows that are 8 apart.
struct DecodedRows {
    const char *data; // of the expert
    const mpad_gpu_scale &scale;
    int expert, n; // rows that exist, of a half
    u32 ld, up;    // bytes
    bool is_gated;
    DEV int column(int tile, int half) const
    {
        return tile * (is_gated ? DECODED_WAVES * 8 : DECODED_WAVES * 16) +
               wave_id() * (is_gated ? 8 : 16) + (is_gated ? 0 : half * 8) + (int)(lane_id() >> 2);
    }
    DEV u32 at(int column, int half) const
    {
        return (u32)column * ld + (is_gated && half ? up : 0);
    }
    DEV i64 scale_at(int column, int half) const
    {
        return scale_row(scale, expert, is_gated && half, column);
    }
};

// N: rows of tokens. A stage is GROUPS times 64 stored bytes of a row. LDS: stages of tokens, or,
// where the tiles of a run share them, all k of theirs; then stages of weights, where each thread
// finds what it loaded.
template <class T, class W, int N, int GROUPS, int STAGES> struct DecodedTile {
    static constexpr int THREADS = DECODED_THREADS;
    // Of a group: 128 bytes of a row of tokens; 16 k, which one instruction takes.
    static constexpr int SUB = 8 / W::BITS, STEPS = 4 * SUB;
    static constexpr int GROUP_K = 64 * SUB, STAGE_K = GROUPS * GROUP_K;
    static constexpr int TOKEN_BYTES = N * STAGE_K * 2, WEIGHT_BYTES = GROUPS * 2 * THREADS * 16;
    static constexpr int ROW_CHUNKS = STAGE_K / 8; // of 16 bytes
    static constexpr int CHUNKS = N * ROW_CHUNKS, LOADS = (CHUNKS + THREADS - 1) / THREADS;

    float sums[N / 2]; // element e: token token_of(e), row of half e / 2 % 2
    // The operand of each step: words of k of half 0, half 1, the next k of half 0, of half 1.
    typedef u32 Rows[GROUPS][STEPS][4];
    Rows rows; // of the next stage

    const mpad_gpu_args &args;
    DecodedRows weights;
    const char *tokens;
    u32 token_at[LOADS], token_ok; // bytes: the thread's chunks of tokens; one bit each
    bool is_shared;
    int k, n_stage, n_token_stage, tile_first, tile_end;
    int tile, slot; // of the stage that is multiplied
    // Where the next stage to be loaded is: the lane's bytes of its two rows, and how many are
    // left.
    int ahead_tile, ahead_kt, ahead_left[2];
    const char *ahead_from[2];
    // The same of e8m0 scales; those of the next stage, of that after it.
    int scale_tile, scale_kt;
    i64 scale_from[2];
    bool scale_ok[2];
    u32 scale_next[GROUPS][2], scale_after[GROUPS][2];

    DEV DecodedTile(const mpad_gpu_args &a, const DecodedRows &rows, const void *of_tokens, int n_k,
                    bool shared)
        : args(a), weights(rows), tokens((const char *)of_tokens), token_ok(0), is_shared(shared),
          k(n_k)
    {
        n_stage = k > 0 ? (k + STAGE_K - 1) / STAGE_K : 1; // without k the sums are zeros
        n_token_stage = is_shared ? n_stage : STAGES;
    }
    // Row of tokens whose chunk load i of this thread is.
    static DEV int load_row(int i)
    {
        return ((int)thread_id() + i * THREADS) / ROW_CHUNKS;
    }
    static DEV int load_chunk(int i)
    {
        return ((int)thread_id() + i * THREADS) % ROW_CHUNKS;
    }
    DEV void token_row(int i, bool ok, u32 at)
    {
        token_at[i] = at + (u32)load_chunk(i) * 16;
        token_ok |= (ok ? 1u : 0u) << i;
    }
    static DEV int token_of(int e)
    {
        return 8 * (e / 4) + 2 * (int)(lane_id() & 3) + e % 2;
    }
    DEV Lds token_stage(int slot_of, int kt_of) const
    {
        return lds_base() + (is_shared ? kt_of : slot_of) * TOKEN_BYTES;
    }
    DEV Lds weight_stage(int slot_of) const
    {
        return lds_base() + n_token_stage * TOKEN_BYTES + slot_of * WEIGHT_BYTES +
               (int)thread_id() * 16;
    }

    // Lane q of four has bytes [16 q, 16 q + 16) of a group's 64, and gives step s the s-th quarter
    // (SUB = 2: eighth) of them: two words of k, which the instruction takes as words q and 4 + q
    // of its 8.
    DEV void stage_tokens(int to_slot)
    {
        Lds stage = token_stage(to_slot, ahead_kt);
        int left = k - ahead_kt * STAGE_K;
        const char *from = tokens + ahead_kt * STAGE_K * 2;
        UNROLL for (int i = 0; i < LOADS; i++)
        {
            int r = load_row(i), c = load_chunk(i);
            if (CHUNKS % THREADS && r >= N)
                continue;
            int group = c / (8 * SUB), q = c % (8 * SUB) / (2 * SUB), step = c % (2 * SUB) * 2;
            Lds row = stage + (group * SUB + step / 4) * N * 128 + r * 128 + q * 4, to[4];
            UNROLL for (int j = 0; j < 4; j++) to[j] = row + (((step % 4) * 2 + j) ^ (r & 7)) * 16;
            stage_words(to, from + token_at[i], (token_ok >> i & 1) && c * 8 < left);
        }
    }
    DEV void stage_weights(int to_slot)
    {
        UNROLL for (int g = 0; g < GROUPS; g++) UNROLL for (int h = 0; h < 2; h++)
            stage16(weight_stage(to_slot) + (g * 2 + h) * THREADS * 16, ahead_from[h] + g * 64,
                    ahead_left[h] > g * 64);
        UNROLL for (int h = 0; h < 2; h++)
        {
            ahead_from[h] += GROUPS * 64;
            ahead_left[h] -= GROUPS * 64;
        }
    }
    DEV void ahead_begin()
    {
        int at = (int)(lane_id() & 3) * 16;
        UNROLL for (int h = 0; h < 2; h++)
        {
            int column = weights.column(ahead_tile, h);
            bool ok = column < weights.n;
            ahead_from[h] = weights.data + (ok ? weights.at(column, h) + (u32)at : 0);
            ahead_left[h] = ok ? k / 8 * W::BITS - at : 0;
        }
        ahead_kt = 0;
    }
    // Whether tokens of a stage of the tile are on their way, in parts by every thread.
    DEV bool has_tokens(int of_tile) const
    {
        return !is_shared || of_tile == tile_first;
    }
    DEV void stage_ahead(int to_slot)
    {
        if (ahead_tile < tile_end) {
            if (has_tokens(ahead_tile))
                stage_tokens(to_slot);
            stage_weights(to_slot);
            ahead_kt++;
            if (ahead_kt == n_stage) {
                ahead_tile++;
                ahead_begin();
            }
        }
        stage_commit();
    }

    // e8m0 scales, of the thread's 16 bytes of each row.
    DEV void scales_begin()
    {
        UNROLL for (int h = 0; h < 2; h++)
        {
            int column = weights.column(scale_tile, h);
            scale_ok[h] = scale_tile < tile_end && column < weights.n;
            scale_from[h] = weights.scale_at(scale_ok[h] ? column : 0, h);
        }
    }
    template <class FORM> DEV void scales_ahead()
    {
        if constexpr (FORM::is_folded) {
            UNROLL for (int g = 0; g < GROUPS; g++) UNROLL for (int h = 0; h < 2; h++)
            {
                int column = scale_kt * STAGE_K + g * GROUP_K + (int)(lane_id() & 3) * (16 * SUB);
                scale_next[g][h] = scale_after[g][h];
                scale_after[g][h] = scale_load_as<W, FORM>(weights.scale, scale_from[h], column,
                                                           scale_ok[h] && column < k);
            }
            scale_kt++;
            if (scale_kt == n_stage) {
                scale_kt = 0;
                scale_tile++;
                scales_begin();
            }
        }
    }
    template <class FORM> DEV void decode(Rows &to, int from_slot) const
    {
        constexpr int CHUNK = 16 / W::BITS; // of 8, in 16 bytes
        UNROLL for (int g = 0; g < GROUPS; g++) UNROLL for (int h = 0; h < 2; h++)
        {
            u4 raw = lds_read<u4>(weight_stage(from_slot) + (g * 2 + h) * THREADS * 16);
            u4 chunk[CHUNK];
            wide_decode<T, W, FORM>(args, chunk, raw, scale_next[g][h]);
            UNROLL for (int c = 0; c < CHUNK; c++) UNROLL for (int p = 0; p < 4; p++)
                to[g][2 * c + p / 2][p % 2 * 2 + h] = chunk[c][p];
        }
    }
    DEV void multiply(float (&to)[N / 2], const u32 (&now)[STEPS][4], int g, Lds stage,
                      bool is_added)
    {
        wgmma_fence();
        UNROLL for (int s = 0; s < STEPS; s++) WgmmaRows<T, N>::multiply(
            to, now[s], wgmma_tile(stage + (g * SUB + s / 4) * N * 128) + 2 * (s % 4),
            s > 0 || is_added);
        wgmma_commit();
    }

    // Tiles [first, end): begin, then for each tile one `next` and what is done with the sums.
    template <class FORM> DEV void begin(int first, int end)
    {
        tile = ahead_tile = scale_tile = tile_first = first;
        tile_end = end;
        slot = scale_kt = 0;
        ahead_begin();
        UNROLL for (int i = 0; i < STAGES - 1; i++) stage_ahead(i);
        scales_begin();
        scales_ahead<FORM>();
        scales_ahead<FORM>();
        stage_wait_all_but<STAGES - 2>();
        wgmma_publish();
        decode<FORM>(rows, 0);
    }
    template <class FORM> DEV void next()
    {
        constexpr bool BY_BLOCK = FORM::scale == SCALE_FETCH;
        float part[BY_BLOCK ? N / 2 : 1], of_row[2] = {0.f, 0.f};
        i64 scale_row_at[2];
        bool ok[2];
        UNROLL for (int h = 0; h < 2; h++)
        {
            int column = weights.column(tile, h);
            ok[h] = column < weights.n;
            scale_row_at[h] = weights.scale_at(ok[h] ? column : 0, h);
            if (FORM::scale == SCALE_ROW && ok[h])
                of_row[h] =
                    scale_value(weights.scale, scale_load(weights.scale, scale_row_at[h], 0, true));
        }
        UNROLL for (int e = 0; e < N / 2; e++) sums[e] = 0.f;
        int block = 1 << weights.scale.column_log2, kt = 0;
        auto step = [&](const Rows &now, Rows &next_rows) {
            // The stage's tokens are there for all; the stage before was multiplied by all. Weights
            // are the thread's own.
            if (has_tokens(tile))
                block_barrier();
            Lds stage = token_stage(slot, kt);
            int column = kt * STAGE_K + weights.scale.column_phase;
            bool is_last = kt + 1 == n_stage;
            auto is_begin = [&](int g) {
                return (kt == 0 && g == 0) || ((column + g * GROUP_K) & (block - 1)) == 0;
            };
            auto look_up = [&](int g) {
                if (BY_BLOCK && is_begin(g) && kt * STAGE_K + g * GROUP_K < k) {
                    UNROLL for (int h = 0; h < 2; h++) of_row[h] = scale_value_as<W, FORM>(
                        weights.scale, scale_load_as<W, FORM>(weights.scale, scale_row_at[h],
                                                              kt * STAGE_K + g * GROUP_K, ok[h]));
                }
            };
            auto fold = [&] {
                if constexpr (BY_BLOCK) {
                    UNROLL for (int e = 0; e < N / 2; e++) sums[e] =
                        fused_mul_add(part[e], of_row[e / 2 % 2], sums[e]);
                }
            };
            UNROLL for (int g = 0; g < GROUPS; g++)
            {
                look_up(g);
                if constexpr (BY_BLOCK) {
                    multiply(part, now[g], g, stage, !is_begin(g));
                    if (g + 1 < GROUPS && is_begin(g + 1)) {
                        wgmma_wait();
                        wgmma_arrive(part);
                        fold();
                    }
                } else {
                    multiply(sums, now[g], g, stage, true);
                }
            }
            stage_ahead(slot == 0 ? STAGES - 1 : slot - 1);
            slot = slot + 1 == STAGES ? 0 : slot + 1;
            scales_ahead<FORM>();
            stage_wait_all_but<STAGES - 2>();
            if (has_tokens(tile))
                wgmma_publish();
            decode<FORM>(next_rows, slot);
            wgmma_wait();
            if constexpr (BY_BLOCK) {
                wgmma_arrive(part);
                if (is_last || ((column + STAGE_K) & (block - 1)) == 0)
                    fold();
            } else {
                wgmma_arrive(sums);
            }
            kt++;
        };
        // Two operands in turn: what instructions on their way read is not written. A copy of one
        // to the other would make the compiler wait for each instruction.
        Rows other;
        NO_UNROLL while (true)
        {
            step(rows, other);
            if (kt == n_stage) {
                decode<FORM>(rows, slot);
                break;
            }
            step(other, rows);
            if (kt == n_stage)
                break;
        }
        if constexpr (FORM::scale == SCALE_ROW) {
            UNROLL for (int e = 0; e < N / 2; e++) sums[e] *= of_row[e / 2 % 2];
        }
        tile++;
    }
    // Sums times the routed weights of their tokens.
    DEV void weigh(const mpad_gpu_args &a, const mpad_gpu_job &job)
    {
        UNROLL for (int e = 0; e < N / 2; e++)
        {
            int r = token_of(e);
            sums[e] *= r < job.rows ? a.pair_weight[job.first + r] : 0.f;
        }
    }
    // Adds value(column, half) to the sums of each of the tile's columns.
    template <class VALUE> DEV void add_by_column(int of_tile, VALUE value)
    {
        float v[2];
        UNROLL for (int h = 0; h < 2; h++)
        {
            int column = weights.column(of_tile, h);
            v[h] = column < weights.n ? value(column, h) : 0.f;
        }
        UNROLL for (int e = 0; e < N / 2; e++) sums[e] += v[e / 2 % 2];
    }
};

#endif
