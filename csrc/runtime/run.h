// From a Call to a result: checks what depends on the data, chooses executor and threads, finds memory, runs.
#pragma once

#include <optional>

#include "check.h"
#include "interrupt.h"
#include "planner.h"
#include "registry.h"

namespace pymeta {

// Throws what check() throws; std::bad_alloc. False where `interrupt` (or null) ended the call, whose results are then nobody's.
template <class Real>
bool run(Call<Real>& call, Interrupt* interrupt = nullptr);
// The same for a call that stays where it is and gets other arrays: with the plan that is kept, or a new one, which is kept.
template <class Real>
bool run(Call<Real>& call, std::optional<Plan<Real>>& kept, Interrupt* interrupt = nullptr);

}  // namespace pymeta
