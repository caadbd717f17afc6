// A task's loss by all threads of a block: an example each. The formulas are
// shared/loss_example.inl.
#pragma once

#include "args.h"
#include "pass.h"

namespace fm::cuda {

template <bool QUERY>
constexpr LossSpec LOSS = QUERY ? OPTIONS.query_loss : OPTIONS.loss;

// Numbers of examples, and 32 more; where cross-entropy has several positions an example, shares of
// these and 32 more, and a loss for each.
FM_INLINE S* terms(S* workspace) { return memory<LAYOUT.terms.space>(workspace, 0, LAYOUT.terms.at); }
constexpr int MOST = OPTIONS.support > OPTIONS.query ? OPTIONS.support : OPTIONS.query;
FM_INLINE S* position_shares(S* workspace) { return terms(workspace) + MOST + 32; }
FM_INLINE S* position_losses(S* workspace) {
  return position_shares(workspace) + MOST * VALUES[OUTPUT].rows + 32;
}

// The sum of so many terms, in an order that depends on their number alone; the same for every
// thread. To be called by all threads after a barrier.
FM_INLINE double sum_of(S* all, int count) {
  double total = 0;
  if (count <= 32) {
    for (int n = 0; n < count; ++n) total += double(all[n]);
    return total;
  }
  for (int j = thread(); j < 32; j += step_threads()) {
    double part = 0;
    for (int n = j; n < count; n += 32) part += double(all[n]);
    all[count + j] = S(part);
  }
  barrier();
  for (int j = 0; j < 32; ++j) total += double(all[count + j]);
  return total;
}
FM_INLINE double sum_of_terms(S* workspace, int examples) { return sum_of(terms(workspace), examples); }

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
  else {
    static_assert(KIND == LossKind::bce_with_logits, "a loss that has no terms for each element");
    return BinaryCrossEntropy<S>{};
  }
}

// `loss_denominator` of several positions an example, shared out among the threads.
template <bool QUERY>
FM_INLINE double denominator_of_positions(S* workspace, const LossCall<S>& l) {
  if constexpr (!LOSS<QUERY>.class_indices || LOSS<QUERY>.sum) {
    return loss_denominator(l);
  } else {
    S* const shares = position_shares(workspace);
    const bool weighted = LOSS<QUERY>.normalise_sum && l.weights;
    const int rows = int(l.rows), count = int(l.examples) * rows;
    for (int row = thread(); row < count; row += step_threads())
      shares[row] = position_share(l, row) * (weighted ? l.weights[row / rows] : S(1));
    barrier();
    const double total = sum_of(shares, count);
    return weightless(l) ? -log_(0.0) : total;
  }
}

// The gradient dz = scale * dL/dz and those of targets and example weights, or the tangents of all
// along rz; a term for each example. Whoever reads them waits for a barrier. VALUES_ONLY: the terms
// alone.
template <bool QUERY, bool TANGENT>
FM_INLINE void loss(S* workspace, const Slice& batch, int examples, const S* z, const S* rz, S* dz, S scale,
                    bool side) {
  constexpr LossSpec spec = LOSS<QUERY>;
  constexpr Value out = VALUES[OUTPUT];
  LossCall<S> l{};
  l.spec = spec;
  l.examples = examples, l.rows = out.rows, l.cols = out.cols, l.ld = out.ld, l.channels = OUTPUT_CHANNELS;
  l.z = z, l.rz = rz, l.dz = dz, l.target = batch.y, l.weights = batch.weights;
  l.class_weights = batch.class_weights;
  l.dtarget = side ? batch.grad_y : nullptr;
  S* const dweights = side ? batch.grad_weights : nullptr;
  constexpr bool POSITIONS = spec.kind == LossKind::cross_entropy && out.rows > 1;
  S denominator;
  if constexpr (POSITIONS) {
    denominator = S(denominator_of_positions<QUERY>(workspace, l));
    for (int row = thread(); row < examples * out.rows; row += step_threads()) {
      const S weight = l.weights ? l.weights[row / out.rows] : S(1), factor = scale * weight / denominator;
      position_losses(workspace)[row] = cross_entropy_position<S, TANGENT, true>(l, row, factor, factor);
    }
    barrier();
  } else {
    denominator = S(loss_denominator(l));
  }
  for (int n = thread(); n < examples; n += step_threads()) {
    const S weight = l.weights ? l.weights[n] : S(1), factor = scale * weight / denominator;
    S term;
    if constexpr (POSITIONS) {
      term = 0;
      for (int row = n * out.rows; row < (n + 1) * out.rows; ++row) term += position_losses(workspace)[row];
    } else if constexpr (spec.kind == LossKind::cross_entropy) {
      term = cross_entropy_position<S, TANGENT, false>(l, n, factor, factor);
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
        dweights[n] -= scale / denominator * S(example_share(l, n)) * value;
    }
}

}  // namespace fm::cuda
