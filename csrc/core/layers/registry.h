// All layers: a new one has its include and its line here.
#pragma once

#include "../activations.h"
#include "batch_norm.h"
#include "branches.h"
#include "combination.h"
#include "concatenation.h"
#include "convolution.h"
#include "embedding.h"
#include "fixed_norm.h"
#include "group_norm.h"
#include "layer_norm.h"
#include "linear.h"
#include "lone_activation.h"
#include "norm_pool.h"
#include "padding.h"
#include "pooling.h"
#include "rearrangement.h"
#include "scale_shift.h"

// LAYER(kind, rules); the description is rulesSpec. The first is what a Layer is before it is told.
#define PYMETA_LAYERS(LAYER)                    \
  LAYER(lone_activation, LoneActivation)        \
  LAYER(linear, Linear)                         \
  LAYER(image, Image)                           \
  LAYER(unflatten, Unflatten)                   \
  LAYER(flatten, Flatten)                       \
  LAYER(conv1d, Conv1d)                         \
  LAYER(conv2d, Conv2d)                         \
  LAYER(max_pool1d, MaxPool1d)                  \
  LAYER(max_pool2d, MaxPool2d)                  \
  LAYER(avg_pool1d, AvgPool1d)                  \
  LAYER(avg_pool2d, AvgPool2d)                  \
  LAYER(global_avg_pool1d, GlobalAvgPool1d)     \
  LAYER(global_avg_pool2d, GlobalAvgPool2d)     \
  LAYER(adaptive_avg_pool1d, AdaptiveAvgPool1d) \
  LAYER(adaptive_avg_pool2d, AdaptiveAvgPool2d) \
  LAYER(adaptive_max_pool1d, AdaptiveMaxPool1d) \
  LAYER(adaptive_max_pool2d, AdaptiveMaxPool2d) \
  LAYER(zero_pad, ZeroPad)                      \
  LAYER(slice, Slice)                           \
  LAYER(batch_norm, BatchNorm)                  \
  LAYER(step_batch_norm, StepBatchNorm)         \
  LAYER(norm_pool, NormPool)                    \
  LAYER(fixed_norm, FixedNorm)                  \
  LAYER(scale_shift, ScaleShift)                \
  LAYER(elementwise_affine, ElementwiseAffine)  \
  LAYER(group_norm, GroupNorm)                  \
  LAYER(layer_norm, LayerNorm)                  \
  LAYER(keep, Keep)                             \
  LAYER(recall, Recall)                         \
  LAYER(add, Add)                               \
  LAYER(multiply, Multiply)                     \
  LAYER(concatenate, Concatenate)               \
  LAYER(channels, Channels)                     \
  LAYER(embedding, Embedding)

