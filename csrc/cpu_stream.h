/* Level 4: the product for few rows of x; cpu_element.h includes this once per element type.
 *
 * A set of dot products: a tile is up to TILE_ROWS rows of x times four rows of w, or two where
 * registers do not suffice for more, both walked along a block of k as they lie in memory, every
 * accumulator a vector along k, summed across once at the end. So w goes straight into registers,
 * and the order in which a sum is made depends on nothing but its length. A tile's rows of x stay
 * in the first cache while w passes them; where there are more rows than a tile has, they take
 * turns on a group of columns of w, which stays in the second. Every tile fetches its share of the
 * weights wanted next, so that memory never rests: of four rows side by side, more streams than
 * that or fewer being slower, or of short rows in the order of memory, as processors' own
 * prefetchers want it. */

/* A tile's rows of x over columns [first, last) of a product and one block of k. */
typedef struct NAME(stream) {
    const char *w, *next_w; /* of column 0 of the product; and what comes after its last */
    int64_t ld_w, n_column, n_k;
    int64_t ahead;          /* columns from those at work to those being fetched */
    int64_t fetch_from;     /* bytes from there to what this tile fetches */
    int64_t share;          /* bytes that it fetches of each stream */
    int64_t fetch_ld, pace; /* bytes between the streams; from step to step */
    bool is_fetched_near;
    int64_t first, last;
    const char *x[MAX_TILE_ROWS];
    float *sum[MAX_TILE_ROWS]; /* of column 0 */
    float scale[MAX_TILE_ROWS];
} NAME(stream);

#ifndef MULTIPLY_ADD_TIGHT
#    define MULTIPLY_ADD_TIGHT MULTIPLY_ADD
#endif
#define EACH_ROW(F) F(0) F(1) F(2) F(3) F(4) F(5)
#define X_POINTER(r) const char *const x_##r = s->x[(r) < n_row ? (r) : 0];
#define ACCUMULATORS(r) vf a##r##0 = {0}, a##r##1 = {0}, a##r##2 = {0}, a##r##3 = {0};
#define LOAD_X(r) X x##r = x_load(x_##r + at);
#define MULTIPLY(r, n)                                                                             \
    if ((r) < n_row)                                                                               \
        a##r##n = MULTIPLY_ADD(w, x##r, a##r##n);
