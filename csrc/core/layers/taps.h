// How the outputs of a window and its inputs meet, along one axis.
#pragma once

#include "../call/network.h"

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// Either way: from an output to the input under tap k, or from an input to the output that sees it under tap k.
struct Axis {
  int from, to;  // positions on the side that is asked about; on the other
  int taps, stride, before, dilation;
  bool to_output;

  // The other side's position, or -1 where there is none.
  PYMETA_FN int at(int i, int k) const {
    if (!to_output) {
      const int found = i * stride - before + k * dilation;
      return found >= 0 && found < to ? found : -1;
    }
    const int reach = i + before - k * dilation;
    if (reach < 0 || reach % stride != 0 || reach / stride >= to) return -1;
    return reach / stride;
  }
  // The end of a run from i on: positions whose taps are there or not alike, each the neighbour's neighbour.
  PYMETA_FN int run_end(int i) const {
    int end = i + 1;
    for (; stride == 1 && end < from; ++end)
      for (int k = 0; k < taps; ++k)
        if ((at(i, k) < 0) != (at(end, k) < 0)) return end;
    return end;
  }
};

PYMETA_FN inline Axis rows_of(const Layer& layer, bool to_output) {
  const Window& w = layer.window;
  const int in = layer.in.height, out = layer.out.height;
  return {to_output ? in : out,
          to_output ? out : in,
          w.height,
          w.stride_y,
          w.top,
          w.dilation_y,
          to_output};
}
PYMETA_FN inline Axis columns_of(const Layer& layer, bool to_output) {
  const Window& w = layer.window;
  const int in = layer.in.width, out = layer.out.width;
  return {to_output ? in : out,
          to_output ? out : in,
          w.width,
          w.stride_x,
          w.left,
          w.dilation_x,
          to_output};
}

// The channels of a convolution that belong together: each of `out` sees `in` of its group.
struct Groups {
  int in, out;  // of a group

  // The j-th channel of the other side that an input or an output channel belongs to.
  PYMETA_FN int input(int output, int j) const { return output / out * in + j; }
  PYMETA_FN int output(int input, int j) const { return input / in * out + j; }
};
PYMETA_FN inline Groups groups_of(const Layer& layer) {
  return {layer.in.channels / layer.window.groups, layer.out.channels / layer.window.groups};
}

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
