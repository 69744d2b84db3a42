// The exact gradient of the query loss after adaptation: the way back through the inner loop (adapt.h).
//
//   loss = L_query(theta[K])
//   v = dL_query/dtheta at theta[K]
//   for k = K-1 .. 0:   (lr[k] gets -d[k] v)   u = the adjoint of g[k], -lr[k] v in plain SGD;   v += H[k] u
//                       with an anchor  v += a u,  p -= a u:  g[k] has a (theta[k] - theta[0]) in it
//                       (a gets <theta[k] - theta[0], u>)
//   v + p is the meta-gradient.
//
// H[k] u, the Hessian of the support loss at theta[k] times u, is a tangent pass over the tape of step k
// (Pearlmutter 1994): no graph, no approximation, and the tangent of the first layer's input delta is what flows
// to the support inputs. A first-order meta-gradient takes g[k] as a constant. A tensor that the inner loop does not
// adapt has no u, yet receives its gradient from every pass.
//
// The same way back serves any scalar of the results. What flows into the outputs is a Seed, in place of the loss's own gradient;
// what flows into the adapted parameters is added to v at theta[K]. Where the query loss counts after every step, its gradient
// at theta[k] is added to v when that is reached: the set is evaluated there anew. A start of the task's own has v itself as
// its gradient.
#pragma once

#include "adapt.h"
#include "set_gradients.h"

PYMETA_KERNEL_BEGIN

template <class X>
class MetaGradient {
 public:
  using Parameters = typename State<X>::Parameters;
  using Direction = typename State<X>::Direction;
  using Tape = typename State<X>::Tape;

  // Sets of one item, whose gradient is added to `totals`.
  PYMETA_FN MetaGradient(InnerLoop<X>& loop, const ItemSet& support, const ItemSet& query,
                         const Totals& totals)
      : loop_(loop), state_(loop.state()), support_(support), query_(query), totals_(totals) {}

  // Adapts, and returns the query loss of each task; the loop's outputs() are those of the query set until add_query().
  // record(k, loss) is told the losses after each step that are known already: all of them where no gradient is wanted.
  template <class Record>
  PYMETA_FN Vec loss(Record record) {
    const WholeSet steps(support_, state_.shared.corrections);
    if (extra<X>(state_.call.step_weights != nullptr) && !state_.call.wants_gradient())
      return weighted_loss(steps, record);
    adapted_ = loop_.adapt(steps);
    if constexpr (X::kFactors)
      if (state_.factored) state_.factored->begin_query(query_.x, query_.extent, support_.x);
    return query_loss();
  }
  // Once more, of what the query set is now.
  PYMETA_FN Vec query_loss() { return loop_.evaluate(adapted_, query_); }

  // The query set's part at theta[K]: to v, or to the totals where nothing comes after it.
  PYMETA_FN void add_query(const Seed& seed) {
    if constexpr (X::Family::kExtras) {
      SetGradients<X>(state_, query_).clear();
      SetGradients<X>(state_, support_).clear();
    }
    if (extra<X>(state_.ws.own_rate_gradients != kNowhere))
      X::for_vectors(rate_scalars(), [&](std::size_t i) { store(rate_gradients() + i, zero()); });
    const bool keep_v = state_.ws.keeps_v;
    backward_query(adapted_, query_, kLastStep, seed, [&](int t) {
      const std::size_t place = place_of(t);
      return keep_v ? Sink{v() + place} : Sink{totals_.gradient + place, totals_.base(place)};
    });
    if constexpr (X::kFactors)
      if (state_.factored) state_.factored->begin_reverse(state_.query_tape().d(0));
  }

  // dL/dtheta on its way back; between add_query() and add_steps(), that at theta[K].
  PYMETA_FN Real* v() const { return state_.memory.at(state_.ws.v); }