#define COLUMN(n, phase)                                                                           \
    {                                                                                              \
        X w = WEIGHT(w_##n + from, phase);                                                         \
        MULTIPLY(0, n)                                                                             \
        MULTIPLY(1, n)                                                                             \
        MULTIPLY(2, n)                                                                             \
        MULTIPLY(3, n)                                                                             \
        MULTIPLY(4, n)                                                                             \
        MULTIPLY(5, n)                                                                             \
    }
#define ROW(r)                                                                                     \
    if ((r) < n_row) {                                                                             \
        X x = x_load(x_##r + at);                                                                  \
        a##r##0 = MULTIPLY_ADD_TIGHT(w0, x, a##r##0);                                              \
        a##r##1 = MULTIPLY_ADD_TIGHT(w1, x, a##r##1);                                              \
    }
/* One pass over a step: n_row registers of x, and one of weights after the other; or two of
 * weights, and one of x after the other. */
#define PASS(phase)                                                                                \
    {                                                                                              \
        if (n_wide == 4) {                                                                         \
            EACH_ROW(LOAD_X)                                                                       \
            COLUMN(0, phase)                                                                       \
            COLUMN(1, phase)                                                                       \
            COLUMN(2, phase)                                                                       \
            COLUMN(3, phase)                                                                       \
        } else {                                                                                   \
            X w0 = WEIGHT(w_0 + from, phase), w1 = WEIGHT(w_1 + from, phase);                      \
            EACH_ROW(ROW)                                                                          \
        }                                                                                          \
        at += VECTOR_BYTES;                                                                        \
        KEEP_ORDER                                                                                 \
    }
#define ADD_SUM(r, columns)                                                                        \
    if ((r) < n_row) {                                                                             \
        const int row = (r) < n_row ? (r) : 0;                                                     \
        v4 term = (columns) * s->scale[row];                                                       \
        float *sum = s->sum[row] + n;                                                              \
        if (n_valid == 4)                                                                          \
            *(v4_any *)sum += term;                                                                \
        else                                                                                       \
            for (int64_t c = 0; c < n_valid; c++)                                                  \
                sum[c] += term[c];                                                                 \
    }

#define ADD_FOUR(r) ADD_SUM(r, vf_reduce4(a##r##0, a##r##1, a##r##2, a##r##3))
#define ADD_TWO(r, q)                                                                              \
    if ((r) < n_row) {                                                                             \
        v4 both = vf_reduce4(a##r##0, a##r##1, a##q##0, a##q##1);                                  \
        ADD_SUM(r, both)                                                                           \
        ADD_SUM(q, ((v4){both[2], both[3]}))                                                       \
    }

INLINE void NAME(stream_rows)(const NAME(stream) * s, const int n_row, const bool is_fetched_near)
{
    const int n_wide = IS_NARROW && n_row > 3 ? 2 : 4;
    char padded[4][STEP * ELEMENT_BYTES] __attribute__((aligned(64)));
    const int64_t n_step = s->n_k / STEP, n_tail = s->n_k % STEP;
    const int64_t ld_w = s->ld_w, fetch_ld = IS_NARROW ? s->fetch_ld : ld_w;
    const int64_t pace = s->pace * n_wide / 4, share = s->share * n_wide / 4;
    EACH_ROW(X_POINTER)
    for (int64_t n = s->first; n < s->last; n += n_wide) {
        const int64_t n_valid = s->last - n < n_wide ? s->last - n : n_wide;
        const int64_t coming = (IS_NARROW ? n & -4 : n) + s->ahead;
        const int64_t beyond = coming - s->n_column;
        const char *next = s->fetch_from + (n & 3) / n_wide * share +
                           (beyond < 0 ? s->w + coming * ld_w : s->next_w + beyond * ld_w);
        const char *near = n + n_wide < s->last ? s->w + (n + n_wide) * ld_w : s->next_w;
        const char *w_0 = s->w + n * ld_w;
        const char *w_1 = n_valid > 1 ? w_0 + ld_w : w_0;
        const char *w_2 = n_valid > 2 ? w_1 + ld_w : w_0;
        const char *w_3 = n_valid > 3 ? w_2 + ld_w : w_0;
        EACH_ROW(ACCUMULATORS)
        int64_t i = 0, at = 0, from = 0; /* step; bytes from x; from w */
        for (; i + NAME(STEPS_PER_LINE) <= n_step; next += pace, near += 64) {
            for (int c = 0; c < 4; c++) {
                __builtin_prefetch(next + c * fetch_ld, 0, 2);
                if (is_fetched_near)
                    __builtin_prefetch(near + c * ld_w);
            }
            for (int u = 0; u < NAME(STEPS_PER_LINE); u++, i++, from += NAME(STEP_BYTES)) {
                PHASES(PASS)
            }
        }
        for (; i < n_step; i++, from += NAME(STEP_BYTES)) {
            PHASES(PASS)
        }
        if (n_tail) {
            const char *const rows[4] = {w_0, w_1, w_2, w_3};
            memset(padded, 0, sizeof padded);
            for (int c = 0; c < n_wide; c++)
                memcpy(padded[c], rows[c] + from, (size_t)(n_tail * ELEMENT_BYTES));
            w_0 = padded[0];
            w_1 = padded[1];
            w_2 = padded[2];
            w_3 = padded[3];
            from = 0;
            PHASES(PASS)
        }
        if (n_wide == 4) {
            EACH_ROW(ADD_FOUR)
        } else {
            ADD_TWO(0, 1)
            ADD_TWO(2, 3)
            ADD_TWO(4, 5)
        }
    }
}

/* One function per count of rows, so that all accumulators are registers. */
static __attribute__((noinline)) void NAME(stream_run)(const NAME(stream) * s, int n_row)
{
#define CASE(r)                                                                                    \
    case r:                                                                                        \
        if (s->is_fetched_near)                                                                    \
            NAME(stream_rows)(s, (r), true);                                                       \
        else                                                                                       \
            NAME(stream_rows)(s, (r), false);                                                      \
        break;
    switch (n_row) {
        CASE(1)
        CASE(2)
#if TILE_ROWS(1) > 2
        CASE(3)
#endif
#if TILE_ROWS(1) > 3
        CASE(4)
#endif
#if TILE_ROWS(1) > 4
        CASE(5)
        CASE(6)
#endif
    }
#undef CASE
}

static void NAME(stream_multiply)(const mpad_cpu_product *p)
{
    enum { AHEAD_BYTES = 16384, GROUP_BYTES = 65536, PAGE_BYTES = 4096 }; /* of w */
    const mpad_cpu_rows *x = p->x;
    if (x->n_k == 0)
        return;
    const int64_t n_tile = (p->n_row + TILE_ROWS(p->n_row) - 1) / TILE_ROWS(p->n_row);
    const int64_t k_block = x->n_k < x->k_block ? x->n_k : x->k_block;
    /* Pieces of rows too short for a processor's own prefetcher to follow: they are then taken and
     * fetched as near to the order of memory as can be, and not far ahead of it. */
    const bool is_short = IS_NARROW && k_block * ELEMENT_BYTES < PAGE_BYTES;
    const int64_t row_bytes = x->n_k * ELEMENT_BYTES;
    const bool is_run = is_short && x->n_k == k_block && p->ld_w < 2 * row_bytes;
    const int64_t fetch_ld = is_run ? 64 * p->ld_w / row_bytes : p->ld_w; /* pads go by */
    const int64_t bytes = n_tile > 1 ? GROUP_BYTES : is_short ? PAGE_BYTES : AHEAD_BYTES;
    const int64_t ahead = (bytes / (4 * k_block * ELEMENT_BYTES) + 1) * 4;
    NAME(stream)
    s = {.ld_w = p->ld_w,
         .n_column = p->n_column,
         .ahead = ahead < p->n_column ? ahead : p->n_column,
         .fetch_ld = fetch_ld,
         .pace = (is_run ? 4 * fetch_ld : 64) / n_tile,
         .is_fetched_near = p->is_fetched_near && n_tile == 1};
    const int64_t n_group = n_tile == 1 ? p->n_column : s.ahead;
    const int64_t n_pass = is_short && x->n_k > k_block ? s.ahead : p->n_column; /* by all of k */

    for (int64_t pass = 0; pass < p->n_column; pass += n_pass)
        for (int64_t k = 0; k < x->n_k; k += x->k_block) {
            const int64_t end = pass + n_pass < p->n_column ? pass + n_pass : p->n_column;
            s.n_k = x->n_k - k < x->k_block ? x->n_k - k : x->k_block;
            s.w = (const char *)p->w + k * ELEMENT_BYTES;
            s.next_w = !is_short && k + s.n_k < x->n_k ? s.w + s.n_k * ELEMENT_BYTES
                       : !p->next_w ? s.w
                                    : (const char *)p->next_w + (is_short ? k * ELEMENT_BYTES : 0);
            s.share = (is_run ? 4 * p->ld_w : s.n_k * ELEMENT_BYTES) / n_tile;
            for (int64_t n = pass; n < end; n += n_group) {
                s.first = n;
                s.last = n + n_group < end ? n + n_group : end;
                for (int64_t j = 0, i = 0; j < n_tile; j++) {
                    const int n_row = (int)((p->n_row - i + n_tile - j - 1) / (n_tile - j));
                    for (int r = 0; r < n_row; r++) {
                        int64_t row = p->sum_row ? p->sum_row[i + r] - p->sum_origin : i + r;
                        s.x[r] = x->data + k / x->k_block * x->ld_block +
                                 (p->x_row ? p->x_row[i + r] : i + r) * x->ld_row;
                        s.sum[r] = p->sum + row * p->ld_sum;
                        s.scale[r] = p->scale ? p->scale[i + r] : 1.0f;
                    }
                    s.fetch_from = j * s.share;
                    NAME(stream_run)(&s, n_row);
                    i += n_row;
                }
            }
        }
}

#undef EACH_ROW
#undef X_POINTER
#undef ACCUMULATORS
#undef LOAD_X
#undef MULTIPLY
#undef COLUMN
#undef ROW
#undef PASS
#undef ADD_SUM
#undef ADD_FOUR
#undef ADD_TWO
