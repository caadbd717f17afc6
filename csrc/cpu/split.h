// Kernels that share one call out over the threads of the pool, for calls with fewer tasks than
// threads.
//
// A call is cut along its outputs only: every output is summed by one thread in the order that it
// always has, so that the bits are those of one thread.
#pragma once

#include "kernels.h"
#include "thread_pool.h"

namespace fm {

template <class S>
class SplitKernels {
 public:
  // The kernels of `base` on so many threads. One call of the engine at a time: the pool's session
  // guards it.
  static const Kernels<S>& over(const Kernels<S>& base, int threads) {
    base_ = &base, threads_ = threads;
    table_ = base;
    table_.gemm = gemm;
    table_.gemms = gemms;
    table_.conv = conv;
    table_.conv_weight = conv_weight;
    table_.winograd_input = tiles<&Kernels<S>::winograd_input>;
    table_.winograd_output = tiles<&Kernels<S>::winograd_output>;
    table_.winograd_gradient = tiles<&Kernels<S>::winograd_gradient>;
    table_.winograd_weight = winograd_weight<&Kernels<S>::winograd_weight>;
    table_.winograd_weight_gradient = winograd_weight<&Kernels<S>::winograd_weight_gradient>;
    table_.column_sums = columns<ColumnSums<S>, &Kernels<S>::column_sums, shift_sums>;
    table_.column_squares = columns<ColumnSquares<S>, &Kernels<S>::column_squares, shift_squares>;
    table_.column_products = columns<ColumnProducts<S>, &Kernels<S>::column_products, shift_products>;
    table_.column_combination =
        columns<ColumnCombination<S>, &Kernels<S>::column_combination, shift_combination>;
    table_.pooled_forward = columns<PooledColumns<S>, &Kernels<S>::pooled_forward, shift_pooled>;
    table_.pooled_pick = columns<PooledColumns<S>, &Kernels<S>::pooled_pick, shift_pooled>;
    table_.pooled_combination = columns<PooledColumns<S>, &Kernels<S>::pooled_combination, shift_pooled>;
    table_.max_pool_forward = pool<&Kernels<S>::max_pool_forward, false>;
    table_.max_pool_gather = pool<&Kernels<S>::max_pool_gather, false>;
    table_.max_pool_scatter = pool<&Kernels<S>::max_pool_scatter, true>;
    table_.avg_pool_gather = pool<&Kernels<S>::avg_pool_gather, false>;
    table_.avg_pool_scatter = pool<&Kernels<S>::avg_pool_scatter, true>;
    table_.elementwise_forward = elementwise<&Kernels<S>::elementwise_forward>;
    table_.elementwise_backward = elementwise<&Kernels<S>::elementwise_backward>;
    table_.elementwise_tangent = elementwise<&Kernels<S>::elementwise_tangent>;
    table_.elementwise_tangent_backward = elementwise<&Kernels<S>::elementwise_tangent_backward>;
    return table_;
  }

 private:
  // Less than this many multiply-adds or elements is not worth waking anybody for.
  static constexpr i64 WORTHWHILE = 1 << 16;

  // Calls body(begin, end) for pieces of [0, n), each a multiple of `unit` long but for the last.
  template <class Body>
  static void share(i64 n, i64 unit, i64 work, const Body& body) {
    const i64 units = (n + unit - 1) / unit, pieces = units < threads_ ? units : threads_;
    if (pieces < 2 || work < WORTHWHILE) return body(i64(0), n);
    parallel(threads_, int(pieces), [&](int i, int) {
      const i64 begin = units * i / pieces * unit, end = units * (i + 1) / pieces * unit;
      body(begin, end < n ? end : n);
    });
  }

  template <class T>
  static Matrix<T> from_column(Matrix<T> m, i64 j) {
    if (!m) return m;
    i64 stride;
    m.data = m.column(j, stride);
    if (m.padded) m.padded -= j;
    return m;
  }

  static void gemm(const Gemm<S>& g) {
    i64 k = 0;
    for (int p = 0; p < g.pairs; ++p) k += g.depth(p);
    const bool plain = !g.c.padded && !g.base.padded && !g.also.padded && !g.mask.padded;
    if (g.n > panel_columns<S> || !plain) {
      share(g.n, panel_columns<S>, g.m * g.n * k, [&](i64 begin, i64 end) {
        Gemm<S> part = g;
        part.n = end - begin;
        for (int p = 0; p < g.pairs; ++p) part.pair[p].b = from_column(g.pair[p].b, begin);
        part.c = from_column(g.c, begin), part.base = from_column(g.base, begin);
        part.also = from_column(g.also, begin), part.mask = from_column(g.mask, begin);
        if (g.bias) part.bias = g.bias + begin;
        base_->gemm(part);
      });
      return;
    }
    share(g.m, 1, g.m * g.n * k, [&](i64 begin, i64 end) {
      Gemm<S> part = g;
      part.m = end - begin;
      for (int p = 0; p < g.pairs; ++p) part.pair[p].a += begin * g.pair[p].a_row;
      part.c.data += begin * g.c.ld;
      if (g.base) part.base.data += begin * g.base.ld;
      if (g.also) part.also.data += begin * g.also.ld;
      if (g.mask) part.mask.data += begin * g.mask.ld;
      base_->gemm(part);
    });
  }

