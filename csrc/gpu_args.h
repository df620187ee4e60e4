/* Level 0: what the host and the device kernels say to each other. Every kernel of a call takes the
 * one struct mpad_gpu_args by value. Included by hip/ under compilers without a C library, so:
 * plain C types only (int 32 bits, long long and pointers 64 bits, asserted below), no includes.
 *
 * Strides (ld_*) are in elements. Byte offsets into one expert's weights fit 31 bits: the planner
 * refuses larger ones. */
#ifndef MPAD_GPU_ARGS_H
#define MPAD_GPU_ARGS_H

#ifndef MPAD_SHARED_FN
#    define MPAD_SHARED_FN static inline /* the device defines it as an inlined device function */
#endif

/* The parts of the kernels: an element type, the bits of a stored weight, those of the type or
 * fewer, and those of x, or more, where it is rounded to codes; of quantised weights the kernels
 * for few tokens and those for many. Each is an image of its own, so that a first use compiles what
 * it needs. Numbers for the preprocessor; the order is that of mpad_gpu_part_name. */
#define MPAD_PART_BF16 0
#define MPAD_PART_F16 1
#define MPAD_PART_BF16_W8 2
#define MPAD_PART_F16_W8 3
#define MPAD_PART_BF16_W4 4
#define MPAD_PART_F16_W4 5
#define MPAD_PART_BF16_W8_PREFILL 6
#define MPAD_PART_F16_W8_PREFILL 7
#define MPAD_PART_BF16_W4_PREFILL 8
#define MPAD_PART_F16_W4_PREFILL 9
#define MPAD_PART_BF16_W8X8 10
#define MPAD_PART_F16_W8X8 11
#define MPAD_PART_BF16_W4X8 12
#define MPAD_PART_F16_W4X8 13
enum { MPAD_PART_COUNT = 14 };

/* Element codes of arrays whose type is read at run time. */
enum { MPAD_GPU_F32, MPAD_GPU_BF16, MPAD_GPU_F16, MPAD_GPU_I32, MPAD_GPU_I64, MPAD_GPU_E8M0 };

/* Same order as MPAD_ACT_LIST. */
enum { MPAD_GPU_SILU, MPAD_GPU_GELU, MPAD_GPU_GELU_TANH, MPAD_GPU_SWIGLUOAI, MPAD_GPU_RELU2 };

/* What quantised weights are: int8 or value + 8, floats of a format that some target converts, or
 * floats as mpad_gpu_stored_float says, which these are too. */
enum {
    MPAD_GPU_VALUES_INTEGER,
    MPAD_GPU_VALUES_E4M3FN,
    MPAD_GPU_VALUES_E4M3FNUZ,
    MPAD_GPU_VALUES_E5M2,
    MPAD_GPU_VALUES_E2M1,
    MPAD_GPU_VALUES_OTHER,
};

/* One run of rows of one expert: positions [first, first + rows) of the sorted order. */
typedef struct mpad_gpu_job {
    int expert, first, rows, unused;
} mpad_gpu_job;

/* Scales of one weight tensor: mpad_scale of params.h, its blocks as powers of two. */
typedef struct mpad_gpu_scale {
    const void *data; /* 0: the weights are not quantised */
    long long ld_expert;
    int ld_row, ld_column, up_offset;
    int row_log2, column_log2, row_phase, column_phase;
    int type;
} mpad_gpu_scale;

/* How a float8 becomes T (hip/stored.h), for two of them in the halves of a word: its fields
 * move right by `shift` from the top, then times `factor`. A byte b is NaN or infinite where
 * (((b ^ special_xor) & 0x7f) + special_add) & (b | special_keep) has bit 7: `special` is then set.
 */
typedef struct mpad_gpu_stored_float {
    unsigned shift, factor;                          /* factor: of T, twice */
    unsigned special_xor, special_add, special_keep; /* four times */
    unsigned special;                                /* of T, once */
} mpad_gpu_stored_float;

/* Rows of x or of h as they are multiplied where params.h's mpad_input says so: codes, and a scale
 * for each run of columns of a row that share one. Column k's scale is scale[row * n_group +
 * ((phase + k) >> group_log2)]. */
typedef struct mpad_gpu_codes {
    void *code;         /* [n_row, ld] T, or bytes */
    float *scale;       /* [n_row, n_group] */
    const float *fixed; /* the scale of all; 0: scales come from the values */
    long long ld;
    int n_group, group_log2, phase;
    int n_lane, lane_log2; /* threads that make a run's codes */
} mpad_gpu_codes;

