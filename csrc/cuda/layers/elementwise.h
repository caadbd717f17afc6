// elementwise: y = f(x), where no epilogue has taken it.
#pragma once

#include "../pass.h"

namespace fm::cuda::elementwise {

template <int L>
constexpr int IN = LAYERS[L].inputs[0];
template <int L>
constexpr int OUT = LAYERS[L].output;

// Calls body(offset in the input, offset in the output, f).
template <int L, class Body>
FM_INLINE void each(const Pass& pass, const Body& body) {
  constexpr Layer layer = LAYERS[L];
  const auto f = function_object<layer.function>(layer.c0, layer.c1);
  for_elements<OUT<L>>(pass, [&](int at, int r, int c) { body(r * VALUES[IN<L>].ld + c, at, f); });
}

template <int L, Space X>
FM_INLINE void forward(const Pass& pass) {
  each<L>(pass, [&](int from, int to, const auto& f) {
    own_value<OUT<L>, X>(pass)[to] = f.value(value<IN<L>, X>(pass)[from]);
  });
}

template <int L, Space X, bool INPUT>
FM_INLINE void backward_input(const Pass& pass) {
  each<L>(pass, [&](int in, int out, const auto& f) {
    S first, second;
    f.derivatives(value<IN<L>, X>(pass)[in], value<OUT<L>, X>(pass)[out], first, second);
    put_delta<IN<L>, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, in,
                                                              one(delta<OUT<L>, X>(pass)[out] * first));
  });
}

template <int L, Space X, class Along>
FM_INLINE void tangent(const Pass& pass, const Along&) {
  each<L>(pass, [&](int in, int out, const auto& f) {
    S first, second;
    f.derivatives(value<IN<L>, X>(pass)[in], value<OUT<L>, X>(pass)[out], first, second);
    cuda::tangent<OUT<L>>(pass)[out] = cuda::tangent<IN<L>>(pass)[in] * first;
  });
}

template <int L, Space X, bool INPUT, class Along>
FM_INLINE void tangent_backward_input(const Pass& pass, const Along&) {
  each<L>(pass, [&](int in, int out, const auto& f) {
    S first, second;
    f.derivatives(value<IN<L>, X>(pass)[in], value<OUT<L>, X>(pass)[out], first, second);
    S g = tangent_delta<OUT<L>>(pass)[out] * first;
    if constexpr (has_tangent<IN<L>> && !linear_pieces<L>())
      g += delta<OUT<L>, X>(pass)[out] * second * cuda::tangent<IN<L>>(pass)[in];
    put_tangent_delta<IN<L>, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, in, one(g));
  });
}

}  // namespace fm::cuda::elementwise
