// Products by fragments (cuda/fragments.h), on emulated blocks: near the exact ones by the bound that follows from their parts,
// with the bits of float32 where a result is not finite, and the same bits whatever the tiles and threads.

#ifdef PYMETA_HAS_EMULATOR

#undef PYMETA_BLOCK  // planted_test is compiled for another machine
#undef PYMETA_EMULATE
#undef PYMETA_FAMILY
#undef PYMETA_ISA
#undef PYMETA_REAL
#define PYMETA_BLOCK
#define PYMETA_EMULATE
#define PYMETA_FAMILY tensor
#define PYMETA_ISA fragments_test
#define PYMETA_REAL float

#include "../cuda/machine.h"

#include "../cuda/fragments.h"

#endif

#include <cmath>
#include <limits>

#include "checks.h"
#include "tests.h"

namespace pymeta::testing {

#ifdef PYMETA_HAS_EMULATOR

namespace {

namespace blocks = pymeta::fragments_test;
using blocks::Epilogue;
using blocks::Form;

// Row after row, as the executor has them; between them anything.
struct Matrix {
  int rows, columns;
  int row = static_cast<int>(blocks::Block::stride(columns));
  Exact<float> numbers;

  Matrix(int r, int c, float between)
      : rows(r), columns(c), numbers(static_cast<std::size_t>(rows) * row, between) {}
  Matrix(int r, int c, float between, Random& random) : Matrix(r, c, between) {
    for (int i = 0; i < rows; ++i)
      for (int k = 0; k < columns; ++k)
        at(i, k) =
            static_cast<float>(std::ldexp(random.symmetric(), static_cast<int>(random.below(9))));
  }
  float& at(int r, int c) const { return numbers[static_cast<std::size_t>(r) * row + c]; }
};

template <Form kForm>
struct Case {
  int rows, columns, depth, pieces;
  Random random{static_cast<std::uint64_t>(rows * 7919 + columns * 31 + depth)};
  const float between = rows % 2 ? NAN : 12345;
  std::vector<Matrix> a, b;
  Matrix bias{1, columns, between, random}, base{rows, columns, between, random};
  Matrix extra{rows, columns, between, random};

  Case(int m, int n, int k, int count) : rows(m), columns(n), depth(k), pieces(count) {
    for (int i = 0; i < pieces; ++i) {
      const bool turns_a = kForm == Form::tn, turns_b = kForm == Form::nt;
      a.emplace_back(turns_a ? depth : rows, turns_a ? rows : depth, between, random);
      b.emplace_back(turns_b ? columns : depth, turns_b ? depth : columns, between, random);
    }
  }
  float& left(int piece, int m, int k) const {
    return kForm == Form::tn ? a[piece].at(k, m) : a[piece].at(m, k);
  }
  float& right(int piece, int k, int n) const {
    return kForm == Form::nt ? b[piece].at(n, k) : b[piece].at(k, n);
  }
  bool has_bias() const { return kForm == Form::nn && depth % 2 == 0; }

