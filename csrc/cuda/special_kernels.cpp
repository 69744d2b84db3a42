#include "special_kernels.h"

#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "device.h"

#ifdef PYMETA_HAS_CUDA
#include <cuda_runtime_api.h>
#endif
#ifdef PYMETA_HAS_EMULATOR
#include <dlfcn.h>
#endif

namespace pymeta {
namespace {

constexpr char kName[] = "pymeta_special";

struct Kernels {
  std::mutex mutex;  // held while one is compiled: another thread's first call may be like it
  std::shared_ptr<Specialiser> specialiser;
  std::map<std::pair<int, std::string>, SpecialKernel>
      loaded;  // by device and call; null: there is none
};
Kernels& kernels() {
  static Kernels* const all = new Kernels;  // a call may still run while the process ends
  return *all;
}
std::atomic<bool> is_on{false};

#ifdef PYMETA_HAS_CUDA
// Loaded for good. It asks for as much shared memory as the other kernels (kernels.cu: allow_shared_memory).
SpecialKernel load_on_device(int ordinal, const std::string& path) {
  const auto check = [&](cudaError_t wrong) {
    if (wrong == cudaSuccess) return;
    cudaGetLastError();  // or the next launch would report it
    throw std::runtime_error(cudaGetErrorString(wrong));
  };
  cudaLibrary_t library;
  cudaKernel_t kernel;
  check(cudaLibraryLoadFromFile(&library, path.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0));
  check(cudaLibraryGetKernel(&kernel, library, kName));
  check(cudaKernelSetAttributeForDevice(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(device_facts(ordinal).block_bytes),
                                        ordinal));
  check(cudaKernelSetAttributeForDevice(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared, ordinal));
  return kernel;
}
#endif
#ifdef PYMETA_HAS_EMULATOR
SpecialKernel load_on_host(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const SpecialKernel kernel = library ? dlsym(library, kName) : nullptr;
  if (!kernel) throw std::runtime_error(dlerror());
  return kernel;
}
#endif

SpecialKernel load([[maybe_unused]] int ordinal, const std::string& path) {
#ifdef PYMETA_HAS_EMULATOR
  if (ordinal == kEmulated) return load_on_host(path);
#endif
#ifdef PYMETA_HAS_CUDA
  return load_on_device(ordinal, path);
#else
  throw std::runtime_error("there is no device to load " + path + " on");
#endif
}

}  // namespace

void set_specialiser(std::shared_ptr<Specialiser> specialiser) {
  is_on = specialiser != nullptr;
  const std::lock_guard<std::mutex> lock(kernels().mutex);
  kernels().specialiser = std::move(specialiser);
}
bool specialises() { return is_on; }

SpecialKernel special_kernel(int ordinal, const std::string& key,
                             const std::function<std::string()>& source) {
  Kernels& all = kernels();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const std::pair<int, std::string> own(ordinal, key);
  const auto found = all.loaded.find(own);
  if (found != all.loaded.end()) return found->second;
  if (!all.specialiser) return nullptr;
  SpecialKernel& kernel = all.loaded[own];  // null, should anything below end in an error
  const std::string path = all.specialiser->compile(source(), device_facts(ordinal).capability);
  if (path.empty()) return nullptr;
  try {
    kernel = load(ordinal, path);
  } catch (const std::runtime_error& error) {
    all.specialiser->failed(path, error.what());
  }
  return kernel;
}

void forget_special_kernels() {
  const std::lock_guard<std::mutex> lock(kernels().mutex);
  kernels().loaded.clear();
}

}  // namespace pymeta
