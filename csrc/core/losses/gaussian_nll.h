// The negative log likelihood of a normal distribution, of which a mean and a log standard deviation are predicted:
//   rho(z) = z^2 / 2,  constant log(2 pi) / 2
#pragma once

#include <cmath>

#include "location_scale.h"

namespace pymeta {

struct GaussianNllSpec : LossSpec {
  static constexpr const char* kName = "gaussian_nll";
  static constexpr int kOutputs = 2;
  static double constant(const Loss&) { return 0.5 * std::log(2 * 3.14159265358979323846); }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

struct GaussianResidual {
  PYMETA_FN explicit GaussianResidual(const Loss&) {}

  PYMETA_FN Vec rho(Vec z) const { return z * z * Real(0.5); }
  PYMETA_FN Vec psi(Vec z) const { return z; }
  PYMETA_FN Vec h(Vec) const { return broadcast(1); }
};
using GaussianNll = LocationScale<GaussianResidual>;

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
