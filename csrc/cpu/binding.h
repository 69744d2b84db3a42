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

// Each task's number of [T], in its lane; that of a single task in all of them. 0 where there are none.
template <class X>
Vec of_tasks(const Item<X>& work, const Real* numbers) {
  Vec own = zero();
  for (int lane = 0; numbers && lane < work.count; ++lane) own[lane] = numbers[work.task[lane]];
  return X::kTasks == 1 ? broadcast(own[0]) : own;
}
// What flows into the query sets of an item.
template <class X>
Seed seed_of(const Call<Real>& call, const Item<X>& work) {
  if (!call.cotangents.any()) return {true, broadcast(1)};
  return {false, of_tasks(work, call.cotangents.losses)};
}

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

  // The rows of the tasks that count, of all or of those selected. A set without targets is for predictions.
  ItemSet bind(const RowSet<Real>& set, const SetLayout& places, const Item<X>& work, Real* memory,
               const Selection<X>* selection = nullptr) const {
    const int in = call_.network->in_features();
    const ItemRows rows(call_, set, work, selection);
    Extent extent{0, nullptr, zero()};
    Vec offered = zero();
    bool ragged = work.count < X::kTasks;
    for (int lane = 0; lane < work.count; ++lane) {
      const int count = rows.count(lane);
      ragged = ragged || (lane > 0 && count != extent.rows);
      extent.count[lane] = Real(count);
      extent.rows = count > extent.rows ? count : extent.rows;
      offered[lane] = Real(rows.offered(lane));
    }
    if (X::kTasks == 1) {
      extent.count = broadcast(extent.count[0]);
      offered = broadcast(offered[0]);
    }
    if (X::kTasks > 1 && ragged) {
      Real* keep = memory + places.keep;
      for (int r = 0; r < extent.rows; ++r)
        store(keep + static_cast<long>(r) * kWidth, (Vec)(extent.count > broadcast(Real(r))));
      extent.keep = keep;
    }
    if (places.context != kNowhere) count_in_statistics(rows, extent, memory + places.context);
    ItemSet result{{nullptr, 0}, extent, nullptr, nullptr, nullptr, offered};
    result.lies(places, Memory{memory});
    if (places.x == kNowhere) {
      result.x = {set.x + set.start(work.task[0]) * in, in};
    } else {
      Real* x = memory + places.x;
      result.x = {x, X::stride(in)};
      bind_inputs(rows, extent, x);
    }
    result.loss = &call_.loss_of(set);
    if (set.offset) {
      bind_columns(rows, extent, output_columns(), set.offset, memory + places.offset);
      result.offset = memory + places.offset;
    }
    if (set.y) {
      result.targets = memory + places.targets;
      result.scale = memory + places.scale;
      bind_targets(rows, extent, memory + places.targets, memory + places.scale);
      if (set.weight_columns > 1) {
        bind_columns(rows, extent, set.weight_columns, set.weights, memory + places.elements);
        result.elements = memory + places.elements;
      }
    }
    if (result.cotangent)
      bind_columns(rows, extent, output_columns(), call_.cotangents.predictions,
                   memory + places.cotangent);
    return result;
  }

  // All rows, for predictions: those that do not count are in no statistics, and there are no targets.
  ItemSet bind_all(const RowSet<Real>& set, const SetLayout& places, const Item<X>& work,
                   Real* memory) const {
    RowSet<Real> all = set;
    all.y = nullptr;
    all.weights = nullptr;
    all.has_weightless = all.keeps_weightless = false;
    ItemSet result = bind(all, places, work, memory);
    if (call_.by_support) return result;  // whose statistics are the support set's
    // Room that such a set leaves unused: one task's rows need no mask, and without targets there is no scale.
    Real* counting = memory + (X::kTasks == 1 ? places.keep : places.scale);
    count_in_statistics(ItemRows(call_, set, work, nullptr, true), result.extent, counting);
    return result;
  }

 private:
  // Which rows of the caller's arrays each lane gets.
  class ItemRows {
   public:
    ItemRows(const Call<Real>& call, const RowSet<Real>& set, const Item<X>& work,
             const Selection<X>* selection, bool all = false)
        : call_(call),
          set_(set),
          work_(work),
          selection_(selection),
          sifts_(set.has_weightless && !all) {
      for (int lane = 0; lane < work.count; ++lane) {
        count_[lane] = offered(lane);
        beside_[lane] = call.keeps_beside(set, work.task[lane]);
        if (!sifts_) continue;
        count_[lane] = 0;
        visit(lane, [&](int, std::int64_t) { ++count_[lane]; });
      }
    }

    const RowSet<Real>& set() const { return set_; }
    int lanes() const { return work_.count; }
    std::int64_t task(int lane) const { return work_.task[lane]; }
    bool are_consecutive() const { return !selection_ && !sifts_; }
    int count(int lane) const { return count_[lane]; }
    int offered(int lane) const {
      return selection_ ? selection_->count[lane] : set_.size(work_.task[lane]);
    }
    std::int64_t first(int lane) const { return set_.start(work_.task[lane]); }

    template <class Body>  // body(place among the bound rows, row of the caller's arrays)
    void visit(int lane, Body body) const {
      const int rows = offered(lane);
      if (are_consecutive()) {
        const std::int64_t row = first(lane);
        for (int r = 0; r < rows; ++r) body(r, row + r);
        return;
      }
      int place = 0;
      for (int r = 0; r < rows; ++r) {
        const int own = selection_ ? selection_->rows[lane][r] : r;
        if (sifts_ && !call_.is_used(set_, task(lane), own, beside_[lane])) continue;
        body(place++, first(lane) + own);
      }
    }

   private:
    const Call<Real>& call_;
    const RowSet<Real>& set_;
    const Item<X>& work_;
    const Selection<X>* selection_;
    bool sifts_;  // some rows may not be used
    int count_[X::kTasks];
    bool beside_[X::kTasks];
  };

  // Rows that are used are not all in statistics over rows.
  void count_in_statistics(const ItemRows& rows, Extent& extent, Real* counting) const {
    memset(counting, 0, sizeof(Real) * kWidth * extent.rows);
    extent.count = zero();
    for (int lane = 0; lane < rows.lanes(); ++lane)
      rows.visit(lane, [&](int r, std::int64_t row) {
        const std::int64_t task = rows.task(lane);
        const int own = static_cast<int>(row - rows.first(lane));
        if (!call_.is_in_statistics(rows.set(), task, own)) return;
        Real* at = counting + static_cast<long>(r) * kWidth;
        IntVec counts = (IntVec)load(at);
        counts[lane] = -1;
        if (X::kTasks == 1) counts = broadcast_int(-1);
        store(at, (Vec)counts);
        extent.count[lane] += 1;
      });
    if (X::kTasks == 1) extent.count = broadcast(extent.count[0]);
    extent.counting = counting;
  }

  void bind_inputs(const ItemRows& rows, const Extent& extent, Real* x) const {
    const int in = call_.network->in_features();
    const long stride = X::stride(in);
    const int lanes = rows.lanes();
    const bool full = lanes == X::kTasks && !extent.keep && X::kTasks > 1;
    if (!full) memset(x, 0, sizeof(Real) * extent.rows * stride);
    if constexpr (X::kElement == 1) {
      rows.visit(0, [&](int r, std::int64_t row) {
        memcpy(x + r * stride, rows.set().x + row * in, sizeof(Real) * in);
      });
    } else {
      const long done = full && rows.are_consecutive() ? transpose_blocks(rows, extent, x) : 0;
      for (int lane = 0; lane < lanes; ++lane)
        rows.visit(lane, [&](int r, std::int64_t row) {
          const Real* from = rows.set().x + row * in;
          long at = static_cast<long>(r) * in;
          for (int c = 0; c < in; ++c, ++at)
            if (at >= done) x[at * X::kElement + lane] = from[c];
        });
    }
  }

  // Consecutive rows of all lanes, kWidth values of each at a time; returns how many values of a lane were done.
  long transpose_blocks(const ItemRows& rows, const Extent& extent, Real* x) const {
    long done = 0;
    if constexpr (X::kTasks == kWidth) {
      const int in = call_.network->in_features();
      const Real* from[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) from[lane] = rows.set().x + rows.first(lane) * in;
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

  int output_columns() const { return call_.network->out_features(); }

  // [rows, columns] of the caller to a class-major array, whose padding is zero.
  void bind_columns(const ItemRows& rows, const Extent& extent, int columns, const Real* from,
                    Real* to) const {
    const long classes = X::class_stride(extent.rows);
    if (X::kTasks == 1 || extent.keep) memset(to, 0, sizeof(Real) * classes * columns);
    for (int lane = 0; lane < rows.lanes(); ++lane)
      rows.visit(lane, [&](int r, std::int64_t row) {
        const Real* values = from + row * columns;
        Real* at = to + lane + static_cast<long>(r) * X::kElement;
        for (int c = 0; c < columns; ++c) at[c * classes] = values[c];
      });
  }

  void bind_targets(const ItemRows& rows, const Extent& extent, Real* targets, Real* scale) const {
    const RowSet<Real>& set = rows.set();
    const Loss& loss = call_.loss_of(set);
    const bool labels = takes_labels(loss);
    const int columns = target_columns(loss, call_.network->out_features());
    const long classes = X::class_stride(extent.rows);
    if (X::kTasks == 1 || extent.keep) {
      memset(targets, 0, sizeof(Real) * classes * columns);
      memset(scale, 0, sizeof(Real) * classes);
    }
    for (int lane = 0; lane < rows.lanes(); ++lane) {
      Real* t = targets + lane;
      Real* s = scale + lane;
      Real total = 0;
      rows.visit(lane, [&](int r, std::int64_t row) {
        const Real* own = set.weights ? set.weights + row * set.weight_columns : nullptr;
        const bool by_element = set.weight_columns > 1;
        const Real weight = own && !by_element ? own[0] : Real(1);
        const long at = static_cast<long>(r) * X::kElement;
        if (labels) {
          const std::int64_t label = static_cast<const std::int64_t*>(set.y)[row];
          t[at] = Real(label);
          total += loss.weight ? weight * Real(loss.weight[label]) : weight;
        } else {
          const Real* y = static_cast<const Real*>(set.y) + row * columns;
          for (int o = 0; o < columns; ++o)
            t[o * classes + at] = by_element ? call_.target_of(set, own[o], y[o]) : y[o];
          if (!by_element) total += weight;
          for (int o = 0; by_element && o < columns; ++o) total += own[o];
        }
        s[at] = weight;
      });
      if (set.weight_columns == 1) total *= Real(mean_columns(loss, call_.network->out_features()));
      // A set that weighs nothing has loss 0 and no gradient.
      const Real share = total > 0 ? Real(1) / total : Real(0);
      for (int r = 0; r < rows.count(lane); ++r) s[static_cast<long>(r) * X::kElement] *= share;
    }
  }

  const Call<Real>& call_;
};

PYMETA_KERNEL_END
