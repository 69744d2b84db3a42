#include "problem.h"

namespace pymeta {

void bind_problem(py::module_& m) {
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
}

}  // namespace pymeta
