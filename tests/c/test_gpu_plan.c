/* The GPU planner without a GPU: whatever the sizes, the launches fit the target, the parts of the
 * workspace fit in it side by side, and what no kernel takes is refused by name. */
#include "check.h"
#include "gpu_plan.h"

#include <string.h>

static const char *const ARCHS[] = {"gfx90a",  "gfx942", "gfx950", "gfx1100",
                                    "gfx1201", "sm_80",  "sm_90",  "sm_90a"};
enum { N_ARCH = sizeof ARCHS / sizeof *ARCHS, MAX_VARIANT = 1024, ALIGN = 256 };

static bool is_planned[MAX_VARIANT]; /* by some call on some target */

static mpad_gpu_target target_of(const char *arch)
{
    mpad_gpu_target target;
    mpad_status status;
    mpad_code code = mpad_gpu_target_make(arch, 100, &target, &status);
    CHECK(code == MPAD_OK, "%s: %s", arch, status.message);
    return target;
}

/* A contiguous call; its pointers are never followed. */
static mpad_moe call_of(int64_t n_token, int64_t n_topk, int64_t n_expert, int64_t n_hidden,
                        int64_t n_inter, bool is_gated)
{
    int64_t n_row = is_gated ? 2 * n_inter : n_inter;
    return (mpad_moe){
        .n_token = n_token,
        .n_token_pad = n_token,
        .n_topk = n_topk,
        .n_expert = n_expert,
        .n_expert_global = n_expert,
        .n_hidden = n_hidden,
        .n_hidden_pad = n_hidden,
        .n_inter = n_inter,
        .dtype = MPAD_DTYPE_BF16,
        .is_gated = is_gated,
        .routed_scaling = 1,
        .hidden = (void *)0x10000,
        .ld_hidden = n_hidden,
        .out = (void *)0x20000,
        .ld_out = n_hidden,
        .w13 = (void *)0x30000,
        .w13_ld_expert = n_row * n_hidden,
        .w13_ld_row = n_hidden,
        .w13_up_offset = is_gated ? n_inter * n_hidden : 0,
        .w2 = (void *)0x40000,
        .w2_ld_expert = n_hidden * n_inter,
        .w2_ld_row = n_inter,
        .topk_weights = (void *)0x50000,
        .topk_weights_dtype = MPAD_DTYPE_F32,
        .ld_topk_weights = n_topk,
        .topk_ids = (void *)0x60000,
        .topk_ids_dtype = MPAD_DTYPE_I32,
        .ld_topk_ids = n_topk,
    };
}

static void check_launches(const mpad_gpu_target *target, const mpad_gpu_plan *plan)
{
    CHECK(plan->n_launch <= MPAD_GPU_MAX_LAUNCH, "%d", plan->n_launch);
    for (int i = 0; i < plan->n_launch; i++) {
        const mpad_gpu_launch *l = &plan->launch[i];
        CHECK(l->variant >= 0 && l->variant < MAX_VARIANT, "%d", l->variant);
        is_planned[l->variant] = true;
        CHECK(l->symbol == mpad_gpu_symbol(l->variant), "%s", l->symbol);
        CHECK(mpad_gpu_have_symbol(target, plan->part, l->variant), "%s: %s", target->name,
              l->symbol);
        CHECK(l->grid > 0 && l->grid < 1u << 31, "%s: grid %u", l->symbol, l->grid);
        CHECK(l->block > 0 && l->block <= 1024 && l->block % (unsigned)target->wave == 0,
              "%s: %s: block %u", target->name, l->symbol, l->block);
        CHECK(l->lds_bytes <= (unsigned)target->lds_bytes, "%s: %s: LDS %u", target->name,
              l->symbol, l->lds_bytes);
        CHECK(l->is_dependent == target->have_dependent_launch, "%s", l->symbol);
    }
}

