// Which code a kind of rule has.
template <class S, bool BACK, class R>
FM_INLINE void run_rule_of(const RuleCall<S>& c) {
  if constexpr (BACK)
    rule_back_of<S, R>(c);
  else
    rule_step_of<S, R>(c);
}
template <class S, bool BACK>
void run_rule(const RuleCall<S>& c) {
  switch (c.rule->kind) {
    case RuleKind::sgd:
      return run_rule_of<S, BACK, SgdRule>(c);
    case RuleKind::adam:
      return run_rule_of<S, BACK, AdamRule<false>>(c);
    case RuleKind::adamw:
      return run_rule_of<S, BACK, AdamRule<true>>(c);
    case RuleKind::rmsprop:
      return run_rule_of<S, BACK, RmspropRule>(c);
    case RuleKind::adagrad:
      return run_rule_of<S, BACK, AdagradRule>(c);
    case RuleKind::lion:
      return run_rule_of<S, BACK, LionRule>(c);
  }
}
