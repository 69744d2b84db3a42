// An emulated block is near the CPU's executors, and its bits depend neither on its threads nor on how much shared memory
// it has.

#include <map>

#include "../runtime/device_plan.h"
#include "counts/banks.h"
#include "problem.h"
#include "tests.h"

namespace pymeta::testing {

// The model of shared memory's banks, by patterns whose wavefronts are known.
void test_banks() {
  const auto of = [](unsigned bytes, auto place) {
    std::vector<LaneAccess> lanes;
    for (int lane = 0; lane < 32; ++lane)
      lanes.push_back({lane, static_cast<std::uint32_t>(place(lane))});
    return wavefronts(lanes, bytes);
  };
  CHECK(wavefronts({}, 4) == 0, "banks: nobody asks");
  CHECK(of(4, [](int) { return 64; }) == 1 && of(16, [](int) { return 64; }) == 1,
        "banks: all ask for the same");
  CHECK(of(4, [](int i) { return 4 * i; }) == 1, "banks: neighbours");
  CHECK(of(4, [](int i) { return 8 * i; }) == 2, "banks: every other word");
  CHECK(of(4, [](int i) { return 128 * i; }) == 32, "banks: one bank");
  CHECK(of(8, [](int i) { return 8 * i; }) == 2, "banks: neighbours of 8 bytes");
  CHECK(of(16, [](int i) { return 16 * i; }) == 4, "banks: neighbours of 16 bytes");
  CHECK(of(16, [](int i) { return 16 * 11 * i; }) == 4, "banks: rows of an odd number of quads");
  CHECK(of(16, [](int i) { return 16 * 12 * i; }) == 16, "banks: rows of four times three quads");
  CHECK(of(16, [](int i) { return 16 * (i / 8); }) == 4, "banks: a quarter asks for the same");
}

#ifdef PYMETA_HAS_EMULATOR

// On an emulated device, with memory of exactly the size asked for that holds NaN.
template <class Real>
void run_on_blocks(Call<Real>& call) {
  pymeta::check(call);
  DevicePlan<Real> plan(kEmulated, call);
  const std::size_t bytes = plan.workspace_bytes();
  std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::aligned_alloc(64, bytes ? bytes : 64)), &std::free);
  std::memset(memory.get(), 0xff, bytes);
  plan.run(0, memory.get(), call);
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

// A call without the options that plain calls lack (cuda/families.h). Starts of the tasks' own become those of the first task.
template <class Real>
void strip(Call<Real>& call) {
  call.lr_gradient = call.xs_gradient = call.xq_gradient = nullptr;
  call.train_curves = call.validation_curves = nullptr;
  call.validation = {};
  call.parameter_per_task = nullptr;
  call.optimizer.anchor = call.optimizer.clip_norm = 0;
}

// The kernels of all families that hold a call give it the same bits; so they do for one that has no extras. Counts
// the calls of each, and the jobs of the plain ones.
template <class Real>
void check_families(const Setup& setup, const std::string& name,
                    std::map<std::string, int>& calls) {
  const Data data = make_data(setup, 1);
  std::string family;
  const auto from = [&](int first, bool bare) {
    set_block_options({0, 0, first});
    Results<Real> r = Problem<Real>(setup, data).results([&](Call<Real>& call) {
      if (bare) strip(call);
      run_on_blocks(call);
      family = family_on(kEmulated, call);
      ++calls[family];
      if (family == "plain") ++calls["job " + std::to_string(static_cast<int>(call.job))];
    });
    set_block_options({});
    return r;
  };
  for (const bool bare : {false, true}) {
    const Results<Real> wanted = from(0, bare);
    for (int first = 1; first < 3; ++first) {
      const Results<Real> got = from(first, bare);
      CHECK(got.same_tasks(wanted) && got.same_gradients(wanted),
            name + ": other bits in family " + family);
    }
  }
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
  test_banks();
  std::map<std::string, int> calls;
  for (Setup setup : setups()) {
    setup.tasks = 3;
    check_near_the_cpu<double>(setup, "block " + setup.name + " double");
    check_families<double>(setup, "block " + setup.name + " double", calls);
    if (!all) continue;
    if (setup.smooth) check_near_the_cpu<float>(setup, "block " + setup.name + " float");
    check_block_bits<float>(setup, "block " + setup.name + " float");
    check_block_bits<double>(setup, "block " + setup.name + " double");
  }
  for (const char* family : {"plain", "chains", "every"})
    CHECK(calls[family] > 0, std::string("block: no call of family ") + family);
  for (const Job job : {Job::meta, Job::adapt, Job::reptile, Job::fine_tune, Job::predict}) {
    const std::string name = "job " + std::to_string(static_cast<int>(job));
    CHECK(calls[name] > 0, "block: no plain call of " + name);
  }
}

#else
void test_blocks(bool) { test_banks(); }
#endif

}  // namespace pymeta::testing
