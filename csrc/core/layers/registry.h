// All layers: a new one has its include and its line here.
#pragma once

#include "../activations.h"
#include "batch_norm.h"
#include "convolution.h"
#include "group_norm.h"
#include "layer_norm.h"
#include "linear.h"
#include "lone_activation.h"
#include "norm_pool.h"
#include "pooling.h"
#include "rearrangement.h"

// LAYER(kind, rules); the description is rulesSpec. The first is what a Layer is before it is told.
#define PYMETA_LAYERS(LAYER)                \
  LAYER(lone_activation, LoneActivation)    \
  LAYER(linear, Linear)                     \
  LAYER(image, Image)                       \
  LAYER(unflatten, Unflatten)               \
  LAYER(flatten, Flatten)                   \
  LAYER(conv1d, Conv1d)                     \
  LAYER(conv2d, Conv2d)                     \
  LAYER(max_pool1d, MaxPool1d)              \
  LAYER(max_pool2d, MaxPool2d)              \
  LAYER(avg_pool1d, AvgPool1d)              \
  LAYER(avg_pool2d, AvgPool2d)              \
  LAYER(global_avg_pool1d, GlobalAvgPool1d) \
  LAYER(global_avg_pool2d, GlobalAvgPool2d) \
  LAYER(batch_norm, BatchNorm)              \
  LAYER(norm_pool, NormPool)                \
  LAYER(group_norm, GroupNorm)              \
  LAYER(layer_norm, LayerNorm)

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
#define PYMETA_CASE(name, rules) \
  case LayerKind::name:          \
    return visit(rules<X>{});
    PYMETA_LAYERS(PYMETA_CASE)
#undef PYMETA_CASE
  }
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

// The same for layer l of a network: a narrow last layer has rules of its own.
template <class X, class Visitor>
PYMETA_FN void with_variant(const Network& network, int l, bool last_is_narrow, Visitor visit) {
  if (last_is_narrow && l == network.layer_count - 1) return visit(NarrowLinear<X>{});
  with_layer<X>(network.layers[l].kind, visit);
}

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
