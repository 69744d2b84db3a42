#include "planner.h"

#include <algorithm>
#include <new>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "../core/optimizers/rates.h"
#include "registry.h"

namespace pymeta {
namespace {

// Below this much work (about ten microseconds) waking a second thread costs more than it saves.
constexpr double kSmallWork = 5e4;

// What earlier plans of this thread left. A call within a call (of a signal's handler) takes others.
thread_local std::vector<PlanMemory> idle_memory;
constexpr std::size_t kMostIdle = 16;  // plans that were kept for long may be many

PlanMemory take_plan_memory(std::size_t bytes) {
  for (PlanMemory& memory : idle_memory)
    if (memory.bytes >= bytes) {
      PlanMemory taken = std::move(memory);
      memory = std::move(idle_memory.back());
      idle_memory.pop_back();
      return taken;
    }
  return {std::unique_ptr<char[]>(new char[bytes]), bytes};
}
void give_plan_memory(PlanMemory memory) {
  if (!memory.data || idle_memory.size() >= kMostIdle) return;
  try {
    idle_memory.push_back(std::move(memory));
  } catch (const std::bad_alloc&) {  // then it is not kept
  }
}

// A bit for each array: is there one?
template <class... Arrays>
unsigned which(const Arrays*... arrays) {
  static_assert(sizeof...(arrays) <= 32, "more arrays than bits");
  unsigned bits = 0;
  ((bits = bits << 1 | (arrays != nullptr)), ...);
  return bits;
}
template <class Array>
std::bitset<kMaxTensors> which_tensors(const Network& network, Array* const* arrays) {
  std::bitset<kMaxTensors> bits;
  for (int t = 0; arrays && t < network.tensor_count; ++t) bits[t] = arrays[t] != nullptr;
  return bits;
}

// Sums of all chunks together, for an executor that keeps the order of another one.
constexpr std::size_t kMostSums = std::size_t{64} << 20;

// Estimated cycles on so many threads: a chunk is one thread's, and the longest one begins first.
double time_of(const Needs& needs, int threads) {
  const double chunks = static_cast<double>(std::max<std::size_t>(needs.chunks, 1));
  const double rounds = static_cast<double>((needs.chunks + static_cast<std::size_t>(threads) - 1) /
                                            static_cast<std::size_t>(threads));
  if (needs.longest > 0) return std::max(needs.cost / threads, needs.longest);
  return needs.cost * std::max(rounds, 1.0) / chunks;
}

// Tasks of like size side by side, so that a vector of tasks wastes little. Only the sizes decide.
template <class Real>
std::vector<std::int64_t> tasks_by_size(const Call<Real>& call) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(call.tasks));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    const int sa = call.support.size(a), sb = call.support.size(b);
    return sa != sb ? sa < sb : call.query.size(a) < call.query.size(b);
  });
  return order;
}

// The longest chunks first, so that none is left for the end. Sums are added in the chunks' own order.
template <class Real>
std::vector<std::int64_t> longest_first(const Call<Real>& call, const Needs& needs) {
  std::vector<std::int64_t> rows(needs.chunks, 0), order(needs.chunks);
  const std::int64_t width = needs.tasks_in_item;
  for (std::int64_t i = 0; i < call.tasks; ++i) {
    const std::int64_t task = call.order ? call.order[i] : i;
    const std::int64_t item = i / width, in_run = item / needs.interleaved;
    const std::int64_t chunk =
        in_run / needs.items_in_chunk * needs.interleaved + item % needs.interleaved;
    rows[static_cast<std::size_t>(chunk)] +=
        call.support.size(task) *
            std::max<std::int64_t>(call.steps_of(call.support.size(task)), 1) +
        call.query.size(task);
  }
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return rows[static_cast<std::size_t>(a)] > rows[static_cast<std::size_t>(b)];
  });
  return order;
}

}  // namespace

template <class Real>
CallForm<Real>::CallForm(const Call<Real>& call, bool on_device)
    : support_(of_set(call.support, call.max_support)),
      query_(of_set(call.query, call.max_query)),
      validation_(of_set(call.validation, call.max_validation)),
      given_(which(call.losses, call.step_losses, call.mean_loss, call.predictions, call.statistics,
                   call.gradients, call.lr_gradient, call.xs_gradient, call.xq_gradient,
                   call.ys_gradient, call.yq_gradient, call.support_weights_gradient,
                   call.query_weights_gradient, call.support_offset_gradient,
                   call.query_offset_gradient, call.anchors_gradient, call.adapted_parameters,
                   call.status, call.train_curves, call.validation_curves, call.best_epochs,
                   call.epochs_run, call.cotangents.losses, call.cotangents.predictions,
                   call.cotangents.adapted, call.cotangents.step_losses)),
      rates_are_near_one_(!on_device && !call.lr.is_spread() && rates_are_near_one(call)),
      gradients_(which_tensors(*call.network, call.gradients)),
      adapted_(which_tensors(*call.network, call.adapted_parameters)),
      cotangents_(which_tensors(*call.network, call.cotangents.adapted)) {}

template <class Real>
typename CallForm<Real>::OfSet CallForm<Real>::of_set(const RowSet<Real>& set, int largest) {
  return {largest, set.has_weightless, set.weight_columns, set.loss,
          which(set.x, static_cast<const char*>(set.y), set.weights, set.offset)};
}

template <class Real>
bool CallForm<Real>::OfSet::operator==(const OfSet& other) const {
  return largest == other.largest && has_weightless == other.has_weightless &&
         weight_columns == other.weight_columns && loss == other.loss && given == other.given;
}

