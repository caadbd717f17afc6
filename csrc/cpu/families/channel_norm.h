// Norms of images by channel: batch_norm (one block of all rows, a group for each channel) and
// group_norm (a block for each example, groups of channels). With m values a group, r = 1 /
// sqrt(var + eps) and x^ = (x - mean) r:
//
//   y      = w x^ + b
//   dx     = r (g - <g> - x^ <g x^>),                         g = w dy, <> the mean over the group
//   ry     = w rx^ + rw x^ + rb,                              rx^ = r (rx - <rx> - x^ <rx x^>)
//   R(dx)  = -r <rx x^> dx + r (Rg - <Rg> - rx^ <g x^> - x^ (<Rg x^> + <g rx^>))
//                                                             with Rg = w rdy + rw dy
//
// Every one is a sum of rows times coefficients that are constant in a block's column: see
// docs/norms.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>

#include "../pass.h"
#include "../recomputed_conv.h"

namespace fm::channel_norm {

struct Blocks {
  i64 count, rows, group;  // rows of a block, channels of a group
};

// Kept beside the values, a row each for every block; beside the tangents <rx> and <rx x^>.
enum State { MEAN, RSTD, SUM_DY, SUM_DY_X, STATES };
enum TangentState { MEAN_RX, MEAN_RX_X };

// After them, where the norm does a max-pool too: for every window the place of its maximum within
// it, and x there (beside the tangents: rx there).
inline i64 state_size(const Plan& plan, const Layer& layer, const Blocks& blocks, i64 examples) {
  const Value& y = plan.values[layer.output];
  return (blocks.count * STATES + (layer.pool_h ? 2 * examples * y.rows : 0)) * plan.padded(y.cols);
}

constexpr i64 TEMPORARY_ROWS = 10;
inline i64 temporary_size(const Plan& plan, const Layer& layer) {
  const i64 rows = TEMPORARY_ROWS * plan.padded(plan.values[layer.output].cols);
  return rows + (layer.recomputes < 0 ? 0 : RecomputedConv<float>::temporary(plan, layer));
}

template <class S>
class ChannelNorm {
 public:
  ChannelNorm(const Pass<S>& pass, const Layer& layer, const Blocks& blocks, S eps)
      : pass_(pass),
        layer_(layer),
        blocks_(blocks),
        eps_(eps),
        in_(layer.inputs[0]),
        cols_(pass.plan.values[layer.output].cols),
        ld_(pass.plan.values[layer.output].ld),
        padded_(pass.plan.padded(cols_)),
        values_(S(blocks.rows * blocks.group)),
        fixed_(layer.params[2] >= 0) {
    if (!pass.geometry.keeps(in_)) conv_.emplace(pass, layer, pass.temporary + TEMPORARY_ROWS * padded_);
  }

  void forward() {
    for (block_ = 0; block_ < blocks_.count; ++block_) {
      statistics();
      S *scale = row(0), *shift = row(1);
      clear(scale, shift);
      for (i64 c = 0; c < cols_; ++c) scale[c] = w(c) * rstd()[c], shift[c] = b(c);
      each_piece(VALUE, [&] {
        combine({{x(), ld_x(), scale}}, shift, pass_.output(layer_.output) + out_row() * ld_, false,
                layer_.relu_out ? RELU : NOTHING);
      });
    }
  }

  void backward(Sink<S>* sinks) {
    start_gradients(sinks);
    for (block_ = 0; block_ < blocks_.count; ++block_) {
      S *sum = state(SUM_DY), *sum_x = state(SUM_DY_X);
      clear(sum, sum_x);
      each_piece(top(VALUE), [&] { products(dy(), sum, sum_x, nullptr, nullptr); });
      if (sinks)
        for (i64 c = 0; c < cols_; ++c) dw()[c] += sum_x[c] * rstd()[c], db()[c] += sum[c];
      if (!pass_.wants_delta(in_) || (conv_ && !sinks)) continue;
      S *from_dy = row(0), *from_x = row(1), *constant = row(2);
      clear(from_dy, from_x, constant);
      each_group([&](i64 begin, i64 end) {
        S g = 0, g_x = 0;
        group_gradient(begin, end, g, g_x);
        for (i64 c = begin; c < end; ++c) {
          const S r = rstd()[c];
          from_dy[c] = w(c) * r, from_x[c] = -r * r * g_x, constant[c] = -r * g;
        }
      });
      each_piece(VALUE, [&] {
        gradient({{x(), ld_x(), from_x}, {dy(), ld_, from_dy, true}}, constant, pass_.delta(in_));
      });
    }
    finish_gradients(sinks);
  }

