/* Level 4: the product for many rows of x; cpu_element.h includes this once per element type.
 *
 * A panel is PANEL_COLUMNS rows of w over a block of k, turned so that a vector runs along the
 * columns: [group][PANEL_COLUMNS], a group being the 4 bytes of k that one lane of x takes. It is
 * made once per block, stays in the first cache, and every row of x passes it: a tile is up to
 * PANEL_ROWS of them times the panel, x spread over the lanes. While a tile computes, it fetches
 * the rows that the next panel is made of. A sum is made in ascending order of k, in blocks. */

enum {
    NAME(PANEL_K) = PANEL_GROUPS * 4 / X_BYTES, /* most elements of k in a panel */
    NAME(STEP_GROUPS) = STEP * X_BYTES / 4,     /* groups in a step */
};

/* Rows of w that will be wanted next: `n_byte` of each. */
typedef struct NAME(panel_fetch) {
    const char *row; /* the next to fetch */
    int64_t ld, n_byte;
} NAME(panel_fetch);

typedef struct NAME(panel_tile) {
    const char *panel;
    int64_t n_group;
    const char *x[PANEL_ROWS];
    float *sum[PANEL_ROWS];
    float scale[PANEL_ROWS];
    NAME(panel_fetch) fetch; /* the tile goes FETCH_ROWS rows on with every 32 groups */
} NAME(panel_tile);

#define PANEL_EACH_ROW(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)
#define PANEL_START(r)                                                                             \
    vf a##r##0 = {0}, a##r##1 = {0};                                                               \
    const char *x_##r = t->x[(r) < n_row ? (r) : 0];
