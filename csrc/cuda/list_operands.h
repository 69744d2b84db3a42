// What a list of operations is given, and where an operation's operands lie (list.h).
#pragma once

#include "alone.h"
#include "special.h"

PYMETA_KERNEL_BEGIN

template <>
struct TaskFrame<true> : Frame {
  OperationList list;

  using Frame::Frame;
};
#ifdef PYMETA_SPECIAL
using ListFrame = Frame;  // its operations are constants
#else
using ListFrame = TaskFrame<true>;
#endif

// Those that count, or all. What the set is then is known from the list; it is on the stack for the time of this function.
PYMETA_FN PYMETA_NOINLINE inline int bind_rows(const Call<Real>& call, const Memory& memory,
                                               std::int64_t task, SetOf which,
                                               const Workspace<Block>& workspace, TaskRows chosen,
                                               bool all) {
  const bool is_query = which == SetOf::query;
  const TaskBinder binder(call, task, memory);
  const RowSet<Real>& set = is_query ? call.query : call.support;
  const SetLayout& places = is_query ? workspace.query_set : workspace.support_set;
  return binder.bind(set, places, &chosen, all).extent.rows;
}

class ListOperands {
 public:
  // `first` of its chunk: what is summed over tasks is put where the sums are, and not added.
  PYMETA_FN ListOperands(const ListFrame& given, bool first, std::int64_t task)
      : given_(given), task_(task), rates_(call().lr.values), first_(first) {}

 protected:
  // The block's part of the frame.
  PYMETA_FN static Frame& frame() { return block_frame(); }
  PYMETA_FN static const Call<Real>& call() { return frame().call; }
  PYMETA_FN static const Memory& memory() { return frame().memory; }

  PYMETA_FN static int rows_of(SetOf set) {
#ifdef PYMETA_SPECIAL
    if (kSpecialRows[static_cast<int>(set)] >= 0) return kSpecialRows[static_cast<int>(set)];
#endif
    return frame().rows[static_cast<int>(set)];
  }

  template <class Op>
  PYMETA_FN Real* at(const Op& op, int i) const {
    const Spot spot = op.spot(i);
    if constexpr (kSpecial)
      if (spot >> kSpotBits == static_cast<Spot>(Lies::near)) return own_memory(given_).near + spot;
    Real* found = frame().memories[spot >> kSpotBits] + (spot & kWithin);
    if constexpr (kSpecial) assume_far(found);
    return found;
  }
  template <class Op>
  PYMETA_FN Real* maybe(const Op& op, int i) const {
    return op.spot(i) == kNoSpot ? nullptr : at(op, i);
  }
  template <class Op>
  PYMETA_FN static std::size_t size(const Op& op) {
    return op.spot(kSpots - 1);
  }
  template <class Op>
  PYMETA_FN TwoTerms terms(const Op& op) const {
    TwoTerms t{op.count, maybe(op, 0), maybe(op, 1), nullptr, nullptr};
    if (op.count > 1) t.x_too = at(op, 2), t.w_too = at(op, 3);
    return t;
  }
  template <class Op>
  PYMETA_FN const Layer& layer(const Op& op) const {
    return call().network->layers[op.number];
  }
  template <class Op>
  PYMETA_FN const Loss& loss(const Op& op) const {
    return frame().losses[static_cast<int>(op.set)];
  }
  template <class Op>
  PYMETA_FN Destination destination(const Op& op, int first) const {
    return {at(op, first), op.relu, maybe(op, first + 1)};
  }
  // A chunk's first task finds no sums.
  template <class Op>
  PYMETA_FN Real* base(const Op& op, int i) const {
    const bool summed = op.spot(i) >> kSpotBits == static_cast<Spot>(Lies::sums);
    return first_ && summed ? nullptr : maybe(op, i);
  }
  template <class Op>
  PYMETA_FN Real scale(const Op& op) const {
    return op.rate ? -rates_[op.rate - 1] : Real(1);
  }
  template <class Op>
  PYMETA_FN Sink sink(const Op& op, int first) const {
    Sink to{at(op, first), base(op, first + 1), maybe(op, first + 2), scale(op)};
    if (unscaled_ && op.rate) to = beside_scaled(to);
    return to;
  }
  // In a step backwards whose direction was multiplied by the rate nothing is left to multiply by, and v lies elsewhere.
  PYMETA_FN Sink beside_scaled(const Sink& to) const {
    const Real* v = memory().at(given_.workspace.v);
    const Real* own = unscaled_ + ((to.extra ? to.extra : to.base) - v);
    return {to.out, to.extra ? to.base : own, to.extra ? own : nullptr, Real(1)};
  }
  template <class Op>
  PYMETA_FN LossRows loss_rows(const Op& op, int rows) const {
    return {op.out, op.in, rows, at(op, 0), maybe(op, 1), at(op, 2), nullptr, at(op, 3), nullptr};
  }

  // How many rows there are is heard of behind the next barrier.
  PYMETA_FN void bind(SetOf which, const TaskRows& chosen, bool all = false) const {
    const int count = bind_rows(call(), memory(), task_, which, given_.workspace, chosen, all);
    if (thread_index() == 0) frame().rows[static_cast<int>(which)] = count;
  }

  // All on the stack of each thread: the smallest come last.
  const ListFrame& given_;
  const std::int64_t task_;
  const Real* rates_;  // of the step
  // v as it was before the step's direction took its place (scale_direction); null where v is the direction.
  const Real* unscaled_ = nullptr;
  Correction correction_{};
  const bool first_;
};

PYMETA_KERNEL_END
