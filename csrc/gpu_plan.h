/* Level 2: how a fused MoE runs on a GPU: which kernels, in which order, with which grid, LDS and
 * workspace, by a rule on the sizes. Pure functions; needs no GPU, allocates nothing.
 *
 * Host contract. Once per device: mpad_gpu_target_make. Per call:
 *
 *     mpad_gpu_plan_make(&target, &moe, &plan, status);
 *     mpad_gpu_args_make(&plan, &moe, n_token_d, n_token_type, workspace, &args);
 *     for each launch l of plan.launch[0 .. n_launch): launch symbol l.symbol of the device image
 * with grid (l.grid, 1, 1), block (l.block, 1, 1), l.lds_bytes of dynamic LDS and `args` by value
 * as its only argument; with the attribute "programmatic stream serialization" where
 * l.is_dependent.
 *
 * All launches go to one stream in order. The plan depends on sizes, strides and the alignment of
 * the pointers; the bytes of workspace on sizes alone. The workspace starts on 256 bytes and needs
 * no initial content. Symbols with more than 48 KB of LDS need the function attribute for the
 * maximum raised to target.lds_bytes (CUDA). M = 0 gives no launch. The image is that of
 * the call's part, plan.part, and lacks the symbols its target has no use for. */
#ifndef MPAD_GPU_PLAN_H
#define MPAD_GPU_PLAN_H

#include "gpu_args.h"
#include "params.h"
#include "status.h"

typedef struct mpad_gpu_target {
    char name[16]; /* "gfx942", "sm_90a" */
    bool is_amd;
    bool have_wgmma;
    bool have_tile; /* the tile kernels; else few tokens per call only */
    bool have_dependent_launch;
    int wave;               /* threads of a wave */
    int n_multiprocessor;   /* compute units */
    int lds_bytes;          /* a block can have */
    int lds_multiprocessor; /* shared by the blocks of a multiprocessor */
    int token_tile;         /* tokens of a slab: TOKENS of hip/mma.h */
    int lds_pitch;          /* LDS_PITCH of hip/mma.h */
    unsigned bytes;         /* formats multiplied as bytes: BYTES_* of gpu_plan.c */
} mpad_gpu_target;

/* `arch`: the architecture a device image was built for; feature suffixes (":xnack-") are ignored.
 * MPAD_UNSUPPORTED names the known ones. */
mpad_code mpad_gpu_target_make(const char *arch, int n_multiprocessor, mpad_gpu_target *target,
                               mpad_status *status);

enum { MPAD_GPU_MAX_LAUNCH = 7 };

typedef struct mpad_gpu_launch {
    const char *symbol;
    int variant; /* index into mpad_gpu_symbol */
    unsigned grid, block, lds_bytes;
    bool is_dependent;
} mpad_gpu_launch;

/* Rows of x or of h as codes; see mpad_gpu_codes. n_lane is 0 where there are none. */
typedef struct mpad_gpu_plan_codes {
    int64_t code, scale, ld; /* byte offsets into the workspace */
    int n_group, group_log2, phase, n_lane;
} mpad_gpu_plan_codes;

typedef struct mpad_gpu_plan {
    const char *regime; /* "decode", "middle", "prefill" */
    int part;           /* whose image has the symbols */
    int n_launch;
    mpad_gpu_launch launch[MPAD_GPU_MAX_LAUNCH];
    int64_t workspace_bytes;
    /* Byte offsets into the workspace; -1: not used. */
    int64_t inter, route, perm, slot, pair_weight, job, n_job, count;
    int64_t ld_inter, ld_route;
    mpad_gpu_plan_codes x, h;
    bool is_code_byte;
    int n_row_job, is_sorted, n_sort_block;
    int n_column_tile_gate_up, n_column_tile_down;
    mpad_gpu_tile_run run_gate_up, run_down; /* n_tile 1 for other kernels */
} mpad_gpu_plan;

/* MPAD_UNSUPPORTED says which size or type has no kernel. */
mpad_code mpad_gpu_plan_make(const mpad_gpu_target *target, const mpad_moe *moe,
                             mpad_gpu_plan *plan, mpad_status *status);

/* Fills the kernels' argument. n_token_d: address, on the device, of the number of rows to compute
 * (its type: MPAD_DTYPE_I32 or I64), or NULL for moe->n_token. */
void mpad_gpu_args_make(const mpad_gpu_plan *plan, const mpad_moe *moe, const void *n_token_d,
                        mpad_dtype n_token_type, void *workspace, mpad_gpu_args *args);

/* Names of all kernels, in the order of variants.def; NULL from the end on. */
const char *mpad_gpu_symbol(int variant);

/* Whether the target's device image of that part holds it. */
bool mpad_gpu_have_symbol(const mpad_gpu_target *target, int part, int variant);

/* "bf16_w8": a part's name for those who compile it; NULL from MPAD_PART_COUNT on. */
const char *mpad_gpu_part_name(int part);

#endif
