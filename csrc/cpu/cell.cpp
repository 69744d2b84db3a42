// The cell of a learned optimiser in one instruction set and one Real; compiled as kernels.cpp is.

#include "cell.h"

#include "cell_table.h"

#define PYMETA_TABLE_(isa, real) cells_##isa##_##real
#define PYMETA_TABLE(isa, real) PYMETA_TABLE_(isa, real)

namespace pymeta {
extern const CellTable<PYMETA_REAL> PYMETA_TABLE(PYMETA_ISA, PYMETA_REAL);
const CellTable<PYMETA_REAL> PYMETA_TABLE(PYMETA_ISA, PYMETA_REAL) = {
    {PYMETA_ISA::cell_step_bytes, PYMETA_ISA::cell_step},
    {PYMETA_ISA::cell_back_bytes, PYMETA_ISA::cell_back}};
}  // namespace pymeta
