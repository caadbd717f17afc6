// Plain descriptions shared by the plan, the meta-step and the kernels: no allocation, no standard
// library.
#pragma once

#ifndef __CUDACC_RTC__
#include <cstdint>
#endif

namespace fm {

constexpr int MOST_CONSTANTS = 8;  // of a layer

#ifdef __CUDACC_RTC__  // which has no standard library
using i64 = long long;
#else
using i64 = std::int64_t;
#endif

// Every layer kind that there are kernels for; X(kind), for each csrc/cpu/layers/<kind>.h, or of a
// GPU for each kind that the network has.
#ifndef FM_LAYER_KINDS
#include "layer_kinds.h"
#endif

#define FM_ENUMERATOR(kind) kind,
enum class Kind : int { FM_LAYER_KINDS(FM_ENUMERATOR) };
#undef FM_ENUMERATOR

// Every element-wise function: its name, and the struct in functions.inl that computes it.
#define FM_FUNCTIONS(X)    \
  X(relu, Relu)            \
  X(leaky_relu, LeakyRelu) \
  X(elu, Elu)              \
  X(gelu, Gelu)            \
  X(gelu_tanh, GeluTanh)   \
  X(silu, Silu)            \
  X(mish, Mish)            \
  X(tanh, Tanh)            \
  X(sigmoid, Sigmoid)      \
  X(softplus, Softplus)    \
  X(sin, Sin)              \
  X(affine, Affine)

#define FM_ENUMERATOR(name, formula) name,
enum class Function : int { none, FM_FUNCTIONS(FM_ENUMERATOR) };
#undef FM_ENUMERATOR

enum class LossKind : int { none, mse, l1, smooth_l1, huber, cross_entropy, bce_with_logits };

// A loss with every option of torch's module; the formulas stand in docs/losses.md.
struct LossSpec {
  LossKind kind = LossKind::none;
  bool sum = false;            // reduction="sum"
  bool normalise_sum = false;  // weight_norm="sum": divide by the sum of the weights
  bool class_indices = false;  // cross_entropy on indices, else on probabilities
  double beta = 1;             // smooth_l1's beta, huber's delta
  double label_smoothing = 0;
  i64 ignore_index = -100;
};

// Panels of matrices are 256 bytes wide, everything is padded to 64 bytes: independent of the
// instruction set, so that one plan serves all of them.
template <class S>
constexpr i64 lane_pad = 64 / sizeof(S);
template <class S>
constexpr i64 panel_columns = 256 / sizeof(S);

template <class S>
constexpr i64 pad(i64 n) {
  return (n + lane_pad<S> - 1) / lane_pad<S> * lane_pad<S>;
}

// A matrix of `rows` rows cut into column panels of 256 bytes (the last one narrower, cut from
// `padded` columns), panel after panel; or, with padded == 0, plain rows `ld` apart.
template <class S>
struct Matrix {
  S* data = nullptr;
  i64 ld = 0;
  i64 rows = 0;
  i64 padded = 0;

  static Matrix plain(S* data, i64 ld) { return {data, ld, 0, 0}; }
  static Matrix panels(S* data, i64 rows, i64 padded) { return {data, 0, rows, padded}; }
  explicit operator bool() const { return data != nullptr; }
  // Where column `j` begins; `stride` receives the distance between rows there.
  S* column(i64 j, i64& stride) const {
    if (padded == 0) {
      stride = ld;
      return data + j;
    }
    constexpr i64 PANEL = panel_columns<S>;
    const i64 start = j & ~(PANEL - 1), left = padded - start;
    stride = left < PANEL ? left : PANEL;
    return data + start * rows + (j - start);
  }
};

}  // namespace fm
