// Everything compiled for an instruction set lives in a namespace of that name, with internal linkage: an inline
// function that two object files share would be merged by the linker, and the slow machine would then execute
// the fast machine's instructions.
#pragma once

#include <type_traits>

#ifndef PYMETA_ISA
#define PYMETA_ISA baseline
#endif
#ifndef PYMETA_REAL
#define PYMETA_REAL float
#endif

#define PYMETA_KERNEL_BEGIN \
  namespace pymeta {        \
  namespace PYMETA_ISA {    \
  namespace {
#define PYMETA_KERNEL_END \
  }                       \
  }                       \
  }
