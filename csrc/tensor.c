/* Level 5: see tensor.h. The only file with NumPy's headers.
 *
 * Ways to a view, fastest first: a NumPy array's own fields; the C exchange API of the object's
 * type (a view that owns nothing); a __dlpack__ capsule (held until the call ends). */
#include "tensor.h"

#include "dlpack.h"

#include <numpy/arrayobject.h>
#include <numpy/arrayscalars.h>

#include <stdio.h>
#include <string.h>

typedef void (*dl_set_error)(void *context, const char *kind, const char *message);

typedef struct dl_api {
    uint32_t major, minor;
    const struct dl_api *previous;
    int (*allocate)(dl_tensor *prototype, dl_versioned **out, void *context, dl_set_error error);
    int (*from_object)(void *object, dl_versioned **out);
    int (*to_object)(dl_versioned *tensor, void **out);
    int (*borrow)(void *object, dl_tensor *out); /* may be NULL */
    int (*current_stream)(int32_t device_type, int32_t device_id, void **out);
} dl_api;

static const struct {
    const char *name;
    int bits, code;
} DTYPES[] = {
#define X(NAME, text, bits, code) [MPAD_DTYPE_##NAME] = {text, bits, code},
    MPAD_DTYPE_LIST(X)
#undef X
};

/* NumPy's names of the dtypes that NumPy itself has not; ml_dtypes registers them when imported. */
static const struct {
    const char *name;
    mpad_dtype dtype;
} USER_DTYPES[] = {
    {"bfloat16", MPAD_DTYPE_BF16},
    {"float8_e4m3fn", MPAD_DTYPE_F8_E4M3FN},
    {"float8_e4m3fnuz", MPAD_DTYPE_F8_E4M3FNUZ},
    {"float8_e5m2", MPAD_DTYPE_F8_E5M2},
    {"float8_e8m0fnu", MPAD_DTYPE_F8_E8M0},
};
enum { N_USER_DTYPE = sizeof USER_DTYPES / sizeof *USER_DTYPES };

/* State. */

