// The steps of a learned optimiser's cell, and the way back through them (core/call/cell.h has the equations).
//
// Coordinates know nothing of each other, so that they go panel by panel: some lie side by side in the rows of a matrix, a
// row for each number that the cell has of a coordinate, and a panel's products and gates stay in the cache. Going back, a panel takes all its steps again, now onto a tape that lasts as long as the panel.
//
// The weights' gradients are sums over coordinates: those of a chunk's panels are added lane by lane, the lanes at the
// end of the chunk, and the chunks in order. None of it depends on threads.
#pragma once

#include "cell_table.h"
#include "gemm.h"

PYMETA_KERNEL_BEGIN

constexpr int kPanel = kCellPanel<Real>;
constexpr int kPanelVectors = kPanel / kWidth;
constexpr std::int64_t kChunk = 1024;         // coordinates, whole panels
constexpr int kSeenColumns = kHidden - kOne;  // of W, in front of h
constexpr int kGateColumns = kSeen - kTheta;  // of V

struct CellRows {
  int hidden;

  long before() const { return static_cast<long>(kHidden + 2 * hidden) * kPanel; }
  long gates() const { return static_cast<long>(4 * hidden) * kPanel; }  // enter, stay, new, leave
  long kept() const { return before() + gates() + hidden * kPanel; }     // and tanh(s) after
  long cell() const { return static_cast<long>(kHidden + hidden) * kPanel; }  // where s begins
};

// `count` numbers, and zeros behind them.
inline void fill_row(Real* row, const Real* from, std::int64_t count) {
  for (std::int64_t i = 0; i < kPanel; ++i) row[i] = i < count ? from[i] : Real(0);
}

// (log |v| / p, sign v) where |v| >= exp(-p), (-1, exp(p) v) below.
inline void log_and_sign(const Real* row, double p, Real* first, Real* second) {
  const Real least = static_cast<Real>(__builtin_exp(-p));
  const Real scale = static_cast<Real>(__builtin_exp(p)), inverse = static_cast<Real>(1 / p);
  for (int i = 0; i < kPanel; i += kWidth) {
    const Vec v = load(row + i), size = absolute(v), one = broadcast(1);
    const IntVec large = size >= least;
    const Vec logarithm = log(select(large, size, one)) * inverse;
    store(first + i, select(large, logarithm, broadcast(-1)));
    store(second + i, select(large, with_sign_of(one, v), v * scale));
  }
}

// Writes what a step sees of the coordinates from `first` on.
inline void see(const Cell<Real>& cell, const Real* gradients, const Real* losses,
                std::int64_t first, Real* before) {
  const std::int64_t count = cell.coordinates - first < kPanel ? cell.coordinates - first : kPanel;
  Real* slope = before + kSlope * kPanel;
  Real* own_loss = before + kOne * kPanel;
  Real* seen = before + kSeen * kPanel;
  fill_row(slope, gradients + first, count);
  std::int64_t task = first / cell.of_task, left = (task + 1) * cell.of_task - first;
  for (std::int64_t i = 0; i < kPanel; ++i, --left) {
    if (left == 0) ++task, left = cell.of_task;
    own_loss[i] = i < count ? losses[task] : Real(0);
  }
  log_and_sign(slope, cell.p, seen, seen + kPanel);
  log_and_sign(own_loss, cell.p, seen + 2 * kPanel, seen + 3 * kPanel);
  for (int i = 0; i < kPanel; i += kWidth) store(own_loss + i, broadcast(1));
}

inline Epilogue as_it_is(Real* out, long row) {
  Epilogue e{Epilogue::Kind::floor, out, row};
  e.floor = broadcast(-static_cast<Real>(__builtin_inf()));
  return e;
}

