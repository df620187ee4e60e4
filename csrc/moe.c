/* Level 3: see moe.h.
 *
 * The order of the checks: kinds of numbers (types), number of dimensions, sizes against each
 * other, layout in memory, overlaps. A message shows the shape expected with the sizes it comes
 * from. */
#include "moe.h"
#include "plan.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { TEXT_BYTES = 160 };

static const char *const TENSOR_NAMES[] = {
#define X(NAME, text) [MPAD_TENSOR_##NAME] = text,
    MPAD_TENSOR_LIST(X)
#undef X
};

static const struct {
    const char *name;
    bool may_be_gated, may_be_ungated;
} ACTS[] = {
#define X(NAME, text, gated, ungated) [MPAD_ACT_##NAME] = {text, gated, ungated},
    MPAD_ACT_LIST(X)
#undef X
};

static const char *const INPUTS[] = {
#define X(NAME, text) [MPAD_INPUT_##NAME] = text,
    MPAD_INPUT_LIST(X)
#undef X
};

const char *mpad_tensor_name(mpad_tensor tensor)
{
    return TENSOR_NAMES[tensor];
}

/* Types. */

static bool is_float(mpad_dtype dtype)
{
    return dtype == MPAD_DTYPE_F32 || dtype == MPAD_DTYPE_BF16 || dtype == MPAD_DTYPE_F16;
}

static bool is_index(mpad_dtype dtype)
{
    return dtype == MPAD_DTYPE_I32 || dtype == MPAD_DTYPE_I64;
}

static mpad_code check_float(const mpad_moe_args *args, mpad_tensor tensor, mpad_status *status)
{
    const mpad_view *view = &args->view[tensor];
    MPAD_REQUIRE(!args->have[tensor] || is_float(view->dtype), status, MPAD_TYPE,
                 "%s: expected dtype f32, bf16 or f16, got %s; convert it with .astype or .to",
                 TENSOR_NAMES[tensor], mpad_view_dtype_name(view));
    return MPAD_OK;
}

static mpad_code check_index(const mpad_moe_args *args, mpad_tensor tensor, mpad_status *status)
{
    const mpad_view *view = &args->view[tensor];
    MPAD_REQUIRE(!args->have[tensor] || is_index(view->dtype), status, MPAD_TYPE,
                 "%s: expected dtype i32 or i64, got %s; convert it with .astype or .to",
                 TENSOR_NAMES[tensor], mpad_view_dtype_name(view));
    return MPAD_OK;
}

static mpad_code check_same_dtype(const mpad_moe_args *args, mpad_tensor tensor,
                                  mpad_status *status)
{
    const mpad_view *view = &args->view[tensor], *hidden = &args->view[MPAD_TENSOR_HIDDEN_STATES];
    MPAD_REQUIRE(view->dtype == hidden->dtype, status, MPAD_TYPE,
                 "%s: expected dtype %s, that of hidden_states, got %s; convert one of them",
                 TENSOR_NAMES[tensor], mpad_view_dtype_name(hidden), mpad_view_dtype_name(view));
    return MPAD_OK;
}

static bool is_float8(mpad_dtype dtype)
{
    return dtype == MPAD_DTYPE_F8_E4M3FN || dtype == MPAD_DTYPE_F8_E4M3FNUZ ||
           dtype == MPAD_DTYPE_F8_E5M2;
}

/* The dtype of w13 or w2: that of hidden_states, or what their quantisation stores. */
static mpad_code check_weight_dtype(const mpad_moe_args *args, mpad_tensor tensor,
                                    mpad_status *status)
{
    const mpad_kind *kind = mpad_kind_of(args->quant);
    const mpad_view *view = &args->view[tensor], *w13 = &args->view[MPAD_TENSOR_W13];
    if (args->quant == MPAD_QUANT_NONE) {
        bool is_small = is_float8(view->dtype) || view->n_item_bytes == 1;
        MPAD_REQUIRE(!is_small, status, MPAD_TYPE,
                     "%s: expected dtype %s, that of hidden_states, got %s; name the quant of "
                     "quantised weights",
                     TENSOR_NAMES[tensor],
                     mpad_view_dtype_name(&args->view[MPAD_TENSOR_HIDDEN_STATES]),
                     mpad_view_dtype_name(view));
        return check_same_dtype(args, tensor, status);
    }
    const char *name = TENSOR_NAMES[tensor], *got = mpad_view_dtype_name(view);
    if (kind->storage_dtype != MPAD_DTYPE_COUNT)
        MPAD_REQUIRE(view->dtype == kind->storage_dtype, status, MPAD_TYPE,
                     "%s: expected dtype %s for quant=\"%s\", got %s%s", name,
                     mpad_dtype_name(kind->storage_dtype), kind->name, got,
                     view->n_item_bytes == 1 ? "; pass a .view as that dtype if the bytes are such"
                                             : "; pass the stored values and their scales");
    else
        MPAD_REQUIRE(is_float8(view->dtype), status, MPAD_TYPE,
                     "%s: expected dtype f8_e4m3fn, f8_e4m3fnuz or f8_e5m2 for quant=\"%s\", "
                     "got %s%s",
                     name, kind->name, got,
                     view->n_item_bytes == 1
                         ? "; pass .view(ml_dtypes.float8_e4m3fn) or .view(torch.float8_e4m3fn) "
                           "if the bytes are such"
                         : "; pass the stored values and their scales");
    MPAD_REQUIRE(view->dtype == w13->dtype, status, MPAD_TYPE,
                 "%s: expected dtype %s, that of w13, got %s; both are stored alike", name,
                 mpad_view_dtype_name(w13), got);
    return MPAD_OK;
}

