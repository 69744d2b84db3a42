// Convolutions as small products whose left rows are gathered: nothing is copied.
//
// Activations lie position by position, [height, width, rows] x channels. So where a run of outputs along a row of the image
// sees its inputs under the same taps, their inputs under one tap are as many consecutive rows: a segment of a product
// (gemm.h). An output is one chain of multiply-adds, tap by tap and in each in the order of the inputs; taps that lie
// outside are in no segment. A weight's gradient adds up blocks of some positions of some images, small enough that a
// block's rows are still in the cache for the next tap. Where blocks end does not depend on how many images there are: rows
// that a task lacks, or blocks of them, add nothing.
//
// Of a single input channel, whose products would be one multiply-add deep and whose gradients one row high, the taps along a row of the
// window go together: a product's depth, a gradient's rows.
//
// Groups that see some of the inputs only are sums over vectors of channels instead, whose inputs are gathered one by one.
#pragma once

#include "../core/call/operands.h"
#include "../core/layers/taps.h"
#include "gemm.h"

PYMETA_KERNEL_BEGIN

constexpr int kBlockPositions = 16, kBlockImages = 32;

template <class Access>
class ConvolutionProducts {
 public:
  static constexpr int kElement = Access::kElement;

  ConvolutionProducts(const Layer& layer, const Extent& set)
      : layer_(layer), set_(set), images_(set.rows), taps_(layer.window.taps()) {}

  // to_output: from d to dx, with the transposed weights; `bias` is null there.
  void apply(const Term* terms, int count, const Real* bias, const Epilogue& to,
             bool to_output) const {
    const Shape& shape = to_output ? layer_.in : layer_.out;
    const Axis down = rows_of(layer_, to_output), across = columns_of(layer_, to_output);
    for (int y = 0; y < shape.height; ++y)
      for (int x = 0; x < shape.width;) {
        const int end = across.run_end(x);
        Segment segments[2 * kMostTaps];
        const int used = list(terms, count, down, across, y, x, to_output, segments);
        const Product product{
            (end - x) * images_, Access::vectors(shape.channels), segments, used, bias, 0};
        multiply<Access>(product, shifted(to, static_cast<long>(y * shape.width + x) * images_));
        x = end;
      }
  }

  // gW[k] = sum of x(o under k)^T d(o)
  void outer(const Matrix (*pairs)[2], int count, const Sink& sink) const {
    const Shape& out = layer_.out;
    const int wide = least(kBlockPositions, out.width), high = kBlockPositions / wide;
    bool is_first = true;
    if (is_single()) begin_sums(sink);
    for (int y = 0; y < out.height; y += high)
      for (int x = 0; x < out.width; x += wide)
        for (int image = 0; image == 0 || image < images_; image += kBlockImages) {
          const Block block{y,     least(y + high, out.height),
                            x,     least(x + wide, out.width),
                            image, least(kBlockImages, images_ - image)};
          if (is_single())
            add_single_block(pairs, count, block, sink);
          else
            for (int tap = 0; tap < taps_; ++tap)
              add_block(pairs, count, block, tap, is_first, sink);
          is_first = false;
        }
  }

 private:
  struct Block {
    int y, y_end, x, x_end;
    int image, images;
  };

  static int least(int a, int b) { return a < b ? a : b; }

  static Epilogue shifted(Epilogue to, long rows) {
    to.out += rows * to.row;
    if (to.gate) to.gate += rows * to.row;
    return to;
  }

  int list(const Term* terms, int count, const Axis& down, const Axis& across, int y, int x,
           bool to_output, Segment* segments) const {
    const Shape& from = to_output ? layer_.out : layer_.in;
    int used = 0;
    for (int i = 0; i < count; ++i)
      for (int ky = 0; ky < down.taps; ++ky) {
        const int from_y = down.at(y, ky);
        if (from_y < 0) continue;
        for (int kx = 0; kx < across.taps; ++kx) {
          const int from_x = across.at(x, kx);
          if (from_x < 0) continue;
          if (is_single() && !to_output && kx > 0 && across.at(x, kx - 1) >= 0) {
            ++segments[used - 1].depth;
            continue;
          }
          const long place = static_cast<long>(from_y * from.width + from_x) * images_;
          segments[used++] = segment(terms[i], terms[i].x.p + place * terms[i].x.row,
                                     ky * across.taps + kx, to_output);
        }
      }
    return used;
  }

  Segment segment(const Term& term, const Real* a, int tap, bool to_output) const {
    const int in = layer_.in.channels, out = layer_.out.channels;
    if (to_output) return Access::transposed_tap(term, a, in, out, tap, taps_);
    const long row = static_cast<long>(Access::vectors(out)) * kWidth;
    if (is_single())  // on to the next tap
      return {a, term.x.row, next_tap(term.x), term.w + tap * row, row, kWidth, 1};
    return {a, term.x.row, kElement, term.w + tap * row, taps_ * row, kWidth, in};
  }

