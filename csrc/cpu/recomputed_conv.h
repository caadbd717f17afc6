// A convolution of the network's input whose output is large and cheap, since the input has few
// channels: it is not kept in memory, but computed in pieces by the norm that reads it, whenever
// that does.
#pragma once

#include <algorithm>

#include "layers/conv2d.h"

namespace fm {

constexpr i64 PIECE_ELEMENTS = 1 << 16;  // of a piece, unless a single row of windows is larger

template <class S>
class RecomputedConv {
 public:
  // Elements of scratch memory.
  static i64 temporary(const Plan& plan, const Layer& norm) {
    const Layer& conv = plan.layers[norm.recomputes];
    return conv2d::needs(plan, conv, 1).temporary + 3 * piece(plan, norm) + gradients(plan, conv);
  }

  RecomputedConv(const Pass<S>& pass, const Layer& norm, S* memory)
      : pass_(pass), layer_(pass.plan.layers[norm.recomputes]), ld_(pass.plan.values[layer_.output].ld) {
    const i64 size = piece(pass.plan, norm);
    value_ = memory, tangent_ = value_ + size, delta_ = tangent_ + size, gradient_ = delta_ + size;
    pass_.temporary = gradient_ + gradients(pass.plan, layer_);
  }

  // Pixels [first, first + count) of the output, and its tangent if asked for.
  void compute(i64 first, i64 count, bool tangent) {
    first_ = first, count_ = count;
    apply(pass_.theta, value_);
    if (tangent) apply(pass_.v, tangent_);
  }
  const S* value() const { return value_; }
  const S* tangent() const { return tangent_; }
  // Where the piece's gradient goes, or the tangent of that, before it is added to the parameters'.
  S* delta() const { return delta_; }

  void start_gradient() { std::fill_n(gradient_, gradients(pass_.plan, layer_), S(0)); }
  void add_gradient() {
    const S* dy[] = {delta_};
    const Factors<S> input{1, {pass_.input}, {pass_.input_ld}, {}};
    Sink<S> weight{gradient_, nullptr, true, S(1)};
    conv2d::gathered_weight_gradient<S>(pass_, layer_, first_, count_, input, dy, weight);
    if (bias_sums())
      pass_.kernels.column_sums(
          {count_, padded(), delta_, ld_, bias_gradient(), nullptr, S(1), bias_gradient()});
  }
  void finish_gradient(Sink<S>* sinks) const {
    const i64 sizes[] = {pass_.plan.params[layer_.weight()].size, padded()};
    const S* sums[] = {gradient_, bias_gradient()};
    for (int i = 0; i < 2; ++i) {
      if (layer_.params[i] < 0) continue;
      Sink<S>& sink = sinks[layer_.params[i]];
      if (!sink.to) continue;
      pass_.kernels.column_sums(
          {1, sizes[i], sums[i], sizes[i], sink.base(), sink.also(), sink.scale, sink.to});
      sink.written();
    }
  }

 private:
  static i64 piece(const Plan& plan, const Layer& norm) {
    const Value& y = plan.values[norm.inputs[0]];
    const i64 window_rows = !norm.pool_h ? 1 : y.height % norm.pool_h == 0 ? norm.pool_h * y.width : y.rows;
    return std::max(PIECE_ELEMENTS / plan.padded(y.cols), window_rows) * y.ld;
  }
  static i64 gradients(const Plan& plan, const Layer& conv) {
    return plan.params[conv.weight()].size + plan.padded(plan.values[conv.output].cols);
  }

  void apply(const ParamView<S>& set, S* to) const {
    const Factors<S> factors{1, {pass_.input}, {pass_.input_ld}, {set.primary[layer_.weight()]}};
    const S* bias = layer_.bias() >= 0 ? set.primary[layer_.bias()] : nullptr;
    conv2d::gathered_convolve<S>(pass_, layer_, first_, count_, factors, bias, to);
  }
  bool bias_sums() const { return layer_.bias() >= 0 && !layer_.bias_cancels; }
  i64 padded() const { return pass_.plan.padded(pass_.plan.values[layer_.output].cols); }
  S* bias_gradient() const { return gradient_ + pass_.plan.params[layer_.weight()].size; }

  Pass<S> pass_;
  const Layer& layer_;
  const i64 ld_;
  S *value_, *tangent_, *delta_, *gradient_;
  i64 first_ = 0, count_ = 0;
};

}  // namespace fm
