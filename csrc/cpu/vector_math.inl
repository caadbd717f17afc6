// Elementary functions on vectors, in single and double precision: exp_, expm1_, log_, log1p_,
// pow_, tanh_, sigmoid_, sin_, cos_, erf_ and, in vector_bits.inl, sqrt_. Included after vector.inl;
// nothing else is needed.
//
// Errors are at most 2 units in the last place over the whole range, with and without instructions
// for a * b + c. Infinities, NaN, signed zeros and denormal arguments give what
// they give in libm; so do denormal results, unless the processor is set to flush them. Every lane
// is computed by itself: it does not matter which one a number is in.
//
// Coefficients stand highest power first; docs/cpu-engine.md says how they were found.

#include "vector_bits.inl"

// ---- exp, expm1, sigmoid, tanh

template <class S>
struct ExpFit;  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2
template <>
struct ExpFit<float> {
  static constexpr float C[] = {0.00138574629f, 0.00836743228f, 0.041667264f, 0.166665345f, 0.5f};
  static constexpr float LN2_HIGH = 0x1.63p-1f, LN2_LOW = -0x1.bd0106p-13f;  // of 9 and 24 bits
  // where the results of exp, expm1 and sigmoid are zero, infinite or at their limit
  static constexpr float LEAST = -104, MOST = 89, LEAST_M1 = -20, SIGMOID = 40;
  static constexpr int HALFWAY = 63;
  static constexpr float FAR = -38, ZERO = -130, SMALL = 0x1p-63f;
};
template <>
struct ExpFit<double> {
  static constexpr double C[] = {2.4984423459312096e-08, 2.7625237596347424e-07,
                                 2.7557625489672634e-06, 2.4801508577460536e-05,
                                 0.00019841269478989524, 0.0013888888926861707,
                                 0.0083333333334959948,  0.041666666666603791,
                                 0.16666666666666438,    0.5};
  static constexpr double LN2_HIGH = 0x1.62e42feep-1, LN2_LOW = 0x1.a39ef35793c76p-33;  // 32 and 53 bits
  static constexpr double LEAST = -746, MOST = 710, LEAST_M1 = -40, SIGMOID = 40;
  static constexpr int HALFWAY = 511;
  static constexpr double FAR = -300, ZERO = -800, SMALL = 0x1p-511;
};

// exp(x + low) = 2^n (1 + m), with `low` far below x.
template <class S>
struct Power {
  Words<S> n;  // in the lowest bits; those above them mean nothing
  Vec<S> m;
};
template <class S>
FM_INLINE Power<S> power(Vec<S> x, Vec<S> low = Vec<S>{}) {
  using Fit = ExpFit<S>;
  const Vec<S> shifted = fma_<S>(x, S(1.44269504088896340736), ROUND<S>), n = shifted - ROUND<S>;
  const Vec<S> high = fma_<S>(n, -Fit::LN2_HIGH, x);  // exact
  const Vec<S> less = fma_<S>(n, Fit::LN2_LOW, -low), r = high - less, rest = (high - r) - less;
  return {words<S>(shifted), r + fma_<S>(r * r, polynomial<S>(r, Fit::C), fma_<S>(rest, r, rest))};
}
// 2^n, which must be a normal number.
template <class S>
FM_INLINE Vec<S> two_to(Words<S> n) {
  return (Vec<S>)((n + Word<S>(Format<S>::BIAS)) << Format<S>::MANTISSA);
}
// 2^n (1 + m), in two steps as 2^n may be too large or too small.
template <class S>
FM_INLINE Vec<S> scaled(const Power<S>& p) {
  const Words<S> half = p.n >> 1;
  const Vec<S> first = two_to<S>(half);
  return fma_<S>(first, p.m, first) * two_to<S>(p.n - half);
}
template <class S>
FM_INLINE Vec<S> vector_exp(Vec<S> x) {
  return scaled<S>(power<S>(clamp<S>(x, ExpFit<S>::LEAST, ExpFit<S>::MOST)));
}

