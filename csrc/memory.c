/* Level 6: see memory.h. */
#include "memory.h"

#include "dlpack.h"

#include <stdlib.h>
#include <string.h>

static const char MEMORY[] = "moepad.memory", STAGING[] = "moepad.staging";
static const char LEGACY[] = "dltensor", VERSIONED[] = "dltensor_versioned";

typedef struct memory {
    mpad_gpu *gpu;
    mpad_device device;
    void *address;
    int64_t n_bytes;
} memory;

/* A tensor on its way to another library, which keeps the memory's capsule. */
typedef struct exported {
    union {
        dl_versioned versioned;
        dl_legacy legacy;
    };
    int64_t shape[MPAD_VIEW_MAX_DIM], strides[MPAD_VIEW_MAX_DIM];
} exported;

static const struct {
    uint8_t code, bits;
} DTYPES[] = {
#define X(NAME, text, bits, code) [MPAD_DTYPE_##NAME] = {code, bits},
    MPAD_DTYPE_LIST(X)
#undef X
};

int mpad_memory_device_type(mpad_device device)
{
    return device.vendor == MPAD_AMD ? DL_ROCM : DL_CUDA;
}

mpad_code mpad_memory_take_device(int device_type, int index, mpad_device *device,
                                  mpad_status *status)
{
    MPAD_REQUIRE(device_type == DL_CUDA || device_type == DL_ROCM, status, MPAD_VALUE,
                 "device_type: expected %d or %d, got %d", DL_CUDA, DL_ROCM, device_type);
    *device = (mpad_device){device_type == DL_ROCM ? MPAD_AMD : MPAD_NVIDIA, index};
    return MPAD_OK;
}

/* A fault of freeing has nobody to go to: the process ends, or the device is lost. */
static void release(memory *owned)
{
    mpad_status ignored;
    Py_BEGIN_ALLOW_THREADS mpad_gpu_release(owned->gpu, owned->address, &ignored);
    Py_END_ALLOW_THREADS free(owned);
}

static void end_memory(PyObject *capsule)
{
    release(PyCapsule_GetPointer(capsule, MEMORY));
}

PyObject *mpad_memory_new(mpad_gpu *gpu, mpad_device device, int64_t n_bytes, mpad_status *status)
{
    memory *made = malloc(sizeof *made);
    if (!made) {
        mpad_fail(status, MPAD_MEMORY, "no memory for a capsule");
        return NULL;
    }
    *made = (memory){.gpu = gpu, .device = device, .n_bytes = n_bytes};
    mpad_code code;
    Py_BEGIN_ALLOW_THREADS code = mpad_gpu_allocate(gpu, n_bytes, &made->address, status);
    Py_END_ALLOW_THREADS if (code != MPAD_OK)
    {
        free(made);
        return NULL;
    }
    PyObject *capsule = PyCapsule_New(made, MEMORY, end_memory);
    if (!capsule)
        release(made);
    return capsule;
}

/* By whoever has the tensor, in any thread; after Python's end the memory goes with the process. */
static void end_exported(exported *tensor, PyObject *owner)
{
    if (Py_IsInitialized()) {
        PyGILState_STATE gil = PyGILState_Ensure();
        Py_DECREF(owner);
        PyGILState_Release(gil);
    }
    free(tensor);
}

static void end_versioned(dl_versioned *self)
{
    end_exported((exported *)self, self->context);
}

static void end_legacy(dl_legacy *self)
{
    end_exported((exported *)self, self->context);
}

/* Of a capsule whose tensor nobody took; a taker renames it. */
static void end_capsule(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, VERSIONED))
        end_versioned(PyCapsule_GetPointer(capsule, VERSIONED));
    else if (PyCapsule_IsValid(capsule, LEGACY))
        end_legacy(PyCapsule_GetPointer(capsule, LEGACY));
}

static dl_tensor describe(const memory *owned, const mpad_view *view, exported *made)
{
    for (int i = 0; i < view->n_dim; i++) {
        made->shape[i] = view->size[i];
        made->strides[i] = view->stride[i] / view->n_item_bytes;
    }
    return (dl_tensor){
        .data = owned->address ? (char *)owned->address + (intptr_t)view->data : NULL,
        .device_type = mpad_memory_device_type(owned->device),
        .device_id = owned->device.index,
        .n_dim = view->n_dim,
        .code = DTYPES[view->dtype].code,
        .bits = DTYPES[view->dtype].bits,
        .lanes = 1,
        .shape = made->shape,
        .strides = made->strides,
    };
}

/* Whether every element lies within the memory. */
static bool is_within(const memory *owned, const mpad_view *view)
{
    int64_t last = (intptr_t)view->data + view->n_item_bytes;
    if (mpad_view_count(view) == 0)
        return true;
    for (int i = 0; i < view->n_dim; i++) {
        if (view->stride[i] < 0)
            return false;
        last += (view->size[i] - 1) * view->stride[i];
    }
    return (intptr_t)view->data >= 0 && last <= owned->n_bytes;
}

PyObject *mpad_memory_export(PyObject *capsule, const mpad_view *view, bool is_versioned,
                             mpad_status *status)
{
    memory *owned = PyCapsule_GetPointer(capsule, MEMORY);
    if (!owned)
        return NULL;
    if (!is_within(owned, view)) {
        mpad_fail(status, MPAD_VALUE, "expected a view within %lld bytes",
                  (long long)owned->n_bytes);
        return NULL;
    }
    exported *made = calloc(1, sizeof *made);
    if (!made)
        return PyErr_NoMemory();
    if (is_versioned)
        made->versioned = (dl_versioned){.major = DL_MAJOR,
                                         .minor = DL_MINOR,
                                         .context = capsule,
                                         .deleter = end_versioned,
                                         .tensor = describe(owned, view, made)};
    else
        made->legacy = (dl_legacy){
            .tensor = describe(owned, view, made), .context = capsule, .deleter = end_legacy};
    PyObject *result = PyCapsule_New(made, is_versioned ? VERSIONED : LEGACY, end_capsule);
    if (result)
        Py_INCREF(capsule);
    else
        free(made);
    return result;
}

static void end_staging(PyObject *capsule)
{
    mpad_staging *staging = PyCapsule_GetPointer(capsule, STAGING);
    mpad_status ignored;
    Py_BEGIN_ALLOW_THREADS mpad_staging_end(staging, &ignored);
    Py_END_ALLOW_THREADS
}

PyObject *mpad_memory_staging_new(mpad_gpu *gpu, mpad_status *status)
{
    mpad_staging *staging;
    mpad_code code;
    Py_BEGIN_ALLOW_THREADS code = mpad_staging_make(gpu, &staging, status);
    Py_END_ALLOW_THREADS if (code != MPAD_OK) return NULL;
    PyObject *capsule = PyCapsule_New(staging, STAGING, end_staging);
    if (!capsule)
        mpad_staging_end(staging, status);
    return capsule;
}

mpad_staging *mpad_memory_staging(PyObject *capsule)
{
    return PyCapsule_GetPointer(capsule, STAGING);
}
