// Convolutions of 3x3 taps by Winograd's F(2x2, 3x3) (Lavin and Gray 2016), tile by tile of 2x2 outputs:
//   Y = A^T [sum over inputs of (G W G^T) * (B^T X B)] A      B^T = 1  0 -1  0    G = 1    0    0     A^T = 1 1  1  0
//   gW = G^T [sum over tiles of (B^T X B) * (A D A^T)] G            0  1  1  0        1/2  1/2  1/2         0 1 -1 -1
// X [4, 4] are a tile's inputs, D [2, 2] the deltas of its        0 -1  1  0        1/2 -1/2  1/2
// outputs, * is element by element.                               0  1  0 -1        0    0    1
//
// Each of the 16 elements is a small product of its own over tiles and images, [rows, in] [in, out]. All of it is linear in X and
// in W, so that tangents are the same sums with two terms, and the delta at the input is the same with the taps turned round:
// which exchanges the first and the last row and column of G W G^T, and no more.
//
// Tiles are taken in blocks, so that what is transformed is still in the cache for the products. An output's element is one
// chain of multiply-adds over the inputs, a gradient's one over tiles and images, whatever the blocks: their size is of no
// consequence to bits. Transforms add in an order of their own; where all terms of a sum have one sign and size they lose no more than
// direct sums, of independent terms 5/3 as much (the root of what A^T, B^T and G do to a variance, (5/3)^2).
#pragma once

#include "../core/layers/winograd.h"
#include "convolution.h"

PYMETA_KERNEL_BEGIN

template <class Access>
class WinogradProducts {
 public:
  // `scratch` is room for scratch_scalars().
  WinogradProducts(const Layer& layer, const Extent& set, Real* scratch)
      : layer_(layer),
        images_(set.rows),
        in_row_(row_of(layer.in)),
        out_row_(row_of(layer.out)),
        scratch_(scratch) {}

  static std::size_t scratch_scalars(const Layer& layer, int images) {
    // of sets of as many images or fewer
    const std::size_t rows = static_cast<std::size_t>(images > kBlockRows ? images : kBlockRows);
    const std::size_t row = static_cast<std::size_t>(widest(layer));
    return kElements * (3 * rows * row + 2 * weight_scalars(layer));
  }

  // As in ConvolutionProducts.
  void apply(const Term* terms, int count, const Real* bias, const Epilogue& to,
             bool to_output) const {
    if (images_ == 0) return;
    const Grid from = grid(to_output ? layer_.out : layer_.in, to_output ? out_row_ : in_row_);
    const Grid into = grid(to_output ? layer_.in : layer_.out, to_output ? in_row_ : out_row_);
    const Offset offset = to_output ? Offset{2 - layer_.window.top, 2 - layer_.window.left}
                                    : Offset{layer_.window.top, layer_.window.left};
    Arrays a = arrays(from.row, into.row);
    for (int i = 0; i < count; ++i) transform_weight(terms[i], to_output, a.weight[i]);
    for (int first = 0; first < into.tiles() && !is_stopped(); first += a.tiles) {
      const int tiles = least(a.tiles, into.tiles() - first);
      for (int i = 0; i < count; ++i)
        for (int t = 0; t < tiles; ++t)
          transform_tile(terms[i].x.p, from, into.tile(first + t), offset,
                         a.input[i] + t * images_ * from.row, a.input_plane);
      multiply_elements(a, tiles * images_, count, from.row, into, to_output);
      for (int t = 0; t < tiles; ++t)
        put_tile(a.output + t * images_ * into.row, a.output_plane, into, into.tile(first + t),
                 bias, to);
    }
  }

  void outer(const Matrix (*pairs)[2], int count, const Sink& sink) const {
    const Grid from = grid(layer_.in, in_row_), into = grid(layer_.out, out_row_);
    const Offset offset{layer_.window.top, layer_.window.left};
    Arrays a = arrays(in_row_, out_row_);
    Real* const sums = a.weight[0];
    bool is_first = true;
    for (int i = 0; i < count; ++i)
      for (int first = 0; first < into.tiles() && !is_stopped(); first += a.tiles) {
        const int tiles = least(a.tiles, into.tiles() - first);
        for (int t = 0; t < tiles; ++t) {
          transform_tile(pairs[i][0].p, from, into.tile(first + t), offset,
                         a.input[0] + t * images_ * in_row_, a.input_plane);
          transform_delta(pairs[i][1].p, into, into.tile(first + t),
                          a.output + t * images_ * out_row_, a.output_plane);
        }
        add_elements(a, tiles * images_, sums, is_first);
        is_first = false;
      }
    put_gradient(sums, sink);
  }

