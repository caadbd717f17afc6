// What the layer kinds that only move or add numbers have in common: add, concat, reshape. Each has
// a struct
//
//   Map<L>::from(j, r, c, row, column): the output's element (r, c) is made of element (row,
// column) of input j, or   false
//
// Their tangents are themselves again.
#pragma once

#include "../pass.h"

namespace fm::cuda {

template <template <int> class Map, int L>
struct Moves {
  // y = the sum of what comes from the inputs that READ has.
  template <class Read, class Write>
  static FM_INLINE void forward(const Pass& pass, const Read& read, const Write& write) {
    for_elements<LAYERS[L].output>(pass, [&](int at, int r, int c) {
      S sum = 0;
      for_each<0, 2>([&](auto index) {
        constexpr int J = decltype(index)::value, IN = LAYERS[L].inputs[J];
        if constexpr (IN >= 0) {
          int row, column;
          if (Map<L>::from(J, r, c, row, column)) sum += read(index, row * VALUES[IN].ld + column);
        }
      });
      write(at, sum);
    });
  }
  // put(index of the input, offset in it, offset in the output) for every pair. An input that is
  // read twice may get its
  // two shares from different threads: one after the other.
  template <class Put>
  static FM_INLINE void backward(const Pass& pass, const Put& put) {
    for_each<0, 2>([&](auto index) {
      constexpr int J = decltype(index)::value, IN = LAYERS[L].inputs[J];
      if constexpr (IN >= 0) {
        if constexpr (J == 1 && IN == LAYERS[L].inputs[0]) barrier();
        for_elements<LAYERS[L].output>(pass, [&](int at, int r, int c) {
          int row, column;
          if (Map<L>::from(J, r, c, row, column)) put(index, row * VALUES[IN].ld + column, at);
        });
      }
    });
  }
};

#define FM_MOVES                                                                                            \
  template <int L, Space X>                                                                                 \
  FM_INLINE void forward(const Pass& pass) {                                                                \
    Moves<Map, L>::forward(                                                                                 \
        pass, [&](auto j, int at) { return value<LAYERS[L].inputs[decltype(j)::value], X>(pass)[at]; },     \
        [&](int at, S y) { own_value<LAYERS[L].output, X>(pass)[at] = y; });                                \
  }                                                                                                         \
  template <int L, Space X, bool INPUT>                                                                     \
  FM_INLINE void backward_input(const Pass& pass) {                                                         \
    Moves<Map, L>::backward(pass, [&](auto index, int in, int out) {                                        \
      constexpr int J = decltype(index)::value, IN = LAYERS[L].inputs[J];                                   \
      if constexpr (wants_delta<IN, INPUT>)                                                                 \
        put_delta<IN, LAYERS[L].adds[J], LAYERS[L].last[J], X>(pass, in,                                    \
                                                               one(delta<LAYERS[L].output, X>(pass)[out])); \
    });                                                                                                     \
  }                                                                                                         \
  template <int L, Space X, class Along>                                                                    \
  FM_INLINE void tangent(const Pass& pass, const Along&) {                                                  \
    Moves<Map, L>::forward(                                                                                 \
        pass,                                                                                               \
        [&](auto j, int at) {                                                                               \
          constexpr int IN = LAYERS[L].inputs[decltype(j)::value];                                          \
          if constexpr (has_tangent<IN>)                                                                    \
            return cuda::tangent<IN>(pass)[at];                                                             \
          else                                                                                              \
            return S(0);                                                                                    \
        },                                                                                                  \
        [&](int at, S y) { cuda::tangent<LAYERS[L].output>(pass)[at] = y; });                               \
  }                                                                                                         \
  template <int L, Space X, bool INPUT, class Along>                                                        \
  FM_INLINE void tangent_backward_input(const Pass& pass, const Along&) {                                   \
    Moves<Map, L>::backward(pass, [&](auto index, int in, int out) {                                        \
      constexpr int J = decltype(index)::value, IN = LAYERS[L].inputs[J];                                   \
      if constexpr (wants_delta<IN, INPUT>)                                                                 \
        put_tangent_delta<IN, LAYERS[L].adds[J], LAYERS[L].last[J], X>(                                     \
            pass, in, one(tangent_delta<LAYERS[L].output>(pass)[out]));                                     \
    });                                                                                                     \
  }

}  // namespace fm::cuda
