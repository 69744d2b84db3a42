// Calls of chains with each option are lists of operations (cuda/operations.h), and have the bits of the kernel that runs the
// algorithms themselves; those that no list has go to that kernel.

#include "../runtime/device_plan.h"
#include "problem.h"
#include "tests.h"

namespace pymeta::testing {

#ifdef PYMETA_HAS_EMULATOR

namespace {

constexpr int kTasks = 4, kRows = 5, kQueries = 4, kSteps = 3, kInputs = 3, kOutputs = 2;

// A call with everything that an option may want, and all of its results.
template <class Real>
class OptionCall {
 public:
  explicit OptionCall(ActivationKind activation = ActivationKind::tanh) {
    chain_.linear(kInputs, 19).act(activation).linear(19, 20).act(ActivationKind::relu);
    chain_.linear(20, kOutputs);
    const Network& network = chain_.network();
    for (int t = 0; t < network.tensor_count; ++t) {
      const Tensor& shape = network.tensors[t];
      const std::size_t size = static_cast<std::size_t>(shape.rows) * shape.columns;
      elements += static_cast<int>(size);
      parameters_[t] = numbers(size, 0.6);
      own_starts[t] = numbers(size * kTasks, 0.6);
      adapted_cotangents[t] = numbers(size * kTasks, 0.1);
      starts[t] = parameters_[t].data();
      gradients[t] = result(size * kTasks);
      adapted[t] = result(size * kTasks);
      cotangents[t] = adapted_cotangents[t].data();
    }
    rates = numbers(static_cast<std::size_t>(kTasks) * kSteps * (elements + 1), 0.05);
    for (std::size_t i = 0; i < rates.size(); ++i) rates[i] = rates[i] < 0 ? -rates[i] : rates[i];
    loss_.kind = LossKind::huber;
    loss_.delta = 0.75;
    call.network = &network;
    call.loss = &loss_;
    call.adapted = all_;
    call.parameters = starts;
    call.tasks = kTasks;
    call.steps = kSteps;
    call.lr = {rates.data(), kSteps, 1, false, groups_};
    call.losses = result(kTasks);
    call.mean_loss = result(1);
    call.predictions = result(kTasks * kQueries * kOutputs);
    call.gradients = gradients;
    bind(call.support, kRows, 0);
    bind(call.query, kQueries, 1);
  }

  Real* result(std::size_t size) {
    results_.emplace_back(size, Results<Real>::kUntouched);
    return results_.back().data();
  }
  // As many as rates may be, whatever an option makes of them.
  Real* rates_gradient() { return result(rates.size()); }
  Real* array(std::size_t size, double scale = 1) {
    given_.push_back(numbers(size, scale));
    return given_.back().data();
  }
  Real* positive(std::size_t size) {
    Real* all = array(size);
    for (std::size_t i = 0; i < size; ++i) all[i] = std::fabs(all[i]);
    return all;
  }
  // Large inputs, and rates too far from 1 to be multiplied by last, but for that of the second step (core/optimizers/rates.h).
  void move_away_from_one() {
    const Real least = sizeof(Real) == sizeof(float) ? Real(0x1p-32) : Real(0x1p-256);
    const Real scale = 1 / std::sqrt(least);
    for (int i = 0; i < kTasks * kRows * kInputs; ++i) inputs_[0][i] *= scale;
    for (int i = 0; i < kTasks * kQueries * kInputs; ++i) inputs_[1][i] *= scale;
    for (Exact<Real>* first : {&parameters_[0], &own_starts[0]})
      for (std::size_t i = 0; i < first->size(); ++i) (*first)[i] /= scale;
    for (std::size_t i = 0; i < rates.size(); ++i) rates[i] = i == 1 ? least : rates[i] * least;
  }
  const Real* weights(int rows) {
    Real* all = positive(static_cast<std::size_t>(kTasks) * rows);
    for (int i = 1; i < kTasks * rows; i += 4) all[i] = 0;
    return all;
  }
  bool same_bits(const OptionCall& other) const {
    bool same = results_.size() == other.results_.size();
    for (std::size_t i = 0; same && i < results_.size(); ++i)
      same = results_[i].same_bits(other.results_[i]);
    return same;
  }
  // Is there a number in each result? NaN has the same bits everywhere.
  bool has_numbers() const {
    bool has = true;
    for (const Exact<Real>& each : results_) {
      bool own = false;
      for (std::size_t i = 0; i < each.size(); ++i) own = own || each[i] == each[i];
      has = has && own;
    }
    return has;
  }