static mpad_code check_scale_dtype(const mpad_moe_args *args, mpad_tensor tensor,
                                   mpad_status *status)
{
    const mpad_kind *kind = mpad_kind_of(args->quant);
    const char *name = TENSOR_NAMES[tensor];
    if (args->quant == MPAD_QUANT_NONE) {
        MPAD_REQUIRE(!args->have[tensor], status, MPAD_VALUE,
                     "%s: expected None for quant=\"none\"; name the quant that it belongs to",
                     name);
        return MPAD_OK;
    }
    MPAD_REQUIRE(args->have[tensor], status, MPAD_VALUE,
                 "%s: missing; quant=\"%s\" needs the scales of w13 and w2", name, kind->name);
    const mpad_view *view = &args->view[tensor];
    const char *got = mpad_view_dtype_name(view);
    if (kind->scale_dtype == MPAD_DTYPE_F8_E8M0)
        MPAD_REQUIRE(view->dtype == MPAD_DTYPE_F8_E8M0 || view->dtype == MPAD_DTYPE_U8, status,
                     MPAD_TYPE,
                     "%s: expected dtype f8_e8m0 or u8 (exponents, 2**(byte - 127)) for "
                     "quant=\"%s\", got %s",
                     name, kind->name, got);
    else if (kind->scale_dtype == MPAD_DTYPE_F32)
        MPAD_REQUIRE(view->dtype == MPAD_DTYPE_F32, status, MPAD_TYPE,
                     "%s: expected dtype f32 for quant=\"%s\", got %s; convert it with .astype or "
                     ".to",
                     name, kind->name, got);
    else
        return check_float(args, tensor, status);
    return MPAD_OK;
}

/* A fixed scale of x or h. */
static mpad_code check_input_scale(const mpad_moe_args *args, mpad_tensor tensor,
                                   mpad_status *status)
{
    if (!args->have[tensor])
        return MPAD_OK;
    const mpad_view *view = &args->view[tensor];
    const char *name = TENSOR_NAMES[tensor];
    MPAD_REQUIRE(args->input != MPAD_INPUT_NONE, status, MPAD_VALUE,
                 "%s: expected None for quant_activations=\"none\"; name what it scales", name);
    MPAD_REQUIRE(!input_is_mx(args->input), status, MPAD_VALUE,
                 "%s: expected None for quant_activations=\"%s\", whose scales are of each 32 "
                 "columns; leave it out",
                 name, INPUTS[args->input]);
    MPAD_REQUIRE(view->dtype == MPAD_DTYPE_F32, status, MPAD_TYPE,
                 "%s: expected dtype f32, got %s; convert it with .astype or .to", name,
                 mpad_view_dtype_name(view));
    char got[MPAD_VIEW_SHAPE_TEXT];
    MPAD_REQUIRE(view->n_dim == 1 && view->size[0] == 1, status, MPAD_VALUE,
                 "%s: expected shape (1,), one scale for all rows, got %s; pass the largest, or "
                 "None for a scale per row",
                 name, mpad_view_shape(view, got));
    return MPAD_OK;
}

static mpad_code check_input(const mpad_moe_args *args, mpad_status *status)
{
    const mpad_kind *kind = mpad_kind_of(args->quant);
    const bool is_int8 = args->quant == MPAD_QUANT_INT8_CHANNEL;
    const bool is_fp8 = args->quant == MPAD_QUANT_FP8_TENSOR ||
                        args->quant == MPAD_QUANT_FP8_CHANNEL ||
                        args->quant == MPAD_QUANT_FP8_BLOCK;
    const bool is_mxfp8 = args->quant == MPAD_QUANT_MXFP8;
    const bool is_mxfp4 = args->quant == MPAD_QUANT_MXFP4;
    const bool is_known = args->input == MPAD_INPUT_NONE ||
                          (args->input == MPAD_INPUT_FP8 && is_fp8) ||
                          (args->input == MPAD_INPUT_INT8 && is_int8) ||
                          (args->input == MPAD_INPUT_MXFP8 && (is_mxfp8 || is_mxfp4)) ||
                          (args->input == MPAD_INPUT_MXFP4 && is_mxfp4);
    MPAD_REQUIRE(is_known, status, MPAD_UNSUPPORTED,
                 "quant_activations: no kernel for \"%s\" with quant=\"%s\"; considered: \"fp8\" "
                 "with fp8_tensor, fp8_channel or fp8_block, \"int8\" with int8_channel, "
                 "\"mxfp8\" with mxfp8 or mxfp4, \"mxfp4\" with mxfp4; leave it out for "
                 "activations as they are",
                 INPUTS[args->input], kind->name);
    MPAD_TRY(check_input_scale(args, MPAD_TENSOR_X_SCALE, status));
    return check_input_scale(args, MPAD_TENSOR_H_SCALE, status);
}

static mpad_code check_dtypes(const mpad_moe_args *args, mpad_status *status)
{
    MPAD_TRY(check_float(args, MPAD_TENSOR_HIDDEN_STATES, status));
    MPAD_TRY(check_weight_dtype(args, MPAD_TENSOR_W13, status));
    MPAD_TRY(check_weight_dtype(args, MPAD_TENSOR_W2, status));
    MPAD_TRY(check_scale_dtype(args, MPAD_TENSOR_W13_SCALE, status));
    MPAD_TRY(check_scale_dtype(args, MPAD_TENSOR_W2_SCALE, status));
    MPAD_TRY(check_input(args, status));
    MPAD_TRY(check_float(args, MPAD_TENSOR_TOPK_WEIGHTS, status));
    MPAD_TRY(check_index(args, MPAD_TENSOR_TOPK_IDS, status));
    MPAD_TRY(check_float(args, MPAD_TENSOR_W13_BIAS, status));
    MPAD_TRY(check_float(args, MPAD_TENSOR_W2_BIAS, status));
    MPAD_TRY(check_index(args, MPAD_TENSOR_EXPERT_MAP, status));
    return check_index(args, MPAD_TENSOR_N_TOKEN, status);
}

