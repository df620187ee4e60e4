/* Level 3: what a kernel file offers the engine: for one instruction set and each element type, the
 * functions that touch elements. They compute on one thread, allocate nothing and check nothing. */
#ifndef MPAD_CPU_KERNELS_H
#define MPAD_CPU_KERNELS_H

#include "params.h"

enum {
    MPAD_CPU_K_BLOCK = 1024,    /* most elements of a row that lie together */
    MPAD_CPU_K_STEP = 32,       /* what every kernel's step along k divides */
    MPAD_CPU_STORED_STEP = 128, /* the same of kernels for quantised weights */
    MPAD_CPU_SCALED = 32,       /* columns in a row that always share a scale */
};

/* X(NAME, name, bits of one, planes): the formats of quantised weights. A plane holds every
 * planes-th element of k, as the shifts of a 32-bit lane bring them up. */
#define MPAD_CPU_FORMAT_LIST(X)                                                                    \
    X(E4M3FN, e4m3fn, 8, 4)                                                                        \
    X(E4M3FNUZ, e4m3fnuz, 8, 4)                                                                    \
    X(E5M2, e5m2, 8, 4)                                                                            \
    X(I8, i8, 8, 4)                                                                                \
    X(E2M1, e2m1, 4, 8)                                                                            \
    X(I4, i4, 4, 8)

typedef enum mpad_cpu_format {
#define X(NAME, name, bits, planes) MPAD_CPU_##NAME,
    MPAD_CPU_FORMAT_LIST(X)
#undef X
        MPAD_CPU_FORMAT_COUNT
} mpad_cpu_format;

/* Rows of activations in the kernels' own form: f32, or what the dot product instruction takes, in
 * the order of k that suits the kernel, zero from n_k to the next multiple of MPAD_CPU_K_STEP.
 * Cut along k into blocks, [n_block][n_row][ld_row]: a tile's rows are then short and near. */
typedef struct mpad_cpu_rows {
    char *data; /* 64-byte aligned */
    int64_t n_k;
    int64_t k_block;  /* elements of a block; a multiple of MPAD_CPU_K_STEP */
    int64_t ld_row;   /* bytes between rows */
    int64_t ld_block; /* bytes between blocks */
    int n_plane;      /* of the weights' format, if quantised: x is then zero up to a multiple of
                         MPAD_CPU_STORED_STEP */
} mpad_cpu_rows;

/* sum[sum_row[i]][n] += scale[i] * (x[x_row[i]] . w[n]) for i in [0, n_row), n in [0, n_column).
 * Rows that share a sum are added in the order of i. */
typedef struct mpad_cpu_product {
    const mpad_cpu_rows *x;
    const int32_t *x_row; /* NULL: i */
    int64_t n_row;

    const void *w; /* n_column rows of x->n_k elements */
    int64_t ld_w;  /* bytes between them */
    int64_t n_column;
    const void *next_w;   /* rows that will be wanted next, ld_w apart; a hint, or NULL */
    bool is_fetched_near; /* into the first cache too, where that pays */
    /* Of quantised weights, else NULL: w[n] is row w_row + n of the half whose scales begin
     * w_scale_at elements into it. */
    const mpad_scale *w_scale;
    int64_t w_scale_at, w_row;

    float *sum;
    const int32_t *sum_row; /* NULL: i */
    int64_t sum_origin;     /* what sum_row counts from */
    int64_t ld_sum;         /* elements; rows are 16-byte aligned */
    const float *scale;     /* NULL: 1 */
} mpad_cpu_product;

/* h[row][first + n] = act(scale * gate[n] + gate_bias[n], scale * up[n] + up_bias[n]) for n in
 * [0, n_column), rounded to the element type. */
typedef struct mpad_cpu_activation {
    mpad_act act;
    float alpha, limit;
    const float *gate, *up;           /* up: NULL if not gated */
    const float *gate_bias, *up_bias; /* or NULL */
    float scale;
    int64_t n_column;

    const mpad_cpu_rows *h;
    int64_t row, first; /* first is a multiple of MPAD_CPU_K_STEP */
} mpad_cpu_activation;

typedef struct mpad_cpu_kernels {
    int64_t x_bytes; /* of one element in mpad_cpu_rows */
    void (*take_row)(const mpad_cpu_rows *rows, int64_t row, const void *source);
    void (*multiply)(const mpad_cpu_product *product);
    void (*activate)(const mpad_cpu_activation *activation);
    /* target[n] = scale * sum[n], rounded to the element type */
    void (*give_row)(void *target, const float *sum, int64_t n, float scale);
    /* Keeps the product's inner instruction busy; returns the FLOPs done. */
    double (*spin)(int64_t n_iteration);
} mpad_cpu_kernels;

/* Of one kernel file. */
typedef struct mpad_cpu_isa_kernels {
    mpad_cpu_kernels f32, bf16, f16;
    /* For quantised weights, by the type of the activations, x as f32 in planes; with the product
     * of the weights' format in place of `multiply`. */
    mpad_cpu_kernels planes_f32, planes_bf16, planes_f16;
    void (*multiply_stored[MPAD_CPU_FORMAT_COUNT])(const mpad_cpu_product *product);
    /* Reads n_bytes, a multiple of 256, and returns something made of all of them. */
    uint64_t (*read)(const void *data, int64_t n_bytes);
} mpad_cpu_isa_kernels;

/* Of one that multiplies pairs of bf16, for activations of that type. */
typedef struct mpad_cpu_pair_kernels {
    mpad_cpu_kernels bf16, stored; /* `stored`: for quantised weights, as above */
    void (*multiply_stored[MPAD_CPU_FORMAT_COUNT])(const mpad_cpu_product *product);
} mpad_cpu_pair_kernels;

extern const mpad_cpu_isa_kernels mpad_cpu_portable;
#if defined(__x86_64__)
extern const mpad_cpu_isa_kernels mpad_cpu_avx2, mpad_cpu_avx512;
extern const mpad_cpu_pair_kernels mpad_cpu_avx512bf16;
#endif

#endif
