#include "call.h"

#include <algorithm>

#include "../runtime/device_plan.h"

namespace pymeta {
namespace {

Job job_of(const std::string& name) {
  if (name == "meta") return Job::meta;
  if (name == "adapt") return Job::adapt;  // by epochs where its schedule says so
  if (name == "reptile") return Job::reptile;
  if (name == "predict") return Job::predict;
  refuse("job: expected 'meta', 'adapt', 'reptile' or 'predict', got '" + name + "'");
}

// Sizes of tasks lie on the device: each may be as large as the set's rows say.
template <class Real>
void assume_largest(Call<Real>& call) {
  const auto largest = [](const RowSet<Real>& set) {
    if (0 > set.rows || set.rows > (1 << 24))
      refuse("rows: expected 0 to 2^24, got " + std::to_string(set.rows));
    return static_cast<int>(set.rows);
  };
  // Nor has anybody looked for rows that weigh nothing: the kernel does, where there may be some.
  for (RowSet<Real>* set : {&call.support, &call.query, &call.validation})
    set->has_weightless = set->weights || (set->y && takes_labels(call.loss_of(*set)));
  call.max_support = call.has_support() ? largest(call.support) : 0;
  call.max_query = call.has_query() ? largest(call.query) : 0;
  call.max_validation = call.validation.x ? largest(call.validation) : 0;
  if (call.steps_of(call.max_support) > kMostSteps)
    refuse("epochs: more than 2^30 inner steps for the largest task");
}

// Plans of the time before, or none.
template <class Real>
struct KeptPlans {
  std::optional<Plan<Real>> on_host;
  std::optional<DevicePlan<Real>> on_device;
};

template <class Real>
std::size_t execute(const Problem& problem, Call<Real>& call, KeptPlans<Real>& kept,
                    const MaybeDevice& device) {
  if (!device) {
    run_interruptibly(call, kept.on_host);
    return 0;
  }
  const ReleasedGil released;
  const auto& [ordinal, stream, workspace, bytes] = *device;
  assume_largest(call);
  std::optional<DevicePlan<Real>>& plan = kept.on_device;
  if (!plan || !plan->fits(ordinal, call)) plan.emplace(ordinal, call);
  if (workspace == 0 || bytes < plan->workspace_bytes()) return plan->workspace_bytes();
  try {
    plan->run(stream, pointer<char>(workspace), call);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error("cuda:" + std::to_string(ordinal) + ": " + error.what());
  }
  problem.note_products(ordinal, call);
  return plan->workspace_bytes();
}

template <class Real>
void put_gradients(const Problem& problem, const Gradients& gradients, Described<Real>& to) {
  to.call.gradients = nullptr;
  if (!gradients.parameters.empty()) {
    problem.put_pointers(gradients.parameters, "gradients.parameters", to.gradients);
    to.call.gradients = to.gradients.data();
  }
  to.call.lr_gradient = pointer<Real>(gradients.lr);
  to.call.xs_gradient = pointer<Real>(gradients.xs);
  to.call.xq_gradient = pointer<Real>(gradients.xq);
  to.call.ys_gradient = pointer<Real>(gradients.ys);
  to.call.yq_gradient = pointer<Real>(gradients.yq);
  to.call.support_weights_gradient = pointer<Real>(gradients.support_weights);
  to.call.query_weights_gradient = pointer<Real>(gradients.query_weights);
  to.call.anchors_gradient = pointer<Real>(gradients.anchors);
  to.call.support_offset_gradient = pointer<Real>(gradients.support_offset);
  to.call.query_offset_gradient = pointer<Real>(gradients.query_offset);
}

template <class Real>
void put_cotangents(const Problem& problem, const CotangentParts& cotangents, Described<Real>& to) {
  to.call.cotangents.losses = pointer<Real>(cotangents.losses);
  to.call.cotangents.predictions = pointer<Real>(cotangents.predictions);
  to.call.cotangents.step_losses = pointer<Real>(cotangents.step_losses);
  to.call.cotangents.adapted = nullptr;
  if (cotangents.adapted.empty()) return;
  problem.put_pointers(cotangents.adapted, "cotangents.adapted", to.cotangents);
  to.call.cotangents.adapted = to.cotangents.data();
}

template <class Real>
void check_meta(const Call<Real>& call) {
  if (call.batches.size > 0) refuse("schedule: a meta-gradient takes all rows");
  if (call.step_weights && call.steps == 0) refuse("step_weights: there are no steps");
  if ((call.ys_gradient && takes_labels(call.loss_of(call.support))) ||
      (call.yq_gradient && takes_labels(call.loss_of(call.query))))
    refuse("gradients: class labels have none");
  if ((call.support_weights_gradient && !call.support.weights) ||
      (call.query_weights_gradient && !call.query.weights))
    refuse("gradients: there are no row weights");
  if ((call.support_offset_gradient && !call.support.offset) ||
      (call.query_offset_gradient && !call.query.offset))
    refuse("gradients: there is no offset");
  if (call.cotangents.step_losses && !call.step_weights)
    refuse("cotangents: the losses of steps have no weights");
  if ((call.query_weights_gradient || call.yq_gradient || call.step_weights) && !call.query.y)
    refuse("gradients: without query targets there is no query loss");
}

template <class Real>
void put_results(const Problem& problem, const Results& results, Described<Real>& to) {
  Call<Real>& call = to.call;
  call.mean_loss = pointer<Real>(results.mean_loss);
  call.losses = pointer<Real>(results.losses);
  call.step_losses = pointer<Real>(results.step_losses);
  call.predictions = pointer<Real>(results.predictions);
  call.statistics = pointer<Real>(results.statistics);
  if (!results.adapted.empty()) {
    problem.put_pointers(results.adapted, "results.adapted", to.adapted);
    call.adapted_parameters = to.adapted.data();
  }
  call.status = pointer<std::int8_t>(results.status);
  call.train_curves = pointer<Real>(results.train_curves);
  call.validation_curves = pointer<Real>(results.validation_curves);
  call.best_epochs = pointer<std::int64_t>(results.best_epochs);
  call.epochs_run = pointer<std::int64_t>(results.epochs_run);
}

}  // namespace

template <class Real>
void put_schedule(const Schedule& schedule, Call<Real>& call) {
  if ((schedule.steps < 0) == (schedule.epochs < 0))
    refuse("schedule: expected either steps or epochs");
  if (schedule.batch_size < 0)
    refuse("schedule: batch_size " + std::to_string(schedule.batch_size));
  call.steps = std::max(schedule.steps, 0);
  call.epochs = std::max(schedule.epochs, 0);
  call.batches = {schedule.batch_size, schedule.seed, schedule.stream,
                  pointer<std::int64_t>(schedule.task_ids)};
  if (schedule.epochs < 0) return;
  if (call.job != Job::adapt) refuse("schedule: expected a number of steps");
  call.job = Job::fine_tune;
}
template void put_schedule(const Schedule&, Call<float>&);
template void put_schedule(const Schedule&, Call<double>&);

CallParts::CallParts(std::shared_ptr<const Problem> problem, int dtype, const std::string& job)
    : problem_(std::move(problem)), dtype_(dtype), job_(job_of(job)) {
  with_real(dtype, [](auto) { return 0; });
}

// With the loss that its targets are held against.
template <class Real>
RowSet<Real> CallParts::described_set(const Rows& rows, bool is_query) const {
  RowSet<Real> set = rows.set<Real>();
  set.keeps_weightless = set.keeps_weightless && job_ == Job::meta;  // whose weights have gradients
  set.loss = problem_->loss(is_query, rows.has_distributions);
  const int columns = target_columns(*set.loss, problem_->network().out_features());
  if (set.weight_columns != 1 && (set.weight_columns != columns || is_of_classes(*set.loss)))
    refuse("weight_columns: expected 1 or the " + std::to_string(columns) +
           " columns of targets, got " + std::to_string(set.weight_columns));
  return set;
}

template <class Real>
void CallParts::describe(Described<Real>& to) const {
  if (tasks < 0) refuse("tasks: expected at least 0, got " + std::to_string(tasks));
  const std::size_t tensors = static_cast<std::size_t>(problem_->network().tensor_count);
  problem_->put_pointers(start, "start", to.start);
  to.call = problem_->describe<Real>(
      to.start.data(),
      {pointer<Real>(rates.values), rates.rows, rates.columns, false, nullptr, rates.per_task});
  Call<Real>& call = to.call;
  call.job = job_;
  call.tasks = tasks;
  if (!own_starts.empty()) {
    if (own_starts.size() != tensors)
      refuse("own_starts: expected " + std::to_string(tensors) + " values, got " +
             std::to_string(own_starts.size()));
    std::copy(own_starts.begin(), own_starts.end(), to.own_starts);
    // Where no tensor has one, the call is like one without (families.h).
    if (std::find(own_starts.begin(), own_starts.end(), true) != own_starts.end())
      call.parameter_per_task = to.own_starts;
  }
  call.query = described_set<Real>(query, job_ == Job::meta);
  put_results(*problem_, results, to);
  if (job_ == Job::predict) {
    static const bool none[kMaxTensors] = {};
    static const int no_groups[kMaxTensors] = {};
    call.optimizer = {};
    call.lr.per_element = false;
    call.lr.groups = no_groups;
    call.adapted = none;
    call.query.y = nullptr;
    return;
  }
  if (!rates.values && problem_->adapted_elements() > 0) refuse("rates: expected values");
  put_schedule(schedule, call);
  call.first_order = first_order;
  call.patience = patience;
  call.anchors = pointer<Real>(anchors);
  call.support = described_set<Real>(support, false);
  if (validation) {
    if (call.job != Job::fine_tune) refuse("validation: needs epochs");
    call.validation = described_set<Real>(*validation, false);
  }
  call.step_weights = pointer<Real>(step_weights);
  call.by_support = by_support && job_ == Job::meta;
  if (!(task_clip >= 0)) refuse("task_clip: expected at least 0");
  call.task_clip = task_clip;
  if (gradients) put_gradients(*problem_, *gradients, to);
  if (cotangents) put_cotangents(*problem_, *cotangents, to);
}

std::size_t CallParts::run(const MaybeDevice& device) const {
  return with_real(dtype_, [&](auto real) {
    Described<decltype(real)> described;
    KeptPlans<decltype(real)> none;
    describe(described);
    if (job_ == Job::meta) check_meta(described.call);
    return execute(*problem_, described.call, none, device);
  });
}

class RepeatedCall::Kept {
 public:
  virtual ~Kept() = default;
  virtual std::size_t run(const OtherArrays& other, const MaybeDevice& device) = 0;
};

template <class Real>
class RepeatedCall::KeptOf : public Kept {
 public:
  explicit KeptOf(const CallParts& parts) : problem_(parts.problem()) {
    parts.describe(described_);
  }

