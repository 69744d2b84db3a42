// Functions of the module: shuffles, settings, devices, memory, measurements.

#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "../core/call/shuffle.h"
#include "../cuda/device.h"
#include "../cuda/special_kernels.h"
#include "../runtime/cores.h"
#include "../runtime/memory.h"
#include "../runtime/registry.h"
#include "common.h"

namespace py = pybind11;

namespace pymeta {
namespace {

// out: [sum of sizes] int64, the tasks' orders one after another (core/call/shuffle.h).
void shuffle_tasks(std::uint64_t seed, std::uint64_t stream, Address task_ids, std::uint64_t epoch,
                   std::uint64_t purpose, std::int64_t tasks, Address sizes, Address out) {
  const ReleasedGil released;
  const std::int64_t* ids = pointer<std::int64_t>(task_ids);
  std::int64_t* to = pointer<std::int64_t>(out);
  for (std::int64_t task = 0; task < tasks; ++task) {
    const std::int64_t rows = pointer<std::int64_t>(sizes)[task];
    const std::uint64_t id = ids ? static_cast<std::uint64_t>(ids[task]) : 0;
    shuffle(Draw{seed, stream, id, epoch, static_cast<Purpose>(purpose)}, static_cast<int>(rows),
            to);
    to += rows;
  }
}

template <class Change>
void change_block_options(Change change) {
  BlockOptions options = block_options();
  change(options);
  set_block_options(options);
}

#ifdef PYMETA_HAS_BLOCKS
// Python's (pymeta/specialise.py); asked by calls, which have let go of the GIL.
class PythonSpecialiser : public Specialiser {
 public:
  PythonSpecialiser(py::function compile, py::function failed)
      : compile_(std::move(compile)), failed_(std::move(failed)) {}
  ~PythonSpecialiser() override {
    const py::gil_scoped_acquire gil;
    compile_ = failed_ = py::function();
  }
  std::string compile(const std::string& source, int capability) override {
    const py::gil_scoped_acquire gil;
    return compile_(source, capability).cast<std::string>();
  }
  void failed(const std::string& path, const std::string& reason) override {
    const py::gil_scoped_acquire gil;
    failed_(path, reason);
  }

 private:
  py::function compile_, failed_;
};
#endif

py::list describe_devices() {
  py::list devices;
  for (int i = 0; i < device_count(); ++i) {
    const DeviceFacts& facts = device_facts(i);
    py::dict one;
    one["ordinal"] = i;
    one["name"] = facts.name;
    one["capability"] =
        std::to_string(facts.capability / 10) + "." + std::to_string(facts.capability % 10);
    one["multiprocessors"] = facts.multiprocessors;
    one["shared_bytes"] = facts.block_bytes;
    devices.append(one);
  }
  return devices;
}

}  // namespace

void bind_settings(py::module_& m) {
  m.def("shuffle", &shuffle_tasks, py::arg("seed"), py::arg("stream"), py::arg("task_ids"),
        py::arg("epoch"), py::arg("purpose"), py::arg("tasks"), py::arg("sizes"), py::arg("out"));
  m.def("isas", &isas);
  m.def("isa", &isa);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("executor", &executor);
  m.def("set_executor", &set_executor, py::arg("name"));
  m.def("cuda_reason", [] {
    const std::string& reason = cuda_reason();
    return reason.empty() ? std::nullopt : std::optional(reason);
  });
  m.def("devices", &describe_devices);
  m.def("emulates", &emulates);
  m.def("block_threads", [] { return block_options().threads; });
  m.def(
      "set_block_threads",
      [](int n) { change_block_options([=](BlockOptions& o) { o.threads = n; }); }, py::arg("n"));
  m.def("block_families", &block_family_names);
  m.def("block_family", [] { return block_options().first_family; });
  m.def(
      "set_block_family",
      [](int n) { change_block_options([=](BlockOptions& o) { o.first_family = n; }); },
      py::arg("n"));
  m.def("block_bytes", [] { return block_options().bytes; });
  m.def(
      "set_block_bytes",
      [](std::size_t n) { change_block_options([=](BlockOptions& o) { o.bytes = n; }); },
      py::arg("n"));
#ifdef PYMETA_HAS_BLOCKS
  m.def(
      "set_specialiser",
      [](py::function compile, py::function failed) {
        auto own = std::make_shared<PythonSpecialiser>(std::move(compile), std::move(failed));
        const ReleasedGil released;
        set_specialiser(std::move(own));
      },
      py::arg("compile"), py::arg("failed"));
  m.def("clear_specialiser", [] {
    const ReleasedGil released;
    set_specialiser(nullptr);
  });
  m.def("specialises", &specialises);
  m.def("forget_special_kernels", &forget_special_kernels);
#endif
  m.def("free_memory", [] {
    const ReleasedGil released;
    return free_memory();
  });
  m.def("kept_bytes", &kept_bytes);
  m.def("set_kept_bytes", &set_kept_bytes, py::arg("n"));
  m.def("available_cores", &available_cores);
  m.def("cpu_quota", &cpu_quota, py::arg("root") = "");
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def(
      "fma_peak",
      [](const std::string& isa, int dtype, double seconds) {
        const ReleasedGil released;
        return fma_peak(isa, dtype == 8, seconds);
      },
      py::arg("isa"), py::arg("dtype"), py::arg("seconds"));
}

}  // namespace pymeta
