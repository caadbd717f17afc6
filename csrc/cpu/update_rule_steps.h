// The inner steps of a task by an update rule that is not plain SGD, and their adjoints.
#pragma once

#include "clipping.h"

namespace fm {

template <class S>
class InnerSteps;

template <class S>
class UpdateRuleSteps {
 public:
  UpdateRuleSteps(InnerSteps<S>& task, const Kernels<S>& kernels)
      : task_(task), kernels_(kernels), clipping_(task.plan_.options.rule, kernels, 1) {}

  // Where the gradient of step k goes.
  Sink<S>* sinks(i64 k, Sink<S>* sinks) {
    for (size_t p = 0; p < plan().params.size(); ++p) {
      sinks[p] = {};
      if (plan().params[p].adapted) sinks[p].to = gradient(k) + plan().params[p].offset;
    }
    return sinks;
  }

  // theta_{k+1} and the state after step k.
  void step(i64 k) {
    numbers_at(rule(), task_.call_.numbers, k, numbers_);
    if (rule().clips()) clipping_.forward(numbers_, each(k), factors(k), task_.at_ + plan().at.clipped);
    for (size_t p = 0; p < plan().params.size(); ++p) {
      if (!plan().params[p].adapted) continue;
      RuleCall<S> c = call(k, p);
      c.next = task_.own_theta(k + 1, p);
      for (int s = 0; s < rule().states(); ++s) c.next_state[s] = state(k + 1, s, p);
      kernels_.rule_step(c);
    }
  }

  void start_back() {
    S* const mbar = task_.at_ + plan().at.mbar;
    if (!plan().plain_rule() && plan().options.steps > 0)
      std::fill(mbar, mbar + rule().states() * plan().set_size, S(0));
  }

  // Back through step k but for what passes through the gradient: lambda becomes that of theta_k,
  // `direction` dJ/dg_k. Adds to the sums of the rates, null where not wanted, and of the numbers.
  void back(i64 k, S* const* lambda, S* const* rate_sums, S* number_sums) {
    numbers_at(rule(), task_.call_.numbers, k, numbers_);
    if (rule().clips()) clipping_.clip(numbers_, each(k), factors(k), task_.at_ + plan().at.clipped);
    double grads[RULE_NUMBERS] = {};
    double* const wanted = task_.call_.number_grads ? grads : nullptr;
    S* const v = task_.at_ + plan().at.direction;
    for (size_t p = 0; p < plan().params.size(); ++p) {
      const Param& param = plan().params[p];
      if (!param.adapted) continue;
      RuleCall<S> c = call(k, p);
      c.lambda = lambda[p], c.v = v + param.offset, c.number_grads = wanted;
      for (int s = 0; s < rule().states(); ++s)
        c.mbar[s] = task_.at_ + plan().at.mbar + s * plan().set_size + param.offset;
      // its place is free after the last step
      S* const by_rate = task_.at_ + plan().at.gradient + param.offset;
      c.alpha_grad = rate_sums[p] ? by_rate : nullptr;
      kernels_.rule_back(c);
      if (!rate_sums[p]) continue;
      if (param.rate_element) {
        kernels_.add(param.size, by_rate, rate_sums[p], rate_sums[p]);
      } else {
        double total = 0;
        for (i64 i = 0; i < param.size; ++i) total += double(by_rate[i]);
        rate_sums[p][0] += S(total);
      }
    }
    if (rule().clips()) clipping_.back(numbers_, each(k), factors(k), v, wanted);
    for (int i = 0; wanted && i < RULE_NUMBERS; ++i)
      if (rule().learned[i]) number_sums[i] += S(grads[i]);
  }

  // All states before step k, and how long they are.
  S* states(i64 k) {
    return task_.at_ + plan().at.rule_states + (plan().keeps_steps() ? k : k % 2) * states_size();
  }
  i64 states_size() const { return plan().plain_rule() ? 0 : rule().states() * plan().set_size; }

 private:
  const Plan& plan() const { return task_.plan_; }
  const Rule& rule() const { return plan().options.rule; }
  S* gradient(i64 k) { return task_.at_ + plan().at.rule_gradients + k * plan().at.rule_stride; }
  S* factors(i64 k) { return task_.at_ + plan().at.factors + (plan().keeps_steps() ? k : 0) * plan().lane; }
  S* state(i64 k, int s, size_t p) { return states(k) + s * plan().set_size + plan().params[p].offset; }
  const S* mask(size_t p) const { return task_.shared_.mask + plan().params[p].offset; }

  RuleCall<S> call(i64 k, size_t p) {
    const Param& param = plan().params[p];
    RuleCall<S> c{};
    c.rule = &rule(), c.n = param.size, c.k = k, c.numbers = numbers_;
    task_.rate(k, p, c.alpha, c.alphas);
    c.mask = mask(p);
    c.theta = task_.theta(k, p);
    c.g = (rule().clips() ? task_.at_ + plan().at.clipped : gradient(k)) + param.offset;
    for (int s = 0; s < rule().states(); ++s) c.state[s] = k > 0 ? state(k, s, p) : nullptr;
    return c;
  }
  // Calls body(n, mask, g, offset) for every adapted parameter, as `Clipping` asks for.
  auto each(i64 k) {
    return [this, k](const auto& body) {
      for (size_t p = 0; p < plan().params.size(); ++p) {
        const Param& param = plan().params[p];
        if (param.adapted) body(param.size, mask(p), gradient(k) + param.offset, param.offset);
      }
    };
  }

  InnerSteps<S>& task_;
  const Kernels<S>& kernels_;
  Clipping<S> clipping_;
  double numbers_[RULE_NUMBERS] = {};
};

}  // namespace fm
