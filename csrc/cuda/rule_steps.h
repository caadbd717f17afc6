// The inner steps of a task by a general update rule, and their adjoints. A thread works on the same
// elements of the parameters in each of them.
#pragma once

#include "rates.h"
#include "rule_numbers.h"
#include "task.h"

namespace fm::cuda {

// Slots of sums behind those of the rates: one for each number whose gradient is wanted, in the
// order of RuleNumber, and one for the norm of the gradient.
constexpr int wanted_before(int number) {
  int found = 0;
  for (int i = 0; i < number; ++i) found += OPTIONS.rule.wanted >> i & 1u;
  return found;
}
constexpr int WANTED_NUMBERS = wanted_before(RULE_NUMBERS), NORM_SLOT = RATE_SLOTS + WANTED_NUMBERS;

// A is `Args`, which a template alone need not look into where the rule is not a general one.
template <class A>
class RuleSteps {
 public:
  FM_INLINE RuleSteps(const A& args, S* workspace, int k, i64 t)
      : args_(args), at_(workspace), k_(k), t_(t), numbers_(args, k) {}

  // theta_{k+1} and the state after step k; theta is there for all threads then.
  FM_INLINE void step() const {
    const Clip clip = clipping();
    for_adapted([&](auto index, int r, int c, int at, S shared_rate) {
      constexpr int P = decltype(index)::value;
      Element e;
      read<P>(e, r, c, at, clip, shared_rate);
      Rule::step(numbers_, e);
      theta<P>(at_, k_ + 1)[at] = e.next;
      if constexpr (LAYOUT.checkpoints >= 0)
        if (k_ + 1 < OPTIONS.steps) checkpoint<P>(at_, k_ + 1)[at] = e.next;
      if (OPTIONS.gradient && k_ + 1 == OPTIONS.steps) return;
      FM_UNROLL
      for (int s = 0; s < OPTIONS.rule.states; ++s) rule_state<P>(at_, k_, s)[at] = e.next_state[s];
    });
    barrier();
  }

  // Back through step k but for what passes through the gradient: lambda becomes that of theta_k,
  // the direction dJ/dg_k, for all threads; the gradients of rates and numbers.
  FM_INLINE void back(const Sink& to) const {
    Clip clip{S(1), S(0), S(0)};
    if constexpr (rules::BY_NORM) clip = clip_of(*rule_norm(at_, k_));
    Element e;  // its `grads` are sums
    double dot = 0;
    for_adapted([&](auto index, int r, int c, int at, S shared_rate) {
      constexpr int P = decltype(index)::value;
      read<P>(e, r, c, at, clip, shared_rate);
      e.lambda = lambda<P>(at_)[at];
      FM_UNROLL
      for (int s = 0; s < OPTIONS.rule.states; ++s)
        e.mbar[s] = k_ < OPTIONS.steps - 1 ? rule_mbar<P>(at_, s)[at] : S(0);
      Rule::back(numbers_, e);
      lambda<P>(at_)[at] = e.lambda;
      direction<P>(at_)[at] = e.v;
      FM_UNROLL
      for (int s = 0; s < OPTIONS.rule.states; ++s) rule_mbar<P>(at_, s)[at] = e.mbar[s];
      if constexpr (OPTIONS.wants_rates) to.add_rate_gradient<P>(r, c, one(e.alpha_grad));
      if constexpr (rules::BY_NORM) dot += double(e.v * clamped(rule_gradient<P>(at_, k_)[at]));
    });
    if constexpr (CLIPS_BACK) clip_back(clip, dot, e);
    if constexpr (WANTED_NUMBERS > 0) finish_numbers(e);
    if constexpr (OPTIONS.wants_rates) finish_rates(to);
    barrier();
  }

 private:
  using Rule = rules::OwnRule;
  using Element = rules::RuleElement<S>;
  // What the clamped gradient is multiplied by; of the adjoint: its norm, and what dJ/dg has of it.
  struct Clip {
    S factor, norm, along;
  };
  static constexpr bool CLIPS_BACK =
      (rules::BY_NORM || rules::BY_VALUE) &&
      (OPTIONS.second_order || rules::in(OPTIONS.rule.wanted, RuleNumber::clip_norm) ||
       rules::in(OPTIONS.rule.wanted, RuleNumber::clip_value));

  // Calls body(parameter, row, column, element, its one rate) for every element of every adapted
  // parameter.
  template <class Body>
  FM_INLINE void for_adapted(const Body& body) const {
    for_params([&](auto index) {
      constexpr int P = decltype(index)::value;
      constexpr Param p = PARAMS[P];
      if constexpr (p.adapted) {
        const S shared_rate = read_only(rate<P>(args_, k_, t_));
        for (int i = thread(); i < p.numel(); i += step_threads())
          body(index, i / p.cols, i % p.cols, i / p.cols * p.ld + i % p.cols, shared_rate);
      }
    });
  }

