// The `stacked` executor: groups of tasks of equal size, one below the other, in their one inner step from the shared start.
//
// An item is a matrix with the rows of kMostStacked groups (grouped.h), and what is done once for each operation is done once for
// all of them. What differs in the passes is core/algorithms/stacked.h. A task's losses and predictions have the bits of `rows`
// and `lanes`; gradients are sums over the rows of many tasks, in an order of its own.
//
// The caller may say what flows into the losses and predictions. Other calls that are not plain ones of linear layers are left to `rows`.
#pragma once

#include <new>

#include "grouped.h"
#include "mixed.h"

PYMETA_KERNEL_BEGIN

struct StackedExecutor : Executor<Grouped> {
  // Linear layers and activations, and no extras but seeds.
  struct Family : AllCalls {
    static constexpr bool kLeavesOut = false;
    template <LayerKind kind>
    static constexpr bool kLayer = kind == LayerKind::linear || kind == LayerKind::lone_activation;
    static constexpr bool kExtras = false;
  };
  static constexpr int kMostStacked = kWidth / kGroup;  // a task is a lane of a vector of losses
  static constexpr int kTasks = kMostStacked * kGroup;
  static constexpr bool kTransposes = true;
  static constexpr bool kReadsInputInPlace = false;
  static constexpr bool kSharesPlaces = false;
  static constexpr bool kFactors = false;
  // As in rows.h, which gains more from vectors of few numbers: sums over features stay as they are.
  static constexpr double kRate = Grouped::kFeatures > 2 ? 1.5 : 1.35;
  static constexpr double kCrowdedRate = 1.2, kRowOverhead = 6;
  static constexpr double kItemOverhead = 3000;  // of a group

  // W [in, stride(out)] to W^T [out, stride(in)]; the rows that W does not have are zero.
  static void transpose(int in, int out, const Real* w, Real* w_transposed) {
    constexpr int features = Grouped::kFeatures;
    const long from_row = stride(out), to_row = stride(in);
    for (int i = 0; i < in; i += features)
      for (int j = 0; j < out; j += features) {
        const Real* from = w + i * from_row + static_cast<long>(j) * kElement;
        Real* to = w_transposed + j * to_row + static_cast<long>(i) * kElement;
        Vec block[features];
#pragma GCC unroll 8
        for (int k = 0; k < features; ++k)
          block[k] = i + k < in ? load(from + k * from_row) : zero();
        Grouped::transpose_features(block);
#pragma GCC unroll 8
        for (int k = 0; k < features; ++k)
          if (j + k < out) store(to + k * to_row, block[k]);
      }
  }

  // A tensor in torch's layout, for all tasks.
  static void pack(const PackedTensor& tensor, const Real* from, Real* to) {
    for (int q = 0; q < tensor.inner; q += kWidth) {
      const int columns = tensor.inner - q < kWidth ? tensor.inner - q : kWidth;
      Real* const first = to + static_cast<long>(q) * kElement;
      if (!tensor.transposed) {
        for (int p = 0; p < tensor.outer; ++p)
          Grouped::spread(load_first(from + static_cast<long>(p) * tensor.inner + q, columns),
                          columns, first + static_cast<long>(p) * tensor.row);
        continue;
      }
      for (int p = 0; p < tensor.outer; p += kWidth) {
        const int rows = tensor.outer - p < kWidth ? tensor.outer - p : kWidth;
        Vec block[kWidth];
        for (int k = 0; k < kWidth; ++k)
          block[k] = k < columns
                         ? load_first(from + static_cast<long>(q + k) * tensor.outer + p, rows)
                         : zero();
        transpose_block(block);
        for (int k = 0; k < rows; ++k)
          Grouped::spread(block[k], columns, first + static_cast<long>(p + k) * tensor.row);
      }
    }
  }
  // The sum over a group's tasks of each of `count` elements.
  static void sum_tasks(const Real* from, std::size_t count, Real* to) {
    std::size_t i = 0;
    for (; i + kWidth <= count; i += kWidth)
      store(to + i, Grouped::sums_over_tasks(from + i * kElement));
    for (; i < count; ++i) to[i] = Grouped::sum_of_tasks(from + i * kElement);
  }

  // Each task's sum, in its lane: group after group.
  static Vec sum_rows_in_order(const Extent& extent, const Real* values) {
    const int each = static_cast<int>(extent.count[0]);
    Vec sums = zero();
    for (int lane = 0; lane < kTasks && extent.count[lane] > 0; lane += kGroup) {
      const Vec of_group = sum_in_order(each, values);
      for (int t = 0; t < kGroup; ++t) sums[lane + t] = of_group[t];
      values += static_cast<long>(each) * kElement;
    }
    return sums;
  }
  // Each task's number, in the lanes of a block of a class-major array.
  static Vec in_block(Vec numbers, const Extent& extent, int block) {
    const int each = static_cast<int>(extent.count[0]);
    Real own[kWidth] = {}, of_tasks[kWidth];
    store(of_tasks, numbers);
    for (int f = 0; f < Grouped::kFeatures; ++f) {
      const int row = block * Grouped::kFeatures + f;
      if (row < extent.rows)
        Grouped::copy_element(own + f * kGroup, of_tasks + row / each * kGroup);
    }
    return load(own);
  }
  static Vec sum_in_order(int count, const Real* values) {
    Vec sum = zero();
    for (int r = 0; r < count; ++r) sum = sum + element(values + static_cast<long>(r) * kElement);
    return sum;
  }

