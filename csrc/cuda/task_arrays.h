// The way between a block's task and the caller's arrays (core/algorithms/job.h): what cpu/item_arrays.h and minibatches.h
// are to the CPU's executors.
#pragma once

#include "../core/algorithms/job.h"
#include "../core/call/shuffle.h"
#include "block.h"
#include "task_binding.h"

PYMETA_KERNEL_BEGIN

PYMETA_FN inline std::int32_t* order_in(const Memory& memory, Place place) {
  return reinterpret_cast<std::int32_t*>(memory.at(place));
}

// The order of a task's rows in the minibatches of an epoch.
class RowOrder {
 public:
  // `order` [2, largest support set]: what they are shuffled in; null: all rows in every step.
  PYMETA_FN RowOrder(const Call<Real>& call, std::int64_t task, std::int32_t* order)
      : call_(call),
        task_(task),
        rows_(call.support.size(task)),
        batches_(call.batches.count(rows_)),
        order_(batches_ > 1 ? order : nullptr) {}

  PYMETA_FN int rows() const { return rows_; }
  PYMETA_FN int batches() const { return batches_; }
  PYMETA_FN bool shuffles() const { return order_ != nullptr; }

  // Of the b-th step of an epoch.
  PYMETA_FN TaskRows batch(int epoch, int b) {
    if (epoch_ != epoch) {
      epoch_ = epoch;
      shuffle_rows(epoch);
    }
    const int first = b * call_.batches.size, left = rows_ - first;
    return {order_ + first, left < call_.batches.size ? left : call_.batches.size};
  }

 private:
  // All threads draw, one exchanges.
  PYMETA_FN void shuffle_rows(int epoch) {
    const std::uint64_t id =
        call_.batches.task_ids ? static_cast<std::uint64_t>(call_.batches.task_ids[task_]) : 0;
    const Draw draw{call_.batches.seed, call_.batches.stream, id, static_cast<std::uint64_t>(epoch),
                    Purpose::epoch};
    std::int32_t* drawn = order_ + call_.max_support;
    Block::for_indices(rows_, [&](int i) {
      order_[i] = i;
      if (i > 0) drawn[i] = exchange_place(draw, rows_, i);
    });
    if (thread_index() == 0)
      for (int i = rows_ - 1; i > 0; --i) exchange(order_, i, drawn[i]);
    sync();
  }

  const Call<Real>& call_;
  const std::int64_t task_;
  const int rows_, batches_;
  std::int32_t* const order_;
  int epoch_ = -1;  // that `order_` holds the order of
};

// The task's minibatches, as cpu/minibatches.h has them for an item.
class TaskBatches {
 public:
  template <class X>
  PYMETA_FN TaskBatches(const Call<Real>& call, const Workspace<X>& workspace, std::int64_t task,
                        const Memory& memory, const Real* corrections)
      : places_(workspace.support_set),
        support_(call.support),
        binder_(call, task, memory),
        order_(call, task, order_in(memory, workspace.order)),
        corrections_(corrections) {
    if (!order_.shuffles()) set_ = binder_.bind(support_, places_);
  }

  PYMETA_FN Vec rows() const { return Real(order_.rows()); }
  PYMETA_FN IntVec present() const { return order_.rows() > 0; }
  PYMETA_FN int count() const { return order_.batches(); }

  PYMETA_FN Step step(int k) {
    const int batches = count() > 0 ? count() : 1;
    return make(k / batches, k % batches, present(), k > 0, k);
  }
  PYMETA_FN Step step(int epoch, int b, IntVec running) {
    return make(epoch, b, running, epoch > 0 || b > 0, epoch * count() + b);
  }

 private:
  PYMETA_FN Step make(int epoch, int batch, IntVec active, bool again, int t) {
    if (order_.shuffles() && active.on) {
      const TaskRows chosen = order_.batch(epoch, batch);
      set_ = binder_.bind(support_, places_, &chosen);
    }
    const Correction correction =
        corrections_ ? Correction{corrections_[2 * t], corrections_[2 * t + 1]} : Correction{};
    return {&set_, active, active.on, again && !order_.shuffles(), correction};
  }

