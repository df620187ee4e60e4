/* The stand-in libamdhip64: devices, errors, the lock.
 *
 * FAKEHIP_ARCH   the devices, a comma list of names in `archs` (gfx942); "none": no device
 * FAKEHIP_UNITS  compute units of each device (4: launches that fill a device stay small)
 * FAKEHIP_LOG    a file, or "-" for stderr, that gets one line a call
 */
#define _GNU_SOURCE
#include "fakehip.h"
#include "fault.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const Arch archs[] = {
    {"gfx90a", "gfx90a:sramecc+:xnack-", "Emulated AMD Instinct MI210", 64, 65536, 9, 0, 8 << 20,
     64ull << 30},
    {"gfx942", "gfx942:sramecc+:xnack-", "Emulated AMD Instinct MI300X", 64, 65536, 9, 4, 4 << 20,
     192ull << 30},
    {"gfx950", "gfx950:sramecc+:xnack-", "Emulated AMD Instinct MI355X", 64, 163840, 9, 5, 4 << 20,
     288ull << 30},
};
const Arch *device_arch[N_DEVICE_MAX];
int n_device;
bool is_lazy;
static int n_unit = 4;
__thread int current_device;
static __thread hipError_t last_error;
static FILE *log_file;

static void find_devices(const char *list)
{
    if (!strcmp(list, "none"))
        return;
    while (*list) {
        size_t n = strcspn(list, ","), found = sizeof archs / sizeof *archs;
        for (size_t i = 0; i < sizeof archs / sizeof *archs; i++)
            if (strlen(archs[i].name) == n && !strncmp(archs[i].name, list, n))
                found = i;
        if (found == sizeof archs / sizeof *archs)
            complain("FAKEHIP_ARCH: %.*s is not emulated", (int)n, list);
        else if (n_device < N_DEVICE_MAX)
            device_arch[n_device++] = &archs[found];
        list += n + (list[n] == ',');
    }
}

/* ------------------------------------------------------------------------------------- the lock */
/* A thread that waits for the lock gives Python's lock up first: the holder may be running a kernel
 * in Python. */
static pthread_mutex_t lock;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct {
    int (*has_gil)(void);
    void *(*release_gil)(void);
    void (*take_gil)(void *);
} python;

static void set_up(void)
{
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &attributes);
    pthread_mutexattr_destroy(&attributes);
    *(void **)&python.has_gil = dlsym(RTLD_DEFAULT, "PyGILState_Check");
    *(void **)&python.release_gil = dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
    *(void **)&python.take_gil = dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
    const char *arch = getenv("FAKEHIP_ARCH"), *units = getenv("FAKEHIP_UNITS");
    const char *log = getenv("FAKEHIP_LOG");
    find_devices(arch && *arch ? arch : "gfx942");
    n_unit = units && atoi(units) > 0 ? atoi(units) : n_unit;
    if (log && *log)
        log_file = strcmp(log, "-") ? fopen(log, "a") : stderr;
}

static void take_lock(void)
{
    pthread_once(&once, set_up);
    if (!pthread_mutex_trylock(&lock))
        return;
    void *state = python.has_gil && python.has_gil() ? python.release_gil() : NULL;
    pthread_mutex_lock(&lock);
    if (state)
        python.take_gil(state);
}

