// Small matrix products by the threads of a block: C = bias + sum over pieces of A_s B_s, with the epilogue in the store.
//
// A thread computes tiles of kTileRows x 4 outputs in registers (or 8 x 8); tiles go round the threads, along a row first. Rows of all
// matrices begin at multiples of 16 bytes (Block::stride), so operands are read four at a time:
//   nn  A[m][k] B[k][n]   x W        a row of B serves neighbouring threads, an element of A the whole tile row
//   nt  A[m][k] B[n][k]   d W^T      rows of B lie an odd number of quads apart: a quarter warp meets every bank once
//   tn  A[k][m] B[k][n]   x^T d      both are read along their rows
// Every output is one chain of fused multiply-adds in the order of k whatever the tile, so a task's bits do not depend
// on how many threads it has. How tall tiles are tiling.h says. Padding columns of the result are set to 0.
#pragma once

#include "tiling.h"

PYMETA_KERNEL_BEGIN

struct alignas(16) Quad {
  Real v[4];
};
PYMETA_FN inline Quad load_quad(const Real* p) {
  note_access(p, 4);
  return *reinterpret_cast<const Quad*>(p);
}
PYMETA_FN inline void store_quad(Real* p, const Quad& q) {
  note_access(p, 4);
  *reinterpret_cast<Quad*>(p) = q;
}

enum class Form { nn, nt, tn };

struct Piece {
  const Real* a;
  int a_row;
  const Real* b;
  int b_row;
  int depth;
};

// What happens to a finished number v on its way to `out`.
struct Epilogue {
  enum Kind { plain, relu, gate, accumulate } kind = plain;
  Real* out = nullptr;
  int row = 0;
  const Real* other = nullptr;  // gate: the ReLU's output; accumulate: base
  const Real* extra = nullptr;
  Real scale = 1;

  PYMETA_FN Real operator()(Real v, std::size_t at) const {
    if (kind == relu) return at_least(v, 0);
    if (kind == gate) return other[at] <= Real(0) ? Real(0) : v;
    if (kind == accumulate) {
      if (extra && other) return fma(scale, v, extra[at]) + other[at];
      if (const Real* only = extra ? extra : other) return fma(scale, v, only[at]);
      return v * scale;
    }
    return v;
  }
  PYMETA_FN void emit(Real v, int m, int n) const {
    const std::size_t at = static_cast<std::size_t>(m) * row + n;
    out[at] = (*this)(v, at);
  }
};

struct Product {
  int rows, columns;
  int count;          // of pieces
  Piece first;        // the sizes of both
  const Real *a, *b;  // the second's operands
  const Real* bias;   // [columns], or null
  Epilogue epilogue;

  PYMETA_FN Piece piece(int i) const {
    return {i ? a : first.a, first.a_row, i ? b : first.b, first.b_row, first.depth};
  }
};

template <int kTileRows>
struct Tile {
  Real sum[kTileRows][4];

  PYMETA_FN void add(Real a, const Quad& b, int m) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[m][c] = fma(a, b.v[c], sum[m][c]);
  }
};

// Where a piece's operands lie. Known, they are read by the instructions of that memory.
enum class Where { near, near_and_far, anywhere };

PYMETA_FN inline Where where(const Piece& p) {
  if (!lies_near(p.a)) return Where::anywhere;
  return lies_near(p.b) ? Where::near : lies_far(p.b) ? Where::near_and_far : Where::anywhere;
}

template <Where kWhere>
struct Operands {
  const Real *a, *b;
  PYMETA_FN explicit Operands(const Piece& p) : a(p.a), b(p.b) {
    if constexpr (kWhere != Where::anywhere) assume_near(a);
    if constexpr (kWhere == Where::near) assume_near(b);
    if constexpr (kWhere == Where::near_and_far) assume_far(b);
  }
};

// A's rows past the last are those of the last: what they make is not stored.
PYMETA_FN inline int within(int i, int count) { return i < count ? i : count - 1; }

template <Where kWhere, int kTileRows>
PYMETA_FN void add_piece_nn(const Piece& p, int rows, int m0, int n0, Tile<kTileRows>& tile) {
  const Operands<kWhere> from(p);
  const Real* a[kTileRows];
#pragma unroll
  for (int m = 0; m < kTileRows; ++m) a[m] = from.a + within(m0 + m, rows) * p.a_row;
  const Real* b = from.b + n0;
  int k = 0;
  PYMETA_ROLLED
  for (; k + 4 <= p.depth; k += 4) {
    Quad left[kTileRows], right[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) right[j] = load_quad(b + (k + j) * p.b_row);
#pragma unroll
    for (int m = 0; m < kTileRows; ++m) left[m] = load_quad(a[m] + k);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int m = 0; m < kTileRows; ++m) tile.add(left[m].v[j], right[j], m);
  }
