/* Level 0: the contract. The nouns every other file speaks in: element types, quantisation kinds,
 * activations, split rules, and the one argument struct of the padded fused MoE.
 *
 * Sizes are counts of logical elements; a size rounded up ends in `_pad`. Strides (`ld_*`) are in
 * elements, byte counts end in `_bytes`. Includes nothing but stdint/stddef/stdbool. */
#ifndef MPAD_PARAMS_H
#define MPAD_PARAMS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* X(NAME, "name", bits of one element, DLPack type code) */
#define MPAD_DTYPE_LIST(X)                                                                         \
    X(F32, "f32", 32, 2)                                                                           \
    X(BF16, "bf16", 16, 4)                                                                         \
    X(F16, "f16", 16, 2)                                                                           \
    X(F8_E4M3FN, "f8_e4m3fn", 8, 10)                                                               \
    X(F8_E4M3FNUZ, "f8_e4m3fnuz", 8, 11)                                                           \
    X(F8_E5M2, "f8_e5m2", 8, 12)                                                                   \
    X(F8_E8M0, "f8_e8m0", 8, 14)                                                                   \
    X(U8, "u8", 8, 1)                                                                              \
    X(I8, "i8", 8, 0)                                                                              \
    X(I32, "i32", 32, 0)                                                                           \
    X(I64, "i64", 64, 0)

typedef enum mpad_dtype {
#define X(NAME, text, bits, code) MPAD_DTYPE_##NAME,
    MPAD_DTYPE_LIST(X)
#undef X
        MPAD_DTYPE_COUNT
} mpad_dtype;

/* X(NAME, "name"): how weights are stored; weight = stored value * scale. */
#define MPAD_QUANT_LIST(X)                                                                         \
    X(NONE, "none")                                                                                \
    X(FP8_TENSOR, "fp8_tensor")                                                                    \
    X(FP8_CHANNEL, "fp8_channel")                                                                  \
    X(FP8_BLOCK, "fp8_block")                                                                      \
    X(MXFP8, "mxfp8")                                                                              \
    X(MXFP4, "mxfp4")                                                                              \
    X(INT8_CHANNEL, "int8_channel")                                                                \
    X(INT4_GROUP, "int4_group")

typedef enum mpad_quant {
#define X(NAME, text) MPAD_QUANT_##NAME,
    MPAD_QUANT_LIST(X)
#undef X
        MPAD_QUANT_COUNT
} mpad_quant;

/* X(NAME, "name"): what x and h are rounded to before they are multiplied. FP8 is e4m3fnuz where
 * the weights are, else e4m3fn. MXFP8 is e4m3fn, MXFP4 e2m1, their scales powers of two. */
#define MPAD_INPUT_LIST(X)                                                                         \
    X(NONE, "none")                                                                                \
    X(FP8, "fp8")                                                                                  \
    X(INT8, "int8")                                                                                \
    X(MXFP8, "mxfp8")                                                                              \
    X(MXFP4, "mxfp4")

typedef enum mpad_input {
#define X(NAME, text) MPAD_INPUT_##NAME,
    MPAD_INPUT_LIST(X)
#undef X
        MPAD_INPUT_COUNT
} mpad_input;

static inline bool input_is_mx(mpad_input input)
{
    return input == MPAD_INPUT_MXFP8 || input == MPAD_INPUT_MXFP4;
}

/* X(NAME, "name", may be gated, may be ungated) */
#define MPAD_ACT_LIST(X)                                                                           \
    X(SILU, "silu", true, true)                                                                    \
    X(GELU, "gelu", true, true)                                                                    \
    X(GELU_TANH, "gelu_tanh", true, false)                                                         \
    X(SWIGLUOAI, "swigluoai", true, false)                                                         \
    X(RELU2, "relu2", false, true)

typedef enum mpad_act {
#define X(NAME, text, gated, ungated) MPAD_ACT_##NAME,
    MPAD_ACT_LIST(X)
#undef X
        MPAD_ACT_COUNT
} mpad_act;

/* X(NAME, "name"): how a checkpoint's intermediate columns are cut over tensor-parallel ranks. */
#define MPAD_SPLIT_LIST(X)                                                                         \
    X(TRUE, "true")                                                                                \
    X(PADDED, "padded")                                                                            \
    X(BLOCK, "block")

typedef enum mpad_split {
#define X(NAME, text) MPAD_SPLIT_##NAME,
    MPAD_SPLIT_LIST(X)
#undef X
        MPAD_SPLIT_COUNT
} mpad_split;

/* Whose memory a tensor is in. The host's pinned memory is the host's. */
typedef enum mpad_vendor { MPAD_HOST, MPAD_AMD, MPAD_NVIDIA, MPAD_VENDOR_COUNT } mpad_vendor;

typedef struct mpad_device {
    mpad_vendor vendor;
    int index; /* 0 for the host */
} mpad_device;

/* Scales of one weight tensor. That of row r of a half, column k of expert e, in logical elements,
 * is data[e*ld_expert + (row_phase + r)/block_row*ld_row + (column_phase +
 * k)/block_column*ld_column], for rows of the up half up_offset further. Only those of logical rows
 * and columns are read. */
