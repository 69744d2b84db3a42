// Every instruction set of this machine x executor x float and double x a few networks and forms of tasks:
//   - rows and lanes agree to the last bit on all that belongs to one task (but for a factored first layer, which
//     lanes does not have), and any number of threads gives the same bits, gradients among them;
//   - what working memory holds beforehand does not matter: kernels run once more on memory full of NaN, whose size
//     is exactly what they asked for;
//   - meta-gradients are the finite differences of the loss in double, and float is near double, through every
//     optimiser; so are Reptile's differences and fine-tuning with minibatches, validation and starts of each task's own;
//   - an Engine gives the bits of the same adaptation and prediction by ordinary calls, in any number of threads;
//   - the shuffle is numpy's Philox4x64 and Fisher and Yates';
//   - a task with NaN leaves the others alone; no tasks give zeros; bad data is refused.

#include "../core/call/shuffle.h"
#include "problem.h"
#include "tests.h"

namespace pymeta::testing {

// The meta-gradient along a random direction is the loss's central difference. Its error: h^2 times a third
// derivative, which the difference at 2h shows three times over, and the loss's rounding over h.
void check_finite_differences(const Setup& setup, const std::string& name) {
  Data data = make_data(setup, 1);
  const Results<double> r = Problem<double>(setup, data).results();
  Random random(2);
  std::vector<std::vector<double>> directions;
  data.inputs(setup.input_gradients, [&](std::vector<double>& v) {
    directions.emplace_back(v.size());
    for (double& d : directions.back()) d = random.symmetric();
  });
  std::vector<const Exact<double>*> gradients;
  for (const auto& g : r.gradients) gradients.push_back(&g);
  gradients.push_back(&r.lr_gradient);
  if (setup.input_gradients)
    gradients.push_back(&r.xs_gradient), gradients.push_back(&r.xq_gradient);
  double slope = 0;
  for (std::size_t a = 0; a < gradients.size(); ++a)
    for (std::size_t i = 0; i < gradients[a]->size(); ++i)
      if ((*gradients[a])[i] != Results<double>::kUntouched)
        slope += (*gradients[a])[i] * directions[a][i];
  const auto difference = [&](double h) {
    double ends[2];
    for (int end = 0; end < 2; ++end) {
      Data moved = data;
      std::size_t a = 0;
      moved.inputs(setup.input_gradients, [&](std::vector<double>& v) {
        for (std::size_t i = 0; i < v.size(); ++i) v[i] += (end ? h : -h) * directions[a][i];
        ++a;
      });
      ends[end] = Problem<double>(setup, moved).results().loss();
    }
    return (ends[1] - ends[0]) / (2 * h);
  };
  const double near = difference(1e-5), far = difference(2e-5);
  const double rounding =
      64 * std::numeric_limits<double>::epsilon() * (1 + std::fabs(r.loss())) / 1e-5;
  CHECK(std::fabs(slope - near) <= std::fabs(near - far) + rounding,
        name + ": gradient " + std::to_string(slope) + ", difference " + std::to_string(near));
  CHECK(std::fabs(slope) > 100 * rounding, name + ": the slope is too small to tell anything");
}

// Loosely: a thousand roundings of the largest number there is.
void check_float_is_near_double(const Setup& setup, const std::string& name) {
  const Data data = make_data(setup, 1);
  const Results<double> d = Problem<double>(setup, data).results();
  const Results<float> f = Problem<float>(setup, data).results();
  const auto near = [](const Exact<float>& a, const Exact<double>& b) {
    double largest = 0, error = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (b[i] != Results<double>::kUntouched) largest = std::max(largest, std::fabs(b[i]));
      const double off = std::fabs(static_cast<double>(a[i]) - b[i]);
      error = off <= error ? error : off;  // keeps a NaN
    }
    return error <= 1000 * std::numeric_limits<float>::epsilon() * largest;
  };
  CHECK(near(f.losses, d.losses), name + ": losses");
  CHECK(near(f.predictions, d.predictions), name + ": predictions");
  CHECK(near(f.lr_gradient, d.lr_gradient), name + ": lr gradient");
  for (std::size_t t = 0; t < f.gradients.size(); ++t)
    CHECK(near(f.gradients[t], d.gradients[t]), name + ": gradient " + std::to_string(t));
}

