// The `block` executor: one task at a time, its numbers shared out to the threads of a CUDA block.
//
// Every thread runs the algorithm of core/algorithms; all take the same branches, and each operation here does a
// thread's share and then waits for the others, so that the next one finds all of it done. What an operation returns (a
// sum) is the same number in every thread. A matrix [rows, features] has rows of an odd number of quads (four numbers): each
// begins at 16 bytes, and a column of quads meets all banks of shared memory. Padding holds anything and reaches nothing.
// The order of every sum is fixed and does not depend on the number of threads.
#pragma once

#include "../core/call/operands.h"
#include "../core/call/workspace.h"
#include "../core/layers/taps.h"
#include "families.h"
#include "product.h"

PYMETA_KERNEL_BEGIN

// kWaits: does an operation end with a barrier? Where calls are lists, a list says where there is one (list.h).
template <bool kWaits>
struct BlockOf {
  using Family = block_families::PYMETA_FAMILY;
  static constexpr int kElement = 1;
  static constexpr int kTasks = 1;
  static constexpr int kOrders = 2;  // minibatches: the order, and what was drawn for it
  static constexpr bool kTransposes = false;
  static constexpr bool kReadsInputInPlace = false;
  static constexpr bool kSharesPlaces = true;
  static constexpr bool kFactors = false;
  static constexpr int kScratch = 320;  // numbers in shared memory, behind what products ask for

  PYMETA_FN static int vectors(int features) { return features; }
  PYMETA_FN static long stride(int features) { return 4 * ((features + 3) / 4 | 1); }
  PYMETA_FN static int blocks(int rows) { return rows; }
  PYMETA_FN static long class_stride(int rows) { return rows; }

  PYMETA_FN static void wait() {
    if constexpr (kWaits) sync();
  }
  PYMETA_FN static Real* scratch() {
    return reinterpret_cast<Real*>(shared_memory() + sizeof(Sharing));
  }

  // ---- elements ------------------------------------------------------------------------------------------------

  template <class Body>
  PYMETA_FN static void for_vectors(std::size_t size, Body body) {
    const unsigned all = static_cast<unsigned>(size);  // a task's arrays are no larger
    for (unsigned i = thread_index(); i < all; i += thread_count()) body(i);
    wait();
  }
  template <class Body>
  PYMETA_FN static void for_indices(int count, Body body) {
    for (int i = thread_index(); i < count; i += thread_count()) body(i);
    wait();
  }
  // Whole quads: `size` is a multiple of four, as the sizes of arrays in a workspace are.
  PYMETA_FN PYMETA_NOINLINE static void copy(Real* to, const Real* from, std::size_t size) {
    // Four quads on their way at once: the second-level cache takes some 300 cycles to answer.
    constexpr unsigned together = 4;
    const unsigned quads = static_cast<unsigned>(size / 4), step = thread_count();
    unsigned i = thread_index();
    for (; i + (together - 1) * step < quads; i += together * step) {
      Quad held[together];
#pragma unroll
      for (unsigned k = 0; k < together; ++k) held[k] = load_quad(from + 4 * (i + k * step));
#pragma unroll
      for (unsigned k = 0; k < together; ++k) store_quad(to + 4 * (i + k * step), held[k]);
    }
    for (; i < quads; i += step) store_quad(to + 4 * i, load_quad(from + 4 * i));
    wait();
  }
  template <class Body>  // body(offset into the matrix, feature, row)
  PYMETA_FN static void map(const Extent& extent, int features, Body body) {
    const int step_rows = thread_count() / features, step_columns = thread_count() % features;
    int r = thread_index() / features, c = thread_index() % features;
    while (r < extent.rows) {
      body(r * stride(features) + c, static_cast<long>(c), r);
      r += step_rows;
      c += step_columns;
      if (c >= features) {
        c -= features;
        ++r;
      }
    }
    wait();
  }
  // body(offset into the matrix, channel, row, y, x, row of the set) over the positions of a set's rows
  template <class Body>
  PYMETA_FN static void map_positions(const Extent& set, const Shape& shape, Body body) {
    map(over(set, shape), shape.channels, [&](long at, long channel, int row) {
      const int position = row / set.rows;
      body(at, static_cast<int>(channel), row, position / shape.width, position % shape.width,
           row % set.rows);
    });
  }
  // body(y, x, each) at each of those positions; each(inner) goes through what lies there, a thread its share: inner(offset into
  // the matrix, offset from the position's first number, row, channel)
  template <class Body>
  PYMETA_FN static void for_positions(const Extent& set, const Shape& shape, Body body) {
    const long row_scalars = stride(shape.channels);
    map_positions(set, shape, [&](long at, int channel, int row, int y, int x, int own) {
      body(y, x, [&](auto inner) { inner(at, own * row_scalars + channel, row, channel); });
    });
  }
  PYMETA_FN static Vec element(const Real* p) { return *p; }
  PYMETA_FN static void put_element(Real* p, Vec v) { *p = v; }
  template <class Place>
  PYMETA_FN static Vec gathered(int feature, int, Place place) {
    return *place(feature);
  }
  template <class Visitor>  // visit(emit(value, row, column))
  PYMETA_FN static void with_epilogue(const Destination& to, long row, const Extent&,
                                      Visitor visit) {
    const Epilogue epilogue = destined(to, row);
    visit([&](Vec v, int r, int c) { epilogue.emit(v, r, c); });
  }

