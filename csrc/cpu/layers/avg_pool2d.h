// avg_pool2d: the mean of every window, also of adaptive ones.
#pragma once

#include "../families/linear_map.h"
#include "../pool_arguments.h"

namespace fm::avg_pool2d {

// Kernel, stride and padding, each of height and width; whether padding counts; the divisor, or 0.
constexpr Rules RULES = Rules(1).sizes(0, 8).or_adaptive();

inline Needs needs(const Plan& plan, const Layer& layer, i64) {
  require(layer.adaptive || layer.given_constants == RULES.most_constants, "a pool has no window");
  pool::check(plan, layer, layer.adaptive);
  return {};
}

struct Map {
  template <class S>
  static void apply(const Pass<S>& pass, const Layer& layer, const S* const* x, const i64* ld_x, S* y) {
    Pool<S> p = arguments(pass, layer);
    p.from = x[0], p.ld_from = ld_x[0];
    p.to = y, p.ld_to = pass.plan.values[layer.output].ld;
    pass.kernels.avg_pool_gather(p);
  }

  template <class S>
  static void transpose(const Pass<S>& pass, const Layer& layer, int, const S* dy, S* dx, bool add) {
    Pool<S> p = arguments(pass, layer);
    p.from = dy, p.ld_from = pass.plan.values[layer.output].ld;
    p.to = dx, p.ld_to = pass.plan.values[layer.inputs[0]].ld, p.add = add;
    pass.kernels.avg_pool_scatter(p);
  }

  template <class S>
  static Pool<S> arguments(const Pass<S>& pass, const Layer& layer) {
    Pool<S> p = pool::arguments<S>(pass.plan, layer, pass.geometry.examples);
    p.adaptive = layer.adaptive, p.count_padding = layer.constants[6] != 0;
    p.divisor = i64(layer.constants[7]);
    return p;
  }
};

using Functions = LinearMap<Map>;

}  // namespace fm::avg_pool2d
