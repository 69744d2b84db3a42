#include "run.h"

#include "memory.h"
#include "threads.h"

namespace pymeta {
namespace {

// Estimated cycles of calls that are over before anybody would miss an interrupt, were the estimate off by thirty.
constexpr double kShort = 1e6;

void run_on_threads(const Team& team, std::int64_t count, IndexBody body, void* context) {
  parallel_for(team.threads, count, body, context, static_cast<Interrupt*>(team.owner));
}

}  // namespace

template <class Real>
bool run(Call<Real>& call, Interrupt* interrupt) {
  std::optional<Plan<Real>> none;
  return run(call, none, interrupt);
}

template <class Real>
bool run(Call<Real>& call, std::optional<Plan<Real>>& kept, Interrupt* interrupt) {
  check(call);
  if (!kept || !kept->fits()) kept.emplace(call);
  Plan<Real>& plan = *kept;
  call.stop = interrupt && plan.needs().cost > kShort ? interrupt->stop() : nullptr;
  plan.order();
  const WorkingMemory memory(plan.needs().bytes(plan.threads()));
  plan.run(Team{plan.threads(), interrupt, run_on_threads}, memory.data());
  return !interrupt || !interrupt->was_requested();
}

template bool run(Call<float>&, Interrupt*);
template bool run(Call<double>&, Interrupt*);
template bool run(Call<float>&, std::optional<Plan<float>>&, Interrupt*);
template bool run(Call<double>&, std::optional<Plan<double>>&, Interrupt*);

}  // namespace pymeta
