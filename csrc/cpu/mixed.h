// The `mixed` executor: whole vectors of tasks by `lanes`, the few that are left over one by one.
//
// 25 tasks are two vectors of sixteen, and the second one costs `lanes` as much as the first. Both executors give a task the
// same bits, and `rows` can add its gradients in the order of `lanes` (Needs::interleaved), so all results are those of `lanes`:
// the last vector's tasks are chunks of their own, whose sums become the last chunk's of the others.
//
// That asks for chunks of one vector each, and for sums that both executors make in the same order. Where it is not so, or
// nothing is left over, `lanes` has all tasks.
#pragma once

#include "driver.h"

PYMETA_KERNEL_BEGIN

// Two executors that share the tasks of a call: the last ones are those of `One`, an executor of single tasks.
template <class One, class Many>
class DriverPair {
 public:
  static constexpr bool kSingleTasks = false;

  const Needs& needs() const { return needs_; }

  void run(const Team& team, char* memory) {
    if (!many_) return one_.run(team, memory);
    many_->take(0, call_.tasks - parts_, of_many_);
    if (parts_ > 0) one_.take(call_.tasks - parts_, parts_, of_one_);
    place(memory);
    const std::int64_t whole = static_cast<std::int64_t>(of_many_.chunks);
    const std::int64_t* order = call_.chunk_order;
    parallel(team, whole + parts_, [&](std::int64_t index, int worker) {
      const std::int64_t chunk = order ? order[index] : index;
      if (chunk < whole)
        many_->work_through(chunk, 0, worker);
      else
        one_.work_through(chunk - whole, 0, worker);
    });
    if (call_.is_stopped()) return;
    if (many_->wants_gradient()) add_up(team);
    many_->write_sums();
  }

  void pack_shared(Real* memory) const {
    if (!many_) return one_.pack_shared(memory);
    many_->pack_shared(memory);
    if (parts_ > 0) one_.pack_shared(memory + of_many_.start / sizeof(Real));
  }

 protected:
  DriverPair(const Call<Real>& call, Driver<One>& one) : call_(call), one_(one) {}

  const Driver<One>& one() const { return one_; }
  // All tasks are those of `One`.
  void leave_all() { needs_ = one_.needs(); }
  // The last `parts` tasks are, each a chunk, in the order of `like` or of their own.
  void divide(Driver<Many>& many, std::int64_t parts, const Needs* like) {
    many_ = &many;
    of_many_ = many.needs();
    parts_ = parts;
    if (parts > 0) {
      of_one_ = one_.needs_of(parts, like);
      of_many_ = many.needs_of(call_.tasks - parts);
    }
    needs_ = together();
  }

 private:
  void add_up(const Team& team) {
    const Vec divisor = broadcast(call_.divisor());
    many_->add_up(team, parts_ > 0 ? broadcast(1) : divisor);
    if (parts_ == 0) return;
    one_.add_up(team, broadcast(1));
    many_->add_chunk(one_, divisor);
  }

  // Shared: that of the two. Sums and workspaces are as large as the larger ones.
  Needs together() const {
    Needs n = of_many_;
    if (parts_ == 0) return n;
    const Needs& one = of_one_;
    const auto larger = [](std::size_t a, std::size_t b) { return a > b ? a : b; };
    n.start += one.start;
    n.shared += one.shared;
    n.sums = larger(n.sums, one.sums);
    n.workspace = larger(n.workspace, one.workspace);
    n.longest = n.chunks > 0 ? n.cost / static_cast<double>(n.chunks) : 0;
    n.cost += one.cost;
    n.ordered_chunks += 1;
    n.chunks += static_cast<std::size_t>(parts_);
    return n;
  }

  void place(char* memory) {
    char* const sums = memory + needs_.shared;
    char* const workspaces = sums + needs_.sums * needs_.chunks;
    const Real* packed = call_.packed_start;
    many_->place(memory, sums, workspaces, needs_.workspace, packed);
    if (parts_ == 0) return;
    one_.place(memory + of_many_.shared, sums + needs_.sums * of_many_.chunks, workspaces,
               needs_.workspace, packed ? packed + of_many_.start / sizeof(Real) : nullptr);
  }

  const Call<Real>& call_;
  Driver<One>& one_;
  Driver<Many>* many_ = nullptr;
  std::int64_t parts_ = 0;  // tasks left over, each a chunk
  Needs of_one_{}, of_many_{}, needs_{};
};

template <class One, class Many>
class MixedDriver : public DriverPair<One, Many> {
 public:
  static constexpr int kMadeOf = 2;

  // `plans` are those of the two for the whole call.
  MixedDriver(const Call<Real>& call, void* const* plans)
      : DriverPair<One, Many>(call, *static_cast<Driver<One>*>(plans[0])) {
    Driver<Many>& many = *static_cast<Driver<Many>*>(plans[1]);
    Needs like = many.needs();
    const bool divides = this->divides(call, like);
    like.ordered_chunks = 1;
    this->divide(many, divides ? call.tasks % Many::kTasks : 0, like.sums > 0 ? &like : nullptr);
  }
  // Is anything left over, of few enough vectors that it counts?
  static bool suits(const Call<Real>& call) {
    const std::int64_t vectors = call.tasks / Many::kTasks;
    return vectors > 0 && vectors < 64 && call.tasks % Many::kTasks != 0;
  }

 private:
  bool divides(const Call<Real>& call, const Needs& of_many) const {
    constexpr std::size_t most = std::size_t{4} << 20;  // bytes of the sums of tasks left over
    const bool rates = call.lr_gradient && !call.lr.per_task;
    const Needs& one = this->one().needs();
    return suits(call) && !rates && !one.factored && of_many.items_in_chunk == 1 &&
           one.sums * Many::kTasks <= most;
  }
};

PYMETA_KERNEL_END
