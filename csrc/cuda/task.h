// One task: what it reads and writes, and the passes over it.
#pragma once

#include "args.h"
#include "pass.h"
#include "sink.h"

namespace fm::cuda {

class Task {
 public:
  FM_INLINE Task(const Args& args, S* workspace, i64 task) : args_(args), at_(workspace), t_(task) {}

 protected:
  static constexpr int K = OPTIONS.steps;
  static constexpr Space X = LAYOUT.values.space, Q = LAYOUT.query_values.space;

  // ---- loading and writing
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
        const S* from = checkpoint<P>(at_, k);
        for_param<P>([&](int, int at) { to[at] = from[at]; });
      }
    });
  }
  FM_INLINE void load_input(const S* from, const Area& area, int examples) const {
    constexpr Value in = VALUES[0];
    if constexpr (LAYOUT.input.space != Space::user) {
      S* to = memory<LAYOUT.input.space>(at_, VALUES[0].rank, area.at);
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
      if constexpr (p.buffer) return;
      S* to =
          p.per_task ? args_.params[P].grad + t_ * p.numel() : args_.partial + t_ * LAYOUT.columns + p.column;
      const S* from = lambda<P>(at_);
      for_param<P>([&](int e, int at) { to[e] = from[at]; });
    });
  }

  // ---- batches and passes
  FM_INLINE Slice support(int k) const {
    return slice(args_.support, OPTIONS.support_per_step ? t_ * K + k : t_, OPTIONS.support,
                 OPTIONS.loss.class_indices);
  }
  FM_INLINE Slice queries() const {
    return slice(args_.query, t_, OPTIONS.query, OPTIONS.query_loss.class_indices);
  }
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
    return {at_,
            OPTIONS.query,
            batch.x,
            LAYOUT.query_input.at,
            LAYOUT.query_values.at,
            LAYOUT.query_deltas.at,
            0,
            0,
            k};
  }
  FM_INLINE Sink sink(Mode mode, int k) const { return {args_, at_, mode, k, t_, fresh_}; }

  const Args& args_;
  S* at_;
  i64 t_;
  bool fresh_ = true;  // lambda has not been written yet
  double value_ = 0;   // of the query losses
};

}  // namespace fm::cuda