/* Column tiles of a job that a block of a warpgroup kernel takes, and whether they share the job's
 * rows of tokens in LDS. */
typedef struct mpad_gpu_tile_run {
    int n_tile, is_token_shared;
} mpad_gpu_tile_run;

typedef struct mpad_gpu_args {
    const void *hidden; /* [n_token, n_hidden] T */
    void *out;          /* [n_token_pad, n_hidden_pad] T; may be hidden */
    const void *w13; /* [n_expert, rows, n_hidden] stored; see mpad_moe for the rows' addresses */
    const void *w2;  /* [n_expert, n_hidden, n_inter] stored */
    const void *w13_bias;     /* [n_expert, rows] or 0 */
    const void *w2_bias;      /* [n_expert, n_hidden] or 0 */
    const void *topk_weights; /* [n_token, n_topk] */
    const void *topk_ids;     /* [n_token, n_topk]; what is no expert is skipped */
    const void *expert_map;   /* [n_expert_global] or 0 */
    const void *n_token_d; /* one integer or 0: rows from it on are not read, their out is zero */

    /* Workspace. Position: index into the pairs (token * n_topk + slot) sorted by expert, stable.
     */
    void *inter; /* [n_pair, ld_inter] T: act(W13 x), by position; float if it becomes codes */
    void *route; /* [n_pair, ld_route] T: weighted slot results, by position; tile regime */
    int *perm;   /* [n_pair]: position to pair */
    int *slot;   /* [n_token, n_topk]: positions of a token's slots, ascending, then -1 */
    float *pair_weight; /* [n_pair]: routed weight by position */
    mpad_gpu_job *job;  /* [max_job] */
    int *n_job;         /* [1] */
    int *count;         /* [n_sort_block, n_expert]; when several blocks sort */

    long long ld_hidden, ld_out;
    long long w13_ld_expert, w2_ld_expert;
    long long w13_bias_ld_expert, w2_bias_ld_expert;
    long long w13_bias_ld_row, w13_bias_up_offset;
    long long ld_topk_weights, ld_topk_ids;
    long long ld_inter, ld_route;

    int w13_ld_row, w13_up_offset, w2_ld_row; /* stored elements: bytes if quantised */
    int w13_bytes, w2_bytes;                  /* of one expert, up to the last logical element */

    int n_token, n_token_pad, n_topk, n_pair;
    int n_expert, n_expert_global;
    int n_hidden, n_hidden_pad, n_inter;

    int act, is_gated, is_weight_on_input;
    float routed_scaling, swiglu_alpha, swiglu_limit;
    int w13_bias_type, w2_bias_type, topk_weights_type, topk_ids_type, expert_map_type;
    int n_token_type;

    mpad_gpu_scale w13_scale, w2_scale;
    mpad_gpu_stored_float stored_float;
    int weight_values;           /* MPAD_GPU_VALUES_... */
    int is_w13_wide, is_w2_wide; /* quantised: rows start on 16 bytes and end with some */

    mpad_gpu_codes x, h;
    float code_largest;      /* of the format of codes; integers where the weights are */
    int code_least_exponent; /* of its normal values */
    int code_mantissa;       /* its bits */
    int is_code_mx;          /* scales are powers of two */
    int is_code_byte;        /* codes as they are; else as T */
    int is_hidden_vector;    /* rows of hidden start on 16 bytes */

    int n_row_job; /* rows of a job at most; a power of two */
    int row_job_log2;
    unsigned topk_reciprocal; /* ceil(2^32 / n_topk); for n_topk = 1 unused */
    int is_sorted;            /* 0: each block of the stream kernels sorts for itself */
    int n_sort_block;         /* blocks of the sort */
    int n_column_tile_gate_up, n_column_tile_down;
    mpad_gpu_tile_run run_gate_up, run_down;
} mpad_gpu_args;

/* Rows of the sum over waves and its columns, of the stream kernels. */
enum { MPAD_STREAM_WAVES = 8, MPAD_STREAM_COLUMNS = 16 };

/* Threads of the sort kernels at most, of the combine kernel, of those that make codes. */
enum { MPAD_ROUTE_THREADS = 1024, MPAD_COMBINE_THREADS = 256, MPAD_CODES_THREADS = 256 };

/* Pairs that a block of the stream kernels sorts for itself at most; that the one block of
 * mpad_route_one sorts at most, two by a thread. */
