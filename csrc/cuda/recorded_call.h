// Makes the lists of a call (recorder.h): what stands for its arrays, its inner steps, and all of a meta-gradient.
#pragma once

#include "recorded_options.h"

PYMETA_KERNEL_BEGIN

// A task's rows are bound before its list; of its results some are written by operations.
class RecordedArrays : public TaskArrays<Recorder> {
 public:
  using TaskArrays<Recorder>::TaskArrays;

  ItemSet set(const RowSet<Real>& rows, const SetLayout& layout) {
    const bool is_query = &rows == &call_.query;
    if (is_query && std::exchange(of_all_, false)) now().pass_again();
    return set(rows, layout, is_query ? SetOf::query : SetOf::support,
               is_query ? call_.max_query : call_.max_support);
  }
  ItemSet set(const RowSet<Real>& rows, const SetLayout& layout, SetOf which, int count) const {
    ItemSet set{{memory_.at(layout.x), Block::stride(call_.network->in_features())},
                {count, Recording::mark_of(which), Real(count)},
                nullptr,
                nullptr,
                nullptr,
                Real(count)};
    set.loss = &call_.loss_of(rows);
    set.lies(layout, memory_);
    if (rows.offset) set.offset = memory_.at(layout.offset);
    if (rows.y) {
      set.targets = memory_.at(layout.targets);
      set.scale = memory_.at(layout.scale);
    }
    return set;
  }
  // Those of a step are written where they are summed (Recording::add_query_loss).
  void write_losses(Vec) const {
    if (call_.step_weights) now().together(Act::write_weighted_loss);
  }
  void write_step_loss(int, Vec) const {}
  void write_predictions(const ItemSet& query, const Real* y) const {
    const int out = call_.network->out_features();
    Recorder::add(Act::write_predictions, out, query.extent, Recorder::elements(query.extent, out),
                  y);
  }

  // Whether a row is left out, a block sees; what is done then is in the list.
  bool leaves_out(const RowSet<Real>&) const { return true; }
  ItemSet set_of_all(const RowSet<Real>& rows, const SetLayout& layout) {
    ItemSet set = this->set(rows, layout, SetOf::query, call_.max_query);
    now().end(Part::whole);
    write_predictions(set, memory_.at(workspace_.query) + workspace_.query_tape.y);
    now().end(Part::all_count);
    of_all_ = true;
    set.targets = set.scale = nullptr;
    return set;
  }

  // A block has its task's start, rates and anchor from the beginning.
  void start() const {}
  void rates() const {}
  Vec anchor() const { return 0; }

  // What flows into the losses is a number that stands for it (Recording::put_factor): 1 for one, k + 2 for that after step k, 2
  // where there is but one.
  Seed seed() const {
    const bool any = call_.cotangents.any();
    return {!any, any && !call_.step_weights ? Real(2) : Real(1)};
  }
  Vec step_cotangent(int) const { return 0; }
  void add_cotangent(int t, const Real* v) const { with_tensor(Act::add_cotangent, t, v); }

  void write_own_gradient(int t, const Real* v) const {
    with_tensor(Act::write_own_gradient, t, v);
  }
  void write_anchor_gradient(Vec) const { now().together(Act::write_anchor_gradient); }
  void write_input_gradient(const RowSet<Real>&, const ItemSet& set, bool computed, Real*) const {
    write(Act::write_inputs, set, computed ? set.dx : nullptr);
  }
  void write_target_gradient(const RowSet<Real>&, const ItemSet& set, Real*) const {
    write(Act::write_columns, set, set.target_gradient);
  }
  void write_offset_gradient(const RowSet<Real>&, const ItemSet& set, Real*) const {
    write(Act::write_columns, set, set.offset_gradient).relu = true;
  }
  void write_weight_gradient(const RowSet<Real>&, const ItemSet& set, Real*) const {
    write(Act::write_weights, set, set.weight_gradient);
  }

 private:
  static Recording& now() { return Recording::now(); }
  static void with_tensor(Act act, int t, const Real* v) {
    now().together(act, v).number = static_cast<std::uint8_t>(t);
  }
  static Operation& write(Act act, const ItemSet& set, const Real* from) {
    Operation& op = now().together(act, from);
    Recording::put(op, set.extent.keep);
    return op;
  }

  bool of_all_ = false;  // is the query set all of its rows?
};

// Where a recorded call's arrays seem to lie.
struct RecordedCall {
  Call<Real> call;
  std::vector<Real> rates, step_weights;
  Workspace<Recorder> workspace;
  Shared shared{Recording::memory(Lies::packed), nullptr, nullptr, nullptr};
  Memory memory{Recording::memory(Lies::near), Recording::memory(Lies::far)};

  RecordedCall(const Call<Real>& given, std::size_t near)
      : call(given),
        rates(static_cast<std::size_t>(given.lr.rows) * given.lr.columns),
        workspace(given, near) {
    for (std::size_t i = 0; i < rates.size(); ++i)
      rates[i] = Recording::rate_number(static_cast<int>(i));
    call.lr.values = rates.data();
    if (call.lr.per_element) shared.rates = shared.theta + workspace.parameters.size;
    for (int k = 0; call.step_weights && k < call.steps; ++k) step_weights.push_back(Real(k + 2));
    if (call.step_weights) call.step_weights = step_weights.data();
    call.stop = nullptr;
  }
};