  // Back through the steps, and into the totals. With a loss after each of them: seeds(k) of that after step k.
  template <class Seeds, class Record>
  PYMETA_FN void add_steps(Seeds seeds, Record record) {
    const State<X>& s = state_;
    if constexpr (kStacks<X>) return add_step_of_stack();
    if (!s.ws.keeps_v) return;
    const WholeSet steps(support_, s.shared.corrections);
    const bool reverses = s.call.reverses();
    if (reverses && extra<X>(!s.ws.direction_is_v)) clear_adjoints();
    for (int k = reverses ? s.call.steps - 1 : -1; k >= 0 && !s.call.is_stopped(); --k) {
      if (extra<X>(s.call.step_weights != nullptr) && k < s.call.steps - 1)
        record(k, add_step_loss(k, seeds(k)));
      reverse_step(k, steps.step(k));
    }
    if (extra<X>(s.ws.sums_at_end || !s.call.second_order())) add_task();
  }

  // Of the strength of each task's pull towards its start.
  PYMETA_FN Vec anchor_gradient() const { return anchor_gradient_; }

  // visit(row, column, gradient) of the rates of an item whose tasks have their own.
  template <class Visitor>
  PYMETA_FN PYMETA_NOINLINE void own_rate_gradients(Visitor visit) const {
    const State<X>& s = state_;
    for (int row = 0; row < s.call.lr.rows; ++row)
      for (int column = 0; column < s.call.lr.columns; ++column) {
        Vec sum = zero();
        s.for_adapted([&](int t, std::size_t place, std::size_t) {
          if (s.rates.group(t) != column) return;
          const Real* own = rate_gradients() + row * s.layout.size + place;
          sum = X::sum_elements(s.layout.tensors[t], sum,
                                [=](std::size_t at) { return load(own + at); });
        });
        visit(row, column, sum);
      }
  }

 private:
  PYMETA_FN std::size_t place_of(int t) const { return state_.layout.tensors[t].place; }

  // The losses after each step, without a gradient: their weighted sum.
  template <class Record>
  PYMETA_FN PYMETA_NOINLINE Vec weighted_loss(const WholeSet& steps, Record record) {
    Vec sum = zero();
    adapted_ = loop_.start();
    for (int k = 0; k < state_.call.steps && !state_.call.is_stopped(); ++k) {
      adapted_ = loop_.step(k, adapted_, steps.step(k));
      const Vec loss = loop_.evaluate(adapted_, query_, k);
      record(k, loss);
      sum = fma(broadcast(state_.call.step_weights[k]), loss, sum);
    }
    return sum;
  }

  template <class Sinks>
  PYMETA_FN void backward_query(const Parameters& theta, const ItemSet& query, int step,
                                const Seed& seed, Sinks sinks) const {
    const Tape tape = state_.query_tape();
    const Passes<X> passes(state_, query, tape, /*is_query=*/true, step);
    const SetGradients<X> of_set(state_, query);
    if (seed_is_given<X>(!seed.is_plain)) passes.seed(seed);
    if constexpr (X::Family::kExtras) of_set.add_query_offset(tape);
    passes.backward(theta, sinks);
    if constexpr (X::Family::kExtras) of_set.add_query(tape, seed.losses);
  }

  // The query set again, after step k and before the ones that are reversed already; returns its loss.
  PYMETA_FN PYMETA_NOINLINE Vec add_step_loss(int k, const Seed& seed) const {
    const State<X>& s = state_;
    ItemSet query = query_;
    query.cotangent = nullptr;  // that of the predictions, which are those at theta[K]
    query.dx = query_.dx_of_step;
    const Parameters theta = s.adapted(k + 1);
    const Vec loss = loop_.evaluate(theta, query, k);
    backward_query(theta, query, k, seed, [&](int t) {
      const std::size_t place = place_of(t);
      return Sink{v() + place, v() + place};
    });
    if (Real* dx = query_.dx)
      X::map(query.extent, s.network.in_features(),
             [=](long at, long, int) { store(dx + at, load(dx + at) + load(query.dx + at)); });
    return loss;
  }

