// Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019); t is the step, from 1:
//   g += wd theta (unless decoupled);  m = b1 m + (1 - b1) g;  s = b2 s + (1 - b2) g^2
//   d = (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps), + wd theta where decoupled
// computed as m scale / (sqrt(s) + eps') with scale = sqrt(1 - b2^t) / (1 - b1^t), eps' = eps sqrt(1 - b2^t).
// The derivative of sqrt(s) at 0 is taken as 0: dead units have gradients of exactly 0.
#pragma once

#include "rule.h"

PYMETA_KERNEL_BEGIN

// The corrections as they lie in memory: `to` [2], given beta1^t and sqrt(1 - beta2^t).
PYMETA_FN inline void put_correction(const Optimizer& o, double power1, double root, Real* to) {
  to[0] = Real(root / (1 - power1));
  to[1] = Real(o.eps * root);
}

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

PYMETA_KERNEL_END
