// Activations, each with its value, slope and curvature (zeroth, first and second derivative) side by side.
//
// `z` is the activation's input and `a` its output. Where slope and curvature follow from the output
// (`kFromOutput`), z is never stored. `kHasCurvature` says whether the curvature is anything but zero: only then do the
// tangent passes need the delta before the activation and the tangent of z. `kMovesZero`: its value at 0 is not 0, so
// that padding has to be cleared behind it. At a kink the derivative is torch's,
// and comparisons are written so that a NaN passes through. The elementary functions come from the machine's own
// vector type V (cpu/simd.h).
//
// A new activation: a line in PYMETA_ACTIVATIONS and a Rule here. Its torch module has its line in pymeta/spec.
#pragma once

#include "call/network.h"

// ACTIVATION(kind, number of parameters: `alpha`, then `threshold`, the condition on alpha, and how messages put it)
#define PYMETA_ACTIVATIONS(ACTIVATION)                                 \
  ACTIVATION(identity, 0, true, "")                                    \
  ACTIVATION(relu, 0, true, "")                                        \
  ACTIVATION(affine, 2, alpha - alpha == 0, "factor must be finite")   \
  ACTIVATION(leaky_relu, 1, alpha >= 0, "negative_slope must be >= 0") \
  ACTIVATION(elu, 1, alpha > 0, "alpha must be > 0")                   \
  ACTIVATION(tanh, 0, true, "")                                        \
  ACTIVATION(sigmoid, 0, true, "")                                     \
  ACTIVATION(silu, 0, true, "")                                        \
  ACTIVATION(gelu, 0, true, "")                                        \
  ACTIVATION(gelu_tanh, 0, true, "")                                   \
  ACTIVATION(softplus, 2, alpha > 0, "beta must be > 0")

