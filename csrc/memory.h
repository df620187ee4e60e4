/* Level 6: memory of GPUs as Python objects: capsules that own it, DLPack out of it, staging into
 * it. Python never gets an address. */
#ifndef MPAD_MEMORY_H
#define MPAD_MEMORY_H

#include <Python.h>

#include "gpu_memory.h"
#include "status.h"

/* DLPack's number of a device's type, and back; MPAD_VALUE for one that is no GPU's. */
int mpad_memory_device_type(mpad_device device);
mpad_code mpad_memory_take_device(int device_type, int index, mpad_device *device,
                                  mpad_status *status);

/* A capsule that owns bytes of zeros on the device, or NULL with status. */
PyObject *mpad_memory_new(mpad_gpu *gpu, mpad_device device, int64_t n_bytes, mpad_status *status);

/* A DLPack capsule of the view, whose `data` counts from the start of the capsule's memory, which
 * it keeps. `is_versioned`: as DLPack 1 has it. NULL with status or an exception. */
PyObject *mpad_memory_export(PyObject *memory, const mpad_view *view, bool is_versioned,
                             mpad_status *status);

/* A capsule that owns a staging; `mpad_memory_staging` gives it back, NULL with an exception. */
PyObject *mpad_memory_staging_new(mpad_gpu *gpu, mpad_status *status);
mpad_staging *mpad_memory_staging(PyObject *capsule);

#endif
