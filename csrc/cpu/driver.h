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
  team.run(
      team.threads, count,
      [](void* context, std::int64_t index, int worker) {
        (*static_cast<Body*>(context))(index, worker);
      },
      &body);
}

template <class X>
class Driver {
 public:
  Driver(const Call<Real>& call, Job job) : call_(call), job_(job), workspace_(call) {}

  Needs needs() const {
    Needs n{};
    n.factored = workspace_.factorable;
    n.sums = sizeof(Real) * sums_size();
    n.workspace = sizeof(Real) * workspace_.size;
    const std::int64_t count = items();
    // Few enough that summing them costs little, enough to balance the threads.
    std::int64_t most = n.sums ? static_cast<std::int64_t>((std::size_t{2} << 20) / n.sums) : 64;
    most = most < 8 ? 8 : most > 64 ? 64 : most;
    const std::int64_t each = (count + most - 1) / most;
    n.chunks = static_cast<std::size_t>(each ? (count + each - 1) / each : 0);
    n.shared = sizeof(Real) * (shared_size() + first_size()) + factors_bytes(each);
    n.cost = cost() * static_cast<double>(count);
    return n;
  }

  void run(const Needs& needs, const Team& team, char* memory) {
    Real* shared = reinterpret_cast<Real*>(memory);
    sums_ = reinterpret_cast<Real*>(memory + needs.shared);
    workspaces_ = sums_ + sums_size() * needs.chunks;
    first_ = shared + shared_size();
    factors_ = first_ + first_size();
    pack_shared(shared);
    const std::int64_t chunks = static_cast<std::int64_t>(needs.chunks);
    const std::int64_t each = chunks ? (items() + chunks - 1) / chunks : 0;
    const std::int64_t wave = each ? items_in_wave(each) / each : 1;
    for (std::int64_t first = 0; first < chunks; first += wave) {
      const std::int64_t begin = first * each,
                         end = (first + wave) * each < items() ? (first + wave) * each : items();
      if (has_factors()) project_inputs(team, begin, end);
      parallel(team, first + wave < chunks ? wave : chunks - first,
               [&](std::int64_t index, int worker) {
                 work_through(first + index, each, begin, worker);
               });
      if (has_factors() && wants_gradient()) sum_factors(team, begin, end);
    }
    if (job_ == Job::meta && call_.mean_loss) *call_.mean_loss = mean_loss();
    if (wants_gradient()) write_gradients(needs, team);
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
  std::size_t rates_size() const {
    return call_.lr.per_element ? layout().size * call_.lr.rows : 0;
  }
  std::size_t shared_size() const {
    return layout().size + layout().transposed_size + rates_size();
  }
  bool wants_gradient() const { return job_ == Job::meta && call_.wants_gradient(); }

  // What a chunk leaves: its gradient sums and those of the learning rate, a scalar for each element (no lanes).
  std::size_t gradient_sums() const {
    if (!wants_gradient()) return 0;
    return (has_factors() && all_factored() ? layout().size_without_first : layout().size) /
           X::kElement;
  }
  std::size_t lr_sums() const {
    if (!call_.lr_gradient) return 0;
    return call_.lr.rows * (call_.lr.per_element ? layout().size / X::kElement
                                                 : static_cast<std::size_t>(call_.lr.columns));
  }
  std::size_t sums_size() const {
    Places places;
    places.take(gradient_sums());
    places.take(lr_sums());
    return places.used;
  }
  Real* lr_sums_of(Real* sums) const {
    Places places;
    places.take(gradient_sums());
    return sums + places.used;
  }

  // The factored first layer (core/factored.h): the tasks' Factors of a wave, and the gradient they make.
  bool has_factors() const { return workspace_.factorable && job_ != Job::predict; }
  bool all_factored() const { return is_factored(*call_.network, call_.max_support); }
  std::size_t first_size() const {
    return has_factors() && wants_gradient() ? layout().scalars(call_.network->layers[0].weight)
                                             : 0;
  }
  std::size_t task_factors() const {
    return static_cast<std::size_t>(call_.max_query + call_.max_support) *
           X::stride(call_.network->layers[0].out);
  }
  // A wave is a bounded number of items, in whole chunks.
  std::int64_t items_in_wave(std::int64_t each) const {
    const std::int64_t all = (items() + each - 1) / each * each;
    if (!has_factors()) return all;
    const std::int64_t most =
        static_cast<std::int64_t>((std::size_t{32} << 20) / (sizeof(Real) * (task_factors() + 1)));
    const std::int64_t whole = most / each * each;
    return whole < each ? each : whole < all ? whole : all;
  }
  std::size_t factors_bytes(std::int64_t each) const {
    if (!has_factors() || each == 0) return 0;
    const std::size_t tasks = static_cast<std::size_t>(items_in_wave(each));
    const std::size_t bytes = tasks * (task_factors() * sizeof(Real) + 2 * sizeof(Segment));
    return (bytes + 63) / 64 * 64;
  }
  Factors factors_of(std::int64_t in_wave) const {
    Real* place = factors_ + in_wave * task_factors();
    return {place, place + call_.max_query * X::stride(call_.network->layers[0].out)};
  }

  // Estimated cycles of one item: vector operations at a rate typical of the executor, plus a little for each call.
  double cost() const {
    const bool second = call_.second_order(), gradient = call_.wants_gradient();
    double work = 0;
    for (int l = 0; l < call_.network->layer_count; ++l) {
      const Layer& layer = call_.network->layers[l];
      if (layer.kind != LayerKind::linear) {
        work += 20.0 * (call_.max_support * call_.steps * (second ? 4 : 2) + call_.max_query * 2) *
                X::vectors(layer.out);
        continue;
      }
      const bool narrow = layout().narrow && l == call_.network->layer_count - 1;
      const double outputs = narrow ? layer.out : X::vectors(layer.out);
      const double forward =
          outputs * ((narrow ? X::vectors(layer.in) : layer.in) + X::kRowOverhead);
      const double passes = l > 0 ? 3 : 2, tangents = l > 0 ? 6 : 2;
      work += forward * (call_.max_support * static_cast<double>(call_.steps) *
                             (passes + (second ? tangents : 0)) +
                         call_.max_query * (gradient ? passes : 1));
    }
    const double bytes = static_cast<double>(workspace_.size) * sizeof(Real);
    return work / (bytes > kLargeWorkspace ? X::kCrowdedRate : X::kRate) + 600.0 * call_.steps;
  }
  static constexpr double kLargeWorkspace = 2e6;  // bytes: beyond a second-level cache

  // ---- parameters ----------------------------------------------------------------------------------------------

  std::size_t tensor_elements(int t) const {
    return static_cast<std::size_t>(layout().tensors[t].outer) * layout().tensors[t].inner;
  }

  // Spreads a tensor in torch's layout over the packed one: the same for all lanes.
  void pack(int t, const Real* from, Real* to) const {
    const PackedTensor& tensor = layout().tensors[t];
    if constexpr (X::kElement > 1) {
      layout().elements(t, [&](std::size_t index, std::size_t place) {
        store(to + place, broadcast(from[index]));
      });
    } else if (tensor.transposed) {
      transpose_matrix(tensor.inner, tensor.outer, from, tensor.outer, to + tensor.place,
                       tensor.row);
    } else {
      for (int p = 0; p < tensor.outer; ++p)
        memcpy(to + tensor.place + p * tensor.row,
               from + static_cast<std::size_t>(p) * tensor.inner, sizeof(Real) * tensor.inner);
    }
  }
  // The way back, from a tensor without lanes.
  void unpack(int t, const Real* from, Real* to) const {
    const PackedTensor& tensor = layout().tensors[t];
    const long row = tensor.row / X::kElement;
    if (tensor.transposed) {
      transpose_matrix(tensor.outer, tensor.inner, from, row, to, tensor.outer);
    } else {
      for (int p = 0; p < tensor.outer; ++p)
        memcpy(to + static_cast<std::size_t>(p) * tensor.inner, from + p * row,
               sizeof(Real) * tensor.inner);
    }
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
      if (layout().transposed[l] == kNowhere || is_per_task(layer.weight)) continue;
      for (int o = 0; o < layer.out; ++o)  // torch's own layout, with padded rows
        memcpy(transposed + layout().transposed[l] + o * X::stride(layer.in),
               call_.parameters[layer.weight] + static_cast<std::size_t>(o) * layer.in,
               sizeof(Real) * layer.in);
    }
    for (int row = 0; call_.lr.per_element && row < call_.lr.rows; ++row) {
      const Real* from = call_.lr.values + static_cast<std::size_t>(row) * call_.lr.columns;
      each_adapted(
          [&](int t, std::size_t first) { pack(t, from + first, rates + row * layout().size); });
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

  void work_through(std::int64_t chunk, std::int64_t each, std::int64_t wave_begin, int worker) {
    Real* memory = workspaces_ + worker * workspace_.size;
    Real* sums = sums_ + chunk * sums_size();
    const bool folded = workspace_.accumulated != kNowhere;
    Totals totals{folded ? memory + workspace_.accumulated : sums,
                  memory + workspace_.lr_accumulated, true, layout().size};
    if (has_factors() && wants_gradient() && !all_factored()) {
      // Only the tasks that are not factored add to the first layer's sums here.
      const int first = call_.network->layers[0].weight;
      totals.clear = layout().tensors[first].place;
      memset(totals.gradient + totals.clear, 0, sizeof(Real) * layout().scalars(first));
    }
    if (lr_sums() > 0) memset(totals.lr_gradient, 0, sizeof(Real) * workspace_.lr_scalars(call_));
    InnerLoop<X> loop(call_, workspace_, shared_, memory);
    const std::int64_t end = (chunk + 1) * each < items() ? (chunk + 1) * each : items();
    for (std::int64_t index = chunk * each; index < end; ++index) {
      process(index, index - wave_begin, loop, memory, totals);
      totals.fresh = false;
    }
    if (folded) fold(totals.gradient, gradient_sums(), sums);
    if (lr_sums() > 0) fold_rates(totals.lr_gradient, lr_sums_of(sums));
  }

  // The sum over the lanes of each of `count` elements.
  static void fold(const Real* from, std::size_t count, Real* to) {
    for (std::size_t i = 0; i < count; ++i)
      to[i] = X::kElement == 1 ? from[i] : sum_lanes(load(from + i * kWidth));
  }
  void fold_rates(const Real* from, Real* to) const {
    if (call_.lr.per_element)
      fold(from, lr_sums(), to);
    else
      for (std::size_t i = 0; i < lr_sums(); ++i) to[i] = sum_lanes(load(from + i * kWidth));
  }

  void process(std::int64_t index, std::int64_t in_wave, InnerLoop<X>& loop, Real* memory,
               const Totals& totals) {
    const Item work = item(index);
    if (job_ == Job::predict) return predict(work, loop, memory);
    const ItemSet support = bind(call_.support, workspace_.support_set, work, memory);
    if constexpr (X::kFactors) {
      if (workspace_.factorable && is_factored(*call_.network, support.extent.rows)) {
        const Layer& layer = call_.network->layers[0];
        FactoredLayer<X> first(layer, call_.adapted[layer.weight], workspace_.factored, memory,
                               factors_of(in_wave));
        loop.set_factored(&first);
        adapt_or_learn(work, loop, support, totals, memory);
        if (job_ == Job::adapt && wants_adapted(layer.weight) && call_.steps > 0) {
          Real* w = memory + workspace_.theta + layout().tensors[layer.weight].place;
          first.materialise(support.x, shared_.theta + layout().tensors[layer.weight].place, w);
          write_adapted(work, layer.weight, w);
        }
        loop.set_factored(nullptr);
        return;
      }
    }
    adapt_or_learn(work, loop, support, totals, memory);
  }

  void predict(const Item& work, InnerLoop<X>& loop, Real* memory) {
    const ItemSet query = bind(call_.query, workspace_.query_set, work, memory);
    Real* theta = memory + workspace_.theta;
    for (int t = 0; t < call_.network->tensor_count; ++t) {
      if (!is_per_task(t)) continue;
      memset(theta + layout().tensors[t].place, 0,
             sizeof(Real) * layout().scalars(t));  // the padding
      layout().elements(t, [&](std::size_t from, std::size_t place) {
        for (int lane = 0; lane < work.count; ++lane)
          theta[place + lane] = call_.parameters[t][work.task[lane] * tensor_elements(t) + from];
      });
    }
    loop.evaluate({&loop, theta, nullptr}, query);
    write_predictions(work, query, loop.outputs());
  }

  bool wants_adapted(int t) const { return call_.adapted[t] && call_.adapted_parameters[t]; }

  void write_adapted(const Item& work, int t, const Real* from) const {
    const std::size_t place = layout().tensors[t].place;
    layout().elements(t, [&](std::size_t to, std::size_t at) {
      for (int lane = 0; lane < work.count; ++lane)
        call_.adapted_parameters[t][work.task[lane] * tensor_elements(t) + to] =
            from[at - place + lane];
    });
  }

  void adapt_or_learn(const Item& work, InnerLoop<X>& loop, const ItemSet& support,
                      const Totals& totals, Real* memory) {
    if (job_ == Job::adapt) {
      const auto theta = loop.adapt(support);
      for (int t = 0; t < call_.network->tensor_count; ++t) {
        if (wants_adapted(t)) write_adapted(work, t, theta.tensor(t));
      }
      return;
    }
    const ItemSet query = bind(call_.query, workspace_.query_set, work, memory);
    const Vec loss = loop.meta_gradient(support, query, totals);
    for (int lane = 0; lane < work.count; ++lane) call_.losses[work.task[lane]] = loss[lane];
    if (call_.predictions) write_predictions(work, query, loop.outputs());
    if (call_.xs_gradient)
      write_input_gradient(work, call_.support, support, call_.second_order(), call_.xs_gradient);
    if (call_.xq_gradient) write_input_gradient(work, call_.query, query, true, call_.xq_gradient);
  }

  ItemSet bind(const RowSet<Real>& set, const SetLayout& places, const Item& work,
               Real* memory) const {
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
    for (int lane = 0; lane < work.count; ++lane)
      from[lane] = set.x + set.start(work.task[lane]) * in;
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
        for (int r = 0; r < extent.rows; ++r)
          memcpy(x + r * row, from[0] + static_cast<long>(r) * in, sizeof(Real) * in);
      }
    }
  }

