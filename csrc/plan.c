/* Level 2: see plan.h. Pure functions of integers: no allocation, no environment, no state.
 *
 * The order of mpad_plan_make: check the request, settle block and dtypes, cut the columns, round
 * up, derive every shape from the rounded size, count bytes. Products go through `multiply`, which
 * notes an overflow and saturates, so that one check at the end covers all of them. */
#include "plan.h"

#include <inttypes.h>

/* Columns that kernels step by: one step must not meet two scale blocks. */
enum { CUT_QUANTUM = 32 };
/* Elements that share a scale in the OCP microscaling formats (MX specification 1.0). */
enum { MX_GROUP = 32 };
/* What SGLang rounds w2's stored columns up to for AITER (AITER_PADDING_SIZE). */
enum { AITER_PADDING = 128 };

#define AS_ASKED MPAD_DTYPE_COUNT

static const mpad_kind KINDS[] = {
    [MPAD_QUANT_NONE] = {"none", MPAD_SCALE_NONE, 1, AS_ASKED, MPAD_DTYPE_F32},
    [MPAD_QUANT_FP8_TENSOR] = {"fp8_tensor", MPAD_SCALE_TENSOR, 1, AS_ASKED, MPAD_DTYPE_F32},
    [MPAD_QUANT_FP8_CHANNEL] = {"fp8_channel", MPAD_SCALE_ROW, 1, AS_ASKED, MPAD_DTYPE_F32},
    [MPAD_QUANT_FP8_BLOCK] = {"fp8_block", MPAD_SCALE_BLOCK, 1, AS_ASKED, MPAD_DTYPE_F32},
    [MPAD_QUANT_MXFP8] = {"mxfp8", MPAD_SCALE_GROUP, 1, MPAD_DTYPE_F8_E4M3FN, MPAD_DTYPE_F8_E8M0},
    [MPAD_QUANT_MXFP4] = {"mxfp4", MPAD_SCALE_GROUP, 2, MPAD_DTYPE_U8, MPAD_DTYPE_F8_E8M0},
    [MPAD_QUANT_INT8_CHANNEL] = {"int8_channel", MPAD_SCALE_ROW, 1, MPAD_DTYPE_I8, MPAD_DTYPE_F32},
    [MPAD_QUANT_INT4_GROUP] = {"int4_group", MPAD_SCALE_GROUP, 2, MPAD_DTYPE_U8, AS_ASKED},
};
_Static_assert(sizeof KINDS / sizeof *KINDS == MPAD_QUANT_COUNT, "one row per quantisation kind");

const mpad_kind *mpad_kind_of(mpad_quant quant)
{
    return &KINDS[quant];
}

static const struct {
    const char *name;
    int64_t n_bits;
} DTYPES[] = {
#define X(NAME, text, bits, code) [MPAD_DTYPE_##NAME] = {text, bits},
    MPAD_DTYPE_LIST(X)
#undef X
};

/* Saturates and notes it in *is_over. */
static int64_t multiply(int64_t a, int64_t b, bool *is_over)
{
    int64_t product;
    if (__builtin_mul_overflow(a, b, &product)) {
        *is_over = true;
        return INT64_MAX;
    }
    return product;
}

static int64_t divide_up(int64_t a, int64_t b)
{
    return a / b + (a % b != 0);
}

int64_t mpad_count_blocks(int64_t phase, int64_t n, int64_t block)
{
    return n ? divide_up(phase + n, block) : 0;
}

static int64_t round_up(int64_t a, int64_t b, bool *is_over)
{
    return multiply(divide_up(a, b), b, is_over);
}

/* Least common multiple, INT64_MAX where it does not fit: every size counted here is below that. */
static int64_t common_multiple(int64_t a, int64_t b)
{
    int64_t x = a, y = b;
    while (y != 0) {
        int64_t rest = x % y;
        x = y;
        y = rest;
    }
    bool is_over = false;
    return multiply(a / x, b, &is_over);
}

int64_t mpad_common_border(int64_t block_n, int64_t block_k)
{
    return common_multiple(block_n, block_k);
}

