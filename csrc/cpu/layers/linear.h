// linear: y = x W^T + b on the last dimension, optionally with the relu after it.
//
// W is [O, I]. Wide: kept as W^T [I, O] in panels, with W itself as the mirror for the input
// gradient. Narrow (few outputs): kept as W [O, I], and y by inner products, since a padded vector
// of outputs would be mostly empty.
#pragma once

#include <type_traits>

#include "../families/bilinear.h"

namespace fm::linear {

constexpr Rules RULES = Rules(1).with_weight_and_bias();

inline Needs needs(const Plan& plan, const Layer& layer, i64) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require(layer.weight() >= 0, "a linear layer has no weight");
  const Param& w = plan.params[layer.weight()];
  require(w.matrix && w.taps == 1 && w.cols == x.cols && w.rows == y.cols && x.rows == y.rows,
          "a linear layer's shapes differ");
  check_bias(plan, layer);
  return {};
}

template <class S>
Matrix<const S> wide_matrix(const Plan& plan, const Param& p, const S* set) {
  return Matrix<const S>::panels(set, p.cols, plan.padded(p.rows));
}

struct Products {
  // y = epilogue(sum x W^T + bias)
  template <class S>
  static void output(const Pass<S>& pass, const Layer& layer, const Factors<S>& f, const S* bias, bool moving,
                     S* y) {
    const Plan& plan = pass.plan;
    const Param& p = plan.params[layer.weight()];
    const i64 rows = pass.rows(layer.output), ld_y = plan.values[layer.output].ld;
    if (p.narrow) {
      Dot<S> dot;
      dot.m = rows, dot.n = p.rows, dot.k = p.cols, dot.pairs = f.pairs;
      for (int i = 0; i < f.pairs; ++i) dot.pair[i] = {f.x[i], f.ld_x[i], f.w[i], plan.padded(p.cols)};
      dot.c = y, dot.ldc = ld_y, dot.bias = bias;
      pass.kernels.dot(dot);
      return;
    }
    Gemm<S> gemm;
    gemm.m = rows, gemm.n = p.rows;
    gemm.c = Matrix<S>::plain(y, ld_y);
    const LowRank<S>& low = moving ? pass.tangent_low_rank : pass.low_rank;
    if (low.layer == layer.index) {
      low_rank(pass, layer, low, gemm);
    } else {
      gemm.k = p.cols, gemm.pairs = f.pairs;
      for (int i = 0; i < f.pairs; ++i) gemm.pair[i] = {f.x[i], f.ld_x[i], 1, wide_matrix(plan, p, f.w[i])};
    }
    gemm.bias = bias;
    gemm.relu = layer.relu_out && !moving;
    if (layer.relu_out && moving) gemm.mask = Matrix<const S>::plain(pass.value(layer.output), ld_y);
    pass.kernels.gemm(gemm);
  }

  // Makes `gemm` that product where it is known as a low-rank change of another: base + scale * gram
  // * factor. Without a base, the base is the product with theta, computed here.
  template <class S>
  static void low_rank(const Pass<S>& pass, const Layer& layer, const LowRank<S>& low, Gemm<S>& gemm) {
    const Param& p = pass.plan.params[layer.weight()];
    const i64 ld_y = gemm.c.ld;
    if (!low.base) {
      gemm.k = p.cols;
      gemm.pair[0] = {pass.value(layer.inputs[0]), pass.value_ld(layer.inputs[0]), 1,
                      wide_matrix(pass.plan, p, pass.theta.primary[layer.weight()])};
      pass.kernels.gemm(gemm);
    }
    gemm.k = low.rank, gemm.scale = low.scale;
    gemm.pair[0] = {low.gram, low.ld_gram, 1, Matrix<const S>::plain(low.factor, ld_y)};
    gemm.base = Matrix<const S>::plain(low.base ? low.base : gemm.c.data, ld_y);
  }

  // dx [+]= sum dy W, masked where the input is a fused relu's output
  template <class S>
  static void input_gradient(const Pass<S>& pass, const Layer& layer, int pairs, const S* const* dy,
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

  // sum dy^T x as the weight is kept
  template <class S>
  static void weight_gradient(const Pass<S>& pass, const Layer& layer, const Factors<S>& f,
                              const S* const* dy, Sink<S>& sink) {
    const Plan& plan = pass.plan;
    const Param& p = plan.params[layer.weight()];
    const i64 ld_y = plan.values[layer.output].ld;
    Gemm<S> gemm;
    gemm.k = pass.rows(layer.output), gemm.pairs = f.pairs;
    gemm.m = p.narrow ? p.rows : p.cols, gemm.n = p.narrow ? p.cols : p.rows;
    const auto shaped = [&](auto* set) {
      using T = std::remove_pointer_t<decltype(set)>;
      return p.narrow ? Matrix<T>::plain(set, plan.padded(gemm.n))
                      : Matrix<T>::panels(set, gemm.m, plan.padded(gemm.n));
    };
    for (int i = 0; i < f.pairs; ++i) {
      if (p.narrow)
        gemm.pair[i] = {dy[i], 1, ld_y, Matrix<const S>::plain(f.x[i], f.ld_x[i])};
      else
        gemm.pair[i] = {f.x[i], 1, f.ld_x[i], Matrix<const S>::plain(dy[i], ld_y)};
    }
    gemm.c = shaped(sink.to), gemm.scale = sink.scale;
    if (sink.base()) gemm.base = shaped(sink.base());
    if (sink.also()) gemm.also = shaped(sink.also());
    pass.kernels.gemm(gemm);
  }
};

using Functions = Bilinear<Products>;

}  // namespace fm::linear
