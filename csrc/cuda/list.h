// A block goes through lists of operations (operations.h), task by task.
#pragma once

#include "alone.h"
#include "recorder.h"

PYMETA_KERNEL_BEGIN

template <bool kExtras>
struct TaskFrame : Frame {
  OperationList list;

  using Frame::Frame;
  void make_list(const Call<Real>& described, std::size_t near) {
    record(described, near, sharing, list);
  }
};
using ListFrame = TaskFrame<false>;

// What the set is then is known from the list; it is on the stack for the time of this function.
PYMETA_FN PYMETA_NOINLINE inline void bind_rows(const Call<Real>& call, const Memory& memory,
                                                std::int64_t task, SetOf which,
                                                const Workspace<Block>& workspace,
                                                TaskRows chosen) {
  const bool is_query = which == SetOf::query;
  TaskBinder(call, task, memory)
      .bind(is_query ? call.query : call.support,
            is_query ? workspace.query_set : workspace.support_set, &chosen);
}

class ListedTask {
 public:
  // `own`: the block's part of the frame. `first` of its chunk: what is summed over tasks is put where the sums are, and not added.
  PYMETA_FN ListedTask(const ListFrame& given, Frame& own, const Memory& memory, bool first,
                       std::int64_t task)
      : given_(given),
        own_(own),
        call_(own.call),
        memory_(memory),
        first_(first),
        task_(task),
        rates_(own.call.lr.values) {}

  // Its inner steps and what comes behind them, or the whole of a meta-gradient.
  PYMETA_FN void run_all() {
    const Workspace<Block>& workspace = given_.workspace;
    RowOrder order(call_, task_, order_in(memory_, workspace.order));
    if (call_.has_support() && !order.shuffles()) bind(SetOf::support, {nullptr, order.rows()});
    const int steps = steps_of(order);
    for (int k = 0; k <= steps; ++k) {
      if (k < steps)
        begin_step(k, order);
      else if (call_.has_query())
        bind(SetOf::query, {nullptr, call_.query.size(task_)});
      run(k < steps                ? (k == 0 ? Part::first_step : Part::next_step)
          : call_.job == Job::meta ? Part::whole
          : steps > 0              ? Part::after_some
                                   : Part::after_none);
      sync();  // before other rows take the place of these
    }
    if (call_.job == Job::fine_tune && thread_index() == 0) {
      const int epochs = order.rows() > 0 ? call_.epochs : 0;
      if (call_.best_epochs) call_.best_epochs[task_] = epochs;
      if (call_.epochs_run) call_.epochs_run[task_] = epochs;
    }
  }

 private:
  PYMETA_FN void run(Part part) {
    const int p = static_cast<int>(part), end = given_.list.ends[p];
    for (int i = p ? given_.list.ends[p - 1] : 0; i < end; ++i) {
      const Operation& op = given_.list.operations[i];
      if (op.waits) sync();
      const int own = op.from_last ? thread_count() - 1 - thread_index() : thread_index();
      if (own < op.share) run(op, own);
    }
  }