int mpad_tensor_init(mpad_tensor_state *state)
{
    if (PyArray_ImportNumPyAPI() < 0)
        return -1;
    const struct {
        PyObject **name;
        const char *text;
    } names[] = {
        {&state->exchange_name, "__dlpack_c_exchange_api__"},
        {&state->dlpack_name, "__dlpack__"},
        {&state->device_name, "__dlpack_device__"},
        {&state->requires_grad_name, "requires_grad"},
        {&state->detach_name, "detach"},
        {&state->is_neg_name, "is_neg"},
        {&state->is_conj_name, "is_conj"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!(*names[i].name = PyUnicode_InternFromString(names[i].text)))
            return -1;
    state->max_version = Py_BuildValue("{s:(ii)}", "max_version", DL_MAJOR, DL_MINOR);
    state->max_version_no_wait =
        Py_BuildValue("{s:(ii),s:i}", "max_version", DL_MAJOR, DL_MINOR, "stream", -1);
    return state->max_version && state->max_version_no_wait ? 0 : -1;
}

int mpad_tensor_traverse(mpad_tensor_state *state, visitproc visit, void *arg)
{
    for (int i = 0; i < state->n_exporter; i++)
        Py_VISIT(state->exporters[i].type);
    Py_VISIT(state->max_version);
    Py_VISIT(state->max_version_no_wait);
    return 0;
}

void mpad_tensor_clear(mpad_tensor_state *state)
{
    while (state->n_exporter > 0)
        Py_CLEAR(state->exporters[--state->n_exporter].type);
    Py_CLEAR(state->exchange_name);
    Py_CLEAR(state->dlpack_name);
    Py_CLEAR(state->device_name);
    Py_CLEAR(state->requires_grad_name);
    Py_CLEAR(state->detach_name);
    Py_CLEAR(state->is_neg_name);
    Py_CLEAR(state->is_conj_name);
    Py_CLEAR(state->max_version);
    Py_CLEAR(state->max_version_no_wait);
}

/* One writer at a time; who finds another one goes without caching. */
static bool begin_writing(mpad_tensor_state *state)
{
    return __atomic_exchange_n(&state->is_writing, 1, __ATOMIC_ACQUIRE) == 0;
}

static void end_writing(mpad_tensor_state *state)
{
    __atomic_store_n(&state->is_writing, 0, __ATOMIC_RELEASE);
}

/* Text for messages. */

static void text_of(PyObject *object, const char *attribute, char *text, size_t n_bytes)
{
    PyObject *value = PyObject_GetAttrString(object, attribute);
    PyObject *string = value ? PyObject_Str(value) : NULL;
    PyObject *bytes = string ? PyUnicode_AsUTF8String(string) : NULL;
    snprintf(text, n_bytes, "%s", bytes ? PyBytes_AsString(bytes) : "?");
    PyErr_Clear();
    Py_XDECREF(bytes);
    Py_XDECREF(string);
    Py_XDECREF(value);
}

const char *mpad_type_name(PyObject *object, char *text)
{
    text_of((PyObject *)Py_TYPE(object), "__name__", text, 64);
    return text;
}

/* NumPy. */

static mpad_dtype user_dtype(mpad_tensor_state *state, PyArray_Descr *descr)
{
    int n_known = __atomic_load_n(&state->n_user_dtype, __ATOMIC_ACQUIRE);
    for (int i = 0; i < n_known; i++)
        if (state->user_dtypes[i].type_number == descr->type_num)
            return state->user_dtypes[i].dtype;

    char name[32], module[32];
    text_of((PyObject *)descr, "name", name, sizeof name);
    text_of((PyObject *)descr->typeobj, "__module__", module, sizeof module);
    for (int i = 0; i < N_USER_DTYPE && strcmp(module, "ml_dtypes") == 0; i++) {
        if (strcmp(name, USER_DTYPES[i].name) != 0)
            continue;
        if (begin_writing(state)) {
            int n = state->n_user_dtype;
            if (n < MPAD_USER_DTYPES_MAX) {
                state->user_dtypes[n].type_number = descr->type_num;
                state->user_dtypes[n].dtype = USER_DTYPES[i].dtype;
                __atomic_store_n(&state->n_user_dtype, n + 1, __ATOMIC_RELEASE);
            }
            end_writing(state);
        }
        return USER_DTYPES[i].dtype;
    }
    return MPAD_DTYPE_COUNT;
}

static mpad_dtype numpy_dtype(mpad_tensor_state *state, PyArray_Descr *descr)
{
    switch (descr->type_num) {
    case NPY_FLOAT:
        return MPAD_DTYPE_F32;
    case NPY_HALF:
        return MPAD_DTYPE_F16;
    case NPY_UBYTE:
        return MPAD_DTYPE_U8;
    case NPY_BYTE:
        return MPAD_DTYPE_I8;
    case NPY_INT:
        return MPAD_DTYPE_I32;
    case NPY_LONG:
        return sizeof(long) == 8 ? MPAD_DTYPE_I64 : MPAD_DTYPE_I32;
    case NPY_LONGLONG:
        return MPAD_DTYPE_I64;
    default:
        return PyTypeNum_ISUSERDEF(descr->type_num) ? user_dtype(state, descr) : MPAD_DTYPE_COUNT;
    }
}

static mpad_code view_array(mpad_tensor_state *state, PyArrayObject *array, const char *name,
                            mpad_view *view, mpad_status *status)
{
    PyArray_Descr *descr = PyArray_DESCR(array);
    view->dtype = numpy_dtype(state, descr);
    if (view->dtype == MPAD_DTYPE_COUNT)
        text_of((PyObject *)descr, "name", view->other_name, sizeof view->other_name);
    MPAD_REQUIRE(!PyDataType_REFCHK(descr), status, MPAD_TYPE,
                 "%s: expected numbers, got an array of Python objects", name);
    MPAD_REQUIRE(PyArray_ISNBO(descr->byteorder), status, MPAD_VALUE,
                 "%s: expected this machine's byte order, got %s with swapped bytes; pass "
                 "array.astype(array.dtype.newbyteorder(\"=\"))",
                 name, mpad_view_dtype_name(view));
    view->device = (mpad_device){MPAD_HOST, 0};
    view->data = PyArray_DATA(array);
    view->n_item_bytes = PyDataType_ELSIZE(descr);
    view->n_dim = PyArray_NDIM(array);
    int n_held = view->n_dim < MPAD_VIEW_MAX_DIM ? view->n_dim : MPAD_VIEW_MAX_DIM;
    const npy_intp *sizes = PyArray_DIMS(array), *strides = PyArray_STRIDES(array);
    for (int dim = 0; dim < n_held; dim++) {
        view->size[dim] = sizes[dim];
        view->stride[dim] = strides[dim];
    }
    view->is_writable = PyArray_ISWRITEABLE(array);
    return MPAD_OK;
}

/* DLPack. */

static mpad_dtype dl_dtype(const dl_tensor *tensor, mpad_view *view)
{
    for (int i = 0; i < MPAD_DTYPE_COUNT; i++)
        if (tensor->code == DTYPES[i].code && tensor->bits == DTYPES[i].bits && tensor->lanes == 1)
            return (mpad_dtype)i;
    static const char *const CODES[] = {"int",    "uint",    "float", "handle",
                                        "bfloat", "complex", "bool"};
    if (tensor->code < sizeof CODES / sizeof *CODES && tensor->lanes == 1)
        snprintf(view->other_name, sizeof view->other_name, "%s%d", CODES[tensor->code],
                 tensor->bits);
    else
        snprintf(view->other_name, sizeof view->other_name, "DLPack type (%d, %d, %d)",
                 tensor->code, tensor->bits, tensor->lanes);
    return MPAD_DTYPE_COUNT;
}

static mpad_code take_device(int device_type, int device_id, const char *name, mpad_device *device,
                             mpad_status *status)
{
    bool is_host =
        device_type == DL_CPU || device_type == DL_CUDA_HOST || device_type == DL_ROCM_HOST;
    MPAD_REQUIRE(is_host || device_type == DL_CUDA || device_type == DL_ROCM, status,
                 MPAD_UNSUPPORTED,
                 "%s: no engine for DLPack device type %d, device %d; considered: the CPU engine "
                 "(needs host memory), the GPU engine (types 2 and 10, CUDA and ROCm); move the "
                 "tensors to the CPU",
                 name, device_type, device_id);
    *device = is_host                  ? (mpad_device){MPAD_HOST, 0}
              : device_type == DL_ROCM ? (mpad_device){MPAD_AMD, device_id}
                                       : (mpad_device){MPAD_NVIDIA, device_id};
    return MPAD_OK;
}

static int32_t dl_device_type(mpad_device device)
{
    return device.vendor == MPAD_AMD ? DL_ROCM : device.vendor == MPAD_NVIDIA ? DL_CUDA : DL_CPU;
}

static mpad_code view_dl(const dl_tensor *tensor, const char *name, mpad_view *view,
                         mpad_status *status)
{
    MPAD_TRY(take_device(tensor->device_type, tensor->device_id, name, &view->device, status));
    view->dtype = dl_dtype(tensor, view);
    view->n_item_bytes = tensor->bits * tensor->lanes / 8;
    MPAD_REQUIRE(tensor->bits * tensor->lanes % 8 == 0, status, MPAD_TYPE,
                 "%s: expected elements of whole bytes, got %s; pass a view as bytes", name,
                 mpad_view_dtype_name(view));
    view->n_dim = tensor->n_dim;
    int n_held = view->n_dim < MPAD_VIEW_MAX_DIM ? view->n_dim : MPAD_VIEW_MAX_DIM;
    bool is_empty = false;
    for (int dim = 0; dim < view->n_dim; dim++)
        is_empty |= tensor->shape[dim] == 0;
    for (int dim = 0; dim < n_held; dim++) {
        view->size[dim] = tensor->shape[dim];
        if (tensor->strides)
            view->stride[dim] = tensor->strides[dim] * view->n_item_bytes;
    }
    if (!tensor->strides) {
        int64_t stride = view->n_item_bytes;
        for (int dim = view->n_dim - 1; dim >= 0; dim--) {
            if (dim < n_held)
                view->stride[dim] = stride;
            stride *= tensor->shape[dim];
        }
    }
    MPAD_REQUIRE(tensor->data || is_empty, status, MPAD_VALUE,
                 "%s: expected a tensor with values in memory, got one without (a fake or meta "
                 "tensor?)",
                 name);
    view->data = tensor->data ? (char *)tensor->data + tensor->byte_offset : NULL;
    return MPAD_OK;
}

static const dl_api *exchange_api(mpad_tensor_state *state, PyObject *type)
{
    PyObject *capsule = PyObject_GetAttr(type, state->exchange_name);
    const dl_api *api = NULL;
    if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
        api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    PyErr_Clear();
    Py_XDECREF(capsule);
    while (api && api->major != DL_MAJOR)
        api = api->previous;
    return api;
}

/* module.NAME if the module is imported already: a new reference, or NULL without an exception. */
static PyObject *imported_attribute(const char *module, const char *name)
{
    PyObject *modules = PyImport_GetModuleDict();
    PyObject *found = modules ? PyDict_GetItemString(modules, module) : NULL;
    PyObject *value = found ? PyObject_GetAttrString(found, name) : NULL;
    PyErr_Clear();
    return value;
}

static PyObject *torch_attribute(const char *name)
{
    return imported_attribute("torch", name);
}

/* The outermost package of the object's type: "cupy". */
static const char *package_of(PyObject *object, char *text, size_t n_bytes)
{
    text_of((PyObject *)Py_TYPE(object), "__module__", text, n_bytes);
    text[strcspn(text, ".")] = 0;
    return text;
}

static bool is_cupy(PyObject *object)
{
    char package[32];
    return strcmp(package_of(object, package, sizeof package), "cupy") == 0;
}

static bool is_torch_type(PyObject *type)
{
    PyObject *tensor = torch_attribute("Tensor");
    bool is_torch = tensor && PyType_Check(tensor) && PyObject_IsSubclass(type, tensor) == 1;
    PyErr_Clear();
    Py_XDECREF(tensor);
    return is_torch;
}

static mpad_exporter find_exporter(mpad_tensor_state *state, PyObject *object)
{
    PyObject *type = (PyObject *)Py_TYPE(object);
    int n_known = __atomic_load_n(&state->n_exporter, __ATOMIC_ACQUIRE);
    for (int i = 0; i < n_known; i++)
        if (state->exporters[i].type == type)
            return state->exporters[i];

    mpad_exporter found = {type, exchange_api(state, type), is_torch_type(type)};
    if ((found.api || found.is_torch) && begin_writing(state)) {
        int n = state->n_exporter;
        if (n < MPAD_EXPORTERS_MAX) {
            Py_INCREF(type);
            state->exporters[n] = found;
            __atomic_store_n(&state->n_exporter, n + 1, __ATOMIC_RELEASE);
        }
        end_writing(state);
    }
    return found;
}

static mpad_code add_lease(mpad_leases *leases, PyObject *steals_object, void *managed,
                           bool is_legacy)
{
    leases->item[leases->n].object = steals_object;
    leases->item[leases->n].managed = managed;
    leases->item[leases->n].is_legacy = is_legacy;
    leases->n++;
    return MPAD_OK;
}

void mpad_leases_end(mpad_leases *leases)
{
    while (leases->n > 0) {
        leases->n--;
        void *managed = leases->item[leases->n].managed;
        if (managed && leases->item[leases->n].is_legacy) {
            dl_legacy *legacy = managed;
            if (legacy->deleter)
                legacy->deleter(legacy);
        } else if (managed) {
            dl_versioned *versioned = managed;
            if (versioned->deleter)
                versioned->deleter(versioned);
        }
        Py_XDECREF(leases->item[leases->n].object);
    }
}

/* A fault for the exception a producer raised. What is no fault of the argument passes through. */
static mpad_code fail_exception(mpad_code code, const char *what, mpad_status *status)
{
    bool is_ours = !PyErr_Occurred() || (PyErr_ExceptionMatches(PyExc_Exception) &&
                                         !PyErr_ExceptionMatches(PyExc_MemoryError) &&
                                         !PyErr_ExceptionMatches(PyExc_RecursionError));
    if (!is_ours)
        return mpad_fail(status, code, "%s", what);
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    PyObject *string = value ? PyObject_Str(value) : NULL;
    PyObject *bytes = string ? PyUnicode_AsUTF8String(string) : NULL;
    PyErr_Clear();
    char type_name[64] = "no reason given";
    const char *text = bytes ? PyBytes_AsString(bytes) : "";
    int n_line = (int)strcspn(text, "\n"); /* torch appends a C++ stack */
    mpad_fail(status, code, "%s: %s: %.*s", what,
              value ? mpad_type_name(value, type_name) : type_name, n_line < 300 ? n_line : 300,
              text);
    Py_XDECREF(bytes);
    Py_XDECREF(string);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return code;
}

static mpad_code fail_export(const char *name, mpad_status *status)
{
    char what[96];
    snprintf(what, sizeof what, "%s: its producer cannot export it through DLPack", name);
    return fail_exception(MPAD_TYPE, what, status);
}

/* A call under torch's grad mode would silently cut the graph. */
static mpad_code check_grad(mpad_tensor_state *state, PyObject *tensor, const char *name,
                            bool *requires_grad, mpad_status *status)
{
    PyObject *flag = PyObject_GetAttr(tensor, state->requires_grad_name);
    if (!flag)
        return fail_export(name, status);
    *requires_grad = flag == Py_True;
    Py_DECREF(flag);
    if (!*requires_grad)
        return MPAD_OK;
    PyObject *is_enabled = torch_attribute("is_grad_enabled");
    PyObject *answer = is_enabled ? PyObject_CallNoArgs(is_enabled) : NULL;
    Py_XDECREF(is_enabled);
    if (!answer)
        return fail_export(name, status);
    bool is_grad_mode = answer != Py_False;
    Py_DECREF(answer);
    MPAD_REQUIRE(!is_grad_mode, status, MPAD_TYPE,
                 "%s: requires grad, but moepad is forward only; use torch.no_grad(), or pass "
                 "%s.detach()",
                 name, name);
    return MPAD_OK;
}

/* What torch's views imply without saying it in memory: x.conj() and the imaginary part of it. Such
 * a view steps over complex numbers, so a plain row of real ones need not be asked. */
static mpad_code check_lazy_sign(mpad_tensor_state *state, PyObject *object,
                                 const dl_tensor *tensor, const char *name, mpad_status *status)
{
    int last = tensor->n_dim - 1;
    bool is_plain =
        tensor->code != DL_COMPLEX && (last < 0 || !tensor->strides || tensor->strides[last] == 1);
    PyObject *const names[] = {state->is_neg_name, state->is_conj_name};
    for (int i = 0; i < 2 && !is_plain; i++) {
        PyObject *answer = PyObject_CallMethodObjArgs(object, names[i], NULL);
        if (!answer)
            return fail_export(name, status);
        bool is_lazy = answer == Py_True;
        Py_DECREF(answer);
        MPAD_REQUIRE(!is_lazy, status, MPAD_TYPE,
                     "%s: is a lazily negated or conjugated view; pass %s.resolve_conj()"
                     ".resolve_neg()",
                     name, name);
    }
    return MPAD_OK;
}

static mpad_code view_managed(dl_versioned *managed, const char *name, mpad_view *view,
                              mpad_leases *leases, mpad_status *status)
{
    add_lease(leases, NULL, managed, false);
    MPAD_REQUIRE(managed->major == DL_MAJOR, status, MPAD_TYPE,
                 "%s: expected DLPack version %d.x, got %u.%u", name, DL_MAJOR, managed->major,
                 managed->minor);
    view->is_writable = !(managed->flags & DL_READ_ONLY);
    return view_dl(&managed->tensor, name, view, status);
}

static mpad_code view_exchange(mpad_tensor_state *state, const mpad_exporter *exporter,
                               PyObject *object, const char *name, bool is_written, mpad_view *view,
                               mpad_leases *leases, mpad_status *status)
{
    const dl_api *api = exporter->api;
    bool is_torch = exporter->is_torch;
    /* Only the managed form says whether it is read only; torch has no such tensors. */
    if (api->borrow && (is_torch || !is_written)) {
        dl_tensor tensor = {0};
        if (api->borrow(object, &tensor) != 0)
            return fail_export(name, status);
        if (is_torch)
            MPAD_TRY(check_lazy_sign(state, object, &tensor, name, status));
        view->is_writable = true;
        return view_dl(&tensor, name, view, status);
    }
    dl_versioned *managed;
    if (api->from_object(object, &managed) != 0)
        return fail_export(name, status);
    return view_managed(managed, name, view, leases, status);
}

/* Refuses a device that would want a stream before its producer is asked for one. */
static mpad_code check_device_of(mpad_tensor_state *state, PyObject *object, const char *name,
                                 mpad_status *status)
{
    PyObject *pair = PyObject_CallMethodObjArgs(object, state->device_name, NULL);
    if (!pair && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        return MPAD_OK;
    }
    int device_type, device_id;
    bool is_pair =
        pair && PyTuple_Check(pair) && PyArg_ParseTuple(pair, "ii", &device_type, &device_id);
    Py_XDECREF(pair);
    if (!is_pair) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "__dlpack_device__ returned no pair of integers");
        return fail_export(name, status);
    }
    mpad_device device;
    return take_device(device_type, device_id, name, &device, status);
}

