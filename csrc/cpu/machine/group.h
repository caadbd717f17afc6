// A task, or the tasks of all lanes, taken through the steps of algorithm.h by programs.
#pragma once

#include "../../shared/algorithm.h"
#include "group_rules.h"

namespace fm::machine {

template <class S>
class Group : private GroupRules<S> {
 public:
  using State = GroupRules<S>;
  using State::State;

  // Tasks first .. first + count - 1; false where an index was out of range.
  bool run(i64 first, i64 count, S* sums) {
    first_ = first, count_ = count, sums_ = sums, bad_index_ = false, reached_ = 0;
    if (m_.checkpointed())
      checkpointed_meta_step(*this, m_.schedule);
    else
      meta_step(*this);
    return !bad_index_;
  }

  // ---- what algorithm.h asks for
  using Step = i64;
  i64 steps() const { return m_.steps; }
  bool has_gradient() const { return m_.gradient; }
  bool has_step_weights() const { return !call_.step_weights.empty(); }

  void load() {
    std::fill(losses_, losses_ + MOST_LANES, 0.0);
    once_done_ = false;
    if (own_theta_) std::copy_n(shared_ + at_.shared_theta, m_.theta * L_, theta(0));
    for (size_t p = 0; p < m_.adapted.size(); ++p)
      if (m_.adapted[p].per_task && !m_.is_table(p))
        pack(call_.adapted[p].data, m_.adapted[p].size, m_.adapted[p].size,
             theta(0) + m_.adapted[p].offset * L_);
    if (own_fixed_) {
      std::copy_n(shared_ + at_.shared_fixed, m_.fixed * L_, w_ + at_.fixed);
      for (size_t p = 0; p < m_.others.size(); ++p)
        if (m_.others[p].per_task)
          pack(call_.others[p].data, m_.others[p].size, m_.others[p].size,
               w_ + at_.fixed + m_.others[p].offset * L_);
    }
    rule_once_done_ = false;
    load_state();
    if (!m_.per_step && m_.support.present && m_.steps > 0) load_set(0, 0);
    if (m_.query.present) load_set(1, 0);
    load_tables();
  }

