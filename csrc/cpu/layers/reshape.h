// reshape: the same numbers in rows of another length. Linear, so its tangents are copies too.
#pragma once

#include "../../engine/pass.h"

namespace fm::reshape {

template <class S>
void copy(const Pass<S>& pass, int from, const S* src, i64 ld_src, int to, S* dst, bool accumulate) {
  const Value &a = pass.plan.values[from], &b = pass.plan.values[to];
  const i64 numel = pass.rows(from) * a.cols;
  for (i64 i = 0; i < numel; ++i) {
    const S value = src[i / a.cols * ld_src + i % a.cols];
    S& out = dst[i / b.cols * b.ld + i % b.cols];
    out = accumulate ? out + value : value;
  }
  for (i64 r = 0; r < pass.rows(to); ++r)
    for (i64 c = b.cols; c < b.ld; ++c) dst[r * b.ld + c] = 0;
}

template <class S>
void forward(const Pass<S>& pass, const Layer& layer) {
  const int in = layer.inputs[0], out = layer.output;
  copy(pass, in, pass.value(in), pass.value_ld(in), out, pass.output(out), false);
}

template <class S>
void backward(const Pass<S>& pass, const Layer& layer) {
  const int in = layer.inputs[0], out = layer.output;
  if (!pass.wants_delta(in)) return;
  copy<S>(pass, out, pass.delta(out), pass.plan.values[out].ld, in, pass.delta(in), layer.adds[0]);
}

template <class S>
void tangent(const Pass<S>& pass, const Layer& layer) {
  const int in = layer.inputs[0], out = layer.output;
  copy<S>(pass, in, pass.tangent(in), pass.plan.values[in].ld, out, pass.tangent(out), false);
}

template <class S>
void tangent_backward(const Pass<S>& pass, const Layer& layer) {
  const int in = layer.inputs[0], out = layer.output;
  if (!pass.wants_delta(in)) return;
  copy<S>(pass, out, pass.tangent_delta(out), pass.plan.values[out].ld, in, pass.tangent_delta(in), layer.adds[0]);
}

}  // namespace fm::reshape
