// What is done with one item: bind its rows, adapt its weights or learn from them, write what is wanted.
//
// `Arrays` is an executor's way between an item and the caller's arrays (cpu/item_arrays.h, cuda/task_arrays.h):
//   start()                        brings in the item's own start, where tasks have theirs
//   anchor()                       the strength of each task's pull towards its start
//   set(rows, layout)              an ItemSet of the rows that count
//   leaves_out(rows)               does any row of the item not count?
//   set_of_all(rows, layout)       an ItemSet of all rows, for predictions alone
//   batches(), curves()            what InnerLoop::adapt and fine_tune take
//   write_losses(loss)             one number for each task
//   write_status(theta), write_adapted(tensor, from), write_predictions(set, outputs)
//   write_input_gradient(rows, set, computed, to)
//   is_factored(), factors()       only where the executor has factored layers
#pragma once

#include "fine_tune.h"
#include "meta_gradient.h"

PYMETA_KERNEL_BEGIN

template <class X, class Arrays>
class ItemJob {
 public:
  PYMETA_FN ItemJob(const Call<Real>& call, const Workspace<X>& workspace, const Shared& shared,
                    const Memory& memory, InnerLoop<X>& loop, Arrays& arrays, const Totals& totals)
      : call_(call),
        workspace_(workspace),
        shared_(shared),
        memory_(memory),
        loop_(loop),
        arrays_(arrays),
        totals_(totals) {}

  PYMETA_FN void run() {
    if (workspace_.start != kNowhere) arrays_.start();
    if (call_.is_anchored()) loop_.set_anchor(arrays_.anchor());
    if (call_.job == Job::predict) return write_predictions(loop_.start());
    if (call_.job == Job::fine_tune) return run_epochs();
    if (call_.batches.size > 0) {
      auto batches = arrays_.batches();
      return write(loop_.adapt(batches));
    }
    const ItemSet support = arrays_.set(call_.support, workspace_.support_set);
    if constexpr (X::kFactors) {
      if (workspace_.factorable && arrays_.is_factored()) {
        const Layer& layer = call_.network->layers[0];
        FactoredLinear<X> first(layer, call_.adapted[layer.weight], workspace_.factored, memory_,
                                arrays_.factors());
        loop_.set_factored(&first);
        first.begin(support.x, support.extent);
        adapt_or_learn(support);
        loop_.set_factored(nullptr);
        return;
      }
    }
    adapt_or_learn(support);
  }

 private:
  using Parameters = typename InnerLoop<X>::Parameters;

  PYMETA_FN void adapt_or_learn(const ItemSet& support) {
    if (call_.job != Job::meta) {
      const WholeSet steps(support, shared_.corrections);
      const Parameters theta = loop_.adapt(steps);
      materialise(support);
      return write(theta);
    }
    // Rows that do not count have predictions too, though nothing else is made of them.
    const bool apart = call_.predictions && arrays_.leaves_out(call_.query);
    ItemSet query = apart ? arrays_.set_of_all(call_.query, workspace_.query_set)
                          : arrays_.set(call_.query, workspace_.query_set);
    MetaGradient<X> gradient(loop_, support, query, totals_);
    Vec loss = gradient.loss();
    if (call_.predictions) arrays_.write_predictions(query, loop_.outputs());
    if (apart) {
      query = arrays_.set(call_.query, workspace_.query_set);
      loss = gradient.query_loss();
    }
    arrays_.write_losses(loss);
    if (!call_.wants_gradient()) return;
    gradient.add();
    if (call_.xs_gradient)
      arrays_.write_input_gradient(call_.support, support, call_.second_order(), call_.xs_gradient);
    if (call_.xq_gradient)
      arrays_.write_input_gradient(call_.query, query, true, call_.xq_gradient);
  }

  // The weights of a factored first layer after all steps, for those who want to keep them.
  PYMETA_FN void materialise(const ItemSet& support) const {
    if constexpr (X::kFactors) {
      const State<X>& s = loop_.state();
      const int t = call_.network->layers[0].weight;
      if (s.factored && call_.adapted[t] && call_.steps > 0)
        s.factored->materialise(support.x, loop_.start().tensor(t),
                                memory_.at(workspace_.theta) + s.layout.tensors[t].place);
    }
  }

  PYMETA_FN void run_epochs() {
    auto batches = arrays_.batches();
    auto curves = arrays_.curves();
    ItemSet validation{};
    if (call_.validation.x) validation = arrays_.set(call_.validation, workspace_.validation_set);
    write(fine_tune(loop_, batches, call_.validation.x ? &validation : nullptr, curves));
  }

  // All that is asked for of adapted parameters.
  PYMETA_FN void write(const Parameters& theta) {
    if (call_.sums_gradients()) loop_.add_difference(theta, totals_);
    if (call_.losses) arrays_.write_losses(loop_.mean_step_loss());
    if (call_.status) arrays_.write_status(theta);
    for (int t = 0; t < call_.network->tensor_count; ++t)
      if (call_.adapted_parameters && call_.adapted[t] && call_.adapted_parameters[t])
        arrays_.write_adapted(t, theta.tensor(t));
    if (call_.predictions) write_predictions(theta);
  }

  PYMETA_FN void write_predictions(const Parameters& theta) {
    const ItemSet query = arrays_.set(call_.query, workspace_.query_set);
    loop_.evaluate(theta, query);
    arrays_.write_predictions(query, loop_.outputs());
  }

  const Call<Real>& call_;
  const Workspace<X>& workspace_;
  const Shared& shared_;
  const Memory& memory_;
  InnerLoop<X>& loop_;
  Arrays& arrays_;
  const Totals& totals_;
};

PYMETA_KERNEL_END
