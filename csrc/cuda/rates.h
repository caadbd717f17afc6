// Gradients of learning rates, beside what a gradient leaves as it is made (sink.h).
#pragma once

#include "sink.h"

namespace fm::cuda {

// Every thread's own sums.
FM_INLINE void start_rates(S* workspace) {
  if constexpr (OPTIONS.wants_rates)
    for (int slot = 0; slot < RATE_SLOTS; ++slot) rate_sum(workspace, slot, thread()) = 0;
}

// Adds up the threads' sums of a slot, every 32nd of them, and then what that leaves: each between two
// barriers. The order depends on nothing but the number of threads.
FM_INLINE void add_threads(S* workspace, int slot) {
  for (int j = thread_from(slot * 32 % step_threads()); j < 32; j += step_threads()) {
    double total = 0;
    for (int i = j; i < step_threads(); i += 32) total += rate_sum(workspace, slot, i);
    rate_sum(workspace, slot, j) = total;
  }
}
FM_INLINE double total_of(S* workspace, int slot) {
  double total = 0;
  for (int i = 0; i < 32; ++i) total += rate_sum(workspace, slot, i);
  return total;
}

// Calls body(parameter, slot) for every scalar rate whose gradient is complete at step k.
template <class Body>
FM_INLINE void for_scalar_rates(const Sink& to, const Body& body) {
  for_params([&](auto index) {
    constexpr Param p = PARAMS[decltype(index)::value];
    if constexpr (p.adapted && !p.rate_element)
      if (p.rate_per_step || to.k == 0) body(index, p.rate_slot);
  });
}

FM_INLINE void rates_from_updates(const Sink& to) {
  for_params([&](auto index) {
    constexpr int P = decltype(index)::value;
    constexpr Param p = PARAMS[P];
    if constexpr (p.adapted) {
      const S* u = memory<LAYOUT.updates.space>(to.workspace, p.rank,
                                                LAYOUT.updates.at + to.k * SET + p.at - LAYOUT.frozen);
      for (int e = thread(); e < p.numel(); e += step_threads()) {
        const int r = e / p.cols, c = e % p.cols, at = r * p.ld + c;
        to.rate_gradient<P>(r, c, one(lambda<P>(to.workspace)[at]), one(u[at]));
      }
    }
  });
}

// Adds up the threads' sums where a scalar rate's gradient is complete: of one step, or of all.
FM_INLINE void finish_rates(const Sink& to) {
  barrier();
  if (!RATE_PER_STEP && to.k > 0) return;
  for_scalar_rates(to, [&](auto, int slot) { add_threads(to.workspace, slot); });
  barrier();
  for_scalar_rates(to, [&](auto index, int slot) {
    constexpr int P = decltype(index)::value;
    if (thread() == PARAMS[P].rate_slot % step_threads())
      *to.rate_place<P>() = S(total_of(to.workspace, slot));
  });
  barrier();
  for_scalar_rates(to, [&](auto, int slot) { rate_sum(to.workspace, slot, thread()) = 0; });
}

}  // namespace fm::cuda
