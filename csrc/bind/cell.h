// The cell of a learned optimiser: what other files of this folder need of cell.cpp, and it of them.
#pragma once

#include "../core/call/cell.h"
#include "common.h"

namespace pymeta {

void bind_cell(pybind11::module_& m);

// As that of a Call (common.h).
template <class Real>
void run_interruptibly(CellStep<Real>& call);
template <class Real>
void run_interruptibly(CellBack<Real>& call);

}  // namespace pymeta
