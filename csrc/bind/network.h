// From a description, a list of tuples like ("linear", 4, 8, True) or ("relu",), to a Network (core/call/network.h).
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../core/layers/registry.h"

namespace pymeta {

inline const char* arguments_of(const ActivationSpelling& spelling) {
  return spelling.parameters == 0 ? "" : spelling.parameters == 1 ? "x" : "xx";
}

class NetworkBuilder {
 public:
  explicit NetworkBuilder(OwnedNetwork& owned) : owned_(owned), network_(owned.network) {}

  void add(const pybind11::tuple& given) {
    if (given.empty()) refuse("an empty tuple");
    const std::string name = value<std::string>(given, 0);
    bool found = false;
    for_each_layer_spec([&](LayerKind kind, auto spec) {
      if (found || !*spec.kName || name != spec.kName) return;
      found = true;
      kind_ = kind;
      double values[kMostArguments];
      read(given, name, spec.kArguments, values);
      spec.add(*this, values);
    });
    for (const ActivationSpelling& spelling : kActivations)
      if (!found && name == spelling.name && spelling.kind != ActivationKind::identity) {
        found = true;
        double values[2] = {0, 0};
        read(given, name,
             spelling.parameters == 0   ? ""
             : spelling.parameters == 1 ? "d"
                                        : "dd",
             values);
        if (!spelling.accepts(values[0])) refuse(name + ": " + spelling.condition);
        add_activation({spelling.kind, values[0], values[1]});
      }
    if (!found) refuse("unknown layer '" + name + "'");
  }

  // Rows of features are what goes in and comes out.
  void finish() const {
    const Shape out = shape();
    if (out.positions() > 1)
      refuse("the last layer gives " + text(out) + ", not one row of features: flatten it");
  }

  // What layers are added by (core/layers/layer.h).

  Layer& append(const Shape& in, const Shape& out) {
    for (const Shape& shape : {in, out}) {
      if (shape.height < 1 || shape.width < 1 || shape.channels < 1)
        refuse("a layer needs at least one input and one output feature");
      const std::int64_t features =
          static_cast<std::int64_t>(shape.height) * shape.width * shape.channels;
      if (features > (1 << 24)) refuse("a layer of more than 2^24 features");
    }
    expect(in);
    if (network_.layer_count == kMaxLayers)
      throw std::invalid_argument("more than " + std::to_string(kMaxLayers) + " layers");
    Layer& layer = owned_.layers[network_.layer_count++];
    layer = Layer{};
    layer.kind = kind_;
    layer.in = in;
    layer.out = out;
    return layer;
  }
  // A linear layer (core/layers/linear.h). Of the channels of each position, where there are so many, it is a convolution of one
  // tap: the same product of more rows, and torch's [out, in] is what [out, in, 1] holds. Other widths lack a flatten.
  Layer& append_linear(int in, int out) {
    const bool of_channels =
        network_.layer_count > 0 && shape().positions() > 1 && shape().channels == in;
    if (!of_channels) return append({1, 1, in}, {1, 1, out});
    kind_ = LayerKind::conv1d;
    return append(shape(), {shape().height, shape().width, out});
  }
  // What the layer before gives; with so many channels.
  Shape shape() const {
    if (network_.layer_count == 0) refuse("the first layer needs to know its inputs' shape");
    return owned_.layers[network_.layer_count - 1].out;
  }
  Shape shape(int channels) const {
    if (network_.layer_count == 0) return {1, 1, channels};
    Shape found = shape();
    found.channels = channels;
    return found;
  }
  // That a layer takes rows of this shape.
  void expect(const Shape& in) const {
    const int last = network_.layer_count - 1;
    if (last >= 0 && network_.layers[last].out != in)
      refuse("layer " + std::to_string(network_.layer_count) + " takes " + text(in) +
             " features, the one before it gives " + text(network_.layers[last].out));
  }
  // (kernel y x, stride y x, ..., four paddings between, dilation y x)
  static Window window(const double* arguments) {
    const auto number = [=](int i) { return static_cast<int>(arguments[i]); };
    Window w;
    w.height = number(0), w.width = number(1);
    w.stride_y = number(2), w.stride_x = number(3);
    w.top = number(4), w.left = number(6);
    w.dilation_y = number(8), w.dilation_x = number(9);
    return w;
  }
  // What a window leaves of a shape; `paddings`: top, bottom, left, right.
  static Shape windowed(const Shape& in, const Window& w, const double* paddings, int channels) {
    const auto left = [](int size, double padding, int taps, int dilation, int stride) {
      const double room = size + padding - static_cast<double>(dilation) * (taps - 1) - 1;
      return room < 0 ? 0 : static_cast<int>(room / stride) + 1;
    };
    const auto cut = [=](int side) { return std::max(0.0, -paddings[side]); };
    if (cut(0) + cut(1) > in.height || cut(2) + cut(3) > in.width)
      refuse("padding that cuts off more positions than " + text(in) + " has");
    const Shape out{left(in.height, paddings[0] + paddings[1], w.height, w.dilation_y, w.stride_y),
                    left(in.width, paddings[2] + paddings[3], w.width, w.dilation_x, w.stride_x),
                    channels};
    if (out.height < 1 || out.width < 1)
      refuse("a window of " + std::to_string(w.height) + " x " + std::to_string(w.width) +
             " does not fit " + text(in));
    return out;
  }
  // Between one row of features and rows of channels (core/layers/rearrangement.h), where that is a difference.
  void append_turned(const Shape& image, bool flattens) {
    const Shape flat{1, 1, image.features()};
    if (flattens && image.positions() == 1) return;
    append(flattens ? image : flat, flattens ? flat : image);
  }

