// One inner step of several tasks of equal size, whose rows lie one below the other as one item (cpu/stacked.h).
//
// At the start all tasks have the same weights, so a pass over their support sets is a pass over one tall set. After the step
// a task's own are
//   W' = W - lr X^T D                     X, D the input and the delta of its r support rows at this layer
// and the direction in which the way back differentiates is u = -lr Xq^T Dq, of its q query rows. What it asks of the two are
// products, which need neither:
//   Dq W'^T = Dq W^T - lr (Dq D^T) X      X u = -lr (X Xq^T) Dq      D u^T = -lr (D Dq^T) Xq
// with matrices of r x q numbers in place of those of in x out. Gradients are sums over the rows of all tasks, each one tall
// product. Only the predictions need W' itself: it is made for one task after the other in the same place, by the operations of
// linear.h, so that losses and predictions have the same bits on every executor.
//
// An executor X that can do this has X::kMostStacked, the most tasks of an item.
#pragma once

#include "state.h"

PYMETA_KERNEL_BEGIN

// Is a product with the direction shorter by way of a Gram matrix? Sums over features cost such a one about twice its multiply-adds.
PYMETA_FN inline bool is_low_rank(int in, int out, int support_rows, int query_rows) {
  const double direct = static_cast<double>(in) * out * (support_rows + query_rows);
  return static_cast<double>(support_rows) * query_rows * (2 * in + out) < direct;
}

// A layer of such an item, in all passes (layer.h): what is left of the layer's own rules works on the tall sets.
template <class X>
class StackedLayer {
 public:
  PYMETA_FN StackedLayer(const State<X>& state, int l, bool is_query)
      : state_(state),
        stack_(*state.stack),
        layer_(state.network.layers[l]),
        l_(l),
        is_query_(is_query),
        support_{stack_.support_rows, nullptr, broadcast(Real(stack_.support_rows))},
        query_{stack_.query_rows, nullptr, broadcast(Real(stack_.query_rows))} {}

 protected:
  PYMETA_FN int in() const { return layer_.in.channels; }
  PYMETA_FN int out() const { return layer_.out.channels; }
  PYMETA_FN bool adapts_weight() const { return state_.call.adapted[layer_.weight]; }
  PYMETA_FN bool adapts_bias() const {
    return layer_.bias >= 0 && state_.call.adapted[layer_.bias];
  }
  // Has each task parameters of its own in this pass?
  PYMETA_FN bool is_own() const { return is_query_ && (adapts_weight() || adapts_bias()); }
  PYMETA_FN const Real* weight() const { return state_.start().tensor(layer_.weight); }
  PYMETA_FN const Real* bias() const { return state_.start().tensor(layer_.bias); }
  PYMETA_FN Real step_of(int tensor) const { return -state_.rates.rate(0, tensor); }

  // The rows of task t.
  PYMETA_FN Matrix support_input(int t) const {
    return input(state_.support_tape(0), stack_.support_x, t * stack_.support_rows);
  }
  PYMETA_FN Matrix query_input(int t) const {
    return input(state_.query_tape(), stack_.query_x, t * stack_.query_rows);
  }
  PYMETA_FN static Matrix part(const Matrix& all, int first) {
    return {all.p + first * all.row, all.row};
  }
  PYMETA_FN static Destination part(const Destination& all, int first, long row) {
    return {all.p + first * row, all.relu, all.gate ? all.gate + first * row : nullptr};
  }

  PYMETA_FN Real* memory(Place place) const { return state_.memory.at(place); }
  PYMETA_FN const StackLayout& places() const { return state_.ws.stack; }

  const State<X>& state_;
  const Stack& stack_;
  const Layer& layer_;
  const int l_;
  const bool is_query_;
  const Extent support_, query_;  // of one task

 private:
  PYMETA_FN Matrix input(const typename State<X>::Tape& tape, const Matrix& x, int first) const {
    return part(l_ == 0 ? x : Matrix{tape.a(l_ - 1), X::stride(in())}, first);
  }
};

