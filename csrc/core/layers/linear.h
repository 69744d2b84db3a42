// The linear layer, z = x W + b:
//   dx = d W^T                                gW = x^T d               gb = sum d
//   rz = rx W + x U + ub   rdx = rd W^T + d U^T   rgW = rx^T d + x^T rd    rgb = sum rd
// and the same as a narrow last layer: at most kNarrow outputs and no activation (a logit, a forecast), which would waste
// most of a vector of outputs. There it is dot products along the inputs; its outputs and their deltas are class-major.
#pragma once

#include "layer.h"

namespace pymeta {

constexpr int kNarrow = 4;

struct LinearSpec {
  static constexpr const char* kName = "linear";
  static constexpr const char* kArguments = "nnb";  // in, out, bias
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    const int in = static_cast<int>(arguments[0]), out = static_cast<int>(arguments[1]);
    Layer& layer = builder.append_linear(in, out);
    layer.weight = builder.tensor({out, in, true});
    if (arguments[2] != 0) layer.bias = builder.tensor({1, out, false});
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// The terms of a product and of its tangent: x W, and rx W + x U. A tangent that is zero adds none.
struct LinearTerms {
  Term terms[2];
  int count = 0;

  PYMETA_FN void add(const Term& term) { terms[count++] = term; }
};
struct LinearPairs {
  Matrix pairs[2][2];
  int count = 0;

  PYMETA_FN void add(const Matrix& x, const Matrix& d) {
    pairs[count][0] = x;
    pairs[count++][1] = d;
  }
};

template <class X>
struct Linear {
  static constexpr bool kTransposesWeight = true;
  static constexpr bool kReadsRowsInPlace = true;

  PYMETA_FN static int in(const LayerPass& p) { return p.layer.in.channels; }
  PYMETA_FN static int out(const LayerPass& p) { return p.layer.out.channels; }

  PYMETA_FN static PackedTensor packed_weight(const Layer& layer) {
    return {0, layer.in.channels, layer.out.channels,
            static_cast<int>(X::stride(layer.out.channels)), true};
  }
  PYMETA_FN static PackedTensor packed_transposed(const Layer& layer) {
    return {0, layer.out.channels, layer.in.channels,
            static_cast<int>(X::stride(layer.in.channels)), false};
  }
  PYMETA_FN static std::size_t transposed_scalars(const Layer& layer) {
    return packed_transposed(layer).scalars();
  }
  PYMETA_FN static void transpose(const Layer& layer, const Real* weight, Real* transposed) {
    X::transpose(layer.in.channels, layer.out.channels, weight, transposed);
  }
  PYMETA_FN static std::size_t kept_scalars(const Layer&, int, int) { return 0; }

  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    const Term term{p.x, p.weight};
    X::apply(in(p), out(p), p.extent, &term, 1, p.bias, to);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    const Term term{delta(p, p.d), p.weight, p.weight_transposed};
    X::apply_transposed(in(p), out(p), p.extent, &term, 1, below);
  }
  PYMETA_FN static void gradient(const LayerPass& p, const Sink& weight, const Sink& bias) {
    const Matrix pair[1][2] = {{p.x, delta(p, p.d)}};
    X::outer(in(p), out(p), p.extent, pair, 1, weight);
    sum_delta<X>(p.extent, out(p), p.d, bias);
  }

  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    const LinearTerms sum = tangent_terms(p, t);
    X::apply(in(p), out(p), p.extent, sum.terms, sum.count, t.bias, to);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    LinearTerms sum;
    sum.add({delta(p, t.rd), p.weight, p.weight_transposed});
    if (t.weight) sum.add({delta(p, p.d), t.weight, t.weight_transposed});
    X::apply_transposed(in(p), out(p), p.extent, sum.terms, sum.count, below);
  }
  PYMETA_FN static void tangent_gradient(const LayerPass& p, const LayerTangent& t,
                                         const Sink& weight, const Sink& bias) {
    LinearPairs sum;
    if (t.rx.p) sum.add(t.rx, delta(p, p.d));
    sum.add(p.x, delta(p, t.rd));
    X::outer(in(p), out(p), p.extent, sum.pairs, sum.count, weight);
    sum_delta<X>(p.extent, out(p), t.rd, bias);
  }

  static double work(const Layer& layer, const Effort& effort) {
    return product_work(X::vectors(layer.out.channels), layer.in.channels, effort);
  }

  // `outputs` sums of `depth` vector operations each row, in every pass.
  static double product_work(double outputs, double depth, const Effort& effort) {
    const double passes = effort.is_first ? 2 : 3, tangents = effort.is_first ? 2 : 6;
    return outputs * (depth + X::kRowOverhead) *
           (effort.support_rows * (passes + (effort.second_order ? tangents : 0)) +
            effort.query_rows * (effort.gradient ? passes : 1));
  }
  PYMETA_FN static LinearTerms tangent_terms(const LayerPass& p, const LayerTangent& t) {
    LinearTerms sum;
    if (t.rx.p) sum.add({t.rx, p.weight});
    if (t.weight) sum.add({p.x, t.weight});
    return sum;
  }

 private:
  PYMETA_FN static Matrix delta(const LayerPass& p, const Real* d) {
    return {d, X::stride(out(p))};
  }
};

// Its weight is [out, stride(in)]; destinations and deltas are class-major arrays.
template <class X>
struct NarrowLinear {
  static constexpr bool kTransposesWeight = false;
  static constexpr bool kReadsRowsInPlace = false;

  PYMETA_FN static int in(const LayerPass& p) { return p.layer.in.channels; }
  PYMETA_FN static int out(const LayerPass& p) { return p.layer.out.channels; }

  PYMETA_FN static PackedTensor packed_weight(const Layer& layer) {
    return {0, layer.out.channels, layer.in.channels,
            static_cast<int>(X::stride(layer.in.channels)), false};
  }

  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    const Term term{p.x, p.weight};
    X::narrow_apply(in(p), out(p), p.extent, &term, 1, p.bias, to.p);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    const Term term{{p.d, 0}, p.weight};
    X::narrow_apply_transposed(in(p), out(p), p.extent, &term, 1, below);
  }
  PYMETA_FN static void gradient(const LayerPass& p, const Sink& weight, const Sink& bias) {
    const Matrix pair[1][2] = {{p.x, {p.d, 0}}};
    X::narrow_outer(in(p), out(p), p.extent, pair, 1, weight);
    X::narrow_sum_rows(out(p), p.extent, p.d, bias);
  }

  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    const LinearTerms sum = Linear<X>::tangent_terms(p, t);
    X::narrow_apply(in(p), out(p), p.extent, sum.terms, sum.count, t.bias, to.p);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    LinearTerms sum;
    sum.add({{t.rd, 0}, p.weight});
    if (t.weight) sum.add({{p.d, 0}, t.weight});
    X::narrow_apply_transposed(in(p), out(p), p.extent, sum.terms, sum.count, below);
  }
  PYMETA_FN static void tangent_gradient(const LayerPass& p, const LayerTangent& t,
                                         const Sink& weight, const Sink& bias) {
    LinearPairs sum;
    if (t.rx.p) sum.add(t.rx, {p.d, 0});
    sum.add(p.x, {t.rd, 0});
    X::narrow_outer(in(p), out(p), p.extent, sum.pairs, sum.count, weight);
    X::narrow_sum_rows(out(p), p.extent, t.rd, bias);
  }

  static double work(const Layer& layer, const Effort& effort) {
    return Linear<X>::product_work(layer.out.channels, X::vectors(layer.in.channels), effort);
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
