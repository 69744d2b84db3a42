#include "cell.h"

#include <algorithm>

#include "memory.h"
#include "registry.h"
#include "threads.h"

namespace pymeta {
namespace {

// Coordinates that are over before a thread is awake.
constexpr std::int64_t kFew = 1024;

void run_on_threads(const Team& team, std::int64_t count, IndexBody body, void* context) {
  parallel_for(team.threads, count, body, context, static_cast<Interrupt*>(team.owner));
}

template <class CellCall, class Real>
bool run_on(const CellCalls<CellCall>& calls, CellCall& call, Interrupt* interrupt,
            const Cell<Real>& cell) {
  call.stop = interrupt ? interrupt->stop() : nullptr;
  const std::int64_t most = cell.coordinates < kFew ? 1 : cell.panels();
  const int threads = static_cast<int>(std::min<std::int64_t>(most, num_threads()));
  const WorkingMemory memory(calls.bytes(call, threads));
  calls.run(call, Team{threads, interrupt, run_on_threads}, memory.data());
  return !interrupt || !interrupt->was_requested();
}

}  // namespace

template <class Real>
bool run(CellStep<Real>& call, Interrupt* interrupt) {
  return run_on(cell_table<Real>().step, call, interrupt, call);
}
template <class Real>
bool run(CellBack<Real>& call, Interrupt* interrupt) {
  return run_on(cell_table<Real>().back, call, interrupt, call);
}

template bool run(CellStep<float>&, Interrupt*);
template bool run(CellStep<double>&, Interrupt*);
template bool run(CellBack<float>&, Interrupt*);
template bool run(CellBack<double>&, Interrupt*);

}  // namespace pymeta
