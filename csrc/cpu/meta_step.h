// What the steps of algorithm.h are on the CPU, by kernels and a plan's memory.
#pragma once

#include <memory>
#include <utility>

#include "../shared/algorithm.h"
#include "checkpoints.h"
#include "inner_steps.h"

namespace fm {

template <class S>
class MetaStep : private InnerSteps<S> {
 public:
  MetaStep(const Plan& plan, const Kernels<S>& kernels, const Call<S>& call, const Shared<S>& shared,
           S* workspace)
      : InnerSteps<S>(plan, kernels, call, shared, workspace),
        v_primary_(plan.params.size()),
        v_mirror_(plan.params.size()),
        lambda_(plan.params.size()) {
    for (size_t p = 0; p < plan.params.size(); ++p) {
      lambda_[p] = at_ + plan.at.lambda + plan.params[p].offset;
      v_primary_[p] = at_ + plan.at.direction + plan.params[p].offset;
      v_mirror_[p] = at_ + plan.at.direction_mirror + plan.params[p].mirror_offset;
    }
  }

  // Runs task t; gradients that are sums over tasks are added to `sums` (plan.range_sums long), or
  // stored there by the first task of a range.
  void run(i64 t, S* sums, bool first) {
    t_ = t;
    sums_ = sums, first_ = first;
    if (plan_.checkpointed())
      checkpointed_meta_step(*this, options().schedule);
    else
      meta_step(*this);
  }
  using TaskState<S>::write_rate_gradient;

 private:
  template <class Task>
  friend void fm::meta_step(Task&);
  template <class Task>
  friend void fm::checkpointed_meta_step(Task&, const Schedule&);
  using Step = i64;
  using State = InnerSteps<S>;
  using State::add_input_gradient;
  using State::at_;
  using State::call_;
  using State::gradient_sinks;
  using State::has_query_loss;
  using State::inner_step;
  using State::input_;
  using State::kernels_;
  using State::load_params;
  using State::loss_call;
  using State::mirror_step;
  using State::options;
  using State::own_theta;
  using State::plan_;
  using State::query;
  using State::query_pass;
  using State::rate;
  using State::restore;
  using State::rule_;
  using State::save;
  using State::shared_;
  using State::single_rate;
  using State::sinks_;
  using State::start;
  using State::step_weight;
  using State::support;
  using State::support_gradient;
  using State::support_pass;
  using State::support_weight;
  using State::t_;
  using State::task_weight;
  using State::theta;
  using State::value_;
  using State::write_output;
  using State::zero;
  using typename State::Slice;

  i64 steps() const { return options().steps; }
  bool has_gradient() const { return options().gradient; }
  bool has_step_weights() const { return !call_.step_weights.empty(); }
  void load() {
    start();
    load_params();
  }
  void write_loss() {
    if (call_.task_losses) call_.task_losses[t_] = S(value_);
  }

  // ---- the query
  void query_values() {
    if (options().query == 0) return;
    const Slice batch = query();
    for (i64 k = 0; k <= options().steps; ++k) {
      const double s = has_query_loss() ? step_weight(k) : 0.0;
      if (s == 0.0 && k < options().steps) continue;
      const Pass<S> pass = query_pass(k, batch);
      forward(pass);
      if (k == options().steps) write_output(pass);
      if (has_query_loss()) value_ += s * weighted(s, loss_call(pass, options().query_loss, batch, 0.0, 0.0));
    }
  }
  double weighted(double s, const LossCall<S>& l) const { return s == 0.0 ? 0.0 : kernels_.loss(l); }

  // The query at theta_k: its share of the loss, and its gradients times c_t s_k added to lambda
  // and the inputs.
  void query_gradient(i64 k) {
    const double s = has_query_loss() ? step_weight(k) : 0.0;
    const bool last = k == options().steps;
    if (options().query == 0 || (s == 0.0 && !last)) return;
    const Slice batch = query();
    const Pass<S> pass = query_pass(k, batch);
    forward(pass);
    const Value& out = plan_.values[plan_.output];
    S* dz = pass.delta(plan_.output);
    if (last) write_output(pass);
    if (s != 0.0) {
      const double weight = task_weight() * s;
      LossCall<S> l = loss_call(pass, options().query_loss, batch, weight, weight);
      l.dz = dz, l.dtarget = batch.grad_y, l.dweights = batch.grad_weights;
      value_ += s * kernels_.loss(l);
    } else if (last && call_.output_grad) {
      load_value(out, call_.output_grad + t_ * options().query * out.rows * out.cols, options().query, dz,
                 out.ld);
    } else {
      return;
    }
    Sink<S>* sinks = lambda_sinks(S(1));
    if (input_.active()) sinks[input_.param_index()] = input_sink(pass);
    backward(pass, sinks);
    if (input_.active()) input_.add_query(pass);
    fresh_ = false;
    if (batch.grad_x) add_input_gradient(pass, pass.d, S(1), batch.grad_x);
  }

