// The cell of a learned optimiser: near its equations, number by number; whatever the threads, the same bits.

#include <cmath>
#include <limits>

#include "../runtime/cell.h"
#include "../runtime/registry.h"
#include "checks.h"
#include "tests.h"

namespace pymeta::testing {
namespace {

struct CellSetup {
  int hidden, steps;
  std::int64_t tasks, of_task;
};

// All arrays of the steps and of the way back, of exactly their size.
template <class Real>
struct CellArrays {
  CellSetup setup;
  double p = 7;
  Exact<Real> weights, gates, gradients, losses, theta, flows;
  Exact<Real> after, to_theta, to_weights, to_gates;

  explicit CellArrays(const CellSetup& s) : setup(s) {
    Random random(5);
    const auto drawn = [&](std::int64_t n, double scale) {
      Exact<Real> values(static_cast<std::size_t>(n));
      for (std::size_t i = 0; i < values.size(); ++i)
        values[i] = static_cast<Real>(scale * random.symmetric());
      return values;
    };
    const std::int64_t n = s.tasks * s.of_task, w = 4 * s.hidden * (5 + s.hidden);
    weights = drawn(w, 0.5);
    gates = drawn(2 * (4 + s.hidden), 0.5);
    gradients = drawn(s.steps * n, 2);
    for (std::size_t i = 0; i < gradients.size(); i += 3) gradients[i] *= Real(1e-5);
    losses = drawn(s.steps * s.tasks, 1);
    theta = drawn(n, 1);
    flows = drawn(n, 1);
    after = Exact<Real>(theta.size());
    to_theta = Exact<Real>(theta.size());
    to_weights = Exact<Real>(weights.size());
    to_gates = Exact<Real>(gates.size());
  }

  void describe(Cell<Real>& cell) const {
    cell.hidden = setup.hidden;
    cell.coordinates = setup.tasks * setup.of_task;
    cell.of_task = setup.of_task;
    cell.p = p;
    cell.weights = weights.data();
    cell.gates = gates.data();
  }

  void run() {
    CellStep<Real> step;
    describe(step);
    Exact<Real> state(static_cast<std::size_t>(step.state_size()));
    std::copy(theta.data(), theta.data() + theta.size(), after.data());
    step.theta = step.out = after.data();
    step.state = state.data();
    for (int k = 0; k < setup.steps; ++k) {
      step.gradients = gradients.data() + k * step.coordinates;
      step.losses = losses.data() + k * setup.tasks;
      pymeta::run(step);
    }
    CellBack<Real> back;
    describe(back);
    back.steps = setup.steps;
    back.gradients = gradients.data();
    back.losses = losses.data();
    back.theta = theta.data();
    back.flows = flows.data();
    back.to_theta = to_theta.data();
    back.to_weights = to_weights.data();
    back.to_gates = to_gates.data();
    pymeta::run(back);
  }

