// One call on one executor: pack the start, work through the chunks, sum and unpack the gradients.
//
// A chunk is a fixed run of items whose gradients are summed in order; the chunks' sums are then added in order.
// How many chunks there are depends on the call alone, never on the threads, and so does every bit of the result.
#pragma once

#include <string.h>

#include "../core/inner_loop.h"
#include "kernels.h"
#include "lanes.h"
#include "rows.h"

PYMETA_KERNEL_BEGIN

template <class Body>
void parallel(const Team& team, std::int64_t count, Body body) {
  team.run(team.threads, count,
           [](void* context, std::int64_t index, int worker) { (*static_cast<Body*>(context))(index, worker); }, &body);
}

template <class X>
class Driver {
 public:
  Driver(const Call<Real>& call, Job job) : call_(call), job_(job), workspace_(call) {}

  Needs needs() const {
    Needs n{};
    n.shared = sizeof(Real) * shared_size();
    n.totals = sizeof(Real) * totals_size();
    n.workspace = sizeof(Real) * workspace_.size;
    const std::int64_t count = items();
    // Few enough that summing them costs little, enough to balance the threads.
    std::int64_t most = n.totals ? static_cast<std::int64_t>((std::size_t{4} << 20) / n.totals) : 64;
    most = most < 8 ? 8 : most > 64 ? 64 : most;
    const std::int64_t each = (count + most - 1) / most;
    n.chunks = static_cast<std::size_t>(each ? (count + each - 1) / each : 0);
    n.cost = cost() * static_cast<double>(count);
    return n;
  }

  void run(const Needs& needs, const Team& team, char* memory) {
    Real* shared = reinterpret_cast<Real*>(memory);
    totals_ = shared + shared_size();
    workspaces_ = totals_ + totals_size() * needs.chunks;
    pack_shared(shared);
    const std::int64_t each = needs.chunks ? (items() + needs.chunks - 1) / needs.chunks : 0;
    parallel(team, static_cast<std::int64_t>(needs.chunks), [&](std::int64_t chunk, int worker) {
      Real* sums = totals_ + chunk * totals_size();
      memset(sums, 0, sizeof(Real) * totals_size());
      const Totals totals{sums, sums + gradient_size()};
      InnerLoop<X> loop(call_, workspace_, shared_, workspaces_ + worker * workspace_.size);
      const std::int64_t end = (chunk + 1) * each < items() ? (chunk + 1) * each : items();
      for (std::int64_t item = chunk * each; item < end; ++item) process(item, loop, worker, totals);
    });
    if (job_ == Job::meta && call_.wants_gradient()) write_gradients(needs, team);
  }

 private:
  // The tasks of one item; lanes without a task have size 0.
  struct Item {
    std::int64_t task[X::kTasks];
    int count;
  };

  std::int64_t items() const { return (call_.tasks + X::kTasks - 1) / X::kTasks; }
  Item item(std::int64_t index) const {
    Item item{};
    for (std::int64_t i = index * X::kTasks; i < call_.tasks && item.count < X::kTasks; ++i)
      item.task[item.count++] = call_.order ? call_.order[i] : i;
    return item;
  }

  const ParameterLayout<X>& layout() const { return workspace_.parameters; }
  std::size_t rates_size() const { return call_.lr.per_element ? layout().size * call_.lr.rows : 0; }
  std::size_t shared_size() const { return layout().size + layout().transposed_size + rates_size(); }
  std::size_t gradient_size() const { return call_.wants_gradient() ? layout().size : 0; }
  std::size_t totals_size() const {
    if (!call_.lr_gradient) return gradient_size();
    return gradient_size() + (call_.lr.per_element ? layout().size : static_cast<std::size_t>(call_.lr.columns) * kWidth) *
                                 call_.lr.rows;
  }

  // Estimated cycles of one item: vector operations at a rate typical of the executor, plus a little for each call.
  double cost() const {
    const bool second = call_.second_order(), gradient = call_.wants_gradient();
    double work = 0;
    for (int l = 0; l < call_.network->layer_count; ++l) {
      const Layer& layer = call_.network->layers[l];
      if (layer.kind != LayerKind::linear) {
        work += 20.0 * (call_.max_support * call_.steps * (second ? 4 : 2) + call_.max_query * 2) * X::vectors(layer.out);
        continue;
      }
      const double forward = layer.in * static_cast<double>(X::vectors(layer.out)) + X::kRowOverhead * X::vectors(layer.out);
      const double passes = l > 0 ? 3 : 2, tangents = l > 0 ? 6 : 2;
      work += forward * (call_.max_support * static_cast<double>(call_.steps) * (passes + (second ? tangents : 0)) +
                         call_.max_query * (gradient ? passes : 1));
    }
    const double bytes = static_cast<double>(workspace_.size) * sizeof(Real);
    return work / (bytes > kLargeWorkspace ? X::kCrowdedRate : X::kRate) + 600.0 * call_.steps;
  }
  static constexpr double kLargeWorkspace = 1.5e6;

