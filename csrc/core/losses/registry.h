// All losses: a new one has its include and its line here.
#pragma once

#include "bce_with_logits.h"
#include "cross_entropy.h"
#include "gaussian_nll.h"
#include "huber.h"
#include "l1.h"
#include "mse.h"
#include "poisson_nll.h"
#include "qlike.h"
#include "quantile.h"
#include "soft_cross_entropy.h"
#include "student_t_nll.h"

// LOSS(kind, rules); the description is rulesSpec. The first is what a Loss is before it is told.
#define PYMETA_LOSSES(LOSS)            \
  LOSS(mse, Mse)                       \
  LOSS(huber, Huber)                   \
  LOSS(cross_entropy, CrossEntropy)    \
  LOSS(bce_with_logits, BceWithLogits) \
  LOSS(l1, L1)                         \
  LOSS(quantile, Quantile)             \
  LOSS(poisson_nll, PoissonNll)        \
  LOSS(qlike, Qlike)                   \
  LOSS(gaussian_nll, GaussianNll)      \
  LOSS(student_t_nll, StudentTNll)     \
  LOSS(soft_cross_entropy, SoftCrossEntropy)

namespace pymeta {

enum class LossKind : std::uint8_t {
#define PYMETA_KIND(kind, rules) kind,
  PYMETA_LOSSES(PYMETA_KIND)
#undef PYMETA_KIND
};

// Calls visit(description) of each loss, with its kind.
template <class Visitor>
PYMETA_MEMBER inline void for_each_loss_spec(Visitor visit) {
#define PYMETA_VISIT(kind, rules) visit(LossKind::kind, rules##Spec{});
  PYMETA_LOSSES(PYMETA_VISIT)
#undef PYMETA_VISIT
}

// visit(its description).
template <class Visitor>
PYMETA_MEMBER inline void with_loss_spec(const Loss& loss, Visitor visit) {
  switch (loss.kind) {
#define PYMETA_CASE(kind, rules) \
  case LossKind::kind:           \
    return visit(rules##Spec{});
    PYMETA_LOSSES(PYMETA_CASE)
#undef PYMETA_CASE
  }
}

PYMETA_MEMBER inline const char* loss_name(const Loss& loss) {
  const char* name = "";
  with_loss_spec(loss, [&](auto spec) { name = decltype(spec)::kName; });
  return name;
}
// What targets are.
PYMETA_MEMBER inline TargetKind target_kind(const Loss& loss) {
  TargetKind kind{};
  with_loss_spec(loss, [&](auto spec) { kind = decltype(spec)::kTargets; });
  return kind;
}
PYMETA_MEMBER inline bool takes_labels(const Loss& loss) {
  return target_kind(loss) == TargetKind::labels;
}
// How many outputs a network has for each target.
PYMETA_MEMBER inline int outputs_per_target(const Loss& loss) {
  int outputs = 1;
  with_loss_spec(loss, [&](auto spec) { outputs = decltype(spec)::kOutputs; });
  return outputs > 0 ? outputs : loss.level_count;
}
// Over how many columns is a row's loss a mean? One of classes is a single number.
PYMETA_MEMBER inline bool is_of_classes(const Loss& loss) {
  const TargetKind kind = target_kind(loss);
  return kind == TargetKind::labels || kind == TargetKind::distributions;
}
PYMETA_MEMBER inline int mean_columns(const Loss& loss, int out) {
  return is_of_classes(loss) ? 1 : out / outputs_per_target(loss);
}
// The loss that stands in for one of labels where a set's targets are distributions over the classes.
PYMETA_MEMBER inline Loss of_distributions(Loss loss) {
  if (loss.kind == LossKind::cross_entropy) loss.kind = LossKind::soft_cross_entropy;
  return loss;
}
// Columns of the targets that a network of `out` outputs is held against.
PYMETA_MEMBER inline int target_columns(const Loss& loss, int out) {
  return takes_labels(loss) ? 1 : out / outputs_per_target(loss);
}

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// Calls visit(rules) of the kind that is known only at run time.
template <class X, class Visitor>
PYMETA_FN void with_loss(const Loss& loss, Visitor visit) {
  switch (loss.kind) {
#define PYMETA_CASE(name, rules)                                                    \
  case LossKind::name:                                                              \
    if constexpr (X::Family::template kLoss<LossKind::name>) return visit(rules{}); \
    return;
    PYMETA_LOSSES(PYMETA_CASE)
#undef PYMETA_CASE
  }
}

// Nothing where targets are labels.
template <class X, class Visitor>
PYMETA_FN void with_values_loss(const Loss& loss, Visitor visit) {
  switch (loss.kind) {
#define PYMETA_CASE(name, rules)                               \
  case LossKind::name:                                         \
    if constexpr (X::Family::template kLoss<LossKind::name> && \
                  rules##Spec::kTargets != TargetKind::labels) \
      visit(rules{});                                          \
    return;
    PYMETA_LOSSES(PYMETA_CASE)
#undef PYMETA_CASE
  }
}

// row_losses [rows] and, where wanted, gradient [out, rows].
template <class X>
PYMETA_FN PYMETA_NOINLINE void loss_gradient(const Loss& loss, const LossRows& s, Real* row_losses,
                                             Real* gradient) {
  with_loss<X>(loss, [&](auto rules) {
    X::for_indices(s.blocks, [&](int b) {
      const Vec value = rules.value(loss, s, b, gradient);
      store(row_losses + b * kWidth, s.masked(load(s.scale + b * kWidth) * value, b));
    });
  });
}

// The Hessian of the loss times r [out, rows], into product [out, rows].
template <class X>
PYMETA_FN PYMETA_NOINLINE void loss_hessian_product(const Loss& loss, const LossRows& s,
                                                    const Real* r, Real* product) {
  with_loss<X>(loss, [&](auto rules) {
    X::for_indices(s.blocks, [&](int b) { rules.hessian_product(loss, s, b, r, product); });
  });
}

// Of a loss whose targets are no labels, after loss_gradient of the same outputs:

// the gradient with respect to the targets [columns, rows],
template <class X>
PYMETA_FN PYMETA_NOINLINE void loss_target_gradient(const Loss& loss, const LossRows& s,
                                                    Real* gradient) {
  with_values_loss<X>(loss, [&](auto rules) {
    X::for_indices(s.blocks, [&](int b) { rules.target_gradient(loss, s, b, gradient); });
  });
}

// and what reaches them of the gradient's tangent: d2 loss / (d targets d outputs) times r [out, rows], into product
// [columns, rows].
template <class X>
PYMETA_FN PYMETA_NOINLINE void loss_target_tangent(const Loss& loss, const LossRows& s,
                                                   const Real* r, Real* product) {
  with_values_loss<X>(loss, [&](auto rules) {
    X::for_indices(s.blocks, [&](int b) { rules.target_tangent(loss, s, b, r, product); });
  });
}

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
