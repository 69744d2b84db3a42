// Networks, data and calls for the native tests: a Setup describes a problem, a Problem runs it in one precision.
#pragma once

#include <cmath>
#include <limits>
#include <stdexcept>

#include "../core/losses/registry.h"
#include "../runtime/cores.h"
#include "../runtime/engine.h"
#include "../runtime/memory.h"
#include "../runtime/run.h"
#include "../runtime/threads.h"
#include "chain.h"
#include "checks.h"

namespace pymeta::testing {

enum class Form { uniform, padded, packed };
enum class Rates { one, groups, elements };

struct Setup {
  std::string name;
  Chain chain;
  LossKind loss = LossKind::mse;
  int tasks = 5, support = 6, query = 5;
  Form form = Form::uniform;
  Rates rates = Rates::one;
  bool weights = false;
  int steps = 2;
  bool first_order = false;
  bool input_gradients = true;
  bool rate_gradients = true;
  bool adapts_all = true;  // otherwise the first tensor stays as it is
  bool smooth = true;      // no kink between a finite difference's ends
  bool factored = false;
  double slower = 1;  // the learning rates are divided by it: nothing diverges
  Optimizer optimizer = {};
};

inline Optimizer sgd(double momentum, bool nesterov, double weight_decay, double clip_norm) {
  Optimizer o;
  o.momentum = momentum;
  o.nesterov = nesterov;
  o.weight_decay = weight_decay;
  o.clip_norm = clip_norm;
  return o;
}
// Smooth enough for finite differences: a large eps.
inline Optimizer adam(double beta1, double weight_decay, bool decoupled, double clip_norm) {
  Optimizer o;
  o.kind = OptimizerKind::adam;
  o.beta1 = beta1;
  o.beta2 = 0.95;
  o.eps = 0.02;
  o.weight_decay = weight_decay;
  o.decoupled = decoupled;
  o.clip_norm = clip_norm;
  return o;
}

inline Optimizer rmsprop(double momentum, bool centered, double weight_decay, double clip_norm) {
  Optimizer o;
  o.kind = OptimizerKind::rmsprop;
  o.alpha = 0.8;
  o.eps = 0.05;
  o.momentum = momentum;
  o.centered = centered;
  o.weight_decay = weight_decay;
  o.clip_norm = clip_norm;
  return o;
}

struct SideData {
  std::vector<double> x, y, weights;
  std::vector<std::int64_t> labels, starts, sizes;
  std::int64_t rows = 0;
};

// All numbers of a problem, in double.
struct Data {
  std::vector<std::vector<double>> parameters;
  std::vector<double> lr;
  int lr_rows = 1, lr_columns = 1;
  SideData support, query;

