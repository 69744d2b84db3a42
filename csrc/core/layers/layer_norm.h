// Layer normalisation: every row over its features, of an image each position over its channels (normalisation.h).
#pragma once

#include "normalisation.h"

namespace pymeta {

struct LayerNormSpec {
  static constexpr const char* kName = "layer_norm";
  static constexpr const char* kArguments = "nxbb";  // features, eps, gamma, beta
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    add_normalisation(builder, arguments);
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class X>
struct LayerNorm : Normalisation<X, /*kOverRows=*/false> {};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
