/* Level 8: the products of bf16 with quantised weights by the instruction that multiplies pairs of
 * bf16 (AVX512-BF16; the tables are of AVX512-VBMI): every format's values are bf16 exactly.
 *
 * A step is a vector of stored weights, STEP elements of k of one row of w; it becomes N_VECTOR
 * vectors of bf16, vector j with k = j, N_VECTOR + j, 2 * N_VECTOR + j, ..., and x lies in that
 * order. A quarter or half of a step is a cell, MPAD_CPU_SCALED elements of k, which have one
 * scale: 16 pairs, N_VECTOR times CELL_LANES lanes.
 *
 * For few rows of x the weights go from memory through registers into products, four rows of w at a
 * time. For many, 32 rows of w are turned while still stored and become a panel, cell after cell.
 * Either way partial sums of one scale are float32, and the order of sums depends on the length
 * alone. Functions are compiled per `bits`, 4 or 8, and those that decode per way of reading a
 * code. */
#ifndef MPAD_CPU_PAIRS_H
#define MPAD_CPU_PAIRS_H

#include "cpu_planes.h"

#define STORED_ROWS 8
#include "cpu_stored_stream.h"

#include <immintrin.h>

enum {
    PAIR_PANEL_ROWS = 6,
    CELL_PAIRS = 16,
};

/* Loops whose arrays are registers; rolled where a sanitizer checks each access, and compilers
 * would take minutes. */
#if defined(__SANITIZE_ADDRESS__)
#    define UNROLLED
#elif defined(__has_feature)
#    if __has_feature(address_sanitizer)
#        define UNROLLED
#    endif
#endif
#ifndef UNROLLED
#    define UNROLLED _Pragma("GCC unroll 16")
#endif
#define N_VECTOR(bits) (16 / (bits))
#define STEP(bits) (32 * N_VECTOR(bits))
#define CELLS(bits) N_VECTOR(bits)
#define CELL_LANES(bits) (16 / N_VECTOR(bits))

/* ---- values ---- */

/* The upper bits of a float that is mantissa * 2^exponent, of a mantissa below 16. */
#define BF16_OF(mantissa, exponent)                                                                \
    ((mantissa) >= 8   ? (((exponent) + 130) << 7 | ((mantissa) - 8) << 4)                         \
     : (mantissa) >= 4 ? (((exponent) + 129) << 7 | ((mantissa) - 4) << 5)                         \
     : (mantissa) >= 2 ? (((exponent) + 128) << 7 | ((mantissa) - 2) << 6)                         \
     : (mantissa)      ? ((exponent) + 127) << 7                                                   \
                       : 0)
/* A code's magnitude, of `n` mantissa bits and that bias. */
#define BF16_OF_CODE(code, n, bias)                                                                \
    ((code) >> (n)                                                                                 \
         ? BF16_OF((1 << (n)) + ((code) & ((1 << (n)) - 1)), ((code) >> (n)) - (bias) - (n))       \
         : BF16_OF((code), 1 - (bias) - (n)))
#define E4M3FN(code) ((code) == 0x7F ? 0x7FC0 : BF16_OF_CODE((code), 3, 7))
#define E4M3FNUZ(code) BF16_OF_CODE((code), 3, 8)
#define E5M2(code) ((code) > 0x7C ? 0x7FC0 : (code) == 0x7C ? 0x7F80 : BF16_OF_CODE((code), 2, 15))
#define I8(code)                                                                                   \
    ((code) >= 64   ? (133 << 7 | ((code) - 64) << 1)                                              \
     : (code) >= 32 ? (132 << 7 | ((code) - 32) << 2)                                              \
     : (code) >= 16 ? (131 << 7 | ((code) - 16) << 3)                                              \
                    : BF16_OF((code), 0))
