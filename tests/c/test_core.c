/* The C core without Python: status, plan, pool, copy and the CPU engine on every instruction set
 * the machine has. tests/test_core.py builds it plain, under ASan + UBSan, under TSan, and for
 * aarch64.
 *
 * Every tensor is a heap block that ends at the last element the contract lets the engine read, and
 * holds NaN wherever the contract says pad. The expected values come from the double-precision loop
 * in this file, with an error bound made of the roundings the contract allows. */
#include "check.h"
#include "copy.h"
#include "cpu.h"
#include "plan.h"
#include "pool.h"

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* --no-fork: user-mode emulators may hang when a threaded guest forks. */
static bool can_fork = true;

static void *allocate(size_t n_bytes)
{
    void *block = malloc(n_bytes ? n_bytes : 1);
    if (!block) {
        printf("out of memory: %zu bytes\n", n_bytes);
        exit(1);
    }
    return block;
}

static double draw_unit(uint64_t *state)
{
    return (double)(int64_t)draw(state) / 9223372036854775808.0;
}

/* Element types, by definition rather than by the engine's conversions. */
static size_t size_of(mpad_dtype dtype)
{
    return dtype == MPAD_DTYPE_F32 || dtype == MPAD_DTYPE_I32 ? 4 : dtype == MPAD_DTYPE_I64 ? 8 : 2;
}

static int significand_bits(mpad_dtype dtype)
{
    return dtype == MPAD_DTYPE_F32 ? 24 : dtype == MPAD_DTYPE_BF16 ? 8 : 11;
}

static double unit_roundoff(mpad_dtype dtype)
{
    return ldexp(1.0, -significand_bits(dtype));
}

static void store(void *base, mpad_dtype dtype, int64_t i, double value)
{
    float f = (float)value;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (dtype == MPAD_DTYPE_F32) {
        memcpy((char *)base + 4 * i, &f, 4);
    } else if (dtype == MPAD_DTYPE_BF16) {
        uint16_t half = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
        memcpy((char *)base + 2 * i, &half, 2);
    } else { /* F16; the tests store normal numbers only, cut to 11 bits */
        int exponent;
        double fraction = frexp(f, &exponent); /* |fraction| in [0.5, 1) */
        uint16_t half = 0;
        if (fabs(value) >= ldexp(1.0, -14))
            half = (uint16_t)((value < 0 ? 0x8000 : 0) | (exponent + 14) << 10 |
                              ((int)(fabs(fraction) * 2048) & 1023));
        memcpy((char *)base + 2 * i, &half, 2);
    }
}

