// What a layer is: the interface of the files beside this one.
//
// A layer maps rows of one shape to rows of another (call/network.h), z = f(x; weight, bias); its activation a = act(z) is the passes'
// business (algorithms/passes.h). Each file has a description, true on every machine,
//
//   struct LinearSpec
//     kName, kArguments                  how a network's description spells it: 'n' size, 'i' integer, 'x' number, 'b' flag
//     kMixesRows                         does a row's output depend on the set's other rows?
//     add(builder, arguments)            appends it to a network (bind/)
//
// and its rules on an executor X, compiled for each machine:
//
//   template <class X> struct Linear
//     packed_weight(layer)               how its weight lies
//     packed_bias(layer)                 how its bias does, where it is more than a vector of channels
//     kTransposesWeight                  do its backward passes want the transposed weight (where X keeps one)? Then
//     transposed_scalars(layer), transpose(layer, weight, transposed)   its size, and how it is made
//     packed_transposed(layer)           only where the caller's own array is that, but for padding: how it lies
//     kReadsRowsInPlace                  as the first layer, can it read the caller's own rows, without padding?
//     kept_scalars(layer, rows, i)       size of its i-th array of its own on a tape (and in a tangent pass); 0: none
//     forward(p, to)                     z
//     backward(p, below)                 dx, the delta at its input
//     gradient(p, weight, bias)          gW, gb
//     tangent_forward(p, t, to)          rz  } a leading r is a tangent (Pearlmutter's R-operator: the derivative
//     tangent_backward(p, t, below)      rdx } along the direction u of the adapted parameters)
//     tangent_gradient(p, t, weight, bias)   rgW, rgb
//     work(layer, effort)                vector operations of one item, for the planner
//     kForgetsInput                      only where it is so: none but forward reads x
//     kDeltaGoesWithTangent              only where it is so: tangent_gradient reads d only where there is rx
//     repeated_work(layer)               only of those whose output may be made again rather than kept: the multiply-adds of each
//                                        number of it
//     scratch_scalars(layer, rows)       only of those that work in memory of their own (LayerPass::scratch): how much, at most
//     backward_other(p, to, adds), tangent_backward_other(p, t, to, adds)   only of those that read another layer's output
//                                        (branches.h): the delta at that, to be added to what is there
//     kReadsOtherAlone                   only where it is so: it leaves x alone, to which backward writes nothing
//     statistics(p, v)                   only of batch normalisations: mean and variance of the v-th vector of channels
//
// A new layer is one such file, a line in registry.h, its torch module in pymeta/spec, and a line in the tests.
#pragma once

#include "../call/network.h"

namespace pymeta {

// Of a layer that no network's description names: the builder appends it by itself.
struct UndescribedSpec {
  static constexpr const char* kName = "";
  static constexpr const char* kArguments = "";

  template <class Builder>
  static void add(Builder&, const double*) {}
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

#include "../call/operands.h"
#include "../call/places.h"

PYMETA_KERNEL_BEGIN

// What every pass gives a layer. d [rows, out] is the delta at z; forward passes leave it null.
struct LayerPass {
  const Layer& layer;
  const Extent& extent;  // the set's rows
  Matrix x;              // [rows, in]
  const Real* weight;    // null where the layer has none
  const Real* bias;
  const Real* weight_transposed;
  Real* kept[kMaxKept];  // its own arrays on the tape
  const Real* d;
  const Real* other_output = nullptr;  // of branches.h: what layer.other_output gave
  Real* scratch = nullptr;             // scratch_scalars() for the time of a call
};

// What a tangent pass gives it on top. Null: zero.
struct LayerTangent {
  Matrix rx;           // [rows, in]
  const Real* weight;  // the direction u
  const Real* bias;
  const Real* weight_transposed;
  Real* kept[kMaxKept];                // its own arrays in the tangent pass
  const Real* rd;                      // [rows, out]
  const Real* other_output = nullptr;  // the tangent of that of LayerPass
};

// How much a call asks of a layer.
struct Effort {
  double support_rows, query_rows;  // in all steps and evaluations of one item
  bool is_first;                    // nobody wants the delta at its input
  bool gradient, second_order;
};

// A matrix passed on as it is, into its destination.
template <class X>
PYMETA_FN void pass_on(const Extent& extent, int features, const Real* from,
                       const Destination& to) {
  X::with_epilogue(to, X::stride(features), extent, [&](const auto& emit) {
    X::map(extent, features, [&](long at, long column, int r) {
      emit(load(from + at), r, static_cast<int>(column / kWidth));
    });
  });
}

template <class X>
PYMETA_FN void clear(const Extent& extent, int features, Real* to) {
  X::map(extent, features, [&](long at, long, int) { store(to + at, zero()); });
}

// What a parameter gets that a pass does not use.
template <class X>
PYMETA_FN void no_gradient(int features, const Sink& sink) {
  X::sum_rows(Extent{0, nullptr, zero()}, features, sink, [](long, long) { return zero(); });
}

template <class X>
PYMETA_FN PYMETA_NOINLINE void sum_delta(const Extent& extent, int features, const Real* d,
                                         const Sink& bias) {
  X::sum_rows(extent, features, bias, [&](long at, long) { return load(d + at); });
}

// Of layers that take a few operations for each element.
template <class X>
double elementwise_work(const Layer& layer, const Effort& effort) {
  const double passes = effort.second_order ? 4 : 2;
  return 20.0 * (effort.support_rows * passes + effort.query_rows * 2) *
         (static_cast<double>(layer.out.positions()) * X::vectors(layer.out.channels));
}

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
