// A layer that does nothing but its activation, where that could not be folded into the layer before it: z = x.
#pragma once

#include "layer.h"

namespace pymeta {

// A network's description names the activation, not the layer: the builder appends one where it is needed.
struct LoneActivationSpec : UndescribedSpec {
  static constexpr bool kMixesRows = false;
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class X>
struct LoneActivation {
  static constexpr bool kTransposesWeight = false;
  static constexpr bool kReadsRowsInPlace = false;
  static constexpr bool kForgetsInput = true;

  PYMETA_FN static PackedTensor packed_weight(const Layer&) { return {}; }
  PYMETA_FN static std::size_t kept_scalars(const Layer&, int, int) { return 0; }

  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    pass_on<X>(over(p.extent, p.layer.in), p.layer.in.channels, p.x.p, to);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    pass_on<X>(over(p.extent, p.layer.in), p.layer.in.channels, p.d, below);
  }
  PYMETA_FN static void gradient(const LayerPass&, const Sink&, const Sink&) {}

  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    if (t.rx.p) return pass_on<X>(over(p.extent, p.layer.in), p.layer.in.channels, t.rx.p, to);
    clear<X>(over(p.extent, p.layer.out), p.layer.out.channels, to.p);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    pass_on<X>(over(p.extent, p.layer.in), p.layer.in.channels, t.rd, below);
  }
  PYMETA_FN static void tangent_gradient(const LayerPass&, const LayerTangent&, const Sink&,
                                         const Sink&) {}

  static double work(const Layer& layer, const Effort& effort) {
    return elementwise_work<X>(layer, effort);
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