  // visit(array) for everything that a meta-gradient is taken of, in the order of Results::gradients().
  template <class Visitor>
  void inputs(bool with_rows, Visitor visit) {
    for (auto& p : parameters) visit(p);
    visit(lr);
    if (with_rows) visit(support.x), visit(query.x);
  }
};

inline SideData make_side(const Setup& setup, int rows, Random& random) {
  const Network& network = setup.chain.network();
  SideData side;
  side.rows = rows;
  const bool batch_norm = mixes_rows(network);
  std::int64_t total = 0;
  for (int t = 0; t < setup.tasks; ++t) {
    std::int64_t size = setup.form == Form::uniform ? rows : random.below(rows + 1);
    if (batch_norm && size < 3) size = size == 0 ? 0 : 3;
    side.sizes.push_back(size);
    side.starts.push_back(total);
    total += setup.form == Form::packed ? size : rows;
  }
  const std::size_t all = static_cast<std::size_t>(total);
  for (std::size_t i = 0; i < all * network.in_features(); ++i)
    side.x.push_back(2 * random.symmetric());
  for (std::size_t i = 0; i < all * network.out_features(); ++i) {
    const double y = random.symmetric();
    side.y.push_back(setup.loss == LossKind::bce_with_logits ? y > 0 : 2 * y);
  }
  for (std::size_t i = 0; i < all; ++i) {
    side.labels.push_back(random.below(network.out_features()));
    side.weights.push_back(random.below(4) == 0 ? 0 : random.uniform());
  }
  // At least two that count, where they are normalised by one another.
  for (std::size_t t = 0; batch_norm && t < side.sizes.size(); ++t)
    for (std::int64_t r = 0; r < 2 && r < side.sizes[t]; ++r)
      side.weights[static_cast<std::size_t>(side.starts[t] + r)] = 0.5;
  return side;
}

inline Data make_data(const Setup& setup, std::uint64_t seed) {
  Random random(seed);
  const Network& network = setup.chain.network();
  Data data;
  std::size_t adapted = 0;
  for (int t = 0; t < network.tensor_count; ++t) {
    const Tensor& shape = network.tensors[t];
    const std::size_t size = static_cast<std::size_t>(shape.rows) * shape.columns;
    const double scale = shape.matrix ? 1.7 / std::sqrt(shape.columns) : 0.5;
    std::vector<double> values(size);
    for (double& v : values)
      v = static_cast<float>(scale * random.symmetric() + !shape.matrix * 0.4);
    data.parameters.push_back(values);
    if (setup.adapts_all || t > 0) adapted += size;
  }
  data.lr_rows = setup.rates == Rates::one ? 1 : 2;
  data.lr_columns = setup.rates == Rates::one      ? 1
                    : setup.rates == Rates::groups ? 2
                                                   : static_cast<int>(adapted);
  data.lr.resize(static_cast<std::size_t>(data.lr_rows) * data.lr_columns);
  for (double& v : data.lr) v = static_cast<float>((0.02 + 0.1 * random.uniform()) / setup.slower);
  data.support = make_side(setup, setup.support, random);
  data.query = make_side(setup, setup.query, random);
  // Predictions alone have no weights: their statistics are those of all rows, and an Engine's first layer is factored.
  if (mixes_rows(network) || setup.factored)
    for (double& weight : data.query.weights) weight = weight > 0 ? weight : 0.5;
  return data;
}

// ---- calls -------------------------------------------------------------------------------------

template <class Real>
struct Side {
  Exact<Real> x, y, weights;
  Exact<std::int64_t> labels, starts, sizes;
  RowSet<Real> set;

  Side(const Setup& setup, const SideData& data)
      : x(Exact<Real>::of(data.x)),
        y(Exact<Real>::of(data.y)),
        weights(Exact<Real>::of(data.weights)),
        labels(Exact<std::int64_t>::of(data.labels)),
        starts(Exact<std::int64_t>::of(data.starts)),
        sizes(Exact<std::int64_t>::of(data.sizes)) {
    set.x = x.data();
    set.y =
        setup.loss == LossKind::cross_entropy ? static_cast<const void*>(labels.data()) : y.data();
    set.weights = setup.weights ? weights.data() : nullptr;
    set.rows = setup.form == Form::packed ? 0 : data.rows;
    set.starts = setup.form == Form::packed ? starts.data() : nullptr;
    set.sizes = setup.form == Form::uniform ? nullptr : sizes.data();
  }
};

// What the calls leave; what no task owns (padding) keeps the number it had.
template <class Real>
struct Results {
  static constexpr Real kUntouched = Real(12345);
  Exact<Real> losses, predictions, lr_gradient, xs_gradient, xq_gradient, predicted;
  Exact<Real> step_losses, train_curves, validation_curves;
  Exact<std::int64_t> best_epochs, epochs_run;
  Exact<std::int8_t> status;
  std::vector<Exact<Real>> gradients, adapted, differences, tuned;