  const SetLayout& places_;
  const RowSet<Real>& support_;
  TaskBinder binder_;
  RowOrder order_;
  const Real* corrections_;
  ItemSet set_{};
};

// Notes down what fine-tuning tells of its epochs.
struct TaskCurves {
  const Call<Real>& call;
  std::int64_t task;

  PYMETA_FN void train(int epoch, Vec loss, IntVec running) const {
    put(call.train_curves, call.epochs, epoch, loss, running);
  }
  PYMETA_FN void validation(int epoch, Vec loss, IntVec running) const {
    put(call.validation_curves, call.epochs + 1, epoch, loss, running);
  }
  PYMETA_FN void finish(Vec best_epoch, Vec epochs) const {
    if (thread_index() != 0) return;
    if (call.best_epochs) call.best_epochs[task] = static_cast<std::int64_t>(best_epoch);
    if (call.epochs_run) call.epochs_run[task] = static_cast<std::int64_t>(epochs);
  }

 private:
  PYMETA_FN void put(Real* curves, int length, int epoch, Vec loss, IntVec running) const {
    if (curves && running.on && thread_index() == 0) curves[task * length + epoch] = loss;
  }
};

// X: the block, or what stands for it (recorder.h).
template <class X>
class TaskArrays {
 public:
  using Parameters = typename InnerLoop<X>::Parameters;

  PYMETA_FN TaskArrays(const Call<Real>& call, const Workspace<X>& workspace, const Shared& shared,
                       const Memory& memory, std::int64_t task)
      : call_(call),
        workspace_(workspace),
        layout_(workspace.parameters),
        shared_(shared),
        memory_(memory),
        task_(task) {}

  PYMETA_FN ItemSet set(const RowSet<Real>& rows, const SetLayout& layout) const {
    return TaskBinder(call_, task_, memory_).bind(rows, layout);
  }
  PYMETA_FN bool leaves_out(const RowSet<Real>& rows) const {
    return TaskBinder(call_, task_, memory_).leaves_out(rows, layout_of(rows));
  }
  PYMETA_FN ItemSet set_of_all(const RowSet<Real>& rows, const SetLayout& layout) const {
    return TaskBinder(call_, task_, memory_).bind_all(rows, layout);
  }
  PYMETA_FN TaskBatches batches() const {
    return {call_, workspace_, task_, memory_, shared_.corrections};
  }
  PYMETA_FN TaskCurves curves() const { return {call_, task_}; }

  PYMETA_FN void start() const {
    Real* start = memory_.at(workspace_.start);
    for (int t = 0; t < call_.network->tensor_count; ++t) {
      if (!call_.has_own_start(t)) continue;
      const Real* from = call_.parameters[t] + task_ * layout_.tensors[t].elements();
      for_elements(
          t, [=](std::size_t index, std::size_t at) { start[at] = from[index]; },
          layout_.tensors[t].place);
    }
  }

  PYMETA_FN Vec anchor() const { return call_.anchor_of(task_); }

  // The task's rates, for each element.
  PYMETA_FN void rates() const {
    const LearningRate<Real>& lr = call_.lr;
    for (int row = 0; row < lr.rows; ++row)
      for (int t = 0; t < call_.network->tensor_count; ++t) {
        if (!call_.adapted[t]) continue;
        const Real rate = lr.values[rate_index(row, lr.groups[t])];
        Real* to = memory_.at(workspace_.own_rates) + row * layout_.size + layout_.tensors[t].place;
        Block::for_vectors(layout_.scalars(t), [=](std::size_t i) { to[i] = rate; });
      }
  }
  PYMETA_FN void write_own_rate(int row, int column, Vec value) const {
    if (thread_index() == 0) call_.lr_gradient[rate_index(row, column)] = value / call_.divisor();
  }

  PYMETA_FN void write_anchor_gradient(Vec value) const {
    if (thread_index() == 0) call_.anchors_gradient[task_] = value / call_.divisor();
  }

