// The meta-step of one task by one block: csrc/engine/meta_step.h says what it computes, in the same words. Here all
// layers, shapes and options are constants; a step ends with a barrier wherever another thread reads what it wrote.
//
//   theta_{k+1} = theta_k - alpha_k u_k,  u_k = mu u_{k-1} + grad L(theta_k) + omega theta_k
//   lambda_K    = s_K grad Q(theta_K) [+ adapted_grad]
//   v           = mbar - alpha_k lambda_{k+1}
//   lambda_k    = lambda_{k+1} + H_k v + omega v + s_k grad Q(theta_k);   mbar = mu v
//   d alpha_k   = -lambda_{k+1} u_k
#pragma once

#include "layers/add.h"
#include "layers/concat.h"
#include "layers/elementwise.h"
#include "layers/linear.h"
#include "layers/reshape.h"
#include "loss.h"

namespace fm::cuda {

// ---- the four walks over the layers ------------------------------------------------------------------------------
#define FM_BY_KIND(...)                               \
  if constexpr (LAYERS[L].kind == Kind::linear)       \
    linear::__VA_ARGS__;                              \
  else if constexpr (LAYERS[L].kind == Kind::add)     \
    add::__VA_ARGS__;                                 \
  else if constexpr (LAYERS[L].kind == Kind::concat)  \
    concat::__VA_ARGS__;                              \
  else if constexpr (LAYERS[L].kind == Kind::reshape) \
    reshape::__VA_ARGS__;                             \
  else                                                \
    elementwise::__VA_ARGS__

template <int L, bool INPUT>
constexpr bool goes_back() {
  for (int in : LAYERS[L].inputs)
    if (in >= 0 && (VALUES[in].from_params || INPUT)) return true;
  return false;
}

template <Space X>
FM_PASS void run_forward(Pass pass) {
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = decltype(index)::value;
    FM_BY_KIND(forward<L, X>(pass));
    barrier();
  });
}

// The parameters' gradients of a layer are taken together with the input gradient of the layer before it, which reads
// nothing that they write: so they may go to where this layer reads its weights.
template <Space X, bool INPUT>
FM_PASS void run_backward(Pass pass, Sink sink) {
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = LAYER_COUNT - 1 - decltype(index)::value;
    if constexpr (goes_back<L, INPUT>()) {
      FM_BY_KIND(backward_input<L, X, INPUT>(pass));
    }
    if constexpr (L + 1 < LAYER_COUNT && LAYERS[L + 1].kind == Kind::linear)
      if (sink.mode != Mode::none) linear::backward_params<L + 1, X>(pass, sink);
    if constexpr (goes_back<L, INPUT>() || TIED) barrier();
  });
  if constexpr (LAYERS[0].kind == Kind::linear)
    if (sink.mode != Mode::none) linear::backward_params<0, X>(pass, sink);
  barrier();
  sink.take_tied();
}

// The parameters' gradients alone, from what an earlier backward pass has left.
template <Space X>
FM_PASS void run_gradients(Pass pass, Sink sink) {
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = LAYER_COUNT - 1 - decltype(index)::value;
    if constexpr (LAYERS[L].kind == Kind::linear) linear::backward_params<L, X>(pass, sink);
    if constexpr (TIED) barrier();
  });
  sink.take_tied();
}

template <Space X>
FM_PASS void run_tangent(Pass pass, Along along) {
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = decltype(index)::value;
    if constexpr (has_tangent<LAYERS[L].output>) {
      FM_BY_KIND(tangent<L, X>(pass, along));
      barrier();
    }
  });
}

template <Space X, bool INPUT>
FM_PASS void run_tangent_backward(Pass pass, Along along, Sink sink) {
  for_each<0, LAYER_COUNT>([&](auto index) {
    constexpr int L = LAYER_COUNT - 1 - decltype(index)::value;
    if constexpr (goes_back<L, INPUT>()) {
      FM_BY_KIND(tangent_backward_input<L, X, INPUT>(pass, along));
    }
    if constexpr (L + 1 < LAYER_COUNT && LAYERS[L + 1].kind == Kind::linear)
      linear::tangent_backward_params<L + 1, X>(pass, sink);
    if constexpr (goes_back<L, INPUT>() || TIED) barrier();
  });
  if constexpr (LAYERS[0].kind == Kind::linear) linear::tangent_backward_params<0, X>(pass, sink);
  if constexpr (TIED) barrier();
  sink.take_tied();
}

// ---- one task ------------------------------------------------------------------------------------------------
class MetaStep {
 public:
  FM_INLINE MetaStep(const Args& args, S* workspace, i64 task) : args_(args), at_(workspace), t_(task) {}

