// What all threads of a block do together in a list of a call with options (operations.h): as the algorithms of core/ do it, whose
// names it has, with the same functions and in the same order.
#pragma once

#include "list_operands.h"

PYMETA_KERNEL_BEGIN

class ListOptions : public ListOperands {
 public:
  using ListOperands::ListOperands;

  // A task's numbers, which its operations leave for each other. The first thread writes them; all operations here begin behind a
  // barrier.
  enum Number { kSum, kNorm, kClip, kSlope, kAnchor, kAnchorGradient, kShare, kLoss, kNumbers };
  PYMETA_FN static Real& number(Number which) { return Block::scratch()[kPlace + which]; }

  // What it has before its first step.
  PYMETA_FN PYMETA_NOINLINE void begin_task() const {
    if (thread_index() == 0) {
      number(kAnchorGradient) = number(kLoss) = number(kSum) = 0;
      number(kAnchor) = call().is_anchored() ? call().anchor_of(task_) : Real(0);
      number(kClip) = 1;
    }
    const Workspace<Block>& workspace = given_.workspace;
    if (workspace.start != kNowhere) arrays().start();
    if (workspace.own_rates != kNowhere) arrays().rates();
    sync();
  }

  // Each in a function of its own: what one has on the stack is not beneath another one.
  PYMETA_FN void run_together(const Operation& op) const {
    if (op.act == Act::follow_rule || op.act == Act::fold_rate || op.act == Act::reverse_rule)
      return with_rule(call().optimizer,
                       [&](const auto& rule) { run_rule<std::decay_t<decltype(rule)>>(op); });
    run_other(op);
  }

 private:
  PYMETA_FN PYMETA_NOINLINE void run_other(const Operation& op) const {
    switch (op.act) {
      case Act::add_square:
      case Act::add_along:
      case Act::add_pull:
      case Act::add_difference_square:
        return add_to_sum(op);
      case Act::clip:
      case Act::clip_slope:
      case Act::end_pull:
      case Act::task_clip:
        if (thread_index() == 0) end_sum(op);
        return sync();
      case Act::fold_product: {
        const Real *g = at(op, 0), *v = at(op, 1);
        return Block::fold(packed(op), at(op, 2),
                           [=](std::size_t i, Vec sum) { return fma(-g[i], v[i], sum); });
      }
      case Act::reverse_clip:
        return reverse_clip(op);
      case Act::reverse_pull:
        return reverse_pull(op);
      case Act::clear_array: {
        Real* to = at(op, 0);
        return Block::for_vectors(size(op), [=](std::size_t i) { to[i] = 0; });
      }
      case Act::add_task:
        return add_task(op);
      case Act::add_cotangent:
        return arrays().add_cotangent(op.number, at(op, 0));
      case Act::add_step_loss:
      case Act::write_weighted_loss:
        return take_loss(op);
      case Act::write_own_gradient:
        return arrays().write_own_gradient(op.number, at(op, 0));
      case Act::write_anchor_gradient:
        return arrays().write_anchor_gradient(number(kAnchorGradient));
      case Act::write_inputs:
      case Act::write_columns:
      case Act::write_weights:
        return write_of_set(op);
      default:
        return run_on_rows(op);
    }
  }

  static constexpr int kPlace =
      288;  // in the scratch, behind what sums need (block.h: sum_partials)
  static_assert(kPlace + kNumbers <= Block::kScratch, "numbers of a task");

  PYMETA_FN TaskArrays<Block> arrays() const {
    return {call(), given_.workspace, given_.shared, memory(), task_};
  }
  PYMETA_FN const PackedTensor& packed(const Operation& op) const {
    return given_.workspace.parameters.tensors[op.number];
  }
  PYMETA_FN int rows(const Operation& op) const { return frame().rows[static_cast<int>(op.set)]; }

  // ---- steps -----------------------------------------------------------------------------------------------------

  PYMETA_FN StepArrays step_arrays(const Real* rates, const Operation& op, int theta) const {
    return {rates,
            op.rate ? rates_[op.rate - 1] : Real(0),
            at(op, theta),
            at(op, theta + 1),
            maybe(op, theta + 2),
            {},
            {}};
  }
  PYMETA_FN StepCommon common(Real clip) const {
    const bool active = call().support.size(task_) > 0;
    return {number(kAnchor), clip, number(kNorm), correction_, active, active};
  }

