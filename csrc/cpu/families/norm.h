// Norms by channel from their groups. A kind has a struct with
//
//   blocks(plan, layer, examples)   rows that are normalised together, and channels that are
//   epsilon(layer)                  what is added to the variance
//
// The formulas stand in channel_norm.h.
#pragma once

#include "channel_norm.h"

namespace fm {

// A norm keeps the shape; its parameters have `size` elements, one for each value that has its own.
inline void check_norm(const Plan& plan, const Layer& layer, i64 size) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require((layer.pool_h || x.rows == y.rows) && x.cols == y.cols, "a norm changes the shape");
  for (int p : layer.params)
    require(p < 0 || (!plan.params[p].matrix && plan.params[p].cols == size),
            "a norm's parameter has another shape");
}

template <class Groups>
struct NormByChannel {
  static Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
    const auto blocks = Groups::blocks(plan, layer, examples);
    return {channel_norm::state_size(plan, layer, blocks, examples),
            channel_norm::temporary_size(plan, layer)};
  }
  template <class S>
  static void forward(const Pass<S>& pass, const Layer& layer) {
    norm(pass, layer).forward();
  }
  template <class S>
  static void backward(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks) {
    norm(pass, layer).backward(sinks);
  }
  template <class S>
  static void tangent(const Pass<S>& pass, const Layer& layer) {
    norm(pass, layer).tangent();
  }
  template <class S>
  static void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks) {
    norm(pass, layer).tangent_backward(sinks);
  }

 private:
  template <class S>
  static channel_norm::ChannelNorm<S> norm(const Pass<S>& pass, const Layer& layer) {
    return {pass, layer, Groups::blocks(pass.plan, layer, pass.geometry.examples), S(Groups::epsilon(layer))};
  }
};

}  // namespace fm