/* __dlpack__(max_version=...), or without it where the producer is older than that keyword. Work
 * runs on CuPy's current stream, so CuPy need not wait (stream=-1); other producers order theirs
 * before the default stream. */
static PyObject *call_dlpack(mpad_tensor_state *state, PyObject *object)
{
    PyObject *method = PyObject_GetAttr(object, state->dlpack_name);
    PyObject *none = method ? PyTuple_New(0) : NULL;
    PyObject *keywords = is_cupy(object) ? state->max_version_no_wait : state->max_version;
    PyObject *capsule = none ? PyObject_Call(method, none, keywords) : NULL;
    if (!capsule && none && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        capsule = PyObject_Call(method, none, NULL);
    }
    Py_XDECREF(none);
    Py_XDECREF(method);
    return capsule;
}

static mpad_code view_capsule(mpad_tensor_state *state, PyObject *object, const char *name,
                              mpad_view *view, mpad_leases *leases, mpad_status *status)
{
    MPAD_TRY(check_device_of(state, object, name, status));
    PyObject *capsule = call_dlpack(state, object);
    if (!capsule)
        return fail_export(name, status);
    mpad_code code;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        dl_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        PyCapsule_SetName(capsule, "used_dltensor_versioned");
        code = view_managed(managed, name, view, leases, status);
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        dl_legacy *managed = PyCapsule_GetPointer(capsule, "dltensor");
        PyCapsule_SetName(capsule, "used_dltensor");
        add_lease(leases, NULL, managed, true);
        view->is_writable = true;
        code = view_dl(&managed->tensor, name, view, status);
    } else {
        char type[64];
        code = mpad_fail(status, MPAD_TYPE,
                         "%s: expected __dlpack__ to return a new DLPack capsule, got %s", name,
                         mpad_type_name(capsule, type));
    }
    Py_DECREF(capsule);
    return code;
}