template <class X>
class StackedLinear : StackedLayer<X> {
  using Base = StackedLayer<X>;
  using Base::adapts_bias, Base::adapts_weight, Base::in, Base::layer_, Base::memory, Base::out;
  using Base::part, Base::places, Base::query_, Base::query_input, Base::stack_, Base::state_;
  using Base::step_of, Base::support_, Base::support_input;

 public:
  using Base::Base;

  PYMETA_FN void forward(const LayerPass& p, const Destination& to) const {
    if (!Base::is_own()) return Linear<X>::forward(p, to);
    for (int t = 0; t < stack_.groups; ++t) {
      const Term term{query_input(t), own_weight(t)};
      X::apply(in(), out(), query_, &term, 1, own_bias(t),
               part(to, t * stack_.query_rows, X::stride(out())));
    }
  }
  PYMETA_FN void backward(const LayerPass& p, const Destination& below) const {
    if (!Base::is_query_ || !adapts_weight()) return Linear<X>::backward(p, below);
    const Real* start = state_.start().transposed(Base::l_);
    for (int t = 0; t < stack_.groups; ++t) {
      const Matrix delta = query_delta(t);
      X::gram(support_delta(t), stack_.support_rows, delta, stack_.query_rows, out(),
              step_of(layer_.weight), gram_of_deltas(t));
      const Mix terms[2] = {
          {delta.p, delta.row, X::kElement, start, out()},
          {gram_of_deltas(t), X::kElement, gram_row(), support_input(t).p, stack_.support_rows}};
      X::combine(query_, in(), terms, 2, nullptr,
                 part(below, t * stack_.query_rows, X::stride(in())));
    }
  }
  // The step itself is done where its result is needed.
  PYMETA_FN void gradient(const LayerPass& p, const Sink& weight, const Sink& bias) const {
    if (Base::is_query_) Linear<X>::gradient(p, weight, bias);
  }

  PYMETA_FN void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                 const Destination& to) const {
    for (int task = 0; task < stack_.groups; ++task) {
      Mix terms[2];
      int count = 0;
      const int first = task * stack_.support_rows;
      if (t.rx.p) terms[count++] = {part(t.rx, first).p, t.rx.row, X::kElement, p.weight, in()};
      if (adapts_weight()) terms[count++] = along_direction(task);
      X::combine(support_, out(), terms, count, bias_direction(task),
                 part(to, first, X::stride(out())));
    }
  }
  PYMETA_FN void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                  const Destination& below) const {
    for (int task = 0; task < stack_.groups; ++task) {
      const int first = task * stack_.support_rows;
      const Mix terms[2] = {
          {t.rd + first * X::stride(out()), X::stride(out()), X::kElement, p.weight_transposed,
           out()},
          {gram_of_deltas(task), gram_row(), X::kElement, query_input(task).p, stack_.query_rows}};
      X::combine(support_, in(), terms, adapts_weight() ? 2 : 1, nullptr,
                 part(below, first, X::stride(in())));
    }
  }
  PYMETA_FN void tangent_gradient(const LayerPass& p, const LayerTangent& t, const Sink& weight,
                                  const Sink& bias) const {
    Linear<X>::tangent_gradient(p, t, weight, bias);
  }

 private:
  PYMETA_FN Matrix support_delta(int t) const {
    return part({state_.support_tape(0).d(Base::l_), X::stride(out())}, t * stack_.support_rows);
  }
  PYMETA_FN Matrix query_delta(int t) const {
    return part({state_.query_tape().d(Base::l_), X::stride(out())}, t * stack_.query_rows);
  }
  PYMETA_FN long gram_row() const { return X::stride(stack_.query_rows); }
  PYMETA_FN Real* gram_of_deltas(int t) const {
    return memory(places().grams[Base::l_]) + t * stack_.support_rows * gram_row();
  }

  // W' and b' of a task, until those of the next one are asked for.
  PYMETA_FN const Real* own_weight(int t) const {
    if (!adapts_weight()) return Base::weight();
    const Matrix pair[1][2] = {{support_input(t), support_delta(t)}};
    Real* own = memory(places().weight);
    X::outer(in(), out(), support_, pair, 1,
             Sink{own, Base::weight(), nullptr, step_of(layer_.weight)});
    return own;
  }
  PYMETA_FN const Real* own_bias(int t) const {
    if (!adapts_bias()) return Base::bias();
    Real* own = memory(places().bias);
    sum_delta<X>(support_, out(), support_delta(t).p,
                 Sink{own, Base::bias(), nullptr, step_of(layer_.bias)});
    return own;
  }
  // X u, whichever way is shorter.
  PYMETA_FN Mix along_direction(int t) const {
    const Matrix x = support_input(t), xq = query_input(t), delta = query_delta(t);
    if (is_low_rank(in(), out(), stack_.support_rows, stack_.query_rows)) {
      Real* gram = memory(places().gram);
      X::gram(x, stack_.support_rows, xq, stack_.query_rows, in(), step_of(layer_.weight), gram);
      return {gram, gram_row(), X::kElement, delta.p, stack_.query_rows};
    }
    const Matrix pair[1][2] = {{xq, delta}};
    Real* u = memory(places().weight);
    X::outer(in(), out(), query_, pair, 1, Sink{u, nullptr, nullptr, step_of(layer_.weight)});
    return {x.p, x.row, X::kElement, u, in()};
  }
  PYMETA_FN const Real* bias_direction(int t) const {
    if (!adapts_bias()) return nullptr;
    Real* u = memory(places().bias);
    sum_delta<X>(query_, out(), query_delta(t).p, Sink{u, nullptr, nullptr, step_of(layer_.bias)});
    return u;
  }
};

