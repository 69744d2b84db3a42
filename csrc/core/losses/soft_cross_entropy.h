// torch.nn.CrossEntropyLoss of a distribution t over the classes, with class weights c, smoothing e, p = softmax(y):
//   sum_j q_j (lse - y_j),  q_j = c_j ((1 - e) t_j + e / C);  kappa = sum_j q_j
//   gradient kappa p_j - q_j;  Hessian times r: kappa p_j (r_j - sum_i p_i r_i)
//   d/dt_j (1 - e) c_j (lse - y_j);  its derivative along r: (1 - e) c_j (sum_i p_i r_i - r_j)
// The loss of a row is one number, and t need not add up to 1. It is what cross_entropy is for a set whose targets are such.
#pragma once

#include "cross_entropy.h"

namespace pymeta {

struct SoftCrossEntropySpec : LossSpec {
  static constexpr const char* kName = "soft_cross_entropy";
  static constexpr TargetKind kTargets = TargetKind::distributions;
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

struct SoftCrossEntropy {
  PYMETA_FN static Vec value(const Loss& loss, const LossRows& s, int b, Real* gradient) {
    const Vec scale = load(s.scale + b * kWidth), kappa = total(loss, s, b);
    const SoftmaxSum softmax(s, b);
    Vec value = zero();
    for (int o = 0; o < s.out; ++o) {
      const Vec p = load(s.kept + s.at(o, b)) / softmax.sum, q = weight(loss, s, o, b);
      store(s.kept + s.at(o, b), p);
      const Vec surprise = softmax.log_sum - load(s.outputs + s.at(o, b));
      value = value + select(q == zero(), zero(), q * surprise);
      if (gradient) store(gradient + s.at(o, b), s.masked(scale * (kappa * p - q), b));
    }
    return value;
  }
  PYMETA_FN static void hessian_product(const Loss& loss, const LossRows& s, int b, const Real* r,
                                        Real* product) {
    const Vec factor = load(s.scale + b * kWidth) * total(loss, s, b), mean = expected(s, r, b);
    for (int o = 0; o < s.out; ++o)
      store(product + s.at(o, b),
            s.masked(factor * load(s.kept + s.at(o, b)) * (load(r + s.at(o, b)) - mean), b));
  }
  PYMETA_FN static void target_gradient(const Loss& loss, const LossRows& s, int b,
                                        Real* gradient) {
    const Vec scale = load(s.scale + b * kWidth) * Real(1 - loss.label_smoothing);
    const Vec log_sum = log_sum_again(s, b);
    for (int o = 0; o < s.out; ++o) {
      const Vec surprise = log_sum - load(s.outputs + s.at(o, b));
      store(gradient + s.at(o, b), s.masked(scale * class_factor(loss.weight, o) * surprise, b));
    }
  }
  PYMETA_FN static void target_tangent(const Loss& loss, const LossRows& s, int b, const Real* r,
                                       Real* product) {
    const Vec scale = load(s.scale + b * kWidth) * Real(1 - loss.label_smoothing);
    const Vec mean = expected(s, r, b);
    for (int o = 0; o < s.out; ++o)
      store(product + s.at(o, b),
            s.masked(scale * class_factor(loss.weight, o) * (mean - load(r + s.at(o, b))), b));
  }

 private:
  // q_o
  PYMETA_FN static Vec weight(const Loss& loss, const LossRows& s, int o, int b) {
    const Vec t = load(s.targets + s.at(o, b)) * Real(1 - loss.label_smoothing);
    return (t + Real(loss.label_smoothing / s.out)) * class_factor(loss.weight, o);
  }
  PYMETA_FN static Vec total(const Loss& loss, const LossRows& s, int b) {
    Vec sum = zero();
    for (int o = 0; o < s.out; ++o) sum = sum + weight(loss, s, o, b);
    return sum;
  }
  // The mean of r over the classes, by p.
  PYMETA_FN static Vec expected(const LossRows& s, const Real* r, int b) {
    Vec mean = zero();
    for (int o = 0; o < s.out; ++o)
      mean = fma(load(s.kept + s.at(o, b)), load(r + s.at(o, b)), mean);
    return mean;
  }
  // From the largest output, whose p is the largest: log p of the others may have underflown.
  PYMETA_FN static Vec log_sum_again(const LossRows& s, int b) {
    Vec top = load(s.outputs + s.at(0, b)), p = load(s.kept + s.at(0, b));
    for (int o = 1; o < s.out; ++o) {
      const Vec y = load(s.outputs + s.at(o, b));
      p = select(y > top, load(s.kept + s.at(o, b)), p);
      top = select(y > top, y, top);
    }
    return top - log(p);
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