void complain(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("fakehip: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

static hipError_t usual_error(const char *function)
{
    if (strstr(function, "Alloc") || strstr(function, "Malloc"))
        return hipErrorOutOfMemory;
    if (strstr(function, "ModuleLoad"))
        return hipErrorInvalidImage;
    return strstr(function, "Launch") ? hipErrorLaunchFailure : hipErrorUnknown;
}

hipError_t enter(const char *function)
{
    take_lock();
    return (hipError_t)fault_count(function, usual_error(function));
}

hipError_t leave(const char *function, hipError_t error)
{
    if (error)
        last_error = error;
    if (log_file) {
        fprintf(log_file, "%s -> %d\n", function, error);
        fflush(log_file);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

/* Not 0: work runs only when something waits for it. */
API void fakehip_set_lazy(int lazy)
{
    take_lock();
    is_lazy = lazy;
    pthread_mutex_unlock(&lock);
}

/* What the host has not given back: allocations, modules, streams, events, graphs. */
API void fakehip_count_live(int counts[5])
{
    take_lock();
    counts[0] = count_allocs();
    counts[1] = count_modules();
    counts[2] = count_streams();
    counts[3] = count_events();
    counts[4] = count_graphs();
    pthread_mutex_unlock(&lock);
}

/* -------------------------------------------------------------------------------- error queries */
static const struct {
    hipError_t error;
    const char *name, *text;
} errors[] = {
    {hipSuccess, "hipSuccess", "no error"},
    {hipErrorInvalidValue, "hipErrorInvalidValue", "invalid argument"},
    {hipErrorOutOfMemory, "hipErrorOutOfMemory", "out of memory"},
    {hipErrorInvalidConfiguration, "hipErrorInvalidConfiguration",
     "invalid configuration argument"},
    {hipErrorInvalidMemcpyDirection, "hipErrorInvalidMemcpyDirection",
     "invalid copy direction for memcpy"},
    {hipErrorInvalidDeviceFunction, "hipErrorInvalidDeviceFunction", "invalid device function"},
    {hipErrorNoDevice, "hipErrorNoDevice", "no ROCm-capable device is detected"},
    {hipErrorInvalidDevice, "hipErrorInvalidDevice", "invalid device ordinal"},
    {hipErrorInvalidImage, "hipErrorInvalidImage", "device kernel image is invalid"},
    {hipErrorNoBinaryForGpu, "hipErrorNoBinaryForGpu",
     "no kernel image is available for execution on the device"},
    {hipErrorFileNotFound, "hipErrorFileNotFound", "file not found"},
    {hipErrorInvalidHandle, "hipErrorInvalidHandle", "invalid resource handle"},
    {hipErrorNotFound, "hipErrorNotFound", "named symbol not found"},
    {hipErrorNotReady, "hipErrorNotReady", "device not ready"},
    {hipErrorIllegalAddress, "hipErrorIllegalAddress", "an illegal memory access was encountered"},
    {hipErrorHostMemoryAlreadyRegistered, "hipErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {hipErrorHostMemoryNotRegistered, "hipErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {hipErrorLaunchFailure, "hipErrorLaunchFailure", "unspecified launch failure"},
    {hipErrorNotSupported, "hipErrorNotSupported", "operation not supported"},
    {hipErrorStreamCaptureUnsupported, "hipErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {hipErrorStreamCaptureInvalidated, "hipErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {hipErrorStreamCaptureUnmatched, "hipErrorStreamCaptureUnmatched",
     "capture was not initiated in this stream"},
    {hipErrorStreamCaptureIsolation, "hipErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {hipErrorStreamCaptureImplicit, "hipErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {hipErrorCapturedEvent, "hipErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
};

API const char *hipGetErrorName(hipError_t error)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].error == error)
            return errors[i].name;
    return "hipErrorUnknown";
}

API const char *hipGetErrorString(hipError_t error)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].error == error)
            return errors[i].text;
    return "unknown error";
}

API hipError_t hipDrvGetErrorName(hipError_t error, const char **text)
{
    *text = hipGetErrorName(error);
    return hipSuccess;
}

API hipError_t hipDrvGetErrorString(hipError_t error, const char **text)
{
    *text = hipGetErrorString(error);
    return hipSuccess;
}

API hipError_t hipGetLastError(void)
{
    hipError_t error = last_error;
    last_error = hipSuccess;
    return error;
}

API hipError_t hipPeekAtLastError(void)
{
    return last_error;
}

/* ------------------------------------------------------------------------------------- devices */
bool is_device_index(int device)
{
    return device >= 0 && device < n_device;
}

API hipError_t hipInit(unsigned flags)
{
    ENTER();
    LEAVE(flags ? hipErrorInvalidValue : hipSuccess);
}

static const int version = 70051831;

API hipError_t hipDriverGetVersion(int *value)
{
    ENTER_ANYWHERE();
    REQUIRE(value, hipErrorInvalidValue);
    *value = version;
    LEAVE(hipSuccess);
}

API hipError_t hipRuntimeGetVersion(int *value)
{
    ENTER_ANYWHERE();
    REQUIRE(value, hipErrorInvalidValue);
    *value = version;
    LEAVE(hipSuccess);
}

API hipError_t hipGetDeviceCount(int *n)
{
    ENTER_ANYWHERE();
    REQUIRE(n, hipErrorInvalidValue);
    *n = n_device;
    LEAVE(n_device ? hipSuccess : hipErrorNoDevice);
}

API hipError_t hipSetDevice(int device)
{
    ENTER();
    REQUIRE(is_device_index(device), hipErrorInvalidDevice);
    current_device = device;
    LEAVE(hipSuccess);
}

API hipError_t hipGetDevice(int *device)
{
    ENTER();
    REQUIRE(device, hipErrorInvalidValue);
    *device = current_device;
    LEAVE(hipSuccess);
}

API hipError_t hipDeviceGet(int *device, int ordinal)
{
    ENTER();
    REQUIRE(device, hipErrorInvalidValue);
    REQUIRE(is_device_index(ordinal), hipErrorInvalidDevice);
    *device = ordinal;
    LEAVE(hipSuccess);
}

API hipError_t hipDeviceGetName(char *name, int n, int device)
{
    ENTER();
    REQUIRE(name && n > 0, hipErrorInvalidValue);
    REQUIRE(is_device_index(device), hipErrorInvalidDevice);
    snprintf(name, (size_t)n, "%s", device_arch[device]->product);
    LEAVE(hipSuccess);
}

API hipError_t hipDeviceTotalMem(size_t *n, int device)
{
    ENTER();
    REQUIRE(n, hipErrorInvalidValue);
    REQUIRE(is_device_index(device), hipErrorInvalidDevice);
    *n = device_arch[device]->memory;
    LEAVE(hipSuccess);
}

API hipError_t hipDeviceComputeCapability(int *major, int *minor, int device)
{
    ENTER();
    REQUIRE(major && minor, hipErrorInvalidValue);
    REQUIRE(is_device_index(device), hipErrorInvalidDevice);
    *major = device_arch[device]->major;
    *minor = device_arch[device]->minor;
    LEAVE(hipSuccess);
}

/* The numbers are those of hipDeviceAttribute_t since ROCm 6. */
API hipError_t hipDeviceGetAttribute(int *value, int attribute, int device)
{
    ENTER();
    REQUIRE(value, hipErrorInvalidValue);
    REQUIRE(is_device_index(device), hipErrorInvalidDevice);
    const Arch *arch = device_arch[device];
    switch (attribute) {
    case 5: /* ClockRate, kHz */
        *value = 2100000;
        break;
    case 16: /* Integrated */
    case 68: /* PciDeviceId */
        *value = 0;
        break;
    case 19:
        *value = arch->l2;
        break;
    case 23: /* ComputeCapabilityMajor */
        *value = arch->major;
        break;
    case 61: /* ComputeCapabilityMinor */
        *value = arch->minor;
        break;
    case 10: /* CooperativeLaunch */
    case 24: /* ManagedMemory */
    case 85: /* UnifiedAddressing */
    case 88: /* MemoryPoolsSupported */
        *value = 1;
        break;
    case 26: /* MaxBlockDimX, Y, Z */
    case 27:
    case 28:
    case 56: /* MaxThreadsPerBlock */
        *value = 1024;
        break;
    case 29: /* MaxGridDimX */
        *value = 2147483647;
        break;
    case 30: /* MaxGridDimY, Z */
    case 31:
    case 71: /* MaxRegistersPerBlock */
        *value = 65536;
        break;
    case 57: /* MaxThreadsPerMultiProcessor */
        *value = 2048;
        break;
    case 59: /* MemoryBusWidth */
        *value = 8192;
        break;
    case 60: /* MemoryClockRate */
        *value = 1300000;
        break;
    case 63:
        *value = n_unit;
        break;
    case 67: /* PciBusId */
        *value = 1 + device;
        break;
    case 74:    /* MaxSharedMemoryPerBlock */
    case 75:    /* SharedMemPerBlockOptin */
    case 10002: /* MaxSharedMemoryPerMultiprocessor */
        *value = arch->lds;
        break;
    case 87:
        *value = arch->wave;
        break;
    default:
        complain("hipDeviceGetAttribute(%d) is not modelled", attribute);
        LEAVE(hipErrorInvalidValue);
    }
    LEAVE(hipSuccess);
}

/* hipDeviceProp_tR0600: 1472 bytes, of which those a kernel library asks for are filled. */
API hipError_t hipGetDevicePropertiesR0600(void *properties, int device)
{
    ENTER();
    REQUIRE(properties, hipErrorInvalidValue);
    REQUIRE(is_device_index(device), hipErrorInvalidDevice);
    const Arch *arch = device_arch[device];
    uint8_t *at = properties;
    memset(at, 0, 1472);
    snprintf((char *)at, 256, "%s", arch->product);
    snprintf((char *)at + 1160, 256, "%s", arch->full_name);
    const struct {
        int offset;
        size_t value;
    } sizes[] = {{288, arch->memory},
                 {296, (size_t)arch->lds},
                 {640, (size_t)arch->lds},
                 {696, (size_t)arch->lds},
                 {1416, (size_t)arch->lds}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        memcpy(at + sizes[i].offset, &sizes[i].value, sizeof(size_t));
    const int numbers[][2] = {
        {304, 65536},       {308, arch->wave},  {320, 1024},    {324, 1024},  {328, 1024},
        {332, 1024},        {336, 2147483647},  {340, 65536},   {344, 65536}, {348, 2100000},
        {360, arch->major}, {364, arch->minor}, {388, n_unit},  {400, 1},     {576, 1},
        {584, 1 + device},  {604, 1},           {608, 1300000}, {612, 8192},  {616, arch->l2},
        {624, 2048},        {648, 65536},       {652, 1},       {688, 1},     {744, 1}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        memcpy(at + numbers[i][0], &numbers[i][1], sizeof(int));
    LEAVE(hipSuccess);
}

API hipError_t hipDeviceCanAccessPeer(int *can, int device, int peer)
{
    ENTER();
    REQUIRE(can, hipErrorInvalidValue);
    REQUIRE(is_device_index(device) && is_device_index(peer), hipErrorInvalidDevice);
    *can = 0;
    LEAVE(hipSuccess);
}

API hipError_t hipDeviceSynchronize(void)
{
    ENTER();
    REQUIRE(!capture_forbids(), hipErrorStreamCaptureUnsupported);
    LEAVE(flush_device(current_device));
}

/* A context is its device's number plus one. */
API hipError_t hipDevicePrimaryCtxRetain(void **context, int device)
{
    ENTER();
    REQUIRE(context, hipErrorInvalidValue);
    REQUIRE(is_device_index(device), hipErrorInvalidDevice);
    *context = (void *)(uintptr_t)(device + 1);
    LEAVE(hipSuccess);
}

API hipError_t hipDevicePrimaryCtxRelease(int device)
{
    ENTER();
    LEAVE(is_device_index(device) ? hipSuccess : hipErrorInvalidDevice);
}

API hipError_t hipCtxGetCurrent(void **context)
{
    ENTER();
    REQUIRE(context, hipErrorInvalidValue);
    *context = (void *)(uintptr_t)(current_device + 1);
    LEAVE(hipSuccess);
}

API hipError_t hipCtxSetCurrent(void *context)
{
    ENTER();
    int device = (int)(uintptr_t)context - 1;
    REQUIRE(is_device_index(device), hipErrorInvalidValue);
    current_device = device;
    LEAVE(hipSuccess);
}