bool mpad_tensor_check(mpad_tensor_state *state, PyObject *object)
{
    return PyArray_Check(object) || find_exporter(state, object).api ||
           (!PyType_Check(object) && PyObject_HasAttr(object, state->dlpack_name));
}

static mpad_code view_any(mpad_tensor_state *state, PyObject *object, const char *name,
                          bool is_written, mpad_view *view, mpad_leases *leases,
                          mpad_status *status)
{
    if (PyArray_Check(object))
        return view_array(state, (PyArrayObject *)object, name, view, status);
    mpad_exporter exporter = find_exporter(state, object);
    bool requires_grad = false;
    if (exporter.is_torch)
        MPAD_TRY(check_grad(state, object, name, &requires_grad, status));
    if (exporter.api)
        return view_exchange(state, &exporter, object, name, is_written, view, leases, status);
    char type[64];
    MPAD_REQUIRE(mpad_tensor_check(state, object), status, MPAD_TYPE,
                 "%s: expected a NumPy array, a torch tensor or an object with __dlpack__, got %s; "
                 "convert it with np.asarray",
                 name, mpad_type_name(object, type));
    if (!requires_grad)
        return view_capsule(state, object, name, view, leases, status);
    PyObject *detached = PyObject_CallMethodObjArgs(object, state->detach_name, NULL);
    if (!detached)
        return fail_export(name, status);
    mpad_code code = view_capsule(state, detached, name, view, leases, status);
    add_lease(leases, detached, NULL, false);
    return code;
}

