#include "device.h"

#include "families.h"
#include "limits.h"

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <utility>

#ifdef PYMETA_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace pymeta {

// The tables of a machine, one for each family of calls.
#define PYMETA_DECLARE(machine, family)                               \
  extern const BlockKernels<float> machine##_##family##_blocks_float; \
  extern const BlockKernels<double> machine##_##family##_blocks_double;
#define PYMETA_DECLARE_FLOAT(machine, family) \
  extern const BlockKernels<float> machine##_##family##_blocks_float;
#ifdef PYMETA_HAS_CUDA
PYMETA_BLOCK_FAMILIES(PYMETA_DECLARE, cuda)
PYMETA_FLOAT_FAMILIES(PYMETA_DECLARE_FLOAT, cuda)
#endif
#ifdef PYMETA_HAS_EMULATOR
PYMETA_BLOCK_FAMILIES(PYMETA_DECLARE, emulated)
PYMETA_FLOAT_FAMILIES(PYMETA_DECLARE_FLOAT, emulated)
#endif

namespace {

constexpr std::size_t kLargestTask = std::size_t{1} << 30;  // scalars: places are 30 bits

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

#ifdef PYMETA_HAS_CUDA

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string find_cuda_reason() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no CUDA driver";
  cudaRuntimeGetVersion(&runtime);
  // Kernel parameters of more than 4 KiB came with 12.1.
  constexpr int needed = 12010;
  if (driver < needed)
    return "the driver is too old: it has CUDA " + version(driver) + ", and " + version(needed) +
           " is needed";
  int count = 0;
  const cudaError_t wrong = cudaGetDeviceCount(&count);
  if (wrong == cudaErrorInsufficientDriver)
    return "the driver is too old: it has CUDA " + version(driver) + ", this build is for " +
           version(runtime);
  if (wrong != cudaSuccess) return cudaGetErrorString(wrong);
  return count > 0 ? "" : "there is no CUDA device";
}

int attribute(cudaDeviceAttr which, int ordinal) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, which, ordinal) != cudaSuccess)
    cudaGetLastError();  // or the next launch would report it
  return value;
}

DeviceFacts find_facts(int ordinal) {
  DeviceFacts facts;
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, ordinal) == cudaSuccess)
    facts.name = properties.name;
  else
    cudaGetLastError();
  facts.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, ordinal) +
                     attribute(cudaDevAttrComputeCapabilityMinor, ordinal);
  facts.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, ordinal);
  facts.most_threads = kBlockThreads;
  facts.block_bytes =
      static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal));
  facts.multiprocessor_bytes =
      static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, ordinal));
  return facts;
}

// The device of a block of code, put back behind it.
class OnDevice {
 public:
  explicit OnDevice(int ordinal) {
    check(cudaGetDevice(&before_));
    changed_ = before_ != ordinal;
    if (changed_) check(cudaSetDevice(ordinal));
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);  // setting a device may create its context
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  static void check(cudaError_t wrong) {
    if (wrong != cudaSuccess) throw std::runtime_error(cudaGetErrorString(wrong));
  }
  int before_ = 0;
  bool changed_ = false;
};

#else

std::string find_cuda_reason() { return "this build of pymeta has no CUDA executor"; }

#endif

// Small, so that tests come upon everything that a GPU does with larger tasks.
const DeviceFacts& emulated_facts() {
  static const DeviceFacts facts{
      "emulated", 0, 2, 4, std::size_t{96} << 10, std::size_t{192} << 10};
  return facts;
}

std::atomic<int> chosen_threads{0};
std::atomic<std::size_t> chosen_bytes{0};
std::atomic<int> first_family{0};

// The tables of a build, by device and in the order of their families; device_facts() has seen to it that there are some.
#define PYMETA_FLOAT_TABLE(machine, family) &machine##_##family##_blocks_float,
#define PYMETA_DOUBLE_TABLE(machine, family) &machine##_##family##_blocks_double,
#define PYMETA_TABLES(machine)                              \
  {PYMETA_FLOAT_FAMILIES(PYMETA_FLOAT_TABLE, machine)       \
       PYMETA_BLOCK_FAMILIES(PYMETA_FLOAT_TABLE, machine)}, \
  {                                                         \
    PYMETA_BLOCK_FAMILIES(PYMETA_DOUBLE_TABLE, machine)     \
  }
#define PYMETA_ONE(machine, family) +1
constexpr int kFamilies = PYMETA_BLOCK_FAMILIES(PYMETA_ONE, );  // of both
template <class Real>
using Tables = std::vector<const BlockKernels<Real>*>;
using AllTables = std::pair<Tables<float>, Tables<double>>;

template <class Real>
const Tables<Real>& tables_of([[maybe_unused]] int ordinal) {
#ifdef PYMETA_HAS_EMULATOR
  static const AllTables emulated{PYMETA_TABLES(emulated)};
  if (ordinal == kEmulated) return std::get<Tables<Real>>(emulated);
#endif
  static const AllTables cuda{
#ifdef PYMETA_HAS_CUDA
      PYMETA_TABLES(cuda)
#endif
  };
  return std::get<Tables<Real>>(cuda);
}

// The first family that holds the call; the last holds all. Those of one Real alone are not counted, and left out where another
// is to be the first.
template <class Real>
const BlockKernels<Real>& kernels_of(int ordinal, const Call<Real>& call) {
  const Tables<Real>& tables = tables_of<Real>(ordinal);
  const int first = first_family;
  std::size_t i = first > 0 ? tables.size() - static_cast<std::size_t>(kFamilies - first) : 0;
  while (i + 1 < tables.size() && !tables[i]->holds(call)) ++i;
  return *tables[i];
}

}  // namespace

