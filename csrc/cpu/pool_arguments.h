// What max_pool2d and avg_pool2d have in common: windows over images.
#pragma once

#include "pass.h"

namespace fm::pool {

template <class S>
Pool<S> arguments(const Plan& plan, const Layer& layer, i64 examples) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  const auto at = [&](int i) { return i64(layer.constants[i]); };
  Pool<S> p{};
  p.examples = examples, p.in_h = x.height, p.in_w = x.width, p.out_h = y.height, p.out_w = y.width;
  p.kh = at(0), p.kw = at(1), p.sh = at(2), p.sw = at(3), p.ph = at(4), p.pw = at(5);
  p.n = plan.padded(y.cols);
  return p;
}

// Every window touches the image: then none is empty, and none reads outside.
inline void check(const Plan& plan, const Layer& layer, bool adaptive) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require(x.channels && y.channels && x.rows == x.height * x.width && y.rows == y.height * y.width &&
              x.cols == y.cols,
          "a pool reads and writes images of as many channels");
  require(x.rows > 0 && y.rows > 0, "a pool of nothing");
  if (adaptive) return;
  const Pool<float> p = arguments<float>(plan, layer, 1);
  require(p.kh > 0 && p.kw > 0 && p.sh > 0 && p.sw > 0 && p.ph >= 0 && p.pw >= 0, "a pool's window is none");
  require(p.ph < p.kh && p.pw < p.kw && (p.out_h - 1) * p.sh < p.in_h + p.ph &&
              (p.out_w - 1) * p.sw < p.in_w + p.pw,
          "a pool's window lies in the padding");
}

}  // namespace fm::pool
