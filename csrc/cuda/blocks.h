// A call on blocks, from the host's side: how much memory and how many threads a task gets, and the three launches.
//
// The planner weighs three things. A task wants a thread for each register tile of its largest product; a multiprocessor
// wants at least kWarps warps, from as many tasks as its shared memory holds; and what a product touches in each step (tape,
// tangents, weights, v) should lie in shared memory. Where all steps of a reverse sweep fit there too, they stay; else
// each is copied to the workspace behind the step and back before its reverse.
// Included by kernels.cu and emulated.cpp, which bring a Launcher for the three kernels and export the table.
#pragma once

#include "call.h"
#include "device.h"

PYMETA_KERNEL_BEGIN

constexpr int kWarp = 32;
constexpr int kWarps = 16;    // that keep a multiprocessor busy
constexpr int kFewWarps = 8;  // that do not
// Chunks of tasks, at most: ten times as many as an H100 runs at once (792), so that few blocks wait for the last ones.
constexpr std::int64_t kChunks = 8192;
constexpr std::size_t kSumsBytes = std::size_t{128} << 20;
constexpr std::size_t kReserved = 1024;  // shared memory that the system takes of each block

class BlockCall {
 public:
  explicit BlockCall(const Call<Real>& call) : call_(call) {}

  BlockPlan plan(const DeviceFacts& device, int threads, std::size_t block_bytes) const {
    BlockPlan p{};
    const std::size_t most = block_bytes ? block_bytes : device.block_bytes;
    p.threads = threads ? threads : wanted_threads(device);
    p.near_scalars = near_scalars(device, most, p.threads);
    const Workspace<Block> workspace(call_, p.near_scalars);
    p.far_scalars = workspace.size_far;
    p.block_bytes = kNearPlace + sizeof(Real) * workspace.size;
    p.saves = workspace.saves_steps;
    p.chunks = chunks(workspace);
    // Few tasks at once leave warps to spare.
    const std::int64_t fit = fitting(device, p.block_bytes);
    while (!threads && fit * p.threads < kFewWarps * kWarp && 2 * p.threads <= device.most_threads)
      p.threads *= 2;
    const std::int64_t resident = fit * device.multiprocessors;
    p.blocks = static_cast<int>(p.chunks < resident ? p.chunks : resident);
    p.workspace_bytes = sizeof(Real) * (packed_size(workspace) + sums_size(workspace) * p.chunks +
                                        workspace.size_far * p.blocks);
    return p;
  }

  template <class Launcher>
  const char* run(const BlockPlan& plan, const Launcher& launcher, char* memory) const {
    Frame frame(call_, plan.near_scalars);
    describe(frame);
    frame.packed = reinterpret_cast<Real*>(memory);
    frame.sums = frame.packed + packed_size(frame.workspace);
    frame.far = frame.sums + sums_size(frame.workspace) * plan.chunks;
    frame.chunks = plan.chunks;
    frame.tasks_per_chunk = plan.chunks ? (call_.tasks + plan.chunks - 1) / plan.chunks : 0;
    const Real* rates = frame.packed + frame.workspace.parameters.size;
    frame.shared = {frame.packed, nullptr, call_.lr.per_element ? rates : nullptr,
                    call_.corrections() ? rates + frame.workspace.rate_scalars(call_) : nullptr};
    const std::size_t packed = packed_size(frame.workspace);
    if (const char* wrong =
            launcher.pack(static_cast<int>((packed + 255) / 256), launcher.few(256), frame))
      return wrong;
    if (plan.blocks > 0)
      if (const char* wrong = launcher.tasks(plan.blocks, plan.threads, plan.block_bytes, frame))
        return wrong;
    if (frame.sums_size == 0 && !call_.mean_loss) return nullptr;
    const int columns = static_cast<int>((frame.sums_size + kReduceColumns - 1) / kReduceColumns);
    return launcher.reduce(columns + 1, launcher.few(kReduceColumns * kReduceGroups), frame);
  }

 private:
  static std::int64_t fitting(const DeviceFacts& device, std::size_t block_bytes) {
    const std::size_t fit = device.multiprocessor_bytes / (block_bytes + kReserved);
    return fit < 1 ? 1 : fit > 32 ? 32 : static_cast<std::int64_t>(fit);
  }

  std::size_t packed_size(const Workspace<Block>& workspace) const {
    return Places::lines(workspace.parameters.size + workspace.rate_scalars(call_) +
                         2 * call_.corrections());
  }
  std::size_t gradient_sums(const Workspace<Block>& workspace) const {
    return call_.sums_gradients() ? workspace.parameters.size : 0;
  }
  std::size_t lr_sums(const Workspace<Block>& workspace) const {
    return call_.lr_gradient && !call_.lr.per_task ? workspace.lr_scalars(call_) : 0;
  }
  std::size_t sums_size(const Workspace<Block>& workspace) const {
    return Places::lines(gradient_sums(workspace) + lr_sums(workspace));
  }
  std::int64_t chunks(const Workspace<Block>& workspace) const {
    const std::size_t bytes = sizeof(Real) * sums_size(workspace);
    std::int64_t most = bytes ? static_cast<std::int64_t>(kSumsBytes / bytes) : kChunks;
    most = most < 64 ? 64 : most > kChunks ? kChunks : most;
    const std::int64_t tasks_per_chunk = (call_.tasks + most - 1) / most;
    return tasks_per_chunk ? (call_.tasks + tasks_per_chunk - 1) / tasks_per_chunk : 0;
  }

