// The `rows` executor: one task at a time, a vector holds neighbouring features.
//
// Best for one task (latency) and for layers at least a few vectors wide. An element of A is one number, broadcast
// from the caller's own array where it is the first layer's input. The backward product d W^T needs W^T with the
// inputs along the vector: a transposed copy is made once a step by in-register block transposition.
#pragma once

#include <string.h>

#include "executor.h"

PYMETA_KERNEL_BEGIN

struct Rows : Broadcast {
  static constexpr int kTasks = 1;
  static constexpr int kFeatures = kWidth;  // of a vector
  static int vectors(int features) { return (features + kWidth - 1) / kWidth; }
  static int blocks(int rows) { return (rows + kWidth - 1) / kWidth; }

  static Segment transposed_segment(int in, int out, const Term& term) {
    const long row = static_cast<long>(vectors(in)) * kWidth;
    return {term.x.p, term.x.row, 1, term.w_transposed, row, kWidth, out};
  }
  // The same under a convolution's tap, of weights [taps, out, stride(in)].
  static Segment transposed_tap(const Term& term, const Real* a, int in, int out, int tap, int) {
    const long row = static_cast<long>(vectors(in)) * kWidth;
    return {a,   term.x.row, 1,  term.w_transposed + static_cast<long>(tap) * out * row,
            row, kWidth,     out};
  }
  // Of groups [taps, out of a group, stride(in)]: what the j-th output of each input's group weighs it by.
  static Vec grouped_weight(const Term& term, const Groups& groups, int, long in_row, long, int tap,
                            int vector, int j) {
    return load(term.w_transposed + (static_cast<long>(tap) * groups.out + j) * in_row +
                static_cast<long>(vector) * kWidth);
  }
  template <class Place>
  static Vec gathered(int vector, int features, Place place) {
    const int first = vector * kWidth;
    const int count = features - first < kWidth ? features - first : kWidth;
    Vec v = zero();
    for (int i = 0; i < count; ++i) v[i] = *place(first + i);
    return v;
  }
  static Vec whole(Vec partial_sums) { return broadcast(sum_lanes(partial_sums)); }
  static void store_element(Real* p, Vec v) { *p = v[0]; }
  static void copy_element(Real* to, const Real* from) { *to = *from; }

  static Vec masked_columns(Vec v, int features, int vector) {
    const int valid = features - vector * kWidth;
    if (valid >= kWidth) return v;
    IntVec lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return (Vec)((IntVec)v & (lane < broadcast_int(valid)));
  }
};

struct RowsExecutor : Executor<Rows> {
  static constexpr int kMaxColumns = Rows::kMaxColumns;
  static constexpr bool kTransposes = true;
  static constexpr bool kReadsInputInPlace = true;
  static constexpr bool kSharesPlaces = false;
  static constexpr bool kFactors = true;
  // Planner: vector operations per cycle, cache-resident and not; vector operations per output vector beside its sum; cycles of
  // an item beside its steps.
  static constexpr double kRate = 1.5, kCrowdedRate = 1.5, kRowOverhead = 10;
  static constexpr double kItemOverhead = 2500;

  // W [in, stride(out)] to W^T [out, stride(in)], padding cleared: the rows that W does not have are zero.
  static void transpose(int in, int out, const Real* w, Real* w_transposed) {
    const long from_row = stride(out), to_row = stride(in);
    for (int i = 0; i < in; i += kWidth)
      for (int j = 0; j < out; j += kWidth) {
        const Real* corner = w + i * from_row + j;
        Real* into = w_transposed + j * to_row + i;
        const int rows = in - i, columns = out - j;
        Vec block[kWidth];
#pragma GCC unroll 16
        for (int k = 0; k < kWidth; ++k) block[k] = k < rows ? load(corner + k * from_row) : zero();
        transpose_block(block);
#pragma GCC unroll 16
        for (int k = 0; k < kWidth; ++k)
          if (k < columns) store(into + k * to_row, block[k]);
      }
  }

  // A convolution's [in / groups, taps, stride(out)] to [taps, out / groups, stride(in)].
  static void transpose_taps(const Layer& layer, const Real* w, Real* w_transposed) {
    const int in = layer.in.channels, out = layer.out.channels, taps = layer.window.taps();
    const Groups groups = groups_of(layer);
    const long in_row = stride(in), out_row = stride(out);
    memset(w_transposed, 0, sizeof(Real) * taps * groups.out * in_row);
    for (int tap = 0; tap < taps; ++tap, w += out_row, w_transposed += groups.out * in_row) {
      if (layer.window.groups == 1) {
        transpose_matrix(in, out, w, taps * out_row, w_transposed, in_row);
        continue;
      }
      for (int j = 0; j < groups.out; ++j)
        for (int i = 0; i < in; ++i)
          w_transposed[j * in_row + i] =
              w[static_cast<long>(i % groups.in) * taps * out_row + groups.output(i, j)];
    }
  }

  // Between rows of an image's features, [channels, positions], and positions of channels (core/layers/rearrangement.h), block by
  // block in registers. What a block reads or writes beyond a row of its matrix is not used, or is written again.

