// What an emulated block's threads count where tests ask for it: PYMETA_COUNT_ACCESSES or PYMETA_COUNT_INSTRUCTIONS
// (tests/counts/block_counts.cpp). Elsewhere all of this is empty.
#pragma once

#include <cstdint>
#include <vector>
#ifdef PYMETA_COUNT_INSTRUCTIONS
#include <csignal>
#endif

PYMETA_KERNEL_BEGIN
namespace emulation {

// A read or write of shared memory by one thread. What the lanes of a warp do at once has the same time.
struct Access {
  std::uint64_t time;
  std::uint32_t place;  // bytes from the beginning of shared memory
  std::uint16_t bytes;
  bool in_product;
  std::uint8_t lane;  // that the thread played, if it plays a whole warp's
};

struct Counts {
  std::vector<Access> accesses;
  long barriers = 0;
  long multiply_adds = 0, tiles = 0;  // of products
  long instructions = 0;              // of the host, outside of products
  bool in_product = false;
  std::uint32_t round = 0, turn = 0;
  std::uint8_t lane = 0;
  std::uint32_t first_turn = 0, last_turn = 0;  // of what all played lanes do at once

  std::uint64_t time() {
    return static_cast<std::uint64_t>(barriers) << 40 | static_cast<std::uint64_t>(round) << 20 |
           turn++;
  }
};
inline thread_local Counts* counts = nullptr;  // of this thread; null: it does not count

#ifdef PYMETA_COUNT_INSTRUCTIONS
// The processor traps after every instruction while its trap flag is set.
inline void count_instruction(int) { ++counts->instructions; }
inline void set_trap_flag(bool on) {
  if (on)
    __asm__ volatile("sub $128,%%rsp; pushfq; orq $0x100,(%%rsp); popfq; add $128,%%rsp" ::
                         : "memory", "cc");
  else
    __asm__ volatile("sub $128,%%rsp; pushfq; andq $~0x100,(%%rsp); popfq; add $128,%%rsp" ::
                         : "memory", "cc");
}
#else
inline void set_trap_flag(bool) {}
#endif

// Time that is no work of this thread.
struct Pause {
  const bool counted = counts != nullptr;
  Pause() {
    if (counted) set_trap_flag(false);
  }
  ~Pause() {
    if (counted) set_trap_flag(true);
  }
};

inline void note_access([[maybe_unused]] const void* p, [[maybe_unused]] unsigned bytes) {
#ifdef PYMETA_COUNT_ACCESSES
  if (!counts) return;
  const char* at = static_cast<const char*>(p);
  const Block& block = *self.block;
  if (at < block.shared || at >= block.shared + block.shared_bytes) return;
  counts->accesses.push_back({counts->time(), static_cast<std::uint32_t>(at - block.shared),
                              static_cast<std::uint16_t>(bytes), counts->in_product, counts->lane});
#endif
}
inline void note_barrier() {
  if (!counts) return;
  ++counts->barriers;
  counts->round = counts->turn = 0;
}
// A thread's next tile.
inline void note_tile(long multiply_adds) {
  if (!counts) return;
  ++counts->tiles;
  ++counts->round;
  counts->turn = 0;
  counts->multiply_adds += multiply_adds;
}

// What a lane does that a thread plays: at the same time as the other lanes.
class PlayedLane {
 public:
  explicit PlayedLane(int lane) : lane_(lane) {
    if (!counts) return;
    if (lane == 0) counts->first_turn = counts->last_turn = counts->turn;
    counts->turn = counts->first_turn;
    counts->lane = static_cast<std::uint8_t>(lane);
  }
  ~PlayedLane() {
    if (!counts) return;
    if (counts->turn > counts->last_turn) counts->last_turn = counts->turn;
    counts->turn = counts->last_turn;
    counts->lane = 0;
  }
  operator int() const { return lane_; }

 private:
  const int lane_;
};

// A product: what is known of its instructions comes from the compiler's code for the GPU, not from the host's.
struct InProduct {
  Pause pause;
  InProduct() {
    if (counts) counts->in_product = true;
  }
  ~InProduct() {
    if (counts) counts->in_product = false;
  }
};

}  // namespace emulation
PYMETA_KERNEL_END
