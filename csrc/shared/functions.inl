// The element-wise functions with their first two derivatives, for every kernel: included inside a
// namespace of the including file, which defines FM_INLINE. Conventions at kinks are PyTorch's:
// relu'(0) = 0.

#ifdef __CUDACC__
#define FM_MATH(name) name
#else
#define FM_MATH(name) __builtin_##name
#endif

FM_INLINE float exp_(float x) { return FM_MATH(expf)(x); }
FM_INLINE double exp_(double x) { return FM_MATH(exp)(x); }
FM_INLINE float expm1_(float x) { return FM_MATH(expm1f)(x); }
FM_INLINE double expm1_(double x) { return FM_MATH(expm1)(x); }
FM_INLINE float log1p_(float x) { return FM_MATH(log1pf)(x); }
FM_INLINE double log1p_(double x) { return FM_MATH(log1p)(x); }
FM_INLINE float log_(float x) { return FM_MATH(logf)(x); }
FM_INLINE double log_(double x) { return FM_MATH(log)(x); }
FM_INLINE float tanh_(float x) { return FM_MATH(tanhf)(x); }
FM_INLINE double tanh_(double x) { return FM_MATH(tanh)(x); }
FM_INLINE float erf_(float x) { return FM_MATH(erff)(x); }
FM_INLINE double erf_(double x) { return FM_MATH(erf)(x); }
FM_INLINE float sin_(float x) { return FM_MATH(sinf)(x); }
FM_INLINE double sin_(double x) { return FM_MATH(sin)(x); }
FM_INLINE float sqrt_(float x) { return FM_MATH(sqrtf)(x); }
FM_INLINE double sqrt_(double x) { return FM_MATH(sqrt)(x); }
FM_INLINE float cos_(float x) { return FM_MATH(cosf)(x); }
FM_INLINE double cos_(double x) { return FM_MATH(cos)(x); }

template <class S>
FM_INLINE S sigmoid_(S x) {
  return S(1) / (S(1) + exp_(-x));
}

