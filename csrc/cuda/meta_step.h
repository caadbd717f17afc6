// What the steps of shared/algorithm.h are to the threads of a block. All layers, shapes and
// options are constants; a step ends with a barrier wherever another thread reads what it wrote.
#pragma once

#include "../shared/algorithm.h"
#include "loss.h"
#include "rates.h"
#include "rule_steps.h"
#include "task.h"
#include "walks.h"

namespace fm::cuda {

class MetaStep : Task {
 public:
  using Task::Task;

 private:
  template <class Any>
  friend void fm::meta_step(Any&);
  using Step = int;
  FM_INLINE int steps() const { return K; }
  FM_INLINE bool has_gradient() const { return OPTIONS.gradient; }
  FM_INLINE bool has_step_weights() const { return OPTIONS.step_weights; }

  FM_INLINE void load() const {
    load_theta(0);
    if (K > 0 && !OPTIONS.support_per_step) load_support(0);
    barrier();
  }
  // What a thread does after the last barrier concerns its own elements alone: so the next task
  // may begin.
  FM_INLINE void write_loss() const {
    if (thread() != 0) return;
    if (args_.task_losses) args_.task_losses[t_] = S(value_);
    if (args_.partial) args_.partial[t_ * LAYOUT.columns + LAYOUT.columns - 1] = S(value_ * task_weight());
  }

  static constexpr bool RATES_FROM_GRADIENT = OPTIONS.wants_rates && !KEEPS_UPDATES && !GENERAL_RULE;

  // ---- the inner loop
  FM_INLINE void support_gradient(const Pass& pass, const Slice& batch, const Sink& to) const {
    run_forward<X>(pass);
    if constexpr (OPTIONS.loss.kind != LossKind::none)
      loss<false, false>(at_, batch, OPTIONS.support, value<OUTPUT, X>(pass), nullptr, delta<OUTPUT, X>(pass),
                         S(1), false);
    barrier();
    run_backward<X, false>(pass, to);
  }

  FM_INLINE void inner_step(int k) {
    if constexpr (K > 0) {
      // theta_k may not be kept for later
      if constexpr (!OPTIONS.gradient && OPTIONS.step_weights) query(k);
      if constexpr (OPTIONS.support_per_step) load_support(k), barrier();
      const Slice batch = support(k);
      support_gradient(support_pass(k, batch), batch, sink(Mode::update, k));
      if constexpr (TIED && !GENERAL_RULE) barrier();
      rule_step(args_, k);
    }
  }
  template <class A>
  FM_INLINE void rule_step(const A& args, int k) const {
    if constexpr (GENERAL_RULE) RuleSteps<A>(args, at_, k, t_).step();
  }

  // ---- the query
  FM_INLINE double task_weight() const {
    return (args_.task_weights ? double(args_.task_weights[t_]) : 1.0) / double(args_.tasks);
  }
  FM_INLINE double step_weight(int k) const {
    if constexpr (OPTIONS.query_loss.kind == LossKind::none) return 0;
    return OPTIONS.step_weights ? args_.step_weights[k] : k == K ? 1.0 : 0.0;
  }

  FM_INLINE void query_values() {
    if constexpr (!OPTIONS.gradient) query(K);
  }
  FM_INLINE void query_gradient(int k) {
    if constexpr (OPTIONS.gradient) query(k);
  }
  // The query at theta_k: its share of the loss; its gradients times c_t s_k added to lambda and
  // the inputs'.
  FM_INLINE void query(int k) {
    if constexpr (OPTIONS.query > 0) {
      const double s = step_weight(k);
      const bool last = k == K;
      if (s == 0 && !last) return;
      const Slice batch = queries();
      const Pass pass = query_pass(k, batch);
      load_input(batch.x, LAYOUT.query_input, OPTIONS.query);
      barrier();
      run_forward<Q>(pass);
      const S* z = value<OUTPUT, Q>(pass);
      if (last) write_output(pass, z);
      bool has_gradient = false;
      if constexpr (OPTIONS.query_loss.kind != LossKind::none) {
        if (s != 0) {
          S* dz = nullptr;
          if constexpr (OPTIONS.gradient) dz = delta<OUTPUT, Q>(pass), has_gradient = true;
          loss<true, false>(at_, batch, OPTIONS.query, z, nullptr, dz, S(s * task_weight()),
                            OPTIONS.gradient);
          barrier();
          value_ += s * sum_of_terms(at_, OPTIONS.query);
        }
      }
      if constexpr (OPTIONS.gradient) {
        if (!has_gradient && last && args_.output_grad) {
          const S* from = args_.output_grad + t_ * OPTIONS.query * VALUES[OUTPUT].rows * VALUES[OUTPUT].cols;
          S* dz = delta<OUTPUT, Q>(pass);
          for_elements<OUTPUT>(pass, [&](int at, int r, int c) { dz[at] = from[in_output(r, c)]; });
          has_gradient = true;
          barrier();
        }
        if (has_gradient) {
          run_backward<Q, OPTIONS.wants_query_x>(pass, sink(Mode::lambda, k));
          fresh_ = false;
          if constexpr (OPTIONS.wants_query_x) add_input_gradient(pass, delta<0, Q>(pass), batch.grad_x);
        }
      }
      if constexpr (OPTIONS.wants_query_x) barrier();
    }
  }
  FM_INLINE void write_output(const Pass& pass, const S* z) const {
    if (!args_.output) return;
    S* to = args_.output + t_ * OPTIONS.query * VALUES[OUTPUT].rows * VALUES[OUTPUT].cols;
    for_elements<OUTPUT>(pass, [&](int at, int r, int c) { to[in_output(r, c)] = z[at]; });
  }
  // Where column c of row r of the output stands with the user.
  static FM_INLINE int in_output(int r, int c) {
    constexpr Value out = VALUES[OUTPUT];
    if constexpr (OUTPUT_CHANNELS) return (r / out.rows * out.cols + c) * out.rows + r % out.rows;
    return r * out.cols + c;
  }
  FM_INLINE void add_input_gradient(const Pass& pass, const S* from, S* to) const {
    for_elements<0>(pass, [&](int at, int r, int c) { to[r * VALUES[0].cols + c] += from[at]; });
  }

