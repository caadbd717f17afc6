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

// out[r, c] (+)= element(row offset in x, row offset elsewhere, c); padding columns of out become
// zero.
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
