// The `lanes` executor: a vector holds the same element of kWidth tasks.
//
// Best for tiny layers and many tasks: no tails, no padding, no transposition, scalar-looking code. Everything is
// kWidth times larger, so it pays while a vector of tasks fits the second-level cache. Shorter tasks of a vector are
// masked, row by row (Extent::keep), and a lane without a task is one with no rows at all.
#pragma once

#include "executor.h"

PYMETA_KERNEL_BEGIN

struct Lanes : Lane {
  static constexpr int kTasks = kWidth;
  static constexpr int kFeatures = 1;  // of a vector
  static int vectors(int features) { return features; }
  static int blocks(int rows) { return rows; }

  static Segment transposed_segment(int, int out, const Term& term) {
    return {term.x.p, term.x.row, kWidth, term.w, kWidth, static_cast<long>(out) * kWidth, out};
  }
  static Segment transposed_tap(const Term& term, const Real* a, int, int out, int tap, int taps) {
    const long row = static_cast<long>(out) * kWidth;
    return {a, term.x.row, kWidth, term.w + tap * row, kWidth, taps * row, out};
  }
  static Vec grouped_weight(const Term& term, const Groups& groups, int taps, long, long out_row,
                            int tap, int input, int j) {
    return load(term.w + (static_cast<long>(input % groups.in) * taps + tap) * out_row +
                static_cast<long>(groups.output(input, j)) * kWidth);
  }
  template <class Place>
  static Vec gathered(int feature, int, Place place) {
    return load(place(feature));
  }
  static Vec whole(Vec sums_of_tasks) { return sums_of_tasks; }
  static void store_element(Real* p, Vec v) { store(p, v); }
  static void copy_element(Real* to, const Real* from) { store(to, load(from)); }
  static Vec masked_columns(Vec v, int, int) { return v; }
};

struct LanesExecutor : Executor<Lanes> {
  static constexpr bool kTransposes = false;
  static constexpr bool kReadsInputInPlace = false;
  static constexpr bool kSharesPlaces = false;
  static constexpr bool kFactors = false;  // a wide first layer is for the rows executor
  static constexpr double kRate = 1.15, kCrowdedRate = 1.0, kRowOverhead = 4;  // as in rows.h
  static constexpr double kItemOverhead = 625 * kWidth;  // most of it is done task by task
  static void transpose(int, int, const Real*, Real*) {}
  static void transpose_taps(const Layer&, const Real*, Real*) {}
};

PYMETA_KERNEL_END
