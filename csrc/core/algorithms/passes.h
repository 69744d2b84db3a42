// The four passes of a set through the network: forward, backward, and the tangents of both.
//
// Each is a loop over the layers, whose rules have their files in ../layers; what is done here is what every layer has: its
// activation, and the way from one layer's arrays to the next one's. An identity or ReLU is done in the store of the layer
// before it (Destination); the others are maps of their own:
//   a = act(z)    d = act'(z) c    ra = act'(z) rz    rd = act'(z) rc + act''(z) c rz
#pragma once

#include <type_traits>

#include "stacked.h"

PYMETA_KERNEL_BEGIN

// ---- activations -----------------------------------------------------------------------------------------------

template <class X>
PYMETA_FN PYMETA_NOINLINE void activate(const Layer& layer, const Extent& extent, const Real* z,
                                        Real* a) {
  const int features = layer.out.channels;
  with_activation(layer.activation.kind, [&](auto rule) {
    X::map(over(extent, layer.out), features, [&](long at, long column, int) {
      Vec value = rule.value(load(z + at), layer.activation);
      if constexpr (decltype(rule)::kMovesZero)
        value = X::masked_columns(value, features, static_cast<int>(column / kWidth));
      store(a + at, value);
    });
  });
}

// out = slope * v: the backward pass and the tangent of the forward pass. z is only read where it was kept.
template <class X>
PYMETA_FN PYMETA_NOINLINE void through_slope(const Layer& layer, const Extent& extent,
                                             const Real* z, const Real* a, const Real* v,
                                             Real* out) {
  with_activation(layer.activation.kind, [&](auto rule) {
    X::map(over(extent, layer.out), layer.out.channels, [&](long at, long, int) {
      const Vec input = rule.kFromOutput ? zero() : load(z + at);
      store(out + at, rule.slope(input, load(a + at), layer.activation) * load(v + at));
    });
  });
}

// rd = slope * rc + curvature * c * rz: the tangent of the backward pass.
template <class X>
PYMETA_FN PYMETA_NOINLINE void through_slope_tangent(const Layer& layer, const Extent& extent,
                                                     const Real* z, const Real* a, const Real* c,
                                                     const Real* rz, const Real* rc, Real* rd) {
  with_activation(layer.activation.kind, [&](auto rule) {
    X::map(over(extent, layer.out), layer.out.channels, [&](long at, long, int) {
      const Vec input = rule.kFromOutput ? zero() : load(z + at), output = load(a + at);
      Vec v = rule.slope(input, output, layer.activation) * load(rc + at);
      if constexpr (decltype(rule)::kHasCurvature) {
        if (rz)
          v = fma(rule.curvature(input, output, layer.activation) * load(c + at), load(rz + at), v);
      }
      store(rd + at, v);
    });
  });
}

// ---- the passes ------------------------------------------------------------------------------------------------

template <class X>
class Passes {
 public:
  using Parameters = typename State<X>::Parameters;
  using Direction = typename State<X>::Direction;
  using Tape = typename State<X>::Tape;

  // One set and its tape. `is_query`: which of the item's sets it is. `step`: the inner step whose rows are used of what has
  // some for each.
  PYMETA_FN Passes(const State<X>& state, const ItemSet& set, const Tape& tape, bool is_query,
                   int step)
      : state_(state),
        network_(state.network),
        set_(set),
        tape_(tape),
        last_(state.network.layer_count - 1),
        is_query_(is_query),
        step_(step) {}

  // From layer `from` on; what lies below is on the tape already.
  PYMETA_FN PYMETA_NOINLINE void forward(const Parameters& theta, int from = 0) const {
    for (int l = from; l <= last_ && !state_.call.is_stopped(); ++l) {
      const Layer& layer = network_.layers[l];
      const ActivationKind kind = layer.activation.kind;
      Real* z = tape_.at(tape_.layout->layers[l].z);
      Real* raw = is_class_major(l) ? outputs() : is_fused(kind) || !z ? tape_.a(l) : z;
      with_rules(l, [&](const auto& rules) {
        rules.forward(pass(l, theta), Destination{raw, kind == ActivationKind::relu});
      });
      if (!is_fused(kind)) activate<X>(layer, set_.extent, raw, tape_.a(l));
    }
    if (!state_.layout.narrow)
      X::to_class_major(set_.extent, network_.out_features(), tape_.a(last_), outputs());
    if (extra<X>(set_.offset != nullptr)) add_offset();
    if (set_.targets)
      loss_gradient<X>(*set_.loss, tape_.loss_rows(set_), tape_.at(tape_.layout->row_losses),
                       tape_.at(tape_.layout->dy));
  }

