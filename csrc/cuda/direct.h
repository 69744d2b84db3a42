// A block runs the algorithms of core/ themselves, task by task.
#pragma once

#include "call.h"

PYMETA_KERNEL_BEGIN

template <>
struct TaskFrame<false> : Frame {
  using Frame::Frame;
};

PYMETA_FN inline void run_tasks(const TaskFrame<false>& given) {
  const Frame& frame = own_frame(given);
  const Call<Real>& call = frame.call;
  const Workspace<Block>& workspace = frame.workspace;
  const Memory memory = own_memory(frame);
  for (std::int64_t chunk = block_index(); chunk < frame.chunks; chunk += block_count()) {
    Real* sums = frame.sums + chunk * static_cast<std::int64_t>(frame.sums_size);
    Totals totals{sums, sums + frame.gradient_sums, true, workspace.parameters.size};
    Block::for_vectors(frame.lr_sums, [&](std::size_t i) { totals.lr_gradient[i] = 0; });
    InnerLoop<Block> loop(call, workspace, frame.shared, memory);
    const std::int64_t first = chunk * frame.tasks_per_chunk;
    for (std::int64_t task = first; task < first + frame.tasks_per_chunk && task < call.tasks;
         ++task) {
      TaskArrays<Block> arrays(call, workspace, frame.shared, memory, task);
      ItemJob<Block, TaskArrays<Block>>(call, workspace, frame.shared, memory, loop, arrays, totals)
          .run();
      totals.fresh = false;
      sync();  // before the next task's rows take the place of this one's
    }
  }
}

PYMETA_KERNEL_END