#define PANEL_ROW(r)                                                                               \
    if ((r) < n_row) {                                                                             \
        X x = x_spread(x_##r + 4 * g);                                                             \
        a##r##0 = MULTIPLY_ADD(w0, x, a##r##0);                                                    \
        a##r##1 = MULTIPLY_ADD(w1, x, a##r##1);                                                    \
    }
#define PANEL_GROUP                                                                                \
    {                                                                                              \
        X w0 = x_load(w + g * (2 * VECTOR_BYTES));                                                 \
        X w1 = x_load(w + g * (2 * VECTOR_BYTES) + VECTOR_BYTES);                                  \
        PANEL_EACH_ROW(PANEL_ROW)                                                                  \
        KEEP_ORDER                                                                                 \
        g++;                                                                                       \
    }
#define PANEL_END(r)                                                                               \
    if ((r) < n_row) {                                                                             \
        float *sum = t->sum[(r) < n_row ? (r) : 0];                                                \
        vf scale = vf_all(t->scale[(r) < n_row ? (r) : 0]);                                        \
        vf_store(sum, vf_load(sum) + a##r##0 * scale);                                             \
        vf_store(sum + LANES, vf_load(sum + LANES) + a##r##1 * scale);                             \
    }

INLINE void NAME(panel_rows)(NAME(panel_tile) * t, const int n_row)
{
    PANEL_EACH_ROW(PANEL_START)
    const char *const w = t->panel;
    const char *row = t->fetch.row;
    const int64_t n_group = t->n_group, n_whole = n_group / 32 * 32;
    const int64_t ld = t->fetch.ld, pace = (t->fetch.n_byte + 31) / 32;
    int64_t g = 0;
    while (g < n_whole) {
        const char *line = row;
        for (int i = 0; i < 32; i++, line += pace) {
            for (int r = 0; r < FETCH_ROWS; r++)
                __builtin_prefetch(line + r * ld, 0, 2);
            PANEL_GROUP
        }
        row += FETCH_ROWS * ld;
    }
    while (g < n_group)
        PANEL_GROUP
    t->fetch.row = row;
    PANEL_EACH_ROW(PANEL_END)
}

static __attribute__((noinline)) void NAME(panel_run)(NAME(panel_tile) * t, int n_row)
{
    switch (n_row) {
#define CASE(r)                                                                                    \
    case r:                                                                                        \
        NAME(panel_rows)(t, (r));                                                                  \
        break;
        CASE(1)
        CASE(2)
        CASE(3)
        CASE(4)
        CASE(5)
        CASE(6)
#if PANEL_ROWS > 6
        CASE(7)
        CASE(8)
#endif
#undef CASE
    }
}

/* LANES rows of w, STEP elements from each, into half of the columns of a panel's groups. */
INLINE void NAME(panel_turn)(char *group, const char *const *w, int64_t at)
{
    vf lines[LANES];
    TURN(lines, w, at);
    for (int g = 0; g < LANES; g++)
        TURNED(group + g * (2 * VECTOR_BYTES), lines[g]);
}

/* Makes the panel of the columns whose weights lie at w[], n_k elements from there on, and fetches
 * n_fetch rows. Rows of w are often a multiple of the first cache's way apart, so a row's whole
 * line is used up at once. */
static __attribute__((noinline)) void NAME(panel_make)(char *panel, const char *const *w,
                                                       int64_t n_k, NAME(panel_fetch) fetch,
                                                       int64_t n_fetch)
{
    enum { LINE_STEPS = NAME(STEPS_PER_LINE), STEP_PANEL = NAME(STEP_GROUPS) * 2 * VECTOR_BYTES };
    const int64_t n_step = n_k / STEP, n_tail = n_k % STEP;
    int64_t s = 0;
    for (; s + LINE_STEPS <= n_step; s += LINE_STEPS) {
        for (int64_t r = 0; r < n_fetch; r++)
            __builtin_prefetch(fetch.row + r * fetch.ld + s * NAME(STEP_BYTES), 0, 2);
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < LINE_STEPS; i++)
                NAME(panel_turn)(panel + (s + i) * STEP_PANEL + half * VECTOR_BYTES,
                                 w + half * LANES, (s + i) * NAME(STEP_BYTES));
    }
    for (; s < n_step; s++)
        for (int half = 0; half < 2; half++)
            NAME(panel_turn)(panel + s * STEP_PANEL + half * VECTOR_BYTES, w + half * LANES,
                             s * NAME(STEP_BYTES));
    if (n_tail) {
        char padded[PANEL_COLUMNS][STEP * ELEMENT_BYTES] = {{0}};
        const char *rows[PANEL_COLUMNS];
        for (int c = 0; c < PANEL_COLUMNS; c++) {
            memcpy(padded[c], w[c] + s * NAME(STEP_BYTES), (size_t)(n_tail * ELEMENT_BYTES));
            rows[c] = padded[c];
        }
        for (int half = 0; half < 2; half++)
            NAME(panel_turn)(panel + s * STEP_PANEL + half * VECTOR_BYTES, rows + half * LANES, 0);
    }
}

/* A panel's place in a product: elements [k, k + n_k), from `in_block` of block `block` of x, and
 * columns from n on. */
typedef struct NAME(panel_place) {
    int64_t k, n_k, block, in_block, n;
} NAME(panel_place);

/* Panels in the order they are made: all of k for the same columns while x stays in cache, else all
 * columns for the same k. Either way a sum gets its terms in ascending order of k. */
INLINE NAME(panel_place) NAME(panel_at)(const mpad_cpu_product *p, int64_t index)
{
    enum { X_IN_CACHE = 192 << 10 };
    const mpad_cpu_rows *x = p->x;
    const int64_t per_block = (x->k_block + NAME(PANEL_K) - 1) / NAME(PANEL_K);
    const int64_t n_piece = ((x->k_block + per_block - 1) / per_block + MPAD_CPU_K_STEP - 1) /
                            MPAD_CPU_K_STEP * MPAD_CPU_K_STEP;
    const int64_t n_block = x->n_k / x->k_block, rest = x->n_k % x->k_block;
    const int64_t n_pieces = n_block * per_block + (rest + n_piece - 1) / n_piece;
    const int64_t n_panel = (p->n_column + PANEL_COLUMNS - 1) / PANEL_COLUMNS;
    const bool is_k_first = p->n_row * x->n_k * X_BYTES <= X_IN_CACHE;
    const int64_t piece = is_k_first ? index % n_pieces : index / n_panel;
    NAME(panel_place) at = {.block = piece / per_block, .in_block = piece % per_block * n_piece};
    at.n = (is_k_first ? index / n_pieces : index % n_panel) * PANEL_COLUMNS;
    at.k = at.block * x->k_block + at.in_block;
    const int64_t left_in_block = x->k_block - at.in_block, left = x->n_k - at.k;
    at.n_k = n_piece < left_in_block ? n_piece : left_in_block;
    at.n_k = at.n_k < left ? at.n_k : left;
    if (index >= n_pieces * n_panel)
        at.n = p->n_column;
    return at;
}

static void NAME(panel_multiply)(const mpad_cpu_product *p)
{
    char panel[PANEL_GROUPS * 2 * VECTOR_BYTES] __attribute__((aligned(64)));
    const mpad_cpu_rows *x = p->x;
    if (x->n_k == 0)
        return;
    const int64_t n_tile = (p->n_row + PANEL_ROWS - 1) / PANEL_ROWS;
    NAME(panel_tile) t = {.panel = panel};
    NAME(panel_place) here = NAME(panel_at)(p, 0);

    for (int64_t index = 0; here.n < p->n_column; index++) {
        const NAME(panel_place) next = NAME(panel_at)(p, index + 1);
        const char *const w = (const char *)p->w + here.n * p->ld_w + here.k * ELEMENT_BYTES;
        const char *columns[PANEL_COLUMNS];
        for (int64_t c = 0; c < PANEL_COLUMNS; c++)
            columns[c] = w + (here.n + c < p->n_column ? c : p->n_column - 1 - here.n) * p->ld_w;
        t.n_group = (here.n_k + STEP - 1) / STEP * NAME(STEP_GROUPS);
        t.fetch = (NAME(panel_fetch)){
            .row = next.n < p->n_column
                       ? (const char *)p->w + next.n * p->ld_w + next.k * ELEMENT_BYTES
                   : p->next_w ? p->next_w
                               : w,
            .ld = p->ld_w,
            .n_byte = (next.n < p->n_column ? next.n_k : here.n_k) * ELEMENT_BYTES,
        };
        /* What the tiles will not get to, at once. */
        const int64_t n_tile_fetch = t.n_group / 32 * FETCH_ROWS;
        int64_t n_fetch = PANEL_COLUMNS - n_tile * n_tile_fetch;
        n_fetch = n_fetch < 0 ? 0 : n_fetch;
        NAME(panel_make)(panel, columns, here.n_k, t.fetch, n_fetch);
        t.fetch.row += n_fetch * p->ld_w;
        n_fetch = PANEL_COLUMNS - n_fetch;

        for (int64_t j = 0, i = 0; j < n_tile; j++) {
            const int n_row = (int)((p->n_row - i + n_tile - j - 1) / (n_tile - j));
            for (int r = 0; r < n_row; r++) {
                int64_t row = p->sum_row ? p->sum_row[i + r] - p->sum_origin : i + r;
                t.x[r] = x->data + here.block * x->ld_block + here.in_block * X_BYTES +
                         (p->x_row ? p->x_row[i + r] : i + r) * x->ld_row;
                t.sum[r] = p->sum + row * p->ld_sum + here.n;
                t.scale[r] = p->scale ? p->scale[i + r] : 1.0f;
            }
            NAME(panel_run)(&t, n_row);
            i += n_row;
            n_fetch -= n_tile_fetch;
            if (n_fetch <= 0) { /* all on its way: an address that costs nothing */
                t.fetch.row = panel;
                t.fetch.ld = 0;
            }
        }
        here = next;
    }
}

#undef PANEL_EACH_ROW
#undef PANEL_START
#undef PANEL_ROW
#undef PANEL_GROUP
#undef PANEL_END