  PYMETA_FN void run(const Operation& op, int own) {
    const int out = op.out;
    const Extent extent{own_.rows[static_cast<int>(op.set)], nullptr, Real(0)};
    switch (op.act) {
      case Act::apply:
      case Act::apply_transposed:
      case Act::outer:
        return product(op, extent.rows);
      case Act::narrow_apply:
        return Alone::narrow_apply(op.in, out, extent.rows, terms(op), maybe(op, 4), at(op, 5));
      case Act::narrow_apply_transposed: {
        const TwoTerms pair = terms(op);
        const Term both[2] = {{{pair.x, 0}, pair.w}, {{pair.x_too, 0}, pair.w_too}};
        return Alone::narrow_apply_transposed(op.in, out, extent, both, op.count,
                                              destination(op, 5));
      }
      case Act::narrow_outer: {
        const TwoTerms pair = terms(op);
        const long row = Alone::stride(op.in);
        const Matrix pairs[2][2] = {{{pair.x, row}, {pair.w, 0}},
                                    {{pair.x_too, row}, {pair.w_too, 0}}};
        return Alone::narrow_outer(op.in, out, extent, pairs, op.count, sink(op, 4));
      }
      case Act::sum_rows:
        return Alone::sum_quad(out, extent.rows, own, at(op, 0), sink(op, 1));
      case Act::narrow_sum_rows:
        return Alone::narrow_sum(out, extent.rows, own, at(op, 0), sink(op, 1));
      case Act::to_class_major:
        return Alone::to_class_major(extent, out, at(op, 0), at(op, 1));
      case Act::from_class_major:
        return Alone::from_class_major(extent, out, at(op, 0), at(op, 1));
      case Act::pass_on:
        return pass_on<Alone>(extent, out, at(op, 0), destination(op, 1));
      case Act::clear:
        return clear<Alone>(extent, out, at(op, 0));
      case Act::activate:
        return activate<Alone>(layer(op), extent, at(op, 0), at(op, 1));
      case Act::through_slope:
        return through_slope<Alone>(layer(op), extent, maybe(op, 0), at(op, 1), at(op, 2),
                                    at(op, 3));
      case Act::through_slope_tangent:
        return through_slope_tangent<Alone>(layer(op), extent, maybe(op, 0), at(op, 1),
                                            maybe(op, 2), maybe(op, 3), at(op, 4), at(op, 5));
      case Act::loss_gradient:
        return loss_gradient<Alone>(loss(op), loss_rows(op, extent.rows), at(op, 4), maybe(op, 5));
      case Act::loss_hessian_product:
        return loss_hessian_product<Alone>(loss(op), loss_rows(op, extent.rows), at(op, 4),
                                           at(op, 5));
      case Act::write_loss:
        if (call_.losses) call_.losses[task_] = Alone::sum_in_order(extent.rows, at(op, 0));
        return;
      case Act::add_loss:
        loss_sum_ = loss_sum_ + Alone::sum_in_order(extent.rows, at(op, 0));
        return;
      case Act::write_mean_loss:
        call_.losses[task_] = call_.steps > 0 ? loss_sum_ / Real(call_.steps) : Real(0);
        return;
      case Act::write_predictions:
        return write_predictions(extent, out, at(op, 0));
      case Act::copy:
        return Alone::copy(at(op, 1), at(op, 0), size(op));
      case Act::take_step:
        return take_step(op);
      case Act::add_difference:
        return add_difference(op, at(op, 0), at(op, 1), at(op, 2));
      case Act::look_at_weights:
        return Alone::look_at_weights(call_, given_.workspace.parameters, at(op, 0));
      case Act::gather_looks:
        return Alone::gather_looks();
      case Act::write_status:
        return write_status();
      case Act::write_adapted:
        return write_adapted(op.number, at(op, 0));
    }
  }

  // ---- operands --------------------------------------------------------------------------------------------------

  PYMETA_FN Real* at(const Operation& op, int i) const {
    const Spot spot = op.spots[i];
    return own_.memories[spot >> kSpotBits] + (spot & ((Spot{1} << kSpotBits) - 1));
  }
  PYMETA_FN Real* maybe(const Operation& op, int i) const {
    return op.spots[i] == kNoSpot ? nullptr : at(op, i);
  }
  PYMETA_FN static std::size_t size(const Operation& op) { return op.spots[kSpots - 1]; }
  PYMETA_FN TwoTerms terms(const Operation& op) const {
    TwoTerms t{op.count, maybe(op, 0), maybe(op, 1), nullptr, nullptr};
    if (op.count > 1) t.x_too = at(op, 2), t.w_too = at(op, 3);
    return t;
  }
  PYMETA_FN const Layer& layer(const Operation& op) const {
    return call_.network->layers[op.number];
  }
  PYMETA_FN const Loss& loss(const Operation& op) const {
    return own_.losses[static_cast<int>(op.set)];
  }
  PYMETA_FN Destination destination(const Operation& op, int first) const {
    return {at(op, first), op.relu, maybe(op, first + 1)};
  }
  // A chunk's first task finds no sums.
  PYMETA_FN Real* base(const Operation& op, int i) const {
    const bool summed = op.spots[i] >> kSpotBits == static_cast<Spot>(Lies::sums);
    return first_ && summed ? nullptr : maybe(op, i);
  }
  PYMETA_FN Real scale(const Operation& op) const {
    return op.rate ? -rates_[op.rate - 1] : Real(1);
  }
  PYMETA_FN Sink sink(const Operation& op, int first) const {
    return {at(op, first), base(op, first + 1), maybe(op, first + 2), scale(op)};
  }
  PYMETA_FN LossRows loss_rows(const Operation& op, int rows) const {
    return {op.out, op.in, rows, at(op, 0), maybe(op, 1), at(op, 2), nullptr, at(op, 3), nullptr};
  }

  // ---- operations ------------------------------------------------------------------------------------------------

