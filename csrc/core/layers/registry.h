// All layers: a new one has its include and its line here.
#pragma once

#include "../activations.h"
#include "batch_norm.h"
#include "layer_norm.h"
#include "linear.h"
#include "lone_activation.h"

// LAYER(kind, rules); the description is rulesSpec. The first is what a Layer is before it is told.
#define PYMETA_LAYERS(LAYER)             \
  LAYER(lone_activation, LoneActivation) \
  LAYER(linear, Linear)                  \
  LAYER(batch_norm, BatchNorm)           \
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

// Does a row's output depend on the set's other rows (BatchNorm)? Then a set of one row is of no use.
PYMETA_MEMBER inline bool mixes_rows(const Network& network) {
  bool mixes = false;
  for (int l = 0; l < network.layer_count; ++l)
    for_each_layer_spec([&](LayerKind kind, auto spec) {
      mixes = mixes || (kind == network.layers[l].kind && decltype(spec)::kMixesRows);
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

// The same for layer l of a network: a narrow last layer has rules of its own.
template <class X, class Visitor>
PYMETA_FN void with_variant(const Network& network, int l, bool last_is_narrow, Visitor visit) {
  if (last_is_narrow && l == network.layer_count - 1) return visit(NarrowLinear<X>{});
  with_layer<X>(network.layers[l].kind, visit);
}

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
