// What flows to the targets and to the row weights of a set.
//
// The loss of a set is sum_r w_r l_r / W with W = sum_r w_r c_r, where c_r is the weight of row r's class, 1 where there are none.
// With q_r = l_r for the query set, and q_r the derivative of l_r along the outputs' tangent where an inner step's direction meets
// the support set,
//   d / dw_r = (q_r - c_r (sum w q) / W) / W,
// so q is what is summed over the evaluations and steps (ItemSet::weight_gradient); the rest is done where it is written to the
// caller's arrays. A row's own l_r comes of the loss with another scale, so that a weight may be 0. The targets' part is the
// loss's own (losses/loss.h: target_gradient, target_tangent).
#pragma once

#include "state.h"

PYMETA_KERNEL_BEGIN

template <class X>
class SetGradients {
 public:
  using Tape = typename State<X>::Tape;

  PYMETA_FN SetGradients(const State<X>& state, const ItemSet& set) : state_(state), set_(set) {}

  PYMETA_FN void clear() const {
    const int blocks = X::blocks(set_.extent.rows);
    if (Real* to = set_.target_gradient)
      for_vectors(blocks * columns(), [=](long i) { store(to + i, zero()); });
    if (Real* to = set_.weight_gradient) {
      Real* unit = set_.unit_scale;
      const Real share = Real(1) / Real(mean_columns(*set_.loss, state_.network.out_features()));
      for_vectors(blocks, [=](long i) {
        store(to + i, zero());
        store(unit + i, broadcast(share));
      });
    }
  }

  // Of the query set, whose losses have the cotangents `losses`. Its deltas are no longer needed.
  PYMETA_FN void add_query(const Tape& tape, Vec losses) const {
    if (!set_.targets) return;
    const LossRows rows = tape.loss_rows(set_);
    if (Real* to = set_.target_gradient) {
      Real* dy = tape.at(tape.layout->dy);
      loss_target_gradient<X>(*set_.loss, rows, dy);
      add(to, dy, losses, rows.columns * rows.blocks);
    }
    if (Real* to = set_.weight_gradient) add(to, own_losses(tape, nullptr), losses, rows.blocks);
  }

  // Of the support set, where the step's direction has the tangent `ry` of the outputs; `scratch` is as large.
  PYMETA_FN void add_support(const Tape& tape, const Real* ry, Real* scratch, Real scale) const {
    const LossRows rows = tape.loss_rows(set_);
    if (Real* to = set_.target_gradient) {
      loss_target_tangent<X>(*set_.loss, rows, ry, scratch);
      add(to, scratch, broadcast(scale), rows.columns * rows.blocks);
    }
    if (Real* to = set_.weight_gradient) {
      own_losses(tape, scratch);
      X::for_indices(rows.blocks, [=](int b) {
        Vec sum = zero();
        for (int o = 0; o < rows.out; ++o)
          sum = fma(load(scratch + rows.at(o, b)), load(ry + rows.at(o, b)), sum);
        store(to + b * kWidth, fma(broadcast(scale), sum, load(to + b * kWidth)));
      });
    }
  }

 private:
  // Each row's loss by itself, and its gradient [out, rows] where wanted.
  PYMETA_FN const Real* own_losses(const Tape& tape, Real* gradient) const {
    LossRows rows = tape.loss_rows(set_);
    rows.scale = set_.unit_scale;
    Real* losses = tape.at(tape.layout->row_losses);  // what was there has been summed
    loss_gradient<X>(*set_.loss, rows, losses, gradient);
    return losses;
  }
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
