/* The stand-in libamdhip64: allocations and copies. The host cannot touch device memory (its
 * address range is mapped without access), fresh memory holds 0xff bytes (NaN in every format),
 * each byte knows whether it has a value, and a freed address is never given out again. */
#define _GNU_SOURCE
#include "fakehip.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, ALIGN = 256, FRESH = 0xff };

Alloc *allocs;

static bool holds(const Alloc *alloc, const void *address)
{
    size_t size = alloc->size ? alloc->size : 1;
    return (const uint8_t *)address >= alloc->at && (const uint8_t *)address < alloc->at + size;
}

Alloc *alloc_find(const void *address)
{
    Alloc *alloc = allocs;
    while (alloc && !holds(alloc, address))
        alloc = alloc->next;
    return alloc;
}

int count_allocs(void)
{
    int n = 0;
    for (Alloc *alloc = allocs; alloc; alloc = alloc->next)
        n++;
    return n;
}

static size_t in_use(int device)
{
    size_t n = 0;
    for (Alloc *alloc = allocs; alloc; alloc = alloc->next)
        n += alloc->device == device && !alloc->is_host ? alloc->size : 0;
    return n;
}

/* The address is ALIGN bytes into a page, so that nothing relies on more alignment than is
 * promised; host memory ends at a page that faults. */
static hipError_t allocate(void **address, size_t n, bool is_host)
{
    if (!address)
        return hipErrorInvalidValue;
    *address = NULL;
    if (!n)
        return hipSuccess;
    if (capture_forbids())
        return hipErrorStreamCaptureUnsupported;
    if (!is_host && n > device_arch[current_device]->memory - in_use(current_device))
        return hipErrorOutOfMemory;
    size_t body = (n + ALIGN + PAGE - 1) / PAGE * PAGE;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    uint8_t *map = mmap(NULL, body + PAGE, PROT_NONE, flags, -1, 0);
    if (map == MAP_FAILED)
        return hipErrorOutOfMemory;
    Alloc *alloc = calloc(1, sizeof *alloc);
    *alloc = (Alloc){.next = allocs,
                     .map = map,
                     .map_size = body + PAGE,
                     .size = n,
                     .device = current_device,
                     .is_host = is_host};
    if (is_host) {
        mprotect(map, body, PROT_READ | PROT_WRITE);
        alloc->at = alloc->data = map + (body - n) / ALIGN * ALIGN;
    } else {
        alloc->at = map + ALIGN;
        alloc->data = malloc(n);
        alloc->written = calloc(n, 1);
    }
    memset(alloc->data, FRESH, n);
    allocs = alloc;
    *address = alloc->at;
    return hipSuccess;
}

static hipError_t release(void *address, bool is_host)
{
    Alloc **link = &allocs;
    while (*link && (*link)->at != address)
        link = &(*link)->next;
    Alloc *alloc = *link;
    if (!alloc || alloc->is_host != is_host || alloc->is_registered) {
        complain("free of %p, which is no such allocation", address);
        return hipErrorInvalidValue;
    }
    *link = alloc->next;
    if (!is_host) {
        free(alloc->data);
        free(alloc->written);
    }
    mprotect(alloc->map, alloc->map_size, PROT_NONE);
    madvise(alloc->map, alloc->map_size, MADV_DONTNEED);
    free(alloc);
    return hipSuccess;
}

#define ALLOCATE(is_host)                                                                          \
    do {                                                                                           \
        ENTER();                                                                                   \
        LEAVE(allocate(address, n, is_host));                                                      \
    } while (0)

API hipError_t hipMalloc(void **address, size_t n)
{
    ALLOCATE(false);
}

API hipError_t hipExtMallocWithFlags(void **address, size_t n, unsigned flags)
{
    (void)flags;
    ALLOCATE(false);
}

API hipError_t hipHostMalloc(void **address, size_t n, unsigned flags)
{
    (void)flags;
    ALLOCATE(true);
}

API hipError_t hipHostAlloc(void **address, size_t n, unsigned flags)
{
    (void)flags;
    ALLOCATE(true);
}

