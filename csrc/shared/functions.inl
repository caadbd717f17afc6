// The element-wise functions with their first two derivatives, for every kernel: included inside a
// namespace of the including file, which defines FM_INLINE. Conventions at kinks are PyTorch's:
// relu'(0) = 0.
//
// S is float or double. A formula takes a V, which is S or a vector of S: what it calls stands here
// for a number, and in cpu/vector_math.inl, included before, for a vector.

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
FM_INLINE float abs_(float x) { return FM_MATH(fabsf)(x); }
FM_INLINE double abs_(double x) { return FM_MATH(fabs)(x); }

// `yes` where the condition holds; both are computed.
FM_INLINE float select_(bool condition, float yes, float no) { return condition ? yes : no; }
FM_INLINE double select_(bool condition, double yes, double no) { return condition ? yes : no; }

// sigmoid(x) = top / bottom
template <class S>
FM_INLINE void logistic_(S x, S& top, S& bottom) {
  top = S(1), bottom = S(1) + exp_(-x);
}
template <class S>
FM_INLINE S sigmoid_(S x) {
  return S(1) / (S(1) + exp_(-x));
}
template <class S>
FM_INLINE S gelu_(S x) {
  return x * (S(0.5) * (S(1) + erf_(x * S(0.70710678118654752440))));
}
// x (1 + tanh(u / 2)) / 2 = x sigmoid(u) with u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
template <class S>
FM_INLINE S gelu_tanh_(S x) {
  return x * sigmoid_(S(2 * 0.79788456080286535588) * (x + S(0.044715) * x * x * x));
}
// x tanh(log(1 + exp(x))): with q = exp(-|x|), which does not overflow, it is x m / n.
template <class S>
FM_INLINE S mish_(S x) {
  const S q = exp_(-abs_(x)), m = x < 0 ? q * (q + S(2)) : S(1) + S(2) * q;
  return x * (m / (m + S(2) * (x < 0 ? S(1) : q * q)));
}

