// The problems that all native tests run: a few networks, losses, optimisers and forms of tasks.

#include "problem.h"

namespace pymeta::testing {

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
  s.name = "rmsprop";
  s.chain.linear(3, 9).act(A::tanh).linear(9, 2);
  s.steps = 4, s.tasks = 19, s.form = Form::packed, s.optimizer = rmsprop(0, false, 0.1, 0.5);
  all.push_back(s);

  s.name = "rmsprop, centered, with momentum";
  s.rates = Rates::elements, s.optimizer = rmsprop(0.5, true, 0, 0);
  all.push_back(s);

  const Window three{3, 3, 1, 1, 1, 1}, pairs{2, 2, 2, 2}, point{};
  s = Setup{};
  s.name = "images";
  const Window strided{2, 3, 2, 1, 1, 0, 2, 1};
  Window grouped{2, 1}, averaged{3, 3, 1, 1, 1, 1};
  grouped.groups = 3;
  s.chain.image({7, 6, 2})
      .conv(17, three, false)
      .norm(L::batch_norm, 17)
      .pool_norm(pairs)
      .conv(6, strided, false)
      .norm(L::batch_norm, 6)
      .act(A::tanh)
      .pool(L::max_pool2d, three)
      .conv(9, grouped)
      .act(A::silu)
      .pool(L::avg_pool2d, averaged)
      .flatten();
  s.chain.linear(s.chain.network().layers[s.chain.network().layer_count - 1].out.channels, 3);
  s.form = Form::padded, s.tasks = 18, s.support = 4, s.query = 3, s.smooth = false;
  all.push_back(s);

  s = Setup{};
  s.name = "layer norms of images";
  s.chain.image({5, 3, 3})
      .image_norm()
      .conv(18, pairs)
      .image_norm()
      .act(A::silu)
      .pool(L::adaptive_avg_pool2d, Window{2, 1, 2, 1})
      .flatten()
      .linear(18, 2);
  s.form = Form::packed, s.tasks = 17, s.support = 4, s.query = 3;
  all.push_back(s);

  s = Setup{};
  s.name = "sequences";
  const Window halves{1, 2, 1, 2}, around{1, 5, 1, 1, 0, 2};
  s.chain.image({1, 19, 5})
      .conv(17, Window{1, 3}, false)
      .act(A::tanh)
      .pool(L::max_pool1d, halves)
      .pool(L::avg_pool1d, around)
      .conv(33, Window{1, 3})
      .image_norm()
      .act(A::tanh)
      .pool(L::adaptive_max_pool1d, Window{1, 3, 1, 3})
      .flatten()
      .linear(66, 1);
  s.form = Form::padded, s.tasks = 17, s.support = 4, s.query = 3, s.smooth = false;
  all.push_back(s);

  s = Setup{};
  s.name = "3x3 convolutions of many channels";
  s.chain.image({9, 8, 16})
      .conv(17, three)
      .act(A::tanh)
      .conv(16, three, false)
      .norm(L::batch_norm, 16)
      .pool_norm(pairs)
      .flatten()
      .linear(16 * 4 * 4, 2);
  s.form = Form::padded, s.tasks = 17, s.support = 3, s.query = 2, s.smooth = false;
  s.slower = 16;
  all.push_back(s);

  s = Setup{};
  s.name = "parts of sequences";
  Window around_it, cut_off, every_second;
  around_it.left = 2, cut_off.left = -2, every_second.stride_x = 2;
  s.chain.image({1, 11, 4})
      .pool(L::zero_pad, around_it)
      .act(A::tanh)
      .conv(17, Window{1, 2})  // layer 2
      .pool(L::zero_pad, around_it)
      .conv(17, Window{1, 5})
      .combine(L::add, 2)
      .act(A::relu)
      .pool(L::slice, cut_off)
      .pool(L::slice, every_second)
      .flatten();
  s.chain.linear(s.chain.network().layers[s.chain.network().layer_count - 1].out.channels, 2);
  s.form = Form::padded, s.tasks = 17, s.support = 4, s.query = 3, s.smooth = false;
  s.slower = 16;
  all.push_back(s);

  s = Setup{};
  s.name = "residual block";
  s.chain.image({4, 3, 3})
      .conv(18, three)
      .act(A::tanh)
      .conv(5, three)  // layer 2
      .recall(0)
      .conv(5, point)
      .combine(L::add, 2)
      .act(A::silu)
      .pool(L::global_avg_pool2d, Window{4, 3})
      .flatten()
      .linear(5, 2);
  s.form = Form::packed, s.tasks = 17, s.support = 4, s.query = 3;
  all.push_back(s);

  s = Setup{};
  s.name = "gates and branches side by side";
  s.chain.image({3, 3, 5})
      .conv(6, three)  // 1
      .act(A::tanh)
      .recall(0)
      .conv(6, point)
      .act(A::sigmoid)
      .combine(L::multiply, 1)  // 4
      .pool(L::global_avg_pool2d, Window{3, 3})
      .act(A::silu)
      .combine(L::multiply, 4)  // 6
      .channels(1, 4)
      .concatenate(4, true)  // 8: 4 and 6
      .concatenate(0, false)
      .conv(19, point)  // 10
      .recall(8)
      .conv(19, point)
      .combine(L::multiply, 10)
      .flatten()
      .linear(19 * 9, 2);
  s.form = Form::padded, s.tasks = 17, s.support = 4, s.query = 3;
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

}  // namespace pymeta::testing
