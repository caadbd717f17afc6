// reshape: the same numbers in torch's order, in rows of another length, or between an image
// (channels-last inside) and rows.
#pragma once

#include "../families/linear_map.h"
#include "../layout.h"

namespace fm::reshape {

constexpr Rules RULES = Rules(1);

inline Needs needs(const Plan& plan, const Layer& layer, i64) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require(x.rows * x.cols == y.rows * y.cols, "a reshape changes the number of elements");
  return {};
}

struct Map {
  template <class S>
  static void apply(const Pass<S>& pass, const Layer& layer, const S* const* x, const i64* ld_x, S* y) {
    const auto& values = pass.plan.values;
    copy(pass, values[layer.inputs[0]], x[0], ld_x[0], values[layer.output], y, false);
  }

  template <class S>
  static void transpose(const Pass<S>& pass, const Layer& layer, int, const S* dy, S* dx, bool add) {
    const Value &in = pass.plan.values[layer.inputs[0]], &out = pass.plan.values[layer.output];
    copy(pass, out, dy, out.ld, in, dx, add);
  }

  // From rows as `a` has them, `ld` apart, to rows as `b` has them.
  template <class S>
  static void copy(const Pass<S>& pass, const Value& a, const S* from, i64 ld, const Value& b, S* to,
                   bool add) {
    for (i64 n = 0; n < pass.geometry.examples; ++n) {
      const S* x = from + n * a.rows * ld;
      S* y = to + n * b.rows * b.ld;
      TorchOrder at_x(a, ld), at_y(b, b.ld);
      for (i64 i = 0; i < a.rows * a.cols; ++i, at_x.next(), at_y.next()) {
        S& out = y[at_y.offset];
        out = add ? out + x[at_x.offset] : x[at_x.offset];
      }
      for (i64 r = 0; r < b.rows; ++r)
        for (i64 c = b.cols; c < b.ld; ++c) y[r * b.ld + c] = 0;
    }
  }
};

using Functions = LinearMap<Map>;

}  // namespace fm::reshape
