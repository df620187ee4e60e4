/* Level 2: finds and opens a runtime library: one named by the user, one that the process has
 * already, else the first of a list that opens. Two copies of a GPU's runtime in one process do not
 * know each other's streams and memory, so a second one is never opened. */
#ifndef MPAD_LIBRARY_H
#define MPAD_LIBRARY_H

#include "status.h"

#include <stdbool.h>

enum { MPAD_LIBRARY_PATH = 512, MPAD_LIBRARY_MAX_TRIED = 24 };

/* Where a library may be. `origin` says for a person who named it. */
typedef struct mpad_library_candidate {
    const char *origin, *path;
    bool is_override; /* the user's: no other is tried */
} mpad_library_candidate;

/* What was looked at, in order, and what came of it. */
typedef struct mpad_library_search {
    int n_tried;
    struct {
        char origin[64], path[MPAD_LIBRARY_PATH], verdict[256];
        bool is_taken;
    } tried[MPAD_LIBRARY_MAX_TRIED];
    char path[MPAD_LIBRARY_PATH]; /* of the library that was opened */
} mpad_library_search;

/* `base`: how the file names of a mapped copy begin, "libamdhip64.so". The handle stays open. */
mpad_code mpad_library_open(const char *base, const mpad_library_candidate *candidates, int n,
                            mpad_library_search *search, void **library, mpad_status *status);

#endif
