#include "problem.h"

#include "call.h"

namespace pymeta {
namespace {

void describe_blocks(int ordinal, const BlockPlan& plan, py::dict& result) {
  const DeviceFacts& facts = device_facts(ordinal);
  result["executor"] = "block";
  result["isa"] = ordinal == kEmulated ? facts.name : "sm_" + std::to_string(facts.capability);
  result["threads"] = plan.threads;
  result["blocks"] = plan.blocks;
  result["multiprocessors"] = facts.multiprocessors;
  result["block_bytes"] = plan.block_bytes;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["kept"] = plan.saves ? "workspace" : "shared";
  result["factored"] = false;
}

// Whether gradients are wanted: of the parameters, the learning rates, xs, xq, ys, yq, both sets' row weights, the anchors, and
// both sets' offsets.
using Wanted = std::array<bool, 11>;

template <class Real>
void put_wanted(const Wanted& wanted, Call<Real>& call, Real* const* somewhere, Real* some) {
  if (call.job != Job::meta && call.job != Job::reptile) return;
  if (wanted[0]) call.gradients = somewhere;
  if (wanted[1]) call.lr_gradient = some;
  if (wanted[2]) call.xs_gradient = some;
  if (wanted[3]) call.xq_gradient = some;
  if (wanted[4]) call.ys_gradient = some;
  if (wanted[5]) call.yq_gradient = some;
  if (wanted[6]) call.support_weights_gradient = some;
  if (wanted[7]) call.query_weights_gradient = some;
  if (wanted[8]) call.anchors_gradient = some;
  if (wanted[9]) call.support_offset_gradient = some;
  if (wanted[10]) call.query_offset_gradient = some;
}

// How a call of these sizes would run. `is_plain`: all tasks have as many rows, and nothing is asked for that is not said here.
py::dict plan_of(const Problem& problem, int dtype, const std::string& job,
                 const Schedule& schedule, std::int64_t tasks, int support_rows, int query_rows,
                 int validation_rows, bool second_order, int lr_rows, const Wanted& wanted,
                 bool has_anchors, bool is_plain, const std::optional<int>& device) {
  // No set has as many rows, no call as many tasks, and sizes are computed of them.
  constexpr int most_rows = 1 << 30;
  for (const int rows : {support_rows, query_rows, validation_rows})
    if (rows < 0 || rows > most_rows)
      refuse(
          "support_rows, query_rows, validation_rows: expected at least 0 and at most 2^30, got " +
          std::to_string(rows));
  constexpr std::int64_t most_tasks = std::int64_t{1} << 40;
  if (tasks < 0 || tasks > most_tasks)
    refuse("tasks: expected at least 0 and at most 2^40, got " + std::to_string(tasks));
  if (job != "meta" && job != "adapt" && job != "reptile")
    refuse("job: expected 'meta', 'adapt' or 'reptile', got '" + job + "'");
  py::dict result;
  with_real(dtype, [&](auto real) {
    using Real = decltype(real);
    const Real* start[kMaxTensors] = {};
    Real* none[kMaxTensors] = {};
    Real some{};
    const int columns = problem.per_element() ? problem.adapted_elements() : 1;
    Call<Real> call =
        problem.describe<Real>(start, {nullptr, lr_rows, columns, false, nullptr, false});
    call.tasks = tasks;
    call.job = job == "meta" ? Job::meta : job == "adapt" ? Job::adapt : Job::reptile;
    put_schedule(schedule, call);
    put_wanted(wanted, call, none, &some);
    if (has_anchors) call.anchors = &some;
    call.first_order = !second_order;
    call.max_support = support_rows;
    call.max_query = job == "meta" ? query_rows : 0;
    call.max_validation = validation_rows;
    if (validation_rows > 0) call.validation.x = &some;
    if (device) {
      describe_blocks(*device, plan_on(*device, call), result);
      return;
    }
    if (is_plain && call.job == Job::meta) {
      call.support.rows = support_rows, call.query.rows = query_rows;
      call.query.y = &some;
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

}  // namespace

void bind_problem(py::module_& m) {
  py::class_<Problem, std::shared_ptr<Problem>>(m, "Problem")
      .def(py::init<std::shared_ptr<OwnedNetwork>, const LossHolder&, const std::vector<bool>&,
                    const std::optional<std::vector<int>>&, const Optimizer*, const LossHolder*,
                    bool>(),
           py::arg("network"), py::arg("loss"), py::arg("adapted"),
           py::arg("lr_groups") = py::none(), py::arg("optimizer") = py::none(),
           py::arg("query_loss") = py::none(), py::arg("allows_tf32x3") = false)
      .def("plan", &plan_of, py::arg("dtype"), py::arg("job"), py::arg("schedule"),
           py::arg("tasks"), py::arg("support_rows"), py::arg("query_rows") = 0,
           py::arg("validation_rows") = 0, py::arg("second_order") = false, py::arg("lr_rows") = 1,
           py::arg("wanted") = Wanted{true}, py::arg("has_anchors") = false,
           py::arg("is_plain") = false, py::arg("device") = py::none())
      .def_property_readonly("has_tf32x3", &Problem::has_tf32x3)
      .def("unfit_for_device", &Problem::unfit_for_device);
}

}  // namespace pymeta
