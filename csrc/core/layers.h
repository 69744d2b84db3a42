// The layers' rules: forward, backward, parameter gradients and the tangents of all three, side by side.
//
// Templates over an executor X (cpu/executor.h): `apply`, `apply_transposed` and `outer` are the linear layer;
// normalisations and activations are maps and reductions. Names: x input, d = dL/d(layer's output before its
// activation), g* gradients; a leading r is a tangent (Pearlmutter's R-operator: the derivative along the
// direction u of the adapted parameters). For a linear layer
//   z = x W + b      dx = d W^T                   gW = x^T d              gb = sum d
//   rz = rx W + x U + ub   rdx = rd W^T + d U^T   rgW = rx^T d + x^T rd   rgb = sum rd
// and for a normalisation over a set of n numbers, h = (x - mean) / sqrt(var + eps), z = gamma h + beta:
//   dx = s (e - mean e - h mean(e h)),  e = gamma d,  s = 1 / sqrt(var + eps)
//   rh = s (rx - mean rx) - h q,        q = s mean(h rx)
//   rdx = s (re - mean re - rh mean(e h) - h mean(re h + e rh)) - q dx,  re = gamma rd + rgamma d
// A normalisation's set is a column of the matrix (BatchNorm, each task and set by itself) or a row (LayerNorm).
#pragma once

#include "activations.h"
#include "machine.h"
#include "network.h"
#include "operands.h"

PYMETA_KERNEL_BEGIN

// ---- activations -----------------------------------------------------------------------------------------------

template <class X>
PYMETA_FN PYMETA_APART void activate(const Layer& layer, const Extent& extent, const Real* z,
                                     Real* a) {
  with_activation(layer.activation.kind, [&](auto rule) {
    X::map(extent, layer.out, [&](long at, long column, int) {
      Vec value = rule.value(load(z + at), layer.activation);
      if constexpr (rule.kMovesZero)
        value = X::masked_columns(value, layer.out, static_cast<int>(column / kWidth));
      store(a + at, value);
    });
  });
}

// out = slope * v: the backward pass and the tangent of the forward pass. z is only read where it was kept.
template <class X>
PYMETA_FN PYMETA_APART void through_slope(const Layer& layer, const Extent& extent, const Real* z,
                                          const Real* a, const Real* v, Real* out) {
  with_activation(layer.activation.kind, [&](auto rule) {
    X::map(extent, layer.out, [&](long at, long, int) {
      const Vec input = rule.kFromOutput ? zero() : load(z + at);
      store(out + at, rule.slope(input, load(a + at), layer.activation) * load(v + at));
    });
  });
}

// rd = slope * rc + curvature * c * rz: the tangent of the backward pass.
template <class X>
PYMETA_FN PYMETA_APART void through_slope_tangent(const Layer& layer, const Extent& extent,
                                                  const Real* z, const Real* a, const Real* c,
                                                  const Real* rz, const Real* rc, Real* rd) {
  with_activation(layer.activation.kind, [&](auto rule) {
    X::map(extent, layer.out, [&](long at, long, int) {
      const Vec input = rule.kFromOutput ? zero() : load(z + at), output = load(a + at);
      Vec v = rule.slope(input, output, layer.activation) * load(rc + at);
      if constexpr (rule.kBent) {
        if (rz)
          v = fma(rule.curvature(input, output, layer.activation) * load(c + at), load(rz + at), v);
      }
      store(rd + at, v);
    });
  });
}

// ---- normalisations --------------------------------------------------------------------------------------------

// How the set of a normalisation lies in the matrix: slices, each normalised by itself.
template <class X, bool kOverRows>
struct Slices {
  const Extent& extent;
  int features;

  PYMETA_FN int count() const { return kOverRows ? X::vectors(features) : extent.rows; }
  PYMETA_FN int length() const { return kOverRows ? extent.rows : X::vectors(features); }
  PYMETA_FN int row(int slice, int i) const { return kOverRows ? i : slice; }
  PYMETA_FN int column(int slice, int i) const { return kOverRows ? slice : i; }  // in vectors
  PYMETA_FN long at(int slice, int i) const {
    return row(slice, i) * X::stride(features) + static_cast<long>(column(slice, i)) * kWidth;
  }
  // Zero outside the set: rows that a shorter task lacks, columns that are padding.
  PYMETA_FN Vec masked(Vec v, int slice, int i) const {
    if (!kOverRows) v = X::masked_columns(v, features, column(slice, i));
    return extent.masked(v, row(slice, i));
  }
  template <class Body>
  PYMETA_FN Vec mean(int slice, Body body) const {
    if constexpr (kOverRows) {
      Vec sum = zero();
      for (int i = 0; i < extent.rows; ++i) sum = sum + extent.masked(body(i), i);
      return sum / extent.count;
    } else {
      return X::sum_features(features, [&](int i) { return masked(body(i), slice, i); }) /
             broadcast(Real(features));
    }
  }
};