// value(x), and derivatives(x, y, d1, d2) with y = value(x) at hand.
template <class S>
struct Relu {
  S c0, c1;
  FM_INLINE S value(S x) const { return x < 0 ? S(0) : x; }
  FM_INLINE void derivatives(S x, S, S& d1, S& d2) const { d1 = x > 0 ? S(1) : S(0), d2 = 0; }
};
template <class S>
struct LeakyRelu {
  S slope, c1;
  FM_INLINE S value(S x) const { return x > 0 ? x : slope * x; }
  FM_INLINE void derivatives(S x, S, S& d1, S& d2) const { d1 = x > 0 ? S(1) : slope, d2 = 0; }
};
template <class S>
struct Elu {
  S alpha, c1;
  FM_INLINE S value(S x) const { return x > 0 ? x : alpha * expm1_(x); }
  FM_INLINE void derivatives(S x, S, S& d1, S& d2) const {
    const S e = x > 0 ? S(0) : alpha * exp_(x);
    d1 = x > 0 ? S(1) : e, d2 = e;
  }
};
template <class S>
struct Gelu {
  S c0, c1;
  FM_INLINE S cdf(S x) const { return S(0.5) * (S(1) + erf_(x * S(0.70710678118654752440))); }
  FM_INLINE S value(S x) const { return x * cdf(x); }
  FM_INLINE void derivatives(S x, S, S& d1, S& d2) const {
    const S density = S(0.39894228040143267794) * exp_(S(-0.5) * x * x);
    d1 = cdf(x) + x * density, d2 = density * (S(2) - x * x);
  }
};
template <class S>
struct GeluTanh {
  S c0, c1;
  FM_INLINE S inner(S x) const { return S(0.79788456080286535588) * (x + S(0.044715) * x * x * x); }
  FM_INLINE S value(S x) const { return S(0.5) * x * (S(1) + tanh_(inner(x))); }
  FM_INLINE void derivatives(S x, S, S& d1, S& d2) const {
    const S t = tanh_(inner(x)), s = S(1) - t * t;
    const S du = S(0.79788456080286535588) * (S(1) + S(3 * 0.044715) * x * x);
    const S ddu = S(0.79788456080286535588 * 6 * 0.044715) * x;
    d1 = S(0.5) * (S(1) + t + x * s * du);
    d2 = s * du + S(0.5) * x * s * (ddu - S(2) * t * du * du);
  }
};
template <class S>
struct Silu {
  S c0, c1;
  FM_INLINE S value(S x) const { return x * sigmoid_(x); }
  FM_INLINE void derivatives(S x, S, S& d1, S& d2) const {
    const S s = sigmoid_(x);
    d1 = s * (S(1) + x * (S(1) - s)), d2 = s * (S(1) - s) * (S(2) + x * (S(1) - S(2) * s));
  }
};
template <class S>
struct Mish {
  S c0, c1;
  // With q = exp(-|x|), which does not overflow: tanh(softplus(x)) = m / n.
  FM_INLINE void ratio(S x, S& q, S& m, S& n) const {
    q = exp_(x < 0 ? x : -x);
    m = x < 0 ? q * (q + S(2)) : S(1) + S(2) * q, n = m + S(2) * (x < 0 ? S(1) : q * q);
  }
  FM_INLINE S value(S x) const {
    S q, m, n;
    ratio(x, q, m, n);
    return x * (m / n);
  }
  FM_INLINE void derivatives(S x, S, S& d1, S& d2) const {
    S q, m, n;
    ratio(x, q, m, n);
    const S t = m / n, s = (x < 0 ? q : S(1)) / (S(1) + q);
    const S h = S(2) * (x < 0 ? S(1) : q) * (S(1) + q) / n;  // h h = 1 - t t
    const S p = h * h * s, xp = x * p;
    d1 = t + xp, d2 = S(2) * p + xp * (S(1) - s - S(2) * t * s);
  }
};
template <class S>
struct Tanh {
  S c0, c1;
  FM_INLINE S value(S x) const { return tanh_(x); }
  FM_INLINE void derivatives(S, S y, S& d1, S& d2) const { d1 = S(1) - y * y, d2 = S(-2) * y * d1; }
};
template <class S>
struct Sigmoid {
  S c0, c1;
  FM_INLINE S value(S x) const { return sigmoid_(x); }
  FM_INLINE void derivatives(S, S y, S& d1, S& d2) const { d1 = y * (S(1) - y), d2 = d1 * (S(1) - S(2) * y); }
};
template <class S>
struct Softplus {
  S beta, threshold;
  FM_INLINE S value(S x) const { return x * beta > threshold ? x : log1p_(exp_(x * beta)) / beta; }
  FM_INLINE void derivatives(S x, S, S& d1, S& d2) const {
    const S s = sigmoid_(x * beta);
    const bool linear = x * beta > threshold;
    d1 = linear ? S(1) : s, d2 = linear ? S(0) : beta * s * (S(1) - s);
  }
};
template <class S>
struct Sin {
  S c0, c1;
  FM_INLINE S value(S x) const { return sin_(x); }
  FM_INLINE void derivatives(S x, S y, S& d1, S& d2) const { d1 = cos_(x), d2 = -y; }
};
template <class S>
struct Affine {
  S scale, shift;
  FM_INLINE S value(S x) const { return scale * x + shift; }
  FM_INLINE void derivatives(S, S, S& d1, S& d2) const { d1 = scale, d2 = 0; }
};

// Functions whose second derivative is zero wherever it exists.
template <class F>
constexpr bool LINEAR_PIECES = false;
template <class S>
constexpr bool LINEAR_PIECES<Relu<S>> = true;
template <class S>
constexpr bool LINEAR_PIECES<LeakyRelu<S>> = true;
template <class S>
constexpr bool LINEAR_PIECES<Affine<S>> = true;
