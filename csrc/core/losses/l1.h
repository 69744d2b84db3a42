// torch.nn.L1Loss:  |y - t|,  slope its sign and 0 at t, no curvature.
#pragma once

#include "loss.h"

namespace pymeta {

struct L1Spec : LossSpec {
  static constexpr const char* kName = "l1";
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

struct L1Element {
  PYMETA_FN L1Element(const Loss&, int) {}

  PYMETA_FN Vec add_value(Vec y, Vec t, Vec sum, Vec& slope, Real*) const {
    slope = sign(y - t);
    return sum + absolute(y - t);
  }
  PYMETA_FN Vec curvature(Vec, Vec, const Real*) const { return zero(); }
  PYMETA_FN Vec target_slope(Vec y, Vec t, const Real*) const { return -sign(y - t); }
  PYMETA_FN Vec mixed(Vec, Vec, const Real*) const { return zero(); }

 private:
  // Of 0 and NaN: itself.
  PYMETA_FN static Vec sign(Vec v) {
    return select(absolute(v) > zero(), with_sign_of(broadcast(1), v), v);
  }
};
using L1 = Elementwise<L1Element>;

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