  // What flows into the outputs, in place of the gradient of the loss alone.
  PYMETA_FN PYMETA_NOINLINE void seed(const Seed& seed) const {
    const LossRows rows = tape_.loss_rows(set_);
    Real* dy = tape_.at(tape_.layout->dy);
    const Real* beside = set_.cotangent;
    const bool has_loss = set_.targets != nullptr;
    const Vec of_tasks = seed.losses;
    X::for_indices(rows.blocks, [=](int b) {
      Vec losses = of_tasks;
      if constexpr (kStacks<X>) losses = X::in_block(of_tasks, set_.extent, b);
      for (int o = 0; o < rows.out; ++o) {
        const long at = rows.at(o, b);
        Vec d = has_loss ? losses * load(dy + at) : zero();
        if (beside) d = d + load(beside + at);
        store(dy + at, rows.masked(d, b));
      }
    });
  }

  // Down to layer `lowest`, whose parameters are the last that want a gradient. sinks(tensor) says where it goes.
  template <class Sinks>
  PYMETA_FN PYMETA_NOINLINE void backward(const Parameters& theta, Sinks sinks,
                                          bool input_delta = true, int lowest = 0) const {
    if (!state_.layout.narrow) {
      const Real* dy = tape_.at(tape_.layout->dy);
      Real* top = tape_.output_delta(last_);
      X::from_class_major(set_.extent, network_.out_features(), dy, top);
      if (is_relu(last_))
        pass_on<X>(set_.extent, network_.out_features(), top, gated(last_, tape_.d(last_)));
      finish_delta(last_);
    }
    Real* const dx = extra<X>(set_.dx);
    const bool to_input = input_delta && dx;
    if (!dx) lowest = above(lowest);  // a tangent pass to the inputs asks for all deltas
    for (int l = last_; l >= lowest && !state_.call.is_stopped(); --l) {
      const Layer& layer = network_.layers[l];
      with_rules(l, [&](const auto& rules) {
        const LayerPass p = pass(l, theta, delta(l));
        if (l > lowest || to_input) {
          rules.backward(p, l > 0 ? gated(l - 1, tape_.output_delta(l - 1)) : Destination{dx});
          if (l > 0) {
            if (is_gathered(l - 1)) gather(l - 1, theta);
            finish_delta(l - 1);
          }
        }
        rules.gradient(p, sink(sinks, layer, layer.weight), sink(sinks, layer, layer.bias));
      });
      if (kSteps && layer.steps > 0) clear_other_steps(sinks, layer);
    }
  }

  PYMETA_FN PYMETA_NOINLINE void tangent_forward(const Parameters& theta,
                                                 const Direction& u) const {
    Real* ry = tangent(state_.ws.tangent.ry);
    for (int l = 0; l <= last_ && !state_.call.is_stopped(); ++l) {
      if (is_unread_zero(l)) continue;
      const Layer& layer = network_.layers[l];
      Real* ra = tangent(tangents(l).ra);
      Real* rz = tangent(tangents(l).rz);
      Real* raw = is_class_major(l) ? ry : rz ? rz : ra;
      with_rules(l, [&](const auto& rules) {
        rules.tangent_forward(pass(l, theta), pass_tangent(l, u), gated(l, raw));
      });
      if (!is_fused(layer.activation.kind))
        through_slope<X>(layer, set_.extent, activation_input(l), tape_.a(l), raw, ra);
    }
    if (!state_.layout.narrow)
      X::to_class_major(set_.extent, network_.out_features(), tangent(tangents(last_).ra), ry);
    loss_hessian_product<X>(*set_.loss, tape_.loss_rows(set_), ry, tangent(state_.ws.tangent.rdy));
  }

