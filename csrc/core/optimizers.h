// The inner optimiser: one step, and its vector-Jacobian product for the reverse sweep, element by element.
//
//   g      = dL/dtheta + anchor (theta - start)
//   g      = g min(1, clip / (|g| + 1e-6))                    |g| over all adapted tensors of the task
//   d      = rule(theta, g, state)                            the rule moves its state on
//   theta' = theta - lr d
// The reverse sweep, given v = dL/dtheta' and the adjoints of the state:
//   lr gets -d v;  ad = -lr v;  the rule turns ad into the adjoints of g, theta and the state before
//   v += adjoint of theta;  u = adjoint of g, back through the clip;  v += H u        (inner_loop.h)
// The rules, as torch.optim has them (wd: weight decay; t: the step, from 1):
//   GradientStep   d = g + wd theta
//   Momentum       m = mu m + g + wd theta;  d = m, or g + wd theta + mu m (Nesterov)
//   Adam           g += wd theta (unless decoupled);  m = b1 m + (1 - b1) g;  s = b2 s + (1 - b2) g^2
//                  d = (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps), + wd theta where decoupled
//                  computed as m scale / (sqrt(s) + eps') with scale = sqrt(1 - b2^t) / (1 - b1^t), eps' = eps sqrt(1 - b2^t)
// The derivative of sqrt(s) at 0 is taken as 0: dead units have gradients of exactly 0.
//
// Where the rule is the plain one and one scalar rate serves all adapted tensors, the step is fused into the store of
// the gradient, and v itself is the direction of the Hessian-vector product, which is then scaled: no u is stored.
#pragma once

#include "machine.h"
#include "tasks.h"
#include "workspace.h"

PYMETA_KERNEL_BEGIN

// ---- the learning rate -----------------------------------------------------------------------------------------

class Rates {
 public:
  // `packed` is [lr.rows, parameters] in the executor's layout; only read when the rate is per element.
  PYMETA_FN Rates(const Call<Real>& call, const Real* packed, std::size_t parameters)
      : lr_(call.lr), packed_(packed), parameters_(parameters) {
    int first = 0;
    while (first < call.network->tensor_count && !call.adapted[first]) ++first;
    const bool any = first < call.network->tensor_count;
    column_ = any && !lr_.per_element ? lr_.groups[first] : 0;
  }

  PYMETA_FN int row(int step) const { return step < lr_.rows ? step : lr_.rows - 1; }
  PYMETA_FN bool per_element() const { return lr_.per_element; }
  PYMETA_FN int group(int tensor) const { return lr_.groups[tensor]; }
  // Where one rate serves all adapted tensors (steps_scale_gradient in workspace.h).
  PYMETA_FN Real uniform_rate(int step) const {
    return lr_.values[static_cast<long>(row(step)) * lr_.columns + column_];
  }
  PYMETA_FN Real rate(int step, int tensor) const {
    return lr_.values[static_cast<long>(row(step)) * lr_.columns + lr_.groups[tensor]];
  }
  // Of the scalars from `place` on, in the tensor's own array of rates; or one for all of them.
  PYMETA_FN const Real* elements(int step, std::size_t place) const {
    return per_element() ? packed_ + row(step) * parameters_ + place : nullptr;
  }

 private:
  LearningRate<Real> lr_;
  const Real* packed_;
  std::size_t parameters_;
  int column_;
};

// ---- the rules -------------------------------------------------------------------------------------------------

constexpr int kMaxStates = 2;

// What Adam's bias corrections make of a step, for each lane; the other rules do not look at it.
struct Correction {
  Vec scale, eps;
};
// As they lie in memory: `to` [2], given beta1^t and sqrt(1 - beta2^t).
PYMETA_FN inline void put_correction(const Optimizer& o, double power1, double root, Real* to) {
  to[0] = Real(root / (1 - power1));
  to[1] = Real(o.eps * root);
}

struct GradientStep {
  static constexpr int kStates = 0;
  Real weight_decay;

