// What the normalisations share: each normalises slices of the matrix [rows, features] by themselves. A slice is a
// column (BatchNorm, each task and set by itself, over rows and positions) or a row, or position (LayerNorm). Over n numbers
//   h = (x - mean) / sqrt(var + eps),  z = gamma h + beta
//   dx  = s (e - mean e - h mean(e h)),  e = gamma d,  s = 1 / sqrt(var + eps)
//   rh  = s (rx - mean rx) - h q,        q = s mean(h rx)
//   rdx = s (re - mean re - rh mean(e h) - h mean(re h + e rh)) - q dx,  re = gamma rd + rgamma d
#pragma once

#include "layer.h"

namespace pymeta {

// A vector of channels, or one for each inner step.
inline Tensor channel_tensor(int channels, int steps) {
  return {steps > 0 ? steps : 1, channels, steps > 0};
}

// (features, eps, gamma, beta)
template <class Builder>
void add_normalisation(Builder& builder, const double* arguments, int steps = 0) {
  const int features = static_cast<int>(arguments[0]);
  const Shape shape = builder.shape(features);
  Layer& layer = builder.append(shape, shape);
  layer.eps = arguments[1];
  layer.steps = steps;
  if (arguments[2] != 0) layer.weight = builder.tensor(channel_tensor(features, steps));
  if (arguments[3] != 0) layer.bias = builder.tensor(channel_tensor(features, steps));
}

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// How the slices lie: down the columns, or along the rows.
template <class X, bool kOverRows>
struct Slices {
  Extent extent;
  int features;

  PYMETA_FN int count() const { return kOverRows ? X::vectors(features) : extent.rows; }
  PYMETA_FN int length() const { return kOverRows ? extent.rows : X::vectors(features); }
  PYMETA_FN int row(int slice, int i) const { return kOverRows ? i : slice; }
  PYMETA_FN int column(int slice, int i) const { return kOverRows ? slice : i; }  // in vectors
  PYMETA_FN long at(int slice, int i) const {
    return row(slice, i) * X::stride(features) + static_cast<long>(column(slice, i)) * kWidth;
  }
  // Zero outside the slice: rows that a shorter task lacks, columns that are padding.
  PYMETA_FN Vec masked(Vec v, int slice, int i) const {
    if (!kOverRows) v = X::masked_columns(v, features, column(slice, i));
    return extent.masked(v, row(slice, i));
  }
  // The same of what all rows have of the statistics, where only some are in them (Extent::counting).
  template <class Body>
  PYMETA_FN Vec mean_of_all(int slice, Body body) const {
    if constexpr (kOverRows)
      if (extent.counting)
        return sum_over(extent, [&](int i) { return extent.masked(body(i), i); }) / extent.count;
    return mean(slice, body);
  }
  template <class Body>
  PYMETA_FN Vec mean(int slice, Body body) const {
    if constexpr (kOverRows) {
      return sum_over(extent, [&](int i) { return extent.counted(body(i), i); }) / extent.count;
    } else {
      return X::sum_features(features, [&](int i) { return masked(body(i), slice, i); }) /
             broadcast(Real(features));
    }
  }
};

// One of gamma, beta or their directions at a column of vectors.
PYMETA_FN inline Vec feature(const Real* vector, int column, Real otherwise) {
  return vector ? load(vector + static_cast<long>(column) * kWidth) : broadcast(otherwise);
}

// s (e - mean e - h mean(e h)), given its two means.
PYMETA_FN inline Vec norm_delta(Vec inverse, Vec e, Vec mean_e, Vec h, Vec mean_eh) {
  return inverse * (e - mean_e - h * mean_eh);
}

// Statistics of a column, as batch normalisation measured them.
struct Statistics {
  Vec mean, variance;
};

// The same where only some rows are in the statistics: the others do not move them.
PYMETA_FN inline Vec norm_delta(const Extent& extent, int row, Vec inverse, Vec e, Vec mean_e,
                                Vec h, Vec mean_eh) {
  if (!extent.counting) return norm_delta(inverse, e, mean_e, h, mean_eh);
  return inverse * (e - extent.counted(mean_e + h * mean_eh, row));
}

// The tangent of a delta, given the means of its formula.
struct NormDelta {
  Vec inverse, q, mean_e, mean_eh, mean_re, mean_r;

  PYMETA_FN Vec tangent(Vec e, Vec re, Vec h, Vec rh) const {
    const Vec dx = norm_delta(inverse, e, mean_e, h, mean_eh);
    return inverse * (re - mean_re - rh * mean_eh - h * mean_r) - q * dx;
  }
  PYMETA_FN Vec tangent(const Extent& extent, int row, Vec e, Vec re, Vec h, Vec rh) const {
    if (!extent.counting) return tangent(e, re, h, rh);
    const Vec dx = norm_delta(extent, row, inverse, e, mean_e, h, mean_eh);
    return inverse * (re - extent.counted(mean_re + rh * mean_eh + h * mean_r, row)) - q * dx;
  }
};

// What maps that treat each channel by itself, with nothing kept of a pass, have in common.
template <class X>
struct ChannelMap {
  static constexpr bool kTransposesWeight = false;
  static constexpr bool kReadsRowsInPlace = false;