  // ---- parameters ----------------------------------------------------------------------------------------------

  std::size_t tensor_elements(int t) const {
    return static_cast<std::size_t>(layout().tensors[t].outer) * layout().tensors[t].inner;
  }

  // Spreads a tensor in torch's layout over the packed one: the same for all lanes.
  void pack(int t, const Real* from, Real* to) const {
    layout().elements(t, [&](std::size_t index, std::size_t place) {
      for (int lane = 0; lane < X::kElement; ++lane) to[place + lane] = from[index];
    });
  }

  void pack_shared(Real* memory) {
    memset(memory, 0, sizeof(Real) * shared_size());
    Real* transposed = memory + layout().size;
    Real* rates = transposed + layout().transposed_size;
    const Network& network = *call_.network;
    for (int t = 0; t < network.tensor_count; ++t)
      if (!is_per_task(t)) pack(t, call_.parameters[t], memory);
    for (int l = 0; l < network.layer_count; ++l) {
      const Layer& layer = network.layers[l];
      if (layout().transposed[l] == kNowhere) continue;
      for (int o = 0; o < layer.out; ++o)  // torch's own layout, with padded rows
        memcpy(transposed + layout().transposed[l] + o * X::stride(layer.in),
               call_.parameters[layer.weight] + static_cast<std::size_t>(o) * layer.in, sizeof(Real) * layer.in);
    }
    for (int row = 0; call_.lr.per_element && row < call_.lr.rows; ++row) {
      const Real* from = call_.lr.values + static_cast<std::size_t>(row) * call_.lr.columns;
      each_adapted([&](int t, std::size_t first) { pack(t, from + first, rates + row * layout().size); });
    }
    shared_ = {memory, transposed, call_.lr.per_element ? rates : nullptr};
  }

  // body(tensor, index of its first element among all adapted elements)
  template <class Body>
  void each_adapted(Body body) const {
    std::size_t first = 0;
    for (int t = 0; t < call_.network->tensor_count; ++t) {
      if (!call_.adapted[t]) continue;
      body(t, first);
      first += tensor_elements(t);
    }
  }

  bool is_per_task(int t) const { return call_.parameter_per_task && call_.parameter_per_task[t]; }

  // ---- tasks ---------------------------------------------------------------------------------------------------

  void process(std::int64_t index, InnerLoop<X>& loop, int worker, const Totals& totals) {
    const Item work = item(index);
    Real* memory = workspaces_ + worker * workspace_.size;
    if (job_ == Job::predict) {
      const ItemSet query = bind(call_.query, workspace_.query_set, work, memory);
      Real* theta = memory + workspace_.theta;
      for (int t = 0; t < call_.network->tensor_count; ++t)
        if (is_per_task(t))
          layout().elements(t, [&](std::size_t from, std::size_t place) {
            for (int lane = 0; lane < work.count; ++lane)
              theta[place + lane] = call_.parameters[t][work.task[lane] * tensor_elements(t) + from];
            for (int lane = work.count; lane < X::kElement; ++lane) theta[place + lane] = 0;
          });
      loop.evaluate({&loop, theta, nullptr}, query);
      write_predictions(work, query, loop.outputs());
      return;
    }
    const ItemSet support = bind(call_.support, workspace_.support_set, work, memory);
    if (job_ == Job::adapt) {
      const auto theta = loop.adapt(support);
      for (int t = 0; t < call_.network->tensor_count; ++t) {
        if (!call_.adapted[t] || !call_.adapted_parameters[t]) continue;
        const Real* from = theta.tensor(t) - layout().tensors[t].place;
        layout().elements(t, [&](std::size_t to, std::size_t place) {
          for (int lane = 0; lane < work.count; ++lane)
            call_.adapted_parameters[t][work.task[lane] * tensor_elements(t) + to] = from[place + lane];
        });
      }
      return;
    }
    const ItemSet query = bind(call_.query, workspace_.query_set, work, memory);
    const Vec loss = loop.meta_gradient(support, query, totals);
    for (int lane = 0; lane < work.count; ++lane) call_.losses[work.task[lane]] = loss[lane];
    if (call_.predictions) write_predictions(work, query, loop.outputs());
    if (call_.xs_gradient) write_input_gradient(work, call_.support, support, call_.second_order(), call_.xs_gradient);
    if (call_.xq_gradient) write_input_gradient(work, call_.query, query, true, call_.xq_gradient);
  }

