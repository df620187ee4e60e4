/* Level 4: see cpu.h. Owns the choice of instruction set, the routing of a call's slots to experts,
 * the workspace, and the order of the work; kernels do the arithmetic.
 *
 * A call has two stages. The first makes h = act(W13 x) for every pair (token, slot), sorted by
 * expert; a unit of its work is some of h's columns of one expert. The second makes out; a unit is
 * some of out's columns for a block of tokens, and adds up the pairs of each token in ascending
 * order of expert. Where activations are quantised, whole rows of h are between the two. Every sum
 * is made by one thread in one order, so threads, which take units of any size as they come, cannot
 * change the result. */
#include "cpu.h"
#include "cpu_kernels.h"
#include "cpu_scalar.h"
#include "pool.h"

#include <fenv.h>
#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- instruction sets ---- */

typedef struct isa {
    const char *name;
    const mpad_cpu_kernels *f32, *bf16, *f16;
    const mpad_cpu_isa_kernels *quantised; /* what has the kernels for quantised weights */
    const mpad_cpu_pair_kernels *pairs;    /* and for those with bf16 in pairs, or NULL */
    uint64_t (*const *read)(const void *data, int64_t n_bytes);
} isa;

/* Best first on most processors: see isa_ranked. */
static const isa ISAS[] = {
#if defined(__x86_64__)
    {"avx512bf16", &mpad_cpu_avx512.f32, &mpad_cpu_avx512bf16.bf16, &mpad_cpu_avx512.f16,
     &mpad_cpu_avx512, &mpad_cpu_avx512bf16, &mpad_cpu_avx512.read},
    {"avx512", &mpad_cpu_avx512.f32, &mpad_cpu_avx512.bf16, &mpad_cpu_avx512.f16, &mpad_cpu_avx512,
     NULL, &mpad_cpu_avx512.read},
    {"avx2", &mpad_cpu_avx2.f32, &mpad_cpu_avx2.bf16, &mpad_cpu_avx2.f16, &mpad_cpu_avx2, NULL,
     &mpad_cpu_avx2.read},
#endif
    {"portable", &mpad_cpu_portable.f32, &mpad_cpu_portable.bf16, &mpad_cpu_portable.f16,
     &mpad_cpu_portable, NULL, &mpad_cpu_portable.read},
};

enum { N_ISA = sizeof ISAS / sizeof *ISAS };

static bool isa_is_usable(const isa *set)
{
#if defined(__x86_64__)
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
    bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
    if (!strcmp(set->name, "avx512bf16"))
        return has_avx512 && __builtin_cpu_supports("avx512bf16") &&
               __builtin_cpu_supports("avx512vbmi");
    if (!strcmp(set->name, "avx512"))
        return has_avx512;
    if (!strcmp(set->name, "avx2"))
        return has_avx2;
#endif
    return !strcmp(set->name, "portable");
}

/* Whether weights are worth fetching into the first cache ahead of a product with few rows: AMD's
 * processors do by themselves, and lose by being asked. */
static bool is_fetched_near(void)
{
#if defined(__x86_64__)
    return !__builtin_cpu_is("amd");
#else
    return true;
#endif
}

/* The i-th best here. Intel's processors run AVX512-BF16's product at half the FLOP/s of float32's.
 */
static const isa *isa_ranked(int i)
{
#if defined(__x86_64__)
    if (i < 2 && __builtin_cpu_is("intel"))
        return &ISAS[1 - i];
#endif
    return &ISAS[i];
}

static const isa *isa_find(const char *name)
{
    for (int i = 0; i < N_ISA; i++) {
        const isa *set = isa_ranked(i);
        if ((!name || !strcmp(set->name, name)) && isa_is_usable(set))
            return set;
    }
    return NULL;
}

static _Atomic(const isa *) isa_in_use;

static const isa *isa_current(void)
{
    const isa *set = atomic_load_explicit(&isa_in_use, memory_order_relaxed);
    if (!set) {
        set = isa_find(getenv("MOEPAD_CPU_ISA"));
        if (!set)
            set = isa_find(NULL);
        atomic_store(&isa_in_use, set);
    }
    return set;
}

const char *const *mpad_cpu_isa_available(void)
{
    static const char *names[N_ISA + 1];
    static atomic_bool is_filled;
    if (!atomic_load_explicit(&is_filled, memory_order_acquire)) {
        static atomic_flag is_filling = ATOMIC_FLAG_INIT;
        while (atomic_flag_test_and_set(&is_filling)) {
        }
        for (int i = 0, n = 0; i < N_ISA; i++)
            if (isa_is_usable(isa_ranked(i)))
                names[n++] = isa_ranked(i)->name;
        atomic_store_explicit(&is_filled, true, memory_order_release);
        atomic_flag_clear(&is_filling);
    }
    return names;
}