mpad_code mpad_tensor_acquire(mpad_tensor_state *state, PyObject *object, const char *name,
                              bool is_written, mpad_view *view, mpad_leases *leases,
                              mpad_status *status)
{
    MPAD_TRY(view_any(state, object, name, is_written, view, leases, status));
    MPAD_REQUIRE(!is_written || view->is_writable, status, MPAD_VALUE,
                 "%s: expected writable memory, got a read-only array; pass a copy", name);
    return MPAD_OK;
}

mpad_code mpad_tensor_acquire_bytes(mpad_tensor_state *state, PyObject *object, const char *name,
                                    mpad_view *view, mpad_leases *leases, mpad_status *status)
{
    if (mpad_tensor_check(state, object))
        return mpad_tensor_acquire(state, object, name, true, view, leases, status);
    PyObject *array = PyArray_FromBuffer(object, PyArray_DescrFromType(NPY_UBYTE), -1, 0);
    if (!array) {
        if (!PyErr_ExceptionMatches(PyExc_Exception))
            return mpad_fail(status, MPAD_MEMORY, "%s", name);
        PyErr_Clear();
        char type[64];
        return mpad_fail(status, MPAD_TYPE, "%s: expected a tensor or a contiguous buffer, got %s",
                         name, mpad_type_name(object, type));
    }
    add_lease(leases, array, NULL, false);
    return mpad_tensor_acquire(state, array, name, true, view, leases, status);
}