  FM_INLINE void run() {
    load_theta(0);
    if (K > 0 && !OPTIONS.support_per_step) load_support(0);
    barrier();
    if constexpr (K > 0) {
      FM_UNROLL_BY(1)
      for (int k = 0; k < K; ++k) {
        if constexpr (!OPTIONS.gradient && OPTIONS.step_weights) query(k);
        inner_step(k);
      }
    }
    write_adapted();
    if constexpr (OPTIONS.gradient) {
      start_sweep();
      query(K);
      if (fresh_) {
        for_params([&](auto p) { zero_lambda<decltype(p)::value>(); });
        barrier();
      }
      fresh_ = false;
      if constexpr (K > 0) {
        FM_UNROLL_BY(1)
        for (int k = K - 1; k >= 0; --k) {
          step_back(k);
          if constexpr (OPTIONS.step_weights) query(k);
        }
      }
      write_gradients();
    } else {
      query(K);
    }
    if (thread() == 0) {
      if (args_.task_losses) args_.task_losses[t_] = S(value_);
      if (args_.partial) args_.partial[t_ * LAYOUT.columns + LAYOUT.columns - 1] = S(value_ * task_weight());
    }
    barrier();  // the next task takes this one's memory
  }

 private:
  static constexpr int K = OPTIONS.steps;
  static constexpr Space X = LAYOUT.values.space, Q = LAYOUT.query_values.space;
  static constexpr bool RATES_FROM_GRADIENT = OPTIONS.wants_rates && !KEEPS_UPDATES;

  template <class Body>
  static FM_INLINE void for_params(const Body& body) {
    for_each<0, PARAM_COUNT>(body);
  }
  // Calls body(element of torch's tensor, element of ours) for all of parameter P's.
  template <int P, class Body>
  static FM_INLINE void for_param(const Body& body) {
    constexpr Param p = PARAMS[P];
    for (int e = thread(); e < p.numel(); e += step_threads()) body(e, e / p.cols * p.ld + e % p.cols);
  }

  // ---- loading and writing -----------------------------------------------------------------------------------
  template <int P>
  FM_INLINE const S* given() const {
    return args_.params[P].data + (PARAMS[P].per_task ? t_ * PARAMS[P].numel() : 0);
  }
  // theta_k to where it is read, if it is not there.
  FM_INLINE void load_theta(int k) const {
    for_params([&](auto index) {
      constexpr int P = decltype(index)::value;
      constexpr Param p = PARAMS[P];
      S* to = theta<P>(at_, 0);
      if (k == 0) {
        const S* from = given<P>();
        for_param<P>([&](int e, int at) { to[at] = from[e]; });
      } else if constexpr (p.adapted && LAYOUT.checkpoints >= 0) {
        const S* from = at_ + LAYOUT.checkpoints + (k - 1) * SET + p.at - LAYOUT.frozen;
        for_param<P>([&](int, int at) { to[at] = from[at]; });
      }
    });
  }
  FM_INLINE void load_input(const S* from, const Area& area, int examples) const {
    constexpr Value in = VALUES[0];
    if constexpr (LAYOUT.input.space != Space::user) {
      S* to = memory<LAYOUT.input.space>(at_, area.at);
      for (int e = thread(); e < examples * in.rows * in.cols; e += step_threads())
        to[e / in.cols * in.ld + e % in.cols] = from[e];
    }
  }
  FM_INLINE void load_support(int k) const { load_input(support(k).x, LAYOUT.input, OPTIONS.support); }

  FM_INLINE void write_adapted() const {
    for_params([&](auto index) {
      constexpr int P = decltype(index)::value;
      if (S* to = args_.params[P].adapted) {
        const S* from = theta<P>(at_, K);
        for_param<P>([&](int e, int at) { to[t_ * PARAMS[P].numel() + e] = from[at]; });
      }
    });
  }

  FM_INLINE void write_gradients() const {
    if constexpr (!OPTIONS.wants_params) return;
    for_params([&](auto index) {
      constexpr int P = decltype(index)::value;
      constexpr Param p = PARAMS[P];
      S* to = p.per_task ? args_.params[P].grad + t_ * p.numel() : args_.partial + t_ * LAYOUT.columns + p.column;
      const S* from = lambda<P>(at_);
      for_param<P>([&](int e, int at) { to[e] = from[at]; });
    });
  }

