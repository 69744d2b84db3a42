// The way between an item and the caller's arrays (core/algorithms/job.h).
#pragma once

#include <string.h>

#include "binding.h"
#include "minibatches.h"

PYMETA_KERNEL_BEGIN

// A tensor without lanes, in torch's layout; `row` scalars lie from one outer index of `from` to the next.
inline void unpack(const PackedTensor& tensor, const Real* from, long row, Real* to) {
  if (tensor.transposed) {
    transpose_matrix(tensor.outer, tensor.inner, from, row, to, tensor.outer);
  } else {
    for (int p = 0; p < tensor.outer; ++p)
      memcpy(to + static_cast<std::size_t>(p) * tensor.inner, from + p * row,
             sizeof(Real) * tensor.inner);
  }
}

// Is the first layer of this task never materialised? What its rows are brought together from are the caller's own arrays,
// so all of them count.
inline bool is_factored_task(const Call<Real>& call, std::int64_t task) {
  return is_factored(*call.network, call.support.size(task)) &&
         !call.leaves_out(call.support, task) && !call.leaves_out(call.query, task);
}

template <class X>
class ItemArrays {
 public:
  using Parameters = typename InnerLoop<X>::Parameters;

  ItemArrays(const Binder<X>& binder, const Workspace<X>& workspace, const Shared& shared,
             Real* memory, const Item<X>& work, const Factors& factors)
      : call_(binder.call()),
        binder_(binder),
        workspace_(workspace),
        layout_(workspace.parameters),
        shared_(shared),
        memory_(memory),
        work_(work),
        factors_(factors) {}

  ItemSet set(const RowSet<Real>& rows, const SetLayout& layout) const {
    return binder_.bind(rows, layout, work_, memory_);
  }
  // All rows, where one of them is left out of the set: predictions are made of it too.
  bool leaves_out(const RowSet<Real>& rows) const {
    for (int lane = 0; lane < work_.count; ++lane)
      if (call_.leaves_out(rows, work_.task[lane])) return true;
    return false;
  }
  ItemSet set_of_all(const RowSet<Real>& rows, const SetLayout& layout) const {
    return binder_.bind_all(rows, layout, work_, memory_);
  }
  ItemBatches<X> batches() const {
    return {binder_, workspace_, work_, memory_, shared_.corrections};
  }
  Curves<X> curves() const { return {call_, work_}; }
  bool is_factored() const { return is_factored_task(call_, work_.task[0]); }
  const Factors& factors() const { return factors_; }

  // With its transposes.
  void start() const {
    Real* start = memory_ + workspace_.start;
    for (int t = 0; t < call_.network->tensor_count; ++t) {
      if (!call_.has_own_start(t)) continue;
      memset(start + layout_.tensors[t].place, 0,
             sizeof(Real) * layout_.scalars(t));  // the padding
      layout_.elements(t, [&](std::size_t from, std::size_t place) {
        for (int lane = 0; lane < work_.count; ++lane)
          start[place + lane] =
              call_.parameters[t][work_.task[lane] * layout_.tensors[t].elements() + from];
      });
    }
    if (call_.job == Job::predict) return;
    for (int l = 0; l < call_.network->layer_count; ++l) {
      const int t = call_.network->layers[l].weight;
      if (layout_.transposed[l] == kNowhere || !call_.has_own_start(t)) continue;
      transpose_weight<X>(call_.network->layers[l], start + layout_.tensors[t].place,
                          memory_ + workspace_.start_transposed + layout_.transposed[l]);
    }
  }

  Vec anchor() const {
    Vec anchor = zero();
    for (int lane = 0; lane < work_.count; ++lane) anchor[lane] = call_.anchor_of(work_.task[lane]);
    return X::kTasks == 1 ? broadcast(anchor[0]) : anchor;
  }
  // The rates of the item's tasks, for each element.
  void rates() const {
    const LearningRate<Real>& lr = call_.lr;
    for (int row = 0; row < lr.rows; ++row)
      for (int t = 0; t < call_.network->tensor_count; ++t) {
        if (!call_.adapted[t]) continue;
        Vec rate = zero();
        for (int lane = 0; lane < work_.count; ++lane)
          rate[lane] = lr.values[rate_index(lane, row, lr.groups[t])];
        if (X::kTasks == 1) rate = broadcast(rate[0]);
        Real* to = memory_ + workspace_.own_rates + row * layout_.size + layout_.tensors[t].place;
        X::for_vectors(layout_.scalars(t), [=](std::size_t i) { store(to + i, rate); });
      }
  }
  void write_own_rate(int row, int column, Vec value) const {
    for (int lane = 0; lane < work_.count; ++lane)
      call_.lr_gradient[rate_index(lane, row, column)] = value[lane] / call_.divisor();
  }

