// Tests of the native core without Python: what the sanitizers can look into.
//
// Every instruction set of this machine x executor x float and double x a few networks and forms of tasks:
//   - rows and lanes agree to the last bit on all that belongs to one task (but for a factored first layer, which
//     lanes does not have), and any number of threads gives the same bits, gradients among them;
//   - what working memory holds beforehand does not matter: kernels run once more on memory full of NaN, whose size
//     is exactly what they asked for;
//   - meta-gradients are the finite differences of the loss in double, and float is near double, through every
//     optimiser; so are Reptile's differences and fine-tuning with minibatches, validation and starts of each task's own;
//   - an Engine gives the bits of the same adaptation and prediction by ordinary calls, in any number of threads;
//   - the shuffle is numpy's Philox4x64 and Fisher and Yates';
//   - a task with NaN leaves the others alone; no tasks give zeros; bad data is refused.
// All inputs and outputs are heap arrays of exactly their size, so that AddressSanitizer sees a step over either end.
//   - an emulated block is near the CPU's executors in all of this, and its bits depend neither on its threads nor on how
//     much shared memory it has.
// `native_test pool` runs the tests of the thread pool alone, `native_test blocks` one pass of the emulated block (make
// sanitize: both under ThreadSanitizer).

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../core/call/shuffle.h"
#include "../core/layers/registry.h"
#include "../core/losses/registry.h"
#include "../cuda/device.h"
#include "../runtime/cores.h"
#include "../runtime/engine.h"
#include "../runtime/memory.h"
#include "../runtime/run.h"
#include "../runtime/threads.h"

// Counts what is allocated, for the promise that an Engine's calls of known sizes allocate nothing.
static std::atomic<long> allocations{0};
void* operator new(std::size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes ? bytes : 1)) return p;
  throw std::bad_alloc();
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(bytes ? bytes : 1);
}
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"  // these are a pair
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace pymeta {

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#else
constexpr bool kThreadSanitizer = false;
#endif

std::atomic<long> passed{0}, failed{0};

void check(bool holds, const std::string& what, int line) {
  if (holds) {
    ++passed;
  } else if (++failed <= 40) {
    std::fprintf(stderr, "native_test.cpp:%d: FAILED %s\n", line, what.c_str());
  }
}
#define CHECK(holds, what) check((holds), (what), __LINE__)

// ---- arrays and random numbers -----------------------------------------------------------------

// A heap array of exactly n elements.
template <class T>
class Exact {
 public:
  Exact() : Exact(0) {}
  explicit Exact(std::size_t n, T value = T{}) : data_(new T[n]), size_(n) {
    std::fill(data_.get(), data_.get() + n, value);
  }
  template <class From>
  static Exact of(const std::vector<From>& values) {
    Exact result(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) result[i] = static_cast<T>(values[i]);
    return result;
  }
  T* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) const { return data_[i]; }
  bool same_bits(const Exact& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), size_ * sizeof(T)) == 0;
  }

 private:
  std::unique_ptr<T[]> data_;
  std::size_t size_;
};

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2654435761u + 12345) {}
  double uniform() {  // [0, 1), a float's worth of bits: the same number in both precisions
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state_ >> 40) / (1 << 24);
  }
  double symmetric() { return 2 * uniform() - 1; }
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(uniform() * static_cast<double>(n));
  }

 private:
  std::uint64_t state_;
};

// ---- networks and problems ---------------------------------------------------------------------

struct Chain {
  OwnedNetwork owned;

  const Network& network() const { return owned.network; }

  Chain& linear(int in, int out, bool bias = true) {
    Layer& layer = append(LayerKind::linear, in, out);
    layer.weight = tensor({out, in, true});
    if (bias) layer.bias = tensor({1, out, false});
    return *this;
  }
  Chain& norm(LayerKind kind, int features, double eps = 1e-3) {
    Layer& layer = append(kind, features, features);
    layer.eps = eps;
    layer.weight = tensor({1, features, false});
    layer.bias = tensor({1, features, false});
    return *this;
  }
  Chain& act(ActivationKind kind, double alpha = 0, double threshold = 0) {
    Layer* last = &owned.layers[network().layer_count - 1];
    if (last->activation.kind != ActivationKind::identity)
      last = &append(LayerKind::lone_activation, last->out.channels, last->out.channels);
    last->activation = {kind, alpha, threshold};
    return *this;
  }

