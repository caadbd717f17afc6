// The meta-step of one task, in the order that the CPU's engine and the CUDA kernels share: the
// inner loop forward, the query loss, and the exact sweep back.
//
//   theta_{k+1} = theta_k - alpha_k u_k,  u_k = mu u_{k-1} + grad L(theta_k) + omega theta_k
//   lambda_K    = s_K grad Q(theta_K) [+ adapted_grad]
//   v           = mbar - alpha_k lambda_{k+1}
//   lambda_k    = lambda_{k+1} + H_k v + omega v + s_k grad Q(theta_k);   mbar = mu v
//   d alpha_k   = -lambda_{k+1} u_k
//
// That is SGD. Of another update rule v is dJ/dg_k and lambda_{k+1} becomes what its adjoint makes of
// it, before H_k v is added: docs/update-rules.md.
//
// The gradients of support inputs, targets and weights are what the same backward pass of tangents
// leaves at the inputs and at the loss.
// Source: docs/architecture.md, "The mathematics".
#pragma once

#ifdef __CUDACC__
#define FM_ALGORITHM __device__ __forceinline__
#define FM_ROLLED _Pragma("unroll 1")
#else
#define FM_ALGORITHM inline
#define FM_ROLLED
#endif

namespace fm {

// A Task says how many steps there are, whether gradients are wanted and whether the query loss of
// every step counts; it does each of the steps below.
template <class Task>
FM_ALGORITHM void meta_step(Task& task) {
  using Step = typename Task::Step;
  const Step steps = task.steps();
  task.load();
  FM_ROLLED
  for (Step k = 0; k < steps; ++k) task.inner_step(k);
  task.write_adapted();
  if (task.has_gradient()) {
    task.start_sweep();
    task.query_gradient(steps);
    task.complete_lambda();
    FM_ROLLED
    for (Step k = steps - 1; k >= 0; --k) {
      task.step_back(k);
      if (task.has_step_weights()) task.query_gradient(k);
    }
    task.write_gradients();
  } else {
    task.query_values();
  }
  task.write_loss();
}

}  // namespace fm