/* New arrays. */

static PyObject *new_array(const mpad_view *view, PyArray_Descr *steals_descr)
{
    npy_intp sizes[MPAD_VIEW_MAX_DIM];
    for (int dim = 0; dim < view->n_dim; dim++)
        sizes[dim] = (npy_intp)view->size[dim];
    return PyArray_NewFromDescr(&PyArray_Type, steals_descr, view->n_dim, sizes, NULL, NULL, 0,
                                NULL);
}

static PyObject *new_torch(PyObject *like)
{
    PyObject *empty_like = torch_attribute("empty_like");
    PyObject *made = empty_like ? PyObject_CallFunctionObjArgs(empty_like, like, NULL) : NULL;
    Py_XDECREF(empty_like);
    return made;
}

static void raise_from_producer(void *context, const char *kind, const char *message)
{
    (void)context;
    (void)kind;
    PyErr_SetString(PyExc_RuntimeError, message);
}

static PyObject *new_exchange(const dl_api *api, const mpad_view *view)
{
    int64_t sizes[MPAD_VIEW_MAX_DIM];
    memcpy(sizes, view->size, sizeof sizes);
    dl_tensor prototype = {
        .device_type = dl_device_type(view->device),
        .device_id = view->device.index,
        .n_dim = view->n_dim,
        .code = (uint8_t)DTYPES[view->dtype].code,
        .bits = (uint8_t)DTYPES[view->dtype].bits,
        .lanes = 1,
        .shape = sizes,
    };
    dl_versioned *managed;
    void *made = NULL;
    if (api->allocate(&prototype, &managed, NULL, raise_from_producer) != 0 ||
        api->to_object(managed, &made) != 0)
        return NULL;
    return made;
}