 private:
  Layer& append(LayerKind kind, int in, int out) {
    Layer& layer = owned.layers[owned.network.layer_count++];
    layer = Layer{};
    layer.kind = kind;
    layer.in.channels = in;
    layer.out.channels = out;
    return layer;
  }
  int tensor(const Tensor& shape) {
    owned.tensors[owned.network.tensor_count] = shape;
    return owned.network.tensor_count++;
  }
};

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
  bool adapts_all = true;  // otherwise the first tensor stays as it is
  bool smooth = true;      // no kink between a finite difference's ends
  bool factored = false;
  Optimizer optimizer = {};
};

Optimizer sgd(double momentum, bool nesterov, double weight_decay, double clip_norm) {
  Optimizer o;
  o.momentum = momentum;
  o.nesterov = nesterov;
  o.weight_decay = weight_decay;
  o.clip_norm = clip_norm;
  return o;
}
// Smooth enough for finite differences: a large eps.
Optimizer adam(double beta1, double weight_decay, bool decoupled, double clip_norm) {
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

SideData make_side(const Setup& setup, int rows, Random& random) {
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

Data make_data(const Setup& setup, std::uint64_t seed) {
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
  for (double& v : data.lr) v = static_cast<float>(0.02 + 0.1 * random.uniform());
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
using Runner = std::function<void(Call<Real>&, Job)>;

template <class Real>
void run_as_usual(Call<Real>& call, Job job) {
  run(call, job);
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
                         query.x.data() + q * in, query_rows, got.data());
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
    c.lr_gradient = r.lr_gradient.data();
    if (setup_.input_gradients) {
      c.xs_gradient = r.xs_gradient.data();
      c.xq_gradient = r.xq_gradient.data();
    }
    runner(c, Job::meta);
  }
  void adapt(Real* const* adapted, const Runner<Real>& runner) {
    Call<Real> c = call();
    c.support = support.set;
    c.adapted_parameters = adapted;
    runner(c, Job::adapt);
  }
  void reptile(Results<Real>& r, Real* const* differences, const Runner<Real>& runner) {
    Call<Real> c = call();
    c.support = support.set;
    c.batches = {batch(), 11, 12, nullptr};
    c.sums_differences = true;
    c.losses = r.step_losses.data();
    c.gradients = differences;
    runner(c, Job::adapt);
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
    runner(c, Job::adapt);
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
    runner(c, Job::predict);
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

void run_alone(const Team&, std::int64_t count, IndexBody body, void* context) {
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

// A run on working memory of exactly the size asked for, every byte of it set before: to NaN.
template <class Real>
Runner<Real> on_dirty_memory(const std::string& name) {
  return [name](Call<Real>& call, Job job) {
    pymeta::check(call, job);
    const ExecutorTable<Real>& executor = executor_named<Real>(name);
    const Aligned plan(executor.plan_bytes);
    const Needs& needs = *executor.plan(call, job, nullptr, plan.data.get());
    const Aligned memory(needs.bytes(1));
    executor.run(plan.data.get(), Team{1, nullptr, run_alone}, memory.data.get());
  };
}

void in_threads(int callers, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < callers; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

// ---- the tests of the kernels ------------------------------------------------------------------

std::vector<Setup> setups() {
  using A = ActivationKind;
  using L = LayerKind;
  std::vector<Setup> all;
  Setup s;
  s.name = "regression";
  s.chain.linear(1, 40).act(A::relu).linear(40, 40).act(A::relu).linear(40, 1);
  s.tasks = 37, s.support = s.query = 10, s.smooth = false;
  all.push_back(s);

  s = Setup{};
  s.name = "batch norm";
  s.chain.linear(9, 17)
      .norm(L::batch_norm, 17)
      .act(A::relu)
      .linear(17, 8)
      .norm(L::batch_norm, 8)
      .act(A::tanh)
      .linear(8, 5);
  s.loss = LossKind::cross_entropy, s.form = Form::packed, s.weights = true, s.tasks = 19;
  s.rates = Rates::groups, s.smooth = false, s.optimizer = sgd(0.9, true, 0, 0.5);
  all.push_back(s);

  s = Setup{};
  s.name = "layer norm first";
  s.chain.norm(L::layer_norm, 6)
      .linear(6, 18, false)
      .act(A::gelu)
      .norm(L::layer_norm, 18)
      .act(A::silu)
      .linear(18, 3);
  s.loss = LossKind::bce_with_logits, s.form = Form::padded, s.rates = Rates::elements, s.steps = 3,
  s.tasks = 11, s.optimizer = adam(0.9, 0.1, false, 0);
  all.push_back(s);

  s = Setup{};
  s.name = "activations";
  s.chain.linear(3, 7)
      .act(A::elu, 1)
      .act(A::sigmoid)
      .linear(7, 7)
      .act(A::softplus, 1, 20)
      .act(A::gelu_tanh)
      .linear(7, 5)
      .act(A::tanh);
  s.loss = LossKind::huber, s.form = Form::packed, s.weights = true, s.first_order = true,
  s.tasks = 18, s.optimizer = sgd(0.5, false, 0.1, 0);
  all.push_back(s);

  s = Setup{};
  s.name = "one layer";
  s.chain.linear(5, 2);
  s.steps = 4, s.tasks = 33, s.adapts_all = false, s.form = Form::padded;
  s.optimizer = adam(0, 0.2, true, 0.75);
  all.push_back(s);

  s = Setup{};
  s.name = "momentum";
  s.chain.linear(3, 20).act(A::tanh).linear(20, 2);
  s.steps = 4, s.tasks = 21, s.form = Form::packed, s.optimizer = sgd(0.8, true, 0.05, 0.25);
  all.push_back(s);

  s = Setup{};
  s.name = "wide end";
  s.chain.linear(4, 3).act(A::leaky_relu, 0.1).linear(3, 70).act(A::relu);
  s.tasks = 17, s.smooth = false, s.steps = 1;
  all.push_back(s);

  s = Setup{};
  s.name = "no steps";
  s.chain.linear(4, 6).act(A::tanh).linear(6, 4);
  s.steps = 0, s.tasks = 3;
  all.push_back(s);

  s = Setup{};
  s.name = "factored";
  s.chain.linear(67, 18).act(A::tanh).linear(18, 3);
  s.loss = LossKind::cross_entropy, s.form = Form::packed, s.input_gradients = false,
  s.factored = true;
  s.support = 9, s.tasks = 21;
  all.push_back(s);

  s.name = "factored and not";
  s.support = 40, s.form = Form::padded, s.weights = true;
  all.push_back(s);
  return all;
}

// The meta-gradient along a random direction is the loss's central difference. Its error: h^2 times a third
// derivative, which the difference at 2h shows three times over, and the loss's rounding over h.
void check_finite_differences(const Setup& setup, const std::string& name) {
  Data data = make_data(setup, 1);
  const Results<double> r = Problem<double>(setup, data).results();
  Random random(2);
  std::vector<std::vector<double>> directions;
  data.inputs(setup.input_gradients, [&](std::vector<double>& v) {
    directions.emplace_back(v.size());
    for (double& d : directions.back()) d = random.symmetric();
  });
  std::vector<const Exact<double>*> gradients;
  for (const auto& g : r.gradients) gradients.push_back(&g);
  gradients.push_back(&r.lr_gradient);
  if (setup.input_gradients)
    gradients.push_back(&r.xs_gradient), gradients.push_back(&r.xq_gradient);
  double slope = 0;
  for (std::size_t a = 0; a < gradients.size(); ++a)
    for (std::size_t i = 0; i < gradients[a]->size(); ++i)
      if ((*gradients[a])[i] != Results<double>::kUntouched)
        slope += (*gradients[a])[i] * directions[a][i];
  const auto difference = [&](double h) {
    double ends[2];
    for (int end = 0; end < 2; ++end) {
      Data moved = data;
      std::size_t a = 0;
      moved.inputs(setup.input_gradients, [&](std::vector<double>& v) {
        for (std::size_t i = 0; i < v.size(); ++i) v[i] += (end ? h : -h) * directions[a][i];
        ++a;
      });
      ends[end] = Problem<double>(setup, moved).results().loss();
    }
    return (ends[1] - ends[0]) / (2 * h);
  };
  const double near = difference(1e-5), far = difference(2e-5);
  const double rounding =
      64 * std::numeric_limits<double>::epsilon() * (1 + std::fabs(r.loss())) / 1e-5;
  CHECK(std::fabs(slope - near) <= std::fabs(near - far) + rounding,
        name + ": gradient " + std::to_string(slope) + ", difference " + std::to_string(near));
  CHECK(std::fabs(slope) > 100 * rounding, name + ": the slope is too small to tell anything");
}

// Loosely: a thousand roundings of the largest number there is.
void check_float_is_near_double(const Setup& setup, const std::string& name) {
  const Data data = make_data(setup, 1);
  const Results<double> d = Problem<double>(setup, data).results();
  const Results<float> f = Problem<float>(setup, data).results();
  const auto near = [](const Exact<float>& a, const Exact<double>& b) {
    double largest = 0, error = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (b[i] != Results<double>::kUntouched) largest = std::max(largest, std::fabs(b[i]));
      const double off = std::fabs(static_cast<double>(a[i]) - b[i]);
      error = off <= error ? error : off;  // keeps a NaN
    }
    return error <= 1000 * std::numeric_limits<float>::epsilon() * largest;
  };
  CHECK(near(f.losses, d.losses), name + ": losses");
  CHECK(near(f.predictions, d.predictions), name + ": predictions");
  CHECK(near(f.lr_gradient, d.lr_gradient), name + ": lr gradient");
  for (std::size_t t = 0; t < f.gradients.size(); ++t)
    CHECK(near(f.gradients[t], d.gradients[t]), name + ": gradient " + std::to_string(t));
}

template <class Real>
void check_isolation(const Setup& setup, const std::string& name) {
  const Data data = make_data(setup, 3);
  Problem<Real> problem(setup, data);
  const Results<Real> before = problem.results();
  std::int64_t spoiled = setup.tasks / 2;
  while (spoiled + 1 < setup.tasks && data.support.sizes[static_cast<std::size_t>(spoiled)] == 0)
    ++spoiled;
  const std::size_t first = static_cast<std::size_t>(problem.support_side().set.start(spoiled)) *
                            static_cast<std::size_t>(setup.chain.network().in_features());
  if (first >= problem.support_side().x.size()) return;
  problem.support_side().x[first] = std::numeric_limits<Real>::quiet_NaN();
  const Results<Real> after = problem.results();
  bool same = true;
  for (std::int64_t t = 0; t < setup.tasks; ++t)
    same = same && (t == spoiled ||
                    std::memcmp(&before.losses[static_cast<std::size_t>(t)],
                                &after.losses[static_cast<std::size_t>(t)], sizeof(Real)) == 0);
  CHECK(same, name + ": a NaN reached other tasks");
}

template <class Real>
void check_no_tasks(Setup setup, const std::string& name) {
  setup.tasks = 0;
  const Results<Real> r = Problem<Real>(setup, make_data(setup, 1)).results();
  bool zero = true;
  for (const auto& g : r.gradients)
    for (std::size_t i = 0; i < g.size(); ++i) zero = zero && g[i] == 0;
  for (std::size_t i = 0; i < r.lr_gradient.size(); ++i) zero = zero && r.lr_gradient[i] == 0;
  CHECK(zero, name + ": the gradient of no tasks is not zero");
}

template <class Real>
void check_bits(const Setup& setup, const std::string& name) {
  Problem<Real> problem(setup, make_data(setup, 1));
  set_num_threads(1);
  set_executor("rows");
  const Results<Real> wanted = problem.results();
  for (const std::string executor : {"rows", "lanes"}) {
    const std::string here = name + " " + executor;
    set_executor(executor);
    set_num_threads(1);
    const Results<Real> one = problem.results();
    if (!setup.factored) CHECK(one.same_tasks(wanted), here + ": not the bits of rows");
    if (!setup.factored)
      CHECK(one.predicted.same_bits(one.predictions), here + ": predict is not the query pass");
    const Results<Real> dirty = problem.results(on_dirty_memory<Real>(executor));
    CHECK(dirty.predicted.same_bits(one.predicted),
          here + ": predict depends on what the memory held");
    // Ragged lanes are sorted by size in run() alone, so that sums over tasks differ.
    CHECK(dirty.same_tasks(one), here + ": depends on what the memory held");
    if (executor == "rows" || setup.form == Form::uniform)
      CHECK(dirty.same_gradients(one), here + ": gradients depend on what the memory held");
    for (int threads = 2; threads <= 4; ++threads) {
      set_num_threads(threads);
      const Results<Real> more = problem.results();
      CHECK(more.same_tasks(one) && more.same_gradients(one),
            here + ": other bits on " + std::to_string(threads) + " threads");
    }
    set_num_threads(2);
    check_isolation<Real>(setup, here);
  }
  set_executor("auto");
  const Results<Real> automatic = problem.results();
  CHECK(automatic.same_tasks(wanted), name + " auto: other bits");
}

// With fixed steps an Engine does what a meta-gradient's own adaptation and query pass do; what task it last had, or
// which thread asks, is nothing to it.
template <class Real>
void check_engine(const Setup& setup, const std::string& name) {
  set_executor("rows");
  set_num_threads(1);
  Problem<Real> problem(setup, make_data(setup, 1));
  const Results<Real> wanted = problem.results();
  const std::unique_ptr<Engine<Real>> engine = problem.engine();
  std::atomic<bool> same{true};
  in_threads(4, [&](int caller) {
    for (std::int64_t i = 0; i < setup.tasks; ++i)
      if (!problem.engine_agrees(*engine, (i + caller) % setup.tasks, wanted)) same = false;
  });
  CHECK(same, name + ": other bits than a call's");
  Exact<Real> x(static_cast<std::size_t>(6) * engine->in_features(), Real(0.5));
  Exact<Real> y(static_cast<std::size_t>(6) * engine->out_features(), Real(0));
  Exact<Real> out(y.size(), Real(0));
  Exact<std::int64_t> labels(6);
  const void* targets = engine->takes_labels() ? static_cast<const void*>(labels.data()) : y.data();
  const auto call = [&] {
    engine->adapt_predict(x.data(), targets, nullptr, 6, x.data(), 6, out.data());
  };
  call();
  const long before = allocations;
  for (int i = 0; i < 3; ++i) call();
  const long made = allocations - before;
  CHECK(made == 0, name + ": allocates in a call of a known size");
  set_executor("auto");
}

// The first words of numpy.random.Philox(key=[1, 2], counter=[0, 3, 4, 5]), and what shuffle() makes of them.
void check_shuffle() {
  const PhiloxBlock block = philox(Draw{1, 2, 4, 3, static_cast<Purpose>(5)}, 1);
  const std::uint64_t words[4] = {0x3a2521b7927bbb55, 0xafc7ff19479996f0, 0x37d95196e907db97,
                                  0x19dd01d453e1f915};
  CHECK(std::memcmp(block.word, words, sizeof words) == 0,
        "Philox4x64-10: other words than numpy's");
  int order[10];
  shuffle(Draw{1, 2, 4, 3, static_cast<Purpose>(5)}, 10, order);
  const int wanted[10] = {5, 7, 3, 4, 9, 8, 0, 1, 6, 2};
  CHECK(std::memcmp(order, wanted, sizeof wanted) == 0, "another order");
}

template <class Call>
bool refuses(Call call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void check_refusals() {
  Setup setup = setups()[1];
  const Data good = make_data(setup, 1);
  std::size_t row = 0;
  for (std::size_t t = 0; t < good.support.sizes.size(); ++t)
    if (good.support.sizes[t] > 0) row = static_cast<std::size_t>(good.support.starts[t]);
  const auto with = [&](auto change) {
    Data bad = good;
    change(bad);
    return refuses([&] { Problem<float>(setup, bad).results(); });
  };
  CHECK(!with([](Data&) {}), "good data is refused");
  CHECK(with([&](Data& d) { d.support.labels[row] = 5; }), "a label beyond the outputs");
  CHECK(with([&](Data& d) { d.support.labels[row] = -1; }), "a negative label");
  CHECK(with([&](Data& d) { d.support.weights[row] = -1; }), "a negative weight");
  CHECK(with([&](Data& d) { d.support.weights[row] = std::nan(""); }), "a weight of NaN");
  CHECK(with([&](Data& d) { d.query.sizes[0] = -1; }), "a negative size");
  CHECK(with([&](Data& d) { d.query.sizes[0] = 1; }), "one row under BatchNorm");
  Setup split = setups()[0];
  split.chain = Chain().linear(3, 4).norm(LayerKind::batch_norm, 4);
  split.support = 5;
  CHECK(refuses([&] {
          const Data data = make_data(split, 1);
          Problem<float>(split, data).results([](Call<float>& call, Job job) {
            if (job == Job::adapt && !call.by_epochs()) call.batches.size = 4;
            run(call, job);
          });
        }),
        "a minibatch of one row under BatchNorm");
  CHECK(refuses([] { set_isa("z80"); }), "an unknown instruction set");
  CHECK(refuses([] { set_executor("columns"); }), "an unknown executor");
  CHECK(refuses([] { set_num_threads(0); }), "no threads");
}

// ---- the tests of the block executor -----------------------------------------------------------

#ifdef PYMETA_HAS_EMULATOR

// On an emulated device, with memory of exactly the size asked for that holds NaN.
template <class Real>
void run_on_blocks(Call<Real>& call, Job job) {
  pymeta::check(call, job);
  const BlockPlan plan = plan_on(kEmulated, call, job);
  const std::size_t bytes = plan.workspace_bytes;
  std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::aligned_alloc(64, bytes ? bytes : 64)), &std::free);
  std::memset(memory.get(), 0xff, bytes);
  run_on(kEmulated, 0, memory.get(), plan, call, job);
}

// Loosely, as float is near double.
template <class Real>
void check_near_the_cpu(const Setup& setup, const std::string& name) {
  const Data data = make_data(setup, 1);
  const Results<Real> got = Problem<Real>(setup, data).results(run_on_blocks<Real>);
  const Results<double> wanted = Problem<double>(setup, data).results();
  std::vector<const Exact<double>*> all;
  wanted.numbers([&](const char*, const Exact<double>& b) { all.push_back(&b); });
  std::size_t next = 0;
  got.numbers([&](const char* what, const Exact<Real>& a) {
    const Exact<double>& b = *all[next++];
    double largest = 0, error = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (b[i] != Results<double>::kUntouched) largest = std::max(largest, std::fabs(b[i]));
      const double off = std::fabs(static_cast<double>(a[i]) - b[i]);
      error = off <= error ? error : off;  // keeps a NaN
    }
    CHECK(error <= 1000 * std::numeric_limits<Real>::epsilon() * largest,
          name + ": " + what + " is off by " + std::to_string(error / largest));
  });
  CHECK(got.best_epochs.same_bits(wanted.best_epochs) &&
            got.epochs_run.same_bits(wanted.epochs_run) && got.status.same_bits(wanted.status),
        name + ": epochs or status");
}

// Neither the number of threads nor where arrays lie changes a bit; nor does running again.
template <class Real>
void check_block_bits(const Setup& setup, const std::string& name) {
  const Data data = make_data(setup, 1);
  const auto with = [&](int threads, std::size_t bytes) {
    set_block_options({threads, bytes});
    Results<Real> r = Problem<Real>(setup, data).results(run_on_blocks<Real>);
    set_block_options({});
    return r;
  };
  const Results<Real> wanted = with(0, 0);
  for (const int threads : {1, 2, 3})
    for (const std::size_t bytes : {std::size_t{0}, std::size_t{12000}, std::size_t{22000}}) {
      if (threads == 2 && bytes == 0) continue;
      const Results<Real> got = with(threads, bytes);
      CHECK(got.same_tasks(wanted) && got.same_gradients(wanted),
            name + ": other bits with " + std::to_string(threads) + " threads, " +
                std::to_string(bytes) + " bytes of shared memory");
    }
}

void test_blocks(bool all) {
  for (Setup setup : setups()) {
    setup.tasks = 3;
    check_near_the_cpu<double>(setup, "block " + setup.name + " double");
    if (!all) continue;
    if (setup.smooth) check_near_the_cpu<float>(setup, "block " + setup.name + " float");
    check_block_bits<float>(setup, "block " + setup.name + " float");
    check_block_bits<double>(setup, "block " + setup.name + " double");
  }
}

#else
void test_blocks(bool) {}
#endif

// The chunks of a ragged call start with the longest; in what order their sums are added does not change.
template <class Real>
void check_longest_first(const std::string& executor) {
  Setup setup = setups()[0];
  setup.form = Form::packed;
  setup.tasks = 200;
  set_executor(executor);
  set_num_threads(3);
  Problem<Real> problem(setup, make_data(setup, 1));
  static std::vector<std::int64_t> rows_in_turn;
  static Call<Real>* running;
  problem.results([&](Call<Real>& call, Job job) {
    if (job != Job::meta) return;
    pymeta::check(call, job);
    Plan<Real> plan(call, job);
    plan.order();
    const Aligned memory(plan.needs().bytes(3));
    rows_in_turn.clear();
    running = &call;
    const auto record = [](const Team&, std::int64_t count, IndexBody body, void* context) {
      for (std::int64_t i = 0; i < count; ++i) {
        const std::vector<Real> before(running->losses, running->losses + running->tasks);
        body(context, i, 0);
        std::int64_t rows = 0;
        for (std::int64_t t = 0; t < running->tasks; ++t)
          if (running->losses[t] != before[static_cast<std::size_t>(t)])
            rows += running->support.size(t);
        if (rows > 0) rows_in_turn.push_back(rows);
      }
    };
    plan.run(Team{3, nullptr, record}, memory.data.get());
  });
  CHECK(rows_in_turn.size() > 3, executor + ": " + std::to_string(rows_in_turn.size()) + " chunks");
  CHECK(rows_in_turn.front() > rows_in_turn.back(), executor + ": the longest chunk is not first");
}

void test_kernels() {
  for (const std::string& each : isas()) {
    set_isa(each);
    for (const Setup& setup : setups()) {
      const std::string name = each + " " + setup.name;
      check_bits<float>(setup, name + " float");
      check_bits<double>(setup, name + " double");
      check_engine<float>(setup, name + " engine float");
      check_engine<double>(setup, name + " engine double");
      for (const char* choice : {"rows", "lanes"}) {
        set_executor(choice);
        if (setup.smooth && !setup.first_order)
          check_finite_differences(setup, name + " " + choice);
        if (setup.smooth) check_float_is_near_double(setup, name + " " + choice);
      }
      set_executor("auto");
    }
  }
  for (const std::string executor : {"rows", "lanes"}) check_longest_first<float>(executor);
  set_executor("auto");
  for (const std::string& each : isas()) {
    set_isa(each);
    for (const char* choice : {"rows", "lanes"}) {
      set_executor(choice);
      for (const Setup& setup : setups()) {
        check_no_tasks<float>(setup, each + " " + choice + " " + setup.name + " float");
        check_no_tasks<double>(setup, each + " " + choice + " " + setup.name + " double");
      }
    }
  }
  set_executor("auto");
  check_shuffle();
  check_refusals();
}

// ---- the tests of the pool ---------------------------------------------------------------------

// Every index exactly once, by workers that are within bounds and never the same at the same time.
void check_pool(int threads, std::int64_t count, const std::string& name) {
  struct Context {
    std::vector<std::atomic<int>> done;
    std::vector<std::atomic<int>> busy;
    std::atomic<bool> orderly{true};
    int threads;
  } context{std::vector<std::atomic<int>>(static_cast<std::size_t>(count)),
            std::vector<std::atomic<int>>(static_cast<std::size_t>(threads)),
            {},
            threads};
  context.orderly = true;
  parallel_for(
      threads, count,
      [](void* p, std::int64_t index, int worker) {
        Context& c = *static_cast<Context*>(p);
        if (worker < 0 || worker >= c.threads || c.busy[static_cast<std::size_t>(worker)]++ != 0)
          c.orderly = false;
        ++c.done[static_cast<std::size_t>(index)];
        --c.busy[static_cast<std::size_t>(worker)];
      },
      &context);
  bool once = true;
  for (const auto& d : context.done) once = once && d == 1;
  CHECK(once, name + ": an index was left out or done twice");
  CHECK(context.orderly, name + ": a worker out of bounds or twice at once");
}

// Calls inside calls: the inner ones find the pool taken and work alone.
void check_nested() {
  std::atomic<int> sum{0};
  parallel_for(
      3, 20,
      [](void* p, std::int64_t, int) {
        parallel_for(
            4, 30, [](void* q, std::int64_t, int) { ++*static_cast<std::atomic<int>*>(q); }, p);
      },
      &sum);
  CHECK(sum == 600, "nested: " + std::to_string(sum) + " of 600");
}

// Whole calls from many threads at once: the pool, the block cache and the kernels' sharing.
void check_concurrent_calls() {
  const std::vector<Setup> all = setups();
  set_num_threads(3);
  std::vector<Results<float>> wanted;
  for (const Setup& setup : all)
    wanted.push_back(Problem<float>(setup, make_data(setup, 1)).results());
  in_threads(6, [&](int caller) {
    for (int round = 0; round < 6; ++round) {
      const std::size_t i = static_cast<std::size_t>(caller + round) % all.size();
      const Results<float> got = Problem<float>(all[i], make_data(all[i], 1)).results();
      CHECK(got.same_tasks(wanted[i]) && got.same_gradients(wanted[i]),
            all[i].name + ": other bits among other callers");
    }
  });
}

// The pool was used before, its threads are not in the child; it makes its own.
void check_fork() {
  const Setup setup = setups()[0];
  const Data data = make_data(setup, 1);
  set_num_threads(4);
  const Results<float> wanted = Problem<float>(setup, data).results();
  for (int i = 0; i < 3; ++i) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
      bool same = true;
      for (int round = 0; round < 5; ++round) {
        const Results<float> got = Problem<float>(setup, data).results();
        same = same && got.same_tasks(wanted) && got.same_gradients(wanted);
      }
      _exit(same ? 0 : 1);
    }
    int status = 1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
              WEXITSTATUS(status) == 0,
          "a forked child: status " + std::to_string(status));
    const Results<float> again = Problem<float>(setup, data).results();
    CHECK(again.same_tasks(wanted) && again.same_gradients(wanted), "the parent after a fork");
  }
}