#define LOW(value) ((value) & 0xFF)
#define HIGH(value) ((value) >> 8)
#define FOUR(F, G, i) F(G(i)), F(G((i) + 1)), F(G((i) + 2)), F(G((i) + 3))
#define SIXTEEN(F, G, i)                                                                           \
    FOUR(F, G, i), FOUR(F, G, (i) + 4), FOUR(F, G, (i) + 8), FOUR(F, G, (i) + 12)
#define MAGNITUDES(F, G)                                                                           \
    {SIXTEEN(F, G, 0),  SIXTEEN(F, G, 16), SIXTEEN(F, G, 32), SIXTEEN(F, G, 48),                   \
     SIXTEEN(F, G, 64), SIXTEEN(F, G, 80), SIXTEEN(F, G, 96), SIXTEEN(F, G, 112)}
/* Of an 8-bit format: the lower and the upper byte of each magnitude's bf16. */
#define BYTES(G) {MAGNITUDES(LOW, G), MAGNITUDES(HIGH, G)}
static const uint8_t E4M3FN_BYTES[2][128] = BYTES(E4M3FN), E4M3FNUZ_BYTES[2][128] = BYTES(E4M3FNUZ);
static const uint8_t E5M2_BYTES[2][128] = BYTES(E5M2), I8_BYTES[2][128] = BYTES(I8);

/* Of a 4-bit format: each code's bf16, twice, since a lookup takes five bits. */
#define TWICE(...) {__VA_ARGS__, __VA_ARGS__}
static const uint16_t E2M1_WORDS[32] =
    TWICE(0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80,
          0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0);
static const uint16_t I4_WORDS[32] =
    TWICE(0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000,
          0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0);

/* a where the mask's bits are set, else b. */
INLINE __m512i bits_select(__m512i mask, __m512i a, __m512i b)
{
    return _mm512_ternarylogic_epi64(mask, a, b, 0xCA);
}

/* How bytes are read: a sign and a magnitude, of which minus 0 may stand for NaN, or an integer. */
typedef enum pair_code { CODE_SIGNED, CODE_NAN_80, CODE_INTEGER, CODE_NIBBLES } pair_code;

/* A format's tables in registers. */
typedef struct pair_values {
    __m512i low[2], high[2]; /* low[0] alone for nibbles */
} pair_values;

INLINE pair_values values_of(const void *table, const int bits)
{
    const char *p = table;
    pair_values v = {.low = {_mm512_loadu_si512(p)}};
    if (bits == 8) {
        v.low[1] = _mm512_loadu_si512(p + 64);
        v.high[0] = _mm512_loadu_si512(p + 128);
        v.high[1] = _mm512_loadu_si512(p + 192);
    }
    return v;
}

INLINE void decode_bytes(__m512i z, const pair_values *v, const pair_code code, __m512i *w)
{
    const __m512i at = code == CODE_INTEGER ? _mm512_abs_epi8(z) : z;
    __m512i low = _mm512_permutex2var_epi8(v->low[0], at, v->low[1]);
    __m512i high = _mm512_permutex2var_epi8(v->high[0], at, v->high[1]);
    high = _mm512_ternarylogic_epi64(high, z, _mm512_set1_epi8((char)0x80), 0xF8); /* the sign */
    if (code != CODE_SIGNED) { /* 0x80: NaN, or -128 */
        const bool is_nan = code == CODE_NAN_80;
        const __mmask64 is_80 = _mm512_cmpeq_epi8_mask(z, _mm512_set1_epi8((char)0x80));
        high = _mm512_mask_mov_epi8(high, is_80, _mm512_set1_epi8((char)(is_nan ? 0x7F : 0xC3)));
        if (is_nan)
            low = _mm512_mask_mov_epi8(low, is_80, _mm512_set1_epi8((char)0xC0));
    }
    const __m512i low_byte = _mm512_set1_epi16(0xFF);
    w[0] = bits_select(low_byte, low, _mm512_slli_epi16(high, 8));
    w[1] = bits_select(low_byte, _mm512_srli_epi16(low, 8), high);
}

