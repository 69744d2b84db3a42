// Branches in a chain of layers: x -> f(x) + g(x) is written  fork, layers of f, turn, layers of g, join.
//
//   fork   passes x on; on the way back the deltas of both branches meet in it
//   turn   ends f and begins g: it gives what fork gave, and on the way back hands f the delta of the sum
//   join   adds what f gave to what g gave; without layers of g, that is x
//
// Each reads the output or the delta of another layer besides those beside it (Layer::other_output, other_delta), and so do
// their tangents: all four are sums and copies.
#pragma once

#include "layer.h"

namespace pymeta {

struct ForkSpec {
  static constexpr const char* kName = "fork";
  static constexpr const char* kArguments = "c";  // features where it is the first layer, else 0
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    builder.fork(static_cast<int>(arguments[0]));
  }
};
struct TurnSpec {
  static constexpr const char* kName = "turn";
  static constexpr const char* kArguments = "";
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double*) {
    builder.turn();
  }
};
struct JoinSpec {
  static constexpr const char* kName = "join";
  static constexpr const char* kArguments = "";
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double*) {
    builder.join();
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class X>
struct Branch {
  static constexpr bool kTransposesWeight = false;
  static constexpr bool kReadsRowsInPlace = false;
  static constexpr bool kForgetsInput = true;

  PYMETA_FN static PackedTensor packed_weight(const Layer&) { return {}; }
  PYMETA_FN static std::size_t kept_scalars(const Layer&, int, int) { return 0; }
  PYMETA_FN static void gradient(const LayerPass&, const Sink&, const Sink&) {}
  PYMETA_FN static void tangent_gradient(const LayerPass&, const LayerTangent&, const Sink&,
                                         const Sink&) {}
  static double work(const Layer& layer, const Effort& effort) {
    return elementwise_work<X>(layer, effort);
  }

  // a + b of rows of a shape; where one is null it is zero
  PYMETA_FN PYMETA_NOINLINE static void put(const LayerPass& p, const Shape& shape, const Real* a,
                                            const Real* b, const Destination& to) {
    const Extent extent = over(p.extent, shape);
    X::with_epilogue(to, X::stride(shape.channels), extent, [&](const auto& emit) {
      X::map(extent, shape.channels, [&](long at, long column, int r) {
        const Vec first = a ? load(a + at) : zero();
        emit(b ? first + load(b + at) : first, r, static_cast<int>(column / kWidth));
      });
    });
  }
};

template <class X>
struct Fork : Branch<X> {
  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    Branch<X>::put(p, p.layer.out, p.x.p, nullptr, to);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    Branch<X>::put(p, p.layer.in, p.d, p.other_delta, below);
  }
  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    Branch<X>::put(p, p.layer.out, t.rx.p, nullptr, to);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    Branch<X>::put(p, p.layer.in, t.rd, t.other_delta, below);
  }
};

template <class X>
struct Turn : Branch<X> {
  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    Branch<X>::put(p, p.layer.out, p.other_output, nullptr, to);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    Branch<X>::put(p, p.layer.in, p.other_delta, nullptr, below);
  }
  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    Branch<X>::put(p, p.layer.out, t.other_output, nullptr, to);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    Branch<X>::put(p, p.layer.in, t.other_delta, nullptr, below);
  }
};

template <class X>
struct Join : Branch<X> {
  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    Branch<X>::put(p, p.layer.out, p.other_output, p.x.p, to);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    Branch<X>::put(p, p.layer.in, p.d, nullptr, below);
  }
  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    Branch<X>::put(p, p.layer.out, t.other_output, t.rx.p, to);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    Branch<X>::put(p, p.layer.in, t.rd, nullptr, below);
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
