// add: the sum of two values of one shape, as in a residual connection.
#pragma once

#include "../families/linear_map.h"

namespace fm::add {

constexpr Rules RULES = Rules(2);

inline Needs needs(const Plan& plan, const Layer& layer, i64) {
  const Value& y = plan.values[layer.output];
  for (int in : layer.inputs)
    require(in >= 0 && plan.values[in].rows == y.rows && plan.values[in].cols == y.cols,
            "add reads values of different shapes");
  return {};
}

struct Map {
  template <class S>
  static void apply(const Pass<S>& pass, const Layer& layer, const S* const* x, const i64* ld_x, S* y) {
    sum(pass, layer.output, x[0], ld_x[0], x[1], ld_x[1], y);
  }

  template <class S>
  static void transpose(const Pass<S>& pass, const Layer& layer, int j, const S* dy, S* dx, bool add) {
    const i64 ld = pass.plan.values[layer.output].ld;
    sum<S>(pass, layer.inputs[j], dy, ld, add ? dx : nullptr, ld, dx);
  }

  // out = a + b for all rows of a value; either may be absent.
  template <class S>
  static void sum(const Pass<S>& pass, int value, const S* a, i64 ld_a, const S* b, i64 ld_b, S* out) {
    const Value& v = pass.plan.values[value];
    for (i64 r = 0; r < pass.rows(value); ++r) {
      for (i64 c = 0; c < v.cols; ++c)
        out[r * v.ld + c] = (a ? a[r * ld_a + c] : S(0)) + (b ? b[r * ld_b + c] : S(0));
      for (i64 c = v.cols; c < v.ld; ++c) out[r * v.ld + c] = 0;
    }
  }
};

using Functions = LinearMap<Map>;

}  // namespace fm::add