  void add_block(const Matrix (*pairs)[2], int count, const Block& block, int tap, bool is_first,
                 const Sink& sink) const {
    Segment segments[2 * kBlockPositions];
    int used = 0;
    for (int i = 0; i < count; ++i) used = list_block(pairs[i], block, tap, segments, used);
    if (used == 0 && !is_first) return;
    const long row = static_cast<long>(Access::vectors(layer_.out.channels)) * kWidth;
    const auto of_tap = [&](const Real* p) { return p ? p + tap * row : nullptr; };
    Real* const out = sink.out + tap * row;
    const Epilogue into =
        is_first ? accumulate(out, taps_ * row, of_tap(sink.base), of_tap(sink.extra), sink.scale)
                 : accumulate(out, taps_ * row, out, nullptr, sink.scale);
    const Product product{layer_.in.channels, Access::vectors(layer_.out.channels), segments, used};
    multiply<Access>(product, into);
  }

  int list_block(const Matrix (&pair)[2], const Block& block, int tap, Segment* segments,
                 int used) const {
    const Axis down = rows_of(layer_, false), across = columns_of(layer_, false);
    const int ky = tap / across.taps, kx = tap % across.taps;
    for (int y = block.y; y < block.y_end; ++y) {
      const int from_y = down.at(y, ky);
      if (from_y < 0) continue;
      for (int x = block.x; x < block.x_end;) {
        const int from_x = across.at(x, kx);
        int end = x + 1;
        while (across.stride == 1 && block.images == images_ && end < block.x_end &&
               (from_x < 0) == (across.at(end, kx) < 0))
          ++end;
        if (from_x >= 0) {
          const long from =
              static_cast<long>(from_y * layer_.in.width + from_x) * images_ + block.image;
          const long at = static_cast<long>(y * layer_.out.width + x) * images_ + block.image;
          segments[used++] = {pair[0].p + from * pair[0].row, kElement,    pair[0].row,
                              pair[1].p + at * pair[1].row,   pair[1].row, kWidth,
                              (end - x) * block.images};
        }
        x = end;
      }
    }
    return used;
  }

  // Of a single input channel.

  bool is_single() const { return layer_.in.channels == 1; }
  // From an input to the one that the same output sees under the next tap of the row.
  long next_tap(const Matrix& x) const {
    return static_cast<long>(layer_.window.dilation_x) * images_ * x.row;
  }
  Product taps_product(int taps, const Segment* segments, int used) const {
    return {taps, Access::vectors(layer_.out.channels), segments, used};
  }
  void begin_sums(const Sink& sink) const {
    const long row = static_cast<long>(Access::vectors(layer_.out.channels)) * kWidth;
    multiply<Access>(taps_product(taps_, nullptr, 0),
                     accumulate(sink.out, row, sink.base, sink.extra, sink.scale));
  }
  // Run by run of positions that see inputs under the same taps.
  void add_single_block(const Matrix (*pairs)[2], int count, const Block& block,
                        const Sink& sink) const {
    const Axis across = columns_of(layer_, false);
    const long row = static_cast<long>(Access::vectors(layer_.out.channels)) * kWidth;
    for (int x = block.x; x < block.x_end;) {
      const int end = block.images == images_ ? least(across.run_end(x), block.x_end) : x + 1;
      int first = 0, taps = 0;
      for (int k = 0; k < across.taps; ++k)
        if (across.at(x, k) >= 0 && taps++ == 0) first = k;
      for (int ky = 0; ky < layer_.window.height && taps > 0; ++ky) {
        Segment segments[2 * kBlockPositions];
        int used = 0;
        for (int i = 0; i < count; ++i)
          used = list_run(pairs[i], block, x, end, ky, first, segments, used);
        Real* const out = sink.out + (ky * across.taps + first) * row;
        if (used > 0)
          multiply<Access>(taps_product(taps, segments, used),
                           accumulate(out, row, out, nullptr, sink.scale));
      }
      x = end;
    }
  }
  int list_run(const Matrix (&pair)[2], const Block& block, int x, int end, int ky, int kx,
               Segment* segments, int used) const {
    const Axis down = rows_of(layer_, false), across = columns_of(layer_, false);
    for (int y = block.y; y < block.y_end; ++y) {
      const int from_y = down.at(y, ky);
      if (from_y < 0) continue;
      const long from =
          static_cast<long>(from_y * layer_.in.width + across.at(x, kx)) * images_ + block.image;
      const long at = static_cast<long>(y * layer_.out.width + x) * images_ + block.image;
      segments[used++] = {pair[0].p + from * pair[0].row, next_tap(pair[0]), pair[0].row,
                          pair[1].p + at * pair[1].row,   pair[1].row,       kWidth,
                          (end - x) * block.images};
    }
    return used;
  }

  const Layer& layer_;
  const Extent& set_;
  const int images_, taps_;
};

// The same in groups.
template <class Access>
class GroupedConvolution {
 public:
  static constexpr int kElement = Access::kElement;

