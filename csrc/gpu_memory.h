/* Level 5: memory of a GPU that is ours, and the way into it from the host: staging, two pinned
 * buffers in turn, so that one is filled by the host's threads while the device empties the other.
 */
#ifndef MPAD_GPU_MEMORY_H
#define MPAD_GPU_MEMORY_H

#include "gpu_run.h"
#include "status.h"
#include "view.h"

/* Bytes of zeros; NULL where n_bytes is 0. */
mpad_code mpad_gpu_allocate(const mpad_gpu *gpu, int64_t n_bytes, void **address,
                            mpad_status *status);
/* What is queued on the memory is done first. NULL is no memory. */
mpad_code mpad_gpu_release(const mpad_gpu *gpu, void *address, mpad_status *status);

/* Waits for all that is queued on the device, in whatever stream. */
mpad_code mpad_gpu_settle(const mpad_gpu *gpu, mpad_status *status);

typedef struct mpad_staging mpad_staging;

mpad_code mpad_staging_make(mpad_gpu *gpu, mpad_staging **staging, mpad_status *status);

/* dst, on the device, = src, the host's, of one shape and element size, with rows in `dst` without
 * gaps. `src` may change when this returns; `dst` has it after mpad_staging_wait. */
mpad_code mpad_staging_put(mpad_staging *staging, const mpad_view *dst, const mpad_view *src,
                           mpad_status *status);
mpad_code mpad_staging_wait(mpad_staging *staging, mpad_status *status);

/* Waits, and frees everything even where that fails. */
mpad_code mpad_staging_end(mpad_staging *staging, mpad_status *status);

#endif