  bool same_tasks(const Results& other) const {
    bool same = losses.same_bits(other.losses) && predictions.same_bits(other.predictions);
    for (std::size_t t = 0; t < adapted.size(); ++t)
      same = same && adapted[t].same_bits(other.adapted[t]) && tuned[t].same_bits(other.tuned[t]);
    same = same && step_losses.same_bits(other.step_losses) && status.same_bits(other.status) &&
           train_curves.same_bits(other.train_curves) &&
           validation_curves.same_bits(other.validation_curves) &&
           best_epochs.same_bits(other.best_epochs) && epochs_run.same_bits(other.epochs_run);
    return same && xs_gradient.same_bits(other.xs_gradient) &&
           xq_gradient.same_bits(other.xq_gradient);
  }
  bool same_gradients(const Results& other) const {
    bool same = lr_gradient.same_bits(other.lr_gradient);
    for (std::size_t t = 0; t < gradients.size(); ++t)
      same = same && gradients[t].same_bits(other.gradients[t]) &&
             differences[t].same_bits(other.differences[t]);
    return same;
  }
  // visit(name, array) for all that are numbers.
  template <class Visitor>
  void numbers(Visitor visit) const {
    visit("losses", losses), visit("predictions", predictions), visit("predicted", predicted);
    visit("lr gradient", lr_gradient), visit("xs gradient", xs_gradient);
    visit("xq gradient", xq_gradient), visit("step losses", step_losses);
    visit("train curves", train_curves), visit("validation curves", validation_curves);
    for (const auto* group : {&gradients, &adapted, &differences, &tuned})
      for (std::size_t t = 0; t < group->size(); ++t)
        visit(group == &gradients     ? "gradient"
              : group == &adapted     ? "adapted"
              : group == &differences ? "difference"
                                      : "tuned",
              (*group)[t]);
  }
  double loss() const {
    double sum = 0;
    for (std::size_t t = 0; t < losses.size(); ++t) sum += static_cast<double>(losses[t]);
    return losses.size() ? sum / static_cast<double>(losses.size()) : 0;
  }
};

template <class Real>
using Runner = std::function<void(Call<Real>&)>;

template <class Real>
void run_as_usual(Call<Real>& call) {
  run(call);
}

// A problem in one precision, ready to be called any number of times.
template <class Real>
class Problem {
 public:
  Problem(const Setup& setup, const Data& data)
      : setup_(setup),
        network_(std::make_unique<OwnedNetwork>(setup.chain.network())),
        lr_(Exact<Real>::of(data.lr)),
        support(setup, data.support),
        query(setup, data.query),
        lr_rows_(data.lr_rows),
        lr_columns_(data.lr_columns) {
    for (const auto& p : data.parameters) parameters_.push_back(Exact<Real>::of(p));
    loss_.kind = setup.loss;
    loss_.label_smoothing = setup.loss == LossKind::cross_entropy ? 0.125 : 0;
    loss_.delta = 0.75;
    for (int t = 0; t < network_->network.tensor_count; ++t) {
      adapted_[t] = setup.adapts_all || t > 0;
      groups_[t] = setup.rates == Rates::groups ? t % 2 : 0;
    }
  }

  Results<Real> results(const Runner<Real>& runner = run_as_usual<Real>) {
    const Real untouched = Results<Real>::kUntouched;
    Results<Real> r;
    r.losses = Exact<Real>(static_cast<std::size_t>(setup_.tasks), untouched);
    r.predictions = Exact<Real>(query.y.size(), untouched);
    r.predicted = Exact<Real>(query.y.size(), untouched);
    r.lr_gradient = Exact<Real>(lr_.size(), untouched);
    if (setup_.input_gradients) {
      r.xs_gradient = Exact<Real>(support.x.size(), untouched);
      r.xq_gradient = Exact<Real>(query.x.size(), untouched);
    }
    const std::size_t tasks = static_cast<std::size_t>(setup_.tasks);
    r.step_losses = Exact<Real>(tasks, untouched);
    r.train_curves = Exact<Real>(tasks * kEpochs, untouched);
    r.validation_curves = Exact<Real>(tasks * (kEpochs + 1), untouched);
    r.best_epochs = Exact<std::int64_t>(tasks, -1);
    r.epochs_run = Exact<std::int64_t>(tasks, -1);
    r.status = Exact<std::int8_t>(tasks, 7);
    std::vector<Real*> gradients, adapted, differences, tuned;
    for (const auto& p : parameters_) {
      r.gradients.emplace_back(p.size(), untouched);
      r.differences.emplace_back(p.size(), untouched);
      r.adapted.emplace_back(p.size() * setup_.tasks, untouched);
      r.tuned.emplace_back(p.size() * setup_.tasks, untouched);
    }
    for (std::size_t t = 0; t < parameters_.size(); ++t) {
      gradients.push_back(r.gradients[t].data());
      differences.push_back(r.differences[t].data());
      adapted.push_back(adapted_[t] ? r.adapted[t].data() : nullptr);
      tuned.push_back(adapted_[t] ? r.tuned[t].data() : nullptr);
    }
    meta_gradient(r, gradients.data(), runner);
    adapt(adapted.data(), runner);
    predict(adapted, r.predicted, runner);
    reptile(r, differences.data(), runner);
    fine_tune(r, adapted, tuned.data(), runner);
    return r;
  }

