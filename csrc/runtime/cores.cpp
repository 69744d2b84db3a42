#include "cores.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>
#include <vector>

namespace pymeta {
namespace {

// Cores that a group may use, by its files; 0: any number.
double quota_of_group(const std::string& folder, bool version2) {
  double quota = 0, period = 0;
  if (version2) {  // cpu.max: "150000 100000", or "max 100000"
    std::ifstream file(folder + "/cpu.max");
    if (!(file >> quota >> period)) return 0;
  } else {
    std::ifstream quota_file(folder + "/cpu.cfs_quota_us"),
        period_file(folder + "/cpu.cfs_period_us");
    if (!(quota_file >> quota) || !(period_file >> period)) return 0;
  }
  return quota > 0 && period > 0 ? quota / period : 0;  // version 1 says -1 for any number
}

bool has_item(const std::string& list, const std::string& item) {
  std::istringstream items(list);
  for (std::string one; std::getline(items, one, ',');)
    if (one == item) return true;
  return false;
}

struct Mount {
  std::string root, point;
  bool version2;
};

// The mounts of control groups that limit the CPU, from /proc/self/mountinfo:
//   36 35 0:31 ROOT POINT options [tags...] - TYPE source SUPER_OPTIONS
std::vector<Mount> group_mounts(const std::string& root) {
  std::vector<Mount> found;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string skipped, mount_root, point, word, type, source, options;
    words >> skipped >> skipped >> skipped >> mount_root >> point;
    while (words >> word && word != "-") {
    }
    words >> type >> source >> options;
    if (type == "cgroup2" || (type == "cgroup" && has_item(options, "cpu")))
      found.push_back({mount_root, point, type == "cgroup2"});
  }
  return found;
}

// This process's group in a hierarchy, from /proc/self/cgroup: "0::/path" in version 2, "4:cpu,cpuacct:/path" in version 1.
std::string own_group(const std::string& root, bool version2) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (version2 ? controllers.empty() : has_item(controllers, "cpu"))
      return line.substr(second + 1);
  }
  return "/";
}

int affinity() {
#if defined(__linux__)
  for (int most = 1024; most <= (1 << 20); most *= 4) {
    cpu_set_t* set = CPU_ALLOC(most);
    if (!set) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(most);
    const int count = sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (count > 0) return count;
  }
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

int cpu_quota(const std::string& root) {
  double least = 0;
  for (const Mount& mount : group_mounts(root)) {
    std::string group = own_group(root, mount.version2);
    // A container sees its own group as the mount's root.
    if (mount.root != "/" && group.compare(0, mount.root.size(), mount.root) == 0)
      group = group.substr(mount.root.size());
    for (;;) {
      const double quota =
          quota_of_group(root + mount.point + (group == "/" ? "" : group), mount.version2);
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
      const std::size_t slash = group.rfind('/');
      if (slash == std::string::npos) break;
      group.resize(slash);
    }
  }
  return static_cast<int>(std::ceil(least - 1e-9));
}

int available_cores() {
  static const int quota = cpu_quota("");
  const int cores = std::max(affinity(), 1);
  return quota > 0 ? std::min(quota, cores) : cores;
}

}  // namespace pymeta
