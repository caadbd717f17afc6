// Products of small matrices by all threads of a block: each thread computes tiles of the result in
// registers.
//
// Three forms, all of matrices whose rows are contiguous:
//   by_rows      c[m, n] = sum_k a[m, k] b[n, k]       forward: x W^T
//   by_columns   c[m, n] = sum_k a[m, k] b[k, n]       input gradient: dy W
//   outer        c[m, n] = sum_r a[r, m] b[r, n]       weight gradient: dy^T x
// A thread's columns come in chunks of contiguous ones, and the chunks of neighbouring threads are
// neighbours: so loads of b are free of bank conflicts, where rows are an odd number of vectors
// apart.
#pragma once

#include "memory.h"

namespace fm::cuda {

enum class Form { by_rows, by_columns, outer };

struct Tile {
  int m, n, chunk;
};

// How long a warp's load takes, in passes over the banks: 32 neighbouring chunks, fewer if the rows
// are shorter.
constexpr int load_cost(int across, int chunk) {
  return ceil_div(smaller(32, across) * chunk * int(sizeof(S)), 128);
}

// An estimate of the time of a product of [rows, cols] in tiles of m x n, per VECTOR steps of k:
// loads of all warps share one pipe; each of four groups of warps issues its multiply-adds and
// loads one by one.
constexpr int tile_cost(Form form, int rows, int cols, Tile t, int block_threads) {
  const int chunks = ceil_div(t.n, t.chunk), across = ceil_div(ceil_div(cols, t.chunk), chunks);
  const int tiles = ceil_div(rows, t.m) * across;
  // loads of a's and of b's numbers
  int first = t.m, second = t.n;
  if (form != Form::by_rows) second = VECTOR * chunks;
  if (form == Form::outer) first = VECTOR * ceil_div(t.m, VECTOR);
  const int passes = first + second * load_cost(across, form == Form::by_rows ? VECTOR : t.chunk);
  const int memory = ceil_div(tiles, 32 * RANKS) * passes;
  const int issued = ceil_div(tiles, block_threads) * (t.m * t.n * VECTOR + first + second);
  return 2 * (memory > issued ? memory : issued) + smaller(memory, issued);
}

constexpr Tile choose_tile(Form form, int rows, int cols, int width, int block_threads) {
  const int chunk = form == Form::by_rows ? 1 : width;
  Tile best = {1, chunk, chunk};
  for (int m = 1; m <= 8; ++m) {
    if (form == Form::outer && m != 1 && m != 2 && m != VECTOR && m != 2 * VECTOR) continue;
    if (m > rows) continue;
    for (int n = chunk; n <= 8; n += n < 2 * chunk ? chunk : 2 * chunk) {
      if (m * n * int(sizeof(S)) > 96) continue;
      const Tile tile = {m, n, chunk};
      if (tile_cost(form, rows, cols, tile, block_threads) < tile_cost(form, rows, cols, best, block_threads))
        best = tile;
    }
  }
  return best;
}

// acc += a b^T; rows of a beyond the last one are read as the last one.
template <int M, int N, class A, class B>
FM_INLINE void add_by_rows(S (&acc)[M][N], const A& a, int row, int rows, const B& b, const int (&n)[N]) {
  static_assert(A::COLS == B::COLS, "the depths differ");
  constexpr int K = A::COLS, STEP = A::WIDTH > 1 || B::WIDTH > 1 ? VECTOR : 1;
  int m[M];
  FM_UNROLL
  for (int i = 0; i < M; ++i) m[i] = row + i < rows ? row + i : rows - 1;
  // larger tiles have work enough, and no registers to spare; a thread with one or two sums waits
  // for its loads
  FM_UNROLL_BY(M * N > 16 ? 1 : M * N > 2 ? 2 : 8)
  for (int k = 0; k + STEP <= K; k += STEP) {
    Vec<STEP> x[M], y[N];
    FM_UNROLL
    for (int i = 0; i < M; ++i) x[i] = a.template get_all<STEP>(m[i], k);
    FM_UNROLL
    for (int j = 0; j < N; ++j) y[j] = b.template get_all<STEP>(n[j], k);
    FM_UNROLL
    for (int s = 0; s < STEP; ++s) {
      FM_UNROLL
      for (int i = 0; i < M; ++i) {
        FM_UNROLL
        for (int j = 0; j < N; ++j) acc[i][j] += x[i].at[s] * y[j].at[s];
      }
    }
  }
  FM_UNROLL
  for (int k = K / STEP * STEP; k < K; ++k) {
    FM_UNROLL
    for (int i = 0; i < M; ++i) {
      FM_UNROLL
      for (int j = 0; j < N; ++j) acc[i][j] += a.data[m[i] * A::LD + k] * b.data[n[j] * B::LD + k];
    }
  }
}

// acc += a b
template <int CHUNK, int M, int N, class A, class B>
FM_INLINE void add_by_columns(S (&acc)[M][N], const A& a, int row, int rows, const B& b,
                              const int (&n)[N / CHUNK]) {
  constexpr int K = A::COLS, STEP = A::WIDTH > 1 ? VECTOR : 1;
  int m[M];
  FM_UNROLL
  for (int i = 0; i < M; ++i) m[i] = row + i < rows ? row + i : rows - 1;
  const auto add_one = [&](const S(&x)[M], int k) {
    FM_UNROLL
    for (int c = 0; c < N / CHUNK; ++c) {
      const Vec<CHUNK> y = b.template get<CHUNK>(k, n[c]);
      FM_UNROLL
      for (int i = 0; i < M; ++i) {
        FM_UNROLL
        for (int j = 0; j < CHUNK; ++j) acc[i][c * CHUNK + j] += x[i] * y.at[j];
      }
    }
  };
  S x[M];
  FM_UNROLL_BY(2)
  for (int k = 0; k + STEP <= K; k += STEP) {
    Vec<STEP> vectors[M];
    FM_UNROLL
    for (int i = 0; i < M; ++i) vectors[i] = a.template get_all<STEP>(m[i], k);
    FM_UNROLL
    for (int s = 0; s < STEP; ++s) {
      FM_UNROLL
      for (int i = 0; i < M; ++i) x[i] = vectors[i].at[s];
      add_one(x, k + s);
    }
  }
  FM_UNROLL
  for (int k = K / STEP * STEP; k < K; ++k) {
    FM_UNROLL
    for (int i = 0; i < M; ++i) x[i] = a.data[m[i] * A::LD + k];
    add_one(x, k);
  }
}

// acc += a^T b over `depth` rows of both; M columns of a from `row` on.
template <int CHUNK, int M, int N, class A, class B>
FM_INLINE void add_outer(S (&acc)[M][N], const A& a, int row, const B& b, const int (&n)[N / CHUNK],
                         int depth) {
  constexpr int PIECE = A::WIDTH > 1 ? smaller(M, VECTOR) : 1;
  FM_UNROLL_BY(2)
  for (int r = 0; r < depth; ++r) {
    S x[M];
    FM_UNROLL
    for (int i = 0; i < M; i += PIECE) {
      const int at = row + i < A::COLS ? row + i : 0;
      const Vec<PIECE> piece = a.template get<PIECE>(r, at);
      FM_UNROLL
      for (int j = 0; j < PIECE; ++j) x[i + j] = piece.at[j];
    }
    FM_UNROLL
    for (int c = 0; c < N / CHUNK; ++c) {
      const Vec<CHUNK> y = b.template get<CHUNK>(r, n[c]);
      FM_UNROLL
      for (int i = 0; i < M; ++i) {
        FM_UNROLL
        for (int j = 0; j < CHUNK; ++j) acc[i][c * CHUNK + j] += x[i] * y.at[j];
      }
    }
  }
}

// A thread's tile of a result, and what is added to it: `n` holds the first column of each chunk.
template <int M, int N, int CHUNK>
struct ThreadTile {
  S acc[M][N];
  int row, n[N / CHUNK];

