// linear: y = f(x W^T + b) on the last dimension, with the activation that follows in the epilogue.
//
// W stands as torch has it, [O, I], for all three products: its rows are padded to an odd number of
// vectors.
#pragma once

#include "../pass.h"
#include "../sink.h"
#include "../warp_tile.h"

namespace fm::cuda::linear {

template <int L>
constexpr int IN = LAYERS[L].inputs[0];
template <int L>
constexpr int OUT = LAYERS[L].output;
template <int L>
constexpr Multiply HOW = LAYERS[L].multiply;
template <int L>
constexpr int W = LAYERS[L].weight;
template <int L>
constexpr int B = LAYERS[L].bias;
// The value that the product itself makes.
template <int L>
constexpr int PRODUCT = LAYERS[L].pre >= 0 ? LAYERS[L].pre : OUT<L>;

// y = [x V^T scale +] x W^T by tiles, `add` says which.
template <int L, class Add, class Put>
FM_INLINE void output(const Pass& pass, const Add& add, const Put& put) {
  constexpr int ROWS = usual_rows(OUT<L>), COLS = VALUES[OUT<L>].cols;
  if constexpr (HOW<L> != Multiply::fma) {
    constexpr WarpShape shape = choose_warp_tile(HOW<L>, COLS, ROWS);
    for_warp_tiles<HOW<L>, shape.m, shape.n, true>(0, rows(pass, OUT<L>), COLS, add, put);
  } else {
    constexpr Tile tile = choose_tile(Form::by_rows, ROWS, COLS, 1, CREW);
    for_tiles<COLS, tile.m, tile.n, 1>(0, rows(pass, OUT<L>), add, put);
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
        put_value<L, X>(pass, r * LD + c, z.at[0]);
      });
}

// dx = [dy V scale +] dy W by tiles, `add` says which; returns the thread behind the last one that
// has a tile.
template <int L, class Add, class Put>
FM_INLINE int input_gradient(const Pass& pass, const Add& add, const Put& put) {
  constexpr Value in = VALUES[IN<L>];
  constexpr int ROWS = usual_rows(IN<L>);
  const auto put_at = [&](int r, int c, const auto& g) { put(r * VALUES[IN<L>].ld + c, g); };
  if constexpr (HOW<L> != Multiply::fma) {
    constexpr WarpShape shape = choose_warp_tile(HOW<L>, in.cols, ROWS);
    return for_warp_tiles<HOW<L>, shape.m, shape.n, true>(0, rows(pass, IN<L>), in.cols, add, put_at);
  } else {
    constexpr Tile tile = choose_tile(Form::by_columns, ROWS, in.cols, in.vector, CREW);
    return for_tiles<in.cols, tile.m, tile.n, in.vector>(0, rows(pass, IN<L>), add, put_at);
  }
}

template <int L, Space X, bool INPUT>
FM_INLINE int backward_input(const Pass& pass) {
  const ValueMatrix<PRODUCT<L>> dy{delta<PRODUCT<L>, X>(pass)};
  const auto w = weight_matrix<W<L>>(theta<W<L>>(pass.workspace, pass.k));
  const int last = rows(pass, IN<L>);
  return input_gradient<L>(
      pass, [&](auto& tile) { tile.by_columns(dy, last, w); },
      [&](int at, const auto& g) { put_delta<IN<L>, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, at, g); });
}

// The gradients of W, by tiles of what `add` sums up, and of b, the sums of dy's columns, from
// thread `first` on; returns the thread behind the last one.
template <int L, class Add, class Dy>
FM_INLINE int weight_gradient(const Pass& pass, const Add& add, const Dy& dy, const Sink& sink, int first) {
  constexpr Param w = PARAMS[W<L>];
  const S w_rate = sink.one_rate<W<L>>();
  const auto put_w = [&](int r, int c, const auto& g) { sink.template put<W<L>, L>(r, c, g, w_rate); };
  if constexpr (HOW<L> != Multiply::fma) {
    constexpr WarpShape shape = choose_warp_tile(HOW<L>, w.rows, w.cols);
    first = for_warp_tiles<HOW<L>, shape.m, shape.n, false>(first, w.rows, w.cols, add, put_w);
  } else {
    constexpr Tile tile = choose_tile(Form::outer, w.rows, w.cols, w.vector, CREW);
    first = for_tiles<w.cols, tile.m, tile.n, tile.chunk>(first, w.rows, add, put_w);
  }
  if constexpr (B<L> >= 0) {
    const int depth = rows(pass, OUT<L>);
    const S b_rate = sink.one_rate<B<L>>();
    for (int c = thread_from(first); c < w.rows; c += step_threads()) {
      S sum = 0;
      FM_UNROLL_BY(4)
      for (int r = 0; r < depth; ++r) sum += dy.data[r * Dy::LD + c];
      sink.template put<B<L>, L>(0, c, one(sum), b_rate);
    }
    first = (first + w.rows) % step_threads();
  }
  return first;
}

