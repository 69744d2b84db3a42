// The machine of the block executor: a `Vec` is one number, and the threads of a block share an operation's numbers.
//
// Compiled three times: by nvcc for the GPU, by nvcc for the host (layouts and plans alone), and by the C++ compiler
// with PYMETA_EMULATE, where a block's threads are threads of the host and its barrier is a real one. Contraction is off
// here as on the CPU: a product is fused with a sum exactly where fma() is written.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define PYMETA_MACHINE  // core/ is compiled for it from here on
#include "../core/kernel_namespace.h"
#include "../core/call/network.h"
#include "limits.h"
#ifdef PYMETA_EMULATE
#include "emulated.h"
#include "counted.h"
#endif

PYMETA_KERNEL_BEGIN

using Real = PYMETA_REAL;
constexpr bool kDouble = sizeof(Real) == 8;
constexpr int kWidth = 1;
using Vec = Real;

// For core/call/workspace.h: shared memory is the near one, the caller's workspace the far one.
using Place = std::uint32_t;
constexpr bool kTwoMemories = true;
constexpr int kMostLayers = block_layers::PYMETA_FAMILY;
// Is it compiled for a single call (special.h)?
#ifdef PYMETA_SPECIAL
constexpr bool kSpecial = true;
#else
constexpr bool kSpecial = false;
#endif

// What a comparison gives, with the operators of a vector's mask.
struct IntVec {
  bool on = false;

  PYMETA_FN IntVec() {}
  PYMETA_FN IntVec(bool b) : on(b) {}
  PYMETA_FN friend IntVec operator&(IntVec a, IntVec b) { return a.on && b.on; }
  PYMETA_FN friend IntVec operator|(IntVec a, IntVec b) { return a.on || b.on; }
  PYMETA_FN friend IntVec operator~(IntVec a) { return !a.on; }
};

PYMETA_FN inline void note_access([[maybe_unused]] const Real* p, [[maybe_unused]] int count) {
#ifdef PYMETA_EMULATE
  emulation::note_access(p, count * sizeof(Real));
#endif
}
#ifdef PYMETA_EMULATE
using emulation::InProduct;
using emulation::note_tile;
#else
struct InProduct {
  PYMETA_FN InProduct() {}
};
PYMETA_FN inline void note_tile(long) {}
#endif
PYMETA_FN inline Vec load(const Real* p) {
  note_access(p, 1);
  return *p;
}
PYMETA_FN inline void store(Real* p, Vec v) {
  note_access(p, 1);
  *p = v;
}
PYMETA_FN inline Vec broadcast(Real s) { return s; }
PYMETA_FN inline Vec zero() { return 0; }
PYMETA_FN inline Vec select(IntVec mask, Vec yes, Vec no) { return mask.on ? yes : no; }
PYMETA_FN inline bool any_lane(IntVec mask) { return mask.on; }
PYMETA_FN inline bool all_lanes(IntVec mask) { return mask.on; }
PYMETA_FN inline Vec where_kept(Vec v, const Real* keep) { return *keep != 0 ? v : Real(0); }

PYMETA_FN inline Vec fma(Vec a, Vec b, Vec c) {
  if constexpr (kDouble)
    return ::fma(a, b, c);
  else
    return ::fmaf(a, b, c);
}
PYMETA_FN inline Vec square_root(Vec v) {
  if constexpr (kDouble)
    return ::sqrt(v);
  else
    return ::sqrtf(v);
}
PYMETA_FN inline Vec at_least(Vec v, Vec floor) { return floor > v ? floor : v; }  // keeps a NaN
PYMETA_FN inline Vec minimum(Vec a, Vec b) { return b < a ? b : a; }
PYMETA_FN inline Vec absolute(Vec v) {
  if constexpr (kDouble)
    return ::fabs(v);
  else
    return ::fabsf(static_cast<float>(v));
}
PYMETA_FN inline Vec with_sign_of(Vec magnitude, Vec sign) {
  if constexpr (kDouble)
    return ::copysign(magnitude, sign);
  else
    return ::copysignf(magnitude, sign);
}
PYMETA_FN inline Vec exp(Vec v) {
  if constexpr (kDouble)
    return ::exp(v);
  else
    return ::expf(v);
}
PYMETA_FN inline Vec expm1(Vec v) {
  if constexpr (kDouble)
    return ::expm1(v);
  else
    return ::expm1f(v);
}
PYMETA_FN inline Vec log(Vec v) {
  if constexpr (kDouble)
    return ::log(v);
  else
    return ::logf(v);
}
PYMETA_FN inline Vec log1p(Vec v) {
  if constexpr (kDouble)
    return ::log1p(v);
  else
    return ::log1pf(v);
}
PYMETA_FN inline Vec tanh(Vec v) {
  if constexpr (kDouble)
    return ::tanh(v);
  else
    return ::tanhf(v);
}
PYMETA_FN inline Vec sigmoid(Vec v) { return Real(1) / (exp(-v) + Real(1)); }
// erfc keeps the small values of the lower tail.
PYMETA_FN inline Vec normal_cdf(Vec v) {
  constexpr Real root_half = Real(0.70710678118654752440);
  if constexpr (kDouble)
    return Real(0.5) * ::erfc(-v * root_half);
  else
    return Real(0.5) * ::erfcf(-v * root_half);
}