  Call<Real> call;
  int elements = 0;
  Exact<Real> rates;
  const Real* starts[6];
  const Real* cotangents[6];
  Real* gradients[6];
  Real* adapted[6];
  Exact<Real> own_starts[6], adapted_cotangents[6];
  bool per_task[6] = {};
  int two_groups[6] = {0, 1, 0, 1, 0, 1};
  std::int64_t ids[kTasks] = {3, 1, 4, 1};
  std::int8_t status[kTasks] = {};

 private:
  Exact<Real> numbers(std::size_t size, double scale) {
    Exact<Real> result(size);
    for (std::size_t i = 0; i < size; ++i)
      result[i] = static_cast<Real>(scale * random_.symmetric());
    return result;
  }
  // The third task has no row in one of them.
  void bind(RowSet<Real>& set, int rows, int which) {
    for (int t = 0; t < kTasks; ++t) sizes_[which][t] = t == 2 ? which * rows : rows - t % 2;
    set.x = inputs_[which] = array(static_cast<std::size_t>(kTasks) * rows * kInputs);
    set.y = array(static_cast<std::size_t>(kTasks) * rows * kOutputs);
    set.rows = rows;
    set.sizes = sizes_[which];
  }

  Random random_{7};
  Chain chain_;
  Loss loss_;
  Exact<Real> parameters_[6];
  std::vector<Exact<Real>> results_, given_;
  std::int64_t sizes_[2][kTasks];
  Real* inputs_[2];
  bool all_[6] = {true, true, true, true, true, true};
  int groups_[6] = {};
};

template <class Real>
struct Option {
  const char* name;
  const char* family;
  void (*apply)(OptionCall<Real>&);
};

// A job that adapts, without a meta-gradient.
template <class Real>
void make(OptionCall<Real>& o, Job job) {
  o.call.job = job;
  o.call.gradients = nullptr;
  o.call.losses = o.call.mean_loss = nullptr;
  o.call.adapted_parameters = o.adapted;
}

// The first tensors are each task's own.
template <class Real>
void start_apart(OptionCall<Real>& o, int tensors) {
  for (int t = 0; t < tensors; ++t) o.per_task[t] = true, o.starts[t] = o.own_starts[t].data();
  o.call.parameter_per_task = o.per_task;
}

template <class Real>
std::vector<Option<Real>> options() {
  using O = OptionCall<Real>;
  return {
      {"plain", "plain", [](O&) {}},
      {"momentum", "chains", [](O& o) { o.call.optimizer = sgd(0.9, true, 0.1, 0); }},
      {"clip", "chains", [](O& o) { o.call.optimizer = sgd(0, false, 0, 0.05); }},
      {"adam, clip", "chains", [](O& o) { o.call.optimizer = adam(0.9, 0.1, true, 0.05); }},
      {"adam, first order", "chains",
       [](O& o) { o.call.optimizer = adam(0.9, 0.1, false, 0), o.call.first_order = true; }},
      {"rmsprop", "chains", [](O& o) { o.call.optimizer = rmsprop(0.5, true, 0, 0.05); }},
      {"rates' gradient", "chains", [](O& o) { o.call.lr_gradient = o.rates_gradient(); }},
      {"groups of rates", "chains",
       [](O& o) {
         o.call.lr.columns = 2, o.call.lr.groups = o.two_groups;
         o.call.optimizer = adam(0.9, 0, false, 0);
         o.call.lr_gradient = o.rates_gradient();
       }},
      {"a rate for each element", "chains",
       [](O& o) {
         o.call.lr = {o.rates.data(), kSteps, o.elements, true, o.call.lr.groups};
         o.call.lr_gradient = o.rates_gradient();
       }},
      {"a rate for each task", "chains", [](O& o) { o.call.lr.per_task = true; }},
      {"a rate for each task, its gradient", "every",
       [](O& o) { o.call.lr.per_task = true, o.call.lr_gradient = o.rates_gradient(); }},
      {"anchor", "chains", [](O& o) { o.call.optimizer.anchor = 0.3; }},
      {"anchor over rows, clip", "chains",
       [](O& o) { o.call.optimizer = sgd(0, false, 0, 0.05), o.call.optimizer.anchor_rows = 2; }},
      {"anchors' gradient", "chains",
       [](O& o) {
         o.call.anchors = o.positive(kTasks), o.call.anchors_gradient = o.result(kTasks);
       }},
      {"tasks clipped", "chains", [](O& o) { o.call.task_clip = 0.1; }},
      {"tasks clipped, rates' gradient", "every",
       [](O& o) { o.call.task_clip = 0.1, o.call.lr_gradient = o.rates_gradient(); }},
      {"starts of their own", "chains",
       [](O& o) {
         o.per_task[0] = o.per_task[3] = true;
         for (int t : {0, 3}) o.starts[t] = o.own_starts[t].data();
         o.call.parameter_per_task = o.per_task, o.call.task_clip = 0.1;
       }},
      {"cotangents", "chains",
       [](O& o) {
         o.call.cotangents.losses = o.array(kTasks);
         o.call.cotangents.predictions = o.array(kTasks * kQueries * kOutputs);
         o.call.cotangents.adapted = o.cotangents;
       }},
      {"cotangents without targets", "chains",
       [](O& o) {
         o.call.query.y = nullptr, o.call.losses = o.call.mean_loss = nullptr;
         o.call.cotangents.predictions = o.array(kTasks * kQueries * kOutputs);
       }},
      {"losses after each step", "chains",
       [](O& o) {
         o.call.step_weights = o.positive(kSteps);
         o.call.step_losses = o.result(kSteps * kTasks);
         o.call.optimizer = adam(0.9, 0.1, false, 0);
       }},
      {"losses after each step, cotangents", "chains",
       [](O& o) {
         o.call.step_weights = o.positive(kSteps);
         o.call.cotangents.losses = o.array(kTasks);
         o.call.cotangents.step_losses = o.array(kSteps * kTasks);
       }},
      {"losses after each step, no gradient", "chains",
       [](O& o) {
         o.call.step_weights = o.positive(kSteps), o.call.gradients = nullptr;
         o.call.step_losses = o.result(kSteps * kTasks);
       }},
      {"gradients to inputs", "chains",
       [](O& o) {
         o.call.xs_gradient = o.result(kTasks * kRows * kInputs);
         o.call.xq_gradient = o.result(kTasks * kQueries * kInputs);
       }},
      {"gradients to inputs, losses after each step", "every",
       [](O& o) {
         o.call.xs_gradient = o.result(kTasks * kRows * kInputs);
         o.call.step_weights = o.positive(kSteps);
       }},
      {"gradients to targets, weights, offsets", "chains",
       [](O& o) {
         o.call.support.weights = o.weights(kRows), o.call.query.weights = o.weights(kQueries);
         o.call.support.offset = o.array(kTasks * kRows * kOutputs);
         o.call.query.offset = o.array(kTasks * kQueries * kOutputs);
         o.call.ys_gradient = o.result(kTasks * kRows * kOutputs);
         o.call.yq_gradient = o.result(kTasks * kQueries * kOutputs);
         o.call.support_weights_gradient = o.result(kTasks * kRows);
         o.call.query_weights_gradient = o.result(kTasks * kQueries);
         o.call.support_offset_gradient = o.result(kTasks * kRows * kOutputs);
         o.call.query_offset_gradient = o.result(kTasks * kQueries * kOutputs);
         o.call.cotangents.losses = o.array(kTasks);
       }},
      {"weights, losses after each step", "chains",
       [](O& o) {
         o.call.query.weights = o.weights(kQueries);
         o.call.step_weights = o.positive(kSteps);
       }},
      {"weights", "plain",
       [](O& o) {
         o.call.support.weights = o.weights(kRows), o.call.query.weights = o.weights(kQueries);
       }},
      {"weights, no predictions", "plain",
       [](O& o) { o.call.query.weights = o.weights(kQueries), o.call.predictions = nullptr; }},
      {"weights, no gradient", "plain",
       [](O& o) { o.call.query.weights = o.weights(kQueries), o.call.gradients = nullptr; }},
      {"no row that counts", "plain",
       [](O& o) {
         Real* weights = o.positive(kTasks * kQueries);
         for (int i = 0; i < kTasks * kQueries; ++i) weights[i] *= i / kQueries % 2;
         o.call.query.weights = weights;
       }},
      {"adapting by weights", "plain",
       [](O& o) {
         make(o, Job::adapt);
         o.call.support.weights = o.weights(kRows);
       }},
      {"weights of single targets", "every",
       [](O& o) {
         o.call.support.weights = o.weights(kRows * kOutputs);
         o.call.support.weight_columns = kOutputs;
       }},
      {"adapting with a pull", "chains",
       [](O& o) {
         make(o, Job::adapt);
         o.call.optimizer = adam(0.9, 0.1, true, 0.05), o.call.optimizer.anchor = 0.3;
       }},
      {"reptile, tasks clipped, weights", "chains",
       [](O& o) {
         Real* const losses = o.call.losses;
         make(o, Job::reptile);
         o.call.losses = losses, o.call.gradients = o.gradients, o.call.task_clip = 0.1;
         o.call.support.weights = o.weights(kRows);
       }},
      {"fine-tuning in minibatches with a pull", "chains",
       [](O& o) {
         make(o, Job::fine_tune);
         o.call.epochs = 3, o.call.batches = {2, 5, 6, o.ids};
         o.call.anchors = o.positive(kTasks);
         o.call.optimizer = sgd(0.9, false, 0.1, 0.05);
         o.call.lr.rows = 1;
       }},
      {"adapting from starts of their own", "chains",
       [](O& o) {
         make(o, Job::adapt);
         start_apart(o, 6);
         o.call.status = o.status;
       }},
      {"fine-tuning, one tensor of their own", "every",
       [](O& o) {
         make(o, Job::fine_tune);
         o.call.epochs = 3, o.call.lr.rows = 1;
         start_apart(o, 1);
         o.call.status = o.status;
       }},
      {"predicting with weights of their own", "chains",
       [](O& o) {
         make(o, Job::predict);
         start_apart(o, 6);
         o.call.adapted_parameters = nullptr;
         o.call.query.y = nullptr, o.call.steps = 0;
       }},
      {"fine-tuning, curves", "every",
       [](O& o) {
         make(o, Job::fine_tune);
         o.call.epochs = 3, o.call.lr.rows = 1;
         o.call.train_curves = o.result(3 * kTasks);
       }},
  };
}

// By the first family that holds it, or by the last; twice, the second time by what the plan keeps.
template <class Real>
void run_from(int family, OptionCall<Real>& o, std::size_t bytes) {
  set_block_options({0, bytes, family});
  pymeta::check(o.call);
  DevicePlan<Real> plan(kEmulated, o.call);
  for (int i = 0; i < 2; ++i) {
    Exact<double> memory(plan.workspace_bytes() / sizeof(double) + 16);
    std::memset(memory.data(), 0xff, memory.size() * sizeof(double));
    char* at = reinterpret_cast<char*>(memory.data());
    at += (64 - reinterpret_cast<std::uintptr_t>(at) % 64) % 64;
    plan.run(0, at, o.call);
  }
}

template <class Real>
void check_options(const char* precision) {
  for (const Option<Real>& option : options<Real>())
    for (int i = 0; i < 4; ++i) {
      const std::size_t bytes = i % 2 ? 40000 : 0;
      const bool away = i >= 2;
      const std::string name =
          std::string("list ") + precision + ": " + option.name + (away ? ", far from one" : "");
      OptionCall<Real> listed, whole;
      if (away) listed.move_away_from_one(), whole.move_away_from_one();
      option.apply(listed), option.apply(whole);
      run_from(0, listed, bytes);
      const std::string family = family_on(kEmulated, listed.call);
      CHECK(family == option.family, name + " is of family " + family);
      run_from(2, whole, bytes);
      set_block_options({});
      CHECK(listed.has_numbers(), name + ": a result without any number");
      CHECK(whole.same_bits(listed), name + ": other bits than those of all calls");
    }
}

// Some options of a meta-gradient at once. Those that do not go together are refused before anything runs.
template <class Real>
void check_combinations(const char* precision) {
  using A = ActivationKind;
  const std::vector<Option<Real>> all = options<Real>();
  Random random(sizeof(Real));
  int listed_calls = 0;
  for (int draw = 0; draw < 60; ++draw) {
    const A activation = draw % 3 == 0 ? A::relu : draw % 3 == 1 ? A::gelu : A::silu;
    OptionCall<Real> listed(activation), whole(activation);
    if (draw % 4 >= 2) listed.move_away_from_one(), whole.move_away_from_one();
    std::string name = std::string("list ") + precision + ", together:";
    for (int i = 0; i < 3; ++i) {
      const Option<Real>& option =
          all[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(all.size())))];
      if (std::strcmp(option.family, "every") == 0 || std::strstr(option.name, "ing ") ||
          std::strstr(option.name, "reptile"))
        continue;
      option.apply(listed), option.apply(whole);
      name += std::string(" ") + option.name + ";";
    }
    listed.call.first_order = whole.call.first_order = draw % 5 == 4;
    try {
      pymeta::check(whole.call);
    } catch (const std::invalid_argument&) {
      continue;
    }
    run_from(0, listed, draw % 2 ? 40000 : 0);
    listed_calls += std::strcmp(family_on(kEmulated, listed.call), "chains") == 0;
    run_from(2, whole, draw % 2 ? 40000 : 0);
    set_block_options({});
    CHECK(whole.same_bits(listed), name + " other bits than those of all calls");
  }
  CHECK(listed_calls >= 30, "list: few combinations: " + std::to_string(listed_calls));
}

}  // namespace

void test_lists() {
  check_combinations<float>("float");
  check_combinations<double>("double");
  check_options<float>("float");
  check_options<double>("double");
}

#else
void test_lists() {}
#endif

}  // namespace pymeta::testing
