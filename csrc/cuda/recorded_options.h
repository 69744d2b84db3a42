// What else than plain calls has, noted down (recorder.h): rates of their own for elements and tasks, pulls towards the start, clips,
// rules on the way back, seeds, gradients to targets, weights, offsets and inputs, losses after each step.
//
// All but a plain step is done by all threads together (operations.h), as the other kernels do it.
#pragma once

#include "recorder.h"

PYMETA_KERNEL_BEGIN

// ---- steps -----------------------------------------------------------------------------------------------------

// What the reverse sweep has of a step, or a step that is not theta - rate d alone.
inline bool has_step_options(const Call<Real>& call, const StepArrays& a) {
  return a.rates || a.start || call.optimizer.clip_norm > 0 || call.job == Job::meta;
}
// Arrays of a tensor of a step, and two more.
inline Operation& record_rule(Act act, const StepArrays& a, const Real* first, const Real* second,
                              const Real* third) {
  Recording& r = Recording::now();
  Operation& op = r.together(act, a.rates, a.theta, a.gradient, a.start, first, second, third);
  if (!a.rates) r.put_rate(op, a.rate);
  return op;
}

// Which rule it is, a block knows from the call. Tensors side by side at one rate are one operation; what their padding and the gap
// between them hold reaches nothing.
inline void record_step(int states, const StepArrays& a, std::size_t size, const Real* next) {
  const bool before = states > 0 && a.state_before[0];
  Recording& r = Recording::now();
  if (has_step_options(r.call(), a)) {
    Operation& op = record_rule(Act::follow_rule, a, a.state_before[0], a.state[0], next);
    return op.put_quads(size);
  }
  Operation& op = r.add(Act::take_step, 0, 0, size / 4, a.theta, a.gradient, next,
                        states > 0 ? a.state[0] : nullptr, before ? a.state_before[0] : nullptr);
  op.count = static_cast<std::uint8_t>(states);
  op.has_before = before;
  r.put_rate(op, a.rate);
  Recording::put_size(op, size);
  r.join_steps();
}
#define PYMETA_RECORD_STEP(rule)                                                                \
  template <>                                                                                   \
  inline void take_step<Recorder, rule>(const rule&, const StepArrays& a, const StepCommon&,    \
                                        std::size_t size, Real* next) {                         \
    record_step(rule::kStates, a, size, next);                                                  \
  }                                                                                             \
  template <>                                                                                   \
  inline void step_rate_gradient<Recorder, rule>(const rule&, const StepArrays& a,              \
                                                 const StepCommon&, const PackedTensor& packed, \
                                                 const Real* v, Real* lr_gradient) {            \
    Operation& op = record_rule(Act::fold_rate, a, a.state_before[0], v, lr_gradient);          \
    Recording::now().put(op, packed);                                                           \
  }                                                                                             \
  template <>                                                                                   \
  inline void step_vjp<Recorder, rule>(const rule&, const StepArrays& a, const StepCommon&,     \
                                       std::size_t size, Real* v, Real* u, Real* const*) {      \
    record_rule(Act::reverse_rule, a, a.state[0], v, u).put_quads(size);                        \
  }
PYMETA_RECORD_STEP(GradientStep)
PYMETA_RECORD_STEP(Momentum)
PYMETA_RECORD_STEP(Adam)
PYMETA_RECORD_STEP(RmsProp<true>)
PYMETA_RECORD_STEP(RmsProp<false>)
#undef PYMETA_RECORD_STEP

// What an item's elements have in common, a block holds.
template <>
inline StepCommon State<Recorder>::step_common(int k, const Parameters& theta, const Step&) const {
  Recording& r = Recording::now();
  if (call.job == Job::meta && call.corrections() > 0)
    r.add(Act::begin_step, 0, 0, kMostNumber).number = static_cast<std::uint8_t>(k);
  if (call.optimizer.clip_norm > 0) {
    bool first = true;
    for_adapted([&](int t, std::size_t, std::size_t) {
      const StepArrays a = step_arrays(k, t, theta);
      r.put_sum(r.together(Act::add_square, a.theta, a.gradient, a.start), t, first);
    });
    r.together(Act::clip);
  }
  return {};
}

