// What the native tests check with, and arrays of exactly their size: AddressSanitizer sees a step over either end.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace pymeta::testing {

inline std::atomic<long> passed{0}, failed{0};
inline std::atomic<long> allocations{0};  // by operator new (main.cpp)

inline void check_that(bool holds, const std::string& what, const char* file, int line) {
  if (holds) {
    ++passed;
  } else if (++failed <= 40) {
    std::fprintf(stderr, "%s:%d: FAILED %s\n", file, line, what.c_str());
  }
}
#define CHECK(holds, what) check_that((holds), (what), __FILE__, __LINE__)

// A heap array of exactly n elements.
template <class T>
class Exact {
 public:
  Exact() : Exact(0) {}
  explicit Exact(std::size_t n, T value = T{}) : data_(new T[n]), size_(n) {
    std::fill(data_.get(), data_.get() + n, value);
  }
  template <class From>
  static Exact of(const std::vector<From>& values) {
    Exact result(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) result[i] = static_cast<T>(values[i]);
    return result;
  }
  T* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) const { return data_[i]; }
  bool same_bits(const Exact& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), size_ * sizeof(T)) == 0;
  }

 private:
  std::unique_ptr<T[]> data_;
  std::size_t size_;
};

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2654435761u + 12345) {}
  double uniform() {  // [0, 1), a float's worth of bits: the same number in both precisions
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state_ >> 40) / (1 << 24);
  }
  double symmetric() { return 2 * uniform() - 1; }
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(uniform() * static_cast<double>(n));
  }

 private:
  std::uint64_t state_;
};

}  // namespace pymeta::testing
