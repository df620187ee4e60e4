/* The stand-in libamdhip64: modules, functions, launches. Code objects are read and kernels run by
 * bridge.py, in the Python of the host process; it is imported when the first module is loaded. */
#define _GNU_SOURCE
#include "fakehip.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The structures of the bridge; bridge.py mirrors them. */
enum { N_ARGUMENT_MAX = 64, NAME_MAX_SIZE = 256 };
typedef struct FunctionInfo {
    uint32_t lds, scratch, n_kernarg, n_thread_max, n_vgpr, n_argument;
    struct {
        uint32_t offset, size;
    } arguments[N_ARGUMENT_MAX];
} FunctionInfo;

typedef struct Range {
    uint64_t at;
    void *data;
    uint8_t *written;
    uint64_t size;
} Range;

typedef struct Launch {
    uint64_t module;
    const char *name;
    uint32_t grid[3], block[3], lds, n_kernarg;
    const uint8_t *kernarg;
    const Range *ranges;
    uint64_t n_range;
} Launch;

typedef struct Bridge {
    hipError_t (*load)(const void *image, const char *arch, uint64_t *module);
    void (*unload)(uint64_t module);
    hipError_t (*function)(uint64_t module, const char *name, FunctionInfo *info);
    hipError_t (*launch)(const Launch *launch);
} Bridge;

typedef struct Module {
    struct Module *next;
    uint64_t id; /* the bridge's; 0 when unloaded */
    int device;
    Function *functions;
} Module;

struct Function {
    Function *next;
    Module *module;
    char name[NAME_MAX_SIZE];
    FunctionInfo info;
};

static Bridge bridge;
static Module *modules; /* unloaded ones too: their handles stay known */

API void fakehip_connect(const Bridge *functions)
{
    bridge = *functions;
}

static bool bridge_start(void)
{
    if (bridge.launch)
        return true;
    int (*ensure)(void), (*run)(const char *);
    void (*release)(int);
    *(void **)&ensure = dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    *(void **)&run = dlsym(RTLD_DEFAULT, "PyRun_SimpleString");
    *(void **)&release = dlsym(RTLD_DEFAULT, "PyGILState_Release");
    Dl_info self;
    if (!ensure || !run || !release || !dladdr((void *)bridge_start, &self)) {
        complain("kernels run in the Python of the host process, and this one has none");
        return false;
    }
    char code[2048];
    snprintf(code, sizeof code,
             "import sys\n"
             "sys.path.append('%s')\n"
             "import fakehip.bridge\n"
             "fakehip.bridge.connect('%s')\n",
             FAKEHIP_PYTHON_PATH, self.dli_fname);
    int state = ensure();
    run(code);
    release(state);
    return bridge.launch;
}

int count_modules(void)
{
    int n = 0;
    for (Module *module = modules; module; module = module->next)
        n += module->id != 0;
    return n;
}

static Module *module_find(void *handle)
{
    Module *module = modules;
    while (module && !(module == handle && module->id))
        module = module->next;
    return module;
}

static Function *function_find(void *handle)
{
    for (Module *module = modules; module; module = module->next)
        for (Function *function = module->functions; function; function = function->next)
            if (function == handle && module->id)
                return function;
    return NULL;
}

static hipError_t module_load(void **handle, const void *image)
{
    if (!handle || !image)
        return hipErrorInvalidValue;
    if (!bridge_start())
        return hipErrorNotSupported;
    uint64_t id = 0;
    hipError_t error = bridge.load(image, device_arch[current_device]->name, &id);
    if (error)
        return error;
    Module *module = calloc(1, sizeof *module);
    *module = (Module){.next = modules, .id = id, .device = current_device};
    modules = module;
    *handle = module;
    return hipSuccess;
}

API hipError_t hipModuleLoadData(void **handle, const void *image)
{
    ENTER();
    LEAVE(module_load(handle, image));
}

API hipError_t hipModuleLoadDataEx(void **handle, const void *image, unsigned n, int *options,
                                   void **values)
{
    ENTER();
    (void)n, (void)options, (void)values;
    LEAVE(module_load(handle, image));
}

API hipError_t hipModuleLoad(void **handle, const char *path)
{
    ENTER();
    REQUIRE(handle && path, hipErrorInvalidValue);
    FILE *file = fopen(path, "rb");
    REQUIRE(file, hipErrorFileNotFound);
    char *image = NULL;
    size_t size = 0, n;
    do {
        image = realloc(image, size + 65536);
        memset(image + size, 0, 65536);
        size += n = fread(image + size, 1, 65536, file);
    } while (n == 65536);
    fclose(file);
    hipError_t error = module_load(handle, image);
    free(image);
    LEAVE(error);
}

