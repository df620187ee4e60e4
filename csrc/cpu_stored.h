/* Level 7: the products with quantised weights of one format; cpu_formats.h includes this once per
 * format, after these macros, all undefined again at the end:
 *
 *   FORMAT              the suffix of the functions
 *   PLANES(F)           F(j) for each plane of a step; N_PLANE, how many
 *   UNIT                what WEIGHT's numbers are to be multiplied by
 *   WEIGHT(z, j)        plane j of a vector of stored weights, as floats
 *   IS_SPECIAL(z)       whether one of them is none that WEIGHT knows
 *   SPECIAL_WEIGHT(z, j) WEIGHT for every code
 *
 * A step is a vector of stored weights: LANES * N_PLANE elements of k of one row of w. For few rows
 * of x they go from memory through registers into multiply-adds, four rows of w at a time. For
 * many, 2 * LANES rows of w are turned while still stored and become a panel of floats, for the f32
 * kernel. In both, partial sums are float32 in an order that depends on the length alone. */

#define PASTE2(a, b) a##_##b
#define PASTE(a, b) PASTE2(a, b)
#define NAME(function) PASTE(function, FORMAT)

enum {
    NAME(STEP) = LANES * N_PLANE,
    NAME(STEP_GROUPS) = LANES * N_PLANE / MPAD_CPU_SCALED, /* 0: less than one */
};

/* Bytes of the first n elements of a row. */
INLINE int64_t NAME(bytes)(int64_t n)
{
    return N_PLANE == 4 ? n : (n + 1) / 2;
}

/* The scale of each lane of step i, of scales one per group. */
INLINE vf NAME(lane_scales)(const float *scale, int64_t i)
{
    return NAME(STEP_GROUPS) == 4   ? vf_repeat4(scale + 4 * i)
           : NAME(STEP_GROUPS) == 2 ? vf_repeat2(scale + 2 * i)
                                    : vf_all(scale[i * NAME(STEP) / MPAD_CPU_SCALED]);
}

static __attribute__((noinline, cold)) void NAME(decode_special)(vu z, vf *w)
{
#define DECODE(j) w[j] = SPECIAL_WEIGHT(z, j);
    PLANES(DECODE)
#undef DECODE
}

/* ---- few rows of x ---- */

typedef struct NAME(stored_tile) {
    const char *x[STORED_ROWS];
    const char *w[4];
    const char *next[4]; /* of the weights wanted next, fetched at the same pace */
    const char *tail;    /* one more step of weights, [4][VECTOR_BYTES], zero-filled; or NULL */
    const float *scale[4];
    int64_t n_step;
    v4 sum[STORED_ROWS];
} NAME(stored_tile);

#define EACH_ROW(F) F(0) F(1) F(2) F(3)
#define ROW_START(r)                                                                               \
    vf a##r##0 = {0}, a##r##1 = {0}, a##r##2 = {0}, a##r##3 = {0};                                 \
    const char *x_##r = t->x[(r) < n_row ? (r) : 0];
#define PART_START(r, n) vf p##r = is_grouped ? (vf){0} : a##r##n;
#define PART_END(r, n) a##r##n = is_grouped ? vf_multiply_add(p##r, s, a##r##n) : p##r;
#define ROW_PLANE(r, j)                                                                            \
    if ((r) < n_row)                                                                               \
        p##r = vf_multiply_add(w, vf_load(x_##r + at + (j) * VECTOR_BYTES), p##r);
#define EACH_ROW_PLANE(j) ROW_PLANE(0, j) ROW_PLANE(1, j) ROW_PLANE(2, j) ROW_PLANE(3, j)
#define PLANE(j)                                                                                   \
    {                                                                                              \
        vf w = WEIGHT(z, j);                                                                       \
        EACH_ROW_PLANE(j)                                                                          \
    }
#define SPECIAL_PLANE(j)                                                                           \
    {                                                                                              \
        vf w = special[j];                                                                         \
        EACH_ROW_PLANE(j)                                                                          \
    }
