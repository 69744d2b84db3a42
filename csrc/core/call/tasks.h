// One call as plain data: pointers to the rows of all tasks, the recipe of the inner loop, and where results go.
//
// A `RowSet` (all support rows, or all query rows) serves equal tasks ([T, rows, ...]), padded ones (with
// `sizes`) and ragged ones packed one after the other (with `starts` and `sizes`).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../losses/registry.h"

namespace pymeta {

// What a call computes: the query loss after adaptation and its gradient; adapted parameters; the gradient of Reptile, which is
// the mean of start - adapted; parameters adapted by epochs; outputs.
enum class Job : std::uint8_t { meta, adapt, reptile, fine_tune, predict };

template <class Real>
struct RowSet {
  const Real* x = nullptr;  // [total rows, in]
  const void* y =
      nullptr;  // [total rows, out] Real, or [total rows] int64 labels for cross-entropy
  const Real* weights = nullptr;  // [total rows], or null: every row weighs 1
  std::int64_t rows = 0;          // rows from one task to the next (and in each, without `sizes`)
  const std::int64_t* starts = nullptr;  // [T] first row of each task, or null: task * rows
  const std::int64_t* sizes = nullptr;   // [T] rows of each task, or null: rows
  bool has_weightless = false;           // some rows may not be used (Call::is_used)
  int weight_columns = 1;                // of `weights`; more than one: a weight for each target
  const Real* offset = nullptr;          // [total rows, out] is added to the outputs; or null
  const Loss* loss = nullptr;            // that of this set, or null: the call's
  bool keeps_weightless = false;         // the gradient by weights of 0 is wanted (keeps_beside)

  PYMETA_MEMBER std::int64_t start(std::int64_t task) const {
    return starts ? starts[task] : task * rows;
  }
  PYMETA_MEMBER int size(std::int64_t task) const {
    return static_cast<int>(sizes ? sizes[task] : rows);
  }
};

// More inner steps than anybody waits for; their number is an int.
constexpr std::int64_t kMostSteps = std::int64_t{1} << 30;

// The inner learning rate: `rows` x `columns` values; step k uses row min(k, rows - 1).
template <class Real>
struct LearningRate {
  const Real* values =
      nullptr;  // [rows, columns], or [T, rows, columns] where tasks have their own
  int rows = 1;
  int columns = 1;
  bool per_element =
      false;  // columns = all elements of the adapted tensors; otherwise one column per group
  const int* groups = nullptr;  // [tensors] column of each tensor, when not per_element
  bool per_task = false;        // not with per_element

  // Does the executor keep a rate for each element?
  PYMETA_MEMBER bool is_spread() const { return per_element || per_task; }
};

// What flows into the results on the way back. Where all is null, the mean of the losses is what is differentiated.
template <class Real>
struct Cotangents {
  const Real* losses = nullptr;  // [T]
  const Real* predictions =
      nullptr;  // [total query rows, out]; only those of rows that count are read
  const Real* const* adapted = nullptr;  // [tensors] each [T, ...]; entries may be null
  const Real* step_losses = nullptr;     // [steps, T], where those have weights

  PYMETA_MEMBER bool any() const { return losses || predictions || adapted || step_losses; }
};

// The inner optimiser (optimizers/ has the formulas).
enum class OptimizerKind : std::uint8_t { sgd, adam, rmsprop };

struct Optimizer {
  OptimizerKind kind = OptimizerKind::sgd;
  double momentum = 0;                   // sgd, rmsprop
  bool nesterov = false;                 // sgd
  double beta1 = 0, beta2 = 0, eps = 0;  // adam; eps of rmsprop, too
  double alpha = 0;                      // rmsprop
  bool centered = false;
  double weight_decay = 0;
  bool decoupled = false;  // AdamW: the decay is no part of the gradient
  double clip_norm = 0;    // largest norm of a task's gradient; 0: any
  double anchor = 0;       // pull towards the start (L2-SP)
  double anchor_rows = 0;  // in its place: the pull of a task is this over its rows that weigh

  PYMETA_MEMBER bool is_anchored() const { return anchor != 0 || anchor_rows != 0; }
  // theta - lr g and nothing else
  PYMETA_MEMBER bool is_plain() const {
    return kind == OptimizerKind::sgd && momentum == 0 && weight_decay == 0 && clip_norm == 0 &&
           !is_anchored();
  }
  // Arrays of the parameters' size that it keeps from step to step.
  PYMETA_MEMBER int states() const {
    if (kind == OptimizerKind::adam) return 2;
    if (kind == OptimizerKind::rmsprop) return momentum != 0 || centered ? 3 : 1;
    return momentum != 0 ? 1 : 0;
  }
};

// Which rows each inner step uses (minibatches.h).
struct Minibatches {
  int size = 0;  // 0: all rows
  std::uint64_t seed = 0, stream = 0;
  const std::int64_t* task_ids = nullptr;  // [T], or null: 0 for all