  ItemSet bind(const RowSet<Real>& set, const SetLayout& places, const Item& work, Real* memory) const {
    const int in = call_.network->in_features();
    Extent extent{0, nullptr, zero()};
    bool ragged = work.count < X::kTasks;
    for (int lane = 0; lane < work.count; ++lane) {
      const int size = set.size(work.task[lane]);
      ragged = ragged || (lane > 0 && size != extent.rows);
      extent.count[lane] = Real(size);
      extent.rows = size > extent.rows ? size : extent.rows;
    }
    if (X::kTasks == 1) extent.count = broadcast(extent.count[0]);
    if (X::kTasks > 1 && ragged) {
      Real* keep = memory + places.keep;
      for (int r = 0; r < extent.rows; ++r) store(keep + static_cast<long>(r) * kWidth, (Vec)(extent.count > broadcast(Real(r))));
      extent.keep = keep;
    }
    ItemSet result{{nullptr, 0}, extent, nullptr, nullptr, places.dx == kNowhere ? nullptr : memory + places.dx};
    if (places.x == kNowhere) {
      result.x = {set.x + set.start(work.task[0]) * in, in};
    } else {
      Real* x = memory + places.x;
      result.x = {x, X::stride(in)};
      bind_inputs(set, work, extent, x);
    }
    if (set.y) {
      result.targets = memory + places.targets;
      result.scale = memory + places.scale;
      bind_targets(set, work, extent, memory + places.targets, memory + places.scale);
    }
    return result;
  }

