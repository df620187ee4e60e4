/* Level 4: see gpu_run.h. */
#include "gpu_run.h"

#include "gpu_plan.h"
#include "plan.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DEVICES = 64, MAX_SYMBOLS = 192 };

/* Of one stream; the stream's latest buffer is its first in the list. */
typedef struct buffer {
    struct buffer *next;
    void *stream, *address;
    int64_t n_bytes;
} buffer;

/* The kernels of one part on one device. */
typedef struct part {
    void *module;
    void *function[MAX_SYMBOLS]; /* by variant */
} part;

struct mpad_gpu {
    const mpad_gpu_api *api;
    mpad_device device;
    mpad_gpu_info info;
    mpad_gpu_target target;
    part *parts[MPAD_PART_COUNT]; /* NULL until loaded */
    pthread_mutex_t turn;         /* of calls that bring no workspace */
    buffer *buffers;              /* theirs; grows at its head only */
};

static const struct {
    const char *library;
    mpad_code (*open)(void *library, const char *path, const mpad_gpu_api **api,
                      mpad_status *status);
} VENDORS[] = {
    [MPAD_AMD] = {"libamdhip64.so", mpad_gpu_hip_open},
    [MPAD_NVIDIA] = {"libcuda.so", mpad_gpu_cuda_open},
};

/* Written under the lock, published by their last store. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const mpad_gpu_api *apis[MPAD_VENDOR_COUNT];
static mpad_library_search searches[MPAD_VENDOR_COUNT];
static mpad_gpu *gpus[MPAD_VENDOR_COUNT][MAX_DEVICES];

const char *mpad_gpu_library_name(mpad_vendor vendor)
{
    return VENDORS[vendor].library;
}

static const mpad_gpu_api *api_of(mpad_vendor vendor)
{
    return __atomic_load_n(&apis[vendor], __ATOMIC_ACQUIRE);
}

bool mpad_gpu_is_open(mpad_vendor vendor)
{
    return api_of(vendor) != NULL;
}

const mpad_library_search *mpad_gpu_search(mpad_vendor vendor)
{
    return &searches[vendor];
}

static mpad_code open_locked(mpad_vendor vendor, const mpad_library_candidate *candidates, int n,
                             mpad_status *status)
{
    mpad_library_search *search = &searches[vendor];
    void *library;
    const mpad_gpu_api *api;
    if (apis[vendor])
        return MPAD_OK;
    MPAD_TRY(mpad_library_open(VENDORS[vendor].library, candidates, n, search, &library, status));
    MPAD_TRY(VENDORS[vendor].open(library, search->path, &api, status));
    __atomic_store_n(&apis[vendor], api, __ATOMIC_RELEASE);
    return MPAD_OK;
}

mpad_code mpad_gpu_open(mpad_vendor vendor, const mpad_library_candidate *candidates, int n,
                        mpad_status *status)
{
    pthread_mutex_lock(&lock);
    mpad_code code = open_locked(vendor, candidates, n, status);
    pthread_mutex_unlock(&lock);
    return code;
}

mpad_code mpad_gpu_count(mpad_vendor vendor, int *n, mpad_status *status)
{
    return api_of(vendor)->count(n, status);
}

/* Appends to a fault's message which device it was. */
static mpad_code name_device(mpad_code code, const mpad_gpu_api *api, int index, const char *arch,
                             mpad_status *status)
{
    if (code == MPAD_OK || code == MPAD_UNSUPPORTED || code == MPAD_VALUE)
        return code;
    size_t n = strlen(status->message);
    snprintf(status->message + n, sizeof status->message - n, " on %s device %d%s%s%s", api->name,
             index, arch ? " (" : "", arch ? arch : "", arch ? ")" : "");
    return code;
}

static mpad_code fail_of(const mpad_gpu *gpu, mpad_code code, mpad_status *status)
{
    return name_device(code, gpu->api, gpu->device.index, gpu->info.arch, status);
}

mpad_code mpad_gpu_describe(mpad_device device, mpad_gpu_info *info, mpad_status *status)
{
    const mpad_gpu_api *api = api_of(device.vendor);
    return name_device(api->describe(device.index, info, status), api, device.index, NULL, status);
}

/* Ends the scope after work that ended with `code`; a fault of the work is told first. */
static mpad_code end_scope(const mpad_gpu_api *api, const mpad_gpu_scope *scope, mpad_code code,
                           mpad_status *status)
{
    if (code == MPAD_OK)
        return api->leave(scope, status);
    mpad_status ignored;
    api->leave(scope, &ignored);
    return code;
}