#define STEP_COLUMN(n, source)                                                                     \
    {                                                                                              \
        const vu z = vu_load(source);                                                              \
        const vf s = is_grouped ? NAME(lane_scales)(t->scale[n], i) : (vf){0};                     \
        (void)s;                                                                                   \
        PART_START(0, n)                                                                           \
        PART_START(1, n) PART_START(2, n) PART_START(3, n) if (__builtin_expect(IS_SPECIAL(z), 0)) \
        {                                                                                          \
            vf special[N_PLANE];                                                                   \
            NAME(decode_special)(z, special);                                                      \
            PLANES(SPECIAL_PLANE)                                                                  \
        }                                                                                          \
        else {PLANES(PLANE)} PART_END(0, n) PART_END(1, n) PART_END(2, n) PART_END(3, n)           \
    }
#define ROW_SUM(r)                                                                                 \
    if ((r) < n_row)                                                                               \
        t->sum[(r) < STORED_ROWS ? (r) : 0] = vf_reduce4(a##r##0, a##r##1, a##r##2, a##r##3);

INLINE void NAME(stored_rows)(NAME(stored_tile) *restrict t, const int n_row, const bool is_grouped)
{
    EACH_ROW(ROW_START)
    const char *const w_0 = t->w[0], *const w_1 = t->w[1], *const w_2 = t->w[2];
    const char *const w_3 = t->w[3];
    int64_t i = 0;
    for (; i < t->n_step; i++) {
        const int64_t at = i * (N_PLANE * VECTOR_BYTES);
        for (int n = 0; n < 4; n++)
            __builtin_prefetch(t->next[n] + i * VECTOR_BYTES);
        STEP_COLUMN(0, w_0 + i * VECTOR_BYTES)
        STEP_COLUMN(1, w_1 + i * VECTOR_BYTES)
        STEP_COLUMN(2, w_2 + i * VECTOR_BYTES)
        STEP_COLUMN(3, w_3 + i * VECTOR_BYTES)
    }
    if (t->tail) {
        const int64_t at = i * (N_PLANE * VECTOR_BYTES);
        STEP_COLUMN(0, t->tail)
        STEP_COLUMN(1, t->tail + VECTOR_BYTES)
        STEP_COLUMN(2, t->tail + 2 * VECTOR_BYTES)
        STEP_COLUMN(3, t->tail + 3 * VECTOR_BYTES)
    }
    EACH_ROW(ROW_SUM)
}

static __attribute__((noinline)) void NAME(stored_run)(NAME(stored_tile) * t, int n_row,
                                                       bool is_grouped)
{
#define CASE(r)                                                                                    \
    case r:                                                                                        \
        if (is_grouped)                                                                            \
            NAME(stored_rows)(t, (r), true);                                                       \
        else                                                                                       \
            NAME(stored_rows)(t, (r), false);                                                      \
        break;
    switch (n_row) {
        CASE(1)
        CASE(2)
#if STORED_ROWS > 2
        CASE(3)
        CASE(4)
#endif
    }
#undef CASE
}

/* Adds a tile's sums of columns [n, n + 4) to rows [i, i + n_row) of the product's sums. */
INLINE void NAME(stored_add)(const mpad_cpu_product *p, const NAME(stored_tile) * t, int64_t i,
                             int n_row, int64_t n, v4 row_scale)
{
    for (int r = 0; r < n_row; r++) {
        int64_t row = p->sum_row ? p->sum_row[i + r] - p->sum_origin : i + r;
        float *sum = p->sum + row * p->ld_sum + n;
        float scale = p->scale ? p->scale[i + r] : 1.0f;
        v4 term = t->sum[r] * UNIT * row_scale * scale;
        if (p->n_column - n >= 4)
            *(v4_any *)sum += term;
        else
            for (int64_t c = 0; c < p->n_column - n; c++)
                sum[c] += term[c];
    }
}

/* Makes the tile of rows [n, n + 4) of w and a block of k; `tail` has room for a step of each. */
INLINE void NAME(stored_weights)(const mpad_cpu_product *p, int64_t n, int64_t k, int64_t n_k,
                                 int64_t ahead, char *tail, NAME(stored_tile) * t)
{
    const int64_t n_tail = n_k % NAME(STEP), k_at = NAME(bytes)(k);
    t->n_step = n_k / NAME(STEP);
    t->tail = n_tail ? tail : NULL;
    if (n_tail)
        memset(tail, 0, 4 * VECTOR_BYTES);
    for (int c = 0; c < 4; c++) {
        const int64_t column = n + c < p->n_column ? n + c : p->n_column - 1;
        const int64_t beyond = n + c + ahead - p->n_column;
        t->w[c] = (const char *)p->w + column * p->ld_w + k_at;
        t->next[c] = beyond < 0  ? t->w[c] + ahead * p->ld_w
                     : p->next_w ? (const char *)p->next_w + beyond * p->ld_w + k_at
                                 : t->w[c];
        if (n_tail)
            memcpy(tail + c * VECTOR_BYTES, t->w[c] + t->n_step * VECTOR_BYTES,
                   (size_t)NAME(bytes)(n_tail));
    }
}

/* The product over blocks [block, last) of k, as many as scales are held for. */
static void NAME(stored_span)(const mpad_cpu_product *p, int64_t block, int64_t last)
{
    enum { AHEAD_BYTES = 8192 };
    const mpad_cpu_rows *x = p->x;
    const mpad_scale *s = p->w_scale;
    const bool is_grouped = !scale_is_per_row(s);
    const int64_t n_tile = (p->n_row + STORED_ROWS - 1) / STORED_ROWS;
    const int64_t ahead = (AHEAD_BYTES / (4 * NAME(bytes)(x->n_k)) + 1) * 4;
    const int64_t k_first = block * x->k_block;
    char tail[4 * VECTOR_BYTES] __attribute__((aligned(64)));
    scales_held held;
    NAME(stored_tile) t;
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
            NAME(stored_weights)(p, n, k, x->n_k - k < x->k_block ? x->n_k - k : x->k_block, ahead,
                                 tail, &t);
            for (int c = 0; c < 4 && is_grouped; c++)
                t.scale[c] = scale[c] + (k - k_first) / MPAD_CPU_SCALED;
            for (int64_t j = 0, i = 0; j < n_tile; j++) {
                const int n_row = (int)((p->n_row - i + n_tile - j - 1) / (n_tile - j));
                for (int r = 0; r < n_row; r++)
                    t.x[r] = x->data + b * x->ld_block +
                             (p->x_row ? p->x_row[i + r] : i + r) * x->ld_row;
                NAME(stored_run)(&t, n_row, is_grouped);
                NAME(stored_add)(p, &t, i, n_row, n, row_scale);
                i += n_row;
            }
        }
    }
}