  // A thread for each tile of 4 x 4 of the largest product; more where there are fewer tasks than multiprocessors could hold.
  int wanted_threads(const DeviceFacts& device) const {
    const int rows = call_.max_support > call_.max_query ? call_.max_support : call_.max_query;
    std::int64_t tiles = 1;
    for (int l = 0; l < call_.network->layer_count; ++l) {
      const Layer& layer = call_.network->layers[l];
      const std::int64_t own =
          static_cast<std::int64_t>((rows + 3) / 4) * ((layer.out.features() + 3) / 4);
      tiles = own > tiles ? own : tiles;
    }
    if (call_.tasks < 2 * device.multiprocessors) tiles *= 4;
    int threads = kWarp;
    while (threads < tiles && threads < device.most_threads) threads *= 2;
    return threads < device.most_threads ? threads : device.most_threads;
  }

  // As many tasks of a multiprocessor as keep it busy, but no more than have their busy arrays near.
  std::size_t near_scalars(const DeviceFacts& device, std::size_t most, int threads) const {
    const auto scalars = [&](std::size_t bytes) {
      bytes = bytes < most ? bytes : most;
      return bytes > kNearPlace ? (bytes - kNearPlace) / sizeof(Real) / 16 * 16 : 0;
    };
    const std::size_t whole = Workspace<Block>(call_).size;
    // A multiprocessor that gets few tasks has all of its memory for them.
    const std::int64_t share = (call_.tasks + device.multiprocessors - 1) / device.multiprocessors;
    const std::int64_t busy = (kWarps * kWarp + threads - 1) / threads;
    const int enough = static_cast<int>(share < 1 ? 1 : share < busy ? share : busy);
    std::size_t best = scalars(most);
    for (int tasks = 1; tasks <= enough; ++tasks) {
      const std::size_t budget = scalars(device.multiprocessor_bytes / tasks - kReserved);
      if (whole <= budget) {
        best = whole;  // all of it, and perhaps more tasks than asked for
        continue;
      }
      if (!is_near(Workspace<Block>(call_, budget))) break;
      best = budget;
    }
    return best < whole ? best : whole;
  }
  static bool is_near(const Workspace<Block>& workspace) {
    for (const Place place : {workspace.support, workspace.query, workspace.theta, workspace.v})
      if (place != kNowhere && (place & kFar)) return false;
    return true;
  }

  void describe(Frame& frame) const {
    const Network& network = *call_.network;
    frame.call = call_;
    frame.network = network;
    frame.network.tensors = nullptr;  // the host's; nothing on the device asks for them
    for (int l = 0; l < network.layer_count; ++l) frame.layers[l] = network.layers[l];
    for (int t = 0; t < network.tensor_count; ++t) {
      frame.adapted[t] = call_.adapted[t];
      frame.per_task[t] = call_.has_own_start(t);
      frame.groups[t] = call_.lr.groups && !call_.lr.per_element ? call_.lr.groups[t] : 0;
      frame.parameters[t] = call_.parameters[t];
      frame.gradients[t] = call_.gradients ? call_.gradients[t] : nullptr;
      frame.adapted_parameters[t] =
          call_.adapted_parameters ? call_.adapted_parameters[t] : nullptr;
      frame.adapted_cotangents[t] =
          call_.cotangents.adapted ? call_.cotangents.adapted[t] : nullptr;
    }
    const RowSet<Real>* const sets[] = {&call_.support, &call_.query, &call_.validation};
    for (int i = 0; i < 3; ++i) frame.losses[i] = call_.loss_of(*sets[i]);
    for (int i = 0; i < 2; ++i) frame.arrays[i].copy(frame.losses[i], network.out_features());
    frame.gradient_sums = gradient_sums(frame.workspace);
    frame.lr_sums = lr_sums(frame.workspace);
    frame.sums_size = sums_size(frame.workspace);
  }

  const Call<Real>& call_;
};

inline BlockPlan plan_blocks(const Call<Real>& call, const DeviceFacts& device, int threads,
                             std::size_t block_bytes) {
  return BlockCall(call).plan(device, threads, block_bytes);
}

PYMETA_KERNEL_END

// Exports the table of this machine and Real under the name by which device.cpp knows it; behind run_blocks.
#define PYMETA_BLOCKS_NAME_(machine, real) machine##_blocks_##real
#define PYMETA_BLOCKS_NAME(machine, real) PYMETA_BLOCKS_NAME_(machine, real)
#define PYMETA_EXPORT_BLOCKS(machine)                                              \
  namespace pymeta {                                                               \
  extern const BlockKernels<PYMETA_REAL> PYMETA_BLOCKS_NAME(machine, PYMETA_REAL); \
  const BlockKernels<PYMETA_REAL> PYMETA_BLOCKS_NAME(machine, PYMETA_REAL) = {     \
      PYMETA_ISA::plan_blocks, PYMETA_ISA::run_blocks};                            \
  }
