// What this build and this machine have to run calls with: instruction sets and their executors; which are in use.
//
// The settings are atomics: any thread may change them, a call looks at each once.
#pragma once

#include <string>
#include <vector>

#include "../cpu/kernels.h"

namespace pymeta {

// Why none of the build's instruction sets runs on this machine; empty where one does, as it must for all below.
std::string no_isa_reason();

// Instruction sets that this machine can run, slowest first; the last is used unless another is set.
std::vector<std::string> isas();
std::string isa();
void set_isa(const std::string& name);  // throws std::invalid_argument

// "auto", the name of an executor, or "emulated": for calls with a device (bind/), other calls choose for themselves.
std::string executor();
void set_executor(const std::string& name);  // throws std::invalid_argument
int chosen_executor();                       // its index, or -1 where calls choose

// The kernels in use now.
template <class Real>
const Kernels<Real>& kernels();

int num_threads();
void set_num_threads(int n);  // throws std::invalid_argument

// FLOP/s of one core: independent fused multiply-adds from registers, the best of several rounds in `seconds`.
double fma_peak(const std::string& isa, bool is_double, double seconds);

}  // namespace pymeta
