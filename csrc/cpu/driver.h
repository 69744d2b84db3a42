// One call on one executor: pack the start, work through the chunks, sum and unpack the gradients.
//
// A chunk is a fixed run of items whose gradients are summed in order; the chunks' sums are then added in order.
// How many chunks there are depends on the call alone, never on the threads, and so does every bit of the result.
#pragma once

#include <string.h>

#include "../core/algorithms/job.h"
#include "cost.h"
#include "item_arrays.h"
#include "kernels.h"
#include "lanes.h"
#include "rows.h"
#include "stack_arrays.h"

PYMETA_KERNEL_BEGIN

template <class Body>
void parallel(const Team& team, std::int64_t count, Body body) {
  team.run(
      team, count,
      [](void* context, std::int64_t index, int worker) {
        (*static_cast<Body*>(context))(index, worker);
      },
      &body);
}

// How many tasks of an item lie one below the other, at most.
template <class X>
constexpr int most_stacked() {
  if constexpr (kStacks<X>)
    return X::kMostStacked;
  else
    return 1;
}

template <class X>
class Driver {
 public:
  static constexpr bool kSingleTasks = X::kTasks == 1;
  static constexpr int kMadeOf = 0;

  explicit Driver(const Call<Real>& call)
      : call_(call),
        workspace_(call, ~std::size_t{0}, most_stacked<X>()),
        binder_(call),
        count_(call.tasks),
        item_cost_(item_cost<X>(call, workspace_)),
        needs_(needs_of(call.tasks)) {}

  static bool suits(const Call<Real>&) { return true; }

  // Not all tasks of the call, but so many. Their first layer is not factored.
  void take(std::int64_t first, std::int64_t count, const Needs& needs) {
    first_task_ = first;
    count_ = count;
    needs_ = needs;
  }
  // Sums are added in the order of another executor from now on, whose needs these are (Needs::interleaved).
  void keep_order(const Needs& like) { needs_ = needs_of(call_.tasks, &like); }
  const Needs& needs() const { return needs_; }
  // Of so many tasks, in the order that `like` has, or null.
  Needs needs_of(std::int64_t tasks, const Needs* like = nullptr) const {
    Needs n{};
    n.factored = workspace_.factorable;
    n.start = sizeof(Real) * shared_size();
    n.sums = sizeof(Real) * sums_size();
    n.workspace = sizeof(Real) * workspace_.size;
    n.tasks_in_item = kStacks<X> ? 1 : X::kTasks;
    const std::int64_t count = items_of(tasks);
    if (like) {
      n.interleaved = like->tasks_in_item;
      n.items_in_chunk = like->items_in_chunk;
      n.chunks = like->ordered_chunks * static_cast<std::size_t>(n.interleaved);
    } else {
      // Few enough that summing them costs little, enough to balance the threads.
      std::int64_t most = n.sums ? static_cast<std::int64_t>((std::size_t{2} << 20) / n.sums) : 64;
      most = most < 8 ? 8 : most > 64 ? 64 : most;
      n.interleaved = 1;
      n.items_in_chunk = (count + most - 1) / most;
      n.chunks = static_cast<std::size_t>(
          n.items_in_chunk ? (count + n.items_in_chunk - 1) / n.items_in_chunk : 0);
    }
    n.ordered_chunks = n.chunks;
    n.shared =
        sizeof(Real) * (shared_size() + first_size()) + factors_bytes(n.items_in_chunk, count);
    n.cost = item_cost_ * static_cast<double>(kStacks<X> ? vectors_of(tasks) : count);
    return n;
  }