 private:
  static constexpr int kElements = 16;
  static constexpr bool kLanes = Access::kElement > 1;
  static constexpr int kBlockRows = 75;  // tiles times images in a block, at most, but for one tile

  struct Tile {
    int y, x;  // of its first output
  };
  struct Offset {
    int y, x;  // output (y, x) sees inputs (y - offset.y + k, x - offset.x + k)
  };
  // One side of the convolution.
  struct Grid {
    Shape shape;
    long row;    // scalars of an image's position
    long place;  // of a position, all images
    int tiles_x, tiles_y;

    int tiles() const { return tiles_x * tiles_y; }
    Tile tile(int i) const { return {i / tiles_x * 2, i % tiles_x * 2}; }
    long at(int y, int x) const { return static_cast<long>(y * shape.width + x) * place; }
  };
  // [16, rows, row] of a block each: transformed inputs of each term, products; transformed weights [16, weight] of each.
  struct Arrays {
    Real *input[2], *output, *weight[2];
    long input_plane, output_plane;
    int tiles;
  };

  static int least(int a, int b) { return a < b ? a : b; }
  static long row_of(const Shape& shape) {
    return static_cast<long>(Access::vectors(shape.channels)) * kWidth;
  }
  static long widest(const Layer& layer) {
    const long in = row_of(layer.in), out = row_of(layer.out);
    return in > out ? in : out;
  }
  static std::size_t weight_scalars(const Layer& layer) {
    const long forward = layer.in.channels * row_of(layer.out);
    const long back = layer.out.channels * row_of(layer.in);
    return static_cast<std::size_t>(forward > back ? forward : back);
  }
  static int tiles_in_block(int images) {
    return images > 0 && images < kBlockRows ? kBlockRows / images : 1;
  }

  Grid grid(const Shape& shape, long row) const {
    return {shape, row, row * images_, (shape.width + 1) / 2, (shape.height + 1) / 2};
  }
  Arrays arrays(long from_row, long into_row) const {
    Arrays a;
    a.tiles = tiles_in_block(images_);
    const long rows = static_cast<long>(a.tiles) * images_;
    a.input_plane = rows * from_row;
    a.output_plane = rows * into_row;
    a.input[0] = scratch_;
    a.input[1] = a.input[0] + kElements * rows * widest(layer_);
    a.output = a.input[1] + kElements * rows * widest(layer_);
    a.weight[0] = a.output + kElements * rows * widest(layer_);
    a.weight[1] = a.weight[0] + kElements * static_cast<long>(weight_scalars(layer_));
    return a;
  }

  // G W G^T. Of rows on the way back [out, stride(in)] of the transposed weight, else [in, stride(out)].
  void transform_weight(const Term& term, bool to_output, Real* transformed) const {
    const int in = layer_.in.channels, out = layer_.out.channels;
    if (to_output && !kLanes)
      transform_lines(term.w_transposed, out, in_row_, out * in_row_, transformed);
    else
      transform_lines(term.w, in, kTaps * out_row_, out_row_, transformed, out_row_);
  }
  static constexpr int kTaps = 9;
  static void transform_lines(const Real* w, int lines, long line, long tap, Real* to) {
    transform_lines(w, lines, line, tap, to, line);
  }
  // Lines of `length` scalars, `line` apart; the same under the next tap is `tap` further.
  PYMETA_NOINLINE static void transform_lines(const Real* w, int lines, long line, long tap,
                                              Real* to, long length) {
    const Vec half = broadcast(Real(0.5));
    const long plane = lines * length;
    for (int l = 0; l < lines; ++l)
      for (long e = 0; e < length; e += kWidth) {
        const Real* from = w + l * line + e;
        Vec once[4][3];
#pragma GCC unroll 3
        for (int x = 0; x < 3; ++x) {
          const Vec top = load(from + x * tap), middle = load(from + (3 + x) * tap),
                    bottom = load(from + (6 + x) * tap);
          widen(top, middle, bottom, half, once[0][x], once[1][x], once[2][x], once[3][x]);
        }
        Real* const out = to + l * length + e;
#pragma GCC unroll 4
        for (int y = 0; y < 4; ++y) {
          Vec g[4];
          widen(once[y][0], once[y][1], once[y][2], half, g[0], g[1], g[2], g[3]);
#pragma GCC unroll 4
          for (int x = 0; x < 4; ++x) store(out + (4 * y + x) * plane, g[x]);
        }
      }
  }
  // Three taps to four elements; turned round they give the same four, the first and the last exchanged.
  static void widen(Vec a, Vec b, Vec c, Vec half, Vec& first, Vec& second, Vec& third,
                    Vec& fourth) {
    const Vec outer = (a + c) * half, inner = b * half;
    first = a;
    second = outer + inner;
    third = outer - inner;
    fourth = c;
  }
  static int turned(int element) {
    const auto other = [](int i) { return i == 0 ? 3 : i == 3 ? 0 : i; };
    return 4 * other(element / 4) + other(element % 4);
  }

