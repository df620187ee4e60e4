/* Level 5: see device.h. */
#include "device.h"

#include "gpu_plan.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const char *const VENDORS[] = {[MPAD_AMD] = "amd", [MPAD_NVIDIA] = "nvidia"};

/* moepad.MODULE.FUNCTION(texts), as many as the format says, "(ss)": a new reference, or NULL with
 * an exception. */
static PyObject *ask(const char *module, const char *function, const char *format, ...)
{
    va_list texts;
    va_start(texts, format);
    PyObject *found = PyImport_ImportModule(module);
    PyObject *called = found ? PyObject_GetAttrString(found, function) : NULL;
    PyObject *arguments = called ? Py_VaBuildValue(format, texts) : NULL;
    PyObject *answer = arguments ? PyObject_CallObject(called, arguments) : NULL;
    va_end(texts);
    Py_XDECREF(arguments);
    Py_XDECREF(called);
    Py_XDECREF(found);
    return answer;
}

static mpad_code fail_python(const char *what, mpad_status *status)
{
    return mpad_fail(status, MPAD_DEVICE, "%s", what);
}

/* Borrows the texts of `list`, whose items are tuples (origin, path, is_override). */
static mpad_code take_candidates(PyObject *list, mpad_library_candidate *candidates, int *n,
                                 PyObject **holds, mpad_status *status)
{
    for (*n = 0; *n < MPAD_LIBRARY_MAX_TRIED && *n < PyList_Size(list); ++*n) {
        PyObject *origin, *path;
        int is_override;
        if (!PyArg_ParseTuple(PyList_GetItem(list, *n), "UUp", &origin, &path, &is_override) ||
            !(holds[2 * *n] = PyUnicode_AsUTF8String(origin)))
            return fail_python("moepad.runtimes.candidates", status);
        if (!(holds[2 * *n + 1] = PyUnicode_EncodeFSDefault(path))) {
            Py_CLEAR(holds[2 * *n]);
            return fail_python("moepad.runtimes.candidates", status);
        }
        candidates[*n] = (mpad_library_candidate){PyBytes_AsString(holds[2 * *n]),
                                                  PyBytes_AsString(holds[2 * *n + 1]), is_override};
    }
    return MPAD_OK;
}

static mpad_code open_runtime(mpad_vendor vendor, mpad_status *status)
{
    mpad_library_candidate candidates[MPAD_LIBRARY_MAX_TRIED];
    PyObject *holds[2 * MPAD_LIBRARY_MAX_TRIED];
    int n = 0;
    if (mpad_gpu_is_open(vendor))
        return MPAD_OK;
    PyObject *list = ask("moepad.runtimes", "candidates", "(s)", VENDORS[vendor]);
    if (!list || !PyList_Check(list)) {
        Py_XDECREF(list);
        return fail_python("moepad.runtimes.candidates", status);
    }
    mpad_code code = take_candidates(list, candidates, &n, holds, status);
    if (code == MPAD_OK) {
        Py_BEGIN_ALLOW_THREADS code = mpad_gpu_open(vendor, candidates, n, status);
        Py_END_ALLOW_THREADS
    }
    for (int i = 0; i < 2 * n; i++)
        Py_DECREF(holds[i]);
    Py_DECREF(list);
    return code;
}

static mpad_code make(mpad_device device, mpad_gpu **gpu, mpad_status *status)
{
    mpad_code code;
    MPAD_TRY(open_runtime(device.vendor, status));
    Py_BEGIN_ALLOW_THREADS code = mpad_gpu_make(device, gpu, status);
    Py_END_ALLOW_THREADS return code;
}

mpad_code mpad_device_find(mpad_device device, mpad_gpu **gpu, mpad_status *status)
{
    *gpu = mpad_gpu_find(device);
    return *gpu ? MPAD_OK : make(device, gpu, status);
}

static mpad_code load(mpad_gpu *gpu, int part, mpad_status *status)
{
    char arch[64];
    snprintf(arch, sizeof arch, "%.*s", (int)strcspn(mpad_gpu_arch(gpu), ":"), mpad_gpu_arch(gpu));
    PyObject *image = ask("moepad.compiler", "image", "(ss)", arch, mpad_gpu_part_name(part));
    if (!image || !PyBytes_Check(image)) {
        Py_XDECREF(image);
        return fail_python("moepad.compiler.image", status);
    }
    const char *bytes = PyBytes_AsString(image);
    mpad_code code;
    Py_BEGIN_ALLOW_THREADS code = mpad_gpu_load(gpu, part, bytes, status);
    Py_END_ALLOW_THREADS Py_DECREF(image);
    return code;
}