template <int L, Space X>
FM_INLINE int backward_params(const Pass& pass, const Sink& sink, int first) {
  const ValueMatrix<IN<L>> x{value<IN<L>, X>(pass)};
  const ValueMatrix<PRODUCT<L>> dy{delta<PRODUCT<L>, X>(pass)};
  if (!sink.takes<L>()) return first;
  const int depth = rows(pass, OUT<L>);
  return weight_gradient<L>(pass, [&](auto& tile) { tile.outer(dy, x, depth); }, dy, sink, first);
}

// Ry = (x V^T + Rx W^T + vb) f', V = scale * lambda or the direction as it stands
template <int L, Space X>
FM_INLINE void tangent(const Pass& pass, const Along& along) {
  constexpr int LD = VALUES[OUT<L>].ld;
  const ValueMatrix<IN<L>> x{value<IN<L>, X>(pass)};
  const int last = rows(pass, OUT<L>);
  const S w_factor = factor<W<L>>(along), b_factor = factor<B<L>>(along);
  output<L>(
      pass,
      [&](auto& tile) {
        if constexpr (PARAMS[W<L>].adapted) {
          tile.by_rows(x, last, weight_matrix<W<L>>(along.vector<W<L>>()));
          along.scale(tile.acc, w_factor);
        }
        if constexpr (has_tangent<IN<L>>) {
          const ValueMatrix<IN<L>> rx{cuda::tangent<IN<L>>(pass)};
          tile.by_rows(rx, last, weight_matrix<W<L>>(theta<W<L>>(pass.workspace, pass.k)));
        }
      },
      [&](int r, int c, Vec<1> rz) {
        if constexpr (B<L> >= 0) {
          if constexpr (PARAMS[B<L>].adapted) rz.at[0] += b_factor * along.vector<B<L>>()[c];
        }
        put_tangent<L, X>(pass, r * LD + c, rz.at[0]);
      });
}

// R(dx) = dy V + R(dy) W
template <int L, Space X, bool INPUT>
FM_INLINE int tangent_backward_input(const Pass& pass, const Along& along) {
  const ValueMatrix<PRODUCT<L>> dy{delta<PRODUCT<L>, X>(pass)}, rdy{tangent_delta<PRODUCT<L>>(pass)};
  const auto w = weight_matrix<W<L>>(theta<W<L>>(pass.workspace, pass.k));
  const int last = rows(pass, IN<L>);
  const S w_factor = factor<W<L>>(along);
  return input_gradient<L>(
      pass,
      [&](auto& tile) {
        if constexpr (PARAMS[W<L>].adapted) {
          tile.by_columns(dy, last, weight_matrix<W<L>>(along.vector<W<L>>()));
          along.scale(tile.acc, w_factor);
        }
        tile.by_columns(rdy, last, w);
      },
      [&](int at, const auto& g) {
        put_tangent_delta<IN<L>, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, at, g);
      });
}

// R(dW) = R(dy)^T x + dy^T Rx
template <int L, Space X>
FM_INLINE int tangent_backward_params(const Pass& pass, const Sink& sink, int first) {
  const ValueMatrix<IN<L>> x{value<IN<L>, X>(pass)};
  const ValueMatrix<PRODUCT<L>> dy{delta<PRODUCT<L>, X>(pass)}, rdy{tangent_delta<PRODUCT<L>>(pass)};
  const int depth = rows(pass, OUT<L>);
  return weight_gradient<L>(
      pass,
      [&](auto& tile) {
        tile.outer(rdy, x, depth);
        if constexpr (has_tangent<IN<L>>) {
          const ValueMatrix<IN<L>> rx{cuda::tangent<IN<L>>(pass)};
          tile.outer(dy, rx, depth);
        }
      },
      rdy, sink, first);
}

}  // namespace fm::cuda::linear
