// The rows of an item's tasks, brought into the executor's layout.
//
// Tasks lie in the caller's arrays one after the other ([rows, in]); an executor wants a matrix with padded rows, or
// the same row of several tasks side by side. A `Selection` takes some of a task's rows in an order of its own: a
// minibatch.
#pragma once

#include <string.h>

#include "../core/algorithms/state.h"

PYMETA_KERNEL_BEGIN

// The tasks of one item; lanes without a task are empty.
template <class X>
struct Item {
  std::int64_t task[X::kTasks];
  int count;
};

template <class X>
struct Selection {
  const std::int32_t* rows[X::kTasks];
  int count[X::kTasks];
};

template <class X>
class Binder {
 public:
  explicit Binder(const Call<Real>& call) : call_(call) {}

  const Call<Real>& call() const { return call_; }

  // All rows of the tasks, or those selected. A set without targets is for predictions.
  ItemSet bind(const RowSet<Real>& set, const SetLayout& places, const Item<X>& work, Real* memory,
               const Selection<X>* selection = nullptr) const {
    const int in = call_.network->in_features();
    const Lots lots{set, work, selection};
    Extent extent{0, nullptr, zero()};
    bool ragged = work.count < X::kTasks;
    for (int lane = 0; lane < work.count; ++lane) {
      const int size = lots.size(lane);
      ragged = ragged || (lane > 0 && size != extent.rows);
      extent.count[lane] = Real(size);
      extent.rows = size > extent.rows ? size : extent.rows;
    }
    if (X::kTasks == 1) extent.count = broadcast(extent.count[0]);
    if (X::kTasks > 1 && ragged) {
      Real* keep = memory + places.keep;
      for (int r = 0; r < extent.rows; ++r)
        store(keep + static_cast<long>(r) * kWidth, (Vec)(extent.count > broadcast(Real(r))));
      extent.keep = keep;
    }
    ItemSet result{{nullptr, 0},
                   extent,
                   nullptr,
                   nullptr,
                   places.dx == kNowhere ? nullptr : memory + places.dx};
    if (places.x == kNowhere) {
      result.x = {set.x + set.start(work.task[0]) * in, in};
    } else {
      Real* x = memory + places.x;
      result.x = {x, X::stride(in)};
      bind_inputs(lots, extent, x);
    }
    if (set.y) {
      result.targets = memory + places.targets;
      result.scale = memory + places.scale;
      bind_targets(lots, extent, memory + places.targets, memory + places.scale);
    }
    return result;
  }

 private:
  // Which rows of the caller's arrays each lane gets.
  struct Lots {
    const RowSet<Real>& set;
    const Item<X>& work;
    const Selection<X>* selection;

    int size(int lane) const {
      return selection ? selection->count[lane] : set.size(work.task[lane]);
    }
    std::int64_t row(int lane, int r) const {
      return set.start(work.task[lane]) + (selection ? selection->rows[lane][r] : r);
    }
  };

  void bind_inputs(const Lots& lots, const Extent& extent, Real* x) const {
    const int in = call_.network->in_features();
    const long row = X::stride(in);
    const int lanes = lots.work.count;
    const bool full = lanes == X::kTasks && !extent.keep && X::kTasks > 1;
    if (!full) memset(x, 0, sizeof(Real) * extent.rows * row);
    if constexpr (X::kElement == 1) {
      for (int r = 0; r < extent.rows; ++r)
        memcpy(x + r * row, lots.set.x + lots.row(0, r) * in, sizeof(Real) * in);
    } else {
      const long done = full && !lots.selection ? transpose_blocks(lots, extent, x) : 0;
      for (int lane = 0; lane < lanes; ++lane) {
        long at = 0;
        for (int r = 0; r < lots.size(lane); ++r) {
          const Real* from = lots.set.x + lots.row(lane, r) * in;
          for (int c = 0; c < in; ++c, ++at)
            if (at >= done) x[at * X::kElement + lane] = from[c];
        }
      }
    }
  }

  // Consecutive rows of all lanes, kWidth values of each at a time; returns how many values of a lane were done.
  long transpose_blocks(const Lots& lots, const Extent& extent, Real* x) const {
    long done = 0;
    if constexpr (X::kTasks == kWidth) {
      const int in = call_.network->in_features();
      const Real* from[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) from[lane] = lots.set.x + lots.row(lane, 0) * in;
      for (; done + kWidth <= static_cast<long>(extent.rows) * in; done += kWidth) {
        Vec block[kWidth];
#pragma GCC unroll 16
        for (int lane = 0; lane < kWidth; ++lane) block[lane] = load(from[lane] + done);
        transpose_block(block);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) store(x + (done + i) * kWidth, block[i]);
      }
    }
    return done;
  }

  void bind_targets(const Lots& lots, const Extent& extent, Real* targets, Real* scale) const {
    const RowSet<Real>& set = lots.set;
    const Loss& loss = *call_.loss;
    const bool labels = takes_labels(loss);
    const int out = call_.network->out_features();
    const long classes = X::class_stride(extent.rows);
    if (X::kTasks == 1 || extent.keep) {
      memset(targets, 0, sizeof(Real) * classes * (labels ? 1 : out));
      memset(scale, 0, sizeof(Real) * classes);
    }
    for (int lane = 0; lane < lots.work.count; ++lane) {
      const int rows = lots.size(lane);
      Real* t = targets + lane;
      Real* s = scale + lane;
      Real total = 0;
      for (int r = 0; r < rows; ++r) {
        const std::int64_t row = lots.row(lane, r);
        Real weight = set.weights ? set.weights[row] : Real(1);
        if (labels) {
          const std::int64_t label = static_cast<const std::int64_t*>(set.y)[row];
          const bool counts = label != loss.ignore_index;
          if (!counts) weight = 0;
          t[r * X::kElement] = Real(counts ? label : 0);
          if (counts) total += loss.weight ? weight * Real(loss.weight[label]) : weight;
        } else {
          const Real* y = static_cast<const Real*>(set.y) + row * out;
          for (int o = 0; o < out; ++o) t[o * classes + static_cast<long>(r) * X::kElement] = y[o];
          total += weight;
        }
        s[r * X::kElement] = weight;
      }
      if (!labels) total *= Real(out);
      // A set that weighs nothing has loss 0 and no gradient.
      const Real share = total > 0 ? Real(1) / total : Real(0);
      for (int r = 0; r < rows; ++r) s[r * X::kElement] *= share;
    }
  }

  const Call<Real>& call_;
};

PYMETA_KERNEL_END
