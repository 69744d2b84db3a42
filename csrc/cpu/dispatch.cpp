#include "dispatch.h"

#include "../core/layers/registry.h"
#include "../core/losses/registry.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>

#include "../cuda/device.h"
#include "fork.h"
#include "pages.h"
#include "thread_pool.h"

namespace pymeta {

// The tables that kernels.cpp exports.
#define PYMETA_DECLARE(isa)                          \
  extern const Kernels<float> kernels_##isa##_float; \
  extern const Kernels<double> kernels_##isa##_double;
#ifdef PYMETA_HAS_BASELINE
PYMETA_DECLARE(baseline)
#endif
#ifdef PYMETA_HAS_AVX2
PYMETA_DECLARE(avx2)
#endif
#ifdef PYMETA_HAS_AVX512
PYMETA_DECLARE(avx512)
#endif
#ifdef PYMETA_HAS_NEON
PYMETA_DECLARE(neon)
#endif
#undef PYMETA_DECLARE

namespace {

struct InstructionSet {
  const Kernels<float>* single;
  const Kernels<double>* twice;
};

const std::vector<InstructionSet>& usable() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#ifdef PYMETA_HAS_BASELINE
    found.push_back({&kernels_baseline_float, &kernels_baseline_double});
#endif
#ifdef PYMETA_HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found.push_back({&kernels_avx2_float, &kernels_avx2_double});
#endif
#ifdef PYMETA_HAS_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
      found.push_back({&kernels_avx512_float, &kernels_avx512_double});
#endif
#ifdef PYMETA_HAS_NEON
    found.push_back({&kernels_neon_float, &kernels_neon_double});
#endif
    return found;
  }();
  return sets;
}

std::size_t find_isa(const std::string& name) {
  for (std::size_t i = 0; i < usable().size(); ++i)
    if (name == usable()[i].single->isa) return i;
  std::string known;
  for (const std::string& each : isas()) known += (known.empty() ? "" : ", ") + each;
  throw std::invalid_argument("isa: expected one of " + known + " on this machine, got '" + name +
                              "'");
}

// `emulated` is for calls with a device (bind/module.cpp); calls without one choose for themselves.
enum class Choice { automatic, rows, lanes, emulated };

std::atomic<int> chosen_isa{-1};  // -1: the best
std::atomic<Choice> chosen_executor{Choice::automatic};
std::atomic<int> chosen_threads{0};  // 0: all cores

const InstructionSet& current() {
  const int chosen = chosen_isa.load(std::memory_order_relaxed);
  return chosen < 0 ? usable().back() : usable()[static_cast<std::size_t>(chosen)];
}

// ---- memory ------------------------------------------------------------------------------------------------------

// Blocks of working memory, kept between calls: fresh pages would cost more than the arithmetic.
class BlockCache {
 public:
  struct Block {
    char* data = nullptr;
    std::size_t bytes = 0;
  };

  Block take(std::size_t bytes) {
    if (kKeepsPages) {
      std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it)
        if (it->bytes >= bytes && (best == free_.end() || it->bytes < best->bytes)) best = it;
      if (best != free_.end()) {
        const Block block = *best;
        free_.erase(best);
        return block;
      }
    }
    constexpr std::size_t huge = std::size_t{2} << 20;
    const std::size_t alignment = bytes >= huge ? huge : 4096;
    Block block;
    block.bytes = kKeepsPages ? (bytes + alignment - 1) / alignment * alignment : bytes;
    block.data = take_pages(block.bytes, alignment);
    if (!block.data) throw std::bad_alloc();
#if defined(__linux__)
    if (kKeepsPages && alignment == huge) madvise(block.data, block.bytes, MADV_HUGEPAGE);
#endif
    return block;
  }

  // Keeps a few blocks, the largest ones.
  void give(Block block) {
    if (!kKeepsPages) return give_pages(block.data, block.bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    if (free_.size() <= kKept) return;
    auto least = std::min_element(free_.begin(), free_.end(),
                                  [](const Block& a, const Block& b) { return a.bytes < b.bytes; });
    give_pages(least->data, least->bytes);
    free_.erase(least);
  }

  std::mutex& mutex() { return mutex_; }

 private:
  static constexpr std::size_t kKept = 4;
  std::mutex mutex_;
  std::vector<Block> free_;
};

BlockCache& block_cache() {
  static BlockCache* const cache =
      new BlockCache;  // never destroyed: calls may outlive static objects
  // A fork waits until nobody is inside the cache, so that the child finds it whole.
  static const int registered =
      at_fork([] { block_cache().mutex().lock(); }, [] { block_cache().mutex().unlock(); },
              [] { block_cache().mutex().unlock(); });
  (void)registered;
  return *cache;
}

