/* Level 5: see gpu_memory.h. */
#include "gpu_memory.h"

#include "copy.h"

#include <stdlib.h>

enum { LANE_BYTES = 32 << 20, N_LANE = 2 };

/* A buffer of the host and the stream that empties it. */
typedef struct lane {
    void *bytes, *stream;
} lane;

struct mpad_staging {
    mpad_gpu *gpu;
    lane lanes[N_LANE];
    int turn; /* the lane filled last */
};

static mpad_code allocate_zeros(const mpad_gpu_api *api, int64_t n_bytes, void **address,
                                mpad_status *status)
{
    void *stream; /* the default one waits for others, and a capture forbids that */
    mpad_status later;
    MPAD_TRY(api->allocate(n_bytes, address, status));
    MPAD_TRY(api->make_stream(&stream, status));
    mpad_code code = api->clear(*address, n_bytes, stream, status);
    if (code == MPAD_OK)
        code = api->wait(stream, status);
    mpad_code ended = api->end_stream(stream, code == MPAD_OK ? status : &later);
    return code == MPAD_OK ? ended : code;
}

mpad_code mpad_gpu_allocate(const mpad_gpu *gpu, int64_t n_bytes, void **address,
                            mpad_status *status)
{
    const mpad_gpu_api *api;
    mpad_gpu_scope scope;
    mpad_status ignored;
    *address = NULL;
    if (n_bytes == 0)
        return MPAD_OK;
    MPAD_TRY(mpad_gpu_enter(gpu, &scope, &api, status));
    mpad_code code = allocate_zeros(api, n_bytes, address, status);
    code = mpad_gpu_leave(gpu, &scope, code, status);
    if (code != MPAD_OK)
        mpad_gpu_release(gpu, *address, &ignored);
    return code;
}

mpad_code mpad_gpu_release(const mpad_gpu *gpu, void *address, mpad_status *status)
{
    const mpad_gpu_api *api;
    mpad_gpu_scope scope;
    if (!address)
        return MPAD_OK;
    mpad_code entered = mpad_gpu_enter(gpu, &scope, &api, status);
    mpad_code code = api->release(address, status); /* the address says which device */
    return entered == MPAD_OK ? mpad_gpu_leave(gpu, &scope, code, status) : code;
}

mpad_code mpad_gpu_settle(const mpad_gpu *gpu, mpad_status *status)
{
    const mpad_gpu_api *api;
    mpad_gpu_scope scope;
    MPAD_TRY(mpad_gpu_enter(gpu, &scope, &api, status));
    return mpad_gpu_leave(gpu, &scope, api->wait_all(status), status);
}

static mpad_code end_lane(const mpad_gpu_api *api, const lane *lane, mpad_status *status)
{
    mpad_code code = lane->stream ? api->wait(lane->stream, status) : MPAD_OK;
    mpad_status later, *told = code == MPAD_OK ? status : &later; /* the first fault is told */
    if (lane->stream && api->end_stream(lane->stream, told) != MPAD_OK && code == MPAD_OK)
        code = status->code;
    told = code == MPAD_OK ? status : &later;
    if (lane->bytes && api->release_host(lane->bytes, told) != MPAD_OK && code == MPAD_OK)
        code = status->code;
    return code;
}

static mpad_code end_lanes(const mpad_gpu_api *api, const lane *lanes, mpad_status *status)
{
    mpad_code code = MPAD_OK;
    for (int i = 0; i < N_LANE; i++) {
        mpad_status later;
        mpad_code other = end_lane(api, &lanes[i], code == MPAD_OK ? status : &later);
        code = code == MPAD_OK ? other : code;
    }
    return code;
}

static mpad_code make_lanes(const mpad_gpu_api *api, lane *lanes, mpad_status *status)
{
    for (int i = 0; i < N_LANE; i++) {
        MPAD_TRY(api->allocate_host(LANE_BYTES, &lanes[i].bytes, status));
        MPAD_TRY(api->make_stream(&lanes[i].stream, status));
    }
    return MPAD_OK;
}