  // Positions that move (core/layers/padding.h): as part of a convolution before that they do nothing but cut off from, if it
  // is one, or as a layer.
  void append_moved(const Shape& out, const Window& window, bool cuts) {
    const int last = network_.layer_count - 1;
    if (!cuts || last < 0 || is_kept() || !is_convolution(owned_.layers[last])) {
      append(shape(), out).window = window;
      return;
    }
    Layer& convolution = owned_.layers[last];
    Window& wider = convolution.window;
    wider.top += window.top * wider.stride_y;
    wider.left += window.left * wider.stride_x;
    if (out.height > 1) wider.stride_y *= window.stride_y;
    if (out.width > 1) wider.stride_x *= window.stride_x;
    convolution.out = out;
  }
  // Takes the padding before a convolution into its window and its sides (top, bottom, left, right). Zeros of its own would
  // have come between what a cut leaves and what it takes away.
  void absorb_padding(Window& window, double* sides) {
    const int last = network_.layer_count - 1;
    if (last < 1 || is_kept() || owned_.layers[last].kind != LayerKind::zero_pad ||
        owned_.layers[last].activation.kind != ActivationKind::identity)
      return;
    const Layer& padding = owned_.layers[last];
    const int top = padding.window.top, left = padding.window.left;
    const int more[] = {top, padding.out.height - padding.in.height - top, left,
                        padding.out.width - padding.in.width - left};
    for (int side = 0; side < 4; ++side)
      if (more[side] < 0 && sides[side] > 0) return;
    for (int side = 0; side < 4; ++side) sides[side] += more[side];
    window.top += top;
    window.left += left;
    --network_.layer_count;
  }

  // The activation of the layer before, where max pooling may come first: the largest of ReLUs is the ReLU of the largest, and
  // gradients go the same way.
  Activation take_relu() {
    if (network_.layer_count == 0 || is_kept()) return {};
    Layer& last = owned_.layers[network_.layer_count - 1];
    if (last.activation.kind != ActivationKind::relu || last.kind == LayerKind::lone_activation)
      return {};
    return std::exchange(last.activation, Activation{});
  }

  // Makes one layer (norm_pool.h) of BatchNorm, ReLU and max pooling over windows side by side.
  bool fuse_pooling(const Window& window, const double* paddings) {
    if (network_.layer_count == 0 || is_kept()) return false;
    Layer& last = owned_.layers[network_.layer_count - 1];
    const bool side_by_side = window.stride_y == window.height && window.stride_x == window.width &&
                              window.dilation_y == 1 && window.dilation_x == 1 &&
                              paddings[0] + paddings[1] + paddings[2] + paddings[3] == 0;
    const bool normalises =
        last.kind == LayerKind::batch_norm || last.kind == LayerKind::step_batch_norm;
    if (!side_by_side || !normalises || last.in.positions() == 1 ||
        last.activation.kind != ActivationKind::relu)
      return false;
    last.out = windowed(last.in, window, paddings, last.in.channels);
    last.kind = LayerKind::norm_pool;
    last.activation = Activation{};
    last.window = window;
    return true;
  }

