// One call as plain data: pointers to the rows of all tasks, the recipe of the inner loop, and where results go.
//
// A `RowSet` (all support rows, or all query rows) serves equal tasks ([T, rows, ...]), padded ones (with
// `sizes`) and ragged ones packed one after the other (with `starts` and `sizes`).
#pragma once

#include <cstdint>

#include "network.h"

namespace pymeta {

template <class Real>
struct RowSet {
  const Real* x = nullptr;  // [total rows, in]
  const void* y =
      nullptr;  // [total rows, out] Real, or [total rows] int64 labels for cross-entropy
  const Real* weights = nullptr;  // [total rows], or null: every row weighs 1
  std::int64_t rows = 0;          // rows from one task to the next (and in each, without `sizes`)
  const std::int64_t* starts = nullptr;  // [T] first row of each task, or null: task * rows
  const std::int64_t* sizes = nullptr;   // [T] rows of each task, or null: rows

  std::int64_t start(std::int64_t task) const { return starts ? starts[task] : task * rows; }
  int size(std::int64_t task) const { return static_cast<int>(sizes ? sizes[task] : rows); }
};

// The inner learning rate: `rows` x `columns` values; step k uses row min(k, rows - 1).
template <class Real>
struct LearningRate {
  const Real* values = nullptr;  // [rows, columns]
  int rows = 1;
  int columns = 1;
  bool per_element =
      false;  // columns = all elements of the adapted tensors; otherwise one column per group
  const int* groups = nullptr;  // [tensors] column of each tensor, when not per_element
};

template <class Real>
struct Call {
  const Network* network = nullptr;
  const Loss* loss = nullptr;
  const bool* adapted = nullptr;            // [tensors] does the inner loop change this tensor?
  const Real* const* parameters = nullptr;  // [tensors] the start, in torch's layout
  const bool* parameter_per_task =
      nullptr;  // [tensors] stacked [T, ...] instead of shared; null: all shared
  LearningRate<Real> lr;
  int steps = 0;
  bool first_order = false;
  std::int64_t tasks = 0;
  RowSet<Real> support;
  RowSet<Real> query;

  // Results; null where not wanted.
  Real* losses = nullptr;       // [T] mean query loss of each task
  Real* mean_loss = nullptr;    // [1] their mean
  Real* predictions = nullptr;  // [total query rows, out]
  Real* const* gradients =
      nullptr;  // [tensors] of the mean over tasks, torch's layout; entries may be null
  Real* lr_gradient = nullptr;                // [lr.rows, lr.columns]
  Real* xs_gradient = nullptr;                // [total support rows, in]
  Real* xq_gradient = nullptr;                // [total query rows, in]
  Real* const* adapted_parameters = nullptr;  // [tensors] each [T, ...]

  // Filled in by prepare() in cpu/dispatch.cpp.
  int max_support = 0;  // largest task
  int max_query = 0;
  const std::int64_t* order = nullptr;  // [T] tasks sorted by size, or null: as they come

  bool wants_gradient() const { return gradients || lr_gradient || xs_gradient || xq_gradient; }
  bool second_order() const { return wants_gradient() && !first_order && steps > 0; }
};

}  // namespace pymeta
