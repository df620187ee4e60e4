/* Level 3: single elements of a tensor as float32, for what is too little to need vectors. */
#ifndef MPAD_CPU_SCALAR_H
#define MPAD_CPU_SCALAR_H

#include "params.h"

#include <string.h>

static inline float f16_value(uint16_t half)
{
    const float smallest = 1.0f / 16777216; /* 2^-24, the unit of subnormal values */
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF, bits;
    float value;
    if (rest < 0x400) {
        value = (float)rest * smallest;
        memcpy(&bits, &value, 4);
    } else {
        bits = (rest << 13) + (rest >= 0x7C00 ? 0x70000000 : 0x38000000);
    }
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float bf16_value(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Element i of an array of f32, bf16 or f16. */
static inline float float_at(const void *base, mpad_dtype dtype, int64_t i)
{
    if (dtype == MPAD_DTYPE_F32)
        return ((const float *)base)[i];
    uint16_t half = ((const uint16_t *)base)[i];
    return dtype == MPAD_DTYPE_F16 ? f16_value(half) : bf16_value(half);
}

/* Element i of an array of i32 or i64. */
static inline int64_t integer_at(const void *base, mpad_dtype dtype, int64_t i)
{
    return dtype == MPAD_DTYPE_I64 ? ((const int64_t *)base)[i] : ((const int32_t *)base)[i];
}

#endif
