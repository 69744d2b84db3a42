// Makes the list of operations of a plain call: core/algorithms run on the host by an executor that notes down what it is asked for.
//
// Its arrays lie nowhere: each of its memories is a range of addresses of which nothing is read, and a pointer tells where in which
// of them an operand will lie. A learning rate is a number that tells which one it is. No algorithm of the family of plain
// calls looks at what was computed, so that the list is the same for all tasks. Nor at a rate: the numbers that stand for them
// are near one (core/optimizers/rates.h), so that every rate is multiplied by last.
#pragma once

#include <vector>

#include "operations.h"

PYMETA_KERNEL_BEGIN

class Recording {
 public:
  // The call's rates are read nowhere else than here.
  Recording(const Call<Real>& call, const Sharing& sharing, OperationList& list)
      : call_(call), sharing_(sharing), list_(list) {
    before_ = now_;
    now_ = this;
  }
  ~Recording() { now_ = before_; }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  static Recording& now() { return *now_; }
  static Real* memory(Lies which) {
    return reinterpret_cast<Real*>((static_cast<std::uintptr_t>(which) + 1) << kRange);
  }
  static Real rate_number(int i) { return Real(i + 1); }  // of lr.values[i]

  template <class... Pointers>
  Operation& add(Act act, int in, int out, int rows, const Pointers*... at) {
    static_assert(sizeof...(at) <= kSpots, "");
    Operation& op = list_.count < kMostOperations ? list_.operations[list_.count] : excess_;
    ++list_.count;
    op = {};
    op.act = act;
    op.in = static_cast<std::uint16_t>(in);
    op.out = static_cast<std::uint16_t>(out);
    op.rows = static_cast<std::uint16_t>(rows);
    for (Spot& s : op.spots) s = kNoSpot;
    int i = 0;
    ((op.spots[i++] = spot(at)), ...);
    return op;
  }
  // Its first four operands.
  static void put(Operation& op, const Term* terms, int count) {
    op.count = static_cast<std::uint8_t>(count);
    for (int i = 0; i < count; ++i) {
      op.spots[2 * i] = spot(terms[i].x.p);
      op.spots[2 * i + 1] = spot(terms[i].w);
    }
  }
  static void put(Operation& op, const Matrix (*pairs)[2], int count) {
    op.count = static_cast<std::uint8_t>(count);
    for (int i = 0; i < count; ++i)
      for (int side : {0, 1}) op.spots[2 * i + side] = spot(pairs[i][side].p);
  }
  // Those from `first` on.
  static void put(Operation& op, int first, const Sink& sink) {
    op.spots[first] = spot(sink.out);
    op.spots[first + 1] = spot(sink.base);
    op.spots[first + 2] = spot(sink.extra);
    op.rate = sink.scale < 0 ? static_cast<std::uint16_t>(-sink.scale) : std::uint16_t{0};
  }
  static void put(Operation& op, int first, const Destination& to) {
    op.spots[first] = spot(to.p);
    op.spots[first + 1] = spot(to.gate);
    op.relu = to.relu;
  }
  // How tall the tiles of its [rows, columns] are.
  void put(Operation& op, int rows, int columns) const {
    op.height = static_cast<std::uint8_t>(tile_height(rows, columns, sharing_));
  }
  void put(Operation& op, const Layer& layer) const {
    op.layer = static_cast<std::uint8_t>(&layer - call_.network->layers);
  }
  void put(Operation& op, const Loss& loss) const {
    op.is_query = &loss == &call_.loss_of(call_.query);
  }

 private:
  static constexpr int kRange = 40;  // bits of a memory's addresses

  static Spot spot(const Real* p) {
    if (!p) return kNoSpot;
    const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(p);
    const std::uintptr_t index = (at & ((std::uintptr_t{1} << kRange) - 1)) / sizeof(Real);
    return static_cast<Spot>(((at >> kRange) - 1) << kSpotBits | index);
  }

