// Where everything of one item lies, step by step: parameters, tapes, gradients, tangents. What the algorithms share.
//
// Names: theta[k] the parameters after k steps, theta[0] the start; v = dL/dtheta of the query loss on its way back; u the
// direction of a tangent pass, the adjoint of a support gradient.
#pragma once

#include "../families.h"
#include "../optimizers/step.h"
#include "../call/workspace.h"

PYMETA_KERNEL_BEGIN

// The start and the per-element learning rates in the executor's layout, shared by all items of a call.
struct Shared {
  const Real* theta;
  const Real* theta_transposed;
  const Real* rates;        // [lr.rows, parameters], or null
  const Real* corrections;  // [steps, 2] Adam's scale and eps (optimizers/adam.h), or null
};

// One set of one item.
struct ItemSet {
  Matrix x;
  Extent extent;
  const Real* targets;  // null: predictions only
  const Real* scale;
  Real* dx;                         // [rows, in], or null
  Vec rows;                         // of each task, those that do not count among them
  const Loss* loss = nullptr;       // what targets are held against
  const Real* offset = nullptr;     // [out, rows] is added to the outputs
  const Real* elements = nullptr;   // [columns, rows] weights of single targets
  Real* dx_of_step = nullptr;       // [rows, in] of one of several evaluations
  const Real* cotangent = nullptr;  // [out, rows] what flows into the outputs beside the loss
  Real* target_gradient = nullptr;  // [out, rows], or null
  Real* unit_scale = nullptr;       // [rows], where weight_gradient is wanted
  Real* weight_gradient = nullptr;  // [weight columns, rows] what each weighs of the loss's
                                    // derivative, or null
  Real* offset_gradient = nullptr;  // [out, rows], or null

  PYMETA_FN void lies(const SetLayout& places, const Memory& memory) {
    dx = memory.at(places.dx);
    dx_of_step = memory.at(places.dx_of_step);
    cotangent = memory.at(places.cotangent);
    target_gradient = memory.at(places.target_gradient);
    weight_gradient = memory.at(places.weight_gradient);
    unit_scale = memory.at(places.unit_scale);
    offset_gradient = memory.at(places.offset_gradient);
  }
};

// What flows into the query set of an item.
struct Seed {
  bool is_plain;  // the loss's own gradient and nothing else
  Vec losses;     // cotangents of the tasks' losses
};

// What one inner step works on.
struct Step {
  const ItemSet* set;
  IntVec active;  // lanes whose task makes this step
  bool all_active;
  bool same_rows;  // as the step before had
  Correction correction;
};

// All rows in every step.
class WholeSet {
 public:
  PYMETA_FN WholeSet(const ItemSet& set, const Real* corrections)
      : set_(set), active_(set.rows > zero()), corrections_(corrections) {}
  PYMETA_FN Step step(int k) const {
    const Real* c = corrections_ + 2 * k;
    return {&set_, active_, all_lanes(active_), k > 0,
            corrections_ ? Correction{broadcast(c[0]), broadcast(c[1])} : Correction{}};
  }

 private:
  const ItemSet& set_;
  IntVec active_;
  const Real* corrections_;
};

// Sums over the items of a chunk.
struct Totals {
  Real* gradient;     // [parameters]
  Real* lr_gradient;  // per element: [lr.rows, parameters]; otherwise [lr.rows, lr.columns, kWidth]
  bool fresh;         // nothing was added to `gradient` yet, and its memory holds anything...
  std::size_t clear;  // ...except from this place on, where it holds zeros

  PYMETA_FN const Real* base(std::size_t place) const {
    return fresh && place < clear ? nullptr : gradient + place;
  }
};

template <class X>
struct State {
  const Call<Real>& call;
  const Network& network;
  const Workspace<X>& ws;
  const ParameterLayout<X>& layout;
  const Shared& shared;
  Memory memory;
  Rates rates;
  FactoredLinear<X>* factored = nullptr;  // the item's first layer, where it is a factored one
  const Stack* stack = nullptr;    // the item's tasks, where it has several one below the other
  Vec anchor = zero();             // the strength of each task's pull towards the start
  int lowest_adapted = 0;          // the lowest layer that the inner loop changes
  int lowest_with_parameters = 0;  // workspace.h: lowest_with_tensors

