// Makes lists of operations of calls of chains: core/algorithms run on the host by an executor that notes down what it is asked for.
//
// Its arrays lie nowhere: each of its memories is a range of addresses of which nothing is read, and a pointer tells where in which
// of them an operand will lie. A learning rate is a number that tells which one it is. No algorithm that is recorded
// looks at what was computed, so that the list is the same for all tasks. Nor at a rate, which only the device knows: whether
// a step's may wait until the end of its products, a block sees (Act::scale_direction).
#pragma once

#include <utility>
#include <vector>

#include "hazards.h"

PYMETA_KERNEL_BEGIN

class Recording {
 public:
  // The call's rates are read nowhere else than here.
  Recording(const Call<Real>& call, const PackedTensor* tensors, const Sharing& sharing,
            const Hazards& hazards, OperationList& list)
      : call_(call), tensors_(tensors), sharing_(sharing), hazards_(hazards), list_(list) {
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
  // What tells a set's rows from another's: an extent's `keep`, which blocks have no other use for.
  static const Real* mark_of(SetOf set) {
    return reinterpret_cast<const Real*>((static_cast<std::uintptr_t>(set) + kFirstMark) << kRange);
  }
  static Real rate_number(int i) { return Real(i + 1); }  // of lr.values[i]

  // From here on rates are those of step k.
  void begin_step(int k) {
    first_rate_ = (k < call_.lr.rows ? k : call_.lr.rows - 1) * call_.lr.columns;
  }
  // The query set's pass has been made for all of its rows; it comes again, of those that count.
  void pass_again() {
    end(Part::left_out);
    passes_again_ = true;
  }
  // What was noted down since the part before.
  void end(Part part) {
    const int end = list_.count < kMostOperations ? list_.count : kMostOperations;
    for (int i = static_cast<int>(part); i < kParts; ++i) list_.ends[i] = end;
    Hazards(hazards_).mark(list_.operations, begun_, end);
    begun_ = end;
  }

  void end_whole() { end(begun_ == 0 ? Part::whole : Part::rest); }

  // By threads that have so many shares of it between them.
  template <class... Pointers>
  Operation& add(Act act, int in, int out, std::size_t share, const Pointers*... at) {
    static_assert(sizeof...(at) <= kSpots, "");
    Operation& op = list_.count < kMostOperations ? list_.operations[list_.count] : excess_;
    ++list_.count;
    op = {};
    op.act = act;
    op.in = static_cast<std::uint16_t>(in);
    op.out = static_cast<std::uint16_t>(out);
    put_share(op, share);
    for (Spot& s : op.spots) s = kNoSpot;
    int i = 0;
    ((op.spots[i++] = spot(at)), ...);
    return op;
  }
  static void put(Operation& op, const Real* keep) {
    op.set = static_cast<SetOf>((reinterpret_cast<std::uintptr_t>(keep) >> kRange) - kFirstMark);
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
  void put(Operation& op, int first, const Sink& sink) const {
    op.spots[first] = spot(sink.out);
    op.spots[first + 1] = spot(sink.base);
    op.spots[first + 2] = spot(sink.extra);
    if (sink.scale < 0) put_rate(op, -sink.scale);
  }
  static void put(Operation& op, int first, const Destination& to) {
    op.spots[first] = spot(to.p);
    op.spots[first + 1] = spot(to.gate);
    op.relu = to.relu;
  }
  void put_rate(Operation& op, Real number) const {
    op.rate = static_cast<std::uint16_t>(static_cast<int>(number) - first_rate_);
  }
  // How tall the tiles of its [rows, columns] are, and how many there are.
  void put_tiles(Operation& op, int rows, int columns) const {
    if (Block::Family::kFragments && has_fragments(op.in, op.out)) {
      const int height = fragment_height(rows, columns, sharing_);
      op.height = static_cast<std::uint8_t>(height);
      put_share(op, static_cast<std::size_t>(kWarp) * fragment_tiles(rows, columns, height));
      return;
    }
    const int height = tile_height(rows, columns, sharing_, op.act == Act::outer);
    op.height = static_cast<std::uint8_t>(height);
    put_share(op, static_cast<std::size_t>(tiles_of(rows, columns, height)));
  }
  static void put_share(Operation& op, std::size_t share) {
    op.share = static_cast<std::uint16_t>(share < kMostNumber ? share : kMostNumber);
  }
  void put(Operation& op, const Layer& layer) const {
    op.number = static_cast<std::uint8_t>(&layer - call_.network->layers);
  }
  void put(Operation& op, const PackedTensor& packed) const {
    op.number = static_cast<std::uint8_t>(&packed - tensors_);
  }
  // A part of a sum over tensors.
  static void put_sum(Operation& op, int tensor, bool& first) {
    op.number = static_cast<std::uint8_t>(tensor);
    op.relu = first;
    first = false;
  }
  static void put_size(Operation& op, std::size_t size) {
    op.spots[kSpots - 1] = static_cast<Spot>(size);
  }
  // The last two operations, where they are steps of tensors side by side.
  void join_steps() {
    if (list_.count - begun_ < 2 || list_.count > kMostOperations) return;
    Operation& first = list_.operations[list_.count - 2];
    const Operation& second = list_.operations[list_.count - 1];
    const std::size_t size = first.spots[kSpots - 1], apart = Places::lines(size);
    bool joins = first.act == Act::take_step && first.rate == second.rate;
    for (int i = 0; i < kSpots - 1; ++i)
      joins = joins && (first.spots[i] == kNoSpot ? second.spots[i] == kNoSpot
                                                  : first.spots[i] + apart == second.spots[i]);
    if (!joins) return;
    const std::size_t both = apart + second.spots[kSpots - 1];
    put_size(first, both);
    put_share(first, both / 4);
    --list_.count;
  }
  static Spot spot(const Real* p) {
    if (!p) return kNoSpot;
    const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(p);
    const std::uintptr_t index = (at & ((std::uintptr_t{1} << kRange) - 1)) / sizeof(Real);
    return static_cast<Spot>(((at >> kRange) - 1) << kSpotBits | index);
  }

  // By all threads together.
  template <class... Pointers>
  Operation& together(Act act, const Pointers*... at) {
    return add(act, 0, 0, kMostNumber, at...);
  }
  // By what an operation multiplies: one, a step's rate, or what flows into the query set's loss (RecordedArrays::seed).
  void put_factor(Operation& op, Real factor) const {
    if (factor < 0) put_rate(op, -factor);
    if (factor > 1) op.number = static_cast<std::uint8_t>(static_cast<int>(factor) - 1);
  }
  const Call<Real>& call() const { return call_; }

  // The query set's loss: the call's, or that after one of the steps.
  void add_query_loss(const Extent& extent, const Real* values) {
    if (std::exchange(passes_again_, false)) return end(Part::again);  // it is written
    if (!notes_losses) return;
    const bool of_step = call_.step_weights != nullptr;
    Operation& op = add(of_step ? Act::add_step_loss : Act::write_loss, 0, 0,
                        of_step ? kMostNumber : 1, values);
    put(op, extent.keep);
    if (of_step) op.number = static_cast<std::uint8_t>(step_of_loss());
    ++losses_;
  }

  bool notes_losses = true;  // of the query set

 private:
  // On the way back the last step's comes first.
  int step_of_loss() const { return call_.wants_gradient() ? call_.steps - 1 - losses_ : losses_; }

  static constexpr int kRange = 40;  // bits of a memory's addresses
  static constexpr std::uintptr_t kFirstMark = 8;

  static inline thread_local Recording* now_ = nullptr;
  Recording* before_;
  const Call<Real>& call_;
  const PackedTensor* tensors_;
  const Sharing& sharing_;
  const Hazards& hazards_;
  OperationList& list_;
  int begun_ = 0, first_rate_ = 0, losses_ = 0;
  bool passes_again_ = false;
  Operation excess_;
};

// The executor. What it does not name is the block's, and none of what is recorded asks for it.
struct Recorder : Block {
  using Family = block_families::chains;  // any option may be asked about

  static void copy(Real* to, const Real* from, std::size_t size) {
    if (size == 0) return;
    Recording::put_size(Recording::now().add(Act::copy, 0, 0, size / 4, from, to), size);
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
    sum(Act::narrow_sum_rows, out, extent, static_cast<std::size_t>(out), dy, sink);
  }
  static void sum(Act act, int out, const Extent& extent, std::size_t share, const Real* from,
                  const Sink& sink) {
    if (!sink.out) return;
    Operation& op = add(act, out, extent, share, from);
    Recording::now().put(op, 1, sink);
    op.from_last = true;  // beside the product before it
  }
  static void to_class_major(const Extent& extent, int out, const Real* matrix, Real* y) {
    add(Act::to_class_major, out, extent, elements(extent, out), matrix, y);
  }
  static void from_class_major(const Extent& extent, int out, const Real* y, Real* matrix) {
    add(Act::from_class_major, out, extent, elements(extent, out), y, matrix);
  }
  // Of losses, which are all that is summed in what is recorded: a query set's (core/algorithms/adapt.h: evaluate), or a step's.
  static Vec sum_rows_in_order(const Extent& extent, const Real* values) {
    if (extent.keep == Recording::mark_of(SetOf::query))
      Recording::now().add_query_loss(extent, values);
    else
      add(Act::add_loss, 0, extent, 1, values);
    return 0;
  }

  template <class... Pointers>
  static Operation& add(Act act, int out, const Extent& extent, std::size_t share,
                        const Pointers*... at) {
    Operation& op = Recording::now().add(act, 0, out, share, at...);
    Recording::put(op, extent.keep);
    return op;
  }
  static std::size_t elements(const Extent& extent, int features) {
    return static_cast<std::size_t>(extent.rows) * features;
  }

 private:
  static void product(Act act, int in, int out, const Extent& extent, const Term* terms, int count,
                      const Real* bias, const Destination& to) {
    const Real* const none = nullptr;
    const bool quads = act == Act::narrow_apply_transposed;
    Operation& op = add(act, out, extent, extent.rows * (quads ? (in + 3) / 4 : 1), none, none,
                        none, none, bias);
    op.in = static_cast<std::uint16_t>(in);
    Recording::put(op, terms, count);
    Recording::put(op, 5, to);
    if (act == Act::apply || act == Act::apply_transposed)
      Recording::now().put_tiles(op, extent.rows, act == Act::apply ? out : in);
  }
  static void gradient(Act act, int in, int out, const Extent& extent, const Matrix (*pairs)[2],
                       int count, const Sink& sink) {
    if (!sink.out) return;
    Operation& op = add(act, out, extent, static_cast<std::size_t>(in) * out);
    op.in = static_cast<std::uint16_t>(in);
    Recording::put(op, pairs, count);
    Recording::now().put(op, 4, sink);
    if (act == Act::outer) Recording::now().put_tiles(op, in, out);
  }
};

// What core/ does by a function of its own.

template <>
inline void sum_delta<Recorder>(const Extent& extent, int features, const Real* d,
                                const Sink& bias) {
  Recorder::sum(Act::sum_rows, features, extent, static_cast<std::size_t>(features + 3) / 4, d,
                bias);
}
template <>
inline void pass_on<Recorder>(const Extent& extent, int features, const Real* from,
                              const Destination& to) {
  Recording::put(
      Recorder::add(Act::pass_on, features, extent, Recorder::elements(extent, features), from), 1,
      to);
}
template <>
inline void clear<Recorder>(const Extent& extent, int features, Real* to) {
  Recorder::add(Act::clear, features, extent, Recorder::elements(extent, features), to);
}

template <class... Pointers>
void record_activation(Act act, const Layer& layer, const Extent& extent, const Pointers*... at) {
  const int features = layer.out.channels;
  Recording::now().put(
      Recorder::add(act, features, extent, Recorder::elements(extent, features), at...), layer);
}
template <>
inline void activate<Recorder>(const Layer& layer, const Extent& extent, const Real* z, Real* a) {
  record_activation(Act::activate, layer, extent, z, a);
}
template <>
inline void through_slope<Recorder>(const Layer& layer, const Extent& extent, const Real* z,
                                    const Real* a, const Real* v, Real* out) {
  record_activation(Act::through_slope, layer, extent, z, a, v, out);
}
template <>
inline void through_slope_tangent<Recorder>(const Layer& layer, const Extent& extent, const Real* z,
                                            const Real* a, const Real* c, const Real* rz,
                                            const Real* rc, Real* rd) {
  record_activation(Act::through_slope_tangent, layer, extent, z, a, c, rz, rc, rd);
}

template <class... Pointers>
Operation& record_loss(Act act, const LossRows& s, const Pointers*... at) {
  Operation& op = Recording::now().add(act, s.columns, s.out, static_cast<std::size_t>(s.blocks),
                                       s.outputs, s.targets, s.scale, s.kept, at...);
  Recording::put(op, s.keep);
  return op;
}
template <>
inline void loss_gradient<Recorder>(const Loss&, const LossRows& s, Real* row_losses,
                                    Real* gradient) {
  record_loss(Act::loss_gradient, s, row_losses, gradient);
}
template <>
inline void loss_hessian_product<Recorder>(const Loss&, const LossRows& s, const Real* of,
                                           Real* product) {
  record_loss(Act::loss_hessian_product, s, of, product);
}

// The direction stays where v is, and the step's rate is noted down where it is multiplied by last: a block that has multiplied by
// it here leaves it out there.
template <>
inline Real* MetaGradient<Recorder>::scaled_direction(int k, Real& scale) const {
  Recording& r = Recording::now();
  Operation& op = r.together(Act::scale_direction, v(), loop_.spare(k));
  r.put_factor(op, scale);
  Recording::put_size(op, state_.layout.size);
  return v();
}

PYMETA_KERNEL_END