  PYMETA_FN static Epilogue destined(const Destination& to, long row) {
    const Epilogue::Kind kind = to.gate   ? Epilogue::gate
                                : to.relu ? Epilogue::relu
                                          : Epilogue::plain;
    return {kind, to.p, static_cast<int>(row), to.gate, nullptr, 1};
  }
  PYMETA_FN static Epilogue sunk(const Sink& sink, long row) {
    return {Epilogue::accumulate, sink.out,  static_cast<int>(row), sink.base,
            sink.extra,           sink.scale};
  }

  // ---- linear layers -------------------------------------------------------------------------------------------

  PYMETA_FN PYMETA_NOINLINE static void apply(int in, int out, const Extent& extent,
                                              const Term* terms, int count, const Real* bias,
                                              const Destination& to) {
    Product p{extent.rows, out, count, {}, nullptr, nullptr, bias, destined(to, stride(out))};
    put_terms(terms, out, in, p);
    multiply<Form::nn>(p);
  }
  PYMETA_FN PYMETA_NOINLINE static void apply_transposed(int in, int out, const Extent& extent,
                                                         const Term* terms, int count,
                                                         const Destination& to) {
    Product p{extent.rows, in, count, {}, nullptr, nullptr, nullptr, destined(to, stride(in))};
    put_terms(terms, out, out, p);
    multiply<Form::nt>(p);
  }
  PYMETA_FN PYMETA_NOINLINE static void outer(int in, int out, const Extent& extent,
                                              const Matrix (*pairs)[2], int count,
                                              const Sink& sink) {
    if (!sink.out) return;
    Product p{in, out, count, {}, nullptr, nullptr, nullptr, sunk(sink, stride(out))};
    p.first = {pairs[0][0].p, static_cast<int>(pairs[0][0].row), pairs[0][1].p,
               static_cast<int>(pairs[0][1].row), extent.rows};
    if (count > 1) p.a = pairs[1][0].p, p.b = pairs[1][1].p;
    multiply<Form::tn>(p);
  }
  PYMETA_FN static void transpose(int, int, const Real*, Real*) {}
  PYMETA_FN static void transpose_taps(const Layer&, const Real*, Real*) {}

  // ---- convolutions --------------------------------------------------------------------------------------------

  // An output is a thread's: one chain of multiply-adds, tap by tap and in each in the order of the inputs. Nothing is worked on
  // beside them, whatever the shape.

