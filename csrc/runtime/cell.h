// The cell of a learned optimiser (core/call/cell.h), on the kernels in use: finds threads and memory, and runs it.
#pragma once

#include "../cpu/cell_table.h"
#include "interrupt.h"

namespace pymeta {

// That of the instruction set in use; registry.cpp has the tables.
template <class Real>
const CellTable<Real>& cell_table();

// Both throw std::bad_alloc, and return false where `interrupt` (or null) ended the call, whose results are then nobody's.
template <class Real>
bool run(CellStep<Real>& call, Interrupt* interrupt = nullptr);
template <class Real>
bool run(CellBack<Real>& call, Interrupt* interrupt = nullptr);

}  // namespace pymeta