template <class Real>
void check_isolation(const Setup& setup, const std::string& name) {
  const Data data = make_data(setup, 3);
  Problem<Real> problem(setup, data);
  const Results<Real> before = problem.results();
  std::int64_t spoiled = setup.tasks / 2;
  while (spoiled + 1 < setup.tasks && data.support.sizes[static_cast<std::size_t>(spoiled)] == 0)
    ++spoiled;
  const std::size_t first = static_cast<std::size_t>(problem.support_side().set.start(spoiled)) *
                            static_cast<std::size_t>(setup.chain.network().in_features());
  if (first >= problem.support_side().x.size()) return;
  problem.support_side().x[first] = std::numeric_limits<Real>::quiet_NaN();
  const Results<Real> after = problem.results();
  bool same = true;
  for (std::int64_t t = 0; t < setup.tasks; ++t)
    same = same && (t == spoiled ||
                    std::memcmp(&before.losses[static_cast<std::size_t>(t)],
                                &after.losses[static_cast<std::size_t>(t)], sizeof(Real)) == 0);
  CHECK(same, name + ": a NaN reached other tasks");
}

template <class Real>
void check_no_tasks(Setup setup, const std::string& name) {
  setup.tasks = 0;
  const Results<Real> r = Problem<Real>(setup, make_data(setup, 1)).results();
  bool zero = true;
  for (const auto& g : r.gradients)
    for (std::size_t i = 0; i < g.size(); ++i) zero = zero && g[i] == 0;
  for (std::size_t i = 0; i < r.lr_gradient.size(); ++i) zero = zero && r.lr_gradient[i] == 0;
  CHECK(zero, name + ": the gradient of no tasks is not zero");
}

template <class Real>
void check_bits(const Setup& setup, const std::string& name) {
  Problem<Real> problem(setup, make_data(setup, 1));
  set_num_threads(1);
  set_executor("rows");
  const Results<Real> wanted = problem.results();
  // The sign of a NaN is the compiler's choice, and its bits say nothing.
  wanted.numbers([&](const char* what, const auto& values) {
    bool finite = true;
    for (std::size_t i = 0; i < values.size(); ++i) finite = finite && std::isfinite(values[i]);
    CHECK(finite, name + ": " + what + ": not finite");
  });
  for (const std::string executor : {"rows", "lanes"}) {
    const std::string here = name + " " + executor;
    set_executor(executor);
    set_num_threads(1);
    const Results<Real> one = problem.results();
    if (!setup.factored) CHECK(one.same_tasks(wanted), here + ": not the bits of rows");
    if (!setup.factored)
      CHECK(one.predicted.same_bits(one.predictions), here + ": predict is not the query pass");
    const Results<Real> dirty = problem.results(on_dirty_memory<Real>(executor));
    CHECK(dirty.predicted.same_bits(one.predicted),
          here + ": predict depends on what the memory held");
    // Ragged lanes are sorted by size in run() alone, so that sums over tasks differ.
    CHECK(dirty.same_tasks(one), here + ": depends on what the memory held");
    if (executor == "rows" || setup.form == Form::uniform)
      CHECK(dirty.same_gradients(one), here + ": gradients depend on what the memory held");
    for (int threads = 2; threads <= 4; ++threads) {
      set_num_threads(threads);
      const Results<Real> more = problem.results();
      CHECK(more.same_tasks(one) && more.same_gradients(one),
            here + ": other bits on " + std::to_string(threads) + " threads");
    }
    set_num_threads(2);
    check_isolation<Real>(setup, here);
  }
  set_executor("auto");
  const Results<Real> automatic = problem.results();
  CHECK(automatic.same_tasks(wanted), name + " auto: other bits");
}

