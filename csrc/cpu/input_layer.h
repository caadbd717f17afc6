// The linear layer that reads the network's input, in the inner loop of one task, without its
// adapted weights.
//
// The support inputs x [R, I] are the same at every step, so that plain SGD keeps theta_k - theta_0
// in their span. With U = W^T [I, O], the gram matrix G = x x^T [R, R] and the gradients dy_k [R,
// O] of the layer's outputs,
//
//   U_k    = U_0 - x^T A_k,             A_{k+1} = A_k + alpha_k dy_k
//   x U_k  = x U_0 - G A_k,             z U_k   = z U_0 - (z x^T) A_k for query inputs z
//   Lambda = L + x^T B,                 B += scale R(dy_k);  L: the query's share, z^T dz
//   x Lambda = x L + G B,               x L = (z x^T)^T dz
//
// Nothing of the size of W is written but the sums over tasks: for wide inputs that is most of the
// memory traffic.
#pragma once

#include <utility>

#include "layout.h"
#include "pass.h"

namespace fm {

template <class S>
class InputLayer {
 public:
  InputLayer(const Plan& plan, const Kernels<S>& kernels, S* workspace)
      : plan_(plan), kernels_(kernels), own_(workspace + plan.at.input_layer) {
    if (!active()) return;
    const Layer& layer = plan.layers[plan.input_layer];
    param_ = layer.weight(), output_ = layer.output;
    rows_ = plan.support.examples * plan.values[0].rows,
    query_rows_ = plan.query.examples * plan.values[0].rows;
    ld_ = plan.values[output_].ld, size_ = rows_ * ld_, ld_gram_ = plan.padded(rows_);
    S* at = own_;
    const auto take = [&](i64 n) { return std::exchange(at, at + n); };
    gram_ = take(rows_ * ld_gram_), query_gram_ = take(query_rows_ * ld_gram_);
    product_ = take(size_), lambda_product_ = take(size_), scaled_ = take(size_), b_ = take(size_);
    a_ = take((plan.options.steps + 1) * size_);
  }

  bool active() const { return plan_.input_layer >= 0; }
  size_t param_index() const { return size_t(param_); }
  bool is(size_t p) const { return active() && int(p) == param_; }

  // A new task: its support inputs and theta_0.
  void begin(const S* x, i64 ld_x, const S* theta) {
    x_ = x, ld_x_ = ld_x;
    gram(x, ld_x, rows_, gram_);
    Gemm<S> g = product(x, ld_x, rows_, Matrix<const S>(engine_matrix(plan_, param(), theta)),
                        plan_.params[param_].cols);
    g.c = Matrix<S>::plain(product_, ld_);
    kernels_.gemm(g);
    zero(a_), zero(b_), zero(lambda_product_);
    query_known_ = false;
  }
  // Its query inputs; may be said several times.
  void query(const S* z, i64 ld_z) {
    if (!query_known_) gram(z, ld_z, query_rows_, query_gram_);
    query_known_ = true;
  }

  LowRank<S> support_forward(i64 k) const {
    return {plan_.input_layer, product_, gram_, ld_gram_, rows_, a(k), S(-1)};
  }
  LowRank<S> query_forward(i64 k) const {
    return {plan_.input_layer, nullptr, query_gram_, ld_gram_, rows_, a(k), S(-1)};
  }
  // Along scale * Lambda.
  LowRank<S> tangent(S scale) {
    const S* base = lambda_product_;
    if (scale != 1) {
      kernels_.sgd_direction(size_, -scale, nullptr, lambda_product_, nullptr, scaled_);
      base = scaled_;
    }
    return {plan_.input_layer, base, gram_, ld_gram_, rows_, b_, scale};
  }

  // A_{k+1} = A_k + alpha dy
  void step(i64 k, S alpha, const Pass<S>& pass) {
    kernels_.sgd_direction(size_, -alpha, nullptr, pass.delta(output_), a(k), a(k + 1));
  }
  // B += scale R(dy)
  void adjoint_step(S scale, const Pass<S>& pass) {
    kernels_.sgd_direction(size_, -scale, nullptr, pass.tangent_delta(output_), b_, b_);
  }

  // theta_k, for whoever wants to see it.
  void write_theta(i64 k, const S* theta, S* to) const {
    Gemm<S> g = outer(x_, ld_x_, rows_, a(k), to);
    g.base = engine_matrix(plan_, param(), theta), g.scale = -1;
    kernels_.gemm(g);
  }