  template <class A, class B>
  FM_INLINE void by_rows(const A& a, int rows, const B& b) {
    add_by_rows(acc, a, row, rows, b, n);
  }
  template <class A, class B>
  FM_INLINE void by_columns(const A& a, int rows, const B& b) {
    add_by_columns<CHUNK>(acc, a, row, rows, b, n);
  }
  template <class A, class B>
  FM_INLINE void outer(const A& a, const B& b, int depth) {
    add_outer<CHUNK>(acc, a, row, b, n, depth);
  }
};

// Calls add(tile) and then put(row, column, chunk) for every tile of a [rows, COLS] result. Thread
// `first_thread` has the first tile; returns the thread after the one that has the last.
template <int COLS, int M, int N, int CHUNK, class Add, class Put>
FM_INLINE int for_tiles(int first_thread, int rows, const Add& add, const Put& put) {
  constexpr int chunks = N / CHUNK, all = ceil_div(COLS, CHUNK), across = ceil_div(all, chunks);
  const int tiles = (rows + M - 1) / M * across;
  FM_UNROLL_BY(1)
  for (int number = thread_from(first_thread); number < tiles; number += step_threads()) {
    const int first = number % across;
    ThreadTile<M, N, CHUNK> tile;
    tile.row = number / across * M;
    FM_UNROLL
    for (int c = 0; c < chunks; ++c) tile.n[c] = (first + c * across < all ? first + c * across : 0) * CHUNK;
    FM_UNROLL
    for (int i = 0; i < M; ++i) {
      FM_UNROLL
      for (int j = 0; j < N; ++j) tile.acc[i][j] = 0;
    }
    add(tile);
    FM_UNROLL
    for (int i = 0; i < M; ++i) {
      if (M > 1 && tile.row + i >= rows) break;
      FM_UNROLL
      for (int c = 0; c < chunks; ++c) {
        if (chunks > 1 && first + c * across >= all) break;
        Vec<CHUNK> chunk;
        FM_UNROLL
        for (int j = 0; j < CHUNK; ++j) chunk.at[j] = tile.acc[i][c * CHUNK + j];
        put(tile.row + i, tile.n[c], chunk);
      }
    }
  }
  return (first_thread + tiles) % step_threads();
}

}  // namespace fm::cuda