  void run(const Team& team, char* memory) {
    char* const sums = memory + needs_.shared;
    place(memory, sums, sums + needs_.sums * needs_.chunks, needs_.workspace, call_.packed_start);
    const std::int64_t chunks = static_cast<std::int64_t>(needs_.chunks);
    const std::int64_t in_chunk = needs_.items_in_chunk;
    const std::int64_t wave =
        in_chunk && has_factors() ? items_in_wave(in_chunk, items()) / in_chunk : chunks;
    for (std::int64_t first = 0; first < chunks; first += wave) {
      const std::int64_t begin = first * in_chunk;
      const std::int64_t end =
          (first + wave) * in_chunk < items() ? (first + wave) * in_chunk : items();
      if (has_factors()) project_inputs(team, begin, end);
      // A wave of all chunks may start with the longest ones.
      const std::int64_t* order = wave >= chunks ? call_.chunk_order : nullptr;
      parallel(team, first + wave < chunks ? wave : chunks - first,
               [&](std::int64_t index, int worker) {
                 work_through(order ? order[index] : first + index, begin, worker);
               });
      if (has_factors() && wants_gradient()) sum_factors(team, begin, end);
    }
    if (call_.is_stopped()) return;
    if (wants_gradient()) add_up(team, broadcast(call_.divisor()));
    write_sums();
  }

  // The steps of run(), for who runs two of these (mixed.h). Workspaces are `stride` bytes apart; `packed` is null or the start.
  void place(char* shared, char* sums, char* workspaces, std::size_t stride, const Real* packed) {
    Real* const own = reinterpret_cast<Real*>(shared);
    sums_ = reinterpret_cast<Real*>(sums);
    workspaces_ = reinterpret_cast<Real*>(workspaces);
    workspace_stride_ = stride / sizeof(Real);
    first_ = own + shared_size();
    factors_ = first_ + first_size();
    if (!packed) pack_shared(own);
    share(packed ? packed : own);
  }
  void work_through(std::int64_t chunk, std::int64_t wave_begin, int worker) {
    if (call_.is_stopped()) return;
    Real* memory = workspaces_ + worker * workspace_stride_;
    Real* sums = sums_ + chunk * sums_size();
    const Memory places{memory};
    const bool folded = workspace_.accumulated != kNowhere;
    Totals totals{folded ? places.at(workspace_.accumulated) : sums,
                  places.at(workspace_.lr_accumulated), true, layout().size};
    if (has_factors() && wants_gradient() && !all_factored()) {
      // Only the tasks that are not factored add to the first layer's sums here.
      const int first = call_.network->layers[0].weight;
      totals.clear = layout().tensors[first].place;
      memset(totals.gradient + totals.clear, 0, sizeof(Real) * layout().scalars(first));
    }
    if (lr_sums() > 0) memset(totals.lr_gradient, 0, sizeof(Real) * workspace_.lr_scalars(call_));
    const StopScope stop(call_.stop);
    InnerLoop<X> loop(call_, workspace_, shared_, Memory{memory});
    const std::int64_t interleaved = needs_.interleaved;
    const std::int64_t run = chunk / interleaved * needs_.items_in_chunk;
    for (std::int64_t i = run; i < run + needs_.items_in_chunk; ++i) {
      const std::int64_t index = i * interleaved + chunk % interleaved;
      if (index >= items() || call_.is_stopped()) break;
      process(index, index - wave_begin, loop, memory, totals);
      totals.fresh = false;
    }
    if (folded) fold(totals.gradient, gradient_sums(), sums);
    if (lr_sums() > 0) fold_rates(totals.lr_gradient, lr_sums_of(sums));
  }
  // The sums of all chunks, divided, to where those of the first were.
  void add_up(const Team& team, Vec divisor) {
    const std::size_t size = sums_size();
    if (needs_.chunks == 0) {  // no tasks: all sums are empty
      memset(sums_ = workspaces_, 0, sizeof(Real) * size);
      memset(first_, 0, sizeof(Real) * first_size());
    }
    constexpr std::size_t slice = 8192;
    parallel(team, static_cast<std::int64_t>((size + slice - 1) / slice),
             [&](std::int64_t index, int) {
               const std::size_t begin = index * slice,
                                 end = begin + slice < size ? begin + slice : size;
               if (needs_.chunks > 1) add_chunks(begin, end, size);
               for (std::size_t i = begin; divisor[0] != 1 && i < end; i += kWidth)
                 store(sums_ + i, load(sums_ + i) / divisor);
             });
    if (first_size() > 0) add_first(divisor);
  }
  // To these sums those of a last chunk, another executor's, before they are divided.
  template <class Other>
  void add_chunk(const Driver<Other>& other, Vec divisor) {
    for (int t = 0; t < call_.network->tensor_count; ++t) {
      const PackedTensor &own = layout().tensors[t], &theirs = other.layout().tensors[t];
      for (int p = 0; p < own.outer; ++p) {
        Real* to = sums_ + own.place / X::kElement + p * (own.row / X::kElement);
        const Real* from =
            other.sums_ + theirs.place / Other::kElement + p * (theirs.row / Other::kElement);
        int i = 0;
        for (; i + kWidth <= own.inner; i += kWidth)
          store(to + i, (load(to + i) + load(from + i)) / divisor);
        for (; i < own.inner; ++i) to[i] = (to[i] + from[i]) / divisor[0];
      }
    }
  }
  // The mean loss, and the gradients in torch's layout.
  void write_sums() const {
    if (call_.mean_loss) *call_.mean_loss = mean_loss();
    if (!wants_gradient()) return;
    for (int t = 0; call_.gradients && t < call_.network->tensor_count; ++t) {
      if (!call_.gradients[t] || call_.has_own_start(t)) continue;
      const bool apart = first_size() > 0 && t == call_.network->layers[0].weight;
      const PackedTensor& tensor = layout().tensors[t];
      unpack(tensor, apart ? first_ : sums_ + tensor.place / X::kElement, tensor.row / X::kElement,
             call_.gradients[t]);
    }
    if (lr_sums() > 0) write_rates(lr_sums_of(sums_));
  }
  bool wants_gradient() const { return call_.sums_gradients(); }

