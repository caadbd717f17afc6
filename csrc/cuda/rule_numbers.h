// Update rules for one element in the registers of a thread: what the formulas of
// shared/update_rules are told.
#pragma once

#include "args.h"

namespace fm::cuda::rules {

template <class T>
using Vec = T;
template <class T>
FM_INLINE T broadcast(T x) {
  return x;
}

constexpr RuleSpec RULE = OPTIONS.rule;
constexpr bool in(unsigned set, RuleNumber n) { return set >> int(n) & 1u; }
constexpr bool has(RuleNumber n) { return in(RULE.on, n); }
constexpr bool BY_NORM = has(RuleNumber::clip_norm), BY_VALUE = has(RuleNumber::clip_value);

// The numbers of a step, and what follows from them alone: made in double, since 1 - beta^(k+1) of
// float32 numbers would have few right digits.
template <class T>
struct RuleNumbers {
  static constexpr RuleSpec rule = RULE;
  T values[RULE_NUMBERS], rests[RULE_NUMBERS];
  T c1 = 1, c2 = 1;    // 1 - beta^(k+1)
  T dc1 = 0, dc2 = 0;  // their derivatives by beta
  T k;
  bool first;

  template <class A>
  FM_INLINE RuleNumbers(const A& args, int step) : k(T(step)), first(step == 0) {
    double beta[2] = {};
    FM_UNROLL
    for (int i = 0; i < RULE_NUMBERS; ++i) {
      const bool given = RULE.learned >> i & 1u;
      const double value = given ? double(args.learned[step * RULE_NUMBERS + i]) : args.numbers[i];
      values[i] = T(value), rests[i] = T(1 - value);
      if (i == int(RuleNumber::beta1)) beta[0] = value;
      if (i == int(RuleNumber::beta2)) beta[1] = value;
    }
    if constexpr (RULE.kind == RuleKind::adam || RULE.kind == RuleKind::adamw) {
      correct(beta[0], step, c1, dc1);
      correct(beta[1], step, c2, dc2);
    }
  }
  FM_INLINE T operator[](RuleNumber n) const { return values[int(n)]; }
  FM_INLINE T rest(RuleNumber n) const { return rests[int(n)]; }
  FM_INLINE bool has(RuleNumber n) const { return in(RULE.on, n); }

 private:
  static FM_INLINE void correct(double beta, int step, T& c, T& dc) {
    double power = 1, base = beta;  // beta^k
    for (int e = step; e > 0; e >>= 1, base *= base)
      if (e & 1) power *= base;
    c = T(1 - power * beta), dc = T(-double(step + 1) * power);
  }
};

// What a rule reads and gives of one element; `grads`: of all elements of a thread.
template <class T>
struct RuleElement {
  static constexpr bool learns = RULE.wanted != 0;
  T theta, g, alpha, state[MOST_RULE_STATES] = {};
  T next, next_state[MOST_RULE_STATES] = {};
  T lambda, mbar[MOST_RULE_STATES] = {}, v, alpha_grad;
  double grads[RULE_NUMBERS] = {};
  FM_INLINE void add(RuleNumber n, T grad) {
    if (in(RULE.wanted, n)) grads[int(n)] += double(grad);
  }
};

#include "../shared/update_rules/decay.inl"
// the rules build on it
#include "../shared/update_rules/adagrad.inl"
#include "../shared/update_rules/adam.inl"
#include "../shared/update_rules/lion.inl"
#include "../shared/update_rules/rmsprop.inl"
#include "../shared/update_rules/sgd.inl"

template <RuleKind KIND>
struct OfKind;
template <>
struct OfKind<RuleKind::sgd> {
  using type = SgdRule;
};
template <>
struct OfKind<RuleKind::adam> {
  using type = AdamRule<false>;
};
template <>
struct OfKind<RuleKind::adamw> {
  using type = AdamRule<true>;
};
template <>
struct OfKind<RuleKind::rmsprop> {
  using type = RmspropRule;
};
template <>
struct OfKind<RuleKind::adagrad> {
  using type = AdagradRule;
};
template <>
struct OfKind<RuleKind::lion> {
  using type = LionRule;
};
using OwnRule = typename OfKind<RULE.kind>::type;

}  // namespace fm::cuda::rules