// The same for results in single precision: to some ten digits.
FM_INLINE Vec<double> exp_for_float(Vec<double> x) {
  constexpr double C[] = {0.00019731221977859517, 0.0013935070376667206, 0.008333592374168107,
                          0.041666462621501317,   0.1666666553034172,    0.5};
  x = clamp<double>(x, -300, 300);
  const Vec<double> shifted = fma_<double>(x, 1.44269504088896340736, ROUND<double>);
  const Vec<double> r = fma_<double>(shifted - ROUND<double>, -0.69314718055994530942, x);
  const Vec<double> s = two_to<double>(words<double>(shifted));
  return fma_<double>(s, fma_<double>(r * r, polynomial<double>(r, C), r), s);
}

template <class S>
FM_INLINE Vec<S> vector_expm1(Vec<S> x) {
  const Power<S> p = power<S>(clamp<S>(x, ExpFit<S>::LEAST_M1, ExpFit<S>::MOST));
  const Vec<S> half = two_to<S>(p.n - 1);  // of 2^n, which may be too large
  const Vec<S> y = fma_<S>(half, p.m, half - S(0.5)) * S(2);
  return choose<S>(magnitude<S>(x) < Format<S>::EPSILON / 4, x, y);
}

// sigmoid(x + low) = top / bottom, both far from overflow and underflow; top is a power of two, or
// zero.
template <class S>
struct Fraction {
  Vec<S> top, bottom;
};
template <class S>
FM_INLINE Fraction<S> logistic(Vec<S> x, Vec<S> low = Vec<S>{}) {
  using Fit = ExpFit<S>;
  const Power<S> p = power<S>(clamp<S>(-x, -Fit::SIGMOID, -Fit::ZERO), -low);
  const Mask<S> far = x < Fit::FAR;  // there, both are divided by a power of two
  const Vec<S> one = choose<S>(far, Fit::SMALL, broadcast(S(1)));
  const Vec<S> s = two_to<S>(p.n - ((Words<S>)far & Word<S>(Fit::HALFWAY)));
  const Vec<S> sum = one + s, lost = one - (sum - s);  // where s is large
  return {choose<S>(x < Fit::ZERO, S(0), one), sum + fma_<S>(s, p.m, lost)};
}
template <class S>
FM_INLINE Vec<S> vector_sigmoid(Vec<S> x) {
  const Fraction<S> f = logistic<S>(x);
  return f.top / f.bottom;
}

template <class S>
struct TanhFit;  // (tanh(x) / x - 1) / x^2 in x^2 for |x| <= 0.625
template <>
struct TanhFit<float> {
  static constexpr float C[] = {-0.0056987768f, 0.0206328221f, -0.0537375174f, 0.133314118f, -0.333332807f};
  static constexpr float MOST = 10;
};
template <>
struct TanhFit<double> {
  static constexpr double C[] = {6.0500042007124043e-06,  -3.020567001971275e-05, 9.1578246020661128e-05,
                                 -0.00023702403059773036, 0.00058945666094292184, -0.0014557272255588617,
                                 0.0035921142256821318,   -0.0088632343391516297, 0.021869488470728594,
                                 -0.053968253966150737,   0.13333333333329964,    -0.33333333333333315};
  static constexpr double MOST = 20;
};
template <class S>
FM_INLINE Vec<S> vector_tanh(Vec<S> x) {
  const Vec<S> a = magnitude<S>(x), z = a * a, near = fma_<S>(a, z * polynomial<S>(z, TanhFit<S>::C), a);
  const Power<S> p = power<S>(at_most<S>(a, TanhFit<S>::MOST) * S(2));
  const Vec<S> s = two_to<S>(p.n), far = S(1) - S(2) / fma_<S>(s, p.m, s + S(1));
  return with_sign<S>(choose<S>(a < S(0.625), near, far), x);
}

// ---- log, log1p

template <class S>
struct LogFit;  // (log(1 + f) - f) / f^2 for |f| <= 1/3
template <>
struct LogFit<float> {
  static constexpr float C[] = {-0.128856897f, 0.139744505f,  -0.121856906f, 0.14007923f, -0.166803673f,
                                0.200102791f,  -0.249998018f, 0.333332181f,  -0.5f};
};
template <>
struct LogFit<double> {
  static constexpr double C[] = {
      0.084409710167422811, -0.086239960945321534, 0.042083261368932444, -0.04573895331463633,
      0.060438965079196286, -0.063908389906906601, 0.066517016946458021, -0.071307968395609281,
      0.076931820091063002, -0.083339720367092973, 0.090908768758467082, -0.099999792926472902,
      0.11111111833913789,  -0.12500000389229743,  0.14285714276606812,  -0.16666666662926208,
      0.20000000000054471,  -0.25000000000013362,  0.33333333333333232,  -0.5};
};