#pragma unroll 1
  for (; k < p.depth; ++k) {
    const Quad right = load_quad(b + k * p.b_row);
#pragma unroll
    for (int m = 0; m < kTileRows; ++m) tile.add(load(a[m] + k), right, m);
  }
}

template <Where kWhere, int kTileRows>
PYMETA_FN void add_piece_nt(const Piece& p, int rows, int columns, int step, int m0, int n0,
                            Tile<kTileRows>& tile) {
  const Operands<kWhere> from(p);
  const Real *a[kTileRows], *b[4];
#pragma unroll
  for (int m = 0; m < kTileRows; ++m) a[m] = from.a + within(m0 + m, rows) * p.a_row;
#pragma unroll
  for (int c = 0; c < 4; ++c) b[c] = from.b + within(n0 + c * step, columns) * p.b_row;
  int k = 0;
  PYMETA_ROLLED
  for (; k + 4 <= p.depth; k += 4) {
    Quad left[kTileRows], right[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) right[c] = load_quad(b[c] + k);
#pragma unroll
    for (int m = 0; m < kTileRows; ++m) left[m] = load_quad(a[m] + k);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int m = 0; m < kTileRows; ++m)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          tile.sum[m][c] = fma(left[m].v[j], right[c].v[j], tile.sum[m][c]);
  }
#pragma unroll 1
  for (; k < p.depth; ++k)
#pragma unroll
    for (int m = 0; m < kTileRows; ++m)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        tile.sum[m][c] = fma(load(a[m] + k), load(b[c] + k), tile.sum[m][c]);
}

template <Where kWhere, int kTileRows>
PYMETA_FN void add_piece_tn(const Piece& p, int rows, int m0, int n0, Tile<kTileRows>& tile) {
  const Operands<kWhere> from(p);
  const Real* a = from.a + m0;
  const Real* b = from.b + n0;
#pragma unroll 4
  for (int k = 0; k < p.depth; ++k) {
    const Quad right = load_quad(b + k * p.b_row);
    if constexpr (kTileRows % 4 == 0) {
#pragma unroll
      for (int quad = 0; quad < kTileRows; quad += 4) {
        const Quad left = load_quad(a + k * p.a_row + (m0 + quad < rows ? quad : 0));
#pragma unroll
        for (int m = 0; m < 4; ++m) tile.add(left.v[m], right, quad + m);
      }
    } else {
#pragma unroll
      for (int m = 0; m < kTileRows; ++m)
        tile.add(load(a + k * p.a_row + within(m0 + m, rows) - m0), right, m);
    }
  }
}