void test_pool(bool may_fork) {
  for (int threads = 1; threads <= 4; ++threads)
    for (const std::int64_t count : {0, 1, 2, 3, 7, 64, 1000})
      check_pool(threads, count,
                 std::to_string(threads) + " threads, " + std::to_string(count) + " indices");
  check_nested();
  in_threads(8, [](int caller) {
    for (int round = 0; round < 50; ++round)
      check_pool(1 + (caller + round) % 4, 1 + round % 20, "concurrent callers");
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the workers are asleep now
  check_pool(4, 100, "after a sleep");
  CHECK(available_cores() >= 1, "available cores");
  check_concurrent_calls();
  if (may_fork && !kThreadSanitizer) check_fork();  // it does not let a forked child start threads
}

}  // namespace
}  // namespace pymeta

// native_test [pool] [blocks] [no-fork]: only these; without forking, which user-mode emulators cannot do with threads.
int main(int argc, char** argv) {
  const auto given = [&](const char* word) {
    return std::any_of(argv + 1, argv + argc,
                       [&](const char* arg) { return std::strcmp(arg, word) == 0; });
  };
  const bool all = !given("pool") && !given("blocks");
  if (all) pymeta::test_kernels();
  if (all || given("blocks")) pymeta::test_blocks(all);
  if (all || given("pool")) pymeta::test_pool(!given("no-fork"));
  std::printf("%ld checks passed\n", pymeta::passed.load());
  if (pymeta::failed > 0) std::fprintf(stderr, "%ld checks FAILED\n", pymeta::failed.load());
  return pymeta::failed > 0 ? 1 : 0;
}