/* The kernels' reach into each part, as gpu_args.h has it. */
static void check_workspace(const mpad_moe *moe, const mpad_gpu_plan *plan)
{
    int64_t n_pair = moe->n_token * moe->n_topk;
    const struct {
        const char *name;
        int64_t at, n_bytes;
    } part[] = {
        {"inter", plan->inter, n_pair * plan->ld_inter * (moe->input ? 4 : 2)},
        {"route", plan->route, n_pair * plan->ld_route * 2},
        {"perm", plan->perm, n_pair * 4},
        {"slot", plan->slot, n_pair * 4},
        {"pair_weight", plan->pair_weight, n_pair * 4},
        {"job", plan->job, n_pair * (int64_t)sizeof(mpad_gpu_job)},
        {"n_job", plan->n_job, 4},
        {"count", plan->count, plan->n_sort_block * moe->n_expert * 4},
        {"codes of x", plan->x.code, moe->n_token * plan->x.ld * 2},
        {"scales of x", plan->x.scale, moe->n_token * plan->x.n_group * 4},
        {"codes of h", plan->h.code, n_pair * plan->h.ld * 2},
        {"scales of h", plan->h.scale, n_pair * plan->h.n_group * 4},
    };
    enum { N_PART = sizeof part / sizeof *part };
    for (int i = 0; i < N_PART; i++) {
        if (part[i].at < 0 || part[i].n_bytes <= 0)
            continue;
        CHECK(part[i].at % ALIGN == 0, "%s at %lld", part[i].name, (long long)part[i].at);
        CHECK(part[i].at + part[i].n_bytes <= plan->workspace_bytes, "%s ends beyond",
              part[i].name);
        for (int j = 0; j < i; j++)
            CHECK(part[j].at < 0 || part[j].n_bytes <= 0 ||
                      part[j].at + part[j].n_bytes <= part[i].at ||
                      part[i].at + part[i].n_bytes <= part[j].at,
                  "%s and %s overlap", part[j].name, part[i].name);
    }
}

static void check_args(const mpad_moe *moe, const mpad_gpu_plan *plan)
{
    mpad_gpu_args args;
    char *base = (char *)0x100000;
    mpad_gpu_args_make(plan, moe, NULL, MPAD_DTYPE_I32, base, &args);
    CHECK((char *)args.inter == base + plan->inter, "inter");
    CHECK(plan->route < 0 ? !args.route : (char *)args.route == base + plan->route, "route");
    CHECK(plan->perm < 0 ? !args.perm : (char *)args.perm == base + plan->perm, "perm");
    CHECK(args.n_row_job == 1 << args.row_job_log2, "rows of a job: %d", args.n_row_job);
    int64_t n_pair = moe->n_token * moe->n_topk, step = n_pair / 1000 + 1;
    for (int64_t p = 0; moe->n_topk > 1 && p < n_pair; p += step) {
        int64_t token = (int64_t)((uint64_t)p * args.topk_reciprocal >> 32);
        CHECK(token == p / moe->n_topk, "pair %lld of %lld slots: token %lld", (long long)p,
              (long long)moe->n_topk, (long long)token);
    }
}

/* The same with weights of fewer bits; strides count stored elements. */
static void quantise(mpad_moe *moe, mpad_quant quant, int64_t int4_group)
{
    bool is_packed = quant == MPAD_QUANT_MXFP4 || quant == MPAD_QUANT_INT4_GROUP;
    bool is_e8m0 = quant == MPAD_QUANT_MXFP4;
    int64_t block = is_e8m0 ? 32 : is_packed ? int4_group : 1 << 30;
    int per = is_packed ? 2 : 1;
    moe->quant = quant;
    moe->weight_dtype = is_packed                          ? MPAD_DTYPE_U8
                        : quant == MPAD_QUANT_INT8_CHANNEL ? MPAD_DTYPE_I8
                                                           : MPAD_DTYPE_F8_E4M3FN;
    moe->w13_ld_expert /= per;
    moe->w13_ld_row /= per;
    moe->w13_up_offset /= per;
    moe->w2_ld_row = (moe->w2_ld_row + per - 1) / per;
    moe->w2_ld_expert = moe->n_hidden * moe->w2_ld_row;
    moe->w13_scale = moe->w2_scale = (mpad_scale){
        .data = (void *)0x70000,
        .dtype = is_e8m0 ? MPAD_DTYPE_F8_E8M0 : MPAD_DTYPE_F32,
        .ld_expert = 1,
        .ld_column = is_packed,
        .block_row = 1,
        .block_column = block,
    };
}

