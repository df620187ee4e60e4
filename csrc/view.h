/* Level 2: a strided view of memory: pointer, shape, strides, element type. Says what can be said
 * without knowing whose memory it is; borrows, never owns. */
#ifndef MPAD_VIEW_H
#define MPAD_VIEW_H

#include "params.h"

enum { MPAD_VIEW_MAX_DIM = 4, MPAD_VIEW_SHAPE_TEXT = 96 };

typedef struct mpad_view {
    char *data; /* the first element; may be NULL where there is none */
    int n_dim;  /* with more than MPAD_VIEW_MAX_DIM, only the first sizes and strides are held */
    int64_t size[MPAD_VIEW_MAX_DIM];
    int64_t stride[MPAD_VIEW_MAX_DIM]; /* bytes, of either sign */
    int64_t n_item_bytes;
    mpad_device device;
    mpad_dtype dtype;    /* MPAD_DTYPE_COUNT: none of ours */
    char other_name[32]; /* what the producer calls a dtype that is none of ours */
    bool is_writable;
} mpad_view;

const char *mpad_dtype_name(mpad_dtype dtype);
const char *mpad_view_dtype_name(const mpad_view *view);

enum { MPAD_DEVICE_TEXT = 32 };

/* "the CPU" or "AMD device 0" in a buffer of MPAD_DEVICE_TEXT bytes, which is returned. */
const char *mpad_device_name(mpad_device device, char *text);
bool mpad_device_is_same(mpad_device a, mpad_device b);

/* "(2, 3)" in a buffer of MPAD_VIEW_SHAPE_TEXT bytes, which is returned. */
const char *mpad_view_shape(const mpad_view *view, char *text);

int64_t mpad_view_count(const mpad_view *view);
bool mpad_view_is_contiguous(const mpad_view *view); /* C order, no gaps */
bool mpad_view_is_aligned(const mpad_view *view);    /* every element, to its own size */

/* Whether two elements of the view share a byte. Exact for rows and planes that nest, as those of a
 * slice of a row-major tensor do; a view that interleaves otherwise counts as overlapping. */
bool mpad_view_overlaps_itself(const mpad_view *view);

/* Whether the views share a byte. Exact for two sets of rows with one row stride (columns of one
 * wide buffer); else their address ranges decide, so that two interleaved views count. */
bool mpad_view_overlaps(const mpad_view *a, const mpad_view *b);

#endif