mpad_code mpad_gpu_enter(const mpad_gpu *gpu, mpad_gpu_scope *scope, const mpad_gpu_api **api,
                         mpad_status *status)
{
    *api = gpu->api;
    mpad_code code = gpu->api->enter(gpu->device.index, scope, status);
    if (code == MPAD_OK) {
        scope->capture_mode = MPAD_CAPTURE_RELAXED;
        code = gpu->api->swap_capture_mode(&scope->capture_mode, status);
        if (code != MPAD_OK)
            code = end_scope(gpu->api, scope, code, status);
    }
    return fail_of(gpu, code, status);
}

mpad_code mpad_gpu_leave(const mpad_gpu *gpu, const mpad_gpu_scope *scope, mpad_code code,
                         mpad_status *status)
{
    mpad_status later;
    int mode = scope->capture_mode;
    mpad_code swapped = gpu->api->swap_capture_mode(&mode, code == MPAD_OK ? status : &later);
    code = code == MPAD_OK ? swapped : code;
    return fail_of(gpu, end_scope(gpu->api, scope, code, status), status);
}

static mpad_code describe_new(mpad_device device, mpad_gpu **gpu, mpad_status *status)
{
    mpad_gpu *made = *gpu = calloc(1, sizeof *made);
    MPAD_REQUIRE(made, status, MPAD_MEMORY, "no memory for a device");
    made->api = api_of(device.vendor);
    made->device = device;
    pthread_mutex_init(&made->turn, NULL);
    MPAD_TRY(name_device(made->api->describe(device.index, &made->info, status), made->api,
                         device.index, NULL, status));
    return mpad_gpu_target_make(made->info.arch, made->info.n_multiprocessor, &made->target,
                                status);
}

static mpad_code make_locked(mpad_device device, mpad_gpu **gpu, mpad_status *status)
{
    mpad_gpu **place = &gpus[device.vendor][device.index];
    if ((*gpu = *place))
        return MPAD_OK;
    mpad_code code = describe_new(device, gpu, status);
    if (code == MPAD_OK)
        __atomic_store_n(place, *gpu, __ATOMIC_RELEASE);
    else
        free(*gpu);
    return code;
}

mpad_gpu *mpad_gpu_find(mpad_device device)
{
    bool is_known = device.index >= 0 && device.index < MAX_DEVICES;
    return is_known ? __atomic_load_n(&gpus[device.vendor][device.index], __ATOMIC_ACQUIRE) : NULL;
}

mpad_code mpad_gpu_make(mpad_device device, mpad_gpu **gpu, mpad_status *status)
{
    MPAD_REQUIRE(device.index >= 0 && device.index < MAX_DEVICES, status, MPAD_DEVICE,
                 "expected a device below %d, got %d", MAX_DEVICES, device.index);
    pthread_mutex_lock(&lock);
    mpad_code code = make_locked(device, gpu, status);
    pthread_mutex_unlock(&lock);
    return code;
}

const char *mpad_gpu_arch(const mpad_gpu *gpu)
{
    return gpu->info.arch;
}

mpad_code mpad_gpu_needs(const mpad_gpu *gpu, const mpad_moe *moe, int64_t *n_bytes, int *part,
                         mpad_status *status)
{
    mpad_gpu_plan plan;
    MPAD_TRY(mpad_gpu_plan_make(&gpu->target, moe, &plan, status));
    *n_bytes = plan.workspace_bytes;
    *part = plan.part;
    return MPAD_OK;
}

/* Kernels. */

static const part *part_of(const mpad_gpu *gpu, int index)
{
    return __atomic_load_n(&gpu->parts[index], __ATOMIC_ACQUIRE);
}

bool mpad_gpu_have_part(const mpad_gpu *gpu, int part)
{
    return part_of(gpu, part) != NULL;
}

static mpad_code find_functions(const mpad_gpu *gpu, int index, part *made, mpad_status *status)
{
    for (int i = 0; mpad_gpu_symbol(i); i++) {
        MPAD_REQUIRE(i < MAX_SYMBOLS, status, MPAD_DEVICE, "more than %d kernels", MAX_SYMBOLS);
        if (!mpad_gpu_have_symbol(&gpu->target, index, i))
            continue;
        MPAD_TRY(gpu->api->find(made->module, mpad_gpu_symbol(i), gpu->target.lds_bytes,
                                &made->function[i], status));
    }
    return MPAD_OK;
}

