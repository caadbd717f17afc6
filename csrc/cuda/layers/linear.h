// linear: y = f(x W^T + b) on the last dimension, with the activation that follows in the epilogue.
//
// W stands as torch has it, [O, I], for all three products: its rows are padded to an odd number of vectors.
#pragma once

#include "../pass.h"
#include "../sink.h"
#include "../warp_tile.h"

namespace fm::cuda::linear {

// Rows that the tiles are chosen for: the support set's, which is passed most often.
constexpr int usual_rows(int value) {
  return (OPTIONS.steps > 0 ? OPTIONS.support : OPTIONS.query) * VALUES[value].rows;
}

template <int L>
constexpr int IN = LAYERS[L].inputs[0];
template <int L>
constexpr int OUT = LAYERS[L].output;
template <int L>
constexpr Multiply HOW = LAYERS[L].multiply;
template <int L>
constexpr int PRE = LAYERS[L].pre;
template <int L>
constexpr int W = LAYERS[L].weight;
template <int L>
constexpr int B = LAYERS[L].bias;
// The value that the product itself makes.
template <int L>
constexpr int PRODUCT = PRE<L> >= 0 ? PRE<L> : OUT<L>;

// y = [x V^T scale +] x W^T by tiles, `add` says which.
template <int L, class Add, class Put>
FM_INLINE void output(const Pass& pass, const Add& add, const Put& put) {
  constexpr int ROWS = usual_rows(OUT<L>), COLS = VALUES[OUT<L>].cols;
  if constexpr (HOW<L> != Multiply::fma) {
    constexpr WarpShape shape = choose_warp_tile(HOW<L>, COLS, ROWS);
    for_warp_tiles<HOW<L>, shape.m, shape.n, true>(rows(pass, OUT<L>), COLS, add, put);
  } else {
    constexpr Tile tile = choose_tile(Form::by_rows, ROWS, COLS, 1, CREW);
    for_tiles<COLS, tile.m, tile.n, 1>(rows(pass, OUT<L>), add, put);
  }
}

template <int L, Space X>
FM_INLINE void forward(const Pass& pass) {
  constexpr int LD = VALUES[OUT<L>].ld;
  const ValueMatrix<IN<L>> x{value<IN<L>, X>(pass)};
  const auto w = weight_matrix<W<L>>(theta<W<L>>(pass.workspace, pass.k));
  const int last = rows(pass, OUT<L>);
  output<L>(
      pass, [&](auto& tile) { tile.by_rows(x, last, w); },
      [&](int r, int c, Vec<1> z) {
        if constexpr (B<L> >= 0) z.at[0] += theta<B<L>>(pass.workspace, pass.k)[c];
        if constexpr (PRE<L> >= 0) {
          if constexpr (VALUES[PRE<L>].x >= 0) own_value<PRE<L>, X>(pass)[r * LD + c] = z.at[0];
          z.at[0] = function_object<LAYERS[L].function>(LAYERS[L].c0, LAYERS[L].c1).value(z.at[0]);
        }
        own_value<OUT<L>, X>(pass)[r * LD + c] = z.at[0];
      });
}

// dx = [dy V scale +] dy W by tiles, `add` says which.
template <int L, class Add, class Put>
FM_INLINE void input_gradient(const Pass& pass, const Add& add, const Put& put) {
  constexpr Value in = VALUES[IN<L>];
  constexpr int ROWS = usual_rows(IN<L>);
  const auto put_at = [&](int r, int c, const auto& g) { put(r * VALUES[IN<L>].ld + c, g); };
  if constexpr (HOW<L> != Multiply::fma) {
    constexpr WarpShape shape = choose_warp_tile(HOW<L>, in.cols, ROWS);
    for_warp_tiles<HOW<L>, shape.m, shape.n, true>(rows(pass, IN<L>), in.cols, add, put_at);
  } else {
    constexpr Tile tile = choose_tile(Form::by_columns, ROWS, in.cols, in.vector, CREW);
    for_tiles<in.cols, tile.m, tile.n, in.vector>(rows(pass, IN<L>), add, put_at);
  }
}

template <int L, Space X, bool INPUT>
FM_INLINE void backward_input(const Pass& pass) {
  const ValueMatrix<PRODUCT<L>> dy{delta<PRODUCT<L>, X>(pass)};
  const auto w = weight_matrix<W<L>>(theta<W<L>>(pass.workspace, pass.k));
  const int last = rows(pass, IN<L>);
  input_gradient<L>(
      pass, [&](auto& tile) { tile.by_columns(dy, last, w); },
      [&](int at, const auto& g) { put_delta<IN<L>, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, at, g); });
}

