// The machine that core/ is compiled for: its Real, its vector Vec and their elementary functions.
//
// core/ is written against these names alone. A processor's Vec is a register full of numbers; a GPU's is one number,
// and its threads share the numbers of an operation.
#pragma once

#ifdef PYMETA_BLOCK
#include "../cuda/machine.h"
#else
#include "../cpu/simd.h"
#endif
