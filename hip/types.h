// Level 1: element types, vectors, and the ways weights are stored. An element's storage is u16; a
// type is its bits and its conversions.
#pragma once
#include "arch.h"

#define MPAD_SHARED_FN DEV
#include "../csrc/gpu_args.h"

#if MPAD_NVIDIA
struct alignas(16) u4 {
    u32 x[4];
    DEV u32 operator[](int i) const
    {
        return x[i];
    }
    DEV u32 &operator[](int i)
    {
        return x[i];
    }
};
struct alignas(8) f2 {
    float x, y;
};
struct alignas(16) f4 {
    float x[4];
    DEV float operator[](int i) const
    {
        return x[i];
    }
    DEV float &operator[](int i)
    {
        return x[i];
    }
};
#else
typedef u32 u4 __attribute__((ext_vector_type(4)));
typedef float f4 __attribute__((ext_vector_type(4)));
#endif

DEV u4 u4_zero()
{
    u4 z = {0u, 0u, 0u, 0u};
    return z;
}

DEV u32 float_bits(float x)
{
    return __builtin_bit_cast(u32, x);
}
DEV float bits_float(u32 x)
{
    return __builtin_bit_cast(float, x);
}

DEV float float_clamp(float v, float largest) // between -largest and it; a NaN stays one
{
    return v > largest ? largest : v < -largest ? -largest : v;
}

// Rounding is to nearest even; a NaN stays one.
struct Bf16 {
    u16 bits;
    static constexpr bool HOLDS_E8M0 = true; // times any value of a float8 or float4
    static DEV float to_float(u16 v)
    {
        return bits_float((u32)v << 16);
    }
    static DEV u16 from_float(float f)
    {
        return float_to_bfloat(f);
    }
    static constexpr u32 COUNT_FROM = 0x43004300u; // twice 128: the low bits count ones from there
    // High and low bytes of 0, 0.5, 1, 1.5; 2, 3, 4, 6.
    static constexpr u32 E2M1_HIGH[2] = {0x3f3f3f00u, 0x40404040u};
    static constexpr u32 E2M1_LOW[2] = {0xc0800000u, 0xc0804000u};
    static DEV u32 pair_mul(u32 a, u32 b)
    {
        return bfloat_pair_mul(a, b);
    }
    static DEV u32 pair_sub(u32 a, u32 b)
    {
        return bfloat_pair_sub(a, b);
    }
#ifdef MPAD_CONVERTED
    template <int HALF> static DEV u32 from_float8(u32 v)
    {
        return float8_pair_to_bfloat<HALF>(v);
    }
#endif
#if MPAD_CONVERTS_E2M1
    template <int BYTE> static DEV u32 from_e2m1(u32 v)
    {
        return e2m1_pair_to_bfloat<BYTE>(v);
    }
#endif
};

struct F16 {
    u16 bits;
    static constexpr bool HOLDS_E8M0 = false;
    static DEV float to_float(u16 v)
    {
        return half_to_float(v);
    }
    static DEV u16 from_float(float f)
    {
        return float_to_half(f);
    }
    static constexpr u32 COUNT_FROM = 0x64006400u; // twice 1024
    static constexpr u32 E2M1_HIGH[2] = {0x3e3c3800u, 0x46444240u};
    static constexpr u32 E2M1_LOW[2] = {0, 0};
    static DEV u32 pair_mul(u32 a, u32 b)
    {
        return half_pair_mul(a, b);
    }
    static DEV u32 pair_sub(u32 a, u32 b)
    {
        return half_pair_sub(a, b);
    }
#ifdef MPAD_CONVERTED
    template <int HALF> static DEV u32 from_float8(u32 v)
    {
        return float8_pair_to_half<HALF>(v);
    }
#endif
#if MPAD_CONVERTS_E2M1
    template <int BYTE> static DEV u32 from_e2m1(u32 v)
    {
        return e2m1_pair_to_half<BYTE>(v);
    }
#endif
};

// How weights are stored. A chunk is 8 of a row, BITS bytes: what a lane of a fragment holds.
struct Plain { // as T
    static constexpr int BITS = 16;
};
struct Bytes { // 8-bit floats, two's complement
    static constexpr int BITS = 8;
};
struct Nibbles { // e2m1, value + 8; even k in the low nibble
    static constexpr int BITS = 4;
};
template <class W> struct Stored {
    u32 x[W::BITS / 4];
};

template <class T> DEV u32 pack_pair(float lo, float hi)
{
    return (u32)T::from_float(lo) | (u32)T::from_float(hi) << 16;
}
template <class T> DEV u4 pack8(const float (&x)[8])
{
    u4 v;
    UNROLL for (int i = 0; i < 4; i++) v[i] = pack_pair<T>(x[2 * i], x[2 * i + 1]);
    return v;
}
