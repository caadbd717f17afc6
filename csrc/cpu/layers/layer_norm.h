// layer_norm: the last dimensions of each example normalised together: groups of consecutive rows.
#pragma once

#include "../families/norm.h"

namespace fm::layer_norm {

// The number of values of a group, and epsilon; weight and bias.
constexpr Rules RULES = Rules(1).sizes(1).epsilon().with_params(2);

// Rows of a group.
inline i64 height(const Plan& plan, const Layer& layer) {
  return i64(layer.constants[0]) / plan.values[layer.output].cols;
}

inline Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
  const Value& y = plan.values[layer.output];
  const i64 size = i64(layer.constants[0]);
  check_norm(plan, layer, size);
  require(size >= y.cols && size % y.cols == 0 && y.rows % (size / y.cols) == 0,
          "a layer norm's size does not fit");
  return {2 * examples * y.rows * y.cols / size, 2 * plan.padded(size)};
}

template <class S>
LayerNorm<S> arguments(const Pass<S>& pass, const Layer& layer) {
  const Plan& plan = pass.plan;
  const Value& y = plan.values[layer.output];
  const int in = layer.inputs[0];
  LayerNorm<S> n{};
  n.rows = height(plan, layer), n.groups = pass.rows(layer.output) / n.rows, n.cols = y.cols;
  n.eps = S(layer.constants[1]);
  n.x = pass.value(in), n.ld_x = pass.value_ld(in), n.ld = n.ld_out = y.ld, n.ld_rx = plan.values[in].ld;
  n.w = layer.params[0] < 0 ? nullptr : pass.theta.primary[layer.params[0]];
  n.b = layer.params[1] < 0 ? nullptr : pass.theta.primary[layer.params[1]];
  n.state = pass.state(layer);
  return n;
}

// Room for the gradients of weight and bias, where somebody wants them.
template <class S>
void collect(const Pass<S>& pass, const Layer& layer, const Sink<S>* sinks, LayerNorm<S>& n) {
  const i64 size = pass.plan.padded(n.rows * n.cols);
  S** const to[] = {&n.dw, &n.db};
  for (int i = 0; i < 2; ++i) {
    if (!sinks || layer.params[i] < 0 || !sinks[layer.params[i]].to) continue;
    *to[i] = pass.temporary + i * size;
    for (i64 c = 0; c < size; ++c) (*to[i])[c] = 0;
  }
}
template <class S>
void deliver(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks, const LayerNorm<S>& n) {
  const i64 size = pass.plan.padded(n.rows * n.cols);
  const S* const from[] = {n.dw, n.db};
  for (int i = 0; i < 2; ++i) {
    if (!from[i]) continue;
    Sink<S>& sink = sinks[layer.params[i]];
    pass.kernels.column_sums({1, size, from[i], size, sink.base(), sink.also(), sink.scale, sink.to});
    sink.written();
  }
}

template <class S>
LayerNorm<S> along(const Pass<S>& pass, const Layer& layer) {
  const int in = layer.inputs[0];
  LayerNorm<S> n = arguments(pass, layer);
  n.rx = pass.has_tangent(in) ? pass.tangent(in) : nullptr;
  n.vw = layer.params[0] < 0 ? nullptr : pass.v.primary[layer.params[0]];
  n.vb = layer.params[1] < 0 ? nullptr : pass.v.primary[layer.params[1]];
  return n;
}

struct Functions {
  template <class S>
  static void forward(const Pass<S>& pass, const Layer& layer) {
    LayerNorm<S> n = arguments(pass, layer);
    n.out = pass.output(layer.output);
    pass.kernels.layer_norm_forward(n);
  }

  template <class S>
  static void backward(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks) {
    const int in = layer.inputs[0];
    LayerNorm<S> n = arguments(pass, layer);
    n.dy = pass.delta(layer.output);
    n.out = pass.wants_delta(in) ? pass.delta(in) : nullptr;
    n.ld_out = pass.plan.values[in].ld, n.add = layer.adds[0];
    collect(pass, layer, sinks, n);
    pass.kernels.layer_norm_backward(n);
    deliver(pass, layer, sinks, n);
  }

  template <class S>
  static void tangent(const Pass<S>& pass, const Layer& layer) {
    LayerNorm<S> n = along(pass, layer);
    n.out = pass.tangent(layer.output);
    pass.kernels.layer_norm_tangent(n);
  }

  template <class S>
  static void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks) {
    const int in = layer.inputs[0];
    LayerNorm<S> n = along(pass, layer);
    n.dy = pass.delta(layer.output), n.rdy = pass.tangent_delta(layer.output);
    n.out = pass.wants_delta(in) ? pass.tangent_delta(in) : nullptr;
    n.ld_out = pass.plan.values[in].ld, n.add = layer.adds[0];
    collect(pass, layer, sinks, n);
    pass.kernels.layer_norm_tangent_backward(n);
    deliver(pass, layer, sinks, n);
  }
};

}  // namespace fm::layer_norm