/* Quantisation. */

enum { K_QUANTUM = 32, DEFAULT_BLOCK = 128 }; /* columns no two of which kernels scale apart */

typedef struct scale_block {
    int64_t n, k;
} scale_block;

/* The block of the call, and whether kernels can follow it. */
static mpad_code settle_scales(const mpad_moe_args *args, scale_block *block, mpad_status *status)
{
    const mpad_kind *kind = mpad_kind_of(args->quant);
    const int64_t n = args->have_block ? args->block_n : DEFAULT_BLOCK;
    const int64_t k = args->have_block ? args->block_k : DEFAULT_BLOCK;
    MPAD_TRY(mpad_settle_block(args->quant, n, k, &block->n, &block->k, status));
    if (kind->scale == MPAD_SCALE_GROUP)
        MPAD_REQUIRE((n == block->n && k == block->k) || (n == DEFAULT_BLOCK && k == n), status,
                     MPAD_VALUE,
                     "block: expected (%" PRId64 ", %" PRId64 ") for quant=\"%s\", got (%" PRId64
                     ", %" PRId64 "); leave it out",
                     block->n, block->k, kind->name, n, k);
    if (kind->scale != MPAD_SCALE_BLOCK) {
        MPAD_REQUIRE(args->scale_phase == 0, status, MPAD_VALUE,
                     "scale_phase: expected 0 for quant=\"%s\", got %" PRId64, kind->name,
                     args->scale_phase);
        return MPAD_OK;
    }
    MPAD_REQUIRE(n % K_QUANTUM == 0 && k % K_QUANTUM == 0, status, MPAD_VALUE,
                 "block: expected multiples of %d for quant=\"%s\", got (%" PRId64 ", %" PRId64
                 "); repeat the scales to such a block, or dequantise and pass quant=\"none\"",
                 K_QUANTUM, kind->name, n, k);
    MPAD_REQUIRE(args->scale_phase % K_QUANTUM == 0 && args->scale_phase < mpad_common_border(n, k),
                 status, MPAD_VALUE,
                 "scale_phase: expected a multiple of %d inside the first block of (%" PRId64
                 ", %" PRId64 "), got %" PRId64 "; moepad.plan gives it as Plan.scale_phase",
                 K_QUANTUM, n, k, args->scale_phase);
    return MPAD_OK;
}

/* Devices. */

static mpad_code check_device(const mpad_moe_args *args, mpad_tensor tensor, mpad_status *status)
{
    const mpad_view *hidden = &args->view[MPAD_TENSOR_HIDDEN_STATES], *view = &args->view[tensor];
    char expected[MPAD_DEVICE_TEXT], got[MPAD_DEVICE_TEXT];
    MPAD_REQUIRE(!args->have[tensor] || mpad_device_is_same(hidden->device, view->device), status,
                 MPAD_VALUE, "%s: expected memory of %s, where hidden_states is, got %s; move it",
                 TENSOR_NAMES[tensor], mpad_device_name(hidden->device, expected),
                 mpad_device_name(view->device, got));
    return MPAD_OK;
}

static mpad_code check_devices(const mpad_moe_args *args, mpad_status *status)
{
    for (mpad_tensor tensor = MPAD_TENSOR_W13; tensor < MPAD_TENSOR_N_TOKEN; tensor++)
        MPAD_TRY(check_device(args, tensor, status));
    bool is_host_count = args->view[MPAD_TENSOR_N_TOKEN].device.vendor == MPAD_HOST;
    return args->have[MPAD_TENSOR_N_TOKEN] && is_host_count
               ? MPAD_OK
               : check_device(args, MPAD_TENSOR_N_TOKEN, status);
}

/* Shapes. */

/* `symbols` names the sizes, "(M, k)". */
static mpad_code check_n_dim(const mpad_moe_args *args, mpad_tensor tensor, int n_dim,
                             const char *symbols, mpad_status *status)
{
    const mpad_view *view = &args->view[tensor];
    char got[MPAD_VIEW_SHAPE_TEXT];
    MPAD_REQUIRE(!args->have[tensor] || view->n_dim == n_dim, status, MPAD_VALUE,
                 "%s: expected %d dimension%s %s, got shape %s", TENSOR_NAMES[tensor], n_dim,
                 n_dim == 1 ? "" : "s", symbols, mpad_view_shape(view, got));
    return MPAD_OK;
}

static mpad_code check_n_dims(const mpad_moe_args *args, mpad_status *status)
{
    MPAD_TRY(check_n_dim(args, MPAD_TENSOR_HIDDEN_STATES, 2, "(M, H)", status));
    MPAD_TRY(check_n_dim(args, MPAD_TENSOR_W13, 3, "(E, rows, H)", status));
    MPAD_TRY(check_n_dim(args, MPAD_TENSOR_W2, 3,
                         mpad_kind_of(args->quant)->n_pack == 1 ? "(E, H, n_inter_pad)"
                                                                : "(E, H, n_inter_pad/2)",
                         status));
    MPAD_TRY(check_n_dim(args, MPAD_TENSOR_TOPK_WEIGHTS, 2, "(M, k)", status));
    MPAD_TRY(check_n_dim(args, MPAD_TENSOR_TOPK_IDS, 2, "(M, k)", status));
    MPAD_TRY(check_n_dim(args, MPAD_TENSOR_W13_BIAS, 2, "(E, rows of w13)", status));
    MPAD_TRY(check_n_dim(args, MPAD_TENSOR_W2_BIAS, 2, "(E, H)", status));
    return check_n_dim(args, MPAD_TENSOR_EXPERT_MAP, 1, "(E_global,)", status);
}