  PYMETA_FN Seed seed() const {
    const Cotangents<Real>& given = call_.cotangents;
    if (!given.any()) return {true, Real(1)};
    return {false, given.losses ? given.losses[task_] : Real(0)};
  }
  PYMETA_FN Vec step_cotangent(int k) const {
    return call_.cotangents.step_losses[k * call_.tasks + task_];
  }
  PYMETA_FN void add_cotangent(int t, Real* v) const {
    const Real* from = call_.cotangents.adapted[t] + task_ * layout_.tensors[t].elements();
    for_elements(t, [=](std::size_t index, std::size_t at) { v[at] += from[index]; }, 0);
  }
  PYMETA_FN void write_own_gradient(int t, const Real* v) const {
    Real* to = call_.gradients[t] + task_ * layout_.tensors[t].elements();
    const Real divisor = call_.divisor();
    for_elements(t, [=](std::size_t index, std::size_t at) { to[index] = v[at] / divisor; }, 0);
  }

  PYMETA_FN void write_step_loss(int k, Vec loss) const {
    if (thread_index() == 0) call_.step_losses[k * call_.tasks + task_] = loss;
  }
  PYMETA_FN void write_losses(Vec loss) const {
    if (thread_index() == 0) call_.losses[task_] = loss;
  }
  // 1 where any adapted weight is not finite.
  PYMETA_FN void write_status(const Parameters& theta) const {
    Real bad = 0;
    for (int t = 0; t < call_.network->tensor_count; ++t) {
      if (!call_.adapted[t]) continue;
      const Real* own = theta.tensor(t);
      bad = Block::sum_elements(layout_.tensors[t], bad, [=](std::size_t at) {
        return own[at] - own[at] == 0 ? Real(0) : Real(1);
      });
    }
    if (thread_index() == 0) call_.status[task_] = bad != 0;
  }
  // [mean, variance, steps, numbers], each but the third the mean over the steps
  PYMETA_FN void write_statistics(const Layer& layer, const Real* from, std::int64_t column) const {
    const int channels = layer.out.channels;
    const long stride = Block::stride(channels);
    Real* to = call_.statistics + task_ * statistics_scalars(*call_.network) + column;
    const Real made = from[2 * stride];
    Block::for_indices(2 * channels + 2, [=](int i) {
      const Real sum = from[i < channels ? i : stride + i - channels];
      to[i] = i == 2 * channels ? made : made > 0 ? sum / made : Real(0);
    });
  }
  PYMETA_FN void write_adapted(int t, const Real* from) const {
    Real* to = call_.adapted_parameters[t] + task_ * layout_.tensors[t].elements();
    for_elements(t, [=](std::size_t index, std::size_t at) { to[index] = from[at]; }, 0);
  }
  PYMETA_FN void write_predictions(const ItemSet& query, const Real* y) const {
    const int out = call_.network->out_features(), rows = query.extent.rows;
    Real* to = call_.predictions + call_.query.start(task_) * out;
    Block::map(query.extent, out, [=](long, long o, int r) {
      to[static_cast<std::int64_t>(r) * out + o] = y[o * rows + r];
    });
  }
  // `computed` is false where no pass reached the inputs: the gradient is zero.
  PYMETA_FN void write_input_gradient(const RowSet<Real>& rows, const ItemSet& bound, bool computed,
                                      Real* gradient) const {
    const int in = call_.network->in_features(), all = rows.size(task_);
    const Real divisor = call_.divisor();
    Real* to = gradient + rows.start(task_) * in;
    const TaskRows bound_rows = bound_rows_of(rows);
    if (!computed || bound_rows.count < all)
      Block::map({all, nullptr, Real(all)}, in,
                 [&](long, long c, int r) { to[static_cast<std::int64_t>(r) * in + c] = 0; });
    if (!computed) return;
    Block::map(bound.extent, in, [&](long at, long c, int r) {
      const std::int64_t row = bound_rows.rows ? bound_rows.rows[r] : r;
      to[row * in + c] = bound.dx[at] / divisor;
    });
  }