  static inline thread_local Recording* now_ = nullptr;
  Recording* before_;
  const Call<Real>& call_;
  const Sharing& sharing_;
  OperationList& list_;
  Operation excess_;
};

// The executor. What it does not name is the block's, and none of a plain call's algorithms asks for it.
struct Recorder : Block {
  static void copy(Real* to, const Real* from, std::size_t size) {
    if (size == 0) return;
    Operation& op = Recording::now().add(Act::copy, 0, 0, 0, from, to);
    op.spots[2] = static_cast<Spot>(size / 4);
  }

  static void apply(int in, int out, const Extent& extent, const Term* terms, int count,
                    const Real* bias, const Destination& to) {
    product(Act::apply, in, out, extent, terms, count, bias, to);
  }
  static void apply_transposed(int in, int out, const Extent& extent, const Term* terms, int count,
                               const Destination& to) {
    product(Act::apply_transposed, in, out, extent, terms, count, nullptr, to);
  }
  static void outer(int in, int out, const Extent& extent, const Matrix (*pairs)[2], int count,
                    const Sink& sink) {
    gradient(Act::outer, in, out, extent, pairs, count, sink);
  }
  static void narrow_apply(int in, int out, const Extent& extent, const Term* terms, int count,
                           const Real* bias, Real* y) {
    product(Act::narrow_apply, in, out, extent, terms, count, bias, {y});
  }
  static void narrow_apply_transposed(int in, int out, const Extent& extent, const Term* terms,
                                      int count, const Destination& to) {
    product(Act::narrow_apply_transposed, in, out, extent, terms, count, nullptr, to);
  }
  static void narrow_outer(int in, int out, const Extent& extent, const Matrix (*pairs)[2],
                           int count, const Sink& sink) {
    gradient(Act::narrow_outer, in, out, extent, pairs, count, sink);
  }
  static void narrow_sum_rows(int out, const Extent& extent, const Real* dy, const Sink& sink) {
    if (!sink.out) return;
    Recording::put(Recording::now().add(Act::narrow_sum_rows, 0, out, extent.rows, dy), 1, sink);
  }
  static void to_class_major(const Extent& extent, int out, const Real* matrix, Real* y) {
    Recording::now().add(Act::to_class_major, 0, out, extent.rows, matrix, y);
  }
  static void from_class_major(const Extent& extent, int out, const Real* y, Real* matrix) {
    Recording::now().add(Act::from_class_major, 0, out, extent.rows, y, matrix);
  }
  // Of a task's losses, which are all that a plain call sums (core/algorithms/adapt.h: evaluate).
  static Vec sum_rows_in_order(const Extent& extent, const Real* values) {
    Recording::now().add(Act::write_loss, 0, 0, extent.rows, values);
    return 0;
  }

 private:
  static void product(Act act, int in, int out, const Extent& extent, const Term* terms, int count,
                      const Real* bias, const Destination& to) {
    const Real* const none = nullptr;
    Operation& op = Recording::now().add(act, in, out, extent.rows, none, none, none, none, bias);
    Recording::put(op, terms, count);
    Recording::put(op, 5, to);
    Recording::now().put(op, extent.rows, act == Act::apply ? out : in);
  }
  static void gradient(Act act, int in, int out, const Extent& extent, const Matrix (*pairs)[2],
                       int count, const Sink& sink) {
    if (!sink.out) return;
    Operation& op = Recording::now().add(act, in, out, extent.rows);
    Recording::put(op, pairs, count);
    Recording::put(op, 4, sink);
    Recording::now().put(op, in, out);
  }
};

// What core/ does by a function of its own.

