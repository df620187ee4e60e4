// Level 3: what happens to a finished sum: bias, clamp, activation, in float32, rounded once by the
// caller. Comparisons are written so that a NaN stays one.
#pragma once
#include "memory.h"

constexpr float LOG2_E = 1.44269504f;

DEV float sigmoid(float x)
{
    return fast_rcp(1.f + fast_exp2(-LOG2_E * x));
}

// erfc(t) for t >= 0. Two polynomials, fitted at Chebyshev points: erf(t) = t p(t^2) below 1,
// log2(erfc(t)) = q(t) up to 4, where erf is 1 to float32. Relative error 2e-7 of erf.
DEV float erfc_positive(float t)
{
    if (t < 1.f) {
        float s = t * t, p = 7.882497448e-05f;
        p = fused_mul_add(p, s, -8.018855006e-04f);
        p = fused_mul_add(p, s, 5.189312156e-03f);
        p = fused_mul_add(p, s, -2.685432881e-02f);
        p = fused_mul_add(p, s, 1.128359735e-01f);
        p = fused_mul_add(p, s, -3.761262596e-01f);
        p = fused_mul_add(p, s, 1.128379107e+00f);
        return 1.f - t * p;
    }
    t = t > 4.f ? 4.f : t;
    float q = 2.329500831e-06f;
    q = fused_mul_add(q, t, -6.579206820e-05f);
    q = fused_mul_add(q, t, 8.553515654e-04f);
    q = fused_mul_add(q, t, -6.839515641e-03f);
    q = fused_mul_add(q, t, 3.803872047e-02f);
    q = fused_mul_add(q, t, -1.586696953e-01f);
    q = fused_mul_add(q, t, -9.116872549e-01f);
    q = fused_mul_add(q, t, -1.630489111e+00f);
    q = fused_mul_add(q, t, 4.383230698e-04f);
    return fast_exp2(q);
}

DEV float gelu(float x)
{
    float e = erfc_positive((x < 0.f ? -x : x) * 0.707106781f);
    return 0.5f * x * (x < 0.f ? e : 2.f - e);
}

DEV float gelu_tanh(float x)
{
    // 0.5 (1 + tanh(y)) is sigmoid(2 y), y = sqrt(2/pi) (x + 0.044715 x^3).
    return x * sigmoid(1.595769122f * fused_mul_add(0.044715f * x * x, x, x));
}

// h from the finished sums; `up` is unused where the layer is not gated.
template <int ACT_CODE, bool GATED> DEV float activate(const mpad_gpu_args &a, float gate, float up)
{
    if constexpr (GATED) {
        float limit = a.swiglu_limit;
        gate = gate > limit ? limit : gate;
        up = up > limit ? limit : up < -limit ? -limit : up;
    }
    float h;
    if constexpr (ACT_CODE == MPAD_GPU_SILU)
        h = gate * sigmoid(gate);
    else if constexpr (ACT_CODE == MPAD_GPU_GELU)
        h = gelu(gate);
    else if constexpr (ACT_CODE == MPAD_GPU_GELU_TANH)
        h = gelu_tanh(gate);
    else if constexpr (ACT_CODE == MPAD_GPU_SWIGLUOAI) {
        h = gate * sigmoid(a.swiglu_alpha * gate);
        up += 1.f;
    } else
        h = gate < 0.f ? 0.f : gate * gate;
    return GATED ? h * up : h;
}

template <int VALUE> struct Constant {
    static constexpr int value = VALUE;
};

// Calls f with the call's activation as a compile-time constant.
template <class F> DEV void activation_select(const mpad_gpu_args &a, F f)
{
    switch (a.act) {
    case MPAD_GPU_SILU:
        return f(Constant<MPAD_GPU_SILU>());
    case MPAD_GPU_GELU:
        return f(Constant<MPAD_GPU_GELU>());
    case MPAD_GPU_GELU_TANH:
        return f(Constant<MPAD_GPU_GELU_TANH>());
    case MPAD_GPU_SWIGLUOAI:
        return f(Constant<MPAD_GPU_SWIGLUOAI>());
    default:
        return f(Constant<MPAD_GPU_RELU2>());
    }
}

// Bias of column `column` of an expert's gate half (half 0) or up half (half 1); 0 without one.
DEV float w13_bias(const mpad_gpu_args &a, int expert, int column, int half)
{
    if (!a.w13_bias)
        return 0.f;
    return load_float(a.w13_bias,
                      expert * a.w13_bias_ld_expert + column * a.w13_bias_ld_row +
                          half * a.w13_bias_up_offset,
                      a.w13_bias_type);
}
DEV float w2_bias(const mpad_gpu_args &a, int expert, int column)
{
    return a.w2_bias ? load_float(a.w2_bias, expert * a.w2_bias_ld_expert + column, a.w2_bias_type)
                     : 0.f;
}