  PYMETA_FN void write_target_gradient(const RowSet<Real>& rows, const ItemSet& bound,
                                       Real* gradient) const {
    write_columns(rows, bound, bound.target_gradient,
                  target_columns(call_.loss_of(rows), call_.network->out_features()), gradient);
  }
  PYMETA_FN void write_offset_gradient(const RowSet<Real>& rows, const ItemSet& bound,
                                       Real* gradient) const {
    write_columns(rows, bound, bound.offset_gradient, call_.network->out_features(), gradient);
  }
  // [rows, weight columns], of the shares as core/algorithms/set_gradients.h has them
  PYMETA_FN void write_weight_gradient(const RowSet<Real>& rows, const ItemSet& bound,
                                       Real* gradient) const {
    const int all = rows.size(task_), count = bound.extent.rows, columns = rows.weight_columns;
    const std::int64_t first = rows.start(task_);
    const TaskRows bound_rows = bound_rows_of(rows);
    const auto row_of = [&](int r) { return first + (bound_rows.rows ? bound_rows.rows[r] : r); };
    Real total = 0, shares = 0;
    for (int r = 0; r < count; ++r)
      for (int c = 0; c < columns; ++c) {
        const Real weight = rows.weights[row_of(r) * columns + c];
        if (columns > 1 && weight == 0) continue;
        total += checked_weight(weight) * call_.class_weight(rows, row_of(r));
        shares += weight * bound.weight_gradient[c * count + r];
      }
    const bool empty = total == 0;  // it is NaN where a weight or a label is wrong
    Real* to = gradient + first * columns;
    if (count < all || empty) Block::for_indices(all * columns, [=](int i) { to[i] = 0; });
    Block::map({empty ? 0 : count, nullptr, Real(count)}, columns, [&](long, long c, int r) {
      const Real own = bound.weight_gradient[c * count + r];
      const bool masked = call_.is_masked(rows, row_of(r), static_cast<int>(c), own);
      gradient[row_of(r) * columns + c] =
          masked ? Real(0)
                 : (own - call_.class_weight(rows, row_of(r)) * shares / total) /
                       (total * call_.divisor());
    });
  }

 private:
  // From `from` [columns, rows] to [rows, columns], 0 in rows that do not count.
  PYMETA_FN void write_columns(const RowSet<Real>& rows, const ItemSet& bound, const Real* from,
                               int columns, Real* gradient) const {
    const int all = rows.size(task_), count = bound.extent.rows;
    const Real divisor = call_.divisor();
    Real* to = gradient + rows.start(task_) * columns;
    const TaskRows bound_rows = bound_rows_of(rows);
    if (bound_rows.count < all) Block::for_indices(all * columns, [=](int i) { to[i] = 0; });
    Block::map(bound.extent, columns, [&](long, long c, int r) {
      const std::int64_t row = bound_rows.rows ? bound_rows.rows[r] : r;
      to[row * columns + c] = from[c * count + r] / divisor;
    });
  }
  PYMETA_FN std::size_t rate_index(int row, int column) const {
    return (static_cast<std::size_t>(task_) * call_.lr.rows + row) * call_.lr.columns + column;
  }
  // The rows of a set that are bound: all of them, or those that count.
  PYMETA_FN TaskRows bound_rows_of(const RowSet<Real>& rows) const {
    const TaskRows all{nullptr, rows.size(task_)};
    return rows.has_weightless
               ? TaskBinder(call_, task_, memory_).that_count(rows, layout_of(rows), all)
               : all;
  }
  PYMETA_FN const SetLayout& layout_of(const RowSet<Real>& rows) const {
    return &rows == &call_.support ? workspace_.support_set : workspace_.query_set;
  }
  // body(index in torch's layout, place in the packed one counted from `first`): neighbouring threads have neighbouring
  // indices.
  template <class Body>
  PYMETA_FN void for_elements(int t, Body body, std::size_t first) const {
    const PackedTensor& p = layout_.tensors[t];
    const int across = p.transposed ? p.outer : p.inner;
    Block::for_indices(p.outer * p.inner, [&](int index) {
      const int line = index / across, column = index % across;
      const int outer = p.transposed ? column : line, inner = p.transposed ? line : column;
      body(static_cast<std::size_t>(index),
           first + static_cast<std::size_t>(outer) * p.row + inner);
    });
  }

 protected:
  const Call<Real>& call_;
  const Workspace<X>& workspace_;
  const ParameterLayout<X>& layout_;
  const Shared& shared_;
  const Memory& memory_;
  std::int64_t task_;
};

PYMETA_KERNEL_END