static mpad_code load_image(const mpad_gpu *gpu, int index, const void *image, part *made,
                            mpad_status *status)
{
    mpad_gpu_scope scope;
    MPAD_TRY(gpu->api->enter(gpu->device.index, &scope, status));
    mpad_code code = gpu->api->load(image, &made->module, status);
    bool is_loaded = code == MPAD_OK;
    if (is_loaded)
        code = find_functions(gpu, index, made, status);
    code = end_scope(gpu->api, &scope, code, status);
    mpad_status ignored;
    if (is_loaded && code != MPAD_OK)
        gpu->api->unload(made->module, &ignored);
    return code;
}

static mpad_code load_locked(mpad_gpu *gpu, int index, const void *image, mpad_status *status)
{
    if (gpu->parts[index])
        return MPAD_OK;
    part *made = calloc(1, sizeof *made);
    MPAD_REQUIRE(made, status, MPAD_MEMORY, "no memory for a device's functions");
    mpad_code code = load_image(gpu, index, image, made, status);
    if (code == MPAD_OK)
        __atomic_store_n(&gpu->parts[index], made, __ATOMIC_RELEASE);
    else
        free(made);
    return fail_of(gpu, code, status);
}

mpad_code mpad_gpu_load(mpad_gpu *gpu, int part, const void *image, mpad_status *status)
{
    pthread_mutex_lock(&lock);
    mpad_code code = load_locked(gpu, part, image, status);
    pthread_mutex_unlock(&lock);
    return code;
}

/* The stream's latest buffer; with the turn taken. */
static const buffer *find_buffer(const mpad_gpu *gpu, void *stream)
{
    const buffer *found = gpu->buffers;
    while (found && found->stream != stream)
        found = found->next;
    return found;
}

static mpad_code add_buffer(mpad_gpu *gpu, void *stream, int64_t n_bytes, mpad_status *status)
{
    enum { LEAST_BYTES = 1 << 20 };
    buffer *made = calloc(1, sizeof *made);
    MPAD_REQUIRE(made, status, MPAD_MEMORY, "no memory for a workspace's entry");
    made->stream = stream;
    for (made->n_bytes = LEAST_BYTES; made->n_bytes < n_bytes;)
        made->n_bytes *= 2;
    mpad_code code = gpu->api->allocate(made->n_bytes, &made->address, status);
    if (code != MPAD_OK) {
        free(made);
        return code;
    }
    made->next = gpu->buffers;
    gpu->buffers = made;
    return MPAD_OK;
}

static mpad_code take_buffer(mpad_gpu *gpu, void *stream, int64_t n_bytes, void **workspace,
                             mpad_status *status)
{
    const buffer *found = find_buffer(gpu, stream);
    if (!found || found->n_bytes < n_bytes)
        MPAD_TRY(add_buffer(gpu, stream, n_bytes, status));
    *workspace = find_buffer(gpu, stream)->address;
    return MPAD_OK;
}

static mpad_code launch_all(const mpad_gpu *gpu, const mpad_gpu_plan *plan, mpad_gpu_args *args,
                            void *stream, mpad_status *status)
{
    const part *loaded = part_of(gpu, plan->part);
    for (int i = 0; i < plan->n_launch; i++) {
        const mpad_gpu_launch *launch = &plan->launch[i];
        MPAD_TRY(gpu->api->launch(loaded->function[launch->variant], launch->grid, launch->block,
                                  launch->lds_bytes, launch->is_dependent, args, stream, status));
    }
    return MPAD_OK;
}

static mpad_code launch_in(const mpad_gpu *gpu, const mpad_moe *moe, const mpad_gpu_plan *plan,
                           const void *n_token_d, mpad_dtype n_token_dtype, void *workspace,
                           void *stream, mpad_status *status)
{
    mpad_gpu_args args;
    mpad_gpu_args_make(plan, moe, n_token_d, n_token_dtype, workspace, &args);
    return launch_all(gpu, plan, &args, stream, status);
}

/* The launches of a call in its stream's buffer follow each other: no other thread's come between.
 */
static mpad_code launch_in_turn(mpad_gpu *gpu, const mpad_moe *moe, const mpad_gpu_plan *plan,
                                const void *n_token_d, mpad_dtype n_token_dtype, void *stream,
                                mpad_status *status)
{
    void *workspace;
    pthread_mutex_lock(&gpu->turn);
    mpad_code code = take_buffer(gpu, stream, plan->workspace_bytes, &workspace, status);
    if (code == MPAD_OK)
        code = launch_in(gpu, moe, plan, n_token_d, n_token_dtype, workspace, stream, status);
    pthread_mutex_unlock(&gpu->turn);
    return code;
}

