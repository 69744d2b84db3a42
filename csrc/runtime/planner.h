// Which executor runs a call, on how many threads, and in which order its tasks and chunks are taken.
//
// The cheapest executor on one thread decides how sums over tasks are ordered, so that they have the same bits on any number of
// threads. Where it has fewer chunks than there are threads, another one may run the call in that order.
#pragma once

#include <bitset>
#include <memory>
#include <optional>
#include <vector>

#include "../cpu/kernels.h"

namespace pymeta {

// Where an executor lays out its plan of a call: blocks that a thread uses again and again.
struct PlanMemory {
  std::unique_ptr<char[]> data;
  std::size_t bytes = 0;
};

// What a plan depends on besides what a call is of (network, recipe, tasks, how rows lie): what check() found in the rows,
// which arrays there are, and whether the rates are near one (core/optimizers/rates.h). Calls of one description and of equal
// forms have the same plan, whatever else their arrays hold. Of a call on a device the host does not look at the rates, nor does
// its plan depend on them.
template <class Real>
class CallForm {
 public:
  explicit CallForm(const Call<Real>& call, bool on_device = false);
  bool operator==(const CallForm& other) const;

 private:
  struct OfSet {
    int largest;
    bool has_weightless;
    int weight_columns;
    const Loss* loss;
    unsigned given;  // a bit for each array, as below

    bool operator==(const OfSet& other) const;
  };
  static OfSet of_set(const RowSet<Real>& set, int largest);

  OfSet support_, query_, validation_;
  unsigned given_;
  bool rates_are_near_one_;
  std::bitset<kMaxTensors> gradients_, adapted_, cotangents_;
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
  // Would a plan that is made now be the same? `call` may have other arrays since, of other sizes; the settings may be others.
  bool fits() const;
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
  void drop_others();

  Call<Real>& call_;
  const Kernels<Real>& kernels_;
  const int chosen_;      // executor, or -1
  int most_threads_ = 0;  // that there were to use; 0: it did not matter
  const CallForm<Real> form_;
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