static void NAME(stored_stream)(const mpad_cpu_product *p)
{
    const int64_t n_block = (p->x->n_k + p->x->k_block - 1) / p->x->k_block;
    const int64_t n_span = SPAN_GROUPS * MPAD_CPU_SCALED / p->x->k_block;
    for (int64_t block = 0; block < n_block; block += n_span)
        NAME(stored_span)(p, block, block + n_span < n_block ? block + n_span : n_block);
}

/* ---- many rows of x ---- */

enum { NAME(PANEL_SCALES) = PANEL_GROUPS / MPAD_CPU_SCALED };

/* Makes the panel of the columns whose weights lie at w[], n_k elements from there on; `scale` is
 * [groups of k, ld_scale apart][PANEL_COLUMNS]. */
static __attribute__((noinline)) void NAME(stored_panel)(float *panel, const char *const *w,
                                                         int64_t n_k, const float *scale,
                                                         int64_t ld_scale)
{
    const int64_t n_whole = n_k / NAME(STEP) * NAME(STEP);
    for (int64_t k = 0; k < n_k; k += NAME(STEP)) {
        for (int half = 0; half < 2; half++) {
            vf lines[LANES];
            if (k < n_whole) {
                for (int c = 0; c < LANES; c++)
                    lines[c] = vf_load(w[half * LANES + c] + NAME(bytes)(k));
            } else {
                char padded[VECTOR_BYTES] = {0};
                for (int c = 0; c < LANES; c++) {
                    memcpy(padded, w[half * LANES + c] + NAME(bytes)(k),
                           (size_t)NAME(bytes)(n_k - k));
                    lines[c] = vf_load(padded);
                }
            }
            vf_transpose(lines);
            for (int g = 0; g < LANES; g++) {
                const vu z = (vu)lines[g];
                const vf s =
                    vf_load(scale + (k + g * N_PLANE) / MPAD_CPU_SCALED * ld_scale + half * LANES);
                float *to = panel + (k + g) * PANEL_COLUMNS + half * LANES;
                vf special[N_PLANE];
                const bool is_special = IS_SPECIAL(z);
                if (__builtin_expect(is_special, 0))
                    NAME(decode_special)(z, special);
#define TURN(j)                                                                                    \
    vf_store(to + (j) * LANES * PANEL_COLUMNS, (is_special ? special[j] : WEIGHT(z, j)) * s);
                PLANES(TURN)
#undef TURN
            }
        }
    }
}

