// The interface between one instruction set's cell of a learned optimiser and the rest, as kernels.h is of everything else.
//
// cell.cpp is compiled beside kernels.cpp and exports one `CellTable`; runtime/registry.cpp chooses it with the kernels.
#pragma once

#include "../core/call/cell.h"
#include "kernels.h"

namespace pymeta {

template <class CellCall>
struct CellCalls {
  std::size_t (*bytes)(const CellCall&, int threads);  // of memory, at a multiple of 64
  void (*run)(const CellCall&, const Team&, char* memory);
};

template <class Real>
struct CellTable {
  CellCalls<CellStep<Real>> step;
  CellCalls<CellBack<Real>> back;
};

}  // namespace pymeta
