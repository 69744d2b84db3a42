// Working memory of calls, kept between them: fresh pages would cost more than the arithmetic.
//
// What is kept is bounded (kept_bytes), and given back to the system on request.
#pragma once

#include <cstddef>

namespace pymeta {

// A block for the length of a call; throws std::bad_alloc.
class WorkingMemory {
 public:
  explicit WorkingMemory(std::size_t bytes);
  ~WorkingMemory();
  WorkingMemory(const WorkingMemory&) = delete;
  WorkingMemory& operator=(const WorkingMemory&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
  std::size_t bytes_;
};

// Gives back what no call uses now; returns how many bytes that was.
std::size_t free_memory();

// The most that is kept between calls; more is given back when the call that used it ends.
std::size_t kept_bytes();
void set_kept_bytes(std::size_t bytes);

}  // namespace pymeta
