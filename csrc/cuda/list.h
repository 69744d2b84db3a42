// A block goes through lists of operations (operations.h), task by task.
#pragma once

#include "list_options.h"

PYMETA_KERNEL_BEGIN

class ListedTask : ListOptions {
 public:
  using ListOptions::ListOptions;

  // Its inner steps and what comes behind them, or the whole of a meta-gradient.
  PYMETA_FN void run_all() {
    const Workspace<Block>& workspace = given_.workspace;
    RowOrder order(call(), task_, order_in(memory(), workspace.order));
    if constexpr (kOptions) begin_task();
    if (call().has_support() && !order.shuffles()) bind(SetOf::support, {nullptr, order.rows()});
    const int steps = steps_of(order);
    Part part = call().job == Job::meta ? Part::whole
                : steps > 0             ? Part::first_step
                                        : Part::after_none;
    for (int k = 0;; ++k) {
      if (k < steps)
        begin_step(k, order);
      else if (call().has_query())
        bind_query(part);
      run(part);
      sync();  // before other rows take the place of these
      if (is_last(part)) break;
      part = behind(part, k + 1 < steps);
    }
    if (call().job == Job::fine_tune && thread_index() == 0) {
      const int epochs = order.rows() > 0 ? call().epochs : 0;
      if (call().best_epochs) call().best_epochs[task_] = epochs;
      if (call().epochs_run) call().epochs_run[task_] = epochs;
    }
  }

 private:
  static constexpr bool kOptions = Block::Family::kExtras;

#ifdef PYMETA_SPECIAL
  template <int p = 0>
  PYMETA_FN void run(Part part) {
    if (p == static_cast<int>(part))
      run_from<p ? kSpecialEnds[p ? p - 1 : 0] : 0, kSpecialEnds[p]>();
    else if constexpr (p + 1 < kParts)
      run<p + 1>(part);
  }
  // Half by half: compilers have a limit of depth.
  template <int kFirst, int kEnd>
  PYMETA_FN void run_from() {
    if constexpr (kEnd - kFirst > 1) {
      constexpr int middle = (kFirst + kEnd) / 2;
      run_from<kFirst, middle>();
      run_from<middle, kEnd>();
    } else if constexpr (kFirst < kEnd) {
      if constexpr (kSpecialOperations[kFirst].waits) sync();
      if constexpr (is_repeated(kFirst))
        run_repeated<first_like(kFirst)>(kSpecialOperations[kFirst].spots);
      else
        run_share(Special<kFirst>{});
    }
  }
  template <int kLike>
  PYMETA_FN PYMETA_ONE_COPY void run_repeated(const Spot* spots) {
    run_share(Repeated<kLike>{spots});
  }
#else
  PYMETA_FN void run(Part part) {
    const int p = static_cast<int>(part), end = given_.list.ends[p];
    int i = p ? given_.list.ends[p - 1] : 0;
    if constexpr (kOptions) {
      while ((i = run_apart(i, end)) < end) run_next_together(given_.list.operations[i++]);
    } else {
      run_alone(i, end);
    }
  }
  // Up to what all threads do together; returns where that is. Its operands on the stack are not beneath what comes then.
  PYMETA_FN PYMETA_NOINLINE int run_apart(int i, int end) { return run_alone(i, end); }
  PYMETA_FN int run_alone(int i, int end) {
    for (; i < end; ++i) {
      const Operation& op = given_.list.operations[i];
      if constexpr (kOptions)
        if (is_together(op.act)) break;
      if (op.waits) sync();
      run_share(op);
    }
    return i;
  }
  PYMETA_FN void run_next_together(const Operation& op) const {
    sync();
    run_together(op);
  }
#endif

