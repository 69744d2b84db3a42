// The block executor as the rest sees it: devices, plans and calls, in plain data.
//
// A device is a GPU by its number, or kEmulated: the same code on threads of the host (a build option, for tests).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../core/call/tasks.h"

namespace pymeta {

constexpr int kEmulated = -1;

struct DeviceFacts {
  std::string name;
  int capability = 0;  // 90 for 9.0
  int multiprocessors = 1;
  int most_threads = 1;         // of a block, for these kernels
  std::size_t block_bytes = 0;  // shared memory that a block can have
  std::size_t multiprocessor_bytes = 0;
};

struct BlockPlan {
  int threads;  // of a block, which is of a task
  int blocks;   // at once
  int at_once;  // of them on a multiprocessor
  std::int64_t chunks;
  std::size_t near_scalars;  // that a task may have in shared memory: what lies there depends on it
  std::size_t block_bytes;   // shared memory of a block
  std::size_t far_scalars;   // of a task, in the workspace
  std::size_t workspace_bytes;  // of the call
  bool saves;                   // the steps' tapes are copied to the workspace and back
};

// What the kernels of a call are given (call.h), in the type of the family that runs it; null: not made yet.
using BlockFrame = std::shared_ptr<void>;

// One instance for each machine, family of calls (families.h) and Real (blocks.h).
template <class Real>
struct BlockKernels {
  const char* family;
  bool (*holds)(const Call<Real>&);  // is the call of this family?
  BlockPlan (*plan)(const Call<Real>&, const DeviceFacts&, int threads, std::size_t block_bytes);
  // Null, or what went wrong. `kept` is null, and the frame is put there, or it is the frame of a call that has the same plan.
  const char* (*run)(const Call<Real>&, const BlockPlan&, std::uintptr_t stream, char* workspace,
                     BlockFrame& kept);
};

// Why the CUDA executor cannot run in this process; empty where it can.
const std::string& cuda_reason();
int device_count();
bool emulates();
// Throws std::invalid_argument where there is no such device.
const DeviceFacts& device_facts(int ordinal);

// Why blocks cannot run a network of this description; empty where they can.
std::string unfit_for_blocks(const Network& network, const Loss& loss);

// For tests and tuning: threads and shared memory of a block instead of the planner's choice; 0: its choice.
struct BlockOptions {
  int threads = 0;
  std::size_t bytes = 0;
  int first_family = 0;  // those before it are not asked

  bool operator==(const BlockOptions& other) const {
    return threads == other.threads && bytes == other.bytes && first_family == other.first_family;
  }
};
BlockOptions block_options();
std::vector<std::string> block_family_names();  // by name, in the order in which they are asked
void set_block_options(const BlockOptions& options);  // throws std::invalid_argument

// The call on a device; addresses in it are the device's. Call::max_support and its like are known, and what can be known
// without looking at the device's data was checked.
template <class Real>
BlockPlan plan_on(int ordinal, const Call<Real>& call);
// The name of the family whose kernel runs the call.
template <class Real>
const char* family_on(int ordinal, const Call<Real>& call);
// A frame that is kept from call to call, and by whom it was made.
struct KeptFrame {
  BlockFrame frame;
  const void* kernels = nullptr;
};
// Throws std::runtime_error. `kept` is empty, or what an earlier call with this plan left.
template <class Real>
void run_on(int ordinal, std::uintptr_t stream, char* workspace, const BlockPlan& plan,
            const Call<Real>& call, KeptFrame& kept);

}  // namespace pymeta
