// The way between a stack of tasks (core/algorithms/stacked.h) and the caller's arrays: what binding.h and item_arrays.h are to others.
#pragma once

#include <string.h>

#include "../core/algorithms/meta_gradient.h"
#include "binding.h"

PYMETA_KERNEL_BEGIN

// The rows of a stack's tasks, which lie one after another in the caller's arrays.
template <class X>
class StackArrays {
 public:
  StackArrays(const Call<Real>& call, const Item<X>& work, Real* memory)
      : call_(call), work_(work), memory_{memory} {}

  ItemSet set(const RowSet<Real>& rows, const SetLayout& places) const {
    const int in = call_.network->in_features(), each = static_cast<int>(rows.rows);
    Vec counts = zero();
    for (int lane = 0; lane < groups() * X::kElement; ++lane) counts[lane] = Real(each);
    Real* x = memory_.at(places.x);
    ItemSet set{
        {x, X::stride(in)}, {each * groups(), nullptr, counts}, nullptr, nullptr, nullptr, counts};
    if (X::stride(in) != static_cast<long>(in) * X::kElement)
      memset(x, 0, sizeof(Real) * set.extent.rows * X::stride(in));
    for (int lane = 0; lane < groups() * X::kElement; ++lane) {
      const Real* from = rows.x + first_row(rows, lane) * in;
      Real* to = x + first_element(lane, each, X::stride(in));
      for (int r = 0; r < each; ++r, from += in, to += X::stride(in))
        for (int c = 0; c < in; ++c) to[static_cast<long>(c) * X::kElement] = from[c];
    }
    set.loss = &call_.loss_of(rows);
    if (rows.y) {
      set.targets = memory_.at(places.targets);
      set.scale = memory_.at(places.scale);
      bind_targets(rows, set.extent, memory_.at(places.targets), memory_.at(places.scale));
    }
    if (places.cotangent != kNowhere) {
      set.cotangent = memory_.at(places.cotangent);
      bind_cotangent(rows, set.extent, memory_.at(places.cotangent));
    }
    return set;
  }
  void write_losses(Vec losses) const {
    for (int task = 0; task < work_.count; ++task) call_.losses[work_.task[task]] = losses[task];
  }
  void write_predictions(const ItemSet& query, const Real* outputs) const {
    const int out = call_.network->out_features(), each = static_cast<int>(call_.query.rows);
    const long classes = X::class_stride(query.extent.rows);
    for (int lane = 0; lane < work_.count; ++lane) {
      const Real* from = outputs + first_element(lane, each, X::kElement);
      Real* to = call_.predictions + first_row(call_.query, lane) * out;
      for (int r = 0; r < each; ++r, from += X::kElement, to += out)
        for (int o = 0; o < out; ++o) to[o] = from[o * classes];
    }
  }
  const Item<X>& item() const { return work_; }
  int groups() const { return (work_.count + X::kElement - 1) / X::kElement; }

 private:
  // In the caller's arrays, of the task in a lane; a lane without one has the rows of the last.
  std::int64_t first_row(const RowSet<Real>& rows, int lane) const {
    return rows.start(work_.task[lane < work_.count ? lane : work_.count - 1]);
  }
  // In an array of `row` scalars from one row to the next.
  static long first_element(int lane, int each, long row) {
    return lane / X::kElement * each * row + lane % X::kElement;
  }

  // Nothing flows into the lanes without a task.
  void bind_cotangent(const RowSet<Real>& rows, const Extent& extent, Real* to) const {
    const int out = call_.network->out_features(), each = static_cast<int>(rows.rows);
    const long classes = X::class_stride(extent.rows);
    memset(to, 0, sizeof(Real) * out * classes);
    for (int lane = 0; lane < work_.count; ++lane) {
      const Real* from = call_.cotangents.predictions + first_row(rows, lane) * out;
      Real* at = to + first_element(lane, each, X::kElement);
      for (int r = 0; r < each; ++r, from += out, at += X::kElement)
        for (int o = 0; o < out; ++o) at[o * classes] = from[o];
    }
  }

