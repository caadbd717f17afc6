// Layer kinds that are linear in their inputs: y = sum over inputs j of F_j x_j. Their tangents are
// themselves, and the gradients of their inputs are dx_j = F_j^T dy, for the tangents as for the
// values. A kind has a struct with
//
//   apply(pass, layer, x, ld_x, y)            y = F x. x[j] is null where an input counts as zero;
//                                             rows of x[j] are ld_x[j] apart.
//   transpose(pass, layer, j, dy, dx, add)    dx = F_j^T dy, or with `add` dx += F_j^T dy
//
// and leaves zeros in padding columns, as all layers do.
#pragma once

#include "../pass.h"

namespace fm {

template <class Map>
struct LinearMap {
  template <class S>
  static void forward(const Pass<S>& pass, const Layer& layer) {
    const S* x[2] = {};
    i64 ld[2] = {};
    for (int j = 0; j < 2; ++j)
      if (const int in = layer.inputs[j]; in >= 0) x[j] = pass.value(in), ld[j] = pass.value_ld(in);
    Map::template apply<S>(pass, layer, x, ld, pass.output(layer.output));
  }

  template <class S>
  static void backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
    spread<S>(pass, layer, pass.delta(layer.output), pass.d);
  }

  template <class S>
  static void tangent(const Pass<S>& pass, const Layer& layer) {
    const S* x[2] = {};
    i64 ld[2] = {};
    for (int j = 0; j < 2; ++j)
      if (const int in = layer.inputs[j]; in >= 0) {
        x[j] = pass.has_tangent(in) ? pass.tangent(in) : nullptr;
        ld[j] = pass.plan.values[in].ld;
      }
    Map::template apply<S>(pass, layer, x, ld, pass.tangent(layer.output));
  }

  template <class S>
  static void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
    spread<S>(pass, layer, pass.tangent_delta(layer.output), pass.rd);
  }

 private:
  // The gradient of the output to those of the inputs, which lie in `block`.
  template <class S>
  static void spread(const Pass<S>& pass, const Layer& layer, const S* dy, S* block) {
    for (int j = 0; j < 2; ++j) {
      const int in = layer.inputs[j];
      if (in < 0 || !pass.wants_delta(in)) continue;
      Map::template transpose<S>(pass, layer, j, dy, block + pass.geometry.offset[in], layer.adds[j]);
    }
  }
};

}  // namespace fm
