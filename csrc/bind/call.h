// A call with named parts: what Python fills in, and how it becomes a Call of the core.
//
// Each struct is bound under its name with the members below; addresses are those of arrays that the caller keeps alive, 0
// for what is absent. pymeta/_native.pyi says what each holds.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <tuple>

#include "problem.h"

namespace pymeta {

// One set of rows of all tasks (core/call/tasks.h: RowSet).
struct Rows {
  Address x = 0, y = 0, weights = 0;
  std::int64_t rows = 0;
  Address starts = 0, sizes = 0;
  Address offset = 0;
  int weight_columns = 1;
  bool has_distributions = false;  // targets are such, not labels
  bool keeps_weightless = false;   // gradients by weights of 0 are wanted

  template <class Real>
  RowSet<Real> set() const {
    return {pointer<Real>(x),
            pointer<void>(y),
            pointer<Real>(weights),
            rows,
            pointer<std::int64_t>(starts),
            pointer<std::int64_t>(sizes),
            false,
            weights ? weight_columns : 1,
            pointer<Real>(offset),
            nullptr,
            keeps_weightless};
  }
};

struct Rates {
  Address values = 0;
  int rows = 1, columns = 1;
  bool per_task = false;
};

// What flows into the results on the way back, in place of the mean loss alone.
struct CotangentParts {
  Address losses = 0, predictions = 0;
  std::vector<Address> adapted;  // empty: into none of them
  Address step_losses = 0;
};

// Either steps or epochs; the other is -1.
struct Schedule {
  int steps = -1, epochs = -1, batch_size = 0;
  std::uint64_t seed = 0, stream = 0;
  Address task_ids = 0;
};

// Where gradients go.
struct Gradients {
  std::vector<Address> parameters;  // empty: of none of them
  Address lr = 0, xs = 0, xq = 0, ys = 0, yq = 0, support_weights = 0, query_weights = 0;
  Address anchors = 0, support_offset = 0, query_offset = 0;
};

// Where everything else goes.
struct Results {
  Address mean_loss = 0, losses = 0, step_losses = 0, predictions = 0, statistics = 0;
  std::vector<Address> adapted;
  Address status = 0, train_curves = 0, validation_curves = 0, best_epochs = 0, epochs_run = 0;
};

// ordinal, stream, address and bytes of the workspace
using DeviceTuple = std::tuple<int, Address, Address, std::size_t>;
using MaybeDevice = std::optional<DeviceTuple>;

// What differs from one meta-gradient to the next that is like it; the last two may be null.
struct OtherArrays {
  const std::vector<Address>& start;
  Address rates, xs, ys, xq, yq, mean_loss, losses, predictions, step_losses, statistics;
  const Gradients* gradients;
  const CotangentParts* cotangents;
};

// A Call of the core, and the arrays of pointers that it points to.
template <class Real>
struct Described {
  Call<Real> call;
  std::vector<Real*> start, gradients, adapted, cotangents;
  bool own_starts[kMaxTensors] = {};

  Described() = default;
  Described(const Described&) = delete;
  Described& operator=(const Described&) = delete;
};

// run(), during which other threads have the GIL; in the main thread it ends soon after a signal whose handler raises.
template <class Real>
void run_interruptibly(Call<Real>& call, std::optional<Plan<Real>>& kept);

// Puts a schedule into a call whose job is set; an adaptation by epochs becomes Job::fine_tune.
template <class Real>
void put_schedule(const Schedule& schedule, Call<Real>& call);

class CallParts {
 public:
  CallParts(std::shared_ptr<const Problem> problem, int dtype, const std::string& job);

  std::int64_t tasks = 0;
  std::vector<Address> start;
  std::vector<bool> own_starts;  // empty: none
  Rates rates;
  Schedule schedule;
  Address anchors = 0;  // [T], in place of the optimiser's
  bool first_order = false;
  Address step_weights = 0;
  bool by_support = false;
  double task_clip = 0;
  int patience = -1;
  Rows support, query;
  std::optional<Rows> validation;
  Results results;
  std::optional<Gradients> gradients;
  std::optional<CotangentParts> cotangents;

  // Returns the bytes of workspace that the call needs on a device; with fewer it is not run.
  std::size_t run(const MaybeDevice& device) const;
  template <class Real>
  void describe(Described<Real>& to) const;

  const Problem& problem() const { return *problem_; }
  int dtype() const { return dtype_; }
  Job job() const { return job_; }

 private:
  template <class Real>
  RowSet<Real> described_set(const Rows& rows, bool is_query) const;

  std::shared_ptr<const Problem> problem_;
  int dtype_;
  Job job_;
};

// A meta-gradient that is made again and again with other arrays: it is described once, and planned anew where its form or the
// settings are not those of the time before. Several threads may run it at once.
class RepeatedCall {
 public:
  // A copy: what is done to `parts` later changes nothing here. Its own gradients and cotangents are left out.
  explicit RepeatedCall(const CallParts& parts);
  ~RepeatedCall();
  RepeatedCall(const RepeatedCall&) = delete;
  RepeatedCall& operator=(const RepeatedCall&) = delete;

  // As CallParts::run.
  std::size_t run(const OtherArrays& other, const MaybeDevice& device);

 private:
  // The call as it is described, and its plan: one for each of the threads that are in it at once, of which one is kept.
  class Kept;
  template <class Real>
  class KeptOf;

  std::unique_ptr<Kept> make_kept() const;

  CallParts parts_;
  std::atomic<Kept*> idle_{nullptr};
};

}  // namespace pymeta
