/* Level 3: gpu.h for NVIDIA: the driver's libcuda.so.1. The only file with CUDA names; declares
 * what it uses of the ABI itself, so that no CUDA header is needed to build it. Works in the
 * devices' primary contexts, those of every framework. */
#include "gpu.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

enum {
    CUDA_SUCCESS = 0,
    CUDA_MULTIPROCESSOR_COUNT = 16,
    CUDA_CAPABILITY_MAJOR = 75,
    CUDA_CAPABILITY_MINOR = 76,
    CUDA_MAX_DYNAMIC_SHARED = 8,
    CUDA_PROGRAMMATIC_SERIALIZATION = 6,
    CUDA_MEMORY_UNIFIED = 4,
    CUDA_MAX_DEVICES = 64,
    CUDA_STREAM_NON_BLOCKING = 1,
};

typedef struct launch_attribute {
    int id, unused;
    int value[16];
} launch_attribute;

typedef struct launch_config {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    launch_attribute *attributes;
    unsigned n_attribute;
} launch_config;

typedef struct copy_side {
    size_t x, y;
    int memory_type;
    const void *host;
    void *device;
    void *array;
    size_t pitch;
} copy_side;

typedef struct copy_2d {
    copy_side from, to;
    size_t n_bytes, n_row;
} copy_2d;

_Static_assert(sizeof(launch_attribute) == 72 && sizeof(launch_config) == 56 &&
                   sizeof(copy_2d) == 128,
               "layouts of cuda.h");

/* X(name, symbol, parameters) */
#define CUDA_LIST(X)                                                                               \
    X(cuInit, "cuInit", (unsigned flags))                                                          \
    X(cuDeviceGetCount, "cuDeviceGetCount", (int *n))                                              \
    X(cuDeviceGet, "cuDeviceGet", (int *device, int index))                                        \
    X(cuDeviceGetName, "cuDeviceGetName", (char *name, int n, int device))                         \
    X(cuDeviceTotalMem, "cuDeviceTotalMem_v2", (size_t *n_bytes, int device))                      \
    X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int *value, int attribute, int device))       \
    X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void **context, int device))          \
    X(cuCtxGetCurrent, "cuCtxGetCurrent", (void **context))                                        \
    X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (void *context))                                    \
    X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (void **context))                                     \
    X(cuModuleLoadData, "cuModuleLoadData", (void **module, const void *image))                    \
    X(cuModuleUnload, "cuModuleUnload", (void *module))                                            \
    X(cuModuleGetFunction, "cuModuleGetFunction",                                                  \
      (void **function, void *module, const char *symbol))                                         \
    X(cuFuncSetAttribute, "cuFuncSetAttribute", (void *function, int attribute, int value))        \
    X(cuLaunchKernel, "cuLaunchKernel",                                                            \
      (void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,        \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream, void **arguments,  \
       void **extra))                                                                              \
    X(cuMemAlloc, "cuMemAlloc_v2", (void **address, size_t n_bytes))                               \
    X(cuMemFree, "cuMemFree_v2", (void *address))                                                  \
    X(cuMemcpyAsync, "cuMemcpyAsync", (void *to, const void *from, size_t n_bytes, void *stream))  \
    X(cuMemcpy2DAsync, "cuMemcpy2DAsync_v2", (const copy_2d *copy, void *stream))                  \
    X(cuMemsetD8Async, "cuMemsetD8Async",                                                          \
      (void *address, unsigned char value, size_t n_bytes, void *stream))                          \
    X(cuMemHostAlloc, "cuMemHostAlloc", (void **address, size_t n_bytes, unsigned flags))          \
    X(cuMemFreeHost, "cuMemFreeHost", (void *address))                                             \
    X(cuStreamCreate, "cuStreamCreate", (void **stream, unsigned flags))                           \
    X(cuStreamDestroy, "cuStreamDestroy_v2", (void *stream))                                       \
    X(cuStreamSynchronize, "cuStreamSynchronize", (void *stream))                                  \
    X(cuCtxSynchronize, "cuCtxSynchronize", (void))                                                \
    X(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int *mode))         \
    X(cuGetErrorName, "cuGetErrorName", (int error, const char **name))

static struct {
#define X(name, symbol, parameters) int(*name) parameters;
    CUDA_LIST(X)
#undef X
    /* Since CUDA 11.8; NULL where the driver is older. */
    int (*cuLaunchKernelEx)(const launch_config *config, void *function, void **arguments,
                            void **extra);
} cuda;