  bool same_bits(const CellArrays& other) const {
    return after.same_bits(other.after) && to_theta.same_bits(other.to_theta) &&
           to_weights.same_bits(other.to_weights) && to_gates.same_bits(other.to_gates);
  }
};

double logistic(double v) { return 1 / (1 + std::exp(-v)); }

// One coordinate after another, in plain loops.
std::vector<double> after_by_hand(const CellArrays<double>& a) {
  const int h = a.setup.hidden, columns = 5 + h;
  const auto seen = [&](double v, double* to) {
    const bool large = std::fabs(v) >= std::exp(-a.p);
    to[0] = large ? std::log(std::fabs(v)) / a.p : -1;
    to[1] = large ? std::copysign(1.0, v) : std::exp(a.p) * v;
  };
  std::vector<double> result;
  for (std::size_t n = 0; n < a.theta.size(); ++n) {
    const std::size_t task = n / static_cast<std::size_t>(a.setup.of_task);
    double theta = a.theta[n], forget = 0, input = 0;
    std::vector<double> hidden(static_cast<std::size_t>(h)), cell(hidden);
    for (int k = 0; k < a.setup.steps; ++k) {
      const std::size_t step = static_cast<std::size_t>(k);
      const double slope = a.gradients[step * a.theta.size() + n];
      std::vector<double> x(5, 1.0);
      seen(slope, &x[1]);
      seen(a.losses[step * static_cast<std::size_t>(a.setup.tasks) + task], &x[3]);
      x.insert(x.end(), hidden.begin(), hidden.end());
      const auto logit = [&](int row) {
        double sum = 0;
        for (int c = 0; c < columns; ++c)
          sum += a.weights[static_cast<std::size_t>(row * columns + c)] *
                 x[static_cast<std::size_t>(c)];
        return sum;
      };
      for (int m = 0; m < h; ++m) {
        double& s = cell[static_cast<std::size_t>(m)];
        s = logistic(logit(h + m)) * s + logistic(logit(m)) * std::tanh(logit(2 * h + m));
        hidden[static_cast<std::size_t>(m)] = logistic(logit(3 * h + m)) * std::tanh(s);
      }
      const auto gate = [&](int row) {
        const double* v = a.gates.data() + row * (4 + h);
        double sum = v[0] * theta + v[1] * forget + v[2] * input + v[3];
        for (int m = 0; m < h; ++m) sum += v[4 + m] * hidden[static_cast<std::size_t>(m)];
        return logistic(sum);
      };
      const double f = gate(0), i = gate(1);
      theta = f * theta - i * slope;
      forget = f;
      input = i;
    }
    result.push_back(theta);
  }
  return result;
}

// The slope of sum(flows * after) by a number is what goes back to it.
void check_slopes(CellArrays<double>& a, const Exact<double>& of, const Exact<double>& found,
                  const std::string& name) {
  const double tiny = 1e-6;
  for (std::size_t i = 0; i < of.size(); i += 1 + of.size() / 9) {
    const double before = of[i], wanted = found[i];
    double sums[2];
    for (int side = 0; side < 2; ++side) {
      of[i] = before + (side ? tiny : -tiny);
      const std::vector<double> after = after_by_hand(a);
      sums[side] = 0;
      for (std::size_t n = 0; n < after.size(); ++n) sums[side] += a.flows[n] * after[n];
    }
    of[i] = before;
    const double slope = (sums[1] - sums[0]) / (2 * tiny);
    // the differences' own error: roundings over 2 tiny, and a third derivative
    const double bound = 1e-7 * (1 + std::fabs(slope)) * static_cast<double>(a.theta.size());
    CHECK(std::fabs(slope - wanted) <= bound, name + ": a slope is off");
  }
}

void check_cell(const CellSetup& setup, const std::string& name) {
  set_num_threads(1);
  CellArrays<double> exact(setup);
  exact.run();
  const std::vector<double> wanted = after_by_hand(exact);
  CellArrays<float> rounded(setup);
  rounded.run();
  for (std::size_t n = 0; n < wanted.size(); ++n) {
    CHECK(std::fabs(exact.after[n] - wanted[n]) <= 1e-12, name + ": after the steps");
    CHECK(std::fabs(static_cast<double>(rounded.after[n]) - wanted[n]) <= 1e-4,
          name + ": float after the steps");
  }
  check_slopes(exact, exact.theta, exact.to_theta, name + ", theta");
  check_slopes(exact, exact.weights, exact.to_weights, name + ", weights");
  check_slopes(exact, exact.gates, exact.to_gates, name + ", gates");
  for (const int threads : {2, 3}) {
    set_num_threads(threads);
    CellArrays<float> again(setup);
    again.run();
    CHECK(again.same_bits(rounded), name + ": other bits on other threads");
  }
}

}  // namespace

void test_cell() {
  const std::string first = isa();
  for (const std::string& name : isas()) {
    set_isa(name);
    check_cell({1, 1, 1, 1}, name + ", one coordinate");
    check_cell({3, 3, 4, 33}, name + ", a few");
    check_cell({5, 2, 3, 1100}, name + ", several chunks");
  }
  set_isa(first);
}

}  // namespace pymeta::testing
