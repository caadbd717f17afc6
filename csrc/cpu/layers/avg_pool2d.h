// avg_pool2d: the mean of every window, also of adaptive ones. Linear, so its tangents are means
// too.
#pragma once

#include "../pool_arguments.h"

namespace fm::avg_pool2d {

constexpr Rules RULES = Rules(1).sizes(0, 8).or_adaptive();

inline Needs needs(const Plan& plan, const Layer& layer, i64) {
  require(layer.adaptive || layer.given_constants == RULES.most_constants, "a pool has no window");
  pool::check(plan, layer, layer.adaptive);
  require(layer.constants[7] >= 0, "a pool's divisor is negative");
  return {};
}

template <class S>
Pool<S> arguments(const Pass<S>& pass, const Layer& layer) {
  Pool<S> p = pool::arguments<S>(pass.plan, layer, pass.geometry.examples);
  p.adaptive = layer.adaptive, p.count_padding = layer.constants[6] != 0, p.divisor = i64(layer.constants[7]);
  return p;
}

template <class S>
void gather(const Pass<S>& pass, const Layer& layer, const S* from, i64 ld_from, S* to) {
  Pool<S> p = arguments(pass, layer);
  p.from = from, p.ld_from = ld_from;
  p.to = to, p.ld_to = pass.plan.values[layer.output].ld;
  pass.kernels.avg_pool_gather(p);
}

template <class S>
void scatter(const Pass<S>& pass, const Layer& layer, const S* from, S* to) {
  const int in = layer.inputs[0];
  if (!pass.wants_delta(in)) return;
  Pool<S> p = arguments(pass, layer);
  p.from = from, p.ld_from = pass.plan.values[layer.output].ld;
  p.to = to, p.ld_to = pass.plan.values[in].ld, p.add = layer.adds[0];
  pass.kernels.avg_pool_scatter(p);
}

template <class S>
void forward(const Pass<S>& pass, const Layer& layer) {
  const int in = layer.inputs[0];
  gather<S>(pass, layer, pass.value(in), pass.value_ld(in), pass.output(layer.output));
}

template <class S>
void backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
  scatter<S>(pass, layer, pass.delta(layer.output), pass.delta(layer.inputs[0]));
}

template <class S>
void tangent(const Pass<S>& pass, const Layer& layer) {
  const int in = layer.inputs[0];
  gather<S>(pass, layer, pass.tangent(in), pass.plan.values[in].ld, pass.tangent(layer.output));
}

template <class S>
void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
  scatter<S>(pass, layer, pass.tangent_delta(layer.output), pass.tangent_delta(layer.inputs[0]));
}

}  // namespace fm::avg_pool2d
