// Group normalisation (Wu and He 2018): every row by itself, over its positions and the channels of a group. With one channel
// a group it is an instance normalisation. The formulas are those of normalisation.h; sums over a group go channel by
// channel first, over the positions, and then over the group's channels in their order.
#pragma once

#include "normalisation.h"

namespace pymeta {

struct GroupNormSpec {
  static constexpr const char* kName = "group_norm";
  static constexpr const char* kArguments = "nnxbb";  // channels, groups, eps, gamma, beta
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    const int channels = static_cast<int>(arguments[0]), groups = static_cast<int>(arguments[1]);
    if (groups < 1 || channels % groups != 0)
      builder.refuse("a normalisation's groups do not divide its channels");
    const Shape shape = builder.shape(channels);
    Layer& layer = builder.append(shape, shape);
    layer.eps = arguments[2];
    layer.window.groups = groups;
    if (arguments[3] != 0) layer.weight = builder.tensor({1, channels, false});
    if (arguments[4] != 0) layer.bias = builder.tensor({1, channels, false});
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// Its own arrays: h on a tape and rh in a tangent pass [positions, rows, channels]; numbers of each row and group, one for
// each channel [rows, kSlots, channels].
template <class X>
struct GroupNorm {
  static constexpr bool kTransposesWeight = false;
  static constexpr bool kReadsRowsInPlace = false;
  enum Slot { kMean, kInverse, kMeanE, kMeanEh, kSlots };
  enum TangentSlot { kMeanRx, kQ, kMeanRe, kMeanR };

  PYMETA_FN static PackedTensor packed_weight(const Layer& layer) {
    return packed_vector<X>(layer.out.channels);
  }
  PYMETA_FN static std::size_t kept_scalars(const Layer& layer, int rows, int i) {
    if (i == 0) return matrix_scalars<X>(rows, layer.out);
    return static_cast<std::size_t>(rows) * kSlots * X::stride(layer.out.channels);
  }

