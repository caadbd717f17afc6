// What one launch brings: addresses in the user's memory, torch's layouts. A null pointer is an
// absent thing. Nothing but words of 8 bytes, in the order that fastmeta/backends/cuda/run.py
// writes them.
#pragma once

#include "memory.h"

namespace fm::cuda {

struct BatchArgs {
  const S* x;
  const void* y;  // S or i64
  const S *weights, *class_weights;
  S *grad_x, *grad_y, *grad_weights;
};

struct ParamArgs {
  const S* data;  // [*shape] or [T, *shape]
  const S* rate;  // [K or 1, T or 1, 1 or *shape]
  const S* seed;  // cotangent of theta_K, [T, *shape]
  S* adapted;     // theta_K, [T, *shape]
  S* grad;        // [T, *shape], of a parameter that every task has its own of
  S* rate_grad;   // like rate, of a rate that every task has its own of
};

// What a general update rule is told: its numbers, of which the learned ones are in a tensor [K,
// RULE_NUMBERS].
template <bool GENERAL>
struct RuleArgs {};
template <>
struct RuleArgs<true> {
  double numbers[RULE_NUMBERS];
  const S* learned;
};

struct Args : RuleArgs<OPTIONS.rule.general> {
  i64 tasks;
  S* workspace;  // [clusters, RANKS, LAYOUT.slab]
  S* partial;    // [T, LAYOUT.columns]: what is summed over tasks
  BatchArgs support, query;
  const S *task_weights, *output_grad;  // [T], [T, M, *out]
  S *task_losses, *output;              // [T], [T, M, *out]
  double momentum, weight_decay;
  ParamArgs params[PARAM_COUNT];
  double step_weights[OPTIONS.steps + 1];
};

// One task's share of a batch, of one step if every step has its own.
struct Slice {
  const S* x;
  const void* y;
  const S *weights, *class_weights;
  S *grad_x, *grad_y, *grad_weights;
};

FM_INLINE Slice slice(const BatchArgs& batch, i64 index, int examples, bool class_indices) {
  constexpr Value in = VALUES[0], out = VALUES[OUTPUT];
  const i64 w = index * examples, x = w * in.rows * in.cols, y = w * out.rows * out.cols;
  const void* target = nullptr;
  if (batch.y)
    target = class_indices ? static_cast<const void*>(static_cast<const i64*>(batch.y) + w * out.rows)
                           : static_cast<const void*>(static_cast<const S*>(batch.y) + y);
  return {batch.x + x,
          target,
          batch.weights ? batch.weights + w : nullptr,
          batch.class_weights,
          batch.grad_x ? batch.grad_x + x : nullptr,
          batch.grad_y ? batch.grad_y + y : nullptr,
          batch.grad_weights ? batch.grad_weights + w : nullptr};
}

}  // namespace fm::cuda
