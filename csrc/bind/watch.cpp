// Whether Python objects are what they were: what pymeta/spec/watch.py asks before every call, in one pass.
//
// It holds no object between calls, so that Python's garbage collector sees all that is held.

#include "common.h"

namespace py = pybind11;

namespace pymeta {
namespace {

// The entries of a tuple, in groups of `size`.
class Groups {
 public:
  Groups(const py::tuple& all, Py_ssize_t size, const char* name) : all_(all), size_(size) {
    if (static_cast<Py_ssize_t>(all.size()) % size != 0)
      refuse(std::string(name) + ": expected a multiple of " + std::to_string(size) +
             " entries, got " + std::to_string(all.size()));
  }
  Py_ssize_t count() const { return static_cast<Py_ssize_t>(all_.size()) / size_; }
  PyObject* at(Py_ssize_t group, Py_ssize_t i) const {
    return PyTuple_GET_ITEM(all_.ptr(), group * size_ + i);
  }

 private:
  const py::tuple& all_;
  Py_ssize_t size_;
};

// Whether mapping[key] is what a dict has there: it is one, and nobody has given it another way of looking it up.
bool looks_up_as_a_dict(PyObject* mapping) {
  return PyDict_Check(mapping) &&
         Py_TYPE(mapping)->tp_as_mapping->mp_subscript == PyDict_Type.tp_as_mapping->mp_subscript;
}

// mapping[key], or nothing where it is not there.
py::object found(PyObject* mapping, PyObject* key) {
  PyObject* value = nullptr;
  if (looks_up_as_a_dict(mapping)) {
#if PY_VERSION_HEX >= 0x030D0000
    if (PyDict_GetItemRef(mapping, key, &value) < 0) throw py::error_already_set();
#else
    value = Py_XNewRef(PyDict_GetItemWithError(mapping, key));
    if (!value && PyErr_Occurred()) throw py::error_already_set();
#endif
  } else {
    value = PyObject_GetItem(mapping, key);
    if (!value) {
      if (!PyErr_ExceptionMatches(PyExc_LookupError)) throw py::error_already_set();
      PyErr_Clear();
    }
  }
  return py::reinterpret_steal<py::object>(value);
}

bool are_equal(PyObject* a, PyObject* b) {
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) throw py::error_already_set();
  return equal != 0;
}

bool unchanged(const py::tuple& places, const py::tuple& truths, const py::tuple& lengths,
               const py::tuple& types, const py::tuple& orders) {
  const Groups objects(places, 3, "places"), values(truths, 3, "truths");
  const Groups sizes(lengths, 2, "lengths"), classes(types, 2, "types"), keys(orders, 2, "orders");
  for (Py_ssize_t i = 0; i < objects.count(); ++i)
    if (found(objects.at(i, 0), objects.at(i, 1)).ptr() != objects.at(i, 2)) return false;
  for (Py_ssize_t i = 0; i < values.count(); ++i) {
    const py::object value = found(values.at(i, 0), values.at(i, 1));
    if (!value || is_true(value.ptr()) != is_true(values.at(i, 2))) return false;
  }
  for (Py_ssize_t i = 0; i < sizes.count(); ++i) {
    const Py_ssize_t size = PyObject_Size(sizes.at(i, 0));
    if (size < 0) throw py::error_already_set();
    if (!are_equal(checked(PyLong_FromSsize_t(size)).ptr(), sizes.at(i, 1))) return false;
  }
  for (Py_ssize_t i = 0; i < classes.count(); ++i)
    if (reinterpret_cast<PyObject*>(Py_TYPE(classes.at(i, 0))) != classes.at(i, 1)) return false;
  for (Py_ssize_t i = 0; i < keys.count(); ++i)
    if (!are_equal(checked(PySequence_List(keys.at(i, 0))).ptr(), keys.at(i, 1))) return false;
  return true;
}

// Whether an attribute of one of these objects is true.
bool any_true(const py::sequence& objects, const py::tuple& names) {
  const py::object all = checked(PySequence_Fast(objects.ptr(), "objects: expected a sequence"));
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(all.ptr()); ++i)
    for (const py::handle name : names) {
      // Held, since the attribute's code may change a list.
      const py::object object =
          py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(all.ptr(), i));
      if (is_true(checked(PyObject_GetAttr(object.ptr(), name.ptr())).ptr())) return true;
    }
  return false;
}

}  // namespace

void bind_watch(py::module_& m) {
  m.def("unchanged", &unchanged, py::arg("places"), py::arg("truths"), py::arg("lengths"),
        py::arg("types"), py::arg("orders"));
  m.def("any_true", &any_true, py::arg("objects"), py::arg("names"));
}

}  // namespace pymeta