/* Imports ml_dtypes where NumPy has no such dtype; NULL with an exception. */
static PyArray_Descr *numpy_descr(mpad_dtype dtype)
{
    if (dtype == MPAD_DTYPE_F32)
        return PyArray_DescrFromType(NPY_FLOAT);
    if (dtype == MPAD_DTYPE_F16)
        return PyArray_DescrFromType(NPY_HALF);
    PyObject *module = PyImport_ImportModule("ml_dtypes");
    PyObject *type = module ? PyObject_GetAttrString(module, "bfloat16") : NULL;
    PyArray_Descr *descr = NULL;
    if (type)
        PyArray_DescrConverter(type, &descr);
    Py_XDECREF(type);
    Py_XDECREF(module);
    return descr;
}

/* PACKAGE.empty_like(like), of the package the type comes from, as NumPy's look-alikes have it. */
static PyObject *new_look_alike(PyObject *like)
{
    char package[32], type[64];
    PyObject *empty_like =
        imported_attribute(package_of(like, package, sizeof package), "empty_like");
    if (!empty_like) {
        PyErr_Format(PyExc_TypeError, "%s has no way to make one; pass out",
                     mpad_type_name(like, type));
        return NULL;
    }
    PyObject *made = PyObject_CallFunctionObjArgs(empty_like, like, NULL);
    Py_DECREF(empty_like);
    return made;
}

PyObject *mpad_tensor_new_like(mpad_tensor_state *state, PyObject *like, const mpad_view *like_view,
                               mpad_status *status)
{
    PyObject *made = NULL;
    if (PyArray_Check(like)) {
        PyArray_Descr *descr = PyArray_DESCR((PyArrayObject *)like);
        Py_INCREF(descr);
        made = new_array(like_view, descr);
    } else {
        mpad_exporter exporter = find_exporter(state, like);
        if (exporter.is_torch) {
            made = new_torch(like);
        } else if (exporter.api) {
            made = new_exchange(exporter.api, like_view);
        } else if (like_view->device.vendor != MPAD_HOST) {
            made = new_look_alike(like);
        } else {
            PyArray_Descr *descr = numpy_descr(like_view->dtype);
            made = descr ? new_array(like_view, descr) : NULL;
        }
    }
    if (!made)
        fail_exception(MPAD_MEMORY, "out: no array like hidden_states could be made", status);
    return made;
}

