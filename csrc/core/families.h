// Families of calls: what an executor X is compiled for, X::Family.
//
// A family says which layers and losses its networks have, and whether its calls have extras: everything but the query loss after
// plain steps of gradient descent, and its gradient summed over tasks. One extra has a name of its own: a
// seed, where the caller says what flows into the losses and predictions. Rows that are left out (of weight 0, or with the label to ignore) are
// no extra, but a family may do without them. What a family lacks is not compiled. On the CPU `rows` and `lanes` have all of it, and `stacked`
// has seeds and all rows. A kernel of the GPU is loaded as one piece and keeps registers and stack for the
// most that it might do, so there are several (cuda/families.h).
#pragma once

#include "layers/registry.h"
#include "losses/registry.h"

#ifdef PYMETA_MACHINE
#include "optimizers/rates.h"
#endif

namespace pymeta {

struct AllCalls {
  template <LayerKind kind>
  static constexpr bool kLayer = true;
  template <LossKind kind>
  static constexpr bool kLoss = true;
  static constexpr bool kExtras = true;
  static constexpr bool kSeeds = true;
  static constexpr bool kLeavesOut = true;
};

// May a row's output depend on the set's other rows?
template <class Family>
constexpr bool kMixesRows =
#define PYMETA_OR(kind, rules) \
  (Family::template kLayer<LayerKind::kind> && rules##Spec::kMixesRows) ||
    PYMETA_LAYERS(PYMETA_OR) false;
#undef PYMETA_OR
// May a layer have parameters for each step?
template <class Family>
constexpr bool kHasSteps = Family::template kLayer<LayerKind::batch_norm> ||
                           Family::template kLayer<LayerKind::step_batch_norm> ||
                           Family::template kLayer<LayerKind::norm_pool> ||
                           Family::template kLayer<LayerKind::fixed_norm> ||
                           Family::template kLayer<LayerKind::scale_shift>;

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// Is it asked for? Never where the family does not have it: emulated blocks end the process of a host that chose wrongly.
template <bool kHas>
PYMETA_FN bool asked_of_family([[maybe_unused]] bool asked) {
  if constexpr (kHas) {
    return asked;
  } else {
#ifdef PYMETA_EMULATE
    if (asked) __builtin_trap();
#endif
    return false;
  }
}
template <class X>
PYMETA_FN bool extra(bool asked) {
  return asked_of_family<X::Family::kExtras>(asked);
}
template <class X>
PYMETA_FN bool may_leave_out(const RowSet<Real>& set) {
  return asked_of_family<X::Family::kLeavesOut>(set.has_weightless);
}
template <class X>
PYMETA_FN bool seed_is_given(bool asked) {
  return asked_of_family<X::Family::kSeeds>(asked);
}
template <class Set>
bool has_extras(const Set& set) {
  return set.offset || set.weight_columns > 1;
}
// Is anything asked for that a family without extras does not have?
template <class Family>
bool has_extras(const Call<Real>& call) {
  const Cotangents<Real>& given = call.cotangents;
  const bool seeds = (call.job == Job::meta && !call.query.y) || given.losses || given.predictions;
  const bool of_meta =
      call.job == Job::meta && (call.batches.size > 0 || !steps_scale_gradient(call));
  const bool leaves_out = call.support.has_weightless || call.query.has_weightless;
  return (seeds && !Family::kSeeds) || (leaves_out && !Family::kLeavesOut) || of_meta ||
         call.validation.x || call.train_curves || call.lr.is_spread() ||
         call.optimizer.clip_norm > 0 || call.is_anchored() || call.lr_gradient ||
         call.step_weights || call.task_clip > 0 || call.by_support || given.adapted ||
         given.step_losses || call.wants_input_gradient() || call.ys_gradient || call.yq_gradient ||
         call.support_weights_gradient || call.query_weights_gradient ||
         call.support_offset_gradient || call.query_offset_gradient || call.anchors_gradient ||
         call.parameter_per_task || call.statistics || has_extras(call.support) ||
         has_extras(call.query);
}

// An array of one: null where it is not asked for.
template <class X, class T>
PYMETA_FN T* extra(T* array) {
  return extra<X>(array != nullptr) ? array : nullptr;
}

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