  PYMETA_FN static std::size_t convolution_scratch(const Layer&, int) { return 0; }
  PYMETA_FN PYMETA_NOINLINE static void convolve(const Layer& layer, const Extent& set,
                                                 const Term* terms, int count, const Real* bias,
                                                 const Destination& to, Real*) {
    const Epilogue epilogue = destined(to, stride(layer.out.channels));
    const Axis down = rows_of(layer, false), across = columns_of(layer, false);
    const Groups groups = groups_of(layer);
    const long out_row = stride(layer.out.channels);
    const int taps = layer.window.taps();
    map_positions(set, layer.out, [&](long, int channel, int row, int y, int x, int own) {
      Real sum = bias ? bias[channel] : Real(0);
      for (int i = 0; i < count; ++i)
        for (int tap = 0; tap < taps; ++tap) {
          const int from_y = down.at(y, tap / across.taps),
                    from_x = across.at(x, tap % across.taps);
          if (from_y < 0 || from_x < 0) continue;
          const Real* from =
              terms[i].x.p +
              (static_cast<long>(from_y * layer.in.width + from_x) * set.rows + own) *
                  terms[i].x.row +
              groups.input(channel, 0);
          const Real* w = terms[i].w + tap * out_row + channel;
          for (int k = 0; k < groups.in; ++k) sum = fma(from[k], w[k * taps * out_row], sum);
        }
      epilogue.emit(sum, row, channel);
    });
  }
  PYMETA_FN PYMETA_NOINLINE static void convolve_transposed(const Layer& layer, const Extent& set,
                                                            const Term* terms, int count,
                                                            const Destination& to, Real*) {
    const Epilogue epilogue = destined(to, stride(layer.in.channels));
    const Axis down = rows_of(layer, true), across = columns_of(layer, true);
    const Groups groups = groups_of(layer);
    const long out_row = stride(layer.out.channels);
    const int taps = layer.window.taps();
    map_positions(set, layer.in, [&](long, int channel, int row, int y, int x, int own) {
      Real sum = 0;
      const int first = groups.output(channel, 0);
      for (int i = 0; i < count; ++i)
        for (int tap = 0; tap < taps; ++tap) {
          const int to_y = down.at(y, tap / across.taps), to_x = across.at(x, tap % across.taps);
          if (to_y < 0 || to_x < 0) continue;
          const Real* from =
              terms[i].x.p +
              (static_cast<long>(to_y * layer.out.width + to_x) * set.rows + own) * terms[i].x.row +
              first;
          const Real* w =
              terms[i].w + (static_cast<long>(channel % groups.in) * taps + tap) * out_row + first;
          for (int j = 0; j < groups.out; ++j) sum = fma(from[j], w[j], sum);
        }
      epilogue.emit(sum, row, channel);
    });
  }
  PYMETA_FN PYMETA_NOINLINE static void convolve_outer(const Layer& layer, const Extent& set,
                                                       const Matrix (*pairs)[2], int count,
                                                       const Sink& sink, Real*) {
    if (!sink.out) return;
    const Epilogue epilogue = sunk(sink, stride(layer.out.channels));
    const Axis down = rows_of(layer, false), across = columns_of(layer, false);
    const Groups groups = groups_of(layer);
    const int taps = layer.window.taps();
    map({groups.in * taps, nullptr, 0}, layer.out.channels, [&](long, long c, int row) {
      const int tap = row % taps, channel = static_cast<int>(c);
      const int input = groups.input(channel, row / taps);
      Real sum = 0;
      for (int i = 0; i < count; ++i)
        for (int y = 0; y < layer.out.height; ++y)
          for (int x = 0; x < layer.out.width; ++x) {
            const int from_y = down.at(y, tap / across.taps),
                      from_x = across.at(x, tap % across.taps);
            if (from_y < 0 || from_x < 0) continue;
            const Real* from =
                pairs[i][0].p +
                static_cast<long>(from_y * layer.in.width + from_x) * set.rows * pairs[i][0].row +
                input;
            const Real* d =
                pairs[i][1].p +
                static_cast<long>(y * layer.out.width + x) * set.rows * pairs[i][1].row + channel;
            for (int own = 0; own < set.rows; ++own)
              sum = fma(from[own * pairs[i][0].row], d[own * pairs[i][1].row], sum);
          }
      epilogue.emit(sum, row, channel);
    });
  }