// x = 2^e (1 + f) with |f| <= 1/3, for normal x > 0.
template <class S>
struct Parts {
  Vec<S> e, f;
  Words<S> e_biased;  // e + BIAS + 1
};
template <class S>
FM_INLINE Parts<S> parts(Vec<S> x) {
  using F = Format<S>;
  constexpr Word<S> ONE = Word<S>(F::BIAS + 1) << F::MANTISSA;
  const Words<S> from = words<S>(x) + (ONE - F::TWO_THIRDS), biased = from >> F::MANTISSA;
  const Vec<S> m = (Vec<S>)((from & FRACTION_BITS<S>)+F::TWO_THIRDS);
  const Vec<S> e = (Vec<S>)(biased | INTEGERS_BITS<S>)-(F::INTEGERS + S(F::BIAS + 1));
  return {e, m - S(1), biased};
}
// The same for x >= 0, denormal or not. They are looked at as integers: their processor may be set
// to take them for zero.
template <class S>
FM_INLINE Parts<S> parts_of_any(Vec<S> x, Vec<S>& normal) {
  using F = Format<S>;
  const Words<S> bits = words<S>(magnitude<S>(x));
  const Mask<S> tiny = (Mask<S>)bits < (Mask<S>)(Words<S>{} + (FRACTION_BITS<S> + 1));
  normal = choose<S>(tiny, (Vec<S>)(bits | INTEGERS_BITS<S>)-F::INTEGERS, (Vec<S>)bits);
  Parts<S> p = parts<S>(normal);
  p.e -= choose<S>(tiny, S(F::BIAS - 1 + F::MANTISSA), Vec<S>{});
  return p;
}
// log(2^e (1 + f))
template <class S>
FM_INLINE Vec<S> log_of(Vec<S> e, Vec<S> f) {
  const Vec<S> y = fma_<S>(f * f, polynomial<S>(f, LogFit<S>::C), e * ExpFit<S>::LN2_LOW);
  return fma_<S>(e, ExpFit<S>::LN2_HIGH, f + y);
}
// y, or the logarithm of an x that is not positive and finite; of zero where `size` is zero.
template <class S>
FM_INLINE Vec<S> log_or_edge(Vec<S> x, Vec<S> size, Vec<S> y) {
  constexpr S INFINITE = Format<S>::INFINITE;
  y = choose<S>(x < INFINITE, y, x);
  y = choose<S>(size == S(0), -INFINITE, y);
  return choose<S>(x < S(0), S(__builtin_nan("")), y);
}
template <class S>
FM_INLINE Vec<S> vector_log(Vec<S> x) {
  Vec<S> normal;
  const Parts<S> p = parts_of_any<S>(x, normal);
  return log_or_edge<S>(x, normal, log_of<S>(p.e, p.f));
}
// The same for x >= 0 and results in single precision.
FM_INLINE Vec<double> log_for_float(Vec<double> x) {
  constexpr double C[] = {0.10761125427665678,   -0.11359933156849032, 0.086176088824719402,
                          -0.095781377481197208, 0.11145435812486755,  -0.12526457173605943,
                          0.14284499302767778,   -0.16665924015902983, 0.20000018710244163,
                          -0.25000007211396946,  0.33333333250358027,  -0.5};
  const Parts<double> p = parts<double>(x);
  const Vec<double> y = fma_<double>(p.f * p.f, polynomial<double>(p.f, C), p.f);
  return log_or_edge<double>(x, x, fma_<double>(p.e, 0.69314718055994530942, y));
}
template <class S>
FM_INLINE Vec<S> vector_log1p(Vec<S> x) {
  using F = Format<S>;
  const Vec<S> sum = x + S(1);
  const Parts<S> p = parts<S>(sum);
  // 2^-e (1 + x) - 1 with hardly a rounding; x alone tells where it is large
  const Vec<S> scale = (Vec<S>)((Word<S>(2 * F::BIAS + 1) - p.e_biased) << F::MANTISSA);
  const Vec<S> f = choose<S>(x < F::INTEGERS, fma_<S>(x, scale, scale - S(1)), p.f);
  const Vec<S> y = log_or_edge<S>(sum, sum, log_of<S>(p.e, f));
  return choose<S>(magnitude<S>(x) < F::EPSILON / 4, x, y);
}

