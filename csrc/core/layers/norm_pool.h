// BatchNorm over an image's positions, ReLU, and MaxPool over windows that do not overlap, in one: what most convolutional
// networks do behind a convolution. The formulas are those of normalisation.h. What lies between is not kept: h follows from
// the input, and e = gamma d is zero but at the winners of the windows, so that sums over e run over the pooled positions
// only. The network's description has the three layers; the builder makes one of them where it can.
#pragma once

#include "normalisation.h"

namespace pymeta {

struct NormPoolSpec : UndescribedSpec {
  static constexpr bool kMixesRows = true;
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// Two sums at once.
struct VecPair {
  Vec first{}, second{};

  PYMETA_FN friend VecPair operator+(const VecPair& a, const VecPair& b) {
    return {a.first + b.first, a.second + b.second};
  }
};
PYMETA_FN inline VecPair counted_pair(const Extent& extent, Vec first, Vec second, int row) {
  return {extent.counted(first, row), extent.counted(second, row)};
}

// The same of what all rows have of the statistics, where only some are in them.
PYMETA_FN inline VecPair pair_of_all(const Extent& extent, Vec first, Vec second, int row) {
  return {extent.masked(first, row), extent.masked(second, row)};
}

// Its own arrays, one after the other. On a tape: the tap that won each window, or -1 behind a ReLU that is off; h there
// [positions, rows, channels] each; mean, what it left over, s and the variance [4, channels]. In a tangent pass: rh at the winners; the
// mean of rx, and q [2, channels].
template <class X>
struct NormPool {
  static constexpr bool kTransposesWeight = false;
  static constexpr bool kReadsRowsInPlace = false;

  PYMETA_FN static PackedTensor packed_weight(const Layer& layer) {
    return packed_vector<X>(layer.out.channels);
  }
  PYMETA_FN static std::size_t kept_scalars(const Layer& layer, int rows, int i) {
    const std::size_t pooled = matrix_scalars<X>(rows, layer.out);
    return i == 0 ? 2 * pooled : 4 * X::stride(layer.out.channels);
  }
  PYMETA_FN static Statistics statistics(const LayerPass& p, int v) {
    const long row = X::stride(p.layer.out.channels);
    const Real* kept = p.kept[1] + static_cast<long>(v) * kWidth;
    return {load(kept) + load(kept + row), load(kept + 3 * row)};
  }