  template <class Rule>
  PYMETA_FN PYMETA_NOINLINE void run_rule(const Operation& op) const {
    const Rule rule(call().optimizer);
    StepArrays a = step_arrays(maybe(op, 0), op, 1);
    const std::size_t apart = given_.workspace.parameters.size, elements = 4 * op.quads();
    const bool reverses = op.act == Act::reverse_rule;
    Real* before = maybe(op, 4);
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) {
      a.state_before[s] = before && !reverses ? before + s * apart : nullptr;
      a.state[s] = reverses                     ? before + s * apart
                   : op.act == Act::follow_rule ? at(op, 5) + s * apart
                                                : nullptr;
    }
    const StepCommon own = common(number(kClip));
    if (op.act == Act::follow_rule) return take_step<Block>(rule, a, own, elements, at(op, 6));
    if (!reverses) return step_rate_gradient<Block>(rule, a, own, packed(op), at(op, 5), at(op, 6));
    // The states' adjoints lie as the states do, those of a tensor where its u is.
    const Workspace<Block>& workspace = given_.workspace;
    Real *u = at(op, 6), *adjoints[kMaxStates];
    Real* first = memory().at(workspace.state_adjoints) + (u - memory().at(workspace.u));
    for (int s = 0; s < kMaxStates; ++s) adjoints[s] = first + s * apart;
    step_vjp<Block>(rule, a, own, elements, at(op, 5), u, adjoints);
  }

  PYMETA_FN PYMETA_NOINLINE void add_to_sum(const Operation& op) const {
    const Real* first = at(op, 0);
    const Real* second = maybe(op, 1);
    const Real sum = op.relu ? Real(0) : number(kSum);
    Real all = 0;
    if (op.act == Act::add_square || op.act == Act::add_along) {
      const StepArrays a = step_arrays(nullptr, op, 0);
      const StepCommon unclipped = common(1);
      const Real* u = op.act == Act::add_along ? at(op, 3) : nullptr;
      all = Block::sum_elements(packed(op), sum, [&](std::size_t i) {
        const Real g = clipped_gradient(a, unclipped, i);
        return g * (u ? u[i] : g);
      });
    } else {
      const Real* u = op.act == Act::add_pull ? at(op, 2) : nullptr;
      all = Block::sum_elements(packed(op), sum, [=](std::size_t i) {
        const Real difference = second ? first[i] - second[i] : first[i];
        return difference * (u ? u[i] : difference);
      });
    }
    if (thread_index() == 0) number(kSum) = all;
    sync();
  }
  // By one thread.
  PYMETA_FN void end_sum(const Operation& op) const {
    const Real sum = number(kSum);
    switch (op.act) {
      case Act::clip: {
        const Real norm = square_root(sum);
        number(kNorm) = norm;
        number(kClip) = minimum(Real(call().optimizer.clip_norm) / (norm + Real(1e-6)), Real(1));
        return;
      }
      case Act::clip_slope: {
        const Real norm = number(kNorm), clip = number(kClip);
        const bool clips = clip < Real(1) && norm > 0;
        number(kSlope) = clips ? -(clip / (norm + Real(1e-6)) / norm * sum) : Real(0);
        return;
      }
      case Act::end_pull:
        number(kAnchorGradient) = number(kAnchorGradient) + sum;
        return;
      default: {
        const Real squares = op.relu ? Real(0) : sum;
        number(kShare) =
            minimum(Real(call().task_clip) / (square_root(squares) + Real(1e-6)), Real(1));
      }
    }
  }
  PYMETA_FN PYMETA_NOINLINE void reverse_clip(const Operation& op) const {
    const StepArrays a = step_arrays(nullptr, op, 0);
    const StepCommon unclipped = common(1);
    const Real slope = number(kSlope), clip = number(kClip);
    Real* u = at(op, 3);
    Block::for_vectors(size(op), [&](std::size_t i) {
      u[i] = fma(slope, clipped_gradient(a, unclipped, i), clip * u[i]);
    });
  }
  PYMETA_FN void reverse_pull(const Operation& op) const {
    Real *v = at(op, 0), *u = at(op, 1), *pull = maybe(op, 2);
    const bool is_first = op.relu;
    const Real anchor = number(kAnchor);
    Block::for_vectors(size(op), [=](std::size_t i) {
      if (is_first) {
        v[i] = v[i] + pull[i];
      } else {
        const Real share = anchor * u[i];
        v[i] = v[i] + share;
        pull[i] = pull[i] - share;
      }
    });
  }
  PYMETA_FN void add_task(const Operation& op) const {
    const bool clips = call().task_clip > 0;
    const Real factor = clips ? number(kShare) : Real(1);
    const Real* from = at(op, 0);
    Real* to = at(op, 1);
    const bool adds = !first_;
    Block::for_vectors(size(op), [=](std::size_t i) {
      const Real own = clips ? factor * from[i] : from[i];
      to[i] = adds ? to[i] + own : own;
    });
  }

  // ---- sets ------------------------------------------------------------------------------------------------------

  // What flows into the loss after step k, or into the only one (core/algorithms/job.h: seed_of_step).
  PYMETA_FN Real cotangent(int k) const {
    const Cotangents<Real>& given = call().cotangents;
    const Real losses = !given.any() ? Real(1) : given.losses ? given.losses[task_] : Real(0);
    if (!call().step_weights) return losses;
    const Real own = losses * call().step_weights[k];
    return given.step_losses ? own + given.step_losses[k * call().tasks + task_] : own;
  }
  // As Recording::put_factor noted it. A rate is that of a step backwards.
  PYMETA_FN Real factor(const Operation& op) const {
    return op.number ? cotangent(op.number - 1) : unscaled_ ? Real(1) : scale(op);
  }

  PYMETA_FN PYMETA_NOINLINE void run_on_rows(const Operation& op) const {
    const int count = rows(op), columns = op.out;
    Real* to = at(op, 0);
    const Real *from = maybe(op, 1), *beside = maybe(op, 2);
    const Real by = factor(op);
    switch (op.act) {
      case Act::seed: {
        const bool has_loss = op.relu;
        return Block::for_indices(count * columns, [=](int i) {
          const Real d = has_loss ? by * to[i] : Real(0);
          to[i] = from ? d + from[i] : d;
        });
      }
      case Act::add_offset:
        return Block::for_indices(count * columns, [=](int i) { to[i] = to[i] + from[i]; });
      case Act::fill: {
        const Real value = op.in ? Real(1) / Real(op.in) : Real(0);
        return Block::for_indices(count * columns, [=](int i) { to[i] = value; });
      }
      case Act::add_factored:
        return Block::for_indices(count * columns, [=](int i) { to[i] = fma(by, from[i], to[i]); });
      case Act::add_products:
        return Block::for_indices(count, [=](int r) {
          Real sum = 0;
          for (int o = 0; o < columns; ++o)
            sum = fma(from[o * count + r], beside[o * count + r], sum);
          to[r] = fma(by, sum, to[r]);
        });
      case Act::add_to_inputs: {
        const bool is_first = op.relu;
        return Block::map({count, nullptr, Real(count)}, columns, [=](long i, long, int) {
          to[i] = fma(by, from[i], is_first ? Real(0) : to[i]);
        });
      }
      case Act::target_gradient:
        return loss_target_gradient<Block>(loss(op), loss_rows(op, count), at(op, 4));
      default:
        return loss_target_tangent<Block>(loss(op), loss_rows(op, count), at(op, 4), at(op, 5));
    }
  }

  PYMETA_FN void take_loss(const Operation& op) const {
    if (op.act == Act::write_weighted_loss) {
      if (thread_index() == 0) call().losses[task_] = number(kLoss);
      return;
    }
    const Real loss = Block::sum_rows_in_order({rows(op), nullptr, Real(rows(op))}, at(op, 0));
    if (thread_index() != 0) return;
    const int k = op.number;
    number(kLoss) = fma(call().step_weights[k], loss, number(kLoss));
    if (call().step_losses) call().step_losses[k * call().tasks + task_] = loss;
  }

  PYMETA_FN PYMETA_NOINLINE void write_of_set(const Operation& op) const {
    const bool is_query = op.set == SetOf::query;
    const RowSet<Real>& set = is_query ? call().query : call().support;
    const Extent extent{rows(op), nullptr, Real(rows(op))};
    ItemSet bound{};
    bound.extent = extent;
    if (op.act == Act::write_inputs) {
      bound.dx = maybe(op, 0);
      return arrays().write_input_gradient(set, bound, bound.dx != nullptr,
                                           is_query ? call().xq_gradient : call().xs_gradient);
    }
    if (op.act == Act::write_weights) {
      bound.weight_gradient = at(op, 0);
      return arrays().write_weight_gradient(
          set, bound, is_query ? call().query_weights_gradient : call().support_weights_gradient);
    }
    if (op.relu) {
      bound.offset_gradient = at(op, 0);
      return arrays().write_offset_gradient(
          set, bound, is_query ? call().query_offset_gradient : call().support_offset_gradient);
    }
    bound.target_gradient = at(op, 0);
    arrays().write_target_gradient(set, bound, is_query ? call().yq_gradient : call().ys_gradient);
  }
};

PYMETA_KERNEL_END
