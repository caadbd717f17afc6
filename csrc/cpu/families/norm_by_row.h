// Norms of groups of consecutive rows, where every value of a group has its own weight and bias. The
// constants of a layer are the number of values of a group, a multiple of the columns, and what is
// added to the mean square. CENTRED: the mean of a group is taken away first. The kernels, with
// their formulas: layers/layer_norm.inl.
#pragma once

#include "norm.h"

namespace fm {

template <bool CENTRED>
struct NormByRow {
  static Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
    const Value& y = plan.values[layer.output];
    const i64 size = size_of(layer);
    check_norm(plan, layer, size);
    require(size >= y.cols && size % y.cols == 0 && y.rows % (size / y.cols) == 0,
            "a norm's size does not fit");
    return {2 * examples * y.rows * y.cols / size, 2 * plan.padded(size)};
  }

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

 private:
  static i64 size_of(const Layer& layer) { return i64(layer.constants[0]); }

  template <class S>
  static LayerNorm<S> arguments(const Pass<S>& pass, const Layer& layer) {
    const Plan& plan = pass.plan;
    const Value& y = plan.values[layer.output];
    const int in = layer.inputs[0];
    LayerNorm<S> n{};
    n.rows = size_of(layer) / y.cols, n.groups = pass.rows(layer.output) / n.rows, n.cols = y.cols;
    n.centred = CENTRED, n.eps = S(layer.constants[1]);
    n.x = pass.value(in), n.ld_x = pass.value_ld(in), n.ld = n.ld_out = y.ld, n.ld_rx = plan.values[in].ld;
    n.w = of(layer.params[0], pass.theta), n.b = of(layer.params[1], pass.theta);
    n.state = pass.state(layer);
    return n;
  }

  // The same with the tangents of what the layer reads.
  template <class S>
  static LayerNorm<S> along(const Pass<S>& pass, const Layer& layer) {
    const int in = layer.inputs[0];
    LayerNorm<S> n = arguments(pass, layer);
    n.rx = pass.has_tangent(in) ? pass.tangent(in) : nullptr;
    n.vw = of(layer.params[0], pass.v), n.vb = of(layer.params[1], pass.v);
    return n;
  }

  template <class S>
  static const S* of(int param, const ParamView<S>& set) {
    return param < 0 ? nullptr : set.primary[param];
  }

  // Room for the gradients of weight and bias, where somebody wants them.
  template <class S>
  static void collect(const Pass<S>& pass, const Layer& layer, const Sink<S>* sinks, LayerNorm<S>& n) {
    const i64 size = pass.plan.padded(n.rows * n.cols);
    S** const to[] = {&n.dw, &n.db};
    for (int i = 0; i < 2; ++i) {
      if (!sinks || layer.params[i] < 0 || !sinks[layer.params[i]].to) continue;
      *to[i] = pass.temporary + i * size;
      for (i64 c = 0; c < size; ++c) (*to[i])[c] = 0;
    }
  }
  template <class S>
  static void deliver(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks, const LayerNorm<S>& n) {
    const i64 size = pass.plan.padded(n.rows * n.cols);
    const S* const from[] = {n.dw, n.db};
    for (int i = 0; i < 2; ++i) {
      if (!from[i]) continue;
      Sink<S>& sink = sinks[layer.params[i]];
      pass.kernels.column_sums({1, size, from[i], size, sink.base(), sink.also(), sink.scale, sink.to});
      sink.written();
    }
  }
};

}  // namespace fm
