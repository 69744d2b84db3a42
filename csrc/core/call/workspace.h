// How many bytes an item of work needs and where each array lies.
//
// Every array of one item (a task, or a vector of tasks) has a fixed place in its thread's workspace, computed
// once a call for the largest task. With a meta-gradient to compute, each inner step keeps its parameters,
// activations and deltas for the reverse sweep; without one, all steps share the same place.
#pragma once

#include <cstddef>

#include "../activations.h"
#include "../layers/factored_linear.h"
#include "../layers/registry.h"
#include "../losses/registry.h"
#include "../optimizers/rates.h"
#include "places.h"
#include "stack_layout.h"
#include "tasks.h"

PYMETA_KERNEL_BEGIN

template <class X>
struct ParameterLayout {
  PackedTensor tensors[2 * kMostLayers];
  std::size_t size = 0;  // scalars of all tensors
  std::size_t size_without_first =
      0;                          // the first layer's weight lies last (layers/factored_linear.h)
  Place transposed[kMostLayers];  // of each layer's transposed weight, or kNowhere
  std::size_t transposed_size = 0;
  bool narrow;  // the last layer is a NarrowLinear

  PYMETA_FN ParameterLayout(const Network& network, bool input_gradient)
      : narrow(is_last_narrow(network)) {
    Places places, transposed_places;
    for (int l = 0; l < network.layer_count; ++l) {
      const Layer& layer = network.layers[l];
      transposed[l] = kNowhere;
      if (layer.weight >= 0) {
        PackedTensor& t = tensors[layer.weight];
        bool transposes = false;
        with_variant<X>(network, l, narrow, [&](auto rules) {
          t = rules.packed_weight(layer);
          transposes = X::kTransposes && rules.kTransposesWeight;
        });
        if (layer.steps > 0) t.outer = layer.steps;
        if (l > 0) t.place = places.take(t.scalars());
        if (transposes && (l > 0 || input_gradient))
          transposed[l] = transposed_places.take(transposed_scalars<X>(layer));
      }
      if (layer.bias >= 0) {
        PackedTensor& t = tensors[layer.bias];
        t = packed_bias<X>(layer);
        if (layer.steps > 0) t.outer = layer.steps;
        t.place = places.take(t.scalars());
      }
    }
    size_without_first = places.used;
    if (const int first = network.layers[0].weight; first >= 0)
      tensors[first].place = places.take(scalars(first));
    size = places.used;
    transposed_size = transposed_places.used;
  }

  PYMETA_FN std::size_t scalars(int tensor) const { return tensors[tensor].scalars(); }

  // visit(index in torch's layout, place in the packed one) for every element of a tensor that begins at `first`.
  template <class Visitor>
  PYMETA_FN void elements(int tensor, Visitor visit) const {
    elements(tensor, tensors[tensor].place, visit);
  }
  template <class Visitor>
  PYMETA_FN void elements(int tensor, std::size_t first, Visitor visit) const {
    tensors[tensor].template for_elements<X>(first, visit);
  }
};

// Linear layers and activations: what a pass reads of a layer is known here.
inline bool is_chain(const Network& network) {
  bool chain = true;
  for (int l = 0; l < network.layer_count; ++l)
    chain = chain && (network.layers[l].kind == LayerKind::linear ||
                      network.layers[l].kind == LayerKind::lone_activation);
  return chain;
}
// The lowest layer that has parameters: nobody wants a delta below it but the inputs.
PYMETA_FN inline int lowest_with_tensors(const Network& network) {
  int l = 0;
  while (l < network.layer_count && network.layers[l].weight < 0 && network.layers[l].bias < 0) ++l;
  return l;
}

// Where the deltas of a chain lie, or their tangents, with an executor that is short of memory (kSharesPlaces). On the way down
// delta l is written when nobody reads the outputs of layer l + 1 any more, and the delta of layer l + 2: it takes
// the place of one of these, where it fits.
struct SharedDeltas {
  struct Area {
    Place place = kNowhere;
    std::size_t size = 0;
  };
  Area deltas[kMostLayers + 2];

