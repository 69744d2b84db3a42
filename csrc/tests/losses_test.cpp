// The derivatives of every loss are the finite differences of its values, on a machine whose vector is one number.

#undef PYMETA_ISA  // planted_test is compiled for another machine
#undef PYMETA_REAL
#undef PYMETA_FAMILY
#define PYMETA_ISA one_number
#define PYMETA_REAL double
#define PYMETA_FAMILY every
#include "../cuda/machine.h"
#include "../core/families.h"
#include "checks.h"
#include "tests.h"

PYMETA_KERNEL_BEGIN

using testing::check_that;
using testing::Random;

struct OneAfterTheOther {
  using Family = AllCalls;
  template <class Body>
  static void for_indices(int count, Body body) {
    for (int i = 0; i < count; ++i) body(i);
  }
};
using X = OneAfterTheOther;
using Numbers = std::vector<double>;

constexpr int kRows = 5, kOut = 4;
constexpr double kStep = 1e-5;

// A loss of a few rows, whose outputs and targets can be moved.
struct Trial {
  const char* name;
  Loss loss;
  Numbers outputs, targets, scale, elements, kept, row_losses;

  Trial(const Loss& of, bool by_element, Random& random)
      : name(loss_name(of)),
        loss(of),
        outputs(kOut * kRows),
        targets(static_cast<std::size_t>(target_columns(of, kOut)) * kRows),
        scale(kRows),
        kept(kOut * kRows),
        row_losses(kRows) {
    for (double& y : outputs) y = 2 * random.symmetric();
    for (double& t : targets) t = takes_labels(of) ? double(random.below(kOut)) : random.uniform();
    for (double& s : scale) s = random.uniform();
    scale[kRows - 1] = 0;
    if (!by_element || is_of_classes(of)) return;
    for (std::size_t i = 0; i < targets.size(); ++i)
      elements.push_back(random.below(3) == 0 ? 0 : random.uniform());
  }

  LossRows rows() {
    return {kOut,
            target_columns(loss, kOut),
            kRows,
            outputs.data(),
            targets.data(),
            scale.data(),
            elements.empty() ? nullptr : elements.data(),
            kept.data(),
            nullptr};
  }
  double value() {
    loss_gradient<X>(loss, rows(), row_losses.data(), nullptr);
    double sum = 0;
    for (const double l : row_losses) sum += l;
    return sum;
  }
  Numbers gradient() {
    Numbers g(outputs.size());
    loss_gradient<X>(loss, rows(), row_losses.data(), g.data());
    return g;
  }
  double gradient_along(const Numbers& r) { return dot(gradient(), r); }

  static double dot(const Numbers& a, const Numbers& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
  }

  // Is each entry of `wanted` the slope of f as that entry of `moved` changes? A central difference errs by the step's
  // square times a third derivative, and by a rounding of the value over the step.
  template <class F>
  void compare(const char* what, const Numbers& wanted, Numbers& moved, F f) {
    for (std::size_t i = 0; i < moved.size(); ++i) {
      const double before = moved[i];
      moved[i] = before + kStep;
      const double above = f();
      moved[i] = before - kStep;
      const double below = f();
      moved[i] = before;
      const double slope = (above - below) / (2 * kStep);
      CHECK(std::fabs(slope - wanted[i]) <= 1e-8 * (1 + std::fabs(slope)),
            std::string(name) + ": " + what + " " + std::to_string(i) + " is " +
                std::to_string(wanted[i]) + ", its finite difference " + std::to_string(slope));
    }
  }

  void run(Random& random) {
    Numbers r(outputs.size()), product(outputs.size()), to_targets(targets.size());
    for (double& v : r) v = random.symmetric();
    compare("gradient", gradient(), outputs, [&] { return value(); });
    loss_hessian_product<X>(loss, rows(), r.data(), product.data());
    compare("Hessian product", product, outputs, [&] { return gradient_along(r); });
    if (takes_labels(loss)) return;
    gradient();
    loss_target_gradient<X>(loss, rows(), to_targets.data());
    compare("gradient to targets", to_targets, targets, [&] { return value(); });
    gradient();
    loss_target_tangent<X>(loss, rows(), r.data(), to_targets.data());
    compare("tangent to targets", to_targets, targets, [&] { return gradient_along(r); });
  }
};

// A target of weight 0 contributes nothing, whatever it and its outputs are.
void test_masked_targets() {
  for_each_loss_spec([&](LossKind kind, auto spec) {
    Random random(7);
    Loss loss;
    loss.kind = kind;
    const double level = 0.25;
    loss.levels = &level;
    loss.constant = spec.constant(loss);
    Trial trial(loss, true, random);
    if (trial.elements.empty()) return;
    trial.elements[0] = 0;
    const double before = trial.value();
    const Numbers gradient = trial.gradient();
    for (std::size_t o = 0; o < trial.outputs.size(); o += trial.targets.size())
      trial.outputs[o] = std::nan("");
    trial.targets[0] = std::nan("");
    CHECK(trial.value() == before && trial.gradient() == gradient && gradient[0] == 0,
          std::string(trial.name) + ": a target of weight 0 shows");
  });
}

// Each target's own loss: times its weight, what it adds to its row's.
void test_losses_of_targets() {
  for_each_loss_spec([&](LossKind kind, auto spec) {
    Random random(8);
    Loss loss;
    loss.kind = kind;
    const double levels[2] = {0.25, 0.75};
    loss.levels = levels;
    loss.level_count = 2;
    loss.constant = spec.constant(loss);
    Trial trial(loss, true, random);
    if (trial.elements.empty()) return;
    Numbers values(trial.targets.size());
    LossRows rows = trial.rows();
    rows.values = values.data();
    loss_gradient<X>(loss, rows, trial.row_losses.data(), nullptr);
    double sum = 0, magnitude = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double part = values[i] * trial.elements[i] * trial.scale[i % kRows];
      sum += part;
      magnitude += std::fabs(part);
    }
    CHECK(std::fabs(sum - trial.value()) <= 1e-14 * magnitude,
          std::string(trial.name) + ": its targets' losses are not its rows'");
  });
}

void test_each_loss() {
  const double weight[kOut] = {0.5, 1.5, 2, 0.75}, pos_weight[kOut] = {3, 1, 0.25, 2};
  const double levels[2] = {0.25, 0.9};
  for_each_loss_spec([&](LossKind kind, auto spec) {
    for (std::uint64_t seed = 1; seed <= 6; ++seed) {
      Random random(seed);
      Loss loss;
      loss.kind = kind;
      loss.levels = levels;
      loss.dof = 3;
      if (seed % 2 == 0) {
        loss.delta = 0.5;
        loss.label_smoothing = 0.25;
        loss.weight = weight;
        loss.pos_weight = pos_weight;
        loss.level_count = 2;
        loss.dof = 0.5;
      }
      loss.constant = spec.constant(loss);
      Trial(loss, seed % 3 == 0, random).run(random);
    }
  });
}

PYMETA_KERNEL_END

namespace pymeta::testing {
void test_losses() {
  one_number::test_each_loss();
  one_number::test_masked_targets();
  one_number::test_losses_of_targets();
}
}  // namespace pymeta::testing
