// torch.nn.PoissonNLLLoss of the logarithm of a rate, for counts t >= 0:  e^y - t y,  slope e^y - t,  curvature e^y;
// d/dt -y,  d2/dy dt -1.  log t!, which depends on no output, is left out as it is there.
#pragma once

#include "loss.h"

namespace pymeta {

struct PoissonNllSpec : LossSpec {
  static constexpr const char* kName = "poisson_nll";
  static constexpr TargetKind kTargets = TargetKind::amounts;
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

struct PoissonNllElement {
  PYMETA_FN PoissonNllElement(const Loss&, int) {}

  PYMETA_FN Vec add_value(Vec y, Vec t, Vec sum, Vec& slope, Real* kept) const {
    const Vec rate = exp(y);
    store(kept, rate);
    slope = rate - t;
    return sum + (rate - t * y);
  }
  PYMETA_FN Vec curvature(Vec, Vec, const Real* kept) const { return load(kept); }
  PYMETA_FN Vec target_slope(Vec y, Vec, const Real*) const { return -y; }
  PYMETA_FN Vec mixed(Vec, Vec, const Real*) const { return broadcast(-1); }
};
using PoissonNll = Elementwise<PoissonNllElement>;

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
