// What the files of this folder share: addresses, the GIL, interrupts, and what each of them adds to the module.
//
// Arrays come in as addresses (tensor.data_ptr(), 0 for none), so the module needs neither torch nor numpy. Shapes
// and dtypes were checked by the Python layer; what depends on the data is checked in runtime/check.cpp. See
// pymeta/_native.pyi for the signatures and their meaning.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>

#include "../core/call/tasks.h"

namespace pymeta {

using Address = std::uintptr_t;

[[noreturn]] inline void refuse(const std::string& message) {
  throw std::invalid_argument(message);
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// visit(float{}) or visit(double{}), by the size of an item.
template <class Visitor>
auto with_real(int dtype, Visitor visit) -> decltype(visit(float{})) {
  if (dtype == 4) return visit(float{});
  if (dtype == 8) return visit(double{});
  refuse("dtype: expected 4 (float32) or 8 (float64), got " + std::to_string(dtype));
}

// Lets other threads have the GIL meanwhile.
//
// A thread that wants it back while the interpreter exits never gets it: Python (before 3.14) ends the thread, which
// unwinds its stack, and neither a destructor nor an object that is released without the GIL survives that. So such a
// thread sleeps until the process is gone, as it does in later Pythons. py::gil_scoped_release would end the process.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  PyThreadState** state() { return &state_; }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

// What a function of Python's returns: a new reference, or null and an error.
inline pybind11::object checked(PyObject* result) {
  if (!result) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}
inline bool is_true(PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) throw pybind11::error_already_set();
  return truth != 0;
}

// Called when the module is loaded: by it calls know whether they are in Python's main thread.
void remember_main_thread();

void bind_network(pybind11::module_& m);
void bind_parts(pybind11::module_& m);  // of a call; before what takes them
void bind_problem(pybind11::module_& m);
void bind_call(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_settings(pybind11::module_& m);
void bind_split(pybind11::module_& m);
void bind_watch(pybind11::module_& m);

}  // namespace pymeta
