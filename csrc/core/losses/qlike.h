// QLIKE (Patton 2011) of a realised variance t >= 0 and the logarithm y of the predicted one:  y + t e^-y,
// slope 1 - t e^-y,  curvature t e^-y;  d/dt e^-y,  d2/dy dt -e^-y.
#pragma once

#include "loss.h"

namespace pymeta {

struct QlikeSpec : LossSpec {
  static constexpr const char* kName = "qlike";
  static constexpr TargetKind kTargets = TargetKind::amounts;
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

struct QlikeElement {
  PYMETA_FN QlikeElement(const Loss&, int) {}

  PYMETA_FN Vec add_value(Vec y, Vec t, Vec sum, Vec& slope, Real* kept) const {
    const Vec precision = exp(-y), ratio = t * precision;
    store(kept, precision);
    slope = Real(1) - ratio;
    return sum + (y + ratio);
  }
  PYMETA_FN Vec curvature(Vec, Vec t, const Real* kept) const { return t * load(kept); }
  PYMETA_FN Vec target_slope(Vec, Vec, const Real* kept) const { return load(kept); }
  PYMETA_FN Vec mixed(Vec, Vec, const Real* kept) const { return -load(kept); }
};
using Qlike = Elementwise<QlikeElement>;

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
