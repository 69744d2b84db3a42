// What a block of the CUDA executor does for one task of the benchmark's cases, counted on emulated blocks.
//
//   block_accesses_FAMILY [--threads N] [CASE...]
//   block_instructions_FAMILY [--threads N] [CASE...]
//   either --constants CASE
//
// Prints a JSON array: for each case of the family (cuda/families.h) its plan for an H200, and what a block does for a second task
// after a first. Compiled twice: with PYMETA_COUNT_ACCESSES it counts barriers, the products' multiply-adds and accesses to shared
// memory, which a model of its banks (banks.h) turns into wavefronts; with PYMETA_COUNT_INSTRUCTIONS the instructions outside of
// products of each warp's first thread. Those are of the host's processor: a GPU's are other ones. bench/block_report.py makes
// tables of all this. With --constants a case's own kernel is described; compiled behind that, the program counts what it does
// (bench/special_report.py).

#include "../../cuda/machine.h"

#include "../../cuda/blocks.h"
#include "../../runtime/check.h"
#include "../problem.h"
#include "banks.h"

namespace pymeta::testing {
namespace {

using Real = PYMETA_REAL;
namespace blocks = pymeta::PYMETA_ISA;
using blocks::emulation::Access;
using blocks::emulation::Counts;

const DeviceFacts kH200{"H200", 90, 132, kBlockThreads, 232448, 233472};

// ---- the benchmark's cases (pymeta/bench/cases.py) ----------------------------------------------------------------

struct Case {
  std::string name;
  std::vector<int> sizes;
  LossKind loss;
  int support, query, steps, epochs;
  std::int64_t tasks;
  bool learns_rates = false;  // one for each element (Meta-SGD)
  bool allows_tf32x3 = false;
};

const std::vector<Case> kCases{
    {"W1 T=25 K=1", {1, 40, 40, 1}, LossKind::mse, 10, 10, 1, 0, 25},
    {"W1 T=65536 K=1", {1, 40, 40, 1}, LossKind::mse, 10, 10, 1, 0, 65536},
    {"W1 T=4096 K=5", {1, 40, 40, 1}, LossKind::mse, 10, 10, 5, 0, 4096},
    {"W1 T=4096 K=5, rates learned", {1, 40, 40, 1}, LossKind::mse, 10, 10, 5, 0, 4096, true},
    {"W3 T=64 K=5", {24, 64, 64, 1}, LossKind::bce_with_logits, 32, 32, 5, 0, 64},
    {"W3 T=16384 K=5", {24, 64, 64, 1}, LossKind::bce_with_logits, 32, 32, 5, 0, 16384},
    {"W3 T=64 K=5, tf32x3",
     {24, 64, 64, 1},
     LossKind::bce_with_logits,
     32,
     32,
     5,
     0,
     64,
     false,
     true},
    {"W3 T=16384 K=5, tf32x3",
     {24, 64, 64, 1},
     LossKind::bce_with_logits,
     32,
     32,
     5,
     0,
     16384,
     false,
     true},
    {"W5 T=1000 K=20, tf32x3",
     {24, 64, 64, 1},
     LossKind::bce_with_logits,
     50,
     0,
     0,
     20,
     1000,
     false,
     true},
    {"W5 T=1000 K=20", {24, 64, 64, 1}, LossKind::bce_with_logits, 50, 0, 0, 20, 1000},
    {"W2 T=1024 K=1", {784, 256, 128, 64, 64, 5}, LossKind::cross_entropy, 5, 25, 1, 0, 1024},
};

// A case's call of so many tasks, and all that it points to.
class CaseCall {
 public:
  CaseCall(const Case& of, std::int64_t tasks) {
    Chain chain;
    for (std::size_t l = 0; l + 1 < of.sizes.size(); ++l) {
      chain.linear(of.sizes[l], of.sizes[l + 1]);
      if (l + 2 < of.sizes.size()) chain.act(ActivationKind::relu);
    }
    network_ = chain.owned;
    loss_.kind = of.loss;
    Random random(1);
    const Network& network = network_.network;
    for (int t = 0; t < network.tensor_count; ++t) {
      const std::size_t size =
          static_cast<std::size_t>(network.tensors[t].rows) * network.tensors[t].columns;
      parameters_.push_back(numbers(size, random));
      results_.emplace_back(size * (of.epochs ? tasks : 1));
    }
    for (int t = 0; t < network.tensor_count; ++t) {
      starts_.push_back(parameters_[t].data());
      to_.push_back(results_[t].data());
    }
    losses_ = Exact<Real>(static_cast<std::size_t>(tasks));
    status_ = Exact<std::int8_t>(static_cast<std::size_t>(tasks));
    call.network = &network;
    call.loss = &loss_;
    call.adapted = adapted_;
    call.parameters = starts_.data();
    call.lr = {&rate_, 1, 1, false, groups_};
    if (of.learns_rates) learn_rates(random);
    call.tasks = tasks;
    call.allows_tf32x3 = of.allows_tf32x3;
    call.losses = losses_.data();
    bind(call.support, support_, of, of.support, random);
    if (of.epochs) {
      call.job = Job::fine_tune;
      call.epochs = of.epochs;
      call.optimizer = adam(0.9, 0, false, 0);
      call.adapted_parameters = to_.data();
      call.status = status_.data();
    } else {
      call.steps = of.steps;
      call.gradients = to_.data();
      call.mean_loss = &mean_;
      predictions_ = Exact<Real>(static_cast<std::size_t>(of.query * tasks) * of.sizes.back());
      call.predictions = predictions_.data();
      bind(call.query, query_, of, of.query, random);
    }
    pymeta::check(call);
    // Nobody has looked at what lies on a device.
    for (RowSet<Real>* set : {&call.support, &call.query})
      set->has_weightless = set->y && takes_labels(loss_);
  }