  PYMETA_FN explicit GradientStep(const Optimizer& o) : weight_decay(Real(o.weight_decay)) {}
  PYMETA_FN Vec direction(Vec theta, Vec g, Vec*, const Correction&) const {
    return fma(broadcast(weight_decay), theta, g);
  }
  // `d_direction` is the adjoint of d, `state` the one after the step, `d_state` its adjoint, turned into the one before.
  // Returns the adjoint of g; `d_theta` is that of theta.
  PYMETA_FN Vec direction_vjp(Vec d_direction, Vec, Vec, const Vec*, Vec*, Vec& d_theta,
                              const Correction&) const {
    d_theta = d_direction * weight_decay;
    return d_direction;
  }
};

struct Momentum {
  static constexpr int kStates = 1;
  Real momentum, weight_decay;
  bool nesterov;

  PYMETA_FN explicit Momentum(const Optimizer& o)
      : momentum(Real(o.momentum)), weight_decay(Real(o.weight_decay)), nesterov(o.nesterov) {}
  PYMETA_FN Vec direction(Vec theta, Vec g, Vec* state, const Correction&) const {
    g = fma(broadcast(weight_decay), theta, g);
    state[0] = fma(broadcast(momentum), state[0], g);
    return nesterov ? fma(broadcast(momentum), state[0], g) : state[0];
  }
  PYMETA_FN Vec direction_vjp(Vec d_direction, Vec, Vec, const Vec*, Vec* d_state, Vec& d_theta,
                              const Correction&) const {
    const Vec dm =
        nesterov ? fma(broadcast(momentum), d_direction, d_state[0]) : d_state[0] + d_direction;
    const Vec dg = nesterov ? dm + d_direction : dm;
    d_state[0] = dm * momentum;
    d_theta = dg * weight_decay;
    return dg;
  }
};

struct Adam {
  static constexpr int kStates = 2;
  Real beta1, beta2, new1, new2, coupled, decoupled;

  PYMETA_FN explicit Adam(const Optimizer& o)
      : beta1(Real(o.beta1)),
        beta2(Real(o.beta2)),
        new1(Real(1 - o.beta1)),
        new2(Real(1 - o.beta2)),
        coupled(Real(o.decoupled ? 0 : o.weight_decay)),
        decoupled(Real(o.decoupled ? o.weight_decay : 0)) {}
  PYMETA_FN Vec direction(Vec theta, Vec g, Vec* state, const Correction& c) const {
    g = fma(broadcast(coupled), theta, g);
    state[0] = fma(broadcast(beta1), state[0], g * new1);
    state[1] = fma(broadcast(beta2), state[1], g * g * new2);
    const Vec step = state[0] * c.scale / (square_root(state[1]) + c.eps);
    return fma(broadcast(decoupled), theta, step);
  }
  PYMETA_FN Vec direction_vjp(Vec d_direction, Vec theta, Vec g, const Vec* state, Vec* d_state,
                              Vec& d_theta, const Correction& c) const {
    g = fma(broadcast(coupled), theta, g);
    const Vec root = square_root(state[1]), below = root + c.eps;
    const Vec through_m = d_direction * c.scale / below;
    const Vec dm = d_state[0] + through_m;
    const Vec d_root = -(through_m * state[0] / below);
    const Vec ds = d_state[1] + select(root == Real(0), zero(), d_root / (root + root));
    const Vec dg = fma(g * (new2 + new2), ds, dm * new1);
    d_state[0] = dm * beta1;
    d_state[1] = ds * beta2;
    d_theta = fma(broadcast(coupled), dg, d_direction * decoupled);
    return dg;
  }
};

template <class Visitor>
PYMETA_FN void with_rule(const Optimizer& optimizer, Visitor visit) {
  if (optimizer.kind == OptimizerKind::adam) return visit(Adam(optimizer));
  if (optimizer.momentum != 0) return visit(Momentum(optimizer));
  visit(GradientStep(optimizer));
}

// ---- a tensor's step -------------------------------------------------------------------------------------------

// The arrays of one tensor, or null; all begin at the tensor's place.
struct StepArrays {
  const Real* rates;  // per element; null: `rate`
  Real rate;
  const Real* theta;
  const Real* gradient;
  const Real* start;                     // where there is an anchor
  const Real* state_before[kMaxStates];  // null in the first step: zeros
  Real* state[kMaxStates];
};

