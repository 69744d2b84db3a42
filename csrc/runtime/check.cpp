#include "check.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "../core/layers/registry.h"

namespace pymeta {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string task_row(const char* name, std::int64_t task, std::int64_t row) {
  return std::string(name) + ": task " + std::to_string(task) + ", row " + std::to_string(row) +
         ": ";
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

// What messages call a set's arrays.
struct SetNames {
  const char *x, *y, *sizes, *weights;
};
constexpr SetNames kSupport{"xs", "ys", "support_sizes", "support_weights"};
constexpr SetNames kQuery{"xq", "yq", "query_sizes", "query_weights"};
constexpr SetNames kValidation{"xv", "yv", "validation_sizes", "validation_weights"};

constexpr const char* kFreed = ": its storage has been freed; expected memory with numbers in it";

// Looks at the sizes, targets and weights of one set.
template <class Real>
class SetCheck {
 public:
  SetCheck(const Call<Real>& call, RowSet<Real>& set, const SetNames& names)
      : call_(call), set_(set), names_(names), out_(call.network->out_features()) {
    if (!call.loss || !set.y) return;
    kind_ = target_kind(call.loss_of(set));
    columns_ = target_columns(call.loss_of(set), out_);
  }

  // Returns the rows of the largest task; says in the set whether there are rows that weigh nothing.
  int run() {
    // by their own statistics
    const bool batch_norm =
        mixes_rows(*call_.network) && !(call_.by_support && &set_ == &call_.query);
    std::int64_t largest = 0;
    set_.has_weightless = false;
    for (std::int64_t task = 0; task < call_.tasks; ++task) {
      const std::int64_t rows = size(task);
      largest = std::max(largest, rows);
      const bool beside = call_.keeps_beside(set_, task);
      const Looked looked = set_.weights || kind_ != TargetKind::values
                                ? look_at_rows(task, rows, beside)
                                : Looked{rows, rows};
      if (call_.network->layers[0].kind == LayerKind::embedding)
        check_categories(task, rows, looked.used < rows, beside);
      if (looked.used < rows) set_.has_weightless = true;
      if (batch_norm && looked.counting == 1)
        refuse(std::string(names_.x) + ": task " + std::to_string(task) + " has one row" +
               (rows > 1 ? " that counts" : "") +
               ", and BatchNorm1d needs at least two to normalise by");
    }
    if (largest > 0 && !set_.x) refuse(std::string(names_.x) + kFreed);
    if (largest > (1 << 24)) refuse(std::string(names_.x) + ": a task has more than 2^24 rows");
    return static_cast<int>(largest);
  }

 private:
  // How many of a task's rows count, and how many are used.
  struct Looked {
    std::int64_t counting, used;
  };

  std::int64_t size(std::int64_t task) const {
    const std::int64_t rows = set_.sizes ? set_.sizes[task] : set_.rows;
    if (rows < 0 || set_.start(task) < 0 || (set_.sizes && !set_.starts && rows > set_.rows))
      refuse(std::string(names_.sizes) + ": task " + std::to_string(task) + " has size " +
             std::to_string(rows) + ", not in 0.." + std::to_string(set_.rows));
    return rows;
  }

