// Level 3: one block tile of a grouped product, through LDS: acc = rows of A times rows of B
// transposed. A is BM gathered rows (tokens), B 128 rows of weights in two halves of 64; both with
// K contiguous. LDS holds stages of (BM + 128) rows of 128 bytes, swizzled (mma.h).
#pragma once
// RDNA has too few registers per wave for these tiles: its images leave the families out.
#if defined(__CUDACC__) || defined(__GFX9__)
#    define MPAD_HAVE_TILE 1
#endif

#include "memory.h"
#include "mma.h"

constexpr int TILE_HALF = 64, TILE_B = 128,
              TILE_K = 64; // rows of a half, of B; elements of K per stage

// Row pitch, in floats, of finished sums in LDS: a wave's stores meet each bank equally often.
#if MPAD_NVIDIA
constexpr int TILE_MAX_STAGES = 8, TILE_SUM_PITCH = TILE_B + 8;
#else
constexpr int TILE_MAX_STAGES = 2, TILE_SUM_PITCH = TILE_B + 4;
#endif

// Sums of products as float32.
struct FloatSums {
    static DEV float value(float sum)
    {
        return sum;
    }
};

// BM rows of A by WM x WN waves; wave (wm, wn) has rows wm * BM / WM on and, of each half of B,
// rows wn * 64 / WN on.
template <class T, class W, bool VECTOR, int BM, int WM, int WN, int STAGES_WANTED> struct Tile {
    static constexpr int A_ROWS = BM, THREADS = WM * WN * WAVE;
    static constexpr int STAGES = STAGES_WANTED < TILE_MAX_STAGES ? STAGES_WANTED : TILE_MAX_STAGES;
    static constexpr int TM = BM / WM / 16, TN = TILE_B / WN / 16;
    static constexpr int PASS = THREADS / 8; // rows staged by one load of every thread
    static constexpr int A_LOADS = BM > PASS ? BM / PASS : 1, B_LOADS = TILE_B / PASS;
    static constexpr int STAGE_BYTES = (BM + TILE_B) * 128;
    static_assert(BM / WM * TILE_SUM_PITCH * 4 <= STAGES * STAGE_BYTES, "sums fit the stages");
    static_assert(PASS % 8 == 0 && TN % 2 == 0 && B_LOADS % 2 == 0, "shape");

    Acc acc[TM][TN];
    Buffer a, b;
    u32 a_at[A_LOADS], b_at, b_row,
        b_half;     // bytes: the thread's rows of A; first row of B, row step, half step
    u32 a_ok, b_ok; // one bit per load
    int k, chunk, row;

    DEV void clear(int n_k)
    {
        k = n_k;
        chunk = (int)(thread_id() % 8);
        row = (int)(thread_id() / 8);
        a_ok = b_ok = 0;
        UNROLL for (int i = 0; i < TM; i++) UNROLL for (int j = 0; j < TN; j++) acc[i][j] =
            acc_zero();
    }
    // Row of A that load i of this thread stages; beyond BM where a pass is longer than A.
    DEV int a_index(int i) const
    {
        return row + i * PASS;
    }
    DEV void a_row(int i, bool ok, u32 at)
    {
        a_at[i] = at + (u32)chunk * 16;
        a_ok |= (ok && a_index(i) < BM ? 1u : 0u) << i;
    }
    // First row of B at element `at`, rows `ld` elements apart, the second half `half` elements
    // after the first, all stored elements; n0 and n1 rows of the halves exist.
    DEV void b_rows(u32 at, int ld, int half, int n0, int n1)
    {
        constexpr u32 ITEM = W::BITS < 16 ? 1 : 2;
        b_at = (at + (u32)(row * ld)) * ITEM + (u32)chunk * W::BITS;
        b_row = (u32)(PASS * ld) * ITEM;
        b_half = (u32)half * ITEM;
        UNROLL for (int i = 0; i < B_LOADS; i++)
        {
            int h = i / (B_LOADS / 2), r = row + i % (B_LOADS / 2) * PASS;
            b_ok |= (r < (h ? n1 : n0) ? 1u : 0u) << i;
        }
    }
    DEV Lds slot(int stage) const
    {
        return lds_base() + stage * STAGE_BYTES + (row * 8 + (chunk ^ (row & 7))) * 16;
    }
    DEV u32 b_offset(int i) const
    {
        return b_at + (u32)(i % (B_LOADS / 2)) * b_row + (u32)(i / (B_LOADS / 2)) * b_half;
    }
    DEV int left(int kt, u32 ok, int i) const
    {
        return ok >> i & 1 ? k - kt * TILE_K - chunk * 8 : 0;
    }

    template <int FROM, int TO> DEV void multiply(const TileFrag (&x)[TM], const TileFrag (&w)[TN])
    {
        UNROLL for (int i = FROM; i < TO; i++) UNROLL for (int j = 0; j < TN; j++)
            tile_step<T>(acc[i][j], x[i], w[j]);
    }
    // First rows of the fragments of wave (wm, wn) in a stage.
    static DEV int a_first(int i, int wm)
    {
        return wm * (BM / WM) + i * 16;
    }
    static DEV int b_first(int j, int wn)
    {
        return j / (TN / 2) * TILE_HALF + wn * (TILE_HALF / WN) + j % (TN / 2) * 16;
    }
    DEV void read_a(TileFrag (&x)[TM], Lds stage, int step) const
    {
        UNROLL for (int i = 0; i < TM; i++) x[i] =
            tile_tokens(stage, a_first(i, wave_id() / WN), step, (int)lane_id());
    }
    DEV TileFrag read_b(Lds stage, int step, int j) const
    {
        return tile_weights(stage + BM * 128, b_first(j, wave_id() % WN), step, (int)lane_id());
    }
    // sum += acc, as SUMS has it, times the scales of its rows of B and, with CODED, of A; acc = 0.
    // Those of A come last: codes may be of numbers whose product with stored weights would
    // overflow.
    template <class SUMS, bool CODED> DEV void fold(Acc (&sum)[TM][TN], Lds scales, Lds inputs)
    {
        int lane = (int)lane_id(), wn = wave_id() % WN;
        UNROLL for (int j = 0; j < TN; j++) UNROLL for (int q = 0; q < ACC; q++)
        {
            float scale = lds_read<float>(scales + (b_first(j, wn) + acc_row(q, lane)) * 4);
            UNROLL for (int i = 0; i < TM; i++)
            {
                float part = SUMS::value(acc[i][j].v[q]);
                float last = scale;
                if constexpr (CODED) {
                    part *= scale;
                    last = lds_read<float>(inputs + (i * 16 + acc_token(q, lane)) * 4);
                }
                sum[i][j].v[q] = fused_mul_add(part, last, sum[i][j].v[q]);
                acc[i][j].v[q] = 0.f;
            }
        }
    }

#if MPAD_NVIDIA
    DEV void stage(int kt)
    {
        Lds to = slot(kt % STAGES);
        UNROLL for (int i = 0; i < A_LOADS; i++)
        {
            if (a_index(i) < BM)
                put(to + i * PASS * 128, a, a_at[i] + (u32)kt * 128, left(kt, a_ok, i));
        }
        UNROLL for (int i = 0; i < B_LOADS; i++)
            put(to + (BM + i * PASS) * 128, b, b_offset(i) + (u32)kt * 128, left(kt, b_ok, i));
    }
    DEV void put(Lds to, const Buffer &from, u32 at, int n)
    {
        if constexpr (VECTOR)
            stage16(to, from, at, n > 0);
        else
            lds_write<u4>(to, run_chunk<false, false>(run_make(from, at, n), 0));
    }
    // A ring of stages filled by asynchronous copies.
    DEV void run()
    {
        int n_kt = (k + TILE_K - 1) / TILE_K;
        UNROLL for (int s = 0; s < STAGES - 1; s++)
        {
            if (s < n_kt)
                stage(s);
            stage_commit();
        }
        NO_UNROLL for (int kt = 0; kt < n_kt; kt++)
        {
            stage_wait_all_but<STAGES - 2>();
            block_barrier(); // stage kt is there for all; stage kt - 1 was read by all
            if (kt + STAGES - 1 < n_kt)
                stage(kt + STAGES - 1);
            stage_commit();
            Lds at = lds_base() + kt % STAGES * STAGE_BYTES;
            UNROLL for (int step = 0; step < TILE_STEPS; step++)
            {
                TileFrag x[TM];
                read_a(x, at, step);
                UNROLL for (int j = 0; j < TN; j++)
                {
                    TileFrag w = read_b(at, step, j);
                    UNROLL for (int i = 0; i < TM; i++) tile_step<T>(acc[i][j], x[i], w);
                }
            }
        }
    }
#else
    struct Staged {
        u4 a[A_LOADS], b[B_LOADS];
    };
    DEV void fetch(Staged &r, int kt) const
    {
        UNROLL for (int i = 0; i < A_LOADS; i++) r.a[i] =
            run_chunk<VECTOR, false>(run_make(a, a_at[i] + (u32)kt * 128, left(kt, a_ok, i)), 0);
        UNROLL for (int i = 0; i < B_LOADS; i++) r.b[i] = run_chunk<VECTOR, false>(
            run_make(b, b_offset(i) + (u32)kt * 128, left(kt, b_ok, i)), 0);
    }
    DEV void store(int stage, const Staged &r) const
    {
        Lds to = slot(stage);
        UNROLL for (int i = 0; i < A_LOADS; i++)
        {
            if (a_index(i) < BM)
                lds_write<u4>(to + i * PASS * 128, r.a[i]);
        }
        UNROLL for (int i = 0; i < B_LOADS; i++) lds_write<u4>(to + (BM + i * PASS) * 128, r.b[i]);
    }
    struct Pipeline {
        Staged staged[2];
        TileFrag x[2][TM], w[2][TN];
    };
    DEV void read(Pipeline &p, int f, int stage, int step) const
    {
        Lds at = lds_base() + stage * STAGE_BYTES;
        read_a(p.x[f], at, step);
        UNROLL for (int j = 0; j < TN; j++) p.w[f][j] = read_b(at, step, j);
    }
    // K tile kt in LDS stage P, its first fragments read; tile kt + 1 in registers 1 - P.
    template <int P> DEV void turn(Pipeline &p, int kt)
    {
        fetch(p.staged[P], kt + 2);
        read(p, 1, P, 1);
        multiply<0, TM>(p.x[0], p.w[0]);
        schedule_barrier();
        store(1 - P, p.staged[1 - P]);
        multiply<0, TM / 2>(p.x[1], p.w[1]);
        schedule_barrier();
        block_barrier(); // tile kt + 1 is in LDS; tile kt's last fragments are read
        read(p, 0, 1 - P, 0);
        multiply<TM / 2, TM>(p.x[1], p.w[1]);
        schedule_barrier();
    }
    // Two LDS stages; global memory is read two tiles ahead into registers, LDS one step ahead.
    DEV void run()
    {
        int n_kt = (k + TILE_K - 1) / TILE_K;
        Pipeline p;
        fetch(p.staged[0], 0);
        fetch(p.staged[1], 1);
        store(0, p.staged[0]);
        block_barrier(); // tile 0 is in LDS
        read(p, 0, 0, 0);
        NO_UNROLL for (int kt = 0; kt < n_kt; kt += 2)
        {
            turn<0>(p, kt);
            if (kt + 1 < n_kt)
                turn<1>(p, kt + 1);
        }
    }
#endif

    // Calls f(row of A, first of 8 columns within the half, their values in half 0, in half 1). The
    // sums pass through LDS, one group of waves along the rows at a time, so that a thread stores
    // 16 bytes and the code behind f exists once.
    template <class F> DEV void finish(F f)
    {
        constexpr int ROWS = BM / WM, ITEMS = ROWS * (TILE_HALF / 8);
        int lane = (int)lane_id(), wm = wave_id() / WN, wn = wave_id() % WN;
        NO_UNROLL for (int group = 0; group < WM; group++)
        {
            block_barrier(); // the stages, or the sums of the group before, are read
            if (wm == group) {
                UNROLL for (int i = 0; i < TM; i++) UNROLL for (int j = 0; j < TN; j++)
                    UNROLL for (int q = 0; q < ACC; q++)
                {
                    int m = i * 16 + acc_token(q, lane);
                    int n = j / (TN / 2) * TILE_HALF + wn * (TILE_HALF / WN) + j % (TN / 2) * 16 +
                            acc_row(q, lane);
                    lds_write<float>(lds_base() + (m * TILE_SUM_PITCH + n) * 4, acc[i][j].v[q]);
                }
            }
            block_barrier(); // the group's sums are there
            NO_UNROLL for (int item = (int)thread_id(); item < ITEMS; item += THREADS)
            {
                int m = item / (TILE_HALF / 8), n = item % (TILE_HALF / 8) * 8;
                Lds at = lds_base() + (m * TILE_SUM_PITCH + n) * 4;
                float x[8], y[8];
                UNROLL for (int h = 0; h < 2; h++)
                {
                    f4 u = lds_read<f4>(at + h * 16);
                    f4 v = lds_read<f4>(at + TILE_HALF * 4 + h * 16);
                    UNROLL for (int q = 0; q < 4; q++)
                    {
                        x[4 * h + q] = u[q];
                        y[4 * h + q] = v[q];
                    }
                }
                f(group * ROWS + m, n, x, y);
            }
        }
    }
};