  void tangent() {
    const bool moves = pass_.has_tangent(in_);
    for (block_ = 0; block_ < blocks_.count; ++block_) {
      S *mean_rx = tangent_state(MEAN_RX), *mean_rx_x = tangent_state(MEAN_RX_X);
      S *from_rx = row(0), *from_x = row(1), *constant = row(2), *sum = row(3), *sum_x = row(4);
      clear(from_rx, from_x, constant, sum, sum_x);
      if (moves && (!fixed_ || layer_.pool_h))
        each_piece(TANGENT, [&] {
          if (!fixed_)
            pass_.kernels.column_products({rows_, padded_, rx(), ld_rx(), x(), ld_x(), state(MEAN), nullptr,
                                           nullptr, 0, nullptr, 0, sum, sum_x, nullptr});
          if (layer_.pool_h) pick();
        });
      each_group([&](i64 begin, i64 end) {
        S t = 0, t_x = 0;
        if (moves && !fixed_)
          for (i64 c = begin; c < end; ++c) t += sum[c] / values_, t_x += sum_x[c] * rstd()[c] / values_;
        for (i64 c = begin; c < end; ++c) {
          const S r = rstd()[c];
          mean_rx[c] = t, mean_rx_x[c] = t_x;
          from_rx[c] = w(c) * r, from_x[c] = vw(c) * r - w(c) * r * r * t_x,
          constant[c] = vb(c) - w(c) * r * t;
        }
      });
      each_piece(top(moves ? TANGENT : VALUE), [&] {
        S* to = pass_.tangent(layer_.output) + out_row() * ld_;
        if (moves)
          combine({{top_x(), ld_top_x(), from_x}, {top_rx(), ld_top_rx(), from_rx}}, constant, to, false,
                  MASK_OUT);
        else
          combine({{top_x(), ld_top_x(), from_x}}, constant, to, false, MASK_OUT);
      });
    }
  }

  void tangent_backward(Sink<S>* sinks) {
    const bool moves = pass_.has_tangent(in_);
    start_gradients(sinks);
    for (block_ = 0; block_ < blocks_.count; ++block_) {
      const S *sum = state(SUM_DY), *sum_x = state(SUM_DY_X);
      S *mean_rx = tangent_state(MEAN_RX), *mean_rx_x = tangent_state(MEAN_RX_X);
      if (!moves) clear(mean_rx, mean_rx_x);  // without parameters nor a moving input `tangent` has not run
      S *rsum = row(3), *rsum_x = row(4), *dy_rx = row(5);
      clear(rsum, rsum_x, dy_rx);
      const Needed needed = moves ? TANGENT : VALUE;
      each_piece(top(needed), [&] { products(rdy(), rsum, rsum_x, moves ? dy() : nullptr, dy_rx); });
      // sum over the column of dy rx^
      const auto dy_rx_hat = [&](i64 c) {
        const S r = rstd()[c];
        return r * (dy_rx[c] - mean_rx[c] * sum[c] - r * mean_rx_x[c] * sum_x[c]);
      };
      for (i64 c = 0; c < cols_; ++c) dw()[c] += rsum_x[c] * rstd()[c] + dy_rx_hat(c), db()[c] += rsum[c];
      if (!pass_.wants_delta(in_)) continue;
      S *from_rdy = row(0), *from_dy = row(1), *from_rx = row(2), *from_x = row(8), *constant = row(9);
      clear(from_rdy, from_dy, from_rx, from_x, constant);
      each_group([&](i64 begin, i64 end) {
        S g = 0, g_x = 0, u = 0, u_x = 0;
        group_gradient(begin, end, g, g_x);
        if (!fixed_)
          for (i64 c = begin; c < end; ++c) {
            const S r = rstd()[c];
            u += (w(c) * rsum[c] + vw(c) * sum[c]) / values_;
            u_x += (w(c) * rsum_x[c] * r + vw(c) * sum_x[c] * r + w(c) * dy_rx_hat(c)) / values_;
          }
        for (i64 c = begin; c < end; ++c) {
          const S r = rstd()[c], t = mean_rx[c], t_x = mean_rx_x[c];
          from_rdy[c] = r * w(c);
          from_dy[c] = r * vw(c) - r * r * t_x * w(c);
          from_rx[c] = -r * r * g_x;
          from_x[c] = 2 * r * r * r * t_x * g_x - r * r * u_x;
          constant[c] = r * r * (t_x * g + t * g_x) - r * u;
        }
      });
      each_piece(needed, [&] {
        const Term from[] = {{x(), ld_x(), from_x}, {rdy(), ld_, from_rdy, true}, {dy(), ld_, from_dy, true}};
        if (moves)
          gradient({from[0], from[1], from[2], {rx(), ld_rx(), from_rx}}, constant, pass_.tangent_delta(in_));
        else
          gradient({from[0], from[1], from[2]}, constant, pass_.tangent_delta(in_));
      });
    }
    finish_gradients(sinks);
  }

