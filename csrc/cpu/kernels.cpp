// All kernels of one instruction set and one Real; compiled once for each pair (CMakeLists.txt).

// The machine first: what core/ has for every machine is compiled for this one.
#include "simd.h"

#include "driver.h"
#include "kernels.h"

PYMETA_KERNEL_BEGIN

Needs needs(const Call<Real>& call, Job job, ExecutorKind kind) {
  if (kind == ExecutorKind::lanes) return Driver<LanesExecutor>(call, job).needs();
  return Driver<RowsExecutor>(call, job).needs();
}

void run(const Call<Real>& call, Job job, ExecutorKind kind, const Needs& needs, const Team& team,
         char* memory) {
  if (kind == ExecutorKind::lanes)
    Driver<LanesExecutor>(call, job).run(needs, team, memory);
  else
    Driver<RowsExecutor>(call, job).run(needs, team, memory);
}

void pack(const Call<Real>& call, Job job, ExecutorKind kind, Real* start) {
  if (kind == ExecutorKind::lanes)
    Driver<LanesExecutor>(call, job).pack_shared(start);
  else
    Driver<RowsExecutor>(call, job).pack_shared(start);
}

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
    PYMETA_NAME(PYMETA_ISA), PYMETA_ISA::needs, PYMETA_ISA::run, PYMETA_ISA::pack,
    PYMETA_ISA::fma_rate};
}  // namespace pymeta
