// The update rules of the inner loop and their numbers, by name; fastmeta/update_rules/<rule>.py says
// what each computes.
#pragma once

namespace fm {

// clang-format off
#define FM_RULE_KINDS(F) F(sgd) F(adam) F(adamw) F(rmsprop) F(adagrad) F(lion)
// The numbers of all rules, by the names that fastmeta/update_rules gives them.
#define FM_RULE_NUMBERS(F)                                              \
  F(momentum) F(dampening) F(weight_decay) F(beta1) F(beta2) F(alpha)   \
  F(eps) F(eps_root) F(lr_decay) F(initial_accumulator_value)           \
  F(clip_value) F(clip_norm)

#define FM_NAME(name) name,
enum class RuleKind : int { FM_RULE_KINDS(FM_NAME) };
enum class RuleNumber : int { FM_RULE_NUMBERS(FM_NAME) count };
#undef FM_NAME
// clang-format on
constexpr int RULE_NUMBERS = int(RuleNumber::count);
constexpr int MOST_RULE_STATES = 3;

}  // namespace fm
