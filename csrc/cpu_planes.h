/* Level 5: rows of activations for products with quantised weights: f32, whatever the type of the
 * activations, in planes. Of LANES * n_plane elements of k in a row, vector j holds k = j,
 * n_plane + j, 2 * n_plane + j, ...: what shifting lanes of stored weights brings up in turn. A
 * kernel file includes this after vf_load, f16_load and f16_store. */
#ifndef MPAD_CPU_PLANES_H
#define MPAD_CPU_PLANES_H

#include "cpu_vector.h"

/* LANES elements at p as floats. */
INLINE vf values_load(const void *p, mpad_dtype dtype)
{
    switch (dtype) {
    case MPAD_DTYPE_F32:
        return vf_load(p);
    case MPAD_DTYPE_F16:
        return f16_load(p);
    default:
        return (vf)(__builtin_convertvector(*(const vh_any *)p, vu) << 16);
    }
}

/* Rounded to the type of the activations. */
INLINE vf values_round(vf v, mpad_dtype dtype)
{
    uint16_t half[LANES];
    switch (dtype) {
    case MPAD_DTYPE_F32:
        return v;
    case MPAD_DTYPE_F16:
        f16_store(half, v);
        return f16_load(half);
    default:
        return (vf)bf16_round(v);
    }
}

/* Elements [k, k + LANES) of a row; k is a multiple of LANES. */
INLINE void planes_put(const mpad_cpu_rows *rows, int64_t row, int64_t k, vf v, const int n_plane)
{
    const int step = LANES * n_plane;
    const int64_t block = k / rows->k_block;
    const int in_block = (int)(k - block * rows->k_block);
    float *x = (float *)(rows->data + block * rows->ld_block + row * rows->ld_row);
    x += in_block / step * step + in_block % step / n_plane;
    for (int i = 0; i < LANES; i++)
        x[(in_block + i) % n_plane * LANES + (in_block % n_plane + i) / n_plane] = v[i];
}

INLINE void planes_put_either(const mpad_cpu_rows *rows, int64_t row, int64_t k, vf v)
{
    if (rows->n_plane == 4)
        planes_put(rows, row, k, v, 4);
    else
        planes_put(rows, row, k, v, 8);
}

INLINE int64_t planes_end(int64_t n_k)
{
    return (n_k + MPAD_CPU_STORED_STEP - 1) / MPAD_CPU_STORED_STEP * MPAD_CPU_STORED_STEP;
}

INLINE void planes_take(const mpad_cpu_rows *rows, int64_t row, const void *source,
                        const mpad_dtype dtype)
{
    const int64_t element = dtype == MPAD_DTYPE_F32 ? 4 : 2, end = planes_end(rows->n_k);
    for (int64_t k = 0; k < end; k += LANES) {
        const char *from = (const char *)source + k * element;
        char padded[LANES * 4] = {0};
        if (k + LANES > rows->n_k) {
            if (k < rows->n_k)
                memcpy(padded, from, (size_t)((rows->n_k - k) * element));
            from = padded;
        }
        planes_put_either(rows, row, k, values_load(from, dtype));
    }
}

INLINE void planes_activate(const mpad_cpu_activation *a, const mpad_dtype dtype)
{
    const bool is_last = a->first + a->n_column == a->h->n_k;
    const int64_t end = is_last ? planes_end(a->h->n_k) - a->first : a->n_column;
    for (int64_t n = 0; n < end; n += LANES) {
        vf h = {0};
        if (n < a->n_column) {
            vi is_inside = vi_count() < (int32_t)(a->n_column - n);
            h = values_round(vf_select(is_inside, activation(a, n), h), dtype);
        }
        planes_put_either(a->h, a->row, a->first + n, h);
    }
}

#endif
