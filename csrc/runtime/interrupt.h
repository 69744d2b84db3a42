// How a long call is ended early: its calling thread asks now and then whether it is to end, all others look at a flag.
//
// The kernels ask between tasks, steps, layers and the panels of long products (Call::is_stopped), which costs a few nanoseconds; the question itself
// (for Python: has a signal come?) is put every kInterval.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "../core/call/tasks.h"

namespace pymeta {

class Interrupt {
 public:
  using Poll = bool (*)(void* context);  // is the call to end?

  Interrupt(Poll poll, void* context)
      : poll_(poll), context_(context), stop_{&Interrupt::requested_of, this} {}
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  const StopRequest* stop() const { return &stop_; }
  bool was_requested() const { return requested_.load(std::memory_order_relaxed); }

  // Is the call to end? For any of its threads.
  bool requested() {
    if (was_requested()) return true;
    if (std::this_thread::get_id() != owner_ || ++asked_ < patience_) return false;
    look_at_the_clock();
    return was_requested();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kInterval{20};
  static constexpr int kMostPatience = 8;

  static bool requested_of(void* self) { return static_cast<Interrupt*>(self)->requested(); }

  // Short steps do not look at the clock each time.
  void look_at_the_clock() {
    const auto now = Clock::now();
    const auto between = (now - looked_) / std::max(asked_, 1);
    patience_ = between * kMostPatience < kInterval / 4 ? kMostPatience : 1;
    asked_ = 0;
    looked_ = now;
    if (now - polled_ < kInterval) return;
    if (poll_(context_)) requested_.store(true, std::memory_order_relaxed);
    polled_ = Clock::now();
  }

  const Poll poll_;
  void* const context_;
  const StopRequest stop_;
  const std::thread::id owner_ = std::this_thread::get_id();
  std::atomic<bool> requested_{false};
  // The owner's alone.
  int asked_ = 0, patience_ = 1;
  Clock::time_point looked_ = Clock::now(), polled_ = looked_;
};

}  // namespace pymeta
