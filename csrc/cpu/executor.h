// What the two CPU executors share: how arrays lie, and the operations core/ is written in.
//
// An executor works on one item at a time: a task (rows.h) or a vector full of tasks (lanes.h). Array layouts, in
// scalars, with one meaning for both:
//   matrix [rows, features]   element (r, c) at r * stride(features) + c * kElement
//   class-major [out, rows]   element (o, r) at o * class_stride(rows) + r * kElement: losses work on these
//   linear weight             [in, stride(out)]; for a narrow last layer [out, stride(in)] instead (see below)
//   vectors (bias, gamma...)  stride(features)
// Rows: kElement is 1 and a stride is rounded up to whole vectors. Lanes: kElement is kWidth, nothing is padded.
// Padding columns of weights and of deltas hold zeros, so they never reach a result.
//
// A narrow last layer (a plain linear layer with at most kNarrow outputs: a logit, a forecast) would waste most of
// a vector of outputs. It is a dot product along the inputs in sixteen interleaved partial sums instead, in that
// same order on every executor and instruction set.
#pragma once

#include "../core/call/network.h"
#include "../core/call/operands.h"
#include "../core/call/workspace.h"
#include "../core/families.h"
#include "convolution.h"
#include "gemm.h"
#include "winograd.h"

PYMETA_KERNEL_BEGIN

constexpr int kPartials = 16;

// Those sums over a row's features: feature k belongs to sum k mod 16, and they are added by halving. A vector has kFeatures of them
// side by side.
template <class Access>
class Partials {
 public:
  void dot(const Real* a, const Real* b, int n) {
    const int whole = n / kFeatures;
    for_vectors(whole, [&](int i, Vec s) {
      return fma(load(a + static_cast<long>(i) * kWidth), load(b + static_cast<long>(i) * kWidth),
                 s);
    });
    if (n % kFeatures == 0) return;
    // An infinity in a task's rows makes NaNs of the padding.
    const long last = static_cast<long>(whole) * kWidth;
    const Vec left = Access::masked_columns(load(a + last), n, whole);
    const Vec right = Access::masked_columns(load(b + last), n, whole);
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j)
      if (j == whole % kVectors) sum_[j] = fma(left, right, sum_[j]);
  }
  template <class Body>
  void add(int n, Body body) {
    for_vectors(Access::vectors(n), [&](int i, Vec s) { return s + body(i); });
  }
  // Of each task, in its lanes.
  Vec total() {
#pragma GCC unroll 4
    for (int half = kVectors / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) sum_[i] = sum_[i] + sum_[i + half];
    return Access::whole(sum_[0]);
  }

 private:
  static constexpr int kFeatures = Access::kFeatures;
  static constexpr int kVectors = kPartials / kFeatures;

  // Unrolled so that every partial sum is a register.
  template <class Body>
  void for_vectors(int n, Body body) {
    int first = 0;
    for (; first + kVectors <= n; first += kVectors) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) sum_[j] = body(first + j, sum_[j]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j)
      if (first + j < n) sum_[j] = body(first + j, sum_[j]);
  }

  Vec sum_[kVectors] = {};
};

template <class Access>
struct Executor {
  using Family = AllCalls;
  static constexpr int kElement = Access::kElement;
  static constexpr int kTasks = Access::kTasks;
  static constexpr int kOrders = 1;  // arrays of row numbers that a task's shuffle takes

  static int vectors(int features) { return Access::vectors(features); }
  static long stride(int features) { return static_cast<long>(vectors(features)) * kWidth; }
  static int blocks(int rows) { return Access::blocks(rows); }
  static long class_stride(int rows) { return static_cast<long>(blocks(rows)) * kWidth; }

  static Epilogue destined(const Destination& to, long row, const Extent& extent) {
    Epilogue e{to.gate ? Epilogue::Kind::gate : Epilogue::Kind::floor, to.p, row, extent.keep};
    e.period = extent.period;
    e.floor = broadcast(to.relu ? Real(0) : -Real(__builtin_inf()));
    e.gate = to.gate;
    return e;
  }
  template <class Visitor>  // visit(emit(vector, row, column))
  static void with_epilogue(const Destination& to, long row, const Extent& extent, Visitor visit) {
    visit(destined(to, row, extent));
  }