mpad_code mpad_staging_make(mpad_gpu *gpu, mpad_staging **staging, mpad_status *status)
{
    const mpad_gpu_api *api;
    mpad_gpu_scope scope;
    mpad_status ignored;
    mpad_staging *made = *staging = calloc(1, sizeof *made);
    MPAD_REQUIRE(made, status, MPAD_MEMORY, "no memory for staging");
    made->gpu = gpu;
    mpad_code code = mpad_gpu_enter(gpu, &scope, &api, status);
    if (code == MPAD_OK) {
        code = make_lanes(api, made->lanes, status);
        if (code != MPAD_OK)
            end_lanes(api, made->lanes, &ignored);
        code = mpad_gpu_leave(gpu, &scope, code, status);
    }
    if (code != MPAD_OK)
        free(made);
    return code;
}

/* For all of them, also where one fails: the first fault is told. */
static mpad_code wait_for(const mpad_gpu *gpu, const lane *lanes, int n, mpad_status *status)
{
    const mpad_gpu_api *api;
    mpad_gpu_scope scope;
    MPAD_TRY(mpad_gpu_enter(gpu, &scope, &api, status));
    mpad_code code = MPAD_OK;
    for (int i = 0; i < n; i++) {
        mpad_status later;
        mpad_code other = api->wait(lanes[i].stream, code == MPAD_OK ? status : &later);
        code = code == MPAD_OK ? other : code;
    }
    return mpad_gpu_leave(gpu, &scope, code, status);
}

/* A view of `like`'s shape on a lane's buffer, without gaps. */
static mpad_view view_of_lane(const lane *lane, const mpad_view *like)
{
    mpad_view view = *like;
    int64_t step = like->n_item_bytes;
    view.data = lane->bytes;
    view.device = (mpad_device){.vendor = MPAD_HOST};
    for (int i = view.n_dim - 1; i >= 0; i--) {
        view.stride[i] = step;
        step *= view.size[i];
    }
    return view;
}

static mpad_code put_rows(mpad_staging *staging, const mpad_view *dst, const mpad_view *src,
                          mpad_status *status)
{
    staging->turn = (staging->turn + 1) % N_LANE;
    const lane *lane = &staging->lanes[staging->turn];
    mpad_view between = view_of_lane(lane, dst);
    MPAD_TRY(wait_for(staging->gpu, lane, 1, status));
    MPAD_TRY(mpad_copy(&between, src, status));
    return mpad_gpu_copy_later(staging->gpu, dst, &between, lane->stream, status);
}

mpad_code mpad_staging_put(mpad_staging *staging, const mpad_view *dst, const mpad_view *src,
                           mpad_status *status)
{
    int64_t n_element = mpad_view_count(dst);
    MPAD_TRY(mpad_copy_check(dst, src, status));
    if (n_element == 0)
        return MPAD_OK;
    MPAD_REQUIRE(dst->n_dim > 0, status, MPAD_VALUE, "dst: expected one dimension at least");
    int64_t row_bytes = n_element / dst->size[0] * dst->n_item_bytes;
    int64_t n_fit = LANE_BYTES / row_bytes;
    MPAD_REQUIRE(n_fit > 0, status, MPAD_VALUE, "dst: expected rows of at most %d bytes",
                 LANE_BYTES);
    for (int64_t i = 0; i < dst->size[0]; i += n_fit) {
        mpad_view to = *dst, from = *src;
        to.size[0] = from.size[0] = n_fit < dst->size[0] - i ? n_fit : dst->size[0] - i;
        to.data += i * dst->stride[0];
        from.data += i * src->stride[0];
        MPAD_TRY(put_rows(staging, &to, &from, status));
    }
    return MPAD_OK;
}

mpad_code mpad_staging_wait(mpad_staging *staging, mpad_status *status)
{
    return wait_for(staging->gpu, staging->lanes, N_LANE, status);
}

mpad_code mpad_staging_end(mpad_staging *staging, mpad_status *status)
{
    const mpad_gpu_api *api;
    mpad_gpu_scope scope;
    mpad_code entered = mpad_gpu_enter(staging->gpu, &scope, &api, status);
    mpad_code code = end_lanes(api, staging->lanes, status);
    if (entered == MPAD_OK)
        code = mpad_gpu_leave(staging->gpu, &scope, code, status);
    free(staging);
    return code;
}
