// The inner loop: adapt a start to a support set.
//
// MAML (Finn, Abbeel, Levine 2017, algorithm 1), for one item of an executor X:
//
//   theta[0] = start;  theta[k+1] = theta[k] - lr[k] d[k],  d[k] = g[k] = dL_support/dtheta at theta[k] in plain SGD,
//                      and what the optimiser's rule makes of it in general (optimizers/step.h)
//
// Reptile (Nichol, Achiam, Schulman 2018) is the same, and keeps theta[0] - theta[K]; fine_tune.h goes on by epochs, and
// meta_gradient.h goes the way back.
#pragma once

#include "passes.h"

PYMETA_KERNEL_BEGIN

constexpr int kLastStep = 1 << 30;  // beyond all rows of parameters for each step

template <class X>
class InnerLoop {
 public:
  using Parameters = typename State<X>::Parameters;
  using Tape = typename State<X>::Tape;

  PYMETA_FN InnerLoop(const Call<Real>& call, const Workspace<X>& workspace, const Shared& shared,
                      const Memory& memory)
      : state_(call, workspace, shared, memory) {}

  PYMETA_FN const State<X>& state() const { return state_; }
  PYMETA_FN Parameters start() const { return state_.start(); }

  // The item's first layer, where it is a factored one; null otherwise.
  PYMETA_FN void set_factored(FactoredLinear<X>* layer) { state_.factored = layer; }

  // The item's tasks, where it has several one below the other.
  PYMETA_FN void set_stack(const Stack* stack) { state_.stack = stack; }

  // The strength of each task's pull towards its start; where the call has none, 0.
  PYMETA_FN void set_anchor(Vec anchor) { state_.anchor = anchor; }

  // Before the first step, where they are asked for.
  PYMETA_FN PYMETA_NOINLINE void clear_statistics() const {
    Real* to = state_.memory.at(state_.ws.statistics);
    X::for_vectors(StatisticsLayout<X>(state_.network).size,
                   [=](std::size_t i) { store(to + i, zero()); });
  }

  // K inner steps; returns theta[K]. batches.step(k) says what step k works on.
  template <class Batches>
  PYMETA_FN Parameters adapt(Batches& batches) {
    Parameters theta = start();
    loss_sum_ = zero();
    for (int k = 0; k < state_.call.steps && !state_.call.is_stopped(); ++k)
      theta = step(k, theta, batches.step(k));
    return theta;
  }
  // The mean over the steps of each task's loss while they ran.
  PYMETA_FN Vec mean_step_loss() const {
    const int steps = state_.call.steps;
    return steps > 0 ? loss_sum_ / broadcast(Real(steps)) : zero();
  }

  // The summed losses of the steps since the last reset: the mean of an epoch is over rows, so there each step's counts as
  // many times as it has rows.
  PYMETA_FN void reset_losses() { loss_sum_ = zero(); }
  PYMETA_FN Vec loss_sum() const { return loss_sum_; }

  PYMETA_FN PYMETA_NOINLINE Parameters step(int k, const Parameters& theta, const Step& now) {
    const State<X>& s = state_;
    const ItemSet& support = *now.set;
    const Tape tape = s.support_tape(k);
    const Passes<X> passes(s, support, tape, /*is_query=*/false, k);
    // Layers below the lowest that changes see the same rows with the same weights again. In second order deltas go further down.
    const bool overwritten = s.call.second_order() && s.ws.support_tape.replaces_outputs;
    const bool same_below = now.same_rows && !s.ws.keeps_steps && !overwritten;
    passes.forward(theta, same_below ? s.lowest_adapted : 0);
    if (extra<X>(s.ws.sums_losses)) add_loss(now, tape);
    if (extra<X>(s.ws.statistics != kNowhere)) add_statistics(k, passes, theta, now);
    const Parameters next = s.adapted(k + 1);
    Real* own = const_cast<Real*>(next.own);
    passes.backward(
        theta,
        [&](int t) {
          if (!s.call.adapted[t]) return Sink{};
          const std::size_t place = s.layout.tensors[t].place;
          if (extra<X>(s.ws.stores_gradient)) return Sink{s.gradient(k) + place};
          return Sink{own + place, theta.tensor(t), nullptr, -s.rates.rate(k, t)};
        },
        /*input_delta=*/false, s.call.second_order() ? 0 : s.lowest_adapted);
    if constexpr (X::kFactors)
      if (s.factored) s.factored->step(tape.d(0), s.rates.uniform_rate(k));
    if (extra<X>(s.ws.stores_gradient)) follow_rule(k, theta, now, own);
    if constexpr (!kStacks<X>) s.transpose(own, const_cast<Real*>(next.own_transposed));
    if (s.ws.saves_steps) save(k, next);
    return next;
  }

  // Where steps are kept elsewhere than they are used: theta[k] and the tape of step k, back where they are used.
  PYMETA_FN PYMETA_NOINLINE void restore(int k) const {
    const State<X>& s = state_;
    if (k > 0) {
      X::copy(s.memory.at(s.ws.theta), saved(k - 1), s.layout.size);
      X::copy(s.memory.at(s.ws.theta_transposed), saved(k - 1) + s.layout.size,
              s.layout.transposed_size);
    }
    if (k < s.call.steps - 1)
      X::copy(s.memory.at(s.ws.support), saved(k) + s.layout.size + s.layout.transposed_size,
              s.ws.support_tape.size);
  }

  // [parameters] of memory that nobody reads while step k is reversed: that of theta[k + 1].
  PYMETA_FN Real* spare(int k) const {
    const State<X>& s = state_;
    return s.ws.saves_steps ? saved(k) : const_cast<Real*>(s.adapted(k + 1).own);
  }