/* Fails with the shape expected, `why`, the shape there is and the way out. */
static mpad_code fail_shape(const mpad_moe_args *args, mpad_tensor tensor, const char *expected,
                            const char *why, const char *way_out, mpad_status *status)
{
    char got[MPAD_VIEW_SHAPE_TEXT];
    return mpad_fail(status, MPAD_VALUE, "%s: expected shape %s%s, got %s%s", TENSOR_NAMES[tensor],
                     expected, why, mpad_view_shape(&args->view[tensor], got), way_out);
}

static mpad_code settle_n_hidden(const mpad_moe_args *args, mpad_moe *moe, mpad_status *status)
{
    const mpad_view *hidden = &args->view[MPAD_TENSOR_HIDDEN_STATES];
    moe->n_hidden_pad = hidden->size[1];
    moe->n_hidden = args->n_hidden == MPAD_MOE_DEFAULT ? moe->n_hidden_pad : args->n_hidden;
    char got[MPAD_VIEW_SHAPE_TEXT];
    MPAD_REQUIRE(moe->n_hidden <= moe->n_hidden_pad, status, MPAD_VALUE,
                 "n_hidden: expected at most %" PRId64
                 " for hidden_states of shape %s, got %" PRId64 "; it is the logical width",
                 moe->n_hidden_pad, mpad_view_shape(hidden, got), moe->n_hidden);
    return MPAD_OK;
}

static mpad_code settle_n_token(const mpad_moe_args *args, mpad_moe *moe, mpad_status *status)
{
    moe->n_token_pad = args->view[MPAD_TENSOR_HIDDEN_STATES].size[0];
    moe->n_token = args->n_token == MPAD_MOE_DEFAULT ? moe->n_token_pad : args->n_token;
    if (args->have[MPAD_TENSOR_N_TOKEN]) {
        const mpad_view *view = &args->view[MPAD_TENSOR_N_TOKEN];
        char got[MPAD_VIEW_SHAPE_TEXT];
        MPAD_REQUIRE(view->n_dim <= MPAD_VIEW_MAX_DIM && mpad_view_count(view) == 1, status,
                     MPAD_VALUE, "n_token: expected an integer or one element, got shape %s",
                     mpad_view_shape(view, got));
        int32_t narrow;
        if (view->device.vendor != MPAD_HOST) {
            moe->n_token = moe->n_token_pad; /* read by the kernels */
        } else if (view->dtype == MPAD_DTYPE_I32) {
            memcpy(&narrow, view->data, sizeof narrow);
            moe->n_token = narrow;
        } else {
            memcpy(&moe->n_token, view->data, sizeof moe->n_token);
        }
    }
    MPAD_REQUIRE(moe->n_token >= 0 && moe->n_token <= moe->n_token_pad, status, MPAD_VALUE,
                 "n_token: expected 0 to %" PRId64 ", the rows of hidden_states, got %" PRId64,
                 moe->n_token_pad, moe->n_token);
    return MPAD_OK;
}

static mpad_code check_w2(const mpad_moe_args *args, mpad_moe *moe, mpad_status *status)
{
    const mpad_view *w13 = &args->view[MPAD_TENSOR_W13], *w2 = &args->view[MPAD_TENSOR_W2];
    if (w2->size[0] != w13->size[0] || w2->size[1] < moe->n_hidden) {
        char expected[TEXT_BYTES];
        snprintf(expected, sizeof expected, "(%" PRId64 ", at least %" PRId64 ", %" PRId64 ")",
                 w13->size[0], moe->n_hidden, w2->size[2]);
        return fail_shape(
            args, MPAD_TENSOR_W2, expected,
            " for the experts of w13 and the width of hidden_states",
            w2->size[0] == w13->size[0] ? "; pass n_hidden if the width is padded" : "", status);
    }
    moe->n_expert = w13->size[0];
    return MPAD_OK;
}

/* What to do where w13's rows do not go with w2's columns. */
static void explain_rows(int64_t n_row, int64_t n_inter_pad, int64_t n_pack, bool is_gated,
                         char *text)
{
    int64_t n_half = is_gated ? n_row / 2 : n_row;
    if (n_half < n_inter_pad && n_half > 0 && (!is_gated || n_row % 2 == 0) && n_half % n_pack == 0)
        snprintf(text, TEXT_BYTES,
                 "; pass w2[:, :, :%" PRId64 "] with n_inter=%" PRId64
                 ", or load with moepad.load_experts",
                 n_half / n_pack, n_half);
    else
        snprintf(text, TEXT_BYTES,
                 "; w13 and w2 must be padded alike: load with moepad.load_experts");
}

