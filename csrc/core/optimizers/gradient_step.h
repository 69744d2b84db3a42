// Plain gradient descent:  d = g + wd theta
#pragma once

#include "rule.h"

PYMETA_KERNEL_BEGIN

struct GradientStep {
  static constexpr int kStates = 0;
  Real weight_decay;

  PYMETA_FN explicit GradientStep(const Optimizer& o) : weight_decay(Real(o.weight_decay)) {}
  PYMETA_FN Vec direction(Vec theta, Vec g, Vec*, const Correction&) const {
    return fma(broadcast(weight_decay), theta, g);
  }
  PYMETA_FN Vec direction_vjp(Vec d_direction, Vec, Vec, const Vec*, Vec*, Vec& d_theta,
                              const Correction&) const {
    d_theta = d_direction * weight_decay;
    return d_direction;
  }
};

PYMETA_KERNEL_END