INLINE void decode(vu stored, const pair_values *v, const pair_code code, vu *values)
{
    const __m512i z = (__m512i)stored;
    __m512i *w = (__m512i *)values;
    if (code != CODE_NIBBLES) {
        decode_bytes(z, v, code, w);
        return;
    }
    w[0] = _mm512_permutexvar_epi16(z, v->low[0]);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(z, 4), v->low[0]);
    w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(z, 8), v->low[0]);
    w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(z, 12), v->low[0]);
}

/* ---- rows of x ---- */

/* The cell at element k of a row, 32 bf16 in the order of k. */
INLINE void cell_put(const mpad_cpu_rows *rows, int64_t row, int64_t k, __m512i v)
{
    const int n_vector = rows->n_plane / 2, n_byte = VECTOR_BYTES / n_vector;
    const int64_t block = k / rows->k_block, cell = k % rows->k_block / MPAD_CPU_SCALED;
    char turned[VECTOR_BYTES], *x = rows->data + block * rows->ld_block + row * rows->ld_row;
    uint16_t order[32];
    for (int i = 0; i < 32; i++)
        order[i] = (uint16_t)(i % (32 / n_vector) * n_vector + i / (32 / n_vector));
    _mm512_storeu_si512(turned, _mm512_permutexvar_epi16(_mm512_loadu_si512(order), v));
    x += cell / n_vector * n_vector * VECTOR_BYTES + cell % n_vector * n_byte;
    UNROLLED for (int j = 0; j < n_vector; j++)
        memcpy(x + j * VECTOR_BYTES, turned + j * n_byte, (size_t)n_byte);
}

static void pairs_take_row(const mpad_cpu_rows *rows, int64_t row, const void *source)
{
    const uint16_t *from = source;
    for (int64_t k = 0; k < planes_end(rows->n_k); k += 32) {
        const int64_t left = rows->n_k - k;
        const __mmask32 inside = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
        cell_put(rows, row, k, _mm512_maskz_loadu_epi16(inside, from + k));
    }
}

static void pairs_activate(const mpad_cpu_activation *a)
{
    const bool is_last = a->first + a->n_column == a->h->n_k;
    const int64_t end = is_last ? planes_end(a->h->n_k) - a->first : a->n_column;
    for (int64_t n = 0; n < end; n += 32) {
        uint16_t values[32] = {0};
        for (int64_t at = n; at < n + 32 && at < a->n_column; at += LANES) {
            const vi is_inside = vi_count() < (int32_t)(a->n_column - at);
            bf16_store(values + (at - n), vf_select(is_inside, activation(a, at), (vf){0}));
        }
        cell_put(a->h, a->row, a->first + n, _mm512_loadu_si512(values));
    }
}

/* ---- few rows of x ---- */

/* The scale of each lane of a step, of scales one per cell. */
INLINE vf lane_scales(const float *scale, const int bits)
{
    const __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(scale));
    if (bits == 8)
        return __builtin_shufflevector(v, v, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return __builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
}

#define ALL_BYTES (~(__mmask64)0)

INLINE __mmask64 bytes_below(int64_t n)
{
    return n < VECTOR_BYTES ? ((__mmask64)1 << n) - 1 : ALL_BYTES;
}

/* A step of n_column rows of w, whose values meet each vector of x while it is in a register. */
INLINE void pair_step(const char *const *x, int64_t x_at, const char *const *w, int64_t w_at,
                      __mmask64 inside, vf (*part)[STORED_ROWS], const int n_column,
                      const int n_row, const pair_values *v, const pair_code code, const int bits)
{
    vu values[4][4];
    UNROLLED for (int c = 0; c < n_column; c++)
    {
        vu z = (vu)_mm512_maskz_loadu_epi8(inside, w[c] + w_at);
        __asm__("" : "+v"(z)); /* a compiler may load it thrice, and loads are the bound */
        decode(z, v, code, values[c]);
    }
    UNROLLED for (int r = 0; r < n_row; r++) UNROLLED for (int j = 0; j < N_VECTOR(bits); j++)
    {
        const vu pairs = vu_load(x[r] + x_at + j * VECTOR_BYTES);
        UNROLLED for (int c = 0; c < n_column; c++) part[c][r] =
            pairs_multiply_add(values[c][j], pairs, part[c][r]);
    }
    KEEP_ORDER
}

