// What the tasks of a stack have of their own (algorithms/stacked.h), and where it lies in a workspace.
#pragma once

#include "../layers/registry.h"
#include "places.h"

PYMETA_KERNEL_BEGIN

// Arrays of one layer are as large as the largest layer's.
struct StackLayout {
  Place weight, bias;              // of one task's one layer
  Place gram;                      // [support rows, stride(query rows)] of one task
  Place grams[kMostLayers];        // of each layer's deltas, of all tasks; of layers with one below
  Place narrow, narrow_direction;  // a narrow last layer's weights, of all tasks

  template <class X>
  void lay_out(Places& places, const Network& network, bool last_is_narrow, int tasks,
               int support_rows, int query_rows) {
    const std::size_t columns = X::stride(query_rows), of_task = support_rows * columns;
    std::size_t largest = 0, widest = 0, of_narrow = 0;
    const auto larger = [](std::size_t a, std::size_t b) { return a > b ? a : b; };
    for (int l = 0; l < network.layer_count; ++l) {
      const Layer& layer = network.layers[l];
      const std::size_t in = layer.in.channels, out = layer.out.channels;
      const bool narrow = last_is_narrow && l == network.layer_count - 1;
      const bool wide = layer.kind == LayerKind::linear && !narrow;
      if (wide) largest = larger(largest, in * X::stride(layer.out.channels));
      if (wide) widest = larger(widest, X::stride(layer.out.channels));
      if (narrow) of_narrow = out * X::stride(layer.in.channels);
      grams[l] = places.take_if(wide && l > 0, tasks * of_task);
    }
    weight = places.take(largest);
    bias = places.take(widest);
    gram = places.take(of_task);
    narrow = places.take(tasks * of_narrow);
    narrow_direction = places.take(tasks * of_narrow);
  }
};

struct NoStack {};

PYMETA_KERNEL_END