  template <class Body>  // body(offset) for every vector of `size` scalars
  static void for_vectors(std::size_t size, Body body) {
    for (std::size_t i = 0; i < size; i += kWidth) body(i);
  }
  template <class Body>
  static void for_indices(int count, Body body) {
    for (int i = 0; i < count; ++i) body(i);
  }
  static void copy(Real* to, const Real* from, std::size_t size) {
    for_vectors(size, [=](std::size_t i) { store(to + i, load(from + i)); });
  }

  template <class Body>  // body(offset into the matrix, offset into a feature vector, row)
  static void map(const Extent& extent, int features, Body body) {
    const int columns = vectors(features);
    long at = 0;
    for (int r = 0; r < extent.rows; ++r)
      for (int c = 0; c < columns; ++c, at += kWidth) body(at, static_cast<long>(c) * kWidth, r);
  }

  // body(offset into the matrix, vector of channels, row, y, x, row of the set) over the positions of a set's rows
  template <class Body>
  static void map_positions(const Extent& set, const Shape& shape, Body body) {
    const int columns = vectors(shape.channels);
    long at = 0;
    int row = 0;
    for (int y = 0; y < shape.height; ++y)
      for (int x = 0; x < shape.width; ++x)
        for (int own = 0; own < set.rows; ++own, ++row)
          for (int c = 0; c < columns; ++c, at += kWidth) body(at, c, row, y, x, own);
  }
  // body(y, x, each) at each of those positions; each(inner) goes through what lies there: inner(offset into the matrix, offset
  // from the position's first number, row, vector of channels)
  template <class Body>
  static void for_positions(const Extent& set, const Shape& shape, Body body) {
    const int columns = vectors(shape.channels);
    const long place = set.rows * stride(shape.channels);
    for (int y = 0, position = 0; y < shape.height; ++y)
      for (int x = 0; x < shape.width; ++x, ++position)
        body(y, x, [=](auto inner) {
          long offset = 0;
          for (int row = position * set.rows; row < (position + 1) * set.rows; ++row)
            for (int c = 0; c < columns; ++c, offset += kWidth)
              inner(position * place + offset, offset, row, c);
        });
  }
  // One element of each task, in every lane that belongs to it.
  static Vec element(const Real* p) { return Access::load_a(p); }
  static void put_element(Real* p, Vec v) { Access::store_element(p, v); }

  // Vector number `vector` of so many features, which lie where place(feature) says; zero behind them.
  template <class Place>
  static Vec gathered(int vector, int features, Place place) {
    return Access::gathered(vector, features, place);
  }

  // x W (+ x' W') + bias
  static void apply(int in, int out, const Extent& extent, const Term* terms, int count,
                    const Real* bias, const Destination& to) {
    Segment segments[2];
    for (int i = 0; i < count; ++i)
      segments[i] = {terms[i].x.p, terms[i].x.row, kElement, terms[i].w, stride(out), kWidth, in};
    const Product product{extent.rows, vectors(out), segments, count, bias, 0};
    multiply<Access>(product, destined(to, stride(out), extent));
  }

  // d W^T (+ d' W'^T)
  static void apply_transposed(int in, int out, const Extent& extent, const Term* terms, int count,
                               const Destination& to) {
    Segment segments[2];
    for (int i = 0; i < count; ++i) segments[i] = Access::transposed_segment(in, out, terms[i]);
    const Product product{extent.rows, vectors(in), segments, count};
    multiply<Access>(product, destined(to, stride(in), extent));
  }

