// All rules: a new one has its include and its line here.
#pragma once

#include "adam.h"
#include "gradient_step.h"
#include "momentum.h"
#include "rmsprop.h"

PYMETA_KERNEL_BEGIN

// Calls visit(rule) with the rule that a call's optimiser asks for.
template <class Visitor>
PYMETA_FN void with_rule(const Optimizer& optimizer, Visitor visit) {
  if (optimizer.kind == OptimizerKind::adam) return visit(Adam(optimizer));
  if (optimizer.kind == OptimizerKind::rmsprop)
    return optimizer.states() == 1 ? visit(RmsProp<true>(optimizer))
                                   : visit(RmsProp<false>(optimizer));
  if (optimizer.momentum != 0) return visit(Momentum(optimizer));
  visit(GradientStep(optimizer));
}

PYMETA_KERNEL_END