  // ---- the sweep back
  void start_sweep() {
    const Options& o = options();
    S* lambda = at_ + plan_.at.lambda;
    rule_.start_back();
    fresh_ = true, summed_ = false;
    start_input_gradient();
    for (size_t p = 0; p < plan_.params.size(); ++p) {
      const Param& param = plan_.params[p];
      if (const S* seed = call_.params[p].adapted_grad) {
        if (!input_.is(p)) pack(kernels_, plan_, param, seed + t_ * param.numel(), lambda + param.offset);
        fresh_ = false;
      }
      if (!param.adapted && o.second_order && o.steps > 0) {
        zero(at_ + plan_.at.direction + param.offset, param.size);
        zero(at_ + plan_.at.direction_mirror + param.mirror_offset, param.mirror_size);
      }
    }
    if (plan_.task_sums) zero(at_ + plan_.at.task_sums, plan_.task_sums);
    if (first_) zero(sums_ + plan_.set_size, plan_.range_sums - plan_.set_size);
  }
  // Zero where nobody has written it.
  void complete_lambda() {
    if (fresh_) zero(at_ + plan_.at.lambda, plan_.set_size);
    fresh_ = false;
  }

  // ---- the gradient of the input layer's weight goes straight to where it is wanted
  void start_input_gradient() {
    if (!input_.active()) return;
    kept_query_.reset();
    const size_t p = input_.param_index();
    const Param& param = plan_.params[p];
    input_gradient_ = param.per_task ? lambda_[p] : sums_ + param.offset;
    input_fresh_ = param.per_task || first_;
    if (const S* seed = call_.params[p].adapted_grad) {
      pack(kernels_, plan_, param, seed + t_ * param.numel(), lambda_[p]);
      input_.seed(lambda_[p]);
      if (!param.per_task)
        kernels_.add(param.size, lambda_[p], input_fresh_ ? nullptr : input_gradient_, input_gradient_);
      input_fresh_ = false;
    }
  }
  // A single query pass is kept: its share is written together with the support's.
  Sink<S> input_sink(const Pass<S>& pass) {
    if (call_.step_weights.empty()) {
      kept_query_ = std::make_unique<Pass<S>>(pass);
      return {};
    }
    return {input_gradient_, nullptr, !std::exchange(input_fresh_, false), S(1)};
  }
  void finish_input_gradient() {
    if (!input_.active()) return;
    if (options().second_order || input_fresh_ || kept_query_)
      input_.write_lambda(input_gradient_, !input_fresh_, kept_query_.get());
  }

  // lambda += scale * gradient, or = if it has not been written yet.
  Sink<S>* lambda_sinks(S scale) {
    for (size_t p = 0; p < plan_.params.size(); ++p) sinks_[p] = {lambda_[p], nullptr, !fresh_, scale};
    return sinks_.data();
  }

  void step_back(i64 k) {
    const Options& o = options();
    const Slice batch = support(k);
    const bool plain = plan_.plain_rule();
    const bool again = !o.store && !plan_.checkpointed() && (o.second_order || (plain && o.wants_rates));
    const double weight = support_weight(k) * task_weight();
    if (!o.store) mirror_step(k);
    const Pass<S> pass = support_pass(k, batch, !again);
    if (again) support_gradient(pass, batch, plain && o.wants_rates ? gradient_sinks() : nullptr);
    if (!plain) {
      rule_.back(k, lambda_.data(), rate_sums(k), sums_ + plan_.number_sum_offset + k * RULE_NUMBERS);
      for (size_t p = 0; p < plan_.params.size(); ++p)
        if (o.second_order && plan_.params[p].adapted && plan_.params[p].mirrored)
          make_v_mirror(p, v_primary_[p]);
      if (o.second_order)
        hessian_vector(pass, batch, v_primary_.data(), S(1), S(1), weight, false);
      else if (weight != 0.0)
        support_term(k, batch, weight);
      return;
    }
    if (o.wants_rates) rate_gradients(k, pass);
    // After the last product nothing is done to lambda_0 but to add it to the sums: the product
    // can.
    const bool into_sums = o.second_order && k == 0 && (!has_query_loss() || step_weight(0) == 0.0);
    S alpha = 0;
    if (!o.second_order) {
      if (weight != 0.0) support_term(k, batch, weight);
      return;
    }
    if (weight == 0.0 && one_rate(k, alpha)) return along_lambda(pass, batch, alpha, into_sums);
    direction(k);
    const S input_scale = input_.active() ? -single_rate(k, input_.param_index()) : S(1);
    hessian_vector(pass, batch, v_primary_.data(), S(1), input_scale, weight, into_sums);
  }

