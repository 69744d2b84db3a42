// What an inner optimiser's rule is: the interface of the files beside this one. All element by element.
//
//   struct Momentum
//     kStates                                   arrays of the parameters' size that it keeps from step to step
//     Momentum(optimizer)                       its settings
//     direction(theta, g, state, correction)    d, where theta' = theta - lr d; moves `state` [kStates] on
//     direction_vjp(d_direction, theta, g, state, d_state, d_theta, correction)
//                                               the adjoint of g, given that of d; `state` is the one after the step,
//                                               `d_state` its adjoint, which becomes that of the state before;
//                                               `d_theta` becomes the adjoint of theta
// g is the support gradient with the anchor's pull, clipped (step.h). Formulas are torch.optim's (wd: weight decay).
//
// A new rule is one such file, a line in registry.h, its settings in Optimizer (tasks.h), its description in pymeta/spec,
// its formula in pymeta/reference, and a line in the tests.
#pragma once

#include "../call/tasks.h"

PYMETA_KERNEL_BEGIN

constexpr int kMaxStates = 3;

// What the bias corrections of Adam make of a step, for each lane; the other rules do not look at it.
struct Correction {
  Vec scale, eps;
};

PYMETA_KERNEL_END
