// One buffer of arrays laid end to end, and arrays of the same sizes elsewhere: gradients on their way into `.grad`.

#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <vector>

#include "common.h"

namespace py = pybind11;

namespace pymeta {
namespace {

Address address_of(PyObject* number) {
  const unsigned long long address = PyLong_AsUnsignedLongLong(number);
  if (PyErr_Occurred()) throw py::error_already_set();
  return static_cast<Address>(address);
}

class Split {
 public:
  Split(int dtype, std::vector<std::int64_t> sizes) : dtype_(dtype), sizes_(std::move(sizes)) {
    with_real(dtype, [](auto) { return 0; });
    for (const std::int64_t size : sizes_) {
      if (size < 0 || size > kMost - total_)
        refuse("sizes: expected at least 0 and a sum of at most 2^60, got " + std::to_string(size));
      total_ += size;
    }
  }

  // To the `.grad` of tensors, one after the other, so that arrays which share memory get all that is added to them, in that
  // order. Returns these; None, and nothing was added, where alike(*grads) is not true.
  py::object add_to_grads(const py::sequence& leaves, const py::object& alike,
                          Address buffer) const {
    static PyObject* const grad = PyUnicode_InternFromString("grad");
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    py::list grads;
    for (const py::handle leaf : leaves) grads.append(checked(PyObject_GetAttr(leaf.ptr(), grad)));
    if (!is_true(checked(PyObject_Vectorcall(alike.ptr(), PySequence_Fast_ITEMS(grads.ptr()),
                                             grads.size(), nullptr))
                     .ptr()))
      return py::none();
    std::vector<Address> arrays;
    arrays.reserve(grads.size());
    for (const py::handle tensor : grads)
      arrays.push_back(
          address_of(checked(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr)).ptr()));
    for_each(arrays, buffer, [](auto* to, const auto* from, std::int64_t size) {
      for (std::int64_t i = 0; i < size; ++i) to[i] = to[i] + from[i];
    });
    return grads;
  }
  void copy_to(const std::vector<Address>& arrays, Address buffer) const {
    for_each(arrays, buffer, [](auto* to, const auto* from, std::int64_t size) {
      if (size > 0) std::memcpy(to, from, static_cast<std::size_t>(size) * sizeof *to);
    });
  }

 private:
  static constexpr std::int64_t kMost = std::int64_t{1} << 60;

  template <class Body>
  void for_each(const std::vector<Address>& arrays, Address buffer, Body body) const {
    if (arrays.size() != sizes_.size())
      refuse("arrays: expected " + std::to_string(sizes_.size()) + " addresses, got " +
             std::to_string(arrays.size()));
    constexpr std::int64_t many = 1 << 16;  // tens of microseconds
    std::optional<ReleasedGil> released;
    if (total_ >= many) released.emplace();
    with_real(dtype_, [&](auto real) {
      const auto* from = pointer<decltype(real)>(buffer);
      for (std::size_t i = 0; i < sizes_.size(); from += sizes_[i++])
        body(pointer<decltype(real)>(arrays[i]), from, sizes_[i]);
    });
  }

  int dtype_;
  std::vector<std::int64_t> sizes_;
  std::int64_t total_ = 0;
};

}  // namespace

void bind_split(py::module_& m) {
  py::class_<Split>(m, "Split")
      .def(py::init<int, std::vector<std::int64_t>>(), py::arg("dtype"), py::arg("sizes"))
      .def("add_to_grads", &Split::add_to_grads, py::arg("leaves"), py::arg("alike"),
           py::arg("buffer"))
      .def("copy_to", &Split::copy_to, py::arg("arrays"), py::arg("buffer"));
}

}  // namespace pymeta