  // Of first order, what the support loss of step k is in the objective for: its gradient times
  // `weight`, added to lambda and the inputs.
  void support_term(i64 k, const Slice& batch, double weight) {
    const bool there = options().store || plan_.checkpointed();
    const Pass<S> pass = support_pass(k, batch, there);
    if (!there) forward(pass);
    LossCall<S> l = loss_call(pass, options().loss, batch, weight, weight);
    l.dz = pass.delta(plan_.output), l.dtarget = batch.grad_y, l.dweights = batch.grad_weights;
    kernels_.loss(l);
    backward(pass, lambda_sinks(S(1)));
    if (batch.grad_x) add_input_gradient(pass, pass.d, S(1), batch.grad_x);
  }

  // Whether v = -alpha lambda for a single alpha at step k: then nobody has to write v down.
  bool one_rate(i64 k, S& alpha) {
    if (plan_.tied) return false;
    for (size_t p = 0; p < plan_.params.size(); ++p) {
      const Param& param = plan_.params[p];
      if (!param.adapted || param.rate_element) return false;
      S own;
      const S* none;
      rate(k, p, own, none);
      if (p > 0 && own != alpha) return false;
      alpha = own;
    }
    return true;
  }

  // H (-alpha lambda) as -alpha (H lambda). Nothing reads a layer's lambda after its product has
  // been added to it.
  void along_lambda(Pass<S> pass, const Slice& batch, S alpha, bool into_sums) {
    for (size_t p = 0; p < plan_.params.size(); ++p)
      if (plan_.params[p].mirrored) make_v_mirror(p, lambda_[p]);
    hessian_vector(pass, batch, lambda_.data(), -alpha, S(1), 0.0, into_sums);
  }

  // v = -alpha lambda; zero for parameters that are not adapted, since the sweep began.
  void direction(i64 k) {
    for (size_t p = 0; p < plan_.params.size(); ++p) {
      const Param& param = plan_.params[p];
      if (!param.adapted || input_.is(p)) continue;
      S alpha;
      const S* alphas;
      rate(k, p, alpha, alphas);
      S* v = at_ + plan_.at.direction + param.offset;
      kernels_.sgd_direction(param.size, alpha, alphas, lambda_[p], nullptr, v);
      if (options().second_order && param.mirrored) make_v_mirror(p, v);
    }
  }

  void make_v_mirror(size_t p, const S* v) {
    const Param& param = plan_.params[p];
    make_mirror(kernels_, plan_, param, v, at_ + plan_.at.direction_mirror + param.mirror_offset);
  }

  // lambda += scale H v + weight g, or right into the sums; the derivatives of scale <g, v> + weight L
  // likewise into the gradients of the support set. The input layer's v is input_scale * lambda; a
  // weight that is not zero comes with a scale of one.
  void hessian_vector(Pass<S> pass, const Slice& batch, const S* const* v, S scale, S input_scale,
                      double weight, bool into_sums) {
    pass.v = {v, v_mirror_.data()};
    if (input_.active()) pass.tangent_low_rank = input_.tangent(input_scale);
    tangent(pass);
    LossCall<S> l = loss_call(pass, options().loss, batch, 1.0, double(scale));
    l.rz = pass.tangent(plan_.output);
    l.dz = pass.tangent_delta(plan_.output);
    l.dtarget = batch.grad_y, l.dweights = batch.grad_weights;
    kernels_.loss_tangent(l);
    if (weight != 0.0) add_support_loss(pass, batch, weight);
    Sink<S>* sinks = lambda_sinks(scale);
    if (into_sums) {
      for (size_t p = 0; p < plan_.params.size(); ++p)
        if (!plan_.params[p].per_task)
          sinks[p] = {sums_ + plan_.params[p].offset, lambda_[p], !first_, scale};
      summed_ = true;
    }
    if (input_.active()) sinks[input_.param_index()] = {};
    tangent_backward(pass, sinks);
    if (input_.active()) input_.adjoint_step(scale, pass);
    if (batch.grad_x) add_input_gradient(pass, pass.rd, scale, batch.grad_x);
  }

