// What a function of core/ is marked with, so that it can run on a GPU too.
#pragma once

#ifdef __CUDACC__
#define PYMETA_FN __host__ __device__
#define PYMETA_ONE_COPY __noinline__  // of what many places call
#else
#define PYMETA_FN
#define PYMETA_ONE_COPY
#endif
// The same, but where a kernel is compiled for a single call (cuda/special.h): each place has constants of its own there.
#ifdef PYMETA_SPECIAL
#define PYMETA_NOINLINE __attribute__((always_inline))
#define PYMETA_ROLLED _Pragma("unroll 1")  // what has few turns, and would be unrolled whole
#else
#define PYMETA_NOINLINE PYMETA_ONE_COPY
#define PYMETA_ROLLED
#endif

// A function of what all instruction sets share (network.h, tasks.h, registries): inlined always, since a copy compiled for one of them
// could be linked into another's code.
#define PYMETA_MEMBER PYMETA_FN __attribute__((always_inline))
