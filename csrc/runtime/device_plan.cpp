#include "device_plan.h"

namespace pymeta {

template <class Real>
DevicePlan<Real>::DevicePlan(int ordinal, const Call<Real>& call)
    : ordinal_(ordinal),
      options_(block_options()),
      form_(call, true),
      plan_(plan_on(ordinal, call)) {}

template <class Real>
bool DevicePlan<Real>::fits(int ordinal, const Call<Real>& call) const {
  return ordinal_ == ordinal && options_ == block_options() && form_ == CallForm<Real>(call, true);
}

template <class Real>
void DevicePlan<Real>::run(std::uintptr_t stream, char* workspace, const Call<Real>& call) {
  run_on(ordinal_, stream, workspace, plan_, call, frame_);
}

template class DevicePlan<float>;
template class DevicePlan<double>;

}  // namespace pymeta
