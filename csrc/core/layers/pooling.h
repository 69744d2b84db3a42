// Pooling over sequences and images, each channel by itself. MaxPool keeps which tap won, the first of equals and a NaN
// whatever there is, as torch has it; gradients and tangents go the same way. AvgPool is linear.
#pragma once

#include "layer.h"
#include "taps.h"

namespace pymeta {

// (kernel y x, stride y x, top, bottom, left, right, dilation y x)
template <class Builder>
Layer& add_pooling(Builder& builder, const double* arguments) {
  const Shape in = builder.shape();
  const Window window = builder.window(arguments);
  Layer& layer = builder.append(in, builder.windowed(in, window, arguments + 4, in.channels));
  layer.window = window;
  return layer;
}

template <class Of>  // sequences and images differ in their modules' names only
struct PooledImages : Of {
  static constexpr const char* kName = Of::kImages;
};

struct MaxPool1dSpec {
  static constexpr const char *kName = "max_pool1d", *kImages = "max_pool2d";
  static constexpr const char* kArguments = "nnnnccccnn";
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    if (builder.fuse_pooling(builder.window(arguments), arguments + 4)) return;
    const Activation relu = builder.take_relu();
    add_pooling(builder, arguments).activation = relu;
  }
};

struct AvgPool1dSpec {
  static constexpr const char *kName = "avg_pool1d", *kImages = "avg_pool2d";
  static constexpr const char* kArguments = "nnnnccccnnc";  // and what to divide by, or 0
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    add_pooling(builder, arguments).window.divisor = static_cast<int>(arguments[10]);
  }
};

// The mean over all positions.
struct GlobalAvgPool1dSpec {
  static constexpr const char *kName = "global_avg_pool1d", *kImages = "global_avg_pool2d";
  static constexpr const char* kArguments = "";
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double*) {
    const Shape in = builder.shape();
    Layer& layer = builder.append(in, {1, 1, in.channels});
    layer.window.height = in.height;
    layer.window.width = in.width;
    layer.window.divisor = in.positions();
  }
};
// To so many positions, each of as many neighbours, where the sizes can be divided so.
template <class Builder>
Layer& add_adaptive_pooling(Builder& builder, int height, int width) {
  const Shape in = builder.shape();
  if (in.height % height != 0 || in.width % width != 0)
    builder.refuse("an adaptive pooling whose outputs do not divide the positions");
  Layer& layer = builder.append(in, {height, width, in.channels});
  Window& window = layer.window;
  window.height = window.stride_y = in.height / height;
  window.width = window.stride_x = in.width / width;
  window.divisor = window.taps();
  return layer;
}
template <const char* kSpelling>
struct AdaptivePool1dSpec {
  static constexpr const char* kName = kSpelling;
  static constexpr const char* kArguments = "n";  // length
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    add_adaptive_pooling(builder, 1, static_cast<int>(arguments[0]));
  }
};
template <const char* kSpelling>
struct AdaptivePool2dSpec {
  static constexpr const char* kName = kSpelling;
  static constexpr const char* kArguments = "nn";  // height, width
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    add_adaptive_pooling(builder, static_cast<int>(arguments[0]), static_cast<int>(arguments[1]));
  }
};
inline constexpr char kAdaptiveAvg1d[] = "adaptive_avg_pool1d",
                      kAdaptiveAvg2d[] = "adaptive_avg_pool2d",
                      kAdaptiveMax1d[] = "adaptive_max_pool1d",
                      kAdaptiveMax2d[] = "adaptive_max_pool2d";
using AdaptiveAvgPool1dSpec = AdaptivePool1dSpec<kAdaptiveAvg1d>;
using AdaptiveAvgPool2dSpec = AdaptivePool2dSpec<kAdaptiveAvg2d>;
using AdaptiveMaxPool1dSpec = AdaptivePool1dSpec<kAdaptiveMax1d>;
using AdaptiveMaxPool2dSpec = AdaptivePool2dSpec<kAdaptiveMax2d>;
using MaxPool2dSpec = PooledImages<MaxPool1dSpec>;
using AvgPool2dSpec = PooledImages<AvgPool1dSpec>;
using GlobalAvgPool2dSpec = PooledImages<GlobalAvgPool1dSpec>;

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// Visits the inputs that output (y, x) sees: visit(tap, position).
template <class Visitor>
PYMETA_FN void for_inputs(const Layer& layer, int y, int x, Visitor visit) {
  const Axis down = rows_of(layer, false), across = columns_of(layer, false);
  for (int ky = 0; ky < down.taps; ++ky) {
    const int from_y = down.at(y, ky);
    if (from_y < 0) continue;
    for (int kx = 0; kx < across.taps; ++kx) {
      const int from_x = across.at(x, kx);
      if (from_x >= 0) visit(ky * across.taps + kx, from_y * layer.in.width + from_x);
    }
  }
}

