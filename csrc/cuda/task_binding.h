// A task's rows as a block reads them: which of them count, their targets and weights; what cpu/binding.h is to the CPU's
// executors.
//
// Nobody has looked at labels and weights before, as runtime/check.cpp does for the CPU: a row with a wrong one gets NaN for its
// share of the loss, and so does everything that depends on it.
#pragma once

#include "../core/algorithms/job.h"
#include "block.h"

PYMETA_KERNEL_BEGIN

PYMETA_FN inline Real checked_weight(Real weight) {
  return weight >= 0 && weight - weight == 0 ? weight : Real(NAN);
}

// Some of a task's rows in an order of their own; null: all of them.
struct TaskRows {
  const std::int32_t* rows;
  int count;
};

class TaskBinder {
 public:
  PYMETA_FN TaskBinder(const Call<Real>& call, std::int64_t task, const Memory& memory)
      : call_(call), memory_(memory), task_(task) {}

  // The rows that count, of all or of those chosen; or `all` of these, without targets, whether they count or not.
  PYMETA_FN PYMETA_NOINLINE ItemSet bind(const RowSet<Real>& set, const SetLayout& places,
                                         const TaskRows* chosen = nullptr, bool all = false) const {
    const TaskRows offered = chosen ? *chosen : TaskRows{nullptr, set.size(task_)};
    const bool leaves_out = may_leave_out<Block>(set) && !all;
    const BoundRows rows{set.start(task_), leaves_out ? that_count(set, places, offered) : offered};
    const int in = call_.network->in_features(), count = rows.chosen.count;
    const Extent extent{count, nullptr, Real(count)};
    Real* x = memory_.at(places.x);
    Block::map(extent, in, [&](long at, long c, int r) { x[at] = set.x[rows.row(r) * in + c]; });
    ItemSet result{{x, Block::stride(in)}, extent, nullptr, nullptr, nullptr, Real(offered.count)};
    if (Real* context = extra<Block>(memory_.at(places.context))) {
      Block::for_indices(count, [&](int r) {
        const int own = static_cast<int>(rows.row(r) - rows.first);
        context[r] = Real(call_.is_in_statistics(set, task_, own) ? 1 : 0);
      });
      result.extent.count = Block::sum_rows_in_order(extent, context);
      result.extent.counting = context;
    }
    if constexpr (Block::Family::kExtras) result.lies(places, memory_);
    result.loss = &call_.loss_of(set);
    if (extra<Block>(set.offset != nullptr)) {
      bind_columns(rows, call_.network->out_features(), set.offset, memory_.at(places.offset));
      result.offset = memory_.at(places.offset);
    }
    if (set.y && !all) {
      result.targets = memory_.at(places.targets);
      result.scale = memory_.at(places.scale);
      if (extra<Block>(set.weight_columns > 1)) {
        bind_columns(rows, set.weight_columns, set.weights, memory_.at(places.elements));
        result.elements = memory_.at(places.elements);
      }
      bind_targets(set, rows, places, result.elements);
      // One row that counts is no set to normalise by. In a minibatch it is taken as it is.
      if constexpr (kMixesRows<Block::Family>)
        if (!chosen && result.extent.count == 1 && mixes_rows(*call_.network))
          spoil(memory_.at(places.scale));
    }
    if (result.cotangent)
      bind_columns(rows, call_.network->out_features(), call_.cotangents.predictions,
                   memory_.at(places.cotangent));
    return result;
  }

  // All rows, for predictions: those that do not count are in no statistics, and there are no targets.
  PYMETA_FN ItemSet bind_all(const RowSet<Real>& set, const SetLayout& places) const {
    ItemSet result = bind(set, places, nullptr, true);
    if (call_.by_support) return result;  // whose statistics are the support set's
    Real* counting = memory_.at(places.keep);
    Block::for_indices(result.extent.rows, [&](int r) {
      counting[r] = Real(call_.is_in_statistics(set, task_, r) ? 1 : 0);
    });
    result.extent.count = Block::sum_rows_in_order(result.extent, counting);
    result.extent.counting = counting;
    return result;
  }
  PYMETA_FN bool leaves_out(const RowSet<Real>& set, const SetLayout& places) const {
    const int rows = set.size(task_);
    return set.has_weightless && that_count(set, places, {nullptr, rows}).count < rows;
  }
  // Those of the offered rows that are used, in their order.
  PYMETA_FN TaskRows that_count(const RowSet<Real>& set, const SetLayout& places,
                                const TaskRows& offered) const {
    Real* counting = memory_.at(places.scale);  // its own content comes later
    mark(set, offered, counting);
    const int count = static_cast<int>(
        Block::sum_rows_in_order({offered.count, nullptr, Real(offered.count)}, counting));
    if (count == offered.count) return offered;
    std::int32_t* list = reinterpret_cast<std::int32_t*>(memory_.at(places.keep));
    if (thread_index() == 0) {
      int place = 0;
      for (int r = 0; r < offered.count; ++r)
        if (counting[r] != 0) list[place++] = offered.rows ? offered.rows[r] : r;
    }
    sync();
    return {list, count};
  }

 private:
  struct BoundRows {
    std::int64_t first;
    TaskRows chosen;
    PYMETA_FN std::int64_t row(int r) const { return first + (chosen.rows ? chosen.rows[r] : r); }
  };

