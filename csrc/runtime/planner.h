// Which executor runs a call, on how many threads, and in which order its tasks and chunks are taken.
//
// The cheapest executor on one thread decides how sums over tasks are ordered, so that they have the same bits on any number of
// threads. Where it has fewer chunks than there are threads, another one may run the call in that order.
#pragma once

#include <memory>
#include <vector>

#include "../cpu/kernels.h"

namespace pymeta {

// Where an executor lays out its plan of a call: blocks that a thread uses again and again.
struct PlanMemory {
  std::unique_ptr<char[]> data;
  std::size_t bytes = 0;
};

template <class Real>
class Plan {
 public:
  // Refers to `call`, whose largest sizes are known (check.h).
  explicit Plan(Call<Real>& call);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  const char* executor() const { return executor_->name; }
  const Needs& needs() const { return *needs_; }
  int threads() const { return threads_; }
  // Sets in which order the call takes its tasks and chunks, by their sizes.
  void order();
  void run(const Team& team, char* memory) { executor_->run(plan_, team, memory); }

 private:
  struct Candidate {
    const ExecutorTable<Real>* executor = nullptr;
    const Needs* needs = nullptr;
    void* plan = nullptr;
  };
  Candidate planned(const ExecutorTable<Real>& executor);
  Candidate cheapest();
  Candidate quickest(const Candidate& cheapest, int threads);

  Call<Real>& call_;
  const Kernels<Real>& kernels_;
  static constexpr int kMostPlans = 16;  // that are weighed: one of each executor
  PlanMemory storage_[kMostPlans];
  Candidate planned_[kMostPlans];
  int planned_count_ = 0;
  const ExecutorTable<Real>* executor_;
  const Needs* needs_;
  void* plan_;
  int threads_;
  std::vector<std::int64_t> order_, chunk_order_;
};

}  // namespace pymeta
