/* Level 4: float vectors of VECTOR_BYTES bytes, which the including kernel file defines, and the
 * arithmetic on them that needs no instruction set's names: conversions, exponential, activations.
 * Comparisons give lanes of all ones or zeros; a NaN goes through every function here. */
#ifndef MPAD_CPU_VECTOR_H
#define MPAD_CPU_VECTOR_H

#include "cpu_kernels.h"

#include <math.h>
#include <string.h>

enum {
    LANES = VECTOR_BYTES / 4,
    MAX_TILE_ROWS = 6,
    PANEL_COLUMNS = 2 * LANES,
    PANEL_GROUPS = 256,
    IS_NARROW = VECTOR_BYTES < 64, /* 16 registers, not 32 */
    FETCH_ROWS = PANEL_COLUMNS > 16 ? PANEL_COLUMNS / 16 : 1,
};

typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(VECTOR_BYTES / 2))); /* a 16-bit value per lane */
typedef float v4 __attribute__((vector_size(16)));

/* The same with no alignment, over memory of any type. */
typedef float vf_any __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(VECTOR_BYTES / 2), aligned(1), may_alias));
typedef float v4_any __attribute__((vector_size(16), aligned(1), may_alias));

/* Between steps of a tile: compilers that mix them run out of registers. */
#define KEEP_ORDER __asm__ volatile("" ::: "memory");

#define INLINE static inline __attribute__((always_inline, unused))

INLINE vf vf_load(const void *p)
{
    return *(const vf_any *)p;
}

INLINE void vf_store(void *p, vf v)
{
    *(vf_any *)p = v;
}

INLINE vu vu_load(const void *p)
{
    return *(const vu_any *)p;
}

INLINE vf vf_all(float x)
{
    return x - (vf){0};
}

INLINE vf vf_select(vi mask, vf a, vf b)
{
    return (vf)((mask & (vi)a) | (~mask & (vi)b));
}

INLINE vf vf_abs(vf x)
{
    return (vf)((vi)x & 0x7FFFFFFF);
}

/* 0, 1, 2, ... */
INLINE vi vi_count(void)
{
    vi v;
    for (int i = 0; i < LANES; i++)
        v[i] = i;
    return v;
}

/* The bits of a bf16 in the upper half of each lane: to nearest, ties to even, NaN stays NaN. */
INLINE vu bf16_round(vf x)
{
    vu u = (vu)x;
    vu rounded = u + 0x7FFF + (u >> 16 & 1);
    vu quiet = u | 0x400000;
    vu is_nan = (vu)(x != x);
    return ((is_nan & quiet) | (~is_nan & rounded)) & 0xFFFF0000;
}

/* Of a vector of pairs (even k low, odd k high) of bf16. */
INLINE vf bf16_even(vu pairs)
{
    return (vf)(pairs << 16);
}

INLINE vf bf16_odd(vu pairs)
{
    return (vf)(pairs & 0xFFFF0000);
}

/* exp(x) for x <= 0, to about 1 ulp, subnormal results included. */
INLINE vf exp_negative(vf x)
{
    const float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    const float lowest = -104.0f;    /* rounds to zero */
    const float shift = 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the nearest integer */
    x = vf_select(x < lowest, vf_all(lowest), x);
    vf shifted = x * log2_e + shift;
    vf n = shifted - shift;
    vi exponent = (vi)shifted - (vi)vf_all(shift);
    vf r = x - n * ln2_high - n * ln2_low;
    vf p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vi half = exponent >> 1; /* 2^exponent itself may be no normal number */
    return p * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
}

INLINE vf sigmoid(vf x)
{
    vf e = exp_negative(-vf_abs(x));
    return vf_select(x >= 0, vf_all(1.0f), e) / (1.0f + e);
}

/* x * Phi(x), by the complementary error function, which keeps small results exact. */
INLINE vf gelu(vf x)
{
    vf y;
    for (int i = 0; i < LANES; i++)
        y[i] = 0.5f * x[i] * erfcf(-0.707106781f * x[i]);
    return y;
}

/* 0.5 * (1 + tanh(u)) is sigmoid(2 u). */
INLINE vf gelu_tanh(vf x)
{
    return x * sigmoid(x * (1.59576912f + 0.0713548163f * x * x));
}

INLINE vf relu2(vf x)
{
    vf positive = vf_select(x < 0, (vf){0}, x);
    return positive * positive;
}

/* The activation of lanes [n, n + LANES) of `a`. */
INLINE vf activation(const mpad_cpu_activation *a, int64_t n)
{
    vf gate = vf_load(a->gate + n) * a->scale, up = {0};
    if (a->gate_bias)
        gate += vf_load(a->gate_bias + n);
    if (a->up) {
        up = vf_load(a->up + n) * a->scale;
        if (a->up_bias)
            up += vf_load(a->up_bias + n);
        gate = vf_select(gate > a->limit, vf_all(a->limit), gate);
        up = vf_select(up > a->limit, vf_all(a->limit), up);
        up = vf_select(up < -a->limit, vf_all(-a->limit), up);
    }
    vf h;
    switch (a->act) {
    case MPAD_ACT_GELU:
        h = gelu(gate);
        break;
    case MPAD_ACT_GELU_TANH:
        h = gelu_tanh(gate);
        break;
    case MPAD_ACT_SWIGLUOAI:
        h = gate * sigmoid(a->alpha * gate);
        up += 1.0f;
        break;
    case MPAD_ACT_RELU2:
        h = relu2(gate);
        break;
    default:
        h = gate * sigmoid(gate);
    }
    return a->up ? h * up : h;
}

#endif
