/* Level 3: see copy.h.
 *
 * The dimensions are put into dst's order of memory and joined where both sides allow it. The last
 * two then make planes, which are cut into tiles; a tile is the unit of work that threads share.
 * Where the last dimension steps least in both, a tile is rows to copy; else it is transposed by
 * way of a buffer, so that src is read and dst is written in runs whatever the strides. */
#include "copy.h"

#include "pool.h"

#include <inttypes.h>
#include <string.h>

/* A transposed tile has TILE_ROWS rows of ROW_BYTES in dst: whole cache lines on both sides, and a
 * buffer well inside L1. RUN_BYTES: a piece of a row, small enough that threads get even shares of
 * a single row. THREAD_BYTES: below it one thread does the copy. */
enum { TILE_ROWS = 64, ROW_BYTES = 256, RUN_BYTES = 1 << 16, THREAD_BYTES = 1 << 20 };

typedef struct copy_plan {
    int64_t size[MPAD_VIEW_MAX_DIM]; /* the last two: a plane */
    int64_t dst_stride[MPAD_VIEW_MAX_DIM], src_stride[MPAD_VIEW_MAX_DIM];
    char *dst;
    const char *src;
    int64_t n_item_bytes;
    bool is_transposed;
    int64_t tile[2]; /* elements of a tile along the last two dimensions */
    int64_t n_tile[2];
} copy_plan;

enum { ROW = MPAD_VIEW_MAX_DIM - 2, COLUMN = MPAD_VIEW_MAX_DIM - 1 };

mpad_code mpad_copy_check(const mpad_view *dst, const mpad_view *src, mpad_status *status)
{
    char got[MPAD_VIEW_SHAPE_TEXT], expected[MPAD_VIEW_SHAPE_TEXT];
    MPAD_REQUIRE(dst->n_dim <= MPAD_VIEW_MAX_DIM, status, MPAD_VALUE,
                 "dst: expected at most %d dimensions, got shape %s", MPAD_VIEW_MAX_DIM,
                 mpad_view_shape(dst, got));
    bool is_same = src->n_dim == dst->n_dim;
    for (int dim = 0; is_same && dim < dst->n_dim; dim++)
        is_same = src->size[dim] == dst->size[dim];
    MPAD_REQUIRE(is_same, status, MPAD_VALUE, "src: expected shape %s, that of dst, got %s",
                 mpad_view_shape(dst, expected), mpad_view_shape(src, got));
    int64_t n = dst->n_item_bytes;
    MPAD_REQUIRE(n == 1 || n == 2 || n == 4 || n == 8, status, MPAD_TYPE,
                 "dst: expected elements of 1, 2, 4 or 8 bytes, got %s of %" PRId64,
                 mpad_view_dtype_name(dst), n);
    MPAD_REQUIRE(src->n_item_bytes == n, status, MPAD_TYPE,
                 "src: expected elements of %" PRId64 " bytes like dst's %s, got %s of %" PRId64, n,
                 mpad_view_dtype_name(dst), mpad_view_dtype_name(src), src->n_item_bytes);
    MPAD_REQUIRE(!mpad_view_overlaps_itself(dst), status, MPAD_VALUE,
                 "dst: expected each element in a place of its own, got a broadcast view");
    MPAD_REQUIRE(!mpad_view_overlaps(dst, src), status, MPAD_VALUE,
                 "src: shares memory with dst; pass a copy");
    return MPAD_OK;
}

static uint64_t magnitude(int64_t stride)
{
    return stride < 0 ? 0 - (uint64_t)stride : (uint64_t)stride;
}

/* Dimensions of more than one element, dst's largest stride first. */
static int sort_dims(const mpad_view *dst, const mpad_view *src, copy_plan *plan)
{
    int n = 0;
    for (int dim = 0; dim < dst->n_dim; dim++) {
        if (dst->size[dim] == 1)
            continue;
        int at = n++;
        for (; at > 0 && magnitude(plan->dst_stride[at - 1]) < magnitude(dst->stride[dim]); at--) {
            plan->size[at] = plan->size[at - 1];
            plan->dst_stride[at] = plan->dst_stride[at - 1];
            plan->src_stride[at] = plan->src_stride[at - 1];
        }
        plan->size[at] = dst->size[dim];
        plan->dst_stride[at] = dst->stride[dim];
        plan->src_stride[at] = src->stride[dim];
    }
    return n;
}

/* Makes one of two neighbours where stepping over the inner one is a step of the outer one. */
static int join_dims(copy_plan *plan, int n)
{
    int kept = n ? 1 : 0;
    for (int dim = 1; dim < n; dim++) {
        int outer = kept - 1;
        bool is_run = plan->dst_stride[outer] == plan->dst_stride[dim] * plan->size[dim] &&
                      plan->src_stride[outer] == plan->src_stride[dim] * plan->size[dim];
        int at = is_run ? outer : kept++;
        plan->size[at] = is_run ? plan->size[outer] * plan->size[dim] : plan->size[dim];
        plan->dst_stride[at] = plan->dst_stride[dim];
        plan->src_stride[at] = plan->src_stride[dim];
    }
    return kept;
}

