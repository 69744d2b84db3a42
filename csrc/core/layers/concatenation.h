// Channels side by side: those of a kept value and of x (branches.h), and some of those of x. Both move numbers, and so do their
// tangents.
#pragma once

#include "branches.h"

namespace pymeta {

struct ConcatenateSpec {
  static constexpr const char* kName = "concatenate";
  static constexpr const char* kArguments = "cb";  // which of the kept values; does it come last?
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    builder.concatenate(static_cast<int>(arguments[0]), arguments[1] != 0);
  }
};
struct ChannelsSpec {
  static constexpr const char* kName = "channels";
  // The first, and the one behind the last, from the end where negative; into how many equal parts channels are cut, of which
  // these are numbers then, or 0.
  static constexpr const char* kArguments = "iic";
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    builder.channels(static_cast<int>(arguments[0]), static_cast<int>(arguments[1]),
                     static_cast<int>(arguments[2]));
  }
};

// Which channels are the other value's in what a concatenation gives.
PYMETA_MEMBER inline int first_of_other(const Layer& layer) {
  return layer.other_is_last ? layer.in.channels : 0;
}
PYMETA_MEMBER inline int first_of_own(const Layer& layer) {
  return layer.other_is_last ? 0 : layer.out.channels - layer.in.channels;
}

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// Channels that lie side by side with others in rows of theirs: those from `first` on, of so many.
struct Strip {
  const Real* p;  // its row; null: zeros
  int count;      // channels that it has there
  int first;      // the channel that its number 0 is in what is made
};

// Vector `vector` of a row of so many channels made of strips, zero where there is none of them.
template <class X>
PYMETA_FN Vec assembled(int vector, int channels, const Strip* strips, int count) {
  constexpr int together = kWidth / X::kElement;  // channels in a vector
  const int begin = vector * together, end = begin + together;
  for (int i = 0; i < count && end <= channels; ++i) {
    const int from = begin - strips[i].first;
    if (from >= 0 && end - strips[i].first <= strips[i].count)
      return strips[i].p ? load(strips[i].p + static_cast<long>(from) * X::kElement) : zero();
  }
  alignas(64) Real numbers[kWidth] = {};
  for (int i = 0; i < count; ++i) {
    if (!strips[i].p) continue;
    const int first = strips[i].first, behind = first + strips[i].count;
    const int low = first > begin ? first : begin;
    int high = behind < channels ? behind : channels;
    if (high > end) high = end;
    const long from = static_cast<long>(begin - first) * X::kElement;
    for (int lane = (low - begin) * X::kElement; lane < (high - begin) * X::kElement; ++lane)
      numbers[lane] = strips[i].p[from + lane];
  }
  return load(numbers);
}

// Some of the channels of rows, or their place among more.
template <class X>
struct ChannelMoves : Branch<X> {
  // `from`: rows of `width` channels, of which channel c is channel c + first of rows of a shape; null: zeros.
  PYMETA_FN PYMETA_NOINLINE static void moved(const LayerPass& p, const Real* from, int width,
                                              int first, const Shape& shape, const Destination& to,
                                              bool adds) {
    const long row = X::stride(width);
    Branch<X>::put(p, shape, to, adds, [=](long, long column, int r) {
      const Strip strip{from ? from + r * row : nullptr, width, first};
      return assembled<X>(static_cast<int>(column / kWidth), shape.channels, &strip, 1);
    });
  }
};

template <class X>
struct Concatenate : ChannelMoves<X> {
  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    joined(p, p.other_output, p.x.p, to);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    own(p, p.d, below);
  }
  PYMETA_FN static void backward_other(const LayerPass& p, const Destination& to, bool adds) {
    other(p, p.d, to, adds);
  }
  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    joined(p, t.other_output, t.rx.p, to);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    own(p, t.rd, below);
  }
  PYMETA_FN static void tangent_backward_other(const LayerPass& p, const LayerTangent& t,
                                               const Destination& to, bool adds) {
    other(p, t.rd, to, adds);
  }

 private:
  PYMETA_FN PYMETA_NOINLINE static void joined(const LayerPass& p, const Real* other,
                                               const Real* own, const Destination& to) {
    const Layer& layer = p.layer;
    const int channels = layer.out.channels, width = layer.in.channels;
    const int first_other = first_of_other(layer), first_own = first_of_own(layer);
    const long own_row = X::stride(width), other_row = X::stride(channels - width);
    Branch<X>::put(p, layer.out, to, false, [=](long, long column, int r) {
      const Strip strips[] = {{other + r * other_row, channels - width, first_other},
                              {own ? own + r * own_row : nullptr, width, first_own}};
      return assembled<X>(static_cast<int>(column / kWidth), channels, strips, 2);
    });
  }
  PYMETA_FN static void own(const LayerPass& p, const Real* d, const Destination& to) {
    ChannelMoves<X>::moved(p, d, p.layer.out.channels, -first_of_own(p.layer), p.layer.in, to,
                           false);
  }
  PYMETA_FN static void other(const LayerPass& p, const Real* d, const Destination& to, bool adds) {
    Shape shape = p.layer.out;
    shape.channels -= p.layer.in.channels;
    ChannelMoves<X>::moved(p, d, p.layer.out.channels, -first_of_other(p.layer), shape, to, adds);
  }
};

template <class X>
struct Channels : ChannelMoves<X> {
  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) { taken(p, p.x.p, to); }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    put_back(p, p.d, below);
  }
  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    taken(p, t.rx.p, to);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    put_back(p, t.rd, below);
  }

 private:
  PYMETA_FN static void taken(const LayerPass& p, const Real* from, const Destination& to) {
    const Layer& layer = p.layer;
    ChannelMoves<X>::moved(p, from, layer.in.channels, -layer.lookup.feature, layer.out, to, false);
  }
  PYMETA_FN static void put_back(const LayerPass& p, const Real* d, const Destination& to) {
    const Layer& layer = p.layer;
    ChannelMoves<X>::moved(p, d, layer.out.channels, layer.lookup.feature, layer.in, to, false);
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
