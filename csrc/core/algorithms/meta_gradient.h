// The exact gradient of the query loss after adaptation: the way back through the inner loop (adapt.h).
//
//   loss = L_query(theta[K])
//   v = dL_query/dtheta at theta[K]
//   for k = K-1 .. 0:   (lr[k] gets -d[k] v)   u = the adjoint of g[k], -lr[k] v in plain SGD;   v += H[k] u
//                       with an anchor  v += a u,  p -= a u:  g[k] has a (theta[k] - theta[0]) in it
//   v + p is the meta-gradient.
//
// H[k] u, the Hessian of the support loss at theta[k] times u, is a tangent pass over the tape of step k
// (Pearlmutter 1994): no graph, no approximation, and the tangent of the first layer's input delta is what flows
// to the support inputs. A first-order meta-gradient takes g[k] as a constant. A tensor that the inner loop does not
// adapt has no u, yet receives its gradient from every pass.
#pragma once

#include "adapt.h"

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

  // Adapts, and returns the query loss of each task; the loop's outputs() are those of the query set until add().
  PYMETA_FN Vec loss() {
    const WholeSet steps(support_, state_.shared.corrections);
    adapted_ = loop_.adapt(steps);
    if constexpr (X::kFactors)
      if (state_.factored) state_.factored->begin_query(query_.x, query_.extent, support_.x);
    return query_loss();
  }
  // Once more, of what the query set is now.
  PYMETA_FN Vec query_loss() { return loop_.evaluate(adapted_, query_); }

  // Adds the meta-gradient to the totals: all of it, with each item.
  PYMETA_FN void add() {
    const bool keep_v = state_.call.reverses();
    const Tape tape = state_.query_tape();
    Real* v = state_.memory.at(state_.ws.v);
    Passes<X>(state_, query_, tape, /*is_query=*/true).backward(adapted_, [&](int t) {
      const std::size_t place = place_of(t);
      return keep_v ? Sink{v + place} : Sink{totals_.gradient + place, totals_.base(place)};
    });
    if constexpr (X::kFactors)
      if (state_.factored) state_.factored->begin_reverse(tape.d(0));
    if (!keep_v) return;
    const WholeSet steps(support_, state_.shared.corrections);
    clear_adjoints();
    for (int k = state_.call.steps - 1; k >= 0 && !state_.call.is_stopped(); --k)
      reverse_step(k, steps.step(k));
    if (!state_.call.second_order()) add_v(v);
  }

 private:
  PYMETA_FN std::size_t place_of(int t) const { return state_.layout.tensors[t].place; }

  PYMETA_FN void add_v(const Real* v) const {
    const std::size_t summed =
        state_.factored ? state_.layout.size_without_first : state_.layout.size;
    X::for_vectors(summed, [&](std::size_t i) {
      const Real* base = totals_.base(i);
      store(totals_.gradient + i, base ? load(base) + load(v + i) : load(v + i));
    });
  }

  // Step k backwards; in second order v += H[k] u, and for the first step the sum goes straight into the totals.
  PYMETA_FN void reverse_step(int k, const Step& step) {
    const State<X>& s = state_;
    if (s.ws.saves_steps) loop_.restore(k);
    const Parameters theta = k == 0 ? s.start() : s.adapted(k);
    Real* v = s.memory.at(s.ws.v);
    Real* u = v;
    Real scale = 1;
    if (s.ws.direction_is_v) {
      rate_gradient(k);
      scale = -s.rates.uniform_rate(k);
    } else {
      rule_vjp(k, theta, step);
      u = s.memory.at(s.ws.u);
      if (s.ws.pull != kNowhere) anchor_vjp(k);
    }
    if (!s.call.second_order()) return;
    s.transpose(u, s.memory.at(s.ws.u_transposed));
    const Direction direction{&s, u};
    const Passes<X> passes(s, *step.set, s.support_tape(k), /*is_query=*/false);
    passes.tangent_forward(theta, direction);
    passes.tangent_backward(theta, direction, k == s.call.steps - 1, scale, [&](int t) {
      const std::size_t place = place_of(t);
      if (k > 0) return Sink{v + place, v + place, nullptr, scale};
      return Sink{totals_.gradient + place, totals_.base(place), v + place, scale};
    });
  }

  // ---- backwards through the optimiser's rule --------------------------------------------------------------------

  // v gets its direct part, u becomes the adjoint of the support gradient.
  PYMETA_FN void rule_vjp(int k, const Parameters& theta, const Step& step) {
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
  PYMETA_FN void clip_vjp(int k, const Parameters& theta, const StepCommon& common) const {
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
  PYMETA_FN void anchor_vjp(int k) const {
    const State<X>& s = state_;
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

  PYMETA_FN Real* state_adjoint(int i) const {
    return state_.memory.at(state_.ws.state_adjoints) + i * state_.layout.size;
  }
  PYMETA_FN void clear_adjoints() const {
    if (state_.ws.direction_is_v) return;
    const auto clear = [](Real* array, std::size_t size) {
      X::for_vectors(size, [=](std::size_t i) { store(array + i, zero()); });
    };
    clear(state_adjoint(0), state_.call.optimizer.states() * state_.layout.size);
    if (state_.ws.pull != kNowhere) clear(state_.memory.at(state_.ws.pull), state_.layout.size);
  }

  // ---- the learning rate -----------------------------------------------------------------------------------------

  PYMETA_FN Real* lr_gradient_of(int k, int t) const {
    const State<X>& s = state_;
    if (!s.call.lr_gradient) return nullptr;
    if (s.rates.per_element())
      return totals_.lr_gradient + s.rates.row(k) * s.layout.size + place_of(t);
    return totals_.lr_gradient +
           (static_cast<std::size_t>(s.rates.row(k)) * s.call.lr.columns + s.rates.group(t)) *
               kWidth;
  }

  // The rate's gradient where v itself is the direction: -<g[k], v>.
  PYMETA_FN void rate_gradient(int k) const {
    const State<X>& s = state_;
    if (!s.call.lr_gradient) return;
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
};

PYMETA_KERNEL_END
