// The cell of a learned optimiser: its sizes and weights, a step, the way back through all steps.

#include "cell.h"

#include "../runtime/cell.h"

namespace py = pybind11;

namespace pymeta {
namespace {

struct CellParts {
  int dtype, hidden;
  std::int64_t tasks, coordinates;  // of all tasks
  double p;
  Address weights, gates;

  CellParts(int dtype, int hidden, std::int64_t tasks, std::int64_t coordinates, double p,
            Address weights, Address gates)
      : dtype(dtype),
        hidden(hidden),
        tasks(tasks),
        coordinates(coordinates),
        p(p),
        weights(weights),
        gates(gates) {
    with_real(dtype, [](auto) {});
    constexpr int widest = 1 << 12;
    if (hidden < 1 || hidden > widest)
      refuse("hidden: expected 1.." + std::to_string(widest) + ", got " + std::to_string(hidden));
    if (tasks < 1 || coordinates < tasks || coordinates % tasks != 0)
      refuse("coordinates: expected as many for each of " + std::to_string(tasks) + " tasks, got " +
             std::to_string(coordinates));
    if (!(p > 0 && p < 80)) refuse("p: expected a number between 0 and 80");
  }

  template <class Real>
  void describe(Cell<Real>& cell) const {
    cell.hidden = hidden;
    cell.coordinates = coordinates;
    cell.of_task = coordinates / tasks;
    cell.p = p;
    cell.weights = pointer<Real>(weights);
    cell.gates = pointer<Real>(gates);
  }
};

std::int64_t state_size(const CellParts& parts) {
  return with_real(parts.dtype, [&](auto real) -> std::int64_t {
    Cell<decltype(real)> cell;
    parts.describe(cell);
    return cell.state_size();
  });
}

void step(const CellParts& parts, Address gradients, Address losses, Address theta, Address state,
          Address out) {
  with_real(parts.dtype, [&](auto real) {
    using Real = decltype(real);
    CellStep<Real> call;
    parts.describe(call);
    call.gradients = pointer<Real>(gradients);
    call.losses = pointer<Real>(losses);
    call.theta = pointer<Real>(theta);
    call.state = pointer<Real>(state);
    call.out = pointer<Real>(out);
    run_interruptibly(call);
  });
}

void back(const CellParts& parts, int steps, Address gradients, Address losses, Address theta,
          Address flows, Address to_theta, Address to_weights, Address to_gates) {
  if (steps < 1) refuse("steps: expected at least 1, got " + std::to_string(steps));
  with_real(parts.dtype, [&](auto real) {
    using Real = decltype(real);
    CellBack<Real> call;
    parts.describe(call);
    call.steps = steps;
    call.gradients = pointer<Real>(gradients);
    call.losses = pointer<Real>(losses);
    call.theta = pointer<Real>(theta);
    call.flows = pointer<Real>(flows);
    call.to_theta = pointer<Real>(to_theta);
    call.to_weights = pointer<Real>(to_weights);
    call.to_gates = pointer<Real>(to_gates);
    run_interruptibly(call);
  });
}

}  // namespace

void bind_cell(py::module_& m) {
  py::class_<CellParts>(m, "Cell")
      .def(py::init<int, int, std::int64_t, std::int64_t, double, Address, Address>(),
           py::arg("dtype"), py::arg("hidden"), py::arg("tasks"), py::arg("coordinates"),
           py::arg("p"), py::arg("weights"), py::arg("gates"))
      .def_property_readonly("state_size", &state_size)
      .def("step", &step, py::arg("gradients"), py::arg("losses"), py::arg("theta"),
           py::arg("state"), py::arg("out"))
      .def("back", &back, py::arg("steps"), py::arg("gradients"), py::arg("losses"),
           py::arg("theta"), py::arg("flows"), py::arg("to_theta"), py::arg("to_weights"),
           py::arg("to_gates"));
}

}  // namespace pymeta
