// Level 4: the block tile over quantised weights. B goes from memory to registers as it is stored,
// and to LDS as T; sums of a run of columns that share their scales are multiplied by them in
// float32 and added up. Where A is codes (codes.hip), each row's scale of the run is a factor too.
// A tile of plain weights is as tile.h has it.
#pragma once
#include "stored.h"
#include "tile.h"

template <class T, class W, bool VECTOR, int BM, int WM, int WN, int STAGES, bool CODED>
struct StoredTile : Tile<T, W, VECTOR, BM, WM, WN, STAGES> {
    typedef Tile<T, W, VECTOR, BM, WM, WN, STAGES> Base;
    static constexpr bool IS_CODED = CODED, IS_SCALED = W::BITS < 16;
    typedef u16 Input; // an element of A; bytes of one of A, of B
    static constexpr int A_ITEM = sizeof(Input), B_ITEM = W::BITS < 16 ? 1 : 2;
    static constexpr int THREADS = Base::THREADS, TM = Base::TM, TN = Base::TN;
    static constexpr int GROUP = 32, GROUPS = TILE_K / GROUP; // columns of one scale at least
    static constexpr int SCALES = GROUPS * TILE_B, INPUT_SCALES = CODED ? GROUPS * BM : 0;
    static constexpr int STAGE_BYTES = Base::STAGE_BYTES + (SCALES + INPUT_SCALES) * 4;
    static constexpr int SCALE_LOADS = SCALES > THREADS ? SCALES / THREADS : 1;
    static constexpr int INPUT_LOADS = INPUT_SCALES > THREADS ? INPUT_SCALES / THREADS : 1;
    // Chunks that one branch serves; the scales of codes take the registers of half of them.
    static constexpr int DECODED = CODED ? Base::B_LOADS / 2 : Base::B_LOADS;
    static_assert(W::BITS == 16 || SCALES % THREADS == 0, "shape");

    i64 scale_at[SCALE_LOADS]; // of the rows of B whose scales the thread loads
    u32 scale_ok;
    int input_at[INPUT_LOADS]; // of the rows of A; -1: none

    // Row r of the first half of B is row `row0` + r of the expert's half `half0`, row r of the
    // second one row `row1` + r of half `half1`; n0 and n1 rows exist.
    DEV void scales(const mpad_gpu_scale &s, int expert, int half0, int row0, int n0, int half1,
                    int row1, int n1)
    {
        scale_ok = 0;
        UNROLL for (int i = 0; i < SCALE_LOADS; i++)
        {
            int r = scale_row_of(i), second = r >= TILE_HALF;
            r -= second * TILE_HALF;
            scale_at[i] = scale_row(s, expert, second ? half1 : half0, (second ? row1 : row0) + r);
            scale_ok |= (r < (second ? n1 : n0) ? 1u : 0u) << i;
        }
    }
    // Row of A whose scale load i of this thread is; beyond BM where there are more threads.
    DEV int input_row_of(int i) const
    {
        int n = (int)(thread_id() + i * THREADS);
        return n < INPUT_SCALES ? n % BM : BM;
    }
    DEV int input_group_of(int i) const
    {
        return (int)(thread_id() + i * THREADS) / BM;
    }
    DEV int scale_row_of(int i) const
    {
        return (int)(thread_id() + i * THREADS) % TILE_B;
    }
    DEV int scale_group_of(int i) const
    {
        return (int)(thread_id() + i * THREADS) / TILE_B;
    }