  template <class Op>
  PYMETA_FN void run_share(const Op& op) {
    const int own = op.from_last ? thread_count() - 1 - thread_index() : thread_index();
    if (own < op.share) run(op, own);
  }
  template <class Op>
  PYMETA_FN void run(const Op& op, int own) {
    const int out = op.out;
    const Extent extent{rows_of(op.set), nullptr, Real(0)};
    switch (op.act) {
      case Act::apply:
      case Act::apply_transposed:
      case Act::outer:
        return product(op, extent.rows);
      case Act::narrow_apply:
        return narrow_apply(op, extent);
      case Act::narrow_apply_transposed:
        return narrow_apply_transposed(op, extent);
      case Act::narrow_outer:
        return narrow_outer(op, extent);
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
        return of_loss(op, extent.rows);
      case Act::loss_hessian_product:
        return of_loss_tangent(op, extent.rows);
      case Act::write_loss:
        if (call().losses) call().losses[task_] = Alone::sum_in_order(extent.rows, at(op, 0));
        return;
      case Act::add_loss:
        loss_sum_ = loss_sum_ + Alone::sum_in_order(extent.rows, at(op, 0));
        return;
      case Act::write_mean_loss:
        call().losses[task_] = call().steps > 0 ? loss_sum_ / Real(call().steps) : Real(0);
        return;
      case Act::write_predictions:
        return write_predictions(extent, out, at(op, 0));
      case Act::copy:
        return Alone::copy(at(op, 1), at(op, 0), size(op));
      case Act::take_step:
        return take_step(op);
      case Act::scale_direction:
        return scale_direction(op);
      case Act::add_difference:
        return add_difference(op, at(op, 0), at(op, 1), at(op, 2));
      case Act::look_at_weights:
        return Alone::look_at_weights(call(), given_.workspace.parameters, at(op, 0));
      case Act::gather_looks:
        return Alone::gather_looks();
      case Act::write_status:
        return write_status();
      case Act::write_adapted:
        return write_adapted(op.number, at(op, 0));
      case Act::begin_step:
        return correct(op.number);
      default:
        return;
    }
  }

  // ---- operations ------------------------------------------------------------------------------------------------

  // One description for all three forms: each would have its place on the stack.
  template <class Op>
  PYMETA_FN void product(const Op& op, int rows) const {
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
      multiply<Form::nn>(op, p);
    else if (sums)
      multiply<Form::tn>(op, p);
    else
      multiply<Form::nt>(op, p);
  }
  PYMETA_FN static constexpr Act act_of(Form form) {
    return form == Form::nn ? Act::apply : form == Form::tn ? Act::outer : Act::apply_transposed;
  }
  template <Form kForm, class Op>
  PYMETA_FN static void multiply(const Op& op, const Product& p) {
    if constexpr (!kSpecial)
      multiply_listed<kForm>(p, op.height);
    else if constexpr (Op::act == act_of(kForm))
      multiply_alone<kForm, Op::height>(p);
  }

  // Each in a function of its own, so that what they have on the stack takes the same place.

  template <class Op>
  PYMETA_FN void narrow_apply(const Op& op, const Extent& extent) const {
    Alone::narrow_apply(op.in, op.out, extent.rows, terms(op), maybe(op, 4), at(op, 5));
  }
  template <class Op>
  PYMETA_FN void narrow_apply_transposed(const Op& op, const Extent& extent) const {
    const TwoTerms pair = terms(op);
    const Term both[2] = {{{pair.x, 0}, pair.w}, {{pair.x_too, 0}, pair.w_too}};
    Alone::narrow_apply_transposed(op.in, op.out, extent, both, op.count, destination(op, 5));
  }
  template <class Op>
  PYMETA_FN void narrow_outer(const Op& op, const Extent& extent) const {
    const TwoTerms pair = terms(op);
    const long row = Alone::stride(op.in);
    const Matrix pairs[2][2] = {{{pair.x, row}, {pair.w, 0}}, {{pair.x_too, row}, {pair.w_too, 0}}};
    Alone::narrow_outer(op.in, op.out, extent, pairs, op.count, sink(op, 4));
  }
  template <class Op>
  PYMETA_FN void of_loss(const Op& op, int rows) const {
    loss_gradient<Alone>(loss(op), loss_rows(op, rows), at(op, 4), maybe(op, 5));
  }
  template <class Op>
  PYMETA_FN void of_loss_tangent(const Op& op, int rows) const {
    loss_hessian_product<Alone>(loss(op), loss_rows(op, rows), at(op, 4), at(op, 5));
  }
  PYMETA_FN void write_predictions(const Extent& extent, int out, const Real* y) const {
    Real* to = call().predictions + call().query.start(task_) * out;
    const int rows = extent.rows;
    Alone::map(extent, out, [=](long, long o, int r) {
      to[static_cast<std::int64_t>(r) * out + o] = y[o * rows + r];
    });
  }