  GroupedConvolution(const Layer& layer, const Extent& set)
      : layer_(layer),
        images_(set.rows),
        taps_(layer.window.taps()),
        groups_(groups_of(layer)),
        in_row_(static_cast<long>(Access::vectors(layer.in.channels)) * kWidth),
        out_row_(static_cast<long>(Access::vectors(layer.out.channels)) * kWidth) {}

  void apply(const Term* terms, int count, const Real* bias, const Epilogue& to,
             bool to_output) const {
    const Shape &shape = to_output ? layer_.in : layer_.out,
                &from = to_output ? layer_.out : layer_.in;
    const Axis down = rows_of(layer_, to_output), across = columns_of(layer_, to_output);
    const int vectors = Access::vectors(shape.channels);
    for (int y = 0, row = 0; y < shape.height; ++y)
      for (int x = 0; x < shape.width; ++x)
        for (int image = 0; image < images_; ++image, ++row)
          for (int v = 0; v < vectors; ++v) {
            Vec sum = bias ? load(bias + static_cast<long>(v) * kWidth) : zero();
            for (int i = 0; i < count; ++i)
              for_taps(down, across, y, x, [&](int tap, int from_y, int from_x) {
                const long place =
                    (static_cast<long>(from_y * from.width + from_x) * images_ + image);
                sum = to_output ? add_back(terms[i], place, v, tap, sum)
                                : add(terms[i], place, v, tap, sum);
              });
            to(sum, row, v);
          }
  }

  void outer(const Matrix (*pairs)[2], int count, const Sink& sink) const {
    const Epilogue into = accumulate(sink.out, out_row_, sink.base, sink.extra, sink.scale);
    for (int k = 0; k < groups_.in; ++k)
      for (int tap = 0; tap < taps_; ++tap)
        for (int v = 0; v < Access::vectors(layer_.out.channels); ++v)
          into(sum_of(pairs, count, k, tap, v), k * taps_ + tap, v);
  }

 private:
  template <class Visitor>
  static void for_taps(const Axis& down, const Axis& across, int y, int x, Visitor visit) {
    for (int ky = 0; ky < down.taps; ++ky) {
      const int from_y = down.at(y, ky);
      if (from_y < 0) continue;
      for (int kx = 0; kx < across.taps; ++kx) {
        const int from_x = across.at(x, kx);
        if (from_x >= 0) visit(ky * across.taps + kx, from_y, from_x);
      }
    }
  }

  bool is_depthwise() const { return groups_.in == 1 && groups_.out == 1; }
  // The j-th input of each output channel of a vector.
  Vec inputs(const Real* x, int v, int j) const {
    if (is_depthwise()) return load(x + static_cast<long>(v) * kWidth);
    return Access::gathered(v, layer_.out.channels, [&](int output) {
      return x + static_cast<long>(groups_.input(output, j)) * kElement;
    });
  }
  Vec add(const Term& term, long place, int v, int tap, Vec sum) const {
    const Real* x = term.x.p + place * term.x.row;
    const Real* w = term.w + tap * out_row_ + static_cast<long>(v) * kWidth;
    for (int k = 0; k < groups_.in; ++k, w += taps_ * out_row_)
      sum = fma(inputs(x, v, k), load(w), sum);
    return sum;
  }
  Vec add_back(const Term& term, long place, int v, int tap, Vec sum) const {
    const Real* d = term.x.p + place * term.x.row;
    for (int j = 0; j < groups_.out; ++j) {
      const Vec from = is_depthwise()
                           ? load(d + static_cast<long>(v) * kWidth)
                           : Access::gathered(v, layer_.in.channels, [&](int input) {
                               return d + static_cast<long>(groups_.output(input, j)) * kElement;
                             });
      sum = fma(from, Access::grouped_weight(term, groups_, taps_, in_row_, out_row_, tap, v, j),
                sum);
    }
    return sum;
  }

  Vec sum_of(const Matrix (*pairs)[2], int count, int k, int tap, int v) const {
    const Axis down = rows_of(layer_, false), across = columns_of(layer_, false);
    const int ky = tap / across.taps, kx = tap % across.taps;
    Vec sum = zero();
    for (int i = 0; i < count; ++i)
      for (int y = 0; y < layer_.out.height; ++y)
        for (int x = 0; x < layer_.out.width; ++x) {
          const int from_y = down.at(y, ky), from_x = across.at(x, kx);
          if (from_y < 0 || from_x < 0) continue;
          const long from = static_cast<long>(from_y * layer_.in.width + from_x) * images_;
          const long at = static_cast<long>(y * layer_.out.width + x) * images_;
          for (int image = 0; image < images_; ++image)
            sum = fma(inputs(pairs[i][0].p + (from + image) * pairs[i][0].row, v, k),
                      load(pairs[i][1].p + (at + image) * pairs[i][1].row +
                           static_cast<long>(v) * kWidth),
                      sum);
        }
    return sum;
  }

  const Layer& layer_;
  const int images_, taps_;
  const Groups groups_;
  const long in_row_, out_row_;
};

PYMETA_KERNEL_END