  // B^T X B of all images.
  void transform_tile(const Real* x, const Grid& from, const Tile& tile, const Offset& offset,
                      Real* to, long plane) const {
    const int y = tile.y - offset.y, x_at = tile.x - offset.x;
    const bool inside =
        y >= 0 && x_at >= 0 && y + 4 <= from.shape.height && x_at + 4 <= from.shape.width;
    if (inside)
      transform_inputs<true>(x, from, y, x_at, to, plane);
    else
      transform_inputs<false>(x, from, y, x_at, to, plane);
  }
  template <bool kInside>
  PYMETA_NOINLINE static void transform_inputs(const Real* x, const Grid& from, int y, int x_at,
                                               Real* to, long plane) {
    const auto is_there = [&](int i, int j) {
      return kInside || (y + i >= 0 && y + i < from.shape.height && x_at + j >= 0 &&
                         x_at + j < from.shape.width);
    };
    for (long e = 0; e < from.place; e += kWidth) {
      Vec once[4][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Vec in[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          in[i] = is_there(i, j) ? load(x + from.at(y + i, x_at + j) + e) : zero();
        once[0][j] = in[0] - in[2];
        once[1][j] = in[1] + in[2];
        once[2][j] = in[2] - in[1];
        once[3][j] = in[1] - in[3];
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Real* const out = to + 4 * i * plane + e;
        store(out, once[i][0] - once[i][2]);
        store(out + plane, once[i][1] + once[i][2]);
        store(out + 2 * plane, once[i][2] - once[i][1]);
        store(out + 3 * plane, once[i][1] - once[i][3]);
      }
    }
  }

  // A D A^T
  PYMETA_NOINLINE static void transform_delta(const Real* d, const Grid& of, const Tile& tile,
                                              Real* to, long plane) {
    const bool has_right = tile.x + 1 < of.shape.width, has_below = tile.y + 1 < of.shape.height;
    const Real* first = d + of.at(tile.y, tile.x);
    const long right = of.place, below = of.at(1, 0);
    for (long e = 0; e < of.place; e += kWidth) {
      const Vec a = load(first + e), b = has_right ? load(first + right + e) : zero();
      const Vec c = has_below ? load(first + below + e) : zero();
      const Vec f = has_right && has_below ? load(first + below + right + e) : zero();
      const Vec rows[4][2] = {{a, b}, {a + c, b + f}, {a - c, b - f}, {-c, -f}};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Real* const out = to + 4 * i * plane + e;
        store(out, rows[i][0]);
        store(out + plane, rows[i][0] + rows[i][1]);
        store(out + 2 * plane, rows[i][0] - rows[i][1]);
        store(out + 3 * plane, -rows[i][1]);
      }
    }
  }

