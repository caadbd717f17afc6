// Update rules of the inner loop, as both engines run them; fastmeta/update_rules/<rule>.py says what
// each computes. No standard header is included: kernels of one instruction set read this.
#pragma once

#include "../shared/types.h"
#include "../shared/update_rules.h"

namespace fm {

struct Rule {
  RuleKind kind = RuleKind::sgd;
  bool nesterov = false, centered = false;
  double numbers[RULE_NUMBERS] = {};
  bool on[RULE_NUMBERS] = {};       // there, and of any effect
  bool learned[RULE_NUMBERS] = {};  // a tensor of the call has it: one number, or one for each step
  bool has(RuleNumber n) const { return on[int(n)]; }
  bool learns() const {
    for (bool l : learned)
      if (l) return true;
    return false;
  }
  bool clips() const { return has(RuleNumber::clip_value) || has(RuleNumber::clip_norm); }
  // theta' = theta - alpha g, nothing more.
  bool plain() const {
    return kind == RuleKind::sgd && !has(RuleNumber::momentum) && !has(RuleNumber::weight_decay) &&
           !clips() && !learns();
  }
  // What passes from step to step: of adam the running means of g and of its square, of rmsprop
  // the mean square, the mean if centered, the buffer of momentum.
  int states() const {
    switch (kind) {
      case RuleKind::sgd:
        return has(RuleNumber::momentum);
      case RuleKind::adam:
      case RuleKind::adamw:
        return 2;
      case RuleKind::rmsprop:
        return 1 + centered + has(RuleNumber::momentum);
      default:
        return 1;
    }
  }
};

// One parameter at inner step k, n elements (whole vectors may be read and written).
template <class S>
struct RuleCall {
  const Rule* rule;
  i64 n, k;
  const double* numbers;  // of this step
  S alpha;
  const S* alphas;  // one for each element, or null
  const S* mask;    // null, or zero where there is only padding
  const S *theta, *g;
  const S* state[MOST_RULE_STATES];  // null at step 0
  // the step
  S* next;
  S* next_state[MOST_RULE_STATES];
  // its adjoint
  S* lambda;                  // dJ/dtheta', becomes dJ/dtheta but for what passes through g
  S* mbar[MOST_RULE_STATES];  // dJ/dstate', becomes dJ/dstate
  S* v;                       // dJ/dg
  S* alpha_grad;              // dJ/dalpha, for each element; or null
  double* number_grads;       // added to; or null
};

// The gradient of one task clipped: by value, then by a factor, one for each lane of a vector.
template <class S>
struct ClipCall {
  i64 n;
  const S* mask;
  const S* g;       // as it is
  S value;          // infinity: not by value
  const S* factor;  // [lanes]; null: 1
};

}  // namespace fm
