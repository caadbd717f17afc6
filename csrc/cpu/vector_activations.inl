// What shared/functions.inl asks of a vector besides elementary functions. Included after
// vector_math.inl and before it.
//
// Where a formula in plain arithmetic would miss 2 units in the last place, single precision is
// computed in double, and double in twofold numbers.

#define FM_SELECT(S)                                                                                    \
  FM_INLINE Vec<S> select_(Mask<S> mask, Vec<S> yes, Vec<S> no) { return mask ? yes : no; }             \
  FM_INLINE Vec<S> select_(Mask<S> mask, Vec<S> yes, S no) { return mask ? yes : broadcast(no); }       \
  FM_INLINE Vec<S> select_(Mask<S> mask, S yes, Vec<S> no) { return mask ? broadcast(yes) : no; }       \
  FM_INLINE Vec<S> select_(Mask<S> mask, S yes, S no) { return mask ? broadcast(yes) : broadcast(no); } \
  FM_INLINE Vec<S> abs_(Vec<S> x) { return magnitude<S>(x); }                                           \
  FM_INLINE void logistic_(Vec<S> x, Vec<S>& top, Vec<S>& bottom) {                                     \
    const Fraction<S> f = logistic<S>(x);                                                               \
    top = f.top, bottom = f.bottom;                                                                     \
  }
FM_SELECT(float)
FM_SELECT(double)
#undef FM_SELECT

template <class S>
FM_INLINE Twofold<S> operator+(Twofold<S> a, Twofold<S> b) {
  Twofold<S> sum = exact_sum_of_any<S>(a.high, b.high);
  sum.low += a.low + b.low;
  return sum;
}
template <class S>
FM_INLINE Twofold<S> operator*(Twofold<S> a, Twofold<S> b) {
  Twofold<S> product = exact_product<S>(a.high, b.high);
  product.low = fma_<S>(a.high, b.low, fma_<S>(a.low, b.high, product.low));
  return product;
}
template <class S>
FM_INLINE Vec<S> operator/(Twofold<S> a, Twofold<S> b) {
  const Vec<S> quotient = a.high / b.high;
  const Twofold<S> product = exact_product<S>(quotient, b.high);
  const Vec<S> rest = ((a.high - product.high) - product.low) + a.low;
  return quotient + fma_<S>(-quotient, b.low, rest) / b.high;
}
template <class S>
FM_INLINE Twofold<S> twofold(Vec<S> x) {
  return {x, Vec<S>{}};
}
template <class S>
FM_INLINE Twofold<S> number(S high, S low = 0) {
  return {broadcast(high), broadcast(low)};
}

// (1 + B t) exp(t^2 / 2) / 2 erfc(t / sqrt(2)) in (t - A) / (t + A) for 0 <= t <= MOST, in double
// for results in S.
template <class S>
struct NormalFit;
template <>
struct NormalFit<float> {
  static constexpr double C[] = {-7.1436261000507555e-05, -6.0065216077156962e-05, 0.00069319623368907101,
                                 -0.00030391027063711727, -0.0050045946748492947,  0.017940190260075314,
                                 -0.032197234763145385,   0.028599985953317027,    0.013999594549875255,
                                 -0.096703467164508145,   0.4720532068678156};
  static constexpr double A = 4, B = 1, MOST = 14.5;
};
template <>
struct NormalFit<double> {
  static constexpr double C[] = {
      -2.1800256748974274e-10, -6.6948990148746355e-11, 3.1147700531701821e-09, 2.5332068457350481e-09,
      -2.2092711800362774e-08, -2.1598775851538274e-08, 1.3808075684031732e-07, 1.1455238010156287e-07,
      -9.2039438062219933e-07, -2.2125998251468895e-07, 6.4777099868693788e-06, -5.7610320606297464e-06,
      -3.9965483815187587e-05, 0.00012164374444821621,  3.9412935640122462e-05, -0.0012021665735068251,
      0.0042967894082223436,   -0.0091299689144219796,  0.012549247311079348,   -0.0078369441536734474,
      -0.012719205027117677,   0.052289979290973197,    -0.1045286001915097};
  static constexpr double LAST = 0.3653666986312799,
                          LAST_LOW = -1.8027729477603704e-18;  // the coefficient after them
  static constexpr double A = 5, B = 0.75, MOST = 38.7;
};
// gelu(x) is x - |x| Phi(-|x|) for x > 0, and -|x| Phi(-|x|) for others.
FM_INLINE Vec<double> gelu_from(Vec<double> x, Vec<double> negative) {
  const Mask<double> below = (x < 0.0) & (x > -Format<double>::INFINITE);
  return select_(x > 0.0, x + negative, select_(below, negative, x * 0.0));
}
FM_INLINE Vec<double> gelu_for_float(Vec<double> x) {
  using Fit = NormalFit<float>;
  const Vec<double> t = at_most<double>(magnitude<double>(x), Fit::MOST);
  const Vec<double> a = t + Fit::A, b = fma_<double>(t, Fit::B, 1.0),
                    inverse = 1.0 / (a * b);  // one division for two
  const Vec<double> p = polynomial<double>((t - Fit::A) * b * inverse, Fit::C) * a * inverse;
  return gelu_from(x, -t * p * exp_for_float(-0.5 * t * t));
}
FM_INLINE Vec<double> gelu_(Vec<double> x) {
  using Fit = NormalFit<double>;
  const Vec<double> t = at_most<double>(magnitude<double>(x), Fit::MOST), w = (t - Fit::A) / (t + Fit::A);
  Twofold<double> p = exact_sum<double>(broadcast(Fit::LAST), w * polynomial<double>(w, Fit::C));
  p.low += Fit::LAST_LOW;
  const Twofold<double> square = exact_product<double>(t, t);
  const Power<double> e = power<double>(-0.5 * square.high, -0.5 * square.low);
  const Twofold<double> one_and_m = exact_sum<double>(broadcast(1.0), e.m);
  const Twofold<double> bottom = number(1.0) + exact_product<double>(t, broadcast(Fit::B));
  const Vec<double> y = twofold<double>(-t) * p * one_and_m / bottom;
  const Words<double> half = e.n >> 1;
  return gelu_from(x, y * two_to<double>(half) * two_to<double>(e.n - half));
}
FM_INLINE Vec<float> gelu_(Vec<float> x) {
  return in_double([](Vec<double> v) FM_INLINE_LAMBDA { return gelu_for_float(v); }, x);
}

