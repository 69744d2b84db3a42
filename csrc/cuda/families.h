// The families of calls (core/families.h) that blocks have a kernel for, and which of them a call belongs to.
//
// What the kernels cost is in bench/README.md. Each is compiled by itself (CMakeLists.txt: PYMETA_FAMILY), with its host's side, and
// loaded when a call needs it; device.cpp takes the first that holds a call.
#pragma once

#include "../core/families.h"

// FAMILY(machine, name), in the order in which they are asked
#define PYMETA_BLOCK_FAMILIES(FAMILY, machine) \
  FAMILY(machine, plain)                       \
  FAMILY(machine, chains)                      \
  FAMILY(machine, every)

namespace pymeta {
namespace block_families {

// Linear layers and activations.
struct chains : AllCalls {
  template <LayerKind kind>
  static constexpr bool kLayer = kind == LayerKind::linear || kind == LayerKind::lone_activation;
};
// The same without extras (has_extras).
struct plain : chains {
  static constexpr bool kExtras = false;
  static constexpr bool kSeeds = false;
};
using every = AllCalls;

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

// Plain calls are lists of operations (operations.h), the same for all tasks but for the number of their rows.
constexpr int kMostOperations = 500;
constexpr int kMostNumber = 65535;  // of features, rates

// As many as a task has, or more, whatever memory it gets.
inline std::int64_t most_operations(const Call<Real>& call) {
  const std::int64_t layers = call.network->layer_count, tensors = call.network->tensor_count;
  if (call.job == Job::meta) return (12 * layers + 14) * call.steps + 6 * layers + 8;
  return 2 * (6 * layers + 6 + tensors) + 2 * (2 * layers + 8 + 2 * tensors);
}
inline bool fits_a_list(const Call<Real>& call) {
  if (most_operations(call) > kMostOperations) return false;
  bool fits = static_cast<std::int64_t>(call.lr.rows) * call.lr.columns < kMostNumber;
  for (int l = 0; l < call.network->layer_count; ++l)
    for (const Shape* shape : {&call.network->layers[l].in, &call.network->layers[l].out})
      fits = fits && shape->features() <= kMostNumber;
  return fits;
}

template <class Family>
bool holds(const Call<Real>& call) {
  if (!Family::kExtras && (has_extras<Family>(call) || !fits_a_list(call))) return false;
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
  PYMETA_BLOCK_FAMILIES(PYMETA_ASK, )
#undef PYMETA_ASK
  return "";
}

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
