/* Level 3: strided copies by many threads: rows, steps and transposes, at any element size up to
 * eight bytes. Knows elements as bytes only. */
#ifndef MPAD_COPY_H
#define MPAD_COPY_H

#include "status.h"
#include "view.h"

/* dst[i, ...] = src[i, ...] for views of one shape and one element size, of 1, 2, 4 or 8 bytes.
 * Writes exactly where dst has elements. Fails with MPAD_TYPE or MPAD_VALUE before it writes:
 * other shapes or sizes, more than four dimensions, shared memory. */
mpad_code mpad_copy_check(const mpad_view *dst, const mpad_view *src, mpad_status *status);
mpad_code mpad_copy(const mpad_view *dst, const mpad_view *src, mpad_status *status);

#endif