// ---- the threads of a block ------------------------------------------------------------------------------------

#if defined(__CUDA_ARCH__)
PYMETA_FN inline int thread_index() { return static_cast<int>(threadIdx.x); }
PYMETA_FN inline int block_index() { return static_cast<int>(blockIdx.x); }
PYMETA_FN inline int block_count() { return static_cast<int>(gridDim.x); }
PYMETA_FN inline void sync() { __syncthreads(); }
// The block's shared memory, from its beginning.
PYMETA_FN inline char* shared_memory() {
  extern __shared__ __align__(16) char pymeta_shared_memory[];
  return pymeta_shared_memory;
}
// Shared and global memory.
PYMETA_FN inline bool lies_near(const Real* p) { return __isShared(p); }
PYMETA_FN inline bool lies_far(const Real* p) { return __isGlobal(p); }
PYMETA_FN inline void assume_near(const Real* p) { __builtin_assume(__isShared(p)); }
PYMETA_FN inline void assume_far(const Real* p) { __builtin_assume(__isGlobal(p)); }
#elif defined(PYMETA_EMULATE)
inline int thread_index() { return emulation::self.thread; }
inline int block_index() { return emulation::self.block->index; }
inline int block_count() { return emulation::self.block->count; }
inline void sync() {
  const emulation::Pause pause;
  emulation::self.block->barrier.wait();
  emulation::note_barrier();
}
inline char* shared_memory() { return emulation::self.block->shared; }
#else  // nvcc's host pass: device code that is never called
PYMETA_FN inline int thread_index() { return 0; }
PYMETA_FN inline int block_index() { return 0; }
PYMETA_FN inline int block_count() { return 1; }
PYMETA_FN inline void sync() {}
PYMETA_FN inline char* shared_memory() { return nullptr; }
#endif
PYMETA_FN inline int thread_count() {
#if defined(PYMETA_SPECIAL)
  return PYMETA_SPECIAL_THREADS;
#elif defined(__CUDA_ARCH__)
  return static_cast<int>(blockDim.x);
#elif defined(PYMETA_EMULATE)
  return emulation::self.block->threads;
#else
  return 1;
#endif
}
#if !defined(__CUDA_ARCH__)
PYMETA_FN inline bool lies_near(const Real*) { return false; }
PYMETA_FN inline bool lies_far(const Real*) { return false; }
PYMETA_FN inline void assume_near(const Real*) {}
PYMETA_FN inline void assume_far(const Real*) {}
#endif

// ---- the lanes of a warp ---------------------------------------------------------------------------------------

// On an emulated device one thread plays all lanes of a warp, one after the other between what they do together, and may so
// have any number of threads beside it: of whole warps the first thread of each plays, else every thread plays one.
#ifdef PYMETA_EMULATE
constexpr int kPlayed = emulation::kLanes;
using emulation::PlayedLane;
inline int threads_of_warp() { return thread_count() % kPlayed == 0 ? kPlayed : 1; }
inline bool plays_warp() { return thread_index() % threads_of_warp() == 0; }
#else
constexpr int kPlayed = 1;
struct PlayedLane {
  PYMETA_FN explicit PlayedLane(int) {}
  PYMETA_FN operator int() const { return thread_index() % 32; }
};
PYMETA_FN inline int threads_of_warp() { return 32; }
PYMETA_FN inline bool plays_warp() { return true; }
#endif
PYMETA_FN inline int warp_index() { return thread_index() / threads_of_warp(); }
PYMETA_FN inline int warp_count() { return thread_count() / threads_of_warp(); }

PYMETA_FN inline std::uint32_t bits_of(float v) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(v);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
#endif
}
PYMETA_FN inline float float_of(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
#endif
}

// sum += A B for 16 x 8 outputs and a depth of 8, whose factors are read as TF32: of a number the upper 19 bits. Which of them a
// lane holds PTX says (mma.m16n8k8 of .tf32): with g = lane / 4 and t = lane % 4
//   a[i]  A[g + 8 (i % 2)][t + 4 (i / 2)]      b[i]  B[t + 4 i][g]      sum[i]  [g + 8 (i / 2)][2 t + i % 2]
// All lanes of a warp call it together.
PYMETA_FN inline void warp_multiply_add([[maybe_unused]] float (&sum)[kPlayed][4],
                                        [[maybe_unused]] const float (&a)[kPlayed][4],
                                        [[maybe_unused]] const float (&b)[kPlayed][2]) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3])
      : "r"(bits_of(a[0][0])), "r"(bits_of(a[0][1])), "r"(bits_of(a[0][2])), "r"(bits_of(a[0][3])),
        "r"(bits_of(b[0][0])), "r"(bits_of(b[0][1])));
#elif defined(PYMETA_EMULATE)
  emulation::multiply_add(sum, a, b);
#endif
}

PYMETA_KERNEL_END
