// A task, or the tasks of all lanes, taken through the steps of algorithm.h by programs.
#pragma once

#include "../../shared/algorithm.h"
#include "../clipping.h"
#include "group_state.h"

namespace fm::machine {

template <class S>
class Group : private GroupState<S> {
 public:
  using State = GroupState<S>;
  template <class... Args>
  explicit Group(const Machine& m, Args&&... args)
      : State(m, std::forward<Args>(args)...), scales_(m.adapted.size()) {}

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

  // ---- checkpoints; theta_0 stays where it is, and before step 0 there is no state
  S* checkpoint(i64 place) { return w_ + at_.checkpoints + place * (at_.theta_stride + at_.state_stride); }
  void save(i64 k, i64 place) {
    if (k == 0) return;
    S* const to = std::copy_n(theta(k), at_.theta_stride, checkpoint(place));
    std::copy_n(rule_state(k, 0), at_.state_stride, to);
  }
  void restore(i64 k, i64 place) {
    if (k == 0) return;
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
    if (!m_.plain_rule() && m_.steps > 0)
      std::fill_n(w_ + at_.mbar, m_.rule.states() * at_.rule_stride, S(0));
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
  using State::add_rate_gradient;
  using State::aligned;
  using State::at_;
  using State::bad_index_;
  using State::call_;
  using State::count_;
  using State::direction_;
  using State::entries;
  using State::executor_;
  using State::first_;
  using State::fresh_;
  using State::kernels_;
  using State::L_;
  using State::load_set;
  using State::load_tables;
  using State::losses_;
  using State::m_;
  using State::once_done_;
  using State::one_rate;
  using State::own_fixed_;
  using State::own_theta_;
  using State::pack;
  using State::rate_gradients;
  using State::rates;
  using State::reached_;
  using State::seed_loss;
  using State::set;
  using State::shared_;
  using State::silence;
  using State::step_weight;
  using State::support_weight;
  using State::sums_;
  using State::theta;
  using State::unpack;
  using State::unpack_sum;
  using State::updates;
  using State::w_;
  using State::write_tables;
  using State::zero_rate_gradients;

  // ---- update rules that are not plain SGD
  S* rule_gradient(i64 k) { return w_ + at_.rule_gradients + (m_.keeps_steps() ? k : 0) * at_.rule_stride; }
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

  Memory<S> memory(int which, i64 k) {
    Memory<S> mem{};
    const auto to = [&](Space s) -> S*& { return mem.at[int(s)]; };
    to(Space::work) = w_ + at_.work;
    const i64 kept = which ? m_.checkpointed() : m_.store && m_.gradient ? k : 0;
    to(Space::kept) = w_ + at_.kept + kept * at_.kept_stride;
    to(Space::once) = w_ + at_.once + (which ? rounded(size_of(m_.support, Space::once) * L_) : 0);
    to(Space::constant) = shared_ + at_.constants[which];
    to(Space::theta) = theta(k);
    to(Space::fixed) = own_fixed_ ? w_ + at_.fixed : shared_ + at_.shared_fixed;
    to(Space::batch) = w_ + at_.batch[which];
    to(Space::direction) = const_cast<S*>(direction_);
    to(Space::seed) = w_ + at_.seed;
    const bool ruled = !which && !m_.plain_rule();
    to(Space::grad) = ruled ? rule_gradient(k) : w_ + (which && fresh_ ? at_.lambda : at_.grad);
    to(Space::curvature) = w_ + at_.grad;  // g is no longer needed then
    to(Space::other) = w_ + at_.other;
    to(Space::output) = w_ + at_.output;
    mem.ints = reinterpret_cast<const i64*>(w_ + aligned(at_.ints[which]));
    mem.tiles = w_ + at_.tiles;
    return mem;
  }
  // Where products that complete a gradient put what it leads to, and what they add it to.
  struct Update {
    S* to = nullptr;
    const S* from = nullptr;
  };
  void run_stage(int which, size_t stage, i64 k, const Update& update = {}) {
    const Program& p = set(which).program;
    if (stage >= p.stage_ends.size()) return;
    Memory<S> mem = memory(which, k);
    mem.update_to = update.to, mem.update_from = update.from, mem.update_scale = scales_.data();
    const auto runner = L_ == 1 ? executor_.rows : executor_.lanes;
    runner(p.steps.data() + p.stage_begin(stage), p.stage_ends[stage] - p.stage_begin(stage), mem);
    bad_index_ = bad_index_ || mem.bad_index;
  }
  void run_once(int which, i64 k) {
    if (once_done_ && !which) return;
    run_stage(which, 0, k);
    if (!which) once_done_ = true;
  }
  void support_gradient(i64 k, const Update& update = {}) {
    run_once(0, k);
    run_stage(0, 1, k, update);
  }
  // The support loss of step k, for the first time.
  void note_support(i64 k) {
    ++reached_;
    const double weight = support_weight(k);
    for (i64 l = 0; weight != 0.0 && l < count_; ++l) losses_[l] += weight * double(w_[at_.output + l]);
  }
  // lambda += scale * what the last stage says: H_k along `direction`, and of a support loss in the
  // objective its gradient, by the seed.
  void hessian_product(i64 k, const S* direction, S scale) {
    if (!m_.checkpointed()) {  // else the step has just been run
      if (m_.per_step) once_done_ = false;
      if (!m_.store) support_gradient(k);
      if (m_.per_step && m_.store) run_once(0, k);
    }
    direction_ = direction;
    std::fill(scales_.begin(), scales_.end(), scale);
    S* const lambda = w_ + at_.lambda;
    run_stage(0, 2, k, {lambda, lambda});
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      if (m_.at_once[1][p]) continue;
      S* const to = lambda + m_.adapted[p].offset * L_;
      kernels_.sgd_direction(m_.adapted[p].size * L_, -scale, nullptr,
                             w_ + at_.grad + m_.adapted[p].offset * L_, to, to);
    }
  }

