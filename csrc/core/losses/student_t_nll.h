// The negative log likelihood of Student's t distribution with v degrees of freedom, of which a location and a log scale are
// predicted:
//   rho(z) = (v + 1) / 2 log(1 + z^2 / v),  psi = (v + 1) z / (v + z^2),  h = (v + 1) (v - z^2) / (v + z^2)^2
//   constant log Gamma(v / 2) - log Gamma((v + 1) / 2) + log(pi v) / 2
#pragma once

#include <cmath>

#include "location_scale.h"

namespace pymeta {

struct StudentTNllSpec : LossSpec {
  static constexpr const char* kName = "student_t_nll";
  static constexpr int kOutputs = 2;
  static double constant(const Loss& loss) {
    return std::lgamma(loss.dof / 2) - std::lgamma((loss.dof + 1) / 2) +
           0.5 * std::log(loss.dof * 3.14159265358979323846);
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

struct StudentTResidual {
  Real dof;

  PYMETA_FN explicit StudentTResidual(const Loss& loss) : dof(Real(loss.dof)) {}

  PYMETA_FN Vec rho(Vec z) const { return log1p(z * z / broadcast(dof)) * ((dof + 1) / 2); }
  PYMETA_FN Vec psi(Vec z) const { return z * (dof + 1) / (z * z + dof); }
  PYMETA_FN Vec h(Vec z) const {
    const Vec square = z * z, spread = square + dof;
    return (dof - square) / spread * (dof + 1) / spread;
  }
};
using StudentTNll = LocationScale<StudentTResidual>;

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
