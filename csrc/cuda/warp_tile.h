// Products on tensor cores: each warp computes tiles of the result, M times 16 by N times 8.
//
// What has many rows or columns whatever the batch, the features, stands along the 16: forward and
// input gradient are made as their transposes, [features, examples].
#pragma once

#include "fragments.h"
#include "memory.h"

namespace fm::cuda {

struct WarpShape {
  int m, n;
};

// An estimate of the time of a product in tiles of this shape for each step along its depth: loads
// of all warps share one pipe; multiplying and rounding have one for each of four groups of warps.
constexpr int warp_cost(Multiply how, int ms, int ns, WarpShape t, int warps) {
  const int tiles = ceil_div(ms, 16 * t.m) * ceil_div(ns, 8 * t.n), loads = 4 * t.m + 2 * t.n;
  const int terms = how == Multiply::split ? 3 : 1, roundings = how == Multiply::split ? 4 : 2;
  const int memory = ceil_div(tiles, RANKS) * loads;
  const int arithmetic =
      ceil_div(tiles, warps) * ceil_div(warps, 4 * RANKS) * (4 * terms * t.m * t.n + roundings * loads);
  return 2 * (memory > arithmetic ? memory : arithmetic) + smaller(memory, arithmetic);
}

// More tiles of a split product than these do not go into the registers that the assembler finds.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int SPLIT_TILES = 2;
#else
constexpr int SPLIT_TILES = 4;
#endif

constexpr WarpShape choose_warp_tile(Multiply how, int ms, int ns) {
  constexpr int warps = CREW / 32;
  const int most = how == Multiply::split ? SPLIT_TILES : 8;
  WarpShape best = {1, 1};
  for (int m = 1; m <= 2; ++m)
    for (int n = 1; n <= 4 && m * n <= most; n *= 2)
      if (warp_cost(how, ms, ns, {m, n}, warps) < warp_cost(how, ms, ns, best, warps)) best = {m, n};
  return best;
}

// An operand: element (i, k) at data[i * OUTER + k * DEPTH], k runs along what is summed.
template <int OUTER, int DEPTH_>
struct Operand {
  static constexpr int DEPTH = DEPTH_;
  const S* data;
  FM_INLINE S at(int i, int k) const { return data[i * OUTER + k * DEPTH]; }
};

// The order in which a step of a sum is put into the registers is free, if it is the same in both
// operands. Rows are an odd number of 16 bytes apart: a load of neighbouring columns from rows 0,
// 2, 4 and 6 falls into different banks.
template <bool STRIDED, int PER>
constexpr int depth_at(int k) {
  return STRIDED && PER == 1 ? k % 4 * 2 + k / 4 : k;
}

// N rows of an operand, STEP of depth, as registers of all lanes that a thread holds: the number
// rounded, and what is left of it where it is split.
template <Multiply HOW, int COUNT>
struct Fragment {
  static constexpr int PER = HOW == Multiply::bf16 ? 2 : 1;
  unsigned high[HELD][COUNT], low[HELD][HOW == Multiply::split ? COUNT : 1];

  FM_INLINE void set(int h, int i, const S (&x)[PER]) {
    if constexpr (HOW == Multiply::bf16) {
      high[h][i] = round_to_bf16(x[0], x[1]);
    } else {
      high[h][i] = round_to_tf32(x[0]);
      // infinity becomes NaN here
      if constexpr (HOW == Multiply::split) low[h][i] = round_to_tf32(x[0] - float_of(high[h][i]));
    }
  }
};

template <int M, int N>
FM_INLINE void clear(S (&tile)[M][N]) {
  FM_UNROLL
  for (int i = 0; i < M; ++i) {
    FM_UNROLL
    for (int j = 0; j < N; ++j) tile[i][j] = 0;
  }
}

template <Multiply HOW, int M, int N>
struct WarpTile {
  static constexpr int PER = HOW == Multiply::bf16 ? 2 : 1, STEP = 8 * PER;
  S acc[HELD * M][N * 4];
  int m, n, ms, ns;  // the tile's place in the result, and the result's size

  // c^T = a b^T
  template <class A, class B>
  FM_INLINE void by_rows(const A& a, int, const B& b) {
    add(Operand<B::LD, 1>{b.data}, Operand<A::LD, 1>{a.data}, A::COLS);
  }
  template <class A, class B>
  FM_INLINE void by_columns(const A& a, int, const B& b) {
    add(Operand<1, B::LD>{b.data}, Operand<A::LD, 1>{a.data}, A::COLS);
  }
  template <class A, class B>
  FM_INLINE void outer(const A& a, const B& b, int depth) {
    add(Operand<1, A::LD>{a.data}, Operand<1, B::LD>{b.data}, depth);
  }

 private:
  // acc += sum_k a(m, k) b(n, k)
  template <class A, class B>
  FM_INLINE void add(const A& a, const B& b, int depth) {
    constexpr bool SPLIT = HOW == Multiply::split;
    // of a split product: what the small halves add, which may be summed by the tensor cores
    S small[SPLIT ? HELD * M : 1][N * 4];
    clear(small);
    int k = 0;
    FM_UNROLL_BY(1)
    for (; k + STEP <= depth; k += STEP) step<true>(a, b, k, depth, small);
    if (k < depth) step<false>(a, b, k, depth, small);
    if constexpr (SPLIT) {
      FM_UNROLL
      for (int i = 0; i < HELD * M; ++i) {
        FM_UNROLL
        for (int j = 0; j < N * 4; ++j) acc[i][j] += small[i][j];
      }
    }
  }