  // The start as run() packs it: needs().start bytes, which calls of the same network and recipe may share.
  void pack_shared(Real* memory) const {
    if (shared_size() == 0) return;  // and `memory` may be null
    if (X::kElement == 1) memset(memory, 0, sizeof(Real) * shared_size());  // the padding
    Real* transposed = memory + layout().size;
    Real* rates = transposed + layout().transposed_size;
    const Network& network = *call_.network;
    for (int t = 0; t < network.tensor_count; ++t)
      if (!call_.has_own_start(t)) pack(layout().tensors[t], call_.parameters[t], memory);
    for (int l = 0; l < network.layer_count; ++l) {
      const int t = network.layers[l].weight;
      if (layout().transposed[l] == kNowhere || call_.has_own_start(t)) continue;
      PackedTensor given = packed_transposed<X>(network.layers[l]);
      given.place = layout().transposed[l];
      if (given.outer > 0)
        pack(given, call_.parameters[t], transposed);
      else
        transpose_weight<X>(network.layers[l], memory + layout().tensors[t].place,
                            transposed + given.place);
    }
    for (int row = 0; call_.lr.per_element && row < call_.lr.rows; ++row) {
      const Real* from = call_.lr.values + static_cast<std::size_t>(row) * call_.lr.columns;
      for_adapted([&](int t, std::size_t first) {
        pack(layout().tensors[t], from + first, rates + row * layout().size);
      });
    }
    if (call_.corrections() > 0) fill_corrections(rates + workspace_.rate_scalars(call_));
  }

 private:
  template <class>
  friend class Driver;

