// Products on tensor cores, in three parts ("3xTF32"): warps compute tiles of 16 x 16 or 16 x 32 outputs.
//
// A factor is the sum of two TF32, numbers of eleven bits: a = high + low with high = tf32(a). A product is low high + high low +
// high high. What is left out, low low and the last bits of both lows, is 2^-22 |a b| each at most. The small parts have a sum
// of their own, which joins the large one at the end (Ootomo and Yokota 2022, "Recovering single precision accuracy from Tensor
// Cores while surpassing the FP32 theoretical peak performance"). Sums are float32 numbers; how the hardware rounds where it adds
// eight products to one is not documented, and may be towards zero. So an output is off by 3 x 2^-22 of the sum of its products'
// sizes at most, and by 2^-23 of it for every eight of them.
//
// An output that is not finite is made again as product.h does it: NaN and infinities are those of float32, and so are factors
// that are too large to be rounded to a TF32. Numbers below 2^-126, the low part among them, may count as 0.
//
// Where factors lie in a fragment is free, as long as A and B agree on the depth, so all are read in pairs: at a depth of k + 2 t and
// k + 2 t + 1 by a lane of number t in its group, and neighbouring rows of A (columns of B) in the fragment's two halves
// (in two fragments). Half a warp then meets all banks once, since rows lie an odd number of quads apart, and a lane ends up with
// two rows of four neighbouring outputs, which is a tile of product.h. An output's bits depend on its own row and column alone.
#pragma once

#include "block.h"

PYMETA_KERNEL_BEGIN

struct alignas(2 * sizeof(Real)) Pair {
  Real v[2];
};
PYMETA_FN inline Pair load_pair(const Real* p) {
  note_access(p, 2);
  return *reinterpret_cast<const Pair*>(p);
}

// The lanes' parts of a fragment: of A, or of as many of B (and of sums) as tiles have.
template <int kCount>
struct SplitFactors {
  float high[kPlayed][kCount], low[kPlayed][kCount];

  // To nearest, as cvt.rna.tf32 has it; without its look at infinities, which are found in the outputs. The low part may be longer:
  // the hardware reads what fits.
  PYMETA_FN void put(int lane, int i, Real v) {
    const float whole = static_cast<float>(v);
    high[lane][i] = float_of((bits_of(whole) + 0x1000u) & 0xffffe000u);
    low[lane][i] = whole - high[lane][i];
  }
};
using Sums = float[kPlayed][4];

// The first of the two rows of A, and of outputs, that a lane has: lanes of a quarter of the warp are four rows apart.
PYMETA_FN inline int fragment_row(int lane) {
  const int group = lane / 4;
  return 2 * ((group & 4) + (group & 1) * 2 + (group >> 1 & 1));
}

// Where a lane reads A and B, from the beginning of each. A is read along the depth in the forms nn and nt, B in the form nt.
template <Form kForm, int kBlocks>
struct FragmentPlaces {
  static constexpr bool kDeepA = kForm != Form::tn, kDeepB = kForm == Form::nt;
  int a[2], b[kBlocks], a_step, b_step;

  PYMETA_FN void begin(const Piece& p, int rows, int columns, int m0, int n0, int lane) {
    const int group = lane / 4, deep = lane % 4 * 2, m = m0 + fragment_row(lane);
    a_step = kDeepA ? 8 : 8 * p.a_row;
    b_step = kDeepB ? 8 : 8 * p.b_row;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      a[h] =
          kDeepA ? within(m + h, rows) * p.a_row + deep : (deep + h) * p.a_row + (m < rows ? m : 0);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int n = n0 + i / 2 * 16 + 2 * group;
      b[i] = kDeepB ? within(n + i % 2, columns) * p.b_row + deep
                    : (deep + i % 2) * p.b_row + (n < columns ? n : 0);
    }
  }
  // Eight numbers along the depth, of which `left` are there; then on to the next.
  template <bool kWhole, Where kWhere>
  PYMETA_FN void read(const Operands<kWhere>& from, int lane, int i, int left,
                      SplitFactors<4>& to_a, SplitFactors<2 * kBlocks>& to_b) {
    const int deep = lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Pair own = pair<kWhole, kDeepA>(from.a + a[h], deep, h, left);
#pragma unroll
      for (int j = 0; j < 2; ++j) to_a.put(i, kDeepA ? h + 2 * j : 2 * h + j, own.v[j]);
      a[h] += a_step;
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int first = block / 2 * 4, h = block % 2;
      const Pair own = pair<kWhole, kDeepB>(from.b + b[block], deep, h, left);
#pragma unroll
      for (int j = 0; j < 2; ++j) to_b.put(i, first + (kDeepB ? 2 * h + j : 2 * j + h), own.v[j]);
      b[block] += b_step;
    }
  }

 private:
  // Beyond the depth there may be anything, or no memory.
  template <bool kWhole, bool kDeep>
  PYMETA_FN static Pair pair(const Real* p, int deep, int half, int left) {
    if constexpr (kWhole) return load_pair(p);
    if ((kDeep ? deep : deep + half) >= left) return {};
    Pair own = load_pair(p);
    if (kDeep && deep + 1 >= left) own.v[1] = 0;
    return own;
  }
};

