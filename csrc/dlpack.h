/* Level 0: DLPack 1.x, https://dmlc.github.io/dlpack/latest/c_api.html: tensors as they go from one
 * library to another. Only what is used here. */
#ifndef MPAD_DLPACK_H
#define MPAD_DLPACK_H

#include <stdint.h>

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_ROCM = 10, DL_ROCM_HOST = 11 };
enum { DL_COMPLEX = 5 };
enum { DL_READ_ONLY = 1, DL_MAJOR = 1, DL_MINOR = 1 };

typedef struct dl_tensor {
    void *data;
    int32_t device_type, device_id;
    int32_t n_dim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape;
    int64_t *strides; /* elements; NULL: C order */
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_legacy {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_legacy *self);
} dl_legacy;

typedef struct dl_versioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct dl_versioned *self);
    uint64_t flags;
    dl_tensor tensor;
} dl_versioned;

#endif
