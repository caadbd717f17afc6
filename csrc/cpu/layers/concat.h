// concat: two values one behind the other: side by side in every row, or block of rows by block of
// rows. Linear.
#pragma once

#include "../pass.h"

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

// Calls body(row of input j, row of the output, first column in the output) for every row of an
// input.
template <class S, class Body>
void each_row(const Pass<S>& pass, const Layer& layer, int j, const Body& body) {
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

// Both inputs into `to`; one without memory counts as zero.
template <class S>
void join(const Pass<S>& pass, const Layer& layer, const S* const* from, const i64* ld_from, S* to) {
  const Value& y = pass.plan.values[layer.output];
  for (i64 r = 0; r < pass.rows(layer.output); ++r)
    for (i64 c = y.cols; c < y.ld; ++c) to[r * y.ld + c] = 0;
  for (int j = 0; j < 2; ++j) {
    const i64 cols = pass.plan.values[layer.inputs[j]].cols;
    each_row(pass, layer, j, [&](i64 row, i64 out, i64 column) {
      for (i64 c = 0; c < cols; ++c)
        to[out * y.ld + column + c] = from[j] ? from[j][row * ld_from[j] + c] : S(0);
    });
  }
}

// And back: each input's share of a gradient.
template <class S>
void split(const Pass<S>& pass, const Layer& layer, const S* dy, S* block) {
  const i64 ld_y = pass.plan.values[layer.output].ld;
  for (int j = 0; j < 2; ++j) {
    const int in = layer.inputs[j];
    if (!pass.wants_delta(in)) continue;
    const Value& x = pass.plan.values[in];
    S* dx = block + pass.geometry.offset[in];
    const bool add = layer.adds[j];
    each_row(pass, layer, j, [&](i64 row, i64 out, i64 column) {
      S* to = dx + row * x.ld;
      const S* from = dy + out * ld_y + column;
      for (i64 c = 0; c < x.cols; ++c) to[c] = add ? to[c] + from[c] : from[c];
      for (i64 c = x.cols; c < x.ld; ++c) to[c] = 0;
    });
  }
}

template <class S>
void forward(const Pass<S>& pass, const Layer& layer) {
  const int a = layer.inputs[0], b = layer.inputs[1];
  const S* from[] = {pass.value(a), pass.value(b)};
  const i64 ld[] = {pass.value_ld(a), pass.value_ld(b)};
  join<S>(pass, layer, from, ld, pass.output(layer.output));
}

template <class S>
void backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
  split<S>(pass, layer, pass.delta(layer.output), pass.d);
}

template <class S>
void tangent(const Pass<S>& pass, const Layer& layer) {
  const int a = layer.inputs[0], b = layer.inputs[1];
  const S* from[] = {pass.has_tangent(a) ? pass.tangent(a) : nullptr,
                     pass.has_tangent(b) ? pass.tangent(b) : nullptr};
  const i64 ld[] = {pass.plan.values[a].ld, pass.plan.values[b].ld};
  join<S>(pass, layer, from, ld, pass.tangent(layer.output));
}

template <class S>
void tangent_backward(const Pass<S>& pass, const Layer& layer, Sink<S>*) {
  split<S>(pass, layer, pass.tangent_delta(layer.output), pass.rd);
}

}  // namespace fm::concat
