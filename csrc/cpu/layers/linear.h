// linear: y = x W^T + b on the last dimension, optionally with the following relu in its epilogue.
//
// W is [O, I]. Wide: kept as W^T [I, O] in panels, with W itself as the mirror for the input
// gradient. Narrow (few outputs): kept as W [O, I], and y by inner products, since a padded vector
// of outputs would be mostly empty.
#pragma once

#include <type_traits>

#include "../pass.h"

namespace fm::linear {

constexpr Rules RULES = Rules(1).with_params(2, 1);

inline Needs needs(const Plan& plan, const Layer& layer, i64) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require(layer.weight() >= 0, "a linear layer has no weight");
  const Param& w = plan.params[layer.weight()];
  require(w.matrix && w.taps == 1 && w.cols == x.cols && w.rows == y.cols && x.rows == y.rows,
          "a linear layer's shapes differ");
  if (layer.bias() >= 0) {
    const Param& b = plan.params[layer.bias()];
    require(!b.matrix && b.cols == y.cols, "a bias has another shape than its layer");
  }
  return {};
}

template <class S>
Matrix<const S> wide_matrix(const Plan& plan, const Param& p, const S* set) {
  return Matrix<const S>::panels(set, p.cols, plan.padded(p.rows));
}

// y = epilogue(x0 A0^T [+ x1 A1^T] + bias)
template <class S>
void multiply(const Pass<S>& pass, const Layer& layer, int pairs, const S* const* x, const i64* ld_x,
              const S* const* w, const S* bias, S* y, const S* mask) {
  const Plan& plan = pass.plan;
  const Param& p = plan.params[layer.weight()];
  const i64 rows = pass.rows(layer.output), ld_y = plan.values[layer.output].ld;
  if (p.narrow) {
    Dot<S> dot;
    dot.m = rows, dot.n = p.rows, dot.k = p.cols, dot.pairs = pairs;
    for (int i = 0; i < pairs; ++i) dot.pair[i] = {x[i], ld_x[i], w[i], plan.padded(p.cols)};
    dot.c = y, dot.ldc = ld_y, dot.bias = bias;
    pass.kernels.dot(dot);
    return;
  }
  Gemm<S> gemm;
  gemm.m = rows, gemm.n = p.rows, gemm.k = p.cols, gemm.pairs = pairs;
  for (int i = 0; i < pairs; ++i) gemm.pair[i] = {x[i], ld_x[i], 1, wide_matrix(plan, p, w[i])};
  gemm.c = Matrix<S>::plain(y, ld_y);
  gemm.bias = bias;
  gemm.relu = layer.relu_out && !mask;
  if (mask) gemm.mask = Matrix<const S>::plain(mask, ld_y);
  pass.kernels.gemm(gemm);
}

// dx (+)= dy0 W0 [+ dy1 W1], masked where the input is a fused relu's output
template <class S>
void input_gradient(const Pass<S>& pass, const Layer& layer, int pairs, const S* const* dy,
                    const ParamView<S>* const* w, S* dx) {
  const Plan& plan = pass.plan;
  const Param& p = plan.params[layer.weight()];
  const int in = layer.inputs[0];
  const i64 ld_x = plan.values[in].ld;
  Gemm<S> gemm;
  gemm.m = pass.rows(in), gemm.n = p.cols, gemm.k = p.rows, gemm.pairs = pairs;
  for (int i = 0; i < pairs; ++i) {
    const S* rows = p.narrow ? w[i]->primary[layer.weight()] : w[i]->mirror[layer.weight()];
    gemm.pair[i] = {dy[i], plan.values[layer.output].ld, 1,
                    p.narrow ? Matrix<const S>::plain(rows, plan.padded(p.cols))
                             : Matrix<const S>::panels(rows, p.rows, plan.padded(p.cols))};
  }
  gemm.c = Matrix<S>::plain(dx, ld_x);
  if (layer.adds[0]) gemm.base = Matrix<const S>::plain(dx, ld_x);
  if (layer.relu_in) gemm.mask = Matrix<const S>::plain(pass.value(in), ld_x);
  pass.kernels.gemm(gemm);
}

// The gradients sum over pairs of dy^T x for W, and the column sums of the first pair's dy for b,
// into their sinks
template <class S>
void weight_gradient(const Pass<S>& pass, const Layer& layer, int pairs, const S* const* x, const i64* ld_x,
                     const S* const* dy, Sink<S>* sinks) {
  const Plan& plan = pass.plan;
  const Param& p = plan.params[layer.weight()];
  const i64 ld_y = plan.values[layer.output].ld;
  Gemm<S> gemm;
  gemm.k = pass.rows(layer.output);
  Sink<S>& weight = sinks[layer.weight()];
  if (weight.to) {
    gemm.pairs = pairs;
    gemm.m = p.narrow ? p.rows : p.cols, gemm.n = p.narrow ? p.cols : p.rows;
    const auto shaped = [&](auto* set) {
      using T = std::remove_pointer_t<decltype(set)>;
      return p.narrow ? Matrix<T>::plain(set, plan.padded(gemm.n))
                      : Matrix<T>::panels(set, gemm.m, plan.padded(gemm.n));
    };
    for (int i = 0; i < pairs; ++i) {
      if (p.narrow)
        gemm.pair[i] = {dy[i], 1, ld_y, Matrix<const S>::plain(x[i], ld_x[i])};
      else
        gemm.pair[i] = {x[i], 1, ld_x[i], Matrix<const S>::plain(dy[i], ld_y)};
    }
    gemm.c = shaped(weight.to), gemm.scale = weight.scale;
    if (weight.base()) gemm.base = shaped(weight.base());
    if (weight.also()) gemm.also = shaped(weight.also());
    weight.written();
    pass.kernels.gemm(gemm);
  }
  if (layer.bias() < 0) return;
  Sink<S>& bias = sinks[layer.bias()];
  if (bias.to) {
    pass.kernels.column_sums({layer.bias_cancels ? 0 : pass.rows(layer.output), plan.padded(p.rows), dy[0],
                              ld_y, bias.base(), bias.also(), bias.scale, bias.to});
    bias.written();
  }
}