  // Branches (core/layers/branches.h).

  // What the layer before gives gets a number; `features`: of the rows, where there is none.
  void keep(int features) {
    if (network_.layer_count == 0) {
      const Shape rows = features > 0 ? shape(features) : shape();
      append(rows, rows);
    }
    kept_.push_back(network_.layer_count - 1);
  }
  void recall(int number) {
    const int source = kept(number);
    link(append(shape(), owned_.layers[source].out), source);
  }
  // A sum or a product, which messages say what is done to the other value by.
  void combine(int number, const char* what) {
    const int source = kept(number);
    const Shape own = shape(), other = owned_.layers[source].out;
    const bool spreads =
        own.channels == other.channels && (own.positions() == 1 || other.positions() == 1);
    if (own != other && !spreads)
      refuse("a branch gives " + text(own) + " features, and what is " + what + " " + text(other));
    Layer& layer = append(own, other.positions() > own.positions() ? other : own);
    layer.other_is_single = other.positions() < own.positions();
    link(layer, source);
  }
  void concatenate(int number, bool is_last) {
    const int source = kept(number);
    Shape out = shape();
    const Shape other = owned_.layers[source].out;
    if (out.height != other.height || out.width != other.width)
      refuse("channels of " + text(out) + " features beside those of " + text(other));
    out.channels += other.channels;
    Layer& layer = append(shape(), out);
    layer.other_is_last = is_last;
    link(layer, source);
  }
  void channels(int first, int end, int parts) {
    Shape out = shape();
    const int all = out.channels;
    if (parts > 0 && all % parts != 0)
      refuse(std::to_string(all) + " channels in " + std::to_string(parts) + " equal parts");
    const auto place = [=](int number) {
      if (parts > 0) return std::min(number, parts) * (all / parts);
      return std::clamp(number < 0 ? number + all : number, 0, all);
    };
    out.channels = place(end) - place(first);
    if (out.channels < 1 || place(first) < 0)
      refuse("channels " + std::to_string(first) + " to " + std::to_string(end) + " of " +
             std::to_string(all));
    append(shape(), out).lookup.feature = place(first);
  }

  void append_embedding(int in, int feature, int categories, int width) {
    int column = feature;
    for (int l = 0; l < network_.layer_count; ++l) {
      const Layer& before = owned_.layers[l];
      if (before.kind != kind_ || before.activation.kind != ActivationKind::identity)
        refuse("an embedding looks up a column of the input, so that it comes first");
      if (before.lookup.feature >= feature) refuse("embeddings come in the order of their columns");
      column -= before.out.channels - before.in.channels;
    }
    if (feature >= in)
      refuse("an embedding of feature " + std::to_string(feature) + " of " + std::to_string(in));
    Layer& layer = append({1, 1, in}, {1, 1, in - 1 + width});
    layer.lookup = {feature, column, categories};
    layer.weight = tensor({categories, width, true});
  }

  int tensor(const Tensor& shape) {
    owned_.tensors[network_.tensor_count] = shape;
    return network_.tensor_count++;
  }

  [[noreturn]] static void refuse(const std::string& message) {
    throw std::invalid_argument("layers: " + message);
  }

 private:
  static constexpr int kMostArguments = 16;

  static std::string text(const Shape& shape) {
    if (shape.height == 1 && shape.width == 1) return std::to_string(shape.channels);
    return std::to_string(shape.height) + " x " + std::to_string(shape.width) + " x " +
           std::to_string(shape.channels);
  }

  static bool is_convolution(const Layer& layer) {
    return layer.kind == LayerKind::conv1d || layer.kind == LayerKind::conv2d;
  }

