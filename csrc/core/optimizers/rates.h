// The inner learning rates of a call.
#pragma once

#include "../call/tasks.h"

namespace pymeta {

// Products with a rate are done in whichever order is quickest, and near 1 it does not matter. A rate further away goes with
// numbers further away (steps converge where lr |H| is about 1), and H v may leave the range of a Real where H (lr v)
// does not: there the rate is multiplied by first, as torch does. For a squared error that begins near the cube root of
// the range's end; the bounds are the fourth root.
template <class Real>
PYMETA_MEMBER inline bool is_near_one(Real rate) {
  constexpr Real least = Real(sizeof(Real) == sizeof(float) ? 0x1p-32 : 0x1p-256);
  const Real size = rate < 0 ? -rate : rate;
  return size >= least && size <= 1 / least;
}

// Of every step, of the tensors that the inner loop changes. A call that is only laid out has no rates yet.
template <class Real>
PYMETA_MEMBER inline bool rates_are_near_one(const Call<Real>& call) {
  for (int row = 0; call.lr.values && row < call.lr.rows; ++row) {
    const Real* rates = call.lr.values + static_cast<long>(row) * call.lr.columns;
    for (int t = 0; t < call.network->tensor_count; ++t)
      if (call.adapted[t] && !is_near_one(rates[call.lr.groups[t]])) return false;
  }
  return true;
}

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

// Is every step theta - lr g, with one rate for all adapted tensors?
inline bool steps_scale_gradient(const Call<Real>& call) {
  if (!call.has_plain_steps() || call.lr.is_spread()) return false;
  int group = -1;
  for (int t = 0; t < call.network->tensor_count; ++t) {
    if (!call.adapted[t]) continue;
    if (group >= 0 && call.lr.groups[t] != group) return false;
    group = call.lr.groups[t];
  }
  return true;
}

class Rates {
 public:
  // `packed` is [lr.rows, parameters] in the executor's layout; only read where each element has a rate there.
  PYMETA_FN Rates(const Call<Real>& call, const Real* packed, std::size_t parameters)
      : lr_(call.lr), packed_(packed), parameters_(parameters) {
    int first = 0;
    while (first < call.network->tensor_count && !call.adapted[first]) ++first;
    const bool any = first < call.network->tensor_count;
    column_ = any && !lr_.is_spread() ? lr_.groups[first] : 0;
  }

  PYMETA_FN int row(int step) const { return step < lr_.rows ? step : lr_.rows - 1; }
  PYMETA_FN bool is_spread() const { return lr_.is_spread(); }
  PYMETA_FN int group(int tensor) const { return lr_.groups[tensor]; }
  // Where one rate serves all adapted tensors (steps_scale_gradient).
  PYMETA_FN Real uniform_rate(int step) const {
    return lr_.values[static_cast<long>(row(step)) * lr_.columns + column_];
  }
  PYMETA_FN Real rate(int step, int tensor) const {
    return lr_.values[static_cast<long>(row(step)) * lr_.columns + lr_.groups[tensor]];
  }
  // Of the scalars from `place` on, in the tensor's own array of rates; or one for all of them.
  PYMETA_FN const Real* elements(int step, std::size_t place) const {
    return is_spread() ? packed_ + row(step) * parameters_ + place : nullptr;
  }

 private:
  LearningRate<Real> lr_;
  const Real* packed_;
  std::size_t parameters_;
  int column_;
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
