/* The stand-in libamdhip64: streams, capture, graphs, events. Work runs when it is submitted, or,
 * if lazy, when something waits for it; a graph is the list of what was captured. */
#define _GNU_SOURCE
#include "fakehip.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct Graph {
    Node *head, **tail;
    int n_user; /* the graph and its executable forms */
} Graph;

struct Stream {
    Stream *next;
    int device;
    bool is_blocking;
    Graph *queue;   /* what a lazy stream has not run yet */
    Graph *capture; /* what is being recorded */
    int capture_mode;
    bool is_origin, is_invalid; /* of the capture */
};

struct Event {
    struct timespec time;
    enum { EVENT_FRESH, EVENT_QUEUED, EVENT_REACHED } state;
    Stream *stream;
    Graph *capture;
};

enum { MODE_RELAXED = 2 };

static Stream null_streams[N_DEVICE_MAX], *streams;
static hipError_t unreported;
static int n_event, n_graph;

static Graph *graph_new(void)
{
    Graph *graph = calloc(1, sizeof *graph);
    graph->tail = &graph->head;
    graph->n_user = 1;
    return graph;
}

static void graph_release(Graph *graph)
{
    if (--graph->n_user)
        return;
    for (Node *node = graph->head, *next; node; node = next) {
        next = node->next;
        free(node->kernarg);
        free(node);
    }
    free(graph);
}

int count_streams(void)
{
    int n = 0;
    for (Stream *stream = streams; stream; stream = stream->next)
        n++;
    return n;
}

int count_events(void)
{
    return n_event;
}

int count_graphs(void)
{
    return n_graph;
}

/* 1 and 2 are the handles of the legacy and of the per-thread null stream. */
hipError_t stream_of(void *handle, Stream **stream)
{
    *stream = &null_streams[current_device];
    if ((uintptr_t)handle <= 2) {
        (*stream)->device = current_device;
        return hipSuccess;
    }
    for (*stream = streams; *stream; *stream = (*stream)->next)
        if (*stream == handle)
            return hipSuccess;
    complain("%p is no stream", handle);
    return hipErrorInvalidHandle;
}

int stream_device(const Stream *stream)
{
    return stream->device;
}

/* A stream of the capture, still under way, in which the event was recorded last; or NULL. */
static const Stream *capturing_stream(const Event *event)
{
    const Stream *stream = event->capture ? streams : NULL;
    while (stream && stream->capture != event->capture)
        stream = stream->next;
    return stream;
}

static bool is_null(const Stream *stream)
{
    return stream >= null_streams && stream < null_streams + N_DEVICE_MAX;
}

static __thread int thread_mode; /* what hipThreadExchangeStreamCaptureMode set */

bool capture_forbids(void)
{
    bool any = false;
    if (thread_mode == MODE_RELAXED)
        return false;
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->capture && stream->capture_mode != MODE_RELAXED)
            any = stream->is_invalid = true;
    return any;
}

/* The stream of the null stream's device whose capture would have to wait for the null stream. */
static Stream *captured_with_null(const Stream *null)
{
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->capture && stream->is_blocking && stream->device == null->device)
            return stream;
    return NULL;
}

/* Whether work on `stream` would entangle the null stream with a capture, which is then invalid. */
static bool breaks_capture(const Stream *stream)
{
    Stream *captured = is_null(stream) ? captured_with_null(stream) : NULL;
    if (captured)
        captured->is_invalid = true;
    return captured;
}

static hipError_t run(const Node *node)
{
    switch (node->kind) {
    case NODE_KERNEL:
        return function_run(node);
    case NODE_COPY:
        copy_now(node->to, node->from, node->n);
        return hipSuccess;
    case NODE_SET:
        set_now(node->to, node->value, node->n, node->width);
        return hipSuccess;
    case NODE_EVENT:
        clock_gettime(CLOCK_MONOTONIC, &node->event->time);
        node->event->state = EVENT_REACHED;
        return hipSuccess;
    case NODE_HOST:
        node->host(node->to);
        return hipSuccess;
    }
    return hipErrorUnknown;
}

