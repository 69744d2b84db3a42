// A block of threads on the host: each a thread of its own, with shared memory and a real barrier.
//
// What the GPU does not order this does not order either, so ThreadSanitizer sees a missing barrier.
#pragma once

#include <cmath>
#include <condition_variable>
#include <cstdint>
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

// ---- tensor cores ------------------------------------------------------------------------------------------------

constexpr int kLanes = 32;  // of a warp

inline double as_tf32(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits &= 0xffffe000u;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
// Products are exact; hardware need not round their sum to nearest.
inline float towards_zero(double v) {
  const float near = static_cast<float>(v);
  return std::isfinite(near) && std::fabs(near) > std::fabs(v) ? std::nextafter(near, 0.0f) : near;
}
// machine.h: warp_multiply_add. The whole matrices are put together of what the lanes hold.
inline void multiply_add(float (&sum)[kLanes][4], const float (&a)[kLanes][4],
                         const float (&b)[kLanes][2]) {
  double left[16][8], right[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, own = lane % 4;
    for (int i = 0; i < 4; ++i) left[group + i % 2 * 8][own + i / 2 * 4] = as_tf32(a[lane][i]);
    for (int i = 0; i < 2; ++i) right[own + 4 * i][group] = as_tf32(b[lane][i]);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double whole = sum[lane][i];
      for (int k = 0; k < 8; ++k) whole += left[row][k] * right[k][column];
      sum[lane][i] = towards_zero(whole);
    }
}

}  // namespace emulation
PYMETA_KERNEL_END