  template <class Op>
  PYMETA_FN void take_step(const Op& op) const {
    const StepOperands operands{at(op, 0),    at(op, 1),    at(op, 2),
                                maybe(op, 3), maybe(op, 4), given_.workspace.parameters.size,
                                size(op)};
    with_rule(call().optimizer,
              [&](const auto& rule) { Alone::take_step(rule, operands, scale(op), correction_); });
  }
  // All threads see the same rate, and nearly always there is nothing to do.
  template <class Op>
  PYMETA_FN void scale_direction(const Op& op) {
    unscaled_ = nullptr;
    const Real by = scale(op);
    if (is_near_one(by)) return;
    Real *v = at(op, 0), *kept = at(op, 1);
    sync();
    Alone::for_vectors(size(op), [=](std::size_t i) {
      kept[i] = v[i];
      v[i] = v[i] * by;
    });
    sync();
    unscaled_ = kept;
  }
  PYMETA_FN void correct(int k) {
    if (const Real* c = given_.shared.corrections) correction_ = {c[2 * k], c[2 * k + 1]};
  }
  template <class Op>
  PYMETA_FN void add_difference(const Op& op, const Real* start, const Real* theta,
                                Real* to) const {
    const Real* base = first_ ? nullptr : to;
    const bool clips = extra<Block>(call().task_clip > 0);
    const Real factor = clips ? number(kShare) : Real(1);
    Alone::for_vectors(size(op), [=](std::size_t i) {
      const Real whole = start[i] - theta[i];
      const Real difference = clips ? factor * whole : whole;
      to[i] = base ? base[i] + difference : difference;
    });
  }
  PYMETA_FN void write_status() const {
    Real bad = 0;
    for (int i = 0; i < kLookers; ++i) bad += Alone::scratch()[kBlockThreads + i];
    call().status[task_] = bad != 0;
  }
  PYMETA_FN void write_adapted(int t, const Real* from) const {
    const PackedTensor& p = given_.workspace.parameters.tensors[t];
    Real* to = call().adapted_parameters[t] + task_ * p.elements();
    const int across = p.transposed ? p.outer : p.inner;
    Alone::for_indices(p.outer * p.inner, [&](int index) {
      const int line = index / across, column = index % across;
      const int outer = p.transposed ? column : line, inner = p.transposed ? line : column;
      to[index] = from[static_cast<std::size_t>(outer) * p.row + inner];
    });
  }

  // ---- rows and steps --------------------------------------------------------------------------------------------

  PYMETA_FN bool is_last(Part part) const {
#ifdef PYMETA_SPECIAL
    constexpr bool split = is_split(kSpecialEnds);
#else
    const bool split = is_split(given_.list.ends);
#endif
    return part == Part::rest || part == Part::after_none || part == Part::after_some ||
           (part == Part::whole && !split);
  }
  PYMETA_FN Part behind(Part part, bool steps) const {
    switch (part) {
      case Part::whole:
        return frame().rows[static_cast<int>(SetOf::query)] < call().query.size(task_)
                   ? Part::left_out
                   : Part::all_count;
      case Part::left_out:
        return Part::again;
      case Part::first_step:
      case Part::next_step:
        return steps ? Part::next_step : Part::after_some;
      default:
        return Part::rest;
    }
  }
  PYMETA_FN void bind_query(Part part) const {
    if (part == Part::all_count || part == Part::rest) return;
    bind(SetOf::query, {nullptr, call().query.size(task_)}, part == Part::left_out);
  }
  // Of those that are part by part.
  PYMETA_FN int steps_of(const RowOrder& order) const {
    if (call().job == Job::meta || call().job == Job::predict || order.rows() == 0) return 0;
    return call().job == Job::fine_tune ? call().epochs * order.batches() : call().steps;
  }
  PYMETA_FN void begin_step(int k, RowOrder& order) {
    if (order.shuffles())
      bind(SetOf::support, order.batch(k / order.batches(), k % order.batches()));
    const LearningRate<Real>& lr = call().lr;
    rates_ = lr.values + static_cast<long>(k < lr.rows ? k : lr.rows - 1) * lr.columns;
    correct(k);
  }

  Real loss_sum_ = 0;  // of the steps; the first thread's
};

PYMETA_FN inline void run_tasks(const ListFrame& given) {
  Frame& own = own_frame(given);
  for (std::int64_t chunk = block_index(); chunk < given.chunks; chunk += block_count()) {
    if (thread_index() == 0)
      own.lies_in(own_memory(given), given.shared.theta,
                  given.sums + chunk * static_cast<std::int64_t>(given.sums_size));
    if constexpr (Block::Family::kExtras) {
      Real* rates =
          given.sums + chunk * static_cast<std::int64_t>(given.sums_size) + given.gradient_sums;
      Block::for_vectors(given.lr_sums, [=](std::size_t i) { rates[i] = 0; });
    }
    sync();
    const std::int64_t first = chunk * given.tasks_per_chunk;
    for (std::int64_t task = first; task < first + given.tasks_per_chunk && task < own.call.tasks;
         ++task)
      ListedTask(given, task == first, task).run_all();
  }
}

using GivenFrame = TaskFrame<Block::Family::kLists>;

PYMETA_KERNEL_END
