// The thread pool: every index once, nested and concurrent calls, whole calls of the kernels, forks.

#include <sys/wait.h>
#include <unistd.h>

#include "../runtime/threads.h"
#include "problem.h"
#include "tests.h"

namespace pymeta::testing {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#else
constexpr bool kThreadSanitizer = false;
#endif

// Every index exactly once, by workers that are within bounds and never the same at the same time.
void check_pool(int threads, std::int64_t count, const std::string& name) {
  struct Context {
    std::vector<std::atomic<int>> done;
    std::vector<std::atomic<int>> busy;
    std::atomic<bool> orderly{true};
    int threads;
  } context{std::vector<std::atomic<int>>(static_cast<std::size_t>(count)),
            std::vector<std::atomic<int>>(static_cast<std::size_t>(threads)),
            {},
            threads};
  context.orderly = true;
  parallel_for(
      threads, count,
      [](void* p, std::int64_t index, int worker) {
        Context& c = *static_cast<Context*>(p);
        if (worker < 0 || worker >= c.threads || c.busy[static_cast<std::size_t>(worker)]++ != 0)
          c.orderly = false;
        ++c.done[static_cast<std::size_t>(index)];
        --c.busy[static_cast<std::size_t>(worker)];
      },
      &context);
  bool once = true;
  for (const auto& d : context.done) once = once && d == 1;
  CHECK(once, name + ": an index was left out or done twice");
  CHECK(context.orderly, name + ": a worker out of bounds or twice at once");
}

// Calls inside calls: the inner ones find the pool taken and work alone.
void check_nested() {
  std::atomic<int> sum{0};
  parallel_for(
      3, 20,
      [](void* p, std::int64_t, int) {
        parallel_for(
            4, 30, [](void* q, std::int64_t, int) { ++*static_cast<std::atomic<int>*>(q); }, p);
      },
      &sum);
  CHECK(sum == 600, "nested: " + std::to_string(sum) + " of 600");
}

// Whole calls from many threads at once: the pool, the block cache and the kernels' sharing.
void check_concurrent_calls() {
  const std::vector<Setup> all = setups();
  set_num_threads(3);
  std::vector<Results<float>> wanted;
  for (const Setup& setup : all)
    wanted.push_back(Problem<float>(setup, make_data(setup, 1)).results());
  in_threads(6, [&](int caller) {
    for (int round = 0; round < 6; ++round) {
      const std::size_t i = static_cast<std::size_t>(caller + round) % all.size();
      const Results<float> got = Problem<float>(all[i], make_data(all[i], 1)).results();
      CHECK(got.same_tasks(wanted[i]) && got.same_gradients(wanted[i]),
            all[i].name + ": other bits among other callers");
    }
  });
}

// The pool was used before, its threads are not in the child; it makes its own.
void check_fork() {
  const Setup setup = setups()[0];
  const Data data = make_data(setup, 1);
  set_num_threads(4);
  const Results<float> wanted = Problem<float>(setup, data).results();
  for (int i = 0; i < 3; ++i) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
      bool same = true;
      for (int round = 0; round < 5; ++round) {
        const Results<float> got = Problem<float>(setup, data).results();
        same = same && got.same_tasks(wanted) && got.same_gradients(wanted);
      }
      _exit(same ? 0 : 1);
    }
    int status = 1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
              WEXITSTATUS(status) == 0,
          "a forked child: status " + std::to_string(status));
    const Results<float> again = Problem<float>(setup, data).results();
    CHECK(again.same_tasks(wanted) && again.same_gradients(wanted), "the parent after a fork");
  }
}

void test_pool(bool may_fork) {
  for (int threads = 1; threads <= 4; ++threads)
    for (const std::int64_t count : {0, 1, 2, 3, 7, 64, 1000})
      check_pool(threads, count,
                 std::to_string(threads) + " threads, " + std::to_string(count) + " indices");
  check_nested();
  in_threads(8, [](int caller) {
    for (int round = 0; round < 50; ++round)
      check_pool(1 + (caller + round) % 4, 1 + round % 20, "concurrent callers");
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the workers are asleep now
  check_pool(4, 100, "after a sleep");
  CHECK(available_cores() >= 1, "available cores");
  check_concurrent_calls();
  if (may_fork && !kThreadSanitizer) check_fork();  // it does not let a forked child start threads
}

}  // namespace pymeta::testing
