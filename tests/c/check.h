/* What the C tests share: a check that counts failures, and random numbers. */
#ifndef MPAD_CHECK_H
#define MPAD_CHECK_H

#include <stdint.h>
#include <stdio.h>

static int n_fail = 0;

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);                                 \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
            __atomic_fetch_add(&n_fail, 1, __ATOMIC_RELAXED);                                      \
        }                                                                                          \
    } while (0)

/* xorshift64*, one state per thread that draws. */
static inline uint64_t draw(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Du;
}

static inline int64_t draw_below(uint64_t *state, int64_t n)
{
    return (int64_t)(draw(state) % (uint64_t)n);
}

#endif
