// elementwise: y = f(x), where no other layer does it at its end. The kernels are in
// elementwise.inl, the functions in shared/functions.inl.
#pragma once

#include "../pass.h"

namespace fm::elementwise {

constexpr Rules RULES = Rules(1).numbers(0, 2).with_function();

// Shapes are equal, element by element.
inline Needs needs(const Plan& plan, const Layer& layer, i64) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require(x.rows == y.rows && x.cols == y.cols, "an element-wise layer changes the shape");
  return {};
}

template <class S>
Elementwise<S> arguments(const Pass<S>& pass, const Layer& layer, bool backward, S* out) {
  const Value& y = pass.plan.values[layer.output];
  const int in = layer.inputs[0];
  Elementwise<S> e{};
  e.function = layer.function;
  e.c0 = S(layer.constants[0]), e.c1 = S(layer.constants[1]);
  e.rows = pass.rows(layer.output), e.cols = y.cols, e.ld = y.ld, e.ld_x = pass.value_ld(in);
  e.accumulate = backward && layer.adds[0];
  e.x = pass.value(in), e.y = pass.output(layer.output);
  e.out = out;
  return e;
}

struct Functions {
  template <class S>
  static void forward(const Pass<S>& pass, const Layer& layer) {
    pass.kernels.elementwise_forward(arguments(pass, layer, false, pass.output(layer.output)));
  }

  template <class S>
  static void backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
    const int in = layer.inputs[0];
    if (!pass.wants_delta(in)) return;
    Elementwise<S> e = arguments(pass, layer, true, pass.delta(in));
    e.dy = pass.delta(layer.output);
    pass.kernels.elementwise_backward(e);
  }

  template <class S>
  static void tangent(const Pass<S>& pass, const Layer& layer) {
    Elementwise<S> e = arguments(pass, layer, false, pass.tangent(layer.output));
    e.rx = pass.tangent(layer.inputs[0]);
    pass.kernels.elementwise_tangent(e);
  }

  template <class S>
  static void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
    const int in = layer.inputs[0];
    if (!pass.wants_delta(in)) return;
    Elementwise<S> e = arguments(pass, layer, true, pass.tangent_delta(in));
    e.dy = pass.delta(layer.output);
    e.rdy = pass.tangent_delta(layer.output);
    e.rx = pass.has_tangent(in) ? pass.tangent(in) : nullptr;
    pass.kernels.elementwise_tangent_backward(e);
  }
};

}  // namespace fm::elementwise