template <class Real>
bool CallForm<Real>::operator==(const CallForm& other) const {
  return support_ == other.support_ && query_ == other.query_ && validation_ == other.validation_ &&
         given_ == other.given_ && rates_are_near_one_ == other.rates_are_near_one_ &&
         gradients_ == other.gradients_ && adapted_ == other.adapted_ &&
         cotangents_ == other.cotangents_;
}

template class CallForm<float>;
template class CallForm<double>;

template <class Real>
Plan<Real>::Plan(Call<Real>& call)
    : call_(call),
      kernels_(kernels<Real>()),  // once: another thread may choose others meanwhile
      chosen_(chosen_executor()),
      form_(call) {
  Candidate best = chosen_ >= 0 ? planned(kernels_.executors[chosen_]) : cheapest();
  const bool small = best.needs->cost < kSmallWork;
  if (!small) most_threads_ = num_threads();
  const int threads = small ? 1 : most_threads_;
  const std::int64_t most_chunks = std::min<std::int64_t>(threads, call.tasks);
  const bool idles = static_cast<std::int64_t>(best.needs->chunks) < most_chunks ||
                     best.needs->longest > best.needs->cost / threads;
  if (chosen_ < 0 && threads > 1 && idles) best = quickest(best, threads);
  executor_ = best.executor;
  needs_ = best.needs;
  plan_ = best.plan;
  const std::int64_t most = std::max<std::int64_t>(1, static_cast<std::int64_t>(needs_->chunks));
  threads_ = static_cast<int>(std::min<std::int64_t>(threads, most));
  drop_others();
}

template <class Real>
Plan<Real>::~Plan() {
  for (int i = 0; i < planned_count_; ++i) give_plan_memory(std::move(storage_[i]));
}

// The plans that lost. What the chosen one is made of are the first executors.
template <class Real>
void Plan<Real>::drop_others() {
  const ExecutorTable<Real>* const end = kernels_.executors + executor_->made_of;
  for (int i = 0; i < planned_count_; ++i)
    if (planned_[i].executor != executor_ && planned_[i].executor >= end)
      give_plan_memory(std::move(storage_[i]));
}

template <class Real>
bool Plan<Real>::fits() const {
  return &kernels_ == &kernels<Real>() && chosen_ == chosen_executor() &&
         (most_threads_ == 0 || most_threads_ == num_threads()) && form_ == CallForm<Real>(call_);
}

// Laid out when it is first asked for.
template <class Real>
typename Plan<Real>::Candidate Plan<Real>::planned(const ExecutorTable<Real>& executor) {
  for (int i = 0; i < planned_count_; ++i)
    if (planned_[i].executor == &executor) return planned_[i];
  void* parts[kMostPlans];
  if (executor.made_of > kMostPlans) throw std::length_error("more plans than a call weighs");
  for (int i = 0; i < executor.made_of; ++i) parts[i] = planned(kernels_.executors[i]).plan;
  if (planned_count_ == kMostPlans) throw std::length_error("more plans than a call weighs");
  PlanMemory& memory = storage_[planned_count_++];
  memory = take_plan_memory(executor.plan_bytes + 64);
  const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(memory.data.get());
  Candidate candidate{&executor, nullptr, memory.data.get() + (64 - at % 64)};
  candidate.needs = executor.plan(call_, candidate.plan, parts);
  planned_[planned_count_ - 1] = candidate;
  return candidate;
}

template <class Real>
typename Plan<Real>::Candidate Plan<Real>::cheapest() {
  Candidate best = planned(kernels_.executors[0]);
  for (int i = 1; i < kernels_.executor_count; ++i) {
    // A factored task's bits must not depend on how many tasks come with it.
    if (call_.tasks <= 1 || best.needs->factored) break;
    if (!kernels_.executors[i].suits(call_)) continue;
    const Candidate other = planned(kernels_.executors[i]);
    if (other.needs->cost < best.needs->cost) best = other;
  }
  return best;
}

// Of all that have the same bits.
template <class Real>
typename Plan<Real>::Candidate Plan<Real>::quickest(const Candidate& cheapest, int threads) {
  const bool has_sums = cheapest.needs->sums > 0;
  // The gradient of a rate that many elements share is summed over them in an order of the executor's own.
  if (cheapest.needs->factored || (has_sums && call_.lr_gradient && !call_.lr.per_element))
    return cheapest;
  if (has_sums && cheapest.needs->tasks_in_item == 1) return cheapest;
  Candidate best = cheapest;
  for (int i = 0; i < kernels_.executor_count; ++i) {
    const ExecutorTable<Real>& executor = kernels_.executors[i];
    if (&executor == cheapest.executor || !executor.suits(call_)) continue;
    if (has_sums && !executor.keep_order) continue;
    Candidate other = planned(executor);
    if (has_sums) other.needs = executor.keep_order(other.plan, *cheapest.needs);
    if (other.needs->sums * other.needs->chunks > kMostSums) continue;
    if (time_of(*other.needs, threads) < time_of(*best.needs, threads)) best = other;
  }
  return best;
}

template <class Real>
void Plan<Real>::order() {
  call_.order = call_.chunk_order = nullptr;
  const bool ragged = call_.support.sizes || call_.query.sizes;
  if (!ragged) return;
  if (needs_->tasks_in_item > 1 || needs_->interleaved > 1) {
    order_ = tasks_by_size(call_);
    call_.order = order_.data();
  }
  if (threads_ > 1 && needs_->chunks > 1) {
    chunk_order_ = longest_first(call_, *needs_);
    call_.chunk_order = chunk_order_.data();
  }
}

template class Plan<float>;
template class Plan<double>;

}  // namespace pymeta