  PYMETA_MEMBER bool whole(int rows) const { return size <= 0 || rows <= size; }
  PYMETA_MEMBER int count(int rows) const {
    return whole(rows) ? rows > 0 : (rows + size - 1) / size;
  }
};

// Asked between tasks, steps, layers and the parts of a long product whether the call is to end early, its results then being nobody's.
struct StopRequest {
  bool (*requested)(void* context);
  void* context;

  // Is there somebody to ask (null: nobody), and is the answer yes?
  static bool is_made(const StopRequest* request) {
    return request && request->requested(request->context);
  }
};

template <class Real>
struct Call {
  Job job = Job::meta;
  const Network* network = nullptr;
  const Loss* loss = nullptr;
  const bool* adapted = nullptr;            // [tensors] does the inner loop change this tensor?
  const Real* const* parameters = nullptr;  // [tensors] the start, in torch's layout
  const bool* parameter_per_task =
      nullptr;  // [tensors] stacked [T, ...] instead of shared; null: all shared
  Optimizer optimizer;
  const Real* anchors = nullptr;  // [T] the pull of each task, in place of the optimiser's; or null
  LearningRate<Real> lr;
  int steps = 0;
  int epochs = 0;     // fine_tune: passes over a task's rows, in place of `steps`
  int patience = -1;  // at least 0: a task stops after so many epochs without a better validation
  Minibatches batches;
  bool first_order = false;
  bool by_support =
      false;  // the first rows of each query set are its support set, by which alone it is normalised
  bool allows_tf32x3 =
      false;  // products of linear layers may be made on tensor cores (cuda/fragments.h)
  const Real* step_weights =
      nullptr;           // [steps] of the query losses after each step; null: the last alone
  double task_clip = 0;  // largest norm of a task's share of the summed gradients; 0: any
  std::int64_t tasks = 0;
  RowSet<Real> support;
  RowSet<Real> query;
  RowSet<Real> validation;  // x null where there is none
  Cotangents<Real> cotangents;

  // Results; null where not wanted.
  Real* losses = nullptr;       // [T] mean query loss of each task; the weighted sum over the steps
  Real* step_losses = nullptr;  // [steps, T] after each step, where those have weights
  Real* mean_loss = nullptr;    // [1] their mean
  Real* predictions = nullptr;  // [total query rows, out]
  Real* statistics = nullptr;   // [T, statistics_scalars()] of the support sets (layers/registry.h)
  Real* const* gradients =
      nullptr;  // [tensors] in torch's layout, [T, ...] of a task's own start; entries may be null
  Real* lr_gradient = nullptr;                // [lr.rows, lr.columns], or as lr.values
  Real* xs_gradient = nullptr;                // [total support rows, in]
  Real* xq_gradient = nullptr;                // [total query rows, in]
  Real* ys_gradient = nullptr;                // [total support rows, out]
  Real* yq_gradient = nullptr;                // [total query rows, out]
  Real* support_weights_gradient = nullptr;   // [total support rows, weight columns]
  Real* query_weights_gradient = nullptr;     // [total query rows, weight columns]
  Real* support_offset_gradient = nullptr;    // [total support rows, out]
  Real* query_offset_gradient = nullptr;      // [total query rows, out]
  Real* anchors_gradient = nullptr;           // [T], of the strengths of the pull
  Real* const* adapted_parameters = nullptr;  // [tensors] each [T, ...]; entries may be null
  std::int8_t* status = nullptr;              // [T] 1 where an adapted weight is not finite
  Real* train_curves = nullptr;               // [T, epochs] mean loss while an epoch ran
  Real* validation_curves = nullptr;          // [T, epochs + 1], from the start on
  std::int64_t* best_epochs = nullptr;        // [T] whose weights were kept; 0: the start
  std::int64_t* epochs_run = nullptr;         // [T]

  // The start as Kernels::pack leaves it, where it was packed before; else null.
  const Real* packed_start = nullptr;

  const StopRequest* stop = nullptr;  // or null: it runs to its end

  // Filled in by run() in runtime/run.cpp.
  int max_support = 0;  // largest task
  int max_query = 0;
  int max_validation = 0;
  const std::int64_t* order = nullptr;        // [T] tasks sorted by size, or null: as they come
  const std::int64_t* chunk_order = nullptr;  // [chunks] which starts when, or null: as they come

