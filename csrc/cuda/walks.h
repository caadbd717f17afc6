// The four walks over the layers, each by all threads of a block: what they hand on is there for
// every thread when they return.
#pragma once

#include "sink.h"

namespace fm::cuda {

// The functions of layer L: those of its kind. The generated source includes layers/<kind>.h for
// each kind in FM_LAYER_KINDS; a kind without such a file does not compile. In it Functions<L> has
//
//   forward, tangent                          as in csrc/cpu
//   backward_input, tangent_backward_input    the gradients of the inputs
//   backward_params, tangent_backward_params  those of the parameters, if the kind has any
//   PARAMS_IN_INPUT                           backward_input makes sums that the parameters'
//                                             gradients are made of
//
// In a backward pass each is told the first thread that has no work yet, and returns the next such
// one.
template <Kind KIND, int L>
struct FunctionsOf;
#define FM_FUNCTIONS_OF(kind)         \
  template <int L>                    \
  struct FunctionsOf<Kind::kind, L> { \
    using type = kind::Functions<L>;  \
  };
FM_LAYER_KINDS(FM_FUNCTIONS_OF)
#undef FM_FUNCTIONS_OF

template <int L>
using Functions = typename FunctionsOf<LAYERS[L].kind, L>::type;

template <int L>
constexpr bool has_params() {
  return L < LAYER_COUNT && (LAYERS[L % LAYER_COUNT].weight >= 0 || LAYERS[L % LAYER_COUNT].bias >= 0);
}

// Whether layer L has anything to do in a backward pass before its parameters' gradients.
template <int L, bool INPUT>
constexpr bool goes_back() {
  if (Functions<L>::PARAMS_IN_INPUT && has_params<L>()) return true;
  for (int in : LAYERS[L].inputs)
    if (in >= 0 && (VALUES[in].from_params || INPUT)) return true;
  return false;
}

template <int L, Space X>
FM_INLINE int params_back(const Pass& pass, const Sink& sink, int turn) {
  return Functions<L>::template backward_params<X>(pass, sink, turn);
}
template <int L, Space X>
FM_INLINE int tangent_params_back(const Pass& pass, const Sink& sink, int turn) {
  return Functions<L>::template tangent_backward_params<X>(pass, sink, turn);
}

template <Space X>
FM_PASS void run_forward(Pass pass) {
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = decltype(index)::value;
    Functions<L>::template forward<X>(pass);
    barrier();
  });
}

// The parameters' gradients of a layer are taken together with the input gradient of the layer
// before it, which reads nothing that they write: so they may go to where this layer reads its
// weights. Between two barriers the threads take turns: whoever has nothing to do in one product
// begins with the next.
template <Space X, bool INPUT>
FM_PASS void run_backward(Pass pass, Sink sink) {
  int turn = 0;
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = LAYER_COUNT - 1 - decltype(index)::value;
    if constexpr (goes_back<L, INPUT>()) turn = Functions<L>::template backward_input<X, INPUT>(pass, turn);
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
      Functions<L>::template tangent<X>(pass, along);
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
    if constexpr (goes_back<L, INPUT>())
      turn = Functions<L>::template tangent_backward_input<X, INPUT>(pass, along, turn);
    if constexpr (has_params<L + 1>()) turn = tangent_params_back<L + 1, X>(pass, sink, turn);
    if constexpr (goes_back<L, INPUT>() || TIED) turn = 0, barrier();
  });
  if constexpr (has_params<0>()) tangent_params_back<0, X>(pass, sink, turn);
  if constexpr (TIED) barrier();
  sink.take_tied();
}

}  // namespace fm::cuda
