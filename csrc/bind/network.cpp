// Networks, losses and optimisers: descriptions made into what calls are made of.

#include "network.h"

#include <pybind11/stl.h>

#include <cmath>

#include "common.h"
#include "problem.h"

namespace pymeta {

std::vector<std::int64_t> parameter_sizes(const Network& network) {
  std::vector<std::int64_t> sizes;
  for (int t = 0; t < network.tensor_count; ++t)
    sizes.push_back(static_cast<std::int64_t>(network.tensors[t].rows) *
                    network.tensors[t].columns);
  return sizes;
}

namespace {

std::unique_ptr<LossHolder> make_loss(const std::string& kind, double delta, double label_smoothing,
                                      std::int64_t ignore_index, std::vector<double> weight,
                                      std::vector<double> pos_weight, std::vector<double> levels,
                                      double dof) {
  auto holder = std::make_unique<LossHolder>();
  Loss& loss = holder->loss;
  bool found = false;
  for_each_loss_spec([&](LossKind known, auto spec) {
    if (kind != spec.kName) return;
    loss.kind = known;
    loss.dof = dof;
    loss.constant = spec.constant(loss);
    found = true;
  });
  if (!found) refuse("loss: unknown kind '" + kind + "'");
  if (!(delta > 0)) refuse("loss: delta must be > 0");
  if (!(label_smoothing >= 0 && label_smoothing <= 1))
    refuse("loss: label_smoothing must be in 0..1");
  if (!(dof > 0) || !std::isfinite(dof)) refuse("loss: dof must be > 0");
  if (loss.kind == LossKind::quantile && levels.empty()) refuse("loss: levels must not be empty");
  if (loss.kind != LossKind::quantile && !levels.empty()) refuse("loss: only quantile has levels");
  for (const double level : levels)
    if (!(level > 0 && level < 1)) refuse("loss: levels must be in (0, 1)");
  if (levels.size() > 1 << 24) refuse("loss: more than 2^24 levels");
  loss.delta = delta;
  loss.label_smoothing = label_smoothing;
  loss.ignore_index = ignore_index;
  holder->weight = std::move(weight);
  holder->pos_weight = std::move(pos_weight);
  loss.level_count = levels.empty() ? 1 : static_cast<int>(levels.size());
  holder->levels = std::move(levels);
  return holder;
}

// ---- optimisers --------------------------------------------------------------------------------------------------

std::unique_ptr<Optimizer> make_optimizer(const std::string& kind, double momentum, bool nesterov,
                                          double beta1, double beta2, double eps, double alpha,
                                          bool centered, double weight_decay, bool decoupled,
                                          double clip_norm, double anchor, double anchor_rows) {
  auto made = std::make_unique<Optimizer>();
  if (kind == "adam")
    made->kind = OptimizerKind::adam;
  else if (kind == "rmsprop")
    made->kind = OptimizerKind::rmsprop;
  else if (kind != "sgd")
    refuse("optimizer: unknown kind '" + kind + "'");
  for (const double value : {momentum, eps, weight_decay, clip_norm, anchor, anchor_rows})
    if (!(value >= 0) || !std::isfinite(value))
      refuse("optimizer: expected finite numbers >= 0, got " + std::to_string(value));
  for (const double decay : {beta1, beta2, alpha})
    if (!(decay >= 0 && decay < 1))
      refuse("optimizer: betas and alpha must be in [0, 1), got " + std::to_string(decay));
  if (anchor != 0 && anchor_rows != 0) refuse("optimizer: expected one of anchor and anchor_rows");
  if (nesterov && momentum == 0) refuse("optimizer: nesterov needs a momentum");
  made->momentum = made->kind == OptimizerKind::adam ? 0 : momentum;
  made->nesterov = nesterov;
  made->beta1 = beta1;
  made->beta2 = beta2;
  made->eps = eps;
  made->alpha = alpha;
  made->centered = centered;
  made->weight_decay = weight_decay;
  made->decoupled = decoupled;
  made->clip_norm = clip_norm;
  made->anchor = anchor;
  made->anchor_rows = anchor_rows;
  return made;
}

}  // namespace

void bind_network(py::module_& m) {
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
      .def_property_readonly("statistics_size",
                             [](const OwnedNetwork& n) { return statistics_scalars(n.network); })
      .def_property_readonly("mixes_rows",
                             [](const OwnedNetwork& n) { return mixes_rows(n.network); })
      .def_property_readonly("parameter_shapes",
                             [](const OwnedNetwork& n) { return parameter_shapes(n.network); })
      .def_property_readonly("parameter_sizes",
                             [](const OwnedNetwork& n) { return parameter_sizes(n.network); });

  py::class_<LossHolder>(m, "Loss").def(
      py::init(&make_loss), py::arg("kind"), py::kw_only(), py::arg("delta") = 1.0,
      py::arg("label_smoothing") = 0.0, py::arg("ignore_index") = -100,
      py::arg("weight") = std::vector<double>{}, py::arg("pos_weight") = std::vector<double>{},
      py::arg("levels") = std::vector<double>{}, py::arg("dof") = 1.0);

  py::class_<Optimizer>(m, "Optimizer")
      .def(py::init(&make_optimizer), py::arg("kind"), py::kw_only(), py::arg("momentum") = 0.0,
           py::arg("nesterov") = false, py::arg("beta1") = 0.0, py::arg("beta2") = 0.0,
           py::arg("eps") = 0.0, py::arg("alpha") = 0.0, py::arg("centered") = false,
           py::arg("weight_decay") = 0.0, py::arg("decoupled") = false, py::arg("clip_norm") = 0.0,
           py::arg("anchor") = 0.0, py::arg("anchor_rows") = 0.0);
}

}  // namespace pymeta
