// The walks over a network's layers: all that knows the layer kinds.
//
// A layer kind is a file csrc/cpu/layers/<kind>.h: there are no other lists of them. In it are, in
// namespace fm::<kind>, its RULES, `needs`, which checks a layer and says what memory it wants, and
// its `Functions`: forward, backward, tangent (of forward) and tangent_backward. Where these follow
// from a formula they come from a family in csrc/cpu/families.
#pragma once

#include "layer_files.h"
#include "pass.h"

namespace fm {

// Throws std::invalid_argument for a layer that does not fit its values and parameters.
inline Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
#define FM_CASE(kind) \
  case Kind::kind:    \
    return kind::needs(plan, layer, examples);
  switch (layer.kind) { FM_LAYER_KINDS(FM_CASE) }
#undef FM_CASE
  throw std::invalid_argument("layer program: a layer kind that is none");
}

template <class S>
void forward(const Pass<S>& pass) {
#define FM_CASE(kind)                      \
  case Kind::kind:                         \
    kind::Functions::forward(pass, layer); \
    break;
  for (const Layer& layer : pass.plan.layers) switch (layer.kind) {
      FM_LAYER_KINDS(FM_CASE)
    }
#undef FM_CASE
}

// From the gradient of the output to those of all values, and of the parameters if `sinks` are
// given, one for each.
template <class S>
void backward(const Pass<S>& pass, Sink<S>* sinks) {
#define FM_CASE(kind)                               \
  case Kind::kind:                                  \
    kind::Functions::backward(pass, *layer, sinks); \
    break;
  const auto& layers = pass.plan.layers;
  for (auto layer = layers.rbegin(); layer != layers.rend(); ++layer) switch (layer->kind) {
      FM_LAYER_KINDS(FM_CASE)
    }
#undef FM_CASE
}

// Tangents of all values along v; the input has none.
template <class S>
void tangent(const Pass<S>& pass) {
#define FM_CASE(kind)                      \
  case Kind::kind:                         \
    kind::Functions::tangent(pass, layer); \
    break;
  for (const Layer& layer : pass.plan.layers) {
    if (!pass.has_tangent(layer.output)) continue;
    switch (layer.kind) { FM_LAYER_KINDS(FM_CASE) }
  }
#undef FM_CASE
}

// From the tangent of the output's gradient to those of all values, and of the parameters.
template <class S>
void tangent_backward(const Pass<S>& pass, Sink<S>* sinks) {
#define FM_CASE(kind)                                       \
  case Kind::kind:                                          \
    kind::Functions::tangent_backward(pass, *layer, sinks); \
    break;
  const auto& layers = pass.plan.layers;
  for (auto layer = layers.rbegin(); layer != layers.rend(); ++layer) switch (layer->kind) {
      FM_LAYER_KINDS(FM_CASE)
    }
#undef FM_CASE
}

}  // namespace fm
