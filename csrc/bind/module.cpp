// The Python module pymeta._native: the only file that knows Python.
//
// Arrays come in as addresses (tensor.data_ptr(), 0 for none), so the module needs neither torch nor numpy. Shapes
// and dtypes were checked by the Python layer; what depends on the data is checked in runtime/check.cpp. See
// pymeta/_native.pyi for the signatures and their meaning.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../core/losses/registry.h"
#include "../core/call/shuffle.h"
#include "../cuda/device.h"
#include "../runtime/cores.h"
#include "../runtime/engine.h"
#include "../runtime/fork.h"
#include "../runtime/memory.h"
#include "../runtime/run.h"
#include "network.h"

namespace py = pybind11;

namespace pymeta {
namespace {

using Address = std::uintptr_t;
using RowsTuple = std::tuple<Address, Address, Address, std::int64_t, Address, Address>;
// steps, epochs (one of them -1), batch size (0: all rows), seed, stream, task ids
using ScheduleTuple = std::tuple<int, int, int, std::uint64_t, std::uint64_t, Address>;

// ordinal, stream, address and bytes of the workspace
using DeviceTuple = std::tuple<int, Address, Address, std::size_t>;
using MaybeDevice = std::optional<DeviceTuple>;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Lets other threads have the GIL meanwhile.
//
// A thread that wants it back while the interpreter exits never gets it: Python (before 3.14) ends the thread, which
// unwinds its stack, and neither a destructor nor an object that is released without the GIL survives that. So such a
// thread sleeps until the process is gone, as it does in later Pythons. py::gil_scoped_release would end the process.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  PyThreadState** state() { return &state_; }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

// Python runs the handlers of signals in its main thread; only there is a call asked whether one has come.
std::atomic<std::thread::id> main_thread;

void remember_main_thread() {
  const py::object main = py::module_::import("threading").attr("main_thread")();
  const bool is_here = main.attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
  if (is_here) main_thread = std::this_thread::get_id();
  // The thread that forks is the child's main thread.
  static const int registered =
      at_fork(nullptr, nullptr, [] { main_thread = std::this_thread::get_id(); });
  (void)registered;
}

// Has a signal come whose handler raised an exception? For a call that has let go of the GIL.
bool poll_signals(void* thread_state) {
  auto& state = *static_cast<PyThreadState**>(thread_state);
  PyEval_RestoreThread(state);
  const bool raised = PyErr_CheckSignals() != 0;
  state = PyEval_SaveThread();
  return raised;
}

// run(), during which other threads have the GIL, and which ends soon after a signal whose handler raises.
template <class Real>
void run_interruptibly(Call<Real>& call, Job job) {
  if (std::this_thread::get_id() != main_thread.load()) {
    const ReleasedGil released;
    run(call, job);
    return;
  }
  bool finished;
  {
    ReleasedGil released;
    Interrupt interrupt(poll_signals, released.state());
    finished = run(call, job, &interrupt);
  }
  if (!finished) throw py::error_already_set();
}

std::vector<std::int64_t> parameter_sizes(const Network& network) {
  std::vector<std::int64_t> sizes;
  for (int t = 0; t < network.tensor_count; ++t)
    sizes.push_back(static_cast<std::int64_t>(network.tensors[t].rows) *
                    network.tensors[t].columns);
  return sizes;
}

// ---- losses ------------------------------------------------------------------------------------------------------

struct LossHolder {
  Loss loss;
  std::vector<double> weight, pos_weight;
};

std::unique_ptr<LossHolder> make_loss(const std::string& kind, double delta, double label_smoothing,
                                      std::int64_t ignore_index, std::vector<double> weight,
                                      std::vector<double> pos_weight) {
  auto holder = std::make_unique<LossHolder>();
  Loss& loss = holder->loss;
  bool found = false;
  for_each_loss_spec([&](LossKind known, auto spec) {
    if (kind != spec.kName) return;
    loss.kind = known;
    found = true;
  });
  if (!found) refuse("loss: unknown kind '" + kind + "'");
  if (!(delta > 0)) refuse("loss: delta must be > 0");
  if (!(label_smoothing >= 0 && label_smoothing <= 1))
    refuse("loss: label_smoothing must be in 0..1");
  loss.delta = delta;
  loss.label_smoothing = label_smoothing;
  loss.ignore_index = ignore_index;
  holder->weight = std::move(weight);
  holder->pos_weight = std::move(pos_weight);
  return holder;
}

// ---- optimisers --------------------------------------------------------------------------------------------------

std::unique_ptr<Optimizer> make_optimizer(const std::string& kind, double momentum, bool nesterov,
                                          double beta1, double beta2, double eps,
                                          double weight_decay, bool decoupled, double clip_norm,
                                          double anchor) {
  auto made = std::make_unique<Optimizer>();
  if (kind == "adam")
    made->kind = OptimizerKind::adam;
  else if (kind != "sgd")
    refuse("optimizer: unknown kind '" + kind + "'");
  for (const double value : {momentum, eps, weight_decay, clip_norm, anchor})
    if (!(value >= 0) || !std::isfinite(value))
      refuse("optimizer: expected finite numbers >= 0, got " + std::to_string(value));
  for (const double beta : {beta1, beta2})
    if (!(beta >= 0 && beta < 1))
      refuse("optimizer: betas must be in [0, 1), got " + std::to_string(beta));
  if (nesterov && momentum == 0) refuse("optimizer: nesterov needs a momentum");
  made->momentum = made->kind == OptimizerKind::sgd ? momentum : 0;
  made->nesterov = nesterov;
  made->beta1 = beta1;
  made->beta2 = beta2;
  made->eps = eps;
  made->weight_decay = weight_decay;
  made->decoupled = decoupled;
  made->clip_norm = clip_norm;
  made->anchor = anchor;
  return made;
}

// ---- the problem -------------------------------------------------------------------------------------------------

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
      return execute(call, Job::meta, "meta_gradient", device);
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
        if (!call.by_epochs()) refuse("validation: needs epochs");
        call.validation = rows<Real>(*validation);
      }
      call.patience = patience;
      call.adapted_parameters = results.data();
      call.status = pointer<std::int8_t>(status);
      call.train_curves = pointer<Real>(train_curves);
      call.validation_curves = pointer<Real>(validation_curves);
      call.best_epochs = pointer<std::int64_t>(best_epochs);
      call.epochs_run = pointer<std::int64_t>(epochs_run);
      return execute(call, Job::adapt, "adapt", device);
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
      if (call.by_epochs()) refuse("schedule: expected a number of steps");
      call.support = rows<Real>(support);
      call.sums_differences = true;
      call.losses = pointer<Real>(losses);
      call.mean_loss = pointer<Real>(mean_loss);
      if (gradients) {
        sinks = pointers<Real>(*gradients, "gradients");
        call.gradients = sinks.data();
      }
      return execute(call, Job::adapt, "reptile", device);
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
      call.query.y = nullptr;
      call.predictions = pointer<Real>(predictions);
      return execute(call, Job::predict, "predict", device);
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
      call.sums_differences = job == "reptile";
      call.first_order = !second_order;
      call.max_support = support_rows;
      call.max_query = job == "meta" ? query_rows : 0;
      call.max_validation = validation_rows;
      if (validation_rows > 0) call.validation.x = &some;
      const Job kind = job == "meta" ? Job::meta : Job::adapt;
      if (device) {
        describe_blocks(*device, plan_on(*device, call, kind), result);
        return;
      }
      const Plan<Real> plan(call, kind);
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

