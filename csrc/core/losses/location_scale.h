// Negative log likelihoods of a location y and the logarithm s of a scale, both predicted: with a = e^-s and z = (y - t) a,
//   s + rho(z) + constant
//   d/dy a psi,  d/ds 1 - z psi,  d/dt -a psi                      psi = rho', h = rho''
//   d2/dy2 a^2 h,  d2/dy ds -a q,  d2/ds2 z q  with  q = h z + psi;  d2/dy dt -a^2 h,  d2/ds dt a q
// Of columns targets, output j is the location of target j and output columns + j its log scale. What `Residual` has:
//   Residual(loss)        the distribution's own numbers
//   rho(z), psi(z), h(z)
#pragma once

#include "loss.h"

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class Residual>
struct LocationScale {
  PYMETA_FN static Vec value(const Loss& loss, const LossRows& s, int b, Real* gradient) {
    const Residual residual(loss);
    const Vec scale = load(s.scale + b * kWidth);
    Vec sum = zero();
    for (int j = 0; j < s.columns; ++j) {
      const Vec log_scale = load(s.outputs + s.at(s.columns + j, b));
      const Vec a = exp(-log_scale);
      store(s.kept + s.at(j, b), a);
      const Vec z = (load(s.outputs + s.at(j, b)) - load(s.targets + s.at(j, b))) * a;
      sum = sum + s.counted(log_scale + residual.rho(z) + Real(loss.constant), j, b);
      if (!gradient) continue;
      const Vec psi = residual.psi(z);
      store(gradient + s.at(j, b), s.masked(scale * s.weighed(a * psi, j, b), b));
      store(gradient + s.at(s.columns + j, b),
            s.masked(scale * s.weighed(Real(1) - z * psi, j, b), b));
    }
    return sum;
  }
  PYMETA_FN static void hessian_product(const Loss& loss, const LossRows& s, int b, const Real* r,
                                        Real* product) {
    const Residual residual(loss);
    const Vec scale = load(s.scale + b * kWidth);
    for (int j = 0; j < s.columns; ++j) {
      const Standardised at(residual, s, b, j);
      const Vec ry = load(r + s.at(j, b)), rs = load(r + s.at(s.columns + j, b));
      store(product + s.at(j, b), s.masked(scale * s.weighed(at.of_location(ry, rs), j, b), b));
      store(product + s.at(s.columns + j, b),
            s.masked(scale * s.weighed(at.q * (at.z * rs - at.a * ry), j, b), b));
    }
  }
  PYMETA_FN static void target_gradient(const Loss& loss, const LossRows& s, int b,
                                        Real* gradient) {
    const Residual residual(loss);
    const Vec scale = load(s.scale + b * kWidth);
    for (int j = 0; j < s.columns; ++j) {
      const Standardised at(residual, s, b, j);
      store(gradient + s.at(j, b),
            s.masked(-(scale * s.weighed(at.a * residual.psi(at.z), j, b)), b));
    }
  }
  // The target enters as the location does, with the other sign.
  PYMETA_FN static void target_tangent(const Loss& loss, const LossRows& s, int b, const Real* r,
                                       Real* product) {
    const Residual residual(loss);
    const Vec scale = load(s.scale + b * kWidth);
    for (int j = 0; j < s.columns; ++j) {
      const Standardised at(residual, s, b, j);
      const Vec ry = load(r + s.at(j, b)), rs = load(r + s.at(s.columns + j, b));
      store(product + s.at(j, b), s.masked(-(scale * s.weighed(at.of_location(ry, rs), j, b)), b));
    }
  }

 private:
  struct Standardised {
    Vec a, z, h, q;

    PYMETA_FN Standardised(const Residual& residual, const LossRows& s, int b, int j)
        : a(load(s.kept + s.at(j, b))),
          z((load(s.outputs + s.at(j, b)) - load(s.targets + s.at(j, b))) * a),
          h(residual.h(z)),
          q(h * z + residual.psi(z)) {}
    PYMETA_FN Vec of_location(Vec ry, Vec rs) const { return a * (h * a * ry - q * rs); }
  };
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