    struct Staged {
        u4 a[Base::A_LOADS];
        Stored<W> b[Base::B_LOADS];
        u32 scale[SCALE_LOADS];
        float input[INPUT_LOADS];
    };
    DEV void fetch(Staged &r, const mpad_gpu_scale &s, const mpad_gpu_codes &codes, int kt) const
    {
        UNROLL for (int i = 0; i < Base::B_LOADS; i++) r.b[i] = run_stored<W, VECTOR>(
            run_make(this->b, this->b_offset(i) + (u32)kt * (TILE_K / 8 * W::BITS),
                     this->left(kt, this->b_ok, i)),
            0);
        UNROLL for (int i = 0; i < Base::A_LOADS; i++) r.a[i] = run_chunk<VECTOR, false>(
            run_make(this->a, this->a_at[i] + (u32)kt * 128, this->left(kt, this->a_ok, i)), 0);
        UNROLL for (int i = 0; i < SCALE_LOADS; i++)
        {
            int k = kt * TILE_K + scale_group_of(i) * GROUP;
            r.scale[i] = scale_load(s, scale_at[i], k, (scale_ok >> i & 1) && k < this->k);
        }
        if constexpr (CODED) {
            UNROLL for (int i = 0; i < INPUT_LOADS; i++)
            {
                int k = kt * TILE_K + input_group_of(i) * GROUP;
                r.input[i] =
                    input_at[i] >= 0 && k < this->k
                        ? codes.scale[input_at[i] + ((codes.phase + k) >> codes.group_log2)]
                        : 0.f;
            }
        }
    }
    DEV static Lds stage_at(int kt)
    {
        return lds_base() + (kt & 1) * STAGE_BYTES;
    }
    DEV void store(const mpad_gpu_args &args, const mpad_gpu_scale &s, int kt,
                   const Staged &r) const
    {
        Lds stage = stage_at(kt);
        Lds to = stage + (this->row * 8 + (this->chunk ^ (this->row & 7))) * 16;
        UNROLL for (int i = 0; i < Base::A_LOADS; i++)
        {
            if (this->a_index(i) < BM)
                lds_write<u4>(to + i * Base::PASS * 128, r.a[i]);
        }
        UNROLL for (int i = 0; i < Base::B_LOADS; i += DECODED)
        {
            Stored<W> stored[DECODED];
            u4 b[DECODED];
            UNROLL for (int j = 0; j < DECODED; j++) stored[j] = r.b[i + j];
            chunks_decode<T, AnyForm>(args, b, stored);
            UNROLL for (int j = 0; j < DECODED; j++)
                lds_write<u4>(to + (BM + (i + j) * Base::PASS) * 128, b[j]);
        }
        UNROLL for (int i = 0; i < SCALE_LOADS; i++)
            lds_write<float>(stage + Base::STAGE_BYTES + (int)(thread_id() + i * THREADS) * 4,
                             scale_value(s, r.scale[i]));
        if constexpr (CODED) {
            UNROLL for (int i = 0; i < INPUT_LOADS; i++)
            {
                if (input_row_of(i) < BM)
                    lds_write<float>(stage + Base::STAGE_BYTES +
                                         (SCALES + (int)thread_id() + i * THREADS) * 4,
                                     r.input[i]);
            }
        }
    }
    // Two LDS stages; global memory is read two tiles ahead, one of them in registers.
    DEV void run(const mpad_gpu_args &args, const mpad_gpu_scale &s, const mpad_gpu_codes &codes)
    {
        if constexpr (W::BITS == 16)
            return Base::run();
        int n_kt = (this->k + TILE_K - 1) / TILE_K;
        Acc sum[TM][TN];
        UNROLL for (int i = 0; i < TM; i++) UNROLL for (int j = 0; j < TN; j++) sum[i][j] =
            acc_zero();
        Staged staged;
        fetch(staged, s, codes, 0);
        store(args, s, 0, staged);
        fetch(staged, s, codes, 1);
        block_barrier(); // tile 0 is in LDS
        NO_UNROLL for (int kt = 0; kt < n_kt; kt++)
        {
            if (kt + 1 < n_kt)
                store(args, s, kt + 1, staged);
            fetch(staged, s, codes, kt + 2);
            Lds stage = stage_at(kt);
            UNROLL for (int g = 0; g < GROUPS; g++)
            {
                UNROLL for (int i = 0; i < TILE_STEPS / GROUPS; i++)
                {
                    int step = g * (TILE_STEPS / GROUPS) + i;
                    TileFrag x[TM];
                    this->read_a(x, stage, step);
                    UNROLL for (int j = 0; j < TN; j++)
                    {
                        TileFrag w = this->read_b(stage, step, j);
                        UNROLL for (int m = 0; m < TM; m++) tile_step<T>(this->acc[m][j], x[m], w);
                    }
                }
                int next = kt * TILE_K + (g + 1) * GROUP;
                bool is_end = next >= this->k;
                if (is_end || (s.column_phase + next) >> s.column_log2 !=
                                  (s.column_phase + next - GROUP) >> s.column_log2)
                    this->template fold<FloatSums, CODED>(
                        sum, stage + Base::STAGE_BYTES + g * TILE_B * 4,
                        stage + Base::STAGE_BYTES +
                            (SCALES + g * BM + this->a_first(0, wave_id() / WN)) * 4);
            }
            block_barrier(); // tile kt + 1 is in LDS; tile kt is read
        }
        UNROLL for (int i = 0; i < TM; i++) UNROLL for (int j = 0; j < TN; j++) this->acc[i][j] =
            sum[i][j];
    }
};