  PYMETA_FN State(const Call<Real>& of, const Workspace<X>& workspace, const Shared& common,
                  const Memory& lies)
      : call(of),
        network(*of.network),
        ws(workspace),
        layout(workspace.parameters),
        shared(common),
        memory(lies),
        rates(of, of.lr.per_task ? lies.at(workspace.own_rates) : common.rates,
              workspace.parameters.size) {
    lowest_with_parameters = lowest_with_tensors(network);
    while (lowest_adapted < network.layer_count && !changes(network.layers[lowest_adapted]))
      ++lowest_adapted;
  }

  // ---- parameters ----------------------------------------------------------------------------------------------

  // A network's parameters at one step: adapted tensors from `own`, the others from the start.
  struct Parameters {
    const State* state;
    const Real* own;
    const Real* own_transposed;
    bool is_start = false;

    PYMETA_FN const Real* tensor(int t) const {
      if (t < 0) return nullptr;
      const bool changed = !is_start && state->call.adapted[t];
      return (changed ? own : state->start_of(t)) + state->layout.tensors[t].place;
    }
    PYMETA_FN const Real* transposed(int l) const {
      const Place place = state->layout.transposed[l];
      if (place == kNowhere) return nullptr;
      const int t = state->network.layers[l].weight;
      const bool changed = !is_start && state->call.adapted[t];
      return (changed ? own_transposed : state->start_transposed_of(t)) + place;
    }
  };
  PYMETA_FN Parameters start() const { return {this, nullptr, nullptr, true}; }
  PYMETA_FN Parameters adapted(int k) const {  // theta[k], k >= 1
    const std::size_t step = ws.keeps_steps ? static_cast<std::size_t>(k - 1) : 0;
    return {this, memory.at(ws.theta) + step * layout.size,
            memory.at(ws.theta_transposed) + step * layout.transposed_size};
  }

  // The direction of a tangent pass: nothing for tensors that are not adapted.
  struct Direction {
    const State* state;
    const Real* u;

    PYMETA_FN const Real* tensor(int t) const {
      return t >= 0 && state->call.adapted[t] ? u + state->layout.tensors[t].place : nullptr;
    }
    PYMETA_FN const Real* transposed(int l) const {
      const Place place = state->layout.transposed[l];
      return place == kNowhere ? nullptr : state->memory.at(state->ws.u_transposed) + place;
    }
  };

  template <class Body>  // body(tensor, place, scalars) for each tensor that the inner loop changes
  PYMETA_FN void for_adapted(Body body) const {
    for (int t = 0; t < network.tensor_count; ++t)
      if (call.adapted[t]) body(t, layout.tensors[t].place, layout.scalars(t));
  }
  PYMETA_FN bool is_factored_tensor(int t) const {
    return X::kFactors && factored && t == network.layers[0].weight;
  }

  // Of the adapted ones, for the products that want it so.
  PYMETA_FN void transpose(const Real* tensors, Real* transposed) const {
    for (int l = 0; l < network.layer_count; ++l) {
      const int t = network.layers[l].weight;
      if (layout.transposed[l] == kNowhere || !call.adapted[t]) continue;
      transpose_weight<X>(network.layers[l], tensors + layout.tensors[t].place,
                          transposed + layout.transposed[l]);
    }
  }

  // ---- tapes ---------------------------------------------------------------------------------------------------

  // A pass's arrays (workspace.h: TapeLayout).
  struct Tape {
    const State* state;
    const TapeLayout* layout;
    Real* base;

    PYMETA_FN Real* at(Place place) const { return place == kNowhere ? nullptr : base + place; }
    PYMETA_FN Real* a(int l) const {
      const LayerTape& own = layout->layers[l];
      return own.shares_a ? state->memory.at(state->ws.shared) + own.a : at(own.a);
    }
    PYMETA_FN Real* d(int l) const {
      return l == layout->elsewhere ? state->memory.at(state->ws.query) : at(layout->layers[l].d);
    }
    PYMETA_FN Real* kept(int l, int i) const { return at(layout->layers[l].kept[i]); }
    PYMETA_FN Matrix input(int l, const ItemSet& set) const {
      return l == 0 ? set.x : Matrix{a(l - 1), X::stride(state->network.layers[l].in.channels)};
    }
    // Where the delta at a is first written: straight to d where the activation is done on the way.
    PYMETA_FN Real* output_delta(int l) const {
      Real* c = at(layout->layers[l].c);
      return c ? c : d(l);
    }
    PYMETA_FN LossRows loss_rows(const ItemSet& set) const {
      const int out = state->network.out_features();
      return {out,
              target_columns(*set.loss, out),
              X::blocks(set.extent.rows),
              at(layout->y),
              set.targets,
              set.scale,
              set.elements,
              at(layout->kept),
              set.extent.keep};
    }
  };
  PYMETA_FN Tape support_tape(int k) const {
    const std::size_t step = ws.keeps_steps ? static_cast<std::size_t>(k) : 0;
    return {this, &ws.support_tape, memory.at(ws.support) + step * ws.support_tape.size};
  }
  PYMETA_FN Tape query_tape() const { return {this, &ws.query_tape, memory.at(ws.query)}; }
  PYMETA_FN Real* tangent(Place place) const {
    return place == kNowhere ? nullptr : memory.at(ws.tangents) + place;
  }