static mpad_code check_at_least(const char *name, int64_t value, int64_t least, mpad_status *status)
{
    MPAD_REQUIRE(value >= least, status, MPAD_VALUE,
                 "%s: expected an integer of at least %" PRId64 ", got %" PRId64, name, least,
                 value);
    return MPAD_OK;
}

static mpad_code check_rank(const char *what, int64_t rank, int64_t size, mpad_status *status)
{
    MPAD_REQUIRE(rank >= 0 && rank < size, status, MPAD_VALUE,
                 "%s_rank: expected 0 to %" PRId64 " for %s_size=%" PRId64 ", got %" PRId64
                 "; ranks count from 0",
                 what, size - 1, what, size, rank);
    return MPAD_OK;
}

static mpad_code check_sizes(const mpad_plan_request *request, mpad_status *status)
{
    MPAD_TRY(check_at_least("n_hidden", request->n_hidden, 1, status));
    MPAD_TRY(check_at_least("n_inter", request->n_inter, 0, status));
    MPAD_TRY(check_at_least("n_expert", request->n_expert, 1, status));
    MPAD_TRY(check_at_least("tp_size", request->tp_size, 1, status));
    MPAD_TRY(check_rank("tp", request->tp_rank, request->tp_size, status));
    MPAD_TRY(check_at_least("ep_size", request->ep_size, 1, status));
    MPAD_TRY(check_rank("ep", request->ep_rank, request->ep_size, status));
    return check_at_least("align", request->align, 1, status);
}

mpad_code mpad_settle_block(mpad_quant quant, int64_t asked_n, int64_t asked_k, int64_t *block_n,
                            int64_t *block_k, mpad_status *status)
{
    *block_n = 1;
    *block_k = 1;
    switch (quant) {
    case MPAD_QUANT_FP8_BLOCK:
        MPAD_REQUIRE(asked_n >= 1 && asked_k >= 1, status, MPAD_VALUE,
                     "block: expected two positive integers (rows, columns) for "
                     "quant=\"fp8_block\", got (%" PRId64 ", %" PRId64 ")",
                     asked_n, asked_k);
        *block_n = asked_n;
        *block_k = asked_k;
        break;
    case MPAD_QUANT_INT4_GROUP:
        MPAD_REQUIRE(asked_n == 1 && (asked_k == 32 || asked_k == 64 || asked_k == 128), status,
                     MPAD_VALUE,
                     "block: expected (1, group) with group 32, 64 or 128 for "
                     "quant=\"int4_group\", got (%" PRId64 ", %" PRId64
                     "); pass the checkpoint's group size, e.g. block=(1, 128)",
                     asked_n, asked_k);
        *block_k = asked_k;
        break;
    case MPAD_QUANT_MXFP8:
    case MPAD_QUANT_MXFP4:
        *block_k = MX_GROUP;
        break;
    default:
        break;
    }
    return MPAD_OK;
}