API hipError_t hipMallocManaged(void **address, size_t n, unsigned flags)
{
    (void)flags;
    ALLOCATE(true);
}

API hipError_t hipMallocAsync(void **address, size_t n, void *handle)
{
    ENTER();
    Stream *stream;
    hipError_t error = stream_of(handle, &stream);
    LEAVE(error ? error : allocate(address, n, false));
}

API hipError_t hipFree(void *address)
{
    ENTER();
    if (!address)
        LEAVE(hipSuccess);
    REQUIRE(!capture_forbids(), hipErrorStreamCaptureUnsupported);
    hipError_t error = flush_device(current_device), freed = release(address, false);
    LEAVE(freed ? freed : error);
}

API hipError_t hipFreeAsync(void *address, void *handle)
{
    ENTER();
    Stream *stream;
    hipError_t error = stream_of(handle, &stream);
    REQUIRE(!error, error);
    if (!address)
        LEAVE(hipSuccess);
    REQUIRE(!capture_forbids(), hipErrorStreamCaptureUnsupported);
    error = flush(stream);
    hipError_t freed = release(address, false);
    LEAVE(freed ? freed : error);
}

API hipError_t hipHostFree(void *address)
{
    ENTER();
    if (!address)
        LEAVE(hipSuccess);
    hipError_t error = flush_device(current_device), freed = release(address, true);
    LEAVE(freed ? freed : error);
}

API hipError_t hipHostRegister(void *address, size_t n, unsigned flags)
{
    ENTER();
    (void)flags;
    REQUIRE(address && n, hipErrorInvalidValue);
    REQUIRE(!alloc_find(address), hipErrorHostMemoryAlreadyRegistered);
    Alloc *alloc = calloc(1, sizeof *alloc);
    *alloc = (Alloc){.next = allocs,
                     .at = address,
                     .data = address,
                     .size = n,
                     .device = current_device,
                     .is_host = true,
                     .is_registered = true};
    allocs = alloc;
    LEAVE(hipSuccess);
}

API hipError_t hipHostUnregister(void *address)
{
    ENTER();
    Alloc **link = &allocs;
    while (*link && !((*link)->at == address && (*link)->is_registered))
        link = &(*link)->next;
    REQUIRE(*link, hipErrorHostMemoryNotRegistered);
    hipError_t error = flush_device(current_device);
    Alloc *alloc = *link;
    *link = alloc->next;
    free(alloc);
    LEAVE(error);
}

API hipError_t hipHostGetDevicePointer(void **device, void *host, unsigned flags)
{
    ENTER();
    Alloc *alloc = alloc_find(host);
    REQUIRE(device && !flags && alloc && alloc->is_host, hipErrorInvalidValue);
    *device = host;
    LEAVE(hipSuccess);
}

API hipError_t hipMemGetInfo(size_t *free_bytes, size_t *total)
{
    ENTER();
    REQUIRE(free_bytes && total, hipErrorInvalidValue);
    *total = device_arch[current_device]->memory;
    *free_bytes = *total - in_use(current_device);
    LEAVE(hipSuccess);
}

API hipError_t hipMemGetAddressRange(void **base, size_t *n, void *address)
{
    ENTER();
    Alloc *alloc = alloc_find(address);
    REQUIRE(alloc, hipErrorNotFound);
    if (base)
        *base = alloc->at;
    if (n)
        *n = alloc->size;
    LEAVE(hipSuccess);
}

/* hipPointerAttribute_t since ROCm 6 */
typedef struct PointerAttributes {
    int type, device;
    void *device_pointer, *host_pointer;
    int is_managed;
    unsigned flags;
} PointerAttributes;

API hipError_t hipPointerGetAttributes(PointerAttributes *attributes, const void *address)
{
    ENTER();
    REQUIRE(attributes && address, hipErrorInvalidValue);
    Alloc *alloc = alloc_find(address);
    *attributes = (PointerAttributes){.device = -2};
    if (alloc)
        *attributes = (PointerAttributes){.type = alloc->is_host ? 1 : 2,
                                          .device = alloc->device,
                                          .device_pointer = (void *)address,
                                          .host_pointer = alloc->is_host ? (void *)address : NULL};
    LEAVE(hipSuccess);
}

