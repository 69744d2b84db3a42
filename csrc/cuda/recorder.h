// Makes the lists of operations of a plain call: core/algorithms run on the host by an executor that notes down what it is asked for.
//
// Its arrays lie nowhere: each of its memories is a range of addresses of which nothing is read, and a pointer tells where in which
// of them an operand will lie. A learning rate is a number that tells which one it is. No algorithm that is recorded
// looks at what was computed, so that the list is the same for all tasks. Nor at a rate: the numbers that stand for them
// are near one (core/optimizers/rates.h), so that every rate is multiplied by last.
#pragma once

#include <vector>

#include "hazards.h"

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
  // What tells a set's rows from another's: an extent's `keep`, which blocks have no other use for.
  static const Real* mark_of(SetOf set) {
    return reinterpret_cast<const Real*>((static_cast<std::uintptr_t>(set) + kFirstMark) << kRange);
  }
  static Real rate_number(int i) { return Real(i + 1); }  // of lr.values[i]

  // From here on rates are those of step k.
  void begin_step(int k) {
    first_rate_ = (k < call_.lr.rows ? k : call_.lr.rows - 1) * call_.lr.columns;
  }
  // What was noted down since the part before.
  void end(Part part, const Hazards& hazards) {
    const int end = list_.count < kMostOperations ? list_.count : kMostOperations;
    for (int i = static_cast<int>(part); i < kParts; ++i) list_.ends[i] = end;
    Hazards(hazards).mark(list_.operations, begun_, end);
    begun_ = end;
  }

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
    op.share = static_cast<std::uint16_t>(share < kMostNumber ? share : kMostNumber);
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
    const int height = tile_height(rows, columns, sharing_, op.act == Act::outer);
    op.height = static_cast<std::uint8_t>(height);
    const int tiles = tiles_of(rows, columns, height);
    op.share = static_cast<std::uint16_t>(tiles < kMostNumber ? tiles : kMostNumber);
  }
  void put(Operation& op, const Layer& layer) const {
    op.number = static_cast<std::uint8_t>(&layer - call_.network->layers);
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
    first.share = static_cast<std::uint16_t>(both / 4 < kMostNumber ? both / 4 : kMostNumber);
    --list_.count;
  }
  static Spot spot(const Real* p) {
    if (!p) return kNoSpot;
    const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(p);
    const std::uintptr_t index = (at & ((std::uintptr_t{1} << kRange) - 1)) / sizeof(Real);
    return static_cast<Spot>(((at >> kRange) - 1) << kSpotBits | index);
  }

  bool notes_losses = true;  // of the query set

 private:
  static constexpr int kRange = 40;  // bits of a memory's addresses
  static constexpr std::uintptr_t kFirstMark = 8;

  static inline thread_local Recording* now_ = nullptr;
  Recording* before_;
  const Call<Real>& call_;
  const Sharing& sharing_;
  OperationList& list_;
  int begun_ = 0, first_rate_ = 0;
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
    const bool of_query = extent.keep == Recording::mark_of(SetOf::query);
    if (!of_query || Recording::now().notes_losses)
      add(of_query ? Act::write_loss : Act::add_loss, 0, extent, 1, values);
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
void record_loss(Act act, const LossRows& s, const Pointers*... at) {
  Operation& op = Recording::now().add(act, s.columns, s.out, static_cast<std::size_t>(s.blocks),
                                       s.outputs, s.targets, s.scale, s.kept, at...);
  Recording::put(op, s.keep);
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

// Which rule it is, a block knows from the call. Tensors side by side at one rate are one operation; what their padding and the gap
// between them hold reaches nothing.
inline void record_step(int states, const StepArrays& a, std::size_t size, const Real* next) {
  const bool before = states > 0 && a.state_before[0];
  Recording& r = Recording::now();
  Operation& op = r.add(Act::take_step, 0, 0, size / 4, a.theta, a.gradient, next,
                        states > 0 ? a.state[0] : nullptr, before ? a.state_before[0] : nullptr);
  op.count = static_cast<std::uint8_t>(states);
  op.has_before = before;
  r.put_rate(op, a.rate);
  Recording::put_size(op, size);
  r.join_steps();
}
#define PYMETA_RECORD_STEP(rule)                                                             \
  template <>                                                                                \
  inline void take_step<Recorder, rule>(const rule&, const StepArrays& a, const StepCommon&, \
                                        std::size_t size, Real* next) {                      \
    record_step(rule::kStates, a, size, next);                                               \
  }
PYMETA_RECORD_STEP(GradientStep)
PYMETA_RECORD_STEP(Momentum)
PYMETA_RECORD_STEP(Adam)
PYMETA_RECORD_STEP(RmsProp<true>)
PYMETA_RECORD_STEP(RmsProp<false>)
#undef PYMETA_RECORD_STEP

// A task's rows are bound before its list; of its results some are written by operations.
class RecordedArrays : public TaskArrays<Recorder> {
 public:
  using TaskArrays<Recorder>::TaskArrays;

  ItemSet set(const RowSet<Real>& rows, const SetLayout& layout) const {
    const bool is_query = &rows == &call_.query;
    return set(rows, layout, is_query ? SetOf::query : SetOf::support,
               is_query ? call_.max_query : call_.max_support);
  }
  ItemSet set(const RowSet<Real>& rows, const SetLayout& layout, SetOf which, int count) const {
    ItemSet set{{memory_.at(layout.x), Block::stride(call_.network->in_features())},
                {count, Recording::mark_of(which), Real(count)},
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
    const int out = call_.network->out_features();
    Recorder::add(Act::write_predictions, out, query.extent, Recorder::elements(query.extent, out),
                  y);
  }
};

// Where a recorded call's arrays seem to lie.
struct RecordedCall {
  Call<Real> call;
  std::vector<Real> rates;
  Workspace<Recorder> workspace;
  Shared shared{Recording::memory(Lies::packed), nullptr, nullptr, nullptr};
  Memory memory{Recording::memory(Lies::near), Recording::memory(Lies::far)};

  RecordedCall(const Call<Real>& given, std::size_t near)
      : call(given),
        rates(static_cast<std::size_t>(given.lr.rows) * given.lr.columns),
        workspace(given, near) {
    for (std::size_t i = 0; i < rates.size(); ++i)
      rates[i] = Recording::rate_number(static_cast<int>(i));
    call.lr.values = rates.data();
    call.stop = nullptr;
  }
};

// Inner steps, and what is made of the weights behind them (core/algorithms/job.h: write).
class RecordedSteps {
 public:
  RecordedSteps(const RecordedCall& of, Recording& recording, const Hazards& hazards)
      : call_(of.call),
        workspace_(of.workspace),
        memory_(of.memory),
        recording_(recording),
        hazards_(hazards),
        loop_(of.call, of.workspace, of.shared, of.memory),
        arrays_(of.call, of.workspace, of.shared, of.memory, 0) {}

  void run() {
    const Parameters start = loop_.start(), adapted = loop_.state().adapted(1);
    if (call_.has_support()) {
      step(0, start, Part::first_step);
      step(1, adapted, Part::next_step);
    }
    write(start, Part::after_none);
    if (call_.has_support()) write(adapted, Part::after_some);
  }

 private:
  using Parameters = typename InnerLoop<Recorder>::Parameters;

  void step(int k, const Parameters& theta, Part part) {
    const bool minibatches = workspace_.order != kNowhere;
    const ItemSet set = arrays_.set(call_.support, workspace_.support_set, SetOf::support,
                                    minibatches ? call_.batches.size : call_.max_support);
    recording_.begin_step(k);
    loop_.step(k, theta, {&set, true, true, k > 0 && !minibatches, {}});
    recording_.end(part, hazards_);
  }

  void write(const Parameters& theta, Part part) {
    const auto each = [&](Act act, int t, auto... at) {
      const std::size_t size = workspace_.parameters.scalars(t);
      Operation& op = recording_.add(act, 0, 0, size, at...);
      op.number = static_cast<std::uint8_t>(t);
      Recording::put_size(op, size);
    };
    const Call<Real>& call = call_;
    const int tensors = call.network->tensor_count;
    if (call.sums_gradients())
      for (int t = 0; t < tensors; ++t)
        each(Act::add_difference, t, loop_.start().tensor(t), theta.tensor(t),
             Recording::memory(Lies::sums) + workspace_.parameters.tensors[t].place);
    if (call.losses) recording_.add(Act::write_mean_loss, 0, 0, 1);
    for (int t = 0; t < tensors; ++t)
      if (call.adapted_parameters && call.adapted[t] && call.adapted_parameters[t])
        each(Act::write_adapted, t, theta.tensor(t));
    if (call.status) write_status(theta);
    if (call.predictions) write_predictions(theta);
    recording_.end(part, hazards_);
  }
  void write_status(const Parameters& theta) {
    // All adapted tensors lie in one array, whether or not it is the start.
    int first = 0;
    while (first < call_.network->tensor_count && !call_.adapted[first]) ++first;
    const bool any = first < call_.network->tensor_count;
    const Real* of_first = theta.tensor(any ? first : 0);
    Operation& op = recording_.add(Act::look_at_weights, 0, 0, kBlockThreads,
                                   of_first - workspace_.parameters.tensors[any ? first : 0].place);
    Recording::put_size(op, workspace_.parameters.size);
    recording_.add(Act::gather_looks, 0, 0, kLookers);
    recording_.add(Act::write_status, 0, 0, 1);
  }
  void write_predictions(const Parameters& theta) {
    const ItemSet query = arrays_.set(call_.query, workspace_.query_set);
    recording_.notes_losses = false;
    loop_.evaluate(theta, query);
    recording_.notes_losses = true;
    arrays_.write_predictions(query, loop_.outputs());
  }

  const Call<Real>& call_;
  const Workspace<Recorder>& workspace_;
  const Memory& memory_;
  Recording& recording_;
  const Hazards& hazards_;
  InnerLoop<Recorder> loop_;
  RecordedArrays arrays_;
};

inline void record(const Call<Real>& given, std::size_t near, const Sharing& sharing,
                   OperationList& list) {
  const RecordedCall own(given, near);
  const Call<Real>& call = own.call;
  const Workspace<Recorder>& workspace = own.workspace;
  Recording recording(call, sharing, list);
  const Hazards hazards(workspace.order != kNowhere ? call.batches.size : call.max_support,
                        call.max_query, workspace.parameters.size);
  if (call.job != Job::meta) return RecordedSteps(own, recording, hazards).run();
  const Totals totals{Recording::memory(Lies::sums), nullptr, false, workspace.parameters.size};
  InnerLoop<Recorder> loop(call, workspace, own.shared, own.memory);
  RecordedArrays arrays(call, workspace, own.shared, own.memory, 0);
  ItemJob<Recorder, RecordedArrays>(call, workspace, own.shared, own.memory, loop, arrays, totals)
      .run();
  recording.end(Part::whole, hazards);
}

PYMETA_KERNEL_END