class Memory {
 public:
  explicit Memory(std::size_t bytes) : block_(block_cache().take(bytes ? bytes : 64)) {}
  ~Memory() { block_cache().give(block_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return block_.data; }

 private:
  BlockCache::Block block_;
};

// ---- checks ------------------------------------------------------------------------------------------------------

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string task_row(const char* name, std::int64_t task, std::int64_t row) {
  return std::string(name) + ": task " + std::to_string(task) + ", row " + std::to_string(row) +
         ": ";
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// What messages call a set's arrays.
struct SetNames {
  const char *x, *y, *sizes, *weights;
};
constexpr SetNames kSupport{"xs", "ys", "support_sizes", "support_weights"};
constexpr SetNames kQuery{"xq", "yq", "query_sizes", "query_weights"};
constexpr SetNames kValidation{"xv", "yv", "validation_sizes", "validation_weights"};

// Looks at the sizes, targets and weights of one set.
template <class Real>
class SetCheck {
 public:
  SetCheck(const Call<Real>& call, RowSet<Real>& set, const SetNames& names)
      : call_(call), set_(set), names_(names), out_(call.network->out_features()) {
    if (!call.loss || !set.y) return;
    labels_ = takes_labels(*call.loss);
    probabilities_ = takes_probabilities(*call.loss);
  }

  // Returns the rows of the largest task; says in the set whether there are rows that weigh nothing.
  int run() {
    const bool batch_norm = mixes_rows(*call_.network);
    std::int64_t largest = 0;
    for (std::int64_t task = 0; task < call_.tasks; ++task) {
      const std::int64_t rows = size(task);
      largest = std::max(largest, rows);
      const std::int64_t counting =
          set_.weights || labels_ || probabilities_ ? look_at_rows(task, rows) : rows;
      set_.has_weightless = set_.has_weightless || counting < rows;
      if (batch_norm && counting == 1)
        refuse(std::string(names_.x) + ": task " + std::to_string(task) + " has one row" +
               (rows > 1 ? " that counts" : "") +
               ", and BatchNorm1d needs at least two to normalise by");
    }
    if (largest > (1 << 24)) refuse(std::string(names_.x) + ": a task has more than 2^24 rows");
    return static_cast<int>(largest);
  }

 private:
  std::int64_t size(std::int64_t task) const {
    const std::int64_t rows = set_.sizes ? set_.sizes[task] : set_.rows;
    if (rows < 0 || set_.start(task) < 0 || (set_.sizes && !set_.starts && rows > set_.rows))
      refuse(std::string(names_.sizes) + ": task " + std::to_string(task) + " has size " +
             std::to_string(rows) + ", not in 0.." + std::to_string(set_.rows));
    return rows;
  }

  // How many of a task's rows count. What one that does not holds is nobody's concern.
  std::int64_t look_at_rows(std::int64_t task, std::int64_t rows) const {
    const std::int64_t start = set_.start(task);
    std::int64_t counting = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      if (set_.weights) check_weight(task, row, set_.weights[start + row]);
      if (!call_.weighs(set_, start + row)) continue;
      ++counting;
      if (labels_) check_label(task, row, static_cast<const std::int64_t*>(set_.y)[start + row]);
      if (probabilities_)
        check_probabilities(task, row, static_cast<const Real*>(set_.y) + (start + row) * out_);
    }
    return counting;
  }
  void check_weight(std::int64_t task, std::int64_t row, Real weight) const {
    if (!(weight >= 0) || !std::isfinite(weight))
      refuse(task_row(names_.weights, task, row) + "weight " + std::to_string(weight) +
             " is not a finite number >= 0");
  }
  void check_label(std::int64_t task, std::int64_t row, std::int64_t label) const {
    if (label < 0 || label >= out_)
      refuse(task_row(names_.y, task, row) + "label " + std::to_string(label) + " is not in 0.." +
             std::to_string(out_ - 1));
  }
  // y [out]. A NaN is as in the other losses: the loss is NaN.
  void check_probabilities(std::int64_t task, std::int64_t row, const Real* y) const {
    for (int o = 0; o < out_; ++o)
      if (y[o] < 0 || y[o] > 1)
        refuse(task_row(names_.y, task, row) + "target " + number(y[o]) +
               " is not in 0..1; bce_with_logits takes probabilities (labels of -1 and +1: use (y "
               "+ 1) / 2)");
  }

  const Call<Real>& call_;
  RowSet<Real>& set_;
  const SetNames& names_;
  const int out_;
  bool labels_ = false, probabilities_ = false;
};

// Tasks of like size side by side, so that a vector of tasks wastes little. Only the sizes decide.
template <class Real>
std::vector<std::int64_t> sorted_tasks(const Call<Real>& call) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(call.tasks));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    const int sa = call.support.size(a), sb = call.support.size(b);
    return sa != sb ? sa < sb : call.query.size(a) < call.query.size(b);
  });
  return order;
}

// Below this much work (about ten microseconds) waking a second thread costs more than it saves.
constexpr double kSmallWork = 3e4;

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const InstructionSet& set : usable()) names.emplace_back(set.single->isa);
  return names;
}
std::string isa() { return current().single->isa; }
void set_isa(const std::string& name) { chosen_isa = static_cast<int>(find_isa(name)); }

