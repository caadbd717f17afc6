// What the meta-step of one task works on: parameters and rates at every step, batches, passes.
#pragma once

#include "call.h"
#include "input_layer.h"
#include "layers.h"
#include "layout.h"

namespace fm {

// What all tasks share: packed once a call.
template <class S>
struct Shared {
  const S* theta = nullptr;         // theta_0 of the shared parameters, a parameter set
  const S* theta_mirror = nullptr;  // its mirrors
  const S* mask = nullptr;          // zero where a parameter set has only padding; null: not needed
};

template <class S>
class TaskState {
 public:
  TaskState(const Plan& plan, const Kernels<S>& kernels, const Call<S>& call, const Shared<S>& shared,
            S* workspace)
      : plan_(plan),
        kernels_(kernels),
        call_(call),
        shared_(shared),
        at_(workspace),
        input_(plan, kernels, workspace),
        primary_(plan.params.size()),
        mirror_(plan.params.size()) {}

 protected:
  const Options& options() const { return plan_.options; }

  // ---- parameters
  // theta_k of parameter p: shared as long as it is everybody's, else in the workspace.
  const S* theta(i64 k, size_t p) const {
    const Param& param = plan_.params[p];
    if (!param.adapted || input_.is(p)) k = 0;
    if (k == 0 && !param.per_task) return shared_.theta + param.offset;
    return at_ + theta_at(k) + param.offset;
  }
  i64 theta_at(i64 k) const {
    if (k == 0) return plan_.at.theta;
    return plan_.at.theta + plan_.set_size + (plan_.checkpointed() ? k % 2 : k - 1) * plan_.at.theta_stride;
  }
  S* own_theta(i64 k, size_t p) { return at_ + theta_at(k) + plan_.params[p].offset; }
  S* own_mirror(i64 k, size_t p) {
    const i64 slot = k == 0 ? 0 : options().store ? k * plan_.at.mirror_stride : plan_.mirror_size;
    return at_ + plan_.at.theta_mirror + slot + plan_.params[p].mirror_offset;
  }
  const S* theta_mirror(i64 k, size_t p) {
    const Param& param = plan_.params[p];
    if (!param.adapted) k = 0;
    if (k == 0 && !param.per_task) return shared_.theta_mirror + param.mirror_offset;
    return own_mirror(k, p);
  }

  void load_params() {
    for (size_t p = 0; p < plan_.params.size(); ++p) {
      const Param& param = plan_.params[p];
      if (!param.per_task) continue;
      pack(kernels_, plan_, param, call_.params[p].data + t_ * param.numel(), own_theta(0, p));
      if (param.mirrored) make_mirror(kernels_, plan_, param, own_theta(0, p), own_mirror(0, p));
    }
  }

  ParamView<S> view(i64 k) {
    for (size_t p = 0; p < plan_.params.size(); ++p) {
      primary_[p] = theta(k, p);
      mirror_[p] = theta_mirror(k, p);
    }
    return {primary_.data(), mirror_.data()};
  }

  void mirror_step(i64 k) {
    for (size_t p = 0; p < plan_.params.size(); ++p)
      if (plan_.params[p].mirrored && plan_.params[p].adapted && k > 0)
        make_mirror(kernels_, plan_, plan_.params[p], own_theta(k, p), own_mirror(k, p));
  }

  // ---- learning rates
  // The rate of parameter p at step k: `alphas` for an element-wise one (engine layout), else
  // `alpha`.
  void rate(i64 k, size_t p, S& alpha, const S*& alphas) {
    const Param& param = plan_.params[p];
    const i64 length = param.rate_element ? param.numel() : 1;
    const i64 tasks = param.rate_per_task ? call_.tasks : 1;
    const S* data = call_.params[p].rate +
                    ((param.rate_per_step ? k : 0) * tasks + (param.rate_per_task ? t_ : 0)) * length;
    alphas = nullptr;
    if (!param.rate_element) {
      alpha = *data;
      return;
    }
    S* packed = at_ + plan_.at.rates + param.offset;
    pack(kernels_, plan_, param, data, packed);
    alpha = 0, alphas = packed;
  }

  S single_rate(i64 k, size_t p) {
    S alpha;
    const S* none;
    rate(k, p, alpha, none);
    return alpha;
  }

  // ---- batches
  struct Slice {
    const S* x;
    const void* y;
    const S *weights, *class_weights;
    S *grad_x, *grad_y, *grad_weights;
  };
  Slice slice(const BatchPointers<S>& batch, i64 index, i64 examples, const LossSpec& loss) const {
    const Value &in = plan_.values[0], &out = plan_.values[plan_.output];
    const i64 x = index * examples * in.rows * in.cols, y = index * examples * out.rows * out.cols,
              w = index * examples;
    const void* target = nullptr;
    if (batch.y)
      target = loss.class_indices ? static_cast<const void*>(static_cast<const i64*>(batch.y) + w * out.rows)
                                  : static_cast<const void*>(static_cast<const S*>(batch.y) + y);
    return {batch.x + x,
            target,
            batch.weights ? batch.weights + w : nullptr,
            batch.class_weights,
            batch.grad_x ? batch.grad_x + x : nullptr,
            batch.grad_y ? batch.grad_y + y : nullptr,
            batch.grad_weights ? batch.grad_weights + w : nullptr};
  }
  Slice support(i64 k) const {
    const i64 index = options().support_per_step ? t_ * options().steps + k : t_;
    return slice(call_.support, index, options().support, options().loss);
  }
  Slice query() const { return slice(call_.query, t_, options().query, options().query_loss); }

