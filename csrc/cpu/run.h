// A call over all tasks: shares packed once, tasks over threads, sums over tasks in an order fixed
// by T alone.
#pragma once

#include "call.h"

namespace fm {

enum class Verdict : int { ok = 0, support_class = 1, query_class = 2, rate_not_finite = 3 };

// Checks the values that a plan cannot know, then runs. Nothing is written unless the verdict is
// ok.
template <class S>
Verdict run(const Plan& plan, const Call<S>& call, int threads, bool poison);

// Seconds spent inside the last run() of this process.
double last_run_seconds();

}  // namespace fm