  // v, and a task's own share of the rates' gradient, into the totals.
  PYMETA_FN PYMETA_NOINLINE void add_task() const {
    const State<X>& s = state_;
    const bool clips = extra<X>(s.call.task_clip > 0);
    const Vec factor = clips ? task_factor() : broadcast(1);
    const std::size_t summed = s.factored ? s.layout.size_without_first : s.layout.size;
    const Real* from = v();
    X::for_vectors(summed, [&](std::size_t i) {
      const Vec own = clips ? factor * load(from + i) : load(from + i);
      const Real* base = totals_.base(i);
      store(totals_.gradient + i, base ? load(base) + own : own);
    });
    if (clips && s.call.lr_gradient && !s.call.lr.per_task)
      X::for_vectors(rate_scalars(), [&](std::size_t i) {
        Real* to = totals_.lr_gradient + i;
        store(to, fma(factor, load(rate_gradients() + i), load(to)));
      });
  }

  // By what a task's share of the sums is scaled.
  PYMETA_FN PYMETA_NOINLINE Vec task_factor() const {
    const State<X>& s = state_;
    const auto squares = [&](int t, const Real* from, Vec sum) {
      return X::sum_elements(s.layout.tensors[t], sum, [=](std::size_t at) {
        const Vec g = load(from + at);
        return g * g;
      });
    };
    Vec sum = zero();
    for (int t = 0; t < s.network.tensor_count; ++t)
      if (s.call.gradients && s.call.gradients[t] && !s.call.has_own_start(t))
        sum = squares(t, v() + place_of(t), sum);
    if (s.call.lr_gradient && s.call.lr.per_element)
      for (int row = 0; row < s.call.lr.rows; ++row)
        s.for_adapted([&](int t, std::size_t place, std::size_t) {
          sum = squares(t, rate_gradients() + row * s.layout.size + place, sum);
        });
    else if (s.call.lr_gradient && !s.call.lr.per_task)
      for (int i = 0; i < s.call.lr.rows * s.call.lr.columns; ++i) {
        const Vec g = X::whole(load(rate_gradients() + static_cast<long>(i) * kWidth));
        sum = fma(g, g, sum);
      }
    return s.share_factor(sum);
  }

  // Step k backwards; in second order v += H[k] u, and for the first step the sum goes straight into the totals.
  PYMETA_FN PYMETA_NOINLINE void reverse_step(int k, const Step& step) {
    const State<X>& s = state_;
    if (s.ws.saves_steps) loop_.restore(k);
    const Parameters theta = k == 0 ? s.start() : s.adapted(k);
    Real* u = v();
    Real scale = 1;
    if (!extra<X>(!s.ws.direction_is_v)) {
      if (extra<X>(s.call.lr_gradient != nullptr)) rate_gradient(k);
      scale = -s.rates.uniform_rate(k);
      if (s.call.second_order()) u = scaled_direction(k, scale);
    } else {
      rule_vjp(k, theta, step);
      u = s.memory.at(s.ws.u);
      if (s.ws.pull != kNowhere) anchor_vjp(k, theta);
    }
    if (!s.call.second_order()) return;
    s.transpose(u, s.memory.at(s.ws.u_transposed));
    const Direction direction{&s, u};
    const Passes<X> passes(s, *step.set, s.support_tape(k), /*is_query=*/false, k);
    if (k + 1 < s.call.steps) passes.repeat(theta);
    passes.tangent_forward(theta, direction);
    passes.tangent_backward(theta, direction, k == s.call.steps - 1, scale, [&](int t) {
      const std::size_t place = place_of(t);
      Real* own = v() + place;
      if (k > 0 || extra<X>(s.ws.sums_at_end)) return Sink{own, own, nullptr, scale};
      return Sink{totals_.gradient + place, totals_.base(place), own, scale};
    });
    if constexpr (X::Family::kExtras)
      SetGradients<X>(s, *step.set)
          .add_support(s.support_tape(k), s.tangent(s.ws.tangent.ry), s.tangent(s.ws.tangent.rdy),
                       scale);
  }

