// One task at a time, from and to arrays that the caller lends (buffers, such as numpy's).

#include "../runtime/engine.h"

#include "call.h"

namespace pymeta {
namespace {

// An array that the caller lends: C-contiguous, of a known item type.
class Lent {
 public:
  Lent(const char* name, const py::handle& array, bool writable) : name_(name) {
    const int flags = PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(array.ptr(), &view_, flags) == 0) return;
    PyErr_Clear();
    if (!PyObject_CheckBuffer(array.ptr()))
      throw py::type_error(std::string(name) + ": expected a numpy array, got " +
                           Py_TYPE(array.ptr())->tp_name);
    refuse(std::string(name) + ": expected a C-contiguous " + (writable ? "writable " : "") +
           "array");
  }
  ~Lent() { PyBuffer_Release(&view_); }
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;

  void* data() const { return view_.buf; }
  int dimensions() const { return view_.ndim; }
  Py_ssize_t size(int axis) const { return view_.shape[axis]; }

  // Are its items of one of these types of struct?
  bool is_of_type(const char* types) const {
    const char* format = view_.format ? view_.format : "B";
    if (*format == '=' || *format == '@' || *format == '<') ++format;
    return format[0] && !format[1] && std::string(types).find(*format) != std::string::npos;
  }
  void expect_type(const char* types, Py_ssize_t bytes, const char* expected) const {
    if (!is_of_type(types) || view_.itemsize != bytes)
      throw py::type_error(std::string(name_) + ": expected " + expected + ", got items of type '" +
                           (view_.format ? view_.format : "B") + "'");
    if (view_.len > 0 && reinterpret_cast<Address>(view_.buf) % static_cast<Address>(bytes) != 0)
      refuse(std::string(name_) + ": expected an aligned array");
  }
  // [rows, columns], or [rows] where `flat`; -1: any number of rows.
  void expect_shape(Py_ssize_t rows, Py_ssize_t columns, bool flat) const {
    const bool fits = (view_.ndim == 2 && view_.shape[1] == columns) || (view_.ndim == 1 && flat);
    if (fits && (rows < 0 || view_.shape[0] == rows)) return;
    const std::string row = rows < 0 ? "rows" : std::to_string(rows);
    std::string got;
    for (int i = 0; i < view_.ndim; ++i) got += (i ? ", " : "") + std::to_string(view_.shape[i]);
    refuse(std::string(name_) + ": expected shape " +
           (columns > 0 ? "[" + row + ", " + std::to_string(columns) + "]" : "") +
           (columns > 0 && flat ? " or " : "") + (flat ? "[" + row + "]" : "") + ", got [" + got +
           "]");
  }

 private:
  const char* name_;
  Py_buffer view_;
};

class EngineHolder {
 public:
  template <class Real>
  explicit EngineHolder(std::unique_ptr<Engine<Real>> engine) {
    std::get<std::unique_ptr<Engine<Real>>>(engines_) = std::move(engine);
  }

  void adapt_predict(const py::object& xs, const py::object& ys, const py::object& xq,
                     const py::object& out, const py::object& weights, const py::object& offset,
                     const py::object& query_offset) const {
    if (const auto& engine = std::get<0>(engines_))
      return run(*engine, xs, ys, xq, out, weights, offset, query_offset);
    run(*std::get<1>(engines_), xs, ys, xq, out, weights, offset, query_offset);
  }

 private:
  template <class Real>
  static void run(const Engine<Real>& engine, const py::object& xs, const py::object& ys,
                  const py::object& xq, const py::object& out, const py::object& weights,
                  const py::object& offset, const py::object& query_offset) {
    const char* const type = sizeof(Real) == 4 ? "f" : "d";
    const char* const expected = sizeof(Real) == 4 ? "float32" : "float64";
    const Lent x("xs", xs, false), y("ys", ys, false), q("xq", xq, false), o("out", out, true);
    for (const Lent* array : {&x, &q, &o}) array->expect_type(type, sizeof(Real), expected);
    x.expect_shape(-1, engine.in_features(), false);
    q.expect_shape(-1, engine.in_features(), false);
    const Py_ssize_t rows = x.size(0), query_rows = q.size(0);
    if (rows > (1 << 24)) refuse("xs: more than 2^24 rows");
    if (query_rows > (1 << 24)) refuse("xq: more than 2^24 rows");
    o.expect_shape(query_rows, engine.out_features(), false);
    const int outputs = engine.out_features(), columns = engine.target_columns();
    typename Engine<Real>::Beside beside;
    beside.has_distributions = engine.takes_labels() && y.dimensions() == 2 && y.is_of_type(type);
    if (beside.has_distributions) {
      y.expect_shape(rows, outputs, false);
    } else if (engine.takes_labels()) {
      y.expect_type("lq", 8, "class indices (int64)");
      y.expect_shape(rows, 0, true);
    } else {
      y.expect_type(type, sizeof(Real), expected);
      y.expect_shape(rows, columns, columns == 1);
    }
    std::optional<Lent> w;
    if (!weights.is_none()) {
      w.emplace("weights", weights, false);
      w->expect_type(type, sizeof(Real), expected);
      const bool by_element = w->dimensions() == 2 && !engine.takes_labels();
      w->expect_shape(rows, by_element ? columns : 0, !by_element);
      if (by_element) beside.weight_columns = columns;
    }
    std::optional<Lent> shifts[2];
    const auto lend = [&](int i, const char* name, const py::object& given, Py_ssize_t of_rows) {
      if (given.is_none()) return static_cast<const Real*>(nullptr);
      Lent& shift = shifts[i].emplace(name, given, false);
      shift.expect_type(type, sizeof(Real), expected);
      shift.expect_shape(of_rows, outputs, outputs == 1);
      return static_cast<const Real*>(shift.data());
    };
    beside.offset = lend(0, "offset", offset, rows);
    beside.query_offset = lend(1, "query_offset", query_offset, query_rows);
    const ReleasedGil released;
    engine.adapt_predict(static_cast<const Real*>(x.data()), y.data(),
                         w ? static_cast<const Real*>(w->data()) : nullptr, static_cast<int>(rows),
                         static_cast<const Real*>(q.data()), static_cast<int>(query_rows),
                         static_cast<Real*>(o.data()), beside);
  }

  std::tuple<std::unique_ptr<Engine<float>>, std::unique_ptr<Engine<double>>> engines_;
};

std::unique_ptr<EngineHolder> make_engine(const Problem& problem, int dtype,
                                          const std::vector<Address>& start, const Rates& rates,
                                          const Schedule& schedule) {
  std::unique_ptr<EngineHolder> made;
  with_real(dtype, [&](auto real) {
    using Real = decltype(real);
    std::vector<Real*> tensors;
    problem.put_pointers(start, "start", tensors);
    Call<Real> call = problem.describe<Real>(
        tensors.data(),
        {pointer<Real>(rates.values), rates.rows, rates.columns, false, nullptr, false});
    call.tasks = 1;
    call.job = Job::adapt;
    put_schedule(schedule, call);
    made = std::make_unique<EngineHolder>(std::make_unique<Engine<Real>>(call));
  });
  return made;
}

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<EngineHolder>(m, "Engine")
      .def(py::init(&make_engine), py::arg("problem"), py::arg("dtype"), py::arg("start"),
           py::arg("rates"), py::arg("schedule"))
      .def("adapt_predict", &EngineHolder::adapt_predict, py::arg("xs"), py::arg("ys"),
           py::arg("xq"), py::arg("out"), py::arg("weights") = py::none(),
           py::arg("offset") = py::none(), py::arg("query_offset") = py::none());
}

}  // namespace pymeta
