/* Level 2: what the host path needs of a GPU's runtime: one table of functions, filled by one file
 * per vendor (gpu_hip.c, gpu_cuda.c) from a library that is opened at run time. Nothing here or
 * above knows a vendor's names. A failing function's message has the runtime's call, its error
 * code and the code's name. */
#ifndef MPAD_GPU_H
#define MPAD_GPU_H

#include "params.h"
#include "status.h"

typedef struct mpad_gpu_info {
    char name[128];
    char arch[64]; /* of a device image for it, features included: "gfx942:sramecc+:xnack-" */
    int n_multiprocessor;
    int64_t memory_bytes;
} mpad_gpu_info;

/* What was current in the calling thread before a device was made so. */
typedef struct mpad_gpu_scope {
    void *context;
    int device;
    bool is_changed;
    int capture_mode; /* of mpad_gpu_enter */
} mpad_gpu_scope;

/* n_row rows of n_bytes each, their starts so many bytes apart; either side host or device. */
typedef struct mpad_gpu_transfer {
    void *to;
    const void *from;
    int64_t n_bytes, n_row, to_pitch, from_pitch;
} mpad_gpu_transfer;

enum { MPAD_CAPTURE_RELAXED = 2 }; /* what a thread allocates or frees spoils no other's capture */

/* Works on the calling thread's current device but for `count`, `describe` and `enter`. */
typedef struct mpad_gpu_api {
    const char *name; /* of the runtime */
    mpad_code (*count)(int *n, mpad_status *status);
    mpad_code (*describe)(int device, mpad_gpu_info *info, mpad_status *status);
    mpad_code (*enter)(int device, mpad_gpu_scope *scope, mpad_status *status);
    mpad_code (*leave)(const mpad_gpu_scope *scope, mpad_status *status);
    mpad_code (*load)(const void *image, void **module, mpad_status *status);
    mpad_code (*unload)(void *module, mpad_status *status);
    /* lds_bytes: the most dynamic LDS that a launch of it will ask for. */
    mpad_code (*find)(void *module, const char *symbol, int lds_bytes, void **function,
                      mpad_status *status);
    mpad_code (*launch)(void *function, unsigned grid, unsigned block, unsigned lds_bytes,
                        bool is_dependent, void *argument, void *stream, mpad_status *status);
    mpad_code (*allocate)(int64_t n_bytes, void **address, mpad_status *status);
    mpad_code (*release)(void *address, mpad_status *status);
    mpad_code (*clear)(void *address, int64_t n_bytes, void *stream, mpad_status *status);
    /* Of the host, and such that copies from it need not wait for the host. */
    mpad_code (*allocate_host)(int64_t n_bytes, void **address, mpad_status *status);
    mpad_code (*release_host)(void *address, mpad_status *status);
    mpad_code (*make_stream)(void **stream, mpad_status *status);
    mpad_code (*end_stream)(void *stream, mpad_status *status);
    mpad_code (*copy)(const mpad_gpu_transfer *transfer, void *stream, mpad_status *status);
    mpad_code (*wait)(void *stream, mpad_status *status);
    mpad_code (*wait_all)(mpad_status *status); /* for every stream; none may be in a capture */
    /* Of the calling thread: *mode becomes its mode, and the other way round. */
    mpad_code (*swap_capture_mode)(int *mode, mpad_status *status);
} mpad_gpu_api;

/* Fill a table from an opened runtime library and start the runtime, once per process. `path`:
 * the library's, for messages. */
mpad_code mpad_gpu_hip_open(void *library, const char *path, const mpad_gpu_api **api,
                            mpad_status *status);
mpad_code mpad_gpu_cuda_open(void *library, const char *path, const mpad_gpu_api **api,
                             mpad_status *status);

#endif
