// What a fused MoE kernel is made of, small: rows gathered by index through a buffer resource whose
// range hides the pads, a swizzled LDS tile, MFMA, a lane reduction and masked stores. MUTATION, if
// given, is one mistake.
#include "hipmin.h"
#ifndef MUTATION
#    define MUTATION 0
#endif
enum { NO_K_MASK = 1, NO_N_MASK, LANES_SWAPPED, CHUNKS_SWAPPED, NO_SWIZZLE };

constexpr u32 OUTSIDE = 0x80000000u;
constexpr int K_TILE = 64, WAVES = 4;

// Byte address of a 16-byte chunk (8 elements of k) of a row in the tile.
DEV u32 tile_at(u32 row, u32 chunk)
{
    return row * 128 + (chunk ^ (row & 7)) * 16;
}
DEV f32x4 multiply(u32x4 a, u32x4 b, f32x4 acc)
{
#if defined(__gfx950__)
    return __builtin_amdgcn_mfma_f32_16x16x32_bf16(__builtin_bit_cast(bf16x8, a),
                                                   __builtin_bit_cast(bf16x8, b), acc, 0, 0, 0);
#else
    for (int i = 0; i < 2; i++) {
        u32x2 x = {a[2 * i], a[2 * i + 1]}, y = {b[2 * i], b[2 * i + 1]};
        acc = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(__builtin_bit_cast(s16x4, x),
                                                        __builtin_bit_cast(s16x4, y), acc, 0, 0, 0);
    }
    return acc;
#endif
}
template <int CONTROL> DEV float dpp(float x)
{
    int r = __builtin_amdgcn_update_dpp(0, __builtin_bit_cast(int, x), CONTROL, 0xf, 0xf, true);
    return __builtin_bit_cast(float, r);
}

struct Args {
    const u16 *x, *w; // [any][ld], [n][ld]
    const int *rows;  // [16]: row of x, -1: none
    float *out;       // [16][n]
    float *norms;     // [16][n / 64 rounded up][WAVES]
    int n, k, ld, n_row;
};

// Grid: n / 64 rounded up. out[m][c] = x[rows[m]] . w[c]; norms: sums of squares over 16 columns.
KERNEL(256) moe(Args a)
{
    SHARED u32x4 tile[2][16 * 128 / 16];
    u32 t = TID, lane = t & 63, wave = __builtin_amdgcn_readfirstlane(t >> 6);
    u32 column = (BID * WAVES + wave) * 16 + (lane & 15);
    auto x = __builtin_amdgcn_make_buffer_rsrc((void *)a.x, 0, a.n_row * a.ld * 2, 0x00027000);
    auto w = __builtin_amdgcn_make_buffer_rsrc((void *)a.w, 0, a.n * a.ld * 2, 0x00027000);
    f32x4 acc = {0, 0, 0, 0};
    u32 row = t >> 3, chunk = t & 7; // of the 16 x 8 chunks, by the first two waves
    int from = t < 128 ? a.rows[row] : -1;
    for (int k = 0, stage = 0; k < a.k; k += K_TILE, stage ^= 1) {
        auto base = (__attribute__((address_space(3))) char *)tile[stage];
        if (t < 128) {
            bool ok = from >= 0 && (MUTATION == NO_K_MASK || k + (int)chunk * 8 < a.k);
            u32 at = (from * a.ld + k) * 2 + chunk * 16;
            u32x4 v = __builtin_amdgcn_raw_buffer_load_b128(x, ok ? at : OUTSIDE, 0, 0);
            *(__attribute__((address_space(3))) u32x4 *)(base + tile_at(row, chunk)) = v;
        }
        barrier();
        for (u32 half = 0; half < 2; half++) {
            u32 c = half * 4 + (lane >> 4), r = lane & 15;
            if (MUTATION == LANES_SWAPPED && (lane == 5 || lane == 6))
                r ^= 3;
            if (MUTATION == CHUNKS_SWAPPED)
                c ^= lane >> 4 == 1;
            int k_at = k + (int)(half * 4 + (lane >> 4)) * 8;
            bool ok = (int)column < a.n && (MUTATION == NO_K_MASK || k_at < a.k);
            u32 at = (column * a.ld + k) * 2 + (half * 4 + (lane >> 4)) * 16;
            u32x4 y = __builtin_amdgcn_raw_buffer_load_b128(w, ok ? at : OUTSIDE, 0, 0);
            u32 from_lds = MUTATION == NO_SWIZZLE ? r * 128 + c * 16 : tile_at(r, c);
            u32x4 v = *(__attribute__((address_space(3))) u32x4 *)(base + from_lds);
            acc = multiply(v, y, acc);
        }
    }
    for (int i = 0; i < 4; i++) {
        u32 m = 4 * (lane >> 4) + i;
        float square = acc[i] * acc[i];
        square += dpp<0x121>(square); // row_ror 1, 2, 4, 8
        square += dpp<0x122>(square);
        square += dpp<0x124>(square);
        square += dpp<0x128>(square);
        if (MUTATION == NO_N_MASK || (int)column < a.n)
            a.out[m * a.n + column] = acc[i];
        if ((lane & 15) == 0)
            a.norms[(m * ((a.n + 63) / 64) + BID) * WAVES + wave] = square;
    }
}