  // L = seed, of which nobody has written anything yet; it stays where it is.
  void seed(const S* lambda) {
    Gemm<S> g = product(x_, ld_x_, rows_, Matrix<const S>(engine_matrix(plan_, param(), lambda)),
                        plan_.params[param_].cols);
    g.c = Matrix<S>::plain(lambda_product_, ld_);
    kernels_.gemm(g);
  }
  // L += z^T dz: here as x L only; the layer's own sink adds it to the sums.
  void add_query(const Pass<S>& pass) {
    Gemm<S> g;
    const S* dz = pass.delta(output_);
    g.m = rows_, g.n = plan_.params[param_].rows, g.k = query_rows_;
    g.pair[0] = {query_gram_, 1, ld_gram_, Matrix<const S>::plain(dz, ld_)};
    g.c = Matrix<S>::plain(lambda_product_, ld_), g.base = Matrix<const S>::plain(lambda_product_, ld_);
    kernels_.gemm(g);
  }
  // <Lambda, x^T dy> = <x Lambda, dy>
  double rate_gradient(const Pass<S>& pass) {
    Gemm<S> g;
    g.m = rows_, g.n = param().rows, g.k = rows_;
    g.pair[0] = {gram_, ld_gram_, 1, Matrix<const S>::plain(b_, ld_)};
    g.base = Matrix<const S>::plain(lambda_product_, ld_), g.c = Matrix<S>::plain(scaled_, ld_);
    kernels_.gemm(g);
    double total = 0;
    for (i64 r = 0; r < rows_; ++r)
      total += kernels_.inner(plan_.padded(param().rows), scaled_ + r * ld_, pass.delta(output_) + r * ld_);
    return total;
  }
  // to [+]= x^T B [+ z^T dz of a query pass]
  void write_lambda(S* to, bool add, const Pass<S>* query) const {
    Gemm<S> g = outer(x_, ld_x_, rows_, b_, to);
    if (query) {
      g.pairs = 2;
      g.pair[1] = {query->input, 1, query->input_ld, Matrix<const S>::plain(query->delta(output_), ld_),
                   query_rows_};
    }
    if (add) g.base = engine_matrix(plan_, param(), static_cast<const S*>(to));
    kernels_.gemm(g);
  }

 private:
  const Param& param() const { return plan_.params[param_]; }
  const S* a(i64 k) const { return a_ + k * size_; }
  S* a(i64 k) { return a_ + k * size_; }
  void zero(S* p) const {
    for (i64 i = 0; i < size_; ++i) p[i] = 0;
  }

  // to = z x^T
  void gram(const S* z, i64 ld_z, i64 rows, S* to) const {
    Dot<S> d;
    d.m = rows, d.n = rows_, d.k = plan_.padded(param().cols);
    d.pair[0] = {z, ld_z, x_, ld_x_};
    d.c = to, d.ldc = ld_gram_;
    kernels_.dot(d);
  }
  // x b
  Gemm<S> product(const S* x, i64 ld_x, i64 rows, Matrix<const S> b, i64 k) const {
    Gemm<S> g;
    g.m = rows, g.n = param().rows, g.k = k;
    g.pair[0] = {x, ld_x, 1, b};
    return g;
  }
  // to = x^T y
  Gemm<S> outer(const S* x, i64 ld_x, i64 rows, const S* y, S* to) const {
    Gemm<S> g;
    g.m = param().cols, g.n = param().rows, g.k = rows;
    g.pair[0] = {x, 1, ld_x, Matrix<const S>::plain(y, ld_)};
    g.c = engine_matrix(plan_, param(), to);
    return g;
  }

  const Plan& plan_;
  const Kernels<S>& kernels_;
  S* own_;
  int param_ = -1, output_ = -1;
  bool query_known_ = false;
  i64 rows_ = 0, query_rows_ = 0, ld_ = 0, size_ = 0, ld_gram_ = 0, ld_x_ = 0;
  const S* x_ = nullptr;
  S *gram_ = nullptr, *query_gram_ = nullptr, *product_ = nullptr, *lambda_product_ = nullptr,
    *scaled_ = nullptr, *b_ = nullptr, *a_ = nullptr;
};

}  // namespace fm
