// A task's loss by all threads of a block: an example each. The formulas are engine/loss_example.inl.
#pragma once

#include "args.h"
#include "pass.h"

namespace fm::cuda {

template <bool QUERY>
constexpr LossSpec LOSS = QUERY ? OPTIONS.query_loss : OPTIONS.loss;

// One number for each example, and 32 more.
FM_INLINE S* terms(S* workspace) { return memory<LAYOUT.terms.space>(workspace, 0, LAYOUT.terms.at); }

// The sum of a term for each example, in an order that depends on their number alone; the same for every thread. To be
// called by all threads after a barrier.
FM_INLINE double sum_of_terms(S* workspace, int examples) {
  S* const all = terms(workspace);
  double total = 0;
  if (examples <= 32) {
    for (int n = 0; n < examples; ++n) total += double(all[n]);
    return total;
  }
  for (int j = thread(); j < 32; j += step_threads()) {
    double part = 0;
    for (int n = j; n < examples; n += 32) part += double(all[n]);
    all[examples + j] = S(part);
  }
  barrier();
  for (int j = 0; j < 32; ++j) total += double(all[examples + j]);
  return total;
}

template <LossKind KIND>
constexpr auto loss_terms(double beta) {
  if constexpr (KIND == LossKind::mse)
    return SquaredError<S>{};
  else if constexpr (KIND == LossKind::l1)
    return AbsoluteError<S>{};
  else if constexpr (KIND == LossKind::smooth_l1)
    return SmoothL1<S>{S(beta)};
  else if constexpr (KIND == LossKind::huber)
    return Huber<S>{S(beta)};
  else
    return BinaryCrossEntropy<S>{};
}

// The gradient dz = scale * dL/dz and those of targets and example weights, or the tangents of all along rz; a term for
// each example. Whoever reads them waits for a barrier. VALUES_ONLY: the terms alone.
template <bool QUERY, bool TANGENT>
FM_INLINE void loss(S* workspace, const Slice& batch, int examples, const S* z, const S* rz, S* dz, S scale,
                    bool side) {
  constexpr LossSpec spec = LOSS<QUERY>;
  constexpr Value out = VALUES[OUTPUT];
  LossCall<S> l{};
  l.spec = spec;
  l.examples = examples, l.rows = out.rows, l.cols = out.cols, l.ld = out.ld;
  l.z = z, l.rz = rz, l.dz = dz, l.target = batch.y, l.weights = batch.weights;
  l.class_weights = batch.class_weights;
  l.dtarget = side ? batch.grad_y : nullptr;
  S* const dweights = side ? batch.grad_weights : nullptr;
  const S denominator = S(loss_denominator(l));
  for (int n = thread(); n < examples; n += step_threads()) {
    const S weight = l.weights ? l.weights[n] : S(1), factor = scale * weight / denominator;
    S term;
    if constexpr (spec.kind == LossKind::cross_entropy) {
      term = cross_entropy_example<S, TANGENT>(l, n, factor, factor);
    } else {
      constexpr S share = spec.sum ? S(1) : S(1) / S(out.rows * out.cols);
      term = elementwise_example<S, TANGENT>(l, loss_terms<spec.kind>(spec.beta), n, share, factor, factor);
    }
    terms(workspace)[n] = weight * term / denominator;
    if (dweights) dweights[n] += scale * term / denominator;
  }
  if constexpr (spec.normalise_sum && !spec.sum)
    if (dweights) {  // the same for all threads of a block
      barrier();
      const S value = S(sum_of_terms(workspace, examples));
      for (int n = thread(); n < examples; n += step_threads())
        dweights[n] -= scale / denominator * example_share(l, n) * value;
    }
}

}  // namespace fm::cuda