  // `types` has a letter for each value: 'n' size, 'c' count, which may be 0, 'i' integer, 'x' number, 'b' flag.
  static void read(const pybind11::tuple& given, const std::string& name, const char* types,
                   double* values) {
    const std::size_t wanted = std::strlen(types);
    if (given.size() - 1 != wanted)
      refuse("'" + name + "' takes " + std::to_string(wanted) + " values, got " +
             std::to_string(given.size() - 1));
    for (std::size_t i = 0; i < wanted; ++i)
      values[i] = types[i] == 'n'   ? size(given, i + 1, 1)
                  : types[i] == 'c' ? size(given, i + 1, 0)
                  : types[i] == 'i' ? size(given, i + 1, -(1 << 24))
                  : types[i] == 'b' ? value<bool>(given, i + 1)
                                    : value<double>(given, i + 1);
  }
  static int size(const pybind11::tuple& given, std::size_t i, int least) {
    const int found = value<int>(given, i);
    if (found < least || found > (1 << 24))
      refuse("expected " + std::to_string(least) + " to 2^24 for value " + std::to_string(i) +
             " of a layer, got " + std::to_string(found));
    return found;
  }
  template <class T>
  static T value(const pybind11::tuple& given, std::size_t i) {
    try {
      return given[i].cast<T>();
    } catch (const pybind11::cast_error&) {
      throw pybind11::type_error("layers: value " + std::to_string(i) +
                                 " of a layer is of a wrong type");
    }
  }

  // Into the layer before it where that has none yet, else as a layer of its own.
  void add_activation(const Activation& activation) {
    if (network_.layer_count == 0) refuse("the first layer must be linear or a normalisation");
    Layer* last = &owned_.layers[network_.layer_count - 1];
    // What is kept, others read as it is.
    if (is_kept() || last->activation.kind != ActivationKind::identity) {
      kind_ = LayerKind::lone_activation;
      const Shape shape = last->out;
      last = &append(shape, shape);
    }
    last->activation = activation;
  }

  // Is what the last layer gives kept, so that it has to stay as it is?
  bool is_kept() const { return !kept_.empty() && kept_.back() == network_.layer_count - 1; }
  // The layer that gives the kept value of a number.
  int kept(int number) const {
    if (number >= static_cast<int>(kept_.size()))
      refuse("no value number " + std::to_string(number) + " is kept");
    return kept_[number];
  }
  void link(const Layer& reader, int source) {
    link_reader(owned_.layers, static_cast<int>(&reader - owned_.layers), source);
  }

  OwnedNetwork& owned_;
  Network& network_;
  std::vector<int> kept_;  // the layers whose values are, by number
  LayerKind kind_{};       // of the layer that is being added
};

inline std::unique_ptr<OwnedNetwork> make_network(const std::vector<pybind11::tuple>& layers) {
  auto owned = std::make_unique<OwnedNetwork>();
  NetworkBuilder builder(*owned);
  for (const pybind11::tuple& layer : layers) builder.add(layer);
  if (owned->network.layer_count == 0) throw std::invalid_argument("layers: expected at least one");
  builder.finish();
  return owned;
}

// {name: a letter for each value behind it} of every layer and activation that a description may name.
inline pybind11::dict layer_forms() {
  pybind11::dict forms;
  for_each_layer_spec([&](LayerKind, auto spec) {
    if (*spec.kName) forms[spec.kName] = spec.kArguments;
  });
  for (const ActivationSpelling& spelling : kActivations)
    if (spelling.kind != ActivationKind::identity) forms[spelling.name] = arguments_of(spelling);
  return forms;
}

// Of the parameters, in the order of the layers.
inline pybind11::list parameter_shapes(const Network& network) {
  pybind11::list shapes;
  for (int t = 0; t < network.tensor_count; ++t) {
    const Tensor& tensor = network.tensors[t];
    const int in =
        tensor.columns / ((tensor.height ? tensor.height : 1) * (tensor.width ? tensor.width : 1));
    if (tensor.height)
      shapes.append(pybind11::make_tuple(tensor.rows, in, tensor.height, tensor.width));
    else if (tensor.width)
      shapes.append(pybind11::make_tuple(tensor.rows, in, tensor.width));
    else if (tensor.matrix)
      shapes.append(pybind11::make_tuple(tensor.rows, tensor.columns));
    else
      shapes.append(pybind11::make_tuple(tensor.columns));
  }
  return shapes;
}

}  // namespace pymeta