enum { MPAD_SORT_INLINE_MAX = 512, MPAD_ROUTE_ONE_MAX = 2 * MPAD_ROUTE_THREADS };

/* Bytes of dynamic LDS, and where each part starts. `pitch` is what a lane's row stride is bent to
 * so that the fragment reads of a wave meet each bank once: see hip/mma.h. */
MPAD_SHARED_FN int mpad_lds_round(int n_bytes)
{
    return (n_bytes + 127) / 128 * 128;
}

/* Six words per pair, two per expert and one: struct Sorted of hip/route.h. */
MPAD_SHARED_FN int mpad_lds_sort(int n_pair, int n_expert)
{
    return n_pair > 0 ? mpad_lds_round((6 * n_pair + 2 * n_expert + 1) * 4) : 0;
}

/* Rows have room for what meets 64 bytes of weights of n_bit each. */
MPAD_SHARED_FN int mpad_lds_token_pitch(int n_hidden, int n_bit, int pitch)
{
    int unit = n_bit < 8 ? 256 : 128;
    return (n_hidden * 2 + unit - 1) / unit * unit + pitch;
}

MPAD_SHARED_FN int mpad_lds_gate_up(int n_pair_inline, int n_expert, int n_hidden, int n_row,
                                    int n_bit, int pitch, int n_token_tile)
{
    return mpad_lds_sort(n_pair_inline, n_expert) +
           2 * MPAD_STREAM_WAVES * MPAD_STREAM_COLUMNS * n_token_tile * 4 +
           mpad_lds_round(n_row * mpad_lds_token_pitch(n_hidden, n_bit, pitch));
}

MPAD_SHARED_FN int mpad_lds_down(int n_pair, int n_pair_inline, int n_expert)
{
    return mpad_lds_sort(n_pair_inline, n_expert) + n_pair * MPAD_STREAM_COLUMNS * 4;
}

/* The sort kernels: counts per wave and expert, the experts' first positions and first jobs. */
MPAD_SHARED_FN int mpad_lds_route(int n_wave, int n_expert)
{
    return mpad_lds_round(((n_wave + 2) * n_expert + 1) * 4);
}

/* Stages of a block tile of n_row rows of tokens and 128 of weights, 128 bytes of K each. */
MPAD_SHARED_FN int mpad_lds_tile(int n_row, int n_stage)
{
    return n_stage * (n_row + 128) * 128;
}

/* The same for quantised weights: two stages, each with the scales of two groups of 32 k, and for
 * codes those of the rows of tokens; with bytes as many scales, of four stages. */
MPAD_SHARED_FN int mpad_lds_tile_stored(int n_row, int is_coded)
{
    return 2 * ((n_row + 128) * 128 + 2 * (128 + (is_coded ? n_row : 0)) * 4);
}

/* Of warpgroup kernels: stages of 128 rows of weights, n_byte of each, and of n_row of tokens, 128
 * bytes of each; the scales of two tiles' 128 rows; two stages of weights that are decoded. */
enum { MPAD_LDS_ROW_SCALES = 2 * 128 * 4, MPAD_LDS_DECODED = 2 * 128 * 128 };
MPAD_SHARED_FN int mpad_lds_warpgroup(int n_row, int n_byte, int n_stage, int n_token_stage)
{
    return n_stage * 128 * n_byte + n_token_stage * n_row * 128 + MPAD_LDS_ROW_SCALES +
           (n_byte < 128 ? MPAD_LDS_DECODED : 0);
}

/* Of decoded tiles: stages of n_row rows of tokens, then of 128 rows of weights; a stage is n_group
 * times 64 bytes of a row of weights, of n_bit each. */
MPAD_SHARED_FN int mpad_lds_decoded(int n_row, int n_bit, int n_group, int n_stage,
                                    int n_token_stage)
{
    return n_group * (n_token_stage * n_row * (1024 / n_bit) + n_stage * 128 * 64);
}

/* Largest magnitudes of the waves that make codes. */
MPAD_SHARED_FN int mpad_lds_codes(int wave)
{
    return mpad_lds_round(MPAD_CODES_THREADS / wave * 4);
}

#ifdef __cplusplus
static_assert(sizeof(int) == 4 && sizeof(long long) == 8 && sizeof(void *) == 8, "LP64");
#else
_Static_assert(sizeof(int) == 4 && sizeof(long long) == 8 && sizeof(void *) == 8, "LP64");
#endif

#endif
