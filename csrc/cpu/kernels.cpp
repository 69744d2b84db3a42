// All kernels of one instruction set and one Real; compiled once for each pair (CMakeLists.txt).

// The machine first: what core/ has for every machine is compiled for this one.
#include "simd.h"

#include "driver.h"
#include "kernels.h"

#include <new>

// EXECUTOR(name, class): a new one has its include and its line here. The first is the one for a single task.
#define PYMETA_EXECUTORS(EXECUTOR) \
  EXECUTOR(rows, RowsExecutor)     \
  EXECUTOR(lanes, LanesExecutor)

PYMETA_KERNEL_BEGIN

template <class X>
const Needs* plan(const Call<Real>& call, void* plan) {
  return &(new (plan) Driver<X>(call))->needs();
}
template <class X>
const Needs* keep_order(void* plan, const Needs& like) {
  Driver<X>& driver = *static_cast<Driver<X>*>(plan);
  driver.keep_order(like);
  return &driver.needs();
}
template <class X>
void run(void* plan, const Team& team, char* memory) {
  static_cast<Driver<X>*>(plan)->run(team, memory);
}
template <class X>
void pack(const void* plan, Real* start) {
  static_cast<const Driver<X>*>(plan)->pack_shared(start);
}

constexpr ExecutorTable<Real> kExecutors[] = {
#define PYMETA_ENTRY(name, X) {#name, sizeof(Driver<X>), plan<X>, keep_order<X>, run<X>, pack<X>},
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
