// The order of a task's rows: a counter-based generator and the shuffle drawn from it.
//
// Philox4x64-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"): a block of four
// words is a function of a key and a counter alone, so an order needs no state and is the same on every machine and
// thread. The key is (seed, stream), the counter (block, epoch, task, purpose), and blocks count from 1: the words
// are those of numpy.random.Philox(key=[seed, stream], counter=[0, epoch, task, purpose]).
// Internal linkage: the kernels of several instruction sets include this.
#pragma once

#include <cstdint>

#include "../portable.h"

namespace pymeta {

enum class Purpose : std::uint64_t { epoch = 0, split = 1 };

struct Draw {
  std::uint64_t seed, stream, task, epoch;
  Purpose purpose;
};

struct PhiloxBlock {
  std::uint64_t word[4];
};

// The upper half of a product.
PYMETA_FN static inline std::uint64_t high_word(std::uint64_t a, std::uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

PYMETA_FN static inline PhiloxBlock philox(const Draw& draw, std::uint64_t block) {
  constexpr std::uint64_t multiplier[2] = {0xD2E7470EE14C6C93, 0xCA5A826395121157};
  constexpr std::uint64_t weyl[2] = {0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B};
  std::uint64_t key[2] = {draw.seed, draw.stream};
  PhiloxBlock c = {{block, draw.epoch, draw.task, static_cast<std::uint64_t>(draw.purpose)}};
  for (int round = 0; round < 10; ++round) {
    c = {{high_word(multiplier[1], c.word[2]) ^ c.word[1] ^ key[0], multiplier[1] * c.word[2],
          high_word(multiplier[0], c.word[0]) ^ c.word[3] ^ key[1], multiplier[0] * c.word[0]}};
    key[0] += weyl[0];
    key[1] += weyl[1];
  }
  return c;
}

// Fisher and Yates' shuffle of 0 .. rows - 1 exchanges, for i = rows - 1 .. 1, the places i and r (i + 1) / 2^64, where r is
// the next word.

PYMETA_FN static inline int place_of(std::uint64_t word, int i) {
  return static_cast<int>(high_word(word, static_cast<std::uint64_t>(i) + 1));
}

// One exchange's place by itself, for those who draw them in any order.
PYMETA_FN static inline int exchange_place(const Draw& draw, int rows, int i) {
  const int word = rows - 1 - i;
  return place_of(philox(draw, static_cast<std::uint64_t>(word / 4 + 1)).word[word % 4], i);
}

template <class Index>
PYMETA_FN static inline void exchange(Index* order, int i, int j) {
  const Index held = order[i];
  order[i] = order[j];
  order[j] = held;
}

// order [rows]
template <class Index>
static inline void shuffle(const Draw& draw, int rows, Index* order) {
  for (int i = 0; i < rows; ++i) order[i] = static_cast<Index>(i);
  PhiloxBlock block{};
  int used = 4;
  std::uint64_t number = 0;
  for (int i = rows - 1; i > 0; --i) {
    if (used == 4) {
      block = philox(draw, ++number);
      used = 0;
    }
    exchange(order, i, place_of(block.word[used++], i));
  }
}

}  // namespace pymeta
