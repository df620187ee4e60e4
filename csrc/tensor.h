/* Level 5: Python objects to views: NumPy arrays, torch tensors, anything with DLPack, and arrays
 * made like one of them. Knows where memory is and what its elements are; knows nothing of what an
 * argument is for. A fault that is a Python exception already stays one: the caller looks at
 * PyErr_Occurred() before it makes an exception of the status. */
#ifndef MPAD_TENSOR_H
#define MPAD_TENSOR_H

#include <Python.h>

#include "status.h"
#include "view.h"

enum { MPAD_EXPORTERS_MAX = 16, MPAD_USER_DTYPES_MAX = 16, MPAD_LEASES_MAX = 24 };

/* What is known of a type of tensor: its C exchange API (struct DLPackExchangeAPI) or NULL. */
typedef struct mpad_exporter {
    PyObject *type; /* strong: an address must not come to mean another type */
    const void *api;
    bool is_torch;
} mpad_exporter;

/* Part of the module's state. Entries are written once and then published by their count, so that
 * readers need no lock; when an array is full, later types are looked up every time. */
typedef struct mpad_tensor_state {
    mpad_exporter exporters[MPAD_EXPORTERS_MAX];
    int n_exporter;
    struct {
        int type_number;
        mpad_dtype dtype;
    } user_dtypes[MPAD_USER_DTYPES_MAX];
    int n_user_dtype;
    int is_writing;
    PyObject *exchange_name, *dlpack_name, *device_name, *requires_grad_name, *detach_name;
    PyObject *is_neg_name, *is_conj_name;
    PyObject *max_version, *max_version_no_wait; /* keyword arguments of __dlpack__ */
} mpad_tensor_state;

/* What has to be given back when the views of a call are no longer used. */
typedef struct mpad_leases {
    int n;
    struct {
        PyObject *object; /* a strong reference, or NULL */
        void *managed;    /* a DLManagedTensorVersioned, or with is_legacy a DLManagedTensor */
        bool is_legacy;
    } item[MPAD_LEASES_MAX];
} mpad_leases;

int mpad_tensor_init(mpad_tensor_state *state); /* imports NumPy; -1 with an exception */
int mpad_tensor_traverse(mpad_tensor_state *state, visitproc visit, void *arg);
void mpad_tensor_clear(mpad_tensor_state *state);

/* Whether the object is one mpad_tensor_acquire takes. */
bool mpad_tensor_check(mpad_tensor_state *state, PyObject *object);

/* Views `object`, which the caller keeps alive and unchanged until mpad_leases_end. `name` is the
 * argument's, for messages. With `is_written` the view is known to be writable. */
mpad_code mpad_tensor_acquire(mpad_tensor_state *state, PyObject *object, const char *name,
                              bool is_written, mpad_view *view, mpad_leases *leases,
                              mpad_status *status);

/* The same for raw memory: what mpad_tensor_acquire takes, or a writable buffer (bytearray, mmap).
 */
mpad_code mpad_tensor_acquire_bytes(mpad_tensor_state *state, PyObject *object, const char *name,
                                    mpad_view *view, mpad_leases *leases, mpad_status *status);

/* A new uninitialised array of the shape, dtype and framework of `like`, whose view is `like_view`;
 * NULL with status. A producer that has DLPack but no C exchange API gets a NumPy array. */
PyObject *mpad_tensor_new_like(mpad_tensor_state *state, PyObject *like, const mpad_view *like_view,
                               mpad_status *status);

/* Uninitialised bytes on a GPU, from the allocator of the framework that `like` is of: they may be
 * given back, with the leases, as soon as the work that uses them is on the framework's current
 * stream. NULL where the framework is unknown. */
mpad_code mpad_tensor_lease_bytes(mpad_tensor_state *state, PyObject *like, mpad_device device,
                                  int64_t n_bytes, void **address, mpad_leases *leases,
                                  mpad_status *status);

/* The current stream of the tensor's framework on its device; NULL, the default stream, where it
 * does not say. */
mpad_code mpad_tensor_stream(mpad_tensor_state *state, PyObject *object, mpad_device device,
                             void **stream, mpad_status *status);

/* Whether it is True or False, Python's or NumPy's. */
bool mpad_is_bool(PyObject *object);

void mpad_leases_end(mpad_leases *leases);

/* The type's name, for messages, in a buffer of 64 bytes, which is returned. */
const char *mpad_type_name(PyObject *object, char *text);

#endif
