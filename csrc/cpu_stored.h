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

INLINE void NAME(stored_rows)(stored_tile *restrict t, const int n_row, const bool is_grouped)
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

static __attribute__((noinline)) void NAME(stored_run)(stored_tile *t, int n_row, bool is_grouped)
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

static const stored_format NAME(stored) = {
    .bits = 32 / N_PLANE,
    .step = NAME(STEP),
    .unit = UNIT,
    .run = NAME(stored_run),
};

/* ---- many rows of x ---- */

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
                    lines[c] = vf_load(w[half * LANES + c] + stored_bytes(k, 32 / N_PLANE));
            } else {
                char padded[VECTOR_BYTES] = {0};
                for (int c = 0; c < LANES; c++) {
                    memcpy(padded, w[half * LANES + c] + stored_bytes(k, 32 / N_PLANE),
                           (size_t)stored_bytes(n_k - k, 32 / N_PLANE));
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
    float scale[PANEL_SCALES * PANEL_COLUMNS] __attribute__((aligned(64)));
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
        const scales_part part = scales_part_of(s, k, n_here);
        const char *w = (const char *)p->w + stored_bytes(k, 32 / N_PLANE);
        const char *x_data = x->data + block * x->ld_block + in_block * 4;
        t.n_group = (n_here + NAME(STEP) - 1) / NAME(STEP) * NAME(STEP);

        for (int64_t n = 0; n < p->n_column; n += PANEL_COLUMNS) {
            const char *columns[PANEL_COLUMNS];
            for (int64_t c = 0; c < PANEL_COLUMNS; c++)
                columns[c] = w + (n + c < p->n_column ? n + c : p->n_column - 1) * p->ld_w;
            scales_turn(p, n, &part, scale);
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
        stored_stream(p, &NAME(stored));
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