  void bind_targets(const RowSet<Real>& set, const Item& work, const Extent& extent, Real* targets,
                    Real* scale) const {
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
          for (int o = 0; o < out; ++o)
            t[o * classes + static_cast<long>(r) * X::kElement] = y[static_cast<long>(r) * out + o];
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
        for (int o = 0; o < out; ++o)
          to[static_cast<long>(r) * out + o] =
              y[o * classes + static_cast<long>(r) * X::kElement + lane];
    }
  }

  // `computed` is false where no pass reached the inputs: the gradient is zero.
  void write_input_gradient(const Item& work, const RowSet<Real>& set, const ItemSet& bound,
                            bool computed, Real* gradient) const {
    const int in = call_.network->in_features();
    const long row = X::stride(in);
    for (int lane = 0; lane < work.count; ++lane) {
      Real* to = gradient + set.start(work.task[lane]) * in;
      for (int r = 0; r < set.size(work.task[lane]); ++r)
        for (int c = 0; c < in; ++c)
          to[static_cast<long>(r) * in + c] =
              computed ? bound.dx[r * row + static_cast<long>(c) * X::kElement + lane] /
                             Real(call_.tasks)
                       : Real(0);
    }
  }

  Real mean_loss() const {
    double sum = 0;
    for (std::int64_t task = 0; task < call_.tasks; ++task)
      sum += static_cast<double>(call_.losses[task]);
    return call_.tasks > 0 ? static_cast<Real>(sum / static_cast<double>(call_.tasks)) : Real(0);
  }

  // ---- gradients -----------------------------------------------------------------------------------------------

  // Before a wave: X W0 of its tasks (which are items here), a few tasks at a time.
  void project_inputs(const Team& team, std::int64_t begin, std::int64_t end) {
    if constexpr (X::kFactors) {
      constexpr std::int64_t together = 8;
      const Layer& layer = call_.network->layers[0];
      parallel(team, (end - begin + together - 1) / together, [&](std::int64_t index, int) {
        typename X::Projection sets[2 * together];
        int used = 0;
        for (std::int64_t i = index * together; i < (index + 1) * together && begin + i < end;
             ++i) {
          const std::int64_t task = begin + i;
          if (!is_factored(*call_.network, call_.support.size(task))) continue;
          const Factors factors = factors_of(i);
          sets[used++] = {{call_.support.x + call_.support.start(task) * layer.in, layer.in},
                          call_.support.size(task),
                          factors.support};
          if (job_ == Job::meta)
            sets[used++] = {{call_.query.x + call_.query.start(task) * layer.in, layer.in},
                            call_.query.size(task),
                            factors.query};
        }
        X::project(layer, sets, used, shared_.theta + layout().tensors[layer.weight].place);
      });
    }
  }

  // After it: the first layer's gradient, Xq^T Dq + Xs^T F over the rows of all its tasks.
  void sum_factors(const Team& team, std::int64_t begin, std::int64_t end) {
    const Layer& layer = call_.network->layers[0];
    const long row = X::stride(layer.out);
    Segment* segments = reinterpret_cast<Segment*>(factors_ + (end - begin) * task_factors());
    int used = 0;
    for (std::int64_t task = begin; task < end; ++task) {
      if (!is_factored(*call_.network, call_.support.size(task))) continue;
      const Factors factors = factors_of(task - begin);
      segments[used++] = {call_.query.x + call_.query.start(task) * layer.in,
                          1,
                          layer.in,
                          factors.query,
                          row,
                          kWidth,
                          call_.query.size(task)};
      if (call_.second_order())
        segments[used++] = {call_.support.x + call_.support.start(task) * layer.in,
                            1,
                            layer.in,
                            factors.support,
                            row,
                            kWidth,
                            call_.support.size(task)};
    }
    // Some input features and a few tasks at a time: the tasks' deltas fit the first-level cache, their inputs the second.
    constexpr int features = 192, together = 8;
    parallel(team, (layer.in + features - 1) / features, [&](std::int64_t index, int) {
      const int first = static_cast<int>(index) * features;
      const int count = layer.in - first < features ? layer.in - first : features;
      if (begin == 0) memset(first_ + first * row, 0, sizeof(Real) * count * row);
      for (int s = 0; s < used; s += together) {
        const Product product{count,        X::vectors(layer.out),
                              segments + s, used - s < together ? used - s : together,
                              nullptr,      0,
                              first};
        multiply<Rows>(product, Accumulate{first_, row, first_, nullptr, broadcast(1)});
      }
    });
  }

  void write_gradients(const Needs& needs, const Team& team) {
    const std::size_t size = sums_size();
    if (needs.chunks == 0) {  // no tasks: all sums are empty
      memset(sums_ = workspaces_, 0, sizeof(Real) * size);
      memset(first_, 0, sizeof(Real) * first_size());
    }
    const Vec tasks = broadcast(Real(call_.tasks > 0 ? call_.tasks : 1));
    constexpr std::size_t slice = 8192;
    parallel(team, static_cast<std::int64_t>((size + slice - 1) / slice),
             [&](std::int64_t index, int) {
               const std::size_t begin = index * slice,
                                 end = begin + slice < size ? begin + slice : size;
               for (std::size_t i = begin; i < end; i += kWidth) {
                 Vec sum = load(sums_ + i);
                 for (std::size_t chunk = 1; chunk < needs.chunks; ++chunk)
                   sum = sum + load(sums_ + chunk * size + i);
                 store(sums_ + i, sum / tasks);
               }
             });
    if (first_size() > 0) add_first(tasks);
    for (int t = 0; call_.gradients && t < call_.network->tensor_count; ++t) {
      if (!call_.gradients[t]) continue;
      const bool apart = first_size() > 0 && t == call_.network->layers[0].weight;
      unpack(t, apart ? first_ : sums_ + layout().tensors[t].place / X::kElement,
             call_.gradients[t]);
    }
    if (call_.lr_gradient) write_rates(lr_sums_of(sums_));
  }

  // The factored tasks' share of the first layer's gradient, and the share of those that were not factored.
  void add_first(Vec tasks) {
    const std::size_t place = layout().tensors[call_.network->layers[0].weight].place;
    for (std::size_t i = 0; i < first_size(); i += kWidth) {
      Vec sum = load(first_ + i) / tasks;
      if (!all_factored()) sum = sum + load(sums_ + place + i);
      store(first_ + i, sum);
    }
  }

  void write_rates(const Real* sums) const {
    if (!call_.lr.per_element) {
      memcpy(call_.lr_gradient, sums, sizeof(Real) * lr_sums());
      return;
    }
    for (int row = 0; row < call_.lr.rows; ++row)
      each_adapted([&](int t, std::size_t first) {
        unpack(t, sums + (row * layout().size + layout().tensors[t].place) / X::kElement,
               call_.lr_gradient + static_cast<std::size_t>(row) * call_.lr.columns + first);
      });
  }

  const Call<Real>& call_;
  const Job job_;
  const Workspace<X> workspace_;
  Shared shared_{};
  Real* sums_ = nullptr;  // [chunks, sums_size]
  Real* workspaces_ = nullptr;
  Real* first_ = nullptr;    // [in, stride(out)] the factored first layer's gradient
  Real* factors_ = nullptr;  // [tasks of a wave] Factors, then the Segments that sum them
};

PYMETA_KERNEL_END
