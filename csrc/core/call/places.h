// Places: where the arrays of an item lie in a thread's memory.
#pragma once

#include <cstddef>

#include "../portable.h"

PYMETA_KERNEL_BEGIN

constexpr Place kNowhere = ~Place{0};

// The memory of an item's arrays. Where a machine has a small fast one beside the large one (kTwoMemories), a place says
// in which of the two it is.
constexpr Place kFar = ~(kNowhere >> 1) >> 1;  // the bit of places in the large one

struct Memory {
  Real* near;
  Real* far = nullptr;

  PYMETA_FN Real* at(Place place) const {
    if (place == kNowhere) return nullptr;
    if constexpr (kTwoMemories)
      if (place & kFar) return far + (place & ~kFar);
    return near + place;
  }
};

// Hands out consecutive, cache-line aligned places: near ones while they last, first come, first served.
struct Places {
  std::size_t most = ~std::size_t{0};  // scalars of the near memory
  std::size_t used = 0;                // of it
  std::size_t used_far = 0;

  PYMETA_FN static std::size_t lines(std::size_t scalars) {
    constexpr std::size_t line = 64 / sizeof(Real);
    return (scalars + line - 1) / line * line;
  }
  PYMETA_FN bool fits(std::size_t scalars) const { return lines(scalars) <= most - used; }
  PYMETA_FN Place take(std::size_t scalars) {
    return fits(scalars) ? take_from(used, scalars) : take_far(scalars);
  }
  PYMETA_FN Place take_if(bool wanted, std::size_t scalars) {
    return wanted ? take(scalars) : kNowhere;
  }
  PYMETA_FN Place take_far(std::size_t scalars) {
    return kTwoMemories ? take_from(used_far, scalars) | kFar : take_from(used, scalars);
  }

 private:
  PYMETA_FN static Place take_from(std::size_t& end, std::size_t scalars) {
    const std::size_t place = end;
    end += lines(scalars);
    return static_cast<Place>(place);
  }
};

// A parameter tensor as the executor keeps it: a matrix [outer, inner] with padded rows, the transpose of torch's where
// `transposed` says so; a vector is [1, features].
struct PackedTensor {
  Place place;
  int outer, inner;
  int row;  // scalars from one outer index to the next
  bool transposed;

  PYMETA_FN std::size_t scalars() const { return static_cast<std::size_t>(outer) * row; }
  PYMETA_FN std::size_t elements() const { return static_cast<std::size_t>(outer) * inner; }

  // visit(index in torch's layout, place in this one, which begins at `first`) for every element.
  template <class X, class Visitor>
  PYMETA_FN void for_elements(std::size_t first, Visitor visit) const {
    constexpr int block = 16;  // both sides of a transposition stay in cache
    for (int p0 = 0; p0 < outer; p0 += block)
      for (int q0 = 0; q0 < inner; q0 += block)
        for (int p = p0; p < outer && p < p0 + block; ++p)
          for (int q = q0; q < inner && q < q0 + block; ++q)
            visit(transposed ? static_cast<std::size_t>(q) * outer + p
                             : static_cast<std::size_t>(p) * inner + q,
                  first + p * row + static_cast<std::size_t>(q) * X::kElement);
  }
};

template <class X>
PYMETA_FN PackedTensor packed_vector(int features) {
  return {0, 1, features, static_cast<int>(X::stride(features)), false};
}

// Scalars of the rows of a set.
template <class X>
PYMETA_FN std::size_t matrix_scalars(int rows, const Shape& shape) {
  return static_cast<std::size_t>(rows) * shape.positions() * X::stride(shape.channels);
}

constexpr int kMaxKept = 2;  // arrays of a layer's own on a tape

PYMETA_KERNEL_END
