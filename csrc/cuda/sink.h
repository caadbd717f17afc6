// Where the gradient of a parameter goes, straight out of the product that made it.
#pragma once

#include "args.h"
#include "pass.h"
#include "rule_memory.h"

namespace fm::cuda {

// update: theta_{k+1} = theta_k - alpha u;  lambda: added to lambda;  rates: -lambda u to the
// gradient of alpha; with u = mu u_{k-1} + gradient + omega theta_k. Of a general rule update writes
// the gradient down.
enum class Mode { none, update, lambda, rates };

constexpr int SET = LAYOUT.set;
constexpr bool GENERAL_RULE = OPTIONS.rule.general;
// u_k cannot be had again from theta_k alone.
constexpr bool KEEPS_UPDATES = OPTIONS.gradient && OPTIONS.wants_rates && OPTIONS.momentum;

constexpr bool any_param(bool (*has)(const Param&)) {
  for (int p = 0; p < PARAM_COUNT; ++p)
    if (has(PARAMS[p])) return true;
  return false;
}
constexpr bool is_tied(const Param& p) { return p.tied; }
constexpr bool has_element_rate(const Param& p) { return p.adapted && p.rate_element; }
constexpr bool has_step_rate(const Param& p) { return p.adapted && !p.rate_element && p.rate_per_step; }
constexpr bool TIED = any_param(is_tied);
constexpr bool RATE_PER_STEP = any_param(has_step_rate);
constexpr bool PLAIN_RULE = !OPTIONS.momentum && !OPTIONS.weight_decay && !GENERAL_RULE;
// Whether v is written down; else it is -alpha lambda with one alpha for each parameter, multiplied
// in by the products.
constexpr bool WRITES_DIRECTION = !PLAIN_RULE || TIED || any_param(has_element_rate);

// Whether layer L is the last one in the program to use parameter P, hence the first one in a
// backward pass.
constexpr bool first_use(int p, int layer) {
  for (int l = layer + 1; l < LAYER_COUNT; ++l)
    if (LAYERS[l].weight == p || LAYERS[l].bias == p) return false;
  return true;
}

#ifdef __CUDACC__
FM_INLINE S read_only(const S* from) { return __ldg(from); }
#else
FM_INLINE S read_only(const S* from) { return *from; }
#endif

// The first rate of parameter P in step k of task t.
template <int P>
FM_INLINE const S* rate(const Args& args, int k, i64 t) {
  constexpr Param p = PARAMS[P];
  const i64 step = p.rate_per_step ? k : 0, task = p.rate_per_task ? t : 0;
  return args.params[P].rate +
         (step * (p.rate_per_task ? args.tasks : 1) + task) * (p.rate_element ? p.numel() : 1);
}
// That of element (r, c), of a parameter that has one for each.
template <int P>
FM_INLINE S element_rate(const Args& args, int k, i64 t, int r, int c) {
  return read_only(rate<P>(args, k, t) + r * PARAMS[P].cols + c);
}

// A thread's own sum of one scalar rate's gradient, in its own block's memory: of many terms, hence
// in double.
FM_INLINE double& rate_sum(S* workspace, int slot, int thread) {
  constexpr int each = int(sizeof(double) / sizeof(S));
  const int at = LAYOUT.sums.at + slot * LAYOUT.threads * each;
  S* const sums = memory<LAYOUT.sums.space>(workspace, thread / LAYOUT.threads, at);
  return reinterpret_cast<double*>(sums)[thread % LAYOUT.threads];
}

// The direction v of a Hessian-vector product.
struct Along {
  const Args& args;
  S* workspace;
  int k;
  i64 t;

  template <int P>
  FM_INLINE const S* vector() const {
    return WRITES_DIRECTION ? direction<P>(workspace) : lambda<P>(workspace);
  }
  // What the vector is multiplied by. To be asked for before a product, not after it: a load is
  // long under way.
  template <int P>
  FM_INLINE S factor() const {
    return WRITES_DIRECTION ? S(1) : -read_only(rate<P>(args, k, t));
  }
  template <int M, int N>
  FM_INLINE void scale(S (&acc)[M][N], S by) const {
    if constexpr (!WRITES_DIRECTION) {
      FM_UNROLL
      for (int i = 0; i < M; ++i) {
        FM_UNROLL
        for (int j = 0; j < N; ++j) acc[i][j] *= by;
      }
    }
  }
};

// What parameter P's share of the direction is multiplied by; P may be absent or frozen.
template <int P>
FM_INLINE S factor(const Along& along) {
  if constexpr (P >= 0)
    if constexpr (PARAMS[P].adapted) return along.factor<P>();
  return S(0);
}

constexpr bool is_adapted(int param) { return param >= 0 && PARAMS[param].adapted; }

struct Sink {
  const Args& args;
  S* workspace;
  Mode mode;
  int k;
  i64 t;
  bool fresh;  // lambda has not been written yet

  // Whether anybody wants the gradients of layer L's parameters.
  template <int L>
  FM_INLINE bool takes() const {
    return is_adapted(LAYERS[L].weight) || is_adapted(LAYERS[L].bias) || mode == Mode::lambda;
  }

  // The rate of parameter P where it has one alone and an update needs it. To be asked for before a
  // product, not after it: a load is long under way.
  template <int P>
  FM_INLINE S one_rate() const {
    constexpr Param p = PARAMS[P];
    if constexpr (p.adapted && !p.rate_element && !GENERAL_RULE)
      if (mode == Mode::update) return read_only(rate<P>(args, k, t));
    return S(0);
  }