// ---- the way back ----------------------------------------------------------------------------------------------

template <>
inline void MetaGradient<Recorder>::clip_vjp(int k, const Parameters& theta,
                                             const StepCommon&) const {
  const State<Recorder>& s = state_;
  Recording& r = Recording::now();
  bool first = true;
  const auto of = [&](Act act, int t) -> Operation& {
    const StepArrays a = s.step_arrays(k, t, theta);
    return r.together(act, a.theta, a.gradient, a.start, s.memory.at(s.ws.u) + place_of(t));
  };
  s.for_adapted(
      [&](int t, std::size_t, std::size_t) { r.put_sum(of(Act::add_along, t), t, first); });
  r.together(Act::clip_slope);
  s.for_adapted([&](int t, std::size_t, std::size_t size) {
    Recording::put_size(of(Act::reverse_clip, t), size);
  });
}

template <>
inline void MetaGradient<Recorder>::add_anchor_gradient(const Parameters& theta) {
  const State<Recorder>& s = state_;
  Recording& r = Recording::now();
  bool first = true;
  s.for_adapted([&](int t, std::size_t, std::size_t) {
    r.put_sum(r.together(Act::add_pull, theta.tensor(t), s.start().tensor(t),
                         s.memory.at(s.ws.u) + place_of(t)),
              t, first);
  });
  r.together(Act::end_pull);
}
template <>
inline void MetaGradient<Recorder>::anchor_vjp(int k, const Parameters& theta) {
  const State<Recorder>& s = state_;
  if (s.call.anchors_gradient && k > 0) add_anchor_gradient(theta);
  s.for_adapted([&](int, std::size_t place, std::size_t size) {
    const auto at = [&](Place array) { return s.memory.at(array) + place; };
    Operation& op =
        Recording::now().together(Act::reverse_pull, at(s.ws.v), at(s.ws.u), at(s.ws.pull));
    op.relu = k == 0;
    Recording::put_size(op, size);
  });
}
template <>
inline void MetaGradient<Recorder>::clear_adjoints() const {
  const State<Recorder>& s = state_;
  const auto clear = [](const Real* array, std::size_t size) {
    if (size > 0) Recording::put_size(Recording::now().together(Act::clear_array, array), size);
  };
  clear(state_adjoint(0), s.call.optimizer.states() * s.layout.size);
  if (s.ws.pull != kNowhere) clear(s.memory.at(s.ws.pull), s.layout.size);
}
template <>
inline void MetaGradient<Recorder>::rate_gradient(int k) const {
  const State<Recorder>& s = state_;
  Recording& r = Recording::now();
  s.for_adapted([&](int t, std::size_t place, std::size_t) {
    r.put(r.together(Act::fold_product, s.gradient(k) + place, s.memory.at(s.ws.v) + place,
                     lr_gradient_of(k, t)),
          s.layout.tensors[t]);
  });
}
template <>
inline Vec MetaGradient<Recorder>::task_factor() const {
  const State<Recorder>& s = state_;
  Recording& r = Recording::now();
  bool first = true;
  for (int t = 0; t < s.network.tensor_count; ++t)
    if (s.call.gradients && s.call.gradients[t] && !s.call.has_own_start(t))
      r.put_sum(r.together(Act::add_difference_square, v() + place_of(t)), t, first);
  Operation& op = r.together(Act::task_clip);
  op.relu = first;  // nothing was summed
  return 1;
}
template <>
inline void MetaGradient<Recorder>::add_task() const {
  if (state_.call.task_clip > 0) task_factor();
  Recording::put_size(Recording::now().together(Act::add_task, v(), totals_.gradient),
                      state_.layout.size);
}

// ---- sets ------------------------------------------------------------------------------------------------------