  // Adds start - theta to the totals, each task's at most as long as the call's clip.
  PYMETA_FN PYMETA_NOINLINE void add_difference(const Parameters& theta,
                                                const Totals& totals) const {
    const State<X>& s = state_;
    const bool clips = s.call.task_clip > 0;
    const Vec factor = clips ? difference_factor(theta) : broadcast(1);
    for (int t = 0; t < s.network.tensor_count; ++t) {
      const std::size_t place = s.layout.tensors[t].place;
      const Real *from = start().tensor(t), *to = theta.tensor(t);
      X::for_vectors(s.layout.scalars(t), [&](std::size_t i) {
        const Real* base = totals.base(place + i);
        const Vec whole = load(from + i) - load(to + i);
        const Vec difference = clips ? factor * whole : whole;
        store(totals.gradient + place + i, base ? load(base) + difference : difference);
      });
    }
  }

  // Forward pass: outputs() holds the raw outputs, class-major; returns the loss of each task, if there are targets. What has
  // rows for each step is as in `step`, the last one unless another is given.
  PYMETA_FN PYMETA_NOINLINE Vec evaluate(const Parameters& theta, const ItemSet& query,
                                         int step = kLastStep) const {
    const Tape tape = state_.query_tape();
    Passes<X>(state_, query, tape, /*is_query=*/true, step).forward(theta);
    return query.targets ? X::sum_rows_in_order(query.extent, tape.at(tape.layout->row_losses))
                         : zero();
  }
  PYMETA_FN const Real* outputs() const {
    return state_.memory.at(state_.ws.query) + state_.ws.query_tape.y;
  }

 private:
  // theta[k + 1] from the gradient that step k has stored.
  PYMETA_FN PYMETA_NOINLINE void follow_rule(int k, const Parameters& theta, const Step& now,
                                             Real* own) const {
    const State<X>& s = state_;
    const StepCommon common = s.step_common(k, theta, now);
    with_rule(s.call.optimizer, [&](const auto& rule) {
      s.for_adapted([&](int t, std::size_t place, std::size_t size) {
        if (!s.is_factored_tensor(t))
          take_step<X>(rule, s.step_arrays(k, t, theta), common, size, own + place);
      });
    });
  }
  // By what a task's way from the start is scaled.
  PYMETA_FN PYMETA_NOINLINE Vec difference_factor(const Parameters& theta) const {
    const State<X>& s = state_;
    Vec sum = zero();
    for (int t = 0; t < s.network.tensor_count; ++t) {
      const Real *from = start().tensor(t), *to = theta.tensor(t);
      sum = X::sum_elements(s.layout.tensors[t], sum, [=](std::size_t at) {
        const Vec difference = load(from + at) - load(to + at);
        return difference * difference;
      });
    }
    return s.share_factor(sum);
  }

  PYMETA_FN void add_loss(const Step& now, const Tape& tape) {
    const Extent& extent = now.set->extent;
    const Vec loss = X::sum_rows_in_order(extent, tape.at(tape.layout->row_losses));
    loss_sum_ = loss_sum_ + (state_.call.job == Job::fine_tune
                                 ? select(now.active, loss * now.set->rows, zero())
                                 : loss);
  }

  // The statistics of step k to the sums of the steps that share a row; `clear_statistics` comes before the first.
  PYMETA_FN PYMETA_NOINLINE void add_statistics(int k, const Passes<X>& passes,
                                                const Parameters& theta, const Step& now) const {
    Real* to = state_.memory.at(state_.ws.statistics);
    passes.statistics(theta, [&](const Layer& layer, const LayerPass& p) {
      const int rows = statistics_rows(layer);
      const Extent extent = over(p.extent, layer.in);
      const IntVec counts = now.active & (extent.count > zero());
      // As torch has it, the running variance is the unbiased one.
      const Vec unbiased = extent.count / (extent.count - Real(1));
      const long stride = X::stride(layer.out.channels);
      Real* row = to + (k < rows ? k : rows - 1) * StatisticsLayout<X>::row(layer);
      with_statistics<X>(p, [&](int v, const Statistics& own) {
        Real* mean = row + static_cast<long>(v) * kWidth;
        store(mean, load(mean) + select(counts, own.mean, zero()));
        store(mean + stride, load(mean + stride) + select(counts, own.variance * unbiased, zero()));
      });
      X::for_indices(1, [&](int) {
        Real *made = row + 2 * stride, *numbers = made + kWidth;
        store(made, load(made) + select(counts, broadcast(1), zero()));
        store(numbers, load(numbers) + select(counts, extent.count, zero()));
      });
      to += StatisticsLayout<X>::scalars(layer);
    });
  }

  // theta[k + 1] and the tape of step k; the reverse sweep begins with the last tape as it is.
  PYMETA_FN PYMETA_NOINLINE void save(int k, const Parameters& next) const {
    const State<X>& s = state_;
    if (k == s.call.steps - 1) return;
    Real* to = saved(k);
    X::copy(to, next.own, s.layout.size);
    X::copy(to + s.layout.size, next.own_transposed, s.layout.transposed_size);
    X::copy(to + s.layout.size + s.layout.transposed_size, s.support_tape(k).base,
            s.ws.support_tape.size);
  }
  PYMETA_FN Real* saved(int k) const {
    const State<X>& s = state_;
    return s.memory.at(s.ws.saved) +
           k * (s.layout.size + s.layout.transposed_size + s.ws.support_tape.size);
  }

  State<X> state_;
  Vec loss_sum_ = zero();
};

PYMETA_KERNEL_END