  void run_query(i64 k, double s) {
    seed_loss(s);
    if (m_.output_grad) {
      S* const to = w_ + at_.seed + SEED_OUTPUT * L_;
      if (k == m_.steps && call_.output_grad) {
        pack(call_.output_grad, m_.output, m_.output, to);
        silence(to, m_.output);
      } else {
        std::fill_n(to, m_.output * L_, S(0));
      }
    }
    run_stage(1, 0, k);
    run_stage(1, 1, k);
    const S* const out = w_ + at_.output;
    if (m_.query_loss && s != 0.0)
      for (i64 l = 0; l < count_; ++l) losses_[l] += s * double(out[l]);
    if (k == m_.steps && call_.output) unpack(out + OUTPUT_START * L_, m_.output, m_.output, call_.output);
  }

  // Adds a pass's gradients by what does not adapt, and by its set, times `scale` to their totals.
  void collect(int which, i64 k, S scale) {
    const S* const other = w_ + at_.other;
    for (const Fixed& f : m_.others) {
      const i64 from = which ? f.query_grad : f.support_grad;
      S* const to = w_ + at_.others_sum + f.offset * L_;
      if (from >= 0) kernels_.sgd_direction(f.size * L_, -scale, nullptr, other + from * L_, to, to);
    }
    const Set& s = set(which);
    const i64 sets = !which && m_.per_step ? m_.steps : 1;
    for (size_t i = 0; i < s.entries.size(); ++i) {
      const Entry& e = s.entries[i];
      S* const grad = entries(which)[i].grad;
      if (e.grad >= 0 && grad)
        unpack_sum(other + e.grad * L_, sets * e.size, e.size, scale, grad + (sets > 1 ? k * e.size : 0));
    }
  }
  void zero_entry_gradients(int which) {
    const Set& s = set(which);
    const i64 sets = !which && m_.per_step ? m_.steps : 1;
    for (size_t i = 0; i < s.entries.size(); ++i)
      if (S* const grad = entries(which)[i].grad)
        std::fill_n(grad + first_ * sets * s.entries[i].size, count_ * sets * s.entries[i].size, S(0));
  }

  double numbers_[RULE_NUMBERS] = {};  // of the update rule at the step at hand
  std::vector<S> scales_;              // of each adapted parameter, as `Memory` says
};

}  // namespace fm::machine
