// One pass over the network for one task: where its buffers are, and the walk over the layers.
//
// Every layer kind is four functions: forward, backward, tangent (of forward) and tangent_backward. They live in
// csrc/cpu/layers/<kind>.h; the walks below are all that knows the kinds.
#pragma once

#include "kernels.h"
#include "plan.h"

namespace fm {

// A parameter set: for every parameter its padded tensor and, where it has one, its mirror.
template <class S>
struct ParamView {
  const S* const* primary = nullptr;
  const S* const* mirror = nullptr;
};

template <class S>
struct Pass {
  const Plan& plan;
  const Kernels<S>& kernels;
  const Geometry& geometry;
  const S* ones;
  bool input_gradient;       // the gradient of value 0 is wanted
  const S* input = nullptr;  // value 0, rows input_ld apart
  i64 input_ld = 0;
  S *x = nullptr, *d = nullptr;    // blocks of values and of their gradients
  S *rx = nullptr, *rd = nullptr;  // and of the tangents of both
  ParamView<S> theta = {}, v = {};

  i64 rows(int value) const { return geometry.examples * plan.values[value].rows; }
  const S* value(int i) const { return i == 0 ? input : x + geometry.offset[i]; }
  i64 value_ld(int i) const { return i == 0 ? input_ld : plan.values[i].ld; }
  S* output(int i) const { return x + geometry.offset[i]; }
  S* delta(int i) const { return d + geometry.offset[i]; }
  S* tangent(int i) const { return rx + geometry.offset[i]; }
  S* tangent_delta(int i) const { return rd + geometry.offset[i]; }
  bool wants_delta(int i) const { return plan.values[i].from_params || input_gradient; }
  bool has_tangent(int i) const { return plan.values[i].from_params; }
};

// Where the gradient of one parameter goes: to = [to +] [from +] scale * gradient. Unwanted if `to` is null.
template <class S>
struct Sink {
  S* to = nullptr;
  const S* from = nullptr;
  bool add = false;
  S scale = 1;
  // Said by whoever has written: another layer with the same parameter (tied weights) then adds.
  void written() { add = true, from = nullptr; }
};

}  // namespace fm

#include "../cpu/layers/add.h"
#include "../cpu/layers/elementwise.h"
#include "../cpu/layers/linear.h"
#include "../cpu/layers/reshape.h"

namespace fm {

template <class S>
void forward(const Pass<S>& pass) {
  for (const Layer& layer : pass.plan.layers) switch (layer.kind) {
      case Kind::linear:
        linear::forward(pass, layer);
        break;
      case Kind::elementwise:
        elementwise::forward(pass, layer);
        break;
      case Kind::reshape:
        reshape::forward(pass, layer);
        break;
      case Kind::add:
        add::forward(pass, layer);
        break;
    }
}

// From the gradient of the output to those of all values, and of the parameters if `sinks` are given, one for each.
template <class S>
void backward(const Pass<S>& pass, Sink<S>* sinks) {
  const auto& layers = pass.plan.layers;
  for (auto layer = layers.rbegin(); layer != layers.rend(); ++layer) switch (layer->kind) {
      case Kind::linear:
        linear::backward(pass, *layer, sinks);
        break;
      case Kind::elementwise:
        elementwise::backward(pass, *layer);
        break;
      case Kind::reshape:
        reshape::backward(pass, *layer);
        break;
      case Kind::add:
        add::backward(pass, *layer);
        break;
    }
}

// Tangents of all values along v; the input has none.
template <class S>
void tangent(const Pass<S>& pass) {
  for (const Layer& layer : pass.plan.layers) {
    if (!pass.has_tangent(layer.output)) continue;
    switch (layer.kind) {
      case Kind::linear:
        linear::tangent(pass, layer);
        break;
      case Kind::elementwise:
        elementwise::tangent(pass, layer);
        break;
      case Kind::reshape:
        reshape::tangent(pass, layer);
        break;
      case Kind::add:
        add::tangent(pass, layer);
        break;
    }
  }
}

// From the tangent of the output's gradient to those of all values, and of the parameters.
template <class S>
void tangent_backward(const Pass<S>& pass, Sink<S>* sinks) {
  const auto& layers = pass.plan.layers;
  for (auto layer = layers.rbegin(); layer != layers.rend(); ++layer) switch (layer->kind) {
      case Kind::linear:
        linear::tangent_backward(pass, *layer, sinks);
        break;
      case Kind::elementwise:
        elementwise::tangent_backward(pass, *layer);
        break;
      case Kind::reshape:
        reshape::tangent_backward(pass, *layer);
        break;
      case Kind::add:
        add::tangent_backward(pass, *layer);
        break;
    }
}

}  // namespace fm
