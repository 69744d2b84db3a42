// An emulated block is near the CPU's executors, and its bits depend neither on its threads nor on how much shared memory
// it has.

#include "../cuda/device.h"
#include "problem.h"
#include "tests.h"

namespace pymeta::testing {

#ifdef PYMETA_HAS_EMULATOR

// On an emulated device, with memory of exactly the size asked for that holds NaN.
template <class Real>
void run_on_blocks(Call<Real>& call) {
  pymeta::check(call);
  const BlockPlan plan = plan_on(kEmulated, call);
  const std::size_t bytes = plan.workspace_bytes;
  std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::aligned_alloc(64, bytes ? bytes : 64)), &std::free);
  std::memset(memory.get(), 0xff, bytes);
  run_on(kEmulated, 0, memory.get(), plan, call);
}

// Loosely, as float is near double.
template <class Real>
void check_near_the_cpu(const Setup& setup, const std::string& name) {
  const Data data = make_data(setup, 1);
  const Results<Real> got = Problem<Real>(setup, data).results(run_on_blocks<Real>);
  const Results<double> wanted = Problem<double>(setup, data).results();
  std::vector<const Exact<double>*> all;
  wanted.numbers([&](const char*, const Exact<double>& b) { all.push_back(&b); });
  std::size_t next = 0;
  got.numbers([&](const char* what, const Exact<Real>& a) {
    const Exact<double>& b = *all[next++];
    double largest = 0, error = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (b[i] != Results<double>::kUntouched) largest = std::max(largest, std::fabs(b[i]));
      const double off = std::fabs(static_cast<double>(a[i]) - b[i]);
      error = off <= error ? error : off;  // keeps a NaN
    }
    CHECK(error <= 1000 * std::numeric_limits<Real>::epsilon() * largest,
          name + ": " + what + " is off by " + std::to_string(error / largest));
  });
  CHECK(got.best_epochs.same_bits(wanted.best_epochs) &&
            got.epochs_run.same_bits(wanted.epochs_run) && got.status.same_bits(wanted.status),
        name + ": epochs or status");
}

// Neither the number of threads nor where arrays lie changes a bit; nor does running again.
template <class Real>
void check_block_bits(const Setup& setup, const std::string& name) {
  const Data data = make_data(setup, 1);
  const auto with = [&](int threads, std::size_t bytes) {
    set_block_options({threads, bytes});
    Results<Real> r = Problem<Real>(setup, data).results(run_on_blocks<Real>);
    set_block_options({});
    return r;
  };
  const Results<Real> wanted = with(0, 0);
  for (const int threads : {1, 2, 3})
    for (const std::size_t bytes : {std::size_t{0}, std::size_t{12000}, std::size_t{22000}}) {
      if (threads == 2 && bytes == 0) continue;
      const Results<Real> got = with(threads, bytes);
      CHECK(got.same_tasks(wanted) && got.same_gradients(wanted),
            name + ": other bits with " + std::to_string(threads) + " threads, " +
                std::to_string(bytes) + " bytes of shared memory");
    }
}

void test_blocks(bool all) {
  for (Setup setup : setups()) {
    setup.tasks = 3;
    check_near_the_cpu<double>(setup, "block " + setup.name + " double");
    if (!all) continue;
    if (setup.smooth) check_near_the_cpu<float>(setup, "block " + setup.name + " float");
    check_block_bits<float>(setup, "block " + setup.name + " float");
    check_block_bits<double>(setup, "block " + setup.name + " double");
  }
}

#else
void test_blocks(bool) {}
#endif

}  // namespace pymeta::testing