  static void to_positions(const Shape& image, int rows, const Matrix& x, Real* to) {
    const int channels = image.channels, positions = image.positions();
    const long row = stride(channels), place = rows * row;
    const Real* const end = x.p + (rows - 1) * x.row + image.features();
    for (int own = 0; own < rows; ++own, to += row)
      for (int c = 0; c < channels; c += kWidth)
        for (int j = 0; j < positions; j += kWidth) {
          const Real* from = x.p + own * x.row + static_cast<long>(c) * positions + j;
          Vec block[kWidth];
#pragma GCC unroll 16
          for (int k = 0; k < kWidth; ++k, from += positions)
            block[k] = c + k < channels ? load_before(from, end) : zero();
          transpose_block(block);
#pragma GCC unroll 16
          for (int k = 0; k < kWidth; ++k)
            if (j + k < positions) store(to + (j + k) * place + c, block[k]);
        }
  }
  static void to_features(const Shape& image, int rows, const Real* z, Real* to) {
    const int channels = image.channels, positions = image.positions();
    const long row = stride(channels), place = rows * row, to_row = stride(image.features());
    Real* const end = to + rows * to_row;
    for (int own = 0; own < rows; ++own, z += row, to += to_row) {
      // The last block of positions first: it may reach into the next channel's first one.
      for (int j = (positions - 1) / kWidth * kWidth; j >= 0; j -= kWidth)
        for (int c = 0; c < channels; c += kWidth) {
          Vec block[kWidth];
#pragma GCC unroll 16
          for (int k = 0; k < kWidth; ++k)
            block[k] = j + k < positions ? load(z + (j + k) * place + c) : zero();
          transpose_block(block);
          Real* into = to + static_cast<long>(c) * positions + j;
#pragma GCC unroll 16
          for (int k = 0; k < kWidth; ++k, into += positions)
            if (c + k < channels) store_before(into, block[k], end);
        }
      for (long i = image.features(); i < to_row; ++i) to[i] = 0;
    }
  }

  // The factored first layer (core/layers/factored_linear.h).

  // x W for several sets of rows, in slices of the depth and panels of columns: a piece of W that fits the
  // first-level cache serves all sets.
  struct Projection {
    Matrix x;
    int rows;
    Real* out;  // [rows, stride(out)]
  };
  static void project(int in, int out, const Projection* sets, int count, const Real* w) {
    constexpr int slice = 128;
    const long row = stride(out);
    for (int k = 0; k < in; k += slice)
      for (int column = 0; column < vectors(out); column += kMaxColumns)
        for (int s = 0; s < count; ++s) {
          const int depth = in - k < slice ? in - k : slice;
          const int left = vectors(out) - column;
          Real* to = sets[s].out + column * kWidth;
          const Segment segment{
              sets[s].x.p + k, sets[s].x.row, 1, w + k * row + column * kWidth, row, kWidth, depth};
          const Product product{sets[s].rows,
                                left < kMaxColumns ? left : kMaxColumns,
                                &segment,
                                1,
                                k > 0 ? to : nullptr,
                                row};
          multiply<Rows>(product, accumulate(to, row, nullptr, nullptr, 1));
        }
  }

  // gram [a_rows, b_rows] = a b^T over n features; the rows of a and b are the caller's own, without padding.
  static void gram(const Matrix& a, int a_rows, const Matrix& b, int b_rows, int n, Real* gram) {
    constexpr int together = 4;  // independent sums hide the latency of one
    const int whole = n / kWidth * kWidth;
    for (int i = 0; i < a_rows; ++i)
      for (int j = 0; j < b_rows; j += together) {
        const Real* left = a.p + i * a.row;
        const Real* right[together];
        for (int t = 0; t < together; ++t) right[t] = b.p + (j + t < b_rows ? j + t : j) * b.row;
        Vec sum[together] = {};
        for (int k = 0; k < whole; k += kWidth)
#pragma GCC unroll 4
          for (int t = 0; t < together; ++t)
            sum[t] = fma(load(left + k), load(right[t] + k), sum[t]);
        for (int t = 0; t < together && j + t < b_rows; ++t) {
          Real tail = 0;
          for (int k = whole; k < n; ++k) tail += left[k] * right[t][k];
          gram[i * b_rows + j + t] = sum_lanes(sum[t]) + tail;
        }
      }
  }

  // A vector of which what lies at `end` and behind it is neither read nor written.
  static Vec load_before(const Real* p, const Real* end) {
    if (end - p >= kWidth) return load(p);
    Vec v = zero();
    for (int i = 0; i < end - p; ++i) v[i] = p[i];
    return v;
  }
  static void store_before(Real* p, Vec v, const Real* end) {
    if (end - p >= kWidth) return store(p, v);
    for (int i = 0; i < end - p; ++i) p[i] = v[i];
  }

  // init + sum of terms + bias
  static void mix(const Extent& extent, int features, const Mix* terms, int count, const Real* init,
                  const Real* bias, const Destination& to) {
    static constexpr Real one = 1;
    Segment segments[3];
    int used = 0;
    for (; used < count; ++used)
      segments[used] = {terms[used].coefficients, terms[used].row_stride,
                        terms[used].depth_stride, terms[used].x,
                        stride(features),         kWidth,
                        terms[used].depth};
    if (bias) segments[used++] = {&one, 0, 0, bias, 0, kWidth, 1};
    const Product product{extent.rows, vectors(features), segments, used, init, stride(features)};
    multiply<Rows>(product, destined(to, stride(features), extent));
  }
};

PYMETA_KERNEL_END