  // As Binder::bind_targets; the rows of a lane without a task weigh nothing.
  void bind_targets(const RowSet<Real>& rows, const Extent& extent, Real* targets,
                    Real* scale) const {
    const Loss& loss = call_.loss_of(rows);
    const int out = call_.network->out_features(), each = static_cast<int>(rows.rows);
    const int columns = target_columns(loss, out);
    const bool labels = takes_labels(loss);
    const Real even = Real(1) / (Real(each) * Real(mean_columns(loss, out)));
    const long classes = X::class_stride(extent.rows);
    const long used = static_cast<long>(extent.rows) * X::kElement;
    memset(scale + used, 0, sizeof(Real) * (classes - used));
    for (int c = 0; c < columns; ++c)
      memset(targets + c * classes + used, 0, sizeof(Real) * (classes - used));
    for (int lane = 0; lane < groups() * X::kElement; ++lane) {
      const std::int64_t first = first_row(rows, lane);
      Real* t = targets + first_element(lane, each, X::kElement);
      for (int r = 0; r < each; ++r) {
        const long at = static_cast<long>(r) * X::kElement;
        if (labels)
          t[at] = Real(static_cast<const std::int64_t*>(rows.y)[first + r]);
        else
          for (int c = 0; c < columns; ++c)
            t[c * classes + at] = static_cast<const Real*>(rows.y)[(first + r) * columns + c];
      }
      Real* s = scale + first_element(lane, each, X::kElement);
      const bool weighs = lane < work_.count;
      if (rows.weights || loss.weight)
        bind_weights(rows, first, weighs, s);
      else
        for (int r = 0; r < each; ++r) s[static_cast<long>(r) * X::kElement] = weighs ? even : 0;
    }
  }
  // The shares of one task's rows in the mean.
  void bind_weights(const RowSet<Real>& rows, std::int64_t first, bool weighs, Real* s) const {
    const Loss& loss = call_.loss_of(rows);
    const int each = static_cast<int>(rows.rows);
    Real total = 0;
    for (int r = 0; r < each; ++r) {
      const long at = static_cast<long>(r) * X::kElement;
      s[at] = rows.weights ? rows.weights[first + r] : Real(1);
      total += loss.weight ? s[at] * call_.class_weight(rows, first + r) : s[at];
    }
    total *= Real(mean_columns(loss, call_.network->out_features()));
    const Real share = total > 0 && weighs ? Real(1) / total : Real(0);
    for (int r = 0; r < each; ++r) s[static_cast<long>(r) * X::kElement] *= share;
  }

  const Call<Real>& call_;
  const Item<X>& work_;
  const Memory memory_;
};

// What is done with a stack: the part of ItemJob that its calls have.
template <class X>
void run_stack(const Call<Real>& call, const Workspace<X>& workspace, InnerLoop<X>& loop,
               const StackArrays<X>& arrays, const Totals& totals) {
  const ItemSet support = arrays.set(call.support, workspace.support_set);
  const ItemSet query = arrays.set(call.query, workspace.query_set);
  const Stack stack{arrays.groups(), static_cast<int>(call.support.rows),
                    static_cast<int>(call.query.rows), support.x, query.x};
  loop.set_stack(&stack);
  MetaGradient<X> gradient(loop, support, query, totals);
  const auto record = [](int, Vec) {};
  const Seed seed = seed_of(call, arrays.item());
  const Vec loss = gradient.loss(record);
  if (call.predictions) arrays.write_predictions(query, loop.outputs());
  if (call.wants_gradient()) {
    gradient.add_query(seed);
    gradient.add_steps([&](int) { return seed; }, record);
  }
  if (call.losses) arrays.write_losses(loss);
  loop.set_stack(nullptr);
}

PYMETA_KERNEL_END
