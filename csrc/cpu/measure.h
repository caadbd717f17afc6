// What this machine can do at most, measured: the denominators of the benchmark's shares.
#pragma once

#include <cstddef>

namespace fm {

// GFLOP/s of independent multiply-adds in registers, the best of several short runs on `threads`
// threads.
double fma_peak(bool is_double, int threads);

// GB/s (read and written) of `y = a x + y` over `bytes` of memory a thread, the best of several
// short runs.
double stream_bandwidth(std::size_t bytes, int threads);

}  // namespace fm