  // place_of(l): of the outputs of layer l. `top`: the highest one with places.
  template <class X, class PlaceOf>
  void lay_out(Places& places, const Network& network, int rows, int top, PlaceOf place_of) {
    const auto size = [&](int l) { return matrix_scalars<X>(rows, network.layers[l].out); };
    for (int l = top; l >= lowest_with_tensors(network); --l) {
      const std::size_t wanted = size(l);
      const Area above = l < top ? Area{place_of(l + 1), size(l + 1)} : Area{};
      const Area& before = deltas[l + 2];
      if (above.size >= wanted && above.place != deltas[l + 1].place)
        deltas[l] = above;
      else if (before.size >= wanted)
        deltas[l] = before;
      else
        deltas[l] = {places.take(wanted), wanted};
    }
  }
};
// How that is done: not at all; in all of a pass; the lowest delta alone, which is all that no tangent pass reads, and which lies
// where the query set's pass will be.
enum class Deltas { own, shared, lowest_elsewhere };

// Of images and sequences, whose lowest layer's outputs are the largest: is that only so as well?
template <class X>
PYMETA_FN bool is_lowest_delta_read_once(const Network& network) {
  const int l = lowest_with_tensors(network);
  return l < network.layer_count && network.layers[l].out.positions() > 1 &&
         delta_goes_with_tangent<X>(network.layers[l]);
}

// What a layer keeps of a pass for the passes that follow.
struct LayerTape {
  Place a;               // output
  bool shares_a;         // it lies in memory that the steps share,
  bool makes_a_again;    // and is made again where a step is reversed
  Place z;               // input of the activation, where its slope needs it
  Place d;               // delta at z
  Place c;               // delta at a, where the activation has a curvature
  Place kept[kMaxKept];  // the layer's own arrays
};

// One pass of a set through the network.
struct TapeLayout {
  LayerTape layers[kMostLayers];
  Place y, dy, kept;  // class-major outputs, their deltas, what the loss keeps of its value
  Place row_losses;
  std::size_t size;
  int elsewhere = -1;       // the layer whose delta lies in the query set's memory (Deltas)
  std::size_t shared_size;  // of what all steps share
  bool replaces_outputs;    // a layer's delta is written over its output

  // What is asked of a tape.
  struct Use {
    bool deltas, tangents;
    Deltas where = Deltas::own;
    bool deltas_below = false;  // those below the lowest layer with parameters, too
    // Each forward pass is followed by its backward pass or by none, and by nothing else that reads the tape.
    bool is_read_once = false;
    // There are several, one for each step. They share the outputs that are the same in all of them, that are made again where
    // a step is reversed (Passes::repeat), or that nobody reads then.
    bool of_steps = false;
    bool same_rows = false;  // in all steps
  };
  template <class X>
  PYMETA_FN void lay_out(const Network& network, int rows, const Use& use) {
    Places places, shared;
    replaces_outputs = false;
    const int lowest = lowest_with_tensors(network);
    // A narrow last layer's outputs are class-major.
    const bool narrow = use.where != Deltas::own && is_last_narrow(network);
    const int top = network.layer_count - 1 - narrow;
    const bool forgotten =
        lowest < network.layer_count && is_replaced_by_delta<X>(network, lowest, false);
    if (use.deltas && use.where == Deltas::lowest_elsewhere && (use.of_steps || !forgotten))
      elsewhere = lowest;
    for (int l = 0; l < network.layer_count; ++l) {
      const Layer& layer = network.layers[l];
      const ActivationKind activation = layer.activation.kind;
      const std::size_t matrix = matrix_scalars<X>(rows, layer.out);
      LayerTape& tape = layers[l];
      tape = {kNowhere, false, false, kNowhere, kNowhere, kNowhere, {kNowhere, kNowhere}};
      if (l > top) continue;
      const bool has_delta =
          use.deltas && (l >= lowest || use.deltas_below || l + 1 == network.layer_count);
      const bool replaced =
          has_delta && l != elsewhere && is_replaced_by_delta<X>(network, l, use.is_read_once);
      replaces_outputs = replaces_outputs || replaced;
      const bool is_done = l == elsewhere && forgotten;
      tape.makes_a_again =
          use.of_steps && l >= lowest && !replaced && !is_done && is_made_again<X>(network, l);
      tape.shares_a = tape.makes_a_again || (use.of_steps && is_done) ||
                      (use.of_steps && l < lowest && use.same_rows && !has_delta);
      tape.a = (tape.shares_a ? shared : places).take(matrix);
      tape.z = places.take_if(slope_needs_input(activation), matrix);
      if (replaced)
        tape.d = tape.a;
      else if (use.where != Deltas::shared && l != elsewhere)
        tape.d = places.take_if(has_delta, matrix);
      tape.c = places.take_if(use.tangents && has_curvature(activation), matrix);
      take_kept<X>(places, layer, rows, tape.kept);
    }
    if constexpr (X::kSharesPlaces)
      if (use.deltas && use.where == Deltas::shared) {
        SharedDeltas together;
        together.lay_out<X>(places, network, rows, top, [&](int l) { return layers[l].a; });
        for (int l = 0; l <= top; ++l) layers[l].d = together.deltas[l].place;
      }
    const std::size_t classes =
        static_cast<std::size_t>(network.out_features()) * X::class_stride(rows);
    y = places.take(classes);
    dy = places.take_if(use.deltas, classes);
    kept = places.take(classes);
    row_losses = places.take(X::class_stride(rows));
    size = places.used;
    shared_size = shared.used;
  }

