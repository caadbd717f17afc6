// elementwise: y = f(x), where no epilogue has taken it.
#pragma once

#include "../pass.h"

namespace fm::cuda::elementwise {

template <int L>
struct Functions {
  static constexpr int IN = LAYERS[L].inputs[0], OUT = LAYERS[L].output;
  static constexpr bool PARAMS_IN_INPUT = false;

  // Calls body(offset in the input, offset in the output, f).
  template <class Body>
  static FM_INLINE void each(const Pass& pass, const Body& body) {
    constexpr Layer layer = LAYERS[L];
    const auto f = function_object<layer.function>(layer.c0, layer.c1);
    for_elements<OUT>(pass, [&](int at, int r, int c) { body(r * VALUES[IN].ld + c, at, f); });
  }

  template <Space X>
  static FM_INLINE void forward(const Pass& pass) {
    each(pass, [&](int from, int to, const auto& f) {
      own_value<OUT, X>(pass)[to] = f.value(value<IN, X>(pass)[from]);
    });
  }

  template <Space X, bool INPUT>
  static FM_INLINE int backward_input(const Pass& pass, int turn) {
    each(pass, [&](int in, int out, const auto& f) {
      S first, second;
      f.derivatives(value<IN, X>(pass)[in], value<OUT, X>(pass)[out], first, second);
      put_delta<IN, LAYERS[L].adds[0], LAYERS[L].last[0], X>(
          pass, in, one(chained<L>(delta<OUT, X>(pass)[out], first)));
    });
    return turn;
  }

  template <Space X, class Along>
  static FM_INLINE void tangent(const Pass& pass, const Along&) {
    each(pass, [&](int in, int out, const auto& f) {
      S first, second;
      f.derivatives(value<IN, X>(pass)[in], value<OUT, X>(pass)[out], first, second);
      cuda::tangent<OUT>(pass)[out] = chained<L>(cuda::tangent<IN>(pass)[in], first);
    });
  }

  template <Space X, bool INPUT, class Along>
  static FM_INLINE int tangent_backward_input(const Pass& pass, const Along&, int turn) {
    each(pass, [&](int in, int out, const auto& f) {
      S first, second;
      f.derivatives(value<IN, X>(pass)[in], value<OUT, X>(pass)[out], first, second);
      S g = chained<L>(tangent_delta<OUT>(pass)[out], first);
      if constexpr (has_tangent<IN> && !linear_pieces<L>())
        g += delta<OUT, X>(pass)[out] * second * cuda::tangent<IN>(pass)[in];
      put_tangent_delta<IN, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, in, one(g));
    });
    return turn;
  }
};

}  // namespace fm::cuda::elementwise