 private:
  struct Term {
    const S* from;
    i64 ld;
    const S* coefficients;
    bool masked = false;
  };

  // Two passes over each piece, the mean and the squares of what is left, put together as by Chan,
  // Golub, LeVeque, "Algorithms for Computing the Sample Variance" (1983).
  void statistics() {
    S *mean = state(MEAN), *rstd = state(RSTD);
    clear(mean, rstd);
    if (fixed_) {
      for (i64 c = 0; c < cols_; ++c) mean[c] = theta(2)[c], rstd[c] = S(1) / std::sqrt(theta(3)[c] + eps_);
      return;
    }
    S *center = row(0), *squares = row(1);
    each_piece(VALUE, [&] {
      const S n = S(rows_), share = n / S(piece_ + rows_);  // of all rows so far
      pass_.kernels.column_sums({rows_, padded_, x(), ld_x(), nullptr, nullptr, S(1) / n, center});
      clear(squares);
      pass_.kernels.column_squares({rows_, padded_, x(), ld_x(), center, squares});
      for (i64 c = 0; c < cols_; ++c) {
        const S step = center[c] - mean[c];
        mean[c] += share * step, rstd[c] += squares[c] + step * step * (S(piece_) * share);
      }
    });
    each_group([&](i64 begin, i64 end) {
      S total = 0, square = 0;
      for (i64 c = begin; c < end; ++c) total += mean[c];
      total /= S(blocks_.group);
      for (i64 c = begin; c < end; ++c)
        square += rstd[c] + S(blocks_.rows) * (mean[c] - total) * (mean[c] - total);
      for (i64 c = begin; c < end; ++c) mean[c] = total, rstd[c] = S(1) / std::sqrt(square / values_ + eps_);
    });
  }
  // <g> and <g x^> of a group.
  void group_gradient(i64 begin, i64 end, S& g, S& g_x) const {
    if (fixed_) return;
    for (i64 c = begin; c < end; ++c) {
      g += w(c) * state(SUM_DY)[c] / values_;
      g_x += w(c) * state(SUM_DY_X)[c] * rstd()[c] / values_;
    }
  }

  template <class Body>
  void each_group(const Body& body) const {
    for (i64 begin = 0; begin < cols_; begin += blocks_.group) body(begin, begin + blocks_.group);
  }
  template <class... Rows>
  void clear(Rows*... rows) const {
    for (S* row : {rows...})
      for (i64 c = 0; c < padded_; ++c) row[c] = 0;
  }

  enum Needed { NOTHING_OF_IT, VALUE, TANGENT };
  // Of the input, for what is done to the output: nothing, if maxima are all that the output is.
  Needed top(Needed needed) const { return layer_.pool_h ? NOTHING_OF_IT : needed; }

  // Calls body for pieces of the block, small enough that several passes over them stay in a cache;
  // where the input is not kept, what is needed of the piece is computed first.
  template <class Body>
  void each_piece(Needed needed, const Body& body) {
    const Value& in = pass_.plan.values[in_];
    const i64 window_rows = layer_.pool_h ? tall() ? layer_.pool_h * in.width : in.rows : 1;
    const i64 most = std::max<i64>(PIECE_ELEMENTS / padded_ / window_rows, 1) * window_rows;
    for (piece_ = 0; piece_ < blocks_.rows; piece_ += rows_) {
      rows_ = std::min(most, blocks_.rows - piece_);
      if (conv_ && needed != NOTHING_OF_IT) conv_->compute(first_row(), rows_, needed == TANGENT);
      body();
    }
    piece_ = 0;
  }
  // Whether windows never lie across images if all images are read as a single tall one.
  bool tall() const { return pass_.plan.values[in_].height % layer_.pool_h == 0; }