hipError_t flush(Stream *stream)
{
    hipError_t error = unreported;
    unreported = hipSuccess;
    Graph *queue = stream->queue;
    stream->queue = NULL;
    if (!queue)
        return error;
    for (Node *node = queue->head; node; node = node->next) {
        hipError_t failed = run(node);
        error = error ? error : failed;
    }
    graph_release(queue);
    return error;
}

static void flush_quietly(Stream *stream)
{
    hipError_t error = flush(stream);
    unreported = unreported ? unreported : error;
}

hipError_t flush_device(int device)
{
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->device == device)
            flush_quietly(stream);
    return flush(&null_streams[device]);
}

/* The null stream and the blocking streams of a device run in the order of submission. */
static void flush_before(Stream *stream)
{
    if (!is_null(stream) && stream->is_blocking)
        flush_quietly(&null_streams[stream->device]);
    for (Stream *other = streams; is_null(stream) && other; other = other->next)
        if (other->is_blocking && other->device == stream->device)
            flush_quietly(other);
}

hipError_t submit(Stream *stream, Node node)
{
    hipError_t error = hipSuccess;
    if (breaks_capture(stream))
        error = hipErrorStreamCaptureImplicit;
    else if (stream->is_invalid)
        error = hipErrorStreamCaptureInvalidated;
    if (error || (!stream->capture && !is_lazy)) {
        error = error ? error : run(&node);
        free(node.kernarg);
        return error;
    }
    if (!stream->capture) {
        flush_before(stream);
        stream->queue = stream->queue ? stream->queue : graph_new();
    }
    Graph *graph = stream->capture ? stream->capture : stream->queue;
    Node *copy = malloc(sizeof *copy);
    *copy = node;
    copy->next = NULL;
    *graph->tail = copy;
    graph->tail = &copy->next;
    return hipSuccess;
}

#define ENTER_STREAM()                                                                             \
    ENTER();                                                                                       \
    Stream *stream;                                                                                \
    do {                                                                                           \
        hipError_t error_ = stream_of(handle, &stream);                                            \
        REQUIRE(!error_, error_);                                                                  \
    } while (0)

/* ------------------------------------------------------------------------------------- streams */
static hipError_t stream_create(void **handle, unsigned flags)
{
    if (!handle || flags > 1)
        return hipErrorInvalidValue;
    Stream *stream = calloc(1, sizeof *stream);
    *stream = (Stream){.next = streams, .device = current_device, .is_blocking = !flags};
    streams = stream;
    *handle = stream;
    return hipSuccess;
}

API hipError_t hipStreamCreate(void **handle)
{
    ENTER();
    LEAVE(stream_create(handle, 0));
}

API hipError_t hipStreamCreateWithFlags(void **handle, unsigned flags)
{
    ENTER();
    LEAVE(stream_create(handle, flags));
}

API hipError_t hipStreamCreateWithPriority(void **handle, unsigned flags, int priority)
{
    ENTER();
    (void)priority;
    LEAVE(stream_create(handle, flags));
}

API hipError_t hipStreamDestroy(void *handle)
{
    ENTER_STREAM();
    REQUIRE(!is_null(stream), hipErrorInvalidHandle);
    hipError_t error = flush(stream);
    Stream **link = &streams;
    while (*link != stream)
        link = &(*link)->next;
    *link = stream->next;
    if (stream->capture && stream->is_origin)
        graph_release(stream->capture);
    free(stream);
    LEAVE(error);
}

API hipError_t hipStreamSynchronize(void *handle)
{
    ENTER_STREAM();
    stream->is_invalid |= stream->capture != NULL;
    REQUIRE(!stream->capture && !breaks_capture(stream), hipErrorStreamCaptureUnsupported);
    flush_before(stream);
    LEAVE(flush(stream));
}

API hipError_t hipStreamQuery(void *handle)
{
    ENTER_STREAM();
    stream->is_invalid |= stream->capture != NULL;
    REQUIRE(!stream->capture, hipErrorStreamCaptureUnsupported);
    LEAVE(stream->queue ? hipErrorNotReady : hipSuccess);
}

API hipError_t hipStreamGetDevice(void *handle, int *device)
{
    ENTER_STREAM();
    REQUIRE(device, hipErrorInvalidValue);
    *device = stream->device;
    LEAVE(hipSuccess);
}