template <class X, class Visitor>
PYMETA_FN void with_slices(const Layer& layer, const Extent& extent, Visitor visit) {
  if (layer.kind == LayerKind::batch_norm)
    visit(Slices<X, true>{extent, layer.out});
  else
    visit(Slices<X, false>{extent, layer.out});
}

PYMETA_FN inline Vec feature(const Real* vector, int column, Real otherwise) {
  return vector ? load(vector + static_cast<long>(column) * kWidth) : broadcast(otherwise);
}

// What a normalisation keeps of its forward pass, and of its tangent.
struct NormState {
  Real* h;        // [rows, features] normalised input
  Real* inverse;  // [slices, kWidth] s
};
struct NormTangent {
  Real* rh;  // [rows, features]
  Real* q;   // [slices, kWidth]
};

template <class X>
PYMETA_FN PYMETA_APART void norm_forward(const Layer& layer, const Extent& extent, const Matrix& x,
                                         const Real* gamma, const Real* beta,
                                         const NormState& state, const Destination& to) {
  X::with_epilogue(to, X::stride(layer.out), extent, [&](const auto& emit) {
    with_slices<X>(layer, extent, [&](const auto& s) {
      X::each_index(s.count(), [&](int slice) {
        // Centred twice: what the rounded mean left over would spoil the backward formulas, which rely on mean h = 0.
        const auto in = [&](int i) { return load(x.p + s.at(slice, i)); };
        const Vec mean = s.mean(slice, in);
        const Vec rest = s.mean(slice, [&](int i) { return in(i) - mean; });
        const auto centred = [&](int i) { return (in(i) - mean) - rest; };
        const Vec variance = s.mean(slice, [&](int i) { return centred(i) * centred(i); });
        const Vec inverse = Real(1) / square_root(variance + Real(layer.eps));
        store(state.inverse + static_cast<long>(slice) * kWidth, inverse);
        for (int i = 0; i < s.length(); ++i) {
          const Vec h = s.masked(centred(i) * inverse, slice, i);
          store(state.h + s.at(slice, i), h);
          const int column = s.column(slice, i);
          emit(fma(h, feature(gamma, column, 1), feature(beta, column, 0)), s.row(slice, i),
               column);
        }
      });
    });
  });
}

template <class X>
PYMETA_FN PYMETA_APART void norm_tangent(const Layer& layer, const Extent& extent, const Real* rx,
                                         const Real* gamma, const Real* rgamma, const Real* rbeta,
                                         const NormState& state, const NormTangent& tangent,
                                         const Destination& to) {
  X::with_epilogue(to, X::stride(layer.out), extent, [&](const auto& emit) {
    with_slices<X>(layer, extent, [&](const auto& s) {
      X::each_index(s.count(), [&](int slice) {
        const auto h = [&](int i) { return load(state.h + s.at(slice, i)); };
        const auto in = [&](int i) { return rx ? load(rx + s.at(slice, i)) : zero(); };
        const Vec inverse = load(state.inverse + static_cast<long>(slice) * kWidth);
        const Vec mean = rx ? s.mean(slice, in) : zero();
        const Vec q = rx ? inverse * s.mean(slice, [&](int i) { return h(i) * in(i); }) : zero();
        store(tangent.q + static_cast<long>(slice) * kWidth, q);
        for (int i = 0; i < s.length(); ++i) {
          const Vec rh = s.masked((in(i) - mean) * inverse - h(i) * q, slice, i);
          store(tangent.rh + s.at(slice, i), rh);
          const int column = s.column(slice, i);
          Vec rz = fma(rh, feature(gamma, column, 1), feature(rbeta, column, 0));
          if (rgamma) rz = fma(h(i), feature(rgamma, column, 0), rz);
          emit(rz, s.row(slice, i), column);
        }
      });
    });
  });
}

