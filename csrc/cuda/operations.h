// A call as lists of operations, which every task goes through in the same order (recorder.h, list.h).
//
// They are made on the host and travel in the kernel's parameters, where all threads read the same entry at once. An operation is
// one of the executor's (block.h) with its operands; where they lie is a memory and an index in it. What tasks may have more
// or fewer of is not in a list: rows, inner steps.
#pragma once

#include "call.h"

PYMETA_KERNEL_BEGIN

// What `spots` are, in this order; a null pointer where an operand is missing.
enum class Act : std::uint8_t {
  apply,             // x, w, x, w, bias, to, gate
  apply_transposed,  // x, w, x, w, -, to, gate
  outer,             // x, d, x, d, out, base, extra
  narrow_apply,      // as apply
  narrow_apply_transposed,
  narrow_outer,
  sum_rows,  // d, out, base, extra
  narrow_sum_rows,
  to_class_major,  // from, to
  from_class_major,
  pass_on,                // from, to, gate
  clear,                  // to
  activate,               // z, a
  through_slope,          // z, a, v, out
  through_slope_tangent,  // z, a, c, rz, rc, rd
  loss_gradient,          // outputs, targets, scale, kept, row losses, gradient
  loss_hessian_product,   // outputs, targets, scale, kept, r, product
  write_loss,             // row losses
  add_loss,               // row losses, of a step
  write_mean_loss,        // of all steps
  write_predictions,      // outputs
  copy,                   // from, to
  take_step,              // theta, gradient, theta after the step, state, state before
  scale_direction,        // v, where it is kept as it was
  add_difference,         // start, theta, out
  look_at_weights,        // theta: is any not finite? In three parts,
  gather_looks,
  write_status,
  write_adapted,  // theta

  // Of calls with options (list_options.h):
  begin_step,  // Adam's corrections are those of step `number`
  // From here on all threads do an operation together, and wait for each other in it and at its end.
  seed,             // delta, what flows in beside the loss; relu: is there a loss?
  add_offset,       // outputs, offset
  fill,             // to: 0, or 1 / in
  add_factored,     // to, from
  add_products,     // to, deltas, outputs' tangents: their products, row by row
  add_to_inputs,    // dx, its tangent; relu: nothing is there yet
  target_gradient,  // outputs, targets, scale, kept, gradient
  target_tangent,   // outputs, targets, scale, kept, r, product
  follow_rule,      // rates, theta, gradient, start, state before, state, theta after the step
  fold_rate,        // rates, theta, gradient, start, state before, v, rate's gradient
  fold_product,     // gradient, v, rate's gradient
  reverse_rule,     // rates, theta, gradient, start, state, v, u
  add_square,       // theta, gradient, start; sums that begin anew have `relu`
  clip,             // what a gradient of that norm is scaled by
  add_along,        // theta, gradient, start, u
  clip_slope,       // what that makes of the scale's derivative
  reverse_clip,     // theta, gradient, start, u
  reverse_pull,     // v, u, pull; relu: in the first step
  add_pull,         // theta, start, u
  end_pull,         // what all tensors' come to
  add_difference_square,  // theta, start; or an array alone
  task_clip,              // what a task's share of the sums is scaled by
  clear_array,            // to
  add_task,               // v, to
  add_cotangent,          // v
  add_step_loss,          // row losses after step `number`
  write_weighted_loss,
  write_own_gradient,  // v
  write_anchor_gradient,
  write_inputs,   // dx
  write_columns,  // of targets, or of offsets where `relu`
  write_weights,
};
// Do all threads do it together?
PYMETA_FN constexpr bool is_together(Act act) { return act >= Act::seed; }

// In which memory an operand lies, and how many numbers from its beginning.
using Spot = std::uint32_t;
enum class Lies : std::uint32_t { near, far, packed, sums };
constexpr Spot kNoSpot = ~Spot{0};
constexpr int kSpotBits = 30;
constexpr Spot kWithin = (Spot{1} << kSpotBits) - 1;
constexpr int kSpots = 7;

enum class SetOf : std::uint8_t { support, query };  // rows are those of one of a task's sets

struct Operation {
  Act act;
  std::uint8_t count;   // of terms
  std::uint8_t number;  // of the layer whose activation it is, or of a tensor
  std::uint8_t height;  // of a product's tiles
  SetOf set;            // whose rows they are
  bool relu : 1;        // or what an act says
  bool waits : 1;       // for what other threads did before
  bool from_last : 1;   // the last threads do it
  bool has_before : 1;  // is there an optimiser's state of the step before?
  std::uint16_t in, out;
  std::uint16_t
      rate;  // 0: what is summed is taken as it is; else times -(this one of a step's rates)
  std::uint16_t share;  // threads that have something to do, at most
  Spot spots[kSpots];   // where there is a size, it is the last

  // Of arrays of an operation that has all seven.
  PYMETA_FN void put_quads(std::size_t size) {
    in = static_cast<std::uint16_t>(size / 4);
    out = static_cast<std::uint16_t>(size / 4 >> 16);
  }
  PYMETA_FN std::size_t quads() const { return static_cast<std::size_t>(out) << 16 | in; }
  PYMETA_FN Spot spot(int i) const { return spots[i]; }
};
static_assert(sizeof(Operation) == 44, "as many as possible fit into a kernel's parameters");

// Which operations are done when.
enum class Part : std::uint8_t {
  // All of a meta-gradient. Where rows of the query set may be left out and predictions are wanted, which these rows have too, that is
  // all up to the query set's loss; then
  whole,
  all_count,  // the predictions of a task that leaves out none,
  left_out,   // or those of all rows of one that does,
  again,      // and once more the pass of those that count;
  rest,       // and the way back.

  first_step,  // Or an inner step from the start,
  next_step,   // one after it,
  after_none,  // and what is made of the weights where there was no step,
  after_some,  // or any.
};
constexpr int kParts = 9;
// By where parts end: is a meta-gradient more than one?
PYMETA_FN constexpr bool is_split(const int (&ends)[kParts]) {
  return ends[static_cast<int>(Part::all_count)] > ends[static_cast<int>(Part::whole)];
}

struct OperationList {
  int count = 0;
  int ends[kParts] = {};  // of each part; the next one begins there
  Operation operations[kMostOperations];
};
static_assert(!Block::Family::kLists || sizeof(Frame) + sizeof(OperationList) <= 32764,
              "a kernel's parameters");

PYMETA_KERNEL_END
