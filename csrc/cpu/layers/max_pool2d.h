// max_pool2d: the largest value of every window. Gradients go to the first of equal ones, and
// tangents come from there.
#pragma once

#include "../pool_arguments.h"

namespace fm::max_pool2d {

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

template <class S>
void forward(const Pass<S>& pass, const Layer& layer) {
  const int in = layer.inputs[0];
  Pool<S> p = arguments(pass, layer);
  p.from = pass.value(in), p.ld_from = pass.value_ld(in);
  p.to = pass.output(layer.output), p.ld_to = pass.plan.values[layer.output].ld;
  pass.kernels.max_pool_forward(p);
}

template <class S>
void scatter(const Pass<S>& pass, const Layer& layer, const S* from, S* to) {
  const int in = layer.inputs[0];
  if (!pass.wants_delta(in)) return;
  Pool<S> p = arguments(pass, layer);
  p.from = from, p.ld_from = pass.plan.values[layer.output].ld;
  p.to = to, p.ld_to = pass.plan.values[in].ld, p.add = layer.adds[0];
  pass.kernels.max_pool_scatter(p);
}

template <class S>
void backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
  scatter<S>(pass, layer, pass.delta(layer.output), pass.delta(layer.inputs[0]));
}

template <class S>
void tangent(const Pass<S>& pass, const Layer& layer) {
  const int in = layer.inputs[0];
  Pool<S> p = arguments(pass, layer);
  p.from = pass.tangent(in), p.ld_from = pass.plan.values[in].ld;
  p.to = pass.tangent(layer.output), p.ld_to = pass.plan.values[layer.output].ld;
  pass.kernels.max_pool_gather(p);
}

template <class S>
void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
  scatter<S>(pass, layer, pass.tangent_delta(layer.output), pass.tangent_delta(layer.inputs[0]));
}

}  // namespace fm::max_pool2d
