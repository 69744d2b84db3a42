// A wide first layer that is never materialised.
//
// Every inner gradient of the first weight matrix has the form Xs^T D with the same support inputs Xs, so with one
// scalar rate all that an inner loop or a reverse sweep ever does to it stays in the span of the inputs:
//   W[k] = W0 + Xs^T E[k],             E[k+1] = E[k] - lr[k] D[k]
//   v[k] = Xq^T Dq + Xs^T F[k],        F[k] = F[k+1] - lr[k] RD[k]
// and applying W[k] or v[k] to inputs needs X W0 once and the Gram matrices Xs Xs^T and Xq Xs^T:
//   Xs W[k] = Xs W0 + Gss E[k],   Xq W[K] = Xq W0 + Gqs E[K],   Xs v[k] = Gqs^T Dq + Gss F[k]
// E, F and D have as many rows as the set. What is left to do with W0 itself is one matrix product over the rows of
// many tasks before their inner loops (X W0), and one after (the meta-gradient, sum of Xq^T Dq + Xs^T F): the executor
// does both at the speed of large products, and a task's own work never touches it. Exact: only the order of sums
// differs. Worth it where the support has far fewer rows than the layer has inputs.
#pragma once

#include "../optimizers/rates.h"
#include "registry.h"

PYMETA_KERNEL_BEGIN

// Can this call's first layer be factored at all? A property of the network and the recipe.
inline bool is_factorable(const Call<Real>& call) {
  const Layer& first = call.network->layers[0];
  if (first.kind != LayerKind::linear || first.in.channels < 64 || first.out.channels < 16)
    return false;
  if (call.wants_input_gradient() || !steps_scale_gradient(call)) return false;
  if (!rates_are_near_one(call)) return false;  // they are multiplied by last here
  // These want a task's whole gradient of it.
  if (call.cotangents.adapted || call.step_weights || call.keeps_task_gradient()) return false;
  if (call.job == Job::reptile || call.job == Job::fine_tune || call.batches.size > 0) return false;
  return !call.has_own_start(first.weight);
}
// Of one task alone, so that its result does not depend on the others.
PYMETA_FN inline bool is_factored(const Network& network, int support_rows) {
  return 4 * support_rows <= network.layers[0].in.channels;
}

// What it keeps.
struct FactoredLayout {
  Place gram_support, gram_query;  // [rows, support rows] of the largest tasks
  Place e, mixed;

  template <class X>
  void lay_out(Places& places, const Layer& layer, int support_rows, int query_rows) {
    const std::size_t row = X::stride(layer.out.channels);
    gram_support = places.take(static_cast<std::size_t>(support_rows) * support_rows);
    gram_query = places.take(static_cast<std::size_t>(query_rows) * support_rows);
    e = places.take(support_rows * row);
    mixed = places.take(support_rows * row);
  }
};

// What a task shares with the products over many tasks: it finds X W0 here and leaves Dq and F in its place.
struct Factors {
  Real* query;    // [query rows, stride(out)]
  Real* support;  // [support rows, stride(out)]
};

template <class X>
class FactoredLinear {
 public:
  // `adapted`: whether the inner loop changes W.
  PYMETA_FN FactoredLinear(const Layer& layer, bool adapted, const FactoredLayout& layout,
                           const Memory& memory, const Factors& factors)
      : layer_(layer),
        adapted_(adapted),
        layout_(layout),
        memory_(memory),
        factors_(factors),
        row_(X::stride(layer.out.channels)) {}

  PYMETA_FN void begin(const Matrix& x, const Extent& support) {
    support_ = support;
    X::gram(x, support.rows, x, support.rows, layer_.in.channels, at(layout_.gram_support));
    clear(at(layout_.e));
  }
  PYMETA_FN void begin_query(const Matrix& x, const Extent& query, const Matrix& xs) {
    query_ = query;
    X::gram(x, query.rows, xs, support_.rows, layer_.in.channels, at(layout_.gram_query));
  }