static void swap_dims(copy_plan *plan, int a, int b)
{
    int64_t *const lists[] = {plan->size, plan->dst_stride, plan->src_stride};
    for (int i = 0; i < 3; i++) {
        int64_t kept = lists[i][a];
        lists[i][a] = lists[i][b];
        lists[i][b] = kept;
    }
}

static void make_plan(const mpad_view *dst, const mpad_view *src, copy_plan *plan)
{
    int n = join_dims(plan, sort_dims(dst, src, plan));
    /* To the back, ones in front. */
    for (int dim = MPAD_VIEW_MAX_DIM - 1, from = n - 1; dim >= 0; dim--, from--) {
        plan->size[dim] = from >= 0 ? plan->size[from] : 1;
        plan->dst_stride[dim] = from >= 0 ? plan->dst_stride[from] : 0;
        plan->src_stride[dim] = from >= 0 ? plan->src_stride[from] : 0;
    }
    int least = COLUMN; /* where src steps least, other than not at all */
    for (int dim = 0; dim < COLUMN; dim++)
        if (plan->src_stride[dim] != 0 &&
            magnitude(plan->src_stride[dim]) < magnitude(plan->src_stride[least]))
            least = dim;
    plan->is_transposed = least != COLUMN;
    if (plan->is_transposed)
        swap_dims(plan, least, ROW);

    plan->dst = dst->data;
    plan->src = src->data;
    plan->n_item_bytes = dst->n_item_bytes;
    int64_t n_run = RUN_BYTES / plan->n_item_bytes, n_column = plan->size[COLUMN];
    plan->tile[0] = plan->is_transposed ? TILE_ROWS : 1 + n_run / n_column;
    plan->tile[1] = plan->is_transposed ? ROW_BYTES / plan->n_item_bytes : n_run;
    for (int i = 0; i < 2; i++)
        plan->n_tile[i] = (plan->size[ROW + i] + plan->tile[i] - 1) / plan->tile[i];
}

#define INLINE static inline __attribute__((always_inline))

/* n elements of `size` bytes from steps of src_stride to steps of dst_stride. */
INLINE void copy_steps(char *dst, int64_t dst_stride, const char *src, int64_t src_stride,
                       int64_t n, size_t size)
{
    for (int64_t i = 0; i < n; i++)
        memcpy(dst + i * dst_stride, src + i * src_stride, size);
}

INLINE void copy_row(char *dst, int64_t dst_stride, const char *src, int64_t src_stride, int64_t n,
                     size_t size)
{
    int64_t step = (int64_t)size;
    if (dst_stride == step && src_stride == step)
        memcpy(dst, src, (size_t)n * size);
    else if (dst_stride == step && src_stride == 2 * step)
        copy_steps(dst, step, src, 2 * step, n, size);
    else if (dst_stride == 2 * step && src_stride == step)
        copy_steps(dst, 2 * step, src, step, n, size);
    else
        copy_steps(dst, dst_stride, src, src_stride, n, size);
}

INLINE void copy_rows(const copy_plan *plan, char *dst, const char *src, int64_t n_row,
                      int64_t n_column, size_t size)
{
    for (int64_t i = 0; i < n_row; i++)
        copy_row(dst + i * plan->dst_stride[ROW], plan->dst_stride[COLUMN],
                 src + i * plan->src_stride[ROW], plan->src_stride[COLUMN], n_column, size);
}

/* Runs of TILE_ROWS elements, one after the other, from as many columns as a word has elements. */
enum { WORD_BYTES = 8, BLOCK_BYTES = TILE_ROWS * WORD_BYTES };
typedef union block {
    char bytes[BLOCK_BYTES];
    uint8_t of_1[BLOCK_BYTES];
    uint16_t of_2[BLOCK_BYTES / 2];
    uint32_t of_4[BLOCK_BYTES / 4];
} block;

/* A perfect shuffle: the elements of the first half and of the second take turns. */
#define SHUFFLE(dst, src)                                                                          \
    do {                                                                                           \
        enum { N_HALF = sizeof(dst) / sizeof *(dst) / 2 };                                         \
        for (int i = 0; i < N_HALF; i++) {                                                         \
            (dst)[2 * i] = (src)[i];                                                               \
            (dst)[2 * i + 1] = (src)[N_HALF + i];                                                  \
        }                                                                                          \
    } while (0)

INLINE void shuffle(block *restrict dst, const block *restrict src, size_t size)
{
    if (size == 1)
        SHUFFLE(dst->of_1, src->of_1);
    else if (size == 2)
        SHUFFLE(dst->of_2, src->of_2);
    else
        SHUFFLE(dst->of_4, src->of_4);
}

/* Shuffled once for each doubling from an element to a word, block[0] becomes TILE_ROWS words, each
 * of one row; they are in the block returned. */
INLINE const block *transpose_block(block *blocks, size_t size)
{
    int now = 0;
    for (size_t n = size; n < WORD_BYTES; n *= 2, now ^= 1)
        shuffle(&blocks[now ^ 1], &blocks[now], size);
    return &blocks[now];
}

