// What to do around a fork; nothing on a system that has none.
#pragma once

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace pymeta {

using ForkHook = void (*)();  // or null

inline int at_fork([[maybe_unused]] ForkHook before, [[maybe_unused]] ForkHook in_parent,
                   [[maybe_unused]] ForkHook in_child) {
#if defined(_WIN32)
  return 0;
#else
  return pthread_atfork(before, in_parent, in_child);
#endif
}

}  // namespace pymeta