// One step of a panel that has seen its numbers. `after` may be `before`; `tanhs`, [H] rows, may be null.
inline void step_panel(const Cell<Real>& cell, const Real* before, Real* after, Real* gates,
                       Real* tanhs) {
  const int hidden = cell.hidden, columns = kSeenColumns + hidden;
  const long s_at = CellRows{hidden}.cell(), block = static_cast<long>(hidden) * kPanel;
  const Segment all{cell.weights, columns, 1, before + kOne * kPanel, kPanel, kWidth, columns};
  multiply<Broadcast>(Product{4 * hidden, kPanelVectors, &all, 1}, as_it_is(gates, kPanel));
  Real* h = after + kHidden * kPanel;
  for (long i = 0; i < block; i += kWidth) {
    const Vec enter = sigmoid(load(gates + i)), stay = sigmoid(load(gates + block + i));
    const Vec fresh = tanh(load(gates + 2 * block + i));
    const Vec leave = sigmoid(load(gates + 3 * block + i));
    const Vec s = fma(stay, load(before + s_at + i), enter * fresh), t = tanh(s);
    store(after + s_at + i, s);
    store(h + i, leave * t);
    if (tanhs) {
      store(gates + i, enter);
      store(gates + block + i, stay);
      store(gates + 2 * block + i, fresh);
      store(gates + 3 * block + i, leave);
      store(tanhs + i, t);
    }
  }
  const int gate_columns = kGateColumns + hidden;
  const Segment both[] = {
      {cell.gates, gate_columns, 1, before + kTheta * kPanel, kPanel, kWidth, kGateColumns},
      {cell.gates + kGateColumns, gate_columns, 1, h, kPanel, kWidth, hidden}};
  Real logits[2 * kPanel];
  multiply<Broadcast>(Product{2, kPanelVectors, both, 2}, as_it_is(logits, kPanel));
  for (int i = 0; i < kPanel; i += kWidth) {
    const Vec forget = sigmoid(load(logits + i)), input = sigmoid(load(logits + kPanel + i));
    const Vec theta = load(before + kTheta * kPanel + i),
              slope = load(before + kSlope * kPanel + i);
    store(after + kForget * kPanel + i, forget);
    store(after + kInput * kPanel + i, input);
    store(after + kTheta * kPanel + i, fma(-input, slope, forget * theta));
  }
}

inline std::size_t cell_step_bytes(const CellStep<Real>& call, int threads) {
  const std::size_t numbers = static_cast<std::size_t>(CellRows{call.hidden}.gates());
  return numbers * sizeof(Real) * static_cast<std::size_t>(threads);
}

struct StepContext {
  const CellStep<Real>& call;
  char* memory;
};

inline void step_one_panel(void* context, std::int64_t index, int worker) {
  const auto& [call, memory] = *static_cast<StepContext*>(context);
  if (call.is_stopped()) return;
  const std::int64_t first = index * kPanel;
  const std::int64_t count = call.coordinates - first < kPanel ? call.coordinates - first : kPanel;
  Real* state = call.state + index * CellRows{call.hidden}.before();
  Real* gates = reinterpret_cast<Real*>(memory) + worker * CellRows{call.hidden}.gates();
  fill_row(state + kTheta * kPanel, call.theta + first, count);
  see(call, call.gradients, call.losses, first, state);
  step_panel(call, state, state, gates, nullptr);
  for (std::int64_t i = 0; i < count; ++i) call.out[first + i] = state[kTheta * kPanel + i];
}

void cell_step(const CellStep<Real>& call, const Team& team, char* memory) {
  StepContext context{call, memory};
  team.run(team, call.panels(), step_one_panel, &context);
}

// ---- the way back -----------------------------------------------------------------------------------------------------

// Where a thread's arrays lie, in Reals from the beginning of its memory.
struct BackPlaces {
  long tape, last, flow_theta, flow_forget, flow_input, flow_logits, flow_h, flow_s, sums, size;
  long weights, gates;  // how many there are

  BackPlaces(int hidden, int steps) {
    const CellRows rows{hidden};
    const long block = static_cast<long>(hidden) * kPanel;
    weights = 4L * hidden * (kSeenColumns + hidden);
    gates = 2L * (kGateColumns + hidden);
    long at = 0;
    const auto place = [&](long numbers) {
      const long here = at;
      at += numbers;
      return here;
    };
    tape = place(steps * rows.kept());
    last = place(rows.before());
    flow_theta = place(kPanel);
    flow_forget = place(kPanel);
    flow_input = place(kPanel);
    flow_logits = place(2 * kPanel);
    flow_h = place(block);
    flow_s = place(block);
    sums = place((weights + gates) * kWidth);
    size = at;
  }
};

