// The minibatches of an item's tasks, and the losses it notes down epoch by epoch.
//
// A task of n rows has ceil(n / size) batches an epoch. Where that is one, it is all rows in their own order;
// otherwise epoch e takes them in the order of core/call/shuffle.h and batch b has the places from b * size on. Tasks of an
// item go through their own epochs: in lanes, one that has no such batch waits with an empty one.
#pragma once

#include "../core/call/shuffle.h"
#include "binding.h"

PYMETA_KERNEL_BEGIN

template <class X>
class ItemBatches {
 public:
  ItemBatches(const Binder<X>& binder, const Workspace<X>& workspace, const Item<X>& work,
              Real* memory, const Real* corrections)
      : binder_(binder),
        places_(workspace.support_set),
        work_(work),
        memory_(memory),
        corrections_(corrections) {
    const Call<Real>& call = binder.call();
    Vec rows = zero();
    for (int lane = 0; lane < work.count; ++lane) {
      const int size = call.support.size(work.task[lane]);
      rows[lane] = Real(size);
      batches_[lane] = call.batches.count(size);
      epoch_[lane] = -1;
      most_ = batches_[lane] > most_ ? batches_[lane] : most_;
    }
    rows_ = X::kTasks == 1 ? broadcast(rows[0]) : rows;
    if (workspace.order != kNowhere && most_ > 1)
      order_ = reinterpret_cast<std::int32_t*>(memory + workspace.order);
    else
      set_ = binder.bind(call.support, places_, work, memory);
  }

  Vec rows() const { return rows_; }
  IntVec present() const { return rows_ > zero(); }
  int count() const { return most_; }  // batches in an epoch of the item's largest task

  // Step k of a fixed number of steps: every task goes round its batches.
  Step step(int k) {
    int epoch[X::kTasks] = {}, batch[X::kTasks] = {};
    for (int lane = 0; lane < work_.count; ++lane) {
      const int batches = batches_[lane] > 0 ? batches_[lane] : 1;
      epoch[lane] = k / batches;
      batch[lane] = k % batches;
    }
    return make(epoch, batch, present(), k > 0, correction(k));
  }

  // The b-th step of an epoch for those of the `running` lanes that have one.
  Step step(int epoch, int b, IntVec running) {
    int epochs[X::kTasks] = {}, batch[X::kTasks] = {};
    Vec batches = zero();
    bool alike = true;
    for (int lane = 0; lane < work_.count; ++lane) {
      epochs[lane] = epoch;
      batch[lane] = b;
      batches[lane] = Real(batches_[lane]);
      alike = alike && batches_[lane] == most_;
    }
    if (X::kTasks == 1) batches = broadcast(batches[0]);
    const IntVec active = running & (batches > broadcast(Real(b)));
    const bool again = epoch > 0 || b > 0;
    if (alike) return make(epochs, batch, active, again, correction(epoch * most_ + b));
    return make(epochs, batch, active, again, corrections_of(epoch, b));
  }

 private:
  Step make(const int* epoch, const int* batch, IntVec active, bool again,
            const Correction& correction) {
    if (order_) select(epoch, batch, active);
    return {&set_, active, all_lanes(active), again && !order_, correction};
  }

  void select(const int* epoch, const int* batch, IntVec active) {
    const Call<Real>& call = binder_.call();
    Selection<X> selection{};
    for (int lane = 0; lane < work_.count; ++lane) {
      if (!active[lane]) continue;
      const std::int64_t task = work_.task[lane];
      const int rows = call.support.size(task);
      std::int32_t* order = order_ + static_cast<std::size_t>(lane) * call.max_support;
      if (epoch_[lane] != epoch[lane]) {
        epoch_[lane] = epoch[lane];
        if (batches_[lane] == 1) {
          for (int r = 0; r < rows; ++r) order[r] = r;
        } else {
          const std::uint64_t id =
              call.batches.task_ids ? static_cast<std::uint64_t>(call.batches.task_ids[task]) : 0;
          shuffle(Draw{call.batches.seed, call.batches.stream, id,
                       static_cast<std::uint64_t>(epoch[lane]), Purpose::epoch},
                  rows, order);
        }
      }
      const int first = batches_[lane] == 1 ? 0 : batch[lane] * call.batches.size;
      const int left = rows - first;
      selection.rows[lane] = order + first;
      selection.count[lane] =
          batches_[lane] == 1 || left < call.batches.size ? left : call.batches.size;
    }
    set_ = binder_.bind(call.support, places_, work_, memory_, &selection);
  }

  Correction correction(int t) const {
    if (!corrections_) return Correction{};
    return {broadcast(corrections_[2 * t]), broadcast(corrections_[2 * t + 1])};
  }
  // Of tasks that have made different numbers of steps.
  Correction corrections_of(int epoch, int b) const {
    Correction result{};
    for (int lane = 0; corrections_ && lane < work_.count; ++lane) {
      if (b >= batches_[lane]) continue;
      const long t = static_cast<long>(epoch) * batches_[lane] + b;
      result.scale[lane] = corrections_[2 * t];
      result.eps[lane] = corrections_[2 * t + 1];
    }
    return result;
  }

  const Binder<X>& binder_;
  const SetLayout& places_;
  const Item<X>& work_;
  Real* memory_;
  const Real* corrections_;
  std::int32_t* order_ =
      nullptr;  // [kTasks, largest set]; null where no task has more than one batch
  ItemSet set_{};
  Vec rows_;
  int most_ = 0;
  int batches_[X::kTasks] = {};
  int epoch_[X::kTasks] = {};  // that `order_` holds the order of
};

// Notes down what fine-tuning tells of its epochs.
template <class X>
struct Curves {
  const Call<Real>& call;
  const Item<X>& work;

  void train(int epoch, Vec loss, IntVec running) {
    put(call.train_curves, call.epochs, epoch, loss, running);
  }
  void validation(int epoch, Vec loss, IntVec running) {
    put(call.validation_curves, call.epochs + 1, epoch, loss, running);
  }
  void finish(Vec best_epoch, Vec epochs) {
    for (int lane = 0; lane < work.count; ++lane) {
      const std::int64_t task = work.task[lane];
      if (call.best_epochs) call.best_epochs[task] = static_cast<std::int64_t>(best_epoch[lane]);
      if (call.epochs_run) call.epochs_run[task] = static_cast<std::int64_t>(epochs[lane]);
    }
  }

 private:
  void put(Real* curves, int length, int epoch, Vec loss, IntVec running) {
    for (int lane = 0; curves && lane < work.count; ++lane)
      if (running[lane]) curves[work.task[lane] * length + epoch] = loss[lane];
  }
};

PYMETA_KERNEL_END