// ---- sin, cos

template <class S>
struct SinFit;  // SIN: (sin(r) / r - 1) / r^2, COS: (cos(r) - 1) / r^2, both in r^2, |r| <= pi / 4
// PI_2: pi / 2 in parts of so few bits that products with an integer lose nothing that matters, for
// arguments up to MOST.
template <>
struct SinFit<float> {
  static constexpr float SIN[] = {-0.000195088272f, 0.00833211094f, -0.166666538f};
  static constexpr float COS[] = {2.44313978e-05f, -0.00138873048f, 0.0416666456f, -0.5f};
#if FM_HAS_FMA
  static constexpr float PI_2[] = {0x1.921fbp0f, 0x1.5110b4p-22f, 0x1.84698ap-48f};
  static constexpr float MOST = 100000;
#else
  static constexpr float PI_2[] = {0x1.921f8p0f, 0x1.aa22p-19f, 0x1.68c2p-39f, 0x1.a62634p-58f};
  static constexpr float MOST = 100;
#endif
};
template <>
struct SinFit<double> {
  static constexpr double SIN[] = {1.589397851050896e-10,   -2.5050708907816773e-08, 2.7557313372267827e-06,
                                   -0.00019841269828864888, 0.0083333333333211971,   -0.16666666666666627};
  static constexpr double COS[] = {-1.1357317631718271e-11,
                                   2.0875677766291092e-09,
                                   -2.7557314013167766e-07,
                                   2.4801587288289884e-05,
                                   -0.001388888888887218,
                                   0.041666666666666588,
                                   -0.5};
#if FM_HAS_FMA
  static constexpr double PI_2[] = {0x1.921fb544p0, 0x1.0b4611a626331p-34, 0x1.1701b839a2520p-88};
  static constexpr double MOST = 1000000;
#else
  static constexpr double PI_2[] = {0x1.921fb544p0, 0x1.0b4611a6p-34, 0x1.3198a2ep-69,
                                    0x1.b839a252049c1p-104};
  static constexpr double MOST = 10000;
#endif
};

// y, with libm's function of x in the lanes where x is large.
template <class S, bool COS>
__attribute__((noinline, cold)) Vec<S> with_large(Vec<S> x, Vec<S> y) {
  for (int i = 0; i < lanes<S>; ++i) {
    const S a = x[i];
    if (!(a > SinFit<S>::MOST || a < -SinFit<S>::MOST)) continue;
    if constexpr (sizeof(S) == 4)
      y[i] = COS ? __builtin_cosf(a) : __builtin_sinf(a);
    else
      y[i] = COS ? __builtin_cos(a) : __builtin_sin(a);
  }
  return y;
}
template <class S, bool COS>
FM_INLINE Vec<S> sin_or_cos(Vec<S> x) {
  using Fit = SinFit<S>;
  const Vec<S> a = magnitude<S>(x);
  const Vec<S> shifted = fma_<S>(a, S(0.63661977236758134308), ROUND<S>), n = shifted - ROUND<S>;
  Vec<S> r = a;
#pragma GCC unroll 4
  for (const S part : Fit::PI_2) r = fma_<S>(n, -part, r);
  const Vec<S> z = r * r, sin = fma_<S>(r, z * polynomial<S>(z, Fit::SIN), r);
  const Vec<S> cos = fma_<S>(z, polynomial<S>(z, Fit::COS), S(1));
  // quarters of a turn; an odd one swaps sin and cos, the second and the third change the sign
  const Words<S> quarters = words<S>(shifted) + Word<S>(COS), odd = Words<S>{} - (quarters & 1);
  const Words<S> sign = (quarters << (8 * sizeof(S) - 2)) ^ (COS ? Words<S>{} : words<S>(x));
  Vec<S> y = choose<S>((Mask<S>)odd, cos, sin);
  y = (Vec<S>)(words<S>(y) ^ (sign & SIGN_BIT<S>));
  if (__builtin_expect(any(a > Fit::MOST), 0)) y = with_large<S, COS>(x, y);
  return y;
}

