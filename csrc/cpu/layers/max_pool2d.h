// max_pool2d: the largest value of every window. Where that stands is kept: at these positions the
// layer is linear. Gradients go to the first of equal values, and tangents come from there.
#pragma once

#include "../families/linear_map.h"
#include "../pool_arguments.h"

namespace fm::max_pool2d {

// Kernel, stride and padding, each of height and width.
constexpr Rules RULES = Rules(1).sizes(6);

inline Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
  pool::check(plan, layer, false);
  const Value& y = plan.values[layer.output];
  return {examples * y.rows * plan.padded(y.cols), 0};  // an int for every value
}

template <class S>
Pool<S> arguments(const Pass<S>& pass, const Layer& layer) {
  Pool<S> p = pool::arguments<S>(pass.plan, layer, pass.geometry.examples);
  p.positions = reinterpret_cast<int*>(pass.state(layer));
  return p;
}

struct AtPositions {
  template <class S>
  static void apply(const Pass<S>& pass, const Layer& layer, const S* const* x, const i64* ld_x, S* y) {
    Pool<S> p = arguments(pass, layer);
    p.from = x[0], p.ld_from = ld_x[0];
    p.to = y, p.ld_to = pass.plan.values[layer.output].ld;
    pass.kernels.max_pool_gather(p);
  }

  template <class S>
  static void transpose(const Pass<S>& pass, const Layer& layer, int, const S* dy, S* dx, bool add) {
    Pool<S> p = arguments(pass, layer);
    p.from = dy, p.ld_from = pass.plan.values[layer.output].ld;
    p.to = dx, p.ld_to = pass.plan.values[layer.inputs[0]].ld, p.add = add;
    pass.kernels.max_pool_scatter(p);
  }
};

struct Functions : LinearMap<AtPositions> {
  template <class S>
  static void forward(const Pass<S>& pass, const Layer& layer) {
    const int in = layer.inputs[0];
    Pool<S> p = arguments(pass, layer);
    p.from = pass.value(in), p.ld_from = pass.value_ld(in);
    p.to = pass.output(layer.output), p.ld_to = pass.plan.values[layer.output].ld;
    pass.kernels.max_pool_forward(p);
  }
};

}  // namespace fm::max_pool2d
