// The networks and tasks that the tests run on, and their data at random.
#pragma once

#include <cmath>

#include "../core/layers/registry.h"
#include "../core/losses/registry.h"
#include "arrays.h"

namespace pymeta {

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
  for (double& v : data.lr) v = static_cast<float>(0.02 + 0.1 * random.uniform());
  data.support = make_side(setup, setup.support, random);
  data.query = make_side(setup, setup.query, random);
  // Predictions alone have no weights: their statistics are those of all rows, and an Engine's first layer is factored.
  if (mixes_rows(network) || setup.factored)
    for (double& weight : data.query.weights) weight = weight > 0 ? weight : 0.5;
  return data;
}

inline std::vector<Setup> setups() {
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

}  // namespace pymeta