mpad_code mpad_gpu_run(mpad_gpu *gpu, const mpad_moe *moe, const void *n_token_d,
                       mpad_dtype n_token_dtype, void *workspace, void *stream, mpad_status *status)
{
    mpad_gpu_plan plan;
    mpad_gpu_scope scope;
    MPAD_TRY(mpad_gpu_plan_make(&gpu->target, moe, &plan, status));
    if (plan.n_launch == 0)
        return MPAD_OK;
    bool is_ours = !workspace && plan.workspace_bytes > 0;
    mpad_code code = gpu->api->enter(gpu->device.index, &scope, status);
    if (code == MPAD_OK) {
        code = is_ours ? launch_in_turn(gpu, moe, &plan, n_token_d, n_token_dtype, stream, status)
                       : launch_in(gpu, moe, &plan, n_token_d, n_token_dtype, workspace, stream,
                                   status);
        code = end_scope(gpu->api, &scope, code, status);
    }
    return fail_of(gpu, code, status);
}

/* Copies. */

/* Bytes of the innermost dimensions that lie without gaps in both views; `*dim` becomes the last
 * dimension outside them, -1 if none is. */
static int64_t inner_bytes(const mpad_view *dst, const mpad_view *src, int *dim)
{
    int64_t n_bytes = dst->n_item_bytes;
    for (*dim = dst->n_dim - 1; *dim >= 0; --*dim) {
        bool is_gapless = dst->stride[*dim] == n_bytes && src->stride[*dim] == n_bytes;
        if (dst->size[*dim] != 1 && !is_gapless)
            break;
        n_bytes *= dst->size[*dim];
    }
    return n_bytes;
}

static mpad_code copy_rows(const mpad_gpu *gpu, const mpad_view *dst, const mpad_view *src, int dim,
                           mpad_gpu_transfer *rows, void *stream, mpad_status *status)
{
    if (dim < 0)
        return gpu->api->copy(rows, stream, status);
    mpad_gpu_transfer part = *rows;
    for (int64_t i = 0; i < dst->size[dim]; i++) {
        part.to = (char *)rows->to + i * dst->stride[dim];
        part.from = (const char *)rows->from + i * src->stride[dim];
        MPAD_TRY(copy_rows(gpu, dst, src, dim - 1, &part, stream, status));
    }
    return MPAD_OK;
}

static mpad_code copy_all(const mpad_gpu *gpu, const mpad_view *dst, const mpad_view *src,
                          void *stream, mpad_status *status)
{
    int dim;
    mpad_gpu_transfer rows = {.to = dst->data, .from = src->data, .n_row = 1};
    rows.n_bytes = inner_bytes(dst, src, &dim);
    MPAD_REQUIRE(dim < 0 || dim < dst->n_dim - 1, status, MPAD_VALUE,
                 "dst: expected the last dimension without gaps in both arrays for a copy to or "
                 "from a GPU; pass contiguous ones");
    if (dim >= 0 && dst->stride[dim] >= rows.n_bytes && src->stride[dim] >= rows.n_bytes) {
        rows.n_row = dst->size[dim];
        rows.to_pitch = dst->stride[dim];
        rows.from_pitch = src->stride[dim];
        dim--;
    }
    return copy_rows(gpu, dst, src, dim, &rows, stream, status);
}

static mpad_code copy_within(const mpad_gpu *gpu, const mpad_view *dst, const mpad_view *src,
                             bool is_waiting, void *stream, mpad_status *status)
{
    const mpad_gpu_api *api;
    mpad_gpu_scope scope;
    if (mpad_view_count(dst) == 0)
        return MPAD_OK;
    MPAD_TRY(mpad_gpu_enter(gpu, &scope, &api, status));
    mpad_code code = copy_all(gpu, dst, src, stream, status);
    if (code == MPAD_OK && is_waiting)
        code = api->wait(stream, status);
    return mpad_gpu_leave(gpu, &scope, code, status);
}

mpad_code mpad_gpu_copy_later(const mpad_gpu *gpu, const mpad_view *dst, const mpad_view *src,
                              void *stream, mpad_status *status)
{
    return copy_within(gpu, dst, src, false, stream, status);
}

mpad_code mpad_gpu_copy(const mpad_gpu *gpu, const mpad_view *dst, const mpad_view *src,
                        void *stream, mpad_status *status)
{
    bool is_host = dst->device.vendor == MPAD_HOST || src->device.vendor == MPAD_HOST;
    return copy_within(gpu, dst, src, is_host, stream, status);
}
