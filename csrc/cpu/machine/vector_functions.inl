// What the machine needs besides vector_math.inl.

template <class S, class F>
FM_INLINE Vec<S> by_element(Vec<S> x, const F& f) {
  Vec<S> y;
  for (int i = 0; i < lanes<S>; ++i) y[i] = f(S(x[i]));
  return y;
}
FM_INLINE float floor_number(float x) { return __builtin_floorf(x); }
FM_INLINE double floor_number(double x) { return __builtin_floor(x); }
FM_INLINE float round_number(float x) { return __builtin_rintf(x); }
FM_INLINE double round_number(double x) { return __builtin_rint(x); }
FM_INLINE float atan2_number(float y, float x) { return __builtin_atan2f(y, x); }
FM_INLINE double atan2_number(double y, double x) { return __builtin_atan2(y, x); }
template <class V>
using Element = decltype(V{}[0] + V{}[0]);

template <class V>
FM_INLINE V floor_(V x) {
  return by_element<Element<V>>(x, [](auto e) FM_INLINE_LAMBDA { return floor_number(e); });
}
template <class V>
FM_INLINE V round_(V x) {
  return by_element<Element<V>>(x, [](auto e) FM_INLINE_LAMBDA { return round_number(e); });
}
template <class V>
FM_INLINE V abs_(V x) {
  return x < V{} ? -x : x + V{};
}
template <class V>
FM_INLINE V atan2_(V y, V x) {
  V z;
  for (int i = 0; i < lanes<Element<V>>; ++i) z[i] = atan2_number(y[i], x[i]);
  return z;
}