  // N elements of the gradient of parameter P from (r, c) on, by layer L; `alpha` is P's
  // `one_rate`.
  template <int P, int L, int N>
  FM_INLINE void put(int r, int c, Vec<N> g, S alpha) const {
    constexpr Param p = PARAMS[P];
    if constexpr (p.tied) {
      S* to = tied_gradient<P>() + r * p.ld + c;
      if constexpr (!first_use(P, L)) add(g, load<N>(to));
      store<N>(to, g);
    } else {
      take<P>(r, c, g, alpha);
    }
  }

  // What layers with the same parameter have summed up, once all of them have: to be said after a
  // barrier.
  FM_INLINE void take_tied() const {
    for_each<0, PARAM_COUNT>([&](auto index) {
      constexpr int P = decltype(index)::value;
      constexpr Param p = PARAMS[P];
      if constexpr (p.tied) {
        const S alpha = one_rate<P>();
        for (int e = thread(); e < p.numel(); e += step_threads())
          take<P>(e / p.cols, e % p.cols, one(tied_gradient<P>()[e / p.cols * p.ld + e % p.cols]), alpha);
      }
    });
  }

  template <int P, int N>
  FM_INLINE void take(int r, int c, Vec<N> g, S alpha) const {
    constexpr Param p = PARAMS[P];
    const int at = r * p.ld + c;
    if (mode == Mode::lambda) {
      S* to = lambda<P>(workspace) + at;
      if (!fresh) add(g, load<N>(to));
      store<N>(to, g);
    }
    if constexpr (p.adapted) {
      if constexpr (GENERAL_RULE) {
        if (mode == Mode::update) store<N>(rule_gradient<P>(workspace, k) + at, g);
      } else {
        if (mode == Mode::update) update<P>(r, c, at, g, alpha);
      }
      if constexpr (OPTIONS.wants_rates && !KEEPS_UPDATES && !GENERAL_RULE)
        if (mode == Mode::rates) {
          if constexpr (OPTIONS.weight_decay) decay(g, load<N>(theta<P>(workspace, k) + at));
          rate_gradient<P>(r, c, load<N>(lambda<P>(workspace) + at), g);
        }
    }
  }

  template <int P, int N>
  FM_INLINE void update(int r, int c, int at, Vec<N> u, S alpha) const {
    Vec<N> next = load<N>(theta<P>(workspace, k) + at);
    if constexpr (OPTIONS.weight_decay) decay(u, next);
    if constexpr (OPTIONS.momentum) {
      S* m = direction<P>(workspace) + at;
      if (k > 0) {
        const Vec<N> before = load<N>(m);
        FM_UNROLL
        for (int j = 0; j < N; ++j) u.at[j] += S(args.momentum) * before.at[j];
      }
      store<N>(m, u);
    }
    constexpr int place = PARAMS[P].at - LAYOUT.frozen;
    if constexpr (KEEPS_UPDATES)
      store<N>(
          memory<LAYOUT.updates.space>(workspace, PARAMS[P].rank, LAYOUT.updates.at + k * SET + place + at),
          u);
    FM_UNROLL
    for (int j = 0; j < N; ++j)
      if constexpr (PARAMS[P].rate_element)
        next.at[j] -= (c + j < PARAMS[P].cols ? element_rate<P>(args, k, t, r, c + j) : S(0)) * u.at[j];
      else
        next.at[j] -= alpha * u.at[j];
    store<N>(theta<P>(workspace, k + 1) + at, next);
    if constexpr (LAYOUT.checkpoints >= 0)
      if (k + 1 < OPTIONS.steps) store<N>(checkpoint<P>(workspace, k + 1) + at, next);
  }

  // -lambda u, summed over elements or each for itself. A scalar's sum is one for each thread until
  // the end.
  template <int P, int N>
  FM_INLINE void rate_gradient(int r, int c, const Vec<N>& l, const Vec<N>& u) const {
    Vec<N> terms;
    FM_UNROLL
    for (int j = 0; j < N; ++j) terms.at[j] = -l.at[j] * u.at[j];
    add_rate_gradient<P>(r, c, terms);
  }
  template <int P, int N>
  FM_INLINE void add_rate_gradient(int r, int c, const Vec<N>& terms) const {
    constexpr Param p = PARAMS[P];
    double sum = 0;
    FM_UNROLL
    for (int j = 0; j < N; ++j) {
      if (c + j >= p.cols) break;
      const S term = terms.at[j];
      sum += double(term);
      if constexpr (p.rate_element) {
        S* to = rate_place<P>() + r * p.cols + c + j;
        const bool first = p.rate_per_step || k == OPTIONS.steps - 1;
        *to = first ? term : *to + term;
      }
    }
    if constexpr (!p.rate_element) rate_sum(workspace, p.rate_slot, thread()) += sum;
  }
  // Where the gradient of P's rate goes.
  template <int P>
  FM_INLINE S* rate_place() const {
    constexpr Param p = PARAMS[P];
    const i64 step = p.rate_per_step ? k : 0, length = p.rate_element ? p.numel() : 1;
    if constexpr (p.rate_per_task) return args.params[P].rate_grad + (step * args.tasks + t) * length;
    return args.partial + t * LAYOUT.columns + p.rate_column + step * length;
  }

 private:
  template <int P>
  FM_INLINE S* tied_gradient() const {
    return memory<LAYOUT.gradient.space>(workspace, PARAMS[P].rank, LAYOUT.gradient.at + PARAMS[P].gradient);
  }
  template <int N>
  FM_INLINE void add(Vec<N>& to, const Vec<N>& from) const {
    FM_UNROLL
    for (int j = 0; j < N; ++j) to.at[j] += from.at[j];
  }
  template <int N>
  FM_INLINE void decay(Vec<N>& u, const Vec<N>& theta) const {
    FM_UNROLL
    for (int j = 0; j < N; ++j) u.at[j] += S(args.weight_decay) * theta.at[j];
  }
};

}  // namespace fm::cuda