  template <class Visitor>
  static auto with_real(int dtype, Visitor visit) -> decltype(visit(float{})) {
    if (dtype == 4) return visit(float{});
    if (dtype == 8) return visit(double{});
    refuse("dtype: expected 4 (float32) or 8 (float64), got " + std::to_string(dtype));
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
    call.epochs = epochs < 0 ? -1 : epochs;
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
  static std::size_t execute(Call<Real>& call, Job job, const char* name,
                             const MaybeDevice& device) {
    if (!device) {
      run_interruptibly(call, job);
      return 0;
    }
    const ReleasedGil released;
    const auto& [ordinal, stream, workspace, bytes] = *device;
    assume_largest(call, job);
    const BlockPlan plan = plan_on(ordinal, call, job);
    const std::size_t needed = plan.workspace_bytes;
    if (workspace == 0 || bytes < needed) return needed;
    try {
      run_on(ordinal, stream, pointer<char>(workspace), plan, call, job);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("cuda:" + std::to_string(ordinal) + ": " + name + ": " +
                               error.what());
    }
    return needed;
  }
  // Sizes of tasks lie on the device: each may be as large as the set's rows say.
  template <class Real>
  static void assume_largest(Call<Real>& call, Job job) {
    const auto largest = [](const RowSet<Real>& set) {
      if (0 > set.rows || set.rows > (1 << 24))
        refuse("rows: expected 0 to 2^24, got " + std::to_string(set.rows));
      return static_cast<int>(set.rows);
    };
    // Nor has anybody looked for rows that weigh nothing: the kernel does, where there may be some.
    const bool labels = takes_labels(*call.loss);
    for (RowSet<Real>* set : {&call.support, &call.query, &call.validation})
      set->has_weightless = set->weights || (labels && set->y);
    call.max_support = job == Job::predict ? 0 : largest(call.support);
    call.max_query = job == Job::adapt && !call.predictions ? 0 : largest(call.query);
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

// ---- one task at a time ------------------------------------------------------------------------------------------

// An array that the caller lends: C-contiguous, of a known item type.
class Lent {
 public:
  Lent(const char* name, const py::handle& array, bool writable) : name_(name) {
    const int flags = PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(array.ptr(), &view_, flags) == 0) return;
    PyErr_Clear();
    if (!PyObject_CheckBuffer(array.ptr()))
      throw py::type_error(std::string(name) + ": expected a numpy array, got " +
                           Py_TYPE(array.ptr())->tp_name);
    refuse(std::string(name) + ": expected a C-contiguous " + (writable ? "writable " : "") +
           "array");
  }
  ~Lent() { PyBuffer_Release(&view_); }
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;

  void* data() const { return view_.buf; }
  int dimensions() const { return view_.ndim; }
  Py_ssize_t size(int axis) const { return view_.shape[axis]; }

  void expect_type(const char* types, Py_ssize_t bytes, const char* expected) const {
    const char* format = view_.format ? view_.format : "B";
    if (*format == '=' || *format == '@' || *format == '<') ++format;
    const bool known =
        format[0] && !format[1] && std::string(types).find(*format) != std::string::npos;
    if (!known || view_.itemsize != bytes)
      throw py::type_error(std::string(name_) + ": expected " + expected + ", got items of type '" +
                           (view_.format ? view_.format : "B") + "'");
    if (view_.len > 0 && reinterpret_cast<Address>(view_.buf) % static_cast<Address>(bytes) != 0)
      refuse(std::string(name_) + ": expected an aligned array");
  }
  // [rows, columns], or [rows] where `flat`; -1: any number of rows.
  void expect_shape(Py_ssize_t rows, Py_ssize_t columns, bool flat) const {
    const bool fits = (view_.ndim == 2 && view_.shape[1] == columns) || (view_.ndim == 1 && flat);
    if (fits && (rows < 0 || view_.shape[0] == rows)) return;
    const std::string row = rows < 0 ? "rows" : std::to_string(rows);
    std::string got;
    for (int i = 0; i < view_.ndim; ++i) got += (i ? ", " : "") + std::to_string(view_.shape[i]);
    refuse(std::string(name_) + ": expected shape " +
           (columns > 0 ? "[" + row + ", " + std::to_string(columns) + "]" : "") +
           (columns > 0 && flat ? " or " : "") + (flat ? "[" + row + "]" : "") + ", got [" + got +
           "]");
  }

 private:
  const char* name_;
  Py_buffer view_;
};

class EngineHolder {
 public:
  template <class Real>
  explicit EngineHolder(std::unique_ptr<Engine<Real>> engine) {
    std::get<std::unique_ptr<Engine<Real>>>(engines_) = std::move(engine);
  }

  void adapt_predict(const py::object& xs, const py::object& ys, const py::object& xq,
                     const py::object& out, const py::object& weights) const {
    if (const auto& engine = std::get<0>(engines_)) return run(*engine, xs, ys, xq, out, weights);
    run(*std::get<1>(engines_), xs, ys, xq, out, weights);
  }

 private:
  template <class Real>
  static void run(const Engine<Real>& engine, const py::object& xs, const py::object& ys,
                  const py::object& xq, const py::object& out, const py::object& weights) {
    const char* const type = sizeof(Real) == 4 ? "f" : "d";
    const char* const expected = sizeof(Real) == 4 ? "float32" : "float64";
    const Lent x("xs", xs, false), y("ys", ys, false), q("xq", xq, false), o("out", out, true);
    for (const Lent* array : {&x, &q, &o}) array->expect_type(type, sizeof(Real), expected);
    x.expect_shape(-1, engine.in_features(), false);
    q.expect_shape(-1, engine.in_features(), false);
    const Py_ssize_t rows = x.size(0), query_rows = q.size(0);
    if (rows > (1 << 24)) refuse("xs: more than 2^24 rows");
    if (query_rows > (1 << 24)) refuse("xq: more than 2^24 rows");
    o.expect_shape(query_rows, engine.out_features(), false);
    if (engine.takes_labels()) {
      y.expect_type("lq", 8, "class indices (int64)");
      y.expect_shape(rows, 0, true);
    } else {
      y.expect_type(type, sizeof(Real), expected);
      y.expect_shape(rows, engine.out_features(), engine.out_features() == 1);
    }
    std::optional<Lent> w;
    if (!weights.is_none()) {
      w.emplace("weights", weights, false);
      w->expect_type(type, sizeof(Real), expected);
      w->expect_shape(rows, 0, true);
    }
    const ReleasedGil released;
    engine.adapt_predict(static_cast<const Real*>(x.data()), y.data(),
                         w ? static_cast<const Real*>(w->data()) : nullptr, static_cast<int>(rows),
                         static_cast<const Real*>(q.data()), static_cast<int>(query_rows),
                         static_cast<Real*>(o.data()));
  }

  std::tuple<std::unique_ptr<Engine<float>>, std::unique_ptr<Engine<double>>> engines_;
};

std::unique_ptr<EngineHolder> make_engine(const Problem& problem, int dtype,
                                          const std::vector<Address>& parameters, Address lr,
                                          int lr_rows, int lr_columns,
                                          const ScheduleTuple& schedule) {
  std::unique_ptr<EngineHolder> made;
  problem.with_recipe(dtype, parameters, lr, lr_rows, lr_columns, schedule, [&](const auto& call) {
    using Real = std::remove_const_t<std::remove_pointer_t<decltype(call.lr.values)>>;
    made = std::make_unique<EngineHolder>(std::make_unique<Engine<Real>>(call));
  });
  return made;
}

// ---- functions ---------------------------------------------------------------------------------------------------

// out: [sum of sizes] int64, the tasks' orders one behind the other (core/call/shuffle.h).
void shuffle_tasks(std::uint64_t seed, std::uint64_t stream, Address task_ids, std::uint64_t epoch,
                   std::uint64_t purpose, std::int64_t tasks, Address sizes, Address out) {
  const ReleasedGil released;
  const std::int64_t* ids = pointer<std::int64_t>(task_ids);
  std::int64_t* to = pointer<std::int64_t>(out);
  for (std::int64_t task = 0; task < tasks; ++task) {
    const std::int64_t rows = pointer<std::int64_t>(sizes)[task];
    const std::uint64_t id = ids ? static_cast<std::uint64_t>(ids[task]) : 0;
    shuffle(Draw{seed, stream, id, epoch, static_cast<Purpose>(purpose)}, static_cast<int>(rows),
            to);
    to += rows;
  }
}

py::list describe_devices() {
  py::list devices;
  for (int i = 0; i < device_count(); ++i) {
    const DeviceFacts& facts = device_facts(i);
    py::dict one;
    one["ordinal"] = i;
    one["name"] = facts.name;
    one["capability"] =
        std::to_string(facts.capability / 10) + "." + std::to_string(facts.capability % 10);
    one["multiprocessors"] = facts.multiprocessors;
    one["shared_bytes"] = facts.block_bytes;
    devices.append(one);
  }
  return devices;
}

}  // namespace
}  // namespace pymeta