/* Rows [first, first + n_column) of the tile's four. */
INLINE void pair_columns(const stored_tile *t, const int first, const int n_column, const int n_row,
                         const bool is_grouped, const pair_values *v, const pair_code code,
                         const int bits, vf (*sum)[STORED_ROWS])
{
    const char *w[4], *next[4], *x[STORED_ROWS];
    const int64_t x_step = N_VECTOR(bits) * VECTOR_BYTES;
    const int64_t n_step = t->n_step, n_end = n_step + (t->n_tail != 0);
    UNROLLED for (int r = 0; r < n_row; r++) x[r] = t->x[r];
    UNROLLED for (int c = 0; c < n_column; c++)
    {
        w[c] = t->w[first + c];
        next[c] = t->next[first + c];
        UNROLLED for (int r = 0; r < n_row; r++) sum[c][r] = (vf){0};
    }
    int64_t end = is_grouped ? t->first_run : n_end;
    for (int64_t i = 0; i < n_end; end += t->run) {
        vf part[4][STORED_ROWS];
        const int64_t begin = i, stop = end < n_step ? end : n_step;
        UNROLLED for (int c = 0; c < n_column; c++) UNROLLED for (int r = 0; r < n_row; r++)
            part[c][r] = (vf){0};
        for (; i < stop; i++) {
            UNROLLED for (int c = 0; c < n_column; c++)
                __builtin_prefetch(next[c] + i * VECTOR_BYTES, 0, 2);
            pair_step(x, i * x_step, w, i * VECTOR_BYTES, ALL_BYTES, part, n_column, n_row, v, code,
                      bits);
        }
        if (i < end && i < n_end) {
            pair_step(x, i * x_step, w, i * VECTOR_BYTES, bytes_below(t->n_tail), part, n_column,
                      n_row, v, code, bits);
            i++;
        }
        UNROLLED for (int c = 0; c < n_column; c++)
        {
            const vf each = is_grouped
                                ? lane_scales(t->scale[first + c] + begin * CELLS(bits), bits)
                                : vf_all(1);
            UNROLLED for (int r = 0; r < n_row; r++) sum[c][r] =
                is_grouped ? (vf)_mm512_fmadd_ps(part[c][r], each, sum[c][r]) : part[c][r];
        }
    }
}

INLINE void pair_rows(stored_tile *t, const int n_row, const bool is_grouped, const pair_code code,
                      const int bits)
{
    vf sum[4][STORED_ROWS];
    const pair_values values = values_of(t->values, bits);
    const int n_column = n_row == 1 ? 4 : 2; /* at a time, as registers hold */
    UNROLLED for (int first = 0; first < 4; first += n_column)
        pair_columns(t, first, n_column, n_row, is_grouped, &values, code, bits, sum + first);
    UNROLLED for (int r = 0; r < n_row; r++) t->sum[r] =
        vf_reduce4(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
}

#define RUN_CASE(r, code, bits)                                                                    \
case r:                                                                                            \
    if (is_grouped)                                                                                \
        pair_rows(t, r, true, code, bits);                                                         \
    else                                                                                           \
        pair_rows(t, r, false, code, bits);                                                        \
    break;
#define RUN(name, code, bits)                                                                      \
    static __attribute__((noinline)) void pair_run_##name(stored_tile *t, int n_row,               \
                                                          bool is_grouped)                         \
    {                                                                                              \
        switch (n_row) {                                                                           \
            RUN_CASE(1, code, bits)                                                                \
            RUN_CASE(2, code, bits)                                                                \
            RUN_CASE(3, code, bits)                                                                \
            RUN_CASE(4, code, bits)                                                                \
            RUN_CASE(5, code, bits)                                                                \
            RUN_CASE(6, code, bits)                                                                \
            RUN_CASE(7, code, bits)                                                                \
            RUN_CASE(8, code, bits)                                                                \
        }                                                                                          \
    }