  static void gemms(const Gemm<S>* calls, i64 count) {
    const i64 work = count * calls[0].m * calls[0].n * calls[0].depth(0) * calls[0].pairs;
    share(count, 1, work, [&](i64 begin, i64 end) { base_->gemms(calls + begin, end - begin); });
  }

  template <void (*Kernels<S>::*KERNEL)(const WinogradTiles<S>&)>
  static void tiles(const WinogradTiles<S>& t) {
    share(t.n, lane_pad<S>, (t.end - t.begin) * 16 * t.n, [&](i64 begin, i64 end) {
      WinogradTiles<S> part = t;
      part.n = end - begin;
      shift(begin, part.from, part.to, part.bias);
      (base_->*KERNEL)(part);
    });
  }
  template <void (*Kernels<S>::*KERNEL)(const WinogradWeight<S>&)>
  static void winograd_weight(const WinogradWeight<S>& w) {
    share(w.n, lane_pad<S>, 16 * w.n, [&](i64 begin, i64 end) {
      WinogradWeight<S> part = w;
      part.n = end - begin;
      shift(begin, part.from, part.to, part.base, part.also);
      (base_->*KERNEL)(part);
    });
  }

  static void conv(const Conv<S>& v) {
    const i64 work = v.examples * v.c_h * v.c_w * v.n * v.k * v.kh * v.kw;
    share(v.examples, 1, work, [&](i64 begin, i64 end) {
      Conv<S> part = v;
      part.examples = end - begin;
      for (int p = 0; p < v.pairs; ++p) part.pair[p].a += begin * v.a_h * v.a_w * v.pair[p].lda;
      part.c += begin * v.c_h * v.c_w * v.ldc;
      base_->conv(part);
    });
  }

  static void conv_weight(const ConvWeight<S>& v) {
    const i64 work = v.examples * v.b_h * v.b_w * v.n * v.k * v.kh * v.kw;
    share(v.last_tap - v.first_tap, 1, work, [&](i64 begin, i64 end) {
      ConvWeight<S> part = v;
      part.first_tap = v.first_tap + begin, part.last_tap = v.first_tap + end;
      base_->conv_weight(part);
    });
  }

  template <class Call, void (*Kernels<S>::*KERNEL)(const Call&), void (*SHIFT)(Call&, i64)>
  static void columns(const Call& call) {
    share(call.n, lane_pad<S>, rows(call) * call.n, [&](i64 begin, i64 end) {
      Call part = call;
      part.n = end - begin;
      SHIFT(part, begin);
      (base_->*KERNEL)(part);
    });
  }
  template <class Call>
  static i64 rows(const Call& call) {
    return call.rows;
  }
  static i64 rows(const PooledColumns<S>& p) { return p.images * p.in_h * p.in_w; }
  template <class... Pointers>
  static void shift(i64 j, Pointers&... pointers) {
    ((pointers = pointers ? pointers + j : nullptr), ...);
  }
  static void shift_sums(ColumnSums<S>& s, i64 j) { shift(j, s.a, s.base, s.also, s.out); }
  static void shift_squares(ColumnSquares<S>& s, i64 j) { shift(j, s.x, s.center, s.out); }
  static void shift_products(ColumnProducts<S>& s, i64 j) {
    shift(j, s.a, s.x, s.center, s.b, s.d, s.mask, s.sum, s.sum_x, s.sum_b);
  }
  static void shift_combination(ColumnCombination<S>& s, i64 j) {
    for (int i = 0; i < s.terms; ++i) shift(j, s.term[i].from, s.term[i].coefficients);
    shift(j, s.center, s.constant, s.mask, s.out);
  }

  static void shift_pooled(PooledColumns<S>& p, i64 j) {
    shift(j, p.x, p.center, p.from_x, p.rx, p.from_rx, p.positions, p.maxima, p.mask, p.constant, p.out);
    for (auto& term : p.pooled) shift(j, term.from, term.coefficients);
  }

  template <void (*Kernels<S>::*KERNEL)(const Pool<S>&), bool TO_IMAGE>
  static void pool(const Pool<S>& p) {
    share(p.examples, 1, p.examples * p.in_h * p.in_w * p.n, [&](i64 begin, i64 end) {
      Pool<S> part = p;
      part.examples = end - begin;
      const i64 image = begin * p.in_h * p.in_w, windows = begin * p.out_h * p.out_w;
      part.from += (TO_IMAGE ? windows : image) * p.ld_from;
      part.to += (TO_IMAGE ? image : windows) * p.ld_to;
      if (p.positions) part.positions += windows * p.n;
      (base_->*KERNEL)(part);
    });
  }

  template <void (*Kernels<S>::*KERNEL)(const Elementwise<S>&)>
  static void elementwise(const Elementwise<S>& e) {
    share(e.rows, 1, e.rows * e.cols, [&](i64 begin, i64 end) {
      Elementwise<S> part = e;
      part.rows = end - begin;
      shift(begin * e.ld_x, part.x);
      shift(begin * e.ld, part.y, part.dy, part.rx, part.rdy, part.out);
      (base_->*KERNEL)(part);
    });
  }

  static inline const Kernels<S>* base_ = nullptr;
  static inline int threads_ = 1;
  static inline Kernels<S> table_ = {};
};

}  // namespace fm
