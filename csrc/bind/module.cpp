// The Python module pymeta._native; this folder is the only one that knows Python.

#include "../runtime/registry.h"
#include "cell.h"
#include "common.h"

namespace py = pybind11;

// Without a GIL (CPython 3.14t) the module is as safe as it is while it has let go of it: problems, networks and engines
// do not change once made, the settings are atomics, the tables are built once, the pool and the block cache have locks.
PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  using namespace pymeta;
  m.doc() = "pymeta's native core; use it through the pymeta package.";
  m.attr("__version__") = PYMETA_VERSION;
  if (const std::string reason = no_isa_reason(); !reason.empty()) throw py::import_error(reason);
  remember_main_thread();
  bind_network(m);
  bind_parts(m);
  bind_problem(m);
  bind_call(m);
  bind_engine(m);
  bind_cell(m);
  bind_settings(m);
  bind_split(m);
  bind_watch(m);
}
