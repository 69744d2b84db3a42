// The families of calls (core/families.h) that blocks have a kernel for, and which of them a call belongs to.
//
// What the kernels cost is in bench/README.md. Each is compiled by itself (CMakeLists.txt: PYMETA_FAMILY), with its host's side, and
// loaded when a call needs it; device.cpp takes the first that holds a call.
#pragma once

#include "../core/families.h"
#include "limits.h"
#ifdef PYMETA_MACHINE
#include "tiling.h"
#endif

// FAMILY(machine, name), in the order in which they are asked
#define PYMETA_BLOCK_FAMILIES(FAMILY, machine) \
  FAMILY(machine, plain)                       \
  FAMILY(machine, chains)                      \
  FAMILY(machine, every)
// Those of float32 alone; they are asked before all others.
#define PYMETA_FLOAT_FAMILIES(FAMILY, machine) FAMILY(machine, tensor)

#define PYMETA_SPELLED_(name) #name
#define PYMETA_SPELLED(name) PYMETA_SPELLED_(name)

namespace pymeta {
namespace block_families {

constexpr bool is_one_of(int value, int one, int other) { return value == one || value == other; }

// What runs the algorithms themselves, whatever is asked.
struct every : AllCalls {
  static constexpr bool kLists = false;         // are calls lists of operations (operations.h)?
  static constexpr bool kMayBeSpecial = false;  // may a call have a kernel of its own (special.h)?
  static constexpr bool kFragments = false;     // are products on tensor cores (fragments.h)?
  static constexpr int kMostLayers = block_layers::every;
};
// Linear layers and activations.
struct chains : every {
  static constexpr bool kLists = true;
  static constexpr int kMostLayers = block_layers::chains;
  template <LayerKind kind>
  static constexpr bool kLayer = kind == LayerKind::linear || kind == LayerKind::lone_activation;
};
// The same without extras (has_extras).
struct plain : chains {
  static constexpr int kMostLayers = block_layers::plain;
  static constexpr bool kExtras = false;
  static constexpr bool kSeeds = false;
  static constexpr bool kMayBeSpecial = true;
#ifdef PYMETA_SPECIAL_LOSSES
  template <LossKind kind>
  static constexpr bool kLoss = is_one_of(static_cast<int>(kind), PYMETA_SPECIAL_LOSSES);
  static constexpr bool kLeavesOut = PYMETA_SPECIAL_LEAVES_OUT;
#endif
};
// Those again, where the caller allows it.
struct tensor : plain {
  static constexpr int kMostLayers = block_layers::tensor;
  static constexpr bool kMayBeSpecial = false;
  static constexpr bool kFragments = true;
};

}  // namespace block_families
}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class Family>
bool has_layer(LayerKind kind) {
  switch (kind) {
#define PYMETA_CASE(name, rules) \
  case LayerKind::name:          \
    return Family::template kLayer<LayerKind::name>;
    PYMETA_LAYERS(PYMETA_CASE)
#undef PYMETA_CASE
  }
  return false;
}
template <class Family>
bool has_loss(LossKind kind) {
  switch (kind) {
#define PYMETA_CASE(name, rules) \
  case LossKind::name:           \
    return Family::template kLoss<LossKind::name>;
    PYMETA_LOSSES(PYMETA_CASE)
#undef PYMETA_CASE
  }
  return false;
}

// Calls of chains are lists of operations (operations.h), the same for all tasks but for the number of their rows.
constexpr int kMostOperations = 500;
constexpr int kMostNumber = 65535;  // of features, rates