static mpad_code settle_gate(const mpad_moe_args *args, mpad_moe *moe, int64_t n_inter_pad,
                             mpad_status *status)
{
    const mpad_view *w13 = &args->view[MPAD_TENSOR_W13];
    const char *act = ACTS[args->act].name;
    int64_t n_pack = mpad_kind_of(args->quant)->n_pack;
    int64_t n_column = (moe->n_hidden + n_pack - 1) / n_pack; /* stored, of w13, at least */
    bool may_be_gated = ACTS[args->act].may_be_gated;
    bool may_be_ungated = ACTS[args->act].may_be_ungated;
    int64_t n_row = w13->size[1];
    bool is_two = n_row % 2 == 0 && n_row / 2 == n_inter_pad, is_one = n_row == n_inter_pad;
    moe->is_gated = is_two && may_be_gated;
    if (moe->is_gated || (is_one && may_be_ungated)) {
        MPAD_REQUIRE(w13->size[2] >= n_column, status, MPAD_VALUE,
                     "w13: expected shape (%" PRId64 ", %" PRId64 ", at least %" PRId64
                     ") for the width of hidden_states, got (%" PRId64 ", %" PRId64 ", %" PRId64
                     "); pass n_hidden if the width is padded",
                     moe->n_expert, n_row, n_column, w13->size[0], n_row, w13->size[2]);
        return MPAD_OK;
    }
    MPAD_REQUIRE(!is_one, status, MPAD_VALUE,
                 "activation: \"%s\" multiplies gate by up and needs a w13 of 2*n_inter_pad rows, "
                 "got %" PRId64 " rows for n_inter_pad=%" PRId64
                 "; without a gate there are \"silu\", \"gelu\" and \"relu2\"",
                 act, n_row, n_inter_pad);
    MPAD_REQUIRE(!is_two, status, MPAD_VALUE,
                 "activation: \"%s\" has no gate and needs a w13 of n_inter_pad rows, got %" PRId64
                 " rows for n_inter_pad=%" PRId64
                 "; with a gate there are \"silu\", \"gelu\", \"gelu_tanh\" and \"swigluoai\"",
                 act, n_row, n_inter_pad);
    char expected[TEXT_BYTES], why[TEXT_BYTES], way_out[TEXT_BYTES];
    snprintf(expected, sizeof expected, "(%" PRId64 ", %" PRId64 ", %" PRId64 ")", moe->n_expert,
             may_be_gated ? 2 * n_inter_pad : n_inter_pad,
             w13->size[2] < n_column ? n_column : w13->size[2]);
    snprintf(why, sizeof why, " for n_inter_pad=%" PRId64, n_inter_pad);
    explain_rows(n_row, n_inter_pad, n_pack, may_be_gated, way_out);
    return fail_shape(args, MPAD_TENSOR_W13, expected, why, way_out, status);
}

static mpad_code settle_n_inter(const mpad_moe_args *args, mpad_moe *moe, int64_t n_inter_pad,
                                mpad_status *status)
{
    moe->n_inter = args->n_inter == MPAD_MOE_DEFAULT ? n_inter_pad : args->n_inter;
    MPAD_REQUIRE(moe->n_inter <= n_inter_pad, status, MPAD_VALUE,
                 "n_inter: expected at most n_inter_pad=%" PRId64
                 ", the last dimension of w2%s, got %" PRId64,
                 n_inter_pad, mpad_kind_of(args->quant)->n_pack == 1 ? "" : " in elements",
                 moe->n_inter);
    return MPAD_OK;
}

/* Sizes that a dimension may have. */
typedef struct range {
    int64_t least, most; /* most INT64_MAX: any */
} range;

static const int64_t ANY = INT64_MAX;

static void append_range(char *text, const char *separator, range sizes)
{
    size_t at = strlen(text);
    if (sizes.least == sizes.most)
        snprintf(text + at, TEXT_BYTES - at, "%s%" PRId64, separator, sizes.least);
    else if (sizes.most == ANY)
        snprintf(text + at, TEXT_BYTES - at, "%sat least %" PRId64, separator, sizes.least);
    else
        snprintf(text + at, TEXT_BYTES - at, "%s%" PRId64 " to %" PRId64, separator, sizes.least,
                 sizes.most);
}

static mpad_code fail_scale_shape(const mpad_moe_args *args, const mpad_moe *moe,
                                  const scale_block *block, mpad_tensor tensor, int n_dim,
                                  const range *dims, mpad_status *status)
{
    const mpad_kind *kind = mpad_kind_of(args->quant);
    char expected[TEXT_BYTES] = "", why[TEXT_BYTES];
    for (int dim = 0; dim < n_dim; dim++)
        append_range(expected, dim ? ", " : "(", dims[dim]);
    strncat(expected, n_dim == 1 ? ",)" : ")", sizeof expected - strlen(expected) - 1);
    size_t at = (size_t)snprintf(why, sizeof why, " for quant=\"%s\"", kind->name);
    if (kind->scale == MPAD_SCALE_BLOCK)
        snprintf(why + at, sizeof why - at,
                 ", block=(%" PRId64 ", %" PRId64 "), n_inter=%" PRId64 ", scale_phase=%" PRId64,
                 block->n, block->k, moe->n_inter, args->scale_phase);
    else if (kind->scale == MPAD_SCALE_GROUP)
        snprintf(why + at, sizeof why - at, ", groups of %" PRId64 ", n_inter=%" PRId64, block->k,
                 moe->n_inter);
    return fail_shape(args, tensor, expected, why,
                      "; scales are padded like their weights: "
                      "moepad.plan gives the shapes",
                      status);
}

/* The shape of w13_scale or w2_scale, w being its weights and n_row, n_column sizes of one half:
 * logical, and as they are in memory. */