  PYMETA_MEMBER bool is_stopped() const {
#ifdef __CUDA_ARCH__
    return false;  // a kernel runs to its end, and calls nothing of the host's
#else
    return StopRequest::is_made(stop);
#endif
  }
  PYMETA_MEMBER bool wants_gradient() const {
    return job == Job::meta &&
           (gradients || lr_gradient || wants_input_gradient() || ys_gradient || yq_gradient ||
            support_weights_gradient || query_weights_gradient || support_offset_gradient ||
            query_offset_gradient || anchors_gradient);
  }
  PYMETA_MEMBER bool wants_input_gradient() const { return xs_gradient || xq_gradient; }
  // By what sums over tasks are divided.
  PYMETA_MEMBER Real divisor() const {
    return cotangents.any() || tasks == 0 ? Real(1) : static_cast<Real>(tasks);
  }
  PYMETA_MEMBER bool second_order() const { return wants_gradient() && !first_order && steps > 0; }
  // Does the meta-gradient go back through the steps?
  PYMETA_MEMBER bool reverses() const {
    return wants_gradient() && steps > 0 &&
           (!first_order || lr_gradient || step_weights || optimizer.weight_decay != 0 ||
            is_anchored());
  }
  PYMETA_MEMBER bool is_anchored() const { return anchors || optimizer.is_anchored(); }
  // Is every step theta - lr g and nothing else?
  PYMETA_MEMBER bool has_plain_steps() const { return optimizer.is_plain() && !anchors; }
  // Does a row of a set count? One of weight 0, or with the ignored label, is left out of its set, whatever it holds.
  PYMETA_MEMBER bool weighs(const RowSet<Real>& set, std::int64_t row) const {
    return has_weight(set, row) && !is_ignored(set, row);
  }
  // Do rows of weight 0 stand beside those of a task that count, because the gradient by their weight is wanted? They are in no
  // statistics, and nothing else depends on them. Not where no row counts.
  PYMETA_MEMBER bool keeps_beside(const RowSet<Real>& set, std::int64_t task) const {
    const std::int64_t first = set.start(task);
    for (int r = 0; set.keeps_weightless && r < set.size(task); ++r)
      if (weighs(set, first + r)) return true;
    return false;
  }
  // Is a task's r-th row used: does it count, or does it stand beside those that do? `beside`: keeps_beside(). Of query sets
  // behind their support set, the rows that count there are used.
  PYMETA_MEMBER bool is_used(const RowSet<Real>& set, std::int64_t task, int r, bool beside) const {
    if (is_context(set, task, r)) return weighs(support, support.start(task) + r);
    const std::int64_t row = set.start(task) + r;
    return weighs(set, row) || (beside && !is_ignored(set, row) && has_numbers(set, row));
  }
  // Is a row of a query set there only to normalise by?
  PYMETA_MEMBER bool is_context(const RowSet<Real>& set, std::int64_t task, int r) const {
    return is_behind_support(set) && r < support.size(task);
  }
  PYMETA_MEMBER bool is_behind_support(const RowSet<Real>& set) const {
    return by_support && set.x == query.x;
  }
  // Is a task's r-th row in the statistics that its set is normalised by?
  PYMETA_MEMBER bool is_in_statistics(const RowSet<Real>& set, std::int64_t task, int r) const {
    if (!is_behind_support(set)) return weighs(set, set.start(task) + r);
    return is_context(set, task, r) && weighs(support, support.start(task) + r);
  }
  // Has a target's weight no gradient? One of weight 0 whose loss is no number is no target at all.
  PYMETA_MEMBER bool is_masked(const RowSet<Real>& set, std::int64_t row, int column,
                               Real own_loss) const {
    const std::int64_t at = row * set.weight_columns + column;
    return set.weight_columns > 1 && set.weights[at] == 0 &&
           !(is_finite(own_loss) && is_finite(static_cast<const Real*>(set.y)[at]));
  }
  // What is held against a target's outputs: 0 where the target is masked.
  PYMETA_MEMBER Real target_of(const RowSet<Real>& set, Real weight, Real y) const {
    return weight == 0 && !(set.keeps_weightless && is_finite(y)) ? Real(0) : y;
  }
  PYMETA_MEMBER const Loss& loss_of(const RowSet<Real>& set) const {
    return set.loss ? *set.loss : *loss;
  }
  // The weight of a row's class; 1 where classes have none. Blocks do not look at labels first: a wrong one's is NaN.
  PYMETA_MEMBER Real class_weight(const RowSet<Real>& set, std::int64_t row) const {
    const Loss& own = loss_of(set);
    if (!own.weight || !set.y || !takes_labels(own)) return Real(1);
    const std::int64_t label = static_cast<const std::int64_t*>(set.y)[row];
    const bool in_range = label >= 0 && label < network->out_features();
    return in_range ? static_cast<Real>(own.weight[label]) : Real(NAN);
  }
  // Is any of a task's rows not used?
  PYMETA_MEMBER bool leaves_out(const RowSet<Real>& set, std::int64_t task) const {
    const bool beside = set.has_weightless && keeps_beside(set, task);
    for (int r = 0; set.has_weightless && r < set.size(task); ++r)
      if (!is_used(set, task, r, beside)) return true;
    return false;
  }
  // How many of a task's rows count.
  PYMETA_MEMBER int weighing_rows(const RowSet<Real>& set, std::int64_t task) const {
    if (!set.has_weightless && !set.keeps_weightless) return set.size(task);
    const std::int64_t first = set.start(task);
    int count = 0;
    for (int r = 0; r < set.size(task); ++r) count += weighs(set, first + r);
    return count;
  }
  // The strength of a task's pull towards its start.
  PYMETA_MEMBER Real anchor_of(std::int64_t task) const {
    if (anchors) return anchors[task];
    if (optimizer.anchor_rows == 0) return Real(optimizer.anchor);
    const int rows = weighing_rows(support, task);
    return Real(optimizer.anchor_rows / (rows > 0 ? rows : 1));
  }
  // Does each task have a start of its own for this tensor?
  PYMETA_MEMBER bool has_own_start(int tensor) const {
    return parameter_per_task && parameter_per_task[tensor];
  }
  // Is the gradient of such a start wanted?
  PYMETA_MEMBER bool wants_own_gradient(int tensor) const {
    return has_own_start(tensor) && gradients && gradients[tensor];
  }
  // Is a task's whole gradient wanted before it is summed, or instead?
  PYMETA_MEMBER bool keeps_task_gradient() const {
    if (job != Job::meta) return false;
    bool own = task_clip > 0;
    for (int t = 0; t < network->tensor_count; ++t) own = own || wants_own_gradient(t);
    return own;
  }
  // Is a set of these looked at?
  PYMETA_MEMBER bool has_support() const { return job != Job::predict; }
  PYMETA_MEMBER bool has_query() const {
    return job == Job::meta || job == Job::predict || predictions;
  }
  // Are gradients wanted that are summed over tasks?
  PYMETA_MEMBER bool sums_gradients() const {
    return wants_gradient() || (job == Job::reptile && gradients);
  }
  // Adam's corrections: one for each step of the task that makes the most; 0 for other optimisers.
  PYMETA_MEMBER std::size_t corrections() const {
    return tasks > 0 && optimizer.kind == OptimizerKind::adam
               ? static_cast<std::size_t>(steps_of(max_support))
               : 0;
  }
  // Inner steps of a task of so many rows.
  PYMETA_MEMBER std::int64_t steps_of(int rows) const {
    return job == Job::fine_tune ? static_cast<std::int64_t>(epochs) * batches.count(rows) : steps;
  }