// The gradients of W, by tiles of what `add` sums up, and of b, the sums of dy's columns. The threads that W's last
// round leaves idle begin with b.
template <int L, class Add, class Dy, class Put>
FM_INLINE void weight_gradient(const Pass& pass, const Add& add, const Dy& dy, const Put& put) {
  constexpr Param w = PARAMS[W<L>];
  const auto put_w = [&](int r, int c, const auto& g) { put(Index<W<L>>{}, r, c, g); };
  int busy;
  if constexpr (HOW<L> != Multiply::fma) {
    constexpr WarpShape shape = choose_warp_tile(HOW<L>, w.rows, w.cols);
    busy = for_warp_tiles<HOW<L>, shape.m, shape.n, false>(w.rows, w.cols, add, put_w);
  } else {
    constexpr Tile tile = choose_tile(Form::outer, w.rows, w.cols, w.vector, CREW);
    busy = for_tiles<w.cols, tile.m, tile.n, tile.chunk>(w.rows, add, put_w);
  }
  if constexpr (B<L> >= 0) {
    const int depth = rows(pass, OUT<L>);
    for (int c = thread() < busy ? thread() - busy + step_threads() : thread() - busy; c < w.rows;
         c += step_threads()) {
      S sum = 0;
      FM_UNROLL_BY(4)
      for (int r = 0; r < depth; ++r) sum += dy.data[r * Dy::LD + c];
      put(Index<B<L>>{}, 0, c, one(sum));
    }
  }
}

template <int L, Space X>
FM_INLINE void backward_params(const Pass& pass, Sink& sink) {
  const ValueMatrix<IN<L>> x{value<IN<L>, X>(pass)};
  const ValueMatrix<PRODUCT<L>> dy{delta<PRODUCT<L>, X>(pass)};
  if (!(PARAMS[W<L>].adapted || (B<L> >= 0 && PARAMS[B<L> < 0 ? 0 : B<L>].adapted)) && !sink.takes_frozen()) return;
  const int depth = rows(pass, OUT<L>);
  weight_gradient<L>(
      pass, [&](auto& tile) { tile.outer(dy, x, depth); }, dy,
      [&](auto p, int r, int c, const auto& g) { sink.template put<decltype(p)::value, L>(r, c, g); });
}

// Ry = (x V^T + Rx W^T + vb) f', V = scale * lambda or the direction as it stands
template <int L, Space X>
FM_INLINE void tangent(const Pass& pass, const Along& along) {
  constexpr int LD = VALUES[OUT<L>].ld;
  const ValueMatrix<IN<L>> x{value<IN<L>, X>(pass)};
  const int last = rows(pass, OUT<L>);
  output<L>(
      pass,
      [&](auto& tile) {
        if constexpr (PARAMS[W<L>].adapted) {
          tile.by_rows(x, last, weight_matrix<W<L>>(along.vector<W<L>>()));
          along.scale<W<L>>(tile.acc);
        }
        if constexpr (has_tangent<IN<L>>) {
          const ValueMatrix<IN<L>> rx{cuda::tangent<IN<L>>(pass)};
          tile.by_rows(rx, last, weight_matrix<W<L>>(theta<W<L>>(pass.workspace, pass.k)));
        }
      },
      [&](int r, int c, Vec<1> rz) {
        const int at = r * LD + c;
        if constexpr (B<L> >= 0) {
          if constexpr (PARAMS[B<L>].adapted) rz.at[0] += along.factor<B<L>>() * along.vector<B<L>>()[c];
        }
        if constexpr (PRE<L> >= 0) {
          if constexpr (VALUES[PRE<L>].rx >= 0) cuda::tangent<PRE<L>>(pass)[at] = rz.at[0];
          Vec<1> first, second;
          activation_derivatives<L, X, 1>(pass, at, first, second);
          rz.at[0] *= first.at[0];
        }
        cuda::tangent<OUT<L>>(pass)[at] = rz.at[0];
      });
}

// R(dx) = dy V + R(dy) W
template <int L, Space X, bool INPUT>
FM_INLINE void tangent_backward_input(const Pass& pass, const Along& along) {
  const ValueMatrix<PRODUCT<L>> dy{delta<PRODUCT<L>, X>(pass)}, rdy{tangent_delta<PRODUCT<L>>(pass)};
  const auto w = weight_matrix<W<L>>(theta<W<L>>(pass.workspace, pass.k));
  const int last = rows(pass, IN<L>);
  input_gradient<L>(
      pass,
      [&](auto& tile) {
        if constexpr (PARAMS[W<L>].adapted) {
          tile.by_columns(dy, last, weight_matrix<W<L>>(along.vector<W<L>>()));
          along.scale<W<L>>(tile.acc);
        }
        tile.by_columns(rdy, last, w);
      },
      [&](int at, const auto& g) { put_tangent_delta<IN<L>, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, at, g); });
}

// R(dW) = R(dy)^T x + dy^T Rx
template <int L, Space X>
FM_INLINE void tangent_backward_params(const Pass& pass, Sink& sink) {
  const ValueMatrix<IN<L>> x{value<IN<L>, X>(pass)};
  const ValueMatrix<PRODUCT<L>> dy{delta<PRODUCT<L>, X>(pass)}, rdy{tangent_delta<PRODUCT<L>>(pass)};
  const int depth = rows(pass, OUT<L>);
  weight_gradient<L>(
      pass,
      [&](auto& tile) {
        tile.outer(rdy, x, depth);
        if constexpr (has_tangent<IN<L>>) {
          const ValueMatrix<IN<L>> rx{cuda::tangent<IN<L>>(pass)};
          tile.outer(dy, rx, depth);
        }
      },
      rdy, [&](auto p, int r, int c, const auto& g) { sink.template put<decltype(p)::value, L>(r, c, g); });
}

}  // namespace fm::cuda::linear
