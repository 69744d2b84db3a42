// Batch normalisation by the statistics of each task's own set: every feature over the set's rows (normalisation.h).
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

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class X>
struct BatchNorm : Normalisation<X, /*kOverRows=*/true> {};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