  PYMETA_FN static PackedTensor packed_weight(const Layer& layer) {
    return packed_vector<X>(layer.out.channels);
  }
  PYMETA_FN static std::size_t kept_scalars(const Layer&, int, int) { return 0; }
  static double work(const Layer& layer, const Effort& effort) {
    return elementwise_work<X>(layer, effort);
  }
};

// Its own arrays: h [rows, features] and s [slices, kWidth] on a tape, and over rows their means and variances behind s; rh
// and q in a tangent pass. Along the rows, each position of each row is a slice.
template <class X, bool kOverRows>
struct Normalisation {
  static constexpr bool kTransposesWeight = false;
  static constexpr bool kReadsRowsInPlace = false;

  PYMETA_FN static PackedTensor packed_weight(const Layer& layer) {
    return packed_vector<X>(layer.out.channels);
  }
  PYMETA_FN static std::size_t kept_scalars(const Layer& layer, int rows, int i) {
    if (i == 0) return matrix_scalars<X>(rows, layer.out);
    return kOverRows ? 3 * static_cast<std::size_t>(X::stride(layer.out.channels))
                     : static_cast<std::size_t>(rows) * layer.out.positions() * kWidth;
  }
  // Of the v-th vector of channels.
  PYMETA_FN static Statistics statistics(const LayerPass& p, int v) {
    const long row = X::stride(p.layer.out.channels);
    const Real* kept = p.kept[1] + static_cast<long>(v) * kWidth;
    return {load(kept + row), load(kept + 2 * row)};
  }

