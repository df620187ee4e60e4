// Kernels with one deliberate mistake each; "ok_" twins are right.
#include "hipmin.h"
#ifndef FIXED
#define FIXED 0
#endif
#ifndef USED
#define USED 1
#endif
KERNEL(256) no_barrier(const u32* x, u32* y) { SHARED u32 s[256]; u32 t = TID; s[t] = x[t];
#if FIXED
  barrier();
#endif
  y[t] = s[255 - t]; }
KERNEL(256) reuse_without_barrier(const u32* x, u32* y) { SHARED u32 s[256]; u32 t = TID; u32 r = 0;
  for (int i = 0; i < 2; i++) { s[t] = x[t] + i; barrier(); r += s[(t + 64) & 255];
#if FIXED
    barrier();
#endif
  } y[t] = r; }
KERNEL(256) read_past_end(const u32* x, u32* y, int n) { int i = TID; if (i < n + !FIXED) y[i < n ? i : 0] = x[i]; }
KERNEL(256) write_past_end(u32* y, int n) { int i = TID; if (i <= n - FIXED) y[i] = i; }
KERNEL(64) write_const(const u32* x) { ((u32*)x)[TID] = 1; }
KERNEL(256) lds_past_end(u32* y, int n) { SHARED u32 s[256]; s[TID + n] = TID; y[TID] = s[TID]; }
#if FIXED
#define WAIT "s_waitcnt vmcnt(0)\n"
#define LWAIT "s_waitcnt lgkmcnt(0)\n"
#else
#define WAIT
#define LWAIT
#endif
KERNEL(64) no_vm_wait(const u32* x, u32* y) { const u32* p = x + TID; u32 r;
  asm volatile("global_load_dword %0, %1, off\n" WAIT "v_add_u32 %0, 1, %0\n s_waitcnt vmcnt(0)" : "=&v"(r) : "v"(p)); y[TID] = r; }
KERNEL(64) no_lds_wait(const u32* x, u32* y) { SHARED u32 s[64]; s[TID] = x[TID]; u32 r, a = TID * 4;
  asm volatile("s_waitcnt lgkmcnt(0)\n ds_read_b32 %0, %1\n" LWAIT "v_add_u32 %0, 1, %0\n s_waitcnt lgkmcnt(0)" : "=&v"(r) : "v"(a), "v"(&s[0])); y[TID] = r; }
KERNEL(64) no_smem_wait(const u32* x, u32* y) { u32 r;
  asm volatile("s_load_dword s20, %1, 0x0\n" LWAIT "v_mov_b32 %0, s20\n s_waitcnt lgkmcnt(0)" : "=v"(r) : "s"(x) : "s20"); y[TID] = r; }
KERNEL(128) no_wait_before_barrier(const u32* x, u32* y) { SHARED u32 s[128]; u32 a = TID * 4, b = (127 - TID) * 4, r, v = x[TID];
  asm volatile("ds_write_b32 %1, %3\n" LWAIT "s_barrier\n ds_read_b32 %0, %2\n s_waitcnt lgkmcnt(0)" : "=&v"(r) : "v"(a), "v"(b), "v"(v), "v"(&s[0]) : "memory"); y[TID] = r; }
KERNEL(64) endless(u32* y) { while (__atomic_load_n(y, __ATOMIC_RELAXED) == 0) {} y[1] = 1; }
KERNEL(64) lds_unwritten(u32* y) { SHARED u32 s[64]; if (TID < 32 + 32 * FIXED) s[TID] = TID; y[TID] = ((volatile u32*)s)[TID]; }
KERNEL(128) read_in_flight_at_barrier(const u32* x, u32* y) { SHARED u32 s[128]; u32 a = TID * 4, b = (127 - TID) * 4, r, v = x[TID]; s[TID] = v; barrier();
  asm volatile("ds_read_b32 %0, %2\n" LWAIT "s_barrier\n ds_write_b32 %1, %3\n s_waitcnt lgkmcnt(0)" : "=&v"(r) : "v"(a), "v"(b), "v"(v), "v"(&s[0]) : "memory"); y[TID] = USED ? r : 0; }
