// Where a general update rule keeps what it needs of every inner step: sets of adapted parameters.
#pragma once

#include "pass.h"

namespace fm::cuda {

// Set `set` of an area of sets, at parameter P.
template <int P>
FM_INLINE S* set_in(const Area& area, S* workspace, int set) {
  const int at = area.at + set * LAYOUT.set + PARAMS[P].at - LAYOUT.frozen;
  // the areas of a rule are in one group, hence in one space
  return memory<LAYOUT.gradients.space>(workspace, PARAMS[P].rank, at);
}

// The gradient of step k as it is; without a sweep back that of one step at a time.
template <int P>
FM_INLINE S* rule_gradient(S* workspace, int k) {
  return set_in<P>(LAYOUT.gradients, workspace, OPTIONS.gradient ? k : 0);
}
// Part s of the state after step k. Of the last step nobody reads it: with a sweep back it is not
// kept.
template <int P>
FM_INLINE S* rule_state(S* workspace, int k, int s) {
  return set_in<P>(LAYOUT.states, workspace, (OPTIONS.gradient ? k : 0) * OPTIONS.rule.states + s);
}
// dJ/dstate, part s.
template <int P>
FM_INLINE S* rule_mbar(S* workspace, int s) {
  return set_in<P>(LAYOUT.mbar, workspace, s);
}
// The norm of the gradient of step k, clamped.
FM_INLINE S* rule_norm(S* workspace, int k) {
  return memory<LAYOUT.gradients.space>(workspace, 0, LAYOUT.norms.at) + k;
}

}  // namespace fm::cuda