  Epilogue ending(Epilogue::Kind kind, bool sums, const Matrix& out) const {
    Epilogue e{kind, out.numbers.data(), out.row, nullptr, nullptr, 1};
    if (sums || kind == Epilogue::gate) e.other = base.numbers.data();
    if (sums) e.extra = extra.numbers.data(), e.scale = -0.25f;
    return e;
  }
  Matrix run(int height, int threads, Epilogue::Kind kind, bool sums = false) const {
    Matrix out(rows, columns, between);
    blocks::Product p{rows,
                      columns,
                      pieces,
                      {},
                      nullptr,
                      nullptr,
                      has_bias() ? bias.numbers.data() : nullptr,
                      ending(kind, sums, out)};
    p.first = {a[0].numbers.data(), a[0].row, b[0].numbers.data(), b[0].row, depth};
    if (pieces > 1) p.a = a[1].numbers.data(), p.b = b[1].numbers.data();
    blocks::emulation::launch(1, threads, 64, [&] { blocks::multiply_listed<kForm>(p, height); });
    return out;
  }
};

template <Form kForm>
constexpr Epilogue::Kind kUsual = kForm == Form::tn ? Epilogue::accumulate : Epilogue::plain;

double as_tf32(float v) { return blocks::float_of((blocks::bits_of(v) + 0x1000) & 0xffffe000); }

// Of each product of factors 2^-22 is left out, and lost of either low part; of the sum 2^-23 where eight products are added (small
// parts, of 2^-10 of it, take part in their own), and 2^-24 where the sums are.
template <Form kForm>
void check_near(const Case<kForm>& c, const Matrix& got, const std::string& name) {
  const int sums = c.pieces * ((c.depth + 7) / 8);
  const double part = (3 * 0x1p-22 + sums * 0x1p-23 + 0x1p-24) * (1 + 0x1p-8);
  double worst = 0, worst_of_one = 0;
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.columns; ++n) {
      const double start = c.has_bias() ? c.bias.at(0, n) : 0;
      double wanted = start, of_one = start, size = std::fabs(start);
      for (int s = 0; s < c.pieces; ++s)
        for (int k = 0; k < c.depth; ++k) {
          const float x = c.left(s, m, k), y = c.right(s, k, n);
          wanted += static_cast<double>(x) * y;
          of_one += as_tf32(x) * as_tf32(y);
          size += std::fabs(static_cast<double>(x) * y);
        }
      worst = std::max(worst, std::fabs(got.at(m, n) - wanted) / (part * size));
      worst_of_one = std::max(worst_of_one, std::fabs(of_one - wanted) / (part * size));
    }
  CHECK(worst <= 1, name + ": off by " + std::to_string(worst) + " of the bound");
  CHECK(worst_of_one > 4, name + ": TF32 alone would pass");
}

template <Form kForm>
void check_form(const char* form) {
  const auto same = [](const Matrix& x, const Matrix& y) { return x.numbers.same_bits(y.numbers); };
  const Epilogue::Kind usual = kUsual<kForm>;
  for (const int rows : {1, 5, 16, 33})
    for (const int columns : {16, 18, 40, 67})
      for (const int depth : {1, 8, 13, 20, 32})
        for (const int pieces : {1, 2}) {
          const Case<kForm> c(rows, columns, depth, pieces);
          const std::string name = std::string("fragments ") + form + " " + std::to_string(rows) +
                                   "x" + std::to_string(columns) + "x" + std::to_string(depth);
          const Matrix wanted = c.run(blocks::kFragments, 1, usual);
          check_near(c, wanted, name);
          for (const int threads : {3, 32})
            CHECK(same(c.run(blocks::kWideFragments, threads, usual), wanted),
                  name + ": other bits with other tiles and threads");
          for (int m = 0; m < rows; ++m)
            for (int n = columns; n < (columns + 3) / 4 * 4; ++n)
              CHECK(wanted.at(m, n) == 0, name + ": padding is not cleared");
          // The endings of product.h, on the same numbers.
          for (const Epilogue::Kind kind : {Epilogue::relu, Epilogue::gate, Epilogue::accumulate}) {
            if (kForm == Form::tn
                    ? kind != usual
                    : kind == Epilogue::accumulate || (kind == Epilogue::relu && kForm != Form::nn))
              continue;
            const Matrix ended = c.run(blocks::kFragments, 2, kind, kForm == Form::tn);
            const Epilogue e = c.ending(kind, kForm == Form::tn, ended);
            bool all = true;
            for (int m = 0; m < rows; ++m)
              for (int n = 0; n < columns; ++n)
                all = all &&
                      ended.at(m, n) == e(wanted.at(m, n), static_cast<std::size_t>(m) * e.row + n);
            CHECK(all, name + ": another ending");
          }
        }
}

// In rows of their own: an infinity, a NaN, a number that no TF32 is as large as, and a sum that is too large.
template <Form kForm>
void check_not_finite(const char* form) {
  const float largest = std::numeric_limits<float>::max();
  Case<kForm> c(20, 24, 17, 1);
  const Matrix usual = c.run(blocks::kFragments, 1, kUsual<kForm>);
  c.left(0, 3, 5) = -INFINITY;
  c.left(0, 4, 16) = NAN;
  for (int k = 0; k < c.depth; ++k) c.left(0, 7, k) = 0;
  c.left(0, 7, 2) = largest;
  for (int n = 0; n < c.columns; ++n) c.right(0, 2, n) = 0.5f;
  for (int k = 0; k < c.depth; ++k) c.left(0, 11, k) = largest;
  const Matrix got = c.run(blocks::kFragments, 1, kUsual<kForm>);
  const Matrix in_float32 = c.run(4, 1, kUsual<kForm>);
  const std::string name = std::string("fragments ") + form;
  int infinite = 0, others = 0;
  for (int n = 0; n < c.columns; ++n) {
    for (const int m : {3, 4, 7, 11}) {
      const float x = got.at(m, n), y = in_float32.at(m, n);
      CHECK(std::memcmp(&x, &y, sizeof x) == 0, name + ": another result that is not finite");
      infinite += std::isinf(x);
    }
    CHECK(std::isnan(got.at(4, n)), name + ": a NaN is lost");
    CHECK(got.at(7, n) == 0.5f * largest, name + ": the largest number is lost");
    for (int m = 12; m < c.rows; ++m) others += !std::isfinite(got.at(m, n));
  }
  CHECK(infinite >= c.columns, name + ": an infinity is lost");
  CHECK(others == 0, name + ": rows beside them");
}

}  // namespace

void test_fragments() {
  check_form<Form::nn>("nn");
  check_form<Form::nt>("nt");
  check_form<Form::tn>("tn");
  check_not_finite<Form::nn>("nn");
  check_not_finite<Form::nt>("nt");
  check_not_finite<Form::tn>("tn");
}

#else
void test_fragments() {}
#endif

}  // namespace pymeta::testing
