// The algorithm: adapt a start to a support set, and the exact gradient of the query loss after adaptation.
//
// MAML (Finn, Abbeel, Levine 2017, algorithm 1), for one item of an executor X:
//
//   theta[0] = start;  theta[k+1] = theta[k] - lr[k] d[k],  d[k] = g[k] = dL_support/dtheta at theta[k] in plain SGD,
//                      and what the optimiser's rule makes of it in general (optimizers.h)
//   loss = L_query(theta[K])
//   v = dL_query/dtheta at theta[K]
//   for k = K-1 .. 0:   (lr[k] gets -d[k] v)   u = the adjoint of g[k], -lr[k] v in plain SGD;   v += H[k] u
//   v is the meta-gradient.
//
// H[k] u, the Hessian of the support loss at theta[k] times u, is a tangent pass over the tape of step k
// (Pearlmutter 1994): no graph, no approximation, and the tangent of the first layer's input delta is what flows
// to the support inputs. A first-order meta-gradient takes g[k] as a constant. A tensor that the inner loop does not
// adapt has no u, yet receives its gradient from every pass.
//
// Reptile (Nichol, Achiam, Schulman 2018) and fine-tuning are the same inner loop without the way back.
#pragma once

#include "factored.h"
#include "layers.h"
#include "losses.h"
#include "optimizers.h"
#include "workspace.h"

PYMETA_KERNEL_BEGIN

// The start and the per-element learning rates in the executor's layout, shared by all items of a call.
struct Shared {
  const Real* theta;
  const Real* theta_transposed;
  const Real* rates;        // [lr.rows, parameters], or null
  const Real* corrections;  // [steps, 2] Adam's scale and eps (optimizers.h), or null
};

// One set of one item.
struct ItemSet {
  Matrix x;
  Extent extent;
  const Real* targets;  // null: predictions only
  const Real* scale;
  Real* dx;  // [rows, in], or null
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
      : set_(set), active_(set.extent.count > zero()), corrections_(corrections) {}
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
class InnerLoop {
 public:
  PYMETA_FN InnerLoop(const Call<Real>& call, const Workspace<X>& workspace, const Shared& shared,
                      const Memory& memory)
      : call_(call),
        network_(*call.network),
        ws_(workspace),
        layout_(workspace.parameters),
        shared_(shared),
        memory_(memory),
        rates_(call, shared.rates, workspace.parameters.size) {
    lowest_ = 0;
    while (lowest_ < network_.layer_count && !is_adapted(network_.layers[lowest_])) ++lowest_;
  }

  // A network's parameters at one step: adapted tensors from `own`, the others from the start.
  struct Parameters {
    const InnerLoop* loop;
    const Real* own;
    const Real* own_transposed;
    bool is_start = false;

    PYMETA_FN const Real* tensor(int t) const {
      if (t < 0) return nullptr;
      const bool changed = !is_start && loop->call_.adapted[t];
      return (changed ? own : loop->start_of(t)) + loop->layout_.tensors[t].place;
    }
    PYMETA_FN const Real* transposed(int l) const {
      const Place place = loop->layout_.transposed[l];
      if (place == kNowhere) return nullptr;
      const int t = loop->network_.layers[l].weight;
      const bool changed = !is_start && loop->call_.adapted[t];
      return (changed ? own_transposed : loop->start_transposed_of(t)) + place;
    }
  };

  PYMETA_FN Parameters start() const { return {this, nullptr, nullptr, true}; }

  // The item's first layer, where it is a factored one; null otherwise.
  PYMETA_FN void set_factored(FactoredLayer<X>* layer) { factored_ = layer; }

  // K inner steps; returns theta[K]. batches.step(k) says what step k works on.
  template <class Batches>
  PYMETA_FN Parameters adapt(Batches& batches) {
    Parameters theta = start();
    loss_sum_ = zero();
    for (int k = 0; k < call_.steps; ++k) theta = inner_step(k, theta, batches.step(k));
    return theta;
  }
  PYMETA_FN void begin_factored(const ItemSet& support) {
    if constexpr (X::kFactors)
      if (factored_) factored_->begin(support.x, support.extent);
  }
  // The weights of a factored layer after all steps, for those who want to keep them.
  PYMETA_FN void materialise(const ItemSet& support) {
    if constexpr (X::kFactors) {
      const int t = network_.layers[0].weight;
      if (factored_ && call_.adapted[t] && call_.steps > 0)
        factored_->materialise(support.x, start().tensor(t),
                               memory_.at(ws_.theta) + layout_.tensors[t].place);
    }
  }
  // The mean over the steps of each task's loss while they ran.
  PYMETA_FN Vec mean_step_loss() const {
    return call_.steps > 0 ? loss_sum_ / broadcast(Real(call_.steps)) : zero();
  }

