// Vectors as bits: what the elementary functions of vector_math.inl are made of. Included by it,
// after vector.inl.

template <class S>
struct Format;
template <>
struct Format<float> {
  using Word = unsigned;
  static constexpr int MANTISSA = 23, BIAS = 127;
  static constexpr Word TWO_THIRDS = 0x3f2aaaab;
  static constexpr float EPSILON = 0x1p-23f, INTEGERS = 0x1p23f, INFINITE = __builtin_inff();
};
template <>
struct Format<double> {
  using Word = unsigned long long;
  static constexpr int MANTISSA = 52, BIAS = 1023;
  static constexpr Word TWO_THIRDS = 0x3fe5555555555555;
  static constexpr double EPSILON = 0x1p-52, INTEGERS = 0x1p52, INFINITE = __builtin_inf();
};

template <class S>
using Word = typename Format<S>::Word;
template <class S>
using Words = typename VectorOf<Word<S>>::type;
// What a comparison gives: all bits of a lane, or none.
template <class S>
using Mask = decltype(Vec<S>{} < Vec<S>{});

template <class S>
constexpr Word<S> SIGN_BIT = Word<S>(1) << (8 * sizeof(S) - 1);
template <class S>
constexpr Word<S> FRACTION_BITS = (Word<S>(1) << Format<S>::MANTISSA) - 1;
// The bits of Format::INTEGERS. An integer in the lowest bits of it adds itself.
template <class S>
constexpr Word<S> INTEGERS_BITS = Word<S>(Format<S>::BIAS + Format<S>::MANTISSA) << Format<S>::MANTISSA;
// Adding this rounds to an integer, which then stands in the lowest bits of the sum.
template <class S>
constexpr S ROUND = S(1.5) * Format<S>::INTEGERS;

template <class S>
FM_INLINE Words<S> words(Vec<S> x) {
  return (Words<S>)x;
}
template <class S>
FM_INLINE Vec<S> choose(Mask<S> mask, Vec<S> yes, Vec<S> no) {
  return mask ? yes : no;
}
template <class S>
FM_INLINE Vec<S> choose(Mask<S> mask, S yes, Vec<S> no) {
  return mask ? broadcast(yes) : no;
}
template <class S>
FM_INLINE Vec<S> magnitude(Vec<S> x) {
  return (Vec<S>)(words<S>(x) & ~SIGN_BIT<S>);
}
// x, which is not negative, with the sign of `of`.
template <class S>
FM_INLINE Vec<S> with_sign(Vec<S> x, Vec<S> of) {
  return (Vec<S>)(words<S>(x) | (words<S>(of) & SIGN_BIT<S>));
}
// NaN stays.
template <class S>
FM_INLINE Vec<S> at_most(Vec<S> x, S most) {
  return choose<S>(x > most, most, x);
}
template <class S>
FM_INLINE Vec<S> clamp(Vec<S> x, S least, S most) {
  return at_most<S>(choose<S>(x < least, least, x), most);
}

// The lanes before `count`.
template <class S>
FM_INLINE Mask<S> first_lanes(i64 count) {
  Vec<S> lane{};
  for (int i = 0; i < lanes<S>; ++i) lane[i] = S(i);
  return lane < S(count);
}