namespace pymeta {

enum class LayerKind : std::uint8_t {
#define PYMETA_KIND(kind, rules) kind,
  PYMETA_LAYERS(PYMETA_KIND)
#undef PYMETA_KIND
};

// Calls visit(description) of each layer, with its kind.
template <class Visitor>
PYMETA_MEMBER inline void for_each_layer_spec(Visitor visit) {
#define PYMETA_VISIT(kind, rules) visit(LayerKind::kind, rules##Spec{});
  PYMETA_LAYERS(PYMETA_VISIT)
#undef PYMETA_VISIT
}

// Is the last layer a narrow linear one (linear.h)?
PYMETA_MEMBER inline bool is_last_narrow(const Network& network) {
  const Layer& last = network.layers[network.layer_count - 1];
  return last.kind == LayerKind::linear && last.activation.kind == ActivationKind::identity &&
         last.out.channels <= kNarrow;
}

// A convolution's gradient is a sum of blocks. With the step done in each, weights would be rounded in another way than where
// gradients are stored.
PYMETA_MEMBER inline bool has_convolution(const Network& network) {
  for (int l = 0; l < network.layer_count; ++l) {
    const LayerKind kind = network.layers[l].kind;
    if (kind == LayerKind::conv1d || kind == LayerKind::conv2d) return true;
  }
  return false;
}

// Is it a batch normalisation, whose statistics somebody may want to know?
PYMETA_MEMBER inline bool has_statistics(const Layer& layer) {
  return layer.kind == LayerKind::batch_norm || layer.kind == LayerKind::step_batch_norm ||
         layer.kind == LayerKind::norm_pool;
}
// Of these, one after the other: for each inner step that has parameters of its own, else once, the means of the channels,
// their unbiased variances, how many such steps the task made, and of how many numbers each is.
PYMETA_MEMBER inline int statistics_rows(const Layer& layer) {
  return layer.steps > 0 ? layer.steps : 1;
}
PYMETA_MEMBER inline std::int64_t statistics_scalars(const Network& network) {
  std::int64_t scalars = 0;
  for (int l = 0; l < network.layer_count; ++l) {
    const Layer& layer = network.layers[l];
    if (has_statistics(layer))
      scalars += statistics_rows(layer) * (2 * static_cast<std::int64_t>(layer.out.channels) + 2);
  }
  return scalars;
}

// Does a row's output depend on the set's other rows alone (BatchNorm)? Then a set of one row is of no use.
PYMETA_MEMBER inline bool mixes_rows(const Network& network) {
  bool mixes = false;
  for (int l = 0; l < network.layer_count; ++l)
    for_each_layer_spec([&](LayerKind kind, auto spec) {
      const Layer& layer = network.layers[l];  // an image's positions suffice for statistics
      mixes =
          mixes || (kind == layer.kind && decltype(spec)::kMixesRows && layer.in.positions() == 1);
    });
  return mixes;
}

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// Calls visit(rules) of the kind that is known only at run time.
template <class X, class Visitor>
PYMETA_FN void with_layer(LayerKind kind, Visitor visit) {
  switch (kind) {
#define PYMETA_CASE(name, rules)                                                         \
  case LayerKind::name:                                                                  \
    if constexpr (X::Family::template kLayer<LayerKind::name>) return visit(rules<X>{}); \
    break;
    PYMETA_LAYERS(PYMETA_CASE)
#undef PYMETA_CASE
  }
}

// What rules may have besides (layer.h), asked of them as name<Rules>: `value` where they have the member, or false.
#define PYMETA_MAY_HAVE(name, member, value) \
  template <class Rules, class = void>       \
  constexpr bool name = false;               \
  template <class Rules>                     \
  constexpr bool name<Rules, decltype(void(&Rules::member))> = value;
PYMETA_MAY_HAVE(kMeasuresStatistics, statistics, true)
PYMETA_MAY_HAVE(kPacksTransposed, packed_transposed, true)
PYMETA_MAY_HAVE(kPacksBias, packed_bias, true)
PYMETA_MAY_HAVE(kWorksInScratch, scratch_scalars, true)
PYMETA_MAY_HAVE(kForgetsInput, kForgetsInput, Rules::kForgetsInput)
PYMETA_MAY_HAVE(kReadsOther, backward_other, true)
PYMETA_MAY_HAVE(kReadsOtherAlone, kReadsOtherAlone, Rules::kReadsOtherAlone)
PYMETA_MAY_HAVE(kDeltaGoesWithTangent, kDeltaGoesWithTangent, Rules::kDeltaGoesWithTangent)
PYMETA_MAY_HAVE(kRepeats, repeated_work, true)
#undef PYMETA_MAY_HAVE

// visit(v, mean and variance) of each vector of a batch normalisation's channels.
template <class X, class Visitor>
PYMETA_FN void with_statistics(const LayerPass& p, Visitor visit) {
  with_layer<X>(p.layer.kind, [&](auto rules) {
    if constexpr (kMeasuresStatistics<decltype(rules)>)
      X::for_indices(X::vectors(p.layer.out.channels),
                     [&](int v) { visit(v, rules.statistics(p, v)); });
  });
}

// A transposed weight: its size, and how it is made of the weight.
template <class X>
PYMETA_FN std::size_t transposed_scalars(const Layer& layer) {
  std::size_t scalars = 0;
  with_layer<X>(layer.kind, [&](auto rules) {
    if constexpr (rules.kTransposesWeight) scalars = rules.transposed_scalars(layer);
  });
  return scalars;
}
template <class X>
PYMETA_FN void transpose_weight(const Layer& layer, const Real* weight, Real* transposed) {
  with_layer<X>(layer.kind, [&](auto rules) {
    if constexpr (rules.kTransposesWeight) rules.transpose(layer, weight, transposed);
  });
}

// How the caller's weight lies as the transposed one; nothing (no rows) where it is not that.
template <class X>
PYMETA_FN PackedTensor packed_transposed(const Layer& layer) {
  PackedTensor packed{};
  with_layer<X>(layer.kind, [&](auto rules) {
    if constexpr (kPacksTransposed<decltype(rules)>) packed = rules.packed_transposed(layer);
  });
  return packed;
}

// How a layer's bias lies.
template <class X>
PYMETA_FN PackedTensor packed_bias(const Layer& layer) {
  PackedTensor packed = packed_vector<X>(layer.out.channels);
  with_layer<X>(layer.kind, [&](auto rules) {
    if constexpr (kPacksBias<decltype(rules)>) packed = rules.packed_bias(layer);
  });
  return packed;
}

template <class X>
PYMETA_FN bool forgets_input(const Layer& layer) {
  bool forgets = false;
  with_layer<X>(layer.kind, [&](auto rules) { forgets = kForgetsInput<decltype(rules)>; });
  return forgets;
}

template <class X>
PYMETA_FN bool reads_other_alone(const Layer& layer) {
  bool alone = false;
  with_layer<X>(layer.kind, [&](auto rules) { alone = kReadsOtherAlone<decltype(rules)>; });
  return alone;
}

template <class X>
PYMETA_FN bool delta_goes_with_tangent(const Layer& layer) {
  bool goes = false;
  with_layer<X>(layer.kind, [&](auto rules) { goes = kDeltaGoesWithTangent<decltype(rules)>; });
  return goes;
}

// Is a layer's output made again rather than kept? A few multiply-adds take no longer than to write and to read a number.
constexpr int kMostRepeatedWork = 27;  // of a number: a convolution of 3x3 taps and three channels
template <class X>
PYMETA_FN bool is_repeated(const Layer& layer) {
  bool repeated = false;
  with_layer<X>(layer.kind, [&](auto rules) {
    if constexpr (kRepeats<decltype(rules)>)
      repeated = layer.out.positions() > 1 && rules.repeated_work(layer) <= kMostRepeatedWork;
  });
  return repeated;
}

// Of the layer that needs most for sets of so many rows.
template <class X>
PYMETA_FN std::size_t scratch_scalars(const Network& network, int rows) {
  std::size_t most = 0;
  for (int l = 0; l < network.layer_count; ++l)
    with_layer<X>(network.layers[l].kind, [&](auto rules) {
      if constexpr (kWorksInScratch<decltype(rules)>) {
        const std::size_t own = rules.scratch_scalars(network.layers[l], rows);
        most = own > most ? own : most;
      }
    });
  return most;
}

// The same for layer l of a network: a narrow last layer has rules of its own.
template <class X, class Visitor>
PYMETA_FN void with_variant(const Network& network, int l, bool last_is_narrow, Visitor visit) {
  if (last_is_narrow && l == network.layer_count - 1) return visit(NarrowLinear<X>{});
  with_layer<X>(network.layers[l].kind, visit);
}

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
