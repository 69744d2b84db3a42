// The network as plain data: a chain of layers, each followed by an activation.
//
// An nn.Sequential of Linear, normalisation and activation modules becomes `layers`: an activation module is
// folded into the layer before it, or is a layer of its own where that has one already. Parameter
// tensors are numbered in torch's order (for each layer the weight, then the bias). True on every machine; no
// executor, no SIMD, no Python.
#pragma once

#include <cstdint>

#include "../portable.h"

namespace pymeta {

enum class LayerKind : std::uint8_t;       // layers/registry.h
enum class ActivationKind : std::uint8_t;  // activations.h
enum class LossKind : std::uint8_t;        // losses/registry.h

struct Activation {
  ActivationKind kind{};  // identity
  double alpha = 0;       // leaky_relu: negative slope; elu: alpha; softplus: beta; affine: factor
  double threshold = 0;   // softplus: linear where beta * z exceeds it; affine: what is added
};

// One row of a layer's input or output: a vector of features is 1 x 1 x channels, a row of an image's channels
// height x width x channels, a sequence's 1 x width x channels. The rows of a set lie position by position, as a matrix
// [height, width, rows] x channels: what works on features works on channels, only with more rows.
struct Shape {
  int height = 1, width = 1, channels = 0;

  PYMETA_MEMBER int positions() const { return height * width; }
  PYMETA_MEMBER int features() const { return height * width * channels; }
  bool operator!=(const Shape& other) const {
    return height != other.height || width != other.width || channels != other.channels;
  }
};

// Which inputs an output of a convolution or a pooling sees: output (y, x) sees the inputs (y stride - top + k dilation, ...)
// of k < height, where there are such. Its taps are numbered row by row.
struct Window {
  int height = 1, width = 1;
  int stride_y = 1, stride_x = 1;
  int top = 0, left = 0;
  int dilation_y = 1, dilation_x = 1;
  int groups = 1;   // of a convolution: so many products side by side
  int divisor = 0;  // of an average: 0 for the number of inputs that there are

  PYMETA_MEMBER int taps() const { return height * width; }
};

constexpr int kMostTaps = 256;  // of a convolution

// Which feature of its input an embedding looks up, and where that lies in the caller's rows; or the first of the channels that
// are taken (layers/concatenation.h).
struct Lookup {
  int feature = 0, column = 0;
  int categories = 0;
};

struct Layer {
  LayerKind kind{};
  Activation activation;
  Shape in, out;
  Window window;
  double eps = 0;   // of the normalisations
  int weight = -1;  // number of the parameter tensor, -1 where the layer has none
  int bias = -1;
  int steps =
      0;  // its tensors are [steps, channels], a row for each inner step; 0: the same in all
  // Of branches (layers/branches.h), -1 where there is none: the layer whose output it reads besides the one before it; of the
  // layers that read its own so the first, and the next one that reads what it reads.
  std::int16_t other_output = -1, first_reader = -1, next_reader = -1;
  bool other_is_single =
      false;  // a sum's or a product's other term has one position, while there are more
  bool other_is_last = false;  // a concatenation's
  Lookup lookup;
};

// Layer `reader` reads what layer `source`, before it, gives.
inline void link_reader(Layer* layers, int reader, int source) {
  layers[reader].other_output = static_cast<std::int16_t>(source);
  std::int16_t* place = &layers[source].first_reader;
  while (*place >= 0) place = &layers[*place].next_reader;
  *place = static_cast<std::int16_t>(reader);
}

struct Tensor {
  int rows =
      1;  // [rows, columns] as torch stores it: a linear weight is [out, in], all others [1, features]
  int columns = 0;
  bool matrix = false;
  int height = 0,
      width = 0;  // of a convolution, whose columns are [in, height, width]; 0 where torch has none
};

// A chain of layers that lie in somebody's memory.
struct Network {
  int layer_count = 0;
  int tensor_count = 0;
  const Layer* layers = nullptr;    // [layer_count]
  const Tensor* tensors = nullptr;  // [tensor_count]

  PYMETA_MEMBER int in_features() const { return layers[0].in.features(); }
  PYMETA_MEMBER int out_features() const { return layers[layer_count - 1].out.features(); }
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

// A row's loss, before the weighted mean over the rows of a set (losses/).
struct Loss {
  LossKind kind{};                   // mse
  double delta = 1;                  // huber
  double label_smoothing = 0;        // cross_entropy
  std::int64_t ignore_index = -100;  // cross_entropy: rows with this label weigh nothing
  const double* weight =
      nullptr;  // [out] class weights (cross_entropy) or output weights (bce), or null
  const double* pos_weight = nullptr;  // [out] bce_with_logits, or null
  const double* levels = nullptr;      // [level_count] quantile: those predicted of each target
  int level_count = 1;
  double dof = 1;       // student_t_nll: degrees of freedom
  double constant = 0;  // added to the loss of each target (LossSpec)
};

}  // namespace pymeta