  // ---- batches and passes -----------------------------------------------------------------------------------
  FM_INLINE Slice support(int k) const {
    return slice(args_.support, OPTIONS.support_per_step ? t_ * K + k : t_, OPTIONS.support,
                 OPTIONS.loss.class_indices);
  }
  FM_INLINE Slice queries() const { return slice(args_.query, t_, OPTIONS.query, OPTIONS.query_loss.class_indices); }
  FM_INLINE Pass support_pass(int k, const Slice& batch) const {
    return {at_,
            OPTIONS.support,
            batch.x,
            LAYOUT.input.at,
            LAYOUT.values.at + k * LAYOUT.value_stride,
            LAYOUT.deltas.at + k * LAYOUT.delta_stride,
            LAYOUT.tangents.at,
            LAYOUT.tangent_deltas.at,
            k};
  }
  FM_INLINE Pass query_pass(int k, const Slice& batch) const {
    return {at_, OPTIONS.query, batch.x, LAYOUT.query_input.at, LAYOUT.query_values.at, LAYOUT.query_deltas.at, 0, 0,
            k};
  }
  FM_INLINE Sink sink(Mode mode, int k) const { return {args_, at_, mode, k, t_, fresh_}; }

  // ---- the inner loop -----------------------------------------------------------------------------------------
  FM_INLINE void support_gradient(const Pass& pass, const Slice& batch, const Sink& to) const {
    run_forward<X>(pass);
    loss<false, false>(at_, batch, OPTIONS.support, value<OUTPUT, X>(pass), nullptr, delta<OUTPUT, X>(pass), S(1),
                       false);
    barrier();
    run_backward<X, false>(pass, to);
  }

  FM_INLINE void inner_step(int k) const {
    if constexpr (OPTIONS.support_per_step) load_support(k), barrier();
    const Slice batch = support(k);
    support_gradient(support_pass(k, batch), batch, sink(Mode::update, k));
    if constexpr (TIED) barrier();
  }

  // ---- the query --------------------------------------------------------------------------------------------------
  FM_INLINE double task_weight() const {
    return (args_.task_weights ? double(args_.task_weights[t_]) : 1.0) / double(args_.tasks);
  }
  FM_INLINE double step_weight(int k) const {
    if constexpr (OPTIONS.query_loss.kind == LossKind::none) return 0;
    return OPTIONS.step_weights ? args_.step_weights[k] : k == K ? 1.0 : 0.0;
  }

