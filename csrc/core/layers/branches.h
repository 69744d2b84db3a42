// Branches in a chain of layers: a value that is kept is read again further on, as often as anybody likes.
//
//   keep          marks what the layer before gives, so that it has a number: 0 is the first one, and so on. It is a layer, a
//                 copy, only where it is the first of a network
//   recall        gives such a value once more and leaves what the layer before gave to others, who have kept it too
//   add, multiply of such a value and x, number by number; where one has a single position, its numbers are those of all
//                 positions (an image weighed channel by channel)
//   concatenate   of the channels of both
//   channels      some of the channels of x
//
// x + f(x) is  keep, the layers of f, add;  tanh(a(x)) sigmoid(b(x)) is  keep, a, tanh, keep, recall, b, sigmoid, multiply.
//
// A reader reads the output of one layer more than its neighbour (Layer::other_output). On the way back a kept value's delta is
// the sum of what the layer behind it passes back and what its readers do (backward_other), in their order; the passes go
// through them. All are linear in each of what they read, so that tangents are the same sums and products once more.
#pragma once

#include "layer.h"

namespace pymeta {

struct KeepSpec {
  static constexpr const char* kName = "keep";
  static constexpr const char* kArguments = "c";  // features where it is the first layer, else 0
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    builder.keep(static_cast<int>(arguments[0]));
  }
};
struct RecallSpec {
  static constexpr const char* kName = "recall";
  static constexpr const char* kArguments = "c";  // which of the kept values
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    builder.recall(static_cast<int>(arguments[0]));
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

  // value(offset into the matrix, offset into its row, row) of rows of a shape; `adds`: to what is there.
  template <class Value>
  PYMETA_FN static void put(const LayerPass& p, const Shape& shape, const Destination& to,
                            bool adds, Value value) {
    const Extent extent = over(p.extent, shape);
    X::with_epilogue(to, X::stride(shape.channels), extent, [&](const auto& emit) {
      X::map(extent, shape.channels, [&](long at, long column, int r) {
        const Vec v = value(at, column, r);
        emit(adds ? load(to.p + at) + v : v, r, static_cast<int>(column / kWidth));
      });
    });
  }
};

// A kept input.
template <class X>
struct Keep : Branch<X> {
  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    pass_on<X>(over(p.extent, p.layer.in), p.layer.in.channels, p.x.p, to);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    pass_on<X>(over(p.extent, p.layer.in), p.layer.in.channels, p.d, below);
  }
  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    if (t.rx.p) return pass_on<X>(over(p.extent, p.layer.in), p.layer.in.channels, t.rx.p, to);
    clear<X>(over(p.extent, p.layer.out), p.layer.out.channels, to.p);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    pass_on<X>(over(p.extent, p.layer.in), p.layer.in.channels, t.rd, below);
  }
};

template <class X>
struct Recall : Branch<X> {
  static constexpr bool kReadsOtherAlone = true;

  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    moved(p, p.other_output, to, false);
  }
  PYMETA_FN static void backward(const LayerPass&, const Destination&) {}
  PYMETA_FN static void backward_other(const LayerPass& p, const Destination& to, bool adds) {
    moved(p, p.d, to, adds);
  }
  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    moved(p, t.other_output, to, false);
  }
  PYMETA_FN static void tangent_backward(const LayerPass&, const LayerTangent&,
                                         const Destination&) {}
  PYMETA_FN static void tangent_backward_other(const LayerPass& p, const LayerTangent& t,
                                               const Destination& to, bool adds) {
    moved(p, t.rd, to, adds);
  }

 private:
  PYMETA_FN PYMETA_NOINLINE static void moved(const LayerPass& p, const Real* from,
                                              const Destination& to, bool adds) {
    Branch<X>::put(p, p.layer.out, to, adds, [=](long at, long, int) { return load(from + at); });
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