static mpad_code settle_dtypes(const mpad_plan_request *request, mpad_plan *plan,
                               mpad_status *status)
{
    mpad_dtype dtype = request->dtype;
    const char *kind = KINDS[request->quant].name;
    bool is_float = dtype == MPAD_DTYPE_F32 || dtype == MPAD_DTYPE_BF16 || dtype == MPAD_DTYPE_F16;
    bool is_fp8_kind = request->quant == MPAD_QUANT_FP8_TENSOR ||
                       request->quant == MPAD_QUANT_FP8_CHANNEL ||
                       request->quant == MPAD_QUANT_FP8_BLOCK;
    bool is_flavour =
        dtype == MPAD_DTYPE_F8_E4M3FN ||
        (is_fp8_kind && (dtype == MPAD_DTYPE_F8_E4M3FNUZ || dtype == MPAD_DTYPE_F8_E5M2));
    if (is_fp8_kind)
        MPAD_REQUIRE(is_float || is_flavour, status, MPAD_VALUE,
                     "dtype: expected \"f8_e4m3fn\", \"f8_e4m3fnuz\" or \"f8_e5m2\" (the weights), "
                     "or \"bf16\", \"f16\" or \"f32\" (the activations; the weights are then "
                     "\"f8_e4m3fn\") for quant=\"%s\", got \"%s\"",
                     kind, DTYPES[dtype].name);
    else if (request->quant == MPAD_QUANT_MXFP8)
        MPAD_REQUIRE(is_float || is_flavour, status, MPAD_VALUE,
                     "dtype: expected \"f8_e4m3fn\" (the weights), or \"bf16\", \"f16\" or "
                     "\"f32\" (the activations) for quant=\"%s\", got \"%s\"",
                     kind, DTYPES[dtype].name);
    else
        MPAD_REQUIRE(is_float, status, MPAD_VALUE,
                     "dtype: expected \"bf16\", \"f16\" or \"f32\" for quant=\"%s\", got \"%s\"%s",
                     kind, DTYPES[dtype].name,
                     request->quant == MPAD_QUANT_NONE ? "; 8-bit weights need a quant" : "");

    plan->storage_dtype = KINDS[request->quant].storage_dtype;
    if (plan->storage_dtype == AS_ASKED)
        plan->storage_dtype = is_fp8_kind && is_float ? MPAD_DTYPE_F8_E4M3FN : dtype;
    plan->bias_dtype = is_float ? dtype : MPAD_DTYPE_BF16;
    plan->scale_dtype = KINDS[request->quant].scale_dtype;
    if (plan->scale_dtype == AS_ASKED)
        plan->scale_dtype = dtype;
    plan->n_pack = KINDS[request->quant].n_pack;
    return MPAD_OK;
}

/* Share of `rank` of n items in whole units: as even as they go, the first ranks one unit more. */
static void cut_even(int64_t n, int64_t unit, int64_t size, int64_t rank, int64_t *start,
                     int64_t *stop)
{
    int64_t n_unit = divide_up(n, unit), n_each = n_unit / size, n_extra = n_unit % size;
    int64_t first = rank * n_each + (rank < n_extra ? rank : n_extra);
    int64_t last = first + n_each + (rank < n_extra);
    *start = first < n_unit ? first * unit : n;
    *stop = last < n_unit ? last * unit : n;
}

/* SGLang's rule: every rank strides by the padded size, so the last ranks may have none. */
static mpad_code cut_padded(const mpad_plan_request *request, mpad_plan *plan, int64_t border,
                            mpad_status *status)
{
    int64_t n = request->n_inter, rank = request->tp_rank;
    bool is_over = false;
    int64_t stride = round_up(divide_up(n, request->tp_size), request->align, &is_over);
    bool is_block = KINDS[request->quant].scale == MPAD_SCALE_BLOCK;
    MPAD_REQUIRE(stride >= n || stride % border == 0 || (is_block && stride % CUT_QUANTUM == 0),
                 status, MPAD_UNSUPPORTED,
                 "split: \"padded\" with align=%" PRId64 " cuts n_inter=%" PRId64 " every %" PRId64
                 " columns, inside a scale %s of %" PRId64 " columns of quant=\"%s\"%s; pass an "
                 "align that is a multiple of %" PRId64 ", or split=\"true\" or \"block\"",
                 request->align, n, stride, is_block ? "block" : "group", border,
                 KINDS[request->quant].name,
                 is_block ? ", which may be cut at multiples of 32 columns only" : "",
                 is_block && border > CUT_QUANTUM ? CUT_QUANTUM : border);
    int64_t n_filled = stride ? divide_up(n, stride) : 0;
    plan->start = rank < n_filled ? rank * stride : n;
    plan->stop = rank + 1 < n_filled ? (rank + 1) * stride : n;
    return MPAD_OK;
}