/* x and h rounded to codes too; with some draws the columns' scales are by blocks. */
static void quantise_input(mpad_moe *moe, uint64_t *random)
{
    if (moe->quant == MPAD_QUANT_MXFP4) {
        moe->input = draw(random) & 1 ? MPAD_INPUT_MXFP8 : MPAD_INPUT_MXFP4;
        return;
    }
    bool is_integer = moe->quant == MPAD_QUANT_INT8_CHANNEL;
    moe->input = is_integer ? MPAD_INPUT_INT8 : MPAD_INPUT_FP8;
    if (is_integer || draw(random) & 1)
        return;
    moe->quant = MPAD_QUANT_FP8_BLOCK;
    moe->w13_scale.ld_column = moe->w2_scale.ld_column = 1;
    moe->w13_scale.block_column = moe->w2_scale.block_column = INT64_C(32) << draw_below(random, 4);
    moe->w13_scale.block_row = moe->w2_scale.block_row = 64;
    moe->w2_scale.column_phase = draw(random) & 1 ? moe->w2_scale.block_column - 32 : 0;
}

/* Moves a tensor off 16 bytes, which takes other kernels. */
static void make_odd(mpad_moe *moe, uint64_t *random)
{
    const void **tensors[] = {&moe->hidden, &moe->w13, &moe->w2};
    const void **tensor = tensors[draw_below(random, 3)];
    *tensor = (const char *)*tensor + 2;
}

static void test_any_sizes(void)
{
    static const int64_t TOKENS[] = {0, 1, 2, 7, 16, 64, 65, 300, 1000, 8192};
    static const int64_t EXPERTS[] = {1, 2, 8, 64, 128, 257, 1024};
    static const int64_t INTERS[] = {0, 1, 8, 44, 96, 192, 704, 2880};
    static const int64_t HIDDENS[] = {8, 64, 2880, 4096, 7168};
    uint64_t random = 1;
    for (int i = 0; i < 60000; i++) {
        mpad_gpu_target target = target_of(ARCHS[draw_below(&random, N_ARCH)]);
        mpad_moe moe = call_of(TOKENS[draw_below(&random, 10)], 1 + draw_below(&random, 32),
                               EXPERTS[draw_below(&random, 7)], HIDDENS[draw_below(&random, 5)],
                               INTERS[draw_below(&random, 8)], draw(&random) & 1);
        static const mpad_quant QUANTS[] = {MPAD_QUANT_NONE, MPAD_QUANT_FP8_TENSOR,
                                            MPAD_QUANT_INT8_CHANNEL, MPAD_QUANT_MXFP4,
                                            MPAD_QUANT_INT4_GROUP};
        moe.dtype = draw(&random) & 1 ? MPAD_DTYPE_BF16 : MPAD_DTYPE_F16;
        mpad_quant quant = QUANTS[draw_below(&random, 5)];
        if (quant != MPAD_QUANT_NONE)
            quantise(&moe, quant, INT64_C(32) << draw_below(&random, 3));
        if ((quant == MPAD_QUANT_FP8_TENSOR || quant == MPAD_QUANT_INT8_CHANNEL ||
             quant == MPAD_QUANT_MXFP4) &&
            draw(&random) & 1)
            quantise_input(&moe, &random);
        mpad_gpu_plan plan, odd;
        mpad_status status;
        mpad_code code = mpad_gpu_plan_make(&target, &moe, &plan, &status);
        if (code != MPAD_OK) {
            bool is_named = strstr(status.message, "topk_ids") ||
                            strstr(status.message, "n_hidden") ||
                            strstr(status.message, "hidden_states") ||
                            strstr(status.message, "quant_activations");
            CHECK(code == MPAD_UNSUPPORTED && is_named, "%s", status.message);
            continue;
        }
        CHECK((plan.n_launch == 0) == (moe.n_token == 0), "%d launches", plan.n_launch);
        check_launches(&target, &plan);
        check_workspace(&moe, &plan);
        if (moe.n_token == 0)
            continue;
        check_args(&moe, &plan);
        make_odd(&moe, &random);
        code = mpad_gpu_plan_make(&target, &moe, &odd, &status);
        CHECK(code == MPAD_OK, "%s", status.message);
        check_launches(&target, &odd);
        check_workspace(&moe, &odd);
        CHECK(odd.workspace_bytes == plan.workspace_bytes, "bytes depend on pointers: %lld, %lld",
              (long long)plan.workspace_bytes, (long long)odd.workspace_bytes);
    }
}