  // Xs W[k] + bias, Xq W[K] + bias
  PYMETA_FN void apply(bool to_query, const Real* bias, const Destination& to) const {
    const Real* gram = at(to_query ? layout_.gram_query : layout_.gram_support);
    const Mix term{gram, support_.rows, 1, at(layout_.e), support_.rows};
    X::mix(to_query ? query_ : support_, layer_.out.channels, &term, adapted_ ? 1 : 0,
           to_query ? factors_.query : factors_.support, bias, to);
  }

  // The step: E -= lr d
  PYMETA_FN void step(const Real* d, Real rate) const {
    if (adapted_) add(d, -rate, at(layout_.e));
  }
  // W[K] from W0, for those who want to keep it.
  PYMETA_FN void materialise(const Matrix& x, const Real* w0, Real* w) const {
    const Matrix pair[1][2] = {{x, {at(layout_.e), row_}}};
    X::outer(layer_.in.channels, layer_.out.channels, support_, pair, 1, Sink{w, w0});
  }

  // The reverse sweep begins with the query delta.
  PYMETA_FN void begin_reverse(const Real* dq) const {
    X::copy(factors_.query, dq, query_.rows * row_);
    clear(factors_.support);
  }
  // Xs v + bias: the tangent of the layer's output along v.
  PYMETA_FN void apply_direction(const Real* bias, const Destination& to) const {
    const Mix terms[2] = {
        {at(layout_.gram_query), 1, support_.rows, factors_.query, query_.rows},
        {at(layout_.gram_support), support_.rows, 1, factors_.support, support_.rows}};
    X::mix(support_, layer_.out.channels, terms, adapted_ ? 2 : 0, nullptr, bias, to);
  }
  // v += scale Xs^T rd
  PYMETA_FN void accumulate(const Real* rd, Real scale) const { add(rd, scale, factors_.support); }

  // <g[k], v> = <D[k], Xs v>, the share of this layer in the learning rate's gradient, a vector of partial sums.
  PYMETA_FN Vec rate_gradient(const Real* d) const {
    Vec sum = zero();
    if (!adapted_) return sum;
    apply_direction(nullptr, {at(layout_.mixed)});
    for (long i = 0; i < support_.rows * row_; i += kWidth)
      sum = fma(load(d + i), load(at(layout_.mixed) + i), sum);
    return sum;
  }

 private:
  PYMETA_FN Real* at(Place place) const { return memory_.at(place); }
  PYMETA_FN void clear(Real* p) const {
    X::for_vectors(support_.rows * row_, [=](std::size_t i) { store(p + i, zero()); });
  }
  PYMETA_FN void add(const Real* d, Real scale, Real* to) const {
    X::for_vectors(support_.rows * row_, [=](std::size_t i) {
      store(to + i, fma(broadcast(scale), load(d + i), load(to + i)));
    });
  }

  const Layer& layer_;
  bool adapted_;
  const FactoredLayout& layout_;
  Memory memory_;
  Factors factors_;
  long row_;
  Extent support_{}, query_{};
};

// It stands in for the first Linear of an item, in all passes (layer.h). Nobody asks for the delta at its input.
template <class X>
struct FactoredLinearRules {
  const FactoredLinear<X>& factored;
  bool is_query;  // the set of the pass

  PYMETA_FN void forward(const LayerPass& p, const Destination& to) const {
    factored.apply(is_query, p.bias, to);
  }
  PYMETA_FN void backward(const LayerPass&, const Destination&) const {}
  PYMETA_FN void gradient(const LayerPass& p, const Sink&, const Sink& bias) const {
    sum_delta<X>(p.extent, p.layer.out.channels, p.d, bias);
  }
  PYMETA_FN void tangent_forward(const LayerPass&, const LayerTangent& t,
                                 const Destination& to) const {
    factored.apply_direction(t.bias, to);
  }
  PYMETA_FN void tangent_backward(const LayerPass&, const LayerTangent&, const Destination&) const {
  }
  PYMETA_FN void tangent_gradient(const LayerPass& p, const LayerTangent& t, const Sink& weight,
                                  const Sink& bias) const {
    factored.accumulate(t.rd, weight.scale);
    sum_delta<X>(p.extent, p.layer.out.channels, t.rd, bias);
  }
};

PYMETA_KERNEL_END
