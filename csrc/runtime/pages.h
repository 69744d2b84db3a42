// Working memory from the system: aligned, and with PYMETA_GUARD between pages that nobody may touch.
//
// PYMETA_GUARD is for tests. Each block then has pages of its own and ends exactly where a page without any access
// begins (environment variable PYMETA_GUARD_AT=start: it begins where one ends), so that a load or store outside it
// is a fault on the spot. Blocks come full of NaN and are not kept between calls. Sizes are not rounded up, so that
// also a vector of which only a part lies outside is seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(_WIN32)
#include <malloc.h>
#else
#include <sys/mman.h>
#include <unistd.h>
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

#if defined(_WIN32)

// `bytes` is a multiple of `alignment`. Null where there is no memory.
inline char* take_pages(std::size_t bytes, std::size_t alignment) {
  return static_cast<char*>(_aligned_malloc(bytes, alignment));
}
inline void give_pages(char* data, std::size_t) { _aligned_free(data); }

#else

// From here on a block is the system's own, so that it gets it back at once: an allocator would keep it.
#if defined(PYMETA_ALLOCATES)  // for sanitizers, which watch the allocator's blocks
constexpr std::size_t kMapped = ~std::size_t{0};
#else
constexpr std::size_t kMapped = std::size_t{1} << 20;
#endif

// `bytes` is a multiple of `alignment`, and so of a page where it is mapped. Null where there is no memory.
inline char* take_pages(std::size_t bytes, std::size_t alignment) {
  if (bytes < kMapped) return static_cast<char*>(std::aligned_alloc(alignment, bytes));
  const std::size_t all = bytes + alignment;
  if (all < bytes) return nullptr;
  void* const mapped =
      mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const base = static_cast<char*>(mapped);
  const std::size_t over = reinterpret_cast<std::uintptr_t>(base) % alignment;
  const std::size_t before = over ? alignment - over : 0;
  if (before) munmap(base, before);
  munmap(base + before + bytes, alignment - before);
#if defined(__linux__)
  madvise(base + before, bytes, MADV_HUGEPAGE);
#endif
  return base + before;
}
inline void give_pages(char* data, std::size_t bytes) {
  if (bytes < kMapped)
    std::free(data);
  else
    munmap(data, bytes);
}

#endif

#endif

}  // namespace pymeta