  // The 16 products, of the terms together.
  void multiply_elements(const Arrays& a, int rows, int count, long from_row, const Grid& into,
                         bool to_output) const {
    const int depth = to_output ? layer_.out.channels : layer_.in.channels;
    // where the weight is not transposed, its rows are the outputs
    const bool by_rows = to_output && kLanes;
    const long plane =
        (to_output && !kLanes) ? layer_.out.channels * in_row_ : layer_.in.channels * out_row_;
    for (int g = 0; g < kElements; ++g) {
      Segment segments[2];
      for (int i = 0; i < count; ++i) {
        const Real* w = a.weight[i] + (to_output ? turned(g) : g) * plane;
        segments[i] = {a.input[i] + g * a.input_plane,
                       from_row,
                       Access::kElement,
                       w,
                       by_rows ? kWidth : into.row,
                       by_rows ? out_row_ : kWidth,
                       depth};
      }
      const Product product{rows, Access::vectors(into.shape.channels), segments, count};
      multiply<Access>(product,
                       accumulate(a.output + g * a.output_plane, into.row, nullptr, nullptr, 1));
    }
  }

  // A^T M A of a tile, all images.
  PYMETA_NOINLINE void put_tile(const Real* products, long plane, const Grid& into,
                                const Tile& tile, const Real* bias, const Epilogue& to) const {
    const int vectors = static_cast<int>(into.row / kWidth);
    const bool has_right = tile.x + 1 < into.shape.width,
               has_below = tile.y + 1 < into.shape.height;
    const int row = (tile.y * into.shape.width + tile.x) * images_;
    const int below = into.shape.width * images_;
    for (int image = 0; image < images_; ++image)
      for (int v = 0; v < vectors; ++v) {
        const Real* from = products + image * into.row + static_cast<long>(v) * kWidth;
        const Vec start = bias ? load(bias + static_cast<long>(v) * kWidth) : zero();
        Vec once[2][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          Vec m[4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) m[i] = load(from + (4 * i + j) * plane);
          once[0][j] = m[0] + m[1] + m[2];
          once[1][j] = m[1] - m[2] - m[3];
        }
        const auto put = [&](const Vec(&m)[4], int at) {
          to(m[0] + m[1] + m[2] + start, at, v);
          if (has_right) to(m[1] - m[2] - m[3] + start, at + images_, v);
        };
        put(once[0], row + image);
        if (has_below) put(once[1], row + below + image);
      }
  }

  // sums += V^T D of each element
  void add_elements(const Arrays& a, int rows, Real* sums, bool is_first) const {
    const long plane = layer_.in.channels * out_row_;
    for (int g = 0; g < kElements; ++g) {
      const Segment segment{a.input[0] + g * a.input_plane,
                            Access::kElement,
                            in_row_,
                            a.output + g * a.output_plane,
                            out_row_,
                            kWidth,
                            rows};
      Real* const sum = sums + g * plane;
      const Product product{layer_.in.channels,
                            Access::vectors(layer_.out.channels),
                            &segment,
                            1,
                            is_first ? nullptr : sum,
                            out_row_};
      multiply<Access>(product, accumulate(sum, out_row_, nullptr, nullptr, 1));
    }
  }

  // G^T M G
  PYMETA_NOINLINE void put_gradient(const Real* sums, const Sink& sink) const {
    const Vec half = broadcast(Real(0.5));
    const long plane = layer_.in.channels * out_row_;
    const Epilogue into = accumulate(sink.out, out_row_, sink.base, sink.extra, sink.scale);
    const auto narrow = [&](Vec a, Vec b, Vec c, Vec d, Vec(&to)[3]) {
      const Vec both = (b + c) * half;
      to[0] = a + both;
      to[1] = (b - c) * half;
      to[2] = both + d;
    };
    for (int in = 0; in < layer_.in.channels; ++in)
      for (int v = 0; v < Access::vectors(layer_.out.channels); ++v) {
        const Real* from = sums + in * out_row_ + static_cast<long>(v) * kWidth;
        const auto element = [&](int i, int j) { return load(from + (4 * i + j) * plane); };
        Vec once[4][3];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          narrow(element(0, j), element(1, j), element(2, j), element(3, j), once[j]);
#pragma GCC unroll 3
        for (int y = 0; y < 3; ++y) {
          Vec taps[3];
          narrow(once[0][y], once[1][y], once[2][y], once[3][y], taps);
#pragma GCC unroll 3
          for (int x = 0; x < 3; ++x) into(taps[x], in * kTaps + 3 * y + x, v);
        }
      }
  }

  const Layer& layer_;
  const int images_;
  const long in_row_, out_row_;
  Real* const scratch_;
};

PYMETA_KERNEL_END
