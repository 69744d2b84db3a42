// The block executor on the host: emulated blocks, for tests. Compiled once for each Real.

#include "machine.h"

#include "blocks.h"

PYMETA_KERNEL_BEGIN

struct Launcher {
  // The kernels before and after do not care how many threads a block has.
  static int few(int) { return 2; }
  const char* pack(int, int threads, const Frame& frame) const {
    emulation::launch(2, threads, 64, [&] { pack_start(frame); });
    return nullptr;
  }
  // By a kernel of the call's own, which needs no list, or by the family's.
  const char* tasks(int blocks, int threads, std::size_t bytes, const GivenFrame& frame,
                    SpecialKernel kernel = nullptr) const {
    using Run = void (*)(int, int, std::size_t, const void*);
    if (kernel)
      reinterpret_cast<Run>(const_cast<void*>(kernel))(blocks, threads, bytes,
                                                       static_cast<const Frame*>(&frame));
    else
      emulation::launch(blocks, threads, bytes, [&] { run_tasks(frame); });
    return nullptr;
  }
  static constexpr bool kHasSpecial = true;
  static int ordinal() { return kEmulated; }
  const char* reduce(int blocks, int threads, const Frame& frame) const {
    emulation::launch(blocks, threads, sizeof(double) * kReduceColumns * kReduceGroups,
                      [&] { reduce_sums(frame); });
    return nullptr;
  }
};

const char* run_blocks(const Call<Real>& call, const BlockPlan& plan, std::uintptr_t,
                       char* workspace, BlockFrame& kept) {
  return BlockCall(call).run(plan, Launcher{}, workspace, kept);
}

PYMETA_KERNEL_END

PYMETA_EXPORT_BLOCKS(emulated)
