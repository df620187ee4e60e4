/* Level 2: worker threads. One process-wide pool, made at first use and remade after fork; it owns
 * the threads and the barrier between them, and knows nothing of what they compute. */
#ifndef MPAD_POOL_H
#define MPAD_POOL_H

enum { MPAD_POOL_MAX_THREADS = 256 };

typedef void (*mpad_pool_body)(void *context, int thread, int n_thread);

/* Threads a call uses by default: MOEPAD_NUM_THREADS, else the first number of OMP_NUM_THREADS,
 * else the physical cores in the process's affinity mask at the first call. */
int mpad_pool_default_threads(void);

/* Overrides that for the process; 0 goes back to the default. */
void mpad_pool_set_threads(int n_thread);
int mpad_pool_threads(void);

/* Runs body(context, t, n) for t in [0, n), n <= n_thread, the caller being thread 0, and returns
 * when all have. n is 1 while another caller has the pool. Safe from any thread, from inside a
 * body, and in a child after fork. */
void mpad_pool_run(int n_thread, mpad_pool_body body, void *context);

/* Inside a body: waits until all n threads of the run have arrived. */
void mpad_pool_barrier(void *context, int thread);

#endif
