// group_norm: each example normalised over groups of channels; instance norm is one channel a
// group.
#pragma once

#include "../channel_norm.h"

namespace fm::group_norm {

constexpr Rules RULES = Rules(1).sizes(1).epsilon().with_params(2);

inline channel_norm::Blocks blocks(const Plan& plan, const Layer& layer, i64 examples) {
  const Value& x = plan.values[layer.inputs[0]];
  return {examples, x.rows, x.cols / i64(layer.constants[0])};
}

inline Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require((layer.pool_h || x.rows == y.rows) && x.cols == y.cols, "a norm changes the shape");
  for (int p : layer.params)
    require(p < 0 || (!plan.params[p].matrix && plan.params[p].cols == y.cols),
            "a norm's parameter has another shape");
  const i64 groups = i64(layer.constants[0]);
  require(groups > 0 && y.cols % groups == 0, "a group norm's groups do not divide its channels");
  return {channel_norm::state_size(plan, layer, blocks(plan, layer, examples), examples),
          channel_norm::temporary_size(plan, layer)};
}

template <class S>
channel_norm::ChannelNorm<S> norm(const Pass<S>& pass, const Layer& layer) {
  return {pass, layer, blocks(pass.plan, layer, pass.geometry.examples), S(layer.constants[1])};
}

template <class S>
void forward(const Pass<S>& pass, const Layer& layer) {
  norm(pass, layer).forward();
}

template <class S>
void backward(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks) {
  norm(pass, layer).backward(sinks);
}

template <class S>
void tangent(const Pass<S>& pass, const Layer& layer) {
  norm(pass, layer).tangent();
}

template <class S>
void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks) {
  norm(pass, layer).tangent_backward(sinks);
}

}  // namespace fm::group_norm