// Without a GIL (CPython 3.14t) the module is as safe as it is while it has let go of it: problems, networks and engines
// do not change once made, the settings are atomics, the tables are built once, the pool and the block cache have locks.
PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  using namespace pymeta;
  m.doc() = "pymeta's native core; use it through the pymeta package.";
  m.attr("__version__") = PYMETA_VERSION;
  if (const std::string reason = no_isa_reason(); !reason.empty()) throw py::import_error(reason);
  remember_main_thread();

  m.def("layer_forms", &layer_forms);
  py::class_<OwnedNetwork, std::shared_ptr<OwnedNetwork>>(m, "Network")
      .def(py::init([](const std::vector<py::tuple>& layers) {
             return std::shared_ptr<OwnedNetwork>(make_network(layers));
           }),
           py::arg("layers"))
      .def_property_readonly("in_features",
                             [](const OwnedNetwork& n) { return n.network.in_features(); })
      .def_property_readonly("out_features",
                             [](const OwnedNetwork& n) { return n.network.out_features(); })
      .def_property_readonly("mixes_rows",
                             [](const OwnedNetwork& n) { return mixes_rows(n.network); })
      .def_property_readonly("parameter_shapes",
                             [](const OwnedNetwork& n) { return parameter_shapes(n.network); })
      .def_property_readonly("parameter_sizes",
                             [](const OwnedNetwork& n) { return parameter_sizes(n.network); });

  py::class_<LossHolder>(m, "Loss").def(
      py::init(&make_loss), py::arg("kind"), py::kw_only(), py::arg("delta") = 1.0,
      py::arg("label_smoothing") = 0.0, py::arg("ignore_index") = -100,
      py::arg("weight") = std::vector<double>{}, py::arg("pos_weight") = std::vector<double>{});

  py::class_<Optimizer>(m, "Optimizer")
      .def(py::init(&make_optimizer), py::arg("kind"), py::kw_only(), py::arg("momentum") = 0.0,
           py::arg("nesterov") = false, py::arg("beta1") = 0.0, py::arg("beta2") = 0.0,
           py::arg("eps") = 0.0, py::arg("weight_decay") = 0.0, py::arg("decoupled") = false,
           py::arg("clip_norm") = 0.0, py::arg("anchor") = 0.0);

  py::class_<Problem>(m, "Problem")
      .def(py::init<std::shared_ptr<OwnedNetwork>, const LossHolder&, const std::vector<bool>&,
                    const std::optional<std::vector<int>>&, const Optimizer*>(),
           py::arg("network"), py::arg("loss"), py::arg("adapted"),
           py::arg("lr_groups") = py::none(), py::arg("optimizer") = py::none())
      .def("meta_gradient", &Problem::meta_gradient, py::arg("dtype"), py::arg("parameters"),
           py::arg("lr"), py::arg("lr_rows"), py::arg("lr_columns"), py::arg("steps"),
           py::arg("first_order"), py::arg("tasks"), py::arg("support"), py::arg("query"),
           py::arg("losses"), py::arg("predictions"), py::arg("gradients"),
           py::arg("lr_gradient") = 0, py::arg("xs_gradient") = 0, py::arg("xq_gradient") = 0,
           py::arg("mean_loss") = 0, py::arg("device") = py::none())
      .def("adapt", &Problem::adapt, py::arg("dtype"), py::arg("parameters"), py::arg("per_task"),
           py::arg("lr"), py::arg("lr_rows"), py::arg("lr_columns"), py::arg("schedule"),
           py::arg("tasks"), py::arg("support"), py::arg("adapted"), py::kw_only(),
           py::arg("validation") = py::none(), py::arg("patience") = -1, py::arg("status") = 0,
           py::arg("train_curves") = 0, py::arg("validation_curves") = 0,
           py::arg("best_epochs") = 0, py::arg("epochs_run") = 0, py::arg("device") = py::none())
      .def("reptile", &Problem::reptile, py::arg("dtype"), py::arg("parameters"), py::arg("lr"),
           py::arg("lr_rows"), py::arg("lr_columns"), py::arg("schedule"), py::arg("tasks"),
           py::arg("support"), py::arg("losses"), py::arg("mean_loss"), py::arg("gradients"),
           py::arg("device") = py::none())
      .def("predict", &Problem::predict, py::arg("dtype"), py::arg("parameters"),
           py::arg("per_task"), py::arg("tasks"), py::arg("query"), py::arg("predictions"),
           py::arg("device") = py::none())
      .def("plan", &Problem::plan, py::arg("dtype"), py::arg("job"), py::arg("schedule"),
           py::arg("tasks"), py::arg("support_rows"), py::arg("query_rows") = 0,
           py::arg("validation_rows") = 0, py::arg("second_order") = false,
           py::arg("device") = py::none())
      .def("unfit_for_device", &Problem::unfit_for_device);

  py::class_<EngineHolder>(m, "Engine")
      .def(py::init(&make_engine), py::arg("problem"), py::arg("dtype"), py::arg("parameters"),
           py::arg("lr"), py::arg("lr_rows"), py::arg("lr_columns"), py::arg("schedule"))
      .def("adapt_predict", &EngineHolder::adapt_predict, py::arg("xs"), py::arg("ys"),
           py::arg("xq"), py::arg("out"), py::arg("weights") = py::none());

  m.def("shuffle", &shuffle_tasks, py::arg("seed"), py::arg("stream"), py::arg("task_ids"),
        py::arg("epoch"), py::arg("purpose"), py::arg("tasks"), py::arg("sizes"), py::arg("out"));
  m.def("isas", &isas);
  m.def("isa", &isa);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("executor", &executor);
  m.def("set_executor", &set_executor, py::arg("name"));
  m.def("cuda_reason", [] {
    const std::string& reason = cuda_reason();
    return reason.empty() ? std::nullopt : std::optional(reason);
  });
  m.def("devices", &describe_devices);
  m.def("emulates", &emulates);
  m.def("block_threads", [] { return block_options().threads; });
  m.def(
      "set_block_threads", [](int n) { set_block_options({n, block_options().bytes}); },
      py::arg("n"));
  m.def("block_bytes", [] { return block_options().bytes; });
  m.def(
      "set_block_bytes", [](std::size_t n) { set_block_options({block_options().threads, n}); },
      py::arg("n"));
  m.def("free_memory", [] {
    const ReleasedGil released;
    return free_memory();
  });
  m.def("kept_bytes", &kept_bytes);
  m.def("set_kept_bytes", &set_kept_bytes, py::arg("n"));
  m.def("available_cores", &available_cores);
  m.def("cpu_quota", &cpu_quota, py::arg("root") = "");
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def(
      "fma_peak",
      [](const std::string& isa, int dtype, double seconds) {
        const ReleasedGil released;
        return fma_peak(isa, dtype == 8, seconds);
      },
      py::arg("isa"), py::arg("dtype"), py::arg("seconds"));
}