// A narrow last layer is small: what a task's own weights and directions are is kept.
template <class X>
class StackedNarrowLinear : StackedLayer<X> {
  using Base = StackedLayer<X>;
  using Base::adapts_bias, Base::adapts_weight, Base::in, Base::layer_, Base::memory, Base::out;
  using Base::part, Base::places, Base::query_, Base::query_input, Base::stack_, Base::state_;
  using Base::step_of, Base::support_, Base::support_input;

 public:
  using Base::Base;

  PYMETA_FN void forward(const LayerPass& p, const Destination& to) const {
    if (!Base::is_own()) return NarrowLinear<X>::forward(p, to);
    for (int t = 0; t < stack_.groups; ++t) {
      const Real* w = own_weight(t);
      Real bias[kNarrow * X::kElement];
      own_bias(t, bias);
      for (int o = 0; o < out(); ++o) {
        const Term term{query_input(t), w + o * X::stride(in())};
        X::narrow_apply(in(), 1, query_, &term, 1,
                        layer_.bias >= 0 ? bias + o * X::kElement : nullptr,
                        to.p + o * query_classes() + t * query_part());
      }
    }
  }
  PYMETA_FN void backward(const LayerPass& p, const Destination& below) const {
    if (!Base::is_query_ || !adapts_weight()) return NarrowLinear<X>::backward(p, below);
    for (int t = 0; t < stack_.groups; ++t) {
      const Mix term{p.d + t * query_part(), X::kElement, query_classes(), own(t), out()};
      X::combine(query_, in(), &term, 1, nullptr,
                 part(below, t * stack_.query_rows, X::stride(in())));
    }
  }
  PYMETA_FN void gradient(const LayerPass& p, const Sink& weight, const Sink& bias) const {
    if (Base::is_query_) NarrowLinear<X>::gradient(p, weight, bias);
  }

