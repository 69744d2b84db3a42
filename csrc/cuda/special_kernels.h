// The kernels that were compiled for a single call each (special.h), kept for calls like it.
//
// Whoever sets a Specialiser has a source compiled where a call comes for the first time. What it cannot compile runs by the kernel of the
// call's family, and is not tried again.
#pragma once

#include <functional>
#include <memory>
#include <string>

namespace pymeta {

class Specialiser {
 public:
  virtual ~Specialiser() = default;
  // The path of what was made of a source for devices of this compute capability (90 for 9.0; 0: a library for this host), or "".
  virtual std::string compile(const std::string& source, int capability) = 0;
  // What was made of it cannot be loaded.
  virtual void failed(const std::string& path, const std::string& reason) = 0;
};
void set_specialiser(
    std::shared_ptr<Specialiser> specialiser);  // null: no call has a kernel of its own
bool specialises();

// A kernel that is loaded: of the CUDA runtime, or a function of the host's; null where there is none.
using SpecialKernel = const void*;
// `key` tells calls apart; source() is asked for where there was none like it.
SpecialKernel special_kernel(int ordinal, const std::string& key,
                             const std::function<std::string()>& source);

// For tests: what was loaded or tried so far is forgotten.
void forget_special_kernels();

// The kernel's code (special_kernel.h and all that it includes; cmake/one_source.py makes it), without the constants of a call.
extern const char* const special_kernel_source;

}  // namespace pymeta