  // Epochs over each task's rows. With validation rows the weights of the lowest validation loss are kept, those of the
  // start among them, and a task stops when `patience` epochs in a row brought nothing lower.
  // batches.step(epoch, b, running) says what the b-th step of an epoch works on; `record` takes the losses down.
  template <class Batches, class Record>
  PYMETA_FN Parameters fine_tune(Batches& batches, const ItemSet* validation, Record& record) {
    Parameters theta = start();
    IntVec running = batches.present(), judged = IntVec{};
    Vec best = zero(), best_epoch = zero(), epochs = zero();
    if (validation) {
      // Where no row weighs anything there is nothing to judge by.
      judged = X::sum_rows_in_order(validation->extent, validation->scale) > zero();
      best = evaluate(theta, *validation);
      record.validation(0, best, judged);
      keep_best(theta, ~IntVec{});
    }
    int steps = 0;
    for (int epoch = 1; epoch <= call_.epochs && any_lane(running); ++epoch) {
      loss_sum_ = zero();
      for (int b = 0; b < batches.count(); ++b) {
        const Step step = batches.step(epoch - 1, b, running);
        if (any_lane(step.active)) theta = inner_step(steps++, theta, step);
      }
      epochs = select(running, broadcast(Real(epoch)), epochs);
      record.train(epoch - 1, loss_sum_ / batches.rows(), running);
      if (!validation) continue;
      const Vec loss = evaluate(theta, *validation);
      record.validation(epoch, loss, running & judged);
      const IntVec better = running & ((loss < best) | ~judged);
      best = select(better, loss, best);
      best_epoch = select(better, broadcast(Real(epoch)), best_epoch);
      keep_best(theta, better);
      if (call_.patience >= 0)
        running = running & (~judged | (epochs - best_epoch < broadcast(Real(call_.patience))));
    }
    record.finish(validation ? best_epoch : epochs, epochs);
    return validation ? Parameters{this, memory_.at(ws_.best), nullptr} : theta;
  }

  // Adds start - theta to the totals.
  PYMETA_FN void add_difference(const Parameters& theta, const Totals& totals) const {
    for (int t = 0; t < network_.tensor_count; ++t) {
      const std::size_t place = layout_.tensors[t].place;
      const Real *from = start().tensor(t), *to = theta.tensor(t);
      X::each(layout_.scalars(t), [&](std::size_t i) {
        const Real* base = totals.base(place + i);
        const Vec difference = load(from + i) - load(to + i);
        store(totals.gradient + place + i, base ? load(base) + difference : difference);
      });
    }
  }

  // Forward pass: outputs() holds the raw outputs, class-major; returns the loss of each task, if there are targets.
  PYMETA_FN PYMETA_APART Vec evaluate(const Parameters& theta, const ItemSet& query) {
    const Tape tape{this, &ws_.query_tape, memory_.at(ws_.query)};
    forward(theta, query, tape, /*is_query=*/true);
    return query.targets ? X::sum_rows_in_order(query.extent, tape.at(ws_.query_tape.row_losses))
                         : zero();
  }
  PYMETA_FN const Real* outputs() const { return memory_.at(ws_.query) + ws_.query_tape.y; }

  // MAML in two halves. The first adapts and returns the query loss of each task; outputs() are those of the query set
  // until the second adds the meta-gradient to `totals` (all of it, with each item).
  PYMETA_FN Vec meta_loss(const ItemSet& support, const ItemSet& query) {
    const WholeSet steps(support, shared_.corrections);
    adapted_ = adapt(steps);
    if constexpr (X::kFactors)
      if (factored_) factored_->begin_query(query.x, query.extent, support.x);
    return evaluate(adapted_, query);
  }
  PYMETA_FN void meta_gradient(const ItemSet& support, const ItemSet& query, const Totals& totals) {
    const bool keep_v = call_.reverses();
    const Tape tape{this, &ws_.query_tape, memory_.at(ws_.query)};
    Real* v = memory_.at(ws_.v);
    backward(adapted_, query, tape, [&](int t) {
      const std::size_t place = layout_.tensors[t].place;
      return keep_v ? Sink{v + place} : Sink{totals.gradient + place, totals.base(place)};
    });
    if constexpr (X::kFactors)
      if (factored_) factored_->begin_reverse(tape.d(0));
    if (keep_v) {
      const WholeSet steps(support, shared_.corrections);
      clear_state_adjoints();
      for (int k = call_.steps - 1; k >= 0; --k) reverse_step(k, steps.step(k), totals);
    }
    if (keep_v && !call_.second_order()) {
      const std::size_t summed = factored_ ? layout_.size_without_first : layout_.size;
      X::each(summed, [&](std::size_t i) {
        const Real* base = totals.base(i);
        store(totals.gradient + i, base ? load(base) + load(v + i) : load(v + i));
      });
    }
  }

 private:
  // A pass's arrays (workspace.h: TapeLayout).
  struct Tape {
    InnerLoop* loop;
    const TapeLayout* layout;
    Real* base;