// What the elements of an item's step have in common.
struct StepCommon {
  Vec anchor;  // 0 where there is none
  Vec clip;    // the factor of the gradient; 1 where nothing is clipped
  Vec norm;    // of the gradient before that, where there is a clip
  Correction correction;
  IntVec active;  // lanes that make this step; the others stay as they are
  bool all_active;
};

PYMETA_FN inline Vec clipped_gradient(const StepArrays& a, const StepCommon& common,
                                      std::size_t i) {
  Vec g = load(a.gradient + i);
  if (a.start) g = fma(common.anchor, load(a.theta + i) - load(a.start + i), g);
  return g * common.clip;
}
PYMETA_FN inline Vec rate_at(const StepArrays& a, std::size_t i) {
  return a.rates ? load(a.rates + i) : broadcast(a.rate);
}

template <class X, class Rule>
PYMETA_FN PYMETA_APART void step(const Rule& rule, const StepArrays& a, const StepCommon& common,
                                 std::size_t size, Real* theta_next) {
  X::each(size, [&](std::size_t i) {
    const Vec theta = load(a.theta + i);
    Vec state[kMaxStates];
    for (int s = 0; s < Rule::kStates; ++s)
      state[s] = a.state_before[s] ? load(a.state_before[s] + i) : zero();
    Vec after[kMaxStates];
    for (int s = 0; s < Rule::kStates; ++s) after[s] = state[s];
    const Vec d = rule.direction(theta, clipped_gradient(a, common, i), after, common.correction);
    Vec next = fma(-rate_at(a, i), d, theta);
    if (!common.all_active) {
      next = select(common.active, next, theta);
      for (int s = 0; s < Rule::kStates; ++s) after[s] = select(common.active, after[s], state[s]);
    }
    store(theta_next + i, next);
    for (int s = 0; s < Rule::kStates; ++s) store(a.state[s] + i, after[s]);
  });
}

// The gradient of the rate, -d v: element by element, or summed into one vector.
template <class X, class Rule>
PYMETA_FN PYMETA_APART void step_rate_gradient(const Rule& rule, const StepArrays& a,
                                               const StepCommon& common, const PackedTensor& packed,
                                               const Real* v, Real* lr_gradient) {
  const auto share = [&](std::size_t i, Vec sum) {
    Vec before[kMaxStates];
    for (int s = 0; s < Rule::kStates; ++s)
      before[s] = a.state_before[s] ? load(a.state_before[s] + i) : zero();
    const Vec g = clipped_gradient(a, common, i);
    const Vec d = rule.direction(load(a.theta + i), g, before, common.correction);
    return fma(-select(common.active, d, zero()), load(v + i), sum);
  };
  if (a.rates)
    X::each(packed.scalars(),
            [&](std::size_t i) { store(lr_gradient + i, share(i, load(lr_gradient + i))); });
  else
    X::fold(packed, lr_gradient, share);
}

// Backwards through it: v becomes its direct part, u the adjoint of the clipped gradient, `d_state` that of the state
// before.
template <class X, class Rule>
PYMETA_FN PYMETA_APART void step_vjp(const Rule& rule, const StepArrays& a,
                                     const StepCommon& common, std::size_t size, Real* v, Real* u,
                                     Real* const* d_state) {
  X::each(size, [&](std::size_t i) {
    const Vec theta = load(a.theta + i), g = clipped_gradient(a, common, i), dv = load(v + i);
    Vec after[kMaxStates], adjoint[kMaxStates];
    for (int s = 0; s < Rule::kStates; ++s) {
      after[s] = load(a.state[s] + i);
      adjoint[s] = load(d_state[s] + i);
    }
    Vec d_theta;
    const Vec dg = rule.direction_vjp(-(rate_at(a, i) * dv), theta, g, after, adjoint, d_theta,
                                      common.correction);
    store(v + i, dv + select(common.active, d_theta, zero()));
    store(u + i, select(common.active, dg, zero()));
    for (int s = 0; s < Rule::kStates; ++s)
      store(d_state[s] + i, select(common.active, adjoint[s], zero()));
  });
}

PYMETA_KERNEL_END
