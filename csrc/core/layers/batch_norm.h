// Batch normalisation by the statistics of each task's own set: every feature over the set's rows (normalisation.h). With a
// scale and a shift for each inner step (Antoniou et al. 2019) it is a layer of its own name; which row of its tensors a step
// uses is the passes' business (algorithms/passes.h).
#pragma once

#include "normalisation.h"

namespace pymeta {

struct BatchNormSpec {
  static constexpr const char* kName = "batch_norm";
  static constexpr const char* kArguments = "nxbb";  // features, eps, gamma, beta
  static constexpr bool kMixesRows = true;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    add_normalisation(builder, arguments);
  }
};

struct StepBatchNormSpec {
  static constexpr const char* kName = "step_batch_norm";
  static constexpr const char* kArguments = "nxbbn";  // features, eps, gamma, beta, steps
  static constexpr bool kMixesRows = true;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    add_normalisation(builder, arguments, static_cast<int>(arguments[4]));
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class X>
struct BatchNorm : Normalisation<X, /*kOverRows=*/true> {};
template <class X>
struct StepBatchNorm : BatchNorm<X> {};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