// value(sum, m, c, at): columns of a thread's tile are kStep apart.
template <bool kStrided, int kTileRows, class Value>
PYMETA_FN void store_tile(const Epilogue& e, int rows, int columns, int step, int m0, int n0,
                          const Tile<kTileRows>& tile, Value value) {
#pragma unroll
  for (int m = 0; m < kTileRows; ++m) {
    if (m0 + m < rows) {
      const int at = (m0 + m) * e.row + n0;
      if constexpr (kStrided) {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          store(e.out + at + c * step,
                n0 + c * step < columns ? value.one(tile.sum[m][c], at + c * step) : Real(0));
      } else {
        const Quad found = value.quad(tile.sum[m], at);
        Quad result;
#pragma unroll
        for (int c = 0; c < 4; ++c) result.v[c] = n0 + c < columns ? found.v[c] : Real(0);
        store_quad(e.out + at, result);
      }
    }
  }
}
struct PlainValue {
  PYMETA_FN Real one(Real v, int) const { return v; }
  PYMETA_FN Quad quad(const Real* v, int) const { return {{v[0], v[1], v[2], v[3]}}; }
};
struct ReluValue {
  PYMETA_FN Real one(Real v, int) const { return at_least(v, 0); }
  PYMETA_FN Quad quad(const Real* v, int) const {
    return {{at_least(v[0], 0), at_least(v[1], 0), at_least(v[2], 0), at_least(v[3], 0)}};
  }
};
struct GateValue {
  const Real* gate;
  PYMETA_FN static Real through(Real g, Real v) { return g <= Real(0) ? Real(0) : v; }
  PYMETA_FN Real one(Real v, int at) const { return through(load(gate + at), v); }
  PYMETA_FN Quad quad(const Real* v, int at) const {
    const Quad g = load_quad(gate + at);
    return {{through(g.v[0], v[0]), through(g.v[1], v[1]), through(g.v[2], v[2]),
             through(g.v[3], v[3])}};
  }
};
template <int kHow>  // 0: scale, 1: one more, 2: two
struct SumValue {
  const Real *first, *second;
  Real scale;
  PYMETA_FN Real one(Real v, int at) const {
    if (kHow == 0) return v * scale;
    const Real sum = fma(scale, v, load(first + at));
    return kHow == 1 ? sum : sum + load(second + at);
  }
  PYMETA_FN Quad quad(const Real* v, int at) const {
    if (kHow == 0) return {{v[0] * scale, v[1] * scale, v[2] * scale, v[3] * scale}};
    const Quad a = load_quad(first + at);
    Quad r{{fma(scale, v[0], a.v[0]), fma(scale, v[1], a.v[1]), fma(scale, v[2], a.v[2]),
            fma(scale, v[3], a.v[3])}};
    if (kHow == 2) {
      const Quad b = load_quad(second + at);
      for (int c = 0; c < 4; ++c) r.v[c] = r.v[c] + b.v[c];
    }
    return r;
  }
};
// Each form has the endings that there are of it: gradients are sums, a ReLU is only on the way forward.
template <Form kForm, bool kStrided, int kTileRows>
PYMETA_FN void finish_tile(const Epilogue& e, int rows, int columns, int step, int m0, int n0,
                           const Tile<kTileRows>& tile) {
  const auto end = [&](auto value) {
    store_tile<kStrided>(e, rows, columns, step, m0, n0, tile, value);
  };
  if constexpr (kForm == Form::tn) {
    if (e.extra && e.other) return end(SumValue<2>{e.extra, e.other, e.scale});
    if (const Real* only = e.extra ? e.extra : e.other)
      return end(SumValue<1>{only, nullptr, e.scale});
    return end(SumValue<0>{nullptr, nullptr, e.scale});
  } else {
    if (e.kind == Epilogue::gate) return end(GateValue{e.other});
    if constexpr (kForm == Form::nn)
      if (e.kind == Epilogue::relu) return end(ReluValue{});
    end(PlainValue{});
  }
}

template <Form kForm, Where kWhere, int kTileRows>
PYMETA_FN void add_piece(int rows, int columns, int step, const Piece& piece, int m0, int n0,
                         Tile<kTileRows>& tile) {
  if constexpr (kForm == Form::nn)
    add_piece_nn<kWhere>(piece, rows, m0, n0, tile);
  else if constexpr (kForm == Form::nt)
    add_piece_nt<kWhere>(piece, rows, columns, step, m0, n0, tile);
  else
    add_piece_tn<kWhere>(piece, rows, m0, n0, tile);
}

template <Form kForm, int kTileRows>
PYMETA_FN PYMETA_NOINLINE void multiply_by_tiles(const Product& given) {
  constexpr bool strided = kForm == Form::nt;
  const Epilogue epilogue = given.epilogue;
#ifdef PYMETA_EMULATE
  if ((epilogue.kind == Epilogue::accumulate) != (kForm == Form::tn) ||
      (epilogue.kind == Epilogue::relu && kForm != Form::nn))
    __builtin_trap();
#endif
  const int rows = given.rows, columns = given.columns, count = given.count;
  const Real* const biases = given.bias;
  const int across = (columns + 3) / 4;
  const int tiles = across * ((rows + kTileRows - 1) / kTileRows);
  for (int t = thread_index(); t < tiles; t += thread_count()) {
    note_tile(4L * kTileRows * given.first.depth * count);
    const int m0 = t / across * kTileRows, n0 = strided ? t % across : t % across * 4;
    Tile<kTileRows> tile;
    const Quad bias = !strided && biases ? load_quad(biases + n0) : Quad{};
#pragma unroll
    for (int m = 0; m < kTileRows; ++m)
#pragma unroll
      for (int c = 0; c < 4; ++c) tile.sum[m][c] = bias.v[c];
#pragma unroll 1
    for (int s = 0; s < count; ++s) {
      const Piece piece = given.piece(s);
      const Where there = where(piece);
      // Short tiles are few products': no code of their own for a start that lies far.
      constexpr bool tells_far = kTileRows >= 4;
      if (there == Where::near)
        add_piece<kForm, Where::near>(rows, columns, across, piece, m0, n0, tile);
      else if (tells_far && there == Where::near_and_far)
        add_piece<kForm, tells_far ? Where::near_and_far : Where::anywhere>(rows, columns, across,
                                                                            piece, m0, n0, tile);
      else
        add_piece<kForm, Where::anywhere>(rows, columns, across, piece, m0, n0, tile);
    }
    finish_tile<kForm, strided>(epilogue, rows, columns, across, m0, n0, tile);
  }
}

