// Between torch's layout of a parameter and the engine's.
#pragma once

#include "kernels.h"
#include "plan.h"

namespace fm {

// Walks over one example of a value in torch's order.
class TorchOrder {
 public:
  TorchOrder(const Value& value, i64 ld)
      : step_(value.channels ? ld : 1),
        length_(value.channels ? value.rows : value.cols),
        jump_(value.channels ? 1 : ld) {}
  i64 offset = 0;
  void next() {
    offset += step_;
    if (++at_ == length_) at_ = 0, offset = start_ += jump_;
  }

 private:
  i64 step_, length_, jump_, at_ = 0, start_ = 0;
};

// The user's dense tensor [examples, ...] -> a value of rows `ld` apart; padding becomes zero.
template <class S>
void load_value(const Value& value, const S* torch, i64 examples, S* engine, i64 ld) {
  const i64 numel = value.rows * value.cols;
  for (i64 i = 0; i < examples * value.rows * ld; ++i) engine[i] = 0;
  for (i64 n = 0; n < examples; ++n, torch += numel, engine += value.rows * ld) {
    TorchOrder at(value, ld);
    for (i64 i = 0; i < numel; ++i, at.next()) engine[at.offset] = torch[i];
  }
}

// torch += scale * value
template <class S>
void add_value(const Value& value, const S* engine, i64 ld, i64 examples, S scale, S* torch) {
  const i64 numel = value.rows * value.cols;
  for (i64 n = 0; n < examples; ++n, torch += numel, engine += value.rows * ld) {
    TorchOrder at(value, ld);
    for (i64 i = 0; i < numel; ++i, at.next()) torch[i] += scale * engine[at.offset];
  }
}

// W^T as the engine keeps it, of one tap of a convolution.
template <class S>
Matrix<S> engine_matrix(const Plan& plan, const Param& p, S* data, i64 tap = 0) {
  if (p.narrow) return Matrix<S>::plain(data, plan.padded(p.cols));
  const i64 rows = p.channels(), cols = plan.padded(p.rows);
  return Matrix<S>::panels(data + tap * rows * cols, rows, cols);
}

template <class S>
Matrix<S> mirror_matrix(const Plan& plan, const Param& p, S* data, i64 tap = 0) {
  const i64 cols = plan.padded(p.channels());
  return Matrix<S>::panels(data + tap * p.rows * cols, p.rows, cols);
}

// Calls body(torch element, engine element) for every element of a convolution's weight: torch has
// [O, C, taps].
template <class S, class T, class Body>
void for_each_weight(const Plan& plan, const Param& p, S* torch, T* engine, const Body& body) {
  const i64 channels = p.channels();
  for (i64 o = 0; o < p.rows; ++o)
    for (i64 tap = 0; tap < p.taps; ++tap) {
      i64 stride;
      T* column = engine_matrix(plan, p, engine, tap).column(o, stride);
      for (i64 c = 0; c < channels; ++c) body(torch[(o * channels + c) * p.taps + tap], column[c * stride]);
    }
}

// torch [rows, cols] -> engine; padding becomes zero.
template <class S>
void pack(const Kernels<S>& kernels, const Plan& plan, const Param& p, const S* torch, S* engine) {
  if (p.taps > 1) {
    for (i64 i = 0; i < p.size; ++i) engine[i] = 0;
    return for_each_weight(plan, p, torch, engine, [](S from, S& to) { to = from; });
  }
  if (p.matrix && !p.narrow) {
    kernels.transpose(
        {Matrix<const S>::plain(torch, p.cols), engine_matrix(plan, p, engine), p.rows, p.cols, true});
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
  if (p.taps > 1) return for_each_weight(plan, p, torch, engine, [](S& to, S from) { to = from; });
  if (p.matrix && !p.narrow) {
    kernels.transpose(
        {engine_matrix(plan, p, engine), Matrix<S>::plain(torch, p.cols), p.cols, p.rows, false});
    return;
  }
  const i64 rows = p.matrix ? p.rows : 1, ld = plan.padded(p.cols);
  for (i64 r = 0; r < rows; ++r)
    for (i64 c = 0; c < p.cols; ++c) torch[r * p.cols + c] = engine[r * ld + c];
}

// W^T in panels -> W in panels, for the input gradient; of a convolution tap by tap.
template <class S>
void make_mirror(const Kernels<S>& kernels, const Plan& plan, const Param& p, const S* engine, S* mirror) {
  for (i64 tap = 0; tap < p.taps; ++tap)
    kernels.transpose({engine_matrix(plan, p, engine, tap), mirror_matrix(plan, p, mirror, tap), p.channels(),
                       p.rows, true});
}

}  // namespace fm
