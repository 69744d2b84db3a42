// A model of shared memory's banks: in how many wavefronts the lanes of a warp get what they ask for at once.
//
// 32 banks of 4 bytes. Equal addresses are served together. Accesses of 4 bytes: as many wavefronts as the fullest bank has
// different words. Of 16 bytes: one where all lanes ask for the same; else each quarter of the warp by itself, by groups of four
// banks. Of 8 bytes: each half by itself.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <set>
#include <vector>

namespace pymeta::testing {

struct LaneAccess {
  int lane;
  std::uint32_t place;  // in bytes
};

// Of some lanes: the fullest of the 128 / bytes groups of banks.
inline long fullest_bank(const std::vector<LaneAccess>& lanes, unsigned bytes) {
  std::array<std::set<std::uint32_t>, 32> asked;
  for (const LaneAccess& one : lanes) asked[one.place / bytes % (128 / bytes)].insert(one.place);
  std::size_t most = 0;
  for (const auto& bank : asked) most = std::max(most, bank.size());
  return static_cast<long>(most);
}

// Of one instruction of a warp, each lane reading or writing so many bytes (4, 8 or 16).
inline long wavefronts(const std::vector<LaneAccess>& lanes, unsigned bytes) {
  if (lanes.empty()) return 0;
  const bool same = std::all_of(lanes.begin(), lanes.end(), [&](const LaneAccess& one) {
    return one.place == lanes.front().place;
  });
  if (same) return 1;
  const int together = 32 / (static_cast<int>(bytes) / 4);  // lanes in a wavefront
  long sum = 0;
  for (int first = 0; first < 32; first += together) {
    std::vector<LaneAccess> part;
    for (const LaneAccess& one : lanes)
      if (one.lane >= first && one.lane < first + together) part.push_back(one);
    if (!part.empty()) sum += fullest_bank(part, bytes);
  }
  return sum;
}

}  // namespace pymeta::testing
