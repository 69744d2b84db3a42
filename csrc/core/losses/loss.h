// What a loss is: the interface of the files beside this one.
//
// Everything here is class-major ([out, rows], cpu/executor.h), so that a vector holds rows or tasks and never
// classes. `scale` [rows] is the row's share of the mean (its weight over the sum of weights, with 1 / columns for the
// losses that are means over targets), 0 for padding. `kept` [out, rows] is what the value leaves for the other functions:
// softmax or sigmoid of the outputs, an exponential. Each file has a description, true on every machine,
//
//   struct HuberSpec : LossSpec    kName      how it is spelled
//                                  kTargets   what targets are
//                                  kOutputs   of the network for each target; 0: as many as the loss has levels
//                                  constant(loss)   what is added to each target's loss and depends on none
// and its rules on one vector of rows,
//   struct Huber
//     value(loss, rows, block, gradient)        the rows' losses before `scale`; where `gradient` [out, rows] is wanted, the
//                                               gradient with respect to the outputs, times scale; where targets have
//                                               weights and `values` is wanted, what each of them weighs goes there
//     hessian_product(loss, rows, block, r, product)    the Hessian times r [out, rows], times scale
//     target_gradient(loss, rows, block, gradient)      the gradient with respect to the targets [columns, rows], times scale
//     target_tangent(loss, rows, block, r, product)     the derivative with respect to the targets of the gradient's product with
//                                                       r [out, rows], times scale: what reaches them through an inner step
// of which a loss of labels has the first two, and one that is a sum over outputs of a function of one output and its target
// gives `Elementwise` that function's derivatives instead. Those two about targets are called after `value` of the same outputs, as `hessian_product` is.
// A new loss is one such file, a line in registry.h, its torch form in pymeta/reference (the oracle), and a line in the tests.
#pragma once

#include "../call/network.h"

namespace pymeta {

// Any number; in 0..1; at least 0; a class; a weight for each class.
enum class TargetKind : std::uint8_t { values, probabilities, amounts, labels, distributions };

// What a loss is unless its description says otherwise.
struct LossSpec {
  static constexpr TargetKind kTargets = TargetKind::values;
  static constexpr int kOutputs = 1;
  static double constant(const Loss&) { return 0; }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

struct LossRows {
  int out;
  int columns;           // of targets
  int blocks;            // vectors of rows in a class
  const Real* outputs;   // [out, rows]
  const Real* targets;   // [columns, rows]; labels as numbers
  const Real* scale;     // [rows]
  const Real* elements;  // [columns, rows] weights of single targets, or null: all 1
  Real* kept;            // [out, rows]
  const Real* keep;  // lanes: all-ones where the task has the row; null when all have all (Extent)
  Real* values =
      nullptr;  // [columns, rows] each target's loss, where `elements` are and it is wanted

  // Zero in rows that a task lacks, whatever its parameters made of them.
  PYMETA_FN Vec masked(Vec v, int block) const {
    return keep ? where_kept(v, keep + block * kWidth) : v;
  }
  // What belongs to a target, times its weight; one of weight 0 contributes nothing, whatever it is.
  PYMETA_FN Vec weighed(Vec v, int column, int block) const {
    if (!elements) return v;
    const Vec weight = load(elements + at(column, block));
    return select(weight == zero(), zero(), weight * v);
  }
  // The loss of a target of its own weight, times that.
  PYMETA_FN Vec counted(Vec v, int column, int block) const {
    if (values) store(values + at(column, block), v);
    return weighed(v, column, block);
  }
  PYMETA_FN long at(int o, int block) const {
    return (static_cast<long>(o) * blocks + block) * kWidth;
  }
};

PYMETA_FN inline Real class_factor(const double* weights, int o) {
  return weights ? Real(weights[o]) : Real(1);
}

// Losses that are sums over outputs of a function of one output y and its target t (out = columns). Element has
//   Element(loss, o)                       what it knows of output o
//   add_value(y, t, sum, slope, kept)      sum + its value; gives its slope, and may keep a number
//   curvature(y, t, kept)                  d2 / dy2
//   target_slope(y, t, kept)               d / dt
//   mixed(y, t, kept)                      d2 / dy dt
template <class Element>
struct Elementwise {
  PYMETA_FN static Vec value(const Loss& loss, const LossRows& s, int b, Real* gradient) {
    const Vec scale = load(s.scale + b * kWidth);
    Vec sum = zero();
    for (int o = 0; o < s.out; ++o) {
      const Element element(loss, o);
      const Vec y = load(s.outputs + s.at(o, b)), t = load(s.targets + s.at(o, b));
      Vec slope;
      if (s.elements)
        sum = sum + s.counted(element.add_value(y, t, zero(), slope, s.kept + s.at(o, b)), o, b);
      else
        sum = element.add_value(y, t, sum, slope, s.kept + s.at(o, b));
      if (gradient) store(gradient + s.at(o, b), s.masked(scale * s.weighed(slope, o, b), b));
    }
    return sum;
  }
  PYMETA_FN static void hessian_product(const Loss& loss, const LossRows& s, int b, const Real* r,
                                        Real* product) {
    const Vec scale = load(s.scale + b * kWidth);
    for (int o = 0; o < s.out; ++o) {
      const Element element(loss, o);
      const Vec curvature = element.curvature(load(s.outputs + s.at(o, b)),
                                              load(s.targets + s.at(o, b)), s.kept + s.at(o, b));
      store(product + s.at(o, b),
            s.masked(scale * s.weighed(curvature, o, b) * load(r + s.at(o, b)), b));
    }
  }
  PYMETA_FN static void target_gradient(const Loss& loss, const LossRows& s, int b,
                                        Real* gradient) {
    const Vec scale = load(s.scale + b * kWidth);
    for (int o = 0; o < s.out; ++o) {
      const Element element(loss, o);
      const Vec slope = element.target_slope(load(s.outputs + s.at(o, b)),
                                             load(s.targets + s.at(o, b)), s.kept + s.at(o, b));
      store(gradient + s.at(o, b), s.masked(scale * s.weighed(slope, o, b), b));
    }
  }
  PYMETA_FN static void target_tangent(const Loss& loss, const LossRows& s, int b, const Real* r,
                                       Real* product) {
    const Vec scale = load(s.scale + b * kWidth);
    for (int o = 0; o < s.out; ++o) {
      const Element element(loss, o);
      const Vec mixed = element.mixed(load(s.outputs + s.at(o, b)), load(s.targets + s.at(o, b)),
                                      s.kept + s.at(o, b));
      store(product + s.at(o, b),
            s.masked(scale * s.weighed(mixed, o, b) * load(r + s.at(o, b)), b));
    }
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