    PYMETA_FN Real* at(Place place) const { return place == kNowhere ? nullptr : base + place; }
    PYMETA_FN Real* a(int l) const { return at(layout->a[l]); }
    PYMETA_FN Real* d(int l) const { return at(layout->d[l]); }
    PYMETA_FN NormState norm(int l) const { return {at(layout->h[l]), at(layout->inverse[l])}; }
    PYMETA_FN Matrix input(int l, const ItemSet& set) const {
      return l == 0 ? set.x : Matrix{a(l - 1), X::stride(loop->network_.layers[l].in)};
    }
    // What the activation of layer l was applied to, where that is kept.
    PYMETA_FN const Real* z(int l, const ItemSet& set) const {
      return loop->network_.layers[l].kind == LayerKind::none ? input(l, set).p : at(layout->z[l]);
    }
    PYMETA_FN LossRows loss_rows(const ItemSet& set) const {
      return {loop->network_.out_features(),
              X::blocks(set.extent.rows),
              at(layout->y),
              set.targets,
              set.scale,
              at(layout->probability),
              set.extent.keep};
    }
  };

  PYMETA_FN Tape support_tape(int k) {
    const std::size_t step = ws_.keeps_steps ? static_cast<std::size_t>(k) : 0;
    return {this, &ws_.support_tape, memory_.at(ws_.support) + step * ws_.support_tape.size};
  }
  PYMETA_FN Parameters adapted(int k) const {  // theta[k], k >= 1
    const std::size_t step = ws_.keeps_steps ? static_cast<std::size_t>(k - 1) : 0;
    return {this, memory_.at(ws_.theta) + step * layout_.size,
            memory_.at(ws_.theta_transposed) + step * layout_.transposed_size};
  }
  PYMETA_FN Real* gradient(int k) const {
    return memory_.at(ws_.gradients) +
           (ws_.keeps_gradients ? static_cast<std::size_t>(k) : 0) * layout_.size;
  }

  template <class Body>  // body(tensor, place, scalars) for each tensor that the inner loop changes
  PYMETA_FN void each_adapted(Body body) const {
    for (int t = 0; t < network_.tensor_count; ++t)
      if (call_.adapted[t]) body(t, layout_.tensors[t].place, layout_.scalars(t));
  }

  PYMETA_FN bool is_narrow(int l) const { return layout_.narrow && l == network_.layer_count - 1; }

  PYMETA_FN bool is_adapted(const Layer& layer) const {
    return (layer.weight >= 0 && call_.adapted[layer.weight]) ||
           (layer.bias >= 0 && call_.adapted[layer.bias]);
  }

  // The start of a tensor: the item's own or the one that all share.
  PYMETA_FN const Real* start_of(int t) const {
    return call_.starts_apart(t) ? memory_.at(ws_.start) : shared_.theta;
  }
  PYMETA_FN const Real* start_transposed_of(int t) const {
    return call_.starts_apart(t) ? memory_.at(ws_.start_transposed) : shared_.theta_transposed;
  }

  PYMETA_FN PYMETA_APART void keep_best(const Parameters& theta, IntVec better) {
    if (!any_lane(better)) return;
    each_adapted([&](int t, std::size_t place, std::size_t size) {
      const Real* from = theta.tensor(t);
      Real* best = memory_.at(ws_.best) + place;
      X::each(size, [&](std::size_t i) {
        store(best + i, select(better, load(from + i), load(best + i)));
      });
    });
  }

  PYMETA_FN PYMETA_APART Parameters inner_step(int k, const Parameters& theta, const Step& now) {
    const ItemSet& support = *now.set;
    const Tape tape = support_tape(k);
    // Layers below the lowest that changes see the same rows with the same weights again.
    const bool same_below = now.same_rows && !ws_.keeps_steps;
    forward(theta, support, tape, /*is_query=*/false, same_below ? lowest_ : 0);
    if (ws_.sums_losses) {
      const Vec loss = X::sum_rows_in_order(support.extent, tape.at(tape.layout->row_losses));
      loss_sum_ =
          loss_sum_ +
          (call_.by_epochs() ? select(now.active, loss * support.extent.count, zero()) : loss);
    }
    const Parameters next = adapted(k + 1);
    Real* own = const_cast<Real*>(next.own);
    const bool fused = call_.optimizer.is_plain() && !rates_.per_element() && !ws_.keeps_gradients;
    backward(
        theta, support, tape,
        [&](int t) {
          if (!call_.adapted[t]) return Sink{};
          const std::size_t place = layout_.tensors[t].place;
          if (fused) return Sink{own + place, theta.tensor(t), nullptr, -rates_.rate(k, t)};
          return Sink{gradient(k) + place};
        },
        /*input_delta=*/false, call_.second_order() ? 0 : lowest_);
    if constexpr (X::kFactors)
      if (factored_) factored_->step(tape.d(0), rates_.uniform_rate(k));
    if (!fused) {
      const StepCommon common = common_of(k, theta, now);
      with_rule(call_.optimizer, [&](const auto& rule) {
        each_adapted([&](int t, std::size_t place, std::size_t size) {
          if (!is_factored_tensor(t)) step<X>(rule, arrays(k, t, theta), common, size, own + place);
        });
      });
    }
    transpose(own, const_cast<Real*>(next.own_transposed));
    if (ws_.saves_steps) save(k, next);
    return next;
  }

