// Level 4: the warpgroup tile over quantised weights and tokens of T. Stages of the stream have the
// weights as they are stored; a stage becomes T in LDS, by the threads that loaded it, while the
// stage before is multiplied. e8m0 scales become factors of the weights there; others multiply
// sums in float32.
#pragma once
#include "tile_warpgroup.h"

#if MPAD_HAVE_WGMMA

// LDS before the scales of rows: two stages of weights as T, then those as they are stored.
template <class T, class W, int BM, int STAGES>
struct StoredWarpgroupTile
    : WarpgroupTile<WgmmaPlain<T>, BM, STAGES, MPAD_LDS_DECODED + STAGES * TILE_B * 8 * W::BITS> {
    typedef WgmmaPlain<T> Kind;
    typedef WarpgroupTile<Kind, BM, STAGES, MPAD_LDS_DECODED + STAGES * TILE_B * 8 * W::BITS> Base;
    static constexpr u32 WEIGHT_ITEM = 1;
    static constexpr int THREADS = Base::THREADS;
    // 16 stored bytes of a row, as many as make N chunks of T; of a stage a row has CHUNKS, the
    // block takes ROWS rows at a time.
    static constexpr int N = 16 / W::BITS, CHUNKS = W::BITS / 2, ROWS = THREADS / CHUNKS;
    static constexpr int LOADS = TILE_B / ROWS;

    static DEV int load_row(int i)
    {
        return (int)thread_id() / CHUNKS + i * ROWS;
    }
    static DEV int load_chunk()
    {
        return (int)thread_id() % CHUNKS;
    }
    // The thread's own 16 bytes of load i are at i * THREADS * 16.
    static DEV Lds stored_stage(int slot)
    {
        return lds_base() + MPAD_LDS_DECODED + slot * TILE_B * 8 * W::BITS + (int)thread_id() * 16;
    }
    static DEV Lds decoded_stage(int half)
    {
        return lds_base() + half * Base::STAGE_BYTES;
    }
    DEV int stored_bytes() const // of a row
    {
        return this->k / 16 * W::BITS;
    }
    DEV void stage_stored(int slot, const TileRows &b, TileStage stage) const
    {
        int at = stage.kt * 8 * W::BITS + load_chunk() * 16;
        UNROLL for (int i = 0; i < LOADS; i++)
        {
            int h = load_row(i) / TILE_HALF, r = load_row(i) % TILE_HALF;
            u32 from = (u32)(stage.tile * b.width + r) * b.ld + (h ? b.half : 0) + (u32)at;
            stage16(stored_stage(slot) + i * THREADS * 16, {b.data}, from,
                    at < stored_bytes() && r < b.count(stage.tile, h));
        }
    }
    // e8m0 scales, of the thread's loads of a stage.
    struct FoldedScales {
        u32 of[LOADS];
    };
    // The stream: stages that are on their way up to `ahead`, scales up to `ahead_scales`; the
    // stage that is multiplied next, in LDS and decoded, and the scales of the two after it.
    struct Stream {
        const mpad_gpu_args &args;
        const TileRows &rows;
        const TileScales &scales;
        int first, end, n_kt;
        bool is_active;
        TileStage ahead, ahead_scales;
        int tile, slot, half;
        FoldedScales next, after;
    };
    DEV void stage_ahead(Stream &s, int to) const
    {
        if (s.ahead.tile < s.end) {
            if (s.ahead.tile == s.first || !this->is_shared)
                this->stage_tokens(to, s.ahead.kt);
            stage_stored(to, s.rows, s.ahead);
            s.ahead.advance(s.n_kt);
        }
        stage_commit();
    }
    template <class FORM> DEV void scales_ahead(Stream &s) const
    {
        if constexpr (FORM::is_folded) {
            int column = s.ahead_scales.kt * TILE_K + load_chunk() * N * 8,
                tile = s.ahead_scales.tile;
            s.next = s.after;
            UNROLL for (int i = 0; i < LOADS; i++)
            {
                int h = load_row(i) / TILE_HALF, r = load_row(i) % TILE_HALF;
                i64 row = s.scales.expert + s.scales.row(tile, s.rows.width, h) +
                          r * s.scales.weights.ld_row;
                s.after.of[i] = scale_load_as<W, FORM>(s.scales.weights, row, column,
                                                       tile < s.end && r < s.rows.count(tile, h) &&
                                                           column * 2 < this->k);
            }
            s.ahead_scales.advance(s.n_kt);
        }
    }
    template <class FORM> DEV void decode(const Stream &s) const
    {
        u4 raw[LOADS];
        UNROLL for (int i = 0; i < LOADS; i++) raw[i] =
            lds_read<u4>(stored_stage(s.slot) + i * THREADS * 16);
        UNROLL for (int i = 0; i < LOADS; i++)
        {
            u4 chunk[N];
            wide_decode<T, W, FORM>(s.args, chunk, raw[i], s.next.of[i]);
            int r = load_row(i);
            UNROLL for (int j = 0; j < N; j++) lds_write<u4>(
                decoded_stage(s.half) + (r * 8 + ((load_chunk() * N + j) ^ (r & 7))) * 16,
                chunk[j]);
        }
    }
    // Scales of a tile's rows, before the barrier that its last stage follows.
    template <class FORM> DEV void put_row_scales(const Stream &s, int tile) const
    {
        int h = thread_id() >= TILE_HALF, r = (int)thread_id() % TILE_HALF;
        if (FORM::scale == SCALE_ROW && thread_id() < TILE_B && tile < s.end &&
            r < s.rows.count(tile, h)) {
            i64 row =
                s.scales.expert + s.scales.row(tile, s.rows.width, h) + r * s.scales.weights.ld_row;
            lds_write<float>(
                row_scales(tile) + (int)thread_id() * 4,
                scale_value(s.scales.weights, scale_load(s.scales.weights, row, 0, true)));
        }
    }
    static DEV Lds row_scales(int tile)
    {
        return lds_base() + Base::SCALES_AT + (tile & 1) * TILE_B * 4;
    }
    template <class FORM> DEV void begin(Stream &s) const
    {
        UNROLL for (int i = 0; i < STAGES - 1; i++) stage_ahead(s, i);
        scales_ahead<FORM>(s);
        scales_ahead<FORM>(s);
        put_row_scales<FORM>(s, s.tile);
        stage_wait_all_but<STAGES - 2>();
        decode<FORM>(s);
        wgmma_publish();
        block_barrier(); // the first stage is there for all
    }
    // The sums of the next tile, scaled, come to acc.
    template <class FORM> DEV void next_tile(Stream &s)
    {
        constexpr bool BY_BLOCK = FORM::scale == SCALE_FETCH;
        const mpad_gpu_scale &scale = s.scales.weights;
        Acc part[4][2]; // of columns that share scales
        float weight[2] = {0.f, 0.f};
        int block_end = (1 << scale.column_log2) - 1;
        UNROLL for (int e = 0; e < 64; e++) this->sum(e) = 0.f;
        NO_UNROLL for (int kt = 0; kt < s.n_kt; kt++)
        {
            scales_ahead<FORM>(s);
            int column = scale.column_phase + kt * TILE_K;
            bool is_last = kt + 1 == s.n_kt, is_begin = kt == 0 || (column & block_end) == 0;
            Lds tokens = this->token_stage(s.slot, kt) + wave_id() / 4 * 64 * 128;
            if constexpr (BY_BLOCK) {
                if (is_begin) {
                    UNROLL for (int h = 0; h < 2; h++) weight[h] =
                        s.rows.count(s.tile, h) > 0
                            ? s.scales.weight(s.scales.row(s.tile, s.rows.width, h), kt * TILE_K)
                            : 0.f;
                }
                if (s.is_active)
                    wgmma_stage<Kind>(part, tokens, decoded_stage(s.half), !is_begin);
            } else {
                if (s.is_active)
                    wgmma_stage<Kind>(this->acc, tokens, decoded_stage(s.half), true);
            }
            stage_ahead(s, s.slot == 0 ? STAGES - 1 : s.slot - 1);
            s.slot = s.slot + 1 == STAGES ? 0 : s.slot + 1;
            s.half = 1 - s.half;
            stage_wait_all_but<STAGES - 2>();
            decode<FORM>(s);
            wgmma_publish();
            if (is_last)
                put_row_scales<FORM>(s, s.tile + 1);
            wgmma_wait();
            if constexpr (BY_BLOCK) {
                wgmma_arrive(part);
                if (is_last || (column + TILE_K & block_end) == 0) {
                    UNROLL for (int e = 0; e < 64; e++) this->sum(e) = fused_mul_add(
                        part[e / 16][e / 8 % 2].v[e % 8], weight[e / 32], this->sum(e));
                }
            } else {
                wgmma_arrive(this->acc);
            }
            if (FORM::scale == SCALE_ROW && is_last) {
                UNROLL for (int e = 0; e < 64; e++) this->sum(e) *=
                    lds_read<float>(row_scales(s.tile) + Base::sum_column(e) * 4);
            }
            block_barrier(); // the next stage is there for all; this one was multiplied by all
        }
        s.tile++;
    }
    // As the base has it.
    template <class F>
    DEV void run(const mpad_gpu_args &a, const TileRows &b, const TileScales &scales, int tile,
                 int end, int rows, F finish)
    {
        int n_kt = this->k > 0 ? (this->k + 127) / 128 : 1;
        bool is_active = BM == 64 || wave_id() / 4 * 64 < rows;
        Stream s = {a,         b,         scales, tile, end, n_kt, is_active,
                    {tile, 0}, {tile, 0}, tile,   0,    0,   {},   {}};
        auto select = [&](auto f) { decoded_select<T, W, true>(a, scales.weights, f); };
        select([&](auto form) { begin<decltype(form)>(s); });
        NO_UNROLL for (; tile < end; tile++)
        {
            select([&](auto form) { next_tile<decltype(form)>(s); });
            if (is_active)
                finish(tile);
        }
    }
};

// The tile of weights that are stored as W.
template <class T, class W, int BM, int STAGES> struct WarpgroupTileOf {
    typedef StoredWarpgroupTile<T, W, BM, STAGES> Tile;
};
template <class T, int BM, int STAGES> struct WarpgroupTileOf<T, Plain, BM, STAGES> {
    typedef WarpgroupTile<WgmmaPlain<T>, BM, STAGES> Tile;
};

#endif
