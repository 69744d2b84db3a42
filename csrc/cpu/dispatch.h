// From a Call to a result: checks what depends on the data, chooses executor and threads, finds memory, runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pymeta {

// Instruction sets that this machine can run, slowest first; the last is used unless another is set.
std::vector<std::string> isas();
std::string isa();
void set_isa(const std::string& name);  // throws std::invalid_argument

std::string executor();  // "auto", "rows", "lanes"
void set_executor(const std::string& name);

int num_threads();
void set_num_threads(int n);

struct Report {
  ExecutorKind executor;
  int threads;
  Needs needs;
};

// What run() would do.
template <class Real>
Report plan(const Call<Real>& call, Job job);

// Throws std::invalid_argument for labels out of range, bad weights or sizes, BatchNorm over one row; std::bad_alloc.
template <class Real>
void run(Call<Real>& call, Job job);

// The checks of run(), which also find the sizes of the largest tasks.
template <class Real>
void check(Call<Real>& call, Job job);

// The kernels in use now.
template <class Real>
const Kernels<Real>& kernels();

// FLOP/s of one core: independent fused multiply-adds from registers, the best of several rounds in `seconds`.
double fma_peak(const std::string& isa, bool is_double, double seconds);

const char* executor_name(ExecutorKind kind);

}  // namespace pymeta