  std::size_t run(const OtherArrays& other, const MaybeDevice& device) override {
    Call<Real>& call = described_.call;
    problem_.put_pointers(other.start, "start", described_.start);
    call.lr.values = pointer<Real>(other.rates);
    call.support.x = pointer<Real>(other.xs);
    call.support.y = pointer<void>(other.ys);
    call.query.x = pointer<Real>(other.xq);
    call.query.y = pointer<void>(other.yq);
    call.mean_loss = pointer<Real>(other.mean_loss);
    call.losses = pointer<Real>(other.losses);
    call.predictions = pointer<Real>(other.predictions);
    call.step_losses = pointer<Real>(other.step_losses);
    call.statistics = pointer<Real>(other.statistics);
    static const Gradients no_gradients;
    static const CotangentParts no_cotangents;
    put_gradients(problem_, other.gradients ? *other.gradients : no_gradients, described_);
    put_cotangents(problem_, other.cotangents ? *other.cotangents : no_cotangents, described_);
    check_meta(call);
    return execute(problem_, call, plans_, device);
  }

 private:
  const Problem& problem_;
  Described<Real> described_;
  KeptPlans<Real> plans_;  // of a call that stays where it is
};

RepeatedCall::RepeatedCall(const CallParts& parts) : parts_(parts) {
  if (parts.job() != Job::meta) refuse("call: expected one of job 'meta'");
  parts_.gradients.reset();
  parts_.cotangents.reset();
}

RepeatedCall::~RepeatedCall() { delete idle_.load(); }

std::unique_ptr<RepeatedCall::Kept> RepeatedCall::make_kept() const {
  return with_real(parts_.dtype(), [&](auto real) -> std::unique_ptr<Kept> {
    return std::make_unique<KeptOf<decltype(real)>>(parts_);
  });
}

std::size_t RepeatedCall::run(const OtherArrays& other, const MaybeDevice& device) {
  std::unique_ptr<Kept> kept(idle_.exchange(nullptr));
  if (!kept) kept = make_kept();
  const std::size_t bytes = kept->run(other, device);
  delete idle_.exchange(kept.release());  // another thread's; after an error none is kept
  return bytes;
}

void bind_parts(py::module_& m) {
  py::class_<Rows>(m, "Rows").def(
      py::init([](Address x, Address y, Address weights, std::int64_t rows, Address starts,
                  Address sizes, Address offset, int weight_columns, bool has_distributions,
                  bool keeps_weightless) {
        return Rows{x,
                    y,
                    weights,
                    rows,
                    starts,
                    sizes,
                    offset,
                    weight_columns,
                    has_distributions,
                    keeps_weightless};
      }),
      py::arg("x") = 0, py::arg("y") = 0, py::arg("weights") = 0, py::arg("rows") = 0,
      py::arg("starts") = 0, py::arg("sizes") = 0, py::arg("offset") = 0,
      py::arg("weight_columns") = 1, py::arg("has_distributions") = false,
      py::arg("keeps_weightless") = false);
  py::class_<Rates>(m, "Rates")
      .def(py::init([](Address values, int rows, int columns, bool per_task) {
             return Rates{values, rows, columns, per_task};
           }),
           py::arg("values"), py::arg("rows") = 1, py::arg("columns") = 1,
           py::arg("per_task") = false);
  py::class_<CotangentParts>(m, "Cotangents")
      .def(py::init([](Address losses, Address predictions, std::vector<Address> adapted,
                       Address step_losses) {
             return CotangentParts{losses, predictions, std::move(adapted), step_losses};
           }),
           py::arg("losses") = 0, py::arg("predictions") = 0,
           py::arg("adapted") = std::vector<Address>{}, py::arg("step_losses") = 0);
  py::class_<Schedule>(m, "Schedule")
      .def(py::init([](int steps, int epochs, int batch_size, std::uint64_t seed,
                       std::uint64_t stream, Address task_ids) {
             return Schedule{steps, epochs, batch_size, seed, stream, task_ids};
           }),
           py::arg("steps") = -1, py::arg("epochs") = -1, py::arg("batch_size") = 0,
           py::arg("seed") = 0, py::arg("stream") = 0, py::arg("task_ids") = 0);
  py::class_<Gradients>(m, "Gradients")
      .def(py::init([](std::vector<Address> parameters, Address lr, Address xs, Address xq,
                       Address ys, Address yq, Address support_weights, Address query_weights,
                       Address anchors, Address support_offset, Address query_offset) {
             return Gradients{std::move(parameters),
                              lr,
                              xs,
                              xq,
                              ys,
                              yq,
                              support_weights,
                              query_weights,
                              anchors,
                              support_offset,
                              query_offset};
           }),
           py::arg("parameters") = std::vector<Address>{}, py::arg("lr") = 0, py::arg("xs") = 0,
           py::arg("xq") = 0, py::arg("ys") = 0, py::arg("yq") = 0, py::arg("support_weights") = 0,
           py::arg("query_weights") = 0, py::arg("anchors") = 0, py::arg("support_offset") = 0,
           py::arg("query_offset") = 0);
  py::class_<Results>(m, "Results")
      .def(py::init<>())
      .def_readwrite("mean_loss", &Results::mean_loss)
      .def_readwrite("losses", &Results::losses)
      .def_readwrite("step_losses", &Results::step_losses)
      .def_readwrite("predictions", &Results::predictions)
      .def_readwrite("statistics", &Results::statistics)
      .def_readwrite("adapted", &Results::adapted)
      .def_readwrite("status", &Results::status)
      .def_readwrite("train_curves", &Results::train_curves)
      .def_readwrite("validation_curves", &Results::validation_curves)
      .def_readwrite("best_epochs", &Results::best_epochs)
      .def_readwrite("epochs_run", &Results::epochs_run);
}

// A part that may be absent. What is read is a copy: the part itself is gone where None or another one is put in its place.
template <class Part>
static void def_optional(py::class_<CallParts>& to, const char* name,
                         std::optional<Part> CallParts::* part) {
  to.def_property(
      name, [part](const CallParts& call) { return call.*part; },
      [part](CallParts& call, const std::optional<Part>& value) { call.*part = value; });
}

void bind_call(py::module_& m) {
  py::class_<CallParts> call(m, "Call");
  call.def(py::init<std::shared_ptr<const Problem>, int, const std::string&>(), py::arg("problem"),
           py::arg("dtype"), py::arg("job"))
      .def_readwrite("tasks", &CallParts::tasks)
      .def_readwrite("start", &CallParts::start)
      .def_readwrite("own_starts", &CallParts::own_starts)
      .def_readwrite("rates", &CallParts::rates)
      .def_readwrite("schedule", &CallParts::schedule)
      .def_readwrite("first_order", &CallParts::first_order)
      .def_readwrite("step_weights", &CallParts::step_weights)
      .def_readwrite("by_support", &CallParts::by_support)
      .def_readwrite("task_clip", &CallParts::task_clip)
      .def_readwrite("patience", &CallParts::patience)
      .def_readwrite("anchors", &CallParts::anchors)
      .def_readwrite("support", &CallParts::support)
      .def_readwrite("query", &CallParts::query)
      .def_readwrite("results", &CallParts::results)
      .def("run", &CallParts::run, py::arg("device") = py::none());
  def_optional(call, "validation", &CallParts::validation);
  def_optional(call, "gradients", &CallParts::gradients);
  def_optional(call, "cotangents", &CallParts::cotangents);
  py::class_<RepeatedCall>(m, "RepeatedCall")
      .def(py::init<const CallParts&>(), py::arg("call"))
      .def(
          "run",
          [](RepeatedCall& call, const std::vector<Address>& start, Address rates, Address xs,
             Address ys, Address xq, Address yq, Address mean_loss, Address losses,
             Address predictions, const Gradients* gradients, Address step_losses,
             Address statistics, const CotangentParts* cotangents, const MaybeDevice& device) {
            return call.run({start, rates, xs, ys, xq, yq, mean_loss, losses, predictions,
                             step_losses, statistics, gradients, cotangents},
                            device);
          },
          py::arg("start"), py::arg("rates"), py::arg("xs"), py::arg("ys"), py::arg("xq"),
          py::arg("yq"), py::arg("mean_loss"), py::arg("losses"), py::arg("predictions"),
          py::arg("gradients"), py::arg("step_losses") = 0, py::arg("statistics") = 0,
          py::arg("cotangents") = py::none(), py::arg("device") = py::none());
}

}  // namespace pymeta