const char *mpad_cpu_isa(void)
{
    return isa_current()->name;
}

mpad_code mpad_cpu_set_isa(const char *name, mpad_status *status)
{
    const isa *set = name ? isa_find(name) : NULL;
    if (name && !set) {
        char names[128] = "";
        for (const char *const *n = mpad_cpu_isa_available(); *n; n++) {
            strcat(names, *names ? ", " : "");
            strcat(names, *n);
        }
        return mpad_fail(status, MPAD_VALUE, "name: no instruction set '%s' here; accepted: %s",
                         name, names);
    }
    atomic_store(&isa_in_use, set);
    return MPAD_OK;
}

static const mpad_cpu_kernels *kernels_of(const isa *set, mpad_dtype dtype)
{
    return dtype == MPAD_DTYPE_F32 ? set->f32 : dtype == MPAD_DTYPE_BF16 ? set->bf16 : set->f16;
}

static mpad_cpu_format format_of(const mpad_moe *moe)
{
    switch (moe->weight_dtype) {
    case MPAD_DTYPE_F8_E4M3FN:
        return MPAD_CPU_E4M3FN;
    case MPAD_DTYPE_F8_E4M3FNUZ:
        return MPAD_CPU_E4M3FNUZ;
    case MPAD_DTYPE_F8_E5M2:
        return MPAD_CPU_E5M2;
    case MPAD_DTYPE_I8:
        return MPAD_CPU_I8;
    default:
        return moe->quant == MPAD_QUANT_MXFP4 ? MPAD_CPU_E2M1 : MPAD_CPU_I4;
    }
}

/* h before it is rounded to what `input` says is float32, in the order of k. */
static mpad_cpu_kernels quantised_kernels(const isa *set, const mpad_moe *moe)
{
    const mpad_cpu_isa_kernels *of = set->quantised;
    if (set->pairs && moe->dtype == MPAD_DTYPE_BF16 && moe->input == MPAD_INPUT_NONE) {
        mpad_cpu_kernels pairs = set->pairs->stored;
        pairs.multiply = set->pairs->multiply_stored[format_of(moe)];
        return pairs;
    }
    mpad_cpu_kernels kernels = moe->dtype == MPAD_DTYPE_F32    ? of->planes_f32
                               : moe->dtype == MPAD_DTYPE_BF16 ? of->planes_bf16
                                                               : of->planes_f16;
    kernels.multiply = of->multiply_stored[format_of(moe)];
    if (moe->input != MPAD_INPUT_NONE) {
        kernels.take_row = of->planes_f32.take_row;
        kernels.activate = of->f32.activate;
    }
    return kernels;
}

/* ---- weights in memory ---- */

static const struct {
    int n_bit, n_plane;
} FORMATS[] = {
#define X(NAME, name, bits, planes) [MPAD_CPU_##NAME] = {bits, planes},
    MPAD_CPU_FORMAT_LIST(X)
#undef X
};

/* ---- sizes ---- */

enum {
    CACHE_LINE = 64,
    H_TOKENS = 256,        /* pairs whose sums of a unit of stage 1 are kept at a time */
    OUT_TOKENS = 512,      /* tokens of a unit of stage 2 */
    H_COLUMNS = 128,       /* most columns of a unit of stage 1 */
    OUT_BYTES = 128 << 10, /* about the most sums of a unit of stage 2 */
    ALONE_COST = 400000,   /* multiply-adds, or bytes, that are not worth waking a thread for */
    TAKE_TOGETHER = 65536, /* elements of x that are not worth a barrier */
};

