// native_test: the native core without Python, which is what sanitizers and emulators can look into.
//
// `native_test pool` runs the tests of the thread pool alone, `native_test blocks` one pass of the emulated block (make
// sanitize: both under ThreadSanitizer).

#include <new>

#include "checks.h"
#include "tests.h"

// Counts what is allocated, for the promise that an Engine's calls of known sizes allocate nothing.
void* operator new(std::size_t bytes) {
  ++pymeta::testing::allocations;
  if (void* p = std::malloc(bytes ? bytes : 1)) return p;
  throw std::bad_alloc();
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  ++pymeta::testing::allocations;
  return std::malloc(bytes ? bytes : 1);
}
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"  // these are a pair
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

// native_test [pool] [blocks] [no-fork]: only these; without forking, which user-mode emulators cannot do with threads.
int main(int argc, char** argv) {
  const auto given = [&](const char* word) {
    return std::any_of(argv + 1, argv + argc,
                       [&](const char* arg) { return std::strcmp(arg, word) == 0; });
  };
  const bool all = !given("pool") && !given("blocks");
  if (all) pymeta::testing::test_kernels();
  if (all) pymeta::testing::test_losses();
  if (all) pymeta::testing::test_cell();
  if (all || given("blocks")) pymeta::testing::test_blocks(all);
  if (all || given("blocks")) pymeta::testing::test_lists();
  if (all || given("blocks")) pymeta::testing::test_fragments();
  if (all || given("pool")) pymeta::testing::test_pool(!given("no-fork"));
  std::printf("%ld checks passed\n", pymeta::testing::passed.load());
  if (pymeta::testing::failed > 0)
    std::fprintf(stderr, "%ld checks FAILED\n", pymeta::testing::failed.load());
  return pymeta::testing::failed > 0 ? 1 : 0;
}