  // How many of a run's parts have a task: the first ones.
  std::int64_t parts_of(std::size_t run) const {
    return items() - static_cast<std::int64_t>(run) * needs_.items_in_chunk * needs_.interleaved;
  }
  static std::int64_t items_of(std::int64_t tasks) { return (tasks + X::kTasks - 1) / X::kTasks; }
  // So many vectors or groups of tasks, of which an item has one, or a stack of several.
  static std::int64_t vectors_of(std::int64_t tasks) {
    constexpr std::int64_t of_one = X::kTasks / most_stacked<X>();
    return (tasks + of_one - 1) / of_one;
  }
  std::int64_t items() const { return items_of(count_); }
  Item<X> item(std::int64_t index) const {
    Item<X> item{};
    const std::int64_t vectors = vectors_of(count_), number = items();
    const std::int64_t of_one = X::kTasks / most_stacked<X>();
    const auto first = [&](std::int64_t i) { return first_task_ + i * vectors / number * of_one; };
    const std::int64_t all = first_task_ + count_, next = first(index + 1);
    const std::int64_t end = next < all ? next : all;
    for (std::int64_t i = first(index); i < end; ++i)
      item.task[item.count++] = call_.order ? call_.order[i] : i;
    return item;
  }

  const ParameterLayout<X>& layout() const { return workspace_.parameters; }
  std::size_t shared_size() const {
    Places places;
    places.take(layout().size + layout().transposed_size + workspace_.rate_scalars(call_) +
                2 * call_.corrections());
    return places.used;
  }