  // The sum of terms, and bias.
  static void combine(const Extent& extent, int features, const Mix* terms, int count,
                      const Real* bias, const Destination& to) {
    Segment segments[2];
    for (int i = 0; i < count; ++i)
      segments[i] = {terms[i].coefficients, terms[i].row_stride,
                     terms[i].depth_stride, terms[i].x,
                     stride(features),      kWidth,
                     terms[i].depth};
    const Product product{extent.rows, vectors(features), segments, count, bias, 0};
    multiply<Grouped>(product, destined(to, stride(features), extent));
  }

  // to [a_rows, stride(b_rows)] = scale a b^T over n features.
  static void gram(const Matrix& a, int a_rows, const Matrix& b, int b_rows, int n, Real scale,
                   Real* to) {
    constexpr int columns = Grouped::kFeatures;
    const long row = stride(b_rows);
    for (int j = 0; j < b_rows; j += columns) {
      const Matrix right{b.p + j * b.row, b.row};
      Real* into = to + static_cast<long>(j) * kElement;
      const int left_over = b_rows - j;
      if (columns > 2 && left_over <= columns / 2)
        gram_panel<(columns + 1) / 2>(a, a_rows, right, left_over, n, scale, into, row);
      else
        gram_panel<columns>(a, a_rows, right, left_over, n, scale, into, row);
    }
  }

 private:
  static constexpr int kGramRows = kRegisters >= 32 ? 5 : 4;  // of a block

  // Against at most `columns` rows of b, `valid` of which there are: all rows of a, in blocks of nearly equal height.
  template <int columns>
  static void gram_panel(const Matrix& a, int a_rows, const Matrix& b, int valid, int n, Real scale,
                         Real* to, long row) {
    const Real* right[columns];
    for (int f = 0; f < columns; ++f) right[f] = b.p + (f < valid ? f : 0) * b.row;
    const int blocks = (a_rows + kGramRows - 1) / kGramRows;
    for (int block = 0, i = 0; block < blocks; ++block) {
      const int height = a_rows / blocks + (block < a_rows % blocks);
      gram_rows<kGramRows, columns>({a.p + i * a.row, a.row}, height, right, n, scale, to + i * row,
                                    row);
      i += height;
    }
  }
  template <int kRows, int columns>
  static void gram_rows(const Matrix& a, int height, const Real* const* right, int n, Real scale,
                        Real* to, long row) {
    if (height == kRows) return gram_block<kRows, columns>(a, right, n, scale, to, row);
    if constexpr (kRows > 1) gram_rows<kRows - 1, columns>(a, height, right, n, scale, to, row);
  }
  // The sums of what is not there are 0.
  template <int kRows, int kColumns>
  static void gram_block(const Matrix& a, const Real* const* right, int n, Real scale, Real* to,
                         long row) {
    constexpr int columns = Grouped::kFeatures;
    Vec sums[kRows][columns];
    for_tile<kRows, columns>([&](int i, int j) { sums[i][j] = zero(); });
    const auto add = [&](long at, auto masked) __attribute__((always_inline)) {
      Vec left[kRows];
#pragma GCC unroll 5
      for (int i = 0; i < kRows; ++i) left[i] = masked(load(a.p + i * a.row + at));
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        const Vec other = masked(load(right[j] + at));
#pragma GCC unroll 5
        for (int i = 0; i < kRows; ++i) sums[i][j] = fma(left[i], other, sums[i][j]);
      }
    };
    const int whole = n / columns;
    for (int v = 0; v < whole; ++v)
      add(static_cast<long>(v) * kWidth, [](Vec part) { return part; });
    if (n % columns != 0)  // an infinity in a task's rows makes NaNs of the padding
      add(static_cast<long>(whole) * kWidth,
          [&](Vec part) { return Grouped::masked_columns(part, n, whole); });
#pragma GCC unroll 5
    for (int i = 0; i < kRows; ++i)
      store(to + i * row, Grouped::sums_over_features(sums[i]) * scale);
  }
};

// Whole groups in stacks; tasks that are left over one by one, where they are so few that a group of them costs more.
class StackedDriver : public DriverPair<RowsExecutor, StackedExecutor> {
  using Stacks = Driver<StackedExecutor>;
  using Base = DriverPair<RowsExecutor, StackedExecutor>;

 public:
  static constexpr int kMadeOf = 1;

  // `plans` is that of `rows`.
  StackedDriver(const Call<Real>& call, void* const* plans)
      : Base(call, *static_cast<Driver<RowsExecutor>*>(plans[0])) {
    if (!suits(call)) {
      leave_all();
      return;
    }
    Stacks* stacks = new (memory_) Stacks(call);
    const std::int64_t left = call.tasks % kGroup;
    const bool alone =
        call.tasks > kGroup && one().needs_of(left).cost < stacks->needs_of(kGroup).cost;
    divide(*stacks, alone ? left : 0, nullptr);
  }

  static bool suits(const Call<Real>& call) {
    if (call.tasks < 2 || call.job != Job::meta || call.steps != 1) return false;
    if (call.support.rows == 0 || call.query.rows == 0 || call.support.sizes || call.query.sizes ||
        call.support.starts || call.query.starts || call.support.keeps_weightless ||
        call.query.keeps_weightless)
      return false;
    return is_chain(*call.network) && !has_extras<StackedExecutor::Family>(call) &&
           !is_factorable(call);
  }

 private:
  alignas(Stacks) char memory_[sizeof(Stacks)];
};

PYMETA_KERNEL_END