// ---- erf

template <class S>
struct ErfFit;  // NEAR: erf(x) / x - 1 in x^2 for |x| <= LIMIT; FAR: log(1 - erf(x)) / x up to MOST
template <>
struct ErfFit<float> {
  static constexpr float NEAR[] = {-0.000607487338f, 0.00500861555f, -0.0267763212f,
                                   0.112820558f,     -0.376125127f,  0.128379151f};
  static constexpr float FAR[] = {-1.08466656e-05f, 0.000318836712f, -0.0036257999f, 0.0237256568f,
                                  -0.106193244f,    -0.635178506f,   -1.12864161f};
  static constexpr float LIMIT = 0.9f, MOST = 4;
};
template <>
struct ErfFit<double> {
  static constexpr double NEAR[] = {-7.7491009620327076e-10, 1.369358082744756e-08,   -1.6201983765562241e-07,
                                    1.6446518299088286e-06,  -1.4924657884137304e-05, 0.00012055290439116305,
                                    -0.0008548325811326364,  0.0052239776032931935,   -0.026866170642704371,
                                    0.11283791670941026,     -0.37612638903183415,    0.12837916709551256};
  static constexpr double FAR[] = {1.5092182714389878e-12,  -6.7059445851505211e-11, 1.3951805072117538e-09,
                                   -1.8047669259173604e-08, 1.6236753794128337e-07,  -1.0743372190318047e-06,
                                   5.3686711162170782e-06,  -2.0295365246629319e-05, 5.5890460121141487e-05,
                                   -9.517843645986577e-05,  4.702033495128138e-07,   0.00057530564314382804,
                                   -0.0016932493172239346,  0.0002125180258132043,   0.019124700122256762,
                                   -0.10277072686792349,    -0.63662027605554794,    -1.128379108328927};
  static constexpr double LIMIT = 1, MOST = 6;
};
template <class S>
FM_INLINE Vec<S> vector_erf(Vec<S> x) {
  using Fit = ErfFit<S>;
  const Vec<S> a = magnitude<S>(x), b = at_most<S>(a, Fit::MOST);
  const Vec<S> near = fma_<S>(a, polynomial<S>(a * a, Fit::NEAR), a);
  const Power<S> p = power<S>(b * polynomial<S>(b, Fit::FAR));
  const Vec<S> s = two_to<S>(p.n), far = fma_<S>(-s, p.m, S(1) - s);
  return with_sign<S>(choose<S>(a < Fit::LIMIT, near, far), x);
}

// ---- pow

// atanh(s) / s - 1 - s^2 / 3 = s^4 R(s^2) for |s| <= 0.2
constexpr double ATANH_FIT[] = {0.063194535616405048, 0.057906129411267028, 0.066709489067220781,
                                0.07692189881475682,  0.090909110334373891, 0.11111111092601933,
                                0.14285714285805676,  0.19999999999999826};

