// Networks for the native tests, layer by layer.
#pragma once

#include "../core/layers/registry.h"

namespace pymeta::testing {

struct Chain {
  OwnedNetwork owned;

  const Network& network() const { return owned.network; }

  Chain& linear(int in, int out, bool bias = true) {
    Layer& layer = append(LayerKind::linear, {1, 1, in}, {1, 1, out});
    layer.weight = tensor({out, in, true});
    if (bias) layer.bias = tensor({1, out, false});
    return *this;
  }
  Chain& norm(LayerKind kind, int features, double eps = 1e-3) {
    const Shape shape = network().layer_count > 0 ? last() : Shape{1, 1, features};
    Layer& layer = append(kind, shape, shape);
    layer.eps = eps;
    layer.weight = tensor({1, features, false});
    layer.bias = tensor({1, features, false});
    return *this;
  }
  // Over all channels and positions, with a scale and a shift of each element.
  Chain& image_norm(double eps = 1e-3) {
    const Shape shape = last();
    Layer& norm = append(LayerKind::group_norm, shape, shape);
    norm.eps = eps;
    norm.window.groups = 1;
    Layer& affine = append(LayerKind::elementwise_affine, shape, shape);
    affine.weight = tensor({shape.channels, shape.positions(), true, 0, shape.width});
    affine.bias = tensor({shape.channels, shape.positions(), true, 0, shape.width});
    return *this;
  }
  Chain& act(ActivationKind kind, double alpha = 0, double threshold = 0) {
    Layer* last = &owned.layers[network().layer_count - 1];
    if (last->activation.kind != ActivationKind::identity)
      last = &append(LayerKind::lone_activation, last->out, last->out);
    last->activation = {kind, alpha, threshold};
    return *this;
  }

  Chain& image(const Shape& shape) {
    append(LayerKind::image, {1, 1, shape.features()}, shape);
    return *this;
  }
  Chain& flatten() {
    append(LayerKind::flatten, last(), {1, 1, last().features()});
    return *this;
  }
  Chain& conv(int out, const Window& window, bool bias = true) {
    const int in = last().channels;
    Layer& layer = append(LayerKind::conv2d, last(), windowed(window, out));
    layer.window = window;
    layer.weight =
        tensor({out, in / window.groups * window.taps(), true, window.height, window.width});
    if (bias) layer.bias = tensor({1, out, false});
    return *this;
  }
  Chain& pool(LayerKind kind, const Window& window) {
    append(kind, last(), windowed(window, last().channels)).window = window;
    return *this;
  }
  // What layer `source` gave, once more.
  Chain& recall(int source) {
    append(LayerKind::recall, last(), owned.layers[source].out);
    return reads(source);
  }
  // The sum or the product of what layer `source` gave and x.
  Chain& combine(LayerKind kind, int source) {
    const Shape own = last(), other = owned.layers[source].out;
    append(kind, own, other.positions() > own.positions() ? other : own).other_is_single =
        other.positions() < own.positions();
    return reads(source);
  }
  Chain& concatenate(int source, bool is_last) {
    Shape out = last();
    out.channels += owned.layers[source].out.channels;
    append(LayerKind::concatenate, last(), out).other_is_last = is_last;
    return reads(source);
  }
  Chain& channels(int first, int count) {
    Shape out = last();
    out.channels = count;
    append(LayerKind::channels, last(), out).lookup.feature = first;
    return *this;
  }
  // The normalisation before, its ReLU and this in one.
  Chain& pool_norm(const Window& window) {
    const Shape out = windowed(window, last().channels);
    Layer& norm = owned.layers[network().layer_count - 1];
    norm.kind = LayerKind::norm_pool;
    norm.window = window;
    norm.out = out;
    return *this;
  }

 private:
  Shape last() const { return owned.layers[network().layer_count - 1].out; }
  Chain& reads(int source) {
    link_reader(owned.layers, network().layer_count - 1, source);
    return *this;
  }

  // Padded alike on both sides.
  Shape windowed(const Window& w, int channels) const {
    const Shape in = last();
    return {(in.height + 2 * w.top - w.dilation_y * (w.height - 1) - 1) / w.stride_y + 1,
            (in.width + 2 * w.left - w.dilation_x * (w.width - 1) - 1) / w.stride_x + 1, channels};
  }
  Layer& append(LayerKind kind, const Shape& in, const Shape& out) {
    Layer& layer = owned.layers[owned.network.layer_count++];
    layer = Layer{};
    layer.kind = kind;
    layer.in = in;
    layer.out = out;
    return layer;
  }
  int tensor(const Tensor& shape) {
    owned.tensors[owned.network.tensor_count] = shape;
    return owned.network.tensor_count++;
  }
};

}  // namespace pymeta::testing
