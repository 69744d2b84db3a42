// The interface between one instruction set's kernels and the rest: plain data and function pointers.
//
// kernels.cpp is compiled once for each instruction set and each Real and exports one `Kernels` table, which lists the
// executors; runtime/ chooses a table, an executor and the memory. Nothing else crosses this line.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/call/tasks.h"

namespace pymeta {

// Runs body(context, index, worker) for index in [0, count) on up to `threads` workers.
struct Team {
  int threads;
  void* owner;  // what `run` knows of the call, or null
  void (*run)(const Team&, std::int64_t count,
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

  // An item is a task, or a vector of tasks; a chunk is a run of items whose gradients are summed in order, and the chunks'
  // sums are added in order. All of it depends on the call alone. An executor of single tasks can keep the order of one
  // of vectors: then a chunk is one lane of such a run, every `interleaved`-th of its tasks, and the sums of as many chunks are
  // first added as lanes are.
  int tasks_in_item;  // side by side; 1 where they are not
  int interleaved;    // 1: chunks are runs of their own
  std::int64_t items_in_chunk;
  std::size_t
      ordered_chunks;  // in whose order sums are added; `chunks` where none is a part of one
  double longest;      // cost of the longest chunk, where they are not alike; else 0

  std::size_t bytes(int threads) const { return shared + sums * chunks + workspace * threads; }
};

// An executor of one instruction set. A plan of a call lies in memory of the caller's, `plan_bytes` of it at a multiple of
// 64, and is used as long as the call is where it was and as large; it needs no destruction.
template <class Real>
struct ExecutorTable {
  const char* name;
  std::size_t plan_bytes;
  bool (*suits)(const Call<Real>&);  // is it worth a plan?
  int made_of;  // so many executors, the first ones, whose plans of the same call `plan` gets
  const Needs* (*plan)(const Call<Real>&, void* plan, void* const* plans);
  // The needs where the order of sums is that of another executor: `like` are that one's. Null where items are vectors.
  const Needs* (*keep_order)(void* plan, const Needs& like);
  void (*run)(void* plan, const Team&, char* memory);
  // Writes Needs::start bytes: the start for Call::packed_start of calls that differ in their rows only.
  void (*pack)(const void* plan, Real* start);
};

template <class Real>
struct Kernels {
  const char* isa;
  const ExecutorTable<Real>* executors;
  int executor_count;
  double (*fma_rate)(
      std::int64_t rounds);  // executes a known number of FMAs from registers; returns their FLOPs
};

}  // namespace pymeta
