// The inner optimiser: one step, and its vector-Jacobian product for the reverse sweep.
//
// Plain SGD with a learning rate for the whole network, for each group of tensors, or for each element:
//   step      theta[k+1] = theta[k] - lr[k] * g[k]
//   step_vjp  given v = dL/d(theta[k+1]): the adjoint of g[k] is u = -lr[k] * v, that of lr[k] is -g[k] * v,
//             and v itself flows on to theta[k]
// The direction of the Hessian-vector product that follows is u. Where one scalar rate serves all adapted tensors
// it is enough to take v itself as the direction and to scale the product: no u is ever stored.
#pragma once

#include "machine.h"
#include "tasks.h"

PYMETA_KERNEL_BEGIN

class Sgd {
 public:
  // `packed` is [lr.rows, parameters] in the executor's layout; only read when the rate is per element.
  Sgd(const Call<Real>& call, const Real* packed, std::size_t parameters)
      : lr_(call.lr), packed_(packed), parameters_(parameters) {
    uniform_ = !lr_.per_element;
    int first = -1;
    for (int t = 0; uniform_ && t < call.network->tensor_count; ++t) {
      if (!call.adapted[t]) continue;
      if (first < 0) first = t;
      uniform_ = lr_.groups[t] == lr_.groups[first];
    }
    column_ = first < 0 || lr_.per_element ? 0 : lr_.groups[first];
  }

  int row(int step) const { return step < lr_.rows ? step : lr_.rows - 1; }
  bool per_element() const { return lr_.per_element; }
  bool uniform() const { return uniform_; }
  int group(int tensor) const { return lr_.groups[tensor]; }
  Real uniform_rate(int step) const {
    return lr_.values[static_cast<long>(row(step)) * lr_.columns + column_];
  }
  Real rate(int step, int tensor) const {
    return lr_.values[static_cast<long>(row(step)) * lr_.columns + lr_.groups[tensor]];
  }
  const Real* rates(int step) const { return packed_ + row(step) * parameters_; }

  // theta_next = theta - lr g over `size` scalars of one tensor at `place`.
  void step(int k, int tensor, std::size_t place, std::size_t size, const Real* theta,
            const Real* g, Real* theta_next) const {
    each(size, [&](std::size_t i) {
      store(theta_next + i, fma(-rate_at(k, tensor, place, i), load(g + i), load(theta + i)));
    });
  }

  // u = -lr v
  void step_vjp(int k, int tensor, std::size_t place, std::size_t size, const Real* v,
                Real* u) const {
    each(size, [&](std::size_t i) { store(u + i, -(rate_at(k, tensor, place, i) * load(v + i))); });
  }

  // lr_gradient -= g v, element by element (per_element), or summed into one vector (a rate per group).
  void rate_vjp(std::size_t size, const Real* g, const Real* v, Real* lr_gradient) const {
    if (per_element()) {
      each(size, [&](std::size_t i) {
        store(lr_gradient + i, fma(-load(g + i), load(v + i), load(lr_gradient + i)));
      });
    } else {
      Vec sum = load(lr_gradient);
      each(size, [&](std::size_t i) { sum = fma(-load(g + i), load(v + i), sum); });
      store(lr_gradient, sum);
    }
  }

 private:
  template <class Body>
  static void each(std::size_t size, Body body) {
    for (std::size_t i = 0; i < size; i += kWidth) body(i);
  }
  Vec rate_at(int k, int tensor, std::size_t place, std::size_t i) const {
    return per_element() ? load(rates(k) + place + i) : broadcast(rate(k, tensor));
  }

  LearningRate<Real> lr_;
  const Real* packed_;
  std::size_t parameters_;
  bool uniform_;
  int column_;
};

PYMETA_KERNEL_END
