// torch.nn.CrossEntropyLoss with label l, class weights c, smoothing e, p = softmax(y), kappa = (1 - e) c_l + e / C sum c:
//   (1 - e) c_l (lse - y_l) + e / C sum_j c_j (lse - y_j)
//   gradient kappa p_j - (1 - e) c_l [j = l] - e / C c_j;  Hessian times r: kappa p_j (r_j - sum_i p_i r_i)
#pragma once

#include "loss.h"

namespace pymeta {

struct CrossEntropySpec : LossSpec {
  static constexpr const char* kName = "cross_entropy";
  static constexpr TargetKind kTargets = TargetKind::labels;
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// The logarithm of the sum of e^y over a row's outputs; what e^y is relative to the largest goes to `kept`.
struct SoftmaxSum {
  Vec sum, log_sum;

  PYMETA_FN SoftmaxSum(const LossRows& s, int b) : sum(zero()) {
    Vec top = load(s.outputs + s.at(0, b));
    for (int o = 1; o < s.out; ++o) {
      const Vec y = load(s.outputs + s.at(o, b));
      top = select(y > top, y, top);
    }
    for (int o = 0; o < s.out; ++o) {
      const Vec e = exp(load(s.outputs + s.at(o, b)) - top);
      store(s.kept + s.at(o, b), e);
      sum = sum + e;
    }
    log_sum = log(sum) + top;
  }
};

struct CrossEntropyRow {
  Vec own;    // (1 - e) c_l
  Vec kappa;  // own + e / C sum of c
};

PYMETA_FN inline CrossEntropyRow cross_entropy_row(const Loss& loss, int out, Vec label) {
  Vec own = zero();
  Real total = 0;
  for (int o = 0; o < out; ++o) {
    const Real c = class_factor(loss.weight, o);
    own = select(label == broadcast(Real(o)), broadcast(c), own);
    total += c;
  }
  own = own * Real(1 - loss.label_smoothing);
  return {own, own + Real(loss.label_smoothing / out) * total};
}

struct CrossEntropy {
  PYMETA_FN static Vec value(const Loss& loss, const LossRows& s, int b, Real* gradient) {
    const Vec scale = load(s.scale + b * kWidth);
    Vec value = zero();
    const SoftmaxSum softmax(s, b);
    const Vec sum = softmax.sum, log_sum = softmax.log_sum;
    const Vec label = load(s.targets + b * kWidth);
    const CrossEntropyRow row = cross_entropy_row(loss, s.out, label);
    const Real smooth = Real(loss.label_smoothing / s.out);
    for (int o = 0; o < s.out; ++o) {
      const Vec p = load(s.kept + s.at(o, b)) / sum;
      store(s.kept + s.at(o, b), p);
      Vec q = select(label == broadcast(Real(o)), row.own, zero());
      if (smooth != 0) q = q + broadcast(class_factor(loss.weight, o) * smooth);
      value = value + select(q == Real(0), zero(), q * (log_sum - load(s.outputs + s.at(o, b))));
      if (gradient) store(gradient + s.at(o, b), s.masked(scale * (row.kappa * p - q), b));
    }
    return value;
  }
  PYMETA_FN static void hessian_product(const Loss& loss, const LossRows& s, int b, const Real* r,
                                        Real* product) {
    const Vec scale = load(s.scale + b * kWidth);
    const CrossEntropyRow row = cross_entropy_row(loss, s.out, load(s.targets + b * kWidth));
    Vec mean = zero();
    for (int o = 0; o < s.out; ++o)
      mean = fma(load(s.kept + s.at(o, b)), load(r + s.at(o, b)), mean);
    const Vec factor = scale * row.kappa;
    for (int o = 0; o < s.out; ++o)
      store(product + s.at(o, b),
            s.masked(factor * load(s.kept + s.at(o, b)) * (load(r + s.at(o, b)) - mean), b));
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
