// Stands in for CUDA where a kernel is compiled as ordinary C++: a block, or a cluster of blocks,
// is one thread or several, see emulate.cpp.
#pragma once

#define FM_INLINE inline
#define FM_INLINE_LAMBDA
#define FM_PASS inline
#define FM_KERNEL(threads) extern "C" __attribute__((visibility("default"))) void
#define FM_CLUSTERS
#define FM_ARGUMENT(type) const type&
#define FM_UNROLL
#define FM_UNROLL_BY(n)

namespace fm::cuda {

constexpr int MOST_RANKS = 4;

// What one thread of a block, or of a cluster of blocks, knows; the driver fills it in.
struct Emulated {
  int thread, threads, block, blocks;
  void* shared[MOST_RANKS];
  void (*barrier)(Emulated*);
};

inline thread_local Emulated* emulated = nullptr;

inline int thread() { return emulated->thread; }
inline int threads() { return emulated->threads; }
inline int block() { return emulated->block; }
inline int blocks() { return emulated->blocks; }
inline void begin() {}
inline void end() {}
inline void* shared_memory(int rank) { return emulated->shared[rank]; }
#ifdef FASTMETA_EMULATE_MUTANTS
// Whether the barrier in this line is left out: a race on purpose, which the check for races must
// find.
bool left_out(const char* file, int line);
inline void barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!left_out(file, line)) emulated->barrier(emulated);
}
#else
inline void barrier() { emulated->barrier(emulated); }
#endif

namespace alone {
using cuda::barrier;
using cuda::block;
using cuda::thread;
using cuda::threads;
inline void* shared_memory() { return cuda::shared_memory(0); }
}  // namespace alone

}  // namespace fm::cuda

#include "emulate_warp.h"

extern "C" inline __attribute__((used, visibility("default"))) void fastmeta_enter(fm::cuda::Emulated* self) {
  fm::cuda::emulated = self;
}