  // The tangent of the delta at the input, times `scale`, is put to set.dx or added to what is there.
  template <class Sinks>
  PYMETA_FN PYMETA_NOINLINE void tangent_backward(const Parameters& theta, const Direction& u,
                                                  bool first_to_input, Real scale,
                                                  Sinks sinks) const {
    const Real* rdy = tangent(state_.ws.tangent.rdy);
    if (!state_.layout.narrow) {
      Real* rd = delta_tangent(last_);
      X::from_class_major(set_.extent, network_.out_features(), rdy, rd);
      if (is_relu(last_)) pass_on<X>(set_.extent, network_.out_features(), rd, gated(last_, rd));
      finish_delta_tangent(last_, rd);
    }
    Real* const dx = extra<X>(set_.dx);
    const int lowest = dx ? 0 : above(0);
    for (int l = last_; l >= lowest && !state_.call.is_stopped(); --l) {
      const Layer& layer = network_.layers[l];
      Real* rd_below = delta_tangent(l - 1);
      with_rules(l, [&](const auto& rules) {
        const LayerPass p = pass(l, theta, delta(l));
        const LayerTangent t = pass_tangent(l, u, is_class_major(l) ? rdy : delta_tangent(l));
        if (l > lowest || dx) {
          rules.tangent_backward(p, t, l > 0 ? gated(l - 1, rd_below) : Destination{rd_below});
          if (l > 0) {
            if (is_gathered(l - 1)) gather(l - 1, theta, u, rd_below);
            finish_delta_tangent(l - 1, rd_below);
          } else {
            add_to_input_delta(rd_below, first_to_input, scale);
          }
        }
        rules.tangent_gradient(p, t, sink(sinks, layer, layer.weight),
                               sink(sinks, layer, layer.bias));
      });
      if (kSteps && layer.steps > 0) clear_other_steps(sinks, layer);
    }
  }

  // The outputs that are made again (LayerTape), where another step's lie.
  PYMETA_FN PYMETA_NOINLINE void repeat(const Parameters& theta) const {
    for (int l = 0; l <= last_ && !state_.call.is_stopped(); ++l)
      if (tape_.layout->layers[l].makes_a_again)
        with_rules(l, [&](const auto& rules) {
          rules.forward(pass(l, theta), Destination{tape_.a(l), is_relu(l)});
        });
  }

  // visit(layer, its pass) of the batch normalisations whose statistics a forward pass has left on the tape.
  template <class Visitor>
  PYMETA_FN void statistics(const Parameters& theta, Visitor visit) const {
    for (int l = 0; l <= last_; ++l)
      if (has_statistics(network_.layers[l])) visit(network_.layers[l], pass(l, theta));
  }

 private:
  using Family = typename X::Family;
  static constexpr bool kBranches = Family::template kLayer<LayerKind::recall>;
  static constexpr bool kSteps = kHasSteps<Family>;

  // visit(the rules that layer l has here): its own, or those of what stands in for it.
  template <class Visitor>
  PYMETA_FN void with_rules(int l, Visitor visit) const {
    if constexpr (X::kFactors)
      if (l == 0 && state_.factored)
        return visit(FactoredLinearRules<X>{*state_.factored, is_query_});
    if constexpr (kStacks<X>)
      if (network_.layers[l].kind == LayerKind::linear) {
        if (is_class_major(l)) return visit(StackedNarrowLinear<X>(state_, l, is_query_));
        return visit(StackedLinear<X>(state_, l, is_query_));
      }
    with_variant<X>(network_, l, state_.layout.narrow, visit);
  }