std::string executor() {
  const Choice choice = chosen_executor;
  return choice == Choice::automatic ? "auto"
         : choice == Choice::rows    ? "rows"
         : choice == Choice::lanes   ? "lanes"
                                     : "emulated";
}
void set_executor(const std::string& name) {
  if (name == "auto")
    chosen_executor = Choice::automatic;
  else if (name == "rows")
    chosen_executor = Choice::rows;
  else if (name == "lanes")
    chosen_executor = Choice::lanes;
  else if (name == "emulated" && emulates())
    chosen_executor = Choice::emulated;
  else
    throw std::invalid_argument("executor: expected 'auto', 'rows' or 'lanes', got '" + name + "'");
}
const char* executor_name(ExecutorKind kind) {
  return kind == ExecutorKind::rows ? "rows" : "lanes";
}

int num_threads() {
  const int chosen = chosen_threads;
  return chosen > 0 ? chosen : available_cores();
}
void set_num_threads(int n) {
  if (n < 1)
    throw std::invalid_argument("num_threads: expected at least 1, got " + std::to_string(n));
  chosen_threads = n;
}

namespace {

template <class Real>
Report plan_with(const Kernels<Real>& table, const Call<Real>& call, Job job) {
  const Choice choice = chosen_executor;
  Report report{};
  report.executor = choice == Choice::lanes ? ExecutorKind::lanes : ExecutorKind::rows;
  report.needs = table.needs(call, job, report.executor);
  // A factored task's bits must not depend on how many tasks come with it, so there lanes are no choice.
  if ((choice == Choice::automatic || choice == Choice::emulated) && call.tasks > 1 &&
      !report.needs.factored) {
    const Needs lanes = table.needs(call, job, ExecutorKind::lanes);
    if (lanes.cost < report.needs.cost) {
      report.executor = ExecutorKind::lanes;
      report.needs = lanes;
    }
  }
  const std::int64_t most =
      std::max<std::int64_t>(1, static_cast<std::int64_t>(report.needs.chunks));
  report.threads = report.needs.cost < kSmallWork
                       ? 1
                       : static_cast<int>(std::min<std::int64_t>(num_threads(), most));
  return report;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *current().single;
}
template <>
const Kernels<double>& kernels<double>() {
  return *current().twice;
}

template <class Real>
Report plan(const Call<Real>& call, Job job) {
  return plan_with(kernels<Real>(), call, job);
}

// A minibatch of one row cannot be normalised by its own statistics.
template <class Real>
void check_minibatches(const Call<Real>& call) {
  const int size = call.batches.size;
  if (size == 0 || !mixes_rows(*call.network)) return;
  for (std::int64_t task = 0; task < call.tasks; ++task) {
    const int rows = call.support.size(task);
    if (!call.batches.whole(rows) && (size == 1 || rows % size == 1))
      refuse("batch_size: " + std::to_string(size) + " leaves a minibatch of one row of the " +
             std::to_string(rows) + " rows of task " + std::to_string(task) +
             ", which batch normalisation cannot normalise");
  }
}

template <class Real>
void check(Call<Real>& call, Job job) {
  const auto largest = [&](RowSet<Real>& set, const SetNames& names) {
    return SetCheck<Real>(call, set, names).run();
  };
  call.max_support = job == Job::predict ? 0 : largest(call.support, kSupport);
  check_minibatches(call);
  call.max_query = job == Job::adapt && !call.predictions ? 0 : largest(call.query, kQuery);
  call.max_validation = call.validation.x ? largest(call.validation, kValidation) : 0;
  if (call.max_support > 0 && !call.support.y) refuse("ys: expected targets, got none");
  if (call.max_validation > 0 && !call.validation.y) refuse("yv: expected targets, got none");
  if (call.steps_of(call.max_support) > kMostSteps)
    refuse("epochs: more than 2^30 inner steps for the largest task");
}

template <class Real>
void run(Call<Real>& call, Job job) {
  check(call, job);
  const Kernels<Real>& table =
      kernels<Real>();  // once: another thread may choose another meanwhile
  const Report report = plan_with(table, call, job);
  std::vector<std::int64_t> order;
  if (report.executor == ExecutorKind::lanes && (call.support.sizes || call.query.sizes)) {
    order = sorted_tasks(call);
    call.order = order.data();
  }
  const Memory memory(report.needs.bytes(report.threads));
  const Team team{report.threads, parallel_for};
  table.run(call, job, report.executor, report.needs, team, memory.data());
}

template void check(Call<float>&, Job);
template void check(Call<double>&, Job);
template Report plan(const Call<float>&, Job);
template Report plan(const Call<double>&, Job);
template void run(Call<float>&, Job);
template void run(Call<double>&, Job);

double fma_peak(const std::string& name, bool is_double, double seconds) {
  const InstructionSet& set = usable()[find_isa(name)];
  const auto rate = is_double ? set.twice->fma_rate : set.single->fma_rate;
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  double best = 0;
  do {
    const auto start = Clock::now();
    const double flops = rate(200000);
    best = std::max(best, flops / std::chrono::duration<double>(Clock::now() - start).count());
  } while (Clock::now() < end);
  return best;
}

}  // namespace pymeta