  // used [rows]: 1 for a row that is used, 0 for one that is not
  PYMETA_FN void mark(const RowSet<Real>& set, const TaskRows& offered, Real* used) const {
    const bool beside = extra<Block>(set.keeps_weightless) && call_.keeps_beside(set, task_);
    Block::for_indices(offered.count, [&](int r) {
      const int own = offered.rows ? offered.rows[r] : r;
      const bool is_used = Block::Family::kExtras ? call_.is_used(set, task_, own, beside)
                                                  : call_.weighs(set, set.start(task_) + own);
      used[r] = Real(is_used ? 1 : 0);
    });
  }

  // [rows, columns] of the caller to a class-major array
  PYMETA_FN static void bind_columns(const BoundRows& bound, int columns, const Real* from,
                                     Real* to) {
    const int rows = bound.chosen.count;
    Block::map({rows, nullptr, Real(rows)}, columns,
               [=](long, long c, int r) { to[c * rows + r] = from[bound.row(r) * columns + c]; });
  }
  // scale [1]: the loss is NaN, and all that depends on it.
  PYMETA_FN static void spoil(Real* scale) {
    Block::for_indices(1, [&](int r) { scale[r] = Real(NAN); });
  }

  // A row's share of the mean is its weight over the sum of what the rows count.
  PYMETA_FN void bind_targets(const RowSet<Real>& set, const BoundRows& bound,
                              const SetLayout& places, const Real* elements) const {
    const Loss& loss = call_.loss_of(set);
    const bool labels = takes_labels(loss);
    const int out = call_.network->out_features(), columns = target_columns(loss, out);
    const int rows = bound.chosen.count;
    Real* targets = memory_.at(places.targets);
    Real* scale = memory_.at(places.scale);
    const Extent extent{rows, nullptr, Real(rows)};
    if (!labels && !set.weights && columns == 1) {
      // The commonest: all rows have the same share, and a row's thread sees all of it.
      const Real all = Real(rows) * Real(mean_columns(loss, out)), share = Real(1) / all;
      Block::for_indices(rows, [&](int r) {
        targets[r] = static_cast<const Real*>(set.y)[bound.row(r)];
        scale[r] = takes(loss, targets + r, nullptr, 1, rows) ? share : Real(NAN);
      });
      return;
    }
    if (!labels)
      Block::map(extent, columns, [&](long, long o, int r) {
        const Real y = static_cast<const Real*>(set.y)[bound.row(r) * columns + o];
        targets[o * rows + r] = elements ? call_.target_of(set, elements[o * rows + r], y) : y;
      });
    Block::for_indices(rows, [&](int r) {
      const std::int64_t row = bound.row(r);
      const Real weight = elements      ? checked_elements(elements + r, columns, rows)
                          : set.weights ? checked_weight(set.weights[row])
                                        : Real(1);
      if (labels) {
        const std::int64_t label = static_cast<const std::int64_t*>(set.y)[row];
        const bool in_range = label >= 0 && label < out;
        scale[r] = in_range ? weight : Real(NAN);
        targets[r] = Real(in_range ? label : 0);
      } else {
        const Real* own = elements ? elements + r : nullptr;
        scale[r] = takes(loss, targets + r, own, columns, rows) ? weight : Real(NAN);
      }
    });
    Real total = labels || set.weights ? total_weight(loss, extent, targets, scale) : Real(rows);
    if (!elements) total *= Real(mean_columns(loss, out));
    // A set that weighs nothing has loss 0 and no gradient.
    const Real share = total > 0 ? Real(1) / total : total == 0 ? Real(0) : total;
    // The elements have their weights themselves; what is wrong with one of them shows here.
    Block::for_indices(rows, [&](int r) {
      scale[r] = elements ? (scale[r] - scale[r] == 0 ? share : Real(NAN)) : scale[r] * share;
    });
  }
  // The sum of what the rows weigh, with the weights of their classes.
  PYMETA_FN static Real total_weight(const Loss& loss, const Extent& extent, const Real* targets,
                                     const Real* scale) {
    const bool by_class = takes_labels(loss) && loss.weight;
    if (!by_class) return Block::sum_rows_in_order(extent, scale);
    Real sum = 0;
    for (int r = 0; r < extent.rows; ++r)
      sum += scale[r] * Real(loss.weight[static_cast<int>(targets[r])]);
    sync();
    return sum;
  }
  // Are a row's targets (one in every `step`) what the loss takes? Not asked of those of weight 0.
  PYMETA_FN static bool takes(const Loss& loss, const Real* targets, const Real* weights,
                              int columns, int step) {
    const TargetKind kind = target_kind(loss);
    if (kind != TargetKind::probabilities && kind != TargetKind::amounts) return true;
    for (int o = 0; o < columns; ++o) {
      const Real y = targets[o * step];
      if (weights && weights[o * step] == 0) continue;
      if (y < 0 || (kind == TargetKind::probabilities && y > 1)) return false;
    }
    return true;
  }
  // The sum of a row's weights, one in every `step`.
  PYMETA_FN static Real checked_elements(const Real* weights, int columns, int step) {
    Real sum = 0;
    for (int c = 0; c < columns; ++c) sum += checked_weight(weights[c * step]);
    return sum;
  }

  const Call<Real>& call_;
  const Memory& memory_;
  std::int64_t task_;
};

PYMETA_KERNEL_END
