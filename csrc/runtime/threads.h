// A small pool of threads over independent indices.
//
// Lazy (no thread exists before the first call that wants one), rebuilt in the child after a fork, and shared by all
// callers: who finds it busy works alone, so that concurrent calls never wait for each other. A call wakes as many threads
// as it uses and no more. Calls that follow one another within kSpin, as in a training loop, find the threads still
// awake: waking one takes as long as a small call. Where the last call was longer ago they sleep at once.
#pragma once

#include <cstdint>

#include "interrupt.h"

namespace pymeta {

using IndexBody = void (*)(void* context, std::int64_t index, int worker);

// Runs body(context, index, worker) for every index in [0, count); the caller is worker 0, at most `threads` work.
// Which worker gets which index is left to chance. `body` must not throw. While the caller waits for the others it looks
// at `interrupt` (or null) now and then.
void parallel_for(int threads, std::int64_t count, IndexBody body, void* context,
                  Interrupt* interrupt = nullptr);

}  // namespace pymeta