API hipError_t hipModuleUnload(void *handle)
{
    ENTER();
    Module *module = module_find(handle);
    REQUIRE(module, hipErrorInvalidHandle);
    REQUIRE(!capture_forbids(), hipErrorStreamCaptureUnsupported);
    hipError_t error = flush_device(module->device);
    bridge.unload(module->id);
    module->id = 0;
    LEAVE(error);
}

API hipError_t hipModuleGetFunction(void **handle, void *module_handle, const char *name)
{
    ENTER();
    REQUIRE(handle && name, hipErrorInvalidValue);
    Module *module = module_find(module_handle);
    REQUIRE(module, hipErrorInvalidHandle);
    Function *function = calloc(1, sizeof *function);
    function->module = module;
    snprintf(function->name, sizeof function->name, "%s", name);
    hipError_t error = bridge.function(module->id, name, &function->info);
    if (error) {
        free(function);
        LEAVE(error);
    }
    function->next = module->functions;
    module->functions = function;
    *handle = function;
    LEAVE(hipSuccess);
}

static const Arch *arch_of(const Function *function)
{
    return device_arch[function->module->device];
}

/* The numbers are those of hipFunction_attribute. */
API hipError_t hipFuncGetAttribute(int *value, int attribute, void *handle)
{
    ENTER();
    REQUIRE(value, hipErrorInvalidValue);
    Function *function = function_find(handle);
    REQUIRE(function, hipErrorInvalidDeviceFunction);
    const FunctionInfo *info = &function->info;
    const Arch *arch = arch_of(function);
    const int values[] = {(int)info->n_thread_max,
                          (int)info->lds,
                          0,
                          (int)info->scratch,
                          (int)info->n_vgpr,
                          arch->major * 10 + arch->minor,
                          arch->major * 10 + arch->minor,
                          0,
                          arch->lds - (int)info->lds};
    REQUIRE(attribute >= 0 && (size_t)attribute < sizeof values / sizeof *values,
            hipErrorInvalidValue);
    *value = values[attribute];
    LEAVE(hipSuccess);
}

API hipError_t hipFuncSetAttribute(void *handle, int attribute, int value)
{
    ENTER();
    Function *function = function_find(handle);
    REQUIRE(function, hipErrorInvalidDeviceFunction);
    int room = arch_of(function)->lds - (int)function->info.lds;
    bool is_dynamic_lds = attribute == 8;
    LEAVE(is_dynamic_lds && (value < 0 || value > room) ? hipErrorInvalidValue : hipSuccess);
}

/* Four units of 512 registers a lane, at most 8 waves each. */
static hipError_t occupancy(int *n, void *handle, int n_thread, size_t dynamic_lds)
{
    Function *function = function_find(handle);
    if (!function)
        return hipErrorInvalidDeviceFunction;
    if (!n || n_thread <= 0)
        return hipErrorInvalidValue;
    int n_vgpr = ((int)function->info.n_vgpr + 7) / 8 * 8;
    int n_wave = 512 / (n_vgpr ? n_vgpr : 8), lds = (int)function->info.lds + (int)dynamic_lds;
    *n = (n_wave < 8 ? n_wave : 8) * 4 / ((n_thread + 63) / 64);
    if (lds && arch_of(function)->lds / lds < *n)
        *n = arch_of(function)->lds / lds;
    if ((uint32_t)n_thread > function->info.n_thread_max)
        *n = 0;
    return hipSuccess;
}

API hipError_t hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *function,
                                                                  int n_thread, size_t lds)
{
    ENTER();
    LEAVE(occupancy(n, function, n_thread, lds));
}

API hipError_t hipModuleOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, void *function,
                                                                           int n_thread, size_t lds,
                                                                           unsigned flags)
{
    ENTER();
    (void)flags;
    LEAVE(occupancy(n, function, n_thread, lds));
}

/* ------------------------------------------------------------------------------------- launches */
uint32_t function_kernarg_size(const Function *function)
{
    return function->info.n_kernarg;
}

