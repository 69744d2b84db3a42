// Between torch's order of an image's features, [channels, height, width] in one row, and rows of channels position by
// position: Image is the first layer of a chain that begins with images or sequences, Flatten leads to a linear one. Both
// only move numbers, and so do their tangents.
#pragma once

#include "layer.h"

namespace pymeta {

struct ImageSpec {
  static constexpr const char* kName = "image";
  static constexpr const char* kArguments = "ncn";  // channels, height or 0 of a sequence, width
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    const int height = static_cast<int>(arguments[1]);
    const Shape out{height > 0 ? height : 1, static_cast<int>(arguments[2]),
                    static_cast<int>(arguments[0])};
    builder.append_turned(out, /*flattens=*/false);
  }
};

// The same as a module of torch's, behind rows of features.
struct UnflattenSpec : ImageSpec {
  static constexpr const char* kName = "unflatten";
};

struct FlattenSpec {
  static constexpr const char* kName = "flatten";
  static constexpr const char* kArguments = "";
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double*) {
    builder.append_turned(builder.shape(), /*flattens=*/true);
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// Are numbers moved, and nothing else done on their way? Of several channels and positions an executor may have a faster way.
PYMETA_FN inline bool is_transposition(const Extent& set, const Shape& image,
                                       const Destination& to) {
  const bool plain = !to.relu && !to.gate && !set.keep;
  return plain && set.rows > 0 && image.channels > 1 && image.positions() > 1;
}

// From rows of features to positions of channels.
template <class X>
PYMETA_FN PYMETA_NOINLINE void to_positions(const Extent& set, const Shape& image, const Matrix& x,
                                            const Destination& to) {
  if constexpr (X::kTransposes)
    if (is_transposition(set, image, to)) return X::to_positions(image, set.rows, x, to.p);
  const int positions = image.positions();
  X::with_epilogue(to, X::stride(image.channels), over(set, image), [&](const auto& emit) {
    X::map_positions(set, image, [&](long, int vector, int row, int y, int x_at, int own) {
      const Real* from = x.p + own * x.row;
      const int position = y * image.width + x_at;
      emit(X::gathered(vector, image.channels,
                       [=](int channel) {
                         return from +
                                static_cast<long>(channel * positions + position) * X::kElement;
                       }),
           row, vector);
    });
  });
}

// Where consecutive features lie: channel by channel, in each position by position. One division for all of them.
class FeaturePlaces {
 public:
  PYMETA_FN explicit FeaturePlaces(int positions) : positions_(positions) {}

  PYMETA_FN void next(int feature) {
    if (channel < 0) {
      channel = feature / positions_;
      position = feature % positions_;
    } else if (++position == positions_) {
      position = 0;
      ++channel;
    }
  }
  int channel = -1, position = 0;

 private:
  const int positions_;
};

// And back.
template <class X>
PYMETA_FN PYMETA_NOINLINE void to_features(const Extent& set, const Shape& image, const Real* z,
                                           const Destination& to) {
  if constexpr (X::kTransposes)
    if (is_transposition(set, image, to)) return X::to_features(image, set.rows, z, to.p);
  const int positions = image.positions(), features = image.features();
  const long row = X::stride(image.channels);
  X::with_epilogue(to, X::stride(features), set, [&](const auto& emit) {
    X::map(set, features, [&](long, long column, int r) {
      const int vector = static_cast<int>(column / kWidth);
      FeaturePlaces at(positions);
      emit(X::gathered(vector, features,
                       [&](int feature) {
                         at.next(feature);
                         const long place = static_cast<long>(at.position) * set.rows + r;
                         return z + place * row + static_cast<long>(at.channel) * X::kElement;
                       }),
           r, vector);
    });
  });
}

template <class X, bool kFlattens>
struct Rearrangement {
  static constexpr bool kTransposesWeight = false;
  static constexpr bool kReadsRowsInPlace = !kFlattens;
  static constexpr bool kForgetsInput = true;

  PYMETA_FN static PackedTensor packed_weight(const Layer&) { return {}; }
  PYMETA_FN static std::size_t kept_scalars(const Layer&, int, int) { return 0; }

  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) { move(p, p.x, to); }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    move_back(p, p.d, below);
  }
  PYMETA_FN static void gradient(const LayerPass&, const Sink&, const Sink&) {}

  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    if (t.rx.p) return move(p, t.rx, to);
    Real* rz = to.p;
    X::map(over(p.extent, p.layer.out), p.layer.out.channels,
           [&](long at, long, int) { store(rz + at, zero()); });
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    move_back(p, t.rd, below);
  }
  PYMETA_FN static void tangent_gradient(const LayerPass&, const LayerTangent&, const Sink&,
                                         const Sink&) {}

  static double work(const Layer& layer, const Effort& effort) {
    return elementwise_work<X>(layer, effort);
  }

 private:
  PYMETA_FN static void move(const LayerPass& p, const Matrix& x, const Destination& to) {
    if constexpr (kFlattens)
      to_features<X>(p.extent, p.layer.in, x.p, to);
    else
      to_positions<X>(p.extent, p.layer.out, x, to);
  }
  PYMETA_FN static void move_back(const LayerPass& p, const Real* d, const Destination& below) {
    if constexpr (kFlattens)
      to_positions<X>(p.extent, p.layer.in, {d, X::stride(p.layer.out.channels)}, below);
    else
      to_features<X>(p.extent, p.layer.out, d, below);
  }
};

template <class X>
struct Image : Rearrangement<X, /*kFlattens=*/false> {};
template <class X>
struct Unflatten : Rearrangement<X, /*kFlattens=*/false> {};
template <class X>
struct Flatten : Rearrangement<X, /*kFlattens=*/true> {};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
