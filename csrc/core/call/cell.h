// The cell of a learned optimiser as plain data: an LSTM that takes a step on each of many coordinates by itself.
//
// Ravi, Larochelle 2017, "Optimization as a model for few-shot learning". H is the width of the LSTM, N the number of
// coordinates, those of all tasks one after another; x are the four numbers that are seen of a coordinate's
// gradient and its task's loss, log and sign of each (section 3.3):
//
//   enter, stay, new, leave = W [1, x, h_(k-1)]           sigmoids, but tanh of new
//   s_k = stay s_(k-1) + enter new,   h_k = leave tanh(s_k)
//   f_k, i_k = sigmoid(V [theta_(k-1), f_(k-1), i_(k-1), 1, h_k])
//   theta_k = f_k theta_(k-1) - i_k gradient_k
#pragma once

#include <cstdint>

#include "tasks.h"

namespace pymeta {

// Coordinates go panel by panel, rows of 512 bytes whatever the instruction set.
template <class Real>
constexpr std::int64_t kCellPanel = 512 / sizeof(Real);

// What the cell has of a panel's coordinates before a step, a row each; then h and s, H rows each.
enum CellRow : int { kSlope, kTheta, kForget, kInput, kOne, kSeen, kHidden = kSeen + 4 };

template <class Real>
struct Cell {
  int hidden = 0;                 // H
  std::int64_t coordinates = 0;   // N
  std::int64_t of_task = 1;       // coordinates of each task
  double p = 0;                   // numbers are small below exp(-p)
  const Real* weights = nullptr;  // W [4 H, 5 + H]
  const Real* gates = nullptr;    // V [2, 4 + H]
  const StopRequest* stop = nullptr;

  std::int64_t panels() const { return (coordinates + kCellPanel<Real> - 1) / kCellPanel<Real>; }
  // How many numbers the cell has of all coordinates between steps.
  std::int64_t state_size() const { return panels() * kCellPanel<Real> * (kHidden + 2 * hidden); }
  bool is_stopped() const { return StopRequest::is_made(stop); }
};

// One step of all coordinates.
template <class Real>
struct CellStep : Cell<Real> {
  const Real* gradients = nullptr;  // [N]
  const Real* losses = nullptr;     // [N / of_task]
  const Real* theta = nullptr;      // [N]
  Real* state = nullptr;            // state_size() numbers, zeros before the first step
  Real* out = nullptr;              // [N], may be theta
};

// The way back through all K steps, which are taken again: nothing of them was kept but gradients and losses, which are
// constants.
template <class Real>
struct CellBack : Cell<Real> {
  int steps = 0;                    // K
  const Real* gradients = nullptr;  // [K, N]
  const Real* losses = nullptr;     // [K, N / of_task]
  const Real* theta = nullptr;      // [N], before the first step
  const Real* flows = nullptr;      // [N], into theta after the last one
  Real* to_theta = nullptr;         // [N]
  Real* to_weights = nullptr;       // as weights
  Real* to_gates = nullptr;         // as gates
};

}  // namespace pymeta