  // Adds to sum a, sum a (x - mean) and, with b, sum b rx of the piece, for gradients a and b of
  // the output.
  void products(const S* a, S* sum, S* sum_x, const S* b, S* sum_b) {
    pass_.kernels.column_products({out_rows(), padded_, a, ld_, top_x(), ld_top_x(), state(MEAN), b,
                                   b ? top_rx() : nullptr, ld_top_rx(), relu_mask(), ld_, sum, sum_x, sum_b});
  }
  // The gradient of the input's piece: to its place in `all`, or handed on to the convolution that
  // computed the input.
  void gradient(std::initializer_list<Term> terms, const S* constant, S* all) {
    S* to = conv_ ? conv_->delta() : all + first_row() * pass_.plan.values[in_].ld;
    combine(terms, constant, to, !conv_ && layer_.adds[0]);
    if (conv_) conv_->add_gradient();
  }
  enum After { GRADIENT, NOTHING, RELU, MASK_OUT };
  // The first term's rows are centred.
  void combine(std::initializer_list<Term> terms, const S* constant, S* to, bool add,
               After after = GRADIENT) {
    if (layer_.pool_h && after != MASK_OUT) return combine_pooled(terms, constant, to, add, after);
    ColumnCombination<S> c{};
    c.rows = after == MASK_OUT ? out_rows() : rows_, c.n = padded_, c.center = state(MEAN),
    c.constant = constant, c.add = add;
    for (const Term& term : terms) c.term[c.terms++] = {term.from, term.ld, term.coefficients, term.masked};
    c.relu = after == RELU, c.mask = after == RELU ? nullptr : relu_mask(), c.ld_mask = ld_;
    c.mask_out = after == MASK_OUT;
    c.ld = after == GRADIENT ? pass_.plan.values[in_].ld : ld_;
    c.out = to;
    pass_.kernels.column_combination(c);
  }
  // The same where only windows' maxima are the output, and gradients come from there: those are
  // the masked terms.
  void combine_pooled(std::initializer_list<Term> terms, const S* constant, S* to, bool add, After after) {
    PooledColumns<S> p = pooled();
    p.constant = constant, p.add = add, p.relu = after == RELU;
    int pooled_terms = 0;
    for (const Term& term : terms) {
      if (term.from == terms.begin()->from)
        p.from_x = term.coefficients;
      else if (term.masked)
        p.pooled[pooled_terms++] = {term.from, term.coefficients};
      else
        p.rx = term.from, p.ld_rx = term.ld, p.from_rx = term.coefficients;
    }
    p.ld_out = after == GRADIENT ? pass_.plan.values[in_].ld : ld_;
    p.out = to;
    if (after == GRADIENT)
      pass_.kernels.pooled_combination(p);
    else
      pass_.kernels.pooled_forward(p);
  }
  // rx at the maxima of windows.
  void pick() {
    PooledColumns<S> p = pooled();
    p.rx = rx(), p.ld_rx = ld_rx(), p.maxima = tangent_maxima();
    pass_.kernels.pooled_pick(p);
  }
  PooledColumns<S> pooled() const {
    const Value &in = pass_.plan.values[in_], &out = pass_.plan.values[layer_.output];
    PooledColumns<S> p{};
    p.in_w = in.width, p.out_w = out.width;
    p.images = tall() ? 1 : rows_ / in.rows, p.in_h = tall() ? rows_ / in.width : in.height;
    p.out_h = tall() ? p.in_h / layer_.pool_h : out.height;
    p.kh = layer_.pool_h, p.kw = layer_.pool_w, p.n = padded_;
    p.x = x(), p.ld_x = ld_x(), p.center = state(MEAN), p.mask = relu_mask(), p.ld_pooled = ld_;
    p.positions = pass_.state(layer_) + (blocks_.count * STATES + out_row()) * padded_,
    p.ld_positions = padded_;
    p.maxima = maxima();
    return p;
  }
  // The output, if a relu in the epilogue has cut it off.
  const S* relu_mask() const {
    return layer_.relu_out ? pass_.output(layer_.output) + out_row() * ld_ : nullptr;
  }

