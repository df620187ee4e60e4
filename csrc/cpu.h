/* Level 4: the fused MoE on host memory. Needs no Python and no GPU. */
#ifndef MPAD_CPU_H
#define MPAD_CPU_H

#include "params.h"
#include "status.h"

/* Names of the instruction sets compiled in and usable on this machine, best first: a
 * NULL-terminated list out of "avx512bf16", "avx512", "avx2", "portable". */
const char *const *mpad_cpu_isa_available(void);
const char *mpad_cpu_isa(void); /* the one in use */

/* Forces one by name; NULL goes back to MOEPAD_CPU_ISA or the best. MPAD_VALUE if not available. */
mpad_code mpad_cpu_set_isa(const char *name, mpad_status *status);

/* Bytes mpad_cpu_run needs as workspace; a function of the sizes and types alone. */
int64_t mpad_cpu_workspace_bytes(const mpad_moe *moe);

/* Carries the call out. `workspace`: 64-byte aligned, or NULL to use the engine's own. Fails,
 * before out is touched, with MPAD_VALUE when an id of topk_ids or expert_map is out of range, or
 * MPAD_MEMORY. The result's bits depend on the arguments and the instruction set only. */
mpad_code mpad_cpu_run(const mpad_moe *moe, void *workspace, mpad_status *status);

/* Measured on the running machine for the floor of a benchmark, with the pool's threads:
 * bytes/s of reading `buffer`, and FLOP/s of the product of the best instruction set here,
 * whichever is in use. */
double mpad_cpu_read_bandwidth(const void *buffer, int64_t n_bytes);
double mpad_cpu_peak_flops(mpad_dtype dtype, double seconds);

#endif
