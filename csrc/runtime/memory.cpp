#include "memory.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#include "fork.h"
#include "pages.h"

namespace pymeta {
namespace {

struct Block {
  char* data = nullptr;
  std::size_t bytes = 0;
};

constexpr std::size_t kHuge = std::size_t{2} << 20;
constexpr std::size_t kMostBlocks = 8;

std::size_t rounded(std::size_t bytes) {
  const std::size_t alignment = bytes >= kHuge ? kHuge : 4096;
  return kKeepsPages ? (bytes + alignment - 1) / alignment * alignment : bytes;
}

class BlockCache {
 public:
  BlockCache() { free_.reserve(kMostBlocks + 1); }  // so that give() cannot fail

  Block take(std::size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it)
        if (it->bytes >= bytes && (best == free_.end() || it->bytes < best->bytes)) best = it;
      if (best != free_.end()) {
        const Block block = *best;
        free_.erase(best);
        return block;
      }
    }
    Block block{nullptr, rounded(bytes)};
    if (block.bytes >= bytes)
      block.data = take_pages(block.bytes, block.bytes >= kHuge ? kHuge : 4096);
    if (!block.data) throw std::bad_alloc();
    return block;
  }

  // Keeps what the bound allows: the last ones, since the next call is likely to be like them.
  void give(Block block) {
    if (!kKeepsPages) return give_pages(block.data, block.bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    drop_to(most_, kMostBlocks);
  }

  std::size_t drop_all() {
    std::lock_guard<std::mutex> lock(mutex_);
    return drop_to(0, 0);
  }
  std::size_t most() {
    std::lock_guard<std::mutex> lock(mutex_);
    return most_;
  }
  void set_most(std::size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    most_ = bytes;
    drop_to(most_, kMostBlocks);
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // The oldest go first.
  std::size_t drop_to(std::size_t bytes, std::size_t blocks) {
    std::size_t all = 0, dropped = 0;
    for (const Block& block : free_) all += block.bytes;
    while (!free_.empty() && (all - dropped > bytes || free_.size() > blocks)) {
      dropped += free_.front().bytes;
      give_pages(free_.front().data, free_.front().bytes);
      free_.erase(free_.begin());
    }
    return dropped;
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // in the order of their last use
  std::size_t most_ = std::size_t{256} << 20;
};

BlockCache& block_cache() {
  static BlockCache* const cache =
      new BlockCache;  // never destroyed: calls may outlive static objects
  // A fork waits until nobody is inside the cache, so that the child finds it whole.
  static const int registered =
      at_fork([] { block_cache().mutex().lock(); }, [] { block_cache().mutex().unlock(); },
              [] { block_cache().mutex().unlock(); });
  (void)registered;
  return *cache;
}

}  // namespace

WorkingMemory::WorkingMemory(std::size_t bytes) {
  const Block block = block_cache().take(bytes ? bytes : 64);
  data_ = block.data;
  bytes_ = block.bytes;
}
WorkingMemory::~WorkingMemory() { block_cache().give({data_, bytes_}); }

std::size_t free_memory() { return block_cache().drop_all(); }
std::size_t kept_bytes() { return block_cache().most(); }
void set_kept_bytes(std::size_t bytes) { block_cache().set_most(bytes); }

}  // namespace pymeta