RUN(signed, CODE_SIGNED, 8)
RUN(nan_80, CODE_NAN_80, 8)
RUN(integer, CODE_INTEGER, 8)
RUN(nibbles, CODE_NIBBLES, 4)
#undef RUN
#undef RUN_CASE

/* ---- many rows of x ---- */

/* Rows of x times a panel, [cell][CELL_PAIRS][2 * LANES] pairs. */
typedef struct pair_panel {
    const char *w;
    int64_t n_cell;
    const float *scale;               /* [n_cell, ld_scale apart][2 * LANES] */
    int64_t ld_scale, n_each, n_lead; /* as in scales_part */
    const char *x[PAIR_PANEL_ROWS];
    float *sum[PAIR_PANEL_ROWS];
    float x_scale[PAIR_PANEL_ROWS];
    const char *next; /* rows of w wanted next, of which the tile fetches n_next */
    int64_t ld_next, n_next;
} pair_panel;

INLINE void panel_cell(const char *w, const char *const *x, vf (*part)[2], const int n_row,
                       const int bits)
{
    UNROLLED for (int j = 0; j < N_VECTOR(bits); j++)
        UNROLLED for (int l = 0; l < CELL_LANES(bits); l++)
    {
        const vu w0 = vu_load(w), w1 = vu_load(w + VECTOR_BYTES);
        UNROLLED for (int r = 0; r < n_row; r++)
        {
            const vu pair = (vu){0} + *(const uint32_t *)(x[r] + j * VECTOR_BYTES + 4 * l);
            part[r][0] = pairs_multiply_add(w0, pair, part[r][0]);
            part[r][1] = pairs_multiply_add(w1, pair, part[r][1]);
        }
        w += 2 * VECTOR_BYTES;
        KEEP_ORDER
    }
}

INLINE void pair_panel_rows(const pair_panel *t, const int n_row, const int bits)
{
    enum { CELL_BYTES = CELL_PAIRS * 2 * VECTOR_BYTES };
    vf sum[PAIR_PANEL_ROWS][2] = {{{0}}};
    int64_t cell = 0, end = t->ld_scale ? t->n_lead : t->n_cell;
    for (; cell < t->n_cell; end += t->n_each) {
        const float *scale = t->scale + cell * t->ld_scale;
        vf part[PAIR_PANEL_ROWS][2] = {{{0}}};
        for (; cell < end && cell < t->n_cell; cell++) {
            const int64_t step = cell / CELLS(bits), in_step = cell % CELLS(bits);
            const int64_t at =
                step * (N_VECTOR(bits) * VECTOR_BYTES) + in_step * 4 * CELL_LANES(bits);
            const char *x[PAIR_PANEL_ROWS];
            UNROLLED for (int r = 0; r < n_row; r++) x[r] = t->x[r] + at;
            for (int64_t c = 0; in_step == 0 && c < t->n_next; c++)
                __builtin_prefetch(t->next + c * t->ld_next + step * VECTOR_BYTES, 0, 3);
            panel_cell(t->w + cell * CELL_BYTES, x, part, n_row, bits);
        }
        const __m512 s0 = vf_load(scale), s1 = vf_load(scale + LANES);
        UNROLLED for (int r = 0; r < n_row; r++)
        {
            sum[r][0] = (vf)_mm512_fmadd_ps(part[r][0], s0, sum[r][0]);
            sum[r][1] = (vf)_mm512_fmadd_ps(part[r][1], s1, sum[r][1]);
        }
    }
    UNROLLED for (int r = 0; r < n_row; r++) UNROLLED for (int half = 0; half < 2; half++)
    {
        float *to = t->sum[r] + half * LANES;
        vf_store(to, vf_load(to) + sum[r][half] * t->x_scale[r]);
    }
}