  void write_anchor_gradient(Vec value) const {
    for (int lane = 0; lane < work_.count; ++lane)
      call_.anchors_gradient[work_.task[lane]] = value[lane] / call_.divisor();
  }

  Seed seed() const { return seed_of(call_, work_); }
  Vec step_cotangent(int k) const {
    return of_tasks(work_, call_.cotangents.step_losses + k * call_.tasks);
  }
  void add_cotangent(int t, Real* v) const {
    layout_.elements(t, 0, [&](std::size_t from, std::size_t place) {
      for (int lane = 0; lane < work_.count; ++lane)
        v[place + lane] +=
            call_.cotangents.adapted[t][work_.task[lane] * layout_.tensors[t].elements() + from];
    });
  }
  void write_own_gradient(int t, const Real* v) const {
    write_stacked(t, v, call_.gradients[t]);
    const Real divisor = call_.divisor();
    if (divisor == 1) return;
    for (int lane = 0; lane < work_.count; ++lane) {
      const std::size_t elements = layout_.tensors[t].elements();
      Real* to = call_.gradients[t] + work_.task[lane] * elements;
      for (std::size_t i = 0; i < elements; ++i) to[i] /= divisor;
    }
  }

  void write_losses(Vec loss) const {
    for (int lane = 0; lane < work_.count; ++lane) call_.losses[work_.task[lane]] = loss[lane];
  }

  // 1 where any adapted weight of a task is not finite.
  void write_status(const Parameters& theta) const {
    IntVec bad{};
    for (int t = 0; t < call_.network->tensor_count; ++t) {
      if (!call_.adapted[t]) continue;
      const PackedTensor& tensor = layout_.tensors[t];
      for (int p = 0; p < tensor.outer; ++p)
        for (int c = 0; c < X::vectors(tensor.inner); ++c) {
          const Vec value = load(theta.tensor(t) + static_cast<long>(p) * tensor.row +
                                 static_cast<long>(c) * kWidth);
          bad |= X::masked_columns(value - value, tensor.inner, c) != zero();
        }
    }
    for (int lane = 0; lane < work_.count; ++lane)
      call_.status[work_.task[lane]] = X::kTasks == 1 ? any_lane(bad) : bad[lane] != 0;
  }

  void write_step_loss(int k, Vec loss) const {
    for (int lane = 0; lane < work_.count; ++lane)
      call_.step_losses[k * call_.tasks + work_.task[lane]] = loss[lane];
  }

  // [mean, variance, steps, numbers] of a task, each but the third the mean over its steps.
  void write_statistics(const Layer& layer, const Real* from, std::int64_t column) const {
    const int channels = layer.out.channels;
    const long stride = X::stride(channels), size = statistics_scalars(*call_.network);
    for (int lane = 0; lane < work_.count; ++lane) {
      Real* to = call_.statistics + work_.task[lane] * size + column;
      const Real made = from[2 * stride + lane];
      for (int i = 0; i < 2 * channels; ++i) {
        const Real* sum = from + (i < channels ? 0 : stride);
        const Real value = sum[static_cast<long>(i % channels) * X::kElement + lane];
        to[i] = made > 0 ? value / made : Real(0);
      }
      to[2 * channels] = made;
      to[2 * channels + 1] = made > 0 ? from[2 * stride + kWidth + lane] / made : Real(0);
    }
  }

