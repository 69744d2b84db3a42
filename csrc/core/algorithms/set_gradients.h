// What flows to the targets, to the weights and to the offset of a set.
//
// The loss of a set is sum_r w_r l_r / W with W = sum_r w_r c_r, where c_r is the weight of row r's class, 1 where there are none.
// With q_r = l_r for the query set, and q_r the derivative of l_r along the outputs' tangent where an inner step's direction meets
// the support set,
//   d / dw_r = (q_r - c_r (sum w q) / W) / W,
// so q is what is summed over the evaluations and steps (ItemSet::weight_gradient); the rest is done where it is written to the
// caller's arrays. A row's own l_r comes of the loss with another scale, so that a weight may be 0. Where single targets have
// weights, all of that is of targets in place of rows. The targets' part is the loss's own (losses/loss.h: target_gradient,
// target_tangent); an offset, which is added to the outputs, has their delta, or its tangent.
#pragma once

#include "state.h"

PYMETA_KERNEL_BEGIN

template <class X>
class SetGradients {
 public:
  using Tape = typename State<X>::Tape;

  PYMETA_FN SetGradients(const State<X>& state, const ItemSet& set) : state_(state), set_(set) {}

  PYMETA_FN PYMETA_NOINLINE void clear() const {
    const int blocks = X::blocks(set_.extent.rows);
    if (Real* to = set_.target_gradient)
      for_vectors(blocks * columns(), [=](long i) { store(to + i, zero()); });
    if (Real* to = set_.offset_gradient)
      for_vectors(blocks * state_.network.out_features(), [=](long i) { store(to + i, zero()); });
    if (Real* to = set_.weight_gradient) {
      Real* unit = set_.unit_scale;
      const int mean_of =
          set_.elements ? 1 : mean_columns(*set_.loss, state_.network.out_features());
      const Real share = Real(1) / Real(mean_of);
      for_vectors(blocks, [=](long i) { store(unit + i, broadcast(share)); });
      for_vectors(blocks * weight_columns(), [=](long i) { store(to + i, zero()); });
    }
  }

  // Of the query set, before its deltas are used for anything else: they are what flows into the outputs.
  PYMETA_FN void add_query_offset(const Tape& tape) const {
    if (Real* to = set_.offset_gradient)
      add(to, tape.at(tape.layout->dy), broadcast(1),
          state_.network.out_features() * X::blocks(set_.extent.rows));
  }

  // Of the query set, whose losses have the cotangents `losses`. Its deltas are no longer needed.
  PYMETA_FN PYMETA_NOINLINE void add_query(const Tape& tape, Vec losses) const {
    if (!set_.targets) return;
    const LossRows rows = tape.loss_rows(set_);
    if (Real* to = set_.target_gradient) {
      Real* dy = tape.at(tape.layout->dy);
      loss_target_gradient<X>(*set_.loss, rows, dy);
      add(to, dy, losses, rows.columns * rows.blocks);
    }
    if (Real* to = set_.weight_gradient) {
      LossRows own = rows;
      own.scale = set_.unit_scale;
      if (set_.elements) own.values = tape.at(tape.layout->dy);
      Real* of_rows = tape.at(tape.layout->row_losses);  // what was there has been summed
      loss_gradient<X>(*set_.loss, own, of_rows, nullptr);
      add(to, own.values ? own.values : of_rows, losses, weight_columns() * rows.blocks);
    }
  }

  // Of the support set, where the step's direction has the tangents `ry` of the outputs and `rdy` of their delta, which is
  // overwritten.
  PYMETA_FN PYMETA_NOINLINE void add_support(const Tape& tape, const Real* ry, Real* rdy,
                                             Real scale) const {
    LossRows rows = tape.loss_rows(set_);
    if (Real* to = set_.offset_gradient) add(to, rdy, broadcast(scale), rows.out * rows.blocks);
    if (Real* to = set_.target_gradient) {
      loss_target_tangent<X>(*set_.loss, rows, ry, rdy);
      add(to, rdy, broadcast(scale), rows.columns * rows.blocks);
    }
    if (Real* to = set_.weight_gradient) {
      // Each row's or target's gradient by itself; the outputs of target j are j, j + columns, ...
      const int columns = weight_columns(), out = rows.out;
      rows.scale = set_.unit_scale;
      rows.elements = nullptr;
      loss_gradient<X>(*set_.loss, rows, tape.at(tape.layout->row_losses), rdy);
      X::for_indices(rows.blocks, [=](int b) {
        for (int j = 0; j < columns; ++j) {
          Vec sum = zero();
          for (int o = j; o < out; o += columns)
            sum = fma(load(rdy + rows.at(o, b)), load(ry + rows.at(o, b)), sum);
          Real* own = to + rows.at(j, b);
          store(own, fma(broadcast(scale), sum, load(own)));
        }
      });
    }
  }

 private:
  PYMETA_FN int weight_columns() const { return set_.elements ? columns() : 1; }
  PYMETA_FN int columns() const {
    return target_columns(*set_.loss, state_.network.out_features());
  }
  template <class Body>  // body(offset) of each of so many vectors
  PYMETA_FN static void for_vectors(int count, Body body) {
    X::for_indices(count, [=](int i) { body(static_cast<long>(i) * kWidth); });
  }
  PYMETA_FN static void add(Real* to, const Real* from, Vec factor, int count) {
    for_vectors(count, [=](long i) { store(to + i, fma(factor, load(from + i), load(to + i))); });
  }

  const State<X>& state_;
  const ItemSet& set_;
};

PYMETA_KERNEL_END
