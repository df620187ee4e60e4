/* Level 2: see pool.h. Threads that wait spin for a few microseconds, since calls follow each other
 * closely, and then sleep on a condition variable, since they may not.
 *
 * One run at a time has the workers: whoever sets `is_busy` owns every plain field of `pool` until
 * it clears it. Workers read body and context after they have seen the run's ticket. */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { SPIN_NS = 40000, PAUSES_PER_LOOK = 64, STACK_BYTES = 1 << 20 };

/* A word that threads wait on. Only its owner changes it; the sequentially consistent pair (word,
 * n_asleep) makes sure that a change is seen or the sleeper is woken. */
typedef struct gate {
    _Atomic uint64_t word;
    atomic_int n_asleep;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
} gate;

static struct {
    gate ticket; /* number of the run << 16 | its threads */
    gate done;   /* runs whose workers have all finished */
    gate phase;  /* barriers passed */
    atomic_int n_running;
    atomic_int n_arrived;
    atomic_bool is_busy;
    mpad_pool_body body;
    void *context;
    int n_worker;
    int n_cpu;
} pool;

static pthread_once_t pool_once = PTHREAD_ONCE_INIT;
static atomic_int n_default, n_forced;
static _Thread_local int n_inside; /* threads of the run this thread is in */

static void gate_init(gate *g)
{
    atomic_init(&g->word, 0);
    atomic_init(&g->n_asleep, 0);
    pthread_mutex_init(&g->mutex, NULL);
    pthread_cond_init(&g->changed, NULL);
}

/* Also the child's side of fork: no thread but the caller's exists and nothing is in use. */
static void pool_reset(void)
{
    gate_init(&pool.ticket);
    gate_init(&pool.done);
    gate_init(&pool.phase);
    atomic_init(&pool.n_running, 0);
    atomic_init(&pool.n_arrived, 0);
    atomic_init(&pool.is_busy, false);
    pool.n_worker = 0;
    n_inside = 0;
}

static void pool_init(void)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    pool.n_cpu = n < 1 ? 1 : (int)n;
#if defined(__linux__)
    cpu_set_t mask;
    if (sched_getaffinity(0, sizeof mask, &mask) == 0)
        pool.n_cpu = CPU_COUNT(&mask);
#endif
    pool_reset();
    pthread_atfork(NULL, NULL, pool_reset);
}

