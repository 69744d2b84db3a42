// A vector of `Real`s: the widest register of the instruction set this file is compiled for.
//
// GCC's and Clang's vector types give arithmetic, comparison and `mask ? a : b`; what they lack (fused
// multiply-add, square root, NaN-keeping maximum) is here, with the elementary functions. Contraction is off
// for the whole file set: a product is fused with a sum exactly where fma() is written, so a number does not
// depend on how the compiler inlined its formula, and the two executors agree to the last bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PYMETA_MACHINE  // core/ is compiled for it from here on
#include "../core/kernel_namespace.h"
#include "../core/call/network.h"

PYMETA_KERNEL_BEGIN

using Real = PYMETA_REAL;
constexpr bool kDouble = sizeof(Real) == 8;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32, kSpareRegisters = 1;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16, kSpareRegisters = 1;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32, kSpareRegisters = 1;
#else
constexpr int kVectorBytes = 16, kRegisters = 16,
              kSpareRegisters = 2;  // multiply, then add: one more temporary
#endif

constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Real));
using Int = std::conditional_t<kDouble, std::int64_t, std::int32_t>;
typedef Real Vec __attribute__((vector_size(kVectorBytes)));
typedef Int IntVec __attribute__((vector_size(kVectorBytes)));
typedef Real UnalignedVec
    __attribute__((vector_size(kVectorBytes), aligned(sizeof(Real)), may_alias));

// For core/call/workspace.h.
using Place = std::size_t;
constexpr bool kTwoMemories = false;
constexpr int kMostLayers = kMaxLayers;

inline Vec load(const Real* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(Real* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline Vec broadcast(Real s) { return s - Vec{}; }
inline Vec zero() { return Vec{}; }
inline IntVec broadcast_int(Int s) { return s - IntVec{}; }
inline Vec select(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }
inline bool any_lane(IntVec mask) {
  Int any = 0;
  for (int i = 0; i < kWidth; ++i) any |= mask[i];
  return any != 0;
}
inline bool all_lanes(IntVec mask) { return !any_lane(~mask); }

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  if constexpr (kDouble)
    return (Vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  else
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  if constexpr (kDouble)
    return (Vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  else
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  if constexpr (kDouble)
    return (Vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  else
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The masked forms with a full mask: GCC 12 warns of the plain ones' own uninitialised pass-through operand.
inline Vec square_root(Vec a) {
#if defined(__AVX512F__)
  if constexpr (kDouble)
    return (Vec)_mm512_maskz_sqrt_pd(0xff, (__m512d)a);
  else
    return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)a);
#elif defined(__AVX2__)
  if constexpr (kDouble)
    return (Vec)_mm256_sqrt_pd((__m256d)a);
  else
    return (Vec)_mm256_sqrt_ps((__m256)a);
#elif defined(__aarch64__)
  if constexpr (kDouble)
    return (Vec)vsqrtq_f64((float64x2_t)a);
  else
    return (Vec)vsqrtq_f32((float32x4_t)a);
#else
  if constexpr (kDouble)
    return (Vec)_mm_sqrt_pd((__m128d)a);
  else
    return (Vec)_mm_sqrt_ps((__m128)a);
#endif
}

// max(floor, v), but a NaN in v stays: x86's maximum returns its second operand when either is NaN.
inline Vec at_least(Vec v, Vec floor) {
#if defined(__AVX512F__)
  if constexpr (kDouble)
    return (Vec)_mm512_maskz_max_pd(0xff, (__m512d)floor, (__m512d)v);
  else
    return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)floor, (__m512)v);
#else
  return select(floor > v, floor, v);
#endif
}

inline Vec absolute(Vec v) { return (Vec)((IntVec)v & ~(IntVec)broadcast(Real(-0.0))); }
inline Vec with_sign_of(Vec magnitude, Vec sign) {
  const IntVec bit = (IntVec)broadcast(Real(-0.0));
  return (Vec)(((IntVec)magnitude & ~bit) | ((IntVec)sign & bit));
}
// v where the mask that lies at `keep` is all ones, else 0.
inline Vec where_kept(Vec v, const Real* keep) { return (Vec)((IntVec)v & (IntVec)load(keep)); }
inline Vec minimum(Vec a, Vec b) { return select(b < a, b, a); }

// Lane i + kShift of v, cyclically.
template <int kShift, int... I>
Vec rotate(Vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, ((I + kShift) % kWidth)...);
}

