// Layer kinds that are linear in their input and linear in their weight: y = x W + b, where the
// product may be a convolution or the like. Each of the four functions is one or two products more
// than its formula says:
//
//   forward            y  = x W + b
//   backward           dx = dy W^T,             dW = x^T dy,              db = sum dy
//   tangent            ry = x V + rx W + vb
//   tangent_backward   rdx = rdy W^T + dy V^T,  R(dW) = x^T rdy + rx^T dy,  R(db) = sum rdy
//
// A kind has a struct with the three products, each of them a sum over one or two pairs of factors:
//
//   output(pass, layer, factors, bias, moving, y)     y = sum x w + bias; moving: of a tangent
//   input_gradient(pass, layer, pairs, dy, w, dx)     dx [+]= sum dy w^T
//   weight_gradient(pass, layer, factors, dy, sink)   sum x^T dy, to the weight's sink
#pragma once

#include "../pass.h"

namespace fm {

// What a layer reads: inputs, rows ld_x apart, and the weights that they are multiplied by.
template <class S>
struct Factors {
  int pairs;
  const S* x[2];
  i64 ld_x[2];
  const S* w[2];
};

template <class Products>
struct Bilinear {
  template <class S>
  static void forward(const Pass<S>& pass, const Layer& layer) {
    if (!pass.geometry.keeps(layer.output)) return;
    Factors<S> f = inputs(pass, layer, false);
    f.w[0] = pass.theta.primary[layer.weight()];
    Products::output(pass, layer, f, bias(layer, pass.theta), false, pass.output(layer.output));
  }

  template <class S>
  static void backward(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks) {
    if (!pass.geometry.keeps(layer.output)) return;
    const int in = layer.inputs[0];
    const S* dy[] = {pass.delta(layer.output)};
    if (sinks) param_gradients(pass, layer, inputs(pass, layer, false), dy, sinks);
    if (pass.wants_delta(in)) {
      const ParamView<S>* w[] = {&pass.theta};
      Products::template input_gradient<S>(pass, layer, 1, dy, w, pass.delta(in));
    }
  }

  template <class S>
  static void tangent(const Pass<S>& pass, const Layer& layer) {
    if (!pass.geometry.keeps(layer.output)) return;
    Factors<S> f = inputs(pass, layer, pass.has_tangent(layer.inputs[0]));
    f.w[0] = pass.v.primary[layer.weight()], f.w[1] = pass.theta.primary[layer.weight()];
    Products::output(pass, layer, f, bias(layer, pass.v), true, pass.tangent(layer.output));
  }

  template <class S>
  static void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks) {
    if (!pass.geometry.keeps(layer.output)) return;
    const int in = layer.inputs[0];
    const S* dy[] = {pass.tangent_delta(layer.output), pass.delta(layer.output)};
    // first, since the weight gradient may go to where v is read from
    if (pass.wants_delta(in)) {
      const ParamView<S>* w[] = {&pass.theta, &pass.v};
      Products::template input_gradient<S>(pass, layer, 2, dy, w, pass.tangent_delta(in));
    }
    param_gradients(pass, layer, inputs(pass, layer, pass.has_tangent(in)), dy, sinks);
  }

 private:
  // The input, and its tangent if it moves.
  template <class S>
  static Factors<S> inputs(const Pass<S>& pass, const Layer& layer, bool moves) {
    const int in = layer.inputs[0];
    Factors<S> f = {};
    f.pairs = moves ? 2 : 1;
    f.x[0] = pass.value(in), f.ld_x[0] = pass.value_ld(in);
    if (moves) f.x[1] = pass.tangent(in), f.ld_x[1] = pass.plan.values[in].ld;
    return f;
  }

  template <class S>
  static const S* bias(const Layer& layer, const ParamView<S>& set) {
    return layer.bias() >= 0 ? set.primary[layer.bias()] : nullptr;
  }

  // Of the weight, and of the bias the column sums of the first dy.
  template <class S>
  static void param_gradients(const Pass<S>& pass, const Layer& layer, const Factors<S>& f,
                              const S* const* dy, Sink<S>* sinks) {
    if (Sink<S>& weight = sinks[layer.weight()]; weight.to)
      Products::weight_gradient(pass, layer, f, dy, weight), weight.written();
    if (layer.bias() < 0) return;
    Sink<S>& bias = sinks[layer.bias()];
    if (!bias.to) return;
    const Value& y = pass.plan.values[layer.output];
    pass.kernels.column_sums({layer.bias_cancels ? 0 : pass.rows(layer.output), pass.plan.padded(y.cols),
                              dy[0], y.ld, bias.base(), bias.also(), bias.scale, bias.to});
    bias.written();
  }
};

// What every such layer asks of its parameters: a bias has one element for each of its outputs.
inline void check_bias(const Plan& plan, const Layer& layer) {
  if (layer.bias() < 0) return;
  const Param& b = plan.params[layer.bias()];
  require(!b.matrix && b.cols == plan.values[layer.output].cols, "a bias has another shape than its layer");
}

}  // namespace fm