inline std::int64_t chunks_of(std::int64_t coordinates) {
  return (coordinates + kChunk - 1) / kChunk;
}

inline std::size_t cell_back_bytes(const CellBack<Real>& call, int threads) {
  const BackPlaces at(call.hidden, call.steps);
  const std::int64_t sums = chunks_of(call.coordinates) * (at.weights + at.gates);
  return static_cast<std::size_t>(at.size * threads + sums) * sizeof(Real);
}

// sums[m][n] += the products of two matrices' rows, lane by lane; a sum has kWidth of them.
inline void add_products(const Real* a, int rows, const Real* b, int columns, Real* sums,
                         int sum_columns) {
  const long row = static_cast<long>(sum_columns) * kWidth;
  const Segment segment{a, kPanel, kWidth, b, kWidth, kPanel, kPanelVectors};
  Product product{rows, columns, &segment, 1};
  product.init = sums;
  product.init_row = row;
  multiply<Lane>(product, as_it_is(sums, row));
}

// From what flows into a step's results to what flows into what was before it.
inline void step_back(const CellBack<Real>& call, const BackPlaces& at, Real* memory, int step) {
  const int hidden = call.hidden, gate_columns = kGateColumns + hidden;
  const CellRows rows{hidden};
  const long block = static_cast<long>(hidden) * kPanel;
  const Real* before = memory + at.tape + step * rows.kept();
  Real* gates = memory + at.tape + step * rows.kept() + rows.before();
  const Real* tanhs = gates + rows.gates();
  const Real* after = step + 1 == call.steps ? memory + at.last : before + rows.kept();
  Real* to_theta = memory + at.flow_theta;
  Real* to_forget = memory + at.flow_forget;
  Real* to_input = memory + at.flow_input;
  Real* to_logits = memory + at.flow_logits;
  Real* to_h = memory + at.flow_h;
  Real* to_s = memory + at.flow_s;
  const Real *of_forget = call.gates, *of_input = call.gates + gate_columns;

  for (int i = 0; i < kPanel; i += kWidth) {
    const Vec flow = load(to_theta + i), theta = load(before + kTheta * kPanel + i);
    const Vec slope = load(before + kSlope * kPanel + i);
    const Vec forget = load(after + kForget * kPanel + i),
              input = load(after + kInput * kPanel + i);
    const Vec f = fma(flow, theta, load(to_forget + i)) * (forget * (Real(1) - forget));
    const Vec g = fma(-flow, slope, load(to_input + i)) * (input * (Real(1) - input));
    const auto through = [&](int column) {
      return fma(f, broadcast(of_forget[column]), g * of_input[column]);
    };
    store(to_logits + i, f);
    store(to_logits + kPanel + i, g);
    store(to_theta + i, fma(flow, forget, through(0)));
    store(to_forget + i, through(1));
    store(to_input + i, through(2));
  }
  Real* gate_sums = memory + at.sums + at.weights * kWidth;
  add_products(to_logits, 2, before + kTheta * kPanel, kGateColumns, gate_sums, gate_columns);
  add_products(to_logits, 2, after + kHidden * kPanel, hidden, gate_sums + kGateColumns * kWidth,
               gate_columns);

  for (int m = 0; m < hidden; ++m) {
    const Vec by_forget = broadcast(of_forget[kGateColumns + m]);
    const Vec by_input = broadcast(of_input[kGateColumns + m]);
    for (long n = 0; n < kPanel; n += kWidth) {
      const long i = m * static_cast<long>(kPanel) + n;
      const Vec enter = load(gates + i), stay = load(gates + block + i);
      const Vec fresh = load(gates + 2 * block + i), leave = load(gates + 3 * block + i);
      const Vec t = load(tanhs + i);
      const Vec h = fma(by_forget, load(to_logits + n),
                        fma(by_input, load(to_logits + kPanel + n), load(to_h + i)));
      const Vec s = fma(h * leave, fma(-t, t, broadcast(1)), load(to_s + i));
      store(gates + i, s * fresh * (enter * (Real(1) - enter)));
      store(gates + block + i, s * load(before + rows.cell() + i) * (stay * (Real(1) - stay)));
      store(gates + 2 * block + i, s * enter * fma(-fresh, fresh, broadcast(1)));
      store(gates + 3 * block + i, h * t * (leave * (Real(1) - leave)));
      store(to_s + i, s * stay);
    }
  }
  const int columns = kSeenColumns + hidden;
  add_products(gates, 4 * hidden, before + kOne * kPanel, columns, memory + at.sums, columns);
  const Segment back{call.weights + kSeenColumns, 1, columns, gates, kPanel, kWidth, 4 * hidden};
  multiply<Broadcast>(Product{hidden, kPanelVectors, &back, 1}, as_it_is(to_h, kPanel));
}

