// The few words that the kernels need of CUDA, or of what stands in for it where there is none.
#pragma once

#ifdef FASTMETA_EMULATE
#include "emulate.h"
#else

#define FM_INLINE __device__ __forceinline__
#define FM_INLINE_LAMBDA
#define FM_PASS __device__ __noinline__
#define FM_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#if FM_RANKS == 1
#define FM_CLUSTERS
#else
#define FM_CLUSTERS __cluster_dims__(FM_RANKS, 1, 1)
#endif
#define FM_ARGUMENT(type) const __grid_constant__ type
#define FM_PRAGMA(text) _Pragma(#text)
#define FM_UNROLL FM_PRAGMA(unroll)
#define FM_UNROLL_BY(n) FM_PRAGMA(unroll n)

namespace fm::cuda {

extern __shared__ __align__(16) unsigned char shared_bytes[];

// A block by itself, whatever the kernels of a task are launched as.
namespace alone {
FM_INLINE int thread() { return int(threadIdx.x); }
FM_INLINE int threads() { return int(blockDim.x); }
FM_INLINE int block() { return int(blockIdx.x); }
FM_INLINE int blocks() { return int(gridDim.x); }
FM_INLINE void barrier() { __syncthreads(); }
FM_INLINE void* shared_memory() { return shared_bytes; }
}  // namespace alone

#if FM_RANKS == 1
using alone::barrier;
using alone::block;
using alone::blocks;
using alone::thread;
FM_INLINE void begin() {}
FM_INLINE void end() {}
FM_INLINE void* shared_memory(int) { return shared_bytes; }
#else
// A cluster of blocks acts as one block that has their threads, and their shared memories one after
// the other.
FM_INLINE int rank() {
  int value;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  return value;
}
FM_INLINE int thread() { return rank() * int(blockDim.x) + int(threadIdx.x); }
FM_INLINE int block() { return int(blockIdx.x) / FM_RANKS; }
FM_INLINE int blocks() { return int(gridDim.x) / FM_RANKS; }
FM_INLINE void barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Another block's memory is there from when that block begins until it ends.
FM_INLINE void begin() { barrier(); }
FM_INLINE void end() { barrier(); }
FM_INLINE void* shared_memory(int rank) {
  void* address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(static_cast<void*>(shared_bytes)), "r"(rank));
  return address;
}
#endif

// ---- warps
constexpr int WARP = 32;  // threads
constexpr int HELD = 1;   // lanes whose registers a thread holds

FM_INLINE int lane(int) { return thread() % 32; }

// The sum of the parts of LANES neighbours, a power of two, for each of them.
template <int LANES, class T>
FM_INLINE void add_lanes(T (&part)[1]) {
  const unsigned team = (LANES == 32 ? 0u : 1u << LANES % 32) - 1u;
  FM_UNROLL
  for (int distance = 1; distance < LANES; distance *= 2)
    part[0] += __shfl_xor_sync(team << (thread() % 32 & ~(LANES - 1)), part[0], distance);
}

// ---- tensor cores
FM_INLINE float float_of(unsigned bits) { return __uint_as_float(bits); }
FM_INLINE unsigned round_to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
FM_INLINE unsigned round_to_bf16(float low, float high) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// c += a b; a register of a and b holds PER numbers: TF32, or two of bfloat16. The strides are from
// lane to lane.
template <int PER>
FM_INLINE void tensor_multiply(float* c, int, const unsigned* a, int, const unsigned* b, int) {
  if constexpr (PER == 1)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fm::cuda

#endif
