/* Level 2: every size, offset, stride, scale shape and byte count, as pure integer arithmetic.
 * Nothing else in the project computes one. Allocates nothing, reads no environment. */
#ifndef MPAD_PLAN_H
#define MPAD_PLAN_H

#include "params.h"
#include "status.h"

enum { MPAD_PLAN_MAX_DIM = 3 };

/* Which weights share a scale: those of a matrix of an expert (gate and up apart), of a row, of a
 * block of rows and columns, of a group of columns of a row. */
typedef enum mpad_scale_rule {
    MPAD_SCALE_NONE,
    MPAD_SCALE_TENSOR,
    MPAD_SCALE_ROW,
    MPAD_SCALE_BLOCK,
    MPAD_SCALE_GROUP,
} mpad_scale_rule;

/* What a kind of quantisation is; a dtype of MPAD_DTYPE_COUNT is for the caller to choose. */
typedef struct mpad_kind {
    const char *name;
    mpad_scale_rule scale;
    int64_t n_pack; /* logical elements of one stored element along a row: 1 or 2 */
    mpad_dtype storage_dtype, scale_dtype;
} mpad_kind;

const mpad_kind *mpad_kind_of(mpad_quant quant);

/* The block of a kind, rows and columns: of what is asked where the kind leaves it open, else its
 * own. */
mpad_code mpad_settle_block(mpad_quant quant, int64_t asked_n, int64_t asked_k, int64_t *block_n,
                            int64_t *block_k, mpad_status *status);

/* Columns from one common border of row blocks and column blocks to the next; INT64_MAX where that
 * does not fit. */
int64_t mpad_common_border(int64_t block_n, int64_t block_k);

/* Blocks that n elements touch, the first of them `phase` elements inside its block. */
int64_t mpad_count_blocks(int64_t phase, int64_t n, int64_t block);

typedef struct mpad_shape {
    int n_dim; /* 0: the tensor does not exist */
    int64_t size[MPAD_PLAN_MAX_DIM];
} mpad_shape;

typedef struct mpad_plan_request {
    int64_t n_hidden, n_inter, n_expert; /* of the whole checkpoint layer */
    bool is_gated;
    mpad_quant quant;
    mpad_dtype dtype;         /* F32, BF16, F16; or the fp8 flavour of an fp8 kind */
    int64_t block_n, block_k; /* fp8_block: rows, columns; int4_group: 1, group; else not read */
    int64_t tp_size, tp_rank, ep_size, ep_rank;
    mpad_split split;
    int64_t align; /* n_inter_pad is rounded up to it */
    bool have_bias;
} mpad_plan_request;

/* Columns are columns of the checkpoint's intermediate size: rows of each half of w13, columns of
 * w2. An empty rank has start == stop, n_inter == 0 and zero-sized weights. */
typedef struct mpad_plan {
    int64_t n_inter;     /* stop - start */
    int64_t n_inter_pad; /* rounded up to align, and to whole bytes of a 4-bit kind */
    int64_t start, stop; /* this rank's columns */
    int64_t expert_start, expert_stop;
    mpad_shape w13, w2, w13_scale, w2_scale, w13_bias, w2_bias;
    int64_t block_n, block_k; /* fp8_block, int4_group: as asked; mxfp8, mxfp4: 1, 32; else 1, 1 */
    int64_t n_pack;           /* logical elements of one stored element along a row: 1 or 2 */
    int64_t scale_phase;      /* fp8_block: the scales held begin at column start - scale_phase */
    int64_t w13_scale_start;  /* first row, per half, held of the checkpoint's w13 scale */
    int64_t w2_scale_start;   /* first column held of the checkpoint's w2 scale */
    mpad_dtype storage_dtype; /* w13, w2 */
    mpad_dtype scale_dtype;   /* w13_scale, w2_scale; F32 where there is none */
    mpad_dtype bias_dtype;    /* w13_bias, w2_bias: the activation dtype */
    int64_t nbytes;           /* all tensors as allocated */
    int64_t pad_nbytes;       /* of which hold nothing of the checkpoint: no kernel reads them */
} mpad_plan;

/* Fails with MPAD_VALUE naming the argument, or MPAD_UNSUPPORTED naming the split rule. A split is
 * refused whatever tp_rank and ep_rank are, so that all ranks of a job get a plan or none does. */
mpad_code mpad_plan_make(const mpad_plan_request *request, mpad_plan *plan, mpad_status *status);

/* Above it the sizes below could overflow; callers refuse it. */
#define MPAD_WEIGHT_SIZES_MAX ((int64_t)1 << 60)

/* SGLang's get_moe_weight_sizes, value for value, as of a torch with float4 (SGLang 0.5.23), for
 * inter_dim in [0, MPAD_WEIGHT_SIZES_MAX]. */
void mpad_moe_weight_sizes(int64_t inter_dim, bool is_concat, bool is_packed, bool is_aiter_moe,
                           int64_t *w13_up_dim, int64_t *w2_down_dim, bool *is_padded);

#endif
