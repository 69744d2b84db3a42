// The quantile (pinball) loss (Koenker and Bassett 1978), the mean over the levels q of
//   q max(t - y, 0) + (1 - q) max(y - t, 0),  slope -q below t, 1 - q above it, 0 at t; no curvature.
// Level k of target j is predicted by output k columns + j.
#pragma once

#include "loss.h"

namespace pymeta {

struct QuantileSpec : LossSpec {
  static constexpr const char* kName = "quantile";
  static constexpr int kOutputs = 0;  // one for each level
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

struct Quantile {
  PYMETA_FN static Vec value(const Loss& loss, const LossRows& s, int b, Real* gradient) {
    const Vec scale = load(s.scale + b * kWidth);
    const Real share = Real(1) / Real(loss.level_count);
    Vec sum = zero();
    for (int k = 0; k < loss.level_count; ++k) {
      const Real level = Real(loss.levels[k]);
      for (int j = 0; j < s.columns; ++j) {
        const Vec error = load(s.targets + s.at(j, b)) - load(s.outputs + s.at(output(s, k, j), b));
        const Vec value = at_least(error, zero()) * level + at_least(-error, zero()) * (1 - level);
        sum = sum + s.weighed(value * share, j, b);
        if (Real* values = s.values) {
          const Vec before = k > 0 ? load(values + s.at(j, b)) : zero();
          store(values + s.at(j, b), before + value * share);
        }
        if (gradient)
          store(gradient + s.at(output(s, k, j), b),
                s.masked(scale * s.weighed(slope(error, level) * share, j, b), b));
      }
    }
    return sum;
  }
  PYMETA_FN static void hessian_product(const Loss&, const LossRows& s, int b, const Real*,
                                        Real* product) {
    for (int o = 0; o < s.out; ++o) store(product + s.at(o, b), zero());
  }
  PYMETA_FN static void target_gradient(const Loss& loss, const LossRows& s, int b,
                                        Real* gradient) {
    const Vec scale = load(s.scale + b * kWidth);
    const Real share = Real(1) / Real(loss.level_count);
    for (int j = 0; j < s.columns; ++j) {
      Vec sum = zero();
      for (int k = 0; k < loss.level_count; ++k)
        sum = sum - slope(load(s.targets + s.at(j, b)) - load(s.outputs + s.at(output(s, k, j), b)),
                          Real(loss.levels[k]));
      store(gradient + s.at(j, b), s.masked(scale * s.weighed(sum * share, j, b), b));
    }
  }
  PYMETA_FN static void target_tangent(const Loss&, const LossRows& s, int b, const Real*,
                                       Real* product) {
    for (int j = 0; j < s.columns; ++j) store(product + s.at(j, b), zero());
  }

 private:
  PYMETA_FN static int output(const LossRows& s, int level, int target) {
    return level * s.columns + target;
  }
  // With respect to the output; error = t - y. Of 0 and NaN: itself.
  PYMETA_FN static Vec slope(Vec error, Real level) {
    const Vec above = select(error < zero(), broadcast(1 - level), error);
    return select(error > zero(), broadcast(-level), above);
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
