// The operands that the algorithm hands to an executor.
#pragma once

PYMETA_KERNEL_BEGIN

struct Matrix {
  const Real* p;
  long row;
};

// The rows of one set of one item.
struct Extent {
  int rows;  // of the longest task in the item
  const Real*
      keep;   // lanes: [rows, kWidth] all-ones where the task has the row; null when all have all
  Vec count;  // rows of each task that count
  // [rows, kWidth] all-ones where the row counts in statistics over rows; null: wherever the task has one
  const Real* counting = nullptr;

  PYMETA_FN Vec masked(Vec v, int row) const {
    return keep ? where_kept(v, keep + row * kWidth) : v;
  }
  PYMETA_FN Vec counted(Vec v, int row) const {
    return counting ? where_kept(v, counting + row * kWidth) : masked(v, row);
  }
};

// Where the rows x features result of a product goes: through a ReLU, through the gate of the ReLU that produced
// the layer's input, or as it is.
struct Destination {
  Real* p;
  bool relu = false;
  const Real* gate = nullptr;
};

// Where a gradient goes (gemm.h: Accumulate). Pointers are to the parameter tensor's array.
struct Sink {
  Real* out = nullptr;
  const Real* base = nullptr;
  const Real* extra = nullptr;
  Real scale = 1;
};

// A layer applied to an operand, or its transpose: one term of a (tangent) product.
struct Term {
  Matrix x{nullptr, 0};
  const Real* w = nullptr;
  const Real* w_transposed = nullptr;  // rows only: [out, stride(in)]
};

// One term of a sum of products of a small coefficient matrix with a matrix of features (layers/factored_linear.h).
struct Mix {
  const Real* coefficients;  // element (row, k) at row * row_stride + k * depth_stride
  long row_stride, depth_stride;
  const Real* x;  // [depth, features]
  int depth;
};

PYMETA_KERNEL_END
