/* The stand-in libamdhip64, shared by its files: HIP's error numbers, the devices it shows, one
 * lock and one way in and out of every function. Knows nothing of instructions: kernels run through
 * the bridge (bridge.py), in the Python of the host process. */
#ifndef FAKEHIP_H
#define FAKEHIP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

typedef enum hipError_t {
    hipSuccess = 0,
    hipErrorInvalidValue = 1,
    hipErrorOutOfMemory = 2,
    hipErrorInvalidConfiguration = 9,
    hipErrorInvalidMemcpyDirection = 21,
    hipErrorInvalidDeviceFunction = 98,
    hipErrorNoDevice = 100,
    hipErrorInvalidDevice = 101,
    hipErrorInvalidImage = 200,
    hipErrorNoBinaryForGpu = 209,
    hipErrorFileNotFound = 301,
    hipErrorInvalidHandle = 400,
    hipErrorNotFound = 500,
    hipErrorNotReady = 600,
    hipErrorIllegalAddress = 700,
    hipErrorHostMemoryAlreadyRegistered = 712,
    hipErrorHostMemoryNotRegistered = 713,
    hipErrorLaunchFailure = 719,
    hipErrorNotSupported = 801,
    hipErrorStreamCaptureUnsupported = 900,
    hipErrorStreamCaptureInvalidated = 901,
    hipErrorStreamCaptureUnmatched = 903,
    hipErrorStreamCaptureIsolation = 905,
    hipErrorStreamCaptureImplicit = 906,
    hipErrorCapturedEvent = 907,
    hipErrorUnknown = 999
} hipError_t;

/* -------------------------------------------------------------------------- devices, runtime.c */
typedef struct Arch {
    const char *name, *full_name, *product;
    int wave, lds, major, minor, l2;
    size_t memory;
} Arch;

enum { N_DEVICE_MAX = 8 };
extern const Arch *device_arch[N_DEVICE_MAX];
extern int n_device;
extern bool is_lazy; /* work waits in its stream until something waits for it */
extern __thread int current_device;

/* Takes the lock, counts the call, and returns the fault to inject, if any. */
hipError_t enter(const char *function);
/* Logs, remembers and returns the error, and gives the lock back. */
hipError_t leave(const char *function, hipError_t error);
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool is_device_index(int device);

#define LEAVE(error) return leave(__func__, (error))
#define ENTER_ANYWHERE()                                                                           \
    do {                                                                                           \
        hipError_t fault_ = enter(__func__);                                                       \
        if (fault_)                                                                                \
            LEAVE(fault_);                                                                         \
    } while (0)
#define ENTER()                                                                                    \
    do {                                                                                           \
        ENTER_ANYWHERE();                                                                          \
        if (!n_device)                                                                             \
            LEAVE(hipErrorNoDevice);                                                               \
    } while (0)
#define REQUIRE(condition, error)                                                                  \
    do {                                                                                           \
        if (!(condition))                                                                          \
            LEAVE(error);                                                                          \
    } while (0)

/* ----------------------------------------------------------------------------- memory, memory.c */
/* Device memory has two addresses: `at`, which is given out and faults when the host touches it,
 * and `data`, where its bytes are. Host memory has one. An address is never given out twice. */
typedef struct Alloc {
    struct Alloc *next;
    uint8_t *at, *data, *map;
    uint8_t *written; /* one flag a byte: has it a value? NULL: all have */
    size_t size, map_size;
    int device;
    bool is_host, is_registered;
} Alloc;

extern Alloc *allocs;
Alloc *alloc_find(const void *address); /* the allocation that holds the byte, or NULL */
void copy_now(void *to, const void *from, size_t n);
void set_now(void *to, uint32_t value, size_t n, uint32_t width);
int count_allocs(void);

/* ---------------------------------------------------------------------------- streams, stream.c */
typedef struct Event Event;
typedef struct Stream Stream;

/* One recorded operation; owns `kernarg`. */
typedef struct Node {
    struct Node *next;
    enum { NODE_KERNEL, NODE_COPY, NODE_SET, NODE_EVENT, NODE_HOST } kind;
    struct Function *function;
    uint32_t grid[3], block[3], lds;
    uint8_t *kernarg;
    void *to;
    const void *from;
    size_t n;
    uint32_t value, width;
    Event *event;
    void (*host)(void *);
} Node;

hipError_t stream_of(void *handle, Stream **stream);
int stream_device(const Stream *stream);
/* Runs, queues or records one operation; takes over what it owns. */
hipError_t submit(Stream *stream, Node node);
/* Runs what has been queued; returns the first error since the last one reported. */
hipError_t flush(Stream *stream);
hipError_t flush_device(int device);
/* Whether a capture forbids what the caller is about to do; if so, the capture is invalid. */
bool capture_forbids(void);
int count_streams(void);
int count_events(void);
int count_graphs(void);

/* ---------------------------------------------------------------------------- modules, module.c */
typedef struct Function Function;
uint32_t function_kernarg_size(const Function *function);
hipError_t function_run(const Node *node);
int count_modules(void);

#endif