API hipError_t hipStreamWaitEvent(void *handle, void *event_handle, unsigned flags)
{
    ENTER_STREAM();
    (void)flags;
    Event *event = event_handle;
    REQUIRE(event, hipErrorInvalidHandle);
    const Stream *source = capturing_stream(event);
    if (source && !stream->capture) { /* the stream joins the capture */
        stream->capture = source->capture;
        stream->capture_mode = source->capture_mode;
        LEAVE(hipSuccess);
    }
    if (stream->capture && !source && event->state != EVENT_FRESH) {
        stream->is_invalid = true;
        LEAVE(hipErrorStreamCaptureIsolation);
    }
    if (event->state == EVENT_QUEUED && event->stream != stream)
        flush_quietly(event->stream);
    LEAVE(hipSuccess);
}

API hipError_t hipLaunchHostFunc(void *handle, void (*host)(void *), void *data)
{
    ENTER_STREAM();
    REQUIRE(host, hipErrorInvalidValue);
    LEAVE(submit(stream, (Node){.kind = NODE_HOST, .host = host, .to = data}));
}

/* ---------------------------------------------------------------------------- capture and graphs
 */
static int capture_status(const Stream *stream)
{
    return !stream->capture ? 0 : stream->is_invalid ? 2 : 1;
}

API hipError_t hipStreamIsCapturing(void *handle, int *status)
{
    ENTER_STREAM();
    REQUIRE(status, hipErrorInvalidValue);
    REQUIRE(!is_null(stream) || !captured_with_null(stream), hipErrorStreamCaptureImplicit);
    *status = capture_status(stream);
    LEAVE(hipSuccess);
}

API hipError_t hipStreamGetCaptureInfo(void *handle, int *status, unsigned long long *id)
{
    ENTER_STREAM();
    REQUIRE(status, hipErrorInvalidValue);
    *status = capture_status(stream);
    if (id)
        *id = (uintptr_t)stream->capture;
    LEAVE(hipSuccess);
}

API hipError_t hipThreadExchangeStreamCaptureMode(int *mode)
{
    ENTER();
    REQUIRE(mode && *mode >= 0 && *mode <= MODE_RELAXED, hipErrorInvalidValue);
    int before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    LEAVE(hipSuccess);
}

API hipError_t hipStreamBeginCapture(void *handle, int mode)
{
    ENTER_STREAM();
    REQUIRE(!is_null(stream), hipErrorStreamCaptureUnsupported);
    REQUIRE(mode >= 0 && mode <= MODE_RELAXED && !stream->capture, hipErrorInvalidValue);
    flush_quietly(stream);
    stream->capture = graph_new();
    stream->capture_mode = mode;
    stream->is_origin = true;
    LEAVE(hipSuccess);
}

API hipError_t hipStreamEndCapture(void *handle, void **graph_handle)
{
    ENTER_STREAM();
    REQUIRE(graph_handle, hipErrorInvalidValue);
    REQUIRE(stream->capture && stream->is_origin, hipErrorStreamCaptureUnmatched);
    Graph *graph = stream->capture;
    bool is_invalid = false;
    for (Stream *other = streams; other; other = other->next)
        if (other->capture == graph) {
            is_invalid |= other->is_invalid;
            other->capture = NULL;
            other->is_invalid = other->is_origin = false;
        }
    *graph_handle = is_invalid ? NULL : graph;
    if (is_invalid)
        graph_release(graph);
    else
        n_graph++;
    LEAVE(is_invalid ? hipErrorStreamCaptureInvalidated : hipSuccess);
}

static hipError_t graph_instantiate(void **executable, Graph *graph)
{
    if (!executable || !graph)
        return hipErrorInvalidValue;
    graph->n_user++;
    n_graph++;
    *executable = graph;
    return hipSuccess;
}

API hipError_t hipGraphInstantiate(void **executable, void *graph, void **node, char *log, size_t n)
{
    ENTER();
    (void)node, (void)log, (void)n;
    LEAVE(graph_instantiate(executable, graph));
}

API hipError_t hipGraphInstantiateWithFlags(void **executable, void *graph,
                                            unsigned long long flags)
{
    ENTER();
    (void)flags;
    LEAVE(graph_instantiate(executable, graph));
}