typedef struct mpad_scale {
    const void *data; /* NULL: unquantised */
    mpad_dtype dtype; /* F32, BF16, F16, or F8_E8M0: 2^(byte-127), 255 is NaN */
    int64_t ld_expert, ld_row, ld_column, up_offset; /* 0 where one scale serves all */
    int64_t block_row, block_column;                 /* at least 1; columns a multiple of 32 */
    int64_t row_phase, column_phase; /* into the first block; columns a multiple of 32 */
} mpad_scale;

/* One call of the fused MoE: out[m] = scaling * sum_j weight[m,j] * W2_e act(W13_e x[m]), e the
 * expert of slot j. All pointers live in one memory space and are borrowed for the call.
 *
 * Row j of an expert's gate half is w13 + e*w13_ld_expert + j*w13_ld_row; row j of its up half lies
 * w13_up_offset further. Concatenated halves: ld_row = the row stride, up_offset = n_inter_pad *
 * the row stride. Interleaved: ld_row = two row strides, up_offset = one. The biases follow the
 * same rule. Only j in [0, n_inter), the first n_hidden elements of a w13 row and the first n_inter
 * elements of a w2 row are ever addressed: everything else is pad and may hold any bytes.
 *
 * Of quantised weights strides count stored elements. U8 holds two 4-bit values, that of even k in
 * the low half: e2m1 for MXFP4, value + 8 for INT4_GROUP. */
typedef struct mpad_moe {
    int64_t n_token;         /* rows computed */
    int64_t n_token_pad;     /* rows of out; those from n_token on are set to zero */
    int64_t n_topk;          /* slots per token */
    int64_t n_expert;        /* experts held here */
    int64_t n_expert_global; /* range of topk_ids; == n_expert without an expert_map */
    int64_t n_hidden;        /* model width */
    int64_t n_hidden_pad;    /* columns of out; those from n_hidden on are set to zero */
    int64_t n_inter;         /* logical intermediate size on this rank; 0 is legal */

    mpad_dtype dtype; /* hidden and out: F32, BF16 or F16 */
    mpad_quant quant;
    mpad_dtype weight_dtype; /* w13 and w2: dtype; quantised: a float8, I8 or U8 */
    mpad_act act;
    bool is_gated;
    bool is_weight_on_input; /* routed weight scales W13 x instead of the slot's result */
    float routed_scaling;
    float swiglu_alpha; /* SWIGLUOAI: gate * sigmoid(alpha * gate) * (up + 1) */
    float swiglu_limit; /* gate <= limit, |up| <= limit before the activation; INFINITY: no clamp */

    const void *hidden; /* [n_token, n_hidden] dtype */
    int64_t ld_hidden;
    void *out; /* [n_token_pad, n_hidden_pad] dtype; may be hidden */
    int64_t ld_out;

    const void *w13; /* [n_expert, rows, n_hidden] */
    int64_t w13_ld_expert, w13_ld_row, w13_up_offset;
    const void *w2; /* [n_expert, n_hidden, n_inter] */
    int64_t w2_ld_expert, w2_ld_row;
    mpad_scale w13_scale, w2_scale;
    mpad_input input;
    const float *x_scale, *h_scale; /* fixed scales of x and h; NULL: from the values of each row,
                                       or, with scales in blocks, of its columns that share one */

    const void *w13_bias; /* [n_expert, rows] or NULL */
    mpad_dtype w13_bias_dtype;
    int64_t w13_bias_ld_expert, w13_bias_ld_row, w13_bias_up_offset;
    const void *w2_bias; /* [n_expert, n_hidden] or NULL */
    mpad_dtype w2_bias_dtype;
    int64_t w2_bias_ld_expert;

    const void *topk_weights; /* [n_token, n_topk] F32, BF16 or F16 */
    mpad_dtype topk_weights_dtype;
    int64_t ld_topk_weights;
    const void *topk_ids; /* [n_token, n_topk] I32 or I64; -1 skips the slot */
    mpad_dtype topk_ids_dtype;
    int64_t ld_topk_ids;
    const void *expert_map; /* [n_expert_global] I32 or I64, global to local id or -1; or NULL */
    mpad_dtype expert_map_dtype;
} mpad_moe;

/* The format x and h are rounded to: its largest value, and, but for int8, the exponent of its
 * smallest normal value and its bits of mantissa. */
typedef struct mpad_input_format {
    float largest;
    int smallest_exponent, n_mantissa;
    bool is_integer;
} mpad_input_format;

static inline mpad_input_format input_format_of(const mpad_moe *moe)
{
    if (moe->input == MPAD_INPUT_INT8)
        return (mpad_input_format){.largest = 127, .is_integer = true};
    if (moe->input == MPAD_INPUT_MXFP4)
        return (mpad_input_format){.largest = 6, .smallest_exponent = 0, .n_mantissa = 1};
    if (moe->weight_dtype == MPAD_DTYPE_F8_E4M3FNUZ)
        return (mpad_input_format){.largest = 240, .smallest_exponent = -7, .n_mantissa = 3};
    return (mpad_input_format){.largest = 448, .smallest_exponent = -6, .n_mantissa = 3};
}

#endif