hipError_t function_run(const Node *node)
{
    Function *function = node->function;
    if (!function->module->id) {
        complain("launch of %s after its module was unloaded", function->name);
        return hipErrorInvalidHandle;
    }
    Range *ranges = calloc((size_t)count_allocs() + 1, sizeof *ranges);
    Launch launch = {.module = function->module->id,
                     .name = function->name,
                     .lds = node->lds,
                     .n_kernarg = function->info.n_kernarg,
                     .kernarg = node->kernarg,
                     .ranges = ranges};
    memcpy(launch.grid, node->grid, sizeof launch.grid);
    memcpy(launch.block, node->block, sizeof launch.block);
    for (Alloc *alloc = allocs; alloc; alloc = alloc->next)
        if (alloc->is_host || alloc->device == function->module->device)
            ranges[launch.n_range++] = (Range){.at = (uint64_t)alloc->at,
                                               .data = alloc->data,
                                               .written = alloc->written,
                                               .size = alloc->size};
    hipError_t error = bridge.launch(&launch);
    free(ranges);
    return error;
}

/* Explicit arguments, from an array of pointers or from a buffer (HIP_LAUNCH_PARAM_*). */
static hipError_t fill_arguments(const FunctionInfo *info, void **params, void **extra, uint8_t *to)
{
    const uint8_t *buffer = NULL;
    size_t n_buffer = 0, n_needed = 0;
    for (int i = 0; extra && extra[i] != (void *)3; i += 2) {
        if (extra[i] == (void *)1)
            buffer = extra[i + 1];
        else if (extra[i] == (void *)2)
            n_buffer = *(size_t *)extra[i + 1];
        else
            return hipErrorInvalidValue;
    }
    for (uint32_t i = 0; i < info->n_argument; i++) {
        uint32_t offset = info->arguments[i].offset, size = info->arguments[i].size;
        n_needed = offset + size;
        if (extra)
            continue;
        if (!params || !params[i])
            return hipErrorInvalidValue;
        memcpy(to + offset, params[i], size);
    }
    if (!extra || !n_needed)
        return hipSuccess;
    if (params || !buffer || n_buffer < n_needed) {
        complain("an argument buffer of %zu bytes, %zu needed", n_buffer, n_needed);
        return hipErrorInvalidValue;
    }
    memcpy(to, buffer, n_needed);
    return hipSuccess;
}

API hipError_t hipModuleLaunchKernel(void *function_handle, unsigned grid_x, unsigned grid_y,
                                     unsigned grid_z, unsigned block_x, unsigned block_y,
                                     unsigned block_z, unsigned lds, void *handle, void **params,
                                     void **extra)
{
    ENTER();
    Stream *stream;
    hipError_t error = stream_of(handle, &stream);
    REQUIRE(!error, error);
    Function *function = function_find(function_handle);
    REQUIRE(function, hipErrorInvalidHandle);
    if (function->module->device != stream_device(stream)) {
        complain("%s of device %d launched on a stream of device %d", function->name,
                 function->module->device, stream_device(stream));
        LEAVE(hipErrorInvalidHandle);
    }
    uint64_t n_thread = (uint64_t)block_x * block_y * block_z;
    REQUIRE(n_thread && n_thread <= 1024 && grid_x && grid_y && grid_z,
            hipErrorInvalidConfiguration);
    REQUIRE((uint64_t)grid_x * block_x <= UINT32_MAX && grid_y < 65536 && grid_z < 65536,
            hipErrorInvalidValue);
    const FunctionInfo *info = &function->info;
    if (n_thread > info->n_thread_max) {
        complain("%s: %llu threads, its launch bound is %u", function->name,
                 (unsigned long long)n_thread, info->n_thread_max);
        LEAVE(hipErrorLaunchFailure);
    }
    if ((uint64_t)info->lds + lds > (uint64_t)arch_of(function)->lds) {
        complain("%s: %u + %u bytes of LDS, the device has %d", function->name, info->lds, lds,
                 arch_of(function)->lds);
        LEAVE(hipErrorInvalidValue);
    }
    uint8_t *kernarg = calloc(info->n_kernarg + 1, 1);
    error = fill_arguments(info, params, extra, kernarg);
    if (error) {
        free(kernarg);
        LEAVE(error);
    }
    LEAVE(submit(stream, (Node){.kind = NODE_KERNEL,
                                .function = function,
                                .grid = {grid_x, grid_y, grid_z},
                                .block = {block_x, block_y, block_z},
                                .lds = lds,
                                .kernarg = kernarg}));
}