  template <bool WHOLE, class A, class B, class Small>
  FM_INLINE void step(const A& a, const B& b, int k, int depth, Small& small) {
    constexpr bool STRIDED = A::DEPTH != 1;
    Fragment<HOW, M * 4> x;
    Fragment<HOW, N * 2> y;
    const auto read = [&](const auto& operand, int i, int last, int at) {
      const int d = k + depth_at<STRIDED, PER>(at);
      return WHOLE || d < depth ? operand.at(i < last ? i : last - 1, d) : S(0);
    };
    for (int h = 0; h < HELD; ++h) {
      FM_UNROLL
      for (int i = 0; i < M * 4; ++i) {
        S part[PER];
        FM_UNROLL
        for (int p = 0; p < PER; ++p) {
          const Place at = place_in_a<PER>(lane(h), i % 4, p);
          part[p] = read(a, m + i / 4 * 16 + at.row, ms, at.col);
        }
        x.set(h, i, part);
      }
      FM_UNROLL
      for (int j = 0; j < N * 2; ++j) {
        S part[PER];
        FM_UNROLL
        for (int p = 0; p < PER; ++p) {
          const Place at = place_in_b<PER>(lane(h), j % 2, p);
          part[p] = read(b, n + j / 2 * 8 + at.col, ns, at.row);
        }
        y.set(h, j, part);
      }
    }
    FM_UNROLL
    for (int i = 0; i < M; ++i) {
      FM_UNROLL
      for (int j = 0; j < N; ++j) multiply(x, y, i, j, small);
    }
  }

  template <class X, class Y, class Small>
  FM_INLINE void multiply(const X& x, const Y& y, int i, int j, Small& small) {
    constexpr int LANES_ACC = M * N * 4;  // from lane to lane, where a thread holds several
    float* const to = &acc[i][j * 4];
    const unsigned *const a = &x.high[0][i * 4], *const b = &y.high[0][j * 2];
    if constexpr (HOW != Multiply::split) {
      tensor_multiply<PER>(to, LANES_ACC, a, M * 4, b, N * 2);
    } else {
      // tensor cores cut sums off rather than round them: what is large is summed outside
      // (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", 2022, section
      // 3)
      float* const rest = &small[i][j * 4];
      tensor_multiply<PER>(rest, LANES_ACC, a, M * 4, &y.low[0][j * 2], N * 2);
      tensor_multiply<PER>(rest, LANES_ACC, &x.low[0][i * 4], M * 4, b, N * 2);
      S large[HELD][4];
      clear(large);
      tensor_multiply<PER>(&large[0][0], 4, a, M * 4, b, N * 2);
      for (int h = 0; h < HELD; ++h) {
        FM_UNROLL
        for (int r = 0; r < 4; ++r) to[h * LANES_ACC + r] += large[h][r];
      }
    }
  }
};

// Calls add(tile) and then put(row, column, elements) for every tile of a [rows, cols] result. The
// first whole warp from `first_thread` on has the first tile; returns the thread after the warp
// that has the last. TRANSPOSED: tiles are of the result's transpose, and elements come one by one.
template <Multiply HOW, int M, int N, bool TRANSPOSED, class Add, class Put>
FM_INLINE int for_warp_tiles(int first_thread, int rows, int cols, const Add& add, const Put& put) {
  WarpTile<HOW, M, N> tile;
  tile.ms = TRANSPOSED ? cols : rows, tile.ns = TRANSPOSED ? rows : cols;
  const int across = (tile.ns + 8 * N - 1) / (8 * N), tiles = (tile.ms + 16 * M - 1) / (16 * M) * across;
  const int warps = step_threads() / WARP;
  const int first = (first_thread + WARP - 1) / WARP * WARP % step_threads();
  FM_UNROLL_BY(1)
  for (int number = thread_from(first) / WARP; number < tiles; number += warps) {
    tile.m = number / across * 16 * M, tile.n = number % across * 8 * N;
    clear(tile.acc);
    add(tile);
    for (int h = 0; h < HELD; ++h) {
      FM_UNROLL
      for (int i = 0; i < M; ++i) {
        FM_UNROLL
        for (int r = 0; r < N * 4; r += TRANSPOSED ? 1 : 2) {
          const Place at = place_in_c(lane(h), r % 4);
          const int m = tile.m + i * 16 + at.row, n = tile.n + r / 4 * 8 + at.col;
          if (m >= tile.ms || n >= tile.ns) continue;
          const S* const found = &tile.acc[h * M + i][r];
          if constexpr (TRANSPOSED)
            put(n, m, Vec<1>{{found[0]}});
          else
            put(m, n, Vec<2>{{found[0], found[1]}});  // the second may be padding
        }
      }
    }
  }
  return (first + tiles * WARP) % step_threads();
}

}  // namespace fm::cuda
