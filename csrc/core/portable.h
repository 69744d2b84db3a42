// What a function of core/ is marked with, so that it can run on a GPU too.
#pragma once

#ifdef __CUDACC__
#define PYMETA_FN __host__ __device__
#define PYMETA_NOINLINE __noinline__  // one copy of what many places call
#else
#define PYMETA_FN
#define PYMETA_NOINLINE
#endif

// A function of what all instruction sets share (network.h, tasks.h, registries): inlined always, since a copy compiled for one of them
// could be linked into another's code.
#define PYMETA_MEMBER PYMETA_FN __attribute__((always_inline))
