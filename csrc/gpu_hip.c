/* Level 3: gpu.h for AMD: libamdhip64, ROCm 5 to 7. The only file with HIP names; declares what it
 * uses of the ABI itself, so that no ROCm header is needed to build it. */
#include "gpu.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

enum {
    HIP_SUCCESS = 0,
    HIP_MEMCPY_DEFAULT = 4,
    HIP_MULTIPROCESSOR_COUNT = 63,
    HIP_STREAM_NON_BLOCKING = 1,
};

/* X(result, name, parameters) */
#define HIP_LIST(X)                                                                                \
    X(int, hipInit, (unsigned flags))                                                              \
    X(int, hipGetDeviceCount, (int *n))                                                            \
    X(int, hipDeviceGetName, (char *name, int n, int device))                                      \
    X(int, hipDeviceTotalMem, (size_t *n_bytes, int device))                                       \
    X(int, hipDeviceGetAttribute, (int *value, int attribute, int device))                         \
    X(int, hipGetDevice, (int *device))                                                            \
    X(int, hipSetDevice, (int device))                                                             \
    X(int, hipModuleLoadData, (void **module, const void *image))                                  \
    X(int, hipModuleUnload, (void *module))                                                        \
    X(int, hipModuleGetFunction, (void **function, void *module, const char *symbol))              \
    X(int, hipModuleLaunchKernel,                                                                  \
      (void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,        \
       unsigned block_y, unsigned block_z, unsigned lds_bytes, void *stream, void **arguments,     \
       void **extra))                                                                              \
    X(int, hipMalloc, (void **address, size_t n_bytes))                                            \
    X(int, hipFree, (void *address))                                                               \
    X(int, hipMemcpyAsync, (void *to, const void *from, size_t n_bytes, int kind, void *stream))   \
    X(int, hipMemcpy2DAsync,                                                                       \
      (void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t n_bytes,             \
       size_t n_row, int kind, void *stream))                                                      \
    X(int, hipMemsetAsync, (void *address, int value, size_t n_bytes, void *stream))               \
    X(int, hipHostMalloc, (void **address, size_t n_bytes, unsigned flags))                        \
    X(int, hipHostFree, (void *address))                                                           \
    X(int, hipStreamCreateWithFlags, (void **stream, unsigned flags))                              \
    X(int, hipStreamDestroy, (void *stream))                                                       \
    X(int, hipStreamSynchronize, (void *stream))                                                   \
    X(int, hipDeviceSynchronize, (void))                                                           \
    X(int, hipThreadExchangeStreamCaptureMode, (int *mode))                                        \
    X(int, hipGetLastError, (void))                                                                \
    X(const char *, hipGetErrorName, (int error))

static struct {
#define X(result, name, parameters) result(*name) parameters;
    HIP_LIST(X)
#undef X
    int (*properties)(void *properties, int device);
} hip;

/* The runtime keeps the error for whoever asks next, a framework after its own launch: ours is
 * reported here, so it is taken back. */
static mpad_code fail(const char *call, int error, mpad_status *status)
{
    const char *name = hip.hipGetErrorName(error);
    hip.hipGetLastError();
    return mpad_fail(status, MPAD_DEVICE, "%s: error %d (%s)", call, error, name ? name : "?");
}