  // ---- the sweep back
  FM_INLINE void start_sweep() {
    for_params([&](auto index) {
      constexpr int P = decltype(index)::value;
      if (const S* seed = args_.params[P].seed) {
        S* to = lambda<P>(at_);
        for_param<P>([&](int e, int at) { to[at] = seed[t_ * PARAMS[P].numel() + e]; });
        fresh_ = false;
      }
    });
    start_rates(at_);
    barrier();
  }
  // Zero where nobody has written it.
  FM_INLINE void complete_lambda() {
    if (fresh_) {
      for_params([&](auto p) { zero_lambda<decltype(p)::value>(); });
      barrier();
    }
    fresh_ = false;
  }
  template <int P>
  FM_INLINE void zero_lambda() const {
    S* to = lambda<P>(at_);
    for_param<P>([&](int, int at) { to[at] = 0; });
  }

  FM_INLINE void step_back(int k) {
    constexpr bool VALUES_NEEDED = OPTIONS.second_order || RATES_FROM_GRADIENT;
    constexpr bool AGAIN = VALUES_NEEDED && !OPTIONS.store;
    const Slice batch = support(k);
    const Pass pass = support_pass(k, batch);
    if constexpr (LAYOUT.restores) load_theta(k);
    if constexpr (OPTIONS.support_per_step && VALUES_NEEDED) load_support(k);
    if constexpr (LAYOUT.restores || OPTIONS.support_per_step) barrier();
    if constexpr (AGAIN)
      support_gradient(pass, batch, sink(RATES_FROM_GRADIENT ? Mode::rates : Mode::none, k));
    else if constexpr (RATES_FROM_GRADIENT)
      run_rates<X>(pass, sink(Mode::rates, k));
    if constexpr (KEEPS_UPDATES) rates_from_updates(sink(Mode::rates, k));
    if constexpr (OPTIONS.wants_rates && !GENERAL_RULE) finish_rates(sink(Mode::rates, k));
    if constexpr (WRITES_DIRECTION && !GENERAL_RULE && (OPTIONS.second_order || !PLAIN_RULE))
      write_direction(k);
    rule_back(args_, k);
    if constexpr (OPTIONS.second_order) hessian_vector(pass, batch, k);
    if constexpr (OPTIONS.weight_decay) {
      for_params([&](auto index) {
        constexpr int P = decltype(index)::value;
        if constexpr (PARAMS[P].adapted)
          for_param<P>(
              [&](int, int at) { lambda<P>(at_)[at] += S(args_.weight_decay) * direction<P>(at_)[at]; });
      });
      barrier();
    }
  }

  template <class A>
  FM_INLINE void rule_back(const A& args, int k) const {
    if constexpr (GENERAL_RULE) RuleSteps<A>(args, at_, k, t_).back(sink(Mode::rates, k));
  }

  // v = mbar - alpha lambda; mbar is mu times the v before, nothing in the first step back.
  FM_INLINE void write_direction(int k) const {
    const Sink from = sink(Mode::none, k);
    for_params([&](auto index) {
      constexpr int P = decltype(index)::value;
      constexpr Param p = PARAMS[P];
      if constexpr (p.adapted) {
        const S shared_rate = read_only(rate<P>(args_, k, t_));
        for (int e = thread(); e < p.numel(); e += step_threads()) {
          const int r = e / p.cols, c = e % p.cols, at = r * p.ld + c;
          const S alpha = p.rate_element ? element_rate<P>(args_, k, t_, r, c) : shared_rate;
          S v = -alpha * lambda<P>(at_)[at];
          if constexpr (OPTIONS.momentum)
            if (k < K - 1) v += S(args_.momentum) * direction<P>(at_)[at];
          direction<P>(at_)[at] = v;
        }
      }
    });
    barrier();
  }

  // lambda += H v; the mixed derivatives into the gradients of the support set.
  FM_INLINE void hessian_vector(const Pass& pass, const Slice& batch, int k) const {
    const Along along{args_, at_, k, t_};
    run_tangent<X>(pass, along);
    if constexpr (OPTIONS.loss.kind != LossKind::none)
      loss<false, true>(at_, batch, OPTIONS.support, value<OUTPUT, X>(pass), tangent<OUTPUT>(pass),
                        tangent_delta<OUTPUT>(pass), S(1), true);
    barrier();
    run_tangent_backward<X, OPTIONS.wants_support_x>(pass, along);
    if constexpr (OPTIONS.wants_support_x) add_input_gradient(pass, tangent_delta<0>(pass), batch.grad_x);
    barrier();
  }
};

}  // namespace fm::cuda
