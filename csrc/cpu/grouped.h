// How arrays lie where a vector holds neighbouring features of a group of tasks: between rows.h (one task) and lanes.h (a
// vector full of tasks).
//
// Element (r, c) of task t is at r * stride(features) + c * kElement + t. With groups of 4 and vectors of 16 a layer of 40
// features is ten vectors without padding (`rows` has 48), and a group's arrays are a quarter of those of `lanes`. An element of A
// is that of the group's tasks, as often as there are features in a vector. There are no masks: all tasks of a group are of
// one size.
#pragma once

#include <string.h>

#include "executor.h"

PYMETA_KERNEL_BEGIN

constexpr int kGroup = kWidth >= 8 ? 4 : kWidth >= 4 ? 2 : 1;

struct Grouped {
  static constexpr int kElement = kGroup;
  static constexpr int kTasks = kGroup;
  static constexpr int kFeatures = kWidth / kGroup;  // of a vector
  static constexpr int kMaxColumns = kRegisters >= 32 ? 5 : 3;

  static int vectors(int features) { return (features + kFeatures - 1) / kFeatures; }
  static int blocks(int rows) { return vectors(rows); }
  static long column_stride(const Segment&) { return kWidth; }

  // The numbers of a group, for every feature.
  static Vec load_a(const Real* p) {
#if defined(__AVX512F__)
    if constexpr (kDouble)
      return (Vec)_mm512_maskz_broadcast_f64x4(0xff,
                                               _mm256_loadu_pd(reinterpret_cast<const double*>(p)));
    else
      return (Vec)_mm512_maskz_broadcast_f32x4(0xffff,
                                               _mm_loadu_ps(reinterpret_cast<const float*>(p)));
#elif defined(__AVX2__)
    if constexpr (kDouble)
      return (Vec)_mm256_broadcast_pd(reinterpret_cast<const __m128d*>(p));
    else
      return (Vec)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
    Vec v;
    for (int i = 0; i < kWidth; ++i) v[i] = p[i % kGroup];
    return v;
#endif
  }
  static void store_element(Real* p, Vec v) { memcpy(p, &v, sizeof(Real) * kGroup); }
  static void copy_element(Real* to, const Real* from) { memcpy(to, from, sizeof(Real) * kGroup); }
  static Vec masked_columns(Vec v, int features, int vector) {
    const int valid = (features - vector * kFeatures) * kGroup;
    if (valid >= kWidth) return v;
    IntVec lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return (Vec)((IntVec)v & (lane < broadcast_int(valid)));
  }

  static Segment transposed_segment(int in, int out, const Term& term) {
    return {term.x.p, term.x.row, kElement, term.w_transposed, vectors(in) * kWidth, kWidth, out};
  }

  // Each task's sum over the features of a vector.
  template <int kHalf = kWidth / 2>
  static Vec sum_features(Vec v) {
    if constexpr (kHalf < kGroup)
      return v;
    else
      return sum_features<kHalf / 2>(v +
                                     rotate<kHalf>(v, std::make_integer_sequence<int, kWidth>{}));
  }
  static Vec whole(Vec partial_sums) { return sum_features(partial_sums); }

  // Of kFeatures vectors: feature i becomes the sum over the features of block[i], tasks by themselves.
  template <int kHalf = kWidth / 2, int kCount = kFeatures>
  static Vec sums_over_features(Vec (&block)[kCount]) {
    if constexpr (kHalf < kGroup) {
      return block[0];
    } else {
      Vec half[kCount / 2];
#pragma GCC unroll 8
      for (int i = 0; i < kCount / 2; ++i) {
        Vec low = block[i], high = block[i + kCount / 2];
        exchange<kHalf>(low, high, std::make_integer_sequence<int, kWidth>{});
        half[i] = low + high;
      }
      return sums_over_features<kHalf / 2>(half);
    }
  }

  // Numbers that all tasks share, to a vector's features: its `part`-th of kGroup.
  template <int kPart, int... I>
  static Vec spread_part(Vec v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (kPart * kFeatures + I / kGroup)...);
  }
  // `count` of them, up to kWidth, to as many elements.
  template <int kPart = 0>
  static void spread(Vec v, int count, Real* to) {
    if (kPart * kFeatures >= count) return;
    store(to + kPart * kWidth, spread_part<kPart>(v, std::make_integer_sequence<int, kWidth>{}));
    if constexpr (kPart + 1 < kGroup) spread<kPart + 1>(v, count, to);
  }

  // Sums over the tasks of kWidth elements, in kGroup vectors.
  template <int... I>
  static Vec in_order(Vec v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, ((I % kFeatures) * kGroup + I / kFeatures)...);
  }
  // Of one: neighbours first, as there.
  static Real sum_of_tasks(const Real* from) {
    Real sums[kGroup];
    memcpy(sums, from, sizeof sums);
    for (int step = 1; step < kGroup; step *= 2)
      for (int i = 0; i < kGroup; i += 2 * step) sums[i] = sums[i] + sums[i + step];
    return sums[0];
  }
  static Vec sums_over_tasks(const Real* from) {
    Vec block[kGroup];
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) block[i] = load(from + i * kWidth);
#pragma GCC unroll 2
    for (int i = 0; i + 1 < kGroup; i += 2) {
      exchange<1>(block[i], block[i + 1], std::make_integer_sequence<int, kWidth>{});
      block[i] = block[i] + block[i + 1];
    }
    if constexpr (kGroup == 4) {
      exchange<2>(block[0], block[2], std::make_integer_sequence<int, kWidth>{});
      block[0] = block[0] + block[2];
    }
    return in_order(block[0], std::make_integer_sequence<int, kWidth>{});
  }

  // kFeatures rows of a vector each, to their transpose.
  template <int kHalf = kWidth / 2, int kStep = kFeatures / 2>
  static void transpose_features(Vec (&block)[kFeatures]) {
    if constexpr (kHalf >= kGroup) {
#pragma GCC unroll 8
      for (int i = 0; i < kFeatures; ++i)
        if (!(i & kStep))
          exchange<kHalf>(block[i], block[i + kStep], std::make_integer_sequence<int, kWidth>{});
      transpose_features<kHalf / 2, kStep / 2>(block);
    }
  }
};

PYMETA_KERNEL_END