  // ---- steps that are kept elsewhere than they are used ---------------------------------------------------------

  // theta[k + 1] and the tape of step k; the reverse sweep begins with the last tape as it is.
  PYMETA_FN PYMETA_APART void save(int k, const Parameters& next) {
    if (k == call_.steps - 1) return;
    Real* to = saved(k);
    X::copy(to, next.own, layout_.size);
    X::copy(to + layout_.size, next.own_transposed, layout_.transposed_size);
    X::copy(to + layout_.size + layout_.transposed_size, support_tape(k).base,
            ws_.support_tape.size);
  }
  // theta[k] and the tape of step k, where they are used.
  PYMETA_FN PYMETA_APART void restore(int k) {
    if (k > 0) {
      X::copy(memory_.at(ws_.theta), saved(k - 1), layout_.size);
      X::copy(memory_.at(ws_.theta_transposed), saved(k - 1) + layout_.size,
              layout_.transposed_size);
    }
    if (k < call_.steps - 1)
      X::copy(memory_.at(ws_.support), saved(k) + layout_.size + layout_.transposed_size,
              ws_.support_tape.size);
  }
  PYMETA_FN Real* saved(int k) const {
    return memory_.at(ws_.saved) +
           k * (layout_.size + layout_.transposed_size + ws_.support_tape.size);
  }

  // ---- the rule's arrays ---------------------------------------------------------------------------------------

  PYMETA_FN Real* state(int k, int s) const {
    const std::size_t kept = ws_.keeps_gradients ? static_cast<std::size_t>(k) : 0;
    return memory_.at(ws_.states) + (kept * call_.optimizer.states() + s) * layout_.size;
  }
  PYMETA_FN StepArrays arrays(int k, int t, const Parameters& theta) const {
    const std::size_t place = layout_.tensors[t].place;
    StepArrays a{rates_.elements(k, place),
                 rates_.per_element() ? Real(0) : rates_.rate(k, t),
                 theta.tensor(t),
                 gradient(k) + place,
                 call_.optimizer.anchor != 0 ? start().tensor(t) : nullptr,
                 {},
                 {}};
    for (int s = 0; s < call_.optimizer.states(); ++s) {
      a.state_before[s] = k > 0 ? state(k - 1, s) + place : nullptr;
      a.state[s] = state(k, s) + place;
    }
    return a;
  }

  // body(tensor) gives a function of the offset of a vector in it, which is summed over all adapted elements of each
  // task; for both executors in the order of sum_features.
  template <class Body>
  PYMETA_FN Vec sum_adapted(Body body) const {
    Vec total = zero();
    each_adapted([&](int t, std::size_t, std::size_t) {
      const PackedTensor& packed = layout_.tensors[t];
      total = X::sum_elements(packed, total, body(t));
    });
    return total;
  }

  // Before a clip is known: `common` has the factor 1.
  PYMETA_FN Vec gradient_norm(int k, const Parameters& theta, const StepCommon& common) const {
    return square_root(sum_adapted([&](int t) {
      return [&common, a = arrays(k, t, theta)](std::size_t at) {
        const Vec g = clipped_gradient(a, common, at);
        return g * g;
      };
    }));
  }
  PYMETA_FN StepCommon common_of(int k, const Parameters& theta, const Step& step) const {
    StepCommon common{broadcast(Real(call_.optimizer.anchor)),
                      broadcast(1),
                      zero(),
                      step.correction,
                      step.active,
                      step.all_active};
    if (call_.optimizer.clip_norm > 0) {
      common.norm = gradient_norm(k, theta, common);
      common.clip = minimum(broadcast(Real(call_.optimizer.clip_norm)) / (common.norm + Real(1e-6)),
                            broadcast(1));
    }
    return common;
  }

  PYMETA_FN Real* state_adjoint(int s) const {
    return memory_.at(ws_.state_adjoints) + s * layout_.size;
  }
  PYMETA_FN void clear_state_adjoints() {
    if (ws_.direction_is_v) return;
    X::each(call_.optimizer.states() * layout_.size,
            [&](std::size_t i) { store(state_adjoint(0) + i, zero()); });
  }

  PYMETA_FN Real* lr_gradient_of(int k, int t, const Totals& totals) const {
    if (!call_.lr_gradient) return nullptr;
    if (rates_.per_element())
      return totals.lr_gradient + rates_.row(k) * layout_.size + layout_.tensors[t].place;
    return totals.lr_gradient +
           (static_cast<std::size_t>(rates_.row(k)) * call_.lr.columns + rates_.group(t)) * kWidth;
  }