  // body(offset into the matrix, feature), summed over the rows
  template <class Body>
  PYMETA_FN static void sum_rows(const Extent& extent, int features, const Sink& sink, Body body) {
    if (!sink.out) return;
    const Epilogue epilogue = sunk(sink, 0);
    const long row = stride(features);
    for_indices(features, [&](int c) {
      epilogue.emit(
          sum_over(extent, [&](int r) { return body(r * row + c, static_cast<long>(c)); }), 0, c);
    });
  }

  // The narrow last layer; its weight is [out, stride(in)], outputs and their deltas are class-major.

  PYMETA_FN PYMETA_NOINLINE static void narrow_apply(int in, int out, const Extent& extent,
                                                     const Term* terms, int count, const Real* bias,
                                                     Real* y) {
    const int rows = extent.rows, w_row = static_cast<int>(stride(in));
    sums(
        rows * out,
        [&](int index, int part) {
          const int o = out == 1 ? 0 : index / rows, r = index - o * rows;
          Real sum = 0;
          for (int i = 0; i < count; ++i) {
            const Real* x = terms[i].x.p + r * static_cast<int>(terms[i].x.row);
            const Real* w = terms[i].w + o * w_row;
            int k = 4 * part;
            for (; k + 4 <= in; k += 4 * kParts) {
              const Quad a = load_quad(x + k), b = load_quad(w + k);
#pragma unroll
              for (int j = 0; j < 4; ++j) sum = fma(a.v[j], b.v[j], sum);
            }
            for (; k < in; ++k) sum = fma(x[k], w[k], sum);
          }
          return sum;
        },
        [&](int index, Real sum) {
          const int o = out == 1 ? 0 : index / rows;
          y[index] = sum + (bias ? bias[o] : Real(0));
        });
  }
  // A thread's are four neighbours of a row.
  PYMETA_FN PYMETA_NOINLINE static void narrow_apply_transposed(int in, int out,
                                                                const Extent& extent,
                                                                const Term* terms, int count,
                                                                const Destination& to) {
    const int rows = extent.rows, row = static_cast<int>(stride(in));
    const Real* const gate = to.gate;
    map({rows, nullptr, 0}, (in + 3) / 4, [&](long, long quad, int r) {
      const int c = 4 * static_cast<int>(quad);
      Quad sum{};
      for (int i = 0; i < count; ++i)
        for (int o = 0; o < out; ++o) {
          const Real d = terms[i].x.p[o * rows + r];
          const Quad w = load_quad(terms[i].w + o * row + c);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum.v[j] = fma(d, w.v[j], sum.v[j]);
        }
      const int at = r * row + c;
      if (gate)
        sum = GateValue{gate}.quad(sum.v, at);
      else if (to.relu)
        sum = ReluValue{}.quad(sum.v, at);
      store_quad(to.p + at, sum);
    });
  }
  PYMETA_FN PYMETA_NOINLINE static void narrow_outer(int in, int out, const Extent& extent,
                                                     const Matrix (*pairs)[2], int count,
                                                     const Sink& sink) {
    if (!sink.out) return;
    const Epilogue epilogue = sunk(sink, stride(in));
    const int rows = extent.rows;
    map({out, nullptr, 0}, in, [&](long, long c, int o) {
      Real sum = 0;
      for (int i = 0; i < count; ++i) {
        const Real* d = pairs[i][1].p + o * rows;
        const Real* x = pairs[i][0].p + c;
        const int row = static_cast<int>(pairs[i][0].row);
        for (int r = 0; r < rows; ++r, x += row) sum = fma(d[r], *x, sum);
      }
      epilogue.emit(sum, o, static_cast<int>(c));
    });
  }
  PYMETA_FN PYMETA_NOINLINE static void narrow_sum_rows(int out, const Extent& extent,
                                                        const Real* dy, const Sink& sink) {
    if (!sink.out) return;
    const Epilogue epilogue = sunk(sink, 0);
    const int rows = extent.rows;
    sums(
        out,
        [&](int o, int part) {
          Real sum = 0;
          for (int r = part; r < rows; r += kParts) sum += dy[o * rows + r];
          return sum;
        },
        [&](int o, Real sum) { epilogue.emit(sum, 0, o); });
  }

