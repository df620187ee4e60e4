/* Level 7: how few rows of x meet quantised weights of any format: tiles of four rows of w at a
 * time, whose products a format's own function makes. A step is a vector of stored weights of each
 * row. Included once per kernel file, after STORED_ROWS, the most rows of x in a tile. */
#ifndef MPAD_CPU_STORED_STREAM_H
#define MPAD_CPU_STORED_STREAM_H

#include "cpu_scale.h"

typedef struct stored_tile {
    const char *x[STORED_ROWS];
    const char *w[4];
    const char *next[4]; /* of the weights wanted next, fetched at the same pace */
    int64_t n_tail;      /* bytes of one more step of weights, after n_step */
    const char *tail;    /* that step, [4][VECTOR_BYTES], zero-filled; NULL if none or masked */
    const float *scale[4];
    const void *values; /* of the format */
    int64_t n_step;
    int64_t first_run, run; /* steps that share a scale, of each row of w; at least 1 */
    v4 sum[STORED_ROWS];
} stored_tile;

typedef struct stored_format {
    int bits, step;     /* of one weight; elements of k in a step */
    const void *values; /* for `run`, what it may need */
    float unit;         /* what sums are to be multiplied by */
    bool is_masked;     /* `run` reads the beginning of a step from where it lies */
    /* A tile's sums; with a scale per MPAD_CPU_SCALED elements of k where is_grouped. */
    void (*run)(stored_tile *tile, int n_row, bool is_grouped);
} stored_format;

/* Bytes of the first n elements of a row. */
INLINE int64_t stored_bytes(int64_t n, int bits)
{
    return (n * bits + 7) / 8;
}

/* How many steps in turn have one scale, from group `first` of the part on; 1 where a step has more
 * than one. */
INLINE void stored_runs(const scales_part *part, int64_t first, const stored_format *f,
                        stored_tile *t)
{
    const int64_t n = f->step / MPAD_CPU_SCALED;
    t->first_run = t->run = 1;
    if (n == 0 || part->n_each <= n || part->n_each % n != 0)
        return;
    const int64_t lead = first < part->n_lead
                             ? part->n_lead - first
                             : part->n_each - (first - part->n_lead) % part->n_each;
    if (lead % n != 0)
        return;
    t->first_run = lead / n;
    t->run = part->n_each / n;
}

/* Adds a tile's sums of columns [n, n + 4) to rows [i, i + n_row) of the product's sums. */
INLINE void stored_add(const mpad_cpu_product *p, const stored_tile *t, float unit, int64_t i,
                       int n_row, int64_t n, v4 row_scale)
{
    for (int r = 0; r < n_row; r++) {
        int64_t row = p->sum_row ? p->sum_row[i + r] - p->sum_origin : i + r;
        float *sum = p->sum + row * p->ld_sum + n;
        float scale = p->scale ? p->scale[i + r] : 1.0f;
        v4 term = t->sum[r] * unit * row_scale * scale;
        if (p->n_column - n >= 4)
            *(v4_any *)sum += term;
        else
            for (int64_t c = 0; c < p->n_column - n; c++)
                sum[c] += term[c];
    }
}

/* Makes the tile of rows [n, n + 4) of w and a block of k; `tail` has room for a step of each. */
INLINE void stored_weights(const mpad_cpu_product *p, const stored_format *f, int64_t n, int64_t k,
                           int64_t n_k, int64_t ahead, char *tail, stored_tile *t)
{
    const int64_t k_at = stored_bytes(k, f->bits);
    t->n_step = n_k / f->step;
    t->n_tail = stored_bytes(n_k % f->step, f->bits);
    t->tail = t->n_tail && !f->is_masked ? tail : NULL;
    if (t->tail)
        memset(tail, 0, 4 * VECTOR_BYTES);
    for (int c = 0; c < 4; c++) {
        const int64_t column = n + c < p->n_column ? n + c : p->n_column - 1;
        const int64_t beyond = n + c + ahead - p->n_column;
        t->w[c] = (const char *)p->w + column * p->ld_w + k_at;
        t->next[c] = beyond < 0  ? t->w[c] + ahead * p->ld_w
                     : p->next_w ? (const char *)p->next_w + beyond * p->ld_w + k_at
                                 : t->w[c];
        if (t->tail)
            memcpy(tail + c * VECTOR_BYTES, t->w[c] + t->n_step * VECTOR_BYTES, (size_t)t->n_tail);
    }
}

/* The product over blocks [block, last) of k, as many as scales are held for. */
static void stored_span(const mpad_cpu_product *p, const stored_format *f, int64_t block,
                        int64_t last)
{
    enum { AHEAD_BYTES = 8192 };
    const mpad_cpu_rows *x = p->x;
    const mpad_scale *s = p->w_scale;
    const bool is_grouped = !scale_is_per_row(s);
    const int64_t n_tile = (p->n_row + STORED_ROWS - 1) / STORED_ROWS;
    const int64_t ahead = (AHEAD_BYTES / (4 * stored_bytes(x->n_k, f->bits)) + 1) * 4;
    const int64_t k_first = block * x->k_block;
    char tail[4 * VECTOR_BYTES] __attribute__((aligned(64)));
    scales_held held;
    stored_tile t = {.values = f->values, .first_run = 1, .run = 1};
    if (is_grouped)
        scales_begin(p, k_first,
                     x->n_k - k_first < last * x->k_block - k_first ? x->n_k - k_first
                                                                    : last * x->k_block - k_first,
                     &held);

    for (int64_t n = 0; n < p->n_column; n += 4) {
        const float *scale[4];
        v4 row_scale = {1, 1, 1, 1};
        if (is_grouped)
            scales_hold(p, n, &held, scale);
        else
            for (int64_t c = 0; c < 4; c++) {
                const int64_t column = n + c < p->n_column ? n + c : p->n_column - 1;
                row_scale[c] =
                    scale_at(s, p->w_scale_at + scale_row(s, p->w_row + column) * s->ld_row);
            }
        for (int64_t b = block; b < last; b++) {
            const int64_t k = b * x->k_block;
            stored_weights(p, f, n, k, x->n_k - k < x->k_block ? x->n_k - k : x->k_block, ahead,
                           tail, &t);
            const int64_t group = (k - k_first) / MPAD_CPU_SCALED;
            for (int c = 0; c < 4 && is_grouped; c++)
                t.scale[c] = scale[c] + group;
            if (is_grouped)
                stored_runs(&held.part, group, f, &t);
            for (int64_t j = 0, i = 0; j < n_tile; j++) {
                const int n_row = (int)((p->n_row - i + n_tile - j - 1) / (n_tile - j));
                for (int r = 0; r < n_row; r++)
                    t.x[r] = x->data + b * x->ld_block +
                             (p->x_row ? p->x_row[i + r] : i + r) * x->ld_row;
                f->run(&t, n_row, is_grouped);
                stored_add(p, &t, f->unit, i, n_row, n, row_scale);
                i += n_row;
            }
        }
    }
}

static void stored_stream(const mpad_cpu_product *p, const stored_format *f)
{
    const int64_t n_block = (p->x->n_k + p->x->k_block - 1) / p->x->k_block;
    const int64_t n_span = SPAN_GROUPS * MPAD_CPU_SCALED / p->x->k_block;
    for (int64_t block = 0; block < n_block; block += n_span)
        stored_span(p, f, block, block + n_span < n_block ? block + n_span : n_block);
}

#endif