/* Makes the panel of the columns whose weights lie at w[], n_k elements from there on. */
INLINE void pair_panel_make(char *panel, const char *const *w, int64_t n_k, const pair_values *v,
                            const pair_code code, const int bits)
{
    for (int64_t k = 0; k < n_k; k += STEP(bits))
        UNROLLED for (int half = 0; half < 2; half++)
        {
            vf lines[LANES];
            UNROLLED for (int c = 0; c < LANES; c++)
            {
                const char *from = w[half * LANES + c] + stored_bytes(k, bits);
                const int64_t left = stored_bytes(n_k - k, bits);
                lines[c] = (vf)_mm512_maskz_loadu_epi8(bytes_below(left), from);
            }
            vf_transpose(lines);
            for (int g = 0; g < LANES; g++) {
                const int cell = g / CELL_LANES(bits), lane = g % CELL_LANES(bits);
                vu values[4];
                decode((vu)lines[g], v, code, values);
                UNROLLED for (int j = 0; j < N_VECTOR(bits); j++)
                {
                    const int pair = cell * CELL_PAIRS + j * CELL_LANES(bits) + lane;
                    vf_store(panel + (pair * 2 + half) * VECTOR_BYTES, (vf)values[j]);
                }
            }
            if (half)
                panel += CELLS(bits) * CELL_PAIRS * 2 * VECTOR_BYTES;
        }
}

typedef struct pair_format {
    stored_format stored;
    void (*make)(char *panel, const char *const *w, int64_t n_k, const void *values);
    void (*run)(const pair_panel *t, int n_row);
} pair_format;

/* Rows [0, n_row) of x, whose pairs for the panel begin at `x`, times a panel for columns from n
 * on. */
static void pair_panel_all(const mpad_cpu_product *p, const pair_format *f, const char *x,
                           int64_t n, pair_panel *t)
{
    const int64_t n_tile = (p->n_row + PAIR_PANEL_ROWS - 1) / PAIR_PANEL_ROWS;
    for (int64_t j = 0, i = 0; j < n_tile; j++) {
        const int n_row = (int)((p->n_row - i + n_tile - j - 1) / (n_tile - j));
        UNROLLED for (int r = 0; r < n_row; r++)
        {
            const int64_t row = p->sum_row ? p->sum_row[i + r] - p->sum_origin : i + r;
            t->x[r] = x + (p->x_row ? p->x_row[i + r] : i + r) * p->x->ld_row;
            t->sum[r] = p->sum + row * p->ld_sum + n;
            t->x_scale[r] = p->scale ? p->scale[i + r] : 1.0f;
        }
        t->n_next = PANEL_COLUMNS * (j + 1) / n_tile - PANEL_COLUMNS * j / n_tile;
        f->run(t, n_row);
        t->next += t->n_next * t->ld_next;
        i += n_row;
    }
}

static void pair_panels(const mpad_cpu_product *p, const pair_format *f)
{
    char panel[PANEL_GROUPS * 2 * VECTOR_BYTES] __attribute__((aligned(64)));
    float scale[PANEL_SCALES * PANEL_COLUMNS] __attribute__((aligned(64)));
    const mpad_cpu_rows *x = p->x;
    const int bits = f->stored.bits;
    pair_panel t = {.w = panel, .scale = scale, .ld_next = p->ld_w};
    t.ld_scale = scale_is_per_row(p->w_scale) ? 0 : PANEL_COLUMNS;

    for (int64_t k = 0, n_here; k < x->n_k; k += n_here) {
        const int64_t block = k / x->k_block, in_block = k % x->k_block;
        n_here = x->n_k - k;
        n_here = n_here < x->k_block - in_block ? n_here : x->k_block - in_block;
        n_here = n_here < 2 * PANEL_GROUPS ? n_here : 2 * PANEL_GROUPS;
        const scales_part part = scales_part_of(p->w_scale, k, n_here);
        const char *w = (const char *)p->w + stored_bytes(k, bits);
        t.n_cell = groups_of(n_here);
        t.n_each = part.n_each;
        t.n_lead = part.n_lead;

        for (int64_t n = 0; n < p->n_column; n += PANEL_COLUMNS) {
            const char *columns[PANEL_COLUMNS];
            for (int64_t c = 0; c < PANEL_COLUMNS; c++)
                columns[c] = w + (n + c < p->n_column ? n + c : p->n_column - 1) * p->ld_w;
            scales_turn(p, n, &part, scale);
            f->make(panel, columns, n_here, f->stored.values);
            t.next = n + PANEL_COLUMNS < p->n_column ? w + (n + PANEL_COLUMNS) * p->ld_w
                     : k + n_here < x->n_k           ? w + stored_bytes(n_here, bits)
                     : p->next_w                     ? p->next_w
                                                     : w;
            pair_panel_all(p, f, x->data + block * x->ld_block + in_block * 2, n, &t);
        }
    }
}