/* PACKAGE.empty((n_bytes,), dtype=uint8, device=like.device), CuPy's without a device. */
static PyObject *new_bytes(PyObject *like, bool is_torch, int64_t n_bytes)
{
    PyObject *empty = imported_attribute(is_torch ? "torch" : "cupy", "empty");
    PyObject *dtype = imported_attribute(is_torch ? "torch" : "cupy", "uint8");
    PyObject *size = empty && dtype ? Py_BuildValue("(L)", (long long)n_bytes) : NULL;
    PyObject *keywords = size ? Py_BuildValue("{s:O}", "dtype", dtype) : NULL;
    PyObject *device = keywords && is_torch ? PyObject_GetAttrString(like, "device") : NULL;
    PyObject *made = NULL;
    if (device)
        PyDict_SetItemString(keywords, "device", device);
    if (keywords && (device || !is_torch))
        made = PyObject_Call(empty, size, keywords);
    Py_XDECREF(device);
    Py_XDECREF(keywords);
    Py_XDECREF(size);
    Py_XDECREF(dtype);
    Py_XDECREF(empty);
    return made;
}

static mpad_code lease_exchange(const dl_api *api, mpad_device device, int64_t n_bytes,
                                void **address, mpad_leases *leases, mpad_status *status)
{
    dl_tensor prototype = {
        .device_type = dl_device_type(device),
        .device_id = device.index,
        .n_dim = 1,
        .code = (uint8_t)DTYPES[MPAD_DTYPE_U8].code,
        .bits = (uint8_t)DTYPES[MPAD_DTYPE_U8].bits,
        .lanes = 1,
        .shape = &n_bytes,
    };
    dl_versioned *managed;
    if (api->allocate(&prototype, &managed, NULL, raise_from_producer) != 0)
        return fail_exception(MPAD_MEMORY, "workspace: none could be made", status);
    add_lease(leases, NULL, managed, false);
    *address = (char *)managed->tensor.data + managed->tensor.byte_offset;
    return MPAD_OK;
}

mpad_code mpad_tensor_lease_bytes(mpad_tensor_state *state, PyObject *like, mpad_device device,
                                  int64_t n_bytes, void **address, mpad_leases *leases,
                                  mpad_status *status)
{
    mpad_exporter exporter = find_exporter(state, like);
    *address = NULL;
    if (exporter.is_torch && exporter.api)
        return lease_exchange(exporter.api, device, n_bytes, address, leases, status);
    if (!exporter.is_torch && !is_cupy(like))
        return MPAD_OK;
    PyObject *made = new_bytes(like, exporter.is_torch, n_bytes);
    if (!made)
        return fail_exception(MPAD_MEMORY, "workspace: none could be made", status);
    add_lease(leases, made, NULL, false);
    mpad_view view;
    MPAD_TRY(mpad_tensor_acquire_bytes(state, made, "workspace", &view, leases, status));
    *address = view.data;
    return MPAD_OK;
}

/* An integer that a call without arguments, or with the device's index, returns. */
static PyObject *torch_stream(int index)
{
    PyObject *c = torch_attribute("_C");
    PyObject *raw = c ? PyObject_CallMethod(c, "_cuda_getCurrentRawStream", "i", index) : NULL;
    Py_XDECREF(c);
    return raw;
}

static PyObject *cupy_stream(void)
{
    PyObject *cuda = imported_attribute("cupy", "cuda");
    PyObject *current = cuda ? PyObject_CallMethod(cuda, "get_current_stream", NULL) : NULL;
    PyObject *raw = current ? PyObject_GetAttrString(current, "ptr") : NULL;
    Py_XDECREF(current);
    Py_XDECREF(cuda);
    return raw;
}

mpad_code mpad_tensor_stream(mpad_tensor_state *state, PyObject *object, mpad_device device,
                             void **stream, mpad_status *status)
{
    mpad_exporter exporter = find_exporter(state, object);
    const dl_api *api = exporter.api;
    bool failed = false;
    *stream = NULL;
    if (api && api->current_stream) {
        failed = api->current_stream(dl_device_type(device), device.index, stream) != 0;
    } else if (exporter.is_torch || is_cupy(object)) {
        PyObject *raw = exporter.is_torch ? torch_stream(device.index) : cupy_stream();
        if (raw)
            *stream = PyLong_AsVoidPtr(raw);
        failed = !raw || PyErr_Occurred();
        Py_XDECREF(raw);
    }
    if (failed)
        return fail_exception(MPAD_DEVICE, "stream: the framework's current one is not to be had",
                              status);
    return MPAD_OK;
}

bool mpad_is_bool(PyObject *object)
{
    return object == Py_True || object == Py_False || PyArray_IsScalar(object, Bool);
}
