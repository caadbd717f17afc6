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
struct Functions {
  static constexpr int IN = LAYERS[L].inputs[0], OUT = LAYERS[L].output;
  static constexpr int W = LAYERS[L].weight, B = LAYERS[L].bias;
  static constexpr Multiply HOW = LAYERS[L].multiply;
  // The value that the product itself makes.
  static constexpr int PRODUCT = LAYERS[L].pre >= 0 ? LAYERS[L].pre : OUT;
  static constexpr bool PARAMS_IN_INPUT = false;

  // y = [x V^T scale +] x W^T by tiles, `add` says which.
  template <class Add, class Put>
  static FM_INLINE void output(const Pass& pass, const Add& add, const Put& put) {
    constexpr int ROWS = usual_rows(OUT), COLS = VALUES[OUT].cols;
    if constexpr (HOW != Multiply::fma) {
      constexpr WarpShape shape = choose_warp_tile(HOW, COLS, ROWS);
      for_warp_tiles<HOW, shape.m, shape.n, true>(0, rows(pass, OUT), COLS, add, put);
    } else {
      constexpr Tile tile = choose_tile(Form::by_rows, ROWS, COLS, 1, CREW);
      for_tiles<COLS, tile.m, tile.n, 1>(0, rows(pass, OUT), add, put);
    }
  }

  template <Space X>
  static FM_INLINE void forward(const Pass& pass) {
    constexpr int LD = VALUES[OUT].ld;
    const ValueMatrix<IN> x{value<IN, X>(pass)};
    const auto w = weight_matrix<W>(theta<W>(pass.workspace, pass.k));
    const int last = rows(pass, OUT);
    output(
        pass, [&](auto& tile) { tile.by_rows(x, last, w); },
        [&](int r, int c, Vec<1> z) {
          if constexpr (B >= 0) z.at[0] += theta<B>(pass.workspace, pass.k)[c];
          put_value<L, X>(pass, r * LD + c, z.at[0]);
        });
  }

  // dx = [dy V scale +] dy W by tiles, `add` says which; returns the thread after the last one that
  // has a tile.
  template <class Add, class Put>
  static FM_INLINE int input_gradient(const Pass& pass, const Add& add, const Put& put) {
    constexpr Value in = VALUES[IN];
    constexpr int ROWS = usual_rows(IN);
    const auto put_at = [&](int r, int c, const auto& g) { put(r * VALUES[IN].ld + c, g); };
    if constexpr (HOW != Multiply::fma) {
      constexpr WarpShape shape = choose_warp_tile(HOW, in.cols, ROWS);
      return for_warp_tiles<HOW, shape.m, shape.n, true>(0, rows(pass, IN), in.cols, add, put_at);
    } else {
      constexpr Tile tile = choose_tile(Form::by_columns, ROWS, in.cols, in.vector, CREW);
      return for_tiles<in.cols, tile.m, tile.n, in.vector>(0, rows(pass, IN), add, put_at);
    }
  }

