// What a task of a call costs a multiprocessor, by a model: what the planner (blocks.h) compares choices by.
//
// Three things bound the time of a task: the wavefronts of shared memory and the instructions of all warps, which the tasks of a
// multiprocessor share, and how long one task takes by itself, of which as many run at once as fit. Not measured: tile counts are
// exact, what an operation costs besides is counted on the emulated device (bench/block_report.py), cycles are the architecture's.
#pragma once

#include "block.h"

PYMETA_KERNEL_BEGIN

struct TaskCost {
  double wavefronts = 0;    // cycles of shared memory
  double instructions = 0;  // of all warps
  double path = 0;          // cycles of a task alone

  // Cycles of the multiprocessor for each task, where so many are there at once.
  double cycles(int at_once) const {
    const double shared =
        wavefronts > instructions / kSchedulers ? wavefronts : instructions / kSchedulers;
    return shared > path / at_once ? shared : path / at_once;
  }
  static constexpr double kSchedulers = 4;
};

class CostModel {
 public:
  CostModel(const Call<Real>& call, const Workspace<Block>& workspace, int threads, int at_once)
      : sharing_(Sharing::of(at_once, threads)), threads_(threads) {
    const Network& network = *call.network;
    const bool minibatches = call.batches.size > 0 && call.batches.size < call.max_support;
    const int rows = minibatches ? call.batches.size : call.max_support;
    const double steps = static_cast<double>(call.steps_of(call.max_support));
    const bool gradient = call.wants_gradient();
    for (int l = 0; l < network.layer_count; ++l) {
      const Layer& layer = network.layers[l];
      const bool narrow = workspace.parameters.narrow && l == network.layer_count - 1;
      pass(layer, narrow, l > 0, rows, 1, steps, true);
      if (call.second_order()) pass(layer, narrow, l > 0, rows, 2, steps, true);
      pass(layer, narrow, l > 0, call.max_query, 1, 1, gradient);
    }
    if (workspace.stores_gradient) follow_rule(call, workspace.parameters.size, steps);
    if (workspace.saves_steps) copy(2 * workspace.size_far);
  }
  const TaskCost& cost() const { return cost_; }

 private:
  // A layer forward and back; `terms` is 2 in a tangent pass.
  void pass(const Layer& layer, bool narrow, bool has_below, int rows, int terms, double times,
            bool backward) {
    if (times == 0 || rows == 0) return;
    const int in = layer.in.channels, out = layer.out.channels;
    const double back = backward ? times : 0, below = has_below ? back : 0;
    if (layer.kind == LayerKind::linear && !narrow) {
      const bool fragments = Block::Family::kFragments && has_fragments(in, out);
      product(rows, out, 1.0 * terms * in, times, false, fragments);
      product(rows, in, 1.0 * terms * out, below, false, fragments);
      product(in, out, 1.0 * terms * rows, back, true, fragments);
      operations(back);  // the bias
      return;
    }
    // A thread for each output, or for each part of a narrow one's sum.
    const bool multiplies =
        layer.weight >= 0 && layer.window.taps() * in > 1 &&
        (narrow || layer.kind == LayerKind::conv1d || layer.kind == LayerKind::conv2d);
    const double outputs = static_cast<double>(rows) * layer.out.features();
    const double depth = multiplies ? terms * in / layer.window.groups * layer.window.taps() : 2;
    elements(outputs * depth, times + below + back);
    operations(times + below + back);
  }

  void product(int all_rows, int all_columns, double depth, double times, bool may_be_wide,
               bool fragments) {
    if (times == 0) return;
    // Tiles are counted in ints; of larger ones the cost grows in proportion.
    constexpr int most = 1 << 14;
    const int rows = all_rows < most ? all_rows : most;
    const int columns = all_columns < most ? all_columns : most;
    times *= static_cast<double>(all_rows) / rows * all_columns / columns;
    if (fragments) return by_fragments(rows, columns, depth, times);
    const int height = tile_height(rows, columns, sharing_, may_be_wide);
    const double steps = times * depth / 4, dealt = warp_tiles(rows, columns, height);
    cost_.wavefronts += steps * dealt * tile_wavefronts(height);
    cost_.instructions += steps * dealt * tile_instructions(height);
    cost_.path += steps * sharing_.turns(static_cast<int>(dealt)) * tile_cycles(height);
    operations(times);
  }
  void by_fragments(int rows, int columns, double depth, double times) {
    const int height = fragment_height(rows, columns, sharing_);
    const int tiles = fragment_tiles(rows, columns, height);
    const double steps = times * depth / 8;
    cost_.wavefronts +=
        tiles * (steps * fragment_wavefronts(height) + times * fragment_end_wavefronts(height));
    cost_.instructions += steps * tiles * fragment_slots(height);
    cost_.path += steps * sharing_.turns(tiles) * fragment_cycles(height);
    operations(times);
  }
  // Steps of an optimiser's rule, and the way back through them: number by number, divisions and roots among them.
  void follow_rule(const Call<Real>& call, std::size_t parameters, double steps) {
    constexpr double instructions = 60, cycles = 240;
    const double times = steps * (call.reverses() ? 3 : 1);
    const double each = static_cast<double>(parameters);
    cost_.instructions += times * instructions * each / kWarp;
    cost_.path += times * cycles * (each > threads_ ? each / threads_ : 1);
    operations(times);
  }
  // So many multiply-adds by all threads, one after the other in each.
  void elements(double each, double times) {
    constexpr double instructions = 4, cycles = 12;
    cost_.instructions += times * instructions * each / kWarp;
    cost_.path += times * cycles * (each > threads_ ? each / threads_ : 1);
  }
  // To the workspace and back, four quads of each thread at once (Block::copy).
  void copy(std::size_t scalars) {
    constexpr double quads = 4, round_trip = 600;
    cost_.path += static_cast<double>(scalars) / 4 / (quads * threads_) * round_trip;
  }
  // What every operation costs beside its numbers: finding its arrays, and a barrier. Warps that have no share of it go on, so that
  // the busiest has 290 instructions, of six cycles each where nothing else hides them, and the mean warp fewer.
  void operations(double count) {
    constexpr double instructions = 170, cycles = 1740;
    cost_.instructions += count * instructions * sharing_.warps;
    cost_.path += count * cycles;
  }

  const Sharing sharing_;
  const int threads_;
  TaskCost cost_;
};

PYMETA_KERNEL_END
