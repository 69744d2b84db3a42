// Fine-tuning: epochs of minibatches over each task's rows, with early stopping (adapt.h has the step).
//
// With validation rows the weights of the lowest validation loss are kept, those of the start among them, and a task stops
// when `patience` epochs in a row brought nothing lower.
#pragma once

#include "adapt.h"

PYMETA_KERNEL_BEGIN

// Keeps the weights of those tasks that are `better` now.
template <class X>
PYMETA_FN PYMETA_NOINLINE void keep_best(const State<X>& s,
                                         const typename State<X>::Parameters& theta,
                                         IntVec better) {
  if (!any_lane(better)) return;
  s.for_adapted([&](int t, std::size_t place, std::size_t size) {
    const Real* from = theta.tensor(t);
    Real* best = s.memory.at(s.ws.best) + place;
    X::for_vectors(size, [&](std::size_t i) {
      store(best + i, select(better, load(from + i), load(best + i)));
    });
  });
}

// batches.step(epoch, b, running) says what the b-th step of an epoch works on; `record` takes the losses down.
template <class X, class Batches, class Record>
PYMETA_FN typename State<X>::Parameters fine_tune(InnerLoop<X>& loop, Batches& batches,
                                                  const ItemSet* validation, Record& record) {
  using Parameters = typename State<X>::Parameters;
  const State<X>& s = loop.state();
  Parameters theta = s.start();
  IntVec running = batches.present(), judged = IntVec{};
  Vec best = zero(), best_epoch = zero(), epochs = zero();
  if (validation) {
    // Where no row weighs anything there is nothing to judge by.
    judged = X::sum_rows_in_order(validation->extent, validation->scale) > zero();
    best = loop.evaluate(theta, *validation);
    record.validation(0, best, judged);
    keep_best(s, theta, ~IntVec{});
  }
  int steps = 0;
  for (int epoch = 1; epoch <= s.call.epochs && any_lane(running) && !s.call.is_stopped();
       ++epoch) {
    loop.reset_losses();
    for (int b = 0; b < batches.count() && !s.call.is_stopped(); ++b) {
      const Step step = batches.step(epoch - 1, b, running);
      if (any_lane(step.active)) theta = loop.step(steps++, theta, step);
    }
    epochs = select(running, broadcast(Real(epoch)), epochs);
    record.train(epoch - 1, loop.loss_sum() / batches.rows(), running);
    if (!validation) continue;
    const Vec loss = loop.evaluate(theta, *validation);
    record.validation(epoch, loss, running & judged);
    const IntVec better = running & ((loss < best) | ~judged);
    best = select(better, loss, best);
    best_epoch = select(better, broadcast(Real(epoch)), best_epoch);
    keep_best(s, theta, better);
    if (s.call.patience >= 0)
      running = running & (~judged | (epochs - best_epoch < broadcast(Real(s.call.patience))));
  }
  record.finish(validation ? best_epoch : epochs, epochs);
  return validation ? Parameters{&s, s.memory.at(s.ws.best), nullptr} : theta;
}

PYMETA_KERNEL_END
