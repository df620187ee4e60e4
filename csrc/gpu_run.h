/* Level 4: the fused MoE on GPUs: runtimes opened once, kernels loaded once per device and part,
 * then a call is a plan, an argument struct and a few launches: no allocation, no waiting, no lock,
 * no Python. */
#ifndef MPAD_GPU_RUN_H
#define MPAD_GPU_RUN_H

#include "gpu.h"
#include "library.h"
#include "params.h"
#include "status.h"
#include "view.h"

enum { MPAD_GPU_WORKSPACE_ALIGN = 256 };

typedef struct mpad_gpu mpad_gpu; /* a device that was asked for; lives as long as the process */

/* How the file names of a vendor's runtime library begin. */
const char *mpad_gpu_library_name(mpad_vendor vendor);

/* Opens the vendor's runtime, unless it is open: a failure is tried again by the next call. */
mpad_code mpad_gpu_open(mpad_vendor vendor, const mpad_library_candidate *candidates, int n,
                        mpad_status *status);
bool mpad_gpu_is_open(mpad_vendor vendor);

/* What the last search for the vendor's runtime looked at. */
const mpad_library_search *mpad_gpu_search(mpad_vendor vendor);

/* Of an open runtime. */
mpad_code mpad_gpu_count(mpad_vendor vendor, int *n, mpad_status *status);
mpad_code mpad_gpu_describe(mpad_device device, mpad_gpu_info *info, mpad_status *status);

/* The device if it was made, else NULL. */
mpad_gpu *mpad_gpu_find(mpad_device device);

/* Makes it unless it is made; MPAD_UNSUPPORTED where there are no kernels for it. */
mpad_code mpad_gpu_make(mpad_device device, mpad_gpu **gpu, mpad_status *status);

/* Its architecture, "gfx942:sramecc+:xnack-". */
const char *mpad_gpu_arch(const mpad_gpu *gpu);

/* Bytes of workspace the call needs, and the part of the kernels (gpu_args.h). */
mpad_code mpad_gpu_needs(const mpad_gpu *gpu, const mpad_moe *moe, int64_t *n_bytes, int *part,
                         mpad_status *status);

/* Loads a part's device image unless it is loaded; keeps nothing of the image, which comes from the
 * caller, since this level knows no compiler. */
bool mpad_gpu_have_part(const mpad_gpu *gpu, int part);
mpad_code mpad_gpu_load(mpad_gpu *gpu, int part, const void *image, mpad_status *status);

/* Puts the call, whose part is loaded, on the stream. n_token_d: the number of rows to compute, on
 * the device, or NULL for moe->n_token. The workspace starts on MPAD_GPU_WORKSPACE_ALIGN bytes;
 * NULL: a buffer of ours per stream, allocated when it is too small, never freed, since a captured
 * graph may hold it; sizes double. The thread's current device is what it was. */
mpad_code mpad_gpu_run(mpad_gpu *gpu, const mpad_moe *moe, const void *n_token_d,
                       mpad_dtype n_token_dtype, void *workspace, void *stream,
                       mpad_status *status);

/* dst = src, one of them on the device or both, of one shape and element size, elements of a row
 * next to each other. Only put on the stream; `mpad_gpu_copy` returns when it is done if the other
 * is the host's. */
mpad_code mpad_gpu_copy_later(const mpad_gpu *gpu, const mpad_view *dst, const mpad_view *src,
                              void *stream, mpad_status *status);
mpad_code mpad_gpu_copy(const mpad_gpu *gpu, const mpad_view *dst, const mpad_view *src,
                        void *stream, mpad_status *status);

/* Makes the device the thread's current one for calls of its runtime, and what was current so
 * again; a fault of the work between, which ended with `code`, is told first and with the device.
 */
mpad_code mpad_gpu_enter(const mpad_gpu *gpu, mpad_gpu_scope *scope, const mpad_gpu_api **api,
                         mpad_status *status);
mpad_code mpad_gpu_leave(const mpad_gpu *gpu, const mpad_gpu_scope *scope, mpad_code code,
                         mpad_status *status);

#endif
