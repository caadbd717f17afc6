// The update rules of a task, or of the tasks of all lanes, that are not plain SGD.
#pragma once

#include "../clipping.h"
#include "group_passes.h"

namespace fm::machine {

template <class S>
class GroupRules : protected GroupPasses<S> {
 public:
  using State = GroupPasses<S>;
  using State::State;

 protected:
  using State::add_rate_gradient;
  using State::at_;
  using State::call_;
  using State::collect;
  using State::kernels_;
  using State::L_;
  using State::m_;
  using State::memory;
  using State::pack;
  using State::rates;
  using State::rule_gradient;
  using State::rule_once_done_;
  using State::run_stage;
  using State::sums_;
  using State::theta;
  using State::unpack;
  using State::w_;

  // ---- update rules that are not plain SGD
  S* rule_state(i64 k, int s) {
    return w_ + at_.rule_states + (m_.keeps_steps() ? k : k % 2) * at_.state_stride + s * at_.rule_stride;
  }
  S* factors(i64 k) { return w_ + at_.factors + (m_.keeps_steps() ? k : 0) * Clipping<S>::WIDEST; }
  // Calls body(n, mask, g, offset) for every adapted parameter, as `Clipping` asks for.
  auto each(i64 k) {
    return [this, k](const auto& body) {
      for (const Adapted& a : m_.adapted)
        body(a.size * L_, static_cast<const S*>(nullptr), rule_gradient(k) + a.offset * L_, a.offset * L_);
    };
  }
  RuleCall<S> rule_call(i64 k, size_t p) {
    const i64 from = m_.adapted[p].offset * L_, n = m_.adapted[p].size * L_;
    RuleCall<S> c{};
    c.rule = &m_.rule, c.n = n, c.k = k, c.numbers = numbers_;
    c.alphas = rates(k, p, c.alpha);
    if (c.alphas && c.alphas != w_ + at_.alphas) {  // the caller's memory has no whole vectors
      std::copy_n(c.alphas, n, w_ + at_.alphas);
      c.alphas = w_ + at_.alphas;
    }
    c.theta = theta(k) + from;
    c.g = (m_.rule.clips() ? w_ + at_.clipped : rule_gradient(k)) + from;
    for (int s = 0; s < m_.rule.states(); ++s) c.state[s] = k > 0 ? rule_state(k, s) + from : nullptr;
    return c;
  }
  void rule_step(i64 k) {
    if (m_.traced_rule.present) return traced_step(k);
    numbers_at(m_.rule, call_.numbers, k, numbers_);
    const Clipping<S> clipping(m_.rule, kernels_, L_);
    if (m_.rule.clips()) clipping.forward(numbers_, each(k), factors(k), w_ + at_.clipped);
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      const i64 from = m_.adapted[p].offset * L_;
      RuleCall<S> c = rule_call(k, p);
      c.next = theta(k + 1) + from;
      for (int s = 0; s < m_.rule.states(); ++s) c.next_state[s] = rule_state(k + 1, s) + from;
      kernels_.rule_step(c);
    }
  }
  // Back through step k but for what passes through the gradient: `direction` becomes dJ/dg_k.
  void rule_back(i64 k) {
    if (m_.traced_rule.present) return traced_back(k);
    numbers_at(m_.rule, call_.numbers, k, numbers_);
    const Clipping<S> clipping(m_.rule, kernels_, L_);
    if (m_.rule.clips()) clipping.clip(numbers_, each(k), factors(k), w_ + at_.clipped);
    double grads[RULE_NUMBERS] = {};
    double* const wanted = call_.number_grads ? grads : nullptr;
    S* const by_rate = w_ + at_.updates;
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      const i64 from = m_.adapted[p].offset * L_;
      RuleCall<S> c = rule_call(k, p);
      c.lambda = w_ + at_.lambda + from, c.v = w_ + at_.direction + from, c.number_grads = wanted;
      for (int s = 0; s < m_.rule.states(); ++s) c.mbar[s] = w_ + at_.mbar + s * at_.rule_stride + from;
      c.alpha_grad = m_.wants_rates ? by_rate + from : nullptr;
      kernels_.rule_back(c);
      if (m_.wants_rates) add_rate_gradient(k, p, [&](i64 at) { return double(by_rate[at]); });
    }
    if (m_.rule.clips()) clipping.back(numbers_, each(k), factors(k), w_ + at_.direction, wanted);
    for (int i = 0; wanted && i < RULE_NUMBERS; ++i)
      if (m_.rule.learned[i]) sums_[at_.sum_numbers + k * RULE_NUMBERS + i] += S(grads[i]);
  }

  // ---- rules of the user's own, which are programs too: in go theta, g, the rates of all elements and
  // the state, out come theta' and the state; from dJ/dtheta' and dJ/dstate' the last stage makes those
  // by theta, g, the rates and the state
  void load_state() {
    for (size_t i = 0; i < m_.traced_rule.entries.size(); ++i) {
      const Entry& e = m_.traced_rule.entries[i];
      pack(static_cast<const S*>(call_.state[i].data), e.size, e.size, rule_state(0, 0) + e.offset * L_);
    }
  }
  void write_state_gradient() {
    for (size_t i = 0; i < m_.traced_rule.entries.size(); ++i) {
      const Entry& e = m_.traced_rule.entries[i];
      if (call_.state[i].grad) unpack(w_ + at_.mbar + e.offset * L_, e.size, e.size, call_.state[i].grad);
    }
  }
  void load_rule(i64 k) {
    const i64 n = m_.theta * L_;
    S* const in = w_ + at_.rule_in;
    std::copy_n(theta(k), n, in);
    std::copy_n(rule_gradient(k), n, in + n);
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      const i64 from = m_.adapted[p].offset * L_, size = m_.adapted[p].size * L_;
      S alpha = 0;
      const S* const alphas = rates(k, p, alpha);
      if (alphas)
        std::copy_n(alphas, size, in + 2 * n + from);
      else
        std::fill_n(in + 2 * n + from, size, alpha);
    }
    std::copy_n(rule_state(k, 0), m_.state * L_, in + 3 * n);
  }
  void run_rule(i64 k) {
    if (!std::exchange(rule_once_done_, true)) run_stage(2, 0, k);
    run_stage(2, 1, k);
  }
  void traced_step(i64 k) {
    load_rule(k);
    run_rule(k);
    const S* const out = w_ + at_.rule_out;
    std::copy_n(out, m_.theta * L_, theta(k + 1));
    std::copy_n(out + m_.theta * L_, m_.state * L_, rule_state(k + 1, 0));
  }
  void traced_back(i64 k) {
    if (!m_.checkpointed()) load_rule(k);  // else the step has just been run
    if (!m_.store && !m_.checkpointed()) run_rule(k);
    const i64 n = m_.theta * L_, s = m_.state * L_;
    S *const lambda = w_ + at_.lambda, *const mbar = w_ + at_.mbar, *const given = w_ + at_.rule_cotangents;
    const S* const found = w_ + at_.rule_found;
    std::copy_n(lambda, n, given), std::copy_n(mbar, s, given + n);
    run_stage(2, 2, k);
    std::copy_n(found, n, lambda), std::copy_n(found + n, n, w_ + at_.direction);
    std::copy_n(found + 3 * n, s, mbar);
    for (size_t p = 0; m_.wants_rates && p < m_.adapted.size(); ++p)
      add_rate_gradient(k, p, [&](i64 at) { return double(found[2 * n + at]); });
    collect(2, k, S(1));
  }

 private:
  double numbers_[RULE_NUMBERS] = {};  // of the step at hand
};

}  // namespace fm::machine
