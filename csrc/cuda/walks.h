// The four walks over the layers, each by all threads of a block: what they hand on is there for
// every thread when they return.
#pragma once

#include "layers/add.h"
#include "layers/batch_norm.h"
#include "layers/concat.h"
#include "layers/elementwise.h"
#include "layers/group_norm.h"
#include "layers/layer_norm.h"
#include "layers/linear.h"
#include "layers/reshape.h"

namespace fm::cuda {

// THEN: what to do with the result.
#define FM_BY_PARAM_KIND(THEN, ...)                      \
  if constexpr (LAYERS[L].kind == Kind::batch_norm)      \
    THEN batch_norm::__VA_ARGS__;                        \
  else if constexpr (LAYERS[L].kind == Kind::layer_norm) \
    THEN layer_norm::__VA_ARGS__;                        \
  else if constexpr (LAYERS[L].kind == Kind::group_norm) \
    THEN group_norm::__VA_ARGS__;                        \
  else                                                   \
    THEN linear::__VA_ARGS__

#define FM_BY_KIND(...)                                   \
  if constexpr (LAYERS[L].kind == Kind::add)              \
    add::__VA_ARGS__;                                     \
  else if constexpr (LAYERS[L].kind == Kind::concat)      \
    concat::__VA_ARGS__;                                  \
  else if constexpr (LAYERS[L].kind == Kind::reshape)     \
    reshape::__VA_ARGS__;                                 \
  else if constexpr (LAYERS[L].kind == Kind::elementwise) \
    elementwise::__VA_ARGS__;                             \
  else                                                    \
    FM_BY_PARAM_KIND(, __VA_ARGS__)

template <int L>
constexpr bool has_params() {
  return L < LAYER_COUNT && (LAYERS[L % LAYER_COUNT].weight >= 0 || LAYERS[L % LAYER_COUNT].bias >= 0);
}

// Whether layer L has anything to do in a backward pass before its parameters' gradients. A
// channel's are sums that its input's gradient needs too, and are made there.
template <int L, bool INPUT>
constexpr bool goes_back() {
  if (LAYERS[L].kind == Kind::batch_norm && has_params<L>()) return true;
  for (int in : LAYERS[L].inputs)
    if (in >= 0 && (VALUES[in].from_params || INPUT)) return true;
  return false;
}

template <int L, Space X>
FM_INLINE int params_back(const Pass& pass, const Sink& sink, int first) {
  FM_BY_PARAM_KIND(return, backward_params<L, X>(pass, sink, first));
}
template <int L, Space X>
FM_INLINE int tangent_params_back(const Pass& pass, const Sink& sink, int first) {
  FM_BY_PARAM_KIND(return, tangent_backward_params<L, X>(pass, sink, first));
}

template <Space X>
FM_PASS void run_forward(Pass pass) {
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = decltype(index)::value;
    FM_BY_KIND(forward<L, X>(pass));
    barrier();
  });
}

// The parameters' gradients of a layer are taken together with the input gradient of the layer
// before it, which reads
// nothing that they write: so they may go to where this layer reads its weights. Between two
// barriers the threads take
// turns: whoever has nothing to do in one product begins with the next.
template <Space X, bool INPUT>
FM_PASS void run_backward(Pass pass, Sink sink) {
  int turn = 0;
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = LAYER_COUNT - 1 - decltype(index)::value;
    if constexpr (goes_back<L, INPUT>()) {
      if constexpr (LAYERS[L].kind == Kind::linear)
        turn = linear::backward_input<L, X, INPUT>(pass);
      else
        FM_BY_KIND(backward_input<L, X, INPUT>(pass));
    }
    if constexpr (has_params<L + 1>())
      if (sink.mode != Mode::none) turn = params_back<L + 1, X>(pass, sink, turn);
    if constexpr (goes_back<L, INPUT>() || TIED) turn = 0, barrier();
  });
  if constexpr (has_params<0>())
    if (sink.mode != Mode::none) params_back<0, X>(pass, sink, turn);
  barrier();
  sink.take_tied();
}

// The gradients of rates alone, from what an earlier backward pass has left.
template <Space X>
FM_PASS void run_rates(Pass pass, Sink sink) {
  sink.mode = Mode::rates;  // the compiler leaves the others out
  int turn = 0;
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = LAYER_COUNT - 1 - decltype(index)::value;
    if constexpr (has_params<L>()) turn = params_back<L, X>(pass, sink, turn);
    if constexpr (TIED) barrier();
  });
  sink.take_tied();
}

template <Space X>
FM_PASS void run_tangent(Pass pass, Along along) {
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = decltype(index)::value;
    if constexpr (has_tangent<LAYERS[L].output>) {
      FM_BY_KIND(tangent<L, X>(pass, along));
      barrier();
    }
  });
}

template <Space X, bool INPUT>
FM_PASS void run_tangent_backward(Pass pass, Along along) {
  const Sink sink{along.args, along.workspace, Mode::lambda, along.k, along.t, false};
  int turn = 0;
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = LAYER_COUNT - 1 - decltype(index)::value;
    if constexpr (goes_back<L, INPUT>()) {
      if constexpr (LAYERS[L].kind == Kind::linear)
        turn = linear::tangent_backward_input<L, X, INPUT>(pass, along);
      else
        FM_BY_KIND(tangent_backward_input<L, X, INPUT>(pass, along));
    }
    if constexpr (has_params<L + 1>()) turn = tangent_params_back<L + 1, X>(pass, sink, turn);
    if constexpr (goes_back<L, INPUT>() || TIED) turn = 0, barrier();
  });
  if constexpr (has_params<0>()) tangent_params_back<0, X>(pass, sink, turn);
  if constexpr (TIED) barrier();
  sink.take_tied();
}

}  // namespace fm::cuda