// Vectors of tasks and a few left over: all bits are those of `lanes`, sums over tasks as well.
template <class Real>
void check_mixed(Setup setup, const std::string& name) {
  setup.tasks = 19;
  Problem<Real> problem(setup, make_data(setup, 1));
  set_num_threads(1);
  set_executor("lanes");
  const Results<Real> wanted = problem.results();
  set_executor("mixed");
  for (int threads = 1; threads <= 3; ++threads) {
    set_num_threads(threads);
    const Results<Real> got = problem.results();
    CHECK(got.same_tasks(wanted) && got.same_gradients(wanted),
          name + " mixed: other bits on " + std::to_string(threads) + " threads");
  }
  CHECK(problem.results(on_dirty_memory<Real>("mixed")).same_tasks(wanted),
        name + " mixed: depends on what the memory held");
  set_executor("auto");
}

// One plain step of groups of tasks and a few left over. The bits of tasks are those of `rows`; sums over tasks have an order of
// their own, the same on any number of threads.
template <class Real>
void check_stacked(Setup setup, const std::string& name) {
  setup.tasks = 19, setup.steps = 1, setup.form = Form::uniform, setup.rates = Rates::one;
  setup.optimizer = Optimizer{}, setup.input_gradients = setup.rate_gradients = false;
  Problem<Real> problem(setup, make_data(setup, 1));
  set_num_threads(1);
  set_executor("rows");
  const Results<Real> wanted = problem.results();
  set_executor("stacked");
  const Results<Real> one = problem.results();
  CHECK(setup.factored || one.same_tasks(wanted), name + " stacked: not the bits of rows");
  bool near = true;
  for (std::size_t t = 0; t < one.gradients.size(); ++t) {
    double largest = 0, error = 0;
    for (std::size_t i = 0; i < one.gradients[t].size(); ++i) {
      const double own = static_cast<double>(one.gradients[t][i]);
      const double theirs = static_cast<double>(wanted.gradients[t][i]);
      largest = std::max(largest, std::fabs(theirs));
      error = std::fabs(own - theirs) <= error ? error : std::fabs(own - theirs);  // keeps a NaN
    }
    near = near && error <= 1000 * std::numeric_limits<Real>::epsilon() * largest;
  }
  CHECK(near, name + " stacked: other gradients than rows");
  for (int threads = 2; threads <= 3; ++threads) {
    set_num_threads(threads);
    const Results<Real> more = problem.results();
    CHECK(more.same_tasks(one) && more.same_gradients(one),
          name + " stacked: other bits on " + std::to_string(threads) + " threads");
  }
  const Results<Real> dirty = problem.results(on_dirty_memory<Real>("stacked"));
  CHECK(dirty.same_tasks(one) && dirty.same_gradients(one),
        name + " stacked: depends on what the memory held");
  check_isolation<Real>(setup, name + " stacked");
  set_executor("auto");
}

// With fixed steps an Engine does what a meta-gradient's own adaptation and query pass do; what task it last had, or
// which thread asks, is nothing to it.
template <class Real>
void check_engine(const Setup& setup, const std::string& name) {
  set_executor("rows");
  set_num_threads(1);
  Problem<Real> problem(setup, make_data(setup, 1));
  const Results<Real> wanted = problem.results();
  const std::unique_ptr<Engine<Real>> engine = problem.engine();
  std::atomic<bool> same{true};
  in_threads(4, [&](int caller) {
    for (std::int64_t i = 0; i < setup.tasks; ++i)
      if (!problem.engine_agrees(*engine, (i + caller) % setup.tasks, wanted)) same = false;
  });
  CHECK(same, name + ": other bits than a call's");
  Exact<Real> x(static_cast<std::size_t>(6) * engine->in_features(), Real(0.5));
  Exact<Real> y(static_cast<std::size_t>(6) * engine->out_features(), Real(0));
  Exact<Real> out(y.size(), Real(0));
  Exact<std::int64_t> labels(6);
  const void* targets = engine->takes_labels() ? static_cast<const void*>(labels.data()) : y.data();
  const auto call = [&] {
    engine->adapt_predict(x.data(), targets, nullptr, 6, x.data(), 6, out.data(), {});
  };
  call();
  const long before = allocations;
  for (int i = 0; i < 3; ++i) call();
  const long made = allocations - before;
  CHECK(made == 0, name + ": allocates in a call of a known size");
  set_executor("auto");
}