  // What a chunk leaves: its gradient sums and those of the learning rate, a scalar for each element (no lanes).
  std::size_t gradient_sums() const {
    if (!wants_gradient()) return 0;
    return (has_factors() && all_factored() ? layout().size_without_first : layout().size) /
           X::kElement;
  }
  std::size_t lr_sums() const {
    if (!call_.lr_gradient || call_.lr.per_task) return 0;
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

  // The factored first layer (core/layers/factored_linear.h): the tasks' Factors of a wave, and the gradient they make.
  bool has_factors() const { return workspace_.factorable && call_.job != Job::predict; }
  bool all_factored() const {
    return is_factored(*call_.network, call_.max_support) && !call_.support.has_weightless &&
           !call_.query.has_weightless;
  }
  std::size_t first_size() const {
    return has_factors() && wants_gradient() ? layout().scalars(call_.network->layers[0].weight)
                                             : 0;
  }
  std::size_t task_factors() const {
    return static_cast<std::size_t>(call_.max_query + call_.max_support) *
           X::stride(call_.network->layers[0].out.channels);
  }
  // A wave is a bounded number of items, in whole chunks.
  std::int64_t items_in_wave(std::int64_t in_chunk, std::int64_t items) const {
    const std::int64_t all = (items + in_chunk - 1) / in_chunk * in_chunk;
    if (!has_factors()) return all;
    const std::int64_t most =
        static_cast<std::int64_t>((std::size_t{32} << 20) / (sizeof(Real) * (task_factors() + 1)));
    const std::int64_t whole = most / in_chunk * in_chunk;
    return whole < in_chunk ? in_chunk : whole < all ? whole : all;
  }
  std::size_t factors_bytes(std::int64_t in_chunk, std::int64_t items) const {
    if (!has_factors() || in_chunk == 0) return 0;
    const std::size_t tasks = static_cast<std::size_t>(items_in_wave(in_chunk, items));
    const std::size_t bytes = tasks * (task_factors() * sizeof(Real) + 2 * sizeof(Segment));
    return (bytes + 63) / 64 * 64;
  }
  Factors factors_of(std::int64_t in_wave) const {
    Real* place = factors_ + in_wave * task_factors();
    return {place, place + call_.max_query * X::stride(call_.network->layers[0].out.channels)};
  }

  // ---- parameters ----------------------------------------------------------------------------------------------

  // Spreads a tensor in torch's layout over the packed one: the same for all lanes.
  void pack(const PackedTensor& tensor, const Real* from, Real* to) const {
    if constexpr (kStacks<X>) {
      X::pack(tensor, from, to + tensor.place);
    } else if constexpr (X::kElement > 1) {
      tensor.for_elements<X>(tensor.place, [&](std::size_t index, std::size_t place) {
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
  void share(const Real* packed) {
    const Real* transposed = packed + layout().size;
    const Real* rates = transposed + layout().transposed_size;
    shared_ = {packed, transposed, call_.lr.per_element ? rates : nullptr,
               call_.corrections() > 0 ? rates + workspace_.rate_scalars(call_) : nullptr};
  }

  // For step t (from 1) Adam's scale = sqrt(1 - b2^t) / (1 - b1^t) and eps sqrt(1 - b2^t).
  void fill_corrections(Real* to) const {
    double power1 = 1, power2 = 1;
    for (std::size_t t = 0; t < call_.corrections(); ++t, to += 2) {
      power1 *= call_.optimizer.beta1;
      power2 *= call_.optimizer.beta2;
      put_correction(call_.optimizer, power1, __builtin_sqrt(1 - power2), to);
    }
  }

  // body(tensor, index of its first element among all adapted elements)
  template <class Body>
  void for_adapted(Body body) const {
    std::size_t first = 0;
    for (int t = 0; t < call_.network->tensor_count; ++t) {
      if (!call_.adapted[t]) continue;
      body(t, first);
      first += layout().tensors[t].elements();
    }
  }

  // ---- tasks ---------------------------------------------------------------------------------------------------

  // The sum over the lanes of each of `count` elements.
  static void fold(const Real* from, std::size_t count, Real* to) {
    if (X::kElement == 1) {
      memcpy(to, from, sizeof(Real) * count);
      return;
    }
    if constexpr (kStacks<X>) return X::sum_tasks(from, count, to);
    std::size_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      Vec block[kWidth];
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) block[k] = load(from + (i + k) * kWidth);
      store(to + i, sums_of_lanes(block));
    }
    for (; i < count; ++i) to[i] = sum_lanes(load(from + i * kWidth));
  }
  void fold_rates(const Real* from, Real* to) const {
    if (call_.lr.per_element)
      fold(from, lr_sums(), to);
    else
      for (std::size_t i = 0; i < lr_sums(); ++i) to[i] = sum_lanes(load(from + i * kWidth));
  }

  void process(std::int64_t index, std::int64_t in_wave, InnerLoop<X>& loop, Real* memory,
               const Totals& totals) {
    const Item<X> work = item(index);
    if constexpr (kStacks<X>) {
      run_stack(call_, workspace_, loop, StackArrays<X>(call_, work, memory), totals);
    } else {
      ItemArrays<X> arrays(binder_, workspace_, shared_, memory, work, factors_of(in_wave));
      ItemJob<X, ItemArrays<X>>(call_, workspace_, shared_, Memory{memory}, loop, arrays, totals)
          .run();
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
      const int weight = call_.network->layers[0].weight;
      const int in = call_.network->layers[0].in.channels;
      const int out = call_.network->layers[0].out.channels;
      parallel(team, (end - begin + together - 1) / together, [&](std::int64_t index, int) {
        typename X::Projection sets[2 * together];
        int used = 0;
        for (std::int64_t i = index * together; i < (index + 1) * together && begin + i < end;
             ++i) {
          const std::int64_t task = begin + i;
          if (!is_factored_task(call_, task)) continue;
          const Factors factors = factors_of(i);
          sets[used++] = {{call_.support.x + call_.support.start(task) * in, in},
                          call_.support.size(task),
                          factors.support};
          if (call_.job == Job::meta)
            sets[used++] = {{call_.query.x + call_.query.start(task) * in, in},
                            call_.query.size(task),
                            factors.query};
        }
        X::project(in, out, sets, used, shared_.theta + layout().tensors[weight].place);
      });
    }
  }

  // After it: the first layer's gradient, Xq^T Dq + Xs^T F over the rows of all its tasks.
  void sum_factors(const Team& team, std::int64_t begin, std::int64_t end) {
    const int in = call_.network->layers[0].in.channels;
    const int out = call_.network->layers[0].out.channels;
    const long row = X::stride(out);
    Segment* segments = reinterpret_cast<Segment*>(factors_ + (end - begin) * task_factors());
    int used = 0;
    for (std::int64_t task = begin; task < end; ++task) {
      if (!is_factored_task(call_, task)) continue;
      const Factors factors = factors_of(task - begin);
      segments[used++] = {call_.query.x + call_.query.start(task) * in,
                          1,
                          in,
                          factors.query,
                          row,
                          kWidth,
                          call_.query.size(task)};
      if (call_.second_order())
        segments[used++] = {call_.support.x + call_.support.start(task) * in,
                            1,
                            in,
                            factors.support,
                            row,
                            kWidth,
                            call_.support.size(task)};
    }
    // Some input features and a few tasks at a time: the tasks' deltas fit the first-level cache, their inputs the second.
    constexpr int features = 192, together = 8;
    parallel(team, (in + features - 1) / features, [&](std::int64_t index, int) {
      const int first = static_cast<int>(index) * features;
      const int count = in - first < features ? in - first : features;
      if (begin == 0) memset(first_ + first * row, 0, sizeof(Real) * count * row);
      for (int s = 0; s < used; s += together) {
        const Product product{count,        X::vectors(out),
                              segments + s, used - s < together ? used - s : together,
                              nullptr,      0,
                              first};
        multiply<Rows>(product, accumulate(first_, row, first_, nullptr, 1));
      }
    });
  }

  // Between two places of them; `size` is that of a chunk.
  void add_chunks(std::size_t begin, std::size_t end, std::size_t size) const {
    const std::size_t together = static_cast<std::size_t>(needs_.interleaved);
    const std::size_t runs = needs_.chunks / together;
    for (std::size_t run = 0; run < runs; ++run) {
      const Real* from = sums_ + run * together * size;
      for (std::size_t i = begin; i < end; i += kWidth) {
        const Vec own =
            together == 1 ? load(from + i) : sum_of_parts(from + i, size, parts_of(run));
        store(sums_ + i, run == 0 ? own : load(sums_ + i) + own);
      }
    }
  }
  // Chunks that are parts of one, added as sum_lanes() adds the lanes whose tasks they have.
  static Vec sum_of_parts(const Real* from, std::size_t size, std::int64_t filled) {
    Vec parts[kWidth];
    for (int i = 0; i < kWidth; ++i) parts[i] = i < filled ? load(from + i * size) : zero();
    for (int half = kWidth / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) parts[i] = parts[i] + parts[i + half];
    return parts[0];
  }

  // The factored tasks' share of the first layer's gradient, and the share of those that were not factored.
  void add_first(Vec divisor) {
    const std::size_t place = layout().tensors[call_.network->layers[0].weight].place;
    for (std::size_t i = 0; i < first_size(); i += kWidth) {
      Vec sum = load(first_ + i) / divisor;
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
      for_adapted([&](int t, std::size_t first) {
        const PackedTensor& tensor = layout().tensors[t];
        unpack(tensor, sums + (row * layout().size + tensor.place) / X::kElement,
               tensor.row / X::kElement,
               call_.lr_gradient + static_cast<std::size_t>(row) * call_.lr.columns + first);
      });
  }

  const Call<Real>& call_;
  const Workspace<X> workspace_;
  const Binder<X> binder_;
  std::int64_t first_task_ = 0, count_;
  const double item_cost_;
  Needs needs_;
  Shared shared_{};
  Real* sums_ = nullptr;  // [chunks, sums_size]
  Real* workspaces_ = nullptr;
  std::size_t workspace_stride_ = 0;  // scalars
  Real* first_ = nullptr;             // [in, stride(out)] the factored first layer's gradient
  Real* factors_ = nullptr;           // [tasks of a wave] Factors, then the Segments that sum them
};

PYMETA_KERNEL_END
