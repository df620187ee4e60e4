/* Level 1: how a fault travels. Every fallible function returns an mpad_code and writes its message
 * where the fault is found; only module.c turns it into a Python exception. */
#ifndef MPAD_STATUS_H
#define MPAD_STATUS_H

/* X(NAME, the Python exception it becomes) */
#define MPAD_CODE_LIST(X)                                                                          \
    X(OK, "")                                                                                      \
    X(TYPE, "TypeError")                                                                           \
    X(VALUE, "ValueError")                                                                         \
    X(UNSUPPORTED, "UnsupportedError")                                                             \
    X(DEVICE, "DeviceError")                                                                       \
    X(MEMORY, "MemoryError")

typedef enum mpad_code {
#define X(NAME, exception) MPAD_##NAME,
    MPAD_CODE_LIST(X)
#undef X
} mpad_code;

typedef struct mpad_status {
    mpad_code code;
    char message[1024]; /* argument, what it got, what is accepted, the way out */
} mpad_status;

/* Writes code and message (printf style, cut to fit) and returns code. */
mpad_code mpad_fail(mpad_status *status, mpad_code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Returns from the enclosing function with the given fault unless the condition holds. */
#define MPAD_REQUIRE(condition, status, code, ...)                                                 \
    do {                                                                                           \
        if (!(condition))                                                                          \
            return mpad_fail((status), (code), __VA_ARGS__);                                       \
    } while (0)

/* Returns a fault of the called function to the caller's caller. */
#define MPAD_TRY(call)                                                                             \
    do {                                                                                           \
        mpad_code code_ = (call);                                                                  \
        if (code_ != MPAD_OK)                                                                      \
            return code_;                                                                          \
    } while (0)

#endif