template <bool kWhole, Form kForm, Where kWhere, int kBlocks>
PYMETA_FN void add_fragments(const Operands<kWhere>& from,
                             FragmentPlaces<kForm, kBlocks> (&places)[kPlayed], int left,
                             Sums (&sum)[kBlocks], Sums (&small)[kBlocks]) {
  SplitFactors<4> a;
  SplitFactors<2 * kBlocks> b;
#pragma unroll
  for (int i = 0; i < kPlayed; ++i) {
    const PlayedLane lane(i);
    places[i].template read<kWhole>(from, lane, i, left, a, b);
  }
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    float high[kPlayed][2], low[kPlayed][2];
#pragma unroll
    for (int i = 0; i < kPlayed; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        high[i][j] = b.high[i][2 * block + j];
        low[i][j] = b.low[i][2 * block + j];
      }
    warp_multiply_add(small[block], a.low, high);
    warp_multiply_add(small[block], a.high, low);
    warp_multiply_add(sum[block], a.high, high);
  }
}
template <Form kForm, Where kWhere, int kBlocks>
PYMETA_FN void add_piece_by_fragments(const Piece& p, int rows, int columns, int m0, int n0,
                                      Sums (&sum)[kBlocks], Sums (&small)[kBlocks]) {
  const Operands<kWhere> from(p);
  FragmentPlaces<kForm, kBlocks> places[kPlayed];
#pragma unroll
  for (int i = 0; i < kPlayed; ++i) places[i].begin(p, rows, columns, m0, n0, PlayedLane(i));
  int k = 0;
#pragma unroll 2
  for (; k + 8 <= p.depth; k += 8) add_fragments<true>(from, places, 8, sum, small);
  if (k < p.depth) add_fragments<false>(from, places, p.depth - k, sum, small);
}

// One output, as product.h has it: for those that are not finite by fragments.
template <Form kForm>
PYMETA_FN PYMETA_NOINLINE Real output_in_float32(const Product& p, int m, int n) {
  Real sum = p.bias ? p.bias[n] : Real(0);
#pragma unroll 1
  for (int s = 0; s < p.count; ++s) {
    const Piece piece = p.piece(s);
#pragma unroll 1
    for (int k = 0; k < piece.depth; ++k)
      sum = fma(piece.a[kForm == Form::tn ? k * piece.a_row + m : m * piece.a_row + k],
                piece.b[kForm == Form::nt ? n * piece.b_row + k : k * piece.b_row + n], sum);
  }
  return sum;
}
template <Form kForm>
PYMETA_FN void mend_tile(const Product& p, int m0, int n0, Tile<2>& tile) {
  Real nothing = 0;  // NaN where a number is not finite
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int c = 0; c < 4; ++c) nothing = fma(tile.sum[m][c], Real(0), nothing);
  if (nothing == 0) return;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (m0 + m < p.rows && n0 + c < p.columns && !(tile.sum[m][c] - tile.sum[m][c] == 0))
        tile.sum[m][c] = output_in_float32<kForm>(p, m0 + m, n0 + c);
}

// A warp's tile is 16 x (8 kBlocks).
template <Form kForm, int kBlocks>
PYMETA_FN PYMETA_NOINLINE void multiply_by_fragments(const Product& given) {
  const Epilogue epilogue = given.epilogue;
  const int rows = given.rows, columns = given.columns, count = given.count;
  const Real* const biases = given.bias;
  const int across = (columns + 8 * kBlocks - 1) / (8 * kBlocks);
  const int tiles = across * ((rows + 15) / 16);
  for (int t = warp_index(); t < tiles; t += warp_count()) {
    // A factor is split by three instructions, a block has three multiply-adds of fragments.
    note_tile(long{(given.first.depth + 7) / 8 * count} * (3 * (4 + 2 * kBlocks) + 3 * kBlocks));
    if (!plays_warp()) continue;
    const int m0 = t / across * 16, n0 = t % across * (8 * kBlocks);
    Sums sum[kBlocks], small[kBlocks] = {};
#pragma unroll
    for (int i = 0; i < kPlayed; ++i) {
      const PlayedLane lane(i);
#pragma unroll
      for (int block = 0; block < kBlocks; block += 2) {
        const int n = n0 + 8 * block + lane % 4 * 4;
        const Quad bias = biases && n < columns ? load_quad(biases + n) : Quad{};
#pragma unroll
        for (int c = 0; c < 4; ++c)
          sum[block + c % 2][i][c / 2] = sum[block + c % 2][i][2 + c / 2] =
              static_cast<float>(bias.v[c]);
      }
    }
#pragma unroll 1
    for (int s = 0; s < count; ++s) {
      const Piece piece = given.piece(s);
      const Where there = where(piece);
      if (there == Where::near)
        add_piece_by_fragments<kForm, Where::near>(piece, rows, columns, m0, n0, sum, small);
      else if (there == Where::near_and_far)
        add_piece_by_fragments<kForm, Where::near_and_far>(piece, rows, columns, m0, n0, sum,
                                                           small);
      else
        add_piece_by_fragments<kForm, Where::anywhere>(piece, rows, columns, m0, n0, sum, small);
    }
#pragma unroll
    for (int i = 0; i < kPlayed; ++i) {
      const PlayedLane lane(i);
#pragma unroll
      for (int block = 0; block < kBlocks; block += 2) {
        const int m = m0 + fragment_row(lane), n = n0 + 8 * block + lane % 4 * 4;
        if (m >= rows || n >= columns) continue;
        Tile<2> tile;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            tile.sum[r][c] =
                sum[block + c % 2][i][2 * r + c / 2] + small[block + c % 2][i][2 * r + c / 2];
        mend_tile<kForm>(given, m, n, tile);
        finish_tile<kForm, false>(epilogue, rows, columns, 0, m, n, tile);
      }
    }
  }
}

// As multiply_alone, by fragments where the height says so.
template <Form kForm>
PYMETA_FN void multiply_listed(const Product& p, int height) {
  if constexpr (Block::Family::kFragments) {
    const InProduct product;
    if (height == kFragments) return multiply_by_fragments<kForm, 2>(p);
    if (height == kWideFragments) return multiply_by_fragments<kForm, 4>(p);
  }
  multiply_alone<kForm>(p, height);
}

PYMETA_KERNEL_END
