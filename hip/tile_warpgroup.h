// Level 4: block tiles by the warpgroup instructions of sm_90a: a run of column tiles of one job,
// as one stream of stages, so that a tile's loads are on their way while the tile before is
// finished. Bytes are multiplied as they are stored. The matrix unit sums products of float8 with
// few bits of mantissa, so sums of 128 k each leave it and are added up in float32, times the
// scales of their columns where those have any.
#pragma once
#include "stored.h"
#include "tile.h"

#if MPAD_HAVE_WGMMA

// Rows of weights as the column tiles of a job take them. Tile t has rows [t * width, t * width +
// 64) of one half and 64 more: the next ones, or the same of the half that starts `half` later.
struct TileRows {
    const char *data; // of the expert
    u32 ld, half;     // bytes
    int n, width;     // rows that exist, of a half; 64: two halves
    DEV int count(int tile, int h) const
    {
        return n - tile * width - (width == TILE_B ? h * TILE_HALF : 0);
    }
};

// Scales of those rows and of the two rows of tokens whose sums a lane has.
struct TileScales {
    const mpad_gpu_scale &weights;
    const mpad_gpu_codes &codes;
    i64 expert;      // where the scales of its weights start
    int second;      // half of an expert's rows that a tile's second 64 are of
    int token_at[2]; // -1: none
    DEV int row(int tile, int width, int h) const
    {
        int r = tile * width + (width == TILE_B ? h * TILE_HALF : 0);
        return ((weights.row_phase + r) >> weights.row_log2) * weights.ld_row +
               (h && second ? weights.up_offset : 0);
    }
    DEV float weight(int row, int column) const
    {
        return (
            (const float *)weights.data)[expert + row +
                                         ((weights.column_phase + column) >> weights.column_log2) *
                                             weights.ld_column];
    }
    DEV float token(int i, int column) const
    {
        return token_at[i] < 0
                   ? 0.f
                   : codes.scale[token_at[i] + ((codes.phase + column) >> codes.group_log2)];
    }
};

// A stage of the stream: the tile, and which of those along k.
struct TileStage {
    int tile, kt;
    DEV void advance(int n_kt)
    {
        kt++;
        if (kt == n_kt) {
            kt = 0;
            tile++;
        }
    }
};

// LDS: weights, or stages of 128 rows of them, 128 bytes of k each; two tiles' scales of rows;
// stages of BM rows of tokens, as many, or, where the tiles of a run share them, one for each 128
// bytes of k.
template <class KIND, int BM, int STAGES, int WEIGHT_BYTES = STAGES * TILE_B * 128>
struct WarpgroupTile {
    static constexpr int THREADS = BM / 64 * 4 * WAVE, PASS = THREADS / 8;
    static constexpr int A_LOADS = BM / PASS, B_LOADS = TILE_B / PASS;
    static constexpr bool IS_PLAIN = KIND::BITS == 16;
    static constexpr u32 TOKEN_ITEM = KIND::BITS / 8, WEIGHT_ITEM = TOKEN_ITEM; // bytes
    static constexpr int STAGE_BYTES = TILE_B * 128, TOKEN_BYTES = BM * 128;
    static constexpr int SCALES_AT = WEIGHT_BYTES;
    static constexpr int TOKENS_AT = SCALES_AT + MPAD_LDS_ROW_SCALES;
    static_assert(STAGES >= 3 && B_LOADS % 2 == 0, "shape");

    Acc acc[4][2];
    const char *a;
    u32 a_at[A_LOADS], a_ok; // bytes: the thread's rows of tokens; one bit each
    int k, skip;             // bytes of k; those before them that the first stage begins with
    int row, chunk;
    bool is_shared; // the rows of tokens, by the tiles of a run