  // Backwards through the rule of step k: v gets its direct part, u becomes the adjoint of the support gradient.
  PYMETA_FN void rule_vjp(int k, const Parameters& theta, const Step& step, const Totals& totals) {
    const StepCommon common = common_of(k, theta, step);
    with_rule(call_.optimizer, [&](const auto& rule) {
      each_adapted([&](int t, std::size_t place, std::size_t size) {
        Real* d_state[kMaxStates];
        for (int s = 0; s < call_.optimizer.states(); ++s) d_state[s] = state_adjoint(s) + place;
        const StepArrays own = arrays(k, t, theta);
        Real* v = memory_.at(ws_.v) + place;
        if (call_.lr_gradient)
          step_rate_gradient<X>(rule, own, common, layout_.tensors[t], v,
                                lr_gradient_of(k, t, totals));
        step_vjp<X>(rule, own, common, size, v, memory_.at(ws_.u) + place, d_state);
      });
    });
    if (call_.optimizer.clip_norm > 0 && call_.second_order()) clip_vjp(k, common);
  }

  // The clip is g c(n) with n = |g| and c = min(1, clip / (n + 1e-6)):  u = c u + (c' / n) (g . u) g.
  PYMETA_FN void clip_vjp(int k, const StepCommon& common) {
    const Vec norm = common.norm;
    const Real* g = gradient(k);
    Real* u = memory_.at(ws_.u);
    const Vec along = sum_adapted([&](int t) {
      const std::size_t place = layout_.tensors[t].place;
      return [=](std::size_t at) { return load(g + place + at) * load(u + place + at); };
    });
    const IntVec bends = (common.clip < Real(1)) & (norm > zero());
    const Vec slope = select(bends, -(common.clip / (norm + Real(1e-6)) / norm * along), zero());
    each_adapted([&](int, std::size_t place, std::size_t size) {
      X::each(size, [=](std::size_t i) {
        store(u + place + i, fma(slope, load(g + place + i), common.clip * load(u + place + i)));
      });
    });
  }

  // The factored first layer stands in for a linear one; only executors that have it know how.

  PYMETA_FN bool is_factored_layer(int l) const { return X::kFactors && l == 0 && factored_; }
  PYMETA_FN bool is_factored_tensor(int t) const {
    return X::kFactors && factored_ && t == network_.layers[0].weight;
  }
  PYMETA_FN void factored_apply(bool to_query, const Real* bias, const Destination& to) const {
    if constexpr (X::kFactors) factored_->apply(to_query, bias, to);
  }
  PYMETA_FN void factored_apply_direction(const Real* bias, const Destination& to) const {
    if constexpr (X::kFactors) factored_->apply_direction(bias, to);
  }
  PYMETA_FN void factored_accumulate(const Real* rd, Real scale) const {
    if constexpr (X::kFactors) factored_->accumulate(rd, scale);
  }

  // The rate's gradient where v itself is the direction: -<g[k], v>.
  PYMETA_FN void rate_gradient(int k, const Totals& totals) {
    if (!call_.lr_gradient) return;
    each_adapted([&](int t, std::size_t place, std::size_t) {
      if (is_factored_tensor(t)) return;
      const Real *g = gradient(k) + place, *v = memory_.at(ws_.v) + place;
      X::fold(layout_.tensors[t], lr_gradient_of(k, t, totals),
              [=](std::size_t i, Vec sum) { return fma(-load(g + i), load(v + i), sum); });
    });
    if constexpr (X::kFactors)
      if (factored_) {
        Real* into = lr_gradient_of(k, network_.layers[0].weight, totals);
        store(into, load(into) - factored_->rate_gradient(support_tape(k).d(0)));
      }
  }

  // Step k backwards; in second order v += H[k] u, and for the first step the sum goes straight into the totals.
  PYMETA_FN void reverse_step(int k, const Step& step, const Totals& totals) {
    if (ws_.saves_steps) restore(k);
    const Parameters theta = k == 0 ? start() : adapted(k);
    const ItemSet& support = *step.set;
    Real* v = memory_.at(ws_.v);
    Real* u = v;
    Real scale = 1;
    if (ws_.direction_is_v) {
      rate_gradient(k, totals);
      scale = -rates_.uniform_rate(k);
    } else {
      rule_vjp(k, theta, step, totals);
      u = memory_.at(ws_.u);
    }
    if (!call_.second_order()) return;
    transpose(u, memory_.at(ws_.u_transposed));
    const Direction direction{this, u};
    const Tape tape = support_tape(k);
    tangent_forward(theta, direction, support, tape);
    tangent_backward(theta, direction, support, tape, k == call_.steps - 1, scale, [&](int t) {
      const std::size_t place = layout_.tensors[t].place;
      if (k > 0) return Sink{v + place, v + place, nullptr, scale};
      return Sink{totals.gradient + place, totals.base(place), v + place, scale};
    });
  }

