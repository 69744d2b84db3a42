// Losses of a set of rows: value, gradient and Hessian-vector product, side by side.
//
// Everything here is class-major ([out, rows], executor.h), so that a vector holds rows or tasks and never
// classes. `scale` [rows] is the row's share of the mean (its weight over the sum of weights, with 1 / out for the
// losses that are means over outputs), 0 for padding. `probability` [out, rows] is kept for the tangent: softmax
// or sigmoid of the outputs. With s = scale, y = outputs, t = targets, p = probability:
//   mse    s (y - t)^2             2 s (y - t)                      2 s r
//   huber  torch.nn.HuberLoss      s clamp(y - t, -delta, delta)    s r where |y - t| < delta
//   bce    s c ((1 - t) y + k softplus(-y)), k = 1 + (pos_weight - 1) t
//          s c ((1 - t) - k (1 - p))                                s c k p (1 - p) r
//   ce     with label l, class weights c, smoothing e, kappa = (1 - e) c_l + e / C sum c:
//          s ((1 - e) c_l (lse - y_l) + e / C sum_j c_j (lse - y_j))
//          s (kappa p_j - (1 - e) c_l [j = l] - e / C c_j)          s kappa p_j (r_j - sum_i p_i r_i)
#pragma once

#include "machine.h"
#include "network.h"

PYMETA_KERNEL_BEGIN

struct LossRows {
  int out;
  int blocks;           // vectors of rows in a class
  const Real* outputs;  // [out, rows]
  const Real* targets;  // [out, rows], or [rows] labels as numbers for cross-entropy
  const Real* scale;    // [rows]
  Real* probability;    // [out, rows]
  const Real* keep;  // lanes: all-ones where the task has the row; null when all have all (Extent)

  // Zero in rows that a task lacks, whatever its parameters made of them.
  PYMETA_FN Vec kept(Vec v, int block) const {
    return keep ? where_kept(v, keep + block * kWidth) : v;
  }
  PYMETA_FN long at(int o, int block) const {
    return (static_cast<long>(o) * blocks + block) * kWidth;
  }
};

PYMETA_FN inline Real class_factor(const double* weights, int o) {
  return weights ? Real(weights[o]) : Real(1);
}

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

// row_losses [rows] and, where wanted, gradient [out, rows].
template <class X>
PYMETA_FN PYMETA_APART void loss_gradient(const Loss& loss, const LossRows& s, Real* row_losses,
                                          Real* gradient) {
  X::each_index(s.blocks, [&](int b) {
    const Vec scale = load(s.scale + b * kWidth);
    Vec value = zero();
    if (loss.kind == LossKind::cross_entropy) {
      Vec top = load(s.outputs + s.at(0, b));
      for (int o = 1; o < s.out; ++o) {
        const Vec y = load(s.outputs + s.at(o, b));
        top = select(y > top, y, top);
      }
      Vec sum = zero();
      for (int o = 0; o < s.out; ++o) {
        const Vec e = exp(load(s.outputs + s.at(o, b)) - top);
        store(s.probability + s.at(o, b), e);
        sum = sum + e;
      }
      const Vec log_sum = log(sum) + top;
      const Vec label = load(s.targets + b * kWidth);
      const CrossEntropyRow row = cross_entropy_row(loss, s.out, label);
      const Real smooth = Real(loss.label_smoothing / s.out);
      for (int o = 0; o < s.out; ++o) {
        const Vec p = load(s.probability + s.at(o, b)) / sum;
        store(s.probability + s.at(o, b), p);
        Vec q = select(label == broadcast(Real(o)), row.own, zero());
        if (smooth != 0) q = q + broadcast(class_factor(loss.weight, o) * smooth);
        value = value + select(q == Real(0), zero(), q * (log_sum - load(s.outputs + s.at(o, b))));
        if (gradient) store(gradient + s.at(o, b), s.kept(scale * (row.kappa * p - q), b));
      }
    } else {
      for (int o = 0; o < s.out; ++o) {
        const Vec y = load(s.outputs + s.at(o, b)), t = load(s.targets + s.at(o, b));
        Vec slope;
        if (loss.kind == LossKind::mse) {
          const Vec error = y - t;
          value = fma(error, error, value);
          slope = error + error;
        } else if (loss.kind == LossKind::huber) {
          const Vec error = y - t, size = absolute(error), delta = broadcast(Real(loss.delta));
          const IntVec inside = size < delta;
          value =
              value + select(inside, error * error * Real(0.5), delta * (size - delta * Real(0.5)));
          slope = select(inside, error, with_sign_of(delta, error));
          slope = select(error != error, error, slope);
        } else {
          const Vec positive = broadcast(loss.pos_weight ? Real(loss.pos_weight[o]) : Real(1));
          const Vec k = (positive - Real(1)) * t + Real(1);
          const Vec c = broadcast(class_factor(loss.weight, o));
          const Vec tail = exp(-absolute(y));
          const Vec soft = log1p(tail) + at_least(-y, zero());  // softplus(-y)
          const Vec p = select(y < Real(0), tail, broadcast(1)) / (tail + Real(1));
          store(s.probability + s.at(o, b), p);
          value = value + c * ((Real(1) - t) * y + k * soft);
          slope = c * ((Real(1) - t) - k * (Real(1) - p));
        }
        if (gradient) store(gradient + s.at(o, b), s.kept(scale * slope, b));
      }
    }
    store(row_losses + b * kWidth, s.kept(scale * value, b));
  });
}

// The Hessian of the loss times r [out, rows], into product [out, rows].
template <class X>
PYMETA_FN PYMETA_APART void loss_hessian_product(const Loss& loss, const LossRows& s, const Real* r,
                                                 Real* product) {
  X::each_index(s.blocks, [&](int b) {
    const Vec scale = load(s.scale + b * kWidth);
    if (loss.kind == LossKind::cross_entropy) {
      const CrossEntropyRow row = cross_entropy_row(loss, s.out, load(s.targets + b * kWidth));
      Vec mean = zero();
      for (int o = 0; o < s.out; ++o)
        mean = fma(load(s.probability + s.at(o, b)), load(r + s.at(o, b)), mean);
      const Vec factor = scale * row.kappa;
      for (int o = 0; o < s.out; ++o)
        store(product + s.at(o, b),
              s.kept(factor * load(s.probability + s.at(o, b)) * (load(r + s.at(o, b)) - mean), b));
      return;
    }
    for (int o = 0; o < s.out; ++o) {
      Vec bend;
      if (loss.kind == LossKind::mse) {
        bend = broadcast(2);
      } else if (loss.kind == LossKind::huber) {
        const Vec error = load(s.outputs + s.at(o, b)) - load(s.targets + s.at(o, b));
        bend = select(absolute(error) < broadcast(Real(loss.delta)), broadcast(1), zero());
      } else {
        const Vec positive = broadcast(loss.pos_weight ? Real(loss.pos_weight[o]) : Real(1));
        const Vec k = (positive - Real(1)) * load(s.targets + s.at(o, b)) + Real(1);
        const Vec p = load(s.probability + s.at(o, b));
        bend = broadcast(class_factor(loss.weight, o)) * k * p * (Real(1) - p);
      }
      store(product + s.at(o, b), s.kept(scale * bend * load(r + s.at(o, b)), b));
    }
  });
}

PYMETA_KERNEL_END
