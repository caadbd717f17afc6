// The four walks over the layers, each by all threads of a block: what they hand on is there for every thread when they
// return.
#pragma once

#include "layers/add.h"
#include "layers/concat.h"
#include "layers/elementwise.h"
#include "layers/linear.h"
#include "layers/reshape.h"

namespace fm::cuda {

#define FM_BY_KIND(...)                               \
  if constexpr (LAYERS[L].kind == Kind::linear)       \
    linear::__VA_ARGS__;                              \
  else if constexpr (LAYERS[L].kind == Kind::add)     \
    add::__VA_ARGS__;                                 \
  else if constexpr (LAYERS[L].kind == Kind::concat)  \
    concat::__VA_ARGS__;                              \
  else if constexpr (LAYERS[L].kind == Kind::reshape) \
    reshape::__VA_ARGS__;                             \
  else                                                \
    elementwise::__VA_ARGS__

template <int L, bool INPUT>
constexpr bool goes_back() {
  for (int in : LAYERS[L].inputs)
    if (in >= 0 && (VALUES[in].from_params || INPUT)) return true;
  return false;
}

template <Space X>
FM_PASS void run_forward(Pass pass) {
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = decltype(index)::value;
    FM_BY_KIND(forward<L, X>(pass));
    barrier();
  });
}

// The parameters' gradients of a layer are taken together with the input gradient of the layer before it, which reads
// nothing that they write: so they may go to where this layer reads its weights. Between two barriers the threads take
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
    if constexpr (L + 1 < LAYER_COUNT && LAYERS[L + 1].kind == Kind::linear)
      if (sink.mode != Mode::none) turn = linear::backward_params<L + 1, X>(pass, sink, turn);
    if constexpr (goes_back<L, INPUT>() || TIED) turn = 0, barrier();
  });
  if constexpr (LAYERS[0].kind == Kind::linear)
    if (sink.mode != Mode::none) linear::backward_params<0, X>(pass, sink, turn);
  barrier();
  sink.take_tied();
}

// The parameters' gradients alone, from what an earlier backward pass has left.
template <Space X>
FM_PASS void run_gradients(Pass pass, Sink sink) {
  int turn = 0;
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = LAYER_COUNT - 1 - decltype(index)::value;
    if constexpr (LAYERS[L].kind == Kind::linear) turn = linear::backward_params<L, X>(pass, sink, turn);
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
FM_PASS void run_tangent_backward(Pass pass, Along along, Sink sink) {
  int turn = 0;
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = LAYER_COUNT - 1 - decltype(index)::value;
    if constexpr (goes_back<L, INPUT>()) {
      if constexpr (LAYERS[L].kind == Kind::linear)
        turn = linear::tangent_backward_input<L, X, INPUT>(pass, along);
      else
        FM_BY_KIND(tangent_backward_input<L, X, INPUT>(pass, along));
    }
    if constexpr (L + 1 < LAYER_COUNT && LAYERS[L + 1].kind == Kind::linear)
      turn = linear::tangent_backward_params<L + 1, X>(pass, sink, turn);
    if constexpr (goes_back<L, INPUT>() || TIED) turn = 0, barrier();
  });
  if constexpr (LAYERS[0].kind == Kind::linear) linear::tangent_backward_params<0, X>(pass, sink, turn);
  if constexpr (TIED) barrier();
  sink.take_tied();
}

}  // namespace fm::cuda
