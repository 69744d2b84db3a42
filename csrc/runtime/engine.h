// One task at a time, in microseconds: adapt a start to the rows of a task and apply the result to others.
//
// An Engine holds what does not change from call to call: the recipe, the start packed for the `rows` executor, and
// blocks of working memory, one for each thread that ever called at once, with the plan for the sizes it last saw. So a
// call of sizes seen before allocates nothing, and what one thread does is nothing to another. Blocks wait in slots
// without a lock: a fork finds none held by a thread that the child does not have.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "../core/losses/registry.h"
#include "../cpu/kernels.h"
#include "pages.h"
#include "planner.h"

namespace pymeta {

template <class Real>
class Engine {
 public:
  // `recipe` is a Call without rows and results; what it points to is copied.
  explicit Engine(const Call<Real>& recipe);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  int in_features() const { return network_.network.in_features(); }
  int out_features() const { return network_.network.out_features(); }
  int target_columns() const { return pymeta::target_columns(loss_, out_features()); }
  bool takes_labels() const { return pymeta::takes_labels(loss_); }

  // What a task may have beside its rows.
  struct Beside {
    bool has_distributions = false;  // ys [rows, out] in place of labels
    int weight_columns = 1;          // more than one: weights [rows, weight_columns]
    const Real* offset = nullptr;    // [rows, out] is added to the outputs
    const Real* query_offset = nullptr;
  };

  // xs [rows, in], ys [rows, target columns] or int64 labels [rows], weights [rows] or null, xq [query_rows, in] ->
  // out [query_rows, out]. Throws std::invalid_argument for labels or weights out of range; std::bad_alloc.
  void adapt_predict(const Real* xs, const void* ys, const Real* weights, int rows, const Real* xq,
                     int query_rows, Real* out, const Beside& beside) const;

 private:
  struct FreesPages {
    std::size_t bytes = 0;
    void operator()(char* data) const { give_pages(data, bytes); }
  };
  // A call and where it is worked on: what was planned for the sizes of the last one serves the next of those sizes.
  class Block {
   public:
    explicit Block(const Engine& engine);

    Call<Real> call;

    const Needs& plan(const Engine& engine);
    char* memory_for(const Engine& engine);  // throws std::bad_alloc
    const Needs& needs() const { return needs_; }
    void* plan_at() const {
      const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(storage_.get());
      return storage_.get() + (64 - at % 64);
    }

   private:
    std::optional<CallForm<Real>> planned_for_;
    Needs needs_{};
    std::unique_ptr<char[]> storage_;
    std::size_t bytes_ = 0;
    std::unique_ptr<char, FreesPages> memory_;
  };
  std::unique_ptr<Block> take() const;
  void give(std::unique_ptr<Block> block) const;

  // What call_ points to.
  OwnedNetwork network_;
  Loss loss_, loss_of_distributions_;
  std::vector<double> weight_, pos_weight_, levels_;
  std::vector<std::vector<Real>> tensors_;
  std::vector<const Real*> parameters_;
  std::vector<Real> rates_;
  std::vector<int> groups_;
  bool adapted_[kMaxTensors];

  Call<Real> call_;
  const ExecutorTable<Real>* executor_;  // in use when it was made: start_ is in its layout
  std::vector<Real> start_;
  mutable std::array<std::atomic<Block*>, 64> idle_{};
};

}  // namespace pymeta