  PYMETA_FN LayerPass pass(int l, const Parameters& theta, const Real* d = nullptr) const {
    const Layer& layer = network_.layers[l];
    LayerPass p{layer,
                set_.extent,
                tape_.input(l, set_),
                of_step(layer, theta.tensor(layer.weight)),
                of_step(layer, theta.tensor(layer.bias)),
                theta.transposed(l),
                {},
                d};
    p.scratch = state_.memory.at(state_.ws.scratch);
    for (int i = 0; i < kMaxKept; ++i) p.kept[i] = tape_.kept(l, i);
    if constexpr (kBranches) {
      if (layer.other_output >= 0) p.other_output = tape_.a(layer.other_output);
    }
    return p;
  }
  PYMETA_FN LayerTangent pass_tangent(int l, const Direction& u, const Real* rd = nullptr) const {
    const Layer& layer = network_.layers[l];
    // Nothing below the first layer that the inner loop changes has a tangent.
    const Real* rx = l <= state_.lowest_adapted ? nullptr : tangent(tangents(l - 1).ra);
    LayerTangent t{{rx, X::stride(layer.in.channels)},
                   of_step(layer, u.tensor(layer.weight)),
                   of_step(layer, u.tensor(layer.bias)),
                   u.transposed(l),
                   {},
                   rd};
    for (int i = 0; i < kMaxKept; ++i) t.kept[i] = tangent(tangents(l).kept[i]);
    if constexpr (kBranches) {
      if (layer.other_output >= 0) t.other_output = tangent(tangents(layer.other_output).ra);
    }
    return t;
  }

  PYMETA_FN bool has_readers(int l) const {
    return kBranches && network_.layers[l].first_reader >= 0;
  }
  // Is what flows to layer l's output more than what the layer behind it passes back, or not even that?
  PYMETA_FN bool is_gathered(int l) const {
    return has_readers(l) || (kBranches && reads_other_alone<X>(network_.layers[l + 1]));
  }
  // visit(reader, its rules, whether there is something that it is added to) of all that read layer l's output besides the
  // layer behind it.
  template <class Visitor>
  PYMETA_FN void for_readers(int l, Visitor visit) const {
    bool adds = !reads_other_alone<X>(network_.layers[l + 1]);
    for (int r = network_.layers[l].first_reader; r >= 0; r = network_.layers[r].next_reader) {
      with_rules(r, [&](const auto& rules) {
        if constexpr (kReadsOther<std::decay_t<decltype(rules)>>) visit(r, rules, adds);
      });
      adds = true;
    }
  }
  // What flows to layer l's output from there; nothing, where the network goes on without it.
  PYMETA_FN PYMETA_NOINLINE void gather(int l, const Parameters& theta) const {
    if (!has_readers(l)) return clear_delta(l, tape_.output_delta(l));
    for_readers(l, [&](int r, const auto& rules, bool adds) {
      rules.backward_other(pass(r, theta, delta(r)), gated(l, tape_.output_delta(l)), adds);
    });
  }
  PYMETA_FN PYMETA_NOINLINE void gather(int l, const Parameters& theta, const Direction& u,
                                        Real* rd) const {
    if (!has_readers(l)) return clear_delta(l, rd);
    for_readers(l, [&](int r, const auto& rules, bool adds) {
      rules.tangent_backward_other(pass(r, theta, delta(r)), pass_tangent(r, u, delta_tangent(r)),
                                   gated(l, rd), adds);
    });
  }

  PYMETA_FN void clear_delta(int l, Real* d) const {
    const Shape& shape = network_.layers[l].out;
    clear<X>(over(set_.extent, shape), shape.channels, d);
  }

  // Of a tensor with a row for each inner step, this step's; the last one's from there on.
  PYMETA_FN std::size_t row_of_step(const Layer& layer) const {
    if (!kSteps || layer.steps == 0) return 0;
    const int row = step_ < layer.steps ? step_ : layer.steps - 1;
    return row * static_cast<std::size_t>(X::stride(layer.out.channels));
  }
  PYMETA_FN const Real* of_step(const Layer& layer, const Real* tensor) const {
    return tensor ? tensor + row_of_step(layer) : nullptr;
  }
  // The rows of other steps have no part in this pass.
  template <class Sinks>
  PYMETA_FN PYMETA_NOINLINE void clear_other_steps(const Sinks& sinks, const Layer& layer) const {
    const std::size_t row = X::stride(layer.out.channels);
    for (const int tensor : {layer.weight, layer.bias})
      for (int step = 0; tensor >= 0 && step < layer.steps; ++step)
        if (step * row != row_of_step(layer))
          no_gradient<X>(layer.out.channels, sinks(tensor).from(step * row));
  }