  Call<Real> call;

 private:
  struct Rows {
    Exact<Real> x, y;
    Exact<std::int64_t> labels;
  };

  void learn_rates(Random& random) {
    std::size_t all = 0;
    for (const Exact<Real>& each : parameters_) all += each.size();
    rates_ = numbers(all, random);
    rates_gradient_ = Exact<Real>(all);
    call.lr = {rates_.data(), 1, static_cast<int>(all), true, groups_};
    call.lr_gradient = rates_gradient_.data();
  }
  static Exact<Real> numbers(std::size_t size, Random& random) {
    Exact<Real> result(size);
    for (std::size_t i = 0; i < size; ++i) result[i] = static_cast<Real>(random.symmetric());
    return result;
  }
  void bind(RowSet<Real>& set, Rows& rows, const Case& of, int count, Random& random) {
    const std::size_t all = static_cast<std::size_t>(count) * call.tasks;
    rows.x = numbers(all * of.sizes.front(), random);
    rows.y = numbers(all * of.sizes.back(), random);
    rows.labels = Exact<std::int64_t>(all);
    if (of.loss == LossKind::bce_with_logits)
      for (std::size_t i = 0; i < rows.y.size(); ++i) rows.y[i] = Real(rows.y[i] > 0);
    set.x = rows.x.data();
    set.y = of.loss == LossKind::cross_entropy ? static_cast<const void*>(rows.labels.data())
                                               : rows.y.data();
    set.rows = count;
  }

  OwnedNetwork network_;
  Loss loss_;
  bool adapted_[kMaxTensors] = {true, true, true, true, true, true, true, true, true, true};
  int groups_[kMaxTensors] = {};
  std::vector<Exact<Real>> parameters_, results_;
  std::vector<const Real*> starts_;
  std::vector<Real*> to_;
  Exact<Real> losses_, predictions_, rates_, rates_gradient_;
  Exact<std::int8_t> status_;
  Real rate_ = Real(0.01), mean_ = 0;
  Rows support_, query_;
};

// ---- counting -----------------------------------------------------------------------------------------------------

// Runs the tasks' kernel in one block, each of whose threads counts.
struct CountingLauncher {
  std::vector<Counts>& counts;

