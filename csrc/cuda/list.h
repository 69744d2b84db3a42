// A block goes through a list of operations (operations.h), task by task.
#pragma once

#include "recorder.h"

PYMETA_KERNEL_BEGIN

class ListedTask {
 public:
  // `first` of its chunk: what is summed over tasks is put where the sums are, and not added.
  PYMETA_FN ListedTask(const Frame& frame, bool first, std::int64_t task)
      : call_(frame.call), memories_(frame.memories), first_(first), task_(task) {}

  PYMETA_FN void run(const Operation& op) const {
    const int out = op.out;
    const Extent extent{op.rows, nullptr, Real(op.rows)};
    switch (op.act) {
      case Act::apply:
      case Act::apply_transposed:
      case Act::outer:
        return product(op);
      case Act::narrow_apply:
      case Act::narrow_apply_transposed:
      case Act::narrow_outer:
        return narrow_product(op, extent);
      case Act::sum_rows:
        return sum_delta<Block>(extent, out, at(op, 0), sink(op, 1));
      case Act::narrow_sum_rows:
        return Block::narrow_sum_rows(out, extent, at(op, 0), sink(op, 1));
      case Act::to_class_major:
        return Block::to_class_major(extent, out, at(op, 0), at(op, 1));
      case Act::from_class_major:
        return Block::from_class_major(extent, out, at(op, 0), at(op, 1));
      case Act::pass_on:
        return pass_on<Block>(extent, out, at(op, 0), destination(op, 1));
      case Act::clear:
        return clear<Block>(extent, out, at(op, 0));
      case Act::activate:
        return activate<Block>(layer(op), extent, at(op, 0), at(op, 1));
      case Act::through_slope:
        return through_slope<Block>(layer(op), extent, maybe(op, 0), at(op, 1), at(op, 2),
                                    at(op, 3));
      case Act::through_slope_tangent:
        return through_slope_tangent<Block>(layer(op), extent, maybe(op, 0), at(op, 1),
                                            maybe(op, 2), maybe(op, 3), at(op, 4), at(op, 5));
      case Act::loss_gradient:
        return loss_gradient<Block>(loss(op), loss_rows(op), at(op, 4), maybe(op, 5));
      case Act::loss_hessian_product:
        return loss_hessian_product<Block>(loss(op), loss_rows(op), at(op, 4), at(op, 5));
      case Act::write_loss:
        return write_loss(Block::sum_rows_in_order(extent, at(op, 0)));
      case Act::write_predictions:
        return write_predictions(extent, out, at(op, 0));
      case Act::copy:
        return Block::copy(at(op, 1), at(op, 0), 4 * static_cast<std::size_t>(op.spots[2]));
    }
  }

 private:
  PYMETA_FN Real* at(const Operation& op, int i) const {
    const Spot spot = op.spots[i];
    return memories_[spot >> kSpotBits] + (spot & ((Spot{1} << kSpotBits) - 1));
  }
  PYMETA_FN Real* maybe(const Operation& op, int i) const {
    return op.spots[i] == kNoSpot ? nullptr : at(op, i);
  }
  PYMETA_FN const Layer& layer(const Operation& op) const {
    return call_.network->layers[op.layer];
  }
  PYMETA_FN const Loss& loss(const Operation& op) const {
    return call_.loss_of(op.is_query ? call_.query : call_.support);
  }
  PYMETA_FN Destination destination(const Operation& op, int first) const {
    return {at(op, first), op.relu, maybe(op, first + 1)};
  }
  // A chunk's first task finds no sums.
  PYMETA_FN Real* base(const Operation& op, int i) const {
    const bool summed = op.spots[i] >> kSpotBits == static_cast<Spot>(Lies::sums);
    return first_ && summed ? nullptr : maybe(op, i);
  }
  PYMETA_FN Sink sink(const Operation& op, int first) const {
    return {at(op, first), base(op, first + 1), maybe(op, first + 2),
            op.rate ? -call_.lr.values[op.rate - 1] : Real(1)};
  }
  PYMETA_FN LossRows loss_rows(const Operation& op) const {
    return {op.out,    op.in,   op.rows,   at(op, 0), maybe(op, 1),
            at(op, 2), nullptr, at(op, 3), nullptr};
  }