  PYMETA_FN void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                 const Destination& to) const {
    for (int task = 0; task < stack_.groups; ++task) {
      if (adapts_weight()) make_direction(task);
      for (int o = 0; o < out(); ++o) {
        const int first = task * stack_.support_rows;
        const long row = o * X::stride(in());
        LinearTerms sum;
        if (t.rx.p) sum.add({part(t.rx, first), p.weight + row});
        if (adapts_weight()) sum.add({support_input(task), direction(task) + row});
        Real bias[X::kElement];
        if (adapts_bias()) X::put_element(bias, bias_direction(task, o));
        X::narrow_apply(in(), 1, support_, sum.terms, sum.count, adapts_bias() ? bias : nullptr,
                        to.p + o * support_classes() + task * support_part());
      }
    }
  }
  PYMETA_FN void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                  const Destination& below) const {
    for (int task = 0; task < stack_.groups; ++task) {
      const int first = task * stack_.support_rows;
      const long at = task * support_part();
      const Mix terms[2] = {{t.rd + at, X::kElement, support_classes(), p.weight, out()},
                            {p.d + at, X::kElement, support_classes(), direction(task), out()}};
      X::combine(support_, in(), terms, adapts_weight() ? 2 : 1, nullptr,
                 part(below, first, X::stride(in())));
    }
  }
  PYMETA_FN void tangent_gradient(const LayerPass& p, const LayerTangent& t, const Sink& weight,
                                  const Sink& bias) const {
    NarrowLinear<X>::tangent_gradient(p, t, weight, bias);
  }

 private:
  // From one group's rows to the next one's in class-major arrays, and from one output to the next.
  PYMETA_FN long support_part() const {
    return static_cast<long>(stack_.support_rows) * X::kElement;
  }
  PYMETA_FN long query_part() const { return static_cast<long>(stack_.query_rows) * X::kElement; }
  PYMETA_FN long support_classes() const {
    return X::class_stride(stack_.groups * stack_.support_rows);
  }
  PYMETA_FN long query_classes() const {
    return X::class_stride(stack_.groups * stack_.query_rows);
  }
  PYMETA_FN const Real* support_delta(int t, int o) const {
    const auto tape = state_.support_tape(0);
    return tape.at(tape.layout->dy) + o * support_classes() + t * support_part();
  }
  PYMETA_FN const Real* query_delta(int t, int o) const {
    const auto tape = state_.query_tape();
    return tape.at(tape.layout->dy) + o * query_classes() + t * query_part();
  }
  PYMETA_FN std::size_t scalars() const { return out() * X::stride(in()); }
  PYMETA_FN Real* own(int t) const { return memory(places().narrow) + t * scalars(); }
  PYMETA_FN Real* direction(int t) const {
    return memory(places().narrow_direction) + t * scalars();
  }

  PYMETA_FN const Real* own_weight(int t) const {
    if (!adapts_weight()) return Base::weight();
    for (int o = 0; o < out(); ++o) {
      const long row = o * X::stride(in());
      const Matrix pair[1][2] = {{support_input(t), {support_delta(t, o), 0}}};
      X::narrow_outer(in(), 1, support_, pair, 1,
                      Sink{own(t) + row, Base::weight() + row, nullptr, step_of(layer_.weight)});
    }
    return own(t);
  }
  PYMETA_FN void make_direction(int t) const {
    for (int o = 0; o < out(); ++o) {
      const Matrix pair[1][2] = {{query_input(t), {query_delta(t, o), 0}}};
      X::narrow_outer(
          in(), 1, query_, pair, 1,
          Sink{direction(t) + o * X::stride(in()), nullptr, nullptr, step_of(layer_.weight)});
    }
  }
  PYMETA_FN void own_bias(int t, Real* own) const {
    for (int o = 0; layer_.bias >= 0 && o < out(); ++o) {
      const Vec start = X::element(Base::bias() + o * X::kElement);
      const Vec sum = X::sum_in_order(stack_.support_rows, support_delta(t, o));
      X::put_element(own + o * X::kElement,
                     adapts_bias() ? fma(broadcast(step_of(layer_.bias)), sum, start) : start);
    }
  }
  PYMETA_FN Vec bias_direction(int t, int o) const {
    return X::sum_in_order(stack_.query_rows, query_delta(t, o)) * step_of(layer_.bias);
  }
};

PYMETA_KERNEL_END
