// What is done with one item: bind its rows, adapt its weights or learn from them, write what is wanted.
//
// `Arrays` is an executor's way between an item and the caller's arrays (cpu/item_arrays.h, cuda/task_arrays.h):
//   start()                        brings in the item's own start, where tasks have theirs
//   anchor()                       the strength of each task's pull towards its start
//   rates()                        likewise their own rates
//   set(rows, layout)              an ItemSet of the rows that count
//   leaves_out(rows)               does any row of the item not count? Asked before the set is bound
//   set_of_all(rows, layout)       an ItemSet of all rows, for predictions alone
//   batches(), curves()            what InnerLoop::adapt and fine_tune take
//   write_losses(loss)             one number for each task
//   write_status(theta), write_adapted(tensor, from), write_predictions(set, outputs)
//   seed(), step_cotangent(k)      what flows into the query set, and beside it into the loss after step k
//   add_cotangent(tensor, v)       adds what flows into an adapted tensor
//   write_own_gradient(tensor, v)  of a start of the item's own; write_own_rates(row, column, gradient);
//   write_anchor_gradient(gradient)
//   write_step_loss(k, loss)
//   write_statistics(layer, from, to)     of one row of a batch normalisation (call/workspace.h: StatisticsLayout)
//   write_input_gradient(rows, set, computed, to)
//   write_target_gradient(rows, set, to), write_weight_gradient(...), write_offset_gradient(...)
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
    if (extra<X>(workspace_.start != kNowhere)) arrays_.start();
    if (extra<X>(call_.is_anchored())) loop_.set_anchor(arrays_.anchor());
    if (extra<X>(workspace_.own_rates != kNowhere)) arrays_.rates();
    const bool measures = extra<X>(call_.statistics != nullptr);
    if (measures) loop_.clear_statistics();
    adapt_and_write();
    if (measures) write_statistics();
  }

 private:
  using Parameters = typename InnerLoop<X>::Parameters;

  PYMETA_FN void adapt_and_write() {
    if (extra<X>(call_.job == Job::predict)) return write_predictions(loop_.start());
    if (extra<X>(call_.job == Job::fine_tune)) return run_epochs();
    if (extra<X>(call_.batches.size > 0)) return adapt_by_batches();
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

  PYMETA_FN PYMETA_NOINLINE void adapt_by_batches() {
    auto batches = arrays_.batches();
    write(loop_.adapt(batches));
  }

  PYMETA_FN PYMETA_NOINLINE void write_statistics() const {
    const Real* from = memory_.at(workspace_.statistics);
    std::int64_t column = 0;
    for (int l = 0; l < call_.network->layer_count; ++l) {
      const Layer& layer = call_.network->layers[l];
      if (!has_statistics(layer)) continue;
      for (int row = 0; row < statistics_rows(layer); ++row) {
        arrays_.write_statistics(layer, from, column);
        from += StatisticsLayout<X>::row(layer);
        column += 2 * layer.out.channels + 2;
      }
    }
  }

  PYMETA_FN void adapt_or_learn(const ItemSet& support) {
    if (!extra<X>(call_.job != Job::meta)) return learn(support);
    const WholeSet steps(support, shared_.corrections);
    const Parameters theta = loop_.adapt(steps);
    materialise(support);
    write(theta);
  }

  PYMETA_FN PYMETA_NOINLINE void learn(const ItemSet& support) {
    const bool leaves_out =
        may_leave_out<X>(call_.query) && call_.predictions && arrays_.leaves_out(call_.query);
    ItemSet query = arrays_.set(call_.query, workspace_.query_set);
    MetaGradient<X> gradient(loop_, support, query, totals_);
    Vec total = zero();  // of the losses after each step
    const auto record = [&](int k, Vec loss) {
      total = fma(broadcast(call_.step_weights[k]), loss, total);
      if (call_.step_losses) arrays_.write_step_loss(k, loss);
    };
    Vec loss = gradient.loss(record);
    if (leaves_out) {
      // Rows that do not count have predictions too, though nothing else is made of them.
      query = arrays_.set_of_all(call_.query, workspace_.query_set);
      gradient.query_loss();
      arrays_.write_predictions(query, loop_.outputs());
      query = arrays_.set(call_.query, workspace_.query_set);
      if (call_.wants_gradient()) gradient.query_loss();
    } else if (call_.predictions) {
      arrays_.write_predictions(query, loop_.outputs());
    }
    if (call_.wants_gradient()) {
      const Seed seed =
          seed_is_given<X>(call_.cotangents.any()) ? arrays_.seed() : Seed{true, broadcast(1)};
      const auto seeds = [&](int k) { return seed_of_step(seed, k); };
      const int last = call_.steps - 1;
      const bool after_each = extra<X>(call_.step_weights != nullptr);
      gradient.add_query(seeds(last));
      if (after_each) record(last, loss);
      if (extra<X>(call_.cotangents.adapted != nullptr)) add_cotangents(gradient.v());
      gradient.add_steps(seeds, record);
      if (after_each) loss = total;
      if constexpr (X::Family::kExtras) write_gradients(gradient, support, query);
    }
    if (call_.losses) arrays_.write_losses(loss);
  }

  // What flows into the query set after step k, from what flows into the task's loss.
  PYMETA_FN Seed seed_of_step(const Seed& seed, int k) const {
    if (!extra<X>(call_.step_weights != nullptr)) return seed;
    const Vec losses = seed.losses * call_.step_weights[k];
    return {false, call_.cotangents.step_losses ? losses + arrays_.step_cotangent(k) : losses};
  }

  PYMETA_FN PYMETA_NOINLINE void add_cotangents(Real* v) const {
    for (int t = 0; t < call_.network->tensor_count; ++t)
      if (call_.cotangents.adapted[t])
        arrays_.add_cotangent(t, v + workspace_.parameters.tensors[t].place);
  }

  // What is not summed over tasks.
  PYMETA_FN PYMETA_NOINLINE void write_gradients(const MetaGradient<X>& gradient,
                                                 const ItemSet& support,
                                                 const ItemSet& query) const {
    for (int t = 0; t < call_.network->tensor_count; ++t)
      if (call_.wants_own_gradient(t))
        arrays_.write_own_gradient(t, gradient.v() + workspace_.parameters.tensors[t].place);
    if (call_.lr.per_task && call_.lr_gradient)
      gradient.own_rate_gradients(
          [&](int row, int column, Vec value) { arrays_.write_own_rate(row, column, value); });
    if (call_.anchors_gradient) arrays_.write_anchor_gradient(gradient.anchor_gradient());
    const bool second = call_.second_order();
    if (call_.xs_gradient)
      arrays_.write_input_gradient(call_.support, support, second, call_.xs_gradient);
    if (call_.xq_gradient)
      arrays_.write_input_gradient(call_.query, query, true, call_.xq_gradient);
    if (call_.ys_gradient) arrays_.write_target_gradient(call_.support, support, call_.ys_gradient);
    if (call_.yq_gradient) arrays_.write_target_gradient(call_.query, query, call_.yq_gradient);
    if (call_.support_weights_gradient)
      arrays_.write_weight_gradient(call_.support, support, call_.support_weights_gradient);
    if (call_.query_weights_gradient)
      arrays_.write_weight_gradient(call_.query, query, call_.query_weights_gradient);
    if (call_.support_offset_gradient)
      arrays_.write_offset_gradient(call_.support, support, call_.support_offset_gradient);
    if (call_.query_offset_gradient)
      arrays_.write_offset_gradient(call_.query, query, call_.query_offset_gradient);
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

  PYMETA_FN PYMETA_NOINLINE void run_epochs() {
    auto batches = arrays_.batches();
    auto curves = arrays_.curves();
    ItemSet validation{};
    if (call_.validation.x) validation = arrays_.set(call_.validation, workspace_.validation_set);
    write(fine_tune(loop_, batches, call_.validation.x ? &validation : nullptr, curves));
  }

  // All that is asked for of adapted parameters.
  PYMETA_FN PYMETA_NOINLINE void write(const Parameters& theta) {
    if (call_.sums_gradients()) loop_.add_difference(theta, totals_);
    if (call_.losses) arrays_.write_losses(loop_.mean_step_loss());
    if (call_.status) arrays_.write_status(theta);
    for (int t = 0; t < call_.network->tensor_count; ++t)
      if (call_.adapted_parameters && call_.adapted[t] && call_.adapted_parameters[t])
        arrays_.write_adapted(t, theta.tensor(t));
    if (call_.predictions) write_predictions(theta);
  }

  PYMETA_FN PYMETA_NOINLINE void write_predictions(const Parameters& theta) {
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
