// Small matrix products with fused epilogues: C = init + sum over segments of A_s B_s, tile by tile in registers.
//
// The shapes here have 1 to a few hundred rows, so nothing is packed: operands are read where they lie, and what
// would be separate passes (bias, ReLU, the ReLU's mask, the SGD update) happens when a tile is stored. A tile of
// M x N vectors keeps M * N accumulators; the tables below give the largest M for each N that fits the register
// file. Several segments share the accumulators: the tangent RA W + A U is one product.
//
// The two executors differ only in what an element of A is: `Broadcast` (one number, spread over a vector of
// output columns) or `Lane` (a vector: the same element of several tasks). Every output is one chain of fused
// multiply-adds in the order of k, whatever the tile: this is why a task's bits depend neither on its executor
// nor on the rows next to it.
#pragma once

#include "simd.h"

#include "../core/call/tasks.h"

PYMETA_KERNEL_BEGIN

struct Segment {
  const Real* a;  // element (m, k) at a + m * a_row + k * a_depth
  long a_row, a_depth;
  const Real* b;  // vector (k, n) at b + k * b_depth + n * b_column
  long b_depth, b_column;
  int depth;
};

struct Product {
  int rows, columns;  // of C; columns in vectors
  const Segment* segments;
  int segment_count;
  const Real* init = nullptr;  // vector (m, n) at init + m * init_row + n * kWidth, or null: zero
  long init_row = 0;
  int first_row = 0;

  std::int64_t depth() const {  // of all segments
    std::int64_t sum = 0;
    for (int s = 0; s < segment_count; ++s) sum += segments[s].depth;
    return sum;
  }
};

struct Broadcast {
  static constexpr int kElement = 1;
  static constexpr int kMaxColumns = kRegisters >= 32 ? 4 : 3;
  static Vec load_a(const Real* p) { return broadcast(*p); }
  static long column_stride(const Segment&) { return kWidth; }
};

struct Lane {
  static constexpr int kElement = kWidth;
  static constexpr int kMaxColumns = kRegisters >= 32 ? 5 : 3;
  static Vec load_a(const Real* p) { return load(p); }
  static long column_stride(const Segment& s) { return s.b_column; }
};

constexpr int max_tile_rows(int columns) {
  const int fit = (kRegisters - columns - kSpareRegisters) / columns;
  return fit < 8 ? fit : 8;
}

// visit(m, n) for every vector of a tile, unrolled.
template <int M, int N, class Visitor>
inline __attribute__((always_inline)) void for_tile(Visitor visit) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) visit(m, n);
}

// What happens to a finished tile, or to one vector (m, n) of the result, before it is stored. What is the same for the
// whole tile is asked once a tile: one function for all of them, since most of a tile's code is its product.
struct Epilogue {
  enum class Kind {
    floor,  // at least `floor`: 0 for ReLU, -infinity for none
    gate,  // the backward pass of a ReLU: nothing flows where the ReLU's output `gate` is not positive
    accumulate,  // a gradient on its way to where it is needed: base + (extra + scale v), without what is null
  };
  Kind kind;
  Real* out;
  long row;
  const Real* keep = nullptr;  // masks rows that a shorter task of the same vector does not have
  Vec floor{};
  const Real* gate = nullptr;
  const Real* base = nullptr;  // may be `out`
  const Real* extra = nullptr;
  Vec scale{};
  int period = 0;  // of the mask, which positions share (Extent)

  void operator()(Vec v, int m, int n) const {
    Vec one[1][1] = {{v}};
    finish(one, m, n);
  }

  // Inlined whatever the compiler thinks: the sums are registers.
  template <int M, int N>
  inline __attribute__((always_inline)) void finish(Vec (&sum)[M][N], int row0, int column0) const {
    // A masked sum is 0 behind each of the epilogues that have a mask.
    if (keep)
      for_tile<M, N>([&](int m, int n) {
        const int own = period ? (row0 + m) % period : row0 + m;
        sum[m][n] = where_kept(sum[m][n], keep + own * kWidth);
      });
    // Copies: for all the compiler knows, a store into `out` could change what it is told here.
    const long step = row, first = row0 * step + column0 * kWidth;
    Real* const to = out + first;
    const Vec factor = scale;
    const auto put = [&](auto value) __attribute__((always_inline)) {
      for_tile<M, N>([&](int m, int n) {
        const long at = m * step + n * kWidth;
        store(to + at, value(sum[m][n], at));
      });
    };
    if (kind == Kind::floor) {
      put([least = floor](Vec v, long) { return at_least(v, least); });
    } else if (kind == Kind::gate) {
      put([through = gate + first](Vec v, long at) {
        return select(load(through + at) <= Real(0), zero(), v);
      });
    } else if (extra && base) {
      put([=, more = extra + first, before = base + first](Vec v, long at) {
        return fma(factor, v, load(more + at)) + load(before + at);
      });
    } else if (extra || base) {
      put([=, only = (extra ? extra : base) + first](Vec v, long at) {
        return fma(factor, v, load(only + at));
      });
    } else {
      put([=](Vec v, long) { return v * factor; });
    }
  }
};

inline Epilogue accumulate(Real* out, long row, const Real* base, const Real* extra, Real scale) {
  Epilogue e{Epilogue::Kind::accumulate, out, row};
  e.base = base;
  e.extra = extra;
  e.scale = broadcast(scale);
  return e;
}