API hipError_t hipGraphLaunch(void *executable, void *handle)
{
    ENTER_STREAM();
    REQUIRE(executable, hipErrorInvalidValue);
    for (Node *node = ((Graph *)executable)->head; node; node = node->next) {
        Node copy = *node;
        if (node->kernarg) {
            size_t n = function_kernarg_size(node->function);
            copy.kernarg = malloc(n + 1);
            memcpy(copy.kernarg, node->kernarg, n);
        }
        hipError_t error = submit(stream, copy);
        REQUIRE(!error, error);
    }
    LEAVE(hipSuccess);
}

API hipError_t hipGraphGetNodes(void *graph, void **nodes, size_t *n_node)
{
    ENTER();
    REQUIRE(graph && n_node, hipErrorInvalidValue);
    size_t n = 0;
    for (Node *node = ((Graph *)graph)->head; node; node = node->next, n++)
        if (nodes && n < *n_node)
            nodes[n] = node;
    *n_node = n;
    LEAVE(hipSuccess);
}

static hipError_t graph_destroy(Graph *graph)
{
    if (!graph)
        return hipErrorInvalidValue;
    n_graph--;
    graph_release(graph);
    return hipSuccess;
}

API hipError_t hipGraphDestroy(void *graph)
{
    ENTER();
    LEAVE(graph_destroy(graph));
}

API hipError_t hipGraphExecDestroy(void *executable)
{
    ENTER();
    LEAVE(graph_destroy(executable));
}

/* -------------------------------------------------------------------------------------- events */
static hipError_t event_create(void **event)
{
    if (!event)
        return hipErrorInvalidValue;
    *event = calloc(1, sizeof(Event));
    n_event++;
    return hipSuccess;
}

API hipError_t hipEventCreate(void **event)
{
    ENTER();
    LEAVE(event_create(event));
}

API hipError_t hipEventCreateWithFlags(void **event, unsigned flags)
{
    ENTER();
    (void)flags;
    LEAVE(event_create(event));
}

API hipError_t hipEventDestroy(void *handle)
{
    ENTER();
    Event *event = handle;
    REQUIRE(event, hipErrorInvalidHandle);
    if (event->state == EVENT_QUEUED)
        flush_quietly(event->stream);
    n_event--;
    free(event);
    LEAVE(hipSuccess);
}

API hipError_t hipEventRecord(void *event_handle, void *handle)
{
    ENTER_STREAM();
    Event *event = event_handle;
    REQUIRE(event, hipErrorInvalidHandle);
    event->stream = stream;
    event->capture = stream->capture;
    if (stream->capture)
        LEAVE(stream->is_invalid ? hipErrorStreamCaptureInvalidated : hipSuccess);
    event->state = EVENT_QUEUED;
    LEAVE(submit(stream, (Node){.kind = NODE_EVENT, .event = event}));
}

API hipError_t hipEventSynchronize(void *handle)
{
    ENTER();
    Event *event = handle;
    REQUIRE(event, hipErrorInvalidHandle);
    REQUIRE(!capturing_stream(event), hipErrorCapturedEvent);
    LEAVE(event->state == EVENT_QUEUED ? flush(event->stream) : hipSuccess);
}

API hipError_t hipEventQuery(void *handle)
{
    ENTER();
    Event *event = handle;
    REQUIRE(event, hipErrorInvalidHandle);
    REQUIRE(!capturing_stream(event), hipErrorCapturedEvent);
    LEAVE(event->state == EVENT_QUEUED ? hipErrorNotReady : hipSuccess);
}

API hipError_t hipEventElapsedTime(float *milliseconds, void *start, void *stop)
{
    ENTER();
    Event *a = start, *b = stop;
    REQUIRE(milliseconds, hipErrorInvalidValue);
    REQUIRE(a && b && a->state != EVENT_FRESH && b->state != EVENT_FRESH, hipErrorInvalidHandle);
    REQUIRE(a->state == EVENT_REACHED && b->state == EVENT_REACHED, hipErrorNotReady);
    *milliseconds = (float)((double)(b->time.tv_sec - a->time.tv_sec) * 1e3 +
                            (double)(b->time.tv_nsec - a->time.tv_nsec) * 1e-6);
    LEAVE(hipSuccess);
}
