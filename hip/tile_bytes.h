// Level 4: the block tile of codes and weights that are multiplied as the bytes they are. What it
// moves are pairs of bytes, so that rows, masks and loads are those of plain 16-bit elements
// (tile.h). A stage is 128 columns that share their scales: where blocks of scales begin in the
// middle of one, so do the rows, and nothing is before them. Sums of columns that share scales are
// multiplied by those of their rows in float32 and added up.
#pragma once
#include "stored.h"
#include "tile.h"

#if MPAD_HAVE_BYTES_TILE

template <class T, int BM, int WM, int WN> struct ByteTile : Tile<T, Plain, true, BM, WM, WN, 2> {
    typedef Tile<T, Plain, true, BM, WM, WN, 2> Base;
    typedef u8 Input;
    static constexpr bool IS_CODED = true, IS_SCALED = true;
    static constexpr int A_ITEM = 1, B_ITEM = 1;
    static constexpr int TM = Base::TM, TN = Base::TN, HALF = TM / 2;
    static constexpr int STAGE_K = 128;
    // Scales of a stage: of 128 rows of B, then of BM of A; one by a thread. A wave may read those
    // of a stage while another writes those of the next but one: a ring of four.
    static constexpr int SCALES = TILE_B + BM, RING = 4, SCALES_AT = 2 * Base::STAGE_BYTES;
    static constexpr int INPUT_LOADS = 1;
    static_assert(SCALES <= Base::THREADS && TILE_B % WAVE == 0, "shape");

    // Of the thread's row, where the tensor's scales have its first; without a row, another's.
    i64 scale_at;
    int input_at[INPUT_LOADS];
    // And its scales, column k's at ((phase + k) >> log2) * ld.
    const float *scale;
    int phase, log2, ld;
    int wm, wn; // the wave's place
    int skip;   // columns before the first that the first stage begins with

    DEV void clear(int n_k)
    {
        Base::clear(n_k / 2);
        scale_at = 0;
    }
    DEV void b_rows(u32 at, int ld_row, int half, int n0, int n1)
    {
        Base::b_rows(at / 2, ld_row / 2, half / 2, n0, n1);
    }
    DEV int input_row_of(int) const
    {
        int r = (int)thread_id() - TILE_B;
        return r >= 0 ? r : BM;
    }
    // As StoredTile has it.
    DEV void scales(const mpad_gpu_scale &s, int expert, int half0, int row0, int n0, int half1,
                    int row1, int n1)
    {
        int r = (int)thread_id() % TILE_B, second = r >= TILE_HALF;
        r -= second * TILE_HALF;
        if (r < (second ? n1 : n0))
            scale_at = scale_row(s, expert, second ? half1 : half0, (second ? row1 : row0) + r);
    }

    struct Pipeline {
        typename Base::Staged staged[2];
        float scale[2];
        ByteFrag x[TM], w[2][TN];
    };
    DEV void fetch(Pipeline &p, int f, int kt) const
    {
        Base::fetch(p.staged[f], kt);
        int k = kt * STAGE_K - skip, last = this->k * 2 - skip - 1;
        k = k < 0 ? 0 : k < last ? k : last;
        p.scale[f] = scale[((phase + k) >> log2) * ld];
    }
    DEV static Lds scales_of(int kt)
    {
        return lds_base() + SCALES_AT + kt % RING * SCALES * 4;
    }
    DEV void store(const Pipeline &p, int f, int kt) const
    {
        Base::store(f, p.staged[f]);
        if (thread_id() < SCALES)
            lds_write<float>(scales_of(kt) + (int)thread_id() * 4, p.scale[f]);
    }
    template <int FROM, int TO> DEV void read_a(Pipeline &p, int f) const
    {
        Lds stage = lds_base() + f * Base::STAGE_BYTES;
        UNROLL for (int i = FROM; i < TO; i++) p.x[i] =
            byte_frag(stage, Base::a_first(i, wm), (int)lane_id());
    }
    DEV void read_b(Pipeline &p, int f) const
    {
        Lds stage = lds_base() + f * Base::STAGE_BYTES + BM * 128;
        UNROLL for (int j = 0; j < TN; j++) p.w[f][j] =
            byte_frag(stage, Base::b_first(j, wn), (int)lane_id());
    }
    template <class KIND, int FROM, int TO> DEV void multiply(const Pipeline &p, int f)
    {
        UNROLL for (int i = FROM; i < TO; i++) UNROLL for (int j = 0; j < TN; j++)
            KIND::multiply(this->acc[i][j], p.x[i], p.w[f][j]);
    }
    // Stage kt in LDS stage P, its weights and the first half of its rows of tokens read; stage kt
    // + 1 in registers 1 - P.
    template <class KIND, int P, class FOLD> DEV void turn(Pipeline &p, int kt, FOLD fold)
    {
        fetch(p, P, kt + 2);
        read_a<HALF, TM>(p, P);
        multiply<KIND, 0, HALF>(p, P);
        schedule_barrier();
        store(p, 1 - P, kt + 1);
        schedule_barrier();
        block_barrier(); // stage kt + 1 is in LDS; stage kt's last fragments are read
        read_b(p, 1 - P);
        read_a<0, HALF>(p, 1 - P);
        multiply<KIND, HALF, TM>(p, P);
        schedule_barrier();
        fold(kt);
    }
    // From the beginning on by kind: what kinds share would have registers of its own.
    template <class KIND> DEV void run_kind(const mpad_gpu_scale &s, const mpad_gpu_codes &codes)
    {
        wm = wave_id() / WN;
        wn = wave_id() % WN;
        bool is_b = wave_id() < TILE_B / WAVE;
        scale = is_b ? (const float *)s.data + scale_at
                     : codes.scale + (input_at[0] < 0 ? 0 : input_at[0]);
        phase = is_b ? s.column_phase : codes.phase;
        log2 = is_b ? s.column_log2 : codes.group_log2;
        ld = is_b ? s.ld_column : 1;
        skip = s.column_phase % STAGE_K;
        UNROLL for (int i = 0; i < Base::A_LOADS; i++) this->a_at[i] -= (u32)skip;
        this->b_at -= (u32)skip;
        this->k += skip / 2;
        int n_kt = (this->k * 2 + STAGE_K - 1) / STAGE_K;
        Acc sum[TM][TN];
        UNROLL for (int i = 0; i < TM; i++) UNROLL for (int j = 0; j < TN; j++) sum[i][j] =
            acc_zero();
        // Without scales by column at the end, and before a sum of integers could leave 32 bits.
        constexpr int STAGES_MOST = (1 << 16) / STAGE_K;
        auto fold = [&](int kt) {
            if (s.ld_column == 0 && kt + 1 < n_kt && (kt + 1) % STAGES_MOST != 0)
                return;
            Lds at = scales_of(kt);
            this->template fold<KIND, true>(sum, at, at + (TILE_B + Base::a_first(0, wm)) * 4);
        };
        Pipeline p;
        u32 a_ok = this->a_ok, b_ok = this->b_ok;
        if (this->chunk * 16 < skip)
            this->a_ok = this->b_ok = 0;
        fetch(p, 0, 0);
        this->a_ok = a_ok;
        this->b_ok = b_ok;
        fetch(p, 1, 1);
        store(p, 0, 0);
        block_barrier(); // stage 0 is in LDS
        read_b(p, 0);
        read_a<0, HALF>(p, 0);
        NO_UNROLL for (int kt = 0; kt < n_kt; kt += 2)
        {
            turn<KIND, 0>(p, kt, fold);
            if (kt + 1 < n_kt)
                turn<KIND, 1>(p, kt + 1, fold);
        }
        UNROLL for (int i = 0; i < TM; i++) UNROLL for (int j = 0; j < TN; j++) this->acc[i][j] =
            sum[i][j];
    }
    DEV void run(const mpad_gpu_args &a, const mpad_gpu_scale &s, const mpad_gpu_codes &codes)
    {
        if (a.weight_values == MPAD_GPU_VALUES_INTEGER)
            return run_kind<Int8Int8>(s, codes);
#    if MPAD_HAVE_E5M2_BYTES
        if (a.weight_values == MPAD_GPU_VALUES_E5M2)
            return run_kind<E4m3E5m2>(s, codes);
#    endif
#    if MPAD_HAVE_E4M3_BYTES
        return run_kind<E4m3E4m3>(s, codes);
#    endif
    }
};
#endif