// The first words of numpy.random.Philox(key=[1, 2], counter=[0, 3, 4, 5]), and what shuffle() makes of them.
void check_shuffle() {
  const PhiloxBlock block = philox(Draw{1, 2, 4, 3, static_cast<Purpose>(5)}, 1);
  const std::uint64_t words[4] = {0x3a2521b7927bbb55, 0xafc7ff19479996f0, 0x37d95196e907db97,
                                  0x19dd01d453e1f915};
  CHECK(std::memcmp(block.word, words, sizeof words) == 0,
        "Philox4x64-10: other words than numpy's");
  int order[10];
  shuffle(Draw{1, 2, 4, 3, static_cast<Purpose>(5)}, 10, order);
  const int wanted[10] = {5, 7, 3, 4, 9, 8, 0, 1, 6, 2};
  CHECK(std::memcmp(order, wanted, sizeof wanted) == 0, "another order");
}

template <class Call>
bool refuses(Call call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void check_refusals() {
  Setup setup = setups()[1];
  const Data good = make_data(setup, 1);
  std::size_t row = 0;
  for (std::size_t t = 0; t < good.support.sizes.size(); ++t)
    if (good.support.sizes[t] > 0) row = static_cast<std::size_t>(good.support.starts[t]);
  const auto with = [&](auto change) {
    Data bad = good;
    change(bad);
    return refuses([&] { Problem<float>(setup, bad).results(); });
  };
  CHECK(!with([](Data&) {}), "good data is refused");
  CHECK(with([&](Data& d) { d.support.labels[row] = 5; }), "a label beyond the outputs");
  CHECK(with([&](Data& d) { d.support.labels[row] = -1; }), "a negative label");
  CHECK(with([&](Data& d) { d.support.weights[row] = -1; }), "a negative weight");
  CHECK(with([&](Data& d) { d.support.weights[row] = std::nan(""); }), "a weight of NaN");
  CHECK(with([&](Data& d) { d.query.sizes[0] = -1; }), "a negative size");
  CHECK(with([&](Data& d) { d.query.sizes[0] = 1; }), "one row under BatchNorm");
  Setup split = setups()[0];
  split.chain = Chain().linear(3, 4).norm(LayerKind::batch_norm, 4);
  split.support = 5;
  CHECK(refuses([&] {
          const Data data = make_data(split, 1);
          Problem<float>(split, data).results([](Call<float>& call) {
            if (call.job == Job::adapt) call.batches.size = 4;
            run(call);
          });
        }),
        "a minibatch of one row under BatchNorm");
  CHECK(refuses([] { set_isa("z80"); }), "an unknown instruction set");
  CHECK(refuses([] { set_executor("columns"); }), "an unknown executor");
  CHECK(refuses([] { set_num_threads(0); }), "no threads");
}

// The chunks of a ragged call start with the longest; in what order their sums are added does not change.
template <class Real>
void check_longest_first(const std::string& executor) {
  Setup setup = setups()[0];
  setup.form = Form::packed;
  setup.tasks = 200;
  set_executor(executor);
  set_num_threads(3);
  Problem<Real> problem(setup, make_data(setup, 1));
  static std::vector<std::int64_t> rows_in_turn;
  static Call<Real>* running;
  problem.results([&](Call<Real>& call) {
    if (call.job != Job::meta) return;
    pymeta::check(call);
    Plan<Real> plan(call);
    plan.order();
    const Aligned memory(plan.needs().bytes(3));
    rows_in_turn.clear();
    running = &call;
    const auto record = [](const Team&, std::int64_t count, IndexBody body, void* context) {
      for (std::int64_t i = 0; i < count; ++i) {
        const std::vector<Real> before(running->losses, running->losses + running->tasks);
        body(context, i, 0);
        std::int64_t rows = 0;
        for (std::int64_t t = 0; t < running->tasks; ++t)
          if (running->losses[t] != before[static_cast<std::size_t>(t)])
            rows += running->support.size(t);
        if (rows > 0) rows_in_turn.push_back(rows);
      }
    };
    plan.run(Team{3, nullptr, record}, memory.data.get());
  });
  CHECK(rows_in_turn.size() > 3, executor + ": " + std::to_string(rows_in_turn.size()) + " chunks");
  CHECK(rows_in_turn.front() > rows_in_turn.back(), executor + ": the longest chunk is not first");
}

// A call of few long products asks while they run whether it is to end.
template <class Real>
void check_long_products_ask(const std::string& executor) {
  Setup setup;
  setup.chain = Chain().linear(40, 640).act(ActivationKind::relu).linear(640, 640);
  setup.tasks = 1, setup.support = 1200, setup.query = 2, setup.steps = 1;
  setup.input_gradients = false;
  set_executor(executor);
  set_num_threads(1);
  long asked = 0, in_meta = 0;
  const StopRequest stop{[](void* context) {
                           ++*static_cast<long*>(context);
                           return false;
                         },
                         &asked};
  Problem<Real>(setup, make_data(setup, 1)).results([&](Call<Real>& call) {
    pymeta::check(call);
    call.stop = &stop;
    Plan<Real> plan(call);
    plan.order();
    const Aligned memory(plan.needs().bytes(1));
    asked = 0;
    plan.run(Team{1, nullptr, run_alone}, memory.data.get());
    if (call.job == Job::meta) in_meta = asked;
    call.stop = nullptr;
  });
  // Two layers ask two dozen times between their passes; their panels ask more than that.
  CHECK(in_meta > 60, executor + ": asked " + std::to_string(in_meta) + " times");
  set_executor("auto");
}

void test_kernels() {
  for (const std::string& each : isas()) {
    set_isa(each);
    for (const Setup& setup : setups()) {
      const std::string name = each + " " + setup.name;
      check_bits<float>(setup, name + " float");
      check_bits<double>(setup, name + " double");
      check_mixed<float>(setup, name + " float");
      check_mixed<double>(setup, name + " double");
      check_stacked<float>(setup, name + " float");
      check_stacked<double>(setup, name + " double");
      check_engine<float>(setup, name + " engine float");
      check_engine<double>(setup, name + " engine double");
      for (const char* choice : {"rows", "lanes"}) {
        set_executor(choice);
        if (setup.smooth && !setup.first_order)
          check_finite_differences(setup, name + " " + choice);
        if (setup.smooth) check_float_is_near_double(setup, name + " " + choice);
      }
      set_executor("auto");
    }
  }
  for (const std::string executor : {"rows", "lanes"}) {
    check_longest_first<float>(executor);
    check_long_products_ask<float>(executor);
  }
  set_executor("auto");
  for (const std::string& each : isas()) {
    set_isa(each);
    for (const char* choice : {"rows", "lanes", "mixed", "stacked"}) {
      set_executor(choice);
      for (const Setup& setup : setups()) {
        check_no_tasks<float>(setup, each + " " + choice + " " + setup.name + " float");
        check_no_tasks<double>(setup, each + " " + choice + " " + setup.name + " double");
      }
    }
  }
  set_executor("auto");
  check_shuffle();
  check_refusals();
}

}  // namespace pymeta::testing
