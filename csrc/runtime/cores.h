// How many cores this process may use: its affinity, and the CPU quota of its control groups.
#pragma once

#include <string>

namespace pymeta {

// At least 1. The affinity is that of the calling thread now; the quota is read once.
int available_cores();

// The CPU quota in cores, rounded up, of the control groups that the files below `root` describe ("" for this machine's):
// the least of this process's group and those around it, in version 1 or 2; 0 where there is none.
int cpu_quota(const std::string& root);

}  // namespace pymeta