  // The way back through the one step of a stack, whose layers know the direction; the query set's part is in the totals.
  PYMETA_FN void add_step_of_stack() const {
    const State<X>& s = state_;
    if (!s.call.second_order() || s.call.is_stopped()) return;
    const Parameters theta = s.start();
    const Direction direction{&s, v()};
    const Passes<X> passes(s, support_, s.support_tape(0), /*is_query=*/false, 0);
    passes.tangent_forward(theta, direction);
    passes.tangent_backward(theta, direction, true, 1, [&](int t) {
      Real* total = totals_.gradient + place_of(t);
      return Sink{total, total};
    });
  }

  // The direction of step k where its rate is `scale`: v, or where that may not wait (rates.h) v times it, and `scale` is 1 then.
  PYMETA_FN PYMETA_NOINLINE Real* scaled_direction(int k, Real& scale) const {
    if (is_near_one(scale)) return v();
    const State<X>& s = state_;
    const Real by = scale;
    Real* u = loop_.spare(k);
    s.for_adapted([&](int, std::size_t place, std::size_t size) {
      const Real* own = v() + place;
      X::for_vectors(size, [=](std::size_t i) { store(u + place + i, load(own + i) * by); });
    });
    scale = 1;
    return u;
  }

  // ---- backwards through the optimiser's rule --------------------------------------------------------------------

  // v gets its direct part, u becomes the adjoint of the support gradient.
  PYMETA_FN PYMETA_NOINLINE void rule_vjp(int k, const Parameters& theta, const Step& step) {
    const State<X>& s = state_;
    const StepCommon common = s.step_common(k, theta, step);
    with_rule(s.call.optimizer, [&](const auto& rule) {
      s.for_adapted([&](int t, std::size_t place, std::size_t size) {
        Real* d_state[kMaxStates];
        for (int i = 0; i < s.call.optimizer.states(); ++i) d_state[i] = state_adjoint(i) + place;
        const StepArrays own = s.step_arrays(k, t, theta);
        Real* v = s.memory.at(s.ws.v) + place;
        if (s.call.lr_gradient)
          step_rate_gradient<X>(rule, own, common, s.layout.tensors[t], v, lr_gradient_of(k, t));
        step_vjp<X>(rule, own, common, size, v, s.memory.at(s.ws.u) + place, d_state);
      });
    });
    // A first-order gradient is a constant, but the anchor's part of it is none.
    if (s.call.optimizer.clip_norm > 0 && (s.call.second_order() || s.call.is_anchored()))
      clip_vjp(k, theta, common);
  }

  // The clip is g c(n) with n = |g| and c = min(1, clip / (n + 1e-6)):  u = c u + (c' / n) (g . u) g.
  PYMETA_FN PYMETA_NOINLINE void clip_vjp(int k, const Parameters& theta,
                                          const StepCommon& common) const {
    const State<X>& s = state_;
    const Vec norm = common.norm;
    StepCommon unclipped = common;
    unclipped.clip = broadcast(1);
    Real* u = s.memory.at(s.ws.u);
    const Vec along = s.sum_adapted([&](int t) {
      return [&unclipped, own = s.step_arrays(k, t, theta), u_of = u + place_of(t)](
                 std::size_t at) { return clipped_gradient(own, unclipped, at) * load(u_of + at); };
    });
    const IntVec clips = (common.clip < Real(1)) & (norm > zero());
    const Vec slope = select(clips, -(common.clip / (norm + Real(1e-6)) / norm * along), zero());
    s.for_adapted([&](int t, std::size_t place, std::size_t size) {
      const StepArrays own = s.step_arrays(k, t, theta);
      X::for_vectors(size, [&, place](std::size_t i) {
        store(u + place + i,
              fma(slope, clipped_gradient(own, unclipped, i), common.clip * load(u + place + i)));
      });
    });
  }