  // Is layer l's output made again for each step that is reversed? From an input that is not.
  template <class X>
  PYMETA_FN bool is_made_again(const Network& network, int l) const {
    return l > 0 && !layers[l - 1].makes_a_again && is_fused(network.layers[l].activation.kind) &&
           is_repeated<X>(network.layers[l]);
  }
  // Is the delta at layer l's output written over it? Where nobody reads the output any more: not its activation, no branch,
  // and the layer behind it forgets its input, or is a normalisation that does not keep what it normalises (norm_pool.h) and
  // reads each element once more before it writes it.
  template <class X>
  PYMETA_FN static bool is_replaced_by_delta(const Network& network, int l, bool is_read_once) {
    if (l + 1 == network.layer_count ||
        network.layers[l].activation.kind != ActivationKind::identity)
      return false;
    const Layer& next = network.layers[l + 1];
    return network.layers[l].first_reader < 0 &&
           (forgets_input<X>(next) || (is_read_once && next.kind == LayerKind::norm_pool));
  }

  template <class X>
  PYMETA_FN static void take_kept(Places& places, const Layer& layer, int rows, Place* kept) {
    with_layer<X>(layer.kind, [&](auto rules) {
      for (int i = 0; i < kMaxKept; ++i) {
        const std::size_t scalars = rules.kept_scalars(layer, rows, i);
        kept[i] = places.take_if(scalars > 0, scalars);
      }
    });
  }
};

// The tangent pass over one support tape.
struct LayerTangents {
  Place ra;
  Place rz;  // where the activation has a curvature
  Place rd;  // of the delta at z, where what it reads besides its input takes it from there
  Place kept[kMaxKept];
};
struct TangentLayout {
  LayerTangents layers[kMostLayers];
  Place rd[2];  // deltas of a layer and the one below it, in turn
  Place ry, rdy;
  std::size_t size;

  template <class X>
  PYMETA_FN void lay_out(const Network& network, int rows, bool shares) {
    Places places;
    const bool narrow = shares && is_last_narrow(network);
    const int top = network.layer_count - 1 - narrow;
    std::size_t widest = matrix_scalars<X>(rows, network.layers[0].in);
    for (int l = 0; l < network.layer_count; ++l) {
      const Layer& layer = network.layers[l];
      const std::size_t matrix = matrix_scalars<X>(rows, layer.out);
      widest = widest < matrix ? matrix : widest;
      layers[l] = {kNowhere, kNowhere, kNowhere, {kNowhere, kNowhere}};
      if (l > top) continue;
      layers[l].ra = places.take(matrix);
      layers[l].rz = places.take_if(has_curvature(layer.activation.kind), matrix);
      TapeLayout::take_kept<X>(places, layer, rows, layers[l].kept);
    }
    for (Place& each : rd) each = places.take_if(!shares, widest);
    const std::size_t classes =
        static_cast<std::size_t>(network.out_features()) * X::class_stride(rows);
    ry = places.take(classes);
    rdy = places.take(classes);
    if constexpr (X::kSharesPlaces)
      if (shares) {
        SharedDeltas shared;
        shared.lay_out<X>(places, network, rows, top, [&](int l) { return layers[l].ra; });
        for (int l = 0; l <= top; ++l) layers[l].rd = shared.deltas[l].place;
      }
    for (int l = 0; l < network.layer_count; ++l)
      if (network.layers[l].other_output >= 0)
        layers[l].rd = places.take(matrix_scalars<X>(rows, network.layers[l].out));
    size = places.used;
  }
};

// Are a set's batch statistics those of some of its rows alone? Rows that stand beside the others are in none.
template <class Real>
PYMETA_MEMBER inline bool normalises_by_some(const Call<Real>& call, const RowSet<Real>& set) {
  return set.keeps_weightless && statistics_scalars(*call.network) > 0;
}

