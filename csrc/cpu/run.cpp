#include "run.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>

#include "meta_step.h"
#include "split.h"
#include "thread_pool.h"

namespace fm {
namespace {

// Tasks are cut into this many contiguous ranges at most, each summed by one worker: fixed, so that
// the sums do not depend on the number of threads.
constexpr i64 RANGES = 16;

std::atomic<double> last_seconds{0};

bool classes_in_range(const Plan& plan, const LossSpec& loss, const void* targets, i64 count) {
  if (!targets || !loss.class_indices) return true;
  const i64* y = static_cast<const i64*>(targets);
  const i64 classes = plan.values[plan.output].cols;
  for (i64 i = 0; i < count; ++i)
    if ((y[i] < 0 || y[i] >= classes) && y[i] != loss.ignore_index) return false;
  return true;
}

template <class S>
bool rates_finite(const Plan& plan, const Call<S>& call) {
  for (size_t p = 0; p < plan.params.size(); ++p) {
    const Param& param = plan.params[p];
    if (!param.adapted || plan.options.steps == 0) continue;
    const i64 count = (param.rate_per_step ? plan.options.steps : 1) *
                      (param.rate_per_task ? call.tasks : 1) * (param.rate_element ? param.numel() : 1);
    for (i64 i = 0; i < count; ++i)
      if (!std::isfinite(call.params[p].rate[i])) return false;
  }
  return true;
}

template <class S>
void run_tasks(const Plan& plan, const Call<S>& call, int threads, bool poison) {
  const Kernels<S>& whole = *[] {
    if constexpr (sizeof(S) == 4)
      return instruction_set().f32;
    else
      return instruction_set().f64;
  }();
  const bool split = call.tasks < threads;
  const Kernels<S>& kernels = split ? SplitKernels<S>::over(whole, threads) : whole;
  const int ranges = int(std::min(RANGES, call.tasks));
  // The caller's scratch, kept out of the workers' way: shared parameters, their mirrors, the
  // ranges' sums.
  const i64 shared_size = plan.set_size + plan.mirror_size;
  S* const base =
      static_cast<S*>(caller_scratch(size_t(shared_size + (ranges + 1) * plan.range_sums) * sizeof(S)));
  S* const shared_set = base;
  S* const sums = base + shared_size;
  const S nan = std::numeric_limits<S>::quiet_NaN();
  if (poison) std::fill(base, base + shared_size + (ranges + 1) * plan.range_sums, nan);

  for (size_t p = 0; p < plan.params.size(); ++p) {
    const Param& param = plan.params[p];
    if (param.per_task) continue;
    pack(kernels, plan, param, call.params[p].data, shared_set + param.offset);
    if (param.mirrored)
      make_mirror(kernels, plan, param, shared_set + param.offset,
                  shared_set + plan.set_size + param.mirror_offset);
  }
  // For rules that make something else than zero of zeros: one where elements are, zero where there
  // is only padding.
  std::vector<S> mask(plan.plain_rule() ? 0 : plan.set_size), ones;
  for (size_t p = 0; p < plan.params.size() && !mask.empty(); ++p) {
    ones.assign(size_t(plan.params[p].numel()), S(1));
    pack(kernels, plan, plan.params[p], ones.data(), mask.data() + plan.params[p].offset);
  }
  const Shared<S> shared{shared_set, shared_set + plan.set_size, mask.data()};

  std::vector<std::unique_ptr<MetaStep<S>>> steps(threads);  // one a worker
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto range = [&](int r, int worker) {
    try {
      auto& step = steps[worker];
      if (!step) {
        S* workspace = static_cast<S*>(scratch(worker, plan.at.total * sizeof(S)));
        if (poison) std::fill(workspace, workspace + plan.at.total, nan);
        step = std::make_unique<MetaStep<S>>(plan, kernels, call, shared, workspace);
      }
      const i64 begin = call.tasks * r / ranges, end = call.tasks * (r + 1) / ranges;
      for (i64 t = begin; t < end; ++t) step->run(t, sums + r * plan.range_sums, t == begin);
    } catch (...) {
      std::lock_guard<std::mutex> lock(failure_mutex);
      failure = std::current_exception();
    }
  };
  if (split)  // one job, whose kernels are shared out
    parallel(1, 1, [&](int, int) {
      for (int r = 0; r < ranges; ++r) range(r, 0);
    });
  else
    parallel(threads, ranges, range);
  if (failure) std::rethrow_exception(failure);
  if (call.loss) {
    double total = 0;
    for (i64 t = 0; t < call.tasks; ++t)
      total += double(call.task_losses[t]) * (call.task_weights ? double(call.task_weights[t]) : 1.0);
    *call.loss = S(total / double(call.tasks));
  }
  if (!plan.options.gradient || plan.range_sums == 0) return;

  // Ranges are added in their order; the elements are shared out over the threads.
  S* const total = sums + ranges * plan.range_sums;
  constexpr i64 CHUNK = 4096;
  parallel(threads, int((plan.range_sums + CHUNK - 1) / CHUNK), [&](int c, int) {
    const i64 start = c * CHUNK, n = std::min(CHUNK, plan.range_sums - start);
    kernels.add(n, sums + start, nullptr, total + start);
    for (int r = 1; r < ranges; ++r)
      kernels.add(n, total + start, sums + r * plan.range_sums + start, total + start);
  });
  const auto writer =
      std::find_if(steps.begin(), steps.end(), [](const auto& s) { return s != nullptr; })->get();
  for (size_t p = 0; p < plan.params.size(); ++p) {
    const Param& param = plan.params[p];
    if (!param.per_task && call.params[p].grad)
      unpack(kernels, plan, param, total + param.offset, call.params[p].grad);
    if (plan.options.wants_rates && param.adapted && !param.rate_per_task)
      writer->write_rate_gradient(p, total + param.rate_sum_offset, 0, 1);
  }
  if (call.number_grads)
    std::copy_n(total + plan.number_sum_offset, plan.options.steps * RULE_NUMBERS, call.number_grads);
}

}  // namespace

template <class S>
Verdict run(const Plan& plan, const Call<S>& call, int threads, bool poison) {
  const Options& o = plan.options;
  const i64 support_sets = call.tasks * (o.support_per_step ? o.steps : 1);
  const i64 positions = plan.values[plan.output].rows;
  if (!classes_in_range(plan, o.loss, call.support.y, support_sets * o.support * positions))
    return Verdict::support_class;
  if (!classes_in_range(plan, o.query_loss, call.query.y, call.tasks * o.query * positions))
    return Verdict::query_class;
  if (!rates_finite(plan, call)) return Verdict::rate_not_finite;
  Session session;
  const auto start = std::chrono::steady_clock::now();
  run_tasks(plan, call, threads, poison);
  last_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return Verdict::ok;
}

template Verdict run<float>(const Plan&, const Call<float>&, int, bool);
template Verdict run<double>(const Plan&, const Call<double>&, int, bool);

double last_run_seconds() { return last_seconds; }

}  // namespace fm
