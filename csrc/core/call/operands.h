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
  int period = 0;  // of images: `rows` are positions times this many, and so is `count` (over())

  // Which of the set's own rows a row is a position of.
  PYMETA_FN int own(int row) const { return period ? row % period : row; }
  PYMETA_FN Vec masked(Vec v, int row) const {
    return keep ? where_kept(v, keep + own(row) * kWidth) : v;
  }
  PYMETA_FN Vec counted(Vec v, int row) const {
    return counting ? where_kept(v, counting + own(row) * kWidth) : masked(v, row);
  }
};

// The positions of a set's rows, as rows.
PYMETA_FN inline Extent over(const Extent& set, const Shape& shape) {
  const int positions = shape.positions();
  if (positions == 1) return set;
  return {set.rows * positions, set.keep, set.count * Real(positions), set.counting, set.rows};
}

// The sum of body(row), each row in its turn; of positions, which may be many, in four interleaved sums. Rows that a task
// lacks add zeros and change nothing, wherever they lie.
template <class Body>
PYMETA_FN auto sum_over(const Extent& extent, Body body) {
  using Sum = decltype(body(0));
  Sum sum{};
  if (extent.period == 0) {
    for (int r = 0; r < extent.rows; ++r) sum = sum + body(r);
    return sum;
  }
  Sum second{}, third{}, fourth{};
  const int images = extent.period;
  int r = 0;
  for (; r + 4 * images <= extent.rows; r += 4 * images)
    for (int i = r; i < r + images; ++i) {
      sum = sum + body(i);
      second = second + body(i + images);
      third = third + body(i + 2 * images);
      fourth = fourth + body(i + 3 * images);
    }
  for (; r < extent.rows; ++r) sum = sum + body(r);
  return (sum + second) + (third + fourth);
}

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

  // The same from a place in the tensor on.
  PYMETA_FN Sink from(long place) const {
    return {out ? out + place : nullptr, base ? base + place : nullptr,
            extra ? extra + place : nullptr, scale};
  }
};

// A layer applied to an operand, or its transpose: one term of a (tangent) product.
struct Term {
  Matrix x{nullptr, 0};
  const Real* w = nullptr;
  const Real* w_transposed = nullptr;  // rows only: [out, stride(in)]
};

// The sets of an item that is several tasks of equal size, whose rows lie one below the other (algorithms/stacked.h).
struct Stack {
  int groups;                    // of tasks, or tasks
  int support_rows, query_rows;  // of each
  Matrix support_x, query_x;     // of all
};

// Has X such items?
template <class X, class = void>
constexpr bool kStacks = false;
template <class X>
constexpr bool kStacks<X, decltype(void(X::kMostStacked))> = true;

// One term of a sum of products of a small coefficient matrix with a matrix of features (layers/factored_linear.h).
struct Mix {
  const Real* coefficients;  // element (row, k) at row * row_stride + k * depth_stride
  long row_stride, depth_stride;
  const Real* x;  // [depth, features]
  int depth;
};

PYMETA_KERNEL_END
