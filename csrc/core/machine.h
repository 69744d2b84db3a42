// The machine that core/ is compiled for: its Real, its vector Vec and their elementary functions.
//
// core/ is written against these names alone; another machine (a GPU, where a Vec is one number) is another
// include here.
#pragma once

#include "../cpu/simd.h"