/* Turning w into panels costs more than streams do up to so many rows. */
static void pairs_multiply(const mpad_cpu_product *p, const pair_format *f)
{
    if (p->n_row <= (scale_is_per_row(p->w_scale) ? 16 : 12))
        stored_stream(p, &f->stored);
    else
        pair_panels(p, f);
}

#define RUN_CASE(r, bits)                                                                          \
case r:                                                                                            \
    pair_panel_rows(t, r, bits);                                                                   \
    break;
#define RUN(bits)                                                                                  \
    static __attribute__((noinline)) void pair_panel_run_##bits(const pair_panel *t, int n_row)    \
    {                                                                                              \
        switch (n_row) {                                                                           \
            RUN_CASE(1, bits)                                                                      \
            RUN_CASE(2, bits)                                                                      \
            RUN_CASE(3, bits)                                                                      \
            RUN_CASE(4, bits)                                                                      \
            RUN_CASE(5, bits)                                                                      \
            RUN_CASE(6, bits)                                                                      \
        }                                                                                          \
    }
RUN(4)
RUN(8)
#undef RUN
#undef RUN_CASE

#define MAKE(name, code, bits)                                                                     \
    static __attribute__((noinline)) void pair_make_##name(char *panel, const char *const *w,      \
                                                           int64_t n_k, const void *values)        \
    {                                                                                              \
        const pair_values v = values_of(values, bits);                                             \
        pair_panel_make(panel, w, n_k, &v, code, bits);                                            \
    }
MAKE(signed, CODE_SIGNED, 8)
MAKE(nan_80, CODE_NAN_80, 8)
MAKE(integer, CODE_INTEGER, 8)
MAKE(nibbles, CODE_NIBBLES, 4)
#undef MAKE

#define MULTIPLY(name, code, bits_, table)                                                         \
    static void pairs_multiply_##name(const mpad_cpu_product *p)                                   \
    {                                                                                              \
        static const pair_format format = {                                                        \
            .stored = {.bits = bits_,                                                              \
                       .step = STEP(bits_),                                                        \
                       .values = table,                                                            \
                       .unit = 1,                                                                  \
                       .is_masked = true,                                                          \
                       .run = pair_run_##code},                                                    \
            .make = pair_make_##code,                                                              \
            .run = pair_panel_run_##bits_,                                                         \
        };                                                                                         \
        pairs_multiply(p, &format);                                                                \
    }
MULTIPLY(e4m3fn, signed, 8, E4M3FN_BYTES)
MULTIPLY(e4m3fnuz, nan_80, 8, E4M3FNUZ_BYTES)
MULTIPLY(e5m2, signed, 8, E5M2_BYTES)
MULTIPLY(i8, integer, 8, I8_BYTES)
MULTIPLY(e2m1, nibbles, 4, E2M1_WORDS)
MULTIPLY(i4, nibbles, 4, I4_WORDS)
#undef MULTIPLY

#endif