  template <int P>
  FM_INLINE void read(Element& e, int r, int c, int at, const Clip& clip, S shared_rate) const {
    e.theta = theta<P>(at_, k_)[at];
    e.g = clamped(rule_gradient<P>(at_, k_)[at]);
    if constexpr (rules::BY_NORM) e.g *= clip.factor;
    e.alpha = PARAMS[P].rate_element ? element_rate<P>(args_, k_, t_, r, c) : shared_rate;
    FM_UNROLL
    for (int s = 0; s < OPTIONS.rule.states; ++s)
      e.state[s] =
          k_ > 0 ? rule_state<P>(at_, k_ - 1, s)[at] : numbers_[RuleNumber::initial_accumulator_value];
  }

  // ---- clipping: g1 = clamp(g, -value, value), g2 = factor g1, factor = min(1, norm / (|g1| + 1e-6))
  FM_INLINE S clamped(S g) const {
    if constexpr (rules::BY_VALUE) {
      const S most = numbers_[RuleNumber::clip_value];
      return g > most ? most : g < -most ? -most : g;
    }
    return g;
  }
  FM_INLINE Clip clip_of(S norm) const {
    const S factor = numbers_[RuleNumber::clip_norm] / (norm + S(1e-6));
    return {factor > S(1) ? S(1) : factor, norm, S(0)};
  }
  FM_INLINE Clip clipping() const {
    if constexpr (!rules::BY_NORM) return {S(1), S(0), S(0)};
    double squares = 0;
    for_adapted([&](auto index, int, int, int at, S) {
      const S g1 = clamped(rule_gradient<decltype(index)::value>(at_, k_)[at]);
      squares += double(g1 * g1);
    });
    const S norm = S(sqrt_(sum(squares)));
    if (OPTIONS.gradient && thread() == 0) *rule_norm(at_, k_) = norm;
    return clip_of(norm);
  }
  // The sum over all threads, for each of them.
  FM_INLINE double sum(double own) const {
    rate_sum(at_, NORM_SLOT, thread()) = own;
    barrier();
    add_threads(at_, NORM_SLOT);
    barrier();
    return total_of(at_, NORM_SLOT);
  }
  // The direction, as yet dJ/dg2, becomes dJ/dg.
  FM_INLINE void clip_back(Clip clip, double dot, Element& e) const {
    if constexpr (rules::BY_NORM) {
      const S all = S(sum(dot)), most = numbers_[RuleNumber::clip_norm], below = clip.norm + S(1e-6);
      if (most / below <= S(1)) {
        // at a norm of zero PyTorch's derivative is zero
        if (clip.norm > S(0)) clip.along = -most / (below * below) / clip.norm * all;
        if (thread() == 0) e.add(RuleNumber::clip_norm, all / below);
      }
    }
    for_adapted([&](auto index, int, int, int at, S) {
      constexpr int P = decltype(index)::value;
      const S g = rule_gradient<P>(at_, k_)[at];
      S v = direction<P>(at_)[at];
      if constexpr (rules::BY_NORM) v = clip.factor * v + clip.along * clamped(g);
      if constexpr (rules::BY_VALUE) {
        const S most = numbers_[RuleNumber::clip_value];
        if (g > most || g < -most) {
          e.add(RuleNumber::clip_value, g > most ? v : -v);
          v = S(0);
        }
      }
      direction<P>(at_)[at] = v;
    });
  }

  // ---- gradients of numbers
  FM_INLINE void finish_numbers(const Element& e) const {
    FM_UNROLL
    for (int n = 0; n < RULE_NUMBERS; ++n)
      if (OPTIONS.rule.wanted >> n & 1u) rate_sum(at_, RATE_SLOTS + wanted_before(n), thread()) = e.grads[n];
    barrier();
    for (int slot = 0; slot < WANTED_NUMBERS; ++slot) add_threads(at_, RATE_SLOTS + slot);
    barrier();
    for (int slot = thread(); slot < WANTED_NUMBERS; slot += step_threads())
      args_.partial[t_ * LAYOUT.columns + OPTIONS.rule.column + k_ * WANTED_NUMBERS + slot] =
          S(total_of(at_, RATE_SLOTS + slot));
  }

  const A& args_;
  S* at_;
  int k_;
  i64 t_;
  rules::RuleNumbers<S> numbers_;
};

}  // namespace fm::cuda
