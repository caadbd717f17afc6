// The inner steps of one task, forward: by the update rule, one after the other or again from a
// checkpoint.
#pragma once

#include "task_state.h"
#include "update_rule_steps.h"

namespace fm {

template <class S>
class InnerSteps : protected TaskState<S> {
 public:
  InnerSteps(const Plan& plan, const Kernels<S>& kernels, const Call<S>& call, const Shared<S>& shared,
             S* workspace)
      : TaskState<S>(plan, kernels, call, shared, workspace),
        sinks_(plan.params.size()),
        rule_(*this, kernels) {}

 protected:
  friend class UpdateRuleSteps<S>;
  using State = TaskState<S>;
  using State::at_;
  using State::input_;
  using State::kernels_;
  using State::loss_call;
  using State::mirror_step;
  using State::options;
  using State::own_theta;
  using State::plan_;
  using State::rate;
  using State::single_rate;
  using State::support;
  using State::support_pass;
  using State::support_weight;
  using State::theta;
  using State::theta_at;
  using typename State::Slice;

  // A task from its beginning.
  void start() { value_ = 0, reached_ = 0; }

  // Forward, loss and backward of the support set; the parameters' gradients go to `sinks`, if
  // given. The loss.
  double support_gradient(const Pass<S>& pass, const Slice& batch, Sink<S>* sinks) {
    forward(pass);
    LossCall<S> l = loss_call(pass, options().loss, batch, 1.0, 1.0);
    l.dz = pass.delta(plan_.output);
    const double value = kernels_.loss(l);
    backward(pass, sinks);
    return value;
  }

  // The adapted parameters' gradients as they are, to the scratch set.
  Sink<S>* gradient_sinks() {
    for (size_t p = 0; p < plan_.params.size(); ++p) {
      sinks_[p] = {};
      if (plan_.params[p].adapted && !input_.is(p))
        sinks_[p].to = at_ + plan_.at.gradient + plan_.params[p].offset;
    }
    return sinks_.data();
  }

  void inner_step(i64 k) {
    const Slice batch = support(k);
    const Pass<S> pass = support_pass(k, batch, false);
    if (k == 0 && input_.active()) input_.begin(pass.input, pass.input_ld, theta(0, input_.param_index()));
    double loss = 0;
    if (!plan_.plain_rule()) {
      loss = support_gradient(pass, batch, rule_.sinks(k, sinks_.data()));
      rule_.step(k);
    } else if (options().wants_rates && (plan_.keeps_updates() || plan_.checkpointed())) {
      loss = support_gradient(pass, batch, gradient_sinks());
      update(k);
    } else {
      loss = update_in_epilogues(k, pass, batch);
    }
    if (k == reached_) note_support(k, loss);
    if (input_.active()) input_.step(k, single_rate(k, input_.param_index()), pass);
    mirror_step(k + 1);
  }

  // The support loss of step k, for the first time; one that is not in the objective may be NaN.
  void note_support(i64 k, double loss) {
    ++reached_;
    if (const double weight = support_weight(k)) value_ += weight * loss;
  }

  // theta_{k+1} = theta_k - alpha g straight out of the products, but for element-wise rates. The
  // loss.
  double update_in_epilogues(i64 k, const Pass<S>& pass, const Slice& batch) {
    bool elementwise = false;
    for (size_t p = 0; p < plan_.params.size(); ++p) {
      const Param& param = plan_.params[p];
      sinks_[p] = {};
      if (!param.adapted || input_.is(p)) continue;
      if (param.rate_element) {
        elementwise = true;
        sinks_[p].to = at_ + plan_.at.gradient + param.offset;
        continue;
      }
      S alpha;
      const S* alphas;
      rate(k, p, alpha, alphas);
      sinks_[p] = {own_theta(k + 1, p), theta(k, p), false, -alpha};
    }
    const double loss = support_gradient(pass, batch, sinks_.data());
    for (size_t p = 0; elementwise && p < plan_.params.size(); ++p)
      if (plan_.params[p].adapted && plan_.params[p].rate_element) update(k, p);
    return loss;
  }

  // ---- checkpoints
  // theta_0 stays where it is, and before step 0 there is no state.
  S* checkpoint(i64 place) { return at_ + plan_.at.checkpoints + place * plan_.at.checkpoint_stride; }
  void save(i64 k, i64 place) {
    if (k == 0) return;
    S* const theta_k = at_ + theta_at(k);
    S* const to = std::copy_n(theta_k, plan_.at.theta_stride, checkpoint(place));
    std::copy_n(rule_.states(k), rule_.states_size(), to);
  }
  void restore(i64 k, i64 place) {
    if (k == 0) return;
    const S* const from = checkpoint(place);
    std::copy_n(from, plan_.at.theta_stride, at_ + theta_at(k));
    std::copy_n(from + plan_.at.theta_stride, rule_.states_size(), rule_.states(k));
    mirror_step(k);
  }

  void update(i64 k) {
    for (size_t p = 0; p < plan_.params.size(); ++p)
      if (plan_.params[p].adapted && !input_.is(p)) update(k, p);
  }

  void update(i64 k, size_t p) {
    const Param& param = plan_.params[p];
    const bool keep = plan_.keeps_updates();
    S alpha;
    const S* alphas;
    rate(k, p, alpha, alphas);
    kernels_.sgd_update(param.size, alpha, alphas, theta(k, p), at_ + plan_.at.gradient + param.offset,
                        own_theta(k + 1, p),
                        keep ? at_ + plan_.at.updates + k * plan_.at.update_stride + param.offset : nullptr);
  }

  double value_ = 0;  // of the losses in the objective
  i64 reached_ = 0;   // steps that have been run at least once
  std::vector<Sink<S>> sinks_;
  UpdateRuleSteps<S> rule_;  // where the rule is not plain
};

}  // namespace fm