// The rows of one set of an item, as the executor reads them (Extent, Matrix, LossRows).
struct SetLayout {
  Place x;  // kNowhere where the caller's own array is read
  Place targets, scale, keep;
  Place context;     // as Extent::counting, where some rows alone are normalised by
  Place dx;          // dL/dx, where wanted
  Place dx_of_step;  // that of one of several evaluations
  Place cotangent;   // dL/dy beside the loss, class-major
  Place target_gradient, weight_gradient, offset_gradient;
  Place unit_scale;  // [rows] what a row's scale would be if it alone weighed something
  Place offset,
      elements;  // what is added to the outputs, weights of single targets; where there are

  // What is wanted of a set beside its loss.
  struct Wanted {
    bool x = false, y = false, offset = false;  // gradients
    int weights = 0;                            // of so many columns of them, likewise
    bool cotangent = false;
    bool steps = false;  // it is evaluated after each step
    bool context = false;
  };

  template <class X>
  void lay_out(Places& places, const Network& network, const Loss& loss, int rows, bool copy_input,
               const Wanted& wanted) {
    const std::size_t matrix = static_cast<std::size_t>(rows) * X::stride(network.in_features());
    const std::size_t classes =
        static_cast<std::size_t>(network.out_features()) * X::class_stride(rows);
    const int columns = target_columns(loss, network.out_features());
    x = copy_input ? places.take(matrix) : kNowhere;
    targets = places.take(static_cast<std::size_t>(columns) * X::class_stride(rows));
    scale = places.take(X::class_stride(rows));
    keep = places.take(static_cast<std::size_t>(rows) * kWidth);
    context = places.take_if(wanted.context, static_cast<std::size_t>(rows) * kWidth);
    dx = places.take_if(wanted.x, matrix);
    dx_of_step = places.take_if(wanted.x && wanted.steps, matrix);
    cotangent = places.take_if(wanted.cotangent, classes);
    target_gradient = places.take_if(wanted.y, classes);
    weight_gradient = places.take_if(
        wanted.weights > 0, static_cast<std::size_t>(wanted.weights) * X::class_stride(rows));
    unit_scale = places.take_if(wanted.weights > 0, X::class_stride(rows));
    offset_gradient = places.take_if(wanted.offset, classes);
  }
  // Class-major arrays of a set beside its targets.
  template <class X>
  void lay_out_beside(Places& places, const Call<Real>& call, const RowSet<Real>& set, int rows) {
    const int out = call.network->out_features();
    const std::size_t column = X::class_stride(rows);
    offset = places.take_if(set.offset, static_cast<std::size_t>(out) * column);
    elements = places.take_if(set.weight_columns > 1,
                              static_cast<std::size_t>(set.weight_columns) * column);
  }
};

// Do the products of the first layer read the caller's own rows?
template <class X>
PYMETA_FN bool reads_rows_in_place(const Network& network, bool last_is_narrow) {
  bool in_place = false;
  with_variant<X>(network, 0, last_is_narrow,
                  [&](auto rules) { in_place = X::kReadsInputInPlace && rules.kReadsRowsInPlace; });
  return in_place;
}

// The batch normalisations' statistics of an item: for each layer and each row of statistics_rows() the sums of the means
// and variances of its channels [2, stride], of the steps that were made, and of the numbers each was measured of [2, kWidth].
template <class X>
struct StatisticsLayout {
  std::size_t size = 0;

  PYMETA_FN explicit StatisticsLayout(const Network& network) {
    for (int l = 0; l < network.layer_count; ++l)
      if (has_statistics(network.layers[l])) size += scalars(network.layers[l]);
  }
  PYMETA_FN static std::size_t row(const Layer& layer) {
    return 2 * static_cast<std::size_t>(X::stride(layer.out.channels)) + 2 * kWidth;
  }
  PYMETA_FN static std::size_t scalars(const Layer& layer) {
    return statistics_rows(layer) * row(layer);
  }
};