#if defined(__AVX512F__) && FM_VECTOR_BYTES == 64
#define FM_HAS_FMA 1
FM_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
FM_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
FM_INLINE Vec<float> sqrt_(Vec<float> x) { return _mm512_maskz_sqrt_ps(0xffff, x); }
FM_INLINE Vec<double> sqrt_(Vec<double> x) { return _mm512_maskz_sqrt_pd(0xff, x); }
FM_INLINE bool any(Mask<float> m) { return _mm512_movepi32_mask((__m512i)m) != 0; }
FM_INLINE bool any(Mask<double> m) { return _mm512_movepi64_mask((__m512i)m) != 0; }
#elif defined(__FMA__) && FM_VECTOR_BYTES == 32
#define FM_HAS_FMA 1
FM_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
FM_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
FM_INLINE Vec<float> sqrt_(Vec<float> x) { return _mm256_sqrt_ps(x); }
FM_INLINE Vec<double> sqrt_(Vec<double> x) { return _mm256_sqrt_pd(x); }
FM_INLINE bool any(Mask<float> m) { return _mm256_movemask_ps((__m256)m) != 0; }
FM_INLINE bool any(Mask<double> m) { return _mm256_movemask_pd((__m256d)m) != 0; }
#else
#define FM_HAS_FMA 0
template <class V>
FM_INLINE V fused(V a, V b, V c) {
  return a * b + c;
}
FM_INLINE Vec<float> sqrt_(Vec<float> x) {
  for (int i = 0; i < lanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
FM_INLINE Vec<double> sqrt_(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
template <class M>
FM_INLINE bool any(M mask) {
  auto all = mask[0];
  for (int i = 1; i < int(sizeof(M) / sizeof(all)); ++i) all |= mask[i];
  return all != 0;
}
#endif

// a b + c. A compiler may contract a * b + c into one instruction in one place and not in another,
// and the bits would depend on the place; so it is always written out.
template <class S>
FM_INLINE Vec<S> fma_(Vec<S> a, Vec<S> b, Vec<S> c) {
  return fused(a, b, c);
}
template <class S>
FM_INLINE Vec<S> fma_(Vec<S> a, Vec<S> b, S c) {
  return fused(a, b, broadcast(c));
}
template <class S>
FM_INLINE Vec<S> fma_(Vec<S> a, S b, Vec<S> c) {
  return fused(a, broadcast(b), c);
}
template <class S>
FM_INLINE Vec<S> fma_(Vec<S> a, S b, S c) {
  return fused(a, broadcast(b), broadcast(c));
}

// high + low with low far below high: a number in twice the precision.
template <class S>
struct Twofold {
  Vec<S> high, low;
};
// a + b, exactly, for |a| >= |b|.
template <class S>
FM_INLINE Twofold<S> exact_sum(Vec<S> a, Vec<S> b) {
  const Vec<S> high = a + b;
  return {high, b - (high - a)};
}
// a + b, exactly.
template <class S>
FM_INLINE Twofold<S> exact_sum_of_any(Vec<S> a, Vec<S> b) {
  const Vec<S> high = a + b, from_b = high - a;
  return {high, (a - (high - from_b)) + (b - from_b)};
}
// a b, exactly, or but for its last bits.
template <class S>
FM_INLINE Twofold<S> exact_product(Vec<S> a, Vec<S> b) {
  const Vec<S> high = a * b;
#if FM_HAS_FMA
  return {high, fma_<S>(a, b, -high)};
#else
  constexpr Word<S> UPPER = ~((Word<S>(1) << (Format<S>::MANTISSA + 2) / 2) - 1);
  const Vec<S> a1 = (Vec<S>)(words<S>(a) & UPPER), b1 = (Vec<S>)(words<S>(b) & UPPER);
  const Vec<S> a2 = a - a1, b2 = b - b1;
  return {high, ((a1 * b1 - high) + a1 * b2 + a2 * b1) + a2 * b2};
#endif
}
template <class S, int N>
FM_INLINE Vec<S> polynomial(Vec<S> x, const S (&coefficients)[N]) {
  Vec<S> p = broadcast(coefficients[0]);
#pragma GCC unroll 32
  for (int i = 1; i < N; ++i) p = fma_<S>(p, x, coefficients[i]);
  return p;
}

// Half of the lanes in double precision, and both halves in single again.
typedef VectorOf<float, FM_VECTOR_BYTES / 2>::type Half;
FM_INLINE Vec<double> doubled(Half x) { return __builtin_convertvector(x, Vec<double>); }
FM_INLINE Half halved(Vec<double> x) { return __builtin_convertvector(x, Half); }
#if FM_HAS_FMA && FM_VECTOR_BYTES == 64
FM_INLINE Half lower(Vec<float> x) { return _mm512_maskz_extractf32x8_ps(0xff, x, 0); }
FM_INLINE Half upper(Vec<float> x) { return _mm512_maskz_extractf32x8_ps(0xff, x, 1); }
FM_INLINE Vec<float> together(Half lower, Half upper) {
  return _mm512_maskz_insertf32x8(0xffff, _mm512_castps256_ps512(lower), upper, 1);
}
#elif FM_HAS_FMA
FM_INLINE Half lower(Vec<float> x) { return _mm256_castps256_ps128(x); }
FM_INLINE Half upper(Vec<float> x) { return _mm256_extractf128_ps(x, 1); }
FM_INLINE Vec<float> together(Half lower, Half upper) { return _mm256_set_m128(upper, lower); }
#else
union Halves {
  Vec<float> whole;
  Half half[2];
};
FM_INLINE Half lower(Vec<float> x) { return Halves{x}.half[0]; }
FM_INLINE Half upper(Vec<float> x) { return Halves{x}.half[1]; }
FM_INLINE Vec<float> together(Half lower, Half upper) {
  Halves x;
  x.half[0] = lower, x.half[1] = upper;
  return x.whole;
}
#endif
// f(x...) in double precision.
template <class F, class... X>
FM_INLINE Vec<float> in_double(const F& f, X... x) {
  return together(halved(f(doubled(lower(x))...)), halved(f(doubled(upper(x))...)));
}