// s (e - mean e - h mean(e h)), given its two means.
PYMETA_FN inline Vec norm_delta(Vec inverse, Vec e, Vec mean_e, Vec h, Vec mean_eh) {
  return inverse * (e - mean_e - h * mean_eh);
}

template <class X>
PYMETA_FN PYMETA_APART void norm_backward(const Layer& layer, const Extent& extent, const Real* d,
                                          const Real* gamma, const NormState& state,
                                          const Destination& to) {
  X::with_epilogue(to, X::stride(layer.in), extent, [&](const auto& emit) {
    with_slices<X>(layer, extent, [&](const auto& s) {
      X::each_index(s.count(), [&](int slice) {
        const auto h = [&](int i) { return load(state.h + s.at(slice, i)); };
        const auto e = [&](int i) {
          return load(d + s.at(slice, i)) * feature(gamma, s.column(slice, i), 1);
        };
        const Vec inverse = load(state.inverse + static_cast<long>(slice) * kWidth);
        const Vec mean_e = s.mean(slice, e);
        const Vec mean_eh = s.mean(slice, [&](int i) { return e(i) * h(i); });
        for (int i = 0; i < s.length(); ++i)
          emit(s.masked(norm_delta(inverse, e(i), mean_e, h(i), mean_eh), slice, i),
               s.row(slice, i), s.column(slice, i));
      });
    });
  });
}

template <class X>
PYMETA_FN PYMETA_APART void norm_backward_tangent(const Layer& layer, const Extent& extent,
                                                  const Real* d, const Real* rd, const Real* gamma,
                                                  const Real* rgamma, const NormState& state,
                                                  const NormTangent& tangent,
                                                  const Destination& to) {
  X::with_epilogue(to, X::stride(layer.in), extent, [&](const auto& emit) {
    with_slices<X>(layer, extent, [&](const auto& s) {
      X::each_index(s.count(), [&](int slice) {
        const auto h = [&](int i) { return load(state.h + s.at(slice, i)); };
        const auto rh = [&](int i) { return load(tangent.rh + s.at(slice, i)); };
        const auto e = [&](int i) {
          return load(d + s.at(slice, i)) * feature(gamma, s.column(slice, i), 1);
        };
        const auto re = [&](int i) {
          const Vec own = load(rd + s.at(slice, i)) * feature(gamma, s.column(slice, i), 1);
          return rgamma ? fma(load(d + s.at(slice, i)), feature(rgamma, s.column(slice, i), 0), own)
                        : own;
        };
        const Vec inverse = load(state.inverse + static_cast<long>(slice) * kWidth);
        const Vec q = load(tangent.q + static_cast<long>(slice) * kWidth);
        const Vec mean_e = s.mean(slice, e), mean_re = s.mean(slice, re);
        const Vec mean_eh = s.mean(slice, [&](int i) { return e(i) * h(i); });
        const Vec mean_r = s.mean(slice, [&](int i) { return re(i) * h(i) + e(i) * rh(i); });
        for (int i = 0; i < s.length(); ++i) {
          const Vec dx = norm_delta(inverse, e(i), mean_e, h(i), mean_eh);
          const Vec rdx = inverse * (re(i) - mean_re - rh(i) * mean_eh - h(i) * mean_r) - q * dx;
          emit(s.masked(rdx, slice, i), s.row(slice, i), s.column(slice, i));
        }
      });
    });
  });
}

template <class X>
PYMETA_FN PYMETA_APART void norm_gradient(const Layer& layer, const Extent& extent, const Real* d,
                                          const NormState& state, const Sink& gamma,
                                          const Sink& beta) {
  X::sum_rows(extent, layer.out, gamma,
              [&](long at, long) { return load(d + at) * load(state.h + at); });
  X::sum_rows(extent, layer.out, beta, [&](long at, long) { return load(d + at); });
}

template <class X>
PYMETA_FN PYMETA_APART void norm_gradient_tangent(const Layer& layer, const Extent& extent,
                                                  const Real* d, const Real* rd,
                                                  const NormState& state,
                                                  const NormTangent& tangent, const Sink& gamma,
                                                  const Sink& beta) {
  X::sum_rows(extent, layer.out, gamma, [&](long at, long) {
    return fma(load(rd + at), load(state.h + at), load(d + at) * load(tangent.rh + at));
  });
  X::sum_rows(extent, layer.out, beta, [&](long at, long) { return load(rd + at); });
}

PYMETA_KERNEL_END