// The sum of all lanes, halves first: lane i with lane i + width / 2, and so on.
template <int kHalf = kWidth / 2>
Real sum_lanes(Vec v) {
  if constexpr (kHalf == 0)
    return v[0];
  else
    return sum_lanes<kHalf / 2>(v + rotate<kHalf>(v, std::make_integer_sequence<int, kWidth>{}));
}

// One round of a block transposition: exchange the off-diagonal halves of size kHalf between rows i and i + kHalf.
template <int kHalf, int... I>
void exchange(Vec& low, Vec& high, std::integer_sequence<int, I...>) {
  const Vec a = low, b = high;
  low = __builtin_shufflevector(a, b, ((I & kHalf) ? kWidth + I - kHalf : I)...);
  high = __builtin_shufflevector(a, b, ((I & kHalf) ? kWidth + I : I + kHalf)...);
}

// Inlined whatever the compiler thinks: a block is registers.
template <int kHalf = kWidth / 2>
inline __attribute__((always_inline)) void transpose_block(Vec (&block)[kWidth]) {
  if constexpr (kHalf > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i)
      if (!(i & kHalf))
        exchange<kHalf>(block[i], block[i + kHalf], std::make_integer_sequence<int, kWidth>{});
    transpose_block<kHalf / 2>(block);
  }
}

// Lane i becomes sum_lanes(block[i]), added in the same order: halves of two vectors at once.
template <int kHalf = kWidth / 2>
Vec sums_of_lanes(Vec (&block)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i) {
    exchange<kHalf>(block[i], block[i + kHalf], std::make_integer_sequence<int, kWidth>{});
    block[i] = block[i] + block[i + kHalf];
  }
  if constexpr (kHalf > 1)
    return sums_of_lanes<kHalf / 2>(block);
  else
    return block[0];
}

// The first `count` numbers, up to kWidth, and no others are read or written; the lanes behind them are 0.
inline Vec load_first(const Real* p, int count) {
#if defined(__AVX512F__)
  if constexpr (kDouble)
    return (Vec)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
  else
    return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  Vec v = zero();
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}
inline void store_first(Real* p, Vec v, int count) {
#if defined(__AVX512F__)
  if constexpr (kDouble)
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
  else
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#else
  for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}
#if defined(__AVX512F__)
constexpr bool kHasMaskedMemory = true;
#else
constexpr bool kHasMaskedMemory = false;
#endif

// A corner of a matrix of fewer rows or columns than a vector has lanes.
inline void transpose_part(int rows, int columns, const Real* from, long from_row, Real* to,
                           long to_row) {
  // Fewer elements than this are moved sooner one by one.
  if (!kHasMaskedMemory || rows * columns < 4 * kWidth) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
    return;
  }
  Vec block[kWidth];
#pragma GCC unroll 16
  for (int k = 0; k < kWidth; ++k)
    block[k] = k < rows ? load_first(from + k * from_row, columns) : zero();
  transpose_block(block);
#pragma GCC unroll 16
  for (int k = 0; k < kWidth; ++k)
    if (k < columns) store_first(to + k * to_row, block[k], rows);
}

// from [rows, columns] to its transpose; only elements of the matrix are read or written.
inline void transpose_matrix(int rows, int columns, const Real* from, long from_row, Real* to,
                             long to_row) {
  for (int i = 0; i < rows; i += kWidth)
    for (int j = 0; j < columns; j += kWidth) {
      const Real* corner = from + i * from_row + j;
      Real* into = to + j * to_row + i;
      if (i + kWidth > rows || j + kWidth > columns) {
        transpose_part(rows - i < kWidth ? rows - i : kWidth,
                       columns - j < kWidth ? columns - j : kWidth, corner, from_row, into, to_row);
        continue;
      }
      Vec block[kWidth];
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) block[k] = load(corner + k * from_row);
      transpose_block(block);
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) store(into + k * to_row, block[k]);
    }
}

