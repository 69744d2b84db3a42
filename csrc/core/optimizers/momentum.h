// Gradient descent with momentum:  m = mu m + g + wd theta;  d = m, or g + wd theta + mu m (Nesterov)
#pragma once

#include "rule.h"

PYMETA_KERNEL_BEGIN

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

PYMETA_KERNEL_END