  void write_adapted(int t, const Real* from) const {
    write_stacked(t, from, call_.adapted_parameters[t]);
  }
  // Each task's tensor, to [T, ...].
  void write_stacked(int t, const Real* from, Real* to) const {
    const PackedTensor& tensor = layout_.tensors[t];
    if constexpr (X::kElement == 1) {
      unpack(tensor, from, tensor.row, to + work_.task[0] * layout_.tensors[t].elements());
    } else {
      // As many elements of a lane's tensor as there are lanes, side by side in torch's layout.
      const int lines = tensor.transposed ? tensor.inner : tensor.outer;
      const int length = tensor.transposed ? tensor.outer : tensor.inner;
      const long line_step = tensor.transposed ? X::kElement : tensor.row;
      const long step = tensor.transposed ? tensor.row : X::kElement;
      for (int line = 0; line < lines; ++line)
        for (int first = 0; first < length; first += kWidth) {
          const Real* at = from + line * line_step + first * step;
          const int count = length - first < kWidth ? length - first : kWidth;
          Vec block[kWidth];
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) block[i] = i < count ? load(at + i * step) : zero();
          transpose_block(block);
          const std::size_t place = static_cast<std::size_t>(line) * length + first;
          for (int lane = 0; lane < work_.count; ++lane) {
            Real* const own = to + work_.task[lane] * layout_.tensors[t].elements() + place;
            if (count == kWidth)
              store(own, block[lane]);
            else
              memcpy(own, &block[lane], sizeof(Real) * count);
          }
        }
    }
  }

  void write_predictions(const ItemSet& query, const Real* y) const {
    const int out = call_.network->out_features();
    const long classes = X::class_stride(query.extent.rows);
    for (int lane = 0; lane < work_.count; ++lane) {
      Real* to = call_.predictions + call_.query.start(work_.task[lane]) * out;
      for (int r = 0; r < call_.query.size(work_.task[lane]); ++r)
        for (int o = 0; o < out; ++o)
          to[static_cast<long>(r) * out + o] =
              y[o * classes + static_cast<long>(r) * X::kElement + lane];
    }
  }

  // `computed` is false where no pass reached the inputs: the gradient is zero.
  void write_input_gradient(const RowSet<Real>& rows, const ItemSet& bound, bool computed,
                            Real* gradient) const {
    const int in = call_.network->in_features();
    const long stride = X::stride(in);
    visit_rows(rows, [&](int lane, std::int64_t row, int place) {
      Real* to = gradient + row * in;
      const Real* from = bound.dx + place * stride + lane;
      for (int c = 0; c < in; ++c)
        to[c] = computed && place >= 0 ? from[static_cast<long>(c) * X::kElement] / call_.divisor()
                                       : Real(0);
    });
  }
  void write_target_gradient(const RowSet<Real>& rows, const ItemSet& bound, Real* gradient) const {
    write_columns(rows, bound, bound.target_gradient,
                  target_columns(call_.loss_of(rows), call_.network->out_features()), gradient);
  }
  void write_offset_gradient(const RowSet<Real>& rows, const ItemSet& bound, Real* gradient) const {
    write_columns(rows, bound, bound.offset_gradient, call_.network->out_features(), gradient);
  }
  // [rows, weight columns], of the shares as core/algorithms/set_gradients.h has them
  void write_weight_gradient(const RowSet<Real>& rows, const ItemSet& bound, Real* gradient) const {
    const int columns = rows.weight_columns;
    const long classes = X::class_stride(bound.extent.rows);
    Real total[X::kTasks] = {}, shares[X::kTasks] = {};
    const auto share = [&](int lane, int place, int c) {
      return bound.weight_gradient[c * classes + lane + static_cast<long>(place) * X::kElement];
    };
    visit_rows(rows, [&](int lane, std::int64_t row, int place) {
      for (int c = 0; place >= 0 && c < columns; ++c) {
        const Real weight = rows.weights[row * columns + c];
        if (columns > 1 && weight == 0) continue;
        total[lane] += weight * call_.class_weight(rows, row);
        shares[lane] += weight * share(lane, place, c);
      }
    });
    visit_rows(rows, [&](int lane, std::int64_t row, int place) {
      for (int c = 0; c < columns; ++c) {
        const bool flows =
            place >= 0 && total[lane] > 0 && !call_.is_masked(rows, row, c, share(lane, place, c));
        gradient[row * columns + c] =
            flows ? (share(lane, place, c) -
                     call_.class_weight(rows, row) * shares[lane] / total[lane]) /
                        (total[lane] * call_.divisor())
                  : Real(0);
      }
    });
  }

 private:
  // From class-major `from` [columns, rows] to [rows, columns], 0 in rows that do not count.
  void write_columns(const RowSet<Real>& rows, const ItemSet& bound, const Real* from, int columns,
                     Real* gradient) const {
    const long classes = X::class_stride(bound.extent.rows);
    visit_rows(rows, [&](int lane, std::int64_t row, int place) {
      const Real* own = from + lane + static_cast<long>(place) * X::kElement;
      for (int c = 0; c < columns; ++c)
        gradient[row * columns + c] = place < 0 ? Real(0) : own[c * classes] / call_.divisor();
    });
  }
  std::size_t rate_index(int lane, int row, int column) const {
    return (static_cast<std::size_t>(work_.task[lane]) * call_.lr.rows + row) * call_.lr.columns +
           column;
  }
  // body(lane, row of the caller's arrays, its place among the bound rows or -1 where it is not used)
  template <class Body>
  void visit_rows(const RowSet<Real>& rows, Body body) const {
    for (int lane = 0; lane < work_.count; ++lane) {
      const std::int64_t task = work_.task[lane], first = rows.start(task);
      const bool beside = rows.has_weightless && call_.keeps_beside(rows, task);
      int place = 0;
      for (int r = 0; r < rows.size(task); ++r) {
        const bool used = !rows.has_weightless || call_.is_used(rows, task, r, beside);
        body(lane, first + r, used ? place++ : -1);
      }
    }
  }

  const Call<Real>& call_;
  const Binder<X>& binder_;
  const Workspace<X>& workspace_;
  const ParameterLayout<X>& layout_;
  const Shared& shared_;
  Real* memory_;
  const Item<X>& work_;
  Factors factors_;
};

PYMETA_KERNEL_END