// Elementary functions, each within a few ulp. exp(v) = 2^n e^r with |r| <= ln2 / 2 and the Taylor series of
// e^r - 1, whose terms past the last one used are below half an ulp there.

struct ExpParts {
  Vec fraction;  // e^r - 1
  Vec scale_a;   // 2^n as a product of two, so that neither leaves the range
  Vec scale_b;
};

inline Vec power_of_two(IntVec n) {
  constexpr Int bias = kDouble ? 1023 : 127;
  constexpr int mantissa = kDouble ? 52 : 23;
  return (Vec)((n + bias) << mantissa);
}

inline ExpParts exp_parts(Vec v) {
  constexpr Real top = kDouble ? Real(709.79) : Real(88.73);
  constexpr Real bottom = kDouble ? Real(-746) : Real(-104);
  constexpr Real log2_high = kDouble ? Real(6.93147180369123816490e-01) : Real(0.693359375);
  constexpr Real log2_low = kDouble ? Real(1.90821492927058770002e-10) : Real(-2.12194440e-4);
  constexpr int terms = kDouble ? 13 : 7;
  // Written so that a NaN fails both comparisons and stays.
  v = select(v > top, broadcast(top), v);
  v = select(v < bottom, broadcast(bottom), v);
  constexpr Real magic =
      kDouble ? Real(6755399441055744.0) : Real(12582912.0);  // 1.5 * 2^mantissa: rounds
  const Vec shifted = fma(v, broadcast(Real(1.4426950408889634074)), broadcast(magic));
  const Vec n = shifted - magic;
  const IntVec exponent = (IntVec)shifted - (IntVec)broadcast(magic);
  Vec r = fma(n, broadcast(-log2_high), v);
  r = fma(n, broadcast(-log2_low), r);
  constexpr double inverse_factorial[] = {1.0,
                                          1.0,
                                          1.0 / 2,
                                          1.0 / 6,
                                          1.0 / 24,
                                          1.0 / 120,
                                          1.0 / 720,
                                          1.0 / 5040,
                                          1.0 / 40320,
                                          1.0 / 362880,
                                          1.0 / 3628800,
                                          1.0 / 39916800,
                                          1.0 / 479001600,
                                          1.0 / 6227020800.0};
  Vec series = broadcast(Real(inverse_factorial[terms]));
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 2; --i)
    series = fma(series, r, broadcast(Real(inverse_factorial[i])));
  const IntVec half = exponent >> 1;
  return {fma(series * r, r, r), power_of_two(half), power_of_two(exponent - half)};
}

inline Vec exp(Vec v) {
  const ExpParts e = exp_parts(v);
  return fma(e.fraction, e.scale_a, e.scale_a) * e.scale_b;
}

inline Vec expm1(Vec v) {
  const ExpParts e = exp_parts(v);
  const Vec scale = e.scale_a * e.scale_b;
  const Vec direct = fma(e.fraction, scale, scale - Real(1));
  // 2^n alone overflows before e^v does.
  return select(scale < Real(1e30), direct,
                fma(e.fraction, e.scale_a, e.scale_a) * e.scale_b - Real(1));
}