  void bind_inputs(const RowSet<Real>& set, const Item& work, const Extent& extent, Real* x) const {
    const int in = call_.network->in_features();
    const long row = X::stride(in);
    const bool whole = work.count == X::kTasks && !extent.keep && X::kTasks > 1;
    if (!whole) memset(x, 0, sizeof(Real) * extent.rows * row);
    const Real* from[X::kTasks];
    for (int lane = 0; lane < work.count; ++lane) from[lane] = set.x + set.start(work.task[lane]) * in;
    long done = 0;
    if constexpr (X::kTasks == kWidth) {
      for (; whole && done + kWidth <= static_cast<long>(extent.rows) * in; done += kWidth) {
        Vec block[kWidth];
#pragma GCC unroll 16
        for (int lane = 0; lane < kWidth; ++lane) block[lane] = load(from[lane] + done);
        transpose_block(block);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) store(x + (done + i) * kWidth, block[i]);
      }
    }
    for (int lane = 0; lane < work.count; ++lane) {
      if (X::kElement > 1) {
        const long end = static_cast<long>(set.size(work.task[lane])) * in;
        for (long i = done; i < end; ++i) x[i * X::kElement + lane] = from[lane][i];
      } else {
        for (int r = 0; r < extent.rows; ++r) memcpy(x + r * row, from[0] + static_cast<long>(r) * in, sizeof(Real) * in);
      }
    }
  }

  void bind_targets(const RowSet<Real>& set, const Item& work, const Extent& extent, Real* targets, Real* scale) const {
    const Loss& loss = *call_.loss;
    const bool labels = loss.kind == LossKind::cross_entropy;
    const int out = call_.network->out_features();
    const long classes = X::class_stride(extent.rows);
    if (X::kTasks == 1 || extent.keep) {
      memset(targets, 0, sizeof(Real) * classes * (labels ? 1 : out));
      memset(scale, 0, sizeof(Real) * classes);
    }
    for (int lane = 0; lane < work.count; ++lane) {
      const std::int64_t first = set.start(work.task[lane]);
      const int rows = set.size(work.task[lane]);
      const Real* weights = set.weights ? set.weights + first : nullptr;
      Real* t = targets + lane;
      Real* s = scale + lane;
      Real total = 0;
      if (labels) {
        const std::int64_t* y = static_cast<const std::int64_t*>(set.y) + first;
        for (int r = 0; r < rows; ++r) {
          const bool counts = y[r] != loss.ignore_index;
          const Real weight = !counts ? Real(0) : weights ? weights[r] : Real(1);
          t[r * X::kElement] = Real(counts ? y[r] : 0);
          s[r * X::kElement] = weight;
          if (counts) total += loss.weight ? weight * Real(loss.weight[y[r]]) : weight;
        }
      } else {
        const Real* y = static_cast<const Real*>(set.y) + first * out;
        for (int r = 0; r < rows; ++r) {
          const Real weight = weights ? weights[r] : Real(1);
          for (int o = 0; o < out; ++o) t[o * classes + static_cast<long>(r) * X::kElement] = y[static_cast<long>(r) * out + o];
          s[r * X::kElement] = weight;
          total += weight;
        }
        total *= Real(out);
      }
      // A set that weighs nothing has loss 0 and no gradient.
      const Real share = total > 0 ? Real(1) / total : Real(0);
      for (int r = 0; r < rows; ++r) s[r * X::kElement] *= share;
    }
  }

  void write_predictions(const Item& work, const ItemSet& query, const Real* y) const {
    const int out = call_.network->out_features();
    const long classes = X::class_stride(query.extent.rows);
    for (int lane = 0; lane < work.count; ++lane) {
      Real* to = call_.predictions + call_.query.start(work.task[lane]) * out;
      for (int r = 0; r < call_.query.size(work.task[lane]); ++r)
        for (int o = 0; o < out; ++o) to[static_cast<long>(r) * out + o] = y[o * classes + static_cast<long>(r) * X::kElement + lane];
    }
  }

  // `computed` is false where no pass reached the inputs: the gradient is zero.
  void write_input_gradient(const Item& work, const RowSet<Real>& set, const ItemSet& bound, bool computed, Real* gradient) const {
    const int in = call_.network->in_features();
    const long row = X::stride(in);
    for (int lane = 0; lane < work.count; ++lane) {
      Real* to = gradient + set.start(work.task[lane]) * in;
      for (int r = 0; r < set.size(work.task[lane]); ++r)
        for (int c = 0; c < in; ++c)
          to[static_cast<long>(r) * in + c] =
              computed ? bound.dx[r * row + static_cast<long>(c) * X::kElement + lane] / Real(call_.tasks) : Real(0);
    }
  }

  // ---- gradients -----------------------------------------------------------------------------------------------

  // The sum over the lanes of an element of the totals.
  static Real element(const Real* p) {
    if constexpr (X::kElement == 1)
      return *p;
    else
      return sum_lanes(load(p));
  }

  void write_gradients(const Needs& needs, const Team& team) {
    const std::size_t size = totals_size();
    constexpr std::size_t slice = 8192;
    const auto add_chunks = [&](std::int64_t index, int) {
      const std::size_t begin = index * slice, end = begin + slice < size ? begin + slice : size;
      for (std::size_t chunk = 1; chunk < needs.chunks; ++chunk)
        for (std::size_t i = begin; i < end; i += kWidth)
          store(totals_ + i, load(totals_ + i) + load(totals_ + chunk * size + i));
    };
    if (needs.chunks == 0) memset(totals_ = workspaces_, 0, sizeof(Real) * size);
    const std::int64_t slices = static_cast<std::int64_t>((size + slice - 1) / slice);
    if (needs.chunks > 1) parallel(team, slices, add_chunks);
    const Real tasks = Real(call_.tasks > 0 ? call_.tasks : 1);
    for (int t = 0; call_.gradients && t < call_.network->tensor_count; ++t) {
      if (!call_.gradients[t]) continue;
      layout().elements(t, [&](std::size_t to, std::size_t place) {
        call_.gradients[t][to] = element(totals_ + place) / tasks;
      });
    }
    if (!call_.lr_gradient) return;
    const Real* sums = totals_ + gradient_size();
    for (int row = 0; row < call_.lr.rows; ++row) {
      Real* to = call_.lr_gradient + static_cast<std::size_t>(row) * call_.lr.columns;
      if (call_.lr.per_element)
        each_adapted([&](int t, std::size_t first) {
          layout().elements(t, [&](std::size_t index, std::size_t place) {
            to[first + index] = element(sums + row * layout().size + place) / tasks;
          });
        });
      else
        for (int c = 0; c < call_.lr.columns; ++c)
          to[c] = sum_lanes(load(sums + (static_cast<std::size_t>(row) * call_.lr.columns + c) * kWidth)) / tasks;
    }
  }

  const Call<Real>& call_;
  const Job job_;
  const Workspace<X> workspace_;
  Shared shared_{};
  Real* totals_ = nullptr;
  Real* workspaces_ = nullptr;
};

PYMETA_KERNEL_END