static mpad_code check_scale(const mpad_moe_args *args, const mpad_moe *moe,
                             const scale_block *block, mpad_tensor tensor, int n_half, range n_row,
                             range n_column, mpad_status *status)
{
    const mpad_view *view = &args->view[tensor];
    const bool is_w13 = tensor == MPAD_TENSOR_W13_SCALE;
    const int64_t row_phase = is_w13 ? args->scale_phase : 0;
    const int64_t column_phase = is_w13 ? 0 : args->scale_phase;
    range dims[3] = {{moe->n_expert, moe->n_expert}};
    range rows = {n_half * (is_w13 ? n_row.most : n_row.least), n_half * n_row.most};
    int n_dim = 3;
    bool is_paired = true;
    switch (mpad_kind_of(args->quant)->scale) {
    case MPAD_SCALE_TENSOR:
        dims[1] = (range){1, n_half};
        n_dim = view->n_dim == 2 ? 2 : 1;
        break;
    case MPAD_SCALE_ROW:
        dims[1] = rows;
        dims[2] = (range){1, 1};
        n_dim = view->n_dim == 3 ? 3 : 2;
        break;
    case MPAD_SCALE_BLOCK:
        dims[1] = (range){n_half * mpad_count_blocks(row_phase, n_row.least, block->n), ANY};
        dims[2] = (range){mpad_count_blocks(column_phase, n_column.least, block->k), ANY};
        if (is_w13)
            dims[2].most = mpad_count_blocks(0, n_column.most, block->k);
        else
            dims[1].most = mpad_count_blocks(0, n_row.most, block->n);
        is_paired = view->size[1] % n_half == 0;
        break;
    default:
        dims[1] = rows;
        dims[2] = (range){mpad_count_blocks(0, n_column.least, block->k),
                          mpad_count_blocks(0, n_column.most, block->k)};
    }
    bool is_right = view->n_dim == n_dim && is_paired;
    for (int dim = 0; dim < n_dim && is_right; dim++)
        is_right = view->size[dim] >= dims[dim].least && view->size[dim] <= dims[dim].most;
    return is_right ? MPAD_OK : fail_scale_shape(args, moe, block, tensor, n_dim, dims, status);
}

static mpad_code check_scales(const mpad_moe_args *args, const mpad_moe *moe,
                              const scale_block *block, int64_t n_inter_pad, mpad_status *status)
{
    if (args->quant == MPAD_QUANT_NONE)
        return MPAD_OK;
    const mpad_kind *kind = mpad_kind_of(args->quant);
    MPAD_REQUIRE(kind->scale != MPAD_SCALE_BLOCK || !moe->is_gated || !args->is_interleaved, status,
                 MPAD_VALUE,
                 "gate_up: expected \"concat\" for quant=\"%s\", whose blocks span rows, got "
                 "\"interleaved\"; deinterleave the rows of w13",
                 kind->name);
    const range n_inter = {moe->n_inter, n_inter_pad};
    const range w13_column = {moe->n_hidden, args->view[MPAD_TENSOR_W13].size[2] * kind->n_pack};
    const range w2_row = {moe->n_hidden, args->view[MPAD_TENSOR_W2].size[1]};
    MPAD_TRY(check_scale(args, moe, block, MPAD_TENSOR_W13_SCALE, moe->is_gated ? 2 : 1, n_inter,
                         w13_column, status));
    return check_scale(args, moe, block, MPAD_TENSOR_W2_SCALE, 1, w2_row, n_inter, status);
}

static mpad_code check_routing(const mpad_moe_args *args, mpad_moe *moe, mpad_status *status)
{
    const mpad_view *weights = &args->view[MPAD_TENSOR_TOPK_WEIGHTS];
    const mpad_view *ids = &args->view[MPAD_TENSOR_TOPK_IDS];
    moe->n_topk = ids->size[1];
    char expected[TEXT_BYTES];
    snprintf(expected, sizeof expected, "(%" PRId64 ", %" PRId64 ")", moe->n_token_pad,
             moe->n_topk);
    if (ids->size[0] != moe->n_token_pad)
        return fail_shape(args, MPAD_TENSOR_TOPK_IDS, expected,
                          ", one row per row of hidden_states", "", status);
    if (weights->size[0] != moe->n_token_pad || weights->size[1] != moe->n_topk)
        return fail_shape(args, MPAD_TENSOR_TOPK_WEIGHTS, expected, ", that of topk_ids", "",
                          status);
    moe->n_expert_global = args->have[MPAD_TENSOR_EXPERT_MAP]
                               ? args->view[MPAD_TENSOR_EXPERT_MAP].size[0]
                               : moe->n_expert;
    return MPAD_OK;
}

static mpad_code check_biases(const mpad_moe_args *args, const mpad_moe *moe, mpad_status *status)
{
    const mpad_view *w13 = &args->view[MPAD_TENSOR_W13];
    const mpad_view *b13 = &args->view[MPAD_TENSOR_W13_BIAS];
    const mpad_view *b2 = &args->view[MPAD_TENSOR_W2_BIAS];
    char expected[TEXT_BYTES];
    if (args->have[MPAD_TENSOR_W13_BIAS] &&
        (b13->size[0] != moe->n_expert || b13->size[1] != w13->size[1])) {
        snprintf(expected, sizeof expected, "(%" PRId64 ", %" PRId64 ")", moe->n_expert,
                 w13->size[1]);
        return fail_shape(args, MPAD_TENSOR_W13_BIAS, expected, ", experts and rows of w13",
                          "; pad it like w13", status);
    }
    if (args->have[MPAD_TENSOR_W2_BIAS] &&
        (b2->size[0] != moe->n_expert || b2->size[1] < moe->n_hidden)) {
        snprintf(expected, sizeof expected, "(%" PRId64 ", at least %" PRId64 ")", moe->n_expert,
                 moe->n_hidden);
        return fail_shape(args, MPAD_TENSOR_W2_BIAS, expected,
                          " for the experts of w2 and the width of hidden_states", "", status);
    }
    return MPAD_OK;
}

/* Layout in memory. */

static mpad_code check_layout(const mpad_moe_args *args, mpad_tensor tensor, mpad_status *status)
{
    const mpad_view *view = &args->view[tensor];
    if (!args->have[tensor] || mpad_view_count(view) == 0)
        return MPAD_OK;
    MPAD_REQUIRE(mpad_view_is_aligned(view), status, MPAD_VALUE,
                 "%s: expected elements aligned to their %" PRId64
                 " bytes, got address %p; pass a copy",
                 TENSOR_NAMES[tensor], view->n_item_bytes, (void *)view->data);
    int last = view->n_dim - 1;
    MPAD_REQUIRE(view->size[last] == 1 || view->stride[last] == view->n_item_bytes, status,
                 MPAD_VALUE,
                 "%s: expected a contiguous last dimension, got a stride of %" PRId64
                 " bytes for elements of %" PRId64
                 "; pass it through .contiguous() (torch) or np.ascontiguousarray",
                 TENSOR_NAMES[tensor], view->stride[last], view->n_item_bytes);
    return MPAD_OK;
}

