// Between torch's layout of a parameter and the engine's.
#pragma once

#include "kernels.h"
#include "plan.h"

namespace fm {

template <class S>
Matrix<S> engine_matrix(const Plan& plan, const Param& p, S* data) {
  return p.narrow ? Matrix<S>::plain(data, plan.padded(p.cols)) : Matrix<S>::panels(data, p.cols, plan.padded(p.rows));
}

// torch [rows, cols] -> engine; padding becomes zero.
template <class S>
void pack(const Kernels<S>& kernels, const Plan& plan, const Param& p, const S* torch, S* engine) {
  if (p.matrix && !p.narrow) {
    kernels.transpose({Matrix<const S>::plain(torch, p.cols), engine_matrix(plan, p, engine), p.rows, p.cols, true});
    return;
  }
  const i64 rows = p.matrix ? p.rows : 1, ld = plan.padded(p.cols);
  for (i64 r = 0; r < rows; ++r) {
    for (i64 c = 0; c < p.cols; ++c) engine[r * ld + c] = torch[r * p.cols + c];
    for (i64 c = p.cols; c < ld; ++c) engine[r * ld + c] = 0;
  }
}

template <class S>
void unpack(const Kernels<S>& kernels, const Plan& plan, const Param& p, const S* engine, S* torch) {
  if (p.matrix && !p.narrow) {
    kernels.transpose({engine_matrix(plan, p, engine), Matrix<S>::plain(torch, p.cols), p.cols, p.rows, false});
    return;
  }
  const i64 rows = p.matrix ? p.rows : 1, ld = plan.padded(p.cols);
  for (i64 r = 0; r < rows; ++r)
    for (i64 c = 0; c < p.cols; ++c) torch[r * p.cols + c] = engine[r * ld + c];
}

// W^T in panels -> W in panels, for the input gradient.
template <class S>
void make_mirror(const Kernels<S>& kernels, const Plan& plan, const Param& p, const S* engine, S* mirror) {
  kernels.transpose(
      {engine_matrix(plan, p, engine), Matrix<S>::panels(mirror, p.rows, plan.padded(p.cols)), p.cols, p.rows, true});
}

}  // namespace fm
