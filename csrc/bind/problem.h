// A problem: a network, a loss and a recipe, which calls of any rows are made of.
#pragma once

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../core/losses/registry.h"
#include "../cuda/device.h"
#include "../runtime/run.h"
#include "common.h"

namespace pymeta {

namespace py = pybind11;

using RowsTuple = std::tuple<Address, Address, Address, std::int64_t, Address, Address>;
// steps, epochs (one of them -1), batch size (0: all rows), seed, stream, task ids
using ScheduleTuple = std::tuple<int, int, int, std::uint64_t, std::uint64_t, Address>;

// ordinal, stream, address and bytes of the workspace
using DeviceTuple = std::tuple<int, Address, Address, std::size_t>;
using MaybeDevice = std::optional<DeviceTuple>;

struct LossHolder {
  Loss loss;
  std::vector<double> weight, pos_weight;
};

std::vector<std::int64_t> parameter_sizes(const Network& network);

class Problem {
 public:
  Problem(std::shared_ptr<OwnedNetwork> owned, const LossHolder& loss,
          const std::vector<bool>& adapted, const std::optional<std::vector<int>>& lr_groups,
          const Optimizer* optimizer)
      : owned_(std::move(owned)),
        network_(&owned_->network),
        loss_(loss),
        optimizer_(optimizer ? *optimizer : Optimizer{}) {
    const std::size_t tensors = static_cast<std::size_t>(network_->tensor_count);
    const std::size_t out = static_cast<std::size_t>(network_->out_features());
    if (adapted.size() != tensors)
      refuse("adapted: expected " + std::to_string(tensors) + " values, got " +
             std::to_string(adapted.size()));
    if (lr_groups && lr_groups->size() != tensors)
      refuse("lr_groups: expected " + std::to_string(tensors) + " values, got " +
             std::to_string(lr_groups->size()));
    std::copy(adapted.begin(), adapted.end(), adapted_);
    per_element_ = !lr_groups;
    if (lr_groups) groups_ = *lr_groups;
    if (loss_.pos_weight.size() == 1) loss_.pos_weight.assign(out, loss_.pos_weight[0]);
    if (loss_.weight.size() == 1 && !takes_labels(loss_.loss))
      loss_.weight.assign(out, loss_.weight[0]);
    for (const auto* values : {&loss_.weight, &loss_.pos_weight})
      if (!values->empty() && values->size() != out)
        refuse("loss: expected a weight for each of " + std::to_string(out) + " outputs, got " +
               std::to_string(values->size()));
    loss_.loss.weight = loss_.weight.empty() ? nullptr : loss_.weight.data();
    loss_.loss.pos_weight = loss_.pos_weight.empty() ? nullptr : loss_.pos_weight.data();
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  std::size_t meta_gradient(int dtype, const std::vector<Address>& parameters, Address lr,
                            int lr_rows, int lr_columns, int steps, bool first_order,
                            std::int64_t tasks, const RowsTuple& support, const RowsTuple& query,
                            Address losses, Address predictions,
                            const std::optional<std::vector<Address>>& gradients,
                            Address lr_gradient, Address xs_gradient, Address xq_gradient,
                            Address mean_loss, const MaybeDevice& device) const {
    return with_real(dtype, [&](auto real) {
      using Real = decltype(real);
      std::vector<Real*> starts, sinks;
      Call<Real> call = describe<Real>(parameters, starts, lr, lr_rows, lr_columns, steps, tasks);
      call.first_order = first_order;
      call.support = rows<Real>(support);
      call.query = rows<Real>(query);
      call.losses = pointer<Real>(losses);
      call.mean_loss = pointer<Real>(mean_loss);
      call.predictions = pointer<Real>(predictions);
      if (gradients) {
        sinks = pointers<Real>(*gradients, "gradients");
        call.gradients = sinks.data();
      }
      call.lr_gradient = pointer<Real>(lr_gradient);
      call.xs_gradient = pointer<Real>(xs_gradient);
      call.xq_gradient = pointer<Real>(xq_gradient);
      return execute(call, "meta_gradient", device);
    });
  }

  std::size_t adapt(int dtype, const std::vector<Address>& parameters,
                    const std::vector<bool>& per_task, Address lr, int lr_rows, int lr_columns,
                    const ScheduleTuple& schedule, std::int64_t tasks, const RowsTuple& support,
                    const std::vector<Address>& adapted, const std::optional<RowsTuple>& validation,
                    int patience, Address status, Address train_curves, Address validation_curves,
                    Address best_epochs, Address epochs_run, const MaybeDevice& device) const {
    return with_real(dtype, [&](auto real) {
      using Real = decltype(real);
      std::vector<Real*> starts, results = pointers<Real>(adapted, "adapted");
      bool stacked[kMaxTensors];
      Call<Real> call = describe<Real>(parameters, starts, lr, lr_rows, lr_columns, 0, tasks);
      set_schedule(call, schedule);
      call.parameter_per_task = flags(per_task, stacked);
      call.support = rows<Real>(support);
      if (validation) {
        if (call.job != Job::fine_tune) refuse("validation: needs epochs");
        call.validation = rows<Real>(*validation);
      }
      call.patience = patience;
      call.adapted_parameters = results.data();
      call.status = pointer<std::int8_t>(status);
      call.train_curves = pointer<Real>(train_curves);
      call.validation_curves = pointer<Real>(validation_curves);
      call.best_epochs = pointer<std::int64_t>(best_epochs);
      call.epochs_run = pointer<std::int64_t>(epochs_run);
      return execute(call, "adapt", device);
    });
  }

  std::size_t reptile(int dtype, const std::vector<Address>& parameters, Address lr, int lr_rows,
                      int lr_columns, const ScheduleTuple& schedule, std::int64_t tasks,
                      const RowsTuple& support, Address losses, Address mean_loss,
                      const std::optional<std::vector<Address>>& gradients,
                      const MaybeDevice& device) const {
    return with_real(dtype, [&](auto real) {
      using Real = decltype(real);
      std::vector<Real*> starts, sinks;
      Call<Real> call = describe<Real>(parameters, starts, lr, lr_rows, lr_columns, 0, tasks);
      set_schedule(call, schedule);
      if (call.job == Job::fine_tune) refuse("schedule: expected a number of steps");
      call.support = rows<Real>(support);
      call.job = Job::reptile;
      call.losses = pointer<Real>(losses);
      call.mean_loss = pointer<Real>(mean_loss);
      if (gradients) {
        sinks = pointers<Real>(*gradients, "gradients");
        call.gradients = sinks.data();
      }
      return execute(call, "reptile", device);
    });
  }

  std::size_t predict(int dtype, const std::vector<Address>& parameters,
                      const std::vector<bool>& per_task, std::int64_t tasks, const RowsTuple& query,
                      Address predictions, const MaybeDevice& device) const {
    return with_real(dtype, [&](auto real) {
      using Real = decltype(real);
      std::vector<Real*> starts;
      bool stacked[kMaxTensors];
      const bool none[kMaxTensors] = {};
      const int no_groups[kMaxTensors] = {};
      Call<Real> call = describe<Real>(parameters, starts, 0, 1, 0, 0, tasks);
      call.optimizer = {};
      call.lr.per_element = false;
      call.lr.groups = no_groups;
      call.adapted = none;
      call.parameter_per_task = flags(per_task, stacked);
      call.query = rows<Real>(query);
      call.job = Job::predict;
      call.query.y = nullptr;
      call.predictions = pointer<Real>(predictions);
      return execute(call, "predict", device);
    });
  }

  // visit(a Call without rows and results)
  template <class Visitor>
  void with_recipe(int dtype, const std::vector<Address>& parameters, Address lr, int lr_rows,
                   int lr_columns, const ScheduleTuple& schedule, Visitor visit) const {
    with_real(dtype, [&](auto real) {
      using Real = decltype(real);
      std::vector<Real*> starts;
      Call<Real> call = describe<Real>(parameters, starts, lr, lr_rows, lr_columns, 0, 1);
      set_schedule(call, schedule);
      visit(call);
    });
  }

  py::dict plan(int dtype, const std::string& job, const ScheduleTuple& schedule,
                std::int64_t tasks, int support_rows, int query_rows, int validation_rows,
                bool second_order, const std::optional<int>& device) const {
    if (support_rows < 0 || query_rows < 0 || validation_rows < 0)
      refuse("support_rows, query_rows, validation_rows: expected at least 0");
    if (job != "meta" && job != "adapt" && job != "reptile")
      refuse("job: expected 'meta', 'adapt' or 'reptile', got '" + job + "'");
    py::dict result;
    with_real(dtype, [&](auto real) {
      using Real = decltype(real);
      std::vector<Real*> starts;
      const Real some{};
      Call<Real> call =
          describe<Real>(std::vector<Address>(static_cast<std::size_t>(network_->tensor_count), 0),
                         starts, 0, 1, per_element_ ? adapted_elements() : 1, 0, tasks);
      set_schedule(call, schedule);
      Real* none[kMaxTensors] = {};
      if (job != "adapt") call.gradients = none;
      if (job != "adapt") call.job = job == "meta" ? Job::meta : Job::reptile;
      call.first_order = !second_order;
      call.max_support = support_rows;
      call.max_query = job == "meta" ? query_rows : 0;
      call.max_validation = validation_rows;
      if (validation_rows > 0) call.validation.x = &some;
      if (device) {
        describe_blocks(*device, plan_on(*device, call), result);
        return;
      }
      const Plan<Real> plan(call);
      const Needs& needs = plan.needs();
      result["executor"] = plan.executor();
      result["isa"] = isa();
      result["threads"] = plan.threads();
      result["workspace_bytes"] = needs.workspace;
      result["shared_bytes"] = needs.shared + needs.sums * needs.chunks;
      result["factored"] = needs.factored;
    });
    return result;
  }

  std::optional<std::string> unfit_for_device() const {
    const std::string reason = unfit_for_blocks(*network_, loss_.loss);
    return reason.empty() ? std::nullopt : std::optional(reason);
  }

 private:
  static void describe_blocks(int ordinal, const BlockPlan& plan, py::dict& result) {
    const DeviceFacts& facts = device_facts(ordinal);
    result["executor"] = "block";
    result["isa"] = ordinal == kEmulated ? facts.name : "sm_" + std::to_string(facts.capability);
    result["threads"] = plan.threads;
    result["blocks"] = plan.blocks;
    result["block_bytes"] = plan.block_bytes;
    result["workspace_bytes"] = plan.workspace_bytes;
    result["kept"] = plan.saves ? "workspace" : "shared";
    result["factored"] = false;
  }

  template <class Real>
  std::vector<Real*> pointers(const std::vector<Address>& addresses, const char* name) const {
    if (addresses.size() != static_cast<std::size_t>(network_->tensor_count))
      refuse(std::string(name) + ": expected " + std::to_string(network_->tensor_count) +
             " addresses, got " + std::to_string(addresses.size()));
    std::vector<Real*> result;
    for (const Address address : addresses) result.push_back(pointer<Real>(address));
    return result;
  }

  template <class Real>
  static RowSet<Real> rows(const RowsTuple& tuple) {
    const auto& [x, y, weights, count, starts, sizes] = tuple;
    return {pointer<Real>(x),
            pointer<void>(y),
            pointer<Real>(weights),
            count,
            pointer<std::int64_t>(starts),
            pointer<std::int64_t>(sizes),
            false};
  }

  template <class Real>
  Call<Real> describe(const std::vector<Address>& parameters, std::vector<Real*>& starts,
                      Address lr, int lr_rows, int lr_columns, int steps,
                      std::int64_t tasks) const {
    starts = pointers<Real>(parameters, "parameters");
    if (steps < 0) refuse("steps: expected at least 0, got " + std::to_string(steps));
    if (tasks < 0) refuse("tasks: expected at least 0, got " + std::to_string(tasks));
    if (lr_rows < 1) refuse("lr: expected at least one row");
    if (per_element_ && lr_columns != adapted_elements() && lr)
      refuse("lr: expected " + std::to_string(adapted_elements()) + " columns, got " +
             std::to_string(lr_columns));
    for (std::size_t t = 0; lr && t < groups_.size(); ++t)
      if (adapted_[t] && (groups_[t] < 0 || groups_[t] >= lr_columns))
        refuse("lr_groups: column " + std::to_string(groups_[t]) + " of " +
               std::to_string(lr_columns));
    Call<Real> call;
    call.network = network_;
    call.loss = &loss_.loss;
    call.adapted = adapted_;
    call.parameters = starts.data();
    call.optimizer = optimizer_;
    call.lr = {pointer<Real>(lr), lr_rows, lr_columns, per_element_, groups_.data()};
    call.steps = steps;
    call.tasks = tasks;
    return call;
  }

  bool* flags(const std::vector<bool>& per_task, bool* to) const {
    if (per_task.size() != static_cast<std::size_t>(network_->tensor_count))
      refuse("per_task: expected " + std::to_string(network_->tensor_count) + " values, got " +
             std::to_string(per_task.size()));
    std::copy(per_task.begin(), per_task.end(), to);
    return to;
  }

  template <class Real>
  static void set_schedule(Call<Real>& call, const ScheduleTuple& schedule) {
    const auto& [steps, epochs, batch_size, seed, stream, task_ids] = schedule;
    if ((steps < 0) == (epochs < 0)) refuse("schedule: expected either steps or epochs");
    if (batch_size < 0) refuse("schedule: batch_size " + std::to_string(batch_size));
    call.steps = steps < 0 ? 0 : steps;
    call.job = epochs < 0 ? Job::adapt : Job::fine_tune;
    call.epochs = epochs < 0 ? 0 : epochs;
    call.batches = {batch_size, seed, stream, pointer<std::int64_t>(task_ids)};
  }

  int adapted_elements() const {
    std::int64_t sum = 0;
    const std::vector<std::int64_t> sizes = parameter_sizes(*network_);
    for (std::size_t t = 0; t < sizes.size(); ++t) sum += adapted_[t] ? sizes[t] : 0;
    return static_cast<int>(sum);
  }

  // Returns the bytes of workspace that the call needs on a device; with fewer it is not run.
  template <class Real>
  static std::size_t execute(Call<Real>& call, const char* name, const MaybeDevice& device) {
    if (!device) {
      run_interruptibly(call);
      return 0;
    }
    const ReleasedGil released;
    const auto& [ordinal, stream, workspace, bytes] = *device;
    assume_largest(call);
    const BlockPlan plan = plan_on(ordinal, call);
    const std::size_t needed = plan.workspace_bytes;
    if (workspace == 0 || bytes < needed) return needed;
    try {
      run_on(ordinal, stream, pointer<char>(workspace), plan, call);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("cuda:" + std::to_string(ordinal) + ": " + name + ": " +
                               error.what());
    }
    return needed;
  }
  // Sizes of tasks lie on the device: each may be as large as the set's rows say.
  template <class Real>
  static void assume_largest(Call<Real>& call) {
    const auto largest = [](const RowSet<Real>& set) {
      if (0 > set.rows || set.rows > (1 << 24))
        refuse("rows: expected 0 to 2^24, got " + std::to_string(set.rows));
      return static_cast<int>(set.rows);
    };
    // Nor has anybody looked for rows that weigh nothing: the kernel does, where there may be some.
    const bool labels = takes_labels(*call.loss);
    for (RowSet<Real>* set : {&call.support, &call.query, &call.validation})
      set->has_weightless = set->weights || (labels && set->y);
    call.max_support = call.has_support() ? largest(call.support) : 0;
    call.max_query = call.has_query() ? largest(call.query) : 0;
    call.max_validation = call.validation.x ? largest(call.validation) : 0;
    if (call.steps_of(call.max_support) > kMostSteps)
      refuse("epochs: more than 2^30 inner steps for the largest task");
  }

  std::shared_ptr<OwnedNetwork> owned_;
  const Network* network_;
  LossHolder loss_;
  Optimizer optimizer_;
  bool adapted_[kMaxTensors] = {};
  bool per_element_ = false;
  std::vector<int> groups_;
};

}  // namespace pymeta
