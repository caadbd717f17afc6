#include "measure.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace fm {
namespace {

constexpr int TRIALS = 7;

template <class Work>
double best_seconds(int threads, const Work& work) {
  double best = 1e30;
  for (int trial = 0; trial < TRIALS; ++trial) {
    const auto start = std::chrono::steady_clock::now();
    // One job a thread; each is long enough for every thread to find its own.
    parallel(threads, threads, [&](int job, int) { work(job); });
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

double fma_peak(bool is_double, int threads) {
  const PeakLoop loop = is_double ? instruction_set().peak_f64 : instruction_set().peak_f32;
  constexpr i64 ITERATIONS = 2'000'000;
  double operations = 0;
  const double seconds = best_seconds(threads, [&](int job) {
    const double done = loop(ITERATIONS);
    if (job == 0) operations = done;
  });
  return operations * threads / seconds * 1e-9;
}

double stream_bandwidth(std::size_t bytes, int threads) {
  const i64 n = std::max<i64>(i64(bytes / (2 * sizeof(float))) / 16 * 16, 16);
  const i64 repeats = std::max<i64>(1, (i64(64) << 20) / (8 * n));
  std::vector<std::vector<float>> x(threads, std::vector<float>(n, 1.f)),
      y(threads, std::vector<float>(n, 0.f));
  const double seconds = best_seconds(threads, [&](int job) {
    for (i64 r = 0; r < repeats; ++r)
      instruction_set().f32->sgd_update(n, 1e-3f, nullptr, y[job].data(), x[job].data(), y[job].data(),
                                        nullptr);
  });
  return 12.0 * double(n) * double(repeats) * threads / seconds * 1e-9;
}

}  // namespace fm
