// add: the sum of two values of one shape, as in a residual connection.
#pragma once

#include "../pass.h"

namespace fm::add {

constexpr Rules RULES = Rules(2);

inline Needs needs(const Plan& plan, const Layer& layer, i64) {
  const Value& y = plan.values[layer.output];
  for (int in : layer.inputs)
    require(in >= 0 && plan.values[in].rows == y.rows && plan.values[in].cols == y.cols,
            "add reads values of different shapes");
  return {};
}

// out = a + b, row by row; either may be absent. Padding columns become zero.
template <class S>
void sum(const Pass<S>& pass, int value, const S* a, i64 ld_a, const S* b, i64 ld_b, S* out) {
  const Value& v = pass.plan.values[value];
  for (i64 r = 0; r < pass.rows(value); ++r) {
    for (i64 c = 0; c < v.cols; ++c)
      out[r * v.ld + c] = (a ? a[r * ld_a + c] : S(0)) + (b ? b[r * ld_b + c] : S(0));
    for (i64 c = v.cols; c < v.ld; ++c) out[r * v.ld + c] = 0;
  }
}

template <class S>
void forward(const Pass<S>& pass, const Layer& layer) {
  const int a = layer.inputs[0], b = layer.inputs[1], out = layer.output;
  sum(pass, out, pass.value(a), pass.value_ld(a), pass.value(b), pass.value_ld(b), pass.output(out));
}

// The gradient of each input is the output's: copied to the first to be written, added to the
// others.
template <class S>
void spread(const Pass<S>& pass, const Layer& layer, const S* dy, S* block) {
  const i64 ld = pass.plan.values[layer.output].ld;
  for (int j = 0; j < 2; ++j) {
    const int in = layer.inputs[j];
    if (!pass.wants_delta(in)) continue;
    S* dx = block + pass.geometry.offset[in];
    sum<S>(pass, in, dy, ld, layer.adds[j] ? dx : nullptr, ld, dx);
  }
}

template <class S>
void backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
  spread<S>(pass, layer, pass.delta(layer.output), pass.d);
}

template <class S>
void tangent(const Pass<S>& pass, const Layer& layer) {
  const int a = layer.inputs[0], b = layer.inputs[1], out = layer.output;
  const i64 ld = pass.plan.values[out].ld;
  sum<S>(pass, out, pass.has_tangent(a) ? pass.tangent(a) : nullptr, ld,
         pass.has_tangent(b) ? pass.tangent(b) : nullptr, ld, pass.tangent(out));
}

template <class S>
void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
  spread<S>(pass, layer, pass.tangent_delta(layer.output), pass.rd);
}

}  // namespace fm::add
