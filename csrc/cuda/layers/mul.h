// mul: y = a * b, element by element; b may have one row or one column for all of a's.
#pragma once

#include "../pass.h"

namespace fm::cuda::mul {

template <int L>
struct Functions {
  static constexpr int A = LAYERS[L].inputs[0], B = LAYERS[L].inputs[1], OUT = LAYERS[L].output;
  static constexpr int ROWS = VALUES[OUT].rows, COLS = VALUES[OUT].cols;
  static constexpr bool PARAMS_IN_INPUT = false;

  // Where the element of input J stands that output element (r, c) is made of.
  template <int J>
  static FM_INLINE int place(int r, int c) {
    constexpr Value v = VALUES[LAYERS[L].inputs[J]];
    return (v.rows == ROWS ? r : r / ROWS) * v.ld + (v.cols == COLS ? c : 0);
  }
  static FM_INLINE int out(int r, int c) { return r * VALUES[OUT].ld + c; }

  // Calls put(offset in input J, sum of term(r, c)) for every element of input J: of the elements
  // (r, c) of the output that it stands for.
  template <int J, class Term, class Put>
  static FM_INLINE void collect(const Pass& pass, const Term& term, const Put& put) {
    constexpr Value v = VALUES[LAYERS[L].inputs[J]];
    constexpr int TALL = v.rows == ROWS ? 1 : ROWS, WIDE = v.cols == COLS ? 1 : COLS;
    for_elements<LAYERS[L].inputs[J]>(pass, [&](int at, int r, int c) {
      S sum = 0;
      for (int i = 0; i < TALL; ++i)
        for (int j = 0; j < WIDE; ++j) sum += term(r * TALL + i, c + j);
      put(at, sum);
    });
  }

  template <Space X>
  static FM_INLINE void forward(const Pass& pass) {
    for_elements<OUT>(pass, [&](int at, int r, int c) {
      own_value<OUT, X>(pass)[at] = value<A, X>(pass)[place<0>(r, c)] * value<B, X>(pass)[place<1>(r, c)];
    });
  }

  template <Space X, bool INPUT>
  static FM_INLINE int backward_input(const Pass& pass, int turn) {
    for_each<0, 2>([&](auto index) {
      constexpr int J = decltype(index)::value, IN = J ? B : A, OTHER = J ? A : B;
      if constexpr (wants_delta<IN, INPUT>) {
        collect<J>(
            pass,
            [&](int r, int c) {
              return delta<OUT, X>(pass)[out(r, c)] * value<OTHER, X>(pass)[place<1 - J>(r, c)];
            },
            [&](int at, S g) { put_delta<IN, LAYERS[L].adds[J], LAYERS[L].last[J], X>(pass, at, one(g)); });
      }
    });
    return turn;
  }

  template <Space X, class Along>
  static FM_INLINE void tangent(const Pass& pass, const Along&) {
    for_elements<OUT>(pass, [&](int at, int r, int c) {
      S ry = 0;
      if constexpr (has_tangent<A>)
        ry += cuda::tangent<A>(pass)[place<0>(r, c)] * value<B, X>(pass)[place<1>(r, c)];
      if constexpr (has_tangent<B>)
        ry += value<A, X>(pass)[place<0>(r, c)] * cuda::tangent<B>(pass)[place<1>(r, c)];
      cuda::tangent<OUT>(pass)[at] = ry;
    });
  }

  template <Space X, bool INPUT, class Along>
  static FM_INLINE int tangent_backward_input(const Pass& pass, const Along&, int turn) {
    for_each<0, 2>([&](auto index) {
      constexpr int J = decltype(index)::value, IN = J ? B : A, OTHER = J ? A : B;
      if constexpr (wants_delta<IN, INPUT>) {
        collect<J>(
            pass,
            [&](int r, int c) {
              S g = tangent_delta<OUT>(pass)[out(r, c)] * value<OTHER, X>(pass)[place<1 - J>(r, c)];
              if constexpr (has_tangent<OTHER>)
                g += delta<OUT, X>(pass)[out(r, c)] * cuda::tangent<OTHER>(pass)[place<1 - J>(r, c)];
              return g;
            },
            [&](int at, S g) {
              put_tangent_delta<IN, LAYERS[L].adds[J], LAYERS[L].last[J], X>(pass, at, one(g));
            });
      }
    });
    return turn;
  }
};

}  // namespace fm::cuda::mul
