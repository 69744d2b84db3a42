// A block of threads on the host: each a thread of its own, with shared memory and a real barrier.
//
// What the GPU does not order this does not order either, so ThreadSanitizer sees a missing barrier.
#pragma once

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "../core/kernel_namespace.h"

PYMETA_KERNEL_BEGIN
namespace emulation {

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long round = round_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++round_;
      all_there_.notify_all();
    } else {
      all_there_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  const int threads_;
  int waiting_ = 0;
  long round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_there_;
};

struct Block {
  int index, count, threads;
  char* shared;
  std::size_t shared_bytes;
  Barrier& barrier;
};

struct Self {
  int thread;
  const Block* block;
};
thread_local Self self;

// body() by every thread of every block, one block after the other.
template <class Body>
void launch(int blocks, int threads, std::size_t shared_bytes, Body body) {
  std::unique_ptr<char, decltype(&std::free)> shared(
      static_cast<char*>(std::aligned_alloc(64, (shared_bytes + 63) / 64 * 64)), std::free);
  if (!shared) throw std::bad_alloc();
  Barrier barrier(threads);
  const auto run = [&](int thread) {
    for (int index = 0; index < blocks; ++index) {
      const Block block{index, blocks, threads, shared.get(), shared_bytes, barrier};
      self = {thread, &block};
      if (thread == 0) std::memset(shared.get(), 0xff, shared_bytes);  // NaN: it holds anything
      barrier.wait();
      body();
      barrier.wait();
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
}

}  // namespace emulation
PYMETA_KERNEL_END