  Pass<S> make_pass(const Geometry& geometry, bool input_gradient, S* x, S* d, const S* input, bool copied) {
    Pass<S> pass{plan_, kernels_, geometry, at_ + plan_.at.temporary, input_gradient};
    pass.x = x, pass.d = d;
    pass.rx = at_ + plan_.at.tangents, pass.rd = at_ + plan_.at.tangent_deltas;
    const Value& in = plan_.values[0];
    if (!plan_.alias_input && !copied) load_value(in, input, geometry.examples, x, plan_.input_ld);
    pass.input = plan_.alias_input ? input : x, pass.input_ld = plan_.input_ld;
    return pass;
  }
  // `copied`: the input stands where this pass has it already.
  Pass<S> support_pass(i64 k, const Slice& batch, bool copied) {
    S* x = at_ + plan_.at.values + k * plan_.at.value_stride;
    S* d = at_ + plan_.at.deltas + k * plan_.at.delta_stride;
    Pass<S> pass = make_pass(plan_.support, batch.grad_x != nullptr, x, d, batch.x, copied);
    pass.theta = view(k);
    if (input_.active()) {
      pass.low_rank = input_.support_forward(k);
    }
    return pass;
  }
  Pass<S> query_pass(i64 k, const Slice& batch) {
    Pass<S> pass = make_pass(plan_.query, batch.grad_x != nullptr, at_ + plan_.at.query_values,
                             at_ + plan_.at.query_deltas, batch.x, false);
    pass.theta = view(k);
    if (input_.active()) {
      input_.query(pass.input, pass.input_ld);
      pass.low_rank = input_.query_forward(k);
    }
    return pass;
  }

  LossCall<S> loss_call(const Pass<S>& pass, const LossSpec& spec, const Slice& batch, double scale,
                        double side_scale) const {
    const Value& out = plan_.values[plan_.output];
    LossCall<S> l{};
    l.spec = spec, l.scale = scale, l.side_scale = side_scale;
    l.examples = pass.geometry.examples, l.rows = out.rows, l.cols = out.cols, l.ld = out.ld;
    l.channels = out.channels && out.rows > 1;
    l.z = pass.value(plan_.output), l.target = batch.y, l.weights = batch.weights;
    l.class_weights = batch.class_weights;
    return l;
  }

  // Adds the gradient of value 0, taken from a block of deltas, to the user's tensor.
  void add_input_gradient(const Pass<S>& pass, const S* block, S scale, S* grad) {
    const Value& in = plan_.values[0];
    add_value(in, block, in.ld, pass.geometry.examples, scale, grad);
  }

  // ---- the query's part of the objective
  double step_weight(i64 k) const {
    return call_.step_weights.empty() ? (k == options().steps ? 1.0 : 0.0) : call_.step_weights[k];
  }
  double support_weight(i64 k) const {
    return options().support_step_weights.empty() ? 0.0 : options().support_step_weights[size_t(k)];
  }
  // c_t
  double task_weight() const {
    return (call_.task_weights ? double(call_.task_weights[t_]) : 1.0) / double(call_.tasks);
  }
  bool has_query_loss() const { return options().query_loss.kind != LossKind::none; }

  void write_output(const Pass<S>& pass) {
    if (!call_.output) return;
    const Value& out = plan_.values[plan_.output];
    const S* z = pass.value(plan_.output);
    S* to = call_.output + t_ * options().query * out.rows * out.cols;
    for (i64 n = 0; n < pass.geometry.examples; ++n, z += out.rows * out.ld) {
      TorchOrder at(out, out.ld);
      for (i64 i = 0; i < out.rows * out.cols; ++i, at.next()) *to++ = z[at.offset];
    }
  }

  // Writes the gradient of one rate, summed in engine layout at `from`, to task `t` of `tasks` of
  // the user's tensor.
  void write_rate_gradient(size_t p, const S* from, i64 t, i64 tasks) {
    const Param& param = plan_.params[p];
    S* to = call_.params[p].rate_grad;
    if (!to) return;
    const i64 steps = param.rate_per_step ? options().steps : 1;
    for (i64 k = 0; k < steps; ++k) {
      if (param.rate_element)
        unpack(kernels_, plan_, param, from + k * param.size, to + (k * tasks + t) * param.numel());
      else
        to[k * tasks + t] = from[k * plan_.lane];
    }
  }

  static void zero(S* p, i64 n) {
    for (i64 i = 0; i < n; ++i) p[i] = 0;
  }

  const Plan& plan_;
  const Kernels<S>& kernels_;
  const Call<S>& call_;
  const Shared<S>& shared_;
  S* at_;
  i64 t_ = 0;
  InputLayer<S> input_;

 private:
  std::vector<const S*> primary_, mirror_;
};

}  // namespace fm
