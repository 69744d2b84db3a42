// The squared error, as torch.nn.MSELoss:  (y - t)^2,  slope 2 (y - t),  curvature 2;  d/dt 2 (t - y),  d2/dy dt -2
#pragma once

#include "loss.h"

namespace pymeta {

struct MseSpec : LossSpec {
  static constexpr const char* kName = "mse";
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

struct MseElement {
  PYMETA_FN MseElement(const Loss&, int) {}

  PYMETA_FN Vec add_value(Vec y, Vec t, Vec sum, Vec& slope, Real*) const {
    const Vec error = y - t;
    slope = error + error;
    return fma(error, error, sum);
  }
  PYMETA_FN Vec curvature(Vec, Vec, const Real*) const { return broadcast(2); }
  PYMETA_FN Vec target_slope(Vec y, Vec t, const Real*) const { return (t - y) + (t - y); }
  PYMETA_FN Vec mixed(Vec, Vec, const Real*) const { return broadcast(-2); }
};
using Mse = Elementwise<MseElement>;

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
