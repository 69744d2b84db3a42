// The `rows` executor: one task at a time, a vector holds neighbouring features.
//
// Best for one task (latency) and for layers at least a few vectors wide. An element of A is one number, broadcast
// from the caller's own array where it is the first layer's input. The backward product d W^T needs W^T with the
// inputs along the vector: a transposed copy is made once a step by in-register block transposition.
#pragma once

#include "executor.h"

PYMETA_KERNEL_BEGIN

struct Rows : Broadcast {
  static constexpr int kElement = 1;
  static constexpr int kTasks = 1;
  static int vectors(int features) { return (features + kWidth - 1) / kWidth; }
  static int blocks(int rows) { return (rows + kWidth - 1) / kWidth; }

  static Segment transposed_segment(const Layer& layer, const Term& term) {
    const long row = static_cast<long>(vectors(layer.in)) * kWidth;
    return {term.x.p, term.x.row, 1, term.w_transposed, row, kWidth, layer.out};
  }
  static void store_element(Real* p, Vec v) { *p = v[0]; }
  static void copy_element(Real* to, const Real* from) { *to = *from; }

  static Vec masked_columns(Vec v, int features, int vector) {
    const int valid = features - vector * kWidth;
    if (valid >= kWidth) return v;
    IntVec lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return (Vec)((IntVec)v & (lane < broadcast_int(valid)));
  }

  // Sixteen interleaved partial sums: element k belongs to sum k mod 16. Padding adds zeros.
  struct Partials {
    static constexpr int kGroups = kPartials / kWidth;
    Vec sum[kGroups] = {};

    void dot(const Real* a, const Real* b, int n) {
      const int full = vectors(n);
      for (int i = 0; i < full; ++i) {
        Vec& s = sum[i % kGroups];
        s = fma(load(a + i * kWidth), load(b + i * kWidth), s);
      }
    }
    template <class Body>
    void add(int n, Body body) {
      for (int i = 0; i < vectors(n); ++i) sum[i % kGroups] = sum[i % kGroups] + body(i);
    }
    Vec total() {
      for (int half = kGroups / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sum[i] = sum[i] + sum[i + half];
      return broadcast(sum_lanes(sum[0]));
    }
  };
};

struct RowsExecutor : Executor<Rows> {
  static constexpr bool kTransposes = true;
  static constexpr bool kReadsInputInPlace = true;
  // Planner: vector operations per cycle, cache-resident and not; vector operations per output vector beside its sum.
  static constexpr double kRate = 1.3, kCrowdedRate = 1.0, kRowOverhead = 6;

  // W [in, stride(out)] to W^T [out, stride(in)].
  static void transpose(const Layer& layer, const Real* w, Real* w_transposed) {
    const long from = stride(layer.out), to = stride(layer.in);
    for (int i = 0; i < layer.in; i += kWidth)
      for (int o = 0; o < layer.out; o += kWidth) {
        Vec block[kWidth];
        if (i + kWidth <= layer.in) {
#pragma GCC unroll 16
          for (int k = 0; k < kWidth; ++k) block[k] = load(w + (i + k) * from + o);
        } else {
#pragma GCC unroll 16
          for (int k = 0; k < kWidth; ++k) block[k] = i + k < layer.in ? load(w + (i + k) * from + o) : zero();
        }
        transpose_block(block);
        if (o + kWidth <= layer.out) {
#pragma GCC unroll 16
          for (int k = 0; k < kWidth; ++k) store(w_transposed + (o + k) * to + i, block[k]);
        } else {
#pragma GCC unroll 16
          for (int k = 0; k < kWidth; ++k)
            if (o + k < layer.out) store(w_transposed + (o + k) * to + i, block[k]);
        }
      }
  }
};

PYMETA_KERNEL_END