  // x^T d (+ x'^T d')
  static void outer(int in, int out, const Extent& extent, const Matrix (*pairs)[2], int count,
                    const Sink& sink) {
    if (!sink.out) return;
    Segment segments[2];
    for (int i = 0; i < count; ++i)
      segments[i] = {pairs[i][0].p,   kElement, pairs[i][0].row, pairs[i][1].p,
                     pairs[i][1].row, kWidth,   extent.rows};
    const Product product{in, vectors(out), segments, count};
    multiply<Access>(product, sunk(sink, stride(out)));
  }

  // The same of a convolution, its groups by themselves (convolution.h); of some shapes by winograd.h, which works in `scratch`.

  static std::size_t convolution_scratch(const Layer& layer, int rows) {
    return suits_winograd(layer) ? WinogradProducts<Access>::scratch_scalars(layer, rows) : 0;
  }
  template <class Visitor>  // visit(products of the layer)
  static void with_convolution(const Layer& layer, const Extent& set, Real* scratch,
                               Visitor visit) {
    if (layer.window.groups > 1)
      visit(GroupedConvolution<Access>(layer, set));
    else if (suits_winograd(layer))
      visit(WinogradProducts<Access>(layer, set, scratch));
    else
      visit(ConvolutionProducts<Access>(layer, set));
  }
  static void convolve(const Layer& layer, const Extent& set, const Term* terms, int count,
                       const Real* bias, const Destination& to, Real* scratch) {
    const Epilogue into = destined(to, stride(layer.out.channels), over(set, layer.out));
    with_convolution(layer, set, scratch,
                     [&](const auto& own) { own.apply(terms, count, bias, into, false); });
  }
  static void convolve_transposed(const Layer& layer, const Extent& set, const Term* terms,
                                  int count, const Destination& to, Real* scratch) {
    const Epilogue into = destined(to, stride(layer.in.channels), over(set, layer.in));
    with_convolution(layer, set, scratch,
                     [&](const auto& own) { own.apply(terms, count, nullptr, into, true); });
  }
  static void convolve_outer(const Layer& layer, const Extent& set, const Matrix (*pairs)[2],
                             int count, const Sink& sink, Real* scratch) {
    if (!sink.out) return;
    with_convolution(layer, set, scratch, [&](const auto& own) { own.outer(pairs, count, sink); });
  }

  static Epilogue sunk(const Sink& sink, long row) {
    return accumulate(sink.out, row, sink.base, sink.extra, sink.scale);
  }

  // Feature-wise sums over the rows: body(offset into the matrix, offset into a feature vector) summed.
  template <class Body>
  static void sum_rows(const Extent& extent, int features, const Sink& sink, Body body) {
    if (!sink.out) return;
    const Epilogue into = sunk(sink, 0);
    const long row = stride(features);
    for (int c = 0; c < vectors(features); ++c) {
      const long column = static_cast<long>(c) * kWidth;
      into(sum_over(extent, [&](int r) { return body(r * row + column, column); }), 0, c);
    }
  }

  // The narrow last layer; outputs and their deltas are class-major.

  static void narrow_apply(int in, int out, const Extent& extent, const Term* terms, int count,
                           const Real* bias, Real* y) {
    const long classes = class_stride(extent.rows);
    for (int r = 0; r < extent.rows; ++r)
      for (int o = 0; o < out; ++o) {
        Partials<Access> sum;
        for (int i = 0; i < count; ++i)
          sum.dot(terms[i].x.p + r * terms[i].x.row, terms[i].w + o * stride(in), in);
        Access::store_element(y + o * classes + static_cast<long>(r) * kElement,
                              sum.total() + (bias ? Access::load_a(bias + o * kElement) : zero()));
      }
  }

  static void narrow_apply_transposed(int in, int out, const Extent& extent, const Term* terms,
                                      int count, const Destination& to) {
    Segment segments[2];
    const long classes = class_stride(extent.rows);
    for (int i = 0; i < count; ++i)
      segments[i] = {terms[i].x.p, kElement, classes, terms[i].w, stride(in), kWidth, out};
    const Product product{extent.rows, vectors(in), segments, count};
    multiply<Access>(product, destined(to, stride(in), extent));
  }

