// Element-wise layers: y = f(x) and its first two derivatives, in the four functions of a layer kind.
//
//   forward           y   = f(x)
//   backward          dx  = dy f'(x)
//   tangent           ry  = rx f'(x)
//   tangent_backward  rdx = rdy f'(x) + dy f''(x) rx
//
// Conventions at kinks are PyTorch's: relu'(0) = 0.

FM_INLINE float exp_(float x) { return __builtin_expf(x); }
FM_INLINE double exp_(double x) { return __builtin_exp(x); }
FM_INLINE float expm1_(float x) { return __builtin_expm1f(x); }
FM_INLINE double expm1_(double x) { return __builtin_expm1(x); }
FM_INLINE float log1p_(float x) { return __builtin_log1pf(x); }
FM_INLINE double log1p_(double x) { return __builtin_log1p(x); }
FM_INLINE float log_(float x) { return __builtin_logf(x); }
FM_INLINE double log_(double x) { return __builtin_log(x); }
FM_INLINE float tanh_(float x) { return __builtin_tanhf(x); }
FM_INLINE double tanh_(double x) { return __builtin_tanh(x); }
FM_INLINE float erf_(float x) { return __builtin_erff(x); }
FM_INLINE double erf_(double x) { return __builtin_erf(x); }
FM_INLINE float sin_(float x) { return __builtin_sinf(x); }
FM_INLINE double sin_(double x) { return __builtin_sin(x); }
FM_INLINE float sqrt_(float x) { return __builtin_sqrtf(x); }
FM_INLINE double sqrt_(double x) { return __builtin_sqrt(x); }
FM_INLINE float cos_(float x) { return __builtin_cosf(x); }
FM_INLINE double cos_(double x) { return __builtin_cos(x); }

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

// Calls body(f) with the function object that `e` names.
template <class S, class Body>
FM_INLINE void with_function(const Elementwise<S>& e, const Body& body) {
  switch (e.function) {
    case Function::relu:
      return body(Relu<S>{e.c0, e.c1});
    case Function::leaky_relu:
      return body(LeakyRelu<S>{e.c0, e.c1});
    case Function::elu:
      return body(Elu<S>{e.c0, e.c1});
    case Function::gelu:
      return body(Gelu<S>{e.c0, e.c1});
    case Function::gelu_tanh:
      return body(GeluTanh<S>{e.c0, e.c1});
    case Function::silu:
      return body(Silu<S>{e.c0, e.c1});
    case Function::tanh:
      return body(Tanh<S>{e.c0, e.c1});
    case Function::sigmoid:
      return body(Sigmoid<S>{e.c0, e.c1});
    case Function::softplus:
      return body(Softplus<S>{e.c0, e.c1});
    case Function::sin:
      return body(Sin<S>{e.c0, e.c1});
    case Function::affine:
      return body(Affine<S>{e.c0, e.c1});
    case Function::adaptive:  // of no element-wise layer
      return;
  }
}

// out[r, c] (+)= element(row offset in x, row offset elsewhere, c); padding columns of out become zero.
template <class S, class Element>
FM_INLINE void for_each(const Elementwise<S>& e, i64 ld_out, const Element& element) {
  for (i64 r = 0; r < e.rows; ++r) {
    S* out = e.out + r * ld_out;
    const i64 at_x = r * e.ld_x, at = r * e.ld;
    if (e.accumulate)
      for (i64 c = 0; c < e.cols; ++c) out[c] += element(at_x + c, at + c);
    else
      for (i64 c = 0; c < e.cols; ++c) out[c] = element(at_x + c, at + c);
    for (i64 c = e.cols; c < ld_out; ++c) out[c] = 0;
  }
}

template <class S>
void elementwise_forward(const Elementwise<S>& e) {
  with_function(e, [&](auto f) { for_each(e, e.ld, [&](i64 i, i64) { return f.value(e.x[i]); }); });
}
template <class S>
void elementwise_backward(const Elementwise<S>& e) {
  with_function(e, [&](auto f) {
    for_each(e, e.ld, [&](i64 i, i64 j) {
      S d1, d2;
      f.derivatives(e.x[i], e.y[j], d1, d2);
      return e.dy[j] * d1;
    });
  });
}
template <class S>
void elementwise_tangent(const Elementwise<S>& e) {
  with_function(e, [&](auto f) {
    for_each(e, e.ld, [&](i64 i, i64 j) {
      S d1, d2;
      f.derivatives(e.x[i], e.y[j], d1, d2);
      return e.rx[j] * d1;
    });
  });
}
template <class F>
constexpr bool LINEAR_PIECES = false;
template <class S>
constexpr bool LINEAR_PIECES<Relu<S>> = true;
template <class S>
constexpr bool LINEAR_PIECES<LeakyRelu<S>> = true;
template <class S>
constexpr bool LINEAR_PIECES<Affine<S>> = true;

template <class S>
void elementwise_tangent_backward(const Elementwise<S>& e) {
  with_function(e, [&](auto f) {
    for_each(e, e.ld, [&](i64 i, i64 j) {
      S d1, d2;
      f.derivatives(e.x[i], e.y[j], d1, d2);
      if constexpr (LINEAR_PIECES<decltype(f)>) return e.rdy[j] * d1;
      return e.rdy[j] * d1 + (e.rx ? e.dy[j] * d2 * e.rx[j] : S(0));
    });
  });
}
