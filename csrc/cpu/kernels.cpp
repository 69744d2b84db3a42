// All kernels of one instruction set and one Real; compiled once for each pair (CMakeLists.txt).

// The machine first: what core/ has for every machine is compiled for this one.
#include "simd.h"

#include "driver.h"
#include "kernels.h"
#include "mixed.h"
#include "stacked.h"

#include <new>

// EXECUTOR(name, driver): a new one has its include and its line here. The first is the one for a single task.
#define PYMETA_EXECUTORS(EXECUTOR)  \
  EXECUTOR(rows, RowsDriver)        \
  EXECUTOR(lanes, LanesDriver)      \
  EXECUTOR(mixed, MixedLanesDriver) \
  EXECUTOR(stacked, StackedDriver)

PYMETA_KERNEL_BEGIN

using RowsDriver = Driver<RowsExecutor>;
using LanesDriver = Driver<LanesExecutor>;
using MixedLanesDriver = MixedDriver<RowsExecutor, LanesExecutor>;

template <class D>
bool suits(const Call<Real>& call) {
  return D::suits(call);
}
template <class D>
const Needs* plan(const Call<Real>& call, void* plan, void* const* plans) {
  if constexpr (D::kMadeOf == 0)
    return &(new (plan) D(call))->needs();
  else
    return &(new (plan) D(call, plans))->needs();
}
template <class D>
const Needs* keep_order(void* plan, const Needs& like) {
  D& driver = *static_cast<D*>(plan);
  driver.keep_order(like);
  return &driver.needs();
}
template <class D>
void run(void* plan, const Team& team, char* memory) {
  static_cast<D*>(plan)->run(team, memory);
}
template <class D>
void pack(const void* plan, Real* start) {
  static_cast<const D*>(plan)->pack_shared(start);
}

template <class D>
constexpr ExecutorTable<Real> table(const char* name) {
  ExecutorTable<Real> t{name, sizeof(D), suits<D>, D::kMadeOf, plan<D>, nullptr, run<D>, pack<D>};
  if constexpr (D::kSingleTasks) t.keep_order = keep_order<D>;
  return t;
}

constexpr ExecutorTable<Real> kExecutors[] = {
#define PYMETA_ENTRY(name, D) table<D>(#name),
    PYMETA_EXECUTORS(PYMETA_ENTRY)
#undef PYMETA_ENTRY
};

// Ten independent chains hide the latency of the multiply-add on every core we know.
double fma_rate(std::int64_t rounds) {
  constexpr int chains = 10;
  Vec sum[chains];
  for (int i = 0; i < chains; ++i) sum[i] = broadcast(Real(i));
  const Vec a = broadcast(Real(0.999)), b = broadcast(Real(0.001));
  for (std::int64_t k = 0; k < rounds; ++k) {
#pragma GCC unroll 10
    for (int i = 0; i < chains; ++i) sum[i] = fma(sum[i], a, b);
  }
  Vec total = zero();
  for (int i = 0; i < chains; ++i) total = total + sum[i];
  volatile Real used = total[0];
  (void)used;
  return 2.0 * chains * kWidth * static_cast<double>(rounds);
}

PYMETA_KERNEL_END

#define PYMETA_TEXT(x) #x
#define PYMETA_NAME(x) PYMETA_TEXT(x)
#define PYMETA_TABLE_(isa, real) kernels_##isa##_##real
#define PYMETA_TABLE(isa, real) PYMETA_TABLE_(isa, real)

namespace pymeta {
extern const Kernels<PYMETA_REAL> PYMETA_TABLE(PYMETA_ISA, PYMETA_REAL);
const Kernels<PYMETA_REAL> PYMETA_TABLE(PYMETA_ISA, PYMETA_REAL) = {
    PYMETA_NAME(PYMETA_ISA), PYMETA_ISA::kExecutors,
    static_cast<int>(sizeof PYMETA_ISA::kExecutors / sizeof PYMETA_ISA::kExecutors[0]),
    PYMETA_ISA::fma_rate};
}  // namespace pymeta