  // The backward pass of tangents is linear in the tangent deltas: weight dz among them makes it
  // leave the gradient of weight L too.
  void add_support_loss(const Pass<S>& pass, const Slice& batch, double weight) {
    const Value& out = plan_.values[plan_.output];
    S* const rdz = pass.tangent_delta(plan_.output);
    const i64 n = pass.geometry.examples * out.rows * out.ld;
    kernels_.sgd_direction(n, S(-weight), nullptr, pass.delta(plan_.output), rdz, rdz);
    if (!batch.grad_y && !batch.grad_weights) return;
    LossCall<S> l = loss_call(pass, options().loss, batch, 1.0, weight);
    l.dtarget = batch.grad_y, l.dweights = batch.grad_weights;
    kernels_.loss(l);
  }

  // Where the gradient of a rate at step k is summed up.
  S* rate_sum(i64 k, size_t p) {
    const Param& param = plan_.params[p];
    S* const to = (param.rate_per_task ? at_ + plan_.at.task_sums : sums_) + param.rate_sum_offset;
    return to + (param.rate_per_step ? k * (param.rate_element ? param.size : plan_.lane) : 0);
  }
  // The same of all that are wanted, null for the others.
  S* const* rate_sums(i64 k) {
    rate_sums_.assign(plan_.params.size(), nullptr);
    for (size_t p = 0; p < plan_.params.size(); ++p)
      if (options().wants_rates && plan_.params[p].adapted) rate_sums_[p] = rate_sum(k, p);
    return rate_sums_.data();
  }
  // d alpha_k -= lambda_{k+1} u_k
  void rate_gradients(i64 k, const Pass<S>& pass) {
    const S* u =
        at_ + (plan_.keeps_updates() ? plan_.at.updates + k * plan_.at.update_stride : plan_.at.gradient);
    for (size_t p = 0; p < plan_.params.size(); ++p) {
      const Param& param = plan_.params[p];
      if (!param.adapted) continue;
      const S* lambda = lambda_[p];
      S* const to = rate_sum(k, p);
      if (input_.is(p)) {
        to[0] -= S(input_.rate_gradient(pass));
        continue;
      }
      if (param.rate_element)
        for (i64 i = 0; i < param.size; ++i) to[i] -= lambda[i] * u[param.offset + i];
      else
        to[0] -= S(kernels_.inner(param.size, lambda, u + param.offset));
    }
  }

  // ---- results
  void write_adapted() {
    for (size_t p = 0; p < plan_.params.size(); ++p)
      if (S* to = call_.params[p].adapted) {
        const S* adapted = theta(options().steps, p);
        if (input_.is(p)) {
          S* own = at_ + plan_.at.gradient + plan_.params[p].offset;
          input_.write_theta(options().steps, adapted, own);
          adapted = own;
        }
        unpack(kernels_, plan_, plan_.params[p], adapted, to + t_ * plan_.params[p].numel());
      }
  }

  void write_gradients() {
    finish_input_gradient();
    for (size_t p = 0; p < plan_.params.size(); ++p) {
      const Param& param = plan_.params[p];
      S* const sum = sums_ + param.offset;
      if (param.per_task) {
        if (S* to = call_.params[p].grad) unpack(kernels_, plan_, param, lambda_[p], to + t_ * param.numel());
      } else if (!summed_ && !input_.is(p)) {
        kernels_.add(param.size, lambda_[p], first_ ? nullptr : sum, sum);
      }
      if (options().wants_rates && param.adapted && param.rate_per_task)
        write_rate_gradient(p, at_ + plan_.at.task_sums + param.rate_sum_offset, t_, call_.tasks);
    }
  }

  S* sums_ = nullptr;    // of the task's range
  bool first_ = true;    // the first task of its range: sums are stored, not added to
  bool fresh_ = true;    // lambda has not been written yet
  bool summed_ = false;  // the shared parameters' gradients have gone into the sums
  std::vector<const S*> v_primary_, v_mirror_;
  std::vector<S*> lambda_;
  std::vector<S*> rate_sums_;
  S* input_gradient_ = nullptr;  // of its weight
  bool input_fresh_ = true;      // which has not been written yet
  std::unique_ptr<Pass<S>> kept_query_;
};

}  // namespace fm
