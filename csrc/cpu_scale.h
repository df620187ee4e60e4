/* Level 6: scales of quantised weights as floats, one for each MPAD_CPU_SCALED columns. */
#ifndef MPAD_CPU_SCALE_H
#define MPAD_CPU_SCALE_H

#include "cpu_planes.h"
#include "cpu_scalar.h"

INLINE bool scale_is_per_row(const mpad_scale *s)
{
    return s->ld_column == 0;
}

INLINE int64_t groups_of(int64_t n_k)
{
    return (n_k + MPAD_CPU_SCALED - 1) / MPAD_CPU_SCALED;
}

/* The row of scales of a row of a half. */
INLINE int64_t scale_row(const mpad_scale *s, int64_t row)
{
    return s->block_row == 1 ? row : (s->row_phase + row) / s->block_row;
}

INLINE int64_t scale_bytes(const mpad_scale *s)
{
    return s->dtype == MPAD_DTYPE_F8_E8M0 ? 1 : s->dtype == MPAD_DTYPE_F32 ? 4 : 2;
}

typedef uint8_t vq_any __attribute__((vector_size(LANES), aligned(1), may_alias));

/* An e8m0 is 2^(code - 127), 255 is NaN. */
INLINE vf e8m0_values(vu code)
{
    vu bits = code << 23;
    bits |= (vu)(code == 0) & 0x400000;
    bits |= (vu)(code == 255) & 0x7FC00000;
    return (vf)bits;
}

/* LANES scales at p. */
INLINE vf scales_at(const void *p, mpad_dtype dtype)
{
    if (dtype != MPAD_DTYPE_F8_E8M0)
        return values_load(p, dtype);
    return e8m0_values(
        __builtin_convertvector(__builtin_convertvector(*(const vq_any *)p, vh), vu));
}