// Of the form tn: tiles of 8 rows and two quads, half of the columns apart.
template <Where kWhere>
PYMETA_FN void add_wide(const Piece& p, int rows, int m0, int n0, int n1, Tile<8>& tile,
                        Tile<8>& beside) {
  const Operands<kWhere> from(p);
  const Real* a = from.a + m0;
#pragma unroll 2
  for (int k = 0; k < p.depth; ++k) {
    const Quad right = load_quad(from.b + k * p.b_row + n0),
               other = load_quad(from.b + k * p.b_row + n1);
#pragma unroll
    for (int quad = 0; quad < 8; quad += 4) {
      const Quad left = load_quad(a + k * p.a_row + (m0 + quad < rows ? quad : 0));
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        tile.add(left.v[m], right, quad + m);
        beside.add(left.v[m], other, quad + m);
      }
    }
  }
}
PYMETA_FN inline PYMETA_NOINLINE void multiply_by_wide_tiles(const Product& given) {
  const Epilogue epilogue = given.epilogue;
  const int rows = given.rows, columns = given.columns, count = given.count;
  const int quads = (columns + 3) / 4, across = (quads + 1) / 2;
  const int tiles = tiles_of(rows, columns, kWide);
  for (int t = thread_index(); t < tiles; t += thread_count()) {
    note_tile(64L * given.first.depth * count);
    const int m0 = t / across * 8, quad = t % across, n0 = 4 * quad;
    const bool has_two = quad + across < quads;
    const int n1 = has_two ? n0 + 4 * across : n0;
    Tile<8> tile, beside;
#pragma unroll
    for (int m = 0; m < 8; ++m)
#pragma unroll
      for (int c = 0; c < 4; ++c) tile.sum[m][c] = beside.sum[m][c] = 0;
#pragma unroll 1
    for (int s = 0; s < count; ++s) {
      const Piece piece = given.piece(s);
      if (where(piece) == Where::near)
        add_wide<Where::near>(piece, rows, m0, n0, n1, tile, beside);
      else
        add_wide<Where::anywhere>(piece, rows, m0, n0, n1, tile, beside);
    }
    finish_tile<Form::tn, false>(epilogue, rows, columns, 0, m0, n0, tile);
    if (has_two) finish_tile<Form::tn, false>(epilogue, rows, columns, 0, m0, n1, beside);
  }
}

// At the beginning of shared memory (call.h puts it there).
PYMETA_FN inline Sharing& sharing() { return *reinterpret_cast<Sharing*>(shared_memory()); }

// Each thread its tiles; nobody waits for anybody.
template <Form kForm, int kHeight>
PYMETA_FN void multiply_alone(const Product& p) {
  const InProduct product;
  if constexpr (kHeight == kWide)
    multiply_by_wide_tiles(p);
  else
    multiply_by_tiles<kForm, kHeight>(p);
}
template <Form kForm>
PYMETA_FN void multiply_alone(const Product& p, int height) {
  if constexpr (kForm == Form::tn)
    if (height == kWide) return multiply_alone<kForm, kWide>(p);
  switch (height) {
    case 8:
      return multiply_alone<kForm, 8>(p);
    case 4:
      return multiply_alone<kForm, 4>(p);
    case 2:
      return multiply_alone<kForm, 2>(p);
    default:
      return multiply_alone<kForm, 1>(p);
  }
}
template <Form kForm>
PYMETA_FN void multiply(const Product& p) {
  multiply_alone<kForm>(p, tile_height(p.rows, p.columns, sharing(), kForm == Form::tn));
#ifndef PYMETA_PLANT_MISSING_BARRIER  // for the test that ThreadSanitizer sees it
  sync();
#endif
}

PYMETA_KERNEL_END