// The outputs along an axis that may see input i: from first to last; under which tap they do, or -1.
struct Seers {
  int first, last;

  PYMETA_FN Seers(const Axis& axis, int i) {
    const int reach = i + axis.before - (axis.taps - 1) * axis.dilation;
    first = reach > 0 ? (reach + axis.stride - 1) / axis.stride : 0;
    last = (i + axis.before) / axis.stride;
    if (last > axis.to - 1) last = axis.to - 1;
  }
  PYMETA_FN static int tap(const Axis& axis, int i, int o) {
    const int reach = i + axis.before - o * axis.stride;
    return reach % axis.dilation == 0 ? reach / axis.dilation : -1;
  }
};

// Visits the outputs that see input (y, x): visit(tap, position).
template <class Visitor>
PYMETA_FN void for_outputs(const Layer& layer, int y, int x, Visitor visit) {
  const Axis down = rows_of(layer, true), across = columns_of(layer, true);
  const Seers rows(down, y), columns(across, x);
  for (int to_y = rows.first; to_y <= rows.last; ++to_y) {
    const int ky = Seers::tap(down, y, to_y);
    if (ky < 0) continue;
    for (int to_x = columns.first; to_x <= columns.last; ++to_x) {
      const int kx = Seers::tap(across, x, to_x);
      if (kx >= 0) visit(ky * across.taps + kx, to_y * layer.out.width + to_x);
    }
  }
}

// Those inputs or outputs of a position, found once for all images and channels that lie there.
template <bool kOutputs>
class Neighbours {
 public:
  PYMETA_FN Neighbours(const Layer& layer, int y, int x) : layer_(layer), y_(y), x_(x) {
    if constexpr (!kTwoMemories)  // many positions side by side: each finds its own
      find([&](int tap, int position) {
        if (count_ < kMost) {
          taps_[count_] = tap;
          positions_[count_] = position;
        }
        ++count_;
      });
  }

  template <class Visitor>  // visit(tap, position)
  PYMETA_FN void operator()(Visitor visit) const {
    if constexpr (kTwoMemories) {
      find(visit);
    } else {
      if (count_ > kMost) return find(visit);
      for (int i = 0; i < count_; ++i) visit(taps_[i], positions_[i]);
    }
  }

 private:
  static constexpr int kMost = kTwoMemories ? 1 : 16;

  template <class Visitor>
  PYMETA_FN void find(Visitor visit) const {
    if constexpr (kOutputs)
      for_outputs(layer_, y_, x_, visit);
    else
      for_inputs(layer_, y_, x_, visit);
  }

  const Layer& layer_;
  const int y_, x_;
  int count_ = 0;
  int taps_[kMost], positions_[kMost];
};

// What the poolings share: Rules says how numbers go forth and back.
template <class X, class Rules>
struct Pooling {
  static constexpr bool kForgetsInput = true;
  static constexpr bool kTransposesWeight = false;
  static constexpr bool kReadsRowsInPlace = false;

  PYMETA_FN static PackedTensor packed_weight(const Layer&) { return {}; }

  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    spread(p, p.d, below);
  }
  PYMETA_FN static void gradient(const LayerPass&, const Sink&, const Sink&) {}
  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    if (t.rx.p) return Rules::gather(p, t.rx.p, to);
    Real* rz = to.p;
    X::map(over(p.extent, p.layer.out), p.layer.out.channels,
           [&](long at, long, int) { store(rz + at, zero()); });
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    spread(p, t.rd, below);
  }
  PYMETA_FN static void tangent_gradient(const LayerPass&, const LayerTangent&, const Sink&,
                                         const Sink&) {}

  static double work(const Layer& layer, const Effort& effort) {
    return elementwise_work<X>(layer, effort) * layer.window.taps();
  }

 protected:
  // To each input its share of the deltas of the outputs that see it.
  PYMETA_FN PYMETA_NOINLINE static void spread(const LayerPass& p, const Real* d,
                                               const Destination& below) {
    const Layer& layer = p.layer;
    const long row = X::stride(layer.in.channels), place = p.extent.rows * row;
    X::with_epilogue(below, row, over(p.extent, layer.in), [&](const auto& emit) {
      X::for_positions(p.extent, layer.in, [&](int y, int x, auto each) {
        const Neighbours<true> seers(layer, y, x);
        each([&](long, long offset, int r, int vector) {
          Vec sum = zero();
          seers([&](int tap, int position) {
            const long at = position * place + offset;
            sum = sum + Rules::share(p, load(d + at), at, tap, position);
          });
          emit(sum, r, vector);
        });
      });
    });
  }
};