  // Whether an Engine predicts one task's query rows as the meta-gradient's call did.
  bool engine_agrees(const Engine<Real>& engine, std::int64_t task,
                     const Results<Real>& wanted) const {
    const int rows = support.set.size(task), query_rows = query.set.size(task);
    const int in = network_->network.in_features(), out = network_->network.out_features();
    const std::int64_t s = support.set.start(task), q = query.set.start(task);
    Exact<Real> got(static_cast<std::size_t>(query_rows) * out, Results<Real>::kUntouched);
    const void* ys = setup_.loss == LossKind::cross_entropy
                         ? static_cast<const void*>(support.labels.data() + s)
                         : support.y.data() + s * out;
    engine.adapt_predict(support.x.data() + s * in, ys,
                         setup_.weights ? support.weights.data() + s : nullptr, rows,
                         query.x.data() + q * in, query_rows, got.data(), {});
    return std::memcmp(got.data(), wanted.predictions.data() + q * out,
                       got.size() * sizeof(Real)) == 0;
  }
  std::unique_ptr<Engine<Real>> engine() const { return std::make_unique<Engine<Real>>(call()); }

  Side<Real>& support_side() { return support; }

 private:
  Call<Real> call() const {
    pointers_.clear();
    for (const auto& p : parameters_) pointers_.push_back(p.data());
    Call<Real> c;
    c.network = &network_->network;
    c.loss = &loss_;
    c.adapted = adapted_;
    c.parameters = pointers_.data();
    c.lr = {lr_.data(), lr_rows_, lr_columns_, setup_.rates == Rates::elements, groups_};
    c.optimizer = setup_.optimizer;
    c.steps = setup_.steps;
    c.first_order = setup_.first_order;
    c.tasks = setup_.tasks;
    return c;
  }
  void meta_gradient(Results<Real>& r, Real* const* gradients, const Runner<Real>& runner) {
    Call<Real> c = call();
    c.support = support.set;
    c.query = query.set;
    c.losses = r.losses.data();
    c.predictions = r.predictions.data();
    c.gradients = gradients;
    if (setup_.rate_gradients) c.lr_gradient = r.lr_gradient.data();
    if (setup_.input_gradients) {
      c.xs_gradient = r.xs_gradient.data();
      c.xq_gradient = r.xq_gradient.data();
    }
    runner(c);
  }
  void adapt(Real* const* adapted, const Runner<Real>& runner) {
    Call<Real> c = call();
    c.support = support.set;
    c.adapted_parameters = adapted;
    c.job = Job::adapt;
    runner(c);
  }
  void reptile(Results<Real>& r, Real* const* differences, const Runner<Real>& runner) {
    Call<Real> c = call();
    c.support = support.set;
    c.batches = {batch(), 11, 12, nullptr};
    c.job = Job::reptile;
    c.losses = r.step_losses.data();
    c.gradients = differences;
    runner(c);
  }
  // From the tasks' adapted parameters on, with the query set to validate by.
  void fine_tune(Results<Real>& r, const std::vector<Real*>& starts, Real* const* tuned,
                 const Runner<Real>& runner) {
    Call<Real> c = call();
    for (std::size_t t = 0; t < starts.size(); ++t)
      if (starts[t]) pointers_[t] = starts[t];
    task_ids_ = Exact<std::int64_t>(static_cast<std::size_t>(setup_.tasks));
    for (int t = 0; t < setup_.tasks; ++t) task_ids_[static_cast<std::size_t>(t)] = 100 - t;
    c.parameter_per_task = adapted_;
    c.support = support.set;
    c.validation = query.set;
    c.optimizer.anchor = 0.125;
    c.epochs = kEpochs;
    c.patience = 1;
    c.batches = {batch(), 5, 0, task_ids_.data()};
    c.adapted_parameters = tuned;
    c.status = r.status.data();
    c.train_curves = r.train_curves.data();
    c.validation_curves = r.validation_curves.data();
    c.best_epochs = r.best_epochs.data();
    c.epochs_run = r.epochs_run.data();
    c.job = Job::fine_tune;
    runner(c);
  }
  void predict(const std::vector<Real*>& adapted, const Exact<Real>& predictions,
               const Runner<Real>& runner) {
    Call<Real> c = call();
    for (std::size_t t = 0; t < adapted.size(); ++t)
      if (adapted[t]) pointers_[t] = adapted[t];
    c.lr = {nullptr, 1, 0, false, groups_};
    c.optimizer = {};
    c.steps = 0;
    c.parameter_per_task = adapted_;
    c.query = query.set;
    c.query.y = nullptr;
    c.query.weights = nullptr;
    c.predictions = predictions.data();
    c.job = Job::predict;
    runner(c);
  }