// The whole workspace of a thread.
template <class X>
struct Workspace {
  ParameterLayout<X> parameters;
  TapeLayout support_tape, query_tape;
  TangentLayout tangent;
  SetLayout support_set, query_set, validation_set;
  bool keeps_steps;      // every step has its own parameters and tape
  bool saves_steps;      // ... not where they are used, but in `saved`, copied there and back
  bool keeps_gradients;  // every step has its own inner gradient and optimiser state
  bool stores_gradient;  // inner gradients have a place; else a step is done as they are made
  bool direction_is_v;   // the reverse sweep needs no u of its own (optimizers/step.h)
  bool keeps_v;          // the query set's gradient goes to v and not straight into the totals
  bool sums_at_end;      // v stays a task's own until all steps are reversed
  bool sums_losses;      // the steps' losses are asked for
  bool factorable;
  FactoredLayout factored;
  std::conditional_t<kStacks<X>, StackLayout, NoStack> stack;
  Place accumulated, lr_accumulated;  // sums over the items of a chunk (Totals)
  Place own_rates;           // [lr.rows, parameters] of an item whose tasks have rates of their own
  Place own_rate_gradients;  // as lr_accumulated, of an item alone
  Place start, start_transposed;  // the item's own start, where tasks have theirs
  Place theta, theta_transposed, gradients, states, best, saved;
  Place v, u, u_transposed, state_adjoints, pull, support, query, tangents;
  Place statistics;  // sums over the steps, as StatisticsLayout has them
  Place scratch;     // what layers work in for the time of a call (LayerPass)
  Place shared;      // what the steps' tapes share (LayerTape)
  Place order;       // int32 [kTasks kOrders, largest support set]: the shuffled rows of an epoch
  std::size_t size;  // scalars
  std::size_t size_far;

  // The packed rates of all elements; none where rates are not per element.
  PYMETA_FN std::size_t rate_scalars(const Call<Real>& call) const {
    return call.lr.per_element ? parameters.size * call.lr.rows : 0;
  }
  PYMETA_FN std::size_t lr_scalars(const Call<Real>& call) const {
    return call.lr.rows * (call.lr.is_spread()
                               ? parameters.size
                               : static_cast<std::size_t>(call.lr.columns) * kWidth);
  }