/* Takes the values out of a range of device memory: kernels that read them are wrong. For tests,
 * which forget the pads of a tensor. */
API hipError_t fakehip_forget(void *address, size_t n)
{
    ENTER();
    Alloc *alloc = alloc_find(address);
    REQUIRE(alloc && alloc->written, hipErrorInvalidValue);
    size_t at = (size_t)((uint8_t *)address - alloc->at);
    REQUIRE(n <= alloc->size - at, hipErrorInvalidValue);
    memset(alloc->written + at, 0, n);
    LEAVE(hipSuccess);
}

/* --------------------------------------------------------------------------------- copy and set */
static uint8_t *data_of(const void *address, uint8_t **written)
{
    Alloc *alloc = alloc_find(address);
    *written = NULL;
    if (!alloc)
        return (uint8_t *)address;
    size_t at = (size_t)((const uint8_t *)address - alloc->at);
    if (alloc->written)
        *written = alloc->written + at;
    return alloc->data + at;
}

void copy_now(void *to, const void *from, size_t n)
{
    uint8_t *to_written, *from_written, *data = data_of(to, &to_written);
    memmove(data, data_of(from, &from_written), n);
    if (to_written && from_written)
        memmove(to_written, from_written, n);
    else if (to_written)
        memset(to_written, 1, n);
}

void set_now(void *to, uint32_t value, size_t n, uint32_t width)
{
    uint8_t *written, *data = data_of(to, &written);
    for (size_t i = 0; i < n; i++)
        memcpy(data + i * width, &value, width);
    if (written)
        memset(written, 1, n * width);
}

static bool is_on_device(const void *address)
{
    Alloc *alloc = alloc_find(address);
    return alloc && !alloc->is_host;
}

/* A range that starts in an allocation must end in it. */
static bool is_inside(const void *address, size_t n)
{
    Alloc *alloc = alloc_find(address);
    bool inside = !alloc || n <= alloc->size - (size_t)((const uint8_t *)address - alloc->at);
    if (!inside)
        complain("access of %zu bytes at %p passes the end of its allocation", n, address);
    return inside;
}

/* `kind` is a hipMemcpyKind: bit 0 set: to a device; bit 1 set: from a device; 4: as found. */
static hipError_t check_copy(void *to, const void *from, size_t n, int kind)
{
    if (kind < 0 || kind > 4)
        return hipErrorInvalidMemcpyDirection;
    if (!n)
        return hipSuccess;
    if (!to || !from || !is_inside(to, n) || !is_inside(from, n))
        return hipErrorInvalidValue;
    bool is_to = kind & 1, is_from = kind & 2;
    if (kind < 4 && (is_on_device(to) != is_to || is_on_device(from) != is_from)) {
        complain("copy of kind %d from %p to %p, which is not what they are", kind, from, to);
        return hipErrorInvalidValue;
    }
    return hipSuccess;
}

static hipError_t copy(void *to, const void *from, size_t n, int kind, void *handle, bool is_async)
{
    Stream *stream;
    hipError_t error = stream_of(handle, &stream);
    error = error ? error : check_copy(to, from, n, kind);
    if (error || !n)
        return error;
    if (!is_async && capture_forbids())
        return hipErrorStreamCaptureUnsupported;
    error = submit(stream, (Node){.kind = NODE_COPY, .to = to, .from = from, .n = n});
    return error || is_async ? error : flush(stream);
}

API hipError_t hipMemcpy(void *to, const void *from, size_t n, int kind)
{
    ENTER();
    LEAVE(copy(to, from, n, kind, NULL, false));
}

API hipError_t hipMemcpyWithStream(void *to, const void *from, size_t n, int kind, void *stream)
{
    ENTER();
    LEAVE(copy(to, from, n, kind, stream, false));
}

API hipError_t hipMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream)
{
    ENTER();
    LEAVE(copy(to, from, n, kind, stream, true));
}

