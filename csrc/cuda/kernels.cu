// The block executor on the GPU: its kernels and their launches. Compiled once for each Real.

#include <cuda_runtime_api.h>

#include <atomic>

#include "machine.h"

#include "blocks.h"

PYMETA_KERNEL_BEGIN

__global__ void __launch_bounds__(kBlockThreads)
    pack_start_kernel(const __grid_constant__ Frame frame) {
  pack_start(frame);
}
__global__ void __launch_bounds__(kBlockThreads, kDouble ? 1 : 2)
    run_tasks_kernel(const __grid_constant__ GivenFrame frame) {
  run_tasks(frame);
}
// Two blocks: without them ptxas goes down to 32 registers, which are too few for a batch of loads.
__global__ void __launch_bounds__(kBlockThreads, 2)
    reduce_sums_kernel(const __grid_constant__ Frame frame) {
  reduce_sums(frame);
}

struct Launcher {
  cudaStream_t stream;

  static int few(int threads) { return threads; }

  const char* pack(int blocks, int threads, const Frame& frame) const {
    if (const char* wrong = allow_shared_memory()) return wrong;
    return launch(pack_start_kernel, blocks, threads, 0, frame);
  }
  // By a kernel of the call's own, which needs no list, or by the family's.
  const char* tasks(int blocks, int threads, std::size_t bytes, const GivenFrame& frame,
                    SpecialKernel kernel = nullptr) const {
    if (!kernel) return launch(run_tasks_kernel, blocks, threads, bytes, frame);
    const Frame& given = frame;
    void* arguments[] = {const_cast<Frame*>(&given)};
    const cudaError_t wrong =
        cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), arguments, bytes, stream);
    return wrong == cudaSuccess ? nullptr : cudaGetErrorString(wrong);
  }
  static constexpr bool kHasSpecial = true;
  // run_on() has set it. Families without kernels of single calls do not ask.
  [[maybe_unused]] static int ordinal() {
    int device = 0;
    cudaGetDevice(&device);
    return device;
  }
  const char* reduce(int blocks, int threads, const Frame& frame) const {
    return launch(reduce_sums_kernel, blocks, threads,
                  sizeof(double) * kReduceColumns * kReduceGroups, frame);
  }

 private:
  // As much as the device has, once: a launch must not find it lowered by another thread's.
  static const char* allow_shared_memory() {
    constexpr int most_devices = 64;
    static std::atomic<bool> allowed[most_devices];
    int device = 0, bytes = 0;
    cudaError_t wrong = cudaGetDevice(&device);
    if (wrong != cudaSuccess) return cudaGetErrorString(wrong);
    if (device < most_devices && allowed[device].load(std::memory_order_acquire)) return nullptr;
    wrong = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (wrong == cudaSuccess)
      wrong = cudaFuncSetAttribute(run_tasks_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   bytes);
    // As many tasks at once as the planner counts on, not more of L1. All three alike: between kernels that ask for
    // different shares a multiprocessor runs empty.
    const auto share = [&](auto kernel) {
      if (wrong == cudaSuccess)
        wrong = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
    };
    share(pack_start_kernel);
    share(run_tasks_kernel);
    share(reduce_sums_kernel);
    if (wrong != cudaSuccess) return cudaGetErrorString(wrong);
    if (device < most_devices) allowed[device].store(true, std::memory_order_release);
    return nullptr;
  }
  template <class Kernel, class Given>
  const char* launch(Kernel kernel, int blocks, int threads, std::size_t bytes,
                     const Given& frame) const {
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), bytes, stream>>>(frame);
    const cudaError_t wrong = cudaGetLastError();
    return wrong == cudaSuccess ? nullptr : cudaGetErrorString(wrong);
  }
};

const char* run_blocks(const Call<Real>& call, const BlockPlan& plan, std::uintptr_t stream,
                       char* workspace, BlockFrame& kept) {
  return BlockCall(call).run(plan, Launcher{reinterpret_cast<cudaStream_t>(stream)}, workspace,
                             kept);
}

PYMETA_KERNEL_END

PYMETA_EXPORT_BLOCKS(cuda)