template <>
inline void Passes<Recorder>::seed(const Seed& seed) const {
  Recording& r = Recording::now();
  Operation& op = r.together(Act::seed, tape_.at(tape_.layout->dy), set_.cotangent);
  Recording::put(op, set_.extent.keep);
  op.out = static_cast<std::uint16_t>(network_.out_features());
  op.relu = set_.targets != nullptr;
  r.put_factor(op, seed.losses);
}
template <>
inline void Passes<Recorder>::add_offset() const {
  Operation& op = Recording::now().together(Act::add_offset, outputs(), set_.offset);
  Recording::put(op, set_.extent.keep);
  op.out = static_cast<std::uint16_t>(network_.out_features());
}
template <>
inline void Passes<Recorder>::add_to_input_delta(const Real* rdx, bool first, Real scale) const {
  Recording& r = Recording::now();
  Operation& op = r.together(Act::add_to_inputs, set_.dx, rdx);
  Recording::put(op, set_.extent.keep);
  op.out = static_cast<std::uint16_t>(network_.in_features());
  op.relu = first;
  r.put_factor(op, scale);
}

template <class... Pointers>
Operation& record_columns(Act act, const Extent& extent, int columns, const Pointers*... at) {
  Operation& op = Recording::now().together(act, at...);
  Recording::put(op, extent.keep);
  op.out = static_cast<std::uint16_t>(columns);
  return op;
}
inline void record_factored(const Extent& extent, int columns, Real factor, const Real* to,
                            const Real* from) {
  Recording::now().put_factor(record_columns(Act::add_factored, extent, columns, to, from), factor);
}
template <>
inline void loss_target_gradient<Recorder>(const Loss&, const LossRows& s, Real* gradient) {
  const Real* const none = nullptr;
  record_loss(Act::target_gradient, s, gradient, none).share = kMostNumber;
}
template <>
inline void loss_target_tangent<Recorder>(const Loss&, const LossRows& s, const Real* r,
                                          Real* product) {
  record_loss(Act::target_tangent, s, r, product).share = kMostNumber;
}

// Targets have no weights of their own here.
template <>
inline void SetGradients<Recorder>::clear() const {
  const auto fill = [&](const Real* to, int wide, int part) {
    if (to) record_columns(Act::fill, set_.extent, wide, to).in = static_cast<std::uint16_t>(part);
  };
  const int out = state_.network.out_features();
  fill(set_.target_gradient, columns(), 0);
  fill(set_.offset_gradient, out, 0);
  if (!set_.weight_gradient) return;
  fill(set_.unit_scale, 1, mean_columns(*set_.loss, out));
  fill(set_.weight_gradient, 1, 0);
}
template <>
inline void SetGradients<Recorder>::add_query_offset(const Tape& tape) const {
  if (set_.offset_gradient)
    record_factored(set_.extent, state_.network.out_features(), 1, set_.offset_gradient,
                    tape.at(tape.layout->dy));
}
template <>
inline void SetGradients<Recorder>::add_query(const Tape& tape, Vec losses) const {
  if (!set_.targets) return;
  LossRows rows = tape.loss_rows(set_);
  if (set_.target_gradient) {
    Real* dy = tape.at(tape.layout->dy);
    loss_target_gradient<Recorder>(*set_.loss, rows, dy);
    record_factored(set_.extent, rows.columns, losses, set_.target_gradient, dy);
  }
  if (!set_.weight_gradient) return;
  rows.scale = set_.unit_scale;
  Real* of_rows = tape.at(tape.layout->row_losses);
  loss_gradient<Recorder>(*set_.loss, rows, of_rows, nullptr);
  record_factored(set_.extent, 1, losses, set_.weight_gradient, of_rows);
}
template <>
inline void SetGradients<Recorder>::add_support(const Tape& tape, const Real* ry, Real* rdy,
                                                Real scale) const {
  LossRows rows = tape.loss_rows(set_);
  if (set_.offset_gradient)
    record_factored(set_.extent, rows.out, scale, set_.offset_gradient, rdy);
  if (set_.target_gradient) {
    loss_target_tangent<Recorder>(*set_.loss, rows, ry, rdy);
    record_factored(set_.extent, rows.columns, scale, set_.target_gradient, rdy);
  }
  if (!set_.weight_gradient) return;
  rows.scale = set_.unit_scale;
  loss_gradient<Recorder>(*set_.loss, rows, tape.at(tape.layout->row_losses), rdy);
  Recording::now().put_factor(
      record_columns(Act::add_products, set_.extent, rows.out, set_.weight_gradient, rdy, ry),
      scale);
}

PYMETA_KERNEL_END
