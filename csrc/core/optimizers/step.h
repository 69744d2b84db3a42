// One inner step of a tensor, and its vector-Jacobian product for the reverse sweep, element by element:
//
//   g      = dL/dtheta + anchor (theta - start)               anchor: a number of each task's own
//   g      = g min(1, clip / (|g| + 1e-6))                    |g| over all adapted tensors of the task
//   d      = rule(theta, g, state)                            the rule moves its state on
//   theta' = theta - lr d
// The reverse sweep, given v = dL/dtheta' and the adjoints of the state:
//   lr gets -d v;  ad = -lr v;  the rule turns ad into the adjoints of g, theta and the state before
//   v += adjoint of theta;  u = adjoint of g, back through the clip;  v += H u + anchor u;  the start gets -anchor u
//                                                                                     (algorithms/meta_gradient.h)
//
// Where the rule is the plain one and one scalar rate serves all adapted tensors, the step is fused into the store of
// the gradient, and v itself is the direction of the Hessian-vector product, which is then scaled: no u is stored.
#pragma once

#include "../call/places.h"
#include "rates.h"
#include "registry.h"

PYMETA_KERNEL_BEGIN

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
PYMETA_FN PYMETA_NOINLINE void take_step(const Rule& rule, const StepArrays& a,
                                         const StepCommon& common, std::size_t size,
                                         Real* theta_next) {
  X::for_vectors(size, [&](std::size_t i) {
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
PYMETA_FN PYMETA_NOINLINE void step_rate_gradient(const Rule& rule, const StepArrays& a,
                                                  const StepCommon& common,
                                                  const PackedTensor& packed, const Real* v,
                                                  Real* lr_gradient) {
  const auto share = [&](std::size_t i, Vec sum) {
    Vec before[kMaxStates];
    for (int s = 0; s < Rule::kStates; ++s)
      before[s] = a.state_before[s] ? load(a.state_before[s] + i) : zero();
    const Vec g = clipped_gradient(a, common, i);
    const Vec d = rule.direction(load(a.theta + i), g, before, common.correction);
    return fma(-select(common.active, d, zero()), load(v + i), sum);
  };
  if (a.rates)
    X::for_vectors(packed.scalars(),
                   [&](std::size_t i) { store(lr_gradient + i, share(i, load(lr_gradient + i))); });
  else
    X::fold(packed, lr_gradient, share);
}

// Backwards through it: v becomes its direct part, u the adjoint of the clipped gradient, `d_state` that of the state
// before.
template <class X, class Rule>
PYMETA_FN PYMETA_NOINLINE void step_vjp(const Rule& rule, const StepArrays& a,
                                        const StepCommon& common, std::size_t size, Real* v,
                                        Real* u, Real* const* d_state) {
  X::for_vectors(size, [&](std::size_t i) {
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
