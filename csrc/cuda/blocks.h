// A call on blocks, from the host's side: how much memory and how many threads a task gets, and the three launches.
//
// The planner tries how many tasks a multiprocessor could have at once, which says how much shared memory each gets, and how many
// threads: what is cheapest by a model of their cost (cost.h). What a product touches in each step (tape, tangents, weights, v)
// always lies in shared memory, where one task's fits. Where all steps of a reverse sweep fit there too, they stay; else each is
// copied to the workspace behind the step and back before its reverse.
// Included by kernels.cu and emulated.cpp, which bring a Launcher for the three kernels and export the table.
#pragma once

#include "call.h"
#include "cost.h"
#include "device.h"
#include "direct.h"
#include "list.h"
#include "recorded_call.h"
#include "special_kernels.h"
#include "special_source.h"

PYMETA_KERNEL_BEGIN

// Tasks of a multiprocessor that the planner tries: each is a warp at least, and of these its registers hold no more. So neither
// the blocks nor the warps that it takes at once are a limit: no device has fewer than 16 and 48.
constexpr int kMostAtOnce = kMultiprocessorRegisters / (kWarp * kBlockRegisters);
static_assert(kMostAtOnce <= 16, "fitting() would have to know the device's limits");
// More threads, or tasks with less memory, only where the model promises this much: it is not exact.
constexpr double kWorthwhile = 0.98;
// Chunks of tasks, at most: ten times as many as an H100 runs at once (792), so that few blocks wait for the last ones.
constexpr std::int64_t kChunks = 8192;
constexpr std::size_t kSumsBytes = std::size_t{128} << 20;
constexpr std::size_t kReserved = 1024;  // shared memory that the system takes of each block

class BlockCall {
 public:
  explicit BlockCall(const Call<Real>& call) : call_(call) {}

  BlockPlan plan(const DeviceFacts& device, int threads, std::size_t block_bytes) const {
    const std::size_t most = block_bytes ? block_bytes : device.block_bytes;
    const Workspace<Block> all_near(call_);
    // A multiprocessor that gets few tasks has all of its memory for them.
    const std::int64_t share = (call_.tasks + device.multiprocessors - 1) / device.multiprocessors;
    Choice best{};
    for (int tasks = 1; tasks <= kMostAtOnce && (tasks == 1 || tasks <= share); ++tasks) {
      const std::size_t budget =
          near_scalars(tasks == 1 ? most : device.multiprocessor_bytes / tasks - kReserved, most);
      const bool fits = all_near.size <= budget;
      const Workspace<Block> workspace(call_, fits ? all_near.size : budget);
      if (tasks > 1 && !is_near(workspace)) break;
      const Choice own =
          threads_for(device, threads, share, workspace, fits ? all_near.size : budget);
      if (tasks == 1 || own.cycles < kWorthwhile * best.cycles) best = own;
    }
    return whole_plan(device, best);
  }

  // `kept`: what an earlier call of the same form left, or null.
  template <class Launcher>
  const char* run(const BlockPlan& plan, const Launcher& launcher, char* memory,
                  BlockFrame& kept) const {
    if (!kept) kept = recorded(plan);
    GivenFrame& frame = *static_cast<GivenFrame*>(kept.get());
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
      if (const char* wrong = run_tasks(plan, launcher, frame)) return wrong;
    if (frame.sums_size == 0 && !call_.mean_loss) return nullptr;
    const int columns = static_cast<int>((frame.sums_size + kReduceColumns - 1) / kReduceColumns);
    return launcher.reduce(columns + 1, launcher.few(kReduceColumns * kReduceGroups), frame);
  }

 private:
  // Frame is GivenFrame: nvcc's front end looks into the branch not taken where nothing in it depends on a parameter, and
  // a family without lists has no numbers.
  template <class Launcher, class Frame>
  const char* run_tasks(const BlockPlan& plan, const Launcher& launcher, const Frame& frame) const {
    if constexpr (Block::Family::kMayBeSpecial && Launcher::kHasSpecial)
      if (specialises()) {
        const SpecialNumbers numbers(call_, frame, plan.threads);
        const SpecialKernel own = special_kernel(launcher.ordinal(), numbers.key(), [&] {
          return numbers.constants() + special_kernel_source;
        });
        return launcher.tasks(plan.blocks, plan.threads, plan.block_bytes, frame, own);
      }
    return launcher.tasks(plan.blocks, plan.threads, plan.block_bytes, frame);
  }

  struct Choice {
    int threads, at_once;
    std::size_t near_scalars;
    double cycles;
  };