    DEV void init(const void *tokens, int n_byte, int n_skip, bool shared)
    {
        is_shared = shared;
        a = (const char *)tokens;
        k = n_byte;
        skip = n_skip;
        row = (int)thread_id() / 8;
        chunk = (int)thread_id() % 8;
        a_ok = 0;
    }
    DEV int a_index(int i) const
    {
        return row + i * PASS;
    }
    DEV void a_row(int i, bool ok, u32 at)
    {
        a_at[i] = at;
        a_ok |= (ok ? 1u : 0u) << i;
    }
    // The two rows of tokens whose sums this lane has.
    static DEV int lane_row(int i)
    {
        return wave_id() * 16 + (int)(lane_id() >> 2) + i * 8;
    }
    // Sum e of this lane: of row lane_row(e / 2 % 2), column sum_column(e) of the tile.
    DEV float &sum(int e)
    {
        return acc[e / 16][e / 8 % 2].v[e % 8];
    }
    static DEV int sum_column(int e)
    {
        return 8 * (e / 4) + 2 * (int)(lane_id() & 3) + e % 2;
    }
    DEV Lds token_stage(int slot, int kt) const
    {
        return lds_base() + TOKENS_AT + (is_shared ? kt : slot) * TOKEN_BYTES;
    }
    DEV void stage_tokens(int slot, int kt) const
    {
        int at = kt * 128 + chunk * 16 - skip;
        Lds to = token_stage(slot, kt) + (row * 8 + (chunk ^ (row & 7))) * 16;
        UNROLL for (int i = 0; i < A_LOADS; i++) stage16(
            to + i * PASS * 128, {a}, a_at[i] + (u32)at, at >= 0 && at < k && (a_ok >> i & 1));
    }
    DEV void stage_weights(int slot, const TileRows &b, int tile, int kt) const
    {
        int at = kt * 128 + chunk * 16 - skip;
        Lds to = lds_base() + slot * STAGE_BYTES + (row * 8 + (chunk ^ (row & 7))) * 16;
        u32 first = (u32)(tile * b.width + row) * b.ld + (u32)at;
        UNROLL for (int i = 0; i < B_LOADS; i++)
        {
            int h = i / (B_LOADS / 2), r = i % (B_LOADS / 2) * PASS;
            stage16(to + i * PASS * 128, {b.data}, first + (u32)r * b.ld + (h ? b.half : 0),
                    at >= 0 && at < k && row + r < b.count(tile, h));
        }
    }
    // Multiplies tiles [tile, end), of `rows` rows of tokens, and calls finish(tile) with the sums
    // in acc, scaled.
    template <class F>
    DEV void run(const mpad_gpu_args &, const TileRows &b, const TileScales &scales, int tile,
                 int end, int rows, F finish)
    {
        bool is_active = BM == 64 || wave_id() / 4 * 64 < rows,
             by_column = scales.weights.ld_column != 0;
        int n_kt = k > 0 ? (k + skip + 127) / 128 : 1, kt = 0; // without k the sums are zeros
        int first = tile, slot = 0;
        TileStage ahead = {tile, 0};
        auto stage_ahead = [&](int to) {
            if (ahead.tile < end) {
                if (ahead.tile == first || !is_shared)
                    stage_tokens(to, ahead.kt);
                stage_weights(to, b, ahead.tile, ahead.kt);
                ahead.advance(n_kt);
            }
            stage_commit();
        };
        UNROLL for (int i = 0; i < STAGES - 1; i++) stage_ahead(i);
        Lds of_rows = lds_base() + SCALES_AT;
        float of_row = 0.f; // of the next tile
        auto look_up_row = [&](int t) {
            int h = thread_id() >= TILE_HALF, r = (int)thread_id() % TILE_HALF;
            if (thread_id() < TILE_B && t < end && r < b.count(t, h))
                of_row = scales.weight(scales.row(t, b.width, h) + r * scales.weights.ld_row, 0);
        };
        if (!IS_PLAIN && !by_column)
            look_up_row(tile);
        typename KIND::Sums part[4][2];
        UNROLL for (int e = 0; e < 64; e++) sum(e) = 0.f;
        NO_UNROLL while (tile < end)
        {
            float weight[2], token[2];
            if constexpr (!IS_PLAIN) {
                UNROLL for (int h = 0; h < 2 && by_column; h++)
                {
                    int column = kt > 0 ? kt * 128 - skip : 0;
                    weight[h] = b.count(tile, h) > 0
                                    ? scales.weight(scales.row(tile, b.width, h), column)
                                    : 0.f;
                    token[h] = scales.token(h, column);
                }
                if (!by_column && kt == 0) {
                    if (thread_id() < TILE_B)
                        lds_write<float>(of_rows + ((tile & 1) * TILE_B + (int)thread_id()) * 4,
                                         of_row);
                    look_up_row(tile + 1);
                }
            }
            stage_wait_all_but<STAGES - 2>();
            wgmma_publish();
            block_barrier(); // the stage is there for all; the one before was multiplied by all
            stage_ahead(slot == 0 ? STAGES - 1 : slot - 1);
            Lds at = lds_base() + slot * STAGE_BYTES;
            Lds tokens = token_stage(slot, kt) + wave_id() / 4 * 64 * 128;
            slot = slot + 1 == STAGES ? 0 : slot + 1;
            bool is_last = kt + 1 == n_kt;
            if constexpr (IS_PLAIN) {
                if (is_active)
                    wgmma_stage<KIND>(acc, tokens, at, true);
                wgmma_wait();
                wgmma_arrive(acc);
            } else {
                if (is_active)
                    wgmma_stage<KIND>(part, tokens, at, false);
                wgmma_wait();
                wgmma_arrive(part);
                float factor[2][2];
                UNROLL for (int h = 0; h < 2; h++) UNROLL for (int i = 0; i < 2; i++) factor[h][i] =
                    by_column ? weight[h] * token[i] : 1.f;
                UNROLL for (int e = 0; e < 64; e++) sum(e) = fused_mul_add(
                    (float)part[e / 16][e / 8 % 2].v[e % 8], factor[e / 32][e / 2 % 2], sum(e));
            }
            kt++;
            if (!is_last)
                continue;
            if constexpr (!IS_PLAIN) {
                if (!by_column) {
                    Lds row_scales = of_rows + (tile & 1) * TILE_B * 4;
                    UNROLL for (int i = 0; i < 2; i++) token[i] = scales.token(i, 0);
                    UNROLL for (int e = 0; e < 64; e++) sum(e) *=
                        token[e / 2 % 2] * lds_read<float>(row_scales + sum_column(e) * 4);
                }
            }
            if (is_active)
                finish(tile);
            UNROLL for (int e = 0; e < 64; e++) sum(e) = 0.f;
            kt = 0;
            tile++;
        }
    }
};

// Stores `N` columns of one of a lane's two rows, 16 bytes by a lane. value(j, p): column 8 * j + 2
// * (lane % 4) + p; put(column, 8 values from there on).
template <class T, int N, class VALUE, class PUT> DEV void quad_store(VALUE value, PUT put)
{
    UNROLL for (int j = 0; j < N / 8; j += 4)
    {
        u32 w[4];
        UNROLL for (int i = 0; i < 4; i++) w[i] = pack_pair<T>(value(j + i, 0), value(j + i, 1));
        put(8 * (j + (int)(lane_id() & 3)), quad_turn(w[0], w[1], w[2], w[3]));
    }
}

// Calls f with the kind of the call's bytes.
template <class F> DEV void bytes_select(const mpad_gpu_args &a, F f)
{
    if (a.weight_values == MPAD_GPU_VALUES_INTEGER)
        return f(Int8Int8());
    if (a.weight_values == MPAD_GPU_VALUES_E5M2)
        return f(E4m3E5m2());
    return f(E4m3E4m3());
}

#endif
