// What fits into a kernel's parameters (cuda/call.h) and into a multiprocessor.
#pragma once

namespace pymeta {

// Layers of a network, by family (families.h): where calls are lists, these take the parameters' room.
namespace block_layers {
constexpr int every = 24, chains = 16, plain = chains, tensor = plain;
}
constexpr int kBlockWeights = 32;  // of classes or outputs
constexpr int kBlockThreads =
    256;  // more would leave each fewer registers than product.h's tiles want
// Of a thread, by the kernels' launch bounds: two blocks of that size in float, one in double.
constexpr int kMultiprocessorRegisters = 65536;
constexpr int kBlockRegisters = 128, kMostRegisters = 255;

}  // namespace pymeta