  // The cheapest number of threads, as few as come close to it.
  Choice threads_for(const DeviceFacts& device, int given, std::int64_t share,
                     const Workspace<Block>& workspace, std::size_t near) const {
    Choice best{};
    for (int threads = kWarp;; threads *= 2) {
      const int own = given ? given : threads < device.most_threads ? threads : device.most_threads;
      const std::int64_t fit = fitting(device, bytes_of(workspace), own);
      const int at_once = static_cast<int>(share < 1 ? 1 : share < fit ? share : fit);
      const double cycles = CostModel(call_, workspace, own, at_once).cost().cycles(at_once);
      if (best.threads == 0 || cycles < kWorthwhile * best.cycles)
        best = {own, at_once, near, cycles};
      if (given || own == device.most_threads) return best;
    }
  }
  BlockPlan whole_plan(const DeviceFacts& device, const Choice& choice) const {
    BlockPlan p{};
    p.threads = choice.threads;
    p.at_once = choice.at_once;
    p.near_scalars = choice.near_scalars;
    const Workspace<Block> workspace(call_, p.near_scalars);
    p.far_scalars = workspace.size_far;
    p.block_bytes = bytes_of(workspace);
    p.saves = workspace.saves_steps;
    p.chunks = chunks(workspace);
    const std::int64_t resident =
        fitting(device, p.block_bytes, p.threads) * device.multiprocessors;
    p.blocks = static_cast<int>(p.chunks < resident ? p.chunks : resident);
    p.workspace_bytes = sizeof(Real) * (packed_size(workspace) + sums_size(workspace) * p.chunks +
                                        workspace.size_far * p.blocks);
    return p;
  }

  static std::size_t bytes_of(const Workspace<Block>& workspace) {
    return kNearPlace + sizeof(Real) * workspace.size;
  }
  // Blocks of a multiprocessor at once: by shared memory, by registers.
  static std::int64_t fitting(const DeviceFacts& device, std::size_t block_bytes, int threads) {
    const std::size_t warps = static_cast<std::size_t>((threads + kWarp - 1) / kWarp);
    const std::size_t registers = kWarp * warps * (kDouble ? kMostRegisters : kBlockRegisters);
    const std::size_t by_memory = device.multiprocessor_bytes / (block_bytes + kReserved);
    const std::size_t by_registers = kMultiprocessorRegisters / registers;
    const std::size_t fit = by_memory < by_registers ? by_memory : by_registers;
    return fit < 1 ? 1 : static_cast<std::int64_t>(fit);
  }
  // Of the workspace, in so many bytes of shared memory.
  static std::size_t near_scalars(std::size_t bytes, std::size_t most) {
    bytes = bytes < most ? bytes : most;
    return bytes > kNearPlace ? (bytes - kNearPlace) / sizeof(Real) / 16 * 16 : 0;
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

  static bool is_near(const Workspace<Block>& workspace) {
    for (const Place place : {workspace.support, workspace.query, workspace.theta, workspace.v})
      if (place != kNowhere && (place & kFar)) return false;
    return true;
  }

  // What does not depend on where arrays lie: layouts and operations.
  BlockFrame recorded(const BlockPlan& plan) const {
    const auto frame = std::make_shared<GivenFrame>(call_, plan.near_scalars);
    frame->sharing = Sharing::of(plan.at_once, plan.threads);
    make_list(call_, plan.near_scalars, *frame);
    return frame;
  }
  // All else.
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

// Exports the table of this machine, family and Real under the name by which device.cpp knows it; behind run_blocks.
#define PYMETA_BLOCKS_NAME_(machine, family, real) machine##_##family##_blocks_##real
#define PYMETA_BLOCKS_NAME(machine, family, real) PYMETA_BLOCKS_NAME_(machine, family, real)
#define PYMETA_EXPORT_BLOCKS_(name)                                                         \
  namespace pymeta {                                                                        \
  extern const BlockKernels<PYMETA_REAL> name;                                              \
  const BlockKernels<PYMETA_REAL> name = {PYMETA_SPELLED(PYMETA_FAMILY),                    \
                                          PYMETA_ISA::holds<PYMETA_ISA::Block::Family>,     \
                                          PYMETA_ISA::plan_blocks, PYMETA_ISA::run_blocks}; \
  }
#define PYMETA_EXPORT_BLOCKS(machine) \
  PYMETA_EXPORT_BLOCKS_(PYMETA_BLOCKS_NAME(machine, PYMETA_FAMILY, PYMETA_REAL))
