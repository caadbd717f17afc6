// concat: two values one after the other: side by side in every row, or block of rows by block of
// rows.
#pragma once

#include "../families/linear_map.h"

namespace fm::concat {

constexpr Rules RULES = Rules(2).sizes(1);

// In how many pairs of blocks of rows the values alternate; 0: their columns lie side by side.
inline i64 outer(const Layer& layer) { return i64(layer.constants[0]); }

inline Needs needs(const Plan& plan, const Layer& layer, i64) {
  require(layer.inputs[1] >= 0, "concat reads two values");
  const Value &a = plan.values[layer.inputs[0]], &b = plan.values[layer.inputs[1]],
              &y = plan.values[layer.output];
  const i64 blocks = outer(layer);
  if (blocks == 0)
    require(a.rows == y.rows && b.rows == y.rows && a.cols + b.cols == y.cols,
            "concat's columns do not add up");
  else
    require(blocks > 0 && a.cols == y.cols && b.cols == y.cols && a.rows + b.rows == y.rows &&
                a.rows % blocks == 0 && b.rows % blocks == 0,
            "concat's rows do not add up");
  return {};
}

struct Map {
  template <class S>
  static void apply(const Pass<S>& pass, const Layer& layer, const S* const* x, const i64* ld_x, S* y) {
    const Value& out = pass.plan.values[layer.output];
    for (i64 r = 0; r < pass.rows(layer.output); ++r)
      for (i64 c = out.cols; c < out.ld; ++c) y[r * out.ld + c] = 0;
    for (int j = 0; j < 2; ++j) {
      const i64 cols = pass.plan.values[layer.inputs[j]].cols;
      each_row(pass, layer, j, [&](i64 from, i64 to, i64 column) {
        for (i64 c = 0; c < cols; ++c) y[to * out.ld + column + c] = x[j] ? x[j][from * ld_x[j] + c] : S(0);
      });
    }
  }

  template <class S>
  static void transpose(const Pass<S>& pass, const Layer& layer, int j, const S* dy, S* dx, bool add) {
    const Value &in = pass.plan.values[layer.inputs[j]], &out = pass.plan.values[layer.output];
    each_row(pass, layer, j, [&](i64 row, i64 out_row, i64 column) {
      S* to = dx + row * in.ld;
      const S* from = dy + out_row * out.ld + column;
      for (i64 c = 0; c < in.cols; ++c) to[c] = add ? to[c] + from[c] : from[c];
      for (i64 c = in.cols; c < in.ld; ++c) to[c] = 0;
    });
  }

  // Calls body(row of input j, row of the output, first column in the output) for every row of an
  // input.
  template <class S, class Body>
  static void each_row(const Pass<S>& pass, const Layer& layer, int j, const Body& body) {
    const Plan& plan = pass.plan;
    const Value &a = plan.values[layer.inputs[0]], &x = plan.values[layer.inputs[j]],
                &y = plan.values[layer.output];
    const i64 blocks = outer(layer) ? outer(layer) : x.rows;
    const i64 own = x.rows / blocks, all = y.rows / blocks,
              before = j == 0 || outer(layer) == 0 ? 0 : a.rows / blocks;
    const i64 column = j == 1 && outer(layer) == 0 ? a.cols : 0;
    for (i64 block = 0; block < pass.geometry.examples * blocks; ++block)
      for (i64 r = 0; r < own; ++r) body(block * own + r, block * all + before + r, column);
  }
};

using Functions = LinearMap<Map>;

}  // namespace fm::concat
