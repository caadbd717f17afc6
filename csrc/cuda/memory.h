// Vectors, matrices, and where a block finds its memory.
#pragma once

#include "device.h"
#include "spec.h"

namespace fm::cuda {

using S = FM_SCALAR;

// Elements in 16 bytes, the widest load.
constexpr int VECTOR = 16 / int(sizeof(S));

// Blocks of a cluster, and threads of all of them.
constexpr int RANKS = FM_RANKS, CREW = RANKS * LAYOUT.threads;

// Threads that run a meta-step: a constant on a GPU.
FM_INLINE int step_threads() {
#ifdef __CUDACC__
  return CREW;
#else
  return threads();
#endif
}

// A thread's number where the count begins at thread `first`, and goes round: so that threads
// without work in one product begin with the next one of the same phase.
FM_INLINE int thread_from(int first) {
  const int number = thread() - first;
  return number < 0 ? number + step_threads() : number;
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }

template <int N>
struct alignas(N * sizeof(S)) Vec {
  S at[N];
};
template <int N>
FM_INLINE Vec<N> load(const S* from) {
  return *reinterpret_cast<const Vec<N>*>(from);
}
template <int N>
FM_INLINE void store(S* to, const Vec<N>& value) {
  *reinterpret_cast<Vec<N>*>(to) = value;
}

// Rows of COLS elements, LD apart. One load may read up to WIDTH elements of a row, from a column
// that is a multiple of their number.
template <int COLS_, int LD_, int WIDTH_>
struct Matrix {
  static constexpr int COLS = COLS_, LD = LD_, WIDTH = WIDTH_;
  const S* data;

  // N elements of row r from column c on. What lies beyond the last column is anything.
  template <int N>
  FM_INLINE Vec<N> get(int r, int c) const {
    const S* from = data + r * LD + c;
    if constexpr (N <= WIDTH) {
      return load<N>(from);
    } else {
      Vec<N> found;
      FM_UNROLL
      for (int j = 0; j < N; ++j) found.at[j] = c + j < COLS ? from[j] : S(0);
      return found;
    }
  }
  // The same where all of them are known to be there.
  template <int N>
  FM_INLINE Vec<N> get_all(int r, int c) const {
    const S* from = data + r * LD + c;
    if constexpr (N <= WIDTH) {
      return load<N>(from);
    } else {
      Vec<N> found;
      FM_UNROLL
      for (int j = 0; j < N; ++j) found.at[j] = from[j];
      return found;
    }
  }
};

// Offset `at` in the memory of this space that a rank has. Kept as numbers rather than pointers
// across calls, so that the compiler knows which memory it reads.
template <Space SPACE>
FM_INLINE S* memory(S* workspace, int rank, int at) {
  if constexpr (SPACE == Space::shared)
    return static_cast<S*>(shared_memory(rank)) + at;
  else
    return workspace + rank * LAYOUT.slab + at;
}

}  // namespace fm::cuda
