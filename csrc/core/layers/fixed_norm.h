// Normalisation by statistics that are given and stay as they are, such as the running ones of a BatchNorm in eval mode:
//   z = s (x - mean)   s = 1 / sqrt(variance + eps)   dx = s d   rz = s rx   rdx = s rd
// Its weight is the variance, its bias the mean; nobody wants a gradient of them, and theirs is zero. The scale and the shift
// behind it are a layer of their own (scale_shift.h).
#pragma once

#include "normalisation.h"

namespace pymeta {

struct FixedNormSpec {
  static constexpr const char* kName = "fixed_norm";
  static constexpr const char* kArguments = "nxc";  // features, eps, steps or 0
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    const double values[4] = {arguments[0], arguments[1], 1, 1};
    add_normalisation(builder, values, static_cast<int>(arguments[2]));
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class X>
struct FixedNorm : ChannelMap<X> {
  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    scaled(p, p.x.p, p.bias, to);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    scaled(p, p.d, nullptr, below);
  }
  PYMETA_FN static void gradient(const LayerPass& p, const Sink& weight, const Sink& bias) {
    no_gradient<X>(p.layer.out.channels, weight);
    no_gradient<X>(p.layer.out.channels, bias);
  }

  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    scaled(p, t.rx.p, nullptr, to);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    scaled(p, t.rd, nullptr, below);
  }
  PYMETA_FN static void tangent_gradient(const LayerPass& p, const LayerTangent&,
                                         const Sink& weight, const Sink& bias) {
    gradient(p, weight, bias);
  }

 private:
  // s (v - mean); zero where v or mean is null
  PYMETA_FN PYMETA_NOINLINE static void scaled(const LayerPass& p, const Real* v, const Real* mean,
                                               const Destination& to) {
    const Slices<X, true> s{over(p.extent, p.layer.out), p.layer.out.channels};
    const Real* variance = p.weight;
    const Real eps = Real(p.layer.eps);
    X::with_epilogue(to, X::stride(s.features), s.extent, [&](const auto& emit) {
      X::for_indices(s.count(), [&](int column) {
        const Vec inverse = Real(1) / square_root(feature(variance, column, 1) + eps);
        const Vec centre = feature(mean, column, 0);
        for (int r = 0; r < s.length(); ++r) {
          const Vec value = v ? (load(v + s.at(column, r)) - centre) * inverse : zero();
          emit(X::masked_columns(value, s.features, column), r, column);
        }
      });
    });
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
