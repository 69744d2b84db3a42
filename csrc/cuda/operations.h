// A call as a list of operations, which every task of a plain call goes through in the same order (recorder.h, list.h).
//
// The list is made on the host and travels in the kernel's parameters, where all threads read the same entry at once. An operation is
// one of the executor's (block.h) with its operands; where they lie is a memory and an index in it.
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
  write_predictions,      // outputs
  copy,                   // from, to; the third is the number of quads
};

// In which memory an operand lies, and how many numbers from its beginning.
using Spot = std::uint32_t;
enum class Lies : std::uint32_t { near, far, packed, sums };
constexpr Spot kNoSpot = ~Spot{0};
constexpr int kSpotBits = 30;
constexpr int kSpots = 7;

struct Operation {
  Act act;
  std::uint8_t count;  // of terms
  std::uint8_t layer;  // whose activation it is
  bool is_query;       // of which set's loss
  bool relu;
  std::uint8_t height;  // of a product's tiles
  std::uint16_t in, out, rows;
  std::uint16_t rate;  // 0: what is summed is taken as it is; else times -lr.values[rate - 1]
  Spot spots[kSpots];
};
static_assert(sizeof(Operation) == 44, "as many as possible fit into a kernel's parameters");

struct OperationList {
  int count = 0;
  Operation operations[kMostOperations];
};
static_assert(sizeof(Frame) + sizeof(OperationList) <= 32764, "a kernel's parameters");

PYMETA_KERNEL_END