template <>
inline void sum_delta<Recorder>(const Extent& extent, int features, const Real* d,
                                const Sink& bias) {
  if (!bias.out) return;
  Recording::put(Recording::now().add(Act::sum_rows, 0, features, extent.rows, d), 1, bias);
}
template <>
inline void pass_on<Recorder>(const Extent& extent, int features, const Real* from,
                              const Destination& to) {
  Recording::put(Recording::now().add(Act::pass_on, 0, features, extent.rows, from), 1, to);
}
template <>
inline void clear<Recorder>(const Extent& extent, int features, Real* to) {
  Recording::now().add(Act::clear, 0, features, extent.rows, to);
}
template <>
inline void activate<Recorder>(const Layer& layer, const Extent& extent, const Real* z, Real* a) {
  Recording& r = Recording::now();
  r.put(r.add(Act::activate, 0, layer.out.channels, extent.rows, z, a), layer);
}
template <>
inline void through_slope<Recorder>(const Layer& layer, const Extent& extent, const Real* z,
                                    const Real* a, const Real* v, Real* out) {
  Recording& r = Recording::now();
  r.put(r.add(Act::through_slope, 0, layer.out.channels, extent.rows, z, a, v, out), layer);
}
template <>
inline void through_slope_tangent<Recorder>(const Layer& layer, const Extent& extent, const Real* z,
                                            const Real* a, const Real* c, const Real* rz,
                                            const Real* rc, Real* rd) {
  Recording& r = Recording::now();
  r.put(r.add(Act::through_slope_tangent, 0, layer.out.channels, extent.rows, z, a, c, rz, rc, rd),
        layer);
}
template <>
inline void loss_gradient<Recorder>(const Loss& loss, const LossRows& s, Real* row_losses,
                                    Real* gradient) {
  Recording& r = Recording::now();
  r.put(r.add(Act::loss_gradient, s.columns, s.out, s.blocks, s.outputs, s.targets, s.scale, s.kept,
              row_losses, gradient),
        loss);
}
template <>
inline void loss_hessian_product<Recorder>(const Loss& loss, const LossRows& s, const Real* of,
                                           Real* product) {
  Recording& r = Recording::now();
  r.put(r.add(Act::loss_hessian_product, s.columns, s.out, s.blocks, s.outputs, s.targets, s.scale,
              s.kept, of, product),
        loss);
}

// A task's rows are bound before its list; of its results some are written by operations.
class RecordedArrays : public TaskArrays<Recorder> {
 public:
  using TaskArrays<Recorder>::TaskArrays;

  ItemSet set(const RowSet<Real>& rows, const SetLayout& layout) const {
    const int in = call_.network->in_features(), count = rows.size(0);
    ItemSet set{{memory_.at(layout.x), Block::stride(in)},
                {count, nullptr, Real(count)},
                nullptr,
                nullptr,
                nullptr,
                Real(count)};
    set.loss = &call_.loss_of(rows);
    if (rows.y) {
      set.targets = memory_.at(layout.targets);
      set.scale = memory_.at(layout.scale);
    }
    return set;
  }
  void write_losses(Vec) const {}  // by Recorder::sum_rows_in_order
  void write_predictions(const ItemSet& query, const Real* y) const {
    Recording::now().add(Act::write_predictions, 0, call_.network->out_features(),
                         query.extent.rows, y);
  }
};

template <class X>
void record(const Call<Real>& given, std::size_t near, const Sharing& sharing,
            OperationList& list) {
  Call<Real> call = given;
  std::vector<Real> rates(static_cast<std::size_t>(call.lr.rows) * call.lr.columns);
  for (std::size_t i = 0; i < rates.size(); ++i)
    rates[i] = Recording::rate_number(static_cast<int>(i));
  call.lr.values = rates.data();
  call.stop = nullptr;
  const Workspace<X> workspace(call, near);
  const Shared shared{Recording::memory(Lies::packed), nullptr, nullptr, nullptr};
  const Memory memory{Recording::memory(Lies::near), Recording::memory(Lies::far)};
  const Totals totals{Recording::memory(Lies::sums), nullptr, false, workspace.parameters.size};
  list.count = 0;
  const Recording recording(call, sharing, list);
  InnerLoop<X> loop(call, workspace, shared, memory);
  RecordedArrays arrays(call, workspace, shared, memory, 0);
  ItemJob<X, RecordedArrays>(call, workspace, shared, memory, loop, arrays, totals).run();
}

PYMETA_KERNEL_END