  // One description for all three forms: each would have its place on the stack.
  PYMETA_FN void product(const Operation& op, int rows) const {
    const bool forth = op.act == Act::apply, sums = op.act == Act::outer;
    const int in_row = static_cast<int>(Alone::stride(op.in)),
              out_row = static_cast<int>(Alone::stride(op.out));
    Product p;
    p.rows = sums ? op.in : rows;
    p.columns = forth || sums ? op.out : op.in;
    p.count = op.count;
    p.first = {maybe(op, 0), forth || sums ? in_row : out_row, maybe(op, 1), out_row,
               sums    ? rows
               : forth ? op.in
                       : op.out};
    if (op.count > 1) p.a = at(op, 2), p.b = at(op, 3);
    p.bias = forth ? maybe(op, 4) : nullptr;
    p.epilogue = sums ? Alone::sunk(sink(op, 4), out_row)
                      : Alone::destined(destination(op, 5), forth ? out_row : in_row);
    if (forth)
      multiply_alone<Form::nn>(p, op.height);
    else if (sums)
      multiply_alone<Form::tn>(p, op.height);
    else
      multiply_alone<Form::nt>(p, op.height);
  }

  PYMETA_FN void write_predictions(const Extent& extent, int out, const Real* y) const {
    Real* to = call_.predictions + call_.query.start(task_) * out;
    const int rows = extent.rows;
    Alone::map(extent, out, [=](long, long o, int r) {
      to[static_cast<std::int64_t>(r) * out + o] = y[o * rows + r];
    });
  }

  PYMETA_FN void take_step(const Operation& op) const {
    const StepOperands operands{at(op, 0),    at(op, 1),    at(op, 2),
                                maybe(op, 3), maybe(op, 4), given_.workspace.parameters.size,
                                size(op)};
    with_rule(call_.optimizer,
              [&](const auto& rule) { Alone::take_step(rule, operands, scale(op), correction_); });
  }
  PYMETA_FN void add_difference(const Operation& op, const Real* start, const Real* theta,
                                Real* to) const {
    const Real* base = first_ ? nullptr : to;
    Alone::for_vectors(size(op), [=](std::size_t i) {
      const Real difference = start[i] - theta[i];
      to[i] = base ? base[i] + difference : difference;
    });
  }
  PYMETA_FN void write_status() const {
    Real bad = 0;
    for (int i = 0; i < kLookers; ++i) bad += Alone::scratch()[kBlockThreads + i];
    call_.status[task_] = bad != 0;
  }
  PYMETA_FN void write_adapted(int t, const Real* from) const {
    const PackedTensor& p = given_.workspace.parameters.tensors[t];
    Real* to = call_.adapted_parameters[t] + task_ * p.elements();
    const int across = p.transposed ? p.outer : p.inner;
    Alone::for_indices(p.outer * p.inner, [&](int index) {
      const int line = index / across, column = index % across;
      const int outer = p.transposed ? column : line, inner = p.transposed ? line : column;
      to[index] = from[static_cast<std::size_t>(outer) * p.row + inner];
    });
  }

  // ---- rows and steps --------------------------------------------------------------------------------------------

  // How many rows there are is heard of behind the next barrier.
  PYMETA_FN void bind(SetOf which, const TaskRows& chosen) const {
    bind_rows(call_, memory_, task_, which, given_.workspace, chosen);
    if (thread_index() == 0) own_.rows[static_cast<int>(which)] = chosen.count;
  }
  // Of those that are part by part.
  PYMETA_FN int steps_of(const RowOrder& order) const {
    if (call_.job == Job::meta || call_.job == Job::predict || order.rows() == 0) return 0;
    return call_.job == Job::fine_tune ? call_.epochs * order.batches() : call_.steps;
  }
  PYMETA_FN void begin_step(int k, RowOrder& order) {
    if (order.shuffles())
      bind(SetOf::support, order.batch(k / order.batches(), k % order.batches()));
    const LearningRate<Real>& lr = call_.lr;
    rates_ = lr.values + static_cast<long>(k < lr.rows ? k : lr.rows - 1) * lr.columns;
    if (const Real* c = given_.shared.corrections) correction_ = {c[2 * k], c[2 * k + 1]};
  }

  const ListFrame& given_;
  Frame& own_;
  const Call<Real>& call_;
  const Memory& memory_;
  const bool first_;
  const std::int64_t task_;
  const Real* rates_;  // of the step
  Correction correction_{};
  Real loss_sum_ = 0;  // of the steps; the first thread's
};

PYMETA_FN inline void run_tasks(const ListFrame& given) {
  Frame& own = own_frame(given);
  const Memory memory = own_memory(given);
  for (std::int64_t chunk = block_index(); chunk < given.chunks; chunk += block_count()) {
    if (thread_index() == 0)
      own.lies_in(memory, given.shared.theta,
                  given.sums + chunk * static_cast<std::int64_t>(given.sums_size));
    sync();
    const std::int64_t first = chunk * given.tasks_per_chunk;
    for (std::int64_t task = first; task < first + given.tasks_per_chunk && task < own.call.tasks;
         ++task)
      ListedTask(given, own, memory, task == first, task).run_all();
  }
}

using GivenFrame = TaskFrame<Block::Family::kExtras>;

PYMETA_KERNEL_END