  PYMETA_FN PYMETA_NOINLINE static void forward(const LayerPass& p, const Destination& to) {
    const Slices<X, kOverRows> s{over(p.extent, p.layer.out), p.layer.out.channels};
    const Real *x = p.x.p, *gamma = p.weight, *beta = p.bias;
    Real *kept_h = p.kept[0], *kept_inverse = p.kept[1];
    const Real eps = Real(p.layer.eps);
    X::with_epilogue(to, X::stride(s.features), s.extent, [&](const auto& emit) {
      X::for_indices(s.count(), [&](int slice) {
        // Centred twice: what the rounded mean left over would spoil the backward formulas, which rely on mean h = 0.
        const auto in = [&](int i) { return load(x + s.at(slice, i)); };
        const Vec mean = s.mean(slice, in);
        const Vec rest = s.mean(slice, [&](int i) { return in(i) - mean; });
        const auto centred = [&](int i) { return (in(i) - mean) - rest; };
        const Vec variance = s.mean(slice, [&](int i) { return centred(i) * centred(i); });
        const Vec inverse = Real(1) / square_root(variance + eps);
        store(kept_inverse + static_cast<long>(slice) * kWidth, inverse);
        if constexpr (kOverRows) {
          Real* kept = kept_inverse + static_cast<long>(slice) * kWidth;
          store(kept + X::stride(s.features), mean + rest);
          store(kept + 2 * X::stride(s.features), variance);
        }
        for (int i = 0; i < s.length(); ++i) {
          const Vec h = s.masked(centred(i) * inverse, slice, i);
          store(kept_h + s.at(slice, i), h);
          const int column = s.column(slice, i);
          emit(fma(h, feature(gamma, column, 1), feature(beta, column, 0)), s.row(slice, i),
               column);
        }
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void backward(const LayerPass& p, const Destination& below) {
    const Slices<X, kOverRows> s{over(p.extent, p.layer.out), p.layer.out.channels};
    const Real *d = p.d, *gamma = p.weight, *kept_h = p.kept[0], *kept_inverse = p.kept[1];
    X::with_epilogue(below, X::stride(s.features), s.extent, [&](const auto& emit) {
      X::for_indices(s.count(), [&](int slice) {
        const auto h = [&](int i) { return load(kept_h + s.at(slice, i)); };
        const auto e = [&](int i) {
          return load(d + s.at(slice, i)) * feature(gamma, s.column(slice, i), 1);
        };
        const Vec inverse = load(kept_inverse + static_cast<long>(slice) * kWidth);
        const Vec mean_e = s.mean_of_all(slice, e);
        const Vec mean_eh = s.mean_of_all(slice, [&](int i) { return e(i) * h(i); });
        for (int i = 0; i < s.length(); ++i) {
          const Vec dx = kOverRows ? norm_delta(s.extent, i, inverse, e(i), mean_e, h(i), mean_eh)
                                   : norm_delta(inverse, e(i), mean_e, h(i), mean_eh);
          emit(s.masked(dx, slice, i), s.row(slice, i), s.column(slice, i));
        }
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void gradient(const LayerPass& p, const Sink& weight,
                                                 const Sink& bias) {
    const int features = p.layer.out.channels;
    const Extent extent = over(p.extent, p.layer.out);
    const Real *d = p.d, *h = p.kept[0];
    X::sum_rows(extent, features, weight,
                [&](long at, long) { return load(d + at) * load(h + at); });
    sum_delta<X>(extent, features, d, bias);
  }

  PYMETA_FN PYMETA_NOINLINE static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                                        const Destination& to) {
    const Slices<X, kOverRows> s{over(p.extent, p.layer.out), p.layer.out.channels};
    const Real *rx = t.rx.p, *gamma = p.weight, *rgamma = t.weight, *rbeta = t.bias;
    const Real *kept_h = p.kept[0], *kept_inverse = p.kept[1];
    Real *kept_rh = t.kept[0], *kept_q = t.kept[1];
    X::with_epilogue(to, X::stride(s.features), s.extent, [&](const auto& emit) {
      X::for_indices(s.count(), [&](int slice) {
        const auto h = [&](int i) { return load(kept_h + s.at(slice, i)); };
        const auto in = [&](int i) { return rx ? load(rx + s.at(slice, i)) : zero(); };
        const Vec inverse = load(kept_inverse + static_cast<long>(slice) * kWidth);
        const Vec mean = rx ? s.mean(slice, in) : zero();
        const Vec q = rx ? inverse * s.mean(slice, [&](int i) { return h(i) * in(i); }) : zero();
        store(kept_q + static_cast<long>(slice) * kWidth, q);
        for (int i = 0; i < s.length(); ++i) {
          const Vec rh = s.masked((in(i) - mean) * inverse - h(i) * q, slice, i);
          store(kept_rh + s.at(slice, i), rh);
          const int column = s.column(slice, i);
          Vec rz = fma(rh, feature(gamma, column, 1), feature(rbeta, column, 0));
          if (rgamma) rz = fma(h(i), feature(rgamma, column, 0), rz);
          emit(rz, s.row(slice, i), column);
        }
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                                         const Destination& below) {
    const Slices<X, kOverRows> s{over(p.extent, p.layer.out), p.layer.out.channels};
    const Real *d = p.d, *rd = t.rd, *gamma = p.weight, *rgamma = t.weight;
    const Real *kept_h = p.kept[0], *kept_inverse = p.kept[1], *kept_rh = t.kept[0],
               *kept_q = t.kept[1];
    X::with_epilogue(below, X::stride(s.features), s.extent, [&](const auto& emit) {
      X::for_indices(s.count(), [&](int slice) {
        const auto h = [&](int i) { return load(kept_h + s.at(slice, i)); };
        const auto rh = [&](int i) { return load(kept_rh + s.at(slice, i)); };
        const auto e = [&](int i) {
          return load(d + s.at(slice, i)) * feature(gamma, s.column(slice, i), 1);
        };
        const auto re = [&](int i) {
          const Vec own = load(rd + s.at(slice, i)) * feature(gamma, s.column(slice, i), 1);
          return rgamma ? fma(load(d + s.at(slice, i)), feature(rgamma, s.column(slice, i), 0), own)
                        : own;
        };
        const Vec inverse = load(kept_inverse + static_cast<long>(slice) * kWidth);
        const Vec q = load(kept_q + static_cast<long>(slice) * kWidth);
        const Vec mean_e = s.mean_of_all(slice, e), mean_re = s.mean_of_all(slice, re);
        const Vec mean_eh = s.mean_of_all(slice, [&](int i) { return e(i) * h(i); });
        const Vec mean_r = s.mean_of_all(slice, [&](int i) { return re(i) * h(i) + e(i) * rh(i); });
        for (int i = 0; i < s.length(); ++i) {
          const NormDelta delta{inverse, q, mean_e, mean_eh, mean_re, mean_r};
          const Vec rdx = kOverRows ? delta.tangent(s.extent, i, e(i), re(i), h(i), rh(i))
                                    : delta.tangent(e(i), re(i), h(i), rh(i));
          emit(s.masked(rdx, slice, i), s.row(slice, i), s.column(slice, i));
        }
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void tangent_gradient(const LayerPass& p, const LayerTangent& t,
                                                         const Sink& weight, const Sink& bias) {
    const int features = p.layer.out.channels;
    const Extent extent = over(p.extent, p.layer.out);
    const Real *d = p.d, *rd = t.rd, *h = p.kept[0], *rh = t.kept[0];
    X::sum_rows(extent, features, weight, [&](long at, long) {
      return fma(load(rd + at), load(h + at), load(d + at) * load(rh + at));
    });
    sum_delta<X>(extent, features, rd, bias);
  }

  static double work(const Layer& layer, const Effort& effort) {
    return elementwise_work<X>(layer, effort);
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
