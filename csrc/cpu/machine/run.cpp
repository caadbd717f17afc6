#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>

#include "../kernels.h"
#include "../thread_pool.h"
#include "group.h"

namespace fm::machine {
namespace {

// As of the row engine: sums over tasks do not depend on the number of threads.
constexpr i64 RANGES = 16;

template <class S>
const Kernels<S>& kernels_of() {
  if constexpr (sizeof(S) == 4)
    return *instruction_set().f32;
  else
    return *instruction_set().f64;
}

template <class S>
const Executor<S>& executor_of() {
  if constexpr (sizeof(S) == 4)
    return instruction_set().machine->f32;
  else
    return instruction_set().machine->f64;
}

}  // namespace

void Machine::find_updates() {
  if (!support.present) return;
  std::vector<std::pair<i64, i64>> single, all;
  const bool kept = wants_rates && gradient;
  for (const Adapted& a : adapted) {
    const bool number = !a.rate_element && (!a.rate_per_task || lanes == 1);
    single.emplace_back(a.offset, number && plain_rule() && !kept ? a.size : 0);
    all.emplace_back(a.offset, a.size);
  }
  at_once[0] = mark_updates(support.program, 1, Space::grad, Space::grad, lanes, single);
  at_once[1] = mark_updates(support.program, 2, Space::curvature, Space::direction, lanes, all);
}

template <class S>
Outcome run(const Machine& machine, const MachineCall<S>& call, int threads, bool poison) {
  Session session;
  const Kernels<S>& kernels = kernels_of<S>();
  const Layout layout = layout_of(machine, sizeof(S));
  const i64 groups = (call.tasks + machine.lanes - 1) / machine.lanes;
  const int ranges = int(std::min(RANGES, groups));
  const i64 sums_size = layout.sums;
  const i64 shared_size = layout.shared;
  S* const base = static_cast<S*>(
      caller_scratch(size_t(shared_size + ranges * sums_size + call.tasks * layout.record) * sizeof(S)));
  S* const sums = base + shared_size;
  S* const records = sums + ranges * sums_size;
  fill_shared(machine, layout, call, base);

  std::vector<std::unique_ptr<Group<S>>> workers(threads);
  std::exception_ptr failure;
  std::mutex failure_mutex;
  std::atomic<bool> bad_index{false};
  parallel(threads, ranges, [&](int r, int worker) {
    try {
      auto& group = workers[worker];
      if (!group) {
        S* workspace = static_cast<S*>(scratch(worker, size_t(layout.total) * sizeof(S)));
        if (poison) std::fill(workspace, workspace + layout.total, std::numeric_limits<S>::quiet_NaN());
        group = std::make_unique<Group<S>>(machine, layout, kernels, executor_of<S>(), call, base, records,
                                           workspace);
      }
      if (machine.gradient) std::fill_n(sums + r * sums_size, sums_size, S(0));
      const i64 begin = groups * r / ranges, end = groups * (r + 1) / ranges;
      for (i64 g = begin; g < end; ++g) {
        const i64 first = g * machine.lanes, count = std::min(machine.lanes, call.tasks - first);
        if (!group->run(first, count, sums + r * sums_size)) bad_index = true;
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(failure_mutex);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
  if (bad_index) return Outcome::bad_index;
  if (call.loss) {
    double total = 0;
    for (i64 t = 0; t < call.tasks; ++t)
      total += double(call.task_losses[t]) * (call.task_weights ? double(call.task_weights[t]) : 1.0);
    *call.loss = S(total / double(call.tasks));
  }
  if (machine.gradient) {
    for (int r = 1; r < ranges; ++r) kernels.add(sums_size, sums, sums + r * sums_size, sums);
    write_sums(machine, layout, call, sums);
    for (size_t t = 0; t < machine.tables.size(); ++t)
      sum_table(machine, layout, executor_of<S>(), call, t, records);
  }
  return Outcome::ok;
}

template Outcome run<float>(const Machine&, const MachineCall<float>&, int, bool);
template Outcome run<double>(const Machine&, const MachineCall<double>&, int, bool);

i64 workspace(const Machine& machine) {
  return layout_of(machine, machine.is_double ? sizeof(double) : sizeof(float)).total;
}

}  // namespace fm::machine
