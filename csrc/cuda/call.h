// One call on blocks: what a kernel is given, and the three kernels of a call.
//
//   pack_start    the start in the executor's layout, with rates and Adam's corrections
//   run_tasks     every task, all steps, query loss and reverse sweep: a block takes a chunk of tasks after the other and
//                 leaves the sum of their gradients for each chunk
//   reduce_sums   the chunks' sums, added in a fixed order, and the mean loss
// A chunk is a fixed run of tasks; how many there are depends on the call alone, and so does every bit of the result.
// Everything that a kernel needs to know travels in its parameters: a call copies nothing to the device.
#pragma once

#include "task_arrays.h"

PYMETA_KERNEL_BEGIN

constexpr int kMostTensors = 2 * kMostLayers;
constexpr bool kCopiesLayers = !Block::Family::kLists;  // the passes look at them all the time

// What a loss points to.
struct LossArrays {
  double weight[kBlockWeights], pos_weight[kBlockWeights], levels[kBlockWeights];

  void copy(const Loss& loss, int out) {
    for (int o = 0; o < out && o < kBlockWeights; ++o) {
      if (loss.weight) weight[o] = loss.weight[o];
      if (loss.pos_weight) pos_weight[o] = loss.pos_weight[o];
    }
    for (int k = 0; loss.levels && k < loss.level_count && k < kBlockWeights; ++k)
      levels[k] = loss.levels[k];
  }
  PYMETA_FN void put_into(Loss& loss) const {
    if (loss.weight) loss.weight = weight;
    if (loss.pos_weight) loss.pos_weight = pos_weight;
    if (loss.levels) loss.levels = levels;
  }
};

// Pointers of `call` to what lies in the frame itself are set where it is read (Frame::settle).
struct Frame {
  Call<Real> call;
  Network network;
  Loss losses[3];  // of the support, query and validation sets
  // Of a block's own copy, where calls are lists:
  Real* memories[4];  // operations.h: Lies
  Memory memory;      // the first two
  int rows[2];        // of the task's support and query sets, or of what a step has of them

  // Where calls are lists, what follows is read where it is.
  Layer layers[kMostLayers];
  bool adapted[kMostTensors];
  bool per_task[kMostTensors];
  int groups[kMostTensors];
  Workspace<Block> workspace;
  Shared shared;
  Real* sums;  // [chunks, sums_size]: gradients, then those of the learning rate
  std::size_t sums_size, gradient_sums, lr_sums;
  std::int64_t chunks, tasks_per_chunk;
  Sharing sharing;
  Real* far;  // [blocks, workspace.size_far]

  // What follows is read where it is by all.
  LossArrays arrays[2];  // of the support and validation sets' losses, and of the query set's
  const Real* parameters[kMostTensors];
  Real* gradients[kMostTensors];
  Real* adapted_parameters[kMostTensors];
  const Real* adapted_cotangents[kMostTensors];
  Real* packed;  // the start, as `shared` points to it

  PYMETA_FN void lies_in(const Memory& lies, const Real* start, Real* chunk_sums) {
    memory = lies;
    memories[0] = lies.near;
    memories[1] = lies.far;
    memories[2] = const_cast<Real*>(start);
    memories[3] = chunk_sums;
  }

  Frame(const Call<Real>& described, std::size_t near) : workspace(described, near) {}

  // `lies` is the frame as it was given: where the part that is not copied lies.
  PYMETA_FN void settle(const Frame& lies) {
    const Frame& middle = kCopiesLayers ? *this : lies;
    network.layers = middle.layers;
    call.network = &network;
    RowSet<Real>* const sets[] = {&call.support, &call.query, &call.validation};
    for (int i = 0; i < 3; ++i) {
      lies.arrays[i == 1].put_into(losses[i]);
      sets[i]->loss = &losses[i];
    }
    call.loss = &losses[0];
    call.adapted = middle.adapted;
    call.lr.groups = middle.groups;
    call.parameters = lies.parameters;
    if (call.parameter_per_task) call.parameter_per_task = middle.per_task;
    if (call.gradients) call.gradients = const_cast<Real* const*>(lies.gradients);
    if (call.cotangents.adapted) call.cotangents.adapted = lies.adapted_cotangents;
    if (call.adapted_parameters)
      call.adapted_parameters = const_cast<Real* const*>(lies.adapted_parameters);
  }
};