  void start_gradients(Sink<S>* sinks) {
    if (!sinks) return;
    clear(row(6), row(7));
    if (conv_) conv_->start_gradient();
  }
  void finish_gradients(Sink<S>* sinks) {
    if (!sinks) return;
    if (conv_) conv_->finish_gradient(sinks);
    for (int which : {0, 1}) {
      if (layer_.params[which] < 0) continue;
      Sink<S>& sink = sinks[layer_.params[which]];
      if (!sink.to) continue;
      pass_.kernels.column_sums(
          {1, padded_, row(6 + which), padded_, sink.base(), sink.also(), sink.scale, sink.to});
      sink.written();
    }
  }

  // Where the piece begins: in the input, and in the output.
  i64 first_row() const { return block_ * blocks_.rows + piece_; }
  i64 out_row() const {
    if (!layer_.pool_h) return first_row();
    const Value &in = pass_.plan.values[in_], &out = pass_.plan.values[layer_.output];
    return tall() ? first_row() / (layer_.pool_h * in.width) * out.width : first_row() / in.rows * out.rows;
  }
  i64 out_rows() const {
    if (!layer_.pool_h) return rows_;
    const Value &in = pass_.plan.values[in_], &out = pass_.plan.values[layer_.output];
    return tall() ? rows_ / (layer_.pool_h * in.width) * out.width : rows_ / in.rows * out.rows;
  }
  const S* theta(int i) const {
    return layer_.params[i] < 0 ? nullptr : pass_.theta.primary[layer_.params[i]];
  }
  const S* v(int i) const { return layer_.params[i] < 0 ? nullptr : pass_.v.primary[layer_.params[i]]; }
  S w(i64 c) const { return theta(0) ? theta(0)[c] : S(1); }
  S b(i64 c) const { return theta(1) ? theta(1)[c] : S(0); }
  S vw(i64 c) const { return v(0) ? v(0)[c] : S(0); }
  S vb(i64 c) const { return v(1) ? v(1)[c] : S(0); }
  i64 ld_x() const { return pass_.value_ld(in_); }
  i64 ld_rx() const { return pass_.plan.values[in_].ld; }
  const S* x() const { return conv_ ? conv_->value() : pass_.value(in_) + first_row() * ld_x(); }
  const S* rx() const { return conv_ ? conv_->tangent() : pass_.tangent(in_) + first_row() * ld_rx(); }
  // What of the input the output stands for: all of it, or the maxima of windows.
  i64 maxima_at() const { return (blocks_.count * STATES + pass_.rows(layer_.output) + out_row()) * padded_; }
  S* maxima() const { return pass_.state(layer_) + maxima_at(); }
  S* tangent_maxima() const { return pass_.tangent_state(layer_) + maxima_at(); }
  const S* top_x() const { return layer_.pool_h ? maxima() : x(); }
  const S* top_rx() const { return layer_.pool_h ? tangent_maxima() : rx(); }
  i64 ld_top_x() const { return layer_.pool_h ? padded_ : ld_x(); }
  i64 ld_top_rx() const { return layer_.pool_h ? padded_ : ld_rx(); }
  const S* dy() const { return pass_.delta(layer_.output) + out_row() * ld_; }
  const S* rdy() const { return pass_.tangent_delta(layer_.output) + out_row() * ld_; }
  S* state(int which) const { return pass_.state(layer_) + (block_ * STATES + which) * padded_; }
  S* tangent_state(int which) const {
    return pass_.tangent_state(layer_) + (block_ * STATES + which) * padded_;
  }
  const S* rstd() const { return state(RSTD); }
  S* row(int i) const { return pass_.temporary + i * padded_; }
  S* dw() const { return row(6); }
  S* db() const { return row(7); }

  const Pass<S>& pass_;
  const Layer& layer_;
  const Blocks blocks_;
  const S eps_;
  const int in_;
  const i64 cols_, ld_, padded_;
  const S values_;                         // of a group
  const bool fixed_;                       // by running statistics
  std::optional<RecomputedConv<S>> conv_;  // what computes the input, if that is not kept
  i64 block_ = 0, piece_ = 0, rows_ = 0;   // the piece's first row in the block, and how many
};

}  // namespace fm::channel_norm