  // The query at theta_k: its share of the loss; its gradients times c_t s_k added to lambda and the inputs'.
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
          loss<true, false>(at_, batch, OPTIONS.query, z, nullptr, dz, S(s * task_weight()), OPTIONS.gradient);
          barrier();
          value_ += s * sum_of_terms(at_, OPTIONS.query);
        }
      }
      if constexpr (OPTIONS.gradient) {
        if (!has_gradient && last && args_.output_grad) {
          constexpr Value out = VALUES[OUTPUT];
          const S* from = args_.output_grad + t_ * OPTIONS.query * out.rows * out.cols;
          S* dz = delta<OUTPUT, Q>(pass);
          for_elements<OUTPUT>(pass, [&](int at, int r, int c) { dz[at] = from[r * out.cols + c]; });
          has_gradient = true;
          barrier();
        }
        if (has_gradient) {
          run_backward<Q, OPTIONS.wants_query_x>(pass, sink(Mode::lambda, k));
          fresh_ = false;
          if constexpr (OPTIONS.wants_query_x) add_input_gradient(pass, delta<0, Q>(pass), batch.grad_x);
        }
      }
      barrier();
    }
  }
  FM_INLINE void write_output(const Pass& pass, const S* z) const {
    constexpr Value out = VALUES[OUTPUT];
    if (!args_.output) return;
    S* to = args_.output + t_ * OPTIONS.query * out.rows * out.cols;
    for_elements<OUTPUT>(pass, [&](int at, int r, int c) { to[r * out.cols + c] = z[at]; });
  }
  FM_INLINE void add_input_gradient(const Pass& pass, const S* from, S* to) const {
    for_elements<0>(pass, [&](int at, int r, int c) { to[r * VALUES[0].cols + c] += from[at]; });
  }

  // ---- the sweep back ---------------------------------------------------------------------------------------------
  FM_INLINE void start_sweep() {
    for_params([&](auto index) {
      constexpr int P = decltype(index)::value;
      if (const S* seed = args_.params[P].seed) {
        S* to = lambda<P>(at_);
        for_param<P>([&](int e, int at) { to[at] = seed[t_ * PARAMS[P].numel() + e]; });
        fresh_ = false;
      }
    });
    start_rates();
    barrier();
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
      run_gradients<X>(pass, sink(Mode::rates, k));
    if constexpr (KEEPS_UPDATES) rates_from_updates(k);
    if constexpr (OPTIONS.wants_rates) finish_rates(k);
    if constexpr (WRITES_DIRECTION && (OPTIONS.second_order || !PLAIN_RULE)) write_direction(k);
    if constexpr (OPTIONS.second_order) hessian_vector(pass, batch, k);
    if constexpr (OPTIONS.weight_decay) {
      for_params([&](auto index) {
        constexpr int P = decltype(index)::value;
        if constexpr (PARAMS[P].adapted)
          for_param<P>([&](int, int at) { lambda<P>(at_)[at] += S(args_.weight_decay) * direction<P>(at_)[at]; });
      });
      barrier();
    }
  }

  // v = mbar - alpha lambda; mbar is mu times the v before, nothing in the first step back.
  FM_INLINE void write_direction(int k) const {
    const Sink from = sink(Mode::none, k);
    for_params([&](auto index) {
      constexpr int P = decltype(index)::value;
      constexpr Param p = PARAMS[P];
      if constexpr (p.adapted)
        for (int e = thread(); e < p.numel(); e += step_threads()) {
          const int r = e / p.cols, c = e % p.cols, at = r * p.ld + c;
          const S alpha = rates<P, 1>(args_, k, t_, r, c).at[0];
          S v = -alpha * lambda<P>(at_)[at];
          if constexpr (OPTIONS.momentum)
            if (k < K - 1) v += S(args_.momentum) * direction<P>(at_)[at];
          direction<P>(at_)[at] = v;
        }
    });
    barrier();
  }

  // lambda += H v; the mixed derivatives into the gradients of the support set.
  FM_INLINE void hessian_vector(const Pass& pass, const Slice& batch, int k) const {
    const Along along{args_, at_, k, t_};
    run_tangent<X>(pass, along);
    loss<false, true>(at_, batch, OPTIONS.support, value<OUTPUT, X>(pass), tangent<OUTPUT>(pass),
                      tangent_delta<OUTPUT>(pass), S(1), true);
    barrier();
    run_tangent_backward<X, OPTIONS.wants_support_x>(pass, along, sink(Mode::lambda, k));
    if constexpr (OPTIONS.wants_support_x) add_input_gradient(pass, tangent_delta<0>(pass), batch.grad_x);
    barrier();
  }

  // ---- gradients of learning rates ----------------------------------------------------------------------------------
  // Every thread's own sums.
  FM_INLINE void start_rates() const {
    if constexpr (OPTIONS.wants_rates)
      for (int slot = 0; slot < RATE_SLOTS; ++slot) rate_sums(at_, slot)[thread()] = 0;
  }

  FM_INLINE void rates_from_updates(int k) const {
    const Sink to = sink(Mode::rates, k);
    for_params([&](auto index) {
      constexpr int P = decltype(index)::value;
      constexpr Param p = PARAMS[P];
      if constexpr (p.adapted) {
        const S* u = memory<LAYOUT.updates.space>(at_, LAYOUT.updates.at + k * SET + p.at - LAYOUT.frozen);
        for (int e = thread(); e < p.numel(); e += step_threads()) {
          const int r = e / p.cols, c = e % p.cols, at = r * p.ld + c;
          to.rate_gradient<P>(r, c, one(lambda<P>(at_)[at]), one(u[at]));
        }
      }
    });
  }

  // Adds up the threads' sums where a scalar rate's gradient is complete: of one step, or of all. The order depends on
  // nothing but the number of threads.
  FM_INLINE void finish_rates(int k) const {
    barrier();
    if (!RATE_PER_STEP && k > 0) return;
    for_scalar_rates(k, [&](auto index, double* sums) {
      constexpr int first = PARAMS[decltype(index)::value].rate_slot * 32;
      for (int j = (thread() + step_threads() - first % step_threads()) % step_threads(); j < 32; j += step_threads()) {
        double total = 0;
        for (int i = j; i < step_threads(); i += 32) total += sums[i];
        sums[j] = total;
      }
    });
    barrier();
    const Sink to = sink(Mode::rates, k);
    for_scalar_rates(k, [&](auto index, double* sums) {
      constexpr int P = decltype(index)::value;
      if (thread() == PARAMS[P].rate_slot % step_threads()) {
        double total = 0;
        for (int i = 0; i < 32; ++i) total += sums[i];
        *to.rate_place<P>() = S(total);
      }
    });
    barrier();
    for_scalar_rates(k, [&](auto, double* sums) { sums[thread()] = 0; });
  }
  // Calls body(parameter, threads' sums) for every scalar rate whose gradient is complete at step k.
  template <class Body>
  FM_INLINE void for_scalar_rates(int k, const Body& body) const {
    for_params([&](auto index) {
      constexpr Param p = PARAMS[decltype(index)::value];
      if constexpr (p.adapted && !p.rate_element)
        if (p.rate_per_step || k == 0) body(index, rate_sums(at_, p.rate_slot));
    });
  }

  const Args& args_;
  S* at_;
  i64 t_;
  bool fresh_ = true;  // lambda has not been written yet
  double value_ = 0;   // of the query losses
};

}  // namespace fm::cuda
