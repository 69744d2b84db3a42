// The interface between one instruction set's kernels and the rest: plain data and function pointers.
//
// kernels.cpp is compiled once for each instruction set and each Real and exports one `Kernels` table;
// dispatch.cpp chooses a table, an executor and the memory. Nothing else crosses this line.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/call/tasks.h"

namespace pymeta {

enum class ExecutorKind { rows, lanes };

// Runs body(context, index, worker) for index in [0, count) on up to `threads` workers.
struct Team {
  int threads;
  void (*run)(int threads, std::int64_t count,
              void (*body)(void* context, std::int64_t index, int worker), void* context);
};

// What a call needs, in bytes; every part is a multiple of a cache line.
struct Needs {
  std::size_t start;   // the start, packed
  std::size_t shared;  // that, and what else all threads share
  std::size_t sums;    // gradient sums of one chunk
  std::size_t chunks;
  std::size_t workspace;  // of one thread
  double cost;            // estimated cycles of the whole call on one thread
  bool factored;          // the first layer is never materialised

  std::size_t bytes(int threads) const { return shared + sums * chunks + workspace * threads; }
};

template <class Real>
struct Kernels {
  const char* isa;
  Needs (*needs)(const Call<Real>&, Job, ExecutorKind);
  void (*run)(const Call<Real>&, Job, ExecutorKind, const Needs&, const Team&, char* memory);
  // Writes Needs::start bytes: the start for Call::packed_start of calls that differ in their rows only.
  void (*pack)(const Call<Real>&, Job, ExecutorKind, Real* start);
  double (*fma_rate)(
      std::int64_t rounds);  // executes a known number of FMAs from registers; returns their FLOPs
};

}  // namespace pymeta