static void NAME(stored_panels)(const mpad_cpu_product *p)
{
    float panel[PANEL_GROUPS * PANEL_COLUMNS] __attribute__((aligned(64)));
    float scale[NAME(PANEL_SCALES) * PANEL_COLUMNS] __attribute__((aligned(64)));
    const mpad_scale *s = p->w_scale;
    const mpad_cpu_rows *x = p->x;
    const int64_t ld_scale = scale_is_per_row(p->w_scale) ? 0 : PANEL_COLUMNS;
    const int64_t n_tile = (p->n_row + PANEL_ROWS - 1) / PANEL_ROWS;
    panel_tile_f32 t = {.panel = (const char *)panel, .fetch = {.row = (const char *)panel}};

    for (int64_t k = 0; k < x->n_k;) {
        const int64_t block = k / x->k_block, in_block = k % x->k_block;
        int64_t n_here = x->n_k - k;
        n_here = n_here < x->k_block - in_block ? n_here : x->k_block - in_block;
        n_here = n_here < PANEL_GROUPS ? n_here : PANEL_GROUPS;
        const scales_part part =
            ld_scale ? scales_part_of(s, k, n_here) : (scales_part){.n_group = 1};
        const char *w = (const char *)p->w + NAME(bytes)(k);
        const char *x_data = x->data + block * x->ld_block + in_block * 4;
        t.n_group = (n_here + NAME(STEP) - 1) / NAME(STEP) * NAME(STEP);

        for (int64_t n = 0; n < p->n_column; n += PANEL_COLUMNS) {
            const char *columns[PANEL_COLUMNS];
            memset(scale, 0, sizeof scale);
            for (int64_t c = 0; c < PANEL_COLUMNS; c++) {
                const int64_t column = n + c < p->n_column ? n + c : p->n_column - 1;
                const int64_t at = p->w_scale_at + scale_row(s, p->w_row + column) * s->ld_row;
                float each[NAME(PANEL_SCALES) + 2 * LANES];
                columns[c] = w + column * p->ld_w;
                if (ld_scale)
                    scales_load(s, at, &part, each);
                else
                    each[0] = scale_at(s, at);
                for (int64_t g = 0; g < part.n_group; g++)
                    scale[g * PANEL_COLUMNS + c] = each[g];
            }
            NAME(stored_panel)(panel, columns, n_here, scale, ld_scale);

            for (int64_t j = 0, i = 0; j < n_tile; j++) {
                const int n_row = (int)((p->n_row - i + n_tile - j - 1) / (n_tile - j));
                for (int r = 0; r < n_row; r++) {
                    int64_t row = p->sum_row ? p->sum_row[i + r] - p->sum_origin : i + r;
                    t.x[r] = x_data + (p->x_row ? p->x_row[i + r] : i + r) * x->ld_row;
                    t.sum[r] = p->sum + row * p->ld_sum + n;
                    t.scale[r] = p->scale ? p->scale[i + r] * UNIT : UNIT;
                }
                panel_run_f32(&t, n_row);
                i += n_row;
            }
        }
        k += n_here;
    }
}

static void NAME(multiply)(const mpad_cpu_product *p)
{
    if (p->n_row <= STORED_STREAM_ROWS)
        NAME(stored_stream)(p);
    else
        NAME(stored_panels)(p);
}

#undef PASTE2
#undef PASTE
#undef NAME
#undef EACH_ROW
#undef ROW_START
#undef PART_START
#undef PART_END
#undef ROW_PLANE
#undef EACH_ROW_PLANE
#undef PLANE
#undef SPECIAL_PLANE
#undef STEP_COLUMN
#undef ROW_SUM
#undef FORMAT
#undef PLANES
#undef N_PLANE
#undef UNIT
#undef WEIGHT
#undef IS_SPECIAL
#undef SPECIAL_WEIGHT
