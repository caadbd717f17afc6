// conv2d: not written yet.
#pragma once

#include "../../engine/pass.h"

namespace fm::conv2d {

inline Needs needs(const Plan&, const Layer&, i64) {
  throw std::invalid_argument("layer program: conv2d is not supported");
}

template <class S>
void forward(const Pass<S>&, const Layer&) {}

template <class S>
void backward(const Pass<S>&, const Layer&, Sink<S>*) {}

template <class S>
void tangent(const Pass<S>&, const Layer&) {}

template <class S>
void tangent_backward(const Pass<S>&, const Layer&, Sink<S>*) {}

}  // namespace fm::conv2d
