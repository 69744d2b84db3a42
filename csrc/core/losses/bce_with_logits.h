// torch.nn.BCEWithLogitsLoss, with p = sigmoid(y), c the output's weight and k = 1 + (pos_weight - 1) t:
//   c ((1 - t) y + k softplus(-y)),  slope c ((1 - t) - k (1 - p)),  curvature c k p (1 - p)
//   d/dt c ((pos_weight - 1) softplus(-y) - y),  d2/dy dt -c (1 + (pos_weight - 1) (1 - p))
#pragma once

#include "loss.h"

namespace pymeta {

struct BceWithLogitsSpec : LossSpec {
  static constexpr const char* kName = "bce_with_logits";
  static constexpr TargetKind kTargets = TargetKind::probabilities;
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

struct BceElement {
  Real positive, weight;

  PYMETA_FN BceElement(const Loss& loss, int o)
      : positive(loss.pos_weight ? Real(loss.pos_weight[o]) : Real(1)),
        weight(class_factor(loss.weight, o)) {}

  PYMETA_FN Vec add_value(Vec y, Vec t, Vec sum, Vec& slope, Real* probability) const {
    const Vec k = (broadcast(positive) - Real(1)) * t + Real(1), c = broadcast(weight);
    const Vec tail = exp(-absolute(y));
    const Vec soft = soft_plus(y, tail);
    const Vec p = select(y < Real(0), tail, broadcast(1)) / (tail + Real(1));
    store(probability, p);
    slope = c * ((Real(1) - t) - k * (Real(1) - p));
    return sum + c * ((Real(1) - t) * y + k * soft);
  }
  PYMETA_FN Vec curvature(Vec, Vec t, const Real* probability) const {
    const Vec k = (broadcast(positive) - Real(1)) * t + Real(1), p = load(probability);
    return broadcast(weight) * k * p * (Real(1) - p);
  }
  PYMETA_FN Vec target_slope(Vec y, Vec, const Real*) const {
    const Vec more = broadcast(positive) - Real(1);
    return broadcast(weight) * (more * soft_plus(y, exp(-absolute(y))) - y);
  }
  PYMETA_FN Vec mixed(Vec, Vec, const Real* probability) const {
    const Vec more = broadcast(positive) - Real(1);
    return -(broadcast(weight) * (more * (Real(1) - load(probability)) + Real(1)));
  }

 private:
  // softplus(-y), with tail = exp(-|y|)
  PYMETA_FN static Vec soft_plus(Vec y, Vec tail) { return log1p(tail) + at_least(-y, zero()); }
};
using BceWithLogits = Elementwise<BceElement>;

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