/* Retained by the first who enters, never released: a framework's tensors live in them too. */
static void *contexts[CUDA_MAX_DEVICES];

static mpad_code fail(const char *call, int error, mpad_status *status)
{
    const char *name = NULL;
    cuda.cuGetErrorName(error, &name);
    return mpad_fail(status, MPAD_DEVICE, "%s: error %d (%s)", call, error, name ? name : "?");
}

#define CUDA_TRY(call, ...)                                                                        \
    do {                                                                                           \
        int error_ = cuda.call(__VA_ARGS__);                                                       \
        if (error_ != CUDA_SUCCESS)                                                                \
            return fail(#call, error_, status);                                                    \
    } while (0)

static mpad_code count(int *n, mpad_status *status)
{
    CUDA_TRY(cuDeviceGetCount, n);
    return MPAD_OK;
}

static mpad_code describe(int index, mpad_gpu_info *info, mpad_status *status)
{
    int device, major, minor;
    size_t n_bytes;
    CUDA_TRY(cuDeviceGet, &device, index);
    CUDA_TRY(cuDeviceGetName, info->name, (int)sizeof info->name, device);
    CUDA_TRY(cuDeviceTotalMem, &n_bytes, device);
    CUDA_TRY(cuDeviceGetAttribute, &info->n_multiprocessor, CUDA_MULTIPROCESSOR_COUNT, device);
    CUDA_TRY(cuDeviceGetAttribute, &major, CUDA_CAPABILITY_MAJOR, device);
    CUDA_TRY(cuDeviceGetAttribute, &minor, CUDA_CAPABILITY_MINOR, device);
    info->memory_bytes = (int64_t)n_bytes;
    /* From 9.0 on, what is special to one chip is compiled in by the letter only. */
    snprintf(info->arch, sizeof info->arch, "sm_%d%d%s", major, minor, major >= 9 ? "a" : "");
    return MPAD_OK;
}

static mpad_code primary(int index, void **context, mpad_status *status)
{
    MPAD_REQUIRE(index >= 0 && index < CUDA_MAX_DEVICES, status, MPAD_DEVICE,
                 "cuDeviceGet: expected a device below %d, got %d", CUDA_MAX_DEVICES, index);
    *context = __atomic_load_n(&contexts[index], __ATOMIC_ACQUIRE);
    if (*context)
        return MPAD_OK;
    int device;
    CUDA_TRY(cuDeviceGet, &device, index);
    CUDA_TRY(cuDevicePrimaryCtxRetain, context, device);
    __atomic_store_n(&contexts[index], *context, __ATOMIC_RELEASE);
    return MPAD_OK;
}

static mpad_code enter(int index, mpad_gpu_scope *scope, mpad_status *status)
{
    void *context, *current;
    scope->is_changed = false;
    MPAD_TRY(primary(index, &context, status));
    CUDA_TRY(cuCtxGetCurrent, &current);
    if (current == context)
        return MPAD_OK;
    CUDA_TRY(cuCtxPushCurrent, context);
    scope->is_changed = true;
    return MPAD_OK;
}

static mpad_code leave(const mpad_gpu_scope *scope, mpad_status *status)
{
    void *context;
    if (scope->is_changed)
        CUDA_TRY(cuCtxPopCurrent, &context);
    return MPAD_OK;
}

static mpad_code load(const void *image, void **module, mpad_status *status)
{
    CUDA_TRY(cuModuleLoadData, module, image);
    return MPAD_OK;
}

static mpad_code unload(void *module, mpad_status *status)
{
    CUDA_TRY(cuModuleUnload, module);
    return MPAD_OK;
}

static mpad_code find(void *module, const char *symbol, int lds_bytes, void **function,
                      mpad_status *status)
{
    int error = cuda.cuModuleGetFunction(function, module, symbol);
    if (error != CUDA_SUCCESS) {
        char call[128];
        snprintf(call, sizeof call, "cuModuleGetFunction(\"%s\")", symbol);
        return fail(call, error, status);
    }
    CUDA_TRY(cuFuncSetAttribute, *function, CUDA_MAX_DYNAMIC_SHARED, lds_bytes);
    return MPAD_OK;
}

static mpad_code launch(void *function, unsigned grid, unsigned block, unsigned lds_bytes,
                        bool is_dependent, void *argument, void *stream, mpad_status *status)
{
    void *arguments[] = {argument};
    if (!is_dependent || !cuda.cuLaunchKernelEx) {
        CUDA_TRY(cuLaunchKernel, function, grid, 1, 1, block, 1, 1, lds_bytes, stream, arguments,
                 NULL);
        return MPAD_OK;
    }
    launch_attribute attribute = {.id = CUDA_PROGRAMMATIC_SERIALIZATION, .value = {1}};
    launch_config config = {
        .grid = {grid, 1, 1},
        .block = {block, 1, 1},
        .shared_bytes = lds_bytes,
        .stream = stream,
        .attributes = &attribute,
        .n_attribute = 1,
    };
    CUDA_TRY(cuLaunchKernelEx, &config, function, arguments, NULL);
    return MPAD_OK;
}

static mpad_code allocate(int64_t n_bytes, void **address, mpad_status *status)
{
    CUDA_TRY(cuMemAlloc, address, (size_t)n_bytes);
    return MPAD_OK;
}

static mpad_code release(void *address, mpad_status *status)
{
    CUDA_TRY(cuMemFree, address);
    return MPAD_OK;
}

static mpad_code clear(void *address, int64_t n_bytes, void *stream, mpad_status *status)
{
    CUDA_TRY(cuMemsetD8Async, address, 0, (size_t)n_bytes, stream);
    return MPAD_OK;
}

static mpad_code allocate_host(int64_t n_bytes, void **address, mpad_status *status)
{
    CUDA_TRY(cuMemHostAlloc, address, (size_t)n_bytes, 0);
    return MPAD_OK;
}

static mpad_code release_host(void *address, mpad_status *status)
{
    CUDA_TRY(cuMemFreeHost, address);
    return MPAD_OK;
}

static mpad_code make_stream(void **stream, mpad_status *status)
{
    CUDA_TRY(cuStreamCreate, stream, CUDA_STREAM_NON_BLOCKING);
    return MPAD_OK;
}

static mpad_code end_stream(void *stream, mpad_status *status)
{
    CUDA_TRY(cuStreamDestroy, stream);
    return MPAD_OK;
}

static mpad_code copy(const mpad_gpu_transfer *t, void *stream, mpad_status *status)
{
    if (t->n_row == 1) {
        CUDA_TRY(cuMemcpyAsync, t->to, t->from, (size_t)t->n_bytes, stream);
        return MPAD_OK;
    }
    copy_2d rows = {
        .from = {.memory_type = CUDA_MEMORY_UNIFIED,
                 .device = (void *)(uintptr_t)t->from,
                 .pitch = (size_t)t->from_pitch},
        .to = {.memory_type = CUDA_MEMORY_UNIFIED, .device = t->to, .pitch = (size_t)t->to_pitch},
        .n_bytes = (size_t)t->n_bytes,
        .n_row = (size_t)t->n_row,
    };
    CUDA_TRY(cuMemcpy2DAsync, &rows, stream);
    return MPAD_OK;
}

static mpad_code wait(void *stream, mpad_status *status)
{
    CUDA_TRY(cuStreamSynchronize, stream);
    return MPAD_OK;
}

static mpad_code wait_all(mpad_status *status)
{
    CUDA_TRY(cuCtxSynchronize);
    return MPAD_OK;
}

static mpad_code swap_capture_mode(int *mode, mpad_status *status)
{
    CUDA_TRY(cuThreadExchangeStreamCaptureMode, mode);
    return MPAD_OK;
}

static mpad_code resolve(void *library, const char *path, mpad_status *status)
{
    const struct {
        void **into;
        const char *name;
    } functions[] = {
#define X(name, symbol, parameters) {(void **)&cuda.name, symbol},
        CUDA_LIST(X)
#undef X
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        *functions[i].into = dlsym(library, functions[i].name);
        MPAD_REQUIRE(*functions[i].into, status, MPAD_DEVICE,
                     "%s: has no function %s; a driver of CUDA 11 or later has", path,
                     functions[i].name);
    }
    *(void **)&cuda.cuLaunchKernelEx = dlsym(library, "cuLaunchKernelEx");
    return MPAD_OK;
}

mpad_code mpad_gpu_cuda_open(void *library, const char *path, const mpad_gpu_api **api,
                             mpad_status *status)
{
    static const mpad_gpu_api table = {
        .name = "CUDA",
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
    CUDA_TRY(cuInit, 0);
    *api = &table;
    return MPAD_OK;
}
