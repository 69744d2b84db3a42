// A problem: a network, a loss and a recipe, which calls of any rows are made of.
#pragma once

#include <pybind11/stl.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../core/losses/registry.h"
#include "../cuda/device.h"
#include "../runtime/run.h"
#include "common.h"

namespace pymeta {

namespace py = pybind11;

struct LossHolder {
  Loss loss, of_distributions;
  std::vector<double> weight, pos_weight, levels;
};

std::vector<std::int64_t> parameter_sizes(const Network& network);

class Problem {
 public:
  // `query_loss`: what query sets of a meta-gradient are judged by, or null: the same as all others. `allows_tf32x3`: on a device
  // (cuda/fragments.h).
  Problem(std::shared_ptr<OwnedNetwork> owned, const LossHolder& loss,
          const std::vector<bool>& adapted, const std::optional<std::vector<int>>& lr_groups,
          const Optimizer* optimizer, const LossHolder* query_loss, bool allows_tf32x3)
      : owned_(std::move(owned)),
        network_(&owned_->network),
        loss_(loss),
        query_loss_(query_loss ? *query_loss : loss),
        optimizer_(optimizer ? *optimizer : Optimizer{}),
        allows_tf32x3_(allows_tf32x3) {
    const std::size_t tensors = static_cast<std::size_t>(network_->tensor_count);
    if (adapted.size() != tensors)
      refuse("adapted: expected " + std::to_string(tensors) + " values, got " +
             std::to_string(adapted.size()));
    if (lr_groups && lr_groups->size() != tensors)
      refuse("lr_groups: expected " + std::to_string(tensors) + " values, got " +
             std::to_string(lr_groups->size()));
    std::copy(adapted.begin(), adapted.end(), adapted_);
    per_element_ = !lr_groups;
    if (lr_groups) groups_ = *lr_groups;
    settle(loss_);
    settle(query_loss_);
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  const Network& network() const { return *network_; }
  bool per_element() const { return per_element_; }

  // A Call of this problem, without rows and results. The vectors it points to are the caller's.
  template <class Real>
  Call<Real> describe(const Real* const* start, const LearningRate<Real>& rates) const {
    if (rates.rows < 1) refuse("rates: expected at least one row");
    if (rates.per_task && per_element_) refuse("rates: tasks have their own, or elements have");
    if (rates.values && per_element_ && rates.columns != adapted_elements())
      refuse("rates: expected " + std::to_string(adapted_elements()) + " columns, got " +
             std::to_string(rates.columns));
    for (std::size_t t = 0; rates.values && t < groups_.size(); ++t)
      if (adapted_[t] && (groups_[t] < 0 || groups_[t] >= rates.columns))
        refuse("lr_groups: column " + std::to_string(groups_[t]) + " of " +
               std::to_string(rates.columns));
    Call<Real> call;
    call.network = network_;
    call.loss = &loss_.loss;
    call.adapted = adapted_;
    call.parameters = start;
    call.optimizer = optimizer_;
    call.lr = rates;
    call.lr.per_element = per_element_;
    call.lr.groups = groups_.data();
    call.allows_tf32x3 = allows_tf32x3_;
    return call;
  }

  // A pointer for each tensor. Where there were as many before, they stay in their place.
  template <class Real>
  void put_pointers(const std::vector<Address>& addresses, const char* name,
                    std::vector<Real*>& to) const {
    if (addresses.size() != static_cast<std::size_t>(network_->tensor_count))
      refuse(std::string(name) + ": expected " + std::to_string(network_->tensor_count) +
             " addresses, got " + std::to_string(addresses.size()));
    to.resize(addresses.size());
    for (std::size_t t = 0; t < addresses.size(); ++t) to[t] = pointer<Real>(addresses[t]);
  }

  // Scalars of all tensors that the inner loop changes.
  int adapted_elements() const {
    std::int64_t sum = 0;
    const std::vector<std::int64_t> sizes = parameter_sizes(*network_);
    for (std::size_t t = 0; t < sizes.size(); ++t) sum += adapted_[t] ? sizes[t] : 0;
    return static_cast<int>(sum);
  }

  // Whether a call that was made on a device has products in 3xTF32. Predictions have none.
  template <class Real>
  void note_products(int ordinal, const Call<Real>& call) const {
    if (allows_tf32x3_ && call.job != Job::predict)
      has_tf32x3_ = std::strcmp(family_on(ordinal, call), "tensor") == 0;
  }
  // Of the last such call.
  bool has_tf32x3() const { return has_tf32x3_; }

  std::optional<std::string> unfit_for_device() const {
    for (const LossHolder* holder : {&loss_, &query_loss_}) {
      const std::string reason = unfit_for_blocks(*network_, holder->loss);
      if (!reason.empty()) return reason;
    }
    return std::nullopt;
  }
  // What targets are held against, be they labels or distributions over the classes.
  const Loss* loss(bool of_queries, bool has_distributions) const {
    const LossHolder& holder = of_queries ? query_loss_ : loss_;
    return has_distributions ? &holder.of_distributions : &holder.loss;
  }

 private:
  // Checks a loss against the network, and has it point to its own numbers.
  void settle(LossHolder& holder) const {
    const std::size_t out = static_cast<std::size_t>(network_->out_features());
    if (holder.pos_weight.size() == 1) holder.pos_weight.assign(out, holder.pos_weight[0]);
    if (holder.weight.size() == 1 && !takes_labels(holder.loss))
      holder.weight.assign(out, holder.weight[0]);
    for (const auto* values : {&holder.weight, &holder.pos_weight})
      if (!values->empty() && values->size() != out)
        refuse("loss: expected a weight for each of " + std::to_string(out) + " outputs, got " +
               std::to_string(values->size()));
    if (network_->out_features() % outputs_per_target(holder.loss) != 0)
      refuse("loss: expected a multiple of " + std::to_string(outputs_per_target(holder.loss)) +
             " outputs, got " + std::to_string(out));
    holder.loss.levels = holder.levels.empty() ? nullptr : holder.levels.data();
    holder.loss.weight = holder.weight.empty() ? nullptr : holder.weight.data();
    holder.loss.pos_weight = holder.pos_weight.empty() ? nullptr : holder.pos_weight.data();
    holder.of_distributions = of_distributions(holder.loss);
  }

  std::shared_ptr<OwnedNetwork> owned_;
  const Network* network_;
  LossHolder loss_, query_loss_;
  Optimizer optimizer_;
  bool adapted_[kMaxTensors] = {};
  bool per_element_ = false;
  std::vector<int> groups_;
  const bool allows_tf32x3_;
  mutable std::atomic<bool> has_tf32x3_{false};
};

}  // namespace pymeta