static int64_t ld(const mpad_view *view, int dim)
{
    /* Where a dimension has no second element its stride means nothing, and may be anything. */
    return view->size[dim] > 1 ? view->stride[dim] / view->n_item_bytes : 0;
}

static void fill_weights(const mpad_moe_args *args, mpad_moe *moe, int64_t n_inter_pad)
{
    const mpad_view *w13 = &args->view[MPAD_TENSOR_W13], *w2 = &args->view[MPAD_TENSOR_W2];
    bool is_interleaved = moe->is_gated && args->is_interleaved;
    int64_t n_step = is_interleaved ? 2 : 1, up_rows = is_interleaved ? 1 : n_inter_pad;

    moe->w13 = w13->data;
    moe->w13_ld_expert = ld(w13, 0);
    moe->w13_ld_row = n_step * ld(w13, 1);
    moe->w13_up_offset = up_rows * ld(w13, 1);
    moe->w2 = w2->data;
    moe->w2_ld_expert = ld(w2, 0);
    moe->w2_ld_row = ld(w2, 1);

    if (args->have[MPAD_TENSOR_W13_BIAS]) {
        const mpad_view *bias = &args->view[MPAD_TENSOR_W13_BIAS];
        moe->w13_bias = bias->data;
        moe->w13_bias_dtype = bias->dtype;
        moe->w13_bias_ld_expert = ld(bias, 0);
        moe->w13_bias_ld_row = n_step;
        moe->w13_bias_up_offset = up_rows;
    }
    if (args->have[MPAD_TENSOR_W2_BIAS]) {
        const mpad_view *bias = &args->view[MPAD_TENSOR_W2_BIAS];
        moe->w2_bias = bias->data;
        moe->w2_bias_dtype = bias->dtype;
        moe->w2_bias_ld_expert = ld(bias, 0);
    }
}

/* Strides of a tensor of scales; of gated w13, n_inter_pad rows apart, or interleaved. A tensor of
 * one column keeps its column stride: how sums are made must not depend on what the pad adds. */
static mpad_scale scale_of(const mpad_moe_args *args, const scale_block *block, mpad_tensor tensor,
                           bool is_interleaved, int64_t up_rows)
{
    const mpad_view *view = &args->view[tensor];
    mpad_scale scale = {.data = view->data,
                        .dtype = view->dtype == MPAD_DTYPE_U8 ? MPAD_DTYPE_F8_E8M0 : view->dtype,
                        .ld_expert = ld(view, 0),
                        .block_row = block->n,
                        .block_column = block->k};
    const int64_t row = view->n_dim > 1 ? ld(view, 1) : 0;
    switch (mpad_kind_of(args->quant)->scale) {
    case MPAD_SCALE_TENSOR:
        scale.up_offset = row;
        break;
    case MPAD_SCALE_BLOCK:
        scale.ld_row = row;
        scale.ld_column = 1;
        scale.up_offset = view->size[1] / 2 * row;
        break;
    case MPAD_SCALE_GROUP:
        scale.ld_column = 1;
        /* fall through */
    default:
        scale.ld_row = (is_interleaved ? 2 : 1) * row;
        scale.up_offset = up_rows * row;
    }
    return scale;
}

static void fill_scales(const mpad_moe_args *args, const scale_block *block, mpad_moe *moe,
                        int64_t n_inter_pad)
{
    if (args->quant == MPAD_QUANT_NONE)
        return;
    moe->input = args->input;
    if (args->have[MPAD_TENSOR_X_SCALE])
        moe->x_scale = (const float *)args->view[MPAD_TENSOR_X_SCALE].data;
    if (args->have[MPAD_TENSOR_H_SCALE])
        moe->h_scale = (const float *)args->view[MPAD_TENSOR_H_SCALE].data;
    bool is_interleaved = moe->is_gated && args->is_interleaved;
    moe->w13_scale = scale_of(args, block, MPAD_TENSOR_W13_SCALE, is_interleaved,
                              is_interleaved ? 1 : n_inter_pad);
    moe->w2_scale = scale_of(args, block, MPAD_TENSOR_W2_SCALE, false, 0);
    moe->w13_scale.row_phase = moe->w2_scale.column_phase = args->scale_phase;
}

static void fill_tokens(const mpad_moe_args *args, mpad_moe *moe)
{
    const mpad_view *hidden = &args->view[MPAD_TENSOR_HIDDEN_STATES];
    const mpad_view *weights = &args->view[MPAD_TENSOR_TOPK_WEIGHTS];
    const mpad_view *ids = &args->view[MPAD_TENSOR_TOPK_IDS];
    moe->dtype = hidden->dtype;
    moe->hidden = hidden->data;
    moe->ld_hidden = ld(hidden, 0);
    moe->topk_weights = weights->data;
    moe->topk_weights_dtype = weights->dtype;
    moe->ld_topk_weights = ld(weights, 0);
    moe->topk_ids = ids->data;
    moe->topk_ids_dtype = ids->dtype;
    moe->ld_topk_ids = ld(ids, 0);
    if (args->have[MPAD_TENSOR_EXPERT_MAP]) {
        moe->expert_map = args->view[MPAD_TENSOR_EXPERT_MAP].data;
        moe->expert_map_dtype = args->view[MPAD_TENSOR_EXPERT_MAP].dtype;
    }
}

