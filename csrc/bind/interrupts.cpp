// Signals during a call: Python runs their handlers in its main thread, while the call goes on or ends.

#include <atomic>

#include "../runtime/cell.h"
#include "../runtime/fork.h"
#include "../runtime/run.h"
#include "cell.h"
#include "common.h"

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

template <class AnyCall>
void run_with_signals(AnyCall& call) {
  if (std::this_thread::get_id() != main_thread.load()) {
    const ReleasedGil released;
    run(call);
    return;
  }
  bool finished;
  {
    ReleasedGil released;
    Interrupt interrupt(poll_signals, released.state());
    finished = run(call, &interrupt);
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
void run_interruptibly(Call<Real>& call) {
  run_with_signals(call);
}
template <class Real>
void run_interruptibly(CellStep<Real>& call) {
  run_with_signals(call);
}
template <class Real>
void run_interruptibly(CellBack<Real>& call) {
  run_with_signals(call);
}

template void run_interruptibly(Call<float>&);
template void run_interruptibly(Call<double>&);
template void run_interruptibly(CellStep<float>&);
template void run_interruptibly(CellStep<double>&);
template void run_interruptibly(CellBack<float>&);
template void run_interruptibly(CellBack<double>&);

}  // namespace pymeta
