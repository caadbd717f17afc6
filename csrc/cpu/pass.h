// One pass over the network for one task: where its buffers are.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "plan.h"
#include "rules.h"

namespace fm {

// A parameter set: for every parameter its padded tensor and, where it has one, its mirror.
template <class S>
struct ParamView {
  const S* const* primary = nullptr;
  const S* const* mirror = nullptr;
};

// A layer's products with its weights by a shorter way: x W^T = base + scale * gram * factor; see
// input_layer.h.
template <class S>
struct LowRank {
  int layer = -1;           // the layer's index; -1: none
  const S* base = nullptr;  // [rows, O]; null: the product with theta as it stands
  const S* gram = nullptr;  // [rows, rank], rows ld_gram apart
  i64 ld_gram = 0, rank = 0;
  const S* factor = nullptr;  // [rank, O]
  S scale = 1;
};

template <class S>
struct Pass {
  const Plan& plan;
  const Kernels<S>& kernels;
  const Geometry& geometry;
  S* temporary;              // Plan::temporary elements, for the layer that is running
  bool input_gradient;       // the gradient of value 0 is wanted
  const S* input = nullptr;  // value 0, rows input_ld apart
  i64 input_ld = 0;
  S *x = nullptr, *d = nullptr;    // blocks of values and of their gradients
  S *rx = nullptr, *rd = nullptr;  // and of the tangents of both
  ParamView<S> theta = {}, v = {};
  LowRank<S> low_rank = {}, tangent_low_rank = {};

  i64 rows(int value) const { return geometry.examples * plan.values[value].rows; }
  const S* value(int i) const { return i == 0 ? input : x + geometry.offset[i]; }
  i64 value_ld(int i) const { return i == 0 ? input_ld : plan.values[i].ld; }
  S* output(int i) const { return x + geometry.offset[i]; }
  S* delta(int i) const { return d + geometry.offset[i]; }
  S* tangent(int i) const { return rx + geometry.offset[i]; }
  S* tangent_delta(int i) const { return rd + geometry.offset[i]; }
  // What a layer keeps beside its values, and the tangent of that.
  S* state(const Layer& layer) const { return x + geometry.state[layer.index]; }
  S* tangent_state(const Layer& layer) const { return rx + geometry.state[layer.index]; }
  bool wants_delta(int i) const { return plan.values[i].from_params || input_gradient; }
  bool has_tangent(int i) const { return plan.values[i].from_params; }
};

// Where the gradient of one parameter goes: to = [to +] [from +] scale * gradient. Unwanted if `to`
// is null.
template <class S>
struct Sink {
  S* to = nullptr;
  const S* from = nullptr;
  bool add = false;
  S scale = 1;
  // What is added, and what else.
  const S* base() const { return add ? to : from; }
  const S* also() const { return add ? from : nullptr; }
  // Said by whoever has written: another layer with the same parameter (tied weights) then adds.
  void written() { add = true, from = nullptr; }
};

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("layer program: ") + what);
}

}  // namespace fm