template <class Access, int M, int N>
void tile(const Product& p, int row, int column, const Epilogue& epilogue) {
  Vec sum[M][N];
  if (p.init) {
    const Real* init = p.init + row * p.init_row + column * kWidth;
    for_tile<M, N>([&](int m, int n) { sum[m][n] = load(init + m * p.init_row + n * kWidth); });
  } else {
    for_tile<M, N>([&](int m, int n) { sum[m][n] = zero(); });
  }
  for (int s = 0; s < p.segment_count; ++s) {
    const Segment& segment = p.segments[s];
    const long b_column = Access::column_stride(segment), a_row = segment.a_row;
    const Real* a = segment.a + row * a_row;
    const Real* b = segment.b + column * b_column;
    for (int k = segment.depth; k > 0; --k) {
      Vec right[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) right[n] = load(b + n * b_column);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Vec left = Access::load_a(a + m * a_row);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[m][n] = fma(left, right[n], sum[m][n]);
      }
      a += segment.a_depth;
      b += segment.b_depth;
    }
  }
  epilogue.finish(sum, row, column);
}

using TileFunction = void (*)(const Product&, int, int, const Epilogue&);

// Those of N vectors a row, by their rows.
template <class Access, int N>
struct Tiles {
  static constexpr int kMostRows = max_tile_rows(N);
  TileFunction of[kMostRows + 1] = {};

  constexpr Tiles() { add<kMostRows>(); }

 private:
  template <int M>
  constexpr void add() {
    of[M] = tile<Access, M, N>;
    if constexpr (M > 1) add<M - 1>();
  }
};
template <class Access, int N>
constexpr Tiles<Access, N> kTiles;

// One panel of N vectors: all rows, in tiles of nearly equal height.
template <class Access, int N>
void panel(const Product& p, int column, const Epilogue& epilogue) {
  constexpr int most = max_tile_rows(N);
  int row = p.first_row;
  if (p.rows <= most) return kTiles<Access, N>.of[p.rows](p, row, column, epilogue);
  const int tiles = (p.rows + most - 1) / most;
  const int base = p.rows / tiles, taller = p.rows % tiles;
  const TileFunction tall = kTiles<Access, N>.of[taller ? base + 1 : base];
  const TileFunction regular = kTiles<Access, N>.of[base];
  for (int t = 0; t < taller; ++t, row += base + 1) tall(p, row, column, epilogue);
  for (int t = taller; t < tiles; ++t, row += base) regular(p, row, column, epilogue);
}

// What a thread's long products ask between their bands and panels, once at each place; what they leave when they are stopped is nobody's.
inline const StopRequest*& stop_of_this_thread() {
  static thread_local const StopRequest* stop = nullptr;
  return stop;
}
class StopScope {
 public:
  explicit StopScope(const StopRequest* stop) : before_(stop_of_this_thread()) {
    stop_of_this_thread() = stop;
  }
  ~StopScope() { stop_of_this_thread() = before_; }
  StopScope(const StopScope&) = delete;
  StopScope& operator=(const StopScope&) = delete;

 private:
  const StopRequest* const before_;
};
inline bool is_stopped() { return StopRequest::is_made(stop_of_this_thread()); }

// So many multiply-adds of vectors, about half a millisecond, are long.
inline bool is_long(const Product& p, int columns) {
  constexpr std::int64_t long_product = 1 << 20;
  return p.depth() * p.rows * columns > long_product;
}

// By their vectors.
template <class Access>
struct Panels {
  using Function = void (*)(const Product&, int, const Epilogue&);
  Function of[Access::kMaxColumns + 1] = {};

  constexpr Panels() { add<Access::kMaxColumns>(); }

 private:
  template <int N>
  constexpr void add() {
    of[N] = panel<Access, N>;
    if constexpr (N > 1) add<N - 1>();
  }
};
template <class Access>
constexpr Panels<Access> kPanels;

template <class Access>
void all_panels(const Product& p, const Epilogue& epilogue) {
  const bool asks = is_long(p, Access::kMaxColumns);
  const int panels = (p.columns + Access::kMaxColumns - 1) / Access::kMaxColumns;
  const int base = p.columns / panels, wider = p.columns % panels;
  int column = 0;
  for (int i = 0; i < panels; ++i) {
    if (asks && is_stopped()) return;
    const int width = base + (i < wider);
    kPanels<Access>.of[width](p, column, epilogue);
    column += width;
  }
}

// Panel by panel, all rows in each: the panel of B stays in the first-level cache. With lanes both operands are
// large; where A does not fit beside the panel, the rows are taken a tile at a time instead.
template <class Access>
void multiply(const Product& p, const Epilogue& epilogue) {
  if (p.rows <= 0 || p.columns <= 0) return;
  if constexpr (Access::kElement > 1) {
    constexpr std::int64_t fits = 28 << 10;
    constexpr std::int64_t element = sizeof(Real) * Access::kElement;
    if (p.rows * p.depth() * element > fits) {
      // As many rows as fit, in whole tiles, and at least one tile.
      constexpr int tile_rows = max_tile_rows(Access::kMaxColumns);
      const int fit = static_cast<int>(fits / (p.depth() * element));
      const int height = fit > tile_rows ? fit / tile_rows * tile_rows : tile_rows;
      const int bands = (p.rows + height - 1) / height;
      Product band = p;
      band.rows = (p.rows + bands - 1) / bands;
      // A long band asks by itself, between its panels.
      const bool asks = is_long(p, p.columns) && !is_long(band, Access::kMaxColumns);
      for (int i = 0; i < bands; ++i) {
        if (asks && is_stopped()) return;
        band.rows = p.rows / bands + (i < p.rows % bands);
        all_panels<Access>(band, epilogue);
        band.first_row += band.rows;
      }
      return;
    }
  }
  all_panels<Access>(p, epilogue);
}

PYMETA_KERNEL_END
