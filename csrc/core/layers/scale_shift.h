// A scale and a shift of each channel:
//   z = gamma x + beta     dx = gamma d                   ggamma = sum d x          gbeta = sum d
//   rz = gamma rx + rgamma x + rbeta   rdx = gamma rd + rgamma d   rggamma = sum rd x + d rx   rgbeta = sum rd
#pragma once

#include "normalisation.h"

namespace pymeta {

struct ScaleShiftSpec {
  static constexpr const char* kName = "scale_shift";
  static constexpr const char* kArguments = "nbbc";  // features, gamma, beta, steps or 0
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    const double values[4] = {arguments[0], 0, arguments[1], arguments[2]};
    add_normalisation(builder, values, static_cast<int>(arguments[3]));
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class X>
struct ScaleShift : ChannelMap<X> {
  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    const Real *x = p.x.p, *gamma = p.weight, *beta = p.bias;
    put(p, to, [=](long at, int v) {
      return fma(load(x + at), feature(gamma, v, 1), feature(beta, v, 0));
    });
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    const Real *d = p.d, *gamma = p.weight;
    put(p, below, [=](long at, int v) { return load(d + at) * feature(gamma, v, 1); });
  }
  PYMETA_FN PYMETA_NOINLINE static void gradient(const LayerPass& p, const Sink& weight,
                                                 const Sink& bias) {
    const Real *d = p.d, *x = p.x.p;
    const Extent extent = over(p.extent, p.layer.out);
    X::sum_rows(extent, p.layer.out.channels, weight,
                [&](long at, long) { return load(d + at) * load(x + at); });
    sum_delta<X>(extent, p.layer.out.channels, d, bias);
  }

  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    const Real *x = p.x.p, *rx = t.rx.p, *gamma = p.weight, *rgamma = t.weight, *rbeta = t.bias;
    put(p, to, [=](long at, int v) {
      const Vec moved = fma(load(x + at), feature(rgamma, v, 0), feature(rbeta, v, 0));
      return rx ? fma(load(rx + at), feature(gamma, v, 1), moved) : moved;
    });
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    const Real *d = p.d, *rd = t.rd, *gamma = p.weight, *rgamma = t.weight;
    put(p, below, [=](long at, int v) {
      return fma(load(d + at), feature(rgamma, v, 0), load(rd + at) * feature(gamma, v, 1));
    });
  }
  PYMETA_FN PYMETA_NOINLINE static void tangent_gradient(const LayerPass& p, const LayerTangent& t,
                                                         const Sink& weight, const Sink& bias) {
    const Real *d = p.d, *rd = t.rd, *x = p.x.p, *rx = t.rx.p;
    const Extent extent = over(p.extent, p.layer.out);
    X::sum_rows(extent, p.layer.out.channels, weight, [&](long at, long) {
      const Vec own = load(rd + at) * load(x + at);
      return rx ? fma(load(d + at), load(rx + at), own) : own;
    });
    sum_delta<X>(extent, p.layer.out.channels, rd, bias);
  }

 private:
  template <class Value>  // value(offset into the matrix, vector of channels)
  PYMETA_FN static void put(const LayerPass& p, const Destination& to, Value value) {
    const Extent extent = over(p.extent, p.layer.out);
    const int channels = p.layer.out.channels;
    X::with_epilogue(to, X::stride(channels), extent, [&](const auto& emit) {
      X::map(extent, channels, [&](long at, long column, int r) {
        const int v = static_cast<int>(column / kWidth);
        emit(value(at, v), r, v);
      });
    });
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
