// Which code a kind of rule has.
template <class S, class R, int STATES, bool BACK>
FM_INLINE void run_rule_of(const RuleCall<S>& c) {
  if constexpr (!BACK)
    rule_step_of<S, R, STATES>(c);
  else if (c.number_grads)
    rule_back_of<S, R, STATES, true>(c);
  else
    rule_back_of<S, R, STATES, false>(c);
}
template <class S, bool BACK>
void run_rule(const RuleCall<S>& c) {
  const int states = c.rule->states();
  switch (c.rule->kind) {
    case RuleKind::sgd:
      return states ? run_rule_of<S, SgdRule, 1, BACK>(c) : run_rule_of<S, SgdRule, 0, BACK>(c);
    case RuleKind::adam:
      return run_rule_of<S, AdamRule<false>, 2, BACK>(c);
    case RuleKind::adamw:
      return run_rule_of<S, AdamRule<true>, 2, BACK>(c);
    case RuleKind::rmsprop:
      return states == 3   ? run_rule_of<S, RmspropRule, 3, BACK>(c)
             : states == 2 ? run_rule_of<S, RmspropRule, 2, BACK>(c)
                           : run_rule_of<S, RmspropRule, 1, BACK>(c);
    case RuleKind::adagrad:
      return run_rule_of<S, AdagradRule, 1, BACK>(c);
    case RuleKind::lion:
      return run_rule_of<S, LionRule, 1, BACK>(c);
  }
}