/* `border`: columns from one common border of w13's and w2's scale blocks to the next. */
static mpad_code cut_columns(const mpad_plan_request *request, mpad_plan *plan, int64_t border,
                             mpad_status *status)
{
    if (request->split == MPAD_SPLIT_PADDED) {
        MPAD_TRY(cut_padded(request, plan, border, status));
    } else {
        bool is_block = KINDS[request->quant].scale == MPAD_SCALE_BLOCK;
        int64_t unit = is_block && request->split == MPAD_SPLIT_TRUE ? CUT_QUANTUM : border;
        cut_even(request->n_inter, unit, request->tp_size, request->tp_rank, &plan->start,
                 &plan->stop);
    }
    plan->n_inter = plan->stop - plan->start;
    return MPAD_OK;
}

static mpad_shape shape_of(int n_dim, int64_t a, int64_t b, int64_t c)
{
    return (mpad_shape){n_dim, {a, b, c}};
}

/* Every shape for `inter` columns; the scale grid of fp8_block has n_block_n rows per half for them
 * in w13 and n_block_k columns in w2. */
static void derive_shapes(const mpad_plan_request *request, mpad_plan *plan, int64_t inter,
                          int64_t n_block_n, int64_t n_block_k, bool *is_over)
{
    int64_t n_expert = plan->expert_stop - plan->expert_start, n_hidden = request->n_hidden;
    int64_t n_half = request->is_gated ? 2 : 1, n_row = multiply(n_half, inter, is_over);

    plan->w13 = shape_of(3, n_expert, n_row, divide_up(n_hidden, plan->n_pack));
    plan->w2 = shape_of(3, n_expert, n_hidden, divide_up(inter, plan->n_pack));
    switch (KINDS[request->quant].scale) {
    case MPAD_SCALE_NONE:
        plan->w13_scale = plan->w2_scale = shape_of(0, 0, 0, 0);
        break;
    case MPAD_SCALE_TENSOR:
        plan->w13_scale = shape_of(request->is_gated ? 2 : 1, n_expert, n_half, 0);
        plan->w2_scale = shape_of(1, n_expert, 0, 0);
        break;
    case MPAD_SCALE_ROW:
        plan->w13_scale = shape_of(2, n_expert, n_row, 0);
        plan->w2_scale = shape_of(2, n_expert, n_hidden, 0);
        break;
    case MPAD_SCALE_BLOCK:
        plan->w13_scale = shape_of(3, n_expert, multiply(n_half, n_block_n, is_over),
                                   divide_up(n_hidden, plan->block_k));
        plan->w2_scale = shape_of(3, n_expert, divide_up(n_hidden, plan->block_n), n_block_k);
        break;
    case MPAD_SCALE_GROUP:
        plan->w13_scale = shape_of(3, n_expert, n_row, divide_up(n_hidden, plan->block_k));
        plan->w2_scale = shape_of(3, n_expert, n_hidden, divide_up(inter, plan->block_k));
        break;
    }
    plan->w13_bias = shape_of(request->have_bias ? 2 : 0, n_expert, n_row, 0);
    plan->w2_bias = shape_of(request->have_bias ? 2 : 0, n_expert, n_hidden, 0);
}

static int64_t count_bytes(const mpad_plan *plan, bool *is_over)
{
    const struct {
        const mpad_shape *shape;
        mpad_dtype dtype;
    } tensors[] = {
        {&plan->w13, plan->storage_dtype},     {&plan->w2, plan->storage_dtype},
        {&plan->w13_scale, plan->scale_dtype}, {&plan->w2_scale, plan->scale_dtype},
        {&plan->w13_bias, plan->bias_dtype},   {&plan->w2_bias, plan->bias_dtype},
    };
    int64_t n_total = 0;
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        const mpad_shape *shape = tensors[i].shape;
        int64_t n_bytes = shape->n_dim ? DTYPES[tensors[i].dtype].n_bits / 8 : 0;
        for (int dim = 0; dim < shape->n_dim; dim++)
            n_bytes = multiply(n_bytes, shape->size[dim], is_over);
        if (__builtin_add_overflow(n_total, n_bytes, &n_total)) {
            *is_over = true;
            return INT64_MAX;
        }
    }
    return n_total;
}

