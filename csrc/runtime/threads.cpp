#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "fork.h"

namespace pymeta {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kSpin{200};
constexpr std::chrono::milliseconds kLook{20};  // between looks at an interrupt

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
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

class Pool {
 public:
  // False where another call has the pool, or this thread's own one has, which a signal's handler interrupted.
  bool try_run(int threads, std::int64_t count, IndexBody body, void* context,
               Interrupt* interrupt) {
    if (owned_.test_and_set(std::memory_order_acquire)) return false;
    grow(threads - 1);
    calls_are_dense_.store(Clock::now() - ended_ < kSpin, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(state_);
      body_ = body;
      context_ = context;
      count_ = count;
      helpers_ = std::min(threads - 1, static_cast<int>(workers_.size()));
      next_.store(0, std::memory_order_relaxed);
      open_ = true;
    }
    if (helpers_ > 0) call(0);
    work(0);
    // Who has not come by now is not needed any more; who has must be waited for.
    {
      std::lock_guard<std::mutex> lock(state_);
      open_ = false;
    }
    wait_for_helpers(interrupt);
    ended_ = Clock::now();
    owned_.clear(std::memory_order_release);
    return true;
  }

 private:
  struct Worker {
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<std::uint64_t> calls{0};
  };

  // A thread that cannot be had is done without: the caller's frames (the kernels) let no exception through.
  void grow(int helpers) {
    try {
      while (static_cast<int>(workers_.size()) < helpers) {
        const int index = static_cast<int>(workers_.size());
        workers_.push_back(std::make_unique<Worker>());
        Worker& worker = *workers_.back();
        try {
          std::thread([this, index, &worker] { serve(index, worker); }).detach();
        } catch (...) {
          workers_.pop_back();
          throw;
        }
      }
    } catch (const std::exception&) {
    }
  }

  // Helper `index`, counted from 0; those after it are called by it, so that many are awake in a few steps.
  void call(int index) {
    Worker& worker = *workers_[static_cast<std::size_t>(index)];
    {
      std::lock_guard<std::mutex> lock(worker.mutex);
      worker.calls.fetch_add(1, std::memory_order_release);
    }
    worker.wake.notify_one();
  }

  void work(int worker) {
    for (;;) {
      const std::int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      body_(context_, index, worker);
    }
  }

  void wait_for_helpers(Interrupt* interrupt) {
    const auto all_left = [&] { return inside_.load(std::memory_order_acquire) == 0; };
    if (spin(all_left)) return;
    std::unique_lock<std::mutex> lock(state_);
    while (!left_.wait_for(lock, kLook, all_left)) {
      lock.unlock();
      if (interrupt) interrupt->requested();
      lock.lock();
    }
  }

  void serve(int index, Worker& worker) {
    std::uint64_t seen = 0;
    for (;;) {
      const auto called = [&] { return worker.calls.load(std::memory_order_acquire) != seen; };
      if (!(calls_are_dense_.load(std::memory_order_relaxed) && spin(called))) {
        std::unique_lock<std::mutex> lock(worker.mutex);
        worker.wake.wait(lock, called);
      }
      seen = worker.calls.load(std::memory_order_acquire);
      if (!join(index)) continue;
      work(index + 1);
      if (inside_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(state_);
        left_.notify_all();
      }
    }
  }

  // False where the call is over, or a later one that does not use this helper has begun.
  bool join(int index) {
    int helpers;
    {
      std::lock_guard<std::mutex> lock(state_);
      if (!open_ || index >= helpers_) return false;
      inside_.fetch_add(1, std::memory_order_relaxed);
      helpers = helpers_;
    }
    for (const int next : {2 * index + 1, 2 * index + 2})
      if (next < helpers) call(next);
    return true;
  }

  std::atomic_flag owned_ = ATOMIC_FLAG_INIT;  // set for the length of a call
  Clock::time_point ended_{};                  // of the last call
  std::atomic<bool> calls_are_dense_{false};   // the last one began soon after the one before
  std::mutex state_;
  std::condition_variable left_;
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> inside_{0};
  bool open_ = false;
  int helpers_ = 0;
  std::int64_t count_ = 0;
  IndexBody body_ = nullptr;
  void* context_ = nullptr;
  std::vector<std::unique_ptr<Worker>> workers_;
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

void parallel_for(int threads, std::int64_t count, IndexBody body, void* context,
                  Interrupt* interrupt) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1 && shared_pool().try_run(threads, count, body, context, interrupt)) return;
  for (std::int64_t i = 0; i < count; ++i) body(context, i, 0);
}

}  // namespace pymeta
