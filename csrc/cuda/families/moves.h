// What the layer kinds that only move or add numbers have in common: add, concat, reshape. Each has
// a struct with
//
//   from(j, r, c, row, column)   whether the output's element (r, c) is made of an element of input
//                                j, and of which one: (row, column)
//
// They are linear: their tangents are themselves again.
#pragma once

#include "../pass.h"

namespace fm::cuda {

template <class Map, int L>
struct Moves {
  static constexpr int OUT = LAYERS[L].output;
  static constexpr bool PARAMS_IN_INPUT = false;
  template <class Index>
  static constexpr int IN = LAYERS[L].inputs[Index::value];

  template <Space X>
  static FM_INLINE void forward(const Pass& pass) {
    gather(
        pass, [&](auto j, int at) { return value<IN<decltype(j)>, X>(pass)[at]; },
        [&](int at, S y) { own_value<OUT, X>(pass)[at] = y; });
  }

  template <Space X, bool INPUT>
  static FM_INLINE int backward_input(const Pass& pass, int turn) {
    scatter(pass, [&](auto index, int in, int out) {
      constexpr int J = decltype(index)::value, V = IN<decltype(index)>;
      if constexpr (wants_delta<V, INPUT>)
        put_delta<V, LAYERS[L].adds[J], LAYERS[L].last[J], X>(pass, in, one(delta<OUT, X>(pass)[out]));
    });
    return turn;
  }

  template <Space X, class Along>
  static FM_INLINE void tangent(const Pass& pass, const Along&) {
    gather(
        pass,
        [&](auto j, int at) {
          if constexpr (has_tangent<IN<decltype(j)>>)
            return cuda::tangent<IN<decltype(j)>>(pass)[at];
          else
            return S(0);
        },
        [&](int at, S y) { cuda::tangent<OUT>(pass)[at] = y; });
  }

  template <Space X, bool INPUT, class Along>
  static FM_INLINE int tangent_backward_input(const Pass& pass, const Along&, int turn) {
    scatter(pass, [&](auto index, int in, int out) {
      constexpr int J = decltype(index)::value, V = IN<decltype(index)>;
      if constexpr (wants_delta<V, INPUT>)
        put_tangent_delta<V, LAYERS[L].adds[J], LAYERS[L].last[J], X>(pass, in,
                                                                      one(tangent_delta<OUT>(pass)[out]));
    });
    return turn;
  }

 private:
  // Every element of the output: write(at, sum of what read(index of the input, at) has for it).
  template <class Read, class Write>
  static FM_INLINE void gather(const Pass& pass, const Read& read, const Write& write) {
    for_elements<OUT>(pass, [&](int at, int r, int c) {
      S sum = 0;
      for_each<0, 2>([&](auto index) {
        constexpr int J = decltype(index)::value, V = LAYERS[L].inputs[J];
        if constexpr (V >= 0) {
          int row, column;
          if (Map::from(J, r, c, row, column)) sum += read(index, row * VALUES[V].ld + column);
        }
      });
      write(at, sum);
    });
  }
  // put(index of the input, offset in it, offset in the output) for every pair. An input that is
  // read twice may get its two shares from different threads: one after the other.
  template <class Put>
  static FM_INLINE void scatter(const Pass& pass, const Put& put) {
    for_each<0, 2>([&](auto index) {
      constexpr int J = decltype(index)::value, V = LAYERS[L].inputs[J];
      if constexpr (V >= 0) {
        if constexpr (J == 1 && V == LAYERS[L].inputs[0]) barrier();
        for_elements<OUT>(pass, [&](int at, int r, int c) {
          int row, column;
          if (Map::from(J, r, c, row, column)) put(index, row * VALUES[V].ld + column, at);
        });
      }
    });
  }
};

}  // namespace fm::cuda
