// mul: y = a * b, element by element. b may have one row or one column for all of a's, as gates,
// FiLM and squeeze-and-excitation have it.
//
//   forward            y   = a b
//   backward           da  = dy b,             db  = the sum of dy a over what b stands for
//   tangent            ry  = ra b + a rb
//   tangent_backward   rda = rdy b + dy rb,    rdb = the sum of rdy a + dy ra
#pragma once

#include "../pass.h"

namespace fm::mul {

constexpr Rules RULES = Rules(2);

inline Needs needs(const Plan& plan, const Layer& layer, i64) {
  const Value &a = plan.values[layer.inputs[0]], &b = plan.values[layer.inputs[1]];
  const Value& y = plan.values[layer.output];
  require(a.rows == y.rows && a.cols == y.cols, "mul changes the shape of its first value");
  require((b.rows == y.rows || b.rows == 1) && (b.cols == y.cols || b.cols == 1),
          "mul's second value does not fit the first");
  return {};
}

// A value as a factor of the output: how far its elements are apart for neighbours there; 0 where one
// stands for all.
template <class S>
struct Factor {
  const S* at;
  i64 example, row, column;
  S operator()(i64 n, i64 r, i64 c) const { return at[n * example + r * row + c * column]; }
};

// A sum of up to two products, at one element of the output.
template <class S>
struct Products {
  int pairs = 0;
  Factor<S> first[2], second[2];
  void add(Factor<S> a, Factor<S> b) { first[pairs] = a, second[pairs++] = b; }
  S operator()(i64 n, i64 r, i64 c) const {
    S sum = first[0](n, r, c) * second[0](n, r, c);
    if (pairs == 2) sum += first[1](n, r, c) * second[1](n, r, c);
    return sum;
  }
};

template <class S>
Factor<S> factor(const Pass<S>& pass, const Layer& layer, int value, const S* at, i64 ld) {
  const Value &v = pass.plan.values[value], &y = pass.plan.values[layer.output];
  return {at, v.rows * ld, v.rows == y.rows ? ld : 0, v.cols == y.cols ? 1 : 0};
}
template <class S>
Factor<S> of_value(const Pass<S>& pass, const Layer& layer, int value) {
  return factor(pass, layer, value, pass.value(value), pass.value_ld(value));
}
// A tangent or a gradient.
template <class S>
Factor<S> of_block(const Pass<S>& pass, const Layer& layer, int value, const S* at) {
  return factor(pass, layer, value, at, pass.plan.values[value].ld);
}

// Value `to` at `out` = [out +] products, summed over the elements of the output that one of its
// elements stands for. Zeros in padding columns.
template <class S>
void write(const Pass<S>& pass, const Layer& layer, int to, const Products<S>& products, S* out, bool add) {
  const Value &v = pass.plan.values[to], &y = pass.plan.values[layer.output];
  const i64 rows = v.rows == y.rows ? 1 : y.rows, cols = v.cols == y.cols ? 1 : y.cols;
  for (i64 n = 0; n < pass.geometry.examples; ++n)
    for (i64 r = 0; r < v.rows; ++r, out += v.ld) {
      if (rows == 1 && cols == 1 && add) {
        for (i64 c = 0; c < v.cols; ++c) out[c] += products(n, r, c);
      } else if (rows == 1 && cols == 1) {
        for (i64 c = 0; c < v.cols; ++c) out[c] = products(n, r, c);
      } else {
        for (i64 c = 0; c < v.cols; ++c) {
          double sum = 0;
          for (i64 i = 0; i < rows; ++i)
            for (i64 j = 0; j < cols; ++j) sum += products(n, r + i, c + j);
          out[c] = add ? out[c] + S(sum) : S(sum);
        }
      }
      for (i64 c = v.cols; c < v.ld; ++c) out[c] = 0;
    }
}

struct Functions {
  template <class S>
  static void forward(const Pass<S>& pass, const Layer& layer) {
    Products<S> y;
    y.add(of_value(pass, layer, layer.inputs[0]), of_value(pass, layer, layer.inputs[1]));
    write(pass, layer, layer.output, y, pass.output(layer.output), false);
  }

  template <class S>
  static void backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
    const Factor<S> dy = of_block<S>(pass, layer, layer.output, pass.delta(layer.output));
    for (int j = 0; j < 2; ++j) {
      const int in = layer.inputs[j], other = layer.inputs[1 - j];
      if (!pass.wants_delta(in)) continue;
      Products<S> dx;
      dx.add(dy, of_value(pass, layer, other));
      write(pass, layer, in, dx, pass.delta(in), layer.adds[j]);
    }
  }

  template <class S>
  static void tangent(const Pass<S>& pass, const Layer& layer) {
    Products<S> ry;
    for (int j = 0; j < 2; ++j) {
      const int in = layer.inputs[j];
      if (pass.has_tangent(in))
        ry.add(of_block<S>(pass, layer, in, pass.tangent(in)), of_value(pass, layer, layer.inputs[1 - j]));
    }
    write(pass, layer, layer.output, ry, pass.tangent(layer.output), false);
  }

  template <class S>
  static void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
    const Factor<S> dy = of_block<S>(pass, layer, layer.output, pass.delta(layer.output));
    const Factor<S> rdy = of_block<S>(pass, layer, layer.output, pass.tangent_delta(layer.output));
    for (int j = 0; j < 2; ++j) {
      const int in = layer.inputs[j], other = layer.inputs[1 - j];
      if (!pass.wants_delta(in)) continue;
      Products<S> rdx;
      rdx.add(rdy, of_value(pass, layer, other));
      if (pass.has_tangent(other)) rdx.add(dy, of_block<S>(pass, layer, other, pass.tangent(other)));
      write(pass, layer, in, rdx, pass.tangent_delta(in), layer.adds[j]);
    }
  }
};

}  // namespace fm::mul