/* Codes of OCP MX: one scale per 32 columns, the last ones of fewer; RDNA has no kernels. */
static void test_mx_activations(void)
{
    for (int i = 0; i < N_ARCH; i++) {
        uint64_t random = 1;
        mpad_gpu_target target = target_of(ARCHS[i]);
        mpad_moe moe = call_of(16, 8, 8, 264, 70, true);
        quantise(&moe, MPAD_QUANT_MXFP4, 128);
        quantise_input(&moe, &random);
        mpad_gpu_plan plan;
        mpad_status status;
        mpad_code code = mpad_gpu_plan_make(&target, &moe, &plan, &status);
        if (!target.have_tile) {
            CHECK(code == MPAD_UNSUPPORTED && strstr(status.message, "quant_activations: on gfx1"),
                  "%s", status.message);
            continue;
        }
        CHECK(code == MPAD_OK && !plan.is_code_byte, "%s", target.name);
        CHECK(plan.x.n_group == 9 && plan.h.n_group == 3, "groups: %d, %d", plan.x.n_group,
              plan.h.n_group);
        CHECK(plan.x.group_log2 == 5 && plan.x.phase == 0 && plan.h.n_lane == 4, "lanes: %d",
              plan.h.n_lane);
    }
}

/* A kernel that no call takes would be compiled and loaded for nothing. */
static void test_every_kernel_is_planned(void)
{
    for (int i = 0; mpad_gpu_symbol(i); i++)
        CHECK(is_planned[i], "%s", mpad_gpu_symbol(i));
}

static void test_regimes(void)
{
    static const struct {
        int64_t n_token;
        const char *regime;
    } calls[] = {{1, "decode"}, {16, "decode"}, {8192, "prefill"}};
    mpad_gpu_target target = target_of("gfx942:sramecc+:xnack-");
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        mpad_moe moe = call_of(calls[i].n_token, 8, 128, 4096, 192, true);
        mpad_gpu_plan plan;
        mpad_status status;
        CHECK(mpad_gpu_plan_make(&target, &moe, &plan, &status) == MPAD_OK, "%s", status.message);
        CHECK(strcmp(plan.regime, calls[i].regime) == 0, "%lld tokens: %s",
              (long long)calls[i].n_token, plan.regime);
    }
}

/* Loads of 16 bytes by a lane reach no column beyond the logical ones, and start aligned. */
static void expect_wide(const mpad_moe *moe, bool w13, bool w2)
{
    mpad_gpu_target target = target_of("sm_90a");
    mpad_gpu_plan plan;
    mpad_status status;
    CHECK(mpad_gpu_plan_make(&target, moe, &plan, &status) == MPAD_OK, "%s", status.message);
    mpad_gpu_args args;
    mpad_gpu_args_make(&plan, moe, NULL, MPAD_DTYPE_I32, NULL, &args);
    CHECK(args.is_w13_wide == w13 && args.is_w2_wide == w2, "%lld x %lld: w13 %d, w2 %d",
          (long long)moe->n_hidden, (long long)moe->n_inter, args.is_w13_wide, args.is_w2_wide);
}

static void test_wide_loads(void)
{
    static const struct {
        mpad_quant quant;
        int64_t n_hidden, n_inter;
        bool w13, w2;
    } calls[] = {
        {MPAD_QUANT_FP8_TENSOR, 4096, 192, true, true},
        {MPAD_QUANT_FP8_TENSOR, 4096, 200, true, false},
        {MPAD_QUANT_FP8_TENSOR, 72, 192, false, true},
        {MPAD_QUANT_MXFP4, 4096, 192, true, true},
        {MPAD_QUANT_MXFP4, 4096, 208, true, false},
        {MPAD_QUANT_NONE, 4096, 192, false, false},
    };
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        mpad_moe moe = call_of(4, 8, 128, calls[i].n_hidden, calls[i].n_inter, true);
        if (calls[i].quant != MPAD_QUANT_NONE)
            quantise(&moe, calls[i].quant, 128);
        expect_wide(&moe, calls[i].w13, calls[i].w2);
        moe.w13 = (const char *)moe.w13 + 8;
        expect_wide(&moe, false, calls[i].w2);
        moe.w2_ld_expert += 8;
        expect_wide(&moe, false, false);
    }
}

