// A call on a device that is made again with other arrays: planned once, its operations noted down once.
#pragma once

#include "../cuda/device.h"
#include "planner.h"

namespace pymeta {

template <class Real>
class DevicePlan {
 public:
  // Of a call whose largest sizes are known; throws what plan_on() throws.
  DevicePlan(int ordinal, const Call<Real>& call);

  // Would a plan that is made now be the same? `call` is the one that it was made of, with other arrays.
  bool fits(int ordinal, const Call<Real>& call) const;
  std::size_t workspace_bytes() const { return plan_.workspace_bytes; }
  // As run_on().
  void run(std::uintptr_t stream, char* workspace, const Call<Real>& call);

 private:
  int ordinal_;
  BlockOptions options_;
  CallForm<Real> form_;
  BlockPlan plan_;
  KeptFrame frame_;
};

}  // namespace pymeta
