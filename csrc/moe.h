/* Level 3: the arguments of one fused MoE, as views and numbers, checked whole into an mpad_moe.
 * Every rule about shapes, types and layouts of a call is here; it reads no tensor but n_token, and
 * that only where it is in host memory. */
#ifndef MPAD_MOE_H
#define MPAD_MOE_H

#include "params.h"
#include "status.h"
#include "view.h"

/* X(NAME, "argument"): the tensors of a call. */
#define MPAD_TENSOR_LIST(X)                                                                        \
    X(HIDDEN_STATES, "hidden_states")                                                              \
    X(W13, "w13")                                                                                  \
    X(W2, "w2")                                                                                    \
    X(TOPK_WEIGHTS, "topk_weights")                                                                \
    X(TOPK_IDS, "topk_ids")                                                                        \
    X(W13_SCALE, "w13_scale")                                                                      \
    X(W2_SCALE, "w2_scale")                                                                        \
    X(X_SCALE, "x_scale")                                                                          \
    X(H_SCALE, "h_scale")                                                                          \
    X(W13_BIAS, "w13_bias")                                                                        \
    X(W2_BIAS, "w2_bias")                                                                          \
    X(EXPERT_MAP, "expert_map")                                                                    \
    X(N_TOKEN, "n_token")                                                                          \
    X(OUT, "out")                                                                                  \
    X(WORKSPACE, "workspace")

typedef enum mpad_tensor {
#define X(NAME, text) MPAD_TENSOR_##NAME,
    MPAD_TENSOR_LIST(X)
#undef X
        MPAD_TENSOR_COUNT
} mpad_tensor;

enum { MPAD_MOE_DEFAULT = -1, MPAD_WORKSPACE_ALIGN = 64 };

typedef struct mpad_moe_args {
    mpad_view view[MPAD_TENSOR_COUNT]; /* only those with `have` are set */
    bool have[MPAD_TENSOR_COUNT];
    int64_t n_inter, n_hidden, n_token; /* MPAD_MOE_DEFAULT: what the tensors have */
    mpad_act act;
    mpad_quant quant;
    bool have_block;          /* else the block is the kind's own, or (128, 128) */
    int64_t block_n, block_k; /* with have_block */
    int64_t scale_phase;
    mpad_input input;
    bool is_interleaved; /* rows of w13: gate 0, up 0, gate 1, ... */
    bool is_weight_on_input;
    float routed_scaling;
    float swiglu_alpha;
    float swiglu_limit;
} mpad_moe_args;

const char *mpad_tensor_name(mpad_tensor tensor);

/* Checks everything but `out` and `workspace`, and fills all of `moe` but out and ld_out. */
mpad_code mpad_moe_check(const mpad_moe_args *args, mpad_moe *moe, mpad_status *status);

/* Checks the view of `out` against a checked call and puts it into `moe`. */
mpad_code mpad_moe_bind_out(const mpad_moe_args *args, mpad_moe *moe, mpad_status *status);

/* Checks the view of `workspace`, if there is one, against the bytes and alignment the engine
 * needs. */
mpad_code mpad_moe_check_workspace(const mpad_moe_args *args, int64_t n_bytes, int n_align,
                                   mpad_status *status);

#endif