namespace pymeta {

enum class ActivationKind : std::uint8_t {
#define PYMETA_KIND(kind, parameters, condition, message) kind,
  PYMETA_ACTIVATIONS(PYMETA_KIND)
#undef PYMETA_KIND
};

// How a network's description spells an activation, and what its parameters must be.
struct ActivationSpelling {
  const char* name;
  ActivationKind kind;
  int parameters;
  bool (*accepts)(double alpha);
  const char* condition;
};
constexpr ActivationSpelling kActivations[] = {
#define PYMETA_SPELLING(kind, parameters, condition, message) \
  {#kind, ActivationKind::kind, parameters,                   \
   [](double alpha) { return static_cast<void>(alpha), (condition); }, message},
    PYMETA_ACTIVATIONS(PYMETA_SPELLING)
#undef PYMETA_SPELLING
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <ActivationKind Kind>
struct Rule;

template <>
struct Rule<ActivationKind::identity> {
  static constexpr bool kFromOutput = true, kHasCurvature = false, kMovesZero = false;
  template <class V>
  PYMETA_FN static V value(V z, const Activation&) {
    return z;
  }
  template <class V>
  PYMETA_FN static V slope(V, V, const Activation&) {
    return V{} + Real(1);
  }
  template <class V>
  PYMETA_FN static V curvature(V, V, const Activation&) {
    return V{};
  }
};

template <>
struct Rule<ActivationKind::relu> {
  static constexpr bool kFromOutput = true, kHasCurvature = false, kMovesZero = false;
  template <class V>
  PYMETA_FN static V value(V z, const Activation&) {
    return select(z < Real(0), V{}, z);
  }
  template <class V>
  PYMETA_FN static V slope(V, V a, const Activation&) {
    return select(a <= Real(0), V{}, V{} + Real(1));
  }
  template <class V>
  PYMETA_FN static V curvature(V, V, const Activation&) {
    return V{};
  }
};

// The slope for negative z is at least 0 (PYMETA_ACTIVATIONS sees to it), so that the sign of the output is that of z.
template <>
struct Rule<ActivationKind::leaky_relu> {
  static constexpr bool kFromOutput = true, kHasCurvature = false, kMovesZero = false;
  template <class V>
  PYMETA_FN static V value(V z, const Activation& p) {
    return select(z > Real(0), z, z * Real(p.alpha));
  }
  template <class V>
  PYMETA_FN static V slope(V, V a, const Activation& p) {
    return select(a > Real(0), V{} + Real(1), V{} + Real(p.alpha));
  }
  template <class V>
  PYMETA_FN static V curvature(V, V, const Activation&) {
    return V{};
  }
};

template <>
struct Rule<ActivationKind::elu> {
  static constexpr bool kFromOutput = true, kHasCurvature = true, kMovesZero = false;
  template <class V>
  PYMETA_FN static V value(V z, const Activation& p) {
    return select(z > Real(0), z, expm1(z) * Real(p.alpha));
  }
  template <class V>
  PYMETA_FN static V slope(V, V a, const Activation& p) {
    return select(a > Real(0), V{} + Real(1), a + Real(p.alpha));
  }
  template <class V>
  PYMETA_FN static V curvature(V, V a, const Activation& p) {
    return select(a >= Real(0), V{}, a + Real(p.alpha));
  }
};

template <>
struct Rule<ActivationKind::tanh> {
  static constexpr bool kFromOutput = true, kHasCurvature = true, kMovesZero = false;
  template <class V>
  PYMETA_FN static V value(V z, const Activation&) {
    return tanh(z);
  }
  template <class V>
  PYMETA_FN static V slope(V, V a, const Activation&) {
    return fma(-a, a, V{} + Real(1));
  }
  template <class V>
  PYMETA_FN static V curvature(V z, V a, const Activation& p) {
    return a * Real(-2) * slope(z, a, p);
  }
};

template <>
struct Rule<ActivationKind::sigmoid> {
  static constexpr bool kFromOutput = true, kHasCurvature = true, kMovesZero = true;
  template <class V>
  PYMETA_FN static V value(V z, const Activation&) {
    return sigmoid(z);
  }
  template <class V>
  PYMETA_FN static V slope(V, V a, const Activation&) {
    return a * (Real(1) - a);
  }
  template <class V>
  PYMETA_FN static V curvature(V, V a, const Activation&) {
    return a * (Real(1) - a) * (Real(1) - a * Real(2));
  }
};

template <>
struct Rule<ActivationKind::silu> {
  static constexpr bool kFromOutput = false, kHasCurvature = true, kMovesZero = false;
  template <class V>
  PYMETA_FN static V value(V z, const Activation&) {
    return z * sigmoid(z);
  }
  template <class V>
  PYMETA_FN static V slope(V z, V, const Activation&) {
    const V s = sigmoid(z);
    return s * (z * (Real(1) - s) + Real(1));
  }
  template <class V>
  PYMETA_FN static V curvature(V z, V, const Activation&) {
    const V s = sigmoid(z);
    return s * (Real(1) - s) * (z * (Real(1) - s * Real(2)) + Real(2));
  }
};

// z Phi(z), with phi = Phi' the normal density and phi' = -z phi.
template <>
struct Rule<ActivationKind::gelu> {
  static constexpr bool kFromOutput = false, kHasCurvature = true, kMovesZero = false;
  template <class V>
  PYMETA_FN static V density(V z) {
    return exp(z * z * Real(-0.5)) * Real(0.39894228040143267794);
  }
  template <class V>
  PYMETA_FN static V value(V z, const Activation&) {
    return z * normal_cdf(z);
  }
  template <class V>
  PYMETA_FN static V slope(V z, V, const Activation&) {
    return fma(z, density(z), normal_cdf(z));
  }
  template <class V>
  PYMETA_FN static V curvature(V z, V, const Activation&) {
    return density(z) * (Real(2) - z * z);
  }
};

// z (1 + tanh u) / 2 with u = k (z + c z^3). Beyond |z| = 20 the tanh is 1 to the last bit; holding z there keeps
// 0 * infinity out of its derivatives.
template <>
struct Rule<ActivationKind::gelu_tanh> {
  static constexpr bool kFromOutput = false, kHasCurvature = true, kMovesZero = false;
  static constexpr Real k = Real(0.79788456080286535588), c = Real(0.044715);
  template <class V>
  PYMETA_FN static V held(V z) {
    const V bounded = select(z > Real(20), V{} + Real(20), z);
    return select(bounded < Real(-20), V{} - Real(20), bounded);
  }
  template <class V>
  PYMETA_FN static V t(V z) {
    return tanh((z + z * z * z * c) * k);
  }
  template <class V>
  PYMETA_FN static V value(V z, const Activation&) {
    return z * (t(held(z)) + Real(1)) * Real(0.5);
  }
  template <class V>
  PYMETA_FN static V slope(V z, V, const Activation&) {
    const V h = held(z), th = t(h);
    const V du = (h * h * (Real(3) * c) + Real(1)) * k;
    return (th + Real(1)) * Real(0.5) + h * du * (Real(1) - th * th) * Real(0.5);
  }
  template <class V>
  PYMETA_FN static V curvature(V z, V, const Activation&) {
    const V h = held(z), th = t(h);
    const V du = (h * h * (Real(3) * c) + Real(1)) * k, ddu = h * (Real(6) * c * k);
    return (Real(1) - th * th) * (du + h * (ddu - th * du * du * Real(2)) * Real(0.5));
  }
};

template <>
struct Rule<ActivationKind::softplus> {
  static constexpr bool kFromOutput = false, kHasCurvature = true, kMovesZero = true;
  template <class V>
  PYMETA_FN static V value(V z, const Activation& p) {
    const V u = z * Real(p.alpha);
    const V soft = (at_least(u, V{}) + log1p(exp(-absolute(u)))) / (V{} + Real(p.alpha));
    return select(u > Real(p.threshold), z, soft);
  }
  template <class V>
  PYMETA_FN static V slope(V z, V, const Activation& p) {
    const V u = z * Real(p.alpha);
    return select(u > Real(p.threshold), V{} + Real(1), sigmoid(u));
  }
  template <class V>
  PYMETA_FN static V curvature(V z, V, const Activation& p) {
    const V u = z * Real(p.alpha), s = sigmoid(u);
    return select(u > Real(p.threshold), V{}, s * (Real(1) - s) * Real(p.alpha));
  }
};

// alpha z + threshold: factors and terms that are plain numbers
template <>
struct Rule<ActivationKind::affine> {
  static constexpr bool kFromOutput = true, kHasCurvature = false, kMovesZero = true;
  template <class V>
  PYMETA_FN static V value(V z, const Activation& p) {
    return z * Real(p.alpha) + Real(p.threshold);
  }
  template <class V>
  PYMETA_FN static V slope(V, V, const Activation& p) {
    return V{} + Real(p.alpha);
  }
  template <class V>
  PYMETA_FN static V curvature(V, V, const Activation&) {
    return V{};
  }
};

// Calls visit(Rule<kind>{}) for the kind that is known only at run time.
template <class Visitor>
PYMETA_FN void with_activation(ActivationKind kind, Visitor visit) {
  switch (kind) {
#define PYMETA_CASE(name, parameters, condition, message) \
  case ActivationKind::name:                              \
    return visit(Rule<ActivationKind::name>{});
    PYMETA_ACTIVATIONS(PYMETA_CASE)
#undef PYMETA_CASE
  }
}

// What an activation needs saved, for the workspace.
PYMETA_MEMBER inline bool slope_needs_input(ActivationKind kind) {
  bool needed = false;
  with_activation(kind, [&](auto rule) { needed = !decltype(rule)::kFromOutput; });
  return needed;
}
PYMETA_MEMBER inline bool has_curvature(ActivationKind kind) {
  bool bent = false;
  with_activation(kind, [&](auto rule) { bent = decltype(rule)::kHasCurvature; });
  return bent;
}
// Identity and ReLU are done in the store of the product before them.
PYMETA_MEMBER inline bool is_fused(ActivationKind kind) {
  return kind == ActivationKind::identity || kind == ActivationKind::relu;
}

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
