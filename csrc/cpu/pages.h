// Working memory from the system: aligned, and with PYMETA_GUARD between pages that nobody may touch.
//
// PYMETA_GUARD is for tests. Each block then has pages of its own and ends exactly where a page without any access
// begins (environment variable PYMETA_GUARD_AT=start: it begins where one ends), so that a load or store outside it
// is a fault on the spot. Blocks come full of NaN and are not kept between calls. Sizes are not rounded up, so that
// also a vector of which only a part lies outside is seen.
#pragma once

#include <cstddef>
#include <cstdlib>

#if defined(_WIN32)
#include <malloc.h>
#endif
#if defined(PYMETA_GUARD)
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#endif

namespace pymeta {

#if defined(PYMETA_GUARD)

constexpr bool kKeepsPages = false;
constexpr std::size_t kLine = 64;  // what the kernels ask of a block's address

// [no access][data, at its end or its start][no access]
struct GuardedPages {
  std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::size_t inside, slack;

  explicit GuardedPages(std::size_t bytes) {
    inside = (bytes + page - 1) / page * page;
    static const char* const at = std::getenv("PYMETA_GUARD_AT");
    slack = at && std::strcmp(at, "start") == 0 ? 0 : (inside - bytes) / kLine * kLine;
  }
  std::size_t mapped() const { return inside + 2 * page; }
};

// Null where there is no memory.
inline char* take_pages(std::size_t bytes, std::size_t) {
  const GuardedPages pages(bytes);
  if (pages.inside < bytes) return nullptr;
  void* const base = mmap(nullptr, pages.mapped(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  char* const inside = static_cast<char*>(base) + pages.page;
  if (mprotect(inside, pages.inside, PROT_READ | PROT_WRITE) != 0) {
    munmap(base, pages.mapped());
    return nullptr;
  }
  std::memset(inside, 0xff, pages.inside);
  return inside + pages.slack;
}

// `bytes` as they were asked for.
inline void give_pages(char* data, std::size_t bytes) {
  const GuardedPages pages(bytes);
  munmap(data - pages.slack - pages.page, pages.mapped());
}

#else

constexpr bool kKeepsPages = true;

// `bytes` is a multiple of `alignment`. Null where there is no memory.
inline char* take_pages(std::size_t bytes, std::size_t alignment) {
#if defined(_WIN32)
  return static_cast<char*>(_aligned_malloc(bytes, alignment));
#else
  return static_cast<char*>(std::aligned_alloc(alignment, bytes));
#endif
}
inline void give_pages(char* data, std::size_t) {
#if defined(_WIN32)
  _aligned_free(data);
#else
  std::free(data);
#endif
}

#endif

}  // namespace pymeta