// Its own array: the tap that won [positions, rows, channels].
template <class X>
struct MaxPool : Pooling<X, MaxPool<X>> {
  PYMETA_FN static std::size_t kept_scalars(const Layer& layer, int rows, int i) {
    return i == 0 ? matrix_scalars<X>(rows, layer.out) : 0;
  }

  PYMETA_FN PYMETA_NOINLINE static void forward(const LayerPass& p, const Destination& to) {
    const Layer& layer = p.layer;
    const long row = X::stride(layer.in.channels), place = p.extent.rows * row;
    Real* winner = p.kept[0];
    const Real* from = p.x.p;
    X::with_epilogue(to, row, over(p.extent, layer.out), [&](const auto& emit) {
      X::for_positions(p.extent, layer.out, [&](int y, int x, auto each) {
        const Neighbours<false> seen(layer, y, x);
        each([&](long at, long offset, int r, int vector) {
          Vec best = broadcast(-Real(__builtin_inf())), won = zero();
          bool is_first = true;
          seen([&](int tap, int position) {
            const Vec v = load(from + position * place + offset);
            const Vec number = broadcast(Real(tap));
            const auto better = (v > best) | (v != v);
            won = is_first ? number : select(better, number, won);
            best = is_first ? v : select(better, v, best);
            is_first = false;
          });
          store(winner + at, won);
          emit(best, r, vector);
        });
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void gather(const LayerPass& p, const Real* from,
                                               const Destination& to) {
    const Layer& layer = p.layer;
    const long row = X::stride(layer.in.channels), place = p.extent.rows * row;
    const Real* winner = p.kept[0];
    X::with_epilogue(to, row, over(p.extent, layer.out), [&](const auto& emit) {
      X::for_positions(p.extent, layer.out, [&](int y, int x, auto each) {
        const Neighbours<false> seen(layer, y, x);
        each([&](long at, long offset, int r, int vector) {
          const Vec won = load(winner + at);
          Vec value = zero();
          seen([&](int tap, int position) {
            const Vec v = load(from + position * place + offset);
            value = select(won == broadcast(Real(tap)), v, value);
          });
          emit(value, r, vector);
        });
      });
    });
  }

  PYMETA_FN static Vec share(const LayerPass& p, Vec d, long at, int tap, int) {
    return select(load(p.kept[0] + at) == broadcast(Real(tap)), d, zero());
  }
};

template <class X>
struct AvgPool : Pooling<X, AvgPool<X>> {
  PYMETA_FN static std::size_t kept_scalars(const Layer&, int, int) { return 0; }

  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) { gather(p, p.x.p, to); }
  PYMETA_FN PYMETA_NOINLINE static void gather(const LayerPass& p, const Real* from,
                                               const Destination& to) {
    const Layer& layer = p.layer;
    const long row = X::stride(layer.in.channels), place = p.extent.rows * row;
    X::with_epilogue(to, row, over(p.extent, layer.out), [&](const auto& emit) {
      X::for_positions(p.extent, layer.out, [&](int y, int x, auto each) {
        const Neighbours<false> seen(layer, y, x);
        const Vec count = broadcast(divisor(layer, y, x));
        each([&](long, long offset, int r, int vector) {
          Vec sum = zero();
          seen([&](int, int position) { sum = sum + load(from + position * place + offset); });
          emit(sum / count, r, vector);
        });
      });
    });
  }

  PYMETA_FN static Vec share(const LayerPass& p, Vec d, long, int, int position) {
    const int width = p.layer.out.width;
    return d / broadcast(divisor(p.layer, position / width, position % width));
  }

 private:
  PYMETA_FN static Real divisor(const Layer& layer, int y, int x) {
    if (layer.window.divisor > 0) return Real(layer.window.divisor);
    return Real(inputs(rows_of(layer, false), y) * inputs(columns_of(layer, false), x));
  }
  PYMETA_FN static int inputs(const Axis& axis, int i) {
    int count = 0;
    for (int k = 0; k < axis.taps; ++k) count += axis.at(i, k) >= 0;
    return count;
  }
};

template <class X>
struct MaxPool1d : MaxPool<X> {};
template <class X>
struct MaxPool2d : MaxPool<X> {};
template <class X>
struct AvgPool1d : AvgPool<X> {};
template <class X>
struct AvgPool2d : AvgPool<X> {};
template <class X>
struct GlobalAvgPool1d : AvgPool<X> {};
template <class X>
struct GlobalAvgPool2d : AvgPool<X> {};
template <class X>
struct AdaptiveAvgPool1d : AvgPool<X> {};
template <class X>
struct AdaptiveAvgPool2d : AvgPool<X> {};
template <class X>
struct AdaptiveMaxPool1d : MaxPool<X> {};
template <class X>
struct AdaptiveMaxPool2d : MaxPool<X> {};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
