// Which convolutions are done by Winograd's minimal filtering (cpu/winograd.h), where an executor can.
//
// F(2x2, 3x3) makes four outputs with 16 multiplications instead of 36. It pays where a tile of outputs is rarely cut off and where
// there are enough channels for the transforms not to count. The shape alone decides, so that a task's bits are its own.
#pragma once

#include "../call/network.h"

namespace pymeta {

constexpr int kWinogradChannels = 16;  // at least, on both sides
constexpr int kWinogradPositions = 8;  // of the outputs, along both axes

PYMETA_MEMBER inline bool suits_winograd(const Layer& layer) {
  const Window& w = layer.window;
  const bool plain = w.height == 3 && w.width == 3 && w.stride_y == 1 && w.stride_x == 1 &&
                     w.dilation_y == 1 && w.dilation_x == 1 && w.groups == 1;
  return plain && layer.in.channels >= kWinogradChannels &&
         layer.out.channels >= kWinogradChannels && layer.out.height >= kWinogradPositions &&
         layer.out.width >= kWinogradPositions;
}

// The share of a direct convolution's multiplications that are left.
PYMETA_MEMBER inline double winograd_share(const Layer& layer) {
  const int tiles = (layer.out.height + 1) / 2 * ((layer.out.width + 1) / 2);
  return 16.0 * tiles / (9.0 * layer.out.positions());
}

}  // namespace pymeta