/* Which tiles multiply quantised weights on Hopper. */
static void test_hopper_tiles(void)
{
    static const struct {
        mpad_quant quant;
        int64_t int4_group, column_phase, n_token;
        mpad_dtype dtype;
        const char *first_product;
    } calls[] = {
        {MPAD_QUANT_FP8_TENSOR, 0, 0, 64, MPAD_DTYPE_BF16, "mpad_gate_up_decoded16_bf16_w8"},
        {MPAD_QUANT_INT8_CHANNEL, 0, 0, 256, MPAD_DTYPE_F16, "mpad_gate_up_decoded32_f16_w8"},
        {MPAD_QUANT_FP8_TENSOR, 0, 0, 512, MPAD_DTYPE_F16, "mpad_gate_up_wg64_f16_w8"},
        {MPAD_QUANT_FP8_BLOCK, 0, 64, 8192, MPAD_DTYPE_BF16, "mpad_gate_up_wg128_bf16_w8"},
        {MPAD_QUANT_FP8_BLOCK, 0, 32, 8192, MPAD_DTYPE_BF16, "mpad_gate_up_tile64_bf16_w8"},
        {MPAD_QUANT_MXFP4, 0, 0, 64, MPAD_DTYPE_BF16, "mpad_gate_up_decoded16_bf16_w4"},
        {MPAD_QUANT_MXFP4, 0, 0, 256, MPAD_DTYPE_BF16, "mpad_gate_up_wg64_bf16_w4"},
        {MPAD_QUANT_MXFP4, 0, 0, 64, MPAD_DTYPE_F16, "mpad_gate_up_tile16_f16_w4"},
        {MPAD_QUANT_INT4_GROUP, 128, 0, 64, MPAD_DTYPE_F16, "mpad_gate_up_decoded16_f16_w4"},
        {MPAD_QUANT_INT4_GROUP, 64, 0, 64, MPAD_DTYPE_F16, "mpad_gate_up_tile16_f16_w4"},
    };
    mpad_gpu_target target = target_of("sm_90a");
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        mpad_moe moe = call_of(calls[i].n_token, 8, 128, 4096, 192, true);
        quantise(&moe, calls[i].quant, calls[i].int4_group);
        moe.dtype = calls[i].dtype;
        if (calls[i].quant == MPAD_QUANT_FP8_BLOCK) {
            moe.w13_scale.ld_column = moe.w2_scale.ld_column = 1;
            moe.w13_scale.block_row = moe.w2_scale.block_row = 128;
            moe.w13_scale.block_column = moe.w2_scale.block_column = 128;
            moe.w2_scale.column_phase = calls[i].column_phase;
        }
        mpad_gpu_plan plan;
        mpad_status status;
        CHECK(mpad_gpu_plan_make(&target, &moe, &plan, &status) == MPAD_OK, "%s", status.message);
        bool is_found = false;
        for (int l = 0; l < plan.n_launch; l++)
            is_found = is_found || strcmp(plan.launch[l].symbol, calls[i].first_product) == 0;
        CHECK(is_found, "call %zu: no %s", i, calls[i].first_product);
    }
}

static void expect_refusal(mpad_moe moe, const char *word)
{
    mpad_gpu_target target = target_of("gfx942");
    mpad_gpu_plan plan;
    mpad_status status = {.message = "taken"};
    mpad_code code = mpad_gpu_plan_make(&target, &moe, &plan, &status);
    CHECK(code == MPAD_UNSUPPORTED && strstr(status.message, word), "%s: %s", word, status.message);
}

static void test_refusals(void)
{
    mpad_moe moe = call_of(4, 2, 8, 64, 32, true);
    moe.dtype = MPAD_DTYPE_F32;
    expect_refusal(moe, "hidden_states: on a GPU bf16 or f16");
    expect_refusal(call_of(4, 2, 8, 60, 32, true), "n_hidden: on a GPU a multiple of 8, got 60");
    expect_refusal(call_of(4, 33, 64, 64, 32, true), "at most 32 slots per token, got 33");
    expect_refusal(call_of(4, 2, 1025, 64, 32, true), "at most 1024 experts, got 1025");
    expect_refusal(call_of(1 << 22, 32, 8, 64, 32, true), "too many slots");
    expect_refusal(call_of(4, 2, 8, 1 << 16, 1 << 14, true), "below 2 GiB");
    mpad_gpu_target target;
    mpad_status status;
    CHECK(mpad_gpu_target_make("gfx906", 60, &target, &status) == MPAD_UNSUPPORTED &&
              strstr(status.message, "no kernels for gfx906") && strstr(status.message, "gfx942"),
          "%s", status.message);
}

int main(void)
{
    test_mx_activations();
    test_any_sizes();
    test_every_kernel_is_planned();
    test_regimes();
    test_wide_loads();
    test_hopper_tiles();
    test_refusals();
    if (n_fail == 0)
        printf("all checks passed\n");
    return n_fail != 0;
}
