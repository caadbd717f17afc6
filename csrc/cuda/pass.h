// One pass over the network for one task: where its buffers are, and how a layer hands on what it
// has computed.
#pragma once

#include "tile.h"

namespace fm::cuda {

#include "../shared/functions.inl"
#include "../shared/loss_example.inl"

// Support and query passes differ in their numbers alone: the code of a pass is compiled once if
// their memory is alike.
struct Pass {
  S* workspace;
  int examples;
  const S* input;  // value 0, if it is read where the user has it
  int in;          // ... and where it is copied to
  int x, d, rx, rd;
  int k;  // of theta_k
};

FM_INLINE int rows(const Pass& pass, int value) { return pass.examples * VALUES[value].rows; }
// Rows that work is shared out for: the support set's, which is passed most often.
constexpr int usual_rows(int value) {
  return (OPTIONS.steps > 0 ? OPTIONS.support : OPTIONS.query) * VALUES[value].rows;
}

// ---- parameters
// Offset of parameter P in theta_k.
template <int P>
FM_INLINE int theta_at(int k) {
  constexpr Param p = PARAMS[P];
  return LAYOUT.theta.at + p.at + (p.adapted && LAYOUT.keep_all ? k * LAYOUT.set : 0);
}
template <int P>
FM_INLINE S* theta(S* workspace, int k) {
  return memory<LAYOUT.theta.space>(workspace, PARAMS[P].rank, theta_at<P>(k));
}
template <int P>
FM_INLINE S* lambda(S* workspace) {
  return memory<LAYOUT.lambda.space>(workspace, PARAMS[P].rank, LAYOUT.lambda.at + PARAMS[P].at);
}
// Of adapted parameters only, as all sets but theta_0 and lambda.
template <int P>
FM_INLINE S* direction(S* workspace) {
  return memory<LAYOUT.direction.space>(workspace, PARAMS[P].rank,
                                        LAYOUT.direction.at + PARAMS[P].at - LAYOUT.frozen);
}
// Where theta_k is kept while another one is read, 0 < k < K.
template <int P>
FM_INLINE S* checkpoint(S* workspace, int k) {
  constexpr Param p = PARAMS[P];
  return memory<Space::global>(workspace, p.rank,
                               LAYOUT.checkpoints + (k - 1) * LAYOUT.set + p.at - LAYOUT.frozen);
}
template <int P>
constexpr Matrix<PARAMS[P].cols, PARAMS[P].ld, PARAMS[P].vector> weight_matrix(const S* data) {
  return {data};
}

// ---- values
template <int V>
using ValueMatrix = Matrix<VALUES[V].cols, VALUES[V].ld, VALUES[V].vector>;

template <int V, Space X>
FM_INLINE const S* value(const Pass& pass) {
  if constexpr (V > 0)
    return memory<X>(pass.workspace, VALUES[V].rank, pass.x + pass.examples * VALUES[V].x);
  else if constexpr (LAYOUT.input.space == Space::user)
    return pass.input;
  else
    return memory<LAYOUT.input.space>(pass.workspace, VALUES[0].rank, pass.in);
}
template <int V, Space X>
FM_INLINE S* own_value(const Pass& pass) {
  return memory<X>(pass.workspace, VALUES[V].rank, pass.x + pass.examples * VALUES[V].x);
}
template <int V, Space X>
FM_INLINE S* delta(const Pass& pass) {
  return memory<X>(pass.workspace, VALUES[V].rank, pass.d + pass.examples * VALUES[V].d);
}
// Tangents share their memory with the query's values.
constexpr Space TANGENTS = LAYOUT.tangents.space;
template <int V>
FM_INLINE S* tangent(const Pass& pass) {
  return memory<TANGENTS>(pass.workspace, VALUES[V].rank, pass.rx + pass.examples * VALUES[V].rx);
}
template <int V>
FM_INLINE S* tangent_delta(const Pass& pass) {
  return memory<TANGENTS>(pass.workspace, VALUES[V].rank, pass.rd + pass.examples * VALUES[V].rd);
}

// ---- activations in epilogues
template <Function F>
struct Formula;  // of Function::none there is none
#define FM_FORMULA(name, Type)     \
  template <>                      \
  struct Formula<Function::name> { \
    using type = Type<S>;          \
  };
FM_FUNCTIONS(FM_FORMULA)
#undef FM_FORMULA

template <Function F>
constexpr auto function_object(double c0, double c1) {
  return typename Formula<F>::type{S(c0), S(c1)};
}

// The layer whose epilogue makes value V out of another one by an activation; -1: none does.
constexpr int activation_of(int value) {
  for (int l = 0; l < LAYER_COUNT; ++l)
    if (LAYERS[l].output == value && LAYERS[l].pre >= 0) return l;
  return -1;
}

// f'(x) and f''(x) of the activation in layer L's epilogue at N elements. Where the value before it
// is not kept, the one after it tells them as well.
template <int L, Space X, int N>
FM_INLINE void activation_derivatives(const Pass& pass, int at, Vec<N>& first, Vec<N>& second) {
  constexpr Layer layer = LAYERS[L];
  const auto f = function_object<layer.function>(layer.c0, layer.c1);
  const Vec<N> y = load<N>(own_value<layer.output, X>(pass) + at);
  Vec<N> x = y;
  if constexpr (VALUES[layer.pre].x >= 0) x = load<N>(own_value<layer.pre, X>(pass) + at);
  FM_UNROLL
  for (int j = 0; j < N; ++j) f.derivatives(x.at[j], y.at[j], first.at[j], second.at[j]);
}

// g f'(x), of the activation in layer L's epilogue or of an element-wise layer. Where relu is off that
// is zero, of an infinite or NaN g too, as in PyTorch.
template <int L>
FM_INLINE S chained(S g, S first) {
  if constexpr (LAYERS[L].function == Function::relu) return first == S(0) ? S(0) : g;
  return g * first;
}

template <int L>
constexpr bool linear_pieces() {
  constexpr Layer layer = LAYERS[L];
  return LINEAR_PIECES<decltype(function_object<layer.function>(0, 0))>;
}

// Whether the gradient of value V is anybody's business; INPUT: the network's input has one too.
template <int V, bool INPUT>
constexpr bool wants_delta = VALUES[V].from_params || INPUT;
template <int V>
constexpr bool has_tangent = VALUES[V].from_params;

// ---- handing on
// Layer L has one element of its output, at offset `at`, before the activation in its epilogue.
template <int L, Space X>
FM_INLINE void put_value(const Pass& pass, int at, S z) {
  constexpr Layer layer = LAYERS[L];
  if constexpr (layer.pre >= 0) {
    if constexpr (VALUES[layer.pre].x >= 0) own_value<layer.pre, X>(pass)[at] = z;
    z = function_object<layer.function>(layer.c0, layer.c1).value(z);
  }
  own_value<layer.output, X>(pass)[at] = z;
}

// Likewise of its tangent.
template <int L, Space X>
FM_INLINE void put_tangent(const Pass& pass, int at, S rz) {
  constexpr Layer layer = LAYERS[L];
  if constexpr (layer.pre >= 0) {
    if constexpr (VALUES[layer.pre].rx >= 0) tangent<layer.pre>(pass)[at] = rz;
    Vec<1> first, second;
    activation_derivatives<L, X, 1>(pass, at, first, second);
    rz = chained<L>(rz, first.at[0]);
  }
  tangent<layer.output>(pass)[at] = rz;
}

// A layer has N elements of the gradient of value V, at offset `at`; through the activation in
// front of it if it is the last one to add.
template <int V, bool ADD, bool LAST, Space X, int N>
FM_INLINE void put_delta(const Pass& pass, int at, Vec<N> g) {
  constexpr int L = activation_of(V);
  if constexpr (ADD) {
    const Vec<N> before = load<N>(delta<V, X>(pass) + at);
    FM_UNROLL
    for (int j = 0; j < N; ++j) g.at[j] += before.at[j];
  }
  if constexpr (VALUES[V].d >= 0) store<N>(delta<V, X>(pass) + at, g);
  if constexpr (LAST && L >= 0) {
    Vec<N> first, second;
    activation_derivatives<L, X, N>(pass, at, first, second);
    FM_UNROLL
    for (int j = 0; j < N; ++j) g.at[j] = chained<L>(g.at[j], first.at[j]);
    store<N>(delta<LAYERS[L].pre, X>(pass) + at, g);
  }
}

// Likewise of the tangent of that gradient: R(dx) = R(dy) f' + dy f'' Rx.
template <int V, bool ADD, bool LAST, Space X, int N>
FM_INLINE void put_tangent_delta(const Pass& pass, int at, Vec<N> g) {
  constexpr int L = activation_of(V);
  if constexpr (ADD) {
    const Vec<N> before = load<N>(tangent_delta<V>(pass) + at);
    FM_UNROLL
    for (int j = 0; j < N; ++j) g.at[j] += before.at[j];
  }
  if constexpr (!LAST || L < 0) {
    store<N>(tangent_delta<V>(pass) + at, g);
  } else {
    constexpr int PRE = LAYERS[L].pre;
    Vec<N> first, second;
    activation_derivatives<L, X, N>(pass, at, first, second);
    FM_UNROLL
    for (int j = 0; j < N; ++j) g.at[j] = chained<L>(g.at[j], first.at[j]);
    if constexpr (has_tangent<PRE> && !linear_pieces<L>()) {
      const Vec<N> dy = load<N>(delta<V, X>(pass) + at), rx = load<N>(tangent<PRE>(pass) + at);
      FM_UNROLL
      for (int j = 0; j < N; ++j) g.at[j] += dy.at[j] * second.at[j] * rx.at[j];
    }
    store<N>(tangent_delta<PRE>(pass) + at, g);
  }
}

// Calls body(element offset with rows `ld` apart, row, column) for every element of value V.
template <int V, class Body>
FM_INLINE void for_elements(const Pass& pass, const Body& body) {
  constexpr Value v = VALUES[V];
  const int count = rows(pass, V) * v.cols;
  for (int e = thread(); e < count; e += step_threads())
    body(e / v.cols * v.ld + e % v.cols, e / v.cols, e % v.cols);
}

FM_INLINE Vec<1> one(S x) { return {{x}}; }

// A number that a template can tell from others.
template <int N>
struct Index {
  static constexpr int value = N;
};
template <int FROM, int TO, class Body>
FM_INLINE void for_each(const Body& body) {
  if constexpr (FROM < TO) {
    body(Index<FROM>{});
    for_each<FROM + 1, TO>(body);
  }
}

template <class Body>
FM_INLINE void for_params(const Body& body) {
  for_each<0, PARAM_COUNT>(body);
}
// Calls body(element of torch's tensor, element of ours) for all of parameter P's.
template <int P, class Body>
FM_INLINE void for_param(const Body& body) {
  constexpr Param p = PARAMS[P];
  for (int e = thread(); e < p.numel(); e += step_threads()) body(e, e / p.cols * p.ld + e % p.cols);
}

}  // namespace fm::cuda
