// How tall the tiles of a product are, by a model of what they cost; the planner (blocks.h) counts with it too.
//
// Four steps along the depth of a tile of h x 4 outputs are 4 + h loads of 16 bytes, 16 h multiply-adds and some instructions
// around them. A warp's load of 16 bytes takes four wavefronts, one a cycle of the multiprocessor's shared memory, which all of
// its blocks share: tall tiles need the fewest. But tiles are dealt out to warps 32 at a time, and a block that has its
// multiprocessor to itself waits for its busiest warp: short ones keep more warps at work. What is cheapest depends on neither the
// depth nor the operands, and no bit depends on the choice.
#pragma once

#include "machine.h"

PYMETA_KERNEL_BEGIN

constexpr int kWarp = 32;

// What a block shares its multiprocessor with.
struct alignas(16) Sharing {
  int blocks = 1;                    // there at once
  int warps = 1;                     // of each
  std::uint32_t inverse = 1u << 16;  // of the warps, times 2^16, rounded up

  PYMETA_FN static Sharing of(int blocks, int threads) {
    const int warps = (threads + kWarp - 1) / kWarp;
    return {blocks, warps, ((1u << 16) + warps - 1) / static_cast<unsigned>(warps)};
  }
  // How often the busiest warp comes to its turn, when so many are dealt out.
  PYMETA_FN int turns(int dealt) const {
    return static_cast<int>((static_cast<std::uint64_t>(dealt + warps - 1) * inverse) >> 16);
  }
};
static_assert(sizeof(Sharing) == 16, "lies before the scratch (block.h)");

// A "height" of 16 stands for tiles of 8 rows and two quads, which only products of the form tn have: both operands are read along
// their rows there, and a step along the depth needs no more registers than four quads.
constexpr int kWide = 16;

// Of four steps along the depth, for a warp with tiles of this height.
PYMETA_FN constexpr int tile_wavefronts(int height) {
  return height == kWide ? 64 : 4 * (4 + height);
}
PYMETA_FN constexpr int tile_instructions(int height) { return 17 * height + 20; }
PYMETA_FN constexpr int tile_cycles(int height) {  // alone, with what the loads take to answer
  return tile_instructions(height) + 33;
}

// How many tiles a product has, and in how many warps' turns they are done.
PYMETA_FN inline int tiles_of(int rows, int columns, int height) {
  const int wide = height == kWide, down = wide ? height / 2 : height;
  return ((columns + 3) / 4 + wide) / (1 + wide) * ((rows + down - 1) / down);
}
PYMETA_FN inline int warp_tiles(int rows, int columns, int height) {
  return (tiles_of(rows, columns, height) + kWarp - 1) / kWarp;
}

// Cycles of four steps along the depth: of the multiprocessor's shared memory, or of the block's busiest warp.
PYMETA_FN inline int tiles_cost(int rows, int columns, int height, const Sharing& sharing) {
  const int dealt = warp_tiles(rows, columns, height);
  const int shared = sharing.blocks * dealt * tile_wavefronts(height);
  const int alone = sharing.turns(dealt) * tile_cycles(height);
  return shared > alone ? shared : alone;
}

// ---- tiles of warps, by fragments (fragments.h) ------------------------------------------------------------------

// "Heights" that stand for tiles of 16 rows and 16 or 32 columns.
constexpr int kFragments = 17, kWideFragments = 18;
// Linear layers of at least so many inputs and outputs have them. Nothing else chooses: the bits of a task depend neither on the
// rows that others have nor on the device.
constexpr int kLeastWidth = 16;
PYMETA_FN constexpr bool has_fragments(int in, int out) {
  return in >= kLeastWidth && out >= kLeastWidth;
}
PYMETA_FN constexpr int fragment_columns(int height) { return height == kWideFragments ? 32 : 16; }
PYMETA_FN inline int fragment_tiles(int rows, int columns, int height) {
  const int across = fragment_columns(height);
  return (rows + 15) / 16 * ((columns + across - 1) / across);
}
// Of eight steps along the depth. A read of 8 bytes takes two wavefronts.
PYMETA_FN constexpr int fragment_wavefronts(int height) { return 4 + fragment_columns(height) / 4; }
// Of a tile's end: two rows of quads each lane, and what they are added to or gated by.
PYMETA_FN constexpr int fragment_end_wavefronts(int height) {
  return 12 * fragment_columns(height) / 16;
}
// Of eight steps, what a scheduler is busy with: instructions of nvcc's code for sm_90, or its tensor core, beside other warps'
// instructions, with eight cycles for each 16 x 8 outputs of a part (sm_80; an H100 takes fewer).
PYMETA_FN constexpr int fragment_slots(int height) {
  return height == kWideFragments ? 3 * 4 * 8 /* more than 78 */ : 50 /* more than 3 * 2 * 8 */;
}
PYMETA_FN constexpr int fragment_cycles(int height) { return fragment_slots(height) + 60; }
PYMETA_FN inline int fragments_cost(int rows, int columns, int height, const Sharing& sharing) {
  const int tiles = fragment_tiles(rows, columns, height);
  const int shared =
      sharing.blocks * tiles *
      (fragment_wavefronts(height) > fragment_slots(height) / 4 ? fragment_wavefronts(height)
                                                                : fragment_slots(height) / 4);
  const int alone = sharing.turns(tiles) * fragment_cycles(height);
  return shared > alone ? shared : alone;
}
PYMETA_FN inline int fragment_height(int rows, int columns, const Sharing& sharing) {
  return fragments_cost(rows, columns, kWideFragments, sharing) <
                 fragments_cost(rows, columns, kFragments, sharing)
             ? kWideFragments
             : kFragments;
}

// ---- tiles of threads --------------------------------------------------------------------------------------------

// `may_be_wide`: in the form tn; not where a single warp would have them all.
PYMETA_FN inline int tile_height(int rows, int columns, const Sharing& sharing, bool may_be_wide) {
  int best = 8, least = tiles_cost(rows, columns, 8, sharing);
  if (may_be_wide && warp_tiles(rows, columns, kWide) > 1) {
    const int cost = tiles_cost(rows, columns, kWide, sharing);
    if (cost < least) best = kWide, least = cost;
  }
#pragma unroll
  for (int height = 4; height >= 1; height /= 2) {
    const int cost = tiles_cost(rows, columns, height, sharing);
    if (cost < least) best = height, least = cost;
  }
  return best;
}

PYMETA_KERNEL_END
