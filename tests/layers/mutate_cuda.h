// Put into a copy of the CUDA kernels by mutate.py, which defines MUTATED_KIND and MUTATED_FUNCTION.
#pragma once
namespace fm::cuda {

template <int L, Space X>
FM_INLINE void negate(const Pass& pass, bool back, bool tangent) {
  constexpr int OUT = LAYERS[L].output, Y = LAYERS[L].pre >= 0 ? LAYERS[L].pre : OUT;
  barrier();
  if (back) {
    if constexpr (VALUES[Y].d >= 0)
      for_elements<Y>(pass, [&](int at, int, int) { delta<Y, X>(pass)[at] = -delta<Y, X>(pass)[at]; });
    if constexpr (VALUES[Y].rd >= 0)
      if (tangent)
        for_elements<Y>(pass,
                        [&](int at, int, int) { tangent_delta<Y>(pass)[at] = -tangent_delta<Y>(pass)[at]; });
  } else if (tangent) {
    for_elements<OUT>(
        pass, [&](int at, int, int) { cuda::tangent<OUT>(pass)[at] = -cuda::tangent<OUT>(pass)[at]; });
  } else {
    for_elements<OUT>(pass,
                      [&](int at, int, int) { own_value<OUT, X>(pass)[at] = -own_value<OUT, X>(pass)[at]; });
  }
  barrier();
}

// Calls body, with the wrong sign where this build has it.
template <int L, int FUNCTION, Space X, class Body>
FM_INLINE void flipped(const Pass& pass, const Body& body) {
  constexpr bool wrong = LAYERS[L].kind == Kind::MUTATED_KIND && FUNCTION == MUTATED_FUNCTION;
  constexpr bool back = FUNCTION % 2 == 1, tangent = FUNCTION >= 2;
  if constexpr (wrong && back) negate<L, X>(pass, back, tangent);
  body();
  if constexpr (wrong) negate<L, X>(pass, back, tangent);
}

}  // namespace fm::cuda