  // `near`: scalars of the fast memory. What every product touches asks for its place there first.
  // `tasks`: how many lie one below the other, of the sizes that the call says.
  explicit Workspace(const Call<Real>& call, std::size_t near = ~std::size_t{0}, int tasks = 1)
      : parameters(*call.network, call.wants_input_gradient()) {
    const Network& network = *call.network;
    const bool second = call.second_order(), reverses = call.reverses();
    direction_is_v = steps_scale_gradient(call);
    sums_at_end = call.keeps_task_gradient();
    // A stack's gradients are sums from the beginning.
    keeps_v = !kStacks<X> && (reverses || sums_at_end || call.cotangents.adapted);
    keeps_gradients = reverses && (call.lr_gradient || !direction_is_v);
    const int kept = call.steps > 1 && reverses ? call.steps : 1;
    sums_losses = call.job == Job::reptile || call.train_curves;
    const bool minibatches = call.batches.size > 0 && call.batches.size < call.max_support;
    const int support_rows = call.max_support * tasks;
    const int step_rows = minibatches ? call.batches.size : support_rows;
    const int query_rows = call.max_query * tasks;
    const int evaluated = query_rows > call.max_validation ? query_rows : call.max_validation;
    stores_gradient = keeps_gradients || call.lr.is_spread() || !call.has_plain_steps() ||
                      has_convolution(network);
    const bool copy_input = !reads_rows_in_place<X>(network, parameters.narrow);
    bool own_starts = false;
    for (int t = 0; t < network.tensor_count; ++t) own_starts = own_starts || call.has_own_start(t);
    const std::size_t states = call.optimizer.states() * parameters.size;
    const std::size_t each_step = keeps_gradients ? call.steps : 1;
    const bool shares = X::kSharesPlaces && is_chain(network) && !call.wants_input_gradient();
    TapeLayout::Use of_support{true, second}, of_query{call.wants_gradient(), false};
    of_support.of_steps = kept > 1;
    of_support.same_rows = !minibatches;
    of_support.deltas_below = call.xs_gradient != nullptr;
    of_query.deltas_below = call.xq_gradient != nullptr;
    of_query.is_read_once = true;
    if (shares) {
      of_support.where = second ? Deltas::lowest_elsewhere : Deltas::shared;
      of_query.where = Deltas::shared;
    } else if (!kStacks<X> && !call.xs_gradient && is_lowest_delta_read_once<X>(network)) {
      of_support.where = Deltas::lowest_elsewhere;
    }
    support_tape.lay_out<X>(network, step_rows, of_support);
    query_tape.lay_out<X>(network, evaluated, of_query);
    tangent.lay_out<X>(network, support_rows, shares);
    factorable = X::kFactors && is_factorable(call);

    Places places{near};
    const auto take_if = [&](bool wanted, std::size_t scalars) {
      return places.take_if(wanted, scalars);
    };
    const std::size_t of_a_step = parameters.size + parameters.transposed_size + support_tape.size;
    // The query set's tape is read for the last time before the first tangent is written, but for a stack's.
    const bool passes_by = second && !kStacks<X>;
    std::size_t passing =
        passes_by && tangent.size > query_tape.size ? tangent.size : query_tape.size;
    if (const int l = support_tape.elsewhere; l >= 0) {
      const std::size_t delta = matrix_scalars<X>(step_rows, network.layers[l].out);
      passing = passing < delta ? delta : passing;
    }
    keeps_steps = kept > 1 && places.fits(of_a_step * kept + passing + parameters.size);
    saves_steps = kept > 1 && !keeps_steps;
    const std::size_t slots = keeps_steps ? kept : 1;
    support = places.take(support_tape.size * slots);
    query = places.take(passing);
    tangents = passes_by ? query : places.take_if(second, tangent.size);
    shared = take_if(support_tape.shared_size > 0, support_tape.shared_size);
    theta = places.take(parameters.size * slots);
    theta_transposed = places.take(parameters.transposed_size * slots);
    v = take_if(call.wants_gradient(), parameters.size);
    u = take_if(reverses && !direction_is_v, parameters.size);
    u_transposed = take_if(second, parameters.transposed_size);
    support_set.lay_out<X>(places, network, call.loss_of(call.support), step_rows,
                           copy_input || minibatches || call.support.has_weightless,
                           {call.xs_gradient != nullptr, call.ys_gradient != nullptr,
                            call.support_offset_gradient != nullptr,
                            call.support_weights_gradient ? call.support.weight_columns : 0, false,
                            false, normalises_by_some(call, call.support)});
    query_set.lay_out<X>(places, network, call.loss_of(call.query), query_rows,
                         copy_input || call.query.has_weightless,
                         {call.xq_gradient != nullptr, call.yq_gradient != nullptr,
                          call.query_offset_gradient != nullptr,
                          call.query_weights_gradient ? call.query.weight_columns : 0,
                          call.cotangents.predictions != nullptr, call.step_weights != nullptr,
                          call.by_support || normalises_by_some(call, call.query)});
    validation_set.lay_out<X>(places, network, call.loss_of(call.validation), call.max_validation,
                              copy_input || call.validation.has_weightless, {});
    support_set.lay_out_beside<X>(places, call, call.support, step_rows);
    query_set.lay_out_beside<X>(places, call, call.query, query_rows);
    validation_set.lay_out_beside<X>(places, call, call.validation, call.max_validation);
    order =
        take_if(minibatches, static_cast<std::size_t>(X::kTasks) * X::kOrders * call.max_support);
    start = take_if(own_starts, parameters.size);
    start_transposed = take_if(own_starts, parameters.transposed_size);
    if (factorable)
      factored.lay_out<X>(places, network.layers[0], call.max_support, call.max_query);
    if constexpr (kStacks<X>)
      stack.template lay_out<X>(places, network, parameters.narrow, tasks, call.max_support,
                                call.max_query);
    gradients = take_if(stores_gradient, parameters.size * each_step);
    this->states = take_if(states > 0, states * each_step);
    state_adjoints = take_if(reverses && states > 0, states);
    pull = take_if(reverses && call.is_anchored() && call.steps > 1, parameters.size);
    lr_accumulated = take_if(call.lr_gradient && !call.lr.per_task, lr_scalars(call));
    own_rates = take_if(call.lr.per_task, parameters.size * call.lr.rows);
    own_rate_gradients =
        take_if(call.lr_gradient && (call.lr.per_task || call.task_clip > 0), lr_scalars(call));
    best = take_if(call.validation.x, parameters.size);
    statistics = take_if(call.statistics, StatisticsLayout<X>(network).size);
    const int most_rows = support_rows > evaluated ? support_rows : evaluated;
    const std::size_t scratch_size = scratch_scalars<X>(network, most_rows);
    scratch = take_if(scratch_size > 0, scratch_size);
    accumulated = take_if((call.wants_gradient() || call.job == Job::reptile) && X::kElement > 1,
                          parameters.size);
    saved = saves_steps ? places.take_far(of_a_step * kept) : kNowhere;
    size = places.used;
    size_far = places.used_far;
  }
};

PYMETA_KERNEL_END