  // The direction of a tangent pass: nothing for tensors that are not adapted.
  struct Direction {
    const InnerLoop* loop;
    const Real* u;
    PYMETA_FN const Real* tensor(int t) const {
      return t >= 0 && loop->call_.adapted[t] ? u + loop->layout_.tensors[t].place : nullptr;
    }
    PYMETA_FN const Real* transposed(int l) const {
      const Place place = loop->layout_.transposed[l];
      return place == kNowhere ? nullptr : loop->memory_.at(loop->ws_.u_transposed) + place;
    }
  };

  PYMETA_FN void transpose(const Real* tensors, Real* transposed) const {
    for (int l = 0; l < network_.layer_count; ++l) {
      if (layout_.transposed[l] == kNowhere || !call_.adapted[network_.layers[l].weight]) continue;
      X::transpose(network_.layers[l], tensors + layout_.tensors[network_.layers[l].weight].place,
                   transposed + layout_.transposed[l]);
    }
  }

  // ---- the passes ----------------------------------------------------------------------------------------------

  // From layer `from` on; what lies below is on the tape already.
  PYMETA_FN PYMETA_APART void forward(const Parameters& theta, const ItemSet& set, const Tape& tape,
                                      bool is_query = false, int from = 0) {
    const int last = network_.layer_count - 1;
    Real* y = tape.at(tape.layout->y);
    for (int l = from; l <= last; ++l) {
      const Layer& layer = network_.layers[l];
      const Matrix in = tape.input(l, set);
      const bool fused = is_fused(layer.activation.kind);
      Real* kept = tape.at(tape.layout->z[l]);
      Real* raw = fused || !kept ? tape.a(l) : kept;
      const Destination to{raw, layer.activation.kind == ActivationKind::relu};
      if (layer.kind == LayerKind::linear) {
        const Term term{in, theta.tensor(layer.weight)};
        if (is_narrow(l))
          X::narrow_apply(layer, set.extent, &term, 1, theta.tensor(layer.bias), y);
        else if (is_factored_layer(l))
          factored_apply(is_query, theta.tensor(layer.bias), to);
        else
          X::apply(layer, set.extent, &term, 1, theta.tensor(layer.bias), to);
      } else if (layer.kind != LayerKind::none) {
        norm_forward<X>(layer, set.extent, in, theta.tensor(layer.weight), theta.tensor(layer.bias),
                        tape.norm(l), to);
      }
      if (layer.kind == LayerKind::none)
        activate<X>(layer, set.extent, in.p, tape.a(l));
      else if (!fused)
        activate<X>(layer, set.extent, raw, tape.a(l));
    }
    if (!layout_.narrow) X::to_class_major(set.extent, network_.out_features(), tape.a(last), y);
    if (set.targets)
      loss_gradient<X>(*call_.loss, tape.loss_rows(set), tape.at(tape.layout->row_losses),
                       tape.at(tape.layout->dy));
  }

  // Where layer l's delta at `a` is first written: straight to d where the activation is done on the way.
  PYMETA_FN Destination delta_destination(int l, const Tape& tape, Real* delta) const {
    const ActivationKind kind = network_.layers[l].activation.kind;
    return {delta, false, kind == ActivationKind::relu ? tape.a(l) : nullptr};
  }
  PYMETA_FN Real* delta_place(int l, const Tape& tape) const {
    Real* c = tape.at(tape.layout->c[l]);
    return c ? c : tape.d(l);
  }
  PYMETA_FN void finish_delta(int l, const ItemSet& set, const Tape& tape) const {
    if (is_fused(network_.layers[l].activation.kind)) return;
    through_slope<X>(network_.layers[l], set.extent, tape.z(l, set), tape.a(l),
                     delta_place(l, tape), tape.d(l));
  }
  // A matrix passed on as it is: through the gate of a ReLU below, or copied.
  PYMETA_FN static void pass(const Extent& extent, int features, const Real* from,
                             const Destination& to) {
    X::with_epilogue(to, X::stride(features), extent, [&](const auto& emit) {
      X::map(extent, features, [&](long at, long column, int r) {
        emit(load(from + at), r, static_cast<int>(column / kWidth));
      });
    });
  }