// Inner steps, and what is made of the weights behind them (core/algorithms/job.h: write).
class RecordedSteps {
 public:
  RecordedSteps(const RecordedCall& of, Recording& recording)
      : call_(of.call),
        workspace_(of.workspace),
        memory_(of.memory),
        recording_(recording),
        loop_(of.call, of.workspace, of.shared, of.memory),
        arrays_(of.call, of.workspace, of.shared, of.memory, 0) {}

  void run() {
    const Parameters start = loop_.start(), adapted = loop_.state().adapted(1);
    if (call_.has_support()) {
      step(0, start, Part::first_step);
      step(1, adapted, Part::next_step);
    }
    write(start, Part::after_none);
    if (call_.has_support()) write(adapted, Part::after_some);
  }

 private:
  using Parameters = typename InnerLoop<Recorder>::Parameters;

  void step(int k, const Parameters& theta, Part part) {
    const bool minibatches = workspace_.order != kNowhere;
    const ItemSet set = arrays_.set(call_.support, workspace_.support_set, SetOf::support,
                                    minibatches ? call_.batches.size : call_.max_support);
    recording_.begin_step(k);
    loop_.step(k, theta, {&set, true, true, k > 0 && !minibatches, {}});
    recording_.end(part);
  }

  void write(const Parameters& theta, Part part) {
    const auto each = [&](Act act, int t, auto... at) {
      const std::size_t size = workspace_.parameters.scalars(t);
      Operation& op = recording_.add(act, 0, 0, size, at...);
      op.number = static_cast<std::uint8_t>(t);
      Recording::put_size(op, size);
    };
    const Call<Real>& call = call_;
    const int tensors = call.network->tensor_count;
    if (call.sums_gradients() && call.task_clip > 0) clip(theta);
    if (call.sums_gradients())
      for (int t = 0; t < tensors; ++t)
        each(Act::add_difference, t, loop_.start().tensor(t), theta.tensor(t),
             Recording::memory(Lies::sums) + workspace_.parameters.tensors[t].place);
    if (call.losses) recording_.add(Act::write_mean_loss, 0, 0, 1);
    for (int t = 0; t < tensors; ++t)
      if (call.adapted_parameters && call.adapted[t] && call.adapted_parameters[t])
        each(Act::write_adapted, t, theta.tensor(t));
    if (call.status) write_status(theta);
    if (call.predictions) write_predictions(theta);
    recording_.end(part);
  }
  // By what a task's way from the start is scaled.
  void clip(const Parameters& theta) {
    bool first = true;
    for (int t = 0; t < call_.network->tensor_count; ++t)
      Recording::put_sum(
          recording_.together(Act::add_difference_square, theta.tensor(t), loop_.start().tensor(t)),
          t, first);
    recording_.together(Act::task_clip);
  }
  void write_status(const Parameters& theta) {
    // All adapted tensors lie in one array, whether or not it is the start.
    int first = 0;
    while (first < call_.network->tensor_count && !call_.adapted[first]) ++first;
    const bool any = first < call_.network->tensor_count;
    const Real* of_first = theta.tensor(any ? first : 0);
    Operation& op = recording_.add(Act::look_at_weights, 0, 0, kBlockThreads,
                                   of_first - workspace_.parameters.tensors[any ? first : 0].place);
    Recording::put_size(op, workspace_.parameters.size);
    recording_.add(Act::gather_looks, 0, 0, kLookers);
    recording_.add(Act::write_status, 0, 0, 1);
  }
  void write_predictions(const Parameters& theta) {
    const ItemSet query = arrays_.set(call_.query, workspace_.query_set);
    recording_.notes_losses = false;
    loop_.evaluate(theta, query);
    recording_.notes_losses = true;
    arrays_.write_predictions(query, loop_.outputs());
  }

  const Call<Real>& call_;
  const Workspace<Recorder>& workspace_;
  const Memory& memory_;
  Recording& recording_;
  InnerLoop<Recorder> loop_;
  RecordedArrays arrays_;
};

inline void record(const Call<Real>& given, std::size_t near, const Sharing& sharing,
                   OperationList& list) {
  const RecordedCall own(given, near);
  const Call<Real>& call = own.call;
  const Workspace<Recorder>& workspace = own.workspace;
  const Hazards hazards(workspace.order != kNowhere ? call.batches.size : call.max_support,
                        call.max_query, workspace.parameters.size);
  Recording recording(call, workspace.parameters.tensors, sharing, hazards, list);
  if (call.job != Job::meta) return RecordedSteps(own, recording).run();
  Real* const sums = Recording::memory(Lies::sums);
  const Totals totals{sums, sums + (call.sums_gradients() ? workspace.parameters.size : 0), false,
                      workspace.parameters.size};
  InnerLoop<Recorder> loop(call, workspace, own.shared, own.memory);
  RecordedArrays arrays(call, workspace, own.shared, own.memory, 0);
  ItemJob<Recorder, RecordedArrays>(call, workspace, own.shared, own.memory, loop, arrays, totals)
      .run();
  recording.end_whole();
}

inline void make_list(const Call<Real>&, std::size_t, TaskFrame<false>&) {}
inline void make_list(const Call<Real>& call, std::size_t near, TaskFrame<true>& frame) {
  record(call, near, frame.sharing, frame.list);
#ifdef PYMETA_EMULATE
  if (frame.list.count > kMostOperations) __builtin_trap();  // most_operations() is wrong
#endif
}

PYMETA_KERNEL_END
