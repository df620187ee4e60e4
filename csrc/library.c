/* Level 2: see library.h. */
#include "library.h"

#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A message's lists of paths. */
enum { TEXT_BYTES = 700 };

static bool note(mpad_library_search *search, const char *origin, const char *path, bool is_taken,
                 const char *verdict)
{
    if (search->n_tried == MPAD_LIBRARY_MAX_TRIED)
        return is_taken;
    int i = search->n_tried++;
    snprintf(search->tried[i].origin, sizeof search->tried[i].origin, "%s", origin);
    snprintf(search->tried[i].path, sizeof search->tried[i].path, "%.*s", MPAD_LIBRARY_PATH - 1,
             path);
    snprintf(search->tried[i].verdict, sizeof search->tried[i].verdict, "%s", verdict);
    search->tried[i].is_taken = is_taken;
    return is_taken;
}

/* Libraries of the process whose file name begins with `base`, by their real paths. */
typedef struct mapped {
    const char *base;
    int n;
    char path[2][PATH_MAX];
} mapped;

static int add_mapped(struct dl_phdr_info *info, size_t n_bytes, void *data)
{
    (void)n_bytes;
    mapped *found = data;
    const char *slash = strrchr(info->dlpi_name, '/');
    const char *file = slash ? slash + 1 : info->dlpi_name;
    if (strncmp(file, found->base, strlen(found->base)) != 0)
        return 0;
    char real[PATH_MAX];
    if (!realpath(info->dlpi_name, real))
        snprintf(real, sizeof real, "%s", info->dlpi_name);
    if (found->n == 0 || strcmp(real, found->path[0]) != 0)
        memcpy(found->path[found->n++], real, sizeof real);
    return found->n == 2;
}

static bool is_same_file(const char *path, const char *real)
{
    char other[PATH_MAX];
    return strcmp(path, real) == 0 || (realpath(path, other) && strcmp(other, real) == 0);
}

static mpad_code take_mapped(const mapped *found, const char *override, mpad_library_search *search,
                             void **library, mpad_status *status)
{
    const char *path = found->path[0];
    MPAD_REQUIRE(found->n == 1, status, MPAD_DEVICE,
                 "%s: the process has two, %s and %s, which do not know each other's memory and "
                 "streams; make the programs that loaded them use one",
                 found->base, path, found->path[1]);
    MPAD_REQUIRE(!override || is_same_file(override, path), status, MPAD_DEVICE,
                 "%s: the environment names %s, but the process has %s already; two in one process "
                 "do not know each other's memory and streams, so unset the variable",
                 found->base, override, path);
    *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!*library)
        *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    MPAD_REQUIRE(*library, status, MPAD_DEVICE, "%s: %s", path, dlerror());
    note(search, "in the process already", path, true, "taken: two copies must not meet");
    snprintf(search->path, sizeof search->path, "%.*s", MPAD_LIBRARY_PATH - 1, path);
    return MPAD_OK;
}

static bool try_candidate(const mpad_library_candidate *candidate, mpad_library_search *search,
                          void **library)
{
    *library = dlopen(candidate->path, RTLD_NOW | RTLD_LOCAL);
    if (!*library)
        return note(search, candidate->origin, candidate->path, false, dlerror());
    struct link_map *map;
    bool have_path = dlinfo(*library, RTLD_DI_LINKMAP, &map) == 0 && map->l_name[0];
    snprintf(search->path, sizeof search->path, "%s", have_path ? map->l_name : candidate->path);
    return note(search, candidate->origin, search->path, true, "taken");
}

static mpad_code fail_search(const char *base, const mpad_library_search *search,
                             mpad_status *status)
{
    char list[TEXT_BYTES] = "";
    for (int i = 0; i < search->n_tried; i++) {
        size_t n = strlen(list);
        snprintf(list + n, sizeof list - n, "%s%s", i ? ", " : "", search->tried[i].path);
    }
    return mpad_fail(status, MPAD_DEVICE,
                     "%s: not found; looked for %s; python -m moepad env says why each was refused",
                     base, list);
}

mpad_code mpad_library_open(const char *base, const mpad_library_candidate *candidates, int n,
                            mpad_library_search *search, void **library, mpad_status *status)
{
    const char *override = n > 0 && candidates[0].is_override ? candidates[0].path : NULL;
    mapped found = {.base = base};
    search->n_tried = 0;
    search->path[0] = 0;
    dl_iterate_phdr(add_mapped, &found);
    if (found.n > 0)
        return take_mapped(&found, override, search, library, status);
    for (int i = 0; i < n; i++) {
        if (try_candidate(&candidates[i], search, library))
            return MPAD_OK;
        if (candidates[i].is_override)
            break;
    }
    return fail_search(base, search, status);
}