  PYMETA_FN PYMETA_NOINLINE static void to_class_major(const Extent& extent, int out,
                                                       const Real* matrix, Real* y) {
    map(extent, out,
        [=, rows = extent.rows](long at, long c, int r) { y[c * rows + r] = matrix[at]; });
  }
  PYMETA_FN PYMETA_NOINLINE static void from_class_major(const Extent& extent, int out,
                                                         const Real* y, Real* matrix) {
    map(extent, out,
        [=, rows = extent.rows](long at, long c, int r) { matrix[at] = y[c * rows + r]; });
  }

  // ---- sums ----------------------------------------------------------------------------------------------------

  // By one thread alone: body(feature) in four interleaved partial sums.
  template <class Body>
  PYMETA_FN static Vec sum_features(int features, Body body) {
    Real sum[4] = {};
    int i = 0;
    for (; i + 4 <= features; i += 4)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += body(i + j);
    for (int j = 0; i < features; ++i, ++j) sum[j] += body(i);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
  PYMETA_FN static Vec masked_columns(Vec v, int, int) { return v; }

  // The rest by all threads, through the scratch.

  PYMETA_FN static Vec sum_rows_in_order(const Extent& extent, const Real* values) {
    Real sum = 0;
    for (int r = 0; r < extent.rows; ++r) sum += values[r];
    sync();
    return sum;
  }
  // total + the sum of value(offset) over a tensor's elements.
  template <class Value>
  PYMETA_FN static Vec sum_elements(const PackedTensor& packed, Vec total, Value value) {
    return total + sum_partials(packed, [&](std::size_t at, Real sum) { return sum + value(at); });
  }
  PYMETA_FN static Vec whole(Vec sum) { return sum; }
  template <class Body>  // sum = body(offset, sum)
  PYMETA_FN static void fold(const PackedTensor& packed, Real* into, Body body) {
    const Real sum = sum_partials(packed, body);
    if (thread_index() == 0) *into += sum;
    sync();
  }

  static constexpr int kParts = 8;  // of each of many sums

 private:
  static constexpr int kPartials = 256;  // of one long sum
  static constexpr int kGroups = 16;     // of those

  PYMETA_FN static void put_terms(const Term* terms, int out, int depth, Product& p) {
    p.first = {terms[0].x.p, static_cast<int>(terms[0].x.row), terms[0].w,
               static_cast<int>(stride(out)), depth};
    if (p.count > 1) p.a = terms[1].x.p, p.b = terms[1].w;
  }
  // emit(index, sum of part(index, p) over p < kParts) for each index; a part is a thread's work.
  template <class Part, class Emit>
  PYMETA_FN static void sums(int count, Part part, Emit emit) {
    constexpr int together = kScratch / kParts;
    Real* parts = scratch();
    for (int first = 0; first < count; first += together) {
      const int now = count - first < together ? count - first : together;
      for_indices(now * kParts, [&](int i) { parts[i] = part(first + i / kParts, i % kParts); });
      for_indices(now, [&](int i) {
        const Real* p = parts + i * kParts;
        emit(first + i, ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7])));
      });
    }
  }

  template <class Body>
  PYMETA_FN static Real sum_partials(const PackedTensor& packed, Body body) {
    Real* partials = scratch();
    Real* groups = partials + kPartials;
    const int elements = static_cast<int>(packed.elements());
    for_indices(kPartials, [&](int p) {
      Real sum = 0;
      for (int i = p; i < elements; i += kPartials)
        sum = body(static_cast<std::size_t>(i / packed.inner) * packed.row + i % packed.inner, sum);
      partials[p] = sum;
    });
    for_indices(kGroups, [&](int g) {
      Real sum = 0;
      for (int p = g; p < kPartials; p += kGroups) sum += partials[p];
      groups[g] = sum;
    });
    Real total = 0;
    for (int g = 0; g < kGroups; ++g) total += groups[g];
    sync();
    return total;
  }
};

using Block = BlockOf<true>;

PYMETA_KERNEL_END
