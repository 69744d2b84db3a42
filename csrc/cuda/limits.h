// What fits into a kernel's parameters (cuda/call.h).
#pragma once

namespace pymeta {

constexpr int kBlockLayers = 16;
constexpr int kBlockWeights = 32;  // of classes or outputs
constexpr int kBlockThreads =
    256;  // more would leave each fewer registers than product.h's tiles want

}  // namespace pymeta
