// One function over arrays: what tests and measurements of the functions call.

// out[i] = f(x[i], y[i])
template <class S, class F>
FM_INLINE void map(const Elementary<S>& e, const F& f) {
  const i64 whole = e.count / lanes<S> * lanes<S>, rest = e.count - whole;
  for (i64 i = 0; i < whole; i += lanes<S>)
    store(e.out + i, f(load(e.x + i), e.y ? load(e.y + i) : Vec<S>{}));
  if (!rest) return;
  S last[lanes<S>];
  store(last, f(load_first(e.x + whole, rest), e.y ? load_first(e.y + whole, rest) : Vec<S>{}));
  for (i64 i = 0; i < rest; ++i) e.out[whole + i] = last[i];
}

// Of an element-wise function its value, or with y = f(x) a derivative.
template <class S>
void element(const Elementary<S>& e) {
  Elementwise<S> of{};
  of.function = e.function, of.c0 = e.c0, of.c1 = e.c1;
  with_function(of, [&](auto f) {
    map(e, [&](Vec<S> x, Vec<S> y) {
      if (e.order == 0) return f.value(x);
      Vec<S> d1, d2;
      f.derivatives(x, y, d1, d2);
      return e.order == 1 ? d1 : d2;
    });
  });
}

template <class S>
void elementary(const Elementary<S>& e) {
#define FM_CASE(name)        \
  case ElementaryName::name: \
    return map(e, [](Vec<S> x, Vec<S>) FM_INLINE_LAMBDA { return name##_(x); });
  switch (e.name) {
    FM_ELEMENTARY(FM_CASE)
    case ElementaryName::pow:
      return map(e, [](Vec<S> x, Vec<S> y) FM_INLINE_LAMBDA { return pow_(x, y); });
    case ElementaryName::none:
      break;
  }
#undef FM_CASE
  element(e);
}