// log(v) for normal positive v: v = 2^n m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1)).
inline Vec log(Vec v) {
  constexpr Int mantissa = kDouble ? 52 : 23;
  constexpr Int sqrt_half = kDouble ? Int(0x3fe6a09e667f3bcdLL) : Int(0x3f3504f3);
  constexpr int terms = kDouble ? 11 : 6;
  const IntVec bits = (IntVec)v;
  const IntVec n = (bits - sqrt_half) >> mantissa;
  const Vec m = (Vec)(bits - (n << mantissa));
  const Vec s = (m - Real(1)) / (m + Real(1));
  const Vec s2 = s * s;
  Vec series = broadcast(Real(1.0 / (2 * terms + 1)));
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 1; --i) series = fma(series, s2, broadcast(Real(1.0 / (2 * i + 1))));
  const Vec exponent = __builtin_convertvector(n, Vec);
  constexpr Real log2_high = kDouble ? Real(6.93147180369123816490e-01) : Real(0.693359375);
  constexpr Real log2_low = kDouble ? Real(1.90821492927058770002e-10) : Real(-2.12194440e-4);
  const Vec twice = s + s;
  Vec result = fma(twice * s2, series, twice);
  result = fma(exponent, broadcast(log2_low), result);
  result = fma(exponent, broadcast(log2_high), result);
  const Vec infinity = broadcast(Real(__builtin_inf()));
  result = select(v == infinity, infinity, result);
  return select(v != v, v, result);
}

// log(1 + v) for v >= 0, exact in the small: the part of v that 1 + v lost is put back to first order.
inline Vec log1p(Vec v) {
  const Vec w = v + Real(1);
  const Vec lost = v - (w - Real(1));
  return log(w) + lost / w;
}

inline Vec sigmoid(Vec v) { return Real(1) / (exp(-v) + Real(1)); }

inline Vec tanh(Vec v) {
  const Vec t = expm1(minimum(absolute(v) * Real(2), broadcast(Real(60))));
  const Vec bounded = with_sign_of(t / (t + Real(2)), v);
  return select(v != v, v, bounded);
}

// The standard normal distribution function. For u = |v| / sqrt(2), erfc(u) = t exp(P(t) - u^2) with
// t = 2 / (2 + u); P interpolates log(erfc(u) / t) + u^2 at the Chebyshev points of the range of t in which the
// result is not yet zero (highest power first, in the variable s in [-1, 1]; fitted in 60 digits).
inline Vec normal_cdf(Vec v) {
  constexpr double float_fit[] = {
      -0.000026586474108880286929, 0.000066099971381216429622, 0.00013829874848737265892,
      -0.00061015012889219654853,  -0.00023924301286284049251, 0.0040251042780840790274,
      -0.0014150801577725534347,   -0.030774729285308727388,   0.017633865019592575553,
      0.57856789541066681694,      -0.5673654734673336768};
  constexpr double double_fit[] = {
      7.7884408307357525985e-10,   -2.4051360830120127214e-9,  -3.2804003440212794218e-9,
      2.3407025120354200225e-8,    -1.9951387935102632387e-8,  -8.8946213701324920392e-8,
      2.4281928620554689402e-7,    2.2947271079205236939e-8,   -1.124054126488901726e-6,
      1.5589436606108242877e-6,    2.588017318355455563e-6,    -9.9497062834983837708e-6,
      1.9988079322390050838e-6,    0.000038018059134224586111, -0.00005120977234178593476,
      -0.000099576810103206804637, 0.00030827894958948758714,  0.00013326776305264406743,
      -0.0014316031465361963943,   0.00043779950034903295504,  0.0065929036825205971984,
      -0.0051890628271173525784,   -0.039942324416966434471,   0.032864859357458544758,
      0.63309826829401933173,      -0.62675486601084852787};
  constexpr int terms = kDouble ? 26 : 11;
  constexpr Real largest = kDouble ? Real(28) : Real(11);
  constexpr Real t_least = Real(2) / (Real(2) + largest);
  const Vec u = minimum(absolute(v) * Real(0.70710678118654752440), broadcast(largest));
  const Vec t = Real(2) / (u + Real(2));
  const Vec s = (t - t_least) * (Real(2) / (Real(1) - t_least)) - Real(1);
  Vec p = broadcast(Real(kDouble ? double_fit[0] : float_fit[0]));
#pragma GCC unroll 32
  for (int i = 1; i < terms; ++i)
    p = fma(p, s, broadcast(Real(kDouble ? double_fit[i] : float_fit[i])));
  const Vec tail = t * exp(p - u * u) * Real(0.5);
  return select(v != v, v, select(v < Real(0), tail, Real(1) - tail));
}

PYMETA_KERNEL_END