  // Down to layer `lowest`, whose parameters are the last that want a gradient.
  template <class Sinks>
  PYMETA_FN PYMETA_APART void backward(const Parameters& theta, const ItemSet& set,
                                       const Tape& tape, Sinks sinks, bool input_delta = true,
                                       int lowest = 0) {
    const int last = network_.layer_count - 1;
    const Real* dy = tape.at(tape.layout->dy);
    if (!layout_.narrow) {
      Real* top = delta_place(last, tape);
      X::from_class_major(set.extent, network_.out_features(), dy, top);
      if (network_.layers[last].activation.kind == ActivationKind::relu)
        pass(set.extent, network_.out_features(), top, delta_destination(last, tape, tape.d(last)));
      finish_delta(last, set, tape);
    }
    for (int l = last; l >= lowest; --l) {
      const Layer& layer = network_.layers[l];
      const Matrix in = tape.input(l, set);
      const Real* d = is_narrow(l) ? dy : tape.d(l);
      if (l > lowest || (input_delta && set.dx)) {
        const Destination below =
            l > 0 ? delta_destination(l - 1, tape, delta_place(l - 1, tape)) : Destination{set.dx};
        if (layer.kind == LayerKind::linear) {
          const Term term{
              {d, X::stride(layer.out)}, theta.tensor(layer.weight), theta.transposed(l)};
          if (is_narrow(l))
            X::narrow_apply_transposed(layer, set.extent, &term, 1, below);
          else
            X::apply_transposed(layer, set.extent, &term, 1, below);
        } else if (layer.kind == LayerKind::none) {
          pass(set.extent, layer.in, d, below);
        } else {
          norm_backward<X>(layer, set.extent, d, theta.tensor(layer.weight), tape.norm(l), below);
        }
        if (l > 0) finish_delta(l - 1, set, tape);
      }
      const Sink weight = layer.weight >= 0 ? sinks(layer.weight) : Sink{};
      const Sink bias = layer.bias >= 0 ? sinks(layer.bias) : Sink{};
      if (layer.kind == LayerKind::linear) {
        const Matrix pair[1][2] = {{in, {d, X::stride(layer.out)}}};
        if (is_narrow(l)) {
          X::narrow_outer(layer.in, layer.out, set.extent, pair, 1, weight);
          X::narrow_sum_rows(layer.out, set.extent, d, bias);
        } else {
          if (!is_factored_layer(l)) X::outer(layer.in, layer.out, set.extent, pair, 1, weight);
          X::sum_rows(set.extent, layer.out, bias, [&](long at, long) { return load(d + at); });
        }
      } else if (layer.kind != LayerKind::none) {
        norm_gradient<X>(layer, set.extent, d, tape.norm(l), weight, bias);
      }
    }
  }

  PYMETA_FN Real* tangent(Place place) const {
    return place == kNowhere ? nullptr : memory_.at(ws_.tangents) + place;
  }
  PYMETA_FN NormTangent norm_tangents(int l) const {
    return {tangent(ws_.tangent.rh[l]), tangent(ws_.tangent.q[l])};
  }
  // The tangent of layer l's input; null is zero, as at the first layer.
  PYMETA_FN Matrix tangent_input(int l) const {
    return {l == 0 ? nullptr : tangent(ws_.tangent.ra[l - 1]), X::stride(network_.layers[l].in)};
  }

  PYMETA_FN PYMETA_APART void tangent_forward(const Parameters& theta, const Direction& u,
                                              const ItemSet& set, const Tape& tape) {
    const int last = network_.layer_count - 1;
    Real* ry = tangent(ws_.tangent.ry);
    for (int l = 0; l <= last; ++l) {
      const Layer& layer = network_.layers[l];
      const Matrix rx = tangent_input(l);
      const bool fused = is_fused(layer.activation.kind);
      Real* ra = tangent(ws_.tangent.ra[l]);
      Real* rz = tangent(ws_.tangent.rz[l]);
      Real* raw = rz ? rz : ra;
      const Destination to = delta_destination(l, tape, raw);
      if (layer.kind == LayerKind::linear) {
        Term terms[2];
        int count = 0;
        if (rx.p) terms[count++] = {rx, theta.tensor(layer.weight)};
        if (const Real* du = u.tensor(layer.weight)) terms[count++] = {tape.input(l, set), du};
        if (is_narrow(l))
          X::narrow_apply(layer, set.extent, terms, count, u.tensor(layer.bias), ry);
        else if (is_factored_layer(l))
          factored_apply_direction(u.tensor(layer.bias), to);
        else
          X::apply(layer, set.extent, terms, count, u.tensor(layer.bias), to);
      } else if (layer.kind != LayerKind::none) {
        norm_tangent<X>(layer, set.extent, rx.p, theta.tensor(layer.weight), u.tensor(layer.weight),
                        u.tensor(layer.bias), tape.norm(l), norm_tangents(l), to);
      } else if (rx.p) {
        pass(set.extent, layer.in, rx.p, to);
      } else {
        X::map(set.extent, layer.out, [&](long at, long, int) { store(raw + at, zero()); });
      }
      if (!fused) through_slope<X>(layer, set.extent, tape.z(l, set), tape.a(l), raw, ra);
    }
    if (!layout_.narrow)
      X::to_class_major(set.extent, network_.out_features(), tangent(ws_.tangent.ra[last]), ry);
    loss_hessian_product<X>(*call_.loss, tape.loss_rows(set), ry, tangent(ws_.tangent.rdy));
  }

