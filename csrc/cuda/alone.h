// What a thread does of an operation of a list, without waiting for the others (list.h).
//
// A chain that goes over parts is one thread's here, where the other kernels have a thread for each part and a barrier between them
// and their sum: the same numbers in the same order.
#pragma once

#include "call.h"
#include "fragments.h"

PYMETA_KERNEL_BEGIN

constexpr int kLookers = 16;  // threads that gather what all have seen

// The operands of one product or of two that are added.
struct TwoTerms {
  int count;
  const Real *x, *w, *x_too, *w_too;
};

// Arrays of an inner optimiser's step; those of its state lie `apart` numbers apart.
struct StepOperands {
  const Real *theta, *gradient;
  Real *next, *state;
  const Real* state_before;  // null: zeros
  std::size_t apart, size;
};

struct Alone : BlockOf<false> {
  PYMETA_FN static Real sum_in_order(int rows, const Real* values) {
    Real sum = 0;
    for (int r = 0; r < rows; ++r) sum += values[r];
    return sum;
  }

  // Of four neighbouring columns.
  PYMETA_FN static void sum_quad(int features, int rows, int first, const Real* from,
                                 const Sink& sink) {
    const int row = static_cast<int>(stride(features));
    for (int c = 4 * first; c < features; c += 4 * thread_count()) {
      Quad sum{};
      for (int r = 0; r < rows; ++r) {
        const Quad own = load_quad(from + r * row + c);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum.v[j] = sum.v[j] + own.v[j];
      }
      const Epilogue epilogue = sunk(sink, 0);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (c + j < features) epilogue.emit(sum.v[j], 0, c + j);
    }
  }

  // Of an output's deltas, in the parts of sums().
  PYMETA_FN static void narrow_sum(int out, int rows, int first, const Real* dy, const Sink& sink) {
    for (int o = first; o < out; o += thread_count()) {
      Real part[kParts] = {};
      const Real* own = dy + o * rows;
      int r = 0;
      for (; r + kParts <= rows; r += kParts)
#pragma unroll
        for (int p = 0; p < kParts; ++p) part[p] += own[r + p];
#pragma unroll
      for (int p = 0; p < kParts - 1; ++p)
        if (r + p < rows) part[p] += own[r + p];
      sunk(sink, 0).emit(sum_of(part), 0, o);
    }
  }

  // A thread has rows of its own, as in the losses.
  PYMETA_FN PYMETA_NOINLINE static void narrow_apply(int in, int out, int rows,
                                                     const TwoTerms& terms, const Real* bias,
                                                     Real* y) {
    const int row = static_cast<int>(stride(in));
    for (int r = thread_index(); r < rows; r += thread_count())
      for (int o = 0; o < out; ++o) {
        Real part[kParts] = {};
        if (terms.count > 0) add_dot(in, terms.x + r * row, terms.w + o * row, part);
        if (terms.count > 1) add_dot(in, terms.x_too + r * row, terms.w_too + o * row, part);
        y[o * rows + r] = sum_of(part) + (bias ? bias[o] : Real(0));
      }
  }

  // Four neighbours at a time: tensors are whole quads, and what their padding holds reaches nothing.
  template <class Rule>
  PYMETA_FN static void take_step(const Rule& rule, const StepOperands& a, Real minus_rate,
                                  const Correction& correction) {
    for_vectors(a.size / 4, [&](std::size_t quad) {
      constexpr int states = Rule::kStates;
      const std::size_t at = 4 * quad;
      const Quad theta = load_quad(a.theta + at), gradient = load_quad(a.gradient + at);
      Quad state[kMaxStates], next;
#pragma unroll
      for (int s = 0; s < states; ++s)
        state[s] = a.state_before ? load_quad(a.state_before + s * a.apart + at) : Quad{};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        Real own[kMaxStates];
#pragma unroll
        for (int s = 0; s < states; ++s) own[s] = state[s].v[c];
        const Real d = rule.direction(theta.v[c], gradient.v[c], own, correction);
        next.v[c] = fma(minus_rate, d, theta.v[c]);
#pragma unroll
        for (int s = 0; s < states; ++s) state[s].v[c] = own[s];
      }
      store_quad(a.next + at, next);
#pragma unroll
      for (int s = 0; s < states; ++s) store_quad(a.state + s * a.apart + at, state[s]);
    });
  }

  // Is any adapted weight not finite? What each thread has seen of it,
  template <class Layout>
  PYMETA_FN static void look_at_weights(const Call<Real>& call, const Layout& layout,
                                        const Real* theta) {
    Real bad = 0;
    for (int t = 0; t < call.network->tensor_count; ++t) {
      if (!call.adapted[t]) continue;
      const PackedTensor& p = layout.tensors[t];
      map({p.outer, nullptr, Real(0)}, p.inner, [&](long, long c, int r) {
        const Real own = theta[p.place + static_cast<std::size_t>(r) * p.row + c];
        bad += own - own == 0 ? Real(0) : Real(1);
      });
    }
    scratch()[thread_index()] = bad;
  }
  // and some of them together.
  PYMETA_FN static void gather_looks() {
    for (int i = thread_index(); i < kLookers; i += thread_count()) {
      Real bad = 0;
      for (int t = i; t < thread_count(); t += kLookers) bad += scratch()[t];
      scratch()[kBlockThreads + i] = bad;
    }
  }

 private:
  PYMETA_FN static Real sum_of(const Real (&p)[kParts]) {
    return ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
  }
  PYMETA_FN static void add_dot(int in, const Real* x, const Real* w, Real (&part)[kParts]) {
#pragma unroll 1
    for (int first = 0; first < in; first += 4 * kParts) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const int k = first + 4 * p;
        if (k + 4 <= in) {
          const Quad a = load_quad(x + k), b = load_quad(w + k);
#pragma unroll
          for (int j = 0; j < 4; ++j) part[p] = fma(a.v[j], b.v[j], part[p]);
        } else {
          for (int j = k; j < in; ++j) part[p] = fma(x[j], w[j], part[p]);
        }
      }
    }
  }
};
static_assert(kBlockThreads + kLookers <= Block::kScratch, "what all threads have seen");

PYMETA_KERNEL_END
