// Convolutions over sequences and images, z(y, x) = b + sum over taps k of x(y, x under k) W[k]:
//   dx(i) = sum over outputs o that see i under k of d(o) W[k]^T      gW[k] = sum over o of x(o under k)^T d(o)
// and the tangents of each, as of a linear layer (linear.h). Taps that lie outside are left out: there is no padding. The
// weight is packed as a linear one's whose inputs are [in / groups, taps]; its transpose is [taps, out, stride(in)]. Where an executor
// has another way for some shapes (winograd.h), it works in scratch memory.
#pragma once

#include "linear.h"
#include "taps.h"
#include "winograd.h"

namespace pymeta {

// (in, out, kernel y x, stride y x, top, bottom, left, right, dilation y x, groups, bias)
template <class Builder>
void add_convolution(Builder& builder, const double* arguments, bool image) {
  const auto number = [=](int i) { return static_cast<int>(arguments[i]); };
  Window window = builder.window(arguments + 2);
  window.groups = number(12);
  double sides[] = {arguments[6], arguments[7], arguments[8], arguments[9]};
  builder.absorb_padding(window, sides);
  const Shape in = builder.shape(number(0));
  if (static_cast<std::int64_t>(window.height) * window.width > kMostTaps)
    builder.refuse("a convolution of more than 256 taps");
  if (number(0) % window.groups != 0 || number(1) % window.groups != 0)
    builder.refuse("a convolution's groups do not divide its channels");
  Layer& layer = builder.append(in, builder.windowed(in, window, sides, number(1)));
  layer.window = window;
  layer.weight = builder.tensor({number(1), number(0) / window.groups * window.taps(), true,
                                 image ? window.height : 0, window.width});
  if (arguments[13] != 0) layer.bias = builder.tensor({1, number(1), false});
}

struct Conv1dSpec {
  static constexpr const char* kName = "conv1d";
  static constexpr const char* kArguments = "nnnnnnccccnnnb";
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    add_convolution(builder, arguments, false);
  }
};
struct Conv2dSpec {
  static constexpr const char* kName = "conv2d";
  static constexpr const char* kArguments = Conv1dSpec::kArguments;
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    add_convolution(builder, arguments, true);
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class X>
struct Convolution {
  static constexpr bool kTransposesWeight = true;
  static constexpr bool kReadsRowsInPlace = false;
  static constexpr bool kDeltaGoesWithTangent = true;

  PYMETA_FN static int repeated_work(const Layer& layer) {
    return groups_of(layer).in * layer.window.taps();
  }
  PYMETA_FN static PackedTensor packed_weight(const Layer& layer) {
    return {0, groups_of(layer).in * layer.window.taps(), layer.out.channels,
            static_cast<int>(X::stride(layer.out.channels)), true};
  }
  PYMETA_FN static std::size_t transposed_scalars(const Layer& layer) {
    return static_cast<std::size_t>(layer.window.taps()) * groups_of(layer).out *
           X::stride(layer.in.channels);
  }
  PYMETA_FN static void transpose(const Layer& layer, const Real* weight, Real* transposed) {
    X::transpose_taps(layer, weight, transposed);
  }
  PYMETA_FN static std::size_t kept_scalars(const Layer&, int, int) { return 0; }
  PYMETA_FN static std::size_t scratch_scalars(const Layer& layer, int rows) {
    return X::convolution_scratch(layer, rows);
  }

  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    const Term term{p.x, p.weight};
    X::convolve(p.layer, p.extent, &term, 1, p.bias, to, p.scratch);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    const Term term{delta(p, p.d), p.weight, p.weight_transposed};
    X::convolve_transposed(p.layer, p.extent, &term, 1, below, p.scratch);
  }
  PYMETA_FN static void gradient(const LayerPass& p, const Sink& weight, const Sink& bias) {
    const Matrix pair[1][2] = {{p.x, delta(p, p.d)}};
    X::convolve_outer(p.layer, p.extent, pair, 1, weight, p.scratch);
    sum_delta<X>(over(p.extent, p.layer.out), p.layer.out.channels, p.d, bias);
  }

  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    const LinearTerms sum = Linear<X>::tangent_terms(p, t);
    X::convolve(p.layer, p.extent, sum.terms, sum.count, t.bias, to, p.scratch);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    LinearTerms sum;
    sum.add({delta(p, t.rd), p.weight, p.weight_transposed});
    if (t.weight) sum.add({delta(p, p.d), t.weight, t.weight_transposed});
    X::convolve_transposed(p.layer, p.extent, sum.terms, sum.count, below, p.scratch);
  }
  PYMETA_FN static void tangent_gradient(const LayerPass& p, const LayerTangent& t,
                                         const Sink& weight, const Sink& bias) {
    LinearPairs sum;
    if (t.rx.p) sum.add(t.rx, delta(p, p.d));
    sum.add(p.x, delta(p, t.rd));
    X::convolve_outer(p.layer, p.extent, sum.pairs, sum.count, weight, p.scratch);
    sum_delta<X>(over(p.extent, p.layer.out), p.layer.out.channels, t.rd, bias);
  }

  static double work(const Layer& layer, const Effort& effort) {
    const double share = X::convolution_scratch(layer, 1) > 0 ? winograd_share(layer) : 1;
    return Linear<X>::product_work(
        static_cast<double>(layer.out.positions()) * X::vectors(layer.out.channels),
        share * groups_of(layer).in * layer.window.taps(), effort);
  }

 private:
  PYMETA_FN static Matrix delta(const LayerPass& p, const Real* d) {
    return {d, X::stride(p.layer.out.channels)};
  }
};

template <class X>
struct Conv1d : Convolution<X> {};
template <class X>
struct Conv2d : Convolution<X> {};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