  // One description for all three forms: each has its place on the stack.
  PYMETA_FN void product(const Operation& op) const {
    const bool forth = op.act == Act::apply, sums = op.act == Act::outer;
    const int in = op.in, out = op.out, in_row = static_cast<int>(Block::stride(in)),
              out_row = static_cast<int>(Block::stride(out));
    const int left_row = forth || sums ? in_row : out_row;
    const int depth = sums ? op.rows : forth ? in : out;
    Product p;
    p.rows = sums ? in : op.rows;
    p.columns = forth || sums ? out : in;
    p.count = op.count;
    p.pieces[0] = {at(op, 0), left_row, at(op, 1), out_row, depth};
    if (op.count > 1) p.pieces[1] = {at(op, 2), left_row, at(op, 3), out_row, depth};
    p.bias = sums ? nullptr : maybe(op, 4);
    p.epilogue = sums ? Block::sunk(sink(op, 4), out_row)
                      : Block::destined(destination(op, 5), forth ? out_row : in_row);
    if (forth)
      multiply<Form::nn>(p, op.height);
    else if (sums)
      multiply<Form::tn>(p, op.height);
    else
      multiply<Form::nt>(p, op.height);
  }
  PYMETA_FN void narrow_product(const Operation& op, const Extent& extent) const {
    const bool back = op.act == Act::narrow_apply_transposed, two = op.count > 1;
    const long row = back ? 0 : Block::stride(op.in);
    const Real *const left = at(op, 0), *const right = at(op, 1),
                      *const left_too = two ? at(op, 2) : nullptr,
                      *const right_too = two ? at(op, 3) : nullptr;
    if (op.act == Act::narrow_outer) {
      const Matrix pairs[2][2] = {{{left, row}, {right, 0}}, {{left_too, row}, {right_too, 0}}};
      return Block::narrow_outer(op.in, op.out, extent, pairs, op.count, sink(op, 4));
    }
    const Term terms[2] = {{{left, row}, right}, {{left_too, row}, right_too}};
    if (back)
      Block::narrow_apply_transposed(op.in, op.out, extent, terms, op.count, destination(op, 5));
    else
      Block::narrow_apply(op.in, op.out, extent, terms, op.count, maybe(op, 4), at(op, 5));
  }
  PYMETA_FN void write_loss(Real loss) const {
    if (call_.losses && thread_index() == 0) call_.losses[task_] = loss;
  }
  PYMETA_FN void write_predictions(const Extent& extent, int out, const Real* y) const {
    Real* to = call_.predictions + call_.query.start(task_) * out;
    const int rows = extent.rows;
    Block::map(extent, out, [=](long, long o, int r) {
      to[static_cast<std::int64_t>(r) * out + o] = y[o * rows + r];
    });
  }

  const Call<Real>& call_;
  Real* const* const memories_;
  const bool first_;
  const std::int64_t task_;
};

// What the set is then is known from the list; it is on the stack for the time of this function.
PYMETA_FN PYMETA_NOINLINE inline void bind_rows(const Call<Real>& call, const Memory& memory,
                                                std::int64_t task, const RowSet<Real>& set,
                                                const SetLayout& places) {
  TaskBinder(call, task, memory).bind(set, places);
}

template <bool kExtras>
struct TaskFrame : Frame {
  OperationList list;

  using Frame::Frame;
  void make_list(const Call<Real>& described, std::size_t near) {
    record<Recorder>(described, near, sharing, list);
  }
};

template <bool kExtras>
PYMETA_FN void run_tasks(const TaskFrame<kExtras>& given) {
  Frame& own = own_frame(given);
  const Call<Real>& call = own.call;
  const Workspace<Block>& workspace = given.workspace;
  const Memory memory = own_memory(given);
  for (std::int64_t chunk = block_index(); chunk < given.chunks; chunk += block_count()) {
    if (thread_index() == 0)
      own.lies_in(memory, given.shared.theta,
                  given.sums + chunk * static_cast<std::int64_t>(given.sums_size));
    sync();
    const std::int64_t first = chunk * given.tasks_per_chunk;
    for (std::int64_t task = first; task < first + given.tasks_per_chunk && task < call.tasks;
         ++task) {
      bind_rows(call, memory, task, call.support, workspace.support_set);
      bind_rows(call, memory, task, call.query, workspace.query_set);
      const ListedTask listed(own, task == first, task);
      for (int i = 0; i < given.list.count; ++i) listed.run(given.list.operations[i]);
    }
  }
}

using GivenFrame = TaskFrame<Block::Family::kExtras>;

PYMETA_KERNEL_END
