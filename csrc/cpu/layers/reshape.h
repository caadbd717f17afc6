// reshape: the same numbers in torch's order, in rows of another length, or between an image
// (channels-last inside) and rows. Linear, so its tangents are copies too.
#pragma once

#include "../layout.h"
#include "../pass.h"

namespace fm::reshape {

constexpr Rules RULES = Rules(1);

inline Needs needs(const Plan& plan, const Layer& layer, i64) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require(x.rows * x.cols == y.rows * y.cols, "a reshape changes the number of elements");
  return {};
}

template <class S>
void copy(const Pass<S>& pass, int from, const S* src, i64 ld_src, int to, S* dst, bool accumulate) {
  const Value &a = pass.plan.values[from], &b = pass.plan.values[to];
  for (i64 n = 0; n < pass.geometry.examples; ++n) {
    const S* x = src + n * a.rows * ld_src;
    S* y = dst + n * b.rows * b.ld;
    TorchOrder at_x(a, ld_src), at_y(b, b.ld);
    for (i64 i = 0; i < a.rows * a.cols; ++i, at_x.next(), at_y.next()) {
      S& out = y[at_y.offset];
      out = accumulate ? out + x[at_x.offset] : x[at_x.offset];
    }
    for (i64 r = 0; r < b.rows; ++r)
      for (i64 c = b.cols; c < b.ld; ++c) y[r * b.ld + c] = 0;
  }
}

template <class S>
void forward(const Pass<S>& pass, const Layer& layer) {
  const int in = layer.inputs[0], out = layer.output;
  copy(pass, in, pass.value(in), pass.value_ld(in), out, pass.output(out), false);
}

template <class S>
void backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
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
void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
  const int in = layer.inputs[0], out = layer.output;
  if (!pass.wants_delta(in)) return;
  copy<S>(pass, out, pass.tangent_delta(out), pass.plan.values[out].ld, in, pass.tangent_delta(in),
          layer.adds[0]);
}

}  // namespace fm::reshape
