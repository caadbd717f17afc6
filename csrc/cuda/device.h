// The few words that the kernels need of CUDA, or of what stands in for it where there is none.
#pragma once

#ifdef FASTMETA_EMULATE
#include "emulate.h"
#else

#define FM_INLINE __device__ __forceinline__
#define FM_INLINE_LAMBDA
#define FM_PASS __device__ __noinline__
#define FM_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#define FM_ARGUMENT(type) const __grid_constant__ type
#define FM_PRAGMA(text) _Pragma(#text)
#define FM_UNROLL FM_PRAGMA(unroll)
#define FM_UNROLL_BY(n) FM_PRAGMA(unroll n)

namespace fm::cuda {

extern __shared__ __align__(16) unsigned char shared_bytes[];

FM_INLINE int thread() { return int(threadIdx.x); }
FM_INLINE int threads() { return int(blockDim.x); }
FM_INLINE int block() { return int(blockIdx.x); }
FM_INLINE int blocks() { return int(gridDim.x); }
FM_INLINE void barrier() { __syncthreads(); }
FM_INLINE void* shared_memory() { return shared_bytes; }

}  // namespace fm::cuda

#endif
