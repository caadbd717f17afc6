// memory="checkpoint": a few copies of theta and the state of the update rule are kept, and the
// steps between them are run again. Which, the schedule says: fastmeta/backends/_checkpoints.py
// makes it, and says what the actions are.
#pragma once

#include <algorithm>
#include <vector>

#include "../shared/algorithm.h"
#include "../shared/types.h"

namespace fm {

enum class ActionKind : int { save, restore, advance, back };
constexpr int ACTION_KINDS = 4;

struct Action {
  ActionKind kind;
  i64 at, to;
};

struct Schedule {
  std::vector<Action> actions;  // empty: everything is kept
  i64 places = 0;               // for copies

  bool empty() const { return actions.empty(); }

  // Whether these actions go over `steps` steps forward and back, and read no copy that is not there.
  // Counts the places.
  bool complete(i64 steps) {
    std::vector<i64> kept;
    i64 now = 0, next_back = steps - 1;
    for (const Action& a : actions) {
      switch (a.kind) {
        case ActionKind::save:
          if (a.at != now || a.to < 0 || a.to >= steps) return false;
          if (a.to >= i64(kept.size())) kept.resize(size_t(a.to) + 1, -1);
          kept[size_t(a.to)] = now;
          break;
        case ActionKind::restore:
          if (a.to < 0 || a.to >= i64(kept.size()) || a.at < 0 || kept[size_t(a.to)] != a.at) return false;
          now = a.at;
          break;
        case ActionKind::advance:
          if (a.at != now || a.to <= now || a.to > next_back) return false;
          now = a.to;
          break;
        case ActionKind::back:
          if (a.at != now || a.at != next_back) return false;
          --next_back, now = -1;
      }
    }
    places = i64(kept.size());
    return next_back == -1;
  }
};

// The meta-step of algorithm.h by a schedule. A Task also saves and restores theta and the state of
// the rule, and knows when a step is run again.
template <class Task>
void checkpointed_meta_step(Task& task, const Schedule& schedule) {
  task.load();
  for (const Action& a : schedule.actions) {
    switch (a.kind) {
      case ActionKind::save:
        task.save(a.at, a.to);
        break;
      case ActionKind::restore:
        task.restore(a.at, a.to);
        break;
      case ActionKind::advance:
        for (i64 k = a.at; k < a.to; ++k) task.inner_step(k);
        break;
      case ActionKind::back:
        task.inner_step(a.at);
        if (a.at == task.steps() - 1) {
          task.write_adapted();
          task.start_sweep();
          task.query_gradient(task.steps());
          task.complete_lambda();
        }
        task.step_back(a.at);
        if (task.has_step_weights()) task.query_gradient(a.at);
    }
  }
  task.write_gradients();
  task.write_loss();
}

}  // namespace fm