  // ---- of a step -----------------------------------------------------------------------------------------------

  PYMETA_FN Real* gradient(int k) const {
    return memory.at(ws.gradients) +
           (ws.keeps_gradients ? static_cast<std::size_t>(k) : 0) * layout.size;
  }
  PYMETA_FN Real* optimizer_state(int k, int s) const {
    const std::size_t kept = ws.keeps_gradients ? static_cast<std::size_t>(k) : 0;
    return memory.at(ws.states) + (kept * call.optimizer.states() + s) * layout.size;
  }
  PYMETA_FN StepArrays step_arrays(int k, int t, const Parameters& theta) const {
    const std::size_t place = layout.tensors[t].place;
    StepArrays a{rates.elements(k, place),
                 rates.is_spread() ? Real(0) : rates.rate(k, t),
                 theta.tensor(t),
                 gradient(k) + place,
                 call.is_anchored() ? start().tensor(t) : nullptr,
                 {},
                 {}};
    for (int s = 0; s < call.optimizer.states(); ++s) {
      a.state_before[s] = k > 0 ? optimizer_state(k - 1, s) + place : nullptr;
      a.state[s] = optimizer_state(k, s) + place;
    }
    return a;
  }

  // body(tensor) gives a function of the offset of a vector in it, which is summed over all adapted elements of each
  // task; on both executors of the CPU in the order of sum_features.
  template <class Body>
  PYMETA_FN Vec sum_adapted(Body body) const {
    Vec total = zero();
    for_adapted([&](int t, std::size_t, std::size_t) {
      total = X::sum_elements(layout.tensors[t], total, body(t));
    });
    return total;
  }
  PYMETA_FN StepCommon step_common(int k, const Parameters& theta, const Step& step) const {
    StepCommon common{anchor, broadcast(1), zero(), step.correction, step.active, step.all_active};
    if (call.optimizer.clip_norm > 0) {
      common.norm = gradient_norm(k, theta, common);
      common.clip = minimum(broadcast(Real(call.optimizer.clip_norm)) / (common.norm + Real(1e-6)),
                            broadcast(1));
    }
    return common;
  }
  // By what a task's share of a sum over tasks is scaled, from its sum of squares, as
  // torch.nn.utils.clip_grad_norm_ would.
  PYMETA_FN Vec share_factor(Vec squares) const {
    return minimum(broadcast(Real(call.task_clip)) / (square_root(squares) + Real(1e-6)),
                   broadcast(1));
  }

 private:
  // Steps with rows of their own differ without any adaptation.
  PYMETA_FN bool changes(const Layer& layer) const { return layer.steps > 0 || is_adapted(layer); }
  PYMETA_FN bool is_adapted(const Layer& layer) const {
    return (layer.weight >= 0 && call.adapted[layer.weight]) ||
           (layer.bias >= 0 && call.adapted[layer.bias]);
  }
  // The start of a tensor: the item's own or the one that all share.
  PYMETA_FN const Real* start_of(int t) const {
    return call.has_own_start(t) ? memory.at(ws.start) : shared.theta;
  }
  PYMETA_FN const Real* start_transposed_of(int t) const {
    return call.has_own_start(t) ? memory.at(ws.start_transposed) : shared.theta_transposed;
  }
  // Before a clip is known: `common` has the factor 1.
  PYMETA_FN PYMETA_NOINLINE Vec gradient_norm(int k, const Parameters& theta,
                                              const StepCommon& common) const {
    return square_root(sum_adapted([&](int t) {
      return [&common, a = step_arrays(k, t, theta)](std::size_t at) {
        const Vec g = clipped_gradient(a, common, at);
        return g * g;
      };
    }));
  }
};

PYMETA_KERNEL_END
