// A small pool of threads over independent indices.
//
// Lazy (no thread exists before the first call that wants one), rebuilt in the child after a fork, and shared by all
// callers: who finds it busy works alone, so that concurrent calls never wait for each other. A worker spins for a
// fifth of a millisecond after its last job before it sleeps: the next call of a training loop comes sooner than that,
// and waking a sleeper takes as long as a small call.
#pragma once

#include <cstdint>

namespace pymeta {

using IndexBody = void (*)(void* context, std::int64_t index, int worker);

// Runs body(context, index, worker) for every index in [0, count); the caller is worker 0, at most `threads` work.
// Which worker gets which index is left to chance. `body` must not throw.
void parallel_for(int threads, std::int64_t count, IndexBody body, void* context);

// Cores that this process may run on.
int available_cores();

}  // namespace pymeta
