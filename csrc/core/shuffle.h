// The order of a task's rows: a counter-based generator and the shuffle drawn from it.
//
// Philox4x64-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"): a block of four
// words is a function of a key and a counter alone, so an order needs no state and is the same on every machine and
// thread. The key is (seed, stream), the counter (block, epoch, task, purpose), and blocks count from 1: the words
// are those of numpy.random.Philox(key=[seed, stream], counter=[0, epoch, task, purpose]).
// Internal linkage: the kernels of several instruction sets include this.
#pragma once

#include <cstdint>

namespace pymeta {

enum class Purpose : std::uint64_t { epoch = 0, split = 1 };

struct Draw {
  std::uint64_t seed, stream, task, epoch;
  Purpose purpose;
};

struct PhiloxBlock {
  std::uint64_t word[4];
};

static inline PhiloxBlock philox(const Draw& draw, std::uint64_t block) {
  using Wide = unsigned __int128;
  constexpr std::uint64_t multiplier[2] = {0xD2E7470EE14C6C93, 0xCA5A826395121157};
  constexpr std::uint64_t weyl[2] = {0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B};
  std::uint64_t key[2] = {draw.seed, draw.stream};
  PhiloxBlock c = {{block, draw.epoch, draw.task, static_cast<std::uint64_t>(draw.purpose)}};
  for (int round = 0; round < 10; ++round) {
    const Wide a = static_cast<Wide>(multiplier[0]) * c.word[0];
    const Wide b = static_cast<Wide>(multiplier[1]) * c.word[2];
    c = {{static_cast<std::uint64_t>(b >> 64) ^ c.word[1] ^ key[0], static_cast<std::uint64_t>(b),
          static_cast<std::uint64_t>(a >> 64) ^ c.word[3] ^ key[1], static_cast<std::uint64_t>(a)}};
    key[0] += weyl[0];
    key[1] += weyl[1];
  }
  return c;
}

// order [rows]: Fisher and Yates' shuffle of 0 .. rows - 1, the word r drawing the place r * (i + 1) / 2^64.
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
    const std::uint64_t r = block.word[used++];
    const int j = static_cast<int>((static_cast<unsigned __int128>(r) * (i + 1)) >> 64);
    const Index held = order[i];
    order[i] = order[j];
    order[j] = held;
  }
}

}  // namespace pymeta