static void gate_set(gate *g, uint64_t word)
{
    atomic_store(&g->word, word);
    if (atomic_load(&g->n_asleep) > 0) {
        pthread_mutex_lock(&g->mutex);
        pthread_cond_broadcast(&g->changed);
        pthread_mutex_unlock(&g->mutex);
    }
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __asm__ volatile("pause");
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Returns the gate's word once it is not `old`. */
static uint64_t gate_wait(gate *g, uint64_t old, bool may_spin)
{
    uint64_t word = atomic_load_explicit(&g->word, memory_order_acquire);
    if (may_spin && word == old) {
        int64_t deadline = now_ns() + SPIN_NS;
        do {
            for (int i = 0; i < PAUSES_PER_LOOK && word == old; i++) {
                relax();
                word = atomic_load_explicit(&g->word, memory_order_acquire);
            }
        } while (word == old && now_ns() < deadline);
    }
    if (word != old)
        return word;
    pthread_mutex_lock(&g->mutex);
    atomic_fetch_add(&g->n_asleep, 1);
    while ((word = atomic_load(&g->word)) == old)
        pthread_cond_wait(&g->changed, &g->mutex);
    atomic_fetch_sub(&g->n_asleep, 1);
    pthread_mutex_unlock(&g->mutex);
    return word;
}

static void *worker(void *argument)
{
    int index = (int)(intptr_t)argument;
    uint64_t ticket = 0; /* a new worker may find the ticket of the run that made it already set */
    for (int n = 2;;) {
        ticket = gate_wait(&pool.ticket, ticket, n <= pool.n_cpu);
        n = (int)(ticket & 0xFFFF);
        if (index >= n)
            continue;
        n_inside = n;
        pool.body(pool.context, index, n);
        if (atomic_fetch_sub(&pool.n_running, 1) == 1)
            gate_set(&pool.done, atomic_load(&pool.done.word) + 1);
    }
    return NULL;
}

/* Signals stay with the threads the program made. */
static void make_workers(int n)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; pool.n_worker < n; pool.n_worker++) {
        pthread_t thread;
        void *index = (void *)(intptr_t)(pool.n_worker + 1);
        if (pthread_create(&thread, &attributes, worker, index))
            break;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

static void run_alone(mpad_pool_body body, void *context)
{
    int outer = n_inside;
    n_inside = 1;
    body(context, 0, 1);
    n_inside = outer;
}

void mpad_pool_run(int n_thread, mpad_pool_body body, void *context)
{
    if (n_thread <= 1) {
        run_alone(body, context);
        return;
    }
    pthread_once(&pool_once, pool_init);
    if (atomic_exchange(&pool.is_busy, true)) {
        run_alone(body, context);
        return;
    }
    int n = n_thread < MPAD_POOL_MAX_THREADS ? n_thread : MPAD_POOL_MAX_THREADS;
    uint64_t number = (atomic_load(&pool.ticket.word) >> 16) + 1;
    if (pool.n_worker < n - 1)
        make_workers(n - 1);
    if (n > pool.n_worker + 1)
        n = pool.n_worker + 1;
    if (n > 1) {
        pool.body = body;
        pool.context = context;
        atomic_store(&pool.n_running, n - 1);
        uint64_t done = atomic_load(&pool.done.word);
        gate_set(&pool.ticket, number << 16 | (uint64_t)n);
        n_inside = n;
        body(context, 0, n);
        n_inside = 0;
        gate_wait(&pool.done, done, n <= pool.n_cpu);
    } else {
        run_alone(body, context);
    }
    atomic_store(&pool.is_busy, false);
}

void mpad_pool_barrier(void *context, int thread)
{
    (void)context;
    (void)thread;
    if (n_inside <= 1)
        return;
    uint64_t phase = atomic_load(&pool.phase.word);
    if (atomic_fetch_add(&pool.n_arrived, 1) + 1 == n_inside) {
        atomic_store(&pool.n_arrived, 0);
        gate_set(&pool.phase, phase + 1);
    } else {
        gate_wait(&pool.phase, phase, n_inside <= pool.n_cpu);
    }
}

/* The first number of an environment variable, 0 where there is none. */
static int read_count(const char *name)
{
    const char *text = getenv(name);
    long n = text ? strtol(text, NULL, 10) : 0;
    return n < 1 ? 0 : n > MPAD_POOL_MAX_THREADS ? MPAD_POOL_MAX_THREADS : (int)n;
}

#if defined(__linux__)
/* Whether a processor of the mask with a lower number shares the core of `cpu`. */
static bool has_lower_sibling(int cpu, const cpu_set_t *mask)
{
    char path[96];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE *file = fopen(path, "r");
    bool has = false;
    int first, last;
    while (file && !has && fscanf(file, "%d", &first) == 1) {
        last = first;
        int separator = fgetc(file);
        if (separator == '-' && fscanf(file, "%d", &last) == 1)
            separator = fgetc(file);
        for (int i = first; i <= last && i < cpu; i++)
            has = has || CPU_ISSET(i, mask);
        if (separator != ',')
            break;
    }
    if (file)
        fclose(file);
    return has;
}
#endif

static int count_cores(void)
{
    int n = 0;
#if defined(__linux__)
    cpu_set_t mask;
    if (sched_getaffinity(0, sizeof mask, &mask) == 0)
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
            n += CPU_ISSET(cpu, &mask) && !has_lower_sibling(cpu, &mask);
#endif
    if (n == 0)
        n = (int)sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > MPAD_POOL_MAX_THREADS ? MPAD_POOL_MAX_THREADS : n;
}

int mpad_pool_default_threads(void)
{
    int n = atomic_load_explicit(&n_default, memory_order_relaxed);
    if (n == 0) {
        n = read_count("MOEPAD_NUM_THREADS");
        if (n == 0)
            n = read_count("OMP_NUM_THREADS");
        if (n == 0)
            n = count_cores();
        atomic_store_explicit(&n_default, n, memory_order_relaxed);
    }
    return n;
}

void mpad_pool_set_threads(int n_thread)
{
    int n = n_thread < 0 ? 0 : n_thread;
    atomic_store(&n_forced, n < MPAD_POOL_MAX_THREADS ? n : MPAD_POOL_MAX_THREADS);
}

int mpad_pool_threads(void)
{
    int n = atomic_load_explicit(&n_forced, memory_order_relaxed);
    return n ? n : mpad_pool_default_threads();
}