// With q = exp(-|x|) and b = 2 + q: mish(x) = x q b / (2 + q b) for x < 0, and
// x (1 + 2 q) / (1 + q b + q q) for others.
FM_INLINE Vec<double> mish_for_float(Vec<double> x) {
  const Vec<double> q = select_(x < -300.0, 0.0, exp_for_float(-magnitude<double>(x)));
  const Mask<double> negative = x < 0.0;
  const Vec<double> top = select_(negative, q * (q + 2.0), fma_<double>(q, 2.0, 1.0));
  return x * top / fma_<double>(select_(negative, 1.0, q * q), 2.0, top);
}
FM_INLINE Vec<double> mish_(Vec<double> x) {
  const Vec<double> t = at_most<double>(magnitude<double>(x), 760.0) + 0.0 * x;  // NaN of infinity
  const Power<double> e = power<double>(-t);
  const Words<double> half = e.n >> 1;
  const Vec<double> first = two_to<double>(half), second = two_to<double>(e.n - half), s = first * second;
  const Twofold<double> p = exact_sum<double>(broadcast(1.0), e.m), q = {s * p.high, s * p.low};
  const Twofold<double> one = number(1.0), two = number(2.0), b = two + q, pb = p * b;
  const Twofold<double> qb = {s * pb.high, s * pb.low};
  const Vec<double> positive = twofold<double>(x) * (one + q + q) / (one + qb + q * q);
  const Vec<double> negative = twofold<double>(-t) * pb / (two + qb) * first * second;
  return select_((x > 40.0) | (x == 0.0), x, select_(x < 0.0, negative, positive));
}
FM_INLINE Vec<float> mish_(Vec<float> x) {
  return in_double([](Vec<double> v) FM_INLINE_LAMBDA { return mish_for_float(v); }, x);
}

// x sigmoid(u) with u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
template <class S>
FM_INLINE Vec<S> gelu_tanh_of(Vec<S> x, Twofold<S> c1, Twofold<S> c3) {
  const Vec<S> a = clamp<S>(x, S(-40), S(40));
  const Twofold<S> u = twofold<S>(a) * (c1 + c3 * exact_product<S>(a, a));
  const Fraction<S> f = logistic<S>(u.high, u.low);
  return x * f.top / f.bottom;
}
FM_INLINE Vec<float> gelu_tanh_(Vec<float> x) {
  return gelu_tanh_of<float>(x, number(1.59576917f, -4.53406805e-08f),
                             number(0.0713548139f, 2.39883247e-09f));
}
FM_INLINE Vec<double> gelu_tanh_(Vec<double> x) {
  return gelu_tanh_of<double>(x, number(1.5957691216057308, -9.9693088091109202e-17),
                              number(0.071354816272600249, -6.175149918155315e-19));
}