mpad_code mpad_moe_check(const mpad_moe_args *args, mpad_moe *moe, mpad_status *status)
{
    scale_block block;
    MPAD_TRY(settle_scales(args, &block, status));
    MPAD_TRY(check_dtypes(args, status));
    MPAD_TRY(check_devices(args, status));
    MPAD_TRY(check_n_dims(args, status));
    memset(moe, 0, sizeof *moe);
    int64_t n_inter_pad = args->view[MPAD_TENSOR_W2].size[2] * mpad_kind_of(args->quant)->n_pack;
    MPAD_TRY(settle_n_hidden(args, moe, status));
    MPAD_TRY(settle_n_token(args, moe, status));
    MPAD_TRY(check_w2(args, moe, status));
    MPAD_TRY(settle_gate(args, moe, n_inter_pad, status));
    MPAD_TRY(settle_n_inter(args, moe, n_inter_pad, status));
    MPAD_TRY(check_scales(args, moe, &block, n_inter_pad, status));
    MPAD_TRY(check_routing(args, moe, status));
    MPAD_TRY(check_biases(args, moe, status));
    for (mpad_tensor tensor = 0; tensor < MPAD_TENSOR_N_TOKEN; tensor++)
        MPAD_TRY(check_layout(args, tensor, status));
    moe->act = args->act;
    moe->is_weight_on_input = args->is_weight_on_input;
    moe->routed_scaling = args->routed_scaling;
    moe->swiglu_alpha = args->swiglu_alpha;
    moe->swiglu_limit = args->swiglu_limit;
    moe->quant = args->quant;
    moe->weight_dtype = args->view[MPAD_TENSOR_W13].dtype;
    fill_weights(args, moe, n_inter_pad);
    fill_scales(args, &block, moe, n_inter_pad);
    fill_tokens(args, moe);
    return MPAD_OK;
}

/* out may be hidden_states, element for element; nothing else may be written to. */
static mpad_code check_overlaps(const mpad_moe_args *args, mpad_tensor written, mpad_status *status)
{
    const mpad_view *view = &args->view[written];
    for (mpad_tensor tensor = 0; tensor < written; tensor++) {
        const mpad_view *other = &args->view[tensor];
        if (!args->have[tensor] || !mpad_view_overlaps(view, other))
            continue;
        bool is_hidden = written == MPAD_TENSOR_OUT && tensor == MPAD_TENSOR_HIDDEN_STATES;
        bool is_same = is_hidden && view->data == other->data && ld(view, 0) == ld(other, 0);
        MPAD_REQUIRE(is_same, status, MPAD_VALUE, "%s: shares memory with %s%s; pass another array",
                     TENSOR_NAMES[written], TENSOR_NAMES[tensor],
                     is_hidden ? ", without being the same rows" : "");
    }
    return MPAD_OK;
}

mpad_code mpad_moe_bind_out(const mpad_moe_args *args, mpad_moe *moe, mpad_status *status)
{
    const mpad_view *out = &args->view[MPAD_TENSOR_OUT];
    MPAD_TRY(check_same_dtype(args, MPAD_TENSOR_OUT, status));
    MPAD_TRY(check_device(args, MPAD_TENSOR_OUT, status));
    MPAD_TRY(check_n_dim(args, MPAD_TENSOR_OUT, 2, "(M, H)", status));
    if (out->size[0] != moe->n_token_pad || out->size[1] != moe->n_hidden_pad) {
        char expected[MPAD_VIEW_SHAPE_TEXT];
        return fail_shape(args, MPAD_TENSOR_OUT,
                          mpad_view_shape(&args->view[MPAD_TENSOR_HIDDEN_STATES], expected),
                          ", that of hidden_states", "", status);
    }
    MPAD_TRY(check_layout(args, MPAD_TENSOR_OUT, status));
    MPAD_REQUIRE(!mpad_view_overlaps_itself(out), status, MPAD_VALUE,
                 "out: expected rows apart from each other, got a row stride of %" PRId64
                 " bytes for rows of %" PRId64 "; pass an array that is not broadcast",
                 out->stride[0], out->size[1] * out->n_item_bytes);
    MPAD_TRY(check_overlaps(args, MPAD_TENSOR_OUT, status));
    moe->out = out->data;
    moe->ld_out = ld(out, 0);
    return MPAD_OK;
}

mpad_code mpad_moe_check_workspace(const mpad_moe_args *args, int64_t n_bytes, int n_align,
                                   mpad_status *status)
{
    const mpad_view *view = &args->view[MPAD_TENSOR_WORKSPACE];
    if (!args->have[MPAD_TENSOR_WORKSPACE])
        return MPAD_OK;
    MPAD_TRY(check_device(args, MPAD_TENSOR_WORKSPACE, status));
    char got[MPAD_VIEW_SHAPE_TEXT];
    MPAD_REQUIRE(view->n_dim <= MPAD_VIEW_MAX_DIM && mpad_view_is_contiguous(view), status,
                 MPAD_VALUE, "workspace: expected contiguous memory, got shape %s with gaps",
                 mpad_view_shape(view, got));
    int64_t n_got = mpad_view_count(view) * view->n_item_bytes;
    MPAD_REQUIRE(n_got >= n_bytes, status, MPAD_VALUE,
                 "workspace: expected at least %" PRId64 " bytes, got %" PRId64
                 "; moepad.workspace_nbytes says how many a call needs",
                 n_bytes, n_got);
    MPAD_REQUIRE(n_got == 0 || (uintptr_t)view->data % (uintptr_t)n_align == 0, status, MPAD_VALUE,
                 "workspace: expected an address aligned to %d bytes, got %p; slice a larger one",
                 n_align, (void *)view->data);
    return check_overlaps(args, MPAD_TENSOR_WORKSPACE, status);
}