  PYMETA_FN PYMETA_NOINLINE static void forward(const LayerPass& p, const Destination& to) {
    const Images s(p);
    const Real* x = p.x.p;
    Real *winner = p.kept[0], *kept_h = s.second(p.kept[0]);
    X::with_epilogue(to, s.row, s.pooled, [&](const auto& emit) {
      X::for_indices(s.vectors, [&](int v) {
        const long column = static_cast<long>(v) * kWidth;
        const Norm norm = measured(p, s, v);
        const Vec gamma = feature(p.weight, v, 1), beta = feature(p.bias, v, 0);
        s.for_windows([&](int place, int y, int x_at) {
          for (int i = 0; i < s.images; ++i) {
            Vec best = zero(), h_best = zero(), won = zero();
            s.for_taps(y, x_at, [&](int tap, int position) {
              const Vec h = norm.h(load(x + s.at(position, i) + column));
              const Vec z = fma(h, gamma, beta);
              const auto better = (z > best) | (z != z);
              won = tap == 0 ? zero() : select(better, broadcast(Real(tap)), won);
              h_best = tap == 0 ? h : select(better, h, h_best);
              best = tap == 0 ? z : select(better, z, best);
            });
            store(winner + s.at(place, i) + column, select(best <= zero(), broadcast(-1), won));
            store(kept_h + s.at(place, i) + column, s.pooled.masked(h_best, place * s.images + i));
            emit(at_least(best, zero()), place * s.images + i, v);
          }
        });
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void backward(const LayerPass& p, const Destination& below) {
    const Images s(p);
    const Real *x = p.x.p, *winner = p.kept[0];
    X::with_epilogue(below, s.row, s.dense, [&](const auto& emit) {
      X::for_indices(s.vectors, [&](int v) {
        const long column = static_cast<long>(v) * kWidth;
        const Norm norm = recalled(p, s, v);
        const Vec gamma = feature(p.weight, v, 1);
        const VecPair mean = delta_means(p, s, v, gamma);
        s.for_positions([&](int position, int place, int tap) {
          for (int i = 0; i < s.images; ++i) {
            const long at = s.at(place, i) + column;
            const Vec e = place < 0 ? zero() : won(winner, at, tap, load(p.d + at) * gamma);
            const Vec h = norm.h(load(x + s.at(position, i) + column));
            const int row = position * s.images + i;
            emit(norm_delta(s.dense, row, norm.inverse, e, mean.first, h, mean.second), row, v);
          }
        });
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void gradient(const LayerPass& p, const Sink& weight,
                                                 const Sink& bias) {
    const Images s(p);
    const Real *winner = p.kept[0], *h = s.second(p.kept[0]), *d = p.d;
    X::sum_rows(s.pooled, p.layer.out.channels, weight,
                [&](long at, long) { return active(winner, at, load(d + at)) * load(h + at); });
    X::sum_rows(s.pooled, p.layer.out.channels, bias,
                [&](long at, long) { return active(winner, at, load(d + at)); });
  }

  PYMETA_FN PYMETA_NOINLINE static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                                        const Destination& to) {
    const Images s(p);
    const Real *rx = t.rx.p, *winner = p.kept[0], *kept_h = s.second(p.kept[0]);
    Real* kept_rh = t.kept[0];
    X::with_epilogue(to, s.row, s.pooled, [&](const auto& emit) {
      X::for_indices(s.vectors, [&](int v) {
        const long column = static_cast<long>(v) * kWidth;
        const Norm norm = recalled(p, s, v);
        const NormTangent moved = measured_tangent(p, t, s, norm, v);
        const Vec gamma = feature(p.weight, v, 1);
        const Vec rgamma = feature(t.weight, v, 0), rbeta = feature(t.bias, v, 0);
        s.for_windows([&](int place, int y, int x_at) {
          for (int i = 0; i < s.images; ++i) {
            const long at = s.at(place, i) + column;
            Vec tangent = zero();
            if (rx)
              s.for_taps(y, x_at, [&](int tap, int position) {
                tangent = select(load(winner + at) == broadcast(Real(tap)),
                                 load(rx + s.at(position, i) + column), tangent);
              });
            const Vec h = load(kept_h + at), rh = moved.rh(norm, h, tangent);
            store(kept_rh + at, s.pooled.masked(rh, place * s.images + i));
            emit(active(winner, at, fma(rh, gamma, fma(h, rgamma, rbeta))), place * s.images + i,
                 v);
          }
        });
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                                         const Destination& below) {
    const Images s(p);
    const Real *x = p.x.p, *rx = t.rx.p, *winner = p.kept[0];
    X::with_epilogue(below, s.row, s.dense, [&](const auto& emit) {
      X::for_indices(s.vectors, [&](int v) {
        const long column = static_cast<long>(v) * kWidth;
        const Norm norm = recalled(p, s, v);
        const NormTangent moved = recalled_tangent(p, t, v);
        const Vec gamma = feature(p.weight, v, 1), rgamma = feature(t.weight, v, 0);
        const VecPair mean = delta_means(p, s, v, gamma);
        const VecPair mean_r = delta_tangent_means(p, t, s, v, gamma, rgamma);
        const NormDelta delta{norm.inverse, moved.q,      mean.first,
                              mean.second,  mean_r.first, mean_r.second};
        s.for_positions([&](int position, int place, int tap) {
          for (int i = 0; i < s.images; ++i) {
            const long at = s.at(place, i) + column, from = s.at(position, i) + column;
            Vec e = zero(), re = zero();
            if (place >= 0) {
              const Vec d = load(p.d + at);
              e = won(winner, at, tap, d * gamma);
              re = won(winner, at, tap, fma(d, rgamma, load(t.rd + at) * gamma));
            }
            const Vec h = norm.h(load(x + from));
            const Vec rh = moved.rh(norm, h, rx ? load(rx + from) : zero());
            const int row = position * s.images + i;
            emit(delta.tangent(s.dense, row, e, re, h, rh), row, v);
          }
        });
      });
    });
  }

  PYMETA_FN PYMETA_NOINLINE static void tangent_gradient(const LayerPass& p, const LayerTangent& t,
                                                         const Sink& weight, const Sink& bias) {
    const Images s(p);
    const Real *winner = p.kept[0], *h = s.second(p.kept[0]), *rh = t.kept[0];
    X::sum_rows(s.pooled, p.layer.out.channels, weight, [&](long at, long) {
      return active(winner, at, fma(load(t.rd + at), load(h + at), load(p.d + at) * load(rh + at)));
    });
    X::sum_rows(s.pooled, p.layer.out.channels, bias,
                [&](long at, long) { return active(winner, at, load(t.rd + at)); });
  }

  static double work(const Layer& layer, const Effort& effort) {
    return elementwise_work<X>(layer, effort) * layer.window.taps();
  }

 private:
  // Where everything of a pass lies.
  struct Images {
    Shape in, out;
    Window window;
    Extent dense, pooled;
    int images, vectors;
    long row;

    PYMETA_FN explicit Images(const LayerPass& p)
        : in(p.layer.in),
          out(p.layer.out),
          window(p.layer.window),
          dense(over(p.extent, p.layer.in)),
          pooled(over(p.extent, p.layer.out)),
          images(p.extent.rows),
          vectors(X::vectors(p.layer.out.channels)),
          row(X::stride(p.layer.out.channels)) {}

    PYMETA_FN long at(int position, int image) const {
      return (static_cast<long>(position) * images + image) * row;
    }
    template <class Pointer>
    PYMETA_FN Pointer second(Pointer kept) const {
      return kept + static_cast<long>(pooled.rows) * row;
    }
    template <class Body>  // body(place among the pooled, y, x) of each window
    PYMETA_FN void for_windows(Body body) const {
      for (int y = 0, place = 0; y < out.height; ++y)
        for (int x = 0; x < out.width; ++x, ++place) body(place, y, x);
    }
    template <class Body>  // body(tap, position) of a window
    PYMETA_FN void for_taps(int y, int x, Body body) const {
      for (int ky = 0, tap = 0; ky < window.height; ++ky)
        for (int kx = 0; kx < window.width; ++kx, ++tap)
          body(tap, (y * window.height + ky) * in.width + x * window.width + kx);
    }
    template <
        class
        Body>  // body(position, place of its window among the pooled or -1, tap) of each input
    PYMETA_FN void for_positions(Body body) const {
      for (int y = 0, position = 0; y < in.height; ++y)
        for (int x = 0; x < in.width; ++x, ++position) {
          const int to_y = y / window.height, to_x = x / window.width;
          const bool is_in = to_y < out.height && to_x < out.width;
          body(position, is_in ? to_y * out.width + to_x : -1,
               y % window.height * window.width + x % window.width);
        }
    }
  };

  // Of a vector of channels.
  struct Norm {
    Vec mean, rest, inverse;
    PYMETA_FN Vec h(Vec x) const { return ((x - mean) - rest) * inverse; }
  };
  struct NormTangent {
    Vec mean, q;
    PYMETA_FN Vec rh(const Norm& norm, Vec h, Vec rx) const {
      return (rx - mean) * norm.inverse - h * q;
    }
  };

  PYMETA_FN static Vec active(const Real* winner, long at, Vec v) {
    return select(load(winner + at) < zero(), zero(), v);
  }
  PYMETA_FN static Vec won(const Real* winner, long at, int tap, Vec v) {
    return select(load(winner + at) == broadcast(Real(tap)), v, zero());
  }

  // Measured and kept; centred twice, as in normalisation.h.
  PYMETA_FN static Norm measured(const LayerPass& p, const Images& s, int v) {
    const Real* x = p.x.p + static_cast<long>(v) * kWidth;
    const auto in = [&](int r) { return load(x + r * s.row); };
    Norm norm{};
    norm.mean = sum_over(s.dense, [&](int r) { return s.dense.counted(in(r), r); }) / s.dense.count;
    const VecPair sums = sum_over(s.dense, [&](int r) {
      const Vec centred = in(r) - norm.mean;
      return counted_pair(s.dense, centred, centred * centred, r);
    });
    norm.rest = sums.first / s.dense.count;
    const Vec variance = sums.second / s.dense.count - norm.rest * norm.rest;
    norm.inverse = Real(1) / square_root(variance + Real(p.layer.eps));
    Real* kept = p.kept[1] + static_cast<long>(v) * kWidth;
    store(kept, norm.mean);
    store(kept + s.row, norm.rest);
    store(kept + 2 * s.row, norm.inverse);
    store(kept + 3 * s.row, variance);
    return norm;
  }
  PYMETA_FN static Norm recalled(const LayerPass& p, const Images& s, int v) {
    const Real* kept = p.kept[1] + static_cast<long>(v) * kWidth;
    return {load(kept), load(kept + s.row), load(kept + 2 * s.row)};
  }
  PYMETA_FN static NormTangent measured_tangent(const LayerPass& p, const LayerTangent& t,
                                                const Images& s, const Norm& norm, int v) {
    const long column = static_cast<long>(v) * kWidth;
    NormTangent moved{};
    if (t.rx.p) {
      const VecPair sums = sum_over(s.dense, [&](int r) {
        const Vec rx = load(t.rx.p + r * s.row + column);
        return counted_pair(s.dense, rx, norm.h(load(p.x.p + r * s.row + column)) * rx, r);
      });
      moved.mean = sums.first / s.dense.count;
      moved.q = norm.inverse * (sums.second / s.dense.count);
    }
    store(t.kept[1] + column, moved.mean);
    store(t.kept[1] + s.row + column, moved.q);
    return moved;
  }
  PYMETA_FN static NormTangent recalled_tangent(const LayerPass& p, const LayerTangent& t, int v) {
    const Real* kept = t.kept[1] + static_cast<long>(v) * kWidth;
    return {load(kept), load(kept + X::stride(p.layer.out.channels))};
  }

  // mean e, mean (e h) over all positions
  PYMETA_FN static VecPair delta_means(const LayerPass& p, const Images& s, int v, Vec gamma) {
    const long column = static_cast<long>(v) * kWidth;
    const Real *winner = p.kept[0], *kept_h = s.second(p.kept[0]);
    const VecPair sums = sum_over(s.pooled, [&](int r) {
      const long at = r * s.row + column;
      const Vec e = active(winner, at, load(p.d + at));
      const Vec eh = e * load(kept_h + at);
      return pair_of_all(s.pooled, e, eh, r);
    });
    return {sums.first * gamma / s.dense.count, sums.second * gamma / s.dense.count};
  }
  // mean re, mean (re h + e rh)
  PYMETA_FN static VecPair delta_tangent_means(const LayerPass& p, const LayerTangent& t,
                                               const Images& s, int v, Vec gamma, Vec rgamma) {
    const long column = static_cast<long>(v) * kWidth;
    const Real *winner = p.kept[0], *kept_h = s.second(p.kept[0]), *kept_rh = t.kept[0];
    const VecPair sums = sum_over(s.pooled, [&](int r) {
      const long at = r * s.row + column;
      const Vec d = active(winner, at, load(p.d + at));
      const Vec re = active(winner, at, fma(load(p.d + at), rgamma, load(t.rd + at) * gamma));
      const Vec product = fma(re, load(kept_h + at), d * gamma * load(kept_rh + at));
      return pair_of_all(s.pooled, re, product, r);
    });
    return {sums.first / s.dense.count, sums.second / s.dense.count};
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