mpad_code mpad_device_load(mpad_gpu *gpu, int part, mpad_status *status)
{
    return mpad_gpu_have_part(gpu, part) ? MPAD_OK : load(gpu, part, status);
}

static mpad_code take_handle(PyObject *value, void **stream, mpad_status *status)
{
    *stream = PyLong_AsVoidPtr(value);
    if (!PyErr_Occurred())
        return MPAD_OK;
    PyErr_Clear();
    return mpad_fail(status, MPAD_VALUE, "stream: expected a handle, an integer of 64 bits");
}

mpad_code mpad_device_take_stream(PyObject *value, void **stream, mpad_status *status)
{
    static const char *const attributes[] = {"cuda_stream", "hip_stream", "ptr", "handle"};
    if (PyLong_Check(value) && !PyBool_Check(value))
        return take_handle(value, stream, status);
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++) {
        PyObject *handle = PyObject_GetAttrString(value, attributes[i]);
        PyErr_Clear();
        bool is_handle = handle && PyLong_Check(handle) && !PyBool_Check(handle);
        mpad_code code = is_handle ? take_handle(handle, stream, status) : MPAD_OK;
        Py_XDECREF(handle);
        if (is_handle)
            return code;
    }
    return mpad_fail(status, MPAD_TYPE,
                     "stream: expected an integer handle or an object with a cuda_stream, "
                     "hip_stream, ptr or handle");
}

/* The report. */

static PyObject *report_search(const mpad_library_search *search)
{
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < search->n_tried; i++) {
        PyObject *path = PyUnicode_DecodeFSDefault(search->tried[i].path);
        PyObject *verdict = PyUnicode_DecodeFSDefault(search->tried[i].verdict);
        PyObject *entry =
            path && verdict ? Py_BuildValue("{s:s,s:O,s:O,s:O}", "origin", search->tried[i].origin,
                                            "path", path, "verdict", verdict, "taken",
                                            search->tried[i].is_taken ? Py_True : Py_False)
                            : NULL;
        if (!entry || PyList_Append(list, entry) != 0)
            Py_CLEAR(list);
        Py_XDECREF(entry);
        Py_XDECREF(verdict);
        Py_XDECREF(path);
    }
    return list;
}

static PyObject *report_device(mpad_device device)
{
    mpad_gpu_info info;
    mpad_status status;
    if (mpad_gpu_describe(device, &info, &status) != MPAD_OK)
        return Py_BuildValue("{s:i,s:s}", "index", device.index, "error", status.message);
    return Py_BuildValue("{s:i,s:s,s:s,s:i,s:L}", "index", device.index, "name", info.name, "arch",
                         info.arch, "multiprocessors", info.n_multiprocessor, "memory",
                         (long long)info.memory_bytes);
}

/* NULL with an exception, or the fault in `status`. */
static PyObject *report_devices(mpad_vendor vendor, mpad_status *status)
{
    PyObject *list = PyList_New(0);
    int n = 0;
    if (!list || open_runtime(vendor, status) != MPAD_OK ||
        mpad_gpu_count(vendor, &n, status) != MPAD_OK)
        n = 0;
    for (int i = 0; list && i < n; i++) {
        PyObject *device = report_device((mpad_device){vendor, i});
        if (!device || PyList_Append(list, device) != 0)
            Py_CLEAR(list);
        Py_XDECREF(device);
    }
    return list;
}

static PyObject *report_vendor(mpad_vendor vendor)
{
    mpad_status status = {.code = MPAD_OK};
    PyObject *devices = report_devices(vendor, &status);
    const mpad_library_search *search = mpad_gpu_search(vendor);
    PyObject *tried = devices && !PyErr_Occurred() ? report_search(search) : NULL;
    PyObject *report =
        tried ? Py_BuildValue("{s:s,s:s,s:O,s:O,s:z}", "vendor", VENDORS[vendor], "library",
                              search->path, "tried", tried, "devices", devices, "error",
                              status.code == MPAD_OK ? NULL : status.message)
              : NULL;
    Py_XDECREF(tried);
    Py_XDECREF(devices);
    return report;
}

PyObject *mpad_device_report(void)
{
    PyObject *list = PyList_New(0);
    for (mpad_vendor vendor = MPAD_AMD; list && vendor < MPAD_VENDOR_COUNT; vendor++) {
        PyObject *report = report_vendor(vendor);
        if (!report || PyList_Append(list, report) != 0)
            Py_CLEAR(list);
        Py_XDECREF(report);
    }
    return list;
}