  // What a row that is not used holds is nobody's concern.
  Looked look_at_rows(std::int64_t task, std::int64_t rows, bool beside) const {
    const std::int64_t start = set_.start(task);
    Looked looked{0, 0};
    for (std::int64_t row = 0; row < rows; ++row) {
      const Real* weights =
          set_.weights ? set_.weights + (start + row) * set_.weight_columns : nullptr;
      for (int c = 0; weights && c < set_.weight_columns; ++c) check_weight(task, row, weights[c]);
      if (!call_.is_used(set_, task, static_cast<int>(row), beside)) continue;
      ++looked.used;
      looked.counting += call_.weighs(set_, start + row);
      if (kind_ == TargetKind::labels)
        check_label(task, row, static_cast<const std::int64_t*>(set_.y)[start + row]);
      else if (kind_ == TargetKind::probabilities || kind_ == TargetKind::amounts)
        check_range(task, row, static_cast<const Real*>(set_.y) + (start + row) * columns_,
                    set_.weight_columns > 1 ? weights : nullptr);
    }
    return looked;
  }
  // Those that embeddings look up, in rows that are used.
  void check_categories(std::int64_t task, std::int64_t rows, bool leaves_out, bool beside) const {
    const Network& network = *call_.network;
    const std::int64_t start = set_.start(task), in = network.in_features();
    for (std::int64_t row = 0; row < rows; ++row) {
      if (leaves_out && !call_.is_used(set_, task, static_cast<int>(row), beside)) continue;
      for (int l = 0; l < network.layer_count; ++l) {
        if (network.layers[l].kind != LayerKind::embedding) break;
        const Lookup& lookup = network.layers[l].lookup;
        const double value = set_.x[(start + row) * in + lookup.column];
        if (!(value >= 0 && value < lookup.categories) || value != std::floor(value))
          refuse(std::string(names_.x) + ": task " + std::to_string(task) + ", row " +
                 std::to_string(row) + ", column " + std::to_string(lookup.column) + ": " +
                 number(value) + " is not a category, an integer in 0.." +
                 std::to_string(lookup.categories - 1));
      }
    }
  }
  void check_weight(std::int64_t task, std::int64_t row, Real weight) const {
    if (!(weight >= 0) || !std::isfinite(weight))
      refuse(task_row(names_.weights, task, row) + "weight " + std::to_string(weight) +
             " is not a finite number >= 0");
  }
  void check_label(std::int64_t task, std::int64_t row, std::int64_t label) const {
    if (label < 0 || label >= out_)
      refuse(task_row(names_.y, task, row) + "label " + std::to_string(label) + " is not in 0.." +
             std::to_string(out_ - 1));
  }
  // y [columns], and their weights or null. A NaN is as in the other losses: the loss is NaN.
  void check_range(std::int64_t task, std::int64_t row, const Real* y, const Real* weights) const {
    const bool probabilities = kind_ == TargetKind::probabilities;
    for (int o = 0; o < columns_; ++o)
      if ((y[o] < 0 || (probabilities && y[o] > 1)) && !(weights && weights[o] == 0))
        refuse(task_row(names_.y, task, row) + "target " + number(y[o]) +
               (probabilities ? " is not in 0..1; bce_with_logits takes probabilities (labels of "
                                "-1 and +1: use (y + 1) / 2)"
                              : " is below 0; " + std::string(loss_name(call_.loss_of(set_))) +
                                    " takes numbers of at least 0"));
  }

  const Call<Real>& call_;
  RowSet<Real>& set_;
  const SetNames& names_;
  const int out_;
  TargetKind kind_ = TargetKind::values;
  int columns_ = 0;
};

// A minibatch of one row cannot be normalised by its own statistics.
template <class Real>
void check_minibatches(const Call<Real>& call) {
  const int size = call.batches.size;
  if (size == 0 || !mixes_rows(*call.network)) return;
  for (std::int64_t task = 0; task < call.tasks; ++task) {
    const int rows = call.support.size(task);
    if (!call.batches.whole(rows) && (size == 1 || rows % size == 1))
      refuse("batch_size: " + std::to_string(size) + " leaves a minibatch of one row of the " +
             std::to_string(rows) + " rows of task " + std::to_string(task) +
             ", which batch normalisation cannot normalise");
  }
}

template <class Real>
void check_anchors(const Call<Real>& call) {
  for (std::int64_t task = 0; call.anchors && task < call.tasks; ++task)
    if (!(call.anchors[task] >= 0) || !std::isfinite(call.anchors[task]))
      refuse("anchor: task " + std::to_string(task) + ": expected a finite number >= 0, got " +
             number(call.anchors[task]));
}

template <class Real>
void check_parameters(const Call<Real>& call) {
  for (int t = 0; call.tasks > 0 && t < call.network->tensor_count; ++t)
    if (!call.parameters[t]) refuse("parameter " + std::to_string(t) + kFreed);
}

}  // namespace

template <class Real>
void check(Call<Real>& call) {
  check_parameters(call);
  check_anchors(call);
  const auto largest = [&](RowSet<Real>& set, const SetNames& names) {
    return SetCheck<Real>(call, set, names).run();
  };
  call.max_support = call.has_support() ? largest(call.support, kSupport) : 0;
  check_minibatches(call);
  call.max_query = call.has_query() ? largest(call.query, kQuery) : 0;
  call.max_validation = call.validation.x ? largest(call.validation, kValidation) : 0;
  if (call.max_support > 0 && !call.support.y) refuse("ys: expected targets, got none");
  if (call.max_validation > 0 && !call.validation.y) refuse("yv: expected targets, got none");
  if (call.steps_of(call.max_support) > kMostSteps)
    refuse("epochs: more than 2^30 inner steps for the largest task");
}

template void check(Call<float>&);
template void check(Call<double>&);

}  // namespace pymeta