/* A run of the next tile, while this one is worked on: the hardware sees no pattern in short runs
 * from far apart. */
static void prefetch_run(const copy_plan *plan, const char *run, int64_t n_row)
{
    enum { LINE_BYTES = 64 };
    uint64_t n_bytes = (uint64_t)n_row * magnitude(plan->src_stride[ROW]);
    const char *first = plan->src_stride[ROW] < 0 ? run + n_row * plan->src_stride[ROW] : run;
    for (uint64_t at = 0; at < n_bytes; at += LINE_BYTES)
        __builtin_prefetch(first + at);
}

INLINE void transpose(const copy_plan *plan, char *dst, const char *src, int64_t n_row,
                      int64_t n_column, bool is_last, size_t size)
{
    char rows[TILE_ROWS][ROW_BYTES];
    block blocks[2];
    int64_t n_each = WORD_BYTES / (int64_t)size;
    if (n_row < TILE_ROWS || n_column % n_each)
        memset(&blocks[0], 0, sizeof blocks[0]);
    for (int64_t j = 0; j < n_column; j += n_each) {
        for (int64_t k = 0; k < n_each && j + k < n_column; k++) {
            const char *run = src + (j + k) * plan->src_stride[COLUMN];
            copy_row(blocks[0].bytes + k * TILE_ROWS * (int64_t)size, (int64_t)size, run,
                     plan->src_stride[ROW], n_row, size);
            if (!is_last)
                prefetch_run(plan, run + plan->tile[1] * plan->src_stride[COLUMN], n_row);
        }
        const block *words = transpose_block(blocks, size);
        for (int64_t i = 0; i < TILE_ROWS; i++)
            memcpy(rows[i] + j * (int64_t)size, words->bytes + i * WORD_BYTES, WORD_BYTES);
    }
    for (int64_t i = 0; i < n_row; i++)
        copy_row(dst + i * plan->dst_stride[ROW], plan->dst_stride[COLUMN], rows[i], (int64_t)size,
                 n_column, size);
}

INLINE void copy_tile(const copy_plan *plan, char *dst, const char *src, int64_t n_row,
                      int64_t n_column, bool is_last, size_t size)
{
    if (plan->is_transposed)
        transpose(plan, dst, src, n_row, n_column, is_last, size);
    else
        copy_rows(plan, dst, src, n_row, n_column, size);
}

static int64_t at_most(int64_t n, int64_t limit)
{
    return n < limit ? n : limit;
}

/* Tile `index` of all planes. */
static void copy_one(const copy_plan *plan, int64_t index)
{
    int64_t at[MPAD_VIEW_MAX_DIM];
    at[COLUMN] = index % plan->n_tile[1] * plan->tile[1];
    index /= plan->n_tile[1];
    at[ROW] = index % plan->n_tile[0] * plan->tile[0];
    index /= plan->n_tile[0];
    at[1] = index % plan->size[1];
    at[0] = index / plan->size[1];
    char *dst = plan->dst;
    const char *src = plan->src;
    for (int dim = 0; dim < MPAD_VIEW_MAX_DIM; dim++) {
        dst += at[dim] * plan->dst_stride[dim];
        src += at[dim] * plan->src_stride[dim];
    }
    int64_t n_row = at_most(plan->size[ROW] - at[ROW], plan->tile[0]);
    int64_t n_column = at_most(plan->size[COLUMN] - at[COLUMN], plan->tile[1]);
    bool is_last = at[COLUMN] + 2 * plan->tile[1] > plan->size[COLUMN]; /* whole tiles are next */
    switch (plan->n_item_bytes) {
    case 1:
        copy_tile(plan, dst, src, n_row, n_column, is_last, 1);
        break;
    case 2:
        copy_tile(plan, dst, src, n_row, n_column, is_last, 2);
        break;
    case 4:
        copy_tile(plan, dst, src, n_row, n_column, is_last, 4);
        break;
    default:
        copy_tile(plan, dst, src, n_row, n_column, is_last, 8);
        break;
    }
}

static int64_t count_tiles(const copy_plan *plan)
{
    return plan->size[0] * plan->size[1] * plan->n_tile[0] * plan->n_tile[1];
}

static void copy_share(void *context, int thread, int n_thread)
{
    const copy_plan *plan = context;
    int64_t n = count_tiles(plan), each = n / n_thread, extra = n % n_thread;
    int64_t start = thread * each + at_most(thread, extra);
    int64_t stop = start + each + (thread < extra);
    for (int64_t index = start; index < stop; index++)
        copy_one(plan, index);
}

mpad_code mpad_copy(const mpad_view *dst, const mpad_view *src, mpad_status *status)
{
    MPAD_TRY(mpad_copy_check(dst, src, status));
    int64_t n_bytes = mpad_view_count(dst) * dst->n_item_bytes;
    if (n_bytes == 0)
        return MPAD_OK;
    copy_plan plan;
    make_plan(dst, src, &plan);
    if (n_bytes < THREAD_BYTES)
        copy_share(&plan, 0, 1);
    else
        mpad_pool_run(mpad_pool_threads(), copy_share, &plan);
    return MPAD_OK;
}