  PYMETA_FN PYMETA_NOINLINE static void forward(const LayerPass& p, const Destination& to) {
    const Rows s(p, p.kept[1]);
    const Real* x = p.x.p;
    Real* kept_h = p.kept[0];
    X::with_epilogue(to, s.row, s.dense, [&](const auto& emit) {
      X::for_indices(s.rows, [&](int own) {
        const auto in = [&](long at, int) { return load(x + at); };
        s.group_mean(own, kMean, in);
        // Centred twice, as in normalisation.h; the slot of the inverse is for what the mean left over first.
        s.group_mean(own, kInverse,
                     [&](long at, int v) { return in(at, v) - s.at(own, kMean, v); });
        for (int v = 0; v < s.vectors; ++v)
          s.put(own, kMean, v, s.at(own, kMean, v) + s.at(own, kInverse, v));
        const auto centred = [&](long at, int v) { return in(at, v) - s.at(own, kMean, v); };
        s.group_mean(own, kInverse,
                     [&](long at, int v) { return centred(at, v) * centred(at, v); });
        for (int v = 0; v < s.vectors; ++v)
          s.put(own, kInverse, v,
                X::masked_columns(Real(1) / square_root(s.at(own, kInverse, v) + Real(p.layer.eps)),
                                  s.channels, v));
        s.for_positions(own, [&](long at, int row, int v) {
          const Vec h = s.dense.masked(centred(at, v) * s.at(own, kInverse, v), row);
          store(kept_h + at, h);
          emit(fma(h, feature(p.weight, v, 1), feature(p.bias, v, 0)), row, v);
        });
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void backward(const LayerPass& p, const Destination& below) {
    const Rows s(p, p.kept[1]);
    const Real* h = p.kept[0];
    X::with_epilogue(below, s.row, s.dense, [&](const auto& emit) {
      X::for_indices(s.rows, [&](int own) {
        const auto e = [&](long at, int v) { return load(p.d + at) * feature(p.weight, v, 1); };
        s.group_mean(own, kMeanE, e);
        s.group_mean(own, kMeanEh, [&](long at, int v) { return e(at, v) * load(h + at); });
        s.for_positions(own, [&](long at, int row, int v) {
          emit(norm_delta(s.at(own, kInverse, v), e(at, v), s.at(own, kMeanE, v), load(h + at),
                          s.at(own, kMeanEh, v)),
               row, v);
        });
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void gradient(const LayerPass& p, const Sink& weight,
                                                 const Sink& bias) {
    const Extent extent = over(p.extent, p.layer.out);
    const Real *d = p.d, *h = p.kept[0];
    X::sum_rows(extent, p.layer.out.channels, weight,
                [&](long at, long) { return load(d + at) * load(h + at); });
    sum_delta<X>(extent, p.layer.out.channels, d, bias);
  }

  PYMETA_FN PYMETA_NOINLINE static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                                        const Destination& to) {
    const Rows s(p, p.kept[1]), moved(p, t.kept[1]);
    const Real *rx = t.rx.p, *h = p.kept[0];
    Real* kept_rh = t.kept[0];
    X::with_epilogue(to, s.row, s.dense, [&](const auto& emit) {
      X::for_indices(s.rows, [&](int own) {
        const auto in = [&](long at, int) { return rx ? load(rx + at) : zero(); };
        moved.group_mean(own, kMeanRx, in);
        moved.group_mean(own, kQ, [&](long at, int v) { return in(at, v) * load(h + at); });
        for (int v = 0; v < s.vectors; ++v)
          moved.put(own, kQ, v, moved.at(own, kQ, v) * s.at(own, kInverse, v));
        s.for_positions(own, [&](long at, int row, int v) {
          const Vec rh =
              s.dense.masked((in(at, v) - moved.at(own, kMeanRx, v)) * s.at(own, kInverse, v) -
                                 load(h + at) * moved.at(own, kQ, v),
                             row);
          store(kept_rh + at, rh);
          const Vec shifted = fma(load(h + at), feature(t.weight, v, 0), feature(t.bias, v, 0));
          emit(fma(rh, feature(p.weight, v, 1), shifted), row, v);
        });
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                                         const Destination& below) {
    const Rows s(p, p.kept[1]), moved(p, t.kept[1]);
    const Real *h = p.kept[0], *rh = t.kept[0];
    X::with_epilogue(below, s.row, s.dense, [&](const auto& emit) {
      X::for_indices(s.rows, [&](int own) {
        const auto e = [&](long at, int v) { return load(p.d + at) * feature(p.weight, v, 1); };
        const auto re = [&](long at, int v) {
          return fma(load(p.d + at), feature(t.weight, v, 0),
                     load(t.rd + at) * feature(p.weight, v, 1));
        };
        // Once more: a tape that was brought back need not have the means of its backward pass.
        s.group_mean(own, kMeanE, e);
        s.group_mean(own, kMeanEh, [&](long at, int v) { return e(at, v) * load(h + at); });
        moved.group_mean(own, kMeanRe, re);
        moved.group_mean(own, kMeanR, [&](long at, int v) {
          return re(at, v) * load(h + at) + e(at, v) * load(rh + at);
        });
        s.for_positions(own, [&](long at, int row, int v) {
          const Vec inverse = s.at(own, kInverse, v), mean_eh = s.at(own, kMeanEh, v);
          const Vec dx = norm_delta(inverse, e(at, v), s.at(own, kMeanE, v), load(h + at), mean_eh);
          const Vec rest = re(at, v) - moved.at(own, kMeanRe, v) - load(rh + at) * mean_eh -
                           load(h + at) * moved.at(own, kMeanR, v);
          emit(inverse * rest - moved.at(own, kQ, v) * dx, row, v);
        });
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void tangent_gradient(const LayerPass& p, const LayerTangent& t,
                                                         const Sink& weight, const Sink& bias) {
    const Extent extent = over(p.extent, p.layer.out);
    const Real *d = p.d, *rd = t.rd, *h = p.kept[0], *rh = t.kept[0];
    X::sum_rows(extent, p.layer.out.channels, weight, [&](long at, long) {
      return fma(load(rd + at), load(h + at), load(d + at) * load(rh + at));
    });
    sum_delta<X>(extent, p.layer.out.channels, rd, bias);
  }

  static double work(const Layer& layer, const Effort& effort) {
    return elementwise_work<X>(layer, effort);
  }

 private:
  // The rows of a set, and the numbers of each.
  struct Rows {
    Extent dense;
    int rows, positions, channels, vectors, in_group;
    long row;
    Real* slots;

    PYMETA_FN Rows(const LayerPass& p, Real* kept)
        : dense(over(p.extent, p.layer.out)),
          rows(p.extent.rows),
          positions(p.layer.out.positions()),
          channels(p.layer.out.channels),
          vectors(X::vectors(p.layer.out.channels)),
          in_group(p.layer.out.channels / p.layer.window.groups),
          row(X::stride(p.layer.out.channels)),
          slots(kept) {}

    PYMETA_FN Real* slot(int own, int number) const {
      return slots + (static_cast<long>(own) * kSlots + number) * row;
    }
    PYMETA_FN Vec at(int own, int number, int v) const {
      return load(slot(own, number) + static_cast<long>(v) * kWidth);
    }
    PYMETA_FN void put(int own, int number, int v, Vec value) const {
      store(slot(own, number) + static_cast<long>(v) * kWidth, value);
    }
    template <class Body>  // body(offset into the matrix, row of it, vector of channels)
    PYMETA_FN void for_positions(int own, Body body) const {
      for (int position = 0; position < positions; ++position)
        for (int v = 0; v < vectors; ++v) {
          const int r = position * rows + own;
          body(r * row + static_cast<long>(v) * kWidth, r, v);
        }
    }
    // The mean of body(offset, vector) over each group of a row, put where its channels are; 0 behind them.
    template <class Body>
    PYMETA_FN void group_mean(int own, int number, Body body) const {
      for (int v = 0; v < vectors; ++v) {
        Vec sum = zero();
        for (int position = 0; position < positions; ++position)
          sum = sum + body((static_cast<long>(position) * rows + own) * row +
                               static_cast<long>(v) * kWidth,
                           v);
        put(own, number, v, X::masked_columns(sum, channels, v));
      }
      Real* numbers = slot(own, number);
      const Vec count = broadcast(Real(positions) * Real(in_group));
      for (int first = 0; first < channels; first += in_group) {
        Vec sum = zero();
        for (int c = first; c < first + in_group; ++c)
          sum = sum + X::element(numbers + static_cast<long>(c) * X::kElement);
        for (int c = first; c < first + in_group; ++c)
          X::put_element(numbers + static_cast<long>(c) * X::kElement, sum / count);
      }
    }
  };
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
