// batch_norm: every channel normalised over the task's own batch, or by running statistics if they
// are given.
#pragma once

#include "../channel_norm.h"

namespace fm::batch_norm {

constexpr Rules RULES = Rules(1).epsilon().with_params(2).with_buffers(2);

inline channel_norm::Blocks blocks(const Plan& plan, const Layer& layer, i64 examples) {
  return {1, examples * plan.values[layer.inputs[0]].rows, 1};
}

inline Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require((layer.pool_h || x.rows == y.rows) && x.cols == y.cols, "a norm changes the shape");
  for (int p : layer.params)
    require(p < 0 || (!plan.params[p].matrix && plan.params[p].cols == y.cols),
            "a norm's parameter has another shape");
  require((layer.params[2] < 0) == (layer.params[3] < 0), "running statistics are a mean and a variance");
  return {channel_norm::state_size(plan, layer, blocks(plan, layer, examples), examples),
          channel_norm::temporary_size(plan, layer)};
}

template <class S>
channel_norm::ChannelNorm<S> norm(const Pass<S>& pass, const Layer& layer) {
  return {pass, layer, blocks(pass.plan, layer, pass.geometry.examples), S(layer.constants[0])};
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

}  // namespace fm::batch_norm
