// The kernel of a single call, compiled when it is first made (special.h). The build makes one file of this and all that it includes.
#pragma once

#include "machine.h"

#include "list.h"

#if defined(PYMETA_EMULATE)
extern "C" __attribute__((visibility("default"))) void pymeta_special(int blocks, int threads,
                                                                      std::size_t bytes,
                                                                      const void* frame) {
  using namespace pymeta::PYMETA_ISA;
  const ListFrame& given = *static_cast<const ListFrame*>(frame);
  emulation::launch(blocks, threads, bytes, [&] { run_tasks(given); });
}
#elif defined(__CUDACC__)
// As many registers as the planner counts on (BlockCall::fitting).
extern "C" __global__ void __launch_bounds__(PYMETA_SPECIAL_THREADS,
                                             (pymeta::PYMETA_ISA::kDouble ? 1 : 2) *
                                                 pymeta::kBlockThreads / PYMETA_SPECIAL_THREADS)
    pymeta_special(const __grid_constant__ pymeta::PYMETA_ISA::ListFrame frame) {
  pymeta::PYMETA_ISA::run_tasks(frame);
}
#endif
