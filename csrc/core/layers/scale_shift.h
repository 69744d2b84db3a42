// A scale and a shift of each channel, or of each channel at each position:
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

// Of each element of a row: the tensors are as torch has them, [channels, height, width], or [channels, length] where
// the height is 0. Without tensors it only says which shape the rows have.
struct ElementwiseAffineSpec {
  static constexpr const char* kName = "elementwise_affine";
  static constexpr const char* kArguments = "ncnbb";  // channels, height, width, gamma, beta
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    const int channels = static_cast<int>(arguments[0]), height = static_cast<int>(arguments[1]);
    const int width = static_cast<int>(arguments[2]);
    const Shape shape{height > 0 ? height : 1, width, channels};
    builder.expect(shape);
    if (arguments[3] == 0 && arguments[4] == 0) return;
    Tensor tensor{channels, shape.positions(), true};
    if (height > 0) tensor.width = width;
    Layer& layer = builder.append(shape, shape);
    if (arguments[3] != 0) layer.weight = builder.tensor(tensor);
    if (arguments[4] != 0) layer.bias = builder.tensor(tensor);
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// Where the numbers of a vector of channels at a position lie.
template <class X>
struct OfChannels {
  PYMETA_FN static long at(const Layer&, int, int vector) {
    return static_cast<long>(vector) * kWidth;
  }
  // sum of body(offset into the matrix) over all rows and positions
  template <class Body>
  PYMETA_FN static void sum(const LayerPass& p, const Sink& sink, Body body) {
    X::sum_rows(over(p.extent, p.layer.out), p.layer.out.channels, sink,
                [&](long at, long) { return body(at); });
  }
};
template <class X>
struct OfElements {
  PYMETA_FN static long at(const Layer& layer, int position, int vector) {
    return position * X::stride(layer.out.channels) + static_cast<long>(vector) * kWidth;
  }
  template <class Body>
  PYMETA_FN static void sum(const LayerPass& p, const Sink& sink, Body body) {
    const long row = X::stride(p.layer.out.channels);
    for (int position = 0; position < p.layer.out.positions(); ++position) {
      const long first = position * row, from = position * p.extent.rows * row;
      X::sum_rows(p.extent, p.layer.out.channels, sink.from(first),
                  [&](long at, long) { return body(from + at); });
    }
  }
};

template <class X, template <class> class Of>
struct Affine : ChannelMap<X> {
  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    const Real *x = p.x.p, *gamma = p.weight, *beta = p.bias;
    put(p, to, [=](long at, long w) {
      return fma(load(x + at), number(gamma, w, 1), number(beta, w, 0));
    });
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    const Real *d = p.d, *gamma = p.weight;
    put(p, below, [=](long at, long w) { return load(d + at) * number(gamma, w, 1); });
  }
  PYMETA_FN PYMETA_NOINLINE static void gradient(const LayerPass& p, const Sink& weight,
                                                 const Sink& bias) {
    const Real *d = p.d, *x = p.x.p;
    Of<X>::sum(p, weight, [&](long at) { return load(d + at) * load(x + at); });
    Of<X>::sum(p, bias, [&](long at) { return load(d + at); });
  }

  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    const Real *x = p.x.p, *rx = t.rx.p, *gamma = p.weight, *rgamma = t.weight, *rbeta = t.bias;
    put(p, to, [=](long at, long w) {
      const Vec moved = fma(load(x + at), number(rgamma, w, 0), number(rbeta, w, 0));
      return rx ? fma(load(rx + at), number(gamma, w, 1), moved) : moved;
    });
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    const Real *d = p.d, *rd = t.rd, *gamma = p.weight, *rgamma = t.weight;
    put(p, below, [=](long at, long w) {
      return fma(load(d + at), number(rgamma, w, 0), load(rd + at) * number(gamma, w, 1));
    });
  }
  PYMETA_FN PYMETA_NOINLINE static void tangent_gradient(const LayerPass& p, const LayerTangent& t,
                                                         const Sink& weight, const Sink& bias) {
    const Real *d = p.d, *rd = t.rd, *x = p.x.p, *rx = t.rx.p;
    Of<X>::sum(p, weight, [&](long at) {
      const Vec own = load(rd + at) * load(x + at);
      return rx ? fma(load(d + at), load(rx + at), own) : own;
    });
    Of<X>::sum(p, bias, [&](long at) { return load(rd + at); });
  }

 private:
  PYMETA_FN static Vec number(const Real* numbers, long at, Real otherwise) {
    return numbers ? load(numbers + at) : broadcast(otherwise);
  }
  template <class Value>  // value(offset into the matrix, into the numbers)
  PYMETA_FN static void put(const LayerPass& p, const Destination& to, Value value) {
    const Layer& layer = p.layer;
    const long row = X::stride(layer.out.channels);
    X::with_epilogue(to, row, over(p.extent, layer.out), [&](const auto& emit) {
      X::for_positions(p.extent, layer.out, [&](int y, int x, auto each) {
        const int position = y * layer.out.width + x;
        each([&](long at, long, int r, int v) {
          emit(value(at, Of<X>::at(layer, position, v)), r, v);
        });
      });
    });
  }
};

template <class X>
struct ScaleShift : Affine<X, OfChannels> {};

template <class X>
struct ElementwiseAffine : Affine<X, OfElements> {
  PYMETA_FN static PackedTensor packed_weight(const Layer& layer) {
    const int channels = layer.out.channels;
    return {0, layer.out.positions(), channels, static_cast<int>(X::stride(channels)), true};
  }
  PYMETA_FN static PackedTensor packed_bias(const Layer& layer) { return packed_weight(layer); }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