/* Memory of one device to another's; where it is says which. */
API hipError_t hipMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                  size_t n, void *stream)
{
    ENTER();
    REQUIRE(is_device_index(to_device) && is_device_index(from_device), hipErrorInvalidDevice);
    LEAVE(copy(to, from, n, 3, stream, true));
}

API hipError_t hipMemcpyHtoD(void *to, const void *from, size_t n)
{
    ENTER();
    LEAVE(copy(to, from, n, 1, NULL, false));
}

API hipError_t hipMemcpyDtoH(void *to, const void *from, size_t n)
{
    ENTER();
    LEAVE(copy(to, from, n, 2, NULL, false));
}

API hipError_t hipMemcpyDtoD(void *to, const void *from, size_t n)
{
    ENTER();
    LEAVE(copy(to, from, n, 3, NULL, false));
}

API hipError_t hipMemcpyHtoDAsync(void *to, const void *from, size_t n, void *stream)
{
    ENTER();
    LEAVE(copy(to, from, n, 1, stream, true));
}

API hipError_t hipMemcpyDtoHAsync(void *to, const void *from, size_t n, void *stream)
{
    ENTER();
    LEAVE(copy(to, from, n, 2, stream, true));
}

API hipError_t hipMemcpyDtoDAsync(void *to, const void *from, size_t n, void *stream)
{
    ENTER();
    LEAVE(copy(to, from, n, 3, stream, true));
}

static hipError_t copy_rows(void *to, size_t ld_to, const void *from, size_t ld_from, size_t n,
                            size_t n_row, int kind, void *stream, bool is_async)
{
    if (n > ld_to || n > ld_from)
        return hipErrorInvalidValue;
    hipError_t error = hipSuccess;
    for (size_t i = 0; i < n_row && !error; i++)
        error = copy((uint8_t *)to + i * ld_to, (const uint8_t *)from + i * ld_from, n, kind,
                     stream, is_async);
    return error;
}

API hipError_t hipMemcpy2D(void *to, size_t ld_to, const void *from, size_t ld_from, size_t n,
                           size_t n_row, int kind)
{
    ENTER();
    LEAVE(copy_rows(to, ld_to, from, ld_from, n, n_row, kind, NULL, false));
}

API hipError_t hipMemcpy2DAsync(void *to, size_t ld_to, const void *from, size_t ld_from, size_t n,
                                size_t n_row, int kind, void *stream)
{
    ENTER();
    LEAVE(copy_rows(to, ld_to, from, ld_from, n, n_row, kind, stream, true));
}

static hipError_t set(void *to, uint32_t value, size_t n, uint32_t width, void *handle,
                      bool is_async)
{
    Stream *stream;
    hipError_t error = stream_of(handle, &stream);
    if (error || !n)
        return error;
    if (!to || !is_inside(to, n * width) || (uintptr_t)to % width)
        return hipErrorInvalidValue;
    if (!is_async && capture_forbids())
        return hipErrorStreamCaptureUnsupported;
    Node node = {.kind = NODE_SET, .to = to, .value = value, .n = n, .width = width};
    error = submit(stream, node);
    return error || is_async ? error : flush(stream);
}

API hipError_t hipMemset(void *to, int value, size_t n)
{
    ENTER();
    LEAVE(set(to, (uint32_t)value, n, 1, NULL, false));
}

API hipError_t hipMemsetAsync(void *to, int value, size_t n, void *stream)
{
    ENTER();
    LEAVE(set(to, (uint32_t)value, n, 1, stream, true));
}

API hipError_t hipMemsetD8Async(void *to, unsigned char value, size_t n, void *stream)
{
    ENTER();
    LEAVE(set(to, value, n, 1, stream, true));
}

API hipError_t hipMemsetD16Async(void *to, unsigned short value, size_t n, void *stream)
{
    ENTER();
    LEAVE(set(to, value, n, 2, stream, true));
}

API hipError_t hipMemsetD32Async(void *to, int value, size_t n, void *stream)
{
    ENTER();
    LEAVE(set(to, (uint32_t)value, n, 4, stream, true));
}