// The natural logarithm of x = 2^e (1 + f) in twice the precision.
FM_INLINE Twofold<double> twofold_log(Vec<double> e, Vec<double> f) {
  using V = Vec<double>;
  // s = f / (2 + f), and log(1 + f) = 2 atanh(s)
  const Twofold<double> d = exact_sum<double>(broadcast(2.0), f);
  const V inverse = 1.0 / d.high, s = f * inverse;
  const Twofold<double> sd = exact_product<double>(s, d.high);
  const V s_low = fma_<double>(-s, d.low, (f - sd.high) - sd.low) * inverse;
  const Twofold<double> z = exact_product<double>(s, s);
  const V z_low = fma_<double>(2.0 * s, s_low, z.low);
  // p = 1/3 + z R, then log(1 + f) = 2 (s + s z p)
  const V r = polynomial<double>(z.high, ATANH_FIT);
  Twofold<double> p = exact_sum<double>(broadcast(0x1.5555555555555p-2), z.high * r);
  p.low = fma_<double>(z_low, r, p.low + 0x1.5555555555555p-56);
  Twofold<double> w = exact_product<double>(z.high, p.high);
  w.low = fma_<double>(z.high, p.low, fma_<double>(z_low, p.high, w.low));
  Twofold<double> v = exact_product<double>(s, w.high);
  v.low = fma_<double>(s, w.low, fma_<double>(s_low, w.high, v.low));
  Twofold<double> half = exact_sum<double>(s, v.high);
  half.low += s_low + v.low;
  Twofold<double> y = exact_sum<double>(e * ExpFit<double>::LN2_HIGH, 2.0 * half.high);
  y.low = fma_<double>(e, ExpFit<double>::LN2_LOW, fma_<double>(half.low, 2.0, y.low));
  return y;
}
// exp(y log(x)) for x >= 0; NaN where that is 0 * infinity.
FM_INLINE Vec<double> power_of_positive(Vec<double> x, Vec<double> y) {
  using Fit = ExpFit<double>;
  Vec<double> normal;
  const Parts<double> at = parts_of_any<double>(x, normal);
  const Twofold<double> log = twofold_log(at.e, at.f);
  const Twofold<double> t = exact_product<double>(y, log.high);
  const Mask<double> finite = (normal > 0.0) & (normal < Format<double>::INFINITE);
  const Vec<double> edge = choose<double>(normal == 0.0, -Format<double>::INFINITE, x) * y;
  const Vec<double> all = choose<double>(finite, t.high, edge);
  const Mask<double> usual = finite & (magnitude<double>(all) < 1000.0);
  const Vec<double> low = choose<double>(usual, fma_<double>(y, log.low, t.low), Vec<double>{});
  return scaled<double>(power<double>(clamp<double>(all, Fit::LEAST, Fit::MOST), low));
}
FM_INLINE Vec<float> power_of_positive(Vec<float> x, Vec<float> y) {
  return in_double([](Vec<double> v, Vec<double> w)
                       FM_INLINE_LAMBDA { return exp_for_float(w * log_for_float(v)); },
                   x, y);
}
template <class S>
FM_INLINE Mask<S> is_integer(Vec<S> x) {
  const Vec<S> a = magnitude<S>(x);
  return (a >= Format<S>::INTEGERS) | ((a + Format<S>::INTEGERS) - Format<S>::INTEGERS == a);
}
template <class S>
FM_INLINE Vec<S> vector_pow(Vec<S> x, Vec<S> y) {
  const Vec<S> a = magnitude<S>(x);
  const Mask<S> integer = is_integer<S>(y), odd = integer & ~is_integer<S>(y * S(0.5));
  Vec<S> p = power_of_positive(a, y);
  p = choose<S>((a == S(1)) & (y == y), S(1), p);
  p = choose<S>((x < S(0)) & (a < Format<S>::INFINITE) & ~integer, S(__builtin_nan("")), p);
  p = (Vec<S>)(words<S>(p) ^ (words<S>(x) & (Words<S>)odd & SIGN_BIT<S>));
  return choose<S>((x == S(1)) | (y == S(0)), S(1), p);
}

#define FM_VECTOR_FUNCTION(name)                                                 \
  FM_INLINE Vec<float> name##_(Vec<float> x) { return vector_##name<float>(x); } \
  FM_INLINE Vec<double> name##_(Vec<double> x) { return vector_##name<double>(x); }
FM_VECTOR_FUNCTION(exp)
FM_VECTOR_FUNCTION(expm1)
FM_VECTOR_FUNCTION(log)
FM_VECTOR_FUNCTION(log1p)
FM_VECTOR_FUNCTION(tanh)
FM_VECTOR_FUNCTION(sigmoid)
FM_VECTOR_FUNCTION(erf)
#undef FM_VECTOR_FUNCTION
FM_INLINE Vec<float> sin_(Vec<float> x) { return sin_or_cos<float, false>(x); }
FM_INLINE Vec<double> sin_(Vec<double> x) { return sin_or_cos<double, false>(x); }
FM_INLINE Vec<float> cos_(Vec<float> x) { return sin_or_cos<float, true>(x); }
FM_INLINE Vec<double> cos_(Vec<double> x) { return sin_or_cos<double, true>(x); }
FM_INLINE Vec<float> pow_(Vec<float> x, Vec<float> y) { return vector_pow<float>(x, y); }
FM_INLINE Vec<double> pow_(Vec<double> x, Vec<double> y) { return vector_pow<double>(x, y); }