 private:
  PYMETA_MEMBER static bool is_finite(Real value) { return value - value == 0; }
  PYMETA_MEMBER static bool has_weight(const RowSet<Real>& set, std::int64_t row) {
    if (!set.weights) return true;
    const Real* weights = set.weights + row * set.weight_columns;
    bool any = false;
    for (int c = 0; c < set.weight_columns; ++c) any = any || weights[c] != 0;
    return any;
  }
  PYMETA_MEMBER static bool are_finite(const Real* values, std::int64_t row, int columns) {
    bool all = true;
    for (int c = 0; values && c < columns; ++c) all = all && is_finite(values[row * columns + c]);
    return all;
  }
  // Are a row's inputs, offset and targets all finite? Without, what it would weigh has no derivative. Where single targets have
  // weights, it is each target that has none (is_masked).
  PYMETA_MEMBER bool has_numbers(const RowSet<Real>& set, std::int64_t row) const {
    if (!are_finite(set.x, row, network->in_features())) return false;
    if (set.weight_columns > 1) return true;
    const Loss& own = loss_of(set);
    const Real* targets = takes_labels(own) ? nullptr : static_cast<const Real*>(set.y);
    const int out = network->out_features();
    return are_finite(targets, row, target_columns(own, out)) && are_finite(set.offset, row, out);
  }
  PYMETA_MEMBER bool is_ignored(const RowSet<Real>& set, std::int64_t row) const {
    const Loss& own = loss_of(set);
    return set.y && takes_labels(own) &&
           static_cast<const std::int64_t*>(set.y)[row] == own.ignore_index;
  }
};

}  // namespace pymeta
