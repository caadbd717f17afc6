// Clipping of one task's gradient over all of its parameters: the factor of a step and its adjoint.
#pragma once

#include <cmath>
#include <limits>

#include "kernels.h"

namespace fm {

// lanes > 1: a task in every lane of a vector; 1: all lanes are of one task.
template <class S>
class Clipping {
 public:
  static constexpr int WIDEST = 64 / int(sizeof(S));  // elements of a line of factors
  Clipping(const Rule& rule, const Kernels<S>& kernels, i64 lanes)
      : rule_(rule), kernels_(kernels), lanes_(lanes) {}

  // To be called for each parameter in turn: `each(body)` calls body(n, mask, g, offset).
  // Writes g2 to clipped + offset, and the factors of the step.
  template <class Each>
  void forward(const double* numbers, const Each& each, S* factors, S* clipped) const {
    find_factors(numbers, each, factors);
    clip(numbers, each, factors, clipped);
  }
  // The same by the factors that `forward` has found.
  template <class Each>
  void clip(const double* numbers, const Each& each, const S* factors, S* clipped) const {
    each([&](i64 n, const S* mask, const S* g, i64 offset) {
      kernels_.clip(call(numbers, n, mask, g, factors), clipped + offset);
    });
  }

  // v = dJ/dg of v = dJ/dg2, at v + offset; adds to the gradients of the two numbers.
  template <class Each>
  void back(const double* numbers, const Each& each, const S* factors, S* v, double* grads) const {
    S along[WIDEST] = {};
    const bool by_norm = rule_.has(RuleNumber::clip_norm);
    if (by_norm) {
      S squares[WIDEST] = {}, dots[WIDEST] = {};
      each([&](i64 n, const S* mask, const S* g, i64 offset) {
        const ClipCall<S> c = call(numbers, n, mask, g, nullptr);
        kernels_.clip_squares(c, squares);
        kernels_.clip_dots(c, v + offset, dots);
      });
      total(squares), total(dots);
      const S most = S(numbers[int(RuleNumber::clip_norm)]);
      for (i64 l = 0; l < WIDEST; ++l) {
        const S norm = std::sqrt(squares[l]), below = norm + S(1e-6);
        if (!(most / below <= 1)) continue;
        if (norm > 0) along[l] = -most / (below * below) / norm * dots[l];
        if (l < lanes_ && grads) grads[int(RuleNumber::clip_norm)] += double(dots[l] / below);
      }
    }
    double by_value = 0;
    each([&](i64 n, const S* mask, const S* g, i64 offset) {
      by_value +=
          kernels_.clip_back(call(numbers, n, mask, g, factors), by_norm ? along : nullptr, v + offset);
    });
    if (grads && rule_.has(RuleNumber::clip_value)) grads[int(RuleNumber::clip_value)] += by_value;
  }

 private:
  ClipCall<S> call(const double* numbers, i64 n, const S* mask, const S* g, const S* factors) const {
    const bool by_value = rule_.has(RuleNumber::clip_value);
    return {n, mask, g,
            by_value ? S(numbers[int(RuleNumber::clip_value)]) : std::numeric_limits<S>::infinity(), factors};
  }
  template <class Each>
  void find_factors(const double* numbers, const Each& each, S* factors) const {
    for (i64 l = 0; l < WIDEST; ++l) factors[l] = 1;
    if (!rule_.has(RuleNumber::clip_norm)) return;
    S squares[WIDEST] = {};
    each([&](i64 n, const S* mask, const S* g, i64) {
      kernels_.clip_squares(call(numbers, n, mask, g, nullptr), squares);
    });
    total(squares);
    const S most = S(numbers[int(RuleNumber::clip_norm)]);
    for (i64 l = 0; l < WIDEST; ++l) {
      const S factor = most / (std::sqrt(squares[l]) + S(1e-6));
      factors[l] = factor > 1 ? S(1) : factor;
    }
  }
  // Where all lanes are of one task, each gets the sum.
  void total(S* lanes) const {
    if (lanes_ > 1) return;
    S sum = 0;
    for (i64 l = 0; l < WIDEST; ++l) sum += lanes[l];
    for (i64 l = 0; l < WIDEST; ++l) lanes[l] = sum;
  }

  const Rule& rule_;
  const Kernels<S>& kernels_;
  const i64 lanes_;
};

// The numbers of step k: those of the rule, but for the learned ones of a call, [K, RULE_NUMBERS].
template <class S>
inline void numbers_at(const Rule& rule, const S* learned, i64 k, double* numbers) {
  for (int i = 0; i < RULE_NUMBERS; ++i)
    numbers[i] = rule.learned[i] ? double(learned[k * RULE_NUMBERS + i]) : rule.numbers[i];
}

}  // namespace fm
