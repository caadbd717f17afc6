// linear: y = f(x W^T + b) on the last dimension, with the activation that follows in the epilogue.
//
// W stands as torch has it, [O, I], for all three products: its rows are padded to an odd number of vectors.
#pragma once

#include "../pass.h"
#include "../sink.h"

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
constexpr int PRE = LAYERS[L].pre;
template <int L>
constexpr int W = LAYERS[L].weight;
template <int L>
constexpr int B = LAYERS[L].bias;
// The value that the product itself makes.
template <int L>
constexpr int PRODUCT = PRE<L> >= 0 ? PRE<L> : OUT<L>;

template <int L, class Add, class Put>
FM_INLINE void multiply(const Pass& pass, const Add& add, const Put& put) {
  constexpr int O = VALUES[OUT<L>].cols;
  constexpr Tile tile = choose_tile(Form::by_rows, usual_rows(OUT<L>), O, 1, LAYOUT.threads);
  for_tiles<O, tile.m, tile.n, 1>(rows(pass, OUT<L>), add, put);
}

template <int L, Space X>
FM_INLINE void forward(const Pass& pass) {
  constexpr int LD = VALUES[OUT<L>].ld;
  const ValueMatrix<IN<L>> x{value<IN<L>, X>(pass)};
  const auto w = weight_matrix<W<L>>(theta<W<L>>(pass.workspace, pass.k));
  const int last = rows(pass, OUT<L>);
  multiply<L>(
      pass, [&](auto& acc, int row, const auto& n) { add_by_rows(acc, x, row, last, w, n); },
      [&](int r, int c, Vec<1> z) {
        if constexpr (B<L> >= 0) z.at[0] += theta<B<L>>(pass.workspace, pass.k)[c];
        if constexpr (PRE<L> >= 0) {
          if constexpr (VALUES[PRE<L>].x >= 0) own_value<PRE<L>, X>(pass)[r * LD + c] = z.at[0];
          z.at[0] = function_object<LAYERS[L].function>(LAYERS[L].c0, LAYERS[L].c1).value(z.at[0]);
        }
        own_value<OUT<L>, X>(pass)[r * LD + c] = z.at[0];
      });
}

// dx = [dy scale V +] dy W by tiles, `add` says which.
template <int L, class Add, class Put>
FM_INLINE void input_gradient(const Pass& pass, const Add& add, const Put& put) {
  constexpr int CHUNK = VALUES[IN<L>].vector;
  constexpr Tile tile = choose_tile(Form::by_columns, usual_rows(IN<L>), VALUES[IN<L>].cols, CHUNK, LAYOUT.threads);
  for_tiles<VALUES[IN<L>].cols, tile.m, tile.n, CHUNK>(
      rows(pass, IN<L>), [&](auto& acc, int row, const auto& n) { add(Index<CHUNK>{}, acc, row, n); },
      [&](int r, int c, const auto& g) { put(r * VALUES[IN<L>].ld + c, g); });
}

template <int L, Space X, bool INPUT>
FM_INLINE void backward_input(const Pass& pass) {
  const ValueMatrix<PRODUCT<L>> dy{delta<PRODUCT<L>, X>(pass)};
  const auto w = weight_matrix<W<L>>(theta<W<L>>(pass.workspace, pass.k));
  const int last = rows(pass, IN<L>);
  input_gradient<L>(
      pass,
      [&](auto chunk, auto& acc, int row, const auto& n) {
        add_by_columns<decltype(chunk)::value>(acc, dy, row, last, w, n);
      },
      [&](int at, const auto& g) { put_delta<IN<L>, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, at, g); });
}

// The gradients of W, by tiles of what `add` sums up, and of b, the sums of dy's columns. The threads that W's last
// round leaves idle begin with b.
template <int L, class Add, class Dy, class Put>
FM_INLINE void weight_gradient(const Pass& pass, const Add& add, const Dy& dy, const Put& put) {
  constexpr Param w = PARAMS[W<L>];
  constexpr Tile tile = choose_tile(Form::outer, w.rows, w.cols, w.vector, LAYOUT.threads);
  const int busy = for_tiles<w.cols, tile.m, tile.n, tile.chunk>(
      w.rows, [&](auto& acc, int row, const auto& n) { add(Index<tile.chunk>{}, acc, row, n); },
      [&](int r, int c, const auto& g) { put(Index<W<L>>{}, r, c, g); });
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
      pass,
      [&](auto chunk, auto& acc, int row, const auto& n) {
        add_outer<decltype(chunk)::value>(acc, dy, row, x, n, depth);
      },
      dy, [&](auto p, int r, int c, const auto& g) { sink.template put<decltype(p)::value, L>(r, c, g); });
}

// Ry = (x V^T + Rx W^T + vb) f', V = scale * lambda or the direction as it stands
template <int L, Space X>
FM_INLINE void tangent(const Pass& pass, const Along& along) {
  constexpr int LD = VALUES[OUT<L>].ld;
  const ValueMatrix<IN<L>> x{value<IN<L>, X>(pass)};
  const int last = rows(pass, OUT<L>);
  multiply<L>(
      pass,
      [&](auto& acc, int row, const auto& n) {
        if constexpr (PARAMS[W<L>].adapted) {
          add_by_rows(acc, x, row, last, weight_matrix<W<L>>(along.vector<W<L>>()), n);
          along.scale<W<L>>(acc);
        }
        if constexpr (has_tangent<IN<L>>) {
          const ValueMatrix<IN<L>> rx{cuda::tangent<IN<L>>(pass)};
          add_by_rows(acc, rx, row, last, weight_matrix<W<L>>(theta<W<L>>(pass.workspace, pass.k)), n);
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
      [&](auto chunk, auto& acc, int row, const auto& n) {
        constexpr int CHUNK = decltype(chunk)::value;
        if constexpr (PARAMS[W<L>].adapted) {
          add_by_columns<CHUNK>(acc, dy, row, last, weight_matrix<W<L>>(along.vector<W<L>>()), n);
          along.scale<W<L>>(acc);
        }
        add_by_columns<CHUNK>(acc, rdy, row, last, w, n);
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
      [&](auto chunk, auto& acc, int row, const auto& n) {
        constexpr int CHUNK = decltype(chunk)::value;
        add_outer<CHUNK>(acc, rdy, row, x, n, depth);
        if constexpr (has_tangent<IN<L>>) {
          const ValueMatrix<IN<L>> rx{cuda::tangent<IN<L>>(pass)};
          add_outer<CHUNK>(acc, dy, row, rx, n, depth);
        }
      },
      rdy, [&](auto p, int r, int c, const auto& g) { sink.template put<decltype(p)::value, L>(r, c, g); });
}

}  // namespace fm::cuda::linear