  PYMETA_FN void finish_delta_tangent(int l, const ItemSet& set, const Tape& tape, Real* rd) const {
    if (is_fused(network_.layers[l].activation.kind)) return;
    through_slope_tangent<X>(network_.layers[l], set.extent, tape.z(l, set), tape.a(l),
                             tape.at(tape.layout->c[l]), tangent(ws_.tangent.rz[l]), rd, rd);
  }

  template <class Sinks>
  PYMETA_FN PYMETA_APART void tangent_backward(const Parameters& theta, const Direction& u,
                                               const ItemSet& set, const Tape& tape,
                                               bool first_to_input, Real scale, Sinks sinks) {
    const int last = network_.layer_count - 1;
    const Real* dy = tape.at(tape.layout->dy);
    const Real* rdy = tangent(ws_.tangent.rdy);
    Real* rd = tangent(ws_.tangent.rd[0]);
    Real* rd_below = tangent(ws_.tangent.rd[1]);
    if (!layout_.narrow) {
      X::from_class_major(set.extent, network_.out_features(), rdy, rd);
      if (network_.layers[last].activation.kind == ActivationKind::relu)
        pass(set.extent, network_.out_features(), rd, delta_destination(last, tape, rd));
      finish_delta_tangent(last, set, tape, rd);
    }
    for (int l = last; l >= 0; --l) {
      const Layer& layer = network_.layers[l];
      const Matrix in = tape.input(l, set), rx = tangent_input(l);
      const Real* d = is_narrow(l) ? dy : tape.d(l);
      const Real* own = is_narrow(l) ? rdy : rd;
      if (l > 0 || set.dx) {
        const Destination below =
            l > 0 ? delta_destination(l - 1, tape, rd_below) : Destination{rd_below};
        if (layer.kind == LayerKind::linear) {
          Term terms[2] = {
              {{own, X::stride(layer.out)}, theta.tensor(layer.weight), theta.transposed(l)}};
          int count = 1;
          if (const Real* du = u.tensor(layer.weight))
            terms[count++] = {{d, X::stride(layer.out)}, du, u.transposed(l)};
          if (is_narrow(l))
            X::narrow_apply_transposed(layer, set.extent, terms, count, below);
          else
            X::apply_transposed(layer, set.extent, terms, count, below);
        } else if (layer.kind == LayerKind::none) {
          pass(set.extent, layer.in, own, below);
        } else {
          norm_backward_tangent<X>(layer, set.extent, d, own, theta.tensor(layer.weight),
                                   u.tensor(layer.weight), tape.norm(l), norm_tangents(l), below);
        }
        if (l > 0)
          finish_delta_tangent(l - 1, set, tape, rd_below);
        else
          X::map(set.extent, layer.in, [&](long at, long, int) {
            const Vec before = first_to_input ? zero() : load(set.dx + at);
            store(set.dx + at, fma(broadcast(scale), load(rd_below + at), before));
          });
      }
      const Sink weight = layer.weight >= 0 ? sinks(layer.weight) : Sink{};
      const Sink bias = layer.bias >= 0 ? sinks(layer.bias) : Sink{};
      if (layer.kind == LayerKind::linear) {
        Matrix pairs[2][2];
        int count = 0;
        const auto pair = [&](const Matrix& x, const Real* delta) {
          pairs[count][0] = x;
          pairs[count++][1] = {delta, X::stride(layer.out)};
        };
        if (rx.p) pair(rx, d);
        pair(in, own);
        if (is_narrow(l)) {
          X::narrow_outer(layer.in, layer.out, set.extent, pairs, count, weight);
          X::narrow_sum_rows(layer.out, set.extent, own, bias);
        } else {
          if (is_factored_layer(l))
            factored_accumulate(own, scale);
          else
            X::outer(layer.in, layer.out, set.extent, pairs, count, weight);
          X::sum_rows(set.extent, layer.out, bias, [&](long at, long) { return load(own + at); });
        }
      } else if (layer.kind != LayerKind::none) {
        norm_gradient_tangent<X>(layer, set.extent, d, own, tape.norm(l), norm_tangents(l), weight,
                                 bias);
      }
      Real* swap = rd;
      rd = rd_below;
      rd_below = swap;
    }
  }

  const Call<Real>& call_;
  const Network& network_;
  const Workspace<X>& ws_;
  const ParameterLayout<X>& layout_;
  const Shared& shared_;
  Memory memory_;
  Rates rates_;
  FactoredLayer<X>* factored_ = nullptr;
  Parameters adapted_{};   // by meta_loss
  int lowest_;             // the lowest layer that the inner loop changes
  Vec loss_sum_ = zero();  // of the steps so far, or of the epoch's
};

PYMETA_KERNEL_END
