// The network as plain data: a chain of layers, each followed by an activation.
//
// An nn.Sequential of Linear, normalisation and activation modules becomes `layers`: an activation module is
// folded into the layer before it, or stands alone as a `LayerKind::none` layer where there is none. Parameter
// tensors are numbered in torch's order (for each layer the weight, then the bias). True on every machine; no
// executor, no SIMD, no Python.
#pragma once

#include <cstdint>

#include "portable.h"

namespace pymeta {

enum class LayerKind : std::uint8_t { linear, batch_norm, layer_norm, none };

enum class ActivationKind : std::uint8_t {
  identity,
  relu,
  leaky_relu,
  elu,
  tanh,
  sigmoid,
  silu,
  gelu,
  gelu_tanh,
  softplus,
};

struct Activation {
  ActivationKind kind = ActivationKind::identity;
  double alpha = 0;      // leaky_relu: negative slope; elu: alpha; softplus: beta
  double threshold = 0;  // softplus: linear where beta * z exceeds it
};

struct Layer {
  LayerKind kind = LayerKind::none;
  Activation activation;
  int in = 0;  // features; in == out except for linear layers
  int out = 0;
  double eps = 0;   // of the normalisations
  int weight = -1;  // number of the parameter tensor, -1 where the layer has none
  int bias = -1;
};

struct Tensor {
  int rows =
      1;  // [rows, columns] as torch stores it: a linear weight is [out, in], all others [1, features]
  int columns = 0;
  bool matrix = false;
};

// A chain of layers that lie in somebody's memory.
struct Network {
  int layer_count = 0;
  int tensor_count = 0;
  const Layer* layers = nullptr;    // [layer_count]
  const Tensor* tensors = nullptr;  // [tensor_count]

  PYMETA_FN int in_features() const { return layers[0].in; }
  PYMETA_FN int out_features() const { return layers[layer_count - 1].out; }
  PYMETA_FN bool has_batch_norm() const {
    for (int l = 0; l < layer_count; ++l)
      if (layers[l].kind == LayerKind::batch_norm) return true;
    return false;
  }
};

constexpr int kMaxLayers = 128;
constexpr int kMaxTensors = 2 * kMaxLayers;

// One with its layers.
struct OwnedNetwork {
  Layer layers[kMaxLayers];
  Tensor tensors[kMaxTensors];
  Network network{0, 0, layers, tensors};

  OwnedNetwork() = default;
  explicit OwnedNetwork(const Network& from) { copy(from); }
  OwnedNetwork(const OwnedNetwork& from) { copy(from.network); }
  OwnedNetwork& operator=(const OwnedNetwork& from) {
    if (this != &from) copy(from.network);
    return *this;
  }

 private:
  void copy(const Network& from) {
    for (int l = 0; l < from.layer_count; ++l) layers[l] = from.layers[l];
    for (int t = 0; t < from.tensor_count; ++t) tensors[t] = from.tensors[t];
    network = {from.layer_count, from.tensor_count, layers, tensors};
  }
};

enum class LossKind : std::uint8_t { mse, huber, cross_entropy, bce_with_logits };

// A row's loss, before the weighted mean over the rows of a set (losses.h).
struct Loss {
  LossKind kind = LossKind::mse;
  double delta = 1;                  // huber
  double label_smoothing = 0;        // cross_entropy
  std::int64_t ignore_index = -100;  // cross_entropy: rows with this label weigh nothing
  const double* weight =
      nullptr;  // [out] class weights (cross_entropy) or output weights (bce), or null
  const double* pos_weight = nullptr;  // [out] bce_with_logits, or null
};

}  // namespace pymeta