static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t up_to(int64_t n, int64_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

static int64_t count_blocks(int64_t n, int64_t block)
{
    return (n + block - 1) / block;
}

static int64_t element_bytes(mpad_dtype dtype)
{
    return dtype == MPAD_DTYPE_F32 ? 4 : 2;
}

/* Bytes of n weights of a row. */
static int64_t weight_bytes(const mpad_moe *moe, int64_t n)
{
    if (moe->quant == MPAD_QUANT_NONE)
        return n * element_bytes(moe->dtype);
    return (n * FORMATS[format_of(moe)].n_bit + 7) / 8;
}

/* Bytes between weights `ld` stored elements apart. */
static int64_t stored_bytes(const mpad_moe *moe, int64_t ld)
{
    return ld * (moe->quant == MPAD_QUANT_NONE ? element_bytes(moe->dtype) : 1);
}

static mpad_cpu_rows rows_of(const mpad_moe *moe, int64_t n_row, int64_t n_k, int64_t x_bytes)
{
    bool is_quantised = moe->quant != MPAD_QUANT_NONE;
    int64_t step = is_quantised ? MPAD_CPU_STORED_STEP : MPAD_CPU_K_STEP;
    int64_t n_block = count_blocks(n_k, MPAD_CPU_K_BLOCK);
    int64_t k_block = up_to(n_block ? count_blocks(n_k, n_block) : 1, step);
    int64_t n_line = k_block * x_bytes / CACHE_LINE;
    int64_t ld_row = (n_line | 1) * CACHE_LINE; /* odd: rows do not meet in one set of a cache */
    return (mpad_cpu_rows){
        .n_k = n_k,
        .k_block = k_block,
        .ld_row = ld_row,
        .ld_block = n_row * ld_row,
        .n_plane = is_quantised ? FORMATS[format_of(moe)].n_plane : 1,
    };
}

static int64_t rows_bytes(const mpad_cpu_rows *rows)
{
    return count_blocks(rows->n_k, rows->k_block) * rows->ld_block;
}

/* ---- quantised activations ---- */

/* The nearest value of the format, even codes where two are; NaN stays. Adding and subtracting a
 * number whose last bit weighs as much as the format's last bit at v rounds to it. */
static float code_nearest(float v, const mpad_input_format *format)
{
    if (isnan(v))
        return v;
    v = v > format->largest ? format->largest : v < -format->largest ? -format->largest : v;
    int exponent = 0;
    if (!format->is_integer) {
        frexpf(v, &exponent);
        exponent--;
        if (v == 0 || exponent < format->smallest_exponent)
            exponent = format->smallest_exponent;
    }
    const float unit = ldexpf(1.5f, exponent - format->n_mantissa + 23);
    return (v + unit) - unit;
}

/* Scale of the columns whose largest magnitude is `largest`, as the format has it: a quotient. */
static float quotient_scale(float largest, const mpad_input_format *format)
{
    const float scale = largest / format->largest;
    return scale == 0 ? 1 : scale;
}

/* The same of OCP MX: the power of two of `largest`, rounded to the format's mantissa, over that of
 * the format's largest value. One e8m0 holds, with which no code times it overflows; else NaN. */
static float mx_scale(float largest, const mpad_input_format *format)
{
    int exponent, top;
    frexpf(format->largest, &top);
    if (!isfinite(largest))
        return NAN;
    if (frexpf(largest, &exponent) >= 1 - ldexpf(0.25f, -format->n_mantissa))
        exponent++;
    exponent = (exponent > 128 ? 128 : exponent) - top;
    return ldexpf(1, exponent < -127 ? -127 : exponent);
}

/* Rounds one row, in place, to codes times scales: `fixed`, or one for the columns that share a
 * scale of the weights they meet. */
static void quantise_row(const mpad_moe *moe, float *row, int64_t n_k, const mpad_scale *weights,
                         const float *fixed)
{
    const mpad_input_format format = input_format_of(moe);
    const bool is_grouped = weights->ld_column != 0 && !fixed;
    for (int64_t k = 0, end; k < n_k; k = end) {
        const int64_t block = weights->block_column, phase = weights->column_phase;
        end = is_grouped ? min64(((phase + k) / block + 1) * block - phase, n_k) : n_k;
        float largest = 0;
        for (int64_t i = k; i < end; i++) {
            const float size = fabsf(row[i]);
            largest = size > largest || isnan(size) ? size : largest;
        }
        const float scale = fixed                     ? *fixed
                            : input_is_mx(moe->input) ? mx_scale(largest, &format)
                                                      : quotient_scale(largest, &format);
        for (int64_t i = k; i < end; i++)
            row[i] = code_nearest(row[i] / scale, &format) * scale;
    }
}

/* ---- one call ---- */

/* The units of a stage: each has columns of one group, an active expert or a block of tokens. */
typedef struct stage {
    int64_t n_group, n_column, largest; /* `largest` unit's columns; a multiple of the step */
    atomic_llong next;                  /* step that is not taken; a group is a row of steps */
} stage;

typedef struct unit {
    int64_t group, n, n_column; /* columns [n, n + n_column); none when no unit is left */
} unit;

typedef struct call {
    const mpad_moe *moe;
    const mpad_cpu_kernels *kernels;
    int64_t n_pair; /* that are not skipped */
    int64_t n_active;
    stage h_stage, out_stage;
    int64_t token_block; /* tokens of a unit of stage 2 */
    int64_t n_slot;      /* threads that find scratch */
    int64_t scratch_bytes;
    bool is_x_taken;

    int32_t *first;      /* [n_expert + 1]: pairs of expert e are [first[e], first[e + 1]) */
    int32_t *active;     /* [n_active]: experts that have pairs, ascending */
    int32_t *pair_token; /* [n_pair], ascending within an expert */
    float *pair_weight;  /* [n_pair] */
    int32_t *local;      /* [n_token, n_topk]: expert of a slot, or -1 */
    mpad_cpu_rows x, h;  /* rows of tokens; of pairs */
    mpad_cpu_rows exact; /* h before it is quantised, each row in one piece; where that is asked */
    char *scratch;       /* [n_slot] */

    atomic_llong next_row, next_pair;
} call;

static int64_t count_steps(const stage *s)
{
    return s->n_group * count_blocks(s->n_column, MPAD_CPU_K_STEP);
}

/* A unit is large while much is left, since its columns share rows of x in cache, and small at the
 * end, so that threads end together. */
static unit take_unit(stage *s, int n_thread)
{
    const int64_t n_step = count_steps(s), per_group = n_step / (s->n_group ? s->n_group : 1);
    long long first = atomic_load(&s->next);
    int64_t n;
    do {
        if (first >= n_step)
            return (unit){.n_column = 0};
        n = min64(s->largest / MPAD_CPU_K_STEP, (n_step - first) / (2 * n_thread));
        n = min64(n < 1 ? 1 : n, per_group - first % per_group);
    } while (!atomic_compare_exchange_weak(&s->next, &first, first + n));
    unit u = {.group = first / per_group, .n = first % per_group * MPAD_CPU_K_STEP};
    u.n_column = min64(n * MPAD_CPU_K_STEP, s->n_column - u.n);
    return u;
}

/* Sizes of a call, and its parts laid out from `base`; returns their bytes. With x_bytes = 4 no
 * instruction set needs more. */
static int64_t lay_out(call *c, const mpad_moe *moe, int64_t x_bytes, char *base)
{
    const int64_t n_slot = moe->n_token * moe->n_topk;
    c->moe = moe;
    c->token_block = min64(moe->n_token, OUT_TOKENS);
    c->h_stage.n_column = moe->n_inter;
    c->h_stage.n_group = min64(n_slot, moe->n_expert);
    c->h_stage.largest = min64(H_COLUMNS, up_to(moe->n_inter, MPAD_CPU_K_STEP));
    c->out_stage.n_column = moe->n_hidden;
    c->out_stage.n_group = c->token_block ? count_blocks(moe->n_token, c->token_block) : 0;
    c->out_stage.largest =
        min64(up_to(OUT_BYTES / (int64_t)sizeof(float) / (c->token_block + 1) + 1, MPAD_CPU_K_STEP),
              up_to(moe->n_hidden, MPAD_CPU_K_STEP));

    int64_t h_floats = (min64(n_slot, H_TOKENS) + 1) * 2 * c->h_stage.largest;
    int64_t out_floats = (c->token_block + 1) * c->out_stage.largest;
    int64_t n_h_step = count_steps(&c->h_stage), n_out_step = count_steps(&c->out_stage);
    c->n_slot = min64(n_h_step > n_out_step ? n_h_step : n_out_step, MPAD_POOL_MAX_THREADS);
    c->scratch_bytes =
        up_to((h_floats > out_floats ? h_floats : out_floats) * (int64_t)sizeof(float), CACHE_LINE);
    c->x = rows_of(moe, moe->n_token, moe->n_hidden, x_bytes);
    c->h = rows_of(moe, n_slot, moe->n_inter, x_bytes);
    if (moe->input != MPAD_INPUT_NONE) {
        const int64_t k_block = up_to(moe->n_inter, MPAD_CPU_K_STEP), ld_row = k_block * 4;
        c->exact = (mpad_cpu_rows){.n_k = moe->n_inter,
                                   .k_block = k_block,
                                   .ld_row = ld_row,
                                   .ld_block = n_slot * ld_row,
                                   .n_plane = 1};
        const int64_t row_bytes = up_to(moe->n_hidden * (int64_t)sizeof(float), CACHE_LINE);
        c->scratch_bytes = c->scratch_bytes > row_bytes ? c->scratch_bytes : row_bytes;
    }

    int64_t at = 0;
#define PLACE(pointer, n_bytes)                                                                    \
    do {                                                                                           \
        if (base)                                                                                  \
            (pointer) = (void *)(base + at);                                                       \
        at += up_to((n_bytes), CACHE_LINE);                                                        \
    } while (0)
    PLACE(c->first, (moe->n_expert + 1) * 4);
    PLACE(c->active, moe->n_expert * 4);
    PLACE(c->pair_token, n_slot * 4);
    PLACE(c->pair_weight, n_slot * 4);
    PLACE(c->local, n_slot * 4);
    PLACE(c->x.data, rows_bytes(&c->x));
    PLACE(c->h.data, rows_bytes(&c->h));
    if (moe->input != MPAD_INPUT_NONE)
        PLACE(c->exact.data, c->exact.ld_block);
    PLACE(c->scratch, c->n_slot * c->scratch_bytes);
#undef PLACE
    return at;
}

int64_t mpad_cpu_workspace_bytes(const mpad_moe *moe)
{
    call c;
    return lay_out(&c, moe, 4, NULL);
}

/* Looks every slot's expert up and counts; the only part of a call that can fail. */
static mpad_code look_up(call *c, mpad_status *status)
{
    const mpad_moe *moe = c->moe;
    memset(c->first, 0, (size_t)(moe->n_expert + 1) * sizeof *c->first);
    c->n_pair = 0;
    for (int64_t t = 0; t < moe->n_token; t++)
        for (int64_t s = 0; s < moe->n_topk; s++) {
            int64_t id = integer_at(moe->topk_ids, moe->topk_ids_dtype, t * moe->ld_topk_ids + s);
            if (id < -1 || id >= moe->n_expert_global)
                return mpad_fail(status, MPAD_VALUE,
                                 "topk_ids[%" PRId64 ", %" PRId64 "]: expert %" PRId64
                                 " is out of range; accepted: 0 to %" PRId64
                                 ", or -1 for a slot to skip",
                                 t, s, id, moe->n_expert_global - 1);
            if (id >= 0 && moe->expert_map) {
                int64_t local = integer_at(moe->expert_map, moe->expert_map_dtype, id);
                if (local < -1 || local >= moe->n_expert)
                    return mpad_fail(status, MPAD_VALUE,
                                     "expert_map[%" PRId64 "]: local expert %" PRId64
                                     " is out of range; accepted: 0 to %" PRId64
                                     ", or -1 for an expert that is not here",
                                     id, local, moe->n_expert - 1);
                id = local;
            }
            c->local[t * moe->n_topk + s] = (int32_t)id;
            if (id >= 0) {
                c->first[id + 1]++;
                c->n_pair++;
            }
        }
    return MPAD_OK;
}

/* Sorts the slots by expert, then token, then slot. */
static void sort_pairs(call *c)
{
    const mpad_moe *moe = c->moe;
    c->n_active = 0;
    for (int64_t e = 0; e < moe->n_expert; e++) {
        if (c->first[e + 1])
            c->active[c->n_active++] = (int32_t)e;
        c->first[e + 1] += c->first[e];
    }
    for (int64_t t = 0; t < moe->n_token; t++)
        for (int64_t s = 0; s < moe->n_topk; s++) {
            int32_t e = c->local[t * moe->n_topk + s];
            if (e < 0)
                continue;
            int32_t pair = c->first[e]++;
            c->pair_token[pair] = (int32_t)t;
            c->pair_weight[pair] =
                float_at(moe->topk_weights, moe->topk_weights_dtype, t * moe->ld_topk_weights + s);
        }
    memmove(c->first + 1, c->first, (size_t)moe->n_expert * sizeof *c->first);
    c->first[0] = 0;
}

/* Columns [n, n + n_column) of one expert's bias as floats; NULL stays NULL. */
static const float *bias_of(const void *bias, mpad_dtype dtype, int64_t at, int64_t ld,
                            int64_t n_column, float *floats)
{
    if (!bias)
        return NULL;
    for (int64_t i = 0; i < n_column; i++)
        floats[i] = float_at(bias, dtype, at + i * ld);
    return floats;
}

static const char *h_unit_weights(const call *c, const unit *u)
{
    const mpad_moe *moe = c->moe;
    const int64_t at = c->active[u->group] * moe->w13_ld_expert + u->n * moe->w13_ld_row;
    return (const char *)moe->w13 + stored_bytes(moe, at);
}

static void run_h_unit(call *c, const unit *u, const unit *next, float *scratch)
{
    const mpad_moe *moe = c->moe;
    const int64_t e = c->active[u->group], n = u->n, n_column = u->n_column;
    const int64_t n_half = moe->is_gated ? 2 : 1, half = c->h_stage.largest;
    const char *w = h_unit_weights(c, u);
    const char *up_w = w + stored_bytes(moe, moe->w13_up_offset);
    const char *next_w = next->n_column ? h_unit_weights(c, next) : NULL;
    float *gate_bias = scratch, *up_bias = scratch + half, *sum = scratch + 2 * half;
    int64_t bias_at = e * moe->w13_bias_ld_expert + n * moe->w13_bias_ld_row;

    mpad_cpu_product product = {
        .x = &c->x,
        .ld_w = stored_bytes(moe, moe->w13_ld_row),
        .n_column = n_column,
        .is_fetched_near = is_fetched_near(),
        .w_scale = &moe->w13_scale,
        .w_row = n,
        .ld_sum = n_half * half,
    };
    mpad_cpu_activation activation = {
        .act = moe->act,
        .alpha = moe->swiglu_alpha,
        .limit = moe->swiglu_limit,
        .gate_bias = bias_of(moe->w13_bias, moe->w13_bias_dtype, bias_at, moe->w13_bias_ld_row,
                             n_column, gate_bias),
        .up_bias = !moe->is_gated ? NULL
                                  : bias_of(moe->w13_bias, moe->w13_bias_dtype,
                                            bias_at + moe->w13_bias_up_offset, moe->w13_bias_ld_row,
                                            n_column, up_bias),
        .n_column = n_column,
        .h = moe->input == MPAD_INPUT_NONE ? &c->h : &c->exact,
        .first = n,
    };
    for (int64_t pair = c->first[e]; pair < c->first[e + 1]; pair += H_TOKENS) {
        product.n_row = min64(H_TOKENS, c->first[e + 1] - pair);
        product.x_row = c->pair_token + pair;
        memset(sum, 0, (size_t)(product.n_row * product.ld_sum) * sizeof *sum);
        product.w = w;
        product.w_scale_at = e * moe->w13_scale.ld_expert;
        product.sum = sum;
        product.next_w = moe->is_gated ? up_w : next_w;
        c->kernels->multiply(&product);
        if (moe->is_gated) {
            product.w = up_w;
            product.w_scale_at += moe->w13_scale.up_offset;
            product.sum = sum + half;
            product.next_w = next_w;
            c->kernels->multiply(&product);
        }
        for (int64_t i = 0; i < product.n_row; i++) {
            activation.gate = sum + i * product.ld_sum;
            activation.up = moe->is_gated ? activation.gate + half : NULL;
            activation.scale = moe->is_weight_on_input ? c->pair_weight[pair + i] : 1.0f;
            activation.row = pair + i;
            c->kernels->activate(&activation);
        }
    }
}

/* First of an expert's pairs whose token is not below `token`. */
static int64_t find_pair(const call *c, int64_t e, int64_t token)
{
    int64_t low = c->first[e], high = c->first[e + 1];
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (c->pair_token[middle] < token)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void add_bias(const call *c, int64_t e, const unit *u, int64_t pair, int64_t last,
                     float *sum, int64_t token, float *floats)
{
    const mpad_moe *moe = c->moe;
    const float *bias = bias_of(moe->w2_bias, moe->w2_bias_dtype, e * moe->w2_bias_ld_expert + u->n,
                                1, u->n_column, floats);
    for (; bias && pair < last; pair++) {
        float weight = moe->is_weight_on_input ? 1.0f : c->pair_weight[pair];
        float *row = sum + (c->pair_token[pair] - token) * c->out_stage.largest;
        for (int64_t i = 0; i < u->n_column; i++)
            row[i] += weight * bias[i];
    }
}

static const char *out_unit_weights(const call *c, int64_t e, const unit *u)
{
    const mpad_moe *moe = c->moe;
    const int64_t at = e * moe->w2_ld_expert + u->n * moe->w2_ld_row;
    return (const char *)moe->w2 + stored_bytes(moe, at);
}

static void run_out_unit(call *c, const unit *u, const unit *next, float *scratch)
{
    const mpad_moe *moe = c->moe;
    const int64_t element = element_bytes(moe->dtype);
    const int64_t token = u->group * c->token_block;
    const int64_t n_token = min64(c->token_block, moe->n_token - token);
    const int64_t ld_sum = c->out_stage.largest;
    float *bias = scratch, *sum = scratch + ld_sum;
    memset(sum, 0, (size_t)(n_token * ld_sum) * sizeof *sum);

    for (int64_t a = 0; a < c->n_active; a++) {
        const int64_t e = c->active[a];
        const int64_t pair = find_pair(c, e, token), last = find_pair(c, e, token + n_token);
        if (pair == last)
            continue;
        mpad_cpu_rows h = c->h;
        h.data += pair * h.ld_row;
        const mpad_cpu_product product = {
            .x = &h,
            .n_row = last - pair,
            .w = out_unit_weights(c, e, u),
            .ld_w = stored_bytes(moe, moe->w2_ld_row),
            .n_column = u->n_column,
            .next_w = a + 1 < c->n_active ? out_unit_weights(c, c->active[a + 1], u)
                      : next->n_column    ? out_unit_weights(c, c->active[0], next)
                                          : NULL,
            .is_fetched_near = is_fetched_near(),
            .w_scale = &moe->w2_scale,
            .w_scale_at = e * moe->w2_scale.ld_expert,
            .w_row = u->n,
            .sum = sum,
            .sum_row = c->pair_token + pair,
            .sum_origin = token,
            .ld_sum = ld_sum,
            .scale = moe->is_weight_on_input ? NULL : c->pair_weight + pair,
        };
        c->kernels->multiply(&product);
        add_bias(c, e, u, pair, last, sum, token, bias);
    }
    for (int64_t i = 0; i < n_token; i++)
        c->kernels->give_row((char *)moe->out + ((token + i) * moe->ld_out + u->n) * element,
                             sum + i * ld_sum, u->n_column, moe->routed_scaling);
}

static void take_quantised_row(const call *c, int64_t token, float *row)
{
    const mpad_moe *moe = c->moe;
    for (int64_t k = 0; k < moe->n_hidden; k++)
        row[k] = float_at(moe->hidden, moe->dtype, token * moe->ld_hidden + k);
    quantise_row(moe, row, moe->n_hidden, &moe->w13_scale, moe->x_scale);
    c->kernels->take_row(&c->x, token, row);
}

static void quantise_pairs(call *c)
{
    const mpad_moe *moe = c->moe;
    for (int64_t pair; (pair = atomic_fetch_add(&c->next_pair, 1)) < c->n_pair;) {
        float *row = (float *)(c->exact.data + pair * c->exact.ld_row);
        quantise_row(moe, row, moe->n_inter, &moe->w2_scale, moe->h_scale);
        c->kernels->take_row(&c->h, pair, row);
    }
}

/* `scratch` holds a row where activations are quantised, which is arithmetic and so done in
 * run_body's environment only. */
static void take_rows(call *c, float *scratch)
{
    const mpad_moe *moe = c->moe;
    const int64_t n_together = 4;
    for (int64_t row; (row = atomic_fetch_add(&c->next_row, n_together)) < moe->n_token;)
        for (int64_t i = row; i < min64(row + n_together, moe->n_token); i++)
            if (moe->input != MPAD_INPUT_NONE)
                take_quantised_row(c, i, scratch);
            else
                c->kernels->take_row(&c->x, i,
                                     (const char *)moe->hidden +
                                         i * moe->ld_hidden * element_bytes(moe->dtype));
}

/* What of out no unit writes: the columns and rows that pad it. */
static void clear_pads(const call *c)
{
    const mpad_moe *moe = c->moe;
    const int64_t element = element_bytes(moe->dtype);
    for (int64_t t = 0; t < moe->n_token_pad; t++) {
        int64_t n = t < moe->n_token ? moe->n_hidden : 0;
        memset((char *)moe->out + (t * moe->ld_out + n) * element, 0,
               (size_t)((moe->n_hidden_pad - n) * element));
    }
}

static void run_body(void *context, int thread, int n_thread)
{
    call *c = context;
    float *scratch = (float *)(c->scratch + thread * c->scratch_bytes);
    fenv_t callers;
    fegetenv(&callers);
    fesetenv(FE_DFL_ENV); /* no flush to zero, which other libraries set for a whole process */
    if (!c->is_x_taken) {
        take_rows(c, scratch);
        mpad_pool_barrier(context, thread);
    }
    unit u = take_unit(&c->h_stage, n_thread), next;
    for (; u.n_column; u = next) {
        next = take_unit(&c->h_stage, n_thread); /* whose weights this one's end fetches */
        run_h_unit(c, &u, &next, scratch);
    }
    if (c->moe->input != MPAD_INPUT_NONE) {
        mpad_pool_barrier(context, thread);
        quantise_pairs(c);
    }
    u = take_unit(&c->out_stage, n_thread);
    mpad_pool_barrier(context, thread);
    for (; u.n_column; u = next) {
        next = take_unit(&c->out_stage, n_thread);
        run_out_unit(c, &u, &next, scratch);
    }
    fesetenv(&callers);
}

/* ---- the engine's own workspace: one block, kept for the next call ---- */

enum { KEPT_BYTES = 256 << 20 };

static struct {
    atomic_flag is_taken;
    void *block;
    int64_t n_bytes;
} kept = {ATOMIC_FLAG_INIT, NULL, 0};

static void *allocate(int64_t n_bytes)
{
    void *block = NULL;
    return posix_memalign(&block, CACHE_LINE, (size_t)n_bytes) ? NULL : block;
}

static void *workspace_take(int64_t n_bytes, bool *is_kept)
{
    *is_kept = n_bytes <= KEPT_BYTES && !atomic_flag_test_and_set(&kept.is_taken);
    if (!*is_kept)
        return allocate(n_bytes);
    if (kept.n_bytes < n_bytes) {
        free(kept.block);
        kept.block = allocate(n_bytes);
        kept.n_bytes = kept.block ? n_bytes : 0;
        if (!kept.block)
            atomic_flag_clear(&kept.is_taken);
    }
    return kept.block;
}

static void workspace_give(void *block, bool is_kept)
{
    if (is_kept)
        atomic_flag_clear(&kept.is_taken);
    else
        free(block);
}

/* Threads that the work is worth. */
static int count_threads(const call *c)
{
    const mpad_moe *moe = c->moe;
    const int64_t per_pair = (moe->is_gated ? 3 : 2) * moe->n_hidden * moe->n_inter;
    const int64_t cost = c->n_pair * per_pair + c->n_active * weight_bytes(moe, per_pair);
    const int64_t n = min64(cost / ALONE_COST + 1, c->n_slot);
    return n <= 1 ? 1 : (int)min64(n, mpad_pool_threads());
}

mpad_code mpad_cpu_run(const mpad_moe *moe, void *workspace, mpad_status *status)
{
    const isa *set = isa_current();
    const mpad_cpu_kernels kernels =
        moe->quant == MPAD_QUANT_NONE ? *kernels_of(set, moe->dtype) : quantised_kernels(set, moe);
    MPAD_REQUIRE(moe->n_topk == 0 || moe->n_token <= INT32_MAX / moe->n_topk, status, MPAD_VALUE,
                 "topk_ids: expected fewer than 2^31 slots, got %" PRId64 " x %" PRId64
                 "; split the call",
                 moe->n_token, moe->n_topk);
    call c = {.kernels = &kernels};
    bool is_kept = false;
    char *base = workspace;
    if (!base)
        base = workspace_take(lay_out(&c, moe, kernels.x_bytes, NULL), &is_kept);
    MPAD_REQUIRE(base, status, MPAD_MEMORY, "workspace: no memory for %" PRId64 " bytes",
                 lay_out(&c, moe, kernels.x_bytes, NULL));
    lay_out(&c, moe, kernels.x_bytes, base);

    mpad_code code = look_up(&c, status);
    if (code == MPAD_OK) {
        sort_pairs(&c);
        c.h_stage.n_group = c.n_active;
        const int n_thread = count_threads(&c);
        c.is_x_taken = moe->input == MPAD_INPUT_NONE &&
                       (n_thread == 1 || moe->n_token * moe->n_hidden <= TAKE_TOGETHER);
        if (c.is_x_taken)
            take_rows(&c, NULL);
        if (c.n_slot)
            mpad_pool_run(n_thread, run_body, &c);
        clear_pads(&c);
    }
    if (!workspace)
        workspace_give(base, is_kept);
    return code;
}

/* ---- what the machine can do ---- */

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct probe {
    const isa *set;
    const char *data;
    int64_t n_bytes; /* to read, or 0 to compute */
    const mpad_cpu_kernels *kernels;
    double seconds;
    double flops[MPAD_POOL_MAX_THREADS];
    atomic_llong folded; /* keeps the reads from being optimised away */
} probe;

static void probe_body(void *context, int thread, int n_thread)
{
    enum { N_ITERATION = 20000, PIECE = 1024 };
    probe *p = context;
    mpad_pool_barrier(context, thread);
    if (p->n_bytes) {
        int64_t n_piece = p->n_bytes / PIECE;
        int64_t first = n_piece * thread / n_thread, last = n_piece * (thread + 1) / n_thread;
        uint64_t folded = (*p->set->read)(p->data + first * PIECE, (last - first) * PIECE);
        atomic_fetch_add(&p->folded, (long long)(folded & 1));
        return;
    }
    for (double end = now_s() + p->seconds; now_s() < end;)
        p->flops[thread] += p->kernels->spin(N_ITERATION);
}

static double probe_seconds(probe *p)
{
    double start = now_s();
    mpad_pool_run(mpad_pool_threads(), probe_body, p);
    return now_s() - start;
}

double mpad_cpu_read_bandwidth(const void *buffer, int64_t n_bytes)
{
    probe p = {.set = isa_current(), .data = buffer, .n_bytes = n_bytes};
    double seconds = probe_seconds(&p);
    return seconds > 0 ? (double)n_bytes / seconds : 0;
}

double mpad_cpu_peak_flops(mpad_dtype dtype, double seconds)
{
    probe p = {.kernels = kernels_of(isa_find(NULL), dtype), .seconds = seconds};
    double took = probe_seconds(&p), flops = 0;
    for (int t = 0; t < MPAD_POOL_MAX_THREADS; t++)
        flops += p.flops[t];
    return took > 0 ? flops / took : 0;
}
