// The meta-step of traced programs: what a call over all tasks needs, besides the programs.
#pragma once

#include <vector>

#include "../checkpoints.h"
#include "../update_rules.h"
#include "program.h"

namespace fm::machine {

// An adapted parameter: its place in theta, and how its rates are laid out.
struct Adapted {
  i64 offset, size;
  bool per_task, rate_element, rate_per_task, rate_per_step;
};
// An adapted parameter of `rows` rows of which a task needs `most` at most: in theta there are only
// those, one after the other.
struct Table {
  i64 adapted;  // its number among the adapted parameters
  i64 rows, width, most;
};
// Indices of a table's rows: those at `positions` of a set's integers are written from `place` on,
// as places in theta's rows.
struct Numbered {
  i64 table;
  bool wraps;
  i64 place;
  std::vector<i64> positions;
};
// What does not adapt: other parameters, buffers, weights of losses, parameters of the rule.
struct Fixed {
  i64 offset, size;
  bool per_task;
  i64 grad[3];  // its gradient's place in each program's results, -1 for none
};
// A tensor of a set: inputs, targets, example weights.
struct Entry {
  i64 offset, size;
  bool integer;
  i64 grad;  // as above, -1 for none
};

struct Set {
  bool present = false;
  Program program;
  std::vector<Entry> entries;
  std::vector<Numbered> numbered;
};

// Up to whole vectors, as everything in a space begins.
inline i64 rounded(i64 n) { return (n + SLACK - 1) / SLACK * SLACK; }

struct Machine {
  bool is_double = false;
  i64 lanes = 1;  // tasks side by side
  i64 steps = 0;
  bool second_order = true, store = true, gradient = false, wants_rates = false, per_step = false;
  std::vector<double> support_step_weights;  // K, or empty: support losses are not in the objective
  Schedule schedule;
  Rule rule;
  bool query_loss = false, output_grad = false;
  i64 theta = 0, fixed = 0, output = 0;  // elements
  i64 state = 0, rule_fixed = 0;         // of a traced rule, and where its parameters begin in `fixed`
  std::vector<Adapted> adapted;
  std::vector<Fixed> others;
  std::vector<Table> tables;  // come last in theta
  Set support, query;
  Set traced_rule;                   // of the user's own; its entries are the state before the first step
  std::vector<double> constants[3];  // of the three programs
  // Of each adapted parameter: whether a product of the support set's program completes its
  // gradient (0) and its Hessian-vector product (1), and can do what follows at once.
  std::vector<bool> at_once[2];

  // Elements of the caller's parameter.
  i64 own_size(size_t p) const {
    for (const Table& t : tables)
      if (t.adapted == i64(p)) return t.rows * t.width;
    return adapted[p].size;
  }
  bool is_table(size_t p) const {
    for (const Table& t : tables)
      if (t.adapted == i64(p)) return true;
    return false;
  }
  // Elements of theta before the tables.
  i64 before_tables() const { return tables.empty() ? theta : adapted[tables[0].adapted].offset; }
  bool checkpointed() const { return !schedule.empty(); }
  // Whether what the steps leave for the way back is there for all of them.
  bool keeps_steps() const { return gradient && !checkpointed(); }
  // Whether the way back over a step runs the last stage of its program.
  bool runs_back() const { return second_order || !support_step_weights.empty(); }
  bool plain_rule() const { return rule.plain() && !traced_rule.present; }
  bool learns_numbers() const { return gradient && rule.learns(); }
  // Once all else is known.
  void find_updates();
};

template <class S>
struct AdaptedCall {
  const S* data = nullptr;          // [size] or [T, size]
  const S* rate = nullptr;          // [K or 1, T or 1, 1 or size]
  const S* adapted_grad = nullptr;  // [T, size]
  S* adapted = nullptr;             // [T, size]
  S* grad = nullptr;                // like data
  S* rate_grad = nullptr;           // like rate
};
template <class S>
struct FixedCall {
  const S* data = nullptr;  // [size] or [T, size]
  S* grad = nullptr;
};
template <class S>
struct EntryCall {
  const void* data = nullptr;  // [T, (K,) size] of S or i64
  S* grad = nullptr;           // the same
};

template <class S>
struct MachineCall {
  i64 tasks = 0;
  std::vector<AdaptedCall<S>> adapted;
  std::vector<FixedCall<S>> others;
  std::vector<EntryCall<S>> support, query, state;
  std::vector<double> step_weights;  // K + 1, or empty: the last one only
  const S* numbers = nullptr;        // [K, RULE_NUMBERS]: those of the update rule that are learned
  S* number_grads = nullptr;         // the same
  const S* task_weights = nullptr;   // [T]
  const S* output_grad = nullptr;    // [T, output]
  S* task_losses = nullptr;          // [T]
  S* loss = nullptr;                 // ()
  S* output = nullptr;               // [T, output]
};

enum class Outcome : int { ok = 0, bad_index = 1 };

template <class S>
Outcome run(const Machine& machine, const MachineCall<S>& call, int threads, bool poison);

// Elements of scratch memory of one worker.
i64 workspace(const Machine& machine);

// Where the weights of example 0 stand in SEED: the loss's cotangent, then the output's.
constexpr i64 SEED_OUTPUT = 16;
// OUTPUT: the loss, then the output.
constexpr i64 OUTPUT_START = 16;

}  // namespace fm::machine
