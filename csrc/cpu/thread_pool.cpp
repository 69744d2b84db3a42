#include "thread_pool.h"

#include "fork.h"
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace pymeta {
namespace {

constexpr std::chrono::microseconds kSpin{200};

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `ready` or the time is over; says whether it is ready.
template <class Ready>
bool spin(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class Pool {
 public:
  // False where another call has the pool.
  bool try_run(int threads, std::int64_t count, IndexBody body, void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(state_);
      body_ = body;
      context_ = context;
      count_ = count;
      helpers_ = threads - 1;
      next_.store(0, std::memory_order_relaxed);
      open_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(0);
    // Who has not come by now is not needed any more; who has must be waited for.
    {
      std::lock_guard<std::mutex> lock(state_);
      open_ = false;
    }
    const auto all_left = [&] { return inside_.load(std::memory_order_acquire) == 0; };
    if (!spin(all_left)) {
      std::unique_lock<std::mutex> lock(state_);
      left_.wait(lock, all_left);
    }
    return true;
  }

 private:
  // A thread that cannot be had is done without: the caller's frames (the kernels) let no exception through.
  void grow(int helpers) {
    try {
      while (static_cast<int>(threads_.size()) < helpers) {
        const int worker = static_cast<int>(threads_.size()) + 1;
        threads_.emplace_back([this, worker] { serve(worker); });
        threads_.back().detach();
      }
    } catch (const std::exception&) {
    }
  }

  void work(int worker) {
    for (;;) {
      const std::int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      body_(context_, index, worker);
    }
  }

  void serve(int worker) {
    std::uint64_t seen = 0;
    for (;;) {
      const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      const bool spun = spin(called);
      bool joins;
      {
        std::unique_lock<std::mutex> lock(state_);
        if (!spun) wake_.wait(lock, called);
        seen = generation_.load(std::memory_order_relaxed);
        joins = open_ && worker <= helpers_;
        if (joins) inside_.fetch_add(1, std::memory_order_relaxed);
      }
      if (!joins) continue;
      work(worker);
      if (inside_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(state_);
        left_.notify_all();
      }
    }
  }

  std::mutex owner_;  // held for the length of a call
  std::mutex state_;
  std::condition_variable wake_, left_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> inside_{0};
  bool open_ = false;
  int helpers_ = 0;
  std::int64_t count_ = 0;
  IndexBody body_ = nullptr;
  void* context_ = nullptr;
  std::vector<std::thread> threads_;
};

// Never destroyed: its threads sleep in it until the process ends.
std::atomic<Pool*> pool{nullptr};

Pool& shared_pool() {
  // A child has its parent's pool without the threads in it: it starts anew, and the copy is left alone, since its
  // locks may be held by threads that do not exist here.
  static const int registered = at_fork(nullptr, nullptr, [] { pool.store(nullptr); });
  (void)registered;
  Pool* current = pool.load();
  if (current) return *current;
  Pool* fresh = new Pool;
  if (pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

}  // namespace

void parallel_for(int threads, std::int64_t count, IndexBody body, void* context) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1 && shared_pool().try_run(threads, count, body, context)) return;
  for (std::int64_t i = 0; i < count; ++i) body(context, i, 0);
}

int available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned cores = std::thread::hardware_concurrency();
  return cores ? static_cast<int>(cores) : 1;
}

}  // namespace pymeta
