// Element-wise layers: y = f(x) and its first two derivatives, in the four functions of a layer
// kind.
//
//   forward           y   = f(x)
//   backward          dx  = dy f'(x)
//   tangent           ry  = rx f'(x)
//   tangent_backward  rdx = rdy f'(x) + dy f''(x) rx
//
// The functions themselves: shared/functions.inl.

// Calls body(f) with the function object that `e` names.
template <class S, class Body>
FM_INLINE void with_function(const Elementwise<S>& e, const Body& body) {
#define FM_CASE(name, Formula) \
  case Function::name:         \
    return body(Formula<S>{e.c0, e.c1});
  switch (e.function) {
    FM_FUNCTIONS(FM_CASE)
    case Function::none:  // which a plan does not take
      break;
  }
#undef FM_CASE
  __builtin_trap();
}

// out[r, c] (+)= element(x, place of the row's vector elsewhere) for every vector x of the input;
// padding columns of out become zero. Rows of x may lie closer than those of the rest: what is read
// after the last column is then not x's, but it never reaches out.
template <class S, class Element>
FM_INLINE void for_each(const Elementwise<S>& e, const Element& element) {
  const i64 whole = e.cols / lanes<S> * lanes<S>, rest = e.cols - whole;
  const Mask<S> inside = first_lanes<S>(rest);
  const bool loose = e.ld_x < whole + lanes<S>;
  for (i64 r = 0; r < e.rows; ++r) {
    S* const out = e.out + r * e.ld;
    const S* const x = e.x + r * e.ld_x;
    for (i64 c = 0; c < e.cols; c += lanes<S>) {
      const bool last = c == whole;
      Vec<S> y = element(last && loose ? load_first(x + c, rest) : load(x + c), r * e.ld + c);
      if (last) y = select_(inside, y, S(0));
      store(out + c, e.accumulate ? load(out + c) + y : y);
    }
    for (i64 c = whole + (rest ? lanes<S> : 0); c < e.ld; c += lanes<S>) store(out + c, Vec<S>{});
  }
}

// g f'(x). A unit that is off passes nothing on, even of a g that is not finite.
template <class F, class S>
FM_INLINE S chained(const F&, S g, S d1) {
  return g * d1;
}
template <class S>
FM_INLINE Vec<S> chained(const Relu<S>&, Vec<S> g, Vec<S> d1) {
  return select_(d1 != S(0), g, Vec<S>{});
}

template <class S>
void elementwise_forward(const Elementwise<S>& e) {
  with_function(e, [&](auto f) { for_each(e, [&](Vec<S> x, i64) { return f.value(x); }); });
}
template <class S>
void elementwise_backward(const Elementwise<S>& e) {
  with_function(e, [&](auto f) {
    for_each(e, [&](Vec<S> x, i64 i) {
      Vec<S> d1, d2;
      f.derivatives(x, load(e.y + i), d1, d2);
      return chained(f, load(e.dy + i), d1);
    });
  });
}
template <class S>
void elementwise_tangent(const Elementwise<S>& e) {
  with_function(e, [&](auto f) {
    for_each(e, [&](Vec<S> x, i64 i) {
      Vec<S> d1, d2;
      f.derivatives(x, load(e.y + i), d1, d2);
      return chained(f, load(e.rx + i), d1);
    });
  });
}
template <class S>
void elementwise_tangent_backward(const Elementwise<S>& e) {
  with_function(e, [&](auto f) {
    for_each(e, [&](Vec<S> x, i64 i) {
      Vec<S> d1, d2;
      f.derivatives(x, load(e.y + i), d1, d2);
      Vec<S> rdx = chained(f, load(e.rdy + i), d1);
      if (!LINEAR_PIECES<decltype(f)> && e.rx) rdx += load(e.dy + i) * d2 * load(e.rx + i);
      return rdx;
    });
  });
}