// Of the frame, into each block's shared memory.
constexpr std::size_t kFrameCopied =
    kCopiesLayers ? offsetof(Frame, arrays) : offsetof(Frame, layers);
static_assert(kFrameCopied % sizeof(double) == 0, "copied in words");
static_assert(sizeof(Frame) <= 11264, "a kernel's parameters");

// Shared memory: what products ask for, the scratch, the block's frame, then the near memory of the workspace.
constexpr std::size_t kFramePlace = sizeof(Sharing) + sizeof(Real) * Block::kScratch;
constexpr std::size_t kNearPlace = (kFramePlace + kFrameCopied + 63) / 64 * 64;

// Where the arrays of a block's tasks lie.
PYMETA_FN inline Memory own_memory(const Frame& frame) {
  return {reinterpret_cast<Real*>(shared_memory() + kNearPlace),
          frame.far + block_index() * frame.workspace.size_far};
}

// What each block has of the frame.
PYMETA_FN inline Frame& block_frame() {
  return *reinterpret_cast<Frame*>(shared_memory() + kFramePlace);
}
PYMETA_FN inline Frame& own_frame(const Frame& given) {
  Frame& own = block_frame();
  const double* from = reinterpret_cast<const double*>(&given);
  double* to = reinterpret_cast<double*>(&own);
  Block::for_indices(static_cast<int>(kFrameCopied / sizeof(double)),
                     [&](int i) { to[i] = from[i]; });
  if (thread_index() == 0) {
    own.settle(given);
    sharing() = given.sharing;
  }
  sync();
  return own;
}

// What the kernel of a family is given: more where all of its calls are lists (list.h, direct.h).
template <bool kLists>
struct TaskFrame;

// ---- before and after ------------------------------------------------------------------------------------------

// The element of torch's tensor that belongs at (outer, inner) of the packed one.
PYMETA_FN inline std::size_t index_in_torch(const PackedTensor& p, int outer, int inner) {
  return p.transposed ? static_cast<std::size_t>(inner) * p.outer + outer
                      : static_cast<std::size_t>(outer) * p.inner + inner;
}

// visit(tensor, outer, inner) of a place among the packed parameters; nothing for padding.
template <class Visitor>
PYMETA_FN void at_place(const Frame& frame, std::size_t place, Visitor visit) {
  for (int t = 0; t < frame.network.tensor_count; ++t) {
    const PackedTensor& p = frame.workspace.parameters.tensors[t];
    if (place < p.place || place >= p.place + p.scalars()) continue;
    const int outer = static_cast<int>((place - p.place) / p.row),
              inner = static_cast<int>((place - p.place) % p.row);
    if (inner < p.inner) visit(t, p, outer, inner);
    return;
  }
}
// The first column of each tensor's own among the rates of all adapted elements.
PYMETA_FN inline std::size_t first_rate(const Frame& frame, int tensor) {
  std::size_t first = 0;
  for (int t = 0; t < tensor; ++t) {
    const PackedTensor& p = frame.workspace.parameters.tensors[t];
    if (frame.adapted[t]) first += p.elements();
  }
  return first;
}

// packed: [parameters], [lr.rows, parameters] where rates are per element, [steps, 2] corrections
PYMETA_FN inline void pack_start(const Frame& frame) {
  const Call<Real>& call = frame.call;
  const std::size_t size = frame.workspace.parameters.size;
  const std::size_t rates = frame.workspace.rate_scalars(call);
  const std::size_t all = size + rates + call.corrections();
  const std::size_t first =
      static_cast<std::size_t>(block_index()) * thread_count() + thread_index();
  const std::size_t threads = static_cast<std::size_t>(block_count()) * thread_count();
  for (std::size_t i = first; i < all; i += threads) {
    if (i >= size + rates) {
      // Each by itself: the CPU multiplies its way up.
      const std::size_t k = i - size - rates;
      const double t = static_cast<double>(k + 1);
      put_correction(call.optimizer, ::pow(call.optimizer.beta1, t),
                     ::sqrt(1 - ::pow(call.optimizer.beta2, t)),
                     frame.packed + size + rates + 2 * k);
      continue;
    }
    Real value = 0;
    at_place(frame, i % size, [&](int t, const PackedTensor& p, int outer, int inner) {
      const std::size_t index = index_in_torch(p, outer, inner);
      if (i < size)
        value = call.parameter_per_task && frame.per_task[t] ? Real(0) : frame.parameters[t][index];
      else if (frame.adapted[t])
        value = call.lr.values[(i / size - 1) * call.lr.columns + first_rate(frame, t) + index];
    });
    frame.packed[i] = value;
  }
}