/* Where this rank's scales begin in the checkpoint's. */
static void place_scales(const mpad_plan_request *request, mpad_plan *plan, int64_t border)
{
    bool is_block = KINDS[request->quant].scale == MPAD_SCALE_BLOCK;
    plan->scale_phase = is_block && plan->n_inter ? plan->start % border : 0;
    int64_t first = plan->start - plan->scale_phase;
    switch (KINDS[request->quant].scale) {
    case MPAD_SCALE_NONE:
    case MPAD_SCALE_TENSOR:
        plan->w13_scale_start = plan->w2_scale_start = 0;
        break;
    case MPAD_SCALE_ROW:
        plan->w13_scale_start = first;
        plan->w2_scale_start = 0;
        break;
    case MPAD_SCALE_BLOCK:
    case MPAD_SCALE_GROUP:
        plan->w13_scale_start = first / plan->block_n;
        plan->w2_scale_start = first / plan->block_k;
        break;
    }
}

/* One phase serves rows and columns: both scale grids begin at the last column that is a border of
 * both. With unequal blocks the finer grid may then begin with blocks that no column touches; they
 * count as pad. */
static mpad_code fill_sizes(const mpad_plan_request *request, mpad_plan *plan, mpad_status *status)
{
    bool is_over = false;
    int64_t n_block_n = mpad_count_blocks(plan->scale_phase, plan->n_inter, plan->block_n);
    int64_t n_block_k = mpad_count_blocks(plan->scale_phase, plan->n_inter, plan->block_k);

    plan->n_inter_pad =
        round_up(plan->n_inter, common_multiple(request->align, plan->n_pack), &is_over);
    derive_shapes(request, plan, plan->n_inter_pad, n_block_n, n_block_k, &is_over);
    plan->nbytes = count_bytes(plan, &is_over);

    mpad_plan held = *plan;
    derive_shapes(request, &held, plan->n_inter, n_block_n - plan->scale_phase / plan->block_n,
                  n_block_k - plan->scale_phase / plan->block_k, &is_over);
    plan->pad_nbytes = plan->nbytes - count_bytes(&held, &is_over);

    MPAD_REQUIRE(!is_over, status, MPAD_VALUE,
                 "n_hidden, n_inter, n_expert, align: expected tensors of less than 2**63 bytes, "
                 "got n_hidden=%" PRId64 ", n_inter=%" PRId64 ", n_expert=%" PRId64
                 ", align=%" PRId64 "; smaller sizes or more ranks fit",
                 request->n_hidden, request->n_inter, request->n_expert, request->align);
    return MPAD_OK;
}

mpad_code mpad_plan_make(const mpad_plan_request *request, mpad_plan *plan, mpad_status *status)
{
    MPAD_TRY(check_sizes(request, status));
    MPAD_TRY(mpad_settle_block(request->quant, request->block_n, request->block_k, &plan->block_n,
                               &plan->block_k, status));
    MPAD_TRY(settle_dtypes(request, plan, status));
    int64_t border = mpad_common_border(plan->block_n, plan->block_k);
    MPAD_TRY(cut_columns(request, plan, border, status));
    cut_even(request->n_expert, 1, request->ep_size, request->ep_rank, &plan->expert_start,
             &plan->expert_stop);
    place_scales(request, plan, border);
    return fill_sizes(request, plan, status);
}

void mpad_moe_weight_sizes(int64_t inter_dim, bool is_concat, bool is_packed, bool is_aiter_moe,
                           int64_t *w13_up_dim, int64_t *w2_down_dim, bool *is_padded)
{
    int64_t n_stored = is_packed ? inter_dim / 2 : inter_dim;
    if (!is_aiter_moe) {
        *w13_up_dim = is_concat ? 2 * inter_dim : inter_dim;
        *w2_down_dim = n_stored;
        *is_padded = false;
        return;
    }
    int64_t n_stored_pad = divide_up(n_stored, AITER_PADDING) * AITER_PADDING;
    /* Rows are not packed: twice the stored columns, with or without a gate half. */
    *w13_up_dim = (is_concat ? 2 * n_stored_pad : inter_dim) * (is_packed ? 2 : 1);
    *w2_down_dim = n_stored_pad;
    *is_padded = n_stored_pad != n_stored;
}