  static constexpr int kEpochs = 3;
  // All rows where a minibatch of one could not be normalised.
  int batch() const { return mixes_rows(network_->network) ? 0 : 4; }

  const Setup& setup_;
  std::unique_ptr<OwnedNetwork> network_;
  Exact<std::int64_t> task_ids_;
  Loss loss_;
  bool adapted_[kMaxTensors] = {};
  int groups_[kMaxTensors] = {};
  std::vector<Exact<Real>> parameters_;
  mutable std::vector<const Real*> pointers_;
  Exact<Real> lr_;
  Side<Real> support, query;
  int lr_rows_, lr_columns_;
};

inline void run_alone(const Team&, std::int64_t count, IndexBody body, void* context) {
  for (std::int64_t i = 0; i < count; ++i) body(context, i, 0);
}

template <class Real>
const ExecutorTable<Real>& executor_named(const std::string& name) {
  const Kernels<Real>& table = kernels<Real>();
  for (int i = 0; i < table.executor_count; ++i)
    if (name == table.executors[i].name) return table.executors[i];
  throw std::invalid_argument(name);
}

// Cleared before use, and a multiple of 64.
struct Aligned {
  std::unique_ptr<char, decltype(&std::free)> data{nullptr, &std::free};

  explicit Aligned(std::size_t bytes, int content = 0xff) {
    bytes = bytes ? (bytes + 63) / 64 * 64 : 64;
    data.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
    std::memset(data.get(), content, bytes);
  }
};

// A plan of a call on one executor, and those that it is made of.
template <class Real>
struct PlanOf {
  std::vector<Aligned> memory;
  std::vector<void*> parts;
  const Needs* needs;

  PlanOf(const ExecutorTable<Real>& executor, const Call<Real>& call) {
    for (int i = 0; i < executor.made_of; ++i) add(kernels<Real>().executors[i], call);
    needs = add(executor, call);
  }
  void* plan() const { return memory.back().data.get(); }

 private:
  const Needs* add(const ExecutorTable<Real>& executor, const Call<Real>& call) {
    memory.emplace_back(executor.plan_bytes);
    const Needs* found = executor.plan(call, plan(), parts.data());
    parts.push_back(plan());
    return found;
  }
};

// A run on working memory of exactly the size asked for, every byte of it set before: to NaN.
template <class Real>
Runner<Real> on_dirty_memory(const std::string& name) {
  return [name](Call<Real>& call) {
    pymeta::check(call);
    const ExecutorTable<Real>& executor = executor_named<Real>(name);
    const PlanOf<Real> plan(executor, call);
    const Aligned memory(plan.needs->bytes(1));
    executor.run(plan.plan(), Team{1, nullptr, run_alone}, memory.data.get());
  };
}

inline void in_threads(int callers, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < callers; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

std::vector<Setup> setups();  // the problems that all tests run

}  // namespace pymeta::testing