  // The layer from which deltas are of use to parameters.
  PYMETA_FN int above(int l) const {
    const int first = state_.lowest_with_parameters;
    return l > first ? l : first;
  }
  PYMETA_FN bool is_relu(int l) const {
    return network_.layers[l].activation.kind == ActivationKind::relu;
  }
  // A narrow last layer's outputs and deltas are class-major from the beginning.
  PYMETA_FN bool is_class_major(int l) const { return state_.layout.narrow && l == last_; }
  PYMETA_FN Real* outputs() const { return tape_.at(tape_.layout->y); }
  PYMETA_FN void add_offset() const {
    Real* y = outputs();
    const Real* offset = set_.offset;
    X::for_indices(network_.out_features() * X::blocks(set_.extent.rows), [=](int i) {
      const long at = static_cast<long>(i) * kWidth;
      store(y + at, load(y + at) + load(offset + at));
    });
  }
  PYMETA_FN const Real* delta(int l) const {
    return is_class_major(l) ? tape_.at(tape_.layout->dy) : tape_.d(l);
  }
  PYMETA_FN Real* tangent(Place place) const { return state_.tangent(place); }
  PYMETA_FN const LayerTangents& tangents(int l) const { return state_.ws.tangent.layers[l]; }
  // The tangent of the delta at layer l's output: one of two arrays in turn, or its own where what l reads besides its input
  // takes it from there later on or places are shared.
  PYMETA_FN Real* delta_tangent(int l) const {
    if ((kBranches || X::kSharesPlaces) && l >= 0 && tangents(l).rd != kNowhere)
      return tangent(tangents(l).rd);
    return tangent(state_.ws.tangent.rd[(last_ - l) & 1]);
  }
  // Is the tangent of layer l's output zero, with nobody to read it or anything else that the layer would keep?
  PYMETA_FN bool is_unread_zero(int l) const {
    bool unread = l < state_.lowest_adapted && l < last_ && tangents(l).rz == kNowhere;
    for (int i = 0; i < kMaxKept; ++i) unread = unread && tangents(l).kept[i] == kNowhere;
    return unread && !has_readers(l);
  }
  // What the activation of layer l was applied to, where that is kept.
  PYMETA_FN const Real* activation_input(int l) const {
    return tape_.at(tape_.layout->layers[l].z);
  }
  template <class Sinks>
  PYMETA_FN Sink sink(const Sinks& sinks, const Layer& layer, int tensor) const {
    return tensor >= 0 ? sinks(tensor).from(row_of_step(layer)) : Sink{};
  }

  // A destination at layer l's output: through the gate of its ReLU.
  PYMETA_FN Destination gated(int l, Real* to) const {
    return {to, false, is_relu(l) ? tape_.a(l) : nullptr};
  }
  PYMETA_FN void finish_delta(int l) const {
    const Layer& layer = network_.layers[l];
    if (is_fused(layer.activation.kind)) return;
    through_slope<X>(layer, set_.extent, activation_input(l), tape_.a(l), tape_.output_delta(l),
                     tape_.d(l));
  }
  PYMETA_FN void finish_delta_tangent(int l, Real* rd) const {
    const Layer& layer = network_.layers[l];
    if (is_fused(layer.activation.kind)) return;
    through_slope_tangent<X>(layer, set_.extent, activation_input(l), tape_.a(l),
                             tape_.at(tape_.layout->layers[l].c), tangent(tangents(l).rz), rd, rd);
  }
  PYMETA_FN void add_to_input_delta(const Real* rdx, bool first, Real scale) const {
    Real* dx = set_.dx;
    X::map(set_.extent, network_.in_features(), [=](long at, long, int) {
      const Vec before = first ? zero() : load(dx + at);
      store(dx + at, fma(broadcast(scale), load(rdx + at), before));
    });
  }

  const State<X>& state_;
  const Network& network_;
  const ItemSet& set_;
  const Tape tape_;
  const int last_;
  const bool is_query_;
  const int step_;
};

PYMETA_KERNEL_END
