// What an item costs, for the planner.
#pragma once

#include "../core/call/workspace.h"

PYMETA_KERNEL_BEGIN

constexpr double kLargeWorkspace = 2e6;  // bytes: beyond a second-level cache
constexpr double kTransposeCost = 8;     // of a vector of elements, in vector operations
constexpr double kRuleCost = 8;          // likewise, for each array of the optimiser's rule

// Vector operations of a group of a stack's tasks in a layer (core/algorithms/stacked.h). `outputs` sums a row and `inputs` of those at
// the input, in vectors.
template <class X>
double stack_work(const Layer& layer, const Call<Real>& call, bool is_first, bool is_narrow) {
  const double s = call.max_support, q = call.max_query, overhead = X::kRowOverhead;
  const int in = layer.in.channels, out = layer.out.channels;
  if (layer.kind != LayerKind::linear) return 20 * (s + q) * X::vectors(out);
  const double inputs = X::vectors(in), outputs = is_narrow ? out : X::vectors(out);
  const double forth = outputs * ((is_narrow ? inputs : in) + overhead);
  const double back = is_first ? 0 : inputs * (out + overhead);
  double work = (2 * s + q) * forth + s * back;  // forward, the step; the query set's forward pass
  if (!call.wants_gradient()) return work;
  const double gram = is_narrow ? 0 : s * q;
  work += q * (forth + back) + (is_first ? 0 : gram * (inputs + outputs));
  if (!call.second_order()) return work;
  const double low_rank = gram * (2 * inputs + outputs), direct = (s + q) * forth;
  work += low_rank > 0 && low_rank < direct ? low_rank : direct;
  return work + s * (is_first ? forth : 3 * forth + back) + (is_first ? 0 : gram * inputs);
}

// Estimated cycles of one item: vector operations at a rate typical of the executor, plus a little for each call.
template <class X>
double item_cost(const Call<Real>& call, const Workspace<X>& workspace) {
  const double bytes = static_cast<double>(workspace.size) * sizeof(Real);
  const double rate = bytes > kLargeWorkspace ? X::kCrowdedRate : X::kRate;
  if constexpr (kStacks<X>) {  // of one group
    double work = 0;
    const int last = call.network->layer_count - 1;
    for (int l = 0; l <= last; ++l)
      work += stack_work<X>(call.network->layers[l], call, l == 0,
                            l == last && workspace.parameters.narrow);
    return work / rate + X::kItemOverhead;
  }
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
  return work / rate + 600.0 * steps + X::kItemOverhead;
}

PYMETA_KERNEL_END
