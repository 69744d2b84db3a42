// RMSprop (Hinton 2012, lecture 6e; centered: Graves 2013), as torch.optim.RMSprop has it:
//   g += wd theta;  s = a s + (1 - a) g^2;  e = g / (sqrt(s) + eps);  d = e
//   centered:       c = a c + (1 - a) g, and s - c^2 in place of s under the root
//   with momentum:  m = mu m + e;  d = m
// The derivative of the root at 0 is taken as 0: dead units have gradients of exactly 0.
#pragma once

#include "rule.h"

PYMETA_KERNEL_BEGIN

// kPlain: neither centered nor with momentum, which keep two more arrays: s, m, c.
template <bool kPlain>
struct RmsProp {
  static constexpr int kStates = kPlain ? 1 : 3;
  Real alpha, fresh, eps, momentum, weight_decay;
  bool centered;

  PYMETA_FN explicit RmsProp(const Optimizer& o)
      : alpha(Real(o.alpha)),
        fresh(Real(1 - o.alpha)),
        eps(Real(o.eps)),
        momentum(Real(o.momentum)),
        weight_decay(Real(o.weight_decay)),
        centered(o.centered) {}

  PYMETA_FN Vec direction(Vec theta, Vec g, Vec* state, const Correction&) const {
    g = fma(broadcast(weight_decay), theta, g);
    state[0] = fma(broadcast(alpha), state[0], g * g * fresh);
    if constexpr (!kPlain)
      if (centered) state[2] = fma(broadcast(alpha), state[2], g * fresh);
    const Vec step = g / (root(state) + eps);
    if constexpr (kPlain) {
      return step;
    } else {
      state[1] = fma(broadcast(momentum), state[1], step);
      return state[1];
    }
  }

  PYMETA_FN Vec direction_vjp(Vec d_direction, Vec theta, Vec g, const Vec* state, Vec* d_state,
                              Vec& d_theta, const Correction&) const {
    g = fma(broadcast(weight_decay), theta, g);
    const Vec denominator = root(state), below = denominator + eps;
    Vec d_step = d_direction;
    if constexpr (!kPlain) {
      d_step = d_state[1] + d_direction;
      d_state[1] = d_step * momentum;
    }
    const Vec through = d_step / below;  // the adjoint of g in e = g / below
    const Vec d_root = -(through * g / below);
    const Vec d_spread =
        select(denominator == Real(0), zero(), d_root / (denominator + denominator));
    const Vec ds = d_state[0] + d_spread;
    Vec dg = fma(g * (fresh + fresh), ds, through);
    d_state[0] = ds * alpha;
    if constexpr (!kPlain)
      if (centered) {
        const Vec dc = fma(-(state[2] + state[2]), d_spread, d_state[2]);
        dg = fma(broadcast(fresh), dc, dg);
        d_state[2] = dc * alpha;
      }
    d_theta = dg * weight_decay;
    return dg;
  }

 private:
  PYMETA_FN Vec root(const Vec* state) const {
    if constexpr (!kPlain)
      if (centered) return square_root(state[0] - state[2] * state[2]);
    return square_root(state[0]);
  }
};

PYMETA_KERNEL_END
