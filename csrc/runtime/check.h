// What depends on the data of a call is checked here, before anything runs.
#pragma once

#include "../core/call/tasks.h"

namespace pymeta {

// Throws std::invalid_argument for labels and probabilities out of range, bad weights or sizes, batch normalisation of one
// row. Finds the sizes of the largest tasks, and whether sets have rows that weigh nothing.
template <class Real>
void check(Call<Real>& call);

}  // namespace pymeta
