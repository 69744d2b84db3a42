// Which operations of a list wait for the others' threads: those that read what another one wrote since the last barrier, or write
// what it read or wrote. All others go on at once, so that threads that have nothing to do in one are at work in the next.
#pragma once

#include <vector>

#include "operations.h"

PYMETA_KERNEL_BEGIN

class Hazards {
 public:
  // `rows`: of each set, at most. `parameters`: numbers from one array of an optimiser's state to the next.
  Hazards(int support_rows, int query_rows, std::size_t parameters)
      : rows_{support_rows, query_rows}, parameters_(parameters) {}

  // The first of a part may follow on anything.
  void mark(Operation* operations, int begin, int end) {
    for (int i = begin; i < end; ++i) {
      if (is_together(operations[i].act)) {
        operations[i].waits = true;
        before_.clear();  // it ends with a barrier
        continue;
      }
      note(operations[i]);
      operations[i].waits = i == begin || conflicts();
      if (operations[i].waits) before_.clear();
      before_.insert(before_.end(), own_.begin(), own_.end());
    }
  }

 private:
  static constexpr Spot kScratch = kNoSpot - 1;  // stands for the block's scratch

  // Numbers that an operation reads or writes. `by_row`: those of a row are the same thread's in all operations that say so.
  struct Access {
    Spot first;
    std::size_t size;
    bool writes, by_row;
  };

  bool conflicts() const {
    for (const Access& a : own_)
      for (const Access& b : before_)
        if ((a.writes || b.writes) && !(a.by_row && b.by_row) && a.first < b.first + b.size &&
            b.first < a.first + a.size)
          return true;
    return false;
  }

  void add(Spot spot, std::size_t size, bool writes, bool by_row = false) {
    if (spot != kNoSpot) own_.push_back({spot, size, writes, by_row});
  }
  void reads(Spot spot, std::size_t size, bool by_row = false) { add(spot, size, false, by_row); }
  void writes(Spot spot, std::size_t size, bool by_row = false) { add(spot, size, true, by_row); }
  // out, base, extra
  void sinks(const Spot* spots, std::size_t size) {
    writes(spots[0], size);
    reads(spots[1], size);
    reads(spots[2], size);
  }

  void note(const Operation& op) {
    own_.clear();
    const Spot* s = op.spots;
    const std::size_t rows = static_cast<std::size_t>(rows_[static_cast<int>(op.set)]);
    const std::size_t in_row = Block::stride(op.in), out_row = Block::stride(op.out);
    const std::size_t inputs = rows * in_row, outputs = rows * out_row, classes = rows * op.out;
    const std::size_t size = op.spots[kSpots - 1];
    const auto product = [&](std::size_t x, std::size_t w, std::size_t to, bool by_row = false) {
      for (int i : {0, 2}) reads(s[i], x), reads(s[i + 1], w);
      reads(s[4], out_row);
      writes(s[5], to, by_row);
      reads(s[6], to, by_row);
    };
    const auto gradient = [&](std::size_t x, std::size_t d, std::size_t to) {
      for (int i : {0, 2}) reads(s[i], x), reads(s[i + 1], d);
      sinks(s + 4, to);
    };
    switch (op.act) {
      case Act::apply:
        return product(inputs, op.in * out_row, outputs);
      case Act::apply_transposed:
        return product(outputs, op.in * out_row, inputs);
      case Act::outer:
        return gradient(inputs, outputs, op.in * out_row);
      case Act::narrow_apply:
        return product(inputs, op.out * in_row, classes, true);
      case Act::narrow_apply_transposed:
        return product(classes, op.out * in_row, inputs);
      case Act::narrow_outer:
        return gradient(inputs, classes, op.out * in_row);
      case Act::sum_rows:
        return reads(s[0], outputs), sinks(s + 1, out_row);
      case Act::narrow_sum_rows:
        return reads(s[0], classes), sinks(s + 1, out_row);
      case Act::to_class_major:
        return reads(s[0], outputs), writes(s[1], classes);
      case Act::from_class_major:
        return reads(s[0], classes), writes(s[1], outputs);
      case Act::pass_on:
        return reads(s[0], outputs), writes(s[1], outputs), reads(s[2], outputs);
      case Act::clear:
        return writes(s[0], outputs);
      case Act::activate:
        return reads(s[0], outputs), writes(s[1], outputs);
      case Act::through_slope:
        for (int i : {0, 1, 2}) reads(s[i], outputs);
        return writes(s[3], outputs);
      case Act::through_slope_tangent:
        for (int i : {0, 1, 2, 3, 4}) reads(s[i], outputs);
        return writes(s[5], outputs);
      case Act::loss_gradient:
      case Act::loss_hessian_product: {
        const bool values = op.act == Act::loss_gradient;
        reads(s[0], classes, true);
        reads(s[1], rows * op.in, true);
        reads(s[2], rows, true);
        add(s[3], classes, values, true);
        add(s[4], values ? rows : classes, values, true);
        return writes(s[5], classes, true);
      }
      case Act::write_loss:
      case Act::add_loss:
        return reads(s[0], rows);
      case Act::write_predictions:
        return reads(s[0], classes);
      case Act::copy:
        return reads(s[0], size), writes(s[1], size);
      case Act::take_step:
        reads(s[0], size), reads(s[1], size), writes(s[2], size);
        for (int i = 0; i < op.count; ++i) {
          const Spot further = static_cast<Spot>(i * parameters_);
          writes(s[3] + further, size);
          if (op.has_before) reads(s[4] + further, size);
        }
        return;
      case Act::add_difference:
        return reads(s[0], size), reads(s[1], size), writes(s[2], size);
      case Act::write_adapted:
        return reads(s[0], size);
      case Act::look_at_weights:
        return reads(s[0], size), writes(kScratch, 1);
      case Act::gather_looks:
      case Act::write_status:
        return writes(kScratch, 1);
      case Act::scale_direction:  // nothing, or it waits before and after
      case Act::write_mean_loss:
      default:
        return;
    }
  }

  const int rows_[2];
  const std::size_t parameters_;
  std::vector<Access> own_, before_;
};

PYMETA_KERNEL_END