#define HIP_TRY(call, ...)                                                                         \
    do {                                                                                           \
        int error_ = hip.call(__VA_ARGS__);                                                        \
        if (error_ != HIP_SUCCESS)                                                                 \
            return fail(#call, error_, status);                                                    \
    } while (0)

static mpad_code count(int *n, mpad_status *status)
{
    HIP_TRY(hipGetDeviceCount, n);
    return MPAD_OK;
}

/* The architecture's full name is in a struct whose layout differs between releases; it is the only
 * text in it, after the device's name, that begins so. */
static mpad_code read_arch(int device, char *arch, size_t n_bytes, mpad_status *status)
{
    enum { PROPERTIES_BYTES = 4096, NAME_BYTES = 256 };
    char properties[PROPERTIES_BYTES + 1] = "";
    int error = hip.properties(properties, device);
    if (error != HIP_SUCCESS)
        return fail("hipGetDeviceProperties", error, status);
    const char *found =
        memmem(properties + NAME_BYTES, PROPERTIES_BYTES - NAME_BYTES, "gfx", strlen("gfx"));
    MPAD_REQUIRE(found, status, MPAD_DEVICE, "hipGetDeviceProperties: names no architecture");
    snprintf(arch, n_bytes, "%.63s", found);
    return MPAD_OK;
}

static mpad_code describe(int device, mpad_gpu_info *info, mpad_status *status)
{
    size_t n_bytes;
    HIP_TRY(hipDeviceGetName, info->name, (int)sizeof info->name, device);
    HIP_TRY(hipDeviceTotalMem, &n_bytes, device);
    HIP_TRY(hipDeviceGetAttribute, &info->n_multiprocessor, HIP_MULTIPROCESSOR_COUNT, device);
    info->memory_bytes = (int64_t)n_bytes;
    return read_arch(device, info->arch, sizeof info->arch, status);
}

static mpad_code enter(int device, mpad_gpu_scope *scope, mpad_status *status)
{
    scope->is_changed = false;
    HIP_TRY(hipGetDevice, &scope->device);
    if (scope->device == device)
        return MPAD_OK;
    HIP_TRY(hipSetDevice, device);
    scope->is_changed = true;
    return MPAD_OK;
}

static mpad_code leave(const mpad_gpu_scope *scope, mpad_status *status)
{
    if (scope->is_changed)
        HIP_TRY(hipSetDevice, scope->device);
    return MPAD_OK;
}

static mpad_code load(const void *image, void **module, mpad_status *status)
{
    HIP_TRY(hipModuleLoadData, module, image);
    return MPAD_OK;
}

static mpad_code unload(void *module, mpad_status *status)
{
    HIP_TRY(hipModuleUnload, module);
    return MPAD_OK;
}

static mpad_code find(void *module, const char *symbol, int lds_bytes, void **function,
                      mpad_status *status)
{
    (void)lds_bytes; /* a launch may ask for all of it */
    int error = hip.hipModuleGetFunction(function, module, symbol);
    if (error == HIP_SUCCESS)
        return MPAD_OK;
    char call[128];
    snprintf(call, sizeof call, "hipModuleGetFunction(\"%s\")", symbol);
    return fail(call, error, status);
}

static mpad_code launch(void *function, unsigned grid, unsigned block, unsigned lds_bytes,
                        bool is_dependent, void *argument, void *stream, mpad_status *status)
{
    (void)is_dependent; /* a stream's kernels follow each other anyway */
    void *arguments[] = {argument};
    HIP_TRY(hipModuleLaunchKernel, function, grid, 1, 1, block, 1, 1, lds_bytes, stream, arguments,
            NULL);
    return MPAD_OK;
}

static mpad_code allocate(int64_t n_bytes, void **address, mpad_status *status)
{
    HIP_TRY(hipMalloc, address, (size_t)n_bytes);
    return MPAD_OK;
}

static mpad_code release(void *address, mpad_status *status)
{
    HIP_TRY(hipFree, address);
    return MPAD_OK;
}

static mpad_code clear(void *address, int64_t n_bytes, void *stream, mpad_status *status)
{
    HIP_TRY(hipMemsetAsync, address, 0, (size_t)n_bytes, stream);
    return MPAD_OK;
}

static mpad_code allocate_host(int64_t n_bytes, void **address, mpad_status *status)
{
    HIP_TRY(hipHostMalloc, address, (size_t)n_bytes, 0);
    return MPAD_OK;
}

static mpad_code release_host(void *address, mpad_status *status)
{
    HIP_TRY(hipHostFree, address);
    return MPAD_OK;
}

static mpad_code make_stream(void **stream, mpad_status *status)
{
    HIP_TRY(hipStreamCreateWithFlags, stream, HIP_STREAM_NON_BLOCKING);
    return MPAD_OK;
}

static mpad_code end_stream(void *stream, mpad_status *status)
{
    HIP_TRY(hipStreamDestroy, stream);
    return MPAD_OK;
}

static mpad_code copy(const mpad_gpu_transfer *t, void *stream, mpad_status *status)
{
    if (t->n_row == 1)
        HIP_TRY(hipMemcpyAsync, t->to, t->from, (size_t)t->n_bytes, HIP_MEMCPY_DEFAULT, stream);
    else
        HIP_TRY(hipMemcpy2DAsync, t->to, (size_t)t->to_pitch, t->from, (size_t)t->from_pitch,
                (size_t)t->n_bytes, (size_t)t->n_row, HIP_MEMCPY_DEFAULT, stream);
    return MPAD_OK;
}

static mpad_code wait(void *stream, mpad_status *status)
{
    HIP_TRY(hipStreamSynchronize, stream);
    return MPAD_OK;
}

static mpad_code wait_all(mpad_status *status)
{
    HIP_TRY(hipDeviceSynchronize);
    return MPAD_OK;
}

static mpad_code swap_capture_mode(int *mode, mpad_status *status)
{
    HIP_TRY(hipThreadExchangeStreamCaptureMode, mode);
    return MPAD_OK;
}

static mpad_code resolve(void *library, const char *path, mpad_status *status)
{
    const struct {
        void **into;
        const char *name;
    } functions[] = {
#define X(result, name, parameters) {(void **)&hip.name, #name},
        HIP_LIST(X)
#undef X
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        *functions[i].into = dlsym(library, functions[i].name);
        MPAD_REQUIRE(*functions[i].into, status, MPAD_DEVICE,
                     "%s: has no function %s; a HIP runtime of ROCm 5 or later has", path,
                     functions[i].name);
    }
    *(void **)&hip.properties = dlsym(library, "hipGetDevicePropertiesR0600");
    if (!hip.properties)
        *(void **)&hip.properties = dlsym(library, "hipGetDeviceProperties");
    MPAD_REQUIRE(hip.properties, status, MPAD_DEVICE, "%s: has no hipGetDeviceProperties", path);
    return MPAD_OK;
}

mpad_code mpad_gpu_hip_open(void *library, const char *path, const mpad_gpu_api **api,
                            mpad_status *status)
{
    static const mpad_gpu_api table = {
        .name = "HIP",
        .count = count,
        .describe = describe,
        .enter = enter,
        .leave = leave,
        .load = load,
        .unload = unload,
        .find = find,
        .launch = launch,
        .allocate = allocate,
        .release = release,
        .clear = clear,
        .allocate_host = allocate_host,
        .release_host = release_host,
        .make_stream = make_stream,
        .end_stream = end_stream,
        .copy = copy,
        .wait = wait,
        .wait_all = wait_all,
        .swap_capture_mode = swap_capture_mode,
    };
    MPAD_TRY(resolve(library, path, status));
    /* NOTE: without a device hipInit of ROCm 5 says hipErrorInvalidDevice; the count says why. */
    int error = hip.hipInit(0), n;
    HIP_TRY(hipGetDeviceCount, &n);
    if (error != HIP_SUCCESS)
        return fail("hipInit", error, status);
    *api = &table;
    return MPAD_OK;
}