  // The anchor's part of g[k]: at theta[k] into v, at the start into p. At k = 0 the two are one, and cancel.
  PYMETA_FN PYMETA_NOINLINE void anchor_vjp(int k, const Parameters& theta) {
    const State<X>& s = state_;
    if (s.call.anchors_gradient && k > 0) add_anchor_gradient(theta);
    Real *v = s.memory.at(s.ws.v), *u = s.memory.at(s.ws.u), *pull = s.memory.at(s.ws.pull);
    s.for_adapted([&](int, std::size_t place, std::size_t size) {
      X::for_vectors(size, [=, &s](std::size_t i) {
        const std::size_t at = place + i;
        if (k == 0) {
          store(v + at, load(v + at) + load(pull + at));
        } else {
          const Vec share = s.anchor * load(u + at);
          store(v + at, load(v + at) + share);
          store(pull + at, load(pull + at) - share);
        }
      });
    });
  }

  // Of step k > 0, at theta[k].
  PYMETA_FN PYMETA_NOINLINE void add_anchor_gradient(const Parameters& theta) {
    const State<X>& s = state_;
    const Parameters start = s.start();
    const Real* u = s.memory.at(s.ws.u);
    anchor_gradient_ = anchor_gradient_ + s.sum_adapted([&](int t) {
      return [to = theta.tensor(t), from = start.tensor(t), u_of = u + place_of(t)](
                 std::size_t at) { return (load(to + at) - load(from + at)) * load(u_of + at); };
    });
  }

  PYMETA_FN Real* state_adjoint(int i) const {
    return state_.memory.at(state_.ws.state_adjoints) + i * state_.layout.size;
  }
  PYMETA_FN PYMETA_NOINLINE void clear_adjoints() const {
    const auto clear = [](Real* array, std::size_t size) {
      X::for_vectors(size, [=](std::size_t i) { store(array + i, zero()); });
    };
    clear(state_adjoint(0), state_.call.optimizer.states() * state_.layout.size);
    if (state_.ws.pull != kNowhere) clear(state_.memory.at(state_.ws.pull), state_.layout.size);
  }

  // ---- the learning rate -----------------------------------------------------------------------------------------

  // Where they are summed: over the items of a chunk, or of one alone.
  PYMETA_FN Real* rate_gradients() const {
    Real* own = state_.memory.at(state_.ws.own_rate_gradients);
    return own ? own : totals_.lr_gradient;
  }
  PYMETA_FN std::size_t rate_scalars() const { return state_.ws.lr_scalars(state_.call); }
  PYMETA_FN Real* lr_gradient_of(int k, int t) const {
    const State<X>& s = state_;
    if (!s.call.lr_gradient) return nullptr;
    if (s.rates.is_spread()) return rate_gradients() + s.rates.row(k) * s.layout.size + place_of(t);
    return rate_gradients() +
           (static_cast<std::size_t>(s.rates.row(k)) * s.call.lr.columns + s.rates.group(t)) *
               kWidth;
  }

  // The rate's gradient where v itself is the direction: -<g[k], v>.
  PYMETA_FN PYMETA_NOINLINE void rate_gradient(int k) const {
    const State<X>& s = state_;
    s.for_adapted([&](int t, std::size_t place, std::size_t) {
      if (s.is_factored_tensor(t)) return;
      const Real *g = s.gradient(k) + place, *v = s.memory.at(s.ws.v) + place;
      X::fold(s.layout.tensors[t], lr_gradient_of(k, t),
              [=](std::size_t i, Vec sum) { return fma(-load(g + i), load(v + i), sum); });
    });
    if constexpr (X::kFactors)
      if (s.factored) {
        Real* into = lr_gradient_of(k, s.network.layers[0].weight);
        store(into, load(into) - s.factored->rate_gradient(s.support_tape(k).d(0)));
      }
  }

  InnerLoop<X>& loop_;
  const State<X>& state_;
  const ItemSet& support_;
  const ItemSet& query_;
  const Totals& totals_;
  Parameters adapted_{};
  Vec anchor_gradient_ = zero();
};

PYMETA_KERNEL_END
