/* Level 2: see view.h. */
#include "view.h"

#include <inttypes.h>
#include <stdio.h>

static const char *const DTYPE_NAMES[] = {
#define X(NAME, text, bits, code) [MPAD_DTYPE_##NAME] = text,
    MPAD_DTYPE_LIST(X)
#undef X
};

const char *mpad_dtype_name(mpad_dtype dtype)
{
    return DTYPE_NAMES[dtype];
}

const char *mpad_view_dtype_name(const mpad_view *view)
{
    return view->dtype == MPAD_DTYPE_COUNT ? view->other_name : DTYPE_NAMES[view->dtype];
}

const char *mpad_device_name(mpad_device device, char *text)
{
    if (device.vendor == MPAD_HOST)
        snprintf(text, MPAD_DEVICE_TEXT, "the CPU");
    else
        snprintf(text, MPAD_DEVICE_TEXT, "%s device %d",
                 device.vendor == MPAD_AMD ? "AMD" : "NVIDIA", device.index);
    return text;
}

bool mpad_device_is_same(mpad_device a, mpad_device b)
{
    return a.vendor == b.vendor && a.index == b.index;
}

const char *mpad_view_shape(const mpad_view *view, char *text)
{
    int n_held = view->n_dim < MPAD_VIEW_MAX_DIM ? view->n_dim : MPAD_VIEW_MAX_DIM;
    size_t n = 1;
    text[0] = '(';
    for (int dim = 0; dim < n_held; dim++)
        n += (size_t)snprintf(text + n, MPAD_VIEW_SHAPE_TEXT - n, "%s%" PRId64, dim ? ", " : "",
                              view->size[dim]);
    const char *end = view->n_dim == 1 ? ",)" : view->n_dim > n_held ? ", ...)" : ")";
    snprintf(text + n, MPAD_VIEW_SHAPE_TEXT - n, "%s", end);
    return text;
}

int64_t mpad_view_count(const mpad_view *view)
{
    int64_t n = 1;
    for (int dim = 0; dim < view->n_dim; dim++)
        n *= view->size[dim];
    return n;
}

bool mpad_view_is_contiguous(const mpad_view *view)
{
    int64_t n_bytes = view->n_item_bytes;
    for (int dim = view->n_dim - 1; dim >= 0; dim--) {
        if (view->size[dim] != 1 && view->stride[dim] != n_bytes)
            return mpad_view_count(view) == 0;
        n_bytes *= view->size[dim];
    }
    return true;
}

bool mpad_view_is_aligned(const mpad_view *view)
{
    uintptr_t bits = (uintptr_t)view->data;
    for (int dim = 0; dim < view->n_dim; dim++)
        if (view->size[dim] > 1)
            bits |= (uintptr_t)view->stride[dim];
    return bits % (uintptr_t)view->n_item_bytes == 0;
}

static uint64_t magnitude(int64_t stride)
{
    return stride < 0 ? 0 - (uint64_t)stride : (uint64_t)stride;
}

/* Bytes from the first to the last element of a dimension. */
static uint64_t reach(const mpad_view *view, int dim)
{
    return (uint64_t)(view->size[dim] - 1) * magnitude(view->stride[dim]);
}

/* Half open range of addresses; empty where there is no element. */
static void extent(const mpad_view *view, uintptr_t *start, uintptr_t *stop)
{
    *start = *stop = (uintptr_t)view->data;
    if (mpad_view_count(view) == 0)
        return;
    *stop += (uintptr_t)view->n_item_bytes;
    for (int dim = 0; dim < view->n_dim; dim++) {
        if (view->stride[dim] < 0)
            *start -= (uintptr_t)reach(view, dim);
        else
            *stop += (uintptr_t)reach(view, dim);
    }
}

bool mpad_view_overlaps_itself(const mpad_view *view)
{
    if (mpad_view_count(view) <= 1)
        return false;
    /* Dimensions by growing stride: each must step over all of what the smaller ones span. */
    bool is_done[MPAD_VIEW_MAX_DIM] = {false};
    uint64_t n_bytes = (uint64_t)view->n_item_bytes;
    for (int i = 0; i < view->n_dim; i++) {
        int next = -1;
        for (int dim = 0; dim < view->n_dim; dim++)
            if (!is_done[dim] &&
                (next < 0 || magnitude(view->stride[dim]) < magnitude(view->stride[next])))
                next = dim;
        is_done[next] = true;
        if (view->size[next] == 1)
            continue;
        if (magnitude(view->stride[next]) < n_bytes)
            return true;
        n_bytes += reach(view, next);
    }
    return false;
}

/* Two sets of rows that step alike and whose columns, modulo the step, have nothing in common. */
static bool are_other_columns(const mpad_view *a, const mpad_view *b, uintptr_t a_start,
                              uintptr_t b_start)
{
    if (a->n_dim != 2 || b->n_dim != 2 || a->stride[0] != b->stride[0] || a->stride[0] == 0 ||
        a->stride[1] != a->n_item_bytes || b->stride[1] != b->n_item_bytes)
        return false;
    uintptr_t step = (uintptr_t)magnitude(a->stride[0]);
    uintptr_t a_width = (uintptr_t)(a->size[1] * a->n_item_bytes);
    uintptr_t b_width = (uintptr_t)(b->size[1] * b->n_item_bytes);
    uintptr_t shift = b_start >= a_start ? (b_start - a_start) % step
                                         : (step - (a_start - b_start) % step) % step;
    return shift >= a_width && shift + b_width <= step;
}

bool mpad_view_overlaps(const mpad_view *a, const mpad_view *b)
{
    uintptr_t a_start, a_stop, b_start, b_stop;
    extent(a, &a_start, &a_stop);
    extent(b, &b_start, &b_stop);
    if (a_start == a_stop || b_start == b_stop || a_stop <= b_start || b_stop <= a_start)
        return false;
    return !are_other_columns(a, b, a_start, b_start);
}
