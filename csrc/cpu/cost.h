// What an item costs, for the planner.
#pragma once

#include "../core/call/workspace.h"

PYMETA_KERNEL_BEGIN

constexpr double kLargeWorkspace = 2e6;  // bytes: beyond a second-level cache
constexpr double kTransposeCost = 8;     // of a vector of elements, in vector operations
constexpr double kRuleCost = 8;          // likewise, for each array of the optimiser's rule

// Estimated cycles of one item: vector operations at a rate typical of the executor, plus a little for each call.
template <class X>
double item_cost(const Call<Real>& call, const Workspace<X>& workspace) {
  const bool second = call.second_order(), gradient = call.wants_gradient();
  const double steps = static_cast<double>(call.steps_of(call.max_support));
  const int batches = call.job == Job::fine_tune ? call.batches.count(call.max_support) : 1;
  const bool part = call.batches.size > 0 && call.batches.size < call.max_support;
  const double support_rows = call.job == Job::fine_tune
                                  ? steps * call.max_support / (batches ? batches : 1)
                              : part ? steps * call.batches.size
                                     : steps * call.max_support;
  const double query_rows =
      call.max_query + static_cast<double>(call.max_validation) * (call.epochs + 1);
  double work = 0;
  for (int l = 0; l < call.network->layer_count; ++l) {
    const Effort effort{support_rows, query_rows, l == 0, gradient, second};
    with_variant<X>(*call.network, l, workspace.parameters.narrow,
                    [&](auto rules) { work += rules.work(call.network->layers[l], effort); });
  }
  if (X::kTransposes)
    work += steps * kTransposeCost * (second ? 2 : 1) *
            static_cast<double>(workspace.parameters.transposed_size / kWidth);
  if (!call.has_plain_steps())
    work += steps * kRuleCost * (1 + call.optimizer.states()) *
            static_cast<double>(workspace.parameters.size / kWidth) * (second ? 3 : 1);
  const double bytes = static_cast<double>(workspace.size) * sizeof(Real);
  return work / (bytes > kLargeWorkspace ? X::kCrowdedRate : X::kRate) + 600.0 * steps +
         X::kItemOverhead;
}

PYMETA_KERNEL_END
