#include "registry.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "../cuda/device.h"
#include "cell.h"
#include "cores.h"

namespace pymeta {

// The tables that kernels.cpp and cell.cpp export.
#define PYMETA_DECLARE(isa)                            \
  extern const Kernels<float> kernels_##isa##_float;   \
  extern const Kernels<double> kernels_##isa##_double; \
  extern const CellTable<float> cells_##isa##_float;   \
  extern const CellTable<double> cells_##isa##_double;
#ifdef PYMETA_HAS_BASELINE
PYMETA_DECLARE(baseline)
#endif
#ifdef PYMETA_HAS_AVX2
PYMETA_DECLARE(avx2)
#endif
#ifdef PYMETA_HAS_AVX512
PYMETA_DECLARE(avx512)
#endif
#ifdef PYMETA_HAS_NEON
PYMETA_DECLARE(neon)
#endif
#undef PYMETA_DECLARE

namespace {

std::string listed(const std::vector<std::string>& names) {
  std::string list;
  for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
  return list;
}

struct InstructionSet {
  const Kernels<float>* in_float;
  const Kernels<double>* in_double;
  const CellTable<float>* cell_in_float;
  const CellTable<double>* cell_in_double;
};
#define PYMETA_SET(isa)                                                                          \
  InstructionSet {                                                                               \
    &kernels_##isa##_float, &kernels_##isa##_double, &cells_##isa##_float, &cells_##isa##_double \
  }

std::vector<std::string> built() {
  std::vector<std::string> names;
#ifdef PYMETA_HAS_BASELINE
  names.emplace_back(kernels_baseline_float.isa);
#endif
#ifdef PYMETA_HAS_AVX2
  names.emplace_back(kernels_avx2_float.isa);
#endif
#ifdef PYMETA_HAS_AVX512
  names.emplace_back(kernels_avx512_float.isa);
#endif
#ifdef PYMETA_HAS_NEON
  names.emplace_back(kernels_neon_float.isa);
#endif
  return names;
}

const std::vector<InstructionSet>& usable() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#ifdef PYMETA_HAS_BASELINE
    found.push_back(PYMETA_SET(baseline));
#endif
#ifdef PYMETA_HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found.push_back(PYMETA_SET(avx2));
#endif
#ifdef PYMETA_HAS_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
      found.push_back(PYMETA_SET(avx512));
#endif
#ifdef PYMETA_HAS_NEON
    found.push_back(PYMETA_SET(neon));
#endif
    return found;
  }();
  return sets;
}

std::size_t find_isa(const std::string& name) {
  for (std::size_t i = 0; i < usable().size(); ++i)
    if (name == usable()[i].in_float->isa) return i;
  throw std::invalid_argument("isa: expected one of " + listed(isas()) + " on this machine, got '" +
                              name + "'");
}

constexpr int kAutomatic = -1, kEmulatedBlocks = -2;

std::atomic<int> chosen_isa{-1};  // -1: the best
std::atomic<int> executor_choice{kAutomatic};
std::atomic<int> chosen_threads{0};  // 0: all cores

const InstructionSet& current() {
  const int chosen = chosen_isa.load(std::memory_order_relaxed);
  return chosen < 0 ? usable().back() : usable()[static_cast<std::size_t>(chosen)];
}

// All instruction sets have the same executors.
const Kernels<float>& any_kernels() { return *current().in_float; }

}  // namespace

std::string no_isa_reason() {
  if (!usable().empty()) return "";
  return "this build has kernels for " + listed(built()) +
         " alone, and this processor cannot run them; build with PYMETA_ISAS empty, or with an "
         "instruction set that it has";
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const InstructionSet& set : usable()) names.emplace_back(set.in_float->isa);
  return names;
}
std::string isa() { return current().in_float->isa; }
void set_isa(const std::string& name) { chosen_isa = static_cast<int>(find_isa(name)); }

std::string executor() {
  const int choice = executor_choice;
  return choice == kAutomatic        ? "auto"
         : choice == kEmulatedBlocks ? "emulated"
                                     : any_kernels().executors[choice].name;
}
void set_executor(const std::string& name) {
  if (name == "auto") {
    executor_choice = kAutomatic;
    return;
  }
  if (name == "emulated" && emulates()) {
    executor_choice = kEmulatedBlocks;
    return;
  }
  std::string known = "'auto'";
  for (int i = 0; i < any_kernels().executor_count; ++i) {
    if (name == any_kernels().executors[i].name) {
      executor_choice = i;
      return;
    }
    known += std::string(i + 1 < any_kernels().executor_count ? ", '" : " or '") +
             any_kernels().executors[i].name + "'";
  }
  throw std::invalid_argument("executor: expected " + known + ", got '" + name + "'");
}
int chosen_executor() {
  const int choice = executor_choice;
  return choice < 0 ? -1 : choice;
}

template <>
const Kernels<float>& kernels<float>() {
  return *current().in_float;
}
template <>
const Kernels<double>& kernels<double>() {
  return *current().in_double;
}

template <>
const CellTable<float>& cell_table<float>() {
  return *current().cell_in_float;
}
template <>
const CellTable<double>& cell_table<double>() {
  return *current().cell_in_double;
}

int num_threads() {
  const int chosen = chosen_threads;
  return chosen > 0 ? chosen : available_cores();
}
void set_num_threads(int n) {
  if (n < 1)
    throw std::invalid_argument("num_threads: expected at least 1, got " + std::to_string(n));
  chosen_threads = n;
}

double fma_peak(const std::string& name, bool is_double, double seconds) {
  const InstructionSet& set = usable()[find_isa(name)];
  const auto rate = is_double ? set.in_double->fma_rate : set.in_float->fma_rate;
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  double best = 0;
  do {
    const auto start = Clock::now();
    const double flops = rate(200000);
    best = std::max(best, flops / std::chrono::duration<double>(Clock::now() - start).count());
  } while (Clock::now() < end);
  return best;
}

}  // namespace pymeta