  void inner_step(i64 k) {
    if (!m_.gradient) query_value(k);  // theta_k does not stay
    if (m_.per_step) load_set(0, k);
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      S alpha = 0;
      if (m_.at_once[0][p]) rates(k, p, alpha);
      scales_[p] = -alpha;
    }
    support_gradient(k, {theta(k + 1), theta(k)});
    if (k == reached_) note_support(k);
    if (!m_.plain_rule()) return rule_step(k);
    S* const kept = m_.wants_rates && m_.gradient ? updates(k) : nullptr;
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      if (m_.at_once[0][p]) continue;
      const i64 from = m_.adapted[p].offset * L_, n = m_.adapted[p].size * L_;
      S alpha = 0;
      const S* const alphas = rates(k, p, alpha);
      kernels_.sgd_update(n, alpha, alphas, theta(k) + from, w_ + at_.grad + from, theta(k + 1) + from,
                          kept ? kept + from : nullptr);
    }
  }

  // ---- checkpoints; theta_0 stays where it is, the state before step 0 is loaded again
  S* checkpoint(i64 place) { return w_ + at_.checkpoints + place * (at_.theta_stride + at_.state_stride); }
  void save(i64 k, i64 place) {
    if (k == 0) return;
    S* const to = std::copy_n(theta(k), at_.theta_stride, checkpoint(place));
    std::copy_n(rule_state(k, 0), at_.state_stride, to);
  }
  void restore(i64 k, i64 place) {
    if (k == 0) return load_state();
    std::copy_n(checkpoint(place), at_.theta_stride, theta(k));
    std::copy_n(checkpoint(place) + at_.theta_stride, at_.state_stride, rule_state(k, 0));
  }

  void write_adapted() {
    for (size_t p = 0; p < m_.adapted.size(); ++p)
      if (call_.adapted[p].adapted)
        unpack(theta(m_.steps) + m_.adapted[p].offset * L_, m_.adapted[p].size, m_.adapted[p].size,
               call_.adapted[p].adapted);
  }

  void query_values() { query_value(m_.steps); }  // those before were taken on the way
  void query_value(i64 k) {
    if (!m_.query.present) return;
    const double s = step_weight(k);
    if (s != 0.0 || k == m_.steps) run_query(k, s);
  }

  void start_sweep() {
    if (!m_.plain_rule() && m_.steps > 0) std::fill_n(w_ + at_.mbar, at_.state_stride, S(0));
    std::fill_n(w_ + at_.others_sum, m_.fixed * L_, S(0));
    for (int i = 0; i < 2; ++i) zero_entry_gradients(i);
    fresh_ = true;
    for (size_t p = 0; p < m_.adapted.size(); ++p)
      if (call_.adapted[p].adapted_grad) {
        complete_lambda();
        S* const to = w_ + at_.lambda + m_.adapted[p].offset * L_;
        pack(call_.adapted[p].adapted_grad, m_.adapted[p].size, m_.adapted[p].size, to);
        silence(to, m_.adapted[p].size);
      }
    zero_rate_gradients();
  }
  // Zero where nobody has written it.
  void complete_lambda() {
    if (fresh_) std::fill_n(w_ + at_.lambda, m_.theta * L_, S(0));
    fresh_ = false;
  }

  // lambda += s_k grad Q(theta_k), and what else the query set's pass gives.
  void query_gradient(i64 k) {
    if (!m_.query.present) return;
    const double s = step_weight(k);
    const bool last = k == m_.steps;
    if (s == 0.0 && !last) return;
    run_query(k, s);  // straight to lambda, if nothing is there yet
    if (!std::exchange(fresh_, false)) add(w_ + at_.grad, m_.theta * L_, w_ + at_.lambda);
    collect(1, k, S(1));
  }

  void step_back(i64 k) {
    if (m_.per_step && !m_.checkpointed()) load_set(0, k);
    S alpha = 0;
    const double weight = support_weight(k);
    if (!m_.support_step_weights.empty()) seed_loss(weight);
    if (!m_.plain_rule()) {
      rule_back(k);
      if (!m_.runs_back()) return;
      hessian_product(k, w_ + at_.direction, S(1));
      return collect(0, k, S(1));
    }
    if (m_.wants_rates) rate_gradients(k);
    if (m_.second_order && weight == 0.0 && one_rate(k, alpha)) {
      // H (alpha lambda) is alpha times H lambda
      hessian_product(k, w_ + at_.lambda, -alpha);
      collect(0, k, -alpha);
      return;
    }
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      const i64 from = m_.adapted[p].offset * L_, n = m_.adapted[p].size * L_;
      const S* const alphas = rates(k, p, alpha);
      kernels_.sgd_direction(n, alpha, alphas, w_ + at_.lambda + from, nullptr, w_ + at_.direction + from);
    }
    if (m_.runs_back()) {
      hessian_product(k, w_ + at_.direction, S(1));
      collect(0, k, S(1));
    }
  }

  void write_gradients() {
    const S* const lambda = w_ + at_.lambda;
    if (L_ == 1)
      add(lambda, m_.before_tables(), sums_ + at_.sum_theta);
    else
      executor_.lane_sums(m_.before_tables(), lambda, sums_ + at_.sum_theta);
    write_tables(lambda);
    for (size_t p = 0; p < m_.adapted.size(); ++p)
      if (m_.adapted[p].per_task && !m_.is_table(p) && call_.adapted[p].grad)
        unpack(lambda + m_.adapted[p].offset * L_, m_.adapted[p].size, m_.adapted[p].size,
               call_.adapted[p].grad);
    const S* const others = w_ + at_.others_sum;
    if (L_ == 1)
      add(others, m_.fixed, sums_ + at_.sum_fixed);
    else
      executor_.lane_sums(m_.fixed, others, sums_ + at_.sum_fixed);
    write_state_gradient();
    for (size_t p = 0; p < m_.others.size(); ++p)
      if (m_.others[p].per_task && call_.others[p].grad)
        unpack(others + m_.others[p].offset * L_, m_.others[p].size, m_.others[p].size, call_.others[p].grad);
  }

  void write_loss() {
    if (!call_.task_losses) return;
    for (i64 l = 0; l < count_; ++l) call_.task_losses[first_ + l] = S(losses_[l]);
  }

 private:
  using State::add;
  using State::at_;
  using State::bad_index_;
  using State::call_;
  using State::collect;
  using State::count_;
  using State::executor_;
  using State::first_;
  using State::fresh_;
  using State::hessian_product;
  using State::kernels_;
  using State::L_;
  using State::load_set;
  using State::load_state;
  using State::load_tables;
  using State::losses_;
  using State::m_;
  using State::note_support;
  using State::once_done_;
  using State::one_rate;
  using State::own_fixed_;
  using State::own_theta_;
  using State::pack;
  using State::rate_gradients;
  using State::rates;
  using State::reached_;
  using State::rule_back;
  using State::rule_once_done_;
  using State::rule_state;
  using State::rule_step;
  using State::run_query;
  using State::scales_;
  using State::seed_loss;
  using State::set;
  using State::shared_;
  using State::silence;
  using State::step_weight;
  using State::sums_;
  using State::support_gradient;
  using State::support_weight;
  using State::theta;
  using State::unpack;
  using State::updates;
  using State::w_;
  using State::write_state_gradient;
  using State::write_tables;
  using State::zero_entry_gradients;
  using State::zero_rate_gradients;
};

}  // namespace fm::machine