static double load(const void *base, mpad_dtype dtype, int64_t i)
{
    if (dtype == MPAD_DTYPE_F32) {
        float f;
        memcpy(&f, (const char *)base + 4 * i, 4);
        return f;
    }
    uint16_t half;
    memcpy(&half, (const char *)base + 2 * i, 2);
    if (dtype == MPAD_DTYPE_BF16) {
        uint32_t bits = (uint32_t)half << 16;
        float f;
        memcpy(&f, &bits, 4);
        return f;
    }
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? ldexp(fraction, -24)
                                       : ldexp(fraction + 1024, exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

/* ---- status ---- */

static mpad_code fail_unless(bool condition, mpad_status *status)
{
    MPAD_REQUIRE(condition, status, MPAD_UNSUPPORTED, "w13: %d", 7);
    return MPAD_OK;
}

static void test_status(void)
{
    mpad_status status = {MPAD_OK, ""};
    CHECK(fail_unless(true, &status) == MPAD_OK && !status.message[0], "%s", status.message);
    CHECK(fail_unless(false, &status) == MPAD_UNSUPPORTED, "code %d", status.code);
    CHECK(status.code == MPAD_UNSUPPORTED && !strcmp(status.message, "w13: 7"), "%s",
          status.message);

    char text[2 * sizeof status.message];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    mpad_fail(&status, MPAD_VALUE, "%s", text);
    CHECK(strlen(status.message) == sizeof status.message - 1, "%zu", strlen(status.message));
}

/* ---- plan ---- */

static mpad_plan_request request_of(int64_t n_hidden, int64_t n_inter, int64_t n_expert)
{
    return (mpad_plan_request){.n_hidden = n_hidden,
                               .n_inter = n_inter,
                               .n_expert = n_expert,
                               .is_gated = true,
                               .quant = MPAD_QUANT_NONE,
                               .dtype = MPAD_DTYPE_BF16,
                               .block_n = 128,
                               .block_k = 128,
                               .tp_size = 1,
                               .ep_size = 1,
                               .split = MPAD_SPLIT_TRUE,
                               .align = 1};
}

static void test_plan_values(void)
{
    mpad_status status = {MPAD_OK, ""};
    mpad_plan plan;
    mpad_plan_request request = request_of(4096, 1536, 128);
    request.tp_size = 8;
    request.tp_rank = 3;
    request.align = 128;
    CHECK(mpad_plan_make(&request, &plan, &status) == MPAD_OK, "%s", status.message);
    CHECK(plan.n_inter == 192 && plan.n_inter_pad == 256, "%" PRId64 " %" PRId64, plan.n_inter,
          plan.n_inter_pad);
    CHECK(plan.start == 576 && plan.stop == 768, "%" PRId64 " %" PRId64, plan.start, plan.stop);
    CHECK(plan.w13.n_dim == 3 && plan.w13.size[0] == 128 && plan.w13.size[1] == 512 &&
              plan.w13.size[2] == 4096,
          "w13 rows %" PRId64, plan.w13.size[1]);
    CHECK(plan.w2.n_dim == 3 && plan.w2.size[1] == 4096 && plan.w2.size[2] == 256,
          "w2 columns %" PRId64, plan.w2.size[2]);
    CHECK(plan.nbytes == (int64_t)128 * 3 * 256 * 4096 * 2, "%" PRId64, plan.nbytes);
    CHECK(plan.pad_nbytes == (int64_t)128 * 3 * 64 * 4096 * 2, "%" PRId64, plan.pad_nbytes);
    CHECK(plan.w13_scale.n_dim == 0 && plan.w13_bias.n_dim == 0, "%d", plan.w13_scale.n_dim);

    request.tp_rank = 8;
    CHECK(mpad_plan_make(&request, &plan, &status) == MPAD_VALUE, "%d", status.code);
    CHECK(strstr(status.message, "tp_rank"), "%s", status.message);
}

/* Over the ranks of any split the columns and experts are the checkpoint's, each once. */
static void test_plan_cover(uint64_t *state)
{
    for (int trial = 0; trial < 500; trial++) {
        mpad_status status = {MPAD_OK, ""};
        mpad_plan_request request = request_of(1 + draw_below(state, 300), draw_below(state, 700),
                                               1 + draw_below(state, 40));
        request.tp_size = 1 + draw_below(state, 17);
        request.ep_size = 1;
        request.split = (mpad_split)draw_below(state, MPAD_SPLIT_COUNT);
        request.align = (int64_t)1 << draw_below(state, 9);
        int64_t n_column = 0;
        for (request.tp_rank = 0; request.tp_rank < request.tp_size; request.tp_rank++) {
            mpad_plan plan;
            mpad_code code = mpad_plan_make(&request, &plan, &status);
            if (code == MPAD_UNSUPPORTED)
                continue;
            CHECK(code == MPAD_OK, "%s", status.message);
            CHECK(plan.n_inter == 0 || plan.start == n_column,
                  "rank %" PRId64 " starts at %" PRId64 ", expected %" PRId64, request.tp_rank,
                  plan.start, n_column);
            CHECK(plan.stop - plan.start == plan.n_inter, "%" PRId64, plan.n_inter);
            CHECK(plan.n_inter_pad >= plan.n_inter && plan.n_inter_pad % request.align == 0,
                  "%" PRId64 " padded to %" PRId64, plan.n_inter, plan.n_inter_pad);
            n_column += plan.n_inter;
        }
        CHECK(n_column == request.n_inter, "%" PRId64 " of %" PRId64 " columns", n_column,
              request.n_inter);
    }
}

/* Any integers at all: a plan or a message, and no overflow for UBSan to see. */
static void test_plan_hostile(uint64_t *state)
{
    static const int64_t corners[] = {
        INT64_MIN,     INT64_MIN + 1, -1,       0, 1, 2, 31, 32, 127, 128, INT32_MAX,
        INT64_MAX / 2, INT64_MAX - 1, INT64_MAX};
    enum { N_CORNER = sizeof corners / sizeof *corners };
#define CORNER()                                                                                   \
    (draw_below(state, 3) ? draw_below(state, 5000) : corners[draw_below(state, N_CORNER)])
    for (int trial = 0; trial < 20000; trial++) {
        mpad_status status = {MPAD_OK, ""};
        mpad_plan_request request = {.n_hidden = CORNER(),
                                     .n_inter = CORNER(),
                                     .n_expert = CORNER(),
                                     .is_gated = draw(state) & 1,
                                     .quant = (mpad_quant)draw_below(state, MPAD_QUANT_COUNT),
                                     .dtype = (mpad_dtype)draw_below(state, MPAD_DTYPE_COUNT),
                                     .block_n = CORNER(),
                                     .block_k = CORNER(),
                                     .tp_size = CORNER(),
                                     .tp_rank = CORNER(),
                                     .ep_size = CORNER(),
                                     .ep_rank = CORNER(),
                                     .split = (mpad_split)draw_below(state, MPAD_SPLIT_COUNT),
                                     .align = CORNER(),
                                     .have_bias = draw(state) & 1};
        mpad_plan plan;
        mpad_code code = mpad_plan_make(&request, &plan, &status);
        if (code == MPAD_OK)
            CHECK(plan.nbytes >= plan.pad_nbytes && plan.pad_nbytes >= 0 &&
                      plan.n_inter_pad >= plan.n_inter && plan.n_inter >= 0,
                  "%" PRId64 " bytes, %" PRId64 " of them pad", plan.nbytes, plan.pad_nbytes);
        else
            CHECK(status.code == code && status.message[0], "code %d without a message", code);
    }
#undef CORNER
}

/* SGLang's values, padding.md 1.2 of the design's facts. */
static void test_weight_sizes(void)
{
    static const struct {
        int64_t inter_dim;
        bool is_concat, is_packed, is_aiter;
        int64_t w13, w2;
        bool is_padded;
    } rows[] = {
        {192, true, false, true, 512, 256, true},    {192, true, true, true, 512, 128, true},
        {128, true, true, true, 512, 128, true},     {256, true, true, true, 512, 128, false},
        {384, true, true, true, 1024, 256, true},    {96, true, false, true, 256, 128, true},
        {192, false, false, true, 192, 256, true},   {192, false, true, true, 384, 128, true},
        {192, true, false, false, 384, 192, false},  {33, true, true, false, 66, 16, false},
        {192, false, false, false, 192, 192, false},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int64_t w13, w2;
        bool is_padded;
        mpad_moe_weight_sizes(rows[i].inter_dim, rows[i].is_concat, rows[i].is_packed,
                              rows[i].is_aiter, &w13, &w2, &is_padded);
        CHECK(w13 == rows[i].w13 && w2 == rows[i].w2 && is_padded == rows[i].is_padded,
              "row %zu: got %" PRId64 ", %" PRId64 ", %d", i, w13, w2, is_padded);
    }
}

static void test_plan(void)
{
    uint64_t state = 1;
    test_weight_sizes();
    test_plan_values();
    test_plan_cover(&state);
    test_plan_hostile(&state);
}

/* ---- pool ---- */

enum { MAX_THREAD = 16, N_PHASE = 20 };

typedef struct gang {
    int n_thread; /* as the first body saw it */
    int n_visit[MAX_THREAD];
    int phase[MAX_THREAD]; /* plain memory: only the barrier orders the accesses */
    int n_stale;
} gang;

static void gang_body(void *context, int thread, int n_thread)
{
    gang *g = context;
    g->n_visit[thread]++;
    if (thread == 0)
        g->n_thread = n_thread;
    for (int phase = 1; phase <= N_PHASE; phase++) {
        g->phase[thread] = phase;
        mpad_pool_barrier(context, thread);
        for (int other = 0; other < n_thread; other++)
            if (g->phase[other] != phase)
                __atomic_fetch_add(&g->n_stale, 1, __ATOMIC_RELAXED);
        mpad_pool_barrier(context, thread);
    }
}

static void check_gang(int n_thread)
{
    gang g = {0};
    mpad_pool_run(n_thread, gang_body, &g);
    CHECK(g.n_thread >= 1 && g.n_thread <= n_thread, "%d of %d threads", g.n_thread, n_thread);
    for (int thread = 0; thread < MAX_THREAD; thread++)
        CHECK(g.n_visit[thread] == (thread < g.n_thread), "thread %d ran %d times", thread,
              g.n_visit[thread]);
    CHECK(g.n_stale == 0, "%d reads went past the barrier", g.n_stale);
}

static void *pool_caller(void *argument)
{
    for (int i = 0; i < 50; i++)
        check_gang(1 + (i + *(int *)argument) % 7);
    return NULL;
}

static void run_in_threads(int n, void *(*body)(void *))
{
    pthread_t threads[MAX_THREAD];
    int numbers[MAX_THREAD];
    for (int i = 0; i < n; i++) {
        numbers[i] = i;
        if (pthread_create(&threads[i], NULL, body, &numbers[i])) {
            printf("pthread_create failed\n");
            exit(1);
        }
    }
    for (int i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
}

/* A child of a process whose pool is warm has none of its threads. */
static void test_fork(void (*body)(void))
{
    enum { LIMIT_S = 60 };
    if (!can_fork)
        return;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(LIMIT_S);
        n_fail = 0;
        body();
        fflush(stdout);
        _exit(n_fail != 0);
    }
    int how = 0;
    CHECK(child > 0 && waitpid(child, &how, 0) == child, "fork");
    CHECK(WIFEXITED(how) && WEXITSTATUS(how) == 0, "the child ended with status %#x", how);
}

static void check_gang_of_four(void)
{
    for (int i = 0; i < 20; i++)
        check_gang(4);
}

static void test_pool(void)
{
    CHECK(mpad_pool_default_threads() >= 1, "%d", mpad_pool_default_threads());
    mpad_pool_set_threads(7);
    CHECK(mpad_pool_threads() == 7, "%d", mpad_pool_threads());
    mpad_pool_set_threads(0);
    CHECK(mpad_pool_threads() == mpad_pool_default_threads(), "%d", mpad_pool_threads());
    for (int n_thread = 1; n_thread <= MAX_THREAD; n_thread++)
        check_gang(n_thread);
    check_gang_of_four();
    test_fork(check_gang_of_four);
    check_gang_of_four();
    run_in_threads(6, pool_caller);
}

/* ---- copy ---- */

static char *element(const mpad_view *view, int64_t i, int64_t j, int64_t k)
{
    return view->data + i * view->stride[0] + j * view->stride[1] + k * view->stride[2];
}

/* A random view of `size` in a fresh block at *base of *n_bytes: axes in any order, steps, gaps,
 * either direction. The block ends with the element of the highest address. */
static mpad_view view_make(const int64_t *size, int64_t n_item_bytes, uint64_t *state, char **base,
                           size_t *n_bytes)
{
    mpad_view view = {.n_dim = 3,
                      .size = {size[0], size[1], size[2]},
                      .n_item_bytes = n_item_bytes,
                      .dtype = MPAD_DTYPE_COUNT,
                      .is_writable = true};
    int order[3] = {0, 1, 2};
    for (int i = 2; i > 0; i--) {
        int j = (int)draw_below(state, i + 1), swapped = order[i];
        order[i] = order[j];
        order[j] = swapped;
    }
    int64_t extent = n_item_bytes, lowest = 0, highest = 0;
    for (int i = 0; i < 3; i++) {
        int64_t n = size[order[i]], step = extent * (1 + draw_below(state, 2));
        extent = step * n;
        if (draw_below(state, 3) == 0)
            step = -step;
        view.stride[order[i]] = step;
        *(step < 0 ? &lowest : &highest) += step * (n - 1);
    }
    *n_bytes = (size_t)(highest - lowest + n_item_bytes);
    *base = allocate(*n_bytes);
    view.data = *base - lowest;
    return view;
}

static void test_copy(void)
{
    uint64_t state = 3;
    mpad_pool_set_threads(3);
    for (int trial = 0; trial < 300; trial++) {
        mpad_status status = {MPAD_OK, ""};
        int64_t longest = trial % 10 ? 40 : 300; /* some large enough for several threads */
        int64_t size[3] = {1 + draw_below(&state, 8), 1 + draw_below(&state, longest),
                           1 + draw_below(&state, longest)};
        int64_t n_item_bytes = (int64_t)1 << draw_below(&state, 4);
        char *from, *to;
        size_t n_from, n_to;
        mpad_view src = view_make(size, n_item_bytes, &state, &from, &n_from);
        mpad_view dst = view_make(size, n_item_bytes, &state, &to, &n_to);
        for (size_t i = 0; i < n_from; i++)
            from[i] = (char)draw(&state);
        char *expected = allocate(n_to);
        memset(to, 0x5A, n_to);
        memset(expected, 0x5A, n_to);
        for (int64_t i = 0; i < size[0]; i++)
            for (int64_t j = 0; j < size[1]; j++)
                for (int64_t k = 0; k < size[2]; k++)
                    memcpy(expected + (element(&dst, i, j, k) - to), element(&src, i, j, k),
                           (size_t)n_item_bytes);
        CHECK(mpad_copy(&dst, &src, &status) == MPAD_OK, "%s", status.message);
        CHECK(!memcmp(to, expected, n_to), "trial %d", trial);

        dst.size[1]++;
        CHECK(mpad_copy(&dst, &src, &status) == MPAD_VALUE, "trial %d: code %d", trial,
              status.code);
        CHECK(!memcmp(to, expected, n_to), "trial %d wrote before it failed", trial);
        free(expected);
        free(from);
        free(to);
    }
    mpad_pool_set_threads(0);
}

/* ---- engine ---- */

typedef struct engine_case {
    mpad_dtype dtype;
    mpad_act act;
    bool is_gated, is_interleaved, have_bias, is_weight_on_input, have_map, have_skip;
    int n_token, n_topk, n_expert, n_hidden, n_inter, n_inter_pad;
    float limit;
} engine_case;

static const engine_case ENGINE_CASES[] = {
#define F32 MPAD_DTYPE_F32
#define BF16 MPAD_DTYPE_BF16
#define F16 MPAD_DTYPE_F16
    /* dtype, act, gated, interleaved, bias, on input, map, skip, M, k, E, H, I, Ip, limit */
    {F32, MPAD_ACT_SILU, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, INFINITY},
    {F32, MPAD_ACT_SILU, 1, 0, 0, 0, 0, 1, 5, 2, 4, 64, 33, 64, INFINITY},
    {F32, MPAD_ACT_GELU, 1, 1, 1, 0, 1, 1, 37, 3, 6, 67, 48, 51, INFINITY},
    {F32, MPAD_ACT_RELU2, 0, 0, 1, 0, 0, 0, 19, 2, 3, 40, 29, 32, INFINITY},
    {F32, MPAD_ACT_SILU, 1, 0, 0, 1, 0, 0, 9, 1, 2, 16, 0, 16, INFINITY},
    {BF16, MPAD_ACT_SILU, 1, 0, 0, 0, 0, 0, 1, 2, 4, 64, 32, 32, INFINITY},
    {BF16, MPAD_ACT_SILU, 1, 0, 0, 1, 0, 1, 7, 2, 5, 129, 65, 128, INFINITY},
    {BF16, MPAD_ACT_SWIGLUOAI, 1, 1, 1, 0, 1, 1, 130, 4, 8, 96, 90, 96, 0.7f},
    {BF16, MPAD_ACT_GELU, 0, 0, 0, 0, 0, 0, 33, 2, 3, 31, 17, 17, INFINITY},
    {BF16, MPAD_ACT_GELU_TANH, 1, 0, 1, 0, 0, 0, 64, 8, 16, 128, 192, 256, 0.5f},
    {BF16, MPAD_ACT_SILU, 1, 0, 0, 0, 0, 1, 600, 2, 3, 120, 24, 32, INFINITY},
    {F16, MPAD_ACT_SILU, 0, 0, 1, 1, 0, 1, 21, 2, 4, 72, 63, 64, INFINITY},
    {F16, MPAD_ACT_SILU, 1, 0, 0, 0, 1, 0, 3, 2, 4, 256, 96, 128, INFINITY},
    {F16, MPAD_ACT_SWIGLUOAI, 1, 0, 1, 0, 0, 1, 17, 2, 4, 33, 31, 40, 1.0f},
#undef F32
#undef BF16
#undef F16
};
enum { N_ENGINE_CASE = sizeof ENGINE_CASES / sizeof *ENGINE_CASES };

/* Columns and rows of out beyond the logical ones (set to zero), then guard (left alone). */
enum { HIDDEN_EXTRA = 3, HIDDEN_GUARD = 5, TOKEN_EXTRA = 2, GUARD_BYTE = 0xA5 };

typedef struct problem {
    mpad_moe moe;
    void *hidden, *w13, *w2, *w13_bias, *w2_bias, *topk_weights, *topk_ids, *expert_map;
    size_t out_bytes;
} problem;

static void *filled(size_t n_element, mpad_dtype dtype)
{
    void *block = allocate(n_element * size_of(dtype));
    memset(block, 0xFF, n_element * size_of(dtype)); /* NaN in all three float types */
    return block;
}

static problem problem_make(const engine_case *c, uint64_t *state)
{
    problem p = {0};
    mpad_moe *moe = &p.moe;
    int64_t n_half = c->n_inter_pad, n_row = n_half * (c->is_gated ? 2 : 1);
    *moe = (mpad_moe){.n_token = c->n_token,
                      .n_token_pad = c->n_token + TOKEN_EXTRA,
                      .n_topk = c->n_topk,
                      .n_expert = c->n_expert,
                      .n_expert_global = c->n_expert * (c->have_map ? 2 : 1),
                      .n_hidden = c->n_hidden,
                      .n_hidden_pad = c->n_hidden + HIDDEN_EXTRA,
                      .n_inter = c->n_inter,
                      .dtype = c->dtype,
                      .act = c->act,
                      .is_gated = c->is_gated,
                      .is_weight_on_input = c->is_weight_on_input,
                      .routed_scaling = 1.25f,
                      .swiglu_alpha = 1.702f,
                      .swiglu_limit = c->limit};
    moe->ld_hidden = c->n_hidden + 1;
    moe->ld_out = moe->n_hidden_pad + HIDDEN_GUARD;
    moe->w13_ld_row = c->n_hidden + 2;
    moe->w13_ld_expert = n_row * moe->w13_ld_row;
    moe->w13_up_offset = n_half * moe->w13_ld_row;
    moe->w13_bias_ld_row = 1;
    moe->w13_bias_ld_expert = n_row;
    moe->w13_bias_up_offset = n_half;
    if (c->is_interleaved) {
        moe->w13_up_offset = moe->w13_ld_row;
        moe->w13_ld_row *= 2;
        moe->w13_bias_ld_row = 2;
        moe->w13_bias_up_offset = 1;
    }
    moe->w2_ld_row = n_half;
    moe->w2_ld_expert = c->n_hidden * n_half;
    moe->w2_bias_ld_expert = c->n_hidden;
    moe->topk_weights_dtype = c->n_topk % 2 ? MPAD_DTYPE_F32 : MPAD_DTYPE_BF16;
    moe->ld_topk_weights = c->n_topk;
    moe->topk_ids_dtype = c->have_map ? MPAD_DTYPE_I64 : MPAD_DTYPE_I32;
    moe->ld_topk_ids = c->n_topk;
    moe->expert_map_dtype = MPAD_DTYPE_I32;

    /* Each block ends where the last logical element of its last row does. */
    int64_t last_row =
        (int64_t)(c->n_inter - 1) * moe->w13_ld_row + (c->is_gated ? moe->w13_up_offset : 0);
    int64_t n_w13 =
        c->n_inter ? (c->n_expert - 1) * moe->w13_ld_expert + last_row + c->n_hidden : 0;
    int64_t n_w2 = c->n_inter ? (c->n_expert - 1) * moe->w2_ld_expert +
                                    (c->n_hidden - 1) * moe->w2_ld_row + c->n_inter
                              : 0;
    int64_t n_hidden_all = (c->n_token - 1) * moe->ld_hidden + c->n_hidden;
    moe->hidden = p.hidden = filled((size_t)n_hidden_all, c->dtype);
    moe->w13 = p.w13 = filled((size_t)n_w13, c->dtype);
    moe->w2 = p.w2 = filled((size_t)n_w2, c->dtype);
    for (int64_t m = 0; m < c->n_token; m++)
        for (int64_t i = 0; i < c->n_hidden; i++)
            store(p.hidden, c->dtype, m * moe->ld_hidden + i, draw_unit(state));
    for (int64_t e = 0; e < c->n_expert; e++) {
        for (int64_t j = 0; j < c->n_inter; j++)
            for (int up = 0; up <= c->is_gated; up++)
                for (int64_t i = 0; i < c->n_hidden; i++)
                    store(p.w13, c->dtype,
                          e * moe->w13_ld_expert + j * moe->w13_ld_row + up * moe->w13_up_offset +
                              i,
                          draw_unit(state) * 0.3);
        for (int64_t n = 0; n < c->n_hidden; n++)
            for (int64_t j = 0; j < c->n_inter; j++)
                store(p.w2, c->dtype, e * moe->w2_ld_expert + n * moe->w2_ld_row + j,
                      draw_unit(state) * 0.3);
    }
    if (c->have_bias) {
        moe->w13_bias_dtype = c->dtype;
        moe->w2_bias_dtype = MPAD_DTYPE_F32;
        moe->w13_bias = p.w13_bias = filled((size_t)(c->n_expert * n_row), c->dtype);
        moe->w2_bias = p.w2_bias = filled((size_t)(c->n_expert * c->n_hidden), MPAD_DTYPE_F32);
        for (int64_t e = 0; e < c->n_expert; e++) {
            for (int64_t j = 0; j < c->n_inter; j++)
                for (int up = 0; up <= c->is_gated; up++)
                    store(p.w13_bias, c->dtype,
                          e * moe->w13_bias_ld_expert + j * moe->w13_bias_ld_row +
                              up * moe->w13_bias_up_offset,
                          draw_unit(state));
            for (int64_t n = 0; n < c->n_hidden; n++)
                store(p.w2_bias, MPAD_DTYPE_F32, e * c->n_hidden + n, draw_unit(state));
        }
    }

    int64_t n_slot = (int64_t)c->n_token * c->n_topk;
    moe->topk_weights = p.topk_weights = filled((size_t)n_slot, moe->topk_weights_dtype);
    moe->topk_ids = p.topk_ids = filled((size_t)n_slot, moe->topk_ids_dtype);
    for (int64_t i = 0; i < n_slot; i++) {
        int64_t id = c->have_skip && draw_below(state, 4) == 0
                         ? -1
                         : draw_below(state, moe->n_expert_global);
        if (moe->topk_ids_dtype == MPAD_DTYPE_I64)
            ((int64_t *)p.topk_ids)[i] = id;
        else
            ((int32_t *)p.topk_ids)[i] = (int32_t)id;
        store(p.topk_weights, moe->topk_weights_dtype, i, 0.5 + 0.4 * draw_unit(state));
    }
    if (c->have_map) { /* odd global ids live on another rank */
        moe->expert_map = p.expert_map = filled((size_t)moe->n_expert_global, MPAD_DTYPE_I32);
        for (int32_t e = 0; e < moe->n_expert_global; e++)
            ((int32_t *)p.expert_map)[e] = e % 2 ? -1 : e / 2;
    }
    p.out_bytes = (size_t)(moe->n_token_pad * moe->ld_out) * size_of(c->dtype);
    return p;
}

static void problem_free(problem *p)
{
    free(p->hidden);
    free(p->w13);
    free(p->w2);
    free(p->w13_bias);
    free(p->w2_bias);
    free(p->topk_weights);
    free(p->topk_ids);
    free(p->expert_map);
}

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

/* The activation, and in *slope a bound of its derivative by gate. */
static double activate(const mpad_moe *moe, double gate, double up, double *slope)
{
    enum { STEEPEST = 2 }; /* of silu, gelu, gelu_tanh, x * sigmoid(alpha * x), with room */
    if (moe->is_gated) {
        gate = fmin(gate, moe->swiglu_limit);
        up = fmax(fmin(up, moe->swiglu_limit), -(double)moe->swiglu_limit);
    } else {
        up = 1;
    }
    *slope = STEEPEST * fabs(up);
    switch (moe->act) {
    case MPAD_ACT_SILU:
        return gate * sigmoid(gate) * up;
    case MPAD_ACT_GELU:
        return 0.5 * gate * (1 + erf(gate * sqrt(0.5))) * up;
    case MPAD_ACT_GELU_TANH:
        return 0.5 * gate *
               (1 + tanh(0.79788456080286535588 * (gate + 0.044715 * gate * gate * gate))) * up;
    case MPAD_ACT_SWIGLUOAI:
        *slope = STEEPEST * fabs(up + 1);
        return gate * sigmoid(moe->swiglu_alpha * gate) * (up + 1);
    default:
        *slope = STEEPEST * fabs(gate);
        return gate > 0 ? gate * gate : 0;
    }
}

/* One row of w13 times x, with the sum of magnitudes that bounds its rounding. */
static double pre_activation(const mpad_moe *moe, int64_t token, int64_t expert, int64_t row,
                             bool is_up, double scale, double *magnitude)
{
    int64_t at =
        expert * moe->w13_ld_expert + row * moe->w13_ld_row + (is_up ? moe->w13_up_offset : 0);
    double sum = 0;
    *magnitude = 0;
    for (int64_t i = 0; i < moe->n_hidden; i++) {
        double product = load(moe->hidden, moe->dtype, token * moe->ld_hidden + i) *
                         load(moe->w13, moe->dtype, at + i) * scale;
        sum += product;
        *magnitude += fabs(product);
    }
    if (moe->w13_bias) {
        double bias = load(moe->w13_bias, moe->w13_bias_dtype,
                           expert * moe->w13_bias_ld_expert + row * moe->w13_bias_ld_row +
                               (is_up ? moe->w13_bias_up_offset : 0));
        sum += bias;
        *magnitude += fabs(bias);
    }
    return sum;
}

static int64_t local_expert(const mpad_moe *moe, int64_t token, int64_t slot)
{
    int64_t i = token * moe->ld_topk_ids + slot;
    int64_t id = moe->topk_ids_dtype == MPAD_DTYPE_I64 ? ((const int64_t *)moe->topk_ids)[i]
                                                       : ((const int32_t *)moe->topk_ids)[i];
    return id < 0 || !moe->expert_map ? id : ((const int32_t *)moe->expert_map)[id];
}

/* Adds to value[H] one slot's result, and to bound[H] how far a float32 engine may be off. */
static void expect_slot(const mpad_moe *moe, int64_t token, int64_t slot, double *value,
                        double *bound)
{
    const double u32 = unit_roundoff(MPAD_DTYPE_F32), u = unit_roundoff(moe->dtype);
    const double tiny = ldexp(1.0, -25); /* half the smallest f16; flushed bf16 are far below */
    int64_t expert = local_expert(moe, token, slot);
    if (expert < 0)
        return;
    double weight =
        load(moe->topk_weights, moe->topk_weights_dtype, token * moe->ld_topk_weights + slot);
    double weight_in = moe->is_weight_on_input ? weight : 1;
    double weight_out = moe->is_weight_on_input ? 1 : weight;
    double *h = allocate(sizeof(double) * (size_t)moe->n_inter);
    double *h_error = allocate(sizeof(double) * (size_t)moe->n_inter);
    for (int64_t j = 0; j < moe->n_inter; j++) {
        double gate_magnitude, up_magnitude = 0, slope, up_slope, up = 1;
        double gate = pre_activation(moe, token, expert, j, false, weight_in, &gate_magnitude);
        if (moe->is_gated)
            up = pre_activation(moe, token, expert, j, true, weight_in, &up_magnitude);
        h[j] = activate(moe, gate, up, &slope);
        up_slope = fabs(gate) + 1;
        h_error[j] = u * fabs(h[j]) + tiny * (moe->dtype == MPAD_DTYPE_F16) +
                     u32 * ((double)moe->n_hidden + 16) *
                         (gate_magnitude * slope + up_magnitude * up_slope) +
                     8 * u32 * (fabs(gate) + 1) * (fabs(up) + 1);
    }
    for (int64_t n = 0; n < moe->n_hidden; n++) {
        double sum = 0, magnitude = 0, error = 0;
        for (int64_t j = 0; j < moe->n_inter; j++) {
            double w =
                load(moe->w2, moe->dtype, expert * moe->w2_ld_expert + n * moe->w2_ld_row + j);
            sum += w * h[j];
            magnitude += fabs(w * h[j]);
            error += fabs(w) * h_error[j];
        }
        if (moe->w2_bias) {
            double bias =
                load(moe->w2_bias, moe->w2_bias_dtype, expert * moe->w2_bias_ld_expert + n);
            sum += bias;
            magnitude += fabs(bias);
        }
        value[n] += weight_out * sum * moe->routed_scaling;
        bound[n] += fabs(weight_out) * moe->routed_scaling *
                    (error + u32 * (double)(moe->n_inter + moe->n_topk + 16) * magnitude);
    }
    free(h);
    free(h_error);
}

static void check_out(const mpad_moe *moe, const char *label)
{
    const double u = unit_roundoff(moe->dtype);
    size_t n_hidden_bytes = sizeof(double) * (size_t)moe->n_hidden;
    double *value = allocate(n_hidden_bytes), *bound = allocate(n_hidden_bytes);
    int n_bad = 0;
    for (int64_t m = 0; m < moe->n_token_pad; m++) {
        memset(value, 0, n_hidden_bytes);
        memset(bound, 0, n_hidden_bytes);
        for (int64_t slot = 0; m < moe->n_token && slot < moe->n_topk; slot++)
            expect_slot(moe, m, slot, value, bound);
        for (int64_t n = 0; n < moe->n_hidden_pad; n++) {
            double got = load(moe->out, moe->dtype, m * moe->ld_out + n);
            double expected = n < moe->n_hidden ? value[n] : 0;
            double allowed = n < moe->n_hidden && m < moe->n_token
                                 ? bound[n] + u * fabs(expected) + ldexp(1.0, -24)
                                 : 0;
            if (!(fabs(got - expected) <= allowed) && n_bad++ == 0)
                CHECK(false, "%s: out[%" PRId64 ", %" PRId64 "] = %g, expected %g +- %g", label, m,
                      n, got, expected, allowed);
        }
        const unsigned char *row =
            (const unsigned char *)moe->out + (size_t)(m * moe->ld_out) * size_of(moe->dtype);
        for (size_t i = (size_t)moe->n_hidden_pad * size_of(moe->dtype);
             i < (size_t)moe->ld_out * size_of(moe->dtype); i++)
            CHECK(row[i] == GUARD_BYTE, "%s: byte %zu of row %" PRId64 " written", label, i, m);
    }
    free(value);
    free(bound);
}

/* Runs p into a fresh guarded block, which the caller frees. */
static void *run_guarded(const problem *p, void *workspace, const char *label)
{
    mpad_status status = {MPAD_OK, ""};
    mpad_moe moe = p->moe;
    moe.out = allocate(p->out_bytes);
    memset(moe.out, GUARD_BYTE, p->out_bytes);
    CHECK(mpad_cpu_run(&moe, workspace, &status) == MPAD_OK, "%s: %s", label, status.message);
    return moe.out;
}

static void check_case(const engine_case *c, const char *isa, int index)
{
    uint64_t state = 0x9E3779B97F4A7C15u + (uint64_t)index;
    char label[64];
    snprintf(label, sizeof label, "case %d on %s", index, isa);
    problem p = problem_make(c, &state);

    mpad_pool_set_threads(1);
    p.moe.out = run_guarded(&p, NULL, label);
    check_out(&p.moe, label);

    int64_t n_workspace = mpad_cpu_workspace_bytes(&p.moe);
    CHECK(n_workspace >= 0, "%" PRId64, n_workspace);
    void *workspace = NULL;
    if (n_workspace && posix_memalign(&workspace, 64, (size_t)n_workspace))
        exit(1);
    if (workspace)
        memset(workspace, 0xFF, (size_t)n_workspace);
    static const int thread_counts[] = {1, 2, 7};
    for (size_t i = 0; i < sizeof thread_counts / sizeof *thread_counts; i++) {
        mpad_pool_set_threads(thread_counts[i]);
        void *again = run_guarded(&p, workspace, label);
        CHECK(!memcmp(again, p.moe.out, p.out_bytes), "%s: other bits with %d threads", label,
              thread_counts[i]);
        free(again);
    }
    mpad_pool_set_threads(0);
    free(workspace);
    free(p.moe.out);
    problem_free(&p);
}

static void test_bad_ids(void)
{
    uint64_t state = 5;
    problem p = problem_make(&ENGINE_CASES[1], &state);
    static const int32_t bad[] = {-2, 4, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        mpad_status status = {MPAD_OK, ""};
        int32_t *last = (int32_t *)p.topk_ids + p.moe.n_token * p.moe.n_topk - 1;
        *last = bad[i];
        p.moe.out = allocate(p.out_bytes);
        memset(p.moe.out, GUARD_BYTE, p.out_bytes);
        CHECK(mpad_cpu_run(&p.moe, NULL, &status) == MPAD_VALUE, "id %d: code %d", bad[i],
              status.code);
        CHECK(strstr(status.message, "topk_ids"), "%s", status.message);
        for (size_t b = 0; b < p.out_bytes; b++)
            CHECK(((unsigned char *)p.moe.out)[b] == GUARD_BYTE, "id %d: out byte %zu", bad[i], b);
        free(p.moe.out);
    }
    problem_free(&p);
}

static void *engine_caller(void *argument)
{
    uint64_t state = 77 + (uint64_t)*(int *)argument;
    problem p = problem_make(&ENGINE_CASES[7], &state);
    void *first = run_guarded(&p, NULL, "first of many callers");
    for (int i = 0; i < 10; i++) {
        void *again = run_guarded(&p, NULL, "one of many callers");
        CHECK(!memcmp(again, first, p.out_bytes), "caller %d: other bits", *(int *)argument);
        free(again);
    }
    free(first);
    problem_free(&p);
    return NULL;
}

static void check_case_in_child(void)
{
    check_case(&ENGINE_CASES[2], "the default in a forked child", 2);
}

static void test_engine(void)
{
    mpad_status status = {MPAD_OK, ""};
    const char *const *isa = mpad_cpu_isa_available();
    CHECK(isa[0], "no instruction set at all");
    for (; *isa; isa++) {
        CHECK(mpad_cpu_set_isa(*isa, &status) == MPAD_OK, "%s", status.message);
        CHECK(!strcmp(mpad_cpu_isa(), *isa), "%s, asked for %s", mpad_cpu_isa(), *isa);
        printf("engine: %s\n", *isa);
        for (int i = 0; i < N_ENGINE_CASE; i++)
            check_case(&ENGINE_CASES[i], *isa, i);
        run_in_threads(6, engine_caller);
    }
    CHECK(mpad_cpu_set_isa("quantum", &status) == MPAD_VALUE, "%d", status.code);
    CHECK(mpad_cpu_set_isa(NULL, &status) == MPAD_OK, "%s", status.message);
    test_bad_ids();
    test_fork(check_case_in_child);
}

int main(int argc, char **argv)
{
    can_fork = argc < 2 || strcmp(argv[1], "--no-fork") != 0;
    test_status();
    test_plan();
    test_pool();
    test_copy();
    test_engine();
    printf(n_fail ? "FAILED: %d checks\n" : "all checks passed\n", n_fail);
    return n_fail != 0;
}
