// torch.nn.HuberLoss:  (y - t)^2 / 2 where |y - t| < delta, else delta (|y - t| - delta / 2);
// slope clamp(y - t, -delta, delta), curvature 1 inside and 0 outside; the same with the other sign for t.
#pragma once

#include "loss.h"

namespace pymeta {

struct HuberSpec : LossSpec {
  static constexpr const char* kName = "huber";
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

struct HuberElement {
  Real delta;

  PYMETA_FN HuberElement(const Loss& loss, int) : delta(Real(loss.delta)) {}

  PYMETA_FN Vec add_value(Vec y, Vec t, Vec sum, Vec& slope, Real*) const {
    const Vec error = y - t, size = absolute(error), edge = broadcast(delta);
    const IntVec inside = size < edge;
    slope = clamped(error);
    return sum + select(inside, error * error * Real(0.5), edge * (size - edge * Real(0.5)));
  }
  PYMETA_FN Vec curvature(Vec y, Vec t, const Real*) const {
    return select(absolute(y - t) < broadcast(delta), broadcast(1), zero());
  }
  PYMETA_FN Vec target_slope(Vec y, Vec t, const Real*) const { return -clamped(y - t); }
  PYMETA_FN Vec mixed(Vec y, Vec t, const Real* kept) const { return -curvature(y, t, kept); }

 private:
  PYMETA_FN Vec clamped(Vec error) const {
    const Vec edge = broadcast(delta);
    const Vec slope = select(absolute(error) < edge, error, with_sign_of(edge, error));
    return select(error != error, error, slope);  // keeps a NaN
  }
};
using Huber = Elementwise<HuberElement>;

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