bool emulates() {
#ifdef PYMETA_HAS_EMULATOR
  return true;
#else
  return false;
#endif
}

const std::string& cuda_reason() {
  static const std::string reason = find_cuda_reason();
  return reason;
}

int device_count() {
  int count = 0;
#ifdef PYMETA_HAS_CUDA
  if (cuda_reason().empty()) cudaGetDeviceCount(&count);
#endif
  return count;
}

const DeviceFacts& device_facts(int ordinal) {
  if (ordinal == kEmulated) {
    if (!emulates()) refuse("device: this build of pymeta has no emulated device");
    return emulated_facts();
  }
  if (!cuda_reason().empty()) refuse("device: " + cuda_reason());
  if (ordinal < 0 || ordinal >= device_count())
    refuse("device: there is no cuda:" + std::to_string(ordinal));
#ifdef PYMETA_HAS_CUDA
  static const std::vector<DeviceFacts>* const all = [] {
    auto* found = new std::vector<DeviceFacts>;
    for (int i = 0; i < device_count(); ++i) found->push_back(find_facts(i));
    return found;
  }();
  return (*all)[static_cast<std::size_t>(ordinal)];
#else
  return emulated_facts();  // not reached
#endif
}

std::string unfit_for_blocks(const Network& network, const Loss& loss) {
  if (network.layer_count > block_layers::every)
    return "the model has " + std::to_string(network.layer_count) +
           " layers (an activation counts to the layer before it); the CUDA executor takes " +
           std::to_string(block_layers::every);
  if ((loss.weight || loss.pos_weight) && network.out_features() > kBlockWeights)
    return "the loss has weights for " + std::to_string(network.out_features()) +
           " outputs; the CUDA executor takes " + std::to_string(kBlockWeights);
  if (loss.level_count > kBlockWeights)
    return "the loss has " + std::to_string(loss.level_count) +
           " levels; the CUDA executor takes " + std::to_string(kBlockWeights);
  return "";
}

std::vector<std::string> block_family_names() {
#define PYMETA_FAMILY_NAME(machine, family) #family,
  return {PYMETA_BLOCK_FAMILIES(PYMETA_FAMILY_NAME, )};
#undef PYMETA_FAMILY_NAME
}
BlockOptions block_options() { return {chosen_threads, chosen_bytes, first_family}; }
void set_block_options(const BlockOptions& options) {
  if (options.threads < 0 || options.threads > kBlockThreads)
    refuse("block_threads: expected 0 (the planner's choice) to " + std::to_string(kBlockThreads) +
           ", got " + std::to_string(options.threads));
  const int families = static_cast<int>(block_family_names().size());
  if (options.first_family < 0 || options.first_family >= families)
    refuse("block_family: expected 0 to " + std::to_string(families - 1) + ", got " +
           std::to_string(options.first_family));
  chosen_threads = options.threads;
  chosen_bytes = options.bytes;
  first_family = options.first_family;
}

template <class Real>
BlockPlan plan_on(int ordinal, const Call<Real>& call) {
  const DeviceFacts& facts = device_facts(ordinal);
  if (ordinal != kEmulated && facts.capability < 80)
    refuse("device: " + facts.name + " has compute capability " +
           std::to_string(facts.capability / 10) + "." + std::to_string(facts.capability % 10) +
           ", and 8.0 is needed");
  const BlockOptions options = block_options();
  if (ordinal != kEmulated && options.threads % 32 != 0)
    refuse("block_threads: expected a multiple of 32 on a GPU, got " +
           std::to_string(options.threads));
  const BlockPlan plan =
      kernels_of(ordinal, call).plan(call, facts, options.threads, options.bytes);
  if (plan.far_scalars >= kLargestTask)
    refuse("tasks: one of them needs " + std::to_string(plan.far_scalars * sizeof(Real) >> 30) +
           " GiB of workspace on the device, more than " +
           std::to_string(kLargestTask * sizeof(Real) >> 30));
  return plan;
}

template <class Real>
void run_on(int ordinal, std::uintptr_t stream, char* workspace, const BlockPlan& plan,
            const Call<Real>& call, KeptFrame& kept) {
  const BlockKernels<Real>& kernels = kernels_of(ordinal, call);
  if (kept.kernels != &kernels) kept = {nullptr, &kernels};
#ifdef PYMETA_HAS_CUDA
  if (ordinal != kEmulated) {
    const OnDevice guard(ordinal);
    if (const char* wrong = kernels.run(call, plan, stream, workspace, kept.frame))
      throw std::runtime_error(wrong);
    return;
  }
#endif
  kernels.run(call, plan, stream, workspace, kept.frame);
}

template <class Real>
const char* family_on(int ordinal, const Call<Real>& call) {
  device_facts(ordinal);
  return kernels_of(ordinal, call).family;
}

template const char* family_on(int, const Call<float>&);
template const char* family_on(int, const Call<double>&);
template BlockPlan plan_on(int, const Call<float>&);
template BlockPlan plan_on(int, const Call<double>&);
template void run_on(int, std::uintptr_t, char*, const BlockPlan&, const Call<float>&, KeptFrame&);
template void run_on(int, std::uintptr_t, char*, const BlockPlan&, const Call<double>&, KeptFrame&);

}  // namespace pymeta
