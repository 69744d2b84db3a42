// Zeros around the positions of a sequence or an image, and parts of its positions: every output is one input, or zero. Both
// are a window of one tap, whose left and top say how far positions move; negative ones cut off.
//
// Next to a convolution they are none of their own: the builder makes its window see what they would have given it. So
// a causal convolution is one layer, whether its zeros are put in front or its last outputs are cut off.
#pragma once

#include "layer.h"
#include "taps.h"

namespace pymeta {

// (top, bottom, left, right), zeros or, where negative, what is cut off.
struct ZeroPadSpec {
  static constexpr const char* kName = "zero_pad";
  static constexpr const char* kArguments = "iiii";
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    const auto number = [=](int i) { return static_cast<int>(arguments[i]); };
    const Shape in = builder.shape();
    Window window;
    window.top = number(0), window.left = number(2);
    const Shape out = builder.windowed(in, window, arguments, in.channels);
    bool cuts = true;
    for (int side = 0; side < 4; ++side) cuts = cuts && arguments[side] <= 0;
    builder.append_moved(out, window, cuts);
  }
};

// (first, end, step) of the rows, then of the columns: as a slice of Python's.
struct SliceSpec {
  static constexpr const char* kName = "slice";
  static constexpr const char* kArguments = "iiniin";
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    const Shape in = builder.shape();
    Window window;
    Shape out = in;
    out.height = part(in.height, arguments, window.top, window.stride_y);
    out.width = part(in.width, arguments + 3, window.left, window.stride_x);
    if (out.height < 1 || out.width < 1) builder.refuse("a slice without positions");
    builder.append_moved(out, window, /*cuts=*/true);
  }

 private:
  // How many of `size` positions are left, of which first, how far apart.
  static int part(int size, const double* slice, int& before, int& stride) {
    const auto clamped = [=](double i) {
      const double at = i < 0 ? i + size : i;
      return static_cast<int>(at < 0 ? 0 : at > size ? size : at);
    };
    const int first = clamped(slice[0]), end = clamped(slice[1]);
    before = -first;
    stride = static_cast<int>(slice[2]);
    return end > first ? (end - first - 1) / stride + 1 : 0;
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class X>
struct Moved {
  static constexpr bool kTransposesWeight = false;
  static constexpr bool kReadsRowsInPlace = false;
  static constexpr bool kForgetsInput = true;

  PYMETA_FN static PackedTensor packed_weight(const Layer&) { return {}; }
  PYMETA_FN static std::size_t kept_scalars(const Layer&, int, int) { return 0; }

  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    move(p, p.x.p, /*to_output=*/false, to);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    move(p, p.d, /*to_output=*/true, below);
  }
  PYMETA_FN static void gradient(const LayerPass&, const Sink&, const Sink&) {}

  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    if (t.rx.p) return move(p, t.rx.p, /*to_output=*/false, to);
    clear<X>(over(p.extent, p.layer.out), p.layer.out.channels, to.p);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    move(p, t.rd, /*to_output=*/true, below);
  }
  PYMETA_FN static void tangent_gradient(const LayerPass&, const LayerTangent&, const Sink&,
                                         const Sink&) {}

  static double work(const Layer& layer, const Effort& effort) {
    return elementwise_work<X>(layer, effort);
  }

 private:
  // To each position what the other side has there, or zeros.
  PYMETA_FN PYMETA_NOINLINE static void move(const LayerPass& p, const Real* from, bool to_output,
                                             const Destination& to) {
    const Layer& layer = p.layer;
    const Shape &shape = to_output ? layer.in : layer.out,
                &other = to_output ? layer.out : layer.in;
    const Axis down = rows_of(layer, to_output), across = columns_of(layer, to_output);
    const long row = X::stride(shape.channels), place = p.extent.rows * row;
    X::with_epilogue(to, row, over(p.extent, shape), [&](const auto& emit) {
      X::for_positions(p.extent, shape, [&](int y, int x, auto each) {
        const int from_y = down.at(y, 0), from_x = across.at(x, 0);
        if (from_y < 0 || from_x < 0)
          return each([&](long, long, int r, int vector) { emit(zero(), r, vector); });
        const Real* there = from + (static_cast<long>(from_y) * other.width + from_x) * place;
        each([&](long, long offset, int r, int vector) { emit(load(there + offset), r, vector); });
      });
    });
  }
};

template <class X>
struct ZeroPad : Moved<X> {};
template <class X>
struct Slice : Moved<X> {};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