  template <Space X, bool INPUT>
  static FM_INLINE int backward_input(const Pass& pass, int) {
    const ValueMatrix<PRODUCT> dy{delta<PRODUCT, X>(pass)};
    const auto w = weight_matrix<W>(theta<W>(pass.workspace, pass.k));
    const int last = rows(pass, IN);
    return input_gradient(
        pass, [&](auto& tile) { tile.by_columns(dy, last, w); },
        [&](int at, const auto& g) { put_delta<IN, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, at, g); });
  }

  // The gradients of W, by tiles of what `add` sums up, and of b, the sums of dy's columns, from
  // thread `first` on; returns the thread after the last one.
  template <class Add, class Dy>
  static FM_INLINE int weight_gradient(const Pass& pass, const Add& add, const Dy& dy, const Sink& sink,
                                       int first) {
    constexpr Param w = PARAMS[W];
    const S w_rate = sink.one_rate<W>();
    const auto put_w = [&](int r, int c, const auto& g) { sink.template put<W, L>(r, c, g, w_rate); };
    if constexpr (HOW != Multiply::fma) {
      constexpr WarpShape shape = choose_warp_tile(HOW, w.rows, w.cols);
      first = for_warp_tiles<HOW, shape.m, shape.n, false>(first, w.rows, w.cols, add, put_w);
    } else {
      constexpr Tile tile = choose_tile(Form::outer, w.rows, w.cols, w.vector, CREW);
      first = for_tiles<w.cols, tile.m, tile.n, tile.chunk>(first, w.rows, add, put_w);
    }
    if constexpr (B >= 0) {
      const int depth = rows(pass, OUT);
      const S b_rate = sink.one_rate<B>();
      for (int c = thread_from(first); c < w.rows; c += step_threads()) {
        S sum = 0;
        FM_UNROLL_BY(4)
        for (int r = 0; r < depth; ++r) sum += dy.data[r * Dy::LD + c];
        sink.template put<B, L>(0, c, one(sum), b_rate);
      }
      first = (first + w.rows) % step_threads();
    }
    return first;
  }

  template <Space X>
  static FM_INLINE int backward_params(const Pass& pass, const Sink& sink, int first) {
    const ValueMatrix<IN> x{value<IN, X>(pass)};
    const ValueMatrix<PRODUCT> dy{delta<PRODUCT, X>(pass)};
    if (!sink.takes<L>()) return first;
    const int depth = rows(pass, OUT);
    return weight_gradient(pass, [&](auto& tile) { tile.outer(dy, x, depth); }, dy, sink, first);
  }

  // Ry = (x V^T + Rx W^T + vb) f', V = scale * lambda or the direction as it stands
  template <Space X>
  static FM_INLINE void tangent(const Pass& pass, const Along& along) {
    constexpr int LD = VALUES[OUT].ld;
    const ValueMatrix<IN> x{value<IN, X>(pass)};
    const int last = rows(pass, OUT);
    const S w_factor = factor<W>(along), b_factor = factor<B>(along);
    output(
        pass,
        [&](auto& tile) {
          if constexpr (PARAMS[W].adapted) {
            tile.by_rows(x, last, weight_matrix<W>(along.vector<W>()));
            along.scale(tile.acc, w_factor);
          }
          if constexpr (has_tangent<IN>) {
            const ValueMatrix<IN> rx{cuda::tangent<IN>(pass)};
            tile.by_rows(rx, last, weight_matrix<W>(theta<W>(pass.workspace, pass.k)));
          }
        },
        [&](int r, int c, Vec<1> rz) {
          if constexpr (B >= 0) {
            if constexpr (PARAMS[B].adapted) rz.at[0] += b_factor * along.vector<B>()[c];
          }
          put_tangent<L, X>(pass, r * LD + c, rz.at[0]);
        });
  }

  // R(dx) = dy V + R(dy) W
  template <Space X, bool INPUT>
  static FM_INLINE int tangent_backward_input(const Pass& pass, const Along& along, int) {
    const ValueMatrix<PRODUCT> dy{delta<PRODUCT, X>(pass)}, rdy{tangent_delta<PRODUCT>(pass)};
    const auto w = weight_matrix<W>(theta<W>(pass.workspace, pass.k));
    const int last = rows(pass, IN);
    const S w_factor = factor<W>(along);
    return input_gradient(
        pass,
        [&](auto& tile) {
          if constexpr (PARAMS[W].adapted) {
            tile.by_columns(dy, last, weight_matrix<W>(along.vector<W>()));
            along.scale(tile.acc, w_factor);
          }
          tile.by_columns(rdy, last, w);
        },
        [&](int at, const auto& g) {
          put_tangent_delta<IN, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, at, g);
        });
  }

  // R(dW) = R(dy)^T x + dy^T Rx
  template <Space X>
  static FM_INLINE int tangent_backward_params(const Pass& pass, const Sink& sink, int first) {
    const ValueMatrix<IN> x{value<IN, X>(pass)};
    const ValueMatrix<PRODUCT> dy{delta<PRODUCT, X>(pass)}, rdy{tangent_delta<PRODUCT>(pass)};
    const int depth = rows(pass, OUT);
    return weight_gradient(
        pass,
        [&](auto& tile) {
          tile.outer(rdy, x, depth);
          if constexpr (has_tangent<IN>) {
            const ValueMatrix<IN> rx{cuda::tangent<IN>(pass)};
            tile.outer(dy, rx, depth);
          }
        },
        rdy, sink, first);
  }
};

}  // namespace fm::cuda::linear