  static void narrow_outer(int in, int out, const Extent& extent, const Matrix (*pairs)[2],
                           int count, const Sink& sink) {
    if (!sink.out) return;
    Segment segments[2];
    const long classes = class_stride(extent.rows);
    for (int i = 0; i < count; ++i)
      segments[i] = {pairs[i][1].p,   classes, kElement,   pairs[i][0].p,
                     pairs[i][0].row, kWidth,  extent.rows};
    const Product product{out, vectors(in), segments, count};
    multiply<Access>(product, sunk(sink, stride(in)));
  }

  static void narrow_sum_rows(int out, const Extent& extent, const Real* dy, const Sink& sink) {
    if (!sink.out) return;
    alignas(64) Real sums[kNarrow * kWidth] = {};
    const long classes = class_stride(extent.rows);
    for (int o = 0; o < out; ++o) {
      Vec sum = zero();
      for (int r = 0; r < extent.rows; ++r)
        sum = sum + Access::load_a(dy + o * classes + static_cast<long>(r) * kElement);
      Access::store_element(sums + o * kElement, sum);
    }
    const Epilogue into = sunk(sink, 0);
    for (int c = 0; c < vectors(out); ++c) into(load(sums + c * kWidth), 0, c);
  }

  // Between matrices and class-major arrays, for a last layer that is not narrow. Padding is zeroed.

  static void to_class_major(const Extent& extent, int out, const Real* matrix, Real* y) {
    const long classes = class_stride(extent.rows), row = stride(out);
    for (int r = 0; r < extent.rows; ++r)
      for (int o = 0; o < out; ++o)
        Access::copy_element(y + o * classes + static_cast<long>(r) * kElement,
                             matrix + r * row + static_cast<long>(o) * kElement);
  }

  static void from_class_major(const Extent& extent, int out, const Real* y, Real* matrix) {
    const long classes = class_stride(extent.rows), row = stride(out);
    for (int r = 0; r < extent.rows; ++r) {
      Real* to = matrix + r * row;
      for (long c = static_cast<long>(out) * kElement; c < row; ++c) to[c] = 0;
      for (int o = 0; o < out; ++o)
        Access::copy_element(to + static_cast<long>(o) * kElement,
                             y + o * classes + static_cast<long>(r) * kElement);
    }
  }

  // Sum over a row's features of body(vector number), the same in every lane that belongs to the row.
  template <class Body>
  static Vec sum_features(int features, Body body) {
    Partials<Access> sum;
    sum.add(features, body);
    return sum.total();
  }
  static Vec masked_columns(Vec v, int features, int vector) {
    return Access::masked_columns(v, features, vector);
  }

  // total + the sum over a tensor's elements of value(offset), each row in the order of sum_features.
  template <class Value>
  static Vec sum_elements(const PackedTensor& packed, Vec total, Value value) {
    for (int outer = 0; outer < packed.outer; ++outer)
      total = total + sum_features(packed.inner, [&](int column) {
                const std::size_t at = outer * static_cast<std::size_t>(packed.row) +
                                       static_cast<std::size_t>(column) * kWidth;
                return masked_columns(value(at), packed.inner, column);
              });
    return total;
  }
  // Each task's sum of such a vector of partial ones.
  static Vec whole(Vec partial_sums) { return Access::whole(partial_sums); }
  // One vector of partial sums: sum = body(offset, sum) over a tensor's vectors. Its padding adds nothing.
  template <class Body>
  static void fold(const PackedTensor& packed, Real* into, Body body) {
    Vec sum = load(into);
    for_vectors(packed.scalars(), [&](std::size_t i) { sum = body(i, sum); });
    store(into, sum);
  }

  // The sum over the rows of a class-major vector, in the order of the rows.
  static Vec sum_rows_in_order(const Extent& extent, const Real* values) {
    Vec sum = zero();
    for (int r = 0; r < extent.rows; ++r)
      sum = sum + Access::load_a(values + static_cast<long>(r) * kElement);
    return sum;
  }
};

PYMETA_KERNEL_END
