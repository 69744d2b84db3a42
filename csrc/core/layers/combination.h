// Sums and products of a kept value and x (branches.h). Where one has a single position, its numbers are those of all positions,
// and what flows to it is the sum over them.
#pragma once

#include "branches.h"

namespace pymeta {

struct AddSpec {
  static constexpr const char* kName = "add";
  static constexpr const char* kArguments = "c";  // which of the kept values
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    builder.combine(static_cast<int>(arguments[0]), "added to it");
  }
};
struct MultiplySpec {
  static constexpr const char* kName = "multiply";
  static constexpr const char* kArguments = "c";  // which of the kept values
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    builder.combine(static_cast<int>(arguments[0]), "multiplied by it");
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// What lies at a place of the larger of two values, of one that may have a single position.
template <class X>
class Spread {
 public:
  PYMETA_FN Spread(const LayerPass& p, const Real* values, bool is_single)
      : values_(values),
        stride_(X::stride(p.layer.out.channels)),
        rows_(p.extent.rows),
        is_single_(is_single && p.layer.out.positions() > 1) {}

  PYMETA_FN Vec operator()(long at, long column, int row) const {
    return load(values_ + (is_single_ ? (row % rows_) * stride_ + column : at));
  }

 private:
  const Real* values_;  // [positions or 1, rows, channels]
  const long stride_;
  const int rows_;
  const bool is_single_;
};

// d a (+ d' a'), what flows to one term of a sum or a product: a is 1 where it is null, and d' a' is left out where d' is.
struct Flow {
  const Real* d;
  const Real* factor;
  bool factor_is_single;
  const Real* second_d = nullptr;
  const Real* second_factor = nullptr;
};

template <class X>
struct Combined : Branch<X> {
  // To a value of the shape `to_shape`: where that is a single position, the sum over all of them.
  PYMETA_FN PYMETA_NOINLINE static void flow(const LayerPass& p, const Flow& flow, bool to_single,
                                             const Destination& to, bool adds) {
    const Shape& shape = p.layer.out;
    const Spread<X> factor(p, flow.factor, flow.factor_is_single);
    const Spread<X> second(p, flow.second_factor, flow.factor_is_single);
    const auto at_place = [=](long at, long column, int row) {
      Vec v = load(flow.d + at);
      if (flow.factor) v = v * factor(at, column, row);
      return flow.second_d ? fma(load(flow.second_d + at), second(at, column, row), v) : v;
    };
    if (!to_single || shape.positions() == 1) return Branch<X>::put(p, shape, to, adds, at_place);
    const int positions = shape.positions(), rows = p.extent.rows;
    const long place = rows * X::stride(shape.channels);
    Branch<X>::put(p, {1, 1, shape.channels}, to, adds, [=](long at, long column, int row) {
      Vec sum = at_place(at, column, row);
      for (int i = 1; i < positions; ++i)
        sum = sum + at_place(at + i * place, column, row + i * rows);
      return sum;
    });
  }

  PYMETA_FN static bool own_is_single(const Layer& layer) {
    return layer.in.positions() < layer.out.positions();
  }
};

template <class X>
struct Add : Combined<X> {
  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    sum(p, p.other_output, p.x.p, to);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    Combined<X>::flow(p, {p.d, nullptr, false}, Combined<X>::own_is_single(p.layer), below, false);
  }
  PYMETA_FN static void backward_other(const LayerPass& p, const Destination& to, bool adds) {
    Combined<X>::flow(p, {p.d, nullptr, false}, p.layer.other_is_single, to, adds);
  }
  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    sum(p, t.other_output, t.rx.p, to);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    Combined<X>::flow(p, {t.rd, nullptr, false}, Combined<X>::own_is_single(p.layer), below, false);
  }
  PYMETA_FN static void tangent_backward_other(const LayerPass& p, const LayerTangent& t,
                                               const Destination& to, bool adds) {
    Combined<X>::flow(p, {t.rd, nullptr, false}, p.layer.other_is_single, to, adds);
  }

 private:
  // `own` null: zero
  PYMETA_FN PYMETA_NOINLINE static void sum(const LayerPass& p, const Real* other, const Real* own,
                                            const Destination& to) {
    const Spread<X> first(p, other, p.layer.other_is_single);
    const Spread<X> second(p, own, Combined<X>::own_is_single(p.layer));
    Branch<X>::put(p, p.layer.out, to, false, [=](long at, long column, int row) {
      const Vec v = first(at, column, row);
      return own ? v + second(at, column, row) : v;
    });
  }
};

template <class X>
struct Multiply : Combined<X> {
  static constexpr bool kForgetsInput = false;

  PYMETA_FN PYMETA_NOINLINE static void forward(const LayerPass& p, const Destination& to) {
    const Spread<X> other(p, p.other_output, p.layer.other_is_single);
    const Spread<X> own(p, p.x.p, is_single(p));
    Branch<X>::put(p, p.layer.out, to, false, [=](long at, long column, int row) {
      return other(at, column, row) * own(at, column, row);
    });
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    Combined<X>::flow(p, {p.d, p.other_output, p.layer.other_is_single}, is_single(p), below,
                      false);
  }
  PYMETA_FN static void backward_other(const LayerPass& p, const Destination& to, bool adds) {
    Combined<X>::flow(p, {p.d, p.x.p, is_single(p)}, p.layer.other_is_single, to, adds);
  }
  PYMETA_FN PYMETA_NOINLINE static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                                        const Destination& to) {
    const Spread<X> other(p, p.other_output, p.layer.other_is_single);
    const Spread<X> own(p, p.x.p, is_single(p));
    const Spread<X> r_other(p, t.other_output, p.layer.other_is_single);
    const Spread<X> r_own(p, t.rx.p, is_single(p));
    const bool own_moves = t.rx.p != nullptr;
    Branch<X>::put(p, p.layer.out, to, false, [=](long at, long column, int row) {
      const Vec v = r_other(at, column, row) * own(at, column, row);
      return own_moves ? fma(other(at, column, row), r_own(at, column, row), v) : v;
    });
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    Combined<X>::flow(p, {t.rd, p.other_output, p.layer.other_is_single, p.d, t.other_output},
                      is_single(p), below, false);
  }
  PYMETA_FN static void tangent_backward_other(const LayerPass& p, const LayerTangent& t,
                                               const Destination& to, bool adds) {
    Combined<X>::flow(p, {t.rd, p.x.p, is_single(p), t.rx.p ? p.d : nullptr, t.rx.p},
                      p.layer.other_is_single, to, adds);
  }

 private:
  PYMETA_FN static bool is_single(const LayerPass& p) {
    return Combined<X>::own_is_single(p.layer);
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
