// Signals during a call: Python runs their handlers in its main thread, while the call goes on or ends.

#include <atomic>

#include "../runtime/cell.h"
#include "../runtime/fork.h"
#include "call.h"
#include "cell.h"

namespace py = pybind11;

namespace pymeta {
namespace {

// Only there is a call asked whether a signal has come.
std::atomic<std::thread::id> main_thread;

// Has a signal come whose handler raised an exception? For a call that has let go of the GIL.
bool poll_signals(void* thread_state) {
  auto& state = *static_cast<PyThreadState**>(thread_state);
  PyEval_RestoreThread(state);
  const bool raised = PyErr_CheckSignals() != 0;
  state = PyEval_SaveThread();
  return raised;
}

// body(interrupt or null): false where that ended it.
template <class Body>
void run_with_signals(Body body) {
  if (std::this_thread::get_id() != main_thread.load()) {
    const ReleasedGil released;
    body(nullptr);
    return;
  }
  bool finished;
  {
    ReleasedGil released;
    Interrupt interrupt(poll_signals, released.state());
    finished = body(&interrupt);
  }
  if (!finished) throw py::error_already_set();
}

}  // namespace

void remember_main_thread() {
  const py::object main = py::module_::import("threading").attr("main_thread")();
  const bool is_here = main.attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
  if (is_here) main_thread = std::this_thread::get_id();
  // The thread that forks is the child's main thread.
  static const int registered =
      at_fork(nullptr, nullptr, [] { main_thread = std::this_thread::get_id(); });
  (void)registered;
}

template <class Real>
void run_interruptibly(Call<Real>& call, std::optional<Plan<Real>>& kept) {
  run_with_signals([&](Interrupt* interrupt) { return run(call, kept, interrupt); });
}
template <class Real>
void run_interruptibly(CellStep<Real>& call) {
  run_with_signals([&](Interrupt* interrupt) { return run(call, interrupt); });
}
template <class Real>
void run_interruptibly(CellBack<Real>& call) {
  run_with_signals([&](Interrupt* interrupt) { return run(call, interrupt); });
}

template void run_interruptibly(Call<float>&, std::optional<Plan<float>>&);
template void run_interruptibly(Call<double>&, std::optional<Plan<double>>&);
template void run_interruptibly(CellStep<float>&);
template void run_interruptibly(CellStep<double>&);
template void run_interruptibly(CellBack<float>&);
template void run_interruptibly(CellBack<double>&);

}  // namespace pymeta
