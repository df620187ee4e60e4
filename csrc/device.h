/* Level 5: GPUs as a process with Python has them: what finds runtime libraries and makes device
 * images is Python (moepad.runtimes, moepad.compiler) and is called once per device; streams as
 * objects. Knows no tensors. */
#ifndef MPAD_DEVICE_H
#define MPAD_DEVICE_H

#include <Python.h>

#include "gpu_run.h"
#include "status.h"

/* The device, its runtime opened by the first call that needs it. This and the next may leave a
 * Python exception set, which then is the fault. */
mpad_code mpad_device_find(mpad_device device, mpad_gpu **gpu, mpad_status *status);

/* Loads a part of the kernels, compiled if need be, by the first call that needs it. */
mpad_code mpad_device_load(mpad_gpu *gpu, int part, mpad_status *status);

/* A stream's handle: an integer, or an object with `cuda_stream`, `hip_stream`, `ptr` or `handle`.
 */
mpad_code mpad_device_take_stream(PyObject *value, void **stream, mpad_status *status);

/* What `python -m moepad env` shows: per vendor the libraries looked at, the fault or the devices.
 * Opens the runtimes. A new reference, or NULL with an exception. */
PyObject *mpad_device_report(void);

#endif