// value(x), and derivatives(x, y, d1, d2) with y = value(x) at hand.
template <class S>
struct Relu {
  S c0, c1;
  template <class V>
  FM_INLINE V value(V x) const {
    return select_(x < S(0), S(0), x);
  }
  template <class V>
  FM_INLINE void derivatives(V x, V, V& d1, V& d2) const {
    d1 = select_(x > S(0), S(1), S(0)), d2 = V{};
  }
};
template <class S>
struct LeakyRelu {
  S slope, c1;
  template <class V>
  FM_INLINE V value(V x) const {
    return select_(x > S(0), x, slope * x);
  }
  template <class V>
  FM_INLINE void derivatives(V x, V, V& d1, V& d2) const {
    d1 = select_(x > S(0), S(1), slope), d2 = V{};
  }
};
template <class S>
struct Elu {
  S alpha, c1;
  template <class V>
  FM_INLINE V value(V x) const {
    return select_(x > S(0), x, alpha * expm1_(x));
  }
  template <class V>
  FM_INLINE void derivatives(V x, V, V& d1, V& d2) const {
    const V e = alpha * exp_(x);
    d1 = select_(x > S(0), S(1), e), d2 = select_(x > S(0), S(0), e);
  }
};
template <class S>
struct Gelu {
  S c0, c1;
  template <class V>
  FM_INLINE V value(V x) const {
    return gelu_(x);
  }
  template <class V>
  FM_INLINE void derivatives(V x, V, V& d1, V& d2) const {
    const V density = S(0.39894228040143267794) * exp_(S(-0.5) * x * x);
    const V cdf = S(0.5) + S(0.5) * erf_(x * S(0.70710678118654752440));
    d1 = cdf + x * density, d2 = density * (S(2) - x * x);
  }
};
template <class S>
struct GeluTanh {
  S c0, c1;
  template <class V>
  FM_INLINE V value(V x) const {
    return gelu_tanh_(x);
  }
  template <class V>
  FM_INLINE void derivatives(V x, V, V& d1, V& d2) const {
    const V u = S(2 * 0.79788456080286535588) * (x + S(0.044715) * x * x * x);
    const V du = S(2 * 0.79788456080286535588) * (S(1) + S(3 * 0.044715) * x * x);
    const V ddu = S(2 * 0.79788456080286535588 * 6 * 0.044715) * x;
    const V s = sigmoid_(u), ds = s * (S(1) - s);
    d1 = s + x * ds * du;
    d2 = S(2) * ds * du + x * ds * (ddu + (S(1) - S(2) * s) * du * du);
  }
};
template <class S>
struct Silu {
  S c0, c1;
  template <class V>
  FM_INLINE V value(V x) const {
    V top, bottom;
    logistic_(x, top, bottom);
    return x * top / bottom;
  }
  template <class V>
  FM_INLINE void derivatives(V x, V, V& d1, V& d2) const {
    const V s = sigmoid_(x);
    d1 = s * (S(1) + x * (S(1) - s)), d2 = s * (S(1) - s) * (S(2) + x * (S(1) - S(2) * s));
  }
};
template <class S>
struct Mish {
  S c0, c1;
  template <class V>
  FM_INLINE V value(V x) const {
    return mish_(x);
  }
  template <class V>
  FM_INLINE void derivatives(V x, V, V& d1, V& d2) const {
    const V q = exp_(-abs_(x)), below = select_(x < S(0), S(1), q), above = select_(x < S(0), q, S(1));
    const V m = above * (above + S(2) * below), n = m + S(2) * below * below;  // as in mish_
    const V t = m / n, s = above / (S(1) + q);
    const V h = S(2) * below * (S(1) + q) / n;  // h h = 1 - t t
    const V p = h * h * s, xp = x * p;
    d1 = t + xp, d2 = S(2) * p + xp * (S(1) - s - S(2) * t * s);
  }
};
template <class S>
struct Tanh {
  S c0, c1;
  template <class V>
  FM_INLINE V value(V x) const {
    return tanh_(x);
  }
  template <class V>
  FM_INLINE void derivatives(V, V y, V& d1, V& d2) const {
    d1 = S(1) - y * y, d2 = S(-2) * y * d1;
  }
};
template <class S>
struct Sigmoid {
  S c0, c1;
  template <class V>
  FM_INLINE V value(V x) const {
    return sigmoid_(x);
  }
  template <class V>
  FM_INLINE void derivatives(V, V y, V& d1, V& d2) const {
    d1 = y * (S(1) - y), d2 = d1 * (S(1) - S(2) * y);
  }
};
template <class S>
struct Softplus {
  S beta, threshold;
  template <class V>
  FM_INLINE V value(V x) const {
    const V z = x * beta, positive = select_(z > S(0), z, S(0));
    return select_(z > threshold, x, (positive + log1p_(exp_(-abs_(z)))) / beta);
  }
  template <class V>
  FM_INLINE void derivatives(V x, V, V& d1, V& d2) const {
    const V z = x * beta, s = sigmoid_(z);
    d1 = select_(z > threshold, S(1), s), d2 = select_(z > threshold, S(0), beta * s * (S(1) - s));
  }
};
template <class S>
struct Sin {
  S c0, c1;
  template <class V>
  FM_INLINE V value(V x) const {
    return sin_(x);
  }
  template <class V>
  FM_INLINE void derivatives(V x, V y, V& d1, V& d2) const {
    d1 = cos_(x), d2 = -y;
  }
};
template <class S>
struct Affine {
  S scale, shift;
  template <class V>
  FM_INLINE V value(V x) const {
    return scale * x + shift;
  }
  template <class V>
  FM_INLINE void derivatives(V, V, V& d1, V& d2) const {
    d1 = V{} + scale, d2 = V{};
  }
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
