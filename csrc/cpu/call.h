// What one call brings: addresses in the user's memory, torch's layouts. A null pointer is an
// absent thing.
#pragma once

#include <vector>

#include "plan.h"

namespace fm {

// Support or query sets of all tasks: x [T, (K,) N, *in] and so on, dense.
template <class S>
struct BatchPointers {
  const S* x = nullptr;
  const void* y = nullptr;  // S or i64
  const S* weights = nullptr;
  const S* class_weights = nullptr;
  S *grad_x = nullptr, *grad_y = nullptr, *grad_weights = nullptr;
};

template <class S>
struct ParamPointers {
  const S* data = nullptr;          // [*shape] or [T, *shape]
  const S* rate = nullptr;          // [K or 1, T or 1, 1 or *shape]
  const S* adapted_grad = nullptr;  // [T, *shape]
  S* adapted = nullptr;             // [T, *shape]
  S* grad = nullptr;                // like data
  S* rate_grad = nullptr;           // like rate
};

template <class S>
struct Call {
  i64 tasks = 0;
  std::vector<ParamPointers<S>> params;
  BatchPointers<S> support, query;
  std::vector<double> step_weights;  // K + 1, or empty: the last one only
  const S* numbers = nullptr;        // [K, RULE_NUMBERS]: those of the update rule that are learned
  S* number_grads = nullptr;         // the same
  const S* task_weights = nullptr;   // [T]
  const S* output_grad = nullptr;    // [T, M, *out]
  S* task_losses = nullptr;          // [T]
  S* loss = nullptr;                 // (): sum_t c_t task_losses[t]
  S* output = nullptr;               // [T, M, *out]
};

}  // namespace fm