  static constexpr bool kHasSpecial = false;
  static int few(int) { return 2; }
  const char* pack(int, int threads, const blocks::Frame& frame) const {
    blocks::emulation::launch(2, threads, 64, [&] { blocks::pack_start(frame); });
    return nullptr;
  }
  const char* tasks(int, int threads, std::size_t bytes, const blocks::GivenFrame& frame) const {
    counts.assign(static_cast<std::size_t>(threads), {});
    blocks::emulation::launch(1, threads, bytes, [&] {
      const int thread = blocks::thread_index();
#ifdef PYMETA_COUNT_INSTRUCTIONS
      if (thread % blocks::kWarp > 0) return blocks::run_tasks(frame);
#endif
      blocks::emulation::counts = &counts[static_cast<std::size_t>(thread)];
      blocks::emulation::set_trap_flag(true);
      blocks::run_tasks(frame);
      blocks::emulation::set_trap_flag(false);
      blocks::emulation::counts = nullptr;
    });
    return nullptr;
  }
  const char* reduce(int, int, const blocks::Frame&) const { return nullptr; }
};

// What a block counts for the first `tasks` tasks of a case, in one chunk.
std::vector<Counts> count(const Case& of, const BlockPlan& plan, std::int64_t tasks) {
  CaseCall described(of, tasks);
  const blocks::BlockCall call(described.call);
  BlockPlan own = call.plan(kH200, plan.threads, plan.block_bytes);
  own.near_scalars = plan.near_scalars;
  own.at_once = plan.at_once;
  own.chunks = tasks > 0;
  const Aligned memory(own.workspace_bytes);
  std::vector<Counts> counts;
  BlockFrame frame;
  call.run(own, CountingLauncher{counts}, memory.data.get(), frame);
  // One that plays a warp's lanes notes them one after the other.
  for (Counts& own : counts)
    std::stable_sort(own.accesses.begin(), own.accesses.end(),
                     [](const Access& x, const Access& y) { return x.time < y.time; });
  return counts;
}

// Wavefronts of a warp's lanes: those in products, and all others.
struct Wavefronts {
  long products = 0, others = 0;
};
Wavefronts wavefronts_of(const Counts* lanes, int count) {
  Wavefronts sum;
  std::vector<std::size_t> next(static_cast<std::size_t>(count));
  std::vector<LaneAccess> together;
  for (;;) {
    const Access* first = nullptr;
    for (int i = 0; i < count; ++i)
      if (next[i] < lanes[i].accesses.size())
        if (const Access& own = lanes[i].accesses[next[i]]; !first || own.time < first->time)
          first = &own;
    if (!first) return sum;
    const Access now = *first;
    together.clear();
    for (int i = 0; i < count; ++i)
      for (; next[i] < lanes[i].accesses.size(); ++next[i]) {
        const Access& own = lanes[i].accesses[next[i]];
        if (own.time != now.time) break;
        together.push_back({i + own.lane, own.place});
      }
    (now.in_product ? sum.products : sum.others) += wavefronts(together, now.bytes);
  }
}

struct Totals {
  long barriers = 0, multiply_adds = 0, first_multiply_adds = 0, first_product_accesses = 0;
  long instructions = 0, all_instructions = 0;  // of the first warp, of all
  Wavefronts shared;
};
Totals totals_of(const std::vector<Counts>& counts) {
  Totals sum;
  const int threads = static_cast<int>(counts.size());
  for (int first = 0; first < threads; first += blocks::kWarp) {
    const Counts* warp = counts.data() + first;
    const Wavefronts own = wavefronts_of(warp, std::min(blocks::kWarp, threads - first));
    sum.shared.products += own.products, sum.shared.others += own.others;
    sum.multiply_adds += warp->multiply_adds;
    sum.all_instructions += warp->instructions;
  }
  sum.barriers = counts[0].barriers;
  sum.instructions = counts[0].instructions;
  sum.first_multiply_adds = counts[0].multiply_adds;
  for (const Access& one : counts[0].accesses)
    sum.first_product_accesses += one.in_product && one.lane == 0;
  return sum;
}

blocks::TaskCost modelled(const Call<Real>& call, const BlockPlan& plan) {
  const blocks::Workspace<blocks::Block> workspace(call, plan.near_scalars);
  return blocks::CostModel(call, workspace, plan.threads, plan.at_once).cost();
}

bool is_of_family(const Case& of) {
  const CaseCall described(of, 1);
  return std::strcmp(blocks::family_of(described.call), PYMETA_SPELLED(PYMETA_FAMILY)) == 0;
}

void print(const Case& of, int threads, bool last) {
  const CaseCall whole(of, of.tasks);
  const BlockPlan plan = blocks::BlockCall(whole.call).plan(kH200, threads, 0);
  const Totals one = totals_of(count(of, plan, 1)), two = totals_of(count(of, plan, 2));
  std::printf("{\"case\": \"%s\", \"family\": \"" PYMETA_SPELLED(
                  PYMETA_FAMILY) "\", \"threads\": %d, \"block_bytes\": %zu, \"at_once\": %d, ",
              of.name.c_str(), plan.threads, plan.block_bytes, plan.at_once);
  const blocks::TaskCost cost = modelled(whole.call, plan);
  std::printf("\"modelled\": {\"wavefronts\": %.0f, \"instructions\": %.0f, \"path\": %.0f}, ",
              cost.wavefronts, cost.instructions, cost.path);
  std::printf("\"saves\": %s, \"far_bytes\": %zu, \"barriers\": %ld, ",
              plan.saves ? "true" : "false", plan.far_scalars * sizeof(Real),
              two.barriers - one.barriers);
#ifdef PYMETA_COUNT_INSTRUCTIONS
  std::printf("\"instructions\": %ld, \"all_instructions\": %ld}%s\n",
              two.instructions - one.instructions, two.all_instructions - one.all_instructions,
              last ? "" : ",");
#else
  std::printf("\"wavefronts\": %ld, \"other_wavefronts\": %ld, \"multiply_adds\": %ld, ",
              two.shared.products - one.shared.products, two.shared.others - one.shared.others,
              two.multiply_adds - one.multiply_adds);
  std::printf("\"first_warp\": {\"multiply_adds\": %ld, \"accesses\": %ld}}%s\n",
              two.first_multiply_adds - one.first_multiply_adds,
              two.first_product_accesses - one.first_product_accesses, last ? "" : ",");
#endif
  std::fflush(stdout);
}

// The constants of the kernel that a case has of its own (cuda/special.h).
void print_constants([[maybe_unused]] const Case& of) {
  if constexpr (blocks::Block::Family::kMayBeSpecial) {
    const CaseCall whole(of, of.tasks);
    const BlockPlan plan = blocks::BlockCall(whole.call).plan(kH200, 0, 0);
    blocks::GivenFrame frame(whole.call, plan.near_scalars);
    frame.sharing = blocks::Sharing::of(plan.at_once, plan.threads);
    blocks::make_list(whole.call, plan.near_scalars, frame);
    std::fputs(blocks::SpecialNumbers(whole.call, frame, plan.threads).constants().c_str(), stdout);
  }
}

}  // namespace
}  // namespace pymeta::testing

int main(int argc, char** argv) {
  using namespace pymeta::testing;
#ifdef PYMETA_COUNT_INSTRUCTIONS
  std::signal(SIGTRAP, blocks::emulation::count_instruction);
#endif
  int threads = 0;
  bool constants = false;
  std::vector<const Case*> chosen;
  for (int i = 1; i < argc; ++i)
    if (std::strcmp(argv[i], "--threads") == 0 && i + 1 < argc)
      threads = std::atoi(argv[++i]);
    else if (std::strcmp(argv[i], "--constants") == 0)
      constants = true;
    else
      for (const Case& one : kCases)
        if (one.name.rfind(argv[i], 0) == 0) chosen.push_back(&one);
  if (chosen.empty())
    for (const Case& one : kCases) chosen.push_back(&one);
  chosen.erase(std::remove_if(chosen.begin(), chosen.end(),
                              [](const Case* of) { return !is_of_family(*of); }),
               chosen.end());
  if (constants) {
    for (const Case* one : chosen) print_constants(*one);
    return 0;
  }
  std::printf("[\n");
  for (const Case* one : chosen) print(*one, threads, one == chosen.back());
  std::printf("]\n");
}