inline void panel_back(const CellBack<Real>& call, const BackPlaces& at, Real* memory,
                       std::int64_t first) {
  const CellRows rows{call.hidden};
  const std::int64_t count = call.coordinates - first < kPanel ? call.coordinates - first : kPanel;
  const std::int64_t tasks = call.coordinates / call.of_task;
  Real* before = memory + at.tape;
  for (long i = 0; i < rows.before(); ++i) before[i] = 0;
  fill_row(before + kTheta * kPanel, call.theta + first, count);
  for (int k = 0; k < call.steps; ++k) {
    Real* after = k + 1 == call.steps ? memory + at.last : before + rows.kept();
    Real* gates = before + rows.before();
    see(call, call.gradients + k * call.coordinates, call.losses + k * tasks, first, before);
    step_panel(call, before, after, gates, gates + rows.gates());
    before = after;
  }
  fill_row(memory + at.flow_theta, call.flows + first, count);
  for (long i = at.flow_forget; i < at.sums; ++i) memory[i] = 0;
  for (int k = call.steps - 1; k >= 0; --k) step_back(call, at, memory, k);
  for (std::int64_t i = 0; i < count; ++i) call.to_theta[first + i] = memory[at.flow_theta + i];
}

struct BackContext {
  const CellBack<Real>& call;
  const BackPlaces& at;
  Real* memory;      // of each thread
  Real* chunk_sums;  // [chunks, weights + gates]
};

inline void chunk_back(void* context, std::int64_t index, int worker) {
  const auto& [call, at, memory, chunk_sums] = *static_cast<BackContext*>(context);
  Real* own = memory + worker * at.size;
  const long numbers = at.weights + at.gates;
  for (long i = 0; i < numbers * kWidth; ++i) own[at.sums + i] = 0;
  const std::int64_t end = (index + 1) * kChunk;
  for (std::int64_t first = index * kChunk; first < end && first < call.coordinates;
       first += kPanel) {
    if (call.is_stopped()) return;
    panel_back(call, at, own, first);
  }
  for (long i = 0; i < numbers; ++i)
    chunk_sums[index * numbers + i] = sum_lanes(load(own + at.sums + i * kWidth));
}

void cell_back(const CellBack<Real>& call, const Team& team, char* memory) {
  const BackPlaces at(call.hidden, call.steps);
  const std::int64_t chunks = chunks_of(call.coordinates);
  Real* own = reinterpret_cast<Real*>(memory);
  BackContext context{call, at, own, own + team.threads * at.size};
  team.run(team, chunks, chunk_back, &context);
  const long numbers = at.weights + at.gates;
  for (long i = 0; i < numbers; ++i) {
    Real sum = 0;
    for (std::int64_t c = 0; c < chunks; ++c) sum += context.chunk_sums[c * numbers + i];
    (i < at.weights ? call.to_weights[i] : call.to_gates[i - at.weights]) = sum;
  }
}

PYMETA_KERNEL_END