constexpr int kReduceColumns = 32, kReduceGroups = 8;  // of a block of threads

// Of `count` things, how many are first, first + step, first + 2 step...
PYMETA_FN inline int share_of(std::int64_t count, int first, int step) {
  return count > first ? static_cast<int>((count - first + step - 1) / step) : 0;
}

// from[0] + from[step] + ..., `count` of them in this order. No load waits for a sum, so a batch of them is on its way at once: one
// by one each would take as long as memory does.
template <class Sum>
PYMETA_FN Sum sum_in_order(const Real* from, std::size_t step, int count) {
  constexpr int batch = 32;
  Sum sum = 0;
#pragma unroll 1
  for (; count > 0; count -= batch) {
    Real loaded[batch];
#pragma unroll
    for (int k = 0; k < batch; ++k, from += step)
      if (k < count) loaded[k] = *from;
#pragma unroll
    for (int k = 0; k < batch; ++k)
      if (k < count) sum += static_cast<Sum>(loaded[k]);
  }
  return sum;
}

// A group of threads adds every eighth chunk of a column, then one adds the groups. The last block has the mean loss.
PYMETA_FN inline void reduce_sums(const Frame& frame) {
  const Call<Real>& call = frame.call;
  double* partial = reinterpret_cast<double*>(shared_memory());
  constexpr int all = kReduceColumns * kReduceGroups;
  if (block_index() == block_count() - 1) {
    if (!call.mean_loss) return;
    Block::for_indices(all, [&](int i) {
      partial[i] = sum_in_order<double>(call.losses + i, all, share_of(call.tasks, i, all));
    });
    if (thread_index() == 0) {
      double sum = 0;
      for (int i = 0; i < all; ++i) sum += partial[i];
      *call.mean_loss = Real(sum / static_cast<double>(call.tasks > 0 ? call.tasks : 1));
    }
    return;
  }
  const std::size_t first = static_cast<std::size_t>(block_index()) * kReduceColumns;
  Real* sums = reinterpret_cast<Real*>(partial);  // [groups, columns]
  Block::for_indices(all, [&](int i) {
    const std::size_t column = first + i % kReduceColumns;
    const int group = i / kReduceColumns;
    const int count = column < frame.sums_size ? share_of(frame.chunks, group, kReduceGroups) : 0;
    sums[i] = sum_in_order<Real>(frame.sums + group * frame.sums_size + column,
                                 kReduceGroups * frame.sums_size, count);
  });
  Block::for_indices(kReduceColumns, [&](int c) {
    const std::size_t column = first + c;
    if (column >= frame.gradient_sums + frame.lr_sums) return;
    Real sum = sums[c];
    for (int g = 1; g < kReduceGroups; ++g) sum += sums[g * kReduceColumns + c];
    sum = sum / call.divisor();
    if (column < frame.gradient_sums) {
      at_place(frame, column, [&](int t, const PackedTensor& p, int outer, int inner) {
        if (frame.gradients[t] && !(call.parameter_per_task && frame.per_task[t]))
          frame.gradients[t][index_in_torch(p, outer, inner)] = sum;
      });
    } else if (!call.lr.per_element) {
      call.lr_gradient[column - frame.gradient_sums] = sum;
    } else {
      const std::size_t size = frame.workspace.parameters.size;
      const std::size_t at = column - frame.gradient_sums;
      at_place(frame, at % size, [&](int t, const PackedTensor& p, int outer, int inner) {
        if (frame.adapted[t])
          call.lr_gradient[at / size * call.lr.columns + first_rate(frame, t) +
                           index_in_torch(p, outer, inner)] = sum;
      });
    }
  });
}

PYMETA_KERNEL_END