// As many as a task has, or more, whatever memory it gets.
inline std::int64_t most_operations(const Call<Real>& call, bool options) {
  const std::int64_t tensors = call.network->tensor_count;
  std::int64_t pass = 0;  // there and back
  for (int l = 0; l < call.network->layer_count; ++l)
    pass += is_fused(call.network->layers[l].activation.kind) ? 4 : 6;
  if (call.job != Job::meta)
    return 2 * (pass + 6 + (options ? 3 : 1) * tensors) +
           2 * (pass + 10 + (options ? 3 : 2) * tensors);
  std::int64_t of_step = 2 * pass + 14, of_all = pass + 8;
  if (options) {
    const bool clips = call.optimizer.clip_norm > 0;
    of_step += steps_scale_gradient(call) ? 0 : 2 * tensors + 2;
    of_step += (clips ? 4 * tensors + 3 : 0) + (call.lr_gradient ? tensors : 0);
    of_step += (call.is_anchored() ? tensors : 0) + (call.anchors_gradient ? tensors + 1 : 0);
    of_step += 6 + (call.step_weights ? pass + 14 : 0);
    of_all += 3 * tensors + 24;
  }
  if (call.query.has_weightless) of_all += 2 * pass + 16;
  return of_step * call.steps + of_all;
}
inline bool fits_a_list(const Call<Real>& call, bool options) {
  if (most_operations(call, options) > kMostOperations) return false;
  bool fits = call.lr.is_spread() ||
              static_cast<std::int64_t>(call.lr.rows) * call.lr.columns < kMostNumber;
  for (int l = 0; l < call.network->layer_count; ++l)
    for (const Shape* shape : {&call.network->layers[l].in, &call.network->layers[l].out})
      fits = fits && shape->features() <= kMostNumber;
  return fits;
}
// Are adapted tensors of a task without steps where it starts from, some of its own and others not? Its status looks at one array.
inline bool lies_in_pieces(const Call<Real>& call) {
  bool own = false, shared = false;
  for (int t = 0; t < call.network->tensor_count; ++t)
    if (call.adapted[t]) (call.has_own_start(t) ? own : shared) = true;
  return own && shared;
}
// What no list has: what depends on what was computed, and what few ask for.
inline bool is_beyond_lists(const Call<Real>& call) {
  const bool meta = call.job == Job::meta;
  const bool has_elements = call.support.weight_columns > 1 || call.query.weight_columns > 1;
  return call.validation.x || call.train_curves || call.by_support || call.statistics ||
         has_elements || (meta && call.batches.size > 0) ||
         (call.wants_input_gradient() && call.step_weights) ||
         (call.lr_gradient && (call.lr.per_task || call.task_clip > 0)) ||
         (!meta && call.lr.is_spread() && call.lr.rows > 1) ||
         (call.status && lies_in_pieces(call)) ||
         (!call.query.y && (call.step_weights || (call.query.has_weightless && call.predictions)));
}

// Is there any layer whose products fragments take (tiling.h)?
inline bool has_fragments(const Network& network) {
  bool any = false;
  for (int l = 0; l < network.layer_count - is_last_narrow(network); ++l) {
    const Layer& layer = network.layers[l];
    any = any ||
          (layer.kind == LayerKind::linear && has_fragments(layer.in.channels, layer.out.channels));
  }
  return any;
}

template <class Family>
bool holds(const Call<Real>& call) {
  if constexpr (Family::kFragments)
    if (kDouble || !call.allows_tf32x3 || call.job == Job::predict || !has_fragments(*call.network))
      return false;
  if constexpr (Family::kLists) {
    const bool options = has_extras<block_families::plain>(call);
    if ((options && !Family::kExtras) || is_beyond_lists(call)) return false;
    if (!fits_a_list(call, options)) return false;
  }
  if (call.network->layer_count > Family::kMostLayers) return false;
  for (int l = 0; l < call.network->layer_count; ++l)
    if (!has_layer<Family>(call.network->layers[l].kind)) return false;
  for (const RowSet<Real>* set : {&call.support, &call.query, &call.validation})
    if (!has_loss<Family>(call.loss_of(*set).kind)) return false;
  return true;
}
// The name of the first that does.
inline const char* family_of(const Call<Real>& call) {
#define PYMETA_ASK(machine, family) \
  if (holds<block_families::family>(call)) return #family;
  PYMETA_FLOAT_FAMILIES(PYMETA_ASK, )
  PYMETA_BLOCK_FAMILIES(PYMETA_ASK, )
#undef PYMETA_ASK
  return "";
}

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