INLINE float scale_at(const mpad_scale *s, int64_t i)
{
    if (s->dtype != MPAD_DTYPE_F8_E8M0)
        return float_at(s->data, s->dtype, i);
    const uint32_t code = ((const uint8_t *)s->data)[i];
    const uint32_t bits = code == 0 ? 0x400000 : code == 255 ? 0x7FC00000 : code << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Part of a row of scales: n_group groups of which n_each in turn have one scale, the first scale,
 * `column` of the row, only n_lead. */
typedef struct scales_part {
    int64_t n_group, column, n_each, n_lead;
} scales_part;

static scales_part scales_part_of(const mpad_scale *s, int64_t k, int64_t n_k)
{
    if (scale_is_per_row(s))
        return (scales_part){.n_group = 1};
    const int64_t n_each = s->block_column / MPAD_CPU_SCALED;
    const int64_t first = (s->column_phase + k) / MPAD_CPU_SCALED;
    return (scales_part){.n_group = groups_of(n_k),
                         .column = first / n_each,
                         .n_each = n_each,
                         .n_lead = n_each - first % n_each};
}

/* n_group scales at p as floats: vectors of them, the last one up to the end. */
INLINE void scales_each(const char *p, const mpad_dtype dtype, const int64_t size, int64_t n_group,
                        float *to)
{
    for (int64_t g = 0; g < n_group; g += LANES) {
        g = g + LANES <= n_group ? g : n_group - LANES;
        vf_store(to + g, scales_at(p + g * size, dtype));
    }
}

/* A float for each group of the part of a row that begins `at` elements into the scales, then zeros
 * for one vector. Writes up to two vectors more than groups. */
static __attribute__((noinline)) void scales_load(const mpad_scale *s, int64_t at,
                                                  const scales_part *part, float *to)
{
    const int64_t size = scale_bytes(s), n_group = part->n_group, first = at + part->column;
    const char *p = (const char *)s->data + first * size;
    if (part->n_each > 1)
        for (int64_t g = 0, end = part->n_lead; g < n_group; end += part->n_each, p += size) {
            const vf value = vf_all(float_at(p, s->dtype, 0));
            for (; g < end; g += LANES)
                vf_store(to + g, value);
            g = end;
        }
#if VECTOR_BYTES == 64
    else if (n_group < LANES && s->dtype == MPAD_DTYPE_F8_E8M0)
        vf_store(to, e8m0_values(bytes_some(p, n_group)));
#endif
    else if (n_group < LANES)
        for (int64_t g = 0; g < n_group; g++)
            to[g] = scale_at(s, first + g);
    else if (s->dtype == MPAD_DTYPE_F8_E8M0)
        scales_each(p, MPAD_DTYPE_F8_E8M0, 1, n_group, to);
    else if (s->dtype == MPAD_DTYPE_F32)
        scales_each(p, MPAD_DTYPE_F32, 4, n_group, to);
    else
        scales_each(p, s->dtype, 2, n_group, to);
    vf_store(to + n_group, (vf){0});
}

enum { PANEL_SCALES = 2 * PANEL_GROUPS / MPAD_CPU_SCALED }; /* most groups of k in a panel */

/* [PANEL_SCALES][PANEL_COLUMNS] scales of columns [n, n + PANEL_COLUMNS) of a product for the
 * groups of a part, then zeros. */
static void scales_turn(const mpad_cpu_product *p, int64_t n, const scales_part *part, float *scale)
{
    const mpad_scale *s = p->w_scale;
    memset(scale, 0, PANEL_SCALES * PANEL_COLUMNS * sizeof *scale);
    for (int64_t c = 0; c < PANEL_COLUMNS; c++) {
        const int64_t column = n + c < p->n_column ? n + c : p->n_column - 1;
        const int64_t at = p->w_scale_at + scale_row(s, p->w_row + column) * s->ld_row;
        float each[PANEL_SCALES + 2 * LANES] = {0};
        if (scale_is_per_row(s))
            each[0] = scale_at(s, at);
        else
            scales_load(s, at, part, each);
        for (int64_t g = 0; g < part->n_group; g++)
            scale[g * PANEL_COLUMNS + c] = each[g];
    }
}

enum { SPAN_GROUPS = 512 }; /* of a row, as many as are held */

/* Scales of the rows of w that tiles of four take in turn, for a span of groups. Where every row
 * has its own, those of the next tile are read before a tile runs, so that it need not wait. Where
 * rows share them they are read again at borders only. */
typedef struct scales_held {
    float value[2][4][SPAN_GROUPS + 2 * LANES] __attribute__((aligned(VECTOR_BYTES)));
    scales_part part;
    int64_t end; /* rows of w below it have the scales held */
} scales_held;

INLINE void scales_hold_row(const mpad_cpu_product *p, int64_t n, const scales_held *held,
                            float *value)
{
    const int64_t column = n < p->n_column ? n : p->n_column - 1;
    const int64_t row = scale_row(p->w_scale, p->w_row + column);
    scales_load(p->w_scale, p->w_scale_at + row * p->w_scale->ld_row, &held->part, value);
}

static void scales_begin(const mpad_cpu_product *p, int64_t k, int64_t n_k, scales_held *held)
{
    held->part = scales_part_of(p->w_scale, k, n_k);
    held->end = 0;
    for (int c = 0; c < 4 && p->w_scale->block_row == 1; c++)
        scales_hold_row(p, c, held, held->value[0][c]);
}

/* Scales of rows [n, n + 4) at scale[]. */
static void scales_hold(const mpad_cpu_product *p, int64_t n, scales_held *held,
                        const float **scale)
{
    const mpad_scale *s = p->w_scale;
    const int slot = s->block_row == 1 ? n / 4 % 2 : 0;
    for (int c = 0; c < 4; c++)
        scale[c] = held->value[slot][c];
    if (s->block_row == 1) {
        for (int c = 0; c < 4 && n + 4 < p->n_column; c++)
            scales_hold_row(p, n + 4 + c, held, held->value[!slot][c]);
    } else if (n + 4 > held->end) {
        for (int c = 0; c < 4; c++)
            scales_hold_row(p, n + c, held, held->value[0][c]);
        const int64_t border = (scale_row(s, p->w_row + n) + 1) * s->block_row;
        held->end = border - s->row_phase - p->w_row;
    }
}

#endif