// The same where the layer's product is known as a low-rank change of another.
template <class S>
void multiply(const Pass<S>& pass, const Layer& layer, const LowRank<S>& low, const S* bias, S* y,
              const S* mask) {
  const Param& p = pass.plan.params[layer.weight()];
  const i64 ld_y = pass.plan.values[layer.output].ld;
  Gemm<S> gemm;
  gemm.m = pass.rows(layer.output), gemm.n = p.rows, gemm.c = Matrix<S>::plain(y, ld_y);
  if (!low.base) {
    gemm.k = p.cols;
    gemm.pair[0] = {pass.value(layer.inputs[0]), pass.value_ld(layer.inputs[0]), 1,
                    wide_matrix(pass.plan, p, pass.theta.primary[layer.weight()])};
    pass.kernels.gemm(gemm);
  }
  gemm.k = low.rank;
  gemm.pair[0] = {low.gram, low.ld_gram, 1, Matrix<const S>::plain(low.factor, ld_y)};
  gemm.base = Matrix<const S>::plain(low.base ? low.base : y, ld_y);
  gemm.scale = low.scale, gemm.bias = bias, gemm.relu = layer.relu_out && !mask;
  if (mask) gemm.mask = Matrix<const S>::plain(mask, ld_y);
  pass.kernels.gemm(gemm);
}

template <class S>
void forward(const Pass<S>& pass, const Layer& layer) {
  const S* x[] = {pass.value(layer.inputs[0])};
  const i64 ld_x[] = {pass.value_ld(layer.inputs[0])};
  const S* w[] = {pass.theta.primary[layer.weight()]};
  const S* bias = layer.bias() >= 0 ? pass.theta.primary[layer.bias()] : nullptr;
  if (layer.index == pass.low_rank.layer)
    return multiply<S>(pass, layer, pass.low_rank, bias, pass.output(layer.output), nullptr);
  multiply<S>(pass, layer, 1, x, ld_x, w, bias, pass.output(layer.output), nullptr);
}

template <class S>
void backward(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks) {
  const int in = layer.inputs[0];
  const S* dy[] = {pass.delta(layer.output)};
  if (sinks) {
    const S* x[] = {pass.value(in)};
    const i64 ld_x[] = {pass.value_ld(in)};
    weight_gradient<S>(pass, layer, 1, x, ld_x, dy, sinks);
  }
  if (pass.wants_delta(in)) {
    const ParamView<S>* w[] = {&pass.theta};
    input_gradient<S>(pass, layer, 1, dy, w, pass.delta(in));
  }
}

// ry = x V^T + vb [+ rx W^T]
template <class S>
void tangent(const Pass<S>& pass, const Layer& layer) {
  const int in = layer.inputs[0];
  const bool moves = pass.has_tangent(in);
  const S* x[] = {pass.value(in), moves ? pass.tangent(in) : nullptr};
  const i64 ld_x[] = {pass.value_ld(in), pass.plan.values[in].ld};
  const S* w[] = {pass.v.primary[layer.weight()], pass.theta.primary[layer.weight()]};
  const S* bias = layer.bias() >= 0 ? pass.v.primary[layer.bias()] : nullptr;
  const S* mask = layer.relu_out ? pass.value(layer.output) : nullptr;
  if (layer.index == pass.tangent_low_rank.layer)
    return multiply<S>(pass, layer, pass.tangent_low_rank, bias, pass.tangent(layer.output), mask);
  multiply<S>(pass, layer, moves ? 2 : 1, x, ld_x, w, bias, pass.tangent(layer.output), mask);
}

// R(dW) = rdy^T x [+ dy^T rx];  rdx = rdy W + dy V
template <class S>
void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>* sinks) {
  const int in = layer.inputs[0];
  const bool moves = pass.has_tangent(in);
  const S* x[] = {pass.value(in), moves ? pass.tangent(in) : nullptr};
  const i64 ld_x[] = {pass.value_ld(in), pass.plan.values[in].ld};
  const S* dy[] = {pass.tangent_delta(layer.output), pass.delta(layer.output)};
  // first, since the weight gradient may go to where v is read from
  if (pass.wants_delta(in)) {
    const ParamView<S>* w[] = {&pass.theta, &pass.v};
    input_gradient<S>(pass, layer, 2, dy, w, pass.tangent_delta(in));
  }
  weight_gradient<S>(pass, layer, moves ? 2 : 1, x, ld_x, dy, sinks);
}

}  // namespace fm::linear
