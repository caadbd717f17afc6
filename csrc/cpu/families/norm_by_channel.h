// Norms by channel from their groups. A kind has a struct with
//
//   blocks(plan, layer, examples)   how many blocks of rows there are, the rows of a block, and how
//                                   many channels form a group: a group of a block is normalised
//                                   together
//   epsilon(layer)                  what is added to the variance
//
// The formulas are in channel_norm.h.
#pragma once

#include "channel_norm.h"
#include "norm.h"

namespace fm {

template <class Groups>
struct NormByChannel {
  static Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
    check_norm(plan, layer, plan.values[layer.output].cols);
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
